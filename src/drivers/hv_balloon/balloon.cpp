module;
#include "core/try.hpp"
module drivers.hv_balloon.balloon;
import core.std;
import core.result;
import core.dma;
import core.log;
import core.text;

namespace fl::drivers::hv_balloon {

namespace {

template <class T>
Result<T> load(std::span<const std::byte> from, std::string_view what) {
    if (from.size() < sizeof(T)) {
        return Error{Code::protocol, what, sizeof(T), from.size()};
    }
    T value;
    std::memcpy(&value, from.data(), sizeof value);
    return value;
}

constexpr u64 bytes_in(u64 pages) { return pages * page_size; }

} // namespace

// Pages held by the host are not reclaimed: they will never be returned.
Balloon::~Balloon() = default;

template <class T>
Result<void> Balloon::send(T& message, u32 transaction) {
    message.header.size = sizeof message;
    message.header.transaction = transaction;
    return link_.send(std::as_bytes(std::span<const T, 1>(&message, 1)), transaction);
}

Result<void> Balloon::begin() {
    attempt_ = 0;
    return request_version();
}

Result<void> Balloon::request_version() {
    VersionRequest request{};
    request.header.type = MessageType::version_request;
    request.version = versions[attempt_];
    request.last_attempt = attempt_ + 1 == versions.size() ? 1 : 0;
    state_ = State::version_requested;
    return send(request, ++transaction_);
}

Result<void> Balloon::take(std::span<const std::byte> message) {
    TRY(const Header header, load<Header>(message, "a memory message is shorter than its header"));
    if (header.size < sizeof header || header.size > message.size()) {
        return Error{Code::protocol, "a memory message has a wrong length", header.size, message.size()};
    }
    message = message.first(header.size);
    switch (header.type) {
    case MessageType::version_response: return version_answered(message, header);
    case MessageType::capabilities_response: return capabilities_answered(message, header);
    case MessageType::balloon_request: return inflate(message, header);
    case MessageType::unballoon_request: return deflate(message, header);
    case MessageType::hot_add_request: {
        log::info("hv_balloon: the host offers more memory: this kernel cannot take it");
        HotAddResponse response{};
        response.header.type = MessageType::hot_add_response;
        response.result = 1; // success with 0 pages: the host need not ask again [hv-dm]
        return send(response, header.transaction);
    }
    case MessageType::hot_remove_request: {
        HotRemoveResponse response{};
        response.header.type = MessageType::hot_remove_response;
        return send(response, header.transaction);
    }
    case MessageType::info: {
        TRY(const Info info, load<Info>(message, "an info message is shorter than its fields"));
        if (info.bytes > message.size() - sizeof info) {
            return Error{Code::protocol, "an info message has a wrong length", info.bytes,
                         message.size() - sizeof info};
        }
        return {};
    }
    case MessageType::error:
        state_ = State::refused;
        return Error{Code::not_supported, "the host ended the dynamic memory protocol with an error message"};
    default:
        return Error{Code::protocol, "a memory message that only a guest sends, or of an unknown type", 0,
                     to_underlying(header.type)};
    }
}

Result<void> Balloon::version_answered(std::span<const std::byte> message, const Header& header) {
    TRY(const VersionResponse response,
        load<VersionResponse>(message, "a version response is shorter than its fields"));
    if (state_ != State::version_requested || header.transaction != transaction_) {
        return Error{Code::protocol, "an unexpected version response", transaction_, header.transaction};
    }
    if ((response.accepted & 1) == 0) {
        if (attempt_ + 1 == versions.size()) {
            state_ = State::refused;
            return Error{
                Code::not_supported,
                "the host supports no version of the dynamic memory protocol that this driver does (2.0, 1.0, 0.3)"};
        }
        ++attempt_;
        return request_version();
    }
    Capabilities own{};
    own.header.type = MessageType::capabilities_report;
    own.capabilities = capability_balloon;
    own.min_pages = reserve;
    own.max_page_number = ~u64{0};
    state_ = State::capabilities_requested;
    return send(own, ++transaction_);
}

Result<void> Balloon::capabilities_answered(std::span<const std::byte> message, const Header& header) {
    TRY(const CapabilitiesResponse response,
        load<CapabilitiesResponse>(message, "a capabilities response is shorter than its fields"));
    if (state_ != State::capabilities_requested || header.transaction != transaction_) {
        return Error{Code::protocol, "an unexpected capabilities response", transaction_, header.transaction};
    }
    if ((response.flags & capabilities_accepted) == 0) {
        state_ = State::refused;
        return Error{Code::not_supported, "the host refuses a guest that cannot add memory while it runs"};
    }
    reports_wanted_ = (response.flags & capabilities_no_reports) == 0;
    state_ = State::running;
    return report();
}

Result<void> Balloon::report() {
    if (!reports_wanted()) {
        return {};
    }
    StatusReport report{};
    report.header.type = MessageType::status_report;
    report.available = memory_.free();
    // The host counts pages that it holds as committed. Free memory may exceed total(), because memory in use at the
    // start may have been freed since.
    report.committed = memory_.total() - std::min(memory_.total(), report.available);
    return send(report, ++transaction_);
}

// Gives as many pages as can be spared, in one response; the host repeats the request if it needs more.
Result<void> Balloon::inflate(std::span<const std::byte> message, const Header& header) {
    TRY(const BalloonRequest request, load<BalloonRequest>(message, "a balloon request is shorter than its fields"));
    if (state_ != State::running) {
        return Error{Code::protocol, "a balloon request before the capabilities were negotiated"};
    }
    const u64 free = memory_.free();
    u64 wanted = std::min<u64>(request.pages, free > reserve ? free - reserve : 0);
    const u32 before = run_count_;
    u64 given = 0;
    for (u64 size = max_run; wanted != 0 && size != 0 && run_count_ < capacity;) {
        size = std::min(size, std::bit_floor(wanted));
        auto span = memory_.pages.allocate(static_cast<u32>(bytes_in(size)), ~u64{0});
        if (!span) {
            size /= 2;
            continue;
        }
        runs_[run_count_++] = {span->data, span->bus / page_size, size};
        wanted -= size;
        given += size;
    }
    BalloonResponse response{};
    response.header.type = MessageType::balloon_response;
    response.header.transaction = header.transaction;
    const u32 count = run_count_ - before;
    response.more_and_count = count << 1;
    response.header.size = static_cast<u16>(sizeof response + count * sizeof(PageRange));
    std::memcpy(response_.data(), &response, sizeof response);
    for (u32 i = 0; i < count; ++i) {
        const PageRange range = page_range(runs_[before + i].first, runs_[before + i].pages);
        std::memcpy(response_.data() + sizeof response + i * sizeof range, &range, sizeof range);
    }
    const auto sent = link_.send(std::span<const std::byte>(response_).first(response.header.size), header.transaction);
    if (!sent) { // the host has not received them
        while (run_count_ > before) {
            const Run& run = runs_[--run_count_];
            memory_.pages.free({run.data, bytes_in(run.first), static_cast<u32>(bytes_in(run.pages))});
        }
        return sent;
    }
    ballooned_ += given;
    log::info("hv_balloon: {} {} requested, {} given, {} ballooned", request.pages, plural(request.pages, "pages"),
              given, ballooned_);
    return {};
}

Result<void> Balloon::deflate(std::span<const std::byte> message, const Header& header) {
    TRY(const UnballoonRequest request,
        load<UnballoonRequest>(message, "an unballoon request is shorter than its fields"));
    if (state_ != State::running) {
        return Error{Code::protocol, "an unballoon request before the capabilities were negotiated"};
    }
    const auto list = message.subspan(sizeof request);
    if (request.range_count > list.size() / sizeof(PageRange)) {
        return Error{Code::protocol, "an unballoon request counts more ranges than it holds",
                     list.size() / sizeof(PageRange), request.range_count};
    }
    for (u32 i = 0; i < request.range_count; ++i) {
        TRY(const PageRange range, load<PageRange>(list.subspan(i * sizeof(PageRange)), ""));
        CHECK(reclaim(range));
    }
    if ((request.more & 1) != 0) {
        return {};
    }
    log::info("hv_balloon: pages returned, {} ballooned", ballooned_);
    struct {
        Header header;
    } response{};
    response.header.type = MessageType::unballoon_response;
    return send(response, header.transaction);
}

// A range may be part of a run, or span several runs.
Result<void> Balloon::reclaim(PageRange range) {
    u64 first = range.first();
    u64 left = range.count();
    while (left != 0) {
        u32 at = 0;
        while (at < run_count_ && (first < runs_[at].first || first - runs_[at].first >= runs_[at].pages)) {
            ++at;
        }
        if (at == run_count_) {
            return Error{Code::protocol, "the host returns a page that it does not have", 0, first};
        }
        Run& run = runs_[at];
        const u64 skip = first - run.first;
        const u64 pages = std::min(left, run.pages - skip);
        const u64 after = run.pages - skip - pages;
        const DmaSpan span{run.data + bytes_in(skip), bytes_in(first), static_cast<u32>(bytes_in(pages))};
        const Run tail{span.data + span.size, first + pages, after};
        if (skip != 0) {
            run.pages = skip;
            if (after != 0 && run_count_ < capacity) {
                runs_[run_count_++] = tail;
            } else if (after != 0) {
                log::warning("hv_balloon: {} {} lost: too many ranges are ballooned", after, plural(after, "pages"));
            }
        } else if (after != 0) {
            run = tail;
        } else {
            run = runs_[--run_count_];
        }
        memory_.pages.free(span);
        ballooned_ -= pages;
        first += pages;
        left -= pages;
    }
    return {};
}

} // namespace fl::drivers::hv_balloon
