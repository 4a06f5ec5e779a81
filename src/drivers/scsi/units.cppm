// The logical units of a host adapter, independent of the transport: scanning its targets, comparing the units in use
// with what is there now, attaching new ones, removing those that are gone, and reporting the others. A driver supplies
// the commands and its disks as a scsi::Host.
//
// A scan of a target: REPORT LUNS, or probing if the target does not list its units → INQUIRY of each unit → in use:
// READ CAPACITY and MODE SENSE, compared with the disk, which takes over a new size and is removed after any other
// change; new: describe(), Host::make(), DiskSink::announce().
export module drivers.scsi.units;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.vector;
import io.executor;
import io.task;
import io.block;
import drivers.driver;
export import drivers.scsi.unit;

export namespace fl::drivers::scsi {

/// The limits of a transport in this environment. `max_transfer`: bytes per command, a multiple of 4096.
inline TransportLimits transport_limits(const Environment& environment, u32 max_transfer) {
    return {.max_transfer = max_transfer,
            .flush = environment.allows(Feature::flush),
            .discard = environment.allows(Feature::discard),
            .write_zeroes = environment.allows(Feature::write_zeroes)};
}

/// A unit's address on its host adapter.
struct UnitNumber {
    u8 target = 0;
    u16 lun = 0;
    friend constexpr bool operator==(const UnitNumber&, const UnitNumber&) = default;
};

/// The disk of a unit, with its lanes. Made by Host::make(), owned by Units, and kept until Units is destroyed even if
/// the unit is removed: the disk's users may still refer to it.
class Unit {
  public:
    virtual ~Unit() = default;
    virtual io::BlockDevice& disk() = 0;
    /// After the announcement: the queues serve the disk from now on. `here`: the caller's executor.
    virtual void link(io::Executor& here) = 0;
    /// Further requests are refused.
    virtual void remove() = 0;

  private:
    friend class Units;
    UnitNumber at_;
    std::optional<u32> identification_; // see read_identification()
    bool gone_ = false;
};

/// A driver of a host adapter, as Units sees it. Nexus::execute() addresses the target that was selected last.
class Host : public Nexus {
  public:
    using Nexus::Nexus;
    u8 target() const { return target_; }
    void select(u8 target) { target_ = target; }
    /// False: no further command is possible.
    virtual bool is_open() const = 0;
    /// Makes the disk of a new unit; it is not announced yet. `identity` is complete but for the features of the
    /// transport, which the driver appends. nullptr: no memory.
    virtual Unit* make(UnitNumber at, const UnitDescription& found, io::BlockDevice::Identity& identity) = 0;

  protected:
    ~Host() = default;

  private:
    u8 target_ = 0;
};

/// The units of one host adapter. For use on the executor of its Host, one scan at a time.
class Units {
  public:
    static constexpr u32 max_units = 256;   // in use
    static constexpr u32 max_luns = 256;    // of a target
    static constexpr u32 max_logged = 1024; // units present but not driven
    static constexpr u32 max_silent = 2;    // units, or targets, that do not answer, before a scan ends

    struct Rules {
        FixedText<48> name;          // of the host adapter, in reports and log lines
        TransportLimits transport;   // see describe()
        bool several_targets = true; // else reports name only the LUN
        bool lists_units = true;     // false: a target has one unit, LUN 0, and gets no REPORT LUNS
        u32 last_lun = max_luns - 1; // the last one that is addressed
        u32 probed_luns = 1;         // from LUN 0 on, of a target that exists and does not list its units
        u32 disk_number = DiskSink::no_twin;
    };

    Units(Host& host, DiskSink& sink) : host_(host), sink_(sink) {}
    ~Units() { clear(); }
    Units(const Units&) = delete;
    Units& operator=(const Units&) = delete;

    /// Before the first scan.
    void set_rules(const Rules& rules) { rules_ = rules; }
    /// Scans targets 0 to count - 1. A target that cannot be scanned is logged and skipped. Error: the host closed, or
    /// a target did not answer.
    io::Task<Result<void>> scan(u32 count);
    /// Scans one target. Units that cannot be used are reported and skipped. Error{timed_out}: it answered nothing;
    /// others: the host has closed, or the target's units cannot be listed.
    io::Task<Result<void>> scan_target(u8 target);
    /// The host says that the unit is gone. A scan under way does not attach it, even if it has answered already: scan
    /// again to find what is there instead. No further effect if it is not in use.
    void remove(UnitNumber at);

