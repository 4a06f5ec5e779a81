// The guest side of one integration service: transforms a message into its answer, in the same buffer. Independent of
// the channel, so that it can be tested and fuzzed separately.
export module drivers.hv_util.service;
import core.std;
import core.result;
import core.text;
export import drivers.hv_util.protocol;

export namespace fl::drivers::hv_util {

enum class Kind : u8 { shutdown, heartbeat, time_sync };
constexpr std::string_view name(Kind kind) {
    constexpr std::array<std::string_view, 3> names{"shutdown", "heartbeat", "time synchronisation"};
    return names[to_underlying(kind)];
}
constexpr std::string_view class_of(Kind kind) {
    constexpr std::array<std::string_view, 3> classes{shutdown_class, heartbeat_class, time_sync_class};
    return classes[to_underlying(kind)];
}

class Service {
  public:
    explicit Service(Kind kind) : kind_(kind) {}

    /// Action required by a message in addition to its answer.
    enum class Action : u8 {
        none,
        shut_down, // the answer is in the buffer, to be sent once the disks are flushed; refuse() changes it
        set_clock, // host_time() has been updated
    };
    /// `message`: a complete message, in a private copy; replaced by the answer, which has the same length.
    /// Error{protocol}: no answer is due, and later messages must not be trusted.
    Result<Action> answer(std::span<std::byte> message);
    /// Turns the answer to a shutdown into a refusal.
    static void refuse(std::span<std::byte> message);

    Kind kind() const { return kind_; }
    bool negotiated() const { return message_version_.major != 0; }
    Version framework_version() const { return framework_version_; }
    Version message_version() const { return message_version_; }

    /// The host's clock as of set_clock, in nanoseconds since 1970, and the partition's reference counter (100 ns) at
    /// that time, if given.
    struct HostTime {
        u64 unix_ns = 0;
        std::optional<u64> reference;
        /// The host's clock at counter value `counter`, corrected for the message's time in transit. Uncorrected if
        /// either counter is missing, or their difference is negative or implausibly large.
        u64 at(std::optional<u64> counter) const {
            constexpr u64 longest = 60 * 10'000'000ull; // one minute in transit
            const bool known = reference && counter && *counter >= *reference && *counter - *reference <= longest;
            return unix_ns + (known ? (*counter - *reference) * 100 : 0);
        }
    };
    const HostTime& host_time() const { return host_time_; }
    u64 heartbeats() const { return heartbeats_; }

  private:
    Result<Action> negotiate(Header& header, std::span<std::byte> body);
    Result<Action> shut_down(Header& header, std::span<std::byte> body);
    Result<Action> on_heartbeat(Header& header, std::span<std::byte> body);
    Result<Action> take_time(Header& header, std::span<std::byte> body);

    Kind kind_;
    Version framework_version_{};
    Version message_version_{};
    HostTime host_time_;
    u64 heartbeats_ = 0;
};

} // namespace fl::drivers::hv_util
