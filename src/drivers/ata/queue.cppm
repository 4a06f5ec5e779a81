// An IDE channel as an io.block_queue transport: the commands of its one or two disks, one at a time, completion by
// interrupt, recovery by software reset. The commands' data is in drivers.ata.data.
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
import io.executor;
import io.block;
import io.block_queue;
import io.oldest_wait;
import drivers.ata.protocol;
import drivers.ata.channel;
import drivers.ata.data;
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
    static constexpr u32 max_idle_events = 100'000; // a shared line is masked by its interrupt controller, not here
    static constexpr u32 max_transfer = CommandData<P>::max_transfer; // bytes per command
    static constexpr u32 max_reports = 16;                            // log lines about failed commands

    Transport(io::Executor& executor, DmaAllocator& dma, P ports, ChannelPorts at, DmaSpan table, Nanoseconds timeout)
        : executor_(executor), interrupts_(executor, ports, at), channel_(std::move(ports), at, table),
          data_(channel_, dma, timeout), reset_(executor, channel_, timeout) {}

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
    u64 lost_interrupts() const { return lost_.count(); }
    SoftReset<P>& reset() { return reset_; }

    // io::BlockTransport
    void use(io::CommandTable<Transport>& commands) { commands_ = &commands; }
    io::Fit prepare(Command& command);
    bool join(Command& command, const io::Request& next) { return data_.join(command, command.disk().info(), next); }
    io::SendResult send(Command& command, u64 id);
    io::Next next(io::Completion& completion);
    void settle(io::Counters& counters);
    Result<bool> arm() { return polled_.has_value() || interrupts_.pending(); }
    u32 events() const { return interrupts_.count(); }
    bool finish(Command& command, io::Status status) {
        data_.finish(command, status == io::Status::ok);
        return true;
    }
    io::Fence fence(Command& command);
    io::Recovery recover(const Command& command, io::OldestWait::Finding finding, std::string_view names);
    Result<void> tick(Instant now, bool waiting);
    bool wants_tick() const { return running_ || reset_.in_progress(); }
    bool closing(io::Status) {
        begin_close();
        return true;
    }

  private:
    io::Completion ended(const Outcome& outcome);
    io::Completion failed(const Outcome& outcome);
    void begin_reset(bool by_owner = false);

    io::Executor& executor_;
    ChannelInterrupts<P> interrupts_;
    Channel<P> channel_;
    CommandData<P> data_;
    SoftReset<P> reset_;
    io::CommandTable<Transport>* commands_ = nullptr;
    bool running_ = false; // a command is under way
    bool closing_ = false;

    // The current command.
    Command* active_ = nullptr;
    u64 id_ = 0;
    LostInterrupt<P> lost_;
    std::optional<io::Completion> polled_; // result of a command that ended without an interrupt
    u32 reports_ = 0;

    u64 charged_accesses_ = 0;
    u64 charged_handler_accesses_ = 0;
    u64 commands_issued_ = 0;
    u64 charged_commands_ = 0;
};

template <PortAccess P>
class Disk final : public io::QueueDisk<Transport<P>> {
  public:
    Disk(io::Executor& executor, io::BlockQueue<Transport<P>>& queue, u8 unit)
        : io::QueueDisk<Transport<P>>(executor, queue), unit_(unit) {}

    /// Call before the disk is announced; see describe_disk().
    void configure(const DriveInfo& info, std::string_view name, const Usage& usage) {
        info_ = info;
        const Description description = describe_disk(info, name, usage);
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

// ---- sending ----

template <PortAccess P>
io::Fit Transport<P>::prepare(Command& command) {
    if (running_ || reset_.in_progress()) {
        return io::Fit::full;
    }
    if (command.op == io::Op::flush) {
        return io::Fit::ok;
    }
    if (!io::has_data(command.op)) {
        command.refusal = io::Status::not_supported;
        return io::Fit::refused;
    }
    const Disk& disk = command.disk();
    return data_.describe(command, disk.info()) ? io::Fit::ok : data_.bounce(command, disk.info(), disk.name());
}

template <PortAccess P>
io::SendResult Transport<P>::send(Command& command, u64 id) {
    active_ = &command;
    id_ = id;
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
    lost_.sent(executor_.now());
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
        data_.moved(active_->bytes, executor_.now() - lost_.sent_at());
    }
    return {id_, io::Status::ok};
}

template <PortAccess P>
io::Completion Transport<P>::failed(const Outcome& outcome) {
    const ErrorRegister error = outcome.status.error() ? channel_.error() : ErrorRegister{};
    const bool transport = active_->op != io::Op::flush && outcome.in_transfer(error);
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

// ---- timeouts ----

template <PortAccess P>
Result<void> Transport<P>::tick(Instant now, bool) {
    if (!running_) {
        return reset_.tick(now);
    }
    if (!polled_) {
        if (const auto outcome = lost_.tick(now, channel_, active_->disk().name())) {
            polled_ = ended(*outcome);
        }
    }
    return {};
}

/// The command was not answered for a full timeout.
template <PortAccess P>
io::Recovery Transport<P>::recover(const Command& command, io::OldestWait::Finding, std::string_view) {
    if (!lost_.busy() || polled_ || !running_) {
        return {.kind = io::Recovery::Kind::none};
    }
    log::warning("{}: no answer to a command for {} ms, the channel is reset", command.disk().name(),
                 (executor_.now() - lost_.sent_at()) / 1'000'000);
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
