// A channel's queue together with the channel's interrupt: opening and closing.
export module drivers.ata.channel_queue;
import core.std;
import core.dma;
import core.interrupt;
import core.result;
import core.time;
import io.executor;
import io.block_queue;
import drivers.ata.channel;
import drivers.ata.protocol;
import drivers.ata.reset;
export import drivers.ata.queue;

export namespace fl::drivers::ata {

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
    u64 resets() { return this->transport().reset().count(); }
    /// The write cache of `unit` was switched off: it must be after each reset, before any other command.
    void keep_write_through(u8 unit) { this->transport().reset().keep_write_through(unit); }
    bool closed() const { return interrupts_ != nullptr && !this->is_open(); }

  private:
    InterruptController* interrupts_ = nullptr;
    InterruptLine line_;
    Nanoseconds timeout_;
};

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

} // namespace fl::drivers::ata
