// Fault injection: protocol rules that the host can violate, to test how a guest reacts; one fault per run, at a chosen
// occurrence.
export module host.faults;
import host.std;
import core.result;

export namespace fl::host {

enum class Fault : u8 {
    none,
    // the ring from host to guest
    write_index_beyond,
    read_index_beyond,
    packet_too_long,
    packet_too_short,
    packet_offset,
    packet_trailer,
    packet_type,
    rewrite_completion,
    signal_storm,
    // transactions
    unknown_transaction,
    repeated_completion,
    early_completion,
    no_answer,
    // storage
    completion_too_long,
    short_transfer,
    medium_error,
    write_protected,
    unit_attention,
    // replies to messages and to the storage protocol's initialisation
    no_version_response,
    no_gpadl_created,
    no_open_result,
    no_storage_version,
    refuse_versions,
    refuse_new_versions,
    refuse_storage_versions,
    refuse_gpadl,
    refuse_open,
    // the bus
    rescind_at_open,
    rescind_in_flight,
    unknown_message,
    short_message,
    duplicate_relid,
};

struct FaultName {
    Fault fault;
    std::string_view name; // for the command line
    std::string_view rule; // the rule that it violates; "none: …" if the host may do this
};

inline constexpr std::array fault_names{
    FaultName{Fault::write_index_beyond, "write-index", "the write index of a ring is below the ring's size"},
    FaultName{Fault::read_index_beyond, "read-index", "the read index of a ring is below the ring's size"},
    FaultName{Fault::packet_too_long, "packet-too-long", "a packet's length is within the published data"},
    FaultName{Fault::packet_too_short, "packet-too-short", "a packet is at least as long as its descriptor"},
    FaultName{Fault::packet_offset, "packet-offset",
              "a packet's payload begins after its descriptor and within the packet"},
    FaultName{Fault::packet_trailer, "packet-trailer", "a packet's trailer names the place where the packet began"},
    FaultName{Fault::packet_type, "packet-type", "a packet's type is defined by the protocol"},
    FaultName{Fault::rewrite_completion, "rewrite", "a packet does not change once its index was published"},
    FaultName{Fault::signal_storm, "signal-storm", "an interrupt means that a ring is not empty"},
    FaultName{Fault::unknown_transaction, "unknown-transaction", "a completion's transaction id is that of a request"},
    FaultName{Fault::repeated_completion, "repeated-completion", "a request is completed once"},
    FaultName{Fault::early_completion, "early-completion", "a completion follows its request"},
    FaultName{Fault::no_answer, "no-answer", "a request is completed"},
    FaultName{Fault::completion_too_long, "length-beyond", "no more data is transferred than requested"},
    FaultName{Fault::short_transfer, "short-transfer", "a read or write that succeeds transfers everything"},
    FaultName{Fault::medium_error, "medium-error", "none: a sector that cannot be read or written (sense key 3)"},
    FaultName{Fault::write_protected, "write-protected", "none: a disk that has become read-only (sense key 7)"},
    FaultName{Fault::unit_attention, "unit-attention", "none: the disk was reset meanwhile, retry (sense key 6)"},
    FaultName{Fault::no_version_response, "no-version-response", "INITIATE_CONTACT is answered"},
    FaultName{Fault::no_gpadl_created, "no-gpadl-created", "a complete GPADL is answered"},
    FaultName{Fault::no_open_result, "no-open-result", "OPEN_CHANNEL is answered"},
    FaultName{Fault::no_storage_version, "no-storage-version", "QUERY_PROTOCOL_VERSION is answered"},
    FaultName{Fault::refuse_versions, "refuse-versions",
              "none: the host supports no version of the bus that the guest does"},
    FaultName{Fault::refuse_new_versions, "refuse-new-versions", "none: the host is an old one, 3.0"},
    FaultName{Fault::refuse_storage_versions, "refuse-storage-versions",
              "none: the host supports no version of the storage protocol"},
    FaultName{Fault::refuse_gpadl, "refuse-gpadl", "none: the host has no room for a GPADL"},
    FaultName{Fault::refuse_open, "refuse-open", "none: the host cannot open the channel"},
    FaultName{Fault::rescind_at_open, "rescind-at-open", "none: the device is rescinded while it is being opened"},
    FaultName{Fault::rescind_in_flight, "rescind-in-flight",
              "none: the device is rescinded while requests are in flight"},
    FaultName{Fault::unknown_message, "unknown-message", "a message's type is defined by the version"},
    FaultName{Fault::short_message, "short-message", "a message has the length of its type"},
    FaultName{Fault::duplicate_relid, "duplicate-relid", "an offer's channel number is not in use"},
};

/// Injects `fault` at occurrences after+1 to after+count of the request, packet or message that it applies to.
struct FaultSpec {
    Fault fault = Fault::none;
    u32 after = 0;
    u32 count = 1;
};

/// "name[,after=N][,count=N]". Error{bad_argument}: no such fault, or a malformed number.
Result<FaultSpec> parse_fault(std::string_view text);

/// Decides when to inject. An occurrence costs one comparison while another fault, or none, is selected.
class FaultPlan {
  public:
    FaultPlan() = default;
    explicit FaultPlan(const FaultSpec& spec) : spec_(spec) {}
    Fault fault() const { return spec_.fault; }
    u32 injected() const { return injected_; }
    /// An occurrence to which `fault` applies: true if it is to be injected now.
    bool injects(Fault fault) {
        if (fault != spec_.fault) [[likely]] {
            return false;
        }
        const u32 occurrence = occurrences_++;
        if (occurrence < spec_.after || occurrence - spec_.after >= spec_.count) {
            return false;
        }
        ++injected_;
        return true;
    }

  private:
    FaultSpec spec_;
    u32 occurrences_ = 0;
    u32 injected_ = 0;
};

} // namespace fl::host
