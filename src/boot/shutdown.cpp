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
import io.run_on;
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

// The job with what it writes to. On the heap: it may have to outlive us.
struct Work {
    explicit Work(io::Executor& executor) : group(executor) {}
    std::optional<Result<Outcome>> done;
    io::TaskGroup group; // ends before what it uses
};

// On the lane's own processor.
io::Task<Result<void>> settle(io::BlockDevice& lane, Nanoseconds length) {
    lane.hold();
    const io::Bound bound(lane.executor(), length);
    while (lane.under_way() != 0) {
        if (bound.passed()) {
            co_return Error{Code::timed_out, "requests are still under way", 0, lane.under_way()};
        }
        co_await lane.executor().sleep(1'000'000);
    }
    co_return Result<void>{};
}

// Nothing more is begun on any disk, and what is under way has ended: no device reaches into the job's buffers any
// more. All lanes are stopped before the first one is waited for.
io::Task<Result<void>> bring_to_rest(const Disks& disks, JobServices services, Nanoseconds timeout) {
    Result<void> result;
    const io::Bound bound(services.executor, timeout); // for all of them together
    for (const bool wait : {false, true}) {
        result = {};
        for (io::BlockDevice* disk : disks.all()) {
            for (u32 i = 0; i < disk->lanes(); ++i) {
                io::BlockDevice& lane = disk->lane(i);
                const Instant now = services.executor.now();
                // a length: each lane counts its own time
                const Nanoseconds left = wait && !bound.passed(now) ? bound.due() - now : 0;
                auto settled = &lane.executor() == &services.executor
                                   ? co_await settle(lane, left)
                                   : co_await io::run_on(lane.executor(), settle(lane, left));
                if (!settled) {
                    result = settled;
                }
            }
        }
    }
    co_return result;
}

} // namespace

io::Task<Result<Outcome>> run_until_shutdown(const Options& options, const Disks& disks, JobServices services,
                                             io::Shutdown& shutdown) {
    static constexpr Nanoseconds answer_bound = 1'000'000'000;
    std::unique_ptr<Work> work(new (std::nothrow) Work(services.executor));
    if (!work) {
        co_return Error{Code::exhausted, "no memory for the job"};
    }
    CO_CHECK(work->group.spawn(keep(options, disks, services, shutdown, work->done)));
    static_cast<void>(co_await shutdown.asked());
    if (!shutdown.requested() && work->done) {
        co_return std::move(*work->done);
    }
    log::info("boot: {} asks for a shutdown: flushing {} {}", shutdown.by(), disks.all().size(),
              noun(disks.all().size(), "disks"));
    // A job that is not done ends here, with all that it waits for; its memory only when no host can reach it any more.
    if (auto rested = co_await bring_to_rest(disks, services, options.timeout); rested) {
        work.reset();
    } else {
        log::warning("boot: the job's memory is given up: {}", rested.error());
        static_cast<void>(work.release());
    }
    Outcome outcome;
    for (io::BlockDevice* disk : disks.all()) {
        if (disk->removed()) {
            log::info("{}: taken away, nothing to flush", disk->identity().name.view());
            continue;
        }
        if (auto flushed = co_await disk->flush(); !flushed && !disk->removed()) {
            report(flushed.error(), disk->identity().name.view());
            outcome.verdict = Verdict::failure;
        }
    }
    shutdown.rest(outcome.verdict == Verdict::success);
    static_cast<void>(co_await shutdown.was_answered({services.executor, answer_bound}));
    print(outcome.reason, "shut down as {} asked{}", shutdown.by(),
          outcome.verdict == Verdict::success ? "" : ", and not every disk could be flushed");
    co_return outcome;
}

} // namespace fl::boot
