// What the host sends: checks and decoding of completions and of its own packets. Nothing of them is trusted.
module;
#include <cstddef>
export module drivers.storvsc.answer;
import core.std;
import core.result;
import io.block;
import io.block_queue;
import hv.hyperv.channel;
import drivers.scsi.commands;
import drivers.storvsc.queue;
export import drivers.storvsc.protocol;

export namespace fl::drivers::storvsc {

/// The most bytes of data that the answer to a command may report.
inline u32 most_data(const io::QueuedCommand& command) {
    const bool unmap = command.exchange == nullptr && command.op == io::Op::discard;
    return std::max(command.bytes, unmap ? scsi::unmap_list_bytes : 0u);
}

/// Copies the payload of a completion to `answer`. An answer to EXECUTE_SRB has the length that the version defines,
/// and at most most_data(). False: it violates the protocol, as `fault` says.
inline bool decode(std::span<const std::byte> payload, Version version, const io::QueuedCommand& command,
                   Packet& answer, std::optional<Error>& fault) {
    const auto* exchange = static_cast<const Exchange*>(command.exchange);
    const bool srb = exchange == nullptr || exchange->packet.header.operation == Operation::execute_srb;
    const u32 most = most_data(command);
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

/// The unit has done the whole command. Otherwise response_of() must be judged.
inline bool succeeded(const ScsiRequest& srb, const io::QueuedCommand& command) {
    const SrbStatus status = srb_status_of(srb.srb_status);
    return srb.scsi_status == scsi::status_good &&
           (status == SrbStatus::success || status == SrbStatus::data_overrun) &&
           scsi::moved_all(command, srb.data_transfer_length);
}

/// The usual answer, found by one look: to a read or write, of the whole length, and all of it done. It violates no
/// rule and needs no decode(), which finds the same. `packet`: its word(i) is the i-th word of a whole packet.
template <class Words>
[[gnu::always_inline]] inline bool all_done(const Words& packet, const io::QueuedCommand& command) {
    static_assert(offsetof(Packet, srb.srb_status) == 14 && offsetof(Packet, srb.scsi_status) == 15 &&
                  offsetof(Packet, srb.data_transfer_length) == 24);
    const u64 statuses = packet.word(1) >> 48;
    return static_cast<u32>(packet.word(0)) == to_underlying(Operation::complete_io) &&
           srb_status_of(static_cast<u8>(statuses)) == SrbStatus::success && statuses >> 8 == scsi::status_good &&
           static_cast<u32>(packet.word(3)) == command.bytes && command.exchange == nullptr && io::has_data(command.op);
}

/// Takes the next packet if it is the usual answer to one of `commands`, whose id it then has. Other: nothing was done.
template <class Commands>
[[gnu::always_inline]] inline hv::hyperv::Look take_done(PacketQueue& packets, Commands& commands, u64& id) {
    return packets.take_completion([&](u64 transaction, const auto& packet) __attribute__((always_inline)) {
        const auto* command = commands.find(transaction);
        id = transaction;
        return command != nullptr && !command->delayed && all_done(packet, *command);
    });
}

/// A packet that is not a completion. True: the units have changed, and must be scanned again. Error{protocol}: not a
/// packet that a host sends.
Result<bool> units_changed(const hv::hyperv::Packet& packet);

/// Decodes an answer to EXECUTE_SRB. The version determines the length of its sense data.
scsi::Response response_of(const ScsiRequest& srb, Version version);

} // namespace fl::drivers::storvsc
