// A virtual block device in use: a ring of it as an io.block_queue transport, and the disk on that. A device may have
// several, each for one processor [io.queue_group]. When they are opened, held and connected again is in
// drivers.xen_blk.lane.
//
// A response must have a known id, and answer what was requested [drivers.xen_blk.answer]. The first violation closes
// the disk.
export module drivers.xen_blk.disk;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import io.executor;
import io.block;
import io.block_queue;
import io.event_pacing;
import io.oldest_wait;
export import io.queue_group;
import hv.xen.events;
import hv.xen.grants;
export import drivers.xen_blk.protocol;
export import drivers.xen_blk.queue;
export import drivers.xen_blk.requests;
import drivers.xen_blk.event_channel;
import drivers.xen_blk.pages;
import drivers.xen_blk.silence;

export namespace fl::drivers::xen_blk {

class Disk;

class Transport : public io::GroupedTransport {
  public:
    using Disk = xen_blk::Disk;
    static constexpr std::string_view driver = "xen_blk";
    static constexpr u32 max_commands = Ring::max_slots;
    static constexpr u32 max_idle_events = 64;
    static constexpr Nanoseconds idle_window = io::Executor::tick_length;
    using Wire = xen_blk::Wire;
    using Command = io::Command<Transport>;

    /// `first`: its processor is number 0.
    Transport(io::Executor& executor, io::QueueGroup& group, hv::xen::Events& events, hv::xen::Grants& grants,
              bool first)
        : GroupedTransport(group), executor_(executor), channel_(executor, events), pages_(grants, first),
          requests_(pages_) {}

    Ring& ring() { return ring_; }
    Pages& pages() { return pages_; }
    /// The ring is connected, and the pages are open. `notify`: see Lane::set_up().
    void start(const Terms& terms, void (*notify)(void* context), void* context);
    using GroupedTransport::join;
    /// See Lane::hold() and Lane::pause().
    void lose();
    void pause() { link_ = Link::paused; }
    void unpause() { link_ = Link::up; }
    bool is_lost() const { return link_ == Link::lost; }
    inline void on_event() { channel_.on_event(*queue); }

    // io::BlockTransport
    void use(io::CommandTable<Transport>& commands) { commands_ = &commands; }
    io::Fit prepare(Command& command);
    io::SendResult send(Command& command, u64 id);
    Result<void> publish(io::Counters& counters);
    io::Next next(io::Completion& completion);
    Error fault() const { return fault_.value_or(Error{Code::protocol, "the ring is broken"}); }
    inline Result<void> release(io::Counters&) { return ring_.end_batch(); }
    Result<bool> arm();
    inline u32 events() const { return channel_.count(); }
    bool finish(Command& command, io::Status status);
    io::Fence fence(Command& command);
    inline io::Recovery recover(const Command&, io::OldestWait::Finding finding, std::string_view) {
        return is_lost() ? io::Recovery{.kind = io::Recovery::Kind::none} : recovery_from(finding);
    }
    inline io::Stuck stuck(std::string_view) {
        return link_ != Link::up ? io::Stuck{} : stuck_because(commands_->full() || ring_.full());
    }
    Result<void> tick(Instant now, bool waiting);
    inline bool wants_tick() const { return !is_lost() && pages_.in_quarantine(); }
    void closed(bool stopped);

  private:
    [[gnu::noinline]] void send_other(Command& command, u64 id); // all but a page
    enum class Link : u8 {
        up,
        paused, // no room for commands
        lost,   // nor is anything sent or taken, until open()
    };
    io::Next broken(const Error& why) {
        fault_ = why;
        return io::Next::broken;
    }

    io::Executor& executor_;
    io::CommandTable<Transport>* commands_ = nullptr;
    Ring ring_;
    EventChannel channel_;
    io::EventPacing pacing_;
    std::optional<Error> fault_;
    Link link_ = Link::up;
    void (*notify_)(void*) = nullptr;
    void* notify_context_ = nullptr;
    Pages pages_;
    Requests requests_;
};

} // namespace fl::drivers::xen_blk

// Instantiated once, in disk.cpp, which is optimized for speed.
namespace fl {
extern template class io::BlockQueue<drivers::xen_blk::Transport>;
extern template class io::QueueDisk<drivers::xen_blk::Transport>;
} // namespace fl

export namespace fl::drivers::xen_blk {

using Queue = io::GroupedQueue<Transport>;

/// The device on one of its queues. The first one is the disk; the others are its lanes.
class Disk final : public io::GroupedDisk<Transport> {
  public:
    explicit Disk(Queue& queue) : GroupedDisk(queue, {}, {}) {}
    void identify(const Identity& identity) { identity_ = identity; }
    void set_features(const FixedText<96>& features) { identity_.features = features; }
    /// On its processor, before each connection of its queue: what the back end offers from now on.
    void set_terms(const Terms& terms);

  private:
    bool known_ = false; // other lanes know the geometry
};

} // namespace fl::drivers::xen_blk
