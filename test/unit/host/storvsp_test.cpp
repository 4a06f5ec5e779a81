// The storage provider, driven by packets written from the protocol's description.
#include "gtest_macros.hpp"

#include "zeroed.hpp"

import test.gtest;
import host.std;
import core.result;
import host.vmbus;
import host.storvsp;
import host.services;

#include "guest.hpp"

namespace {

using namespace typed;
using fl::host::Fault;
using fl::host::ServerConfig;

constexpr u64 buffer = 0x100200; // not page-aligned

TEST(HostStorvsp, NegotiatesAsTyped) {
    Guest guest;
    guest.add_disk({.versions = {0x0600, 0x0501}});
    ASSERT_TRUE(guest.connect());
    guest.request_offers();
    guest.take();
    Rings rings;
    ASSERT_TRUE(guest.open(1, rings));
    EXPECT_EQ(guest.operation(1, rings, 10), 0xc0000184u); // before BEGIN_INITIALIZATION
    EXPECT_EQ(guest.operation(1, rings, 7), 0u);
    // The answer's packet: completion, header of 16 bytes, 80 bytes, the transaction; payload COMPLETE_IO with status
    // 0.
    EXPECT_EQ(guest.last.type, 11);
    EXPECT_EQ(guest.last.offset, 16);
    EXPECT_EQ(guest.last.length, 80);
    EXPECT_EQ(guest.last.trailer, guest.last.at);
    EXPECT_EQ(Bytes(guest.last.payload.begin(), guest.last.payload.begin() + 12), hex("01000000 00000000 00000000"));
    EXPECT_EQ(guest.operation(1, rings, 9, {0x02, 0x06}), 0xc0000059u); // 6.2 is not supported here
    EXPECT_EQ(guest.operation(1, rings, 9, {0x00, 0x06}), 0u);
    EXPECT_EQ(guest.operation(1, rings, 10), 0u);
    EXPECT_EQ(Bytes(guest.last.payload.begin() + 12, guest.last.payload.begin() + 36),
              hex("00000000 0000 0000 00000000 00000400 0000000000000000")); // no sub-channels, 256 KiB
    EXPECT_EQ(guest.operation(1, rings, 8), 0u);
    EXPECT_EQ(guest.violations(), 1u);
}

TEST(HostStorvsp, ReadsAsTyped) {
    Guest guest;
    Rings rings;
    const u32 channel = guest.start(rings);
    // READ(16) of 3 blocks at LBA 5 to 0x100200, as literal bytes: descriptor, range, SRB.
    Bytes raw = hex("0900 0500 0d00 0100 3412000000000000"
                    "00000000 01000000 00060000 00020000 0001000000000000"
                    "03000000 01000000 00000000"
                    "3400 00 00 00 00 00 00 10 14 01 00 00060000"
                    "88 00 0000000000000005 00000003 00 00 00000000"
                    "0000 00 00 00000000 00000000 00000000");
    put(raw, u32{0});
    put(raw, rings.write_index(false));
    ASSERT_EQ(raw.size(), 13u * 8 + 8);
    rings.write(raw);
    guest.signal(channel);
    const auto answer = rings.receive();
    ASSERT_TRUE(answer);
    EXPECT_EQ(answer->type, 11);
    EXPECT_EQ(answer->flags, 0);
    EXPECT_EQ(answer->transaction, 0x1234u);
    EXPECT_EQ(Bytes(answer->payload.begin(), answer->payload.begin() + 28),
              hex("01000000 00000000 00000000 3400 01 00 00 00 00 00 10 00 01 00 00060000"));
    EXPECT_EQ(std::memcmp(&guest.ram[buffer], &guest.disk[5 * 512], 3 * 512), 0);
    EXPECT_EQ(guest.ram[buffer - 1], 0);
    EXPECT_EQ(guest.ram[buffer + 3 * 512], 0);
    EXPECT_EQ(guest.violations(), 0u);
}

TEST(HostStorvsp, OldVersionsHaveShortSrbs) {
    Guest guest;
    guest.add_disk();
    ASSERT_TRUE(guest.connect(0x00010001));
    guest.request_offers();
    guest.take();
    Rings rings;
    ASSERT_TRUE(guest.open(1, rings));
    ASSERT_TRUE(guest.initialize(1, rings, 0x0200));
    Bytes payload = Guest::srb(Guest::read_16(9, 1), 1, 512);
    payload[12] = 0x24;
    payload.resize(48);
    rings.send(9, 1, payload, Guest::range(buffer, 512));
    guest.signal(1);
    const auto answer = rings.receive();
    ASSERT_TRUE(answer);
    EXPECT_EQ(answer->payload.size(), 48u);
    EXPECT_EQ(Guest::parse(*answer).srb_status, 1);
    EXPECT_EQ(std::memcmp(&guest.ram[buffer], &guest.disk[9 * 512], 512), 0);
    EXPECT_EQ(guest.violations(), 0u);
}

TEST(HostStorvsp, WritesFlushesUnmaps) {
    Guest guest;
    Rings rings;
    const u32 channel = guest.start(rings);
    for (u32 i = 0; i < 65536; ++i) {
        guest.ram[buffer + i] = static_cast<u8>(i * 13 + 1);
    }
    const auto written = guest.command(channel, rings, Guest::read_16(100, 128, true), 0, buffer, 65536); // 17 pages
    ASSERT_TRUE(written);
    EXPECT_EQ(written->srb_status, 1);
    EXPECT_EQ(written->transferred, 65536u);
    EXPECT_EQ(std::memcmp(&guest.ram[buffer], &guest.disk[100 * 512], 65536), 0);
    EXPECT_EQ(guest.command(channel, rings, {0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0})->srb_status, 1);
    EXPECT_EQ(guest.server->counters().flushes, 1u);
    const Bytes list = hex("0016 0010 00000000 0000000000000064 00000002 00000000");
    std::copy(list.begin(), list.end(), guest.ram.begin() + buffer);
    EXPECT_EQ(guest.command(channel, rings, {0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0}, 0, buffer, 24)->srb_status, 1);
    EXPECT_EQ(guest.disk[100 * 512], std::byte{0});
    EXPECT_EQ(guest.disk[102 * 512 - 1], std::byte{0});
    EXPECT_NE(guest.disk[102 * 512 + 1], std::byte{0});
    EXPECT_EQ(guest.server->counters().bytes_written, 65536u);
    EXPECT_EQ(guest.violations(), 0u);
}

TEST(HostStorvsp, ARateLimitedDiskAcceptsAllAtOnceAndCompletesAtItsRate) {
    Guest guest;
    Rings rings;
    const u32 channel = guest.start(rings, 0x0600, {.iops = 4});
    guest.now = 1'000'000'000;
    for (u64 i = 0; i < 3; ++i) {
        rings.send(9, 100 + i, Guest::srb(Guest::read_16(i, 1), 1, 512), Guest::range(buffer + i * 512, 512));
    }
    // INQUIRY: does not access the medium
    rings.send(9, 103, Guest::srb({0x12, 0, 0, 0, 36, 0}, 1, 36), Guest::range(buffer + 4096, 36));
    guest.signal(channel);
    EXPECT_EQ(rings.read_index(false), rings.write_index(false)); // all were taken
    const auto next = [&] {
        const auto answer = rings.receive();
        return answer ? answer->transaction : 0;
    };
    EXPECT_EQ(next(), 103u);
    EXPECT_EQ(next(), 0u);
    for (u64 i = 0; i < 3; ++i) {
        EXPECT_EQ(guest.server->deadline(), 1'250'000'000 + i * 250'000'000);
        guest.now = 1'249'999'999 + i * 250'000'000;
        guest.poll();
        EXPECT_EQ(next(), 0u);
        ++guest.now;
        guest.poll();
        EXPECT_EQ(next(), 100 + i);
        EXPECT_EQ(std::memcmp(&guest.ram[buffer + i * 512], &guest.disk[i * 512], 512), 0);
        EXPECT_EQ(next(), 0u);
    }
    EXPECT_EQ(guest.server->deadline(), ~u64{0});
    // Pending requests are dropped when the channel is closed.
    rings.send(9, 104, Guest::srb(Guest::read_16(0, 1), 1, 512), Guest::range(buffer, 512));
    guest.signal(channel);
    guest.server->reset();
    guest.now += 1'000'000'000;
    guest.poll();
    EXPECT_EQ(next(), 0u);
    EXPECT_EQ(guest.violations(), 0u);
}

TEST(HostStorvsp, SaysWhatItIs) {
    Guest guest;
    Rings rings;
    const u32 channel = guest.start(rings);
    const auto data = [&](const Bytes& cdb, u32 bytes) {
        std::fill_n(guest.ram.begin() + buffer, bytes, u8{0xee});
        const auto answer = guest.command(channel, rings, cdb, 1, buffer, bytes);
        EXPECT_TRUE(answer && answer->srb_status == 1);
        return answer ? Bytes(guest.ram.begin() + buffer, guest.ram.begin() + buffer + answer->transferred) : Bytes{};
    };
    const Bytes inquiry = data({0x12, 0, 0, 0, 36, 0}, 36);
    ASSERT_EQ(inquiry.size(), 36u);
    EXPECT_EQ(Bytes(inquiry.begin(), inquiry.begin() + 8), hex("00 00 06 12 1f 00 00 02"));
    EXPECT_EQ(data({0x12, 1, 0x00, 0, 255, 0}, 255), hex("00 00 0006 00 80 83 b0 b1 b2"));
    EXPECT_EQ(data({0x12, 1, 0x80, 0, 255, 0}, 255), hex("00 80 0003 46 4c 30"));
    EXPECT_EQ(data({0x12, 1, 0x83, 0, 6, 0}, 255), hex("00 83 000f 02 01")); // truncated to the allocation length
    const Bytes limits = data({0x12, 1, 0xb0, 0, 64, 0}, 64);
    EXPECT_EQ(Bytes(limits.begin() + 8, limits.begin() + 12), hex("00000200")); // 256 KiB in blocks
    EXPECT_EQ(data({0x12, 1, 0xb2, 0, 64, 0}, 64), hex("00 b2 0004 00 84 02 00"));
    EXPECT_EQ(data({0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 8), hex("000007ff 00000200"));
    EXPECT_EQ(data(hex("9e10 0000000000000000 00000020 0000"), 32),
              hex("00000000000007ff 00000200 00 00 c0 00 00000000 00000000 00000000 00000000"));
    EXPECT_EQ(data({0x1a, 8, 8, 0, 64, 0}, 64), hex("17 00 10 00 08 12 04 00 0000000000000000 0000000000000000"));
    EXPECT_EQ(data({0x5a, 8, 8, 0, 0, 0, 0, 0, 8, 0}, 64), hex("001a 00 10 00 00 0000"));
    EXPECT_EQ(data(hex("a000 0000 0000 00000040 0000"), 64), hex("00000008 00000000 0000000000000000"));
    EXPECT_EQ(guest.violations(), 0u);
}

TEST(HostStorvsp, ErrorsHaveSense) {
    Guest guest;
    Rings rings;
    const u32 channel = guest.start(rings);
    const auto beyond = guest.command(channel, rings, Guest::read_16(2047, 2), 1, buffer, 1024);
    ASSERT_TRUE(beyond);
    EXPECT_EQ(beyond->srb_status, 0x84); // error, autosense valid
    EXPECT_EQ(beyond->scsi_status, 2);
    EXPECT_EQ(beyond->sense_bytes, 18);
    EXPECT_EQ(beyond->sense, hex("70 00 05 00000000 0a 00000000 21 00 00 000000"));
    EXPECT_EQ(beyond->transferred, 0u);
    const auto unknown = guest.command(channel, rings, {0xa3, 0x0c, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0});
    EXPECT_EQ(unknown->sense[12], 0x20);
    const auto overrun = guest.command(channel, rings, Guest::read_16(0, 2), 1, buffer, 512);
    EXPECT_EQ(overrun->srb_status, 0x12);
    EXPECT_EQ(overrun->transferred, 512u);
    const auto absent = guest.command(channel, rings, {0, 0, 0, 0, 0, 0}, 2, 0, 0, 3);
    EXPECT_EQ(absent->srb_status, 0x20);
    EXPECT_EQ(absent->status, 0xc00000c0u);
    const auto other = guest.command(channel, rings, {0x12, 0, 0, 0, 36, 0}, 1, buffer, 36, 0, 1);
    EXPECT_EQ(other->srb_status, 1);
    EXPECT_EQ(guest.ram[buffer], 0x7f);                // no unit can exist there
    EXPECT_EQ(guest.operation(channel, rings, 6), 0u); // RESET_BUS
    const auto attention = guest.command(channel, rings, {0, 0, 0, 0, 0, 0});
    EXPECT_EQ(attention->sense[2], 6);
    EXPECT_EQ(attention->sense[12], 0x29);
    EXPECT_EQ(guest.command(channel, rings, {0, 0, 0, 0, 0, 0})->srb_status, 1);
    EXPECT_EQ(guest.violations(), 0u);
}

TEST(HostStorvsp, BadRangesAreRefused) {
    Guest guest;
    Rings rings;
    const u32 channel = guest.start(rings);
    const auto status = [&](u16 type, const Bytes& payload, const Bytes& header) {
        const u64 before = guest.violations();
        rings.send(type, 7, payload, header);
        guest.signal(channel);
        const auto answer = rings.receive();
        EXPECT_TRUE(answer);
        EXPECT_EQ(guest.violations(), before + 1);
        return answer ? Guest::parse(*answer).srb_status : 0;
    };
    const Bytes read = Guest::srb(Guest::read_16(0, 8), 1, 4096);
    const Bytes write = Guest::srb(Guest::read_16(0, 8, true), 0, 4096);
    const auto typed_range = [](u32 bytes, u32 offset, std::vector<u64> frames, u32 count = 1) {
        Bytes header;
        put(header, u32{0});
        put(header, count);
        put(header, bytes);
        put(header, offset);
        for (const u64 frame : frames) {
            put(header, frame);
        }
        return header;
    };
    EXPECT_EQ(status(9, read, typed_range(4096, 0, {0x400})), 6); // the first frame beyond memory
    EXPECT_EQ(status(9, read, typed_range(4096, 0, {~u64{0}})), 6);
    EXPECT_EQ(status(9, write, typed_range(4096, 512, {0x100})), 6);        // one page too few
    EXPECT_EQ(status(9, read, typed_range(4096, 4096, {0x100, 0x101})), 6); // starts beyond its first page
    EXPECT_EQ(status(9, read, typed_range(512, 0, {0x100})), 6);            // shorter than the transfer
    EXPECT_EQ(status(9, read, typed_range(4096, 0, {0x100}, 2)), 6);
    EXPECT_EQ(status(9, read, typed_range(0xfffff000, 0, {0x100})), 6);
    // data without pages
    EXPECT_EQ(status(6, read, {}), 6);
    // above the limit
    EXPECT_EQ(status(9, Guest::srb(Guest::read_16(0, 1024), 1, 512 * 1024), typed_range(512 * 1024, 0, {0x100})), 6);
    // wrong direction
    EXPECT_EQ(status(9, Guest::srb(Guest::read_16(0, 8), 0, 4096), typed_range(4096, 0, {0x100})), 6);
    EXPECT_EQ(guest.server->counters().bytes_read, 0u);
    EXPECT_TRUE(guest.command(channel, rings, Guest::read_16(0, 8), 1, buffer, 4096));
}

TEST(HostStorvsp, ServesABatchWithOneInterrupt) {
    Guest guest;
    Rings rings;
    const u32 channel = guest.start(rings);
    guest.machine.events.clear();
    for (u32 i = 0; i < 32; ++i) {
        rings.send(9, 1000 + i, Guest::srb(Guest::read_16(i, 1), 1, 512), Guest::range(0x200000 + i * 4096, 512));
    }
    const u32 sent = rings.write_index(false);
    guest.signal(channel);
    EXPECT_EQ(guest.machine.events.size(), 1u);
    EXPECT_EQ(rings.read_index(false), sent);
    for (u32 i = 0; i < 32; ++i) {
        const auto answer = rings.receive();
        ASSERT_TRUE(answer);
        EXPECT_EQ(answer->transaction, 1000u + i);
        EXPECT_EQ(std::memcmp(&guest.ram[0x200000 + i * 4096], &guest.disk[i * 512], 512), 0);
    }
    EXPECT_EQ(guest.violations(), 0u);
}

TEST(HostStorvsp, InterruptsOnlyWhenTheRingWasEmptyAndUnmasked) {
    Guest guest;
    Rings rings;
    const u32 channel = guest.start(rings);
    const auto turn = [&] {
        guest.machine.events.clear();
        rings.send(6, 1, Guest::srb({0, 0, 0, 0, 0, 0}, 2, 0));
        guest.signal(channel);
        return guest.machine.events.size();
    };
    EXPECT_EQ(turn(), 1u);
    EXPECT_EQ(turn(), 0u); // the first reply is still pending
    rings.receive();
    rings.receive();
    rings.mask(true) = 1;
    EXPECT_EQ(turn(), 0u);
    rings.receive();
    rings.mask(true) = 0;
    EXPECT_EQ(turn(), 1u);
    EXPECT_EQ(rings.mask(false), 0u); // the host sleeps unmasked
}

TEST(HostStorvsp, WaitsForRoomAndIsWoken) {
    Guest guest;
    guest.add_disk();
    ASSERT_TRUE(guest.connect());
    guest.request_offers();
    guest.take();
    Rings rings;
    ASSERT_TRUE(guest.open(1, rings, 1)); // 4096 bytes each: 46 answers of 88
    ASSERT_TRUE(guest.initialize(1, rings));
    for (u32 i = 0; i < 40; ++i) {
        rings.send(6, 100 + i, Guest::srb({0, 0, 0, 0, 0, 0}, 2, 0));
    }
    guest.signal(1);
    rings.pending(false) = 1000; // the guest's request: more than is free before the next turn, less than after it
    for (u32 i = 0; i < 40; ++i) {
        rings.send(6, 200 + i, Guest::srb({0, 0, 0, 0, 0, 0}, 2, 0));
    }
    guest.machine.events.clear();
    guest.signal(1);
    EXPECT_EQ(rings.pending(true), 88u); // the host waits: the ring is full with 46
    EXPECT_EQ(guest.server->counters().ring_full, 1u);
    EXPECT_EQ(guest.machine.events.size(), 1u);   // room for the guest
    EXPECT_EQ(guest.server->deadline(), ~u64{0}); // the guest promised to signal
    rings.features(false) = 0;
    EXPECT_NE(guest.server->deadline(), ~u64{0}); // otherwise the host polls
    rings.features(false) = 1;
    u32 seen = 0;
    for (; rings.receive(); ++seen) {
    }
    EXPECT_EQ(seen, 46u);
    guest.signal(1);
    EXPECT_EQ(rings.pending(true), 0u);
    for (; rings.receive(); ++seen) {
    }
    EXPECT_EQ(seen, 80u);
    EXPECT_EQ(guest.violations(), 0u);
}

TEST(HostStorvsp, LunsAreHotAddedAndRemoved) {
    Guest guest;
    auto& device = guest.add_disk();
    ASSERT_TRUE(guest.connect());
    guest.request_offers();
    guest.take();
    Rings rings;
    ASSERT_TRUE(guest.open(1, rings));
    ASSERT_TRUE(guest.initialize(1, rings));
    std::array<std::byte, 8192> other{};
    fl::host::MemoryStore store(other, true);
    EXPECT_TRUE(device.add_lun({.lun = 5, .store = &store}));
    EXPECT_FALSE(device.add_lun({.lun = 5, .store = &store}));
    guest.poll();
    const auto note = rings.receive();
    ASSERT_TRUE(note);
    EXPECT_EQ(note->type, 6);
    EXPECT_EQ(note->transaction, 0u);
    EXPECT_EQ(get<u32>(note->payload, 0), 11u); // ENUMERATE_BUS
    const auto write = guest.command(1, rings, Guest::read_16(0, 1, true), 0, buffer, 512, 5);
    EXPECT_EQ(write->sense[2], 7); // read-only
    EXPECT_EQ(guest.command(1, rings, {0x12, 0, 0, 0, 36, 0}, 1, buffer, 36, 5)->srb_status, 1);
    EXPECT_EQ(guest.ram[buffer], 0);
    EXPECT_TRUE(device.remove_lun(5));
    guest.poll();
    EXPECT_TRUE(rings.receive());
    EXPECT_EQ(guest.command(1, rings, {0, 0, 0, 0, 0, 0}, 2, 0, 0, 5)->srb_status, 0x20);
    device.announce_removal();
    guest.poll();
    EXPECT_EQ(get<u32>(rings.receive()->payload, 0), 2u); // REMOVE_DEVICE
}

TEST(HostStorvsp, IdeChannelsCarryTheirPlace) {
    Guest guest;
    fl::host::MemoryStore store(guest.disk);
    guest.server->add(fl::host::StorageDevice::ide(1, 1, {}, {.store = &store}));
    ASSERT_TRUE(guest.connect());
    const auto offers = guest.request_offers();
    guest.take();
    // type 32412632-86cb-44a2-9b5c-50d1417354f5, instance 00000001-0001-8899-0000-000000000000
    EXPECT_EQ(Bytes(offers[0].begin() + 8, offers[0].begin() + 40),
              hex("32264132 cb86 a244 9b5c 50d1417354f5 01000000 0100 9988 0000 000000000000"));
    Rings rings;
    ASSERT_TRUE(guest.open(1, rings));
    ASSERT_TRUE(guest.initialize(1, rings));
    EXPECT_EQ(guest.command(1, rings, {0, 0, 0, 0, 0, 0}, 2, 0, 0, 0, 1, 0)->srb_status, 1); // as Linux addresses it
    EXPECT_EQ(guest.command(1, rings, {0, 0, 0, 0, 0, 0}, 2, 0, 0, 0, 1, 1)->srb_status, 1);
    EXPECT_EQ(guest.command(1, rings, {0, 0, 0, 0, 0, 0}, 2, 0, 0, 0, 0, 1)->srb_status, 0x20);
}

} // namespace
