// A channel's queue: requests of its one or two disks, one command at a time, completion by interrupt, recovery. What
// it promises: every request ends once, in bounded time, and none is lost when another one fails.
//
//   idle ──flush()──> running ──ended well──> idle or running (the next command is issued before requests complete)
//                        │ no answer, DMA error
//                        v
//                  reset_held ──tick──> reset_released ──tick, BSY = 0──> idle
//                                            │ no answer within the bound, or too many resets in a row
//                                            v
//                                         closed: everything ends with device_gone
//
// Neighbouring reads (or writes) that wait in the queue become one command: fewer commands, each request still ends on
// its own. When a gathered command fails, or is not answered, its requests are tried again one by one, so a bad sector
// hurts only the request that covers it.
//
// Time counts for the command under way alone [io.oldest_wait]: a device that needs long for each command is never
// reset, however many requests wait in the queue. Those end when their turn has come, or the channel is closed.
export module drivers.ata.queue;
import core.std;
import core.result;
import core.text;
import core.log;
import core.time;
import core.dma;
import core.interrupt;
import io.executor;
import io.block;
import io.oldest_wait;
import drivers.ata.protocol;
import drivers.ata.channel;
import drivers.ata.disk;

export namespace fl::drivers::ata {

template <PortAccess P>
class ChannelQueue final : public io::Service, public Carrier {
  public:
    static constexpr u32 max_transfer = 1024 * 1024; // bytes of one command
    static constexpr u32 bounce_bytes = 64 * 1024;   // for memory that the engine's 32 bits do not reach
    // without an interrupt for so long the device is looked at, every tick
    static constexpr Nanoseconds lost_after = 20'000'000;
    static constexpr Nanoseconds reset_hold = 5'000;       // [ATA-7 §9.2]
    static constexpr Nanoseconds reset_settle = 2'000'000; // [ATA-7 §9.2]
    static constexpr u32 max_resets = 3;                   // without a success between them
    static constexpr u32 max_reports = 16;                 // log lines about failed commands

    ChannelQueue(io::Executor& executor, DmaAllocator& dma, P ports, ChannelPorts at, DmaSpan table,
                 Nanoseconds timeout)
        : executor_(executor), dma_(dma), handler_registers_(ports, at), channel_(std::move(ports), at, table),
          timeout_(timeout) {}
    ~ChannelQueue() { close(); }

    Channel<P>& channel() { return channel_; }
    /// Accesses so far were for attaching: no disk is charged for them.
    void start_counting() { charged_accesses_ = channel_.registers().accesses(); }

    /// Takes requests from here on. `line`: the interrupt, already known to be this channel's.
    Result<void> open(InterruptController& interrupts, InterruptLine line);
    /// Stops the device, ends what is there with device_gone, gives the interrupt back.
    void close();
    void add(Disk& disk) { disks_[disk.unit()] = &disk; }
    void remove(Disk& disk) { disks_[disk.unit()] = nullptr; }

    void submit(Disk& disk, io::Request& request) override;
    bool cancel(Disk& disk, io::Request& request) override;
    void forget(Disk& disk, io::Request& request) override;

    void flush() override;
    bool drain() override;
    bool arm() override {
        // Acquire: pairs with the release in on_interrupt(), as in drain().
        return open_ && flag_.load(std::memory_order_acquire);
    }
    void tick(Instant now) override;

    u64 lost_interrupts() const { return lost_; }
    u64 resets() const { return resets_; }
    bool closed() const { return state_ == State::closed; }

  private:
    enum class State : u8 { idle, running, reset_held, reset_released, closed };

    static void on_interrupt(void* self);
    void interrupted();
    bool reachable(const io::Request& r) const { return r.buffer.bus + r.buffer.size <= u64{1} << 32; }
    void issue_next();
    bool issue(Disk& disk);
    bool bounce(Disk& disk, io::Request& r);
    void send(Disk& disk, bool write, u64 lba);
    Outcome look();
    void finish(const Outcome& outcome);
    void limit_gathering();
    void fail(const Outcome& outcome);
    void begin_reset();
    void take_without_interrupt(Instant now);
    void time_out(Instant now);
    bool unanswered() const { return finding_ != io::OldestWait::Finding::none; }
    void shut(std::string_view why);
    void charge();
    io::RequestQueue& batch() { return batches_[batch_]; }

