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

// The job and its result. On the heap, because it may have to outlive the caller.
struct Work {
    explicit Work(io::Executor& executor) : group(executor) {}
    std::optional<Result<Outcome>> done;
    io::TaskGroup group; // destroyed before what its tasks use
};

// Runs on the lane's own processor: holds back new requests and returns the number of requests in flight.
io::Task<Result<u64>> hold(io::BlockDevice& lane) {
    lane.hold();
    co_return lane.in_flight();
}

// Quiesces all disks: no new request is started and those in flight have completed, so no device accesses the job's
// buffers any more. All lanes are held before the first one is waited for. A slow disk that makes progress is waited
// for, however many requests it has. `timeout` (ns) bounds the time in which no request completes on any disk, because
// lanes of one disk, and disks of one host, may queue up after each other. The total wait is at most one time-out for
// each request in flight.
io::Task<Result<void>> quiesce(const Disks& disks, JobServices services, Nanoseconds timeout) {
    static constexpr Nanoseconds poll = 1'000'000;
    std::optional<io::Bound> silence;
    for (u64 before = 0;;) {
        u64 in_flight = 0;
        std::optional<Error> failed;
        for (io::BlockDevice* disk : disks.all()) {
            for (u32 i = 0; i < disk->lanes(); ++i) {
                io::BlockDevice& lane = disk->lane(i);
                const auto held = &lane.executor() == &services.executor
                                      ? co_await hold(lane)
                                      : co_await io::run_on(lane.executor(), hold(lane));
                if (held) {
                    in_flight += *held;
                } else {
                    failed = held.error();
                }
            }
        }
        if (in_flight == 0) {
            co_return failed ? Result<void>(*failed) : Result<void>{};
        }
        if (!silence || in_flight < before) {
            silence.emplace(services.executor, timeout);
        } else if (silence->passed()) {
            co_return Error{Code::timed_out, "requests are still in flight, and none has completed within a time-out",
                            0, in_flight};
        }
        before = in_flight;
        co_await services.executor.sleep(poll);
    }
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
    static_cast<void>(co_await shutdown.await_request());
    if (!shutdown.requested() && work->done) {
        co_return *work->done;
    }
    log::info("boot: {} requests a {}: flushing {} {}", shutdown.by(),
              shutdown.end() == io::Shutdown::End::restart ? "restart" : "shutdown", disks.all().size(),
              plural(disks.all().size(), "disks"));
    // Cancel the unfinished job with everything it waits for. Free its memory only if no device can access it any more.
    Outcome outcome;
    if (auto quiesced = co_await quiesce(disks, services, options.timeout); quiesced) {
        work.reset();
    } else {
        log::error("boot: not every disk becomes idle; the job's memory is given up: {}", quiesced.error());
        static_cast<void>(work.release());
        outcome.verdict = Verdict::failure;
    }
    for (io::BlockDevice* disk : disks.all()) {
        if (disk->removed()) {
            log::info("{}: removed, nothing to flush", disk->identity().name.view());
            continue;
        }
        if (auto flushed = co_await disk->flush(); !flushed && !disk->removed()) {
            report(flushed.error(), disk->identity().name.view());
            outcome.verdict = Verdict::failure;
        }
    }
    shutdown.quiesced(outcome.verdict == Verdict::success);
    static_cast<void>(co_await shutdown.await_answer({services.executor, answer_bound}));
    outcome.restart = shutdown.end() == io::Shutdown::End::restart;
    print(outcome.reason, "{} as requested by {}{}", outcome.restart ? "restarted" : "shut down", shutdown.by(),
          outcome.verdict == Verdict::success ? "" : ", and not every disk could be quiesced and flushed");
    co_return outcome;
}

} // namespace fl::boot
