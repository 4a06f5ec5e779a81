// The host's end of one open channel: two byte rings over the pages of a GPADL, packets in and out; and the interface
// between a device and the bus. The guest may change its pages at any time: everything is copied out once, checked, and
// then used.
export module host.channel;
import host.std;
import core.result;
import io.ring;
export import host.platform;
export import host.faults;

export namespace fl::host {

/// 16 bytes in wire order.
using Guid = std::array<u8, 16>;
void malformed_guid(); // never called: a use in a constant expression makes it ill-formed
/// From "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f": the first three groups are little-endian numbers. Constants only: a
/// malformed text does not compile.
consteval Guid guid(std::string_view text) {
    constexpr std::array<u8, 16> places{3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15};
    Guid result{};
    usize digits = 0;
    for (const char c : text) {
        if (c == '-') {
            continue;
        }
        const int value = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : (malformed_guid(), 0);
        u8& byte = result[places[digits / 2]];
        byte = static_cast<u8>(byte << 4 | value);
        ++digits;
    }
    if (digits != 32) {
        malformed_guid();
    }
    return result;
}

/// Pages of guest memory as one ring's memory: a header page followed by the data area. Models io::RingMemory. Does not
/// own the list.
class PagedMemory {
  public:
    PagedMemory() = default;
    /// `pages`: host addresses, none null. If they are contiguous, each copy is a single one.
    explicit PagedMemory(std::span<std::byte* const> pages)
        : pages_(pages.data()), size_(pages.size() * 4096), flat_(true) {
        for (usize i = 1; i < pages.size(); ++i) {
            flat_ = flat_ && pages[i] == pages[0] + i * 4096;
        }
    }
    usize size() const { return size_; }
    template <class W>
    W load_relaxed(usize offset) const {
        return std::atomic_ref<W>(word<W>(offset)).load(std::memory_order_relaxed);
    }
    template <class W>
    W load_acquire(usize offset) const {
        return std::atomic_ref<W>(word<W>(offset)).load(std::memory_order_acquire);
    }
    template <class W>
    void store_relaxed(usize offset, W value) {
        std::atomic_ref<W>(word<W>(offset)).store(value, std::memory_order_relaxed);
    }
    template <class W>
    void store_release(usize offset, W value) {
        std::atomic_ref<W>(word<W>(offset)).store(value, std::memory_order_release);
    }
    void full_barrier() const { std::atomic_thread_fence(std::memory_order_seq_cst); }
    void copy_out(usize offset, std::byte* into, usize count) const {
        while (count != 0) {
            const usize now = piece(offset, count);
            std::memcpy(into, at(offset), now);
            into += now, offset += now, count -= now;
        }
    }
    void copy_in(usize offset, const std::byte* from, usize count) {
        while (count != 0) {
            const usize now = piece(offset, count);
            std::memcpy(at(offset), from, now);
            from += now, offset += now, count -= now;
        }
    }

  private:
    usize piece(usize offset, usize count) const { return flat_ ? count : std::min(count, 4096 - offset % 4096); }
    std::byte* at(usize offset) const { return pages_[offset / 4096] + offset % 4096; }
    template <class W>
    W& word(usize offset) const {
        return *reinterpret_cast<W*>(at(offset));
    }
    std::byte* const* pages_ = nullptr;
    usize size_ = 0;
    bool flat_ = false;
};
static_assert(io::RingMemory<PagedMemory>);

/// Words of a ring's header page [vmbus "struct hv_ring_buffer"].
inline constexpr usize ring_write_index = 0;
inline constexpr usize ring_read_index = 4;
inline constexpr usize ring_interrupt_mask = 8;
inline constexpr usize ring_pending_send = 12;
inline constexpr usize ring_features = 64;
inline constexpr u32 feature_pending_send = 1;

/// Packet types [vmbus "enum vmbus_packet_type"]; a guest that violates the protocol may send others.
enum class PacketType : u16 { data_inband = 6, data_gpa_direct = 9, completion = 0xb };
inline constexpr u16 packet_completion_requested = 1;

/// One packet out of the guest's ring. The spans are the channel's own copy and last until the next receive().
struct Packet {
    PacketType type;
    u16 flags;
    u64 transaction;
    u32 range_count; // data_gpa_direct: ranges in `ranges`
    // { u32 bytes, u32 offset, u64 frames[] } each; the lengths are checked, the contents are not
    std::span<const std::byte> ranges;
    std::span<const std::byte> payload; // padded to 8 bytes
    bool wants_completion() const { return (flags & packet_completion_requested) != 0; }
};

class Device;
class Channel;

/// Services of the bus for its devices. Implemented by the server.
class Bus {
  public:
    virtual ~Bus() = default;
    virtual GuestMemory& memory() = 0;
    virtual Judge& judge() = 0;
    virtual Counters& counters() = 0;
    virtual FaultPlan& faults() = 0;
    /// Time of this turn in nanoseconds: the argument of Server::poll().
    virtual u64 now() const = 0;
    virtual u64 heartbeat_interval() const = 0;
    virtual u64 time_sync_interval() const = 0;
    /// Signals the channel's guest that there are packets or room. `always`: raises an interrupt even if the event flag
    /// is already set.
    virtual void interrupt(Channel& channel, bool always = false) = 0;
    /// Offers sub-channels 1..count of the device.
    virtual void offer_sub_channels(Device& device, u16 count) = 0;
    /// Rescinds the device's channels after the current serve(); the server destroys the device later.
    virtual void rescind(Device& device) = 0;
    /// Calls serve() for the device's open channels in this turn or the next.
    virtual void kick(Device& device) = 0;
    /// The same for one open channel.
    virtual void kick(Channel& channel) = 0;
};

class Channel {
  public:
    /// `pages`: the GPADL's, host addresses; the guest's ring is the first `downstream` of them, the host's the rest.
    static Result<Channel> create(Bus& bus, u32 relid, u32 vp, u16 index, std::vector<std::byte*> pages,
                                  u32 downstream);

