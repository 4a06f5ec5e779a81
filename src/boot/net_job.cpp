module;
#include "core/try.hpp"
module boot.net_job;
import core.std;
import core.log;
import core.result;
import core.text;
import core.time;
import core.verdict;
import io.executor;
import io.net;
import io.net.dhcp;
import io.net.dhcp_client;
import io.net.drop;
import io.net.interface;
import io.net.ipv4;
import io.net.numbered;
import io.net.udp;
import io.net.wire;
import io.random;
import io.run_on;
import io.task;
import boot.jobs;
import boot.nets;
import boot.options;

namespace fl::boot {

namespace {
namespace net = io::net;

constexpr Nanoseconds second = 1'000'000'000;
constexpr Nanoseconds dhcp_bound = 60 * second;
/// How often and how long the sender asks for what the receiver has counted.
constexpr u32 report_attempts = 10;
constexpr Nanoseconds report_bound = second / 2;
/// How long a receiver still answers a sender that did not get its counts.
constexpr Nanoseconds linger = second;
// With rate=: of a time in which this machine did not run. All at once is more than a card's queue has room for.
constexpr Nanoseconds longest_catch_up = second / 100;

struct UdpResult {
    u64 sent = 0;
    u64 received = 0;
    u64 lost = 0;
    u64 duplicated = 0;
    u64 refused = 0; // datagrams that are none of this protocol
    Nanoseconds runtime = 0;
    FixedText<160> failure; // empty: none
};

// What one udp= key needs. Too large for a coroutine frame.
struct UdpEnd {
    explicit UdpEnd(net::Interface& of) : interface(of) {}
    io::Executor& executor() const { return interface.device().executor(); }
    std::string_view card() const { return interface.device().identity().name.view(); }

