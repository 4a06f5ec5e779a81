// Executors on real threads: tasks sent between processors and cancelled at arbitrary moments; posts from three
// producers; services raised by three processors while they are added and removed; coroutine frames and their lock
// underneath; requests of two processors on the queue of a third, half of them abandoned. Run under the tsan preset.
// With the argument "weak", a mailbox whose list is pushed and taken with relaxed ordering must be reported.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>
import core.std;
import core.result;
import core.processor;
import core.time;
import core.dma;
import core.text;
import io.task;
import io.mailbox;
import io.executor;
import io.run_on;
import io.block;
import io.shared_lane;
#include "unit/io/processors.hpp"

namespace {
using namespace fl;
using namespace fl::io;
using fl::test::ThreadPlatform;
using fl::test::ThreadProcessor;

void check(bool good, const char* what) {
    if (!good) {
        std::printf("%s\n", what);
        std::fflush(stdout);
        std::_Exit(1);
    }
}

Task<Result<u64>> add(const std::vector<u64>& from) { // reads the waiting frame's memory
    u64 sum = 0;
    for (const u64 value : from) {
        sum += value;
    }
    co_return sum;
}
Task<Result<u64>> bounce(Executor& a, Executor& b, u64 round) {
    const std::vector<u64> numbers{round, 1, 2};
    const auto first = co_await run_on(a, add(numbers));
    const auto second = co_await run_on(b, add(numbers));
    if (!first || !second || *first != round + 3 || *second != round + 3) {
        co_return Error{Code::corrupt, "a wrong sum"};
    }
    co_return *first;
}
Task<Result<void>> member(Executor& a, Executor& b, u64 round) {
    const auto done = co_await bounce(a, b, round);
    co_return done ? Result<void>{} : Result<void>{done.error()};
}
Task<Result<void>> many(Executor& home, Executor& a, Executor& b) {
    for (u64 round = 0; round < 200; ++round) {
        TaskGroup group(home);
        for (u64 i = 0; i < 8; ++i) {
            if (auto spawned = group.spawn(member(i % 2 == 0 ? a : b, i % 2 == 0 ? b : a, round * 8 + i)); !spawned) {
                co_return spawned;
            }
        }
        if (round % 3 != 0) { // the others are destroyed wherever they are
            if (auto done = co_await group.join(); !done) {
                co_return done;
            }
        } else {
            co_await home.sleep(round * 100);
        }
    }
    co_return Result<void>{};
}

struct Number : Post {
    std::vector<u32>* into = nullptr; // accessed by the owner only
    u32 value = 0;
    static void note(Post& post) {
        auto& self = static_cast<Number&>(post);
        self.into->push_back(self.value);
    }
};

void posts_from_three() {
    constexpr u32 each = 5000;
    std::vector<u32> seen;
    std::vector<std::vector<Number>> numbers(3);
    {
        ThreadProcessor owner(1);
        std::vector<std::thread> producers;
        for (u32 n = 0; n < 3; ++n) {
            numbers[n] = std::vector<Number>(each);
            producers.emplace_back([&, n] {
                set_this_processor(2 + n);
                for (u32 i = 0; i < each; ++i) {
                    Number& number = numbers[n][i];
                    number.run = Number::note;
                    number.into = &seen;
                    number.value = n * each + i;
                    static_cast<void>(owner.executor.post(number));
                }
            });
        }
        for (std::thread& producer : producers) {
            producer.join();
        }
        // Everything still in the mailbox runs before the loop ends; this is the last post.
        std::atomic<bool> done = false;
        struct Last : Post {
            std::atomic<bool>* done;
        } last;
        last.run = [](Post& post) { static_cast<Last&>(post).done->store(true, std::memory_order_release); };
        last.done = &done;
        static_cast<void>(owner.executor.post(last));
        while (!done.load(std::memory_order_acquire)) {
            std::this_thread::yield();
        }
        owner.stop();
        check(owner.platform.overslept == 0, "the owner slept through a wake-up");
    }
    check(seen.size() == 3 * each, "posts were lost or doubled");
    u32 next[3]{};
    for (const u32 value : seen) {
        check(value % each == next[value / each]++, "a producer's posts came in another order");
    }
}

/// A counting service: everything requested before a raise is done in the following drain.
struct Counted final : Service {
    std::atomic<u64> asked{0}; // relaxed: raise() orders
    std::atomic<u64> done{0};
    bool drain() override {
        done.store(asked.load(std::memory_order_relaxed), std::memory_order_release);
        return true;
    }
    bool wants_tick() const override { return false; }
};
/// Runs on the owner: adds, removes, or removes and re-adds.
struct Change : Post {
    enum class What { add, remove, both } what = What::add;
    Executor* executor = nullptr;
    Service* service = nullptr;
    std::atomic<bool> done{false};
    static void apply(Post& post) {
        auto& self = static_cast<Change&>(post);
        if (self.what != What::add) {
            self.executor->remove(*self.service);
        }
        if (self.what != What::remove) {
            self.executor->add(*self.service);
        }
        self.done.store(true, std::memory_order_release);
    }
};
void change(Executor& executor, Service& service, Change::What what) {
    Change post;
    post.run = Change::apply;
    post.what = what;
    post.executor = &executor;
    post.service = &service;
    check(executor.post(post), "a processor that serves takes no posts");
    while (!post.done.load(std::memory_order_acquire)) {
        std::this_thread::yield();
    }
}

void raises_from_three() {
    constexpr u64 rounds = 3000;
    ThreadProcessor owner(1);
    std::vector<Counted> services(3);
    for (Counted& service : services) {
        change(owner.executor, service, Change::What::add);
    }
    std::atomic<u32> finished = 0;
    std::vector<std::thread> raisers;
    for (u32 n = 0; n < 3; ++n) {
        raisers.emplace_back([&, n] {
            set_this_processor(2 + n);
            Counted& own = services[n];
            for (u64 i = 1; i <= rounds; ++i) {
                own.asked.store(i, std::memory_order_relaxed);
                owner.executor.raise(own);
                while (own.done.load(std::memory_order_acquire) != i) {
                    check(owner.platform.overslept == 0, "the owner slept through a raise");
                    std::this_thread::yield();
                }
            }
            finished.fetch_add(1);
        });
    }
    for (u32 i = 0; finished != 3; ++i) { // removed and re-added at arbitrary moments
        change(owner.executor, services[i % 3], Change::What::both);
    }
    for (std::thread& raiser : raisers) {
        raiser.join();
    }
    for (Counted& service : services) {
        check(service.done == rounds, "a drain has not seen what came before its raise");
        change(owner.executor, service, Change::What::remove);
    }
    owner.stop();
    check(owner.platform.overslept == 0, "the owner slept through a wake-up");
}

/// Memory that the "device" accesses on its own processor, until the request ends or is forgotten.
class MemoryDisk final : public BlockDevice, public Service {
  public:
    explicit MemoryDisk(Executor& executor) : BlockDevice(executor), bytes_(64 * 4096) {
        geometry_.sectors = bytes_.size() / 512;
    }
    bool drain() override {
        bool taken = false;
        while (Request* request = held_.pop()) {
            std::byte* at = bytes_.data() + request->lba * 512;
            std::byte* const data = request->buffer.data;
            if (request->op == Op::write) {
                std::copy_n(data, request->buffer.size, at);
            } else {
                std::copy_n(at, request->buffer.size, data);
            }
            complete(*request, Status::ok);
            taken = true;
        }
        return taken;
    }
    bool wants_tick() const override { return false; }

