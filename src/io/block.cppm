// Block devices for coroutines: co_await disk.read(lba, buffer). The request is the awaiter and lives in the frame of
// the waiting coroutine; submitting allocates nothing.
export module io.block;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.processor;
import io.executor;

export namespace fl::io {

/// discard: the contents are no longer needed, and undefined afterwards. write_zeroes: they read as zeros afterwards.
/// secure_discard: as discard, and no copy of them is left on the medium. None of these transfers data.
enum class Op : u8 { read, write, flush, discard, write_zeroes, secure_discard };
constexpr std::string_view name(Op op) {
    constexpr std::array<std::string_view, 6> names{"read",    "write",        "flush",
                                                    "discard", "write zeroes", "secure discard"};
    return names[to_underlying(op)];
}
/// Whether data is transferred between the request's buffer and the disk.
constexpr bool has_data(Op op) { return op <= Op::write; }
/// Whether the contents of the disk may be changed.
constexpr bool changes_medium(Op op) { return op == Op::write || op >= Op::discard; }

/// How a request ended. `not_written` is the initial value: a request with it was never answered.
enum class Status : u8 {
    ok,
    io_error,       // reported by the device
    not_supported,  // operation refused by the device
    timed_out,      // no answer within the bound
    cancelled,      // withdrawn before the device saw it, or abandoned
    device_gone,    // the queue was closed
    protocol_error, // the answer violated the protocol
    misaligned,     // buffer or length is not a multiple of the sector size
    out_of_range,   // beyond the last sector
    read_only,      // an operation that changes the medium, on a write-protected disk
    not_written = 0xff,
};
Error to_error(Status status);

/// Properties of a disk. Set before it is announced, constant afterwards, except as BlockDevice::resize() and renew()
/// change them.
struct Geometry {
    u64 sectors = 0;                // of sector_size bytes each; see BlockDevice::resize()
    u32 sector_size = 512;          // bytes; 512 or 4096: the unit of LBAs and lengths
    u32 physical_sector_size = 512; // bytes; a hint
    bool read_only = false;
    bool flush = false; // has a volatile write cache, which flush() empties
    bool discard = false;
    bool write_zeroes = false;
    bool secure_discard = false;
};

/// synthetic: paravirtual, designed for virtual machines; emulated: a hardware device modelled by the host.
enum class Kind : u8 { synthetic, emulated };
constexpr std::string_view name(Kind kind) { return kind == Kind::synthetic ? "synthetic" : "emulated"; }

/// Counted by the queue, never reset: read before and after.
struct Counters {
    u64 submitted = 0;       // requests accepted
    u64 completed = 0;       // requests ended, with any status
    u64 device_accesses = 0; // port and MMIO reads and writes: each causes a VM exit
    u64 hypercalls = 0;      // by this queue, including notifications
    u64 notifications = 0;   // doorbells: event sends, kicks; for ATA: commands issued
    u64 interrupts = 0;      // taken for this queue
    u64 errors = 0;          // requests that ended with a status other than ok

    friend constexpr Counters operator+(const Counters& a, const Counters& b) {
        return {a.submitted + b.submitted,   a.completed + b.completed,         a.device_accesses + b.device_accesses,
                a.hypercalls + b.hypercalls, a.notifications + b.notifications, a.interrupts + b.interrupts,
                a.errors + b.errors};
    }
    friend constexpr Counters operator-(const Counters& a, const Counters& b) {
        return {a.submitted - b.submitted,   a.completed - b.completed,         a.device_accesses - b.device_accesses,
                a.hypercalls - b.hypercalls, a.notifications - b.notifications, a.interrupts - b.interrupts,
                a.errors - b.errors};
    }
};

class BlockDevice;

/// An operation under way. Owned by the caller (normally the awaiting frame); the device holds a pointer to it from
/// submit() to complete(). Must not move in between; if destroyed in between, the device forgets it. When a device
/// ends a request whose buffer its host may still access (a timeout on a host that never answered), buffer_lost is
/// set: the owner must not reuse the buffer. It is also quarantined [core.dma], so that freeing it is harmless.
class Request : public ReadyNode {
  public:
    inline Request(BlockDevice& device, Op op, u64 lba, DmaSpan buffer, Nanoseconds bound = 0)
        : buffer(buffer), lba(lba), bound(bound), op(op), device_(&device) {}
    Request(const Request&) = delete;
    Request& operator=(const Request&) = delete;
    inline ~Request() {
        if (pending_) [[unlikely]] {
            withdraw();
        }
    }

