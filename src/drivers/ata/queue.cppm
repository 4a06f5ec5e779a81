// An IDE channel as an io.block_queue transport: the commands of its one or two disks, one at a time, completion by
// interrupt, recovery by software reset.
//
//   idle ──send()──> running ──next()──> idle or running (the next command is sent before requests complete)
//                        │ no answer, DMA error, an abandoned buffer
//                        v
//                     resetting [drivers.ata.reset] ──tick──> idle, or closed
//
// Adjacent reads (or writes) are merged into one command: fewer commands, but each request still ends separately. If
// such a command fails, or is not answered, its requests are resent one by one, so that a bad sector affects only the
// request that covers it.
export module drivers.ata.queue;
import core.std;
import core.result;
import core.text;
import core.log;
import core.time;
import core.dma;
import core.dma_mapper;
import core.interrupt;
import io.executor;
import io.block;
import io.block_queue;
import io.oldest_wait;
import drivers.ata.protocol;
import drivers.ata.channel;
import drivers.ata.interrupts;
import drivers.ata.reset;
export import drivers.ata.disk;

export namespace fl::drivers::ata {

template <PortAccess P>
class Disk;

template <PortAccess P>
class Transport : public io::TransportDefaults {
  public:
    using Disk = ata::Disk<P>;
    struct Wire {};
    using Command = io::Command<Transport>;
    static constexpr std::string_view driver = "ata";
    static constexpr u32 max_commands = 1;
    static constexpr bool gathers = true;
    static constexpr u32 max_idle_events = 100'000;  // a shared line is masked by its interrupt controller, not here
    static constexpr u32 max_transfer = 1024 * 1024; // bytes per command
    static constexpr u32 bounce_bytes = 64 * 1024;   // for memory beyond the engine's 32-bit range
    /// Limits of the bus-master engine [channel's add_region() splits memory within them].
    static constexpr DmaLimits limits{.highest = 0xffff'ffff, .boundary = Prd::boundary, .max_segment = Prd::boundary};
    // without an interrupt for this long it is polled in each tick
    static constexpr Nanoseconds lost_after = 20'000'000;
    static constexpr u32 max_reports = 16; // log lines about failed commands

    Transport(io::Executor& executor, DmaAllocator& dma, P ports, ChannelPorts at, DmaSpan table, Nanoseconds timeout)
        : executor_(executor), mapper_(dma, bounce_bytes), interrupts_(executor, ports, at),
          channel_(std::move(ports), at, table), reset_(executor, channel_, timeout), timeout_(timeout) {}

    Channel<P>& channel() { return channel_; }
    void start_counting() { charged_accesses_ = channel_.registers().accesses(); }
    /// `shared`: the line is shared with other devices: the handler checks the device.
    void open(bool shared) {
        interrupts_.set_shared(shared);
        reset_.abort();
        running_ = false;
    }
    /// The queue is about to close: from now on abandoning a command stops the device instead of resetting it.
    void begin_close() { closing_ = true; }
    static void on_interrupt(void* self) {
        auto& transport = *static_cast<Transport*>(self);
        transport.interrupts_.on_interrupt(*transport.queue);
    }
    u64 lost_interrupts() const { return lost_; }
    u64 resets() const { return reset_.count(); }

    // io::BlockTransport
    void use(io::CommandTable<Transport>& commands) { commands_ = &commands; }
    io::Fit prepare(Command& command);
    bool join(Command& command, const io::Request& next);
    io::SendResult send(Command& command, u64 id);
    io::Next next(io::Completion& completion);
    void settle(io::Counters& counters);
    Result<bool> arm() { return polled_.has_value() || interrupts_.pending(); }
    u32 events() const { return interrupts_.count(); }
    bool finish(Command& command, io::Status status);
    io::Fence fence(Command& command);
    io::Recovery recover(const Command& command, io::OldestWait::Finding finding, std::string_view names);
    Result<void> tick(Instant now, bool waiting);
    bool wants_tick() const { return running_ || reset_.in_progress(); }
    bool closing(io::Status) {
        begin_close();
        return true;
    }

  private:
    u32 limit(const Command& command) const;
    io::Completion ended(const Outcome& outcome);
    io::Completion failed(const Outcome& outcome);
    void limit_gathering();
    void begin_reset(bool by_owner = false);
    void poll_running(Instant now);

    io::Executor& executor_;
    BounceMapper mapper_; // its pool is allocated on first use, which most machines never need
    ChannelInterrupts<P> interrupts_;
    Channel<P> channel_;
    SoftReset<P> reset_;
    Nanoseconds timeout_;
    io::CommandTable<Transport>* commands_ = nullptr;
    bool running_ = false; // a command is under way
    bool closing_ = false;

    // The current command.
    Command* active_ = nullptr;
    u64 id_ = 0;
    bool ended_at_last_tick_ = false; // had ended at the last tick, but no interrupt was seen
    bool busy_ = true;                // in progress at the last tick
    Instant issued_at_ = 0;
    std::optional<io::Completion> polled_; // result of a command that ended without an interrupt
    u32 gather_limit_ = max_transfer;      // bytes of a command made of several requests
    u32 reports_ = 0;
    std::array<DmaSegment, max_transfer / Prd::boundary + 1> segments_{};
    DmaMapping mapping_{segments_}; // active: the command's data uses a bounce buffer

    u64 charged_accesses_ = 0;
    u64 charged_handler_accesses_ = 0;
    u64 commands_issued_ = 0;
    u64 charged_commands_ = 0;
    u64 lost_ = 0;
};

/// A channel's queue with its interrupt.
template <PortAccess P>
class ChannelQueue final : public io::BlockQueue<Transport<P>> {
  public:
    using Base = io::BlockQueue<Transport<P>>;
    static constexpr Nanoseconds reset_hold = SoftReset<P>::hold;
    static constexpr Nanoseconds reset_settle = SoftReset<P>::settle;

