// A virtio SCSI host for tests, written from the specification [virtio-1.2 §4.2, §5.6]: the registers of virtio-mmio,
// three split queues, and disks on targets. A rule violation by the driver fails the running test. Include after
// virtio_blk_fake.hpp, whose Memory it uses.
#pragma once
#include "unit/drivers/virtio_blk_fake.hpp"

namespace virtio_scsi_test {
using namespace fl;
using virtio_test::Chain;
using virtio_test::SplitDevice;

/// A disk of 512-byte blocks.
struct Unit {
    u8 target = 0;
    u16 lun = 0;
    u8 type = 0;
    std::vector<u8> medium = std::vector<u8>(1 << 20);
    bool present = true;
};

class Host final : public MmioModel {
  public:
    explicit Host(virtio_test::Memory& memory) : guest_(memory.guest) {
        set<u32>(0, 1);      // num_queues
        set<u32>(4, 126);    // seg_max
        set<u32>(8, 0xffff); // max_sectors
        set<u32>(12, 128);   // cmd_per_lun
        set<u32>(16, 16);    // event_info_size
        set<u32>(20, 96);    // sense_size
        set<u32>(24, 32);    // cdb_size
        set<u16>(28, 0);     // max_channel
        set<u16>(30, 3);     // max_target
        set<u32>(32, 255);   // max_lun
    }
    template <class T>
    void set(usize at, T value) {
        std::memcpy(config.data() + at, &value, sizeof(T));
    }

    u64 offered = u64{1} << 1 | u64{1} << 2 | u64{1} << 28 | u64{1} << 29 | u64{1} << 32;
    u64 accepted = 0;
    std::array<u8, 36> config{};
    u32 queue_max = 64;
    u8 status = 0;
    u32 resets = 0;
    u32 unit_resets = 0;
    std::vector<std::unique_ptr<Unit>> units;
    std::function<void()> interrupt;
    std::vector<Chain> held;
    std::vector<std::vector<u8>> headers; // of the requests so far
    bool hold_io = false;                 // holds READ and WRITE until a LOGICAL UNIT RESET
    bool dead = false;                    // takes nothing any more
    u32 isr = 0;
    u64 withdrawn = 0;          // of the features offered, from the next reset on
    u8 report_luns = 0;         // sense key with which REPORT LUNS is refused; 0: it is answered
    bool lists_nothing = false; // REPORT LUNS is never answered
    std::vector<u8> silent;     // targets that answer nothing, not even LOGICAL UNIT RESET
    u8 reset_answer = 0;        // to LOGICAL UNIT RESET
    bool silent_resets = false; // which is then carried out and never answered
    /// Called for each READ and WRITE after it was carried out; may spoil the response (108 bytes) and the used length.
    std::function<void(std::array<u8, 108>&, u32&)> spoil;

    Unit& add(u8 target, u16 lun, u8 type = 0) {
        units.push_back(std::make_unique<Unit>(Unit{target, lun, type}));
        return *units.back();
    }
    /// False: the driver has given the host no buffer.
    bool event(u32 kind, u8 target, u16 lun, u32 reason, u32 length = 16) {
        auto chain = queues_[1]->pop();
        if (!chain) {
            return false;
        }
        EXPECT_TRUE(chain->pieces.size() == 1 && chain->pieces[0].writable && chain->pieces[0].length == 16);
        const u64 at = chain->pieces[0].bus;
        guest_.put(at, kind, 4);
        guest_.put(at + 4, 1 | u64{target} << 8 | u64{0x40u | lun >> 8} << 16 | u64{lun & 0xffu} << 24, 8);
        guest_.put(at + 12, reason, 4);
        push(1, *chain, length);
        return true;
    }
    void push_again(const Chain& chain) { push(2, chain, 108); }
    Chain last;

