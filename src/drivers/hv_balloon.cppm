// Hyper-V's dynamic memory as a channel [hv-dm]; QEMU's hv-balloon is a peer too. What is said is
// drivers.hv_balloon.balloon's.
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

/// The device with its channel. Lives until the machine ends.
class Device final : private Link {
  public:
    static constexpr u32 ring_bytes = 16 * 1024; // of packets, each direction
    static constexpr Nanoseconds report_interval = 1'000'000'000;

    Device(Environment& environment, hv::hyperv::Vmbus& bus, const Memory& memory)
        : environment_(environment), bus_(bus), balloon_(*this, memory), keeper_(environment.executor) {}
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    /// Opens the channel and agrees on a version and on capabilities; from then on the host is answered.
    io::Task<Result<void>> connect(hv::hyperv::Offer offer);
    const Balloon& balloon() const { return balloon_; }
    /// The bus knows nothing of its channel.
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
    io::TaskGroup keeper_; // ends before what it uses
};

io::Task<Result<void>> probe(Environment& environment, hv::HyperV::Bus& bus, const hv::SyntheticDevice& device,
                             const Memory& memory);
/// The same for a bus without its backend; the device stays, and is given.
io::Task<Result<Device*>> attach(Environment& environment, hv::hyperv::Vmbus& bus, hv::hyperv::Offer offer,
                                 const Memory& memory);

} // namespace fl::drivers::hv_balloon
