module;
#include "core/try.hpp"
module hv.xen.bus;
import core.std;
import core.result;
import core.text;
import core.time;
import core.log;
import core.vector;
import io.executor;
import io.task;
import hv.backend;
import hv.xen.store;

namespace fl::hv::xen {

namespace {
// Takes the first name of a directory listing, in which a NUL ends each name.
template <usize Capacity>
FixedText<Capacity> next_name(std::string_view& names) {
    const usize end = std::min(names.find('\0'), names.size());
    const FixedText<Capacity> name(names.substr(0, end));
    names.remove_prefix(std::min(end + 1, names.size()));
    return name;
}

// By insertion: the lists are short, and std::sort is two KiB for each type.
template <class T, class Less>
void sort(T* begin, T* end, Less less) {
    for (T* at = begin; at < end; ++at) {
        for (T* place = at; place != begin && less(*place, *(place - 1)); --place) {
            std::swap(*place, *(place - 1));
        }
    }
}

// "suspend" is not a device: the toolstack creates device/suspend/event-channel for every guest [xen-paths].
bool is_kind(const FixedText<24>& name) { return !name.empty() && !name.truncated() && name != "suspend"; }

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
    sort(into.list.begin() + first, into.list.end(),
         [](const SyntheticDevice& one, const SyntheticDevice& other) { return one.number < other.number; });
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
        const FixedText<24> kind = next_name<24>(names);
        if (is_kind(kind) && count < max_kinds) {
            kinds[count++] = kind;
        } else if (kind != "suspend") {
            ++into.dropped;
        }
    }
    sort(kinds.data(), kinds.data() + count,
         [](const FixedText<24>& one, const FixedText<24>& other) { return one.view() < other.view(); });
    for (usize i = 0; i < count; ++i) {
        CO_CHECK(co_await enumerate_kind(store, kinds[i], into, scratch));
    }
    co_return co_await add_control(store, into, scratch);
}

// ---- devices that come later ----

DeviceWatch::DeviceWatch(Store& store, io::Executor& executor, std::span<char> scratch)
    : store_(store), scratch_(scratch), wake_(executor), changes_(executor), listed_(executor), tasks_(executor) {
    watch_.path = StorePath("device");
    watch_.changed = [](void* self) { static_cast<DeviceWatch*>(self)->wake_.open(); };
    watch_.context = this;
}

// A device for which there is no memory is found again, and then dropped.
void DeviceWatch::know(std::span<const SyntheticDevice> devices) {
    for (const SyntheticDevice& device : devices) {
        static_cast<void>(known_.push({.device = device}));
    }
}

void DeviceWatch::start() {
    if (std::exchange(started_, true)) {
        return;
    }
    if (auto spawned = tasks_.spawn(watch()); !spawned) {
        log::warning("xen: devices that are added from now on are not detected: {}", spawned.error());
        listed_.open();
    }
}

io::Task<Result<void>> DeviceWatch::watch() {
    if (auto begun = co_await store_.watch(watch_); !begun) {
        log::warning("xen: devices that are added from now on are not detected: {}", begun.error());
        listed_.open();
        co_return begun;
    }
    for (;;) {
        static_cast<void>(co_await wake_.wait()); // a new watch fires at once
        if (auto listed = co_await list(); !listed) {
            log::warning("xen: the devices of this guest cannot be listed: {}", listed.error());
        }
        listed_.open();
    }
}

io::Task<Result<void>> DeviceWatch::list() {
    static constexpr usize max_kinds = 16;
    ++listing_;
    auto listing = co_await store_.directory("device", scratch_);
    if (!listing) {
        if (listing.error().code != Code::not_found) {
            co_return listing.error();
        }
        listing = std::string_view{}; // no devices at all
    }
    std::array<FixedText<24>, max_kinds> kinds;
    usize count = 0;
    std::string_view names = *listing;
    while (!names.empty() && count < max_kinds) { // enumerate() has reported those beyond
        const FixedText<24> kind = next_name<24>(names);
        if (is_kind(kind)) {
            kinds[count++] = kind;
        }
    }
    for (usize i = 0; i < count; ++i) {
        CO_CHECK(co_await list_kind(kinds[i]));
    }
    forget_missing();
    co_return Result<void>{};
}

