// A PVSCSI adapter that answers arbitrarily, late, twice or never, sends messages, breaks its rings, refuses commands
// or disappears, while requests are submitted, cancelled and abandoned. Checked: every request ends once and in time;
// it succeeds only if the adapter has confirmed each of its sectors; requests refer only to the request's memory and
// to the driver's own; after the end the adapter has been reset, or is gone.
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
import core.mmio;
import core.time;
import io.executor;
import io.block;
import io.block_queue;
import drivers.pvscsi.disk;

#include "fuzz/input.hpp"
// Depends on the imports above.
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using fuzz::require;
namespace pvscsi = drivers::pvscsi;
using pvscsi::Disk;
using pvscsi::Exchange;
using pvscsi::Queue;
constexpr Nanoseconds timeout = 100'000'000;
constexpr u32 sectors_each = 256; // maximum per request; requests do not overlap
constexpr usize max_requests = 40;
constexpr u32 ring_entries = 128;

template <class T>
T load(const std::byte* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}
template <class T>
void store(std::byte* at, T value) {
    std::memcpy(at, &value, sizeof value);
}

struct Machine final : MmioModel {
    Machine(fuzz::Input& in, io::Executor& e, const test::FakeMachine& c) : input(in), executor(e), clock(c) {}

    fuzz::Input& input;
    io::Executor& executor;
    const test::FakeMachine& clock;
    Instant acted = 0;
    Queue* queue = nullptr;
    Disk* disk = nullptr;
    DmaSpan rings{}, areas{}, buffer{};
    u32 consumed = 0; // of the request ring
    bool valid = false, absent = false, refuses = false, line = false, ended = false;
    bool damaged = false; // the adapter has written to the rings at will
    u32 resets = 0;
    u32 causes = 0;
    u32 status = 0;
    struct Asked {
        u64 context;
        u8 opcode;
        u64 lba;
        u64 bytes; // of data
        u8 target;
    };
    std::vector<Asked> asked{}, done{};
    std::array<bool, max_requests * sectors_each> served{};
    std::array<bool, max_requests> served_whole{}; // confirmed as a whole: flush, discard, write zeroes
    std::vector<std::unique_ptr<io::Request>> requests{};
    std::vector<Instant> submitted_at{};
    std::unique_ptr<Exchange> exchange{};
    usize submitted = 0;

    // ---- registers ----

    u64 read(u64 at, u32 width) override {
        require(width == 4 && (at == 8 || at == 0x100c));
        return absent ? ~u32{0} : at == 8 ? status : causes;
    }
    void write(u64 at, u32 width, u64 value) override {
        require(width == 4);
        switch (at) {
        case 0x0: // COMMAND
            status = refuses ? ~u32{0} : 0;
            if (value == 1 && !absent) { // ADAPTER_RESET
                ++resets;
                valid = false;
                asked.clear();
            }
            break;
        case 0x4: break; // COMMAND_DATA
        case 0x100c: causes &= ~static_cast<u32>(value); break;
        case 0x2010: break; // INTR_MASK
        case 0x3014:
        case 0x4018: require(valid || absent || damaged); break; // a kick without rings
        default: require(false);
        }
    }

    // ---- the adapter ----

