// KVM's ioctls as this program uses them: one machine with KVM's own interrupt controllers, its processors, interrupt
// routes, statistics.
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

/// The named counters that KVM keeps of a machine or a processor (KVM_GET_STATS_FD); empty where the kernel has none.
class KvmStatistics {
  public:
    KvmStatistics() = default;
    /// Takes the descriptor over; keeps only the counters in `wanted`.
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

/// Where interrupts of SynIC come in: one route per virtual processor and SINT.
struct SintRoute {
    u32 gsi;
    u32 processor;
    u32 sint;
};

class Kvm {
  public:
    /// Opens `device`, asks for every capability that a machine with Hyper-V's interfaces needs and creates the
    /// machine. Error{not_supported} names the first capability that is missing.
    static Result<Kvm> create(const char* device);

    /// Guest memory from address 0. `memory` outlives the machine.
    Result<void> set_memory(const GuestMemory& memory);
    /// The legacy routes of PIC and I/O APIC and those of `sints`; replaces all others.
    Result<void> set_routes(std::span<const SintRoute> sints);
    void set_line(u32 gsi, bool level) const;
    /// Connects an eventfd to an interrupt route: each signal raises it. With `resample` instead of -1, that one is
    /// signalled when the guest has acknowledged the interrupt.
    Result<void> connect(int event, u32 gsi, int resample = -1) const;
    void disconnect(int event, u32 gsi) const;
    /// The machine's clock in nanoseconds: what the reference counter shows, a hundred times finer.
    u64 clock() const;
    /// A signal on a VMBus connection becomes a signal of the eventfd, without an exit to here.
    Result<void> connect_signal(u32 connection, int event, bool on) const;

    /// What processors of this machine may show; Hyper-V's own come separately.
    Result<std::vector<kvm_cpuid_entry2>> supported_cpuid() const;
    Result<std::vector<kvm_cpuid_entry2>> supported_hyperv_cpuid() const;
    static Result<void> set_cpuid(const Descriptor& processor, std::span<const kvm_cpuid_entry2> table);
    /// A model-specific register of one processor.
    static Result<void> set_register(const Descriptor& processor, u32 index, u64 value);
    bool has(int capability) const;
    /// MSRs, memory and interrupt controllers come with the machine; processors are added in order.
    Result<Descriptor> create_processor(u32 number) const;
    usize run_size() const { return run_size_; }
    KvmStatistics statistics() const;
    /// Of one processor.
    static KvmStatistics statistics_of(const Descriptor& processor);

  private:
    Descriptor system_;
    Descriptor machine_;
    usize run_size_ = 0;
};

/// ioctl that goes on after a signal. Answers are those of ioctl.
int control(const Descriptor& descriptor, unsigned long request, void* argument = nullptr);

} // namespace fl::vmm
