// The four rings that the ring layer must support, each set up as by its transport, with both ends in this file.
// Offsets and sizes are from the specifications (docs/ring.md), not from a driver.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import io.ring;

namespace {
using namespace fl;
using namespace fl::io;

template <class T>
T value_at(std::span<const std::byte> memory, usize offset) {
    T value;
    std::memcpy(&value, memory.data() + offset, sizeof(T));
    return value;
}
template <class T>
void set_at(std::span<std::byte> memory, usize offset, T value) {
    std::memcpy(memory.data() + offset, &value, sizeof(T));
}

// ---- Xen: one page, requests and responses share the slots [xen-ring] ----

struct XenAnswer {
    u64 id;
    u8 operation;
    i16 status;
};
static_assert(sizeof(XenAnswer) == 16);

TEST(RingLayouts, XenSharedRing) {
    alignas(4096) std::array<std::byte, 4096> page{};
    constexpr u32 stride = 112; // union blkif_sring_entry, x86_64 ABI
    constexpr u32 entries = ring_entries(4096, 64, stride);
    static_assert(entries == 32);
    static_assert(ring_entries(16384, 64, stride) == 128); // four pages
    constexpr RingLayout requests_layout{.index = 0, .event = 4, .entries = 64, .stride = stride};
    constexpr RingLayout answers_layout{.index = 8, .event = 12, .entries = 64, .stride = stride};
    const MappedMemory memory(page.data(), page.size());
    const FreeRunning<u32> positions(entries);

    // The front end; and a back end made of the same parts with reversed roles.
    auto requests = *Producer<MappedMemory, FreeRunning<u32>, ReachedEvent>::create(memory, requests_layout, positions);
    auto answers = *Consumer<MappedMemory, FreeRunning<u32>, ReachedEvent>::create(memory, answers_layout, positions);
    auto back_requests =
        *Consumer<MappedMemory, FreeRunning<u32>, ReachedEvent>::create(memory, requests_layout, positions);
    auto back_answers =
        *Producer<MappedMemory, FreeRunning<u32>, ReachedEvent>::create(memory, answers_layout, positions);

    // SHARED_RING_INIT: events are at 1.
    set_at<u32>(page, 4, 1);
    set_at<u32>(page, 12, 1);

    std::array<std::byte, stride> request{};
    u32 notified = 0;
    for (u64 turn = 0; turn < 100; ++turn) {
        for (u64 i = 0; i < entries; ++i) {
            set_at<u64>(request, 8, turn * entries + i);
            ASSERT_TRUE(requests.produce(request));
        }
        EXPECT_FALSE(requests.produce(request));
        const u32 before = value_at<u32>(page, 0);
        const u32 event = value_at<u32>(page, 4);
        EXPECT_EQ(requests.publish(), u32(before + entries - event) < entries);
        EXPECT_EQ(value_at<u32>(page, 0), before + entries);
        EXPECT_FALSE(*answers.arm(entries / 2, requests.owed()));
        EXPECT_EQ(value_at<u32>(page, 12), before + entries / 2);

        ASSERT_EQ(*back_requests.available(), entries);
        for (u64 i = 0; i < entries; ++i) {
            ASSERT_TRUE(back_requests.take(request));
            const XenAnswer answer{value_at<u64>(request, 8), 0, 0};
            ASSERT_TRUE(back_answers.produce(answer));
            notified += back_answers.publish() ? 1 : 0; // a host that publishes every response separately
        }
        ASSERT_TRUE(back_answers.retire(entries));
        EXPECT_FALSE(*back_requests.arm(1));

        ASSERT_EQ(*answers.available(requests.owed()), entries);
        for (u64 i = 0; i < entries; ++i) {
            XenAnswer answer;
            ASSERT_TRUE(answers.take(answer));
            EXPECT_EQ(answer.id, turn * entries + i);
        }
        ASSERT_TRUE(requests.retire(entries));
    }
    EXPECT_EQ(notified, 100u); // one per 32 responses
}

// ---- VMBus: a page of indices, then bytes; one such ring for each direction [vmbus] ----

TEST(RingLayouts, VmbusByteRing) {
    constexpr usize ring_bytes = 3 * 4096; // need not be a power of two
    alignas(4096) static std::array<std::byte, 4096 + ring_bytes> pages{};
    pages.fill(std::byte{});
    constexpr RingLayout layout{.index = 0, .event = 8, .consumed = 4, .entries = 4096, .stride = 1};
    const MappedMemory memory(pages.data(), pages.size());
    auto out = *Producer<MappedMemory, Wrapped<u32>, EmptyToNonEmpty>::create(memory, layout, Wrapped<u32>(ring_bytes));
    auto in = *Consumer<MappedMemory, Wrapped<u32>, EmptyToNonEmpty>::create(memory, layout, Wrapped<u32>(ring_bytes));

    struct Descriptor { // 16 bytes; lengths in units of 8
        u16 type, offset8, length8, flags;
        u64 transaction;
    };
    static_assert(sizeof(Descriptor) == 16);
    const auto send = [&](u64 transaction, std::span<const std::byte> payload) {
        const u32 padded = static_cast<u32>(align_up<usize>(payload.size(), 8));
        const Descriptor d{6, 2, static_cast<u16>((16 + padded) / 8), 1, transaction};
        const std::array<std::byte, 8> padding{};
        const u64 trailer = u64{out.position()} << 32; // where this packet started
        if (out.free() < 16 + padded + 8) {
            return false;
        }
        return out.append(std::as_bytes(std::span(&d, 1))) && out.append(payload) &&
               out.append(std::span(padding).first(padded - payload.size())) &&
               out.append(std::as_bytes(std::span(&trailer, 1)));
    };
    std::vector<std::byte> payload(1000, std::byte{0x5a});
    u64 sent = 0;
    u64 received = 0;
    for (int turn = 0; turn < 50; ++turn) {
        u32 packets = 0;
        while (send(sent, payload)) {
            ++sent;
            ++packets;
        }
        EXPECT_EQ(packets, 11u); // 1024 bytes each, one byte always stays free
        EXPECT_TRUE(out.publish()) << "the ring was empty and the mask is clear";
        in.disarm();
        EXPECT_EQ(value_at<u32>(pages, 8), 1u);

        while (*in.available() != 0) {
            const u32 at = in.position();
            Descriptor d;
            ASSERT_TRUE(in.remove(std::as_writable_bytes(std::span(&d, 1))));
            ASSERT_LE(d.length8 * 8u + 8 - 16, in.ready()); // checked before use
            std::vector<std::byte> got(d.length8 * 8u - 16);
            u64 trailer = 0;
            ASSERT_TRUE(in.remove(got));
            ASSERT_TRUE(in.remove(std::as_writable_bytes(std::span(&trailer, 1))));
            EXPECT_EQ(trailer >> 32, at);
            EXPECT_EQ(d.transaction, received++);
            EXPECT_EQ(got, payload);
        }
        in.release();
        EXPECT_FALSE(*in.arm(1));
        ASSERT_TRUE(out.observe());
        EXPECT_EQ(out.in_flight(), 0u);
    }
    EXPECT_EQ(sent, received);
    EXPECT_EQ(value_at<u32>(pages, 0), value_at<u32>(pages, 4));

    // A second packet finds the ring not empty: no signal. Masked: no signal either.
    ASSERT_TRUE(send(1, payload));
    EXPECT_TRUE(out.publish());
    ASSERT_TRUE(send(2, payload));
    EXPECT_FALSE(out.publish());
    ASSERT_TRUE(in.skip(*in.available()));
    in.release();
    in.disarm();
    ASSERT_TRUE(out.observe());
    ASSERT_TRUE(send(3, payload));
    EXPECT_FALSE(out.publish());
    EXPECT_TRUE(*in.arm(1)) << "it arrived while the events were masked: found by the second check";

    set_at<u32>(pages, 0, ring_bytes); // a host that writes an index past the end
    EXPECT_FALSE(in.available());
}

// ---- virtio: descriptors, and two rings of indices into them [virtio-1.2 §2.7] ----

TEST(RingLayouts, VirtioSplitQueueWithEventIndex) {
    constexpr u32 size = 8;
    constexpr usize avail = 16 * size;                                   // after the descriptor table
    constexpr usize used = align_up<usize>(avail + 4 + 2 * size + 2, 4); // flags, idx, ring[], used_event
    constexpr usize total = used + 4 + 8 * size + 2;                     // flags, idx, ring[], avail_event
    alignas(16) std::array<std::byte, align_up<usize>(total, 8)> queue{};
    constexpr RingLayout avail_layout{
        .index = avail + 2, .event = used + 4 + 8 * size, .entries = avail + 4, .stride = 2};
    constexpr RingLayout used_layout{
        .index = used + 2, .event = avail + 4 + 2 * size, .entries = used + 4, .stride = 8};
    const MappedMemory memory(queue.data(), queue.size());
    auto driver =
        *Producer<MappedMemory, FreeRunning<u16>, PassedEvent>::create(memory, avail_layout, FreeRunning<u16>(size));
    auto done =
        *Consumer<MappedMemory, FreeRunning<u16>, PassedEvent>::create(memory, used_layout, FreeRunning<u16>(size));

    struct Used {
        u32 id, length;
    };
    u16 device_seen = 0;
    for (u32 turn = 0; turn < 70000 / size; ++turn) { // wraps the 16-bit index
        for (u16 head = 0; head < size; ++head) {
            ASSERT_TRUE(driver.produce(head));
        }
        // The device requested a notification when the entry at avail_event has been made available.
        set_at<u16>(queue, avail_layout.event, static_cast<u16>(device_seen + (turn % 2 == 0 ? 0 : size)));
        EXPECT_EQ(driver.publish(), turn % 2 == 0);
        ASSERT_EQ(value_at<u16>(queue, avail + 2), static_cast<u16>(device_seen + size));

        EXPECT_FALSE(*done.arm(4, driver.owed()));
        EXPECT_EQ(value_at<u16>(queue, used_layout.event), static_cast<u16>(device_seen + 3))
            << "the fourth entry from here on";
        for (u32 i = 0; i < size; ++i) {
            const u16 head = value_at<u16>(queue, avail + 4 + 2 * (device_seen % size));
            set_at(queue, used + 4 + 8 * (device_seen % size), Used{head, 512});
            set_at<u16>(queue, used + 2, ++device_seen);
        }
        ASSERT_EQ(*done.available(driver.owed()), size);
        for (u32 i = 0; i < size; ++i) {
            Used element;
            ASSERT_TRUE(done.take(element));
            EXPECT_EQ(element.id, i);
        }
        ASSERT_TRUE(driver.retire(size));
    }
    set_at<u16>(queue, used + 2, static_cast<u16>(device_seen + 1)); // an unsolicited completion
    EXPECT_FALSE(done.available(driver.owed()));
}

// ---- NVMe: a queue of commands with a tail doorbell, a queue of completions with phases [nvme-base, Phase Tag] ----

struct NvmeCompletion {
    u32 result, reserved;
    u16 sq_head, sq_id, command, status; // status: bit 0 is the phase
};
static_assert(sizeof(NvmeCompletion) == 16);

TEST(RingLayouts, NvmeQueues) {
    constexpr u32 size = 8;
    alignas(4096) static std::array<std::byte, 64 * size> commands{};
    alignas(4096) static std::array<std::byte, 16 * size> completions{};
    commands.fill(std::byte{});
    completions.fill(std::byte{});
    auto sq = *Producer<MappedMemory, Wrapped<u32>, Always>::create(MappedMemory(commands.data(), commands.size()),
                                                                    {.entries = 0, .stride = 64}, Wrapped<u32>(size));
    auto cq = *Consumer<MappedMemory, FreeRunning<u32>, Always, ByPhase>::create(
        MappedMemory(completions.data(), completions.size()), {.entries = 0, .stride = 16}, FreeRunning<u32>(size), {},
        ByPhase{14});
    u32 device_head = 0;
    u32 device_made = 0;
    u32 tail_doorbell = 0;
    std::array<std::byte, 64> command{};
    for (u32 turn = 0; turn < 30; ++turn) {
        u16 sent = 0;
        while (set_at<u16>(command, 2, sent), sq.produce(command)) {
            ++sent;
        }
        EXPECT_EQ(sent, size - 1);
        ASSERT_TRUE(sq.publish());
        tail_doorbell = sq.slot(); // the driver writes this to the device
        EXPECT_LT(tail_doorbell, size);

        EXPECT_EQ(*cq.available(sq.owed()), 0u);
        for (; device_head != tail_doorbell; device_head = (device_head + 1) % size, ++device_made) {
            const u16 id = value_at<u16>(commands, 64 * device_head + 2);
            const u16 phase = (device_made / size) % 2 == 0 ? 1 : 0;
            set_at(completions, 16 * (device_made % size),
                   NvmeCompletion{0, 0, static_cast<u16>((device_head + 1) % size), 1, id, phase});
        }
        u16 taken = 0;
        while (*cq.available(sq.owed()) != 0) {
            NvmeCompletion c;
            ASSERT_TRUE(cq.take(c));
            EXPECT_EQ(c.command, taken++);
            ASSERT_TRUE(sq.observe(c.sq_head));
        }
        EXPECT_EQ(taken, size - 1);
        EXPECT_EQ(cq.slot(), device_made % size); // goes to the head doorbell
    }
    EXPECT_FALSE(sq.observe(size)) << "a head that is no slot";
    EXPECT_FALSE(sq.observe((device_head + 1) % size)) << "a head in front of the tail";
}

} // namespace
