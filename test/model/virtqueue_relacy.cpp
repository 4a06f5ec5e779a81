// The memory orderings of the split and the packed virtqueue under relacy, as in ring_relacy.cpp: the templates of
// io.ring.split and io.ring.packed on the driver side, unchanged over a relacy memory, and a device written here from
// the specification. Each property is tested unmodified, which must pass, and once with each ordering it needs
// weakened, on the driver's or the device's side, which must fail.
#include <cstring>
#include <relacy/relacy.hpp>
//
#include "must.hpp"
#undef new
#undef delete
#undef malloc
#undef free
#undef assert
import core.std;
import core.result;
import io.ring.split;
import io.ring.packed;

namespace {
using namespace fl;
using namespace fl::io;

/// The ordering to weaken.
enum class Weak {
    nothing,
    available_store, // driver: makes buffers available
    available_load,  // device
    used_store,      // device: makes them used
    used_load,       // driver
    driver_barrier,
    device_barrier,
    head_first, // packed: the flags of a list's first descriptor are written before the rest
};

/// What is weakened in the present run. A variable, not a template parameter: relacy is compiled anew for every type of
/// test, which takes seconds.
Weak weak = Weak::nothing;

constexpr rl::memory_order either(bool relaxed, rl::memory_order order) { return relaxed ? rl::mo_relaxed : order; }

/// A buffer in these models: its address is its number, and the device writes that number to the buffer's memory and as
/// the used length.
BufferElement element(unsigned value) { return {value, 100, true}; }

// ---- split ----

constexpr u32 split_size = 2;
constexpr VirtqueueLayout split_at{.descriptors = 0, .driver = 32, .device = 48, .bytes = 72};

struct SplitShared {
    rl::var<unsigned> descriptors[split_size];
    rl::var<unsigned> heads[split_size];
    rl::var<unsigned> used_id[split_size];
    rl::var<unsigned> used_length[split_size];
    rl::atomic<unsigned> available_flags, available_index, used_event, used_flags, used_index, available_event;

    rl::atomic<unsigned>& word(usize at) {
        switch (at) {
        case split_at.driver: return available_flags;
        case split_at.driver + 2: return available_index;
        case split_at.driver + 4 + 2 * split_size: return used_event;
        case split_at.device: return used_flags;
        case split_at.device + 2: return used_index;
        default: return available_event;
        }
    }
};

class SplitMemory {
  public:
    SplitMemory() = default;
    explicit SplitMemory(SplitShared& shared) : shared_(&shared) {}
    usize size() const { return split_at.bytes; }
    template <class W>
    W load_relaxed(usize at) const {
        return static_cast<W>(shared_->word(at).load(rl::mo_relaxed, $));
    }
    template <class W>
    W load_acquire(usize at) const {
        return static_cast<W>(shared_->word(at).load(either(weak == Weak::used_load, rl::mo_acquire), $));
    }
    template <class W>
    void store_relaxed(usize at, W value) {
        shared_->word(at).store(value, rl::mo_relaxed, $);
    }
    template <class W>
    void store_release(usize at, W value) {
        shared_->word(at).store(value, either(weak == Weak::available_store, rl::mo_release), $);
    }
    void full_barrier() const {
        if (weak != Weak::driver_barrier) {
            rl::atomic_thread_fence(rl::mo_seq_cst, $);
        }
    }
    void copy_out(usize at, std::byte* into, usize) const {
        const usize i = (at - split_at.device - 4) / 8;
        const unsigned id = shared_->used_id[i]($);
        const unsigned length = shared_->used_length[i]($);
        std::memcpy(into, &id, 4);
        std::memcpy(into + 4, &length, 4);
    }
    void copy_in(usize at, const std::byte* from, usize count) {
        unsigned value = 0;
        if (at >= split_at.driver) {
            std::memcpy(&value, from, count);
            shared_->heads[(at - split_at.driver - 4) / 2]($) = value;
        } else {
            std::memcpy(&value, from, 4); // the address
            shared_->descriptors[at / 16]($) = value;
        }
    }

