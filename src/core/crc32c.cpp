module core.crc32c;
import core.std;

namespace fl {

namespace {

constexpr u32 polynomial = 0x82f63b78; // 0x1edc6f41, bit-reversed

// tables[k][b]: the contribution of byte b, k bytes before the end.
using Tables = std::array<std::array<u32, 256>, 8>;

constexpr Tables make_tables() {
    Tables t{};
    for (u32 b = 0; b < 256; ++b) {
        u32 crc = b;
        for (int bit = 0; bit < 8; ++bit) {
            crc = (crc >> 1) ^ ((crc & 1) != 0 ? polynomial : 0);
        }
        t[0][b] = crc;
    }
    for (u32 b = 0; b < 256; ++b) {
        for (usize k = 1; k < t.size(); ++k) {
            t[k][b] = (t[k - 1][b] >> 8) ^ t[0][t[k - 1][b] & 0xff];
        }
    }
    return t;
}

constexpr Tables tables = make_tables();

u64 load64(const std::byte* at) {
    u64 value;
    std::memcpy(&value, at, 8);
    return value;
}

} // namespace

u32 crc32c_by_table(std::span<const std::byte> data, u32 before) {
    u32 crc = ~before;
    const std::byte* at = data.data();
    usize left = data.size();
    for (; left >= 8; left -= 8, at += 8) {
        const u64 word = load64(at) ^ crc;
        crc = 0;
        for (usize k = 0; k < 8; ++k) {
            crc ^= tables[7 - k][(word >> (8 * k)) & 0xff];
        }
    }
    for (; left != 0; --left, ++at) {
        crc = (crc >> 8) ^ tables[0][(crc ^ std::to_integer<u32>(*at)) & 0xff];
    }
    return ~crc;
}

// The crc32 instruction uses general-purpose registers only: the kernel may use it without saving vector state.
u32 crc32c_detail::by_instruction(std::span<const std::byte> data, u32 before) {
    u64 crc = static_cast<u32>(~before);
    const std::byte* at = data.data();
    usize left = data.size();
    for (; left >= 8; left -= 8, at += 8) {
        asm("crc32q %1, %0" : "+r"(crc) : "rm"(load64(at)));
    }
    u32 tail = static_cast<u32>(crc);
    for (; left != 0; --left, ++at) {
        asm("crc32b %1, %0" : "+r"(tail) : "r"(std::to_integer<u8>(*at)));
    }
    return ~tail;
}

bool crc32c_detail::has_instruction() {
    u32 eax = 1;
    u32 ebx;
    u32 ecx = 0;
    u32 edx;
    asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    return (ecx & (u32{1} << 20)) != 0; // SSE4.2 [SDM-2A CPUID.01H:ECX]
}

u32 crc32c(std::span<const std::byte> data, u32 before) {
    enum : u8 { unknown, no, yes };
    // Relaxed: every caller computes the same value, and no other data depends on it. Cached, since CPUID exits in a
    // virtual machine.
    static constinit std::atomic<u8> instruction{unknown};
    u8 known = instruction.load(std::memory_order_relaxed);
    if (known == unknown) {
        known = crc32c_detail::has_instruction() ? yes : no;
        instruction.store(known, std::memory_order_relaxed);
    }
    return known == yes ? crc32c_detail::by_instruction(data, before) : crc32c_by_table(data, before);
}

} // namespace fl
