#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.interrupt;
import core.log;
import core.cpuid;
import core.processor;
import io.executor;
import io.task;
import io.block;
import hv.hyperv;

#include "unit/io/support.hpp"

#include "unit/hv/hyperv_fake.hpp"

namespace {
using namespace fl;
using namespace fl::hv::hyperv;

hyperv_fake::Bytes le64(u64 value) {
    hyperv_fake::Bytes bytes(8);
    std::memcpy(bytes.data(), &value, 8);
    return bytes;
}

// ---- versions ----

TEST(Vmbus, NegotiatesDownToTheHostsVersion) {
    const std::array<u32, 10> all{0x00050003, 0x00050002, 0x00050001, 0x00050000, 0x00040001,
                                  0x00040000, 0x00030000, 0x00020004, 0x00010001, 0x0000000d};
    for (usize i = 0; i < all.size(); ++i) {
        hyperv_fake::Machine m;
        m.host.newest = all[i];
        ASSERT_TRUE(m.up()) << std::hex << all[i];
        EXPECT_EQ(to_underlying(m.bus().version()), all[i]);
        const auto contacts = m.host.of(14);
        ASSERT_EQ(contacts.size(), i + 1);
        for (usize n = 0; n <= i; ++n) {
            EXPECT_EQ(hyperv_fake::get32(contacts[n], 8), all[n]) << "newest first";
        }
    }
}

TEST(Vmbus, From50OnContactGoesToConnectionFour) {
    hyperv_fake::Machine m;
    m.host.message_connection = 0x800074;
    ASSERT_TRUE(m.up());
    ASSERT_GE(m.host.posted.size(), 2u);
    EXPECT_EQ(m.host.posted[0].connection, 4u);
    EXPECT_EQ(m.host.posted[0].type, 1u);
    EXPECT_EQ(hyperv_fake::get64(m.host.posted[0].bytes, 16), 2u) << "SINT 2, VTL 0 in the place of the interrupt page";
    EXPECT_EQ(m.host.posted[1].connection, 0x800074u) << "what the host named";
}

TEST(Vmbus, AHostFromBefore50IsFoundAtConnectionOne) {
    hyperv_fake::Machine m;
    m.host.listens_at_4 = false;
    m.host.newest = 0x00040000;
    ASSERT_TRUE(m.up());
    EXPECT_EQ(m.bus().version(), Version::v4_0);
    for (const auto& posted : m.host.posted) {
        EXPECT_EQ(posted.connection, 1u);
    }
    EXPECT_EQ(m.host.of(14).size(), 2u) << "4.1, 4.0: connection 4 was tried once and not again";
    EXPECT_NE(m.host.interrupt_page, 0u);
}

TEST(Vmbus, AHostThatAnswersNothingLeavesTheMachineWorking) {
    for (const int kind : {0, 1, 2}) {
        hyperv_fake::Machine m;
        test::CapturedLog log;
        m.host.silent = kind == 0;
        m.host.listens_at_1 = m.host.listens_at_4 = kind != 1;
        m.host.newest = kind == 2 ? 0 : 0x00050003;
        hv::DeviceList list;
        ASSERT_TRUE(m.start(5'000'000'000));
        const Instant before = m.clock.time;
        EXPECT_TRUE(m.enumerate(list));
        EXPECT_EQ(list.count(), 0u);
        EXPECT_LT(m.clock.time - before, 2'100'000'000u) << "at most a second for each connection";
        EXPECT_FALSE(m.bus().connected());
        EXPECT_TRUE(log.has("native devices only"));
        EXPECT_TRUE(log.has(kind == 2 ? "refuses every version" : "no VMBus answers"));
        m.guest.uninstall();
    }
}

TEST(Vmbus, AHypervisorThatForbidsMessagesIsAnImmediateError) {
    for (const u32 status : {6u, 8u, 2u}) { // access denied, operation denied, no such call
        hyperv_fake::Machine m;
        test::CapturedLog log;
        m.host.busy_posts = ~0u;
        m.host.busy_status = status;
        ASSERT_TRUE(m.start(5'000'000'000));
        const Instant before = m.clock.time;
        hv::DeviceList list;
        EXPECT_TRUE(m.enumerate(list));
        EXPECT_EQ(list.count(), 0u);
        EXPECT_LT(m.clock.time - before, 1'000'000u);
        EXPECT_GE(m.host.busy_posts, ~0u - 2) << "each of the two connections was tried once";
        EXPECT_TRUE(log.has("warning: hyperv: VMBus: the hypervisor does not let this guest post messages")) << status;
        EXPECT_TRUE(log.has("native devices only"));
        m.guest.uninstall();
    }
}

TEST(Vmbus, PrivilegesThatAreNotShownAreNotMissed) {
    hyperv_fake::Machine m(0x40000000, 0x87f); // like OpenVMM on KVM
    m.cpuid.leaves[0].value = {0x87f, 0, 0, 0x100};
    m.sightings.list[1].features_high = 0;
    ASSERT_TRUE(m.up());
    EXPECT_TRUE(m.bus().connected());
    ASSERT_NE(m.guest.timer(), nullptr);
    EXPECT_EQ(m.guest.timer()->name(), "Hyper-V synthetic") << "by message, no direct mode is offered";
}

TEST(Vmbus, ARefusedConnectionIsReportedWithItsState) {
    hyperv_fake::Machine m;
    m.host.refuse_state = 1;
    ASSERT_TRUE(m.start());
    const auto connected = m.executor.run(m.bus().connect());
    ASSERT_FALSE(connected);
    EXPECT_FALSE(m.bus().connected());
}

// ---- messages, byte by byte ----

TEST(Vmbus, MessagesAreAsTheProtocolHasThem) {
    hyperv_fake::Machine m;
    m.host.newest = 0x00050003;
    m.host.offers[0].relid = 0x12;
    ASSERT_TRUE(m.up());
    const auto contact = m.host.of(14).at(0);
    ASSERT_EQ(contact.size(), 40u);
    EXPECT_EQ(hyperv_fake::Bytes(contact.begin(), contact.begin() + 24),
              hyperv_fake::hex("0e 00 00 00 00 00 00 00  03 00 05 00  07 00 00 00  02 00 00 00 00 00 00 00"));
    EXPECT_EQ(m.host.of(3).at(0), hyperv_fake::hex("03 00 00 00 00 00 00 00"));

    Channel channel;
    const std::array<std::byte, 3> user{std::byte{0xaa}, std::byte{0xbb}, std::byte{0xcc}};
    ASSERT_TRUE(m.executor.run(
        m.bus().open(channel, *m.bus().find(0x12), {.send_bytes = 8192, .receive_bytes = 4096, .user_data = user})));
    const auto header = m.host.of(8).at(0);
    const u32 handle = hyperv_fake::get32(header, 12);
    // 5 pages: header and two of data, header and one of data. 8 + 5 * 8 = 48 bytes of ranges.
    ASSERT_EQ(header.size(), 28u + 5 * 8);
    EXPECT_EQ(hyperv_fake::Bytes(header.begin(), header.begin() + 12),
              hyperv_fake::hex("08 00 00 00 00 00 00 00 12 00 00 00"));
    EXPECT_EQ(hyperv_fake::Bytes(header.begin() + 16, header.begin() + 28),
              hyperv_fake::hex("30 00 01 00 00 50 00 00 00 00 00 00"));
    const u64 first = hyperv_fake::get64(header, 28);
    for (u64 i = 0; i < 5; ++i) {
        EXPECT_EQ(hyperv_fake::get64(header, 28 + 8 * i), first + i);
    }
    const auto open = m.host.of(5).at(0);
    ASSERT_EQ(open.size(), 148u);
    EXPECT_EQ(hyperv_fake::Bytes(open.begin(), open.begin() + 12),
              hyperv_fake::hex("05 00 00 00 00 00 00 00 12 00 00 00"));
    EXPECT_EQ(hyperv_fake::get32(open, 16), handle);
    EXPECT_EQ(hyperv_fake::Bytes(open.begin() + 20, open.begin() + 32),
              hyperv_fake::hex("07 00 00 00 03 00 00 00 aa bb cc 00"));
    EXPECT_EQ(*reinterpret_cast<u32*>(first * 4096 + 64), 1u) << "feature bit: pending_send_sz";
    EXPECT_EQ(*reinterpret_cast<u32*>((first + 3) * 4096 + 64), 1u);

    ASSERT_TRUE(m.executor.run(m.bus().modify(channel, 0)));
    EXPECT_EQ(m.host.of(22).at(0), hyperv_fake::hex("16 00 00 00 00 00 00 00 12 00 00 00 07 00 00 00"));
    ASSERT_TRUE(m.executor.run(m.bus().close(channel)));
    EXPECT_EQ(m.host.of(7).at(0), hyperv_fake::hex("07 00 00 00 00 00 00 00 12 00 00 00"));
    auto teardown = hyperv_fake::hex("0b 00 00 00 00 00 00 00 12 00 00 00");
    teardown.resize(16);
    std::memcpy(teardown.data() + 12, &handle, 4);
    EXPECT_EQ(m.host.of(11).at(0), teardown);
    m.bus().unload(1'000'000);
    EXPECT_EQ(m.host.of(16).at(0), hyperv_fake::hex("10 00 00 00 00 00 00 00"));
}

TEST(Vmbus, OffersAreReadFieldByField) {
    hyperv_fake::Machine m;
    m.host.offers = {
        {.relid = 9, .instance = 5, .sub_channel = 0, .dedicated = false, .monitor = 33, .connection = 0x1234},
        {.relid = 2, .type = "525074dc-8985-46e2-8057-a307dc18a502"}};
    hv::DeviceList list;
    ASSERT_TRUE(m.start());
    ASSERT_TRUE(m.enumerate(list));
    ASSERT_EQ(list.count(), 2u);
    EXPECT_EQ(list.list[0].type.view(), "525074dc-8985-46e2-8057-a307dc18a502") << "by relid";
    EXPECT_EQ(list.list[0].number, 2u);
    EXPECT_EQ(list.list[1].type.view(), "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f");
    EXPECT_EQ(list.list[1].address.view(), "00000005-0000-0000-0000-000000000000");
    const auto offer = m.bus().find(9);
    ASSERT_TRUE(offer);
    EXPECT_EQ(offer->connection_id, 0x1234u);
    EXPECT_FALSE(offer->dedicated_interrupt);
    EXPECT_EQ(offer->monitor, u8{33});
    EXPECT_FALSE(m.bus().find(3));
}

TEST(Guids, TextAndMemory) {
    const auto guid = Guid::parse("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f");
    ASSERT_TRUE(guid);
    constexpr std::array<u8, 16> memory{0xd9, 0x63, 0x61, 0xba, 0xa1, 0x04, 0x29, 0x4d,
                                        0xb6, 0x05, 0x72, 0xe2, 0xff, 0xb1, 0xdc, 0x7f};
    EXPECT_EQ(guid->bytes, memory);
    EXPECT_EQ(guid->text().view(), "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f");
    EXPECT_EQ(Guid::parse("BA6163D9-04A1-4D29-B605-72E2FFB1DC7F"), guid);
    for (const std::string_view wrong :
         {"", "ba6163d9", "ba6163d9-04a1-4d29-b605-72e2ffb1dc7", "ba6163d9-04a1-4d29-b605-72e2ffb1dc7fa",
          "ba6163d9+04a1-4d29-b605-72e2ffb1dc7f", "ga6163d9-04a1-4d29-b605-72e2ffb1dc7f"}) {
        EXPECT_FALSE(Guid::parse(wrong)) << wrong;
    }
}

// ---- shared memory ----

TEST(Vmbus, HundredsOfPagesGoInParts) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.up());
    for (const u32 count : {1u, 26u, 27u, 54u, 55u, 700u}) {
        const usize bodies_before = m.host.of(9).size();
        std::vector<u64> frames;
        for (u32 i = 0; i < count; ++i) {
            frames.push_back(u64{0x1234500000} + i * 3);
        }
        const auto gpadl = m.executor.run(m.bus().create_gpadl(1, frames));
        ASSERT_TRUE(gpadl) << count;
        EXPECT_EQ(m.host.gpadls[gpadl->handle], frames);
        const auto bodies = m.host.of(9);
        EXPECT_EQ(bodies.size() - bodies_before, count <= 26 ? 0u : (count - 26 + 27) / 28);
        for (usize i = bodies_before; i < bodies.size(); ++i) {
            EXPECT_EQ(hyperv_fake::get32(bodies[i], 8), i - bodies_before) << "numbered from 0";
            EXPECT_LE(bodies[i].size(), 240u);
        }
        ASSERT_TRUE(m.executor.run(m.bus().teardown_gpadl(*gpadl)));
        EXPECT_FALSE(m.host.gpadls.contains(gpadl->handle));
    }
    EXPECT_FALSE(m.executor.run(m.bus().create_gpadl(1, std::span<const u64>{})));
    EXPECT_FALSE(m.executor.run(m.bus().create_gpadl(1, 0, 8191)));
}

TEST(Vmbus, PostsWithoutABufferAreRetried) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.up());
    m.host.busy_posts = 5;
    EXPECT_TRUE(m.executor.run(m.bus().create_gpadl(1, 0x1000, 100)));
    EXPECT_EQ(m.bus().counters().retries, 5u);
    m.host.busy_posts = ~0u;
    const auto never = m.executor.run(m.bus().create_gpadl(1, 0x1000, 1));
    ASSERT_FALSE(never);
    EXPECT_EQ(never.error().code, Code::timed_out);
}

TEST(Vmbus, ATemporarilyMissingConnectionIsWaitedFor) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.up());
    m.host.busy_posts = 20;
    m.host.busy_status = 0x12; // invalid connection id
    EXPECT_TRUE(m.executor.run(m.bus().create_gpadl(1, 0x1000, 1)));
    EXPECT_EQ(m.bus().counters().retries, 20u);
    m.host.busy_posts = ~0u;
    const Instant start = m.clock.time;
    EXPECT_FALSE(m.executor.run(m.bus().create_gpadl(1, 0x1000, 1)));
    EXPECT_GE(m.clock.time - start, Vmbus::posting_timeout);
    EXPECT_LT(m.clock.time - start, 2 * Vmbus::posting_timeout);
}

