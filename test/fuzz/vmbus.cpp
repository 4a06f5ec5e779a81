// A VMBus between a host and a guest that both act in arbitrary order: the host replies properly, or with wrong ids,
// statuses and lengths, offers, rescinds, raises events, writes into the rings, or accepts no messages; the guest
// connects, requests offers, opens, closes, moves and uses channels and shares memory, in two concurrent tasks.
// Checked: every wait is bounded, nothing outside a message is read, and memory that the host may still access is not
// freed.
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
// Depends on the imports above.
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using fuzz::require;
using hv::hyperv::Channel;
using hv::hyperv::Offer;
constexpr Nanoseconds timeout = 50'000'000;

struct Host final : hv::Privileged {
    fuzz::Input* input = nullptr;
    hv::hyperv::Synic synic;
    u64 messages = 0; // the pages registered by the guest
    u64 events = 0;
    u64 interrupt_page = 0;
    std::vector<std::vector<u8>> asked; // messages posted by the guest and not replied to
    u32 refusals = 0;                   // number of posts that get `refusal`
    u64 refusal = 0;
    struct Held {
        u32 relid;
        u32 gpadl;
        std::vector<u64> frames;
        u32 more; // page numbers still to come in GPADL_BODY messages
    };
    std::vector<Held> held;        // memory that the guest has shared with the host
    std::array<bool, 2048> gone{}; // rescinded and the id not released: nothing is shared for it
    u64 read_msr(u32) override { return 0; }
    void write_msr(u32 msr, u64 value) override {
        const u64 page = (value & 1) != 0 ? value & ~u64{0xfff} : 0;
        if (msr == 0x40000083) {
            messages = page;
        } else if (msr == 0x40000082) {
            events = page;
        }
    }
    u8 in8(u16) override { return 0; }
    u16 in16(u16) override { return 0; }
    u32 in32(u16) override { return 0; }
    void out8(u16, u8) override {}
    void out16(u16, u16) override {}
    CpuidRegisters cpuid_leaf(u32) override { return {}; }
    void out32(u16, u32) override {}

    static u32 get(std::span<const u8> bytes, usize at) {
        u32 value = 0;
        for (u32 i = 0; i < 4 && at + i < bytes.size(); ++i) {
            value |= u32{bytes[at + i]} << 8 * i;
        }
        return value;
    }
    static void put(std::vector<u8>& bytes, usize at, u32 value, u32 count = 4) {
        bytes.resize(std::max(bytes.size(), at + count));
        for (u32 i = 0; i < count; ++i) {
            bytes[at + i] = static_cast<u8>(value >> 8 * i);
        }
    }

    u64 call(u64 control, u64 at) {
        if ((control & 0xffff) != 0x5c) {
            return (control & 0xffff) == 0x5d ? 0 : 2;
        }
        if (refusals != 0) {
            --refusals;
            return refusal;
        }
        const u8* parameters = reinterpret_cast<const u8*>(at);
        const u32 length = get({parameters, 16}, 12);
        require(length >= 8 && length <= 240 && get({parameters, 16}, 8) == 1);
        std::vector<u8> message(parameters + 16, parameters + 16 + length);
        const u32 type = get(message, 0);
        const auto take_frames = [&](Held& into, usize from) {
            for (; from + 8 <= message.size() && into.more != 0; from += 8, --into.more) {
                into.frames.push_back(get(message, from) | u64{get(message, from + 4)} << 32);
            }
        };
        if (type == 13) {
            gone[get(message, 8) % gone.size()] = false;
        } else if (type == 14) {
            interrupt_page = get(message, 16) | u64{get(message, 20)} << 32;
        } else if (type == 8) { // one range of whole pages
            require(length >= 36 && (get(message, 16) >> 16) == 1);
            Held fresh{get(message, 8), get(message, 12), {}, get(message, 20) / 4096};
            require((get(message, 16) & 0xffff) == 8 + 8 * fresh.more);
            take_frames(fresh, 28);
            if (!gone[fresh.relid % gone.size()]) {
                held.push_back(std::move(fresh));
            }
        } else if (type == 9) {
            const auto of =
                std::find_if(held.rbegin(), held.rend(), [&](const Held& h) { return h.gpadl == get(message, 12); });
            if (of != held.rend()) {
                require(of->more != 0);
                take_frames(*of, 16);
            }
        }
        // the host is polled while the guest waits for UNLOAD_RESPONSE
        if (type == 16 && (input->byte() & 1) == 0 && get({reinterpret_cast<const u8*>(messages), 4096}, 512) == 0) {
            deliver(std::array<u8, 8>{17}, 8, 1, false);
        }
        if (asked.size() < 16) {
            asked.push_back(std::move(message));
        }
        return 0;
    }

