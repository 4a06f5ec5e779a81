// The state shared between executors (io.mailbox) under relacy: posts arrive intact, once, and in each producer's
// order; a halting processor is kicked; a raised service is drained, and a removed one is in no list. As in
// ring_relacy.cpp, each property is tested unmodified, which must pass, and with each ordering it needs weakened, which
// must fail.
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
import io.mailbox;

namespace {
using namespace fl;
using namespace fl::io;

/// The ordering to weaken.
enum class Weak {
    nothing,
    push,
    take,
    raise,
    clear,
    wake_store,
    asleep_store,
    wake_load,
    asleep_load,
    wake_plain, // the flag is stored instead of exchanged
    add_release,
    add_acquire,
    lower_release,
    lower_acquire,
    add_push,
    raised_take,
};

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
    template <class T, MailboxCell cell>
    class Cell {
      public:
        Cell(T initial) : value_(initial) {}
        T load(std::memory_order order) const {
            const bool less =
                order == std::memory_order_seq_cst && ((weak == Weak::wake_load && cell == MailboxCell::wake) ||
                                                       (weak == Weak::asleep_load && cell == MailboxCell::asleep));
            return value_.load(less ? rl::mo_acquire : order_of(order), $);
        }
        void store(T value, std::memory_order order) {
            const bool less =
                order == std::memory_order_seq_cst && weak == Weak::asleep_store && cell == MailboxCell::asleep;
            value_.store(value, less ? rl::mo_release : order_of(order), $);
        }
        T exchange(T value, std::memory_order order) {
            if constexpr (cell == MailboxCell::wake) {
                if (value && weak == Weak::wake_plain) {
                    value_.store(value, order_of(order), $);
                    return false;
                }
                if (value && order == std::memory_order_seq_cst && weak == Weak::wake_store) {
                    return value_.exchange(value, rl::mo_release, $);
                }
            }
            if constexpr (cell == MailboxCell::raised) { // add() and detach() set it, lower() clears it
                const bool no_release = weak == (value ? Weak::add_release : Weak::lower_release);
                const bool no_acquire = weak == (value ? Weak::add_acquire : Weak::lower_acquire);
                return value_.exchange(value,
                                       no_release   ? rl::mo_acquire
                                       : no_acquire ? rl::mo_release
                                                    : order_of(order),
                                       $);
            }
            const bool relaxed =
                (weak == Weak::take && cell == MailboxCell::head) ||
                (weak == Weak::clear && cell == MailboxCell::wake && !value) ||
                (weak == Weak::raise && cell == MailboxCell::wake && value && order == std::memory_order_release) ||
                (weak == Weak::raised_take && cell == MailboxCell::raised_head);
            return value_.exchange(value, relaxed ? rl::mo_relaxed : order_of(order), $);
        }
        bool compare_exchange_weak(T& expected, T value, std::memory_order success, std::memory_order failure) {
            const bool relaxed = (weak == Weak::push && cell == MailboxCell::head) ||
                                 (weak == Weak::add_push && cell == MailboxCell::raised_head);
            return value_.compare_exchange_weak(expected, value, relaxed ? rl::mo_relaxed : order_of(success), $,
                                                order_of(failure), $);
        }

      private:
        mutable rl::atomic<T> value_;
    };
};

struct Node;
/// A plain link: a read not ordered after the write is a data race.
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
using Mailbox = BasicMailbox<Node, ModelAtomics<weak>>;

/// Two producers, one owner: every post arrives once, intact, in its producer's order.
template <Weak weak>
struct Posts : rl::test_suite<Posts<weak>, 3> {
    std::optional<Mailbox<weak>> mailbox;
    Node nodes[3];
    unsigned last[2];