TEST(Vmbus, AnUnreleasedIdIsReleasedAgain) {
    for (const u32 status : {0x12u, 0x13u, 0x5u}) {
        hyperv_fake::Machine m;
        ASSERT_TRUE(m.up());
        m.host.busy_posts = 3;
        m.host.busy_status = status;
        m.host.rescind(1);
        for (u32 i = 0; i < 20; ++i) {
            m.executor.turn();
        }
        EXPECT_EQ(m.host.released, std::vector<u32>{1}) << status;
    }
}

TEST(Vmbus, RefusalsAndSilenceAreErrorsWithABound) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.up());
    Channel channel;
    const Offer offer = *m.bus().find(1);
    const u32 before = m.memory.outstanding;
    m.host.gpadl_status = 0xc0000001;
    auto opened = m.executor.run(m.bus().open(channel, offer, {}));
    ASSERT_FALSE(opened);
    EXPECT_EQ(opened.error().code, Code::io);
    EXPECT_EQ(m.memory.outstanding, before) << "the memory is free again";
    m.host.gpadl_status = 0;
    m.host.open_status = 0xc0000001;
    opened = m.executor.run(m.bus().open(channel, offer, {}));
    ASSERT_FALSE(opened);
    EXPECT_EQ(opened.error().code, Code::io);
    EXPECT_EQ(m.memory.outstanding, before);
    EXPECT_TRUE(m.host.gpadls.empty());
    m.host.open_status = 0;
    m.host.answers_open = false;
    opened = m.executor.run(m.bus().open(channel, offer, {}));
    ASSERT_FALSE(opened);
    EXPECT_EQ(opened.error().code, Code::timed_out);
    EXPECT_EQ(m.memory.outstanding, before) << "closed and torn down all the same";
    EXPECT_EQ(m.host.of(7).size(), 1u);
    m.host.answers_gpadl = false;
    opened = m.executor.run(m.bus().open(channel, offer, {}));
    ASSERT_FALSE(opened);
    EXPECT_EQ(opened.error().code, Code::timed_out);
    EXPECT_EQ(m.memory.outstanding, before + 1) << "the host may have it: given up";
    m.host.answers_gpadl = m.host.answers_open = true;
    ASSERT_TRUE(m.executor.run(m.bus().open(channel, offer, {}))) << "and then it works";
    Channel second;
    opened = m.executor.run(m.bus().open(second, offer, {}));
    ASSERT_FALSE(opened);
    EXPECT_EQ(opened.error().code, Code::busy);
    m.host.answers_teardown = false;
    const u32 while_open = m.memory.outstanding;
    const auto closed = m.executor.run(m.bus().close(channel));
    ASSERT_FALSE(closed);
    EXPECT_EQ(closed.error().code, Code::timed_out);
    EXPECT_FALSE(channel.is_open());
    EXPECT_EQ(m.memory.outstanding, while_open) << "the host may still access the rings: their memory is given up";
}

