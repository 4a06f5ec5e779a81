module;
#include "core/try.hpp"
module drivers.e1000;
import core.std;
import core.dma;
import core.log;
import core.mmio;
import core.result;
import core.text;
import io.block;
import io.executor;
import io.latch;
import io.net;
import io.task;
import drivers.driver;
import drivers.pci;
import drivers.pci.msi;

namespace fl::drivers::e1000 {

namespace {
constinit Controller* attached = nullptr; // cards live until machine shutdown
} // namespace

Controller::Controller(Environment& environment, const pci::Device& device)
    : environment_(environment), device_(device), card_(environment.executor),
      interrupts_(device, environment.interrupts, environment.mmio), trouble_(environment.executor),
      tasks_(environment.executor) {}

Controller::~Controller() { disconnect(); }

io::Task<Result<void>> Controller::identify() {
    if (const u64 delay = device_.power_on(); delay != 0) {
        co_await environment_.executor.sleep(delay);
    }
    CO_TRY(const Mmio registers, device_.map_bar(environment_.mmio, 0, 0, register_bytes));
    card_.adapter().open(registers);
    if (card_.adapter().absent()) {
        co_return Error{Code::device_gone, "the network card does not answer: its registers read as all ones"};
    }
    CO_TRY(address_, co_await card_.adapter().address(environment_.executor, environment_.timeout));
    number_ = environment_.nets->number_of(address_);
    co_return Result<void>{};
}

io::Task<Result<void>> Controller::connect() {
    Adapter& adapter = card_.adapter();
    CO_CHECK(co_await adapter.reset(environment_.executor, environment_.timeout));
    CO_TRY(rings_, environment_.dma.buffer(Card::ring_memory_bytes));
    CO_TRY(receive_, environment_.dma.buffer(buffers_bytes));
    CO_TRY(transmit_, environment_.dma.buffer(buffers_bytes));
    const pci::VectorUse use{environment_.executor.processor(), Card::on_interrupt, &card_};
    CO_CHECK(interrupts_.attach(
        {&use, 1}, 1, environment_.allows(Feature::messages) ? pci::InterruptKind::msix : pci::InterruptKind::line));
    device_.change_command(pci::Command::of(pci::Command::bus_master));
    opened_ = true;
    io::NetDevice::Identity identity;
    identity.name = environment_.nets->free_name();
    identity.driver = driver_name;
    identity.kind = io::Kind::emulated;
    identity.mac = address_;
    identity.features = FixedText<96>(pci::name(interrupts_.kind()));
    print(identity.model, "Intel {}", device_.device == ids[0].device ? "82540EM" : "82545EM");
    card_.prepare(
        identity, {rings_, receive_, transmit_}, environment_.timeout,
        [](void* self) { static_cast<Controller*>(self)->trouble_.open(); }, this);
    card_.start();
    co_return Result<void>{};
}

io::Task<Result<void>> Controller::watch() {
    while (card_.is_open()) {
        static_cast<void>(co_await trouble_.wait());
        if (card_.is_open() && card_.wants_reset()) {
            if (const auto reset = co_await card_.adapter().reset(environment_.executor, environment_.timeout);
                !reset) {
                card_.fail(reset.error());
            } else {
                card_.start();
            }
        }
    }
    disconnect();
    environment_.nets->withdraw(number_);
    co_return Result<void>{};
}

void Controller::disconnect() {
    card_.leave();
    if (!std::exchange(opened_, false)) {
        interrupts_.detach();
        return;
    }
    card_.adapter().stop();
    // Takes its access to memory away, even from a card that does not answer.
    device_.change_command({}, pci::Command::of(pci::Command::bus_master));
    interrupts_.detach();
}

io::Task<Result<void>> probe(Environment& environment, pci::Device device, u32) {
    if (!pci::matches(ids, device)) {
        co_return Error{Code::not_supported, "not an 8254x network card"};
    }
    if (environment.nets == nullptr) {
        co_return Error{Code::not_supported, "network cards cannot be announced here"};
    }
    auto* controller = new (std::nothrow) Controller(environment, device);
    if (controller == nullptr) {
        co_return Error{Code::exhausted, "no memory for a network card"};
    }
    auto result = co_await controller->identify();
    if (result && !environment.nets->offered(controller->number())) {
        FixedText<64> address;
        print(address, "{:02x}:{:02x}.{}", device.at.bus, device.at.device, device.at.function);
        environment.nets->unused({.bus = "pci",
                                  .address = address.view(),
                                  .what = "network card",
                                  .why = Unused::taken,
                                  .number = controller->number(),
                                  .kind = DeviceKind::network});
        delete controller;
        co_return Result<void>{};
    }
    if (result) {
        result = co_await controller->connect();
    }
    if (result) {
        result = environment.nets->announce(controller->card(), controller->number());
    }
    if (result) {
        controller->next_ = std::exchange(attached, controller);
        if (auto kept = controller->keep(); !kept) {
            log::warning("e1000: a card that is silent will not be reset: {}", kept.error());
        }
        co_return result;
    }
    delete controller;
    co_return result;
}

} // namespace fl::drivers::e1000
