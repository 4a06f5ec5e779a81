// Common parts of split and packed virtqueues: buffer description, negotiated options, the layout of a queue's three
// areas, and the table of buffers held by the device. [virtio-1.2 §2.6]
//
// The queues themselves are io.ring.split and io.ring.packed. Both are the driver side and implement the concept
// Virtqueue.
module;
#include <cstddef>
export module io.ring.virtqueue;
import core.std;
import core.result;
import io.ring.memory;

export namespace fl::io {

/// Maximum queue size, in descriptors [virtio-1.2 §2.7, §2.8].
inline constexpr u32 virtqueue_max_size = 32768;
/// Size of a descriptor in bytes, in both formats and in an indirect table.
inline constexpr u32 virtqueue_descriptor_bytes = 16;

/// Descriptor flags common to both formats [virtio-1.2 §2.7.5, §2.8.3, §2.8.6, §2.8.7].
inline constexpr u16 descriptor_next = 1;
inline constexpr u16 descriptor_write = 2;
inline constexpr u16 descriptor_indirect = 4;

/// A physically contiguous part of a buffer. `bus`: its address for the device. `length`: bytes, at least 1.
struct BufferElement {
    u64 bus = 0;
    u32 length = 0;
    bool device_writable = false; // false: read-only for the device
};

/// A buffer returned by the device. `slot`: the number passed to add(). `length`: bytes written according to the
/// device, from the first device-writable byte on; never more than the buffer's device-writable bytes, or with
/// VirtqueueOptions::readable_in_length than all its bytes.
struct UsedBuffer {
    u16 slot = 0;
    u32 length = 0;
};

/// Negotiated features that affect a queue.
struct VirtqueueOptions {
    bool event_index = false; // VIRTIO_F_EVENT_IDX: events are requested by position instead of on or off
    bool in_order = false;    // VIRTIO_F_IN_ORDER: the device returns buffers in the order in which they were added
    bool indirect = false;    // VIRTIO_F_INDIRECT_DESC: add_indirect() may be used
    bool packed = false;      // VIRTIO_F_RING_PACKED; only for io.ring.any: the other queues have one format
    /// The used length may also count the buffer's device-readable bytes. Against [virtio-1.2 §2.7.8], but QEMU's SCSI
    /// host does so.
    bool readable_in_length = false;
};

/// Offsets of a queue's three areas in its memory, and the memory needed, in bytes. The device is given the bus
/// address of each area. Made by SplitQueue::layout() and PackedQueue::layout().
struct VirtqueueLayout {
    usize descriptors = 0; // Descriptor Area: descriptor table, or descriptor ring
    usize driver = 0;      // Driver Area: available ring, or driver event suppression
    usize device = 0;      // Device Area: used ring, or device event suppression
    usize bytes = 0;       // total size
};

/// An id's row in the table of outstanding buffers. Storage only: its fields belong to VirtqueueTable.
struct VirtqueueRow {
    u32 writable = 0; // device-writable bytes
    u16 slot = 0;
    u16 next = 0;        // next id: of the chain's next descriptor, or in the free list
    u16 last = 0;        // last id of the chain
    u16 descriptors = 0; // descriptors occupied by the buffer
    u16 state = 0;       // free, published, or added; if added: the id of the buffer added next
};

/// The driver side of a virtqueue. Not thread-safe: one owner, on one processor at a time. Never allocates or waits.
/// Every value written by the device is read once and validated before use; after the first violation the queue is
/// broken permanently, and the driver must reset the device.
///
///   add(slot, elements)    adds a buffer: readable elements first, at most size() of them, in total at most 2^32 - 1
///                          bytes. Not visible to the device before publish(). `slot` is the caller's number for the
///                          buffer, returned by take(). Error{exhausted}: fewer than elements.size() descriptors are
///                          free. Error{bad_argument}: the elements violate these rules.
///   add_indirect(slot, elements, table, bus)
///                          the same through a table of 16 bytes per element; takes only one descriptor. The table is
///                          the caller's memory at the bus address `bus`; it must not change until the buffer is
///                          returned. Error{not_supported}: without VirtqueueOptions::indirect.
///   publish()              makes all added buffers visible, in order, by one release store. True: the device must be
///                          notified.
///   take()                 returns the next used buffer, or nothing. Error{protocol}: the queue is broken.
///   arm(count)             requests an event once `count` of the published buffers have been used, then checks once
///                          more. True: one is available already, do not sleep. count is clamped to 1 and the number
///                          of published buffers. Without event_index: an event once any buffer has been used.
///   disarm()               requests no events. Events may occur nevertheless.
///   free()                 number of free descriptors.
///   outstanding()          buffers added and not yet returned.
///   next_available()       the position for a driver notification with VIRTIO_F_NOTIFICATION_DATA [virtio-1.2 §2.9].
template <class Q>
concept Virtqueue =
    RingMemory<typename Q::Memory> && requires(Q& queue, const Q& view, std::span<const BufferElement> elements,
                                               typename Q::Memory memory, std::span<VirtqueueRow> rows) {
        { Q::layout(u32{}) } -> std::same_as<VirtqueueLayout>;
        { Q::create(memory, VirtqueueLayout{}, u32{}, rows, VirtqueueOptions{}) } -> std::same_as<Result<Q>>;
        { queue.add(u16{}, elements) } -> std::same_as<Result<void>>;
        { queue.add_indirect(u16{}, elements, memory, u64{}) } -> std::same_as<Result<void>>;
        { queue.publish() } -> std::same_as<bool>;
        { queue.take() } -> std::same_as<Result<std::optional<UsedBuffer>>>;
        { queue.arm(u32{}) } -> std::same_as<Result<bool>>;
        queue.disarm();
        { view.broken() } -> std::same_as<bool>;
        { view.size() } -> std::same_as<u32>;
        { view.free() } -> std::same_as<u32>;
        { view.outstanding() } -> std::same_as<u32>;
        { view.next_available() } -> std::same_as<u16>;
    };

/// Buffers under way, by the id that the device returns. Kept in the driver's private memory: nothing writable by the
/// device is used to find or free a buffer.
///
/// Free ids form a FIFO list, initially 0, 1, 2 … Hence an id is reused as late as possible, so that a device
/// returning one twice is detected; and if buffers are returned in order, ids and descriptors are used in ring order,
/// as VIRTIO_F_IN_ORDER requires [virtio-1.2 §2.7.5].
class VirtqueueTable {
  public:
    VirtqueueTable() = default;
    /// Does not own `rows`; one per id.
    explicit VirtqueueTable(std::span<VirtqueueRow> rows)
        : rows_(rows), free_tail_(static_cast<u16>(rows.size() - 1)), free_descriptors_(static_cast<u32>(rows.size())),
          free_ids_(static_cast<u32>(rows.size())) {
        for (usize id = 0; id < rows.size(); ++id) {
            rows[id] = {.next = static_cast<u16>(id + 1 == rows.size() ? 0 : id + 1), .state = state_free};
        }
    }

