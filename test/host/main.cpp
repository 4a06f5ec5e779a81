// The test host's main program: command line, machine, kernel, disks; then this thread becomes the I/O thread.
#include "acpi/dsdt.hpp"
#include "command_line.hpp"

#include <cstdio>
#include <cstdlib>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

import host.std;
import core.result;
import host.faults;
import host.latency;
import host.services;
import host.storvsp;
import host.transfers;
import host.vmbus;
import vmm.acpi;
import vmm.bus;
import vmm.image;
import vmm.loader;
import vmm.machine;
import vmm.media;

namespace fl::vmm {
namespace {

/// Prints the reason in one line to standard error, with the error's details, and exits.
[[noreturn]] void give_up(ExitCode code, const std::string& what, const Error& error) {
    std::string text = "firstlight-testhost: " + what + std::string(error.message);
    if (error.has_values) {
        text += " (expected " + std::to_string(error.expected) + ", seen " + std::to_string(error.seen) + ")";
    }
    std::fprintf(stderr, "%s\n", text.c_str());
    std::exit(static_cast<int>(code));
}

template <class T>
T expect(Result<T> result, ExitCode code, const std::string& what) {
    if (!result) {
        give_up(code, what, result.error());
    }
    return *std::move(result);
}

void load(Machine& machine, const Options& options) {
    const auto dsdt = std::as_bytes(std::span{firstlight_dsdt, firstlight_dsdt_end});
    Payload payload{.command_line = options.append};
    payload.rsdp = expect(write_acpi(machine.memory(), dsdt, std::max(options.processors, options.listed_processors)),
                          ExitCode::host, "ACPI: ");
    if (options.no_rsdp) {
        payload.rsdp = 0;
    }
    const auto kernel = expect(whole_file(options.kernel), ExitCode::input, options.kernel + ": ");
    if (!options.module.empty()) {
        payload.module = expect(whole_file(options.module), ExitCode::input, options.module + ": ");
    }
    const auto entry = is_elf(kernel)       ? load_pvh(machine.memory(), kernel, payload)
                       : is_bzimage(kernel) ? load_bzimage(machine.memory(), kernel, payload)
                                            : Result<Entry>{Error{Code::bad_argument, "neither an ELF nor a bzImage"}};
    const Entry start = expect(entry, ExitCode::input, options.kernel + ": ");
    if (const auto prepared = machine.prepare(start); !prepared) {
        give_up(ExitCode::host, "", prepared.error());
    }
}

/// The images by file name; a file named twice is one image.
class Images {
  public:
    Image& open(const std::string& file, bool read_only) {
        auto& image = images_[file];
        if (!image) {
            image = expect(Image::open(file, read_only), ExitCode::input, file + ": ");
        }
        return *image;
    }
    host::BlockStore& store(const std::string& file, bool read_only) {
        return *stores_.emplace_back(std::make_unique<ImageStore>(open(file, read_only), read_only));
    }

