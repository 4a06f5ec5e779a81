// Functions that libc++ calls implicitly in the loader; the memory functions are the kernel's own
// (core/machine/memory_functions.cpp).
#include <stdarg.h>
#include <stddef.h>

// Reports a broken internal invariant; defined in loader.cpp.
extern "C" [[noreturn]] void loader_bug(const char* what);

extern "C" [[noreturn]] void abort() { loader_bug("abort() was called"); }

namespace std::inline __1 {
[[noreturn]] void __libcpp_verbose_abort(const char* format, ...) { loader_bug(format); }
} // namespace std::inline __1
