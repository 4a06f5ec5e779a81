// The kernel proper: detect, choose, install; then clock, interrupts, executor; then the driver table, the drivers in
// its order, the job, the verdict.
module;
#include "core/try.hpp"
module boot.start;
import core.std;
import core.result;
import core.text;
import core.log;
import core.time;
import core.dma;
import core.verdict;
import core.cpuid;
import core.cmdline;
import core.smbios;
import core.interrupt;
import core.processor;
import core.memory;
import core.vector;
import core.acpi;
import core.physical;
import core.machine.acpi;
import core.machine.clock;
import core.machine.cpu;
import core.machine.exit;
import core.machine.interrupts;
import core.machine.memory;
import core.machine.runtime;
import core.machine.serial;
import core.machine.smp;
import core.machine.traps;
import io.task;
import io.executor;
import io.shutdown;
import io.run_on;
import hv.list;
import hv.machine.detect;
import hv.machine.privileged;
import drivers.table;
import drivers.driver;
import drivers.null;
import drivers.pci;
import drivers.pci.access;
import drivers.machine.pci;
import boot.handoff;
import boot.options;
import boot.loader_words;
import boot.devices;
import boot.disks;
import boot.drivers;
import boot.jobs;
import boot.shutdown;

namespace fl::boot {

namespace {

// What lasts as long as the machine and is filled in once; static, because the boot stack is small and none of it
// moves.
constinit CpuidSnapshot cpuid_snapshot{};
// Zero until kernel_start() makes it: an object that begins with other values takes its whole size in the image's file.
template <class T>
union Later {
    u8 nothing;
    T value;
    constexpr Later() : nothing(0) {}
};
constinit Later<Options> options_place;
Options& options = options_place.value;
constinit OptionErrors option_errors{};
constinit Later<drivers::Table> table_place;
drivers::Table& table = table_place.value;
constinit drivers::Plan plan{};
constinit hv::MachinePrivileged privileged{};

class KernelMemory final : public hv::PhysicalMemory {
  public:
    Result<std::byte*> map(u64 physical, u64 size) override { return map_physical(physical, size); }
    u64 physical_of(const void* address) override { return fl::physical_of(address); }
};
constinit KernelMemory kernel_memory{};

// Cycle counts of the moments that the `boot` record tells; read before there is a clock.
struct Moments {
    u64 entry = 0;
    u64 detected = 0;
};
constinit Moments moments{};

void print_boot_info(const BootInfo& info) {
    log::info("Firstlight, entered by {}; image at {:#x}, {} KiB", info.entry, info.kernel_phys,
              info.kernel_size >> 10);
    log::info("command line: \"{}\"", info.cmdline_text());
    // An address of the loader's, or what becomes of it where it gave none.
    const auto place = [](u64 address, std::string_view none) {
        FixedText<48> text{none};
        if (address != 0) {
            text.clear();
            print(text, "{:#x}", address);
        }
        return text;
    };
    log::info("from the loader: RSDP {}, SMBIOS {}, framebuffer {}, map file: {}", place(info.rsdp, "not given"),
              place(info.smbios, "not given"), place(info.framebuffer.base, "none"),
              info.has_map_file != 0 ? "given" : "none");
    for (const MemoryRange& range : info.memory()) {
        log::info("  {:016x}-{:016x} {}", range.base, range.base + range.size, name(range.kind));
    }
    if (info.map_file_truncated != 0) {
        log::warning("the map file is longer than {} bytes: its end is missing", BootInfo::max_map_file);
    }
    if (info.ranges_truncated != 0) {
        log::warning("the memory map comes to more than {} ranges: what does not fit is not used",
                     BootInfo::max_given_ranges);
    }
}

void print_loader_words(const LoaderWords& words) {
    if (words.ignored.count == 0) {
        return;
    }
    {
        const log::Hold hold;
        log::begin(log::Level::info);
        log::Line out;
        out.write("command line: for Linux, ignored:");
        for (std::string_view word : words.ignored.all()) {
            print(out, " {}", shown(word));
        }
        if (words.ignored_dropped != 0) {
            print(out, " and {} more", words.ignored_dropped);
        }
        out.write("\n");
    }
    log::Record record("ignored");
    record.open("words", '[');
    for (std::string_view word : words.ignored.all()) {
        record.text("", word);
    }
    record.close(']').number("more", words.ignored_dropped);
}

void boot_record(const BootInfo& info, const hv::Sightings& sightings, std::string_view backend, Instant first_probe) {
    u64 usable = 0;
    for (const MemoryRange& range : info.memory()) {
        usable += range.kind == MemoryKind::usable ? range.size : 0;
    }
    const CycleScale scale(tsc_hz());
    log::Record record("boot");
    record.text("entry", name(info.entry)).text("vm_guest", hv::name(hv::vm_guest())).text("backend", backend);
    record.open("signatures", '[');
    for (const hv::Sighting& sighting : sightings.all()) {
        FixedText<16> base;
        print(base, "{:#x}", sighting.base);
        record.open("", '{').text("base", base.view()).text("name", sighting.signature.view()).close('}');
    }
    record.close(']').number("memory_bytes", usable).number("tsc_khz", tsc_hz() / 1000).text("clock", clock_name());
    record.flag("clock_assumed", clock_assumed());
    record.number("detect_ns", scale.ns(moments.detected - moments.entry));
    record.number("first_probe_ns", first_probe - std::min(first_probe, clock_ahead()));
}

// One executor for each processor, index = processor. Those of further processors are made when they start and last as
// long as the machine.
struct Executors {
    struct alignas(128) Slot { // no two processors write to one cache line
        std::optional<io::Executor> executor;
    };
    std::array<Slot, max_processors> slots;
    std::array<io::Executor*, max_processors> list{};
    u32 count = 0;
    std::atomic<bool> stop{false};