    bool inside(u64 bus, u64 bytes) const {
        const auto in = [&](DmaSpan span) {
            return bus >= span.bus && bytes <= span.size && bus - span.bus <= span.size - bytes;
        };
        return in(buffer) || in(rings) || in(areas);
    }
    // Takes and checks what the driver has published.
    void take() {
        if (!valid || damaged) {
            return;
        }
        const u32 producer = load<u32>(rings.data);
        require(producer - consumed <= ring_entries); // the ring is not overrun
        for (; consumed != producer; ++consumed) {
            const std::byte* r = rings.data + 4096 + consumed % ring_entries * 128;
            Asked a{load<u64>(r), static_cast<u8>(r[40]), 0, load<u64>(r + 16), static_cast<u8>(r[67])};
            const u32 flags = load<u32>(r + 36);
            require(a.context != 0 && a.context >> 32 == 0);
            require(std::ranges::none_of(asked, [&](const Asked& b) { return b.context == a.context; }));
            require(inside(load<u64>(r + 24), load<u32>(r + 32))); // sense data
            require(std::popcount(flags & 0x1cu) == 1 && ((flags & 4) != 0) == (a.bytes == 0));
            if ((flags & 1) == 0) {
                require(a.bytes <= 65536 && (a.bytes == 0 || inside(load<u64>(r + 8), a.bytes)));
            } else {
                u64 left = a.bytes;
                for (u64 at = load<u64>(r + 8); left != 0; at += 16) {
                    require(inside(at, 16));
                    const auto* element = reinterpret_cast<const std::byte*>(at);
                    const u32 n = load<u32>(element + 8);
                    require(n != 0 && n <= 65536 && n <= left && inside(load<u64>(element), n));
                    left -= n;
                }
            }
            const auto be = [&](usize at, usize n) {
                u64 value = 0;
                for (usize i = 0; i < n; ++i) {
                    value = value << 8 | static_cast<u8>(r[40 + at + i]);
                }
                return value;
            };
            if (a.opcode == 0x88 || a.opcode == 0x8a) {
                a.lba = be(2, 8);
                require(be(10, 4) * 512 == a.bytes && a.lba + a.bytes / 512 <= served.size());
            } else if (a.opcode == 0x28 || a.opcode == 0x2a) {
                a.lba = be(2, 4);
                a.opcode = static_cast<u8>(a.opcode + 0x60);
                require(be(7, 2) * 512 == a.bytes && a.lba + a.bytes / 512 <= served.size());
            } else if (a.opcode == 0x93) {
                require(a.bytes == 512 && be(10, 4) != 0 && be(2, 8) + be(10, 4) <= served.size());
            }
            asked.push_back(a);
        }
        store<u32>(rings.data + 4, consumed);
    }
    void complete(u64 context, u64 moved, u32 sense, u16 host, u16 scsi) {
        if (!valid) {
            return;
        }
        const u32 producer = load<u32>(rings.data + 12);
        std::byte* to = rings.data + 4096 * 5 + producer % ring_entries * 32;
        store(to, context);
        store(to + 8, moved);
        store(to + 16, sense);
        store(to + 20, host);
        store(to + 22, scsi);
        store(rings.data + 12, producer + 1);
        causes |= 1;
    }
    void interrupt() {
        if (!ended) {
            pvscsi::Transport::on_interrupt(&queue->transport());
        }
    }
    void serve(const Asked& a) {
        if (a.opcode == 0x88 || a.opcode == 0x8a) {
            std::fill_n(served.begin() + static_cast<std::ptrdiff_t>(a.lba), a.bytes / 512, true);
        } else {
            std::fill(served_whole.begin(), served_whole.begin() + static_cast<std::ptrdiff_t>(submitted), true);
        }
    }
    void anything_served() {
        served.fill(true);
        served_whole.fill(true);
    }

    // ---- the owner of the requests ----

    void submit() {
        if (submitted == max_requests) {
            return;
        }
        const usize i = submitted++;
        static constexpr io::Op ops[] = {io::Op::read,    io::Op::write, io::Op::read,         io::Op::flush,
                                         io::Op::discard, io::Op::write, io::Op::write_zeroes, io::Op::read};
        const io::Op op = ops[i % 8];
        const u32 bytes = i % 3 == 0 ? sectors_each * 512 : 4096;
        const DmaSpan span = op == io::Op::flush ? DmaSpan{}
                             : io::has_data(op)  ? buffer.subspan(static_cast<u32>(i % 4) * 512, bytes)
                                                 : DmaSpan{nullptr, 0, bytes};
        requests.push_back(std::make_unique<io::Request>(*disk, op, i * sectors_each, span));
        submitted_at.push_back(clock.time);
        disk->submit(*requests.back());
    }
    void look(usize at) {
        const io::Request& r = *requests[at];
        if (r.pending()) {
            return;
        }
        require(r.status != io::Status::not_written);
        if (r.status == io::Status::ok && r.op <= io::Op::write) {
            const auto first = served.begin() + static_cast<std::ptrdiff_t>(r.lba);
            require(std::all_of(first, first + r.buffer.size / 512, [](bool s) { return s; }));
        } else if (r.status == io::Status::ok) {
            require(served_whole[r.lba / sectors_each]);
        }
    }
    void forget(usize at) {
        look(at);
        requests.erase(requests.begin() + static_cast<std::ptrdiff_t>(at));
        submitted_at.erase(submitted_at.begin() + static_cast<std::ptrdiff_t>(at));
    }
    // After the adapter's last action: a time-out until the oldest command is found, one until an abort has failed, one
    // until a reset has. What waited for room begins then. Delayed retries are each a tick: bounded by the adapter's
    // actions.
    bool in_time(usize at) const {
        return !requests[at]->pending() || clock.time - std::max(acted, submitted_at[at]) < 8 * timeout;
    }

