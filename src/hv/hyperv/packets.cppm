// Packets in a pair of VMBus byte rings: the wire format and its sender and receiver, based on io.ring. Generic over
// the ring's memory, so that tests and fuzzers can supply hostile memory. Makes no hypercalls: sender and receiver
// report when to signal the host. [vmbus-ring]
//
// io.ring's table describes the ordering of the ring's words. Two more pairs are used here:
//
//   ours: send            pending_send_sz, full barrier, read index
//   the host's            read index, full barrier, pending_send_sz
//   ours: release         read index, full barrier, pending_send_sz
//   the host's            pending_send_sz, full barrier, read index
// One of the two sees the other: the side that waits for room is signalled, or finds room.
module;
#include <cstddef>
export module hv.hyperv.packets;
import core.std;
import core.result;
import core.dma;
import io.ring;

export namespace fl::hv::hyperv {

// ---- wire ----

/// The header of a ring: its first page, followed by the packet bytes.
struct RingHeader {
    u32 write_index = 0;
    u32 read_index = 0;
    u32 interrupt_mask = 0;  // not 0: the reader wants no events
    u32 pending_send_sz = 0; // not 0: the writer waits until more than this many bytes are free
    std::array<u32, 12> reserved{};
    u32 features = 0; // bit 0: the writer uses pending_send_sz
};
static_assert(sizeof(RingHeader) == 68 && offsetof(RingHeader, write_index) == 0 &&
              offsetof(RingHeader, read_index) == 4 && offsetof(RingHeader, interrupt_mask) == 8 &&
              offsetof(RingHeader, pending_send_sz) == 12 && offsetof(RingHeader, features) == 64);
inline constexpr usize ring_header_bytes = page_size;
inline constexpr u32 ring_feature_pending_send = 1;
inline constexpr io::RingLayout ring_layout{
    .index = 0, .event = 8, .consumed = 4, .entries = ring_header_bytes, .stride = 1};

enum class PacketType : u16 {
    invalid = 0,
    inband = 6,
    transfer_pages = 7,
    gpadl = 8,
    gpa_direct = 9,
    cancel = 10,
    completion = 11,
};

/// Precedes every packet. Lengths are in units of 8 bytes.
struct PacketDescriptor {
    PacketType type = PacketType::invalid;
    u16 header_units = 0; // this descriptor and the type-specific header
    u16 total_units = 0;  // header and payload, without the trailer
    u16 flags = 0;
    u64 transaction = 0;
};
static_assert(sizeof(PacketDescriptor) == 16 && offsetof(PacketDescriptor, header_units) == 2 &&
              offsetof(PacketDescriptor, total_units) == 4 && offsetof(PacketDescriptor, flags) == 6 &&
              offsetof(PacketDescriptor, transaction) == 8);
inline constexpr u16 packet_wants_completion = 1;
/// Follows every packet: the packet's start offset, in bits 32–63. Written but not checked: see
/// PacketReceiver::receive().
inline constexpr u32 packet_trailer_bytes = 8;

/// Follows the descriptor of a gpa_direct packet. Each range follows it: length, offset into the first page, page
/// numbers.
struct GpaDirectHeader {
    u32 reserved = 0;
    u32 range_count = 0;
};
static_assert(sizeof(GpaDirectHeader) == 8 && offsetof(GpaDirectHeader, range_count) == 4);

/// A buffer of a packet: `bytes` bytes, starting at `offset` in the first page. `frames`: guest page numbers, as many
/// as the buffer touches.
struct PageRange {
    u32 bytes = 0;
    u32 offset = 0;
    std::span<const u64> frames;
};

/// A received packet. The spans refer to the receiver's buffer and are valid until the next receive().
struct Packet {
    PacketType type = PacketType::invalid;
    bool wants_completion = false;
    u64 transaction = 0;
    // the part of the header that follows the descriptor (empty for inband and completion)
    std::span<const std::byte> header;
    std::span<const std::byte> payload; // padded to 8 bytes by the sender: its own fields give the length that is used
};

/// A payload of size_bytes(), whole words, that puts them one by one, in order.
template <class P>
concept PayloadWords = requires(const P& payload, struct AnyWriter& out) {
    { payload.size_bytes() } -> std::convertible_to<usize>;
    payload.put(out);
};

/// Result of sending a packet.
enum class Sent : u8 {
    queued,   // in the ring; visible to the host after publish()
    full,     // no room now; the host has been asked to signal when there is: retry on the next event
    too_long, // longer than the ring: will never fit
    broken,   // the host has violated the ring protocol
};

/// Result of a look at the next packet.
enum class Look : u8 { none, taken, other };

/// Bytes of memory for one direction with `data` bytes for packets.
constexpr usize ring_bytes(usize data) { return ring_header_bytes + data; }

/// Initialises a ring's memory before it is shared with the host: all zero except the feature bit.
template <io::RingMemory M>
void initialise_ring(M& memory) {
    for (usize at = 0; at < ring_header_bytes; at += 4) {
        memory.template store_relaxed<u32>(at, 0);
    }
    memory.template store_relaxed<u32>(offsetof(RingHeader, features), ring_feature_pending_send);
}

// ---- sending ----

template <io::RingMemory M>
class PacketSender {
  public:
    /// `memory`: an initialised ring, header page and data. Error{bad_argument}: not a whole number of pages, or no
    /// data.
    static Result<PacketSender> create(M memory) {
        if (memory.size() < ring_header_bytes + page_size || memory.size() % page_size != 0) {
            return Error{Code::bad_argument, "a VMBus ring is a header page and at least one page of bytes",
                         2 * page_size, memory.size()};
        }
        auto producer =
            Ring::create(memory, ring_layout, io::Wrapped<u32>(static_cast<u32>(memory.size() - ring_header_bytes)));
        if (!producer) {
            return producer.error();
        }
        return PacketSender(memory, *producer);
    }

