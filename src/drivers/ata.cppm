// The driver for PCI IDE controllers with bus-master DMA [BMIDE, PCI-IDE 1.0]: matching, attaching, announcing. I/O
// is handled by drivers.ata.queue.
//
// Attaching avoids unneeded accesses: a channel without an offered disk is left alone, and so is one with a floating
// bus. A device that is ready and answers IDENTIFY DEVICE is not reset, because the firmware has done so and a reset
// costs milliseconds; one that hangs or returns invalid data is reset once and identified once more.
module;
#include "core/try.hpp"
export module drivers.ata;
import core.std;
import core.result;
import core.text;
import core.log;
import core.time;
import core.dma;
import core.interrupt;
import io.task;
import io.executor;
import io.block;
import drivers.driver;
import drivers.pci;
export import drivers.ata.protocol;
export import drivers.ata.channel;
export import drivers.ata.channel_queue;

export namespace fl::drivers::ata {

/// Mass storage, IDE, with any programming interface (native mode or not) [PCI-IDE §2].
inline constexpr pci::Match ids[] = {{.class_code = 0x01, .subclass = 0x01}};

/// Whether a channel of the controller uses the fixed ports and interrupts of compatibility mode [PCI-IDE §2.1]. A
/// machine has one such controller: its disks are hda to hdd, the ones that hypervisors pair with synthetic disks.
constexpr bool is_legacy(const pci::Device& device) { return (device.prog_if & 5) != 5; }

/// I/O ports and interrupt lines of a controller's two channels, from its programming interface and base address
/// registers [PCI-IDE §2.2, BMIDE §2].
struct ControllerPorts {
    // command 0: the channel is in native mode and has no ports; it is disabled
    std::array<ChannelPorts, 2> channels{};
    std::array<InterruptLine, 2> lines{};
};
/// Enables I/O decoding and bus mastering. Fails if the bus-master registers are missing or have no address.
Result<ControllerPorts> set_up(const pci::Device& device);
/// The ports of the channels in compatibility mode, derived from the programming interface alone, without any access.
/// Excludes the bus-master registers; 0 for a channel in native mode.
std::array<ChannelPorts, 2> fixed_ports(const pci::Device& device);

/// Which I/O ports belong to which IDE channel. Two controllers may report the same ports: two in compatibility mode,
/// or one with registers assigned to another's addresses. A command would then reach the devices of both, or of the
/// wrong one, so the second claim is refused before any access. Claims last as long as this object.
class PortClaims {
  public:
    static constexpr u32 capacity = 96; // ranges, enough for 16 controllers

    enum class Answer : u8 { yes, taken, full };
    /// Claims the ranges of a channel: command block (8 ports), control (1), bus master (8); zero bases are skipped.
    /// `taken`: one of the ports is already claimed, and nothing is added.
    Answer take(const ChannelPorts& at);
    /// The error for a channel whose claim failed.
    static Error claim_error(Answer answer);

  private:
    struct Range {
        u16 first;
        u16 count;
    };
    std::array<Range, capacity> held_{};
    u32 count_ = 0;
};

/// "hda" for 0, and so on: hdz, hdaa …
FixedText<16> disk_name(u32 number);
/// Only the disks of the first controller can have a synthetic twin; those of further ones (hde …) have none.
constexpr u32 twin_of(u32 number) { return number < 4 ? number : DiskSink::no_twin; }

/// Reports disk `number` as not driven.
void report_unused(DiskSink& disks, u32 number, std::string_view what, Unused why, std::string_view reason);
void report_failed(DiskSink& disks, u32 number, std::string_view what, const Error& error);

/// The device found at a unit.
enum class Found : u8 { nothing, disk, packet_device };

/// Probes a channel's devices before it has a queue: presence, IDENTIFY, transfer mode. Polls at once, then sleeps in
/// the executor between polls; every wait is bounded.
template <PortAccess P>
class Prober {
  public:
    Prober(io::Executor& executor, Channel<P>& channel, Nanoseconds timeout)
        : executor_(executor), channel_(channel), timeout_(timeout) {}

