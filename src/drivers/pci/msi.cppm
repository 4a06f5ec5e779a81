// A PCI function's interrupts: MSI-X before MSI before the INTx line [PCI-3.0 §6.8], [PCIe-5.0 §6.1.4].
//
// A driver specifies the use and processor of each of its vectors, most important first:
//
//     pci::Interrupts interrupts(device, environment.interrupts, environment.mmio);
//     CO_TRY(const u32 count, interrupts.attach(wanted)); // 1 to wanted.size(): the first `count` of them
//
// It then programs its device with the numbers 0 to count - 1. With fewer vectors than queues several queues share one.
export module drivers.pci.msi;
import core.std;
import core.interrupt;
import core.mmio;
import core.result;
import core.vector;
import drivers.pci;

export namespace fl::drivers::pci {

/// The interrupt mechanism of a function.
enum class InterruptKind : u8 { none, line, msi, msix };
constexpr std::string_view name(InterruptKind kind) {
    constexpr std::array<std::string_view, 4> names{"none", "line", "msi", "msix"};
    return names[to_underlying(kind)];
}

/// The best mechanism of a function, and its number of vectors. Reads configuration space only.
struct InterruptOffer {
    InterruptKind kind = InterruptKind::none;
    u32 count = 0;
};
InterruptOffer interrupts_of(const Device& device);

/// The use of a vector.
struct VectorUse {
    u32 processor = 0;
    InterruptHandler handler = nullptr;
    void* context = nullptr;
};

/// The vectors of one function. Not copyable or movable: handlers may be running. The destructor detaches.
class Interrupts {
  public:
    Interrupts(const Device& device, InterruptController& controller, MmioMapper& mapper)
        : device_(device), controller_(controller), mapper_(mapper) {}
    ~Interrupts() { detach(); }
    Interrupts(const Interrupts&) = delete;
    Interrupts& operator=(const Interrupts&) = delete;

    /// Attaches the first vectors of `wanted`, as many as the device and the machine have, and enables them in the
    /// device; returns their number. Vectors are numbered as in `wanted`. MSI: the number is a power of two, and all
    /// are delivered to the processor of the first, because the device has one address for them. INTx: one vector;
    /// the line may be shared, so the handler must check the device's own registers. Call before the device is set
    /// up: sizing BARs briefly disables its decoding. Mechanisms better than `best` are not used.
    ///
    /// Errors, with nothing attached and all registers restored: Error{bad_argument}: `wanted` has fewer than
    /// `at_least` (1 or more). Error{busy}: attached already. Error{exhausted}: fewer than `at_least` are available.
    /// Error{protocol}: the device describes its table or its messages incorrectly. Error{not_supported}: the
    /// function cannot interrupt. The error is that of the best mechanism that the function has.
    Result<u32> attach(std::span<const VectorUse> wanted, u32 at_least = 1, InterruptKind best = InterruptKind::msix);
    /// Disables the device's interrupts and restores its registers to their values before attach(); on return no
    /// handler is running or will run. The device must be quiescent. Not from handlers.
    void detach();

    InterruptKind kind() const { return kind_; }
    /// Number of vectors attached.
    u32 count() const { return count_; }
    /// Masks vector `index` until unmask(); events in between are delivered once then. In force on return, but a
    /// handler already running continues. False: unsupported by this device (MSI without per-vector masking).
    bool mask(u32 index) { return set_mask(index, true); }
    bool unmask(u32 index) { return set_mask(index, false); }

  private:
    // A vector, with the previous contents of its registers.
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
    u16 old_control_ = 0; // previous value of the capability's control register
    Command old_command_{};
    u32 old_mask_ = 0; // MSI mask bits
    u16 other_ = 0;    // the other mechanism's capability if it was enabled; 0: it was not
    CapabilityId other_id_ = CapabilityId::msi;
};

} // namespace fl::drivers::pci
