module core.wall_clock;
import core.std;
import core.time;

namespace fl {

namespace {
// The wall-clock time at instant 0, modulo 2^64; ~0: not set. Relaxed: a single word that no other data depends on.
constinit std::atomic<u64> offset{~u64{0}};
} // namespace

void set_wall_clock(Instant now, UnixNanoseconds time) { offset.store(time - now, std::memory_order_relaxed); }

std::optional<UnixNanoseconds> wall_clock(Instant now) {
    const u64 at_zero = offset.load(std::memory_order_relaxed);
    if (at_zero == ~u64{0}) {
        return std::nullopt;
    }
    return at_zero + now;
}

} // namespace fl
