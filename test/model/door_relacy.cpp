// The door into an executor (io.door) under relacy: posts arrive whole, once, in each producer's order; a processor
// that halts is kicked. As in ring_relacy.cpp each property is tried as it is, which must pass, and with each ordering
// that it needs taken away, which must fail.
#include <cstring>
#include <iostream>
#include <relacy/relacy.hpp>
#include <sstream>
#include <string_view>
#undef new
#undef delete
#undef malloc
#undef free
#undef assert
#undef memory_order_relaxed
#undef memory_order_consume
#undef memory_order_acquire
#undef memory_order_release
#undef memory_order_acq_rel
#undef memory_order_seq_cst
import core.std;
import io.door;

namespace {
using namespace fl;
using namespace fl::io;

/// Which ordering is taken away.
enum class Weak { nothing, push, take, raise, clear, wake_store, asleep_store, wake_load, asleep_load };

constexpr rl::memory_order order_of(std::memory_order order) {
    switch (order) {
    case std::memory_order_relaxed: return rl::mo_relaxed;
    case std::memory_order_release: return rl::mo_release;
    case std::memory_order_acquire: return rl::mo_acquire;
    case std::memory_order_seq_cst: return rl::mo_seq_cst;
    default: return rl::mo_acq_rel;
    }
}

template <Weak weak>
struct ModelAtomics {
    template <class T, DoorCell cell>
    class Cell {
      public:
        Cell(T initial) : value_(initial) {}
        T load(std::memory_order order) const {
            const bool less =
                order == std::memory_order_seq_cst && ((weak == Weak::wake_load && cell == DoorCell::wake) ||
                                                       (weak == Weak::asleep_load && cell == DoorCell::asleep));
            return value_.load(less ? rl::mo_acquire : order_of(order), $);
        }
        void store(T value, std::memory_order order) {
            const bool relaxed = weak == Weak::raise && cell == DoorCell::wake && order == std::memory_order_release;
            const bool less =
                order == std::memory_order_seq_cst && ((weak == Weak::wake_store && cell == DoorCell::wake) ||
                                                       (weak == Weak::asleep_store && cell == DoorCell::asleep));
            value_.store(value, relaxed ? rl::mo_relaxed : less ? rl::mo_release : order_of(order), $);
        }
        T exchange(T value, std::memory_order order) {
            const bool relaxed =
                (weak == Weak::take && cell == DoorCell::head) || (weak == Weak::clear && cell == DoorCell::wake);
            return value_.exchange(value, relaxed ? rl::mo_relaxed : order_of(order), $);
        }
        bool compare_exchange_weak(T& expected, T value, std::memory_order success, std::memory_order failure) {
            const bool relaxed = weak == Weak::push && cell == DoorCell::head;
            return value_.compare_exchange_weak(expected, value, relaxed ? rl::mo_relaxed : order_of(success), $,
                                                order_of(failure), $);
        }

      private:
        mutable rl::atomic<T> value_;
    };
};

struct Node;
/// A plain link: whoever reads it without being ordered behind the writer is a data race.
struct Link {
    rl::var<Node*> value;
    Link& operator=(Node* node) {
        value($) = node;
        return *this;
    }
    operator Node*() { return value($); }
};
struct Node {
    Link next;
    rl::var<unsigned> number;
};

template <Weak weak>
using Door = BasicDoor<Node, ModelAtomics<weak>>;

/// Two producers, one owner: every post once, whole, in its producer's order.
template <Weak weak>
struct Posts : rl::test_suite<Posts<weak>, 3> {
    std::optional<Door<weak>> door;
    Node nodes[3];
    unsigned last[2];

    void before() {
        door.emplace();
        last[0] = last[1] = 0;
    }
    void take() {
        for (Node* node = door->take_all(); node != nullptr;) {
            Node* following = node->next;
            const unsigned number = node->number($);
            unsigned& expected = last[number / 10];
            RL_ASSERT(number % 10 == expected + 1);
            expected = number % 10;
            node = following;
        }
    }
    void thread(unsigned which) {
        if (which == 0) {
            for (unsigned i = 0; i < 2; ++i) {
                nodes[i].number($) = 1 + i;
                RL_ASSERT(door->push(nodes[i]));
            }
        } else if (which == 1) {
            nodes[2].number($) = 11;
            RL_ASSERT(door->push(nodes[2]));
        } else {
            take();
            take();
        }
    }
    void after() {
        take();
        RL_ASSERT(last[0] == 2 && last[1] == 1);
    }
};

/// A handler's raise: what it wrote before is seen by the turn that cleared the flag.
template <Weak weak>
struct Raise : rl::test_suite<Raise<weak>, 2> {
    std::optional<Door<weak>> door;
    rl::var<unsigned> written;

