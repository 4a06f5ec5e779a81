// Wrappers of KVM's ioctls: one machine with in-kernel interrupt controllers, its processors, interrupt routes,
// statistics.
module;
#include <linux/kvm.h>
export module vmm.kvm;
import host.std;
import core.result;
import vmm.memory;

export namespace fl::vmm {

/// A file descriptor that closes itself.
class Descriptor {
  public:
    Descriptor() = default;
    explicit Descriptor(int number) : number_(number) {}
    Descriptor(Descriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
    Descriptor& operator=(Descriptor&& other) noexcept {
        std::swap(number_, other.number_);
        return *this;
    }
    ~Descriptor();
    int number() const { return number_; }

  private:
    int number_ = -1;
};

/// KVM's named statistics of a machine or a processor (KVM_GET_STATS_FD); empty if the kernel lacks them.
class KvmStatistics {
  public:
    KvmStatistics() = default;
    /// Takes ownership of the descriptor; keeps only the counters in `wanted`.
    KvmStatistics(Descriptor descriptor, std::span<const std::string_view> wanted);

    /// add(name, value) for each.
    template <class F>
    void each(F&& add) const {
        for (const Entry& entry : entries_) {
            add(std::string_view{entry.name}, value(entry.offset));
        }
    }

  private:
    struct Entry {
        std::string name;
        u64 offset;
    };
    u64 value(u64 offset) const;

    Descriptor descriptor_;
    std::vector<Entry> entries_;
};

/// An interrupt route of SynIC: one per virtual processor and SINT.
struct SintRoute {
    u32 gsi;
    u32 processor;
    u32 sint;
};

class Kvm {
  public:
    /// Opens `device`, checks for every capability that a machine with Hyper-V's interfaces needs, and creates the
    /// machine. Error{not_supported} names the first missing capability.
    static Result<Kvm> create(const char* device);

    /// Guest memory from address 0. `memory` outlives the machine.
    Result<void> set_memory(const GuestMemory& memory);
    /// Sets the routes of PIC, I/O APIC and `sints`, replacing all earlier ones.
    Result<void> set_routes(std::span<const SintRoute> sints);
    void set_line(u32 gsi, bool level) const;
    /// Connects an eventfd to an interrupt route: each signal raises it. `resample`: an eventfd that KVM signals when
    /// the guest has acknowledged the interrupt; -1: none.
    Result<void> connect(int event, u32 gsi, int resample = -1) const;
    void disconnect(int event, u32 gsi) const;
    /// The machine's clock in nanoseconds; the Hyper-V reference counter is the same clock in units of 100 ns.
    u64 clock() const;
    /// HvSignalEvent on `connection` signals the eventfd, without an exit to this process.
    Result<void> connect_signal(u32 connection, int event, bool on) const;

    /// CPUID leaves supported for this machine's processors; Hyper-V's leaves are in the second table.
    Result<std::vector<kvm_cpuid_entry2>> supported_cpuid() const;
    Result<std::vector<kvm_cpuid_entry2>> supported_hyperv_cpuid() const;
    static Result<void> set_cpuid(const Descriptor& processor, std::span<const kvm_cpuid_entry2> table);
    /// Sets a model-specific register of one processor.
    static Result<void> set_register(const Descriptor& processor, u32 index, u64 value);
    bool has(int capability) const;
    /// Creates processor `number`; processors are created in order.
    Result<Descriptor> create_processor(u32 number) const;
    usize run_size() const { return run_size_; }
    KvmStatistics statistics() const;
    /// Statistics of one processor.
    static KvmStatistics statistics_of(const Descriptor& processor);

  private:
    Descriptor system_;
    Descriptor machine_;
    usize run_size_ = 0;
};

/// ioctl(), restarted after a signal. Returns what ioctl() returns.
int control(const Descriptor& descriptor, unsigned long request, void* argument = nullptr);

} // namespace fl::vmm
