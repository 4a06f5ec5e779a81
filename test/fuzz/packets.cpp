// Both ends of a channel's rings over memory whose other side is controlled by the fuzzer: it conforms, violates the
// protocol, or changes a word between two reads. Checked: only the ring's bytes and the end's own words are accessed;
// packets from a conforming host arrive unchanged, and packets sent can be parsed by a reader that knows only the
// format; a side that waits for room or for packets is always woken; a broken ring stays broken.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <vector>
import core.std;
import core.result;
import core.dma;
import io.ring;
import io.ring.hostile;
import hv.hyperv.packets;

#include "fuzz/input.hpp"

namespace {
using namespace fl;
using namespace fl::hv::hyperv;
using fuzz::require;

// Offsets of the control words [vmbus-ring].
constexpr usize write_word = 0;
constexpr usize read_word = 4;
constexpr usize mask_word = 8;
constexpr usize pending_word = 12;

struct Ring {
    u32 size; // size of the data area in bytes
    std::unique_ptr<u64[]> words;
    io::HostileMemory::State state;
    fuzz::Input* input = nullptr; // supplies changes between reads; nullptr: no changes
    bool sound = true;            // the host has conformed so far
    usize copied = 0;             // packet bytes read by the guest's end
    std::array<usize, 2> ours{};  // words that the guest's end may write

    Ring(u32 bytes, std::array<usize, 2> writable)
        : size(bytes), words(std::make_unique<u64[]>((4096 + bytes) / 8)), ours(writable) {
        state.storage = std::as_writable_bytes(std::span(words.get(), (4096 + bytes) / 8));
        state.context = this;
        state.before_read = [](void* self, io::HostileMemory::State&, usize offset, usize count) {
            static_cast<Ring*>(self)->look(offset, count);
        };
    }
    u32 word(usize at) const {
        u32 value;
        std::memcpy(&value, state.storage.data() + at, 4);
        return value;
    }
    void set(usize at, u32 value) { state.poke(at, value); }
    std::byte* data() const { return state.storage.data() + 4096; }
    u32 used() const { return (word(write_word) + size - word(read_word)) % size; } // of a valid ring
    void look(usize offset, usize count) {
        require(offset <= state.storage.size() && count <= state.storage.size() - offset);
        copied += offset >= 4096 ? count : 0;
        if (input == nullptr || input->empty() || count == 0) {
            return;
        }
        const u8 choice = input->byte();
        if ((choice & 3) == 0) {
            sound = false;
            const auto bytes = input->take(std::min<usize>(count, 1 + (choice >> 2) % 16));
            std::copy(bytes.begin(), bytes.end(), state.storage.begin() + static_cast<std::ptrdiff_t>(offset));
        }
    }
};

// The hostile memory, with checks of every access.
class Memory {
  public:
    explicit Memory(Ring& ring) : ring_(&ring), inner_(ring.state) {}
    usize size() const { return inner_.size(); }
    template <class W>
    W load_relaxed(usize offset) const {
        return inner_.template load_relaxed<W>(offset);
    }
    template <class W>
    W load_acquire(usize offset) const {
        return inner_.template load_acquire<W>(offset);
    }
    template <class W>
    void store_relaxed(usize offset, W value) {
        may_write(offset);
        inner_.template store_relaxed<W>(offset, value);
    }
    template <class W>
    void store_release(usize offset, W value) {
        may_write(offset);
        inner_.template store_release<W>(offset, value);
    }
    void full_barrier() const {}
    void copy_out(usize offset, std::byte* into, usize count) const {
        require(offset >= 4096);
        inner_.copy_out(offset, into, count);
    }
    void copy_in(usize offset, const std::byte* from, usize count) {
        require(offset >= 4096 && offset <= size() && count <= size() - offset);
        inner_.copy_in(offset, from, count);
    }

