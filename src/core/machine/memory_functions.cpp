// The memory functions that the compiler calls. In deterministic mode each iteration of a string instruction counts as
// one instruction, so whole words are processed first and only the rest by bytes. No byte loops that the compiler would
// turn into calls of these same functions.
#include <stddef.h>
#include <stdint.h>

extern "C" {

void* memcpy(void* __restrict to, const void* __restrict from, size_t size) {
    void* d = to;
    const void* s = from;
    size_t words = size / 8;
    asm volatile("rep movsq" : "+D"(d), "+S"(s), "+c"(words)::"memory");
    size_t rest = size % 8;
    if (rest != 0) {
        asm volatile("rep movsb" : "+D"(d), "+S"(s), "+c"(rest)::"memory");
    }
    return to;
}

void* memmove(void* to, const void* from, size_t size) {
    if (reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(from) >= size) {
        return memcpy(to, from, size);
    }
    // Overlapping, with the destination after the source: copy downwards, tail first.
    char* d = static_cast<char*>(to) + size - 1;
    const char* s = static_cast<const char*>(from) + size - 1;
    size_t rest = size % 8;
    size_t words = size / 8;
    asm volatile("std; rep movsb; sub $7, %0; sub $7, %1; mov %3, %2; rep movsq; cld"
                 : "+D"(d), "+S"(s), "+c"(rest)
                 : "r"(words)
                 : "memory");
    return to;
}

void* memset(void* to, int value, size_t size) {
    void* d = to;
    size_t words = size / 8;
    const uint64_t pattern = 0x0101010101010101u * static_cast<uint8_t>(value);
    asm volatile("rep stosq" : "+D"(d), "+c"(words) : "a"(pattern) : "memory");
    size_t rest = size % 8;
    if (rest != 0) {
        asm volatile("rep stosb" : "+D"(d), "+c"(rest) : "a"(pattern) : "memory");
    }
    return to;
}

int memcmp(const void* a, const void* b, size_t size) {
    const auto* x = static_cast<const unsigned char*>(a);
    const auto* y = static_cast<const unsigned char*>(b);
    for (; size >= 8; size -= 8, x += 8, y += 8) {
        uint64_t p;
        uint64_t q;
        __builtin_memcpy(&p, x, 8);
        __builtin_memcpy(&q, y, 8);
        if (p != q) {
            return __builtin_bswap64(p) < __builtin_bswap64(q) ? -1 : 1;
        }
    }
    for (; size != 0; --size, ++x, ++y) {
        if (*x != *y) {
            return *x < *y ? -1 : 1;
        }
    }
    return 0;
}

void* memchr(const void* in, int value, size_t size) {
    const auto* p = static_cast<const unsigned char*>(in);
    for (; size != 0; --size, ++p) {
        if (*p == static_cast<unsigned char>(value)) {
            return const_cast<unsigned char*>(p);
        }
    }
    return nullptr;
}

size_t strlen(const char* text) {
    const char* end = text;
    while (*end != '\0') {
        asm volatile("" : "+r"(end)); // keeps the compiler from turning this loop into strlen
        ++end;
    }
    return static_cast<size_t>(end - text);
}
}
