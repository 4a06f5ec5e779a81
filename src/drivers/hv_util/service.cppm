// One integration service's half of the conversation: a message in, its answer out, in the same buffer. Knows no
// channel, so that it is tested and fuzzed alone.
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

    /// What a message asks for besides its answer.
    enum class Action : u8 {
        none,
        shut_down, // the answer stands in the buffer and is sent once the disks are at rest; refuse() changes it
        set_clock, // host_time() is new
    };
    /// `message`: what came, whole, in a private copy; it becomes the answer, which is as long. Error{protocol}: no
    /// answer is due, and what follows can't be trusted.
    Result<Action> answer(std::span<std::byte> message);
    /// Makes the answer of a shutdown a refusal.
    static void refuse(std::span<std::byte> message);

    Kind kind() const { return kind_; }
    bool negotiated() const { return message_version_.major != 0; }
    Version framework_version() const { return framework_version_; }
    Version message_version() const { return message_version_; }

    /// The host's clock as of set_clock, in nanoseconds since 1970, and the partition's reference counter (100 ns) when
    /// it was read, if it said.
    struct HostTime {
        u64 unix_ns = 0;
        std::optional<u64> reference;
        /// The same clock when the counter stands at `counter`: the message was under way for a while. Without either
        /// of them, or when they lie too far apart to be believed (or the wrong way round): as it was read.
        u64 at(std::optional<u64> counter) const {
            constexpr u64 longest = 60 * 10'000'000ull; // a minute under way
            const bool known = reference && counter && *counter >= *reference && *counter - *reference <= longest;
            return unix_ns + (known ? (*counter - *reference) * 100 : 0);
        }
    };
    const HostTime& host_time() const { return host_time_; }
    u64 heartbeats() const { return heartbeats_; }

  private:
    Result<Action> negotiate(Header& header, std::span<std::byte> body);
    Result<Action> shut_down(Header& header, std::span<std::byte> body);
    Result<Action> beat(Header& header, std::span<std::byte> body);
    Result<Action> take_time(Header& header, std::span<std::byte> body);

    Kind kind_;
    Version framework_version_{};
    Version message_version_{};
    HostTime host_time_;
    u64 heartbeats_ = 0;
};

} // namespace fl::drivers::hv_util