  private:
    std::map<std::string, std::unique_ptr<Image>> images_;
    std::vector<std::unique_ptr<ImageStore>> stores_;
};

/// "6.2" as 0x0602.
u16 storage_version_of(const std::string& text) {
    u32 major = 0;
    u32 minor = 0;
    const char* const end = text.data() + text.size();
    const auto first = std::from_chars(text.data(), end, major);
    const bool good = first.ec == std::errc{} && first.ptr != end && *first.ptr == '.';
    if (!good || std::from_chars(first.ptr + 1, end, minor).ptr != end || major > 255 || minor > 255) {
        give_up(ExitCode::usage, "--storage-versions " + text + ": ",
                Error{Code::bad_argument, "MAJOR.MINOR was expected, as in 6.2"});
    }
    return host::storage_version(static_cast<u8>(major), static_cast<u8>(minor));
}

host::ServerConfig server_config(const Options& options) {
    host::ServerConfig config;
    config.processors = options.processors;
    config.maximum_version = options.version;
    config.monitor_pages = options.monitor_pages;
    config.verbose = options.verbose;
    if (!options.fault.empty()) {
        config.fault = expect(host::parse_fault(options.fault), ExitCode::usage, "--fault " + options.fault + ": ");
    }
    return config;
}

/// What makes the host answer later (--io, --latency); empty for `inline`.
struct Later {
    std::unique_ptr<host::Medium> medium;
    std::unique_ptr<host::Transfers> transfers;
    std::optional<host::Latency> latency;
    int ended = -1; // readable when a transfer has ended
};

Later later_of(const Options& options) {
    Later later;
    if (!options.latency.empty()) {
        std::string wrong;
        later.latency = host::Latency::parse(options.latency, options.latency_seed, wrong);
        if (!later.latency) {
            give_up(ExitCode::usage, "--latency: " + wrong, Error{Code::bad_argument, ""});
        }
        if (options.io == "inline") {
            give_up(ExitCode::usage, "--latency " + options.latency + ": ",
                    Error{Code::bad_argument,
                          "--io thread or --io uring was expected, not inline, which would keep the "
                          "guest's processor in its exit so long"});
        }
    }
    if (options.io == "uring") {
        auto made = UringMedium::create();
        if (!made) {
            give_up(made.error().code == Code::not_supported ? ExitCode::missing : ExitCode::host,
                    "--io uring: ", made.error());
        }
        later.ended = (*made)->descriptor();
        later.medium = *std::move(made);
    } else if (options.io == "thread") {
        later.medium = std::make_unique<BlockingMedium>();
    }
    if (later.medium) {
        later.transfers = std::make_unique<host::Transfers>(*later.medium);
    }
    return later;
}

/// Adds all disks to the bus. The last SCSI disk, or its controller, is the one that is hot-added or removed: if it is
/// to be added later, it is omitted here.
HotplugDisk add_disks(Bus& bus, Images& images, const Options& options, Later& later) {
    const bool added_later = options.hot_add > 0 || !options.add_marker.empty();
    const bool controller_added_later = options.hot_controller > 0 || !options.controller_marker.empty();
    host::StorageConfig config;
    config.sub_channels = static_cast<u16>(options.sub_channels);
    config.maximum_transfer = options.transfer;
    config.transfers = later.transfers.get();
    config.latency = later.latency ? &*later.latency : nullptr;
    if (!options.storage_versions.empty()) {
        config.versions.clear();
        std::ranges::transform(options.storage_versions, std::back_inserter(config.versions), storage_version_of);
    }
    std::map<u32, std::vector<host::LunConfig>> controllers;
    const DiskOption* last = nullptr;
    for (const DiskOption& disk : options.disks) {
        last = disk.ide ? last : &disk;
    }
    HotplugDisk hotplug;
    for (const DiskOption& disk : options.disks) {
        host::LunConfig lun;
        lun.lun = static_cast<u8>(disk.ide ? 0 : disk.lun);
        lun.store = &images.store(disk.file, disk.read_only);
        lun.block_size = disk.sector;
        lun.iops = disk.iops;
        lun.serial = (disk.ide ? "FLIDE" : "FLSCSI") + std::to_string(disk.controller * 64 + disk.lun);
        if (disk.ide) {
            config.number = disk.position;
            bus.add(host::StorageDevice::ide(static_cast<u8>(disk.position / 2), static_cast<u8>(disk.position % 2),
                                             config, lun));
            continue;
        }
        auto& luns = controllers[disk.controller];
        if (&disk == last) {
            hotplug.lun = lun;
        }
        if (&disk != last || !added_later) {
            luns.push_back(lun);
        }
    }
    for (auto& [number, luns] : controllers) {
        config.number = number;
        const bool hotplugged = last->controller == number;
        if (hotplugged) {
            hotplug.config = config;
            hotplug.luns = luns;
        }
        if (!hotplugged || !controller_added_later) {
            auto& controller = bus.add(host::StorageDevice::scsi(config, luns));
            hotplug.controller = hotplugged ? &controller : hotplug.controller;
        }
    }
    return hotplug;
}

/// One-time actions: after a time, or when the guest prints a text.
class Schedule {
  public:
    Schedule(Machine& machine, Bus& bus, const Options& options, HotplugDisk hotplug, host::ShutdownService& shutdown)
        : machine_(machine), bus_(bus), hotplug_(std::move(hotplug)), shutdown_(shutdown), begin_(machine.now()),
          wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
          steps_{{
              {"hot-add", options.hot_add, options.add_marker},
              {"hot-remove", options.hot_remove, options.remove_marker},
              {"shutdown", options.shutdown_after, options.shutdown_marker},
              {"hot-controller", options.hot_controller, options.controller_marker},
              {"offer-again", options.offer_again, options.again_marker},
          }} {
        machine.set_line_watcher(&see, this);
    }
    int wake() const { return wake_; }
    /// Nanoseconds from the start; ~0: never.
    u64 deadline() const {
        u64 next = ~u64{0};
        for (const Step& step : steps_) {
            if (!step.done && step.seconds > 0) {
                next = std::min(next, begin_ + static_cast<u64>(step.seconds * 1e9));
            }
        }
        return next;
    }
    void run_due(u64 now) {
        u64 value = 0;
        [[maybe_unused]] const auto consumed = read(wake_, &value, sizeof(value));
        for (Step& step : steps_) {
            const bool due = step.seconds > 0 && now >= begin_ + static_cast<u64>(step.seconds * 1e9);
            // Pairs with see(): only the flag itself is passed.
            if (!step.done && (due || step.seen.load(std::memory_order_relaxed))) {
                step.done = true;
                act(step);
            }
        }
    }

