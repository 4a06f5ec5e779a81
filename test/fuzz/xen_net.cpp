// A network back end that answers arbitrarily, early, twice or never, and writes anything into the rings, while frames
// are sent and received. Checked: while the back end conforms, every frame arrives whole, in order and once, in both
// directions, and the card stays open; whatever it does, only whole frames of a permitted length are received, every
// send ends, the card closes at most once, and at the end every page and grant entry is free again.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>
import core.std;
import core.result;
import core.text;
import core.dma;
import core.log;
import core.time;
import io.executor;
import io.task;
import io.block;
import io.net;
import hv.xen.events;
import hv.xen.grants;
import drivers.xen_net.device;

#include "fuzz/blocks.hpp"
#include "fuzz/input.hpp"
#include "fuzz/log.hpp"
// Depends on the imports above.
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using fuzz::require;
using fuzz::word;
using io::SendStatus;
namespace xen = hv::xen;
constexpr u32 port = 5;
constexpr u32 mtu = 9000;
constexpr u32 max_waiters = 12;

struct Machine final : io::FrameReceiver {
    explicit Machine(fuzz::Input& in) : input(in) {
        grants->install(table, 1);
        free_grants = grants->available();
        hypercalls = xen::Hypercalls(xen::Gate{this, [](void* self, u32, u64, u64, u64, u64, u64) {
                                                   return static_cast<Machine*>(self)->sends_fail ? i64{-22} : i64{0};
                                               }});
        events.install(hypercalls, *shared);
        lanes.all[0] = &lane;
        lanes.count = 1;
        rings = *memory.buffer(8192);
        io::NetDevice::Identity identity;
        identity.name.write("eth0");
        identity.mtu = mtu;
        require(static_cast<bool>(lane.prepare(identity, true, rings, 0, xen::Port{port}, memory)));
        require(static_cast<bool>(executor.run(lane.start())));
        lane.set_receiver(this);
        tx = rings.data();
        rx = rings.data() + 4096;
    }

    // ---- what the guest sees ----
    void receive(io::NetDevice&, std::span<const std::byte> frame, io::Checksum) override {
        require(frame.size() >= 14 && frame.size() <= mtu + 14 + 4);
        ++received;
        if (!damaged) {
            require(!to_receive.empty() && std::ranges::equal(to_receive.front(), frame));
            to_receive.pop_front();
        }
    }
    std::string frame() {
        std::string text(14 + input.word() % (mtu + 1), 0);
        const u8 seed = input.byte();
        for (usize i = 0; i < text.size(); ++i) {
            text[i] = static_cast<char>(seed + i * 31 + i / 256);
        }
        return text;
    }
    static std::span<const std::byte> bytes(std::string_view text) {
        return std::as_bytes(std::span(text.data(), text.size()));
    }
    void send() {
        const std::string text = frame();
        const usize head = 14 + input.word() % (text.size() - 13);
        const SendStatus status = lane.send_now({bytes(text).first(head), bytes(text).subspan(head)});
        require(status == SendStatus::sent || status == SendStatus::timed_out ||
                (status == SendStatus::device_gone && damaged));
        if (status == SendStatus::sent) {
            to_take.push_back(text);
        }
    }
    struct Waiter {
        std::string text;
        SendStatus status = SendStatus::not_sent;
    };
    static io::Task<Result<void>> wait(Machine& machine, Waiter& waiter, Nanoseconds bound) {
        waiter.status = co_await machine.lane.send({bytes(waiter.text)}, bound);
        co_return Result<void>{};
    }
    void send_and_wait() {
        if (waiters.size() == max_waiters) {
            return;
        }
        waiters.push_back(std::make_unique<Waiter>());
        waiters.back()->text = frame();
        // Which of several that wait is sent is not known here until the back end sees it.
        unordered = true;
        require(static_cast<bool>(group.spawn(wait(*this, *waiters.back(), input.byte() * Nanoseconds{1'000'000}))));
    }

