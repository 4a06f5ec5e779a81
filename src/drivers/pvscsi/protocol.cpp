module drivers.pvscsi.protocol;
import core.std;
import core.dma;
import core.result;
import core.text;

namespace fl::drivers::pvscsi {

u32 targets_of(std::span<const std::byte, config_bytes> page) {
    const auto load = [&](u32 at, auto value) {
        std::memcpy(&value, page.data() + at, sizeof value);
        return value;
    };
    if (load(config_host_status_at, u16{}) != 0 || load(config_scsi_status_at, u16{}) != scsi::status_good) {
        return default_targets;
    }
    const u32 targets = load(config_targets_at, u32{});
    return targets == 0 ? default_targets : std::min(targets, max_targets);
}

std::string_view name(HostStatus status) {
    switch (status) {
    case HostStatus::success: return "SUCCESS";
    case HostStatus::linked_complete: return "LINKED COMMAND COMPLETED";
    case HostStatus::linked_complete_with_flag: return "LINKED COMMAND COMPLETED WITH FLAG";
    case HostStatus::data_underrun: return "DATA UNDERRUN";
    case HostStatus::selection_timeout: return "SELECTION TIMEOUT";
    case HostStatus::data_run: return "DATA OVERRUN OR UNDERRUN";
    case HostStatus::bus_free: return "UNEXPECTED BUS FREE";
    case HostStatus::invalid_phase: return "INVALID PHASE";
    case HostStatus::lun_mismatch: return "LUN MISMATCH";
    case HostStatus::invalid_parameter: return "INVALID PARAMETER";
    case HostStatus::sense_failed: return "SENSE FAILED";
    case HostStatus::tag_reject: return "TAG REJECTED";
    case HostStatus::bad_message: return "BAD MESSAGE";
    case HostStatus::hardware: return "ADAPTER HARDWARE ERROR";
    case HostStatus::no_response: return "NO RESPONSE";
    case HostStatus::sent_reset: return "RESET SENT";
    case HostStatus::received_reset: return "RESET RECEIVED";
    case HostStatus::disconnect: return "DISCONNECTED";
    case HostStatus::bus_reset: return "BUS RESET";
    case HostStatus::abort_queue: return "ABORTED";
    case HostStatus::software: return "ADAPTER SOFTWARE ERROR";
    case HostStatus::timeout: return "ADAPTER TIME-OUT";
    case HostStatus::scsi_parity: return "PARITY ERROR";
    default: return "unknown host status";
    }
}

scsi::ServiceResponse service_of(HostStatus status) {
    switch (status) {
    case HostStatus::success:
    case HostStatus::linked_complete:
    case HostStatus::linked_complete_with_flag:
    case HostStatus::data_underrun:
    case HostStatus::data_run: return scsi::ServiceResponse::command_complete;
    case HostStatus::selection_timeout: return scsi::ServiceResponse::no_unit;
    case HostStatus::sent_reset:
    case HostStatus::received_reset:
    case HostStatus::bus_reset:
    case HostStatus::abort_queue: return scsi::ServiceResponse::aborted;
    default: return scsi::ServiceResponse::failed;
    }
}

scsi::Response response_of(const CompletionDescriptor& completion, u32 requested) {
    const auto host = static_cast<HostStatus>(completion.host_status);
    return {.service = service_of(host),
            .status = static_cast<u8>(completion.scsi_status),
            .moved = moved_of(completion, requested),
            .sense = {},
            .transport = {"host status", name(host), completion.host_status}};
}

} // namespace fl::drivers::pvscsi
