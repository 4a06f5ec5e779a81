// Event channels: ports, and the upcall that finds the pending ones. By the FIFO interface, where Xen has it: pending
// and mask bits are in an event word per port, and Xen queues the ports whose events arrive, for each processor.
// Otherwise by the two-level interface: the bits of all ports are in the shared info page. A port belongs to one
// processor, which takes its upcalls and runs its handler.
//
// bind(), unbind() and the allocation of ports are for processor 0, join() and leave() for the processor itself, and
// bind_virq() for either, while the other one waits for it;
// mask(), unmask() and send() may be called on any processor.
export module hv.xen.events;
import core.std;
import core.result;
import core.interrupt;
import core.processor;
export import hv.xen.hypercall;

export namespace fl::hv::xen {

/// What Xen and one virtual CPU share; does not cross a page.
struct alignas(256) SharedWithVcpu {
    VcpuInfo info;
    FifoControl control;
};

/// Accesses shared between sender and receiver. All are read-modify-writes, since Xen sets bits while they are cleared:
///
///   upcall: exchange upcall_pending with 0     Xen sets the bits in the order pending, selector, upcall_pending, each
///   upcall: exchange selector with 0           by a locked operation; they are cleared here in the reverse order: an
///   upcall: and-not of pending                 event that arrives in between sets all three once more
///   unmask: and-not of mask, load of pending   Xen: or of pending, load of mask. One of the two sees the other: no
///                                              event is lost
///
/// A word of pending bits holds ports of several processors: each takes its own, and leaves the others pending for
/// the upcalls of theirs. An event that unmask() finds pending is consumed by its caller, on whichever processor that
/// is, so no upcall is needed for it (which only EVTCHNOP_unmask could raise on another virtual CPU).
///
/// With FIFO event channels:
///
///   upcall: exchange upcall_pending with 0   Xen: pending; if the word is neither masked nor linked: linked, the link
///   upcall: exchange ready with 0            of the queue's last word (or the head), ready, upcall_pending. Cleared in
///   upcall: clear linked and link            the reverse order here, and linked before pending: an event that arrives
///   upcall: and-not of pending               in between links the word once more, or is seen here
///   unmask: clear masked and pending, both   Xen: or of pending, load of masked. Waits while busy, as Xen retries its
///           at once                          change of a link only four times
///
///   atomic      ordering  written by        read by           orders
///   bound, mine release   bind, unbind      upcall (acquire)  the slot before the bit that makes the upcall use it
///   scans       seq_cst   upcall            unbind (seq_cst)  upcall: scans odd, then mine; unbind: mine, then scans.
///                                                             One of the two sees the other: after unbind() no upcall
///                                                             uses the slot
class Events {
  public:
    using Event = Port;

    /// Ports from here on have no handler slot. Xen allocates the lowest free port, so small machines stay far below.
    static constexpr u32 capacity = 512;
    /// Passes over the selector per upcall; later events set upcall_pending and raise another upcall.
    static constexpr u32 max_passes = 4;
    /// Queued events per upcall (FIFO); those that are left cause another upcall.
    static constexpr u32 max_queued = 4 * capacity;

    /// `shared`: the mapped shared info page. Masks every port. join() follows.
    void install(Hypercalls& hypercalls, SharedInfo& shared);
    bool installed() const { return shared_ != nullptr; }
    /// In another domain, with its shared info page mapped, while nothing else runs: no port is open, each is masked.
    /// Processors that have joined take their upcalls from the shared info page, as far as it has a place for them.
    Result<void> restart();
    /// On any processor, for a virtual CPU that is down and has no place in the shared info page: only with one of its
    /// own does Xen start it. join() with the same place follows.
    Result<void> prepare(u32 vcpu, SharedWithVcpu& own, u64 frame, u32 offset);
    /// On the processor itself, before its first upcall: takes the upcalls of virtual CPU `vcpu`. `own`: zeroed
    /// memory in guest frame `frame` at byte `offset`, for the rest of the machine's life. If Xen refuses it for the
    /// vcpu_info, the virtual CPU's place in the shared info page is used. Error{not_supported}: it has none, or Xen
    /// refuses the control block; ports are then not bound to this processor.
    /// `prepared`: by prepare().
    Result<void> join(u32 processor, u32 vcpu, SharedWithVcpu& own, u64 frame, u32 offset, bool prepared = false);
    /// On processor 0, which has joined, before the other ones and before any port is bound: FIFO event channels.
    /// `words`: a page in guest frame `frame`, for the rest of the machine's life. False: this Xen has none, and
    /// nothing changes. Error: Xen has switched, and refuses the page.
    Result<bool> use_fifo(std::span<u32> words, u64 frame);
    bool fifo() const { return !words_.empty(); }
    /// On a processor that has joined, to which no port is bound: none will be.
    void withdraw(u32 processor) { cpus_[processor].takes.store(false, std::memory_order_relaxed); }
    /// On a processor that has joined: no upcalls for the ports bound to it from now on.
    void leave(u32 processor);
    bool joined(u32 processor) const {
        return cpus_[processor].takes.load(std::memory_order_acquire); // pairs with the release in join()
    }
    /// Of a processor that has joined.
    const VcpuInfo& info(u32 processor) const { return *cpus_[processor].info.load(std::memory_order_relaxed); }
    u32 vcpu(u32 processor) const { return cpus_[processor].vcpu; }