    Sent inband(std::span<const std::byte> payload, u64 transaction, bool wants_completion) {
        return simple(PacketType::inband, payload, transaction, flags(wants_completion));
    }
    Sent completion(std::span<const std::byte> payload, u64 transaction) {
        return simple(PacketType::completion, payload, transaction, 0);
    }

    /// `ranges`: each must have exactly as many frames as it touches; not checked here.
    Sent gpa_direct(std::span<const std::byte> payload, std::span<const PageRange> ranges, u64 transaction,
                    bool wants_completion) {
        u64 header = sizeof(PacketDescriptor) + sizeof(GpaDirectHeader);
        for (const PageRange& range : ranges) {
            header += 8 + 8 * u64{range.frames.size()};
        }
        return packet(PacketType::gpa_direct, header, payload, transaction, flags(wants_completion), [&](auto& out) {
            out.put(std::bit_cast<u64>(GpaDirectHeader{0, static_cast<u32>(ranges.size())}));
            for (const PageRange& range : ranges) {
                out.put(u64{range.offset} << 32 | range.bytes);
                for (const u64 frame : range.frames) {
                    out.put(frame);
                }
            }
        });
    }
    /// The same with one contiguous range, whose page numbers are computed here. `payload`: bytes, or what
    /// puts words [PayloadWords], which takes one store a word.
    template <class Payload>
    [[gnu::always_inline]] inline Sent gpa_direct(Payload payload, DmaSpan buffer, u64 transaction,
                                                  bool wants_completion) {
        const u64 offset = buffer.bus % page_size;
        const u64 frames = (offset + buffer.size + page_size - 1) / page_size;
        const u64 header = sizeof(PacketDescriptor) + sizeof(GpaDirectHeader) + 8 + 8 * frames;
        return packet(PacketType::gpa_direct, header, payload, transaction, flags(wants_completion),
                      [first = buffer.bus / page_size, frames, range = offset << 32 | buffer.size](auto& out)
                          __attribute__((always_inline)) {
                              out.put(std::bit_cast<u64>(GpaDirectHeader{0, 1}));
                              out.put(range);
#pragma clang loop unroll(disable) // mostly one
                              for (u64 frame = first; frame != first + frames; ++frame) {
                                  out.put(frame);
                              }
                          });
    }

