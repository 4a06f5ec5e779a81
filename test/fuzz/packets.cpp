// An open channel whose host writes anything into both rings at any time: nothing is read or written outside of the rings and the buffer, and a
// ring that was found broken stays so.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <span>
import core.std;
import core.result;
import core.dma;
import core.time;
import core.log;
import core.text;
import io.executor;
import io.block;
import hv.hyperv.hypercall;
import hv.hyperv.channel;

#include "fuzz/input.hpp"
// behind it
#include "unit/io_support.hpp"

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    using namespace fl;
    constexpr u32 ring = 8192; // a header page and one of bytes
    fuzz::Input input(data, size);
    test::HeapDma dma;
    hv::hyperv::Hypercalls hypercalls;
    hv::hyperv::Gate gate;
    gate.call = [](void*, u64, u64, u64) -> u64 { return 0; };
    fuzz::require(static_cast<bool>(hypercalls.install(gate, dma)));
    std::atomic<u32> events{0};
    hv::hyperv::Channel channel;
    auto rings = dma.buffer(2 * ring);
    std::byte* memory = rings->data();
    hv::hyperv::Channel::Signalling signalling;
    signalling.hypercalls = &hypercalls;
    fuzz::require(static_cast<bool>(channel.attach({}, 0, std::move(*rings), ring, signalling, events)));
    std::array<std::byte, 256> payload{};
    bool broken = false;
    while (!input.empty()) {
        switch (input.byte() % 9) {
        case 0: { // the host writes into a ring
            const u32 at = input.word() % (2 * ring);
            const auto bytes = input.take(std::min<u32>(input.byte(), 2 * ring - at));
            std::copy(bytes.begin(), bytes.end(), memory + at);
            break;
        }
        case 1: { // a word of a header
            const u32 at = input.byte() % 5 * 4 + (input.byte() % 2) * ring;
            const u32 value = input.word();
            std::memcpy(memory + at, &value, 4);
            break;
        }
        case 2: { // an honest packet of any kind
            u32 write;
            std::memcpy(&write, memory + ring, 4);
            write %= 4096;
            const u16 head[4] = {static_cast<u16>(6 + input.byte() % 8), 2, static_cast<u16>(2 + input.byte() % 16), input.byte()};
            for (u32 i = 0; i < head[2] * 8u + 8; ++i) {
                const auto* from = reinterpret_cast<const std::byte*>(head);
                memory[ring + 4096 + (write + i) % 4096] = i < 8 ? from[i] : static_cast<std::byte>(i);
            }
            write = (write + head[2] * 8u + 8) % 4096;
            std::memcpy(memory + ring, &write, 4);
            break;
        }
        case 3: {
            hv::hyperv::Packet packet;
            const auto got = channel.receive(packet);
            fuzz::require(!broken || !got);
            broken = broken || !got;
            if (got && *got) {
                u32 sum = 0;
                for (std::byte b : packet.header) {
                    sum += static_cast<u8>(b);
                }
                for (std::byte b : packet.payload) {
                    sum += static_cast<u8>(b);
                }
                fuzz::require(sum < ~0u && packet.header.size() + packet.payload.size() <= hv::hyperv::Channel::receive_max);
            }
            break;
        }
        case 4: channel.release(); break;
        case 5: {
            const auto armed = channel.arm();
            broken = broken || !armed;
            break;
        }
        case 6: static_cast<void>(channel.send_inband(std::span(payload).first(input.byte()), input.word(), true)); break;
        case 7: {
            const DmaSpan buffer{nullptr, input.word(), input.word() % 70000};
            static_cast<void>(channel.send_gpa_direct(std::span(payload).first(64), buffer, input.word()));
            break;
        }
        default: static_cast<void>(channel.publish()); break;
        }
    }
    static_cast<void>(channel.broken());
    channel.detach().reset();
    return 0;
}
