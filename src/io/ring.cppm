// The ring layer, common to Xen's shared ring, VMBus byte rings, the two rings of a split virtqueue and NVMe queues:
// positions and their validation, the ordering of accesses to shared memory, and the rule for notifications. Wire
// formats, doorbells and grants belong to the transports; docs/ring.md describes how each of them maps. A packed
// virtqueue does not fit and has its own type, io.ring.packed.
//
// A ring has one producer and one consumer, each on one processor at a time, which share only the ring's memory. All
// accesses:
//
//   producer: store-release of its index          entries are complete once the index is visible
//   consumer: load-acquire of that index
//   consumer: store-release of its position       an entry is overwritten only after it was copied out
//   producer: load-acquire of that
//   producer: index, full barrier, load event     at least one side sees the other: no wake-up is lost
//   consumer: event, full barrier, load index
//   producer: store-release of a phase bit        the entry is complete once its phase is visible
//   consumer: load-acquire of that bit
export module io.ring;
import core.std;
import core.result;
export import io.ring.memory;

export namespace fl::io {

// ---- positions ----

/// How positions count. Word is the type in shared memory. distance(a, b): entries from a to b, in_one_piece(a, b): of
/// these, as far as they do not wrap around. contains(): whether a
/// word received from the peer can be a position at all.
template <class P>
concept RingPositions =
    std::copyable<P> && std::unsigned_integral<typename P::Word> && requires(const P& p, typename P::Word a, u32 n) {
        { p.valid() } -> std::same_as<bool>;
        { p.contains(a) } -> std::same_as<bool>;
        { p.distance(a, a) } -> std::same_as<u32>;
        { p.in_one_piece(a, a) } -> std::same_as<u32>;
        { p.advance(a, n) } -> std::same_as<typename P::Word>;
        { p.slot(a) } -> std::same_as<u32>;
        { p.size() } -> std::same_as<u32>;
        { p.capacity() } -> std::same_as<u32>;
    };

/// Free-running: wraps at 2^bits; the slot is the low bits. Xen: u32, virtio: u16. All slots can be used. size: a
/// power of two, at most half the range of W.
template <std::unsigned_integral W>
class FreeRunning {
  public:
    using Word = W;
    FreeRunning() = default;
    constexpr explicit FreeRunning(u32 size) : size_(size) {}
    constexpr bool valid() const {
        return std::has_single_bit(size_) && size_ <= (u32{std::numeric_limits<W>::max()} >> 1) + 1;
    }
    constexpr bool contains(W) const { return true; }
    constexpr u32 distance(W from, W to) const { return static_cast<W>(to - from); }
    constexpr u32 in_one_piece(W from, W to) const { return std::min(distance(from, to), size_ - slot(from)); }
    constexpr W advance(W at, u32 n) const { return static_cast<W>(at + n); }
    constexpr u32 slot(W at) const { return at & (size_ - 1); }
    constexpr u32 size() const { return size_; }
    constexpr u32 capacity() const { return size_; }
    /// Whether the lap that contains `at`, counted from 0, is odd.
    constexpr bool odd_lap(W at) const { return (at & size_) != 0; }

  private:
    u32 size_ = 1;
};

/// Counts from 0 to size - 1; one slot always stays empty, to distinguish full from empty. VMBus (bytes), NVMe
/// submission queues. size: any, at least 2.
template <std::unsigned_integral W>
class Wrapped {
  public:
    using Word = W;
    Wrapped() = default;
    constexpr explicit Wrapped(u32 size) : size_(size) {}
    constexpr bool valid() const { return size_ >= 2 && size_ <= (u32{std::numeric_limits<W>::max()} >> 1) + 1; }
    constexpr bool contains(W at) const { return at < size_; }
    constexpr u32 distance(W from, W to) const { return to >= from ? u32{to} - from : u32{to} + size_ - from; }
    constexpr u32 in_one_piece(W from, W to) const { return (to >= from ? u32{to} : size_) - from; }
    constexpr W advance(W at, u32 n) const { // n <= size
        const u32 sum = u32{at} + n;
        return static_cast<W>(sum >= size_ ? sum - size_ : sum);
    }
    constexpr u32 slot(W at) const { return at; }
    constexpr u32 size() const { return size_; }
    constexpr u32 capacity() const { return size_ - 1; }

