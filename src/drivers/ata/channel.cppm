// Register-level access to an IDE channel: issue a command, check for its end, stop, reset. No queue and no policy.
// Every device access of the driver is made, and counted, in Registers.
//
// An access costs thousands of instructions with an emulated controller, and a microsecond with a real one: each must
// be justified. A DMA command with 28-bit addresses:
//
//   #  access                             why
//   1  out16 sector count, LBA low        adjacent registers: one access if attach() found that words work
//   2  out16 LBA mid, LBA high            likewise, else two accesses each
//   3  out16 device, command              likewise; device holds LBA 27:24; writing the command starts it [ATA-7 §9]
//   4  out8  bus-master command: start    the engine starts on the transition from 0 to 1 [BMIDE §2.1]
//   -  interrupt
//   5  in8   status                       BSY = DRQ = 0: ended; ERR, DF: how; clears the interrupt [ATA-7 §6.14]
//   6  in8   bus-master status            Error, and Active = 0: all data has arrived in memory [BMIDE §2.2]
//   7  out8  bus-master command: stop     required for the next transition from 0 to 1
//
// Accesses omitted, and why that is correct:
// - The table's address: a channel has one table, so it is written once [BMIDE §2.3 keeps no state in that register].
// - Polling before a command: the status that ended the last command had BSY = DRQ = 0, and nothing else issues
//   commands. The channel's other device is selected, and polled, when the device bit changes [ATA-7 §9.4].
// - The direction is written only when it changes [BMIDE §2.1]. That is free for consecutive commands: the write that
//   stops one command (whose engine is no longer active) sets the direction of the next.
// - Clearing the bus-master interrupt bit: the bit identifies the source on a shared line, and is cleared there each
//   time. An ISA line (IRQ 14, 15) belongs to its channel alone and status shows whether the command has ended, so
//   the bit stays set. If an interrupt is ever lost, set_clear_always() enables the clearing.
// A 48-bit command has five pairs instead of three (two values for each register except device); without words each
// pair takes two accesses.
export module drivers.ata.channel;
import core.std;
import core.dma;
import drivers.ata.protocol;

export namespace fl::drivers::ata {

/// I/O ports, by width. out16 to an even port acts on an 8-bit register pair as two byte accesses in ascending
/// address order, if the bus supports that (attach() tests it). Accesses are ordered with memory: earlier stores are
/// in memory before the device sees out8().
template <class P>
concept PortAccess =
    std::movable<P> && requires(P& ports, u16 port, u8 value8, u16 value16, u32 value32, u16* words, u64 count) {
        { ports.in8(port) } -> std::same_as<u8>;
        ports.out8(port, value8);
        ports.out16(port, value16);
        ports.out32(port, value32);
        ports.in16_string(port, words, count);
    };

/// I/O ports of a channel's registers.
struct ChannelPorts {
    u16 command = 0;    // first of the 8 command block registers
    u16 control = 0;    // device control and alternate status
    u16 bus_master = 0; // first of 8
};

/// The only code that accesses the device. Each copy has its own access count (the interrupt handler uses its own
/// copy).
template <PortAccess P>
class Registers {
  public:
    Registers(P ports, ChannelPorts at) : ports_(std::move(ports)), at_(at) {}

    u8 read(Register r) { return ++accesses_, ports_.in8(port(r)); }
    void write(Register r, u8 value) {
        ++accesses_;
        ports_.out8(port(r), value);
    }
    /// `low` goes to `r`, `high` to the next register.
    void write_word(Register r, u8 low, u8 high) {
        ++accesses_;
        ports_.out16(port(r), static_cast<u16>(low | high << 8));
    }
    Status status() { return {read(Register::status)}; }
    Status alternate_status() { return ++accesses_, Status{ports_.in8(at_.control)}; }
    void control(Control value) {
        ++accesses_;
        ports_.out8(at_.control, to_underlying(value));
    }
    void read_data(std::span<u16> words) {
        ++accesses_; // one string instruction
        ports_.in16_string(port(Register::data), words.data(), words.size());
    }
    BusMasterStatus bus_status() { return ++accesses_, BusMasterStatus{ports_.in8(port(BusMaster::status))}; }
    void bus_status(u8 value) {
        ++accesses_;
        ports_.out8(port(BusMaster::status), value);
    }
    void bus_command(u8 value) {
        ++accesses_;
        ports_.out8(port(BusMaster::command), value);
    }
    void bus_table(u32 address) {
        ++accesses_;
        ports_.out32(port(BusMaster::table), address);
    }
    u64 accesses() const { return accesses_; }
    const ChannelPorts& at() const { return at_; }