    net::Interface& interface;
    std::array<std::byte, 256 * 1024> queue{};
    net::UdpSocket socket{interface, queue};
    std::array<std::byte, 65536> out{};
    std::array<std::byte, 65536> in{};
    net::NumberedCount count;
    std::optional<Result<UdpResult>> result;
};

struct Station {
    Station(io::NetDevice& device, u64 seed) : interface(device, seed), tasks(device.executor()) {}
    net::Interface interface;
    net::DhcpClient dhcp{interface};
    std::array<std::unique_ptr<UdpEnd>, NetOptions::most_udps> ends;
    io::TaskGroup tasks; // destroyed first
};

io::Task<Result<io::NetCounters>> counters_here(const io::NetDevice& lane) { co_return lane.counters(); }

// Of all lanes, each read on its own processor.
io::Task<Result<io::NetCounters>> counters_of(io::NetDevice& device) {
    io::NetCounters all = device.counters();
    for (u32 i = 1; i < device.lanes(); ++i) {
        io::NetDevice& lane = device.lane(i);
        CO_TRY(const io::NetCounters more, co_await io::run_on(lane.executor(), counters_here(lane)));
        all = all + more;
    }
    co_return all;
}

void print_address(const Station& station, bool dhcp) {
    const auto& config = *station.interface.config();
    log::Record record("net_address");
    record.text("net", station.interface.device().identity().name.view())
        .text("source", dhcp ? "dhcp" : "command line")
        .text("address", net::text(config.subnet.address).view())
        .text("mask", net::text(net::Ipv4Address::of(config.subnet.mask())).view())
        .text("gateway", config.gateway.none() ? "" : net::text(config.gateway).view());
    if (dhcp) {
        const net::DhcpAnswer& lease = station.dhcp.lease();
        record.text("dns", lease.dns.none() ? "" : net::text(lease.dns).view())
            .text("server", net::text(lease.server).view())
            .number("lease_seconds", lease.lease);
    }
}

void print_counters(const net::Interface& interface) {
    const net::Interface::Counters& c = interface.counters();
    const net::DropCounters drops = interface.drops();
    log::Record record("net_counters");
    record.text("net", interface.device().identity().name.view())
        .number("sent", c.sent)
        .number("received", c.received)
        .number("arp_requests", c.arp_requests)
        .number("arp_replies", c.arp_replies)
        .number("echo_replies", c.echo_replies)
        .number("unreachables", c.unreachables)
        .number("errors", c.errors)
        .number("conflicts", c.conflicts)
        .number("answers_lost", c.answers_lost)
        .open("drops", '{');
    for (usize i = 1; i < net::drop_reasons; ++i) {
        record.number(net::drop_names[i], drops[static_cast<net::Drop>(i)]);
    }
    record.close('}');
}

io::Task<Result<void>> get_address(Station& station, const NetOptions& options) {
    net::Interface& interface = station.interface;
    if (options.dhcp) {
        CO_CHECK(co_await station.dhcp.acquire(dhcp_bound));
        CO_CHECK(station.tasks.spawn(station.dhcp.keep()));
    } else {
        CO_CHECK(co_await interface.probe(options.subnet.address));
        interface.configure({options.subnet, options.gateway});
        log::info("{}: address {}/{}", interface.device().identity().name.view(),
                  net::text(options.subnet.address).view(), options.subnet.prefix);
    }
    print_address(station, options.dhcp);
    co_return Result<void>{};
}

io::Task<Result<u32>> ping(Station& station, const PingOptions& options, Nanoseconds timeout) {
    const std::string_view name = station.interface.device().identity().name.view();
    u32 received = 0;
    Nanoseconds least = never;
    Nanoseconds most = 0;
    Nanoseconds sum = 0;
    std::optional<Error> last;
    for (u32 i = 0; i < options.count; ++i) {
        const auto time = co_await station.interface.ping(options.address, static_cast<u16>(i), timeout);
        if (!time) {
            last = time.error();
            if (time.error().code == Code::device_gone) {
                break;
            }
            continue;
        }
        ++received;
        least = std::min(least, *time);
        most = std::max(most, *time);
        sum += *time;
    }
    const Nanoseconds mean = received == 0 ? 0 : sum / received;
    least = received == 0 ? 0 : least;
    log::Record("ping")
        .text("net", name)
        .text("address", net::text(options.address).view())
        .number("sent", options.count)
        .number("received", received)
        .number("min_ns", least)
        .number("mean_ns", mean)
        .number("max_ns", most);
    log::info("{}: {} of {} {} answered by {}, {} us on average", name, received, options.count,
              plural(options.count, "pings"), net::text(options.address).view(), mean / 1000);
    if (last) {
        report(*last, name);
    }
    co_return received;
}

std::span<std::byte> numbered(UdpEnd& self, net::NumberedKind kind, u64 run, u64 number, u64 total, usize size) {
    net::NumberedHeader header;
    header.kind = to_underlying(kind);
    header.run = run;
    header.number = number;
    header.total = total;
    net::put(std::span(self.out), header);
    return std::span(self.out).first(size);
}

io::Task<Result<UdpResult>> udp_echo(UdpEnd& self, const UdpOptions& options, Nanoseconds timeout) {
    io::Executor& executor = self.executor();
    UdpResult result;
    const Instant begun = executor.elapsed();
    const Instant end = after(executor.now(), options.seconds * second);
    for (Instant now = executor.now(); now < end; now = executor.now()) {
        const auto datagram = co_await self.socket.receive(self.in, end - now);
        if (!datagram) {
            if (datagram.error().code == Code::device_gone) {
                co_return datagram.error();
            }
            continue; // the time is up, or the peer of an answer is gone
        }
        ++result.received;
        const auto sent = co_await self.socket.send_to(
            datagram->from, std::span(self.in).first(std::min<usize>(datagram->size, self.in.size())), timeout);
        if (sent) {
            ++result.sent;
        } else if (sent.error().code == Code::device_gone) {
            co_return sent.error();
        }
    }
    result.runtime = executor.elapsed() - begun;
    result.lost = result.received - result.sent;
    if (result.received == 0) {
        result.failure.write("nothing was received");
    }
    co_return result;
}

// Asks for the receiver's counts until they come.
io::Task<Result<bool>> get_report(UdpEnd& self, const UdpOptions& options, u64 run, UdpResult& result,
                                  std::optional<Error>& last) {
    io::Executor& executor = self.executor();
    for (u32 i = 0; i < report_attempts; ++i) {
        const auto end = numbered(self, net::NumberedKind::end, run, result.sent, options.count, options.bytes);
        const auto sent = co_await self.socket.send_to(options.to, end, report_bound);
        if (!sent) {
            last = sent.error();
            if (last->code == Code::device_gone) {
                co_return *last;
            }
        }
        const Instant until = after(executor.now(), report_bound);
        for (Instant now = executor.now(); now < until; now = executor.now()) {
            const auto datagram = co_await self.socket.receive(self.in, until - now);
            if (!datagram) {
                if (datagram.error().code == Code::device_gone) {
                    co_return datagram.error();
                }
                if (datagram.error().code != Code::timed_out) { // a host says that it could not be delivered
                    last = datagram.error();
                }
                continue;
            }
            const auto header =
                net::parse_numbered(std::span(self.in).first(std::min<usize>(datagram->size, self.in.size())));
            if (header && header->kind == to_underlying(net::NumberedKind::report) && header->run == run &&
                datagram->from == options.to && header->number <= result.sent) {
                result.received = header->number;
                result.duplicated = header->total;
                co_return true;
            }
            ++result.refused;
        }
    }
    co_return false;
}

io::Task<Result<UdpResult>> udp_send(UdpEnd& self, const UdpOptions& options, Nanoseconds timeout) {
    io::Executor& executor = self.executor();
    UdpResult result;
    const u64 run = self.interface.random();
    std::optional<Error> last;
    const Instant begun = executor.elapsed();
    Instant first = executor.now();
    for (u64 i = 0; i < options.count; ++i) {
        if (options.rate != 0) {
            const Instant due = after(first, i * second / options.rate);
            if (const Instant now = executor.now(); now < due) {
                co_await executor.sleep(due - now);
            } else if (now - due > longest_catch_up) {
                first += now - due - longest_catch_up;
            }
        }
        const auto data = numbered(self, net::NumberedKind::data, run, i, options.count, options.bytes);
        const auto sent = co_await self.socket.send_to(options.to, data, timeout);
        if (sent) {
            ++result.sent;
            continue;
        }
        last = sent.error();
        if (last->code == Code::device_gone) {
            co_return *last;
        }
        if (result.sent == 0) { // nobody is there
            print(result.failure, "{}", *last);
            co_return result;
        }
    }
    result.runtime = executor.elapsed() - begun;
    CO_TRY(const bool reported, co_await get_report(self, options, run, result, last));
    result.lost = result.sent - result.received;
    if (!reported) {
        result.failure.write("the receiver did not answer with what it has counted");
    } else if (result.lost != 0 || result.sent != options.count) {
        print(result.failure, "{} of {} {} arrived", result.received, options.count,
              plural(options.count, "datagrams"));
    }
    if (last) {
        report(*last, self.card());
    }
    co_return result;
}

io::Task<Result<UdpResult>> udp_receive(UdpEnd& self, const UdpOptions& options, Nanoseconds timeout) {
    io::Executor& executor = self.executor();
    UdpResult result;
    std::optional<u64> run; // of the first datagram: others are refused
    std::optional<u64> total;
    Instant begun = 0;
    Instant last = 0;
    for (Nanoseconds bound = options.seconds * second;;) {
        const auto datagram = co_await self.socket.receive(self.in, bound);
        if (!datagram) {
            if (datagram.error().code == Code::device_gone) {
                co_return datagram.error();
            }
            if (datagram.error().code == Code::timed_out) {
                break;
            }
            continue; // the sender did not wait for the counts
        }
        const auto header =
            net::parse_numbered(std::span(self.in).first(std::min<usize>(datagram->size, self.in.size())));
        if (!header || (run && *run != header->run) || header->kind == to_underlying(net::NumberedKind::report)) {
            ++result.refused;
            continue;
        }
        run = header->run;
        if (header->kind == to_underlying(net::NumberedKind::data)) {
            last = executor.elapsed();
            begun = begun == 0 ? last : begun;
            result.refused += self.count.count(header->number) ? 0 : 1;
            continue;
        }
        total = u64{header->number};
        bound = linger; // the answer may be lost: the sender asks again
        static_cast<void>(
            co_await self.socket.send_to(datagram->from,
                                         numbered(self, net::NumberedKind::report, *run, self.count.different(),
                                                  self.count.duplicates(), sizeof(net::NumberedHeader)),
                                         timeout));
    }
    result.received = self.count.different();
    result.duplicated = self.count.duplicates();
    result.runtime = last - begun;
    result.sent = total.value_or(0);
    result.lost = result.sent - std::min(result.sent, result.received);
    if (!total) {
        print(result.failure, "the sender did not announce its end within {} s after {} {}", options.seconds,
              result.received, plural(result.received, "datagrams"));
    } else if (result.lost != 0 || (options.count != 0 && result.received != options.count)) {
        print(result.failure, "{} of {} {} arrived", result.received, std::max(result.sent, options.count),
              plural(std::max(result.sent, options.count), "datagrams"));
    }
    co_return result;
}

void print_udp(const UdpEnd& self, const UdpOptions& options, const UdpResult& result, const io::NetCounters& counters,
               u64 allocations) {
    const std::string_view name = self.card();
    const u64 packets = std::max(result.sent, result.received);
    const u64 countable = std::min(packets, ~u64{0} / second); // the product fits into 64 bits
    const u64 pps = result.runtime == 0 ? 0 : countable * second / result.runtime;
    log::Record("udp")
        .text("net", name)
        .text("mode", udp_mode_names[to_underlying(options.mode)])
        .number("bytes", options.bytes)
        .number("sent", result.sent)
        .number("received", result.received)
        .number("lost", result.lost)
        .number("duplicated", result.duplicated)
        .number("refused", result.refused)
        .number("overflowed", self.socket.counters().overflowed)
        .number("runtime_ns", result.runtime)
        .number("pps", pps)
        .number("device_accesses", counters.device_accesses)
        .number("hypercalls", counters.hypercalls)
        .number("notifications", counters.notifications)
        .number("interrupts", counters.interrupts)
        .number("allocations", allocations);
    log::info("{}: udp {}: {} sent, {} received, {} lost, {} duplicated, in {} us, {} per second", name,
              udp_mode_names[to_underlying(options.mode)], result.sent, result.received, result.lost, result.duplicated,
              result.runtime / 1000, pps);
}

io::Task<Result<UdpResult>> run_udp(UdpEnd& self, const UdpOptions& options, JobServices services,
                                    Nanoseconds timeout) {
    CO_CHECK(self.socket.bind(options.mode == UdpOptions::Mode::send ? u16{0} : options.port));
    io::NetDevice& device = self.interface.device();
    const auto allocations = [&] { return io::frame_pool().allocations() + services.heap_allocations(); };
    CO_TRY(const io::NetCounters before, co_await counters_of(device));
    const u64 allocated = allocations();
    auto task = options.mode == UdpOptions::Mode::send   ? udp_send(self, options, timeout)
                : options.mode == UdpOptions::Mode::echo ? udp_echo(self, options, timeout)
                                                         : udp_receive(self, options, timeout);
    auto result = co_await std::move(task);
    if (!result) {
        co_return result;
    }
    const u64 allocated_after = allocations();
    CO_TRY(const io::NetCounters after_run, co_await counters_of(device));
    print_udp(self, options, *result, after_run - before, allocated_after - allocated);
    co_return result;
}

io::Task<Result<void>> keep_udp(UdpEnd& self, const UdpOptions& options, JobServices services, Nanoseconds timeout) {
    self.result.emplace(co_await run_udp(self, options, services, timeout));
    co_return Result<void>{};
}

// All of them at once: a card can be tested against itself, if its host sends back what it sends.
io::Task<Result<void>> run_all(Station& station, const Options& options, JobServices services) {
    const auto all = options.net.all_udp();
    io::TaskGroup group(station.interface.device().executor());
    for (usize i = 0; i < all.size(); ++i) {
        station.ends[i].reset(new (std::nothrow) UdpEnd(station.interface));
        if (!station.ends[i]) {
            co_return Error{Code::exhausted, "no memory for the datagrams of a socket: give the machine more"};
        }
        CO_CHECK(group.spawn(keep_udp(*station.ends[i], all[i], services, options.timeout)));
    }
    co_return co_await group.join();
}

Outcome refused(const Options& options, const Nets* nets) {
    Outcome outcome{Verdict::error, {}};
    if (nets == nullptr || nets->all().empty()) {
        outcome.reason.write("no network card was found");
    } else if (options.net.card.empty()) {
        print(outcome.reason, "all network cards are closed; there were: {}", nets->names().view());
    } else {
        print(outcome.reason, "net={}: no such network card; there are: {}", options.net.card, nets->names().view());
    }
    log::error("{}", outcome.reason.view());
    log::Record("error").text("code", fl::name(Code::not_found)).text("message", outcome.reason.view());
    return outcome;
}

io::NetDevice* choose(const Options& options, const Nets* nets) {
    if (nets == nullptr) {
        return nullptr;
    }
    if (!options.net.card.empty()) {
        return nets->find(options.net.card);
    }
    for (io::NetDevice* card : nets->all()) {
        if (card->is_open()) {
            return card;
        }
    }
    return nullptr;
}

// Everything after the interface was opened.
io::Task<Result<Outcome>> use(Station& station, const Options& options, JobServices services) {
    const std::string_view name = station.interface.device().identity().name.view();
    const auto failed = [&](const Error& error) {
        report(error, name);
        Outcome outcome{Verdict::failure, {}};
        print(outcome.reason, "{}: {}", name, error);
        return outcome;
    };
    if (const auto address = co_await get_address(station, options.net); !address) {
        co_return failed(address.error());
    }
    Outcome outcome;
    print(outcome.reason, "{} has {}", name, net::text(station.interface.address()).view());
    if (const auto& pings = options.net.ping) {
        CO_TRY(const u32 received, co_await ping(station, *pings, options.timeout));
        print(outcome.reason, ", {} of {} {} answered", received, pings->count, plural(pings->count, "pings"));
        outcome.verdict = received == pings->count ? outcome.verdict : Verdict::failure;
    }
    CO_CHECK(co_await run_all(station, options, services));
    for (usize i = 0; i < options.net.all_udp().size(); ++i) {
        const Result<UdpResult>& result = *station.ends[i]->result;
        if (!result) {
            co_return failed(result.error());
        }
        print(outcome.reason, ", udp {}: {} sent, {} received",
              udp_mode_names[to_underlying(options.net.all_udp()[i].mode)], result->sent, result->received);
        if (!result->failure.empty()) {
            print(outcome.reason, ": {}", result->failure.view());
            outcome.verdict = Verdict::failure;
        }
    }
    if (services.clock_assumed) {
        print(outcome.reason, "; times are by an assumed clock, not a measured one");
    }
    co_return outcome;
}

} // namespace

io::Task<Result<Outcome>> run_net(const Options& options, JobServices services) {
    io::NetDevice* const card = choose(options, services.nets);
    if (card == nullptr) {
        co_return refused(options, services.nets);
    }
    u64 seed = services.seed;
    for (u8 byte : card->identity().mac.bytes) {
        seed = io::mix64(seed ^ byte);
    }
    const std::unique_ptr<Station> station(new (std::nothrow) Station(*card, seed));
    if (!station) {
        co_return Error{Code::exhausted, "no memory for a network interface: give the machine more"};
    }
    CO_CHECK(co_await station->interface.open());
    auto outcome = co_await use(*station, options, services);
    CO_CHECK(co_await station->interface.close());
    print_counters(station->interface);
    co_return outcome;
}

} // namespace fl::boot
