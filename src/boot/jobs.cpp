module;
#include "core/try.hpp"
module boot.jobs;
import core.std;
import core.result;
import core.text;
import core.log;
import core.time;
import core.verdict;
import core.dma;
import core.processor;
import io.task;
import io.executor;
import io.run_on;
import io.block;
import io.bench;
import io.verify;
import boot.options;
import boot.devices;
import boot.disks;
import boot.net_job;

namespace fl::boot {

void report(const Error& error, std::string_view where) {
    log::error("{}: {}: {}", where, error.code, error);
    FixedText<320> message;
    print(message, "{}: {}", where, error);
    log::Record("error").text("code", name(error.code)).text("message", message.view());
}

namespace {

Outcome refused(const Error& error, std::string_view where) {
    report(error, where);
    Outcome outcome{Verdict::error, {}};
    print(outcome.reason, "{}: {}", where, error);
    return outcome;
}

// The error if the command line names a disk that does not exist.
std::optional<Outcome> unknown_disk(const DiskChoice& choice, std::string_view key, const Disks& disks) {
    for (std::string_view name : choice.names.all()) {
        if (disks.find(name) == nullptr) {
            Outcome outcome{Verdict::error, {}};
            print(outcome.reason, "{}={}: no such disk; there are: {}", key, name, disks.names().view());
            log::error("{}", outcome.reason.view());
            log::Record("error").text("code", fl::name(Code::not_found)).text("message", outcome.reason.view());
            return outcome;
        }
    }
    return std::nullopt;
}

constexpr std::string_view clock_note(const JobServices& services) {
    return services.clock_assumed ? " (the clock's rate is assumed, not measured)" : "";
}

void list_devices(const JobServices& services) {
    if (services.devices != nullptr) {
        services.devices->list();
    }
}

io::Task<Result<void>> report_processor() {
    log::info("processor {}: executor started", this_processor());
    co_return Result<void>{};
}

io::Task<Result<Outcome>> read_first_blocks(const Disks& disks, JobServices services) {
    Outcome outcome;
    bool first = true;
    u32 bad = 0;
    for (io::BlockDevice* disk : disks.all()) {
        // one for each disk: a host that misbehaves may keep its own
        CO_TRY(DmaBuffer buffer, services.dma.buffer(4096));
        const u32 size = disk->geometry().sector_size;
        auto transfer = disk->read(0, buffer.span().subspan(0, size));
        const Result<void> done = co_await transfer;
        const Instant now = services.executor.elapsed(); // counted from the entry
        if (transfer.buffer_lost) {
            buffer.abandon();
        }
        if (!done) { // read the others all the same, so that one boot reports all errors
            report(done.error(), disk->identity().name.view());
            outcome.verdict = Verdict::failure;
            print(outcome.reason, "{}{}: block 0: {}", bad++ == 0 ? "" : "; ", disk->identity().name.view(),
                  done.error());
            continue;
        }
        log::info("{}: block 0 read", disk->identity().name.view());
        if (std::exchange(first, false)) {
            const Nanoseconds since_entry = now - std::min(now, services.clock_ahead);
            log::info("first block {} us after the entry{}", since_entry / 1000, clock_note(services));
            {
                log::Record record("first_block");
                record.text("disk", disk->identity().name.view()).number("ns", since_entry);
                if (services.clock_assumed) {
                    record.flag("clock_assumed", true);
                }
            }
            list_devices(services);
        }
    }
    if (services.executors.size() > 1) {
        for (io::Executor* executor : services.executors) {
            CO_CHECK(co_await io::run_on(*executor, report_processor()));
        }
    }
    list_devices(services);
    if (bad == 0) {
        print(outcome.reason, "booted; disks: {}", disks.names().view());
        if (disks.all().empty() && services.devices != nullptr) {
            print(outcome.reason, " ({})", services.devices->why_no_disk().view());
        }
    } else if (outcome.reason.truncated()) {
        outcome.reason.clear();
        print(outcome.reason, "block 0 of {} of {} {} could not be read: see the errors above", bad, disks.all().size(),
              plural(disks.all().size(), "disks"));
    }
    co_return outcome;
}

// The workloads asked for. Each is parsed again when it is run: a list of them is too large for a coroutine frame.
struct Workloads {
    std::span<const std::string_view> texts;
    u32 count = 1; // without texts: one default workload
    bool writes = false;