  private:
    void may_write(usize offset) const { require(offset == ring_->ours[0] || offset == ring_->ours[1]); }
    Ring* ring_;
    io::HostileMemory inner_;
};
static_assert(io::RingMemory<Memory>);

// A packet as sent.
struct Meant {
    u16 type = 0;
    u16 flags = 0;
    u64 transaction = 0;
    std::vector<u8> header{}; // after the descriptor
    std::vector<u8> payload{};
};
void append(std::vector<u8>& into, u64 value) {
    for (u32 i = 0; i < 8; ++i) {
        into.push_back(static_cast<u8>(value >> 8 * i));
    }
}
void pad(std::vector<u8>& bytes) { bytes.resize((bytes.size() + 7) / 8 * 8); }
u64 get(std::span<const u8> bytes, usize at, u32 count) {
    u64 value = 0;
    for (u32 i = 0; i < count; ++i) {
        value |= u64{bytes[at + i]} << 8 * i;
    }
    return value;
}

struct Outgoing {
    Ring ring;
    PacketSender<Memory> sender;
    std::deque<Meant> meant; // queued, not yet read
    usize unpublished = 0;   // how many of the last ones
    explicit Outgoing(u32 bytes) : ring(bytes, {write_word, pending_word}), sender(make(ring)) {}
    static PacketSender<Memory> make(Ring& ring) {
        Memory memory(ring);
        ring.ours = {0, 4096};
        for (usize at = 0; at < 4096; at += 4) { // initialise_ring() writes the whole page
            ring.set(at, 0x5a5a5a5a);
        }
        io::FlatMemory flat(ring.state.storage);
        initialise_ring(flat);
        require(ring.word(64) == 1 && ring.word(write_word) == 0 && ring.word(4092) == 0);
        ring.ours = {write_word, pending_word};
        return *PacketSender<Memory>::create(memory);
    }

    // Reads one packet as a host would; false: none available.
    bool take() {
        const u32 write = ring.word(write_word);
        const u32 read = ring.word(read_word);
        require(write < ring.size && write % 8 == 0);
        if (read == write) {
            return false;
        }
        const u32 there = (write + ring.size - read) % ring.size;
        const auto at = [&](u32 i) { return static_cast<u8>(ring.data()[(read + i) % ring.size]); };
        std::vector<u8> bytes;
        for (u32 i = 0; i < 16; ++i) {
            bytes.push_back(at(i));
        }
        const u32 total = static_cast<u32>(get(bytes, 4, 2)) * 8;
        require(there >= 24 && total + 8 <= there);
        for (u32 i = 16; i < total + 8; ++i) {
            bytes.push_back(at(i));
        }
        require(!meant.empty());
        const Meant& m = meant.front();
        require(get(bytes, 0, 2) == m.type && get(bytes, 2, 2) * 8 == 16 + m.header.size() &&
                get(bytes, 6, 2) == m.flags);
        require(total == 16 + m.header.size() + m.payload.size() && get(bytes, 8, 8) == m.transaction);
        require(std::equal(m.header.begin(), m.header.end(), bytes.begin() + 16));
        require(std::equal(m.payload.begin(), m.payload.end(),
                           bytes.begin() + 16 + static_cast<std::ptrdiff_t>(m.header.size())));
        require(get(bytes, total, 8) == u64{read} << 32);
        meant.pop_front();
        ring.set(read_word, (read + total + 8) % ring.size);
        return true;
    }

    void sent(Sent result, Meant m) {
        pad(m.payload);
        const u64 need = 16 + m.header.size() + m.payload.size() + 8;
        const u32 queued = [&] {
            u32 sum = 0;
            for (usize i = meant.size() - unpublished; ring.sound && i < meant.size(); ++i) {
                sum += static_cast<u32>(16 + meant[i].header.size() + meant[i].payload.size() + 8);
            }
            return sum;
        }();
        switch (result) {
        case Sent::queued:
            require(need <= ring.size - 1 && need <= 8 * 0xffff + 8);
            if (ring.sound) {
                require(ring.used() + queued + need < ring.size && ring.word(pending_word) == 0);
                meant.push_back(std::move(m));
                ++unpublished;
            }
            break;
        case Sent::full:
            require(need < ring.size);
            if (ring.sound) { // and the host knows how much room is needed
                require(ring.used() + queued + need >= ring.size && ring.word(pending_word) == need);
            }
            break;
        case Sent::too_long: require(need >= ring.size || need - 8 > 8 * 0xffff); break;
        case Sent::broken: require(!ring.sound && sender.error()); break;
        }
    }
    void publish() {
        const bool expected =
            sender.unpublished() && ring.word(mask_word) == 0 && ring.word(read_word) == ring.word(write_word);
        const bool signal = sender.publish();
        require(!ring.sound || signal == expected); // a sleeping host is woken, and only a sleeping one
        unpublished = 0;
        // nothing is published into a broken ring
        require(!sender.unpublished() || (!ring.sound && sender.error()));
    }

