module;
#include "core/thread_annotations.hpp"
module core.dma;
import core.std;
import core.log;
import core.spinlock;
import core.vector;

namespace fl {

namespace {
struct Held {
    DmaSpan span;
    const void* holder = nullptr;
    u64 id = 0;
};
struct Orphan {
    DmaAllocator* from = nullptr;
    DmaSpan span;
};
struct Quarantine {
    SpinLock lock;
    Vector<Held> held GUARDED_BY(lock);
    Vector<Orphan> orphans GUARDED_BY(lock);
    bool frozen GUARDED_BY(lock) = false;

    bool holds(DmaSpan span) const REQUIRES(lock) {
        return frozen || std::ranges::any_of(held, [&](const Held& h) {
                   return span.bus < h.span.bus + h.span.size && h.span.bus < span.bus + span.size;
               });
    }
    void freeze() REQUIRES(lock) {
        if (!std::exchange(frozen, true)) {
            log::error("no memory to record what devices may still access: DMA memory is no longer freed");
        }
    }
};
constinit Quarantine state{};
// Relaxed: the processor that quarantines also frees the buffer, or the end of the request orders the two.
constinit std::atomic<bool> any{false};

template <class F>
void release_if(F&& matches) {
    if (!any.load(std::memory_order_relaxed)) {
        return;
    }
    for (;;) {
        Orphan free{};
        {
            const Locked locked(state.lock);
            for (usize i = 0; i < state.held.size();) {
                if (matches(state.held[i])) {
                    state.held.remove(i);
                } else {
                    ++i;
                }
            }
            for (usize i = 0; i < state.orphans.size(); ++i) {
                if (!state.holds(state.orphans[i].span)) {
                    free = state.orphans[i];
                    state.orphans.remove(i);
                    break;
                }
            }
        }
        if (free.from == nullptr) {
            return;
        }
        free.from->free(free.span); // without holding the lock: the allocator has its own
    }
}
} // namespace

void quarantine(DmaSpan span, const void* holder, u64 id) {
    if (span.empty()) {
        return;
    }
    const Locked locked(state.lock);
    if (!state.held.push({span, holder, id})) {
        state.freeze();
    }
    any.store(true, std::memory_order_relaxed);
}

void release_quarantine(const void* holder, u64 id) {
    release_if([&](const Held& h) { return h.holder == holder && h.id == id; });
}

void release_quarantine(const void* holder) {
    release_if([&](const Held& h) { return h.holder == holder; });
}

void keep_quarantine(const void* holder) {
    if (!any.load(std::memory_order_relaxed)) [[likely]] {
        return;
    }
    const Locked locked(state.lock);
    for (Held& held : state.held) {
        held.holder = held.holder == holder ? nullptr : held.holder;
    }
}

bool is_quarantined(DmaSpan span) {
    if (!any.load(std::memory_order_relaxed)) [[likely]] {
        return false;
    }
    const Locked locked(state.lock);
    return state.holds(span);
}

bool keep_quarantined(DmaAllocator& from, DmaSpan span) {
    if (!any.load(std::memory_order_relaxed)) [[likely]] {
        return false;
    }
    const Locked locked(state.lock);
    if (!state.holds(span)) {
        return false;
    }
    if (!state.orphans.push({&from, span})) {
        state.freeze();
    }
    return true;
}

QuarantineState quarantine_state() {
    const Locked locked(state.lock);
    return {state.held.size(), state.orphans.size(), state.frozen};
}

void clear_quarantine() {
    const Locked locked(state.lock);
    state.held.clear();
    state.orphans.clear();
    state.frozen = false;
    any.store(false, std::memory_order_relaxed);
}

} // namespace fl
