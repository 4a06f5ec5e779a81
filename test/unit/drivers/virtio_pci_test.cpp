// Virtio devices on the PCI bus: which structures are used [virtio-1.2 §4.1.4], the common configuration, and
// capabilities, BARs and queues that cannot be used. MSI-X is in pci_msi_test.cpp.
#include "gtest_macros.hpp"

#include <cstddef>
import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.log;
import core.mmio;
import core.interrupt;
import io.executor;
import io.block;
import io.task;
import drivers.driver;
import drivers.pci;
import drivers.virtio.device;
import drivers.virtio_blk;

#include "unit/io/support.hpp"
// depends on the include above
#include "unit/core/interrupt_fake.hpp"
#include "unit/drivers/pci_fake.hpp"
#include "unit/drivers/virtio_blk_fake.hpp"

namespace {
using namespace fl;

constexpr u64 base = 0xfe00'0000;
constexpr u8 line = 11;
// Where the structures are in BAR 4, which has 16 KiB, as in QEMU's devices.
constexpr u32 common_at = 0, isr_at = 0x1000, device_at = 0x2000, notify_at = 0x3000;
constexpr u64 f_seg_max = 1 << 2, f_flush = 1 << 9, f_indirect = 1 << 28, f_event_idx = 1 << 29,
              f_version_1 = u64{1} << 32;

/// The registers of a virtio block device in one memory BAR [virtio-1.2 §4.1.4.3 to §4.1.4.6].
class Registers final : public MmioModel {
  public:
    explicit Registers(virtio_test::Backend& backend) : backend_(backend) {}

    u64 offered = f_version_1 | f_flush | f_seg_max | f_indirect | f_event_idx;
    u16 queue_max = 128;
    u16 notify_offset = 0;
    u32 multiplier = 4;
    std::array<u8, 60> config{};
    u8 isr = 0;
    u8 status = 0;
    u16 config_vector = 0xffff;
    u16 queue_vector = 0xffff;
    u32 queues_enabled = 0;
    u32 notifications = 0;

    u64 read(u64 at, u32 width) override {
        if (at >= device_at && at + width <= device_at + config.size()) {
            u64 value = 0;
            std::memcpy(&value, config.data() + (at - device_at), width);
            return value;
        }
        if (at == isr_at && width == 1) {
            return std::exchange(isr, u8{0});
        }
        switch (at | u64{width} << 32) {
        case 4 | u64{4} << 32: return static_cast<u32>(offered >> 32 * feature_select_);
        case 16 | u64{2} << 32: return config_vector;
        case 18 | u64{2} << 32: return 1; // queues
        case 20 | u64{1} << 32: return status;
        case 21 | u64{1} << 32: return 0; // generation
        case 24 | u64{2} << 32: return queue_ == 0 ? queue_max : 0;
        case 26 | u64{2} << 32: return queue_vector;
        case 30 | u64{2} << 32: return notify_offset;
        default: ADD_FAILURE() << "reads " << width << " bytes at " << at; return 0;
        }
    }
    void write(u64 at, u32 width, u64 value) override {
        if (at == notify_at + u64{notify_offset} * multiplier && width == 2) {
            EXPECT_EQ(value, 0u) << "the number of a queue";
            EXPECT_EQ(status & 4, 4) << "notified before DRIVER_OK";
            ++notifications;
            return backend_.notify();
        }
        const auto half = [&](u64& area) {
            area = at % 8 == 4 ? (area & 0xffff'ffff) | value << 32 : (area & ~u64{0xffff'ffff}) | value;
        };
        switch (at | u64{width} << 32) {
        case 0 | u64{4} << 32: feature_select_ = static_cast<u32>(value); break;
        case 8 | u64{4} << 32: accepted_select_ = static_cast<u32>(value); break;
        case 12 | u64{4} << 32: accepted_ |= value << 32 * accepted_select_; break;
        case 16 | u64{2} << 32: config_vector = static_cast<u16>(value); break;
        case 20 | u64{1} << 32: set_status(static_cast<u8>(value)); break;
        case 22 | u64{2} << 32: queue_ = static_cast<u32>(value); break;
        case 24 | u64{2} << 32: setup_.size = static_cast<u32>(value); break;
        case 26 | u64{2} << 32: queue_vector = static_cast<u16>(value); break;
        case 28 | u64{2} << 32:
            EXPECT_EQ(value, 1u);
            EXPECT_EQ(status, 11) << "queues are enabled between FEATURES_OK and DRIVER_OK";
            ++queues_enabled;
            setup_.event_index = (accepted_ >> 29 & 1) != 0;
            backend_.set_queue(setup_, false);
            break;
        case 32 | u64{4} << 32:
        case 36 | u64{4} << 32: half(setup_.descriptors); break;
        case 40 | u64{4} << 32:
        case 44 | u64{4} << 32: half(setup_.driver); break;
        case 48 | u64{4} << 32:
        case 52 | u64{4} << 32: half(setup_.device); break;
        default: ADD_FAILURE() << "writes " << width << " bytes at " << at;
        }
    }

