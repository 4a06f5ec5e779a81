// Configuration space for tests: headers made of bytes, base address registers that keep only what hardware would keep.
#pragma once

import core.std;
import core.result;
import drivers.pci;

namespace pci_test {
using namespace fl;
namespace pci = fl::drivers::pci;

struct Function {
    std::array<u8, 256> bytes{};
    std::array<u32, 6> bar_mask{}; // the bits that stick; 0: not implemented

    void set16(u32 at, u16 v) {
        bytes[at] = static_cast<u8>(v);
        bytes[at + 1] = static_cast<u8>(v >> 8);
    }
    void set32(u32 at, u32 v) {
        set16(at, static_cast<u16>(v));
        set16(at + 2, static_cast<u16>(v >> 16));
    }
    u32 get32(u32 at) const { return bytes[at] | bytes[at + 1] << 8 | bytes[at + 2] << 16 | u32{bytes[at + 3]} << 24; }
};

class Space final : public pci::Config {
  public:
    std::map<std::tuple<int, int, int>, Function> functions;
    u64 reads = 0;
    u64 command_writes = 0;
    bool sized_while_decoding = false;
    std::set<std::tuple<int, int, int>> unreachable; // as pages that cannot be mapped
    u32 failed = 0;

    Function& add(int bus, int device, int function, u16 vendor, u16 id, u32 class_code) {
        Function& f = functions[{bus, device, function}];
        f.set16(0, vendor);
        f.set16(2, id);
        f.set32(8, class_code << 8);
        return f;
    }
    u32 read32(pci::Address at, u8 offset) override {
        ++reads;
        EXPECT_EQ(offset % 4, 0);
        if (unreachable.contains({at.bus, at.device, at.function})) {
            ++failed;
            return ~u32{0};
        }
        auto it = functions.find({at.bus, at.device, at.function});
        return it == functions.end() ? ~u32{0} : it->second.get32(offset);
    }
    u32 failed_reads() const override { return failed; }
    void write32(pci::Address at, u8 offset, u32 value) override {
        auto it = functions.find({at.bus, at.device, at.function});
        if (it == functions.end()) {
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
        f.set32(offset, value);
    }
    void write16(pci::Address at, u8 offset, u16 value) override {
        EXPECT_EQ(offset, 4);
        ++command_writes;
        functions[{at.bus, at.device, at.function}].set16(offset, value);
    }
};

} // namespace pci_test
