#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.log;
import core.time;
import core.dma;
import core.interrupt;
import core.cpuid;
import io.executor;
import hv.backend;
import hv.bare;
import hv.visit;
import hv.list;
#ifdef FIRSTLIGHT_HV_KVM
import hv.kvm;
import hv.kvm.protocol;
#endif

#include "unit/core/interrupt_fake.hpp"

namespace {
using namespace fl;
using hv::VmGuest;

// The trace of calls, in order, as promised by the concepts' comments.
std::string trace;
bool refuse_install = false;
bool refuse_start = false;

struct Alpha {
    static constexpr std::string_view name = "alpha";
    static constexpr VmGuest guest = VmGuest::xen;
    static bool recognises(const hv::Sightings& s) { return s.has(VmGuest::xen); }
    Alpha() { trace += "alpha() "; }
    ~Alpha() { trace += "~alpha "; }
    Result<void> install(hv::Environment&) {
        trace += "alpha.install ";
        return refuse_install ? Result<void>(Error{Code::not_supported, "no hypercall page"}) : Result<void>();
    }
    Result<void> start(hv::Services&) {
        trace += "alpha.start ";
        return refuse_start ? Result<void>(Error{Code::not_supported, "no callback"}) : Result<void>();
    }
    std::optional<u64> tsc_hz() const { return 1; }
    std::string_view clock_name() const { return "alpha"; }
    std::array<std::byte, 1 << 20> large{}; // must not be put on the stack
};
static_assert(hv::Backend<Alpha>);

constexpr hv::BackendList<Alpha, hv::Bare> two;

struct NoMemory final : DmaAllocator {
    Result<DmaSpan> allocate(u32, u64) override { return Error{Code::exhausted, "none"}; }
    void free(DmaSpan) override {}
};
struct NoMap final : hv::PhysicalMemory {
    Result<std::byte*> map(u64, u64) override { return Error{Code::not_found, "none"}; }
    u64 physical_of(const void* p) override { return reinterpret_cast<u64>(p); }
};
struct FakeCpu final : hv::Privileged {
    std::vector<std::pair<u32, u64>> msr_writes;
    void (*on_write)(u32 msr, u64 value) = nullptr;
    u64 read_msr(u32) override { return 0; }
    void write_msr(u32 msr, u64 value) override {
        msr_writes.emplace_back(msr, value);
        if (on_write != nullptr) {
            on_write(msr, value);
        }
    }
    u8 in8(u16) override { return 0xff; }
    u16 in16(u16) override { return 0xffff; }
    u32 in32(u16) override { return ~0u; }
    void out8(u16, u8) override {}
    void out16(u16, u16) override {}
    CpuidRegisters cpuid_leaf(u32) override { return {}; }
    void out32(u16, u32) override {}
};
struct Heap final : DmaAllocator {
    usize live = 0;
    Result<DmaSpan> allocate(u32 size, u64) override {
        auto* p = static_cast<std::byte*>(::operator new(size, std::align_val_t{page_size}));
        std::memset(p, 0, size);
        ++live;
        return DmaSpan{p, reinterpret_cast<u64>(p), size};
    }
    void free(DmaSpan span) override {
        ::operator delete(span.data, std::align_val_t{page_size});
        --live;
    }
};

struct Backend : ::testing::Test {
    CpuidSnapshot cpuid;
    hv::Sightings sightings;
    Heap memory;
    NoMap physical;
    FakeCpu cpu;
    hv::Environment environment{cpuid, sightings, memory, physical, cpu};
    test::Interrupts interrupts;
    io::Executor executor{
        io::Platform{nullptr, [](void*) -> Instant { return 0; }, [](void*, Instant, const std::atomic<bool>&) {}}};
    hv::Services services{interrupts, executor};

