// The two rings of a card [8254x §3.2.6, §3.4], without policy: frames to the transmit ring, and from the receive ring.
// Independent of registers, interrupts and executors.
//
// The rings are not trusted: a descriptor is read once, with one load, and checked; addresses and indices are kept
// outside of the rings, and a received frame is copied to private memory before it is looked at.
export module drivers.e1000.queue;
import core.std;
import core.dma;
import core.result;
import io.net;
import drivers.e1000.adapter;
export import drivers.e1000.protocol;

export namespace fl::drivers::e1000 {

/// Descriptors of a ring. One of them always belongs to the driver, so that a full ring differs from an empty one.
inline constexpr u32 ring_entries = 64;
inline constexpr u32 ring_bytes = ring_entries * sizeof(Descriptor);
static_assert(ring_bytes % 128 == 0);
/// Of each descriptor: what RCTL.BSIZE says.
inline constexpr u32 buffer_bytes = 2048;
inline constexpr u32 buffers_bytes = ring_entries * buffer_bytes;

/// A ring in memory that the card reads and writes.
class DescriptorRing {
  public:
    /// `ring`: ring_bytes; `buffers`: buffers_bytes. Both must live as long as the card may access them.
    void open(DmaSpan ring, DmaSpan buffers) { ring_ = ring, buffers_ = buffers; }
    /// Acquire: what the card has written before is seen.
    u64 load(u32 entry) const { return std::atomic_ref(at(entry).word).load(std::memory_order_acquire); }
    /// Gives an entry its own buffer; the card looks at it once the tail has passed it.
    void store(u32 entry, u64 word) {
        std::atomic_ref(at(entry).address).store(buffers_.bus + entry * buffer_bytes, std::memory_order_relaxed);
        std::atomic_ref(at(entry).word).store(word, std::memory_order_relaxed);
    }
    std::byte* buffer(u32 entry) const { return buffers_.data + entry * buffer_bytes; }
    RingPlace place(u32 tail) const { return {ring_.bus, ring_bytes, tail}; }

  private:
    Descriptor& at(u32 entry) const { return reinterpret_cast<Descriptor*>(ring_.data)[entry]; }
    DmaSpan ring_;
    DmaSpan buffers_;
};

/// Frames to the card.
class Transmitter {
  public:
    void open(DmaSpan ring, DmaSpan buffers) { ring_.open(ring, buffers); }
    /// The card was reset: forgets what it had. Returns the number of frames that were in the ring.
    u32 reset();
    bool fits() const { return in_flight_ < ring_entries - 1; }
    /// Copies the frame into its buffer. Requires fits(); at most buffer_bytes. The card sees it once the tail is
    /// written.
    void send(const io::OutgoingFrame& frame);
    u32 tail() const { return tail_; }
    u32 in_flight() const { return in_flight_; }
    /// Whether the card has written back the oldest descriptor that it has.
    bool ready() const { return in_flight_ != 0 && (ring_.load(head()) & tx_done) != 0; }
    /// Takes what the card has written back. Adds the frames that were not sent to `errors`. Returns the number taken.
    u32 reap(u64& errors);
    RingPlace place() const { return ring_.place(tail_); }

  private:
    u32 head() const { return (tail_ - in_flight_) % ring_entries; }

    DescriptorRing ring_;
    u32 tail_ = 0;
    u32 in_flight_ = 0;
};

/// Frames from the card. All buffers but one are always offered.
class Receiver {
  public:
    enum class Got : u8 {
        none,
        part,    // of a frame that is longer than a buffer: it is dropped
        damaged, // complete, and to be dropped
        frame,   // complete: frame()
    };
    void open(DmaSpan ring, DmaSpan buffers) { ring_.open(ring, buffers); }
    /// The card was reset: offers all buffers anew.
    void reset();
    bool ready() const { return (ring_.load(next_) & rx_done) != 0; }
    /// Takes the next descriptor, if the card has filled it. Its buffer is offered again once the tail is written.
    /// Error{protocol}: the card says that it has written more than the buffer holds.
    Result<Got> take();
    /// After Got::frame, until the next take(): private memory.
    std::span<const std::byte> frame() const { return std::span(frame_).first(length_); }
    /// One before the next descriptor to be taken: that one stays the driver's.
    u32 tail() const { return (next_ + ring_entries - 1) % ring_entries; }
    RingPlace place() const { return ring_.place(tail()); }

  private:
    DescriptorRing ring_;
    std::array<std::byte, buffer_bytes> frame_{};
    u32 length_ = 0;
    u32 next_ = 0;
    bool part_ = false; // the descriptors of a long frame are being dropped
};

} // namespace fl::drivers::e1000