    // The operation: constant after submit().
    DmaSpan buffer; // whole sectors; empty for flush; for discards and zeroing without address, its size is the range's
    u64 lba;        // in sectors of the device
    /// The caller's own limit, in nanoseconds of machine time from submission, the wait for room included; 0: none. The
    /// request then ends with timed_out within a tick [Executor::tick_length], and the device's time-out still holds.
    /// buffer_lost is set if the device may still access the buffer. On a lane without a queue it begins when the
    /// queue's processor has received the request.
    Nanoseconds bound;
    Op op;
    // Result.
    Status status = Status::not_written;
    bool buffer_lost = false;

    // For the queue alone [io.block_queue], from submit(), which sets them, to complete().
    u32 issued;         // bytes of the buffer that need no command any more
    u32 parts;          // its unanswered commands
    Status part_status; // the first error of its commands
    u8 resends;         // number of resends after a transport error
    bool resend;        // to be resent alone after its last command is answered
    Request* link;      // the next request in its list, if it is in one
    Instant begun;      // time of submission, if it has a bound

    inline bool pending() const { return pending_; }
    inline BlockDevice& device() const { return *device_; }

  private:
    friend class BlockDevice;
    void withdraw(); // destroyed while it is under way
    BlockDevice* device_;
    bool pending_ = false;
};

/// An attached disk: base of every driver's disk class. Owned by its driver.
class BlockDevice {
  public:
    struct Identity {
        FixedText<16> name;      // "xvda", "hda"
        std::string_view driver; // "xen_blk", "ata"; static storage
        Kind kind = Kind::emulated;
        FixedText<48> model;
        FixedText<96> features; // negotiated features, space-separated
    };

    BlockDevice(Executor& executor) : executor_(executor) {}
    BlockDevice(const BlockDevice&) = delete;
    BlockDevice& operator=(const BlockDevice&) = delete;

