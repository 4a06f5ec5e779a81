// Hyper-V's reference time: from the reference TSC page, or from the counter register if that page is unavailable or
// currently invalid.
export module hv.hyperv.clock;
import core.std;
import core.result;
import core.cpuid;
import core.dma;
import hv.backend;
export import hv.hyperv.protocol;

export namespace fl::hv::hyperv {

/// floor(10^7 * 2^64 / scale): the counter's frequency in Hz for a reference TSC page's scale; nothing if it is
/// implausible.
std::optional<u64> frequency_of_scale(u64 scale);

/// One page for all processors. Reading it takes no exit and no lock.
class ReferenceClock {
  public:
    /// `leaf`: the registers of the features leaf. Accesses only the MSRs that it reports; if it reports none, now()
    /// always returns nothing. Error{exhausted}: no memory for the page; the MSRs are used nevertheless.
    Result<void> install(Privileged& cpu, DmaAllocator& memory, const CpuidRegisters& leaf);
    /// Disables the reference TSC page.
    void uninstall();

    /// Reference time in units of 100 ns since the machine's start, from the page, or else from the register (an exit).
    /// `tsc`: a current reading of the time stamp counter.
    std::optional<u64> now(u64 tsc) const;
    /// The same, from the register only.
    std::optional<u64> counter() const;
    /// Whether the page is valid now.
    bool page_valid() const;

    /// The time stamp counter's frequency in Hz: from its MSR, or else from the page's scale.
    std::optional<u64> tsc_hz() const { return tsc_hz_; }
    std::string_view name() const { return name_; }

  private:
    // A consistent snapshot of the page; nothing if it is invalid now.
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