  private:
    SplitShared* shared_ = nullptr;
};

template <bool event_index>
struct Split {
    using Memory = SplitMemory;
    using Queue = SplitQueue<Memory>;
    static constexpr u32 size = split_size;
    SplitShared shared;
    std::array<VirtqueueRow, size> rows;
    std::optional<Queue> queue;
    // the device
    u16 taken = 0;
    u16 used = 0;
    unsigned current_head = 0;
    bool lists = false; // all buffers are lists of two

    void begin() {
        queue.emplace(*Queue::create(Memory(shared), split_at, size, rows, {.event_index = event_index}));
        taken = used = 0;
    }
    /// The next buffer's number; 0: none.
    unsigned pop() {
        const unsigned index = shared.available_index.load(either(weak == Weak::available_load, rl::mo_acquire), $);
        if (static_cast<u16>(index) == taken) {
            return 0;
        }
        current_head = shared.heads[taken % size]($);
        ++taken;
        RL_ASSERT(current_head < size);
        const unsigned value = shared.descriptors[current_head]($);
        if (lists) { // a list of two: the next descriptor is the other one
            const unsigned other = shared.descriptors[1 - current_head]($);
            RL_ASSERT(other == value);
        }
        return value;
    }
    /// Returns the buffer of the last pop().
    void push(unsigned length) {
        shared.used_id[used % size]($) = current_head;
        shared.used_length[used % size]($) = length;
        shared.used_index.store(++used, either(weak == Weak::used_store, rl::mo_release), $);
    }
    void barrier() {
        if (weak != Weak::device_barrier) {
            rl::atomic_thread_fence(rl::mo_seq_cst, $);
        }
    }
    /// After push(): whether the driver requested an event.
    bool interrupt() {
        barrier();
        if (event_index) {
            return shared.used_event.load(rl::mo_relaxed, $) == static_cast<u16>(used - 1);
        }
        return shared.available_flags.load(rl::mo_relaxed, $) == 0;
    }
    /// Requests a notification for the next buffer; the caller must check the ring once more.
    void want() {
        if (event_index) {
            shared.available_event.store(taken, rl::mo_relaxed, $);
        } else {
            shared.used_flags.store(0, rl::mo_relaxed, $);
        }
        barrier();
    }
    void want_none() {
        if (event_index) {
            shared.available_event.store(static_cast<u16>(taken + 0x8000), rl::mo_relaxed, $);
        } else {
            shared.used_flags.store(1, rl::mo_relaxed, $);
        }
    }
};

// ---- packed ----

constexpr u32 packed_size = 3;
constexpr VirtqueueLayout packed_at{.descriptors = 0, .driver = 48, .device = 52, .bytes = 56};

struct PackedBody {
    unsigned address = 0;
    unsigned length = 0;
    unsigned id = 0;
};
struct PackedShared {
    rl::var<unsigned> address[packed_size];
    rl::var<unsigned> length[packed_size];
    rl::var<unsigned> id[packed_size];
    rl::atomic<unsigned> flags[packed_size], driver, device;