io::Task<Result<void>> DeviceWatch::list_kind(std::string_view kind) {
    const StorePath path = join("device", kind);
    const auto listing = co_await store_.directory(path, scratch_);
    if (!listing) {
        co_return listing.error().code == Code::not_found ? Result<void>{} : listing.error();
    }
    std::string_view names = *listing;
    while (!names.empty()) {
        const FixedText<24> name = next_name<24>(names);
        Known* const known = find(kind, name);
        if (known != nullptr) {
            known->seen = listing_;
        }
        if (known == nullptr || known->ended) {
            CO_CHECK(co_await look_at(kind, name));
        }
    }
    co_return Result<void>{};
}

// A device that is not known, or that its driver has ended. Its state is the last node that is made of it.
io::Task<Result<void>> DeviceWatch::look_at(std::string_view kind, std::string_view name) {
    const auto number = parse_number(name);
    if (!number || *number > ~u32{0}) {
        co_return Result<void>{}; // enumerate() has named it, or nobody can drive it
    }
    const StorePath path = join(join("device", kind), name);
    CO_TRY(const u64 state, co_await store_.number_or(path, "state", to_underlying(BusState::unknown)));
    Known* known = find(kind, name);
    if (state == to_underlying(BusState::unknown) ||
        (known != nullptr && (!known->ended || state != to_underlying(BusState::initialising)))) {
        co_return Result<void>{};
    }
    if (known == nullptr) {
        Known fresh;
        fresh.device.type.write(kind);
        fresh.device.address.write(name);
        fresh.device.number = static_cast<u32>(*number);
        fresh.seen = listing_;
        if (!known_.push(fresh)) {
            ++dropped_;
            changes_.open();
            co_return Result<void>{};
        }
        known = &known_[known_.size() - 1];
    }
    known->ended = false;
    known->pending = pending_count_ < max_pending;
    offer(known->device);
    co_return Result<void>{};
}

void DeviceWatch::offer(const SyntheticDevice& device) {
    if (pending_count_ < max_pending) {
        pending_[pending_count_++] = device;
    } else {
        ++dropped_;
    }
    changes_.open();
}

DeviceWatch::Known* DeviceWatch::find(std::string_view kind, std::string_view name) {
    for (Known& known : known_) {
        if (known.device.type == kind && known.device.address == name) {
            return &known;
        }
    }
    return nullptr;
}

// Removed by the toolstack: one that comes again is another device. One that nobody has taken yet is gone.
void DeviceWatch::forget_missing() {
    for (usize i = known_.size(); i-- != 0;) {
        const Known& known = known_[i];
        // Two are not below "device".
        if (known.seen == listing_ || known.device.type == "control" || known.device.type == "console") {
            continue;
        }
        for (u32 at = 0; known.pending && at < pending_count_; ++at) {
            const SyntheticDevice& device = pending_[at];
            if (device.type.view() == known.device.type.view() && device.number == known.device.number) {
                take_pending(at);
                break;
            }
        }
        known_.remove(i);
    }
}

void DeviceWatch::take_pending(u32 at) {
    std::copy(pending_.begin() + at + 1, pending_.begin() + pending_count_, pending_.begin() + at);
    --pending_count_;
}

std::optional<SyntheticDevice> DeviceWatch::next() {
    if (pending_count_ == 0) {
        return std::nullopt;
    }
    const SyntheticDevice device = pending_[0];
    take_pending(0);
    if (Known* const known = find(device.type, device.address); known != nullptr) {
        known->pending = false;
    }
    return device;
}

