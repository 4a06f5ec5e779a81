// Hyper-V's dynamic memory channel [hv-dm]; also provided by QEMU's hv-balloon. The protocol is in
// drivers.hv_balloon.balloon.
export module drivers.hv_balloon;
import core.std;
import core.result;
import core.time;
import core.dma;
import io.executor;
import io.task;
import hv.hyperv;
import drivers.driver;
export import drivers.hv_balloon.balloon;

export namespace fl::drivers::hv_balloon {

inline constexpr std::string_view driver_name = "hv_balloon";

/// The device with its channel. Lives until machine shutdown.
class Device final : private Link {
  public:
    static constexpr u32 ring_bytes = 16 * 1024; // of packets, in each direction
    static constexpr Nanoseconds report_interval = 1'000'000'000;

    Device(Environment& environment, hv::hyperv::Vmbus& bus, const Memory& memory)
        : environment_(environment), bus_(bus), balloon_(*this, memory), tasks_(environment.executor) {}
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    /// Opens the channel and negotiates version and capabilities; the host's messages are answered from then on.
    io::Task<Result<void>> connect(hv::hyperv::Offer offer);
    const Balloon& balloon() const { return balloon_; }
    /// The channel is closed, and the bus holds no reference to it.
    bool closed() const { return !channel_.is_open(); }

  private:
    Result<void> send(std::span<const std::byte> message, u32 transaction) override;
    Result<void> take_all();
    io::Task<Result<void>> serve();
    io::Task<Result<void>> close();

    Environment environment_;
    hv::hyperv::Vmbus& bus_;
    Balloon balloon_;
    hv::hyperv::Channel channel_;
    std::optional<hv::hyperv::Inbox> inbox_;
    io::TaskGroup tasks_; // destroyed before what it uses
};

/// Connects one device, which then lives until machine shutdown.
io::Task<Result<void>> probe(Environment& environment, hv::HyperV::Bus& bus, const hv::SyntheticDevice& device,
                             const Memory& memory);
/// The same for a bus without its backend; the device is kept and returned.
io::Task<Result<Device*>> attach(Environment& environment, hv::hyperv::Vmbus& bus, hv::hyperv::Offer offer,
                                 const Memory& memory);

} // namespace fl::drivers::hv_balloon