    u64 read(u64 at, u32 width) override {
        if (at >= 0x100) {
            u64 value = ~u64{0};
            if (at - 0x100 + width <= config.size()) {
                value = 0;
                std::memcpy(&value, config.data() + (at - 0x100), width);
            }
            return value;
        }
        switch (at) {
        case 0x00: return 0x74726976;
        case 0x04: return 2;
        case 0x08: return 8;
        case 0x10: return static_cast<u32>(offered >> (32 * select_));
        case 0x34: return queue_ < 3 ? queue_max : 0;
        case 0x60: return isr;
        case 0x70: return status;
        case 0xfc: return 0;
        default: return 0;
        }
    }
    void write(u64 at, u32, u64 value) override {
        const u32 v = static_cast<u32>(value);
        switch (at) {
        case 0x14: select_ = v; break;
        case 0x20: accepted |= u64{v} << (32 * driver_select_); break;
        case 0x24: driver_select_ = v; break;
        case 0x30: queue_ = v; break;
        case 0x38: setup_.size = v; break;
        case 0x44:
            ASSERT_TRUE(queue_ < 3 && (status & 4) == 0) << "queues are set up before DRIVER_OK";
            setup_.event_index = (accepted >> 29 & 1) != 0;
            queues_[queue_].emplace(guest_, setup_);
            queues_[queue_]->want(1);
            break;
        case 0x50:
            EXPECT_EQ(status & 4, 4) << "notified before DRIVER_OK";
            notify(v);
            break;
        case 0x64: isr &= ~v; break;
        case 0x70:
            status = static_cast<u8>(v);
            if (v == 0) {
                ++resets;
                accepted = 0;
                offered &= ~std::exchange(withdrawn, 0);
                held.clear();
                for (auto& queue : queues_) {
                    queue.reset();
                }
            }
            break;
        default: {
            u64* const areas[] = {&setup_.descriptors, &setup_.driver, &setup_.device};
            const u64 index = (at - 0x80) / 16;
            ASSERT_TRUE(at >= 0x80 && index < 3 && (at & 0xf) <= 4) << "writes the register at " << at;
            u64& area = *areas[index];
            area = (at & 4) != 0 ? (area & 0xffffffff) | value << 32 : (area & ~u64{0xffffffff}) | v;
        }
        }
    }