  private:
    u32 size_ = 2;
};
static_assert(RingPositions<FreeRunning<u32>> && RingPositions<FreeRunning<u16>> && RingPositions<Wrapped<u32>>);

/// Positions that distinguish odd laps from even ones. Wrapped positions do not: they restart at 0 with each lap.
template <class P>
concept LapPositions = RingPositions<P> && requires(const P& p, typename P::Word at) {
    { p.odd_lap(at) } -> std::same_as<bool>;
};
static_assert(LapPositions<FreeRunning<u32>> && !LapPositions<Wrapped<u32>>);

/// Number of entries of `stride` bytes after a header of `header` bytes in `bytes` bytes: the largest power of two
/// (Xen's __RING_SIZE). 0: none fits.
constexpr u32 ring_entries(usize bytes, usize header, usize stride) {
    return bytes < header + stride ? 0 : std::bit_floor(static_cast<u32>((bytes - header) / stride));
}

// ---- layout ----

/// Where one direction of a ring keeps its words, in bytes from the start of the memory. `absent`: the transport has
/// no such word.
struct RingLayout {
    static constexpr usize absent = ~usize{0};

    // the producer's position. absent: conveyed by a doorbell (NVMe submission) or a phase bit (NVMe completion)
    usize index = absent;
    usize event = absent;    // written by the consumer: event index or interrupt mask
    usize consumed = absent; // the consumer's position. absent: conveyed by answers (Xen, virtio) or by a doorbell
    usize entries = 0;       // the first entry
    u32 stride = 1;          // bytes between consecutive entries; 1: a byte ring
};

// ---- notifications ----

/// A notification rule, a value held by the transport. wanted(): called by the producer after it has stored its index
/// (from old to now); whether to notify. arm(): the consumer requests an event after `count` (>= 1) more entries; it
/// must check once more afterwards. disarm(): no events are wanted.
template <class R, class M, class P>
concept NotifyRule = std::copyable<R> && requires(const R& rule, M& memory, const RingLayout& layout, const P& p,
                                                  typename P::Word at, u32 count) {
    { rule.wanted(memory, layout, p, at, at) } -> std::same_as<bool>;
    rule.arm(memory, layout, p, at, count);
    rule.disarm(memory, layout);
    { R::needs_event } -> std::convertible_to<bool>;
    { R::needs_consumed } -> std::convertible_to<bool>;
};

/// The consumer writes the position at which it wants an event. Lag 0: the event names the position to be reached
/// (Xen's req_event and rsp_event [xen-ring RING_PUSH_REQUESTS_AND_CHECK_NOTIFY]); Lag 1: the last entry to be
/// passed (virtio's used_event and avail_event [virtio-1.2 §2.7.7, §2.7.10]). The value read is only compared, so any
/// value from the peer is harmless.
template <u32 Lag>
struct EventIndex {
    static constexpr bool needs_event = true;
    static constexpr bool needs_consumed = false;

    template <class M, class P, class W>
    bool wanted(M& memory, const RingLayout& layout, const P& p, W old, W now) const {
        // Our index before the peer's event. Pairs with the barrier in arm(), between the peer's event and our index:
        // at least one side sees the other.
        memory.full_barrier();
        const W event = p.advance(memory.template load_relaxed<W>(layout.event), Lag);
        return p.distance(event, now) < p.distance(old, now);
    }
    template <class M, class P, class W>
    void arm(M& memory, const RingLayout& layout, const P& p, W consumed, u32 count) const {
        memory.template store_relaxed<W>(layout.event, p.advance(consumed, count - Lag));
        // Our event before the peer's index, which the caller reads next. Pairs with the barrier in wanted().
        memory.full_barrier();
    }
    template <class M>
    void disarm(M&, const RingLayout&) const {} // an event position already passed triggers nothing
};
using ReachedEvent = EventIndex<0>;
using PassedEvent = EventIndex<1>;

/// The consumer masks events while it works, and the producer notifies only when the ring was empty before. VMBus
/// [vmbus; the word is 32 bits, nonzero: masked]. `count` cannot be expressed: the first entry raises the event.
struct EmptyToNonEmpty {
    static constexpr bool needs_event = true;
    static constexpr bool needs_consumed = true;

