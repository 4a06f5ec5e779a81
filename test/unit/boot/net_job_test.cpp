// job=net on two cards with a fake wire: each end is the kernel's own job.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.dma;
import core.log;
import core.result;
import core.text;
import core.time;
import core.verdict;
import io.block;
import io.executor;
import io.net;
import io.net.ethernet;
import io.net.interface;
import io.net.ipv4;
import io.net.numbered;
import io.net.udp;
import io.net.wire;
import io.random;
import io.task;
import boot.jobs;
import boot.net_job;
import boot.nets;
import boot.options;
#include "unit/io/net/wire_fake.hpp"
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using fl::test::Bytes;

struct End {
    boot::Nets nets;
    boot::Options options;
    std::optional<boot::Outcome> outcome;
};

template <class T>
using Task = io::Task<T>;

struct NetJob : testing::Test {
    test::FakeMachine machine;
    io::Executor executor{machine.platform()};
    test::HeapDma dma;
    test::Wire wire{executor};
    test::Card card{executor, wire, 1};
    test::Card other_card{executor, wire, 2};
    test::CapturedLog log;
    End end;
    End other;

    NetJob() {
        end.nets.add(card);
        other.nets.add(other_card);
    }
    static Task<Result<void>> run_end(NetJob& t, End& end) {
        auto outcome = co_await boot::run_net(end.options, {.executor = t.executor,
                                                            .dma = t.dma,
                                                            .heap_allocations = [] { return u64{0}; },
                                                            .nets = &end.nets,
                                                            .seed = 5});
        if (!outcome) {
            co_return outcome.error();
        }
        end.outcome = *outcome;
        co_return Result<void>{};
    }
    static Task<Result<void>> run_both(NetJob& t) {
        io::TaskGroup group(t.executor);
        EXPECT_TRUE(group.spawn(run_end(t, t.end)));
        EXPECT_TRUE(group.spawn(run_end(t, t.other)));
        co_return co_await group.join();
    }
    static void parse(End& end, const std::string& words) {
        auto errors = std::make_unique<boot::OptionErrors>();
        EXPECT_TRUE(boot::parse_options(words, end.options, *errors)) << words;
        end.outcome.reset();
    }
    boot::Outcome run(const char* words) {
        kept_ = words;
        parse(end, kept_);
        EXPECT_TRUE(executor.run(run_end(*this, end)));
        return *end.outcome;
    }
    void run(const char* words, const char* others) {
        kept_ = words;
        kept_other_ = others;
        parse(end, kept_);
        parse(other, kept_other_);
        EXPECT_TRUE(executor.run(run_both(*this)));
    }
    // The value of a number in the last record of this kind.
    u64 field(std::string_view record, std::string_view key) const {
        const std::string text(log.text.view());
        const auto at = text.rfind("\"record\":\"" + std::string(record) + "\"");
        EXPECT_NE(at, std::string::npos) << record;
        const std::string name = "\"" + std::string(key) + "\":";
        const auto value = text.find(name, at);
        EXPECT_NE(value, std::string::npos) << key;
        return std::strtoull(text.c_str() + value + name.size(), nullptr, 10);
    }

  private:
    std::string kept_;
    std::string kept_other_;
};

TEST_F(NetJob, WithoutACard) {
    boot::Nets none;
    boot::Options options;
    boot::OptionErrors errors;
    ASSERT_TRUE(boot::parse_options("job=net", options, errors));
    const auto heap = [] { return u64{0}; };
    const auto outcome = executor.run(
        boot::run_net(options, {.executor = executor, .dma = dma, .heap_allocations = heap, .nets = &none}));
    ASSERT_TRUE(outcome);
    EXPECT_EQ(outcome->verdict, Verdict::error);
    EXPECT_EQ(outcome->reason, "no network card was found");
    EXPECT_EQ(run("job=net net=eth7").verdict, Verdict::error);
    EXPECT_EQ(end.outcome->reason, "net=eth7: no such network card; there are: eth0");
    EXPECT_TRUE(log.has("\"code\":\"not found\",\"message\":\"net=eth7"));
    card.close();
    EXPECT_EQ(run("job=net").reason, "all network cards are closed; there were: eth0");
}

