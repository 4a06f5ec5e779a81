// Runs two real threads on one ring, in every build; under the tsan preset each unordered access to an entry is
// reported. `weak`: the index is stored relaxed, and the sanitizer must report it.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
import core.std;
import core.result;
import io.ring;

namespace {
using namespace fl;
using namespace fl::io;

constexpr u64 entries = 200'000;
constexpr u32 size = 16;
constexpr RingLayout layout{.index = 0, .event = 8, .consumed = 16, .entries = 64, .stride = sizeof(u64)};
alignas(64) std::byte storage[64 + size * sizeof(u64)];

/// FlatMemory without the release ordering.
class WeakMemory : public FlatMemory {
  public:
    using FlatMemory::FlatMemory;
    template <class W>
    void store_release(usize offset, W value) {
        store_relaxed<W>(offset, value);
    }
};

/// An event for one thread to wait for, like an interrupt. Deliberately relaxed, so that only the ring orders the
/// entries.
class Doorbell {
  public:
    void ring() { rings_.fetch_add(1, std::memory_order_relaxed); }
    // Every wait is bounded: a lost wake-up fails the test.
    bool wait(u64& seen) {
        const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
        while (rings_.load(std::memory_order_relaxed) == seen) {
            if (std::chrono::steady_clock::now() > deadline) {
                return false;
            }
            std::this_thread::yield();
        }
        seen = rings_.load(std::memory_order_relaxed);
        return true;
    }

  private:
    std::atomic<u64> rings_{0};
};

template <class Memory, class Rule>
int exchange(const char* what, u32 first_event) {
    std::memset(storage, 0, sizeof storage);
    Memory memory = [] {
        if constexpr (std::is_same_v<Memory, MappedMemory>) {
            return MappedMemory(storage, sizeof storage);
        } else {
            return Memory(std::span(storage));
        }
    }();
    memory.template store_relaxed<u32>(layout.event, first_event);
    auto producer = *Producer<Memory, FreeRunning<u32>, Rule>::create(memory, layout, FreeRunning<u32>(size));
    auto consumer = *Consumer<Memory, FreeRunning<u32>, Rule>::create(memory, layout, FreeRunning<u32>(size));
    Doorbell doorbell;
    u64 rings = 0;
    bool produced = true;

    std::thread writer([&] {
        u64 value = 0;
        while (value != entries && produced) {
            if (!producer.observe()) {
                produced = false;
            }
            for (u32 batch = 0; batch < 3 && value != entries && producer.produce(value * 3); ++batch) {
                ++value;
            }
            if (producer.publish()) {
                ++rings;
                doorbell.ring();
            }
            if (producer.full()) {
                std::this_thread::yield();
            }
        }
    });

    u64 expected = 0;
    u64 last = 0;
    u64 sleeps = 0;
    bool good = true;
    while (good && expected != entries) {
        good = consumer.available().has_value();
        u64 value = 0;
        while (good && consumer.take(value)) {
            good = value == 3 * expected++;
        }
        consumer.release();
        if (good && expected != entries) {
            // The number of entries to come is unknown here, so request an event after one.
            const auto found = consumer.arm(1);
            good = found.has_value();
            if (good && !*found) {
                ++sleeps;
                good = doorbell.wait(last);
            }
        }
    }
    if (!good) {
        std::printf("%s: stopped at entry %llu\n", what, static_cast<unsigned long long>(expected));
        std::fflush(stdout);
        std::_Exit(1); // the writer cannot be joined: it has no reader
    }
    writer.join();
    std::printf("%s: %llu entries, %llu sleeps, %llu notifications\n", what, static_cast<unsigned long long>(entries),
                static_cast<unsigned long long>(sleeps), static_cast<unsigned long long>(rings));
    return produced ? 0 : 1;
}
} // namespace

int main(int count, char**) {
    if (count > 1) {
        return exchange<WeakMemory, Always>("relaxed index", 0);
    }
    return exchange<FlatMemory, ReachedEvent>("event index, position", 1) +
           exchange<FlatMemory, PassedEvent>("event index, entry", 0) +
           exchange<FlatMemory, EmptyToNonEmpty>("mask, empty to non-empty", 0) +
           exchange<MappedMemory, Always>("always", 0);
}
