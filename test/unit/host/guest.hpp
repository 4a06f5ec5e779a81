// A guest for the test host's VMBus, written by hand from the protocol description: its own offsets and indices, no
// structure shared with either side. Include after the imports.
#pragma once
#include "gtest_macros.hpp"
import test.gtest;
import host.std;

namespace typed {

using namespace fl;
using Bytes = std::vector<u8>;

/// Converts "0e 00 00 00" to bytes.
inline Bytes hex(std::string_view text) {
    Bytes result;
    int high = -1;
    for (const char c : text) {
        const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
        if (digit < 0) {
            continue;
        }
        if (high < 0) {
            high = digit;
        } else {
            result.push_back(static_cast<u8>(high << 4 | digit));
            high = -1;
        }
    }
    return result;
}
template <class T>
void put(Bytes& into, T value) {
    for (usize i = 0; i < sizeof(T); ++i) {
        into.push_back(static_cast<u8>(static_cast<u64>(value) >> (8 * i)));
    }
}
template <class T>
T get(const Bytes& from, usize at) {
    T value{};
    if (at + sizeof(T) <= from.size()) {
        std::memcpy(&value, from.data() + at, sizeof(T));
    }
    return value;
}
inline Bytes message(u32 type) {
    Bytes bytes;
    put(bytes, type);
    put(bytes, u32{0});
    return bytes;
}

/// Records what the host writes to the SynIC's pages.
class Machine final : public host::Delivery, public host::Log {
  public:
    struct Delivered {
        u32 vp;
        u8 sint;
        u32 type;
        Bytes bytes;
        u32 message() const { return get<u32>(bytes, 0); }
    };
    struct Event {
        u32 vp;
        u8 sint;
        u16 flag;
        bool operator==(const Event&) const = default;
    };
    Message post(u32 vp, u8 sint, u32 type, std::span<const std::byte> payload) override {
        if (refuse) {
            return Message::refused;
        }
        if (busy) {
            return Message::busy;
        }
        const auto* first = reinterpret_cast<const u8*>(payload.data());
        messages.push_back({vp, sint, type, Bytes(first, first + payload.size())});
        busy = one_slot;
        return Message::delivered;
    }
    host::Delivery::Event set_event(u32 vp, u8 sint, u16 flag, bool always) override {
        static_cast<void>(always);
        events.push_back({vp, sint, flag});
        return host::Delivery::Event::raised;
    }
    void connection(u32 id, bool exists) override {
        connections.erase(id);
        if (exists) {
            connections.insert(id);
        }
    }
    void line(std::string_view text) override { lines.emplace_back(text); }

    bool logged(std::string_view text) const {
        for (const std::string& line : lines) {
            if (line.find(text) != std::string::npos) {
                return true;
            }
        }
        return false;
    }

    std::vector<Delivered> messages;
    std::vector<Event> events;
    std::set<u32> connections;
    std::vector<std::string> lines;
    bool busy = false;
    bool one_slot = false; // a message stays until the test frees the slot
    bool refuse = false;
};

/// One packet from the host's ring.
struct Received {
    u16 type = 0;
    u16 offset = 0; // in bytes
    u16 length = 0; // in bytes, without the trailer
    u16 flags = 0;
    u64 transaction = 0;
    Bytes payload;
    u32 trailer = 0;
    u32 at = 0;
};

/// A ring pair as the guest sees it, at a guest-physical address; pages in the order of a list.
class Rings {
  public:
    Rings() = default;
    Rings(std::span<u8> memory, std::vector<u64> frames, u32 downstream)
        : memory_(memory), frames_(std::move(frames)), downstream_(downstream) {}

    u32 bytes(bool from_host) const {
        return static_cast<u32>(from_host ? frames_.size() - downstream_ - 1 : downstream_ - 1) * 4096;
    }
    u32& word(bool from_host, u32 offset) { return *reinterpret_cast<u32*>(at(from_host, offset)); }
    u32& write_index(bool from_host) { return word(from_host, 0); }
    u32& read_index(bool from_host) { return word(from_host, 4); }
    u32& mask(bool from_host) { return word(from_host, 8); }
    u32& pending(bool from_host) { return word(from_host, 12); }
    u32& features(bool from_host) { return word(from_host, 64); }
    u8* at(bool from_host, u32 offset) {
        const u32 page = (from_host ? downstream_ : 0) + offset / 4096;
        return memory_.data() + frames_[page] * 4096 + offset % 4096;
    }
    void put_byte(u32 position, u8 value) { *at(false, 4096 + position % bytes(false)) = value; }

