// The driver for Xen's virtual network interfaces [xen-netif]: matching, the handshake with the back end, announcing,
// and back end disconnection. The rings are in drivers.xen_net.queue, the card is drivers.xen_net.device.
//
// A card whose back end leaves the connection, without being removed, is connected again: frames in its rings are lost,
// and others wait for room meanwhile. If there are fewer queues than lanes then, the last lanes are closed until a
// later connection has queues for them. A card that the toolstack removes ends; added again, it is the same Vif.
//
// The handshake: back end init-wait → we publish rings, event channels and features → connected → back end connected.
// Each lane has a queue: one pair of rings and one event channel, which serves both directions, so that a turn needs
// one notification and an upcall serves both.
export module drivers.xen_net;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import io.executor;
import io.latch;
import io.net;
import io.task;
import hv.xen;
import drivers.driver;
export import drivers.xen_net.device;

export namespace fl::drivers::xen_net {

inline constexpr std::string_view driver_name = "xen_net";

/// Virtual network interfaces, by the type's bus name.
struct Match {
    std::string_view type;
};
inline constexpr Match ids[] = {{"vif"}};
constexpr bool matches(const hv::SyntheticDevice& device) {
    return std::ranges::any_of(ids, [&](const Match& m) { return m.type == device.type.view(); });
}

/// "00:16:3e:01:02:03": six hexadecimal numbers of two digits. Nothing: not that, a group address, or all zero.
std::optional<io::MacAddress> parse_mac(std::string_view text);

/// One device with its connection. Lives until machine shutdown once its card has been announced.
class Vif final : public hv::xen::BusDevice {
  public:
    Vif(Environment& environment, hv::Xen& xen, const hv::SyntheticDevice& device);
    ~Vif();

    /// The handshake up to state connected; starts the lanes.
    io::Task<Result<void>> connect();
    /// Starts watching the back end: a card whose back end is removed or violates the interface is closed and removed
    /// from the bus.
    Result<void> keep();
    /// Stops the lanes and disconnects from the bus; every wait is bounded.
    io::Task<Result<void>> disconnect();
    /// As drivers.xen_blk Vbd::await_end().
    io::Task<Result<bool>> await_end();
    io::NetDevice& card() { return *lanes_.all[0]; }

    // hv::xen::BusDevice
    bool holds_grants() const override { return !ended_ || lost_; }
    io::Task<Result<void>> pause() override { co_return Result<void>{}; } // frames may be lost
    void lost() override;
    void resumed(bool moved) override;

  private:
    static constexpr u32 ring_bytes = 2 * static_cast<u32>(page_size); // of one lane
    static constexpr u32 entries_of_lane = 3;
    static constexpr Nanoseconds retry_pause = 20'000'000;

    /// One pair of rings and what belongs to it.
    struct Connection {
        hv::xen::Port port = hv::xen::Port::none;
        DmaBuffer rings;
        std::array<hv::xen::GrantRef, 2> grants{}; // of the transmit and the receive ring
        bool granted = false;
    };
    /// Raised by a lane that has closed itself, on any processor.
    struct Alarm final : io::Service {
        explicit Alarm(hv::xen::Frontend& f) : front(f) {}
        bool drain() override {
            if (raised.exchange(false, std::memory_order_acquire)) { // pairs with the release in Vif::on_failure()
                front.notify();
                return true;
            }
            return false;
        }
        bool wants_tick() const override { return false; }
        hv::xen::Frontend& front;
        std::atomic<bool> raised{false};
    };

    io::Task<Result<void>> shake_hands();
    Result<void> make_lanes();
    io::Task<Result<void>> start_lanes();
    io::Task<Result<void>> hold_lanes();
    io::Task<Result<void>> follow();
    io::Task<Result<void>> connect_again();
    io::Task<Result<bool>> release();
    void forget_connection(bool released);
    void report_in_use() const;
    io::Task<Result<void>> read_identity();
    io::Task<Result<void>> read_features();
    io::Task<Result<void>> read_mtu();
    Result<void> make_lane(u32 number);
    void name_features();
    io::Task<Result<void>> publish();
    io::Task<Result<void>> withdraw_keys();
    void publish_lane(std::string_view prefix, const Connection& connection);
    void free_connection(Connection& connection, bool released);
    void add_entry(std::string_view prefix, std::string_view key, u64 value);
    io::Executor& executor(u32 lane) const { return lane == 0 ? environment_.executor : *environment_.executors[lane]; }

    Environment environment_; // a copy: the objects it refers to outlive this, the Environment itself may not
    hv::Xen& xen_;
    hv::xen::Frontend front_;
    Lanes lanes_;
    std::array<Connection, Lanes::max_lanes> connections_;
    io::NetDevice::Identity identity_;
    FixedText<12> address_;     // on the bus
    u32 card_number_ = no_twin; // see NetSink
    u32 wanted_lanes_ = 1;
    u32 queues_ = 0;            // of the connection: those of the first lanes
    u32 published_queues_ = 0;  // of the last connection whose keys are in XenStore
    bool knows_queues_ = false; // the back end says how many queues it serves
    bool scatter_ = false;
    bool offloads_checksums_ = false;
    bool begun_ = false; // the back end may have seen us
    bool ended_ = false; // disconnected; may be connected again unless `lost_`
    bool lost_ = false;  // a back end has kept pages of the card
    bool moved_ = false; // to another domain: it has to be connected again
    std::array<hv::xen::StoreEntry, Lanes::max_lanes * entries_of_lane + 6> entries_{};
    u32 entry_count_ = 0;
    Alarm alarm_;
    io::Latch end_;
    io::TaskGroup tasks_;
    friend io::Task<Result<void>> probe(Environment&, hv::Xen&, const hv::SyntheticDevice&);
    Vif* next_ = nullptr; // list of attached devices, for as long as the machine
};

/// Connects and announces one device. Success: attached, or left alone (another driver has the card).
io::Task<Result<void>> probe(Environment& environment, hv::Xen& xen, const hv::SyntheticDevice& device);

} // namespace fl::drivers::xen_net
