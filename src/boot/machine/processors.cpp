module;
#include "core/try.hpp"
module boot.machine.processors;
import core.std;
import core.log;
import core.processor;
import core.result;
import core.time;
import core.machine.acpi;
import core.machine.clock;
import core.machine.interrupts;
import core.machine.smp;
import io.executor;
import boot.backend;

namespace fl::boot {

namespace {

// One executor per processor, index = processor. Those of secondary processors are created when the processor starts
// and live as long as the machine.
struct Executors {
    struct alignas(128) Place { // no cache line is written by two processors
        std::optional<io::Executor> executor;
    };
    std::array<Place, max_processors> places;
    std::array<io::Executor*, max_processors> list{};
    u32 count = 0;
    std::atomic<bool> stop{false};

    io::Executor& make(u32 processor) {
        std::optional<io::Executor>& own = places[processor].executor;
        if (!own) { // otherwise left by a processor that failed to start
            own.emplace(io::Platform{platform_context(processor), platform_now, platform_idle, platform_kick,
                                     io::Platform::longest_turn, platform_rearm},
                        processor);
        }
        list[processor] = &*own;
        return *own;
    }
};
Executors& all() {
    static Executors executors;
    return executors;
}

// Callbacks of ProcessorWork; the context is the Backend.
Result<void> join(void* backend, u32 processor) {
    io::Executor& executor = all().make(processor);
    CHECK(static_cast<Backend*>(backend)->join(processor, executor));
    return join_hypervisor_timer();
}

void serve(void* backend, u32 processor) {
    all().list[processor]->serve(all().stop);
    static_cast<Backend*>(backend)->leave(processor);
}

} // namespace

void start_executors(Backend& backend, io::Executor& executor, u32 maximum, Nanoseconds bound) {
    all().list[0] = &executor;
    executor.set_kick(platform_kick);
    backend.take_kicks(take_kick, nullptr);
    use_kicks({&backend, [](void* self, u32 processor) { return static_cast<Backend*>(self)->kick(processor); }});
    const ProcessorStarter starter{&backend, backend.processor_count(),
                                   [](void* self, u32 index, const ProcessorStart& state) {
                                       return static_cast<Backend*>(self)->start_processor(index, state);
                                   },
                                   [](void* self, u32 index) { static_cast<Backend*>(self)->stop_processor(index); },
                                   [](void* self) { static_cast<Backend*>(self)->yield(); }};
    const Processors found = start_processors(acpi_tables(), maximum, {&backend, join, serve}, bound, starter);
    if (found.running == 1) {
        executor.set_kick(nullptr); // no other processor will kick it
    }
    all().count = found.running;
    log::info("processors: {} of {} run", found.running, found.listed);
    log::Record("processors")
        .number("listed", found.listed)
        .number("running", found.running)
        .number("left_out", found.left_out);
}

std::span<io::Executor* const> executors() { return {all().list.data(), all().count}; }

void stop_executors() {
    all().stop.store(true, std::memory_order_release); // pairs with the acquire in Executor::serve
    for (io::Executor* executor : executors().subspan(std::min<usize>(all().count, 1))) {
        executor->wake();
    }
    await_stopped();
}

} // namespace fl::boot
