// The kernel proper: detects the hypervisor, chooses and installs a backend; starts clock, interrupts and executors;
// then applies the driver table, binds devices, runs the job and reports the verdict.
module;
#include "core/try.hpp"
module boot.start;
import core.std;
import core.acpi;
import core.cpuid;
import core.dma;
import core.interrupt;
import core.log;
import core.physical;
import core.processor;
import core.result;
import core.smbios;
import core.text;
import core.time;
import core.timer;
import core.verdict;
import core.memory;
import core.machine.acpi;
import core.machine.clock;
import core.machine.cpu;
import core.machine.exit;
import core.machine.interrupts;
import core.machine.memory;
import core.machine.runtime;
import core.machine.traps;
import io.executor;
import io.run_on;
import io.shutdown;
import io.task;
import hv.list;
import hv.machine.detect;
import hv.machine.privileged;
import drivers.driver;
import drivers.table;
import boot.backend;
import boot.binder;
import boot.devices;
import boot.disks;
import boot.drivers;
import boot.handoff;
import boot.jobs;
import boot.options;
import boot.report;
import boot.shutdown;
import boot.sinks;
import boot.sources;
import boot.machine.ending;
import boot.machine.processors;
import boot.machine.hotplug;
import boot.machine.sources;

namespace fl::boot {

namespace {

// An object constructed once, by make(), that lives as long as the machine. In static storage, since the boot stack and
// coroutine frames are small. Zero until constructed, so that it goes into .bss instead of taking its full size in the
// image file.
template <class T>
union Later {
    u8 nothing;
    T value;
    constexpr Later() : nothing(0) {}
    constexpr ~Later() {} // the value is never destroyed
    template <class... Args>
    T& make(Args&&... args) {
        return *new (&value) T(std::forward<Args>(args)...);
    }
};

class KernelMemory final : public hv::PhysicalMemory {
  public:
    Result<std::byte*> map(u64 physical, u64 size) override { return map_physical(physical, size); }
    u64 physical_of(const void* address) override { return fl::physical_of(address); }
};

constinit CpuidSnapshot cpuid_snapshot{};
constinit Later<Options> options_place;
Options& options = options_place.value;
constinit OptionErrors option_errors{};
constinit Later<drivers::Table> table_place;
drivers::Table& table = table_place.value;
constinit drivers::Plan plan{};
constinit hv::MachinePrivileged privileged{};
constinit KernelMemory kernel_memory{};

// Time stamp counter values taken before the clock runs.
struct Moments {
    u64 entry = 0;
    u64 detected = 0;
};
constinit Moments moments{};

class KernelDrivers final : public DriverMachine {
  public:
    explicit KernelDrivers(io::Executor& executor) : executor_(executor) {}
    drivers::Environment environment(DriverSinks& sinks, io::Shutdown& shutdown) override {
        return {.executor = executor_,
                .dma = dma_memory(),
                .interrupts = interrupts(),
                .disks = sinks.disks,
                .timeout = options.timeout,
                .withheld_features = options.withheld_features,
                .executors = boot::executors(),
                .shutdown = &shutdown,
                .mmio = device_registers(),
                .devices = &sinks.devices,
                .nets = &sinks.nets,
                .asked_features = &asked_features_};
    }

    std::span<io::Executor* const> executors() override { return boot::executors(); }
    /// Of the features that the command line withholds, those that no driver has asked about.
    u32 unasked_features() const {
        const u32 of_backend = hv::vm_guest() == hv::VmGuest::xen ? to_underlying(drivers::Feature::fifo_events) : 0;
        return options.withheld_features & ~of_backend & ~asked_features_.load(std::memory_order_relaxed);
    }