    template <class M, class P, class W>
    bool wanted(M& memory, const RingLayout& layout, const P&, W old, W) const {
        // Our index before the peer's mask and position. Pairs with the barrier in arm().
        memory.full_barrier();
        if (memory.template load_relaxed<u32>(layout.event) != 0) {
            return false;
        }
        // Relaxed: a consumer that missed our index stored its position before its barrier, so it is visible here.
        return memory.template load_relaxed<W>(layout.consumed) == old;
    }
    template <class M, class P, class W>
    void arm(M& memory, const RingLayout& layout, const P&, W, u32) const {
        memory.template store_relaxed<u32>(layout.event, 0);
        // Our mask before the peer's index, which the caller reads next. Pairs with the barrier in wanted().
        memory.full_barrier();
    }
    template <class M>
    void disarm(M& memory, const RingLayout& layout) const {
        memory.template store_relaxed<u32>(layout.event, 1); // no ordering needed: a spurious event is harmless
    }
};

/// The producer always notifies (an NVMe doorbell) and the consumer always gets events (the device moderates its
/// interrupt).
struct Always {
    static constexpr bool needs_event = false;
    static constexpr bool needs_consumed = false;
    template <class M, class P, class W>
    bool wanted(M&, const RingLayout&, const P&, W, W) const {
        return true;
    }
    template <class M, class P, class W>
    void arm(M& memory, const RingLayout&, const P&, W, u32) const {
        memory.full_barrier();
    }
    template <class M>
    void disarm(M&, const RingLayout&) const {}
};

/// No notifications; both sides poll.
struct Never : Always {
    template <class M, class P, class W>
    bool wanted(M&, const RingLayout&, const P&, W, W) const {
        return false;
    }
};

// ---- arrival of entries ----

/// The producer publishes its position at layout.index.
struct ByIndex {
    static constexpr bool needs_index = true;
};

/// Every entry has a 16-bit word whose lowest bit is inverted in each lap, 1 in the first (NVMe completions
/// [nvme-base, Phase Tag]); entries are zero initially. offset: of that word in the entry, in bytes.
struct ByPhase {
    static constexpr bool needs_index = false;
    usize offset = 0;
};

/// How entries arrive. A phase needs positions that distinguish laps.
template <class A, class P>
concept RingArrival = std::same_as<A, ByIndex> || (std::same_as<A, ByPhase> && LapPositions<P>);

namespace ring_detail {
template <class M, class P>
Result<void> check(const M& memory, const RingLayout& layout, const P& positions, bool index, bool event,
                   bool consumed) {
    constexpr usize bytes = sizeof(typename P::Word);
    if (!positions.valid()) {
        return Error{Code::bad_argument, "a ring's size does not suit its kind of positions", 2, positions.size()};
    }
    if (layout.stride == 0 || layout.entries > memory.size() ||
        u64{positions.size()} * layout.stride > memory.size() - layout.entries) {
        return Error{Code::bad_argument, "a ring's entries do not fit into its memory",
                     layout.entries + u64{positions.size()} * layout.stride, memory.size()};
    }
    struct Word {
        usize at;
        bool needed;
    };
    for (const Word& word : {Word{layout.index, index}, Word{layout.event, event}, Word{layout.consumed, consumed}}) {
        const bool there = word.at != RingLayout::absent;
        if (!there ? word.needed : word.at % bytes != 0 || word.at > memory.size() || memory.size() - word.at < bytes) {
            return Error{Code::bad_argument,
                         "a ring's layout lacks a word, or has it misaligned or outside of the memory", memory.size(),
                         word.at};
        }
    }
    return {};
}
} // namespace ring_detail

// ---- producer ----

/// The writing end. Entries are written to the ring at once but become visible only with publish(). Not thread-safe:
/// one owner.
template <RingMemory M, RingPositions P, class Rule>
    requires NotifyRule<Rule, M, P>
class Producer {
  public:
    using Word = typename P::Word;

