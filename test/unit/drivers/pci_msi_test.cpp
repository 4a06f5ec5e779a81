#include "gtest_macros.hpp"

#include "unit/drivers/pci_fake.hpp"
#include <cstdio>
import test.gtest;
import host.std;
import core.interrupt;
import drivers.pci.msi;

namespace {
using namespace pci_test;
using pci::InterruptKind;
using Journal = std::vector<std::string>;

std::string hex(u64 value) {
    char text[20];
    std::snprintf(text, sizeof(text), "%llx", static_cast<unsigned long long>(value));
    return text;
}

// Vectors of each processor, lowest first, starting at 0x30; APIC id = processor.
class Controller final : public InterruptController {
  public:
    struct Held {
        u32 processor;
        u8 vector;
        InterruptHandler handler;
        void* context;
    };
    std::vector<Held> held;
    std::set<std::pair<u32, u8>> taken; // by other devices
    u8 last = 0xef;
    u32 processors = 4;
    u64 address = 0xfee00000;
    bool line_attached = false;
    InterruptLine line{};
    u32 line_processor = ~0u;
    std::function<void()> detaching;

    Result<void> attach_line(InterruptLine l, InterruptHandler, void*, u32 processor) override {
        line = l;
        line_processor = processor;
        line_attached = true;
        return {};
    }
    void detach_line(InterruptLine, InterruptHandler, void*) override {
        EXPECT_TRUE(line_attached);
        line_attached = false;
        if (detaching) {
            detaching();
        }
    }
    Result<InterruptVector> attach_message(u32 processor, InterruptHandler handler, void* context) override {
        if (processor >= processors) {
            return Error(Code::bad_argument, "no such processor", processors, processor);
        }
        for (u32 v = 0x30; v <= last; ++v) {
            const auto vector = static_cast<u8>(v);
            if (!taken.contains({processor, vector}) && find(processor, vector) == held.end()) {
                held.push_back({processor, vector, handler, context});
                return InterruptVector{vector, processor, processor};
            }
        }
        return Error(Code::exhausted, "no vector left", 0, processor);
    }
    Result<InterruptMessage> message_for(InterruptVector v) const override {
        return InterruptMessage{address | u64{v.processor} << 12, v.vector};
    }
    Result<InterruptVector> attach_vector(InterruptHandler, void*, bool) override {
        return Error(Code::not_supported, "not here");
    }
    void detach_vector(InterruptVector v) override {
        const auto at = find(v.processor, v.vector);
        ASSERT_NE(at, held.end());
        held.erase(at);
        if (detaching) {
            detaching();
        }
    }
    // What a processor does when a device writes this message.
    void deliver(u64 to, u32 data) {
        const auto at = find(static_cast<u32>((to >> 12) & 0xff), static_cast<u8>(data));
        ASSERT_NE(at, held.end()) << "a message that nothing is attached for: " << hex(to) << " " << hex(data);
        at->handler(at->context);
    }

  private:
    std::vector<Held>::iterator find(u32 processor, u8 vector) {
        return std::find_if(held.begin(), held.end(),
                            [&](const Held& h) { return h.processor == processor && h.vector == vector; });
    }
};

// A device in PCI slot 1 with the interrupts that the test configures. The journal has every write to configuration
// space (c OFFSET = VALUE) and to the MSI-X table (t OFFSET = VALUE), in order.
struct Machine {
    struct Table final : MmioModel {
        Machine& m;
        std::array<u8, 0x4000> memory{};
        explicit Table(Machine& machine) : m(machine) {}
        u64 read(u64 at, u32 width) override {
            u64 value = 0;
            std::memcpy(&value, memory.data() + at, width);
            return value;
        }
        void write(u64 at, u32 width, u64 value) override {
            EXPECT_EQ(width, 4u);
            m.journal.push_back("t" + hex(at) + "=" + hex(value));
            if (at % 16 != 12) {
                EXPECT_TRUE(memory[align_down(at, u64{16}) + 12] & 1) << "an entry is changed while it is unmasked";
            }
            EXPECT_TRUE(m.f.get16(0x52) & 0x8000) << "the table is changed while MSI-X is off";
            std::memcpy(memory.data() + at, &value, width);
        }
    };
    Journal journal;
    Space space;
    Mapper mapper;
    Controller controller;
    Function& f = space.add(0, 1, 0, 0x1af4, 0x1042, 0x010000);
    Table table{*this};
    std::array<u32, 40> calls{};

