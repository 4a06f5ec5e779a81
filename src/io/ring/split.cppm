// The split virtqueue, driver side [virtio-1.2 §2.7]: a descriptor table, and two rings of indices into it: a
// Producer (available ring) and a Consumer (used ring) of io.ring.
//
// Accesses, paired with the device's:
//
//   descriptors and ring entry, then store-release avail.idx   load-acquire avail.idx, then the entry and descriptors
//   load-acquire used.idx, then the used element               buffers and used element, then store-release used.idx
//   avail.idx, full barrier, load avail_event or used.flags    avail_event or used.flags, full barrier, load avail.idx
//   used_event or avail.flags, full barrier, load used.idx     used.idx, full barrier, load used_event or avail.flags
module;
#include <cstddef>
export module io.ring.split;
import core.std;
import core.result;
export import io.ring;
export import io.ring.virtqueue;

export namespace fl::io {

/// A descriptor in the table or in an indirect table [virtio-1.2 §2.7.5]. Little-endian, like the whole queue.
struct SplitDescriptor {
    u64 bus = 0;
    u32 length = 0;
    u16 flags = 0;
    u16 next = 0; // valid with descriptor_next
};
static_assert(sizeof(SplitDescriptor) == virtqueue_descriptor_bytes && offsetof(SplitDescriptor, bus) == 0 &&
              offsetof(SplitDescriptor, length) == 8 && offsetof(SplitDescriptor, flags) == 12 &&
              offsetof(SplitDescriptor, next) == 14);

/// An element of the used ring [virtio-1.2 §2.7.8].
struct SplitUsedElement {
    u32 id = 0;
    u32 length = 0;
};
static_assert(sizeof(SplitUsedElement) == 8 && offsetof(SplitUsedElement, length) == 4);

/// The notification rule of one direction: an event index with VIRTIO_F_EVENT_IDX, otherwise bit 0 of a flags word,
/// set by the side that wants no notifications [virtio-1.2 §2.7.7, §2.7.10]. The value read is only compared, so
/// anything the device wrote is harmless.
struct SplitNotify {
    static constexpr bool needs_event = true;
    static constexpr bool needs_consumed = false;
    usize flags = 0; // offset of the flags word, in bytes
    bool event_index = false;

    template <class M, class P, class W>
    bool wanted(M& memory, const RingLayout& layout, const P& p, W old, W now) const {
        if (event_index) {
            return PassedEvent{}.wanted(memory, layout, p, old, now);
        }
        // Our index before the device's flags. Pairs with the device's barrier between its flags and our index.
        memory.full_barrier();
        return (memory.template load_relaxed<u16>(flags) & 1) == 0;
    }
    template <class M, class P, class W>
    void arm(M& memory, const RingLayout& layout, const P& p, W consumed, u32 count) const {
        if (event_index) {
            PassedEvent{}.arm(memory, layout, p, consumed, count);
            return;
        }
        memory.template store_relaxed<u16>(flags, 0);
        // Our flags before the device's index, which the caller loads next. Pairs with the device's barrier between
        // the two.
        memory.full_barrier();
    }
    template <class M>
    void disarm(M& memory, const RingLayout&) const {
        if (!event_index) { // with an event index the flags stay 0: an event already passed triggers nothing
            memory.template store_relaxed<u16>(flags, 1); // no ordering needed: a spurious event is harmless
        }
    }
};

/// See the concept Virtqueue. Size: a power of two up to 32768.
template <RingMemory M>
class SplitQueue {
  public:
    using Memory = M;

    /// The three areas, consecutively. `alignment` (a power of two, at least 4) is the used ring's: 64 gives the
    /// device's writes their own cache lines; the legacy interface requires the queue align, 4096 [virtio-1.2
    /// §2.7.2]. The memory's bus address must be a multiple of 16.
    static constexpr VirtqueueLayout layout(u32 size, usize alignment = 64) {
        const usize driver = usize{virtqueue_descriptor_bytes} * size;
        const usize device = (driver + driver_bytes(size) + alignment - 1) & ~(alignment - 1);
        return {.descriptors = 0, .driver = driver, .device = device, .bytes = device + device_bytes(size)};
    }

