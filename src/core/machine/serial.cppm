// The kernel's two consoles: COM1, and the hypervisors' debug console at port 0xe9. The log passes whole lines.
export module core.machine.serial;
import core.std;
import core.log;

export namespace fl {

/// A 16550 UART at 115200 8N1 [16550]. Writes in bursts of the FIFO's size, with one status read each. If the
/// transmitter stays full for too long, text is dropped rather than blocking the kernel.
class SerialPort final : public log::Sink {
  public:
    constexpr explicit SerialPort(u16 base) : base_(base) {}
    /// Detects and programs the port. False if it is absent or fails the scratch test; write() then does nothing.
    bool open();
    void write(std::string_view text) override;

  private:
    u16 base_;
    u16 burst_ = 1; // bytes that an empty transmitter accepts
    bool present_ = false;
};

/// Port 0xe9 of Bochs, QEMU and Xen: accepts bytes, always ready.
class DebugConsole final : public log::Sink {
  public:
    /// Present only if the port reads back its own number.
    bool open();
    /// Enables the port without a probe. Lines longer than `longest` bytes are continued (log::folded); 0: unlimited.
    void open(usize longest);
    void write(std::string_view text) override;

  private:
    bool present_ = false;
    usize longest_ = 0;
    usize column_ = 0;
};

SerialPort& com1();
DebugConsole& debug_console();
/// Attaches those that are present to the log. Idempotent.
void open_consoles();
/// Attaches the debug console without a probe (see DebugConsole::open). Idempotent.
void use_debug_port(usize longest);

} // namespace fl