    /// False: the bus floats, no device drives it.
    bool driven() { return !channel_.registers().status().floating(); }
    /// Software reset of both devices. Error{timed_out}: still busy.
    io::Task<Result<void>> reset();
    /// Identifies a unit; the data is valid for Found::disk. Also detects whether 16-bit register writes work.
    io::Task<Result<Found>> identify(u8 unit, IdentifyData& data);
    /// Whether device 1 is an alias of device 0: tested by changing a setting through device 1 and reading it from
    /// device 0. `first`: device 0's data; overwritten.
    io::Task<Result<bool>> one_device(IdentifyData& first);
    /// Selects the disk's best multiword DMA mode, for a disk with no DMA mode selected.
    io::Task<Result<void>> select_mode(u8 unit, DriveInfo& info);
    /// Switches off the disk's volatile write cache. False: the disk refuses.
    io::Task<Result<bool>> disable_write_cache(u8 unit);

  private:
    static constexpr Nanoseconds poll = 100'000;

    io::Task<Result<Status>> settle(Nanoseconds bound);
    bool keeps(bool words, u8 a, u8 b, u8 c, u8 d);
    io::Task<Result<Found>> send_identify(u8 unit, IdentifyData& data);

    io::Executor& executor_;
    Channel<P>& channel_;
    Nanoseconds timeout_;
    bool try_words_ = true; // until a device hangs
};

/// One controller with its two channels. Must outlive all use of its disks; normally lives until machine shutdown.
template <PortAccess P>
class Controller {
  public:
    /// `claims`: shared by all controllers of the machine, outlives this; nullptr: the only controller.
    Controller(Environment& environment, P ports, PortClaims* claims = nullptr)
        : environment_(environment), ports_(std::move(ports)), claims_(claims) {}
    Controller(const Controller&) = delete;
    Controller& operator=(const Controller&) = delete;

    /// Finds and announces the disks; `first_disk` is the number of the primary master. A failing channel is logged,
    /// and the other one is tried; finding no disk is not an error. A channel whose ports are claimed by another
    /// controller is not accessed; if that holds for all wanted channels, Error{protocol}.
    io::Task<Result<void>> attach(pci::Device device, u32 first_disk = 0);
    /// Number of announced disks.
    u32 disks() const { return count_; }
    /// `channel`: 0 primary, 1 secondary. nullptr: the channel is not in use.
    ChannelQueue<P>* queue(u8 channel) { return channels_[channel].queue ? &*channels_[channel].queue : nullptr; }

  private:
    struct Slot {
        DmaBuffer table;
        std::array<std::optional<DeviceIdentity>, 2> identities; // of devices that answered IDENTIFY DEVICE
        std::array<std::optional<Disk<P>>, 2> disks;
        std::optional<ChannelQueue<P>> queue; // destroyed first: it ends the disks' requests
    };
    io::Task<Result<void>> attach_channel(Slot& slot, ChannelPorts at, InterruptLine line, u32 first_disk);
    io::Task<Result<bool>> examine(Slot& slot, Prober<P>& prober, u8 unit, u32 number);
    io::Task<Result<void>> settle_write_cache(Slot& slot, Prober<P>& prober, u8 unit);
    bool announce(Slot& slot, u8 unit, u32 number);
    void unused(u32 number, std::string_view what, Unused why, std::string_view reason = {}) {
        report_unused(environment_.disks, number, what, why, reason);
    }
    void failed(u32 number, std::string_view what, const Error& error) {
        report_failed(environment_.disks, number, what, error);
    }

    using Claim = PortClaims::Answer;
    Claim claim(const ChannelPorts& at) { return claims_ != nullptr ? claims_->take(at) : Claim::yes; }

