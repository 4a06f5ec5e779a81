// The command slots of a port, one bit each: issued, and found ended by the FIS that the device has sent or by the
// port's registers. Slots of an error are lost, and returned once the port runs again.
//
//   add ─> unissued ──issue──> issued ──find_ended──> done ──next_done──> (free)
//                                 └──lose──> lost ──give_back──> returned ──next_returned──> (free)
export module drivers.ahci.slots;
import core.std;
import core.result;
import core.time;
import drivers.ahci.protocol;
import drivers.ahci.port;
import drivers.ahci.memory;

export namespace fl::drivers::ahci {

class Slots {
  public:
    Slots(Port& port, const PortMemory& memory) : port_(port), memory_(memory) {}

    /// Those in use are commands with NCQ.
    inline bool queued() const { return queued_; }
    /// Queued and other commands exclude each other, and of the others there is at most one.
    inline bool has_room(bool queued) const {
        return returned_ == 0 && ((issued_ | unissued_) == 0 || (queued_ && queued));
    }
    inline void add(u32 slot, bool queued) {
        queued_ = queued;
        unissued_ |= u32{1} << slot;
    }
    inline u32 unissued() const { return unissued_; }
    inline u32 issued() const { return issued_; }
    inline void issue() {
        if (queued_) [[likely]] {
            port_.write(sata_active, unissued_);
        } else {
            memory_.forget(ReceivedFis::register_at); // may be of a queued command that the device has accepted
        }
        port_.write(command_issue, unissued_);
        issued_ |= std::exchange(unissued_, 0);
    }
    /// One that is not issued ends here. False: it is issued.
    bool withdraw(u32 slot) {
        const u32 bit = unissued_ & u32{1} << slot;
        unissued_ ^= bit;
        done_ |= bit;
        return bit != 0;
    }

    /// The slots that an interrupt has ended. Error{device_gone}: the HBA was removed; Error{protocol}: it shows
    /// commands that were never issued.
    inline Result<u32> find_ended() {
        const u32 ended = ended_by_fis();
        return ended == issued_ ? ended : ended_by_registers(); // the FIS is of the last ones only
    }
    /// Without an interrupt: commands that the last FIS of the device in memory may end, each FIS once. The HBA stores
    /// it before it clears their bits in its registers [ahci-1.3.1 §5.3], so they are to be looked up there.
    inline u32 announced() const {
        if (queued_) {
            const u32 at = ReceivedFis::bits_at + 4;
            return memory_.received(at) != 0 ? memory_.take(at) & issued_ : 0;
        }
        const FisHead head = FisHead::from(memory_.received(ReceivedFis::register_at));
        return head.get(FisHead::type) == ReceivedFis::register_type ? issued_ : 0; // forgotten by issue()
    }
    /// The slots that the HBA shows as ended, in one access. Errors: as find_ended().
    inline Result<u32> ended_by_registers() {
        const u32 busy = port_.read(queued_ ? sata_active : command_issue);
        if ((busy & ~issued_) != 0) [[unlikely]] {
            return busy == ~u32{0}
                       ? Error{Code::device_gone, "all registers read as ones: the HBA was removed"}
                       : Error{Code::protocol, "the HBA shows commands that were never issued (PxSACT, PxCI)", issued_,
                               busy};
        }
        return issued_ & ~busy;
    }
    inline void end(u32 slots) {
        issued_ &= ~slots;
        done_ |= slots;
    }
    /// After ended_by_registers(): a FIS of these is not to be taken for the answer to a later command.
    inline void forget_fis() const { memory_.forget(queued_ ? ReceivedFis::bits_at : ReceivedFis::register_at); }
    inline bool any_done() const { return done_ != 0; }
    inline u32 next_done() { return next(done_); }

    /// The port is restarted: the device forgets the commands. True: there were some.
    bool lose() {
        lost_ |= std::exchange(issued_, 0);
        return lost_ != 0;
    }
    /// The port runs again.
    void give_back() { returned_ = std::exchange(lost_, 0); }
    inline bool any_returned() const { return returned_ != 0; }
    u32 next_returned() { return next(returned_); }
    void forget() { issued_ = unissued_ = done_ = lost_ = returned_ = 0; }

  private:
    static inline u32 next(u32& slots) {
        const u32 slot = static_cast<u32>(std::countr_zero(slots));
        slots &= slots - 1;
        return slot;
    }
    /// The commands that the last FIS of the device in memory ends. The HBA interrupts for it after it has cleared
    /// their bits in its registers [ahci-1.3.1 §5.3].
    inline u32 ended_by_fis() const {
        const u32 at = queued_ ? ReceivedFis::bits_at : ReceivedFis::register_at;
        const FisHead head = FisHead::from(memory_.received(at));
        const u8 type = queued_ ? ReceivedFis::bits_type : ReceivedFis::register_type;
        const ata::Status status{head.get(FisHead::status)};
        if (head.get(FisHead::type) != type || status.error() || status.device_fault() || status.in_progress()) {
            return 0;
        }
        const u32 ended = queued_ ? memory_.received(at + 4) & issued_ : issued_;
        memory_.forget(at); // not to be taken for the answer to a later command
        return ended;
    }

    Port& port_;
    const PortMemory& memory_;
    u32 unissued_ = 0;   // not issued before issue()
    u32 issued_ = 0;     // the device has them
    u32 done_ = 0;       // ended without an error
    u32 lost_ = 0;       // were issued when the port had to be restarted
    u32 returned_ = 0;   // of these, after the restart, those that next_returned() has not returned
    bool queued_ = true; // those in unissued_ and issued_
};

/// Finds an interrupt that was lost: its cause stays in the port's registers for a whole tick.
class LostInterrupt {
  public:
    /// Without an interrupt for this long the port is polled in each tick.
    static constexpr Nanoseconds after = 20'000'000;

    inline void issued(Instant now) {
        since_ = now;
        suspect_ = false;
    }
    /// The last tick saw the cause of an interrupt that has not occurred.
    bool suspect() const { return suspect_; }
    /// True: the interrupt was lost, and the handler has not cleared its cause. Once.
    inline bool take() { return std::exchange(found_, false); }
    /// In a tick while commands are issued and no interrupt is pending. True: it was lost.
    bool check(Port& port, Instant now);

  private:
    bool suspect_ = false;
    bool found_ = false;
    Instant since_ = 0;
    bool reported_ = false;
};

} // namespace fl::drivers::ahci