    /// Publishes everything queued with one store. True: the host must be signalled. First reads the host's read index,
    /// once per batch, so that an invalid one is noticed here and not only when the ring is full. In that case nothing
    /// is published, and error() gives the reason.
    [[nodiscard]] bool publish() { return observe() && ring_.publish(); }
    /// Reads the host's read index. False: it is invalid, and the ring is broken from now on.
    bool observe() {
        if (error_) [[unlikely]] {
            return false;
        }
        if (auto seen = ring_.observe(); !seen) [[unlikely]] {
            error_ = Error{Code::protocol,
                           "VMBus ring: the host's read index is not between its last one and what was written",
                           seen.error().expected, seen.error().seen};
            return false;
        }
        return true;
    }
    bool unpublished() const { return ring_.unpublished() != 0; }
    /// Maximum size of a packet in bytes, descriptor and trailer included.
    u32 capacity() const { return ring_.capacity(); }
    /// The host's protocol violation; nothing while the ring is sound.
    const std::optional<Error>& error() const { return error_; }

  private:
    using Ring = io::Producer<M, io::Wrapped<u32>, io::EmptyToNonEmpty>;
    static constexpr usize pending_at = offsetof(RingHeader, pending_send_sz);

    PacketSender(M memory, const Ring& ring) : memory_(memory), ring_(ring) {}

    static constexpr u16 flags(bool wants_completion) { return wants_completion ? packet_wants_completion : u16{0}; }

    Sent simple(PacketType type, std::span<const std::byte> payload, u64 transaction, u16 flags) {
        return packet(type, sizeof(PacketDescriptor), payload, transaction, flags, [](auto&) {});
    }

    /// A packet: the descriptor, what `rest` puts (the other `header` bytes), the payload, the trailer.
    template <class Payload, class F>
    [[gnu::always_inline]] inline Sent packet(PacketType type, u64 header, Payload payload, u64 transaction, u16 flags,
                                              F rest) {
        const u64 total = header + align_up(u64{payload.size_bytes()}, u64{8}); // the header is whole words
        const u64 whole = total + packet_trailer_bytes;
        if (total / 8 > 0xffff) [[unlikely]] {
            return error_ ? Sent::broken : Sent::too_long;
        }
        const u32 need = static_cast<u32>(whole);
        if (error_ || pending_ || ring_.free() < need) [[unlikely]] {
            if (const Sent found = find_room(need); found != Sent::queued) {
                return found;
            }
        }
        const u32 start = ring_.position();
        ring_.record(need, [=](auto out) __attribute__((always_inline)) {
            const PacketDescriptor descriptor{type, static_cast<u16>(header / 8), static_cast<u16>(total / 8), flags,
                                              transaction};
            for (const u64 word : std::bit_cast<std::array<u64, 2>>(descriptor)) {
                out.put(word);
            }
            rest(out);
            put_payload(out, payload);
            out.put(u64{start} << 32);
        });
        return Sent::queued;
    }
    template <class Out, PayloadWords Payload>
    [[gnu::always_inline]] static inline void put_payload(Out& out, const Payload& payload) {
        payload.put(out);
    }
    /// The payload, padded with zeros to whole words.
    template <class Out, usize bytes>
    [[gnu::always_inline]] static inline void put_payload(Out& out, std::span<const std::byte, bytes> payload) {
        usize at = 0;
        for (; at + 8 <= payload.size(); at += 8) {
            u64 word;
            __builtin_memcpy(&word, payload.data() + at, 8);
            out.put(word);
        }
        if (at != payload.size()) {
            u64 word = 0;
            __builtin_memcpy(&word, payload.data() + at, payload.size() - at);
            out.put(word);
        }
    }

    bool refresh_room(u32 need) { return observe() && ring_.free() >= need; }
    /// Not on the fast path: there may be no room, or the host has been asked to signal when there is.
    [[gnu::noinline]] Sent find_room(u32 need) {
        if (error_) {
            return Sent::broken;
        }
        if (need > ring_.capacity()) {
            return Sent::too_long;
        }
        if (ring_.free() < need && !refresh_room(need)) {
            if (error_) {
                return Sent::broken;
            }
            memory_.template store_relaxed<u32>(pending_at, need);
            pending_ = true;
            // Our pending_send_sz before their read index. Pairs with the host's barrier between its read index and its
            // read of pending_send_sz.
            memory_.full_barrier();
            if (!refresh_room(need)) {
                return error_ ? Sent::broken : Sent::full;
            }
        }
        if (pending_) {
            memory_.template store_relaxed<u32>(pending_at, 0); // needs no ordering: an extra signal is harmless
            pending_ = false;
        }
        return Sent::queued;
    }

