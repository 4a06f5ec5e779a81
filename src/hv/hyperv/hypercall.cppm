// Calls into Hyper-V. The way in is a Gate: in the kernel the page that the hypervisor fills with the processor's own
// instruction (so nobody here knows whether that is vmcall or vmmcall), in a test a function.
export module hv.hyperv.hypercall;
import core.std;
import core.result;
import core.dma;
export import hv.hyperv.protocol;

export namespace fl::hv::hyperv {

/// How a call reaches the hypervisor: RCX control, RDX and R8 the guest-physical addresses of input and output, or, in
/// a fast call, the input itself [hv-tlfs §3.7]. `page`: what the hypervisor shall fill, one page, executable; nullptr
/// when there is nothing to fill.
struct Gate {
    void* context = nullptr;
    u64 (*call)(void* context, u64 control, u64 input, u64 output) = nullptr;
    const void* page = nullptr;
};

/// This processor's own: empty in a hosted program.
Gate native_gate();

/// The two calls that a VMBus needs, counted. signal_event() from any processor; post_message() from one at a time.
class Hypercalls {
  public:
    Hypercalls() = default;
    Hypercalls(const Hypercalls&) = delete;
    Hypercalls& operator=(const Hypercalls&) = delete;

    /// Allocates the page that a message is passed in.
    Result<void> install(const Gate& gate, DmaAllocator& memory);
    bool installed() const { return gate_.call != nullptr && static_cast<bool>(input_); }

    /// At most 240 bytes. insufficient_buffers, insufficient_memory: try again later.
    Status post_message(u32 connection, u32 type, std::span<const std::byte> payload);
    /// Sets an event flag of the host's: for a channel, "there is something in your ring".
    Status signal_event(u32 connection, u16 flag = 0) {
        return call(to_underlying(Call::signal_event) | call_fast, signal_event_input(connection, flag), 0);
    }

    /// Of every kind, since install().
    u64 count() const { return count_.load(std::memory_order_relaxed); }

  private:
    Status call(u64 control, u64 input, u64 output) {
        count_.fetch_add(1, std::memory_order_relaxed); // a number, it orders nothing
        return static_cast<Status>(gate_.call(gate_.context, control, input, output) & 0xffff);
    }

    Gate gate_;
    DmaBuffer input_;
    std::atomic<u64> count_{0};
};

} // namespace fl::hv::hyperv
