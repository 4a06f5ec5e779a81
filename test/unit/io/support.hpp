// Fakes shared by the io tests: a clock that jumps, DMA memory on the heap, an in-memory disk with injectable faults.
// Include after the imports.
#pragma once
import host.std;

namespace fl::test {

/// A coroutine that runs at once, up to its first suspension; its owner destroys the frame.
struct StartedTask {
    struct promise_type {
        StartedTask get_return_object() { return {std::coroutine_handle<promise_type>::from_promise(*this)}; }
        std::suspend_never initial_suspend() noexcept { return {}; }
        std::suspend_always final_suspend() noexcept { return {}; }
        void return_void() {}
        void unhandled_exception() {}
    };
    std::coroutine_handle<promise_type> handle;
};

/// A machine in which time passes only while the executor sleeps, or when a test advances it.
struct FakeMachine {
    fl::Instant time = 1000;
    fl::Nanoseconds step = 10; // time per clock reading
    fl::u64 readings = 0;      // of the clock
    fl::u64 idles = 0;
    fl::Instant until = 0; // the deadline of the last idle call
    /// An unbounded sleep ends with a spurious interrupt after this time.
    fl::Nanoseconds stray_interrupt = 10'000'000;
    void (*on_idle)(void* context) = nullptr;
    void* on_idle_context = nullptr;

    fl::io::Platform platform() {
        return {this,
                [](void* c) {
                    auto& m = *static_cast<FakeMachine*>(c);
                    ++m.readings;
                    return m.time += m.step;
                },
                [](void* c, fl::Instant until, const std::atomic<bool>& wake) {
                    auto& m = *static_cast<FakeMachine*>(c);
                    ++m.idles;
                    m.until = until;
                    if (m.on_idle != nullptr) {
                        m.on_idle(m.on_idle_context);
                    }
                    if (!wake.load()) {
                        m.time = std::max(m.time, until == fl::never ? m.time + m.stray_interrupt : until);
                    }
                }};
    }
};

/// Abandoned memory stays valid until the allocator is destroyed.
class HeapDma final : public fl::DmaAllocator {
  public:
    ~HeapDma() {
        fl::clear_quarantine();
        while (blocks_ != nullptr) {
            release(blocks_);
        }
    }
    fl::u32 outstanding = 0;
    fl::u32 left = ~fl::u32{0};
    fl::Result<fl::DmaSpan> allocate(fl::u32 size, fl::u64) override {
        if (left == 0) {
            return fl::Error{fl::Code::exhausted, "no DMA memory left"};
        }
        --left;
        ++outstanding;
        size = fl::align_up<fl::u32>(size, 4096);
        // the page before the buffer holds the header
        auto* block = static_cast<Block*>(::operator new(4096 + size, std::align_val_t{4096}));
        *block = {blocks_};
        blocks_ = block;
        auto* data = reinterpret_cast<std::byte*>(block) + 4096;
        std::memset(data, 0, size);
        return fl::DmaSpan{data, reinterpret_cast<fl::u64>(data), size};
    }
    void free(fl::DmaSpan span) override {
        --outstanding;
        release(reinterpret_cast<Block*>(span.data - 4096));
    }

  private:
    struct Block {
        Block* next;
    };
    void release(Block* block) {
        Block** at = &blocks_;
        while (*at != block) {
            at = &(*at)->next;
        }
        *at = block->next;
        ::operator delete(block, std::align_val_t{4096});
    }
    Block* blocks_ = nullptr;
};

/// An in-memory disk. Requests wait in a queue and complete in drain(): a number per turn, in order or not, late or
/// never.
class MemoryDisk final : public fl::io::BlockDevice, public fl::io::Service {
  public:
    struct Behaviour {
        fl::u32 per_drain = ~fl::u32{0}; // requests completed per turn
        bool newest_first = false;
        fl::Nanoseconds latency = 0; // minimum time from submission to completion
        fl::Nanoseconds each = 0;    // time per request, one at a time
        bool never_answers = false;  // requests end by time-out, with buffer_lost
        bool removed = false;
        bool fail_flush = false;
        fl::u64 fail_lba = ~fl::u64{0};
        fl::io::Status fail_status = fl::io::Status::io_error;
        fl::u64 drop_write_lba = ~fl::u64{0};   // acknowledged but not written
        fl::u64 misdirect_lba = ~fl::u64{0};    // written to the next block instead
        fl::u64 corrupt_read_lba = ~fl::u64{0}; // one bit in the middle is flipped
        fl::u64 no_data_read_lba = ~fl::u64{0}; // reports ok without transferring data
    };
    Behaviour behaviour;
    bool removed() const override { return behaviour.removed; }
    std::byte* data;
    fl::usize size;
    fl::u64 flushes = 0;
    fl::u64 max_in_flight = 0;
    fl::u64 forgotten = 0;
    fl::u64 discarded = 0; // bytes
    fl::u64 secured = 0;   // bytes securely discarded
    fl::u64 zeroed = 0;    // bytes

