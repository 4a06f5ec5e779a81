// Machines with different shutdown methods, set up like the VMMs in docs/INTERFACES.md: how each verdict ends on them,
// what is visible from outside, and that no method starts before the previous one's bound has passed.
#include "gtest_macros.hpp"
#include "unit/core/physical_fake.hpp"
import test.gtest;
import host.std;
import core.acpi;
import core.cpuid;
import core.physical;
import core.time;
import core.verdict;
import hv.backend;
import hv.detect;
import boot.ending;

namespace {
using namespace fl;
using boot::Ending;
using boot::EndMachine;
using Bytes = std::vector<std::uint8_t>;

constexpr std::array verdicts{Verdict::success, Verdict::skip, Verdict::error, Verdict::failure, Verdict::crash};

void put(Bytes& to, usize at, u64 value, usize size) {
    if (to.size() < at + size) {
        to.resize(at + size);
    }
    for (usize i = 0; i < size; ++i) {
        to[at + i] = static_cast<std::uint8_t>(value >> (8 * i));
    }
}

void checksum(Bytes& table, usize at, usize size) {
    unsigned sum = 0;
    for (usize i = 0; i < size; ++i) {
        sum += table[i];
    }
    table[at] = static_cast<std::uint8_t>(0 - sum);
}

Bytes table(std::string_view signature, const Bytes& body) {
    Bytes t(signature.begin(), signature.end());
    t.resize(36);
    t.insert(t.end(), body.begin(), body.end());
    put(t, 4, t.size(), 4);
    checksum(t, 9, t.size());
    return t;
}

// Name (\_S5, Package (4) {5, 5, 0, 0}): Cloud Hypervisor's; QEMU's pc has zeroes.
const Bytes s5_of_5{0x08, '_', 'S', '5', '_', 0x12, 0x08, 0x04, 0x0a, 0x05, 0x0a, 0x05, 0x00, 0x00};
const Bytes s5_of_0{0x08, '_', 'S', '5', '_', 0x12, 0x06, 0x04, 0x00, 0x00, 0x00, 0x00};
// QEMU's pvpanic device: _HID, and its ports in _CRS.
const Bytes pvpanic_aml{0x5b, 0x82, 0x40, 0x05, 'P',  'E',  'V',  'T',  0x08, '_',  'H',  'I',  'D',  0x0d,
                        'Q',  'E',  'M',  'U',  '0',  '0',  '0',  '1',  0x00, 0x08, '_',  'C',  'R',  'S',
                        0x11, 0x0d, 0x0a, 0x0a, 0x47, 0x01, 0x05, 0x05, 0x05, 0x05, 0x01, 0x01, 0x79, 0x00};

struct Fake : EndMachine, hv::Privileged, PhysicalReader, Pieces {
    // The machine's facilities.
    bool exit_port = false;
    bool exit_takes_time = false; // ends from another thread, like newer QEMUs
    bool others_at_once = false;  // every other method ends the machine within the access
    bool i8042 = true;            // and its reset ends the VMM: Firecracker, QEMU -no-reboot
    Nanoseconds host_needs = 5'000'000;
    std::string_view hypervisor = "KVMKVMKVM";
    u32 hyperv_features = 0;   // EDX
    u32 hyperv_privileges = 0; // EAX
    bool rsdp_known = true;

    // Observations.
    std::string ended;   // how; empty: not yet
    std::string pending; // how the host will end it soon
    Nanoseconds now = 0;
    Nanoseconds pending_at = 0;
    std::vector<std::string> reports; // reports to the host that do not end the machine
    std::map<u16, u32> accesses;      // ports
    std::map<u32, u64> msrs;
    std::optional<Verdict> note;
    CpuidSnapshot snapshot;
    int resets = 0;

    virtual ~Fake() = default;