    /// Units attached so far, including removed ones.
    u32 attached() const { return static_cast<u32>(units_.size()); }
    /// The next unit in use at or after `index`, which is then the one after it. nullopt: none.
    std::optional<UnitNumber> next(u32& index) const;
    /// Destroys all disks: no queue serves them any more.
    void clear();

  private:
    io::Task<Result<void>> scan_unit(UnitNumber at, bool listed);
    io::Task<Result<void>> identify(UnitNumber at);
    io::Task<Result<bool>> unchanged(Unit& unit, const Inquiry& inquiry);
    Result<void> attach(UnitNumber at, const UnitDescription& found);
    Unit* find(UnitNumber at) const;
    void remove_found(UnitNumber at);
    void remove(Unit& unit, std::string_view why);
    bool first_report(UnitNumber at);
    void forget_report(UnitNumber at);
    void unused(UnitNumber at, std::string_view what, Unused why, std::string_view reason);

    Host& host_;
    DiskSink& sink_;
    Rules rules_;
    u32 removals_ = 0;          // calls of remove()
    Vector<Unit*> units_;       // owned
    Vector<UnitNumber> logged_; // units present but not driven and already reported
};

/// A unit with a disk on each of a driver's queues. The first one is the disk; the others are its lanes. `Disk`: an
/// io::GroupedDisk, or for a driver with one queue a disk that this serves from its construction on.
template <class Disk>
class LaneDisks final : public Unit {
  public:
    ~LaneDisks() override {
        for (Disk* lane : lanes_) {
            delete lane;
        }
    }
    /// Takes ownership. False: there is no memory; `lane` is deleted.
    bool add(Disk* lane) {
        if (lane == nullptr || !lanes_.push(lane)) {
            delete lane;
            return false;
        }
        if constexpr (requires { lane->add_lane(*lane); }) {
            if (lanes_.size() != 1) {
                lanes_[0]->add_lane(*lane);
            }
        }
        return true;
    }
    io::BlockDevice& disk() override { return *lanes_[0]; }
    void link(io::Executor& here) override {
        if constexpr (requires(Disk& disk) { disk.link(here); }) {
            for (Disk* lane : lanes_) {
                lane->link(here);
            }
        }
    }
    void remove() override {
        for (Disk* lane : lanes_) {
            lane->remove();
        }
    }

  private:
    Vector<Disk*> lanes_; // owned
};

/// Makes a unit with `count` lanes. `make_lane(index)` returns a new disk on queue `index`, or nullptr. nullptr: no
/// memory.
template <class Disk, class F>
Unit* make_lanes(u32 count, F&& make_lane) {
    auto* unit = new (std::nothrow) LaneDisks<Disk>;
    for (u32 i = 0; unit != nullptr && i < count; ++i) {
        if (!unit->add(make_lane(i))) {
            delete std::exchange(unit, nullptr);
        }
    }
    return unit;
}

/// Sends a command of the driver itself, as soon as there is room for it, within `timeout`. An Error: it was not sent.
/// `exchange` must outlive the task.
template <class Queue, class Exchange>
io::Task<Result<void>> send_with_room(Queue& queue, Exchange& exchange, io::Executor& here, Nanoseconds timeout) {
    const io::Bound room(here, timeout);
    for (;;) {
        const auto sent = queue.send(exchange);
        if (sent || sent.error().code != Code::exhausted || room.passed()) {
            co_return sent;
        }
        co_await here.sleep(1'000'000);
    }
}

/// Sends a command of the driver itself and waits for its end, each within `timeout`. Error{timed_out}: it was not
/// answered, and the device may still access its data; Error{device_gone}: the queue was closed; others: it could not
/// be sent. `exchange` must outlive the task.
template <class Queue, class Exchange>
io::Task<Result<void>> send_and_wait(Queue& queue, Exchange& exchange, io::Executor& here, Nanoseconds timeout) {
    if (auto sent = co_await send_with_room(queue, exchange, here, timeout); !sent) {
        co_return sent;
    }
    if (!co_await exchange.done.wait({here, timeout})) {
        queue.abandon(exchange);
        co_return Error{Code::timed_out, "the SCSI host did not answer a command of the driver"};
    }
    if (!exchange.answered) {
        co_return Error{Code::device_gone, "the SCSI host was closed before it answered a command of the driver"};
    }
    co_return Result<void>{};
}

} // namespace fl::drivers::scsi
