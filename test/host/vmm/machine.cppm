// The machine: memory, one thread per processor, ports, SynIC. Hypercalls for the VMBus are passed to a Partition.
module;
#include <linux/kvm.h>
export module vmm.machine;
import host.std;
import core.result;
import vmm.board;
import vmm.counters;
import vmm.cpuid;
import vmm.kvm;
import vmm.loader;
import vmm.ide;
import vmm.image;
import vmm.memory;
import vmm.pci;
import vmm.ports;
import vmm.serial;
import vmm.synic;

export namespace fl::vmm {

/// Hypercall status values [hv-tlfs §4.12].
inline constexpr u16 hv_success = 0;
inline constexpr u16 hv_invalid_hypercall_code = 2;
inline constexpr u16 hv_invalid_hypercall_input = 3;
inline constexpr u16 hv_invalid_alignment = 4;

/// Handler of the guest's hypercalls. All functions may be called on any processor's thread.
class Partition {
  public:
    virtual u16 post_message(u32 connection, u32 type, std::span<const std::byte> payload) = 0;
    virtual u16 signal_event(u32 connection, u16 flag) = 0;

  protected:
    ~Partition() = default;
};

/// Exit status of the process. Odd numbers are the guest's verdicts, (value << 1) | 1, as with isa-debug-exit.
enum class ExitCode : int {
    power_off = 0,
    usage = 64, // invalid command line
    input = 66, // unusable file: kernel, initrd, image
    crash = 70, // triple fault, or an unexpected exit
    timeout = 72,
    host = 74,    // a system call failed
    reset = 76,   // the guest requested a reset
    missing = 78, // KVM lacks a capability, which the message names
};

struct MachineConfig {
    u32 processors = 1;
    u64 memory = 256 << 20; // bytes
    Identity identity{};    // its `processors` is set from the one above
};

class Machine final : private MachineControl, private BoardClock, private SerialSink {
  public:
    static Result<std::unique_ptr<Machine>> create(const MachineConfig& config);
    ~Machine();

    const GuestMemory& memory() const { return memory_; }
    Kvm& kvm() { return kvm_; }
    Synic& synic() { return *synic_; }
    PortBus& ports() { return ports_; }
    /// Held while a device's ports are accessed; must be locked to access a device from another thread.
    std::mutex& device_mutex() { return device_mutex_; }
    /// An interrupt line of the legacy controllers; lives as long as the machine.
    IrqLine& line(u32 gsi);
    /// Adds emulated IDE disks: hda, hdb, hdc, hdd, in order; at most four. Called before start(), at most once. The
    /// images outlive the machine.
    Result<void> add_ide(std::span<Image* const> images);
    Serial& serial() { return *serial_; }
    /// Called with each complete line that the guest prints, on the printing processor's thread; must not print.
    void set_line_watcher(void (*see)(void* context, std::string_view line), void* context) { watch_ = {see, context}; }
    void set_partition(Partition& partition) { partition_ = &partition; }
    /// Registers a function that adds counters to what is printed.
    void set_counters(void (*add)(void* context, Snapshot& into), void* context);
    /// Registers a function that is called at the end, before the counters are printed.
    void set_ending(std::function<void()> ending) { at_end_ = std::move(ending); }
    /// Sets the first processor's registers to the loader's entry. start() then starts all processors.
    Result<void> prepare(const Entry& entry);
    void start();

    /// Prints a line of this program between the guest's lines. Any thread.
    void print_line(std::string_view text);
    /// Prints a guest's incomplete line that has not changed since the previous call; called periodically by the I/O
    /// thread.
    void flush_console();
    /// Prints the counters and the reason, and ends the process. Any thread.
    [[noreturn]] void finish(ExitCode code, std::string_view why);

    u64 now() { return nanoseconds(); }
    /// The same clock, coarser (a few milliseconds) and cheaper.
    static u64 coarse_now();
    u64 unix_seconds() override;

  private:
    struct Processor {
        u32 number = 0;
        Descriptor descriptor;
        kvm_run* run = nullptr;
        std::array<std::atomic<u64>, to_underlying(Exit::count)> exits{};
        KvmStatistics statistics;
    };
    class Line final : public IrqLine {
      public:
        Line(Machine& machine, u32 gsi) : machine_(machine), gsi_(gsi) {}
        void set(bool level) override;
        u32 gsi() const { return gsi_; }

      private:
        Machine& machine_;
        u32 gsi_;
    };

    explicit Machine(const MachineConfig& config) : config_(config) {}
    Result<void> set_up();
    Result<void> add_processor(u32 number, std::span<const kvm_cpuid_entry2> basic,
                               std::span<const kvm_cpuid_entry2> hyperv);
    [[noreturn]] void run(Processor& processor);
    Exit handle(Processor& processor);
    Exit handle_hyperv(Processor& processor);
    u16 post_message(u64 input, u64 address);
    u16 signal_event(u64 input, u64 parameter);
    void access_ports(kvm_run& run);
    Snapshot snapshot();
    void print_counters(const char* label, const Snapshot& from);

    void debug_exit(u32 value) override;
    void power_off() override;
    void reset(std::string_view how) override;
    void phase(u32 number) override;
    u64 nanoseconds() override;
    void put(char byte) override;

    MachineConfig config_;
    GuestMemory memory_;
    Kvm kvm_;
    std::unique_ptr<Synic> synic_;
    PortBus ports_;
    std::mutex device_mutex_;
    std::vector<std::unique_ptr<Line>> lines_;
    std::unique_ptr<Serial> serial_;
    Exits exits_{*this};
    PciHost pci_{exits_};
    std::array<std::unique_ptr<IdeChannel>, 2> ide_;
    PowerManagement power_{*this, *this};
    RealTimeClock clock_{*this};
    std::vector<std::unique_ptr<Processor>> processors_;
    std::vector<std::thread> threads_;
    Partition* partition_ = nullptr;
    std::vector<std::pair<void (*)(void*, Snapshot&), void*>> counters_;
    std::function<void()> at_end_;
    std::mutex console_mutex_;
    std::pair<void (*)(void*, std::string_view), void*> watch_{};
    std::string console_; // the guest's incomplete line
    bool console_aged_ = false;
    u64 line_changes_ = 0;
    u32 phase_ = 0;
    u64 phase_begin_ = 0;
    Snapshot phase_counters_;
};

} // namespace fl::vmm
