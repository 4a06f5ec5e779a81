// A PVSCSI adapter in memory, written from [pvscsi]: registers, commands, rings, SG lists, messages; its disks answer
// READ, WRITE, SYNCHRONIZE CACHE, UNMAP and WRITE SAME, and the other commands as fake::Unit does. Every rule that the
// driver breaks fails the test. Bus addresses are pointers. Include after the imports.
#pragma once
#include "gtest_macros.hpp"

#include "zeroed.hpp"
import test.gtest;
import host.std;

#include "unit/drivers/scsi_fake.hpp"

namespace pvscsi_fake {
using namespace fl;

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

/// A request descriptor, by its offsets.
struct Request {
    std::array<u8, 128> bytes{};
    template <class T>
    T get(usize at) const {
        T value;
        std::memcpy(&value, bytes.data() + at, sizeof value);
        return value;
    }
    u64 context() const { return get<u64>(0); }
    u64 address() const { return get<u64>(8); }
    u64 length() const { return get<u64>(16); }
    u32 flags() const { return get<u32>(36); }
    u8 cdb(usize i) const { return bytes[40 + i]; }
    u8 target() const { return bytes[67]; }
    u8 lun() const { return bytes[58]; }
    u64 be(usize at, usize n) const {
        u64 value = 0;
        for (usize i = at; i < at + n; ++i) {
            value = value << 8 | cdb(i);
        }
        return value;
    }
    bool transfers() const { return cdb(0) == 0x28 || cdb(0) == 0x2a || cdb(0) == 0x88 || cdb(0) == 0x8a; }
    /// Where its data is: one range, or a list of SG elements.
    std::vector<std::pair<u64, u32>> ranges() const {
        std::vector<std::pair<u64, u32>> all;
        if ((flags() & 1) == 0) {
            if (length() != 0) {
                EXPECT_LE(length(), 65536u) << "without a list";
                all.emplace_back(address(), static_cast<u32>(length()));
            }
            return all;
        }
        u64 left = length();
        for (u64 at = address(); left != 0 && all.size() < 256; at += 16) {
            EXPECT_EQ(at / 4096, address() / 4096) << "the list leaves its page";
            const u32 n = load<u32>(at + 8);
            EXPECT_TRUE(n != 0 && n <= 65536 && n <= left);
            EXPECT_EQ(load<u32>(at + 12), 0u) << "flags of an element";
            EXPECT_EQ(load<u64>(at) >> 32, (load<u64>(at) + n - 1) >> 32) << "an element crosses 4 GiB";
            all.emplace_back(load<u64>(at), n);
            left -= std::min<u64>(n, left);
        }
        return all;
    }
};

struct Reply {
    u16 host = 0;
    u16 status = 0;
    std::vector<u8> sense;
    std::optional<u64> moved; // nothing: 0, as QEMU's adapter
    std::optional<u32> sense_length;
};

class Adapter final : public MmioModel {
  public:
    explicit Adapter(u64 sectors = 8192) : medium(sectors * 512) {}

    // What the adapter is able to do.
    bool has_messages = true;
    bool has_threshold = false;
    std::optional<u32> targets;              // told by CONFIG
    bool absent = false;                     // registers read as all ones
    std::optional<u32> refused;              // this command fails
    std::function<void(u64 state)> on_setup; // changes the rings state after SETUP_RINGS
    bool mute = false;                       // takes no request
    bool hold = false;                       // requests are kept until answer()
    bool completes_resets = true;            // RESET_BUS and RESET_DEVICE end what is held
    bool completes_aborts = true;
    std::set<u8> silent;  // targets that answer no command by themselves
    bool counts = false;  // reports the bytes moved
    bool hostile = false; // a test makes it break the rules
    std::map<std::pair<u8, u8>, fake::Unit> units;
    std::function<std::optional<Reply>(const Request&)> reply_override;
    std::function<void()> interrupt;

    Zeroed medium;
    std::vector<Request> held;
    std::vector<u32> commands; // of the adapter
    std::vector<u64> past;     // contexts that were completed
    u32 status = 0, causes = 0, mask = 0;
    u32 rw_kicks = 0, other_kicks = 0, resets = 0, flushes = 0, unmaps = 0, zeroings = 0, lists = 0,
        acknowledgements = 0;
    u64 aborted = 0;
    bool rings_valid = false, messages_valid = false;
    u64 state = 0;