  private:
    void set_status(u8 value) {
        if (value == 0) {
            accepted_ = 0;
            config_vector = queue_vector = 0xffff;
            queues_enabled = 0;
            backend_.reset();
        }
        status = value;
    }

    virtio_test::Backend& backend_;
    u32 feature_select_ = 0;
    u32 accepted_select_ = 0;
    u64 accepted_ = 0;
    u32 queue_ = 0;
    virtio_test::SplitDevice::Setup setup_{};
};

struct Sink final : drivers::DiskSink {
    std::vector<io::BlockDevice*> disks;
    bool offered(u32) override { return true; }
    FixedText<16> free_name(std::string_view prefix) override { return drivers::disk_name(prefix, 0); }
    Result<void> announce(io::BlockDevice& disk, u32) override {
        disks.push_back(&disk);
        return {};
    }
};

struct Machine {
    static constexpr u64 sectors = 512;
    Machine() {
        function = &space.add(0, 4, 0, 0x1af4, 0x1042, 0x010000);
        pci_test::Function& f = *function;
        f.set32(0x10, 1); // BAR 0: I/O ports, as of a transitional device
        f.bar_mask[0] = 0xffff'ff80;
        f.set32(0x20, static_cast<u32>(base) | 4); // BARs 4 and 5: memory, 64 bits
        f.bar_mask[4] = 0xffff'c000;
        f.bar_mask[5] = 0xffff'ffff;
        f.bytes[0x3c] = line;
        f.bytes[0x3d] = 1;
        mapper.places[base] = {&registers, 0x4000};
        const u64 capacity = sectors;
        std::memcpy(registers.config.data(), &capacity, 8);
        registers.config[12] = 62; // seg_max
        backend.interrupt = [this] {
            registers.isr |= 1;
            interrupts.raise(line);
        };
    }
    void add(u8 at, u8 type, u8 bar, u32 offset, u32 length) {
        function->add_capability(at, 0x09);
        function->bytes[at + 2] = type == 2 ? 20 : 16;
        function->bytes[at + 3] = type;
        function->bytes[at + 4] = bar;
        function->set32(at + 8u, offset);
        function->set32(at + 12u, length);
        if (type == 2) {
            function->set32(at + 16u, registers.multiplier);
        }
    }
    /// All structures, `skipped` excepted.
    void add_all(u8 skipped = 0) {
        const struct {
            u8 at, type;
            u32 offset, length;
        } all[] = {{0x40, 1, common_at, 0x1000},
                   {0x50, 3, isr_at, 0x1000},
                   {0x60, 4, device_at, 0x1000},
                   {0x70, 2, notify_at, 0x1000}};
        for (const auto& one : all) {
            if (one.type != skipped) {
                add(one.at, one.type, 4, one.offset, one.length);
            }
        }
    }
    Result<void> probe() {
        drivers::Environment e{executor, memory, interrupts, sink, 200'000'000, 0, {}, nullptr, mapper};
        return executor.run(drivers::virtio_blk::probe(e, *pci_test::pci::look_up(space, {0, 4, 0})));
    }
    static io::Task<Result<void>> copy(io::BlockDevice& disk, DmaSpan from, DmaSpan to) {
        if (auto written = co_await disk.write(8, from); !written) {
            co_return written.error();
        }
        co_return co_await disk.read(8, to);
    }
    void transfers() {
        ASSERT_EQ(sink.disks.size(), 1u);
        auto from = *memory.buffer(4096);
        auto to = *memory.buffer(4096);
        std::memset(from.data(), 0x5a, 4096);
        EXPECT_TRUE(executor.run(copy(*sink.disks[0], from.span(), to.span())));
        EXPECT_EQ(std::memcmp(from.data(), to.data(), 4096), 0);
    }
    fl::test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    virtio_test::Memory memory;
    virtio_test::Backend backend{memory, sectors};
    Registers registers{backend};
    pci_test::Space space;
    pci_test::Function* function = nullptr;
    pci_test::Mapper mapper;
    fl::test::Interrupts interrupts;
    Sink sink;
    fl::test::CapturedLog log;
};

TEST(VirtioPci, TheStructuresOfTheCapabilitiesAreUsed) {
    Machine m;
    m.add_all();
    ASSERT_TRUE(m.probe());
    EXPECT_EQ(m.registers.status, 15);
    EXPECT_EQ(m.registers.queues_enabled, 1u);
    EXPECT_EQ(m.backend.setup().size, 128u);
    EXPECT_EQ(m.interrupts.lines.size(), 1u);
    EXPECT_EQ(m.function->get16(4) & 6, 6) << "memory decoding and bus mastering";
    m.transfers();
    EXPECT_GE(m.registers.notifications, 2u);
}

TEST(VirtioPci, AnotherQueueAddressAndADeviceWithoutConfiguration) {
    Machine m;
    m.registers.notify_offset = 3;
    m.registers.multiplier = 8;
    m.add_all();
    ASSERT_TRUE(m.probe());
    m.transfers();

    Machine none; // all ones: no capacity that a disk could have
    none.add_all(4);
    EXPECT_EQ(none.probe().error().code, Code::protocol);
}

