// Network devices for coroutines: co_await card.send(frame, bound) and a receiver for incoming frames. Frames are
// copied between the caller's memory and pages that belong to the driver and that the host may access for as long as
// the device is open: nothing is granted, mapped or allocated per frame, the host sees no other memory, and what a
// receiver is given cannot change any more.
export module io.net;
import core.std;
import core.result;
import core.text;
import core.time;
import io.executor;
import io.block;

export namespace fl::io {

struct MacAddress {
    std::array<u8, 6> bytes{};
    friend constexpr bool operator==(const MacAddress&, const MacAddress&) = default;
    /// Of a group of stations: multicast or broadcast.
    constexpr bool is_group() const { return (bytes[0] & 1) != 0; }
};
inline constexpr MacAddress broadcast_mac{{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}};

inline constexpr u32 ethernet_header = 14;  // bytes: destination, source, type
inline constexpr u32 ethernet_minimum = 60; // bytes, without the frame check sequence, which no driver sees

/// How a send ended.
enum class SendStatus : u8 {
    sent,        // copied into the device's ring, which is published at the end of the turn
    too_long,    // longer than the MTU permits
    too_short,   // no whole Ethernet header
    timed_out,   // no room within the bound
    device_gone, // the device was closed
    not_sent = 0xff,
};
Error to_error(SendStatus status);

/// What is known about the TCP or UDP checksum of a frame.
enum class Checksum : u8 {
    unknown,  // send: it is complete; receive: to be verified
    partial,  // it is the sum of the pseudo header only, and the frame never left the host's memory
    verified, // receive: the host has verified it
};

/// A frame to be sent, in two pieces, so that headers need not be copied in front of the data. Without padding and
/// frame check sequence.
struct OutgoingFrame {
    std::span<const std::byte> head; // begins with the whole Ethernet header
    std::span<const std::byte> body{};
    usize size() const { return head.size() + body.size(); }
};

/// Counted by the queue, never reset: read before and after. Octets are of whole frames, without frame check sequence.
struct NetCounters {
    u64 sent = 0; // frames
    u64 sent_octets = 0;
    u64 received = 0; // frames given to the receiver
    u64 received_octets = 0;
    u64 send_errors = 0;     // frames that the device reported as not sent
    u64 receive_errors = 0;  // frames that the device reported as damaged, or that violate its protocol harmlessly
    u64 device_accesses = 0; // as in Counters
    u64 hypercalls = 0;
    u64 notifications = 0;
    u64 interrupts = 0;

    friend constexpr bool operator==(const NetCounters&, const NetCounters&) = default;
    friend constexpr NetCounters operator+(const NetCounters& a, const NetCounters& b) {
        return {a.sent + b.sent,
                a.sent_octets + b.sent_octets,
                a.received + b.received,
                a.received_octets + b.received_octets,
                a.send_errors + b.send_errors,
                a.receive_errors + b.receive_errors,
                a.device_accesses + b.device_accesses,
                a.hypercalls + b.hypercalls,
                a.notifications + b.notifications,
                a.interrupts + b.interrupts};
    }
    friend constexpr NetCounters operator-(const NetCounters& a, const NetCounters& b) {
        return {a.sent - b.sent,
                a.sent_octets - b.sent_octets,
                a.received - b.received,
                a.received_octets - b.received_octets,
                a.send_errors - b.send_errors,
                a.receive_errors - b.receive_errors,
                a.device_accesses - b.device_accesses,
                a.hypercalls - b.hypercalls,
                a.notifications - b.notifications,
                a.interrupts - b.interrupts};
    }
};

class NetDevice;

/// Takes the frames that arrive on one lane of a device, on that lane's processor.
class FrameReceiver {
  public:
    /// Called from the queue's drain(). `frame`: private memory with a whole Ethernet header, valid during the call.
    /// May call send_now().
    virtual void receive(NetDevice& lane, std::span<const std::byte> frame, Checksum checksum) = 0;
    /// The host has changed NetDevice::link_up(), or the device was closed (is_open()).
    virtual void link_changed(NetDevice& lane) { static_cast<void>(lane); }

  protected:
    ~FrameReceiver() = default;
};

/// An attached network device: base of every driver's class. Owned by its driver.
class NetDevice {
  public:
    struct Identity {
        FixedText<16> name;      // "eth0"
        std::string_view driver; // "xen_net", "e1000"; static storage
        Kind kind = Kind::emulated;
        FixedText<48> model;
        FixedText<96> features; // negotiated features, space-separated
        MacAddress mac;
        u32 mtu = 1500; // bytes of an Ethernet frame after its header
    };

