module;
#include "core/try.hpp"
module drivers.nvme.disk;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.mmio;
import core.log;
import io.executor;
import io.block;
import io.block_queue;
import io.oldest_wait;
import io.ring;

namespace fl::drivers::nvme {

// ---- the disk ----

Disk::Disk(Queue& queue, u32 nsid, u32 max_bytes, const io::Geometry& geometry, const Identity& identity)
    : GroupedDisk(queue, geometry, identity), nsid_(nsid), max_bytes_(max_bytes) {}

// ---- the queue pair: sending ----

Result<void> Transport::lay_out(const QueueTerms& terms) {
    terms_ = terms;
    TRY(submissions_,
        Submissions::create(io::MappedMemory(terms.submissions.data, terms.submissions.size),
                            {.entries = 0, .stride = sizeof(Submission)}, io::Wrapped<u16>(terms.entries)));
    TRY(completions_, Completions::create(io::MappedMemory(terms.completions.data, terms.completions.size),
                                          {.entries = 0, .stride = sizeof(CompletionEntry)},
                                          io::FreeRunning<u16>(terms.entries), {}, io::ByPhase{phase_offset}));
    use_shadow(terms.shadow, terms.events);
    return {};
}

void Transport::use_shadow(DmaSpan shadow, DmaSpan events) {
    terms_.shadow = shadow;
    terms_.events = events;
    shadow_ = io::MappedMemory(shadow.data, shadow.size);
    events_ = io::MappedMemory(events.data, events.size);
}

void Transport::start(void (*notify)(void*), void* context) {
    notify_ = notify;
    context_ = context;
    join();
}

io::Fit Transport::prepare(Command& command) {
    if (submissions_->full() || commands_->size() > submissions_->capacity()) [[unlikely]] {
        return io::Fit::full; // never more commands than completions fit
    }
    if (command.op <= io::Op::write) [[likely]] {
        if (command.data().bus % 4 != 0) [[unlikely]] { // PRP entries are dwords [nvme-1.4 §4.3]
            command.refusal = io::Status::misaligned;
            return io::Fit::refused;
        }
        command.bytes = std::min(command.bytes, command.disk().max_bytes());
    }
    return io::Fit::ok;
}

// Buffers are contiguous: the pages after the first follow it.
[[gnu::always_inline]] inline void Transport::describe_data(Submission& entry, DmaSpan data, u64 id) const {
    entry.prp1 = data.bus;
    u64 next = (data.bus | (page - 1)) + 1;
    const u64 end = data.bus + data.size;
    if (next >= end) {
        return;
    }
    if (end - next <= page) {
        entry.prp2 = next;
        return;
    }
    const DmaSpan list = terms_.lists.subspan(io::SlotIndex::slot_of(id) * list_bytes, list_bytes);
    entry.prp2 = list.bus;
    for (std::byte* at = list.data; next < end; next += page, at += sizeof next) {
        std::memcpy(at, &next, sizeof next);
    }
}

io::SendResult Transport::send(Command& command, u64 id) {
    Submission entry;
    if (command.exchange != nullptr) [[unlikely]] {
        entry = static_cast<const Exchange&>(*command.exchange).command;
    } else {
        const Disk& disk = command.disk();
        entry.nsid = disk.nsid();
        if (command.op <= io::Op::write) [[likely]] {
            entry.opcode = to_underlying(command.op == io::Op::write ? Opcode::write : Opcode::read);
            describe_data(entry, command.data(), id);
            entry.cdw10 = static_cast<u32>(command.lba);
            entry.cdw11 = static_cast<u32>(command.lba >> 32);
            entry.cdw12 = (command.bytes >> disk.sector_shift()) - 1;
        } else if (command.op == io::Op::discard) {
            const DmaSpan list = terms_.lists.subspan(io::SlotIndex::slot_of(id) * list_bytes, list_bytes);
            const DatasetRange range{0, command.bytes >> disk.sector_shift(), command.lba};
            std::memcpy(list.data, &range, sizeof range);
            entry.opcode = to_underlying(Opcode::dataset_management);
            entry.prp1 = list.bus;
            entry.cdw11 = deallocate;
        } else {
            entry.opcode = to_underlying(Opcode::flush);
        }
    }
    entry.cid = static_cast<u16>(io::SlotIndex::slot_of(id) | (id >> 16) << 7);
    return submissions_->produce(entry) ? io::SendResult::sent : io::SendResult::full;
}

// True: the register was written.
bool Transport::ring(bool completion, u16 old, u16 now) {
    const u32 at = doorbell_offset(terms_.id, completion, terms_.stride);
    if (!terms_.shadow.empty()) {
        shadow_.store_release<u32>(at, now);
        // Our position before the controller's event index. The controller stores its event index before it looks at
        // the position for the last time: at least one side sees the other.
        shadow_.full_barrier();
        const u16 event = static_cast<u16>(events_.load_relaxed<u32>(at));
        if (static_cast<u16>(now - event - 1) >= static_cast<u16>(now - old)) {
            return false;
        }
    }
    terms_.registers.write<u32>(doorbells + at, now);
    ++accesses_;
    return true;
}

Result<void> Transport::publish(io::Counters& counters) {
    if (submissions_->publish()) {
        const u16 tail = static_cast<u16>(submissions_->slot());
        counters.notifications += ring(false, std::exchange(rung_tail_, tail), tail) ? 1 : 0;
    }
    return {};
}

// ---- the queue pair: completions ----

void Transport::raise_from_handler() {
    if (quiescent()) {
        return;
    }
    interrupts_.store(interrupts_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    executor_.raise(*queue);
}

void Transport::on_interrupt(void* self) {
    auto& first = *static_cast<Transport*>(self);
    if (first.terms_.line && !first.quiescent()) {
        // Lowers the line. Whether it was this device is seen in the queues.
        first.terms_.registers.write<u32>(interrupt_mask_set, 1);
        for (Transport* each = &first; each != nullptr; each = each->sharing_) {
            each->masked_.store(true, std::memory_order_relaxed);
        }
    }
    for (Transport* each = &first; each != nullptr; each = each->sharing_) {
        each->raise_from_handler();
    }
}

io::Next Transport::next(io::Completion& completion) {
    const auto found = completions_->available(commands_->size() != 0 ? 1 : 0);
    if (!found) [[unlikely]] {
        return broken({Code::protocol, "a completion arrived while no command was with the controller"});
    }
    if (*found == 0) {
        return io::Next::none;
    }
    CompletionEntry entry;
    static_cast<void>(completions_->take(entry)); // the only read of it
    ++unreleased_;
    alive_ = true;
    if (entry.sq_id != terms_.id) [[unlikely]] {
        return broken({Code::protocol, "a completion is for another submission queue", terms_.id, entry.sq_id});
    }
    if (auto head = submissions_->observe(entry.sq_head); !head) [[unlikely]] {
        return broken({Code::protocol, "a completion's submission queue head is not between its last one and the tail",
                       rung_tail_, entry.sq_head});
    }
    const u16 slot = entry.cid & 0x7f;
    const u64 id = commands_->has_slot(slot) ? commands_->id_of(slot) : ~u64{0};
    Command* command = commands_->find(id);
    if (command == nullptr || command->delayed || (id >> 16 & 0x1ff) != entry.cid >> 7u) [[unlikely]] {
        return broken({Code::protocol,
                       "a completion carries a command id that is not in flight (unknown, repeated or retired)", 0,
                       entry.cid});
    }
    completion.id = id;
    if (command->exchange != nullptr) [[unlikely]] {
        static_cast<Exchange*>(command->exchange)->completion = entry;
    } else if (status_code(entry.status) != 0) [[unlikely]] {
        completion = judge(id, *command, entry.status);
    }
    return io::Next::one;
}

io::Completion Transport::judge(u64 id, Command& command, u16 status) {
    io::Completion completion{id, io::Status::io_error};
    if (command.first == nullptr) { // a late answer: the request has already ended
        return completion;
    }
    const u16 code = status_code(status);
    switch (code) {
    case invalid_opcode: completion.status = io::Status::not_supported; break;
    case invalid_field:
        completion.status = command.op == io::Op::discard ? io::Status::not_supported : io::Status::io_error;
        break;
    case invalid_namespace: completion.status = io::Status::device_gone; break;
    case write_protected:
    case read_only_range: completion.status = io::Status::read_only; break;
    case lba_out_of_range: completion.status = io::Status::out_of_range; break;
    default:
        if (!do_not_retry(status) && (code & 0x700) != media_errors) {
            completion.retry = io::Retry::later;
        }
    }
    if (completion.retry == io::Retry::none && reports_ < Disk::max_reported_errors) {
        log::warning("{}: {} of {} bytes at LBA {} failed: status code type {:#x}, status code {:#x}{}",
                     command.disk().identity().name, command.op, command.bytes, command.lba, code >> 8, code & 0xff,
                     ++reports_ == Disk::max_reported_errors ? " (further ones are not shown)" : "");
    }
    return completion;
}

// With MSI-X each completion interrupts by itself, so the head is needed only for room: it is reported when half of
// the queue is used. MSI and lines signal again only for what the head has passed [nvme-1.4 §7.5.1].
Result<void> Transport::release(io::Counters&) {
    if (unreleased_ != 0 && (!terms_.lazy || unreleased_ >= terms_.entries / 2)) {
        unreleased_ = 0;
        const u16 head = static_cast<u16>(completions_->slot());
        static_cast<void>(ring(true, std::exchange(rung_head_, head), head));
    }
    return {};
}

Result<bool> Transport::arm() {
    if (masked_.exchange(false, std::memory_order_relaxed)) {
        // one access to mask and one to unmask
        terms_.registers.write<u32>(interrupt_mask_clear, 1);
        accesses_ += 2;
    }
    if (commands_->empty()) {
        return false; // a completion now would be a violation, which next() detects
    }
    TRY(const bool found, completions_->arm(1, 1));
    return found;
}

// ---- the queue pair: recovery ----

io::Recovery Transport::recover(const Command&, io::OldestWait::Finding finding, std::string_view) {
    if (finding == io::OldestWait::Finding::lost) {
        return {.kind = io::Recovery::Kind::give_up};
    }
    return {.kind = io::Recovery::Kind::close,
            .why = Error{Code::timed_out, "the controller has not answered anything for a whole time-out: it is reset "
                                          "and not used any more"}};
}

io::Stuck Transport::stuck(std::string_view) {
    return {.kind = io::Stuck::Kind::close,
            .why = Error{Code::timed_out, "every command is held by a request that the controller never completed"}};
}

Result<void> Transport::tick(Instant, bool) {
    if (std::exchange(alive_, false)) {
        return {}; // it has completed something since the last tick
    }
    ++accesses_;
    const auto status = ControllerStatus::read(terms_.registers);
    if (status.absent()) {
        group().set_removed();
        return Error{Code::device_gone, "the controller was removed: its registers read as all ones"};
    }
    if (status.get(ControllerStatus::cfs)) {
        return Error{Code::io, "the controller reports a fatal error (CSTS.CFS)", 0, status.raw};
    }
    return {};
}

void Transport::closed(bool stopped) {
    leave();
    if (!stopped && notify_ != nullptr) {
        notify_(context_);
    }
}

} // namespace fl::drivers::nvme

namespace fl {
template class io::BlockQueue<drivers::nvme::Transport>;
template class io::QueueDisk<drivers::nvme::Transport>;
} // namespace fl
