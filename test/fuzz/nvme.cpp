// An NVMe controller that answers arbitrarily, late, twice or never, fails, disappears, lies about itself and its
// namespaces, or aborts nothing, while requests are submitted, cancelled and abandoned. Checked: every request ends
// once and in time; it succeeds only if the controller has confirmed each of its sectors; commands refer only to the
// request's memory and to the namespace; nothing is submitted to, or kept reachable for, a disabled controller.
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
import core.interrupt;
import core.log;
import core.mmio;
import core.time;
import io.executor;
import io.task;
import io.block;
import drivers.driver;
import drivers.pci;
import drivers.nvme;

#include "fuzz/input.hpp"
// Depends on the imports above.
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using fuzz::require;
namespace nvme = drivers::nvme;
namespace pci = drivers::pci;
constexpr Nanoseconds timeout = 100'000'000;
constexpr u32 sectors_each = 128; // maximum per request; requests do not overlap
constexpr u32 max_requests = 48;
constexpr u64 disk_sectors = u64{max_requests} * sectors_each;
using Entry = std::array<u32, 16>;

template <class T>
T load(u64 at) {
    T value;
    std::memcpy(&value, reinterpret_cast<const void*>(at), sizeof value);
    return value;
}
template <class T>
void store(u64 at, T value) {
    std::memcpy(reinterpret_cast<void*>(at), &value, sizeof value);
}

struct Sink final : drivers::DiskSink {
    std::vector<io::BlockDevice*> disks;
    bool offered(u32) override { return true; }
    void unused(const drivers::UnusedUnit&) override {}
    FixedText<16> free_name(std::string_view) override { return {}; }
    Result<void> announce(io::BlockDevice& disk, u32) override {
        disks.push_back(&disk);
        return {};
    }
};

// One line.
struct Interrupts final : InterruptController {
    InterruptHandler handler = nullptr;
    void* context = nullptr;
    Result<void> attach_line(InterruptLine, InterruptHandler call, void* with, u32) override {
        handler = call;
        context = with;
        return {};
    }
    void detach_line(InterruptLine, InterruptHandler, void*) override { handler = nullptr; }
    Result<InterruptVector> attach_vector(InterruptHandler, void*, bool) override {
        return Error{Code::not_supported, "a line only"};
    }
    Result<InterruptVector> attach_message(u32, InterruptHandler, void*) override {
        return Error{Code::not_supported, "a line only"};
    }
    Result<InterruptMessage> message_for(InterruptVector) const override {
        return Error{Code::not_supported, "a line only"};
    }
    void detach_vector(InterruptVector) override {}
};

// Configuration space of one function, with BAR 0 of 64 bits and 16 KiB.
struct Space final : pci::Config {
    std::array<u8, 256> bytes{};
    Space() {
        const u32 id = 0x0010'1b36, code = 0x0108'0200;
        std::memcpy(bytes.data(), &id, 4);
        std::memcpy(bytes.data() + 8, &code, 4);
        bytes[0x10] = 4;
        bytes[0x14] = 0xf8;
        bytes[0x3c] = 11;
        bytes[0x3d] = 1;
    }
    u32 read(pci::Address at, u16 offset, u32 width) override {
        u32 value = ~u32{0};
        if (at.bus == 0 && at.device == 3 && at.function == 0 && offset + width <= 256) {
            std::memcpy(&value, bytes.data() + offset, width);
        }
        return width == 4 ? value : value & ((u32{1} << 8 * width) - 1);
    }
    void write(pci::Address, u16 offset, u32 width, u32 value) override {
        if (offset == 0x10) {
            value = (value & 0xffff'c000) | 4;
        } else if (offset >= 0x18 && offset < 0x34) {
            value = 0;
        }
        if (offset >= 4 && offset + width <= 256) {
            std::memcpy(bytes.data() + offset, &value, width);
        }
    }
    bool reaches_extended(pci::Address) const override { return false; }
};

struct Mapper final : MmioMapper {
    MmioModel* model = nullptr;
    Result<Mmio> map(u64, u64 size) override { return Mmio(*model, size); }
};

struct Held {
    u32 queue;
    Entry entry;
    u8 opcode() const { return static_cast<u8>(entry[0]); }
    u16 cid() const { return static_cast<u16>(entry[0] >> 16); }
    u64 wide(usize at) const { return entry[at] | u64{entry[at + 1]} << 32; }
};

struct Machine final : MmioModel {
    fuzz::Input& input;
    io::Executor& executor;
    test::FakeMachine& clock;
    Interrupts& interrupts;
    Sink& sink;
    u64 cap = 0x0000'0020'0101'007f; // 0.5 s, NVM, 128 entries
    u8 shape = 0;
    u32 cc = 0, mask = 0, aqa = 0;
    u64 asq = 0, acq = 0;
    bool fatal = false, absent = false, silent = false, tampered = false;
    u32 resets = 0;
    struct Pair {
        u64 sq = 0, cq = 0;
        u32 size = 0, head = 0, cq_tail = 0;
        u16 phase = 1;
    };
    std::array<Pair, 2> pairs{};
    std::vector<Held> held;
    std::vector<u16> events, done;
    u64 shadow = 0, indices = 0;
    u64 blocks = disk_sectors;
    bool pending = false;