    ChannelQueue(io::Executor& executor, DmaAllocator& dma, P ports, ChannelPorts at, DmaSpan table,
                 Nanoseconds timeout)
        : Base(executor, executor, dma, std::move(ports), at, table, timeout), timeout_(timeout) {}
    ~ChannelQueue() { close(); }

    Channel<P>& channel() { return this->transport().channel(); }
    /// Excludes the accesses made while attaching from the disks' counters.
    void start_counting() { this->transport().start_counting(); }
    /// Accepts requests from now on. `line`: the interrupt, known to be this channel's.
    Result<void> open(InterruptController& interrupts, InterruptLine line);
    /// Stops the device, ends all requests with device_gone, releases the interrupt.
    void close();
    u64 lost_interrupts() const { return this->transport().lost_interrupts(); }
    u64 resets() const { return this->transport().resets(); }
    bool closed() const { return interrupts_ != nullptr && !this->is_open(); }

  private:
    InterruptController* interrupts_ = nullptr;
    InterruptLine line_;
    Nanoseconds timeout_;
};

template <PortAccess P>
class Disk final : public io::QueueDisk<Transport<P>> {
  public:
    Disk(io::Executor& executor, ChannelQueue<P>& queue, u8 unit)
        : io::QueueDisk<Transport<P>>(executor, queue), unit_(unit) {}

    /// Call before the disk is announced; see describe_disk().
    void configure(const DriveInfo& info, std::string_view name, bool flushes, bool words) {
        info_ = info;
        const Description description = describe_disk(info, name, flushes, words);
        this->identity_ = description.identity;
        this->set_geometry(description.geometry);
    }
    u8 unit() const { return unit_; }
    const DriveInfo& info() const { return info_; }
    std::string_view name() const { return this->identity_.name; }

