// What the host sends: checks and decoding of completions and of its own packets. Nothing of them is trusted.
export module drivers.storvsc.answer;
import core.std;
import core.result;
import io.block;
import io.block_queue;
import hv.hyperv.channel;
import drivers.scsi.commands;
export import drivers.storvsc.protocol;

export namespace fl::drivers::storvsc {

/// Copies the payload of a completion to `answer`. `srb`: it answers EXECUTE_SRB, and has then the length that the
/// version defines, and at most `most` bytes of data. False: it violates the protocol, as `fault` says.
inline bool decode(std::span<const std::byte> payload, Version version, bool srb, u32 most, Packet& answer,
                   std::optional<Error>& fault) {
    // Before version negotiation a host may answer with either length, even to a packet without an SRB [storvsc].
    const u32 length = packet_bytes(version);
    if (srb ? payload.size() != length : payload.size() < sizeof(PacketHeader)) [[unlikely]] {
        fault = Error{Code::protocol, "a completion's length is not that of the negotiated version's packets", length,
                      payload.size()};
        return false;
    }
    if (srb && length == sizeof answer) [[likely]] {
        std::memcpy(&answer, payload.data(), sizeof answer);
    } else {
        answer = {};
        std::memcpy(&answer, payload.data(), std::min(payload.size(), sizeof answer));
    }
    if (answer.header.operation != Operation::complete_io) [[unlikely]] {
        fault = Error{Code::protocol, "a completion is not a COMPLETE_IO", to_underlying(Operation::complete_io),
                      to_underlying(answer.header.operation)};
        return false;
    }
    if (srb && answer.srb.data_transfer_length > most) [[unlikely]] {
        fault = Error{Code::protocol, "a completion reports more data than was requested", most,
                      answer.srb.data_transfer_length};
        return false;
    }
    return true;
}

/// The most bytes of data that the answer to a command may report.
inline u32 most_data(const io::QueuedCommand& command) {
    const bool unmap = command.exchange == nullptr && command.op == io::Op::discard;
    return std::max(command.bytes, unmap ? scsi::unmap_list_bytes : 0u);
}

/// The unit has done the whole command. Otherwise response_of() must be judged.
inline bool succeeded(const ScsiRequest& srb, const io::QueuedCommand& command) {
    const SrbStatus status = srb_status_of(srb.srb_status);
    return srb.scsi_status == scsi::status_good &&
           (status == SrbStatus::success || status == SrbStatus::data_overrun) &&
           scsi::moved_all(command, srb.data_transfer_length);
}

/// The usual answer, found by one look: to a read or write, of the whole length, and all of it done. It violates no
/// rule and needs no decode(), which finds the same. `payload`: the guest's own copy, aligned to 8 bytes.
[[gnu::always_inline]] inline bool all_done(std::span<const std::byte> payload, Version version,
                                            const io::QueuedCommand& command) {
    if (payload.size() != sizeof(Packet) || packet_bytes(version) != sizeof(Packet)) [[unlikely]] {
        return false;
    }
    const auto& answer = *reinterpret_cast<const Packet*>(payload.data());
    return answer.header.operation == Operation::complete_io && command.exchange == nullptr &&
           io::has_data(command.op) && answer.srb.scsi_status == scsi::status_good &&
           srb_status_of(answer.srb.srb_status) == SrbStatus::success &&
           answer.srb.data_transfer_length == command.bytes;
}

/// A packet that is not a completion. True: the units have changed, and must be scanned again. Error{protocol}: not a
/// packet that a host sends.
Result<bool> units_changed(const hv::hyperv::Packet& packet);

/// Decodes an answer to EXECUTE_SRB. The version determines the length of its sense data.
scsi::Response response_of(const ScsiRequest& srb, Version version);

} // namespace fl::drivers::storvsc
