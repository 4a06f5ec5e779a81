// Coroutines for drivers: Task<T> is lazy, owned by whoever awaits it, and resumes its awaiter by symmetric transfer.
// Frames come from a bounded pool; a pool that has run dry gives an empty task, and awaiting that yields
// Error{exhausted} (so T is a Result).
module;
#include "core/thread_annotations.hpp"
export module io.task;
import core.std;
import core.processor;
import core.result;
import core.spinlock;

export namespace fl::io {

/// Coroutine frames: blocks of a few fixed sizes. For every processor, not for interrupt handlers.
///
/// Each processor keeps a few blocks that were freed on it, and serves itself from them without a lock. What it has no
/// block for, and what is more than it keeps, goes to the arena, which is shared and locked. A page of the arena holds
/// blocks of one size as long as one of them is in use or kept, and then serves any size again, so a burst of one kind
/// takes nothing from the others for good. A processor that finds the arena empty gives back what it keeps and tries
/// once more; the others give back what they keep when they next allocate or free.
class FramePool {
  public:
    /// What each processor keeps at most: bytes of blocks, and blocks of one size. With 64 processors that is half of
    /// the arena.
    static constexpr usize kept_bytes = 4096;
    static constexpr u8 kept_blocks = 4;
    /// Larger blocks are never kept: they are for what is started once.
    static constexpr usize largest_kept = 1024;
    static constexpr usize arena_bytes = 512 * 1024;
    static constexpr usize page_bytes = 4096;
    static constexpr usize pages = arena_bytes / page_bytes;
    static constexpr std::array<usize, 8> classes{128, 192, 256, 384, 512, 1024, 2048, 4096};

    /// nullptr: larger than the largest class, or nothing left.
    void* allocate(usize size) noexcept;
    /// `size`: what it was allocated with. On any processor, which may keep the block.
    void free(void* block, usize size) noexcept;
    /// Every frame ever handed out, on all processors. Exact for the calling processor; what others do at the same time
    /// may or may not be in it.
    u64 allocations() const;
    /// Frames handed out and not freed; likewise.
    usize in_use() const;
    /// How often the arena was locked for a block: each time that a processor could not help itself.
    u64 arena_calls() const {
        const Locked locked(lock_);
        return arena_calls_;
    }
    /// For tests: the next `n` allocations succeed, all later ones fail until lifted with ~0.
    void fail_after(u64 n) {
        const Locked locked(lock_);
        denied_from_ = n == ~u64{0} ? 0 : n + 1;
        limited_.store(denied_from_ != 0, std::memory_order_relaxed); // the lock orders the rest
    }

  private:
    struct Free {
        Free* next;
    };
    /// What one processor keeps; used by that processor alone, but for the counters, which others read. No two of them
    /// share a cache line.
    struct alignas(128) Kept {
        std::array<Free*, classes.size()> free;
        std::array<u8, classes.size()> count;
        u32 returned; // returns_ when it last gave everything back
        usize bytes;
        // Relaxed: numbers that nothing is read on the strength of. One writer each: the processor.
        std::atomic<u64> allocated;
        std::atomic<u64> freed;
    };
    using PageNumber = u16; // counted from 1; 0: none
    struct Page {
        Free* free;      // blocks that were given back
        PageNumber next; // in the list of its class, while a block can be had; or of free pages
        PageNumber previous;
        u16 carved; // blocks handed out for the first time
        u16 used;   // blocks in use, or kept by a processor
        u8 size_class;
    };
    inline Page& page(PageNumber number) REQUIRES(lock_) { return pages_[number - 1u]; }
    inline bool has_room(const Page& p) const {
        return p.free != nullptr || p.carved < page_bytes / classes[p.size_class];
    }
    PageNumber fresh_page(usize size_class) REQUIRES(lock_);
    void link(PageNumber number) REQUIRES(lock_);
    void unlink(PageNumber number) REQUIRES(lock_);
    bool take_allowance();
    void return_allowance();
    void* take(usize size_class);
    void give(void* block);
    void* take_locked(usize size_class) REQUIRES(lock_);
    void* allocate_from_arena(Kept& kept, usize size_class);
    void give_one(Kept& kept, usize size_class);
    void give_all(Kept& kept);