    io::Workload at(u32 i) const { return texts.empty() ? io::Workload{} : *io::parse_workload(texts[i]); }
};

/// Fails if a text is not a valid workload.
Result<Workloads> parse_workloads(const TextList& texts) {
    Workloads workloads{.texts = texts.all()};
    for (std::string_view text : workloads.texts) {
        auto workload = io::parse_workload(text);
        if (!workload) {
            return workload.error();
        }
        workloads.writes = workloads.writes || workload->writes();
    }
    workloads.count = std::max(texts.count, 1u);
    return workloads;
}

std::optional<Outcome> not_scratch(const Options& options, const Disks& disks) {
    for (const io::BlockDevice* disk : disks.all()) {
        const std::string_view name = disk->identity().name.view();
        if (options.disk.chosen(name) && !options.scratch.chosen(name)) {
            Outcome outcome{Verdict::error, {}};
            print(outcome.reason,
                  "{} would be written, and is not marked as scratch: add scratch={} to the command line if it may be "
                  "overwritten",
                  name, name);
            log::error("{}", outcome.reason.view());
            log::Record("error").text("code", fl::name(Code::bad_argument)).text("message", outcome.reason.view());
            return outcome;
        }
    }
    return std::nullopt;
}

io::Task<Result<Outcome>> bench(const Options& options, const Disks& disks, JobServices services) {
    auto workloads = parse_workloads(options.workloads);
    if (!workloads) {
        co_return refused(workloads.error(), "workload");
    }
    if (workloads->writes) {
        if (auto bad = not_scratch(options, disks)) {
            co_return *bad;
        }
    }
    const auto there = disks.all(); // snapshot: disks added while we wait were not checked above
    u32 lane_limit = 1;
    for (io::BlockDevice* disk : there) {
        if (options.disk.chosen(disk->identity().name.view())) {
            lane_limit = std::max(lane_limit, disk->lanes());
        }
    }
    lane_limit = static_cast<u32>(std::min<u64>({lane_limit, options.lanes, max_processors}));
    std::array<std::unique_ptr<io::Bench>, max_processors> owned;
    std::array<io::Bench*, max_processors> runners{};
    for (u32 i = 0; i < lane_limit; ++i) {
        owned[i].reset(new (std::nothrow) io::Bench);
        runners[i] = owned[i].get();
    }
    if (std::ranges::find(runners.begin(), runners.begin() + lane_limit, nullptr) != runners.begin() + lane_limit) {
        co_return Error{Code::exhausted, "no memory for the benchmark's histograms: give the machine more"};
    }
    // Check every workload before running any: writes cannot be undone.
    for (const io::BlockDevice* disk : disks.all()) {
        const std::string_view disk_name = disk->identity().name.view();
        for (u32 i = 0; i < workloads->count && options.disk.chosen(disk_name); ++i) {
            const io::BenchOptions with{&services.dma, options.scratch.chosen(disk_name), services.heap_allocations};
            if (auto accepted =
                    io::Bench::check_workload(*disk, workloads->at(i), with, std::min(lane_limit, disk->lanes()));
                !accepted) {
                co_return refused(accepted.error(), disk_name);
            }
        }
    }
    // Let pending bus messages from the probe drain before anything is counted.
    co_await services.executor.sleep(20'000'000);
    Outcome outcome;
    u32 runs = 0;
    u64 errors = 0;
    for (io::BlockDevice* disk : there) {
        const std::string_view disk_name = disk->identity().name.view();
        if (!options.disk.chosen(disk_name)) {
            continue;
        }
        for (u32 i = 0; i < workloads->count; ++i) {
            const io::Workload workload = workloads->at(i);
            const io::BenchOptions with{
                &services.dma,  options.scratch.chosen(disk_name), services.heap_allocations, services.mark, runs + 1,
                services.stolen};
            const u32 lanes = std::min(lane_limit, disk->lanes());
            auto task = lanes == 1 ? runners[0]->run(*disk, workload, with)
                                   : io::Bench::run_lanes(std::span(runners).first(lanes), *disk, workload, with);
            auto result = co_await std::move(task);
            if (!result) {
                co_return refused(result.error(), disk_name);
            }
            io::print_record(*disk, *result, services.clock_assumed);
            const io::Wait wait = disk->executor().wait();
            FixedText<40> stolen; // named only where the host tells
            if (result->stolen_ns) {
                print(stolen, ", {} us stolen", *result->stolen_ns / 1000);
            }
            log::info("{}: {} bs={} qd={} lanes={}{}{}: {} {} in {} us, {} {}{}{}", disk_name, workload.pattern,
                      workload.bs, workload.qd, result->lanes,
                      wait == io::Wait::interrupt ? "" : " wait=", wait == io::Wait::interrupt ? "" : name(wait),
                      workload.count, plural(workload.count, "I/Os"), result->runtime_ns / 1000, result->errors,
                      plural(result->errors, "errors"), stolen.view(), clock_note(services));
            if (result->first_error) {
                report(*result->first_error, disk_name);
            }
            errors += result->errors;
            ++runs;
        }
    }
    outcome.verdict = errors == 0 ? Verdict::success : Verdict::failure;
    print(outcome.reason, "{} {}, {} failed {}", runs, plural(runs, "workloads"), errors, plural(errors, "I/Os"));
    if (lane_limit > 1) {
        print(outcome.reason, ", on {} lanes", lane_limit);
    }
    if (services.clock_assumed) {
        print(outcome.reason, "; times are by an assumed clock, not a measured one");
    }
    co_return outcome;
}

io::Task<Result<Outcome>> verify(const Options& options, const Disks& disks, JobServices services) {
    if (auto bad = not_scratch(options, disks)) {
        co_return *bad;
    }
    io::VerifyPlan plan;
    plan.scratch = true;
    // Values beyond 32 bits saturate; verify() then rejects them with the bounds.
    const auto narrow = [](u64 value) { return static_cast<u32>(std::min<u64>(value, ~u32{0})); };
    plan.bs = narrow(options.bs.value_or(plan.bs));
    plan.qd = narrow(options.qd.value_or(plan.qd));
    plan.count = options.count.value_or(plan.count);
    plan.seed = options.seed.value_or(plan.seed);
    plan.generation = options.generation;
    plan.erase = options.erase;
    // Check every disk before running any: writes cannot be undone.
    for (const io::BlockDevice* disk : disks.all()) {
        const std::string_view disk_name = disk->identity().name.view();
        if (auto blocks = options.disk.chosen(disk_name) ? io::blocks_of(disk->geometry(), plan) : Result<u64>{0};
            !blocks) {
            co_return refused(blocks.error(), disk_name);
        }
    }
    Outcome outcome;
    u32 good = 0;
    u32 lanes = 1;
    for (io::BlockDevice* disk : disks.all()) {
        const std::string_view disk_name = disk->identity().name.view();
        if (!options.disk.chosen(disk_name)) {
            continue;
        }
        auto result = co_await io::verify(*disk, plan, services.dma);
        if (!result) {
            co_return refused(result.error(), disk_name);
        }
        io::print_record(*disk, *result);
        if (result->first_error) {
            report(*result->first_error, disk_name);
        }
        lanes = std::max(lanes, result->lanes);
        if (result->ok()) {
            ++good;
            log::info("{}: {} {} of {} bytes verified on {} {}", disk_name, result->blocks,
                      plural(result->blocks, "blocks"), plan.bs, result->lanes, plural(result->lanes, "lanes"));
            if (plan.erase.any()) {
                log::info("{}: {} {} discarded, {} zeroed", disk_name, result->discarded,
                          plural(result->discarded, "blocks"), result->zeroed);
                if (plan.erase.secure_discard) {
                    log::info("{}: {} {} securely discarded", disk_name, result->secured,
                              plural(result->secured, "blocks"));
                }
            }
        } else {
            outcome.verdict = Verdict::failure;
            log::error("{}: verify failed: {} of {} {} bad, {} written, {} read", disk_name, result->bad,
                       result->blocks, plural(result->blocks, "blocks"), result->written, result->read);
        }
    }
    print(outcome.reason, "{} {} verified{}", good, plural(good, "disks"),
          outcome.verdict == Verdict::success ? "" : ", and not all of them");
    if (lanes > 1) {
        print(outcome.reason, ", on {} lanes", lanes);
    }
    co_return outcome;
}

} // namespace

io::Task<Result<Outcome>> run_job(const Options& options, const Disks& disks, JobServices services) {
    if (options.job != Job::boot || disks.all().empty()) {
        list_devices(services);
    }
    if (auto bad = unknown_disk(options.disk, "disk", disks)) {
        co_return *bad;
    }
    if (auto bad = unknown_disk(options.scratch, "scratch", disks)) {
        co_return *bad;
    }
    const bool needs_disk = options.job == Job::bench || options.job == Job::verify;
    if (needs_disk && disks.all().empty()) {
        Outcome outcome{Verdict::error, FixedText<240>("no disk was found")};
        if (services.devices != nullptr) {
            print(outcome.reason, ": {}", services.devices->why_no_disk().view());
        }
        co_return outcome;
    }
    switch (options.job) {
    case Job::boot: co_return co_await read_first_blocks(disks, services);
    case Job::bench: co_return co_await bench(options, disks, services);
    case Job::verify: co_return co_await verify(options, disks, services);
    case Job::idle: {
        const u64 before = services.executor.idles();
        co_await services.executor.sleep(options.timeout);
        log::Record("idle").number("sleeps", services.executor.idles() - before);
        co_return Outcome{Verdict::success, FixedText<240>("idled")};
    }
    case Job::net: co_return co_await run_net(options, services);
    case Job::panic: break;
    }
    co_return Outcome{Verdict::error, FixedText<240>("job=panic is not a job for run_job")};
}

} // namespace fl::boot
