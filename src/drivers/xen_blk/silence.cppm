// What is done about a back end that does not answer. There is no way to ask it for anything: no reset, no abort.
export module drivers.xen_blk.silence;
import core.std;
import core.result;
import io.block_queue;
import io.oldest_wait;

export namespace fl::drivers::xen_blk {

/// The oldest request has waited for a whole time-out, while the connection is up; `finding`: what its wait shows.
constexpr io::Recovery recovery_from(io::OldestWait::Finding finding) {
    if (finding == io::OldestWait::Finding::lost) {
        return {.kind = io::Recovery::Kind::give_up};
    }
    return {.kind = io::Recovery::Kind::close,
            .why = Error{Code::timed_out, "the back end has not answered anything for a whole time-out"}};
}

/// Requests wait for room, and the back end has none that anybody waits for. `no_slots`: abandoned requests hold all
/// slots; else other disks hold all grants.
constexpr io::Stuck stuck_because(bool no_slots) {
    if (no_slots) {
        return {.kind = io::Stuck::Kind::close,
                .why = Error{Code::timed_out, "every slot is held by a request that the back end never completed"}};
    }
    return {.kind = io::Stuck::Kind::give_up,
            .why = Error{Code::timed_out, "no grant entries became free for a request within the time-out"}};
}

} // namespace fl::drivers::xen_blk
