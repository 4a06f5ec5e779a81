// Coroutines for drivers: Task<T> is lazy, owned by its awaiter, and resumes it by symmetric transfer. Frames come
// from a bounded pool; if that is exhausted the task is empty, and awaiting it yields Error{exhausted} (so T is a
// Result).
module;
#include "core/thread_annotations.hpp"
export module io.task;
import core.std;
import core.processor;
import core.result;
import core.spinlock;

export namespace fl::io {

/// Allocator for coroutine frames: blocks of a few fixed sizes. Callable on every processor, but not from interrupt
/// handlers.
///
/// Each processor caches a few blocks freed on it and allocates from them without a lock. Cache misses and overflow
/// go to the shared, locked arena. An arena page holds blocks of one size while any of them is in use or cached, and
/// can serve any size afterwards, so a burst of one size does not permanently take memory from the others. A
/// processor that finds the arena empty returns its cached blocks and retries; the others return theirs at their next
/// allocation or free.
class FramePool {
  public:
    /// Per-processor cache limits: bytes of blocks, and blocks of one size. With 64 processors that is half of the
    /// arena.
    static constexpr usize max_cached_bytes = 4096;
    static constexpr u8 max_cached_blocks = 4;
    /// Larger blocks are never cached: they are for long-lived, rarely started coroutines.
    static constexpr usize largest_cached = 1024;
    static constexpr usize arena_bytes = 512 * 1024;
    static constexpr usize page_bytes = 4096;
    static constexpr usize pages = arena_bytes / page_bytes;
    static constexpr std::array<usize, 8> classes{128, 192, 256, 384, 512, 1024, 2048, 4096};

    /// nullptr: larger than the largest class, or out of memory.
    void* allocate(usize size) noexcept;
    /// `size`: as passed to allocate(). Callable on any processor, which may cache the block.
    void free(void* block, usize size) noexcept;
    /// Total frames allocated, on all processors. Exact for the calling processor; concurrent changes on others may
    /// or may not be included.
    u64 allocations() const;
    /// Frames allocated and not freed; same accuracy.
    usize in_use() const;
    /// Number of times the arena was locked for a block: cache misses and overflows.
    u64 arena_calls() const {
        const Locked locked(lock_);
        return arena_calls_;
    }
    /// For tests: the next `n` allocations succeed, all later ones fail until lifted with ~0.
    void fail_after(u64 n) {
        const Locked locked(lock_);
        denied_from_ = n == ~u64{0} ? 0 : n + 1;
        limited_.store(denied_from_ != 0, std::memory_order_relaxed); // everything else is ordered by the lock
    }

  private:
    struct Free {
        Free* next;
    };
    /// Cache of one processor, accessed only by that processor except for the counters, which others read. Aligned so
    /// that no two share a cache line.
    struct alignas(128) Cache {
        std::array<Free*, classes.size()> free;
        std::array<u8, classes.size()> count;
        u32 returned; // returns_ when it last returned all its blocks
        usize bytes;
        // Relaxed: statistics that order no other data. Each has one writer, its processor.
        std::atomic<u64> allocated;
        std::atomic<u64> freed;
    };
    using PageNumber = u16; // counted from 1; 0: none
    struct Page {
        Free* free;      // freed blocks
        PageNumber next; // in the list of its class while it has a block available, or of free pages
        PageNumber previous;
        u16 carved; // blocks allocated at least once
        u16 used;   // blocks in use or cached by a processor
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
    void recycle(void* block);
    void* take_locked(usize size_class) REQUIRES(lock_);
    void* allocate_from_arena(Cache& cache, usize size_class);
    void release_one(Cache& cache, usize size_class);
    void release_all(Cache& cache);

    mutable SpinLock lock_;
    std::array<PageNumber, classes.size()> partial_ GUARDED_BY(lock_){}; // pages of each class with room
    PageNumber free_pages_ GUARDED_BY(lock_) = 0;
    PageNumber touched_ GUARDED_BY(lock_) = 0; // pages ever used
    u64 arena_calls_ GUARDED_BY(lock_) = 0;
    u64 denied_from_ GUARDED_BY(lock_) = 0; // 0: unlimited; else the allocations left, plus one
    std::atomic<bool> limited_{false};      // denied_from_ != 0
    // Number of times the arena was found empty: every processor then returns its cached blocks. Relaxed: orders no
    // data.
    std::atomic<u32> returns_{0};
    std::array<Cache, max_processors> caches_{};
    std::array<Page, pages> pages_ GUARDED_BY(lock_){};
    // all initial values are zero, so that the pool occupies no space in the image
    alignas(16) std::array<std::byte, arena_bytes> arena_;
};

/// The kernel's (or the test program's) only pool.
FramePool& frame_pool();

/// Base of every promise here: frames come from the pool; exhaustion is reported as an error.
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
    void unhandled_exception() const noexcept {} // built without exceptions
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

/// A coroutine that yields a Result. Lazy: starts when awaited, which may be done once. Owns its frame: destroying
/// the task destroys the frame and all tasks it awaits.
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

    /// False: no frame was available.
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