    /// Creates an empty queue of `size` descriptors; call before its addresses are given to the device. Writes the
    /// indices, flags and events; the other memory may have any contents. `rows`: at least `size`, used exclusively
    /// by this queue. Error{bad_argument}: the size is not a power of two or above 32768, or the areas do not fit.
    static Result<SplitQueue> create(M memory, const VirtqueueLayout& at, u32 size, std::span<VirtqueueRow> rows,
                                     VirtqueueOptions options) {
        if (!FreeRunning<u16>(size).valid()) {
            return Error{Code::bad_argument, "a split virtqueue's size is a power of two up to 32768",
                         virtqueue_max_size, size};
        }
        if (auto fits = virtqueue_detail::check(memory,
                                                {{{at.descriptors, usize{virtqueue_descriptor_bytes} * size, 16},
                                                  {at.driver, driver_bytes(size), 2},
                                                  {at.device, device_bytes(size), 4}}},
                                                size, rows);
            !fits) {
            return fits.error();
        }
        const usize avail_event = at.device + 4 + usize{8} * size;
        const usize used_event = at.driver + 4 + usize{2} * size;
        for (const usize word : {at.driver, at.driver + 2, used_event, at.device, at.device + 2, avail_event}) {
            memory.template store_relaxed<u16>(word, 0); // visible to the device once it is given the queue
        }
        auto available = Available::create(
            memory, {.index = at.driver + 2, .event = avail_event, .entries = at.driver + 4, .stride = 2},
            FreeRunning<u16>(size), SplitNotify{at.device, options.event_index});
        if (!available) {
            return available.error();
        }
        auto used =
            Used::create(memory, {.index = at.device + 2, .event = used_event, .entries = at.device + 4, .stride = 8},
                         FreeRunning<u16>(size), SplitNotify{at.driver, options.event_index});
        if (!used) {
            return used.error();
        }
        return SplitQueue(memory, at.descriptors, rows.first(size), options, *available, *used);
    }

    u32 size() const { return table_.size(); }
    u32 free() const { return table_.free_descriptors(); }
    u32 outstanding() const { return table_.added() + table_.published(); }
    bool broken() const { return broken_.has_value(); }
    u16 next_available() const { return available_.position(); }

    Result<void> add(u16 slot, std::span<const BufferElement> elements) {
        const auto writable = virtqueue_detail::check(elements, size(), options_);
        if (!writable) [[unlikely]] {
            return writable.error();
        }
        if (auto ready = room(static_cast<u32>(elements.size())); !ready) [[unlikely]] {
            return ready;
        }
        u16 at = table_.first_free();
        for (const BufferElement& element : elements.first(elements.size() - 1)) {
            const u16 next = table_.after(at);
            write(memory_, descriptors_, at, element, descriptor_next, next);
            at = next;
        }
        write(memory_, descriptors_, at, elements.back(), 0, 0);
        append(at, static_cast<u32>(elements.size()), slot, *writable);
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
        for (u16 i = 0; i < elements.size(); ++i) {
            const bool more = i + 1u < elements.size();
            write(table, 0, i, elements[i], more ? descriptor_next : u16{0}, more ? static_cast<u16>(i + 1) : u16{0});
        }
        const u16 at = table_.first_free();
        write(memory_, descriptors_, at, {.bus = bus, .length = static_cast<u32>(bytes)}, descriptor_indirect, 0);
        append(at, 1, slot, *writable);
        return {};
    }
    [[nodiscard]] bool publish() {
        if (broken_) [[unlikely]] {
            return false;
        }
        table_.publish();
        return available_.publish();
    }