    void before() {
        mailbox.emplace();
        last[0] = last[1] = 0;
    }
    void take() {
        for (Node* node = mailbox->take_all(); node != nullptr;) {
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
                RL_ASSERT(mailbox->push(nodes[i]));
            }
        } else if (which == 1) {
            nodes[2].number($) = 11;
            RL_ASSERT(mailbox->push(nodes[2]));
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

/// A raise from a handler: the turn that cleared the flag sees what was written before the raise.
template <Weak weak>
struct Raise : rl::test_suite<Raise<weak>, 2> {
    std::optional<Mailbox<weak>> mailbox;
    rl::var<unsigned> written;

    void before() { mailbox.emplace(); }
    void thread(unsigned which) {
        if (which == 0) {
            written($) = 7;
            mailbox->raise();
        } else if (mailbox->clear()) {
            RL_ASSERT(written($) == 7);
        }
    }
};

/// The owner goes to sleep while another processor posts: the owner sees the post, stays awake, or is kicked.
template <Weak weak>
struct Sleep : rl::test_suite<Sleep<weak>, 2> {
    std::optional<Mailbox<weak>> mailbox;
    Node node;
    bool seen;
    bool asleep;
    bool kicked;

    void before() {
        mailbox.emplace();
        seen = asleep = kicked = false;
    }
    void thread(unsigned which) {
        if (which == 0) {
            node.number($) = 1;
            RL_ASSERT(mailbox->push(node));
            kicked = mailbox->raise_from_elsewhere();
        } else {
            for (int turn = 0; turn < 2 && !asleep; ++turn) {
                if (mailbox->clear() && mailbox->take_all() != nullptr) {
                    seen = true;
                }
                asleep = mailbox->falls_asleep();
                if (!asleep) {
                    mailbox->woke();
                }
            }
        }
    }
    void after() { RL_ASSERT(seen || !asleep || kicked); }
};

/// The owner closes while two others post: exactly the posts that were not refused are there, intact.
template <Weak weak>
struct Close : rl::test_suite<Close<weak>, 3> {
    std::optional<Mailbox<weak>> mailbox;
    Node nodes[2];
    bool pushed[2];
    bool seen[2];

    void before() {
        mailbox.emplace();
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
            pushed[which] = mailbox->push(nodes[which]);
        } else {
            look(mailbox->take_all());
            look(mailbox->close());
        }
    }
    void after() {
        RL_ASSERT(pushed[0] == seen[0] && pushed[1] == seen[1]);
        Node late;
        RL_ASSERT(!mailbox->push(late));
    }
};

/// A minimal service: the members that RaisedList uses, plus data from the raisers that drains record.
template <Weak weak>
struct Raisable {
    struct NodeLink {
        rl::var<Raisable*> value;
        NodeLink& operator=(Raisable* node) {
            value($) = node;
            return *this;
        }
        operator Raisable*() { return value($); }
    };
    typename ModelAtomics<weak>::template Cell<bool, MailboxCell::raised> raised{true};
    NodeLink next_raised;
    rl::atomic<unsigned> told[2]; // by raiser
    bool drained[2];
};

/// The owner's part of a turn, as in Executor::step().
template <Weak weak>
void take_raised(RaisedList<Raisable<weak>, ModelAtomics<weak>>& list) {
    for (Raisable<weak>* node = list.take_all(); node != nullptr;) {
        Raisable<weak>* following = node->next_raised;
        list.lower(*node);
        for (unsigned i = 0; i < 2; ++i) {
            node->drained[i] = node->drained[i] || node->told[i].load(rl::mo_relaxed, $) != 0;
        }
        node = following;
    }
}

/// Two handlers or processors raise the same service during the owner's turn, or one of them sets only the flag, for
/// something else (`alone`): everything passed has been drained, or will be by the turn that the flag announces.
template <Weak weak, bool alone>
struct Services : rl::test_suite<Services<weak, alone>, 3> {
    std::optional<Mailbox<weak>> mailbox;
    std::optional<RaisedList<Raisable<weak>, ModelAtomics<weak>>> list;
    std::optional<Raisable<weak>> node;

    void before() {
        mailbox.emplace();
        list.emplace();
        node.emplace();
        for (unsigned i = 0; i < 2; ++i) {
            node->told[i].store(0, rl::mo_relaxed, $);
            node->drained[i] = false;
        }
        list->attach(*node);
    }
    void turn() {
        if (mailbox->clear()) {
            take_raised(*list);
        }
    }
    void thread(unsigned which) {
        if (which == 1 && alone) {
            mailbox->raise();
        } else if (which < 2) {
            node->told[which].store(1, rl::mo_relaxed, $);
            if (list->add(*node)) {
                mailbox->raise();
            }
        } else {
            turn();
        }
    }
    void after() {
        turn();
        RL_ASSERT(node->drained[0] && (alone || node->drained[1]));
    }
};

/// Raised again while it is being taken: the link belongs to one side at a time.
template <Weak weak>
struct RaisedTwice : rl::test_suite<RaisedTwice<weak>, 2> {
    std::optional<Mailbox<weak>> mailbox;
    std::optional<RaisedList<Raisable<weak>, ModelAtomics<weak>>> list;
    std::optional<Raisable<weak>> node;
    rl::var<unsigned> written;

    void before() {
        mailbox.emplace();
        list.emplace();
        node.emplace();
        for (unsigned i = 0; i < 2; ++i) {
            node->told[i].store(0, rl::mo_relaxed, $);
            node->drained[i] = false;
        }
        list->attach(*node);
    }
    void turn() {
        if (mailbox->clear()) {
            take_raised(*list);
        }
    }
    void thread(unsigned which) {
        if (which == 0) {
            for (unsigned i = 0; i < 2; ++i) {
                node->told[i].store(1, rl::mo_relaxed, $);
                if (list->add(*node)) {
                    mailbox->raise();
                }
            }
        } else {
            turn();
            turn();
        }
    }
    void after() {
        turn();
        RL_ASSERT(node->drained[0] && node->drained[1]);
    }
};

/// Raised on another processor while the owner goes to sleep: drained, or awake, or kicked.
template <Weak weak>
struct RaisedAsleep : rl::test_suite<RaisedAsleep<weak>, 2> {
    std::optional<Mailbox<weak>> mailbox;
    std::optional<RaisedList<Raisable<weak>, ModelAtomics<weak>>> list;
    std::optional<Raisable<weak>> node;
    bool asleep;
    bool kicked;