    mutable SpinLock lock_;
    std::array<PageNumber, classes.size()> partial_ GUARDED_BY(lock_){}; // pages of each class with room
    PageNumber free_pages_ GUARDED_BY(lock_) = 0;
    PageNumber touched_ GUARDED_BY(lock_) = 0; // pages that were ever used
    u64 arena_calls_ GUARDED_BY(lock_) = 0;
    u64 denied_from_ GUARDED_BY(lock_) = 0; // 0: never; else the allocations left, plus one
    std::atomic<bool> limited_{false};      // denied_from_ != 0
    // How often the arena was found empty: everybody gives back what he keeps. Relaxed: a request, and no data.
    std::atomic<u32> returns_{0};
    std::array<Kept, max_processors> kept_{};
    std::array<Page, pages> pages_ GUARDED_BY(lock_){};
    // every initial value here is zero, or the image would carry it
    alignas(16) std::array<std::byte, arena_bytes> arena_;
};

/// The one pool of the kernel (or of the test program).
FramePool& frame_pool();

/// Base of every promise here: frames come from the pool, and an empty pool is an answer, not a crash.
struct PoolAllocated {
    static void* operator new(std::size_t size) noexcept { return frame_pool().allocate(size); }
    static void operator delete(void* block, std::size_t size) noexcept { frame_pool().free(block, size); }
};

template <class T>
class Task;

namespace detail {

struct PromiseBase : PoolAllocated {
    std::coroutine_handle<> continuation = std::noop_coroutine();

    struct Final {
        bool await_ready() const noexcept { return false; }
        template <class P>
        std::coroutine_handle<> await_suspend(std::coroutine_handle<P> self) const noexcept {
            return self.promise().continuation;
        }
        void await_resume() const noexcept {}
    };
    std::suspend_always initial_suspend() const noexcept { return {}; }
    Final final_suspend() const noexcept { return {}; }
    void unhandled_exception() const noexcept {} // there are no exceptions
};

template <class T>
struct Promise : PromiseBase {
    std::optional<T> value;

    Task<T> get_return_object() noexcept;
    static Task<T> get_return_object_on_allocation_failure() noexcept;
    template <class U>
        requires std::constructible_from<T, U&&>
    void return_value(U&& result) noexcept {
        value.emplace(std::forward<U>(result));
    }
};

} // namespace detail

/// A coroutine that yields a Result. Starts when awaited, once. The task owns the frame: destroying it destroys the
/// frame and all tasks that it waits for.
template <class T>
class [[nodiscard]] Task {
    static_assert(std::constructible_from<T, Error>, "a Task yields a Result: running out of frames is an error value");

  public:
    using promise_type = detail::Promise<T>;
    using value_type = T;

    Task() = default;
    explicit Task(std::coroutine_handle<promise_type> handle) : handle_(handle) {}
    Task(Task&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
    Task& operator=(Task&& other) noexcept {
        if (this != &other) {
            if (handle_) {
                handle_.destroy();
            }
            handle_ = std::exchange(other.handle_, nullptr);
        }
        return *this;
    }
    ~Task() {
        if (handle_) {
            handle_.destroy();
        }
    }

    /// False: no frame could be had.
    explicit operator bool() const { return static_cast<bool>(handle_); }

    auto operator co_await() && noexcept {
        struct Awaiter {
            std::coroutine_handle<promise_type> handle;
            bool await_ready() const noexcept { return !handle; }
            std::coroutine_handle<> await_suspend(std::coroutine_handle<> awaiting) const noexcept {
                handle.promise().continuation = awaiting;
                return handle;
            }
            T await_resume() const noexcept {
                if (!handle) {
                    return Error{Code::exhausted,
                                 "no coroutine frame left: fewer requests at once, or a larger io::FramePool"};
                }
                return std::move(*handle.promise().value);
            }
        };
        return Awaiter{handle_};
    }

  private:
    std::coroutine_handle<promise_type> handle_{};
};

template <class T>
Task<T> detail::Promise<T>::get_return_object() noexcept {
    return Task<T>(std::coroutine_handle<Promise<T>>::from_promise(*this));
}
template <class T>
Task<T> detail::Promise<T>::get_return_object_on_allocation_failure() noexcept {
    return Task<T>();
}

} // namespace fl::io