    void deliver(std::span<const u8> bytes, u8 length, u32 type, bool more, bool quiet = false) {
        // The host does not touch memory that it has released or never accepted.
        const u32 kind = get(bytes, 0);
        if (kind == 2) {
            gone[get(bytes, 8) % gone.size()] = true;
        }
        std::erase_if(held, [&](const Held& h) {
            return (kind == 2 && h.relid == get(bytes, 8)) || (kind == 12 && h.gpadl == get(bytes, 8)) ||
                   (kind == 10 && h.gpadl == get(bytes, 12) && get(bytes, 16) != 0);
        });
        auto* slot = reinterpret_cast<u8*>(messages) + 2 * 256;
        slot[4] = length; // may exceed the maximum of 240
        slot[5] = more;
        std::copy_n(bytes.begin(), std::min<usize>(bytes.size(), 240), slot + 16);
        std::memcpy(slot, &type, 4);
        if (!quiet) { // otherwise it is found by the next poll
            hv::hyperv::Synic::on_interrupt(&synic);
        }
    }

    // A valid reply to the first (last) request, except for `status`.
    std::vector<u8> answer(bool last, u32 status) {
        if (asked.empty()) {
            return {};
        }
        const auto at = last ? asked.end() - 1 : asked.begin();
        const std::vector<u8> question = *at;
        asked.erase(at);
        std::vector<u8> a;
        const auto reply = [&](u32 type, std::initializer_list<u32> words) {
            put(a, 0, type);
            put(a, 4, 0);
            for (u32 word : words) {
                put(a, a.size(), word);
            }
        };
        switch (get(question, 0)) {
        case 3: reply(4, {}); break;
        case 5: reply(6, {get(question, 8), get(question, 12), status}); break;
        case 8: reply(10, {get(question, 8), get(question, 12), status}); break;
        case 11: reply(12, {get(question, 12)}); break;
        case 14: reply(15, {(status & 1) != 0 ? 0u : 1u | (status << 8 & 0xff00), 4}); break;
        case 16: reply(17, {}); break;
        case 22: reply(24, {get(question, 8), status}); break;
        default: break;
        }
        return a;
    }

    std::vector<u8> offer() {
        static constexpr u8 types[3][16] = {
            {0xd9, 0x63, 0x61, 0xba, 0xa1, 0x04, 0x29, 0x4d, 0xb6, 0x05, 0x72, 0xe2, 0xff, 0xb1, 0xdc, 0x7f},
            {0x32, 0x26, 0x41, 0x32, 0xcb, 0x86, 0xa2, 0x44, 0x9b, 0x5c, 0x50, 0xd1, 0x41, 0x73, 0x54, 0xf5}};
        const u8 shape = input->byte();
        std::vector<u8> a(196);
        put(a, 0, 1);
        std::copy_n(types[shape % 3], 16, a.begin() + 8);
        a[24] = shape >> 2 & 1;
        put(a, 184, (shape & 8) != 0 ? input->word() : input->byte() % 8);
        put(a, 180, (shape & 0x10) != 0 ? input->byte() % 4 : 0, 2);
        a[188] = (shape & 0x20) != 0 ? input->byte() : 0;
        a[189] = shape >> 5 & 1;
        a[190] = shape >> 6 & 1;
        put(a, 192, 0x10000);
        return a;
    }

