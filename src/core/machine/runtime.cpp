module core.machine.runtime;
import core.std;
import core.heap;
import core.spinlock;

extern "C" {
// From kernel.ld.
extern void (*const init_array_begin[])();
extern void (*const init_array_end[])();
}

namespace fl {

namespace {
constinit Heap heap;
constinit HeapGrowth growth = nullptr;
constinit SpinLock lock; // of both; the frames' lock is taken under it, never the other way round
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
void set_heap_growth(HeapGrowth more) { growth = more; }

void run_initialisers() {
    for (auto* at = init_array_begin; at != init_array_end; ++at) {
        (*at)();
    }
}

} // namespace fl
