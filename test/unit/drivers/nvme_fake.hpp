// An NVMe controller in memory, written from [nvme-1.4]: registers, admin commands, I/O queues, PRPs, shadow doorbells.
// It reads queues only up to the tail that it was given, and reports every rule that the driver breaks. Bus addresses
// are pointers. Include after the imports.
#pragma once
#include "gtest_macros.hpp"

#include "zeroed.hpp"
import test.gtest;
import host.std;

namespace nvme_fake {
using namespace fl;
using Entry = std::array<u32, 16>; // a command, as dwords

inline u64 wide(const Entry& e, usize at) { return e[at] | u64{e[at + 1]} << 32; }
template <class T>
T load(u64 at) {
    T value;
    std::memcpy(&value, reinterpret_cast<const void*>(at), sizeof value);
    return value;
}
template <class T>
void store(u64 at, T value) {
    std::memcpy(reinterpret_cast<void*>(at), &value, sizeof value);
}

struct Options {
    u64 cap = 0x0000'0020'0f01'03ff; // MPSMAX 0, CSS NVM, stride 4, TO 7.5 s, CQR, 1024 entries
    u32 namespaces = 1;
    u32 lba_shift = 9;
    u64 blocks = 8192;
    u8 mdts = 0;
    bool write_cache = true;
    bool keeps_cache = false; // refuses to switch it off
    bool dataset = true;
    bool zeroes = true;
    u8 wzsl = 0;   // 2^n pages; 0: no limit
    u32 dmrsl = 0; // blocks; 0: no limit
    bool doorbell_buffers = false;
    u32 queues = 8; // granted
    bool never_ready = false;
    bool fatal = false;
    bool absent = false; // registers read as all ones
    u16 metadata = 0;
    u8 protection = 0;
    std::vector<u32> list;      // active namespaces; empty: 1 to `namespaces`
    std::vector<u32> zoned;     // allocated ones of another command set, not active without it
    std::vector<u32> elsewhere; // allocated ones that are attached to another controller
    bool refuses_list = false;  // of allocated namespaces
    u8 command_set = 0;         // of the active ones, in their descriptors
    u32 version = 0x10400;
    bool descriptors = true; // has lists of identification descriptors
    u8 eui64 = 0, nguid = 0; // their last bytes, to which the namespace's number is added; 0: none
    u8 uuid = 0x10;
    std::array<u16, 3> retry_delays{}; // CRDT1 to CRDT3, in units of 100 ms
};

class Controller final : public MmioModel {
  public:
    struct Held {
        u16 queue = 0;
        Entry entry{};
        u32 dw(usize n) const { return entry[n]; }
        u8 opcode() const { return static_cast<u8>(entry[0]); }
        u16 cid() const { return static_cast<u16>(entry[0] >> 16); }
    };
    struct Pair {
        u64 sq = 0, cq = 0;
        u32 size = 0;           // entries of the submission queue
        u32 cq_size = 0;        // of the completion queue
        u32 head = 0, tail = 0; // of the submission queue
        u32 cq_tail = 0, cq_head = 0;
        u32 reports = 0; // of the completion queue's head
        u16 phase = 1;
        u16 vector = 0;
        bool there = false;
        /// As if created anew, at the same place.
        void restart() {
            *this = {.sq = sq, .cq = cq, .size = size, .cq_size = cq_size, .vector = vector, .there = true};
        }
    };

    explicit Controller(Options o = {}) : options(o), medium(o.blocks << o.lba_shift) {}
    Options options;
    Zeroed medium;
    std::array<Pair, 16> pairs{};
    std::vector<Held> held; // commands of the I/O queues, in order of arrival
    std::vector<Entry> admin;
    std::vector<Entry> commands; // of the I/O queues, completed ones included; if `records`
    bool records = false;
    std::vector<u16> events; // ids of asynchronous event requests
    bool hold = false;       // I/O commands are kept until answer()
    bool polls = true;       // looks at shadow doorbells without a write to a register
    bool hostile = false;    // a test makes it break the rules
    bool mute = false;       // admin commands are not answered
    std::set<u8> refused;    // admin opcodes that end with Invalid Command Opcode
    /// `claimed`: an Abort is said to have succeeded, and the command is not completed.
    enum class Aborts : u8 { never, yes, unanswered, claimed } aborts = Aborts::never;
    u32 abort_status = 0x007; // of a command that was aborted
    std::vector<u32> changed; // namespaces of the log page; read once
    u32 resets = 0;           // CC.EN from 1 to 0
    std::function<void()> on_reset;
    bool stays_ready = false;    // in spite of CC.EN = 0
    std::map<u32, u32> features; // Set Features, by id
    bool refuses_host_behavior = false;
    u32 delays_accepted = 0; // ACRE was set so often
    u32 granted = 0;         // I/O queue pairs, as told to the driver
    /// Changes identify data before the driver sees it.
    std::function<void(u32 cns, u32 nsid, u64 data)> patch;
    std::function<void(u16 vector)> interrupt;
    u64 shadow = 0, event_index = 0;
    u32 cc = 0, mask = 0, aqa = 0;
    u64 asq = 0, acq = 0;
    u64 doorbell_writes = 0;
    u64 reads = 0;
    std::optional<u16> last_cid; // of a command that was completed