    /// Allocates a port that domain `remote` may bind to.
    Result<Port> allocate_unbound(Domain remote);
    /// Allocates a port that is connected to a port of another domain.
    Result<Port> bind_interdomain(Domain remote, Port remote_port);
    /// The handler runs in the upcall on `processor`, with interrupts off, after the pending bit was cleared. On
    /// processor 0 if the other one has not joined, or Xen does not move the port there. The port stays masked until
    /// unmask(). Returns the processor. Error{exhausted}: the port is beyond `capacity`; Error{busy}: it has a handler
    /// already.
    Result<u32> bind(Port port, InterruptHandler handler, void* context, u32 processor = 0);
    /// Allocates a port whose events send() raises on `processor`, which has joined; bound to the handler and unmasked.
    Result<Port> open_ipi(u32 processor, InterruptHandler handler, void* context);
    /// A port for `virq`, one that each virtual CPU has, of the virtual CPU of `processor`, unmasked; the handler runs
    /// in the upcall there. With FIFO event channels it comes before other events. Error{not_supported}: the processor
    /// has not joined, or Xen refuses; otherwise as bind().
    Result<Port> bind_virq(u32 virq, InterruptHandler handler, void* context, u32 processor);
    /// Masks the port, removes the handler, waits until it runs nowhere, and closes the port. No effect on a port that
    /// is not open. Not in a handler.
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

    /// The interrupt handler, on every processor. `context` is the Events.
    static void upcall(void* context) { static_cast<Events*>(context)->scan(); }
    void scan();

    /// Sleeps until one of the (masked) ports is pending or about `timeout_ns` have passed; may return early. For
    /// idling without interrupts: one hypercall and no upcall. Interrupts other than events do not end it.
    i64 poll(std::span<const u32> ports, u64 timeout_ns);

    /// Upcalls taken by `processor`.
    u64 upcalls(u32 processor) const { return cpus_[processor].scans.load(std::memory_order_relaxed) / 2; }
    /// Events on ports without a handler, which were then masked.
    u64 unexpected() const { return unexpected_.load(std::memory_order_relaxed); }

  private:
    static constexpr u32 bound_words = capacity / 64;

    struct Slot {
        InterruptHandler handler = nullptr;
        void* context = nullptr;
        u32 processor = 0;
    };
    struct alignas(128) Cpu { // no cache line is written by two processors
        // nullptr: this virtual CPU has none. Also without ports: an upcall that is not acknowledged comes again.
        std::atomic<VcpuInfo*> info{nullptr};
        std::atomic<bool> takes{false}; // ports may be bound to it
        u32 vcpu = 0;
        SharedWithVcpu* own = nullptr;
        u64 frame = 0; // of `own`
        u32 offset = 0;
        std::array<u32, fifo_priorities> heads{}; // of the queues, as far as they are taken; 0: the control block's
        std::atomic<u64> scans{0};                // odd: an upcall is running
        std::array<std::atomic<u64>, bound_words> mine{};
    };
    static u32 number(Port port) { return to_underlying(port); }
    Result<void> check_bindable(Port port) const;
    void take(Port port, InterruptHandler handler, void* context, u32 processor);
    void note_open(Port port);
    void scan_words(Cpu& cpu, VcpuInfo& info);
    void scan_queues(Cpu& cpu, VcpuInfo& info);
    static bool unmask_word(u32& word);
    i64 init_control(Cpu& cpu);
    Result<void> start_fifo();
    void await_scans() const;

    Hypercalls* hypercalls_ = nullptr;
    SharedInfo* shared_ = nullptr;
    std::span<u32> words_; // event words; empty: two-level
    u64 words_frame_ = 0;
    std::atomic<u64> unexpected_{0};
    std::array<std::atomic<u64>, bound_words> bound_{}; // ports of all processors
    std::array<Slot, capacity> slots_{};
    std::array<u64, capacity / 64> open_{}; // one bit per port
    u32 open_count_ = 0;
    std::array<Cpu, max_processors> cpus_{};
};

inline void Events::mask(Port port) {
    const u32 n = number(port);
    // Relaxed: an event that still arrives is harmless. Pairs with Xen's load of the mask after it has set pending.
    if (!words_.empty()) {
        if (n < words_.size()) {
            std::atomic_ref<u32>(words_[n]).fetch_or(fifo_masked, std::memory_order_relaxed);
        }
        return;
    }
    std::atomic_ref<u64>(shared_->mask[n / 64]).fetch_or(u64{1} << n % 64, std::memory_order_relaxed);
}

inline bool Events::unmask(Port port) {
    const u32 n = number(port);
    if (!words_.empty()) {
        return unmask_word(words_[n]);
    }
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