  private:
    struct Step {
        std::string_view name;
        double seconds;
        std::string marker;
        std::atomic<bool> seen = false;
        bool done = false;
    };
    static void see(void* context, std::string_view line) {
        Schedule& self = *static_cast<Schedule*>(context);
        for (Step& step : self.steps_) {
            if (!step.marker.empty() && line.find(step.marker) != std::string_view::npos) {
                step.seen.store(true, std::memory_order_relaxed);
                const u64 one = 1;
                [[maybe_unused]] const auto written = write(self.wake_, &one, sizeof(one));
            }
        }
    }
    void act(const Step& step) {
        bool done = true;
        bus_.with_server([&] {
            if (step.name == "shutdown") {
                shutdown_.request_shutdown();
            } else if (step.name == "hot-controller") {
                done = hotplug_.controller == nullptr && !hotplug_.luns.empty();
                if (done) {
                    offer_controller();
                }
            } else if (hotplug_.controller == nullptr) {
                done = false;
            } else if (step.name == "offer-again") {
                // exists until the guest has released it, at the same time as the new one
                bus_.server().remove(*hotplug_.controller);
                offer_controller();
            } else if (step.name == "hot-add") {
                done = hotplug_.controller->add_lun(hotplug_.lun);
            } else {
                done = hotplug_.controller->remove_lun(hotplug_.lun.lun);
            }
        });
        machine_.print_line(std::string(step.name) + (done ? ": done" : ": there is no SCSI disk for it"));
    }

    void offer_controller() {
        hotplug_.controller = &bus_.add(host::StorageDevice::scsi(hotplug_.config, hotplug_.luns));
    }

    Machine& machine_;
    Bus& bus_;
    HotplugDisk hotplug_;
    host::ShutdownService& shutdown_;
    u64 begin_;
    int wake_;
    std::array<Step, 5> steps_;
};

constexpr u32 end_seconds = 15; // more than the drain's own limit
constexpr u64 drain_limit = 10'000'000'000;

/// Waits, within a bound, for the transfers that the guest's end has left.
void drain(Machine& machine, Later& later) {
    if (!later.transfers->drain([](const host::Transfer&) { return true; }, drain_limit)) {
        machine.print_line("the end: " + std::to_string(later.transfers->in_flight()) + " transfers have not ended");
    }
}

/// The I/O thread: handles everything not done in a processor's exit. Never returns.
[[noreturn]] void serve(Machine& machine, Bus& bus, Schedule& schedule, const Options& options, Later& later) {
    // A deadline set in a processor's exit is noticed in the next turn; with a rate-limited disk that must be soon.
    const bool limited = std::ranges::any_of(options.disks, [](const DiskOption& disk) { return disk.iops != 0; });
    const u64 console_interval = limited ? 1'000'000 : 100'000'000;
    const u64 begin = machine.now();
    const u64 end = options.timeout > 0 ? begin + static_cast<u64>(options.timeout * 1e9) : ~u64{0};
    const int poller = epoll_create1(EPOLL_CLOEXEC);
    const auto watch = [&](int descriptor) {
        epoll_event event{.events = EPOLLIN, .data = {.fd = descriptor}};
        epoll_ctl(poller, EPOLL_CTL_ADD, descriptor, &event);
    };
    watch(bus.acknowledged());
    watch(schedule.wake());
    const bool signals = options.eventfd || later.medium;
    if (signals) {
        watch(bus.signals());
    }
    // A timer of its own: the wait's time-out is in milliseconds.
    const int timer = later.medium ? timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK) : -1;
    u64 armed = ~u64{0};
    if (later.medium) {
        watch(bus.woken());
        watch(timer);
    }
    if (later.ended >= 0) {
        watch(later.ended);
    }
    if (options.console) {
        watch(STDIN_FILENO);
    }
    for (;;) {
        const u64 now = machine.now();
        const u64 due = bus.deadline();
        if (later.medium && due != armed) {
            armed = due;
            itimerspec time{};
            if (due != ~u64{0}) { // 0 would stop it
                const u64 at = std::max(due, u64{1});
                time.it_value = {static_cast<time_t>(at / 1'000'000'000), static_cast<long>(at % 1'000'000'000)};
            }
            timerfd_settime(timer, TFD_TIMER_ABSTIME, &time, nullptr);
        }
        const u64 next = std::min({end, later.medium ? end : due, schedule.deadline(), now + console_interval});
        epoll_event event{};
        const int count =
            epoll_wait(poller, &event, 1, next <= now ? 0 : static_cast<int>((next - now) / 1'000'000 + 1));
        if (count == 1 && event.data.fd == bus.acknowledged()) {
            bus.on_acknowledged();
        } else if (count == 1 && signals && event.data.fd == bus.signals()) {
            bus.on_signals();
        } else if (count == 1 && later.medium && event.data.fd == bus.woken()) {
            bus.on_woken();
            if (bus.ending()) {
                drain(machine, later);
                bus.ended();
                for (;;) {
                    pause(); // the processor's thread ends the process
                }
            }
        } else if (count == 1 && later.medium && event.data.fd == timer) {
            armed = ~u64{0};
            u64 expired = 0;
            [[maybe_unused]] const auto consumed = read(timer, &expired, sizeof(expired));
            bus.serve(machine.now());
        } else if (count == 1 && later.ended >= 0 && event.data.fd == later.ended) {
            bus.with_server([&] { later.transfers->submit(); });
        } else if (count == 1 && options.console && event.data.fd == STDIN_FILENO) {
            char byte = 0;
            if (read(STDIN_FILENO, &byte, 1) != 1) {
                epoll_ctl(poller, EPOLL_CTL_DEL, STDIN_FILENO, nullptr);
            } else {
                const std::scoped_lock guard(machine.device_mutex());
                machine.serial().receive(byte);
            }
        } else {
            const u64 time_now = machine.now();
            schedule.run_due(time_now);
            if (time_now >= end) {
                machine.finish(ExitCode::timeout, "time-out");
            }
            if (time_now >= bus.deadline()) {
                bus.serve(time_now);
            }
            machine.flush_console();
        }
    }
}

} // namespace