    rl::atomic<unsigned>& word(usize at) {
        return at == packed_at.driver ? driver : at == packed_at.device ? device : flags[at / 16];
    }
};

class PackedMemory {
  public:
    PackedMemory() = default;
    explicit PackedMemory(PackedShared& shared) : shared_(&shared) {}
    usize size() const { return packed_at.bytes; }
    template <class W>
    W load_relaxed(usize at) const {
        return static_cast<W>(shared_->word(at).load(rl::mo_relaxed, $));
    }
    template <class W>
    W load_acquire(usize at) const {
        return static_cast<W>(shared_->word(at).load(either(weak == Weak::used_load, rl::mo_acquire), $));
    }
    template <class W>
    void store_relaxed(usize at, W value) {
        shared_->word(at).store(value, rl::mo_relaxed, $);
    }
    template <class W>
    void store_release(usize at, W value) {
        shared_->word(at).store(value, either(weak == Weak::available_store, rl::mo_release), $);
    }
    void full_barrier() const {
        if (weak != Weak::driver_barrier) {
            rl::atomic_thread_fence(rl::mo_seq_cst, $);
        }
    }
    void copy_out(usize at, std::byte* into, usize) const {
        const unsigned length = shared_->length[at / 16]($);
        const u16 id = static_cast<u16>(shared_->id[at / 16]($));
        std::memcpy(into, &length, 4);
        std::memcpy(into + 4, &id, 2);
    }
    void copy_in(usize at, const std::byte* from, usize count) {
        PackedDescriptor descriptor;
        std::memcpy(&descriptor, from, sizeof descriptor); // including the flags, even if they are withheld
        const usize i = at / 16;
        shared_->address[i]($) = static_cast<unsigned>(descriptor.bus);
        shared_->length[i]($) = descriptor.length;
        shared_->id[i]($) = descriptor.id;
        if (count == sizeof descriptor) {
            shared_->flags[i].store(descriptor.flags, rl::mo_relaxed, $);
        } else if (weak == Weak::head_first) {
            shared_->flags[i].store(descriptor.flags, rl::mo_release, $);
        }
    }

  private:
    PackedShared* shared_ = nullptr;
};

template <bool event_index>
struct Packed {
    using Memory = PackedMemory;
    using Queue = PackedQueue<Memory>;
    static constexpr u32 size = packed_size;
    PackedShared shared;
    std::array<VirtqueueRow, size> rows;
    std::optional<Queue> queue;
    // the device
    struct Place {
        u32 offset = 0;
        bool wrap = true;
        void advance(u32 count) {
            offset += count;
            if (offset >= size) {
                offset -= size;
                wrap = !wrap;
            }
        }
        unsigned word() const { return offset | (wrap ? 0x8000u : 0u); }
    };
    Place next;
    Place used;
    u32 current_id = 0;
    u32 current_count = 0;
    bool lists = false; // as the flags say

    void begin() {
        queue.emplace(*Queue::create(Memory(shared), packed_at, size, rows, {.event_index = event_index}));
        next = used = {};
    }
    unsigned pop() {
        const auto is_available = [&](rl::memory_order order) {
            const unsigned flags = shared.flags[next.offset].load(order, $);
            const bool there = ((flags & 0x80) != 0) == next.wrap && ((flags & 0x8000) != 0) != next.wrap;
            return std::pair(there, flags);
        };
        auto [there, flags] = is_available(either(weak == Weak::available_load, rl::mo_acquire));
        if (!there) {
            return 0;
        }
        const unsigned value = shared.address[next.offset]($);
        current_count = 1;
        current_id = shared.id[next.offset]($);
        next.advance(1);
        while ((flags & 1) != 0) { // the rest of the list is available
            std::tie(there, flags) = is_available(rl::mo_relaxed);
            RL_ASSERT(there);
            const unsigned other = shared.address[next.offset]($);
            RL_ASSERT(other == value);
            current_id = shared.id[next.offset]($);
            ++current_count;
            next.advance(1);
        }
        return value;
    }
    void push(unsigned length) {
        shared.length[used.offset]($) = length;
        shared.id[used.offset]($) = current_id;
        shared.flags[used.offset].store(used.wrap ? 0x8082 : 0x0002, either(weak == Weak::used_store, rl::mo_release),
                                        $);
        last = used;
        used.advance(current_count);
    }
    void barrier() {
        if (weak != Weak::device_barrier) {
            rl::atomic_thread_fence(rl::mo_seq_cst, $);
        }
    }
    bool interrupt() {
        barrier();
        const unsigned event = shared.driver.load(rl::mo_relaxed, $);
        switch (event >> 16) {
        case 0: return true;
        case 1: return false;
        default: break;
        }
        for (Place at = last; at.offset != used.offset || at.wrap != used.wrap; at.advance(1)) {
            if (at.word() == (event & 0xffff)) {
                return true;
            }
        }
        return false;
    }
    void want() {
        shared.device.store(event_index ? 0x20000 | next.word() : 0, rl::mo_relaxed, $);
        barrier();
    }
    void want_none() { shared.device.store(0x10000, rl::mo_relaxed, $); }