    io::Executor& executor_;
    DmaAllocator& dma_;
    InterruptController* interrupts_ = nullptr;
    InterruptLine line_;
    Registers<P> handler_registers_;
    Channel<P> channel_;
    Nanoseconds timeout_;
    std::array<Disk*, 2> disks_{};
    State state_ = State::idle;
    bool open_ = false;
    bool shared_ = false; // the line is not the channel's own: the handler asks the device

    // The command under way.
    Disk* active_ = nullptr;
    std::array<io::RequestQueue, 2> batches_; // its requests, and, while they are completed, those of the one before
    u8 batch_ = 0;
    bool transfer_ = false; // moves data
    bool bounced_ = false;  // through bounce_
    bool suspect_ = false;  // no longer under way at the last tick, and no interrupt
    u32 bytes_ = 0;         // of the command
    Instant issued_at_ = 0;
    u64 commands_ = 0;                // issued so far: the number of the one under way
    u32 gather_limit_ = max_transfer; // bytes of a command made of several requests
    io::OldestWait wait_;
    io::OldestWait::Finding finding_ = io::OldestWait::Finding::none; // of the last tick
    Instant reset_at_ = 0;                                            // when the reset was asserted
    Instant settle_at_ = 0;                                           // when it was released
    u8 last_unit_ = 1;
    u32 resets_in_a_row_ = 0;
    u32 reports_ = 0;
    DmaBuffer bounce_;

