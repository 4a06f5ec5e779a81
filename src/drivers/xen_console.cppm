// Input of the guest's console, to which `xl console` connects [xen-public io/console.h]: Ctrl-C ends the machine in
// order, as `xl shutdown` does; everything else is taken and ignored. The output is in hv.xen.console.
export module drivers.xen_console;
import core.std;
import core.result;
import io.executor;
import io.task;
import hv.xen;
import drivers.driver;

export namespace fl::drivers::xen_console {

inline constexpr std::string_view driver_name = "xen_console";
/// Of the device in hv.xen: every guest with a console has one.
inline constexpr std::string_view device_type = "console";

/// Lives until machine shutdown.
class Console final : public io::Service, public hv::xen::BusDevice {
  public:
    Console(Environment& environment, hv::Xen& xen);
    ~Console();

    /// Reacts to what is typed from then on. Error{not_supported}: there is no console, or nothing here can shut the
    /// machine down.
    Result<void> connect();

    // io::Service
    bool drain() override;
    bool wants_tick() const override { return false; }
    // hv::xen::BusDevice
    bool holds_grants() const override { return false; }
    io::Task<Result<void>> pause() override { co_return Result<void>{}; }
    void lost() override {}
    void resumed(bool moved) override;

  private:
    static constexpr char interrupt_key = 3; // Ctrl-C

    static void on_event(void* self);
    void type(std::string_view text);
    io::Task<Result<void>> shut_down();

    Environment environment_;
    hv::Xen& xen_;
    hv::xen::ConsoleInput input_;
    bool bound_ = false;
    io::TaskGroup tasks_; // destroyed before what it uses
};

io::Task<Result<void>> probe(Environment& environment, hv::Xen& xen, const hv::SyntheticDevice& device);

} // namespace fl::drivers::xen_console
