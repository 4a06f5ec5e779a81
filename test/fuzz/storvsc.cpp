// A disk whose host answers with anything: every request ends within a bounded time, once, and what was moved is only believed as far as it was
// asked for.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <vector>
import core.std;
import core.result;
import core.text;
import core.dma;
import core.log;
import core.time;
import io.executor;
import io.block;
import hv.hyperv.hypercall;
import hv.hyperv.channel;
import drivers.storvsc.disk;

#include "fuzz/input.hpp"
// behind it
#include "unit/io_support.hpp"

namespace {
using namespace fl;
using drivers::storvsc::Disk;
using drivers::storvsc::Queue;
using drivers::storvsc::Version;
constexpr u32 ring = 4096 + 16384;

struct Host {
    fuzz::Input& input;
    std::byte* out;
    std::byte* in;
    std::vector<u64> ids{};
    std::atomic<u32>& events;
    io::Executor* executor = nullptr;

    // What the guest has published is taken; only the ids are kept.
    void take() {
        u32 write;
        u32 read;
        std::memcpy(&write, out, 4);
        std::memcpy(&read, out + 4, 4);
        while (read != write) {
            std::array<std::byte, 16> head;
            for (u32 i = 0; i < 16; ++i) {
                head[i] = out[4096 + (read + i) % 16384];
            }
            u16 units;
            u64 id;
            std::memcpy(&units, head.data() + 4, 2);
            std::memcpy(&id, head.data() + 8, 8);
            ids.push_back(id);
            read = (read + units * 8u + 8) % 16384;
        }
        std::memcpy(out + 4, &read, 4);
    }
    void send(u16 type, u64 id, std::span<const std::byte> payload) {
        u32 write;
        std::memcpy(&write, in, 4);
        write %= 16384;
        std::vector<std::byte> packet(16 + (payload.size() + 7) / 8 * 8 + 8);
        const u16 head[4] = {type, 2, static_cast<u16>(packet.size() / 8 - 1), 0};
        std::memcpy(packet.data(), head, 8);
        std::memcpy(packet.data() + 8, &id, 8);
        std::copy(payload.begin(), payload.end(), packet.begin() + 16);
        for (std::byte b : packet) {
            in[4096 + write] = b;
            write = (write + 1) % 16384;
        }
        std::memcpy(in, &write, 4);
    }
    void step() {
        if (input.empty()) {
            return;
        }
        take();
        const u8 what = input.byte();
        std::array<std::byte, 64> payload{};
        payload[0] = std::byte{1};
        payload[14] = std::byte{1};
        u64 id = 0;
        if (!ids.empty() && (what & 0x80) == 0) {
            const usize at = input.byte() % ids.size();
            id = ids[at];
            if ((what & 0x40) == 0) {
                ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(at));
            }
        } else {
            id = input.word();
        }
        switch (what & 7) {
        case 0: // honest but for how much was moved
        case 1: {
            const u32 moved = (what & 8) != 0 ? input.word() : 4096;
            std::memcpy(payload.data() + 24, &moved, 4);
            send(11, id, payload);
            break;
        }
        case 2:
        case 3: { // an error of any kind
            payload[14] = static_cast<std::byte>(input.byte());
            payload[15] = static_cast<std::byte>(input.byte());
            payload[21] = static_cast<std::byte>(input.byte());
            const auto sense = input.take(20);
            std::copy(sense.begin(), sense.end(), payload.begin() + 28);
            send(11, id, payload);
            break;
        }
        case 4: { // any packet
            const u16 type = input.byte() % 16;
            const auto bytes = input.take(input.byte());
            send(type, id, bytes);
            break;
        }
        case 5: { // an event
            const u32 operation = input.byte();
            std::memcpy(payload.data(), &operation, 4);
            send(6, 0, payload);
            break;
        }
        case 6: { // anything anywhere
            const u32 at = input.word() % ring;
            const auto bytes = input.take(std::min<u32>(input.byte(), ring - at));
            std::copy(bytes.begin(), bytes.end(), in + at);
            break;
        }
        default: break; // nothing: an interrupt alone
        }
        events.fetch_add(1);
        executor->wake();
    }
};
} // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    fuzz::Input input(data, size);
    const u8 shape = input.byte();
    test::FakeMachine clock;
    io::Executor executor(clock.platform());
    test::HeapDma dma;
    hv::hyperv::Hypercalls hypercalls;
    hv::hyperv::Gate gate;
    gate.call = [](void*, u64, u64, u64) -> u64 { return 0; };
    fuzz::require(static_cast<bool>(hypercalls.install(gate, dma)));
    std::atomic<u32> events{0};
    hv::hyperv::Channel channel;
    auto rings = dma.buffer(2 * ring);
    Host host{.input = input, .out = rings->data(), .in = rings->data() + ring, .events = events, .executor = &executor};
    hv::hyperv::Channel::Signalling signalling;
    signalling.hypercalls = &hypercalls;
    fuzz::require(static_cast<bool>(channel.attach({}, 0, std::move(*rings), ring, signalling, events)));
    clock.on_idle_context = &host;
    clock.on_idle = [](void* self) { static_cast<Host*>(self)->step(); };
    auto parameters = dma.buffer(4096);
    drivers::storvsc::Shared shared;
    {
        Queue queue(executor, channel, shared, true);
        queue.agree({(shape & 1) != 0 ? Version::win6 : Version::win10, 4096u << (shape >> 1 & 3)});
        queue.start(*parameters, 100'000'000);
        io::Geometry geometry;
        geometry.sectors = 4096;
        geometry.flush = geometry.discard = true;
        Disk::Unit unit;
        unit.max_transfer = queue.terms().max_transfer;
        unit.max_unmap_blocks = 64;
        Disk disk(queue, unit, geometry, {});
        auto buffer = dma.buffer(65536);
        std::array<std::unique_ptr<io::Request>, 12> requests;
        for (u32 i = 0; i < requests.size(); ++i) {
            const io::Op op = i % 6 == 5 ? io::Op::flush : i % 6 == 4 ? io::Op::discard : i % 2 == 0 ? io::Op::read : io::Op::write;
            requests[i] = std::make_unique<io::Request>(disk, op, i * 8,
                                                        op == io::Op::flush ? DmaSpan{} : buffer->span().subspan(0, i % 3 == 0 ? 65536 : 4096));
            disk.submit(*requests[i]);
        }
        bool some = true;
        for (u32 turns = 0; some; ++turns) {
            fuzz::require(turns < 100'000); // everything ends, whatever the host does
            executor.turn();
            some = std::any_of(requests.begin(), requests.end(), [](const auto& r) { return r->pending(); });
        }
        for (const auto& r : requests) {
            fuzz::require(r->status != io::Status::not_written);
        }
        queue.stop();
        buffer->abandon();
    }
    channel.detach().reset();
    return 0;
}