    Machine() {
        space.written = [this](u32 at, u32, u32 value) { journal.push_back("c" + hex(at) + "=" + hex(value)); };
    }
    void add_msix(u32 entries, u32 table_at = 0x2000, u32 pending_at = 0x3000, u32 bar = 4) {
        f.add_capability(0x50, 0x11);
        f.set16(0x52, static_cast<u16>(entries - 1));
        f.limit16(0x52, 0xc000);
        f.set32(0x54, table_at | bar);
        f.set32(0x58, pending_at | bar);
        f.set32(0x20, 0x0000000c); // BAR 4: 64 bits, 16 KiB at 0xf800000000
        f.set32(0x24, 0x000000f8);
        f.bar_mask[4] = 0xffffc000;
        f.bar_mask[5] = 0xffffffff;
        mapper.places[0xf800000000] = {&table, 0x4000};
        for (u32 i = 0; i < entries && table_at + 16 * i + 12 < 0x4000; ++i) {
            table.memory[table_at + 16 * i + 12] = 1; // their state after reset
        }
    }
    void add_msi(u16 control) {
        f.add_capability(0x70, 0x05);
        f.set16(0x72, control);
        f.limit16(0x72, 0x0071);
    }
    void add_line(u8 pin = 1, u8 line = 11) {
        f.bytes[0x3c] = line;
        f.bytes[0x3d] = pin;
    }
    pci::Device device() { return *pci::look_up(space, {0, 1, 0}); }
    // Handler n counts its calls in calls[n].
    std::vector<pci::VectorUse> uses(u32 count, u32 first_processor = 0, bool spread = true) {
        std::vector<pci::VectorUse> all;
        for (u32 i = 0; i < count; ++i) {
            all.push_back({first_processor + (spread ? i : 0), [](void* n) { ++*static_cast<u32*>(n); }, &calls[i]});
        }
        return all;
    }
    u32 entry(u32 n, u32 at) const {
        u32 value = 0;
        std::memcpy(&value, table.memory.data() + 0x2000 + 16 * n + at, 4);
        return value;
    }
    // The device's action to raise vector n.
    void raise_msix(u32 n) {
        ASSERT_EQ(f.get16(0x52) & 0xc000, 0x8000);
        ASSERT_EQ(entry(n, 12) & 1, 0u);
        controller.deliver(entry(n, 0) | u64{entry(n, 4)} << 32, entry(n, 8));
    }
    void raise_msi(u32 n) {
        const u16 control = f.get16(0x72);
        ASSERT_TRUE(control & 1);
        ASSERT_LT(n, 1u << (control >> 4 & 7));
        const bool wide = (control & 0x80) != 0;
        const u32 data = f.get16(wide ? 0x7c : 0x78);
        controller.deliver(f.get32(0x74) | u64{wide ? f.get32(0x78) : 0} << 32, data | n);
    }
};

TEST(PciMsix, TheTableIsWrittenInOrder) {
    Machine m;
    m.add_msix(3);
    m.table.memory[0x2000 + 12 + 1] = 0xab; // reserved bits of vector control: to be preserved
    m.controller.address = 0x1'fee00000;
    pci::Interrupts interrupts(m.device(), m.controller, m.mapper);
    EXPECT_EQ(*interrupts.attach(m.uses(2)), 2u);
    EXPECT_EQ(interrupts.kind(), InterruptKind::msix);
    EXPECT_EQ(m.journal, (Journal{"c4=2",                                                // memory decoding is enabled
                                  "c52=c002",                                            // enabled, all masked
                                  "t200c=ab01", "t201c=1", "t202c=1",                    // each masked
                                  "t2000=fee00000", "t2004=1", "t2008=30", "t200c=ab00", // 0: address, data, unmasked
                                  "t2010=fee01000", "t2014=1", "t2018=30", "t201c=0",    // 1: another processor
                                  "c4=402",                                              // no INTx
                                  "c52=8002"}));                                         // function unmasked
    m.raise_msix(1);
    m.raise_msix(1);
    m.raise_msix(0);
    EXPECT_EQ(m.calls[0], 1u);
    EXPECT_EQ(m.calls[1], 2u);
}

TEST(PciMsix, DetachPutsEverythingBack) {
    Machine m;
    m.add_msix(3);
    m.add_msi(0x0081); // MSI is enabled, as a loader may have left it
    m.f.set16(4, 0x0006);
    for (u32 i = 0; i < 32; ++i) {
        m.table.memory[0x2000 + i] = static_cast<u8>(i % 16 == 12 ? 0x41 : i + 1);
    }
    const auto config = m.f.bytes;
    const auto memory = m.table.memory;
    {
        pci::Interrupts interrupts(m.device(), m.controller, m.mapper);
        EXPECT_EQ(*interrupts.attach(m.uses(2)), 2u);
        EXPECT_FALSE(m.f.get16(0x72) & 1) << "both kinds are on";
        m.controller.detaching = [&] { EXPECT_FALSE(m.f.get16(0x52) & 0x8000) << "detached while it can still write"; };
        interrupts.detach();
        EXPECT_EQ(interrupts.kind(), InterruptKind::none);
        EXPECT_EQ(interrupts.count(), 0u);
        EXPECT_EQ(m.f.bytes, config);
        EXPECT_EQ(m.table.memory, memory);
        EXPECT_EQ(m.controller.held.size(), 0u);
        m.journal.clear();
        interrupts.detach();
        EXPECT_EQ(m.journal, Journal{});
        EXPECT_EQ(*interrupts.attach(m.uses(1)), 1u) << "again";
        EXPECT_EQ(interrupts.attach(m.uses(1)).error().code, Code::busy);
    }
    EXPECT_EQ(m.f.bytes, config) << "the destructor";
    EXPECT_EQ(m.controller.held.size(), 0u);
}

TEST(PciMsix, DetachMasksFirst) {
    Machine m;
    m.add_msix(1);
    pci::Interrupts interrupts(m.device(), m.controller, m.mapper);
    EXPECT_TRUE(interrupts.attach(m.uses(1)));
    m.journal.clear();
    interrupts.detach();
    EXPECT_EQ(m.journal, (Journal{"c52=c000", "t200c=1", "t2000=0", "t2004=0", "t2008=0", "t200c=1", "c52=0", "c4=2"}));
}

TEST(PciMsix, AsManyAsTheDeviceAndTheMachineHave) {
    Machine m;
    m.add_msix(5);
    pci::Interrupts interrupts(m.device(), m.controller, m.mapper);
    EXPECT_EQ(*interrupts.attach(m.uses(4)), 4u);
    interrupts.detach();
    EXPECT_EQ(*interrupts.attach(m.uses(9, 0, false)), 5u) << "the table's size";
    interrupts.detach();
    EXPECT_EQ(interrupts.attach(m.uses(9, 0, false), 6).error().code, Code::exhausted);
    EXPECT_EQ(interrupts.attach(m.uses(2), 3).error().code, Code::bad_argument);
    EXPECT_EQ(interrupts.attach({}, 1).error().code, Code::bad_argument);
    EXPECT_EQ(interrupts.attach(m.uses(2), 0).error().code, Code::bad_argument);
    m.controller.last = 0x31; // two vectors
    m.journal.clear();
    EXPECT_EQ(interrupts.attach(m.uses(4, 1, false), 3).error().code, Code::exhausted);
    EXPECT_EQ(m.controller.held.size(), 0u);
    for (const std::string& line : m.journal) {
        EXPECT_EQ(line.substr(0, 2), "c4") << "only decoding was touched";
    }
    EXPECT_EQ(*interrupts.attach(m.uses(4, 1, false), 2), 2u);
    m.raise_msix(1);
    EXPECT_EQ(m.calls[1], 1u);
    EXPECT_EQ(m.entry(2, 12), 1u) << "what is not in use stays masked";
}

TEST(PciMsix, MaskAndUnmask) {
    Machine m;
    m.add_msix(2);
    pci::Interrupts interrupts(m.device(), m.controller, m.mapper);
    EXPECT_FALSE(interrupts.mask(0)) << "nothing is attached";
    EXPECT_TRUE(interrupts.attach(m.uses(2)));
    m.journal.clear();
    EXPECT_TRUE(interrupts.mask(1));
    EXPECT_TRUE(interrupts.unmask(1));
    EXPECT_FALSE(interrupts.mask(2));
    EXPECT_EQ(m.journal, (Journal{"t201c=1", "t201c=0"}));
}

// The table and the pending bits must lie in their BARs, to the byte.
TEST(PciMsix, BoundsOfTheTable) {
    const auto attach = [](u32 entries, u32 table_at, u32 pending_at) {
        Machine m;
        m.add_msix(entries, table_at, pending_at);
        pci::Interrupts interrupts(m.device(), m.controller, m.mapper);
        const auto got = interrupts.attach(m.uses(1));
        EXPECT_EQ(m.controller.held.size(), got ? 1u : 0u);
        EXPECT_EQ(m.mapper.maps.size(), got ? 1u : 0u);
        return got ? Code{} : got.error().code;
    };
    EXPECT_EQ(attach(16, 0x3f00, 0), Code{});
    EXPECT_EQ(attach(17, 0x3f00, 0), Code::protocol);
    EXPECT_EQ(attach(16, 0x3f08, 0), Code::protocol);
    EXPECT_EQ(attach(2048, 0x0, 0x3ff8), Code::protocol);
    EXPECT_EQ(attach(64, 0x0, 0x3ff8), Code{});
    EXPECT_EQ(attach(65, 0x0, 0x3ff8), Code::protocol);
    EXPECT_EQ(attach(1, 0x0, 0x4000), Code::protocol);
    EXPECT_EQ(attach(1, 0xfffffff8, 0), Code::protocol);
}

TEST(PciMsix, ABarThatCannotHoldTheTable) {
    for (const u32 bar : {0u, 1u, 5u, 6u, 7u}) { // not implemented, I/O ports, upper half, reserved
        Machine m;
        m.add_msix(2, 0x2000, 0x3000, bar);
        m.f.set32(0x14, 0xc041);
        m.f.bar_mask[1] = 0xfff0;
        pci::Interrupts interrupts(m.device(), m.controller, m.mapper);
        EXPECT_FALSE(interrupts.attach(m.uses(1))) << bar;
        m.add_line();
        EXPECT_EQ(*interrupts.attach(m.uses(1)), 1u) << "the line is there still";
        EXPECT_EQ(interrupts.kind(), InterruptKind::line);
    }
}

TEST(PciMsi, OneMessageOfEachForm) {
    struct Form {
        u16 control;
        Journal expected;
    };
    const Form forms[] = {
        {0x0000, {"c72=0", "c74=fee02000", "c78=30", "c4=400", "c72=1"}},
        {0x0080, {"c72=80", "c74=fee02000", "c78=1", "c7c=30", "c4=400", "c72=81"}},
        {0x0100, {"c72=100", "c7c=ffffffff", "c74=fee02000", "c78=30", "c4=400", "c72=101", "c7c=fffffffe"}},
        {0x0180, {"c72=180", "c80=ffffffff", "c74=fee02000", "c78=1", "c7c=30", "c4=400", "c72=181", "c80=fffffffe"}},
    };
    for (const Form& form : forms) {
        Machine m;
        m.add_msi(form.control);
        m.f.set32(0x74, 0x11111110);
        m.f.set32(0x78, 0x22222222);
        m.f.set32(0x7c, 0x33333333);
        m.f.set32(0x80, 0x44444444);
        m.controller.address = (form.control & 0x80) != 0 ? 0x1'fee00000 : 0xfee00000;
        const auto config = m.f.bytes;
        pci::Interrupts interrupts(m.device(), m.controller, m.mapper);
        EXPECT_EQ(*interrupts.attach(m.uses(3, 2)), 1u);
        EXPECT_EQ(interrupts.kind(), InterruptKind::msi);
        EXPECT_EQ(m.journal, form.expected);
        m.raise_msi(0);
        EXPECT_EQ(m.calls[0], 1u);
        m.journal.clear();
        EXPECT_EQ(interrupts.mask(0), (form.control & 0x100) != 0);
        EXPECT_EQ(interrupts.unmask(0), (form.control & 0x100) != 0);
        if ((form.control & 0x100) != 0) {
            const std::string at = (form.control & 0x80) != 0 ? "c80=" : "c7c=";
            EXPECT_EQ(m.journal, (Journal{at + "ffffffff", at + "fffffffe"}));
        }
        m.controller.detaching = [&] { EXPECT_FALSE(m.f.get16(0x72) & 1) << "detached while it can still write"; };
        interrupts.detach();
        EXPECT_EQ(m.f.bytes, config);
        EXPECT_EQ(m.controller.held.size(), 0u);
    }
}

TEST(PciMsi, SeveralMessagesAreAnAlignedRun) {
    Machine m;
    m.add_msi(0x008a); // 64 bits, 32 messages
    m.controller.taken = {{1, 0x30}, {1, 0x33}, {1, 0x39}};
    pci::Interrupts interrupts(m.device(), m.controller, m.mapper);
    EXPECT_EQ(*interrupts.attach(m.uses(6, 1)), 4u) << "a power of two";
    EXPECT_EQ(m.f.get16(0x7c), 0x34u) << "0x31 and 0x32 are no beginning, 0x33 is taken";
    EXPECT_EQ(m.f.get16(0x72) >> 4 & 7, 2);
    EXPECT_EQ(m.controller.held.size(), 4u) << "what was in no run is given back";
    for (u32 i = 0; i < 4; ++i) {
        m.raise_msi(i);
        EXPECT_EQ(m.calls[i], 1u) << i;
        EXPECT_EQ(m.controller.held[i].processor, 1u) << "one address, one processor";
    }
    interrupts.detach();
    EXPECT_EQ(m.controller.held.size(), 0u);
    EXPECT_EQ(*interrupts.attach(m.uses(40, 0, false)), 32u) << "all that MSI can have";
    EXPECT_EQ(m.f.get16(0x7c) % 32, 0);
    m.raise_msi(31);
    EXPECT_EQ(m.calls[31], 1u);
    interrupts.detach();

    m.controller.taken.insert({2, 0x31}); // in the middle of the first aligned run
    EXPECT_EQ(*interrupts.attach(m.uses(4, 2)), 4u);
    EXPECT_EQ(m.f.get16(0x7c), 0x34u);
    interrupts.detach();

    m.controller.last = 0x39; // of processor 1: 0x31, 0x32, 0x34 to 0x38
    EXPECT_EQ(*interrupts.attach(m.uses(8, 1)), 4u) << "there are 7 vectors, and no 8 in a run";
    interrupts.detach();
    EXPECT_EQ(interrupts.attach(m.uses(8, 1), 8).error().code, Code::exhausted);
    EXPECT_EQ(m.controller.held.size(), 0u);
    m.controller.last = 0x2f;
    EXPECT_EQ(interrupts.attach(m.uses(8, 1)).error().code, Code::exhausted);
}

TEST(PciMsi, WhatDoesNotFitOrIsReserved) {
    Machine narrow;
    narrow.add_msi(0);
    narrow.controller.address = 0x1'fee00000;
    pci::Interrupts interrupts(narrow.device(), narrow.controller, narrow.mapper);
    EXPECT_EQ(interrupts.attach(narrow.uses(1)).error().code, Code::not_supported);
    EXPECT_EQ(narrow.controller.held.size(), 0u);
    EXPECT_EQ(narrow.journal, Journal{});
    narrow.controller.processors = 1;
    EXPECT_EQ(interrupts.attach(narrow.uses(1, 1)).error().code, Code::bad_argument) << "no such processor";

    Machine reserved;
    reserved.add_msi(6 << 1);
    pci::Interrupts wrong(reserved.device(), reserved.controller, reserved.mapper);
    EXPECT_EQ(wrong.attach(reserved.uses(1)).error().code, Code::protocol);
}

TEST(PciMsi, IsSecondToMsixAndFirstToTheLine) {
    Machine m;
    m.add_line();
    m.add_msi(0x0080);
    EXPECT_EQ(pci::interrupts_of(m.device()).kind, InterruptKind::msi);
    m.f.set16(0x72, 0x0086);
    EXPECT_EQ(pci::interrupts_of(m.device()).count, 8u);
    pci::Interrupts interrupts(m.device(), m.controller, m.mapper);
    EXPECT_TRUE(interrupts.attach(m.uses(1)));
    EXPECT_EQ(interrupts.kind(), InterruptKind::msi);
    EXPECT_FALSE(m.controller.line_attached);
    interrupts.detach();
    m.add_msix(5);
    EXPECT_EQ(pci::interrupts_of(m.device()).kind, InterruptKind::msix);
    EXPECT_EQ(pci::interrupts_of(m.device()).count, 5u);
    EXPECT_TRUE(interrupts.attach(m.uses(1)));
    EXPECT_EQ(interrupts.kind(), InterruptKind::msix);
    for (const InterruptKind best : {InterruptKind::msi, InterruptKind::line}) {
        interrupts.detach();
        EXPECT_TRUE(interrupts.attach(m.uses(1), 1, best));
        EXPECT_EQ(interrupts.kind(), best);
    }
}

TEST(PciLine, IsTheLastResort) {
    Machine m;
    pci::Interrupts interrupts(m.device(), m.controller, m.mapper);
    EXPECT_EQ(pci::interrupts_of(m.device()).kind, InterruptKind::none);
    EXPECT_EQ(interrupts.attach(m.uses(1)).error().code, Code::not_supported) << "no pin";
    m.add_line(1, 0xff);
    EXPECT_EQ(interrupts.attach(m.uses(1)).error().code, Code::not_supported) << "routed nowhere";
    m.add_line(2, 10);
    m.f.set16(4, 0x0400); // INTx is off
    EXPECT_EQ(interrupts.attach(m.uses(2), 2).error().code, Code::exhausted);
    EXPECT_EQ(*interrupts.attach(m.uses(2, 3)), 1u);
    EXPECT_EQ(interrupts.kind(), InterruptKind::line);
    EXPECT_EQ(m.controller.line.gsi, 10u);
    EXPECT_TRUE(m.controller.line.level && m.controller.line.active_low && !m.controller.line.isa);
    EXPECT_EQ(m.controller.line_processor, 3u);
    EXPECT_EQ(m.f.get16(4), 0u) << "INTx is on";
    EXPECT_TRUE(interrupts.mask(0));
    EXPECT_EQ(m.f.get16(4), 0x400u);
    EXPECT_TRUE(interrupts.unmask(0));
    EXPECT_EQ(m.f.get16(4), 0u);
    m.controller.detaching = [&] { EXPECT_EQ(m.f.get16(4), 0x400u) << "still raised when its handler has gone"; };
    interrupts.detach();
    EXPECT_FALSE(m.controller.line_attached);
    EXPECT_EQ(m.f.get16(4), 0x400u);
}

} // namespace
