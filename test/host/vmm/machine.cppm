// The machine: memory, processors as threads, ports, SynIC. What a guest says to Hyper-V's partition goes to a
// Partition; how it ends, to main.
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

/// Answers of hypercalls [hv-tlfs §4.12].
inline constexpr u16 hv_success = 0;
inline constexpr u16 hv_invalid_hypercall_code = 2;
inline constexpr u16 hv_invalid_hypercall_input = 3;
inline constexpr u16 hv_invalid_alignment = 4;

/// Whom a guest talks to by hypercall. All functions may be called by any processor's thread.
class Partition {
  public:
    virtual u16 post_message(u32 connection, u32 type, std::span<const std::byte> payload) = 0;
    virtual u16 signal_event(u32 connection, u16 flag) = 0;

  protected:
    ~Partition() = default;
};

/// How the process ends. Odd numbers are the guest's verdicts, (value << 1) | 1, as isa-debug-exit makes them.
enum class ExitCode : int {
    power_off = 0,
    usage = 64, // the command line
    input = 66, // a file: kernel, initrd, image
    crash = 70, // triple fault, or an exit that no guest should cause
    timeout = 72,
    host = 74,    // the system refused something
    reset = 76,   // the guest asked for a reset
    missing = 78, // KVM lacks a capability, which is named
};

struct MachineConfig {
    u32 processors = 1;
    u64 memory = 256 << 20; // bytes
    Identity identity{};    // its count of processors is set from the one above
};

class Machine final : private MachineControl, private BoardClock, private SerialSink {
  public:
    static Result<std::unique_ptr<Machine>> create(const MachineConfig& config);
    ~Machine();

    const GuestMemory& memory() const { return memory_; }
    Kvm& kvm() { return kvm_; }
    Synic& synic() { return *synic_; }
    PortBus& ports() { return ports_; }
    /// Held while a device's ports are accessed; for whoever touches a device from another thread.
    std::mutex& device_mutex() { return device_mutex_; }
    /// An interrupt line of the legacy controllers; lives as long as the machine.
    IrqLine& line(u32 gsi);
    /// Emulated IDE disks: hda, hdb, hdc, hdd, in order; at most four. Before start(), at most once. The images outlive
    /// the machine.
    Result<void> add_ide(std::span<Image* const> images);
    Serial& serial() { return *serial_; }
    /// Is told of each whole line that the guest prints, in the thread of the processor that prints it, and must not
    /// print.
    void set_line_watcher(void (*see)(void* context, std::string_view line), void* context) { watch_ = {see, context}; }
    void set_partition(Partition& partition) { partition_ = &partition; }
    /// Adds counters of others to what is printed.
    void set_counters(void (*add)(void* context, Snapshot& into), void* context);
    /// Loads nothing: the entry comes from the loader. Then start() lets all processors go.
    Result<void> prepare(const Entry& entry);
    void start();

    /// A line of this program's own, between the guest's lines. Any thread.
    void say(std::string_view text);
    /// A guest's line that has not been ended is shown all the same when it gets old: now and then, from the I/O
    /// thread.
    void flush_console();
    /// Prints the counters and the reason, ends the process. Any thread.
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
    std::mutex console_mutex_;
    std::pair<void (*)(void*, std::string_view), void*> watch_{};
    std::string console_; // the guest's line so far
    bool console_aged_ = false;
    u64 line_changes_ = 0;
    u32 phase_ = 0;
    u64 phase_begin_ = 0;
    Snapshot phase_counters_;
};

} // namespace fl::vmm