  private:
    io::Executor& executor_;
    std::atomic<u32> asked_features_{0};
};

// The device sources and the binder.
struct Machine {
    Machine(Backend& backend, io::Executor& executor)
        : drivers(executor), binder(executor, plan, drivers), synthetic(backend),
          null(null_disks(options.disk.names.all())), tasks(executor) {}
    KernelDrivers drivers;
    Binder binder;
    PciSource pci{pci_drivers};
    SyntheticSource synthetic;
    VirtioMmioSource virtio_mmio{virtio_mmio_drivers};
    NullSource null;
    io::TaskGroup tasks;
};
constinit Later<Machine> machine_place;

// Runs before secondary processors start. An error is only a warning: the processor's own timer remains in use.
void choose_timer(Backend& backend) {
    if (options.timer == TimerChoice::processor || (options.timer == TimerChoice::automatic && timer_is_deadline())) {
        return;
    }
    if (OneShotTimer* const given = backend.timer()) {
        if (auto taken = use_timer(*given); !taken) {
            log::warning("timer {} remains in use: {}", timer_name(), taken.error());
        } else {
            log::info("timer {}", timer_name());
        }
    } else if (options.timer == TimerChoice::hypervisor) {
        log::warning("timer=hypervisor: {} has no timer, {} remains in use", backend.name(), timer_name());
    }
}

constinit Backend* stolen_from = nullptr;
std::optional<Nanoseconds> stolen_time() { return stolen_from->stolen(); }

void mark_phase(u32 phase) { cpu::out32(static_cast<u16>(options.marks), phase); }

io::Task<Result<void>> provoke_here(Fault fault) {
    provoke(name(fault));
    co_return Error{Code::not_supported, "this fault did not end the machine"};
}

// A malformed rule in the map file is reported and skipped; the boot continues and ends with verdict ERROR.
void apply_table(const BootInfo& info) {
    if (info.has_map_file != 0) {
        table.apply(info.map_file_text());
    }
    for (std::string_view rule : options.map.all()) {
        table.apply_word(rule);
    }
    print_diagnostics(table);
    plan = table.plan(hv::vm_guest(), options.emulated);
    drivers::log_plan(plan, hv::vm_guest());
}

BootFacts boot_facts(const Backend& backend, Instant first_probe) {
    const CycleScale scale(tsc_hz());
    return {.backend = backend.name(),
            .clock = clock_name(),
            .tsc_hz = tsc_hz(),
            .clock_assumed = clock_assumed(),
            .detected = scale.ns(moments.detected - moments.entry),
            .first_probe = first_probe - std::min(first_probe, clock_ahead())};
}

// Finds the devices that are not on the backend's bus, and reports everything left out.
void find_devices(Machine& machine, const BootInfo& info) {
    Devices& devices = machine.binder.devices();
    find_pci_functions(machine.pci, devices);
    log::info("devices: {} synthetic, {} PCI {}", machine.synthetic.count(), machine.pci.functions(),
              plural(machine.pci.functions(), "functions"));
    find_virtio_mmio(machine.virtio_mmio, options.loader);
    report_left_out(table, plan, devices);
    report_left_out(info, acpi_tables(), has_config_ports(), devices);
    machine.binder.add(machine.pci);
    machine.binder.add(machine.synthetic);
    machine.binder.add(machine.virtio_mmio);
    machine.binder.add(machine.null);
}

// Runs from the defined point on: `backend` is final, and nothing has been probed.
io::Task<Result<Outcome>> kernel_main(const BootInfo& info, const hv::Sightings& sightings, Backend& backend,
                                      io::Executor& executor) {
    apply_table(info);
    if (options.job == Job::panic) { // on a secondary processor; on the boot processor it has happened already
        if (options.processor >= executors().size()) {
            co_return Outcome{Verdict::error,
                              FixedText<240>("processor= on the command line names a processor that does not run")};
        }
        CO_CHECK(co_await io::run_on(*executors()[options.processor], provoke_here(options.fault)));
    }
    if (table.wrong_word()) {
        co_return Outcome{Verdict::error,
                          FixedText<240>("a rule of map= on the command line is malformed; nothing has been probed")};
    }
    stolen_from = &backend;
    Machine& machine = machine_place.make(backend, executor);
    Binder& binder = machine.binder;
    const Instant first_probe = now();
    binder.unplug(backend);
    if (auto done = co_await machine.synthetic.enumerate(); !done) {
        report(done.error(), backend.name()); // native devices are still available
    }
    boot_record(info, sightings, boot_facts(backend, first_probe));
    find_devices(machine, info);
    CO_CHECK(co_await binder.bind());
    if (const u32 unasked = machine.drivers.unasked_features(); unasked != 0) {
        log::warning("features={} has no effect: no driver of a device in this machine uses it",
                     feature_words(unasked));
    }
    binder.watch();
    if (options.job != Job::boot) { // which ends at once
        watch_pci_hotplug(machine.pci, executor, interrupts(), device_registers(), machine.tasks);
    }
    Result<Outcome> outcome = co_await run_until_shutdown(
        options, binder.disks(),
        {executor, dma_memory(), heap_allocations, executors(), options.marks != 0 ? mark_phase : nullptr,
         clock_assumed(), clock_ahead(), &binder.devices(), &binder.nets(), cpu::read_tsc(), stolen_time},
        binder.shutdown());
    binder.devices().list(); // for a job that was cancelled
    if (const u64 lost = frames().lost_bytes(); lost != 0) {
        binder.devices().left_out("bytes of memory", lost, false,
                                  "the list of free ranges was full when they were given back");
    }
    if (outcome) {
        judge(*outcome, binder.devices(), table.wrong(), info.map_file_truncated != 0);
    }
    co_return outcome;
}

[[noreturn]] void end(const Result<Outcome>& outcome) {
    if (!outcome) {
        report(outcome.error(), "boot");
        end_vm(Verdict::error, outcome.error().message);
    }
    if (outcome->restart) {
        end_by_restart();
    }
    end_vm(outcome->verdict, outcome->reason.view());
}

// Ends the machine on loader or command line errors that prevent the boot.
void check_handoff(const BootInfo& info, bool options_understood) {
    if (info.cmdline_truncated != 0) { // what was cut off may change the meaning of the rest
        end_vm(Verdict::error,
               info.cmdline_truncated == BootInfo::unreadable
                   ? "the command line could not be read: the loader put it outside of the memory that it describes"
                   : "the command line is longer than 4096 bytes: a shorter one, or a map file for its rules");
    }
    if (!options_understood) {
        print_option_errors(option_errors);
        end_vm(Verdict::error, option_errors.all()[0].view());
    }
    if (info.range_count == 0) {
        end_vm(Verdict::error, "the loader gave no memory map: a PVH loader must hand over a start_info of version 1 "
                               "(Xen 4.11 or later, QEMU 4.0 or later)");
    }
}

// With the first backend installed: starts ACPI tables, clock, interrupts and timer.
void start_machine(const BootInfo& info, const hv::Sightings& sightings, ClockHint clock) {
    if (auto tables = start_acpi(info.rsdp); !tables) {
        log::info("no ACPI: {}", tables.error());
    } else if (info.rsdp == 0) {
        log::info("ACPI: RSDP found at {:#x}", acpi_tables()->rsdp);
    }
    start_clock(info.entry_tsc, acpi_tables(), clock);
    log::set_clock([] { return now(); });
    // QEMU's TCG with instruction counting stops at x2APIC accesses ("Bad icount read"); elsewhere x2APIC accesses are
    // cheaper.
    start_interrupts(acpi_tables(), {.x2apic = hv::vm_guest() != hv::VmGuest::tcg,
                                     .extended_destinations = hv::offers_extended_destinations(sightings)});
    if (auto timer = start_timer(interrupts()); !timer) {
        log::warning("no timer, the processor will not sleep: {}", timer.error());
    }
    log::info("clock {} at {} kHz, timer {}, interrupts by {}", clock_name(), tsc_hz() / 1000, timer_name(),
              interrupt_controllers());
}

// Runs from the defined point on. `when`: if late, the backend was installed after the clock started and corrects it.
[[noreturn]] void run(const BootInfo& info, const hv::Sightings& sightings, hv::When when, Backend& backend,
                      io::Executor& executor) {
    if (log::Sink* console = backend.console()) {
        log::attach(*console);
    }
    log::keep_history(false); // no further console will be attached
    if (when == hv::When::late) {
        correct_clock({backend.tsc_hz().value_or(0), backend.clock_name()});
        log::info("clock {} at {} kHz", clock_name(), tsc_hz() / 1000);
    }
    if (clock_assumed()) {
        log::warning(
            "the clock's rate is a guess: no hypervisor gives the time stamp counter's frequency, and neither an ACPI "
            "timer nor a PIT counts; {} kHz is assumed, and all printed times are wrong by the same factor",
            tsc_hz() / 1000);
    }
    // A backend is named after its code, which may serve several hypervisors: kvm also serves QEMU's TCG.
    if (name(hv::vm_guest()) == backend.name()) {
        log::info("backend: {}", backend.name());
    } else {
        log::info("backend: {}, for vm_guest {}", backend.name(), hv::vm_guest());
    }
    choose_timer(backend);
    start_executors(backend, executor, static_cast<u32>(options.cpus), options.timeout);
    for (io::Executor* each : executors()) {
        each->set_wait(options.wait.value_or(io::Wait::interrupt));
        each->time_sleep(options.wait.has_value());
    }
    const Result<Outcome> outcome = executor.run(kernel_main(info, sightings, backend, executor));
    stop_executors();
    backend.uninstall();
    end(outcome);
}

} // namespace

[[noreturn]] void kernel_start(BootInfo& info) {
    options_place.make();
    table_place.make();
    moments.entry = info.entry_tsc;
    hv::read_cpuid(cpuid_snapshot);
    std::optional<Smbios> smbios;
    if (cpuid_snapshot.hypervisors().empty()) { // older detection method, only if CPUID shows no hypervisor
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
    check_handoff(info, understood);
    if (options.job == Job::panic && options.processor == 0) {
        provoke(name(options.fault));
    }

    static constinit Later<io::Executor> executor_place;
    hv::Environment environment{cpuid_snapshot, sightings, dma_memory(), kernel_memory, privileged};
    environment.fifo_events = (options.withheld_features & to_underlying(drivers::Feature::fifo_events)) == 0;
    hv::with_backend(hv::list, choice, environment, [&](auto& first) {
        start_machine(info, sightings, {first.tsc_hz().value_or(0), first.clock_name()});
        io::Executor& executor = executor_place.make(io::Platform{platform_context(0), platform_now, platform_idle,
                                                                  nullptr, io::Platform::longest_turn, platform_rearm});
        hv::Services services{interrupts(), executor, options.timeout};
        cpu::interrupts_on();
        hv::upgrade(hv::list, choice, environment, services, first, [&]<class B>(B& backend) {
            BackendOf<B> side(backend, bus_drivers<B>);
            run(info, sightings, choice.when, side, executor);
        });
    });
    end_vm(Verdict::crash, "the kernel's main function returned");
}

} // namespace fl::boot