    u64 read(u64 at, u32 width) override {
        EXPECT_EQ(width, 4u);
        if (absent) {
            return ~u32{0};
        }
        switch (at) {
        case 0x8: return status;
        case 0x100c: return causes;
        default: ADD_FAILURE() << "a read of register " << at; return 0;
        }
    }
    void write(u64 at, u32 width, u64 value) override {
        EXPECT_EQ(width, 4u);
        const u32 v = static_cast<u32>(value);
        switch (at) {
        case 0x0:
            which_ = v;
            words_.clear();
            commands.push_back(v);
            status = ~u32{1};
            execute();
            break;
        case 0x4:
            words_.push_back(v);
            execute();
            break;
        case 0x100c:
            ++acknowledgements;
            causes &= ~v;
            break;
        case 0x2010: mask = v; break;
        case 0x3014:
            ++other_kicks;
            process(false);
            break;
        case 0x4018:
            ++rw_kicks;
            process(true);
            break;
        default: ADD_FAILURE() << "a write to register " << at;
        }
    }
    /// Completes held[index].
    void answer(usize index, const Reply& reply = {}) {
        const Request r = held[index];
        held.erase(held.begin() + static_cast<std::ptrdiff_t>(index));
        u64 moved = 0;
        if (reply.host == 0 && reply.status == 0) {
            moved = perform(r);
        }
        std::ranges::copy(reply.sense, reinterpret_cast<u8*>(r.get<u64>(24)));
        past.push_back(r.context());
        complete(r.context(), reply.moved.value_or(counts ? moved : 0),
                 reply.sense_length.value_or(static_cast<u32>(reply.sense.size())), reply.host, reply.status);
    }
    void complete(u64 context, u64 moved, u32 sense, u16 host, u16 scsi) {
        ASSERT_TRUE(rings_valid || hostile);
        const u32 producer = load<u32>(state + 12);
        EXPECT_TRUE(hostile || producer - load<u32>(state + 16) < completion_entries_) << "the completion ring is full";
        const u64 at = completion_pages_[producer % completion_entries_ / 128] + producer % 128 * 32;
        store(at, context);
        store(at + 8, moved);
        store(at + 16, sense);
        store(at + 20, host);
        store(at + 22, scsi);
        store(state + 12, producer + 1);
        raise(1);
    }
    void message(u32 type, u32 bus, u32 target) {
        ASSERT_TRUE(messages_valid);
        const u32 producer = load<u32>(state + 128);
        EXPECT_LT(producer - load<u32>(state + 132), 32u) << "the message ring is full";
        const u64 at = message_page_ + producer % 32 * 128;
        store(at, type);
        store(at + 4, bus);
        store(at + 8, target);
        store(state + 128, producer + 1);
        raise(4);
    }
    bool pending() const { return (causes & mask) != 0; }