TEST_F(NetJob, AStaticAddress) {
    const auto outcome = run("job=net net=eth0 address=10.0.0.1/24,gateway=10.0.0.254");
    EXPECT_EQ(outcome.verdict, Verdict::success) << outcome.reason.view();
    EXPECT_EQ(outcome.reason, "eth0 has 10.0.0.1");
    EXPECT_TRUE(
        log.has("\"record\":\"net_address\",\"net\":\"eth0\",\"source\":\"command line\",\"address\":\"10.0.0.1\","
                "\"mask\":\"255.255.255.0\",\"gateway\":\"10.0.0.254\"}"));
    EXPECT_EQ(field("net_counters", "arp_requests"), 4u) << "three probes, and the announcement";
}

TEST_F(NetJob, WithoutADhcpServerItFails) {
    const Instant begun = executor.now();
    const auto outcome = run("job=net");
    EXPECT_EQ(outcome.verdict, Verdict::failure);
    EXPECT_EQ(outcome.reason, "eth0: no DHCP server has answered within the bound");
    EXPECT_LT(executor.now() - begun, 61_s);
    EXPECT_TRUE(log.has("\"record\":\"net_counters\""));
}

TEST_F(NetJob, AnAddressInUse) {
    run("job=net address=10.0.0.1/24 udp=echo,port=9,seconds=3", "job=net address=10.0.0.1/24");
    EXPECT_EQ(end.outcome->verdict, Verdict::failure);
    EXPECT_EQ(end.outcome->reason, "eth0: the address is in use by another station of the network");
}

TEST_F(NetJob, Pings) {
    run("job=net address=10.0.0.1/24 ping=10.0.0.2,count=5",
        "job=net address=10.0.0.2/24 ping=10.0.0.1,count=2 udp=echo,port=7,seconds=2");
    EXPECT_EQ(end.outcome->verdict, Verdict::success) << end.outcome->reason.view();
    EXPECT_EQ(end.outcome->reason, "eth0 has 10.0.0.1, 5 of 5 pings answered");
    EXPECT_EQ(other.outcome->verdict, Verdict::failure);
    EXPECT_EQ(other.outcome->reason,
              "eth0 has 10.0.0.2, 2 of 2 pings answered, udp echo: 0 sent, 0 received: nothing was received");
    EXPECT_GT(field("ping", "min_ns"), 0u);
    EXPECT_LE(field("ping", "min_ns"), field("ping", "mean_ns"));
    EXPECT_LE(field("ping", "mean_ns"), field("ping", "max_ns"));
}

TEST_F(NetJob, PingsThatNobodyAnswers) {
    const auto outcome = run("job=net address=10.0.0.1/24 ping=10.0.0.9,count=2 timeout=1000");
    EXPECT_EQ(outcome.verdict, Verdict::failure);
    EXPECT_EQ(outcome.reason, "eth0 has 10.0.0.1, 0 of 2 pings answered");
    EXPECT_EQ(field("ping", "sent"), 2u);
    EXPECT_EQ(field("ping", "received"), 0u);
    EXPECT_EQ(field("ping", "min_ns"), 0u);
}

TEST_F(NetJob, EveryDatagramArrives) {
    run("job=net address=10.0.0.1/24 udp=send,to=10.0.0.2:5000,count=1000,bytes=200",
        "job=net address=10.0.0.2/24 udp=receive,port=5000,count=1000");
    EXPECT_EQ(end.outcome->verdict, Verdict::success) << end.outcome->reason.view();
    EXPECT_EQ(end.outcome->reason, "eth0 has 10.0.0.1, udp send: 1000 sent, 1000 received");
    EXPECT_EQ(other.outcome->verdict, Verdict::success) << other.outcome->reason.view();
    EXPECT_EQ(other.outcome->reason, "eth0 has 10.0.0.2, udp receive: 1000 sent, 1000 received");
    EXPECT_EQ(field("udp", "lost"), 0u);
    EXPECT_EQ(field("udp", "duplicated"), 0u);
    EXPECT_GT(field("udp", "pps"), 0u);
    EXPECT_TRUE(log.has("\"mode\":\"send\",\"bytes\":200,\"sent\":1000,\"received\":1000"));
}

TEST_F(NetJob, BothDirectionsAtOnce) {
    run("job=net address=10.0.0.1/24 udp=receive,port=5000 udp=send,to=10.0.0.2:5001,count=300,bytes=1472",
        "job=net address=10.0.0.2/24 udp=receive,port=5001 udp=send,to=10.0.0.1:5000,count=200");
    EXPECT_EQ(end.outcome->verdict, Verdict::success) << end.outcome->reason.view();
    EXPECT_EQ(end.outcome->reason,
              "eth0 has 10.0.0.1, udp receive: 200 sent, 200 received, udp send: 300 sent, 300 received");
    EXPECT_EQ(other.outcome->verdict, Verdict::success) << other.outcome->reason.view();
    EXPECT_EQ(other.outcome->reason,
              "eth0 has 10.0.0.2, udp receive: 300 sent, 300 received, udp send: 200 sent, 200 received");
}

