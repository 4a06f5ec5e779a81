module;
#include "core/try.hpp"
module core.machine.smp;
import core.std;
import core.acpi;
import core.log;
import core.processor;
import core.result;
import core.spinlock;
import core.time;
import core.machine.clock;
import core.machine.cpu;
import core.machine.interrupts;
import core.machine.lapic;
import core.machine.local;
import core.machine.memory;
import core.machine.traps;

extern "C" {
// smp.S: the code in which a processor starts; its parameters follow, as offsets from its start.
extern const std::byte start_code_begin[];
extern const std::byte start_code_end[];
extern const std::byte start_parameters[];
extern const std::byte start_gdt[];
extern const std::byte start_protected[];
extern const std::byte start_long[];
extern const std::byte processor_entry[];
extern const std::byte started_processor_entry[]; // for one that the hypervisor starts

// Handed to the next processor by smp.S, which ignores it on a processor with another APIC id. `state` decides: it
// changes from offered to either taken (by the processor) or withdrawn (by the boot processor), never both.
struct StartOffer {
    fl::u32 state; // Offer
    fl::u32 apic_id;
    fl::u64 stack; // top of the stack
    fl::u64 number;
};
constinit StartOffer start_offer{};
static_assert(sizeof(StartOffer) == 24);
}

namespace fl {

namespace {

enum class Offer : u32 { none, offered, taken, withdrawn };

// Layout of start_parameters in smp.S; written before the page becomes executable.
struct [[gnu::packed]] Parameters {
    u16 gdt_limit;
    u32 gdt_base;
    u32 protected_offset;
    u16 protected_selector;
    u32 long_offset;
    u16 long_selector;
    u32 cr3;
    u32 cr4;
    u32 efer_low;
    u32 cr0;
    u64 entry;
};
static_assert(sizeof(Parameters) == 42);

constexpr u64 stack_size = 64 * 1024;
constexpr Nanoseconds startup_bound = 1'000'000'000;

// Progress of a processor. Written by it (release) up to serving, failed and stopped; by the boot processor (exchange)
// to given_up.
enum class Stage : u32 { none, up, joining, serving, failed, given_up, stopped };

struct State {
    std::atomic<Stage> stage{Stage::none};
    std::optional<Error> error; // set if failed
    u64 stack_guard = 0;
};

constinit std::array<State, max_processors> states{};
constinit ProcessorWork work{};
constinit ProcessorStarter starter{}; // count is 0 if IPIs start the processors
constinit u32 running = 1;
constinit u64 start_page = 0;

// Shared state for the comparison of time stamp counters. In each round the boot processor asks, and the other one
// answers with its counter. The round after the last one ends the comparison.
struct Comparison {
    std::atomic<u32> requested{0};
    std::atomic<u32> answered{0};
    std::atomic<u64> counter{0};
};
constinit Comparison comparison{};
constexpr u32 rounds = 8;

u64 ordered_tsc() {
    asm volatile("lfence" ::: "memory"); // not before the load of the other processor's store
    return cpu::read_tsc();
}

// Waits until `done()`, at most `bound` ns. A processor of a virtual machine may share its host processor with the one
// that it waits for: after a few microseconds it offers that up.
template <class Done>
bool wait(Nanoseconds bound, Done done) {
    static constexpr u32 spins = 64;
    SpinBound limit(now(), bound);
    for (u32 spun = 0; !done(); ++spun) {
        if (limit.passed(now())) {
            return false;
        }
        if (starter.yield != nullptr && spun >= spins) {
            starter.yield(starter.context);
        } else {
            spin_pause();
        }
    }
    return true;
}

void answer_comparison() {
    for (u32 round = 1;; ++round) {
        if (!wait(100'000'000, [&] { return comparison.requested.load(std::memory_order_acquire) >= round; })) {
            return; // the other side has a bound of its own, and reports
        }
        if (comparison.requested.load(std::memory_order_relaxed) > rounds) {
            return;
        }
        comparison.counter.store(ordered_tsc(), std::memory_order_relaxed);
        comparison.answered.store(round, std::memory_order_release);
    }
}

// How far the other counter lies outside the interval between question and answer: the minimum of all rounds, in
// cycles. Nothing: no answer. A round costs two switches of virtual processors if they share one of the host's (in the
// Xen lab 0.9 ms), so it ends with the first that shows no difference.
std::optional<i64> compare_counters() {
    std::optional<i64> least;
    for (u32 round = 1; round <= rounds && least != 0; ++round) {
        const u64 begin = ordered_tsc();
        comparison.requested.store(round, std::memory_order_release);
        if (!wait(100'000'000, [&] { return comparison.answered.load(std::memory_order_acquire) >= round; })) {
            least = std::nullopt;
            break;
        }
        const u64 end = ordered_tsc();
        const u64 seen = comparison.counter.load(std::memory_order_relaxed);
        const i64 off = seen < begin ? -static_cast<i64>(begin - seen) : seen > end ? static_cast<i64>(seen - end) : 0;
        if (!least || std::max(off, -off) < std::max(*least, -*least)) {
            least = off;
        }
    }
    comparison.requested.store(rounds + 1, std::memory_order_release);
    return least;
}

[[noreturn]] void rest() {
    for (;;) {
        cpu::interrupts_off();
        cpu::halt();
    }
}

void send_nmi_to_others() {
    const u32 me = this_processor();
    for (u32 i = 0; i < running; ++i) {
        if (i != me) {
            static_cast<void>(lapic::send(local_of(i).apic_id, lapic::Delivery::nmi, 0));
        }
    }
    SpinBound limit(now(), 200'000'000);
    for (u32 i = 0; i < running; ++i) {
        // Pairs with the release in park().
        while (i != me && !local_of(i).parked.load(std::memory_order_acquire) && !limit.passed(now())) {
            spin_pause();
        }
    }
}

// Fills the page in which processors start.
Result<u64> prepare_start_page() {
    const u64 root = page_table_root();
    if (root >= u64{1} << 32) {
        return Error(Code::not_supported,
                     "the page tables lie above 4 GiB, where a starting processor cannot reach them");
    }
    return open_start_page([](std::byte* page, u64 at) {
        const auto in_page = [&](const std::byte* symbol) {
            return static_cast<u32>(at + static_cast<u64>(symbol - start_code_begin));
        };
        std::memcpy(page, start_code_begin, static_cast<usize>(start_code_end - start_code_begin));
        constexpr u32 efer = 0xc0000080;
        constexpr u64 long_mode_active = 1 << 10; // set by the processor itself
        const Parameters p{.gdt_limit = 4 * 8 - 1,
                           .gdt_base = in_page(start_gdt),
                           .protected_offset = in_page(start_protected),
                           .protected_selector = 0x18,
                           .long_offset = in_page(start_long),
                           .long_selector = 0x08,
                           .cr3 = static_cast<u32>(page_table_root()),
                           .cr4 = static_cast<u32>(cpu::read_cr4()),
                           .efer_low = static_cast<u32>(cpu::read_msr(efer) & ~long_mode_active),
                           .cr0 = static_cast<u32>(cpu::read_cr0()),
                           .entry = reinterpret_cast<u64>(processor_entry)};
        std::memcpy(page + (start_parameters - start_code_begin), &p, sizeof(p));
    });
}

std::atomic_ref<u32> offer_state() { return std::atomic_ref<u32>(start_offer.state); }

// The ways to start and to stop a processor. `which`: its APIC id, or its index if the hypervisor starts it.
Result<void> start(u32 which, u64 number) {
    const auto taken = [] { return offer_state().load(std::memory_order_acquire) == to_underlying(Offer::taken); };
    if (starter.count != 0) {
        constexpr u32 efer = 0xc0000080;
        CHECK(starter.start(starter.context, which,
                            {.rip = reinterpret_cast<u64>(started_processor_entry),
                             .rsp = start_offer.stack,
                             .rdi = number,
                             .cr0 = cpu::read_cr0(),
                             .cr3 = page_table_root(),
                             .cr4 = cpu::read_cr4(),
                             .efer = cpu::read_msr(efer)}));
        static_cast<void>(wait(startup_bound, taken));
        return {};
    }
    const u8 page = static_cast<u8>(start_page >> 12);
    // INIT has been sent to all processors; a second startup IPI only if the first one was lost [SDM-3 9.4.4.1].
    for (u32 attempt = 0; attempt < 2 && !taken(); ++attempt) {
        static_cast<void>(lapic::send(which, lapic::Delivery::startup, page));
        static_cast<void>(wait(attempt == 0 ? 20'000'000 : startup_bound, taken));
    }
    return {};
}
void stop(u32 which) {
    if (starter.count != 0) {
        starter.stop(starter.context, which);
    } else {
        // INIT puts it back into the state that waits for a startup IPI, wherever it is now
        static_cast<void>(lapic::send(which, lapic::Delivery::init, 0));
    }
}

// Brings one processor up to serving. False: the number must not be reused, since the processor may still use it.
bool start_one(u32 number, u32 which, Nanoseconds join_bound, Processors& processors) {
    const std::string_view kind = starter.count != 0 ? "index" : "APIC id";
    State& state = states[number];
    if (state.stack_guard == 0) { // otherwise left over from a processor that did not start
        const auto stack = map_stack(stack_size + emergency_stacks_size);
        if (!stack) {
            log::warning("processor with {} {}: {}: left out", kind, which, stack.error());
            ++processors.left_out;
            return true;
        }
        state.stack_guard = *stack;
    }
    state.stage.store(Stage::none, std::memory_order_relaxed);
    local_of(number).apic_id = which; // with a starter, the processor writes its own
    comparison.requested.store(0, std::memory_order_relaxed);
    comparison.answered.store(0, std::memory_order_relaxed);
    start_offer.apic_id = which;
    start_offer.stack = state.stack_guard + 4096 + stack_size;
    start_offer.number = number;
    // Release: pairs with the locked exchange in smp.S, which reads the other fields after it.
    offer_state().store(to_underlying(Offer::offered), std::memory_order_release);

    const Result<void> started = start(which, number);
    u32 offered = to_underlying(Offer::offered);
    if (offer_state().compare_exchange_strong(offered, to_underlying(Offer::withdrawn), std::memory_order_acq_rel)) {
        if (started) {
            stop(which);
            log::warning("processor with {} {} did not start within {} ms: left out", kind, which,
                         startup_bound / 1'000'000);
        } else {
            log::warning("processor with {} {}: {}: left out", kind, which, started.error());
        }
        ++processors.left_out;
        return true;
    }
    const auto off = compare_counters();
    const auto settled = [&] {
        const Stage stage = state.stage.load(std::memory_order_acquire); // pairs with the processor's release
        return stage == Stage::serving || stage == Stage::failed;
    };
    if (!wait(join_bound, settled) &&
        state.stage.exchange(Stage::given_up, std::memory_order_acq_rel) != Stage::serving) {
        log::warning("processor {} ({} {}) did not get ready within {} ms: left out, and no further one is started",
                     number, kind, which, join_bound / 1'000'000);
        ++processors.left_out;
        return false;
    }
    if (state.stage.load(std::memory_order_acquire) == Stage::failed) {
        log::warning("processor {} ({} {}): {}: left out", number, kind, which, *state.error);
        ++processors.left_out;
        return true;
    }
    log::info("processor {}: APIC id {}, running", number, local_of(number).apic_id);
    const i64 worst = static_cast<i64>(tsc_hz() / 1'000'000); // one microsecond
    if (!off) {
        log::warning("processor {} did not respond when the time stamp counters were compared", number);
    } else if (*off > worst || *off < -worst) {
        log::warning("processor {}: its time stamp counter is {} cycles {} the first one's: times of different "
                     "processors do not compare",
                     number, static_cast<u64>(*off < 0 ? -*off : *off), *off < 0 ? "behind" : "ahead of");
    }
    processors.running = number + 1;
    running = number + 1;
    set_running_processors(running);
    return true;
}

} // namespace

// Runs on the new processor, on its own stack, with interrupts off.
extern "C" [[noreturn]] void processor_main(u64 number) {
    const u32 n = static_cast<u32>(number);
    State& state = states[n];
    join_traps(n, state.stack_guard, stack_size);
    if (starter.count == 0) {
        forget_start_page(start_page);
    }
    answer_comparison();
    Result<void> done = join_interrupts();
    if (done) {
        local_of(n).apic_id = lapic::id();
        done = join_timer();
    }
    if (done) {
        cpu::interrupts_on();
        done = work.join(work.context, n);
    }
    if (!done) {
        state.error = done.error();
    }
    Stage before = Stage::none;
    // Fails if the boot processor has given up.
    const bool wanted =
        state.stage.compare_exchange_strong(before, done ? Stage::serving : Stage::failed, std::memory_order_acq_rel);
    if (wanted && done) {
        work.serve(work.context, n);
        state.stage.store(Stage::stopped, std::memory_order_release);
    }
    rest();
}

Processors start_processors(const acpi::Tables* tables, u32 maximum, const ProcessorWork& given, Nanoseconds join_bound,
                            const ProcessorStarter& by) {
    Processors processors;
    const acpi::Madt* madt = tables != nullptr && tables->madt ? &*tables->madt : nullptr;
    if (madt != nullptr) {
        processors.listed = std::max(madt->processor_count + madt->processors_dropped, 1u);
    } else if (by.count != 0) {
        processors.listed = by.count;
    }
    const u32 own = lapic::id();
    local_of(0).apic_id = own;
    const u32 known = by.count > 1      ? std::min(by.count, processors.listed)
                      : madt != nullptr ? madt->processor_count
                                        : 1;
    if (maximum <= 1 || known <= 1) {
        return processors;
    }
    if (lapic::mode() == lapic::Mode::none) {
        log::warning("{} processors are listed, and the first one has no local APIC to start the others with",
                     processors.listed);
        return processors;
    }
    if (by.count > 1) {
        starter = by;
    } else {
        auto page = prepare_start_page();
        if (!page) {
            log::warning("further processors cannot be started: {}", page.error());
            return processors;
        }
        start_page = *page;
    }
    if (auto kicks = start_kicks(); !kicks) {
        log::warning("further processors cannot be started: {}", kicks.error());
        if (start_page != 0) {
            close_start_page(start_page, true);
        }
        return processors;
    }
    work = given;
    set_stop_others(send_nmi_to_others);

    const u32 wanted = std::min({maximum, max_processors, known});
    if (starter.count != 0) {
        for (u32 index = 1; index < wanted && start_one(processors.running, index, join_bound, processors); ++index) {
        }
        return processors;
    }
    u32 count = 1;
    for (const u32 id : madt->all_processors()) {
        if (id != own && count < wanted) {
            static_cast<void>(lapic::send(id, lapic::Delivery::init, 0));
            ++count;
        }
    }
    static_cast<void>(wait(10'000'000, [] { return false; })); // [SDM-3 9.4.4.1]
    count = 1;
    for (const u32 id : madt->all_processors()) {
        if (id == own || count == wanted) {
            continue;
        }
        ++count;
        if (!start_one(processors.running, id, join_bound, processors)) {
            break;
        }
    }
    close_start_page(start_page, processors.left_out == 0);
    return processors;
}

void await_stopped() {
    static_cast<void>(wait(1'000'000'000, [] {
        for (u32 i = 1; i < running; ++i) {
            if (states[i].stage.load(std::memory_order_acquire) != Stage::stopped) {
                return false;
            }
        }
        return true;
    }));
    set_running_processors(1);
    running = 1;
}

} // namespace fl
