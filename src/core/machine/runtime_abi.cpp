// Symbols that compiled code and libc++ expect in the global module.
#include <new>
#include <stdarg.h>
#include <stddef.h>
import core.std;
import core.heap;
import core.panic;
import core.machine.runtime;

using namespace fl;

namespace {

void* must_allocate(usize size, usize alignment) {
    void* block = heap_allocate(size, alignment);
    if (block == nullptr) {
        panic("out of memory: {} bytes requested from the heap", size);
    }
    return block;
}

} // namespace

const std::nothrow_t std::nothrow{};

// operator new and delete must belong to the global module: hence a file that is not a module unit.
void* operator new(size_t size) { return must_allocate(size, Heap::granule); }
void* operator new[](size_t size) { return must_allocate(size, Heap::granule); }
void* operator new(size_t size, std::align_val_t alignment) {
    return must_allocate(size, static_cast<usize>(alignment));
}
void* operator new[](size_t size, std::align_val_t alignment) {
    return must_allocate(size, static_cast<usize>(alignment));
}
void* operator new(size_t size, const std::nothrow_t&) noexcept { return heap_allocate(size, Heap::granule); }
void* operator new[](size_t size, const std::nothrow_t&) noexcept { return heap_allocate(size, Heap::granule); }
void* operator new(size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
    return heap_allocate(size, static_cast<usize>(alignment));
}
void* operator new[](size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
    return heap_allocate(size, static_cast<usize>(alignment));
}
void operator delete(void* block) noexcept { heap_free(block); }
void operator delete[](void* block) noexcept { heap_free(block); }
void operator delete(void* block, size_t) noexcept { heap_free(block); }
void operator delete[](void* block, size_t) noexcept { heap_free(block); }
void operator delete(void* block, std::align_val_t) noexcept { heap_free(block); }
void operator delete[](void* block, std::align_val_t) noexcept { heap_free(block); }
void operator delete(void* block, size_t, std::align_val_t) noexcept { heap_free(block); }
void operator delete[](void* block, size_t, std::align_val_t) noexcept { heap_free(block); }
void operator delete(void* block, const std::nothrow_t&) noexcept { heap_free(block); }
void operator delete[](void* block, const std::nothrow_t&) noexcept { heap_free(block); }

extern "C" {

[[noreturn]] void abort() { panic("abort() was called"); }
[[noreturn]] void __cxa_pure_virtual() { panic("a pure virtual function was called"); }
// The kernel never runs destructors of static objects: it ends by ending the machine.
int __cxa_atexit(void (*)(void*), void*, void*) { return 0; }
void* __dso_handle = nullptr;
}

namespace std::inline __1 {
[[noreturn]] void __libcpp_verbose_abort(const char* format, ...) { panic("libc++: {}", std::string_view(format)); }
} // namespace std::inline __1
