// A DHCP client for an interface [rfc2131]: gets an address, verifies that no other station uses it, and renews its
// lease. All times are machine time: while the machine is stopped the lease ends at its server, but not here.
export module io.net.dhcp_client;
import core.std;
import core.result;
import core.time;
import io.executor;
import io.net.dhcp;
import io.net.drop;
import io.net.interface;
import io.net.ipv4;
import io.net.udp;
import io.task;

export namespace fl::io::net {

/// Its buffers are too large for a coroutine frame. On the interface's processor; destroyed before the interface.
class DhcpClient {
  public:
    /// Between retransmissions: doubled from the first to the last one, each a quarter more or less at random. RFC 2131
    /// §4.1 suggests 4 s for the first one, for networks that are slower than a virtual one.
    static constexpr Nanoseconds first_delay = 1'000'000'000;
    static constexpr Nanoseconds longest_delay = 64'000'000'000;
    static constexpr u32 request_attempts = 4;                      // then it begins again with DISCOVER
    static constexpr Nanoseconds after_conflict = 10'000'000'000;   // [rfc2131 §3.1.5]
    static constexpr Nanoseconds shortest_renewal = 60'000'000'000; // between requests [rfc2131 §4.4.5]
    static constexpr Nanoseconds reacquire_bound = 300'000'000'000; // of keep(): then it is reported and tried again

    struct Counters {
        u64 sent = 0;
        u64 offers = 0; // accepted
        u64 acks = 0;
        u64 naks = 0;
        u64 declines = 0;
    };

    explicit DhcpClient(Interface& interface) : interface_(interface), socket_(interface, queue_) {}

    /// Gets an address and configures the interface. Error{timed_out}: no server gave one within `bound`.
    Task<Result<void>> acquire(Nanoseconds bound);
    /// Renews the lease in time, and gets another address when a server refuses that or the lease ends. Returns only if
    /// the device is closed, with an error. acquire() must have succeeded.
    Task<Result<void>> keep();
    /// The last one.
    const DhcpAnswer& lease() const { return lease_; }
    const Counters& counters() const { return counters_; }

  private:
    Executor& executor() const { return interface_.device().executor(); }
    Nanoseconds varied(Nanoseconds delay);
    Task<Result<void>> send(DhcpRequest request, Endpoint to, Nanoseconds bound);
    Task<Result<DhcpAnswer>> exchange(DhcpRequest request, Endpoint to, Nanoseconds delay, u32 attempts, Instant until);
    bool answers(const DhcpRequest& request, const DhcpAnswer& answer) const;
    Task<Result<bool>> renew(Endpoint to, Instant until);
    void use(const DhcpAnswer& lease);

    Interface& interface_;
    std::array<std::byte, 4096> queue_{};
    std::array<std::byte, 1472> received_{};
    DhcpMessage message_{};
    UdpSocket socket_;
    DhcpAnswer lease_;
    Instant begun_ = 0; // of the attempt to get an address
    Instant asked_ = 0; // the last request: a lease begins when it was asked for [rfc2131 §4.4.1]
    Instant leased_ = 0;
    Counters counters_;
};

} // namespace fl::io::net
