// Guest and host in one process: the guest's SynIC, VMBus and drivers on one side, the test host's server on the other,
// with an arena as guest memory between them. Interrupts are delivered while the executor sleeps. Include after the
// imports.
#pragma once
#include "gtest_macros.hpp"
import test.gtest;
import host.std;

#include "unit/core/interrupt_fake.hpp"

namespace connected {
using namespace fl;

/// Guest memory: allocated by the guest and accessible to the host. Never freed.
class Arena final : public DmaAllocator {
  public:
    static constexpr usize size = 48 * 1024 * 1024;
    Result<DmaSpan> allocate(u32 bytes, u64) override {
        const usize n = align_up<usize>(bytes, 4096);
        if (n > size - used_) {
            return Error{Code::exhausted, "the arena is used up"};
        }
        std::byte* at = storage_.data() + used_;
        used_ += n;
        return DmaSpan{at, reinterpret_cast<u64>(at), static_cast<u32>(n)};
    }
    void free(DmaSpan) override {}
    std::span<std::byte> bytes() const { return storage_.bytes(); }

  private:
    Zeroed storage_{size};
    usize used_ = 0;
};

struct Lines final : host::Log {
    std::string text;
    void line(std::string_view t) override { text += std::string(t) + "\n"; }
};

/// Accepts every announced disk.
struct Sink final : drivers::DiskSink {
    std::vector<std::pair<io::BlockDevice*, u32>> disks;
    std::vector<u32> withdrawn;
    // units not driven: the end of the address, and the reason
    std::vector<std::pair<std::string, drivers::Unused>> left;
    bool offers = true;
    bool offered(u32) override { return offers; }
    void unused(const drivers::UnusedUnit& unit) override {
        const std::string address(unit.address);
        left.emplace_back(address.substr(std::min(address.find("LUN"), address.size())), unit.why);
    }
    void withdraw(u32 number) override { withdrawn.push_back(number); }
    FixedText<16> free_name(std::string_view prefix) override {
        return drivers::disk_name(prefix, static_cast<u32>(disks.size()));
    }
    Result<void> announce(io::BlockDevice& disk, u32 number) override {
        disks.push_back({&disk, number});
        return {};
    }
};

class Machine final : public hv::Privileged, public host::Delivery {
  public:
    test::FakeMachine clock;
    test::FakeMachine second_clock;
    io::Executor executor{clock.platform()};
    io::Executor second{second_clock.platform(), 1};
    std::array<io::Executor*, 2> executors{&executor, &second};
    Arena arena;
    test::Interrupts interrupts;
    Sink sink;
    Lines lines;
    host::GuestMemory memory;
    hv::hyperv::Hypercalls hypercalls;
    hv::hyperv::Synic synic;
    hv::hyperv::Vmbus bus;
    std::unique_ptr<host::Server> server;
    io::Shutdown shutdown{executor};
    drivers::Environment environment{executor, arena, interrupts, sink, 500'000'000};
    std::array<std::array<u64, 2>, 2> pages{}; // message and event pages of each processor
    u64 signals = 0;
    std::array<std::map<u16, u64>, 2> flagged; // events sent to each processor, by channel

