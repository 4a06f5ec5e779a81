// Threads that act as processors, each with an executor that really sleeps, so that a missing kick is detected. Include
// after the imports.
#pragma once

namespace fl::test {

/// The clock and the sleep of one such processor. A sleep without a wake-up lasts until its deadline, or for `longest`;
/// `overslept` counts sleeps that found the wake flag set at that late moment: lost wake-ups.
class ThreadPlatform {
  public:
    static constexpr std::chrono::seconds longest{10};

    fl::io::Platform platform() {
        return {this,
                [](void*) { return now(); },
                [](void* c, fl::Instant until, const std::atomic<bool>& wake) {
                    static_cast<ThreadPlatform*>(c)->idle(until, wake);
                },
                [](void* c) { static_cast<ThreadPlatform*>(c)->kick(); },
                0,
                [](void* c) { static_cast<ThreadPlatform*>(c)->rearmed.fetch_add(1); }};
    }
    std::atomic<unsigned> overslept{0};
    std::atomic<unsigned> kicks{0};
    std::atomic<unsigned> rearmed{0};

  private:
    static fl::Instant now() {
        return static_cast<fl::Instant>(
            std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
                .count());
    }
    void kick() {
        kicks.fetch_add(1, std::memory_order_relaxed);
        const std::lock_guard lock(mutex_);
        kicked_ = true;
        condition_.notify_one();
    }
    void idle(fl::Instant until, const std::atomic<bool>& wake) {
        std::unique_lock lock(mutex_);
        if (!wake.load(std::memory_order_acquire)) {
            const fl::Instant time = now();
            const auto length = until == fl::never ? std::chrono::nanoseconds(longest)
                                                   : std::chrono::nanoseconds(until > time ? until - time : 0);
            if (!condition_.wait_for(lock, std::min<std::chrono::nanoseconds>(length, longest),
                                     [&] { return kicked_; }) &&
                until == fl::never) {
                overslept.fetch_add(wake.load() ? 1 : 0);
            }
        }
        kicked_ = false;
    }
    std::mutex mutex_;
    std::condition_variable condition_;
    bool kicked_ = false;
};

/// Runs processor `number` from construction until stop() or destruction.
class ThreadProcessor {
  public:
    explicit ThreadProcessor(fl::u32 number)
        : executor(platform.platform(), number), thread_([this, number] {
              fl::set_this_processor(number);
              executor.serve(stop_);
          }) {}
    ~ThreadProcessor() { stop(); }
    void stop() {
        if (thread_.joinable()) {
            stop_.store(true, std::memory_order_release);
            executor.wake();
            thread_.join();
        }
    }
    ThreadPlatform platform;
    fl::io::Executor executor;

  private:
    std::atomic<bool> stop_{false};
    std::thread thread_;
};

} // namespace fl::test
