// What compiled C++ requires of its environment: memory functions, operator new and delete, initialisers, abort
// functions.
export module core.machine.runtime;
import core.std;

export namespace fl {

/// Calls of the operator new functions since entry.
u64 heap_allocations();
/// The implementations of operator new and delete; nullptr if out of memory (throwing forms of operator new then
/// panic).
void* heap_allocate(usize size, usize alignment);
void heap_free(void* block);
/// Provides memory for the heap, permanently: at least `at_least` bytes, or none. Until it is set, there is no heap.
using HeapGrowth = std::span<std::byte> (*)(usize at_least);
void set_heap_growth(HeapGrowth more);
/// Runs the initialisers of the image's modules. Call once, before anything but the consoles is used.
void run_initialisers();

} // namespace fl
