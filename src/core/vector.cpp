module core.vector;
import core.std;

namespace fl::vector_detail {

namespace {
constinit u64 allocations_left = ~u64{0};
} // namespace

void* grow(void* old, usize used, usize bytes) {
    if (allocations_left == 0) {
        return nullptr;
    }
    void* const fresh = ::operator new(bytes, std::nothrow);
    if (fresh == nullptr) {
        return nullptr;
    }
    if (allocations_left != ~u64{0}) {
        --allocations_left;
    }
    if (used != 0) {
        std::memcpy(fresh, old, used);
    }
    if (old != nullptr) {
        ::operator delete(old);
    }
    return fresh;
}

void fail_after(u64 n) { allocations_left = n; }

} // namespace fl::vector_detail
