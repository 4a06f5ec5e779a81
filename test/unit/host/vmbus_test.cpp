// The VMBus server, driven by messages written from the protocol's description.
#include "gtest_macros.hpp"

#include "zeroed.hpp"

import test.gtest;
import host.std;
import host.vmbus;
import host.storvsp;
import host.services;

#include "guest.hpp"

namespace {

using namespace typed;
using fl::host::Fault;
using fl::host::ServerConfig;

TEST(HostVmbus, AnswersTheNewestContact) {
    Guest guest;
    // INITIATE_CONTACT 5.3, messages to processor 0, SINT 2, VTL 0, no monitor pages
    EXPECT_EQ(
        guest.post(hex("0e000000 00000000 03000500 00000000 02000000 00000000 0000000000000000 0000000000000000")), 0);
    ASSERT_EQ(guest.machine.messages.size(), 1u);
    EXPECT_EQ(guest.machine.messages[0].vp, 0u);
    EXPECT_EQ(guest.machine.messages[0].sint, 2);
    EXPECT_EQ(guest.machine.messages[0].type, 1u);
    // supported, successful, further messages to connection 4
    EXPECT_EQ(guest.take(), hex("0f000000 00000000 01 00 0000 04000000"));
    EXPECT_EQ(guest.server->negotiated_version(), 0x00050003u);
    EXPECT_EQ(guest.violations(), 0u);
}

TEST(HostVmbus, RefusesVersionsAndConnections) {
    ServerConfig config;
    config.maximum_version = 0x00050001;
    config.refused_versions = {0x00050000};
    Guest guest(config);
    EXPECT_FALSE(guest.connect(0x00050003));
    EXPECT_FALSE(guest.connect(0x00050000));
    EXPECT_FALSE(guest.connect(0x00010002)); // version 1.2 does not exist
    EXPECT_EQ(guest.violations(), 0u);
    EXPECT_TRUE(guest.connect(0x00050001));
    EXPECT_EQ(guest.violations(), 0u);
    guest.post(Guest::contact_message(0x00050001), 1); // the old connection
    EXPECT_TRUE(guest.machine.logged("came on connection 1; expected 4"));
    EXPECT_EQ(guest.post(message(3), 7), 0x12); // no such connection
    guest.server->poll(guest.now);
}

TEST(HostVmbus, OffersAsTheProtocolSays) {
    Guest guest;
    guest.add_disk();
    guest.server->add(std::make_unique<fl::host::ShutdownService>());
    ASSERT_TRUE(guest.connect());
    const auto offers = guest.request_offers();
    ASSERT_EQ(offers.size(), 2u);
    ASSERT_EQ(offers[0].size(), 196u);
    // type ba6163d9-04a1-4d29-b605-72e2ffb1dc7f
    EXPECT_EQ(Bytes(offers[0].begin(), offers[0].begin() + 24),
              hex("01000000 00000000 d96361ba a104 294d b605 72e2ffb1dc7f"));
    EXPECT_EQ(Bytes(offers[0].begin() + 40, offers[0].begin() + 60),
              hex("0000000000000000 0000000000000000 0100 0000"));
    // relid 1, connection 0x2001
    EXPECT_EQ(Bytes(offers[0].begin() + 180, offers[0].end()), hex("0000 0000 01000000 00 00 0100 01200000"));
    EXPECT_EQ(Bytes(offers[1].begin() + 8, offers[1].begin() + 24), hex("31600b0e 1352 3449 818b 38d90ced39db"));
    EXPECT_EQ(get<u16>(offers[1], 56), 0x11); // a pipe
    EXPECT_EQ(get<u32>(offers[1], 60), 4u);   // of messages
    EXPECT_EQ(guest.take(), hex("04000000 00000000"));
    EXPECT_EQ(guest.machine.connections, (std::set<u32>{0x2001, 0x2002}));
    EXPECT_EQ(guest.violations(), 0u);
    guest.request_offers();
    EXPECT_TRUE(guest.machine.logged("REQUEST_OFFERS for the second time"));
}

TEST(HostVmbus, OpensOverManyPages) {
    Guest guest;
    guest.add_disk();
    ASSERT_TRUE(guest.connect());
    const u32 channel = Guest::relid(guest.request_offers().at(0));
    guest.take();
    Rings rings;
    ASSERT_TRUE(guest.open(channel, rings, 40)); // 82 pages: a header with 26, bodies of 28
    EXPECT_EQ(rings.features(true), 1u);         // the host supports pending_send_sz
    EXPECT_EQ(guest.violations(), 0u);
    guest.post([&] { // close
        Bytes bytes = message(7);
        put(bytes, channel);
        return bytes;
    }());
    Bytes teardown = message(11);
    put(teardown, channel);
    put(teardown, u32{0xe1e10});
    guest.post(teardown);
    EXPECT_EQ(guest.take(), hex("0c000000 00000000 101e0e00"));
    EXPECT_TRUE(guest.open(channel, rings, 2)); // and once more
    EXPECT_EQ(guest.violations(), 0u);
}

TEST(HostVmbus, UnloadEndsEverything) {
    Guest guest;
    Rings rings;
    guest.start(rings);
    guest.post(message(16));
    EXPECT_EQ(guest.take(), hex("11000000 00000000"));
    EXPECT_TRUE(guest.server->unloaded());
    EXPECT_EQ(guest.server->negotiated_version(), 0u);
    EXPECT_TRUE(guest.machine.connections.empty());
    EXPECT_EQ(guest.server->on_signal(0x2001, 0), fl::host::HvStatus::invalid_connection);
    guest.post(message(3));
    EXPECT_TRUE(guest.machine.logged("REQUEST_OFFERS (3) before INITIATE_CONTACT"));
    EXPECT_TRUE(guest.connect(0x00040000)); // a second kernel
    EXPECT_EQ(guest.request_offers().size(), 1u);
}

TEST(HostVmbus, QueuesWhileTheSlotIsBusy) {
    Guest guest;
    for (u32 i = 0; i < 5; ++i) {
        guest.add_disk({.number = i});
    }
    guest.machine.one_slot = true;
    guest.post(Guest::contact_message(0x00050003));
    guest.post(message(3));
    std::vector<u32> types;
    for (int i = 0; i < 20 && !guest.machine.messages.empty(); ++i) {
        ASSERT_EQ(guest.machine.messages.size(), 1u); // never overwrites a pending message
        types.push_back(get<u32>(guest.take(), 0));
        guest.machine.busy = false;
        guest.server->on_end_of_message(0, 2);
        guest.poll();
    }
    EXPECT_EQ(types, (std::vector<u32>{15, 1, 1, 1, 1, 1, 4}));
    EXPECT_EQ(guest.server->counters().messages_out, 7u);
    EXPECT_GE(guest.server->counters().messages_waited, 5u);
}

TEST(HostVmbus, ModifiesTheProcessor) {
    ServerConfig config;
    config.processors = 2;
    Guest guest(config);
    Rings rings;
    const u32 channel = guest.start(rings);
    Bytes modify = message(22);
    put(modify, channel);
    put(modify, u32{1});
    guest.post(modify);
    EXPECT_EQ(guest.take(), hex("18000000 00000000 01000000 00000000"));
    guest.machine.events.clear();
    ASSERT_TRUE(guest.command(channel, rings, {0, 0, 0, 0, 0, 0}));
    EXPECT_EQ(guest.machine.events, (std::vector<Machine::Event>{{1, 2, 1}}));
    modify[12] = 2; // processor 2 does not exist
    guest.post(modify);
    EXPECT_NE(get<u32>(guest.take(), 12), 0u);
    EXPECT_TRUE(guest.machine.logged("wants its events on processor 2; there are 2"));
}

TEST(HostVmbus, OldVersionsUseTheInterruptPage) {
    Guest guest;
    guest.add_disk();
    ASSERT_TRUE(guest.connect(0x0000000d)); // 0.13, its interrupt page is at 0x3000
    const auto offers = guest.request_offers();
    EXPECT_EQ(get<u16>(offers[0], 190), 0); // no connection of its own
    EXPECT_EQ(get<u32>(offers[0], 192), 2u);
    guest.take();
    Rings rings;
    ASSERT_TRUE(guest.open(1, rings));
    Bytes payload;
    put(payload, u32{7});
    payload.resize(64);
    rings.send(6, 1, payload);
    guest.ram[0x3800] = 2; // bit 1 of the half for the host
    ASSERT_EQ(guest.server->on_signal(2, 0), fl::host::HvStatus::success);
    guest.poll();
    EXPECT_TRUE(rings.receive());
    EXPECT_EQ(guest.ram[0x3000], 2); // bit 1 of the half for the guest
    EXPECT_EQ(guest.ram[0x3800], 0);
    EXPECT_EQ(guest.machine.events.back(), (Machine::Event{0, 2, 0}));
    EXPECT_EQ(guest.violations(), 0u);
}

TEST(HostVmbus, MonitorPageIsPolled) {
    ServerConfig config;
    config.monitor_pages = true;
    Guest guest(config);
    guest.add_disk();
    Bytes contact = Guest::contact_message(0x00050003);
    contact[25] = 0x40; // 0x4000, 0x5000
    contact[33] = 0x50;
    guest.post(contact);
    guest.take();
    const auto offers = guest.request_offers();
    EXPECT_EQ(offers[0][188], 1);
    EXPECT_EQ(offers[0][189], 1);
    guest.take();
    Rings rings;
    ASSERT_TRUE(guest.open(1, rings));
    Bytes payload;
    put(payload, u32{7});
    payload.resize(64);
    rings.send(6, 1, payload);
    guest.ram[0x5008] = 2; // trigger group 0, pending, bit 1
    guest.poll();
    EXPECT_TRUE(rings.receive());
    EXPECT_NE(guest.server->deadline(), ~u64{0});
}

TEST(HostVmbus, HotAddAndRemove) {
    Guest guest;
    auto& first = guest.add_disk();
    ASSERT_TRUE(guest.connect());
    ASSERT_EQ(guest.request_offers().size(), 1u);
    guest.take();
    guest.add_disk({.number = 1});
    guest.poll();
    const Bytes late = guest.take();
    EXPECT_EQ(get<u32>(late, 0), 1u);
    EXPECT_EQ(Guest::relid(late), 2u);
    guest.server->remove(first);
    guest.poll();
    EXPECT_EQ(guest.take(), hex("02000000 00000000 01000000"));
    Bytes released = message(13);
    put(released, u32{1});
    guest.post(released);
    EXPECT_EQ(guest.machine.connections, (std::set<u32>{0x2002}));
    EXPECT_EQ(guest.violations(), 0u);
    guest.post(released);
    EXPECT_TRUE(guest.machine.logged("RELID_RELEASED names channel 1, which was not offered"));
}

TEST(HostVmbus, SubChannelsOpenAndCloseWithTheirPrimary) {
    ServerConfig config;
    config.processors = 4;
    Guest guest(config);
    guest.add_disk({.sub_channels = 3});
    ASSERT_TRUE(guest.connect());
    ASSERT_EQ(guest.request_offers().size(), 1u);
    guest.take();
    Rings rings;
    ASSERT_TRUE(guest.open(1, rings));
    ASSERT_EQ(guest.operation(1, rings, 7), 0u);
    ASSERT_EQ(guest.operation(1, rings, 9, {0x00, 0x06}), 0u);
    ASSERT_EQ(guest.operation(1, rings, 10), 0u);
    // QUERY_PROPERTIES: at most 3 sub-channels, multi-channel, 256 KiB
    EXPECT_EQ(Bytes(guest.last.payload.begin() + 12, guest.last.payload.begin() + 28),
              hex("00000000 0300 0000 01000000 00000400"));
    ASSERT_EQ(guest.operation(1, rings, 8), 0u);
    EXPECT_EQ(guest.operation(1, rings, 13, {4, 0}), 0xc000000du); // more than available
    EXPECT_EQ(guest.operation(1, rings, 13, {2, 0}), 0u);
    for (u16 index = 1; index <= 2; ++index) {
        const Bytes offer = guest.take();
        ASSERT_EQ(get<u32>(offer, 0), 1u);
        EXPECT_EQ(get<u16>(offer, 180), index);
        EXPECT_EQ(Guest::relid(offer), index + 1u);
    }
    Rings second;
    ASSERT_TRUE(guest.open(3, second, 3, 0xe1e20, true, 2));
    guest.machine.events.clear();
    const auto answer = guest.command(3, second, Guest::read_16(1, 1), 1, 0x100000, 512);
    ASSERT_TRUE(answer);
    EXPECT_EQ(answer->srb_status, 1);
    EXPECT_EQ(std::memcmp(&guest.ram[0x100000], &guest.disk[512], 512), 0);
    EXPECT_EQ(guest.machine.events, (std::vector<Machine::Event>{{2, 2, 3}}));
    Bytes close = message(7);
    put(close, u32{1});
    guest.post(close);
    EXPECT_EQ(guest.take(), hex("02000000 00000000 02000000"));
    EXPECT_EQ(guest.take(), hex("02000000 00000000 03000000"));
}

// ---- guests that violate the protocol ----

TEST(HostVmbus, BadGpadlsAreRefused) {
    Guest guest;
    guest.add_disk();
    ASSERT_TRUE(guest.connect());
    guest.request_offers();
    guest.take();
    EXPECT_NE(guest.share(1, 0x10, {16, 17, 5000, 18}), 0u); // frame 5000 is beyond 4 MiB
    EXPECT_TRUE(guest.machine.logged("frame 0x1388 is not memory"));
    EXPECT_NE(guest.share(1, 0x10, {16, u64{1} << 60, 18}), 0u);
    EXPECT_EQ(guest.share(1, 0x10, {16, 17, 18, 19}), 0u);
    EXPECT_NE(guest.share(1, 0x10, {16, 17, 18, 19}), 0u); // the handle is in use
    const u64 before = guest.violations();
    guest.share(9, 0x11, {16, 17}); // there is no channel 9
    EXPECT_EQ(guest.violations(), before + 1);
    // Two ranges; an offset; a length that is not the buffer's.
    for (const char* text : {"01000000 12000000 1800 0200 00200000 00000000 1000000000000000 1100000000000000",
                             "01000000 12000000 1800 0100 00200000 10000000 1000000000000000 1100000000000000",
                             "01000000 12000000 2000 0100 00200000 00000000 1000000000000000 1100000000000000",
                             "01000000 12000000 0800 0100 00000000 00000000"}) {
        Bytes bytes = message(8);
        const Bytes rest = hex(text);
        bytes.insert(bytes.end(), rest.begin(), rest.end());
        guest.post(bytes);
        const Bytes created = guest.take();
        EXPECT_EQ(get<u32>(created, 0), 10u);
        EXPECT_NE(get<u32>(created, 16), 0u) << text;
    }
    Bytes body = message(9); // for a GPADL that is complete
    put(body, u32{0});
    put(body, u32{0x10});
    put(body, u64{16});
    guest.post(body);
    EXPECT_TRUE(guest.machine.logged("GPADL_BODY for handle 0x10, which waits for no pages"));
}

TEST(HostVmbus, BadOpensAreRefused) {
    Guest guest;
    guest.add_disk();
    ASSERT_TRUE(guest.connect());
    guest.request_offers();
    guest.take();
    ASSERT_EQ(guest.share(1, 0x10, {16, 17, 18, 19}), 0u);
    const auto refused = [&](u32 handle, u32 downstream, u32 vp) {
        const u64 before = guest.violations();
        guest.post(Guest::open_message(1, handle, downstream, vp));
        const Bytes result = guest.take();
        return get<u32>(result, 0) == 6 && get<u32>(result, 16) != 0 && guest.violations() == before + 1;
    };
    EXPECT_TRUE(refused(0x99, 2, 0)); // no such GPADL
    EXPECT_TRUE(refused(0x10, 0, 0));
    EXPECT_TRUE(refused(0x10, 1, 0)); // a header page alone
    EXPECT_TRUE(refused(0x10, 3, 0));
    EXPECT_TRUE(refused(0x10, 400, 0));
    EXPECT_TRUE(refused(0x10, 2, 1)); // one processor
    guest.ram[16 * 4096] = 8;         // a write index that is not 0
    EXPECT_TRUE(refused(0x10, 2, 0));
    guest.ram[16 * 4096] = 0;
    guest.post(Guest::open_message(1, 0x10, 2));
    EXPECT_EQ(get<u32>(guest.take(), 16), 0u);
    EXPECT_TRUE(refused(0x10, 2, 0)); // open already
}

TEST(HostVmbus, ShortAndUnknownMessagesAreHarmless) {
    Guest guest;
    guest.add_disk();
    ASSERT_TRUE(guest.connect());
    guest.request_offers();
    guest.take();
    for (u32 type = 0; type < 40; ++type) {
        for (usize size : {0u, 4u, 8u, 9u, 12u, 19u, 27u, 240u}) {
            if (type == 14 || type == 16 || type == 3) {
                continue; // these end or begin the connection
            }
            Bytes bytes = message(type);
            bytes.resize(size, 0xff);
            guest.post(bytes);
        }
    }
    EXPECT_GT(guest.violations(), 100u);
    EXPECT_EQ(guest.machine.lines.size() < 100, true); // logged up to a limit, always counted
    EXPECT_EQ(guest.post(Bytes(241)), 5);              // longer than a message can be
    Rings rings;
    guest.machine.messages.clear();
    EXPECT_TRUE(guest.open(1, rings)); // it still works
}

TEST(HostVmbus, BrokenRingsStopTheChannelOnly) {
    struct Case {
        const char* name;
        std::function<void(Rings&)> break_it;
    };
    const auto descriptor = [](u16 type, u16 offset8, u16 length8) {
        Bytes raw;
        put<u16>(raw, type);
        put<u16>(raw, offset8);
        put<u16>(raw, length8);
        put<u16>(raw, 1);
        put<u64>(raw, 1);
        raw.resize(88);
        return raw;
    };
    const std::vector<Case> cases{
        {"write index", [](Rings& r) { r.write_index(false) = r.bytes(false) + 8; }},
        {"write index huge", [](Rings& r) { r.write_index(false) = 0xfffffff8; }},
        {"write index behind", [](Rings& r) { r.write_index(false) = r.bytes(false) - 8; }},
        {"too little", [](Rings& r) { r.write(Bytes(16)); }},
        {"length 0", [&](Rings& r) { r.write(descriptor(6, 2, 0)); }},
        {"length beyond", [&](Rings& r) { r.write(descriptor(6, 2, 0xffff)); }},
        {"offset 0", [&](Rings& r) { r.write(descriptor(6, 0, 10)); }},
        {"offset beyond", [&](Rings& r) { r.write(descriptor(6, 11, 10)); }},
        {"ranges missing", [&](Rings& r) { r.write(descriptor(9, 2, 10)); }},
    };
    for (const Case& c : cases) {
        SCOPED_TRACE(c.name);
        Guest guest;
        Rings rings;
        const u32 channel = guest.start(rings);
        const u64 before = guest.violations();
        c.break_it(rings);
        guest.signal(channel);
        EXPECT_EQ(guest.violations(), before + 1);
        EXPECT_TRUE(guest.machine.logged("its rings are no longer served"));
        guest.signal(channel);
        EXPECT_EQ(guest.violations(), before + 1);
        Bytes close = message(7);
        put(close, channel);
        guest.post(close);
        EXPECT_TRUE(guest.open(channel, rings, 3, 0xe1e30)); // works after reopening
        EXPECT_TRUE(guest.initialize(channel, rings));
    }
}

TEST(HostVmbus, ReadIndexOutOfRangeStopsTheChannel) {
    for (const u32 index : {8u, 0xfffffff8u, 3u * 4096}) {
        Guest guest;
        Rings rings;
        const u32 channel = guest.start(rings);
        rings.read_index(true) = index == 8 ? (rings.write_index(true) + 8) : index;
        const u64 before = guest.violations();
        static_cast<void>(guest.command(channel, rings, {0, 0, 0, 0, 0, 0}));
        EXPECT_EQ(guest.violations(), before + 1);
        EXPECT_TRUE(guest.machine.logged("the guest's read index"));
    }
}

TEST(HostVmbus, SignalsForUnknownChannels) {
    Guest guest;
    guest.add_disk();
    ASSERT_TRUE(guest.connect());
    guest.request_offers();
    EXPECT_EQ(guest.server->on_signal(0x2001, 1), fl::host::HvStatus::invalid_parameter);
    EXPECT_EQ(guest.server->on_signal(0x2002, 0), fl::host::HvStatus::invalid_connection);
    EXPECT_EQ(guest.server->on_signal(0xffffffff, 0), fl::host::HvStatus::invalid_connection);
    EXPECT_EQ(guest.server->on_signal(0x2001, 0), fl::host::HvStatus::success);
    guest.poll();
    EXPECT_TRUE(guest.machine.logged("a signal for channel 1, which is not open"));
}

} // namespace