    void schedule_end(const std::string& how) {
        if (others_at_once && !how.starts_with("exit")) {
            ended = ended.empty() ? how : ended;
        } else if (pending.empty()) {
            pending = how;
            pending_at = now + host_needs;
        }
    }
    void wait(Nanoseconds length) override {
        now += length;
        if (!pending.empty() && ended.empty() && now >= pending_at) {
            ended = pending;
        }
    }
    const CpuidSnapshot& cpuid() override {
        snapshot = {};
        scan_cpuid(snapshot, [&](u32 leaf, u32) {
            CpuidRegisters r{};
            if (leaf == 0) {
                r = {1, 0x756e6547, 0x6c65746e, 0x49656e69};
            } else if (leaf == 0x40000000 && !hypervisor.empty()) {
                std::array<char, 12> name{};
                std::copy(hypervisor.begin(), hypervisor.end(), name.begin());
                r.eax = 0x40000006;
                std::memcpy(&r.ebx, name.data(), 4);
                std::memcpy(&r.ecx, name.data() + 4, 4);
                std::memcpy(&r.edx, name.data() + 8, 4);
            } else if (leaf == 0x40000001 && hypervisor == "Microsoft Hv") {
                r.eax = 0x31237648;
            } else if (leaf == 0x40000003) {
                r.eax = hyperv_privileges;
                r.edx = hyperv_features;
            }
            return r;
        });
        return snapshot;
    }
    PhysicalReader& memory() override { return *this; }
    bool read(u64 address, std::span<std::byte> into) override { return copy(address, into.data(), into.size()); }
    u64 rsdp() override { return rsdp_known ? 0xa0000 : 0; }
    const acpi::Tables* tables() override { return nullptr; }
    void write_memory(u64 physical, u8 value) override {
        if (physical == sleep_register && value == sleep_value) {
            schedule_end("off");
        } else if (physical == reset_register && value == 0x42) {
            ++resets;
            schedule_end("reset");
        }
    }
    void xen_shutdown(u32 reason) override {
        ended = hypervisor == "XenVMMXenVMM" ? "xen " + std::to_string(reason) : "a hypercall without a Xen";
    }
    Text reason() override { return {0x1234000, 17}; }
    void note_restart(Verdict verdict) override { note = verdict; }
    void triple_fault() override { ended = "triple fault"; }

    u64 read_msr(u32 msr) override { return msrs[msr]; }
    void write_msr(u32 msr, u64 value) override {
        msrs[msr] = value;
        if (msr == 0x40000105) {
            reports.push_back("crash registers");
        } else if (msr == 0x40000003) {
            ++resets;
            schedule_end("reset");
        }
    }
    u8 in8(u16 port) override {
        ++accesses[port];
        return port == 0x64 && i8042 ? 0x1c : 0xff;
    }
    u16 in16(u16 port) override {
        ++accesses[port];
        return port == pm1a ? pm1a_value : 0xffff;
    }
    u32 in32(u16 port) override {
        ++accesses[port];
        return ~0u;
    }
    void out8(u16 port, u8 value) override {
        ++accesses[port];
        if (port == 0x64 && value == 0xfe && i8042) {
            ++resets;
            schedule_end("reset");
        } else if (port == 0x505 && value == 1) {
            reports.push_back("pvpanic");
        } else if (port == 0xb2 && value == 0xf1) {
            pm1a_value |= 1;
        } else if (port == sleep_register && value == sleep_value) {
            schedule_end("off");
        } else if (port == reset_register && value == 0x42) {
            ++resets;
            schedule_end("reset");
        }
    }
    void out16(u16 port, u16 value) override {
        ++accesses[port];
        if (port == pm1a && (value & 0x3c00) == (u32{sleep_type} << 10 | 0x2000)) {
            EXPECT_NE(pm1a_value & 1, 0) << "ACPI's mode was not enabled";
            schedule_end("off");
        }
    }
    CpuidRegisters cpuid_leaf(u32) override { return {}; }
    void out32(u16 port, u32 value) override {
        ++accesses[port];
        if (port == 0xf4 && exit_port) {
            if (exit_takes_time) {
                schedule_end("exit " + std::to_string(value));
            } else {
                ended = "exit " + std::to_string(value);
            }
        }
    }

    u64 sleep_register = 0;
    u8 sleep_value = 0;
    u64 reset_register = 0;
    u16 pm1a = 0;
    u16 pm1a_value = 0;
    u8 sleep_type = 0;