    void step() {
        if (input.empty()) {
            return;
        }
        acted = clock.time;
        const u8 what = input.byte();
        take();
        std::optional<Asked> which;
        // The context of a command that is asked for, was completed already, or any; `which` if it is asked for.
        const auto choose = [&] {
            const std::vector<Asked>& from = (what & 0x80) != 0 ? done : asked;
            const u64 context = from.empty() ? input.word() : from[input.byte() % from.size()].context;
            const auto found = std::ranges::find(asked, context, &Asked::context);
            which.reset();
            if (found != asked.end()) {
                which = *found;
                done.push_back(*found);
                asked.erase(found);
            }
            return context;
        };
        switch (what % 16) {
        case 0:
        case 1: // success
            for (u32 n = (what & 0x40) != 0 ? 32 : 1; n != 0; --n) {
                const u64 context = choose();
                if (which) {
                    serve(*which);
                }
                complete(context, (what & 0x20) != 0 && which ? which->bytes : 0, 0, 0, 0);
            }
            break;
        case 2: { // success, but for the length
            const u64 context = choose();
            const u64 moved = (what & 0x20) != 0 ? input.word() : input.byte() * u64{512};
            const u16 host = (what & 0x10) != 0 ? 0x12 : 0;
            if (which && (moved == which->bytes || (moved == 0 && host == 0) ||
                          (which->opcode != 0x88 && which->opcode != 0x8a))) {
                serve(*which);
            }
            complete(context, moved, 0, host, 0);
            break;
        }
        case 3:
        case 4: { // CHECK CONDITION, with sense data
            static constexpr u8 senses[][3] = {{6, 0x29, 0}, {6, 0x3f, 0x0e}, {6, 0x2a, 9}, {5, 0x20, 0},
                                               {5, 0x25, 0}, {3, 0x11, 0},    {1, 0x17, 1}, {2, 4, 1},
                                               {7, 0x27, 0}, {0, 0, 0},       {5, 0x24, 0}, {11, 0x47, 0}};
            const u64 context = choose();
            const auto& sense = senses[input.byte() % std::size(senses)];
            const u32 slot = static_cast<u32>((context & 0xffff) - 1);
            if (slot < ring_entries) {
                std::byte* area = areas.data + slot * 512;
                std::memset(area, 0, 18);
                area[0] = std::byte{0x70};
                area[2] = std::byte{sense[0]};
                area[7] = std::byte{10};
                area[12] = std::byte{sense[1]};
                area[13] = std::byte{sense[2]};
            }
            if (which && sense[0] <= 1) {
                serve(*which);
            }
            complete(context, 0, (what & 0x10) != 0 ? 18 : input.byte(), (what & 0x20) != 0 ? 0x16 : 0, 2);
            break;
        }
        case 5: { // arbitrary statuses, with whatever sense data there is
            const u64 context = choose();
            const u16 host = input.byte();
            const u16 scsi = input.byte();
            const u32 sense = input.byte();
            const u64 moved = (what & 0x10) != 0 ? input.word() : 0;
            if (which) {
                serve(*which);
            }
            complete(context, moved, sense, host, scsi);
            break;
        }
        case 6: { // what leads to a retry
            static constexpr u16 statuses[][2] = {{0, 8}, {0, 0x28}, {0, 0x40}, {0x25, 0}, {0x26, 0}, {0x22, 0}};
            const u8 choice = input.byte();
            for (u32 n = (what & 0x40) != 0 ? 32 : 1; n != 0; --n) {
                const u64 context = choose();
                complete(context, 0, 0, statuses[choice % 6][0], statuses[choice % 6][1]);
            }
            break;
        }
        case 7: { // a message
            if (!valid) {
                break;
            }
            const u32 producer = load<u32>(rings.data + 128);
            std::byte* to = rings.data + 4096 * 6 + producer % 32 * 128;
            store<u32>(to, input.byte() % 3);
            store<u32>(to + 4, (what & 0x10) != 0 ? input.word() : 0);
            store<u32>(to + 8, (what & 0x20) != 0 ? input.word() : input.byte());
            store<u32>(rings.data + 128, producer + 1);
            causes |= 4;
            break;
        }
        case 8: { // arbitrary memory: the rings, or the commands' areas
            const DmaSpan into = (what & 0x10) != 0 ? areas : rings;
            const u32 at = (what & 0x20) != 0 ? input.byte() % 140 : input.word() % into.size;
            const auto bytes = input.take(std::min<u32>(input.byte() % 32, into.size - at));
            std::copy(bytes.begin(), bytes.end(), into.data + at);
            damaged = damaged || (what & 0x10) == 0;
            anything_served();
            break;
        }
        case 9: // an impossible position
            store<u32>(rings.data + ((what & 0x10) != 0 ? 12 : 4), input.word());
            damaged = true;
            anything_served();
            break;
        case 10: // spurious interrupts
            for (u32 n = (what & 0x10) != 0 ? 300 : 1; n != 0; --n) {
                causes |= 1;
                interrupt();
            }
            break;
        case 11:
            for (u32 n = what >> 4 & 3; n != 0; --n) {
                submit();
            }
            break;
        case 12:
            if (!requests.empty()) {
                const usize at = input.byte() % requests.size();
                if ((what & 0x10) != 0) {
                    static_cast<void>(disk->cancel(*requests[at]));
                } else {
                    forget(at);
                }
            }
            break;
        case 13: // the driver's own commands
            if ((what & 0x10) != 0 && exchange) {
                queue->abandon(*exchange);
                exchange.reset();
            } else if (!exchange) {
                exchange = std::make_unique<Exchange>(executor);
                exchange->cdb =
                    (what & 0x20) != 0 ? drivers::scsi::test_unit_ready() : drivers::scsi::report_luns(4096);
                exchange->data = (what & 0x20) != 0 ? DmaSpan{} : buffer.subspan(0, 4096);
                if (!queue->send(*exchange)) {
                    exchange.reset();
                }
            }
            break;
        case 14: // the time-out's threshold, and refused commands
            store<u32>(rings.data + 24, input.byte());
            refuses = (what & 0x10) != 0;
            break;
        default:
            switch (what >> 4) {
            case 1: absent = true; break;
            case 2: disk->remove(); break;
            case 3: queue->close(io::Status::device_gone, {Code::device_gone, "closed by the fuzzer"}); break;
            case 4: static_cast<void>(queue->transport().targets().take()); break;
            default: return; // neither an answer nor an interrupt: time passes
            }
            break;
        }
        interrupt();
    }
};
} // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    fuzz::Input input(data, size);
    const u8 shape = input.byte();
    test::FakeMachine clock;
    clock.step = 20'000;
    io::Executor executor(clock.platform());
    test::HeapDma dma;
    Machine machine(input, executor, clock);
    clock.on_idle_context = &machine;
    clock.on_idle = [](void* self) { static_cast<Machine*>(self)->step(); };
    auto rings = dma.buffer(pvscsi::Memory::ring_bytes);
    auto areas = dma.buffer(pvscsi::Memory::areas_bytes);
    auto buffer = dma.buffer(sectors_each * 512 + 4096);
    machine.rings = rings->span();
    machine.areas = areas->span();
    machine.buffer = buffer->span();
    machine.valid = true;
    machine.line = (shape & 1) != 0;
    {
        Queue queue(executor, executor);
        machine.queue = &queue;
        auto& transport = queue.transport();
        transport.adapter().open(Mmio(machine, pvscsi::register_bytes));
        queue.open(timeout);
        require(static_cast<bool>(transport.start({*rings, *areas}, {.line = machine.line,
                                                                     .messages = (shape & 2) != 0,
                                                                     .threshold = (shape & 4) != 0,
                                                                     .timeout = timeout,
                                                                     .notify = [](void*) {}})));
        Disk::Unit unit;
        unit.max_transfer = 4096u << (shape >> 3 & 3) * 2; // up to 256 KiB
        unit.max_unmap_blocks = 64;
        unit.max_zero_blocks = 32;
        unit.target = 3;
        Disk disk(queue, unit,
                  {.sectors = max_requests * sectors_each, .flush = true, .discard = true, .write_zeroes = true}, {});
        machine.disk = &disk;
        for (u32 i = 0; i < 10; ++i) {
            machine.submit();
        }
        bool some = true;
        for (u32 turns = 0; some || !input.empty(); ++turns) {
            require(turns < 100'000);
            executor.turn();
            some = false;
            for (usize i = machine.requests.size(); i-- > 0;) {
                const bool pending = machine.requests[i]->pending();
                some = some || pending;
                require(machine.in_time(i));
                if (!pending) {
                    machine.forget(i);
                }
            }
        }
        if (machine.exchange) {
            queue.abandon(*machine.exchange);
        }
        transport.recovery().leave();
        queue.stop();
        require(machine.resets != 0 || machine.absent || machine.refuses);
        machine.ended = true;
        queue.reclaim();
    }
    buffer->abandon();
    return 0;
}
