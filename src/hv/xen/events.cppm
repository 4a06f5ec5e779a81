// Two-level event channels: ports, their pending and mask bits in the shared info page, and the upcall that finds the
// pending ones. Used on one processor only, except for what handlers raise, and mask(), unmask() and send() of a port
// whose owner is on another one.
export module hv.xen.events;
import core.std;
import core.result;
import core.interrupt;
export import hv.xen.hypercall;

export namespace fl::hv::xen {

/// Accesses shared between sender and receiver. All are read-modify-writes, since Xen sets bits while they are cleared:
///
///   upcall: exchange upcall_pending with 0     Xen sets the bits in the order pending, selector, upcall_pending, each
///   upcall: exchange selector with 0           by a locked operation; they are cleared here in the reverse order: an
///   upcall: and-not of pending                 event that arrives in between sets all three once more
///   unmask: and-not of mask, load of pending   Xen: or of pending, load of mask. One of the two sees the other: no
///                                              event is lost
class Events {
  public:
    using Event = Port;

    /// Ports from here on have no handler slot. Xen allocates the lowest free port, so small machines stay far below.
    static constexpr u32 capacity = 512;
    /// Passes over the selector per upcall; later events set upcall_pending and raise another upcall.
    static constexpr u32 max_passes = 4;

    /// `shared`: the mapped shared info page; `vcpu`: Xen's number of this processor, below vcpus_in_shared_info. Masks
    /// every port.
    void install(Hypercalls& hypercalls, SharedInfo& shared, u32 vcpu);
    bool installed() const { return shared_ != nullptr; }
    /// In another domain, with its shared info page mapped: no port is open, and each is masked.
    void restart();

    /// Allocates a port that domain `remote` may bind to.
    Result<Port> allocate_unbound(Domain remote);
    /// Allocates a port that is connected to a port of another domain.
    Result<Port> bind_interdomain(Domain remote, Port remote_port);
    /// The handler runs in the upcall, with interrupts off, after the pending bit was cleared. The port stays masked
    /// until unmask(). Error{exhausted}: the port is beyond `capacity`; Error{busy}: it has a handler already.
    Result<void> bind(Port port, InterruptHandler handler, void* context);
    /// Masks the port, removes the handler and closes the port. No effect on a port that is not open.
    void unbind(Port port);
    /// Ports that were allocated or bound here and not closed since.
    u32 open_ports() const { return open_count_; }

    /// Disables upcalls for this port; events stay pending. One locked instruction, no hypercall.
    void mask(Port port);
    /// Enables upcalls for this port. True: an event was pending and was consumed here: the caller must check its ring.
    /// No hypercall.
    [[nodiscard]] bool unmask(Port port);
    /// Notifies the remote end: one hypercall.
    Result<void> send(Port port);

    /// The interrupt handler. `context` is the Events.
    static void upcall(void* context) { static_cast<Events*>(context)->scan(); }
    void scan();

    /// Sleeps until one of the (masked) ports is pending or about `timeout_ns` have passed; may return early. For
    /// idling without interrupts: one hypercall and no upcall. Interrupts other than events do not end it.
    i64 poll(std::span<const u32> ports, u64 timeout_ns);

    u64 upcalls() const { return upcalls_; }
    /// Events on ports without a handler, which were then masked.
    u64 unexpected() const { return unexpected_; }

  private:
    struct Slot {
        InterruptHandler handler = nullptr;
        void* context = nullptr;
    };
    static u32 number(Port port) { return to_underlying(port); }
    void note_open(Port port);

    Hypercalls* hypercalls_ = nullptr;
    SharedInfo* shared_ = nullptr;
    VcpuInfo* vcpu_ = nullptr;
    u64 upcalls_ = 0;
    u64 unexpected_ = 0;
    std::array<Slot, capacity> slots_{};
    std::array<u64, capacity / 64> open_{}; // one bit per port
    u32 open_count_ = 0;
};

inline void Events::mask(Port port) {
    const u32 n = number(port);
    // Relaxed: an event that still arrives is harmless. Pairs with Xen's load of the mask after it has set pending.
    std::atomic_ref<u64>(shared_->mask[n / 64]).fetch_or(u64{1} << n % 64, std::memory_order_relaxed);
}

inline bool Events::unmask(Port port) {
    const u32 n = number(port);
    const u64 bit = u64{1} << n % 64;
    // Sequentially consistent: our store to mask before our load of pending. Pairs with Xen's locked set of pending,
    // then its load of mask.
    std::atomic_ref<u64>(shared_->mask[n / 64]).fetch_and(~bit, std::memory_order_seq_cst);
    std::atomic_ref<u64> pending(shared_->pending[n / 64]);
    if ((pending.load(std::memory_order_seq_cst) & bit) == 0) [[likely]] {
        return false;
    }
    // Acquire: makes the sender's writes before its notification visible to the caller.
    return (pending.fetch_and(~bit, std::memory_order_acquire) & bit) != 0;
}

} // namespace fl::hv::xen
