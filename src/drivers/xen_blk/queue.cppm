// A disk's ring [xen-ring]: slots for requests to the back end, and its responses to them. Knows no contents of
// either. The back end is not trusted: there are never more responses than requests, and each is copied out once.
//
// Responses are taken in batches: the back end's position is read once, with the first of a batch.
module;
#include "core/try.hpp"
export module drivers.xen_blk.queue;
import core.std;
import core.result;
import core.dma;
import io.ring;
export import drivers.xen_blk.protocol;

export namespace fl::drivers::xen_blk {

class Ring {
  public:
    /// The slots of four ring pages. 32 requests of 128 KiB without indirect segments need 96.
    static constexpr u32 max_slots = 128;

    /// Lays out an empty ring in `memory`: whole pages, zeroed, to be shared afterwards. Before anything else, and
    /// again for another ring in its place.
    Result<void> lay_out(DmaSpan memory) {
        io::MappedMemory shared(memory.data, memory.size);
        const u32 slots = std::min(io::ring_entries(memory.size, ring_slots, slot_bytes), max_slots);
        const io::FreeRunning<u32> positions(slots);
        const auto layout = [](usize index, usize event) {
            return io::RingLayout{.index = index, .event = event, .entries = ring_slots, .stride = slot_bytes};
        };
        TRY(requests_, Requests::create(shared, layout(ring_request_producer, ring_request_event), positions));
        TRY(responses_, Responses::create(shared, layout(ring_response_producer, ring_response_event), positions));
        // Both sides want an event for the first entry [xen-ring SHARED_RING_INIT].
        shared.store_relaxed<u32>(ring_request_event, 1);
        shared.store_relaxed<u32>(ring_response_event, 1);
        in_batch_ = false;
        left_ = batch_ = 0;
        return {};
    }
    inline u32 capacity() const { return requests_->capacity(); }
    inline bool full() const { return requests_->full(); }
    /// Requests that the back end can respond to.
    inline u32 owed() const { return requests_->owed(); }

    /// Copies a request, or the part of it that is in use, into the next slot. Not if the ring is full.
    [[gnu::always_inline]] inline void add(std::span<const std::byte> request) {
        static_cast<void>(requests_->produce(request));
    }
    /// The same for a request in words.
    template <usize words>
    [[gnu::always_inline]] inline void add(const std::array<u64, words>& request) {
        static_assert(words * 8 <= slot_bytes && slot_bytes % 8 == 0 && ring_slots % 8 == 0);
        requests_->produce_words([&](auto out) __attribute__((always_inline)) {
            for (const u64 word : request) {
                out.put(word);
            }
        });
    }
    /// Makes the added requests visible. True: the back end wants an event.
    [[gnu::always_inline]] inline bool publish() { return requests_->publish(); }

    inline bool in_batch() const { return in_batch_; }
    /// Looks for responses. Returns how many there are; not 0: a batch has begun. Error{protocol}: more than requests.
    [[gnu::always_inline]] inline Result<u32> begin_batch() {
        auto found = responses_->available(requests_->owed());
        if (found && *found != 0) [[likely]] {
            in_batch_ = true;
            batch_ = left_ = *found;
        }
        return found;
    }
    /// Copies the next response of the batch: the only read of it. False: that was all.
    [[gnu::always_inline]] inline bool take(Response& response) {
        if (left_ == 0) {
            return false;
        }
        --left_;
        static_assert(sizeof(Response) <= 16 && std::is_trivially_copyable_v<Response>);
        const auto words = responses_->take_words<2>();
        __builtin_memcpy(&response, words.data(), sizeof response);
        return true;
    }
    /// The slots of the batch's requests are free. All of its responses were taken.
    [[gnu::always_inline]] inline Result<void> end_batch() {
        in_batch_ = false;
        return requests_->retire(batch_);
    }
    /// Asks for an event once `count` more responses are there. True: there are some already. Error{protocol}: see
    /// begin_batch().
    [[gnu::always_inline]] inline Result<bool> arm(u32 count) { return responses_->arm(count, requests_->owed()); }

  private:
    using Requests = io::Producer<io::MappedMemory, io::FreeRunning<u32>, io::ReachedEvent>;
    using Responses = io::Consumer<io::MappedMemory, io::FreeRunning<u32>, io::ReachedEvent>;

    std::optional<Requests> requests_; // set by lay_out()
    std::optional<Responses> responses_;
    bool in_batch_ = false; // responses are being taken
    u32 left_ = 0;          // responses of the batch not taken yet
    u32 batch_ = 0;         // size of the batch
};

} // namespace fl::drivers::xen_blk