// ---- rescind ----

TEST(Vmbus, ARescindEndsEveryWait) {
    // During GPADL creation, while opening, closing or moving: the message after which the host rescinds the device.
    for (const u32 moment : {8u, 9u, 5u}) {
        hyperv_fake::Machine m;
        ASSERT_TRUE(m.up());
        m.host.answers_gpadl = moment == 5;
        m.host.answers_open = false;
        bool done = false;
        m.host.before_answer = [&](const hyperv_fake::Bytes& message) {
            if (hyperv_fake::get32(message, 0) == moment && !std::exchange(done, true)) {
                m.host.rescind(1);
            }
        };
        Channel channel;
        const Instant before = m.clock.time;
        const auto opened = m.executor.run(m.bus().open(channel, *m.bus().find(1), {.send_bytes = 128 * 4096}));
        ASSERT_FALSE(opened) << moment;
        EXPECT_EQ(opened.error().code, Code::device_gone) << moment;
        EXPECT_LT(m.clock.time - before, 40'000'000u) << "not by its deadline";
        m.settle();
        EXPECT_EQ(m.host.released, std::vector<u32>{1}) << "the id is given back, once";
        EXPECT_FALSE(m.bus().find(1));
        EXPECT_FALSE(channel.is_open());
    }
}

TEST(Vmbus, ARescindedOpenChannelIsClosedByItsOwner) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.up());
    Channel channel;
    int calls = 0;
    channel.on_rescind([](void* c) { ++*static_cast<int*>(c); }, &calls);
    const Offer offer = *m.bus().find(1);
    ASSERT_TRUE(m.executor.run(m.bus().open(channel, offer, {})));
    m.host.rescind(1);
    m.settle();
    EXPECT_EQ(calls, 1);
    EXPECT_TRUE(channel.rescinded());
    EXPECT_TRUE(m.host.released.empty()) << "not before it is closed";
    EXPECT_FALSE(m.bus().find(1));
    const u32 before = m.memory.outstanding;
    EXPECT_TRUE(m.executor.run(m.bus().close(channel)));
    EXPECT_EQ(m.memory.outstanding, before - 1);
    EXPECT_EQ(m.host.released, std::vector<u32>{1});
    // The id may be reused.
    m.host.send(hyperv_fake::Host::offer_message({.relid = 1, .instance = 7}));
    m.settle();
    ASSERT_TRUE(m.bus().find(1));
    EXPECT_TRUE(m.executor.run(m.bus().open(channel, *m.bus().find(1), {})));
    EXPECT_FALSE(channel.rescinded());
}

