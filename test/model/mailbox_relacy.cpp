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

/// What is weakened in the present run. A variable, not a template parameter: relacy is compiled anew for every type of
/// test, which takes seconds.
Weak weak = Weak::nothing;

constexpr rl::memory_order order_of(std::memory_order order) {
    switch (order) {
    case std::memory_order_relaxed: return rl::mo_relaxed;
    case std::memory_order_release: return rl::mo_release;
    case std::memory_order_acquire: return rl::mo_acquire;
    case std::memory_order_seq_cst: return rl::mo_seq_cst;
    default: return rl::mo_acq_rel;
    }
}

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

using Mailbox = BasicMailbox<Node, ModelAtomics>;

/// Two producers, one owner: every post arrives once, intact, in its producer's order.
struct Posts : rl::test_suite<Posts, 3> {
    std::optional<Mailbox> mailbox;
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
struct Raise : rl::test_suite<Raise, 2> {
    std::optional<Mailbox> mailbox;
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
struct Sleep : rl::test_suite<Sleep, 2> {
    std::optional<Mailbox> mailbox;
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
            kicked = mailbox->raise_remote();
        } else {
            for (int turn = 0; turn < 2 && !asleep; ++turn) {
                if (mailbox->clear() && mailbox->take_all() != nullptr) {
                    seen = true;
                }
                asleep = mailbox->begin_sleep();
                if (!asleep) {
                    mailbox->end_sleep();
                }
            }
        }
    }
    void after() { RL_ASSERT(seen || !asleep || kicked); }
};

/// The owner closes while two others post: exactly the posts that were not refused are there, intact.
struct Close : rl::test_suite<Close, 3> {
    std::optional<Mailbox> mailbox;
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
struct Raisable {
    struct NodeLink {
        rl::var<Raisable*> value;
        NodeLink& operator=(Raisable* node) {
            value($) = node;
            return *this;
        }
        operator Raisable*() { return value($); }
    };
    ModelAtomics::Cell<bool, MailboxCell::raised> raised{true};
    NodeLink next_raised;
    rl::atomic<unsigned> delivered[2]; // by raiser
    bool drained[2];
};

/// The owner's part of a turn, as in Executor::step().
void take_raised(RaisedList<Raisable, ModelAtomics>& list) {
    for (Raisable* node = list.take_all(); node != nullptr;) {
        Raisable* following = node->next_raised;
        list.lower(*node);
        for (unsigned i = 0; i < 2; ++i) {
            node->drained[i] = node->drained[i] || node->delivered[i].load(rl::mo_relaxed, $) != 0;
        }
        node = following;
    }
}

/// Two handlers or processors raise the same service during the owner's turn, or one of them sets only the flag, for
/// something else (`alone`): everything passed has been drained, or will be by the turn that the flag announces.
template <bool alone>
struct Services : rl::test_suite<Services<alone>, 3> {
    std::optional<Mailbox> mailbox;
    std::optional<RaisedList<Raisable, ModelAtomics>> list;
    std::optional<Raisable> node;