    MemoryDisk(fl::io::Executor& e, std::byte* storage, fl::usize bytes, fl::u32 sector = 512)
        : BlockDevice(e), data(storage), size(bytes) {
        identity_.name = fl::FixedText<16>("mem0");
        identity_.driver = "memory";
        identity_.kind = fl::io::Kind::synthetic;
        geometry_.sectors = bytes / sector;
        geometry_.sector_size = sector;
        geometry_.physical_sector_size = sector;
        geometry_.flush = true;
        e.add(*this);
    }
    ~MemoryDisk() { executor().remove(*this); }
    fl::io::Geometry& change_geometry() { return geometry_; }
    void rename(std::string_view name) { identity_.name = fl::FixedText<16>(name); }

    void flush() override { ++counters_.notifications; }
    bool drain() override {
        bool some = false;
        for (fl::u32 n = 0; n < behaviour.per_drain && !queue_.empty(); ++n) {
            fl::io::Request* request = queue_.front();
            if (behaviour.newest_first) {
                while (request->link != nullptr) {
                    request = request->link;
                }
            }
            if (behaviour.never_answers || executor().now() < since(*request) + behaviour.latency ||
                executor().now() < free_at_ + behaviour.each) {
                break;
            }
            drop(*request);
            free_at_ = executor().now();
            some = true;
            complete(*request, perform(*request));
        }
        return some;
    }
    bool arm() override {
        // Late requests complete when the clock has advanced.
        return !queue_.empty() && !behaviour.never_answers && behaviour.each == 0;
    }
    void tick(fl::Instant now) override {
        while (!queue_.empty() && since(*queue_.front()) + timeout() <= now) {
            fl::io::Request* request = queue_.front();
            drop(*request);
            request->buffer_lost = true;
            fl::quarantine(request->buffer, this);
            complete(*request, fl::io::Status::timed_out);
        }
    }

  protected:
    void start(fl::io::Request& request) override {
        free_at_ = queue_.empty() ? executor().now() : free_at_;
        queue_.push(request);
        auto* free = std::find_if(since_.begin(), since_.end(), [](const Since& s) { return s.request == nullptr; });
        *free = {&request, executor().turn_time()};
        max_in_flight = std::max<fl::u64>(max_in_flight, queue_.size());
        executor().touch(*this);
    }
    bool cancel_now(fl::io::Request& request) override {
        if (!drop(request)) {
            return false;
        }
        complete(request, fl::io::Status::cancelled);
        return true;
    }
    void forget(fl::io::Request& request) override {
        ++forgotten;
        request.buffer_lost = behaviour.never_answers;
        fl::quarantine(behaviour.never_answers ? request.buffer : fl::DmaSpan{}, this);
        drop(request);
    }

  private:
    fl::io::Status perform(fl::io::Request& r) {
        using fl::io::Op;
        using fl::io::Status;
        if (r.op == Op::flush) {
            ++flushes;
            return behaviour.fail_flush ? Status::io_error : Status::ok;
        }
        if (r.lba == behaviour.fail_lba) {
            return behaviour.fail_status;
        }
        const fl::usize at = r.lba * geometry().sector_size;
        if (!fl::io::has_data(r.op)) {
            (r.op == Op::discard ? discarded : r.op == Op::write_zeroes ? zeroed : secured) += r.buffer.size;
            if (r.op == Op::write_zeroes && r.lba != behaviour.drop_write_lba) {
                std::memset(data + at, 0, r.buffer.size);
            } else if (r.op != Op::write_zeroes) {
                std::memset(data + at, 0xdd, r.buffer.size); // undefined
            }
            return Status::ok;
        }
        if (r.op == Op::write) {
            if (r.lba == behaviour.drop_write_lba) {
                return Status::ok;
            }
            std::memcpy(data + at + (r.lba == behaviour.misdirect_lba ? r.buffer.size : 0), r.buffer.data,
                        r.buffer.size);
        } else if (r.lba != behaviour.no_data_read_lba) {
            std::memcpy(r.buffer.data, data + at, r.buffer.size);
            if (r.lba == behaviour.corrupt_read_lba) {
                r.buffer.data[r.buffer.size / 2] ^= std::byte{0x10};
            }
        }
        return Status::ok;
    }
    struct Since {
        const fl::io::Request* request = nullptr;
        fl::Instant time = 0;
    };
    Since* entry(const fl::io::Request& r) {
        return std::find_if(since_.begin(), since_.end(), [&](const Since& s) { return s.request == &r; });
    }
    fl::Instant since(const fl::io::Request& r) { return entry(r)->time; }
    bool drop(fl::io::Request& r) {
        if (!queue_.remove(r)) {
            return false;
        }
        entry(r)->request = nullptr;
        return true;
    }
    fl::io::RequestQueue queue_;
    fl::Instant free_at_ = 0;         // end of the previous request
    std::array<Since, 1024> since_{}; // submission times
};

/// Captures all log output.
struct CapturedLog final : fl::log::Sink {
    fl::FixedText<16384> text;
    CapturedLog() { fl::log::attach(*this); }
    ~CapturedLog() { fl::log::detach(*this); }
    void write(std::string_view t) override { text.write(t); }
    bool has(std::string_view what) const {
        const std::string_view all = text.view();
        return std::search(all.begin(), all.end(), what.begin(), what.end()) != all.end();
    }
};

} // namespace fl::test
