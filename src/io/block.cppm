// Block devices as coroutines see them: co_await disk.read(lba, buffer). The request is the awaiter and lives in the
// frame of the coroutine that waits; submitting allocates nothing.
export module io.block;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import io.executor;

export namespace fl::io {

enum class Op : u8 { read, write, flush, discard };
constexpr std::string_view name(Op op) {
    constexpr std::array<std::string_view, 4> names{"read", "write", "flush", "discard"};
    return names[to_underlying(op)];
}

/// How a request ended. `not_written` is the poison it starts with: a request that ends so was never answered.
enum class Status : u8 {
    ok,
    io_error,       // the device says so
    not_supported,  // the device refuses this operation
    timed_out,      // no answer within the bound
    cancelled,      // withdrawn before the device saw it, or given up
    device_gone,    // the queue was closed under it
    protocol_error, // the answer broke a rule
    misaligned,     // buffer or length is no multiple of the sector size
    out_of_range,   // beyond the last sector
    read_only,      // write, discard on a disk that must not be written
    not_written = 0xff,
};
Error to_error(Status status);

/// What a disk is. Set before it is announced, constant afterwards.
struct Geometry {
    u64 sectors = 0;                // of sector_size bytes each
    u32 sector_size = 512;          // bytes; 512 or 4096: the unit of LBAs and lengths
    u32 physical_sector_size = 512; // bytes; a hint
    bool read_only = false;
    bool flush = false; // has a volatile cache, and flush() empties it
    bool discard = false;
};

/// synthetic: made for virtual machines; emulated: a piece of hardware, played by the host.
enum class Kind : u8 { synthetic, emulated };
constexpr std::string_view name(Kind kind) { return kind == Kind::synthetic ? "synthetic" : "emulated"; }

/// Counted by the queue, one increment each, never reset: read before and after.
struct Counters {
    u64 submitted = 0;       // requests taken
    u64 completed = 0;       // requests ended, in whatever way
    u64 device_accesses = 0; // port and MMIO reads and writes: each one is an exit
    u64 hypercalls = 0;      // of this queue, notifications included
    u64 notifications = 0;   // doorbells: event sends, kicks; for ATA: commands issued
    u64 interrupts = 0;      // taken for this queue
    u64 errors = 0;          // requests that ended with anything but ok

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

/// One operation under way. Owned by the caller (as a rule: the awaiting frame); the device holds a pointer from
/// submit() to complete(). Must not move in between; when it dies in between the device forgets it. When a device ends
/// a request whose buffer its host may still access (a time-out on a host that never answered), buffer_lost is set: the
/// owner must not use the buffer again. It is also quarantined [core.dma], so that an owner who frees it does no harm.
class Request : public ReadyNode {
  public:
    Request(BlockDevice& device, Op op, u64 lba, DmaSpan buffer) : buffer(buffer), lba(lba), op(op), device_(&device) {}
    Request(const Request&) = delete;
    Request& operator=(const Request&) = delete;
    ~Request();

    // The operation: constant once submitted.
    DmaSpan buffer; // whole sectors; empty for flush
    u64 lba;        // in sectors of the device
    Op op;
    // Its end.
    Status status = Status::not_written;
    bool buffer_lost = false;

    // For the queue alone [io.block_queue], from submit() to complete().
    Request* link = nullptr;         // the next request in the list that it is in
    u32 issued = 0;                  // bytes of the buffer that have been made into commands
    u32 parts = 0;                   // commands for it that have not been answered
    Status part_status = Status::ok; // the first error of its commands
    u8 tries = 0;                    // times that it was sent again after an error of the transport
    bool again = false;              // to be sent again, alone, when its last command has been answered

    inline bool pending() const { return pending_; }
    inline BlockDevice& device() const { return *device_; }

  private:
    friend class BlockDevice;
    BlockDevice* device_;
    bool pending_ = false;
};

/// A disk that is attached: what every driver's disk derives from. Owned by its driver.
class BlockDevice {
  public:
    struct Identity {
        FixedText<16> name;      // "xvda", "hda"
        std::string_view driver; // "xen_blk", "ata"; static storage
        Kind kind = Kind::emulated;
        FixedText<48> model;
        FixedText<96> features; // negotiated ones, blank separated
    };