    /// Starts at position `start` (0 for a new ring) without accessing the memory. Error{bad_argument}: the layout
    /// does not fit.
    static Result<Producer> create(M memory, const RingLayout& layout, P positions, Rule rule = {}, Word start = 0) {
        if (auto checked =
                ring_detail::check(memory, layout, positions, false, Rule::needs_event, Rule::needs_consumed);
            !checked) {
            return checked.error();
        }
        return Producer(memory, layout, positions, rule, start);
    }

    /// Entries (or bytes) that can be produced now.
    u32 free() const { return positions_.capacity() - in_flight(); }
    bool full() const { return free() == 0; }
    /// Produced, and not known to be consumed.
    u32 in_flight() const { return positions_.distance(consumed_, produced_); }
    /// Published, and not known to be consumed: the most that the peer can have taken.
    u32 owed() const { return positions_.distance(consumed_, published_); }
    u32 unpublished() const { return positions_.distance(published_, produced_); }
    u32 capacity() const { return positions_.capacity(); }
    /// Where the next entry is written: as a position, and as a slot (a doorbell's value).
    Word position() const { return produced_; }
    u32 slot() const { return positions_.slot(produced_); }

    /// Copies one entry, or its first bytes, into the next slot; false: full, or larger than a slot.
    [[gnu::always_inline]] inline bool produce(std::span<const std::byte> entry) {
        if (entry.size() > layout_.stride || full()) [[unlikely]] {
            return false;
        }
        memory_.copy_in(layout_.entries + usize{positions_.slot(produced_)} * layout_.stride, entry.data(),
                        entry.size());
        produced_ = positions_.advance(produced_, 1);
        return true;
    }
    template <class T>
        requires std::is_trivially_copyable_v<T>
    [[gnu::always_inline]] inline bool produce(const T& entry) {
        return produce(std::span(reinterpret_cast<const std::byte*>(&entry), sizeof(T)));
    }
    /// For entries of whole words at offsets of whole words: produces an entry, for which the caller has found room.
    /// `write` must call its put(u64) for each word in use, in order: one store each.
    template <class F>
    [[gnu::always_inline]] inline void produce_words(const F& write) {
        write(Words<false>(*this, positions_.slot(produced_) * layout_.stride));
        produced_ = positions_.advance(produced_, 1);
    }
    /// For a byte ring: copies all bytes, wrapping around if necessary; false: not enough room, nothing written.
    bool append(std::span<const std::byte> bytes) {
        if (layout_.stride != 1 || bytes.size() > free()) [[unlikely]] {
            return false;
        }
        const u32 count = static_cast<u32>(bytes.size());
        const u32 at = positions_.slot(produced_);
        const u32 first = std::min(count, positions_.size() - at);
        memory_.copy_in(layout_.entries + at, bytes.data(), first);
        memory_.copy_in(layout_.entries, bytes.data() + first, count - first);
        produced_ = positions_.advance(produced_, count);
        return true;
    }
    /// For a byte ring in which everything is whole words of 8 bytes, its size, its entries' offset and every record:
    /// produces `bytes` bytes, for which the caller has found room (free()). `write` is called once with a writer, and
    /// must call its put(u64) for each word, in order: one store each. It is compiled twice, for a record that wraps
    /// around as well, and should hold what it needs by value: then that is in registers here.
    template <class F>
    [[gnu::always_inline]] inline void record(u32 bytes, const F& write) {
        const u32 at = positions_.slot(produced_);
        if (bytes <= positions_.size() - at) [[likely]] {
            write(Words<false>(*this, at));
        } else {
            record_around(at, write);
        }
        produced_ = positions_.advance(produced_, bytes);
    }
    /// Discards what was produced since the last publish().
    void withdraw() { produced_ = published_; }