TEST_F(NetJob, APortThatIsTaken) {
    const auto outcome = run("job=net address=10.0.0.1/24 udp=echo,port=7,seconds=1 udp=echo,port=7,seconds=1");
    EXPECT_EQ(outcome.verdict, Verdict::failure);
    EXPECT_NE(outcome.reason.view().find("another socket has this UDP port"), std::string_view::npos);
}

// What a run allocates does not depend on the number of datagrams.
TEST_F(NetJob, NothingIsAllocatedPerDatagram) {
    const auto allocations = [&](const char* count) {
        const std::string words = std::string("job=net address=10.0.0.1/24 udp=send,to=10.0.0.2:5000,count=") + count;
        run(words.c_str(), "job=net address=10.0.0.2/24 udp=receive,port=5000");
        const std::string text(log.text.view());
        const auto at = text.rfind("\"mode\":\"send\"");
        const auto value = text.find("\"allocations\":", at);
        return std::strtoull(text.c_str() + value + 14, nullptr, 10);
    };
    const u64 few = allocations("10");
    const u64 many = allocations("2000");
    EXPECT_EQ(few, many);
    EXPECT_LT(many, 20u);
}

TEST_F(NetJob, WhatIsLostIsAFailure) {
    wire.behaviour.drop = 5;
    wire.behaviour.duplicate = 5;
    run("job=net address=10.0.0.1/24 udp=send,to=10.0.0.2:5000,count=1000",
        "job=net address=10.0.0.2/24 udp=receive,port=5000");
    EXPECT_EQ(end.outcome->verdict, Verdict::failure) << end.outcome->reason.view();
    EXPECT_EQ(other.outcome->verdict, Verdict::failure) << other.outcome->reason.view();
    EXPECT_GT(field("udp", "duplicated"), 20u);
    const u64 lost = field("udp", "lost");
    EXPECT_GT(lost, 20u);
    EXPECT_EQ(field("udp", "received") + lost, 1000u);
}

