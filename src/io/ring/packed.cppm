// The packed virtqueue, driver side [virtio-1.2 §2.8]: a single ring of descriptors written by both driver and device.
//
// The driver writes descriptors in ring order and makes them available by two bits of their flags; the device
// overwrites them with one used descriptor per buffer and marks it by the same bits, whose meaning is inverted in
// each lap (wrap counter). io.ring's Producer and Consumer do not fit: both sides write the whole ring, positions
// advance by the number of descriptors of a buffer, the size need not be a power of two, and an event is a structure
// of two fields.
//
// The device processes the ring in order and reads nothing after an unavailable descriptor. publish() therefore needs
// a single release store, of the first added descriptor's flags, after everything else has been written.
//
// Accesses, paired with the device's:
//
//   descriptors, then store-release the first one's flags    load-acquire flags of the next one, then the rest of it
//   load-acquire flags of the next used one, then id, length buffers, id and length, then store-release flags
//   flags, full barrier, load device event suppression       device event suppression, full barrier, load flags
//   driver event suppression, full barrier, load flags       flags, full barrier, load driver event suppression
module;
#include <cstddef>
export module io.ring.packed;
import core.std;
import core.result;
export import io.ring.memory;
export import io.ring.virtqueue;

export namespace fl::io {

/// A descriptor in the ring or in an indirect table [virtio-1.2 §2.8.13]. Little-endian, like the whole queue.
struct PackedDescriptor {
    u64 bus = 0;
    u32 length = 0;
    u16 id = 0;
    u16 flags = 0;
};
static_assert(sizeof(PackedDescriptor) == virtqueue_descriptor_bytes && offsetof(PackedDescriptor, bus) == 0 &&
              offsetof(PackedDescriptor, length) == 8 && offsetof(PackedDescriptor, id) == 12 &&
              offsetof(PackedDescriptor, flags) == 14);
inline constexpr u16 descriptor_available = 1 << 7;
inline constexpr u16 descriptor_used = 1 << 15;

/// Bits 16 and 17 of an event suppression structure; bits 0 to 14 are a ring offset and bit 15 is its wrap counter
/// [virtio-1.2 §2.8.10, §2.8.14].
enum class RingEvent : u32 {
    enable = 0,
    disable = 1,
    descriptor = 2, // for a specific descriptor; requires VIRTIO_F_EVENT_IDX
};

/// See the concept Virtqueue. Size: any from 1 to 32768.
template <RingMemory M>
class PackedQueue {
  public:
    using Memory = M;

    /// The ring, then each event suppression structure in its own cache line. The memory's bus address must be a
    /// multiple of 16.
    static constexpr VirtqueueLayout layout(u32 size) {
        const usize driver = (usize{virtqueue_descriptor_bytes} * size + 63) & ~usize{63};
        return {.descriptors = 0, .driver = driver, .device = driver + 64, .bytes = driver + 128};
    }

    /// Creates an empty queue of `size` descriptors; call before its addresses are given to the device. Writes all
    /// flags and both event suppression structures; the other memory may have any contents. `rows`: at least `size`,
    /// used exclusively by this queue. Error{bad_argument}: the size is 0 or above 32768, or the areas do not fit.
    static Result<PackedQueue> create(M memory, const VirtqueueLayout& at, u32 size, std::span<VirtqueueRow> rows,
                                      VirtqueueOptions options) {
        if (size == 0 || size > virtqueue_max_size) {
            return Error{Code::bad_argument, "a packed virtqueue's size is 1 to 32768", virtqueue_max_size, size};
        }
        if (auto fits = virtqueue_detail::check(memory,
                                                {{{at.descriptors, usize{virtqueue_descriptor_bytes} * size, 16},
                                                  {at.driver, 4, 4},
                                                  {at.device, 4, 4}}},
                                                size, rows);
            !fits) {
            return fits.error();
        }
        PackedQueue queue(memory, at, rows.first(size), options);
        for (u32 i = 0; i < size; ++i) { // visible to the device once it is given the queue
            memory.template store_relaxed<u16>(queue.flags_of(i), 0);
        }
        memory.template store_relaxed<u32>(at.driver, 0);
        memory.template store_relaxed<u32>(at.device, 0);
        return queue;
    }

    u32 size() const { return table_.size(); }
    u32 free() const { return table_.free_descriptors(); }
    u32 outstanding() const { return table_.added() + table_.published(); }
    bool broken() const { return broken_.has_value(); }
    u16 next_available() const { return next_.word(); }

