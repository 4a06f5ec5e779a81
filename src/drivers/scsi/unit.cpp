module;
#include "core/try.hpp"
module drivers.scsi.unit;
import core.std;
import core.result;
import core.text;
import core.time;
import core.log;
import core.crc32c;
import io.executor;
import io.task;
import io.block;

namespace fl::drivers::scsi {

namespace {

constexpr u32 max_attempts = 5;
constexpr Nanoseconds busy_delay = 50'000'000;
constexpr u32 max_readings = 3; // for a unit that reports a change each time
constexpr u8 page_supported = 0x00;
constexpr u8 page_identification = 0x83;
constexpr u8 page_block_limits = 0xb0;
constexpr u8 page_provisioning = 0xb2;

/// Whether this unit attention may invalidate earlier information about the unit.
bool invalidates(const Sense& sense) {
    return sense.asc == asc_medium_changed || sense.asc == asc_parameters_changed ||
           (sense.asc == asc_conditions_changed && sense.ascq == ascq_inquiry_data_changed);
}

// INQUIRY's allocation length for the lists among the pages: every unit can return as much [SPC-4 §6.6].
constexpr u16 list_room = 252;

// `listed`: VPD page 0x00 lists it.
io::Task<Result<std::optional<u32>>> read_identification(Nexus& nexus, u16 lun, bool listed) {
    if (!listed) {
        co_return std::optional<u32>();
    }
    Response response;
    CO_CHECK(co_await execute_retrying(nexus, lun, inquiry(page_identification, list_room), list_room, response));
    const auto body = page_body(response.data, page_identification);
    co_return response.good() && !body.empty() ? std::optional(crc32c_by_table(std::as_bytes(body))) : std::nullopt;
}

// Longer WRITE SAMEs are split: a unit that really writes the zeros must do so within a time-out.
constexpr u64 max_zero_bytes = 64 * 1024 * 1024;

// Reads identification, block limits and logical block provisioning. A page that is refused or malformed counts as
// missing.
io::Task<Result<void>> read_pages(Nexus& nexus, u16 lun, bool thin, TransportLimits transport, UnitDescription& unit) {
    static constexpr u16 room = 64;
    Response response;
    CO_CHECK(co_await execute_retrying(nexus, lun, inquiry(page_supported, list_room), list_room, response));
    if (!response.good()) {
        co_return Result<void>{};
    }
    const bool has_identification = lists_page(response.data, page_identification);
    const bool has_limits = lists_page(response.data, page_block_limits);
    const bool has_provisioning = lists_page(response.data, page_provisioning);
    CO_TRY(unit.identification, co_await read_identification(nexus, lun, has_identification));
    BlockLimits limits;
    if (has_limits) {
        CO_CHECK(co_await execute_retrying(nexus, lun, inquiry(page_block_limits, room), room, response));
        if (auto parsed = parse_block_limits(response.data); response.good() && parsed) {
            limits = *parsed;
        }
    }
    if (limits.max_transfer_blocks != 0) {
        const u64 most = u64{limits.max_transfer_blocks} * unit.geometry.sector_size;
        unit.limits.max_transfer = static_cast<u32>(std::min<u64>(unit.limits.max_transfer, most));
    }
    const bool may_unmap = transport.discard && (thin || limits.max_unmap_blocks != 0) &&
                           limits.max_unmap_blocks != 0 && limits.max_unmap_descriptors != 0;
    const bool may_write_same = transport.write_zeroes && limits.max_write_same_blocks == 0;
    Provisioning provisioning;
    if (has_provisioning && (may_unmap || may_write_same)) {
        CO_CHECK(co_await execute_retrying(nexus, lun, inquiry(page_provisioning, room), room, response));
        if (auto parsed = parse_provisioning(response.data); response.good() && parsed) {
            provisioning = *parsed;
        }
    }
    const bool writable = !unit.geometry.read_only;
    unit.geometry.discard = writable && may_unmap && provisioning.unmap;
    unit.limits.max_unmap_blocks = limits.max_unmap_blocks;
    // A unit without a limit has WRITE SAME if it has it with UNMAP set; one with a limit has it in any case.
    unit.geometry.write_zeroes =
        writable && transport.write_zeroes && (limits.max_write_same_blocks != 0 || provisioning.write_same);
    const u64 most = limits.max_write_same_blocks != 0 ? limits.max_write_same_blocks : ~u64{0};
    unit.limits.max_zero_blocks = static_cast<u32>(std::min(most, max_zero_bytes / unit.geometry.sector_size));
    co_return Result<void>{};
}

// Whether READ CAPACITY was refused because there is nothing to count. A unit of 0 bytes has no last block, which is
// what the command returns; QEMU's then asks for manual intervention.
bool lacks_medium(const Response& response) {
    return response.sense && response.sense->key == key_not_ready &&
           (response.sense->asc == asc_no_medium ||
            (response.sense->asc == asc_not_ready && response.sense->ascq == ascq_manual_intervention));
}

// Decodes the answer to READ CAPACITY(10), after (16) was refused.
Result<Capacity> short_capacity(const Response& response) {
    if (!response.good()) {
        return Error{Code::io, "READ CAPACITY fails (SCSI status)", status_good, response.status};
    }
    TRY(Capacity capacity, parse_capacity_10(response.data));
    if (capacity.beyond_32_bits) {
        return Error{Code::not_supported,
                     "the disk has more blocks than READ CAPACITY(10) can report, and refuses (16)"};
    }
    capacity.short_form = true;
    return capacity;
}

} // namespace

io::Task<Result<void>> execute_retrying(Nexus& nexus, u16 lun, Cdb cdb, u32 bytes, Response& response) {
    for (u32 i = 1;; ++i) {
        CO_CHECK(co_await nexus.execute(lun, cdb, bytes, response));
        response.data = response.data.first(std::min<usize>(response.data.size(), bytes));
        const bool attention = response.unit_attention();
        if (attention && invalidates(*response.sense)) {
            nexus.note_change();
        }
        if (i == max_attempts || (!attention && !response.transient())) {
            co_return Result<void>{};
        }
        if (attention) {
            log::info("{}: LUN {}: {}: retrying", nexus.driver(), lun, scsi::describe(*response.sense, std::nullopt));
        } else {
            co_await nexus.executor().sleep(busy_delay);
        }
    }
}

io::Task<Result<LunList>> report_luns(Nexus& nexus, std::span<bool> present) {
    Response response;
    CO_CHECK(co_await execute_retrying(nexus, 0, report_luns(Nexus::max_data), Nexus::max_data, response));
    LunList list;
    list.no_target = response.service == ServiceResponse::no_unit;
    if (!response.good()) {
        co_return list;
    }
    const auto parsed = parse_luns(response.data, [&](u32 lun) {
        if (lun < present.size()) {
            present[lun] = true;
        } else {
            ++list.out_of_range;
        }
    });
    if (!parsed) {
        log::warning("{}: {}", nexus.driver(), parsed.error());
    }
    list.complete = parsed.has_value();
    co_return list;
}

io::Task<Result<std::optional<Inquiry>>> inquire(Nexus& nexus, u16 lun) {
    Response response;
    CO_CHECK(co_await execute_retrying(nexus, lun, inquiry(std::nullopt, inquiry_bytes), inquiry_bytes, response));
    if (response.good()) {
        CO_TRY(const Inquiry inquiry, parse_inquiry(response.data));
        co_return std::optional(inquiry);
    }
    if (response.no_unit()) {
        co_return std::optional<Inquiry>();
    }
    co_return Error{Code::io, "INQUIRY fails (SCSI status)", status_good, response.status};
}

io::Task<Result<std::optional<u32>>> read_identification(Nexus& nexus, u16 lun) {
    Response response;
    CO_CHECK(co_await execute_retrying(nexus, lun, inquiry(page_supported, list_room), list_room, response));
    co_return co_await read_identification(nexus, lun,
                                           response.good() && lists_page(response.data, page_identification));
}

FixedText<48> model_of(const Inquiry& inquiry) {
    FixedText<48> model;
    print(model, "{} {} {}", inquiry.vendor, inquiry.product, inquiry.revision);
    return model;
}

io::Task<Result<UnitState>> read_state(Nexus& nexus, u16 lun) {
    static constexpr u8 mode_room = 192;
    Response response;
    for (u32 i = 1;; ++i) {
        UnitState state;
        CO_CHECK(
            co_await execute_retrying(nexus, lun, read_capacity_16(capacity_16_bytes), capacity_16_bytes, response));
        if (response.good()) {
            CO_TRY(state.capacity, parse_capacity_16(response.data));
        } else {
            CO_CHECK(co_await execute_retrying(nexus, lun, read_capacity_10(), capacity_10_bytes, response));
            if (lacks_medium(response)) {
                state.medium = false;
                co_return state;
            }
            CO_TRY(state.capacity, short_capacity(response));
        }
        const u32 changes = nexus.changes(); // earlier changes are reflected in the capacity
        CO_CHECK(co_await execute_retrying(nexus, lun, mode_sense_6(caching_page, mode_room), mode_room, response));
        if (auto mode = parse_mode_6(response.data); response.good() && mode) {
            state.write_protected = mode->write_protected;
            state.force_unit_access = mode->force_unit_access;
            state.write_cache = mode->write_cache.value_or(true);
        }
        if (nexus.changes() == changes || i == max_readings) {
            co_return state;
        }
    }
}

io::Task<Result<UnitDescription>> describe(Nexus& nexus, u16 lun, Inquiry inquiry, TransportLimits transport) {
    for (u32 i = 1;; ++i) {
        const u32 changes = nexus.changes();
        UnitDescription unit;
        Response response;
        CO_CHECK(co_await execute_retrying(nexus, lun, test_unit_ready(), 0, response));
        if (!response.good() && response.sense) {
            if (response.sense->asc == asc_no_medium) {
                unit.medium = false;
                co_return unit;
            }
            log::info("{}: LUN {}: {}", nexus.driver(), lun, scsi::describe(*response.sense, std::nullopt));
        }
        CO_TRY(const UnitState state, co_await read_state(nexus, lun));
        if (!state.medium) {
            unit.medium = false;
            co_return unit;
        }
        unit.model = model_of(inquiry);
        unit.geometry.sectors = state.capacity.blocks;
        unit.geometry.sector_size = state.capacity.block_bytes;
        unit.geometry.physical_sector_size =
            std::min<u32>(state.capacity.block_bytes << state.capacity.physical_shift, 65536);
        unit.geometry.read_only = state.write_protected;
        unit.geometry.flush = state.write_cache && transport.flush;
        unit.limits.write_through = !transport.flush && state.force_unit_access;
        unit.unflushed_cache = state.write_cache && !transport.flush && !state.force_unit_access;
        transport.write_zeroes = transport.write_zeroes && !unit.limits.write_through; // WRITE SAME has no FUA
        unit.limits.max_transfer = transport.max_transfer;
        unit.limits.short_commands = state.capacity.short_form;
        CO_CHECK(co_await read_pages(nexus, lun, state.capacity.thin, transport, unit));
        if (nexus.changes() == changes || i == max_readings) {
            co_return unit;
        }
        CO_TRY(const std::optional<Inquiry> now, co_await inquire(nexus, lun));
        if (!now || !now->disk()) {
            co_return Error{Code::not_found, "the unit is no longer a disk"};
        }
        inquiry = *now;
    }
}

Change compare(const Inquiry& inquiry, const UnitState& now, const io::Geometry& geometry, std::string_view model,
               TransportLimits transport) {
    if (now.capacity.block_bytes != geometry.sector_size) {
        return Change::block_size;
    }
    if (model_of(inquiry).view() != model) {
        return Change::model;
    }
    if ((now.write_cache && transport.flush) != geometry.flush || now.write_protected != geometry.read_only) {
        return Change::attributes;
    }
    return now.capacity.blocks == geometry.sectors ? Change::none : Change::size;
}

} // namespace fl::drivers::scsi