    io::Executor& make(u32 processor) {
        if (!slots[processor].executor) { // else of a processor that was left out
            slots[processor].executor.emplace(
                io::Platform{platform_context(processor), platform_now, platform_idle, platform_kick}, processor);
        }
        list[processor] = &*slots[processor].executor;
        return *list[processor];
    }
    std::span<io::Executor* const> all() const { return {list.data(), count}; }
};
Executors& executors() {
    static Executors all;
    return all;
}

template <class B>
Result<void> join_backend(void* backend, u32 processor) {
    io::Executor& executor = executors().make(processor);
    if constexpr (hv::Processors<B>) {
        CHECK(static_cast<B*>(backend)->join(processor, executor));
    } else {
        static_cast<void>(backend);
        static_cast<void>(executor);
    }
    return join_hypervisor_timer();
}

// Before further processors run. With the processor's own timer everything works, too: what cannot be had is told and
// no more.
template <class B>
void choose_timer(B& backend) {
    if (options.timer == TimerChoice::processor || (options.timer == TimerChoice::automatic && timer_is_deadline())) {
        return;
    }
    if constexpr (hv::OneShotTimer<B>) {
        using Timer = typename B::Timer;
        if (Timer* const given = backend.timer()) {
            const auto start = [](void* self, InterruptHandler handler, void* context) {
                return static_cast<Timer*>(self)->start(handler, context);
            };
            const auto arm = [](void* self, Nanoseconds length) { static_cast<Timer*>(self)->arm(length); };
            if (auto taken = use_timer({given, start, arm, given->name()}); !taken) {
                log::warning("the timer stays {}: {}", timer_name(), taken.error());
            } else {
                log::info("timer {}", timer_name());
            }
            return;
        }
    }
    if (options.timer == TimerChoice::hypervisor) {
        log::warning("timer=hypervisor: {} offers none, it stays {}", B::name, timer_name());
    }
}

template <class B>
void serve(void* backend, u32 processor) {
    executors().list[processor]->serve(executors().stop);
    if constexpr (hv::LeavesProcessors<B>) {
        static_cast<B*>(backend)->leave(processor);
    } else {
        static_cast<void>(backend);
    }
}

// All further processors: started, joined to the backend, in their executors' loops.
template <class B>
void use_processors(B& backend, io::Executor& executor) {
    Executors& all = executors();
    all.list[0] = &executor;
    executor.set_kick(platform_kick);
    const ProcessorWork work{&backend, join_backend<B>, serve<B>};
    const Processors found = start_processors(acpi_tables(), static_cast<u32>(options.cpus), work, options.timeout);
    if (found.running == 1) {
        executor.set_kick(nullptr); // nobody is there to kick it
    }
    all.count = found.running;
    log::info("processors: {} of {} run", found.running, found.listed);
    log::Record("processors")
        .number("listed", found.listed)
        .number("running", found.running)
        .number("left_out", found.left_out);
}

void stop_processors() {
    Executors& all = executors();
    all.stop.store(true, std::memory_order_release); // partner: the acquire in Executor::serve
    for (io::Executor* executor : all.all().subspan(std::min<usize>(all.count, 1))) {
        executor->wake();
    }
    await_stopped();
}

void mark_phase(u32 phase) { cpu::out32(static_cast<u16>(options.marks), phase); }

io::Task<Result<void>> provoke_here(Fault fault) {
    provoke(name(fault));
    co_return Error{Code::not_supported, "this fault did not end the machine"};
}

// What is wrong in the map file is told, and the rest of it counts; the boot goes on, and its verdict is an ERROR in
// the end.
void apply_table(const BootInfo& info) {
    if (info.has_map_file != 0) {
        table.apply(info.map_file_text());
    }
    for (std::string_view rule : options.map.all()) {
        table.apply_word(rule);
    }
    for (const drivers::Diagnostic& wrong : table.diagnostics()) {
        FixedText<240> where;
        if (wrong.line != 0) {
            print(where, "map file, line {}", wrong.line);
        } else {
            where.write("map= on the command line");
        }
        log::error("{}: {}", where.view(), wrong.message.view());
        FixedText<320> message;
        print(message, "{}: {}", where.view(), wrong.message.view());
        log::Record("error").text("code", name(Code::bad_argument)).text("message", message.view());
    }
    plan = table.plan(hv::vm_guest(), options.emulated);
    drivers::log_plan(plan, hv::vm_guest());
}

constinit bool unplugged = false; // the emulated disks, by the host

// A PCI function that is listed or that a driver of this build matches.
struct PciCandidate {
    drivers::pci::Device device;
    bool tried = false; // by a driver: what became of it is in the list of devices
};
struct PciList {
    Vector<PciCandidate> list;
    u32 functions = 0;
    u32 unreachable = 0;
    u32 dropped = 0;

