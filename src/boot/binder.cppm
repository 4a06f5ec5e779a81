// Brings devices and drivers together, by the plan that the driver table gives (docs/decisions/0007-binder.md). The
// devices are those of all sources (boot.sources); the order of the drivers, and which of two drivers gets a device
// that both can reach, are the plan's; claims and lists are boot.sinks' and boot.devices'. One object for the machine's
// life.
//
// Order of the calls: unplug(), add() for each source, bind(), watch(). The rules:
//   - Drivers are tried in the plan's order, those that no rule can name (services) after all others, in the order of
//     their sources. A driver gets its devices in the order of the source, those that are `first` before the others.
//   - The first driver that matches a device has it. One that answers not_supported leaves it to the next one that
//     matches; any other error is the device's end: its state is not known, and it is listed as failed.
//   - A device that no driver takes is listed with the reason.
//   - A device that comes later is given to the drivers by the same rules, one device at a time.
// Every device is listed once, by the binder or by its driver [DeviceSink::unused].
export module boot.binder;
import core.std;
import core.result;
import core.vector;
import io.executor;
import io.shutdown;
import io.task;
import hv.backend;
import drivers.driver;
import drivers.table;
import boot.backend;
import boot.devices;
import boot.disks;
import boot.jobs;
import boot.sinks;
import boot.sources;

export namespace fl::boot {

/// What the machine gives to drivers.
class DriverMachine {
  public:
    /// For one driver; `sinks` and `shutdown` last as long as the machine.
    virtual drivers::Environment environment(DriverSinks& sinks, io::Shutdown& shutdown) = 0;

  protected:
    ~DriverMachine() = default;
};

/// Not movable, and not destroyed before the machine ends: drivers, and tasks that wait, refer to it.
class Binder {
  public:
    static constexpr usize max_sources = 8;
    /// Drivers that find a device: those of the plan, and the services.
    static constexpr usize max_drivers = drivers::Plan::max_drivers + 16;

    /// All of these must outlive this.
    Binder(io::Executor& executor, const drivers::Plan& plan, DriverMachine& machine)
        : plan_(plan), machine_(machine), attached_(plan, &devices_), shutdown_(executor), keeper_(executor) {}
    Binder(const Binder&) = delete;
    Binder& operator=(const Binder&) = delete;

    /// Has the host take away what the plan says, before anything is probed. Where it does not, the twins' drivers
    /// decide as with `leave`: a warning.
    void unplug(Backend& backend);
    /// A source whose devices are found; it lasts as long as the machine. Order: the order in which devices without a
    /// driver are listed.
    void add(DeviceSource& source);
    /// Offers all devices of all sources to the drivers, and reports what was left out. Error{exhausted}: no coroutine
    /// frames.
    io::Task<Result<void>> bind();
    /// From now on devices that come later are offered, too, until an end of the machine is asked for.
    void watch();

    Devices& devices() { return devices_; }
    const Disks& disks() const { return attached_.disks; }
    io::Shutdown& shutdown() { return shutdown_; }
    /// What the host has taken away.
    hv::EmulatedClasses unplugged() const { return unplugged_; }

  private:
    struct Candidate {
        DeviceSource* source;
        u32 device;
        bool settled = false; // listed, or given to a driver
        std::string_view declined_by{};
        std::optional<Error> declined{}; // not_supported, by that driver
    };
    // A driver that a source has; in the order in which drivers are tried.
    struct Entry {
        DeviceSource* source;
        u32 driver;
    };
    struct Port {
        explicit Port(Attached& attached, std::string_view driver) : sinks(attached, driver) {}
        DriverSinks sinks;
        u32 given = 0; // devices
    };

    void order_drivers();
    void add_entries(std::string_view name);
    void find_candidates(Vector<Candidate>& into);
    io::Task<Result<void>> offer(std::span<Candidate> candidates);
    io::Task<Result<void>> watch_over(DeviceSource& source);
    Port* port(std::string_view driver);
    void without_port(Candidate& candidate, std::string_view driver);
    void begin(const Candidate& candidate, const Entry& entry, Port& port);
    void finish(Candidate& candidate, const Entry& entry, const Port& port, u32 before, const Result<void>& done);
    void settle(Candidate& candidate);
    void failed(Candidate& candidate, std::string_view driver, const Error& error);
    bool is_unplugged(std::string_view driver) const;
    std::span<DeviceSource* const> sources() const { return {sources_.data(), source_count_}; }

    const drivers::Plan& plan_;
    DriverMachine& machine_;
    Devices devices_;
    Attached attached_;
    io::Shutdown shutdown_;
    std::array<DeviceSource*, max_sources> sources_{};
    u32 source_count_ = 0;
    std::array<std::optional<Port>, max_drivers> ports_;
    Vector<Entry> order_;
    u32 drivers_dropped_ = 0; // no memory for their entries
    hv::EmulatedClasses unplugged_;
    io::TaskGroup keeper_; // never ended: what its tasks wait for may be in a device's hands
};

/// What of the rules was not used, as left_out records: the rules themselves are fewer than asked for, no device is
/// lost by that.
void report_left_out(const drivers::Table& table, const drivers::Plan& plan, Devices& into);

/// Of a job that has succeeded: an ERROR where a device could not be taken into use, where something was left out that
/// may be one, or where rules were malformed (`wrong_rules`) or cut off (`map_file_cut`).
void judge(Outcome& outcome, const Devices& devices, u32 wrong_rules, bool map_file_cut);

} // namespace fl::boot
