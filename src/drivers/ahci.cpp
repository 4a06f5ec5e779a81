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
constexpr Nanoseconds reset_bound = 1'000'000'000; // of HR [ahci-1.3.1 §10.4.3]
constexpr Nanoseconds handoff_bound = 25'000'000;  // for BOS [ahci-1.3.1 §10.6.3]
constexpr Nanoseconds busy_bound = 2'000'000'000;  // with BB
constexpr Nanoseconds spin_up_bound = 50'000'000;  // for a device to answer COMRESET after spin-up
constexpr Nanoseconds link_bound = 1'000'000'000;  // for the link of a device that was there before the reset, or came
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
        delete slot.disk; // stops the port
    }
    for (Disk* disk : retired_) {
        delete disk;
    }
}

void Controller::unused(u32 number, std::string_view what, Unused why, std::string_view reason) {
    FixedText<24> address;
    print(address, "port {}", number);
    environment_.disks.unused(
        {.bus = "ahci", .address = address, .what = what, .why = why, .reason = reason, .number = twin_of(number)});
}

void Controller::failed(u32 number, const Error& error) {
    FixedText<200> reason;
    print(reason, "{}", error);
    unused(number, "SATA disk", unused_because(error.code), reason);
}

/// Takes the HBA over from the firmware [ahci-1.3.1 §10.6.3].
io::Task<Result<void>> Controller::take_over() {
    if (!Capabilities2::read(abar_).get(Capabilities2::boh)) {
        co_return Result<void>{};
    }
    Handoff::change(abar_, 0, [](Handoff& h) { h.set(Handoff::oos, true); });
    constexpr u32 owned = Handoff::of(Handoff::bos).raw;
    auto released = co_await setup_.wait(handoff_bound, Handoff::offset, owned, false);
    if (!released && Handoff::read(abar_).get(Handoff::bb)) {
        released = co_await setup_.wait(busy_bound, Handoff::offset, owned, false);
    }
    if (!released) {
        log::warning("ahci: the firmware does not release the HBA (BOHC.BOS): taken from it");
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Controller::reset() {
    GlobalControl::of(GlobalControl::ae).write(abar_);
    GlobalControl::of(GlobalControl::ae, GlobalControl::hr).write(abar_);
    if (!co_await setup_.wait(reset_bound, GlobalControl::offset, GlobalControl::of(GlobalControl::hr).raw, false)) {
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
    setup_.open(abar_, capabilities_.get(Capabilities::s64a));
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
        if (!co_await setup_.wait(bound, port.at(SataStatus::offset), SataStatus::there, true)) {
            empty |= port.bit();
            continue;
        }
        if (auto examined = co_await examine(number); !examined) {
            failed(number, examined.error());
        }
        if (slots_[number].disk == nullptr) {
            static_cast<void>(co_await give_up(number));
        } else {
            events_.add(number, slots_[number].disk->events(), slots_[number].disk->queue());
        }
    }
    if (const auto opened = open(device); !opened) {
        for (u32 number = 0; number < max_ports; ++number) {
            if (slots_[number].disk != nullptr) {
                static_cast<void>(co_await give_up(number));
            }
        }
        co_return opened;
    }
    GlobalControl::of(GlobalControl::ae, GlobalControl::ie).write(abar_);
    for (u32 left = ports.usable; left != 0; left &= left - 1) {
        const u32 number = static_cast<u32>(std::countr_zero(left));
        Port port(abar_, number);
        if (slots_[number].disk == nullptr) {
            watch_port(number, (empty & port.bit()) != 0);
        } else if (!announce(number)) { // its disk stays: the handler may look at it
            static_cast<void>(co_await setup_.stop(port, slots_[number].memory));
        }
    }
    if (auto spawned = tasks_.spawn(watch()); !spawned) {
        log::warning("ahci: disks that are plugged in later are not used: {}", spawned.error());
    }
    co_return Result<void>{};
}

/// The handler does not know of a disk here: the port is not used, and the HBA must not store anything in its memory
/// any more.
io::Task<Result<void>> Controller::give_up(u32 number) {
    Slot& slot = slots_[number];
    Port port(abar_, number);
    auto stopped = co_await setup_.stop(port, slot.memory);
    slot.terms.reset();
    delete std::exchange(slot.disk, nullptr);
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
    if (auto announced = environment_.disks.announce(*slot.disk, twin_of(number)); !announced) {
        slot.disk->close();
        failed(number, announced.error());
        return false;
    }
    if (slot.terms->info.write_cache && !slot.terms->flush) {
        log::warning(
            "{}: it has a volatile write cache, which is neither flushed (features=-flush, or no such command) "
            "nor can be switched off",
            slot.disk->identity().name.view());
    }
    ++count_;
    return true;
}

/// Finds out what is at a port whose link has a device. A disk that is used is in the port's slot afterwards.
io::Task<Result<void>> Controller::examine(u32 number) {
    if (!environment_.disks.offered(twin_of(number))) { // another driver has the same disk
        unused(number, "SATA disk", Unused::taken);
        co_return Result<void>{};
    }
    Slot& slot = slots_[number];
    Port port(abar_, number);
    CO_CHECK(co_await setup_.start(port, slot.memory));
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
    CO_CHECK(co_await setup_.identify(port, memory, data));
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
              .identity = ata::DeviceIdentity(data),
              .depth = ncq ? std::min(sata.queue_depth, capabilities_.get(Capabilities::ncs) + 1) : 0,
              .flush = info.write_cache && (info.flush || info.flush_ext) && environment_.allows(Feature::flush),
              .discard = sata.trim && info.lba48 && environment_.allows(Feature::discard)};
    if (info.write_cache && !slot.terms->flush) {
        CO_CHECK(co_await disable_write_cache(port, slot));
    }
    slot.disk =
        new (std::nothrow) Disk(environment_.executor, environment_.dma, events_, port, PortMemory(slot.memory.span()),
                                capabilities_.get(Capabilities::s64a), environment_.timeout);
    if (slot.disk == nullptr) {
        co_return Error{Code::exhausted, "no memory for a disk"};
    }
    co_return Result<void>{};
}

/// Without flushes an acknowledged write must be on the medium. If the disk refuses, announce() says so.
io::Task<Result<void>> Controller::disable_write_cache(Port& port, Slot& slot) {
    const auto off = co_await setup_.execute(port, PortMemory(slot.memory.span()), no_write_cache_fis(), false);
    if (off) {
        slot.terms->info.write_cache = false;
        slot.terms->write_through = true;
    }
    if (off || off.error().code != Code::io) {
        co_return off;
    }
    CO_CHECK(co_await setup_.start(port, slot.memory)); // the refusal has stopped it
    ata::IdentifyData data;
    CO_CHECK(co_await setup_.identify(port, PortMemory(slot.memory.span()), data));
    if (ata::DeviceIdentity(data).words != slot.terms->identity.words) {
        co_return Error{Code::device_gone, "the disk was replaced while it was set up"};
    }
    co_return Result<void>{};
}

// ---- disks that come and go ----

/// Nothing is in use at the port: from now on a change of its link is an interrupt. `empty`: it had no link before.
void Controller::watch_port(u32 number, bool empty) {
    Port port(abar_, number);
    port.clear_errors();
    port.clear_pending(port.bit());
    events_.watch(number);
    port.write(interrupt_enable, PortInterrupts::link);
    if (empty && port.read<SataStatus>().get(SataStatus::det) != 0) {
        events_.changed(port.bit()); // plugged in a moment ago
    }
}

io::Task<Result<void>> Controller::watch() {
    for (;;) {
        static_cast<void>(co_await events_.changes().wait());
        for (u32 left = events_.take_changed(); left != 0; left &= left - 1) {
            if (GlobalControl::read(abar_).raw == ~u32{0}) {
                co_return Result<void>{}; // the HBA is gone: each of its disks finds that out itself
            }
            const u32 number = static_cast<u32>(std::countr_zero(left));
            if (auto looked = co_await look_again(number); !looked) {
                failed(number, looked.error());
            }
        }
    }
}

/// The link of a watched port has changed, or the disk at the port has closed. Error: the port is not used any more.
io::Task<Result<void>> Controller::look_again(u32 number) {
    Slot& slot = slots_[number];
    Port port(abar_, number);
    if (slot.disk != nullptr && slot.disk->queue().is_open()) {
        co_return Result<void>{}; // it was attached after the change
    }
    const bool plugged = events_.unwatch(number);
    port.write(interrupt_enable, 0);
    if (slot.disk != nullptr) {
        events_.remove(number);
        if (plugged) {
            slot.disk->remove(); // it had failed, and was unplugged now
        }
        if (!slot.disk->removed()) {
            watch_port(number, false);
            co_return Result<void>{};
        }
        CO_CHECK(co_await retire(number));
    }
    CO_CHECK(co_await setup_.reset_link(port));
    const auto there = co_await setup_.wait(link_bound, port.at(SataStatus::offset), SataStatus::there, true);
    if (there) {
        if (auto examined = co_await examine(number); !examined) {
            failed(number, examined.error());
        }
    }
    if (slot.disk == nullptr) {
        CO_CHECK(co_await give_up(number));
        watch_port(number, !there);
        co_return Result<void>{};
    }
    events_.add(number, slot.disk->events(), slot.disk->queue());
    if (!announce(number)) {
        co_return co_await setup_.stop(port, slot.memory);
    }
    co_return Result<void>{};
}

/// The disk has no port any more, and its users keep it.
io::Task<Result<void>> Controller::retire(u32 number) {
    Slot& slot = slots_[number];
    Port port(abar_, number);
    CO_CHECK(co_await setup_.stop(port, slot.memory));
    slot.disk->queue().reclaim();
    if (!retired_.push(slot.disk)) {
        co_return Error{Code::exhausted, "no memory to keep a removed disk"};
    }
    slot.disk = nullptr;
    slot.terms.reset();
    environment_.disks.withdraw(twin_of(number));
    co_return Result<void>{};
}

io::Task<Result<void>> probe(Environment& environment, pci::Device device, u32 index) {
    auto* controller = new (std::nothrow) Controller(environment, index == 0);
    if (controller == nullptr) {
        co_return Error{Code::exhausted, "no memory for an AHCI controller"};
    }
    Result<void> result = co_await controller->attach(device);
    if (!result && controller->disks() == 0) {
        delete controller;
    }
    co_return result;
}

} // namespace fl::drivers::ahci