    u32 relid() const { return relid_; }
    u32 target_vp() const { return vp_; }
    void retarget(u32 vp) { vp_ = vp; }
    /// 0: the device's first channel.
    u16 index() const { return index_; }
    /// The guest has violated the ring protocol: nothing is read until the channel is closed and reopened.
    bool broken() const { return broken_; }

    /// Begins a turn: sets the interrupt mask, so that the guest need not signal while it lasts, if the ring has more
    /// than one page.
    void begin();
    /// The next packet; nullopt: the ring is empty, or broken.
    std::optional<Packet> receive();
    /// Whether a packet with `payload` bytes fits now. False: requests a signal from the guest when it does; the device
    /// waits for its next serve().
    bool room(usize payload);
    /// Writes a packet, which finish() publishes. False: no room. `target`: an injected fault may modify this packet.
    bool send(PacketType type, u16 flags, u64 transaction, std::span<const std::byte> payload, bool target = false);
    /// Ends a turn: publishes the packets sent with one store of the index and at most one interrupt, and the read
    /// index with another store. True: more packets have arrived.
    bool finish();

    /// The device waits for room, and this guest does not signal when room becomes available: the ring must be polled.
    bool must_poll() const {
        return waiting_ != 0 && (in_memory_.load_relaxed<u32>(ring_features) & feature_pending_send) == 0;
    }
    bool waiting() const { return waiting_ != 0; }

    /// Injected fault: number of interrupts without a cause still to be raised.
    u32 storm = 0;

  private:
    using Memory = PagedMemory;
    using In = io::Consumer<Memory, io::Wrapped<u32>, io::EmptyToNonEmpty>;
    using Out = io::Producer<Memory, io::Wrapped<u32>, io::EmptyToNonEmpty>;
    Channel(Bus& bus, u32 relid, u32 vp, u16 index, std::unique_ptr<std::vector<std::byte*>> pages, Memory in_memory,
            Memory out_memory, In in, Out out)
        : bus_(&bus), relid_(relid), vp_(vp), index_(index), pages_(std::move(pages)), in_memory_(in_memory),
          out_memory_(out_memory), in_(in), out_(out), buffer_(new std::array<std::byte, buffer_bytes>) {}
    std::optional<Packet> give_up(const char* what, u64 expected, u64 seen);
    void publish();
    void break_after_publishing();

    static constexpr usize buffer_bytes = 16384; // the longest packet accepted

    Bus* bus_;
    u32 relid_;
    u32 vp_;
    u16 index_;
    bool broken_ = false;
    bool target_sent_ = false;     // since the last publish()
    bool read_index_lost_ = false; // injected fault: the word in the ring is not updated
    u32 taken_ = 0;                // bytes read since the last release
    std::unique_ptr<std::vector<std::byte*>> pages_;
    Memory in_memory_;
    Memory out_memory_;
    In in_;
    Out out_;
    std::unique_ptr<std::array<std::byte, buffer_bytes>> buffer_;
    u32 last_at_ = 0;    // offset of the last target packet in the ring
    u32 last_bytes_ = 0; // its length in bytes, without the trailer
    u32 waiting_ = 0;    // bytes of room that the device waits for; 0: none
};

struct DeviceOffer {
    Guid type;
    Guid instance;
    u16 flags = 1;              // CHANNEL_ENUMERATE_DEVICE_INTERFACE
    std::array<u8, 120> user{}; // class-specific; for a pipe, the mode comes first
    u16 sub_channels = 0;       // upper limit
};

/// A device, which serves its channels.
class Device {
  public:
    virtual ~Device() = default;
    virtual DeviceOffer offer() const = 0;
    virtual std::string_view name() const = 0;
    /// Called once, when the device is added to the server.
    virtual void attached(Bus& bus) { static_cast<void>(bus); }
    virtual void opened(Channel& channel) { static_cast<void>(channel); }
    /// The guest closed it, or the machine was reset. The channel must not be used any more.
    virtual void closed(Channel& channel) { static_cast<void>(channel); }
    /// There may be packets to read, or room for packets that wait. Called repeatedly while it returns true.
    virtual bool serve(Channel& channel) = 0;
    /// Whether the device needs tick(), which is then also called after each serve().
    virtual bool timed() const { return false; }
    /// Does what is due at `now` (nanoseconds). Returns the time of the next call; ~0: none.
    virtual u64 tick(Channel& channel, u64 now) {
        static_cast<void>(channel);
        static_cast<void>(now);
        return ~u64{0};
    }
};

} // namespace fl::host
