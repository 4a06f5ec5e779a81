module io.task;
import core.std;
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

void* FramePool::allocate(usize size) noexcept {
    const usize i = class_of(size);
    const Locked locked(lock_);
    if (i == classes.size() || denied_from_ == 1) {
        return nullptr;
    }
    PageNumber number = partial_[i];
    if (number == 0) {
        number = fresh_page(i);
        if (number == 0) {
            return nullptr;
        }
    }
    Page& p = page(number);
    void* block = p.free;
    if (block != nullptr) {
        p.free = p.free->next;
    } else {
        block = arena_.data() + (number - 1u) * page_bytes + p.carved++ * classes[i];
    }
    ++p.used;
    if (!has_room(p)) {
        unlink(number);
    }
    if (denied_from_ != 0) {
        --denied_from_;
    }
    ++allocations_;
    ++in_use_;
    return block;
}

void FramePool::free(void* block, usize) noexcept {
    const Locked locked(lock_);
    const usize offset = static_cast<usize>(static_cast<std::byte*>(block) - arena_.data());
    const PageNumber number = static_cast<PageNumber>(offset / page_bytes + 1);
    Page& p = page(number);
    const bool was_full = !has_room(p);
    --in_use_;
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

namespace {
constinit FramePool pool{};
} // namespace

FramePool& frame_pool() { return pool; }

} // namespace fl::io
