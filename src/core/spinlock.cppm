// The lock between processors, for what is shared and rare: frames, heap, page tables, log. The path of an I/O takes
// none.
module;
#include "core/thread_annotations.hpp"
export module core.spinlock;
import core.std;
import core.panic;
import core.processor;

export namespace fl {

/// Tells the processor (and a hypervisor that watches it) that this is a loop that waits for another one.
inline void spin_pause() { __builtin_ia32_pause(); }

namespace spinlock_detail {
inline constinit std::atomic<bool> broken{false};
}
/// For the report of a panic: the other processors have stopped, and what they hold would be waited for in vain. From
/// here on every lock is had at once. Relaxed: the caller is the only processor that goes on.
inline void break_locks() { spinlock_detail::broken.store(true, std::memory_order_relaxed); }

/// Not for interrupt handlers, and not recursive: a processor that takes it twice panics. Hold it for a few hundred
/// instructions at most, and do not suspend a coroutine meanwhile. All bits zero: free. What it protects is declared
/// GUARDED_BY it, and the compiler checks that it is held [core/thread_annotations.hpp].
class CAPABILITY("mutex") SpinLock {
  public:
    constexpr SpinLock() = default;
    SpinLock(const SpinLock&) = delete;
    SpinLock& operator=(const SpinLock&) = delete;

    void lock() ACQUIRE() {
        const u32 me = this_processor() + 1;
        for (;;) {
            u32 seen = 0;
            // Acquire: partner is the release in unlock(), so that what the last holder wrote is seen.
            if (holder_.compare_exchange_weak(seen, me, std::memory_order_acquire, std::memory_order_relaxed))
                [[likely]] {
                return;
            }
            if (spinlock_detail::broken.load(std::memory_order_relaxed)) {
                holder_.store(me, std::memory_order_relaxed);
                return;
            }
            if (seen == me) {
                panic("a lock is taken twice on processor {}", me - 1);
            }
            // Reads only, so that the line stays where it is; the exchange above orders.
            while (holder_.load(std::memory_order_relaxed) != 0 &&
                   !spinlock_detail::broken.load(std::memory_order_relaxed)) {
                spin_pause();
            }
        }
    }
    void unlock() RELEASE() { holder_.store(0, std::memory_order_release); } // partner: the acquire in lock()
    /// Relaxed: only the holder itself can see its own number, and it wrote that.
    bool held_here() const { return holder_.load(std::memory_order_relaxed) == this_processor() + 1; }

  private:
    std::atomic<u32> holder_{0}; // 0: nobody; else the processor's number and one
};

/// Holds a lock for a scope.
class SCOPED_CAPABILITY Locked {
  public:
    explicit Locked(SpinLock& lock) ACQUIRE(lock) : lock_(lock) { lock_.lock(); }
    ~Locked() RELEASE() { lock_.unlock(); }
    Locked(const Locked&) = delete;
    Locked& operator=(const Locked&) = delete;

  private:
    SpinLock& lock_;
};

} // namespace fl
