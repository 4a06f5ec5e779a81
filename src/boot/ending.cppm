// How the machine ends: for each platform and verdict the ways to be tried, one after the other (docs/INTERFACES.md
// "How the machine ends"). Portable: the tests end machines that they made up. boot.machine.ending does it with this
// machine's own instructions.
export module boot.ending;
import core.std;
import core.acpi;
import core.cpuid;
import core.physical;
import core.time;
import core.verdict;
import hv.backend;

export namespace fl::boot {

/// A way to end the machine. Most of them return where there is nothing that takes them.
enum class Way : u8 {
    exit_port,    // debug exit port 0xf4: QEMU's isa-debug-exit, the test host
    xen_off,      // SCHEDOP_shutdown with SHUTDOWN_poweroff
    xen_crash,    // SCHEDOP_shutdown with SHUTDOWN_crash
    hyperv_crash, // Hyper-V's crash registers: a note for the host; the machine goes on
    pvpanic,      // QEMU's pvpanic: likewise
    acpi_off,     // \_S5
    acpi_reset,   // the FADT's reset register
    hyperv_reset, // Hyper-V's reset register
    keyboard,     // the i8042 pulses the reset line
    triple_fault, // never returns
};

/// What is known about the machine's ways out.
struct Platform {
    bool xen = false;
    bool hyperv_crash = false;
    bool hyperv_reset = false;
    bool pvpanic = false;
    bool acpi_off = false;
    bool acpi_reset = false;
    // the VMM's exit status after a triple fault is one of its own, though it can power off: bhyve
    bool triple_fault_tells = false;
};

struct Ways {
    std::array<Way, 9> list{};
    u32 count = 0;
    constexpr std::span<const Way> all() const { return {list.data(), count}; }
};

/// The ways behind the debug exit port, in order. SUCCESS and SKIP end as what the platform takes for a success, the
/// other three, where it knows a difference, as a failure. A way that restarts the machine comes only where it has no
/// way to be switched off, or behind that one.
Ways ways_of(const Platform& platform, Verdict verdict);

/// What the ways are made of, beside ports and registers.
class EndMachine {
  public:
    /// Bounded, without any device.
    virtual void wait(Nanoseconds length) = 0;
    virtual const CpuidSnapshot& cpuid() = 0;
    virtual PhysicalReader& memory() = 0;
    /// What the loader said; 0: it is looked for.
    virtual u64 rsdp() = 0;
    /// The tables, where somebody has read them before.
    virtual const acpi::Tables* tables() = 0;
    virtual void write_memory(u64 physical, u8 value) = 0;
    /// SCHEDOP_shutdown by the processor's own instruction: no hypercall page may be there yet.
    virtual void xen_shutdown(u32 reason) = 0;
    /// The reason's text in memory that a host can read; size 0: none.
    struct Text {
        u64 physical;
        u64 size;
    };
    virtual Text reason() = 0;
    /// The next way may restart the machine: leaves a note for the next boot (restarted_by()), where memory survives.
    virtual void note_restart(Verdict verdict) = 0;
    virtual void triple_fault() = 0;

  protected:
    ~EndMachine() = default;
};

/// Ends the machine step by step. A step that faults is not tried again: the fault handler calls step() for the
/// next one.
class Ending {
  public:
    constexpr Ending() = default;
    /// The next step; false: there is none left. The verdict of the first call counts.
    bool step(EndMachine& machine, hv::Privileged& cpu, Verdict verdict);
    const Platform& platform() const { return platform_; }

  private:
    void ask_cpuid(EndMachine& machine, hv::Privileged& cpu);
    void ask_acpi(EndMachine& machine);
    void take(Way way, EndMachine& machine, hv::Privileged& cpu);
    void sleep_s5(EndMachine& machine, hv::Privileged& cpu);
    void crash_hyperv(EndMachine& machine, hv::Privileged& cpu);

    u32 next_ = 0;
    std::optional<Verdict> verdict_;
    Platform platform_;
    Ways ways_;
    std::optional<acpi::Fadt> fadt_;
    std::optional<acpi::SleepType> s5_;
    u16 pvpanic_port_ = 0;
};

/// The note of note_restart(), at a place that no loader and no reset writes to.
struct RestartNote {
    static constexpr u64 physical = 0x1ff000; // the page below the image, as PVH loads it
    static constexpr u64 magic_value = 0x4b52414d4c46544e;

    u64 magic;
    u64 verdict;
    u64 inverted; // ~magic ^ verdict: memory that holds something else by chance is no note
};
constexpr RestartNote restart_note(Verdict verdict) {
    return {RestartNote::magic_value, to_underlying(verdict), ~RestartNote::magic_value ^ to_underlying(verdict)};
}
/// The verdict that the machine was restarted after; nothing: it was not, or by somebody else.
constexpr std::optional<Verdict> restarted_by(const RestartNote& note) {
    if (note.magic != RestartNote::magic_value || note.inverted != (~note.magic ^ note.verdict) ||
        note.verdict < to_underlying(Verdict::success) || note.verdict > to_underlying(Verdict::crash)) {
        return std::nullopt;
    }
    return static_cast<Verdict>(note.verdict);
}

} // namespace fl::boot
