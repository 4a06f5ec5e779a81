// Messages: requests from the guest, and the replies.
module host.state;
import host.std;
import core.result;
import host.channel;
import host.messages;
import host.vmbus;

namespace fl::host {
namespace {

constexpr u32 connection_of(u32 relid) { return u32{vmbus_sint} << 12 | relid; }
constexpr u32 no_processor = ~u32{0}; // OPEN and MODIFY: no interrupts
constexpr usize queue_limit = 4096;

constexpr std::array known_versions{version(0, 13), version(1, 1), version(2, 4), version(3, 0), version(4, 0),
                                    version(4, 1),  version(5, 0), version(5, 1), version(5, 2), version(5, 3)};

} // namespace

ServerState::ServerState(GuestMemory& memory, Delivery& delivery, Log& log, const ServerConfig& config)
    : memory_(memory), delivery_(delivery), config_(config), judge_(log, counters_), faults_(config.fault) {
    if (config.fault.fault == Fault::refuse_new_versions) {
        config_.maximum_version = std::min(config_.maximum_version, version(3, 0));
    }
}

// ---- outgoing messages ----

void ServerState::send(OutMessage message) {
    if (faults_.injects(Fault::unknown_message)) {
        queue_.push_back(OutMessage(static_cast<MessageType>(99)));
    }
    if (faults_.injects(Fault::short_message)) {
        message.truncate(message.bytes().size() / 2);
    }
    if (queue_.size() >= queue_limit) {
        judge_.note("a message to the guest is dropped: it has not taken %zu others", queue_.size());
        return;
    }
    queue_.push_back(message);
}

void ServerState::flush() {
    while (!queue_.empty()) {
        switch (delivery_.post(target_vp_, vmbus_sint, hv_message_vmbus, queue_.front().bytes())) {
        case Delivery::Message::delivered:
            ++counters_.messages_out;
            counters_.messages_waited += std::exchange(slot_busy_, false);
            queue_.pop_front();
            break;
        case Delivery::Message::busy: slot_busy_ = true; return;
        case Delivery::Message::refused:
            judge_.violation("SINT2 or the message page of processor %u is not enabled; %zu messages are lost",
                             target_vp_, queue_.size());
            queue_.clear();
            slot_busy_ = false;
            return;
        }
    }
}

void ServerState::interrupt(Channel& channel, bool always) {
    if (channel.target_vp() == no_processor) {
        return;
    }
    u16 flag = static_cast<u16>(channel.relid());
    u32 vp = channel.target_vp();
    if (version_ < version(2, 4)) { // a bit in the shared page, and one event for all channels
        const auto page = memory_.at(interrupt_page_, 4096);
        if (page.empty()) {
            return;
        }
        // Release: orders the ring's index before the bit. Pairs with the guest's atomic clear of the bit, after which
        // it reads the ring.
        std::atomic_ref<u32>(*reinterpret_cast<u32*>(page.data() + channel.relid() / 32 * 4))
            .fetch_or(u32{1} << channel.relid() % 32, std::memory_order_release);
        flag = 0;
        vp = 0;
    }
    switch (delivery_.set_event(vp, vmbus_sint, flag, always)) {
    case Delivery::Event::raised: ++counters_.interrupts_out; [[fallthrough]];
    case Delivery::Event::pending: ++counters_.events_out; break;
    case Delivery::Event::refused:
        judge_.violation("channel %u: SINT2 or the event page of processor %u is not enabled", channel.relid(), vp);
        break;
    }
}

// ---- offers ----

Offer* ServerState::new_offer(Attached& attached, u16 index) {
    for (u32 relid = 1; relid < relids; ++relid) {
        if (by_relid_[relid] == nullptr) {
            Offer& offer = offers_[relid];
            offer.owner = &attached;
            offer.relid = relid;
            offer.index = index;
            offer.timed = attached.device->timed();
            by_relid_[relid] = &offer;
            // Release: orders the offer's data before the bit. Pairs with the acquire in Server::on_signal().
            live_[relid / 64].fetch_or(u64{1} << relid % 64, std::memory_order_release);
            delivery_.connection(connection_of(relid), true);
            return &offer;
        }
    }
    return nullptr;
}

void ServerState::send_offer(const Offer& offer) {
    const auto write = [&](const Guid& instance) {
        const DeviceOffer& what = offer.owner->offer;
        OutMessage message(MessageType::offer_channel);
        message.add(std::span(what.type)).add(std::span(instance)).add(u64{0}).add(u64{0}).add(what.flags).add(u16{0});
        message.add(std::span(what.user)).add(offer.index).add(u16{0}).add(offer.relid);
        const bool monitored = config_.monitor_pages && monitor_page_ != 0 && offer.relid < 128;
        message.add(static_cast<u8>(monitored ? offer.relid : 0)).add(u8{monitored});
        const bool dedicated = version_ != version(0, 13);
        message.add(u16{dedicated}).add(dedicated ? connection_of(offer.relid) : event_connection);
        send(message);
    };
    write(offer.owner->offer.instance);
    if (faults_.injects(Fault::duplicate_relid)) {
        Guid other = offer.owner->offer.instance;
        other[15] ^= 0xff;
        write(other);
    }
}

void ServerState::offer_device(Attached& attached) {
    if (offers_requested_) {
        if (Offer* offer = new_offer(attached, 0)) {
            send_offer(*offer);
        }
    }
}

void ServerState::offer_sub_channels(Device& device, u16 count) {
    for (auto& attached : devices_) {
        if (attached->device.get() != &device) {
            continue;
        }
        for (u16 index = 1; index <= count; ++index) {
            const bool there = std::any_of(offers_.begin(), offers_.end(), [&](const auto& entry) {
                return entry.second.owner == attached.get() && entry.second.index == index && !entry.second.rescinded;
            });
            if (Offer* offer = there ? nullptr : new_offer(*attached, index)) {
                send_offer(*offer);
            }
        }
    }
}

void ServerState::rescind(Device& device) {
    for (auto& attached : devices_) {
        if (attached->device.get() == &device) {
            attached->leaving = true;
        }
    }
}

void ServerState::rescind_now(Attached& attached) {
    // Sub-channels first: their relids must be released before the primary channel's.
    for (auto entry = offers_.rbegin(); entry != offers_.rend(); ++entry) {
        Offer& offer = entry->second;
        if (offer.owner == &attached && !offer.rescinded) {
            close_channel(offer);
            offer.rescinded = true;
            send(OutMessage(MessageType::rescind_channel_offer).add(offer.relid));
        }
    }
}

void ServerState::kick(Device& device) {
    for (auto& [relid, offer] : offers_) {
        if (offer.owner->device.get() == &device) {
            offer.kicked = offer.kicked || offer.channel;
            offer.timed = device.timed(); // a disk that was added may need timed service
        }
    }
}

void ServerState::close_channel(Offer& offer) {
    if (offer.channel) {
        offer.owner->device->closed(*offer.channel);
        offer.channel.reset();
        offer.due = ~u64{0};
    }
}

void ServerState::forget(Offer& offer) {
    close_channel(offer);
    const u32 relid = offer.relid;
    live_[relid / 64].fetch_and(~(u64{1} << relid % 64), std::memory_order_relaxed);
    signalled_[relid / 64].fetch_and(~(u64{1} << relid % 64), std::memory_order_relaxed);
    delivery_.connection(connection_of(relid), false);
    std::erase_if(gpadls_, [&](const auto& entry) { return entry.second.relid == relid; });
    by_relid_[relid] = nullptr;
    offers_.erase(relid);
}

void ServerState::disconnect() {
    while (!offers_.empty()) {
        forget(std::prev(offers_.end())->second);
    }
    gpadls_.clear();
    queue_.clear();
    slot_busy_ = false;
    version_ = 0;
    offers_requested_ = false;
    interrupt_page_ = 0;
    monitor_page_ = 0;
}

void ServerState::sweep() {
    for (auto& attached : devices_) {
        if (attached->leaving) {
            rescind_now(*attached);
        }
    }
    std::erase_if(devices_, [&](const auto& attached) {
        return attached->leaving && std::none_of(offers_.begin(), offers_.end(), [&](const auto& entry) {
                   return entry.second.owner == attached.get();
               });
    });
}

// ---- incoming messages ----

Offer* ServerState::known(u32 relid, const char* what) {
    Offer* offer = relid < relids ? by_relid_[relid] : nullptr;
    if (offer == nullptr) {
        judge_.violation("%s names channel %u, which was not offered", what, relid);
    }
    return offer;
}

void ServerState::handle(const Posted& posted) {
    InMessage message = posted.message;
    const auto type = static_cast<MessageType>(message.take<u32>());
    message.skip(4);
    if (posted.type != hv_message_vmbus) {
        judge_.violation("a message on connection %u has SynIC type %u; expected %u", posted.connection, posted.type,
                         hv_message_vmbus);
        return;
    }
    if (config_.verbose) {
        judge_.note("from the guest: %s (%u), %zu bytes on connection %u", name(type), static_cast<u32>(type),
                    message.size(), posted.connection);
    }
    if (type == MessageType::initiate_contact) {
        contact(message, posted.connection);
        return;
    }
    if (version_ == 0) {
        judge_.violation("%s (%u) before INITIATE_CONTACT succeeded", name(type), static_cast<u32>(type));
        return;
    }
    const u32 expected = version_ >= version(5, 0) ? config_.message_connection : 1;
    if (posted.connection != expected) {
        judge_.violation("%s came on connection %u; the version response said %u", name(type), posted.connection,
                         expected);
    }
    switch (type) {
    case MessageType::request_offers: request_offers(); break;
    case MessageType::open_channel: open(message); break;
    case MessageType::close_channel: close(message); break;
    case MessageType::gpadl_header: gpadl_header(message); break;
    case MessageType::gpadl_body: gpadl_body(message); break;
    case MessageType::gpadl_teardown: gpadl_teardown(message); break;
    case MessageType::relid_released: relid_released(message); break;
    case MessageType::modify_channel: modify(message); break;
    case MessageType::unload: {
        for (const auto& [relid, offer] : offers_) {
            if (offer.channel) {
                judge_.note("UNLOAD while channel %u (%s) is open", relid, offer.owner->device->name().data());
            }
        }
        disconnect();
        unloaded_ = true;
        send(OutMessage(MessageType::unload_response));
        break;
    }
    default:
        judge_.violation("a message of type %u, which a guest does not send in this version", static_cast<u32>(type));
        return;
    }
    if (message.too_short()) {
        judge_.violation("%s has %zu bytes, less than it needs", name(type), message.size());
    }
}

void ServerState::contact(InMessage& message, u32 connection) {
    const u32 asked = message.take<u32>();
    const u32 vp = message.take<u32>();
    const u64 page_or_target = message.take<u64>();
    const u64 parent_to_child = message.take<u64>();
    const u64 child_to_parent = message.take<u64>();
    const u32 major = asked >> 16;
    const u32 minor = asked & 0xffff;
    if (message.too_short()) {
        judge_.violation("INITIATE_CONTACT has %zu bytes; expected 40", message.size());
        return;
    }
    disconnect(); // a second contact, from a crash kernel for example, starts afresh
    unloaded_ = false;
    target_vp_ = asked >= version(3, 0) ? vp : 0;
    if (target_vp_ >= config_.processors) {
        judge_.violation("INITIATE_CONTACT wants its messages on processor %u; there are %u", target_vp_,
                         config_.processors);
        target_vp_ = 0;
    }
    if (faults_.injects(Fault::no_version_response)) {
        return;
    }
    const u32 wanted_connection = asked >= version(5, 0) ? 4 : 1;
    if (connection != wanted_connection) {
        judge_.violation("INITIATE_CONTACT for version %u.%u came on connection %u; expected %u", major, minor,
                         connection, wanted_connection);
    }
    bool yes = asked <= config_.maximum_version &&
               std::find(known_versions.begin(), known_versions.end(), asked) != known_versions.end() &&
               std::find(config_.refused_versions.begin(), config_.refused_versions.end(), asked) ==
                   config_.refused_versions.end() &&
               faults_.fault() != Fault::refuse_versions;
    if (asked >= version(5, 0)) {
        const u32 sint = page_or_target & 0xff;
        const u32 vtl = page_or_target >> 8 & 0xff;
        if (sint != vmbus_sint || vtl != 0) {
            judge_.violation("INITIATE_CONTACT wants SINT %u and VTL %u; expected 2 and 0", sint, vtl);
            yes = false;
        }
    } else if (asked < version(2, 4) && memory_.at(page_or_target, 4096).empty()) {
        judge_.violation("INITIATE_CONTACT's interrupt page 0x%llx is not memory",
                         static_cast<unsigned long long>(page_or_target));
        yes = false;
    }
    const bool pages = parent_to_child != 0 && child_to_parent != 0;
    if ((parent_to_child != 0) != (child_to_parent != 0) ||
        (pages && (memory_.at(parent_to_child, 4096).empty() || memory_.at(child_to_parent, 4096).empty()))) {
        judge_.violation("INITIATE_CONTACT's monitor pages 0x%llx and 0x%llx are not two pages of memory",
                         static_cast<unsigned long long>(parent_to_child),
                         static_cast<unsigned long long>(child_to_parent));
        yes = false;
    }
    OutMessage response(MessageType::version_response);
    response.add(u8{yes}).add(u8{0}).add(u16{0});
    if (yes) {
        version_ = asked;
        interrupt_page_ = asked < version(2, 4) ? page_or_target : 0;
        monitor_page_ = config_.monitor_pages && pages ? child_to_parent : 0;
        response.add(asked >= version(5, 0) ? config_.message_connection : asked);
        judge_.note("version %u.%u, messages to processor %u", major, minor, target_vp_);
    } else {
        response.add(u32{0});
        judge_.note("version %u.%u is refused", major, minor);
    }
    send(response);
}

void ServerState::request_offers() {
    if (offers_requested_) {
        judge_.violation("REQUEST_OFFERS for the second time");
        return;
    }
    offers_requested_ = true;
    for (auto& attached : devices_) {
        if (!attached->leaving) {
            offer_device(*attached);
        }
    }
    send(OutMessage(MessageType::all_offers_delivered));
}

void ServerState::open(InMessage& message) {
    const u32 relid = message.take<u32>();
    const u32 open_id = message.take<u32>();
    const u32 gpadl_id = message.take<u32>();
    const u32 vp = message.take<u32>();
    const u32 downstream = message.take<u32>();
    message.skip(120);
    Offer* offer = known(relid, "OPEN_CHANNEL");
    if (offer == nullptr || offer->rescinded) { // a rescind that the guest has not seen yet serves as the reply
        return;
    }
    u32 status = status_unsuccessful;
    const auto gpadl = gpadls_.find(gpadl_id);
    if (message.too_short()) {
        // reported by the caller
    } else if (offer->channel) {
        judge_.violation("OPEN_CHANNEL for channel %u, which is open", relid);
    } else if (gpadl == gpadls_.end() || gpadl->second.relid != relid || !gpadl->second.complete()) {
        judge_.violation("OPEN_CHANNEL for channel %u names GPADL 0x%x, which is not a complete one of this channel",
                         relid, gpadl_id);
    } else if (vp >= config_.processors && vp != no_processor) {
        judge_.violation("OPEN_CHANNEL for channel %u wants its events on processor %u; there are %u", relid, vp,
                         config_.processors);
    } else if (faults_.injects(Fault::refuse_open)) {
        // injected fault
    } else if (faults_.injects(Fault::rescind_at_open)) {
        offer->owner->leaving = true;
        return;
    } else if (auto channel = Channel::create(*this, relid, version_ < version(2, 4) ? 0 : vp, offer->index,
                                              gpadl->second.pages, downstream);
               !channel) {
        judge_.violation("OPEN_CHANNEL for channel %u: %s (%llu, %llu)", relid,
                         std::string(channel.error().message).c_str(),
                         static_cast<unsigned long long>(channel.error().expected),
                         static_cast<unsigned long long>(channel.error().seen));
    } else {
        offer->channel.emplace(std::move(*channel));
        offer->ring_gpadl = gpadl_id;
        offer->due = 0;
        offer->kicked = true;
        offer->owner->device->opened(*offer->channel);
        status = status_success;
    }
    if (faults_.injects(Fault::no_open_result)) {
        return;
    }
    send(OutMessage(MessageType::open_channel_result).add(relid).add(open_id).add(status));
}

void ServerState::close(InMessage& message) {
    const u32 relid = message.take<u32>();
    Offer* offer = known(relid, "CLOSE_CHANNEL");
    if (offer == nullptr || offer->rescinded) {
        return;
    }
    if (!offer->channel) {
        judge_.violation("CLOSE_CHANNEL for channel %u, which is not open", relid);
        return;
    }
    close_channel(*offer);
    if (offer->index == 0) { // includes its sub-channels
        std::vector<u32> subs;
        for (auto& [other, sub] : offers_) {
            if (sub.owner == offer->owner && sub.index != 0 && !sub.rescinded) {
                close_channel(sub);
                sub.rescinded = true;
                subs.push_back(other);
            }
        }
        for (const u32 sub : subs) {
            send(OutMessage(MessageType::rescind_channel_offer).add(sub));
        }
    }
}

void ServerState::relid_released(InMessage& message) {
    const u32 relid = message.take<u32>();
    Offer* offer = known(relid, "RELID_RELEASED");
    if (offer == nullptr) {
        return;
    }
    if (!offer->rescinded) {
        judge_.violation("RELID_RELEASED for channel %u, which was not rescinded", relid);
        return;
    }
    forget(*offer);
}

void ServerState::modify(InMessage& message) {
    const u32 relid = message.take<u32>();
    const u32 vp = message.take<u32>();
    Offer* offer = known(relid, "MODIFY_CHANNEL");
    if (offer == nullptr || message.too_short()) {
        return;
    }
    u32 status = status_unsuccessful;
    if (version_ < version(4, 1)) {
        judge_.violation("MODIFY_CHANNEL exists from version 4.1 on");
        return;
    }
    if (!offer->channel) {
        if (!offer->rescinded) {
            judge_.violation("MODIFY_CHANNEL for channel %u, which is not open", relid);
        }
    } else if (vp >= config_.processors && vp != no_processor) {
        judge_.violation("MODIFY_CHANNEL for channel %u wants its events on processor %u; there are %u", relid, vp,
                         config_.processors);
    } else {
        offer->channel->retarget(vp);
        status = status_success;
        interrupt(*offer->channel, true); // one sent to the old processor may never have been seen there
    }
    if (version_ >= version(5, 3)) {
        send(OutMessage(MessageType::modify_channel_response).add(relid).add(status));
    }
}

} // namespace fl::host