void DeviceWatch::ended(std::string_view type, u32 number) {
    for (Known& known : known_) {
        if (known.device.type == type && known.device.number == number) {
            known.ended = true;
            wake_.open(); // it may have been made anew already
        }
    }
}

// ---- front ends ----

Frontend::Frontend(Store& store, io::Executor& executor) : store_(store), executor_(executor), changed_(executor) {}

io::Task<Result<void>> Frontend::open(std::string_view device) {
    path_ = StorePath(device);
    written_ = BusState::unknown;
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

io::Task<Result<BusState>> Frontend::own_state() {
    CO_TRY(const u64 number, co_await store_.number_or(path_, "state", to_underlying(BusState::unknown)));
    co_return static_cast<BusState>(static_cast<u32>(std::min<u64>(number, ~u32{0})));
}

io::Task<Result<bool>> Frontend::online() {
    CO_TRY(const u64 number, co_await store_.number_or(backend_, "online", 0));
    co_return number == 1;
}

io::Task<Result<bool>> Frontend::may_return(BusState back_state) {
    if (back_state == BusState::unknown) {
        co_return false;
    }
    CO_TRY(const BusState own, co_await own_state());
    if (own != BusState::connected) {
        co_return false;
    }
    co_return back_state == BusState::closing || back_state == BusState::closed ? co_await online()
                                                                                : Result<bool>(true);
}

io::Task<Result<bool>> Frontend::may_try_again(Error why, io::Bound bound) {
    static constexpr Nanoseconds pause = 20'000'000;
    if ((why.code != Code::device_gone && why.code != Code::timed_out) || bound.passed()) {
        co_return false;
    }
    co_await executor_.sleep(pause);
    CO_TRY(const BusState back_state, co_await state());
    co_return back_state == BusState::closing || back_state == BusState::closed
        ? co_await online()
        : Result<bool>(back_state != BusState::unknown);
}

io::Task<Result<void>> Frontend::set_state(BusState state) {
    FixedText<12> text;
    print(text, "{}", to_underlying(state));
    const StorePath key = join(path_, "state");
    written_ = state;
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

// A back end looks at this front end's state when it is told of a change, and may miss one that was soon followed by
// another. Linux's blkback goes to `closing` as the front end does, and from there it goes on only with `closed`: if it
// has missed that, `initialising` tells it nothing, and it has to see both once more.
io::Task<Result<void>> Frontend::restart(Nanoseconds timeout) {
    CO_TRY(const u64 own_state, co_await store_.number_or(path_, "state", to_underlying(BusState::initialising)));
    if (own_state == to_underlying(BusState::initialising)) {
        co_return Result<void>{};
    }
    const io::Bound bound(executor_, timeout);
    if (own_state != to_underlying(BusState::closed)) {
        CO_CHECK(co_await set_state(BusState::closing));
    }
    for (;;) {
        CO_CHECK(co_await set_state(BusState::closed));
        for (;;) {
            CO_TRY(const BusState back_state, co_await state());
            if (back_state == BusState::closed || back_state == BusState::init_wait ||
                back_state == BusState::unknown || !co_await changed(bound) || bound.passed()) {
                break;
            }
        }
        CO_CHECK(co_await set_state(BusState::initialising));
        for (;;) {
            CO_TRY(const BusState back_state, co_await state());
            if (back_state == BusState::closing && !bound.passed()) {
                break; // it has missed `closed`
            }
            // A back end closed permanently stays closed, and one about to reinitialise may still be closed now.
            if (back_state != BusState::closed || !co_await changed(bound) || bound.passed()) {
                co_return Result<void>{};
            }
        }
    }
}

io::Task<Result<bool>> Frontend::disconnect(Nanoseconds timeout) {
    static constexpr BusState gone[] = {BusState::closed, BusState::unknown, BusState::init_wait};
    CO_TRY(const BusState own, co_await own_state());
    if (own == BusState::unknown || (written_ != BusState::unknown && own != written_)) {
        co_return true; // removed by force, and perhaps made anew: not to be touched
    }
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