TEST(Vmbus, ARescindOfAClosedChannelIsAnsweredAtOnce) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.up());
    m.host.rescind(1);
    m.host.rescind(1);
    m.host.rescind(99);
    m.settle();
    EXPECT_EQ(m.host.released, std::vector<u32>{1});
    EXPECT_EQ(m.bus().counters().unexpected, 2u);
}

TEST(Vmbus, ARescindWhileClosingFreesTheMemory) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.up());
    Channel channel;
    ASSERT_TRUE(m.executor.run(m.bus().open(channel, *m.bus().find(1), {})));
    const u32 before = m.memory.outstanding;
    m.host.answers_teardown = false;
    m.host.before_answer = [&](const hyperv_fake::Bytes& message) {
        if (hyperv_fake::get32(message, 0) == 11) {
            m.host.rescind(1);
        }
    };
    EXPECT_TRUE(m.executor.run(m.bus().close(channel)));
    EXPECT_EQ(m.memory.outstanding, before - 1);
    m.settle();
    EXPECT_EQ(m.host.released, std::vector<u32>{1});
}

// ---- hot-added offers ----

TEST(Vmbus, SubChannelsAreWaitedForAndFound) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.up());
    const Guid instance = m.bus().find(1)->instance;
    m.host.send(hyperv_fake::Host::offer_message({.relid = 20, .sub_channel = 2}));
    m.settle();
    auto second = m.executor.run(m.bus().sub_channel(instance, 2, {m.executor, 1'000'000}));
    ASSERT_TRUE(second);
    EXPECT_EQ(second->relid, 20u);
    const auto none = m.executor.run(m.bus().sub_channel(instance, 1, {m.executor, 1'000'000}));
    ASSERT_FALSE(none);
    EXPECT_EQ(none.error().code, Code::timed_out);
    // An offer that arrives while it is waited for.
    static hyperv_fake::Machine* machine;
    machine = &m;
    m.clock.on_idle = [](void*) {
        machine->host.send(hyperv_fake::Host::offer_message({.relid = 21, .sub_channel = 1}));
        machine->host.interrupt();
    };
    auto first = m.executor.run(m.bus().sub_channel(instance, 1, {m.executor, 100'000'000}));
    ASSERT_TRUE(first);
    EXPECT_EQ(first->relid, 21u);
}

