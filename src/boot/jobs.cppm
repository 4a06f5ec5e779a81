// What the kernel was started for: job=boot, bench, verify, idle. Portable: the tests run jobs on disks in memory.
export module boot.jobs;
import core.std;
import core.result;
import core.text;
import core.time;
import core.verdict;
import core.dma;
import io.task;
import io.executor;
import boot.options;
import boot.devices;
import boot.disks;

export namespace fl::boot {

/// How a job ended; the verdict record says it to the outside.
struct Outcome {
    Verdict verdict = Verdict::success;
    FixedText<240> reason;
};

/// What jobs need of the kernel. References outlive the job.
struct JobServices {
    io::Executor& executor;
    DmaAllocator& dma;
    u64 (*heap_allocations)(); // since the start
    /// Of every processor that runs, index = processor; empty: there is one.
    std::span<io::Executor* const> executors{};
    /// Tells a host that counts where each workload of `bench` begins (their numbers from 1) and ends (0); absent:
    /// nobody counts.
    void (*mark)(u32 phase) = nullptr;
    /// What instants are worth: their rate is a guess, and no figure is printed without saying so; they are ahead of
    /// the time since the entry by so much.
    bool clock_assumed = false;
    Nanoseconds clock_ahead = 0;
    /// What was found and is not in use: listed once, after the first block of `job=boot`, before the other jobs;
    /// absent: nobody collects it.
    Devices* devices = nullptr;
};

/// Runs options.job (all but `panic`) on the disks. Everything that the options name is checked before the first
/// transfer: what is wrong with them ends with Verdict::error and nothing has been written. Prints the records of
/// docs/INTERFACES.md.
io::Task<Result<Outcome>> run_job(const Options& options, const Disks& disks, JobServices services);

/// The `error` record and its line for people.
void report(const Error& error, std::string_view where);

} // namespace fl::boot
