// A network card that writes back arbitrarily, early or never, writes anything into the rings, answers registers with
// anything, disappears and does not come out of its reset, while frames are sent and received. Checked: while the card
// conforms, every frame arrives whole, in order and once, in both directions, as far as no reset has lost it, and the
// card stays open; whatever it does, it is given only buffers of the driver's, only whole frames of a permitted length
// are received, every send ends, the card closes at most once, and is not accessed afterwards but to stop it.
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
#include <unordered_map>
#include <vector>
import core.std;
import core.result;
import core.text;
import core.dma;
import core.log;
import core.mmio;
import core.time;
import io.executor;
import io.task;
import io.block;
import io.net;
import drivers.e1000.card;

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
namespace e1000 = drivers::e1000;
constexpr u32 mtu = 1500;
constexpr u32 max_waiters = 12;
constexpr u32 entries = 64;
constexpr Nanoseconds timeout = 200'000'000;
// The card's registers, by their offsets in the manual.
constexpr u64 ctrl = 0x0000, status = 0x0008, icr = 0x00c0, ims = 0x00d0, imc = 0x00d8, rctl = 0x0100, tctl = 0x0400;
constexpr u64 rx_ring = 0x2800, tx_ring = 0x3800, ring_length = 0x08, ring_tail = 0x18;

struct Machine final : io::FrameReceiver, MmioModel {
    explicit Machine(fuzz::Input& in) : input(in) {
        rings = *memory.buffer(e1000::Card::ring_memory_bytes);
        received_into = *memory.buffer(e1000::buffers_bytes);
        sent_from = *memory.buffer(e1000::buffers_bytes);
        io::NetDevice::Identity identity;
        identity.name.write("eth0");
        identity.mtu = mtu;
        identity.mac = {{2, 0, 0, 0, 0, 1}};
        card.prepare(
            identity, {rings, received_into, sent_from}, timeout,
            [](void* self) { static_cast<Machine*>(self)->woken = true; }, this);
        card.adapter().open(Mmio(*this, e1000::register_bytes));
        require(static_cast<bool>(executor.run(card.adapter().reset(executor, timeout))));
        card.start();
        card.set_receiver(this);
    }

    // ---- registers ----
    u64 read(u64 at, u32 width) override {
        require(width == 4 && at % 4 == 0);
        require(!ended);
        if (gone) {
            return ~u32{0};
        }
        if (lies != 0 && --lies == 0) {
            return input.word();
        }
        switch (at) {
        case ctrl:
            if (reset_reads != 0 && --reset_reads == 0) {
                registers[ctrl] &= ~(1u << 26);
            }
            return registers[ctrl];
        case status: return 0x81u | (link ? 2u : 0u);
        case icr: return std::exchange(registers[icr], 0u);
        default: return registers[at];
        }
    }
    void write(u64 at, u32 width, u64 value64) override {
        const u32 value = static_cast<u32>(value64);
        require(width == 4 && at % 4 == 0 && value == value64 && !ended);
        if (at == ctrl && (value & 1u << 26) != 0) {
            require(!enabled(rctl) && !enabled(tctl) && registers[ims] == 0);
            registers.clear();
            registers[ctrl] = 1u << 26;
            reset_reads = stuck ? ~0u : 1u + input.byte() % 4;
            head_rx = head_tx = written_back = 0;
            held = 0;
            to_take.clear(); // lost with the ring
            to_receive.clear();
            ++resets;
            return;
        }
        switch (at) {
        case ims: registers[ims] |= value; return signal();
        case imc: registers[ims] &= ~value; return;
        case rctl: require((value & 2) == 0 || is_place(rx_ring, 0)); break;
        case tctl: require((value & 2) == 0 || is_place(tx_ring, e1000::ring_bytes)); break;
        case rx_ring + ring_tail:
        case tx_ring + ring_tail: require(value < entries); break;
        default: break;
        }
        registers[at] = value;
    }
    bool enabled(u64 control) { return (registers[control] & 2) != 0; }
    bool is_place(u64 ring, u32 offset) {
        return registers[ring] == static_cast<u32>(rings.span().bus + offset) && registers[ring + 4] == 0 &&
               registers[ring + ring_length] == e1000::ring_bytes;
    }
    void cause(u32 bits) {
        registers[icr] |= bits;
        signal();
    }
    void signal() {
        if ((registers[icr] & registers[ims]) != 0) {
            e1000::Card::on_interrupt(&card);
        }
    }