    // ---- a back end that conforms ----
    std::byte* page(u32 grant) {
        require(damaged || (grant >= 8 && grant < table.size()));
        return grant < table.size() ? memory.at(u64{table[grant].frame} * 4096) : nullptr;
    }
    void take() {
        while (taken != word<u32>(tx)) {
            if (damaged && word<u32>(tx) - taken > 256) {
                return;
            }
            std::string text;
            usize total = 0;
            bool first = true;
            for (bool more = true; more;) {
                if (taken == word<u32>(tx)) {
                    require(damaged);
                    return;
                }
                std::byte* const at = tx + 64 + taken++ % 256 * 12;
                const u16 flags = word<u16>(at, 6);
                const u16 size = word<u16>(at, 10);
                held.push_back(word<u16>(at, 8));
                more = (flags & 4) != 0;
                const usize here = first && more ? 4096 : size;
                total = first ? size : total;
                first = false;
                const std::byte* const data = page(word<u32>(at));
                if (data == nullptr || here > 4096) {
                    require(damaged);
                    return;
                }
                require(damaged || (table[word<u32>(at)].flags & 7) == 5); // for reading
                text.append(reinterpret_cast<const char*>(data), here);
            }
            if (!damaged) {
                require(text.size() == total);
                require(unordered || (!to_take.empty() && to_take.front() == text));
            }
            if (!unordered && !to_take.empty()) {
                to_take.pop_front();
            }
        }
        word<u32>(tx, 4) = taken + 1;
    }
    void answer() {
        for (u32 n = input.byte() % 32; n != 0 && !held.empty(); --n) {
            put_tx(held.front(), static_cast<i16>(input.byte() % 8 == 0 ? -1 : 0));
            held.pop_front();
        }
        push(tx, tx_produced);
    }
    void put_tx(u16 id, i16 status) {
        std::byte* const at = tx + 64 + tx_produced++ % 256 * 12;
        word<u16>(at) = id;
        word<u16>(at, 2) = static_cast<u16>(status);
    }
    void deliver() {
        const std::string text = frame();
        const usize piece = 4096 - input.word() % 3500;
        const u32 slots = static_cast<u32>((text.size() + piece - 1) / piece);
        if (slots > 18 || word<u32>(rx) - rx_produced < slots || word<u32>(rx) - rx_produced > 256) {
            return;
        }
        for (usize at = 0; at < text.size(); at += piece) {
            const usize size = std::min(piece, text.size() - at);
            std::byte* const slot = rx + 64 + rx_produced++ % 256 * 8;
            std::byte* const data = page(word<u32>(slot, 4));
            const u16 offset = static_cast<u16>((4096 - size) * (input.byte() % 2));
            if (data == nullptr) {
                require(damaged);
                return;
            }
            std::memcpy(data + offset, text.data() + at, size);
            word<u16>(slot, 2) = offset;
            word<u16>(slot, 4) = at + size < text.size() ? 4 : 0;
            word<u16>(slot, 6) = static_cast<u16>(size);
        }
        to_receive.emplace_back(bytes(text).begin(), bytes(text).end());
        push(rx, rx_produced);
    }
    void push(std::byte* ring, u32 produced) {
        const u32 old = std::exchange(word<u32>(ring, 8), produced);
        if (produced - word<u32>(ring, 12) < produced - old) {
            raise();
        }
    }
    void raise() {
        if ((std::atomic_ref<u64>(shared->mask[0]).load() >> port & 1) == 0) {
            drivers::xen_net::Lane::on_event(&lane);
        } else {
            std::atomic_ref<u64>(shared->pending[0]).fetch_or(u64{1} << port);
        }
    }

    // ---- one that does not ----
    void harm(u8 how) {
        damaged = true;
        switch (how % 7) {
        case 0: put_tx(static_cast<u16>(input.word()), static_cast<i16>(input.word())); break;
        case 1: put_tx(held.empty() ? u16{0} : held.front(), static_cast<i16>(input.byte())); break;
        case 2: {
            std::byte* const slot = rx + 64 + rx_produced++ % 256 * 8;
            word<u16>(slot) = input.byte() % 2 == 0 ? word<u16>(slot) : static_cast<u16>(input.word());
            word<u16>(slot, 2) = static_cast<u16>(input.word());
            word<u16>(slot, 4) = static_cast<u16>(input.byte());
            word<u16>(slot, 6) = static_cast<u16>(input.word());
            break;
        }
        case 3: rx_produced += input.word(); break;
        case 4: tx_produced += input.word(); break;
        case 5: rings.data()[input.word() % 8192] = std::byte{input.byte()}; break;
        case 6: {
            std::byte* const data = page(word<u32>(rx + 64 + input.byte() * 8, 4));
            if (data != nullptr) {
                data[input.word() % 4096] = std::byte{input.byte()};
            }
            break;
        }
        }
        word<u32>(tx, 8) = tx_produced;
        word<u32>(rx, 8) = rx_produced;
        raise();
    }

    void run() {
        for (u32 steps = 0; steps < 3000 && !input.empty(); ++steps) {
            const u8 op = input.byte();
            switch (op % 16) {
            case 0:
            case 1: send(); break;
            case 2: send_and_wait(); break;
            case 3:
            case 4: take(); break;
            case 5: answer(); break;
            case 6:
            case 7: deliver(); break;
            case 8: raise(); break;
            case 9: clock.time += Nanoseconds{1'000'000} * input.byte(); break;
            case 10: harm(op / 16); break;
            case 11:
                sends_fail = op / 16 == 15;
                damaged = damaged || sends_fail;
                break;
            default: executor.turn(); break;
            }
            require(damaged || lane.is_open());
            require(lane.is_open() || log.count("closed:") == 1);
        }
        require(static_cast<bool>(executor.run(lane.stop())));
        for (u32 turns = 0; turns < 4; ++turns) {
            executor.turn();
        }
        require(group.running() == 0);
        for (const auto& waiter : waiters) {
            require(waiter->status != SendStatus::not_sent);
        }
        require(lane.counters().received == received && log.count("closed:") <= 1);
        lane.reclaim();
        require(grants->available() == free_grants);
    }

    fuzz::Input& input;
    fuzz::Log log;
    test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    fuzz::Blocks memory;
    alignas(8) std::array<xen::GrantEntry, 512> table{};
    std::unique_ptr<xen::Grants> grants = std::make_unique<xen::Grants>();
    std::unique_ptr<xen::SharedInfo> shared = std::make_unique<xen::SharedInfo>();
    xen::Hypercalls hypercalls;
    xen::Events events;
    DmaBuffer rings;
    drivers::xen_net::Lanes lanes;
    drivers::xen_net::Lane lane{executor, events, *grants, lanes};
    io::TaskGroup group{executor};
    std::vector<std::unique_ptr<Waiter>> waiters;
    std::byte* tx = nullptr;
    std::byte* rx = nullptr;
    u32 free_grants = 0;
    u32 taken = 0, tx_produced = 0, rx_produced = 0;
    u64 received = 0;
    bool damaged = false, unordered = false, sends_fail = false;
    std::deque<u16> held;
    std::deque<std::string> to_take;
    std::deque<std::vector<std::byte>> to_receive;
};

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    fuzz::Input input(data, size);
    Machine(input).run();
    return 0;
}