    BlockDevice(Executor& executor) : executor_(executor) {}
    BlockDevice(const BlockDevice&) = delete;
    BlockDevice& operator=(const BlockDevice&) = delete;

    inline const Identity& identity() const { return identity_; }
    inline const Geometry& geometry() const { return geometry_; }
    inline const Counters& counters() const { return counters_; }
    inline Executor& executor() const { return executor_; }
    /// How many processors may submit at once, each through a queue of its own. Lane 0 is the disk itself, on the boot
    /// processor. Lane i belongs to a further processor (executor() says which): the same disk with the same identity
    /// and geometry, counters of its own. A request is submitted, completed and destroyed on the processor of its lane;
    /// data written through one lane and acknowledged is seen through every other. Constant once the disk is announced.
    virtual u32 lanes() const { return 1; }
    /// index < lanes(). Lives as long as the disk.
    virtual BlockDevice& lane(u32 index) {
        static_cast<void>(index);
        return *this;
    }
    /// The host has taken the disk itself away: every request ends as device_gone, and there is nothing left that a
    /// flush could reach. A disk that was closed because of an error is not removed.
    virtual bool removed() const { return false; }
    /// How long the device may take for a request, once it has that and those before it are answered [io.oldest_wait].
    void set_timeout(Nanoseconds timeout) { timeout_ = timeout; }
    Nanoseconds timeout() const { return timeout_; }

    class [[nodiscard]] Transfer : public Request {
      public:
        using Request::Request;
        bool await_ready() const { return false; }
        void await_suspend(std::coroutine_handle<> h) {
            waiter = h;
            device().submit(*this);
        }
        Result<void> await_resume() const {
            if (status == Status::ok) [[likely]] {
                return {};
            }
            return to_error(status);
        }
    };

    /// co_await these. The buffer is whole sectors, aligned to one, and outlives the operation; ordering between
    /// operations under way is not promised.
    Transfer read(u64 lba, DmaSpan into) { return {*this, Op::read, lba, into}; }
    Transfer write(u64 lba, DmaSpan from) { return {*this, Op::write, lba, from}; }
    /// Everything acknowledged before this was submitted is on stable storage when it ends with ok. A disk without a
    /// volatile cache says ok at once.
    Transfer flush() { return {*this, Op::flush, 0, {}}; }

    /// Checks the request and hands it to the driver. Ends through complete(), also when it is refused: never
    /// synchronously resumed.
    void submit(Request& request);
    /// Withdraws a request: one that the device has not seen ends with cancelled; one that it has seen ends when the
    /// device answers or has been stopped. True: it will end with cancelled.
    bool cancel(Request& request) { return request.pending_ && cancel_now(request); }
    /// For the end of the machine, on the device's processor: from here on nothing but flush() is begun. Anything else
    /// that is submitted is left where it is: it never ends, and its waiter stays suspended until its frame dies. There
    /// is no way back.
    void hold() { held_ = true; }
    /// On the device's processor: requests that were taken and have not ended.
    inline u64 under_way() const { return counters_.submitted - counters_.completed; }

  protected:
    ~BlockDevice() = default;

    /// The driver's part. The request has been checked against the geometry. May complete it at once.
    virtual void start(Request& request) = 0;
    virtual bool cancel_now(Request& request) = 0;
    /// Called by ~Request on a request still under way: the driver forgets it before it returns (stops the device if it
    /// must).
    virtual void forget(Request& request) = 0;

    /// Ends a request: exactly once for every start(). The waiter becomes ready.
    void complete(Request& request, Status status);

    Identity identity_;
    Geometry geometry_;
    Counters counters_;

  private:
    friend class Request;
    Executor& executor_;
    Nanoseconds timeout_ = 5'000'000'000;
    bool held_ = false;
};

/// A list of requests in order of arrival, through Request::link. Owns nothing.
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