    /// Writes raw bytes at the write index and advances it.
    void write(const Bytes& raw) {
        const u32 begin = write_index(false);
        for (usize i = 0; i < raw.size(); ++i) {
            put_byte(begin + static_cast<u32>(i), raw[i]);
        }
        write_index(false) = (begin + static_cast<u32>(raw.size())) % bytes(false);
    }
    /// A packet: descriptor, `header` (ranges), payload, padding, trailer.
    void send(u16 type, u64 transaction, const Bytes& payload, const Bytes& header = {}, u16 flags = 1) {
        Bytes raw;
        const u32 begin = write_index(false);
        const usize total = 16 + header.size() + (payload.size() + 7) / 8 * 8;
        put<u16>(raw, type);
        put<u16>(raw, static_cast<u16>((16 + header.size()) / 8));
        put<u16>(raw, static_cast<u16>(total / 8));
        put<u16>(raw, flags);
        put<u64>(raw, transaction);
        raw.insert(raw.end(), header.begin(), header.end());
        raw.insert(raw.end(), payload.begin(), payload.end());
        raw.resize(total);
        put<u32>(raw, 0);
        put<u32>(raw, begin);
        write(raw);
    }
    u32 ready() { return (write_index(true) + bytes(true) - read_index(true)) % bytes(true); }
    /// The next packet; nothing: empty. Advances the read index by the length in the descriptor.
    std::optional<Received> receive() {
        if (ready() == 0) {
            return std::nullopt;
        }
        Received packet;
        packet.at = read_index(true);
        const auto raw = [&](u32 offset) { return *at(true, 4096 + (packet.at + offset) % bytes(true)); };
        Bytes head;
        for (u32 i = 0; i < 16; ++i) {
            head.push_back(raw(i));
        }
        packet.type = get<u16>(head, 0);
        packet.offset = static_cast<u16>(get<u16>(head, 2) * 8);
        packet.length = static_cast<u16>(get<u16>(head, 4) * 8);
        packet.flags = get<u16>(head, 6);
        packet.transaction = get<u64>(head, 8);
        for (u32 i = packet.offset; i < packet.length && i < 8192; ++i) {
            packet.payload.push_back(raw(i));
        }
        Bytes tail;
        for (u32 i = 0; i < 8; ++i) {
            tail.push_back(raw(packet.length + i));
        }
        packet.trailer = get<u32>(tail, 4);
        read_index(true) = (packet.at + packet.length + 8) % bytes(true);
        return packet;
    }

  private:
    std::span<u8> memory_;
    std::vector<u64> frames_;
    u32 downstream_ = 0;
};

/// Memory, machine, host, and the protocol steps of a guest.
class Guest {
  public:
    static constexpr usize memory_bytes = 4 << 20;

    explicit Guest(const host::ServerConfig& config = {}) : store_(disk) {
        memory.add(0, storage_.bytes());
        server.emplace(memory, machine, machine, config);
    }

    /// Adds a controller with one LUN on `disk`.
    host::StorageDevice& add_disk(host::StorageConfig config = {}, host::LunConfig lun = {}) {
        lun.store = lun.store != nullptr ? lun.store : &store_;
        return server->add(host::StorageDevice::scsi(config, {lun}));
    }

    void poll() {
        for (int i = 0; i < 64 && server->poll(now); ++i) {
        }
    }
    u16 post(const Bytes& bytes, u32 to = 4) {
        const auto status = server->on_message(to, 1, std::as_bytes(std::span(bytes)));
        poll();
        return static_cast<u16>(status);
    }
    /// Takes the oldest message; empty if there is none.
    Bytes take() {
        if (machine.messages.empty()) {
            return {};
        }
        Bytes bytes = machine.messages.front().bytes;
        machine.messages.erase(machine.messages.begin());
        return bytes;
    }
    static Bytes contact_message(u32 version, u64 target = 2) {
        Bytes bytes = message(14);
        put(bytes, version);
        put(bytes, u32{0}); // processor
        put(bytes, target);
        put(bytes, u64{0});
        put(bytes, u64{0});
        return bytes;
    }
    bool connect(u32 version = 0x00050003) {
        const bool new_way = version >= 0x00050000;
        connection = new_way ? 4 : 1;
        post(contact_message(version, new_way ? 2 : 0x3000), connection);
        const Bytes answer = take();
        return get<u32>(answer, 0) == 15 && answer[8] == 1;
    }
    std::vector<Bytes> request_offers() {
        std::vector<Bytes> offers;
        post(message(3), connection);
        while (!machine.messages.empty() && machine.messages.front().message() == 1) {
            offers.push_back(take());
        }
        return offers;
    }
    static u32 relid(const Bytes& offer) { return get<u32>(offer, 184); }