    void count(const drivers::pci::Enumerated& found) {
        functions += found.functions;
        unreachable += found.unreachable;
    }
};

void keep_candidate(void* context, const drivers::pci::Device& device) {
    auto& into = *static_cast<PciList*>(context);
    const bool matches =
        std::ranges::any_of(pci_drivers, [&](const PciDriver& d) { return drivers::pci::matches(d.ids, device); });
    if ((matches || is_listed(device)) && !into.list.push({device})) {
        ++into.dropped;
    }
}

// What ACPI says of the root buses of segment 0.
std::optional<drivers::pci::Roots> ask_for_roots() {
    const acpi::Tables* tables = acpi_tables();
    const acpi::RootBridges found =
        tables != nullptr ? acpi::find_root_bridges(physical_memory(), *tables) : acpi::RootBridges{};
    if (found.bridges == 0 && !found.incomplete) {
        return std::nullopt;
    }
    drivers::pci::Roots roots{.buses = {found.buses}, .others = found.others()};
    for (u32 i = 0; i < acpi::ecam_count(physical_memory(), tables->mcfg); ++i) {
        if (const auto ecam = acpi::ecam(physical_memory(), tables->mcfg, i); ecam && ecam->segment == 0) {
            roots.first = ecam->first_bus;
            roots.last = ecam->last_bus;
        }
    }
    return roots;
}

// Segment 0 through the ports where they are there, else in memory like all other segments.
void find_pci_functions(PciList& into, Devices& devices) {
    static constinit drivers::pci::MechanismOne ports{};
    const u64 mcfg = acpi_tables() != nullptr ? acpi_tables()->mcfg : 0;
    const bool have_ports = ports.present();
    if (have_ports) {
        into.count(drivers::pci::enumerate(ports, keep_candidate, &into, 0, ask_for_roots, mcfg != 0));
    }
    const u32 count = mcfg != 0 ? acpi::ecam_count(physical_memory(), mcfg) : 0;
    for (u32 i = 0; i < count; ++i) {
        const auto at = acpi::ecam(physical_memory(), mcfg, i);
        auto* ecam = at ? new (std::nothrow)
                              drivers::pci::Ecam(device_registers(), at->base, at->first_bus, at->last_bus, at->segment)
                        : nullptr;
        if (at && at->segment == 0 && have_ports) {
            if (ecam != nullptr) {
                ports.use_beyond(*ecam);
            }
            continue;
        }
        if (ecam == nullptr) {
            devices.left_out("ranges of PCI buses", 1, !have_ports || at,
                             at ? "no memory for them" : "the MCFG table has an entry that makes no sense");
            continue;
        }
        const bool first_segment = at->segment == 0;
        into.count(drivers::pci::enumerate(*ecam, keep_candidate, &into, at->first_bus,
                                           first_segment ? ask_for_roots : nullptr, first_segment));
    }
    if (!have_ports && count == 0 && acpi_tables() != nullptr) {
        if (const u64 base = acpi::find_root_bridges(physical_memory(), *acpi_tables()).cba; base != 0) {
            static drivers::pci::Ecam ecam(device_registers(), base, 0, 255);
            into.count(drivers::pci::enumerate(ecam, keep_candidate, &into, 0, ask_for_roots, true));
        }
    }
    if (into.dropped != 0) {
        devices.left_out("PCI functions", into.dropped, true, "no memory for them");
    }
    if (into.unreachable != 0) {
        devices.left_out("places on PCI buses", into.unreachable, true,
                         "their registers cannot be mapped: no memory for page tables, or a bus beyond those of the "
                         "MCFG table");
    }
}

// Devices that a driver was for and that failed it: silent, closed, broken. One that it does not support is left to
// others, and no failure.
void failed_probe(Devices& devices, DeviceEntry entry, const Error& error, std::string_view driver) {
    report(error, driver);
    entry.why = drivers::unused_because(error.code);
    print(entry.reason, "{}: {}", driver, error);
    devices.add(entry);
}

void count_disks(DeviceEntry& entry) { print(entry.reason, "{} {}", entry.disks, noun(entry.disks, "disks")); }

io::Task<Result<void>> probe_pci(drivers::Environment& environment, const PciDriver& driver,
                                 std::span<PciCandidate> candidates, Devices& devices, const Disks& disks) {
    u32 index = 0;
    for (const bool first : {true, false}) {
        for (PciCandidate& candidate : candidates) {
            const drivers::pci::Device& device = candidate.device;
            if (candidate.tried || !drivers::pci::matches(driver.ids, device) ||
                (driver.first != nullptr && driver.first(device)) != first) {
                continue;
            }
            candidate.tried = true;
            DeviceEntry entry = describe(device);
            log::info("{}: probing {} [{}]", driver.name, entry.address.view(), entry.id.view());
            const usize before = disks.all().size();
            auto done = co_await driver.probe(environment, device, index++);
            // QEMU resets a controller whose disks it takes away: it has no ports then, and is not usable.
            const bool reset = !done && unplugged && done.error().code == Code::not_supported;
            if (!done && !reset) {
                failed_probe(devices, entry, done.error(), driver.name);
                continue;
            }
            entry.driver = driver.name;
            entry.disks = static_cast<u32>(disks.all().size() - before);
            if (reset || (entry.disks == 0 && unplugged)) {
                entry.driver = {};
                entry.why = drivers::Unused::unplugged;
                entry.reason.write("the host has taken its disks away, as it was asked to");
            } else {
                count_disks(entry);
            }
            devices.add(entry);
        }
    }
    co_return Result<void>{};
}

// What a driver does not say of a device itself is said here. `bus_name`: what the records call the bus.
io::Task<Result<void>> probe_synthetic(drivers::Environment& environment, const SyntheticDriver& driver,
                                       std::string_view bus_name, void* bus,
                                       std::span<const hv::SyntheticDevice> synthetic, Devices& devices,
                                       const Disks& disks) {
    for (const hv::SyntheticDevice& device : synthetic) {
        if (device.type.view() != driver.type) {
            continue;
        }
        log::info("{}: probing {} {}", driver.name, device.type.view(), device.address.view());
        DeviceEntry entry = describe(device, bus_name);
        const usize before = disks.all().size();
        devices.begin();
        if (auto done = co_await driver.probe(environment, bus, device); !done) {
            // the disk is not claimed: the native driver may have it
            failed_probe(devices, entry, done.error(), driver.name);
        } else if (!devices.added(device.address)) {
            entry.driver = driver.name;
            entry.disks = static_cast<u32>(disks.all().size() - before);
            if (entry.kind == DeviceClass::disk) {
                count_disks(entry);
            }
            devices.add(entry);
        }
    }
    co_return Result<void>{};
}

// A backend's part in what follows, untyped: one copy does for all of them.
struct Given;
struct BackendSide {
    void* bus; // nullptr: there is none, and no synthetic device
    std::string_view name;
    std::span<const SyntheticDriver> synthetic;
    std::span<const SyntheticDriver> services;
    io::Task<Result<void>> (*late)(Given& given); // nullptr: no device comes later
};

// What drivers are given. Static where it is used: a host adds devices, and asks for the end, as long as the machine
// runs.
struct Given {
    Given(const BackendSide& backend, io::Executor& first)
        : side(backend), executor(first), shutdown(first), keeper(first) {}
    BackendSide side;
    io::Executor& executor;
    Devices devices;
    Disks disks{plan, &devices};
    io::Shutdown shutdown;
    // of the drivers in the plan's order; then of the services and of null disks
    std::array<std::optional<Disks::Port>, drivers::Plan::max_drivers + 2> ports;
    io::TaskGroup keeper; // never ended: what its task waits for may be in a device's hands

