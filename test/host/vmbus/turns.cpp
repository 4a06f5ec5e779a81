// Server turns: take arrivals out of the inbox, serve channels until nothing is left, run timed work.
module host.state;
import host.std;
import host.channel;
import host.messages;
import host.vmbus;

namespace fl::host {
namespace {
constexpr u32 turns_at_once = 16; // of one channel before others are served
// interrupts of an event storm per poll: more would be merged into one before the guest runs
constexpr u32 storm_at_once = 4;
constexpr u64 polling_interval = 50000; // ns; for guests that do not promise to signal, and for monitor pages
} // namespace

bool ServerState::serve(Offer& offer) {
    for (u32 turn = 0; turn < turns_at_once; ++turn) {
        if (!offer.owner->device->serve(*offer.channel)) {
            break;
        }
        offer.kicked = offer.kicked || turn + 1 == turns_at_once;
    }
    if (offer.timed) {
        offer.due = 0;
    }
    return true;
}

bool ServerState::signalled(u32 relid) {
    Offer* offer = relid < relids ? by_relid_[relid] : nullptr;
    if (offer != nullptr && offer->channel) {
        return serve(*offer);
    }
    if (offer == nullptr || !offer->rescinded) { // a guest may not have seen the rescind yet
        judge_.violation("a signal for channel %u, which is not open", relid);
    }
    return false;
}

bool ServerState::take_messages() {
    std::vector<Posted> messages;
    while (lock_.test_and_set(std::memory_order_acquire)) { // the other side holds it only for a copy
    }
    messages.swap(posted_);
    lock_.clear(std::memory_order_release); // pairs with the test_and_set() in Server::on_message()
    for (const Posted& posted : messages) {
        handle(posted);
    }
    return !messages.empty();
}

bool ServerState::take_signals() {
    if (signalled_words_.load(std::memory_order_relaxed) == 0) {
        return false;
    }
    // Acquire: reads the word's bit before the word. Pairs with the release in Server::on_signal(), which sets the
    // relid's bit first.
    u32 words = signalled_words_.exchange(0, std::memory_order_acquire);
    bool any = false;
    for (; words != 0; words &= words - 1) {
        const u32 word = static_cast<u32>(std::countr_zero(words));
        // Acquire: orders the guest's ring index before its signal, since on_signal() ran after the hypercall.
        for (u64 bits = signalled_[word].exchange(0, std::memory_order_acquire); bits != 0; bits &= bits - 1) {
            any = signalled(word * 64 + static_cast<u32>(std::countr_zero(bits))) || any;
        }
    }
    return any;
}

bool ServerState::take_shared_bits(u64 page, usize offset, usize stride, usize words) {
    const auto bytes = memory_.at(page, 4096);
    bool any = false;
    for (usize i = 0; i < words && !bytes.empty(); ++i) {
        std::atomic_ref<u32> word(*reinterpret_cast<u32*>(bytes.data() + offset + i * stride));
        if (word.load(std::memory_order_relaxed) == 0) {
            continue;
        }
        // Acquire: orders the guest's ring index before its bit. Pairs with the guest's locked bit operation.
        for (u32 bits = word.exchange(0, std::memory_order_acquire); bits != 0; bits &= bits - 1) {
            any = signalled(static_cast<u32>(i) * 32 + static_cast<u32>(std::countr_zero(bits))) || any;
        }
    }
    return any;
}

bool ServerState::poll(u64 now) {
    now_ = now;
    bool any = take_messages();
    any = take_signals() || any;
    if (shared_signal_.load(std::memory_order_relaxed) && shared_signal_.exchange(false, std::memory_order_acquire)) {
        // the second half is guest to host [vmbus]
        any = take_shared_bits(interrupt_page_, 2048, 4, relids / 32) || any;
    }
    if (monitor_page_ != 0) {
        // trigger groups: { u32 pending, u32 armed } [vmbus "hv_monitor_page"]
        any = take_shared_bits(monitor_page_, 8, 8, 4) || any;
    }
    for (auto& [relid, offer] : offers_) {
        if (!offer.channel) {
            continue;
        }
        if (std::exchange(offer.kicked, false) || offer.channel->must_poll()) {
            any = serve(offer) || any;
        }
        if (now >= offer.due) {
            offer.due = offer.timed ? offer.owner->device->tick(*offer.channel, now) : ~u64{0};
        }
        for (u32 burst = 0; burst < storm_at_once && offer.channel->storm != 0; ++burst) {
            const u64 before = counters_.interrupts_out;
            interrupt(*offer.channel, false);
            if (counters_.interrupts_out == before) {
                break; // the guest has not taken the last one yet and would not see this one
            }
            --offer.channel->storm;
        }
    }
    sweep();
    freed_.store(false, std::memory_order_relaxed);
    if (!queue_.empty()) {
        flush();
    }
    return any;
}

u64 ServerState::deadline() const {
    u64 earliest = ~u64{0};
    for (const auto& [relid, offer] : offers_) {
        if (!offer.channel) {
            continue;
        }
        earliest = std::min(earliest, offer.kicked || offer.channel->storm != 0 ? now_ : offer.due);
        if (monitor_page_ != 0 || offer.channel->must_poll()) {
            earliest = std::min(earliest, now_ + polling_interval);
        }
    }
    return earliest;
}

} // namespace fl::host
