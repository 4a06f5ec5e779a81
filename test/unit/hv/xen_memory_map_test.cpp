#include "gtest_macros.hpp"
#include <cstdint>
import test.gtest;
import host.std;
import core.result;
import core.text;
import core.cpuid;
import hv.backend;
import hv.xen.hypercall;
import hv.xen.memory_map;

namespace {
using namespace fl;
using hv::xen::E820Entry;

// Xen as XENMEM_memory_map shows it [xen-public memory.h]: argument {u32 count, pad, u64 buffer}, entries of 20 bytes.
struct Xen {
    std::vector<std::uint8_t> ranges;
    u32 count = 0;
    i64 answer = 0;
    u32 seen_room = 0;

    static i64 call(void* self, u32 number, u64 a, u64 b, u64, u64, u64) {
        auto& xen = *static_cast<Xen*>(self);
        EXPECT_EQ(number, 12u) << "memory_op";
        EXPECT_EQ(a, 9u) << "XENMEM_memory_map";
        std::uint64_t buffer = 0;
        std::memcpy(&xen.seen_room, reinterpret_cast<const void*>(b), 4);
        std::memcpy(&buffer, reinterpret_cast<const void*>(b + 8), 8);
        if (xen.answer < 0) {
            return xen.answer;
        }
        if (!xen.ranges.empty()) {
            std::memcpy(reinterpret_cast<void*>(buffer), xen.ranges.data(), xen.ranges.size());
        }
        std::memcpy(reinterpret_cast<void*>(b), &xen.count, 4);
        return 0;
    }
};

struct Cpu final : hv::Privileged {
    u32 msr = 0;
    u64 value = 0;
    u64 read_msr(u32) override { return 0; }
    void write_msr(u32 m, u64 v) override { msr = m, value = v; }
    u8 in8(u16) override { return 0; }
    u16 in16(u16) override { return 0; }
    u32 in32(u16) override { return 0; }
    void out8(u16, u8) override {}
    void out16(u16, u16) override {}
    CpuidRegisters cpuid_leaf(u32) override { return {}; }
    void out32(u16, u32) override {}
};

struct XenMemoryMap : testing::Test {
    CpuidSnapshot cpuid{};
    Cpu cpu;
    Xen xen;
    std::array<E820Entry, 4> into{};
    std::uint8_t page = 0;
    void SetUp() override {
        scan_cpuid(cpuid, [](u32 leaf, u32) -> CpuidRegisters {
            switch (leaf) {
            // after another hypervisor's leaves
            case 0x40000100: return {0x40000104, 0x566e6558, 0x65584d4d, 0x4d4d566e};
            case 0x40000102: return {1, 0x40000000, 0, 0};
            default: return {0, 0, 0, 0};
            }
        });
    }
    Result<u32> read() { return hv::xen::read_memory_map(cpuid, cpu, {&xen, Xen::call, &page}, 0x234000, into); }
};

TEST_F(XenMemoryMap, IsReadByHypercall) {
    xen.ranges = {0, 0, 0,    0, 0, 0, 0, 0, 0, 0xfc, 9,    0, 0, 0, 0, 0, 1, 0, 0, 0,  // 639 KiB usable
                  0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0,    0xf0, 7, 0, 0, 0, 0, 2, 0, 0, 0}; // reserved
    xen.count = 2;
    const auto count = read();
    ASSERT_TRUE(count);
    EXPECT_EQ(*count, 2u);
    EXPECT_EQ(xen.seen_room, 4u);
    EXPECT_EQ(cpu.msr, 0x40000000u) << "the page is filled first";
    EXPECT_EQ(cpu.value, 0x234000u);
    const u64 size = into[0].size, address = into[1].address;
    const u32 type = into[1].type;
    EXPECT_EQ(size, 0x9fc00u);
    EXPECT_EQ(address, 0x100000u);
    EXPECT_EQ(type, 2u);
}

TEST_F(XenMemoryMap, SaysWhyThereIsNone) {
    xen.answer = -38;
    EXPECT_EQ(read().error().code, Code::not_supported);
    xen.answer = 0;
    xen.count = 5; // more than the buffer holds
    EXPECT_EQ(read().error().code, Code::protocol);
    cpuid.base_count = 0;
    cpu = {};
    EXPECT_EQ(read().error().code, Code::not_found);
    EXPECT_EQ(cpu.msr, 0u) << "no MSR is touched where there is no Xen";
}

} // namespace
