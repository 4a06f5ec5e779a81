// The test host's devices, driven through their ports like by a guest.
#include "gtest_macros.hpp"
#include "unit/host/vmm_support.hpp"
#include <linux/kvm.h>
import test.gtest;
import host.std;
import core.result;
import vmm.board;
import vmm.cpuid;
import vmm.ide;
import vmm.image;
import vmm.memory;
import vmm.pci;
import vmm.ports;
import vmm.serial;

namespace {
using namespace fl;
using Bytes = std::vector<std::uint8_t>;

struct Line final : vmm::IrqLine {
    void set(bool to) override {
        level = to;
        rises += to ? 1 : 0;
    }
    bool level = false;
    int rises = 0;
};

struct Sink final : vmm::SerialSink {
    void put(char byte) override { text += byte; }
    std::string text;
};

// ---- serial ----

struct SerialTest : testing::Test {
    Line line;
    Sink sink;
    vmm::Serial port{0x3f8, sink, line};
    void out(u16 at, u32 v) { port.out(static_cast<u16>(0x3f8 + at), 1, v); }
    u32 in(u16 at) { return port.in(static_cast<u16>(0x3f8 + at), 1); }
};

TEST_F(SerialTest, WritesAndIsAlwaysReady) {
    EXPECT_EQ(in(5) & 0x60, 0x60u);
    out(0, 'a');
    out(0, 'b');
    EXPECT_EQ(sink.text, "ab");
    EXPECT_EQ(in(5) & 0x60, 0x60u);
    EXPECT_EQ(line.rises, 0);
}

TEST_F(SerialTest, TheDivisorIsNotData) {
    out(3, 0x83);
    out(0, 1);
    out(1, 2);
    EXPECT_EQ(in(0), 1u);
    EXPECT_EQ(in(1), 2u);
    out(3, 0x03);
    EXPECT_EQ(sink.text, "");
    EXPECT_EQ(in(1), 0u);
}

TEST_F(SerialTest, TransmitterInterruptIsTakenBackByReadingItsReason) {
    out(4, 0x08);
    out(1, 0x02);
    EXPECT_TRUE(line.level);
    EXPECT_EQ(in(2) & 0x0f, 0x02u);
    EXPECT_FALSE(line.level);
    EXPECT_EQ(in(2) & 0x0f, 0x01u);
    out(0, 'x');
    EXPECT_TRUE(line.level);
    out(1, 0);
    EXPECT_FALSE(line.level);
}

TEST_F(SerialTest, ReceivesUpToSixteen) {
    out(4, 0x08);
    out(1, 0x01);
    for (int i = 0; i < 16; ++i) {
        EXPECT_TRUE(port.receive(static_cast<char>('a' + i)));
    }
    EXPECT_FALSE(port.receive('z'));
    EXPECT_TRUE(line.level);
    EXPECT_EQ(in(2) & 0x0f, 0x04u);
    for (u32 i = 0; i < 16; ++i) {
        EXPECT_EQ(in(5) & 1, 1u);
        EXPECT_EQ(in(0), 'a' + i);
    }
    EXPECT_EQ(in(5) & 1, 0u);
    EXPECT_FALSE(line.level);
}

TEST_F(SerialTest, LoopsBack) {
    out(4, 0x1b);
    EXPECT_EQ(in(6) & 0xf0, 0xb0u); // DTR, RTS, OUT2 are looped back as DSR, CTS, DCD
    out(0, 0x42);
    EXPECT_EQ(sink.text, "");
    EXPECT_EQ(in(0), 0x42u);
    out(4, 0x14);
    EXPECT_EQ(in(6) & 0xf0, 0x40u); // OUT1 as RI
}

TEST_F(SerialTest, IsASixteenFiftyA) {
    out(7, 0x5a);
    EXPECT_EQ(in(7), 0x5au);
    EXPECT_EQ(in(2) & 0xc0, 0u);
    out(2, 0x01);
    EXPECT_EQ(in(2) & 0xc0, 0xc0u);
}

// ---- board ----

struct Control final : vmm::MachineControl {
    void debug_exit(u32 v) override { events.push_back("exit " + std::to_string(v)); }
    void power_off() override { events.push_back("off"); }
    void reset(std::string_view how) override { events.push_back("reset " + std::string(how)); }
    void phase(u32 n) override { events.push_back("phase " + std::to_string(n)); }
    std::vector<std::string> events;
};

struct Clock final : vmm::BoardClock {
    u64 nanoseconds() override { return now; }
    u64 unix_seconds() override { return day; }
    u64 now = 0;
    u64 day = 0;
};

TEST(HostBoard, EndsTheMachine) {
    Control control;
    Clock clock;
    vmm::Exits exits(control);
    vmm::PowerManagement power(control, clock);
    exits.out(0xf4, 4, 0x10);
    exits.out(0x5f0, 4, 7);
    exits.out(0x5f0, 1, 8);
    exits.out(0x5f0, 2, 9); // neither 32 bits nor 8
    exits.out(0x5f1, 1, 9); // only part of the port
    exits.out(0x64, 1, 0xfe);
    exits.out(0x64, 1, 0xd1); // another command of the keyboard controller
    exits.out(0xcf9, 1, 0x02);
    exits.out(0xcf9, 1, 0x06);
    power.out(0x604, 2, 5 << 10); // sleep type without enable
    power.out(0x604, 2, 1 << 13); // type 0
    power.out(0x604, 2, 1 << 13 | 5 << 10);
    EXPECT_EQ(control.events, (std::vector<std::string>{"exit 16", "phase 7", "phase 8", "reset keyboard controller",
                                                        "reset port 0xcf9", "off"}));
}

TEST(HostBoard, TheTimerCountsItsFrequency) {
    Control control;
    Clock clock;
    vmm::PowerManagement power(control, clock);
    EXPECT_EQ(power.in(0x604, 2) & 1, 1u); // ACPI is enabled
    EXPECT_EQ(power.in(0x608, 4), 0u);
    clock.now = 1'000'000'000;
    EXPECT_EQ(power.in(0x608, 4), 3'579'545u);
    clock.now = 10'000'000'000'000; // beyond 32 bits
    EXPECT_EQ(power.in(0x608, 4), static_cast<u32>(35'795'450'000));
}

TEST(HostBoard, TheClockShowsTheDate) {
    Clock clock;
    clock.day = 1'709'210'096; // 2024-02-29 12:34:56, a Thursday
    vmm::RealTimeClock rtc(clock);
    const auto at = [&](u32 index) {
        rtc.out(0x70, 1, index);
        return rtc.in(0x71, 1);
    };
    EXPECT_EQ(at(0), 0x56u);
    EXPECT_EQ(at(2), 0x34u);
    EXPECT_EQ(at(4), 0x12u);
    EXPECT_EQ(at(6), 5u);
    EXPECT_EQ(at(7), 0x29u);
    EXPECT_EQ(at(8), 0x02u);
    EXPECT_EQ(at(9), 0x24u);
    EXPECT_EQ(at(0x32), 0x20u);
    EXPECT_EQ(at(0x0a) & 0x80, 0u);
    EXPECT_EQ(at(0x0d), 0x80u);
}

TEST(HostPorts, FindTheirDevice) {
    Control control;
    vmm::Exits exits(control);
    vmm::PortBus bus;
    ASSERT_TRUE(bus.claim(0xf4, 4, exits, "exit").has_value());
    EXPECT_FALSE(bus.claim(0xf7, 1, exits, "again").has_value());
    EXPECT_EQ(bus.in(0x80, 1), 0xffu);
    EXPECT_EQ(bus.in(0x80, 4), 0xffff'ffffu);
    bus.out(0xf4, 4, 1);
    EXPECT_EQ(control.events.size(), 1u);
    std::vector<std::pair<std::string, u64>> counts;
    bus.each([&](std::string_view name, u64 count) { counts.emplace_back(name, count); });
    EXPECT_EQ(counts, (std::vector<std::pair<std::string, u64>>{{"exit", 1}, {"unclaimed", 2}}));
}

// ---- CPUID ----

kvm_cpuid_entry2 leaf(u32 function, u32 eax, u32 ebx = 0, u32 ecx = 0, u32 edx = 0) {
    kvm_cpuid_entry2 entry{};
    entry.function = function;
    entry.eax = eax;
    entry.ebx = ebx;
    entry.ecx = ecx;
    entry.edx = edx;
    return entry;
}

const kvm_cpuid_entry2* find(const std::vector<kvm_cpuid_entry2>& table, u32 function, u32 index = 0) {
    const auto found = std::find_if(table.begin(), table.end(),
                                    [&](const auto& e) { return e.function == function && e.index == index; });
    return found == table.end() ? nullptr : &*found;
}

const std::vector<kvm_cpuid_entry2> basic{
    leaf(1, 0xa20f10, 0x0800),      leaf(0xb, 0),         leaf(0x4000'0000, 0x4000'0001, 0x4b4d564b),
    leaf(0x4000'0001, 0x0100'7efb), leaf(0x8000'0008, 0),
};
const std::vector<kvm_cpuid_entry2> hyperv{
    leaf(0x4000'0000, 0x4000'0082), leaf(0x4000'0001, 0x31237648),
    leaf(0x4000'0002, 1),           leaf(0x4000'0003, 0x2fff, 0xffff),
    leaf(0x4000'0004, 0x7fff),      leaf(0x4000'0005, 0xffff'ffff),
    leaf(0x4000'0006, 0),           leaf(0x4000'000a, 0),
    leaf(0x4000'0080, 0),
};

TEST(HostCpuid, HyperVAloneAtTheFirstBase) {
    const auto table = vmm::processor_cpuid(basic, hyperv, {.processors = 3}, 2);
    const auto* const base = find(table, 0x4000'0000);
    ASSERT_NE(base, nullptr);
    EXPECT_EQ(base->eax, 0x4000'0006u);
    EXPECT_EQ(base->ebx, 0x7263694du);  // "Micr"
    EXPECT_EQ(base->edx, 0x7648'2074u); // "t Hv"
    EXPECT_EQ(find(table, 0x4000'0001)->eax, 0x3123'7648u);
    EXPECT_EQ(find(table, 0x4000'0003)->eax & 1u << 13, 0u);
    EXPECT_EQ(find(table, 0x4000'0005)->eax, 3u);
    EXPECT_EQ(find(table, 0x4000'000a), nullptr);
    EXPECT_EQ(find(table, 0x4000'0100), nullptr);
    EXPECT_EQ(std::count_if(table.begin(), table.end(), [](const auto& e) { return e.function == 0x4000'0001; }), 1);
    EXPECT_EQ(find(table, 1)->ebx >> 24, 2u);
    EXPECT_EQ(find(table, 1)->ebx >> 16 & 0xff, 3u);
    EXPECT_NE(find(table, 1)->ecx & 1u << 31, 0u);
    EXPECT_EQ(find(table, 0xb, 0)->edx, 2u);
    EXPECT_EQ(find(table, 0xb, 1)->eax, 2u); // three processors need two bits
    EXPECT_EQ(find(table, 0xb, 1)->ebx, 3u);
}

TEST(HostCpuid, BesideAndAboveOthers) {
    const auto both = vmm::processor_cpuid(basic, hyperv, {.kvm_leaves = true}, 0);
    EXPECT_EQ(find(both, 0x4000'0100)->ebx, 0x4b4d'564bu); // "KVMK"
    EXPECT_EQ(find(both, 0x4000'0101)->eax, 0x0100'7efbu);
    const auto above = vmm::processor_cpuid(basic, hyperv, {.hyperv_base = 0x4000'0200}, 0);
    EXPECT_EQ(find(above, 0x4000'0000)->eax, 0x4000'0000u);
    EXPECT_EQ(find(above, 0x4000'0200)->eax, 0x4000'0206u);
    EXPECT_EQ(find(above, 0x4000'0203)->ebx, 0xffffu & ~(1u << 11));
    EXPECT_EQ(find(above, 0x4000'0003), nullptr);
    const auto openvmm = vmm::processor_cpuid(basic, hyperv, {.openvmm = true}, 0);
    EXPECT_EQ(find(openvmm, 0x4000'0000)->eax, 0x4000'0005u);
    EXPECT_EQ(find(openvmm, 0x4000'0001)->eax, 0x3123'7648u);
    EXPECT_EQ(find(openvmm, 0x4000'0003)->eax, 0x87fu);
    EXPECT_EQ(find(openvmm, 0x4000'0003)->ebx, 0u);
    EXPECT_EQ(find(openvmm, 0x4000'0004)->eax, 0x200u);
    EXPECT_EQ(find(openvmm, 0x4000'0006), nullptr);
    const auto none = vmm::processor_cpuid(basic, hyperv, {.hyperv = false}, 0);
    EXPECT_EQ(find(none, 0x4000'0000), nullptr);
}

// ---- PCI and IDE ----

TEST(HostPci, ShowsTheIdeFunctionOnlyWithDisks) {
    Control control;
    vmm::Exits exits(control);
    vmm::PciHost pci(exits);
    const auto read = [&](u32 device, u32 function, u32 offset) {
        pci.out(0xcf8, 4, 0x8000'0000 | device << 11 | function << 8 | offset);
        return pci.in(0xcfc, 4);
    };
    EXPECT_EQ(read(0, 0, 0), 0x1237'8086u);
    EXPECT_EQ(read(1, 1, 0), 0xffff'ffffu);
    pci.add_ide();
    EXPECT_EQ(read(1, 1, 0), 0x7010'8086u);
    EXPECT_EQ(read(1, 1, 8) >> 8, 0x01'0180u);
    EXPECT_EQ(read(1, 0, 0xc) >> 16 & 0x80, 0x80u);
    EXPECT_EQ(read(1, 1, 0x20), 0xc001u);
    pci.out(0xcfc, 4, 0xffff'ffff); // sizing
    EXPECT_EQ(pci.in(0xcfc, 4), 0xfff1u);
    pci.out(0xcfc, 4, 0xc001);
    EXPECT_EQ(pci.in(0xcfe, 2), 0u);
    read(1, 1, 4);
    pci.out(0xcfc, 2, 0); // bus master and I/O off
    EXPECT_EQ(pci.in(0xcfc, 2), 0u);
    pci.out(0xcf8, 4, 0); // disabled
    EXPECT_EQ(pci.in(0xcfc, 4), 0xffff'ffffu);
    pci.out(0xcf9, 1, 6);
    EXPECT_EQ(control.events, std::vector<std::string>{"reset port 0xcf9"});
}

struct IdeTest : testing::Test {
    static constexpr u32 sectors = 300;
    static Bytes pattern() {
        Bytes bytes(sectors * 512);
        for (usize i = 0; i < bytes.size(); ++i) {
            bytes[i] = static_cast<std::uint8_t>(i / 512 * 7 + i % 512);
        }
        return bytes;
    }
    Line line;
    vmm_test::File file{pattern()};
    std::unique_ptr<vmm::Image> image = *vmm::Image::open(file.path, false);
    vmm::GuestMemory memory = *vmm::GuestMemory::create(1 << 20);
    vmm::IdeChannel channel{vmm::IdeChannel::compatible[0], memory, line};

    void SetUp() override { channel.attach(0, *image); }
    void out(u16 port, u32 v, unsigned size = 1) { channel.out(port, size, v); }
    u32 in(u16 port, unsigned size = 1) { return channel.in(port, size); }
    /// Table at 0x1000: (address, bytes)…; the last entry is marked.
    void table(const std::vector<std::pair<u32, u32>>& regions, bool mark = true) {
        u64 at = 0x1000;
        for (const auto& [address, bytes] : regions) {
            memory.put<u32>(at, address);
            memory.put<u32>(at + 4,
                            (bytes & 0xffff) | (mark && at == 0x1000 + 8 * (regions.size() - 1) ? 1u << 31 : 0));
            at += 8;
        }
        out(0xc004, 0x1000, 4);
    }
    /// A 28-bit DMA command, as issued by drivers; returns the status read by the interrupt handler.
    u32 transfer(u8 command, u32 lba, u32 count, bool to_memory) {
        out(0xc000, to_memory ? 8 : 0);
        out(0xc002, 6);
        out(0x1f2, count & 0xff);
        out(0x1f3, lba & 0xff);
        out(0x1f4, lba >> 8 & 0xff);
        out(0x1f5, lba >> 16 & 0xff);
        out(0x1f6, 0xe0 | (lba >> 24 & 0xf));
        out(0x1f7, command);
        out(0xc000, to_memory ? 9 : 1);
        const u32 status = in(0x1f7);
        out(0xc000, 0);
        return status;
    }
};

TEST_F(IdeTest, Identifies) {
    out(0x1f6, 0xa0);
    out(0x1f7, 0xec);
    EXPECT_TRUE(line.level);
    EXPECT_EQ(in(0x3f6), 0x58u); // the alternate status register does not clear the interrupt
    EXPECT_TRUE(line.level);
    EXPECT_EQ(in(0x1f7), 0x58u);
    EXPECT_FALSE(line.level);
    std::array<u16, 256> words{};
    for (auto& word : words) {
        word = static_cast<u16>(in(0x1f0, 2));
    }
    EXPECT_EQ(in(0x1f7), 0x50u);
    EXPECT_EQ(words[60], sectors);
    EXPECT_EQ(words[100], sectors);
    EXPECT_EQ(words[49] & 0x0300, 0x0300);
    EXPECT_EQ(words[83] & 0x0400, 0x0400);
    EXPECT_EQ(words[27], 'F' << 8 | 'I');
}

TEST_F(IdeTest, ReadsIntoSeveralRegions) {
    table({{0x8000, 512}, {0xa000, 1024}});
    EXPECT_EQ(transfer(0xc8, 5, 3, true), 0x50u);
    EXPECT_EQ(line.rises, 1);
    EXPECT_EQ(in(0xc002) & 7, 4u); // interrupt, no error, not active
    const auto content = pattern();
    EXPECT_EQ(std::memcmp(memory.at(0x8000, 512).data(), content.data() + 5 * 512, 512), 0);
    EXPECT_EQ(std::memcmp(memory.at(0xa000, 1024).data(), content.data() + 6 * 512, 1024), 0);
}

TEST_F(IdeTest, WritesByWordsAnd48Bits) {
    std::memset(memory.at(0x8000, 65536).data(), 0xee, 65536);
    table({{0x8000, 65536}}); // count 0 in the table
    out(0xc000, 0);
    out(0x1f6, 0xe0);
    out(0x1f2, 0x0000, 2); // previous: count 0, LBA 31:24
    out(0x1f4, 0x0000, 2);
    out(0x1f2, 0x0a80, 2); // count 128, LBA 10
    out(0x1f4, 0x0000, 2);
    out(0x1f6, 0x35e0, 2); // device, WRITE DMA EXT
    out(0xc000, 1);
    EXPECT_EQ(in(0x1f7), 0x50u);
    out(0x1f7, 0xea);
    EXPECT_EQ(in(0x1f7), 0x50u);
    const auto content = file.content();
    EXPECT_EQ(content[10 * 512 - 1], pattern()[10 * 512 - 1]);
    EXPECT_EQ(content[10 * 512], 0xee);
    EXPECT_EQ(content[138 * 512 - 1], 0xee);
    EXPECT_EQ(content[138 * 512], pattern()[138 * 512]);
}

TEST_F(IdeTest, SaysWhatIsWrong) {
    table({{0x8000, 512}});
    EXPECT_EQ(transfer(0xc8, sectors, 1, true), 0x51u); // beyond the end
    EXPECT_EQ(in(0x1f1), 0x10u);
    EXPECT_EQ(transfer(0xc8, sectors - 1, 2, true), 0x51u);
    EXPECT_EQ(transfer(0xc8, 0, 2, true) & 1, 1u); // the table is too short
    EXPECT_EQ(in(0xc002) & 3, 2u);
    table({{0xffff'f000, 512}});
    EXPECT_EQ(transfer(0xc8, 0, 1, true) & 1, 1u); // no memory at that address
    out(0x1f7, 0x42);
    EXPECT_EQ(in(0x1f7), 0x51u);
    EXPECT_EQ(in(0x1f1), 0x04u); // aborted
    table({{0x8000, 1024}});
    EXPECT_EQ(transfer(0xc8, 0, 1, true), 0x50u); // longer than the transfer: allowed
}

TEST_F(IdeTest, ASecondDiskThatIsNotThereStaysSilent) {
    out(0x1f6, 0xb0);
    out(0x1f2, 0x55);
    EXPECT_EQ(in(0x1f2), 0u);
    EXPECT_EQ(in(0x1f7), 0u);
    out(0x1f7, 0xec);
    EXPECT_EQ(line.rises, 0);
    EXPECT_EQ(channel.commands(0) + channel.commands(1) + channel.resets(), 0u);
    out(0x1f6, 0xa0);
    out(0x1f7, 0xec);
    EXPECT_EQ(channel.commands(0), 1u);
}

TEST_F(IdeTest, MasksItsInterruptAndResets) {
    out(0x3f6, 0x02);
    out(0x1f6, 0xe0);
    out(0x1f7, 0xea);
    EXPECT_FALSE(line.level);
    out(0x3f6, 0x00);
    EXPECT_TRUE(line.level);
    out(0x3f6, 0x04);
    out(0x3f6, 0x00);
    EXPECT_FALSE(line.level);
    EXPECT_EQ(in(0x1f2), 1u); // the signature of a disk
    EXPECT_EQ(in(0x1f3), 1u);
    EXPECT_EQ(in(0x1f4), 0u);
    EXPECT_EQ(in(0x1f7), 0x50u);
}

TEST(HostImage, NeedsWholeSectors) {
    const vmm_test::File odd(Bytes(700));
    EXPECT_FALSE(vmm::Image::open(odd.path, false).has_value());
    EXPECT_FALSE(vmm::Image::open("/nonexistent", false).has_value());
    const vmm_test::File good(Bytes(1024, 1));
    auto image = *vmm::Image::open(good.path, true);
    EXPECT_TRUE(image->read_only());
    image->bytes()[0] = std::byte{9}; // lost
    EXPECT_TRUE(image->flush());
    EXPECT_EQ(good.content()[0], 1);
}

} // namespace
