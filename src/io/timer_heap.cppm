// An intrusive pairing heap [pairing-heap] for the executor's timers. Allocates nothing and never recurses. Adding
// costs one comparison; removing any node costs O(log n) comparisons, amortized.
export module io.timer_heap;
import core.std;

export namespace fl::io {

/// Base of a node; used by the heap while the node is in it.
template <class T>
struct HeapLinks {
    T* child = nullptr;   // first child
    T* sibling = nullptr; // next sibling
    T* above = nullptr;   // previous sibling; for a first child: its parent; for the root: nullptr
};

/// T derives from HeapLinks<T>. Before: a default-constructible strict ordering of two nodes. Not thread-safe.
template <class T, class Before>
class PairingHeap {
  public:
    PairingHeap() = default;
    PairingHeap(const PairingHeap&) = delete;
    PairingHeap& operator=(const PairingHeap&) = delete;

    bool empty() const { return root_ == nullptr; }
    /// The first node in the order; nullptr: the heap is empty.
    T* first() const { return root_; }
    /// The node must not be in any heap.
    void add(T& node) {
        node.child = node.sibling = node.above = nullptr;
        root_ = root_ == nullptr ? &node : meld(*root_, node);
    }
    /// The node must be in this heap.
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
    /// Empties the heap and calls f(node) for each node, in no particular order; f may add the node again.
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
    // Merges two roots: the later one becomes the other's first child.
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
    // Merges a list of siblings into one tree: in pairs from left to right, then the pairs from right to left. The
    // two passes give the amortized bound.
    static T* combine(T* list) {
        T* pairs = nullptr; // in reverse order
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
