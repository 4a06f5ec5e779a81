// The two consoles of the kernel: COM1, and the debug console of hypervisors at port 0xe9. The log brings whole lines.
export module core.machine.serial;
import core.std;
import core.log;

export namespace fl {

/// A 16550 at 115200 8N1 [16550]. Text leaves in bursts of the FIFO's size, one status read each. A transmitter that
/// stays full for too long loses the text rather than stop the kernel.
class SerialPort final : public log::Sink {
  public:
    constexpr explicit SerialPort(u16 base) : base_(base) {}
    /// Looks for the port and programs it. Not there, or unable to keep a byte: false, and write() does nothing.
    bool open();
    void write(std::string_view text) override;

  private:
    u16 base_;
    u16 burst_ = 1; // bytes that an empty transmitter takes
    bool present_ = false;
};

/// The port 0xe9 of Bochs, QEMU and Xen: takes bytes, always ready.
class DebugConsole final : public log::Sink {
  public:
    /// Present only where the port reads back its own number.
    bool open();
    /// It is there, whatever it reads back. Lines longer than `longest` are continued (log::folded); 0: they may be of
    /// any length.
    void open(usize longest);
    void write(std::string_view text) override;

  private:
    bool present_ = false;
    usize longest_ = 0;
    usize column_ = 0;
};

SerialPort& com1();
DebugConsole& debug_console();
/// Attaches those of the two that are there to the log. Idempotent.
void open_consoles();
/// Attaches the debug console, which is known to be there (see DebugConsole::open); idempotent: it stays one console.
void use_debug_port(usize longest);

} // namespace fl