    // From the handler to drain(). flag_: release in the handler, acquire in drain() and arm(); whoever sees it set
    // sees seen_ of that interrupt too. The rest is relaxed: same processor, and a sum that may lag by one interrupt.
    std::atomic<bool> flag_{false};
    std::atomic<u32> seen_{0}; // shared lines: 1<<16 | bus status<<8 | status of an ended command, 0: none
    std::atomic<u64> handler_interrupts_{0};
    std::atomic<u64> handler_accesses_{0};
    u64 charged_interrupts_ = 0;
    u64 charged_accesses_ = 0;
    u64 charged_handler_accesses_ = 0;
    u64 lost_ = 0;
    u64 resets_ = 0;
};

// ---- opening, closing, requests ----

template <PortAccess P>
Result<void> ChannelQueue<P>::open(InterruptController& interrupts, InterruptLine line) {
    shared_ = !line.isa;
    if (auto attached = interrupts.attach_line(line, &ChannelQueue::on_interrupt, this); !attached) {
        return attached.error();
    }
    interrupts_ = &interrupts;
    line_ = line;
    open_ = true;
    state_ = State::idle;
    executor_.add(*this);
    return {};
}

template <PortAccess P>
void ChannelQueue<P>::close() {
    if (!open_) {
        return;
    }
    if (state_ != State::closed) {
        channel_.stop();
        shut({});
    }
    executor_.remove(*this);
    interrupts_->detach_line(line_, &ChannelQueue::on_interrupt, this);
    open_ = false;
}

template <PortAccess P>
void ChannelQueue<P>::submit(Disk& disk, io::Request& request) {
    if (state_ == State::closed || !open_) {
        return disk.end(request, io::Status::device_gone);
    }
    disk.pending.push(request);
    if (state_ == State::idle) {
        executor_.touch(*this); // at the end of the turn, when its neighbours are here too
    }
}

template <PortAccess P>
bool ChannelQueue<P>::cancel(Disk& disk, io::Request& request) {
    if (!disk.remove(request)) {
        return false; // the device has it
    }
    disk.end(request, io::Status::cancelled);
    return true;
}

template <PortAccess P>
void ChannelQueue<P>::forget(Disk& disk, io::Request& request) {
    if (disk.remove(request)) {
        return;
    }
    if (state_ != State::running || active_ != &disk || !batch().remove(request)) {
        return;
    }
    // The device may be writing into the buffer that is about to die. Stopping the engine is immediate; what the disk
    // thinks of it is settled by a reset. The others of the command are innocent.
    while (io::Request* other = batch().pop()) {
        disk.again.push(*other);
    }
    begin_reset();
    --resets_in_a_row_; // its owner's wish, and no sign of a disk that does not work
    charge();
}

template <PortAccess P>
void ChannelQueue<P>::flush() {
    if (state_ == State::idle) {
        issue_next();
        charge();
    }
}

// ---- issuing ----

template <PortAccess P>
void ChannelQueue<P>::issue_next() {
    for (u8 i = 0; i < 2 && state_ == State::idle; ++i) { // the disks take turns
        Disk* disk = disks_[(last_unit_ + 1u + i) % 2];
        while (disk != nullptr && state_ == State::idle && (!disk->again.empty() || !disk->pending.empty())) {
            if (issue(*disk)) {
                last_unit_ = disk->unit();
            }
        }
    }
}

/// True: a command is under way. False: the request ended at once.
template <PortAccess P>
bool ChannelQueue<P>::issue(Disk& disk) {
    const bool alone = !disk.again.empty();
    io::RequestQueue& from = alone ? disk.again : disk.pending;
    io::Request& r = *from.pop();
    active_ = &disk;
    transfer_ = r.op != io::Op::flush;
    bounced_ = false;
    suspect_ = false;
    if (r.op == io::Op::flush) {
        batch().push(r);
        bytes_ = 0;
        seen_.store(0, std::memory_order_relaxed);
        channel_.issue(disk.unit(), disk.info().flush_ext ? Command::flush_cache_ext : Command::flush_cache);
        ++disk.count().notifications;
        state_ = State::running;
        issued_at_ = executor_.now();
        ++commands_;
        return true;
    }
    if (r.op != io::Op::read && r.op != io::Op::write) {
        disk.end(r, io::Status::not_supported);
        return false;
    }

    const u32 sector = disk.geometry().sector_size;
    channel_.begin_table();
    if (!reachable(r)) {
        if (!bounce(disk, r)) {
            return false;
        }
    } else {
        // 28-bit commands alone: 256 sectors at most.
        const u32 limit = disk.info().lba48 ? max_transfer : std::min(max_transfer, lba28_max_count * sector);
        bytes_ = std::min(r.buffer.size - r.issued, limit);
        // an empty table holds 1 MiB however it lies
        static_cast<void>(channel_.add_region(r.buffer.bus + r.issued, bytes_));
        batch().push(r);
        if (!alone && bytes_ == r.buffer.size) {
            while (io::Request* next = from.front()) {
                if (next->op != r.op || next->lba != r.lba + bytes_ / sector || next->buffer.size > limit - bytes_ ||
                    bytes_ + next->buffer.size > gather_limit_ || !reachable(*next) ||
                    !channel_.add_region(next->buffer.bus, next->buffer.size)) {
                    break;
                }
                bytes_ += next->buffer.size;
                batch().push(*from.pop());
            }
        }
    }
    send(disk, r.op == io::Op::write, r.lba + r.issued / sector);
    return true;
}

/// Memory beyond 4 GiB: the device uses ours, and the processor copies. False: there is none, and the request has
/// ended.
template <PortAccess P>
bool ChannelQueue<P>::bounce(Disk& disk, io::Request& r) {
    if (!bounce_) {
        auto memory = dma_.buffer(bounce_bytes, u64{1} << 32); // once for the channel: most machines never come here
        if (!memory) {
            log::error("{}: no memory below 4 GiB to reach a buffer above it: {}", disk.name(), memory.error());
            disk.end(r, io::Status::io_error);
            return false;
        }
        bounce_ = std::move(*memory);
    }
    bounced_ = true;
    bytes_ = std::min(r.buffer.size - r.issued, bounce_bytes);
    if (r.op == io::Op::write) {
        std::memcpy(bounce_.data(), r.buffer.data + r.issued, bytes_);
    }
    static_cast<void>(channel_.add_region(bounce_.bus(), bytes_));
    batch().push(r);
    return true;
}

template <PortAccess P>
void ChannelQueue<P>::send(Disk& disk, bool write, u64 lba) {
    const u32 count = bytes_ / disk.geometry().sector_size;
    const bool wide = lba + count > lba28_sectors || count > lba28_max_count;
    seen_.store(0, std::memory_order_relaxed); // an answer to the last command is none to this one
    channel_.issue({.unit = disk.unit(), .write = write, .wide = wide, .lba = lba, .count = count});
    ++disk.count().notifications;
    state_ = State::running;
    issued_at_ = executor_.now();
    ++commands_;
}

// ---- completion ----

template <PortAccess P>
void ChannelQueue<P>::on_interrupt(void* self) {
    static_cast<ChannelQueue*>(self)->interrupted();
}

template <PortAccess P>
void ChannelQueue<P>::interrupted() {
    if (shared_) {
        const Outcome outcome = Channel<P>::look_shared(handler_registers_);
        handler_accesses_.store(handler_registers_.accesses(), std::memory_order_relaxed);
        if (!outcome.bus.interrupt()) {
            return; // somebody else's
        }
        if (outcome.ended) {
            seen_.store(1u << 16 | u32{outcome.bus.raw} << 8 | outcome.status.raw, std::memory_order_relaxed);
        }
    }
    handler_interrupts_.store(handler_interrupts_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    flag_.store(true, std::memory_order_release); // pairs with the acquire in drain() and arm()
    executor_.wake();
}

template <PortAccess P>
Outcome ChannelQueue<P>::look() {
    if (!shared_) {
        return channel_.look();
    }
    if (const u32 seen = seen_.exchange(0, std::memory_order_relaxed); seen != 0) {
        return {.ended = true, .status = {static_cast<u8>(seen)}, .bus = {static_cast<u8>(seen >> 8)}};
    }
    return {};
}

template <PortAccess P>
bool ChannelQueue<P>::drain() {
    // Acquire: pairs with the release in interrupted().
    if (!flag_.load(std::memory_order_relaxed) || !flag_.exchange(false, std::memory_order_acquire)) {
        return false;
    }
    bool found = false;
    if (state_ == State::running) {
        const Outcome outcome = look();
        if (outcome.ended) {
            finish(outcome);
            found = true;
        }
    }
    charge();
    return found;
}

template <PortAccess P>
void ChannelQueue<P>::finish(const Outcome& outcome) {
    state_ = State::idle;
    if (!outcome.ok(transfer_)) {
        channel_.stop();
        return fail(outcome);
    }
    resets_in_a_row_ = 0;
    if (transfer_) {
        limit_gathering();
    }
    Disk& disk = *active_;
    io::RequestQueue& done = batch();
    if (bounced_) {
        io::Request& r = *done.front();
        if (r.op == io::Op::read) {
            std::memcpy(r.buffer.data + r.issued, bounce_.data(), bytes_);
        }
    }
    // a long one: it goes on
    if (done.front() != nullptr && done.front()->issued + bytes_ < done.front()->buffer.size) {
        io::Request& r = *done.pop();
        r.issued += bytes_;
        disk.again.push(r);
    }
    batch_ ^= 1;
    issue_next(); // first the device, so that it works while we complete; stops the engine before it starts it again
    if (state_ == State::idle) {
        channel_.stop();
    }
    while (io::Request* r = done.pop()) {
        disk.end(*r, io::Status::ok);
    }
}

/// A slow disk is not made to look silent by commands that gather too much: going by the last command, the next one
/// takes a quarter of a time-out at most, and a second at most.
template <PortAccess P>
void ChannelQueue<P>::limit_gathering() {
    const Nanoseconds enough = std::min<Nanoseconds>(timeout_ / 4, 1'000'000'000);
    // so that no product leaves 64 bits
    const Nanoseconds took = std::min<Nanoseconds>(executor_.now() - issued_at_, 1'000'000'000'000);
    gather_limit_ = took * max_transfer > enough * bytes_ ? static_cast<u32>(enough * bytes_ / took) : max_transfer;
}

template <PortAccess P>
void ChannelQueue<P>::fail(const Outcome& outcome) {
    Disk& disk = *active_;
    const ErrorRegister error = outcome.status.error() ? channel_.error() : ErrorRegister{};
    const bool media = outcome.status.error() && (error.uncorrectable() || error.id_not_found());
    // ICRC comes with ABRT [ACS §6.3]; ABRT alone is a refusal, and trying again will not help.
    const bool garbled = outcome.status.error() && error.interface_crc();
    const bool cut_short = outcome.bus.active() && !media && !error.aborted();
    const bool transport = transfer_ && (outcome.bus.error() || garbled || cut_short);
    const io::Request& first = *batch().front();
    if (reports_ < max_reports) {
        FixedText<160> text;
        describe(text, outcome.status, error, outcome.bus);
        log::warning("{}: {} of {} bytes at LBA {} failed: {}{}", disk.name(), first.op, bytes_, first.lba, text,
                     ++reports_ == max_reports ? " (further ones are not shown)" : "");
    }
    const bool several = batch().size() > 1;
    while (io::Request* r = batch().pop()) {
        if (several || (transport && r->parts == 0)) {
            r->parts = transport ? 1 : r->parts; // `parts` counts second tries
            disk.again.push(*r);
        } else {
            disk.end(*r, io::Status::io_error);
        }
    }
    if (transport) {
        begin_reset();
    } else {
        issue_next();
    }
}

// ---- time ----

template <PortAccess P>
void ChannelQueue<P>::tick(Instant now) {
    finding_ = wait_.look(executor_, {.oldest = state_ == State::running ? commands_ : 0, .under_way = 1}, timeout_);
    switch (state_) {
    case State::running:
        if (now - issued_at_ >= lost_after && now > issued_at_) {
            if (!channel_.registers().alternate_status().under_way()) {
                // Ended, or ending: its interrupt has until the next tick, then it counts as lost.
                if (std::exchange(suspect_, true)) {
                    take_without_interrupt(now);
                }
            } else if (unanswered()) {
                time_out(now);
            }
        }
        break;
    case State::reset_held:
        if (now - reset_at_ >= reset_hold) {
            channel_.release_reset(Control::none);
            settle_at_ = now;
            state_ = State::reset_released;
        }
        break;
    case State::reset_released:
        if (now - settle_at_ >= reset_settle) {
            const Status status = channel_.registers().status();
            if (!status.busy() && !status.floating()) {
                channel_.initialise_engine();
                state_ = State::idle;
                if (resets_in_a_row_ > max_resets) {
                    shut("fails one command after the other, whatever is reset");
                } else {
                    issue_next();
                }
            } else if (now >= executor_.end_of_bound(reset_at_, timeout_)) {
                shut("did not come back from a software reset");
            }
        }
        break;
    case State::idle:
    case State::closed: break;
    }
    charge();
}

template <PortAccess P>
void ChannelQueue<P>::take_without_interrupt(Instant now) {
    const Outcome outcome = channel_.look();
    if (!outcome.ended) {
        if (unanswered()) {
            time_out(now);
        }
        return;
    }
    if (++lost_ == 1) {
        log::warning("{}: a command ended without an interrupt", active_->name());
    }
    channel_.set_clear_always(true);
    finish(outcome);
}

/// The command under way has had no answer for a whole time-out. Its request ends; of several it may be any one: each
/// is tried alone.
template <PortAccess P>
void ChannelQueue<P>::time_out(Instant now) {
    Disk& disk = *active_;
    begin_reset(); // the engine is off: buffers are safe
    log::warning("{}: no answer to a command for {} ms, the channel is reset", disk.name(),
                 (now - issued_at_) / 1'000'000);
    const bool several = batch().size() > 1;
    while (io::Request* r = batch().pop()) {
        if (several) {
            disk.again.push(*r);
        } else {
            disk.end(*r, io::Status::timed_out);
        }
    }
    if (resets_in_a_row_ > max_resets) {
        shut("gives no answer, whatever is reset");
    }
}

template <PortAccess P>
void ChannelQueue<P>::begin_reset() {
    ++resets_;
    ++resets_in_a_row_;
    channel_.assert_reset();
    reset_at_ = executor_.now();
    state_ = State::reset_held;
}

template <PortAccess P>
void ChannelQueue<P>::shut(std::string_view why) {
    state_ = State::closed;
    for (Disk* disk : disks_) {
        if (disk == nullptr) {
            continue;
        }
        if (!why.empty()) {
            log::error("{}: the disk {}; it is closed", disk->name(), why);
        }
        if (active_ == disk) {
            while (io::Request* r = batch().pop()) {
                disk->end(*r, io::Status::device_gone);
            }
        }
        disk->end_waiting(io::Status::device_gone);
    }
}

/// Accesses and interrupts since the last time go to the disk that had the channel.
template <PortAccess P>
void ChannelQueue<P>::charge() {
    if (active_ == nullptr) {
        return;
    }
    io::Counters& to = active_->count();
    const u64 accesses = channel_.registers().accesses();
    const u64 in_handler = handler_accesses_.load(std::memory_order_relaxed);
    const u64 interrupts = handler_interrupts_.load(std::memory_order_relaxed);
    to.device_accesses += (accesses - charged_accesses_) + (in_handler - charged_handler_accesses_);
    to.interrupts += interrupts - charged_interrupts_;
    charged_accesses_ = accesses;
    charged_handler_accesses_ = in_handler;
    charged_interrupts_ = interrupts;
}

} // namespace fl::drivers::ata
