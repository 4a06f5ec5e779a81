// The storage channel once it is open: a Queue per channel, and on it a Disk per logical unit. Knows neither the bus
// nor the handshake.
//
// What is under way stands in the queue's slots; a completion is copied out once by the channel and must carry a known
// id, the length that the version has, COMPLETE_IO, and no more data than was asked for. The first violation closes the
// whole controller: all its queues look at `Shared`. A request may need several packets (parts); it ends when all of
// them have been answered.
//
// Only what the host has is timed [io.oldest_wait]. When the oldest request has had its time, the host is asked to
// reset the bus, which makes it answer everything, and has a whole time-out for that; what is not answered then is
// given up.
export module drivers.storvsc.disk;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import io.executor;
import io.block;
import io.inflight;
import io.latch;
import io.oldest_wait;
import hv.hyperv.channel;
export import drivers.storvsc.protocol;
export import drivers.storvsc.scsi;

export namespace fl::drivers::storvsc {

/// What was agreed with the host; the same for all channels of a controller.
struct Terms {
    Version version = Version::win6; // until one has been agreed on: the shorter packets, which every host takes
    u32 max_transfer = 128 * 1024;   // bytes of one command, a multiple of 4096
};

/// What the queues of one controller tell each other across processors.
struct Shared {
    // Release when set, acquire when seen: what led to it is logged before.
    std::atomic<bool> closed{false};
    std::atomic<u8> close_status{0}; // io::Status for what is still under way; written before `closed`
    std::atomic<bool> told{false};   // by whoever closes: there is one line, and one status
    // the host has rescinded the channel. Relaxed: nothing is read on the strength of it
    std::atomic<bool> taken{false};
    // Relaxed: a wish, looked at in the first queue's tick.
    std::atomic<bool> reset_wanted{false};
    /// Called on the first queue's processor, in drain() or tick(): somebody should look at the units, or at `closed`.
    void (*notify)(void* context) = nullptr;
    void* context = nullptr;
    // Relaxed, as reset_wanted: wishes for the controller.
    std::atomic<bool> rescan_wanted{false};
    // Sums over all queues, each adds its own in its tick. Relaxed: they only say how busy the host is.
    std::atomic<u64> under_way{0};
    std::atomic<u64> answered{0};
    std::atomic<u64> heard{0}; // packets of any kind: the answer to a bus reset comes on the first queue
};

/// A packet of the controller's own, and its answer. Lives with who waits for it, until done or abandoned.
struct Exchange {
    explicit Exchange(io::Executor& executor) : done(executor) {}
    Packet packet{}; // in: what is asked; out: the answer
    DmaSpan data{};  // what the host reads or writes; empty: nothing
    io::Latch done;
    bool answered = false; // else the queue was closed
    u64 id = 0;
};

class Disk;

/// One channel. Registered with its executor from start() to stop(), both on its own processor.
class Queue final : private io::Service {
  public:
    static constexpr u32 max_parts = 128;
    /// Of these, for the controller's own packets alone: a command of a rescan, and the reset of the bus.
    static constexpr u32 kept_parts = 2;
    /// Interrupts within `idle_window` nanoseconds that bring nothing, and no packet in between; more are told of.
    static constexpr u32 max_idle_events = 256;
    static constexpr Nanoseconds idle_window = 1'000'000'000;

    Queue(io::Executor& executor, hv::hyperv::Channel& channel, Shared& shared, bool first);
    ~Queue();

    /// The channel is open. `parameters`: one page for UNMAP's lists; kept by the caller. `timeout`: as the disks'.
    void start(DmaSpan parameters, Nanoseconds timeout);
    /// No more calls from the executor. Everything under way has ended.
    void stop();
    void agree(const Terms& terms) { terms_ = terms; }
    const Terms& terms() const { return terms_; }

    /// Sends what `exchange` holds, header and length set. Error{exhausted}: no room now.
    Result<void> send(Exchange& exchange);
    /// Nobody waits for it any more; a late answer is taken silently.
    void abandon(Exchange& exchange);

    /// Ends everything under way, here at once and in the other queues in their next turn, and takes no more.
    void shut(io::Status status, const Error& why);
    bool is_open() const { return state_ == State::open; }
    /// From any processor: it has ended everything and touches the channel no more.
    // acquire: partner is the release in end_all()
    bool quiet() const { return quiet_.load(std::memory_order_acquire); }
    u32 under_way() const { return static_cast<u32>(inflight_.size()); }
    io::Executor& executor() const { return executor_; }

  private:
    friend class Disk;
    using Request = io::Request;
    enum class State : u8 { closed, open, shut };

    struct Slot {
        Request* request = nullptr; // nullptr, and no exchange: nobody waits any more, but the answer may still come
        Disk* disk = nullptr;
        Exchange* exchange = nullptr;
        u32 offset = 0; // of its data in the request's buffer
        u32 bytes = 0;
        u8 retries = 0;
        bool delayed = false;   // not with the host: sent again in the next tick
        bool reset = false;     // it was under way when the host was asked to reset the bus
        bool expired = false;   // because of it, or for the second time: it is not sent again after the reset
        bool short_cdb = false; // it was sent as a command of 10 bytes that has a longer sibling
        u64 number = 0;         // in order of issue
    };

    void flush() override;
    bool drain() override;
    bool arm() override;
    void tick(Instant now) override;

