// Driver priority. A rule pairs a native driver with the synthetic one for the same devices (disks, network cards,
// keyboards …) under a hypervisor; the table holds the built-in rules, modified by a map file and the command line
// (docs/INTERFACES.md "Map file"). Drivers do not depend on it.
//
// The built-in policy for an emulated twin is `leave`: the native driver is not offered a device that the synthetic
// one has attached, but gets it if the synthetic one fails. `unplug` is irreversible, and must be requested.
export module drivers.table;
import core.std;
import core.result;
import core.text;
import hv.backend;
export import hv.vm_guest;
export import drivers.device;

export namespace fl::drivers {

/// Policy for the emulated twin of a synthetic device.
enum class Twin : u8 {
    leave,  // not offered to the native driver once the synthetic one has attached
    unplug, // the host is asked to remove it before native buses are probed
    keep,   // both attach: for measurements
};
inline constexpr std::array<std::string_view, 3> twin_names{"leave", "unplug", "keep"};
constexpr std::string_view name(Twin twin) { return twin_names[to_underlying(twin)]; }

/// Every driver that a rule may name, even if not in this build. A new driver needs one line here and one in boot's
/// list.
struct DriverInfo {
    std::string_view name;
    bool synthetic;
    DeviceKind kind;
    /// For a native driver: the device classes that a host removes when asked to unplug this driver's devices.
    hv::EmulatedClasses emulated{};
    /// For a synthetic driver: its devices can be twins of emulated ones. Otherwise rules give only the order, and both
    /// drivers attach what they find.
    bool twins = true;
};
inline constexpr auto known_drivers = std::to_array<DriverInfo>({
    {"xen_blk", true, DeviceKind::disk},
    {"storvsc", true, DeviceKind::disk},
    {"virtio_blk", true, DeviceKind::disk, {}, false},
    {"virtio_scsi", true, DeviceKind::disk, {}, false},
    {"pvscsi", true, DeviceKind::disk, {}, false},
    {"ata", false, DeviceKind::disk, {.disks = true}},
    {"nvme", false, DeviceKind::disk, {.nvme = true}},
    {"ahci", false, DeviceKind::disk, {.disks = true}},
    {"xen_net", true, DeviceKind::network},
    {"e1000", false, DeviceKind::network, {.nics = true}},
});
constexpr const DriverInfo* driver_named(std::string_view name, std::span<const DriverInfo> drivers = known_drivers) {
    for (const DriverInfo& d : drivers) {
        if (d.name == name) {
            return &d;
        }
    }
    return nullptr;
}

/// One rule. `native` and `synthetic` point into the table's drivers and belong to the same device class.
struct Rule {
    std::optional<hv::VmGuest> guest; // nullopt: any (`*`)
    const DriverInfo* native = nullptr;
    const DriverInfo* synthetic = nullptr;
    i32 rank = 0; // > 0: synthetic driver first; < 0: native driver first; 0: equal, both attach
    Twin twin = Twin::leave;
};

/// An invalid line; the other lines still apply.
struct Diagnostic {
    u32 line = 0;           // from 1; 0: a command line rule
    FixedText<160> message; // what was expected and what was seen
};

/// The table's result for one hypervisor: the order in which drivers are tried, and the policy for each pair.
struct Plan {
    static constexpr usize max_drivers = 24;
    static constexpr usize max_pairs = 64;

    struct Pair {
        std::string_view native;
        std::string_view synthetic;
        i32 rank = 0;
        Twin twin = Twin::leave;
    };

    std::span<const DriverInfo> known; // the table's drivers
    // first to last; drivers not named by any rule are in the order of the table's drivers
    std::array<std::string_view, max_drivers> order{};
    std::array<Pair, max_pairs> pairs{}; // largest |rank| first
    u32 driver_count = 0;
    u32 pair_count = 0;
    u32 drivers_dropped = 0;  // beyond max_drivers: tried after all others
    bool conflicting = false; // rules contradict each other: those of smaller |rank| were dropped

    constexpr std::span<const std::string_view> drivers() const { return {order.data(), driver_count}; }
    constexpr std::span<const Pair> all_pairs() const { return {pairs.data(), pair_count}; }
    /// The pair of these two, in either order, or nullptr.
    const Pair* pair(std::string_view a, std::string_view b) const;
    /// Whether some synthetic driver's devices can be the same as those of this native one.
    bool has_twins(std::string_view native) const;
    /// Whether a driver, native or synthetic, has a pair whose devices can be the same.
    bool pairs_with_twins(std::string_view driver) const;
    /// Whether both drivers may attach the same device.
    bool both(std::string_view a, std::string_view b) const;
    /// The table's entry for a driver; nullptr: no rule can name it.
    const DriverInfo* driver(std::string_view name) const { return driver_named(name, known); }
    /// What the host should unplug: the emulated devices of each native driver with a preceding synthetic one and
    /// twin policy `unplug`, but nothing that another rule has a native driver use first.
    hv::EmulatedClasses unplugs() const;
};

/// The built-in rules, with the changes by a map file and the command line.
class Table {
  public:
    static constexpr usize max_rules = Plan::max_pairs;
    static constexpr usize max_diagnostics = 16;

