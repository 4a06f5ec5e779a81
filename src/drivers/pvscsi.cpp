module;
#include "core/try.hpp"
module drivers.pvscsi;
import core.std;
import core.result;
import core.text;
import core.dma;
import core.log;
import core.mmio;
import core.vector;
import io.executor;
import io.task;
import io.latch;
import io.block;
import io.block_queue;
import drivers.driver;
import drivers.pci;
import drivers.pci.msi;
import drivers.scsi.unit;

namespace fl::drivers::pvscsi {

namespace {
constinit Controller* attached = nullptr; // controllers live until machine shutdown
} // namespace

Controller::Controller(Environment& environment, const pci::Device& device, u32 index)
    : environment_(environment), device_(device), index_(index), queue_(environment.executor, environment.executor),
      interrupts_(device, environment.interrupts, environment.mmio), changes_(environment.executor),
      tasks_(environment.executor) {}

Controller::~Controller() {
    disconnect();
    for (Disk* disk : units_) {
        delete disk;
    }
}

// ---- set-up ----

// VMware's adapter has its registers in I/O ports as well, so their number is not fixed [pvscsi].
Result<void> Controller::map_registers() {
    Error first{Code::not_found, "the PVSCSI adapter has no memory BAR for its registers", register_bytes, 0};
    for (u8 i = 0; i < 6; ++i) {
        const auto bar = device_.memory_bar(i);
        if (!bar || bar->size < register_bytes) {
            continue;
        }
        TRY(const Mmio registers, device_.map_bar(environment_.mmio, i, 0, register_bytes));
        adapter().open(registers);
        return {};
    }
    return first;
}

io::Task<Result<void>> Controller::connect() {
    if (const u64 delay = device_.power_on(); delay != 0) {
        co_await environment_.executor.sleep(delay);
    }
    CO_CHECK(map_registers());
    if (adapter().absent()) {
        co_return Error{Code::device_gone, "the PVSCSI adapter does not answer: its registers read as all ones"};
    }
    CO_CHECK(adapter().command(AdapterCommand::adapter_reset));
    adapter().disable_interrupts();
    CO_TRY(rings_, environment_.dma.buffer(Memory::ring_bytes));
    CO_TRY(areas_, environment_.dma.buffer(Memory::areas_bytes));
    CO_TRY(scratch_, environment_.dma.buffer(scsi::Nexus::max_data));
    const pci::VectorUse use{environment_.executor.processor(), Transport::on_interrupt, &queue_.transport()};
    CO_CHECK(interrupts_.attach(
        {&use, 1}, 1, environment_.allows(Feature::messages) ? pci::InterruptKind::msix : pci::InterruptKind::line));
    device_.change_command(pci::Command::of(pci::Command::bus_master));
    opened_ = true;
    targets_ = adapter().read_targets(scratch_);
    const Memory memory{rings_, areas_};
    CO_CHECK(adapter().set_up(memory));
    messages_ = adapter().set_up_messages(memory);
    threshold_ = environment_.allows(Feature::event_idx) && adapter().set_up_threshold();
    queue_.open(environment_.timeout);
    CO_CHECK(
        queue_.transport().start(memory, {.line = interrupts_.kind() == pci::InterruptKind::line,
                                          .messages = messages_,
                                          .threshold = threshold_,
                                          .timeout = environment_.timeout,
                                          .notify = [](void* self) { static_cast<Controller*>(self)->changes_.open(); },
                                          .context = this}));
    adapter().enable_interrupts(messages_);
    co_return Result<void>{};
}

// ---- units ----

io::Task<Result<void>> Controller::Target::execute(u16 lun, scsi::Cdb cdb, u32 bytes, scsi::Response& response) {
    Controller& c = controller_;
    Exchange exchange(c.environment_.executor);
    exchange.unit = {number_, static_cast<u8>(lun)};
    exchange.cdb = cdb;
    if (bytes != 0) {
        std::memset(c.scratch_.data(), 0, bytes);
        exchange.data = c.scratch_.span().subspan(0, bytes);
    }
    const io::Bound bound(c.environment_.executor, c.environment_.timeout);
    for (;;) {
        const auto sent = c.queue_.send(exchange);
        if (sent) {
            break;
        }
        if (sent.error().code != Code::exhausted || bound.passed()) {
            co_return sent.error();
        }
        co_await c.environment_.executor.sleep(1'000'000);
    }
    if (!co_await exchange.done.wait({c.environment_.executor, c.environment_.timeout})) {
        c.queue_.abandon(exchange);
        const Error silent{Code::timed_out, "the PVSCSI adapter did not answer a command: it is reset and not used"};
        c.queue_.close(io::Status::device_gone, silent); // its data may still arrive otherwise
        co_return silent;
    }
    if (!exchange.answered) {
        co_return Error{Code::device_gone, "the PVSCSI adapter's queue was closed during the scan"};
    }
    response = exchange.response;
    // Adapters may not say how much of a shorter answer has arrived: the rest is zero.
    const u32 moved = response.moved == 0 && response.good() ? bytes : std::min(response.moved, bytes);
    response.data = {reinterpret_cast<const u8*>(c.scratch_.data()), moved};
    co_return Result<void>{};
}

io::Task<Result<void>> Controller::scan() {
    for (u32 number = 0; number < targets_; ++number) {
        CO_CHECK(co_await scan_target(static_cast<u8>(number)));
    }
    co_return Result<void>{};
}

// Error: the queue has closed.
io::Task<Result<void>> Controller::scan_target(u8 number) {
    Target target(*this, number);
    std::array<bool, max_luns> present{};
    scsi::Response response;
    CO_CHECK(co_await scsi::execute_retrying(target, 0, scsi::test_unit_ready(), 0, response));
    if (response.service != scsi::ServiceResponse::no_unit) { // the target exists
        const auto list = co_await scsi::report_luns(target, present);
        if (!list && !queue_.is_open()) {
            co_return list.error();
        }
        present[0] = present[0] || !list || !list->complete;
        if (list && list->out_of_range != 0) {
            FixedText<96> reason;
            print(reason, "{} {} beyond LUN {}", list->out_of_range, plural(list->out_of_range, "units"), max_luns - 1);
            unused({number, max_luns - 1}, "SCSI units", Unused::no_room, reason);
        }
    }
    for (u32 lun = 0; lun < max_luns; ++lun) {
        const Address unit{number, static_cast<u8>(lun)};
        if (Disk* disk = known(unit); disk != nullptr && !present[lun]) {
            remove(*disk, "the host has removed the disk");
        }
        if (!present[lun]) {
            continue;
        }
        if (auto scanned = co_await scan_unit(target, unit.lun); !scanned) {
            if (!queue_.is_open()) {
                co_return scanned.error();
            }
            FixedText<160> reason;
            print(reason, "{}", scanned.error());
            unused(unit, "SCSI disk", unused_because(scanned.error().code), reason);
        }
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Controller::scan_unit(Target& target, u8 lun) {
    const Address address{target.number(), lun};
    CO_TRY(const std::optional<scsi::Inquiry> inquiry, co_await scsi::inquire(target, lun));
    Disk* disk = known(address);
    if (!inquiry || !inquiry->disk()) {
        if (disk != nullptr) {
            remove(*disk, "the host has removed the disk");
        }
        if (inquiry && inquiry->qualifier == 0) {
            FixedText<64> what;
            print(what, "SCSI device of type {:#x} ({} {})", inquiry->device_type, inquiry->vendor, inquiry->product);
            unused(address, what, Unused::not_a_disk,
                   "no driver for CD drives and other SCSI devices but disks in this build");
        }
        co_return Result<void>{};
    }
    if (disk != nullptr) {
        CO_TRY(const scsi::UnitState now, co_await scsi::read_state(target, lun));
        if (scsi::compare(*inquiry, now, disk->geometry(), disk->identity().model, limits()) == scsi::Change::none) {
            co_return Result<void>{};
        }
        remove(*disk, "the host has changed the disk: it gets a new name");
    }
    CO_TRY(const scsi::UnitDescription found, co_await scsi::describe(target, lun, *inquiry, limits()));
    if (!found.medium) {
        unused(address, "SCSI disk", Unused::empty, "there is no medium in it");
        co_return Result<void>{};
    }
    co_return attach({found.limits, address}, found);
}

Result<void> Controller::attach(const Disk::Unit& unit, const scsi::UnitDescription& found) {
    if (units_.size() == max_units) {
        return Error{Code::exhausted, "more units than a PVSCSI adapter has room for", max_units, max_units + 1};
    }
    io::BlockDevice::Identity identity;
    identity.driver = driver_name;
    identity.kind = io::Kind::synthetic;
    identity.name = environment_.disks.free_name("sd");
    identity.model = found.model;
    io::Geometry geometry = found.geometry;
    geometry.discard = geometry.discard && environment_.allows(Feature::discard);
    print(identity.features, "{}{}{}{}{} max-transfer={}", geometry.flush ? "flush " : "",
          geometry.discard ? "discard " : "", messages_ ? "hot-plug " : "", threshold_ ? "call-threshold " : "",
          pci::name(interrupts_.kind()), unit.max_transfer);
    auto* disk = new (std::nothrow) Disk(queue_, unit, geometry, identity);
    if (disk == nullptr || !units_.push(disk)) {
        delete disk;
        return Error{Code::exhausted, "no memory for a disk"};
    }
    if (auto announced = environment_.disks.announce(*disk, DiskSink::no_twin); !announced) {
        units_.remove(units_.size() - 1);
        delete disk;
        return announced;
    }
    return {};
}

Disk* Controller::known(Address unit) const {
    for (Disk* disk : units_) {
        if (!disk->removed() && disk->unit().target == unit.target && disk->unit().lun == unit.lun) {
            return disk;
        }
    }
    return nullptr;
}

void Controller::remove(Disk& disk, std::string_view why) {
    log::warning("{}: {}", disk.identity().name, why);
    disk.remove();
}

void Controller::unused(Address unit, std::string_view what, Unused why, std::string_view reason) {
    FixedText<64> address;
    print(address, "pvscsi{} target {} LUN {}", index_, unit.target, unit.lun);
    environment_.disks.unused({"scsi", address, what, why, reason});
}

// ---- hot plug and the end ----

io::Task<Result<void>> Controller::watch() {
    while (queue_.is_open()) {
        const auto target = queue_.transport().take_changed();
        if (!target) {
            changes_.close();
            static_cast<void>(co_await changes_.wait());
            continue;
        }
        log::info("pvscsi{}: target {} has changed", index_, *target);
        if (auto scanned = co_await scan_target(*target); !scanned) {
            log::warning("pvscsi{}: {}", index_, scanned.error());
        }
    }
    disconnect();
    co_return Result<void>{};
}

void Controller::disconnect() {
    if (!std::exchange(opened_, false)) {
        return interrupts_.detach();
    }
    queue_.transport().leave();
    if (queue_.is_open()) {
        queue_.stop();
    } else if (!queue_.transport().stopped()) {
        static_cast<void>(adapter().command(AdapterCommand::adapter_reset)); // never opened, or it was refused
    }
    interrupts_.detach();
    if (!queue_.transport().stopped()) { // takes its access to memory away, even from an adapter that does not answer
        device_.change_command({}, pci::Command::of(pci::Command::bus_master));
    }
    queue_.reclaim();
}

io::Task<Result<void>> probe(Environment& environment, pci::Device device, u32 index) {
    if (!pci::matches(ids, device)) {
        co_return Error{Code::not_supported, "not a PVSCSI adapter"};
    }
    auto* controller = new (std::nothrow) Controller(environment, device, index);
    if (controller == nullptr) {
        co_return Error{Code::exhausted, "no memory for a PVSCSI adapter"};
    }
    auto result = co_await controller->connect();
    if (result) {
        log::info("pvscsi{}: {} targets, {}{}{}", index, controller->targets_,
                  pci::name(controller->interrupts_.kind()), controller->messages_ ? ", hot plug" : "",
                  controller->threshold_ ? ", request call threshold" : "");
        result = co_await controller->scan();
    }
    if (result) {
        controller->next_ = std::exchange(attached, controller);
        if (auto kept = controller->keep(); !kept) {
            log::warning("pvscsi{}: changes of the targets will not be detected: {}", index, kept.error());
        }
        co_return result;
    }
    controller->disconnect();
    if (controller->disks() != 0) {                              // known to the machine
        controller->next_ = std::exchange(attached, controller); // kept, closed
    } else {
        delete controller;
    }
    co_return result;
}

} // namespace fl::drivers::pvscsi
