// One IPv4 address on one network device: answers ARP and pings, sends packets by way of the table of neighbours, and
// gives UDP datagrams to sockets. Everything runs on the executor of the device's first lane; frames of other lanes are
// copied there [io.net.lanes]. Nothing is allocated per packet, and each packet that is not used is counted by reason
// [io.net.drop]. Lengths and addresses that a peer or the host supplies are checked in the driver's private copy.
export module io.net.interface;
import core.std;
import core.processor;
import core.result;
import core.time;
import io.executor;
import io.latch;
import io.net;
import io.net.arp;
import io.net.datagram_queue;
import io.net.drop;
import io.net.ethernet;
import io.net.icmp;
import io.net.ipv4;
import io.net.lanes;
import io.net.udp;
import io.net.wire;
import io.random;
import io.task;

export namespace fl::io::net {

class Interface;
class UdpSocket;

/// A packet that a coroutine sends: co_await it -> Result<void>. Lives in the frame of the waiting coroutine, which
/// continues when the packet has been copied into the device's ring; destroying it withdraws a packet not yet sent.
class [[nodiscard]] PacketSend : Executor::Timer {
  public:
    /// Of an ICMP echo request the ports are identifier and sequence. `body` must stay valid until the coroutine
    /// continues. `bound`: for the neighbour's answer to ARP and for room in the ring together.
    PacketSend(Interface& interface, UdpSocket* socket, Protocol protocol, u16 from, Endpoint to,
               std::span<const std::byte> body, Nanoseconds bound)
        : interface_(interface), socket_(socket), to_(to), body_(body), length_(bound), from_(from),
          protocol_(protocol) {}
    PacketSend(const PacketSend&) = delete;
    PacketSend& operator=(const PacketSend&) = delete;
    ~PacketSend();
    bool await_ready();
    void await_suspend(std::coroutine_handle<> h);
    Result<void> await_resume();

  private:
    friend class Interface;
    bool transmit(const MacAddress& mac, Nanoseconds bound);
    void resolved(const MacAddress& mac);
    void failed(const Error& error);

    Interface& interface_;
    UdpSocket* socket_;
    Endpoint to_;
    std::span<const std::byte> body_;
    Nanoseconds length_;
    u16 from_;
    Protocol protocol_;
    Checksum checksum_ = Checksum::unknown;
    std::array<std::byte, ethernet_header + sizeof(Ipv4Header) + sizeof(UdpHeader)> head_{};
    std::optional<Error> error_;
    Ipv4Address next_hop_;
    bool waits_ = false;  // for next_hop_ to answer
    bool listed_ = false; // in the interface's list, from suspension to resumption
    PacketSend* next_ = nullptr;
    std::optional<NetDevice::Send> device_send_;
};

class Interface final : public FrameReceiver, public Service {
  public:
    struct Config {
        Subnet subnet;
        Ipv4Address gateway; // none(): only neighbours are reached
        friend constexpr bool operator==(const Config&, const Config&) = default;
    };
    struct Counters {
        u64 sent = 0;     // packets of sockets and echo requests
        u64 received = 0; // datagrams given to sockets, and echo replies that were awaited
        u64 arp_requests = 0;
        u64 arp_replies = 0;  // sent
        u64 echo_replies = 0; // sent
        u64 unreachables = 0; // errors sent about datagrams without a socket
        u64 errors = 0;       // errors received about packets that were sent
        u64 conflicts = 0;    // packets of another station that uses this address
        u64 answers_lost = 0; // frames of this interface's own for which there was no room, see max_held
    };
    /// Frames of the interface's own (answers, ARP) that wait while the device's ring is full, each of at most
    /// held_bytes; further and longer ones are lost. If there is no room for held_bound, all that wait are.
    static constexpr u32 max_held = 8;
    static constexpr u32 held_bytes = 1500 + ethernet_header;
    static constexpr Nanoseconds held_bound = 1'000'000'000;
    /// How many pings and datagrams without a socket are answered: a burst, then one per interval.
    static constexpr u32 answer_burst = 64;
    static constexpr Nanoseconds answer_interval = 1'000'000;
    /// Of probes for a conflict [rfc5227 §2.1.1]. Shorter than there: a virtual switch forwards at once.
    static constexpr u32 probes = 3;
    static constexpr Nanoseconds probe_interval = 200'000'000;
    /// Between two lines, and two defences, because of the same conflict [rfc5227 §1.1].
    static constexpr Nanoseconds defend_interval = 10'000'000'000;

