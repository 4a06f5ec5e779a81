module;
#include "core/try.hpp"
module drivers.pvscsi;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.log;
import core.mmio;
import io.executor;
import io.task;
import io.latch;
import io.block;
import io.block_queue;
import drivers.driver;
import drivers.pci;
import drivers.pci.msi;
import drivers.scsi.units;

namespace fl::drivers::pvscsi {

namespace {
constinit Controller* attached = nullptr; // controllers live until machine shutdown
} // namespace

Controller::Controller(Environment& environment, const pci::Device& device, u32 index)
    : Host(environment.executor, driver_name), environment_(environment), device_(device), index_(index),
      queue_(environment.executor, environment.executor), interrupts_(device, environment.interrupts, environment.mmio),
      changes_(environment.executor), units_(*this, environment.disks), tasks_(environment.executor) {}

Controller::~Controller() {
    disconnect();
    units_.clear(); // before the queue
}

// ---- set-up ----

// VMware's adapter has its registers in I/O ports as well, so their number is not fixed [pvscsi].
Result<void> Controller::map_registers() {
    for (u8 i = 0; i < 6; ++i) {
        const auto bar = device_.bar(i);
        if (!bar || bar->kind == pci::Bar::Kind::none || bar->kind == pci::Bar::Kind::io) {
            continue;
        }
        if (bar->size >= register_bytes) {
            TRY(const Mmio registers, device_.map_bar(environment_.mmio, i, 0, register_bytes));
            adapter().open(registers);
            return {};
        }
        i += bar->kind == pci::Bar::Kind::memory64 ? 1 : 0; // its upper half
    }
    return Error{Code::not_found, "the PVSCSI adapter has no memory BAR for its registers", register_bytes, 0};
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
    scsi::Units::Rules rules{.transport = scsi::transport_limits(environment_, Transport::max_transfer)};
    print(rules.name, "pvscsi{}", index_);
    units_.set_rules(rules);
    co_return Result<void>{};
}

// ---- units ----

/// Ends a command of the driver that was not answered in time: its target has a time-out to abort it, another one to
/// reset itself. Then the adapter is reset, because the command's data could still be written. Always an Error.
io::Task<Result<void>> Controller::end(Exchange& exchange) {
    const Nanoseconds timeout = environment_.timeout;
    const u32 target = exchange.unit.target;
    const u64 ms = timeout / 1'000'000;
    log::warning("pvscsi{}: target {} does not answer a command within {} ms: ABORT_CMD", index_, target, ms);
    auto sent = adapter().command(AdapterCommand::abort_cmd,
                                  AbortCommand{.context = context_of(exchange.id), .target = target});
    bool ended = sent && co_await exchange.done.wait({environment_.executor, timeout});
    if (!ended && queue_.is_open()) {
        log::warning("pvscsi{}: the command to target {} was not aborted: RESET_DEVICE", index_, target);
        sent = adapter().command(AdapterCommand::reset_device, ResetDevice{.target = target});
        ended = sent && co_await exchange.done.wait({environment_.executor, timeout});
    }
    if (!ended) {
        queue_.close(io::Status::device_gone,
                     {Code::timed_out, "the PVSCSI adapter did not answer a command, nor an abort and a reset of its "
                                       "target: it is reset and not used"});
    }
    co_return Error{Code::timed_out, "the target did not answer a command of the driver within a time-out"};
}

io::Task<Result<void>> Controller::execute(u16 lun, scsi::Cdb cdb, u32 bytes, scsi::Response& response) {
    Exchange exchange(environment_.executor);
    exchange.unit = {target(), static_cast<u8>(lun)};
    exchange.cdb = cdb;
    if (bytes != 0) {
        std::memset(scratch_.data(), 0, bytes);
        exchange.data = scratch_.span().subspan(0, bytes);
    }
    CO_CHECK(co_await scsi::send_with_room(queue_, exchange, environment_.executor, environment_.timeout));
    if (!co_await exchange.done.wait({environment_.executor, environment_.timeout})) {
        co_return co_await end(exchange);
    }
    if (!exchange.answered) {
        co_return Error{Code::device_gone, "the PVSCSI adapter was closed before it answered a command of the driver"};
    }
    response = exchange.response;
    // Adapters may not say how much of a shorter answer has arrived: the rest is zero.
    const u32 moved = response.moved == 0 && response.good() ? bytes : std::min(response.moved, bytes);
    response.data = {reinterpret_cast<const u8*>(scratch_.data()), moved};
    co_return Result<void>{};
}

scsi::Unit* Controller::make(scsi::UnitNumber at, const scsi::UnitDescription& found,
                             io::BlockDevice::Identity& identity) {
    print(identity.features, "{}{}{} max-transfer={}", messages_ ? "hot-plug " : "",
          threshold_ ? "call-threshold " : "", pci::name(interrupts_.kind()), found.limits.max_transfer);
    const Disk::Unit unit{found.limits, {at.target, static_cast<u8>(at.lun)}};
    return scsi::make_lanes<Disk>(1,
                                  [&](u32) { return new (std::nothrow) Disk(queue_, unit, found.geometry, identity); });
}

// ---- hot plug and the end ----

io::Task<Result<void>> Controller::watch() {
    while (queue_.is_open()) {
        const auto target = queue_.transport().targets().take();
        if (!target) {
            changes_.close();
            static_cast<void>(co_await changes_.wait());
            continue;
        }
        log::info("pvscsi{}: target {} has changed", index_, *target);
        if (auto scanned = co_await units_.scan_target(*target); !scanned) {
            log::warning("pvscsi{}: target {}: {}", index_, *target, scanned.error());
        }
    }
    disconnect();
    co_return Result<void>{};
}

void Controller::disconnect() {
    if (!std::exchange(opened_, false)) {
        return interrupts_.detach();
    }
    queue_.transport().recovery().leave();
    if (queue_.is_open()) {
        queue_.stop();
    } else if (!queue_.transport().recovery().stopped()) {
        static_cast<void>(adapter().command(AdapterCommand::adapter_reset)); // never opened, or it was refused
    }
    interrupts_.detach();
    if (!queue_.transport()
             .recovery()
             .stopped()) { // takes its access to memory away, even from an adapter that does not answer
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
