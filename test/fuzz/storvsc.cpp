// A disk whose host replies arbitrarily, late, twice or never, rescinds the channel or stops reading it, while requests
// are submitted, cancelled and abandoned. Checked: every request ends once and in time; it succeeds only if the host
// has confirmed each of its sectors; nothing outside a packet is read.
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
// Depends on the imports above.
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using drivers::storvsc::Disk;
using drivers::storvsc::Exchange;
using drivers::storvsc::Queue;
using drivers::storvsc::Version;
using fuzz::require;
namespace scsi = drivers::scsi;
constexpr Nanoseconds timeout = 100'000'000;
constexpr u32 sectors_each = 128; // maximum per request; requests do not overlap
constexpr usize max_requests = 48;

// Runs the SCSI parsers on a copy that ends with the data.
void parse(std::span<const std::byte> bytes) {
    const auto copy = std::make_unique<u8[]>(bytes.size());
    std::transform(bytes.begin(), bytes.end(), copy.get(), [](std::byte b) { return static_cast<u8>(b); });
    const std::span<const u8> data(copy.get(), bytes.size());
    static_cast<void>(scsi::parse_inquiry(data));
    static_cast<void>(scsi::parse_capacity_10(data));
    if (const auto capacity = scsi::parse_capacity_16(data)) {
        require(capacity->blocks != 0 && std::has_single_bit(capacity->block_bytes));
    }
    u32 luns = 0;
    static_cast<void>(scsi::parse_luns(data, [&](u32) { ++luns; }));
    require(luns * 8 <= data.size());
    static_cast<void>(scsi::parse_mode_6(data));
    static_cast<void>(scsi::lists_page(data, 0xb0));
    static_cast<void>(scsi::parse_block_limits(data));
    static_cast<void>(scsi::parse_provisioning(data));
    if (const auto sense = scsi::parse_sense(data)) {
        static_cast<void>(scsi::describe(*sense, 5));
        static_cast<void>(scsi::describe(*sense, std::nullopt));
    }
}

struct Machine {
    fuzz::Input& input;
    io::Executor& executor;
    hv::hyperv::Channel& channel;
    std::byte* out;
    std::byte* in;
    u32 ring; // bytes of packet data in each direction
    std::atomic<u32>& events;
    const test::FakeMachine& clock;
    Instant acted = 0;    // last action of the host, or of the guest's owner
    Instant answered = 0; // last reply by the host to a request, or write to the rings
    Queue* queue = nullptr;
    Disk* disk = nullptr;
    u32 packet_bytes = 64;
    struct Asked { // a packet from the guest
        u64 id;
        u8 opcode;
        u64 lba;
        u32 bytes;
    };
    std::vector<Asked> asked{};
    // packets already completed, which can be completed again
    std::vector<Asked> done{};
    // sectors confirmed by the host as read or written
    std::array<bool, max_requests * sectors_each> served{};
    std::array<bool, max_requests> served_whole{}; // requests confirmed as a whole: flush, discard
    std::vector<std::unique_ptr<io::Request>> requests{};
    std::vector<Instant> submitted_at{}; // of each
    std::unique_ptr<Exchange> exchange{};
    DmaSpan buffer{};
    usize submitted = 0;
    bool tampered = false; // the host has written into the guest's outgoing ring

