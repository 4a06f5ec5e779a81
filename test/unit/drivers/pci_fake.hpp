// Configuration space for tests: headers made of bytes, and BARs that keep only the bits that hardware would keep.
#pragma once
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.mmio;
import core.result;
import drivers.pci;

namespace pci_test {
using namespace fl;
namespace pci = fl::drivers::pci;

struct Function {
    std::array<u8, 4096> bytes{};
    std::array<u32, 6> bar_mask{};     // the writable bits; 0: not implemented
    std::map<u32, u8> writable;        // byte offset -> writable bits; all bits if absent
    std::map<u32, u8> cleared_by_ones; // byte offset -> write-one-to-clear bits

    void set16(u32 at, u16 v) {
        bytes[at] = static_cast<u8>(v);
        bytes[at + 1] = static_cast<u8>(v >> 8);
    }
    void set32(u32 at, u32 v) {
        set16(at, static_cast<u16>(v));
        set16(at + 2, static_cast<u16>(v >> 16));
    }
    u16 get16(u32 at) const { return static_cast<u16>(bytes[at] | bytes[at + 1] << 8); }
    u32 get32(u32 at) const { return get16(at) | u32{get16(at + 2)} << 16; }
    /// Appends a capability and links it from the previous one, or from the header.
    void add_capability(u8 at, u8 id) {
        bytes[6] |= 0x10;
        u8 link = 0x34;
        while (bytes[link] != 0) {
            link = static_cast<u8>(bytes[link] + 1);
        }
        bytes[link] = at;
        bytes[at] = id;
    }
    void limit16(u32 at, u16 bits) {
        writable[at] = static_cast<u8>(bits);
        writable[at + 1] = static_cast<u8>(bits >> 8);
    }
};

class Space final : public pci::Config {
  public:
    std::map<std::tuple<int, int, int>, Function> functions;
    u64 reads = 0;
    u64 command_writes = 0;
    bool sized_while_decoding = false;
    std::set<std::tuple<int, int, int>> unreachable; // functions whose pages cannot be mapped
    u32 failed = 0;
    u16 number = 0;                                            // segment number
    bool extended = true;                                      // all 4096 bytes are accessible
    std::function<void(u32 at, u32 width, u32 value)> written; // called for every write except those to BARs

    Function& add(int bus, int device, int function, u16 vendor, u16 id, u32 class_code) {
        Function& f = functions[{bus, device, function}];
        f.set16(0, vendor);
        f.set16(2, id);
        f.set32(8, class_code << 8);
        return f;
    }
    u32 read(pci::Address at, u16 offset, u32 width) override {
        ++reads;
        check(at, offset, width);
        if (unreachable.contains({at.bus, at.device, at.function})) {
            ++failed;
            return ~u32{0};
        }
        auto it = functions.find({at.bus, at.device, at.function});
        u32 value = ~u32{0};
        if (it != functions.end() && at.segment == number && (extended || offset < 256)) {
            std::memcpy(&value, it->second.bytes.data() + offset, width);
        }
        return width == 4 ? value : value & ((u32{1} << 8 * width) - 1);
    }
    void write(pci::Address at, u16 offset, u32 width, u32 value) override {
        check(at, offset, width);
        auto it = functions.find({at.bus, at.device, at.function});
        if (it == functions.end() || at.segment != number) {
            return;
        }
        Function& f = it->second;
        if (offset >= 0x10 && offset < 0x28) {
            const u32 mask = f.bar_mask[(offset - 0x10) / 4];
            sized_while_decoding = sized_while_decoding || (value == ~u32{0} && (f.bytes[4] & 3) != 0);
            const u32 flags = f.get32(offset) & ~mask & 0xf;
            f.set32(offset, (value & mask) | flags);
            return;
        }
        command_writes += offset == 4 ? 1 : 0;
        if (written) {
            written(offset, width, value);
        }
        for (u32 i = 0; i < width; ++i) {
            const u8 byte = static_cast<u8>(value >> 8 * i);
            const auto rule = f.writable.find(offset + i);
            const u8 bits = rule == f.writable.end() ? 0xff : rule->second;
            const auto ones = f.cleared_by_ones.find(offset + i);
            const u8 clear = ones == f.cleared_by_ones.end() ? 0 : ones->second;
            u8& now = f.bytes[offset + i];
            now = static_cast<u8>((now & ~bits & ~(clear & byte)) | (byte & bits & ~clear) | (now & clear & ~byte));
        }
    }
    bool reaches_extended(pci::Address) const override { return extended; }
    u16 segment() const override { return number; }
    u32 failed_reads() const override { return failed; }

  private:
    void check(pci::Address at, u16 offset, u32 width) const {
        EXPECT_TRUE(width == 1 || width == 2 || width == 4);
        EXPECT_EQ(offset % width, 0u);
        EXPECT_LT(offset, 4096);
        EXPECT_LT(at.device, 32);
        EXPECT_LT(at.function, 8);
    }
};

/// Device registers at physical addresses, and memory, which must not be mapped as registers.
class Mapper final : public MmioMapper {
  public:
    struct Place {
        MmioModel* model;
        u64 size;
    };
    std::map<u64, Place> places;
    std::vector<std::pair<u64, u64>> maps; // the requested mappings
    u64 memory_end = 0x40000000;

    Result<Mmio> map(u64 physical, u64 size) override {
        maps.emplace_back(physical, size);
        if (physical < memory_end) {
            return Error(Code::protocol, "memory is there", memory_end, physical);
        }
        for (const auto& [base, place] : places) {
            if (physical >= base && physical - base < place.size) {
                return Mmio(*place.model, place.size).part(physical - base, size);
            }
        }
        return Error(Code::not_found, "nothing is there", 0, physical);
    }
};

} // namespace pci_test