    Result<void> add(u16 slot, std::span<const BufferElement> elements) {
        const auto writable = virtqueue_detail::check(elements, size(), options_);
        if (!writable) [[unlikely]] {
            return writable.error();
        }
        const u32 count = static_cast<u32>(elements.size());
        if (auto ready = room(count); !ready) [[unlikely]] {
            return ready;
        }
        for (u32 i = 0; i < count; ++i) {
            append(elements[i], i + 1 < count ? descriptor_next : u16{0});
        }
        table_.add(table_.first_free(), count, slot, *writable);
        return {};
    }
    Result<void> add_indirect(u16 slot, std::span<const BufferElement> elements, M table, u64 bus) {
        if (!options_.indirect) [[unlikely]] {
            return Error{Code::not_supported, virtqueue_detail::no_indirect};
        }
        const auto writable = virtqueue_detail::check(elements, size(), options_);
        if (!writable) [[unlikely]] {
            return writable.error();
        }
        const usize bytes = elements.size() * virtqueue_descriptor_bytes;
        if (table.size() < bytes) [[unlikely]] {
            return Error{Code::bad_argument, virtqueue_detail::short_table, bytes, table.size()};
        }
        if (auto ready = room(1); !ready) [[unlikely]] {
            return ready;
        }
        for (usize i = 0; i < elements.size(); ++i) { // only this flag, and no id [virtio-1.2 §2.8.7]
            const PackedDescriptor descriptor{.bus = elements[i].bus,
                                              .length = elements[i].length,
                                              .flags = elements[i].device_writable ? descriptor_write : u16{0}};
            table.copy_in(i * sizeof descriptor, reinterpret_cast<const std::byte*>(&descriptor), sizeof descriptor);
        }
        append({.bus = bus, .length = static_cast<u32>(bytes)}, descriptor_indirect);
        table_.add(table_.first_free(), 1, slot, *writable);
        return {};
    }
    [[nodiscard]] bool publish() {
        if (broken_ || unpublished_ == 0) [[unlikely]] {
            return false;
        }
        table_.publish();
        // Release: all added descriptors before these flags. Pairs with the device's acquire of them.
        memory_.template store_release<u16>(flags_of(first_.offset), first_flags_);
        // Our flags before the device's structure. Pairs with the device's barrier between the two: at least one side
        // sees the other.
        memory_.full_barrier();
        // One load, because the fields belong together. They are only compared, so any value is harmless.
        const u32 event = memory_.template load_relaxed<u32>(at_.device);
        const u32 count = std::exchange(unpublished_, 0);
        switch (static_cast<RingEvent>(event >> 16 & 3)) {
        case RingEvent::disable: return false;
        case RingEvent::descriptor: return !options_.event_index || first_.distance(event, size()) < count;
        case RingEvent::enable: break;
        }
        return true;
    }

    Result<std::optional<UsedBuffer>> take() {
        if (broken_) [[unlikely]] {
            return *broken_;
        }
        if (batch_ == 0) {
            const u16 flags = next_flags();
            if (!is_used(flags)) {
                return std::optional<UsedBuffer>{};
            }
            if (table_.published() == 0) [[unlikely]] {
                return fail({Code::protocol, virtqueue_detail::too_many, 0, 1});
            }
            memory_.copy_out(flags_of(used_.offset) - 6, reinterpret_cast<std::byte*>(&last_), 6);
            if (!table_.is_published(last_.id)) [[unlikely]] {
                return fail({Code::protocol, virtqueue_detail::unknown_id, size(), last_.id});
            }
            last_written_ = (flags & descriptor_write) != 0;
            batch_ = 1;
            if (options_.in_order) { // one descriptor for all buffers up to this one [virtio-1.2 §2.8.8]
                for (u16 id = oldest_; id != last_.id; id = table_.following(id)) {
                    ++batch_;
                }
            }
        }
        const u16 id = options_.in_order ? oldest_ : last_.id;
        const VirtqueueRow row = table_[id];
        // A skipped buffer counts as fully used [virtio-1.2 §2.8.8].
        u32 length = --batch_ == 0 ? last_.length : row.writable;
        if (length > row.writable) [[unlikely]] {
            if (last_written_) {
                return fail({Code::protocol, virtqueue_detail::too_long, row.writable, length});
            }
            length = 0; // without that flag the field is reserved [virtio-1.2 §2.8.4], but QEMU fills it in
        }
        oldest_ = table_.following(id);
        used_.advance(row.descriptors, size());
        table_.remove(id);
        return std::optional<UsedBuffer>{{row.slot, length}};
    }
    Result<bool> arm(u32 count = 1) {
        if (broken_) [[unlikely]] {
            return *broken_;
        }
        RingPosition event = used_;
        // The device's position advances by the number of descriptors of each buffer, and the order of completion is
        // unknown. This is the minimum number of descriptors passed, and exact if all buffers have the same length.
        event.advance((std::clamp(count, 1u, std::max(table_.published(), 1u)) - 1) * table_.shortest(), size());
        const u32 word =
            options_.event_index ? event.word() | event_word(RingEvent::descriptor) : event_word(RingEvent::enable);
        // One store for both fields: the device never sees only one of them.
        memory_.template store_relaxed<u32>(at_.driver, word);
        // Our structure before the device's flags. Pairs with the device's barrier between the two.
        memory_.full_barrier();
        return batch_ != 0 || is_used(next_flags());
    }
    void disarm() {
        // No ordering needed: a spurious event is harmless.
        memory_.template store_relaxed<u32>(at_.driver, event_word(RingEvent::disable));
    }