    std::array<bool, disk_sectors> served{};
    std::array<bool, max_requests> served_whole{}; // requests confirmed as a whole: flush, discard, zeroes
    std::vector<std::unique_ptr<io::Request>> requests;
    std::vector<Instant> submitted_at;
    u32 submitted = 0;
    Instant acted = 0;
    DmaSpan buffer{};

    Machine(fuzz::Input& in, io::Executor& e, test::FakeMachine& c, Interrupts& i, Sink& s)
        : input(in), executor(e), clock(c), interrupts(i), sink(s) {}

    // ---- registers ----
    u64 read(u64 at, u32) override {
        if (absent) {
            return ~u64{0};
        }
        switch (at) {
        case 0x00: return cap;
        case 0x08: return 0x10400;
        case 0x14: return cc;
        case 0x1c: return (cc & 1) | (fatal ? 2u : 0u);
        default: return 0;
        }
    }
    void write(u64 at, u32 width, u64 value) override {
        if (absent) {
            return;
        }
        switch (at) {
        case 0x0c: mask |= static_cast<u32>(value); return;
        case 0x10: mask &= ~static_cast<u32>(value); return;
        case 0x14: configure(static_cast<u32>(value)); return;
        case 0x24: aqa = static_cast<u32>(value); return;
        case 0x28: asq = value; return;
        case 0x30: acq = value; return;
        default: break;
        }
        require(at >= 0x1000 && at < 0x1010 && at % 4 == 0 && width == 4);
        require((cc & 1) != 0);
        const u32 which = static_cast<u32>(at - 0x1000) / 4;
        require(value < pairs[which / 2].size);
        if (which % 2 == 0) {
            take(which / 2, static_cast<u32>(value));
        }
    }
    void configure(u32 value) {
        if ((value & ~cc & 1) != 0) {
            pairs = {};
            pairs[0] = {.sq = asq, .cq = acq, .size = (aqa & 0xfff) + 1};
        }
        if ((value & 1) == 0) {
            resets += cc & 1;
            held.clear();
            events.clear();
            done.clear();
            pairs = {};
            shadow = indices = 0;
            fatal = fatal && (shape & 0x40) != 0;
            tampered = false;
        }
        cc = value;
    }
    void take(u32 queue, u32 tail) {
        Pair& p = pairs[queue];
        while (p.size != 0 && p.head != tail) {
            const Held h{queue, load<Entry>(p.sq + u64{p.head} * 64)};
            p.head = (p.head + 1) % p.size;
            for (const Held& other : held) {
                require(other.queue != queue || other.cid() != h.cid());
            }
            if (queue == 0) {
                admin(h);
            } else {
                check(h);
                held.push_back(h);
            }
        }
    }
    void look() {
        if (shadow != 0 && (cc & 1) != 0 && pairs[1].size != 0) {
            const u32 tail = load<u32>(shadow + 8);
            require(tail < pairs[1].size);
            take(1, tail);
            store(indices + 8, tail);
            store(indices + 12, load<u32>(shadow + 12));
        }
    }
    // A command refers to memory of its request alone, and to the namespace.
    void check(const Held& h) {
        require((h.entry[0] & 0xff00) == 0 && h.entry[1] != 0 && !sink.disks.empty());
        const u64 lba = h.wide(10);
        const u32 count = (h.entry[12] & 0xffff) + 1;
        if (h.opcode() == 1 || h.opcode() == 2 || h.opcode() == 8) {
            require(lba < disk_sectors && count <= disk_sectors - lba);
        }
        if (h.opcode() != 1 && h.opcode() != 2) {
            require(h.opcode() == 0 || h.opcode() == 8 || h.opcode() == 9);
            return;
        }
        u64 at = h.wide(6);
        u32 bytes = count * sector();
        const auto inside = [&](u64 from, u32 size) {
            require(from >= buffer.bus && from + size <= buffer.bus + buffer.size);
        };
        u32 part = std::min<u32>(bytes, 4096 - at % 4096);
        inside(at, part);
        bytes -= part;
        u64 list = h.wide(8);
        if (bytes != 0 && bytes <= 4096) {
            inside(list, bytes);
        } else {
            for (; bytes != 0; list += 8, bytes -= part) {
                part = std::min(bytes, 4096u);
                inside(load<u64>(list), part);
            }
        }
    }