    /// The built-in rules for the known drivers.
    constexpr Table();
    /// Other drivers and rules, for tests. `drivers` must outlive this.
    constexpr Table(std::span<const DriverInfo> drivers, std::span<const Rule> rules);

    /// Applies a map file, line by line. Returns the number of invalid lines; each has a diagnostic, as far as there
    /// is room.
    u32 apply(std::string_view file);
    /// Applies one command line rule: words separated by `,`. False: invalid, with a diagnostic.
    bool apply_word(std::string_view rule);

    std::span<const Rule> rules() const { return {rules_.data(), rule_count_}; }
    std::span<const Diagnostic> diagnostics() const {
        return {diagnostics_.data(), std::min<usize>(wrong_, max_diagnostics)};
    }
    u32 wrong() const { return wrong_; }
    /// Rules dropped for lack of room. Those from a map file or the command line also count in wrong().
    u32 rules_dropped() const { return rules_dropped_; }
    /// Whether a command line rule was invalid, even if there was no room for its diagnostic.
    bool wrong_word() const { return wrong_word_; }

    /// `emulated`: overrides every rule's twin policy (command line key `emulated`).
    Plan plan(hv::VmGuest guest, std::optional<Twin> emulated) const;

  private:
    bool apply_line(std::string_view text, bool commas, u32 line);
    bool change(const Rule& rule, int verb, u32 line);
    bool refuse(u32 line, std::string_view message);
    std::span<const DriverInfo> drivers_;
    std::array<Rule, max_rules> rules_{};
    u32 rule_count_ = 0;
    u32 rules_dropped_ = 0;
    std::array<Diagnostic, max_diagnostics> diagnostics_{};
    u32 wrong_ = 0;
    bool wrong_word_ = false;
};

/// The built-in rules.
inline constexpr auto builtin_rules = std::to_array<Rule>({
    {hv::VmGuest::xen, driver_named("ata"), driver_named("xen_blk"), 100, Twin::leave},
    // Xen shows the disks of a guest also as emulated ones, whatever the controller, and unplugs them all [xen-unplug].
    {hv::VmGuest::xen, driver_named("ahci"), driver_named("xen_blk"), 100, Twin::leave},
    {hv::VmGuest::xen, driver_named("nvme"), driver_named("xen_blk"), 100, Twin::leave},
    {hv::VmGuest::hyperv, driver_named("ata"), driver_named("storvsc"), 100, Twin::leave},
    {hv::VmGuest::xen, driver_named("e1000"), driver_named("xen_net"), 100, Twin::leave},
    // Whatever the hypervisor: a host that shows these wants them used.
    {std::nullopt, driver_named("ata"), driver_named("virtio_blk"), 50, Twin::keep},
    {std::nullopt, driver_named("ata"), driver_named("virtio_scsi"), 50, Twin::keep},
    {std::nullopt, driver_named("ata"), driver_named("pvscsi"), 40, Twin::keep},
    {std::nullopt, driver_named("nvme"), driver_named("virtio_blk"), 50, Twin::keep},
    {std::nullopt, driver_named("nvme"), driver_named("virtio_scsi"), 50, Twin::keep},
    {std::nullopt, driver_named("nvme"), driver_named("pvscsi"), 40, Twin::keep},
    {std::nullopt, driver_named("ahci"), driver_named("virtio_blk"), 50, Twin::keep},
    {std::nullopt, driver_named("ahci"), driver_named("virtio_scsi"), 50, Twin::keep},
    {std::nullopt, driver_named("ahci"), driver_named("pvscsi"), 40, Twin::keep},
});

constexpr Table::Table() : Table(known_drivers, builtin_rules) {}

constexpr Table::Table(std::span<const DriverInfo> drivers, std::span<const Rule> rules) : drivers_(drivers) {
    for (const Rule& rule : rules) {
        if (rule_count_ == max_rules) {
            ++rules_dropped_;
        } else {
            rules_[rule_count_++] = rule;
        }
    }
}
static_assert(known_drivers.size() <= Plan::max_drivers && builtin_rules.size() <= Table::max_rules);
static_assert(Table::max_rules <= Plan::max_pairs); // a plan has room for every rule

/// Logs the plan: the order, then each pair with its policy.
void log_plan(const Plan& plan, hv::VmGuest guest);

} // namespace fl::drivers
