// A bus whose host sends any messages while the guest connects, asks for offers, opens and closes a channel: every wait ends, and nothing
// outside of a message is read.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
import core.std;
import core.result;
import core.dma;
import core.interrupt;
import core.log;
import core.time;
import core.text;
import io.executor;
import io.block;
import io.task;
import hv.backend;
import hv.hyperv;

#include "fuzz/input.hpp"
// behind it
#include "unit/io_support.hpp"

namespace {
using namespace fl;

struct Host final : hv::Privileged {
    fuzz::Input* input = nullptr;
    hv::hyperv::Synic synic;
    u64 messages = 0;
    u64 read_msr(u32) override { return 0; }
    void write_msr(u32 msr, u64 value) override {
        if (msr == 0x40000083) {
            messages = (value & 1) != 0 ? value & ~u64{0xfff} : 0;
        }
    }
    u8 in8(u16) override { return 0; }
    u16 in16(u16) override { return 0; }
    u32 in32(u16) override { return 0; }
    void out8(u16, u8) override {}
    void out16(u16, u16) override {}
    void out32(u16, u32) override {}

    void step() {
        if (messages == 0) {
            return;
        }
        for (u32 n = 0; n < 4 && !input->empty(); ++n) {
            auto* slot = reinterpret_cast<std::byte*>(messages) + 2 * 256;
            u32 there;
            std::memcpy(&there, slot, 4);
            if (there != 0) {
                return;
            }
            const u8 length = input->byte();
            const auto bytes = input->take(length);
            slot[4] = static_cast<std::byte>(length); // which may be more than the 240 that there can be
            std::copy_n(bytes.begin(), std::min<usize>(bytes.size(), 240), slot + 16);
            const u32 type = 1;
            std::memcpy(slot, &type, 4);
            hv::hyperv::Synic::on_interrupt(&synic);
        }
    }
};

io::Task<Result<void>> life(hv::hyperv::Vmbus& bus, hv::hyperv::Channel& channel, bool& open) {
    if (auto done = co_await bus.connect(); !done) {
        co_return done;
    }
    static_cast<void>(co_await bus.request_offers());
    std::optional<hv::hyperv::Offer> offer;
    bus.for_each_offer([&](const hv::hyperv::Offer& o) { offer = o; });
    if (!offer) {
        co_return Result<void>{};
    }
    const auto opened = co_await bus.open(channel, *offer, {.send_bytes = 4096, .receive_bytes = 4096});
    open = static_cast<bool>(opened);
    if (open) {
        static_cast<void>(co_await bus.sub_channel(offer->instance, 1, ~u64{0} >> 32));
        static_cast<void>(co_await bus.close(channel));
    }
    co_return Result<void>{};
}
} // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    fuzz::Input input(data, size);
    test::FakeMachine clock;
    io::Executor executor(clock.platform());
    test::HeapDma dma;
    auto host = std::make_unique<Host>();
    host->input = &input;
    hv::hyperv::Hypercalls hypercalls;
    hv::hyperv::Gate gate;
    gate.call = [](void*, u64, u64, u64) -> u64 { return 0; };
    fuzz::require(static_cast<bool>(hypercalls.install(gate, dma)));
    host->synic.install(*host, dma);
    fuzz::require(static_cast<bool>(host->synic.enable(executor, 0x41, true)));
    clock.on_idle_context = host.get();
    clock.on_idle = [](void* self) { static_cast<Host*>(self)->step(); };
    auto bus = std::make_unique<hv::hyperv::Vmbus>();
    const hv::hyperv::VmbusEnvironment environment{hypercalls, host->synic, dma, executor, 50'000'000};
    fuzz::require(static_cast<bool>(bus->install(environment)));
    auto channel = std::make_unique<hv::hyperv::Channel>();
    bool open = false;
    static_cast<void>(executor.run(life(*bus, *channel, open)));
    fuzz::require(clock.time < 60'000'000'000); // every wait ends
    executor.remove(*bus);
    return 0;
}