TEST_F(NetJob, ARateIsKept) {
    run("job=net address=10.0.0.1/24 udp=send,to=10.0.0.2:5000,count=100,rate=50",
        "job=net address=10.0.0.2/24 udp=receive,port=5000");
    EXPECT_EQ(end.outcome->verdict, Verdict::success) << end.outcome->reason.view();
    EXPECT_GE(field("udp", "runtime_ns"), 1'900'000'000u);
    EXPECT_LE(field("udp", "runtime_ns"), 2'100'000'000u);
}

TEST_F(NetJob, NobodyReceives) {
    run("job=net address=10.0.0.1/24 udp=send,to=10.0.0.2:5000,count=10,rate=10",
        "job=net address=10.0.0.2/24 udp=receive,port=5001,seconds=30");
    EXPECT_EQ(end.outcome->verdict, Verdict::failure);
    EXPECT_EQ(other.outcome->verdict, Verdict::failure);
    EXPECT_EQ(other.outcome->reason,
              "eth0 has 10.0.0.2, udp receive: 0 sent, 0 received: the sender did not announce its "
              "end within 30 s after 0 datagrams");
    EXPECT_TRUE(log.has("error: eth0: not found: the host says that nobody receives on the port"));
    const auto alone = run("job=net address=10.0.0.1/24 udp=send,to=10.0.0.9:5000,count=10");
    EXPECT_EQ(alone.verdict, Verdict::failure);
    EXPECT_NE(alone.reason.view().find("no station answers for the address (ARP)"), std::string_view::npos)
        << alone.reason.view();
}

// The echo server replies to the sender, here a socket of the test.
TEST_F(NetJob, Echo) {
    struct Asker {
        static Task<Result<void>> run(NetJob& t, u32& answers) {
            const auto owned = std::make_unique<io::net::Interface>(t.other_card, 3); // too large for a frame
            io::net::Interface& interface = *owned;
            std::vector<std::byte> queue(1000);
            io::net::UdpSocket socket(interface, queue);
            EXPECT_TRUE(co_await interface.open());
            interface.configure({{{{10, 0, 0, 2}}, 24}, {}});
            EXPECT_TRUE(socket.bind());
            co_await t.executor.sleep(1_s);
            for (u32 i = 0; i < 20; ++i) {
                const Bytes data(i * 50, static_cast<std::byte>(i));
                EXPECT_TRUE(co_await socket.send_to({{{10, 0, 0, 1}}, 7}, data, 1_s));
                Bytes buffer(1000);
                const auto got = co_await socket.receive(buffer, 1_s);
                if (got && got->size == data.size() && std::equal(data.begin(), data.end(), buffer.begin())) {
                    ++answers;
                }
            }
            EXPECT_TRUE(co_await interface.close());
            co_return Result<void>{};
        }
        static Task<Result<void>> both(NetJob& t, u32& answers) {
            io::TaskGroup group(t.executor);
            EXPECT_TRUE(group.spawn(run_end(t, t.end)));
            EXPECT_TRUE(group.spawn(run(t, answers)));
            co_return co_await group.join();
        }
    };
    parse(end, "job=net address=10.0.0.1/24 udp=echo,port=7,seconds=3");
    u32 answers = 0;
    ASSERT_TRUE(executor.run(Asker::both(*this, answers)));
    EXPECT_EQ(answers, 20u);
    EXPECT_EQ(end.outcome->verdict, Verdict::success) << end.outcome->reason.view();
    EXPECT_EQ(end.outcome->reason, "eth0 has 10.0.0.1, udp echo: 20 sent, 20 received");
}

TEST_F(NetJob, ACardThatIsRemoved) {
    struct Remover {
        static Task<Result<void>> close(NetJob& t, test::Card& which) {
            co_await t.executor.sleep(2_s);
            which.close();
            co_return Result<void>{};
        }
        static Task<Result<void>> both(NetJob& t, End& end, test::Card& which) {
            io::TaskGroup group(t.executor);
            EXPECT_TRUE(group.spawn(run_end(t, end)));
            EXPECT_TRUE(group.spawn(close(t, which)));
            co_return co_await group.join();
        }
    };
    for (const char* words : {"job=net", "job=net address=10.0.0.1/24 udp=echo,port=7,seconds=3600",
                              "job=net address=10.0.0.1/24 udp=receive,port=7,seconds=3600",
                              "job=net address=10.0.0.1/24 udp=send,to=10.0.0.2:7,count=1000,rate=1"}) {
        test::Card fresh(executor, wire, 3);
        End one;
        one.nets.add(fresh);
        parse(one, words);
        const Instant begun = executor.now();
        ASSERT_TRUE(executor.run(Remover::both(*this, one, fresh)));
        EXPECT_EQ(one.outcome->verdict, Verdict::failure);
        EXPECT_NE(one.outcome->reason.view().find(": "), std::string_view::npos) << one.outcome->reason.view();
        EXPECT_LT(executor.now() - begun, 4_s) << words;
        wire.unplug(fresh);
    }
}

TEST(NetNumbered, DatagramsOfTheDocumentation) {
    io::net::NumberedHeader header;
    header.kind = to_underlying(io::net::NumberedKind::end);
    header.run = 0x0102030405060708;
    header.number = 9;
    header.total = 10;
    Bytes bytes(32);
    io::net::put(std::span(bytes), header);
    Bytes golden{};
    for (unsigned b : {'F', 'L', 'U', 'D'}) {
        golden.push_back(static_cast<std::byte>(b));
    }
    for (unsigned b : {0, 0, 0, 2, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 10}) {
        golden.push_back(static_cast<std::byte>(b));
    }
    EXPECT_EQ(bytes, golden);
    EXPECT_TRUE(io::net::parse_numbered(bytes));
    EXPECT_FALSE(io::net::parse_numbered(std::span(bytes).first(31)));
    bytes[7] = std::byte{4};
    EXPECT_FALSE(io::net::parse_numbered(bytes));
    bytes[7] = std::byte{0};
    EXPECT_FALSE(io::net::parse_numbered(bytes));
    bytes[7] = std::byte{1};
    bytes[0] = std::byte{1};
    EXPECT_FALSE(io::net::parse_numbered(bytes));
}

TEST(NetNumbered, Counts) {
    auto count = std::make_unique<io::net::NumberedCount>();
    for (u64 number : {0ull, 63ull, 64ull, 63ull, 1048575ull, 0ull, 0ull}) {
        EXPECT_TRUE(count->count(number));
    }
    EXPECT_FALSE(count->count(1048576));
    EXPECT_FALSE(count->count(~u64{0}));
    EXPECT_EQ(count->different(), 4u);
    EXPECT_EQ(count->duplicates(), 3u);
}

} // namespace