TEST(Vmbus, ListenersAreNotifiedOfHotAdd) {
    hyperv_fake::Machine m;
    std::vector<u32> seen_ids;
    OfferListener listener{
        .type = *Guid::parse(classes::scsi),
        .offered = [](void* c, const Offer& offer) { static_cast<std::vector<u32>*>(c)->push_back(offer.relid); },
        .context = &seen_ids};
    ASSERT_TRUE(m.start());
    m.bus().add(listener);
    hv::DeviceList list;
    ASSERT_TRUE(m.enumerate(list));
    EXPECT_TRUE(seen_ids.empty()) << "what was there at first is in the list";
    m.host.send(hyperv_fake::Host::offer_message({.relid = 5, .instance = 9}));
    m.host.send(hyperv_fake::Host::offer_message({.relid = 6, .instance = 9, .sub_channel = 1}));
    m.host.send(hyperv_fake::Host::offer_message({.relid = 7, .type = std::string(classes::shutdown), .instance = 10}));
    m.settle();
    EXPECT_EQ(seen_ids, std::vector<u32>{5});
    m.bus().remove(listener);
    m.host.send(hyperv_fake::Host::offer_message({.relid = 8, .instance = 11}));
    m.settle();
    EXPECT_EQ(seen_ids.size(), 1u);
}

TEST(Vmbus, EachOfferIsReturnedOnceAndAgainAfterARescind) {
    hyperv_fake::Machine m;
    m.host.offers.clear();
    m.host.offers.push_back({.relid = 3, .instance = 3});
    ASSERT_TRUE(m.start());
    hv::DeviceList list;
    ASSERT_TRUE(m.enumerate(list));
    ASSERT_EQ(list.count(), 1u);
    EXPECT_FALSE(m.guest.bus()->next_device()) << "it is in the list";
    EXPECT_FALSE(m.guest.bus()->changes().is_open());
    m.host.send(hyperv_fake::Host::offer_message({.relid = 9, .type = std::string(classes::shutdown), .instance = 9}));
    m.host.send(hyperv_fake::Host::offer_message({.relid = 6, .instance = 6}));
    m.host.send(hyperv_fake::Host::offer_message({.relid = 7, .instance = 6, .sub_channel = 1}));
    m.host.send(hyperv_fake::Host::offer_message({.relid = 8, .instance = 8}));
    m.host.rescind(8); // before the guest handles the offer
    m.settle();
    EXPECT_TRUE(m.guest.bus()->changes().is_open());
    auto device = m.guest.bus()->next_device();
    ASSERT_TRUE(device);
    EXPECT_EQ(device->number, 6u);
    EXPECT_EQ(device->type.view(), classes::scsi);
    device = m.guest.bus()->next_device();
    ASSERT_TRUE(device);
    EXPECT_EQ(device->number, 9u) << "of any class";
    EXPECT_EQ(device->type.view(), classes::shutdown);
    EXPECT_FALSE(m.guest.bus()->next_device());
    m.guest.bus()->changes().close();
    m.host.rescind(6);
    m.host.send(hyperv_fake::Host::offer_message({.relid = 6, .instance = 6}));
    m.settle();
    EXPECT_TRUE(m.guest.bus()->changes().is_open());
    device = m.guest.bus()->next_device();
    ASSERT_TRUE(device);
    EXPECT_EQ(device->number, 6u);
    EXPECT_FALSE(m.guest.bus()->next_device());
}

