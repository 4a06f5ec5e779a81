// GPADLs: lists of guest pages, each checked to be memory.
module host.state;
import host.std;
import core.result;
import host.channel;
import host.messages;
import host.vmbus;

namespace fl::host {

void ServerState::gpadl_header(InMessage& message) {
    const u32 relid = message.take<u32>();
    const u32 id = message.take<u32>();
    const u32 bytes = message.take<u16>();
    const u32 ranges = message.take<u16>();
    const u32 range_bytes = message.take<u32>();
    const u32 range_offset = message.take<u32>();
    Offer* offer = known(relid, "GPADL_HEADER");
    if (offer == nullptr) {
        return;
    }
    const char* wrong = nullptr;
    if (message.too_short()) {
        wrong = "is too short";
    } else if (id == 0 || gpadls_.contains(id)) {
        wrong = "has a handle that is 0 or in use";
    } else if (ranges != 1 || range_offset != 0 || range_bytes == 0 || range_bytes % 4096 != 0) {
        wrong = "is not one range of whole pages";
    } else if (bytes != 8 + range_bytes / 4096 * 8) {
        wrong = "has a buffer length that does not fit its range";
    }
    if (wrong != nullptr) {
        judge_.violation(
            "GPADL_HEADER for handle 0x%x of channel %u %s (%u bytes, %u ranges, first %u bytes at offset %u)", id,
            relid, wrong, bytes, ranges, range_bytes, range_offset);
        send(OutMessage(MessageType::gpadl_created).add(relid).add(id).add(status_unsuccessful));
        return;
    }
    Gpadl& gpadl = gpadls_[id];
    gpadl.relid = relid;
    gpadl.expected = range_bytes / 4096;
    gpadl.pages.reserve(gpadl.expected);
    gpadl_pages(id, gpadl, message);
}

void ServerState::gpadl_body(InMessage& message) {
    message.skip(4); // the message number, which guests set arbitrarily
    const u32 id = message.take<u32>();
    const auto found = gpadls_.find(id);
    if (found == gpadls_.end() || found->second.complete()) {
        judge_.violation("GPADL_BODY for handle 0x%x, which waits for no pages", id);
        return;
    }
    gpadl_pages(id, found->second, message);
}

void ServerState::gpadl_pages(u32 id, Gpadl& gpadl, InMessage& message) {
    const u32 relid = gpadl.relid;
    bool good = true;
    while (good && !gpadl.complete() && message.left() >= 8) {
        const u64 frame = message.take<u64>();
        std::byte* page = memory_.page(frame);
        if (page == nullptr) {
            judge_.violation("GPADL 0x%x of channel %u: frame 0x%llx is not memory", id, relid,
                             static_cast<unsigned long long>(frame));
            good = false;
        }
        gpadl.pages.push_back(page);
    }
    if (good && message.left() >= 8) {
        judge_.violation("GPADL 0x%x of channel %u: a message has %zu bytes after the last page", id, relid,
                         message.left());
    }
    if (good && !gpadl.complete()) {
        return;
    }
    if (good && faults_.injects(Fault::refuse_gpadl)) {
        good = false;
    }
    if (!good) {
        gpadls_.erase(id);
    } else if (faults_.injects(Fault::no_gpadl_created)) {
        return;
    }
    send(OutMessage(MessageType::gpadl_created).add(relid).add(id).add(good ? status_success : status_unsuccessful));
}

void ServerState::gpadl_teardown(InMessage& message) {
    const u32 relid = message.take<u32>();
    const u32 id = message.take<u32>();
    const auto found = gpadls_.find(id);
    if (found == gpadls_.end() || found->second.relid != relid) {
        judge_.violation("GPADL_TEARDOWN for handle 0x%x of channel %u, which does not exist", id, relid);
        return;
    }
    if (Offer* offer = by_relid_[relid]; offer != nullptr && offer->channel && offer->ring_gpadl == id) {
        judge_.violation("GPADL_TEARDOWN for the rings of channel %u while it is open", relid);
        close_channel(*offer);
    }
    gpadls_.erase(found);
    send(OutMessage(MessageType::gpadl_torndown).add(id));
}

} // namespace fl::host