    /// Makes everything produced so far visible to the peer; called once per turn. True: the peer must be notified.
    [[nodiscard]] bool publish() {
        if (produced_ == published_) {
            return false;
        }
        if (layout_.index != RingLayout::absent) {
            // Release: the entries before the index. Pairs with the acquire in the peer's Consumer::available().
            memory_.template store_release<Word>(layout_.index, produced_);
        }
        return rule_.wanted(memory_, layout_, positions_, std::exchange(published_, produced_), produced_);
    }

    /// `count` more entries are known to be consumed because they were answered. Error{protocol}: more than were
    /// published.
    Result<void> retire(u32 count) {
        if (count > owed()) [[unlikely]] {
            return Error{Code::protocol, "more entries were answered than had been published", owed(), count};
        }
        consumed_ = positions_.advance(consumed_, count);
        return {};
    }
    /// Takes the consumer's position from a message of the peer. Error{protocol}: not between the last known and the
    /// published position.
    Result<void> observe(Word peer) {
        if (!positions_.contains(peer) || positions_.distance(consumed_, peer) > owed()) [[unlikely]] {
            return Error{Code::protocol, "the consumer's position is not between its last one and the producer's",
                         published_, peer};
        }
        consumed_ = peer;
        return {};
    }
    /// The same, with the position read from layout.consumed.
    Result<void> observe() {
        if (layout_.consumed == RingLayout::absent) {
            return Error{Code::not_supported, "this ring has no word for the consumer's position"};
        }
        // Acquire: entries are overwritten only after they were copied out. Pairs with the release in the peer's
        // Consumer::release().
        return observe(memory_.template load_acquire<Word>(layout_.consumed));
    }

  private:
    template <bool around>
    class Words {
      public:
        [[gnu::always_inline]] Words(Producer& ring, u32 at)
            : memory_(ring.memory_), at_(ring.layout_.entries + at), begin_(ring.layout_.entries),
              end_(begin_ + ring.positions_.size()) {}
        [[gnu::always_inline]] void put(u64 word) {
            __builtin_assume(at_ % 8 == 0);
            memory_.copy_in(at_, reinterpret_cast<const std::byte*>(&word), 8);
            at_ += 8;
            if (around && at_ == end_) {
                at_ = begin_;
            }
        }

      private:
        M memory_; // a copy: its address need not be read again after each store
        usize at_;
        usize begin_;
        usize end_;
    };
    template <class F>
    [[gnu::noinline, clang::minsize]] void record_around(u32 at, F write) {
        write(Words<true>(*this, at));
    }

    Producer(M memory, const RingLayout& layout, P positions, Rule rule, Word start)
        : memory_(memory), layout_(layout), positions_(positions), rule_(rule), produced_(start), published_(start),
          consumed_(start) {}

    M memory_;
    RingLayout layout_;
    P positions_;
    [[no_unique_address]] Rule rule_;
    Word produced_;  // private position
    Word published_; // position visible to the peer
    Word consumed_;  // last known position of the consumer
};

// ---- consumer ----

/// The reading end. Once the peer has written an invalid position, the ring is broken permanently. Not thread-safe:
/// one owner.
template <RingMemory M, RingPositions P, class Rule, class Arrival = ByIndex>
    requires NotifyRule<Rule, M, P> && RingArrival<Arrival, P>
class Consumer {
  public:
    using Word = typename P::Word;

    static Result<Consumer> create(M memory, const RingLayout& layout, P positions, Rule rule = {},
                                   Arrival arrival = {}, Word start = 0) {
        if (auto checked =
                ring_detail::check(memory, layout, positions, Arrival::needs_index, Rule::needs_event, false);
            !checked) {
            return checked.error();
        }
        if constexpr (!Arrival::needs_index) {
            if (arrival.offset % 2 != 0 || layout.stride % 2 != 0 || arrival.offset + 2 > layout.stride) {
                return Error{Code::bad_argument, "a ring's phase word is misaligned or outside of the entry",
                             layout.stride, arrival.offset};
            }
        }
        return Consumer(memory, layout, positions, rule, arrival, start);
    }

