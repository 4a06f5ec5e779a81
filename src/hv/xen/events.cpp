module;
#include <cstddef>

#include "core/try.hpp"
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

Result<void> Events::restart() {
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
        if (cpu.own != nullptr) {
            VcpuInfo* const place = cpu.vcpu < vcpus_in_shared_info ? &shared_->vcpu[cpu.vcpu] : nullptr;
            cpu.info.store(place, std::memory_order_release);
            if (place == nullptr) {
                cpu.takes.store(false, std::memory_order_relaxed);
            }
        }
    }
    const std::span<u32> words = std::exchange(words_, {});
    if (words.empty() || init_control(cpus_[0]) < 0) { // the other host's Xen need not have FIFO event channels
        return {};
    }
    words_ = words;
    for (u32 i = 1; i < max_processors; ++i) {
        if (joined(i) && init_control(cpus_[i]) < 0) {
            withdraw(i);
        }
    }
    return start_fifo();
}

Result<void> Events::prepare(u32 vcpu, SharedWithVcpu& own, u64 frame, u32 offset) {
    CHECK(hypercalls_->register_vcpu_info(vcpu, frame, offset + offsetof(SharedWithVcpu, info)));
    // Xen marks everything as pending there. No port is bound to it yet, and nobody takes the upcall before join().
    std::atomic_ref<u64>(own.info.pending_selector).store(0, std::memory_order_relaxed);
    std::atomic_ref<u8>(own.info.upcall_pending).store(0, std::memory_order_relaxed);
    return {};
}

Result<void> Events::join(u32 processor, u32 vcpu, SharedWithVcpu& own, u64 frame, u32 offset, bool prepared) {
    Cpu& cpu = cpus_[processor];
    cpu.vcpu = vcpu;
    cpu.own = &own;
    cpu.frame = frame;
    cpu.offset = offset;
    // Before the hypercall, which marks everything as pending in the new place: the upcall may come at once.
    cpu.info.store(&own.info, std::memory_order_release);
    auto joined = prepared ? Result<void>{}
                           : hypercalls_->register_vcpu_info(vcpu, frame, offset + offsetof(SharedWithVcpu, info));
    if (!joined) {
        const bool has_place = vcpu < vcpus_in_shared_info;
        cpu.info.store(has_place ? &shared_->vcpu[vcpu] : nullptr, std::memory_order_release);
        joined = has_place ? Result<void>{} : joined;
    }
    if (joined && fifo()) {
        if (const i64 answer = init_control(cpu); answer < 0) {
            joined = Error{Code::not_supported, "Xen refuses a control block of FIFO event channels (errno)", 0,
                           static_cast<u64>(-answer)};
        }
    }
    cpu.takes.store(static_cast<bool>(joined), std::memory_order_release);
    return joined;
}

i64 Events::init_control(Cpu& cpu) {
    cpu.own->control = {};
    cpu.heads = {};
    EventInitControl argument{
        cpu.frame, cpu.offset + static_cast<u32>(offsetof(SharedWithVcpu, control)), cpu.vcpu, 0, {}};
    return hypercalls_->call(Hypercall::event_channel_op, EventOp::init_control, argument);
}

Result<bool> Events::use_fifo(std::span<u32> words, u64 frame) {
    if (init_control(cpus_[0]) < 0) {
        return false;
    }
    words_ = words;
    words_frame_ = frame;
    CHECK(start_fifo());
    return true;
}

Result<void> Events::start_fifo() {
    for (u32& word : words_) {
        std::atomic_ref<u32>(word).store(fifo_masked, std::memory_order_relaxed);
    }
    EventExpandArray argument{words_frame_};
    const i64 answer = hypercalls_->call(Hypercall::event_channel_op, EventOp::expand_array, argument);
    if (answer < 0) {
        return Error{Code::not_supported, "Xen refuses a page of FIFO event words (errno)", 0,
                     static_cast<u64>(-answer)};
    }
    return {};
}

