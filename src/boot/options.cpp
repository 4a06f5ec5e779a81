module boot.options;
import core.std;
import core.text;
import core.time;
import core.log;
import core.processor;
import core.cmdline;
import core.suggest;
import io.executor;
import io.net.ipv4;
import io.net.numbered;
import io.net.udp;
import hv.detect;
import drivers.table;
import drivers.driver;

namespace fl::boot {

namespace {

using Message = FixedText<384>;

constexpr std::array<std::string_view, 4> level_names{"error", "warning", "info", "debug"};
static_assert(level_names[to_underlying(log::Level::debug)] == log::name(log::Level::debug));

// The operations listed for the erase key.
constexpr std::array<std::string_view, 3> erase_names{"discard", "zeroes", "secure-discard"};

struct FeatureName {
    std::string_view name;
    drivers::Feature feature;
};
constexpr auto features = std::to_array<FeatureName>({
    {"-persistent", drivers::Feature::persistent},
    {"-indirect", drivers::Feature::indirect},
    {"-ring-pages", drivers::Feature::ring_pages},
    {"-flush", drivers::Feature::flush},
    {"-barrier", drivers::Feature::barrier},
    {"-event-idx", drivers::Feature::event_idx},
    {"-packed", drivers::Feature::packed},
    {"-in-order", drivers::Feature::in_order},
    {"-discard", drivers::Feature::discard},
    {"-msi", drivers::Feature::messages},
    {"-multi-queue", drivers::Feature::multi_queue},
    {"-shadow-doorbells", drivers::Feature::shadow_doorbells},
    {"-ncq", drivers::Feature::ncq},
    {"-write-zeroes", drivers::Feature::write_zeroes},
    {"-config-wce", drivers::Feature::config_wce},
    {"-scatter-gather", drivers::Feature::scatter},
    {"-checksum", drivers::Feature::checksum},
    {"-fifo-events", drivers::Feature::fifo_events},
    {"-secure-discard", drivers::Feature::secure_discard},
});
constexpr auto feature_names = [] {
    std::array<std::string_view, features.size()> names{};
    for (usize i = 0; i < features.size(); ++i) {
        names[i] = features[i].name;
    }
    return names;
}();

// The values listed for the hv key; parse_preference() accepts every VmGuest name.
constexpr std::array<std::string_view, 8> hv_names{"auto", "xen", "hyperv", "kvm", "tcg", "vmware", "bare", "late"};

// What a value should have been. Absent: the value was valid.
struct Wrong {
    std::string_view expected;                 // "a number from 1"; empty: one of `valid`
    std::span<const std::string_view> valid{}; // for the list and the suggestion in the message
    std::string_view seen{};                   // the part of the value that is wrong; empty: all of it
};
using Answer = std::optional<Wrong>;

template <usize N>
std::optional<usize> index_of(const std::array<std::string_view, N>& names, std::string_view value) {
    const auto at = std::ranges::find(names, value);
    return at == names.end() ? std::nullopt : std::optional(static_cast<usize>(at - names.begin()));
}

template <class E, usize N>
Answer pick(E& into, const std::array<std::string_view, N>& names, std::string_view value) {
    const auto index = index_of(names, value);
    if (!index) {
        return Wrong{{}, names};
    }
    into = static_cast<E>(*index);
    return {};
}

template <class T>
Answer number(T& into, std::string_view value, u64 lowest, u64 highest, std::string_view expected) {
    const auto n = parse_size(value);
    if (!n || *n < lowest || *n > highest) {
        return Wrong{expected};
    }
    into = *n;
    return {};
}

constexpr std::array<std::string_view, 1> only_all{"all"};
constexpr std::array<std::string_view, 2> none_or_all{"none", "all"};

Answer disks(DiskChoice& into, std::string_view value, bool may_be_none) {
    DiskChoice choice;
    if (value == "all") {
        choice.all = true;
    } else if (!(may_be_none && value == "none")) {
        if (value.empty()) {
            return may_be_none ? Wrong{"none, all or names of disks with commas between them", none_or_all}
                               : Wrong{"all or names of disks with commas between them", only_all};
        }
        TextParts parts(value);
        while (const auto part = parts.next()) {
            if (part->empty() || *part == "all" || *part == "none") {
                return Wrong{"names of disks with commas between them, or one word for all or none of them"};
            }
            if (!choice.names.add(*part)) {
                return Wrong{"at most 32 names"};
            }
        }
    }
    into = choice;
    return {};
}

// The parts of a value after the first one, each NAME=NUMBER.
struct NumberPart {
    std::string_view name;
    u64 lowest;
    u64 highest;
    u64* into;
};
std::optional<std::string_view> wrong_number(TextParts& parts, std::span<const NumberPart> names) {
    while (const auto part = parts.next()) {
        const usize equals = part->find('=');
        const auto known = std::ranges::find(names, part->substr(0, equals), &NumberPart::name);
        const auto value = equals == std::string_view::npos ? std::nullopt : parse_size(part->substr(equals + 1));
        if (known == names.end() || !value || *value < known->lowest || *value > known->highest) {
            return *part;
        }
        *known->into = *value;
    }
    return std::nullopt;
}

Answer address(NetOptions& into, std::string_view value) {
    constexpr Wrong wrong{"dhcp or ADDRESS/PREFIX[,gateway=ADDRESS], as in 10.0.2.15/24,gateway=10.0.2.2"};
    into.dhcp = value == "dhcp";
    if (into.dhcp) {
        return {};
    }
    TextParts parts(value);
    const std::string_view own = parts.next().value_or("");
    const usize slash = own.find('/');
    const auto parsed = io::net::parse_address(own.substr(0, slash));
    const auto prefix = slash == std::string_view::npos ? std::nullopt : parse_number(own.substr(slash + 1));
    if (!parsed || !prefix || *prefix > 32) {
        return wrong;
    }
    into.subnet = {*parsed, static_cast<u8>(*prefix)};
    if (const auto part = parts.next()) {
        constexpr std::string_view key = "gateway=";
        const auto gateway = part->starts_with(key) ? io::net::parse_address(part->substr(key.size())) : std::nullopt;
        if (!gateway || !gateway->is_host() || *gateway == *parsed) {
            return wrong;
        }
        into.gateway = *gateway;
    }
    if (!into.subnet.is_valid() || parts.next()) {
        return wrong;
    }
    return {};
}

Answer ping(std::optional<PingOptions>& into, std::string_view value) {
    TextParts parts(value);
    const auto to = io::net::parse_address(parts.next().value_or(""));
    u64 count = PingOptions{}.count;
    const std::array<NumberPart, 1> names{{{"count", 1, 65536, &count}}};
    if (!to || !to->is_host() || wrong_number(parts, names)) {
        return Wrong{"ADDRESS[,count=1 to 65536], as in 10.0.2.2,count=4"};
    }
    into = {*to, static_cast<u32>(count)};
    return {};
}

Answer udp(NetOptions& into, std::string_view value) {
    TextParts parts(value);
    const std::string_view mode_name = parts.next().value_or("");
    const auto mode = index_of(udp_mode_names, mode_name);
    if (!mode) {
        return Wrong{{}, udp_mode_names, mode_name};
    }
    UdpOptions udp{.mode = static_cast<UdpOptions::Mode>(*mode)};
    u64 port = 0;
    u64 bytes = udp.bytes;
    u64 rate = udp.rate;
    u64 seconds = udp.seconds;
    constexpr u64 most = io::net::NumberedCount::most;
    if (udp.mode == UdpOptions::Mode::send) {
        constexpr Wrong wrong{"send,to=ADDRESS:PORT,count=N[,bytes=32 to 65507][,rate=N]; count is 1 to 1m"};
        constexpr std::string_view key = "to=";
        const std::string_view to = parts.next().value_or("");
        const usize colon = to.find(':');
        const auto host = to.starts_with(key) && colon != std::string_view::npos
                              ? io::net::parse_address(to.substr(key.size(), colon - key.size()))
                              : std::nullopt;
        const auto number = host ? parse_number(to.substr(colon + 1)) : std::nullopt;
        const std::array<NumberPart, 3> names{
            {{"count", 1, most, &udp.count}, {"bytes", 32, 65507, &bytes}, {"rate", 1, 1'000'000'000, &rate}}};
        if (!host || !host->is_host() || !number || *number == 0 || *number > 0xffff || wrong_number(parts, names) ||
            udp.count == 0) {
            return wrong;
        }
        udp.to = {*host, static_cast<u16>(*number)};
    } else {
        const std::array<NumberPart, 3> names{
            {{"port", 1, 0xffff, &port}, {"seconds", 1, 86400, &seconds}, {"count", 1, most, &udp.count}}};
        const bool receive = udp.mode == UdpOptions::Mode::receive;
        if (wrong_number(parts, std::span(names).first(receive ? 3 : 2)) || port == 0) {
            return receive ? Wrong{"receive,port=1 to 65535[,count=N][,seconds=1 to 86400]"}
                           : Wrong{"echo,port=1 to 65535[,seconds=1 to 86400]"};
        }
    }
    udp.port = static_cast<u16>(port);
    udp.bytes = static_cast<u32>(bytes);
    udp.rate = static_cast<u32>(rate);
    udp.seconds = static_cast<u32>(seconds);
    if (into.udps == NetOptions::most_udps) {
        return Wrong{"at most four of them"};
    }
    into.udp_list[into.udps++] = udp;
    return {};
}

constexpr u8 any_job = 0xff;
constexpr u8 only(Job job) { return static_cast<u8>(1u << to_underlying(job)); }

// One command line key; the table of keys describes the whole command line.
struct Key {
    std::string_view name;
    bool repeatable;
    u8 jobs; // the jobs that use this key; with any other job it is an error, so that it is not silently ignored
    Answer (*parse)(Options&, std::string_view value);
};
constexpr std::array<Key, 27> keys{{
    {"job", false, any_job, [](Options& o, std::string_view v) { return pick(o.job, job_names, v); }},
    {"workload", true, only(Job::bench),
     [](Options& o, std::string_view v) -> Answer {
         if (v.empty()) {
             return Wrong{"a workload such as randread,bs=4k,qd=1"};
         }
         return o.workloads.add(v) ? Answer{} : Wrong{"at most 32 workloads"};
     }},
    {"disk", false, any_job, [](Options& o, std::string_view v) { return disks(o.disk, v, false); }},
    {"scratch", false, any_job, [](Options& o, std::string_view v) { return disks(o.scratch, v, true); }},
    {"count", false, only(Job::verify),
     [](Options& o, std::string_view v) {
         return number(o.count, v, 0, ~u64{0}, "a number of blocks, 0 for the whole disk");
     }},
    {"bs", false, only(Job::verify),
     [](Options& o, std::string_view v) -> Answer {
         constexpr std::string_view expected = "a number of bytes, a multiple of 512 from 512 to 16m";
         const auto n = parse_size(v);
         if (n && *n % 512 != 0) {
             return Wrong{expected};
         }
         return number(o.bs, v, 512, 16_MiB, expected);
     }},
    {"qd", false, only(Job::verify),
     [](Options& o, std::string_view v) { return number(o.qd, v, 1, 1024, "a number from 1 to 1024"); }},
    {"seed", false, only(Job::verify),
     [](Options& o, std::string_view v) { return number(o.seed, v, 0, ~u64{0}, "a number"); }},
    {"generation", false, only(Job::verify),
     [](Options& o, std::string_view v) { return number(o.generation, v, 0, ~u64{0}, "a number"); }},
    {"erase", false, only(Job::verify),
     [](Options& o, std::string_view v) -> Answer {
         o.erase = {};
         TextParts parts(v);
         while (const auto part = parts.next()) {
             const auto index = index_of(erase_names, *part);
             if (!index) {
                 return Wrong{{}, erase_names, *part};
             }
             (*index == 0 ? o.erase.discard : *index == 1 ? o.erase.zeroes : o.erase.secure_discard) = true;
         }
         return {};
     }},
    {"hv", false, any_job,
     [](Options& o, std::string_view v) -> Answer {
         const auto preference = hv::parse_preference(v);
         if (!preference) {
             return Wrong{"auto, a hypervisor (xen, hyperv, kvm, tcg, vmware, bare), late or late:HYPERVISOR",
                          hv_names};
         }
         o.hv = *preference;
         return {};
     }},
    {"map", true, any_job,
     [](Options& o, std::string_view v) -> Answer {
         if (v.empty()) {
             return Wrong{"a rule of the map file with commas for the blanks, such as rank,xen,ata,xen_blk,-1"};
         }
         return o.map.add(v) ? Answer{} : Wrong{"at most 32 rules"};
     }},
    {"emulated", false, any_job,
     [](Options& o, std::string_view v) -> Answer {
         constexpr static std::array<std::string_view, 4> names{"table", "leave", "unplug", "keep"};
         if (v == "table") {
             o.emulated.reset();
             return {};
         }
         const auto index = index_of(drivers::twin_names, v);
         if (!index) {
             return Wrong{{}, names};
         }
         o.emulated = static_cast<drivers::Twin>(*index);
         return {};
     }},
    {"timeout", false, any_job,
     [](Options& o, std::string_view v) -> Answer {
         u64 ms = 0;
         auto wrong = number(ms, v, 1, 3'600'000, "milliseconds from 1 to 3600000");
         if (!wrong) {
             o.timeout = ms * 1'000'000;
         }
         return wrong;
     }},
    {"features", false, any_job,
     [](Options& o, std::string_view v) -> Answer {
         u32 bits = 0;
         TextParts parts(v);
         while (const auto part = parts.next()) {
             const auto index = index_of(feature_names, *part);
             if (!index) {
                 return Wrong{{}, feature_names, *part};
             }
             bits |= to_underlying(features[*index].feature);
         }
         o.withheld_features = bits;
         return {};
     }},
    {"log", false, any_job, [](Options& o, std::string_view v) { return pick(o.log, level_names, v); }},
    {"fault", false, only(Job::panic), [](Options& o, std::string_view v) { return pick(o.fault, fault_names, v); }},
    {"processor", false, only(Job::panic),
     [](Options& o, std::string_view v) {
         return number(o.processor, v, 0, max_processors - 1, "a number from 0 to 63");
     }},
    {"cpus", false, any_job,
     [](Options& o, std::string_view v) { return number(o.cpus, v, 1, max_processors, "a number from 1 to 64"); }},
    {"timer", false, any_job, [](Options& o, std::string_view v) { return pick(o.timer, timer_names, v); }},
    {"wait", false, any_job, [](Options& o, std::string_view v) { return pick(o.wait.emplace(), io::wait_names, v); }},
    {"lanes", false, only(Job::bench),
     [](Options& o, std::string_view v) { return number(o.lanes, v, 1, max_processors, "a number from 1 to 64"); }},
    {"marks", false, only(Job::bench),
     [](Options& o, std::string_view v) { return number(o.marks, v, 1, 0xfffc, "an I/O port, 1 to 0xfffc"); }},
    {"net", false, only(Job::net),
     [](Options& o, std::string_view v) -> Answer {
         if (v.empty()) {
             return Wrong{"the name of a network card, as in eth0"};
         }
         o.net.card = v;
         return {};
     }},
    {"address", false, only(Job::net), [](Options& o, std::string_view v) { return address(o.net, v); }},
    {"ping", false, only(Job::net), [](Options& o, std::string_view v) { return ping(o.net.ping, v); }},
    {"udp", true, only(Job::net), [](Options& o, std::string_view v) { return udp(o.net, v); }},
}};

constexpr auto key_names = [] {
    std::array<std::string_view, keys.size()> names;
    for (usize i = 0; i < keys.size(); ++i) {
        names[i] = keys[i].name;
    }
    return names;
}();

void write_list(Message& out, std::span<const std::string_view> names) {
    for (usize i = 0; i < names.size(); ++i) {
        print(out, "{}{}", i == 0 ? "" : ", ", names[i]);
    }
}

// A loader's word in full: a part in double quotes may contain blanks, as in Linux.
std::string_view whole_word(const CmdlineWord& word, CmdlineWords& rest) {
    std::string_view text = word.text;
    const auto quote_is_open = [&] {
        bool open = false;
        for (const char c : text) {
            open ^= c == '"';
        }
        return open;
    };
    while (quote_is_open()) {
        const auto more = rest.next();
        if (!more) {
            break;
        }
        text = {text.data(), static_cast<usize>(more->text.data() + more->text.size() - text.data())};
    }
    return text;
}

struct Collector {
    OptionErrors& errors;
    Message* next() {
        if (errors.count == OptionErrors::capacity) {
            ++errors.dropped;
            return nullptr;
        }
        errors.list[errors.count] = Message{};
        return &errors.list[errors.count++];
    }
};

} // namespace

FixedText<240> feature_words(u32 bits) {
    FixedText<240> text;
    for (const FeatureName& each : features) {
        if ((bits & to_underlying(each.feature)) != 0) {
            print(text, "{}{}", text.empty() ? "" : ",", each.name);
        }
    }
    return text;
}

bool parse_options(std::string_view cmdline, Options& into, OptionErrors& errors) {
    into = {};
    errors = {};
    Collector collector{errors};
    std::array<bool, keys.size()> given{};
    CmdlineWords words(cmdline);
    bool first = true;
    bool job_is_wrong = false;
    while (const auto word = words.next()) {
        const bool may_be_file_name = std::exchange(first, false);
        if (word->text == "--") { // the rest is for Linux's init
            while (const auto other = words.next()) {
                into.loader.ignore(whole_word(*other, words));
            }
            break;
        }
        const auto index = index_of(key_names, word->key);
        if (word->key == mmio_device_key) {
            const auto device = parse_mmio_device(word->value);
            if (device && into.loader.device_count < LoaderWords::max_devices) {
                into.loader.device_list[into.loader.device_count++] = *device;
            } else if (device) {
                ++into.loader.devices_dropped;
            } else if (Message* m = collector.next()) {
                print(*m, "{}={}: expected SIZE@ADDRESS:INTERRUPT[:ID], as in 4K@0xd0000000:5", mmio_device_key,
                      shown(word->value));
            }
            continue;
        }
        if (may_be_file_name && !word->has_value &&
            (word->key.find('.') != std::string_view::npos || !is_loader_word(word->key))) {
            continue;
        }
        if (!index && is_loader_word(word->key)) {
            into.loader.ignore(whole_word(*word, words));
            continue;
        }
        if (!index || !word->has_value) {
            if (Message* m = collector.next()) {
                if (index) {
                    print(*m, "'{}' has no value: write {}=VALUE", word->key, word->key);
                } else {
                    print(*m, "unknown key '{}'", shown(word->key));
                    if (const auto near = suggest(word->key, key_names); !near.empty()) {
                        print(*m, ": did you mean '{}'?", near);
                    } else {
                        m->write(".");
                    }
                    m->write(" Valid keys: ");
                    write_list(*m, key_names);
                }
            }
            continue;
        }
        const Key& key = keys[*index];
        if (given[*index] && !key.repeatable) {
            if (Message* m = collector.next()) {
                print(*m, "{}={}: '{}' was given before; it may be given once", key.name, shown(word->value), key.name);
            }
            continue;
        }
        given[*index] = true;
        if (const Answer wrong = key.parse(into, word->value)) {
            job_is_wrong = job_is_wrong || key.name == "job";
            if (Message* m = collector.next()) {
                const std::string_view seen = wrong->seen.empty() ? word->value : wrong->seen;
                print(*m, "{}={}: expected ", key.name, shown(word->value));
                if (wrong->expected.empty()) {
                    m->write("one of ");
                    write_list(*m, wrong->valid);
                } else {
                    m->write(wrong->expected);
                }
                print(*m, ", seen '{}'", shown(seen));
                if (const auto near = suggest(seen, wrong->valid); !near.empty()) {
                    print(*m, ": did you mean '{}'?", near);
                }
            }
        }
    }
    for (usize i = 0; i < keys.size(); ++i) {
        const Key& key = keys[i];
        if (!given[i] || job_is_wrong || (key.jobs & only(into.job)) != 0) {
            continue;
        }
        if (Message* m = collector.next()) {
            for (usize job = 0; job < job_names.size(); ++job) {
                if ((key.jobs & only(static_cast<Job>(job))) != 0) {
                    print(*m, "'{}' is for job={}, seen job={}", key.name, job_names[job], into.job);
                }
            }
            if (into.job == Job::bench && key.jobs == only(Job::verify)) {
                print(*m, ": with bench it is part of the workload, as in workload=randread,bs=4k,qd=32");
            }
        }
    }
    return errors.empty();
}

} // namespace fl::boot
