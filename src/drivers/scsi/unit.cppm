// Finding and describing logical units, for any transport: REPORT LUNS, INQUIRY with its vital product data, TEST UNIT
// READY, READ CAPACITY, MODE SENSE. A transport supplies Nexus::execute(); which units are in use, and their names, is
// the driver's business.
//
// A driver calls report_luns(), then for each unit inquire(), and then describe() for a disk that is new, or
// read_state() and compare() for one that is in use.
export module drivers.scsi.unit;
import core.std;
import core.result;
import core.text;
import io.executor;
import io.task;
import io.block;
export import drivers.scsi.commands;

export namespace fl::drivers::scsi {

/// The way to the logical units of one target: an I_T nexus [SAM-5]. One command at a time.
class Nexus {
  public:
    /// Data that a command may return, in bytes.
    static constexpr u32 max_data = 4096;

    /// `driver`: its name, for log lines.
    Nexus(io::Executor& executor, std::string_view driver) : executor_(executor), driver_(driver) {}

    /// Sends one command and waits for its end, bounded. `bytes`: the size of its data-in buffer, at most max_data; 0:
    /// the command has no data. The buffer is zero before. Sets `response`, whose data has at most `bytes`. Error: the
    /// command was not answered, or could not be sent; `response` is not set.
    virtual io::Task<Result<void>> execute(u16 lun, Cdb cdb, u32 bytes, Response& response) = 0;

    io::Executor& executor() const { return executor_; }
    std::string_view driver() const { return driver_; }
    /// Unit attentions so far that say that what was read of a unit before may no longer be true.
    u32 changes() const { return changes_; }
    void note_change() { ++changes_; }

  protected:
    ~Nexus() = default;

  private:
    io::Executor& executor_;
    std::string_view driver_;
    u32 changes_ = 0;
};

/// execute(), up to five times: again at once after a unit attention, and 50 ms later while the unit is busy. The last
/// response counts.
io::Task<Result<void>> execute_retrying(Nexus& nexus, u16 lun, Cdb cdb, u32 bytes, Response& response);

struct LunList {
    bool whole = false; // false: the target did not say which units it has; what it did say is marked
    u32 beyond = 0;     // units whose number is none of `there`
};
/// REPORT LUNS, asked of LUN 0. Sets there[n] for each LUN n. `there` lives until the task has ended.
io::Task<Result<LunList>> report_luns(Nexus& nexus, std::span<bool> there);

/// Standard INQUIRY data. Nothing: there is no unit at this number. Error{io}: refused, which says nothing about
/// whether there is one.
io::Task<Result<std::optional<Inquiry>>> inquire(Nexus& nexus, u16 lun);
FixedText<48> model_of(const Inquiry& inquiry); // vendor, product, revision

/// What may change while a disk is in use.
struct UnitState {
    Capacity capacity;
    // Of a unit that does not say: a volatile cache, and writable.
    bool write_cache = true;
    bool write_protected = false;
};
/// READ CAPACITY(16), or (10) if that is refused, and the caching mode page; again, three times at most, if a unit
/// attention says that the capacity may have changed since it was read. Error{not_supported}: blocks of a size, or more
/// of them, than can be used.
io::Task<Result<UnitState>> read_state(Nexus& nexus, u16 lun);

/// What the transport allows.
struct TransportLimits {
    u32 max_transfer = 0; // bytes of one command, a multiple of 4096
    bool flush = true;    // false: volatile caches are ignored
};

/// A disk, as its unit describes it.
struct UnitDescription {
    bool medium = true; // false: the drive is empty, and the rest is not set
    FixedText<48> model;
    io::Geometry geometry;
    UnitLimits limits;
};
/// TEST UNIT READY, read_state(), block limits and logical block provisioning. A unit that is not ready for another
/// reason than an empty drive is described all the same. Pages that a unit does not list are not read. If a unit
/// attention says that the unit has changed since it was asked first, it is described again; the third description
/// counts in any case.
/// Error{not_found}: it is no disk any more.
io::Task<Result<UnitDescription>> describe(Nexus& nexus, u16 lun, Inquiry inquiry, TransportLimits transport);

/// How a disk that is in use differs from the unit that now has its number.
enum class Change : u8 { none, size, model, attributes };
/// `inquiry` and `now` are the unit's; `geometry` and `model`: what describe() said of the disk.
Change compare(const Inquiry& inquiry, const UnitState& now, const io::Geometry& geometry, std::string_view model,
               TransportLimits transport);

} // namespace fl::drivers::scsi
