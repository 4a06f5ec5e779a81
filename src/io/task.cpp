module io.task;
import core.std;
import core.processor;
import core.spinlock;

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

FramePool::PageNumber FramePool::fresh_page(usize size_class) {
    PageNumber number = free_pages_;
    if (number != 0) {
        free_pages_ = page(number).next;
    } else if (touched_ < pages) {
        number = ++touched_;
    } else {
        return 0;
    }
    page(number) = Page{nullptr, 0, 0, 0, 0, static_cast<u8>(size_class)};
    link(number);
    return number;
}

void FramePool::link(PageNumber number) {
    PageNumber& first = partial_[page(number).size_class];
    page(number).next = first;
    page(number).previous = 0;
    if (first != 0) {
        page(first).previous = number;
    }
    first = number;
}

void FramePool::unlink(PageNumber number) {
    const Page& p = page(number);
    if (p.next != 0) {
        page(p.next).previous = p.previous;
    }
    (p.previous != 0 ? page(p.previous).next : partial_[p.size_class]) = p.next;
}

void* FramePool::take_locked(usize size_class) {
    PageNumber number = partial_[size_class];
    if (number == 0) {
        number = fresh_page(size_class);
        if (number == 0) {
            return nullptr;
        }
    }
    Page& p = page(number);
    void* block = p.free;
    if (block != nullptr) {
        p.free = p.free->next;
    } else {
        block = arena_.data() + (number - 1u) * page_bytes + p.carved++ * classes[size_class];
    }
    ++p.used;
    if (!has_room(p)) {
        unlink(number);
    }
    return block;
}

void* FramePool::take(usize size_class) {
    const Locked locked(lock_);
    ++arena_calls_;
    return take_locked(size_class);
}

void FramePool::recycle(void* block) {
    const Locked locked(lock_);
    ++arena_calls_;
    const usize offset = static_cast<usize>(static_cast<std::byte*>(block) - arena_.data());
    const PageNumber number = static_cast<PageNumber>(offset / page_bytes + 1);
    Page& p = page(number);
    const bool was_full = !has_room(p);
    if (--p.used == 0) {
        if (!was_full) {
            unlink(number);
        }
        p.next = std::exchange(free_pages_, number);
        return;
    }
    p.free = new (block) Free{p.free};
    if (was_full) {
        link(number);
    }
}

void FramePool::release_one(Kept& kept, usize size_class) {
    Free* const block = kept.free[size_class];
    kept.free[size_class] = block->next;
    --kept.count[size_class];
    kept.bytes -= classes[size_class];
    recycle(block);
}

void FramePool::release_all(Kept& kept) {
    kept.returned = returns_.load(std::memory_order_relaxed);
    for (usize i = 0; i < classes.size(); ++i) {
        while (kept.count[i] != 0) {
            release_one(kept, i);
        }
    }
}

// Allocates on a cache miss. The arena may be empty because processors cache blocks of other sizes.
void* FramePool::allocate_from_arena(Kept& kept, usize size_class) {
    if (void* const block = take(size_class); block != nullptr) [[likely]] {
        return block;
    }
    returns_.fetch_add(1, std::memory_order_relaxed);
    if (kept.bytes == 0) {
        return nullptr;
    }
    release_all(kept);
    return take(size_class);
}

bool FramePool::take_allowance() {
    const Locked locked(lock_);
    if (denied_from_ > 1) {
        --denied_from_;
    } else if (denied_from_ == 1) {
        return false;
    }
    return true;
}

void FramePool::return_allowance() {
    const Locked locked(lock_);
    denied_from_ += denied_from_ != 0 ? 1 : 0;
}

void* FramePool::allocate(usize size) noexcept {
    const usize i = class_of(size);
    if (i == classes.size()) {
        return nullptr;
    }
    const bool limited = limited_.load(std::memory_order_relaxed);
    if (limited && !take_allowance()) [[unlikely]] {
        return nullptr;
    }
    Kept& kept = kept_[this_processor()];
    if (kept.returned != returns_.load(std::memory_order_relaxed)) [[unlikely]] {
        release_all(kept);
    }
    void* block = kept.free[i];
    if (block != nullptr) [[likely]] {
        kept.free[i] = kept.free[i]->next;
        --kept.count[i];
        kept.bytes -= classes[i];
    } else {
        block = allocate_from_arena(kept, i);
        if (block == nullptr) {
            if (limited) {
                return_allowance();
            }
            return nullptr;
        }
    }
    kept.allocated.store(kept.allocated.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    return block;
}

void FramePool::free(void* block, usize size) noexcept {
    const usize i = class_of(size);
    Kept& kept = kept_[this_processor()];
    kept.freed.store(kept.freed.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    if (kept.returned != returns_.load(std::memory_order_relaxed)) [[unlikely]] {
        release_all(kept);
    }
    if (classes[i] > largest_kept || kept.count[i] == kept_blocks) {
        return recycle(block);
    }
    // The size in use now displaces cached blocks of other sizes.
    for (usize other = 0; kept.bytes + classes[i] > kept_bytes;) {
        if (other != i && kept.count[other] != 0) {
            release_one(kept, other);
        } else {
            ++other;
        }
    }
    kept.bytes += classes[i];
    ++kept.count[i];
    kept.free[i] = new (block) Free{kept.free[i]};
}

u64 FramePool::allocations() const {
    u64 sum = 0;
    for (const Kept& kept : kept_) {
        sum += kept.allocated.load(std::memory_order_relaxed);
    }
    return sum;
}

usize FramePool::in_use() const {
    u64 freed = 0;
    for (const Kept& kept : kept_) {
        freed += kept.freed.load(std::memory_order_relaxed);
    }
    return allocations() - freed;
}

namespace {
constinit FramePool pool{};
} // namespace

FramePool& frame_pool() { return pool; }

} // namespace fl::io
