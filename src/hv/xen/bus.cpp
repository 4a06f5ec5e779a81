module;
#include "core/try.hpp"
module hv.xen.bus;
import core.std;
import core.result;
import core.text;
import core.time;
import core.log;
import io.executor;
import io.task;
import hv.backend;
import hv.xen.store;

namespace fl::hv::xen {

namespace {
// Lists the devices of one type. The listing is consumed before any other request uses `scratch`.
io::Task<Result<void>> enumerate_kind(Store& store, std::string_view kind, DeviceList& into, std::span<char> scratch) {
    const StorePath path = join("device", kind);
    auto listing = co_await store.directory(path, scratch);
    if (!listing) {
        // a type that was just removed
        co_return listing.error().code == Code::not_found ? Result<void>{} : listing.error();
    }
    const usize first = into.list.size();
    std::string_view names = *listing;
    while (!names.empty()) {
        const usize end = std::min(names.find('\0'), names.size());
        const std::string_view name = names.substr(0, end);
        names.remove_prefix(std::min(end + 1, names.size()));
        const auto number = parse_number(name);
        if (!number || *number > ~u32{0}) {
            log::warning("XenStore: device/{}/{} is not a device number", kind, name);
            continue;
        }
        SyntheticDevice device;
        device.type.write(kind);
        device.address.write(name);
        device.number = static_cast<u32>(*number);
        into.add(device);
    }
    std::sort(into.list.begin() + first, into.list.end(),
              [](const SyntheticDevice& a, const SyntheticDevice& b) { return a.number < b.number; });
    co_return Result<void>{};
}
} // namespace

namespace {
// Not below "device", but used like one: requests of the toolstack [xenstore-paths, ~/control].
io::Task<Result<void>> add_control(Store& store, DeviceList& into, std::span<char> scratch) {
    const auto there = co_await store.directory("control", scratch);
    if (there || there.error().code == Code::exhausted) {
        into.add({.type = FixedText<40>("control"), .address = FixedText<64>("control")});
    } else if (there.error().code != Code::not_found) {
        co_return there.error();
    }
    co_return Result<void>{};
}
} // namespace

io::Task<Result<void>> enumerate(Store& store, DeviceList& into, std::span<char> scratch) {
    static constexpr usize max_kinds = 16;
    auto listing = co_await store.directory("device", scratch);
    if (!listing) {
        if (listing.error().code != Code::not_found) {
            co_return listing.error();
        }
        listing = std::string_view{}; // no devices at all
    }
    std::array<FixedText<24>, max_kinds> kinds;
    usize count = 0;
    std::string_view names = *listing;
    while (!names.empty()) {
        const usize end = std::min(names.find('\0'), names.size());
        FixedText<24> kind(names.substr(0, end));
        names.remove_prefix(std::min(end + 1, names.size()));
        if (kind == "suspend") {
            continue; // not a device: the toolstack creates device/suspend/event-channel for every guest [xen-paths]
        }
        if (kind.empty() || kind.truncated() || count == max_kinds) {
            ++into.dropped;
        } else {
            kinds[count++] = kind;
        }
    }
    std::sort(kinds.begin(), kinds.begin() + static_cast<std::ptrdiff_t>(count),
              [](const FixedText<24>& a, const FixedText<24>& b) { return a.view() < b.view(); });
    for (usize i = 0; i < count; ++i) {
        CO_CHECK(co_await enumerate_kind(store, kinds[i], into, scratch));
    }
    co_return co_await add_control(store, into, scratch);
}

Frontend::Frontend(Store& store, io::Executor& executor) : store_(store), executor_(executor), changed_(executor) {}

io::Task<Result<void>> Frontend::open(std::string_view device) {
    path_ = StorePath(device);
    const StorePath key = join(path_, "backend");
    std::array<char, StorePath::capacity()> text;
    CO_TRY(const std::string_view backend, co_await store_.read(key, text));
    if (backend.empty() || backend[0] != '/') {
        co_return Error{Code::protocol, "a device in XenStore names no back end"};
    }
    backend_ = StorePath(backend);
    CO_TRY(const u64 domain, co_await store_.number(path_, "backend-id"));
    if (domain >= domain_self) {
        co_return Error{Code::protocol, "a device in XenStore has a back end in no domain", domain_self - 1, domain};
    }
    domain_ = static_cast<Domain>(domain);
    watch_.path = join(backend_, "state");
    watch_.changed = [](void* context) { static_cast<Frontend*>(context)->changed_.open(); };
    watch_.context = this;
    CO_CHECK(co_await store_.watch(watch_));
    watching_ = true;
    co_return Result<void>{};
}

io::Task<Result<BusState>> Frontend::state() {
    CO_TRY(const u64 number, co_await store_.number_or(backend_, "state", to_underlying(BusState::unknown)));
    co_return static_cast<BusState>(static_cast<u32>(std::min<u64>(number, ~u32{0})));
}

io::Task<Result<void>> Frontend::set_state(BusState state) {
    FixedText<12> text;
    print(text, "{}", to_underlying(state));
    const StorePath key = join(path_, "state");
    co_return co_await store_.write(key, text);
}

io::Task<Result<BusState>> Frontend::await_state(std::span<const BusState> wanted, io::Bound bound) {
    BusState seen = BusState::unknown;
    for (;;) {
        CO_TRY(seen, co_await state());
        if (std::find(wanted.begin(), wanted.end(), seen) != wanted.end()) {
            co_return seen;
        }
        if (seen == BusState::closing || seen == BusState::closed) {
            co_return Error{Code::device_gone, "the back end closes the device (state)",
                            to_underlying(BusState::connected), to_underlying(seen)};
        }
        if (!co_await changed_.wait(bound)) {
            co_return Error{Code::timed_out,
                            "the back end does not reach the expected state (timeout=MILLISECONDS changes the bound)",
                            to_underlying(wanted.front()), to_underlying(seen)};
        }
        if (bound.passed()) { // a back end that keeps changing its state
            co_return Error{Code::timed_out, "the back end does not settle in a state", to_underlying(wanted.front()),
                            to_underlying(seen)};
        }
    }
}

io::Task<Result<void>> Frontend::restart(Nanoseconds timeout) {
    static constexpr BusState closed[] = {BusState::closed, BusState::closing, BusState::init_wait, BusState::unknown};
    CO_TRY(const u64 own_state, co_await store_.number_or(path_, "state", to_underlying(BusState::initialising)));
    if (own_state == to_underlying(BusState::initialising)) {
        co_return Result<void>{};
    }
    CO_CHECK(co_await set_state(BusState::closing));
    CO_CHECK(co_await set_state(BusState::closed));
    static_cast<void>(co_await await_state(closed, {executor_, timeout}));
    CO_CHECK(co_await set_state(BusState::initialising));
    // A back end closed permanently stays closed, and one about to reinitialise may still be closed now.
    const io::Bound bound(executor_, timeout);
    for (;;) {
        CO_TRY(const BusState back_state, co_await state());
        if ((back_state != BusState::closed && back_state != BusState::closing) || !co_await changed(bound) ||
            bound.passed()) {
            co_return Result<void>{};
        }
    }
}

io::Task<Result<bool>> Frontend::disconnect(Nanoseconds timeout) {
    static constexpr BusState gone[] = {BusState::closed, BusState::unknown, BusState::init_wait};
    CO_CHECK(co_await set_state(BusState::closing));
    CO_CHECK(co_await set_state(BusState::closed));
    const io::Bound bound(executor_, timeout);
    for (;;) {
        CO_TRY(const BusState back_state, co_await state());
        if (std::find(std::begin(gone), std::end(gone), back_state) != std::end(gone)) {
            co_return true;
        }
        if (!co_await changed(bound) || bound.passed()) {
            co_return false;
        }
    }
}

io::Task<Result<void>> Frontend::close() {
    if (!std::exchange(watching_, false)) {
        co_return Result<void>{};
    }
    co_return co_await store_.unwatch(watch_);
}

} // namespace fl::hv::xen