    bool issue(Disk& disk, Request& request);
    bool issue_part(Disk& disk, Request& request);
    /// The slot's packet into the ring. False: no room, or the ring is broken (then the queue is shut).
    bool put(Slot& slot, u64 id);
    bool put_inline(Slot& slot, u64 id);
    void pump();
    void pump(Disk& disk);
    bool accept(const hv::hyperv::Packet& packet);
    bool accept_event(const hv::hyperv::Packet& packet);
    void answered(u64 id, Slot& slot, const Packet& packet);
    bool again(u64 id, bool now);
    void finish(Slot& slot, io::Status status);
    void abandon(Request& request);
    void look_at_time();
    void ask_for_reset(Slot& oldest);
    void give_up_after_reset();
    void publish_counts(u64 under_way);
    void look_at_events();
    void send_reset();
    void end_all(io::Status status);
    void broken(const Error& why) { shut(io::Status::protocol_error, why); }
    void broken_ring();
    void wish() const {
        if (shared_.notify != nullptr && first_) {
            shared_.notify(shared_.context);
        }
    }

    io::Executor& executor_;
    hv::hyperv::Channel& channel_;
    Shared& shared_;
    const bool first_;
    State state_ = State::closed;
    bool armed_ = false;
    Terms terms_;
    Nanoseconds timeout_ = 0;
    DmaSpan parameters_;
    io::Inflight<Slot, max_parts> inflight_;
    std::array<Slot, max_parts> slots_{}; // by slot of inflight_
    Disk* disks_ = nullptr;
    Disk* current_ = nullptr; // who is charged for notifications and interrupts: the one that was active last
    u32 delayed_ = 0;         // slots that wait for the next tick
    u32 events_seen_ = 0;
    u32 idle_events_ = 0;
    Instant idle_until_ = 0;
    bool storm_told_ = false;
    u64 issued_ = 0;   // packets of requests so far
    u64 answered_ = 0; // of them, those that have been answered, late ones included
    u64 heard_ = 0;    // packets of the host's so far, of any kind
    u64 published_under_way_ = 0;
    u64 published_answered_ = 0;
    u64 published_heard_ = 0;
    io::OldestWait oldest_;
    io::OldestWait stuck_; // of requests that wait while none is with the host
    // since the bus reset was asked for, until all that was under way has been answered
    std::optional<io::Bound> reset_wait_;
    u64 reset_issued_ = 0; // issued_ then
    u64 reset_heard_ = 0;  // and what all queues had heard
    Exchange reset_;
    std::atomic<bool> quiet_{true};
};

/// One logical unit through one channel. The first one is the disk; the others are its lanes.
class Disk final : public io::BlockDevice {
  public:
    static constexpr u32 max_lanes = 64;
    static constexpr u32 max_told_errors = 8;

    struct Unit {
        u8 path = 0;
        u8 target = 0;
        u8 lun = 0;
        u32 max_transfer = 0;        // bytes; a multiple of the sector size
        u32 max_unmap_blocks = 0;    // of one UNMAP
        bool short_commands = false; // READ(10) and WRITE(10) from the beginning; else when (16) is refused
    };

    /// now: here, which is the queue's processor, or it has not been started. later: by link().
    enum class Linked : u8 { now, later };

    Disk(Queue& queue, const Unit& unit, const io::Geometry& geometry, const Identity& identity,
         Linked linked = Linked::now);
    /// On the queue's processor, or when it has been stopped; or never linked.
    ~Disk();

    /// Once: its queue looks after it from here on. On the queue's own processor, as soon as that comes to it; `here`
    /// is the caller's.
    void link(io::Executor& here);

    /// Before it is announced: a further lane, in the order of the processors. Not owned.
    void add_lane(Disk& lane);
    u32 lanes() const override { return lane_count_ + 1; }
    io::BlockDevice& lane(u32 index) override { return index == 0 ? *this : *lanes_[index - 1]; }

    const Unit& unit() const { return unit_; }
    /// From any processor, for this lane alone: the unit is gone; what is asked for from here on is refused.
    void remove() { gone_.store(true, std::memory_order_relaxed); } // relaxed: nothing is read on the strength of it
    bool removed() const override;

  private:
    friend class Queue;
    using Request = io::Request;

    void start(Request& request) override;
    bool cancel_now(Request& request) override;
    void forget(Request& request) override;
    void end(Request& request, io::Status status) { complete(request, status); }
    void build(Packet& packet, const Request& request, u32 offset, u32 bytes) const;
    bool fits_10() const;
    void tell(scsi::Opcode opcode, std::string_view what);
    void tell_attention(const scsi::Sense& sense);

    struct Link : io::Post {
        Disk* disk = nullptr;
    };
    void enlist();

    Queue& queue_;
    Unit unit_;
    Link link_;
    bool linked_ = false;
    Packet template_{};
    u32 sector_shift_;
    bool flush_16_ = false;
    bool io_10_ = false; // READ(10), WRITE(10)
    u32 errors_told_ = 0;
    u32 attentions_told_ = 0;
    bool absence_told_ = false;
    io::RequestQueue waiting_;
    Disk* next_ = nullptr; // on the queue
    std::atomic<bool> gone_{false};
    std::array<Disk*, max_lanes - 1> lanes_{};
    u32 lane_count_ = 0;
};

} // namespace fl::drivers::storvsc
