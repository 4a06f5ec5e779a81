// A block back end that answers arbitrarily, early, twice or never, and writes anything into the ring and into indirect
// and persistently granted pages, while requests read, write, flush and discard, are cancelled or abandoned. Checked:
// while the back end conforms, every read returns what was written, the requests conform, and the disk stays open
// unless the back end was silent; whatever it does, every request ends, the disk closes at most once, a buffer that the
// back end can still reach is quarantined, and at the end every page and grant entry is free again.
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
import hv.xen.events;
import hv.xen.grants;
import drivers.xen_blk.lane;

#include "fuzz/blocks.hpp"
#include "fuzz/input.hpp"
#include "fuzz/log.hpp"
// Depends on the imports above.
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using fuzz::require;
using fuzz::word;
namespace xen = hv::xen;
namespace xen_blk = drivers::xen_blk;
constexpr u32 first_port = 5;
constexpr u32 max_queues = 3;
constexpr u32 areas = 16; // one request at a time in each
constexpr u32 area_bytes = 128 * 1024;
constexpr Nanoseconds timeout = 100'000'000;

/// A request as the back end has taken it.
struct Taken {
    u64 id = 0;
    u8 operation = 0; // for an indirect one the inner one
    u64 sector = 0;
    struct Part {
        u32 grant, first, count; // in sectors
    };
    std::vector<Part> parts;
    u64 sectors = 0;
};

struct Machine {
    explicit Machine(fuzz::Input& in) : input(in) {
        const u8 shape = input.byte();
        clock.step = 20'000; // time per clock reading: waits that do not sleep end soon
        grants->install(table, 2);
        free_grants = grants->available();
        hypercalls = xen::Hypercalls(xen::Gate{this,
                                               [](void* self, u32, u64 command, u64 argument, u64, u64, u64) {
                                                   if (command == 6) { // EVTCHNOP_alloc_unbound
                                                       word<u32>(reinterpret_cast<std::byte*>(argument), 4) =
                                                           first_port + static_cast<Machine*>(self)->ports++;
                                                   }
                                                   return i64{0};
                                               },
                                               nullptr});
        events.install(hypercalls, *shared);
        xen_blk::Terms terms;
        terms.handle = 51712;
        terms.queues = 1 + (shape >> 3) % max_queues;
        terms.persistent = (shape & 1) != 0;
        terms.indirect_segments = (shape & 2) != 0 ? 32 : 0;
        terms.discard = true;
        terms.flush = (shape & 4) != 0 ? xen_blk::Operation::write_barrier : xen_blk::Operation::flush;
        terms.geometry.sectors = areas * area_bytes / 512;
        io::BlockDevice::Identity identity;
        identity.name.write("xvda");
        for (u32 i = 0; i < terms.queues; ++i) {
            sides.push_back(std::make_unique<Side>());
            Side& side = *sides.back();
            side.port = first_port + i;
            side.lane = std::make_unique<xen_blk::Lane>(executor, group, events, *grants, i == 0);
            side.lane->disk().set_timeout(timeout);
            side.lane->disk().identify(identity);
            require(static_cast<bool>(side.lane->prepare(0, terms.persistent, 0, memory)));
            require(side.lane->connection().port() == xen::Port{side.port});
            terms.persistent = side.lane->has_pool();
            side.ring = side.lane->connection().ring().data;
        }
        now = sides[0].get();
        for (auto& side : sides) {
            require(static_cast<bool>(
                side->lane->set_up(terms, memory, [](void* self) { ++*static_cast<u32*>(self); }, &side->notified)));
            require(static_cast<bool>(executor.run(side->lane->start())));
        }
        for (u32 i = 0; i < areas; ++i) {
            buffers.push_back(*memory.buffer(area_bytes));
        }
    }

