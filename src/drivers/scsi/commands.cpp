module drivers.scsi.commands;
import core.std;
import core.result;
import core.text;
import core.log;
import io.block;
import io.block_queue;

namespace fl::drivers::scsi {

using io::Op;
using io::QueueCore;
using io::Retry;
using io::Status;

LogicalUnit::LogicalUnit(const UnitLimits& limits, const io::Geometry& geometry)
    : limits_(limits), block_shift_(static_cast<u32>(std::countr_zero(geometry.sector_size))),
      write_flags_(limits.write_through ? cdb_fua : 0),
      fits_10_(limits.max_transfer >> block_shift_ <= 0xffff), // the count has 16 bits
      io_10_(limits.short_commands && fits_10_) {}

// READ(10) and WRITE(10) [SBC-3]: the LBA in bytes 2 to 5, the count in 7 and 8.
void LogicalUnit::build_io_10(std::span<u8, cdb_bytes> cdb, const io::QueuedCommand& command) const {
    cdb[0] = to_underlying(command.op == Op::write ? Opcode::write_10 : Opcode::read_10);
    cdb[1] = command.op == Op::write ? write_flags_ : 0;
    put_be(cdb.subspan<2, 4>(), command.lba);
    put_be(cdb.subspan<7, 2>(), command.bytes >> block_shift_);
}

io::Fit LogicalUnit::limit_other(io::QueuedCommand& command) const {
    if (command.op == Op::flush) {
        return io::Fit::ok;
    }
    const bool discard = command.op == Op::discard;
    if (discard ? discard_refused_ : zeroes_refused_) {
        command.refusal = Status::not_supported;
        return io::Fit::refused;
    }
    const u64 most = u64{discard ? limits_.max_unmap_blocks : limits_.max_zero_blocks} << block_shift_;
    command.bytes = static_cast<u32>(std::min<u64>(command.bytes, most));
    return io::Fit::ok;
}

u8 LogicalUnit::build_other(std::span<u8, cdb_bytes> cdb, const io::QueuedCommand& command, CommandForm& form) const {
    form.short_cdb = command.op == Op::flush && !flush_16_;
    const Cdb built = command.op == Op::discard        ? unmap(unmap_list_bytes)
                      : command.op == Op::write_zeroes ? write_same_16(command.lba, command.bytes >> block_shift_)
                      : flush_16_                      ? synchronize_cache_16()
                                                       : synchronize_cache_10();
    std::copy(built.bytes.begin(), built.bytes.end(), cdb.begin());
    return built.length;
}

namespace {

Opcode opcode_of(Op op, CommandForm form) {
    switch (op) {
    case Op::read: return form.short_cdb ? Opcode::read_10 : Opcode::read_16;
    case Op::write: return form.short_cdb ? Opcode::write_10 : Opcode::write_16;
    case Op::discard: return Opcode::unmap;
    case Op::write_zeroes: return Opcode::write_same_16;
    default: return form.short_cdb ? Opcode::synchronize_cache_10 : Opcode::synchronize_cache_16;
    }
}

// The command succeeded, and the sense data is only informational.
bool recovered(const io::QueuedCommand& command, const Response& response) {
    return response.sense &&
           (response.sense->key == key_recovered ||
            (response.sense->key == key_no_sense && response.status == status_good)) &&
           moved_all(command, response.moved);
}

} // namespace

Verdict LogicalUnit::judge(const io::QueuedCommand& command, CommandForm form, const Response& response,
                           std::string_view name) {
    const Opcode opcode = opcode_of(command.op, form);
    const std::optional<Sense>& sense = response.sense;
    FixedText<120> text;
    if (response.good()) {
        if (moved_all(command, response.moved)) {
            return {};
        }
        print(text, "success with {} of {} bytes transferred, at LBA {}", response.moved, command.bytes, command.lba);
        report(name, opcode, text);
        return {.status = Status::io_error};
    }
    if (recovered(command, response)) {
        return {};
    }
    Verdict verdict{.status = Status::io_error};
    if (response.unit_attention()) {
        verdict.rescan = sense->asc == asc_conditions_changed || sense->asc == asc_parameters_changed;
        if (command.retries < QueueCore::retries_at_once) {
            report_attention(name, *sense);
            verdict.retry = Retry::now;
            return verdict;
        }
    }
    if (command.expired && (response.service == ServiceResponse::aborted || response.transient())) {
        verdict.status = Status::timed_out;
        return verdict;
    }
    if (response.transient() && command.retries < QueueCore::retries_later) {
        verdict.retry = Retry::later;
        return verdict;
    }
    if (sense && refuses(command.op, *sense)) {
        verdict.status = Status::not_supported;
        if (!std::exchange(command.op == Op::discard ? discard_refused_ : zeroes_refused_, true)) {
            report(name, opcode, describe(*sense, std::nullopt));
        }
        return verdict;
    }
    if (sense && sense->key == key_illegal_request && sense->asc == asc_invalid_opcode) {
        verdict.status = Status::not_supported;
        if (command.retries < QueueCore::retries_at_once && try_other_form(command, form)) {
            verdict.retry = Retry::now;
        } else {
            report(name, opcode, describe(*sense, std::nullopt));
        }
        return verdict;
    }
    if (response.no_unit()) {
        verdict.status = Status::device_gone;
        verdict.rescan = true;
        if (std::exchange(absence_reported_, true)) { // all commands of a removed unit end like this
            return verdict;
        }
    }
    if (sense) {
        report(name, opcode, describe(*sense, command.op == Op::flush ? std::nullopt : std::optional(command.lba)));
        return verdict;
    }
    print(text, "SCSI status {}", status_name(response.status));
    if (!response.transport.field.empty()) {
        print(text, ", {} {} ({:#x})", response.transport.field, response.transport.name, response.transport.code);
    }
    print(text, ", no sense data, at LBA {}", command.lba);
    report(name, opcode, text);
    return verdict;
}

// A unit that cannot discard or write zeroes says that the operation code or a field, of the CDB or of the parameter
// list, is invalid; with the right fields, that is the operation itself.
bool LogicalUnit::refuses(Op op, const Sense& sense) {
    return (op == Op::discard || op == Op::write_zeroes) && sense.key == key_illegal_request &&
           sense.asc != asc_lba_out_of_range && sense.asc != asc_no_unit;
}

// The unit does not support this form. Called for every command already sent in it; later ones use the other form.
bool LogicalUnit::try_other_form(const io::QueuedCommand& command, CommandForm form) {
    if (command.op == Op::flush && form.short_cdb) {
        flush_16_ = true;
        return true;
    }
    if (command.op <= Op::write && !form.short_cdb && fits_10_ && reaches_10(command)) {
        io_10_ = true;
        return true;
    }
    return false;
}

void LogicalUnit::report(std::string_view name, Opcode opcode, std::string_view what) {
    if (errors_reported_ < max_reported_errors) {
        log::error("{}: {}: {}", name, scsi::name(opcode), what);
        if (++errors_reported_ == max_reported_errors) {
            log::warning("{}: further errors of this kind are only counted", name);
        }
    }
}

void LogicalUnit::report_attention(std::string_view name, const Sense& sense) {
    if (attentions_reported_ < max_reported_errors) {
        ++attentions_reported_;
        log::info("{}: {}: retrying", name, describe(sense, std::nullopt));
    }
}

} // namespace fl::drivers::scsi
