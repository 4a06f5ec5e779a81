// Reads, writes and flushes that end later than they begin: what a device asks for, what a medium does, and the order
// between them. No system calls: the VMM's media are in vmm.media, the unit tests have their own.
export module host.transfers;
import host.std;
export import host.platform;

export namespace fl::host {

/// One access to a disk's contents. Belongs to the device that starts it, and stays in place until it has ended.
struct Transfer {
    enum class Kind : u8 { none, read, write, flush };
    Kind kind = Kind::none;
    bool durable = false; // a write that has ended only when it is safe, as if a flush followed
    bool good = false;    // set when it has ended
    BlockStore* store = nullptr;
    u64 offset = 0;
    std::vector<std::span<std::byte>> pieces; // in the guest's memory, which stays mapped as long as the machine runs
    /// Called once, when it has ended; perhaps within Transfers::start(). The transfer may then be used again.
    void (*ended)(Transfer& transfer) = nullptr;

    // of Transfers
    u64 number = 0;
    bool syncing = false; // a durable write: written, and now made safe
};

/// Receives the end of each transfer that Medium::start() has begun.
class MediumEvents {
  public:
    virtual void done(Transfer& transfer, bool good) = 0;

  protected:
    ~MediumEvents() = default;
};

/// The system's part: reads and writes, in any order.
class Medium {
  public:
    virtual ~Medium() = default;
    /// Nanoseconds, on the clock of Server::poll().
    virtual u64 now() = 0;
    /// Reads or writes the pieces; with `sync` makes everything written to the store so far safe. `events.done()`
    /// follows once, in this call or in submit() or wait().
    virtual void start(Transfer& transfer, bool sync, MediumEvents& events) = 0;
    /// Passes on what was started, and reports what has ended, without waiting.
    virtual void submit() {}
    /// Reports what has ended, and waits until `deadline` for one if there is none.
    virtual void wait(u64 deadline) { static_cast<void>(deadline); }
};

/// All transfers of a machine. A flush begins when all earlier writes to its store have ended: it promises that they
/// are safe. Nothing else waits for anything.
class Transfers final : private MediumEvents {
  public:
    explicit Transfers(Medium& medium) : medium_(medium) {}
    u64 now() { return medium_.now(); }
    void start(Transfer& transfer);
    void submit() { medium_.submit(); }
    /// Waits for the transfers that `which` accepts, at most `limit` nanoseconds. False: some have not ended.
    bool drain(const std::function<bool(const Transfer&)>& which, u64 limit);
    usize in_flight() const { return running_.size() + waiting_.size(); }
    u64 started() const { return next_; }
    /// Flushes that had to wait for a write.
    u64 waited() const { return waited_; }

  private:
    void done(Transfer& transfer, bool good) override;
    bool writes_before(const Transfer& flush) const;

    Medium& medium_;
    u64 next_ = 0;
    u64 waited_ = 0;
    std::vector<Transfer*> running_; // started in the medium
    std::vector<Transfer*> waiting_; // flushes, in order
};

} // namespace fl::host