bool Events::unmask_word(u32& word) {
    static constexpr u32 patience = 1'000'000; // Xen is busy for a few instructions
    std::atomic_ref<u32> shared(word);
    u32 seen = shared.load(std::memory_order_relaxed);
    for (u32 tries = 0;; ++tries) {
        const u32 expected = tries < patience ? seen & ~fifo_busy : seen;
        u32 found = expected;
        // Sequentially consistent: our store to masked before what Xen does about a later event. Acquire: makes the
        // sender's writes before its notification visible to the caller.
        if (shared.compare_exchange_weak(found, expected & ~(fifo_masked | fifo_pending), std::memory_order_seq_cst)) {
            return (expected & fifo_pending) != 0;
        }
        seen = found;
        spin_pause();
    }
}

void Events::leave(u32 processor) {
    if (!installed()) {
        return;
    }
    for (u32 word = 0; word < bound_words; ++word) {
        u64 mine = cpus_[processor].mine[word].load(std::memory_order_relaxed);
        for (; mine != 0; mine &= mine - 1) {
            mask(static_cast<Port>(word * 64 + static_cast<u32>(std::countr_zero(mine))));
        }
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

Result<void> Events::check_bindable(Port port) const {
    const u32 n = number(port);
    if (n == 0 || n >= capacity) {
        return Error{Code::exhausted, "an event channel's port is beyond what this kernel has room for", capacity - 1,
                     n};
    }
    if (slots_[n].handler != nullptr) {
        return Error{Code::busy, "the event channel has a handler already", 0, n};
    }
    return {};
}

void Events::take(Port port, InterruptHandler handler, void* context, u32 processor) {
    const u32 n = number(port);
    const u64 bit = u64{1} << n % 64;
    slots_[n] = {handler, context, processor};
    note_open(port);
    bound_[n / 64].fetch_or(bit, std::memory_order_release);
    cpus_[processor].mine[n / 64].fetch_or(bit, std::memory_order_release); // pairs with the acquire in scan_words()
}

Result<u32> Events::bind(Port port, InterruptHandler handler, void* context, u32 processor) {
    CHECK(check_bindable(port));
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
    take(port, handler, context, processor);
    return processor;
}

Result<Port> Events::open_ipi(u32 processor, InterruptHandler handler, void* context) {
    EventBindIpi argument{cpus_[processor].vcpu, Port::none};
    const i64 answer = hypercalls_->call(Hypercall::event_channel_op, EventOp::bind_ipi, argument);
    if (answer < 0) {
        return Error{Code::exhausted, "Xen gives no event channel to another processor (errno)", 0,
                     static_cast<u64>(-answer)};
    }
    const Port port = argument.port;
    if (const auto bindable = check_bindable(port); !bindable) {
        EventPort close{port};
        static_cast<void>(hypercalls_->call(Hypercall::event_channel_op, EventOp::close, close));
        return bindable.error();
    }
    mask(port);
    take(port, handler, context, processor);
    static_cast<void>(unmask(port)); // nothing was sent yet
    return port;
}

Result<Port> Events::bind_virq(u32 virq, InterruptHandler handler, void* context, u32 processor) {
    if (!joined(processor)) {
        return Error{Code::not_supported, "the processor takes no events"};
    }
    EventBindVirq argument{virq, cpus_[processor].vcpu, Port::none};
    const i64 answer = hypercalls_->call(Hypercall::event_channel_op, EventOp::bind_virq, argument);
    if (answer < 0) {
        return Error{Code::not_supported, "Xen gives no event channel for an interrupt of its own (errno)", 0,
                     static_cast<u64>(-answer)};
    }
    const Port port = argument.port;
    if (const auto bindable = check_bindable(port); !bindable) {
        EventPort close{port};
        static_cast<void>(hypercalls_->call(Hypercall::event_channel_op, EventOp::close, close));
        return bindable.error();
    }
    mask(port);
    if (fifo()) {
        EventSetPriority first{port, 0};
        static_cast<void>(hypercalls_->call(Hypercall::event_channel_op, EventOp::set_priority, first)); // else later
    }
    take(port, handler, context, processor);
    static_cast<void>(unmask(port)); // nothing that could have raised it before matters
    return port;
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
        bound_[n / 64].fetch_and(~bit, std::memory_order_seq_cst); // see the table
        cpus_[slots_[n].processor].mine[n / 64].fetch_and(~bit, std::memory_order_seq_cst);
        await_scans();
        slots_[n] = {};
    }
    EventPort argument{port};
    // fails harmlessly if the port is not open
    static_cast<void>(hypercalls_->call(Hypercall::event_channel_op, EventOp::close, argument));
    // clear it for the port's next user
    if (fifo()) {
        if (n < words_.size()) {
            std::atomic_ref<u32>(words_[n]).fetch_and(~fifo_pending, std::memory_order_relaxed);
        }
        return;
    }
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
    if (fifo()) {
        scan_queues(cpu, *info);
    } else {
        scan_words(cpu, *info);
    }
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

void Events::scan_queues(Cpu& cpu, VcpuInfo& info) {
    static constexpr u32 all = (1u << fifo_priorities) - 1;
    FifoControl& control = cpu.own->control;
    std::atomic_ref<u32> ready(control.ready);
    // Sequentially consistent exchanges: see the table in the interface.
    std::atomic_ref<u8>(info.upcall_pending).exchange(0, std::memory_order_seq_cst);
    u32 queues = ready.exchange(0, std::memory_order_seq_cst) & all;
    for (u32 events = 0; queues != 0; ++events) {
        if (events == max_queued) {
            ready.fetch_or(queues, std::memory_order_seq_cst);
            std::atomic_ref<u8>(info.upcall_pending).store(1, std::memory_order_seq_cst);
            return;
        }
        const u32 queue = static_cast<u32>(std::countr_zero(queues)); // the highest priority first
        u32 port = cpu.heads[queue];
        if (port == 0) {
            // Acquire: the word of the port after its place in the queue. Pairs with Xen's store of the head.
            port = std::atomic_ref<u32>(control.head[queue]).load(std::memory_order_acquire);
        }
        cpu.heads[queue] = 0;
        if (port == 0 || port >= words_.size()) [[unlikely]] { // no port of ours: the queue cannot be followed
            unexpected_.fetch_add(1, std::memory_order_relaxed);
            queues &= ~(1u << queue);
            continue;
        }
        std::atomic_ref<u32> word(words_[port]);
        u32 seen = word.load(std::memory_order_relaxed);
        while (!word.compare_exchange_weak(seen, seen & ~(fifo_linked | fifo_link), std::memory_order_seq_cst)) {
        }
        cpu.heads[queue] = seen & fifo_link;
        if ((seen & fifo_link) == 0) {
            queues &= ~(1u << queue);
        }
        // Acquire: as in scan_words(). A port that is masked keeps its event; one that unmask() has served has none.
        seen = word.load(std::memory_order_relaxed);
        if ((seen & fifo_masked) == 0 &&
            (word.fetch_and(~fifo_pending, std::memory_order_acquire) & fifo_pending) != 0) {
            const u64 bit = u64{1} << port % 64;
            if (port < capacity && (bound_[port / 64].load(std::memory_order_seq_cst) & bit) != 0) [[likely]] {
                slots_[port].handler(slots_[port].context);
            } else {
                unexpected_.fetch_add(1, std::memory_order_relaxed);
                mask(static_cast<Port>(port));
            }
        }
        queues |= ready.exchange(0, std::memory_order_seq_cst) & all;
    }
}

i64 Events::poll(std::span<const u32> ports, u64 timeout_ns) {
    SchedPoll argument{ports.data(), static_cast<u32>(ports.size()), 0, timeout_ns};
    return hypercalls_->call(Hypercall::sched_op, SchedOp::poll, argument);
}

} // namespace fl::hv::xen
