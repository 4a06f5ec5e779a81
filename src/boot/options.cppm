// The parsed command line (docs/INTERFACES.md "Command line"). Every word is checked, and all errors are reported
// together.
export module boot.options;
import core.std;
import core.text;
import core.time;
import core.log;
import core.processor;
import io.executor;
import io.net.ipv4;
import io.net.udp;
import io.verify;
import hv.detect;
import drivers.table;
import drivers.driver;
export import boot.loader_words;

export namespace fl::boot {

enum class Job : u8 { boot, bench, verify, panic, idle, net };
inline constexpr std::array<std::string_view, 6> job_names{"boot", "bench", "verify", "panic", "idle", "net"};
constexpr std::string_view name(Job job) { return job_names[to_underlying(job)]; }

/// The fault that job=panic triggers.
enum class Fault : u8 { ud, gp, pf, text, nx, stack, div, panic };
inline constexpr std::array<std::string_view, 8> fault_names{"ud", "gp", "pf", "text", "nx", "stack", "div", "panic"};
constexpr std::string_view name(Fault fault) { return fault_names[to_underlying(fault)]; }

/// The one-shot timer that wakes the processors. automatic: the hypervisor's, if it has one and the processor's own
/// timer has no deadline mode.
enum class TimerChoice : u8 { automatic, processor, hypervisor };
inline constexpr std::array<std::string_view, 3> timer_names{"auto", "processor", "hypervisor"};

/// A bounded list of texts from the command line.
struct TextList {
    static constexpr usize capacity = 32;

    std::array<std::string_view, capacity> list{};
    u32 count = 0;

    constexpr bool add(std::string_view text) {
        if (count == capacity) {
            return false;
        }
        list[count++] = text;
        return true;
    }
    constexpr std::span<const std::string_view> all() const { return {list.data(), count}; }
    constexpr bool has(std::string_view text) const { return std::ranges::find(all(), text) != all().end(); }
};

/// A set of disks: named ones, all, or none.
struct DiskChoice {
    bool all = false;
    TextList names;
    constexpr bool chosen(std::string_view disk) const { return all || names.has(disk); }
};

/// Words that a loader added for Linux. virtio_mmio.device words are kept apart, because this kernel uses them.
struct LoaderWords {
    static constexpr usize max_devices = 64;

    TextList ignored;        // whole words
    u32 ignored_dropped = 0; // number that did not fit
    std::array<MmioDevice, max_devices> device_list{};
    u32 device_count = 0;
    u32 devices_dropped = 0; // well-formed ones that did not fit

    constexpr std::span<const MmioDevice> devices() const { return {device_list.data(), device_count}; }
    constexpr void ignore(std::string_view word) { ignored_dropped += ignored.add(word) ? 0 : 1; }
};

struct PingOptions {
    io::net::Ipv4Address address;
    u32 count = 4;
};

struct UdpOptions {
    enum class Mode : u8 { echo, send, receive } mode = Mode::echo;
    io::net::Endpoint to; // send
    u16 port = 0;         // echo, receive
    u64 count = 0;        // send: datagrams; receive: expected, 0: as many as the sender says
    u32 bytes = 64;       // send: of each datagram
    u32 rate = 0;         // send: datagrams per second, 0: as fast as the card takes them
    u32 seconds = 10;     // echo: how long; receive: the longest silence
};
inline constexpr std::array<std::string_view, 3> udp_mode_names{"echo", "send", "receive"};

/// For job=net.
struct NetOptions {
    std::string_view card; // empty: the first
    bool dhcp = true;
    io::net::Subnet subnet; // without DHCP
    io::net::Ipv4Address gateway;
    std::optional<PingOptions> ping;
    static constexpr usize most_udps = 4;
    std::array<UdpOptions, most_udps> udp_list{};
    u32 udps = 0;

    constexpr std::span<const UdpOptions> all_udp() const { return {udp_list.data(), udps}; }
};

/// All text is a view into the command line, which must outlive this.
struct Options {
    Job job = Job::boot;
    TextList workloads; // unparsed; io.bench parses them
    DiskChoice disk{.all = true, .names = {}};
    DiskChoice scratch;
    std::optional<u64> count; // verify: blocks, 0 the whole disk
    std::optional<u64> bs;    // verify: bytes
    std::optional<u64> qd;    // verify
    std::optional<u64> seed;  // verify
    u64 generation = 1;       // verify
    io::Erase erase;          // verify
    hv::Preference hv;
    TextList map; // rules with commas, for drivers::Table::apply_word, after the map file
    std::optional<drivers::Twin> emulated;
    Nanoseconds timeout = 5'000'000'000;
    u32 withheld_features = 0; // bits of drivers::Feature
    u64 cpus = max_processors; // maximum number of processors to use
    u64 processor = 0;         // panic: the processor to fault on
    u64 lanes = 1;             // bench: lanes to use on each disk
    u64 marks = 0;             // bench: I/O port written before and after each workload; 0: none
    TimerChoice timer = TimerChoice::automatic;
    std::optional<io::Wait> wait; // unless given: interrupt, and sleep is not timed
    log::Level log = log::Level::info;
    Fault fault = Fault::panic;
    NetOptions net;
    LoaderWords loader;
};

/// Complete error messages: what was expected, what was given, what to write instead.
struct OptionErrors {
    static constexpr usize capacity = 12;

    std::array<FixedText<384>, capacity> list{};
    u32 count = 0;
    u32 dropped = 0; // number that did not fit

    constexpr std::span<const FixedText<384>> all() const { return {list.data(), count}; }
    constexpr bool empty() const { return count == 0; }
};

/// Parses the whole command line. An option with an invalid value keeps its default. Known loader words, and everything
/// after "--" (for Linux's init), go to into.loader; a word in double quotes may contain blanks. True: no errors.
bool parse_options(std::string_view cmdline, Options& into, OptionErrors& errors);

/// "-packed,-ncq": the words of the features key for these bits of drivers::Feature.
FixedText<240> feature_words(u32 bits);

} // namespace fl::boot