    inline u32 size() const { return static_cast<u32>(rows_.size()); }
    inline u32 free_descriptors() const { return free_descriptors_; }
    inline u32 added() const { return added_; }
    inline u32 published() const { return published_; }
    /// Lower bound of the descriptors occupied by any buffer under way.
    inline u32 shortest() const { return shortest_; }
    /// The id of the next buffer to be added.
    inline u16 first_free() const { return free_head_; }
    /// The free id after `id`.
    inline u16 after(u16 id) const { return rows_[id].next; }
    /// Whether the buffer is published and not yet returned. `id` is an unchecked value from the device.
    inline bool is_published(u32 id) const { return id < rows_.size() && rows_[id].state == state_published; }
    inline const VirtqueueRow& operator[](u16 id) const { return rows_[id]; }
    /// With VIRTIO_F_IN_ORDER: the id of the buffer added after buffer `id`.
    inline u16 following(u16 id) const { return rows_[rows_[id].last].next; }

    /// Allocates the free ids first_free() to `last` to one buffer, whose id is the first of them. The caller has
    /// checked that `descriptors` are free.
    inline void add(u16 last, u32 descriptors, u16 slot, u32 writable) {
        const u16 id = free_head_;
        free_head_ = rows_[last].next;
        VirtqueueRow& row = rows_[id];
        row.writable = writable;
        row.slot = slot;
        row.last = last;
        row.descriptors = static_cast<u16>(descriptors);
        row.state = state_last_added;
        if (added_ != 0) {
            rows_[added_tail_].state = id;
        } else {
            added_head_ = id;
        }
        added_tail_ = id;
        shortest_ = added_ + published_ == 0 ? descriptors : std::min(shortest_, descriptors);
        ++added_;
        free_descriptors_ -= descriptors;
        free_ids_ -= ids_of(id);
    }
    /// From now on the device may return the added buffers.
    inline void publish() {
        u16 id = added_head_;
        for (u32 left = added_; left != 0; --left) {
            id = std::exchange(rows_[id].state, state_published);
        }
        published_ += std::exchange(added_, 0);
    }
    /// A published buffer was returned.
    inline void remove(u16 id) {
        VirtqueueRow& row = rows_[id];
        // The tail's link is maintained even while the list is empty: following() reads it.
        rows_[free_tail_].next = id;
        if (free_ids_ == 0) {
            free_head_ = id;
        }
        free_ids_ += ids_of(id);
        free_tail_ = row.last;
        row.state = state_free;
        free_descriptors_ += row.descriptors;
        --published_;
    }

