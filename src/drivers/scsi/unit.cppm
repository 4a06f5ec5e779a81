// Discovery and description of logical units, independent of the transport: REPORT LUNS, INQUIRY with vital product
// data, TEST UNIT READY, READ CAPACITY, MODE SENSE. A transport supplies Nexus::execute(); tracking and naming the
// units in use is up to the driver.
//
// A driver calls report_luns(), then inquire() for each unit, then describe() for a new disk, or read_state() and
// compare() for one in use.
export module drivers.scsi.unit;
import core.std;
import core.result;
import core.text;
import io.executor;
import io.task;
import io.block;
export import drivers.scsi.commands;

export namespace fl::drivers::scsi {

/// Access to the logical units of one target: an I_T nexus [SAM-5]. One command at a time.
class Nexus {
  public:
    /// Maximum data returned by a command, in bytes.
    static constexpr u32 max_data = 4096;

    /// `driver`: its name, for log lines.
    Nexus(io::Executor& executor, std::string_view driver) : executor_(executor), driver_(driver) {}

    /// Sends one command and waits for its end, with a bound. `bytes`: the size of its data-in buffer, at most
    /// max_data, zeroed beforehand; 0: the command has no data. Sets `response`, with at most `bytes` of data. Error:
    /// the command was not answered, or could not be sent; `response` is not set.
    virtual io::Task<Result<void>> execute(u16 lun, Cdb cdb, u32 bytes, Response& response) = 0;

    io::Executor& executor() const { return executor_; }
    std::string_view driver() const { return driver_; }
    /// Number of unit attentions so far that may invalidate earlier information about a unit.
    u32 changes() const { return changes_; }
    void note_change() { ++changes_; }

  protected:
    ~Nexus() = default;

  private:
    io::Executor& executor_;
    std::string_view driver_;
    u32 changes_ = 0;
};

/// Calls execute() up to five times: retries at once after a unit attention, and after 50 ms while the unit is busy.
/// Returns the last response.
io::Task<Result<void>> execute_retrying(Nexus& nexus, u16 lun, Cdb cdb, u32 bytes, Response& response);

struct LunList {
    bool complete = false;  // false: the target gave no complete list; the units it did report are marked
    bool no_target = false; // the transport says that there is no such target
    u32 out_of_range = 0;   // units whose number does not fit into `present`
};
/// REPORT LUNS, sent to LUN 0. Sets present[n] for each LUN n. `present` must outlive the task.
io::Task<Result<LunList>> report_luns(Nexus& nexus, std::span<bool> present);

/// Standard INQUIRY data. nullopt: no unit at this number. Error{io}: refused, so it is unknown whether there is a
/// unit.
io::Task<Result<std::optional<Inquiry>>> inquire(Nexus& nexus, u16 lun);
FixedText<48> model_of(const Inquiry& inquiry); // vendor, product, revision

/// Attributes that may change while a disk is in use.
struct UnitState {
    bool medium = true; // false: there is none, or it has 0 bytes, and the other members are not set
    Capacity capacity;
    // Defaults if the unit does not report them: a volatile cache, and writable.
    bool write_cache = true;
    bool write_protected = false;
    bool force_unit_access = false;
};
/// READ CAPACITY(16), or (10) if that is refused, and the caching mode page. Repeated, at most three readings, if a
/// unit attention reports a possible change of capacity meanwhile. Error{not_supported}: an unsupported block size or
/// number of blocks. Error{io}: the unit refuses both.
io::Task<Result<UnitState>> read_state(Nexus& nexus, u16 lun);

/// Limits of the transport.
struct TransportLimits {
    u32 max_transfer = 0;      // bytes per command, a multiple of 4096
    bool flush = true;         // false: no flushes; writes have FUA, if the unit supports that
    bool discard = true;       // false: UNMAP is not used
    bool write_zeroes = false; // true: WRITE SAME is used; the transport has a block of zeros
};

/// A disk as described by its unit.
struct UnitDescription {
    bool medium = true; // false: there is none, or it has 0 bytes, and the other members are not set
    FixedText<48> model;
    io::Geometry geometry;
    UnitLimits limits;
    std::optional<u32> identification; // see read_identification()
    // it has a volatile write cache, which is not flushed, and no write reaches the medium before it ends
    bool unflushed_cache = false;
};
/// TEST UNIT READY, read_state(), identification, block limits and logical block provisioning. A unit that is not ready
/// is described anyway, unless its drive is empty. Pages that a unit does not list are not read. Repeated if a unit
/// attention reports a change meanwhile; the third description is final. Error{not_found}: it is no longer a disk.
io::Task<Result<UnitDescription>> describe(Nexus& nexus, u16 lun, Inquiry inquiry, TransportLimits transport);

/// A fingerprint of the unit's device identification, VPD page 0x83 [SPC-4 §7.8.6]; nullopt: it has none. Error: the
/// command was not answered.
io::Task<Result<std::optional<u32>>> read_identification(Nexus& nexus, u16 lun);

/// How a disk in use differs from the unit that now has its number: not at all; in its number of blocks, which the disk
/// can take over; or so that it is another disk.
enum class Change : u8 { none, size, block_size, model, attributes };
/// `inquiry` and `now` are the unit's, which has a medium; `geometry` and `model`: from describe() of the disk. The
/// first difference in the order block_size, model, attributes, size.
Change compare(const Inquiry& inquiry, const UnitState& now, const io::Geometry& geometry, std::string_view model,
               TransportLimits transport);

} // namespace fl::drivers::scsi
