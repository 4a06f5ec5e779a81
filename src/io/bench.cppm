// The workloads: one coroutine per queue slot, the same for every disk. The results are defined by the record
// `result` in docs/INTERFACES.md.
export module io.bench;
import core.std;
import core.result;
import core.time;
import core.dma;
import io.task;
import io.executor;
import io.block;
import io.histogram;
import io.random;

export namespace fl::io {

enum class Pattern : u8 { randread, randwrite, read, write, randrw };
constexpr std::string_view name(Pattern pattern) {
    constexpr std::array<std::string_view, 5> names{"randread", "randwrite", "read", "write", "randrw"};
    return names[to_underlying(pattern)];
}

/// A workload, as given on the command line.
struct Workload {
    static constexpr u32 max_qd = 256;
    static constexpr u32 max_bs = 1024 * 1024;
    static constexpr u64 max_count = 0xffff'ffff;
    static constexpr Nanoseconds max_startdelay = 1'000'000'000;
    static constexpr Nanoseconds max_thinktime = 1'000'000;
    static constexpr u64 thinktime_blocks = 64; // I/Os between pauses

    Pattern pattern = Pattern::randread;
    u32 bs = 4096;    // bytes per I/O: a multiple of 512, at most max_bs
    u32 qd = 1;       // concurrent I/Os on each lane used; at most max_qd
    u64 count = 2000; // total I/Os, at most max_count
    u64 seed = 1;
    u32 mix = 70; // percentage of reads in `randrw`
    // These break up phase locking between guest, VMM and host, which makes results depend on the start. Nanoseconds:
    Nanoseconds startdelay = 0; // busy-wait before the first I/O
    // busy-wait of 0 to this, drawn from `seed`, after every thinktime_blocks I/Os of a lane
    Nanoseconds thinktime = 0;

    constexpr bool writes() const {
        return pattern == Pattern::randwrite || pattern == Pattern::write || (pattern == Pattern::randrw && mix < 100);
    }
};

/// `randread,bs=4k,qd=1,count=2000,seed=1,mix=70,startdelay=0,thinktime=0`; everything except the name is optional.
/// Error{bad_argument}: the message names the key, or the allowed values.
Result<Workload> parse_workload(std::string_view text);

/// One direction of a finished run, in nanoseconds of elapsed time: a machine stop counts toward the latencies of
/// I/Os under way.
struct Latencies {
    u64 ios = 0; // successful I/Os; latencies cover only these
    u64 bytes = 0;
    u64 min = 0;
    u64 max = 0;
    u64 mean = 0;
    u64 stddev = 0;
    std::array<u64, Histogram::usual.size()> percentiles{}; // of Histogram::usual
    // owned by the runner (the first lane's, if several); valid until its next run
    const Histogram* histogram = nullptr;
};

struct BenchReport {
    Workload workload;
    u32 lanes = 1; // lanes of the disk used
    // from the first submission to the last completion, excluding the pauses of the lane that ended last
    Nanoseconds runtime_ns = 0;
    Nanoseconds thinktime_ns = 0; // those pauses
    u64 errors = 0;               // I/Os that failed or were abandoned
    Counters counters;            // of the disk, over the run
    u64 allocations = 0;          // coroutine frames and heap blocks, over the run
    // Of the processors of these lanes, each from the common start to its lane's last completion: how often they went
    // to sleep.
    u64 sleeps = 0;
    // The time that they did not sleep, without the pauses. Nothing: an executor does not time_sleep().
    std::optional<Nanoseconds> busy_ns;
    // What the host ran in place of these processors. Nothing: one of them is not told it.
    std::optional<Nanoseconds> stolen_ns;
    Latencies read;
    Latencies write;
    std::optional<Error> first_error;
};

/// What a run needs besides the disk.
struct BenchOptions {
    DmaAllocator* dma = nullptr;    // buffers: qd times bs bytes, allocated before the measured part
    bool scratch = false;           // the disk may be overwritten
    u64 (*allocations)() = nullptr; // counts all other allocations (the kernel's heap); may be nullptr
    /// Called with `phase` before the clock is read for the first I/O, and with 0 after it was read for the last one;
    /// not called in a run that submits nothing. Several lanes: the second call is made when all have ended. May be
    /// nullptr.
    void (*mark)(u32 phase) = nullptr;
    u32 phase = 0;
    /// Time for which the calling processor could have run and the host did not let it, in ns since some start;
    /// nothing: not told. May be nullptr.
    std::optional<Nanoseconds> (*stolen)() = nullptr;
};

/// Runs workloads, one at a time. 50 KiB: too large for a kernel stack or a coroutine frame.
class Bench {
  public:
    Bench() = default;
    Bench(const Bench&) = delete;
    Bench& operator=(const Bench&) = delete;