    static u32 get(const std::vector<u8>& bytes, usize at, u32 count = 4) {
        u32 value = 0;
        for (u32 i = 0; i < count && at + i < bytes.size(); ++i) {
            value |= u32{bytes[at + i]} << 8 * i;
        }
        return value;
    }
    // Takes what the guest has published.
    void take() {
        u32 write;
        u32 read;
        std::memcpy(&write, out, 4);
        std::memcpy(&read, out + 4, 4);
        if (write >= ring || read >= ring) {
            return;
        }
        if (tampered) { // the contents are not the guest's
            read = write;
        }
        while (read != write) {
            const auto bytes = [&](u32 from, u32 count) {
                std::vector<u8> b(count);
                for (u32 i = 0; i < count; ++i) {
                    b[i] = static_cast<u8>(out[4096 + (read + from + i) % ring]);
                }
                return b;
            };
            const auto head = bytes(0, 16);
            const u32 total = get(head, 4, 2) * 8;
            const u32 header = get(head, 2, 2) * 8;
            require(header >= 16 && total >= header + packet_bytes && total + 8 <= (write + ring - read) % ring);
            const auto packet = bytes(header, packet_bytes);
            Asked a{get(head, 8) | u64{get(head, 12)} << 32, packet[28], 0, get(packet, 24)};
            for (u32 i = 0; i < 8; ++i) {
                a.lba = a.lba << 8 | packet[30 + i];
            }
            // READ(10), WRITE(10): convert to the 16-byte forms
            if (get(packet, 0) == 3 && (a.opcode == 0x28 || a.opcode == 0x2a)) {
                a.lba >>= 32;
                a.opcode = static_cast<u8>(a.opcode + 0x60);
                require((u32{packet[35]} << 8 | packet[36]) * 512 == a.bytes);
            }
            if (get(packet, 0) != 3) {
                a.opcode = 0xff; // not a command
            } else if (a.opcode == 0x88 || a.opcode == 0x8a) {
                require(a.bytes != 0 && a.bytes % 512 == 0 && a.lba + a.bytes / 512 <= served.size());
            }
            asked.push_back(a);
            read = (read + total + 8) % ring;
        }
        std::memcpy(out + 4, &read, 4);
        u32 pending;
        std::memcpy(&pending, out + 12, 4);
        if (pending != 0) {
            event();
        }
    }
    void event() {
        events.fetch_add(1);
        executor.wake();
    }
    void send(u16 type, u64 id, std::span<const std::byte> payload) {
        u32 write;
        u32 read;
        std::memcpy(&write, in, 4);
        std::memcpy(&read, in + 4, 4);
        std::vector<std::byte> packet(16 + (payload.size() + 7) / 8 * 8 + 8);
        if (write >= ring || (write + ring - read) % ring + packet.size() >= ring) {
            return;
        }
        const u16 head[4] = {type, 2, static_cast<u16>(packet.size() / 8 - 1), 0};
        std::memcpy(packet.data(), head, 8);
        std::memcpy(packet.data() + 8, &id, 8);
        std::copy(payload.begin(), payload.end(), packet.begin() + 16);
        for (std::byte b : packet) {
            in[4096 + write] = b;
            write = (write + 1) % ring;
        }
        std::memcpy(in, &write, 4);
    }
    void serve(const Asked& a) {
        if (a.opcode == 0x88 || a.opcode == 0x8a) {
            std::fill_n(served.begin() + static_cast<std::ptrdiff_t>(a.lba), a.bytes / 512, true);
        } else if (a.opcode != 0xff) {
            std::fill(served_whole.begin(), served_whole.begin() + static_cast<std::ptrdiff_t>(submitted), true);
        }
    }
    void submit() {
        if (submitted == max_requests) {
            return;
        }
        const usize i = submitted++;
        const u8 how = static_cast<u8>(i % 12);
        const io::Op op = how % 6 == 5   ? io::Op::flush
                          : how % 6 == 4 ? io::Op::discard
                          : how % 2 == 0 ? io::Op::read
                                         : io::Op::write;
        requests.push_back(std::make_unique<io::Request>(
            *disk, op, i * sectors_each,
            op == io::Op::flush ? DmaSpan{} : buffer.subspan(0, how % 3 == 0 ? sectors_each * 512 : 4096)));
        submitted_at.push_back(clock.time);
        disk->submit(*requests.back());
    }
    // Handles a request that has ended, or is abandoned: its frame is destroyed.
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
    // The maximum time that a request may be pending. After the host's last action, at most four time-outs: a bus reset
    // requested before is waited for; a request sent meanwhile then becomes the oldest, with its own time-out and that
    // of the next reset; one that waited for its slot, which is never freed, has one more. Host messages that complete
    // no request may cost a fifth.
    bool in_time(usize at) const {
        constexpr Nanoseconds ticks = 100'000'000; // all of these are checked in ticks
        return !requests[at]->pending() || (clock.time - acted < 4 * timeout + ticks &&
                                            clock.time - std::max(answered, submitted_at[at]) < 5 * timeout + ticks);
    }

