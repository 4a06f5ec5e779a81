// Calls into Xen. The way in is a Gate: in the kernel the page that Xen fills with the processor's own instruction, in
// a test a function.
export module hv.xen.hypercall;
import core.std;
import core.result;
export import hv.xen.protocol;

export namespace fl::hv::xen {

/// How a call reaches the hypervisor. `call` gets a hypercall's number and up to five arguments (registers RDI, RSI,
/// RDX, R10, R8 [xen-public arch-x86/xen-x86_64.h]); `page`: what Xen shall fill with its entries, executable, nullptr
/// when there is nothing to fill. Guest structures are passed by virtual address.
struct Gate {
    void* context = nullptr;
    i64 (*call)(void* context, u32 number, u64 a, u64 b, u64 c, u64 d, u64 e) = nullptr;
    const void* page = nullptr;
};

/// This processor's own: empty in a hosted program.
Gate native_gate();

/// Typed calls, counted. Every answer is 0 or more, or one of Xen's error numbers, negative.
class Hypercalls {
  public:
    Hypercalls() = default;
    explicit Hypercalls(const Gate& gate) : gate_(gate) {}

    i64 call(Hypercall number, u64 a = 0, u64 b = 0, u64 c = 0) {
        ++count_;
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
    /// Makes one of Xen's pages appear at a guest frame, in the place of what was there.
    Result<void> add_to_physmap(MapSpace space, u64 index, u64 frame);
    Result<u64> hvm_parameter(HvmParam index);
    Result<void> set_hvm_parameter(HvmParam index, u64 value);
    Result<void> set_upcall_vector(u32 vcpu, u8 vector);
    i64 console_write(std::string_view text);
    /// The most frames that this guest's grant table may have.
    Result<u32> grant_table_limit();

  private:
    Gate gate_;
    u64 count_ = 0;
};

} // namespace fl::hv::xen