    Place last;
};

// ---- properties ----

/// Buffers arrive intact and in order and are returned intact, and neither a descriptor nor a buffer's memory is reused
/// before the other side has finished with it.
template <template <bool> class Kind>
struct Transfer : rl::test_suite<Transfer<Kind>, 2> {
    Kind<false> q;
    rl::var<unsigned> memory; // shared by the buffers alternately

    void before() {
        q.begin();
        q.lists = true;
    }
    void thread(unsigned number) {
        if (number == 0) {
            unsigned added = 0;
            unsigned back = 0;
            for (int attempt = 0; attempt < 3; ++attempt) {
                if (added == back && added != 2) { // lists of two elements: only one fits at a time
                    memory($) = 0;
                    ++added;
                    const BufferElement elements[2] = {element(added), element(added)};
                    RL_ASSERT(q.queue->add(static_cast<u16>(added), elements).has_value());
                    static_cast<void>(q.queue->publish());
                }
                const auto used = q.queue->take();
                RL_ASSERT(used.has_value());
                if (*used) {
                    ++back;
                    RL_ASSERT((*used)->slot == back);
                    RL_ASSERT((*used)->length == back);
                    const unsigned content = memory($);
                    RL_ASSERT(content == back);
                }
            }
        } else {
            unsigned expected = 1;
            for (int attempt = 0; attempt < 3; ++attempt) {
                if (const unsigned value = q.pop()) {
                    RL_ASSERT(value == expected);
                    memory($) = value;
                    q.push(value);
                    ++expected;
                }
            }
        }
    }
};

/// Buffers published together are seen together, intact and in order.
template <template <bool> class Kind>
struct Batch : rl::test_suite<Batch<Kind>, 2> {
    Kind<false> q;

    void before() { q.begin(); }
    void thread(unsigned number) {
        if (number == 0) {
            for (unsigned i = 1; i <= 2; ++i) {
                const BufferElement one = element(i);
                RL_ASSERT(q.queue->add(static_cast<u16>(i), std::span(&one, 1)).has_value());
            }
            static_cast<void>(q.queue->publish());
        } else {
            for (int attempt = 0; attempt < 3; ++attempt) {
                if (const unsigned value = q.pop()) {
                    RL_ASSERT(value == 1);
                    RL_ASSERT(q.pop() == 2);
                    return;
                }
            }
        }
    }
};

/// A driver that sleeps after arm(Count) gets an event once that many buffers have been returned.
template <template <bool> class Kind, bool event_index, unsigned Count>
struct DriverSleeps : rl::test_suite<DriverSleeps<Kind, event_index, Count>, 2> {
    Kind<event_index> q;
    unsigned event = 0;   // number of buffers returned at the last event
    unsigned slept = ~0u; // number taken when the driver fell asleep

    void before() {
        q.begin();
        for (unsigned i = 0; i < 2; ++i) {
            const BufferElement one = element(i + 1);
            RL_ASSERT(q.queue->add(static_cast<u16>(i), std::span(&one, 1)).has_value());
        }
        static_cast<void>(q.queue->publish());
        q.queue->disarm();
        event = 0;
        slept = ~0u;
    }
    void thread(unsigned number) {
        if (number == 0) {
            unsigned taken = 0;
            for (int attempt = event_index ? 0 : 1; attempt < 3; ++attempt) {
                while (true) {
                    const auto used = q.queue->take();
                    RL_ASSERT(used.has_value());
                    if (!*used) {
                        break;
                    }
                    ++taken;
                }
                const auto found = q.queue->arm(Count);
                RL_ASSERT(found.has_value());
                if (!*found) {
                    slept = taken;
                    return;
                }
                q.queue->disarm();
            }
        } else {
            for (unsigned i = 1; i <= 2; ++i) {
                RL_ASSERT(q.pop() == i);
                q.push(i);
                if (q.interrupt()) {
                    event = i;
                }
            }
        }
    }
    void after() { RL_ASSERT(slept == ~0u || 2 - slept < Count || event >= slept + Count); }
};

/// A device that sleeps after requesting a notification gets one for the next buffer.
template <template <bool> class Kind, bool event_index>
struct DeviceSleeps : rl::test_suite<DeviceSleeps<Kind, event_index>, 2> {
    Kind<event_index> q;
    unsigned notified = 0; // number published at the last notification
    unsigned slept = ~0u;  // number taken when the device fell asleep