    M memory_;
    Ring ring_;
    bool pending_ = false;
    std::optional<Error> error_;
};

// ---- receiving ----

template <io::RingMemory M>
class PacketReceiver {
  public:
    /// `memory`: an initialised ring. `buffer`: packets are copied to it; a longer packet breaks the ring.
    /// Error{bad_argument}: as PacketSender.
    static Result<PacketReceiver> create(M memory, std::span<std::byte> buffer) {
        if (memory.size() < ring_header_bytes + page_size || memory.size() % page_size != 0) {
            return Error{Code::bad_argument, "a VMBus ring is a header page and at least one page of bytes",
                         2 * page_size, memory.size()};
        }
        auto consumer =
            Ring::create(memory, ring_layout, io::Wrapped<u32>(static_cast<u32>(memory.size() - ring_header_bytes)));
        if (!consumer) {
            return consumer.error();
        }
        return PacketReceiver(memory, *consumer, buffer);
    }

    /// Copies out the next packet and checks it; false: none. Error{protocol}: the ring is broken, permanently.
    /// Invalidates the previous packet. Ring space is returned to the host only by release(); until then the host
    /// cannot have written more than the ring holds, so that a loop over receive() ends whatever the host does.
    [[gnu::always_inline]] inline Result<bool> receive(Packet& into) {
        if (error_) [[unlikely]] {
            return *error_;
        }
        if (ring_.ready() == 0) {
            auto seen = refresh();
            if (!seen) [[unlikely]] {
                return seen.error();
            }
            if (*seen == 0) {
                return false;
            }
        }
        const u32 ready = ring_.ready();
        if (ready < sizeof(PacketDescriptor) + packet_trailer_bytes) [[unlikely]] {
            return broken("VMBus ring: fewer bytes are available than any packet has",
                          sizeof(PacketDescriptor) + packet_trailer_bytes, ready);
        }
        const auto descriptor = std::bit_cast<PacketDescriptor>(std::array{ring_.peek_word(0), ring_.peek_word(8)});
        const u32 header = u32{descriptor.header_units} * 8;
        const u32 total = u32{descriptor.total_units} * 8;
        if (header < sizeof(PacketDescriptor)) [[unlikely]] {
            return broken("VMBus packet: its header is shorter than a descriptor", sizeof(PacketDescriptor), header);
        }
        if (total < header) [[unlikely]] {
            return broken("VMBus packet: it is shorter than its header", header, total);
        }
        if (total + packet_trailer_bytes > ready) [[unlikely]] {
            return broken("VMBus packet: it is longer than the data in the ring", ready, total + packet_trailer_bytes);
        }
        const u32 rest = total - static_cast<u32>(sizeof(PacketDescriptor));
        if (rest > buffer_.size()) [[unlikely]] {
            return broken("VMBus packet: it is longer than this channel accepts", buffer_.size(), rest);
        }
        static_cast<void>(ring_.peek(sizeof(PacketDescriptor), buffer_.first(rest)));
        // The trailer repeats the packet's start offset. Linux ignores it, so hosts that write another value have never
        // been noticed; they must not fail here either.
        static_cast<void>(ring_.skip(total + packet_trailer_bytes));
        const u32 extra = header - static_cast<u32>(sizeof(PacketDescriptor));
        into = {descriptor.type, (descriptor.flags & packet_wants_completion) != 0, descriptor.transaction,
                buffer_.first(extra), buffer_.subspan(extra, rest - extra)};
        unreleased_ += total + packet_trailer_bytes;
        return true;
    }