  private:
    void push(u32 queue, const Chain& chain, u32 length) {
        queues_[queue]->push(chain, length);
        if (queues_[queue]->interrupt() && interrupt) {
            interrupt();
        }
    }
    void notify(u32 queue) {
        if (dead) {
            return;
        }
        while (queue == 2) {
            auto chain = queues_[2]->pop();
            if (!chain) {
                break;
            }
            const u8 op = static_cast<u8>(guest_.get(chain->pieces[0].bus + 19, 1));
            if (is_silent(*chain, 1)) {
                continue;
            }
            if (hold_io && (op == 0x88 || op == 0x8a)) {
                held.push_back(*chain);
            } else if (op != 0xa0 || !lists_nothing) {
                answer(*chain, 0);
            }
        }
        while (queue == 0) {
            auto chain = queues_[0]->pop();
            if (!chain) {
                break;
            }
            const auto& p = chain->pieces;
            EXPECT_TRUE(p.size() == 2 && p[0].length == 24 && !p[0].writable && p[1].length == 1 && p[1].writable);
            EXPECT_EQ(guest_.get(p[0].bus, 8), u64{5} << 32) << "TMF, LOGICAL UNIT RESET";
            ++unit_resets;
            if (is_silent(*chain, 9)) {
                continue;
            }
            if (reset_answer == 0) {
                hold_io = false;
                for (const Chain& c : std::exchange(held, {})) {
                    answer(c, 4);
                }
            }
            if (!silent_resets) {
                guest_.put(p[1].bus, reset_answer, 1);
                push(0, *chain, 1);
            }
        }
        queues_[queue]->want(1);
    }
    /// `at`: of the target's number in the request.
    bool is_silent(const Chain& chain, u32 at) {
        const u8 target = static_cast<u8>(guest_.get(chain.pieces[0].bus + at, 1));
        return std::find(silent.begin(), silent.end(), target) != silent.end();
    }
    void answer(const Chain& chain, u8 response) {
        last = chain;
        const auto& p = chain.pieces;
        EXPECT_TRUE(p.size() >= 2 && p[0].length == 51 && !p[0].writable) << "the header";
        usize at = 1;
        std::vector<std::pair<u64, u32>> out;
        for (; at < p.size() && !p[at].writable; ++at) {
            out.push_back({p[at].bus, p[at].length});
        }
        ASSERT_TRUE(at < p.size() && p[at].length == 108) << "the response comes before the data";
        const u64 into = p[at].bus;
        u64 in_bus = 0;
        u32 in_length = 0;
        if (at + 1 < p.size()) {
            in_bus = p[at + 1].bus;
            in_length = p[at + 1].length;
        }
        std::vector<u8> header(51);
        for (u32 i = 0; i < 51; ++i) {
            header[i] = static_cast<u8>(guest_.get(p[0].bus + i, 1));
        }
        headers.push_back(header);
        EXPECT_EQ(header[0], 1);
        const u8 target = header[1];
        const u16 lun = static_cast<u16>((header[2] & 0x3f) << 8 | header[3]);
        std::array<u8, 108> r{};
        std::vector<u8> data;
        u32 moved = 0;
        const bool any =
            std::any_of(units.begin(), units.end(), [&](auto& u) { return u->present && u->target == target; });
        const auto found = std::find_if(units.begin(), units.end(),
                                        [&](auto& u) { return u->present && u->target == target && u->lun == lun; });
        const u8 op = header[19];
        if (response != 0) {
            r[11] = response;
        } else if (!any) {
            r[11] = 3; // BAD_TARGET
        } else if (op == 0xa0 && report_luns != 0) {
            refuse(r, report_luns == 5 ? 0x20 : 0x44, report_luns);
        } else if (op == 0xa0) {
            for (auto& u : units) {
                if (u->present && u->target == target) {
                    data.insert(data.end(), {static_cast<u8>(u->lun > 255 ? 0x40 | u->lun >> 8 : 0),
                                             static_cast<u8>(u->lun), 0, 0, 0, 0, 0, 0});
                }
            }
            const u8 bytes = static_cast<u8>(data.size());
            data.insert(data.begin(), {0, 0, 0, bytes, 0, 0, 0, 0});
        } else if (found == units.end()) {
            refuse(r, 0x25);
        } else {
            Unit& u = **found;
            const auto be = [&](usize first, usize count) {
                u64 value = 0;
                for (usize i = 0; i < count; ++i) {
                    value = value << 8 | header[19 + first + i];
                }
                return value;
            };
            switch (op) {
            case 0x00: break;
            case 0x12:
                if (header[20] != 0) {
                    refuse(r, 0x24);
                } else {
                    data.assign(36, ' ');
                    data[0] = u.type;
                    data[1] = 0;
                    data[4] = 31;
                }
                break;
            case 0x9e: {
                data.assign(32, 0);
                const u64 blocks = u.medium.size() / 512 - 1;
                for (u32 i = 0; i < 8; ++i) {
                    data[i] = static_cast<u8>(blocks >> (8 * (7 - i)));
                }
                data[10] = 2;
                break;
            }
            case 0x88:
            case 0x8a: {
                const u64 first = be(2, 8) * 512;
                const u64 bytes = be(10, 4) * 512;
                ASSERT_LE(first + bytes, u.medium.size());
                u8* const medium = u.medium.data() + first;
                if (op == 0x88) {
                    data.assign(medium, medium + bytes);
                    EXPECT_EQ(in_length, bytes);
                } else {
                    u64 done = 0;
                    for (const auto& [bus, length] : out) {
                        std::memcpy(medium + done, guest_.data() + (bus - guest_.bus), length);
                        done += length;
                    }
                    EXPECT_EQ(done, bytes);
                }
                break;
            }
            case 0x35:
            case 0x91: break;
            default: refuse(r, 0x20);
            }
        }
        moved = static_cast<u32>(std::min<usize>(data.size(), in_length));
        for (u32 i = 0; i < moved; ++i) {
            guest_.put(in_bus + i, data[i], 1);
        }
        const u32 residual = in_length - moved;
        std::memcpy(r.data() + 4, &residual, 4);
        u32 length = 108 + moved;
        for (const auto& [bus, bytes] : out) {
            length += bytes; // as QEMU does
        }
        if (spoil && (op == 0x88 || op == 0x8a)) {
            spoil(r, length);
        }
        for (u32 i = 0; i < 108; ++i) {
            guest_.put(into + i, r[i], 1);
        }
        push(2, chain, length);
    }
    static void refuse(std::array<u8, 108>& r, u8 asc, u8 key = 5) { // ILLEGAL REQUEST
        r[0] = 18;                                                   // sense_len
        r[10] = 2;                                                   // CHECK CONDITION
        r[12] = 0x70;
        r[14] = key;
        r[19] = 10;
        r[24] = asc;
    }

    virtio_test::Guest& guest_;
    std::array<std::optional<SplitDevice>, 3> queues_;
    u32 select_ = 0;
    u32 driver_select_ = 0;
    u32 queue_ = 0;
    SplitDevice::Setup setup_{};
};

} // namespace virtio_scsi_test
