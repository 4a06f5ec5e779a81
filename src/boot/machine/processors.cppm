// The processors of this machine: one executor for each, joined to the backend.
export module boot.machine.processors;
import core.std;
import core.time;
import io.executor;
import boot.backend;

export namespace fl::boot {

/// Starts secondary processors until `maximum` are running, joins them to the backend and runs their executors. Called
/// once, on the boot processor; `executor` is its executor. `backend` and `executor` live as long as the machine.
/// Prints a line and the record `processors`. `bound`: how long one processor may take to join, in ns.
void start_executors(Backend& backend, io::Executor& executor, u32 maximum, Nanoseconds bound);
/// One executor per running processor, index = processor.
std::span<io::Executor* const> executors();
/// Stops the executors of the secondary processors, which then leave the backend. The wait is bounded.
void stop_executors();

} // namespace fl::boot