    /// Reads the peer's position once and checks it. Returns the entries (or bytes) that can be taken; with phases a
    /// lower bound, 1 or 0. `limit`: the most it can have produced (for answers: those outstanding). Error{protocol}:
    /// the ring is broken, permanently.
    Result<u32> available(u32 limit = ~u32{0}) {
        if (broken_) [[unlikely]] {
            return broken_error();
        }
        if constexpr (Arrival::needs_index) {
            // Acquire: the index before the entries. Pairs with the release in the peer's Producer::publish().
            const Word peer = memory_.template load_acquire<Word>(layout_.index);
            const u32 count = positions_.distance(consumed_, peer);
            // Must neither exceed what is possible nor go back before an earlier position.
            if (!positions_.contains(peer) || count > std::min(limit, positions_.capacity()) || count < ready())
                [[unlikely]] {
                broken_ = true;
                bad_ = peer;
                return broken_error();
            }
            seen_ = peer;
        } else if (ready() == 0) {
            const usize at = layout_.entries + usize{positions_.slot(consumed_)} * layout_.stride + arrival_.offset;
            // Acquire: the phase before the rest of the entry. Pairs with the device writing the phase last.
            const u16 word = memory_.template load_acquire<u16>(at);
            if (((word & 1) != 0) != positions_.odd_lap(consumed_)) { // 1 in the first lap, which is even
                if (limit == 0) [[unlikely]] {
                    broken_ = true;
                    bad_ = positions_.advance(consumed_, 1);
                    return broken_error();
                }
                seen_ = positions_.advance(consumed_, 1);
            }
        }
        return ready();
    }
    /// Seen by available() and not yet taken.
    u32 ready() const { return positions_.distance(consumed_, seen_); }
    bool broken() const { return broken_; }
    /// Where the next entry is taken: as a position, and as a slot (a doorbell's value).
    Word position() const { return consumed_; }
    u32 slot() const { return positions_.slot(consumed_); }

    /// Copies the next entry, or its first bytes, out; false: none ready. The entry must be validated and used from
    /// the copy.
    [[gnu::always_inline]] inline bool take(std::span<std::byte> entry) {
        if (ready() == 0 || entry.size() > layout_.stride) [[unlikely]] {
            return false;
        }
        memory_.copy_out(layout_.entries + usize{positions_.slot(consumed_)} * layout_.stride, entry.data(),
                         entry.size());
        consumed_ = positions_.advance(consumed_, 1);
        return true;
    }
    template <class T>
        requires(std::is_trivially_copyable_v<T> && !std::is_convertible_v<T&, std::span<std::byte>>)
    [[gnu::always_inline]] inline bool take(T& entry) {
        return take(std::span(reinterpret_cast<std::byte*>(&entry), sizeof(T)));
    }
    /// For entries as Producer::produce_words(): takes an entry, which the caller has found ready, and copies its first
    /// words out.
    template <usize words>
    [[gnu::always_inline]] inline std::array<u64, words> take_words() {
        const Piece entry(memory_, layout_.entries + usize{positions_.slot(consumed_)} * layout_.stride);
        std::array<u64, words> found;
        for (u32 i = 0; i < words; ++i) {
            found[i] = entry.word(i);
        }
        consumed_ = positions_.advance(consumed_, 1);
        return found;
    }
    /// For a byte ring: copies the next bytes out, wrapping around if necessary; false: fewer are ready, nothing taken.
    bool remove(std::span<std::byte> bytes) { return peek(0, bytes) && skip(static_cast<u32>(bytes.size())); }
    /// The same without taking them, and from the `from`-th of the next bytes on: skip() then takes a whole record at
    /// once.
    [[gnu::always_inline]] inline bool peek(u32 from, std::span<std::byte> bytes) {
        if (layout_.stride != 1 || u64{from} + bytes.size() > ready()) [[unlikely]] {
            return false;
        }
        const u32 at = positions_.slot(positions_.advance(consumed_, from));
        if (bytes.size() <= positions_.size() - at) [[likely]] {
            memory_.copy_out(layout_.entries + at, bytes.data(), bytes.size());
        } else {
            copy_around(at, bytes);
        }
        return true;
    }
    /// For a byte ring of whole words [Producer::record]: the word `from` bytes after the next one. It is not taken;
    /// the caller has found it ready.
    [[gnu::always_inline]] inline u64 peek_word(u32 from) const {
        const usize at = layout_.entries + positions_.slot(positions_.advance(consumed_, from));
        __builtin_assume(at % 8 == 0);
        u64 word;
        memory_.copy_out(at, reinterpret_cast<std::byte*>(&word), 8);
        return word;
    }
    /// The next bytes of such a ring, in one piece; nothing has been taken.
    class Piece {
      public:
        /// The `index`-th word. The peer may change it at any time: to be read once.
        [[gnu::always_inline]] inline u64 word(u32 index) const {
            u64 word;
            __builtin_assume(at_ % 8 == 0);
            memory_.copy_out(at_ + 8 * usize{index}, reinterpret_cast<std::byte*>(&word), 8);
            return word;
        }