    // ---- what the guest asks ----
    struct Area {
        std::unique_ptr<io::Request> request;
        bool known = true; // its content on the medium is what `content` says
        u8 content = 0;    // pattern of the last write; 0: zeroes
    };
    static std::byte pattern(u8 seed, usize i) {
        return seed == 0 ? std::byte{0} : static_cast<std::byte>(seed + i * 31 + i / 256);
    }
    void submit(u8 how) {
        const u32 at = input.byte() % areas;
        Area& area = all[at];
        if (area.request) {
            return;
        }
        constexpr std::array<io::Op, 6> ops{io::Op::read,  io::Op::write, io::Op::read,
                                            io::Op::write, io::Op::flush, io::Op::discard};
        const io::Op op = ops[how % ops.size()];
        // Whole areas are written, so that a later read of any length is known.
        const u32 bytes = op == io::Op::write || op == io::Op::discard ? area_bytes : (1 + input.byte()) * 512;
        DmaSpan span = buffers[at].span().subspan(0, std::min(bytes, area_bytes));
        if (op == io::Op::write) {
            seed = static_cast<u8>(seed % 255 + 1);
            for (usize i = 0; i < span.size; ++i) {
                span.data[i] = pattern(seed, i);
            }
            area.content = seed;
        } else if (op == io::Op::read) {
            std::memset(span.data, 0xee, span.size);
        } else if (op == io::Op::flush) {
            span = {};
        } else {
            span = {nullptr, 0, span.size};
            area.known = false;
        }
        io::BlockDevice& disk = sides[at % sides.size()]->lane->disk();
        area.request = std::make_unique<io::Request>(disk, op, u64{at} * area_bytes / 512, span);
        disk.submit(*area.request);
    }
    void look(Area& area, u32 at) {
        io::Request& r = *area.request;
        if (r.pending()) {
            return;
        }
        require(r.status != io::Status::not_written);
        if (r.op == io::Op::write) {
            area.known = r.status == io::Status::ok;
        }
        if (r.op == io::Op::read && r.status == io::Status::ok && sound && area.known) {
            for (usize i = 0; i < r.buffer.size; ++i) {
                require(r.buffer.data[i] == pattern(area.content, i));
            }
        }
        area.request.reset();
        if (is_quarantined(buffers[at].span())) { // the back end may still reach it
            buffers[at].abandon();
            buffers[at] = *memory.buffer(area_bytes);
        }
    }
    void look() {
        for (u32 at = 0; at < areas; ++at) {
            if (all[at].request) {
                look(all[at], at);
            }
        }
    }
    void forget(u32 at) { // the coroutine that waits for it is destroyed
        Area& area = all[at];
        if (!area.request) {
            return;
        }
        const bool pending = area.request->pending();
        area.known = area.known && area.request->op == io::Op::read;
        area.request.reset();
        if (pending) {
            buffers[at].abandon();
            buffers[at] = *memory.buffer(area_bytes);
        }
    }

