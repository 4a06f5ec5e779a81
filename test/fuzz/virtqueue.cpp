// Split and packed virtqueues over memory whose device is controlled by the fuzzer: it conforms (the device of the unit
// tests), violates rules, or changes data just before the driver reads it. Checked: the driver accesses nothing outside
// its queue and writes only its own areas; a buffer is returned once, with at most its size; with a conforming device
// every buffer arrives and is returned, and no event is lost; a broken queue stays broken.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <deque>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>
import core.std;
import core.result;
import io.ring.split;
import io.ring.packed;
import io.ring.hostile;

#include "fuzz/input.hpp"
#include "unit/io/ring_virtqueue_fake.hpp"

namespace {
using namespace fl;
using namespace fl::io;
using fuzz::require;
using virtqueue_fake::Chain;
using virtqueue_fake::Guest;
using virtqueue_fake::Piece;

/// HostileMemory that checks the driver's reads and writes.
class Memory {
  public:
    struct State : HostileMemory::State {
        fuzz::Input* input = nullptr; // supplies changes before reads; nullptr: no changes
        bool sound = true;            // the device has conformed so far
        usize not_ours = 0;           // the area written only by the device
        usize not_ours_bytes = 0;
    };
    Memory() = default;
    explicit Memory(State& state) : state_(&state), memory_(state) {}
    usize size() const { return memory_.size(); }
    template <class W>
    W load_relaxed(usize at) const {
        look(at, sizeof(W));
        return memory_.load_relaxed<W>(at);
    }
    template <class W>
    W load_acquire(usize at) const {
        look(at, sizeof(W));
        return memory_.load_acquire<W>(at);
    }
    template <class W>
    void store_relaxed(usize at, W value) {
        write(at, sizeof(W));
        memory_.store_relaxed<W>(at, value);
    }
    template <class W>
    void store_release(usize at, W value) {
        write(at, sizeof(W));
        memory_.store_release<W>(at, value);
    }
    void full_barrier() const { memory_.full_barrier(); }
    void copy_out(usize at, std::byte* into, usize count) const {
        look(at, count);
        memory_.copy_out(at, into, count);
    }
    void copy_in(usize at, const std::byte* from, usize count) {
        write(at, count);
        memory_.copy_in(at, from, count);
    }

