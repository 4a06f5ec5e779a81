// Event channels, two-level: ports, their pending and mask bits in the shared info page, and the upcall that finds out
// which of them is pending. Everything but raise() of the handlers' own signals happens on one processor.
export module hv.xen.events;
import core.std;
import core.result;
import core.interrupt;
export import hv.xen.hypercall;

export namespace fl::hv::xen {

/// What a sender and a receiver share, bit by bit. All read-modify-writes, since Xen sets bits while we clear them:
///
///   upcall: exchange upcall_pending with 0     Xen sets the bits in the order pending, selector, upcall_pending, each
///   upcall: exchange selector with 0           by a locked operation; they are cleared here in the opposite order: an
///   upcall: and-not of pending                 event that comes meanwhile sets all three again
///   unmask: and-not of mask, load of pending   Xen: or of pending, load of mask. One of the two sees the other: no
///                                              event is lost
class Events {
  public:
    using Event = Port; // hv.backend EventChannels

    /// Ports from here on find no handler slot. Xen hands out the lowest free port, so a small machine stays far below.
    static constexpr u32 capacity = 512;
    /// Passes over the selector in one upcall; what comes later finds upcall_pending set and gets an upcall of its own.
    static constexpr u32 max_passes = 4;

    /// `shared`: the mapped shared info page; `vcpu`: this processor's number for Xen, below vcpus_in_shared_info.
    /// Masks every port.
    void install(Hypercalls& hypercalls, SharedInfo& shared, u32 vcpu);
    bool installed() const { return shared_ != nullptr; }

    /// A new port that domain `remote` may bind to.
    Result<Port> allocate_unbound(Domain remote);
    /// A port connected to another domain's.
    Result<Port> bind_interdomain(Domain remote, Port remote_port);
    /// The handler runs in the upcall, interrupts off, after the pending bit was cleared. The port is masked until
    /// unmask(). Error{exhausted}: the port is beyond `capacity`; Error{busy}: it has a handler.
    Result<void> bind(Port port, InterruptHandler handler, void* context);
    /// Masks, forgets the handler and closes the port.
    void unbind(Port port);

    /// No upcall for this port from now on; events are kept as pending. A locked instruction, no call.
    void mask(Port port);
    /// Upcalls again. True: an event had come in the meantime and was consumed here; look yourself. No call.
    [[nodiscard]] bool unmask(Port port);
    /// Tells the other end: one hypercall.
    Result<void> send(Port port);

    /// The interrupt. `context` is the Events.
    static void upcall(void* context) { static_cast<Events*>(context)->scan(); }
    void scan();

    /// Sleeps until one of the ports (masked ones) is pending, or about `timeout_ns` have passed; wakes too early at
    /// will. For idling without an interrupt: one call and no upcall. Interrupts that are no events do not wake it.
    i64 poll(std::span<const u32> ports, u64 timeout_ns);

    u64 upcalls() const { return upcalls_; }
    /// Events on ports without a handler: counted, masked.
    u64 unexpected() const { return unexpected_; }

  private:
    struct Slot {
        InterruptHandler handler = nullptr;
        void* context = nullptr;
    };
    static u32 number(Port port) { return to_underlying(port); }

    Hypercalls* hypercalls_ = nullptr;
    SharedInfo* shared_ = nullptr;
    VcpuInfo* vcpu_ = nullptr;
    u64 upcalls_ = 0;
    u64 unexpected_ = 0;
    std::array<Slot, capacity> slots_{};
};

inline void Events::mask(Port port) {
    const u32 n = number(port);
    // Relaxed: an event that still gets through is harmless. Partner: Xen's load of the mask after it has set pending.
    std::atomic_ref<u64>(shared_->mask[n / 64]).fetch_or(u64{1} << n % 64, std::memory_order_relaxed);
}

inline bool Events::unmask(Port port) {
    const u32 n = number(port);
    const u64 bit = u64{1} << n % 64;
    // Sequentially consistent: our mask before our look at pending. Partner: Xen's locked set of pending, then its load
    // of the mask.
    std::atomic_ref<u64>(shared_->mask[n / 64]).fetch_and(~bit, std::memory_order_seq_cst);
    std::atomic_ref<u64> pending(shared_->pending[n / 64]);
    if ((pending.load(std::memory_order_seq_cst) & bit) == 0) [[likely]] {
        return false;
    }
    // Acquire: what the sender wrote before it sent is seen by whoever looks now.
    return (pending.fetch_and(~bit, std::memory_order_acquire) & bit) != 0;
}

} // namespace fl::hv::xen
