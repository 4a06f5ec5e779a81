// What other processors and interrupt handlers share with an executor: a list of posts that any processor adds to, a
// list of the services that were raised, the flag that says "look again", and the rule by which a processor that may
// halt is kicked. Generic over its atomics, so that test/model runs the very code under a model of memory.
//
//   atomic   ordering         written by                        read by                        orders
//   head_    release/acquire  push() on any processor           take_all(), close() on owner   the post and its link
//   wake_    release/acquire  raise() on any, clear() on owner  clear() on owner               what came before raise()
//   wake_, asleep_  seq_cst   raise_from_elsewhere(): wake_ then asleep_; falls_asleep(): asleep_ then wake_.
//                             In the one order of all four at least one side sees the other: the owner stays awake,
//                             or the other side kicks it.
//   raised   acq_rel          RaisedList::add() on any,         add() on any, lower() on owner what came before add();
//                             lower(), detach() on owner                                       reuse of next_raised
//   RaisedList::head_         as head_
//
// wake_ and raised are set by exchanges and not by stores: an exchange continues the release sequence of the one
// before it, so the owner that reads the last of several raises sees what came before all of them.
export module io.mailbox;
import core.std;

export namespace fl::io {

/// Which atomic; the model takes the orderings of one away at a time.
enum class MailboxCell : u8 { head, wake, asleep, raised, raised_head };

struct StdAtomics {
    template <class T, MailboxCell>
    using Cell = std::atomic<T>;
};

/// Node: has a member `next`, a pointer to Node that belongs to the mailbox from push() to take_all().
template <class Node, class Atomics = StdAtomics>
class BasicMailbox {
  public:
    /// Any processor. The node must live until the owner has it out of take_all() or close(). A wake-up is the caller's
    /// part: raise() or raise_from_elsewhere() after it. False: the mailbox is closed, and nobody has the node.
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
    void raise() { wake_.exchange(true, std::memory_order_release); }
    /// From another processor. True: the owner may be halting and must be kicked. See the table above for the two
    /// seq_cst.
    bool raise_from_elsewhere() {
        wake_.exchange(true, std::memory_order_seq_cst);
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

    const typename Atomics::template Cell<bool, MailboxCell::wake>& wake_flag() const { return wake_; }

  private:
    // No node: an address that none of them can have.
    Node* closed() { return reinterpret_cast<Node*>(this); }
    Node* take(Node* left) {
        // Empty as a rule: then a load is enough, since a push that came before the raise that brought us here is seen.
        if (left == nullptr && head_.load(std::memory_order_relaxed) == nullptr) {
            return nullptr;
        }
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

    typename Atomics::template Cell<Node*, MailboxCell::head> head_{nullptr};
    typename Atomics::template Cell<bool, MailboxCell::wake> wake_{false};
    typename Atomics::template Cell<bool, MailboxCell::asleep> asleep_{false};
};

/// The nodes that were raised since the owner last took them. Node has two members that belong to this list: `raised`,
/// a Cell<bool, MailboxCell::raised> that begins as true, and `next_raised`, a pointer to Node.
///
///   raised  node is                        add()              next
///   true    detached                       does nothing       attach() → false
///   false   attached, nothing happened     adds it → true     detach() → true
///   true    in the list, or being added    does nothing       lower() → false; detach() → true
///
/// A node that is raised again before lower() is not added twice: the drain that follows lower() sees what came before
/// both. After lower() it is added again. So nothing that happens before add() is missed by the last drain.
template <class Node, class Atomics = StdAtomics>
class RaisedList {
  public:
    /// Any processor and handler, while the node lives. True: the caller now raises the wake flag (BasicMailbox::raise).
    /// False: whoever added it does, or nobody attends to the node.
    bool add(Node& node) {
        // Release: partner is the acquire in lower(), so that the drain sees what came before. Acquire: partner is the
        // release in lower(), so that the link is read there before it is written here.
        if (node.raised.exchange(true, std::memory_order_acq_rel)) {
            return false;
        }
        Node* first = head_.load(std::memory_order_relaxed);
        do {
            node.next_raised = first;
            // Release: partner is the acquire in take_all().
        } while (!head_.compare_exchange_weak(first, &node, std::memory_order_release, std::memory_order_relaxed));
        return true;
    }
    /// The owner, after BasicMailbox::clear(): everything that was added, in order of arrival, linked by next_raised. It
    /// reads a node's link and calls lower() before it looks at what the node stands for.
    Node* take_all() {
        if (head_.load(std::memory_order_relaxed) == nullptr) { // as in BasicMailbox::take_all()
            return nullptr;
        }
        Node* newest = head_.exchange(nullptr, std::memory_order_acquire); // acquire: partner is the release in add()
        Node* oldest = nullptr;
        while (newest != nullptr) {
            Node* older = newest->next_raised;
            newest->next_raised = oldest;
            oldest = newest;
            newest = older;
        }
        return oldest;
    }
    /// The owner: the node may be added again. See add() for acquire and release.
    static void lower(Node& node) { node.raised.exchange(false, std::memory_order_acq_rel); }
    /// The owner: from here on the node may be added.
    static void attach(Node& node) { node.raised.exchange(false, std::memory_order_acq_rel); }
    /// The owner, on a node that is attached: it is not added from here on. True: it is in the list, or a processor is
    /// about to add it: the owner calls take_all() until it comes.
    [[nodiscard]] static bool detach(Node& node) { return node.raised.exchange(true, std::memory_order_acq_rel); }

  private:
    typename Atomics::template Cell<Node*, MailboxCell::raised_head> head_{nullptr};
};

} // namespace fl::io
