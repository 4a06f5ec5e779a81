// Machine shutdown: for each platform and verdict, the methods to try in order (docs/INTERFACES.md "How the machine
// ends"). Portable, so that tests can use fake machines; boot.machine.ending executes the methods on the real one.
export module boot.ending;
import core.std;
import core.acpi;
import core.cpuid;
import core.physical;
import core.time;
import core.verdict;
import hv.backend;

export namespace fl::boot {

/// A method of ending the machine. Most of them return if the platform does not support them.
enum class Method : u8 {
    exit_port,    // debug exit port 0xf4: QEMU's isa-debug-exit, the test host
    xen_off,      // SCHEDOP_shutdown with SHUTDOWN_poweroff
    xen_crash,    // SCHEDOP_shutdown with SHUTDOWN_crash
    xen_reboot,   // SCHEDOP_shutdown with SHUTDOWN_reboot
    hyperv_crash, // Hyper-V's crash registers: notifies the host only; the machine keeps running
    pvpanic,      // QEMU's pvpanic: likewise
    acpi_off,     // \_S5 (ACPI soft-off)
    acpi_reset,   // the FADT's reset register
    hyperv_reset, // Hyper-V's reset register
    keyboard,     // the i8042 keyboard controller pulses the reset line
    triple_fault, // never returns
};

/// The shutdown methods that the platform supports.
struct Platform {
    bool xen = false;
    bool hyperv_crash = false;
    bool hyperv_reset = false;
    bool pvpanic = false;
    bool acpi_off = false;
    bool acpi_reset = false;
    // a triple fault gives the VMM a distinct exit status, although it can power off: bhyve
    bool triple_fault_reported = false;
};

struct Methods {
    std::array<Method, 9> list{};
    u32 count = 0;
    constexpr std::span<const Method> all() const { return {list.data(), count}; }
};

/// The methods to try after the debug exit port, in order. SUCCESS and SKIP end the way the platform reports success;
/// the other three verdicts end as a failure where the platform distinguishes the two. A method that restarts the
/// machine is used only if it cannot be powered off, or after that has failed. `restart`: the host has asked for a
/// restart, and the verdict is a good one: only such methods are tried.
Methods methods_of(const Platform& platform, Verdict verdict, bool restart = false);

/// What the methods need besides ports and registers.
class EndMachine {
  public:
    /// Busy-waits for a bounded time; uses no device.
    virtual void wait(Nanoseconds length) = 0;
    virtual const CpuidSnapshot& cpuid() = 0;
    virtual PhysicalReader& memory() = 0;
    /// The RSDP address from the loader; 0: search for it.
    virtual u64 rsdp() = 0;
    /// The ACPI tables if they have been read already, else nullptr.
    virtual const acpi::Tables* tables() = 0;
    virtual void write_memory(u64 physical, u8 value) = 0;
    /// SCHEDOP_shutdown with the processor's hypercall instruction, since the hypercall page may not be installed yet.
    virtual void xen_shutdown(u32 reason) = 0;
    /// The reason text, in memory that the host can read; size 0: none.
    struct Text {
        u64 physical;
        u64 size;
    };
    virtual Text reason() = 0;
    /// Called before a method that may restart the machine: leaves a note for the next boot (restarted_by()) if memory
    /// survives the reset.
    virtual void note_restart(Verdict verdict) = 0;
    virtual void triple_fault() = 0;

  protected:
    ~EndMachine() = default;
};

/// Ends the machine step by step. A step that faults is not repeated: the fault handler calls step() for the next one.
class Ending {
  public:
    constexpr Ending() = default;
    /// The machine is to be restarted, if the verdict is a good one. Before the first step.
    void request_restart() { restart_ = true; }
    /// Runs the next step; false: none is left. The verdict of the first call is used throughout.
    bool step(EndMachine& machine, hv::Privileged& cpu, Verdict verdict);
    const Platform& platform() const { return platform_; }

  private:
    void probe_cpuid(EndMachine& machine, hv::Privileged& cpu);
    void probe_acpi(EndMachine& machine);
    void take(Method method, EndMachine& machine, hv::Privileged& cpu);
    void note_restart(EndMachine& machine);
    void sleep_s5(EndMachine& machine, hv::Privileged& cpu);
    void crash_hyperv(EndMachine& machine, hv::Privileged& cpu);

    u32 next_ = 0;
    std::optional<Verdict> verdict_;
    bool restart_ = false;
    Platform platform_;
    Methods methods_;
    std::optional<acpi::Fadt> fadt_;
    std::optional<acpi::SleepType> s5_;
    u16 pvpanic_port_ = 0;
};

/// The note written by note_restart(), at an address that neither loaders nor a reset overwrite.
struct RestartNote {
    static constexpr u64 physical = 0x1ff000; // the page below the image at its PVH load address
    static constexpr u64 magic_value = 0x4b52414d4c46544e;

    u64 magic;
    u64 verdict;
    u64 inverted; // ~magic ^ verdict: guards against memory that matches by chance
};
constexpr RestartNote restart_note(Verdict verdict) {
    return {RestartNote::magic_value, to_underlying(verdict), ~RestartNote::magic_value ^ to_underlying(verdict)};
}
/// The verdict of the previous boot if the kernel itself restarted the machine; nothing if this is not such a restart.
constexpr std::optional<Verdict> restarted_by(const RestartNote& note) {
    if (note.magic != RestartNote::magic_value || note.inverted != (~note.magic ^ note.verdict) ||
        note.verdict < to_underlying(Verdict::success) || note.verdict > to_underlying(Verdict::crash)) {
        return std::nullopt;
    }
    return static_cast<Verdict>(note.verdict);
}

} // namespace fl::boot
