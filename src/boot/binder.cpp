module;
#include "core/try.hpp"
module boot.binder;
import core.std;
import core.log;
import core.result;
import core.text;
import core.vector;
import core.verdict;
import io.executor;
import io.latch;
import io.shutdown;
import io.task;
import hv.backend;
import drivers.driver;
import drivers.table;
import boot.backend;
import boot.devices;
import boot.jobs;
import boot.sinks;
import boot.sources;

namespace fl::boot {

namespace {

FixedText<64> names(hv::EmulatedClasses classes) {
    FixedText<64> text;
    const auto add = [&](bool is, std::string_view name) {
        if (is) {
            print(text, "{}{}", text.empty() ? "" : ", ", name);
        }
    };
    add(classes.disks, "IDE disks");
    add(classes.nics, "network cards");
    add(classes.nvme, "NVMe disks");
    return text;
}

} // namespace

void Binder::unplug(Backend& backend) {
    const hv::EmulatedClasses wanted = plan_.unplugs();
    if (!wanted.any()) {
        return;
    }
    if (auto done = backend.unplug(wanted); done) {
        unplugged_ = wanted;
        log::info("emulated {} unplugged", names(wanted));
    } else {
        log::warning("emulated {} are not unplugged: {}", names(wanted), done.error());
    }
}

void Binder::add(DeviceSource& source) {
    if (source_count_ == max_sources) {
        devices_.left_out("devices of a source", source.count(), true, "the binder has no room for their source");
        return;
    }
    sources_[source_count_++] = &source;
}

void Binder::add_entries(std::string_view name) {
    for (DeviceSource* source : sources()) {
        for (u32 i = 0; i < source->driver_count(); ++i) {
            if (source->driver(i) == name && !order_.push({source, i})) {
                ++drivers_dropped_;
            }
        }
    }
}

void Binder::order_drivers() {
    for (const std::string_view name : plan_.drivers()) {
        add_entries(name);
    }
    for (DeviceSource* source : sources()) {
        for (u32 i = 0; i < source->driver_count(); ++i) {
            const std::string_view name = source->driver(i);
            const auto named = [&](const Entry& entry) { return entry.source->driver(entry.driver) == name; };
            if (std::ranges::none_of(plan_.drivers(), [&](std::string_view n) { return n == name; }) &&
                std::ranges::none_of(order_, named)) {
                add_entries(name);
            }
        }
    }
}

void Binder::find_candidates(Vector<Candidate>& into) {
    u32 dropped = 0;
    for (DeviceSource* source : sources()) {
        for (u32 i = 0; i < source->count(); ++i) {
            dropped += into.push({source, i}) ? 0 : 1;
        }
        source->report_left_out(devices_);
    }
    if (dropped != 0) {
        devices_.left_out("devices", dropped, true, "no memory for the list of them");
    }
    if (drivers_dropped_ != 0) {
        devices_.left_out("drivers", drivers_dropped_, true, "no memory for the list of them");
    }
}

io::Task<Result<void>> Binder::bind() {
    order_drivers();
    Vector<Candidate> candidates;
    find_candidates(candidates);
    CO_CHECK(co_await offer({candidates.begin(), candidates.size()}));
    co_return Result<void>{};
}

io::Task<Result<void>> Binder::offer(std::span<Candidate> candidates) {
    for (const Entry& entry : order_) {
        for (const bool first : {true, false}) {
            for (Candidate& candidate : candidates) {
                DeviceSource& source = *candidate.source;
                if (candidate.settled || &source != entry.source || !source.matches(entry.driver, candidate.device) ||
                    source.first(entry.driver, candidate.device) != first) {
                    continue;
                }
                DriverState* const to = driver_state(source.driver(entry.driver));
                if (to == nullptr) {
                    no_driver_state(candidate, source.driver(entry.driver));
                    continue;
                }
                begin(candidate, entry, *to);
                const u32 before = to->sinks.devices.attached();
                drivers::Environment environment = machine_.environment(to->sinks, shutdown_);
                const Result<void> done =
                    co_await source.probe(entry.driver, environment, candidate.device, to->offered++);
                finish(candidate, entry, *to, before, done);
            }
        }
    }
    for (Candidate& candidate : candidates) {
        settle(candidate);
    }
    co_return Result<void>{};
}

// The sinks of that driver, created on first use; nullptr: no room for another driver.
Binder::DriverState* Binder::driver_state(std::string_view driver) {
    for (std::optional<DriverState>& place : driver_states_) {
        if (!place) {
            place.emplace(attached_, driver);
        }
        if (place->sinks.devices.driver() == driver) {
            return &*place;
        }
    }
    return nullptr;
}

void Binder::no_driver_state(Candidate& candidate, std::string_view driver) {
    static constexpr Error full{Code::exhausted, "more drivers with devices than boot::Binder has room for",
                                max_drivers, max_drivers + 1};
    candidate.settled = true;
    failed(candidate, driver, full);
    devices_.left_out("devices", 1, true, "the binder has no room for another driver");
}

void Binder::begin(const Candidate& candidate, const Entry& entry, DriverState& state) {
    const DeviceSource& source = *candidate.source;
    if (source.listed()) {
        log::info("{}: probing {}", source.driver(entry.driver), source.place(candidate.device));
    }
    state.sinks.devices.expect(source.describe(candidate.device).address);
}

bool Binder::is_unplugged(std::string_view driver) const {
    const drivers::DriverInfo* info = plan_.driver(driver);
    return info != nullptr && info->emulated.intersects(unplugged_);
}

void Binder::finish(Candidate& candidate, const Entry& entry, const DriverState& state, u32 before,
                    const Result<void>& done) {
    const DeviceSource& source = *candidate.source;
    const std::string_view driver = source.driver(entry.driver);
    const u32 found = state.sinks.devices.attached() - before;
    const bool declines = !done && done.error().code == Code::not_supported;
    // QEMU resets a controller whose disks it unplugs; the controller then has no ports and cannot be used.
    const bool is_gone = is_unplugged(driver) && (done ? found == 0 : declines);
    if (declines && !is_gone) {
        candidate.declined = done.error();
        candidate.declined_by = driver;
        return;
    }
    candidate.settled = true;
    if (!done && !is_gone) {
        failed(candidate, driver, done.error());
        return;
    }
    if (state.sinks.devices.reported() || !source.listed()) {
        return;
    }
    DeviceEntry listing = source.describe(candidate.device);
    listing.why.reset();
    listing.reason.clear();
    listing.disks = found;
    if (is_gone) {
        listing.why = drivers::Unused::unplugged;
        print(listing.reason, "the host has unplugged {} as requested",
              listing.kind == DeviceClass::disk ? "its disks" : "it");
    } else {
        listing.driver = driver;
        if (listing.kind == DeviceClass::disk) {
            print(listing.reason, "{} {}", found, plural(found, "disks"));
        }
    }
    devices_.add(listing);
}

// Runs after all drivers: lists a device that none of them took.
void Binder::settle(Candidate& candidate) {
    if (std::exchange(candidate.settled, true)) {
        return;
    }
    if (candidate.declined) {
        failed(candidate, candidate.declined_by, *candidate.declined);
        return;
    }
    const DeviceEntry listing = candidate.source->describe(candidate.device);
    devices_.add(listing.why ? listing : without_driver(listing));
}

// Lists a device that matched a driver and could not be used: unresponsive, closed, broken or unsupported.
void Binder::failed(Candidate& candidate, std::string_view driver, const Error& error) {
    report(error, driver);
    DeviceEntry listing = candidate.source->describe(candidate.device);
    listing.why = drivers::unused_because(error.code);
    listing.reason.clear();
    print(listing.reason, "{}: {}", driver, error);
    devices_.add(listing);
}

void Binder::watch() {
    for (DeviceSource* source : sources()) {
        if (source->changes() == nullptr) {
            continue;
        }
        if (auto kept = tasks_.spawn(watch_source(*source)); !kept) {
            log::warning("hot-added devices will not be detected: {}", kept.error());
        }
    }
}

// Offers hot-added devices, including devices that reappear. The pending ones are in the source's list.
io::Task<Result<void>> Binder::watch_source(DeviceSource& source) {
    u32 logged = 0;
    u32 lost = 0; // dropped and not yet reported: rate-limited, because a host may offer devices without end
    for (;;) {
        static_cast<void>(co_await source.changes()->wait());
        lost += source.lost();
        if (lost > logged / 2) {
            devices_.left_out("synthetic devices", lost, true, "no room for them");
            logged += std::exchange(lost, 0);
        }
        while (source.next()) {
            if (shutdown_.requested()) {
                co_return Result<void>{};
            }
            Candidate candidate{&source, 0};
            if (auto done = co_await offer({&candidate, 1}); !done) {
                report(done.error(), source.name());
            }
        }
    }
}

void report_left_out(const drivers::Table& table, const drivers::Plan& plan, Devices& into) {
    if (table.rules_dropped() != 0) {
        into.left_out("rules of the driver table", table.rules_dropped(), false, "the table is full");
    }
    if (table.wrong() > table.diagnostics().size()) {
        into.left_out("messages about malformed rules", table.wrong() - table.diagnostics().size(), false,
                      "only the first ones are kept");
    }
    if (plan.drivers_dropped != 0) {
        into.left_out("drivers of the plan", plan.drivers_dropped, false,
                      "it has no room for them: they are tried after all others");
    }
}

void judge(Outcome& outcome, const Devices& devices, u32 wrong_rules, bool map_file_cut) {
    FixedText<240> reason;
    if (outcome.verdict != Verdict::success) {
        return;
    }
    if (devices.failures() != 0) {
        print(reason, "{} {} could not be used (see the errors above); the job itself succeeded", devices.failures(),
              plural(devices.failures(), "devices"));
    } else if (devices.disk_left_out()) {
        reason.write(
            "something was left out, and a disk may be among it (see the left_out records); the job itself succeeded");
    } else if (wrong_rules != 0 || map_file_cut) {
        print(reason, "{} malformed {} in the map file{}; the other lines apply, and the job itself succeeded",
              wrong_rules, plural(wrong_rules, "lines"), map_file_cut ? ", which is truncated" : "");
    } else {
        return;
    }
    outcome = {Verdict::error, reason};
}

} // namespace fl::boot
