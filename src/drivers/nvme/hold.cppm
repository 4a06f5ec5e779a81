// How the queues of an NVMe controller, each on its processor, stop touching their rings while the controller is reset.
// Generic over its atomics, so that test/model runs the same code under a memory model.
//
//   task:  hold() ──every queue is quiet()──> new rings ──> release()
//   queue: running ──look()──> held ──resume(): quiet … the hold is over──> returning ──run()──> running
//
// Each hold has its own odd number: a queue that was quiet in an earlier one is not yet quiet in this one.
//
//   atomic   ordering         written by  read by   orders
//   epoch_   release/acquire  the task    queues    even: the new rings before their first use
//   quiet_   release/acquire  the queue   the task  the queue's last access before the new rings
export module drivers.nvme.hold;
import core.std;

export namespace fl::drivers::nvme {

/// Identifies an atomic; the model weakens the orderings of one at a time.
enum class HoldCell : u8 { epoch, quiet };

struct StdHoldAtomics {
    template <class T, HoldCell>
    using Cell = std::atomic<T>;
};

/// Of one controller.
template <class Atomics = StdHoldAtomics>
class BasicHold {
  public:
    /// By the task: from now on each queue becomes quiet in its next turns.
    void hold() { epoch_.store(epoch() | 1, std::memory_order_release); }
    /// By the task, once all queues are quiet: they may use their new rings. Release: pairs with epoch()'s acquire.
    void release() { epoch_.store(epoch() + 1, std::memory_order_release); }
    inline u32 epoch() const { return epoch_.load(std::memory_order_acquire); }
    inline bool holds() const { return (epoch() & 1) != 0; }

  private:
    typename Atomics::template Cell<u32, HoldCell::epoch> epoch_{0};
};

/// Of one queue; on its processor, except quiet().
template <class Atomics = StdHoldAtomics>
class BasicHeldQueue {
  public:
    using Hold = BasicHold<Atomics>;

    inline bool running() const { return state_ == State::running; }
    /// The queue may not access its rings.
    inline bool held() const { return state_ == State::held; }
    /// By the task, after hold(). Acquire: pairs with the release in resume().
    bool quiet(const Hold& hold) const { return quiet_.load(std::memory_order_acquire) == hold.epoch(); }

    /// While running. True: the queue is held from now on. What this turn still does may access the rings: it is quiet
    /// only from the next turn on.
    inline bool look(const Hold& hold) {
        if (!hold.holds()) [[likely]] {
            return false;
        }
        state_ = State::held;
        return true;
    }
    /// While held, at the beginning of a turn: the queue is quiet, until the hold is over, which is true.
    bool resume(const Hold& hold) {
        if (const u32 epoch = hold.epoch(); (epoch & 1) != 0) {
            quiet_.store(epoch, std::memory_order_release);
            return false;
        }
        state_ = State::returning;
        return true;
    }
    /// While returning.
    void run() { state_ = State::running; }

  private:
    enum class State : u8 { running, held, returning };

    State state_ = State::running;
    typename Atomics::template Cell<u32, HoldCell::quiet> quiet_{0}; // the epoch in which it is quiet
};

using Hold = BasicHold<>;
using HeldQueue = BasicHeldQueue<>;

} // namespace fl::drivers::nvme