  private:
    u16 port(Register r) const { return static_cast<u16>(at_.command + to_underlying(r)); }
    u16 port(BusMaster r) const { return static_cast<u16>(at_.bus_master + to_underlying(r)); }

    P ports_;
    ChannelPorts at_;
    u64 accesses_ = 0;
};

/// A transfer of whole sectors. `count` is 1 to 256, or 1 to 65536 if `wide` (48-bit command).
struct TransferCommand {
    u8 unit = 0;
    bool write = false;
    bool wide = false;
    u64 lba = 0;
    u32 count = 0;
};

/// State of a command. If `ended` is false the other members are invalid.
struct Outcome {
    bool ended = false;
    Status status{};
    BusMasterStatus bus{};

    constexpr bool ok(bool transfer) const {
        return ended && !status.error() && !status.device_fault() && (!transfer || (!bus.error() && !bus.active()));
    }
    /// Whether a failed command failed on the way, and not on the medium: a retry may succeed.
    constexpr bool in_transfer(ErrorRegister error) const {
        const bool media = status.error() && (error.uncorrectable() || error.id_not_found());
        // ICRC is set together with ABRT [ACS §6.3]; ABRT alone is a refusal, which a retry would not change.
        const bool garbled = status.error() && error.interface_crc();
        const bool cut_short = bus.active() && !media && !error.aborted();
        return bus.error() || garbled || cut_short;
    }
};

template <PortAccess P>
class Channel {
  public:
    /// `table`: one page below 4 GiB.
    Channel(P ports, ChannelPorts at, DmaSpan table) : registers_(std::move(ports), at), table_(table) {}

    Registers<P>& registers() { return registers_; }
    const Registers<P>& registers() const { return registers_; }

    // ---- the table of physical regions ----
    inline void begin_table() { prds_ = 0; }
    /// Appends memory below 4 GiB, split at 64 KiB boundaries. False: it does not fit; nothing was added.
    [[gnu::always_inline]] inline bool add_region(u64 bus, u32 bytes) {
        const u64 first = bus / Prd::boundary;
        const u64 last = (bus + bytes - 1) / Prd::boundary;
        if (last - first + 1 > prd_capacity - prds_) {
            return false;
        }
        while (bytes != 0) {
            const u32 room = Prd::boundary - static_cast<u32>(bus % Prd::boundary);
            const u32 length = std::min(bytes, room);
            const Prd prd{static_cast<u32>(bus), static_cast<u16>(length), 0}; // 64 KiB is encoded as 0
            std::memcpy(table_.data + prds_++ * sizeof(Prd), &prd, sizeof(Prd));
            bus += length;
            bytes -= length;
        }
        return true;
    }
    usize regions() const { return prds_; }

    // ---- commands ----
    /// Starts the transfer described by the table (at least one region). The last command must have ended, but the
    /// engine need not have been stopped: this does it.
    void issue(const TransferCommand& c) {
        const u16 flags = Prd::last;
        std::memcpy(table_.data + (prds_ - 1) * sizeof(Prd) + __builtin_offsetof(Prd, flags), &flags, sizeof(flags));
        const u8 direction = c.write ? 0 : bus_master_to_memory;
        if (direction != direction_ || engine_on_) { // also stops the previous command
            direction_ = direction;
            registers_.bus_command(direction);
        }
        if (!table_written_) {
            table_written_ = true;
            registers_.bus_table(static_cast<u32>(table_.bus));
        }
        const auto byte = [&](unsigned n) { return static_cast<u8>(c.lba >> (8 * n)); };
        if (c.wide) {
            select(device_register(c.unit));
            // first the values for the "previous" registers [ACS §4.1.2]
            pair(Register::sector_count, static_cast<u8>(c.count >> 8), byte(3));
            pair(Register::lba_mid, byte(4), byte(5));
            pair(Register::sector_count, static_cast<u8>(c.count), byte(0));
            pair(Register::lba_mid, byte(1), byte(2));
            command(device_register(c.unit), c.write ? Command::write_dma_ext : Command::read_dma_ext);
        } else {
            const u8 device = device_register(c.unit, byte(3));
            select(device);
            pair(Register::sector_count, static_cast<u8>(c.count), byte(0)); // 256 is encoded as 0
            pair(Register::lba_mid, byte(1), byte(2));
            command(device, c.write ? Command::write_dma : Command::read_dma);
        }
        registers_.bus_command(direction | bus_master_start);
        engine_on_ = true;
    }
    /// Starts a command without data or parameters.
    void issue(u8 unit, Command code) {
        stop();
        const u8 device = device_register(unit);
        select(device);
        command(device, code);
    }
    /// Starts SET FEATURES. `value`: the parameter in the sector count register.
    void set_features(u8 unit, SetFeature feature, u8 value = 0) {
        registers_.write(Register::features, to_underlying(feature));
        registers_.write(Register::sector_count, value);
        issue(unit, Command::set_features);
    }
    /// Writes the device and command registers, by bytes or as a word.
    void command(u8 device, Command code) {
        if (words_) {
            registers_.write_word(Register::device, device, to_underlying(code));
        } else {
            if (device != device_) {
                registers_.write(Register::device, device);
            }
            registers_.write(Register::command, to_underlying(code));
        }
        device_ = device;
    }