    void step() {
        if (messages == 0 || input->empty()) {
            return;
        }
        u32 there;
        std::memcpy(&there, reinterpret_cast<const u8*>(messages) + 2 * 256, 4);
        const u8 what = input->byte();
        const bool more = (what & 0x80) != 0;
        std::vector<u8> message;
        switch (what % 13) {
        case 0: { // arbitrary bytes
            const u8 length = input->byte();
            if (there == 0) {
                const auto bytes = input->take(length);
                deliver({reinterpret_cast<const u8*>(bytes.data()), bytes.size()}, length, 1, more);
            }
            return;
        }
        case 1:
        case 2:
        case 3: message = answer(more, 0); break;
        case 4: message = answer(more, input->byte()); break;
        case 5: // a reply with one byte changed
            message = answer(more, 0);
            if (!message.empty()) {
                const u8 at = input->byte();
                message[at % message.size()] ^= input->byte();
            }
            break;
        case 6: // or truncated
            message = (what & 0x40) != 0 ? offer() : answer(more, 0);
            message.resize(std::min<usize>(message.size(), input->byte()));
            break;
        case 7:
        case 8: message = offer(); break;
        case 9:
            put(message, 0, 2);
            put(message, 4, 0);
            put(message, 8, input->byte() % 8);
            break;
        case 10: { // an event, by one of the two mechanisms
            const u32 flag = input->byte() % 16 | (more ? input->word() % 2048 : 0);
            auto* page = reinterpret_cast<u8*>(events) + 2 * 256;
            page[flag / 8 % 256] = static_cast<u8>(page[flag / 8 % 256] | 1u << flag % 8);
            if ((what & 0x40) != 0 && interrupt_page > 4096) {
                page[0] |= 1;
                reinterpret_cast<u8*>(interrupt_page)[flag / 8] |= static_cast<u8>(1u << flag % 8);
            }
            hv::hyperv::Synic::on_interrupt(&synic);
            return;
        }
        case 11: { // messages are refused temporarily, or permanently
            static constexpr u64 refused[] = {0x13, 0x13, 0xb, 0x12, 0x6, 2};
            refusal = refused[input->byte() % 6];
            refusals = input->byte() % 32;
            return;
        }
        default: { // writes to shared memory; or a message of another kind
            if ((what & 0x40) != 0) {
                if (there == 0) {
                    const std::array<u8, 8> bytes{};
                    deliver(bytes, 8, (what & 0x20) != 0 ? 0x80000010 : input->byte(), more);
                }
                return;
            }
            if (held.empty()) {
                return;
            }
            // The host may write to memory until the guest has reported its release: the sanitizer detects memory freed
            // too early.
            const Held& h = held[input->byte() % held.size()];
            if (h.frames.empty() || h.more != 0) { // not completely described, so not shared yet
                return;
            }
            const u64 frame = h.frames[input->byte() % h.frames.size()];
            const u32 at = input->word() % 4096;
            const auto bytes = input->take(std::min<u32>(input->byte() % 32, 4096 - at));
            if (frame < 0x100000) { // skip page numbers made up by the guest
                return;
            }
            std::copy(bytes.begin(), bytes.end(), reinterpret_cast<std::byte*>(frame * 4096) + at);
            return;
        }
        }
        if (message.empty() || there != 0) {
            return;
        }
        deliver(message, static_cast<u8>(message.size()), 1, more, what % 13 < 4 && (what & 0x40) != 0);
    }
};

// The guest's state.
struct Guest {
    fuzz::Input& input;
    io::Executor& executor;
    hv::hyperv::Vmbus bus{};
    std::array<Channel, 2> channels{};
    std::array<u32, 2> rescinds{};
    bool stop = false;
};

// Nothing takes longer than its waits allow: `waits` of them, each with a message that a throttling host accepts late.
void in_time(const Guest& guest, Instant begin, u32 waits) {
    constexpr Nanoseconds each =
        timeout + std::max<Nanoseconds>(timeout, hv::hyperv::Vmbus::posting_timeout) + 20'000'000;
    require(guest.executor.now() - begin < waits * each);
}

