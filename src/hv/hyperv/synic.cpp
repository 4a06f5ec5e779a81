module;
#include "core/try.hpp"
module hv.hyperv.synic;
import core.std;
import core.result;
import core.dma;
import core.processor;
import io.executor;
import hv.backend;
import hv.hyperv.protocol;
import hv.hyperv.vmbus.protocol;

namespace fl::hv::hyperv {

namespace {
constexpr u32 vmbus_sint_register = msr::sint0 + vmbus_sint;
} // namespace

Result<void> Synic::enable(io::Executor& executor, u8 vector, bool auto_eoi) {
    if (memory_ == nullptr) {
        return Error{Code::bad_argument, "SynIC: enable() without install()"};
    }
    Processor& processor = processors_[this_processor()];
    if (processor.messages == nullptr) {
        TRY(DmaBuffer pages, memory_->buffer(2 * static_cast<u32>(page_size)));
        processor.messages = reinterpret_cast<MessagePage*>(pages.data());
        processor.flags = reinterpret_cast<EventPage*>(pages.data() + page_size);
        const u64 bus = pages.bus();
        pages.abandon(); // the hypervisor's while the machine runs
        const u64 messages = cpu_->read_msr(msr::message_page) & page_register_reserved;
        const u64 flags = cpu_->read_msr(msr::event_page) & page_register_reserved;
        cpu_->write_msr(msr::message_page, bus | messages | page_enable);
        cpu_->write_msr(msr::event_page, (bus + page_size) | flags | page_enable);
    } else {
        return Error{Code::busy, "the SynIC of this processor is on already"};
    }
    processor.executor = &executor;
    processor.vp_index = vp_index_ ? static_cast<u32>(cpu_->read_msr(msr::vp_index)) : this_processor();
    // Release: the handler, which may run from now on, must see the rest. Pairs with the acquire in enabled() and
    // interrupt().
    processor.on.store(true, std::memory_order_release);
    const u64 kept = cpu_->read_msr(vmbus_sint_register) & sint::kept;
    cpu_->write_msr(vmbus_sint_register, kept | vector | (auto_eoi ? sint::auto_eoi : 0));
    cpu_->write_msr(msr::synic_control, cpu_->read_msr(msr::synic_control) | page_enable);
    return {};
}

void Synic::disable() {
    Processor& processor = processors_[this_processor()];
    if (!processor.on.exchange(false, std::memory_order_acq_rel)) {
        return;
    }
    cpu_->write_msr(vmbus_sint_register, cpu_->read_msr(vmbus_sint_register) | sint::masked);
    cpu_->write_msr(msr::message_page, cpu_->read_msr(msr::message_page) & page_register_reserved);
    cpu_->write_msr(msr::event_page, cpu_->read_msr(msr::event_page) & page_register_reserved);
    cpu_->write_msr(msr::synic_control, cpu_->read_msr(msr::synic_control) & ~page_enable);
}

void Synic::watch(u32 relid) {
    const u32 words = std::min(relid, event_flags - 1) / 64 + 1;
    if (watched_words_.load(std::memory_order_relaxed) < words) {
        // Release: pairs with the acquire in take_events(). The host raises the flag only after a message that is
        // posted later still.
        watched_words_.store(words, std::memory_order_release);
    }
}

void Synic::interrupt() {
    Processor& processor = processors_[this_processor()];
    if (!processor.on.load(std::memory_order_acquire)) {
        return;
    }
    // single writer
    processor.interrupts.store(processor.interrupts.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    take_events(processor);
    if (processor.checking.load(std::memory_order_relaxed)) { // on this same processor: the interrupt hit check_slot()
        processor.interrupted.store(true, std::memory_order_relaxed);
        announce_messages(processor);
    } else {
        take_messages(processor, this_processor() == 0);
    }
}

void Synic::take_events(Processor& processor) {
    std::array<u64, 32>& words = processor.flags->flags[vmbus_sint];
    if (InterruptPage* page = interrupt_page_.load(std::memory_order_acquire)) {
        // Flag 0 announces flags in the interrupt page. Clear it first: a flag that is set in the page later sets it
        // once more.
        if (std::atomic_ref<u64>(words[0]).exchange(0, std::memory_order_acquire) == 0) {
            return;
        }
        for (u32 w = 0; w < page->from_host.size(); ++w) {
            std::atomic_ref<u64> word(page->from_host[w]);
            if (word.load(std::memory_order_relaxed) != 0) {
                for (u64 set = word.exchange(0, std::memory_order_acquire); set != 0; set &= set - 1) {
                    raised(processor, w * 64 + static_cast<u32>(std::countr_zero(set)));
                }
            }
        }
        return;
    }
    const u32 watched = watched_words_.load(std::memory_order_acquire);
    for (u32 w = 0; w < watched; ++w) {
        std::atomic_ref<u64> word(words[w]);
        if (word.load(std::memory_order_relaxed) == 0) {
            continue;
        }
        for (u64 set = word.exchange(0, std::memory_order_acquire); set != 0; set &= set - 1) { // see the table
            raised(processor, w * 64 + static_cast<u32>(std::countr_zero(set)));
        }
    }
}

void Synic::announce_messages(Processor& processor) {
    if (!message_listener_.raise_on(*processor.executor)) {
        processor.executor->wake();
    }
}

void Synic::take_messages(Processor& processor, bool queued_here) {
    MessageSlot& slot = processor.messages->slots[vmbus_sint];
    std::atomic_ref<u32> type_word(reinterpret_cast<u32&>(slot.type));
    for (u32 i = 0; i < messages_per_interrupt; ++i) {
        const u32 type = type_word.load(std::memory_order_acquire); // see the table
        if (type == to_underlying(SynicMessageType::none)) {
            return;
        }
        if (type == to_underlying(SynicMessageType::timer_expired)) {
            if (timer_handler_ != nullptr) {
                timer_handler_(timer_context_);
            }
        } else if (!queued_here || type != channel_message) {
            unexpected_messages_.fetch_add(1, std::memory_order_relaxed);
        } else {
            const u32 tail = tail_.load(std::memory_order_relaxed);
            if (tail - head_.load(std::memory_order_acquire) == queue_length) {
                return; // leave it in the slot: the host waits until next() has made room and calls check_slot()
            }
            SynicMessage& message = queue_[tail % queue_length];
            message.type = type;
            message.size = std::min<u32>(*static_cast<const volatile u8*>(&slot.payload_bytes), message_payload);
            std::memcpy(message.payload.data(), slot.payload.data(), message_payload);
            // Release: the message before its place in the queue. Pairs with the acquire in next().
            tail_.store(tail + 1, std::memory_order_release);
            announce_messages(processor);
        }
        type_word.store(to_underlying(SynicMessageType::none), std::memory_order_release);
        std::atomic_thread_fence(std::memory_order_seq_cst); // see the table
        if ((*static_cast<const volatile u8*>(&slot.flags) & message_pending) != 0) {
            cpu_->write_msr(msr::end_of_message, 0);
        }
    }
}

void Synic::check_slot(Processor& processor) {
    // The handler may interrupt this at any instruction; while `checking` is set, it does not access the slot but sets
    // `interrupted`. All on one processor: only the compiler must be kept from reordering.
    for (u32 tries = 0; tries < messages_per_interrupt; ++tries) {
        processor.interrupted.store(false, std::memory_order_relaxed);
        processor.checking.store(true, std::memory_order_relaxed);
        std::atomic_signal_fence(std::memory_order_seq_cst);
        take_messages(processor, true);
        std::atomic_signal_fence(std::memory_order_seq_cst);
        processor.checking.store(false, std::memory_order_relaxed);
        std::atomic_signal_fence(std::memory_order_seq_cst);
        if (!processor.interrupted.load(std::memory_order_relaxed)) {
            return;
        }
    }
}

bool Synic::next(SynicMessage& into) {
    u32 head = head_.load(std::memory_order_relaxed);
    if (tail_.load(std::memory_order_acquire) == head) {
        Processor& processor = processors_[0];
        if (!processor.on.load(std::memory_order_relaxed) ||
            std::atomic_ref(reinterpret_cast<u32&>(processor.messages->slots[vmbus_sint].type))
                    .load(std::memory_order_relaxed) == to_underlying(SynicMessageType::none)) {
            return false;
        }
        check_slot(processor); // interrupts are off, or the queue was full when the message arrived
        if (tail_.load(std::memory_order_acquire) == head) {
            return false;
        }
    }
    into = queue_[head % queue_length];
    // Release: the copy before the free slot. Pairs with the acquire in take_messages().
    head_.store(++head, std::memory_order_release);
    return true;
}

u64 Synic::interrupts() const {
    u64 sum = 0;
    for (const Processor& processor : processors_) {
        sum += processor.interrupts.load(std::memory_order_relaxed);
    }
    return sum;
}

} // namespace fl::hv::hyperv
