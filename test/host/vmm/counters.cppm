// Counters by name. Snapshots are taken of all of them; the difference of two snapshots is printed as one line of JSON.
export module vmm.counters;
import host.std;

export namespace fl::vmm {

/// Exit reasons of KVM_RUN.
enum class Exit : u8 {
    io_in,
    io_out,
    memory, // an access to an address without memory
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

/// `{"name":difference,…}` of the counters that differ; a name missing in `earlier` counts as 0 there.
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