    void before() {
        mailbox.emplace();
        list.emplace();
        node.emplace();
        for (unsigned i = 0; i < 2; ++i) {
            node->delivered[i].store(0, rl::mo_relaxed, $);
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
            node->delivered[which].store(1, rl::mo_relaxed, $);
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
struct RaisedTwice : rl::test_suite<RaisedTwice, 2> {
    std::optional<Mailbox> mailbox;
    std::optional<RaisedList<Raisable, ModelAtomics>> list;
    std::optional<Raisable> node;
    rl::var<unsigned> written;

    void before() {
        mailbox.emplace();
        list.emplace();
        node.emplace();
        for (unsigned i = 0; i < 2; ++i) {
            node->delivered[i].store(0, rl::mo_relaxed, $);
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
                node->delivered[i].store(1, rl::mo_relaxed, $);
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
struct RaisedAsleep : rl::test_suite<RaisedAsleep, 2> {
    std::optional<Mailbox> mailbox;
    std::optional<RaisedList<Raisable, ModelAtomics>> list;
    std::optional<Raisable> node;
    bool asleep;
    bool kicked;

    void before() {
        mailbox.emplace();
        list.emplace();
        node.emplace();
        for (unsigned i = 0; i < 2; ++i) {
            node->delivered[i].store(0, rl::mo_relaxed, $);
            node->drained[i] = false;
        }
        list->attach(*node);
        asleep = kicked = false;
    }
    void thread(unsigned which) {
        if (which == 0) {
            node->delivered[0].store(1, rl::mo_relaxed, $);
            kicked = list->add(*node) && mailbox->raise_remote();
        } else {
            for (int turn = 0; turn < 2 && !asleep; ++turn) {
                if (mailbox->clear()) {
                    take_raised(*list);
                }
                asleep = mailbox->begin_sleep();
                if (!asleep) {
                    mailbox->end_sleep();
                }
            }
        }
    }
    void after() { RL_ASSERT(node->drained[0] || !asleep || kicked); }
};

/// The owner removes a service while another processor raises it: afterwards it is in no list, and cannot be added to
/// one.
template <bool waits>
struct Removed : rl::test_suite<Removed<waits>, 2> {
    std::optional<RaisedList<Raisable, ModelAtomics>> list;
    std::optional<Raisable> node;

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
void must(bool pass, std::string_view what, Weak weakened = Weak::nothing) {
    weak = weakened;
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
    must<Posts>(true, "posts arrive whole, once, in order");
    must<Posts>(false, "… pushed relaxed", Weak::push);
    must<Posts>(false, "… taken relaxed", Weak::take);
    must<Close>(true, "a closing mailbox loses no post that it took");
    must<Close>(false, "… pushed relaxed", Weak::push);
    must<Close>(false, "… closed relaxed", Weak::take);
    must<Raise>(true, "what a handler wrote is seen by the turn that it raised");
    must<Raise>(false, "… raised relaxed", Weak::raise);
    must<Raise>(false, "… cleared relaxed", Weak::clear);
    must<Raise>(true, "… set by a store, where one handler alone raises", Weak::wake_plain);
    must<Sleep>(true, "no post is slept through");
    must<Sleep>(false, "… the flag stored with release", Weak::wake_store);
    must<Sleep>(false, "… asleep stored with release", Weak::asleep_store);
    must<Sleep>(false, "… the flag loaded with acquire", Weak::wake_load);
    must<Sleep>(false, "… asleep loaded with acquire", Weak::asleep_load);
    must<Services<false>>(true, "a service that two raise is drained after both");
    must<Services<false>>(false, "… added without release", Weak::add_release);
    must<Services<false>>(false, "… lowered without acquire", Weak::lower_acquire);
    must<Services<true>>(true, "a service is drained also when the flag is raised for something else");
    must<Services<true>>(false, "… the flag set by a store", Weak::wake_plain);
    must<Services<true>>(false, "… the flag raised relaxed", Weak::raise);
    must<Services<true>>(false, "… the flag cleared relaxed", Weak::clear);
    must<Services<true>>(false, "… pushed relaxed: the flag is not what orders the link then", Weak::add_push);
    must<Services<true>>(false, "… taken relaxed", Weak::raised_take);
    must<RaisedTwice>(true, "a service may be raised while it is taken");
    must<RaisedTwice>(false, "… added without acquire", Weak::add_acquire);
    must<RaisedTwice>(false, "… lowered without release", Weak::lower_release);
    must<RaisedAsleep>(true, "no raise is slept through");
    must<RaisedAsleep>(false, "… the flag exchanged with release", Weak::wake_store);
    must<RaisedAsleep>(false, "… asleep stored with release", Weak::asleep_store);
    must<RaisedAsleep>(false, "… the flag loaded with acquire", Weak::wake_load);
    must<RaisedAsleep>(false, "… asleep loaded with acquire", Weak::asleep_load);
    must<Removed<true>>(true, "a service that is removed is in no list");
    must<Removed<false>>(false, "… without waiting for a raise that is under way");
    std::cout << (failures == 0 ? "all as expected\n" : "some were not as expected\n");
    return failures == 0 ? 0 : 1;
}