    /// Checks whether the command has ended; for an unshared line. One access if it has not, two if it has, three if
    /// the interrupt bit must be cleared.
    Outcome poll() {
        Outcome outcome{.status = registers_.status()};
        outcome.ended = !outcome.status.in_progress();
        if (outcome.ended) {
            outcome.bus = registers_.bus_status();
            for (int i = 0; i < 3 && engine_on_ && outcome.bus.active() && !outcome.status.error(); ++i) {
                outcome.bus = registers_.bus_status(); // the last data may still be in flight to memory
            }
            if (clear_always_ || outcome.bus.error()) {
                clear(registers_);
            }
        }
        return outcome;
    }
    /// The same for a shared line, using the caller's registers, because it runs in an interrupt handler. An
    /// interrupt of another device costs one access. Otherwise the device has deasserted the line on return.
    static Outcome poll_shared(Registers<P>& registers) {
        Outcome outcome{.bus = registers.bus_status()};
        if (outcome.bus.interrupt()) {
            outcome.status = registers.status();
            outcome.ended = !outcome.status.in_progress();
            clear(registers, outcome.bus.raw);
        }
        return outcome;
    }
    /// Ends the transfer: afterwards the engine accesses no memory. No access if it is off.
    void stop() {
        if (engine_on_) {
            registers_.bus_command(direction_);
            engine_on_ = false;
        }
    }
    ErrorRegister error() { return {registers_.read(Register::error)}; }

    // ---- reset and setup ----
    /// Asserts software reset of both devices, with interrupts off. Must be held for 5 us [ATA-7 §9.2].
    void assert_reset() {
        stop();
        registers_.control(Control::software_reset | Control::interrupts_off);
    }
    /// Deasserts software reset; status is valid 2 ms later. Selects device 0.
    void release_reset(Control control) {
        registers_.control(control);
        device_ = 0;
    }
    /// Stops the engine and clears its status, regardless of its previous state; invalidates cached register values.
    void initialise_engine() {
        registers_.bus_command(0);
        direction_ = 0;
        engine_on_ = false;
        table_written_ = false;
        clear(registers_);
    }
    void set_words(bool words) { words_ = words; }
    bool words() const { return words_; }
    void set_clear_always(bool clear) { clear_always_ = clear; }
    bool clear_always() const { return clear_always_; }
    /// Records the contents of the device register after it was written bypassing this class.
    void note_device(u8 device) { device_ = device; }

  private:
    void pair(Register r, u8 low, u8 high) {
        if (words_) {
            registers_.write_word(r, low, high);
        } else {
            registers_.write(r, low);
            registers_.write(static_cast<Register>(to_underlying(r) + 1), high);
        }
    }
    /// If the unit changes: selects it and lets it settle (400 ns, and BSY = DRQ = 0, which is immediate for an idle
    /// device) [ATA-7 §9.4].
    void select(u8 device) {
        if (((device ^ device_) & 0x10) != 0) {
            registers_.write(Register::device, device);
            device_ = device;
            for (int i = 0; i < 4 && registers_.alternate_status().in_progress(); ++i) {
            }
        }
    }
    static void clear(Registers<P>& registers, u8 keep = 0) {
        using S = BusMasterStatus;
        registers.bus_status(S{}.set(S::drives_capable, S::from(keep).get(S::drives_capable))
                                 .clear(S::interrupt_seen)
                                 .clear(S::failed)
                                 .raw);
    }

    Registers<P> registers_;
    DmaSpan table_;
    usize prds_ = 0;
    u8 device_ = 0;    // last value of the device register; 0: unit 0, other bits unknown
    u8 direction_ = 0; // last value of the direction bit
    bool engine_on_ = false;
    bool table_written_ = false;
    bool words_ = false;
    bool clear_always_ = false;
};

} // namespace fl::drivers::ata
