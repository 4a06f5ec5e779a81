// A virtio block device for tests, written from the specification [virtio-1.2 §2, §4.2, §5.2]: the queue, the medium,
// and the registers of virtio-mmio. A rule violation by the driver fails the running test. Include after the imports,
// of which core.dma, core.mmio and core.interrupt must be three.
#pragma once
#include "gtest_macros.hpp"
import test.gtest;
import host.std;

#include "unit/io/ring_virtqueue_fake.hpp"

namespace virtio_test {
using namespace fl;
using virtqueue_fake::Chain;
using virtqueue_fake::Guest;
using virtqueue_fake::PackedDevice;
using virtqueue_fake::Piece;
using virtqueue_fake::SplitDevice;

/// Memory that driver and device share: allocations of whole pages from one range.
class Memory final : public DmaAllocator {
  public:
    explicit Memory(u32 bytes = 2 << 20) : guest(bytes), used_(bytes / 4096) {}
    ~Memory() { EXPECT_EQ(guest.fault, ""); }
    Result<DmaSpan> allocate(u32 size, u64 limit) override {
        const u32 pages = (size + 4095) / 4096;
        for (u32 at = 0; at + pages <= used_.size() && !refuse; ++at) {
            if (std::none_of(used_.begin() + at, used_.begin() + at + pages, [](bool b) { return b; })) {
                std::fill_n(used_.begin() + at, pages, true);
                const DmaSpan span{guest.data() + at * 4096, guest.bus + at * 4096, pages * 4096};
                EXPECT_LE(span.bus + span.size - 1, limit);
                std::memset(span.data, 0, span.size);
                ++outstanding;
                return span;
            }
        }
        return Error{Code::exhausted, "no memory"};
    }
    void free(DmaSpan span) override {
        std::fill_n(used_.begin() + (span.bus - guest.bus) / 4096, span.size / 4096, false);
        --outstanding;
    }
    Guest guest;
    u32 outstanding = 0;
    bool refuse = false;

  private:
    std::vector<bool> used_;
};

enum class Kind : u32 { in = 0, out = 1, flush = 4, id = 8, discard = 11, write_zeroes = 13 };

/// A request that the device has taken from the queue.
struct Taken {
    Chain chain;
    Kind kind = Kind::in;
    u64 sector = 0; // in units of 512 bytes; likewise `bytes` of data
    u64 bytes = 0;
    u32 flags = 0; // of a discard or write zeroes
};

/// The medium and one queue.
class Backend {
    std::unique_ptr<Zeroed> own_;

  public:
    explicit Backend(Memory& memory, u64 sectors)
        : own_(std::make_unique<Zeroed>(sectors * 512)), disk(*own_), guest_(memory.guest) {}
    /// A further queue of the same device.
    explicit Backend(Memory& memory, Backend& first) : disk(first.disk), guest_(memory.guest) {}
    void set_queue(const SplitDevice::Setup& setup, bool packed) {
        queue_.reset();
        taken.clear();
        setup_ = setup;
        if (packed) {
            queue_.emplace(std::in_place_type<PackedDevice>, guest_, setup);
        } else {
            queue_.emplace(std::in_place_type<SplitDevice>, guest_, setup);
        }
        std::visit([](auto& q) { q.want(1); }, *queue_);
    }
    void reset() {
        queue_.reset();
        taken.clear();
    }
    bool has_queue() const { return queue_.has_value(); }
    const SplitDevice::Setup& setup() const { return setup_; }

    /// The driver has notified the queue: takes every available buffer, and completes it unless `hold`.
    void notify() {
        if (!queue_ || dead) {
            return;
        }
        std::visit(
            [&](auto& q) {
                while (auto chain = q.pop()) {
                    taken.push_back(examine(*chain));
                }
                q.want(1);
            },
            *queue_);
        while (!hold && !taken.empty()) {
            complete(0, 0);
        }
    }
    /// Completes taken[index] with a status; 0 carries it out.
    void complete(usize index, u8 status) {
        const Taken t = taken[index];
        taken.erase(taken.begin() + static_cast<std::ptrdiff_t>(index));
        last_id = t.chain.id;
        u32 written = 0;
        if (status == 0) {
            written = carry_out(t);
        }
        if (!withhold_status) {
            guest_.put(t.chain.pieces.back().bus, status, 1);
        }
        push(t.chain, written + 1);
    }
    /// Returns a buffer, whatever it is, and raises the event that the driver has requested.
    void push(const Chain& chain, u32 length) {
        const bool due = std::visit(
            [&](auto& q) {
                q.push(chain, length);
                return q.interrupt();
            },
            *queue_);
        if (due && interrupt) {
            interrupt();
        }
    }
    /// A split queue's used index claims more buffers than the device holds.
    void damage() { guest_.put(setup_.device + 2, guest_.get(setup_.device + 2, 2) + 1000, 2); }