    u32 stride() const { return 4u << (options.cap >> 32 & 0xf); }
    bool ready() const { return stays_ready || ((cc & 1) != 0 && !options.never_ready); }

    u64 read(u64 at, u32 width) override {
        ++reads;
        if (options.absent) {
            return ~u64{0};
        }
        switch (at) {
        case 0x00: EXPECT_EQ(width, 8u); return options.cap;
        case 0x08: return options.version;
        case 0x14: return cc;
        case 0x1c: return (ready() ? 1u : 0u) | (options.fatal ? 2u : 0u);
        default: ADD_FAILURE() << "a read of register " << at; return 0;
        }
    }
    void write(u64 at, u32 width, u64 value) override {
        EXPECT_EQ(width, at == 0x28 || at == 0x30 ? 8u : 4u);
        switch (at) {
        case 0x0c: mask |= static_cast<u32>(value); return;
        case 0x10: mask &= ~static_cast<u32>(value); return;
        case 0x14: configure(static_cast<u32>(value)); return;
        case 0x24:
            EXPECT_EQ(cc & 1, 0u);
            aqa = static_cast<u32>(value);
            return;
        case 0x28:
            EXPECT_EQ(cc & 1, 0u);
            EXPECT_EQ(value % 4096, 0u);
            asq = value;
            return;
        case 0x30:
            EXPECT_EQ(cc & 1, 0u);
            EXPECT_EQ(value % 4096, 0u);
            acq = value;
            return;
        default: break;
        }
        if (at < 0x1000 || (at - 0x1000) % stride() != 0) {
            ADD_FAILURE() << "a write to register " << at;
            return;
        }
        ++doorbell_writes;
        doorbell(static_cast<u32>((at - 0x1000) / stride()), static_cast<u32>(value));
    }
    /// With shadow doorbells: looks at them, as a controller that polls.
    void look() {
        for (u32 q = 1; q < pairs.size() && shadow != 0 && polls; ++q) {
            if (pairs[q].there) {
                doorbell(2 * q, load<u32>(shadow + 2 * q * stride()));
                doorbell(2 * q + 1, load<u32>(shadow + (2 * q + 1) * stride()));
            }
        }
    }
    /// Completes held[index]: transfers its data if the status is 0.
    void answer(usize index, u16 status = 0) {
        const Held h = held[index];
        held.erase(held.begin() + static_cast<std::ptrdiff_t>(index));
        if (status == 0) {
            execute(h);
        }
        last_cid = h.cid();
        complete(h.queue, h.cid(), status);
    }
    /// Posts a completion as given.
    void complete(u16 queue, u16 cid, u16 status, u32 dw0 = 0) {
        post(queue, {dw0, 0, pairs[queue].head | u32{queue} << 16, cid | u32{status} << 17});
    }
    void post(u16 queue, std::array<u32, 4> dwords) {
        Pair& p = pairs[queue];
        EXPECT_TRUE(hostile || (p.cq_tail + 1) % p.cq_size != p.cq_head) << "the completion queue is full";
        const u64 at = p.cq + u64{p.cq_tail} * 16;
        store(at, dwords[0]);
        store(at + 4, dwords[1]);
        store(at + 8, dwords[2]);
        store(at + 12, (dwords[3] & ~0x10000u) | u32{p.phase} << 16);
        p.cq_tail = (p.cq_tail + 1) % p.cq_size;
        p.phase ^= p.cq_tail == 0 ? 1 : 0;
        if (interrupt) {
            interrupt(p.vector);
        }
    }
    void report_event(u32 dw0) {
        ASSERT_FALSE(events.empty());
        const u16 cid = events.front();
        events.erase(events.begin());
        complete(0, cid, 0, dw0);
    }
    /// The ranges of a command's data, from its PRPs [nvme-1.4 §4.3].
    static std::vector<std::pair<u64, u32>> ranges(const Entry& e, u32 bytes) {
        std::vector<std::pair<u64, u32>> all;
        const u64 first = wide(e, 6);
        EXPECT_EQ(first % 4, 0u);
        const u32 in_first = std::min<u32>(bytes, static_cast<u32>(4096 - first % 4096));
        all.emplace_back(first, in_first);
        bytes -= in_first;
        u64 list = wide(e, 8);
        if (bytes == 0) {
            EXPECT_EQ(list, 0u) << "PRP2 of a command that does not need it";
        } else if (bytes <= 4096) {
            EXPECT_EQ(list % 4096, 0u);
            all.emplace_back(list, bytes);
        } else {
            EXPECT_EQ(list % 8, 0u);
            EXPECT_EQ(list / 4096, (list + (bytes - 1) / 4096 * 8) / 4096) << "the list crosses a page";
            for (; bytes != 0; list += 8) {
                const u32 n = std::min(bytes, 4096u);
                EXPECT_EQ(load<u64>(list) % 4096, 0u);
                all.emplace_back(load<u64>(list), n);
                bytes -= n;
            }
        }
        return all;
    }
    u32 bytes_of(const Entry& e) const { return ((e[12] & 0xffff) + 1) << options.lba_shift; }

