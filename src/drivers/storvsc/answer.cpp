module drivers.storvsc.answer;
import core.std;
import core.log;
import core.result;
import core.text;
import hv.hyperv.channel;
import drivers.scsi.commands;

namespace fl::drivers::storvsc {

using hv::hyperv::PacketType;

Result<bool> units_changed(const hv::hyperv::Packet& packet) {
    if (packet.type != PacketType::inband) {
        return Error{Code::protocol, "a packet of a type that a storage host does not send",
                     to_underlying(PacketType::completion), to_underlying(packet.type)};
    }
    if (packet.payload.size() < sizeof(Operation)) {
        return Error{Code::protocol, "a storage packet is shorter than its operation", sizeof(Operation),
                     packet.payload.size()};
    }
    Operation operation;
    std::memcpy(&operation, packet.payload.data(), sizeof operation);
    switch (operation) {
    case Operation::enumerate_bus:
    case Operation::remove_device: return true;
    case Operation::event_notification: return false;
    case Operation::complete_io: return Error{Code::protocol, "a COMPLETE_IO without a request", 0, packet.transaction};
    default: log::debug("storvsc: the host sends {}: not for a guest", name(operation)); return false;
    }
}

namespace {

scsi::ServiceResponse service_of(SrbStatus status, u8 scsi_status) {
    if (is_no_device(status)) {
        return scsi::ServiceResponse::no_unit;
    }
    if (was_flushed(status)) {
        return scsi::ServiceResponse::aborted;
    }
    switch (status) {
    case SrbStatus::success:
    case SrbStatus::data_overrun: return scsi::ServiceResponse::command_complete;
    case SrbStatus::busy: return scsi::ServiceResponse::busy;
    case SrbStatus::error: // reported by the unit, if its SCSI status is not GOOD
        return scsi_status != scsi::status_good ? scsi::ServiceResponse::command_complete
                                                : scsi::ServiceResponse::failed;
    default: return scsi::ServiceResponse::failed;
    }
}

} // namespace

scsi::Response response_of(const ScsiRequest& srb, Version version) {
    const SrbStatus status = srb_status_of(srb.srb_status);
    scsi::Response response{.service = service_of(status, srb.scsi_status),
                            .status = srb.scsi_status,
                            .moved = srb.data_transfer_length,
                            .sense = {},
                            .transport = {"SRB status", name(status), srb.srb_status}};
    if ((srb.srb_status & srb_autosense_valid) != 0) {
        response.sense = scsi::parse_sense(
            std::span(srb.payload).first(std::min<usize>(srb.sense_info_length, sense_bytes(version))));
    }
    return response;
}

} // namespace fl::drivers::storvsc