    explicit Machine(host::ServerConfig config = {}, u32 processors = 1) {
        config.processors = processors;
        memory.add(reinterpret_cast<u64>(arena.bytes().data()), arena.bytes());
        server = std::make_unique<host::Server>(memory, *this, lines, config);
        hv::hyperv::Gate gate;
        gate.context = this;
        gate.call = [](void* self, u64 control, u64 input, u64) {
            return static_cast<Machine*>(self)->call(control, input);
        };
        EXPECT_TRUE(hypercalls.install(gate, arena));
        synic.install(*this, arena, true);
        EXPECT_TRUE(synic.enable(executor, 0x41, true));
        if (processors == 2) {
            set_this_processor(1);
            EXPECT_TRUE(synic.enable(second, 0x41, true));
            set_this_processor(0);
            environment.executors = executors;
        }
        environment.shutdown = &shutdown;
        const hv::hyperv::VmbusEnvironment what{hypercalls, synic, arena, executor, 500'000'000};
        EXPECT_TRUE(bus.install(what));
        clock.on_idle_context = this;
        clock.on_idle = [](void* self) { static_cast<Machine*>(self)->idle(); };
    }
    ~Machine() { executor.remove(bus); }
    void idle() {
        for (int i = 0; i < 4; ++i) {
            static_cast<void>(server->poll(clock.time));
            if (!environment.executors.empty()) {
                set_this_processor(1);
                second_clock.time = clock.time;
                second.turn();
                set_this_processor(0);
            }
        }
    }
    template <class T>
    T run(io::Task<T> task) {
        return executor.run(std::move(task));
    }
    Result<void> connect() {
        if (auto done = run(bus.connect()); !done) {
            return done;
        }
        return run(bus.request_offers());
    }
    std::optional<hv::hyperv::Offer> offer(std::string_view type) {
        std::optional<hv::hyperv::Offer> found;
        bus.for_each_offer([&](const hv::hyperv::Offer& o) {
            if (o.type.text() == type && o.sub_channel == 0) {
                found = o;
            }
        });
        return found;
    }
    DmaSpan buffer(u32 bytes) { return arena.allocate(bytes, 0)->subspan(0, bytes); }

    u64 call(u64 control, u64 input) {
        if ((control & 0xffff) == 0x5c) {
            const auto* p = reinterpret_cast<const std::byte*>(input);
            u32 fields[4];
            std::memcpy(fields, p, 16);
            return static_cast<u64>(server->on_message(fields[0], fields[2], {p + 16, fields[3]}));
        }
        EXPECT_EQ(control & 0xffff, 0x5du);
        ++signals;
        return static_cast<u64>(server->on_signal(static_cast<u32>(input), static_cast<u16>(input >> 32)));
    }

    // hv::Privileged
    u64 read_msr(u32 msr) override { return msr == 0x40000002 ? this_processor() : 0; }
    void write_msr(u32 msr, u64 value) override {
        const u32 cpu = this_processor();
        switch (msr) {
        case 0x40000083: pages[cpu][0] = (value & 1) != 0 ? value & ~u64{0xfff} : 0; break;
        case 0x40000082: pages[cpu][1] = (value & 1) != 0 ? value & ~u64{0xfff} : 0; break;
        case 0x40000084: server->on_end_of_message(cpu, 2); break;
        default: break;
        }
    }
    u8 in8(u16) override { return 0; }
    u16 in16(u16) override { return 0; }
    u32 in32(u16) override { return 0; }
    void out8(u16, u8) override {}
    void out16(u16, u16) override {}
    CpuidRegisters cpuid_leaf(u32) override { return {}; }
    void out32(u16, u32) override {}

    // host::Delivery
    void interrupt(u32 vp) {
        const u32 before = this_processor();
        set_this_processor(vp);
        hv::hyperv::Synic::on_interrupt(&synic);
        set_this_processor(before);
    }
    Message post(u32 vp, u8 sint, u32 type, std::span<const std::byte> payload) override {
        if (vp > 1 || pages[vp][0] == 0) {
            return Message::refused;
        }
        auto* slot = reinterpret_cast<std::byte*>(pages[vp][0]) + sint * 256u;
        u32 there;
        std::memcpy(&there, slot, 4);
        if (there != 0) {
            slot[5] |= std::byte{1};
            return Message::busy;
        }
        slot[4] = static_cast<std::byte>(payload.size());
        slot[5] = std::byte{0};
        std::memcpy(slot + 16, payload.data(), payload.size());
        std::memcpy(slot, &type, 4);
        interrupt(vp);
        return Message::delivered;
    }
    Event set_event(u32 vp, u8 sint, u16 flag, bool always) override {
        if (vp > 1 || pages[vp][1] == 0) {
            return Event::refused;
        }
        ++flagged[vp][flag];
        auto* word = reinterpret_cast<u8*>(pages[vp][1]) + sint * 256u + flag / 8;
        const bool was = (*word >> (flag % 8) & 1) != 0;
        *word = static_cast<u8>(*word | 1u << (flag % 8));
        if (was && !always) {
            return Event::pending;
        }
        interrupt(vp);
        return Event::raised;
    }
};

} // namespace connected
