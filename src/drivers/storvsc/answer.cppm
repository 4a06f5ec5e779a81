// What the host sends: checks and decoding of completions and of its own packets. Nothing of them is trusted.
export module drivers.storvsc.answer;
import core.std;
import core.result;
import hv.hyperv.channel;
import drivers.scsi.commands;
export import drivers.storvsc.protocol;

export namespace fl::drivers::storvsc {

/// Copies the payload of a completion to `answer`. `srb`: it answers EXECUTE_SRB, and has then the length that the
/// version defines, and at most `most` bytes of data. False: it violates the protocol, as `fault` says.
[[gnu::always_inline]] inline bool decode(std::span<const std::byte> payload, Version version, bool srb, u32 most,
                                          Packet& answer, std::optional<Error>& fault) {
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

/// A packet that is not a completion. True: the units have changed, and must be scanned again. Error{protocol}: not a
/// packet that a host sends.
Result<bool> units_changed(const hv::hyperv::Packet& packet);

/// Decodes an answer to EXECUTE_SRB. The version determines the length of its sense data.
scsi::Response response_of(const ScsiRequest& srb, Version version);

} // namespace fl::drivers::storvsc
