// The jobs of the kernel: job=boot, bench, verify, idle, net. Portable: the tests run them on in-memory disks.
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
import boot.nets;

export namespace fl::boot {

/// The result of a job, reported by the verdict record.
struct Outcome {
    Verdict verdict = Verdict::success;
    FixedText<240> reason;
    bool restart = false; // the host has asked for a restart: the machine ends with one
};

/// What jobs need from the kernel. References outlive the job.
struct JobServices {
    io::Executor& executor;
    DmaAllocator& dma;
    u64 (*heap_allocations)(); // since boot
    /// One executor per running processor, index = processor; empty: only one processor.
    std::span<io::Executor* const> executors{};
    /// Notifies a host that counts events where each workload of `bench` starts (its number, from 1) and ends (0);
    /// nullptr: no notification.
    void (*mark)(u32 phase) = nullptr;
    /// clock_assumed: the clock's rate is a guess, and every printed figure says so. clock_ahead: how far instants are
    /// ahead of the time since the entry.
    bool clock_assumed = false;
    Nanoseconds clock_ahead = 0;
    /// The unused devices: listed once, after the first block of `job=boot` and before the other jobs; nullptr: not
    /// collected.
    Devices* devices = nullptr;
    /// The network cards; nullptr: there are none.
    const Nets* nets = nullptr;
    /// Hard to guess for others: the time stamp counter. For the numbers of packets.
    u64 seed = 1;
    /// As io::BenchOptions::stolen.
    std::optional<Nanoseconds> (*stolen)() = nullptr;
};

/// Runs options.job (any but `panic`) on the disks. Validates everything the options name before the first transfer; an
/// error there ends with Verdict::error, and nothing has been written. Prints the records of docs/INTERFACES.md.
io::Task<Result<Outcome>> run_job(const Options& options, const Disks& disks, JobServices services);

/// Prints the `error` record and its human-readable line.
void report(const Error& error, std::string_view where);

} // namespace fl::boot
