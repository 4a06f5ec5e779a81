// The ring's memory orderings and notification rules under relacy, which runs two threads through their interleavings
// on top of the C++ memory model: an atomic load may return any value that the model allows, and a payload not ordered
// by acquire and release is a data race. The templates of io.ring are instantiated unchanged over a relacy memory. Each
// property is tested unmodified, which must pass, and once with each ordering it needs weakened, which must fail: a
// check that cannot fail proves nothing.
//
// Built with exceptions, which relacy needs, and therefore with separately compiled modules (test/CMakeLists.txt).
#include <cstring>
#include <relacy/relacy.hpp>
//
#include "must.hpp"
#undef new
#undef delete
#undef malloc
#undef free
#undef assert
import core.std;
import core.result;
import io.ring;

namespace {
using namespace fl;
using namespace fl::io;

/// The ordering to weaken.
enum class Weak { nothing, index_store, index_load, consumed_store, consumed_load, barrier };

/// What is weakened in the present run. A variable, not a template parameter: relacy is compiled anew for every type of
/// test, which takes seconds.
Weak weak = Weak::nothing;

constexpr usize index_at = 0;
constexpr usize event_at = 8;
constexpr usize consumed_at = 16;
constexpr usize entries_at = 24;

struct Shared {
    rl::atomic<unsigned> words[3];
    rl::var<unsigned> slots[2];
};

/// Words are relacy atomics and each slot is one plain variable, so that a torn or unordered copy is a data race.
class ModelMemory {
  public:
    ModelMemory() = default;
    explicit ModelMemory(Shared& shared) : shared_(&shared) {}

    usize size() const { return entries_at + 2 * sizeof(unsigned); }
    template <class W>
    W load_relaxed(usize at) const {
        return static_cast<W>(shared_->words[at / 8].load(rl::mo_relaxed, $));
    }
    template <class W>
    W load_acquire(usize at) const {
        const bool relaxed =
            (weak == Weak::index_load && at == index_at) || (weak == Weak::consumed_load && at == consumed_at);
        return static_cast<W>(shared_->words[at / 8].load(relaxed ? rl::mo_relaxed : rl::mo_acquire, $));
    }
    template <class W>
    void store_relaxed(usize at, W value) {
        shared_->words[at / 8].store(value, rl::mo_relaxed, $);
    }
    template <class W>
    void store_release(usize at, W value) {
        const bool relaxed =
            (weak == Weak::index_store && at == index_at) || (weak == Weak::consumed_store && at == consumed_at);
        shared_->words[at / 8].store(value, relaxed ? rl::mo_relaxed : rl::mo_release, $);
    }
    void full_barrier() const {
        if (weak != Weak::barrier) {
            rl::atomic_thread_fence(rl::mo_seq_cst, $);
        }
    }
    void copy_out(usize at, std::byte* into, usize count) const {
        const unsigned value = shared_->slots[(at - entries_at) / sizeof(unsigned)]($);
        std::memcpy(into, &value, count);
    }
    void copy_in(usize at, const std::byte* from, usize count) {
        unsigned value = 0;
        std::memcpy(&value, from, count);
        shared_->slots[(at - entries_at) / sizeof(unsigned)]($) = value;
    }

  private:
    Shared* shared_ = nullptr;
};
static_assert(RingMemory<ModelMemory>);

constexpr RingLayout layout{
    .index = index_at, .event = event_at, .consumed = consumed_at, .entries = entries_at, .stride = sizeof(unsigned)};
using Positions = FreeRunning<u32>;

template <class Rule>
struct Ends {
    using Memory = ModelMemory;
    Shared shared;
    std::optional<Producer<Memory, Positions, Rule>> producer;
    std::optional<Consumer<Memory, Positions, Rule>> consumer;

    void begin(unsigned event) {
        for (auto& word : shared.words) {
            word.store(0, rl::mo_relaxed, $);
        }
        shared.words[event_at / 8].store(event, rl::mo_relaxed, $);
        producer.emplace(*Producer<Memory, Positions, Rule>::create(Memory(shared), layout, Positions(2)));
        consumer.emplace(*Consumer<Memory, Positions, Rule>::create(Memory(shared), layout, Positions(2)));
    }
};

/// Entries arrive intact, in order and once, and a slot is not overwritten before it has been copied out.
struct Transfer : rl::test_suite<Transfer, 2> {
    Ends<Never> ends;