TEST(VirtioPci, AnEarlierStructureInPortsIsPassedOver) {
    Machine m;
    m.add(0x90, 2, 0, 0, 4); // QEMU: modern-pio-notify=on
    m.add(0xb0, 1, 0, 0, 0x1000);
    m.add_all();
    ASSERT_TRUE(m.probe());
    m.transfers();
}

TEST(VirtioPci, TheFirstOfSeveralStructuresIsUsed) {
    Machine m;
    m.add_all();
    m.add(0x90, 2, 0, 0, 4);
    m.add(0xb0, 1, 4, 0x2000, 0x1000);
    m.add(0xc0, 9, 4, 0, 0x1000); // a type that does not exist
    m.add(0xd0, 0, 4, 0, 0x1000);
    ASSERT_TRUE(m.probe());
    m.transfers();
}

TEST(VirtioPci, DevicesThatCannotBeUsed) {
    struct Row {
        const char* what;
        std::function<void(Machine&)> change;
        Code code;
        const char* message;
    };
    const Row rows[] = {
        {"no capability", [](Machine&) {}, Code::not_supported, "only the legacy interface"},
        {"no common configuration", [](Machine& m) { m.add_all(1); }, Code::protocol, "no common configuration"},
        {"no notification", [](Machine& m) { m.add_all(2); }, Code::protocol, "no notification structure"},
        {"no ISR status", [](Machine& m) { m.add_all(3); }, Code::protocol, "no ISR status"},
        {"notification in ports only",
         [](Machine& m) {
             m.add_all(2);
             m.add(0x90, 2, 0, 0, 4);
         },
         Code::not_supported, "for I/O ports"},
        {"a small common configuration",
         [](Machine& m) {
             m.add(0x90, 1, 4, 0, 55);
             m.add_all();
         },
         Code::protocol, "too small"},
        {"a BAR that does not exist",
         [](Machine& m) {
             m.add_all(1);
             m.add(0x90, 1, 6, 0, 0x1000);
         },
         Code::protocol, "no common configuration"},
        {"a BAR that is not there",
         [](Machine& m) {
             m.add(0x90, 1, 3, 0, 0x1000);
             m.add_all();
         },
         Code::not_supported, "does not implement this BAR"},
        {"the upper half of a BAR",
         [](Machine& m) {
             m.add(0x90, 1, 5, 0, 0x1000);
             m.add_all();
         },
         Code::protocol, "upper half"},
        {"a BAR without an address",
         [](Machine& m) {
             m.add_all();
             m.function->set32(0x20, 4);
         },
         Code::not_supported, "no address"},
        {"a BAR at memory",
         [](Machine& m) {
             m.add_all();
             m.function->set32(0x20, 0x10'0000 | 4);
         },
         Code::protocol, "memory is there"},
        {"beyond the end of the BAR",
         [](Machine& m) {
             m.add(0x90, 1, 4, 0x3800, 0x1000);
             m.add_all();
         },
         Code::protocol, "outside of the BAR"},
        {"an offset near 4 GiB",
         [](Machine& m) {
             m.add(0x90, 1, 4, 0xffff'fff0, 0x1000);
             m.add_all();
         },
         Code::protocol, "outside of the BAR"},
        {"a queue of no descriptors",
         [](Machine& m) {
             m.add_all();
             m.registers.queue_max = 0;
         },
         Code::protocol, ""},
        {"a queue beyond the specification",
         [](Machine& m) {
             m.add_all();
             m.registers.queue_max = 65535;
         },
         Code::protocol, ""},
        {"notified outside of the structure",
         [](Machine& m) {
             m.add_all();
             m.registers.notify_offset = 0x400;
         },
         Code::protocol, "outside of the notification structure"},
        {"notified at an odd address",
         [](Machine& m) {
             m.registers.multiplier = 1;
             m.registers.notify_offset = 3;
             m.add_all();
         },
         Code::protocol, "outside of the notification structure"},
        {"a list that is a circle",
         [](Machine& m) {
             m.add_all(2);
             m.function->bytes[0x61] = 0x40;
         },
         Code::protocol, "no notification structure"},
    };
    for (const Row& row : rows) {
        Machine m;
        row.change(m);
        const auto result = m.probe();
        ASSERT_FALSE(result) << row.what;
        EXPECT_EQ(result.error().code, row.code) << row.what << ": " << result.error().message;
        EXPECT_NE(std::string_view(result.error().message).find(row.message), std::string_view::npos)
            << row.what << ": " << result.error().message;
        EXPECT_EQ(m.registers.status & 4, 0) << row.what << ": still running";
        EXPECT_TRUE(m.sink.disks.empty() && m.interrupts.lines.empty()) << row.what;
        EXPECT_EQ(m.memory.outstanding, 0u) << row.what << ": memory is lost";
    }
}

} // namespace