    /// Creates a GPADL over `frames`; returns the status of GPADL_CREATED.
    u32 share(u32 channel, u32 handle, const std::vector<u64>& frames) {
        Bytes bytes = message(8);
        put(bytes, channel);
        put(bytes, handle);
        put<u16>(bytes, static_cast<u16>(8 + frames.size() * 8));
        put<u16>(bytes, 1);
        put<u32>(bytes, static_cast<u32>(frames.size() * 4096));
        put<u32>(bytes, 0);
        usize next = 0;
        for (; next < frames.size() && next < 26; ++next) {
            put(bytes, frames[next]);
        }
        post(bytes, connection);
        while (next < frames.size()) {
            Bytes body = message(9);
            put(body, u32{0});
            put(body, handle);
            for (usize i = 0; i < 28 && next < frames.size(); ++i) {
                put(body, frames[next++]);
            }
            post(body, connection);
        }
        const Bytes created = take();
        return get<u32>(created, 0) == 10 && get<u32>(created, 12) == handle ? get<u32>(created, 16) : ~u32{1};
    }
    static Bytes open_message(u32 channel, u32 handle, u32 downstream, u32 vp = 0) {
        Bytes bytes = message(5);
        put(bytes, channel);
        put(bytes, u32{0x77});
        put(bytes, handle);
        put(bytes, vp);
        put(bytes, downstream);
        bytes.resize(148);
        return bytes;
    }
    /// Opens a channel over scattered pages; false: rejected or no reply.
    bool open(u32 channel, Rings& rings, u32 ring_pages = 3, u32 handle = 0xe1e10, bool scattered = true, u32 vp = 0) {
        std::vector<u64> frames;
        for (u32 i = 0; i < 2 * (ring_pages + 1); ++i) {
            frames.push_back(next_frame_ + (scattered ? 2 * i : i));
        }
        next_frame_ += 4 * (ring_pages + 1);
        if (share(channel, handle, frames) != 0) {
            return false;
        }
        rings = Rings(ram, frames, ring_pages + 1);
        rings.features(false) = 1;
        post(open_message(channel, handle, ring_pages + 1, vp), connection);
        const Bytes result = take();
        return get<u32>(result, 0) == 6 && get<u32>(result, 8) == channel && get<u32>(result, 12) == 0x77 &&
               get<u32>(result, 16) == 0;
    }
    void signal(u32 channel) {
        EXPECT_EQ(server->on_signal(0x2000 | channel, 0), host::HvStatus::success);
        poll();
    }

