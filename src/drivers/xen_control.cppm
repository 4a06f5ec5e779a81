// Requests of Xen's toolstack to this guest, as `xl shutdown`, `xl reboot`, `xl save` and `xl sysrq` make them: texts
// in XenStore [xenstore-paths, ~/control/*]. The guest clears a text to confirm that it has seen the request.
export module drivers.xen_control;
import core.std;
import core.processor;
import core.result;
import io.executor;
import io.latch;
import io.shutdown;
import io.task;
import hv.xen;
import drivers.driver;

export namespace fl::drivers::xen_control {

inline constexpr std::string_view driver_name = "xen_control";
/// Of the device in hv.xen.bus: every guest with a directory "control" has one.
inline constexpr std::string_view device_type = "control";

/// Stops the other processors in a post each, for as long as the suspension takes.
class Parked final : public hv::Parking {
  public:
    explicit Parked(Environment& environment) : environment_(environment) {}
    io::Task<Result<void>> park() override;
    void release() override;

  private:
    /// Outlives the suspension, if the processor takes it only afterwards.
    struct Stop : io::Post {
        Parked* parked = nullptr;
        u64 suspension = 0; // its number, from 1
    };
    static void stop(io::Post& post);

    Environment& environment_;
    std::array<Stop, max_processors> stops_{};
    // acquire and release: what a processor did before it stopped is visible here, and what was done meanwhile there
    std::atomic<u32> stopped_{0};  // in all suspensions so far
    u32 sent_ = 0;                 // likewise
    std::atomic<u64> released_{0}; // suspensions that are over
};

/// Lives until machine shutdown.
class Control {
  public:
    Control(Environment& environment, hv::Xen& xen);
    Control(const Control&) = delete;
    Control& operator=(const Control&) = delete;

    /// Announces what this guest can do, and reacts to requests from then on. Without Environment::shutdown it
    /// announces nothing.
    io::Task<Result<void>> connect();
    /// Removes the watches. For tests: must be awaited before destruction once connect() has succeeded.
    io::Task<Result<void>> disconnect();

  private:
    /// How a request is answered.
    enum class Confirmed : u8 {
        no,       // there is none (any more)
        yes,      // its text has been cleared
        not_ours, // unknown to this guest: the text stays, and the toolstack's own bound ends its wait
    };
    io::Task<Result<void>> announce();
    io::Task<Result<void>> suspend();
    io::Task<Result<void>> serve();
    io::Task<Result<void>> shut_down();
    io::Task<Result<void>> take_key();
    io::Task<Result<Confirmed>> confirm(std::string_view path, std::span<char> into, std::string_view& request,
                                        bool (*known)(std::string_view request));

    Environment environment_;
    hv::Xen& xen_;
    hv::xen::Store& store_;
    Parked parked_;
    io::Latch changed_;
    hv::xen::Watch shutdown_;
    hv::xen::Watch sysrq_;
    io::TaskGroup tasks_; // destroyed before what it uses
};

io::Task<Result<void>> probe(Environment& environment, hv::Xen& xen, const hv::SyntheticDevice& device);

} // namespace fl::drivers::xen_control
