// State that other processors and interrupt handlers share with an executor: a list of posts that any processor
// appends to, a list of raised services, the wake flag, and the protocol for kicking a processor that may halt.
// Generic over its atomics, so that test/model runs the same code under a memory model.
//
//   atomic   ordering         written by                        read by                        orders
//   head_    release/acquire  push() on any processor           take_all(), close() on owner   the post and its link
//   wake_    release/acquire  raise() on any, clear() on owner  clear() on owner               writes before raise()
//   wake_, asleep_  seq_cst   raise_remote(): wake_ then asleep_; begin_sleep(): asleep_ then wake_.
//                             In the single total order of all four at least one side sees the other: the owner stays
//                             awake, or the other processor kicks it.
//   raised   acq_rel          RaisedList::add() on any,         add() on any, lower() on owner writes before add();
//                             lower(), detach() on owner                                       reuse of next_raised
//   RaisedList::head_         as head_
//
// wake_ and raised are set by exchanges, not stores: an exchange continues the release sequence of the previous one,
// so the owner that reads the last of several raises sees the writes before all of them.
export module io.mailbox;
import core.std;

export namespace fl::io {

/// Identifies an atomic; the model weakens the orderings of one at a time.
enum class MailboxCell : u8 { head, wake, asleep, raised, raised_head };

struct StdAtomics {
    template <class T, MailboxCell>
    using Cell = std::atomic<T>;
};

/// Node: has a member `next`, a pointer to Node, which the mailbox owns from push() to take_all().
template <class Node, class Atomics = StdAtomics>
class BasicMailbox {
  public:
    /// Callable on any processor. The node must live until the owner has received it from take_all() or close(). The
    /// caller must then wake the owner: raise() or raise_remote(). False: the mailbox is closed and the node
    /// was not added.
    [[nodiscard]] bool push(Node& node) {
        Node* first = head_.load(std::memory_order_relaxed);
        do {
            if (first == closed()) {
                return false;
            }
            node.next = first;
            // Release: pairs with the acquire in take_all() and close(). A failed exchange reads only the pointer.
        } while (!head_.compare_exchange_weak(first, &node, std::memory_order_release, std::memory_order_relaxed));
        return true;
    }
    /// Owner only: all queued nodes in FIFO order, linked by `next`. Not after close().
    Node* take_all() { return take(nullptr); }
    /// Owner only, once: all queued nodes; later push() calls fail.
    Node* close() { return take(closed()); }

    /// From a handler on the owner's processor, or from the owner itself. Release: pairs with the acquire in clear().
    void raise() { wake_.exchange(true, std::memory_order_release); }
    /// From another processor. True: the owner may be halting and must be kicked. For the seq_cst pair see the table
    /// above.
    bool raise_remote() {
        wake_.exchange(true, std::memory_order_seq_cst);
        return asleep_.load(std::memory_order_seq_cst);
    }
    /// Owner only, before it checks all sources: true if raise() was called since the last clear(). A later raise is
    /// either seen by those checks or left for the next clear().
    bool clear() {
        if (!wake_.load(std::memory_order_relaxed)) {
            return false;
        }
        // An exchange, not a store: it reads the latest raise, and its acquire orders all writes before that raise.
        wake_.exchange(false, std::memory_order_acquire);
        return true;
    }
    /// Relaxed: orders no other data.
    bool raised() const { return wake_.load(std::memory_order_relaxed); }
    /// Owner only, before halting: false if something was raised. Once it returns true, other processors kick.
    bool begin_sleep() {
        asleep_.store(true, std::memory_order_seq_cst);
        return !wake_.load(std::memory_order_seq_cst);
    }
    /// Relaxed: a stale `asleep` only costs a needless kick.
    void end_sleep() { asleep_.store(false, std::memory_order_relaxed); }

    const typename Atomics::template Cell<bool, MailboxCell::wake>& wake_flag() const { return wake_; }

  private:
    // Marks a closed list: an address that no node can have.
    Node* closed() { return reinterpret_cast<Node*>(this); }
    Node* take(Node* left) {
        // Usually empty: then a load suffices, because a push before the raise that led here is visible.
        if (left == nullptr && head_.load(std::memory_order_relaxed) == nullptr) {
            return nullptr;
        }
        // The whole list is taken at once, so ABA is harmless. Acquire: pairs with the release in push(); each
        // exchange continues the release sequence of the previous ones.
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

/// Nodes raised since the owner last took them. Node has two members owned by this list: `raised`, a Cell<bool,
/// MailboxCell::raised> with initial value true, and `next_raised`, a pointer to Node.
///
///   raised  node is                        add()              next
///   true    detached                       does nothing       attach() → false
///   false   attached, nothing happened     adds it → true     detach() → true
///   true    in the list, or being added    does nothing       lower() → false; detach() → true
///
/// A node raised again before lower() is not added twice: the drain after lower() sees the writes before both. After
/// lower() it is added anew. Thus the last drain misses nothing that happened before add().
template <class Node, class Atomics = StdAtomics>
class RaisedList {
  public:
    /// Any processor or handler, while the node exists. True: the caller must raise the wake flag
    /// (BasicMailbox::raise). False: the processor that added it does so, or the node is detached.
    bool add(Node& node) {
        // Release: pairs with the acquire in lower(), so that the drain sees earlier writes. Acquire: pairs with the
        // release in lower(), so that the link is read there before it is overwritten here.
        if (node.raised.exchange(true, std::memory_order_acq_rel)) {
            return false;
        }
        Node* first = head_.load(std::memory_order_relaxed);
        do {
            node.next_raised = first;
            // Release: pairs with the acquire in take_all().
        } while (!head_.compare_exchange_weak(first, &node, std::memory_order_release, std::memory_order_relaxed));
        return true;
    }
    /// Owner only, after BasicMailbox::clear(): all added nodes in FIFO order, linked by next_raised. The owner must
    /// read a node's link and call lower() before it checks the node's event source.
    Node* take_all() {
        if (head_.load(std::memory_order_relaxed) == nullptr) { // as in BasicMailbox::take_all()
            return nullptr;
        }
        Node* newest = head_.exchange(nullptr, std::memory_order_acquire); // pairs with the release in add()
        Node* oldest = nullptr;
        while (newest != nullptr) {
            Node* older = newest->next_raised;
            newest->next_raised = oldest;
            oldest = newest;
            newest = older;
        }
        return oldest;
    }
    /// Owner only: allows the node to be added again. For acquire and release see add().
    static void lower(Node& node) { node.raised.exchange(false, std::memory_order_acq_rel); }
    /// Owner only: allows the node to be added.
    static void attach(Node& node) { node.raised.exchange(false, std::memory_order_acq_rel); }
    /// Owner only, on an attached node: prevents further additions. True: it is in the list, or another processor is
    /// about to add it: the owner must call take_all() until the node appears.
    [[nodiscard]] static bool detach(Node& node) { return node.raised.exchange(true, std::memory_order_acq_rel); }

  private:
    typename Atomics::template Cell<Node*, MailboxCell::raised_head> head_{nullptr};
};

} // namespace fl::io
