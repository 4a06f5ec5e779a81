// The connection, and messages from the host. Channels and GPADLs: vmbus/channels.cpp.
module;
#include "core/try.hpp"
module hv.hyperv.vmbus;
import core.std;
import core.result;
import core.dma;
import core.log;
import core.processor;
import core.time;
import io.executor;
import io.latch;
import io.task;
import hv.hyperv.hypercall;
import hv.hyperv.synic;
import hv.hyperv.channel;
import hv.hyperv.vmbus.protocol;

namespace fl::hv::hyperv {

namespace {
// Limit of messages per turn, so that a host that never stops sending does not starve other services.
constexpr u32 messages_per_turn = 128;
constexpr Nanoseconds shortest_retry = 200'000;
constexpr Nanoseconds longest_retry = 10'000'000;
// Attempts, one per tick, to release an id; after that the host keeps it allocated.
constexpr u32 max_release_attempts = 1000;

// Copies a message into its struct; fields that the sender omitted are zero. Nothing if shorter than `least` bytes.
template <class M>
std::optional<M> message_of(std::span<const std::byte> bytes, usize least = sizeof(M)) {
    if (bytes.size() < least) {
        return std::nullopt;
    }
    M message;
    std::memset(static_cast<void*>(&message), 0, sizeof(M));
    std::memcpy(&message, bytes.data(), std::min(bytes.size(), sizeof(M)));
    return message;
}
} // namespace

// ---- requests and their answers ----

Vmbus::Pending::Pending(Vmbus& owner, MessageType type, u32 channel, u32 id)
    : answer(type), relid(channel), handle(id), latch(owner.environment_->executor), next(owner.pending_), bus(&owner) {
    owner.pending_ = this;
    owner.environment_->executor.poll(owner); // wants_tick() is true from now on
}

Vmbus::Pending::~Pending() {
    for (Pending** at = &bus->pending_; *at != nullptr; at = &(*at)->next) {
        if (*at == this) {
            *at = next;
            break;
        }
    }
}

io::Task<Result<void>> Vmbus::answer(Pending& pending, io::Bound bound, std::string_view what) {
    static_cast<void>(co_await pending.latch.wait(bound));
    if (pending.done) {
        co_return Result<void>{};
    }
    if (pending.gone) {
        co_return Error{Code::device_gone, "VMBus: the host has rescinded the device"};
    }
    co_return Error{Code::timed_out, what};
}

void Vmbus::settle(MessageType type, u32 relid, u32 handle, HostStatus status) {
    for (Pending* pending = pending_; pending != nullptr; pending = pending->next) {
        if (pending->answer == type && !pending->done && pending->handle == handle &&
            (relid == 0 || pending->relid == relid)) {
            pending->status = status;
            pending->done = true;
            pending->latch.open();
            return;
        }
    }
    unexpected(type, "answers no request (id)", handle);
}

void Vmbus::unexpected(MessageType type, std::string_view what, u64 value) {
    ++counters_.unexpected;
    if (!std::exchange(unexpected_logged_, true)) {
        log::warning("VMBus: a message of type {} {} {:#x}: ignored, as all further ones of the kind",
                     to_underlying(type), what, value);
    }
}

// ---- sending ----

Status Vmbus::post_now(std::span<const std::byte> message) {
    const Status status = environment_->hypercalls.post_message(connection_, channel_message, message);
    counters_.posted += status == Status::success ? 1 : 0;
    return status;
}

io::Task<Result<void>> Vmbus::post(std::span<const std::byte> message, io::Bound bound, const bool* gone) {
    for (Nanoseconds pause = shortest_retry;; pause = std::min(pause * 2, longest_retry)) {
        const Status status = post_now(message);
        switch (status) {
        case Status::success: co_return Result<void>{};
        // after connect(): the host is being serviced or migrated, and the connection will return
        case Status::invalid_connection_id:
            if (!connected()) {
                co_return Error{Code::not_found, "VMBus: no host at the connection that messages are posted to", 0,
                                connection_};
            }
            [[fallthrough]];
        case Status::insufficient_buffers:
        case Status::insufficient_memory:
            if (bound.passed()) {
                co_return Error{Code::timed_out, "VMBus: the hypervisor has no buffer for a message (status)", 0,
                                to_underlying(status)};
            }
            ++counters_.retries;
            co_await environment_->executor.sleep(pause);
            if (gone != nullptr && *gone) {
                co_return Error{Code::device_gone, "VMBus: the host has rescinded the device"};
            }
            break;
        case Status::access_denied:
        case Status::operation_denied:
        case Status::invalid_hypercall_code:
            co_return Error{Code::not_supported, "VMBus: the hypervisor does not let this guest post messages (status)",
                            0, to_underlying(status)};
        default:
            co_return Error{Code::io, "VMBus: the hypervisor does not take a message (status)", 0,
                            to_underlying(status)};
        }
    }
}

// ---- the connection ----

Result<void> Vmbus::install(const VmbusEnvironment& environment) {
    environment_.emplace(environment);
    TRY(interrupt_page_, environment.memory.buffer(page_size));
    TRY(monitor_pages_, environment.memory.buffer(2 * static_cast<u32>(page_size)));
    return {};
}

io::Task<Result<bool>> Vmbus::contact(Version version) {
    const bool new_connection = version >= Version::v5_0;
    connection_ = new_connection ? message_connection_5_0 : message_connection;
    InitiateContact message;
    message.version = version;
    message.target_vp = environment_->synic.vp_index(0);
    message.interrupt_page_or_target = new_connection ? vmbus_sint : interrupt_page_.bus(); // VTL 0
    message.monitor_page_from_host = monitor_pages_.bus();
    message.monitor_page_to_host = monitor_pages_.bus() + page_size;

    const io::Bound bound(environment_->executor, std::min(environment_->timeout, contact_timeout));
    Pending pending(*this, MessageType::version_response, 0, 0);
    CO_CHECK(co_await send(message, bound));
    CO_CHECK(co_await answer(pending, bound, "VMBus: no answer to the first contact"));
    if (pending.version.supported == 0) {
        co_return false;
    }
    if (pending.version.state != ConnectionState::successful) {
        co_return Error{Code::io, "VMBus: the host knows the version and refuses the connection (state)", 0,
                        to_underlying(pending.version.state)};
    }
    if (new_connection && pending.version.message_connection != 0) {
        connection_ = pending.version.message_connection;
    }
    co_return true;
}

io::Task<Result<void>> Vmbus::connect() {
    if (!environment_ || connected()) {
        co_return Error{Code::busy, "VMBus: not installed, or connected already"};
    }
    if (!std::exchange(active_, true)) {
        environment_->executor.add(*this);
        environment_->synic.message_listener().set(environment_->executor, *this);
    }
    bool new_connection = true; // whether a host listens at the connection of versions from 5.0 on
    std::optional<Error> failure;
    for (const Version version : versions) {
        if (version >= Version::v5_0 && !new_connection) {
            continue;
        }
        const auto accepted = co_await contact(version);
        if (accepted && *accepted) {
            version_ = version;
            environment_->synic.use_interrupt_page(
                version < Version::v2_4 ? reinterpret_cast<InterruptPage*>(interrupt_page_.data()) : nullptr);
            log::info("VMBus {}.{}, messages by connection {:#x}", to_underlying(version) >> 16,
                      to_underlying(version) & 0xffff, connection_);
            co_return Result<void>{};
        }
        if (accepted) {
            continue; // refused: try the next older version
        }
        failure = accepted.error();
        if (version < Version::v5_0) {
            break;
        }
        new_connection = false; // an older host than 5.0, or none
    }
    environment_->synic.message_listener().clear();
    environment_->executor.remove(*this);
    active_ = false;
    connection_ = message_connection;
    if (failure && failure->code != Code::not_found && failure->code != Code::timed_out) {
        co_return *failure;
    }
    if (failure) {
        co_return Error{Code::not_found, "no VMBus answers: this host has Hyper-V's interface and no bus"};
    }
    co_return Error{Code::not_supported, "the host refuses every version of the VMBus from 5.3 down to 0.13"};
}

io::Task<Result<void>> Vmbus::request_offers() {
    const io::Bound until = posting_bound();
    Pending pending(*this, MessageType::all_offers_delivered, 0, 0);
    const RequestOffers message;
    CO_CHECK(co_await send(message, until));
    const auto ended = co_await answer(pending, answering_bound(), "VMBus: the host does not complete its offers");
    offers_delivered_ = true; // or are late, and will be passed to the listeners
    co_return ended;
}

void Vmbus::unload(Nanoseconds timeout) {
    if (!connected()) {
        return;
    }
    // Uses elapsed time: in a panic this runs on any processor, and the executor's machine time is not this
    // processor's.
    SpinBound bound(environment_->executor.elapsed(), timeout);
    const auto passed = [&] { return bound.passed(environment_->executor.elapsed()); };
    const Unload message;
    const std::span<const std::byte> bytes = std::as_bytes(std::span<const Unload, 1>(&message, 1));
    Status status = post_now(bytes);
    while ((status == Status::insufficient_buffers || status == Status::insufficient_memory ||
            status == Status::invalid_connection_id) &&
           !passed()) {
        status = post_now(bytes);
    }
    bool answered = version_ < Version::v1_1 || status != Status::success; // 0.13 does not confirm
    version_ = Version::none;
    environment_->synic.use_interrupt_page(nullptr);
    if (this_processor() != 0) {
        return; // only processor 0 receives messages; a panic elsewhere does not wait for them
    }
    SynicMessage received;
    while (!answered && !passed()) {
        if (environment_->synic.next(received)) {
            const auto header = message_of<MessageHeader>(received.bytes());
            answered = header && header->type == MessageType::unload_response;
        }
    }
    if (answered) {
        log::info("VMBus: unloaded");
    } else {
        log::warning("VMBus: the host does not confirm the end of the connection");
    }
}

// ---- messages from the host ----

bool Vmbus::drain() {
    SynicMessage message;
    u32 taken = 0;
    while (taken < messages_per_turn && environment_->synic.next(message)) {
        ++taken;
        ++counters_.messages;
        take(message);
    }
    if (taken == messages_per_turn) {
        environment_->executor.raise(*this); // there may be more: do not sleep
    }
    return taken != 0;
}

void Vmbus::tick(Instant) {
    while (connected() && to_release_count_ != 0) { // those that could not be posted
        const RelidReleased message{{RelidReleased::type}, to_release_[to_release_count_ - 1]};
        if (post_now(std::as_bytes(std::span<const RelidReleased, 1>(&message, 1))) != Status::success &&
            ++release_attempts_ < max_release_attempts) {
            return;
        }
        release_attempts_ = 0;
        --to_release_count_;
    }
}

void Vmbus::take(const SynicMessage& message) {
    const std::span<const std::byte> bytes = message.bytes();
    const auto header = message_of<MessageHeader>(bytes);
    if (!header) {
        unexpected(MessageType::invalid, "is shorter than a header (bytes)", bytes.size());
        return;
    }
    const auto too_short = [&] { unexpected(header->type, "is too short (bytes)", bytes.size()); };
    switch (header->type) {
    case MessageType::offer_channel: {
        // Version 0.13 messages end with the monitor id.
        const auto offer = message_of<OfferChannel>(bytes, 190);
        offer ? on_offer(*offer) : too_short();
        return;
    }
    case MessageType::rescind_channel_offer: {
        const auto rescind = message_of<RescindChannelOffer>(bytes);
        rescind ? on_rescind(rescind->relid) : too_short();
        return;
    }
    case MessageType::all_offers_delivered:
    case MessageType::unload_response: settle(header->type, 0, 0, HostStatus::success); return;
    case MessageType::open_channel_result: {
        const auto result = message_of<OpenChannelResult>(bytes);
        result ? settle(header->type, result->relid, result->open_id, result->status) : too_short();
        return;
    }
    case MessageType::gpadl_created: {
        const auto created = message_of<GpadlCreated>(bytes);
        created ? settle(header->type, created->relid, created->gpadl, created->status) : too_short();
        return;
    }
    case MessageType::gpadl_torndown: {
        const auto torndown = message_of<GpadlTorndown>(bytes);
        torndown ? settle(header->type, 0, torndown->gpadl, HostStatus::success) : too_short();
        return;
    }
    case MessageType::modify_channel_response: {
        const auto response = message_of<ModifyChannelResponse>(bytes);
        response ? settle(header->type, response->relid, response->relid, response->status) : too_short();
        return;
    }
    case MessageType::version_response: {
        const auto response = message_of<VersionResponse>(bytes, version_response_min);
        if (!response) {
            too_short();
            return;
        }
        for (Pending* pending = pending_; pending != nullptr; pending = pending->next) {
            if (pending->answer == header->type && !pending->done) {
                pending->version = *response;
            }
        }
        settle(header->type, 0, 0, HostStatus::success);
        return;
    }
    default: unexpected(header->type, "is of an unknown type (bytes)", bytes.size()); return;
    }
}

void Vmbus::on_offer(const OfferChannel& message) {
    if (!connected() || message.relid == 0 || message.relid >= max_relids || known(message.relid) != nullptr) {
        unexpected(message.header.type, "offers a channel whose id is invalid or in use:", message.relid);
        return;
    }
    if (offers_.size() >= max_offers || !offers_.push({})) {
        ++counters_.offers_dropped;
        release_relid(message.relid);
        for (OfferListener* listener = offers_delivered_ ? listeners_ : nullptr; listener != nullptr;) {
            OfferListener* const following = listener->next;
            if (listener->dropped != nullptr) {
                listener->dropped(listener->context);
            }
            listener = following;
        }
        return;
    }
    Offer offer;
    offer.type = message.interface_type;
    offer.instance = message.instance;
    offer.relid = message.relid;
    offer.flags = message.flags;
    offer.sub_channel = message.sub_channel_index;
    offer.user_defined = message.user_defined;
    // Version 0.13 has neither field: all channels are signalled through the common connection and the interrupt page.
    offer.dedicated_interrupt = version_ > Version::v0_13 && (message.dedicated_interrupt & 1) != 0;
    offer.connection_id = version_ > Version::v0_13 ? message.connection_id : event_connection;
    if ((message.monitor_allocated & 1) != 0 && message.monitor_id < monitors) {
        offer.monitor = message.monitor_id;
    }
    usize at = offers_.size() - 1;
    for (; at > 0 && offers_[at - 1].offer.relid > offer.relid; --at) {
        offers_[at] = offers_[at - 1];
    }
    offers_[at] = {.offer = offer};
    ++counters_.offers;
    log::debug("VMBus: channel {} of {} {}, sub-channel {}", offer.relid, offer.type.text().view(),
               offer.instance.text().view(), offer.sub_channel);

    if (offer.sub_channel != 0) {
        for (Pending* pending = pending_; pending != nullptr; pending = pending->next) {
            if (pending->answer == message.header.type && !pending->done && pending->instance == offer.instance &&
                pending->handle == offer.sub_channel) {
                pending->offer = offer;
                pending->done = true;
                pending->latch.open();
            }
        }
        return;
    }
    for (OfferListener* listener = offers_delivered_ ? listeners_ : nullptr; listener != nullptr;) {
        OfferListener* const following = listener->next; // the callback may remove the listener
        if (listener->type.is_null() || listener->type == offer.type) {
            listener->offered(listener->context, offer);
        }
        listener = following;
    }
}

void Vmbus::on_rescind(u32 relid) {
    KnownOffer* offer = known(relid);
    if (offer == nullptr || offer->rescinded) {
        unexpected(MessageType::rescind_channel_offer, "rescinds a channel that is not offered:", relid);
        return;
    }
    ++counters_.rescinds;
    log::info("VMBus: the host rescinds channel {} of {} {}", relid, offer->offer.type.text().view(),
              offer->offer.instance.text().view());
    const bool open = offer->open;
    offer->rescinded = true;
    for (Pending* pending = pending_; pending != nullptr; pending = pending->next) {
        if (pending->relid == relid && !pending->done) {
            pending->gone = true;
            pending->latch.open();
        }
    }
    if (!open) {
        channel_closed(relid);
        return;
    }
    for (Channel* channel = channels_; channel != nullptr; channel = channel->next) {
        if (channel->offer().relid == relid) {
            channel->mark_rescinded(); // its owner closes it
            return;
        }
    } // none: it is being opened or closed, which handles the rescind
}

// ---- the list of offers ----

Vmbus::KnownOffer* Vmbus::known(u32 relid) {
    for (KnownOffer& known_offer : offers_) {
        if (known_offer.offer.relid == relid) {
            return &known_offer;
        }
    }
    return nullptr;
}

std::optional<Offer> Vmbus::find(u32 relid) const {
    for (const KnownOffer& known_offer : offers_) {
        if (known_offer.offer.relid == relid && !known_offer.rescinded) {
            return known_offer.offer;
        }
    }
    return std::nullopt;
}

std::optional<Offer> Vmbus::take_new() {
    for (KnownOffer& known_offer : offers_) {
        if (known_offer.offer.sub_channel == 0 && !known_offer.rescinded && !std::exchange(known_offer.given, true)) {
            return known_offer.offer;
        }
    }
    return std::nullopt;
}

void Vmbus::forget(u32 relid) {
    if (KnownOffer* offer = known(relid)) {
        offers_.remove(static_cast<usize>(offer - offers_.begin()));
    }
}

// The channel is not open any more: after a rescind its id is released, and the host may reuse it.
void Vmbus::channel_closed(u32 relid) {
    KnownOffer* offer = known(relid);
    if (offer == nullptr) {
        return;
    }
    offer->open = false;
    if (offer->rescinded) {
        forget(relid);
        release_relid(relid);
    }
}

void Vmbus::release_relid(u32 relid) {
    const RelidReleased message{{RelidReleased::type}, relid};
    const Status status = post_now(std::as_bytes(std::span<const RelidReleased, 1>(&message, 1)));
    if (status != Status::success && to_release_count_ < to_release_.size()) {
        to_release_[to_release_count_++] = relid; // tick() retries; without room here, the host keeps the id allocated
        environment_->executor.poll(*this);
    }
}

bool Vmbus::is_rescinded(u32 relid) {
    const KnownOffer* offer = known(relid);
    return offer == nullptr || offer->rescinded;
}

void Vmbus::add(OfferListener& listener) {
    listener.next = listeners_;
    listeners_ = &listener;
}

void Vmbus::remove(OfferListener& listener) {
    for (OfferListener** at = &listeners_; *at != nullptr; at = &(*at)->next) {
        if (*at == &listener) {
            *at = listener.next;
            return;
        }
    }
}

} // namespace fl::hv::hyperv
