// Hyper-V's integration services as channels [hv-ic]: shutdown, heartbeat, time synchronization. The protocol is in
// drivers.hv_util.service.
export module drivers.hv_util;
import core.std;
import core.result;
import core.time;
import core.dma;
import io.executor;
import io.task;
import hv.hyperv;
import drivers.driver;
export import drivers.hv_util.service;

export namespace fl::drivers::hv_util {

inline constexpr std::string_view driver_name = "hv_util";

/// One service with its channel. Lives until machine shutdown.
class Utility {
  public:
    static constexpr u32 ring_bytes = 16 * 1024; // of packets, in each direction

    Utility(Environment& environment, hv::hyperv::Vmbus& bus, Kind kind, const hv::hyperv::ReferenceClock* reference)
        : environment_(environment), bus_(bus), reference_(reference), service_(kind), tasks_(environment.executor) {}
    Utility(const Utility&) = delete;
    Utility& operator=(const Utility&) = delete;

    /// Opens the channel; the host's messages are answered from then on.
    io::Task<Result<void>> connect(hv::hyperv::Offer offer);
    const Service& service() const { return service_; }
    /// The channel is closed, and the bus holds no reference to it.
    bool closed() const { return !channel_.is_open(); }

  private:
    io::Task<Result<void>> serve();
    Result<bool> take(std::span<std::byte> message, u64 transaction);
    io::Task<Result<void>> shut_down(std::span<std::byte> message, u64 transaction);
    Result<void> reply(std::span<const std::byte> message, u64 transaction);
    void set_clock();

    Environment environment_;
    hv::hyperv::Vmbus& bus_;
    const hv::hyperv::ReferenceClock* reference_; // nullptr: the host's time is used without correction
    Service service_;
    hv::hyperv::Channel channel_;
    std::optional<hv::hyperv::Inbox> inbox_;
    bool clock_logged_ = false;
    bool difference_logged_ = false;
    alignas(8) std::array<std::byte, hv::hyperv::Channel::receive_max> message_;
    io::TaskGroup tasks_; // destroyed before what it uses
};

/// Opens the channel of one service, selected by the device's type.
io::Task<Result<void>> probe(Environment& environment, hv::HyperV::Bus& bus, const hv::SyntheticDevice& device);
/// The same for a bus without its backend; the service is kept and returned. `reference`: clock used to correct a
/// time sent by the host for its age; may be nullptr.
io::Task<Result<Utility*>> attach(Environment& environment, hv::hyperv::Vmbus& bus, hv::hyperv::Offer offer,
                                  const hv::hyperv::ReferenceClock* reference = nullptr);

} // namespace fl::drivers::hv_util
