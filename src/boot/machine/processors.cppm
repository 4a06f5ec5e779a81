// The processors of this machine: one executor for each, and their part in the backend.
export module boot.machine.processors;
import core.std;
import core.time;
import io.executor;
import boot.backend;

export namespace fl::boot {

/// Starts further processors until `most` run, joins them to the backend and runs their executors. `executor` is the
/// boot processor's, which calls this, once; both live as long as the machine. Reports what runs: a line and the record
/// `processors`. `bound`: how long one may take to join.
void start_executors(Backend& backend, io::Executor& executor, u32 most, Nanoseconds bound);
/// Of every processor that runs, index = processor.
std::span<io::Executor* const> executors();
/// Ends the executors of the further processors, which leave the backend; waits for a bounded time.
void stop_executors();

} // namespace fl::boot