    // ---- completions ----
    void post(u32 queue, u32 dw0, u32 dw2, u32 dw3) {
        Pair& p = pairs[queue];
        if (p.size == 0) {
            return;
        }
        const u64 at = p.cq + u64{p.cq_tail} * 16;
        store(at, dw0);
        store(at + 8, dw2);
        store(at + 12, (dw3 & ~0x1'0000u) | u32{p.phase} << 16);
        p.cq_tail = (p.cq_tail + 1) % p.size;
        p.phase = static_cast<u16>(p.phase ^ (p.cq_tail == 0 ? 1 : 0));
        pending = true;
    }
    void complete(u32 queue, u16 cid, u32 status, u32 dw0 = 0) {
        post(queue, dw0, pairs[queue].head | queue << 16, cid | status << 17);
    }
    void serve(const Held& h) {
        if (h.opcode() == 1 || h.opcode() == 2) {
            const u64 lba = h.wide(10);
            const u32 count = (h.entry[12] & 0xffff) + 1;
            std::fill_n(served.begin() + static_cast<std::ptrdiff_t>(lba), count, true);
        } else {
            served_whole.fill(true);
        }
    }
    void serve_everything() { // whatever the driver takes for a success may be one
        served.fill(true);
        served_whole.fill(true);
    }
    // Most commands are answered as they should be; after the end of the input all are.
    void admin(const Held& h) {
        const u8 mode = input.empty() ? u8{0} : input.byte();
        const u64 data = h.wide(6);
        if (h.opcode() == 0x0c) {
            events.push_back(h.cid());
            return;
        }
        if (silent || mode == 0xff) {
            return; // never answered
        }
        u32 status = 0, result = 0;
        switch (h.opcode()) {
        case 0x06: identify(h.entry[10] & 0xff, data); break;
        case 0x05:
            pairs[1].cq = data;
            pairs[1].size = 0;
            break;
        case 0x01: pairs[1] = {.sq = data, .cq = pairs[1].cq, .size = (h.entry[10] >> 16) + 1}; break;
        case 0x08: result = (mode & 1) != 0 ? 0 : 1; break;
        case 0x7c:
            if (mode < 0xec) { // else the driver may not write them
                shadow = data;
                indices = h.wide(8);
            }
            break;
        case 0x02: store<u32>(data, 1); break;
        default: break;
        }
        if (mode >= 0xf8) { // damaged data, in the identify data's header, the formats or anywhere
            const auto bytes = input.take(input.byte() % 64);
            const usize at = mode < 0xfb ? 0 : mode < 0xfd ? 128 : input.byte() * 8u;
            if (h.opcode() == 0x06 || h.opcode() == 0x02) {
                std::memcpy(reinterpret_cast<void*>(data + at), bytes.data(), bytes.size());
            }
        } else if (mode >= 0xf4) {
            status = input.word() & 0x7fff;
        } else if (mode >= 0xf0) {
            result = input.word();
        } else if (mode >= 0xec) {
            post(0, result, input.word(), input.word());
            return;
        }
        complete(0, h.cid(), status, result);
    }
    void identify(u32 cns, u64 data) {
        if (cns == 2) {
            store<u32>(data, 1);
        } else if (cns == 1) {
            store<u8>(data + 77, shape & 3);
            store<u16>(data + 256, (shape & 4) != 0 ? 0x100 : 0);
            store<u8>(data + 512, 0x66);
            store<u8>(data + 513, 0x44);
            store<u16>(data + 520, 0x0c);
            store<u8>(data + 525, 1);
        } else if (cns == 3) {
            store<u32>(data, 0x1003); // a UUID
            store<u64>(data + 4, 1);
        } else if (cns == 6) {
            store<u8>(data + 1, (shape & 8) != 0 ? 3 : 0);
        } else {
            store<u64>(data, blocks);
            store<u64>(data + 8, blocks);
            store<u32>(data + 128, 9 << 16);
        }
    }

    // ---- the guest ----
    u32 sector() const { return sink.disks[0]->geometry().sector_size; }
    void submit() {
        if (submitted == max_requests || sink.disks.empty()) {
            return;
        }
        const u32 i = submitted++;
        constexpr io::Op ops[] = {io::Op::read,  io::Op::write,   io::Op::read,         io::Op::write,
                                  io::Op::flush, io::Op::discard, io::Op::write_zeroes, io::Op::read};
        const io::Op op = ops[i % 8];
        const u32 bytes = i % 3 == 0 ? sectors_each * 512 - 512 : 4096;
        const DmaSpan span = op <= io::Op::write   ? buffer.subspan(i % 2 * 512, bytes)
                             : op == io::Op::flush ? DmaSpan{}
                                                   : DmaSpan{nullptr, 0, bytes};
        requests.push_back(std::make_unique<io::Request>(*sink.disks[0], op, u64{i} * sectors_each, span));
        submitted_at.push_back(clock.time);
        sink.disks[0]->submit(*requests.back());
    }
    void forget(usize at) {
        const io::Request& r = *requests[at];
        if (!r.pending()) {
            require(r.status != io::Status::not_written);
            if (r.status == io::Status::ok && r.op <= io::Op::write) {
                const auto first = served.begin() + static_cast<std::ptrdiff_t>(r.lba);
                require(std::all_of(first, first + r.buffer.size / sector(), [](bool s) { return s; }));
            } else if (r.status == io::Status::ok) {
                require(served_whole[r.lba / sectors_each]);
            }
        }
        requests.erase(requests.begin() + static_cast<std::ptrdiff_t>(at));
        submitted_at.erase(submitted_at.begin() + static_cast<std::ptrdiff_t>(at));
    }
    // After the controller's last action: up to four rounds of a time-out, an Abort without an answer and a reset,
    // whose admin commands are answered at once or end it; a tick or two for each.
    bool in_time(usize at) const {
        return !requests[at]->pending() ||
               clock.time - std::max(acted, submitted_at[at]) < 4 * 4 * timeout + 400'000'000;
    }

    void deliver() {
        if (std::exchange(pending, false) && (mask & 1) == 0 && interrupts.handler != nullptr) {
            interrupts.handler(interrupts.context);
        }
    }
    void step() {
        look();
        if (input.empty()) {
            return deliver();
        }
        acted = clock.time;
        const u8 what = input.byte();
        const auto choose = [&]() -> std::optional<Held> {
            if (held.empty()) {
                return std::nullopt;
            }
            const usize at = input.byte() % held.size();
            const Held h = held[at];
            held.erase(held.begin() + static_cast<std::ptrdiff_t>(at));
            done.push_back(h.cid());
            return h;
        };
        switch (what % 16) {
        case 0:
        case 1:
        case 2: // successes
            for (u32 n = (what & 0x40) != 0 ? 32 : 1; n != 0; --n) {
                if (const auto h = choose()) {
                    serve(*h);
                    complete(h->queue, h->cid(), 0);
                }
            }
            break;
        case 3: // an error from the list
            if (const auto h = choose()) {
                static constexpr u16 statuses[] = {0x001, 0x002, 0x004, 0x006, 0x007,  0x4007, 0x00b, 0x020,
                                                   0x080, 0x082, 0x182, 0x281, 0x4281, 0x00c,  0x016, 0x3082};
                complete(h->queue, h->cid(), statuses[input.byte() % std::size(statuses)]);
            }
            break;
        case 4: // any status
            if (const auto h = choose()) {
                const u32 status = input.word() & 0x7fff;
                if ((status & 0x7ff) == 0) {
                    serve(*h);
                }
                complete(h->queue, h->cid(), status);
            }
            break;
        case 5: // an arbitrary completion
            serve_everything();
            post(what >> 4 & 1, input.word(), input.word(), input.word());
            break;
        case 6: // one that was there before, or none's
            serve_everything();
            complete(1, done.empty() ? static_cast<u16>(input.word()) : done[input.byte() % done.size()], 0);
            break;
        case 7:
            fatal = (what & 0x10) != 0;
            silent = (what & 0x20) != 0;
            break;
        case 8: // for good
            absent = absent || (what & 0xf0) == 0xf0;
            break;
        case 9: // an event
            if (!events.empty()) {
                const u16 cid = events.front();
                events.erase(events.begin());
                blocks = (what & 0x20) != 0 ? input.word() % (disk_sectors + 1) : blocks;
                complete(0, cid, (what & 0x40) != 0 ? input.word() & 0x7fff : 0,
                         (what & 0x10) != 0 ? input.word() : 0x0004'0002u);
            }
            break;
        case 10: { // arbitrary memory: of the completion queue, or event indices
            const u64 base = (what & 0x10) != 0 ? indices : pairs[1].size != 0 ? pairs[1].cq : 0;
            if (base != 0) {
                serve_everything();
                const u32 at = input.byte() % 64 * 16u;
                const auto bytes = input.take(16);
                std::memcpy(reinterpret_cast<void*>(base + at), bytes.data(), bytes.size());
            }
            break;
        }
        case 11: // spurious interrupts
            for (u32 n = (what & 0x10) != 0 ? 300 : 1; n != 0 && interrupts.handler != nullptr; --n) {
                interrupts.handler(interrupts.context);
            }
            break;
        case 12: // the guest: more requests, or fewer
            for (u32 n = what >> 4 & 7; n != 0; --n) {
                submit();
            }
            break;
        case 13:
            if (!requests.empty()) {
                const usize at = input.byte() % requests.size();
                (what & 0x10) != 0 ? static_cast<void>(sink.disks[0]->cancel(*requests[at])) : forget(at);
            }
            break;
        default: break; // time passes
        }
        deliver();
    }
};
} // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    fuzz::Input input(data, size);
    test::FakeMachine clock;
    clock.step = 20'000; // time per clock reading: waits that do not sleep end soon
    io::Executor executor(clock.platform());
    test::HeapDma dma;
    Interrupts interrupts;
    Sink sink;
    Space space;
    Mapper mapper;
    auto machine = std::make_unique<Machine>(input, executor, clock, interrupts, sink);
    mapper.model = machine.get();
    machine->shape = input.byte();
    const u16 mqes = static_cast<u16>(input.byte());
    if (mqes != 0) {
        machine->cap = (machine->cap & ~u64{0xffff}) | mqes;
    }
    clock.on_idle_context = machine.get();
    clock.on_idle = [](void* self) { static_cast<Machine*>(self)->step(); };
    auto buffer = dma.buffer(128 << 10);
    machine->buffer = buffer->span();
    drivers::Environment environment{executor, dma, interrupts, sink, timeout, 0, {}, nullptr, mapper};
    {
        nvme::Controller controller(environment, *pci::look_up(space, {0, 3, 0}), 0);
        bool kept = false;
        if (executor.run(controller.connect()) && executor.run(controller.scan())) {
            kept = controller.keep().has_value();
            for (u32 i = 0; i < 12; ++i) {
                machine->submit();
            }
        }
        bool some = true;
        for (u32 turns = 0; kept && (some || !input.empty() || controller.recovering()); ++turns) {
            require(turns < 200'000); // everything must end for any behaviour of the controller
            executor.turn();
            some = false;
            for (usize i = machine->requests.size(); i-- > 0;) {
                require(machine->in_time(i));
                if (!machine->requests[i]->pending()) {
                    machine->forget(i);
                } else {
                    some = true;
                }
            }
        }
        machine->requests.clear();
        machine->silent = false;
        require(executor.run(controller.disconnect()).has_value());
        require(machine->absent || (machine->cc & 1) == 0 || (space.bytes[4] & 4) == 0);
        require(quarantine_state().spans == 0);
    }
    return 0;
}