    /// Runs a measurement. Error{bad_argument}, before anything is submitted: a block size unsuitable for the disk, a
    /// disk smaller than required, or a write workload without options.scratch or on a read-only disk.
    /// Error{exhausted}: no buffers or frames. Failed I/Os are counted in the report; a disk that timed out, was
    /// removed or violated its protocol ends the run, and the remaining I/Os count as failed.
    Task<Result<BenchReport>> run(BlockDevice& disk, Workload workload, BenchOptions options);

    /// The same on several lanes of the disk concurrently, with one runner each: lanes 0 to runners.size() - 1 <=
    /// disk.lanes() - 1, each on its own processor. The I/Os are divided evenly: random ones use a seed per lane
    /// (seed + lane), sequential ones a region per lane. All lanes start together; runtime_ns runs from there to the
    /// last completion of all.
    static Task<Result<BenchReport>> run_lanes(std::span<Bench* const> runners, BlockDevice& disk, Workload workload,
                                               BenchOptions options);

    /// Checks what run() and run_lanes() (with `lanes` lanes) reject before the first I/O, except for buffer memory.
    static Result<void> check_workload(const BlockDevice& disk, const Workload& workload, const BenchOptions& options,
                                       u32 lanes);

  private:
    struct Start;
    static Task<Result<void>> lane_task(Bench& bench, BlockDevice& lane, Start& start);
    static Task<Result<void>> run_remote_lane(Bench& bench, BlockDevice& lane, Start& start);
    static Task<Result<void>> slot(Bench& bench, BlockDevice& disk, u32 index);
    Result<void> prepare(BlockDevice& disk, const Workload& workload, const BenchOptions& options);
    bool next(Op& op, u64& lba);
    void ended(const Request& request, Instant begun, Instant now);
    /// The time at which everything that resumes in this turn ends and begins: one reading of the clock for all, as in
    /// fio, which reads it once for the completions that it reaps together. Where the host emulates the counter a
    /// reading is an exit, and would cost more than the rest of an I/O.
    Instant time(const Executor& executor);
    /// Pauses as the workload specifies; returns the time at the end of the pause.
    Instant think(Executor& executor, Instant now);
    void release();
    /// What the processor had slept when the run began; count_sleep() takes the rest of the run.
    struct Slept {
        Instant begun;
        u64 sleeps;
        Nanoseconds slept;
        std::optional<Nanoseconds> stolen;
    };
    Slept slept(const Executor& executor, Instant begun) const;
    void count_sleep(const Executor& executor, const Slept& before);

    Workload workload_;
    u64 left_ = 0;      // I/Os not yet started
    u64 blocks_ = 0;    // of workload_.bs bytes on the disk
    u64 block_ = 0;     // next block of a sequential workload
    Instant ended_ = 0; // elapsed time of the last completion
    u64 sleeps_ = 0;    // of its processor, from the start to ended_
    std::optional<Nanoseconds> busy_;
    std::optional<Nanoseconds> stolen_;
    std::optional<Nanoseconds> (*tell_stolen_)() = nullptr;
    u64 sectors_per_block_ = 0;
    SplitMix64 random_;
    Instant time_ = 0;
    u64 timed_turn_ = 0; // the turn of time_
    u64 errors_ = 0;
    bool stopped_ = false;
    u64 until_thinktime_ = 0; // I/Os
    SplitMix64 thinktime_random_;
    Nanoseconds thinktime_ = 0;
    std::optional<Error> first_error_;
    Histogram read_;
    Histogram write_;
    std::array<DmaBuffer, Workload::max_qd> buffers_;
};

/// Prints the record `result`. `clock_assumed`: the clock's rate is an assumption; noted in the record.
void print_record(const BlockDevice& disk, const BenchReport& report, bool clock_assumed = false);

} // namespace fl::io