  protected:
    void start(Request& request) override {
        held_.push(request);
        executor().touch(*this);
    }
    bool cancel_now(Request& request) override {
        if (!held_.remove(request)) {
            return false;
        }
        complete(request, Status::cancelled);
        return true;
    }
    void forget(Request& request) override { held_.remove(request); }

  private:
    std::vector<std::byte> bytes_;
    RequestQueue held_;
};

struct Pages final : DmaAllocator {
    Result<DmaSpan> allocate(u32 size, u64) override {
        void* page = std::aligned_alloc(4096, size);
        return DmaSpan{static_cast<std::byte*>(page), reinterpret_cast<u64>(page), size};
    }
    void free(DmaSpan span) override { std::free(span.data); }
};

/// Writes a block of its own and reads it back. Destroyed anywhere: the buffer must outlive what the device does.
Task<Result<void>> write_and_read(BlockDevice& lane, Pages& pages, u64 lba, u8 value) {
    DmaBuffer buffer = *pages.buffer(4096);
    for (u32 round = 0; round < 4; ++round) {
        std::fill_n(buffer.data(), 4096, std::byte(value + round));
        if (auto done = co_await lane.write(lba, buffer); !done) {
            co_return done;
        }
        std::fill_n(buffer.data(), 4096, std::byte{});
        if (auto done = co_await lane.read(lba, buffer); !done) {
            co_return done;
        }
        for (u32 i = 0; i < 4096; i += 512) {
            if (buffer.data()[i] != std::byte(value + round)) {
                co_return Error{Code::corrupt, "a shared lane returned other data than were written"};
            }
        }
    }
    co_return Result<void>{};
}

Task<Result<u64>> share(BlockDevice& lane, Pages& pages, u64 first) {
    for (u32 round = 0; round < 60; ++round) {
        TaskGroup group(lane.executor());
        for (u64 i = 0; i < 16; ++i) {
            auto spawned = group.spawn(write_and_read(lane, pages, first + i * 8, static_cast<u8>(round + i)));
            if (!spawned) {
                co_return spawned.error();
            }
        }
        if (round % 2 == 0) {
            if (auto done = co_await group.join(); !done) {
                co_return done.error();
            }
        } else { // destroyed wherever they are
            co_await lane.executor().sleep(round * 500);
        }
    }
    while (lane.in_flight() != 0) {
        co_await lane.executor().sleep(10'000);
    }
    co_return 0;
}
Task<Result<u64>> share_with(ThreadProcessor& other, BlockDevice& mine, BlockDevice& theirs, Pages& pages) {
    TaskGroup group(mine.executor());
    struct There {
        static Task<Result<void>> run(ThreadProcessor& on, BlockDevice& lane, Pages& pages) {
            auto done = co_await run_on(on.executor, share(lane, pages, 256));
            co_return done ? Result<void>{} : Result<void>{done.error()};
        }
    };
    if (auto spawned = group.spawn(There::run(other, theirs, pages)); !spawned) {
        co_return spawned.error();
    }
    auto here = co_await share(mine, pages, 0);
    auto there = co_await group.join();
    co_return here && !there ? Result<u64>{there.error()} : here;
}

/// Until the last answers to `forget` have arrived.
Task<Result<u64>> wait_for_answers(Executor& home) {
    for (u32 i = 0; i < 1000 && quarantine_state().spans != 0; ++i) {
        co_await home.sleep(1'000'000);
    }
    co_return 0;
}

void shared_lanes() {
    ThreadPlatform platform;
    Executor home(platform.platform(), 0);
    ThreadProcessor owner(1);
    ThreadProcessor other(2);
    MemoryDisk disk(owner.executor);
    change(owner.executor, disk, Change::What::add);
    SharedLane mine(home, disk);
    SharedLane theirs(other.executor, disk);
    Pages pages;
    const auto done = home.run(share_with(other, mine, theirs, pages));
    if (!done) {
        std::printf("%.*s\n", static_cast<int>(done.error().message.size()), done.error().message.data());
    }
    check(static_cast<bool>(done), "a shared lane failed");
    static_cast<void>(home.run(wait_for_answers(home)));
    check(quarantine_state().spans == 0, "a buffer stays quarantined");
    change(owner.executor, disk, Change::What::remove);
    other.stop();
    owner.stop();
    check(platform.overslept + owner.platform.overslept + other.platform.overslept == 0,
          "a processor slept through a wake-up");
}

struct WeakAtomics {
    template <class T, MailboxCell>
    class Cell : public std::atomic<T> {
      public:
        using std::atomic<T>::atomic;
        T exchange(T value, std::memory_order) { return std::atomic<T>::exchange(value, std::memory_order_relaxed); }
        bool compare_exchange_weak(T& expected, T value, std::memory_order, std::memory_order) {
            return std::atomic<T>::compare_exchange_weak(expected, value, std::memory_order_relaxed,
                                                         std::memory_order_relaxed);
        }
    };
};
struct Plain {
    Plain* next = nullptr;
    u64 value = 0;
};

int weak() {
    BasicMailbox<Plain, WeakAtomics> mailbox;
    std::vector<Plain> nodes(1000);
    std::thread producer([&] {
        for (Plain& node : nodes) {
            node.value = 1;
            static_cast<void>(mailbox.push(node));
        }
    });
    u64 sum = 0;
    while (sum != nodes.size()) {
        for (Plain* node = mailbox.take_all(); node != nullptr; node = node->next) {
            sum += node->value;
        }
    }
    producer.join();
    return 0;
}

} // namespace

int main(int count, char**) {
    if (count > 1) {
        return weak();
    }
    posts_from_three();
    raises_from_three();
    const usize before = frame_pool().in_use();
    shared_lanes();
    {
        ThreadPlatform platform;
        Executor home(platform.platform(), 0);
        ThreadProcessor one(1);
        ThreadProcessor two(2);
        check(static_cast<bool>(home.run(many(home, one.executor, two.executor))), "a task failed");
        one.stop();
        two.stop();
        check(platform.overslept + one.platform.overslept + two.platform.overslept == 0,
              "a processor slept through a wake-up");
    }
    check(frame_pool().in_use() == before, "coroutine frames leaked");
    std::printf("posts, raises, tasks and requests between three processors: as they should be\n");
    return 0;
}
