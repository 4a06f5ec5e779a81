// One lane of a connected network card: its queue, its event channel, and the service that its processor's executor
// visits. Independent of XenStore and the handshake.
//
// Events. The port is masked from an event until the processor is about to sleep, so a busy lane takes no interrupts.
// An event is requested for the next received slot, and for answers to sent frames only while someone waits for room.
export module drivers.xen_net.device;
import core.std;
import core.result;
import core.text;
import core.dma;
import core.time;
import io.executor;
import io.net;
import io.task;
import hv.xen.events;
import hv.xen.grants;
export import drivers.xen_net.queue;

export namespace fl::drivers::xen_net {

class Lane;

/// What the lanes of one card share. Owned by the driver; outlives the lanes.
struct Lanes {
    static constexpr u32 max_lanes = 8;

    std::array<Lane*, max_lanes> all{};
    u32 count = 0;
    std::atomic<bool> failed{false}; // a lane has closed itself: the card must be closed
    /// Called once, by the first lane that closes itself, on that lane's processor, after `failed` was set.
    void (*on_failure)(void* context) = nullptr;
    void* context = nullptr;
};

class Lane final : public io::NetDevice, public io::Service {
  public:
    /// `executor`: of the lane's processor. `number`: from 0.
    Lane(io::Executor& executor, hv::xen::Events& events, hv::xen::Grants& grants, Lanes& lanes)
        : NetDevice(executor), events_(events), lanes_(lanes), transmitter_(grants), receiver_(grants) {}

    /// Allocates and grants the pages. `rings`: two zeroed pages, the transmit and the receive ring. Before the back
    /// end connects, on any processor. Again after stop() or hold(), and reclaim().
    Result<void> prepare(const Identity& identity, bool offloads_checksums, DmaSpan rings, hv::xen::Domain domain,
                         hv::xen::Port port, DmaAllocator& dma);
    /// Before start(): what was negotiated, for the identity.
    void set_features(const FixedText<96>& features) { identity_.features = features; }
    /// The back end is connected: starts serving, or goes on after hold(), on the lane's processor.
    io::Task<Result<void>> start();
    /// The connection is lost, on the lane's processor: the rings are not accessed any more, frames in them are lost,
    /// and others wait for room until start() or stop().
    io::Task<Result<void>> hold();
    /// The same while the lane's processor does nothing, on any one.
    void lose() { connected_ = false; }
    /// Ends it, on the lane's processor: the rings are not accessed any more, until start(). May be called at any time.
    io::Task<Result<void>> stop();
    /// The back end can no longer access anything: frees the pages. After stop().
    void reclaim();
    /// The back end may access the pages for ever.
    void abandon();

    /// The handler of the event channel; runs in the upcall, which may be on another processor.
    static void on_event(void* self) { static_cast<Lane*>(self)->on_event(); }

    // io::NetDevice
    u32 lanes() const override { return lanes_.all[0] == this ? lanes_.count : 1; }
    io::NetDevice& lane(u32 index) override { return lanes_.all[0] == this ? *lanes_.all[index] : *this; }

    // io::Service
    void flush() override;
    bool drain() override;
    bool arm() override;
    bool wants_tick() const override { return waits_for_room(); }
    bool awaits_answer() const override { return connected_ && is_open() && (has_receiver() || waits_for_room()); }

  private:
    bool start(const io::OutgoingFrame& frame, io::Checksum checksum) override;
    void on_event();
    Result<bool> receive();
    Result<bool> reap();
    Result<bool> request_events();
    void fail(const Error& why);

    hv::xen::Events& events_;
    Lanes& lanes_;
    hv::xen::Port port_ = hv::xen::Port::none;
    Transmitter transmitter_;
    Receiver receiver_;
    bool added_ = false; // to the executor
    bool connected_ = false;
    // Written by the handler, perhaps on another processor, and by arm(). The handler cannot run between the event that
    // masked the port and the unmasking; relaxed: ordered by raise() and the next turn, and by the locked operations on
    // the port's bits.
    std::atomic<bool> masked_{true};
    std::atomic<u32> interrupts_{0};
};

} // namespace fl::drivers::xen_net
