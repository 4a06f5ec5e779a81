// Time as Hyper-V tells it: the reference TSC page, and the counter register where that page is not there or not valid
// just now.
export module hv.hyperv.clock;
import core.std;
import core.result;
import core.cpuid;
import core.dma;
import hv.backend;
export import hv.hyperv.protocol;

export namespace fl::hv::hyperv {

/// floor(10^7 * 2^64 / scale): the counter's frequency behind a reference TSC page's scale; nothing when that is no
/// frequency of a real one.
std::optional<u64> frequency_of_scale(u64 scale);

/// One page for all processors. Reading it needs no exit and no lock.
class ReferenceClock {
  public:
    /// `leaf`: the registers of the features' leaf. Touches only registers that it announces. Nothing announced: now()
    /// is nothing for ever. Error{exhausted}: no memory for the page; the registers are used all the same.
    Result<void> install(Privileged& cpu, DmaAllocator& memory, const CpuidRegisters& leaf);
    /// Tells the hypervisor that the page is not used any more.
    void uninstall();

    /// Reference time in units of 100 ns since the machine's start, by the page, else by the register (an exit). `tsc`:
    /// the counter, read just now.
    std::optional<u64> now(u64 tsc) const;
    /// By the register alone.
    std::optional<u64> counter() const;
    /// Whether the page is valid now.
    bool page_valid() const;

    /// The time stamp counter's frequency: its own register, else from the page's scale.
    std::optional<u64> tsc_hz() const { return tsc_hz_; }
    std::string_view name() const { return name_; }

  private:
    // The page's values as one consistent whole; nothing: not valid now.
    struct Scale {
        u64 scale;
        i64 offset;
    };
    std::optional<Scale> read_page() const;

    Privileged* cpu_ = nullptr;
    DmaBuffer memory_;
    const ReferenceTscPage* page_ = nullptr;
    u64 register_before_ = 0;
    bool counter_offered_ = false;
    std::optional<u64> tsc_hz_;
    std::string_view name_ = "none";
};

} // namespace fl::hv::hyperv
