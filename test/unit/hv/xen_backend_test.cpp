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
import core.wall_clock;
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

TEST(XenBackend, TheTimeOfDayIsTheHosts) {
    struct Case {
        u32 seconds, high, nanoseconds, wall_version, time_version, mul;
        bool valid;
    };
    for (const Case& each :
         {Case{1'790'000'000, 0, 250'000'000, 4, 6, 0x80000000, true},
          Case{1'790'000'000, 1, 0, 4, 6, 0x80000000, true},
          Case{1'790'000'000, 7, 0, 4, 6, 0x80000000, false}, // beyond 64 bits of nanoseconds
          Case{0, 0, 0, 0, 6, 0x80000000, false},             // not written
          Case{1'790'000'000, 0, 1'000'000'000, 4, 6, 0x80000000, false},
          Case{1'790'000'000, 0, 0, 5, 6, 0x80000000, false}, // being written
          Case{1'790'000'000, 0, 0, 4, 7, 0x80000000, false}, Case{1'790'000'000, 0, 0, 4, 6, 0, false}}) {
        fake::Machine m;
        ASSERT_TRUE(m.install());
        const u64 page = reinterpret_cast<u64>(m.xen.shared);
        fake::Xen::field<u32>(page, 0xc00) = each.wall_version;
        fake::Xen::field<u32>(page, 0xc04) = each.seconds;
        fake::Xen::field<u32>(page, 0xc08) = each.nanoseconds;
        fake::Xen::field<u32>(page, 0xc0c) = each.high;
        const u64 time = reinterpret_cast<u64>(m.xen.info_of(0)) + 32;
        fake::Xen::field<u32>(time, 0) = each.time_version;
        fake::Xen::field<u64>(time, 8) = __builtin_ia32_rdtsc();
        fake::Xen::field<u64>(time, 16) = 5'000'000'000; // the domain started 5 s ago
        fake::Xen::field<u32>(time, 24) = each.mul;
        fake::Xen::field<i8>(time, 28) = 1;
        set_wall_clock(m.world.now, 1);
        ASSERT_TRUE(m.start());
        const u64 now = *wall_clock(m.world.now);
        const u64 expected = ((u64{each.high} << 32 | each.seconds) + 5) * 1'000'000'000 + each.nanoseconds;
        if (each.valid) {
            EXPECT_GE(now, expected);
            EXPECT_LT(now, expected + 60'000'000'000);
        } else {
            EXPECT_EQ(now, 1u) << "not set";
        }
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
    ASSERT_TRUE(m.guest.events().restart());
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

// ---- FIFO event channels ----

struct Fifo : Several {
    explicit Fifo(std::vector<u32> ids = {0}) : Several(ids, false) {
        xen.offers_fifo = true;
        begin(static_cast<u32>(ids.size()));
        EXPECT_TRUE(guest.events().fifo());
    }
    void bind(u32 port, Where& where, u32 processor = 0) {
        EXPECT_EQ(*guest.events().bind(Port{port}, Where::note, &where, processor), processor);
        EXPECT_FALSE(guest.events().unmask(Port{port}));
    }
};

TEST(XenFifoEvents, QueuesAreFollowedAndWordsEndAsTheyBegan) {
    Fifo m({0, 5});
    EXPECT_EQ(m.xen.event_word(300), 1u << 30) << "every port begins as masked";
    std::array<Where, 4> w;
    m.bind(70, w[0]);
    m.bind(300, w[1]);
    m.bind(9, w[2]);
    m.bind(71, w[3], 1);
    for (u32 round = 0; round < 3; ++round) {
        for (u32 port : {300u, 70u, 300u, 9u, 71u}) {
            m.xen.raise(port);
        }
        EXPECT_TRUE(m.xen.deliver());
        EXPECT_FALSE(m.xen.deliver());
        for (u32 i = 0; i < 4; ++i) {
            EXPECT_EQ(w[i].processors, std::vector<u32>(round + 1, i == 3 ? 1u : 0u));
        }
        for (u32 port : {300u, 70u, 9u, 71u}) {
            EXPECT_EQ(m.xen.event_word(port), 0u);
        }
    }
    EXPECT_EQ(m.guest.events().unexpected(), 0u);
}

// Half of them have no place in the shared info page.
TEST(XenFifoEvents, SixtyFourProcessorsTakeTheirOwnEventsOfBothKinds) {
    constexpr u32 count = 64;
    static_assert(count == max_processors);
    std::vector<u32> ids(count);
    for (u32 i = 1; i < count; ++i) {
        ids[i] = count - i; // Xen's order is another one
    }
    for (const bool fifo : {false, true}) {
        Several m(ids, false);
        m.xen.console_answer = 0; // Xen itself
        m.xen.offers_fifo = fifo;
        Where kicked;
        m.guest.take_kicks(Where::note, &kicked);
        m.begin(count);
        EXPECT_EQ(m.guest.events().fifo(), fifo);
        // What Xen writes to: each a place of its own, within one page.
        std::map<const std::byte*, u32> places;
        for (const auto& cpu : m.xen.event_cpus) {
            ASSERT_NE(cpu.info, nullptr);
            EXPECT_TRUE(places.emplace(cpu.info, 64).second);
            EXPECT_EQ(cpu.control != nullptr, fifo);
            if (fifo) {
                EXPECT_TRUE(places.emplace(cpu.control, 72).second);
            }
        }
        const std::byte* end = nullptr;
        for (const auto& [at, size] : places) {
            EXPECT_GE(at, end);
            end = at + size;
            EXPECT_LE(m.xen.memory.physical_of(at) % 4096 + size, 4096u);
        }
        std::vector<Where> where(count);
        std::vector<Where> timers(count);
        std::vector<u32> timer_ports;
        for (u32 i = 0; i < count; ++i) {
            EXPECT_EQ(m.guest.events().vcpu(i), ids[i]);
            EXPECT_EQ(*m.guest.events().bind(Port{300 + i}, Where::note, &where[i], i), i);
            EXPECT_FALSE(m.guest.events().unmask(Port{300 + i}));
            const auto timer = m.guest.events().bind_virq(0, Where::note, &timers[i], i);
            ASSERT_TRUE(timer) << timer.error().message;
            timer_ports.push_back(to_underlying(*timer));
            EXPECT_EQ(m.xen.port_vcpu[timer_ports.back()], ids[i]);
        }
        for (u32 i = 0; i < count; ++i) {
            m.xen.raise(300 + i);
            m.xen.raise(timer_ports[i]);
        }
        while (m.xen.deliver()) {
        }
        for (u32 i = 0; i < count; ++i) {
            EXPECT_EQ(where[i].processors, std::vector<u32>{i});
            EXPECT_EQ(timers[i].processors, std::vector<u32>{i});
            EXPECT_TRUE(m.guest.kick(i));
            EXPECT_TRUE(m.xen.deliver());
            EXPECT_EQ(std::exchange(kicked.processors, {}), std::vector<u32>{i});
        }
        EXPECT_EQ(m.guest.events().unexpected(), 0u);
    }
}

// Xen starts a virtual CPU only if it has a vcpu_info.
TEST(XenFifoEvents, SixtyFourProcessorsAreStartedByHypercalls) {
    for (const bool fifo : {false, true}) {
        std::vector<u32> ids;
        for (u32 i = 0; i < max_processors; ++i) {
            if (i != 20 && i != 40) { // these do not come: the numbers of those after them are lower
                ids.push_back(i);
            }
        }
        Several m(ids, false);
        m.xen.offers_fifo = fifo;
        ASSERT_TRUE(m.install() && m.start());
        m.xen.vcpus.resize(max_processors);
        m.xen.vcpus[0] = {.initialised = true, .up = true};
        u32 running = 1;
        for (u32 index = 1; index < max_processors; ++index) {
            const auto started = m.guest.start_processor(index, {});
            ASSERT_TRUE(started) << index << ": " << started.error().message;
            if (index == 20 || index == 40) {
                continue;
            }
            if (index >= 32) {
                EXPECT_EQ(m.xen.upcall_pending(index), 0) << "an upcall before it has joined would never end";
            }
            const On on(running);
            EXPECT_TRUE(m.guest.join(running, m.executor));
            EXPECT_TRUE(m.guest.events().joined(running)) << index;
            EXPECT_EQ(m.guest.events().vcpu(running), index);
            ++running;
        }
        ASSERT_EQ(running, ids.size());
        while (m.xen.deliver()) {
        }
        std::set<const std::byte*> places;
        for (const u32 id : ids) {
            EXPECT_TRUE(places.insert(m.xen.event_cpus[id].info).second) << id;
            EXPECT_EQ(m.xen.event_cpus[id].control != nullptr, fifo) << id;
        }
        EXPECT_FALSE(places.contains(nullptr));
        std::vector<Where> where(running);
        for (u32 i = 0; i < running; ++i) {
            EXPECT_EQ(*m.guest.events().bind(Port{300 + i}, Where::note, &where[i], i), i);
            EXPECT_FALSE(m.guest.events().unmask(Port{300 + i}));
            m.xen.raise(300 + i);
        }
        while (m.xen.deliver()) {
        }
        for (u32 i = 0; i < running; ++i) {
            EXPECT_EQ(where[i].processors, std::vector<u32>{i});
        }
    }
}

TEST(XenFifoEvents, AMaskedPortKeepsItsEventForUnmask) {
    Fifo m;
    Where a;
    Where b;
    m.bind(70, a);
    m.bind(80, b);
    m.xen.raise(70);
    m.xen.raise(80);
    m.guest.events().mask(Port{70}); // while it is in the queue
    EXPECT_TRUE(m.xen.deliver());
    EXPECT_TRUE(a.processors.empty());
    EXPECT_EQ(b.processors.size(), 1u);
    m.xen.raise(70);
    EXPECT_FALSE(m.xen.deliver());
    EXPECT_TRUE(m.guest.events().unmask(Port{70})) << "arrived in the meantime";
    EXPECT_FALSE(m.guest.events().unmask(Port{70}));
    m.xen.raise(70);
    EXPECT_TRUE(m.xen.deliver());
    EXPECT_EQ(a.processors.size(), 1u);
    // Consumed by unmask() while it is in the queue: the upcall finds nothing.
    m.xen.raise(70);
    m.guest.events().mask(Port{70});
    EXPECT_TRUE(m.guest.events().unmask(Port{70}));
    EXPECT_TRUE(m.xen.deliver());
    EXPECT_EQ(a.processors.size(), 1u);
    m.xen.raise(70);
    EXPECT_TRUE(m.xen.deliver());
    EXPECT_EQ(a.processors.size(), 2u) << "and it can be queued again";
    m.guest.events().unbind(Port{70});
    EXPECT_EQ(m.xen.event_word(70), 1u << 30);
}

TEST(XenFifoEvents, UnmaskWaitsWhileXenChangesTheLink) {
    Fifo m;
    Where a;
    ASSERT_TRUE(m.guest.events().bind(Port{70}, Where::note, &a));
    std::atomic_ref<u32> word(m.xen.event_word(70));
    word.fetch_or(1u << 28);
    std::atomic<bool> done{false};
    std::thread other([&] {
        EXPECT_FALSE(m.guest.events().unmask(Port{70}));
        done.store(true);
    });
    for (u32 i = 0; i < 2000; ++i) {
        EXPECT_FALSE(done.load() && (word.load() >> 28 & 1) != 0);
    }
    EXPECT_EQ(word.load() >> 30 & 1, 1u);
    word.fetch_and(~(1u << 28));
    other.join();
    EXPECT_EQ(word.load(), 0u);
    // A Xen that never ends is not waited for without a bound.
    m.guest.events().mask(Port{70});
    word.fetch_or(1u << 28);
    EXPECT_FALSE(m.guest.events().unmask(Port{70}));
    EXPECT_EQ(word.load(), 1u << 28);
}

TEST(XenFifoEvents, AStormIsBoundedAndWhatIsWrongIsCounted) {
    struct Storm {
        Fifo m;
        u32 rings = 0;
    } s;
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
    EXPECT_EQ(s.rings, hv::xen::Events::max_queued);
    EXPECT_EQ(s.m.xen.upcall_pending(), 1) << "and the next one is not lost";
    const u32 before = s.rings;
    s.m.xen.deliver();
    EXPECT_GT(s.rings, before);
    s.m.guest.events().mask(Port{9});
    while (s.m.xen.deliver()) {
    }
    // A port that nobody has bound.
    s.m.xen.event_word(40) = 0;
    s.m.xen.raise(40);
    EXPECT_TRUE(s.m.xen.deliver());
    EXPECT_EQ(s.m.guest.events().unexpected(), 1u);
    EXPECT_EQ(s.m.xen.event_word(40), 1u << 30) << "it is masked";
    // A head that is no port, and one beyond the words.
    for (u32 head : {0u, 1024u, ~0u}) {
        s.m.xen.head_of(0) = head;
        s.m.xen.ready_of(0) = ~0u;
        s.m.xen.upcall_pending() = 1;
        const u64 counted = s.m.guest.events().unexpected();
        EXPECT_TRUE(s.m.xen.deliver());
        EXPECT_EQ(s.m.guest.events().unexpected(), counted + 16);
        EXPECT_FALSE(s.m.xen.deliver());
    }
}

/// Notes which ports have been served, in order.
struct Order {
    struct Entry {
        Order* order;
        u32 port;
        std::function<void()> then;
    };
    void bind(Fifo& m, u32 port, std::function<void()> then = nullptr) {
        entries.push_back(std::make_unique<Entry>(this, port, std::move(then)));
        ASSERT_TRUE(m.guest.events().bind(
            Port{port},
            [](void* self) {
                Entry& entry = *static_cast<Entry*>(self);
                entry.order->served.push_back(entry.port);
                if (entry.then) {
                    entry.then();
                }
            },
            entries.back().get()));
        EXPECT_FALSE(m.guest.events().unmask(Port{port}));
    }
    std::vector<std::unique_ptr<Entry>> entries;
    std::vector<u32> served;
};

TEST(XenFifoEvents, EachPriorityHasAQueueAndTheHighestComesFirst) {
    Fifo m;
    Order order;
    for (const auto& [port, priority] : std::map<u32, u32>{{20, 0}, {21, 0}, {30, 7}, {31, 7}, {40, 15}, {41, 15}}) {
        m.xen.priorities[port] = priority;
        // While the first of the middle queue is served another one arrives in the highest.
        order.bind(m, port, port == 30 ? std::function<void()>([&] { m.xen.raise(21); }) : nullptr);
    }
    for (u32 port : {41u, 40u, 30u, 31u, 20u}) {
        m.xen.raise(port);
    }
    EXPECT_TRUE(m.xen.deliver());
    EXPECT_EQ(order.served, (std::vector<u32>{20, 30, 21, 31, 41, 40}));
    EXPECT_EQ(m.xen.ready_of(0), 0u);
    m.xen.deliver(); // the upcall of what arrived meanwhile
    EXPECT_EQ(order.served.size(), 6u);
    for (u32 port : {20u, 21u, 30u, 31u, 40u, 41u}) {
        EXPECT_EQ(m.xen.event_word(port), 0u);
    }
    EXPECT_EQ(m.guest.events().unexpected(), 0u);
}

// Xen stores a new head only for an empty queue. Between that the guest follows the links alone.
TEST(XenFifoEvents, TheHeadIsReadOnlyForAQueueThatHasBecomeNonEmpty) {
    Fifo m;
    Order order;
    order.bind(m, 20, [&] { m.xen.head_of(0) = 22; }); // a head that changes while the queue is followed
    for (u32 port : {21u, 22u}) {
        order.bind(m, port);
    }
    m.xen.raise(20);
    m.xen.raise(21);
    EXPECT_EQ(m.xen.head_of(0), 20u);
    EXPECT_EQ(m.xen.event_word(20), 0xa0000015u) << "pending, linked, and the link to port 21";
    EXPECT_EQ(m.xen.event_word(21), 0xa0000000u);
    EXPECT_TRUE(m.xen.deliver());
    EXPECT_EQ(order.served, (std::vector<u32>{20, 21}));
    m.xen.raise(22);
    m.xen.raise(20);
    EXPECT_TRUE(m.xen.deliver());
    EXPECT_EQ(order.served, (std::vector<u32>{20, 21, 22, 20}));
    EXPECT_EQ(m.guest.events().unexpected(), 0u);
}

TEST(XenFifoEvents, LinksThatLeadNowhereOrRoundEnd) {
    for (const u32 beyond : {1024u, 0x1ffffu}) {
        Fifo m;
        Order order;
        order.bind(m, 20);
        order.bind(m, 21);
        m.xen.raise(20);
        m.xen.event_word(20) |= beyond;
        EXPECT_TRUE(m.xen.deliver());
        EXPECT_EQ(order.served, std::vector<u32>{20});
        EXPECT_EQ(m.guest.events().unexpected(), 1u);
        EXPECT_FALSE(m.xen.deliver());
        m.xen.event_cpus[0].tails = {};
        m.xen.raise(21); // the next queue is followed from its head
        EXPECT_TRUE(m.xen.deliver());
        EXPECT_EQ(order.served, (std::vector<u32>{20, 21}));
    }
    { // a loop, and a port that is its own successor: a link is taken once
        Fifo m;
        Order order;
        order.bind(m, 20);
        order.bind(m, 21);
        m.xen.raise(20);
        m.xen.raise(21);
        m.xen.event_word(21) |= 20;
        EXPECT_TRUE(m.xen.deliver());
        EXPECT_EQ(order.served, (std::vector<u32>{20, 21}));
        m.xen.event_cpus[0].tails = {};
        m.xen.raise(20);
        m.xen.event_word(20) |= 20;
        EXPECT_TRUE(m.xen.deliver());
        EXPECT_EQ(order.served, (std::vector<u32>{20, 21, 20}));
        EXPECT_FALSE(m.xen.deliver());
    }
    { // a loop that Xen closes again and again is left after a bounded number of events
        Fifo m;
        Order order;
        order.bind(m, 20, [&] { m.xen.event_word(21) = 0xa0000014u; });
        order.bind(m, 21, [&] { m.xen.event_word(20) = 0xa0000015u; });
        m.xen.raise(20);
        m.xen.raise(21);
        EXPECT_TRUE(m.xen.deliver());
        EXPECT_EQ(order.served.size(), hv::xen::Events::max_queued);
        EXPECT_EQ(m.xen.upcall_pending(), 1);
    }
}

// A port with a word and without a slot for a handler: Xen allocates the lowest free port, so only a hostile one gets
// there.
TEST(XenFifoEvents, APortBeyondTheSlotsIsMasked) {
    Fifo m;
    const u32 port = hv::xen::Events::capacity;
    m.xen.event_word(port) = 0;
    m.xen.raise(port);
    EXPECT_TRUE(m.xen.deliver());
    EXPECT_EQ(m.guest.events().unexpected(), 1u);
    EXPECT_EQ(m.xen.event_word(port), 0x40000000u);
}

TEST(XenFifoEvents, WithheldOrRefused) {
    {
        Several m({0}, false);
        m.xen.offers_fifo = true;
        m.withhold_fifo = true;
        m.begin(1);
        EXPECT_FALSE(m.guest.events().fifo());
        EXPECT_FALSE(m.xen.fifo);
    }
    { // the very first control block is refused: two-level
        Several m({0, 1}, false);
        m.xen.offers_fifo = true;
        m.xen.refuse_control = 0;
        m.begin(2);
        EXPECT_FALSE(m.guest.events().fifo());
        Where a;
        EXPECT_EQ(*m.guest.events().bind(Port{70}, Where::note, &a, 1), 1u);
        EXPECT_FALSE(m.guest.events().unmask(Port{70}));
        m.xen.raise(70);
        EXPECT_TRUE(m.xen.deliver());
        EXPECT_EQ(a.processors, std::vector<u32>{1});
    }
    { // Xen has switched: there is no way back
        Several m({0}, false);
        m.xen.offers_fifo = m.xen.refuse_array = true;
        EXPECT_EQ(m.install().error().code, Code::not_supported);
    }
    { // a further processor without a control block: processor 0 takes its events
        Several m({0, 1}, false);
        m.xen.offers_fifo = true;
        m.xen.refuse_control = 1;
        m.begin(2);
        Where a;
        EXPECT_FALSE(m.xen.deliver()) << "that processor acknowledges its upcalls, or they would come for ever";
        EXPECT_EQ(*m.guest.events().bind(Port{70}, Where::note, &a, 1), 0u);
        EXPECT_FALSE(m.guest.events().unmask(Port{70}));
        m.xen.raise(70);
        EXPECT_TRUE(m.xen.deliver());
        EXPECT_EQ(a.processors, std::vector<u32>{0});
    }
}

TEST(XenFifoEvents, InAnotherDomain) {
    for (bool offered : {true, false}) {
        Fifo m({0, 5});
        Where old;
        m.bind(80, old, 1);
        for (auto& each : m.xen.event_cpus) {
            each = {.processor = each.processor};
        }
        m.xen.port_vcpu.clear();
        m.xen.fifo = false;
        m.xen.offers_fifo = offered;
        ASSERT_TRUE(m.guest.events().restart());
        EXPECT_EQ(m.guest.events().fifo(), offered);
        Where a;
        EXPECT_EQ(*m.guest.events().bind(Port{71}, Where::note, &a, 1), 1u);
        EXPECT_FALSE(m.guest.events().unmask(Port{71}));
        m.xen.raise(71);
        EXPECT_TRUE(m.xen.deliver());
        EXPECT_EQ(a.processors, std::vector<u32>{1});
        EXPECT_TRUE(old.processors.empty());
    }
}

// ---- timer ----

struct Timers : Several {
    explicit Timers(std::vector<u32> ids, bool fifo = false) : Several(ids, false) {
        xen.offers_fifo = fifo;
        begin(static_cast<u32>(ids.size()));
        for (u32 i = 0; i < ids.size(); ++i) {
            xen.set_time(ids[i], __builtin_ia32_rdtsc(), 5'000'000'000 * (i + 1)); // each has a time of its own
        }
    }
    Result<void> start(u32 processor, Where& where) {
        const On on(processor);
        return guest.timer()->start(Where::note, &where);
    }
    bool arm(u32 processor, Nanoseconds length) {
        const On on(processor);
        return guest.timer()->arm(length);
    }
};

TEST(XenTimer, EachProcessorHasOneInSystemTime) {
    for (const bool fifo : {false, true}) {
        Timers m({0, 5}, fifo);
        Where where;
        for (u32 processor : {0u, 1u}) {
            ASSERT_TRUE(m.start(processor, where));
        }
        const u32 first = m.xen.event_cpus[0].timer_port;
        const u32 second = m.xen.event_cpus[5].timer_port;
        ASSERT_TRUE(first != 0 && second != 0);
        EXPECT_EQ(m.xen.priorities.contains(first), fifo);
        EXPECT_TRUE(m.arm(0, 2'000'000));
        EXPECT_TRUE(m.arm(1, 3'000'000));
        EXPECT_GE(*m.xen.event_cpus[0].expiry, 5'002'000'000u);
        EXPECT_LT(*m.xen.event_cpus[0].expiry, 9'000'000'000u);
        EXPECT_GE(*m.xen.event_cpus[5].expiry, 10'003'000'000u);
        EXPECT_LT(*m.xen.event_cpus[5].expiry, 14'000'000'000u);
        m.xen.expire(5);
        EXPECT_TRUE(m.xen.deliver());
        EXPECT_EQ(where.processors, std::vector<u32>{1});
        EXPECT_TRUE(m.arm(0, 7'000'000)) << "replaces the earlier one";
        EXPECT_GE(*m.xen.event_cpus[0].expiry, 5'007'000'000u);
        m.xen.expire(0);
        EXPECT_TRUE(m.xen.deliver());
        EXPECT_EQ(where.processors, (std::vector<u32>{1, 0}));
        // Neither the sum nor what Xen takes for a signed number overflows.
        EXPECT_TRUE(m.arm(1, ~Nanoseconds{0}));
        EXPECT_EQ(*m.xen.event_cpus[5].expiry, 0x7fffffffffffffffu);
        m.xen.set_time(5, 0, ~u64{0});
        EXPECT_TRUE(m.arm(1, 1));
        EXPECT_EQ(*m.xen.event_cpus[5].expiry, 0x7fffffffffffffffu);
        EXPECT_EQ(m.guest.events().unexpected(), 0u);
        {
            const On on(1);
            m.guest.leave(1);
        }
        EXPECT_FALSE(m.xen.event_cpus[5].expiry) << "no interrupt any more";
    }
}

TEST(XenTimer, AnExpiryThatHasPassedIsSetAgainAndRefusalsEnd) {
    Timers m({0});
    Where where;
    ASSERT_TRUE(m.start(0, where));
    m.xen.timer_refusals = 3;
    EXPECT_TRUE(m.arm(0, 10));
    ASSERT_EQ(m.xen.expiries.size(), 4u);
    EXPECT_GE(m.xen.expiries[3], m.xen.expiries[0] + 8'000 - 10) << "each time further in the future";
    EXPECT_EQ(m.xen.event_cpus[0].expiry, m.xen.expiries[3]);
    m.xen.expiries.clear();
    m.xen.timer_refusals = ~0u;
    EXPECT_FALSE(m.arm(0, 10));
    EXPECT_EQ(m.xen.expiries.size(), 8u);
    m.xen.expiries.clear();
    m.xen.timer_error = -22;
    EXPECT_FALSE(m.arm(0, 10)) << "the processor must not sleep";
    EXPECT_EQ(m.xen.expiries.size(), 1u);
    m.xen.timer_refusals = 0;
    m.xen.set_time(0, 0, 0, 0); // Xen does not tell the time any more
    EXPECT_FALSE(m.arm(0, 10));
}

TEST(XenTimer, WithoutWhatItNeedsTheOtherOneRemains) {
    {
        fake::Machine m;
        EXPECT_EQ(m.guest.timer(), nullptr) << "before start()";
    }
    const auto refused = [](auto&& change) {
        Timers m({0});
        change(m);
        const auto ports = m.xen.open_ports;
        Where where;
        const auto started = m.start(0, where);
        EXPECT_EQ(started ? Code::protocol : started.error().code, Code::not_supported);
        EXPECT_EQ(m.xen.open_ports, ports);
        EXPECT_FALSE(m.arm(0, 10));
    };
    refused([](Timers& m) { m.xen.offers_timer = false; });
    refused([](Timers& m) { m.xen.refuse_virqs = true; });
    refused([](Timers& m) { m.xen.set_time(0, 0, 0, 0); });
    refused([](Timers& m) { m.guest.events().withdraw(0); });
    Timers m({0}); // a port that has no slot for a handler is given back
    m.xen.next_port = hv::xen::Events::capacity;
    Where where;
    EXPECT_EQ(m.start(0, where).error().code, Code::exhausted);
    EXPECT_FALSE(m.xen.open_ports.contains(hv::xen::Events::capacity));
}

TEST(XenClock, CyclesAndNanoseconds) {
    using namespace hv::xen;
    EXPECT_EQ(scaled(1'000, 0x80000000, 1), 1'000u);
    EXPECT_EQ(scaled(3'000, 0x80000000, 0), 1'500u);
    EXPECT_EQ(scaled(3'000, 0x80000000, -1), 750u);
    EXPECT_EQ(scaled(u64{1} << 40, 0x80000000, 1), u64{1} << 40) << "the product has more than 64 bits";
    EXPECT_EQ(scaled(~u64{0}, 0x80000000, 1), ~u64{0});
    EXPECT_EQ(scaled(~u64{0}, 0xffffffff, 31), ~u64{0}) << "not the lower bits";
    EXPECT_EQ(scaled(1, 0, 0), std::nullopt);
    EXPECT_EQ(scaled(1, 1, 32), std::nullopt);
    EXPECT_EQ(scaled(1, 1, -32), std::nullopt);
    VcpuTimeInfo time{};
    time.version = 2;
    time.tsc_timestamp = 1'000;
    time.system_time = 70;
    time.tsc_to_system_mul = 0x80000000;
    time.tsc_shift = 1;
    EXPECT_EQ(system_time(time, 1'500), 570u);
    EXPECT_EQ(system_time(time, 999), 70u) << "a counter that is behind";
    time.system_time = ~u64{0} - 5;
    EXPECT_EQ(system_time(time, 1'500), ~u64{0});
    time.version = 3;
    EXPECT_EQ(system_time(time, 1'500), std::nullopt) << "Xen is writing";
}

// ---- stolen time ----

// Typed from xen/include/public/vcpu.h: int state, uint64_t state_entry_time, uint64_t time[4].
TEST(XenStolenTime, TheRunStateHasXensLayout) {
    alignas(8) std::array<u8, 48> bytes{
        0x01, 0,    0, 0, 0xee, 0xee, 0xee, 0xee, // RUNSTATE_runnable, padding
        0xe8, 0x03, 0, 0, 0,    0,    0,    0,    // entered at 1000
        0x01, 0,    0, 0, 0,    0,    0,    0,    // running
        0x20, 0,    0, 0, 0,    0,    0,    0,    // runnable
        0x00, 0x03, 0, 0, 0,    0,    0,    0,    // blocked
        0x00, 0,    4, 0, 0,    0,    0,    0,    // offline
    };
    const auto& info = *reinterpret_cast<const hv::xen::RunstateInfo*>(bytes.data());
    EXPECT_EQ(info.state_entry_time, 1000u);
    EXPECT_EQ(hv::xen::stolen_time(info), 0x40020u);
}

TEST(XenStolenTime, EachProcessorHasItsOwn) {
    Several m({0, 5}, false);
    EXPECT_EQ(m.guest.stolen(), std::nullopt) << "before install()";
    m.begin(2);
    m.xen.steal(0, 30, 7);
    m.xen.steal(5, 0, 4);
    const u64 calls = m.xen.calls[24];
    EXPECT_EQ(m.guest.stolen(), 37u);
    EXPECT_EQ(m.xen.calls[24], calls + 1);
    {
        const On on(1);
        EXPECT_EQ(m.guest.stolen(), 4u);
    }
    m.xen.offers_runstate = false;
    EXPECT_EQ(m.guest.stolen(), std::nullopt);
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
