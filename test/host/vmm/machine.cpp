module;
#include "core/try.hpp"
#include <cerrno>
#include <cstdlib>
#include <ctime>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
module vmm.machine;
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

namespace fl::vmm {
namespace {

constexpr u16 com1 = 0x3f8;
constexpr u32 com1_line = 4;

void write_all(std::string_view text) {
    while (!text.empty()) {
        const ssize_t done = write(STDOUT_FILENO, text.data(), text.size());
        if (done < 0 && errno != EINTR) {
            return; // there is no reader left
        }
        text.remove_prefix(done < 0 ? 0 : static_cast<usize>(done));
    }
}

u64 read_clock(clockid_t which) {
    timespec time{};
    clock_gettime(which, &time);
    return static_cast<u64>(time.tv_sec) * 1'000'000'000 + static_cast<u64>(time.tv_nsec);
}

kvm_segment segment(u16 selector, u8 type, bool code64, bool wide) {
    kvm_segment s{};
    s.limit = 0xffff'ffff;
    s.selector = selector;
    s.type = type;
    s.present = 1;
    s.s = 1;
    s.g = 1;
    s.l = code64;
    s.db = wide;
    return s;
}

} // namespace

Result<std::unique_ptr<Machine>> Machine::create(const MachineConfig& config) {
    std::unique_ptr<Machine> machine{new Machine(config)};
    CHECK(machine->set_up());
    return machine;
}

Machine::~Machine() = default;

Result<void> Machine::set_up() {
    TRY(kvm_, Kvm::create("/dev/kvm"));
    TRY(memory_, GuestMemory::create(config_.memory));
    CHECK(kvm_.set_memory(memory_));
    synic_ = std::make_unique<Synic>(kvm_, memory_, config_.processors);
    serial_.reset(new Serial(com1, *this, line(com1_line)));
    CHECK(ports_.claim(com1, Serial::port_count, *serial_, "serial"));
    CHECK(ports_.claim(debug_exit_port, 4, exits_, "debug_exit"));
    CHECK(ports_.claim(phase_port, 4, exits_, "phase"));
    CHECK(ports_.claim(keyboard_command, 1, exits_, "keyboard"));
    CHECK(ports_.claim(PciHost::first_port, PciHost::port_count, pci_, "pci"));
    CHECK(ports_.claim(pm1_event, PowerManagement::port_count, power_, "power"));
    CHECK(ports_.claim(0x70, 2, clock_, "clock"));
    TRY(const auto basic, kvm_.supported_cpuid());
    TRY(const auto hyperv, kvm_.supported_hyperv_cpuid());
    config_.identity.processors = config_.processors;
    config_.identity.tsc_deadline = kvm_.has(KVM_CAP_TSC_DEADLINE_TIMER);
    for (u32 i = 0; i < config_.processors; ++i) {
        CHECK(add_processor(i, basic, hyperv));
    }
    return {};
}

Result<void> Machine::add_ide(std::span<Image* const> images) {
    if (images.empty()) {
        return {};
    }
    pci_.add_ide();
    for (usize i = 0; i < images.size() && i < 4; ++i) {
        const usize channel = i / 2;
        if (!ide_[channel]) {
            const auto& ports = IdeChannel::compatible[channel];
            ide_[channel] = std::make_unique<IdeChannel>(ports, memory_, line(IdeChannel::interrupts[channel]));
            CHECK(ports_.claim(ports.command, 8, *ide_[channel], "ide_command"));
            CHECK(ports_.claim(ports.control, 1, *ide_[channel], "ide_control"));
            CHECK(ports_.claim(ports.bus_master, 8, *ide_[channel], "ide_bus_master"));
        }
        ide_[channel]->attach(static_cast<unsigned>(i % 2), *images[i]);
    }
    return {};
}

Result<void> Machine::add_processor(u32 number, std::span<const kvm_cpuid_entry2> basic,
                                    std::span<const kvm_cpuid_entry2> hyperv) {
    auto processor = std::make_unique<Processor>();
    processor->number = number;
    TRY(processor->descriptor, kvm_.create_processor(number));
    void* const run =
        mmap(nullptr, kvm_.run_size(), PROT_READ | PROT_WRITE, MAP_SHARED, processor->descriptor.number(), 0);
    if (run == MAP_FAILED) {
        return Error{Code::io, "mmap of a processor's page failed; the value is errno", 0, static_cast<u64>(errno)};
    }
    processor->run = static_cast<kvm_run*>(run);
    const auto table = processor_cpuid(basic, hyperv, config_.identity, number);
    CHECK(Kvm::set_cpuid(processor->descriptor, table));
    // memory type ranges as firmware leaves them: enabled, everything write-back
    CHECK(Kvm::set_register(processor->descriptor, 0x2ff, 0xc06));
    processor->statistics = Kvm::statistics_of(processor->descriptor);
    processors_.push_back(std::move(processor));
    return {};
}

Result<void> Machine::prepare(const Entry& entry) {
    const Descriptor& first = processors_.front()->descriptor;
    kvm_sregs special{};
    if (control(first, KVM_GET_SREGS, &special) < 0) {
        return Error{Code::io, "KVM_GET_SREGS; the value is errno", 0, static_cast<u64>(errno)};
    }
    kvm_regs general{};
    general.rflags = 2;
    general.rip = entry.address;
    special.cr0 = 0x11; // protected mode, extension type
    if (entry.mode == Entry::Mode::protected32) {
        special.cs = segment(0x8, 0xb, false, true);
        special.ds = segment(0x10, 0x3, false, true);
        general.rbx = entry.argument;
    } else {
        special.cs = segment(0x10, 0xb, true, false);
        special.ds = segment(0x18, 0x3, false, true);
        special.gdt.base = entry.descriptors;
        special.gdt.limit = 0x1f;
        special.cr3 = entry.page_table;
        special.cr4 = 0x20;      // physical address extension
        special.cr0 |= 1u << 31; // paging
        special.efer |= 0x500;   // long mode enabled and active
        general.rsi = entry.argument;
    }
    special.es = special.fs = special.gs = special.ss = special.ds;
    special.tr = {};
    special.tr.limit = 0x67;
    special.tr.type = 0xb;
    special.tr.present = 1;
    if (control(first, KVM_SET_SREGS, &special) < 0 || control(first, KVM_SET_REGS, &general) < 0) {
        return Error{Code::io, "KVM_SET_SREGS or KVM_SET_REGS; the value is errno", 0, static_cast<u64>(errno)};
    }
    return {};
}

void Machine::start() {
    phase_counters_ = snapshot();
    for (auto& processor : processors_) {
        threads_.emplace_back([this, p = processor.get()] { run(*p); });
    }
}

void Machine::run(Processor& processor) {
    for (;;) {
        Exit reason = Exit::interrupted;
        if (ioctl(processor.descriptor.number(), KVM_RUN, 0) == 0) {
            reason = handle(processor);
        } else if (errno != EINTR && errno != EAGAIN) {
            finish(ExitCode::host, "KVM_RUN failed: errno " + std::to_string(errno));
        }
        // Only this thread increments the counter; others read it for printing, without any ordering.
        auto& counter = processor.exits[to_underlying(reason)];
        counter.store(counter.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    }
}

Exit Machine::handle(Processor& processor) {
    kvm_run& run = *processor.run;
    switch (run.exit_reason) {
    case KVM_EXIT_IO: access_ports(run); return run.io.direction == KVM_EXIT_IO_IN ? Exit::io_in : Exit::io_out;
    case KVM_EXIT_MMIO:
        if (run.mmio.is_write == 0) {
            std::memset(run.mmio.data, 0xff, sizeof(run.mmio.data)); // no device at this address
        }
        return Exit::memory;
    case KVM_EXIT_HYPERV: return handle_hyperv(processor);
    case KVM_EXIT_SHUTDOWN: finish(ExitCode::crash, "triple fault on processor " + std::to_string(processor.number));
    case KVM_EXIT_SYSTEM_EVENT:
        finish(ExitCode::crash,
               "system event " + std::to_string(run.system_event.type) + " (Hyper-V's crash registers, or a reset)");
    case KVM_EXIT_INTR: return Exit::interrupted;
    case KVM_EXIT_FAIL_ENTRY:
        finish(ExitCode::crash, "the processor could not enter the guest: reason " +
                                    std::to_string(run.fail_entry.hardware_entry_failure_reason));
    case KVM_EXIT_INTERNAL_ERROR: {
        kvm_regs registers{};
        control(processor.descriptor, KVM_GET_REGS, &registers);
        finish(ExitCode::crash, "KVM internal error: suberror " + std::to_string(run.internal.suberror) +
                                    " at instruction pointer " + std::to_string(registers.rip));
    }
    default: finish(ExitCode::crash, "unexpected exit: " + std::to_string(run.exit_reason));
    }
}

void Machine::access_ports(kvm_run& run) {
    std::byte* data = reinterpret_cast<std::byte*>(&run) + run.io.data_offset;
    const unsigned size = run.io.size;
    const std::scoped_lock guard(device_mutex_);
    for (u32 i = 0; i < run.io.count; ++i, data += size) {
        u32 value = 0;
        if (run.io.direction == KVM_EXIT_IO_IN) {
            value = ports_.in(run.io.port, size);
            std::memcpy(data, &value, size);
        } else {
            std::memcpy(&value, data, size);
            ports_.out(run.io.port, size, value);
        }
    }
}

Exit Machine::handle_hyperv(Processor& processor) {
    auto& exit = processor.run->hyperv;
    if (exit.type == KVM_EXIT_HYPERV_SYNIC) {
        synic_->registers(processor.number, exit.u.synic.control, exit.u.synic.evt_page, exit.u.synic.msg_page);
        return Exit::synic;
    }
    if (exit.type != KVM_EXIT_HYPERV_HCALL) {
        return Exit::other;
    }
    auto& call = exit.u.hcall;
    switch (call.input & 0xffff) {
    case 0x5c: call.result = post_message(call.input, call.params[0]); return Exit::post_message;
    case 0x5d: call.result = signal_event(call.input, call.params[0]); return Exit::signal_event;
    default: call.result = hv_invalid_hypercall_code; return Exit::other_hypercall;
    }
}

/// HvPostMessage [hv-tlfs §11.11.1]: connection, reserved, type, size, 240 bytes, at an address aligned to 8.
u16 Machine::post_message(u64 input, u64 address) {
    constexpr u64 fast = 1u << 16;
    struct {
        u32 connection;
        u32 reserved;
        u32 type;
        u32 size;
        std::array<std::byte, message_payload_size> payload;
    } message{};
    static_assert(sizeof(message) == 256);
    if ((input & fast) != 0 || partition_ == nullptr) {
        return hv_invalid_hypercall_input;
    }
    if (address % 8 != 0) {
        return hv_invalid_alignment;
    }
    if (!memory_.read(address, std::as_writable_bytes(std::span{&message, 1})) ||
        message.size > message.payload.size()) {
        return hv_invalid_hypercall_input;
    }
    return partition_->post_message(message.connection, message.type, std::span{message.payload}.first(message.size));
}

/// HvSignalEvent [hv-tlfs §11.11.2]: connection 31:0, flag 47:32, in a register or in memory.
u16 Machine::signal_event(u64 input, u64 parameter) {
    constexpr u64 fast = 1u << 16;
    if ((input & fast) == 0 &&
        (parameter % 8 != 0 || !memory_.read(parameter, std::as_writable_bytes(std::span{&parameter, 1})))) {
        return parameter % 8 != 0 ? hv_invalid_alignment : hv_invalid_hypercall_input;
    }
    if (partition_ == nullptr) {
        return hv_invalid_hypercall_input;
    }
    return partition_->signal_event(static_cast<u32>(parameter), static_cast<u16>(parameter >> 32));
}

IrqLine& Machine::line(u32 gsi) {
    for (auto& known : lines_) {
        if (known->gsi() == gsi) {
            return *known;
        }
    }
    return *lines_.emplace_back(std::make_unique<Line>(*this, gsi));
}

void Machine::Line::set(bool level) {
    machine_.line_changes_ += level ? 1 : 0;
    machine_.kvm_.set_line(gsi_, level);
}

void Machine::set_counters(void (*add)(void*, Snapshot&), void* context) { counters_.emplace_back(add, context); }

// ---- console: lines of guest and host are not interleaved ----

void Machine::put(char byte) {
    const std::scoped_lock guard(console_mutex_);
    console_ += byte;
    console_aged_ = false;
    if (byte == '\n' || console_.size() >= 4096) {
        write_all(console_);
        if (watch_.first != nullptr) {
            watch_.first(watch_.second, console_);
        }
        console_.clear();
    }
}

void Machine::flush_console() {
    const std::scoped_lock guard(console_mutex_);
    if (console_aged_) { // nothing was added since the last call
        write_all(console_);
        console_.clear();
    }
    console_aged_ = !console_.empty();
}

void Machine::print_line(std::string_view text) {
    const std::scoped_lock guard(console_mutex_);
    write_all("@@host " + std::string(text) + "\n");
}

// ---- counters and the end ----

Snapshot Machine::snapshot() {
    Snapshot all;
    for (const auto& processor : processors_) {
        for (usize i = 0; i < exit_names.size(); ++i) {
            all["exit_" + std::string(exit_names[i])] += processor->exits[i].load(std::memory_order_relaxed);
        }
        processor->statistics.each([&](std::string_view name, u64 value) { all["kvm_" + std::string(name)] += value; });
    }
    ports_.each([&](std::string_view name, u64 value) { all["port_" + std::string(name)] += value; });
    all["sint_interrupts"] = synic_->interrupts();
    all["sint_messages"] = synic_->messages();
    all["line_interrupts"] = line_changes_;
    for (usize i = 0; i < 4; ++i) {
        if (const auto& channel = ide_[i / 2]) {
            all["ide_disk" + std::to_string(i) + "_commands"] = channel->commands(static_cast<unsigned>(i % 2));
            all["ide_resets"] += i % 2 == 0 ? channel->resets() : 0;
        }
    }
    for (const auto& [add, context] : counters_) {
        add(context, all);
    }
    return all;
}

void Machine::print_counters(const char* label, const Snapshot& from) {
    const Snapshot now = snapshot();
    std::string text = std::string("{") + label + ",\"ns\":" + std::to_string(nanoseconds() - phase_begin_);
    if (const auto all = now.find("kvm_exits"); all != now.end()) { // including exits handled inside KVM
        const auto before = from.find(all->first);
        text += ",\"exits\":" + std::to_string(all->second - (before == from.end() ? 0 : before->second));
    }
    print_line(text + ",\"counters\":" + difference(from, now) + "}");
}

void Machine::phase(u32 number) {
    if (phase_ != 0) {
        print_counters(("\"phase\":" + std::to_string(phase_)).c_str(), phase_counters_);
    }
    phase_ = number;
    if (number != 0) {
        phase_counters_ = snapshot();
        // Neither mark belongs to the phase. KVM and the port count a mark before this code runs, run() counts it
        // afterwards: either way one of the two marks lies between the snapshots.
        for (const char* name : {"exit_io_out", "kvm_exits", "kvm_io_exits", "port_phase"}) {
            if (const auto counter = phase_counters_.find(name); counter != phase_counters_.end()) {
                ++counter->second;
            }
        }
        phase_begin_ = nanoseconds();
    }
}

void Machine::finish(ExitCode code, std::string_view why) {
    static std::atomic<bool> ending = false;
    // A second caller waits for the first to end the process.
    while (ending.exchange(true)) {
        pause();
    }
    if (at_end_) {
        at_end_();
    }
    {
        const std::scoped_lock guard(console_mutex_);
        write_all(console_.empty() || console_.back() == '\n' ? console_ : console_ + "\n");
        console_.clear();
    }
    phase_begin_ = 0;
    print_counters(
        ("\"end\":\"" + std::string(why) + "\",\"status\":" + std::to_string(static_cast<int>(code))).c_str(), {});
    _exit(static_cast<int>(code));
}

void Machine::debug_exit(u32 value) { finish(static_cast<ExitCode>((value << 1 | 1) & 0xff), "debug exit"); }
void Machine::power_off() { finish(ExitCode::power_off, "power off"); }
void Machine::reset(std::string_view how) { finish(ExitCode::reset, "reset by " + std::string(how)); }

u64 Machine::nanoseconds() { return read_clock(CLOCK_MONOTONIC); }
u64 Machine::coarse_now() { return read_clock(CLOCK_MONOTONIC_COARSE); }
u64 Machine::unix_seconds() { return read_clock(CLOCK_REALTIME) / 1'000'000'000; }

} // namespace fl::vmm
