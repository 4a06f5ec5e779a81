// A virtio disk whose device answers arbitrarily, late, twice or never, and writes anything into its parts of the queue
// and into the commands' memory, while requests are submitted, cancelled and abandoned. Checked: every request ends
// once and in time; it succeeds only if the device has written the status of success for all of its sectors; a buffer
// that the device may still access is not free; while the device conforms, so do the driver's requests.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <variant>
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
import io.block;
import drivers.virtio.device;
import drivers.virtio_blk.disk;

#include "fuzz/input.hpp"
// Depend on the imports above.
#include "unit/io/ring_virtqueue_fake.hpp"
#include "unit/io/support.hpp"
// depends on the ring's fake
#include "unit/drivers/virtio_queue_device.hpp"

namespace {
using namespace fl;
using drivers::virtio_blk::Disk;
using drivers::virtio_blk::IdExchange;
using drivers::virtio_blk::Queue;
using fuzz::require;
using virtqueue_fake::Chain;
using virtqueue_fake::Guest;
using virtqueue_fake::PackedDevice;
using virtqueue_fake::SplitDevice;
namespace virtio = drivers::virtio;
constexpr Nanoseconds timeout = 100'000'000;
constexpr u32 sectors_each = 32; // maximum per request; requests do not overlap
constexpr usize max_requests = 40;

/// Guest memory: allocations one after the other, never reused.
class Memory final : public DmaAllocator {
  public:
    explicit Memory(Guest& guest) : guest_(guest) {}
    Result<DmaSpan> allocate(u32 size, u64) override {
        const u32 bytes = (size + 4095) / 4096 * 4096;
        require(used_ + bytes <= guest_.size());
        const DmaSpan span{guest_.data() + used_, guest_.bus + used_, bytes};
        used_ += bytes;
        return span;
    }
    void free(DmaSpan) override {}

  private:
    Guest& guest_;
    u32 used_ = 0;
};

struct Machine {
    fuzz::Input& input;
    io::Executor& executor;
    const test::FakeMachine& clock;
    Guest& guest;
    bool packed = false;
    std::optional<std::variant<SplitDevice, PackedDevice>> device{};
    SplitDevice::Setup setup{};
    Instant acted = 0;    // last action of the device, or of the requests' owner
    Instant answered = 0; // last answer of the device
    Queue* queue = nullptr;
    Disk* disk = nullptr;
    bool unreadable = false;  // the device has overwritten descriptors, which are no buffers any more
    bool sound = true;        // the device has conformed so far
    std::deque<Chain> held{}; // taken and not answered
    std::deque<Chain> done{}; // answered
    std::array<bool, max_requests * sectors_each> served{}; // success was written for the sector
    u32 flushed = 0;                                        // for so many flushes
    u32 flushes_ok = 0;
    std::vector<std::unique_ptr<io::Request>> requests{};
    std::vector<Instant> submitted_at{}; // of each
    std::unique_ptr<IdExchange> exchange{};
    DmaSpan buffers{};
    DmaSpan serial{};
    usize submitted = 0;

