module io.task;
import core.std;

namespace fl::io {

namespace {
usize class_of(usize size) {
    usize i = 0;
    while (i < FramePool::classes.size() && FramePool::classes[i] < size) {
        ++i;
    }
    return i;
}
} // namespace

void* FramePool::allocate(usize size) noexcept {
    const usize i = class_of(size);
    if (i == classes.size() || (failing_ && left_ == 0)) {
        return nullptr;
    }
    void* block = nullptr;
    if (free_[i] != nullptr) {
        block = std::exchange(free_[i], free_[i]->next);
    } else if (used_ + classes[i] <= arena_bytes) {
        block = arena_.data() + used_;
        used_ += classes[i];
    } else {
        return nullptr;
    }
    if (failing_) {
        --left_;
    }
    ++allocations_;
    ++in_use_;
    return block;
}

void FramePool::free(void* block, usize size) noexcept {
    const usize i = class_of(size);
    if (--in_use_ == 0) {
        // Nobody has a frame: the arena is whole again, whatever sizes it had been cut into.
        free_ = {};
        used_ = 0;
        return;
    }
    free_[i] = new (block) Free{free_[i]};
}

namespace {
constinit FramePool pool{};
} // namespace

FramePool& frame_pool() { return pool; }

} // namespace fl::io