  private:
    /// A ring position with its wrap counter: 1 in the first lap [virtio-1.2 §2.8.1].
    struct RingPosition {
        u16 offset = 0;
        bool wrap = true;

        void advance(u32 count, u32 size) { // count: at most size
            const u32 sum = offset + count;
            wrap = sum >= size ? !wrap : wrap;
            offset = static_cast<u16>(sum >= size ? sum - size : sum);
        }
        u16 word() const { return static_cast<u16>(offset | (wrap ? 0x8000 : 0)); }
        /// Descriptors from here to `event`, an offset and a wrap counter in bits 0 to 15. Very large (u32
        /// wrap-around) if the event has already passed.
        u32 distance(u32 event, u32 size) const {
            const u32 lap = ((event & 0x8000) != 0) == wrap ? 0 : size;
            return (event & 0x7fff) + lap - offset;
        }
    };
    struct Last {
        u32 length = 0;
        u16 id = 0;
    };
    static_assert(offsetof(Last, id) == 4);

    PackedQueue(M memory, const VirtqueueLayout& at, std::span<VirtqueueRow> rows, VirtqueueOptions options)
        : memory_(memory), at_(at), options_(options), table_(rows) {}

    static constexpr u32 event_word(RingEvent event) { return static_cast<u32>(event) << 16; }
    usize flags_of(u32 offset) const {
        return at_.descriptors + usize{virtqueue_descriptor_bytes} * offset + offsetof(PackedDescriptor, flags);
    }
    /// Writes the next descriptor of a buffer. Defers the flags of the first one since publish().
    void append(const BufferElement& element, u16 flags) {
        const PackedDescriptor descriptor{element.bus, element.length, table_.first_free(),
                                          static_cast<u16>(flags |
                                                           (element.device_writable ? descriptor_write : u16{0}) |
                                                           (next_.wrap ? descriptor_available : descriptor_used))};
        const bool first = unpublished_ == 0;
        if (first) {
            first_ = next_;
            first_flags_ = descriptor.flags;
        }
        memory_.copy_in(flags_of(next_.offset) - offsetof(PackedDescriptor, flags),
                        reinterpret_cast<const std::byte*>(&descriptor),
                        first ? offsetof(PackedDescriptor, flags) : sizeof descriptor);
        next_.advance(1, size());
        ++unpublished_;
    }
    u16 next_flags() const {
        // Acquire: the flags before id and length, and before the device's writes to the buffer. Pairs with the
        // device's release of the flags.
        return memory_.template load_acquire<u16>(flags_of(used_.offset));
    }
    bool is_used(u16 flags) const {
        return ((flags & descriptor_available) != 0) == used_.wrap && ((flags & descriptor_used) != 0) == used_.wrap;
    }
    Result<void> room(u32 descriptors) const {
        if (broken_) [[unlikely]] {
            return *broken_;
        }
        if (free() < descriptors) [[unlikely]] {
            return Error{Code::exhausted, virtqueue_detail::no_room, descriptors, free()};
        }
        return {};
    }
    Error fail(const Error& error) {
        broken_ = error;
        return error;
    }

    M memory_;
    VirtqueueLayout at_;
    VirtqueueOptions options_;
    VirtqueueTable table_;
    RingPosition next_;         // position of the next descriptor to write
    RingPosition used_;         // position of the device's next used descriptor
    RingPosition first_;        // first unpublished descriptor
    u16 first_flags_ = 0;       // its flags
    u16 oldest_ = 0;            // with in_order: the next buffer to be returned
    u32 unpublished_ = 0;       // descriptors
    u32 batch_ = 0;             // buffers covered by the last used descriptor and not yet returned by take()
    Last last_;                 // that descriptor
    bool last_written_ = false; // that descriptor has descriptor_write
    std::optional<Error> broken_;
};
static_assert(Virtqueue<PackedQueue<MappedMemory>> && Virtqueue<PackedQueue<FlatMemory>>);

} // namespace fl::io
