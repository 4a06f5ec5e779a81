// The one door into an executor from other processors and from interrupt handlers: a list of posts that any processor
// adds to, the flag that says "look again", and the rule by which a processor that may halt is kicked. Generic over its
// atomics, so that test/model runs the very code under a model of memory.
//
//   atomic   ordering         written by                        read by                        orders
//   head_    release/acquire  push() on any processor           take_all(), close() on owner   the post and its link
//   wake_    release/acquire  raise() on any, clear() on owner  clear() on owner               what came before raise()
//   wake_, asleep_  seq_cst   raise_from_elsewhere(): wake_ then asleep_; falls_asleep(): asleep_ then wake_.
//                             In the one order of all four at least one side sees the other: the owner stays awake,
//                             or the other side kicks it.
export module io.door;
import core.std;

export namespace fl::io {

/// Which atomic of the door; the model takes the orderings of one away at a time.
enum class DoorCell : u8 { head, wake, asleep };

struct StdAtomics {
    template <class T, DoorCell>
    using Cell = std::atomic<T>;
};

/// Node: has a member `next`, a pointer to Node that belongs to the door from push() to take_all().
template <class Node, class Atomics = StdAtomics>
class BasicDoor {
  public:
    /// Any processor. The node must live until the owner has it out of take_all() or close(). A wake-up is the caller's
    /// part: raise() or raise_from_elsewhere() after it. False: the door is closed, and nobody has the node.
    [[nodiscard]] bool push(Node& node) {
        Node* first = head_.load(std::memory_order_relaxed);
        do {
            if (first == closed()) {
                return false;
            }
            node.next = first;
            // Release: partner is the acquire in take_all() and close(). A failed exchange reads nothing but the
            // pointer.
        } while (!head_.compare_exchange_weak(first, &node, std::memory_order_release, std::memory_order_relaxed));
        return true;
    }
    /// The owner: everything that is there, in order of arrival, linked by `next`. Not after close().
    Node* take_all() { return take(nullptr); }
    /// The owner, once: everything that is there, and from here on push() is refused.
    Node* close() { return take(closed()); }

    /// From a handler on the owner's processor, or from the owner itself. Release: partner is the acquire in clear().
    void raise() { wake_.store(true, std::memory_order_release); }
    /// From another processor. True: the owner may be halting and must be kicked. See the table above for the two
    /// seq_cst.
    bool raise_from_elsewhere() {
        wake_.store(true, std::memory_order_seq_cst);
        return asleep_.load(std::memory_order_seq_cst);
    }
    /// The owner, before it looks at everything: true when something was raised since the last time. What is raised
    /// from here on is either seen by what follows or left for the next time.
    bool clear() {
        if (!wake_.load(std::memory_order_relaxed)) {
            return false;
        }
        // An exchange, not a store: it reads the latest raise, and acquire orders everything before that raise.
        wake_.exchange(false, std::memory_order_acquire);
        return true;
    }
    /// Relaxed: nothing is read on the strength of it.
    bool raised() const { return wake_.load(std::memory_order_relaxed); }
    /// The owner, before it halts: false when something was raised. From a true on, others kick.
    bool falls_asleep() {
        asleep_.store(true, std::memory_order_seq_cst);
        return !wake_.load(std::memory_order_seq_cst);
    }
    /// Relaxed: a stale `asleep` costs a kick for nothing.
    void woke() { asleep_.store(false, std::memory_order_relaxed); }

    const typename Atomics::template Cell<bool, DoorCell::wake>& wake_flag() const { return wake_; }

  private:
    // No node: an address that none of them can have.
    Node* closed() { return reinterpret_cast<Node*>(this); }
    Node* take(Node* left) {
        // The list is taken as a whole, so an address that comes back (ABA) does no harm. Acquire: partner is the
        // release in push(); each exchange continues the release sequence of those before it.
        Node* newest = head_.exchange(left, std::memory_order_acquire);
        Node* oldest = nullptr;
        while (newest != nullptr) {
            Node* older = newest->next;
            newest->next = oldest;
            oldest = newest;
            newest = older;
        }
        return oldest;
    }

    typename Atomics::template Cell<Node*, DoorCell::head> head_{nullptr};
    typename Atomics::template Cell<bool, DoorCell::wake> wake_{false};
    typename Atomics::template Cell<bool, DoorCell::asleep> asleep_{false};
};

} // namespace fl::io
