// Runs the job, and handles a shutdown request that arrives before it is done (io.shutdown): the job is cancelled, the
// disks are quiesced and flushed, and the machine ends with a verdict of its own. Portable: the tests run it on
// in-memory disks.
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

/// run_job(), unless `shutdown` is requested first. Then no new request is started, pending ones complete, the job is
/// cancelled, every disk is flushed and the requester is notified. Slow disks are waited for; if no request on any disk
/// completes for options.timeout (ns), the job is abandoned and its memory leaked. The verdict is success if every disk
/// was quiesced and flushed, otherwise failure.
io::Task<Result<Outcome>> run_until_shutdown(const Options& options, const Disks& disks, JobServices services,
                                             io::Shutdown& shutdown);

} // namespace fl::boot