int run(int count, char** words) {
    Options options;
    if (const auto status = parse_command_line(count, words, options)) {
        return *status;
    }
    if (options.list_faults) {
        for (const auto& fault : host::fault_names) {
            std::printf("%-24.*s %.*s\n", static_cast<int>(fault.name.size()), fault.name.data(),
                        static_cast<int>(fault.rule.size()), fault.rule.data());
        }
        return 0;
    }
    Later later = later_of(options);
    MachineConfig config;
    config.processors = options.processors;
    config.memory = u64{options.memory_mebibytes} << 20;
    config.identity.hyperv = !options.no_hyperv;
    config.identity.kvm_leaves = options.kvm_leaves;
    config.identity.openvmm = options.openvmm_leaves;
    config.identity.hyperv_base = static_cast<u32>(std::strtoul(options.hyperv_base.c_str(), nullptr, 0));
    auto created = Machine::create(config);
    if (!created) {
        give_up(created.error().code == Code::not_supported ? ExitCode::missing : ExitCode::host, "", created.error());
    }
    Machine& machine = **created;
    std::FILE* const log = options.log.empty() ? nullptr : std::fopen(options.log.c_str(), "we");
    if (!options.log.empty() && log == nullptr) {
        give_up(ExitCode::host, "--log " + options.log + ": ", Error{Code::io, "the file cannot be written"});
    }
    const auto line = [&machine, log](std::string_view text) {
        if (log == nullptr) {
            machine.print_line(text);
            return;
        }
        std::fprintf(log, "%.*s\n", static_cast<int>(text.size()), text.data());
        std::fflush(log);
    };
    Images images;
    Bus bus(machine, server_config(options), line,
            later.medium      ? Bus::Serving::thread
            : options.eventfd ? Bus::Serving::exits_eventfd
                              : Bus::Serving::exits);
    HotplugDisk hotplug = add_disks(bus, images, options, later);
    std::vector<Image*> emulated;
    for (const std::string& file : options.ide) {
        emulated.push_back(&images.open(file, false));
    }
    if (const auto added = machine.add_ide(emulated); !added) {
        give_up(ExitCode::host, "--ide: ", added.error());
    }
    auto& shutdown = bus.add(std::make_unique<host::ShutdownService>());
    bus.add(std::make_unique<host::HeartbeatService>());
    const auto wall_clock = [&machine] { return (machine.unix_seconds() + 11'644'473'600) * 10'000'000; }; // since 1601
    const auto reference = [&machine] { return machine.kvm().clock() / 100; };
    bus.add(std::make_unique<host::TimeSyncService>(wall_clock, reference));
    load(machine, options);
    bus.connect();
    Schedule schedule(machine, bus, options, std::move(hotplug), shutdown);
    if (later.medium) {
        const auto thread = std::this_thread::get_id();
        machine.set_ending([&machine, &bus, &later, thread] {
            if (std::this_thread::get_id() == thread) {
                drain(machine, later);
            } else if (!bus.end(end_seconds)) {
                machine.print_line("the end: the I/O thread has not ended its work");
            }
        });
    }
    machine.start();
    serve(machine, bus, schedule, options, later);
}

} // namespace fl::vmm

int main(int count, char** words) { return fl::vmm::run(count, words); }
