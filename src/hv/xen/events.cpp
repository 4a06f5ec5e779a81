module hv.xen.events;
import core.std;
import core.result;
import core.interrupt;
import hv.xen.hypercall;

namespace fl::hv::xen {

void Events::install(Hypercalls& hypercalls, SharedInfo& shared, u32 vcpu) {
    hypercalls_ = &hypercalls;
    shared_ = &shared;
    vcpu_ = &shared.vcpu[vcpu];
    for (u64& word : shared.mask) {
        std::atomic_ref<u64>(word).store(~u64{0}, std::memory_order_relaxed); // no ports are in use yet
    }
}

void Events::restart() {
    slots_ = {};
    open_ = {};
    open_count_ = 0;
    for (u64& word : shared_->mask) {
        std::atomic_ref<u64>(word).store(~u64{0}, std::memory_order_relaxed);
    }
}

Result<Port> Events::allocate_unbound(Domain remote) {
    EventAllocUnbound argument{domain_self, remote, Port::none};
    const i64 answer = hypercalls_->call(Hypercall::event_channel_op, EventOp::alloc_unbound, argument);
    if (answer < 0) {
        return Error{Code::exhausted, "Xen gives no event channel (errno)", 0, static_cast<u64>(-answer)};
    }
    note_open(argument.port);
    return argument.port;
}

Result<Port> Events::bind_interdomain(Domain remote, Port remote_port) {
    EventBindInterdomain argument{remote, 0, remote_port, Port::none};
    const i64 answer = hypercalls_->call(Hypercall::event_channel_op, EventOp::bind_interdomain, argument);
    if (answer < 0) {
        return Error{Code::not_found, "Xen does not connect the event channel (errno)", 0, static_cast<u64>(-answer)};
    }
    note_open(argument.local_port);
    return argument.local_port;
}

// Ports beyond the capacity are open and cannot be bound; they are not counted.
void Events::note_open(Port port) {
    if (const u32 n = number(port); n < capacity && (open_[n / 64] >> n % 64 & 1) == 0) {
        open_[n / 64] |= u64{1} << n % 64;
        ++open_count_;
    }
}

Result<void> Events::bind(Port port, InterruptHandler handler, void* context) {
    const u32 n = number(port);
    if (n == 0 || n >= capacity) {
        return Error{Code::exhausted, "an event channel's port is beyond what this kernel has room for", capacity - 1,
                     n};
    }
    if (slots_[n].handler != nullptr) {
        return Error{Code::busy, "the event channel has a handler already", 0, n};
    }
    mask(port);
    slots_[n] = {handler, context};
    note_open(port);
    return {};
}

void Events::unbind(Port port) {
    const u32 n = number(port);
    if (n == 0 || n >= event_channels) {
        return;
    }
    if (n < capacity) {
        if ((open_[n / 64] >> n % 64 & 1) == 0) {
            return; // not ours: perhaps another one's by now
        }
        open_[n / 64] &= ~(u64{1} << n % 64);
        --open_count_;
        slots_[n] = {};
    }
    mask(port);
    EventPort argument{port};
    // fails harmlessly if the port is not open
    static_cast<void>(hypercalls_->call(Hypercall::event_channel_op, EventOp::close, argument));
    // clear it for the port's next user
    std::atomic_ref<u64>(shared_->pending[n / 64]).fetch_and(~(u64{1} << n % 64), std::memory_order_relaxed);
}

Result<void> Events::send(Port port) {
    EventPort argument{port};
    const i64 answer = hypercalls_->call(Hypercall::event_channel_op, EventOp::send, argument);
    if (answer < 0) [[unlikely]] {
        return Error{Code::device_gone, "Xen does not send the event (errno)", 0, static_cast<u64>(-answer)};
    }
    return {};
}

void Events::scan() {
    ++upcalls_;
    for (u32 pass = 0; pass < max_passes; ++pass) {
        // Sequentially consistent exchanges (plain ones on this processor): see the table in the interface.
        // upcall_pending is cleared before the selector, the selector before the words.
        std::atomic_ref<u8>(vcpu_->upcall_pending).exchange(0, std::memory_order_seq_cst);
        u64 selector = std::atomic_ref<u64>(vcpu_->pending_selector).exchange(0, std::memory_order_seq_cst);
        if (selector == 0) {
            return;
        }
        for (; selector != 0; selector &= selector - 1) {
            const u32 word = static_cast<u32>(std::countr_zero(selector));
            // written by this guest only
            const u64 masked = std::atomic_ref<u64>(shared_->mask[word]).load(std::memory_order_relaxed);
            std::atomic_ref<u64> pending(shared_->pending[word]);
            // Acquire: makes the senders' writes before their notification visible to what the handlers wake. Pairs
            // with Xen's set, after the sender's hypercall.
            u64 raised = pending.load(std::memory_order_acquire) & ~masked;
            pending.fetch_and(~raised, std::memory_order_acquire);
            for (; raised != 0; raised &= raised - 1) {
                const u32 n = word * 64 + static_cast<u32>(std::countr_zero(raised));
                if (n < capacity && slots_[n].handler != nullptr) [[likely]] {
                    slots_[n].handler(slots_[n].context);
                } else {
                    ++unexpected_;
                    mask(static_cast<Port>(n));
                }
            }
        }
    }
}

i64 Events::poll(std::span<const u32> ports, u64 timeout_ns) {
    SchedPoll argument{ports.data(), static_cast<u32>(ports.size()), 0, timeout_ns};
    return hypercalls_->call(Hypercall::sched_op, SchedOp::poll, argument);
}

} // namespace fl::hv::xen