void use(Guest& guest, Channel& channel) {
    fuzz::Input& input = guest.input;
    const std::array<std::byte, 64> payload{};
    for (u32 n = 0; n < 4; ++n) {
        const u8 what = input.byte();
        switch (what % 8) {
        case 0: static_cast<void>(channel.send_inband(std::span(payload).first(what / 8), what, true)); break;
        case 1: static_cast<void>(channel.send_completion(payload, what)); break;
        case 2:
            static_cast<void>(channel.send_gpa_direct(std::span<const std::byte>(payload),
                                                      DmaSpan{nullptr, u64{what} << 8, what * 256u}, what));
            break;
        case 3: static_cast<void>(channel.publish()); break;
        case 4: {
            hv::hyperv::Packet packet;
            const auto got = channel.receive(packet);
            require(got || channel.broken());
            break;
        }
        case 5: channel.release(); break;
        case 6: {
            const auto armed = channel.arm();
            require(armed || channel.broken());
            break;
        }
        default: channel.disarm(); break;
        }
    }
    static_cast<void>(channel.interrupts());
}

io::Task<Result<void>> life(Guest& guest, u32 own) {
    using hv::hyperv::Vmbus;
    Vmbus& bus = guest.bus;
    Channel& channel = guest.channels[own];
    channel.on_rescind([](void* count) { ++*static_cast<u32*>(count); }, &guest.rescinds[own]);
    for (u32 n = 0; n < 16 && !guest.input.empty(); ++n) {
        const u8 what = guest.input.byte();
        const Instant begin = guest.executor.now();
        std::vector<Offer> offers;
        bus.for_each_offer([&](const Offer& o) { offers.push_back(o); });
        switch (what % 9) {
        case 0:
        case 1:
        case 2: {
            if (offers.empty()) {
                break;
            }
            const Offer offer = offers[(what >> 5) % offers.size()];
            const auto there = bus.find(offer.relid);
            require(!there || (there->relid == offer.relid && there->instance == offer.instance));
            const bool was_open = channel.is_open();
            guest.rescinds[own] = was_open ? guest.rescinds[own] : 0;
            const Vmbus::OpenParameters parameters{.send_bytes = (what & 0x10) != 0 ? 32768u : 4096u,
                                                   .receive_bytes = 4096,
                                                   .may_defer = (what & 0x10) != 0};
            const auto opened = co_await bus.open(channel, offer, parameters);
            require(there || !opened); // it had been rescinded before
            require(!was_open || !opened);
            require(channel.is_open() == (was_open || opened));
            require(!opened || channel.offer().relid == offer.relid);
            in_time(guest, begin, 4);
            break;
        }
        case 3: {
            static_cast<void>(co_await bus.close(channel));
            require(!channel.is_open());
            in_time(guest, begin, 3);
            break;
        }
        case 4: {
            static_cast<void>(co_await bus.modify(channel, what >> 5 == 7 ? 65 : what >> 5 == 6 ? 1 : 0));
            in_time(guest, begin, 2);
            break;
        }
        case 5: {
            const hv::hyperv::Guid instance =
                offers.empty() ? hv::hyperv::Guid{} : offers[(what >> 6) % offers.size()].instance;
            const u16 index = 1 + (what >> 4) % 4;
            const auto sub = co_await bus.sub_channel(instance, index, {guest.executor, timeout});
            require(!sub || (sub->instance == instance && sub->sub_channel == index));
            in_time(guest, begin, 1);
            break;
        }
        case 6: { // pages that nothing uses
            std::array<u64, 90> frames;
            for (u32 i = 0; i < frames.size(); ++i) {
                frames[i] = 0x1000 + i;
            }
            const u32 relid = (what & 0x10) != 0 ? 3 : offers.empty() ? 1 : offers[0].relid;
            const auto gpadl = co_await bus.create_gpadl(relid, std::span<const u64>(frames).first((what >> 5) * 12));
            in_time(guest, begin, 2);
            if (gpadl) {
                require(gpadl->handle != 0);
                static_cast<void>(co_await bus.teardown_gpadl(*gpadl));
                in_time(guest, begin, 4);
            }
            break;
        }
        case 7:
            if (channel.is_open()) {
                use(guest, channel);
            }
            if ((what & 0x40) != 0) {
                co_await guest.executor.sleep(5'000'000);
            }
            break;
        default:
            if (channel.is_open()) {
                hv::hyperv::Inbox inbox(channel, guest.executor);
                const u32 waits = 1 + (what >> 6);
                for (u32 i = 0; i < waits && co_await inbox.wait({guest.executor, 5'000'000}); ++i) {
                    use(guest, channel);
                    inbox.touch();
                }
                in_time(guest, begin, waits + 1);
            }
            break;
        }
        // Notified once, if it was open when its offer was rescinded.
        require(guest.rescinds[own] <= 1 && (!channel.is_open() || channel.rescinded() == (guest.rescinds[own] == 1)));
    }
    static_cast<void>(co_await bus.close(channel));
    co_return Result<void>{};
}

