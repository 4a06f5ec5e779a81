// A queue pair's shared memory and doorbells: the rings of commands and completions, phase tags, shadow doorbells.
// Knows no requests; a completion is copied out once and checked here for what belongs to the queue: its submission
// queue's id, and a head within what was submitted.
//
// Doorbells are written once per turn. With shadow doorbells [nvme-1.4 §B.5] the new value goes to memory, and the
// register is written only if the controller asks for it by its event index.
module;
#include "core/try.hpp"
export module drivers.nvme.queue;
import core.std;
import core.result;
import core.dma;
import core.mmio;
import core.time;
import io.block_queue;
import io.ring;
export import drivers.nvme.commands;

export namespace fl::drivers::nvme {

/// Where a queue pair is, and its limits.
struct QueueTerms {
    Mmio registers;             // the whole BAR
    DmaSpan submissions;        // `entries` commands, zeroed
    DmaSpan completions;        // `completion_entries` completions, zeroed
    DmaSpan lists;              // list_bytes for each command; empty for the admin queue
    DmaSpan shadow;             // shadow doorbells; empty: not in use
    DmaSpan events;             // event indices
    u32 entries = 2;            // of the submission queue: a power of two
    u32 completion_entries = 2; // of the completion queue: a power of two
    u16 id = 0;
    u8 stride = 0;     // CAP.DSTRD
    bool lazy = false; // MSI-X: interrupts do not depend on the head that was last reported
};

class QueuePair {
  public:
    /// Lays out the empty queues; before the controller has them, or once it has forgotten them.
    Result<void> lay_out(const QueueTerms& terms) {
        terms_ = terms;
        TRY(submissions_,
            Submissions::create(io::MappedMemory(terms.submissions.data, terms.submissions.size),
                                {.entries = 0, .stride = sizeof(Submission)}, io::Wrapped<u16>(terms.entries)));
        TRY(completions_,
            Completions::create(io::MappedMemory(terms.completions.data, terms.completions.size),
                                {.entries = 0, .stride = sizeof(CompletionEntry)},
                                io::FreeRunning<u16>(terms.completion_entries), {}, io::ByPhase{phase_offset}));
        shadow_ = io::MappedMemory(terms.shadow.data, terms.shadow.size);
        events_ = io::MappedMemory(terms.events.data, terms.events.size);
        rung_tail_ = rung_head_ = 0;
        unreleased_ = 0;
        const u32 completions = terms.completion_entries;
        release_at_ = terms.lazy ? std::max(completions / 2, completions - std::min(completions, terms.entries)) : 1;
        return {};
    }
    inline const QueueTerms& terms() const { return terms_; }
    /// Of the command in this slot of the command table.
    inline DmaSpan list(u32 slot) const { return terms_.lists.subspan(slot * list_bytes, list_bytes); }

    /// Commands that the controller can hold at once.
    inline u32 capacity() const { return submissions_->capacity(); }
    inline bool full() const { return submissions_->full(); }
    /// False: full.
    inline bool submit(const Submission& entry) { return submissions_->produce(entry); }
    /// Makes submitted commands visible. True: the doorbell's register was written.
    inline bool publish() {
        if (!submissions_->publish()) {
            return false;
        }
        const u16 tail = static_cast<u16>(submissions_->slot());
        return ring(false, std::exchange(rung_tail_, tail), tail);
    }

    /// The next completion. Next::broken: it is not one of this queue, or `expected` is false (no command is with the
    /// controller): fault() tells.
    [[gnu::always_inline]] inline io::Next take(CompletionEntry& entry, bool expected) {
        const auto found = completions_->available(expected ? 1 : 0);
        if (!found) [[unlikely]] {
            return broken({Code::protocol, "a completion arrived while no command was with the controller"});
        }
        if (*found == 0) {
            return io::Next::none;
        }
        static_cast<void>(completions_->take(entry)); // the only read of it
        ++unreleased_;
        if (entry.sq_id != terms_.id) [[unlikely]] {
            return broken({Code::protocol, "a completion is for another submission queue", terms_.id, entry.sq_id});
        }
        if (auto head = submissions_->observe(entry.sq_head); !head) [[unlikely]] {
            return broken({Code::protocol,
                           "a completion's submission queue head is not between its last one and the tail", rung_tail_,
                           entry.sq_head});
        }
        return io::Next::one;
    }
    /// The protocol is violated. Returns Next::broken.
    io::Next broken(const Error& why) {
        fault_ = why;
        return io::Next::broken;
    }
    Error fault() const { return fault_.value_or(Error{Code::protocol, "an NVMe queue is broken"}); }
    /// Frees the entries of the completions that were taken. With MSI-X each completion interrupts by itself, so the
    /// head is needed only for room: it is reported when what is left might not hold the completions of all commands,
    /// but not before half of the queue is used. MSI and lines signal again only for what the head has passed
    /// [nvme-1.4 §7.5.1].
    inline void release() {
        if (unreleased_ >= release_at_) {
            unreleased_ = 0;
            const u16 head = static_cast<u16>(completions_->slot());
            static_cast<void>(ring(true, std::exchange(rung_head_, head), head));
        }
    }
    /// True: a completion is there.
    inline Result<bool> arm() { return completions_->arm(1, 1); }

    /// Register accesses that were not counted yet.
    inline u32 take_accesses() { return std::exchange(accesses_, 0); }
    inline void count_accesses(u32 count) { accesses_ += count; }

  private:
    using Submissions = io::Producer<io::MappedMemory, io::Wrapped<u16>, io::Always>;
    using Completions = io::Consumer<io::MappedMemory, io::FreeRunning<u16>, io::Always, io::ByPhase>;

    // True: the register was written.
    inline bool ring(bool completion, u16 old, u16 now) {
        const u32 at = doorbell_offset(terms_.id, completion, terms_.stride);
        if (!terms_.shadow.empty()) {
            shadow_.store_release<u32>(at, now);
            // Our position before the controller's event index. The controller stores its event index before it looks
            // at the position for the last time: at least one side sees the other.
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

    QueueTerms terms_;
    std::optional<Submissions> submissions_;
    std::optional<Completions> completions_;
    io::MappedMemory shadow_;
    io::MappedMemory events_;
    u16 rung_tail_ = 0; // doorbells' last values
    u16 rung_head_ = 0;
    u32 unreleased_ = 0; // completions taken since the head was last reported
    u32 release_at_ = 1; // the number of them that is reported
    u32 accesses_ = 0;
    std::optional<Error> fault_;
};

} // namespace fl::drivers::nvme