  private:
    u8 unit_;
    DriveInfo info_;
};

// ---- opening and closing ----

template <PortAccess P>
Result<void> ChannelQueue<P>::open(InterruptController& interrupts, InterruptLine line) {
    this->transport().open(!line.isa);
    if (auto attached = interrupts.attach_line(line, &Transport<P>::on_interrupt, &this->transport()); !attached) {
        return attached.error();
    }
    interrupts_ = &interrupts;
    line_ = line;
    Base::open(timeout_);
    return {};
}

template <PortAccess P>
void ChannelQueue<P>::close() {
    if (interrupts_ == nullptr) {
        return;
    }
    this->transport().begin_close();
    this->stop();
    this->transport().channel().stop();
    std::exchange(interrupts_, nullptr)->detach_line(line_, &Transport<P>::on_interrupt, &this->transport());
}

// ---- sending ----

template <PortAccess P>
u32 Transport<P>::limit(const Command& command) const { // 28-bit commands only: at most 256 sectors
    const u32 sector = command.disk().geometry().sector_size;
    return command.disk().info().lba48 ? max_transfer : std::min(max_transfer, lba28_max_count * sector);
}

template <PortAccess P>
io::Fit Transport<P>::prepare(Command& command) {
    if (running_ || reset_.in_progress()) {
        return io::Fit::full;
    }
    if (command.op == io::Op::flush) {
        return io::Fit::ok;
    }
    if (command.op > io::Op::write) {
        command.refusal = io::Status::not_supported;
        return io::Fit::refused;
    }
    channel_.begin_table();
    const DmaSpan data = command.data();
    if (limits.admits(command.first->buffer)) [[likely]] {
        command.bytes = std::min(command.bytes, limit(command));
        static_cast<void>(channel_.add_region(data.bus, command.bytes)); // an empty table holds 1 MiB at any alignment
        return io::Fit::ok;
    }
    DmaLimits limited = limits;
    limited.granule = command.disk().geometry().sector_size;
    const auto mapped =
        mapper_.map({&data, 1}, command.op == io::Op::write ? DmaDirection::to_device : DmaDirection::from_device,
                    limited, mapping_);
    if (!mapped) {
        log::error("{}: no memory below 4 GiB to reach a buffer above it: {}", command.disk().name(), mapped.error());
        command.refusal = io::Status::io_error;
        return io::Fit::refused;
    }
    command.bytes = *mapped;
    for (const DmaSegment& segment : mapping_.segments()) {
        static_cast<void>(channel_.add_region(segment.bus, segment.size));
    }
    return io::Fit::ok;
}

template <PortAccess P>
bool Transport<P>::join(Command& command, const io::Request& next) {
    return command.op <= io::Op::write && !mapping_.active() && next.buffer.size <= limit(command) - command.bytes &&
           command.bytes + next.buffer.size <= gather_limit_ && limits.admits(next.buffer) &&
           channel_.add_region(next.buffer.bus, next.buffer.size);
}

template <PortAccess P>
io::SendResult Transport<P>::send(Command& command, u64 id) {
    active_ = &command;
    id_ = id;
    ended_at_last_tick_ = false;
    busy_ = true;
    interrupts_.discard();
    const Disk& disk = command.disk();
    if (command.op == io::Op::flush) {
        channel_.issue(disk.unit(), disk.info().flush_ext ? ata::Command::flush_cache_ext : ata::Command::flush_cache);
    } else {
        const u32 count = command.bytes / disk.geometry().sector_size;
        const bool wide = command.lba + count > lba28_sectors || count > lba28_max_count;
        channel_.issue({.unit = disk.unit(),
                        .write = command.op == io::Op::write,
                        .wide = wide,
                        .lba = command.lba,
                        .count = count});
    }
    ++commands_issued_;
    running_ = true;
    issued_at_ = executor_.now();
    return io::SendResult::sent;
}

// Stops an idle engine. Charges the accesses since the last call to the disk that had the channel.
template <PortAccess P>
void Transport<P>::settle(io::Counters& counters) {
    if (!running_ && !reset_.in_progress()) {
        channel_.stop();
    }
    const u64 accesses = channel_.registers().accesses();
    const u64 in_handler = interrupts_.accesses();
    counters.device_accesses += (accesses - charged_accesses_) + (in_handler - charged_handler_accesses_);
    counters.notifications += commands_issued_ - charged_commands_;
    charged_accesses_ = accesses;
    charged_handler_accesses_ = in_handler;
    charged_commands_ = commands_issued_;
}

// ---- answers ----

template <PortAccess P>
io::Next Transport<P>::next(io::Completion& completion) {
    if (polled_) [[unlikely]] {
        completion = *std::exchange(polled_, std::nullopt);
        return io::Next::one;
    }
    if (!interrupts_.take() || !running_) {
        return io::Next::none;
    }
    const Outcome outcome = interrupts_.poll(channel_);
    if (!outcome.ended) {
        return io::Next::none;
    }
    completion = ended(outcome);
    return io::Next::one;
}

template <PortAccess P>
io::Completion Transport<P>::ended(const Outcome& outcome) {
    running_ = false;
    const bool transfer = active_->op != io::Op::flush;
    if (!outcome.ok(transfer)) {
        channel_.stop();
        return failed(outcome);
    }
    reset_.succeeded();
    if (transfer) {
        limit_gathering();
    }
    return {id_, io::Status::ok};
}

/// Keeps gathered commands from making a slow disk look silent: at the speed of the last command, the next one takes
/// at most a quarter of a timeout, and at most one second.
template <PortAccess P>
void Transport<P>::limit_gathering() {
    const Nanoseconds enough = std::min<Nanoseconds>(timeout_ / 4, 1'000'000'000);
    // so that the product fits into 64 bits
    const Nanoseconds took = std::min<Nanoseconds>(executor_.now() - issued_at_, 1'000'000'000'000);
    const u32 bytes = active_->bytes;
    gather_limit_ = took * max_transfer > enough * bytes ? static_cast<u32>(enough * bytes / took) : max_transfer;
}

template <PortAccess P>
io::Completion Transport<P>::failed(const Outcome& outcome) {
    const ErrorRegister error = outcome.status.error() ? channel_.error() : ErrorRegister{};
    const bool media = outcome.status.error() && (error.uncorrectable() || error.id_not_found());
    // ICRC is set together with ABRT [ACS §6.3]; ABRT alone is a refusal, which a retry would not change.
    const bool garbled = outcome.status.error() && error.interface_crc();
    const bool cut_short = outcome.bus.active() && !media && !error.aborted();
    const bool transport = active_->op != io::Op::flush && (outcome.bus.error() || garbled || cut_short);
    if (reports_ < max_reports) {
        FixedText<160> text;
        describe(text, outcome.status, error, outcome.bus);
        log::warning("{}: {} of {} bytes at LBA {} failed: {}{}", active_->disk().name(), active_->op, active_->bytes,
                     active_->lba, text, ++reports_ == max_reports ? " (further ones are not shown)" : "");
    }
    if (transport) {
        begin_reset();
    }
    return {id_, io::Status::io_error, transport ? io::Retry::alone : io::Retry::none};
}

template <PortAccess P>
bool Transport<P>::finish(Command& command, io::Status status) {
    if (mapping_.active()) [[unlikely]] {
        const DmaSpan data = status == io::Status::ok && command.first != nullptr ? command.data() : DmaSpan{};
        mapper_.unmap(mapping_, data.empty() ? std::span<const DmaSpan>() : std::span(&data, 1));
    }
    return true;
}

// ---- timeouts ----

template <PortAccess P>
Result<void> Transport<P>::tick(Instant now, bool) {
    if (running_) {
        poll_running(now);
        return {};
    }
    return reset_.tick(now);
}

/// Handles a command without an interrupt so far. If it has ended, and there is still no interrupt in the next tick,
/// the interrupt is lost.
template <PortAccess P>
void Transport<P>::poll_running(Instant now) {
    if (now <= issued_at_ || now - issued_at_ < lost_after || polled_) {
        return;
    }
    busy_ = channel_.registers().alternate_status().in_progress();
    if (busy_ || !std::exchange(ended_at_last_tick_, true)) {
        return;
    }
    const Outcome outcome = channel_.poll();
    busy_ = !outcome.ended;
    if (!outcome.ended) {
        return;
    }
    if (++lost_ == 1) {
        log::warning("{}: a command ended without an interrupt", active_->disk().name());
    }
    channel_.set_clear_always(true);
    polled_ = ended(outcome);
}

/// The command was not answered for a full timeout.
template <PortAccess P>
io::Recovery Transport<P>::recover(const Command& command, io::OldestWait::Finding, std::string_view) {
    if (!busy_ || polled_ || !running_) {
        return {.kind = io::Recovery::Kind::none};
    }
    log::warning("{}: no answer to a command for {} ms, the channel is reset", command.disk().name(),
                 (executor_.now() - issued_at_) / 1'000'000);
    begin_reset(); // the engine is off: buffers are safe
    return {.kind = io::Recovery::Kind::stopped,
            .why = reset_.exhausted()
                       ? std::optional(Error{Code::timed_out, "the disk does not answer, even after resets"})
                       : std::nullopt};
}

/// The device may be writing to a buffer that is about to be freed. Stopping the engine takes effect at once; the
/// disk itself is reset.
template <PortAccess P>
io::Fence Transport<P>::fence(Command&) {
    if (closing_) {
        channel_.stop();
        // A flush cannot be stopped: its interrupt would keep a shared line asserted.
        channel_.registers().control(Control::interrupts_off);
        reset_.abort();
        running_ = false;
    } else {
        begin_reset(true);
    }
    return io::Fence::stopped;
}

template <PortAccess P>
void Transport<P>::begin_reset(bool by_owner) {
    polled_.reset();
    running_ = false;
    reset_.begin(by_owner);
}

} // namespace fl::drivers::ata