    void before() {
        mailbox.emplace();
        list.emplace();
        node.emplace();
        for (unsigned i = 0; i < 2; ++i) {
            node->told[i].store(0, rl::mo_relaxed, $);
            node->drained[i] = false;
        }
        list->attach(*node);
        asleep = kicked = false;
    }
    void thread(unsigned which) {
        if (which == 0) {
            node->told[0].store(1, rl::mo_relaxed, $);
            kicked = list->add(*node) && mailbox->raise_from_elsewhere();
        } else {
            for (int turn = 0; turn < 2 && !asleep; ++turn) {
                if (mailbox->clear()) {
                    take_raised(*list);
                }
                asleep = mailbox->falls_asleep();
                if (!asleep) {
                    mailbox->woke();
                }
            }
        }
    }
    void after() { RL_ASSERT(node->drained[0] || !asleep || kicked); }
};

/// The owner removes a service while another processor raises it: afterwards it is in no list, and cannot be added to
/// one.
template <Weak weak, bool waits>
struct Removed : rl::test_suite<Removed<weak, waits>, 2> {
    std::optional<RaisedList<Raisable<weak>, ModelAtomics<weak>>> list;
    std::optional<Raisable<weak>> node;

    void before() {
        list.emplace();
        node.emplace();
        list->attach(*node);
    }
    void thread(unsigned which) {
        if (which == 0) {
            static_cast<void>(list->add(*node));
            static_cast<void>(list->add(*node));
        } else if (list->detach(*node)) {
            // as in Executor::remove(); without the wait a node being pushed is missed
            for (bool found = false; !found; rl::yield(1, $)) {
                found = list->take_all() != nullptr || !waits;
            }
        }
    }
    void after() { RL_ASSERT(list->take_all() == nullptr); }
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
    must<Close<Weak::nothing>>(true, "a closing mailbox loses no post that it took");
    must<Close<Weak::push>>(false, "… pushed relaxed");
    must<Close<Weak::take>>(false, "… closed relaxed");
    must<Raise<Weak::nothing>>(true, "what a handler wrote is seen by the turn that it raised");
    must<Raise<Weak::raise>>(false, "… raised relaxed");
    must<Raise<Weak::clear>>(false, "… cleared relaxed");
    must<Raise<Weak::wake_plain>>(true, "… set by a store, where one handler alone raises");
    must<Sleep<Weak::nothing>>(true, "no post is slept through");
    must<Sleep<Weak::wake_store>>(false, "… the flag stored with release");
    must<Sleep<Weak::asleep_store>>(false, "… asleep stored with release");
    must<Sleep<Weak::wake_load>>(false, "… the flag loaded with acquire");
    must<Sleep<Weak::asleep_load>>(false, "… asleep loaded with acquire");
    must<Services<Weak::nothing, false>>(true, "a service that two raise is drained after both");
    must<Services<Weak::add_release, false>>(false, "… added without release");
    must<Services<Weak::lower_acquire, false>>(false, "… lowered without acquire");
    must<Services<Weak::nothing, true>>(true, "a service is drained also when the flag is raised for something else");
    must<Services<Weak::wake_plain, true>>(false, "… the flag set by a store");
    must<Services<Weak::raise, true>>(false, "… the flag raised relaxed");
    must<Services<Weak::clear, true>>(false, "… the flag cleared relaxed");
    must<Services<Weak::add_push, true>>(false, "… pushed relaxed: the flag is not what orders the link then");
    must<Services<Weak::raised_take, true>>(false, "… taken relaxed");
    must<RaisedTwice<Weak::nothing>>(true, "a service may be raised while it is taken");
    must<RaisedTwice<Weak::add_acquire>>(false, "… added without acquire");
    must<RaisedTwice<Weak::lower_release>>(false, "… lowered without release");
    must<RaisedAsleep<Weak::nothing>>(true, "no raise is slept through");
    must<RaisedAsleep<Weak::wake_store>>(false, "… the flag exchanged with release");
    must<RaisedAsleep<Weak::asleep_store>>(false, "… asleep stored with release");
    must<RaisedAsleep<Weak::wake_load>>(false, "… the flag loaded with acquire");
    must<RaisedAsleep<Weak::asleep_load>>(false, "… asleep loaded with acquire");
    must<Removed<Weak::nothing, true>>(true, "a service that is removed is in no list");
    must<Removed<Weak::nothing, false>>(false, "… without waiting for a raise that is under way");
    std::cout << (failures == 0 ? "all as expected\n" : "some were not as expected\n");
    return failures == 0 ? 0 : 1;
}
