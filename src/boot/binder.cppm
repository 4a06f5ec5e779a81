// Matches devices to drivers according to the driver table's plan (docs/decisions/0007-binder.md). Devices come from
// the sources (boot.sources). The plan decides the order of the drivers, and which of two drivers gets a device that
// both can reach. boot.sinks handles claims, boot.devices the listing. One instance for the machine's lifetime.
//
// Call order: unplug(), add() for each source, bind(), watch(). The rules:
//   - Drivers are tried in the plan's order. Drivers that no rule can name (services) follow, in the order of their
//     sources. A driver is given its devices in source order, `first` devices before the others.
//   - The first matching driver gets the device. If it returns not_supported, the next matching driver is tried. Any
//     other error is final: the device's state is unknown, and it is listed as failed.
//   - A device that no driver takes is listed with the reason.
//   - A hot-added device is offered by the same rules, one device at a time.
// Every device is listed exactly once, by the binder or by its driver [DeviceSink::unused].
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
import boot.nets;
import boot.sinks;
import boot.sources;

export namespace fl::boot {

/// Provides the environment in which drivers run.
class DriverMachine {
  public:
    /// The environment for one driver; `sinks` and `shutdown` live as long as the machine.
    virtual drivers::Environment environment(DriverSinks& sinks, io::Shutdown& shutdown) = 0;
    /// One executor per running processor, as in Environment; empty: single processor.
    virtual std::span<io::Executor* const> executors() { return {}; }

  protected:
    ~DriverMachine() = default;
};

/// Neither movable nor destroyed before the machine ends: drivers and waiting tasks refer to it.
class Binder {
  public:
    static constexpr usize max_sources = 8;
    /// Drivers that find a device: those in the plan and the services.
    static constexpr usize max_drivers = drivers::Plan::max_drivers + 16;

    /// All of these must outlive this.
    Binder(io::Executor& executor, const drivers::Plan& plan, DriverMachine& machine)
        : plan_(plan), machine_(machine), attached_(plan, &devices_), shutdown_(executor), tasks_(executor) {
        attached_.executors = machine.executors();
    }
    Binder(const Binder&) = delete;
    Binder& operator=(const Binder&) = delete;

    /// Asks the host to unplug the emulated devices that the plan names, before anything is probed. If the host does
    /// not comply, logs a warning, and the twins' drivers decide as with `leave`.
    void unplug(Backend& backend);
    /// Adds a source whose devices have been enumerated; it must live as long as the machine. Devices without a driver
    /// are listed in the order of these calls.
    void add(DeviceSource& source);
    /// Offers the devices of all sources to the drivers and reports what was left out. Error{exhausted}: no coroutine
    /// frames.
    io::Task<Result<void>> bind();
    /// Starts offering hot-added devices, until a shutdown is requested.
    void watch();

    Devices& devices() { return devices_; }
    const Disks& disks() const { return attached_.disks; }
    const Nets& nets() const { return attached_.nets; }
    io::Shutdown& shutdown() { return shutdown_; }
    /// The emulated devices that the host has unplugged.
    hv::EmulatedClasses unplugged() const { return unplugged_; }

  private:
    struct Candidate {
        DeviceSource* source;
        u32 device;
        bool settled = false; // listed, or given to a driver
        std::string_view declined_by{};
        std::optional<Error> declined{}; // not_supported, by that driver
    };
    // One driver of one source. order_ holds these in the order in which drivers are tried.
    struct Entry {
        DeviceSource* source;
        u32 driver;
    };
    struct DriverState {
        explicit DriverState(Attached& attached, std::string_view driver) : sinks(attached, driver) {}
        DriverSinks sinks;
        u32 offered = 0; // devices offered to it so far
    };

    void order_drivers();
    void add_entries(std::string_view name);
    void find_candidates(Vector<Candidate>& into);
    io::Task<Result<void>> offer(std::span<Candidate> candidates);
    io::Task<Result<void>> watch_source(DeviceSource& source);
    DriverState* driver_state(std::string_view driver);
    void no_driver_state(Candidate& candidate, std::string_view driver);
    void begin(const Candidate& candidate, const Entry& entry, DriverState& state);
    void finish(Candidate& candidate, const Entry& entry, const DriverState& state, u32 before,
                const Result<void>& done);
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
    std::array<std::optional<DriverState>, max_drivers> driver_states_;
    Vector<Entry> order_;
    u32 drivers_dropped_ = 0; // no memory for their entries
    hv::EmulatedClasses unplugged_;
    io::TaskGroup tasks_; // never destroyed: a device may still access what its tasks wait for
};

/// Reports unused rules as left_out records. The rules themselves were cut short; no device is lost.
void report_left_out(const drivers::Table& table, const drivers::Plan& plan, Devices& into);

/// Turns the outcome of a job that succeeded into an ERROR if a device could not be used, if something left out may be
/// a device, or if rules were malformed (`wrong_rules`) or cut off (`map_file_cut`).
void judge(Outcome& outcome, const Devices& devices, u32 wrong_rules, bool map_file_cut);

} // namespace fl::boot
