module;
#include "core/try.hpp"
module drivers.xen_net;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.log;
import io.block;
import io.executor;
import io.net;
import io.run_on;
import io.task;
import hv.xen;
import drivers.driver;

namespace fl::drivers::xen_net {

using namespace hv::xen;

namespace {
constinit Vif* attached = nullptr; // devices live until machine shutdown

/// Of one queue.
constexpr std::array<std::string_view, 3> lane_keys{"tx-ring-ref", "rx-ring-ref", "event-channel"};

std::optional<u8> hex_digit(char c) {
    if (c >= '0' && c <= '9') {
        return static_cast<u8>(c - '0');
    }
    const char lower = static_cast<char>(c | 0x20);
    return lower >= 'a' && lower <= 'f' ? std::optional(static_cast<u8>(lower - 'a' + 10)) : std::nullopt;
}
} // namespace

std::optional<io::MacAddress> parse_mac(std::string_view text) {
    io::MacAddress mac;
    if (text.size() != 3 * mac.bytes.size() - 1) {
        return std::nullopt;
    }
    for (usize i = 0; i < mac.bytes.size(); ++i) {
        const auto high = hex_digit(text[3 * i]);
        const auto low = hex_digit(text[3 * i + 1]);
        if (!high || !low || (i != 0 && text[3 * i - 1] != ':')) {
            return std::nullopt;
        }
        mac.bytes[i] = static_cast<u8>(*high << 4 | *low);
    }
    return mac.is_group() || mac == io::MacAddress{} ? std::nullopt : std::optional(mac);
}

Vif::Vif(Environment& environment, hv::Xen& xen, const hv::SyntheticDevice& device)
    : BusDevice("vif", device.number), environment_(environment), xen_(xen), front_(xen.store(), environment.executor),
      address_(device.address), alarm_(front_), end_(environment.executor), tasks_(environment.executor) {
    lanes_.context = this;
    lanes_.on_failure = [](void* self) {
        Vif& vif = *static_cast<Vif*>(self);
        vif.alarm_.raised.store(true, std::memory_order_release); // pairs with the acquire in Alarm::drain()
        vif.environment_.executor.raise(vif.alarm_);
    };
    environment_.executor.add(alarm_);
}

Vif::~Vif() {
    environment_.executor.remove(alarm_);
    for (Connection& connection : connections_) {
        free_connection(connection, true);
    }
    for (Lane* lane : lanes_.all) {
        delete lane;
    }
}

// The pages are freed only if the back end has unmapped all of them.
void Vif::free_connection(Connection& connection, bool released) {
    if (connection.port != Port::none) {
        xen_.events().unbind(std::exchange(connection.port, Port::none));
    }
    bool safe = released;
    if (std::exchange(connection.granted, false) && released) {
        for (const GrantRef grant : connection.grants) {
            safe = xen_.grants().release(grant) && safe;
        }
    }
    if (safe) {
        connection.rings.reset();
    } else {
        connection.rings.abandon();
    }
}

void Vif::add_entry(std::string_view prefix, std::string_view key, u64 value) {
    StoreEntry& entry = entries_[entry_count_++];
    entry.key = FixedText<40>(prefix);
    entry.key.write(key);
    entry.value.clear();
    print(entry.value, "{}", value);
}

namespace {

StorePath path_of(std::string_view address) {
    StorePath path("device/vif/");
    path.write(address);
    return path;
}

io::Task<Result<io::MacAddress>> read_mac(hv::Xen& xen, StorePath device) {
    std::array<char, 24> text;
    const StorePath key = join(device, "mac");
    CO_TRY(const std::string_view mac, co_await xen.store().read(key, text));
    const auto parsed = parse_mac(mac);
    if (!parsed) {
        co_return Error{Code::protocol, "XenStore gives no usable hardware address (mac: six hexadecimal bytes with "
                                        "colons, no group address)"};
    }
    co_return *parsed;
}

} // namespace

io::Task<Result<void>> Vif::connect() {
    lanes_.count = 0;
    identity_ = {};
    identity_.name = environment_.nets->free_name();
    CO_CHECK(co_await shake_hands());
    CO_CHECK(co_await start_lanes());
    ended_ = false;
    co_return Result<void>{};
}

// With lanes_.count == 0 as many lanes are made as can be; otherwise as many of them as can be are given a queue again.
io::Task<Result<void>> Vif::shake_hands() {
    static constexpr BusState ready[] = {BusState::init_wait, BusState::initialised, BusState::connected};
    static constexpr BusState connected[] = {BusState::connected};
    begun_ = false;
    CO_CHECK(co_await front_.open(path_of(address_)));
    CO_CHECK(co_await read_identity());
    begun_ = true;
    CO_CHECK(co_await front_.restart(environment_.timeout));
    CO_CHECK(co_await front_.await_state(ready, {environment_.executor, environment_.timeout}));
    CO_CHECK(co_await read_features());
    CO_CHECK(co_await read_mtu());
    lanes_.failed.store(false, std::memory_order_relaxed); // the lanes do not run
    CO_CHECK(make_lanes());
    name_features();
    CO_CHECK(co_await publish());
    CO_CHECK(co_await front_.set_state(BusState::connected));
    CO_CHECK(co_await front_.await_state(connected, {environment_.executor, environment_.timeout}));
    co_return Result<void>{};
}

// One queue is enough: what cannot be had for another one does not keep the card from working.
Result<void> Vif::make_lanes() {
    const u32 wanted = lanes_.count != 0 ? lanes_.count : wanted_lanes_;
    const u32 possible = std::min(wanted, wanted_lanes_);
    Result<void> made;
    for (queues_ = 0; queues_ < possible; ++queues_) {
        if (made = make_lane(queues_); !made) {
            break;
        }
    }
    if (queues_ == 0) {
        return made;
    }
    if (queues_ < wanted) {
        const Error why = made ? Error{Code::not_supported,
                                       "the back end has returned with fewer queues "
                                       "(multi-queue-max-queues)",
                                       wanted, wanted_lanes_}
                               : made.error();
        log::warning("xen_net: {}: {} of {} queues: {}", front_.path(), queues_, wanted, why);
    }
    lanes_.count = std::max(lanes_.count, queues_);
    return {};
}

// A lane without a queue in this connection ends what waits for it. A processor that has stopped does not run it.
io::Task<Result<void>> Vif::start_lanes() {
    for (u32 lane = 0; lane < lanes_.count; ++lane) {
        if (lane < queues_) {
            CO_CHECK(co_await io::run_on(executor(lane), lanes_.all[lane]->start()));
        } else {
            static_cast<void>(co_await io::run_on(executor(lane), lanes_.all[lane]->stop()));
        }
    }
    co_return Result<void>{};
}

// A processor that has stopped does not run the lane either.
io::Task<Result<void>> Vif::hold_lanes() {
    for (u32 lane = 0; lane < lanes_.count; ++lane) {
        static_cast<void>(co_await io::run_on(executor(lane), lanes_.all[lane]->hold()));
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Vif::read_identity() {
    CO_TRY(const io::MacAddress mac, co_await read_mac(xen_, path_of(address_)));
    if (lanes_.count != 0 && mac != identity_.mac) {
        co_return Error{Code::not_supported, "the back end has returned with another hardware address"};
    }
    identity_.mac = mac;
    identity_.driver = driver_name;
    identity_.kind = io::Kind::synthetic;
    identity_.model.clear();
    print(identity_.model, "Xen virtual network interface {}", number());
    co_return Result<void>{};
}

io::Task<Result<void>> Vif::read_features() {
    Store& store = xen_.store();
    CO_TRY(const u64 copies, co_await store.number_or(front_.backend(), "feature-rx-copy", 0));
    if (copies != 1) {
        co_return Error{Code::not_supported,
                        "the back end cannot copy received frames (feature-rx-copy), only exchange pages", 1, copies};
    }
    CO_TRY(const u64 scatter, co_await store.number_or(front_.backend(), "feature-sg", 0));
    scatter_ = scatter == 1 && environment_.allows(Feature::scatter);
    CO_TRY(const u64 no_checksums, co_await store.number_or(front_.backend(), "feature-no-csum-offload", 0));
    offloads_checksums_ = no_checksums == 0 && environment_.allows(Feature::checksum);
    CO_TRY(const u64 queues, co_await store.number_or(front_.backend(), "multi-queue-max-queues", 0));
    knows_queues_ = queues != 0;
    if (environment_.allows(Feature::multi_queue)) {
        wanted_lanes_ = static_cast<u32>(
            std::clamp<u64>(std::min<u64>(queues, environment_.executors.size()), 1, Lanes::max_lanes));
    }
    co_return Result<void>{};
}

// The toolstack writes it for the front end; without the node, Ethernet's.
io::Task<Result<void>> Vif::read_mtu() {
    static constexpr u32 ethernet = 1500;
    static constexpr u32 least = 68; // what IPv4 requires of every link
    const u32 most = scatter_ ? longest_frame - io::ethernet_header : ethernet;
    CO_TRY(const u64 mtu, co_await xen_.store().number_or(front_.path(), "mtu", ethernet));
    identity_.mtu = mtu < least ? ethernet : static_cast<u32>(std::min<u64>(mtu, most));
    if (identity_.mtu != mtu) {
        log::warning("xen_net: {}: an MTU of {} is not possible, {} is used", front_.path(), mtu, identity_.mtu);
    }
    co_return Result<void>{};
}

void Vif::name_features() {
    identity_.features.clear();
    const auto add = [&](bool used, std::string_view name) {
        if (used) {
            print(identity_.features, "{}{}", identity_.features.empty() ? "" : " ", name);
        }
    };
    add(scatter_, "scatter-gather");
    add(offloads_checksums_, "checksum");
    add(queues_ > 1, "multi-queue");
    for (u32 lane = 0; lane < lanes_.count; ++lane) {
        lanes_.all[lane]->set_features(identity_.features);
    }
}

Result<void> Vif::make_lane(u32 number) {
    Connection& connection = connections_[number];
    Grants& grants = xen_.grants();
    Result<void> made = [&]() -> Result<void> {
        Lane*& lane = lanes_.all[number]; // of an earlier connection, or none
        if (lane == nullptr) {
            lane = new (std::nothrow) Lane(executor(number), xen_.events(), grants, lanes_);
        }
        if (lane == nullptr) {
            return Error{Code::exhausted, "no memory for a lane of a network card"};
        }
        TRY(connection.rings, environment_.dma.buffer(ring_bytes));
        TRY(connection.port, xen_.events().allocate_unbound(front_.domain()));
        if (!grants.ensure(2)) {
            return Error{Code::exhausted, "no grant entries for the rings of a network card", 2, grants.available()};
        }
        for (u32 i = 0; i < connection.grants.size(); ++i) {
            connection.grants[i] = grants.take_unchecked();
            grants.grant(connection.grants[i], front_.domain(), connection.rings.bus() / page_size + i, false);
        }
        connection.granted = true;
        CHECK(lane->prepare(identity_, offloads_checksums_, connection.rings, front_.domain(), connection.port,
                            environment_.dma));
        // Masked until the lane first sleeps. Its number is its processor's.
        CHECK(xen_.events().bind(connection.port, Lane::on_event, lane, number));
        return {};
    }();
    if (!made && lanes_.all[number] != nullptr) { // the back end has not seen any of it
        lanes_.all[number]->reclaim();
        free_connection(connection, true);
        if (number >= lanes_.count) { // else it is in use
            delete std::exchange(lanes_.all[number], nullptr);
        }
    }
    return made;
}

// Of an earlier connection with more or fewer queues. Not an error: a device that the toolstack has made anew has none.
io::Task<Result<void>> Vif::withdraw_keys() {
    const u32 before = std::exchange(published_queues_, queues_);
    if (before == 1 && queues_ != 1) {
        for (const std::string_view key : lane_keys) {
            const StorePath path = join(front_.path(), key);
            static_cast<void>(co_await xen_.store().remove(path));
        }
    }
    for (u32 lane = queues_ == 1 ? 0 : queues_; before > 1 && lane < before; ++lane) {
        FixedText<16> key;
        print(key, "queue-{}", lane);
        const StorePath path = join(front_.path(), key.view());
        static_cast<void>(co_await xen_.store().remove(path));
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Vif::publish() {
    const bool tells_queues = knows_queues_ || published_queues_ > 1;
    CO_CHECK(co_await withdraw_keys());
    entry_count_ = 0;
    add_entry("", "request-rx-copy", 1);
    add_entry("", "feature-rx-notify", 1); // the back end may wait until it is told of new buffers
    add_entry("", "feature-sg", environment_.allows(Feature::scatter) ? 1 : 0);
    add_entry("", "feature-no-csum-offload", environment_.allows(Feature::checksum) ? 0 : 1);
    add_entry("", "feature-ipv6-csum-offload", environment_.allows(Feature::checksum) ? 1 : 0);
    if (tells_queues) { // also a 1: a predecessor, or an earlier connection, may have written another number
        add_entry("", "multi-queue-num-queues", queues_);
    }
    if (queues_ == 1) {
        publish_lane("", connections_[0]);
    } else {
        for (u32 lane = 0; lane < queues_; ++lane) {
            FixedText<16> prefix;
            print(prefix, "queue-{}/", lane);
            publish_lane(prefix.view(), connections_[lane]);
        }
    }
    co_return co_await xen_.store().write_all(front_.path(), std::span(entries_).first(entry_count_));
}

void Vif::publish_lane(std::string_view prefix, const Connection& connection) {
    const std::array<u64, lane_keys.size()> values{connection.grants[0], connection.grants[1],
                                                   to_underlying(connection.port)};
    for (usize i = 0; i < lane_keys.size(); ++i) {
        add_entry(prefix, lane_keys[i], values[i]);
    }
}

Result<void> Vif::keep() { return tasks_.spawn(follow()); }

// ---- the back end's states ----

io::Task<Result<void>> Vif::follow() {
    for (;;) {
        const auto back_state = co_await front_.state();
        std::optional<Error> why;
        bool returns = false;
        if (std::exchange(moved_, false)) {
            if (auto again = co_await connect_again(); !again) {
                why = again.error();
            }
        } else if (!back_state) {
            why = back_state.error();
        } else if (*back_state <= BusState::closed && *back_state != BusState::connected) {
            why = Error{Code::device_gone, "the back end has closed the device (state)",
                        to_underlying(BusState::connected), to_underlying(*back_state)};
            const auto may = co_await front_.may_return(*back_state);
            returns = may && *may;
        }
        bool failed = lanes_.failed.load(std::memory_order_acquire); // pairs with the exchange in Lane::fail()
        if (why && returns && !failed) {
            log::warning("{}: the back end has left the connection (state {}): waiting for it to return",
                         identity_.name.view(), name(*back_state));
            static_cast<void>(co_await hold_lanes());
            const auto released = co_await release();
            lost_ = !released || !*released;
            Result<void> again = released ? Result<void>{} : Result<void>(released.error());
            if (!lost_) {
                again = co_await connect_again();
            }
            failed = lanes_.failed.load(std::memory_order_acquire);
            if (again && !lost_) {
                why.reset();
            } else if (!again) {
                why = again.error();
            }
        }
        if (why && !failed) {
            log::info("{}: closed: {}", identity_.name.view(), *why);
        }
        if (why || failed) {
            const Result<void> left = co_await disconnect();
            environment_.nets->withdraw(card_number_);
            ended_ = true;
            end_.open();
            xen_.ended(*this);
            report_in_use();
            co_return left;
        }
        static_cast<void>(co_await front_.changed());
    }
}

// As drivers.xen_blk Vbd::connect_again(), with the lanes held.
io::Task<Result<void>> Vif::connect_again() {
    const io::Bound bound(environment_.executor, environment_.timeout);
    for (;;) {
        forget_connection(true);
        static_cast<void>(co_await front_.close());
        Result<void> done = co_await shake_hands();
        if (done) {
            done = co_await start_lanes();
        }
        if (done) {
            log::info("{}: connected again [{}]", identity_.name.view(), identity_.features.view());
            co_return done;
        }
        static_cast<void>(co_await hold_lanes());
        if (std::exchange(moved_, false)) { // during this attempt
            continue;
        }
        auto again = co_await front_.may_try_again(done.error(), bound);
        if (again && *again) {
            again = co_await release();
        }
        if (!again || !*again) {
            co_return done;
        }
    }
}

// As drivers.xen_blk Vbd::release().
io::Task<Result<bool>> Vif::release() {
    const Result<bool> left = co_await front_.disconnect(environment_.timeout);
    if (!left || !*left) {
        co_return left;
    }
    const io::Bound bound(environment_.executor, environment_.timeout);
    const auto mapped = [&](const Connection& connection) {
        return connection.granted &&
               std::ranges::any_of(connection.grants, [&](GrantRef grant) { return xen_.grants().is_mapped(grant); });
    };
    while (std::ranges::any_of(connections_, mapped) && !bound.passed()) {
        co_await environment_.executor.sleep(retry_pause);
    }
    co_return true; // a page that is still mapped is quarantined
}

// The lanes do not run. `released`: the back end has no access any more.
void Vif::forget_connection(bool released) {
    for (u32 lane = 0; lane < lanes_.all.size() && lanes_.all[lane] != nullptr; ++lane) {
        free_connection(connections_[lane], released);
        if (released) {
            lanes_.all[lane]->reclaim();
        } else {
            lanes_.all[lane]->abandon();
        }
    }
}

// ---- suspension ----

void Vif::lost() {
    moved_ = !ended_;
    for (u32 lane = 0; lane < lanes_.count; ++lane) {
        connections_[lane].port = Port::none;
        lanes_.all[lane]->lose();
    }
}

void Vif::resumed(bool moved) {
    if (moved) {
        front_.notify();
    }
}

// ---- the end ----

io::Task<Result<void>> Vif::disconnect() {
    for (u32 lane = 0; lane < lanes_.count; ++lane) {
        // A processor that has stopped does not run the lane either.
        static_cast<void>(co_await io::run_on(executor(lane), lanes_.all[lane]->stop()));
    }
    if (!begun_) { // not accessed yet: leave it as it is
        co_return co_await front_.close();
    }
    const Result<bool> released = co_await release();
    const bool safe = released && *released && !lost_;
    if (!safe) {
        log::warning("{}: the back end does not release its pages: they are not reused", front_.path());
        lost_ = true;
    }
    forget_connection(safe);
    const Result<void> left = co_await front_.close(); // unlinks the watch before its first wait
    co_return released ? left : Result<void>(released.error());
}

io::Task<Result<bool>> Vif::await_end() {
    if (!ended_) { // the waits of a disconnection are bounded
        static_cast<void>(co_await end_.wait({environment_.executor, 8 * environment_.timeout}));
    }
    if (!ended_) {
        co_return Error{Code::busy, "the card's former connection has not ended"};
    }
    end_.close();
    co_return !lost_;
}

void Vif::report_in_use() const {
    const hv::Xen::InUse now = xen_.in_use();
    log::debug("xen_net: interface {} has left; in use: {} grants, {} event channels, {} watches", number(), now.grants,
               now.event_channels, now.watches);
}

// ---- probing ----

namespace {

// The Vif of an interface that was here before, or a new one.
io::Task<Result<Vif*>> make_vif(Environment& environment, hv::Xen& xen, const hv::SyntheticDevice& device) {
    if (auto* const known = static_cast<Vif*>(xen.devices().find("vif", device.number)); known != nullptr) {
        CO_TRY(const bool usable, co_await known->await_end());
        if (usable) {
            co_return known;
        }
        xen.devices().remove(*known);
    }
    auto* const made = new (std::nothrow) Vif(environment, xen, device);
    if (made == nullptr) {
        co_return Error{Code::exhausted, "no memory for a virtual network interface"};
    }
    co_return made;
}

} // namespace

io::Task<Result<void>> probe(Environment& environment, hv::Xen& xen, const hv::SyntheticDevice& device) {
    if (!matches(device)) {
        co_return Error{Code::not_supported, "not a virtual network interface"};
    }
    if (environment.nets == nullptr) {
        co_return Error{Code::not_supported, "network cards cannot be announced here"};
    }
    CO_TRY(Vif* const vif, co_await make_vif(environment, xen, device));
    const bool known = xen.devices().find("vif", device.number) == vif;
    // The emulated twin has the same address. Without one connect() says what is wrong.
    const auto mac = co_await read_mac(xen, path_of(device.address));
    const u32 number = mac ? environment.nets->number_of(*mac) : no_twin;
    vif->card_number_ = number;
    if (!environment.nets->offered(number)) {
        if (!known) {
            delete vif;
        }
        environment.nets->unused({.bus = "xen",
                                  .address = device.address,
                                  .what = "virtual network interface",
                                  .why = Unused::taken,
                                  .number = number,
                                  .kind = DeviceKind::network});
        co_return Result<void>{};
    }
    auto result = co_await vif->connect();
    if (result) {
        result = environment.nets->announce(vif->card(), number);
    }
    if (result) {
        if (!known) {
            vif->next_ = std::exchange(attached, vif);
            xen.devices().add(*vif);
        }
        if (auto kept = vif->keep(); !kept) {
            log::warning("xen_net: {}: a closing back end will not be detected: {}", device.address.view(),
                         kept.error());
        }
        co_return result;
    }
    if (auto left = co_await vif->disconnect(); !left) {
        log::warning("xen_net: {}: leaving the bus: {}", device.address.view(), left.error());
    }
    if (!known) {
        delete vif;
    }
    co_return result;
}

} // namespace fl::drivers::xen_net