    // ---- what the guest sees ----
    void receive(io::NetDevice&, std::span<const std::byte> frame, io::Checksum) override {
        require(frame.size() >= 14 && frame.size() <= e1000::buffer_bytes);
        ++received;
        if (!damaged) {
            require(!to_receive.empty() && std::ranges::equal(to_receive.front(), frame));
            to_receive.pop_front();
        }
        if (input.byte() % 8 == 0) {
            send(); // as a protocol that answers
        }
    }
    std::string frame(usize most) {
        std::string text(14 + input.word() % (most - 13), 0);
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
        const std::string text = frame(14 + mtu);
        const usize head = 14 + input.word() % (text.size() - 13);
        const SendStatus how = card.send_now({bytes(text).first(head), bytes(text).subspan(head)});
        require(how == SendStatus::sent || how == SendStatus::timed_out ||
                (how == SendStatus::device_gone && !card.is_open()));
        if (how == SendStatus::sent) {
            to_take.push_back(text);
        }
    }
    // Of small frames, as many as a ring has entries.
    void send_many() {
        for (u32 n = input.byte() % (entries + 8); n != 0; --n) {
            std::string text(14 + n, static_cast<char>(sequence));
            text[14] = static_cast<char>(sequence++ >> 8);
            const SendStatus how = card.send_now({bytes(text)});
            if (how != SendStatus::sent) {
                require(how == SendStatus::timed_out || !card.is_open());
                return;
            }
            to_take.push_back(text);
        }
    }
    struct Waiter {
        std::string text;
        SendStatus status = SendStatus::not_sent;
    };
    static io::Task<Result<void>> wait(Machine& machine, Waiter& waiter, Nanoseconds bound) {
        waiter.status = co_await machine.card.send({bytes(waiter.text)}, bound);
        co_return Result<void>{};
    }
    void send_and_wait() {
        if (waiters.size() == max_waiters) {
            return;
        }
        waiters.push_back(std::make_unique<Waiter>());
        waiters.back()->text = frame(14 + mtu);
        unordered = true; // which of several that wait is sent is not known here until the card sees it
        require(static_cast<bool>(group.spawn(wait(*this, *waiters.back(), input.byte() * Nanoseconds{1'000'000}))));
    }

    // ---- a card that conforms ----
    std::byte* entry(u64 ring, u32 number) {
        return rings.data() + (ring == tx_ring ? e1000::ring_bytes : 0) + number % entries * 16;
    }
    // The driver writes an entry's address anew whenever it gives it to the card.
    std::byte* buffer(u64 ring, u32 number) {
        const DmaSpan span = (ring == tx_ring ? sent_from : received_into).span();
        const u64 address = word<u64>(entry(ring, number));
        require(damaged || address == span.bus + number % entries * e1000::buffer_bytes);
        return span.data + number % entries * e1000::buffer_bytes;
    }
    void take() {
        while (enabled(tctl) && head_tx != registers[tx_ring + ring_tail]) {
            const u64 command = word<u64>(entry(tx_ring, head_tx), 8);
            const usize size = command & 0xffff;
            require(damaged ||
                    (command >> 24 == 0x0b && (command >> 16 & 0xff) == 0 && size >= 14 && size <= 14 + mtu));
            const std::byte* const data = buffer(tx_ring, head_tx);
            if (!damaged && !unordered) {
                require(!to_take.empty() && std::ranges::equal(bytes(to_take.front()), std::span(data, size)));
            }
            if (!unordered && !to_take.empty()) {
                to_take.pop_front();
            }
            head_tx = (head_tx + 1) % entries;
            require(++held < entries || damaged); // one is always the driver's
        }
    }
    void write_back() {
        const u32 most = input.byte() % entries;
        for (u32 n = 0; n < most && held != 0; ++n, --held) {
            std::byte* const at = entry(tx_ring, written_back);
            const u64 errors = input.byte() % 8 == 0 ? u64{6} : u64{0};
            std::atomic_ref(word<u64>(at, 8)).fetch_or((1 | errors) << 32);
            written_back = (written_back + 1) % entries;
        }
        cause(1);
    }
    bool has_buffers(u32 count) {
        return enabled(rctl) && link && (registers[rx_ring + ring_tail] - head_rx + entries) % entries > count;
    }
    void put(std::span<const std::byte> data, u64 bits) {
        std::memcpy(buffer(rx_ring, head_rx), data.data(), data.size());
        std::atomic_ref(word<u64>(entry(rx_ring, head_rx), 8)).store(data.size() | bits << 32);
        head_rx = (head_rx + 1) % entries;
    }
    void deliver() {
        const std::string text = frame(1518);
        const u8 kind = input.byte();
        if (!has_buffers(3)) {
            return;
        }
        if (kind % 16 == 0) { // damaged on the wire: dropped
            put(bytes(text), 3 | u64{0x97} << 8);
        } else if (kind % 16 == 1) { // longer than a buffer: dropped
            const std::string full(e1000::buffer_bytes, 'x');
            put(bytes(full), 1);
            put(bytes(text), 3);
        } else {
            to_receive.emplace_back(bytes(text).begin(), bytes(text).end());
            put(bytes(text), 3 | u64{kind} % 3 * 0x20 << 8); // checksums that nobody asked for
        }
        cause(1u << 7);
    }
    void plug(bool in) {
        link = in;
        cause(1u << 2);
    }

