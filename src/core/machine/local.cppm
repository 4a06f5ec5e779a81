// Per-processor data, at GS: the processor's number first, where core.processor reads it.
export module core.machine.local;
import core.std;
import core.interrupt_router;
import core.processor;
import core.time;

export namespace fl {

struct [[gnu::packed]] TaskState { // [SDM-3 8.7]
    u32 reserved0;
    u64 rsp[3];
    u64 reserved1;
    u64 ist[7];
    u64 reserved2;
    u16 reserved3;
    u16 io_map;
};
static_assert(sizeof(TaskState) == 104);

/// Zero until its processor starts; then written by that processor only. Others read `kicked` and `parked`. Two
/// processors never share a cache line.
struct alignas(128) Local {
    u32 number; // at GS:0
    u32 apic_id;
    Local* self;          // at GS:8
    VectorTable* vectors; // nullptr before it has joined, while interrupts are off
    InterruptCounters interrupts;
    Instant timer_at; // expiry of its timer; `never`: not armed. Written with interrupts off
    u64 stack_guard;  // the unmapped page below its stack
    u64 stack_size;
    u64 emergency;            // its exception stacks, adjacent
    std::atomic<u64> kicked;  // kicks received
    std::atomic<bool> parked; // stopped permanently by a panic
    std::array<u64, 5> descriptors;
    alignas(16) TaskState task;
};
static_assert(__builtin_offsetof(Local, number) == 0, "this_processor() reads it there");
static_assert(__builtin_offsetof(Local, self) == 8, "local() reads it there");

/// Data of any processor; number < max_processors.
Local& local_of(u32 number);
/// Data of this processor. One instruction; valid where this_processor() is.
inline Local& local() {
    Local* self;
    asm volatile("movq %%gs:8, %0" : "=r"(self));
    return *self;
}

} // namespace fl
