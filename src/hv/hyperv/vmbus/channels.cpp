// Channels, and memory shared with the host.
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
import io.task;
import hv.hyperv.hypercall;
import hv.hyperv.synic;
import hv.hyperv.channel;
import hv.hyperv.vmbus.protocol;

namespace fl::hv::hyperv {

// ---- GPADLs ----

u32 Vmbus::new_gpadl() {
    const u32 handle = next_gpadl_;
    next_gpadl_ = next_gpadl_ == ~u32{0} ? 1 : next_gpadl_ + 1;
    return handle;
}

io::Task<Result<Gpadl>> Vmbus::create_gpadl(u32 relid, std::span<const u64> frames) {
    return share(relid, {frames, 0, static_cast<u32>(frames.size())});
}
io::Task<Result<Gpadl>> Vmbus::create_gpadl(u32 relid, u64 first_frame, u32 count) {
    return share(relid, {{}, first_frame, count});
}

io::Task<Result<Gpadl>> Vmbus::share(u32 relid, Frames frames) {
    if (frames.count == 0 || frames.count > max_gpadl_pages) {
        co_return Error{Code::bad_argument, "VMBus: too many pages for one GPADL", max_gpadl_pages, frames.count};
    }
    if (is_rescinded(relid)) {
        co_return Error{Code::device_gone, "VMBus: the host has rescinded the device"};
    }
    const Gpadl gpadl{relid, new_gpadl()};
    const io::Bound until = posting_bound();
    Pending pending(*this, MessageType::gpadl_created, relid, gpadl.handle);

    // The header with as many pages as fit, then bodies with the rest.
    alignas(8) std::array<std::byte, max_message> message{};
    GpadlHeader header;
    header.relid = relid;
    header.gpadl = gpadl.handle;
    header.range_bytes = static_cast<u16>(sizeof(GpaRange) + 8 * frames.count);
    header.range_count = 1;
    const GpaRange range{frames.count * static_cast<u32>(page_size), 0};
    std::memcpy(message.data(), &header, sizeof(header));
    std::memcpy(message.data() + sizeof(header), &range, sizeof(range));
    u32 sent = 0;
    usize size = sizeof(header) + sizeof(range);
    for (u32 number = 0;; ++number) {
        for (; sent < frames.count && size + 8 <= max_message; ++sent, size += 8) {
            const u64 frame = frames.at(sent);
            std::memcpy(message.data() + size, &frame, 8);
        }
        // Do not send once the channel is rescinded: its id may have been released and reused, and the host would keep
        // the pages for the new channel.
        CO_CHECK(co_await post(std::span<const std::byte>(message).first(size), until, &pending.gone));
        if (sent == frames.count || pending.gone) { // the host would ignore the rest
            break;
        }
        GpadlBody body;
        body.number = number;
        body.gpadl = gpadl.handle;
        std::memcpy(message.data(), &body, sizeof(body));
        size = sizeof(body);
    }
    CO_CHECK(co_await answer(pending, answering_bound(),
                             "VMBus: the host does not confirm a GPADL: its memory is given up"));
    if (pending.status != HostStatus::success) {
        co_return Error{Code::io, "VMBus: the host refuses a GPADL (status)", 0, to_underlying(pending.status)};
    }
    co_return gpadl;
}

io::Task<Result<void>> Vmbus::teardown_gpadl(Gpadl gpadl) {
    if (is_rescinded(gpadl.relid)) {
        co_return Result<void>{}; // the host releases everything of a rescinded channel
    }
    const io::Bound until = posting_bound();
    Pending pending(*this, MessageType::gpadl_torndown, gpadl.relid, gpadl.handle);
    GpadlTeardown message;
    message.relid = gpadl.relid;
    message.gpadl = gpadl.handle;
    CO_CHECK(co_await send(message, until));
    auto done =
        co_await answer(pending, answering_bound(), "VMBus: the host does not release a GPADL: its memory is given up");
    if (!done && done.error().code == Code::device_gone) {
        co_return Result<void>{};
    }
    co_return done;
}

// ---- open and close ----

Channel::Signalling Vmbus::signalling(const Offer& offer, bool may_defer) {
    Channel::Signalling result{&environment_->hypercalls, offer.connection_id, nullptr, 0, nullptr, 0};
    const bool deferred = may_defer && offer.monitor;
    if (!offer.dedicated_interrupt || deferred) {
        auto* page = reinterpret_cast<InterruptPage*>(interrupt_page_.data());
        result.interrupt_word = &page->to_host[offer.relid / 64];
        result.interrupt_bit = u64{1} << offer.relid % 64;
    }
    if (deferred) {
        auto* page = reinterpret_cast<MonitorPage*>(monitor_pages_.data() + page_size);
        result.monitor_word = &page->groups[*offer.monitor / 32].pending;
        result.monitor_bit = u32{1} << *offer.monitor % 32;
    }
    return result;
}

void Vmbus::unlink(Channel& channel) {
    for (Channel** at = &channels_; *at != nullptr; at = &(*at)->next) {
        if (*at == &channel) {
            *at = std::exchange(channel.next, nullptr);
            return;
        }
    }
}

io::Task<Result<void>> Vmbus::open(Channel& channel, Offer offer, OpenParameters parameters) {
    KnownOffer* known_offer = known(offer.relid);
    if (known_offer == nullptr || known_offer->rescinded || known_offer->offer.instance != offer.instance) {
        co_return Error{Code::device_gone, "VMBus: this channel is not offered any more"};
    }
    if (known_offer->open || channel.is_open()) {
        co_return Error{Code::busy, "VMBus: this channel is open already"};
    }
    const u64 bytes = ring_bytes(parameters.send_bytes) + ring_bytes(parameters.receive_bytes);
    if (parameters.send_bytes == 0 || parameters.receive_bytes == 0 ||
        (parameters.send_bytes | parameters.receive_bytes) % page_size != 0 || bytes / page_size > max_gpadl_pages) {
        co_return Error{Code::bad_argument, "VMBus: a channel's rings are whole pages, both together at most 8190",
                        max_gpadl_pages * page_size, bytes};
    }
    if (parameters.user_data.size() > 120 || parameters.cpu >= max_processors ||
        !environment_->synic.enabled(parameters.cpu)) {
        co_return Error{Code::bad_argument,
                        "VMBus: a channel opens with at most 120 bytes of data, on a processor that has joined", 120,
                        parameters.user_data.size()};
    }
    CO_TRY(DmaBuffer rings, environment_->memory.buffer(static_cast<u32>(bytes)));
    known(offer.relid)->open = true;
    const auto gpadl = co_await create_gpadl(offer.relid, rings.bus() / page_size, static_cast<u32>(bytes / page_size));
    if (!gpadl) {
        if (gpadl.error().code == Code::timed_out) {
            rings.abandon();
        }
        channel_closed(offer.relid);
        co_return gpadl.error();
    }
    auto opened = co_await open_shared(channel, offer, parameters, std::move(rings), *gpadl);
    if (!opened) {
        channel_closed(offer.relid);
    }
    co_return opened;
}

io::Task<Result<void>> Vmbus::open_shared(Channel& channel, Offer offer, OpenParameters parameters, DmaBuffer rings,
                                          Gpadl gpadl) {
    const u32 send_bytes = static_cast<u32>(ring_bytes(parameters.send_bytes));
    Result<void> result =
        channel.attach(offer, parameters.cpu, std::move(rings), send_bytes, signalling(offer, parameters.may_defer),
                       environment_->synic.events(offer.relid), &environment_->synic.listener(offer.relid));
    bool unanswered = false;
    if (result) {
        channel.gpadl = gpadl.handle;
        environment_->synic.watch(offer.relid);
        const io::Bound until = posting_bound();
        const u32 id = next_open_++;
        Pending pending(*this, MessageType::open_channel_result, offer.relid, id);
        OpenChannel message;
        message.relid = offer.relid;
        message.open_id = id;
        message.ring_gpadl = gpadl.handle;
        message.target_vp = environment_->synic.vp_index(parameters.cpu);
        message.downstream_page_offset = send_bytes / static_cast<u32>(page_size);
        for (usize i = 0; i < parameters.user_data.size(); ++i) {
            message.user_data[i] = static_cast<u8>(parameters.user_data[i]);
        }
        result = co_await send(message, until);
        if (result) {
            result = co_await answer(pending, answering_bound(), "VMBus: the host does not answer OPEN_CHANNEL");
            unanswered = !result && result.error().code == Code::timed_out;
        }
        if (result && pending.status != HostStatus::success) {
            result =
                Error{Code::io, "VMBus: the host does not open the channel (status)", 0, to_underlying(pending.status)};
        }
    }
    if (result) {
        channel.next = channels_;
        channels_ = &channel;
        if (is_rescinded(offer.relid)) { // rescinded in the same turn in which it was opened
            channel.mark_rescinded();
        }
        co_return result;
    }
    if (unanswered) { // it may be open: close it before the memory is reclaimed
        CloseChannel message;
        message.relid = offer.relid;
        static_cast<void>(co_await send(message, posting_bound()));
    }
    DmaBuffer memory = channel.detach();
    if (auto released = co_await teardown_gpadl(gpadl); !released) {
        memory.abandon();
    }
    co_return result;
}

io::Task<Result<void>> Vmbus::close(Channel& channel) {
    if (!channel.is_open()) {
        co_return Result<void>{};
    }
    const Offer offer = channel.offer();
    const Gpadl gpadl{offer.relid, channel.gpadl};
    unlink(channel);
    DmaBuffer memory = channel.detach();
    Result<void> result;
    if (!is_rescinded(offer.relid)) {
        CloseChannel message;
        message.relid = offer.relid;
        result = co_await send(message, posting_bound());
        if (result) {
            result = co_await teardown_gpadl(gpadl);
        }
    }
    if (!result) {
        memory.abandon();
    }
    channel_closed(offer.relid);
    co_return result;
}

io::Task<Result<void>> Vmbus::modify(Channel& channel, u32 cpu) {
    if (version_ < Version::v4_1) {
        co_return Error{Code::not_supported, "VMBus: this version cannot move a channel to another processor",
                        to_underlying(Version::v4_1), to_underlying(version_)};
    }
    if (!channel.is_open() || cpu >= max_processors || !environment_->synic.enabled(cpu)) {
        co_return Error{Code::bad_argument, "VMBus: only an open channel moves, to a processor that has joined",
                        max_processors - 1, cpu};
    }
    const u32 relid = channel.offer().relid;
    if (is_rescinded(relid)) {
        co_return Error{Code::device_gone, "VMBus: the host has rescinded the device"};
    }
    const io::Bound until = posting_bound();
    Pending pending(*this, MessageType::modify_channel_response, relid, relid);
    ModifyChannel message;
    message.relid = relid;
    message.target_vp = environment_->synic.vp_index(cpu);
    CO_CHECK(co_await send(message, until));
    // before 5.3 the host does not confirm: events may still be raised on the old processor for a while
    if (version_ >= Version::v5_3) {
        CO_CHECK(
            co_await answer(pending, answering_bound(), "VMBus: the host does not confirm a channel's new processor"));
        if (pending.status != HostStatus::success) {
            co_return Error{Code::io, "VMBus: the host does not move the channel (status)", 0,
                            to_underlying(pending.status)};
        }
    }
    channel.move_to(cpu);
    co_return Result<void>{};
}

io::Task<Result<Offer>> Vmbus::sub_channel(Guid instance, u16 index, io::Bound bound) {
    for (const KnownOffer& known_offer : offers_) {
        const Offer& offer = known_offer.offer;
        if (offer.instance == instance && offer.sub_channel == index && !known_offer.rescinded) {
            co_return offer;
        }
    }
    Pending pending(*this, MessageType::offer_channel, 0, index);
    pending.instance = instance;
    CO_CHECK(co_await answer(pending, bound, "VMBus: the host does not offer a sub-channel"));
    co_return pending.offer;
}

} // namespace fl::hv::hyperv
