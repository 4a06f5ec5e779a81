// Hypercalls to Xen. They are issued through a Gate: in the kernel, a page that Xen fills with the processor's
// instruction; in a test, a function.
export module hv.xen.hypercall;
import core.std;
import core.result;
export import hv.xen.protocol;

export namespace fl::hv::xen {

/// How to issue a hypercall. `call` takes its number and up to five arguments (registers RDI, RSI, RDX, R10, R8
/// [xen-public arch-x86/xen-x86_64.h]). `page`: an executable page for Xen to fill with its entries; nullptr if none.
/// Guest structures are passed by virtual address.
struct Gate {
    void* context = nullptr;
    i64 (*call)(void* context, u32 number, u64 a, u64 b, u64 c, u64 d, u64 e) = nullptr;
    const void* page = nullptr;
};

/// The gate of this machine; empty in a hosted program.
Gate native_gate();

/// Typed hypercalls, with a counter. Results are >= 0 on success, otherwise a negative Xen error number.
class Hypercalls {
  public:
    Hypercalls() = default;
    explicit Hypercalls(const Gate& gate) : gate_(gate) {}

    i64 call(Hypercall number, u64 a = 0, u64 b = 0, u64 c = 0) {
        // Relaxed: orders nothing. Atomic: lanes of a network card notify from their own processors.
        std::atomic_ref<u64>(count_).fetch_add(1, std::memory_order_relaxed);
        return gate_.call(gate_.context, to_underlying(number), a, b, c, 0, 0);
    }
    template <class Op, class Argument>
    i64 call(Hypercall number, Op op, Argument& argument) {
        return call(number, to_underlying(op), reinterpret_cast<u64>(&argument));
    }
    u64 count() const { return count_; }

    /// major << 16 | minor.
    i64 version() { return call(Hypercall::xen_version, to_underlying(VersionOp::version)); }
    /// The first 32 feature bits.
    Result<u32> features();
    /// Maps one of Xen's pages at a guest frame, replacing what was there.
    Result<void> add_to_physmap(MapSpace space, u64 index, u64 frame);
    /// An HVM parameter of this guest. All Results here fail with Error{not_supported} and Xen's error number.
    Result<u64> hvm_parameter(HvmParam index);
    Result<void> set_hvm_parameter(HvmParam index, u64 value);
    /// Sets the vector for event upcalls through the local APIC of virtual CPU `vcpu`.
    Result<void> set_upcall_vector(u32 vcpu, u8 vector);
    /// Whether virtual CPU `vcpu` runs; nothing: this guest has none of that number, or Xen does not tell.
    std::optional<bool> vcpu_is_up(u32 vcpu);
    /// Whether virtual CPU `vcpu` has registers already, and no INIT has taken them away: then start_vcpu() is refused.
    bool vcpu_is_initialised(u32 vcpu);
    /// Sets the registers of a virtual CPU that has none yet, and starts it.
    Result<void> start_vcpu(u32 vcpu, const VcpuContext& context);
    Result<void> stop_vcpu(u32 vcpu);
    /// Suspends this domain; returns 0 in another domain that continues from the same state, 1 in this one: the
    /// toolstack has cancelled it [xen-sched]; or a negative error number, at once.
    i64 suspend();
    /// Moves the vcpu_info of virtual CPU `vcpu`, the calling one, to `frame`, at byte `offset`.
    Result<void> register_vcpu_info(u32 vcpu, u64 frame, u32 offset);
    /// The times of virtual CPU `vcpu`, those in its present state included.
    Result<RunstateInfo> runstate(u32 vcpu);
    /// Arms the single-shot timer of virtual CPU `vcpu`, the calling one, for `expiry`, a system time in ns; one that
    /// has passed expires at once. 0, or a negative error number.
    i64 set_singleshot_timer(u32 vcpu, u64 expiry);
    Result<void> stop_singleshot_timer(u32 vcpu);
    /// Writes text to Xen's console; returns >= 0 or a negative error number.
    i64 console_write(std::string_view text);
    /// Maximum number of frames of this guest's grant table.
    Result<u32> grant_table_limit();

  private:
    Gate gate_;
    u64 count_ = 0;
};

} // namespace fl::hv::xen