// Hot-added offers without room: the waiter for news gets their number.
TEST(Vmbus, LateOffersThatFindNoRoomAreNews) {
    hyperv_fake::Machine m;
    m.host.offers.clear();
    hv::DeviceList list;
    ASSERT_TRUE(m.start() && m.enumerate(list));
    EXPECT_EQ(list.dropped, 0u);
    hv::HyperV::Bus& bus = *m.guest.bus();
    const auto offer = [&](u32 id) {
        bus.changes().close();
        m.host.send(hyperv_fake::Host::offer_message({.relid = id, .instance = static_cast<u8>(id)}));
        m.settle();
        EXPECT_TRUE(bus.changes().is_open()) << id;
    };
    u32 id = 1;
    for (; id <= Vmbus::max_offers; ++id) {
        offer(id);
    }
    EXPECT_EQ(bus.new_dropped(), 0u);
    offer(id++);
    EXPECT_EQ(bus.new_dropped(), 1u);
    EXPECT_EQ(bus.new_dropped(), 0u) << "each is reported once";
    offer(id++);
    offer(id++);
    EXPECT_EQ(bus.new_dropped(), 2u);
    usize given = 0;
    while (bus.next_device()) {
        ++given;
    }
    EXPECT_EQ(given, Vmbus::max_offers);
    EXPECT_EQ(m.host.released.size(), 3u);
    m.host.rescind(1); // room for one
    offer(id++);
    EXPECT_EQ(bus.new_dropped(), 0u);
    EXPECT_TRUE(bus.next_device());
}

TEST(Vmbus, ForeignAnswersAndBrokenMessagesAreIgnored) {
    hyperv_fake::Machine m;
    test::CapturedLog log;
    ASSERT_TRUE(m.up());
    m.host.send(hyperv_fake::Host::message(6, {1, 777, 0}));  // an unsolicited OPENCHANNEL_RESULT
    m.host.send(hyperv_fake::Host::message(10, {1, 777, 0})); // a GPADL
    m.host.send(hyperv_fake::Host::message(12, {777}));       // a teardown
    m.host.send(hyperv_fake::Host::message(15, {1}));         // a second reply to the contact
    m.host.send(hyperv_fake::Host::message(4, {}));           // a second end of offers
    m.host.send(hyperv_fake::Host::message(999, {1, 2, 3}));  // an unknown message type
    m.host.send(hyperv_fake::Host::message(1, {1, 2, 3}));    // a truncated offer
    m.host.send(hyperv_fake::Bytes{1, 2, 3});                 // too short for any message
    m.host.send(hyperv_fake::Host::offer_message({.relid = 0}));
    m.host.send(hyperv_fake::Host::offer_message({.relid = 2048}));
    m.host.send(hyperv_fake::Host::offer_message({.relid = 1}));
    m.settle();
    EXPECT_EQ(m.bus().counters().unexpected, 11u);
    EXPECT_TRUE(log.has("ignored"));
    Channel channel;
    EXPECT_TRUE(m.executor.run(m.bus().open(channel, *m.bus().find(1), {})));
}

TEST(Vmbus, MoreOffersThanThereIsRoomForAreDropped) {
    hyperv_fake::Machine m;
    m.host.offers.clear();
    for (u32 i = 1; i <= Vmbus::max_offers + 3; ++i) {
        m.host.offers.push_back({.relid = i, .instance = static_cast<u8>(i)});
    }
    hv::DeviceList list;
    ASSERT_TRUE(m.start() && m.enumerate(list));
    EXPECT_EQ(m.bus().counters().offers, Vmbus::max_offers);
    EXPECT_EQ(list.count(), Vmbus::max_offers);
    EXPECT_EQ(list.dropped, 3u) << "reported to the caller that requests the list";
    EXPECT_EQ(m.guest.bus()->new_dropped(), 0u) << "and not once more";
    EXPECT_EQ(m.host.released.size(), 3u);
}

// ---- a channel's life ----

struct HostRings {
    u8* out; // written by the guest
    u8* in;
    u32 bytes;
    explicit HostRings(hyperv_fake::Machine& m, u32 relid = 1) {
        const auto& open = m.host.opened.at(relid);
        const u64 first = m.host.gpadls.at(hyperv_fake::get32(open, 16)).front() * 4096;
        out = reinterpret_cast<u8*>(first);
        bytes = (hyperv_fake::get32(open, 24) - 1) * 4096;
        in = out + 4096 + bytes;
    }
    static u32& word(u8* ring, usize at) { return *reinterpret_cast<u32*>(ring + at); }
    void write(const hyperv_fake::Bytes& packet) {
        u32 at = word(in, 0);
        for (const u8 byte : packet) {
            in[4096 + at] = byte;
            at = (at + 1) % bytes;
        }
        word(in, 0) = at;
    }
};