    // ---- a back end that conforms ----
    std::byte* page(u32 grant, bool write) {
        if (grant < 8 || grant >= table.size()) {
            require(!sound);
            return nullptr;
        }
        const xen::GrantEntry& entry = table[grant];
        require(!sound || ((entry.flags & 3) == 1 && (!write || (entry.flags & 4) == 0)));
        return (entry.flags & 3) == 1 ? memory.at(u64{entry.frame} * 4096) : nullptr;
    }
    void add_segment(Taken& request, std::byte* at) {
        const Taken::Part part{word<u32>(at), word<u8>(at, 4), static_cast<u32>(word<u8>(at, 5)) + 1 - word<u8>(at, 4)};
        require(!sound || (word<u8>(at, 4) <= word<u8>(at, 5) && word<u8>(at, 5) < 8));
        request.parts.push_back(part);
        request.sectors += part.count;
    }
    void take() {
        const u32 offered = word<u32>(now->ring, 0);
        if (offered - now->taken > 32) {
            require(!sound);
            return;
        }
        for (; now->taken != offered; ++now->taken) {
            std::byte* const slot = now->ring + 64 + now->taken % 32 * 112;
            Taken request;
            request.operation = word<u8>(slot);
            if (request.operation == 6) {
                request.operation = word<u8>(slot, 1);
                const u32 count = word<u16>(slot, 2);
                request.id = word<u64>(slot, 8);
                request.sector = word<u64>(slot, 16);
                require(!sound || (word<u16>(slot, 24) == 51712 && count > 11 && count <= 32 && request.operation < 2));
                std::byte* const list = page(word<u32>(slot, 28), false);
                for (u32 i = 0; list != nullptr && i < std::min(count, 512u); ++i) {
                    add_segment(request, list + i * 8);
                }
            } else {
                const u32 count = word<u8>(slot, 1);
                request.id = word<u64>(slot, 8);
                request.sector = word<u64>(slot, 16);
                require(!sound || word<u16>(slot, 2) == 51712);
                if (request.operation == 5) {
                    request.sectors = word<u64>(slot, 24);
                } else {
                    require(!sound ||
                            (count <= 11 && (count != 0 || request.operation == 2 || request.operation == 3)));
                    for (u32 i = 0; i < std::min(count, 11u); ++i) {
                        add_segment(request, slot + 24 + i * 8);
                    }
                }
            }
            require(!sound || request.operation <= 5);
            require(!sound || request.sector + request.sectors <= areas * area_bytes / 512);
            require(!sound || std::ranges::none_of(now->held, [&](const Taken& t) { return t.id == request.id; }));
            now->held.push_back(std::move(request));
        }
        word<u32>(now->ring, 4) = now->taken + 1;
    }
    std::optional<Taken> choose() {
        if (now->held.empty()) {
            return std::nullopt;
        }
        const auto at = now->held.begin() + static_cast<std::ptrdiff_t>(input.byte() % now->held.size());
        Taken request = std::move(*at);
        now->held.erase(at);
        now->done.push_back(request);
        return request;
    }
    void carry_out(const Taken& request) {
        u64 at = request.sector * 512;
        for (const Taken::Part& part : request.parts) {
            const bool reads = request.operation == 0;
            std::byte* const data = page(part.grant, reads);
            if (data == nullptr || part.first + part.count > 8 || at + part.count * 512 > image.size()) {
                require(!sound);
                return;
            }
            std::byte* const here = data + part.first * 512;
            if (reads) {
                std::memcpy(here, image.data() + at, part.count * 512);
            } else if (request.operation <= 2) {
                std::memcpy(image.data() + at, here, part.count * 512);
            }
            at += part.count * 512;
        }
    }
    void answer(u64 id, u8 operation, i16 status) {
        std::byte* const slot = now->ring + 64 + now->produced++ % 32 * 112;
        word<u64>(slot) = id;
        word<u8>(slot, 8) = operation;
        word<i16>(slot, 10) = status;
    }
    void push() {
        const u32 old = std::exchange(word<u32>(now->ring, 8), now->produced);
        if (now->produced - word<u32>(now->ring, 12) < now->produced - old) {
            raise();
        }
    }
    void raise() {
        if ((std::atomic_ref<u64>(shared->mask[0]).load() >> now->port & 1) == 0) {
            xen_blk::Lane::on_event(now->lane.get());
        } else {
            std::atomic_ref<u64>(shared->pending[0]).fetch_or(u64{1} << now->port);
        }
    }

    // ---- one that does not ----
    void harm(u8 how) {
        sound = false;
        switch (how % 8) {
        case 0: answer(input.word(), input.byte() % 8, static_cast<i16>(input.word())); break;
        case 1:
            if (!now->done.empty()) { // one that was answered before
                const Taken& again = now->done[input.byte() % now->done.size()];
                answer(again.id, again.operation, 0);
            }
            break;
        case 2:
            if (const auto request = choose()) { // as another operation
                answer(request->id, input.byte(), static_cast<i16>(input.byte() % 4 - 2));
            }
            break;
        case 3: now->produced += input.word(); break;
        case 4: now->ring[input.word() % 4096] = std::byte{input.byte()}; break;
        case 5: { // into a page that is granted
            std::byte* const data = page(8 + input.word() % (table.size() - 8), true);
            if (data != nullptr) {
                data[input.word() % 4096] = std::byte{input.byte()};
            }
            break;
        }
        case 6: word<u32>(now->ring, input.byte() % 4 * 4) = input.word(); break;
        case 7:
            if (const auto request = choose()) { // before it was carried out
                answer(request->id, request->operation, 0);
                push();
                carry_out(*request);
            }
            break;
        }
        word<u32>(now->ring, 8) = now->produced;
        raise();
    }