    Result<std::optional<UsedBuffer>> take() {
        if (broken_) [[unlikely]] {
            return *broken_;
        }
        if (batch_ == 0) {
            if (used_.ready() == 0) {
                const auto ready = used_.available(table_.published());
                if (!ready) [[unlikely]] {
                    return fail(
                        {Code::protocol, virtqueue_detail::too_many, ready.error().expected, ready.error().seen});
                }
                if (*ready == 0) {
                    return std::optional<UsedBuffer>{};
                }
            }
            SplitUsedElement element;
            static_cast<void>(used_.take(element)); // one is ready
            if (!table_.is_published(element.id)) [[unlikely]] {
                return fail({Code::protocol, virtqueue_detail::unknown_id, size(), element.id});
            }
            last_ = {static_cast<u16>(element.id), element.length};
            batch_ = 1;
            if (options_.in_order) {
                // One element for all buffers up to this one; the index counts each of them [virtio-1.2 §2.7.9].
                for (u16 id = oldest_; id != last_.id; id = table_.following(id)) {
                    ++batch_;
                }
                if (!used_.skip(batch_ - 1)) [[unlikely]] {
                    return fail({Code::protocol, virtqueue_detail::too_many, used_.ready() + 1, batch_});
                }
            }
        }
        const u16 id = options_.in_order ? oldest_ : last_.id;
        const VirtqueueRow row = table_[id];
        // A skipped buffer counts as fully used [virtio-1.2 §2.7.9].
        const u32 length = --batch_ == 0 ? last_.length : row.writable;
        if (length > row.writable) [[unlikely]] {
            return fail({Code::protocol, virtqueue_detail::too_long, row.writable, length});
        }
        oldest_ = table_.following(id);
        table_.remove(id);
        static_cast<void>(available_.retire(1)); // cannot fail: it was published
        return std::optional<UsedBuffer>{{row.slot, length}};
    }
    Result<bool> arm(u32 count = 1) {
        if (broken_) [[unlikely]] {
            return *broken_;
        }
        const u32 owed = table_.published() - batch_;
        const auto ready = used_.arm(std::min(count, owed), owed);
        if (!ready) [[unlikely]] {
            return fail({Code::protocol, virtqueue_detail::too_many, ready.error().expected, ready.error().seen});
        }
        return *ready || batch_ != 0;
    }
    void disarm() { used_.disarm(); }

  private:
    using Available = Producer<M, FreeRunning<u16>, SplitNotify>;
    using Used = Consumer<M, FreeRunning<u16>, SplitNotify>;
    struct Last {
        u16 id = 0;
        u32 length = 0;
    };

    static constexpr usize driver_bytes(u32 size) { return 6 + usize{2} * size; }
    static constexpr usize device_bytes(u32 size) { return 6 + usize{8} * size; }

    SplitQueue(M memory, usize descriptors, std::span<VirtqueueRow> rows, VirtqueueOptions options,
               const Available& available, const Used& used)
        : memory_(memory), descriptors_(descriptors), options_(options), available_(available), used_(used),
          table_(rows) {}

    static void write(M& memory, usize base, u16 at, const BufferElement& element, u16 flags, u16 next) {
        const SplitDescriptor descriptor{
            element.bus, element.length,
            static_cast<u16>(flags | (element.device_writable ? descriptor_write : u16{0})), next};
        const usize offset = base + usize{virtqueue_descriptor_bytes} * at;
        __builtin_assume(offset % 8 == 0); // create() has checked the table's
        memory.copy_in(offset, reinterpret_cast<const std::byte*>(&descriptor), sizeof descriptor);
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
    void append(u16 last, u32 descriptors, u16 slot, u32 writable) {
        // The ring has as many entries as there are descriptors, so a free descriptor implies a free entry.
        static_cast<void>(available_.produce(table_.first_free()));
        table_.add(last, descriptors, slot, writable);
    }
    Error fail(const Error& error) {
        broken_ = error;
        return error;
    }

    M memory_;
    usize descriptors_;
    VirtqueueOptions options_;
    Available available_;
    Used used_;
    VirtqueueTable table_;
    u16 oldest_ = 0; // with in_order: the next buffer to be returned
    u32 batch_ = 0;  // buffers covered by the last used element and not yet returned by take()
    Last last_;      // that element
    std::optional<Error> broken_;
};
static_assert(Virtqueue<SplitQueue<MappedMemory>> && Virtqueue<SplitQueue<FlatMemory>>);

} // namespace fl::io
