// The job, and an orderly end before it is done: when somebody outside asks for one (io.shutdown), the job is given up,
// the disks are brought to rest, and the machine ends with a verdict of its own. Portable: the tests run it on disks in
// memory.
export module boot.shutdown;
import core.std;
import core.result;
import core.time;
import io.task;
import io.shutdown;
import boot.options;
import boot.disks;
export import boot.jobs;

export namespace fl::boot {

/// run_job(), unless `shutdown` is asked for first: then nothing more is begun, what is under way ends, the job is
/// given up, every disk is flushed, and who asked is told. Slow disks are waited for; when for options.timeout no
/// request of any disk ends, the job's memory is given up with it. An end that leaves every disk at rest is a success,
/// any other one a failure.
io::Task<Result<Outcome>> run_until_shutdown(const Options& options, const Disks& disks, JobServices services,
                                             io::Shutdown& shutdown);

} // namespace fl::boot
