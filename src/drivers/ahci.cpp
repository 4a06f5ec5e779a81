module;
#include "core/try.hpp"
module drivers.ahci;
import core.std;
import core.result;
import core.text;
import core.log;
import core.dma;
import core.mmio;
import core.time;
import io.task;
import io.executor;
import io.block;
import drivers.driver;
import drivers.pci;
import drivers.pci.msi;

namespace fl::drivers::ahci {

namespace {
constexpr Nanoseconds poll = 100'000;
constexpr Nanoseconds reset_bound = 1'000'000'000; // of HR [ahci-1.3.1 §10.4.3]
constexpr Nanoseconds handoff_bound = 25'000'000;  // for BOS [ahci-1.3.1 §10.6.3]
constexpr Nanoseconds busy_bound = 2'000'000'000;  // with BB
constexpr Nanoseconds spin_up_bound = 50'000'000;  // for a device to answer COMRESET after spin-up
constexpr Nanoseconds link_bound = 1'000'000'000;  // for the link of a device that was there before the reset
constexpr u64 four_gib = u64{1} << 32;
} // namespace

Result<Ports> usable_ports(u32 implemented, Capabilities capabilities, u64 abar_size) {
    const u64 fitting = abar_size < first_port ? 0 : std::min<u64>((abar_size - first_port) / port_bytes, max_ports);
    Ports ports;
    u32 left = capabilities.get(Capabilities::np) + 1;
    for (u32 n = 0; n < max_ports; ++n) {
        if ((implemented >> n & 1) == 0) {
            continue;
        }
        const bool usable = n < fitting && left != 0;
        left -= usable ? 1 : 0;
        (usable ? ports.usable : ports.dropped) |= u32{1} << n;
    }
    if (ports.usable == 0) {
        return Error{Code::protocol, "the HBA has no port whose registers exist (PI, CAP.NP, size of BAR 5)", 1,
                     implemented};
    }
    return ports;
}

Controller::~Controller() {
    if (interrupts_ && abar_.size() != 0) {
        GlobalControl::of(GlobalControl::ae).write(abar_); // no interrupts
    }
    for (Slot& slot : slots_) {
        slot.disk.reset();
    }
}

void Controller::unused(u32 number, std::string_view what, Unused why, std::string_view reason) {
    FixedText<24> address;
    print(address, "port {}", number);
    environment_.disks.unused({.bus = "ahci", .address = address, .what = what, .why = why, .reason = reason});
}

void Controller::failed(u32 number, const Error& error) {
    FixedText<200> reason;
    print(reason, "{}", error);
    unused(number, "SATA disk", unused_because(error.code), reason);
}

/// Polls a register until one of the bits is set, or none of them. Error{timed_out}: the bound has passed.
io::Task<Result<void>> Controller::wait(Nanoseconds length, u64 at, u32 bits, bool set) {
    const io::Bound bound(environment_.executor, length);
    while (any(at, bits) != set) {
        if (bound.passed()) {
            co_return Error{Code::timed_out, "an AHCI HBA does not answer"};
        }
        co_await environment_.executor.sleep(poll);
    }
    co_return Result<void>{};
}

/// Takes the HBA over from the firmware [ahci-1.3.1 §10.6.3].
io::Task<Result<void>> Controller::take_over() {
    if (!Capabilities2::read(abar_).get(Capabilities2::boh)) {
        co_return Result<void>{};
    }
    Handoff::change(abar_, 0, [](Handoff& h) { h.set(Handoff::oos, true); });
    constexpr u32 owned = Handoff::of(Handoff::bos).raw;
    auto released = co_await wait(handoff_bound, Handoff::offset, owned, false);
    if (!released && Handoff::read(abar_).get(Handoff::bb)) {
        released = co_await wait(busy_bound, Handoff::offset, owned, false);
    }
    if (!released) {
        log::warning("ahci: the firmware does not release the HBA (BOHC.BOS): taken from it");
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Controller::reset() {
    GlobalControl::of(GlobalControl::ae).write(abar_);
    GlobalControl::of(GlobalControl::ae, GlobalControl::hr).write(abar_);
    if (!co_await wait(reset_bound, GlobalControl::offset, GlobalControl::of(GlobalControl::hr).raw, false)) {
        co_return Error{Code::timed_out, "the HBA does not end its reset (GHC.HR) within a second", 0,
                        GlobalControl::read(abar_).raw};
    }
    GlobalControl::of(GlobalControl::ae).write(abar_);
    if (!GlobalControl::read(abar_).get(GlobalControl::ae)) {
        co_return Error{Code::protocol, "the HBA does not enter AHCI mode (GHC.AE)"};
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Controller::attach(pci::Device device) {
    if (const u64 delay = device.power_on(); delay != 0) {
        co_await environment_.executor.sleep(delay);
    }
    CO_TRY(abar_, device.map_bar(environment_.mmio, abar));
    if (abar_.size() < first_port + port_bytes) {
        co_return Error{Code::protocol, "BAR 5 is too small for an AHCI HBA's registers", first_port + port_bytes,
                        abar_.size()};
    }
    GlobalControl::of(GlobalControl::ae).write(abar_); // before any other register [ahci-1.3.1 §3.1.2]
    const u32 implemented = PortsImplemented::read(abar_).raw;
    capabilities_ = Capabilities::read(abar_);
    if (implemented == ~u32{0} && capabilities_.raw == ~u32{0}) {
        co_return Error{Code::device_gone, "all registers read as ones: there is no HBA"};
    }
    CO_TRY(const Ports ports, usable_ports(implemented, capabilities_, abar_.size()));
    if (ports.dropped != 0) {
        log::warning("ahci: ports {:#x} of PI lie beyond CAP.NP or BAR 5: not used", ports.dropped);
    }
    CO_CHECK(co_await take_over());
    for (u32 left = ports.usable; left != 0; left &= left - 1) {
        Port port(abar_, static_cast<u32>(std::countr_zero(left)));
        const bool there = port.read<SataStatus>().get(SataStatus::det) != 0;
        present_ |= there ? port.bit() : 0;
    }
    CO_CHECK(co_await reset());
    device.change_command(pci::Command::of(pci::Command::bus_master));
    u32 empty = 0;
    for (u32 left = ports.usable; left != 0; left &= left - 1) {
        Port(abar_, static_cast<u32>(std::countr_zero(left))).command(false, false); // power and spin-up
    }
    for (u32 left = ports.usable; left != 0; left &= left - 1) {
        const u32 number = static_cast<u32>(std::countr_zero(left));
        Port port(abar_, number);
        const bool spins_up = capabilities_.get(Capabilities::sss);
        const Nanoseconds bound = (present_ & port.bit()) != 0 ? link_bound : spins_up ? spin_up_bound : 0;
        if (!co_await wait(bound, port.at(SataStatus::offset), SataStatus::there, true)) {
            empty |= port.bit();
            continue;
        }
        if (auto examined = co_await examine(number); !examined) {
            failed(number, examined.error());
        }
        if (!slots_[number].terms) {
            static_cast<void>(co_await give_up(number));
        } else {
            events_.add(number, slots_[number].disk->events(), slots_[number].disk->queue());
        }
    }
    if (std::ranges::none_of(slots_, [](const Slot& slot) { return slot.terms.has_value(); })) {
        co_return Result<void>{};
    }
    for (u32 left = empty; left != 0; left &= left - 1) {
        events_.watch(static_cast<u32>(std::countr_zero(left)));
    }
    if (const auto opened = open(device); !opened) {
        for (u32 number = 0; number < max_ports; ++number) {
            if (slots_[number].terms) {
                static_cast<void>(co_await give_up(number));
            }
        }
        co_return opened;
    }
    for (u32 left = empty; left != 0; left &= left - 1) {
        Port port(abar_, static_cast<u32>(std::countr_zero(left)));
        port.clear_errors();
        port.write(interrupt_enable, PortInterrupts::link);
    }
    GlobalControl::of(GlobalControl::ae, GlobalControl::ie).write(abar_);
    for (u32 number = 0; number < max_ports; ++number) {
        if (slots_[number].terms && !announce(number)) { // its disk stays: the handler may look at it
            Port port(abar_, number);
            static_cast<void>(co_await stop(port));
        }
    }
    co_return Result<void>{};
}

/// Before interrupts are attached: the port is not used, and the HBA must not store anything in its memory any more.
io::Task<Result<void>> Controller::give_up(u32 number) {
    Slot& slot = slots_[number];
    Port port(abar_, number);
    auto stopped = co_await stop(port);
    slot.terms.reset();
    slot.disk.reset();
    slot.memory.reset();
    co_return stopped;
}

Result<void> Controller::open(pci::Device& device) {
    interrupts_.emplace(device, environment_.interrupts, environment_.mmio);
    const pci::VectorUse use{environment_.executor.processor(), HbaEvents::handler, &events_};
    const auto attached = interrupts_->attach(
        {&use, 1}, 1, environment_.allows(Feature::messages) ? pci::InterruptKind::msix : pci::InterruptKind::line);
    if (!attached) {
        interrupts_.reset();
        return attached.error();
    }
    events_.open(abar_, interrupts_->kind() != pci::InterruptKind::line);
    return {};
}

bool Controller::announce(u32 number) {
    Slot& slot = slots_[number];
    auto identity = describe_disk(*slot.terms, name(interrupts_->kind()), capabilities_.get(Capabilities::s64a));
    identity.name = environment_.disks.free_name("sd");
    slot.disk->open(*slot.terms, identity, environment_.timeout);
    if (auto announced = environment_.disks.announce(*slot.disk, DiskSink::no_twin); !announced) {
        slot.disk->close();
        failed(number, announced.error());
        return false;
    }
    if (slot.terms->info.write_cache && !slot.terms->flush) {
        log::warning("{}: it has a volatile write cache, which is not flushed (features=-flush, or no such command)",
                     slot.disk->identity().name.view());
    }
    ++count_;
    return true;
}

/// Finds out what is at a port whose link has a device. A disk's slot has terms afterwards.
io::Task<Result<void>> Controller::examine(u32 number) {
    Slot& slot = slots_[number];
    Port port(abar_, number);
    CO_CHECK(co_await start(port, slot));
    switch (static_cast<Signature>(port.read(signature))) {
    case Signature::packet:
        unused(number, "CD drive", Unused::not_a_disk, "no driver for CD drives and other ATAPI devices in this build");
        co_return Result<void>{};
    case Signature::multiplier:
        unused(number, "port multiplier", Unused::no_driver, "no driver for port multipliers in this build");
        co_return Result<void>{};
    case Signature::enclosure: unused(number, "enclosure", Unused::not_a_disk); co_return Result<void>{};
    case Signature::ata: break;
    default: break; // IDENTIFY DEVICE decides
    }
    const PortMemory memory(slot.memory.span());
    ata::IdentifyData data;
    CO_CHECK(co_await identify(port, memory, data));
    if (ata::is_empty(data)) {
        unused(number, "SATA disk", Unused::empty, "it has 0 bytes");
        co_return Result<void>{};
    }
    CO_TRY(const ata::DriveInfo info, ata::decode(data));
    const SataInfo sata = decode_sata(data);
    const bool ncq = sata.queue_depth != 0 && info.lba48 && capabilities_.get(Capabilities::sncq) &&
                     environment_.allows(Feature::ncq);
    slot.terms =
        Terms{.info = info,
              .depth = ncq ? std::min(sata.queue_depth, capabilities_.get(Capabilities::ncs) + 1) : 0,
              .flush = info.write_cache && (info.flush || info.flush_ext) && environment_.allows(Feature::flush),
              .discard = sata.trim && info.lba48 && environment_.allows(Feature::discard)};
    slot.disk.emplace(environment_.executor, environment_.dma, events_, port, memory,
                      capabilities_.get(Capabilities::s64a), environment_.timeout);
    co_return Result<void>{};
}

/// Gives the port its memory and starts it [ahci-1.3.1 §10.1.2].
io::Task<Result<void>> Controller::start(Port& port, Slot& slot) {
    CO_CHECK(co_await stop(port));
    CO_TRY(slot.memory,
           environment_.dma.buffer(PortMemory::bytes, capabilities_.get(Capabilities::s64a) ? ~u64{0} : four_gib));
    const PortMemory memory(slot.memory.span());
    port.write(command_list_base, static_cast<u32>(memory.list_bus()));
    port.write(command_list_base + 4, static_cast<u32>(memory.list_bus() >> 32));
    port.write(fis_base, static_cast<u32>(memory.fis_bus()));
    port.write(fis_base + 4, static_cast<u32>(memory.fis_bus() >> 32));
    port.clear_errors();
    port.command(false); // lets the HBA store the first FIS of the device
    if (!co_await wait(environment_.timeout, port.at(SataStatus::offset), SataStatus::up, true)) {
        co_return Error{Code::timed_out, "the link to the device does not come up (PxSSTS.DET)",
                        SataStatus::established, port.read<SataStatus>().raw};
    }
    port.write(sata_error, ~u32{0});
    if (!co_await wait(environment_.timeout, port.at(TaskFile::offset), TaskFile::in_progress, false)) {
        co_return Error{Code::timed_out, "the device stays busy after the reset (PxTFD)", 0, port.read<TaskFile>().raw};
    }
    port.command(true);
    co_return Result<void>{};
}

io::Task<Result<void>> Controller::identify(Port& port, const PortMemory& memory, ata::IdentifyData& data) {
    const DmaSpan page = memory.block(0);
    memory.encode(0, 0, plain_fis(Opcode::identify_device), false, {&page, 1});
    port.clear_errors(); // and what the device's first FIS has set
    port.write(command_issue, 1);
    const auto ended = co_await wait(environment_.timeout, port.at(PortInterrupts::offset),
                                     PortInterrupts::fatal | PortInterrupts::ends, true);
    const bool failed = (port.read<PortInterrupts>().raw & PortInterrupts::fatal) != 0;
    if (!ended || (!failed && !co_await wait(environment_.timeout, port.at(command_issue), 1, false))) {
        co_return Error{Code::timed_out, "no answer to IDENTIFY DEVICE", 0, port.read<TaskFile>().raw};
    }
    if (failed) {
        co_return Error{Code::io, "the device refuses IDENTIFY DEVICE", 0, port.read<TaskFile>().raw};
    }
    if (memory.header(0).transferred != page.size) {
        co_return Error{Code::protocol, "IDENTIFY DEVICE ended before all of its data (PRDBC)", page.size,
                        memory.header(0).transferred};
    }
    std::memcpy(data.words.data(), page.data, page.size);
    co_return Result<void>{};
}

/// Stops the command list, then the storing of FISes [ahci-1.3.1 §10.3.2].
io::Task<Result<void>> Controller::stop(Port& port) {
    auto command = port.read<PortCommand>();
    port.write(command.set(PortCommand::st, false));
    constexpr u32 runs = PortCommand::command_list | PortCommand::fis_receive;
    static_cast<void>(
        co_await wait(Recovery::stop_bound, port.at(PortCommand::offset), PortCommand::command_list, false));
    port.write(command.set(PortCommand::fre, false));
    if (!co_await wait(Recovery::stop_bound, port.at(PortCommand::offset), runs, false)) {
        slots_[port.number()].memory.abandon(); // the HBA may still write to it
        co_return Error{Code::timed_out, "the HBA does not stop the port (PxCMD.CR, FR)", 0,
                        port.read<PortCommand>().raw};
    }
    co_return Result<void>{};
}

io::Task<Result<void>> probe(Environment& environment, pci::Device device, u32) {
    auto* controller = new (std::nothrow) Controller(environment);
    if (controller == nullptr) {
        co_return Error{Code::exhausted, "no memory for an AHCI controller"};
    }
    Result<void> result = co_await controller->attach(device);
    if (controller->disks() == 0) {
        delete controller;
    }
    co_return result;
}

} // namespace fl::drivers::ahci
