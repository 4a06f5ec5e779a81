// The hold of an NVMe controller's queues (drivers.nvme.hold) under relacy: while the controller's task lays out new
// rings no queue touches its own, and afterwards each uses the new ones. As in mailbox_relacy.cpp, each property is
// tested unmodified, which must pass, and with each ordering or step that it needs weakened, which must fail.
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
#include "must.hpp"
import core.std;
import drivers.nvme.hold;

namespace {
using namespace fl;
using namespace fl::drivers::nvme;

/// The ordering, or the step, to weaken.
enum class Weak {
    nothing,
    hold,          // the epoch that begins a hold is stored relaxed
    release,       // the one that ends it
    epoch_load,    // relaxed
    quiet_store,   // relaxed
    quiet_load,    // relaxed
    same_turn,     // a queue is quiet in the turn in which it finds the hold, and still publishes
    number,        // a queue that was quiet in any hold is quiet
    without_quiet, // the task does not wait
};
Weak weak = Weak::nothing; // a variable, not a template parameter: see mailbox_relacy.cpp

template <HoldCell cell>
class ModelCell {
  public:
    ModelCell(u32 initial) : value_(initial) {}
    u32 load(std::memory_order) const {
        const bool relaxed = weak == (cell == HoldCell::epoch ? Weak::epoch_load : Weak::quiet_load);
        return value_.load(relaxed ? rl::mo_relaxed : rl::mo_acquire, $);
    }
    void store(u32 value, std::memory_order) {
        const Weak own = cell == HoldCell::quiet ? Weak::quiet_store : (value & 1) != 0 ? Weak::hold : Weak::release;
        value_.store(value, weak == own ? rl::mo_relaxed : rl::mo_release, $);
    }

  private:
    mutable rl::atomic<u32> value_;
};
struct ModelAtomics {
    template <class T, HoldCell cell>
    using Cell = ModelCell<cell>;
};

/// A task that resets the controller, and a queue on another processor. `again`: it is the second reset; the queue was
/// quiet in the first one, and has not come back yet. The task gives up if the queue is not quiet after two looks, as
/// it does after a time-out: loops would make the schedules too many.
template <bool again>
struct Resets : rl::test_suite<Resets<again>, 2> {
    std::optional<BasicHold<ModelAtomics>> hold;
    std::optional<BasicHeldQueue<ModelAtomics>> queue;
    std::optional<rl::var<unsigned>> ring; // how often it was laid out; a plain variable: a race if not ordered
    unsigned seen;                         // by the queue alone: the last one that it used
    unsigned laid_out;                     // by the task alone

    void before() {
        hold.emplace();
        queue.emplace();
        ring.emplace();
        (*ring)($) = 0;
        seen = laid_out = 0;
        if (again) {
            hold->hold();
            turn();
            turn();
            lay_out();
        }
    }
    void lay_out() {
        (*ring)($) = ++laid_out;
        hold->release();
    }
    /// The queue uses its rings.
    void use() {
        seen = (*ring)($);
        (*ring)($) = seen;
    }
    /// A turn of the queue, as Transport::next() and publish().
    void turn() {
        if (queue->held()) {
            if (!queue->resume(*hold)) {
                return;
            }
            queue->run();
        }
        use(); // completions
        if (queue->look(*hold)) {
            if (weak == Weak::same_turn) {
                static_cast<void>(queue->resume(*hold));
            }
            use(); // publishes
        }
    }
    bool is_quiet() const {
        return (weak == Weak::number && again) || weak == Weak::without_quiet || queue->quiet(*hold);
    }
    void thread(unsigned which) {
        if (which == 0) {
            hold->hold();
            if (is_quiet() || is_quiet()) {
                lay_out();
            }
        } else {
            for (unsigned n = 0; n < 4; ++n) {
                turn();
            }
        }
    }
    void after() {
        if (!hold->holds()) {
            turn();
            RL_ASSERT(queue->running() && seen == laid_out);
        }
    }
};

template <class Test>
void must(bool pass, std::string_view what, Weak weakened = Weak::nothing) {
    weak = weakened;
    model::must<Test>(pass, what);
}

} // namespace

int main() {
    must<Resets<false>>(true, "rings are laid out anew only while the queue is quiet");
    must<Resets<false>>(false, "… the end of the hold stored relaxed", Weak::release);
    must<Resets<false>>(false, "… the epoch loaded relaxed", Weak::epoch_load);
    must<Resets<false>>(false, "… quiet stored relaxed", Weak::quiet_store);
    must<Resets<false>>(false, "… quiet loaded relaxed", Weak::quiet_load);
    must<Resets<false>>(false, "… quiet in the turn that still publishes", Weak::same_turn);
    must<Resets<false>>(false, "… without waiting for the queue", Weak::without_quiet);
    must<Resets<false>>(true, "… the beginning of the hold stored relaxed: it passes no data", Weak::hold);
    must<Resets<true>>(true, "a queue that was quiet in an earlier reset is waited for again");
    must<Resets<true>>(false, "… quiet in any hold", Weak::number);
    must<Resets<true>>(false, "… quiet stored relaxed", Weak::quiet_store);
    must<Resets<true>>(true, "… the beginning of the hold stored relaxed", Weak::hold);
    return model::verdict();
}
