module;
#include "core/try.hpp"
module io.net.dhcp_client;
import core.std;
import core.log;
import core.result;
import core.text;
import core.time;
import io.executor;
import io.net;
import io.net.dhcp;
import io.net.drop;
import io.net.interface;
import io.net.ipv4;
import io.net.udp;
import io.task;

namespace fl::io::net {

namespace {
constexpr Endpoint all_servers{{{255, 255, 255, 255}}, dhcp_server_port};
constexpr Nanoseconds second = 1'000'000'000;
} // namespace

Nanoseconds DhcpClient::varied(Nanoseconds delay) {
    const Nanoseconds quarter = delay / 4;
    return delay - quarter + interface_.random() % (2 * quarter + 1);
}

Task<Result<void>> DhcpClient::send(DhcpRequest request, Endpoint to, Nanoseconds bound) {
    request.mac = interface_.device().identity().mac;
    request.seconds = static_cast<u16>(std::min<u64>((executor().now() - begun_) / second, 0xffff));
    message_ = make_dhcp(request);
    ++counters_.sent;
    asked_ = executor().now();
    co_return co_await socket_.send_to(to, message_, bound);
}

// Whether this is an answer to the request, by type, server and address.
bool DhcpClient::answers(const DhcpRequest& request, const DhcpAnswer& answer) const {
    if (request.type == DhcpType::discover) {
        return answer.type == DhcpType::offer;
    }
    if (answer.type == DhcpType::offer || (!request.server.none() && answer.server != request.server)) {
        return false;
    }
    const Ipv4Address wanted = request.client.none() ? request.requested : request.client;
    return answer.type == DhcpType::nak || answer.subnet.address == wanted;
}

// Sends the request up to `attempts` times, at growing intervals, until there is an answer or `until` is reached.
Task<Result<DhcpAnswer>> DhcpClient::exchange(DhcpRequest request, Endpoint to, Nanoseconds delay, u32 attempts,
                                              Instant until) {
    for (u32 i = 0; i < attempts && executor().now() < until; ++i, delay = std::min(delay * 2, longest_delay)) {
        const Instant end = std::min(after(executor().now(), attempts == 1 ? delay : varied(delay)), until);
        if (const auto sent = co_await send(request, to, end - executor().now());
            !sent && sent.error().code == Code::device_gone) {
            co_return sent.error();
        } // after another error it is sent again, at the same intervals
        for (Instant now = executor().now(); now < end; now = executor().now()) {
            const auto datagram = co_await socket_.receive(received_, end - now);
            if (!datagram) {
                if (datagram.error().code == Code::device_gone) {
                    co_return datagram.error();
                }
                continue; // the time is up, or a server has no DHCP
            }
            if (datagram->from.port != dhcp_server_port || datagram->size > received_.size()) {
                interface_.count(datagram->size > received_.size() ? Drop::dhcp_malformed : Drop::dhcp_foreign);
                continue;
            }
            const auto answer =
                parse_dhcp(std::span(received_).first(datagram->size), request.xid, interface_.device().identity().mac);
            if (!answer) {
                interface_.count(answer.why);
            } else if (!answers(request, *answer)) {
                interface_.count(Drop::dhcp_unexpected);
            } else {
                co_return *answer;
            }
        }
    }
    co_return Error{Code::timed_out, "no DHCP server has answered within the bound"};
}

void DhcpClient::use(const DhcpAnswer& lease) {
    ++counters_.acks;
    lease_ = lease;
    leased_ = asked_;
    interface_.configure({lease.subnet, lease.gateway});
}

Task<Result<void>> DhcpClient::acquire(Nanoseconds bound) {
    if (socket_.port() == 0) {
        CO_CHECK(socket_.bind(dhcp_client_port));
        socket_.accept_all();
    }
    interface_.deconfigure();
    begun_ = executor().now();
    const Instant end = after(begun_, bound);
    while (executor().now() < end) {
        DhcpRequest request{.xid = static_cast<u32>(interface_.random())};
        CO_TRY(const DhcpAnswer offer, co_await exchange(request, all_servers, first_delay, ~u32{0}, end));
        ++counters_.offers;
        request.type = DhcpType::request;
        request.requested = offer.subnet.address;
        request.server = offer.server;
        const auto answer = co_await exchange(request, all_servers, first_delay, request_attempts, end);
        if (!answer && answer.error().code == Code::device_gone) {
            co_return answer.error();
        }
        if (!answer) {
            continue;
        }
        if (answer->type == DhcpType::nak) {
            ++counters_.naks;
            log::warning("{}: the DHCP server {} offers an address and refuses it",
                         interface_.device().identity().name.view(), text(answer->server).view());
            co_await executor().sleep(std::min(varied(first_delay), end - std::min(executor().now(), end)));
            continue;
        }
        const Instant asked = asked_;
        if (const auto free = co_await interface_.probe(answer->subnet.address); !free) {
            if (free.error().code != Code::busy) {
                co_return free;
            }
            ++counters_.declines;
            request.type = DhcpType::decline;
            static_cast<void>(co_await send(request, all_servers, first_delay));
            co_await executor().sleep(std::min(after_conflict, end - std::min(executor().now(), end)));
            continue;
        }
        asked_ = asked;
        use(*answer);
        log::info("{}: address {}/{} from the DHCP server {}, for {} s", interface_.device().identity().name.view(),
                  text(lease_.subnet.address).view(), lease_.subnet.prefix, text(lease_.server).view(), lease_.lease);
        co_return Result<void>{};
    }
    co_return Error{Code::timed_out, "no DHCP server has given an address within the bound"};
}

// Asks for a longer lease until there is an answer. False: none until then, or a refusal.
Task<Result<bool>> DhcpClient::renew(Endpoint to, Instant until) {
    while (executor().now() < until) {
        const DhcpRequest request{
            .type = DhcpType::request, .xid = static_cast<u32>(interface_.random()), .client = lease_.subnet.address};
        const Nanoseconds delay = std::max(shortest_renewal, (until - executor().now()) / 2);
        const auto answer = co_await exchange(request, to, delay, 1, until);
        if (!answer) {
            if (answer.error().code == Code::device_gone) {
                co_return answer.error();
            }
            continue;
        }
        if (answer->type == DhcpType::nak) {
            ++counters_.naks;
            co_return false;
        }
        use(*answer);
        co_return true;
    }
    co_return false;
}

Task<Result<void>> DhcpClient::keep() {
    for (;;) {
        const Instant renewal = after(leased_, lease_.renewal * second);
        for (Instant now = executor().now(); lease_.lease == DhcpAnswer::forever || now < renewal;
             now = executor().now()) {
            if (!interface_.device().is_open()) {
                co_return Error{Code::device_gone, "the network device is closed"};
            }
            static constexpr Nanoseconds longest_sleep = 3'600'000'000'000;
            co_await executor().sleep(lease_.lease == DhcpAnswer::forever ? longest_sleep
                                                                          : std::min(renewal - now, longest_sleep));
        }
        const u64 naks = counters_.naks;
        const Instant leased = leased_;
        begun_ = executor().now();
        CO_TRY(bool renewed,
               co_await renew({lease_.server, dhcp_server_port}, after(leased, lease_.rebinding * second)));
        if (!renewed && naks == counters_.naks) { // of any server [rfc2131 §4.4.5]
            CO_TRY(renewed, co_await renew(all_servers, after(leased, lease_.lease * second)));
        }
        if (renewed) {
            continue;
        }
        log::warning("{}: the lease of {} {}", interface_.device().identity().name.view(),
                     text(lease_.subnet.address).view(), naks == counters_.naks ? "has ended" : "was refused");
        for (;;) {
            const auto acquired = co_await acquire(reacquire_bound);
            if (acquired) {
                break;
            }
            if (acquired.error().code == Code::device_gone) {
                co_return acquired;
            }
            log::warning("{}: {}", interface_.device().identity().name.view(), acquired.error());
        }
    }
}

} // namespace fl::io::net
