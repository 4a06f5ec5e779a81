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

void FramePool::release_one(Cache& cache, usize size_class) {
    Free* const block = cache.free[size_class];
    cache.free[size_class] = block->next;
    --cache.count[size_class];
    cache.bytes -= classes[size_class];
    recycle(block);
}

void FramePool::release_all(Cache& cache) {
    cache.returned = returns_.load(std::memory_order_relaxed);
    for (usize i = 0; i < classes.size(); ++i) {
        while (cache.count[i] != 0) {
            release_one(cache, i);
        }
    }
}

// Allocates on a cache miss. The arena may be empty because processors cache blocks of other sizes.
void* FramePool::allocate_from_arena(Cache& cache, usize size_class) {
    if (void* const block = take(size_class); block != nullptr) [[likely]] {
        return block;
    }
    returns_.fetch_add(1, std::memory_order_relaxed);
    if (cache.bytes == 0) {
        return nullptr;
    }
    release_all(cache);
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
    Cache& cache = caches_[this_processor()];
    if (cache.returned != returns_.load(std::memory_order_relaxed)) [[unlikely]] {
        release_all(cache);
    }
    void* block = cache.free[i];
    if (block != nullptr) [[likely]] {
        cache.free[i] = cache.free[i]->next;
        --cache.count[i];
        cache.bytes -= classes[i];
    } else {
        block = allocate_from_arena(cache, i);
        if (block == nullptr) {
            if (limited) {
                return_allowance();
            }
            return nullptr;
        }
    }
    cache.allocated.store(cache.allocated.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    return block;
}

void FramePool::free(void* block, usize size) noexcept {
    const usize i = class_of(size);
    Cache& cache = caches_[this_processor()];
    cache.freed.store(cache.freed.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    if (cache.returned != returns_.load(std::memory_order_relaxed)) [[unlikely]] {
        release_all(cache);
    }
    if (classes[i] > largest_cached || cache.count[i] == max_cached_blocks) {
        return recycle(block);
    }
    // The size in use now displaces cached blocks of other sizes.
    for (usize other = 0; cache.bytes + classes[i] > max_cached_bytes;) {
        if (other != i && cache.count[other] != 0) {
            release_one(cache, other);
        } else {
            ++other;
        }
    }
    cache.bytes += classes[i];
    ++cache.count[i];
    cache.free[i] = new (block) Free{cache.free[i]};
}

u64 FramePool::allocations() const {
    u64 sum = 0;
    for (const Cache& cache : caches_) {
        sum += cache.allocated.load(std::memory_order_relaxed);
    }
    return sum;
}

usize FramePool::in_use() const {
    u64 freed = 0;
    for (const Cache& cache : caches_) {
        freed += cache.freed.load(std::memory_order_relaxed);
    }
    return allocations() - freed;
}

namespace {
constinit FramePool pool{};
} // namespace

FramePool& frame_pool() { return pool; }

} // namespace fl::io