    void before() { door.emplace(); }
    void thread(unsigned which) {
        if (which == 0) {
            written($) = 7;
            door->raise();
        } else if (door->clear()) {
            RL_ASSERT(written($) == 7);
        }
    }
};

/// The owner goes to sleep, another processor posts: the post has been seen, or the owner stays awake, or it is kicked.
template <Weak weak>
struct Sleep : rl::test_suite<Sleep<weak>, 2> {
    std::optional<Door<weak>> door;
    Node node;
    bool seen;
    bool asleep;
    bool kicked;

    void before() {
        door.emplace();
        seen = asleep = kicked = false;
    }
    void thread(unsigned which) {
        if (which == 0) {
            node.number($) = 1;
            RL_ASSERT(door->push(node));
            kicked = door->raise_from_elsewhere();
        } else {
            for (int turn = 0; turn < 2 && !asleep; ++turn) {
                if (door->clear() && door->take_all() != nullptr) {
                    seen = true;
                }
                asleep = door->falls_asleep();
                if (!asleep) {
                    door->woke();
                }
            }
        }
    }
    void after() { RL_ASSERT(seen || !asleep || kicked); }
};

/// The owner closes while two others post: what was not refused is there, whole, and nothing else.
template <Weak weak>
struct Close : rl::test_suite<Close<weak>, 3> {
    std::optional<Door<weak>> door;
    Node nodes[2];
    bool pushed[2];
    bool seen[2];

    void before() {
        door.emplace();
        pushed[0] = pushed[1] = seen[0] = seen[1] = false;
    }
    void look(Node* first) {
        for (Node* node = first; node != nullptr;) {
            Node* following = node->next;
            const unsigned number = node->number($);
            RL_ASSERT(!seen[number]);
            seen[number] = true;
            node = following;
        }
    }
    void thread(unsigned which) {
        if (which < 2) {
            nodes[which].number($) = which;
            pushed[which] = door->push(nodes[which]);
        } else {
            look(door->take_all());
            look(door->close());
        }
    }
    void after() {
        RL_ASSERT(pushed[0] == seen[0] && pushed[1] == seen[1]);
        Node late;
        RL_ASSERT(!door->push(late));
    }
};

int failures = 0;

template <class Test>
void must(bool pass, std::string_view what) {
    struct Way {
        rl::scheduler_type_e scheduler;
        rl::iteration_t iterations;
    };
    constexpr Way ways[] = {{rl::fair_full_search_scheduler_type, 20'000'000}, {rl::random_scheduler_type, 200'000}};
    bool passed = true;
    rl::iteration_t schedules = 0;
    std::ostringstream report;
    for (const Way& way : ways) {
        rl::test_params params;
        params.search_type = way.scheduler;
        params.iteration_count = way.iterations;
        params.output_stream = &report;
        params.progress_stream = &report;
        passed = rl::simulate<Test>(params);
        schedules += params.stop_iteration;
        if (!passed) {
            break;
        }
        if (way.scheduler == rl::fair_full_search_scheduler_type && params.stop_iteration >= way.iterations) {
            std::cout << "the search was cut short: not every schedule was seen\n";
            ++failures;
        }
    }
    const bool as_expected = passed == pass;
    std::cout << (as_expected ? "ok      " : "NOT OK  ") << what << ": " << (passed ? "holds" : "violated") << " ("
              << schedules << " schedules)\n"
              << std::flush;
    if (!as_expected) {
        std::cout << report.str().substr(0, 8000) << '\n';
        ++failures;
    }
}

} // namespace

int main() {
    must<Posts<Weak::nothing>>(true, "posts arrive whole, once, in order");
    must<Posts<Weak::push>>(false, "… pushed relaxed");
    must<Posts<Weak::take>>(false, "… taken relaxed");
    must<Close<Weak::nothing>>(true, "a closing door loses no post that it took");
    must<Close<Weak::push>>(false, "… pushed relaxed");
    must<Close<Weak::take>>(false, "… closed relaxed");
    must<Raise<Weak::nothing>>(true, "what a handler wrote is seen by the turn that it raised");
    must<Raise<Weak::raise>>(false, "… raised relaxed");
    must<Raise<Weak::clear>>(false, "… cleared relaxed");
    must<Sleep<Weak::nothing>>(true, "no post is slept through");
    must<Sleep<Weak::wake_store>>(false, "… the flag stored with release");
    must<Sleep<Weak::asleep_store>>(false, "… asleep stored with release");
    must<Sleep<Weak::wake_load>>(false, "… the flag loaded with acquire");
    must<Sleep<Weak::asleep_load>>(false, "… asleep loaded with acquire");
    std::cout << (failures == 0 ? "all as expected\n" : "some were not as expected\n");
    return failures == 0 ? 0 : 1;
}