    void SetUp() override {
        trace.clear();
        refuse_install = false;
        refuse_start = false;
    }
    void sight(VmGuest guest) {
        sightings.list[sightings.count] = {};
        sightings.list[sightings.count].guest = guest;
        sightings.list[sightings.count++].base = 0x40000000;
    }
    // What boot does, with a trace in place of a kernel.
    void boot(hv::Choice choice) {
        hv::with_backend(two, choice, environment, [&](auto& backend) {
            trace += "early:" + std::string(backend.name) + " ";
            hv::upgrade(two, choice, environment, services, backend,
                        [&](auto& last) { trace += "buses:" + std::string(last.name) + " "; });
        });
    }
    static hv::Choice choice(VmGuest guest, hv::When when = hv::When::entry) {
        hv::Choice c;
        c.guest = guest;
        c.when = when;
        return c;
    }
};

TEST_F(Backend, InstalledAtTheEntry) {
    sight(VmGuest::xen);
    boot(choice(VmGuest::xen));
    EXPECT_EQ(trace, "alpha() alpha.install early:alpha alpha.start buses:alpha ~alpha ");
}

TEST_F(Backend, InstalledAfterAFullyVirtualisedStart) {
    sight(VmGuest::xen);
    boot(choice(VmGuest::xen, hv::When::late));
    EXPECT_EQ(trace, "early:bare alpha() alpha.install alpha.start buses:alpha ~alpha ");
}

TEST_F(Backend, WhatFailsLeavesTheMachineBare) {
    sight(VmGuest::xen);
    refuse_install = true;
    boot(choice(VmGuest::xen));
    EXPECT_EQ(trace, "alpha() alpha.install early:bare buses:bare ~alpha ");
    trace.clear();
    boot(choice(VmGuest::xen, hv::When::late));
    EXPECT_EQ(trace, "early:bare alpha() alpha.install buses:bare ~alpha ");
    trace.clear();
    refuse_install = false;
    refuse_start = true;
    boot(choice(VmGuest::xen));
    EXPECT_EQ(trace, "alpha() alpha.install early:alpha alpha.start buses:bare ~alpha ");
    trace.clear();
    boot(choice(VmGuest::xen, hv::When::late));
    EXPECT_EQ(trace, "early:bare alpha() alpha.install alpha.start buses:bare ~alpha ");
}

TEST_F(Backend, WithoutAModuleItIsBare) {
    for (const hv::When when : {hv::When::entry, hv::When::late}) {
        for (const VmGuest guest : {VmGuest::bare, VmGuest::vmware, VmGuest::hyperv}) {
            trace.clear();
            boot(choice(guest, when));
            EXPECT_EQ(trace, "early:bare buses:bare ");
        }
    }
}

TEST_F(Backend, UndetectedOnlyOnRequest) {
    boot(choice(VmGuest::xen));
    EXPECT_EQ(trace, "early:bare buses:bare ") << "its own recognises() says no";
    trace.clear();
    auto forced = choice(VmGuest::xen);
    forced.overridden = true;
    boot(forced);
    EXPECT_EQ(trace, "alpha() alpha.install early:alpha alpha.start buses:alpha ~alpha ");
}

TEST_F(Backend, VisitorsReturnValues) {
    const auto name =
        hv::with_backend(two, choice(VmGuest::bare), environment, [](auto& b) { return std::string(b.name); });
    EXPECT_EQ(name, "bare");
}

// The kernel's list: every build has Bare, as the last one; what a build leaves out is not in it.
template <class... Bs>
constexpr bool names(hv::BackendList<Bs...>, std::string_view name) {
    return (false || ... || (Bs::name == name));
}
static_assert(names(hv::list, "bare"));
#ifdef FIRSTLIGHT_HV_KVM
static_assert(names(hv::list, "kvm") && hv::built_for(VmGuest::kvm) && hv::built_for(VmGuest::tcg));
#else
static_assert(!names(hv::list, "kvm") && !hv::built_for(VmGuest::kvm));
#endif
static_assert(!hv::BusRoot<hv::Bare> && !hv::EmulatedDevices<hv::Bare> && hv::Clock<hv::Bare>);

// A capability of the type does not mean that an uninstalled instance has it: it returns nothing, and all functions can
// be called safely at any time.
template <class B>
void call_uninstalled(io::Executor& executor) {
    SCOPED_TRACE(B::name);
    const auto backend = std::make_unique<B>(); // too large for a stack
    EXPECT_FALSE(backend->tsc_hz());
    if constexpr (hv::BusRoot<B>) {
        EXPECT_EQ(backend->bus(), nullptr);
    }
    if constexpr (hv::OneShotTimer<B>) {
        EXPECT_EQ(backend->timer(), nullptr);
    }
    if constexpr (hv::Console<B>) {
        EXPECT_EQ(backend->console(), nullptr);
    }
    if constexpr (hv::EmulatedDevices<B>) {
        const auto done = backend->unplug({.disks = true});
        EXPECT_FALSE(done);
    }
    if constexpr (hv::Processors<B>) {
        EXPECT_TRUE(backend->join(1, executor));
    }
    if constexpr (hv::LeavesProcessors<B>) {
        backend->leave(1);
    }
    if constexpr (hv::TearDown<B>) {
        backend->uninstall();
        backend->uninstall();
    }
}
template <class... Bs>
void call_each(hv::BackendList<Bs...>, io::Executor& executor) {
    (call_uninstalled<Bs>(executor), ...);
}
TEST_F(Backend, UninstalledBackendsCanBeCalled) { call_each(hv::list, executor); }

#ifdef FIRSTLIGHT_HV_KVM
// A host's clock page, written from the documentation of MSR_KVM_SYSTEM_TIME_NEW: version 2, 2.5 GHz: mul = 2^32 * 0.8
// with shift -1, flags 1.
constexpr u8 golden_clock[32] = {2,    0,    0,   0, 0, 0, 0, 0, 0x15, 0xcd, 0x5b, 7,    0,    0, 0, 0,
                                 0x40, 0x42, 0xf, 0, 0, 0, 0, 0, 0xcc, 0xcc, 0xcc, 0xcc, 0xff, 1, 0, 0};

u8 clock_version = 2;
u8 clock_shift = 0xff;
u32 clock_mul = 0xcccccccc;

void host_fills_clock(u32 msr, u64 value) {
    if (msr != 0x4b564d01 || (value & 1) == 0) {
        return;
    }
    u8 page[32];
    std::memcpy(page, golden_clock, sizeof(page));
    page[0] = clock_version;
    page[28] = clock_shift;
    std::memcpy(page + 24, &clock_mul, 4);
    std::memcpy(reinterpret_cast<void*>(value & ~u64{1}), page, sizeof(page));
}

struct Kvm : Backend {
    void SetUp() override {
        Backend::SetUp();
        sight(VmGuest::kvm);
        sightings.list[0].features = 0x01007efb;
        cpu.on_write = host_fills_clock;
        clock_version = 2;
        clock_shift = 0xff;
        clock_mul = 0xcccccccc;
    }
};

TEST_F(Kvm, FrequencyFromTheClockPage) {
    hv::Kvm kvm;
    ASSERT_TRUE(hv::Kvm::recognises(sightings));
    ASSERT_TRUE(kvm.install(environment));
    // ns = (cycles >> 1) * 0.8: 2.5 cycles each.
    ASSERT_TRUE(kvm.tsc_hz());
    EXPECT_NEAR(static_cast<double>(*kvm.tsc_hz()), 2.5e9, 10);
    EXPECT_EQ(kvm.clock_name(), "kvmclock");
    // Enabled once, then withdrawn and the page freed: the host no longer writes to guest memory.
    ASSERT_EQ(cpu.msr_writes.size(), 2u);
    EXPECT_EQ(cpu.msr_writes[0].first, 0x4b564d01u);
    EXPECT_EQ(cpu.msr_writes[0].second & 0xfff, 1u);
    EXPECT_EQ(cpu.msr_writes[1], (std::pair<u32, u64>{0x4b564d01u, 0}));
    EXPECT_EQ(memory.live, 0u);
    EXPECT_TRUE(kvm.start(services));
}

TEST_F(Kvm, AnImplausibleClockIsRejected) {
    const auto install = [&] {
        hv::Kvm kvm;
        EXPECT_TRUE(kvm.install(environment)) << "no clock is no reason not to boot";
        EXPECT_EQ(memory.live, 0u);
        EXPECT_EQ(cpu.msr_writes.back().second, 0u);
        return kvm.tsc_hz();
    };
    EXPECT_TRUE(install());
    clock_version = 3; // permanently in the middle of an update
    EXPECT_FALSE(install());
    clock_version = 0; // never written
    EXPECT_FALSE(install());
    clock_version = 2;
    clock_mul = 0;
    EXPECT_FALSE(install());
    clock_mul = 1; // 4 * 10^18 Hz and more
    EXPECT_FALSE(install());
    clock_mul = 0xcccccccc;
    clock_shift = 0x80;
    EXPECT_FALSE(install());
    clock_shift = 31;
    EXPECT_FALSE(install());
}

TEST_F(Kvm, TouchesNoMsrThatIsNotAnnounced) {
    sightings.list[0].features = 0;
    hv::Kvm kvm;
    ASSERT_TRUE(kvm.install(environment));
    EXPECT_FALSE(kvm.tsc_hz());
    EXPECT_TRUE(cpu.msr_writes.empty());
    sightings.list[0].guest = VmGuest::tcg;
    EXPECT_TRUE(hv::Kvm::recognises(sightings));
    ASSERT_TRUE(kvm.install(environment));
    EXPECT_TRUE(cpu.msr_writes.empty());
}

TEST_F(Kvm, CpuidComesFirst) {
    scan_cpuid(cpuid, [](u32 leaf, u32) {
        switch (leaf) {
        case 0x40000000: return CpuidRegisters{0x40000010, 0x4b4d564b, 0x564b4d56, 0x4d};
        case 0x40000001: return CpuidRegisters{0x01007efb, 0, 0, 0};
        case 0x40000010: return CpuidRegisters{3000000, 1000000, 0, 0};
        default: return CpuidRegisters{};
        }
    });
    hv::Kvm kvm;
    ASSERT_TRUE(kvm.install(environment));
    EXPECT_EQ(kvm.tsc_hz(), 3'000'000'000u);
    EXPECT_EQ(kvm.clock_name(), "cpuid");
    EXPECT_TRUE(cpu.msr_writes.empty());
}

TEST_F(Kvm, WithoutMemoryInstallSaysSo) {
    NoMemory none;
    hv::Environment poor{cpuid, sightings, none, physical, cpu};
    hv::Kvm kvm;
    const auto done = kvm.install(poor);
    ASSERT_FALSE(done);
    EXPECT_EQ(done.error().code, Code::exhausted);
    EXPECT_TRUE(cpu.msr_writes.empty());
}

static_assert(hv::kvm::frequency_of(0x80000000u, 0) == 2'000'000'000u); // 0.5 ns a cycle
static_assert(hv::kvm::frequency_of(0x80000000u, 1) == 1'000'000'000u);
static_assert(hv::kvm::frequency_of(0x80000000u, -1) == 4'000'000'000u);
#endif
} // namespace