    inline const Identity& identity() const { return identity_; }
    inline const Geometry& geometry() const { return geometry_; }
    inline const Counters& counters() const { return counters_; }
    inline Executor& executor() const { return executor_; }
    /// Number of processors that may submit concurrently. Lane 0 is the disk itself, on the boot processor. Each
    /// further lane belongs to another processor (see executor()): same disk, identity and geometry, but separate
    /// counters. A request is submitted, completed and destroyed on its lane's processor; data written through one
    /// lane and acknowledged is visible through every other. The first queues() lanes have a queue of the device; the
    /// others, on processors for which the device has none, send their requests through one of these
    /// [io.shared_lane], which counts accesses, hypercalls, notifications and interrupts for both. Constant once the
    /// disk is announced.
    u32 lanes() const { return queues() + static_cast<u32>(shared_.size()); }
    /// index < lanes(). Valid as long as the disk.
    BlockDevice& lane(u32 index) { return index < queues() ? queue_lane(index) : *shared_[index - queues()]; }
    /// Lanes with a queue of their own.
    virtual u32 queues() const { return 1; }
    /// index < queues().
    virtual BlockDevice& queue_lane(u32 index) {
        static_cast<void>(index);
        return *this;
    }
    /// Adds lanes that have no queue. Called once, before the disk is announced; the caller owns lanes and list, which
    /// must live as long as the disk.
    void share(std::span<BlockDevice* const> lanes) { shared_ = lanes; }
    /// The host has removed the disk: every request ends as device_gone, and a flush has no medium left to reach. A
    /// disk closed because of an error is not removed. Callable on any processor.
    virtual bool removed() const { return false; }
    /// The host has changed the size of the disk. By the driver, on the disk's own processor; every other lane learns
    /// it on its processor, soon afterwards. A request is checked against the size that its lane knows when it is
    /// submitted; one that was submitted before, and ends beyond the new end, ends with the device's error.
    /// 0 sectors: every further transfer is out_of_range. Logs the change. Callable again at any time.
    void resize(u64 sectors);
    /// The same device has been connected again, perhaps with other properties: another size, write protection, no
    /// flushes any more. As resize(), for all of them; does not log. What waits in the driver's queue is for the driver
    /// to check again, by refusal().
    void renew(const Geometry& geometry);
    /// Why the disk does not take this request, by its geometry; nothing: it takes it. `ok`: nothing has to be done.
    inline std::optional<Status> refusal(const Request& request) const {
        if (request.op == Op::flush) [[unlikely]] {
            return geometry_.flush ? std::nullopt : std::optional(Status::ok);
        }
        const u32 within = geometry_.sector_size - 1; // a power of two
        const u64 sectors = request.buffer.size >> std::countr_zero(geometry_.sector_size);
        if (request.buffer.size == 0 || ((request.buffer.size | request.buffer.bus) & within) != 0) [[unlikely]] {
            return Status::misaligned;
        }
        if (request.buffer.data == nullptr) [[unlikely]] {
            if (has_data(request.op)) {
                return Status::misaligned;
            }
        }
        if (request.lba >= geometry_.sectors || sectors > geometry_.sectors - request.lba) [[unlikely]] {
            return Status::out_of_range;
        }
        if (request.op != Op::read) {
            return refusal_of_change(request);
        }
        return std::nullopt;
    }
    /// Timeout for a request, counted once the device has it and all earlier ones are answered [io.oldest_wait].
    void set_timeout(Nanoseconds timeout) { timeout_ = timeout; }
    Nanoseconds timeout() const { return timeout_; }

    /// The awaiter returned by read(), write(), flush(), discard(), write_zeroes() and secure_discard().
    class [[nodiscard]] Transfer : public Request {
      public:
        using Request::Request;
        inline bool await_ready() const { return false; }
        [[gnu::always_inline]] inline void await_suspend(std::coroutine_handle<> h) {
            waiter = h;
            device().submit(*this);
        }
        [[gnu::always_inline]] inline Result<void> await_resume() const {
            if (status == Status::ok) [[likely]] {
                return {};
            }
            return to_error(status);
        }
    };

    /// To be co_awaited. The buffer is whole sectors, sector-aligned, and must outlive the operation; concurrent
    /// operations are not ordered.
    /// `bound`: see Request::bound.
    Transfer read(u64 lba, DmaSpan into, Nanoseconds bound = 0) { return {*this, Op::read, lba, into, bound}; }
    Transfer write(u64 lba, DmaSpan from, Nanoseconds bound = 0) { return {*this, Op::write, lba, from, bound}; }
    /// Ends with ok once all data acknowledged before its submission is on stable storage. A disk without a volatile
    /// cache ends it with ok at once.
    Transfer flush(Nanoseconds bound = 0) { return {*this, Op::flush, 0, {}, bound}; }
    /// `bytes`: whole sectors. Geometry::discard, write_zeroes and secure_discard tell which disks can; the others end
    /// the request as not_supported.
    Transfer discard(u64 lba, u32 bytes, Nanoseconds bound = 0) {
        return {*this, Op::discard, lba, range(bytes), bound};
    }
    Transfer write_zeroes(u64 lba, u32 bytes, Nanoseconds bound = 0) {
        return {*this, Op::write_zeroes, lba, range(bytes), bound};
    }
    Transfer secure_discard(u64 lba, u32 bytes, Nanoseconds bound = 0) {
        return {*this, Op::secure_discard, lba, range(bytes), bound};
    }

