// A PCI function's interrupts: MSI-X before MSI before the INTx line [PCI-3.0 §6.8], [PCIe-5.0 §6.1.4].
//
// A driver says what each of its vectors is for and on which processor it is to run, most needed first:
//
//     pci::Interrupts interrupts(device, environment.interrupts, environment.mmio);
//     CO_TRY(const u32 count, interrupts.attach(wanted)); // 1 to wanted.size(): the first `count` of them
//
// and gives its device the numbers 0 to count - 1. With fewer vectors than queues several queues share one.
export module drivers.pci.msi;
import core.std;
import core.interrupt;
import core.mmio;
import core.result;
import core.vector;
import drivers.pci;

export namespace fl::drivers::pci {

/// How a function interrupts.
enum class InterruptKind : u8 { none, line, msi, msix };
constexpr std::string_view name(InterruptKind kind) {
    constexpr std::array<std::string_view, 4> names{"none", "line", "msi", "msix"};
    return names[to_underlying(kind)];
}

/// The best kind that a function has, and how many vectors of it. Reads configuration space only.
struct InterruptOffer {
    InterruptKind kind = InterruptKind::none;
    u32 count = 0;
};
InterruptOffer interrupts_of(const Device& device);

/// What a vector is for.
struct VectorUse {
    u32 processor = 0;
    InterruptHandler handler = nullptr;
    void* context = nullptr;
};

/// The vectors of one function. Not copied or moved: handlers may be running. Its destructor detaches.
class Interrupts {
  public:
    Interrupts(const Device& device, InterruptController& controller, MmioMapper& mapper)
        : device_(device), controller_(controller), mapper_(mapper) {}
    ~Interrupts() { detach(); }
    Interrupts(const Interrupts&) = delete;
    Interrupts& operator=(const Interrupts&) = delete;

    /// Attaches the first vectors of `wanted`, as many as the device and the machine have, and lets the device use
    /// them; gives their number. Vectors are numbered as in `wanted`. MSI: the number is a power of two, and all run on
    /// the processor of the first, because the device has one address for them. INTx: one vector; the device's own
    /// registers say whether it interrupts, for the line may be shared. Before the device is set up: sizing BARs
    /// switches its decoding off for a moment.
    ///
    /// Errors, with nothing attached and all registers as before: Error{bad_argument}: `wanted` has fewer than
    /// `at_least` (1 or more). Error{busy}: attached already. Error{exhausted}: fewer than `at_least` are to be had.
    /// Error{protocol}: the device describes its table or its messages as no device may. Error{not_supported}: the
    /// function cannot interrupt. The error is that of the best kind that the function has.
    Result<u32> attach(std::span<const VectorUse> wanted, u32 at_least = 1);
    /// The device is silenced, its registers get the values that they had before attach(); when it returns no handler
    /// is running or will run. The device must not be expected to interrupt any more. Not from handlers.
    void detach();

    InterruptKind kind() const { return kind_; }
    /// Vectors attached.
    u32 count() const { return count_; }
    /// Holds back vector `index` until unmask(); what comes meanwhile is delivered once then. It is in force when this
    /// returns, but a handler that is running already goes on. False: this device cannot (MSI without per-vector
    /// masking).
    bool mask(u32 index) { return set_mask(index, true); }
    bool unmask(u32 index) { return set_mask(index, false); }

  private:
    // Of one vector, with what was in its place before.
    struct Entry {
        InterruptVector vector{};
        u64 old_address = 0;
        u32 old_data = 0;
        u32 old_control = 0;
    };
    Result<void> attach_messages(std::span<const VectorUse> wanted, u32 at_least);
    Result<void> attach_run(std::span<const VectorUse> wanted, u32 at_least);
    Result<void> attach_msix(std::span<const VectorUse> wanted, u32 at_least);
    Result<void> attach_msi(std::span<const VectorUse> wanted, u32 at_least);
    Result<void> attach_line(std::span<const VectorUse> wanted, u32 at_least);
    Result<void> fail(Error error);
    Result<void> make_entries(u32 count);
    void release_vectors();
    bool set_mask(u32 index, bool masked);
    void switch_other_off(CapabilityId id);

    Device device_;
    InterruptController& controller_;
    MmioMapper& mapper_;
    Vector<Entry> entries_;
    u32 count_ = 0;
    InterruptKind kind_ = InterruptKind::none;
    VectorUse line_use_{};
    InterruptLine line_{};
    Mmio table_{};
    u16 capability_ = 0;
    u16 old_control_ = 0; // of the capability
    Command old_command_{};
    u32 old_mask_ = 0; // MSI's
    u16 other_ = 0;    // the other kind's capability, where it was on; 0: it was off
    CapabilityId other_id_ = CapabilityId::msi;
};

} // namespace fl::drivers::pci