    void run() {
        for (u32 steps = 0; steps < 3000 && !input.empty(); ++steps) {
            const u8 op = input.byte();
            now = sides[sides.size() == 1 ? 0 : input.byte() % sides.size()].get();
            switch (op % 12) {
            case 0:
            case 1:
            case 2: submit(op / 12); break;
            case 3:
            case 4: take(); break;
            case 5:
            case 6:
                for (u32 n = 1 + op / 12; n != 0; --n) {
                    if (const auto request = choose()) {
                        const bool good = input.byte() % 8 != 0;
                        if (good) {
                            carry_out(*request);
                        }
                        answer(request->id, request->operation, good ? i16{0} : i16{-1});
                    }
                }
                push();
                break;
            case 7:
                if ((op / 12) % 2 == 0) {
                    raise();
                } else {
                    const u32 at = input.byte() % areas;
                    if (all[at].request && !all[at].request->device().cancel(*all[at].request)) {
                        forget(at);
                    }
                }
                break;
            case 8:
                if (op / 12 >= 14) {
                    harm(input.byte());
                }
                break;
            default: executor.turn(); break;
            }
            look();
        }
        // Nothing is answered any more: what is under way meets its bound, or ends with the disk.
        for (u32 turns = 0;
             turns < 20'000 && std::ranges::any_of(all, [](const Area& a) { return bool(a.request); }); ++turns) {
            executor.turn();
            look();
        }
        require(std::ranges::none_of(all, [](const Area& a) { return bool(a.request); }));
        sides[0]->lane->close(io::Status::device_gone, {Code::device_gone, "the end"});
        for (u32 turns = 0; turns < 4; ++turns) {
            executor.turn();
        }
        for (auto& side : sides) {
            require(side->notified <= 1);
            require(!side->lane->is_open() && side->lane->has_ended()); // one of them ends all
            side->lane->reclaim();
        }
        usize closed = 0;
        for (usize at = log.text.find("closed:"); at != std::string::npos; at = log.text.find("closed:", at + 1)) {
            ++closed;
        }
        require(closed == 1);
        require(grants->available() == free_grants);
        clear_quarantine();
    }

    fuzz::Input& input;
    fuzz::Log log;
    test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    fuzz::Blocks memory;
    alignas(8) std::array<xen::GrantEntry, 1024> table{};
    std::unique_ptr<xen::Grants> grants = std::make_unique<xen::Grants>();
    std::unique_ptr<xen::SharedInfo> shared = std::make_unique<xen::SharedInfo>();
    xen::Hypercalls hypercalls;
    xen::Events events;
    io::QueueGroup group;
    std::vector<DmaBuffer> buffers;
    /// A queue, and the back end's side of it.
    struct Side {
        std::unique_ptr<xen_blk::Lane> lane;
        std::byte* ring = nullptr;
        std::deque<Taken> held;
        std::vector<Taken> done;
        u32 port = 0, taken = 0, produced = 0, notified = 0;
    };
    std::vector<std::unique_ptr<Side>> sides;
    Side* now = nullptr; // the one whose turn it is
    u32 ports = 0;
    std::array<Area, areas> all;
    std::vector<std::byte> image = std::vector<std::byte>(areas * area_bytes);
    u32 free_grants = 0;
    u8 seed = 0;
    bool sound = true;
};

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    fuzz::Input input(data, size);
    Machine(input).run();
    return 0;
}