    void accept(const SplitDevice::Setup& given) {
        setup = given;
        if (packed) {
            device.emplace(std::in_place_type<PackedDevice>, guest, given);
        } else {
            device.emplace(std::in_place_type<SplitDevice>, guest, given);
        }
        std::visit([](auto& d) { d.want(1); }, *device);
    }
    void take() {
        std::visit(
            [&](auto& d) {
                while (held.size() < setup.size && !unreadable) {
                    auto chain = d.pop();
                    if (!chain) {
                        break;
                    }
                    if (sound) {
                        examine(*chain);
                    }
                    held.push_back(*chain);
                }
                d.want(1);
            },
            *device);
        require(!sound || guest.fault.empty());
    }
    /// The driver's requests conform [virtio-1.2 §5.2.6].
    void examine(const Chain& chain) {
        const auto& p = chain.pieces;
        require(p.size() >= 2 && p.front().length == 16 && !p.front().writable && p.back().length == 1 &&
                p.back().writable);
        u64 data = 0;
        for (usize i = 1; i + 1 < p.size(); ++i) {
            require(guest.has(p[i].bus, p[i].length));
            data += p[i].length;
        }
        const auto [type, first, count] = range(chain);
        require(guest.get(p.back().bus, 1) == 0xff); // no success is left over
        switch (type) {
        case 0:
        case 1: require(data == count * 512 && p[1].writable == (type == 0)); break;
        case 4: require(data == 0); break;
        case 8: require(data == 20 && p[1].writable); break;
        case 11:
        case 13: require(data == 16 && !p[1].writable); break;
        default: require(false);
        }
        require(first + count <= served.size());
    }
    struct Range {
        u64 type, first, count; // in sectors
    };
    Range range(const Chain& chain) {
        const auto& p = chain.pieces;
        Range r{guest.get(p.front().bus, 4), 0, 0};
        if (r.type <= 1) {
            r.first = guest.get(p.front().bus + 8, 8);
            for (usize i = 1; i + 1 < p.size(); ++i) {
                r.count += p[i].length / 512;
            }
        } else if (r.type == 11 || r.type == 13) {
            r.first = guest.get(p[1].bus, 8);
            r.count = guest.get(p[1].bus + 8, 4);
        }
        return r;
    }
    void set_status(const Chain& chain, u8 status) {
        if (status == 0 && chain.pieces.size() >= 2) {
            const Range r = range(chain);
            for (u64 i = r.first; i < std::min<u64>(r.first + r.count, served.size()); ++i) {
                served[i] = true;
            }
            flushed += r.type == 4 ? 1 : 0;
        }
        if (!chain.pieces.empty()) {
            guest.put(chain.pieces.back().bus, status, 1);
        }
    }
    void push(const Chain& chain, u32 length) {
        if (std::visit(
                [&](auto& d) {
                    d.push(chain, length);
                    return d.interrupt();
                },
                *device)) {
            event();
        }
        guest.fault = sound ? guest.fault : std::string();
    }
    void event() { queue->transport().on_interrupt(0); }
    /// One of the buffers that the device holds; it is then answered.
    std::optional<Chain> choose() {
        if (held.empty()) {
            return std::nullopt;
        }
        const auto at = held.begin() + static_cast<std::ptrdiff_t>(input.byte() % held.size());
        const Chain chain = *at;
        held.erase(at);
        done.push_back(chain);
        answered = clock.time;
        return chain;
    }
    void submit() {
        if (submitted == max_requests) {
            return;
        }
        const usize i = submitted++;
        constexpr std::array<io::Op, 8> ops{io::Op::read,  io::Op::write, io::Op::read,         io::Op::flush,
                                            io::Op::write, io::Op::read,  io::Op::write_zeroes, io::Op::discard};
        const io::Op op = ops[i % ops.size()];
        const u32 bytes = i % 3 == 0 ? sectors_each * 512 : 4096;
        DmaSpan span = buffers.subspan(static_cast<u32>(i) * sectors_each * 512, bytes);
        if (op == io::Op::flush) {
            span = {};
        } else if (!io::has_data(op)) {
            span = {nullptr, 0, bytes};
        }
        requests.push_back(std::make_unique<io::Request>(*disk, op, i * sectors_each, span));
        submitted_at.push_back(clock.time);
        disk->submit(*requests.back());
    }
    /// Checks a request that has ended.
    void look(const io::Request& r) {
        require(r.status != io::Status::not_written);
        if (r.status != io::Status::ok) {
            return;
        }
        if (r.op == io::Op::flush) {
            require(++flushes_ok <= flushed);
            return;
        }
        const auto first = served.begin() + static_cast<std::ptrdiff_t>(r.lba);
        require(std::all_of(first, first + r.buffer.size / 512, [](bool s) { return s; }));
    }
    /// The request has ended, or is abandoned: its frame is destroyed.
    void forget(usize at) {
        const io::Request& r = *requests[at];
        const bool pending = r.pending();
        const DmaSpan span = r.buffer;
        if (!pending) {
            look(r);
        }
        requests.erase(requests.begin() + static_cast<std::ptrdiff_t>(at));
        submitted_at.erase(submitted_at.begin() + static_cast<std::ptrdiff_t>(at));
        const bool reachable = std::any_of(held.begin(), held.end(), [&](const Chain& chain) {
            return std::any_of(chain.pieces.begin(), chain.pieces.end(), [&](const auto& p) {
                return p.bus < span.bus + span.size && span.bus < p.bus + p.length;
            });
        });
        require(!pending || !sound || !reachable || span.empty() || is_quarantined(span));
    }
    /// After the device's last action, a silent one is closed within two time-outs: one begins when a request becomes
    /// the oldest. A device that does not answer a request has at most as long, whatever else it does.
    bool in_time(usize at) const {
        constexpr Nanoseconds ticks = 100'000'000; // both are checked in ticks
        return !requests[at]->pending() || (clock.time - acted < 3 * timeout + ticks &&
                                            clock.time - std::max(answered, submitted_at[at]) < 4 * timeout + ticks);
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
        switch (what % 16) {
        case 0:
        case 1: // success
            for (u32 n = (what & 0x40) != 0 ? 32 : 1; n != 0; --n) {
                if (const auto chain = choose()) {
                    set_status(*chain, 0);
                    push(*chain, static_cast<u32>(chain->writable()));
                }
            }
            break;
        case 2: // an error, or an arbitrary status
            if (const auto chain = choose()) {
                set_status(*chain, (what & 0x10) != 0 ? input.byte() : u8{(what & 0x20) != 0 ? u8{1} : u8{2}});
                push(*chain, 1);
            }
            break;
        case 3: // no status
            if (const auto chain = choose()) {
                push(*chain, 1);
            }
            break;
        case 4: // an arbitrary length
            if (const auto chain = choose()) {
                set_status(*chain, 0);
                push(*chain, (what & 0x10) != 0 ? input.word() : input.byte() * 512u);
            }
            break;
        case 5: // one that was answered before
            if (!done.empty()) {
                sound = false;
                unreadable = packed;
                const Chain chain = done[input.byte() % done.size()];
                push(chain, 1);
            }
            break;
        case 6: { // an arbitrary id
            sound = false;
            unreadable = packed;
            Chain chain;
            chain.id = static_cast<u16>((what & 0x10) != 0 ? input.word() : input.byte());
            chain.descriptors = input.byte() % 4;
            push(chain, input.byte());
            break;
        }
        case 7: { // anything in the device's part of the queue
            sound = false;
            unreadable = packed;
            const u64 at = packed ? setup.descriptors : setup.device;
            const u32 most = packed ? 16 * setup.size + 128 : 6 + 8 * setup.size;
            const u32 from = input.word() % most;
            const auto bytes = input.take(std::min<u32>(input.byte(), most - from));
            std::copy(bytes.begin(), bytes.end(), guest.data() + (at - guest.bus) + from);
            answered = clock.time;
            break;
        }
        case 8: // anything in the memory of a command
            sound = false;
            served.fill(true); // the status may be that of success
            flushed = ~0u / 2;
            if (const auto chain = choose(); chain && !chain->pieces.empty()) {
                const u64 at = chain->pieces.front().bus;
                const auto bytes = input.take(64);
                if (guest.has(at, bytes.size())) {
                    std::copy(bytes.begin(), bytes.end(), guest.data() + (at - guest.bus));
                }
                push(*chain, 1);
            }
            break;
        case 9: // spurious events
            for (u32 n = (what & 0x10) != 0 ? 300 : 1; n != 0; --n) {
                event();
            }
            break;
        case 10: // the answer is there, the event is lost
            if (const auto chain = choose()) {
                set_status(*chain, 0);
                std::visit([&](auto& d) { d.push(*chain, static_cast<u32>(chain->writable())); }, *device);
            }
            break;
        case 11: // more requests
            for (u32 n = what >> 4 & 7; n != 0; --n) {
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
        case 13: // the driver's own request
            if ((what & 0x10) != 0 && exchange) {
                queue->abandon(*exchange);
                exchange.reset();
            } else if (!exchange) {
                exchange = std::make_unique<IdExchange>(executor);
                exchange->data = serial;
                if (!queue->send(*exchange)) {
                    exchange.reset();
                }
            }
            break;
        case 14: // an answer in the wrong order of writes: the status after the buffer was returned
            if (const auto chain = choose()) {
                push(*chain, 1);
                set_status(*chain, 0);
            }
            break;
        default:
            switch (what >> 4) {
            case 1: disk->remove(); break;
            case 2: queue->close(io::Status::device_gone, {Code::device_gone, "closed by the fuzzer"}); break;
            default: break; // time passes
            }
            break;
        }
    }
};
} // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    fuzz::Input input(data, size);
    const u8 shape = input.byte();
    test::FakeMachine clock;
    clock.step = 20'000; // time per clock reading: waits that do not sleep end soon
    io::Executor executor(clock.platform());
    Guest guest(1 << 20);
    Memory dma(guest);
    Machine machine{input, executor, clock, guest, (shape & 1) != 0};
    clock.on_idle_context = &machine;
    clock.on_idle = [](void* self) { static_cast<Machine*>(self)->step(); };
    const bool event_index = (shape & 2) != 0;
    constexpr std::array<u32, 4> sizes{256, 16, 64, 99};
    virtio_test::QueueDevice device(
        sizes[shape >> 4 & 3], event_index, [&](u16, const SplitDevice::Setup& setup) { machine.accept(setup); },
        [&](u16) {});
    virtio::Shared shared;
    {
        Queue queue(executor, shared);
        machine.queue = &queue;
        const u64 features = (machine.packed ? virtio::feature_packed : 0) |
                             (event_index ? virtio::feature_event_idx : 0) |
                             ((shape & 4) != 0 ? virtio::feature_indirect : 0);
        using Transport = drivers::virtio_blk::Transport;
        require(static_cast<bool>(
            queue.transport().make(device, 0, features, Transport::needs, Transport::command_bytes, dma)));
        queue.transport().set_limits({.segments = 2,
                                      .segment_bytes = (shape & 8) != 0 ? 4096u : ~0u,
                                      .discard_bytes = 8192,
                                      .zeroes_bytes = 8192,
                                      .zeroes_unmap = true});
        require(static_cast<bool>(queue.transport().enable(device, 0)));
        queue.start(timeout);
        io::Geometry geometry;
        geometry.sectors = max_requests * sectors_each;
        geometry.flush = geometry.discard = geometry.write_zeroes = true;
        Disk disk(queue, geometry, {});
        disk.link(executor);
        machine.disk = &disk;
        auto buffers = dma.buffer(max_requests * sectors_each * 512);
        auto serial = dma.buffer(4096);
        machine.buffers = buffers->span();
        machine.serial = serial->span().subspan(0, drivers::virtio_blk::id_bytes);
        for (u32 i = 0; i < 12; ++i) {
            machine.submit();
        }
        bool some = true;
        for (u32 turns = 0; some || !input.empty(); ++turns) {
            require(turns < 100'000); // everything must end for any behaviour of the device
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
        require(queue.is_open() || queue.quiescent());
        if (machine.exchange) {
            queue.abandon(*machine.exchange);
        }
        queue.stop();
    }
    clear_quarantine();
    return 0;
}