TEST(VmbusChannel, PacketsGoThereAndBack) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.up());
    Channel channel;
    ASSERT_TRUE(m.executor.run(m.bus().open(channel, *m.bus().find(1), {.send_bytes = 4096, .receive_bytes = 4096})));
    HostRings rings(m);
    const auto payload = le64(0x1122334455667788);
    EXPECT_EQ(channel.send_inband(std::as_bytes(std::span(payload)), 0xabc, true), Sent::queued);
    EXPECT_EQ(channel.send_inband(std::as_bytes(std::span(payload).first(3)), 0xabd), Sent::queued);
    EXPECT_EQ(HostRings::word(rings.out, 0), 0u) << "nothing is seen before publish()";
    EXPECT_TRUE(m.host.signals.empty());
    EXPECT_TRUE(channel.publish());
    EXPECT_EQ(m.host.signals, std::vector<u64>{0x10000}) << "one signal for the turn";
    EXPECT_EQ(HostRings::word(rings.out, 0), 64u);
    const hyperv_fake::Bytes seen(rings.out + 4096, rings.out + 4096 + 64);
    EXPECT_EQ(seen,
              hyperv_fake::hex(
                  "06 00 02 00 03 00 01 00 bc 0a 00 00 00 00 00 00 88 77 66 55 44 33 22 11 00 00 00 00 00 00 00 00"
                  "06 00 02 00 03 00 00 00 bd 0a 00 00 00 00 00 00 88 77 66 00 00 00 00 00 00 00 00 00 20 00 00 00"));
    EXPECT_EQ(channel.send_completion({}, 1), Sent::queued);
    EXPECT_FALSE(channel.publish()) << "the ring was not empty: the host is awake";
    HostRings::word(rings.out, 4) = HostRings::word(rings.out, 0);
    HostRings::word(rings.out, 8) = 1;
    EXPECT_EQ(channel.send_completion({}, 1), Sent::queued);
    EXPECT_FALSE(channel.publish()) << "masked";

    rings.write(hyperv_fake::hex(
        "0b 00 02 00 03 00 00 00 34 12 00 00 00 00 00 00 01 02 03 04 05 06 07 08 00 00 00 00 00 00 00 00"));
    m.host.raise(1);
    EXPECT_EQ(channel.interrupts(), 1u);
    Packet packet;
    auto got = channel.receive(packet);
    ASSERT_TRUE(got && *got);
    EXPECT_EQ(packet.type, PacketType::completion);
    EXPECT_EQ(packet.transaction, 0x1234u);
    EXPECT_EQ(packet.payload.size(), 8u);
    got = channel.receive(packet);
    ASSERT_TRUE(got);
    EXPECT_FALSE(*got);
    EXPECT_EQ(HostRings::word(rings.in, 4), 0u);
    channel.release();
    EXPECT_EQ(HostRings::word(rings.in, 4), 32u);
    EXPECT_EQ(channel.counters().packets_sent, 4u);
    EXPECT_EQ(channel.counters().packets_received, 1u);
}

TEST(VmbusChannel, AHostThatWaitsForRoomIsSignalled) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.up());
    Channel channel;
    ASSERT_TRUE(m.executor.run(m.bus().open(channel, *m.bus().find(1), {.send_bytes = 4096, .receive_bytes = 4096})));
    HostRings rings(m);
    for (u32 i = 0; i < 127; ++i) { // 127 * 32 = 4064 of 4096 bytes
        rings.write(hyperv_fake::hex(
            "0b 00 02 00 03 00 00 00 34 12 00 00 00 00 00 00 01 02 03 04 05 06 07 08 00 00 00 00 00 00 00 00"));
    }
    HostRings::word(rings.in, 12) = 100;
    Packet packet;
    const auto take = [&](u32 n) {
        for (u32 i = 0; i < n; ++i) {
            auto got = channel.receive(packet);
            ASSERT_TRUE(got && *got);
        }
        channel.release();
    };
    take(2); // 96 free: not enough
    EXPECT_TRUE(m.host.signals.empty());
    take(1); // 128
    EXPECT_EQ(m.host.signals.size(), 1u);
    take(10);
    EXPECT_EQ(m.host.signals.size(), 1u) << "once: there was enough already";
}

