module;
#include "core/try.hpp"
#include <cerrno>
#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <unistd.h>
module vmm.kvm;
import host.std;
import core.result;
import vmm.memory;

namespace fl::vmm {
namespace {

struct Requirement {
    int capability;
    std::string_view message;
};
// In the order of the checks. The texts are complete because an Error refers to static storage.
constexpr Requirement requirements[] = {
    {KVM_CAP_USER_MEMORY, "KVM lacks KVM_CAP_USER_MEMORY: this kernel cannot run machines"},
    {KVM_CAP_IRQCHIP, "KVM lacks KVM_CAP_IRQCHIP: interrupt controllers in the kernel are needed"},
    {KVM_CAP_IRQ_ROUTING, "KVM lacks KVM_CAP_IRQ_ROUTING: SynIC's interrupts need routes"},
    {KVM_CAP_IRQFD, "KVM lacks KVM_CAP_IRQFD"},
    {KVM_CAP_IRQFD_RESAMPLE, "KVM lacks KVM_CAP_IRQFD_RESAMPLE: it reports the end of a message"},
    {KVM_CAP_IOEVENTFD, "KVM lacks KVM_CAP_IOEVENTFD"},
    {KVM_CAP_HYPERV, "KVM lacks KVM_CAP_HYPERV: a kernel with KVM_HYPERV=y is needed"},
    {KVM_CAP_HYPERV_TIME, "KVM lacks KVM_CAP_HYPERV_TIME: the reference counter"},
    {KVM_CAP_HYPERV_SYNIC2, "KVM lacks KVM_CAP_HYPERV_SYNIC2: the synthetic interrupt controller"},
    {KVM_CAP_HYPERV_VP_INDEX, "KVM lacks KVM_CAP_HYPERV_VP_INDEX"},
    {KVM_CAP_HYPERV_EVENTFD, "KVM lacks KVM_CAP_HYPERV_EVENTFD: signals on connections"},
    {KVM_CAP_HYPERV_CPUID, "KVM lacks KVM_CAP_HYPERV_CPUID"},
    {KVM_CAP_HYPERV_SEND_IPI, "KVM lacks KVM_CAP_HYPERV_SEND_IPI"},
};

Error failed(std::string_view what) { return {Code::io, what, 0, static_cast<u64>(errno)}; }

// The headers' macro for flexible arrays adds an empty structure, which has a nonzero size in C++, so values that
// depend on that size are spelt out. kvm_irq_routing: nr, flags
constexpr usize routing_head_size = 8;
constexpr unsigned long set_gsi_routing = _IOC(_IOC_WRITE, KVMIO, 0x6a, routing_head_size); // KVM_SET_GSI_ROUTING
constexpr usize cpuid_head_size = 8;                                                        // kvm_cpuid2: nent, padding
constexpr usize msrs_head_size = 8;                                                         // kvm_msrs: nmsrs, padding
// kvm_stats_desc without its name
constexpr usize stats_description_size = 16;
constexpr u32 pic_pins = 16;
constexpr u32 io_apic_pins = 24;

} // namespace

int control(const Descriptor& descriptor, unsigned long request, void* argument) {
    int answer = 0;
    do {
        answer = ioctl(descriptor.number(), request, argument);
    } while (answer < 0 && errno == EINTR);
    return answer;
}

Descriptor::~Descriptor() {
    if (number_ >= 0) {
        close(number_);
    }
}

Result<Kvm> Kvm::create(const char* device) {
    Kvm kvm;
    kvm.system_ = Descriptor{open(device, O_RDWR | O_CLOEXEC)};
    if (kvm.system_.number() < 0) {
        return Error{Code::not_supported, "the KVM device cannot be opened; the value is errno", 0,
                     static_cast<u64>(errno)};
    }
    const int version = ioctl(kvm.system_.number(), KVM_GET_API_VERSION, 0);
    if (version != KVM_API_VERSION) {
        return Error{Code::not_supported, "another version of KVM's interface was expected", KVM_API_VERSION,
                     static_cast<u64>(version)};
    }
    for (const Requirement& requirement : requirements) {
        if (!kvm.has(requirement.capability)) {
            return Error{Code::not_supported, requirement.message};
        }
    }
    kvm.machine_ = Descriptor{ioctl(kvm.system_.number(), KVM_CREATE_VM, 0)};
    const int size = ioctl(kvm.system_.number(), KVM_GET_VCPU_MMAP_SIZE, 0);
    if (kvm.machine_.number() < 0 || size <= 0) {
        return failed("KVM_CREATE_VM");
    }
    kvm.run_size_ = static_cast<usize>(size);
    // Only Intel processors use these three pages; they are where a PC has its firmware.
    __u64 identity = 0xfeff'c000;
    if (control(kvm.machine_, KVM_SET_IDENTITY_MAP_ADDR, &identity) < 0 ||
        ioctl(kvm.machine_.number(), KVM_SET_TSS_ADDR, 0xfeff'd000UL) < 0) {
        return failed("KVM_SET_TSS_ADDR");
    }
    if (control(kvm.machine_, KVM_CREATE_IRQCHIP) < 0) {
        return failed("KVM_CREATE_IRQCHIP");
    }
    kvm_pit_config pit{};
    pit.flags = KVM_PIT_SPEAKER_DUMMY; // port 0x61, which calibration loops read
    if (control(kvm.machine_, KVM_CREATE_PIT2, &pit) < 0) {
        return failed("KVM_CREATE_PIT2");
    }
    CHECK(kvm.set_routes({}));
    return kvm;
}

bool Kvm::has(int capability) const { return ioctl(system_.number(), KVM_CHECK_EXTENSION, capability) > 0; }

Result<void> Kvm::set_memory(const GuestMemory& memory) {
    kvm_userspace_memory_region region{};
    region.memory_size = memory.size();
    region.userspace_addr = reinterpret_cast<u64>(memory.data());
    if (control(machine_, KVM_SET_USER_MEMORY_REGION, &region) < 0) {
        return failed("KVM_SET_USER_MEMORY_REGION");
    }
    return {};
}

Result<void> Kvm::set_routes(std::span<const SintRoute> sints) {
    std::vector<kvm_irq_routing_entry> entries;
    const auto chip = [&](u32 gsi, u32 which, u32 pin) {
        kvm_irq_routing_entry entry{};
        entry.gsi = gsi;
        entry.type = KVM_IRQ_ROUTING_IRQCHIP;
        entry.u.irqchip.irqchip = which;
        entry.u.irqchip.pin = pin;
        entries.push_back(entry);
    };
    for (u32 i = 0; i < pic_pins; ++i) {
        if (i != 2) { // the cascade
            chip(i, i < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE, i % 8);
        }
    }
    for (u32 i = 0; i < io_apic_pins; ++i) {
        if (i != 2) {
            chip(i, KVM_IRQCHIP_IOAPIC, i == 0 ? 2 : i); // the timer is at pin 2, as in the MADT
        }
    }
    for (const SintRoute& sint : sints) {
        kvm_irq_routing_entry entry{};
        entry.gsi = sint.gsi;
        entry.type = KVM_IRQ_ROUTING_HV_SINT;
        entry.u.hv_sint.vcpu = sint.processor;
        entry.u.hv_sint.sint = sint.sint;
        entries.push_back(entry);
    }
    std::vector<std::byte> bytes(routing_head_size + entries.size() * sizeof(kvm_irq_routing_entry));
    const u32 count = static_cast<u32>(entries.size());
    std::memcpy(bytes.data(), &count, sizeof(count));
    std::memcpy(bytes.data() + routing_head_size, entries.data(), entries.size() * sizeof(kvm_irq_routing_entry));
    if (control(machine_, set_gsi_routing, bytes.data()) < 0) {
        return failed("KVM_SET_GSI_ROUTING");
    }
    return {};
}

void Kvm::set_line(u32 gsi, bool level) const {
    kvm_irq_level line{};
    line.irq = gsi;
    line.level = level ? 1 : 0;
    control(machine_, KVM_IRQ_LINE, &line);
}

Result<void> Kvm::connect(int event, u32 gsi, int resample) const {
    kvm_irqfd request{};
    request.fd = static_cast<u32>(event);
    request.gsi = gsi;
    if (resample >= 0) {
        request.flags = KVM_IRQFD_FLAG_RESAMPLE;
        request.resamplefd = static_cast<u32>(resample);
    }
    if (control(machine_, KVM_IRQFD, &request) < 0) {
        return failed("KVM_IRQFD");
    }
    return {};
}

void Kvm::disconnect(int event, u32 gsi) const {
    kvm_irqfd request{};
    request.fd = static_cast<u32>(event);
    request.gsi = gsi;
    request.flags = KVM_IRQFD_FLAG_DEASSIGN;
    control(machine_, KVM_IRQFD, &request);
}

u64 Kvm::clock() const {
    kvm_clock_data data{};
    control(machine_, KVM_GET_CLOCK, &data);
    return data.clock;
}

Result<void> Kvm::connect_signal(u32 connection, int event, bool on) const {
    kvm_hyperv_eventfd request{};
    request.conn_id = connection;
    request.fd = event;
    request.flags = on ? 0 : KVM_HYPERV_EVENTFD_DEASSIGN;
    if (control(machine_, KVM_HYPERV_EVENTFD, &request) < 0) {
        return failed("KVM_HYPERV_EVENTFD");
    }
    return {};
}

namespace {

Result<std::vector<kvm_cpuid_entry2>> list(const Descriptor& descriptor, unsigned long request, std::string_view name) {
    constexpr usize most = 256;
    std::vector<std::byte> bytes(cpuid_head_size + most * sizeof(kvm_cpuid_entry2));
    u32 count = most;
    std::memcpy(bytes.data(), &count, sizeof(count));
    if (control(descriptor, request, bytes.data()) < 0) {
        return failed(name);
    }
    std::memcpy(&count, bytes.data(), sizeof(count));
    std::vector<kvm_cpuid_entry2> entries(std::min<usize>(count, most));
    std::memcpy(entries.data(), bytes.data() + cpuid_head_size, entries.size() * sizeof(kvm_cpuid_entry2));
    return entries;
}

} // namespace

Result<std::vector<kvm_cpuid_entry2>> Kvm::supported_cpuid() const {
    return list(system_, _IOC(_IOC_READ | _IOC_WRITE, KVMIO, 0x05, cpuid_head_size), "KVM_GET_SUPPORTED_CPUID");
}

Result<std::vector<kvm_cpuid_entry2>> Kvm::supported_hyperv_cpuid() const {
    return list(system_, _IOC(_IOC_READ | _IOC_WRITE, KVMIO, 0xc1, cpuid_head_size), "KVM_GET_SUPPORTED_HV_CPUID");
}

Result<void> Kvm::set_cpuid(const Descriptor& processor, std::span<const kvm_cpuid_entry2> table) {
    std::vector<std::byte> bytes(cpuid_head_size + table.size_bytes());
    const u32 count = static_cast<u32>(table.size());
    std::memcpy(bytes.data(), &count, sizeof(count));
    std::memcpy(bytes.data() + cpuid_head_size, table.data(), table.size_bytes());
    if (control(processor, _IOC(_IOC_WRITE, KVMIO, 0x90, cpuid_head_size), bytes.data()) < 0) { // KVM_SET_CPUID2
        return failed("KVM_SET_CPUID2");
    }
    return {};
}

Result<void> Kvm::set_register(const Descriptor& processor, u32 index, u64 value) {
    const kvm_msr_entry entry{.index = index, .data = value};
    std::array<std::byte, msrs_head_size + sizeof(entry)> bytes{};
    const u32 count = 1;
    std::memcpy(bytes.data(), &count, sizeof(count));
    std::memcpy(bytes.data() + msrs_head_size, &entry, sizeof(entry));
    if (control(processor, _IOC(_IOC_WRITE, KVMIO, 0x89, msrs_head_size), bytes.data()) != 1) { // KVM_SET_MSRS
        return failed("KVM_SET_MSRS");
    }
    return {};
}

Result<Descriptor> Kvm::create_processor(u32 number) const {
    Descriptor processor{ioctl(machine_.number(), KVM_CREATE_VCPU, static_cast<unsigned long>(number))};
    if (processor.number() < 0) {
        return failed("KVM_CREATE_VCPU");
    }
    kvm_enable_cap enable{};
    enable.cap = KVM_CAP_HYPERV_SYNIC2;
    if (control(processor, KVM_ENABLE_CAP, &enable) < 0) {
        return failed("KVM_ENABLE_CAP of KVM_CAP_HYPERV_SYNIC2");
    }
    return processor;
}

namespace {

constexpr std::string_view machine_statistics[] = {"remote_tlb_flush", "mmu_cache_miss"};
constexpr std::string_view processor_statistics[] = {
    "exits",          "io_exits",    "mmio_exits",          "signal_exits", "irq_window_exits",
    "halt_exits",     "halt_wakeup", "irq_exits",           "hypercalls",   "irq_injections",
    "insn_emulation", "pf_taken",    "preemption_reported",
};

} // namespace

KvmStatistics Kvm::statistics() const {
    return {Descriptor{ioctl(machine_.number(), KVM_GET_STATS_FD, 0)}, machine_statistics};
}

KvmStatistics Kvm::statistics_of(const Descriptor& processor) {
    return {Descriptor{ioctl(processor.number(), KVM_GET_STATS_FD, 0)}, processor_statistics};
}

KvmStatistics::KvmStatistics(Descriptor descriptor, std::span<const std::string_view> wanted)
    : descriptor_(std::move(descriptor)) {
    kvm_stats_header header{};
    if (descriptor_.number() < 0 ||
        pread(descriptor_.number(), &header, sizeof(header), 0) != static_cast<ssize_t>(sizeof(header))) {
        return;
    }
    const usize step = stats_description_size + header.name_size;
    std::vector<std::byte> bytes(step * header.num_desc);
    if (pread(descriptor_.number(), bytes.data(), bytes.size(), header.desc_offset) !=
        static_cast<ssize_t>(bytes.size())) {
        return;
    }
    for (usize i = 0; i < header.num_desc; ++i) {
        kvm_stats_desc description{};
        std::memcpy(&description, bytes.data() + i * step, stats_description_size);
        const char* const name = reinterpret_cast<const char*>(bytes.data() + i * step + stats_description_size);
        const std::string text(name, std::min<usize>(header.name_size, std::char_traits<char>::length(name)));
        if (description.size == 1 && std::find(wanted.begin(), wanted.end(), std::string_view{text}) != wanted.end()) {
            entries_.push_back({text, u64{header.data_offset} + description.offset});
        }
    }
}

u64 KvmStatistics::value(u64 offset) const {
    u64 found = 0;
    return pread(descriptor_.number(), &found, sizeof(found), static_cast<off_t>(offset)) ==
                   static_cast<ssize_t>(sizeof(found))
               ? found
               : 0;
}

} // namespace fl::vmm