  private:
    void configure(u32 value) {
        const bool on = (value & 1) != 0;
        if (on && (cc & 1) == 0) {
            EXPECT_EQ(value, 0x0046'0001u) << "16-byte completions, 64-byte commands, pages of 4096, NVM";
            pairs = {};
            pairs[0] = {
                .sq = asq, .cq = acq, .size = (aqa & 0xfff) + 1, .cq_size = (aqa >> 16 & 0xfff) + 1, .there = true};
            EXPECT_EQ(aqa & 0xfff, aqa >> 16);
            for (u32 i = 0; i < pairs[0].size * 16; i += 8) {
                EXPECT_EQ(load<u64>(acq + i), 0u) << "a completion queue that is not zeroed";
            }
        }
        if (!on) {
            resets += cc & 1;
            if (on_reset && (cc & 1) != 0) {
                on_reset();
            }
            granted = 0;
            held.clear();
            events.clear();
            pairs = {};
            shadow = 0;
        }
        cc = value;
    }
    void doorbell(u32 index, u32 value) {
        Pair& p = pairs[index / 2];
        if (!p.there || value >= (index % 2 == 1 ? p.cq_size : p.size)) {
            ADD_FAILURE() << "doorbell " << index << " with " << value;
            return;
        }
        if (index % 2 == 1) {
            EXPECT_LE((value + p.cq_size - p.cq_head) % p.cq_size, (p.cq_tail + p.cq_size - p.cq_head) % p.cq_size)
                << "a head beyond the tail";
            p.cq_head = value;
            ++p.reports;
            return;
        }
        p.tail = value;
        while (p.there && p.head != p.tail) {
            const Held h{static_cast<u16>(index / 2), load<Entry>(p.sq + u64{p.head} * 64)};
            p.head = (p.head + 1) % p.size;
            EXPECT_EQ(h.entry[0] & 0xff00, 0u) << "fused or SGL";
            for (const Held& other : held) {
                EXPECT_FALSE(other.queue == h.queue && other.cid() == h.cid()) << "an id that is in use";
            }
            if (h.queue == 0) {
                on_admin(h);
            } else {
                held.push_back(h);
                if (records) {
                    commands.push_back(h.entry);
                }
                if (!hold) {
                    answer(held.size() - 1);
                }
            }
        }
        if (shadow != 0 && index >= 2) {
            store(event_index + index * stride(), p.tail);
        }
    }
    void execute(const Held& h) {
        const u64 lba = wide(h.entry, 10);
        if (h.opcode() == 0) {
            EXPECT_TRUE(options.write_cache);
            return;
        }
        if (h.opcode() == 8) {
            EXPECT_TRUE(options.zeroes);
            EXPECT_EQ(wide(h.entry, 6) | wide(h.entry, 8), 0u) << "PRPs of a command without data";
            const u32 blocks = (h.dw(12) & 0xffff) + 1;
            EXPECT_EQ(h.dw(12) >> 16, 0u);
            EXPECT_LE(lba + blocks, options.blocks);
            EXPECT_TRUE(options.wzsl == 0 || blocks << options.lba_shift <= 4096u << options.wzsl) << "WZSL";
            std::memset(medium.data() + (lba << options.lba_shift), 0, u64{blocks} << options.lba_shift);
            return;
        }
        if (h.opcode() == 9) {
            EXPECT_EQ(h.dw(10), 0u);
            EXPECT_EQ(h.dw(11), 4u);
            const u64 range = wide(h.entry, 6);
            EXPECT_LE(load<u64>(range + 8) + load<u32>(range + 4), options.blocks);
            EXPECT_TRUE(options.dmrsl == 0 || load<u32>(range + 4) <= options.dmrsl) << "DMRSL";
            return;
        }
        ASSERT_TRUE(h.opcode() == 1 || h.opcode() == 2);
        const u32 bytes = bytes_of(h.entry);
        EXPECT_LE(lba + (bytes >> options.lba_shift), options.blocks);
        EXPECT_TRUE(options.mdts == 0 || bytes <= 4096u << options.mdts) << "MDTS";
        std::byte* at = medium.data() + (lba << options.lba_shift);
        for (const auto& [bus, n] : ranges(h.entry, bytes)) {
            auto* data = reinterpret_cast<std::byte*>(bus);
            h.opcode() == 1 ? std::memcpy(at, data, n) : std::memcpy(data, at, n);
            at += n;
        }
    }
    void on_admin(const Held& h) {
        admin.push_back(h.entry);
        const u64 data = wide(h.entry, 6);
        const u16 cid = h.cid();
        if (h.opcode() == 0x0c) {
            events.push_back(cid);
            return;
        }
        if (mute) {
            return;
        }
        u16 status = 0;
        u32 result = 0;
        const u16 id = static_cast<u16>(h.dw(10));
        if (h.opcode() == 0x08 && aborts == Aborts::unanswered) {
            return;
        }
        if (refused.contains(h.opcode())) {
            return complete(0, cid, 0x001);
        }
        switch (h.opcode()) {
        case 0x05:
        case 0x01: {
            EXPECT_TRUE(id != 0 && id < pairs.size());
            EXPECT_LE(id, granted) << "more queues than were granted";
            EXPECT_EQ(h.dw(11) & 1, 1u) << "contiguous";
            EXPECT_LE(h.dw(10) >> 16, options.cap & 0xffff) << "MQES";
            EXPECT_EQ(data % 4096, 0u);
            Pair& p = pairs[id];
            if (h.opcode() == 0x05) {
                p = {.cq = data, .cq_size = (h.dw(10) >> 16) + 1, .vector = static_cast<u16>(h.dw(11) >> 16)};
            } else {
                EXPECT_EQ(h.dw(11) >> 16, id);
                EXPECT_NE(p.cq, 0u) << "the completion queue comes first";
                p.sq = data;
                p.size = (h.dw(10) >> 16) + 1;
                p.there = true;
            }
            break;
        }
        case 0x02: log_page(h, data); break;
        case 0x06:
            EXPECT_EQ(h.dw(10) >> 8, 0u);
            EXPECT_EQ(h.dw(11), 0u) << "CSI: NVM";
            if ((h.dw(10) & 0xff) == 3 && !options.descriptors) {
                EXPECT_GE(options.version, 0x10300u);
                status = 2;
                break;
            }
            if (const u32 cns = h.dw(10) & 0xff; cns == 0x10 || cns == 0x11) {
                EXPECT_TRUE(options.cap >> 43 & 1) << "CAP.CSS: no other command sets";
                const bool other = std::ranges::find(options.zoned, h.dw(1)) != options.zoned.end();
                if (cns == 0x10 ? options.refuses_list : other) {
                    status = cns == 0x10 ? 2 : 0x12c;
                    break;
                }
            }
            identify(h.dw(10) & 0xff, h.dw(1), data);
            if (patch) {
                patch(h.dw(10) & 0xff, h.dw(1), data);
            }
            break;
        case 0x08: abort(h, result); break;
        case 0x09:
            if (id == 6) {
                EXPECT_TRUE(options.write_cache) << "volatile write cache, without one";
                if (options.keeps_cache) {
                    status = 2;
                    break;
                }
            }
            features[h.dw(10)] = h.dw(11);
            if (id == 0x16) { // Host Behavior Support
                if (refuses_host_behavior) {
                    status = 2;
                    break;
                }
                EXPECT_EQ(load<u8>(data), 1u) << "ACRE";
                EXPECT_EQ(h.dw(1), 0u);
                for (u32 i = 1; i < 512; ++i) {
                    EXPECT_EQ(load<u8>(data + i), 0u) << i;
                }
                ++delays_accepted;
            }
            if (id == 7) {
                for (u32 q = 1; q < pairs.size(); ++q) {
                    EXPECT_EQ(pairs[q].cq, 0u) << "the number of queues is set once there are some";
                }
                granted = options.queues;
                result = (options.queues - 1) << 16 | (options.queues - 1);
            }
            break;
        case 0x7c:
            EXPECT_TRUE(options.doorbell_buffers);
            shadow = data;
            event_index = wide(h.entry, 8);
            break;
        default: status = 1;
        }
        complete(0, cid, status, result);
    }
    void log_page(const Held& h, u64 data) {
        const u32 bytes = ((h.dw(10) >> 16) + 1) * 4;
        EXPECT_LE(data % 4096 + bytes, 4096u) << "PRP1 alone";
        EXPECT_EQ(h.dw(10) & 0x8000, 0u) << "RAE: the event stays";
        if ((h.dw(10) & 0xff) == 4) {
            EXPECT_EQ(bytes, 4096u);
            for (usize i = 0; i < changed.size(); ++i) {
                store<u32>(data + 4 * i, changed[i]);
            }
            changed.clear();
        }
    }
    void abort(const Held& h, u32& result) {
        result = aborts == Aborts::claimed ? 0 : 1;
        for (usize i = 0; i < held.size() && aborts == Aborts::yes; ++i) {
            if (held[i].queue == (h.dw(10) & 0xffff) && held[i].cid() == h.dw(10) >> 16) {
                result = 0;
                answer(i, static_cast<u16>(abort_status));
                return;
            }
        }
    }
    void identify(u32 cns, u32 nsid, u64 data) {
        std::vector<u32> list = options.list;
        for (u32 i = 1; i <= options.namespaces && options.list.empty(); ++i) {
            list.push_back(i);
        }
        if (cns == 2 || cns == 0x10) {
            if (cns == 0x10) {
                list.insert(list.end(), options.zoned.begin(), options.zoned.end());
                list.insert(list.end(), options.elsewhere.begin(), options.elsewhere.end());
                std::ranges::sort(list);
            }
            for (usize i = 0; i < list.size(); ++i) {
                store<u32>(data + 4 * i, list[i]);
            }
        } else if (cns == 0x11) {
            store<u64>(data, 1);
        } else if (cns == 6) {
            store<u8>(data + 1, options.wzsl);
            store<u32>(data + 4, options.dmrsl);
        } else if (cns == 1) {
            std::memcpy(reinterpret_cast<void*>(data + 4), "SERIAL              ", 20);
            std::memcpy(reinterpret_cast<void*>(data + 24), "FAKE NVME                               ", 40);
            std::memcpy(reinterpret_cast<void*>(data + 64), "1.0     ", 8);
            store<u8>(data + 77, options.mdts);
            for (usize i = 0; i < 3; ++i) {
                store<u16>(data + 128 + 2 * i, options.retry_delays[i]);
            }
            store<u16>(data + 256, options.doorbell_buffers ? 0x100 : 0);
            store<u8>(data + 512, 0x66);
            store<u8>(data + 513, 0x44);
            store<u32>(data + 516, options.namespaces);
            store<u16>(data + 520, static_cast<u16>((options.dataset ? 4 : 0) | (options.zeroes ? 8 : 0)));
            store<u8>(data + 525, options.write_cache ? 1 : 0);
        } else if (cns == 3 && std::ranges::find(list, nsid) != list.end()) {
            const auto add = [&](u8 type, u8 bytes, u8 last) {
                if (last == 0) {
                    return;
                }
                store<u32>(data, type | u32{bytes} << 8);
                store<u8>(data + 4, 0x40);
                store<u8>(data + 3 + bytes, static_cast<u8>(last + nsid));
                data += 4 + bytes;
            };
            add(0x7f, 5, 1); // of a later specification
            add(1, 8, options.eui64);
            add(2, 16, options.nguid);
            add(3, 16, options.uuid);
            if (options.command_set != 0) {
                store<u32>(data, 4 | 1 << 8);
                store<u8>(data + 4, options.command_set);
            }
        } else if (cns != 3 && std::ranges::find(list, nsid) != list.end()) {
            if (options.nguid != 0) {
                store<u8>(data + 104, 0x40);
                store<u8>(data + 119, static_cast<u8>(options.nguid + nsid));
            }
            if (options.eui64 != 0) {
                store<u8>(data + 120, 0x40);
                store<u8>(data + 127, static_cast<u8>(options.eui64 + nsid));
            }
            store<u64>(data, options.blocks);
            store<u64>(data + 8, options.blocks); // NCAP
            store<u8>(data + 29, options.protection);
            store<u32>(data + 128, options.lba_shift << 16 | options.metadata);
        }
    }
};

} // namespace nvme_fake
