module;
#include "core/try.hpp"
module boot.shutdown;
import core.std;
import core.result;
import core.text;
import core.log;
import core.time;
import core.verdict;
import io.executor;
import io.task;
import io.block;
import io.shutdown;
import boot.options;
import boot.disks;
import boot.jobs;

namespace fl::boot {

namespace {

io::Task<Result<void>> keep(const Options& options, const Disks& disks, JobServices services, io::Shutdown& shutdown,
                            std::optional<Result<Outcome>>& done) {
    done.emplace(co_await run_job(options, disks, services));
    shutdown.stop_waiting();
    co_return Result<void>{};
}

} // namespace

io::Task<Result<Outcome>> run_until_shutdown(const Options& options, const Disks& disks, JobServices services, io::Shutdown& shutdown) {
    static constexpr Nanoseconds answer_bound = 1'000'000'000;
    std::optional<Result<Outcome>> done;
    {
        io::TaskGroup job(services.executor);
        CO_CHECK(job.spawn(keep(options, disks, services, shutdown, done)));
        static_cast<void>(co_await shutdown.asked(never));
    } // a job that is not done ends here, with all that it waits for
    if (!shutdown.requested() && done) {
        co_return std::move(*done);
    }
    log::info("boot: {} asks for a shutdown: flushing {} disks", shutdown.by(), disks.all().size());
    Outcome outcome;
    for (io::BlockDevice* disk : disks.all()) {
        if (auto flushed = co_await disk->flush(); !flushed) {
            report(flushed.error(), disk->identity().name.view());
            outcome.verdict = Verdict::failure;
        }
    }
    shutdown.rest(outcome.verdict == Verdict::success);
    static_cast<void>(co_await shutdown.was_answered(after(services.executor.now(), answer_bound)));
    print(outcome.reason, "shut down as {} asked{}", shutdown.by(),
          outcome.verdict == Verdict::success ? "" : ", and not every disk could be flushed");
    co_return outcome;
}

} // namespace fl::boot