  private:
    void raise(u32 cause) {
        causes |= cause;
        if ((mask & cause) != 0 && interrupt) {
            interrupt();
        }
    }
    void execute() {
        static const std::map<u32, usize> sizes{{1, 0}, {3, 132}, {4, 0}, {5, 3}, {6, 4}, {7, 6}, {8, 34}, {10, 1}};
        const bool known = sizes.contains(which_) && (which_ != 8 || has_messages) && (which_ != 10 || has_threshold);
        if (!known || which_ == refused) {
            status = ~u32{0};
            return;
        }
        if (words_.size() < sizes.at(which_)) {
            return;
        }
        EXPECT_EQ(words_.size(), sizes.at(which_)) << "more data than the command has";
        const auto wide = [&](usize at) { return words_[at] | u64{words_[at + 1]} << 32; };
        status = 0;
        switch (which_) {
        case 1:
            ++resets;
            held.clear();
            rings_valid = messages_valid = false;
            causes = 0;
            break;
        case 3: {
            EXPECT_EQ(resets != 0, true) << "rings before a reset";
            EXPECT_TRUE(std::has_single_bit(words_[0]) && words_[0] <= 32);
            EXPECT_TRUE(std::has_single_bit(words_[1]) && words_[1] <= 32);
            state = wide(2) * 4096;
            request_pages_.clear();
            completion_pages_.clear();
            for (u32 i = 0; i < words_[0]; ++i) {
                request_pages_.push_back(wide(4 + 2 * i) * 4096);
            }
            for (u32 i = 0; i < words_[1]; ++i) {
                completion_pages_.push_back(wide(68 + 2 * i) * 4096);
            }
            for (u32 i = words_[0]; i < 32; ++i) {
                EXPECT_EQ(wide(4 + 2 * i), 0u);
            }
            completion_entries_ = words_[1] * 128;
            EXPECT_GE(completion_entries_, words_[0] * 32) << "completions could overrun their ring";
            for (u32 at = 0; at < 24; at += 4) {
                store<u32>(state + at, 0);
            }
            store<u32>(state + 8, static_cast<u32>(std::countr_zero(words_[0] * 32)));
            store<u32>(state + 20, static_cast<u32>(std::countr_zero(completion_entries_)));
            rings_valid = true;
            consumed_ = 0;
            if (on_setup) {
                on_setup(state);
            }
            break;
        }
        case 4:
            for (usize n = completes_resets ? held.size() : 0; n != 0; --n) {
                answer(0, {.host = 0x25});
            }
            break;
        case 5:
            for (usize n = completes_resets ? held.size() : 0; n-- != 0;) {
                if (held[n].target() == words_[0]) {
                    answer(n, {.host = 0x25});
                }
            }
            break;
        case 6:
            aborted = wide(0);
            for (usize n = 0; n < held.size() && completes_aborts; ++n) {
                if (held[n].context() == aborted) {
                    EXPECT_EQ(words_[2], held[n].target());
                    answer(n, {.host = 0x26});
                    break;
                }
            }
            break;
        case 7:
            EXPECT_EQ(wide(2), u64{0x2120} << 32);
            EXPECT_EQ(words_[4], 0x1958u);
            if (targets) {
                store<u16>(wide(0) + 6, 0);
                store<u16>(wide(0) + 8, 0);
                store<u32>(wide(0) + 472, *targets);
            }
            status = targets ? 0 : ~u32{0};
            break;
        case 8:
            EXPECT_TRUE(rings_valid && words_[0] == 1 && words_[1] == 0);
            message_page_ = wide(2) * 4096;
            store<u32>(state + 128, 0);
            store<u32>(state + 132, 0);
            store<u32>(state + 136, 5);
            messages_valid = true;
            status = 34;
            break;
        case 10:
            EXPECT_EQ(words_[0], 1u);
            status = 1;
            break;
        default: break;
        }
    }
    void process(bool rw) {
        if (mute || !rings_valid) {
            EXPECT_TRUE(mute || hostile) << "a kick without rings";
            return;
        }
        const u32 entries = static_cast<u32>(request_pages_.size()) * 32;
        const u32 producer = load<u32>(state);
        ASSERT_LE(producer - consumed_, entries) << "the request ring is overrun";
        for (; consumed_ != producer && rings_valid; ++consumed_) {
            Request r;
            const u32 at = consumed_ % entries;
            std::memcpy(r.bytes.data(), reinterpret_cast<const void*>(request_pages_[at / 32] + at % 32 * 128), 128);
            check(r);
            EXPECT_TRUE(!rw || r.transfers()) << "KICK_RW_IO for a command that is none";
            held.push_back(r);
        }
        store<u32>(state + 4, consumed_);
        usize at = 0;
        for (usize n = held.size(); !hold && n != 0; --n) {
            if (silent.contains(held[at].target())) {
                ++at;
                continue;
            }
            const auto reply = reply_override ? reply_override(held[at]) : std::nullopt;
            answer(at, reply ? *reply : inquire(held[at]));
        }
    }
    void check(const Request& r) {
        EXPECT_TRUE(r.context() != 0 && r.context() >> 32 == 0) << "a context of 32 bits";
        for (const Request& other : held) {
            EXPECT_NE(other.context(), r.context()) << "a context that is in use";
        }
        EXPECT_EQ(r.flags() & ~0x1du, 0u);
        EXPECT_EQ(std::popcount(r.flags() & 0x1cu), 1) << "one direction";
        EXPECT_EQ((r.flags() & 4u) != 0, r.length() == 0);
        EXPECT_EQ(r.bytes[65], 0x20) << "SIMPLE";
        EXPECT_EQ(r.bytes[66], 0) << "bus";
        for (const usize at : {57u, 59u, 60u, 61u, 62u, 63u, 64u}) {
            EXPECT_EQ(r.bytes[at], 0) << "the LUN's format";
        }
        EXPECT_TRUE(std::all_of(r.bytes.begin() + 69, r.bytes.end(), [](u8 b) { return b == 0; })) << "unused bytes";
        EXPECT_TRUE(r.get<u64>(24) != 0 && r.get<u32>(32) >= 18) << "room for sense data";
        const u32 group = r.cdb(0) >> 5;
        EXPECT_EQ(r.bytes[56], group == 0 ? 6 : group == 4 ? 16 : group == 5 ? 12 : 10) << "the CDB's length";
        lists += r.flags() & 1;
    }
    // The reply of a unit, for commands that only it can answer.
    Reply inquire(const Request& r) {
        const u8 code = r.cdb(0);
        const bool anyone = std::ranges::any_of(units, [&](const auto& u) { return u.first.first == r.target(); });
        if (!anyone) {
            return {.host = 0x11}; // selection timeout
        }
        if (r.transfers() || code == 0x35 || code == 0x91 || code == 0x42 || code == 0x93) {
            return {};
        }
        fake::Answer answer;
        if (code == 0xa0) {
            answer.data.resize(8);
            for (const auto& [at, unit] : units) {
                if (at.first == r.target()) {
                    answer.data.resize(answer.data.size() + 8);
                    answer.data[answer.data.size() - 7] = at.second;
                }
            }
            fake::put_be(answer.data, 0, 4, answer.data.size() - 8);
        } else if (const auto unit = units.find({r.target(), r.lun()}); unit != units.end()) {
            drivers::scsi::Cdb cdb;
            std::copy_n(r.bytes.begin() + 40, 16, cdb.bytes.begin());
            answer = unit->second.answer(cdb);
        } else {
            answer = fake::check(5, 0x25);
        }
        if (answer.sense) {
            const auto [key, asc, ascq] = *answer.sense;
            return {.status = 2, .sense = {0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, asc, ascq, 0, 0, 0, 0}};
        }
        // Less data than was asked for: DATARUN, and no length, as QEMU's adapter.
        const usize n = std::min<usize>(answer.data.size(), r.length());
        usize done = 0;
        for (const auto& [bus, bytes] : r.ranges()) {
            const usize some = std::min<usize>(bytes, n - done);
            std::copy_n(answer.data.begin() + static_cast<std::ptrdiff_t>(done), some, reinterpret_cast<u8*>(bus));
            done += some;
        }
        return {.host = static_cast<u16>(n < r.length() ? 0x12 : 0)};
    }
    u64 block_bytes(const Request& r) const {
        const auto unit = units.find({r.target(), r.lun()});
        return unit == units.end() ? 512 : unit->second.block_bytes;
    }
    u64 perform(const Request& r) {
        if (r.cdb(0) == 0x35 || r.cdb(0) == 0x91) {
            ++flushes;
        } else if (r.cdb(0) == 0x42) {
            ++unmaps;
            const u64 list = r.address();
            const u64 lba = __builtin_bswap64(load<u64>(list + 8));
            const u64 bytes = __builtin_bswap32(load<u32>(list + 16)) * u64{512};
            EXPECT_LE(lba * 512 + bytes, medium.size());
            std::memset(medium.data() + lba * 512, 0, bytes);
        } else if (r.cdb(0) == 0x93) {
            ++zeroings;
            const u64 block = block_bytes(r);
            EXPECT_EQ(r.cdb(1), 0) << "not unmapped";
            EXPECT_EQ(r.flags() & 0x1d, 0x10u) << "one range, to the device";
            EXPECT_EQ(r.length(), block);
            for (u64 i = 0; i < r.length(); ++i) {
                EXPECT_EQ(load<u8>(r.address() + i), 0u);
            }
            EXPECT_NE(r.be(10, 4), 0u) << "it would mean all blocks up to the last";
            EXPECT_LE((r.be(2, 8) + r.be(10, 4)) * block, medium.size());
            std::memset(medium.data() + r.be(2, 8) * block, 0, r.be(10, 4) * block);
        } else if (r.transfers()) {
            const bool out = (r.cdb(0) & 0xf) == 0xa;
            EXPECT_EQ((r.flags() & 0x10) != 0, out) << "the direction";
            const bool is_long = r.cdb(0) >= 0x80;
            const u64 block = block_bytes(r);
            u64 at = (is_long ? r.be(2, 8) : r.be(2, 4)) * block;
            EXPECT_EQ((is_long ? r.be(10, 4) : r.be(7, 2)) * block, r.length());
            EXPECT_LE(at + r.length(), medium.size());
            for (const auto& [bus, n] : r.ranges()) {
                auto* data = reinterpret_cast<std::byte*>(bus);
                out ? std::memcpy(medium.data() + at, data, n) : std::memcpy(data, medium.data() + at, n);
                at += n;
            }
        }
        return r.length();
    }

    u32 which_ = 0;
    std::vector<u32> words_;
    std::vector<u64> request_pages_, completion_pages_;
    u64 message_page_ = 0;
    u32 completion_entries_ = 0;
    u32 consumed_ = 0;
};

} // namespace pvscsi_fake