    NetDevice(Executor& executor) : executor_(executor) {}
    NetDevice(const NetDevice&) = delete;
    NetDevice& operator=(const NetDevice&) = delete;

    inline const Identity& identity() const { return identity_; }
    inline const NetCounters& counters() const { return counters_; }
    inline Executor& executor() const { return executor_; }
    /// Number of queues, each with a lane on another processor; lane 0 is the device itself. The host chooses the lane
    /// of an incoming frame. Constant once the device is announced.
    virtual u32 lanes() const { return 1; }
    /// index < lanes(). Valid as long as the device.
    virtual NetDevice& lane(u32 index) {
        static_cast<void>(index);
        return *this;
    }
    /// Frames of this lane go there from now on; nullptr: they are dropped. On the lane's processor.
    void set_receiver(FrameReceiver* receiver) { receiver_ = receiver; }
    /// Whether the host says that a cable is plugged in. Frames sent meanwhile are lost.
    inline bool link_up() const { return link_up_; }
    /// False: closed, after an error or because the host has removed it; for ever, unless it is a further lane, which
    /// may be without a queue of the host's for a while.
    inline bool is_open() const { return open_; }
    /// The longest frame, in bytes.
    inline u32 max_frame() const { return identity_.mtu + ethernet_header; }

    /// The awaiter returned by send(). Lives in the frame of the waiting coroutine; destroying it withdraws a frame
    /// that was not sent.
    class [[nodiscard]] Send : Executor::Timer {
      public:
        Send(NetDevice& device, const OutgoingFrame& frame, Checksum checksum, Nanoseconds bound)
            : device_(device), frame_(frame), bound_(bound), checksum_(checksum) {}
        Send(const Send&) = delete;
        Send& operator=(const Send&) = delete;
        ~Send() { withdraw(); }
        bool await_ready();
        void await_suspend(std::coroutine_handle<> h);
        SendStatus await_resume();

      private:
        friend class NetDevice;
        void withdraw();
        NetDevice& device_;
        OutgoingFrame frame_;
        Nanoseconds bound_;
        Checksum checksum_;
        SendStatus status_ = SendStatus::not_sent;
        bool queued_ = false;
        Send* next_ = nullptr;
    };

    /// To be co_awaited: copies the frame into the device's ring, after all frames sent before, once there is room. The
    /// pieces must stay valid until then. `bound`: how long to wait for room, in nanoseconds of machine time.
    /// `checksum`: `unknown` or, for IPv4 with TCP or UDP on devices that offloads_checksums(), `partial`.
    Send send(const OutgoingFrame& frame, Nanoseconds bound, Checksum checksum = Checksum::unknown) {
        return {*this, frame, checksum, bound};
    }
    /// As send() without waiting: timed_out if there is no room now, or others wait for it.
    SendStatus send_now(const OutgoingFrame& frame, Checksum checksum = Checksum::unknown);
    /// Whether the device completes partial checksums.
    inline bool offloads_checksums() const { return offloads_checksums_; }

  protected:
    ~NetDevice();

    /// Implemented by the driver: copies a frame of valid length into its ring, and touches its service. False: there
    /// is no room; the driver calls room() when there is.
    virtual bool start(const OutgoingFrame& frame, Checksum checksum) = 0;
    /// There is room again: sends what waits. Not from start().
    void room();
    /// Gives a frame to the receiver, and counts it.
    void deliver(std::span<const std::byte> frame, Checksum checksum);
    void set_link(bool up);
    /// Whether a frame waits for room: the driver then has to call room() when there is some.
    inline bool waits_for_room() const { return first_ != nullptr; }
    inline bool has_receiver() const { return receiver_ != nullptr; }
    /// Opened at the end of set-up; closed once: everything that waits ends with device_gone.
    void set_open(bool open);

    Identity identity_;
    NetCounters counters_;
    bool offloads_checksums_ = false;

  private:
    SendStatus try_send(const OutgoingFrame& frame, Checksum checksum);

    Executor& executor_;
    FrameReceiver* receiver_ = nullptr;
    Send* first_ = nullptr; // waiting for room, oldest first
    Send* last_ = nullptr;
    bool link_up_ = true;
    bool open_ = false;
};

} // namespace fl::io
