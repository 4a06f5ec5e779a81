// The kernel's guest side and the test host in one process: this file adds only the SynIC's pages and the hypercalls
// between them. Guest-physical addresses differ from host addresses, so that a mix-up is detected.
#include "gtest_macros.hpp"

#include "zeroed.hpp"

import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.cpuid;
import core.dma;
import core.log;
import core.interrupt;
import core.physical;
import io.executor;
import io.task;
import io.block;
import hv.detect;
import hv.hyperv;
import drivers.driver;
import drivers.storvsc;
import host.vmbus;
import host.storvsp;
import host.services;

#include "unit/core/interrupt_fake.hpp"
#include "unit/io/support.hpp"

namespace {

using namespace fl;
using host::Fault;

constexpr u64 ram_base = 0x1000000;
constexpr usize ram_bytes = 16 << 20;

/// Guest memory: pages are allocated only once.
class Arena final : public DmaAllocator {
  public:
    std::span<std::byte> bytes() const { return storage_.bytes(); }
    Result<DmaSpan> allocate(u32 size, u64) override {
        const usize whole = (usize{size} + 4095) & ~usize{4095};
        if (whole > ram_bytes - used_) {
            return Error{Code::exhausted, "the arena is used up"};
        }
        const DmaSpan span{storage_.data() + used_, ram_base + used_, static_cast<u32>(whole)};
        used_ += whole;
        return span;
    }
    void free(DmaSpan) override {}

  private:
    Zeroed storage_{ram_bytes};
    usize used_ = 0;
};

class Disks final : public drivers::DiskSink {
  public:
    bool offered(u32) override { return true; }
    FixedText<16> free_name(std::string_view prefix) override {
        return drivers::disk_name(prefix, static_cast<u32>(list.size()));
    }
    Result<void> announce(io::BlockDevice& disk, u32) override {
        list.push_back(&disk);
        return {};
    }
    std::vector<io::BlockDevice*> list;
};

/// Registers, hypercalls, SynIC pages: the processor's and KVM's part between the two.
class Joined final : public host::Delivery, public host::Log, public hv::Privileged, public hv::PhysicalMemory {
  public:
    explicit Joined(const host::ServerConfig& config = {}, const host::StorageConfig& storage = {})
        : image(1 << 20), store(image) {
        memory.add(ram_base, arena.bytes());
        server.emplace(memory, *this, *this, config);
        controller = &server->add(host::StorageDevice::scsi(storage, {{.store = &store}}));
        const auto leaf = [&](u32 number, CpuidRegisters r) {
            cpuid.leaves[cpuid.leaf_count++] = {0x40000000 + number, 0, r};
        };
        leaf(3, {0xe7f, 0x30, 0, 0});
        leaf(4, {});
        hv::Sighting s;
        s.guest = hv::VmGuest::hyperv;
        s.base = 0x40000000;
        s.max_leaf = 0x40000005;
        s.version = 10 << 16;
        s.features = 0xe7f;
        s.features_high = 0x30;
        sightings.list[sightings.count++] = s;
        guest.set_gate(
            {this, [](void* c, u64 control, u64 input, u64) { return static_cast<Joined*>(c)->call(control, input); },
             page});
        clock.on_idle = [](void* c) { static_cast<Joined*>(c)->idle(); };
        clock.on_idle_context = this;
    }

    // ---- called by the guest ----
    alignas(4096) static constexpr u8 page[4096]{};
    u64 call(u64 control, u64 input) {
        if (control == 0x1005d) {
            return static_cast<u64>(server->on_signal(static_cast<u32>(input), static_cast<u16>(input >> 32)));
        }
        const auto bytes = memory.at(input, 256);
        if (control != 0x5c || bytes.empty()) {
            return 3;
        }
        std::array<u32, 4> head;
        std::memcpy(head.data(), bytes.data(), 16);
        const auto status = server->on_message(head[0], head[2], bytes.subspan(16, std::min<u32>(head[3], 240)));
        server->poll(clock.time);
        return static_cast<u64>(status);
    }
    u64 read_msr(u32 number) override { return number == 0x40000020 ? clock.time / 100 : msrs[number]; }
    void write_msr(u32 number, u64 value) override {
        msrs[number] = value;
        if (number == 0x40000084) {
            server->on_end_of_message(0, 2);
            server->poll(clock.time);
        }
    }
    u8 in8(u16) override { return 0; }
    u16 in16(u16) override { return 0; }
    u32 in32(u16) override { return 0; }
    void out8(u16, u8) override {}
    void out16(u16, u16) override {}
    CpuidRegisters cpuid_leaf(u32) override { return {}; }
    void out32(u16, u32) override {}
    Result<std::byte*> map(u64 physical, u64 size) override { return memory.at(physical, size).data(); }
    u64 physical_of(const void* address) override {
        return static_cast<u64>(static_cast<const std::byte*>(address) - arena.bytes().data()) + ram_base;
    }