    // ---- storage ----
    /// An operation without data; returns the status in the reply's header, or nothing.
    std::optional<u32> operation(u32 channel, Rings& rings, u32 code, const Bytes& body = {}) {
        Bytes payload;
        put(payload, code);
        put(payload, u32{1});
        put(payload, u32{0});
        payload.insert(payload.end(), body.begin(), body.end());
        payload.resize(64);
        rings.send(6, ++transaction, payload);
        signal(channel);
        const auto answer = rings.receive();
        if (!answer || answer->transaction != transaction || get<u32>(answer->payload, 0) != 1) {
            return std::nullopt;
        }
        last = *answer;
        return get<u32>(answer->payload, 8);
    }
    bool initialize(u32 channel, Rings& rings, u16 version = 0x0600) {
        return operation(channel, rings, 7) == 0u &&
               operation(channel, rings, 9, {static_cast<u8>(version), static_cast<u8>(version >> 8)}) == 0u &&
               operation(channel, rings, 10) == 0u && operation(channel, rings, 8) == 0u;
    }
    /// Payload of EXECUTE_SRB. direction: 0 out, 1 in, 2 none.
    static Bytes srb(const Bytes& cdb, u8 direction, u32 bytes, u8 lun = 0, u8 target = 0, u8 path = 0) {
        Bytes payload;
        put(payload, u32{3});
        put(payload, u32{1});
        put(payload, u32{0});
        put<u16>(payload, 0x34);
        payload.insert(payload.end(), {0, 0, 0, path, target, lun, static_cast<u8>(cdb.size()), 20, direction, 0});
        put(payload, bytes);
        payload.insert(payload.end(), cdb.begin(), cdb.end());
        payload.resize(64);
        return payload;
    }
    /// GPA-direct header for `bytes` at guest-physical address `address`.
    static Bytes range(u64 address, u32 bytes) {
        Bytes header;
        put(header, u32{0});
        put(header, u32{1});
        put(header, bytes);
        put(header, static_cast<u32>(address % 4096));
        for (u64 frame = address / 4096; frame <= (address + bytes - 1) / 4096; ++frame) {
            put(header, frame);
        }
        return header;
    }
    struct Answer {
        u8 srb_status = 0;
        u8 scsi_status = 0;
        u8 sense_bytes = 0;
        u32 transferred = 0;
        u32 status = 0;
        Bytes sense;
    };
    static Answer parse(const Received& packet) {
        Answer answer;
        const Bytes& p = packet.payload;
        answer.status = get<u32>(p, 8);
        answer.srb_status = get<u8>(p, 14);
        answer.scsi_status = get<u8>(p, 15);
        answer.sense_bytes = get<u8>(p, 21);
        answer.transferred = get<u32>(p, 24);
        answer.sense = Bytes(p.begin() + 28, p.begin() + 46);
        return answer;
    }
    std::optional<Answer> command(u32 channel, Rings& rings, const Bytes& cdb, u8 direction = 2, u64 address = 0,
                                  u32 bytes = 0, u8 lun = 0, u8 target = 0, u8 path = 0) {
        rings.send(bytes != 0 ? 9 : 6, ++transaction, srb(cdb, direction, bytes, lun, target, path),
                   bytes != 0 ? range(address, bytes) : Bytes{});
        signal(channel);
        const auto answer = rings.receive();
        if (!answer || answer->type != 11 || answer->transaction != transaction) {
            return std::nullopt;
        }
        last = *answer;
        return parse(*answer);
    }
    static Bytes read_16(u64 lba, u32 blocks, bool write = false) {
        Bytes cdb{static_cast<u8>(write ? 0x8a : 0x88), 0};
        for (int i = 7; i >= 0; --i) {
            cdb.push_back(static_cast<u8>(lba >> (8 * i)));
        }
        for (int i = 3; i >= 0; --i) {
            cdb.push_back(static_cast<u8>(blocks >> (8 * i)));
        }
        cdb.resize(16);
        return cdb;
    }
    /// Connects and opens and initialises one controller; returns the channel's relid.
    u32 start(Rings& rings, u16 version = 0x0600, host::LunConfig lun = {}, host::StorageConfig config = {}) {
        add_disk(std::move(config), std::move(lun));
        EXPECT_TRUE(connect());
        const auto offers = request_offers();
        EXPECT_EQ(offers.size(), 1u);
        const u32 channel = relid(offers.at(0));
        take(); // ALL_OFFERS_DELIVERED
        EXPECT_TRUE(open(channel, rings));
        EXPECT_TRUE(initialize(channel, rings, version));
        return channel;
    }
    u64 violations() const { return server->counters().violations; }

  private:
    static std::vector<std::byte> pattern() {
        std::vector<std::byte> bytes(1 << 20);
        for (usize i = 0; i < bytes.size(); ++i) {
            bytes[i] = static_cast<std::byte>(i / 512 * 7 + i);
        }
        return bytes;
    }
    static const std::vector<std::byte>& content() {
        static const std::vector<std::byte> made = pattern(); // shared by all tests of a process
        return made;
    }
    Zeroed storage_{memory_bytes};

  public:
    std::span<u8> ram{reinterpret_cast<u8*>(storage_.data()), memory_bytes};
    std::vector<std::byte> disk = content();
    host::GuestMemory memory;
    Machine machine;
    std::optional<host::Server> server;
    u64 now = 1;
    u32 connection = 4;
    u64 transaction = 100;
    Received last;

  private:
    host::MemoryStore store_;
    u64 next_frame_ = 16;
};

} // namespace typed