    drivers::Environment environment(u32 port, std::string_view driver) {
        if (!ports[port]) {
            ports[port].emplace(disks, driver);
        }
        return {executor,          dma_memory(),    interrupts(),
                *ports[port],      options.timeout, options.withheld_features,
                executors().all(), &shutdown,       device_registers()};
    }
};

// Offers these devices to the drivers, in the plan's order; then to the services. What nobody drives is named.
io::Task<Result<void>> probe(Given& given, std::span<const hv::SyntheticDevice> synthetic,
                             std::span<PciCandidate> pci) {
    const std::string_view bus = given.side.name == "hyperv" ? "vmbus" : given.side.name;
    for (u32 i = 0; i < plan.driver_count; ++i) {
        const std::string_view name = plan.order[i];
        drivers::Environment environment = given.environment(i, name);
        for (const PciDriver& driver : pci_drivers) {
            if (driver.name == name) {
                CO_CHECK(co_await probe_pci(environment, driver, pci, given.devices, given.disks));
            }
        }
        for (const SyntheticDriver& driver : given.side.synthetic) {
            if (driver.name == name) {
                CO_CHECK(co_await probe_synthetic(environment, driver, bus, given.side.bus, synthetic, given.devices,
                                                  given.disks));
            }
        }
    }
    drivers::Environment environment = given.environment(plan.driver_count, "services");
    for (const SyntheticDriver& driver : given.side.services) {
        CO_CHECK(
            co_await probe_synthetic(environment, driver, bus, given.side.bus, synthetic, given.devices, given.disks));
    }
    for (const PciCandidate& candidate : pci) {
        if (!candidate.tried) {
            given.devices.add(without_driver(describe(candidate.device)));
        }
    }
    for (const hv::SyntheticDevice& device : synthetic) {
        const auto drives = [&](const SyntheticDriver& driver) { return driver.type == device.type.view(); };
        if (std::ranges::none_of(given.side.synthetic, drives) && std::ranges::none_of(given.side.services, drives)) {
            given.devices.add(without_driver(describe(device, bus)));
        }
    }
    co_return Result<void>{};
}

// Devices of virtio that stand in memory: those that the command line names, and on machines without the old hardware
// those of ACPI.
void name_virtio_mmio(Devices& devices) {
    struct Seen {
        Devices& devices;
        Vector<u64> bases;
    } seen{devices, {}};
    const auto look = [](void* context, u64 base, u32) {
        auto& [into, bases] = *static_cast<Seen*>(context);
        if (std::ranges::find(bases, base) != bases.end()) {
            return;
        }
        static_cast<void>(bases.push(base));
        u32 magic = 0, version = 0, id = 0;
        if (const auto mapped = map_mmio(base, 16)) {
            const auto* registers = reinterpret_cast<const volatile u32*>(*mapped);
            magic = registers[0];
            version = registers[1];
            id = registers[2];
        }
        if (const auto entry = describe_virtio_mmio(base, magic, version, id)) {
            into.add(*entry);
        }
    };
    for (const MmioDevice& device : options.loader.devices()) {
        look(&seen, device.address, 0);
    }
    if (options.loader.devices_dropped != 0) {
        devices.left_out("virtio_mmio.device words", options.loader.devices_dropped, true,
                         "there are more than this kernel looks at");
    }
    const acpi::Tables* tables = acpi_tables();
    if (tables != nullptr && tables->fadt && tables->fadt->hardware_reduced) {
        if (const u32 without = acpi::find_virtio_mmio(physical_memory(), *tables, look, &seen); without != 0) {
            devices.left_out("virtio-mmio devices of ACPI", without, true,
                             "their address is computed, and nothing here interprets AML");
        }
    }
}

// Disks without a device, for a command line that names them.
void attach_null_disks(Given& given) {
    drivers::Environment environment = given.environment(plan.driver_count + 1, "null");
    for (u32 i = 0, count = null_disks(options.disk.names.all()); i < count; ++i) {
        if (auto attached = drivers::null::attach(environment, i); !attached) {
            given.devices.left_out("null disks", count - i, true, attached.error().message);
            return;
        }
    }
}

constexpr std::string_view no_room = "no room for them";

// What of the machine's description was not used.
void name_left_out(const BootInfo& info, const hv::DeviceList& synthetic, Devices& devices) {
    if (synthetic.dropped != 0) {
        devices.left_out("synthetic devices", synthetic.dropped, true, no_room);
    }
    if (info.ranges_truncated != 0) {
        devices.left_out("memory ranges", info.ranges_truncated, false,
                         "the memory map has more ranges than this kernel takes");
    }
    const acpi::Tables* tables = acpi_tables();
    if (tables == nullptr) {
        return;
    }
    FixedText<120> reason;
    for (const acpi::Damage& damage : tables->all_damages()) {
        reason.clear();
        print(reason, "{} at {:#x}, length {}, {}", damage.name(), damage.address, damage.length, damage.what());
        devices.left_out("ACPI tables", 1, damage.name() == "MCFG" && !drivers::pci::MechanismOne{}.present(), reason);
    }
    if (tables->damaged > tables->all_damages().size()) {
        devices.left_out("ACPI tables", tables->damaged - tables->all_damages().size(), false, "damaged, too");
    }
    if (tables->dropped != 0) {
        devices.left_out("ACPI tables", tables->dropped, false, "there are more than this kernel looks at");
    }
    if (tables->madt) {
        const acpi::Madt& madt = *tables->madt;
        const auto beyond = [&](u32 count, std::string_view what) {
            if (count != 0) {
                devices.left_out(what, count, false, "the MADT has more than this kernel takes");
            }
        };
        beyond(madt.processors_dropped, "processors");
        beyond(madt.io_apics_dropped, "IOAPICs");
        beyond(madt.overrides_dropped, "interrupt overrides");
        if (madt.bytes_dropped != 0) {
            devices.left_out("bytes of the MADT", madt.bytes_dropped, false,
                             "they come after an entry of impossible length");
        }
    }
}

// Devices that come later, or that come again: one after the other, under the same rules. Those that wait stand in the
// bus's list.
template <hv::LateDevices B>
io::Task<Result<void>> probe_late(Given& given) {
    auto& bus = *static_cast<typename B::Bus*>(given.side.bus);
    u32 told = 0;
    u32 dropped = 0; // and not told: a host may offer without end, and the log has an end
    for (;;) {
        static_cast<void>(co_await bus.news().wait());
        dropped += bus.new_dropped();
        if (dropped > told / 2) {
            given.devices.left_out("synthetic devices", dropped, true, no_room);
            told += std::exchange(dropped, 0);
        }
        while (const auto device = bus.next_device()) {
            if (given.shutdown.requested()) {
                co_return Result<void>{};
            }
            if (auto done = co_await probe(given, {&*device, 1}, {}); !done) {
                report(done.error(), B::name);
            }
        }
    }
}

template <class B>
BackendSide side_of(B& backend) {
    BackendSide side{nullptr, B::name, synthetic_drivers<B>, service_drivers<B>, nullptr};
    if constexpr (hv::BusRoot<B>) {
        side.bus = backend.bus();
    }
    if constexpr (hv::LateDevices<B>) {
        side.late = side.bus != nullptr ? probe_late<B> : nullptr;
    }
    return side;
}

// What of the machine could not be used, where the job itself has succeeded.
void judge(Outcome& outcome, const BootInfo& info, const Devices& devices) {
    FixedText<240> reason;
    if (devices.failures() != 0) {
        print(reason, "{} {} could not be taken into use (see the errors above); the job itself succeeded",
              devices.failures(), noun(devices.failures(), "devices"));
    } else if (devices.disk_left_out()) {
        reason.write(
            "something was left out, and a disk may be among it (see the left_out records); the job itself succeeded");
    } else if (table.wrong() != 0 || info.map_file_truncated != 0) {
        print(reason, "{} malformed {} in the map file{}; the rest of it counted, and the job itself succeeded",
              table.wrong(), noun(table.wrong(), "lines"), info.map_file_truncated != 0 ? ", which is cut" : "");
    } else {
        return;
    }
    outcome = {Verdict::error, reason};
}

// From the list of devices to the verdict.
io::Task<Result<Outcome>> probe_and_run(const BootInfo& info, BackendSide side, io::Executor& executor,
                                        const hv::DeviceList& synthetic) {
    static Given given(side, executor); // larger than a coroutine frame may be
    static PciList pci;
    find_pci_functions(pci, given.devices);
    log::info("devices: {} synthetic, {} PCI {}", synthetic.count(), pci.functions, noun(pci.functions, "functions"));
    CO_CHECK(co_await probe(given, synthetic.all(), {pci.list.begin(), pci.list.size()}));
    attach_null_disks(given);
    name_virtio_mmio(given.devices);
    name_left_out(info, synthetic, given.devices);
    if (side.late != nullptr) {
        if (auto kept = given.keeper.spawn(side.late(given)); !kept) {
            log::warning("devices that come later will not be noticed: {}", kept.error());
        }
    }
    Result<Outcome> outcome = co_await run_until_shutdown(options, given.disks,
                                                          {executor, dma_memory(), heap_allocations, executors().all(),
                                                           options.marks != 0 ? mark_phase : nullptr, clock_assumed(),
                                                           clock_ahead(), &given.devices},
                                                          given.shutdown);
    given.devices.list(); // of a job that was given up
    if (const u64 lost = frames().lost_bytes(); lost != 0) {
        given.devices.left_out("bytes of memory", lost, false,
                               "the list of free ranges was full when they were given back");
    }
    if (outcome && outcome->verdict == Verdict::success) {
        judge(*outcome, info, given.devices);
    }
    co_return outcome;
}

// Everything behind the defined point: `backend` is final, nothing has been probed.
template <class B>
io::Task<Result<Outcome>> kernel_main(const BootInfo& info, const hv::Sightings& sightings, B& backend,
                                      io::Executor& executor) {
    apply_table(info);
    if (options.job == Job::panic) { // on another processor than the first one, or it would not have come here
        if (options.processor >= executors().count) {
            co_return Outcome{Verdict::error,
                              FixedText<240>("processor= on the command line names a processor that does not run")};
        }
        CO_CHECK(co_await io::run_on(*executors().list[options.processor], provoke_here(options.fault)));
    }
    if (table.wrong_word()) {
        co_return Outcome{Verdict::error,
                          FixedText<240>("a rule of map= on the command line is malformed; nothing has been probed")};
    }
    const Instant first_probe = now();
    if constexpr (hv::EmulatedDevices<B>) {
        if (plan.unplugs("ata")) {
            auto done = backend.unplug({.disks = true});
            if (done) {
                unplugged = true;
                log::info("emulated IDE disks unplugged");
            } else {
                log::warning("emulated IDE disks stay: {}", done.error());
            }
        }
    }

    // Static: larger than a coroutine frame may be.
    static constinit hv::DeviceList synthetic{};
    if constexpr (hv::BusRoot<B>) {
        if (auto* const bus = backend.bus()) {
            if (auto done = co_await bus->enumerate(synthetic); !done) {
                report(done.error(), B::name); // native devices are still there
            }
        }
    }
    boot_record(info, sightings, B::name, first_probe);
    co_return co_await probe_and_run(info, side_of(backend), executor, synthetic);
}

[[noreturn]] void end(const Result<Outcome>& outcome) {
    if (!outcome) {
        report(outcome.error(), "boot");
        end_vm(Verdict::error, outcome.error().message);
    }
    end_vm(outcome->verdict, outcome->reason.view());
}

} // namespace

[[noreturn]] void kernel_start(BootInfo& info) {
    new (&options) Options;
    new (&table) drivers::Table;
    moments.entry = info.entry_tsc;
    hv::read_cpuid(cpuid_snapshot);
    std::optional<Smbios> smbios;
    if (cpuid_snapshot.hypervisors().empty()) { // the older way, only where it is needed
        if (auto read = read_smbios(physical_memory(), info.smbios)) {
            smbios = *read;
        }
    }
    const hv::Sightings sightings = hv::detect(cpuid_snapshot, smbios ? &*smbios : nullptr);
    const bool understood = parse_options(info.cmdline_text(), options, option_errors);
    const hv::Choice choice = hv::choose(sightings, options.hv);
    hv::set_vm_guest(choice.guest);
    moments.detected = cpu::read_tsc();

    log::set_level(options.log);
    print_boot_info(info);
    print_loader_words(options.loader);
    hv::log_detection(cpuid_snapshot, sightings, choice);
    if (info.cmdline_truncated != 0) { // what is missing may change what is there
        end_vm(Verdict::error,
               info.cmdline_truncated == BootInfo::unreadable
                   ? "the command line could not be read: the loader put it outside of the memory that it describes"
                   : "the command line is longer than 4096 bytes: a shorter one, or a map file for its rules");
    }
    if (!understood) {
        for (const auto& message : option_errors.all()) {
            log::error("{}", message.view());
            log::Record("error").text("code", name(Code::bad_argument)).text("message", message.view());
        }
        end_vm(Verdict::error, option_errors.all()[0].view());
    }
    if (info.range_count == 0) {
        end_vm(Verdict::error, "the loader gave no memory map: a PVH loader must hand over a start_info of version 1 "
                               "(Xen 4.11 or later, QEMU 4.0 or later)");
    }
    if (options.job == Job::panic && options.processor == 0) {
        provoke(name(options.fault));
    }

    hv::Environment environment{cpuid_snapshot, sightings, dma_memory(), kernel_memory, privileged};
    hv::with_backend(hv::list, choice, environment, [&]<class B>(B& first) {
        if (auto tables = start_acpi(info.rsdp); !tables) {
            log::info("no ACPI: {}", tables.error());
        } else if (info.rsdp == 0) {
            log::info("ACPI: RSDP found at {:#x}", acpi_tables()->rsdp);
        }
        start_clock(info.entry_tsc, acpi_tables(), {first.tsc_hz().value_or(0), first.clock_name()});
        log::set_clock([] { return now(); });
        // QEMU's TCG with instruction counting stops at x2APIC accesses ("Bad icount read"); everywhere else they are
        // the cheaper ones.
        start_interrupts(acpi_tables(), {.x2apic = hv::vm_guest() != hv::VmGuest::tcg,
                                         .extended_destinations = hv::offers_extended_destinations(sightings)});
        if (auto timer = start_timer(interrupts()); !timer) {
            log::warning("no timer, the processor will not sleep: {}", timer.error());
        }
        log::info("clock {} at {} kHz, timer {}, interrupts by {}", clock_name(), tsc_hz() / 1000, timer_name(),
                  interrupt_controllers());
        static io::Executor executor({platform_context(0), platform_now, platform_idle});
        hv::Services services{interrupts(), executor, options.timeout};
        cpu::interrupts_on();
        hv::upgrade(hv::list, choice, environment, services, first, [&]<class F>(F& backend) {
            if constexpr (hv::Console<F>) {
                if (log::Sink* console = backend.console()) {
                    log::attach(*console);
                }
            }
            log::keep(false);                    // no console comes later
            if (choice.when == hv::When::late) { // it has not been asked yet
                correct_clock({backend.tsc_hz().value_or(0), backend.clock_name()});
                log::info("clock {} at {} kHz", clock_name(), tsc_hz() / 1000);
            }
            if (clock_assumed()) {
                log::warning(
                    "the clock's rate is a guess: no hypervisor tells the time stamp counter's frequency, and neither "
                    "an ACPI timer nor a "
                    "PIT counts here; {} kHz is assumed, and every time that is printed is wrong by the same factor",
                    tsc_hz() / 1000);
            }
            // Its name is that of its code, which may serve more: QEMU's TCG is served by kvm.
            if (name(hv::vm_guest()) == F::name) {
                log::info("backend: {}", F::name);
            } else {
                log::info("backend: {}, for vm_guest {}", F::name, hv::vm_guest());
            }
            choose_timer(backend);
            use_processors(backend, executor);
            const Result<Outcome> outcome = executor.run(kernel_main(info, sightings, backend, executor));
            stop_processors();
            if constexpr (hv::TearDown<F>) {
                backend.uninstall();
            }
            end(outcome);
        });
    });
    end_vm(Verdict::crash, "the kernel's main function returned");
}

} // namespace fl::boot