  private:
    void inside(usize at, usize count) const { require(at <= size() && count <= size() - at); }
    void write(usize at, usize count) const {
        inside(at, count);
        require(at >= state_->not_ours + state_->not_ours_bytes || at + count <= state_->not_ours);
    }
    void look(usize at, usize count) const {
        inside(at, count);
        if (state_->input == nullptr || state_->input->empty()) {
            return;
        }
        const u8 choice = state_->input->byte();
        if ((choice & 3) == 0) {
            state_->sound = false;
            const auto bytes = state_->input->take(std::min<usize>(count, 1 + (choice >> 2) % 8));
            std::copy(bytes.begin(), bytes.end(), state_->storage.begin() + static_cast<std::ptrdiff_t>(at));
        }
    }
    State* state_ = nullptr;
    HostileMemory memory_;
};
static_assert(RingMemory<Memory>);

constexpr usize table_bytes = 16 * 8;
constexpr u32 table_count = 4;

template <template <class> class Kind, class Device>
void run(fuzz::Input& input, u32 size, u8 shape) {
    using Queue = Kind<Memory>;
    const VirtqueueOptions options{
        .event_index = (shape & 1) != 0, .in_order = (shape & 2) != 0, .indirect = (shape & 4) != 0};
    const VirtqueueLayout layout = Queue::layout(size);
    const usize tables = align_up<usize>(layout.bytes, 64);
    Guest guest(tables + table_count * table_bytes);
    Memory::State state;
    state.storage = {guest.data(), layout.bytes};
    std::vector<VirtqueueRow> rows(size);
    auto created = Queue::create(Memory(state), layout, size, rows, options);
    require(created.has_value());
    Queue queue = *created;
    state.not_ours = layout.device;
    state.not_ours_bytes = layout.bytes - layout.device;
    state.input = (shape & 8) != 0 ? &input : nullptr;
    std::array<Memory::State, table_count> table_states;
    for (u32 i = 0; i < table_count; ++i) {
        table_states[i].storage = {guest.data() + tables + i * table_bytes, table_bytes};
    }
    Device device(guest, {size, guest.bus + layout.descriptors, guest.bus + layout.driver, guest.bus + layout.device,
                          options.event_index, options.in_order});

    struct Buffer {
        std::vector<Piece> pieces;
        u64 writable = 0;
        std::optional<u32> table;
        bool published = false;
    };
    std::map<u16, Buffer> in_flight; // in flight, by slot
    std::array<bool, table_count> table_taken{};
    std::deque<std::pair<u16, u32>> given; // returned by a conforming device: slot and length
    std::vector<Chain> held;
    std::optional<u32> awaited; // armed: number of buffers until an event must be raised
    u16 slot = 0;

    const auto slot_of = [](const Chain& chain) { return static_cast<u16>(chain.pieces.front().bus >> 16); };
    const auto give = [&](u32 first, u32 count, u32 length) {
        device.push_batch(std::span(held).subspan(first, count), length);
        for (u32 i = first; i < first + count; ++i) {
            given.emplace_back(slot_of(held[i]),
                               i + 1 == first + count ? length : static_cast<u32>(held[i].writable()));
        }
        held.erase(held.begin() + first, held.begin() + first + count);
        const bool event = device.interrupt();
        if (awaited && state.sound) {
            require(event || count < *awaited);
            awaited = event ? std::nullopt : std::optional(*awaited - count);
        }
    };
    const auto take = [&] {
        const bool was_broken = queue.broken();
        const auto used = queue.take();
        require(used.has_value() != queue.broken() && (!was_broken || !used));
        require(used || !state.sound);
        if (!used || !*used) {
            require(!state.sound || given.empty());
            return false;
        }
        const auto found = in_flight.find((*used)->slot);
        require(found != in_flight.end() && found->second.published && (*used)->length <= found->second.writable);
        if (state.sound) {
            require(!given.empty() && given.front() == std::pair((*used)->slot, (*used)->length));
            given.pop_front();
        }
        if (found->second.table) {
            table_taken[*found->second.table] = false;
        }
        in_flight.erase(found);
        return true;
    };

    while (!input.empty()) {
        const u8 what = input.byte();
        switch (what % 16) {
        case 0:
        case 1:
        case 2: { // add
            Buffer buffer;
            const u32 count = 1 + (what >> 4) % 8;
            const u8 mix = input.byte();
            std::vector<BufferElement> elements;
            for (u32 i = 0; i < count; ++i) {
                const bool writable = i >= mix % (count + 1);
                buffer.pieces.push_back({u64{slot} << 16 | i, 1u + (mix >> 4), writable});
                elements.push_back({buffer.pieces.back().bus, buffer.pieces.back().length, writable});
                buffer.writable += writable ? 1u + (mix >> 4) : 0;
            }
            const bool indirect = what % 16 == 2;
            u32 table = 0;
            while (indirect && table < table_count && table_taken[table]) {
                ++table;
            }
            if (table == table_count || in_flight.contains(slot)) {
                break;
            }
            const u32 need = indirect ? 1 : count;
            const u32 free = queue.free();
            const bool broken = queue.broken();
            const auto added = indirect ? queue.add_indirect(slot, elements, Memory(table_states[table]),
                                                             guest.bus + tables + table * table_bytes)
                                        : queue.add(slot, elements);
            require(added.has_value() == (!broken && count <= size && need <= free && (!indirect || options.indirect)));
            if (added) {
                require(queue.free() == free - need);
                if (indirect) {
                    buffer.table = table;
                    table_taken[table] = true;
                }
                in_flight.emplace(slot, std::move(buffer));
            }
            ++slot;
            break;
        }
        case 3:
        case 4:
            static_cast<void>(queue.publish());
            awaited = std::nullopt; // buffers published now may be returned instead
            if (!queue.broken()) {
                for (auto& [number, buffer] : in_flight) {
                    buffer.published = true;
                }
            }
            break;
        case 5:
        case 6:
        case 7: // the device takes a buffer
            while (state.sound) {
                auto chain = device.pop();
                require(guest.fault.empty());
                if (!chain) {
                    break;
                }
                const auto found = in_flight.find(slot_of(*chain));
                require(found != in_flight.end() && found->second.published && found->second.pieces == chain->pieces);
                held.push_back(std::move(*chain));
            }
            break;
        case 8:
        case 9: // the device returns a buffer
            if (state.sound && !held.empty()) {
                const u32 which = options.in_order ? 0 : (what >> 4) % static_cast<u32>(held.size());
                const u32 count = options.in_order ? 1 + (what >> 4) % static_cast<u32>(held.size()) : 1;
                const Chain& last = held[which + count - 1];
                give(which, count, static_cast<u32>(input.byte() % (last.writable() + 1)));
                require(guest.fault.empty());
            }
            break;
        case 10: take(); break;
        case 11:
            while (take()) {
            }
            break;
        case 12: {
            const u32 count = 1 + (what >> 4);
            u32 published = 0;
            for (const auto& [number, buffer] : in_flight) {
                published += buffer.published ? 1 : 0;
            }
            const bool was_broken = queue.broken();
            static_cast<void>(device.interrupt());
            const auto found = queue.arm(count);
            require(!was_broken || !found);
            require(found.has_value() != queue.broken() && (found || !state.sound));
            awaited = std::nullopt;
            if (state.sound) {
                require(*found == !given.empty());
                if (!*found && published != 0) {
                    awaited = options.event_index ? std::min(count, published) : 1;
                }
            }
            break;
        }
        case 13:
            queue.disarm();
            awaited = std::nullopt;
            break;
        case 14:
            if ((what & 16) != 0) {
                device.want(1 + input.byte() % size);
            } else {
                device.want_none();
            }
            break;
        default: { // arbitrary memory
            state.sound = false;
            const usize at = input.word() % layout.bytes;
            const auto bytes = input.take(std::min<usize>(1 + (what >> 4), layout.bytes - at));
            std::copy(bytes.begin(), bytes.end(), state.storage.begin() + static_cast<std::ptrdiff_t>(at));
            break;
        }
        }
        require(queue.broken() || queue.outstanding() == in_flight.size());
    }
}
} // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    fuzz::Input input(data, size);
    const u8 shape = input.byte();
    const u8 length = input.byte();
    if ((shape & 16) != 0) {
        run<PackedQueue, virtqueue_fake::PackedDevice>(input, 1 + length % 17, shape);
    } else {
        run<SplitQueue, virtqueue_fake::SplitDevice>(input, 1u << length % 5, shape);
    }
    return 0;
}
