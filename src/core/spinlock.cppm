// Spinlock for state that is shared between processors and rarely accessed: frames, heap, page tables, log. The I/O
// path takes no locks.
module;
#include "core/thread_annotations.hpp"
export module core.spinlock;
import core.std;
import core.panic;
import core.processor;

export namespace fl {

/// Hints to the processor, and to a hypervisor that watches for it, that this is a spin-wait loop.
inline void spin_pause() { __builtin_ia32_pause(); }

namespace spinlock_detail {
inline constinit std::atomic<bool> broken{false};
}
/// For panic reports: the other processors have stopped and will not release their locks. From now on every lock is
/// acquired immediately. Relaxed: only the caller keeps running.
inline void break_locks() { spinlock_detail::broken.store(true, std::memory_order_relaxed); }

/// Not for interrupt handlers; not recursive: a processor that takes it twice panics. Hold it for a few hundred
/// instructions at most, and do not suspend a coroutine while holding it. All bits zero: unlocked. The data that it
/// protects is declared GUARDED_BY it, which the compiler checks [core/thread_annotations.hpp].
class CAPABILITY("mutex") SpinLock {
  public:
    constexpr SpinLock() = default;
    SpinLock(const SpinLock&) = delete;
    SpinLock& operator=(const SpinLock&) = delete;

    void lock() ACQUIRE() {
        const u32 me = this_processor() + 1;
        for (;;) {
            u32 seen = 0;
            // Acquire: pairs with the release in unlock(), so that the previous holder's writes are visible.
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
            // Spin on loads only, so that the cache line stays shared; the exchange above provides the ordering.
            while (holder_.load(std::memory_order_relaxed) != 0 &&
                   !spinlock_detail::broken.load(std::memory_order_relaxed)) {
                spin_pause();
            }
        }
    }
    void unlock() RELEASE() { holder_.store(0, std::memory_order_release); } // pairs with the acquire in lock()
    /// Relaxed: only the holder can see its own number, which it wrote itself.
    bool held_here() const { return holder_.load(std::memory_order_relaxed) == this_processor() + 1; }

  private:
    std::atomic<u32> holder_{0}; // 0: unlocked; otherwise the holder's number plus one
};

/// Scoped lock.
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
