// What compiled C++ expects of its surroundings: memory functions, operator new and delete, initialisers, the ways to
// give up.
export module core.machine.runtime;
import core.std;

export namespace fl {

/// How often operator new and its relatives were called since the entry.
u64 heap_allocations();
/// What operator new and delete do; nullptr when there is no memory (the plain forms of operator new then panic).
void* heap_allocate(usize size, usize alignment);
void heap_free(void* block);
/// Where the heap gets its memory: at least so many bytes, for good, or none. Until it is set there is no heap.
using HeapGrowth = std::span<std::byte> (*)(usize at_least);
void set_heap_growth(HeapGrowth more);
/// Runs the initialisers of the image's modules. Once, before anything but the consoles is used.
void run_initialisers();

} // namespace fl