    /// Looks at the next packet: if it does not wrap around, and is a completion with just `words` words of payload
    /// that accept(transaction, payload) takes, it is taken. `payload.word(i)` reads the i-th word, to be called once
    /// for each. Other: nothing was taken, and receive() checks the packet anew, from its own copy.
    template <u32 words, class F>
    [[gnu::always_inline]] inline Look take_completion(const F& accept) {
        constexpr u32 units = sizeof(PacketDescriptor) / 8;
        constexpr u32 bytes = (units + words) * 8 + packet_trailer_bytes;
        constexpr u64 expected = std::bit_cast<std::array<u64, units>>(
            PacketDescriptor{PacketType::completion, units, units + words, 0, 0})[0];
        if (error_) [[unlikely]] {
            return Look::other;
        }
        if (ring_.ready() == 0) {
            if (const auto seen = refresh(); !seen || *seen == 0) {
                return seen ? Look::none : Look::other;
            }
        }
        const auto piece = ring_.piece(bytes);
        if (!piece || piece->word(0) << 16 != expected << 16 || // all but the flags
            !accept(piece->word(1), Payload{*piece})) [[unlikely]] {
            return Look::other;
        }
        static_cast<void>(ring_.skip(bytes));
        unreleased_ += bytes;
        return Look::taken;
    }

    /// Returns the space of everything received to the host, with one store. True: the host waited for room, now has
    /// it, and must be signalled.
    [[nodiscard]] bool release() {
        if (unreleased_ == 0) {
            return false;
        }
        ring_.release();
        const u32 read = std::exchange(unreleased_, 0);
        // Our read index before our read of pending_send_sz. Pairs with the host's barrier between its store of
        // pending_send_sz and its read of our index.
        memory_.full_barrier();
        const u32 pending = memory_.template load_relaxed<u32>(offsetof(RingHeader, pending_send_sz));
        if (pending == 0) [[likely]] {
            return false;
        }
        // Free space according to the host's write index, which is only compared: an invalid one costs at most a
        // signal.
        const u32 size = static_cast<u32>(memory_.size() - ring_header_bytes);
        const u32 write = memory_.template load_relaxed<u32>(offsetof(RingHeader, write_index));
        if (write >= size) [[unlikely]] {
            return true;
        }
        const u32 free = size - io::Wrapped<u32>(size).distance(ring_.position(), write);
        return free > pending && (free < read || free - read <= pending); // there was not enough room before
    }

    /// Before sleeping: requests an event and checks once more. True: a packet is already there.
    Result<bool> arm() {
        if (error_) [[unlikely]] {
            return *error_;
        }
        auto found = ring_.arm(1);
        auto seen = refreshed(found ? Result<u32>(ring_.ready()) : found.error());
        return seen ? Result<bool>(*seen != 0) : seen.error();
    }
    /// Stops events until arm().
    void disarm() { ring_.disarm(); }
    const std::optional<Error>& error() const { return error_; }

  private:
    using Ring = io::Consumer<M, io::Wrapped<u32>, io::EmptyToNonEmpty>;

    PacketReceiver(M memory, const Ring& ring, std::span<std::byte> buffer)
        : memory_(memory), ring_(ring), buffer_(buffer) {}

    [[gnu::noinline]] Error broken(std::string_view rule, u64 expected, u64 seen) {
        error_ = Error{Code::protocol, rule, expected, seen};
        return *error_;
    }
    [[gnu::always_inline]] inline Result<u32> refresh() { return refreshed(ring_.available()); }
    [[gnu::always_inline]] inline Result<u32> refreshed(Result<u32> seen) {
        if (!seen) [[unlikely]] {
            return broken("VMBus ring: the host's write index moves backwards or is outside of the ring",
                          seen.error().expected, seen.error().seen);
        }
        if (*seen % 8 != 0) [[unlikely]] {
            return broken("VMBus ring: the host's write index is no multiple of 8", 0, *seen % 8);
        }
        const u32 capacity = static_cast<u32>(memory_.size() - ring_header_bytes) - 1;
        if (unreleased_ + *seen > capacity) [[unlikely]] {
            return broken("VMBus ring: the host overwrites bytes that were not released", capacity,
                          u64{unreleased_} + *seen);
        }
        return *seen;
    }
    /// What follows the descriptor.
    struct Payload {
        const typename Ring::Piece& piece;
        [[gnu::always_inline]] inline u64 word(u32 index) const {
            return piece.word(index + sizeof(PacketDescriptor) / 8);
        }
    };

    M memory_;
    Ring ring_;
    std::span<std::byte> buffer_;
    u32 unreleased_ = 0;
    std::optional<Error> error_;
};

} // namespace fl::hv::hyperv
