// A virtqueue whose format, split or packed, is chosen when it is made: what a driver uses that accepts either. One
// driver then needs one copy of its code, at the price of a branch for each call, which is always taken the same way.
export module io.ring.any;
import core.std;
import core.result;
export import io.ring.memory;
export import io.ring.packed;
export import io.ring.split;
export import io.ring.virtqueue;

export namespace fl::io {

/// See the concept Virtqueue. Which sizes are valid depends on the format: usable_size().
template <RingMemory M>
class AnyQueue {
  public:
    using Memory = M;
    using Split = SplitQueue<M>;
    using Packed = PackedQueue<M>;

    /// The largest valid size up to `maximum`; 0: none.
    static constexpr u32 usable_size(u32 maximum, bool packed) {
        const u32 most = std::min(maximum, virtqueue_max_size);
        return packed ? most : std::bit_floor(most);
    }
    /// As Split::layout() and Packed::layout(). `alignment`: of a split queue's used ring.
    static constexpr VirtqueueLayout layout(u32 size, bool packed = false, usize alignment = 64) {
        return packed ? Packed::layout(size) : Split::layout(size, alignment);
    }
    /// As Split::create(), or with VirtqueueOptions::packed as Packed::create().
    static Result<AnyQueue> create(M memory, const VirtqueueLayout& at, u32 size, std::span<VirtqueueRow> rows,
                                   VirtqueueOptions options) {
        return options.packed ? wrap(Packed::create(memory, at, size, rows, options))
                              : wrap(Split::create(memory, at, size, rows, options));
    }

    inline bool packed() const { return std::holds_alternative<Packed>(ring_); }
    inline u32 size() const {
        return on(*this, [](const auto& ring) { return ring.size(); });
    }
    inline u32 free() const {
        return on(*this, [](const auto& ring) { return ring.free(); });
    }
    inline u32 outstanding() const {
        return on(*this, [](const auto& ring) { return ring.outstanding(); });
    }
    inline bool broken() const {
        return on(*this, [](const auto& ring) { return ring.broken(); });
    }
    inline u16 next_available() const {
        return on(*this, [](const auto& ring) { return ring.next_available(); });
    }
    inline Result<void> add(u16 slot, std::span<const BufferElement> elements) {
        return on(*this, [&](auto& ring) { return ring.add(slot, elements); });
    }
    inline Result<void> add_indirect(u16 slot, std::span<const BufferElement> elements, M table, u64 bus) {
        return on(*this, [&](auto& ring) { return ring.add_indirect(slot, elements, table, bus); });
    }
    [[nodiscard]] inline bool publish() {
        return on(*this, [](auto& ring) { return ring.publish(); });
    }
    inline Result<std::optional<UsedBuffer>> take() {
        return on(*this, [](auto& ring) { return ring.take(); });
    }
    inline Result<bool> arm(u32 count = 1) {
        return on(*this, [&](auto& ring) { return ring.arm(count); });
    }
    inline void disarm() {
        on(*this, [](auto& ring) { ring.disarm(); });
    }

  private:
    template <class Ring>
    explicit AnyQueue(const Ring& ring) : ring_(ring) {}
    template <class Ring>
    static Result<AnyQueue> wrap(const Result<Ring>& ring) {
        if (!ring) {
            return ring.error();
        }
        return AnyQueue(*ring);
    }
    /// Not std::visit, which goes through a table of functions.
    template <class Self, class F>
    [[gnu::always_inline]] static inline decltype(auto) on(Self& self, F&& f) {
        if (auto* split = std::get_if<Split>(&self.ring_); split != nullptr) {
            return f(*split);
        }
        return f(*std::get_if<Packed>(&self.ring_)); // it is one of the two: neither can fail to be copied
    }

    std::variant<Split, Packed> ring_;
};
static_assert(Virtqueue<AnyQueue<MappedMemory>> && Virtqueue<AnyQueue<FlatMemory>>);

} // namespace fl::io
