module;
#include "core/try.hpp"
module drivers.nvme.namespaces;
import core.std;
import core.log;
import core.result;
import core.text;
import core.vector;
import io.block;
import io.executor;
import io.task;
import drivers.driver;

namespace fl::drivers::nvme {

namespace {
constexpr std::string_view other_command_set =
    "it has another I/O command set than NVM, such as that of zoned namespaces: it is left alone";
} // namespace

void Namespaces::clear() {
    while (units_.size() != 0) {
        Unit* unit = units_[units_.size() - 1];
        units_.remove(units_.size() - 1);
        for (Disk* disk : unit->disks) {
            delete disk;
        }
        delete unit;
    }
}

void Namespaces::use(const ControllerInfo& info, const CommandSetLimits& limits, std::span<Queue* const> queues,
                     std::string_view features, bool descriptors, bool command_sets) {
    info_ = info;
    descriptors_ = descriptors;
    command_sets_ = command_sets;
    set_ = limits;
    queues_ = queues;
    print(features_, "{}", features);
    // MDTS counts pages of CAP.MPSMIN's size, 4096 bytes here.
    max_transfer_ = info.mdts == 0 || info.mdts >= 7 ? max_transfer : page << info.mdts;
}

// Once for each namespace: a controller may report changes without end.
void Namespaces::unused(u32 nsid, Unused why, std::string_view reason) {
    const auto end = reported_.begin() + reported_.size();
    if (std::find(reported_.begin(), end, nsid) != end || reported_.size() == max_reported || !reported_.push(nsid)) {
        return;
    }
    FixedText<64> address;
    print(address, "nvme{}n{}", index_, nsid);
    environment_.disks.unused({"nvme", address, "NVMe namespace", why, reason});
}

Namespaces::Unit* Namespaces::find(u32 nsid) const {
    for (Unit* unit : units_) {
        if (unit->disks[0]->nsid() == nsid && !unit->disks[0]->removed()) {
            return unit;
        }
    }
    return nullptr;
}

// ---- finding ----

io::Task<Result<void>> Namespaces::scan() {
    CO_CHECK(co_await admin_.identify(cns_active_namespaces, 0));
    std::array<u32, max_namespaces> found{};
    u32 count = 0;
    u32 last = 0;
    for (u32 i = 0; i < identify_bytes / 4; ++i) {
        CO_TRY(const u32 nsid, next_namespace(admin_.data(), i, last));
        if (nsid == 0) {
            break;
        }
        if (count == max_namespaces) {
            unused(nsid, Unused::no_room,
                   "this driver uses 64 namespaces of a controller: this one and later ones are not used");
            break;
        }
        last = found[count++] = nsid;
    }
    for (u32 i = 0; i < count; ++i) {
        if (find(found[i]) != nullptr) {
            continue;
        }
        if (auto scanned = co_await scan_one(found[i]); !scanned) {
            if (!admin_.is_open() || scanned.error().code == Code::timed_out) {
                co_return scanned.error();
            }
            FixedText<160> reason;
            print(reason, "{}", scanned.error());
            unused(found[i], unused_because(scanned.error().code), reason);
        }
    }
    co_return co_await report_other_command_sets(std::span(found).first(count));
}

/// CC.CSS selects NVM alone, so a namespace of another command set is not active [nvme-base-2.0 §3.2.1.4]; the
/// controller describes an allocated one of NVM's that is not attached, and refuses to describe one of another set in
/// that way.
io::Task<Result<void>> Namespaces::report_other_command_sets(std::span<const u32> active) {
    if (!command_sets_) {
        co_return Result<void>{};
    }
    if (auto listed = co_await admin_.identify(cns_allocated_namespaces, 0, true); !listed) {
        co_return listed.error().code == Code::io ? Result<void>{} : listed; // the list is optional
    }
    std::array<u32, max_namespaces> others{}; // copied: the data is overwritten
    u32 count = 0;
    u32 last = 0;
    for (u32 i = 0; i < identify_bytes / 4 && count < max_namespaces; ++i) {
        CO_TRY(const u32 nsid, next_namespace(admin_.data(), i, last));
        if (nsid == 0) {
            break;
        }
        last = nsid;
        if (std::ranges::find(active, nsid) == active.end()) {
            others[count++] = nsid;
        }
    }
    for (const u32 nsid : std::span(others).first(count)) {
        const auto described = co_await admin_.identify(cns_allocated_namespace, nsid, true);
        if (described) {
            continue; // of another controller
        }
        if (described.error().code != Code::io) {
            co_return described;
        }
        if (described.error().seen == status_invalid_command_set) {
            unused(nsid, Unused::no_driver, other_command_set);
        }
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Namespaces::scan_one(u32 nsid) {
    CO_CHECK(co_await admin_.identify(cns_namespace, nsid));
    CO_TRY(NamespaceInfo info, parse_namespace(admin_.data()));
    if (info.blocks == 0) {
        unused(nsid, Unused::empty, "the namespace has no blocks");
        co_return Result<void>{};
    }
    CO_TRY(const u8 command_set, co_await read_descriptors(nsid, info.identity));
    if (command_set != 0) {
        unused(nsid, Unused::no_driver, other_command_set);
        co_return Result<void>{};
    }
    co_return attach(nsid, info);
}

/// A controller that refuses them has none.
io::Task<Result<u8>> Namespaces::read_descriptors(u32 nsid, NamespaceIdentity& identity) {
    if (descriptors_) {
        if (auto read = co_await admin_.identify(cns_namespace_descriptors, nsid, true); read) {
            co_return parse_descriptors(admin_.data(), identity);
        } else if (read.error().code != Code::io) {
            co_return read.error();
        }
    }
    co_return u8{0};
}

Limits Namespaces::limits_of(u32 block_size) const {
    const auto bytes = [&](u64 blocks) { // whole blocks
        return static_cast<u32>(std::min<u64>(blocks, ~u32{0} / block_size) * block_size);
    };
    Limits limits{.transfer = max_transfer_, .discard = bytes(~u32{0}), .zeroes = bytes(1 << 16)}; // NLB has 16 bits
    if (set_.discard_blocks != 0) {
        limits.discard = bytes(set_.discard_blocks);
    }
    if (set_.discard_total != 0) {
        limits.discard = std::min(limits.discard, bytes(set_.discard_total));
    }
    if (set_.zeroes != 0 && set_.zeroes < 20) {
        limits.zeroes = std::min(limits.zeroes, page << set_.zeroes);
    }
    return limits;
}

Result<void> Namespaces::attach(u32 nsid, const NamespaceInfo& info) {
    const auto has = [&](bool offered, Feature feature) { return offered && environment_.allows(feature); };
    const bool writable = !info.write_protected;
    const io::Geometry geometry{.sectors = info.blocks,
                                .sector_size = info.block_size,
                                .physical_sector_size = info.block_size,
                                .read_only = info.write_protected,
                                .flush = has(info_.write_cache, Feature::flush),
                                .discard = has(info_.dataset_management && writable, Feature::discard),
                                .write_zeroes = has(info_.write_zeroes && writable, Feature::write_zeroes)};
    io::BlockDevice::Identity identity;
    print(identity.name, "nvme{}n{}", index_, nsid);
    identity.driver = "nvme";
    identity.kind = io::Kind::emulated;
    identity.model = info_.model;
    print(identity.features, "{}{}{}{} mdts={}", geometry.flush ? "flush " : "", geometry.discard ? "discard " : "",
          geometry.write_zeroes ? "write-zeroes " : "", features_, max_transfer_);
    const Limits limits = limits_of(info.block_size);
    Unit entry{.identity = info.identity};
    const auto undo = [&] {
        for (Disk*& disk : entry.disks) {
            delete std::exchange(disk, nullptr);
        }
    };
    for (usize i = 0; i < queues_.size(); ++i) {
        entry.disks[i] = new (std::nothrow) Disk(*queues_[i], nsid, limits, geometry, identity);
        if (entry.disks[i] == nullptr) {
            undo();
            return Error{Code::exhausted, "no memory for a disk"};
        }
        if (i != 0) {
            entry.disks[0]->add_lane(*entry.disks[i]);
        }
    }
    auto* unit = new (std::nothrow) Unit;
    if (unit == nullptr || !units_.push(unit)) {
        delete unit;
        undo();
        return Error{Code::exhausted, "no memory for a disk"};
    }
    if (auto announced = environment_.disks.announce(*entry.disks[0], DiskSink::no_twin); !announced) {
        units_.remove(units_.size() - 1);
        delete unit;
        undo();
        return announced;
    }
    for (usize i = 0; i < queues_.size(); ++i) {
        // no other coroutine has run since, so this precedes any request to the lane
        entry.disks[i]->link(environment_.executor);
    }
    *unit = entry;
    return {};
}

// ---- changes ----

void Namespaces::remove(Unit& unit, std::string_view why) {
    log::error("{}: {}: it is closed", unit.disks[0]->identity().name, why);
    for (usize i = 0; i < queues_.size(); ++i) {
        unit.disks[i]->remove();
    }
}

io::Task<Result<void>> Namespaces::check(Unit& unit) {
    Disk& disk = *unit.disks[0];
    if (disk.removed()) {
        co_return Result<void>{};
    }
    if (auto answered = co_await admin_.identify(cns_namespace, disk.nsid()); !answered) {
        if (answered.error().code != Code::io) {
            co_return answered;
        }
        remove(unit, "the controller does not describe the namespace any more");
        co_return Result<void>{};
    }
    FixedText<320> why;
    auto info = parse_namespace(admin_.data());
    if (!info) {
        print(why, "the namespace can no longer be used: {}", info.error());
        remove(unit, why);
        co_return Result<void>{};
    }
    if (info->blocks == 0) {
        remove(unit, "the namespace is gone or empty");
        co_return Result<void>{};
    }
    CO_CHECK(co_await read_descriptors(disk.nsid(), info->identity));
    if (info->identity != unit.identity) { // what was written to the one must not be continued on the other
        print(why, "another namespace has its number: {} was expected, {} was seen", text_of(unit.identity),
              text_of(info->identity));
        remove(unit, why);
    } else if (info->block_size != disk.geometry().sector_size) {
        print(why, "the namespace was formatted anew: blocks of {} bytes were expected, of {} were seen",
              disk.geometry().sector_size, info->block_size);
        remove(unit, why);
    } else {
        disk.resize(info->blocks);
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Namespaces::check_all() {
    for (usize i = 0; i < units_.size(); ++i) {
        CO_CHECK(co_await check(*units_[i]));
    }
    co_return Result<void>{};
}

// Changed Namespace List [nvme-1.4 §5.14.1.4]: ids that ascend, ended by 0; or a single ffffffffh: more than 1024.
io::Task<Result<void>> Namespaces::changed() {
    CO_CHECK(co_await admin_.log_page(log_changed_namespaces, identify_bytes));
    std::array<u32, max_namespaces> ids{}; // copied: the data is overwritten
    u32 count = 0;
    bool all = false;
    for (u32 i = 0; i < identify_bytes / 4; ++i) {
        u32 nsid = 0;
        std::memcpy(&nsid, admin_.data().data() + 4u * i, sizeof nsid);
        if (nsid == 0) {
            break;
        }
        if (nsid == ~u32{0} || count == max_namespaces) {
            all = true;
            break;
        }
        ids[count++] = nsid;
    }
    for (usize i = 0; i < units_.size(); ++i) {
        const auto end = ids.begin() + count;
        if (all || std::find(ids.begin(), end, units_[i]->disks[0]->nsid()) != end) {
            CO_CHECK(co_await check(*units_[i]));
        }
    }
    co_return co_await scan(); // what is new
}

} // namespace fl::drivers::nvme
