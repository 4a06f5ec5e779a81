module hv.xen.events;
import core.std;
import core.result;
import core.interrupt;
import core.processor;
import core.spinlock;
import hv.xen.hypercall;

namespace fl::hv::xen {

void Events::install(Hypercalls& hypercalls, SharedInfo& shared) {
    hypercalls_ = &hypercalls;
    shared_ = &shared;
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
    for (auto& word : bound_) {
        word.store(0, std::memory_order_relaxed);
    }
    for (Cpu& cpu : cpus_) {
        for (auto& word : cpu.mine) {
            word.store(0, std::memory_order_relaxed);
        }
        if (cpu.info.load(std::memory_order_relaxed) != nullptr) {
            cpu.info.store(cpu.vcpu < vcpus_in_shared_info ? &shared_->vcpu[cpu.vcpu] : nullptr,
                           std::memory_order_release);
        }
    }
}

Result<void> Events::join(u32 processor, u32 vcpu, VcpuInfo& own, u64 frame, u32 offset) {
    Cpu& cpu = cpus_[processor];
    cpu.vcpu = vcpu;
    // Before the hypercall, which marks everything as pending in the new place: the upcall may come at once.
    cpu.info.store(&own, std::memory_order_release);
    auto moved = hypercalls_->register_vcpu_info(vcpu, frame, offset);
    if (moved) {
        return {};
    }
    if (vcpu >= vcpus_in_shared_info) {
        cpu.info.store(nullptr, std::memory_order_relaxed);
        return moved;
    }
    cpu.info.store(&shared_->vcpu[vcpu], std::memory_order_release);
    return {};
}

void Events::leave(u32 processor) {
    if (!installed()) {
        return;
    }
    for (u32 word = 0; word < bound_words; ++word) {
        const u64 mine = cpus_[processor].mine[word].load(std::memory_order_relaxed);
        std::atomic_ref<u64>(shared_->mask[word]).fetch_or(mine, std::memory_order_relaxed);
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

Result<u32> Events::bind(Port port, InterruptHandler handler, void* context, u32 processor) {
    const u32 n = number(port);
    if (n == 0 || n >= capacity) {
        return Error{Code::exhausted, "an event channel's port is beyond what this kernel has room for", capacity - 1,
                     n};
    }
    if (slots_[n].handler != nullptr) {
        return Error{Code::busy, "the event channel has a handler already", 0, n};
    }
    mask(port);
    const auto move = [&](u32 vcpu) {
        EventBindVcpu argument{port, vcpu};
        return hypercalls_->call(Hypercall::event_channel_op, EventOp::bind_vcpu, argument) >= 0;
    };
    // A new port is virtual CPU 0's, which need not be processor 0.
    if (processor != 0 && (!joined(processor) || !move(cpus_[processor].vcpu))) {
        processor = 0;
    }
    if (processor == 0 && cpus_[0].vcpu != 0) {
        static_cast<void>(move(cpus_[0].vcpu));
    }
    set_slot(port, {handler, context, processor});
    return processor;
}

void Events::set_slot(Port port, const Slot& slot) {
    const u32 n = number(port);
    const u64 bit = u64{1} << n % 64;
    slots_[n] = slot;
    note_open(port);
    bound_[n / 64].fetch_or(bit, std::memory_order_release);
    // pairs with the acquire in scan_words()
    cpus_[slot.processor].mine[n / 64].fetch_or(bit, std::memory_order_release);
}

Result<Port> Events::open_ipi(u32 processor, InterruptHandler handler, void* context) {
    EventBindIpi argument{cpus_[processor].vcpu, Port::none};
    const i64 answer = hypercalls_->call(Hypercall::event_channel_op, EventOp::bind_ipi, argument);
    if (answer < 0) {
        return Error{Code::exhausted, "Xen gives no event channel to another processor (errno)", 0,
                     static_cast<u64>(-answer)};
    }
    note_open(argument.port);
    if (number(argument.port) >= capacity) {
        unbind(argument.port);
        return Error{Code::exhausted, "an event channel's port is beyond what this kernel has room for", capacity - 1,
                     number(argument.port)};
    }
    mask(argument.port);
    set_slot(argument.port, {handler, context, processor});
    static_cast<void>(unmask(argument.port)); // nothing was sent yet
    return argument.port;
}

// A handler that runs now ends: each takes a few instructions, with interrupts off.
void Events::await_scans() const {
    for (u32 i = 0; i < max_processors; ++i) {
        const u64 before = cpus_[i].scans.load(std::memory_order_seq_cst);
        while (before % 2 != 0 && i != this_processor() &&
               cpus_[i].scans.load(std::memory_order_acquire) == before) { // pairs with the release in scan()
            spin_pause();
        }
    }
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
    }
    mask(port);
    const u64 bit = u64{1} << n % 64;
    if (n < capacity && slots_[n].handler != nullptr) {
        cpus_[slots_[n].processor].mine[n / 64].fetch_and(~bit, std::memory_order_seq_cst); // see the table
        await_scans();
        bound_[n / 64].fetch_and(~bit, std::memory_order_relaxed);
        slots_[n] = {};
    }
    EventPort argument{port};
    // fails harmlessly if the port is not open
    static_cast<void>(hypercalls_->call(Hypercall::event_channel_op, EventOp::close, argument));
    // clear it for the port's next user
    std::atomic_ref<u64>(shared_->pending[n / 64]).fetch_and(~bit, std::memory_order_relaxed);
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
    Cpu& cpu = cpus_[this_processor()];
    VcpuInfo* const info = cpu.info.load(std::memory_order_relaxed); // written by this processor
    if (info == nullptr) [[unlikely]] {
        return;
    }
    cpu.scans.fetch_add(1, std::memory_order_seq_cst); // see the table in the interface
    scan_words(cpu, *info);
    cpu.scans.fetch_add(1, std::memory_order_release); // pairs with the acquire in await_scans()
}

void Events::scan_words(Cpu& cpu, VcpuInfo& info) {
    for (u32 pass = 0; pass < max_passes; ++pass) {
        // Sequentially consistent exchanges (plain ones on this processor): see the table in the interface.
        // upcall_pending is cleared before the selector, the selector before the words.
        std::atomic_ref<u8>(info.upcall_pending).exchange(0, std::memory_order_seq_cst);
        u64 selector = std::atomic_ref<u64>(info.pending_selector).exchange(0, std::memory_order_seq_cst);
        if (selector == 0) {
            return;
        }
        for (; selector != 0; selector &= selector - 1) {
            const u32 word = static_cast<u32>(std::countr_zero(selector));
            // written by this guest only
            const u64 masked = std::atomic_ref<u64>(shared_->mask[word]).load(std::memory_order_relaxed);
            std::atomic_ref<u64> pending(shared_->pending[word]);
            u64 raised = pending.load(std::memory_order_relaxed) & ~masked;
            const u64 mine = word < bound_words ? cpu.mine[word].load(std::memory_order_seq_cst) : 0;
            if (u64 others = raised & ~mine; others != 0) [[unlikely]] {
                raised &= mine;
                others &= word < bound_words ? ~bound_[word].load(std::memory_order_acquire) : ~u64{0};
                pending.fetch_and(~others, std::memory_order_relaxed);
                for (; others != 0; others &= others - 1) {
                    unexpected_.fetch_add(1, std::memory_order_relaxed);
                    mask(static_cast<Port>(word * 64 + static_cast<u32>(std::countr_zero(others))));
                }
            }
            // Acquire: makes the senders' writes before their notification visible to what the handlers wake. Pairs
            // with Xen's set, after the sender's hypercall. What unmask() has consumed meanwhile is left out.
            raised &= pending.fetch_and(~raised, std::memory_order_acquire);
            for (; raised != 0; raised &= raised - 1) {
                const Slot& slot = slots_[word * 64 + static_cast<u32>(std::countr_zero(raised))];
                slot.handler(slot.context);
            }
        }
    }
}

i64 Events::poll(std::span<const u32> ports, u64 timeout_ns) {
    SchedPoll argument{ports.data(), static_cast<u32>(ports.size()), 0, timeout_ns};
    return hypercalls_->call(Hypercall::sched_op, SchedOp::poll, argument);
}

} // namespace fl::hv::xen