    void step() {
        if (input.empty()) {
            return;
        }
        acted = clock.time;
        const u8 what = input.byte();
        if (what < 0xf0) {
            take();
        }
        std::vector<std::byte> payload(packet_bytes);
        payload[0] = std::byte{1};
        payload[14] = std::byte{1};
        std::optional<Asked> which;
        const auto choose = [&] {
            std::vector<Asked>& from = (what & 0x80) != 0 ? done : asked; // completed already, or not
            if (from.empty()) {
                which.reset();
                return u64{input.word()} << ((what & 0x40) != 0 ? 16 : 0);
            }
            const usize at = input.byte() % from.size();
            which = from[at];
            if (&from == &asked) {
                answered = clock.time;
                done.push_back(*which);
                asked.erase(asked.begin() + static_cast<std::ptrdiff_t>(at));
            }
            return which->id;
        };
        switch (what % 16) {
        case 0:
        case 1: { // a conforming success
            for (u32 n = (what & 0x40) != 0 ? 32 : 1; n != 0; --n) {
                const u64 id = choose();
                if (which) {
                    std::memcpy(payload.data() + 24, &which->bytes, 4);
                    serve(*which);
                }
                send(11, id, payload);
            }
            break;
        }
        case 2: { // a conforming success except for the length transferred
            const u64 id = choose();
            u32 moved = (what & 0x20) != 0 ? input.word() : input.byte() * 512u;
            std::memcpy(payload.data() + 24, &moved, 4);
            payload[14] = std::byte{static_cast<u8>((what & 0x10) != 0 ? 0x12 : 1)};
            if (which && (moved == which->bytes || (which->opcode != 0x88 && which->opcode != 0x8a))) {
                serve(*which);
            }
            send(11, id, payload);
            break;
        }
        case 3:
        case 4: { // an error with sense data from the list
            static constexpr u8 senses[][3] = {{6, 0x29, 0}, {6, 0x3f, 0x0e}, {6, 0x2a, 9}, {5, 0x20, 0},
                                               {5, 0x25, 0}, {3, 0x11, 0},    {1, 0x17, 1}, {2, 4, 1},
                                               {7, 0x27, 0}, {0, 0, 0},       {5, 0x24, 0}, {11, 0x47, 0}};
            const u64 id = choose();
            const auto& sense = senses[input.byte() % std::size(senses)];
            payload[14] = std::byte{0x84};
            payload[15] = std::byte{static_cast<u8>(sense[0] == 0 ? 0 : 2)};
            payload[21] = std::byte{static_cast<u8>((what & 0x10) != 0 ? 18 : input.byte())};
            if ((what & 0x20) != 0) {
                payload[28] = std::byte{0x72};
                std::transform(sense, sense + 3, payload.begin() + 29, [](u8 b) { return std::byte{b}; });
            } else {
                payload[28] = std::byte{0xf0};
                payload[30] = std::byte{sense[0]};
                payload[35] = std::byte{10};
                payload[40] = std::byte{sense[1]};
                payload[41] = std::byte{sense[2]};
            }
            if (which && sense[0] <= 1) { // completed, with information
                std::memcpy(payload.data() + 24, &which->bytes, 4);
                serve(*which);
            }
            send(11, id, payload);
            break;
        }
        case 5: { // an arbitrary error
            const u64 id = choose();
            payload[14] = static_cast<std::byte>(input.byte());
            payload[15] = static_cast<std::byte>(input.byte());
            payload[21] = static_cast<std::byte>(input.byte());
            const auto sense = input.take(20);
            std::copy(sense.begin(), sense.end(), payload.begin() + 28);
            const u8 status = static_cast<u8>(payload[14]) & 0x3f;
            // may mean success: so does sense data with the key NO SENSE, which is 0
            if (which && (((status == 1 || status == 0x12) && payload[15] == std::byte{0}) || !sense.empty())) {
                if ((what & 0x20) != 0) {
                    std::memcpy(payload.data() + 24, &which->bytes, 4);
                    serve(*which);
                } else if (which->opcode != 0x88 && which->opcode != 0x8a) {
                    serve(*which);
                }
            }
            send(11, id, payload);
            break;
        }
        case 6: { // busy, and all that leads to a retry
            static constexpr u8 statuses[][2] = {{4, 8}, {4, 0x28}, {5, 0},    {0x0e, 0},
                                                 {2, 0}, {0x16, 0}, {0x20, 0}, {8, 0}};
            const u8 choice = input.byte();
            for (u32 n = (what & 0x40) != 0 ? 32 : 1; n != 0; --n) {
                const u64 id = choose();
                payload[14] = std::byte{statuses[choice % 8][0]};
                payload[15] = std::byte{statuses[choice % 8][1]};
                send(11, id, payload);
            }
            break;
        }
        case 7: { // an arbitrary packet
            const u16 type = input.byte() % 16;
            const u64 id = choose();
            if (which) {
                serve(*which);
            }
            send(type, id, input.take(input.byte()));
            break;
        }
        case 8: { // an unsolicited host message
            const u32 operation = input.byte();
            std::memcpy(payload.data(), &operation, 4);
            send(6, 0, std::span(payload).first((what & 0x10) != 0 ? input.byte() % 5 : payload.size()));
            break;
        }
        case 9: { // arbitrary memory
            const u32 at = input.word() % (4096 + ring);
            const auto bytes = input.take(std::min<u32>(input.byte(), 4096 + ring - at));
            answered = clock.time;
            served.fill(true); // the host may have confirmed anything
            served_whole.fill(true);
            tampered = tampered || (what & 0x10) != 0;
            std::copy(bytes.begin(), bytes.end(), ((what & 0x10) != 0 ? out : in) + at);
            break;
        }
        case 10: // spurious events
            for (u32 n = (what & 0x10) != 0 ? 300 : 1; n != 0; --n) {
                events.fetch_add(1);
            }
            break;
        case 11: // the guest: more requests, or fewer
            for (u32 n = what >> 4 & 3; n != 0; --n) {
                submit();
            }
            break;
        case 12: {
            if (requests.empty()) {
                break;
            }
            const usize at = input.byte() % requests.size();
            if ((what & 0x10) != 0) {
                static_cast<void>(disk->cancel(*requests[at]));
            } else {
                forget(at);
            }
            break;
        }
        case 13: { // the controller's own packets
            if ((what & 0x10) != 0 && exchange) {
                queue->abandon(*exchange);
                exchange.reset();
            } else if (!exchange) {
                exchange = std::make_unique<Exchange>(executor);
                exchange->packet.header = {static_cast<drivers::storvsc::Operation>(3 + (what >> 5)),
                                           drivers::storvsc::flag_completion, 0};
                exchange->data = (what & 0x40) != 0 ? buffer.subspan(0, 512) : DmaSpan{};
                if (!queue->send(*exchange)) {
                    exchange.reset();
                }
            }
            break;
        }
        case 14: // the SCSI data of the handshake
            parse(input.take(input.byte()));
            break;
        default:
            switch (what >> 4) {
            case 1: channel.mark_rescinded(); break;
            case 2: disk->remove(); break;
            case 3: queue->close(io::Status::device_gone, {Code::device_gone, "closed by the fuzzer"}); break;
            default: return; // neither host nor interrupt: time passes
            }
            break;
        }
        event();
    }
};
} // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    fuzz::Input input(data, size);
    const u8 shape = input.byte();
    const u32 ring = (shape & 8) != 0 ? 4096 : 16384;
    test::FakeMachine clock;
    clock.step = 20'000; // time per clock reading: waits that do not sleep end soon
    io::Executor executor(clock.platform());
    test::HeapDma dma;
    hv::hyperv::Hypercalls hypercalls;
    hv::hyperv::Gate gate;
    gate.call = [](void*, u64, u64, u64) -> u64 { return 0; };
    require(static_cast<bool>(hypercalls.install(gate, dma)));
    std::atomic<u32> events{0};
    hv::hyperv::Channel channel;
    auto rings = dma.buffer(2 * (4096 + ring));
    hv::hyperv::Channel::Signalling signalling;
    signalling.hypercalls = &hypercalls;
    Machine machine{input, executor, channel, rings->data(), rings->data() + 4096 + ring, ring, events, clock};
    require(static_cast<bool>(channel.attach({}, 0, std::move(*rings), 4096 + ring, signalling, events)));
    clock.on_idle_context = &machine;
    clock.on_idle = [](void* self) { static_cast<Machine*>(self)->step(); };
    auto parameters = dma.buffer(4096);
    u32 notified = 0;
    drivers::storvsc::Shared shared;
    shared.context = &notified;
    shared.notify = [](void* count) { ++*static_cast<u32*>(count); };
    {
        Queue queue(executor, channel, shared, true);
        machine.queue = &queue;
        machine.packet_bytes = (shape & 1) != 0 ? 48 : 64;
        queue.set_terms({(shape & 1) != 0 ? Version::win6 : Version::win10, 4096u << (shape >> 1 & 3)});
        queue.start(*parameters, timeout);
        io::Geometry geometry;
        geometry.sectors = max_requests * sectors_each;
        geometry.flush = geometry.discard = true;
        Disk::Unit unit;
        unit.max_transfer = queue.terms().max_transfer;
        unit.max_unmap_blocks = 64;
        Disk disk(queue, unit, geometry, {});
        disk.link(executor);
        machine.disk = &disk;
        auto buffer = dma.buffer(65536);
        machine.buffer = buffer->span();
        for (u32 i = 0; i < 12; ++i) {
            machine.submit();
        }
        bool some = true;
        for (u32 turns = 0; some || !input.empty(); ++turns) {
            require(turns < 100'000); // everything must end for any behaviour of the host
            executor.turn();
            some = false;
            for (usize i = machine.requests.size(); i-- > 0;) {
                const io::Request& r = *machine.requests[i];
                some = some || r.pending();
                require(machine.in_time(i));
                if (!r.pending()) {
                    machine.forget(i);
                }
            }
        }
        require(queue.is_open() || queue.quiescent());
        if (machine.exchange) {
            queue.abandon(*machine.exchange);
        }
        queue.stop();
        buffer->abandon();
    }
    channel.detach().reset();
    return 0;
}