  private:
    // States distinct from all ids.
    static constexpr u16 state_free = 0xffff;
    static constexpr u16 state_published = 0xfffe;
    static constexpr u16 state_last_added = 0xfffd;

    /// A split queue's buffer occupies one id per descriptor, a packed queue's one id.
    inline u32 ids_of(u16 id) const { return rows_[id].last == id ? 1 : rows_[id].descriptors; }

    std::span<VirtqueueRow> rows_;
    u16 free_head_ = 0;
    u16 free_tail_ = 0;
    u16 added_head_ = 0; // unpublished buffers, linked by `state`
    u16 added_tail_ = 0;
    u32 added_ = 0;
    u32 published_ = 0;
    u32 free_descriptors_ = 0;
    u32 free_ids_ = 0;
    u32 shortest_ = 1;
};

namespace virtqueue_detail {
/// Validates a buffer to be added. Returns the largest used length, or Error{bad_argument}.
inline Result<u32> check(std::span<const BufferElement> elements, u32 size, VirtqueueOptions options) {
    // An indirect table is also limited to the queue size [virtio-1.2 §2.7.5.3.1, §2.8.5].
    if (elements.empty() || elements.size() > size) [[unlikely]] {
        return Error{Code::bad_argument, "a buffer has at least one element and at most as many as the queue has", size,
                     elements.size()};
    }
    u64 total = 0;
    u64 writable = 0;
    for (const BufferElement& element : elements) {
        if (element.length == 0 || (writable != 0 && !element.device_writable)) [[unlikely]] {
            return Error{Code::bad_argument,
                         "a buffer's elements are not empty, and the device-readable ones come first"};
        }
        total += element.length;
        writable += element.device_writable ? element.length : 0;
    }
    if (total > ~u32{0}) [[unlikely]] {
        return Error{Code::bad_argument, "a buffer is longer than 2^32 - 1 bytes", ~u32{0}, total};
    }
    return static_cast<u32>(options.readable_in_length ? total : writable);
}

struct Area {
    usize at;
    usize bytes;
    usize alignment;
};

/// Validates a queue's areas and rows.
template <class M>
Result<void> check(const M& memory, const std::array<Area, 3>& areas, u32 size, std::span<VirtqueueRow> rows) {
    if (rows.size() < size) {
        return Error{Code::bad_argument, "a virtqueue needs a row for each descriptor", size, rows.size()};
    }
    for (const Area& area : areas) {
        if (area.at % area.alignment != 0 || area.at > memory.size() || area.bytes > memory.size() - area.at) {
            return Error{Code::bad_argument, "a virtqueue's area is misaligned or outside of its memory", memory.size(),
                         area.at};
        }
        for (const Area& other : areas) {
            if (&area != &other && area.at < other.at + other.bytes && other.at < area.at + area.bytes) {
                return Error{Code::bad_argument, "a virtqueue's areas overlap", other.at, area.at};
            }
        }
    }
    return {};
}

inline constexpr std::string_view unknown_id = "the device has returned a buffer that it does not hold";
inline constexpr std::string_view too_long = "the device says that it has written more than the buffer holds";
inline constexpr std::string_view too_many = "the device has returned more buffers than it holds";
inline constexpr std::string_view no_room = "not enough descriptors are free: take used buffers first";
inline constexpr std::string_view no_indirect = "VIRTIO_F_INDIRECT_DESC was not negotiated";
inline constexpr std::string_view short_table = "an indirect table needs 16 bytes for each element";
} // namespace virtqueue_detail

} // namespace fl::io