io::Task<Result<void>> both(Guest& guest) {
    const Instant begin = guest.executor.now();
    const auto connected = co_await guest.bus.connect();
    in_time(guest, begin, 12);
    require(static_cast<bool>(connected) == guest.bus.connected());
    if (!connected) {
        co_return connected;
    }
    hv::hyperv::OfferListener listener;
    listener.type = *hv::hyperv::Guid::parse(hv::hyperv::classes::scsi);
    u32 late = 0;
    listener.context = &late;
    listener.offered = [](void* count, const Offer& offer) {
        require(offer.sub_channel == 0 && offer.type.text().view() == hv::hyperv::classes::scsi);
        ++*static_cast<u32*>(count);
    };
    guest.bus.add(listener);
    static_cast<void>(co_await guest.bus.request_offers());
    io::TaskGroup group(guest.executor);
    require(static_cast<bool>(group.spawn(life(guest, 0))));
    require(static_cast<bool>(group.spawn(life(guest, 1))));
    static_cast<void>(co_await group.join());
    guest.bus.remove(listener);
    u32 before = 0;
    bool first = true;
    guest.bus.for_each_offer([&](const Offer& o) { // in ascending order of valid ids
        require(o.relid != 0 && o.relid < 2048 && (first || o.relid > before));
        before = o.relid;
        first = false;
    });
    co_return Result<void>{};
}
} // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    fuzz::Input input(data, size);
    test::FakeMachine clock;
    clock.step = 1000;
    io::Executor executor(clock.platform());
    test::HeapDma dma;
    auto host = std::make_unique<Host>();
    host->input = &input;
    hv::hyperv::Hypercalls hypercalls;
    hv::hyperv::Gate gate;
    gate.context = host.get();
    gate.call = [](void* self, u64 control, u64 in, u64) -> u64 { return static_cast<Host*>(self)->call(control, in); };
    fuzz::require(static_cast<bool>(hypercalls.install(gate, dma)));
    host->synic.install(*host, dma, true);
    u32 timers = 0;
    host->synic.set_timer_handler([](void* count) { ++*static_cast<u32*>(count); }, &timers);
    fuzz::require(static_cast<bool>(host->synic.enable(executor, 0x41, true)));
    clock.on_idle_context = host.get();
    clock.on_idle = [](void* self) { static_cast<Host*>(self)->step(); };
    {
        auto guest = std::make_unique<Guest>(input, executor);
        const hv::hyperv::VmbusEnvironment environment{hypercalls, host->synic, dma, executor, timeout};
        fuzz::require(static_cast<bool>(guest->bus.install(environment)));
        static_cast<void>(executor.run(both(*guest)));
        const Instant begin = clock.time;
        guest->bus.unload(1'000'000);
        require(!guest->bus.connected() && clock.time - begin < 2'000'000);
        executor.remove(guest->bus);
    }
    host->synic.disable();
    fuzz::require(clock.time < 60'000'000'000); // every wait ends
    return 0;
}
