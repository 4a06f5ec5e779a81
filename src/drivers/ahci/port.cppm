// Register-level access to an AHCI port and its HBA. No queue and no policy. Every access of the driver to the device
// is made, and counted, in Port.
//
// Accesses of a 4 KiB read, alone, with NCQ and a message interrupt of its own:
//
//   #  access        why
//   1  write PxSACT  the tag, before the command is issued [ahci-1.3.1 §5.5.1]
//   2  write PxCI    issues the slot; one pair of writes for all commands of a turn
//   -  interrupt     the handler accesses nothing
//   3  write PxIS    clears the cause, before it is looked at, so that a later one interrupts again
//   4  write IS      likewise, after PxIS [ahci-1.3.1 §10.7.2.1]
//
// PxSACT is read only if the last Set Device Bits FIS, which the HBA has stored in memory, does not end everything
// that is under way. PxIS is read only when an interrupt ended no command: the bits of errors and of the link are not
// cleared by 3, so that they interrupt again.
export module drivers.ahci.port;
import core.std;
import core.mmio;
import core.time;
import drivers.ahci.protocol;

export namespace fl::drivers::ahci {

/// One port. Each copy has its own access count (the interrupt handler uses its own copy).
class Port {
  public:
    Port() = default;
    /// `abar`: the HBA's registers, which include this port's block.
    Port(Mmio abar, u32 number) : abar_(abar), number_(number), block_(first_port + number * port_bytes) {}

    template <class R>
    R read() {
        return ++accesses_, R::read(abar_, block_);
    }
    template <class R>
    void write(R value) {
        ++accesses_;
        value.write(abar_, block_);
    }
    inline u32 read(u64 at) { return ++accesses_, abar_.read<u32>(block_ + at); }
    inline void write(u64 at, u32 value) {
        ++accesses_;
        abar_.write<u32>(block_ + at, value);
    }
    u32 read_pending() { return ++accesses_, InterruptStatus::read(abar_).raw; }
    /// Clears bits of the HBA's interrupt status.
    inline void clear_pending(u32 ports) {
        ++accesses_;
        InterruptStatus::from(ports).write(abar_);
    }

    /// Sets PxCMD: FRE, POD, SUD, active, and ST as given. No other bit is ever set while the port is in use.
    void command(bool start, bool receive = true) {
        PortCommand c = PortCommand::of(PortCommand::pod, PortCommand::sud).set(PortCommand::icc, 1);
        write(c.set(PortCommand::fre, receive).set(PortCommand::st, start));
    }
    /// Clears ST, which withdraws all commands. True: the command list has stopped, and the HBA accesses none of its
    /// memory but the received FIS area; or the HBA is gone.
    bool stop(u32 reads = 1) {
        command(false);
        for (; reads != 0; --reads) {
            const PortCommand c = read<PortCommand>();
            if (c.raw == ~u32{0} || !c.get(PortCommand::cr)) {
                return true;
            }
        }
        return false;
    }
    bool stopped() { return !read<PortCommand>().get(PortCommand::cr); }
    bool established() { return read<SataStatus>().get(SataStatus::det) == SataStatus::established; }
    void comreset(bool on) { write(SataControl{}.set(SataControl::det, on ? 1 : 0)); }
    /// Clears PxSERR and PxIS.
    void clear_errors() {
        write(sata_error, ~u32{0});
        write(PortInterrupts::offset, ~u32{0});
    }

    /// Offset of a register of this port from ABAR.
    u64 at(u64 offset) const { return block_ + offset; }
    u32 number() const { return number_; }
    inline u32 bit() const { return u32{1} << number_; }
    inline u64 accesses() const { return accesses_; }

  private:
    Mmio abar_;
    u32 number_ = 0;
    u64 block_ = first_port;
    u64 accesses_ = 0;
};

} // namespace fl::drivers::ahci
