module;
#include "core/thread_annotations.hpp"
module core.machine.runtime;
import core.std;
import core.heap;
import core.spinlock;

extern "C" {
// Defined in kernel.ld.
extern void (*const init_array_begin[])();
extern void (*const init_array_end[])();
}

namespace fl {

namespace {
constinit SpinLock lock; // lock order: the frames' lock is taken with this one held, never the reverse
constinit Heap heap GUARDED_BY(lock);
constinit HeapGrowth growth GUARDED_BY(lock) = nullptr;
} // namespace

void* heap_allocate(usize size, usize alignment) {
    const Locked locked(lock);
    void* block = heap.allocate(size, alignment);
    if (block == nullptr && growth != nullptr) {
        const auto memory = growth(Heap::bytes_for(size, alignment));
        if (!memory.empty()) {
            heap.add(memory);
            block = heap.allocate(size, alignment);
        }
    }
    return block;
}

void heap_free(void* block) {
    const Locked locked(lock);
    heap.free(block);
}
u64 heap_allocations() {
    const Locked locked(lock);
    return heap.allocations();
}
// Called once, before further processors run. The caller holds the frames' lock, after which this lock must not be
// taken.
void set_heap_growth(HeapGrowth more) NO_THREAD_SAFETY_ANALYSIS { growth = more; }

void run_initialisers() {
    for (auto* at = init_array_begin; at != init_array_end; ++at) {
        (*at)();
    }
}

} // namespace fl