    // ---- called by the host ----
    std::byte* synic_page(u32 msr) {
        const u64 value = msrs[msr];
        return (value & 1) != 0 && (msrs[0x40000080] & 1) != 0 ? memory.page(value >> 12) : nullptr;
    }
    Message post(u32 vp, u8 sint, u32 type, std::span<const std::byte> payload) override {
        std::byte* const slot = synic_page(0x40000083) == nullptr ? nullptr : synic_page(0x40000083) + sint * 256;
        if (vp != 0 || slot == nullptr) {
            return Message::refused;
        }
        u32 there;
        std::memcpy(&there, slot, 4);
        if (there != 0) {
            slot[5] |= std::byte{1};
            return Message::busy;
        }
        std::memset(slot, 0, 256);
        slot[4] = static_cast<std::byte>(payload.size());
        std::memcpy(slot + 16, payload.data(), payload.size());
        std::memcpy(slot, &type, 4);
        interrupt_pending = true;
        return Message::delivered;
    }
    Event set_event(u32 vp, u8 sint, u16 flag, bool always) override {
        std::byte* const flags = synic_page(0x40000082) == nullptr ? nullptr : synic_page(0x40000082) + sint * 256;
        if (vp != 0 || flags == nullptr) {
            return Event::refused;
        }
        const auto bit = static_cast<std::byte>(1 << flag % 8);
        const bool was = (flags[flag / 8] & bit) != std::byte{0};
        flags[flag / 8] |= bit;
        interrupt_pending = interrupt_pending || !was || always;
        return was && !always ? Event::pending : Event::raised;
    }
    void line(std::string_view text) override { lines.emplace_back(text); }

    void idle() {
        for (int i = 0; i < 512; ++i) {
            const bool served = server->poll(clock.time);
            const bool interrupted = std::exchange(interrupt_pending, false) && interrupts.handler != nullptr;
            if (interrupted) {
                interrupts.handler(interrupts.context);
            }
            if (!served && !interrupted) {
                break;
            }
        }
    }

    // ---- the steps of a guest ----
    Result<void> start() {
        hv::Environment machine{cpuid, sightings, arena, *this, *this};
        if (auto installed = guest.install(machine); !installed) {
            return installed;
        }
        hv::Services services{interrupts, executor, timeout};
        if (auto started = guest.start(services); !started) {
            return started;
        }
        hv::DeviceList devices;
        return executor.run(guest.bus()->enumerate(devices));
    }
    Result<void> attach() {
        std::optional<hv::hyperv::Offer> offer;
        guest.bus()->vmbus().for_each_offer([&](const hv::hyperv::Offer& one) {
            if (!offer) {
                offer = one;
            }
        });
        if (!offer) {
            return Error{Code::not_found, "no offer"};
        }
        // What outlives the probe refers to it.
        environment.emplace(drivers::Environment{executor, arena, interrupts, disks, timeout});
        return executor.run(drivers::storvsc::attach(*environment, guest.bus()->vmbus(), *offer));
    }
    io::BlockDevice* up() {
        EXPECT_TRUE(start());
        EXPECT_TRUE(attach());
        return disks.list.empty() ? nullptr : disks.list[0];
    }
    bool logged(std::string_view text) const { return log.has(text); }

