// Executors on real threads: tasks sent between processors and cancelled at arbitrary moments; posts from three
// producers; services raised by three processors while they are added and removed; coroutine frames and their lock
// underneath. Run under the tsan preset. With the argument "weak", a mailbox whose list is pushed and taken with
// relaxed ordering must be reported.
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
import io.task;
import io.mailbox;
import io.executor;
import io.run_on;
#include "unit/io_processors.hpp"

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
    Counted* service = nullptr;
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
void change(Executor& executor, Counted& service, Change::What what) {
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
    std::printf("posts, raises and tasks between three processors: as they should be\n");
    return 0;
}