    void before() { ends.begin(0); }
    void thread(unsigned number) {
        if (number == 0) {
            unsigned value = 1;
            for (int attempt = 0; attempt < 4; ++attempt) {
                RL_ASSERT(ends.producer->observe().has_value());
                if (ends.producer->produce(value)) {
                    ++value;
                }
                static_cast<void>(ends.producer->publish());
            }
        } else {
            unsigned expected = 1;
            for (int attempt = 0; attempt < 4; ++attempt) {
                RL_ASSERT(ends.consumer->available().has_value());
                unsigned value = 0;
                while (ends.consumer->take(value)) {
                    RL_ASSERT(value == expected);
                    ++expected;
                }
                ends.consumer->release();
            }
        }
    }
};

/// A consumer that sleeps after requesting an event `Count` entries ahead is notified once those entries are published.
template <class Rule, unsigned Count>
struct WakeUp : rl::test_suite<WakeUp<Rule, Count>, 2> {
    Ends<Rule> ends;
    unsigned notified = 0; // the producer's position at its last notification
    unsigned slept = ~0u;  // the consumer's position when it fell asleep

    void before() {
        // No event requested yet: an event index far away, or a mask.
        ends.begin(std::is_same_v<Rule, EmptyToNonEmpty> ? 1 : 0x80000000);
        notified = 0;
        slept = ~0u;
    }
    void thread(unsigned number) {
        if (number == 0) {
            for (unsigned value = 1; value <= 2; ++value) {
                RL_ASSERT(ends.producer->produce(value));
                if (ends.producer->publish()) {
                    notified = ends.producer->position();
                }
            }
        } else {
            // The mask adds many schedules: one attempt less.
            for (int attempt = std::is_same_v<Rule, EmptyToNonEmpty> ? 1 : 0; attempt < 3; ++attempt) {
                const auto there = ends.consumer->available();
                RL_ASSERT(there.has_value());
                static_cast<void>(ends.consumer->skip(*there));
                ends.consumer->release();
                const auto found = ends.consumer->arm(Count);
                RL_ASSERT(found.has_value());
                if (!*found) {
                    slept = ends.consumer->position();
                    return;
                }
                ends.consumer->disarm();
            }
        }
    }
    void after() {
        // Asleep with enough entries after its position and no notification since: a lost wake-up.
        RL_ASSERT(slept == ~0u || 2 - slept < Count || notified >= slept + Count);
    }
};

template <class Test>
void must(bool pass, std::string_view what, Weak weakened = Weak::nothing) {
    weak = weakened;
    model::must<Test>(pass, what);
}

} // namespace

int main() {
    must<Transfer>(true, "entries arrive whole, in order, once");
    must<Transfer>(false, "… with the producer's index stored relaxed", Weak::index_store);
    must<Transfer>(false, "… with the producer's index loaded relaxed", Weak::index_load);
    must<Transfer>(false, "… with the consumer's position stored relaxed", Weak::consumed_store);
    must<Transfer>(false, "… with the consumer's position loaded relaxed", Weak::consumed_load);
    must<WakeUp<ReachedEvent, 1>>(true, "event index (Xen): no wake-up is lost");
    must<WakeUp<ReachedEvent, 1>>(false, "… without the full barriers", Weak::barrier);
    must<WakeUp<ReachedEvent, 2>>(true, "event index (Xen), moderated: no wake-up is lost");
    must<WakeUp<ReachedEvent, 2>>(false, "… without the full barriers", Weak::barrier);
    must<WakeUp<PassedEvent, 1>>(true, "event index (virtio): no wake-up is lost");
    must<WakeUp<PassedEvent, 1>>(false, "… without the full barriers", Weak::barrier);
    must<WakeUp<EmptyToNonEmpty, 1>>(true, "mask and empty to non-empty (VMBus): no wake-up is lost");
    must<WakeUp<EmptyToNonEmpty, 1>>(false, "… without the full barriers", Weak::barrier);
    return model::verdict();
}
