// The host side of one storage channel, written from the descriptions of the ring and the storage protocol [vmbus-ring,
// storvsc], with its own offsets and indices. It serves rings that a Channel was attached to, and the Queue on them.
// Include after the imports.
#pragma once
#include "gtest_macros.hpp"
import test.gtest;
import host.std;

namespace fake {
using namespace fl;
using drivers::storvsc::Disk;
using drivers::storvsc::Queue;

inline u32 get32(const std::byte* at) {
    u32 value;
    std::memcpy(&value, at, 4);
    return value;
}
inline u64 get64(const std::byte* at) {
    u64 value;
    std::memcpy(&value, at, 8);
    return value;
}
inline u16 get16(const std::byte* at) {
    u16 value;
    std::memcpy(&value, at, 2);
    return value;
}
inline void put32(std::byte* at, u32 value) { std::memcpy(at, &value, 4); }
inline void put64(std::byte* at, u64 value) { std::memcpy(at, &value, 8); }

/// One SRB from the guest.
struct Command {
    u64 id = 0;
    std::vector<std::byte> packet; // header and SRB
    std::vector<std::pair<std::byte*, u32>> data;
    u32 bytes() const {
        u32 n = 0;
        for (const auto& part : data) {
            n += part.second;
        }
        return n;
    }
    u32 operation() const { return get32(packet.data()); }
    u8 cdb(usize i) const { return static_cast<u8>(packet[12 + 16 + i]); }
    u64 be(usize at, usize n) const {
        u64 value = 0;
        for (usize i = 0; i < n; ++i) {
            value = value << 8 | cdb(at + i);
        }
        return value;
    }
};

/// The reply to one command; the defaults are those of a conforming host.
struct Reply {
    u8 srb_status = 1;
    u8 scsi_status = 0;
    std::optional<u32> moved;
    std::string sense; // autosense, unless empty
    u32 operation = 1;
    u32 length = 64; // of the packet's payload
    u16 type = 11;
    std::optional<u64> id;
    bool twice = false;
    bool never = false;
};

class StorageHost {
  public:
    static constexpr u32 ring_data = 16384;
    static constexpr u32 ring_size = 4096 + ring_data;

    Zeroed disk{8192 * 512};
    StorageHost* medium = this;                          // the channel of the same device that has the disk
    std::deque<Command> commands;                        // received and not completed
    std::function<Reply(const Command&)> reply_override; // overrides the regular reply
    u32 packet_length = 64;
    u64 done = 0;
    u64 flushes = 0;
    u64 unmaps = 0;
    u64 resets = 0;
    u64 signals_wanted = 0;
    bool hold = false; // receive nothing, complete nothing
    std::vector<u64> past_ids;

    /// `rings`: the guest's outgoing ring is the first.
    void attach(std::byte* rings) {
        out_ = rings;
        in_ = rings + ring_size;
    }
    std::byte* in_ring() { return in_; }
    std::byte* out_ring() { return out_; }

    /// Receives what the guest has published. True: there was something.
    bool take() {
        bool some = false;
        for (;;) {
            const u32 write = std::atomic_ref<u32>(*reinterpret_cast<u32*>(out_)).load();
            u32 read = get32(out_ + 4);
            if (write == read) {
                return some;
            }
            some = true;
            std::array<std::byte, 16> head;
            copy_out(read, head.data(), 16);
            EXPECT_EQ(get16(head.data() + 0) == 6 || get16(head.data()) == 9, true) << "inband or GPA direct";
            const u32 header = get16(head.data() + 2) * 8u;
            const u32 total = get16(head.data() + 4) * 8u;
            EXPECT_EQ(get16(head.data() + 6), 1) << "a completion is wanted";
            std::vector<std::byte> packet(total);
            copy_out(read, packet.data(), total);
            std::array<std::byte, 8> trailer;
            copy_out((read + total) % ring_data, trailer.data(), 8);
            EXPECT_EQ(get64(trailer.data()), u64{read} << 32);
            Command command;
            command.id = get64(head.data() + 8);
            if (get16(head.data()) == 9) {
                EXPECT_EQ(get32(packet.data() + 20), 1u) << "one range";
                u32 left = get32(packet.data() + 24);
                u32 offset = get32(packet.data() + 28);
                EXPECT_EQ(header, 32 + (offset + left + 4095) / 4096 * 8);
                for (u32 at = 32; at < header; at += 8) {
                    const u32 n = std::min(left, 4096 - offset);
                    command.data.push_back(
                        {reinterpret_cast<std::byte*>(get64(packet.data() + at) * 4096 + offset), n});
                    left -= n;
                    offset = 0;
                }
                EXPECT_EQ(left, 0u);
            } else {
                EXPECT_EQ(header, 16u);
            }
            command.packet.assign(packet.begin() + header, packet.end());
            EXPECT_EQ(command.packet.size(), packet_length);
            EXPECT_EQ(get32(command.packet.data() + 4), 1u) << "REQUEST_COMPLETION";
            commands.push_back(std::move(command));
            read = (read + total + 8) % ring_data;
            std::atomic_ref<u32>(*reinterpret_cast<u32*>(out_ + 4)).store(read);
        }
    }
    /// Completes the command at `index` of `commands`.
    void answer(usize index = 0) {
        Command command = commands[index];
        commands.erase(commands.begin() + static_cast<std::ptrdiff_t>(index));
        Reply reply = reply_override ? reply_override(command) : Reply{};
        if (reply.never) {
            return;
        }
        ++done;
        if (reply.length == 64) {
            reply.length = packet_length;
        }
        u32 moved = 0;
        if (command.operation() == 6) {
            ++resets;
        } else if (reply.srb_status == 1 && reply.scsi_status == 0) {
            moved = perform(command);
        }
        std::vector<std::byte> payload(std::max(64u, reply.length));
        put32(payload.data(), reply.operation);
        payload[12] = static_cast<std::byte>(packet_length - 12);
        payload[14] = static_cast<std::byte>(reply.srb_status);
        payload[15] = static_cast<std::byte>(reply.scsi_status);
        put32(payload.data() + 24, reply.moved.value_or(moved));
        if (!reply.sense.empty()) {
            payload[14] |= std::byte{0x80};
            payload[21] = static_cast<std::byte>(reply.sense.size());
            std::memcpy(payload.data() + 28, reply.sense.data(), std::min<usize>(reply.sense.size(), 20));
        }
        payload.resize(reply.length);
        past_ids.push_back(command.id);
        send(reply.type, reply.id.value_or(command.id), payload);
        if (reply.twice) {
            send(reply.type, reply.id.value_or(command.id), payload);
        }
    }
    bool step() {
        if (hold || out_ == nullptr) {
            return false;
        }
        bool some = take();
        while (!commands.empty()) {
            answer();
            some = true;
        }
        return some;
    }

