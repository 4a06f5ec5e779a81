// The storage provider and the services, driven by packets typed from the protocols' descriptions.
#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

import core.std;
import core.result;
import host.vmbus;
import host.storvsp;
import host.services;

#include "guest.hpp"

namespace {

using namespace typed;
using fl::host::Fault;
using fl::host::ServerConfig;

constexpr u64 buffer = 0x100200; // not at a page's beginning

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
    // The answer's packet: completion, header of 16 bytes, 80 bytes, the transaction; payload COMPLETE_IO with status 0.
    EXPECT_EQ(guest.last.type, 11);
    EXPECT_EQ(guest.last.offset, 16);
    EXPECT_EQ(guest.last.length, 80);
    EXPECT_EQ(guest.last.trailer, guest.last.at);
    EXPECT_EQ(Bytes(guest.last.payload.begin(), guest.last.payload.begin() + 12), hex("01000000 00000000 00000000"));
    EXPECT_EQ(guest.operation(1, rings, 9, {0x02, 0x06}), 0xc0000059u); // 6.2 is not known here
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
    // READ(16) of 3 blocks at LBA 5 to 0x100200, typed whole: descriptor, range, SRB.
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
    EXPECT_EQ(data({0x12, 1, 0x83, 0, 6, 0}, 255), hex("00 83 000f 02 01")); // cut at the allocation length
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
    EXPECT_EQ(guest.ram[buffer], 0x7f);                // nothing can be there
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
    EXPECT_EQ(status(9, read, typed_range(4096, 0, {0x400})), 6); // the first frame behind memory
    EXPECT_EQ(status(9, read, typed_range(4096, 0, {~u64{0}})), 6);
    EXPECT_EQ(status(9, write, typed_range(4096, 512, {0x100})), 6);        // one page too few
    EXPECT_EQ(status(9, read, typed_range(4096, 4096, {0x100, 0x101})), 6); // begins behind its first page
    EXPECT_EQ(status(9, read, typed_range(512, 0, {0x100})), 6);            // shorter than the transfer
    EXPECT_EQ(status(9, read, typed_range(4096, 0, {0x100}, 2)), 6);
    EXPECT_EQ(status(9, read, typed_range(0xfffff000, 0, {0x100})), 6);
    EXPECT_EQ(status(6, read, {}), 6);                                                                                // data without pages
    EXPECT_EQ(status(9, Guest::srb(Guest::read_16(0, 1024), 1, 512 * 1024), typed_range(512 * 1024, 0, {0x100})), 6); // above the limit
    EXPECT_EQ(status(9, Guest::srb(Guest::read_16(0, 8), 0, 4096), typed_range(4096, 0, {0x100})), 6);                // wrong direction
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
    EXPECT_EQ(turn(), 0u); // the first answer is still there
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
    rings.pending(false) = 1000; // what we wait for: more than is free before the next turn, less than after it
    for (u32 i = 0; i < 40; ++i) {
        rings.send(6, 200 + i, Guest::srb({0, 0, 0, 0, 0, 0}, 2, 0));
    }
    guest.machine.events.clear();
    guest.signal(1);
    EXPECT_EQ(rings.pending(true), 88u); // the host waits: the ring is full with 46
    EXPECT_EQ(guest.server->counters().ring_full, 1u);
    EXPECT_EQ(guest.machine.events.size(), 1u);   // room for us
    EXPECT_EQ(guest.server->deadline(), ~u64{0}); // we promised to signal
    rings.features(false) = 0;
    EXPECT_NE(guest.server->deadline(), ~u64{0}); // else it looks by itself
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

TEST(HostStorvsp, LunsComeAndGo) {
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

// ---- faults ----------------------------------------------------------------------------------------------------------------------------------

TEST(HostFaults, AreParsed) {
    for (const auto& known : fl::host::fault_names) {
        const auto spec = fl::host::parse_fault(std::string(known.name) + ",after=12,count=3");
        ASSERT_TRUE(spec) << known.name;
        EXPECT_EQ(spec->fault, known.fault);
        EXPECT_EQ(spec->after, 12u);
        EXPECT_EQ(spec->count, 3u);
        EXPECT_FALSE(known.rule.empty());
    }
    EXPECT_EQ(fl::host::fault_names.size(), static_cast<usize>(Fault::duplicate_relid)); // each but none
    for (const char* text : {"", "nothing", "no-answer,", "no-answer,after", "no-answer,after=x", "no-answer,before=1", "no-answer,after=1x"}) {
        EXPECT_FALSE(fl::host::parse_fault(text)) << text;
    }
}

TEST(HostFaults, NothingHappensBeforeItsTime) {
    ServerConfig config;
    config.fault = {Fault::unknown_transaction, 3, 2};
    Guest guest(config);
    Rings rings;
    const u32 channel = guest.start(rings);
    std::vector<bool> good;
    for (int i = 0; i < 7; ++i) {
        good.push_back(guest.command(channel, rings, {0, 0, 0, 0, 0, 0}).has_value());
    }
    EXPECT_EQ(good, (std::vector<bool>{true, true, true, false, false, true, true}));
    EXPECT_EQ(guest.server->faults_struck(), 2u);
}

class HostFault : public ::testing::Test {
  protected:
    /// A guest on a host that breaks `fault` at the second SRB; the first has gone well.
    Guest& start(Fault fault, u32 after = 1) {
        ServerConfig config;
        config.fault = {fault, after, 1};
        guest.emplace(config);
        channel = guest->start(rings);
        EXPECT_TRUE(guest->command(channel, rings, Guest::read_16(1, 1), 1, buffer, 512));
        guest->machine.events.clear();
        return *guest;
    }
    void request(bool write = false) {
        rings.send(9, 0xabc, Guest::srb(Guest::read_16(2, 2, write), write ? 0 : 1, 1024), Guest::range(buffer, 1024));
        guest->signal(channel);
    }
    std::optional<Guest> guest;
    Rings rings;
    u32 channel = 0;
};

TEST_F(HostFault, RingIndices) {
    start(Fault::write_index_beyond);
    request();
    EXPECT_GE(rings.write_index(true), rings.bytes(true));
    EXPECT_FALSE(guest->machine.events.empty());
    start(Fault::read_index_beyond);
    request();
    EXPECT_GE(rings.read_index(false), rings.bytes(false));
}

TEST_F(HostFault, Packets) {
    start(Fault::packet_too_long);
    request();
    EXPECT_GT(rings.receive()->length, rings.bytes(true));
    start(Fault::packet_too_short);
    request();
    EXPECT_LT(rings.receive()->length, 16);
    start(Fault::packet_offset);
    request();
    const auto offset = rings.receive();
    EXPECT_GT(offset->offset, offset->length);
    start(Fault::packet_trailer);
    request();
    const auto trailer = rings.receive();
    EXPECT_NE(trailer->trailer, trailer->at);
    start(Fault::packet_type);
    request();
    EXPECT_EQ(rings.receive()->type, 0x42);
    start(Fault::rewrite_completion);
    request();
    EXPECT_EQ(rings.receive()->length, 0xfff0 * 8 % 65536);
}

TEST_F(HostFault, Transactions) {
    start(Fault::unknown_transaction);
    request();
    EXPECT_NE(rings.receive()->transaction, 0xabcu);
    start(Fault::repeated_completion);
    request();
    EXPECT_EQ(rings.receive()->transaction, 0xabcu);
    EXPECT_EQ(rings.receive()->transaction, 0xabcu);
    start(Fault::early_completion);
    request();
    EXPECT_EQ(rings.receive()->transaction, 0xabcu);
    EXPECT_EQ(rings.receive()->transaction, 0xabdu);
    EXPECT_FALSE(rings.receive());
    start(Fault::no_answer);
    request();
    EXPECT_FALSE(rings.receive());
    request();
    EXPECT_TRUE(rings.receive());
}

TEST_F(HostFault, Storage) {
    start(Fault::completion_too_long);
    request();
    EXPECT_EQ(Guest::parse(*rings.receive()).transferred, 1024u + 4096);
    start(Fault::short_transfer);
    request();
    const auto short_one = Guest::parse(*rings.receive());
    EXPECT_EQ(short_one.transferred, 512u);
    EXPECT_EQ(short_one.srb_status, 1);
    start(Fault::medium_error);
    request();
    const auto medium = Guest::parse(*rings.receive());
    EXPECT_EQ(medium.srb_status, 0x84);
    EXPECT_EQ(medium.sense, hex("f0 00 03 00000002 0a 00000000 11 00 00 000000"));
    start(Fault::write_protected, 0);
    request(true);
    const auto write = Guest::parse(*rings.receive());
    EXPECT_EQ(write.sense[2], 7);
    EXPECT_EQ(write.sense[12], 0x27);
    start(Fault::unit_attention);
    request();
    EXPECT_EQ(Guest::parse(*rings.receive()).sense[2], 6);
}

TEST_F(HostFault, SignalStorm) {
    start(Fault::signal_storm);
    request();
    EXPECT_TRUE(rings.receive());
    for (int i = 0; i < 1300; ++i) {
        guest->server->poll(guest->now);
    }
    EXPECT_GE(guest->machine.events.size(), 5000u);
    EXPECT_EQ(guest->server->deadline(), ~u64{0});
}

TEST_F(HostFault, RescindInFlight) {
    start(Fault::rescind_in_flight);
    request();
    EXPECT_FALSE(rings.receive());
    EXPECT_EQ(guest->take(), hex("02000000 00000000 01000000"));
    EXPECT_EQ(guest->server->on_signal(0x2001, 0), fl::host::HvStatus::success); // we may not know yet
    guest->poll();
    Bytes released = message(13);
    put(released, u32{1});
    guest->post(released);
    EXPECT_EQ(guest->violations(), 0u);
}

TEST(HostFaults, OfMessages) {
    const auto with = [](Fault fault, u32 after = 0) {
        ServerConfig config;
        config.fault = {fault, after, 1};
        return config;
    };
    {
        Guest guest(with(Fault::no_version_response));
        EXPECT_FALSE(guest.connect());
        EXPECT_TRUE(guest.connect());
    }
    {
        Guest guest(with(Fault::refuse_versions));
        for (const u32 version : {0x00050003u, 0x00040000u, 0x0000000du}) {
            EXPECT_FALSE(guest.connect(version));
        }
    }
    {
        Guest guest(with(Fault::refuse_new_versions));
        EXPECT_FALSE(guest.connect(0x00040000));
        EXPECT_TRUE(guest.connect(0x00030000));
    }
    for (const Fault fault : {Fault::refuse_gpadl, Fault::no_gpadl_created, Fault::refuse_open, Fault::no_open_result}) {
        Guest guest(with(fault));
        guest.add_disk();
        ASSERT_TRUE(guest.connect());
        guest.request_offers();
        guest.take();
        Rings rings;
        EXPECT_FALSE(guest.open(1, rings));
        EXPECT_EQ(guest.violations(), 0u);
        EXPECT_EQ(guest.server->faults_struck(), 1u);
    }
    {
        Guest guest(with(Fault::rescind_at_open));
        guest.add_disk();
        ASSERT_TRUE(guest.connect());
        guest.request_offers();
        guest.take();
        ASSERT_EQ(guest.share(1, 0x10, {16, 17, 18, 19}), 0u);
        guest.post(Guest::open_message(1, 0x10, 2));
        EXPECT_EQ(guest.take(), hex("02000000 00000000 01000000"));
        EXPECT_TRUE(guest.machine.messages.empty());
    }
    {
        Guest guest(with(Fault::duplicate_relid));
        guest.add_disk();
        ASSERT_TRUE(guest.connect());
        const auto offers = guest.request_offers();
        ASSERT_EQ(offers.size(), 2u);
        EXPECT_EQ(Guest::relid(offers[0]), Guest::relid(offers[1]));
        EXPECT_NE(offers[0], offers[1]);
    }
    {
        Guest guest(with(Fault::unknown_message, 1));
        ASSERT_TRUE(guest.connect());
        guest.post(message(3));
        EXPECT_EQ(get<u32>(guest.take(), 0), 99u);
        EXPECT_EQ(get<u32>(guest.take(), 0), 4u);
    }
    {
        Guest guest(with(Fault::short_message));
        guest.post(Guest::contact_message(0x00050003));
        EXPECT_EQ(guest.take().size(), 8u);
    }
    for (const Fault fault : {Fault::no_storage_version, Fault::refuse_storage_versions}) {
        Guest guest(with(fault));
        guest.add_disk();
        ASSERT_TRUE(guest.connect());
        guest.request_offers();
        guest.take();
        Rings rings;
        ASSERT_TRUE(guest.open(1, rings));
        ASSERT_EQ(guest.operation(1, rings, 7), 0u);
        EXPECT_NE(guest.operation(1, rings, 9, {0x00, 0x06}), std::optional<u32>(0));
    }
}

// ---- services --------------------------------------------------------------------------------------------------------------------------------

class HostServices : public ::testing::Test {
  protected:
    /// Opens the only channel and answers the negotiation with framework 3.0 and `version`.
    void start(u16 major, u16 minor) {
        ASSERT_TRUE(guest.connect());
        ASSERT_EQ(guest.request_offers().size(), 1u);
        guest.take();
        ASSERT_TRUE(guest.open(1, rings));
        const auto asked = rings.receive();
        ASSERT_TRUE(asked);
        EXPECT_EQ(asked->type, 6);
        EXPECT_EQ(get<u32>(asked->payload, 0), 1u);
        EXPECT_EQ(get<u16>(asked->payload, 12), 0); // negotiate
        EXPECT_EQ(asked->payload[25], 3);           // transaction, request
        EXPECT_EQ(Bytes(asked->payload.begin() + 28, asked->payload.begin() + 30), hex("0200"));
        EXPECT_EQ(Bytes(asked->payload.begin() + 36, asked->payload.begin() + 44), hex("0100 0000 0300 0000"));
        Bytes body = hex("0100 0100 00000000 0300 0000");
        put(body, major);
        put(body, minor);
        answer(0, body);
    }
    void answer(u16 type, const Bytes& body, u32 status = 0) {
        Bytes payload;
        put(payload, u32{1});
        put(payload, static_cast<u32>(20 + body.size()));
        payload.resize(12);
        put(payload, type);
        put(payload, u32{3});
        put(payload, static_cast<u16>(body.size()));
        put(payload, status);
        payload.insert(payload.end(), {0, 5, 0, 0}); // transaction, response
        payload.insert(payload.end(), body.begin(), body.end());
        rings.send(6, 0, payload, {}, 0);
        guest.signal(1);
    }
    Guest guest;
    Rings rings;
};

TEST_F(HostServices, Shutdown) {
    auto& shutdown = guest.server->add(std::make_unique<fl::host::ShutdownService>());
    shutdown.ask(); // before anything is negotiated
    start(3, 2);
    EXPECT_EQ(shutdown.versions().message, 0x00030002u);
    const auto asked = rings.receive();
    ASSERT_TRUE(asked);
    EXPECT_EQ(get<u32>(asked->payload, 4), 20u + 12 + 2048);
    EXPECT_EQ(get<u16>(asked->payload, 12), 3);
    EXPECT_EQ(Bytes(asked->payload.begin() + 28, asked->payload.begin() + 40), hex("00000080 00000000 00000000"));
    EXPECT_EQ(shutdown.state(), fl::host::ShutdownState::asked);
    answer(3, Bytes(asked->payload.begin() + 28, asked->payload.begin() + 40));
    EXPECT_EQ(shutdown.state(), fl::host::ShutdownState::accepted);
    shutdown.ask(true);
    guest.poll();
    EXPECT_EQ(get<u32>(rings.receive()->payload, 36), 2u); // restart
    answer(3, {}, 0x80004005);
    EXPECT_EQ(shutdown.state(), fl::host::ShutdownState::refused);
    EXPECT_EQ(guest.violations(), 0u);
}

TEST_F(HostServices, Heartbeat) {
    auto& heartbeat = guest.server->add(std::make_unique<fl::host::HeartbeatService>());
    start(3, 0);
    for (u64 beat = 0; beat < 3; ++beat) {
        const auto asked = rings.receive();
        ASSERT_TRUE(asked);
        EXPECT_EQ(get<u16>(asked->payload, 12), 1);
        Bytes body;
        put(body, get<u64>(asked->payload, 28) + 1);
        answer(1, body);
        EXPECT_FALSE(rings.receive());
        EXPECT_EQ(guest.server->deadline(), guest.now + 2000000000);
        guest.now = guest.server->deadline();
        guest.poll();
    }
    EXPECT_EQ(heartbeat.answers(), 3u);
    EXPECT_EQ(guest.violations(), 0u);
    rings.receive();
    answer(1, Bytes(8));
    EXPECT_TRUE(guest.machine.said("the sequence number is not one more"));
    answer(1, Bytes(8));
    EXPECT_TRUE(guest.machine.said("an answer of a type that was not asked for"));
}

TEST_F(HostServices, TimeSync) {
    guest.server->add(std::make_unique<fl::host::TimeSyncService>([] { return u64{0x1122334455667788}; }, [] { return u64{77}; }));
    start(4, 0);
    const auto first = rings.receive();
    ASSERT_TRUE(first);
    EXPECT_EQ(Bytes(first->payload.begin() + 28, first->payload.begin() + 45), hex("8877665544332211 4d00000000000000 01"));
    answer(4, {});
    guest.now += 30000000000;
    guest.poll();
    EXPECT_EQ(rings.receive()->payload[44], 2); // a sample
    EXPECT_EQ(guest.violations(), 0u);
}

TEST_F(HostServices, VersionsThatWereNotOffered) {
    auto& shutdown = guest.server->add(std::make_unique<fl::host::ShutdownService>());
    start(9, 9);
    EXPECT_EQ(shutdown.versions().framework, 0u);
    EXPECT_TRUE(guest.machine.said("the negotiation was answered with"));
    shutdown.ask();
    guest.poll();
    EXPECT_FALSE(rings.receive());
}

} // namespace
