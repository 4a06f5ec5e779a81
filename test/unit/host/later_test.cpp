// A host that answers later: the order of transfers, the delays, and the storage provider above a medium whose
// transfers end when the test says so.
#include "gtest_macros.hpp"

#include "zeroed.hpp"
#include <cerrno>
#include <cstdlib>
#include <sys/resource.h>
#include <unistd.h>

import test.gtest;
import host.std;
import core.result;
import host.latency;
import host.transfers;
import host.vmbus;
import host.storvsp;
import host.services;
import vmm.bus;
import vmm.image;
import vmm.media;

#include "guest.hpp"

namespace {

using namespace typed;
using fl::Code;
using fl::host::DelayQueue;
using fl::host::Latency;
using fl::host::Transfer;
using fl::host::Transfers;

constexpr u64 buffer = 0x100200;

// ---- latency ----

std::optional<Latency> parsed(std::string_view text, u64 seed = 1) {
    std::string wrong;
    auto latency = Latency::parse(text, seed, wrong);
    EXPECT_EQ(wrong.empty(), latency.has_value()) << text;
    EXPECT_TRUE(latency || wrong.ends_with("was expected, not '" + std::string(text) + "'")) << wrong;
    return latency;
}

TEST(HostLatency, ReadsTimes) {
    EXPECT_EQ(parsed("1ns")->draw(), 1u);
    EXPECT_EQ(parsed("100us")->draw(), 100'000u);
    EXPECT_EQ(parsed("3ms")->draw(), 3'000'000u);
    EXPECT_EQ(parsed("10s")->draw(), 10'000'000'000u);
    EXPECT_EQ(parsed("exp:100us")->shape(), Latency::Shape::exponential);
    EXPECT_EQ(parsed("uniform:50us..1ms")->first(), 50'000u);
    EXPECT_EQ(parsed("uniform:50us..1ms")->last(), 1'000'000u);
    for (const char* text : {"", "us", "100", "0us", "-1us", "100 us", "100usx", "11s", "18446744073709551615s", "exp:",
                             "exp:0us", "uniform:50us", "uniform:50us..", "uniform:2us..1us", "normal:1us", "1.5us"}) {
        EXPECT_FALSE(parsed(text)) << text;
    }
}

TEST(HostLatency, DrawsWithinItsBoundsAndAroundItsMean) {
    auto uniform = parsed("uniform:50us..150us");
    auto exponential = parsed("exp:100us");
    u64 least = ~u64{0};
    u64 most = 0;
    u64 sum = 0;
    u64 exponential_sum = 0;
    u32 above = 0;
    constexpr u32 draws = 20'000;
    for (u32 i = 0; i < draws; ++i) {
        const u64 one = uniform->draw();
        least = std::min(least, one);
        most = std::max(most, one);
        sum += one;
        const u64 other = exponential->draw();
        EXPECT_LE(other, 2'000'000u);
        exponential_sum += other;
        above += other > 100'000;
    }
    EXPECT_GE(least, 50'000u);
    EXPECT_LT(least, 51'000u);
    EXPECT_LE(most, 150'000u);
    EXPECT_GT(most, 149'000u);
    EXPECT_NEAR(static_cast<double>(sum) / draws, 100'000, 1'000);
    EXPECT_NEAR(static_cast<double>(exponential_sum) / draws, 100'000, 3'000);
    EXPECT_NEAR(static_cast<double>(above) / draws, 0.3679, 0.015); // 1/e of them are above the mean
}

TEST(HostLatency, ASeedGivesTheSameDraws) {
    for (const char* text : {"exp:100us", "uniform:1us..1ms"}) {
        auto one = parsed(text, 7);
        auto same = parsed(text, 7);
        auto other = parsed(text, 8);
        u32 equal = 0;
        for (u32 i = 0; i < 100; ++i) {
            const u64 drawn = one->draw();
            EXPECT_EQ(drawn, same->draw());
            equal += drawn == other->draw();
        }
        EXPECT_LT(equal, 5u);
    }
}

TEST(HostDelayQueue, GivesWhatIsDueInOrder) {
    DelayQueue<int> queue;
    EXPECT_EQ(queue.next(), ~u64{0});
    EXPECT_FALSE(queue.pop(~u64{0}));
    queue.push(30, 1);
    queue.push(10, 2);
    queue.push(30, 3);
    queue.push(20, 4);
    EXPECT_EQ(queue.next(), 10u);
    EXPECT_FALSE(queue.pop(9));
    EXPECT_EQ(queue.pop(10), 2);
    EXPECT_FALSE(queue.pop(10));
    EXPECT_EQ(queue.pop(100), 4);
    EXPECT_EQ(queue.pop(100), 1); // of equal times the one put in first
    EXPECT_EQ(queue.pop(100), 3);
    EXPECT_TRUE(queue.empty());
    queue.push(50, 1);
    queue.push(40, 2);
    queue.push(50, 3);
    queue.hasten();
    EXPECT_EQ(queue.next(), 0u);
    EXPECT_EQ(queue.pop(0), 2);
    EXPECT_EQ(queue.pop(0), 1);
    EXPECT_EQ(queue.pop(0), 3);
    EXPECT_EQ(queue.size(), 0u);
}

// ---- transfers ----

/// Begins transfers, and ends them when the test says so. Its clock moves by a millisecond with every wait.
class HeldMedium final : public fl::host::Medium {
  public:
    struct Step {
        Transfer* transfer;
        bool sync;
        fl::host::MediumEvents* events;
    };
    u64 now() override { return time; }
    void start(Transfer& transfer, bool sync, fl::host::MediumEvents& events) override {
        steps.push_back({&transfer, sync, &events});
        ++started;
    }
    void wait(u64 deadline) override {
        time = std::min(deadline, time + 1'000'000);
        if (ends_in_wait && !steps.empty()) {
            end(0);
        }
    }
    /// The bytes move at the end: a transfer that has not ended has not happened.
    void end(usize which, bool good = true) {
        const Step step = steps[which];
        steps.erase(steps.begin() + static_cast<std::ptrdiff_t>(which));
        u64 at = step.transfer->offset;
        for (const auto& piece : step.transfer->pieces) {
            if (!step.sync && good) {
                static_cast<void>(step.transfer->kind == Transfer::Kind::write ? step.transfer->store->write(at, piece)
                                                                               : step.transfer->store->read(at, piece));
            }
            at += piece.size();
        }
        step.events->done(*step.transfer, good);
    }
    std::vector<Step> steps;
    u64 time = 1'000'000'000;
    u32 started = 0;
    bool ends_in_wait = false;
};

struct OrderedTransfers : testing::Test {
    HeldMedium medium;
    Transfers transfers{medium};
    std::array<std::byte, 4096> bytes{};
    fl::host::MemoryStore store{bytes};
    fl::host::MemoryStore other{bytes};
    static inline std::vector<Transfer*> over;
    OrderedTransfers() { over.clear(); }
    Transfer make(Transfer::Kind kind, bool durable = false, fl::host::BlockStore* on = nullptr) {
        Transfer transfer;
        transfer.kind = kind;
        transfer.durable = durable;
        transfer.store = on != nullptr ? on : &store;
        transfer.ended = [](Transfer& one) { over.push_back(&one); };
        return transfer;
    }
};

TEST_F(OrderedTransfers, AFlushWaitsForTheWritesBeforeIt) {
    Transfer first = make(Transfer::Kind::write);
    Transfer second = make(Transfer::Kind::write);
    Transfer elsewhere = make(Transfer::Kind::write, false, &other);
    Transfer reads = make(Transfer::Kind::read);
    Transfer flush = make(Transfer::Kind::flush);
    Transfer after = make(Transfer::Kind::write);
    for (Transfer* one : {&first, &second, &elsewhere, &reads, &flush, &after}) {
        transfers.start(*one);
    }
    EXPECT_EQ(medium.started, 5u); // the flush has not begun
    EXPECT_EQ(transfers.waited(), 1u);
    EXPECT_EQ(transfers.in_flight(), 6u);
    medium.end(1); // the second write
    EXPECT_EQ(medium.started, 5u);
    medium.end(0);
    ASSERT_EQ(medium.started, 6u); // neither the other store, nor a read, nor a later write holds it up
    EXPECT_EQ(medium.steps.back().transfer, &flush);
    EXPECT_TRUE(medium.steps.back().sync);
    medium.end(medium.steps.size() - 1);
    EXPECT_EQ(over, (std::vector<Transfer*>{&second, &first, &flush}));
    EXPECT_TRUE(flush.good);
    while (!medium.steps.empty()) {
        medium.end(0);
    }
    EXPECT_EQ(transfers.in_flight(), 0u);
}

TEST_F(OrderedTransfers, AFlushAfterAFailedWriteIsStillDone) {
    Transfer write = make(Transfer::Kind::write);
    Transfer flush = make(Transfer::Kind::flush);
    transfers.start(write);
    transfers.start(flush);
    medium.end(0, false);
    EXPECT_FALSE(write.good);
    ASSERT_EQ(medium.steps.size(), 1u);
    medium.end(0, false);
    EXPECT_EQ(over, (std::vector<Transfer*>{&write, &flush}));
    EXPECT_FALSE(flush.good);
}

TEST_F(OrderedTransfers, ADurableWriteEndsWhenItIsSafe) {
    Transfer write = make(Transfer::Kind::write, true);
    Transfer flush = make(Transfer::Kind::flush);
    transfers.start(write);
    transfers.start(flush);
    EXPECT_FALSE(medium.steps[0].sync);
    medium.end(0);
    EXPECT_TRUE(over.empty());
    ASSERT_EQ(medium.steps.size(), 1u);
    EXPECT_TRUE(medium.steps[0].sync);
    EXPECT_EQ(medium.steps[0].transfer, &write);
    medium.end(0);
    EXPECT_EQ(over, (std::vector<Transfer*>{&write}));
    EXPECT_TRUE(write.good);
    ASSERT_EQ(medium.steps.size(), 1u);
    EXPECT_EQ(medium.steps[0].transfer, &flush);
    medium.end(0);
    Transfer failed = make(Transfer::Kind::write, true);
    transfers.start(failed);
    medium.end(0, false); // there is nothing to make safe
    EXPECT_TRUE(medium.steps.empty());
    EXPECT_FALSE(failed.good);
}

TEST_F(OrderedTransfers, DrainingIsBounded) {
    Transfer one = make(Transfer::Kind::read);
    Transfer two = make(Transfer::Kind::write);
    Transfer flush = make(Transfer::Kind::flush);
    for (Transfer* each : {&one, &two, &flush}) {
        transfers.start(*each);
    }
    const u64 begin = medium.time;
    EXPECT_FALSE(transfers.drain([](const Transfer&) { return true; }, 5'000'000));
    EXPECT_EQ(medium.time, begin + 5'000'000);
    EXPECT_TRUE(transfers.drain([](const Transfer&) { return false; }, 5'000'000));
    EXPECT_EQ(medium.time, begin + 5'000'000);
    medium.ends_in_wait = true;
    EXPECT_TRUE(transfers.drain([&](const Transfer& each) { return &each == &one; }, 5'000'000));
    EXPECT_EQ(over, (std::vector<Transfer*>{&one}));
    EXPECT_TRUE(transfers.drain([](const Transfer&) { return true; }, 5'000'000)); // the flush that waits, too
    EXPECT_EQ(transfers.in_flight(), 0u);
}

// ---- the storage provider ----

struct LaterHost {
    HeldMedium medium;
    Transfers transfers{medium};
    Guest guest;
    Rings rings;
    u32 channel = 0;
    explicit LaterHost(Latency* latency = nullptr) {
        fl::host::StorageConfig config;
        config.transfers = &transfers;
        config.latency = latency;
        guest.now = medium.time;
        channel = guest.start(rings, 0x0600, {}, config);
    }
    void poll() {
        guest.now = medium.time;
        guest.poll();
    }
    void read(u64 transaction, u64 lba) {
        rings.send(9, transaction, Guest::srb(Guest::read_16(lba, 1), 1, 512), Guest::range(at(lba), 512));
    }
    void write(u64 transaction, u64 lba) {
        rings.send(9, transaction, Guest::srb(Guest::read_16(lba, 1, true), 0, 512), Guest::range(at(lba), 512));
    }
    void flush(u64 transaction) { rings.send(6, transaction, Guest::srb({0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 2, 0)); }
    static u64 at(u64 lba) { return buffer + lba * 512; }
    u64 next() {
        const auto answer = rings.receive();
        if (answer) {
            last = Guest::parse(*answer);
        }
        return answer ? answer->transaction : 0;
    }
    Guest::Answer last;
};

TEST(HostLater, AnswersInTheOrderInWhichTransfersEnd) {
    LaterHost host;
    for (u64 i = 0; i < 3; ++i) {
        host.read(100 + i, i);
    }
    // does not access the medium
    host.rings.send(9, 103, Guest::srb({0x12, 0, 0, 0, 36, 0}, 1, 36), Guest::range(buffer + 4096, 36));
    host.guest.signal(host.channel);
    EXPECT_EQ(host.rings.read_index(false), host.rings.write_index(false)); // all were taken
    EXPECT_EQ(host.next(), 103u);
    EXPECT_EQ(host.next(), 0u);
    ASSERT_EQ(host.medium.steps.size(), 3u);
    host.medium.end(1);
    host.poll();
    EXPECT_EQ(host.next(), 101u);
    EXPECT_EQ(host.last.srb_status, 1);
    EXPECT_EQ(host.last.transferred, 512u);
    EXPECT_EQ(std::memcmp(&host.guest.ram[LaterHost::at(1)], &host.guest.disk[512], 512), 0);
    EXPECT_EQ(host.next(), 0u);
    const u64 interrupts = host.guest.server->counters().interrupts_out;
    host.medium.end(1);
    host.medium.end(0, false);
    host.poll();
    EXPECT_EQ(host.next(), 102u);
    EXPECT_EQ(host.next(), 100u);
    EXPECT_EQ(host.last.scsi_status, 2);
    EXPECT_EQ(host.last.sense[2], 3);                                        // medium error
    EXPECT_EQ(host.last.sense[12], 0x11);                                    // unrecovered read error
    EXPECT_EQ(host.guest.server->counters().interrupts_out, interrupts + 1); // one for both
    EXPECT_EQ(host.guest.server->counters().later, 3u);
    EXPECT_EQ(host.guest.violations(), 0u);
}

TEST(HostLater, AFlushIsAnsweredAfterTheWritesBeforeIt) {
    LaterHost host;
    host.guest.ram[LaterHost::at(3)] = 0x5a;
    host.write(200, 3);
    host.flush(201);
    host.guest.signal(host.channel);
    ASSERT_EQ(host.medium.steps.size(), 1u);
    EXPECT_NE(host.guest.disk[3 * 512], std::byte{0x5a});
    host.medium.end(0);
    EXPECT_EQ(host.guest.disk[3 * 512], std::byte{0x5a});
    host.poll();
    EXPECT_EQ(host.next(), 200u);
    EXPECT_EQ(host.next(), 0u);
    ASSERT_EQ(host.medium.steps.size(), 1u);
    EXPECT_TRUE(host.medium.steps[0].sync);
    host.medium.end(0);
    host.poll();
    EXPECT_EQ(host.next(), 201u);
    EXPECT_EQ(host.last.srb_status, 1);
}

TEST(HostLater, AForcedWriteIsMadeSafe) {
    LaterHost host;
    Bytes cdb = Guest::read_16(1, 1, true);
    cdb[1] = 0x08; // force unit access
    host.rings.send(9, 210, Guest::srb(cdb, 0, 512), Guest::range(buffer, 512));
    host.guest.signal(host.channel);
    host.medium.end(0);
    host.poll();
    EXPECT_EQ(host.next(), 0u);
    ASSERT_EQ(host.medium.steps.size(), 1u);
    EXPECT_TRUE(host.medium.steps[0].sync);
    host.medium.end(0, false);
    host.poll();
    EXPECT_EQ(host.next(), 210u);
    EXPECT_EQ(host.last.sense[2], 3);
    EXPECT_EQ(host.last.sense[12], 0x0c); // write error
}

Bytes bus_reset() {
    Bytes packet;
    put(packet, u32{6}); // RESET_BUS
    put(packet, u32{1});
    packet.resize(64);
    return packet;
}

TEST(HostLater, AResetAnswersAllRequestsFirst) {
    auto slow = parsed("1ms");
    LaterHost host(&*slow);
    host.medium.ends_in_wait = true;
    host.read(300, 0);
    host.write(301, 1);
    host.guest.signal(host.channel);
    EXPECT_EQ(host.next(), 0u);
    host.rings.send(6, 302, Guest::srb({}, 2, 0));
    host.rings.send(6, 303, bus_reset());
    host.guest.signal(host.channel);
    EXPECT_EQ(host.medium.steps.size(), 0u);
    EXPECT_EQ(host.next(), 302u); // TEST UNIT READY, which was before the reset
    EXPECT_EQ(host.next(), 300u);
    EXPECT_EQ(host.last.srb_status, 1);
    EXPECT_EQ(host.next(), 301u);
    EXPECT_EQ(host.next(), 303u);
    EXPECT_EQ(host.last.status, 0u);
    EXPECT_EQ(host.next(), 0u);
}

TEST(HostLater, AResetsAnswerHasRoomInAFullRing) {
    auto slow = parsed("10s");
    LaterHost host(&*slow);
    host.medium.ends_in_wait = true;
    // More answers than the host's ring of three pages takes, each of 88 bytes.
    u64 transaction = 1000;
    for (u32 batch = 0; batch < 10; ++batch) {
        for (u32 i = 0; i < 20; ++i) {
            host.read(transaction++, i);
        }
        host.guest.signal(host.channel);
        while (!host.medium.steps.empty()) {
            host.medium.end(0);
        }
    }
    EXPECT_EQ(host.next(), 0u);
    host.rings.send(6, 999, bus_reset());
    host.guest.signal(host.channel);
    std::vector<u64> seen;
    for (u32 tries = 0; tries < 4; ++tries) {
        for (u64 one = host.next(); one != 0; one = host.next()) {
            seen.push_back(one);
        }
        host.guest.signal(host.channel); // there is room
    }
    EXPECT_EQ(seen.size(), 201u);
    EXPECT_EQ(std::ranges::count(seen, 999u), 1);
    EXPECT_NE(seen.back(), 999u); // the others did not fit
}

TEST(HostLater, AResetThatCannotEndTheRequestsSaysSoWithinABound) {
    LaterHost host;
    host.read(310, 0);
    host.guest.signal(host.channel);
    const u64 begin = host.medium.time;
    host.rings.send(6, 311, bus_reset());
    host.guest.signal(host.channel);
    EXPECT_EQ(host.medium.time, begin + 10'000'000'000);
    EXPECT_EQ(host.next(), 311u);
    EXPECT_EQ(host.last.status, 0xc0000185u);
    host.medium.end(0); // still answered
    host.poll();
    EXPECT_EQ(host.next(), 310u);
}

TEST(HostLater, AClosedChannelHasNoTransfersLeft) {
    for (const bool hangs : {false, true}) {
        LaterHost host;
        host.medium.ends_in_wait = !hangs;
        host.read(400, 0);
        host.read(401, 1);
        host.guest.signal(host.channel);
        EXPECT_EQ(host.medium.steps.size(), 2u);
        const u64 begin = host.medium.time;
        Bytes close = message(7);
        put(close, host.channel);
        host.guest.post(close);
        EXPECT_EQ(host.medium.steps.size(), hangs ? 2u : 0u);
        EXPECT_EQ(host.medium.time, begin + (hangs ? 10'000'000'000 : 2'000'000));
        while (!host.medium.steps.empty()) {
            host.medium.end(0); // the channel is gone: there is nobody to answer
        }
        host.poll();
        EXPECT_EQ(host.next(), 0u);
        EXPECT_EQ(host.transfers.in_flight(), 0u);
        EXPECT_EQ(host.guest.violations(), 0u);
    }
}

TEST(HostLater, ARemovedLunHasNoTransfersLeft) {
    HeldMedium medium;
    Transfers transfers(medium);
    Guest guest;
    Rings rings;
    fl::host::StorageConfig config;
    config.transfers = &transfers;
    auto& device = guest.add_disk(config);
    ASSERT_TRUE(guest.connect());
    const u32 channel = Guest::relid(guest.request_offers().at(0));
    guest.take();
    ASSERT_TRUE(guest.open(channel, rings));
    ASSERT_TRUE(guest.initialize(channel, rings));
    rings.send(9, 500, Guest::srb(Guest::read_16(0, 1), 1, 512), Guest::range(buffer, 512));
    guest.signal(channel);
    ASSERT_EQ(medium.steps.size(), 1u);
    medium.ends_in_wait = true;
    EXPECT_TRUE(device.remove_lun(0));
    EXPECT_TRUE(medium.steps.empty());
    guest.poll();
    EXPECT_EQ(rings.receive()->transaction, 500u); // it was done, and says so
    medium.ends_in_wait = false;
    rings.send(9, 501, Guest::srb(Guest::read_16(0, 1), 1, 512), Guest::range(buffer, 512));
    guest.signal(channel);
    EXPECT_TRUE(medium.steps.empty());
}

TEST(HostLater, ALatencyIsTheLeastTimeOfAnAnswer) {
    auto slow = parsed("100us");
    LaterHost host(&*slow);
    const u64 begin = host.medium.time;
    host.read(600, 0);
    host.guest.signal(host.channel);
    host.medium.end(0);
    host.poll();
    EXPECT_EQ(host.next(), 0u);
    EXPECT_EQ(host.guest.server->deadline(), begin + 100'000);
    host.medium.time = begin + 99'999;
    host.poll();
    EXPECT_EQ(host.next(), 0u);
    host.medium.time = begin + 100'000;
    host.poll();
    EXPECT_EQ(host.next(), 600u);
    EXPECT_EQ(host.guest.server->deadline(), ~u64{0});
    // a transfer that takes longer is answered when it ends
    host.read(601, 0);
    host.guest.signal(host.channel);
    host.medium.time += 500'000;
    host.poll();
    EXPECT_EQ(host.next(), 0u);
    host.medium.end(0);
    host.poll();
    EXPECT_EQ(host.next(), 601u);
}

TEST(HostLater, ADrawnLatencyReordersReadsButAFlushDoesNotOvertakeAWrite) {
    auto slow = parsed("uniform:1us..1ms", 3);
    auto same = parsed("uniform:1us..1ms", 3);
    LaterHost host(&*slow);
    constexpr u64 count = 8;
    std::multimap<u64, u64> expected; // transactions, by when they are due
    u64 written = 0;
    for (u64 i = 0; i < count; ++i) {
        host.write(700 + i, i);
        const u64 due = same->draw();
        written = std::max(written, due);
        expected.emplace(due, 700 + i);
    }
    host.flush(799);
    expected.emplace(std::max(written, same->draw()), 799);
    const u64 begin = host.medium.time;
    host.guest.signal(host.channel);
    while (!host.medium.steps.empty()) {
        host.medium.end(0);
    }
    EXPECT_EQ(expected.rbegin()->second, 799u);
    u64 earlier = 0;
    u32 overtaken = 0;
    for (const auto& [due, transaction] : expected) {
        overtaken += transaction < std::exchange(earlier, transaction);
    }
    EXPECT_GE(overtaken, 2u); // this seed does reorder
    for (const auto& [due, transaction] : expected) {
        host.medium.time = begin + due - 1;
        host.poll();
        if (transaction != 799) { // it may be due with the last write
            EXPECT_EQ(host.next(), 0u);
        }
        host.medium.time = begin + due;
        host.poll();
        EXPECT_EQ(host.next(), transaction);
    }
    EXPECT_EQ(host.next(), 0u);
}

// ---- the VMM's media ----

struct Recorded final : fl::host::MediumEvents {
    std::vector<std::pair<Transfer*, bool>> over;
    void done(Transfer& transfer, bool good) override { over.emplace_back(&transfer, good); }
};

/// An image of 64 KiB, byte n is n * 7 / 256.
struct ImageFile {
    std::string path = "/tmp/firstlight-later-XXXXXX";
    std::unique_ptr<fl::vmm::Image> image;
    std::optional<fl::vmm::ImageStore> store;
    static constexpr usize size = 65536;
    ImageFile() {
        const int file = mkstemp(path.data());
        std::vector<char> bytes(size);
        for (usize i = 0; i < size; ++i) {
            bytes[i] = static_cast<char>(i * 7 / 256);
        }
        EXPECT_EQ(write(file, bytes.data(), size), static_cast<ssize_t>(size));
        close(file);
        auto opened = fl::vmm::Image::open(path, false);
        EXPECT_TRUE(opened);
        image = *std::move(opened);
        store.emplace(*image, false);
    }
    ~ImageFile() { unlink(path.c_str()); }
};

/// More pieces than one call takes, read and written, in every medium.
void test_medium(fl::host::Medium& medium) {
    ImageFile file;
    Recorded events;
    const auto finish = [&](usize count) {
        for (u32 tries = 0; events.over.size() < count && tries < 100; ++tries) {
            medium.submit();
            medium.wait(medium.now() + 100'000'000);
        }
        ASSERT_EQ(events.over.size(), count);
    };
    std::vector<std::byte> memory(file.size);
    Transfer read;
    read.kind = Transfer::Kind::read;
    read.store = &*file.store;
    read.offset = 512;
    for (usize i = 0; i < 3000; ++i) {
        read.pieces.push_back(std::span(memory).subspan(i * 16, 16));
    }
    medium.start(read, false, events);
    finish(1);
    EXPECT_TRUE(events.over[0].second);
    EXPECT_EQ(std::memcmp(memory.data(), file.image->bytes().data() + 512, 48000), 0);
    // Beyond the end of the file there is nothing.
    Transfer beyond = read;
    beyond.offset = file.size - 512;
    medium.start(beyond, false, events);
    finish(2);
    EXPECT_FALSE(events.over[1].second);
    // More at once than the submission queue has entries.
    std::ranges::fill(memory, std::byte{0xa5});
    std::vector<Transfer> writes(600);
    for (usize i = 0; i < writes.size(); ++i) {
        writes[i].kind = Transfer::Kind::write;
        writes[i].store = &*file.store;
        writes[i].offset = i * 64;
        writes[i].pieces = {std::span(memory).subspan(i * 64, 64)};
        medium.start(writes[i], false, events);
    }
    finish(602);
    Transfer flush;
    flush.kind = Transfer::Kind::flush;
    flush.store = &*file.store;
    medium.start(flush, true, events);
    finish(603);
    EXPECT_TRUE(std::ranges::all_of(std::span(events.over).subspan(2), [](const auto& one) { return one.second; }));
    EXPECT_EQ(std::memcmp(file.image->bytes().data(), memory.data(), 600 * 64), 0);
    EXPECT_EQ(file.image->bytes()[600 * 64], static_cast<std::byte>(600 * 64 * 7 / 256));
}

TEST(HostMedia, BlockingReadsAndWrites) {
    fl::vmm::BlockingMedium medium;
    test_medium(medium);
}

TEST(HostMedia, UringReadsAndWrites) {
    auto medium = fl::vmm::UringMedium::create();
    if (!medium) {
        ASSERT_EQ(medium.error().code, Code::not_supported); // by this machine; the boots in the lab have it
        GTEST_SKIP() << medium.error().message;
    }
    test_medium(**medium);
    // Nothing is in flight: waiting ends at once.
    const u64 begin = (*medium)->now();
    (*medium)->wait(begin + 5'000'000'000);
    EXPECT_LT((*medium)->now() - begin, 1'000'000'000u);
}

TEST(HostMedia, WithoutUringThereIsAnErrorAndNoOtherMedium) {
    rlimit before{};
    ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
    const rlimit none{0, before.rlim_max};
    ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
    const auto medium = fl::vmm::UringMedium::create();
    ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
    ASSERT_FALSE(medium);
    if (medium.error().code != Code::not_supported) { // this machine has it, and no descriptor for it
        EXPECT_EQ(medium.error().code, Code::io);
        EXPECT_EQ(medium.error().seen, static_cast<u64>(EMFILE));
    }
    EXPECT_TRUE(medium.error().message.starts_with("io_uring is not available here: io_uring_setup failed"));
}

} // namespace