    void send(u16 type, u64 id, const std::vector<std::byte>& payload) {
        std::vector<std::byte> packet(16 + payload.size() + 8);
        const u16 words[4] = {type, 2, static_cast<u16>(2 + payload.size() / 8), 0};
        std::memcpy(packet.data(), words, 8);
        put64(packet.data() + 8, id);
        std::copy(payload.begin(), payload.end(), packet.begin() + 16);
        put64(packet.data() + 16 + payload.size(), u64{get32(in_)} << 32);
        raw(packet);
    }
    /// Sends an unsolicited message that consists of the operation only.
    void event(u32 operation) {
        std::vector<std::byte> payload(packet_length);
        put32(payload.data(), operation);
        send(6, 0, payload);
    }
    void raw(const std::vector<std::byte>& packet) {
        u32 write = get32(in_);
        const u32 old = write;
        for (std::byte b : packet) {
            in_[4096 + write] = b;
            write = (write + 1) % ring_data;
        }
        std::atomic_ref<u32>(*reinterpret_cast<u32*>(in_)).store(write);
        if (get32(in_ + 8) == 0 && get32(in_ + 4) == old) {
            ++signals_wanted;
        }
    }

  private:
    void copy_out(u32 at, std::byte* into, u32 n) {
        for (u32 i = 0; i < n; ++i) {
            into[i] = out_[4096 + (at + i) % ring_data];
        }
    }
    u32 perform(const Command& c) {
        const auto fits = [&](u64 lba, u64 blocks) { return (lba + blocks) * 512 <= medium->disk.size(); };
        switch (c.cdb(0)) {
        case 0x28:
        case 0x2a:
        case 0x88:
        case 0x8a: {
            const bool is_short = c.cdb(0) < 0x80;
            const bool is_read = (c.cdb(0) & 0x0f) == 8;
            const u64 lba = is_short ? c.be(2, 4) : c.be(2, 8);
            const u64 blocks = is_short ? c.be(7, 2) : c.be(10, 4);
            EXPECT_EQ(static_cast<u8>(c.packet[12 + 8]), is_short ? 10 : 16) << "length of the command";
            EXPECT_TRUE(fits(lba, blocks));
            EXPECT_EQ(blocks * 512, c.bytes());
            EXPECT_EQ(get32(c.packet.data() + 24), c.bytes());
            if (packet_length == 64) { // added in later versions: tag, action, flags
                EXPECT_EQ(static_cast<u8>(c.packet[12 + 38]), 0xff) << "untagged";
                EXPECT_EQ(static_cast<u8>(c.packet[12 + 39]), 0x20) << "simple";
                EXPECT_EQ(get32(c.packet.data() + 12 + 40), is_read ? 0x14au : 0x18au);
            }
            EXPECT_EQ(static_cast<u8>(c.packet[22]), is_read ? 1 : 0) << "direction";
            std::byte* at = medium->disk.data() + lba * 512;
            for (const auto& [data, n] : c.data) {
                if (is_read) {
                    std::memcpy(data, at, n);
                } else {
                    std::memcpy(at, data, n);
                }
                at += n;
            }
            return c.bytes();
        }
        case 0x35:
        case 0x91: ++flushes; return 0;
        case 0x42: {
            ++unmaps;
            EXPECT_EQ(c.bytes(), 24u);
            const std::byte* list = c.data[0].first;
            u64 lba = 0;
            for (usize i = 8; i < 16; ++i) {
                lba = lba << 8 | static_cast<u8>(list[i]);
            }
            u64 blocks = 0;
            for (usize i = 16; i < 20; ++i) {
                blocks = blocks << 8 | static_cast<u8>(list[i]);
            }
            EXPECT_TRUE(fits(lba, blocks));
            std::memset(medium->disk.data() + lba * 512, 0, blocks * 512);
            return 24;
        }
        default: return 0;
        }
    }
    std::byte* out_ = nullptr;
    std::byte* in_ = nullptr;
};

} // namespace fake
