module;
#include "core/try.hpp"
module drivers.scsi.units;
import core.std;
import core.result;
import core.text;
import core.log;
import core.vector;
import io.executor;
import io.task;
import io.block;
import drivers.driver;

namespace fl::drivers::scsi {

namespace {
constexpr std::string_view removed_text = "the host has removed the disk";
} // namespace

io::Task<Result<void>> Units::scan(u32 count) {
    u32 silent = 0;
    for (u32 target = 0; target < count; ++target) {
        const auto scanned = co_await scan_target(static_cast<u8>(target));
        if (scanned) {
            continue;
        }
        log::warning("{}: target {}: {}", rules_.name, target, scanned.error());
        if (!host_.is_open()) {
            co_return scanned;
        }
        if (scanned.error().code == Code::timed_out && ++silent == max_silent) {
            log::warning("{}: {} targets do not answer: the targets after {} are not scanned", rules_.name, silent,
                         target);
            co_return units_.empty() ? scanned : Result<void>{}; // the others are in use
        }
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Units::scan_target(u8 target) {
    host_.select(target);
    std::array<bool, max_luns> present{};
    LunList list{.complete = true};
    if (rules_.lists_units) {
        CO_TRY(list, co_await report_luns(host_, present));
    } else {
        present[0] = true;
    }
    if (!list.complete && !list.no_target) { // every unit must be probed
        std::fill_n(present.begin(), std::min(rules_.probed_luns, max_luns), true);
        for (const Unit* unit : units_) { // also those in use
            if (!unit->gone_ && unit->at_.target == target) {
                present[unit->at_.lun] = true;
            }
        }
    }
    if (list.out_of_range != 0 && first_report({target, max_luns})) {
        FixedText<96> reason;
        print(reason, "{} {} that this driver cannot address: it reaches LUN 0 to {}", list.out_of_range,
              plural(list.out_of_range, "units"), max_luns - 1);
        unused({target, max_luns - 1}, "SCSI units above", Unused::no_room, reason);
    }
    for (u32 lun = 0; lun < max_luns; ++lun) { // first what is gone: nobody should wait for it
        present[lun] = present[lun] && lun <= rules_.last_lun;
        if (const UnitNumber at{target, static_cast<u16>(lun)}; !present[lun]) {
            remove_found(at);
            forget_report(at);
        }
    }
    u32 silent = 0;
    bool answered = false;
    for (u32 lun = 0; lun < max_luns; ++lun) {
        const UnitNumber at{target, static_cast<u16>(lun)};
        if (!present[lun]) {
            continue;
        }
        const auto scanned = co_await scan_unit(at, list.complete);
        if (!host_.is_open()) {
            co_return Error{Code::device_gone, "the SCSI host was closed during the scan of its units"};
        }
        if (scanned || scanned.error().code != Code::timed_out) {
            answered = true;
        } else if (++silent == max_silent) {
            if (!answered) {
                co_return scanned;
            }
            log::warning("{}: {} units do not answer: the units after LUN {} are not scanned", rules_.name, silent,
                         lun);
            break;
        }
    }
    co_return Result<void>{};
}

// Identifies the unit, and reports it if that fails.
io::Task<Result<void>> Units::scan_unit(UnitNumber at, bool listed) {
    auto done = co_await identify(at);
    const bool failed = !done && done.error().code != Code::not_found; // not_found: it has just gone
    if (failed && listed && host_.is_open() && first_report(at)) {
        FixedText<160> reason;
        print(reason, "{}", done.error());
        unused(at, "SCSI disk", unused_because(done.error().code), reason);
    }
    co_return done;
}

io::Task<Result<void>> Units::identify(UnitNumber at) {
    const u32 removals = removals_; // by an event, while this waits for an answer
    const auto removed = [&] { return removals_ != removals; };
    const Error gone{Code::not_found, "a unit was removed during the scan"};
    CO_TRY(const std::optional<Inquiry> inquiry, co_await inquire(host_, at.lun));
    if (removed()) {
        co_return gone;
    }
    if (!inquiry || !inquiry->disk()) {
        remove_found(at);
        if (inquiry && inquiry->qualifier == 0 && first_report(at)) {
            FixedText<64> what;
            print(what, "SCSI device of type {:#x} ({} {})", inquiry->device_type, inquiry->vendor, inquiry->product);
            unused(at, what, Unused::not_a_disk,
                   "no driver for CD drives and other SCSI devices but disks in this build");
        }
        co_return Result<void>{};
    }
    if (Unit* unit = find(at); unit != nullptr) {
        CO_TRY(const bool same, co_await unchanged(*unit, *inquiry));
        if (removed()) {
            co_return gone;
        }
        if (same) {
            co_return Result<void>{};
        }
    }
    CO_TRY(const UnitDescription found, co_await describe(host_, at.lun, *inquiry, rules_.transport));
    if (removed()) {
        co_return gone;
    }
    if (!found.medium) {
        if (first_report(at)) {
            unused(at, "SCSI disk", Unused::empty, "there is no medium in it, or it has 0 bytes");
        }
        co_return Result<void>{};
    }
    co_return attach(at, found);
}

// True: it is the same disk; it has the unit's size now. False: it is not, and is removed.
io::Task<Result<bool>> Units::unchanged(Unit& unit, const Inquiry& inquiry) {
    io::BlockDevice& disk = unit.disk();
    CO_TRY(const UnitState now, co_await read_state(host_, unit.at_.lun));
    if (!now.medium) {
        co_return Error{Code::io, "the unit of a disk in use has no medium any more (READ CAPACITY)"};
    }
    CO_TRY(const std::optional<u32> identification, co_await read_identification(host_, unit.at_.lun));
    Change change = compare(inquiry, now, disk.geometry(), disk.identity().model, rules_.transport);
    if (unit.gone_) { // meanwhile
        co_return false;
    }
    if (identification != unit.identification_) {
        change = Change::model;
    }
    switch (change) {
    case Change::none: co_return true;
    case Change::size: disk.resize(now.capacity.blocks); co_return true;
    case Change::block_size: remove(unit, "the host has changed the disk's block size: it gets a new name"); break;
    case Change::model: remove(unit, "the host has put another disk in its place: it gets a new name"); break;
    case Change::attributes:
        remove(unit, "the host has changed the disk's cache or write protection: it gets a new name");
        break;
    }
    co_return false;
}

Result<void> Units::attach(UnitNumber at, const UnitDescription& found) {
    if (std::ranges::count_if(units_, [](const Unit* unit) { return !unit->gone_; }) == max_units) {
        return Error{Code::exhausted, "more units than a SCSI host has room for", max_units, max_units + 1};
    }
    io::BlockDevice::Identity identity;
    identity.driver = host_.driver();
    identity.kind = io::Kind::synthetic;
    identity.name = sink_.free_name("sd");
    identity.model = found.model;
    print(identity.features, "{}{}{}{}", found.geometry.flush ? "flush " : "", found.geometry.discard ? "discard " : "",
          found.geometry.write_zeroes ? "write-zeroes " : "", found.limits.write_through ? "write-through " : "");
    Unit* const unit = host_.make(at, found, identity);
    if (unit == nullptr || !units_.push(unit)) {
        delete unit;
        return Error{Code::exhausted, "no memory for a disk"};
    }
    unit->at_ = at;
    unit->identification_ = found.identification;
    if (auto announced = sink_.announce(unit->disk(), rules_.disk_number); !announced) {
        units_.remove(units_.size() - 1);
        delete unit;
        return announced;
    }
    if (found.unflushed_cache) {
        log::warning("{}: it has a volatile write cache, which is not flushed (features=-flush), and no FUA for writes "
                     "(DPOFUA): acknowledged data is lost with the host's power",
                     unit->disk().identity().name.view());
    }
    unit->link(host_.executor()); // no other coroutine has run since: this precedes any request to it
    forget_report(at);
    return {};
}

Unit* Units::find(UnitNumber at) const {
    const auto found = std::ranges::find_if(units_, [&](const Unit* unit) { return !unit->gone_ && unit->at_ == at; });
    return found == units_.end() ? nullptr : *found;
}

void Units::remove(UnitNumber at) {
    ++removals_;
    remove_found(at);
}

void Units::remove_found(UnitNumber at) {
    if (Unit* unit = find(at); unit != nullptr) {
        remove(*unit, removed_text);
    }
}

void Units::remove(Unit& unit, std::string_view why) {
    log::warning("{}: {}", unit.disk().identity().name, why);
    unit.gone_ = true;
    unit.remove();
}

std::optional<UnitNumber> Units::next(u32& index) const {
    while (index < units_.size()) {
        if (const Unit& unit = *units_[index++]; !unit.gone_) {
            return unit.at_;
        }
    }
    return std::nullopt;
}

void Units::clear() {
    for (Unit* unit : units_) {
        delete unit;
    }
    units_.clear();
}

/// False: the unit has been reported already, or there is no room to remember it.
bool Units::first_report(UnitNumber at) {
    return std::ranges::find(logged_, at) == logged_.end() && logged_.size() < max_logged && logged_.push(at);
}

/// The unit is gone, or in use: what is there later is reported again.
void Units::forget_report(UnitNumber at) {
    if (const auto found = std::ranges::find(logged_, at); found != logged_.end()) {
        logged_.remove(static_cast<usize>(found - logged_.begin()));
    }
}

void Units::unused(UnitNumber at, std::string_view what, Unused why, std::string_view reason) {
    FixedText<64> address;
    print(address, "{} ", rules_.name);
    if (rules_.several_targets) {
        print(address, "target {} ", at.target);
    }
    print(address, "LUN {}", at.lun);
    sink_.unused({"scsi", address, what, why, reason});
}

} // namespace fl::drivers::scsi