    /// On the processor of the device's first lane. Receives from open() on. Sockets must be destroyed before.
    explicit Interface(NetDevice& device, u64 seed = 1);
    Interface(const Interface&) = delete;
    Interface& operator=(const Interface&) = delete;
    /// Without close() the memory for frames of other lanes is given up, because their processors may be writing to it.
    ~Interface();

    /// Begins to receive on all lanes of the device.
    Task<Result<void>> open();
    /// Ends that.
    Task<Result<void>> close();

    /// Whether another station uses the address: Error{busy}.
    Task<Result<void>> probe(Ipv4Address address);
    /// Uses this address from now on, and announces it.
    void configure(const Config& config);
    /// Uses no address any more. Packets that were not sent yet end with an error.
    void deconfigure();
    const std::optional<Config>& config() const { return config_; }
    Ipv4Address address() const { return config_ ? config_->subnet.address : Ipv4Address{}; }

    /// Sends an echo request of 56 bytes and waits for the answer: the time between, in elapsed nanoseconds.
    Task<Result<Nanoseconds>> ping(Ipv4Address address, u16 sequence, Nanoseconds bound);

    NetDevice& device() const { return device_; }
    const Counters& counters() const { return counters_; }
    /// Packets not used, those of other lanes included.
    DropCounters drops() const;
    void count(Drop reason) { drops_.count(reason); }
    u64 random() { return random_.next(); }

    void receive(NetDevice& lane, std::span<const std::byte> frame, Checksum checksum) override;
    void link_changed(NetDevice& lane) override;
    bool drain() override { return false; }
    void tick(Instant now) override;
    bool wants_tick() const override { return arp_.waits(); }

  private:
    friend class PacketSend;
    friend class UdpSocket;

    struct Ping {
        explicit Ping(Executor& executor) : answered(executor) {}
        Ipv4Address address;
        u16 sequence = 0;
        Instant at = 0;
        std::optional<Error> error;
        Latch answered;
        Ping* next = nullptr;
    };
    class PingInList;

    Executor& executor() const { return device_.executor(); }
    Drop process(std::span<const std::byte> frame, Checksum checksum);
    Drop take_arp(std::span<const std::byte> bytes);
    Drop take_ipv4(const EthernetHeader& ethernet, std::span<const std::byte> bytes, Checksum checksum);
    Drop take_icmp(const EthernetHeader& ethernet, const Ipv4Packet& packet);
    Drop take_udp(const EthernetHeader& ethernet, const Ipv4Packet& packet, Checksum checksum, bool to_all);
    Drop take_error(const IcmpMessage& message);
    bool may_answer();
    void send_own(const OutgoingFrame& frame);
    Task<Result<void>> send_held();
    void give_up_held();
    void answer(const MacAddress& mac, Ipv4Address to, const IcmpHeader& icmp, std::span<const std::byte> data);
    void send_arp(const MacAddress& to, ArpOperation operation, Ipv4Address sender, const MacAddress& target_mac,
                  Ipv4Address target);
    void ask(Ipv4Address address, const MacAddress& to);
    void announce();
    void conflict(const MacAddress& mac);
    /// The station to which a packet for this address goes; broadcast() for all.
    Result<Ipv4Address> next_hop(Ipv4Address to) const;
    bool is_broadcast(Ipv4Address address) const;
    void unlink(PacketSend& send);
    /// nullptr: all packets, otherwise those that wait for this neighbour.
    void end_waiting(const Ipv4Address* next_hop, const Error& error);
    UdpSocket* find_socket(u16 port) const;

