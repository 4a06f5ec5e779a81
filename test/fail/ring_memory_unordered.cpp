// A memory without acquire loads cannot be used for a ring.
// expect: does not satisfy 'RingMemory'
// expect: load_acquire
import core.std;
import core.result;
import io.ring;

namespace {
struct Unordered {
    fl::usize size() const { return 4096; }
    template <class W>
    W load_relaxed(fl::usize) const {
        return {};
    }
    template <class W>
    void store_relaxed(fl::usize, W) {}
    template <class W>
    void store_release(fl::usize, W) {}
    void full_barrier() const {}
    void copy_out(fl::usize, std::byte*, fl::usize) const {}
    void copy_in(fl::usize, const std::byte*, fl::usize) {}
};
[[maybe_unused]] void caller() {
    static_cast<void>(fl::io::Consumer<Unordered, fl::io::FreeRunning<fl::u32>, fl::io::Never>::create(
        {}, {.index = 0, .entries = 64, .stride = 16}, {}));
}
} // namespace