      private:
        friend Consumer;
        Piece(const M& memory, usize at) : memory_(memory), at_(at) {}
        const M& memory_;
        usize at_;
    };
    /// nullopt: fewer are ready, or they wrap around.
    [[gnu::always_inline]] inline std::optional<Piece> piece(u32 bytes) const {
        if (positions_.in_one_piece(consumed_, seen_) < bytes) [[unlikely]] {
            return std::nullopt;
        }
        return Piece(memory_, layout_.entries + positions_.slot(consumed_));
    }
    /// Skips `count` entries or bytes; false: fewer are ready.
    inline bool skip(u32 count) {
        if (count > ready()) [[unlikely]] {
            return false;
        }
        consumed_ = positions_.advance(consumed_, count);
        return true;
    }
    /// Publishes our position to the peer, if the layout has a word for it.
    void release() {
        if (layout_.consumed != RingLayout::absent) {
            // Release: the copies before the position. Pairs with the acquire in the peer's Producer::observe().
            memory_.template store_release<Word>(layout_.consumed, consumed_);
        }
    }

    /// Before sleeping: requests an event after `count` more entries, then checks once more. True: entries are
    /// available, do not sleep. `count` must not exceed the entries still expected; 0 counts as 1.
    Result<bool> arm(u32 count, u32 limit = ~u32{0}) {
        if (broken_) [[unlikely]] {
            return broken_error();
        }
        rule_.arm(memory_, layout_, positions_, consumed_, std::max(count, 1u));
        auto found = available(limit);
        if (!found) [[unlikely]] {
            return found.error();
        }
        return *found != 0;
    }
    void disarm() { rule_.disarm(memory_, layout_); }

  private:
    [[gnu::noinline]] void copy_around(u32 at, std::span<std::byte> bytes) {
        const u32 first = positions_.size() - at;
        memory_.copy_out(layout_.entries + at, bytes.data(), first);
        memory_.copy_out(layout_.entries, bytes.data() + first, bytes.size() - first);
    }

    Consumer(M memory, const RingLayout& layout, P positions, Rule rule, Arrival arrival, Word start)
        : memory_(memory), layout_(layout), positions_(positions), rule_(rule), arrival_(arrival), consumed_(start),
          seen_(start) {}
    Error broken_error() const {
        return {Code::protocol, "the producer's position moves backwards or is out of range: the ring is broken", seen_,
                bad_};
    }

    M memory_;
    RingLayout layout_;
    P positions_;
    [[no_unique_address]] Rule rule_;
    [[no_unique_address]] Arrival arrival_;
    Word consumed_;
    Word seen_; // the peer's position, as last validated
    Word bad_ = 0;
    bool broken_ = false;
};

} // namespace fl::io
