#include "gtest_macros.hpp"

#include "zeroed.hpp"

import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.interrupt;
import core.log;
import core.cpuid;
import core.processor;
import io.executor;
import io.task;
import hv.xen;

#include "unit/hv/xen_fake.hpp"

namespace {
using namespace fl;
using hv::xen::Port;

TEST(XenBackend, InstallsInOrder) {
    fake::Machine m;
    ASSERT_TRUE(m.install());
    EXPECT_EQ(m.guest.version(), 4u << 16 | 17u);
    EXPECT_NE(m.xen.shared, nullptr);
    for (u32 word = 0; word < 64; ++word) {
        EXPECT_EQ(m.xen.mask(word), ~u64{0}) << "every port is masked before the first upcall can come";
    }
    EXPECT_NE(m.xen.grant_frames[7], nullptr);
    EXPECT_EQ(m.xen.grant_frames[8], nullptr);
    EXPECT_EQ(m.guest.grants().available(), 8 * 512u - 8u);
    EXPECT_EQ(m.guest.grants().obtainable(), 64 * 512u - 8u);
    EXPECT_EQ(m.guest.tsc_hz(), 2'500'000'000u);
    EXPECT_EQ(m.guest.clock_name(), "xen cpuid");
    ASSERT_TRUE(m.start());
    EXPECT_EQ(m.xen.callback, u64{2} << 56 | 0x40u);
    EXPECT_FALSE(m.xen.interrupts.eoi);
    EXPECT_EQ(m.guest.upcall(), hv::Xen::Upcall::vector);
    EXPECT_GE(m.guest.calls().count(), 12u);
}

TEST(XenBackend, TakesTheLocalApicsVectorWhereXenHasNoOther) {
    for (bool announced : {false, true}) {
        fake::Machine m;
        m.xen.features = announced ? 1u << 2 | 1u << 8 : 1u << 2;
        ASSERT_TRUE(m.install());
        m.xen.set_param_answer = announced ? -22 : 0;
        ASSERT_TRUE(m.start());
        EXPECT_EQ(m.xen.event_cpus[0].vector, 0x40);
        EXPECT_TRUE(m.xen.interrupts.eoi);
        EXPECT_EQ(m.guest.upcall(), hv::Xen::Upcall::apic_vector);
    }
}

TEST(XenBackend, RefusesWhatItCannotUse) {
    {
        fake::Machine m;
        m.xen.sightings.count = 0;
        EXPECT_EQ(m.install().error().code, Code::not_found);
    }
    {
        fake::Machine m;
        m.xen.cpuid.leaves[1].value.eax = 0;
        EXPECT_EQ(m.install().error().code, Code::protocol);
    }
    {
        fake::Machine m;
        m.xen.version = -38;
        EXPECT_EQ(m.install().error().code, Code::not_supported);
    }
    {
        fake::Machine m;
        m.xen.features = 0;
        EXPECT_EQ(m.install().error().code, Code::not_supported);
    }
    {
        fake::Machine m;
        m.xen.grant_frames_limit = 0;
        EXPECT_EQ(m.install().error().code, Code::exhausted);
    }
    { // no store: no devices, no error
        fake::Machine m;
        m.xen.has_store = false;
        ASSERT_TRUE(m.install());
        ASSERT_TRUE(m.start());
        hv::DeviceList list;
        EXPECT_TRUE(m.run(m.guest.enumerate(list)));
        EXPECT_EQ(list.count(), 0u);
    }
}

TEST(XenBackend, ProcessorsAreStartedByHypercall) {
    fake::Machine m;
    EXPECT_EQ(m.guest.processor_count(), 0u) << "before install()";
    m.xen.vcpus.resize(7);
    m.xen.vcpus[0] = {.initialised = true, .up = true};
    ASSERT_TRUE(m.install());
    ASSERT_EQ(m.guest.processor_count(), 7u);
    for (const auto& vcpu : std::span(m.xen.vcpus).subspan(1)) {
        EXPECT_FALSE(vcpu.initialised || vcpu.up) << "counting changes nothing";
    }
    ASSERT_TRUE(m.guest.start_processor(3, {.rip = 0x1234, .rsp = 0x8000, .cr3 = 0x5000}));
    EXPECT_TRUE(m.xen.vcpus[3].up);
    EXPECT_EQ(m.xen.vcpus[3].rip, 0x1234u);
    EXPECT_EQ(m.xen.vcpus[3].cr3, 0x5000u);
    EXPECT_FALSE(m.guest.start_processor(3, {.rip = 0x1234})) << "it has registers already";
    EXPECT_FALSE(m.guest.start_processor(7, {.rip = 0x1234})) << "there is none of that number";
    m.guest.stop_processor(3);
    EXPECT_FALSE(m.xen.vcpus[3].up);
}

TEST(XenBackend, ProcessorsThatFirmwareHasUsedNeedTheLocalApic) {
    fake::Machine m;
    m.xen.vcpus.resize(2);
    m.xen.vcpus[0] = {.initialised = true, .up = true};
    m.xen.vcpus[1] = {.initialised = true};
    ASSERT_TRUE(m.install());
    EXPECT_EQ(m.guest.processor_count(), 0u);
}

TEST(XenBackend, ClockFromTheSharedPage) {
    // 2^31 / 2^32 of a nanosecond per cycle, shifted by one: 1 GHz.
    const auto install = [](u32 mul, i8 shift, u32 version) {
        fake::Machine n;
        n.xen.cpuid.leaf_count = 2;
        auto gate = n.xen.gate();
        struct Both {
            fake::Xen* xen;
            u32 mul;
            i8 shift;
            u32 version;
        } both{&n.xen, mul, shift, version};
        gate.context = &both;
        gate.call = [](void* self, u32 number, u64 a, u64 b, u64 c, u64, u64) {
            Both& x = *static_cast<Both*>(self);
            const i64 answer = x.xen->hypercall(number, a, b, c);
            if (x.xen->shared != nullptr) {
                const u64 at = reinterpret_cast<u64>(x.xen->shared) + 32;
                fake::Xen::field<u32>(at, 0) = x.version;
                fake::Xen::field<u32>(at, 24) = x.mul;
                fake::Xen::field<i8>(at, 28) = x.shift;
            }
            return answer;
        };
        n.guest.set_gate(gate);
        EXPECT_TRUE(n.install());
        return n.guest.tsc_hz();
    };
    EXPECT_EQ(install(0x80000000, 1, 4), 1'000'000'000u);
    EXPECT_EQ(install(0x80000000, -1, 4), 4'000'000'000u);
    EXPECT_EQ(install(0x80000000, 1, 5), std::nullopt) << "an odd version: being written";
    EXPECT_EQ(install(0, 0, 4), std::nullopt);
    EXPECT_EQ(install(0x80000000, 77, 4), std::nullopt);
}

TEST(XenBackend, UnplugsEmulatedDevices) {
    using Writes = std::vector<std::pair<u16, u32>>;
    {
        fake::Machine m;
        ASSERT_TRUE(m.install());
        EXPECT_TRUE(m.guest.unplug({.disks = true, .nvme = true}));
        EXPECT_EQ(m.xen.cpu.writes, (Writes{{0x12, 0xffff}, {0x10, 1}, {0x10, 9}}));
    }
    {
        fake::Machine m;
        m.xen.cpu.unplug_version = 0;
        ASSERT_TRUE(m.install());
        EXPECT_TRUE(m.guest.unplug({.nics = true}));
        EXPECT_EQ(m.xen.cpu.writes, (Writes{{0x10, 2}}));
    }
    {
        fake::Machine m;
        m.xen.cpu.refuse_drivers = true;
        ASSERT_TRUE(m.install());
        EXPECT_EQ(m.guest.unplug({.disks = true}).error().code, Code::not_supported);
        EXPECT_EQ(m.xen.cpu.writes, (Writes{{0x12, 0xffff}, {0x10, 1}})) << "nothing was taken away";
    }
    {
        fake::Machine m;
        m.xen.cpu.unplug_magic = 0xffff;
        ASSERT_TRUE(m.install());
        EXPECT_EQ(m.guest.unplug({.disks = true}).error().code, Code::not_supported);
        EXPECT_TRUE(m.xen.cpu.writes.empty());
    }
}

// ---- event channels ----

void count(void* n) { ++*static_cast<int*>(n); }

TEST(XenEvents, UpcallFindsTheHandlers) {
    fake::Machine m;
    ASSERT_TRUE(m.install() && m.start());
    int a = 0;
    int b = 0;
    ASSERT_TRUE(m.guest.events().bind(Port{70}, count, &a));
    ASSERT_TRUE(m.guest.events().bind(Port{3}, count, &b));
    EXPECT_EQ(m.guest.events().bind(Port{3}, count, &b).error().code, Code::busy);
    EXPECT_EQ(m.guest.events().bind(Port{0}, count, &b).error().code, Code::exhausted);
    EXPECT_EQ(m.guest.events().bind(Port{512}, count, &b).error().code, Code::exhausted);
    m.xen.raise(70);
    EXPECT_FALSE(m.xen.deliver()) << "masked until unmask()";
    EXPECT_TRUE(m.guest.events().unmask(Port{70})) << "arrived in the meantime";
    EXPECT_FALSE(m.guest.events().unmask(Port{70}));
    EXPECT_FALSE(m.guest.events().unmask(Port{3}));
    m.xen.raise(70);
    m.xen.raise(3);
    m.xen.raise(3);
    EXPECT_TRUE(m.xen.deliver());
    EXPECT_EQ(a, 1);
    EXPECT_EQ(b, 1);
    EXPECT_EQ(m.xen.upcall_pending(), 0);
    EXPECT_EQ(m.xen.selector(), 0u);
    EXPECT_EQ(m.xen.pending(0) | m.xen.pending(1), 0u);
    m.guest.events().mask(Port{70});
    m.xen.raise(70);
    EXPECT_FALSE(m.xen.deliver());
    m.guest.events().unbind(Port{70});
    EXPECT_EQ(m.xen.pending(1), 0u);
    EXPECT_EQ(m.xen.mask(1) >> 6 & 1, 1u);
}

TEST(XenEvents, AStormIsBoundedAndAStrayEventIsMasked) {
    struct Storm {
        fake::Machine m;
        int rings = 0;
    } s;
    ASSERT_TRUE(s.m.install() && s.m.start());
    ASSERT_TRUE(s.m.guest.events().bind(
        Port{9},
        [](void* c) {
            Storm& storm = *static_cast<Storm*>(c);
            ++storm.rings;
            storm.m.xen.raise(9); // raises it again while it is handled
        },
        &s));
    static_cast<void>(s.m.guest.events().unmask(Port{9}));
    s.m.xen.raise(9);
    EXPECT_TRUE(s.m.xen.deliver());
    EXPECT_EQ(s.rings, static_cast<int>(hv::xen::Events::max_passes));
    EXPECT_EQ(s.m.xen.upcall_pending(), 1) << "and the next one is not lost";
    s.m.guest.events().mask(Port{9});
    EXPECT_TRUE(s.m.xen.deliver());

    s.m.xen.mask(2) &= ~(u64{1} << 5);
    s.m.xen.raise(2 * 64 + 5);
    EXPECT_TRUE(s.m.xen.deliver());
    EXPECT_EQ(s.m.guest.events().unexpected(), 1u);
    EXPECT_EQ(s.m.xen.mask(2), ~u64{0});
}

/// Runs as the kernel's processor `n`.
struct On {
    explicit On(u32 n) : before(this_processor()) { set_this_processor(n); }
    ~On() { set_this_processor(before); }
    u32 before;
};

/// A machine with `n` processors that have joined; processor i is virtual CPU ids[i].
struct Several : fake::Machine {
    explicit Several(std::vector<u32> ids, bool before_start = true) {
        xen.event_cpus.resize(*std::ranges::max_element(ids) + 1);
        for (u32 i = 0; i < ids.size(); ++i) {
            xen.event_cpus[ids[i]].processor = i;
        }
        xen.cpu.vcpu_ids = [ids] { return ids[this_processor()]; };
        if (before_start) {
            begin(static_cast<u32>(ids.size()));
        }
    }
    void begin(u32 processors) {
        EXPECT_TRUE(install() && start());
        for (u32 i = 1; i < processors; ++i) {
            const On on(i);
            EXPECT_TRUE(guest.join(i, executor));
        }
        while (xen.deliver()) { // every registration causes one
        }
    }
};

struct Where {
    std::vector<u32> processors;
    static void note(void* self) { static_cast<Where*>(self)->processors.push_back(this_processor()); }
};

TEST(XenEvents, AHandlerRunsOnTheProcessorOfItsPort) {
    Several m({0, 5, 40});
    EXPECT_EQ(m.guest.events().vcpu(2), 40u);
    EXPECT_NE(m.xen.event_cpus[0].info, nullptr);
    EXPECT_NE(m.xen.event_cpus[40].info, nullptr) << "beyond the 32 in the shared info page";
    Where a;
    Where b;
    Where c;
    EXPECT_EQ(*m.guest.events().bind(Port{70}, Where::note, &a), 0u);
    EXPECT_EQ(*m.guest.events().bind(Port{71}, Where::note, &b, 1), 1u);
    EXPECT_EQ(*m.guest.events().bind(Port{72}, Where::note, &c, 2), 2u);
    EXPECT_EQ(m.xen.port_vcpu[71], 5u);
    EXPECT_EQ(m.xen.port_vcpu[72], 40u);
    for (u32 port : {70u, 71u, 72u}) {
        EXPECT_FALSE(m.guest.events().unmask(Port{port}));
        m.xen.raise(port);
    }
    EXPECT_TRUE(m.xen.deliver());
    EXPECT_FALSE(m.xen.deliver());
    EXPECT_EQ(a.processors, std::vector<u32>{0});
    EXPECT_EQ(b.processors, std::vector<u32>{1}) << "all three are in one word";
    EXPECT_EQ(c.processors, std::vector<u32>{2});
    EXPECT_EQ(m.guest.events().unexpected(), 0u);
    // An upcall of one processor leaves the port of another pending.
    m.xen.raise(72);
    m.xen.selector(0) |= 2;
    m.xen.upcall_pending(0) = 1;
    {
        const On on(0);
        m.guest.events().scan();
    }
    EXPECT_EQ(c.processors.size(), 1u);
    EXPECT_TRUE(m.xen.deliver());
    EXPECT_EQ(c.processors, (std::vector<u32>{2, 2}));
    m.guest.events().unbind(Port{72});
    EXPECT_EQ(*m.guest.events().bind(Port{72}, Where::note, &a), 0u);
    EXPECT_FALSE(m.xen.port_vcpu.contains(72)) << "a port that is closed and allocated again is virtual CPU 0's";
}

TEST(XenEvents, AProcessorThatLeavesTakesNoMore) {
    Several m({0, 1});
    Where a;
    Where b;
    ASSERT_TRUE(m.guest.events().bind(Port{70}, Where::note, &a));
    ASSERT_TRUE(m.guest.events().bind(Port{71}, Where::note, &b, 1));
    static_cast<void>(m.guest.events().unmask(Port{70}));
    static_cast<void>(m.guest.events().unmask(Port{71}));
    {
        const On on(1);
        m.guest.leave(1);
    }
    m.xen.raise(70);
    m.xen.raise(71);
    EXPECT_TRUE(m.xen.deliver());
    EXPECT_EQ(a.processors.size(), 1u);
    EXPECT_TRUE(b.processors.empty());
}

TEST(XenEvents, WithoutCallsForItProcessor0TakesTheEvents) {
    { // ports cannot be moved
        Several m({0, 1}, false);
        m.xen.moves_ports = false;
        m.begin(2);
        Where a;
        EXPECT_EQ(*m.guest.events().bind(Port{70}, Where::note, &a, 1), 0u);
        static_cast<void>(m.guest.events().unmask(Port{70}));
        m.xen.raise(70);
        EXPECT_TRUE(m.xen.deliver());
        EXPECT_EQ(a.processors, std::vector<u32>{0});
    }
    { // no own vcpu_info: the first 32 have one in the shared info page, others have none
        Several m({0, 31, 32}, false);
        m.xen.takes_vcpu_info = false;
        m.begin(3);
        EXPECT_TRUE(m.guest.events().joined(1));
        EXPECT_FALSE(m.guest.events().joined(2));
        Where a;
        Where b;
        EXPECT_EQ(*m.guest.events().bind(Port{70}, Where::note, &a, 1), 1u);
        EXPECT_EQ(*m.guest.events().bind(Port{71}, Where::note, &b, 2), 0u);
        for (u32 port : {70u, 71u}) {
            static_cast<void>(m.guest.events().unmask(Port{port}));
            m.xen.raise(port);
        }
        m.xen.event_cpus.resize(32); // a place for the 33rd would lie in the words of pending bits
        EXPECT_TRUE(m.xen.deliver());
        EXPECT_EQ(a.processors, std::vector<u32>{1});
        EXPECT_EQ(b.processors, std::vector<u32>{0});
    }
}

TEST(XenEvents, TheLocalApicsVectorIsSetForEachProcessor) {
    Several m({0, 3, 4}, false);
    m.xen.features = 1u << 2;
    ASSERT_TRUE(m.install() && m.start());
    {
        const On on(1);
        ASSERT_TRUE(m.guest.join(1, m.executor));
    }
    EXPECT_EQ(m.xen.event_cpus[3].vector, 0x40);
    {
        const On on(2);
        m.xen.refuse_vectors = true;
        ASSERT_TRUE(m.guest.join(2, m.executor)) << "it is used, without events";
    }
    EXPECT_TRUE(m.guest.events().joined(1));
    EXPECT_FALSE(m.guest.events().joined(2));
}

TEST(XenEvents, AVirtualCpusNumberIsThatOfItsStartIfCpuidDoesNotTell) {
    Several m({0, 3}, false);
    m.xen.cpu.vcpu_ids = nullptr;
    ASSERT_TRUE(m.install() && m.start());
    m.xen.vcpus.resize(4);
    ASSERT_TRUE(m.guest.start_processor(3, {}));
    const On on(1);
    ASSERT_TRUE(m.guest.join(1, m.executor));
    EXPECT_EQ(m.guest.events().vcpu(1), 3u);
    ASSERT_TRUE(m.guest.join(2, m.executor));
    EXPECT_EQ(m.guest.events().vcpu(2), 2u) << "started by the firmware's means: the processor's number";
}

TEST(XenEvents, InAnotherDomainTheSharedInfoPageServesEveryProcessor) {
    Several m({0, 5, 40});
    Where old;
    ASSERT_TRUE(m.guest.events().bind(Port{80}, Where::note, &old, 1));
    for (auto& each : m.xen.event_cpus) {
        each.info = nullptr;
    }
    m.xen.port_vcpu.clear();
    m.guest.events().restart();
    EXPECT_EQ(m.guest.events().open_ports(), 0u);
    Where a;
    Where b;
    EXPECT_EQ(*m.guest.events().bind(Port{71}, Where::note, &a, 1), 1u);
    EXPECT_EQ(*m.guest.events().bind(Port{72}, Where::note, &b, 2), 0u) << "no place for virtual CPU 40";
    for (u32 port : {71u, 72u, 80u}) {
        static_cast<void>(m.guest.events().unmask(Port{port}));
        m.xen.raise(port);
    }
    m.xen.event_cpus.resize(32); // a place for the 41st would lie in the words of pending bits
    EXPECT_TRUE(m.xen.deliver());
    EXPECT_EQ(a.processors, std::vector<u32>{1});
    EXPECT_EQ(b.processors, std::vector<u32>{0});
    EXPECT_TRUE(old.processors.empty());
    EXPECT_EQ(m.guest.events().unexpected(), 1u);
}

TEST(XenEvents, AProcessorIsKickedByAnEventOnIt) {
    Several m({0, 5, 7}, false);
    m.xen.console_answer = 0; // Xen itself
    Where kicked;
    m.guest.take_kicks(Where::note, &kicked);
    m.begin(2);
    EXPECT_TRUE(kicked.processors.empty());
    EXPECT_FALSE(m.guest.kick(2)) << "it has not joined";
    {
        const On on(2);
        ASSERT_TRUE(m.guest.join(2, m.executor));
    }
    m.xen.deliver();
    for (u32 cpu : {1u, 0u, 2u, 1u}) {
        EXPECT_TRUE(m.guest.kick(cpu));
        EXPECT_TRUE(m.xen.deliver());
        EXPECT_EQ(std::exchange(kicked.processors, {}), std::vector<u32>{cpu});
    }
    EXPECT_TRUE(m.guest.kick(1) && m.guest.kick(1));
    m.xen.deliver();
    EXPECT_EQ(std::exchange(kicked.processors, {}), std::vector<u32>{1}) << "merged";
    EXPECT_EQ(m.guest.events().open_ports(), 4u) << "one each, and XenStore's";
    m.guest.leave(2);
    EXPECT_FALSE(m.guest.kick(2));
    EXPECT_TRUE(m.guest.kick(1));
    EXPECT_EQ(m.guest.events().unexpected(), 0u);
}

TEST(XenEvents, TheLocalApicKicksWhereEventChannelsDoNot) {
    for (const bool emulated : {false, true}) {
        Several m({0, 1}, false);
        m.xen.console_answer = emulated ? -38 : 0;
        m.xen.refuse_ipis = !emulated;
        Where kicked;
        m.guest.take_kicks(Where::note, &kicked);
        m.begin(2);
        EXPECT_FALSE(m.guest.kick(0) || m.guest.kick(1));
        EXPECT_TRUE(m.guest.events().joined(1));
        EXPECT_TRUE(m.xen.ipi_ports.empty());
    }
}

// unbind() on one processor while the handler runs on another: afterwards the handler does not run.
TEST(XenEvents, UnbindWaitsForAHandlerOnAnotherProcessor) {
    Several m({0, 1});
    for (u32 round = 0; round < 200; ++round) {
        struct State {
            std::atomic<bool> running{false};
            std::atomic<bool> gone{false};
            std::atomic<bool> wrong{false};
        } state;
        ASSERT_TRUE(m.guest.events().bind(
            Port{70},
            [](void* self) {
                State& s = *static_cast<State*>(self);
                s.running.store(true);
                for (u32 i = 0; i < 2000; ++i) {
                    s.wrong.store(s.wrong.load() || s.gone.load());
                }
            },
            &state, 1));
        static_cast<void>(m.guest.events().unmask(Port{70}));
        m.xen.raise(70);
        std::thread other([&] {
            set_this_processor(1);
            m.guest.events().scan();
        });
        if (round % 2 == 0) {
            while (!state.running.load()) {
            }
        }
        m.guest.events().unbind(Port{70});
        state.gone.store(true);
        other.join();
        EXPECT_FALSE(state.wrong.load());
    }
}

// ---- grants ----

TEST(XenGrants, EntriesAndTheirEnd) {
    alignas(8) static std::array<unsigned char, 4096> table{};
    table.fill(0);
    table[20 * 8] = 1; // entry 20 belongs to a loader
    static hv::xen::Grants grants;
    grants.install({reinterpret_cast<hv::xen::GrantEntry*>(table.data()), 512}, 1);
    EXPECT_EQ(grants.available(), 512u - 8 - 1);
    std::set<u32> seen;
    while (grants.available() != 0) {
        seen.insert(*grants.take());
    }
    EXPECT_EQ(grants.take().error().code, Code::exhausted);
    EXPECT_FALSE(seen.contains(7));
    EXPECT_FALSE(seen.contains(20));
    EXPECT_TRUE(seen.contains(8) && seen.contains(511));

    grants.grant(9, 0x0102, 0xaabbccdd, true);
    const std::array<unsigned char, 8> golden{0x05, 0x00, 0x02, 0x01, 0xdd, 0xcc, 0xbb, 0xaa};
    EXPECT_EQ(std::memcmp(table.data() + 72, golden.data(), 8), 0);
    grants.grant(10, 0, 1, false);
    EXPECT_EQ(table[80], 1);

    EXPECT_TRUE(grants.release(9));
    EXPECT_EQ(table[72], 0);
    EXPECT_EQ(*grants.take(), 9u);

    table[80] |= 0x08; // mapped for reading
    EXPECT_FALSE(grants.release(10));
    EXPECT_EQ(table[80], 9) << "the permission stays while the page is mapped";
    EXPECT_EQ(grants.in_quarantine(), 1u);
    EXPECT_EQ(grants.available(), 0u);
    for (int i = 0; i < 16; ++i) {
        grants.sweep();
    }
    EXPECT_EQ(grants.available(), 0u) << "never used again while it is mapped";
    table[80] = 1;
    for (int i = 0; i < 16; ++i) {
        grants.sweep();
    }
    EXPECT_EQ(grants.in_quarantine(), 0u);
    EXPECT_EQ(*grants.take(), 10u);
    EXPECT_EQ(table[80], 0);
}

TEST(XenGrants, TheTableGrowsAsFarAsXenLetsIt) {
    const auto frames = [](u32 limit, u32 given, usize memory = 48u << 20) {
        fake::Machine m(memory);
        m.xen.grant_frames_limit = limit;
        m.xen.grant_frames_given = given;
        EXPECT_TRUE(m.install());
        auto& grants = m.guest.grants();
        const u32 first = grants.available();
        EXPECT_EQ(m.xen.frames_of_grants() * 512 - 8, first);
        EXPECT_TRUE(grants.ensure(first)) << "and asks for no more than is needed";
        EXPECT_EQ(grants.available(), first);
        if (grants.ensure(first + 600)) {
            EXPECT_EQ(grants.available(), first + 1024);
        }
        EXPECT_FALSE(grants.ensure(65 * 512));
        EXPECT_EQ(grants.available(), grants.obtainable());
        std::set<u32> seen;
        while (auto ref = grants.take()) {
            seen.insert(*ref);
        }
        EXPECT_EQ(seen.size(), grants.obtainable() + seen.size()) << "nothing is left";
        EXPECT_EQ(seen.size() + 8, m.xen.frames_of_grants() * 512u) << "every entry once, but for the reserved ones";
        EXPECT_EQ(*seen.begin(), 8u);
        grants.grant(*seen.rbegin(), 3, 0x10000, true);
        EXPECT_NE(m.xen.map_grant(*seen.rbegin(), 3, false), nullptr) << "the last entry is where Xen looks for it";
        EXPECT_EQ(m.xen.map_grant(*seen.rbegin(), 3, true), nullptr);
        EXPECT_EQ(m.xen.map_grant(*seen.rbegin(), 4, false), nullptr);
        EXPECT_FALSE(grants.release(*seen.rbegin()));
        m.xen.unmap_grant(*seen.rbegin(), false);
        for (u32 ticks = 0; ticks < 64 && grants.in_quarantine() != 0; ++ticks) {
            grants.sweep();
        }
        EXPECT_EQ(grants.in_quarantine(), 0u);
        return m.xen.frames_of_grants();
    };
    EXPECT_EQ(frames(64, 64), 64u);
    EXPECT_EQ(frames(100'000, 64), 64u);
    EXPECT_EQ(frames(64, 10), 10u) << "less than it reported";
    EXPECT_EQ(frames(64, 2), 2u);
    EXPECT_EQ(frames(3, 3), 3u);
    EXPECT_EQ(frames(64, 64, 40 * 4096), 32u) << "a machine with too little memory for all of it";
}

TEST(XenBus, DiskNumbersAndNames) {
    using Kind = hv::xen::VirtualDisk::Kind;
    auto check = [](u64 number, Kind kind, u32 disk, u32 partition, std::string_view name) {
        const auto v = hv::xen::virtual_disk(number);
        ASSERT_TRUE(v) << number;
        EXPECT_EQ(v->kind, kind);
        EXPECT_EQ(v->disk, disk);
        EXPECT_EQ(v->partition, partition);
        EXPECT_EQ(hv::xen::disk_name(*v).view(), name);
    };
    check(51712, Kind::xvd, 0, 0, "xvda");
    check(51728, Kind::xvd, 1, 0, "xvdb");
    check(51729, Kind::xvd, 1, 1, "xvdb1");
    check(768, Kind::ide, 0, 0, "xvda");
    check(832, Kind::ide, 1, 0, "xvdb");
    check(5632, Kind::ide, 2, 0, "xvdc");
    check(5696, Kind::ide, 3, 0, "xvdd");
    check(2048 + 16, Kind::scsi, 1, 0, "xvdb");
    check(268435456 + 26 * 256, Kind::xvd, 26, 0, "xvdaa");
    check(268435456 + 536 * 256 + 37, Kind::xvd, 536, 37, "xvdtq37");
    EXPECT_FALSE(hv::xen::virtual_disk(768 + 128));
    EXPECT_FALSE(hv::xen::virtual_disk(0));
    EXPECT_FALSE(hv::xen::virtual_disk(u64{2} << 28));
}
} // namespace