    Environment environment_; // its disk sink is used only while attaching
    P ports_;
    PortClaims* claims_;
    std::array<Slot, 2> channels_;
    std::array<bool, 4> offered_{};
    u32 count_ = 0;
};

/// Creates a controller on the heap, for the lifetime of the machine, and attaches it. Freed if it has no disks.
template <PortAccess P>
io::Task<Result<void>> probe(Environment& environment, pci::Device device, P ports, u32 first_disk = 0,
                             PortClaims* claims = nullptr) {
    auto* controller = new (std::nothrow) Controller<P>(environment, std::move(ports), claims);
    if (controller == nullptr) {
        co_return Error{Code::exhausted, "no memory for an IDE controller"};
    }
    Result<void> result = co_await controller->attach(device, first_disk);
    if (controller->disks() == 0) {
        delete controller;
    }
    co_return result;
}

// ---- Prober ----

/// Waits until the selected device is not busy. The alternate status read provides the 400 ns delay before the status
/// is valid [ATA-7 §9.4].
template <PortAccess P>
io::Task<Result<Status>> Prober<P>::settle(Nanoseconds length) {
    static_cast<void>(channel_.registers().alternate_status());
    const io::Bound bound(executor_, length);
    for (;;) {
        const Status status = channel_.registers().status();
        if (!status.busy()) {
            co_return status;
        }
        if (bound.passed()) {
            co_return Error{Code::timed_out, "the IDE device stays busy (BSY)", 0, status.raw};
        }
        co_await executor_.sleep(poll);
    }
}

template <PortAccess P>
io::Task<Result<void>> Prober<P>::reset() {
    try_words_ = false;
    channel_.assert_reset();
    co_await executor_.sleep(ChannelQueue<P>::reset_hold);
    channel_.release_reset(Control::interrupts_off);
    co_await executor_.sleep(ChannelQueue<P>::reset_settle);
    auto status = co_await settle(timeout_);
    if (!status) {
        co_return status.error();
    }
    co_return Result<void>{};
}

/// Whether the count and LBA registers retain written values: this detects a device, and a bus that splits 16-bit
/// writes.
template <PortAccess P>
bool Prober<P>::keeps(bool words, u8 a, u8 b, u8 c, u8 d) {
    auto& r = channel_.registers();
    if (words) {
        r.write_word(Register::sector_count, a, b);
        r.write_word(Register::lba_mid, c, d);
    } else {
        r.write(Register::sector_count, a);
        r.write(Register::lba_low, b);
        r.write(Register::lba_mid, c);
        r.write(Register::lba_high, d);
    }
    return r.read(Register::sector_count) == a && r.read(Register::lba_low) == b && r.read(Register::lba_mid) == c &&
           r.read(Register::lba_high) == d;
}

template <PortAccess P>
io::Task<Result<Found>> Prober<P>::identify(u8 unit, IdentifyData& data) {
    auto& r = channel_.registers();
    r.write(Register::device, device_register(unit));
    channel_.note_device(device_register(unit));
    CO_TRY(const Status selected, co_await settle(timeout_));
    if (selected.floating()) {
        co_return Found::nothing;
    }
    if (selected.data_request()) {
        co_return Error{Code::protocol, "the IDE device requests a data transfer without a command (DRQ)", 0,
                        selected.raw};
    }
    // First bytes, then words over them, then the reverse with the complement: only a bus that writes both registers
    // passes.
    const bool bytes = keeps(false, 0x55, 0xaa, 0x33, 0xcc);
    if (!bytes) {
        co_return Found::nothing; // the registers retain nothing: no device
    }
    const bool words = try_words_ && keeps(true, 0xa6, 0x59, 0xc3, 0x3c) && keeps(false, 0x59, 0xa6, 0x3c, 0xc3) &&
                       keeps(true, 0x12, 0xed, 0x84, 0x7b);
    channel_.set_words(words);
    auto found = co_await send_identify(unit, data);
    const bool hangs = !found && found.error().code == Code::timed_out; // then nothing may be written before a reset
    if (words && !hangs && (!found || *found == Found::nothing)) {
        channel_.set_words(false); // the command register ignores words, or no device is present
        found = co_await send_identify(unit, data);
    }
    co_return found;
}

template <PortAccess P>
io::Task<Result<Found>> Prober<P>::send_identify(u8 unit, IdentifyData& data) {
    auto& r = channel_.registers();
    channel_.issue(unit, Command::identify_device);
    CO_TRY(const Status status, co_await settle(timeout_));
    if (status.error() || status.device_fault()) {
        const auto signature = static_cast<Signature>(r.read(Register::lba_mid) | r.read(Register::lba_high) << 8);
        if (signature == Signature::packet || signature == Signature::serial_packet) {
            co_return Found::packet_device;
        }
        if (!status.device_fault() && ErrorRegister{r.read(Register::error)}.aborted()) {
            // A disk must answer this command, and a packet device the other one [ACS §4.2, §4.3]: refusing both
            // means no device. QEMU does this for an absent master if there is a slave.
            channel_.issue(unit, Command::identify_packet_device);
            CO_TRY(const Status other, co_await settle(timeout_));
            if (other.data_request()) {
                r.read_data(data.words);
                co_return Found::packet_device;
            }
            if (other.raw == 0 || other.floating() ||
                (other.error() && ErrorRegister{r.read(Register::error)}.aborted())) {
                co_return Found::nothing;
            }
        }
        co_return Error{Code::io, "the device refuses IDENTIFY DEVICE", 0, status.raw};
    }
    if (status.raw == 0 || status.floating()) {
        co_return Found::nothing; // device 0 answers for the absent device 1 [ATA-7 §9.16.2]
    }
    if (!status.data_request()) {
        co_return Error{Code::protocol, "IDENTIFY DEVICE ended without data (DRQ)", 0x58, status.raw};
    }
    r.read_data(data.words);
    const Status last = r.status();
    if (last.in_progress() || last.error()) {
        co_return Error{Code::protocol, "the device does not end IDENTIFY DEVICE after 512 bytes", 0x50, last.raw};
    }
    co_return Found::disk;
}

template <PortAccess P>
io::Task<Result<bool>> Prober<P>::one_device(IdentifyData& first) {
    // The sector count of READ MULTIPLE: unused here, and separate for each device (word 59; bit 8: valid).
    auto& r = channel_.registers();
    const u8 count = (first.words[59] & 0xff) == 2 ? 4 : 2;
    r.write(Register::device, device_register(1));
    channel_.note_device(device_register(1));
    CO_CHECK(co_await settle(timeout_));
    r.write(Register::sector_count, count);
    channel_.issue(1, Command::set_multiple_mode);
    CO_TRY(const Status status, co_await settle(timeout_));
    if (status.error() || status.device_fault()) {
        co_return true; // indistinguishable otherwise
    }
    CO_TRY(const Found found, co_await send_identify(0, first));
    co_return found == Found::disk && (first.words[59] & 0x1ff) == (0x100 | count);
}

template <PortAccess P>
io::Task<Result<void>> Prober<P>::select_mode(u8 unit, DriveInfo& info) {
    channel_.set_features(unit, SetFeature::transfer_mode,
                          static_cast<u8>(transfer_mode_multiword | info.multiword_best));
    CO_TRY(const Status status, co_await settle(timeout_));
    if (status.error() || status.device_fault()) {
        co_return Error{Code::io, "the disk refuses a DMA mode that it offers (SET FEATURES)", 0x50, status.raw};
    }
    info.multiword_dma = info.multiword_best;
    co_return Result<void>{};
}

template <PortAccess P>
io::Task<Result<bool>> Prober<P>::disable_write_cache(u8 unit) {
    channel_.set_features(unit, SetFeature::no_write_cache);
    CO_TRY(const Status status, co_await settle(timeout_));
    co_return !status.error() && !status.device_fault();
}

// ---- Controller ----

template <PortAccess P>
io::Task<Result<void>> Controller<P>::attach(pci::Device device, u32 first_disk) {
    // The fixed ports are claimed even if no disk is wanted, so that no other controller's commands reach these
    // devices.
    const auto fixed = fixed_ports(device);
    std::array<Claim, 2> claimed{claim(fixed[0]), claim(fixed[1])};
    if (claimed[0] != Claim::yes && claimed[1] != Claim::yes) {
        co_return PortClaims::claim_error(claimed[0]);
    }
    std::array<bool, 2> wanted{};
    for (u32 n = 0; n < 4; ++n) {
        offered_[n] = environment_.disks.offered(twin_of(first_disk + n));
        wanted[n / 2] = offered_[n] || wanted[n / 2];
        if (!offered_[n]) {
            unused(first_disk + n, "IDE disk", Unused::taken);
        }
    }
    if (!wanted[0] && !wanted[1]) {
        co_return Result<void>{};
    }
    CO_TRY(const ControllerPorts ports, set_up(device));
    bool any = false;
    for (u32 c = 0; c < 2; ++c) {
        if (wanted[c] && ports.channels[c].command != 0 && claimed[c] == Claim::yes) {
            ChannelPorts more = ports.channels[c]; // not claimed yet
            if (fixed[c].command != 0) {
                more.command = more.control = 0;
            }
            claimed[c] = claim(more);
        }
        any = any || (wanted[c] && claimed[c] == Claim::yes);
    }
    if (!any) {
        co_return PortClaims::claim_error(claimed[claimed[0] != Claim::yes ? 0 : 1]);
    }
    for (u32 c = 0; c < 2; ++c) {
        if (!wanted[c]) {
            continue;
        }
        if (claimed[c] != Claim::yes) {
            failed(first_disk + 2 * c, c == 0 ? "primary IDE channel" : "secondary IDE channel",
                   PortClaims::claim_error(claimed[c]));
            continue;
        }
        if (ports.channels[c].command == 0) {
            log::info("ata: the {} channel has no I/O ports (BAR 0 to 3): it is switched off",
                      c == 0 ? "primary" : "secondary");
            continue;
        }
        auto attached = co_await attach_channel(channels_[c], ports.channels[c], ports.lines[c], first_disk + 2 * c);
        if (!attached) {
            failed(first_disk + 2 * c, c == 0 ? "primary IDE channel" : "secondary IDE channel", attached.error());
        }
    }
    co_return Result<void>{};
}

template <PortAccess P>
io::Task<Result<void>> Controller<P>::attach_channel(Slot& slot, ChannelPorts at, InterruptLine line, u32 first_disk) {
    {
        // Before any allocation: the common case of an empty channel.
        Registers<P> registers(ports_, at);
        if (registers.status().floating()) {
            co_return Result<void>{};
        }
    }
    CO_TRY(slot.table, environment_.dma.buffer(prd_capacity * sizeof(Prd), u64{1} << 32));
    slot.queue.emplace(environment_.executor, environment_.dma, ports_, at, slot.table.span(), environment_.timeout);
    Channel<P>& channel = slot.queue->channel();
    channel.registers().control(Control::interrupts_off);
    channel.initialise_engine();
    if (at.bus_master % 16 != 0 && channel.registers().bus_status().simplex() && channels_[0].queue) {
        slot.queue.reset();
        co_return Error{Code::not_supported,
                        "the controller transfers on one channel at a time (simplex): the secondary one is not used"};
    }

    Prober<P> prober(environment_.executor, channel, environment_.timeout);
    bool any = false;
    bool words = true;
    for (u8 unit = 0; unit < 2; ++unit) {
        if (!offered_[(first_disk + unit) % 4]) {
            continue;
        }
        auto found = co_await examine(slot, prober, unit, first_disk + unit);
        if (!found) {
            failed(first_disk + unit, "IDE disk", found.error());
            if (found.error().code == Code::timed_out) { // it blocks the cable for the other device too
                any = false;
                break;
            }
        } else if (*found) {
            any = true;
            words = words && channel.words();
        }
    }
    channel.set_words(any && words); // both devices latch writes, so both must support words
    if (!any) {
        slot.disks[0].reset();
        slot.disks[1].reset();
        slot.queue.reset();
        co_return Result<void>{};
    }
    for (u8 unit = 0; unit < 2; ++unit) { // after the last reset of both
        if (slot.disks[unit]) {
            CO_CHECK(co_await settle_write_cache(slot, prober, unit));
        }
    }
    CO_CHECK(slot.queue->open(environment_.interrupts, line));
    static_cast<void>(channel.registers().status()); // clears an interrupt left pending by the probe
    channel.registers().control(Control::none);
    slot.queue->start_counting();
    for (u8 unit = 0; unit < 2; ++unit) {
        if (slot.disks[unit] && announce(slot, unit, first_disk + unit)) {
            ++count_;
        }
    }
    co_return Result<void>{};
}

/// Without flushes an acknowledged write must be on the medium. If the disk refuses, announce() says so.
template <PortAccess P>
io::Task<Result<void>> Controller<P>::settle_write_cache(Slot& slot, Prober<P>& prober, u8 unit) {
    Disk<P>& disk = *slot.disks[unit];
    DriveInfo info = disk.info();
    Usage usage{.words = slot.queue->channel().words()};
    usage.flush = info.write_cache && (info.flush || info.flush_ext) && environment_.allows(Feature::flush);
    if (info.write_cache && !usage.flush) {
        CO_TRY(usage.write_through, co_await prober.disable_write_cache(unit));
        if (usage.write_through) {
            info.write_cache = false;
            slot.queue->keep_write_through(unit);
        }
    }
    disk.configure(info, disk.name(), usage);
    co_return Result<void>{};
}

template <PortAccess P>
bool Controller<P>::announce(Slot& slot, u8 unit, u32 number) {
    Disk<P>& disk = *slot.disks[unit];
    disk.set_timeout(environment_.timeout);
    slot.queue->add(disk);
    if (auto announced = environment_.disks.announce(disk, twin_of(number)); !announced) {
        failed(number, "IDE disk", announced.error());
        slot.queue->remove(disk);
        slot.disks[unit].reset();
        return false;
    }
    if (disk.info().write_cache && !disk.geometry().flush) {
        log::warning(
            "{}: it has a volatile write cache, which is neither flushed (features=-flush, or no such command) "
            "nor can be switched off",
            disk.name());
    }
    return true;
}

/// True: slot.disks[unit] is a disk.
template <PortAccess P>
io::Task<Result<bool>> Controller<P>::examine(Slot& slot, Prober<P>& prober, u8 unit, u32 number) {
    IdentifyData data;
    auto found = co_await prober.identify(unit, data);
    if (!found) {
        log::debug("ata: {}: {}; reset", disk_name(number), found.error());
        CO_CHECK(co_await prober.reset());
        found = co_await prober.identify(unit, data);
    }
    if (!found) {
        co_return found.error();
    }
    if (*found == Found::packet_device) {
        unused(number, "ATAPI device", Unused::not_a_disk,
               "no driver for CD drives and other ATAPI devices in this build");
    }
    if (*found != Found::disk) {
        co_return false;
    }
    slot.identities[unit].emplace(data);
    if (unit == 1 && slot.identities[0] && slot.identities[0]->same(*slot.identities[1])) {
        // Some controllers for SATA disks ignore the device bit; but two disks may also have the same serial number.
        IdentifyData first = data;
        CO_TRY(const bool one, co_await prober.one_device(first));
        if (one) {
            unused(number, "IDE disk", Unused::taken, "the master answers at both addresses");
            co_return false;
        }
    }
    if (is_empty(data)) {
        unused(number, "IDE disk", Unused::empty, "it has 0 bytes");
        co_return false;
    }
    CO_TRY(DriveInfo info, decode(data));
    if (info.ultra_dma < 0 && info.multiword_dma < 0) {
        CO_CHECK(co_await prober.select_mode(unit, info));
    }
    slot.disks[unit].emplace(environment_.executor, *slot.queue, unit);
    slot.disks[unit]->configure(info, disk_name(number), {}); // settle_write_cache() completes it
    co_return true;
}

} // namespace fl::drivers::ata
