#include "gtest_macros.hpp"

#include "zeroed.hpp"

import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.interrupt;
import core.processor;
import core.log;
import core.cpuid;
import io.executor;
import io.task;
import io.block;
import hv.xen;

#include "unit/io/support.hpp"

#include "unit/hv/xen_fake.hpp"

namespace {
using namespace fl;

struct XenStore : testing::Test {
    fake::Machine m;
    hv::xen::Store& store = m.guest.store();
    std::array<char, 4096> room{};

    void SetUp() override {
        ASSERT_TRUE(m.install());
        ASSERT_TRUE(m.start());
    }
    Result<std::string> read(std::string_view path) {
        auto value = m.run(store.read(path, room));
        if (!value) {
            return value.error();
        }
        return std::string(*value);
    }
};

TEST_F(XenStore, ReadsAndWrites) {
    m.xen.tree["/local/domain/1/name"] = "guest";
    EXPECT_EQ(*read("name"), "guest");
    EXPECT_EQ(read("nothing").error().code, Code::not_found);
    ASSERT_TRUE(m.run(store.write("data/x", "42")));
    EXPECT_EQ(m.xen.get("data/x"), "42");
    EXPECT_EQ(*m.run(store.number("data", "x")), 42u);
    EXPECT_EQ(*m.run(store.number_or("data", "y", 7)), 7u);
    ASSERT_TRUE(m.run(store.write("data/y", "4x")));
    EXPECT_EQ(*m.run(store.number_or("data", "y", 7)), 7u);
    EXPECT_EQ(m.run(store.number("data", "y")).error().code, Code::protocol);
    ASSERT_TRUE(m.run(store.remove("data/x")));
    EXPECT_EQ(m.run(store.remove("data/x")).error().code, Code::not_found);
}

// All of the protocol's errors [xenstore], and one that it does not define.
TEST_F(XenStore, ErrorsHaveCodes) {
    for (const auto& [name, code] : {std::pair("EINVAL", Code::bad_argument),
                                     {"EISDIR", Code::bad_argument},
                                     {"EACCES", Code::not_supported},
                                     {"EPERM", Code::not_supported},
                                     {"EROFS", Code::not_supported},
                                     {"ENOSYS", Code::not_supported},
                                     {"EOPNOTSUPP", Code::not_supported},
                                     {"EEXIST", Code::busy},
                                     {"EBUSY", Code::busy},
                                     {"EAGAIN", Code::busy},
                                     {"EISCONN", Code::busy},
                                     {"ENOTEMPTY", Code::busy},
                                     {"ENOENT", Code::not_found},
                                     {"ENOMEM", Code::exhausted},
                                     {"ENOSPC", Code::exhausted},
                                     {"EQUOTA", Code::exhausted},
                                     {"E2BIG", Code::exhausted},
                                     {"EIO", Code::io},
                                     {"EWHATEVER", Code::io},
                                     {"", Code::io}}) {
        m.xen.refuse_with = name;
        EXPECT_EQ(read("name").error().code, code) << name;
        EXPECT_EQ(m.run(store.write("name", "x")).error().code, code) << name;
        m.xen.refuse_with.reset();
    }
    EXPECT_EQ(read("name").error().code, Code::not_found) << "the store is still usable";
}

// 4096 bytes are the most that a message holds, in both directions.
TEST_F(XenStore, PayloadsUpToTheLimit) {
    const std::string most(4096 - sizeof "data/x", 'v'); // the path and its NUL are a part of the payload
    ASSERT_TRUE(m.run(store.write("data/x", most)));
    EXPECT_EQ(m.xen.get("data/x"), most);
    EXPECT_EQ(m.run(store.write("data/x", most + "v")).error().code, Code::bad_argument);
    EXPECT_EQ(m.xen.get("data/x"), most);
    std::vector<char> into(4096);
    m.xen.tree["/local/domain/1/data/x"] = std::string(4096, 'r');
    EXPECT_EQ(m.run(store.read("data/x", into))->size(), 4096u);
    EXPECT_EQ(m.run(store.read("data/x", std::span(into).first(4095))).error().code, Code::exhausted);
    EXPECT_EQ(read("nothing").error().code, Code::not_found) << "the store is still usable";
}

TEST_F(XenStore, LongMessagesGoThroughTheRingInPieces) {
    const std::string longest(4096 - 9, 'v'); // with "big/path" and its NUL
    ASSERT_TRUE(m.run(store.write("big/path", longest)));
    EXPECT_EQ(m.xen.get("big/path"), longest);
    EXPECT_EQ(*read("big/path"), longest);
    EXPECT_EQ(m.run(store.write("big/path1", longest)).error().code, Code::bad_argument);
    std::array<char, 10> little;
    EXPECT_EQ(m.run(store.read("big/path", little)).error().code, Code::exhausted);
    EXPECT_EQ(*read("big/path"), longest) << "and the stream continues";
}

io::Task<Result<void>> writer(hv::xen::Store& store, u32 n, u32& done) {
    for (u32 i = 0; i < 3; ++i) {
        FixedText<24> key;
        FixedText<8> value;
        print(key, "many/{}-{}", n, i);
        print(value, "{}", n * 10 + i);
        auto written = co_await store.write(key, value);
        if (!written) {
            co_return written;
        }
    }
    ++done;
    co_return Result<void>{};
}
io::Task<Result<void>> writers(io::Executor& executor, hv::xen::Store& store, u32& done) {
    io::TaskGroup group(executor);
    for (u32 n = 0; n < 8; ++n) {
        if (auto spawned = group.spawn(writer(store, n, done)); !spawned) {
            co_return spawned;
        }
    }
    co_return co_await group.join();
}

TEST_F(XenStore, ClientsQueue) {
    u32 done = 0;
    ASSERT_TRUE(m.run(writers(m.executor, store, done)));
    EXPECT_EQ(done, 8u);
    EXPECT_EQ(m.xen.get("many/7-2"), "72");
    EXPECT_EQ(m.xen.requests[11], 24u);
}

TEST_F(XenStore, TransactionsAreRepeatedABoundedNumberOfTimes) {
    const std::array<hv::xen::StoreEntry, 2> entries{
        {{FixedText<40>("a"), FixedText<24>("1")}, {FixedText<40>("b"), FixedText<24>("2")}}};
    m.xen.conflicts = 3;
    ASSERT_TRUE(m.run(store.write_all("d", entries)));
    EXPECT_EQ(m.xen.get("d/a") + m.xen.get("d/b"), "12");
    EXPECT_EQ(m.xen.requests[6], 4u);
    m.xen.conflicts = 1000;
    EXPECT_EQ(m.run(store.write_all("e", entries)).error().code, Code::busy);
    EXPECT_EQ(m.xen.get("e/a"), "");
    EXPECT_EQ(m.xen.requests[6], 4u + hv::xen::Store::transaction_tries);
}

TEST_F(XenStore, WatchesCoalesce) {
    int changes = 0;
    hv::xen::Watch watch;
    watch.path.write("control");
    watch.changed = [](void* c) { ++*static_cast<int*>(c); };
    watch.context = &changes;
    ASSERT_TRUE(m.run(store.watch(watch)));
    m.world.idle(m.world.now, std::atomic<bool>{false});
    static_cast<void>(read("x"));
    EXPECT_EQ(changes, 1) << "a new watch rings once";
    m.xen.set("control/shutdown", "poweroff");
    m.xen.set("elsewhere", "1");
    m.xen.message(15, 0, 0, std::string("control\0firstlight-999\0", 23)); // of a removed watch
    m.xen.message(15, 0, 0, std::string("control\0other\0", 14));
    static_cast<void>(read("x"));
    static_cast<void>(read("x"));
    EXPECT_EQ(changes, 2);
    ASSERT_TRUE(m.run(store.unwatch(watch)));
    m.xen.set("control/shutdown", "reboot");
    static_cast<void>(read("x"));
    EXPECT_EQ(changes, 2);
}

TEST_F(XenStore, SilenceIsBoundedAndALateAnswerIsDropped) {
    m.xen.tree["/local/domain/1/name"] = "guest";
    m.xen.ignore_reset = true;
    const Instant before = m.world.now;
    EXPECT_EQ(read("name").error().code, Code::timed_out);
    EXPECT_LT(m.world.now - before, 2'000'000'000u);
    m.xen.ignore_reset = false;
    m.xen.message(2, 1, 0, "late"); // the answer to request 1
    EXPECT_EQ(*read("name"), "guest");
    // If the server does not take the whole request, half of it remains in the ring: the connection is closed.
    m.xen.ignore_requests = true;
    EXPECT_EQ(m.run(store.write("a", std::string(2000, 'x'))).error().code, Code::timed_out);
    m.xen.ignore_requests = false;
    const Instant then = m.world.now;
    EXPECT_EQ(read("name").error().code, Code::timed_out);
    EXPECT_LT(m.world.now - then, 100'000'000u) << "at once: the stream is of no use";
}

TEST_F(XenStore, ARefusedWatchIsForgotten) {
    int changes = 0;
    {
        hv::xen::Watch watch;
        watch.path.write("control");
        watch.changed = [](void* c) { ++*static_cast<int*>(c); };
        watch.context = &changes;
        m.xen.refuse_watches = true;
        EXPECT_EQ(m.run(store.watch(watch)).error().code, Code::not_supported);
        m.xen.message(15, 0, 0, std::string("control\0firstlight-1\0", 21));
        static_cast<void>(read("x"));
        EXPECT_EQ(changes, 0);
        EXPECT_EQ(watch.next, nullptr);
    }
}

// Each of these violates a rule of the protocol; the store closes and reports why, and every later request fails at
// once.
struct BadServer {
    const char* what;
    std::function<void(fake::Xen&)> act;
};

TEST(XenStoreHostile, BrokenRulesCloseTheStore) {
    const std::vector<BadServer> cases{
        {"unknown id", [](fake::Xen& x) { x.message(2, 4711, 0, "v"); }},
        {"too long",
         [](fake::Xen& x) {
             const std::array<u32, 4> header{2, 1, 0, 4097};
             x.raw(std::string(reinterpret_cast<const char*>(header.data()), 16));
         }},
        {"other type", [](fake::Xen& x) { x.message(1, 1, 0, "v"); }},
        {"other transaction", [](fake::Xen& x) { x.message(2, 1, 5, "v"); }},
        {"watch without token", [](fake::Xen& x) { x.message(15, 0, 0, "path"); }},
        {"producer far ahead",
         [](fake::Xen& x) {
             x.store_word(2060) += 5000;
             x.raise(1);
         }},
        {"consumer far ahead",
         [](fake::Xen& x) {
             x.store_word(2048) += 5000;
             x.raise(1);
         }},
    };
    for (const BadServer& bad : cases) {
        SCOPED_TRACE(bad.what);
        fake::Machine m;
        ASSERT_TRUE(m.install() && m.start());
        m.xen.ignore_reset = true;
        bool done = false;
        m.world.device = [&] { // once the request has been sent
            if (done || m.xen.requests[2] == 0) {
                return false;
            }
            done = true;
            bad.act(m.xen);
            m.xen.store_event = true;
            return true;
        };
        std::array<char, 16> room;
        const Instant before = m.world.now;
        EXPECT_EQ(m.run(m.guest.store().read("name", room)).error().code, Code::protocol);
        EXPECT_LT(m.world.now - before, 100'000'000u) << "at once, not by a time-out";
        EXPECT_EQ(m.run(m.guest.store().read("name", room)).error().code, Code::protocol);
    }
}

TEST_F(XenStore, EnumeratesSorted) {
    m.xen.tree["/local/domain/1/device/vbd/51728/state"] = "1";
    m.xen.tree["/local/domain/1/device/vbd/51712/state"] = "1";
    m.xen.tree["/local/domain/1/device/vbd/832/state"] = "1";
    m.xen.tree["/local/domain/1/device/vbd/nonsense/state"] = "1";
    m.xen.tree["/local/domain/1/device/suspend/event-channel"] = "";
    m.xen.tree["/local/domain/1/device/vif/0/state"] = "1";
    struct Capture final : log::Sink {
        std::string text;
        void write(std::string_view t) override { text += t; }
    } log;
    log::attach(log);
    hv::DeviceList list;
    const auto done = m.run(m.guest.enumerate(list));
    log::detach(log);
    ASSERT_TRUE(done);
    EXPECT_EQ(log.text, "warning: XenStore: device/vbd/nonsense is not a device number\n")
        << "device/suspend is there for every guest, and no device";
    ASSERT_EQ(list.count(), 4u);
    EXPECT_EQ(list.list[0].number, 832u);
    EXPECT_EQ(list.list[2].address.view(), "51728");
    EXPECT_EQ(list.list[3].type.view(), "vif");
}

TEST_F(XenStore, NoDevicesIsNoError) {
    hv::DeviceList list;
    ASSERT_TRUE(m.run(m.guest.enumerate(list)));
    EXPECT_EQ(list.count(), 0u);
}

TEST(XenStoreStart, RefusesARingWithAForeignRequest) {
    fake::Machine m;
    ASSERT_TRUE(m.install());
    m.xen.store_word(2052) += 4;
    test::CapturedLog log;
    ASSERT_TRUE(m.start()) << "Xen is there: its clock, its console";
    EXPECT_TRUE(log.has("warning: xen: XenStore cannot be used: XenStore's ring holds a request from somewhere else"));
    EXPECT_EQ(m.guest.bus(), nullptr) << "and no device";
    EXPECT_NE(m.guest.upcall(), hv::Xen::Upcall::none);
}
TEST(XenStoreStart, TheBusIsThereOnceItIsStarted) {
    fake::Machine m;
    EXPECT_EQ(m.guest.bus(), nullptr);
    EXPECT_EQ(m.guest.upcall(), hv::Xen::Upcall::none);
    ASSERT_TRUE(m.install());
    EXPECT_EQ(m.guest.bus(), nullptr);
    EXPECT_EQ(m.guest.upcall(), hv::Xen::Upcall::none);
    ASSERT_TRUE(m.start());
    EXPECT_NE(m.guest.bus(), nullptr);
    EXPECT_NE(m.guest.upcall(), hv::Xen::Upcall::none);
}
} // namespace