    // A FADT with these settings, a DSDT with this content, and the path to them from the RSDP.
    void acpi_tables(bool reduced, const Bytes& aml, acpi::Space space, const Bytes& ssdt = {}) {
        Bytes f(268 - 36);
        put(f, 140 - 36, 0x20000, 8);
        put(f, 112 - 36, (reduced ? u64{1} << 20 : 0) | (reset_register != 0 ? 1u << 10 : 0), 4);
        if (pm1a != 0) {
            put(f, 48 - 36, 0xb2, 4);
            put(f, 52 - 36, 0xf1, 1);
            put(f, 64 - 36, pm1a, 4);
        }
        put(f, 116 - 36, to_underlying(space), 1);
        put(f, 120 - 36, reset_register, 8);
        put(f, 128 - 36, 0x42, 1);
        put(f, 244 - 36, to_underlying(space), 1);
        put(f, 248 - 36, sleep_register, 8);
        Pieces::put(0x20000, table("DSDT", aml));
        Pieces::put(0x21000, table("FACP", f));
        Bytes list;
        ::put(list, 0, 0x21000, 8);
        if (!ssdt.empty()) {
            Pieces::put(0x23000, table("SSDT", ssdt));
            ::put(list, 8, 0x23000, 8);
        }
        Pieces::put(0x22000, table("XSDT", list));
        Bytes r{'R', 'S', 'D', ' ', 'P', 'T', 'R', ' '};
        ::put(r, 15, 2, 1);
        ::put(r, 20, 36, 4);
        ::put(r, 24, 0x22000, 8);
        ::put(r, 35, 0, 1);
        checksum(r, 8, 20);
        checksum(r, 32, 36);
        Pieces::put(rsdp_known ? 0xa0000 : 0xe0000, r);
        if (!rsdp_known) {
            r.resize(0x20000);
            Pieces::put(0xe0000, r);
        }
    }
    static void put(Bytes& to, usize at, u64 value, usize size) { ::put(to, at, value, size); }