    void send(fuzz::Input& input) {
        static const std::array<std::byte, 8192> source = [] {
            std::array<std::byte, 8192> bytes{};
            for (usize i = 0; i < bytes.size(); ++i) {
                bytes[i] = static_cast<std::byte>(i * 37 + i / 256);
            }
            return bytes;
        }();
        const bool was_broken = sender.error().has_value();
        const u8 how = input.byte();
        const u32 length = how & 0x20 ? input.word() % (source.size() + 1) : input.byte();
        const auto payload = std::span(source).first(length);
        Meant m;
        m.transaction = input.byte() | u64{how} << 40;
        m.flags = (how & 0x10) != 0;
        for (std::byte b : payload) {
            m.payload.push_back(static_cast<u8>(b));
        }
        Sent result = Sent::queued;
        switch (how & 3) {
        case 0:
            m.type = 6;
            result = sender.inband(payload, m.transaction, m.flags != 0);
            break;
        case 1:
            m.type = 11;
            m.flags = 0;
            result = sender.completion(payload, m.transaction);
            break;
        case 2: { // several ranges
            m.type = 9;
            std::array<std::array<u64, 24>, 3> frames;
            std::array<PageRange, 3> ranges;
            const u32 count = input.byte() % 4;
            append(m.header, u64{count} << 32);
            for (u32 i = 0; i < count; ++i) {
                const u32 pages = input.byte() % 24;
                for (u32 p = 0; p < pages; ++p) {
                    frames[i][p] = u64{0x1234567} * (p + 1) + i;
                }
                ranges[i] = {pages * 4096, input.byte(), std::span<const u64>(frames[i]).first(pages)};
                append(m.header, u64{ranges[i].offset} << 32 | ranges[i].bytes);
                for (u32 p = 0; p < pages; ++p) {
                    append(m.header, frames[i][p]);
                }
            }
            result = sender.gpa_direct(payload, std::span<const PageRange>(ranges).first(count), m.transaction,
                                       m.flags != 0);
            break;
        }
        default: {
            m.type = 9;
            const DmaSpan buffer{nullptr, u64{input.word()} << 8 | input.byte(),
                                 input.word() % (how & 0x40 ? 0x1000000 : 70000)};
            const u64 first = buffer.bus / 4096;
            const u64 frames =
                buffer.size == 0 && buffer.bus % 4096 == 0 ? 0 : (buffer.bus % 4096 + buffer.size + 4095) / 4096;
            append(m.header, u64{1} << 32);
            append(m.header, buffer.bus % 4096 << 32 | buffer.size);
            for (u64 f = 0; f < frames; ++f) {
                append(m.header, first + f);
            }
            result = sender.gpa_direct(std::span<const std::byte>(payload), buffer, m.transaction, m.flags != 0);
            break;
        }
        }
        require(!was_broken || result == Sent::broken);
        sent(result, std::move(m));
    }
};

struct Incoming {
    Ring ring;
    std::unique_ptr<std::byte[]> buffer; // separately allocated, so that an overrun is detected
    u32 most;
    PacketReceiver<Memory> receiver;
    std::deque<Meant> meant;
    u32 unreleased = 0;
    bool broken = false;
    Incoming(u32 bytes, u32 longest)
        : ring(bytes, {read_word, mask_word}), buffer(std::make_unique<std::byte[]>(longest)), most(longest),
          receiver(make()) {}
    PacketReceiver<Memory> make() {
        io::FlatMemory flat(ring.state.storage);
        initialise_ring(flat);
        return *PacketReceiver<Memory>::create(Memory(ring), {buffer.get(), most});
    }