    Zeroed& disk;
    std::vector<Taken> taken; // held
    std::string serial = "SERIAL-7";
    std::function<void()> interrupt;
    u16 last_id = 0;
    bool hold = false;
    bool dead = false;            // takes nothing any more
    bool withhold_status = false; // returns requests without writing their status
    u32 flushes = 0;

  private:
    Taken examine(const Chain& chain) {
        Taken t{chain};
        const auto& p = chain.pieces;
        EXPECT_GE(p.size(), 2u);
        EXPECT_TRUE(p.front().length == 16 && !p.front().writable) << "the header";
        EXPECT_TRUE(p.back().length == 1 && p.back().writable) << "the status";
        t.kind = static_cast<Kind>(guest_.get(p.front().bus, 4));
        EXPECT_EQ(guest_.get(p.front().bus + 4, 4), 0u) << "reserved";
        t.sector = guest_.get(p.front().bus + 8, 8);
        for (usize i = 1; i + 1 < p.size(); ++i) {
            EXPECT_EQ(p[i].writable, t.kind == Kind::in || t.kind == Kind::id);
            t.bytes += p[i].length;
        }
        switch (t.kind) {
        case Kind::in:
        case Kind::out:
            EXPECT_TRUE(t.bytes != 0 && t.bytes % 512 == 0 && t.sector * 512 + t.bytes <= disk.size());
            break;
        case Kind::flush: EXPECT_TRUE(t.bytes == 0 && t.sector == 0); break;
        case Kind::id: EXPECT_EQ(t.bytes, 20u); break;
        case Kind::discard:
        case Kind::write_zeroes:
            EXPECT_TRUE(t.bytes == 16 && t.sector == 0);
            t.sector = guest_.get(p[1].bus, 8);
            t.bytes = guest_.get(p[1].bus + 8, 4) * 512;
            t.flags = static_cast<u32>(guest_.get(p[1].bus + 12, 4));
            EXPECT_LE(t.flags, t.kind == Kind::write_zeroes ? 1u : 0u);
            EXPECT_LE(t.sector * 512 + t.bytes, disk.size());
            break;
        default: ADD_FAILURE() << "a request of type " << static_cast<u32>(t.kind);
        }
        return t;
    }
    u32 carry_out(const Taken& t) {
        u64 at = t.sector * 512;
        u32 written = 0;
        for (usize i = 1; i + 1 < t.chain.pieces.size(); ++i) {
            const Piece& piece = t.chain.pieces[i];
            std::byte* const memory = guest_.data() + (piece.bus - guest_.bus);
            if (t.kind == Kind::in) {
                std::memcpy(memory, disk.data() + at, piece.length);
                written += piece.length;
            } else if (t.kind == Kind::out) {
                std::memcpy(disk.data() + at, memory, piece.length);
            } else if (t.kind == Kind::id) {
                std::memset(memory, 0, piece.length);
                std::memcpy(memory, serial.data(), std::min<usize>(serial.size(), piece.length));
                written += piece.length;
            }
            at += piece.length;
        }
        if (t.kind == Kind::discard || t.kind == Kind::write_zeroes) {
            std::memset(disk.data() + t.sector * 512, 0, t.bytes);
        }
        flushes += t.kind == Kind::flush ? 1 : 0;
        return written;
    }

    Guest& guest_;
    std::optional<std::variant<SplitDevice, PackedDevice>> queue_;
    SplitDevice::Setup setup_{};
};

/// The registers of virtio-mmio in front of a Backend [virtio-1.2 §4.2.2, §4.2.4].
class MmioRegisters final : public MmioModel {
  public:
    MmioRegisters(Backend& backend, u32 version) : backend_(backend), version_(version) {}

    u64 offered = 0;
    u32 queue_max = 256;
    std::array<u8, 64> config{};
    u32 generation = 0;
    bool restless = false;                      // the generation changes with each read
    std::function<void(u64 at)> on_config_read; // before it; `at`: in the configuration
    bool refuses = false;                       // does not set FEATURES_OK
    bool unresettable = false;
    bool wce_stuck = false; // the cache mode cannot be changed
    u32 config_writes = 0;
    std::function<void()> on_reset;
    u32 resets = 0;
    u32 notifications = 0;
    std::vector<u32> statuses; // as written
    u64 accepted = 0;
    u8 status = 0;
    u32 isr = 0;