    void before() {
        q.begin();
        q.want_none();
        notified = 0;
        slept = ~0u;
    }
    void thread(unsigned number) {
        if (number == 0) {
            for (unsigned i = 1; i <= 2; ++i) {
                const BufferElement one = element(i);
                RL_ASSERT(q.queue->add(static_cast<u16>(i), std::span(&one, 1)).has_value());
                if (q.queue->publish()) {
                    notified = i;
                }
            }
        } else {
            unsigned taken = 0;
            for (int attempt = event_index ? 0 : 1; attempt < 3; ++attempt) {
                while (q.pop() != 0) {
                    ++taken;
                }
                q.want();
                if (q.pop() == 0) {
                    slept = taken;
                    return;
                }
                ++taken;
                q.want_none();
            }
        }
    }
    void after() { RL_ASSERT(slept == ~0u || slept == 2 || notified > slept); }
};

template <class Test>
void must(bool pass, std::string_view what, Weak weakened = Weak::nothing) {
    weak = weakened;
    model::must<Test>(pass, what);
}

template <template <bool> class Kind>
void both() {
    must<Transfer<Kind>>(true, "buffers arrive and come back whole, in order, once");
    must<Transfer<Kind>>(false, "… made available by a relaxed store", Weak::available_store);
    must<Transfer<Kind>>(false, "… found available by a relaxed load", Weak::available_load);
    must<Transfer<Kind>>(false, "… made used by a relaxed store", Weak::used_store);
    must<Transfer<Kind>>(false, "… found used by a relaxed load", Weak::used_load);
    must<Batch<Kind>>(true, "buffers published together are seen together");
    must<Batch<Kind>>(false, "… made available by a relaxed store", Weak::available_store);
    must<Batch<Kind>>(false, "… found available by a relaxed load", Weak::available_load);
    must<DriverSleeps<Kind, true, 1>>(true, "event index: no event to the driver is lost");
    must<DriverSleeps<Kind, true, 1>>(false, "… without arm()'s barrier", Weak::driver_barrier);
    must<DriverSleeps<Kind, true, 1>>(false, "… without the device's", Weak::device_barrier);
    must<DriverSleeps<Kind, true, 2>>(true, "event index, after two: no event to the driver is lost");
    must<DriverSleeps<Kind, true, 2>>(false, "… without arm()'s barrier", Weak::driver_barrier);
    must<DriverSleeps<Kind, true, 2>>(false, "… without the device's", Weak::device_barrier);
    must<DriverSleeps<Kind, false, 1>>(true, "flags: no event to the driver is lost");
    must<DriverSleeps<Kind, false, 1>>(false, "… without arm()'s barrier", Weak::driver_barrier);
    must<DriverSleeps<Kind, false, 1>>(false, "… without the device's", Weak::device_barrier);
    must<DeviceSleeps<Kind, true>>(true, "event index: no notification to the device is lost");
    must<DeviceSleeps<Kind, true>>(false, "… without publish()'s barrier", Weak::driver_barrier);
    must<DeviceSleeps<Kind, true>>(false, "… without the device's", Weak::device_barrier);
    must<DeviceSleeps<Kind, false>>(true, "flags: no notification to the device is lost");
    must<DeviceSleeps<Kind, false>>(false, "… without publish()'s barrier", Weak::driver_barrier);
    must<DeviceSleeps<Kind, false>>(false, "… without the device's", Weak::device_barrier);
}

} // namespace

int main() {
    std::cout << "split\n" << std::flush;
    both<Split>();
    std::cout << "packed\n" << std::flush;
    both<Packed>();
    must<Transfer<Packed>>(false, "… with a list's first flags not kept back", Weak::head_first);
    return model::verdict();
}