    // Writes a valid packet if there is room; otherwise the host sets the room it waits for.
    void put(fuzz::Input& input) {
        const u32 write = ring.word(write_word);
        if (write >= ring.size || write % 8 != 0) {
            return;
        }
        Meant m;
        const u8 how = input.byte();
        m.type = 6 + how % 8;
        m.flags = how >> 7;
        m.transaction = u64{input.byte()} << 33 | how;
        m.header.resize((how >> 4 & 3) * 8u);
        m.payload.resize(input.byte() % 64 * (how & 8 ? 32u : 8u));
        for (usize i = 0; i < m.header.size(); ++i) {
            m.header[i] = static_cast<u8>(i ^ how);
        }
        for (usize i = 0; i < m.payload.size(); ++i) {
            m.payload[i] = static_cast<u8>(i * 3 + how);
        }
        std::vector<u8> bytes;
        append(bytes, m.type | u64{2 + m.header.size() / 8} << 16 |
                          u64{2 + m.header.size() / 8 + m.payload.size() / 8} << 32 | u64{m.flags} << 48);
        append(bytes, m.transaction);
        bytes.insert(bytes.end(), m.header.begin(), m.header.end());
        bytes.insert(bytes.end(), m.payload.begin(), m.payload.end());
        append(bytes, u64{write} << 32);
        if (ring.sound && ring.used() + bytes.size() >= ring.size) {
            ring.set(pending_word, static_cast<u32>(bytes.size()));
            return;
        }
        if (m.header.size() + m.payload.size() > most) {
            ring.sound = false; // longer than this channel accepts
        }
        ring.set(pending_word, 0);
        for (usize i = 0; i < bytes.size(); ++i) {
            ring.data()[(write + i) % ring.size] = std::byte{bytes[i]};
        }
        ring.set(write_word, static_cast<u32>((write + bytes.size()) % ring.size));
        meant.push_back(std::move(m));
    }
    void receive() {
        Packet packet;
        ring.copied = 0;
        const auto got = receiver.receive(packet);
        require(got || (!ring.sound && receiver.error()));
        require(!broken || !got);
        broken = !got;
        if (!got || !*got) {
            require(!ring.sound || meant.empty());
            return;
        }
        const std::byte* begin = buffer.get();
        require(packet.header.size() + packet.payload.size() <= most && packet.header.data() >= begin);
        require(packet.payload.data() == packet.header.data() + packet.header.size() &&
                packet.payload.data() + packet.payload.size() <= begin + most);
        // nothing remains of the previous packet
        require(ring.copied == 16 + packet.header.size() + packet.payload.size());
        unreleased += static_cast<u32>(24 + packet.header.size() + packet.payload.size());
        require(!ring.sound || !meant.empty());
        if (ring.sound) {
            const Meant& m = meant.front();
            const auto same = [](std::span<const std::byte> a, const std::vector<u8>& b) {
                return a.size() == b.size() && (b.empty() || std::memcmp(a.data(), b.data(), b.size()) == 0);
            };
            require(to_underlying(packet.type) == m.type && packet.wants_completion == (m.flags != 0) &&
                    packet.transaction == m.transaction);
            require(same(packet.header, m.header) && same(packet.payload, m.payload));
            meant.pop_front();
        }
    }
    void release() {
        const u32 pending = ring.word(pending_word);
        const u32 before = ring.size - (ring.sound ? ring.used() : 0);
        const u32 freed = std::exchange(unreleased, 0);
        const bool signal = receiver.release();
        if (ring.sound) { // it is signalled if, and only if, the room it waits for is available now
            require(signal == (freed != 0 && pending != 0 && before <= pending && before + freed > pending));
        }
    }
    void arm() {
        const bool was_broken = receiver.error().has_value();
        const auto found = receiver.arm();
        require(!was_broken || !found);
        require(found || !ring.sound);
        broken = broken || !found;
        require(!ring.sound || (*found == !meant.empty() && ring.word(mask_word) == 0));
    }
};
} // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    fuzz::Input input(data, size);
    const u8 shape = input.byte();
    Outgoing out((shape & 1) != 0 ? 16384 : 4096);
    Incoming in((shape & 2) != 0 ? 16384 : 4096, (shape & 4) != 0 ? 4096 : 256);
    out.ring.input = (shape & 8) != 0 ? &input : nullptr;
    in.ring.input = (shape & 16) != 0 ? &input : nullptr;
    while (!input.empty()) {
        switch (input.byte() % 16) {
        case 0:
        case 1: out.send(input); break;
        case 2: out.publish(); break;
        case 3:
            if (out.ring.sound) {
                static_cast<void>(out.take());
            }
            break;
        case 4:
            while (out.ring.sound && out.take()) {
            }
            break;
        case 5: out.ring.set(mask_word, input.byte() & 1); break;
        case 6:
        case 7: in.put(input); break;
        case 8:
        case 9: in.receive(); break;
        case 10: in.release(); break;
        case 11: in.arm(); break;
        case 12:
            in.receiver.disarm();
            require(in.ring.word(mask_word) != 0 || in.ring.input != nullptr);
            break;
        case 13: { // an arbitrary word of a header
            const u8 which = input.byte();
            Ring& ring = (which & 1) != 0 ? in.ring : out.ring;
            ring.sound = false;
            const u32 near = ring.word(which >> 4 & 4) + (which >> 3 & 1) * 8 - 8;
            ring.set(which >> 1 & 0xc, (which & 0x80) != 0 ? near : input.word());
            break;
        }
        case 14: { // arbitrary memory
            const u8 which = input.byte();
            Ring& ring = (which & 1) != 0 ? in.ring : out.ring;
            ring.sound = false;
            const u32 at = (which & 2) != 0
                               ? 4096 + (ring.word((which & 1) != 0 ? write_word : read_word) + which / 4) % ring.size
                               : input.word() % (4096 + ring.size);
            const auto bytes = input.take(std::min<u32>(input.byte(), 4096 + ring.size - at));
            std::copy(bytes.begin(), bytes.end(), ring.state.storage.begin() + at);
            break;
        }
        default: // end of the round: everything is read, released and taken
            while (in.ring.sound && !in.meant.empty()) {
                in.receive();
            }
            in.release();
            out.publish();
            break;
        }
    }
    return 0;
}
