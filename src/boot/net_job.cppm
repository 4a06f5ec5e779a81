// job=net: gets an address for a network card, and pings, sends, receives or echoes datagrams as the command line says.
// Portable: the tests run it on two cards with a fake wire.
export module boot.net_job;
import core.result;
import io.task;
import boot.jobs;
import boot.options;

export namespace fl::boot {

/// Ends with ERROR if there is no such card, and with FAILURE if something did not come back within its bound. Prints
/// the records `net_address`, `ping`, `udp` and `net_counters`.
io::Task<Result<Outcome>> run_net(const Options& options, JobServices services);

} // namespace fl::boot