TEST(VmbusChannel, WeAskForASignalWhenThereIsNoRoom) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.up());
    Channel channel;
    ASSERT_TRUE(m.executor.run(m.bus().open(channel, *m.bus().find(1), {.send_bytes = 4096, .receive_bytes = 4096})));
    HostRings rings(m);
    const hyperv_fake::Bytes payload(1000);
    const auto bytes = std::as_bytes(std::span(payload));
    const hyperv_fake::Bytes longer_payload(1040);
    const auto longer = std::as_bytes(std::span(longer_payload));
    const hyperv_fake::Bytes whole_ring(4096);
    for (u32 i = 0; i < 3; ++i) {
        EXPECT_EQ(channel.send_inband(bytes, i), Sent::queued);
    }
    EXPECT_EQ(channel.send_inband(longer, 3), Sent::full);
    EXPECT_EQ(HostRings::word(rings.out, 12), 1040u + 24) << "pending_send_sz: the whole packet";
    static_cast<void>(channel.publish());
    HostRings::word(rings.out, 4) = 1024;
    EXPECT_EQ(channel.send_inband(longer, 3), Sent::queued);
    EXPECT_EQ(HostRings::word(rings.out, 12), 0u);
    EXPECT_EQ(channel.send_inband(std::as_bytes(std::span(whole_ring)), 4), Sent::too_long);
    EXPECT_EQ(channel.counters().full, 1u);
    HostRings::word(rings.out, 4) = 4095; // neither before nor after the written data
    EXPECT_EQ(channel.send_inband(bytes, 5), Sent::broken);
    ASSERT_TRUE(channel.broken());
    EXPECT_EQ(channel.broken()->code, Code::protocol);
}

TEST(VmbusChannel, SignalsByMonitorPageAndInterruptPage) {
    hyperv_fake::Machine m;
    m.host.offers[0].relid = 70;
    m.host.offers[0].monitor = 37;
    ASSERT_TRUE(m.up());
    const auto payload = le64(1);
    {
        Channel channel;
        ASSERT_TRUE(m.executor.run(m.bus().open(channel, *m.bus().find(70), {})));
        EXPECT_EQ(channel.send_inband(std::as_bytes(std::span(payload)), 1), Sent::queued);
        EXPECT_TRUE(channel.publish());
        EXPECT_TRUE(m.host.signals.empty()) << "no hypercall";
        EXPECT_EQ(*reinterpret_cast<u32*>(m.host.monitor_page_to_host + 8 + 8), 1u << 5) << "group 1, bit 5";
        ASSERT_TRUE(m.executor.run(m.bus().close(channel)));
        ASSERT_TRUE(m.executor.run(m.bus().open(channel, *m.bus().find(70), {.may_defer = false})));
        EXPECT_EQ(channel.send_inband(std::as_bytes(std::span(payload)), 1), Sent::queued);
        EXPECT_TRUE(channel.publish());
        EXPECT_EQ(m.host.signals.size(), 1u);
        ASSERT_TRUE(m.executor.run(m.bus().close(channel)));
    }
    // The oldest version: one connection for all channels, and a bit in the page.
    hyperv_fake::Machine old;
    old.host.newest = 0x0000000d;
    old.host.offers[0].relid = 70;
    ASSERT_TRUE(old.up());
    Channel channel;
    ASSERT_TRUE(old.executor.run(old.bus().open(channel, *old.bus().find(70), {})));
    EXPECT_EQ(channel.send_inband(std::as_bytes(std::span(payload)), 1), Sent::queued);
    EXPECT_TRUE(channel.publish());
    EXPECT_EQ(old.host.signals, std::vector<u64>{2});
    EXPECT_EQ(reinterpret_cast<u8*>(old.host.interrupt_page)[2048 + 70 / 8], 1 << 70 % 8);
    old.host.raise(70);
    EXPECT_EQ(channel.interrupts(), 1u) << "by the interrupt page";
}

TEST(VmbusChannel, AnInboxWakesItsReader) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.up());
    Channel channel;
    ASSERT_TRUE(m.executor.run(m.bus().open(channel, *m.bus().find(1), {.send_bytes = 4096, .receive_bytes = 4096})));
    HostRings rings(m);
    Inbox inbox(channel, m.executor);
    struct Reader {
        static io::Task<Result<void>> read(Channel& from, Inbox& waiting, io::Executor& executor, u32& packets) {
            for (;;) {
                if (!co_await waiting.wait({executor, 50'000'000})) {
                    co_return Result<void>{};
                }
                Packet packet;
                for (;;) {
                    auto got = from.receive(packet);
                    if (!got) {
                        co_return got.error();
                    }
                    if (!*got) {
                        break;
                    }
                    ++packets;
                    if (from.send_completion({}, packet.transaction) != Sent::queued) {
                        co_return Error{Code::io, "no room"};
                    }
                    waiting.touch();
                }
                from.release();
            }
        }
    };
    static u32 written;
    written = 0;
    static HostRings* r;
    r = &rings;
    m.clock.on_idle = [](void* c) {
        auto& machine = *static_cast<hyperv_fake::Machine*>(c);
        if (written < 5) {
            ++written;
            r->write(hyperv_fake::hex("06 00 02 00 02 00 01 00 34 12 00 00 00 00 00 00 00 00 00 00 00 00 00 00"));
            machine.host.raise(1);
        }
    };
    u32 packets = 0;
    ASSERT_TRUE(m.executor.run(Reader::read(channel, inbox, m.executor, packets)));
    EXPECT_EQ(packets, 5u);
    EXPECT_EQ(HostRings::word(rings.out, 0), 5u * 24) << "published at the end of the turn";
}

} // namespace
