// The two rings of one queue [xen-netif], without policy: frames to the transmit ring, and the answers; buffers to the
// receive ring, and frames from it. Independent of XenStore, events and executors.
//
// The rings are not trusted: each response is copied out once and checked, state is kept outside of the rings, and a
// received frame is copied to private memory before it is looked at. A violation of the interface is an
// Error{protocol}, after which the queue must not be used; a frame that is damaged is only dropped.
export module drivers.xen_net.queue;
import core.std;
import core.result;
import core.dma;
import io.net;
import io.ring;
import io.slots;
import hv.xen.grants;
export import drivers.xen_net.protocol;
export import drivers.xen_net.pages;

export namespace fl::drivers::xen_net {

namespace detail {
using Requests = io::Producer<io::MappedMemory, io::FreeRunning<u32>, io::ReachedEvent>;
using Responses = io::Consumer<io::MappedMemory, io::FreeRunning<u32>, io::ReachedEvent>;

/// The two directions of one ring.
struct Ring {
    std::optional<Requests> requests;
    std::optional<Responses> responses;

    /// Lays out an empty ring in `page` (zeroed, not yet shared).
    Result<void> lay_out(DmaSpan page, u32 slot_bytes);
};
} // namespace detail

/// Frames to the back end. A slot is a page, and its number the page's.
class Transmitter {
  public:
    static constexpr u32 max_slots = 64;
    static constexpr u32 least_slots = 32; // a longest frame, and others
    static_assert(least_slots >= max_frame_slots);

    explicit Transmitter(hv::xen::Grants& grants) : pages_(grants) {}
    /// `ring`: a zeroed page. Before the functions below; again, for another ring, once the pages have been reclaimed:
    /// frames without an answer are forgotten.
    Result<void> open(DmaSpan ring, hv::xen::Domain domain, DmaAllocator& dma);
    Pages& pages() { return pages_; }

    /// Whether there is room for a frame of `bytes` now.
    inline bool fits(usize bytes) const { return slots_.capacity() - slots_.size() >= slots_for(bytes); }
    static constexpr u32 slots_for(usize bytes) { return static_cast<u32>((bytes + buffer_bytes - 1) / buffer_bytes); }
    /// Copies the frame into pages and the ring, not visible to the back end before publish(). Requires fits(); at most
    /// longest_frame bytes, at least one. `flags`: of the first slot.
    void send(const io::OutgoingFrame& frame, u16 flags);
    /// True: the back end asks to be notified.
    [[nodiscard]] bool publish() { return ring_.requests->publish(); }
    /// Takes the answers that are there, and frees their slots. Adds the frames that were not sent to `errors`. Returns
    /// the number of answers.
    Result<u32> reap(u64& errors);
    /// Slots that the back end holds.
    inline u32 owed() const { return ring_.requests->owed(); }
    /// Requests an event after `count` further answers. True: there are answers now.
    Result<bool> arm(u32 count) { return ring_.responses->arm(std::min(count, owed()), owed()); }

  private:
    struct Slot {
        u32 frame = 0; // a number of its frame, to count an error once
    };
    using Slots = io::SlotTable<Slot, max_slots>;
    /// The wire's 16 bits hold the slot and the low bits of its generation.
    static constexpr u16 wire_id(Slots::Id id) { return static_cast<u16>(Slots::slot_of(id) | (id >> 16) * max_slots); }

    detail::Ring ring_;
    Pages pages_;
    Slots slots_;
    u32 frame_ = 0;
    u32 failed_frame_ = 0; // the last one whose error was counted
};

/// Frames from the back end. All buffers are always offered, in the same order: request and response number n are in
/// page n modulo their number, and n is the request's id.
class Receiver {
  public:
    static constexpr u32 max_buffers = 128;
    /// More than the slots of one frame: a back end waits until a whole frame fits.
    static constexpr u32 least_buffers = 32;
    static_assert(least_buffers >= max_frame_slots + max_extras);

    enum class Got : u8 {
        part,    // of a frame
        frame,   // complete: frame(), checksum()
        damaged, // complete, and to be dropped
    };

    explicit Receiver(hv::xen::Grants& grants) : pages_(grants) {}
    /// `ring`: a zeroed page. `longest`: bytes of the longest frame to be taken. Offers all buffers. Before the
    /// functions below; again, for another ring, once the pages have been reclaimed.
    Result<void> open(DmaSpan ring, hv::xen::Domain domain, DmaAllocator& dma, u32 longest);
    Pages& pages() { return pages_; }

    /// Responses to be taken now. Reads the back end's index once.
    Result<u32> available() { return ring_.responses->available(owed()); }
    /// Takes the next response; as often as available() said.
    Result<Got> take();
    /// After Got::frame, until the next take(): private memory.
    inline std::span<const std::byte> frame() const { return {frame_.data(), length_}; }
    io::Checksum checksum() const;
    /// Offers the buffers of `count` responses again, from publish() on.
    Result<void> give_back(u32 count);
    /// True: the back end asks to be notified.
    [[nodiscard]] bool publish() { return ring_.requests->publish(); }
    inline u32 owed() const { return ring_.requests->owed(); }
    /// Requests an event for the next response. True: there is one now.
    Result<bool> arm() { return ring_.responses->arm(1, owed()); }

  private:
    Result<Got> take_extra(const ExtraInfo& info);
    Result<Got> ended();

    detail::Ring ring_;
    Pages pages_;
    DmaBuffer frame_; // never granted
    u32 capacity_ = 0;
    // The frame being received.
    u32 length_ = 0;
    u32 slots_ = 0; // of data, so far
    u32 extras_ = 0;
    u16 flags_ = 0;        // of its first slot
    bool more_ = false;    // another slot of data follows
    bool extra_ = false;   // an extra info follows
    bool damaged_ = false; // it is dropped at its end
};

} // namespace fl::drivers::xen_net