    NetDevice& device_;
    SplitMix64 random_;
    std::optional<Config> config_;
    ArpTable arp_;
    Counters counters_;
    DropCounters drops_;
    PacketSend* waiting_ = nullptr; // for neighbours or for room, newest first
    UdpSocket* sockets_ = nullptr;
    Ping* pings_ = nullptr;
    u16 ping_identifier_;
    Ipv4Address probing_;
    Latch probe_conflict_;
    Instant defended_ = 0; // 0: never
    Instant answers_since_ = 0;
    u32 answers_left_ = answer_burst;
    bool opened_ = false;
    std::array<std::unique_ptr<LaneForwarder>, max_processors> forwarders_;
    struct Held {
        u32 size = 0;
        std::array<std::byte, held_bytes> bytes;
    };
    std::array<Held, max_held> held_;
    u32 held_first_ = 0; // the oldest one
    u32 held_count_ = 0;
    std::optional<TaskGroup> held_task_; // send_held(), while there are any
};

/// A UDP port of an interface. On the interface's processor.
class UdpSocket {
  public:
    struct Counters {
        u64 sent = 0;
        u64 received = 0;   // given to receive()
        u64 overflowed = 0; // dropped, because nobody received and the queue had no room
        u64 truncated = 0;  // longer than the buffer of receive()
        u64 errors = 0;     // a host said that a datagram sent to it was not delivered
    };

    /// `queue`: memory for datagrams that arrive while nobody receives; each takes DatagramQueue::overhead bytes more.
    UdpSocket(Interface& interface, std::span<std::byte> queue) : interface_(interface), queue_(queue) {}
    UdpSocket(const UdpSocket&) = delete;
    UdpSocket& operator=(const UdpSocket&) = delete;
    ~UdpSocket() { unbind(); }

    /// 0: any that is free, above 49151. Error{busy}: another socket has it.
    Result<void> bind(u16 port = 0);
    void unbind();
    u16 port() const { return port_; }
    /// Also takes datagrams to the broadcast address, and to any address while the interface has none: for DHCP.
    void accept_all() { accepts_all_ = true; }

    /// co_await -> Result<void>: copied into the device's ring. An error also if a host has said since the last call
    /// that a datagram of this socket was not delivered; nothing is sent then.
    PacketSend send_to(const Endpoint& to, std::span<const std::byte> data, Nanoseconds bound) {
        return {interface_, this, Protocol::udp, port_, to, data, bound};
    }

    struct Datagram {
        Endpoint from;
        u32 size = 0; // may be larger than the buffer, which then has the beginning
    };
    class [[nodiscard]] Receive : Executor::Timer {
      public:
        Receive(UdpSocket& socket, std::span<std::byte> buffer, Nanoseconds bound)
            : socket_(socket), buffer_(buffer), bound_(bound) {}
        Receive(const Receive&) = delete;
        Receive& operator=(const Receive&) = delete;
        ~Receive() { withdraw(); }
        bool await_ready();
        void await_suspend(std::coroutine_handle<> h);
        Result<Datagram> await_resume();

      private:
        friend class Interface;
        friend class UdpSocket;
        void withdraw();
        void end(const Result<Datagram>& result);
        UdpSocket& socket_;
        std::span<std::byte> buffer_;
        Nanoseconds bound_;
        std::optional<Result<Datagram>> result_;
    };
    /// co_await -> Result<Datagram>: the oldest datagram, or the next one. Error{timed_out} after `bound`, Error{busy}
    /// if another coroutine receives already.
    Receive receive(std::span<std::byte> buffer, Nanoseconds bound) { return {*this, buffer, bound}; }

    const Counters& counters() const { return counters_; }

  private:
    friend class Interface;
    friend class PacketSend;
    bool deliver(const Endpoint& from, std::span<const std::byte> data);
    void fail(const Error& error);

    Interface& interface_;
    DatagramQueue queue_;
    Counters counters_;
    Receive* receiver_ = nullptr;
    std::optional<Error> error_; // of a datagram that was not delivered
    Endpoint last_sent_to_;
    u16 port_ = 0; // 0: not bound
    bool accepts_all_ = false;
    UdpSocket* next_ = nullptr;
};

} // namespace fl::io::net
