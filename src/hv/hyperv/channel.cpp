module hv.hyperv.channel;
import core.std;
import core.result;
import core.dma;
import core.log;
import io.executor;
import io.ring;
import hv.hyperv.hypercall;

namespace fl::hv::hyperv {

// Called once per channel: optimise for size.
[[clang::minsize]] Result<void> Channel::attach(const Offer& offer, u32 cpu, DmaBuffer rings, u32 send_bytes,
                                                const Signalling& signalling, const std::atomic<u32>& events,
                                                io::Listener* listener) {
    io::MappedMemory out(rings.data(), send_bytes);
    io::MappedMemory in(rings.data() + send_bytes, rings.size() - send_bytes);
    initialise_ring(out);
    initialise_ring(in);
    auto sender = PacketSender<io::MappedMemory>::create(out);
    if (!sender) {
        return sender.error();
    }
    auto receiver = PacketReceiver<io::MappedMemory>::create(in, buffer_);
    if (!receiver) {
        return receiver.error();
    }
    sender_.emplace(*sender);
    receiver_.emplace(*receiver);
    signalling_ = signalling;
    offer_ = offer;
    cpu_ = cpu;
    events_ = &events;
    listener_ = listener;
    first_event_ = events.load(std::memory_order_relaxed);
    rescinded_.store(false, std::memory_order_relaxed); // no other processor knows the channel yet
    rings_ = std::move(rings);
    return {};
}

DmaBuffer Channel::detach() {
    sender_.reset();
    receiver_.reset();
    events_ = nullptr;
    stop_listening(); // the listener has been stopped, or is about to be
    listener_ = nullptr;
    return std::move(rings_);
}

bool Channel::publish() {
    if (!sender_->unpublished()) {
        return false;
    }
    ++counters_.publications;
    if (!sender_->publish()) {
        return false;
    }
    signal();
    return true;
}

void Channel::signal() {
    // Orders the packets and the index before the bits that announce them: a locked instruction is a full barrier.
    if (signalling_.interrupt_word != nullptr) {
        std::atomic_ref<u64>(*signalling_.interrupt_word)
            .fetch_or(signalling_.interrupt_bit, std::memory_order_seq_cst);
    }
    if (signalling_.monitor_word != nullptr) {
        std::atomic_ref<u32>(*signalling_.monitor_word).fetch_or(signalling_.monitor_bit, std::memory_order_seq_cst);
        ++counters_.deferred;
        return;
    }
    ++counters_.signals;
    const Status status = signalling_.hypercalls->signal_event(signalling_.connection);
    if (status == Status::success) [[likely]] {
        return;
    }
    // Usually the host has just rescinded the channel and the message is on its way. If the call is forbidden, log that
    // once: requests will go unanswered.
    const bool forbidden = status == Status::access_denied || status == Status::operation_denied ||
                           status == Status::invalid_hypercall_code;
    if (counters_.refused++ == 0 && forbidden) {
        log::warning("VMBus: channel {}: the hypervisor does not let this guest signal events (status {}): its "
                     "requests may time out",
                     offer_.relid, to_underlying(status));
    }
}

Inbox::Inbox(Channel& channel, io::Executor& executor)
    : channel_(channel), executor_(executor), latch_(executor), seen_(channel.interrupts()) {
    latch_.open(); // packets may have arrived before
    executor_.add(*this);
    channel_.listen(executor_, *this);
}

Inbox::~Inbox() {
    channel_.stop_listening();
    executor_.remove(*this);
}

bool Inbox::drain() {
    const u32 events = channel_.interrupts();
    const bool ended = !reported_ && (channel_.rescinded() || channel_.broken());
    if (events == seen_ && !ended) {
        return false;
    }
    seen_ = events;
    reported_ = reported_ || ended;
    latch_.open();
    return true;
}

bool Inbox::arm() {
    if (!latch_.awaited() || !channel_.is_open()) {
        return false;
    }
    auto found = channel_.arm();
    if (found && !*found) {
        return false;
    }
    if (!found && std::exchange(reported_, true)) {
        return false; // broken, and already reported
    }
    latch_.open();
    return true;
}

} // namespace fl::hv::hyperv