    // ---- one that does not ----
    void harm(u8 how) {
        damaged = true;
        switch (how % 9) {
        case 0: { // mostly where the driver looks next
            const u8 kind = input.byte();
            const u64 errors = kind % 4 == 0 ? input.byte() : 0;
            const u32 number = kind % 4 == 1 ? input.byte() : head_rx;
            word<u64>(entry(rx_ring, number), 8) = (u64{kind} / 4 | errors << 8) << 32 | input.word() % 4096;
            break;
        }
        case 1: word<u64>(entry(tx_ring, input.byte()), 8) = u64{input.word()} << 32 | input.word(); break;
        case 2: rings.data()[input.word() % rings.span().size] = std::byte{input.byte()}; break;
        case 3: received_into.data()[input.word() % received_into.span().size] = std::byte{input.byte()}; break;
        case 4: // everything at once
            for (u32 i = 0; i < entries; ++i) {
                word<u64>(entry(input.byte() % 2 == 0 ? rx_ring : tx_ring, i), 8) = u64{input.byte()} << 32 | 60;
            }
            break;
        case 5: head_rx = input.byte() % entries; break;
        case 6: lies = 1 + input.byte() % 8; break;
        case 7: stuck = !stuck; break;
        case 8: gone = !gone; break;
        }
        cause(input.byte());
    }

    // As drivers.e1000 does when it is woken.
    void watch() {
        while (std::exchange(woken, false) && card.is_open() && card.wants_reset()) {
            if (const auto reset = executor.run(card.adapter().reset(executor, timeout)); !reset) {
                require(damaged);
                card.fail(reset.error());
            } else {
                card.start();
            }
        }
    }

    void run() {
        for (u32 steps = 0; steps < 3000 && !input.empty(); ++steps) {
            const u8 op = input.byte();
            switch (op % 16) {
            case 0: send(); break;
            case 1: send_many(); break;
            case 2: send_and_wait(); break;
            case 3:
            case 4: take(); break;
            case 5: write_back(); break;
            case 6:
            case 7: deliver(); break;
            case 8: cause(input.byte()); break; // also those that nothing has happened for
            case 9: clock.time += Nanoseconds{1'000'000} * input.byte(); break;
            case 10: harm(op / 16); break;
            case 11: plug(op / 16 % 4 != 0); break;
            default: executor.turn(); break;
            }
            watch();
            // A card that does not send for a whole time-out is reset, and closed if that does not help.
            require(damaged || resets > e1000::Card::max_resets || card.is_open());
            require(card.is_open() || log.count("closed:") == 1);
            require(card.is_open() || (!enabled(rctl) && !enabled(tctl)));
        }
        card.leave();
        ended = true;
        for (u32 turns = 0; turns < 4; ++turns) {
            executor.turn();
        }
        require(group.running() == 0);
        for (const auto& waiter : waiters) {
            require(waiter->status != SendStatus::not_sent);
        }
        require(card.counters().received == received && log.count("closed:") <= 1);
    }

    fuzz::Input& input;
    fuzz::Log log;
    test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    fuzz::Blocks memory;
    DmaBuffer rings, received_into, sent_from;
    std::unordered_map<u64, u32> registers;
    e1000::Card card{executor};
    io::TaskGroup group{executor};
    std::vector<std::unique_ptr<Waiter>> waiters;
    u32 head_rx = 0, head_tx = 0, written_back = 0;
    u32 held = 0; // descriptors taken and not written back
    u32 reset_reads = 0, resets = 0, lies = 0;
    u32 sequence = 0;
    u64 received = 0;
    bool damaged = false, unordered = false, gone = false, stuck = false, link = true, woken = false, ended = false;
    std::deque<std::string> to_take;
    std::deque<std::vector<std::byte>> to_receive;
};

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    fuzz::Input input(data, size);
    Machine(input).run();
    return 0;
}