    static constexpr Nanoseconds timeout = 200'000'000;
    test::CapturedLog log;
    std::vector<std::byte> image;
    host::MemoryStore store;
    Arena arena;
    host::GuestMemory memory;
    std::optional<host::Server> server;
    host::StorageDevice* controller = nullptr;
    std::vector<std::string> lines;
    std::map<u32, u64> msrs;
    bool interrupt_pending = false;
    test::Interrupts interrupts{0x41};
    Disks disks;
    test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    CpuidSnapshot cpuid;
    hv::Sightings sightings;
    std::optional<drivers::Environment> environment;
    hv::HyperV guest;
};

io::Task<Result<void>> write_one(io::BlockDevice& disk, u64 lba, DmaSpan data) {
    co_return co_await disk.write(lba, data);
}
io::Task<Result<void>> read_one(io::BlockDevice& disk, u64 lba, DmaSpan data) {
    co_return co_await disk.read(lba, data);
}
io::Task<Result<void>> flush_one(io::BlockDevice& disk) { co_return co_await disk.flush(); }

void fill(DmaSpan span, u32 seed) {
    for (u32 i = 0; i < span.size; ++i) {
        span.data[i] = static_cast<std::byte>(i * 31 + seed * 17 + (i >> 8));
    }
}

/// Writes blocks of 4 KiB and reads them back; every acknowledged write must be in the image. Bounded by the requests'
/// time-outs.
struct Outcome {
    u32 written = 0;
    u32 read = 0;
    u32 failed = 0;
};
Outcome work(Joined& machine, io::BlockDevice& disk) {
    Outcome outcome;
    const DmaSpan out = *machine.arena.allocate(4096, ~u64{0});
    const DmaSpan in = *machine.arena.allocate(4096, ~u64{0});
    for (u32 i = 0; i < 16; ++i) {
        fill(out, i);
        const u64 lba = 64 + i * 8;
        if (!machine.executor.run(write_one(disk, lba, out))) {
            ++outcome.failed;
            continue;
        }
        ++outcome.written;
        EXPECT_EQ(std::memcmp(machine.image.data() + lba * 512, out.data, 4096), 0) << "an acknowledged write is lost";
        std::memset(in.data, 0, 4096);
        if (machine.executor.run(read_one(disk, lba, in))) {
            ++outcome.read;
            EXPECT_EQ(std::memcmp(in.data, out.data, 4096), 0) << "read something else than was written";
        } else {
            ++outcome.failed;
        }
    }
    return outcome;
}

TEST(HostJoined, ReadsAndWrites) {
    Joined machine;
    io::BlockDevice* disk = machine.up();
    ASSERT_NE(disk, nullptr);
    EXPECT_EQ(disk->geometry().sectors, 2048u);
    EXPECT_EQ(machine.server->negotiated_version(), 0x00050003u);
    EXPECT_EQ(machine.controller->negotiated_version(), 0x0602);
    const Outcome outcome = work(machine, *disk);
    EXPECT_EQ(outcome.written, 16u);
    EXPECT_EQ(outcome.read, 16u);
    EXPECT_TRUE(machine.executor.run(flush_one(*disk)));
    EXPECT_EQ(machine.server->counters().flushes, 1u);
    EXPECT_EQ(machine.server->counters().violations, 0u);
    for (const std::string& line : machine.lines) {
        EXPECT_EQ(line.find("violation"), std::string::npos) << line;
    }
    machine.guest.uninstall();
    machine.idle();
    EXPECT_TRUE(machine.server->unloaded());
}

TEST(HostJoined, EveryVersionOfTheBusAndOfTheProtocol) {
    for (const u32 version : {0x00050003u, 0x00050002u, 0x00050001u, 0x00050000u, 0x00040001u, 0x00040000u, 0x00030000u,
                              0x00020004u, 0x00010001u, 0x0000000du}) {
        for (const u16 storage : {0x0602, 0x0600, 0x0501, 0x0402, 0x0200}) {
            SCOPED_TRACE(testing::Message() << std::hex << version << ", " << storage);
            host::ServerConfig config;
            config.maximum_version = version;
            Joined machine(config, {.versions = {storage}});
            io::BlockDevice* disk = machine.up();
            ASSERT_NE(disk, nullptr);
            EXPECT_EQ(machine.server->negotiated_version(), version);
            EXPECT_EQ(machine.controller->negotiated_version(), storage);
            EXPECT_EQ(work(machine, *disk).read, 16u);
            EXPECT_EQ(machine.server->counters().violations, 0u);
            for (const std::string& line : machine.lines) {
                EXPECT_EQ(line.find("violation"), std::string::npos) << line;
            }
        }
    }
}

struct FaultCase {
    Fault fault;
    u32 after;
    bool disk;      // a disk attaches
    bool continues; // all but a few requests still work
    const char* line;
};
class HostJoinedFault : public testing::TestWithParam<FaultCase> {};

TEST_P(HostJoinedFault, EndsInABoundAndLosesNothing) {
    const FaultCase& c = GetParam();
    host::ServerConfig config;
    config.fault = {c.fault, c.after, 1};
    Joined machine(config);
    const auto started = machine.start();
    if (started) {
        static_cast<void>(machine.attach()); // the disks show the result
    }
    EXPECT_EQ(!machine.disks.list.empty(), c.disk);
    if (!machine.disks.list.empty()) {
        if (c.fault == Fault::signal_storm) { // a storm counts as one only while nothing else happens
            const DmaSpan data = *machine.arena.allocate(4096, ~u64{0});
            for (u32 i = 0; i < 64 && machine.server->faults_injected() == 0; ++i) {
                EXPECT_TRUE(machine.executor.run(read_one(*machine.disks.list[0], 0, data)));
            }
            for (u32 i = 0; i < 20; ++i) {
                machine.executor.turn();
            }
        }
        const Outcome outcome = work(machine, *machine.disks.list[0]);
        EXPECT_EQ(outcome.written >= 14, c.continues) << outcome.written << " written, " << outcome.failed << " failed";
    }
    EXPECT_GE(machine.server->faults_injected() + (c.fault == Fault::refuse_versions ||
                                                   c.fault == Fault::refuse_new_versions ||
                                                   c.fault == Fault::refuse_storage_versions),
              1u);
    EXPECT_TRUE(machine.logged(c.line)) << machine.log.text.view();
    EXPECT_LT(machine.clock.time, u64{60'000'000'000});
    EXPECT_EQ(machine.server->counters().violations, 0u) << "the guest broke a rule while it coped";
    for (const std::string& line : machine.lines) {
        EXPECT_EQ(line.find("violation"), std::string::npos) << line;
    }
}

constexpr u32 later = 25; // number of SRBs after which the scan is complete, and a write comes next
constexpr FaultCase cases[] = {
    {Fault::write_index_beyond, later, true, false, "the host's write index moves backwards or is outside of the ring"},
    {Fault::read_index_beyond, later, true, false,
     "the host's read index is not between its last one and what was written"},
    {Fault::packet_too_long, later, true, false, "it is longer than the data in the ring"},
    {Fault::packet_too_short, later, true, false, "it is shorter than its header"},
    {Fault::packet_offset, later, true, false, "it is shorter than its header"},
    {Fault::packet_trailer, later, true, true, ""},
    {Fault::packet_type, later, true, false, "a packet of a type that a storage host does not send"},
    {Fault::rewrite_completion, later, true, false, "it is longer than the data in the ring"},
    {Fault::signal_storm, later, true, true, "more than 256 interrupts within"},
    {Fault::unknown_transaction, later, true, false, "a transaction id that is not in flight"},
    {Fault::repeated_completion, later, true, false, "a transaction id that is not in flight"},
    {Fault::early_completion, later, true, false, "a transaction id that is not in flight"},
    {Fault::no_answer, later, true, false, "no answer within 200 ms: asking the host to reset the bus"},
    {Fault::completion_too_long, later, true, false, "reports more data than was requested"},
    {Fault::short_transfer, 8, true, true, "success with 2048 of 4096 bytes transferred"},
    {Fault::medium_error, 8, true, true, "MEDIUM ERROR, write error (3/0c/00) at LBA 96"},
    {Fault::write_protected, 4, true, true, "DATA PROTECT, write protected (7/27/00)"},
    {Fault::unit_attention, later, true, true, "UNIT ATTENTION"},
    {Fault::no_version_response, 0, true, true, "messages by connection 0x1"},
    {Fault::no_gpadl_created, 0, false, false, ""},
    {Fault::no_open_result, 0, false, false, ""},
    {Fault::no_storage_version, 0, false, false, "no answer to QUERY_PROTOCOL_VERSION"},
    {Fault::refuse_versions, 0, false, false, "the host refuses every version of the VMBus from 5.3 down to 0.13"},
    {Fault::refuse_new_versions, 0, true, true, "VMBus 3.0"},
    {Fault::refuse_storage_versions, 0, false, false, "version 2.0 is refused"},
    {Fault::refuse_gpadl, 0, false, false, ""},
    {Fault::refuse_open, 0, false, false, ""},
    {Fault::rescind_at_open, 0, false, false, "the host rescinds channel 1"},
    {Fault::rescind_in_flight, later, true, false, "the host has rescinded the storage controller"},
    {Fault::unknown_message, 1, true, true, "a message of type 99 is of an unknown type"},
    {Fault::short_message, 4, false, false, "a message of type 6 is too short"},
    {Fault::duplicate_relid, 0, true, true, "a channel whose id is invalid or in use"},
};
INSTANTIATE_TEST_SUITE_P(All, HostJoinedFault, testing::ValuesIn(cases), [](const auto& info) {
    for (const auto& known : host::fault_names) {
        if (known.fault == info.param.fault) {
            std::string name(known.name);
            std::replace(name.begin(), name.end(), '-', '_');
            return name;
        }
    }
    return std::string("none");
});

} // namespace
