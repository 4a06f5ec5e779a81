// Hypercalls to Hyper-V. They are issued through a Gate: in the kernel, a page that the hypervisor fills with the
// processor's instruction (vmcall or vmmcall); in a test, a function.
export module hv.hyperv.hypercall;
import core.std;
import core.result;
import core.dma;
export import hv.hyperv.protocol;

export namespace fl::hv::hyperv {

/// How to issue a hypercall: RCX control, RDX and R8 the guest-physical addresses of input and output, or, for a fast
/// call, the input itself [hv-tlfs §3.7]. `page`: one executable page for the hypervisor to fill; nullptr if none.
struct Gate {
    void* context = nullptr;
    u64 (*call)(void* context, u64 control, u64 input, u64 output) = nullptr;
    const void* page = nullptr;
};

/// The gate of this machine; empty in a hosted program.
Gate native_gate();

/// The two hypercalls that the VMBus needs, with a counter. signal_event() may be called on any processor at any time,
/// post_message() by one caller at a time.
class Hypercalls {
  public:
    Hypercalls() = default;
    Hypercalls(const Hypercalls&) = delete;
    Hypercalls& operator=(const Hypercalls&) = delete;

    /// Allocates the input page of post_message().
    Result<void> install(const Gate& gate, DmaAllocator& memory);
    bool installed() const { return gate_.call != nullptr && static_cast<bool>(input_); }

    /// `payload`: at most 240 bytes. On insufficient_buffers or insufficient_memory, retry later.
    Status post_message(u32 connection, u32 type, std::span<const std::byte> payload);
    /// Sets an event flag of the host: for a channel, "your ring has packets".
    Status signal_event(u32 connection, u16 flag = 0) {
        return call(to_underlying(Call::signal_event) | call_fast, signal_event_input(connection, flag), 0);
    }

    /// Hypercalls of all kinds since install().
    u64 count() const { return count_.load(std::memory_order_relaxed); }

  private:
    Status call(u64 control, u64 input, u64 output) {
        count_.fetch_add(1, std::memory_order_relaxed); // a statistic: orders nothing
        return static_cast<Status>(gate_.call(gate_.context, control, input, output) & 0xffff);
    }

    Gate gate_;
    DmaBuffer input_;
    std::atomic<u64> count_{0};
};

} // namespace fl::hv::hyperv
