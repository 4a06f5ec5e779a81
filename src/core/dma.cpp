module core.dma;
import core.std;
import core.spinlock;

namespace fl {

namespace {
struct Condemned {
    static constexpr usize capacity = 64;
    std::array<DmaSpan, capacity> spans{};
    usize count = 0;
    bool everything = false;
    SpinLock lock;
};
constinit Condemned condemned{};
// Relaxed: whoever condemns and whoever gives back is the same processor, or was ordered behind it by the end of the
// request.
constinit std::atomic<bool> any{false};
} // namespace

void condemn(DmaSpan span) {
    if (span.empty()) {
        return;
    }
    const Locked locked(condemned.lock);
    if (condemned.count == Condemned::capacity) {
        condemned.everything = true;
    } else {
        condemned.spans[condemned.count++] = span;
    }
    any.store(true, std::memory_order_relaxed);
}

bool is_condemned(DmaSpan span) {
    if (!any.load(std::memory_order_relaxed)) [[likely]] {
        return false;
    }
    const Locked locked(condemned.lock);
    return condemned.everything ||
           std::ranges::any_of(std::span(condemned.spans).first(condemned.count), [&](const DmaSpan& bad) {
               return span.bus < bad.bus + bad.size && bad.bus < span.bus + span.size;
           });
}

void pardon_all() {
    const Locked locked(condemned.lock);
    condemned.count = 0;
    condemned.everything = false;
    any.store(false, std::memory_order_relaxed);
}

} // namespace fl