    template <class T>
    void set(usize at, T value) {
        std::memcpy(config.data() + at, &value, sizeof(T));
    }
    u64 read(u64 at, u32 width) override {
        if (at >= 0x100) {
            if (on_config_read) {
                on_config_read(at - 0x100);
            }
            u64 value = ~u64{0};
            if (at - 0x100 + width <= config.size()) {
                value = 0;
                std::memcpy(&value, config.data() + (at - 0x100), width);
            }
            return value;
        }
        EXPECT_EQ(width, 4u) << "a register at " << at;
        switch (at) {
        case 0x00: return 0x74726976;
        case 0x04: return version_;
        case 0x08: return 2;
        case 0x10: return static_cast<u32>(offered >> (32 * select_));
        case 0x34: return queue_ == 0 ? queue_max : 0;
        case 0x60: return isr;
        case 0x70: return status;
        case 0xfc: EXPECT_EQ(version_, 2u); return restless ? ++generation : generation;
        default: ADD_FAILURE() << "reads the register at " << at; return 0;
        }
    }
    void write(u64 at, u32 width, u64 value) override {
        if (at >= 0x100) { // writeback is the only field that a driver may write [virtio-1.2 §5.2.5.1]
            EXPECT_TRUE(at == 0x120 && width == 1 && value <= 1 && (accepted >> 11 & 1) != 0 && (status & 8) != 0);
            ++config_writes;
            config[32] = wce_stuck ? config[32] : static_cast<u8>(value);
            return;
        }
        EXPECT_EQ(width, 4u) << "a register at " << at;
        const u32 v = static_cast<u32>(value);
        switch (at) {
        case 0x14: select_ = v; break;
        case 0x20:
            EXPECT_EQ(status, 3) << "features are written between DRIVER and FEATURES_OK";
            accepted |= u64{v} << (32 * driver_select_);
            break;
        case 0x24: driver_select_ = v; break;
        case 0x28: EXPECT_TRUE(version_ == 1 && v == 4096); break;
        case 0x30: queue_ = v; break;
        case 0x38:
            setup_.size = v;
            EXPECT_LE(v, queue_max);
            break;
        case 0x3c: EXPECT_TRUE(version_ == 1 && v == 4096); break;
        case 0x40:
            EXPECT_EQ(version_, 1u);
            setup_.descriptors = u64{v} * 4096;
            setup_.driver = setup_.descriptors + 16 * setup_.size;
            setup_.device = (setup_.driver + 6 + 2 * setup_.size + 4095) / 4096 * 4096;
            enable();
            break;
        case 0x44:
            EXPECT_TRUE(version_ == 2 && v == 1);
            enable();
            break;
        case 0x50:
            EXPECT_EQ(v, 0u) << "the number of a queue";
            EXPECT_EQ(status & 4, 4) << "notified before DRIVER_OK";
            ++notifications;
            backend_.notify();
            break;
        case 0x64: isr &= ~v; break;
        case 0x70: set_status(static_cast<u8>(v)); break;
        default: {
            u64* const areas[] = {&setup_.descriptors, &setup_.driver, &setup_.device};
            const u64 index = (at - 0x80) / 16;
            ASSERT_TRUE(version_ == 2 && at >= 0x80 && index < 3 && (at & 0xf) <= 4) << "writes the register at " << at;
            u64& area = *areas[index];
            area = (at & 4) != 0 ? (area & 0xffffffff) | value << 32 : (area & ~u64{0xffffffff}) | v;
        }
        }
    }

  private:
    void set_status(u8 value) {
        statuses.push_back(value);
        if (value == 0) {
            ++resets;
            if (!unresettable) {
                status = 0;
                accepted = 0;
                isr = 0;
                backend_.reset();
                if (on_reset) {
                    on_reset();
                }
            }
            return;
        }
        const u8 added = static_cast<u8>(value & ~status);
        EXPECT_TRUE((value & 0x80) != 0 || ((value & status) == status && std::has_single_bit(added)))
            << "one status bit at a time";
        status = added == 8 && refuses ? status : value;
    }
    void enable() {
        EXPECT_EQ(status & 0x84, 0) << "queues are set up before DRIVER_OK";
        EXPECT_EQ(status, version_ == 2 ? 11 : 3);
        setup_.event_index = (accepted >> 29 & 1) != 0;
        setup_.in_order = (accepted >> 35 & 1) != 0;
        backend_.set_queue(setup_, (accepted >> 34 & 1) != 0);
    }

    Backend& backend_;
    u32 version_;
    u32 select_ = 0;
    u32 driver_select_ = 0;
    u32 queue_ = 0;
    SplitDevice::Setup setup_{};
};

} // namespace virtio_test
