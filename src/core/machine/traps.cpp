module core.machine.traps;
import core.std;
import core.log;
import core.panic;
import core.processor;
import core.spinlock;
import core.symbols;
import core.text;
import core.time;
import core.verdict;
import core.machine.cpu;
import core.machine.exit;
import core.machine.local;

extern "C" {
extern const std::byte image_text_begin[];
extern const std::byte image_text_end[];
extern const std::byte image_symbols_begin[];
extern const std::byte image_symbols_end[];
extern const std::byte trap_stubs[];

// The boot processor's stacks for double faults, for NMIs and machine checks, and for faults that a stack overflow may
// raise.
constexpr fl::usize emergency_stack_size = fl::emergency_stacks_size / 3;
alignas(16) [[gnu::section(".bss.pages")]] std::byte emergency_stacks[3][emergency_stack_size];
}

namespace fl {

namespace {

constexpr std::array<std::string_view, 32> exception_names{"divide error",
                                                           "debug",
                                                           "non-maskable interrupt",
                                                           "breakpoint",
                                                           "overflow",
                                                           "bound range exceeded",
                                                           "invalid opcode",
                                                           "device not available",
                                                           "double fault",
                                                           "coprocessor segment overrun",
                                                           "invalid TSS",
                                                           "segment not present",
                                                           "stack fault",
                                                           "general protection",
                                                           "page fault",
                                                           "exception 15",
                                                           "x87 error",
                                                           "alignment check",
                                                           "machine check",
                                                           "SIMD error",
                                                           "virtualization exception",
                                                           "control protection",
                                                           "exception 22",
                                                           "exception 23",
                                                           "exception 24",
                                                           "exception 25",
                                                           "exception 26",
                                                           "exception 27",
                                                           "hypervisor injection",
                                                           "VMM communication",
                                                           "security exception",
                                                           "exception 31"};
constexpr u32 page_fault = 14;

// As pushed by exception_common, lowest address first, followed by what the processor pushed [SDM-3 6.14].
struct Frame {
    u64 r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax;
    u64 vector, error;
    u64 rip, cs, rflags, rsp, ss;
};
static_assert(sizeof(Frame) == 22 * 8);

struct Gate { // [SDM-3 6.14.1]
    u16 offset_low;
    u16 selector;
    u8 stack; // index in the interrupt stack table, 0: none
    u8 type;
    u16 offset_middle;
    u32 offset_high;
    u32 reserved;
};
static_assert(sizeof(Gate) == 16);

struct [[gnu::packed]] TablePointer {
    u16 limit;
    u64 base;
};

constexpr u16 code_selector = 0x08;
constexpr u16 data_selector = 0x10;
constexpr u16 task_selector = 0x18;
constexpr u8 interrupt_gate = 0x8e;

alignas(16) constinit std::array<Gate, 256> gates{};
constinit InterruptEntry interrupt_entry = nullptr;
constinit StopOthers stop_others = nullptr;
// The reporting processor's number plus one; 0: none. The first one wins; every other that gets here, by a panic of its
// own or by NMI, parks.
constinit std::atomic<u32> reporter{0};

u64 address_of(const void* p) { return reinterpret_cast<u64>(p); }
bool in_text(u64 address) { return address >= address_of(image_text_begin) && address < address_of(image_text_end); }
bool in_stack(u64 address) {
    const Local& own = local();
    const bool main = address >= own.stack_guard + 4096 && address < own.stack_guard + 4096 + own.stack_size;
    const bool emergency = address >= own.emergency && address < own.emergency + emergency_stacks_size;
    return address % 8 == 0 && (main || emergency);
}

std::optional<Symbols::Symbol> symbol_of(u64 address) {
    const Symbols symbols({image_symbols_begin, static_cast<usize>(image_symbols_end - image_symbols_begin)});
    return in_text(address) ? symbols.find(static_cast<u32>(address - address_of(image_text_begin))) : std::nullopt;
}

template <class Sink>
void print_place(Sink& out, u64 address) {
    if (const auto symbol = symbol_of(address)) {
        print(out, "{}{}+{:#x}", symbol->scope, symbol->name, symbol->offset);
    } else {
        print(out, "{:#x}", address);
    }
}

void print_frame(log::Line& out, u32 number, u64 address) {
    print(out, "  #{:<2} {:016x} ", number, address);
    print_place(out, address);
    print(out, "\n");
}
// Look up the byte before the return address: after a call that never returns, the next function may begin.
void print_caller(log::Line& out, u32 number, u64 address) {
    print(out, "  #{:<2} {:016x} ", number, address);
    if (const auto symbol = symbol_of(address - 1)) {
        print(out, "{}{}+{:#x}", symbol->scope, symbol->name, symbol->offset + 1);
    } else {
        print(out, "{:#x}", address);
    }
    print(out, "\n");
}

// Walks frame pointers: each pair (caller's rbp, return address) must lie in a stack, above the previous one, and
// return into the image's code. Recursive calls are printed once, with a count.
void print_backtrace(log::Line& out, u64 rip, u64 rbp) {
    constexpr u32 max_lines = 24;
    print(out, "backtrace:\n");
    u32 number = 0;
    u32 lines = 0;
    u32 repeated = 0;
    u64 last = 0;
    const auto end_repetition = [&] {
        if (repeated != 0) {
            print(out, "      ... {} more {}\n", repeated, plural(repeated, "times"));
            repeated = 0;
        }
    };
    if (rip != 0) {
        print_frame(out, number++, rip);
    }
    while (lines < max_lines && in_stack(rbp) && in_stack(rbp + 8)) {
        u64 pair[2];
        std::memcpy(pair, reinterpret_cast<const void*>(rbp), sizeof(pair));
        if (!in_text(pair[1])) {
            break;
        }
        if (pair[1] == last) {
            ++repeated;
            ++number;
        } else {
            end_repetition();
            print_caller(out, number++, pair[1]);
            ++lines;
        }
        last = pair[1];
        if (pair[0] <= rbp) {
            break;
        }
        rbp = pair[0];
    }
    end_repetition();
}

void print_page_fault(log::Line& out, u64 error, u64 address) {
    const std::string_view access = (error & 16) != 0 ? "execute" : (error & 2) != 0 ? "write" : "read";
    const std::string_view why = (error & 8) != 0   ? "reserved bit set in a page table"
                                 : (error & 1) != 0 ? "not allowed there"
                                                    : "not mapped";
    print(out, "  {} at {:016x}: {}", access, address, why);
    if (const u64 guard = local().stack_guard; address >= guard && address < guard + 4096) {
        print(out, ": the guard page, the kernel's stack has overflowed");
    }
    print(out, "\n");
}

[[noreturn]] void park() {
    local().parked.store(true, std::memory_order_release); // pairs with the acquire of the one that stops the others
    for (;;) {
        cpu::interrupts_off();
        cpu::halt();
    }
}

// Serialises reports, so that they are readable. False: this processor was reporting already.
bool begin_report() {
    const u32 me = this_processor() + 1;
    u32 seen = 0;
    // Relaxed suffices for the decision; the report covers only this processor's own state.
    if (!reporter.compare_exchange_strong(seen, me, std::memory_order_relaxed)) {
        if (seen != me) {
            park();
        }
        return false;
    }
    if (stop_others != nullptr) {
        stop_others();
    }
    break_locks(); // the locks that this processor holds must not block it either
    return true;
}

void print_processor(log::Line& out) {
    if (stop_others != nullptr) {
        print(out, " on processor {}", this_processor());
    }
}

[[noreturn]] void report_exception(const Frame& f) {
    const std::string_view name = exception_names[f.vector % 32];
    log::Line out;
    print(out, "\nexception: {} (vector {}, error code {:#x}) in ", name, f.vector, f.error);
    print_place(out, f.rip);
    print_processor(out);
    print(out, "\n");
    if (f.vector == page_fault) {
        print_page_fault(out, f.error, cpu::read_cr2());
    }
    print(out, "  rip {:016x} rsp {:016x} rbp {:016x} rflags {:08x}\n", f.rip, f.rsp, f.rbp, f.rflags);
    print(out, "  rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}\n", f.rax, f.rbx, f.rcx, f.rdx);
    print(out, "  rsi {:016x} rdi {:016x} r8  {:016x} r9  {:016x}\n", f.rsi, f.rdi, f.r8, f.r9);
    print(out, "  r10 {:016x} r11 {:016x} r12 {:016x} r13 {:016x}\n", f.r10, f.r11, f.r12, f.r13);
    print(out, "  r14 {:016x} r15 {:016x} cr2 {:016x} cr3 {:016x}\n", f.r14, f.r15, cpu::read_cr2(), cpu::read_cr3());
    print_backtrace(out, f.rip, f.rbp);
    FixedText<160> reason;
    print(reason, "{} in ", name);
    print_place(reason, f.rip);
    end_vm(Verdict::crash, reason.view());
}

[[noreturn]] void report_panic(std::string_view message) {
    cpu::interrupts_off();
    if (!begin_report()) {
        end_vm(Verdict::crash, message);
    }
    log::Line out;
    print(out, "\npanic: {}", message);
    print_processor(out);
    print(out, "\n");
    print_backtrace(out, 0, reinterpret_cast<u64>(__builtin_frame_address(0)));
    end_vm(Verdict::crash, message);
}

void set_gate(u32 vector, u8 stack) {
    const u64 stub = address_of(trap_stubs) + vector * 16;
    gates[vector] = {static_cast<u16>(stub),
                     code_selector,
                     stack,
                     interrupt_gate,
                     static_cast<u16>(stub >> 16),
                     static_cast<u32>(stub >> 32),
                     0};
}

} // namespace

extern "C" [[noreturn]] void exception_raised(const Frame* frame) {
    constexpr u64 nmi = 2;
    if (frame->vector == nmi && reporter.load(std::memory_order_relaxed) != 0 &&
        reporter.load(std::memory_order_relaxed) != this_processor() + 1) {
        park(); // sent by the reporting processor
    }
    if (!begin_report()) {
        end_vm(Verdict::crash, "a fault while another one was reported");
    }
    report_exception(*frame);
}

extern "C" void interrupt_raised(u32 vector) {
    if (interrupt_entry != nullptr) {
        interrupt_entry(vector);
    }
}

namespace {

// Descriptors, task state, GS and interrupt table of the calling processor.
void load_tables(Local& own) {
    for (u32 i = 0; i < 3; ++i) {
        own.task.ist[i] = own.emergency + (i + 1) * emergency_stack_size;
    }
    own.task.io_map = sizeof(TaskState);
    const u64 base = address_of(&own.task);
    own.descriptors = {0, 0x00af9b000000ffff, 0x00cf93000000ffff,
                       (sizeof(TaskState) - 1) | (base & 0xffffff) << 16 | u64{0x89} << 40 | (base >> 24 & 0xff) << 56,
                       base >> 32};

    const TablePointer gdt{sizeof(own.descriptors) - 1, address_of(own.descriptors.data())};
    asm volatile("lgdt %0\n"
                 "pushq %1\n"
                 "leaq 1f(%%rip), %%rax\n"
                 "pushq %%rax\n"
                 "lretq\n"
                 "1: movl %2, %%eax\n"
                 "movl %%eax, %%ss\n"
                 "movl %%eax, %%ds\n"
                 "movl %%eax, %%es\n"
                 "xorl %%eax, %%eax\n"
                 "movl %%eax, %%fs\n"
                 "movl %%eax, %%gs\n"
                 "ltr %w3\n" ::"m"(gdt),
                 "i"(code_selector), "i"(data_selector), "r"(task_selector)
                 : "rax", "memory");
    constexpr u32 gs_base = 0xc0000101; // [SDM-3 3.4.4]; written after the selector, whose load clears it
    cpu::write_msr(gs_base, address_of(&own));
    const TablePointer idt{sizeof(gates) - 1, address_of(gates.data())};
    asm volatile("lidt %0" ::"m"(idt));
}

} // namespace

void start_traps(u64 stack_guard, u64 stack_size) {
    for (u32 vector = 0; vector < 256; ++vector) {
        set_gate(vector, 0);
    }
    constexpr u8 double_fault_stack = 1;
    constexpr u8 machine_stack = 2;
    constexpr u8 fault_stack = 3;
    set_gate(8, double_fault_stack);
    set_gate(2, machine_stack);
    set_gate(18, machine_stack);
    set_gate(12, fault_stack);
    set_gate(13, fault_stack);
    set_gate(page_fault, fault_stack);
    Local& own = local_of(0);
    own.self = &own;
    own.stack_guard = stack_guard;
    own.stack_size = stack_size;
    own.emergency = address_of(emergency_stacks);
    own.timer_at = never;
    load_tables(own);
    set_panic_hook(report_panic);
}

void join_traps(u32 number, u64 stack_guard, u64 stack_size) {
    Local& own = local_of(number);
    own.number = number;
    own.self = &own;
    own.stack_guard = stack_guard;
    own.stack_size = stack_size;
    own.emergency = stack_guard + 4096 + stack_size;
    own.timer_at = never;
    load_tables(own);
}

void set_stop_others(StopOthers stop) { stop_others = stop; }
void set_interrupt_entry(InterruptEntry entry) { interrupt_entry = entry; }

namespace {

// Uses up the stack; not a tail call, because the array is read afterwards.
[[gnu::noinline]] u64 sink_deeper(u64 depth) {
    volatile u64 room[32];
    for (u64 i = 0; i < 32; ++i) {
        room[i] = depth;
    }
    const u64 below = depth == ~u64{0} ? 0 : sink_deeper(depth + 1);
    return below + room[depth % 32];
}

// In .data: the compiler must assume that the asm which takes its address may write to it.
constinit u8 return_instruction = 0xc3;

} // namespace

bool provoke(std::string_view fault) {
    if (fault == "ud") {
        asm volatile("ud2");
    } else if (fault == "gp") {
        asm volatile("movq (%0), %%rax" ::"r"(u64{0x1234567812345678}) : "rax"); // not canonical
    } else if (fault == "pf") {
        asm volatile("movb $1, (%0)" ::"r"(u64{0x10}) : "memory"); // low addresses are unmapped
    } else if (fault == "text") {
        // a write that changes nothing if it succeeds
        asm volatile("orb $0, (%0)" ::"r"(image_text_begin) : "memory", "cc");
    } else if (fault == "nx") {
        asm volatile("call *%0" ::"r"(&return_instruction) : "memory", "cc"); // returns if it succeeds
    } else if (fault == "stack") {
        log::info("{}", sink_deeper(0));
    } else if (fault == "div") {
        asm volatile("xorl %%edx, %%edx; movl $1, %%eax; divl %0" ::"r"(0) : "rax", "rdx");
    } else if (fault == "panic") {
        panic("requested by fault={}", fault);
    } else {
        return false;
    }
    return true;
}

} // namespace fl
