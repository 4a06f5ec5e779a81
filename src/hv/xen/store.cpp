module;
#include "core/try.hpp"
#include <cstddef>
module hv.xen.store;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.log;
import io.executor;
import io.task;
import io.ring;
import hv.xen.events;
import hv.xen.latch;

namespace fl::hv::xen {

namespace {
// All error names of the protocol [xenstore, io/xs_wire.h]; any other one becomes an I/O error.
struct ErrorName {
    std::string_view name;
    Error error;
};
constexpr ErrorName error_names[] = {
    {"ENOENT", {Code::not_found, "XenStore has no such node"}},
    {"EAGAIN", {Code::busy, "XenStore: another client changed the nodes of the transaction"}},
    {"EACCES", {Code::not_supported, "XenStore denies access to this guest"}},
    {"EPERM", {Code::not_supported, "XenStore denies access to this guest"}},
    {"EROFS", {Code::not_supported, "XenStore is read-only"}},
    {"EEXIST", {Code::busy, "XenStore has such a node already"}},
    {"EBUSY", {Code::busy, "XenStore is busy with this guest's other requests (transactions)"}},
    {"EISCONN", {Code::busy, "XenStore is connected already"}},
    {"ENOTEMPTY", {Code::busy, "XenStore: the node has children"}},
    {"ENOSPC", {Code::exhausted, "XenStore has no room left for this guest (its quota of nodes or watches)"}},
    {"ENOMEM", {Code::exhausted, "XenStore has no memory left"}},
    {"EQUOTA", {Code::exhausted, "XenStore has no room left for this guest (its quota)"}},
    {"E2BIG", {Code::exhausted, "XenStore: the value or the path is too long"}},
    {"EINVAL",
     {Code::bad_argument, "XenStore finds the request malformed (a path, a transaction that it does not know)"}},
    {"EISDIR", {Code::bad_argument, "XenStore: the node is a directory"}},
    {"ENOSYS", {Code::not_supported, "XenStore does not support this request"}},
    {"EOPNOTSUPP", {Code::not_supported, "XenStore does not support this request"}},
    {"EIO", {Code::io, "XenStore reports an I/O error"}},
};

Error from_server(std::string_view name) {
    if (const usize end = name.find('\0'); end != std::string_view::npos) {
        name = name.substr(0, end);
    }
    for (const ErrorName& known : error_names) {
        if (known.name == name) {
            return known.error;
        }
    }
    log::debug("XenStore: unknown error '{}'", name.substr(0, 32));
    return {Code::io, "XenStore refuses the request"};
}

std::string_view up_to_nul(std::string_view text) {
    const usize end = text.find('\0');
    return end == std::string_view::npos ? text : text.substr(0, end);
}

constexpr std::string_view token_prefix = "firstlight-";
} // namespace

StorePath join(std::string_view directory, std::string_view key) {
    StorePath path(directory);
    path.write("/");
    path.write(key);
    return path;
}

void Store::install(std::byte* page, Port port) {
    page_ = page;
    port_ = port;
}

Result<void> Store::start(io::Executor& executor, Events& events) {
    if (page_ == nullptr) {
        return Error{Code::not_found, "this guest was given no XenStore"};
    }
    CHECK(attach_rings());
    CHECK(events.bind(port_, on_event, this));
    executor_ = &executor;
    channel_ = &events;
    progress_.emplace(executor);
    executor.add(*this);
    if (events.unmask(port_)) {
        on_event(this);
    }
    return {};
}

Result<void> Store::attach_rings() {
    io::MappedMemory memory(page_, page_size);
    // Positions need not start at 0: a loader may have used the store before [xenstore-ring].
    const u32 produced = memory.load_acquire<u32>(offsetof(StorePage, request_producer));
    const u32 consumed = memory.load_acquire<u32>(offsetof(StorePage, request_consumer));
    if (produced != consumed) {
        return Error{Code::protocol, "XenStore's ring holds a request from somewhere else", consumed, produced};
    }
    // Discard replies to previous users of the ring.
    const u32 answered = memory.load_acquire<u32>(offsetof(StorePage, response_producer));
    memory.store_release<u32>(offsetof(StorePage, response_consumer), answered);

    const io::FreeRunning<u32> positions(store_ring_bytes);
    const io::RingLayout out{.index = offsetof(StorePage, request_producer),
                             .consumed = offsetof(StorePage, request_consumer),
                             .entries = offsetof(StorePage, requests)};
    const io::RingLayout in{.index = offsetof(StorePage, response_producer),
                            .consumed = offsetof(StorePage, response_consumer),
                            .entries = offsetof(StorePage, responses)};
    TRY(requests_, Requests::create(memory, out, positions, {}, produced));
    TRY(responses_, Responses::create(memory, in, positions, {}, {}, answered));
    return {};
}

Result<void> Store::restart(Port port) {
    port_ = port;
    in_payload_ = false;
    received_ = 0;
    closed_.reset();
    ++registration_;
    CHECK(attach_rings());
    CHECK(channel_->bind(port_, on_event, this));
    if (channel_->unmask(port_)) {
        on_event(this);
    }
    return {};
}

// Runs in the upcall: the executor checks the ring in its next turn.
void Store::on_event(void* context) {
    Store& self = *static_cast<Store*>(context);
    self.events_.fetch_add(1, std::memory_order_relaxed); // a statistic; raise() provides the ordering
    self.executor_->raise(self);
}

Error Store::close(const Error& why) {
    if (!closed_) {
        closed_ = why;
        log::error("XenStore is closed: {}", why);
    }
    return *closed_;
}

// ---- request queue ----

struct Store::Turn : io::ReadyNode {
    Store& store;
    bool given = false; // it is this request's turn, and the coroutine has not resumed yet
    explicit Turn(Store& s) : store(s) {}
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    ~Turn() {
        unlink();
        if (given) { // destroyed between getting its turn and resuming: pass it to the next one
            store.leave();
        }
    }
    bool await_ready() {
        if (store.busy_) {
            return false;
        }
        store.busy_ = true;
        return true;
    }
    void await_suspend(std::coroutine_handle<> h) {
        waiter = h;
        store.queue_.push(*this);
    }
    void await_resume() { given = false; }
};

void Store::leave() {
    expected_ = {};
    io::ReadyNode* node = queue_.pop();
    busy_ = node != nullptr; // busy_ is passed on
    if (node != nullptr) {
        static_cast<Turn*>(node)->given = true;
        executor_->make_ready(*node);
    }
}

io::Task<Result<void>> Store::hold() {
    static constexpr Nanoseconds pause = 1'000'000;
    const io::Bound bound(*executor_, timeout_);
    for (;;) {
        co_await Turn(*this);
        if (transactions_ == 0) {
            co_return Result<void>{};
        }
        leave();
        if (bound.passed()) {
            co_return Error{Code::timed_out, "a transaction with XenStore does not end", 0, transactions_};
        }
        co_await executor_->sleep(pause);
    }
}

// Ends the turn, however the coroutine ends. A partly written request makes the byte stream unusable.
struct Store::Sending {
    Store& store;
    bool incomplete = false;
    ~Sending() {
        if (incomplete) {
            static_cast<void>(
                store.close({Code::timed_out, "a request could not be written whole: the server reads nothing"}));
        }
        store.leave();
    }
};

io::Task<Result<std::string_view>> Store::exchange(StoreType type, u32 transaction, std::string_view path,
                                                   std::string_view value, bool terminate, std::span<char> into) {
    if (!started()) {
        co_return Error{Code::not_found, "XenStore has not been started"};
    }
    const usize length = path.size() + 1 + value.size() + (terminate ? 1 : 0);
    if (length > store_payload_max) {
        co_return Error{Code::bad_argument, "a request to XenStore is too long", store_payload_max, length};
    }
    co_await Turn(*this);
    Sending sending{*this};
    if (closed_) {
        co_return *closed_;
    }
    const io::Bound bound(*executor_, timeout_);
    const StoreHeader header{type, next_id_++, transaction, static_cast<u32>(length)};
    expected_ = {true, false, false, type, header.request_id, transaction, into, 0, {}};
    progress_->close();
    executor_->poll(*this); // wants_tick() is true from now on

    const char nul = 0;
    std::array<std::span<const std::byte>, 5> pieces{
        std::as_bytes(std::span(&header, 1)), std::as_bytes(std::span(path)), std::as_bytes(std::span(&nul, 1)),
        std::as_bytes(std::span(value)), std::as_bytes(std::span(&nul, terminate ? 1u : 0u))};
    for (auto& piece : pieces) {
        while (!piece.empty()) {
            if (auto read = requests_->observe(); !read) {
                co_return close(read.error());
            }
            const usize now = std::min<usize>(piece.size(), requests_->free());
            static_cast<void>(requests_->append(piece.first(now))); // it fits: now <= free()
            piece = piece.subspan(now);
            sending.incomplete = true;
            if (!piece.empty()) { // full: publish it, and wait for room
                static_cast<void>(requests_->publish());
                CO_CHECK(channel_->send(port_));
                expected_.wants_room = true;
                if (!co_await progress_->wait(bound)) {
                    co_return Error{Code::timed_out, "XenStore does not take a request"};
                }
                expected_.wants_room = false;
                if (closed_) {
                    co_return *closed_;
                }
            }
        }
    }
    sending.incomplete = false;
    static_cast<void>(requests_->publish());
    CO_CHECK(channel_->send(port_));
    while (!expected_.done) {
        if (!co_await progress_->wait(bound)) {
            co_return Error{Code::timed_out, "XenStore does not answer (timeout=MILLISECONDS changes the bound)"};
        }
        if (closed_) {
            co_return *closed_;
        }
    }
    if (expected_.error) {
        co_return *expected_.error;
    }
    co_return std::string_view(into.data(), expected_.length);
}

// ---- receiving ----

bool Store::drain() {
    if (closed_) {
        return false;
    }
    const bool waiting = expected_.active;
    bool taken = false;
    // Bounded to a few rings' worth per turn: a server that never stops sending must not starve other services.
    for (u32 rounds = 0;; ++rounds) {
        if (rounds == 64) {
            executor_->raise(*this); // handle the rest in the next turn
            break;
        }
        u32 ready = responses_->ready();
        if (ready == 0) {
            auto more = responses_->available();
            if (!more) {
                static_cast<void>(close(more.error()));
                break;
            }
            ready = *more;
        }
        if (ready == 0 || (!in_payload_ && ready < sizeof header_)) {
            // An incomplete header stays in the ring: check for the rest next time.
            if (ready == 0) {
                break;
            }
            auto more = responses_->available();
            if (!more) {
                static_cast<void>(close(more.error()));
                break;
            }
            if (*more < sizeof header_) {
                break;
            }
        }
        taken = true;
        if (!in_payload_) {
            static_cast<void>(responses_->remove(std::as_writable_bytes(std::span(&header_, 1))));
            if (header_.length > store_payload_max) {
                static_cast<void>(close({Code::protocol, "XenStore announces a message that is too long",
                                         store_payload_max, header_.length}));
                break;
            }
            received_ = 0;
            in_payload_ = true;
        }
        const u32 now = std::min(responses_->ready(), header_.length - received_);
        static_cast<void>(responses_->remove(std::as_writable_bytes(std::span(payload_).subspan(received_, now))));
        received_ += now;
        if (received_ == header_.length) {
            in_payload_ = false;
            dispatch();
            if (closed_) {
                break;
            }
        }
    }
    if (taken && !closed_) {
        responses_->release();
        if (auto sent = channel_->send(port_); !sent) { // the server has room again
            static_cast<void>(close(sent.error()));
        }
    }
    if (waiting) {
        // The reply is complete, the server has made room for the request, or the store is closed.
        auto room = closed_ ? Result<void>{} : requests_->observe();
        if (!room) {
            static_cast<void>(close(room.error()));
        }
        if (expected_.done || closed_ || (expected_.wants_room && requests_->free() != 0)) {
            progress_->open();
        }
    }
    return taken;
}

void Store::dispatch() {
    if (header_.type == StoreType::watch_event) {
        return dispatch_watch();
    }
    if (!expected_.active || expected_.done || header_.request_id != expected_.id) {
        // A late reply to a request that timed out is recognised by its id; a reply to a request that was never made is
        // a protocol error.
        const u32 age = next_id_ - header_.request_id;
        if (age == 0 || age >= u32{1} << 31 || (expected_.active && header_.request_id == expected_.id)) {
            static_cast<void>(close({Code::protocol, "XenStore answers a request that is not in flight", expected_.id,
                                     header_.request_id}));
        }
        return;
    }
    const std::string_view text(payload_.data(), header_.length);
    if (header_.transaction != expected_.transaction) {
        static_cast<void>(close(
            {Code::protocol, "XenStore answers for another transaction", expected_.transaction, header_.transaction}));
    } else if (header_.type == StoreType::error) {
        expected_.error = from_server(text);
    } else if (header_.type != expected_.type) {
        static_cast<void>(close({Code::protocol, "XenStore answers with another type", to_underlying(expected_.type),
                                 to_underlying(header_.type)}));
    } else if (text.size() > expected_.into.size()) {
        expected_.error = Error{Code::exhausted, "a value in XenStore is longer than there is room for it",
                                expected_.into.size(), text.size()};
    } else {
        std::copy_n(text.data(), text.size(), expected_.into.data());
        expected_.length = text.size();
    }
    expected_.done = true;
}

void Store::dispatch_watch() {
    const std::string_view text(payload_.data(), header_.length);
    const usize path_end = text.find('\0');
    const usize token_end = path_end == std::string_view::npos ? path_end : text.find('\0', path_end + 1);
    if (token_end == std::string_view::npos) {
        static_cast<void>(close({Code::protocol, "XenStore sends a watch event without path and token"}));
        return;
    }
    std::string_view token = text.substr(path_end + 1, token_end - path_end - 1);
    if (!token.starts_with(token_prefix)) {
        return; // a watch of a previous user
    }
    token.remove_prefix(token_prefix.size());
    const auto number = parse_number(token);
    for (Watch* watch = watches_; watch != nullptr; watch = watch->next) {
        if (number == u64{watch->token}) {
            watch->changed(watch->context);
            return;
        }
    } // otherwise: an event that crossed with unwatch()
}

// ---- operations ----

io::Task<Result<void>> Store::command(StoreType type, u32 transaction, std::string_view path, std::string_view value,
                                      bool terminate) {
    std::array<char, 16> answer; // "OK"
    CO_CHECK(co_await exchange(type, transaction, path, value, terminate, answer));
    co_return Result<void>{};
}

io::Task<Result<std::string_view>> Store::read(std::string_view path, std::span<char> into, u32 transaction) {
    return exchange(StoreType::read, transaction, path, {}, false, into);
}
io::Task<Result<std::string_view>> Store::directory(std::string_view path, std::span<char> into, u32 transaction) {
    return exchange(StoreType::directory, transaction, path, {}, false, into);
}
io::Task<Result<void>> Store::write(std::string_view path, std::string_view value, u32 transaction) {
    return command(StoreType::write, transaction, path, value, false);
}
io::Task<Result<void>> Store::remove(std::string_view path, u32 transaction) {
    return command(StoreType::remove, transaction, path, {}, false);
}

io::Task<Result<u32>> Store::begin() {
    std::array<char, 16> answer;
    CO_TRY(const std::string_view text, co_await exchange(StoreType::transaction_start, 0, {}, {}, false, answer));
    const auto number = parse_number(up_to_nul(text));
    if (!number || *number == 0 || *number > ~u32{0}) {
        co_return Error{Code::protocol, "XenStore gives a transaction without a number"};
    }
    ++transactions_;
    co_return static_cast<u32>(*number);
}

io::Task<Result<bool>> Store::commit(u32 transaction) {
    std::array<char, 16> answer;
    const auto done = co_await exchange(StoreType::transaction_end, transaction, "T", {}, false, answer);
    --transactions_;
    if (!done && done.error().code == Code::busy) {
        co_return false;
    }
    if (!done) {
        co_return done.error();
    }
    co_return true;
}

io::Task<Result<void>> Store::watch(Watch& watch) {
    watch.token = next_token_++;
    watch.registration = registration_;
    watch.next = watches_; // before the request: the first event arrives with the reply
    watches_ = &watch;
    FixedText<24> token;
    print(token, "{}{}", token_prefix, watch.token);
    auto done = co_await command(StoreType::watch, 0, watch.path, token, true);
    if (!done) {
        for (Watch** at = &watches_; *at != nullptr; at = &(*at)->next) {
            if (*at == &watch) {
                *at = watch.next;
                break;
            }
        }
    }
    co_return done;
}

// The list may change with each request: it is searched from its head for one that is left.
io::Task<Result<void>> Store::watch_again() {
    Result<void> result;
    for (;;) {
        Watch* watch = watches_;
        while (watch != nullptr && watch->registration == registration_) {
            watch = watch->next;
        }
        if (watch == nullptr) {
            co_return result;
        }
        watch->registration = registration_;
        FixedText<24> token;
        print(token, "{}{}", token_prefix, watch->token);
        const StorePath path = watch->path;
        if (auto done = co_await command(StoreType::watch, 0, path, token, true); !done) {
            result = done;
        }
    }
}

io::Task<Result<void>> Store::unwatch(Watch& watch) {
    for (Watch** at = &watches_; *at != nullptr; at = &(*at)->next) {
        if (*at == &watch) {
            *at = watch.next;
            break;
        }
    }
    FixedText<24> token;
    print(token, "{}{}", token_prefix, watch.token);
    co_return co_await command(StoreType::unwatch, 0, watch.path, token, true);
}

io::Task<Result<u64>> Store::number(std::string_view directory, std::string_view key) {
    std::array<char, 24> text;
    const StorePath path = join(directory, key);
    CO_TRY(const std::string_view value, co_await read(path, text));
    const auto parsed = parse_number(value);
    if (!parsed) {
        log::warning("XenStore: {} is not a number: \"{}\"", path.view(), value);
        co_return Error{Code::protocol, "a node of XenStore that must be a number is not one"};
    }
    co_return *parsed;
}

io::Task<Result<u64>> Store::number_or(std::string_view directory, std::string_view key, u64 otherwise) {
    auto value = co_await number(directory, key);
    if (!value && !closed_ &&
        (value.error().code == Code::not_found || value.error().code == Code::protocol ||
         value.error().code == Code::exhausted)) {
        co_return otherwise;
    }
    co_return value;
}

io::Task<Result<void>> Store::write_all(std::string_view directory, std::span<const StoreEntry> entries) {
    for (u32 tries = 0; tries < transaction_tries; ++tries) {
        CO_TRY(const u32 transaction, co_await begin());
        for (const StoreEntry& entry : entries) {
            const StorePath path = join(directory, entry.key);
            if (auto written = co_await write(path, entry.value, transaction); !written) {
                if (!closed_) {
                    std::array<char, 16> answer;
                    static_cast<void>(
                        co_await exchange(StoreType::transaction_end, transaction, "F", {}, false, answer));
                }
                --transactions_;
                co_return written.error();
            }
        }
        CO_TRY(const bool done, co_await commit(transaction));
        if (done) {
            co_return Result<void>{};
        }
    }
    co_return Error{Code::busy, "XenStore refuses every transaction: another client keeps changing the same nodes",
                    transaction_tries, transaction_tries};
}

} // namespace fl::hv::xen