    std::string end(Verdict verdict, bool restart = false) {
        Ending ending;
        if (restart) {
            ending.request_restart();
        }
        for (int i = 0; i < 100 && ended.empty() && ending.step(*this, *this, verdict); ++i) {
        }
        return ended;
    }
};

Fake qemu_pc() {
    Fake m;
    m.pm1a = 0x604;
    m.reset_register = 0xcf9;
    m.rsdp_known = false;
    m.acpi_tables(false, s5_of_0, acpi::Space::io);
    return m;
}

Fake firecracker(bool with_acpi) {
    Fake m;
    m.rsdp_known = false;
    if (with_acpi) {
        m.acpi_tables(true, Bytes(64, 0xa3), acpi::Space::io);
    }
    return m;
}

Fake cloud_hypervisor() {
    Fake m;
    m.sleep_register = m.reset_register = 0x600;
    m.sleep_value = 0x34;
    m.acpi_tables(true, s5_of_5, acpi::Space::io);
    return m;
}

bool good(Verdict v) { return v == Verdict::success || v == Verdict::skip; }

TEST(Ending, TheDebugExitPortReceivesEveryVerdict) {
    for (const bool later : {false, true}) {
        for (const Verdict v : verdicts) {
            Fake m = qemu_pc();
            m.exit_port = true;
            m.exit_takes_time = later;
            m.others_at_once = true; // and would overtake it
            EXPECT_EQ(m.end(v), "exit " + std::to_string(to_underlying(v)));
            EXPECT_TRUE(m.reports.empty());
        }
    }
}

TEST(Ending, QemuIsSwitchedOffAndNeverReset) {
    for (const Verdict v : verdicts) {
        Fake m = qemu_pc();
        EXPECT_EQ(m.end(v), "off") << name(v);
        EXPECT_EQ(m.resets, 0);
        EXPECT_FALSE(m.note);
    }
}

TEST(Ending, PvpanicIsWrittenForEveryFailure) {
    for (const Verdict v : verdicts) {
        Fake m = qemu_pc();
        Bytes aml(3000, 0xa3); // beyond the first window of the scan, and across its end
        aml.insert(aml.end(), s5_of_0.begin(), s5_of_0.end());
        aml.insert(aml.end(), pvpanic_aml.begin(), pvpanic_aml.end());
        m.acpi_tables(false, aml, acpi::Space::io);
        EXPECT_EQ(m.end(v), "off") << "the host may go on after it";
        EXPECT_EQ(m.reports, good(v) ? std::vector<std::string>{} : std::vector<std::string>{"pvpanic"}) << name(v);
    }
}

// Exit status 0 after the pulse, 1 after a triple fault; a pulse and an immediate triple fault race. Each access to an
// unknown port adds a line to its log.
TEST(Ending, FirecrackerTellsSuccessFromFailure) {
    for (const bool with_acpi : {false, true}) {
        for (const Nanoseconds needs : {100'000u, 5'000'000u, 300'000'000u}) {
            for (const Verdict v : verdicts) {
                Fake m = firecracker(with_acpi);
                m.host_needs = needs;
                EXPECT_EQ(m.end(v), good(v) ? "reset" : "triple fault") << name(v);
                EXPECT_EQ(m.resets, good(v) ? 1 : 0);
                EXPECT_EQ(m.note, v) << "for the boot that follows where the machine is not ended but restarted";
                m.accesses.erase(0x64);
                EXPECT_EQ(m.accesses, (std::map<u16, u32>{{0xf4, 1}}))
                    << "a port that Firecracker has not, more than once";
            }
        }
    }
}

// Its reset is a reboot, and every end has exit status 0.
TEST(Ending, CloudHypervisorIsSwitchedOffForEveryVerdict) {
    for (const Verdict v : verdicts) {
        Fake m = cloud_hypervisor();
        EXPECT_EQ(m.end(v), "off") << name(v);
        EXPECT_EQ(m.resets, 0);
    }
}

// The DSDT has none, but a later table does.
TEST(Ending, S5OfAnSsdt) {
    for (const Verdict v : verdicts) {
        Fake m;
        m.pm1a = 0x604;
        m.reset_register = 0xcf9;
        m.sleep_type = 5;
        m.acpi_tables(false, Bytes(64, 0xa3), acpi::Space::io, s5_of_5);
        EXPECT_EQ(m.end(v), "off") << name(v);
        EXPECT_EQ(m.resets, 0);
    }
}

TEST(Ending, RegistersInMemory) { // QEMU's microvm with ACPI
    for (const Verdict v : verdicts) {
        Fake m;
        m.sleep_register = 0xfea00200;
        m.reset_register = 0xfea00202;
        m.sleep_value = 0x34;
        m.acpi_tables(true, s5_of_5, acpi::Space::memory);
        EXPECT_EQ(m.end(v), "off") << name(v);
    }
}

TEST(Ending, XenIsGivenTheReasonOfEach) {
    for (const Verdict v : verdicts) {
        for (const bool hvm : {false, true}) {
            Fake m = hvm ? qemu_pc() : Fake{};
            m.hypervisor = "XenVMMXenVMM";
            EXPECT_EQ(m.end(v), good(v) ? "xen 0" : "xen 3") << name(v);
        }
    }
}

// A restart that the host has asked for: the machine is reset, and the next boot is not told that it was its own doing.
// A failure ends as without it.
TEST(Ending, ARestartOnRequest) {
    for (const Verdict v : verdicts) {
        Fake xen;
        xen.hypervisor = "XenVMMXenVMM";
        EXPECT_EQ(xen.end(v, true), good(v) ? "xen 1" : "xen 3") << name(v);
        Fake pc = qemu_pc();
        EXPECT_EQ(pc.end(v, true), good(v) ? "reset" : "off") << name(v);
        EXPECT_FALSE(pc.note) << name(v);
        Fake bare = firecracker(false);
        EXPECT_FALSE(bare.end(v, true).empty());
        EXPECT_FALSE(good(v) && bare.note) << name(v);
    }
}

TEST(Ending, HyperVsCrashRegisters) {
    for (const Verdict v : verdicts) {
        Fake m = qemu_pc();
        m.hypervisor = "Microsoft Hv";
        m.hyperv_features = 1u << 10;
        m.msrs[0x40000105] = u64{3} << 62;
        EXPECT_EQ(m.end(v), "off");
        EXPECT_EQ(m.reports, good(v) ? std::vector<std::string>{} : std::vector<std::string>{"crash registers"})
            << name(v);
        if (!good(v)) {
            EXPECT_EQ(m.msrs[0x40000105], u64{3} << 62);
            EXPECT_EQ(m.msrs[0x40000102], to_underlying(v));
            EXPECT_EQ(m.msrs[0x40000103], 0x1234000u);
            EXPECT_EQ(m.msrs[0x40000104], 17u);
        }
        Fake without = qemu_pc();
        without.hypervisor = "Microsoft Hv";
        without.msrs[0x40000105] = u64{3} << 62;
        EXPECT_EQ(without.end(v), "off");
        EXPECT_TRUE(without.reports.empty()) << "no feature, no access";
        Fake silent = qemu_pc();
        silent.hypervisor = "Microsoft Hv";
        silent.hyperv_features = 1u << 10;
        EXPECT_EQ(silent.end(v), "off");
        EXPECT_TRUE(silent.reports.empty()) << "the register offers nothing";
    }
}

TEST(Ending, BhyveTellsATripleFault) { // exit status 1: powered off, 3: triple fault
    for (const Verdict v : verdicts) {
        Fake m = qemu_pc();
        m.hypervisor = "bhyve bhyve ";
        EXPECT_EQ(m.end(v), good(v) ? "off" : "triple fault") << name(v);
    }
}

// Each method fails: the next one is tried, and only then may the machine restart, with a note for the next boot.
TEST(Ending, EveryWayIsTriedOnce) {
    Fake m;
    m.hypervisor = "Microsoft Hv";
    m.hyperv_privileges = 1u << 7;
    m.pm1a = 0x604;
    m.reset_register = 0xcf9;
    m.acpi_tables(false, s5_of_0, acpi::Space::io);
    m.i8042 = false;
    m.host_needs = never / 2; // never in this test
    EXPECT_EQ(m.end(Verdict::success), "triple fault");
    EXPECT_EQ(m.pending, "off");
    EXPECT_EQ(m.resets, 2) << "ACPI's register, Hyper-V's";
    EXPECT_EQ(m.note, Verdict::success);
    EXPECT_EQ(m.accesses[0x64], 2u) << "no device there: read once, written once";
    EXPECT_LT(m.now, 6'000'000'000u);
}

// A fault in the middle of a step leads to another call: it continues with the following step, and the first verdict is
// kept.
TEST(Ending, ATransportFaultIsRetried) {
    Fake m = qemu_pc();
    Ending ending;
    ASSERT_TRUE(ending.step(m, m, Verdict::success));
    ASSERT_TRUE(ending.step(m, m, Verdict::crash));
    while (m.ended.empty() && ending.step(m, m, Verdict::crash)) {
    }
    EXPECT_EQ(m.ended, "off");
    Fake nothing;
    nothing.i8042 = false;
    Ending last;
    struct Stubborn final : Fake {
        void triple_fault() override {}
    } never_ends;
    never_ends.i8042 = false;
    int steps = 0;
    while (last.step(never_ends, never_ends, Verdict::success)) {
        ++steps;
    }
    EXPECT_LT(steps, 20);
    EXPECT_FALSE(last.step(never_ends, never_ends, Verdict::success)) << "and then there is none";
}

TEST(Ending, DamagedTablesAreNoWay) {
    Fake m = qemu_pc();
    Bytes broken = table("DSDT", s5_of_0);
    broken.back() ^= 1;
    m.Pieces::put(0x20000, broken);
    EXPECT_EQ(m.end(Verdict::success), "reset") << "by the reset register, which needs no DSDT";
    EXPECT_EQ(m.note, Verdict::success);
}

TEST(Ending, TheNoteOfARestart) {
    for (const Verdict v : verdicts) {
        EXPECT_EQ(boot::restarted_by(boot::restart_note(v)), v);
    }
    auto note = boot::restart_note(Verdict::success);
    note.verdict = 0x13;
    EXPECT_FALSE(boot::restarted_by(note));
    note = boot::restart_note(static_cast<Verdict>(0x15));
    EXPECT_FALSE(boot::restarted_by(note)) << "no verdict";
    EXPECT_FALSE(boot::restarted_by({}));
    EXPECT_FALSE(boot::restarted_by({~u64{0}, ~u64{0}, ~u64{0}}));
}

} // namespace
