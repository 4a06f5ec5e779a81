// The registers of an 8254x controller: reset, hardware address, starting and stopping, interrupts, tails. No ring and
// no policy. Every access of the driver is made, and counted, here.
//
//   access          when
//   TDT, RDT        once per turn that has sent frames, or taken received ones
//   IMC             by the handler of the interrupt: masks everything, which lowers the line
//   ICR, IMS        once each before the processor sleeps again after an interrupt
//   STATUS          after a change of the link
//   others          set-up, reset
export module drivers.e1000.adapter;
import core.std;
import core.mmio;
import core.result;
import core.time;
import io.executor;
import io.net;
import io.task;
import drivers.e1000.protocol;

export namespace fl::drivers::e1000 {

/// Where a ring is, for the card.
struct RingPlace {
    u64 bus = 0;
    u32 bytes = 0;
    u32 tail = 0;
};

class Adapter {
  public:
    /// `registers`: register_bytes. Call before anything else.
    void open(Mmio registers) { registers_ = registers; }
    bool absent() { return Status::from(read(Status::offset)).absent(); }
    /// The hardware address, from the receive address registers or else from the EEPROM. Changes nothing.
    /// Error{protocol}: neither holds one that a station can have.
    io::Task<Result<io::MacAddress>> address(io::Executor& executor, Nanoseconds bound);
    /// Stops the card and resets it; afterwards it accesses no memory. Error{timed_out}: it does not come out of the
    /// reset; Error{device_gone}: it does not answer.
    io::Task<Result<void>> reset(io::Executor& executor, Nanoseconds bound);
    /// After a reset: the card takes frames for `own` and broadcasts. Interrupts stay masked.
    void start(const io::MacAddress& own, RingPlace receive, RingPlace transmit);
    /// Takes the card's receiver and transmitter off. It may still be in the middle of an access to memory.
    void stop();

    bool link_up() { return Status::from(read(Status::offset)).has(Status::lu); }
    void send_up_to(u32 tail) { write(transmit_ring + ring_tail, tail); }
    void offer_up_to(u32 tail) { write(receive_ring + ring_tail, tail); }
    /// The causes since the last call; all ones: the card does not answer.
    u32 take_causes() { return read(cause_read); }
    void unmask(u32 causes) { write(mask_set, causes); }
    /// From the handler.
    void mask_in_handler() {
        registers_.write<u32>(mask_clear, ~u32{0});
        in_handler_.store(in_handler_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    }
    /// Register accesses since the last call.
    u32 take_accesses() { return std::exchange(accesses_, 0) + in_handler_.exchange(0, std::memory_order_relaxed); }

  private:
    io::Task<Result<u16>> eeprom_word(io::Executor& executor, Nanoseconds bound, u8 number);
    u32 read(u64 at) { return ++accesses_, registers_.read<u32>(at); }
    void write(u64 at, u32 value) {
        ++accesses_;
        registers_.write<u32>(at, value);
    }
    void place(u64 ring, RingPlace at);

    Mmio registers_;
    u32 accesses_ = 0;
    std::atomic<u32> in_handler_{0}; // relaxed: the handler runs on the card's processor, and only counts
};

} // namespace fl::drivers::e1000
