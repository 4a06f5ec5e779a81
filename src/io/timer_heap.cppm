// A pairing heap [pairing-heap] of nodes that somebody else owns: what the executor keeps its timers in. Nothing is
// allocated, and no operation recurses. Adding costs one comparison; taking the first one, or any one, O(log n)
// comparisons on average over all operations.
export module io.timer_heap;
import core.std;

export namespace fl::io {

/// Base of a node; belongs to the heap while the node is in it.
template <class T>
struct HeapLinks {
    T* child = nullptr;   // the first one
    T* sibling = nullptr; // the next one
    T* above = nullptr;   // the sibling before; of a first child: the parent; of the root: nullptr
};

/// T derives from HeapLinks<T>. Before: a default-constructible function of two nodes, a strict order. Not thread-safe.
template <class T, class Before>
class PairingHeap {
  public:
    PairingHeap() = default;
    PairingHeap(const PairingHeap&) = delete;
    PairingHeap& operator=(const PairingHeap&) = delete;

    bool empty() const { return root_ == nullptr; }
    /// The first one in the order; nullptr: the heap is empty.
    T* first() const { return root_; }
    /// A node that is in no heap.
    void add(T& node) {
        node.child = node.sibling = node.above = nullptr;
        root_ = root_ == nullptr ? &node : meld(*root_, node);
    }
    /// A node that is in this heap.
    void remove(T& node) {
        T* const below = combine(std::exchange(node.child, nullptr));
        if (&node == root_) {
            root_ = below;
            return;
        }
        (node.above->child == &node ? node.above->child : node.above->sibling) = node.sibling;
        if (node.sibling != nullptr) {
            node.sibling->above = node.above;
        }
        node.sibling = node.above = nullptr;
        if (below != nullptr) {
            root_ = meld(*root_, *below);
        }
    }
    /// Empties the heap: f(node) for each one, in no order, which may add it again.
    template <class F>
    void take_all(F&& f) {
        T* list = std::exchange(root_, nullptr);
        while (list != nullptr) {
            T& node = *list;
            list = node.sibling;
            if (T* const children = std::exchange(node.child, nullptr); children != nullptr) {
                T* last = children;
                while (last->sibling != nullptr) {
                    last = last->sibling;
                }
                last->sibling = list;
                list = children;
            }
            node.sibling = node.above = nullptr;
            f(node);
        }
    }

  private:
    // Two roots become one: the later one is the other's first child.
    static T* meld(T& a, T& b) {
        T* first = &a;
        T* second = &b;
        if (Before{}(b, a)) {
            first = &b;
            second = &a;
        }
        second->sibling = first->child;
        if (first->child != nullptr) {
            first->child->above = second;
        }
        second->above = first;
        first->child = second;
        return first;
    }
    // A list of siblings becomes one tree: neighbours in pairs from the left, then the pairs from the right. The two
    // passes are what bounds the cost.
    static T* combine(T* list) {
        T* pairs = nullptr; // the last one first
        while (list != nullptr) {
            T* one = list;
            T* const two = one->sibling;
            list = two == nullptr ? nullptr : std::exchange(two->sibling, nullptr);
            one->sibling = one->above = nullptr;
            if (two != nullptr) {
                two->above = nullptr;
                one = meld(*one, *two);
            }
            one->sibling = pairs;
            pairs = one;
        }
        T* root = pairs;
        if (root != nullptr) {
            pairs = std::exchange(root->sibling, nullptr);
            while (pairs != nullptr) {
                T* const next = std::exchange(pairs->sibling, nullptr);
                root = meld(*root, *pairs);
                pairs = next;
            }
        }
        return root;
    }

    T* root_ = nullptr;
};

} // namespace fl::io
