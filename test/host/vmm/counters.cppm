// Counts by name, taken as a whole now and then; what is printed is the difference of two takings, as one line of JSON.
export module vmm.counters;
import host.std;

export namespace fl::vmm {

/// The reasons for which KVM gives a processor back to this program.
enum class Exit : u8 {
    io_in,
    io_out,
    memory, // an access where there is no memory
    synic,
    post_message,
    signal_event,
    other_hypercall,
    shutdown, // triple fault
    interrupted,
    other,
    count,
};
inline constexpr std::array<std::string_view, to_underlying(Exit::count)> exit_names{
    "io_in",        "io_out",          "memory",   "synic",       "post_message",
    "signal_event", "other_hypercall", "shutdown", "interrupted", "other",
};

using Snapshot = std::map<std::string, u64, std::less<>>;

/// `{"name":difference,…}` of what differs; the names of `earlier` count as 0 where they are missing.
inline std::string difference(const Snapshot& earlier, const Snapshot& later) {
    std::string text = "{";
    for (const auto& [name, value] : later) {
        const auto before = earlier.find(name);
        const u64 change = value - (before == earlier.end() ? 0 : before->second);
        if (change != 0) {
            text += (text.size() == 1 ? "\"" : ",\"") + name + "\":" + std::to_string(change);
        }
    }
    return text + "}";
}

} // namespace fl::vmm
