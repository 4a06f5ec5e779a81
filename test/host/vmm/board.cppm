// The small devices of the board: power management, reset, clock, debug exit, phase marks. Each implements only what
// guests need.
export module vmm.board;
import core.std;
import vmm.ports;

export namespace fl::vmm {

/// Fixed ports of the board; the FADT lists those of power management.
inline constexpr u16 debug_exit_port = 0xf4;  // as QEMU's isa-debug-exit: the process ends with (value << 1) | 1
inline constexpr u16 phase_port = 0x5f0;      // 32 or 8 bits: a number begins a phase of the counters, 0 ends it
inline constexpr u16 keyboard_command = 0x64; // 0xfe: reset
inline constexpr u16 reset_control = 0xcf9;   // bit 2 from 0 to 1: reset
inline constexpr u16 pm1_event = 0x600;       // status, enable: 16 bits each [ACPI 6.5 §4.8.3.1]
inline constexpr u16 pm1_control = 0x604;     // 16 bits [ACPI 6.5 §4.8.3.2]
inline constexpr u16 pm_timer = 0x608;        // 32 bits, 3.579545 MHz [ACPI 6.5 §4.8.3.3]
inline constexpr u64 pm_timer_hz = 3'579'545;
inline constexpr u8 sleep_type_off = 5; // \_S5 in dsdt.asl
inline constexpr u8 acpi_interrupt = 9;

/// Actions on the whole machine. Only phase() returns to the guest.
class MachineControl {
  public:
    virtual void debug_exit(u32 value) = 0;
    virtual void power_off() = 0;
    virtual void reset(std::string_view how) = 0;
    virtual void phase(u32 number) = 0;

  protected:
    ~MachineControl() = default;
};

/// Time source of the timer and the clock.
class BoardClock {
  public:
    virtual u64 nanoseconds() = 0;  // monotonic
    virtual u64 unix_seconds() = 0; // wall-clock time
  protected:
    ~BoardClock() = default;
};

/// Debug exit, phase marks, and the two legacy reset ports. The owner claims each of these ports.
class Exits final : public PortDevice {
  public:
    explicit Exits(MachineControl& control) : control_(control) {}
    u32 in(u16 port, unsigned size) override;
    void out(u16 port, unsigned size, u32 value) override;

  private:
    MachineControl& control_;
};

/// ACPI's fixed hardware: event block (no events), control block (sleep type 5 is off), timer.
class PowerManagement final : public PortDevice {
  public:
    static constexpr u16 port_count = 12;

    PowerManagement(MachineControl& control, BoardClock& clock) : control_(control), clock_(clock) {}
    u32 in(u16 port, unsigned size) override;
    void out(u16 port, unsigned size, u32 value) override;

  private:
    MachineControl& control_;
    BoardClock& clock_;
    u16 enable_ = 0;
};

/// An MC146818-compatible clock at 0x70 and 0x71: time in BCD, 24-hour mode, no update in progress; the other registers
/// are memory.
class RealTimeClock final : public PortDevice {
  public:
    explicit RealTimeClock(BoardClock& clock) : clock_(clock) {}
    u32 in(u16 port, unsigned size) override;
    void out(u16 port, unsigned size, u32 value) override;

  private:
    u8 read() const;

    BoardClock& clock_;
    u8 index_ = 0;
    std::array<u8, 128> memory_{};
};

} // namespace fl::vmm