    /// Checks the request and hands it to the driver. Always ends through complete(), even when refused; never
    /// resumes the waiter synchronously.
    inline void submit(Request& request) {
        if (this_processor() != executor_.processor()) [[unlikely]] {
            submitted_elsewhere();
        }
        if (held_ && request.op != Op::flush) [[unlikely]] {
            return;
        }
        accept(request);
    }
    /// Withdraws a request: one the device has not seen ends with cancelled; otherwise it ends when the device
    /// answers or has been stopped. True: it will end with cancelled.
    bool cancel(Request& request) { return request.pending_ && cancel_now(request); }
    /// For machine shutdown, on the device's processor: from now on only flush() is started. Any other submitted
    /// request never ends: its waiter stays suspended until its frame is destroyed. Irreversible.
    void hold() { held_ = true; }
    /// On the device's processor: requests accepted and not ended.
    inline u64 in_flight() const { return counters_.submitted - counters_.completed; }

  protected:
    ~BlockDevice() = default;

    /// Implemented by the driver. The request has been checked against the geometry. May complete it at once.
    virtual void start(Request& request) = 0;
    virtual bool cancel_now(Request& request) = 0;
    /// Called by ~Request for a request still under way: the driver must forget it before returning (stopping the
    /// device if necessary).
    virtual void forget(Request& request) = 0;

    /// Ends a request: exactly once for every start(). Makes the waiter ready.
    inline void complete(Request& request, Status status) {
        request.pending_ = false;
        request.status = status;
        ++counters_.completed;
        counters_.errors += status != Status::ok ? 1 : 0;
        if (request.waiter) { // a request without a waiter is polled by its owner: pending() becomes false
            executor_.make_ready(request);
        }
    }
    /// As to.submit(), also after hold(): for a lane that has accepted the request before its own hold().
    static void submit_forwarded(BlockDevice& to, Request& request);

    Identity identity_;
    Geometry geometry_;
    Counters counters_;

  private:
    friend class Request;
    static DmaSpan range(u32 bytes) { return {nullptr, 0, bytes}; }
    /// The new geometry, on its way to the lane's processor.
    struct Renewal : Post {
        BlockDevice* lane = nullptr;
        std::atomic<u64> sectors{0};
        std::atomic<u64> rest{0}; // everything else, packed
        std::atomic<bool> posted{false};
    };
    void learn(const Geometry& geometry);
    [[noreturn]] void submitted_elsewhere() const;
    std::optional<Status> refusal_of_change(const Request& request) const;
    inline void accept(Request& request) {
        ++counters_.submitted;
        request.status = Status::not_written;
        request.issued = 0;
        request.parts = 0;
        request.part_status = Status::ok;
        request.resends = 0;
        request.resend = false;
        request.pending_ = true;
        if (const auto refused = refusal(request)) [[unlikely]] {
            return complete(request, *refused);
        }
        start(request);
    }
    Executor& executor_;
    std::span<BlockDevice* const> shared_{};
    Nanoseconds timeout_ = 5'000'000'000;
    Renewal renewal_;
    bool held_ = false;
};

/// FIFO list of requests, through Request::link. Does not own them.
class RequestQueue {
  public:
    inline bool empty() const { return head_ == nullptr; }
    inline Request* front() const { return head_; }
    inline void push(Request& request) {
        request.link = nullptr;
        *tail_ = &request;
        tail_ = &request.link;
        ++size_;
    }
    inline void push_front(Request& request) {
        request.link = head_;
        tail_ = head_ == nullptr ? &request.link : tail_;
        head_ = &request;
        ++size_;
    }
    inline Request* pop() {
        Request* request = head_;
        if (request != nullptr) {
            head_ = request->link;
            if (head_ == nullptr) {
                tail_ = &head_;
            }
            --size_;
        }
        return request;
    }
    /// Linear search. False: the request is not in the list.
    bool remove(Request& request) {
        for (Request** at = &head_; *at != nullptr; at = &(*at)->link) {
            if (*at == &request) {
                *at = request.link;
                if (*at == nullptr) {
                    tail_ = at;
                }
                --size_;
                return true;
            }
        }
        return false;
    }
    usize size() const { return size_; }

  private:
    Request* head_ = nullptr;
    Request** tail_ = &head_;
    usize size_ = 0;
};

} // namespace fl::io
