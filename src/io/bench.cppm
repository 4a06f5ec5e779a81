// The workloads: one coroutine per queue slot, the same for every disk. What is measured is what docs/INTERFACES.md
// calls the record `result`.
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

enum class Pattern : u8 { randread, randwrite, read, write, mixed };
constexpr std::string_view name(Pattern pattern) {
    constexpr std::array<std::string_view, 5> names{"randread", "randwrite", "read", "write", "mixed"};
    return names[to_underlying(pattern)];
}

/// One workload as the command line gives it.
struct Workload {
    static constexpr u32 max_qd = 256;
    static constexpr u32 max_bs = 1024 * 1024;
    static constexpr u64 max_count = 0xffff'ffff;
    static constexpr Nanoseconds max_startdelay = 1'000'000'000;
    static constexpr Nanoseconds max_thinktime = 1'000'000;
    static constexpr u64 thinktime_blocks = 64; // I/Os from one pause to the next

    Pattern pattern = Pattern::randread;
    u32 bs = 4096;    // bytes of one I/O: a multiple of 512, at most max_bs
    u32 qd = 1;       // I/Os under way at once, on each lane that is used; at most max_qd
    u64 count = 2000; // I/Os in all, at most max_count
    u64 seed = 1;
    u32 mix = 70; // per cent of reads in `mixed`
    // Where guest, VMM and host are in step, a figure depends on how they began. Both in nanoseconds:
    Nanoseconds startdelay = 0; // busy for so long before the first I/O
    Nanoseconds thinktime = 0;  // busy for 0 to this, drawn from `seed`, after every thinktime_blocks I/Os of a lane

    constexpr bool writes() const {
        return pattern == Pattern::randwrite || pattern == Pattern::write || (pattern == Pattern::mixed && mix < 100);
    }
};

/// `randread,bs=4k,qd=1,count=2000,seed=1,mix=70,startdelay=0,thinktime=0`; all but the name may be left out.
/// Error{bad_argument}: its message names the key that is meant, or the values that are allowed.
Result<Workload> parse_workload(std::string_view text);

/// One direction of a finished run, in nanoseconds of elapsed time: a stop of the machine is part of the latencies of
/// what was under way.
struct Latencies {
    u64 ios = 0; // those that ended well; the latencies are of these
    u64 bytes = 0;
    u64 min = 0;
    u64 max = 0;
    u64 mean = 0;
    u64 stddev = 0;
    std::array<u64, Histogram::usual.size()> percentiles{}; // of Histogram::usual
    // the runner's (of lanes, the first one's), until its next run
    const Histogram* histogram = nullptr;
};

struct BenchReport {
    Workload workload;
    u32 lanes = 1; // of the disk that were used
    // from the first submission to the last completion, without the pauses of the lane that ended last
    Nanoseconds runtime_ns = 0;
    Nanoseconds thinktime_ns = 0; // those pauses
    u64 errors = 0;               // I/Os that failed or were given up
    Counters counters;            // of the disk, over the run
    u64 allocations = 0;          // coroutine frames and heap blocks, over the run
    Latencies read;
    Latencies write;
    std::optional<Error> first_error;
};

/// What a run needs beside the disk.
struct BenchOptions {
    DmaAllocator* dma = nullptr;    // buffers: qd times bs bytes, taken before the measured part
    bool scratch = false;           // the disk may be overwritten
    u64 (*allocations)() = nullptr; // counts the allocations of everybody else (the kernel's heap); may be absent
    /// Called with `phase` before the clock is read for the first I/O, and with 0 after it was read for the last one;
    /// in a run that submits nothing, not at all. Several lanes: the second call comes when all have ended. May be
    /// absent.
    void (*mark)(u32 phase) = nullptr;
    u32 phase = 0;
};

/// Runs workloads, one at a time. 50 KiB: not for a stack in the kernel, nor for a coroutine frame.
class Bench {
  public:
    Bench() = default;
    Bench(const Bench&) = delete;
    Bench& operator=(const Bench&) = delete;

    /// Measures. Error{bad_argument}, before anything is submitted: a block size that does not suit the disk, a disk
    /// that is smaller than asked, a write workload without options.scratch or on a read-only disk. Error{exhausted}:
    /// no buffers or frames. I/Os that fail are counted in the report; a disk that has timed out, gone or broken its
    /// protocol ends the run, and what was not done counts as failed.
    Task<Result<BenchReport>> run(BlockDevice& disk, Workload workload, BenchOptions options);

    /// The same on several lanes of the disk at once, one runner for each: lanes 0 to runners.size() - 1 <=
    /// disk.lanes() - 1, each on a processor of its own. The I/Os are shared out evenly, random ones from a seed for
    /// each lane (seed + lane), sequential ones as a stretch for each. They begin together; runtime_ns is from there to
    /// the last completion of all.
    static Task<Result<BenchReport>> run_lanes(std::span<Bench* const> runners, BlockDevice& disk, Workload workload,
                                               BenchOptions options);

    /// What run() and run_lanes() (with `lanes` of them) would refuse before the first I/O, memory for buffers aside.
    static Result<void> suits(const BlockDevice& disk, const Workload& workload, const BenchOptions& options,
                              u32 lanes);

  private:
    struct Start;
    static Task<Result<void>> lane_task(Bench& bench, BlockDevice& lane, Start& start);
    static Task<Result<void>> lane_elsewhere(Bench& bench, BlockDevice& lane, Start& start);
    static Task<Result<void>> slot(Bench& bench, BlockDevice& disk, u32 index);
    Result<void> prepare(BlockDevice& disk, const Workload& workload, const BenchOptions& options);
    bool next(Op& op, u64& lba);
    void ended(const Request& request, Instant begun, Instant now);
    /// Pauses as the workload asks for; the time when it is over.
    Instant think(Executor& executor, Instant now);
    void release();

    Workload workload_;
    u64 left_ = 0;      // I/Os not yet started
    u64 blocks_ = 0;    // of workload_.bs bytes on the disk
    u64 block_ = 0;     // the next one of a sequential workload
    Instant ended_ = 0; // elapsed time of the last completion, with several lanes
    u64 sectors_per_block_ = 0;
    SplitMix64 random_;
    u64 errors_ = 0;
    bool stopped_ = false;
    u64 until_thinking_ = 0; // I/Os
    SplitMix64 thinking_;
    Nanoseconds thought_ = 0;
    std::optional<Error> first_error_;
    Histogram read_;
    Histogram write_;
    std::array<DmaBuffer, Workload::max_qd> buffers_;
};

/// The record `result`.
/// `clock_assumed`: the times are by a clock whose rate is a guess; the record says so.
void print_record(const BlockDevice& disk, const BenchReport& report, bool clock_assumed = false);

} // namespace fl::io
