// The namespaces of a controller: found, checked, announced as disks, and looked at again when the controller says that
// they have changed, or after a reset. Runs on the boot processor.
export module drivers.nvme.namespaces;
import core.std;
import core.result;
import core.text;
import core.vector;
import io.block;
import io.executor;
import io.task;
import drivers.driver;
export import drivers.nvme.admin;

export namespace fl::drivers::nvme {

class Namespaces {
  public:
    static constexpr u32 max_namespaces = 64;

    Namespaces(Environment& environment, Admin& admin, u32 index)
        : environment_(environment), admin_(admin), index_(index) {}
    Namespaces(const Namespaces&) = delete;
    Namespaces& operator=(const Namespaces&) = delete;
    ~Namespaces() { clear(); }
    /// Destroys the disks. No queue may be registered with its executor.
    void clear();

    /// What all of them have in common. `queues`: of the lanes; the array outlives this. `limits`: of the command set.
    /// `features`: words for the disks' description, each followed by a space or the last. `descriptors`: the
    /// controller has lists of identification descriptors. `command_sets`: it may have others than NVM.
    void use(const ControllerInfo& info, const CommandSetLimits& limits, std::span<Queue* const> queues,
             std::string_view features, bool descriptors, bool command_sets);
    /// Finds and announces the namespaces that are not known. Failing ones are skipped and reported.
    io::Task<Result<void>> scan();
    /// Reads the log of changes, which lets the controller report the next one, and looks at what it names: disks are
    /// resized or removed, new namespaces announced.
    io::Task<Result<void>> changed();
    /// Looks at every disk again: after a reset, before its queues go on.
    io::Task<Result<void>> check_all();

    u32 disks() const { return static_cast<u32>(units_.size()); }
    u32 max_transfer_bytes() const { return max_transfer_; }

  private:
    struct Unit {
        std::array<Disk*, Disk::max_lanes> disks{}; // one per lane; the first is the disk
        NamespaceIdentity identity;
    };
    io::Task<Result<void>> scan_one(u32 nsid);
    io::Task<Result<void>> report_other_command_sets(std::span<const u32> active);
    io::Task<Result<u8>> read_descriptors(u32 nsid, NamespaceIdentity& identity);
    io::Task<Result<void>> check(Unit& unit);
    Result<void> attach(u32 nsid, const NamespaceInfo& info);
    Limits limits_of(u32 block_size) const;
    void remove(Unit& unit, std::string_view why);
    Unit* find(u32 nsid) const;
    static constexpr u32 max_reported = 1024;
    void unused(u32 nsid, Unused why, std::string_view reason);

    Environment environment_; // a copy: the objects it refers to outlive this, the Environment itself may not
    Admin& admin_;
    u32 index_;
    ControllerInfo info_;
    CommandSetLimits set_;
    u32 max_transfer_ = max_transfer;
    bool descriptors_ = false;
    bool command_sets_ = false;
    std::span<Queue* const> queues_;
    FixedText<96> features_;
    Vector<Unit*> units_;  // owned
    Vector<u32> reported_; // namespaces that cannot be used, and were reported; at most max_reported
};

} // namespace fl::drivers::nvme
