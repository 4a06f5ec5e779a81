module;
#include <core/try.hpp>
module io.bench;
import core.std;
import core.result;
import core.text;
import core.log;
import core.spinlock;
import core.time;
import core.dma;
import io.task;
import io.executor;
import io.run_on;
import io.block;
import io.histogram;
import io.random;

namespace fl::io {

namespace {

// Levenshtein distance; for short words.
constexpr u32 edit_distance(std::string_view a, std::string_view b) {
    constexpr usize limit = 16;
    if (a.size() >= limit || b.size() >= limit) {
        return limit;
    }
    std::array<u32, limit> row{};
    for (usize j = 0; j <= b.size(); ++j) {
        row[j] = static_cast<u32>(j);
    }
    for (usize i = 1; i <= a.size(); ++i) {
        u32 diagonal = std::exchange(row[0], static_cast<u32>(i));
        for (usize j = 1; j <= b.size(); ++j) {
            const u32 here = std::min({row[j] + 1, row[j - 1] + 1, diagonal + (a[i - 1] == b[j - 1] ? 0 : 1)});
            diagonal = std::exchange(row[j], here);
        }
    }
    return row[b.size()];
}

struct Word {
    std::string_view word;
    std::string_view hint; // the message for a misspelling of it
};

constexpr std::array<Word, 5> pattern_words{{
    {"randread", "unknown workload: is randread meant? There are randread, randwrite, read, write, randrw"},
    {"randwrite", "unknown workload: is randwrite meant? There are randread, randwrite, read, write, randrw"},
    {"read", "unknown workload: is read meant? There are randread, randwrite, read, write, randrw"},
    {"write", "unknown workload: is write meant? There are randread, randwrite, read, write, randrw"},
    {"randrw", "unknown workload: is randrw meant? There are randread, randwrite, read, write, randrw"},
}};
constexpr std::array<Word, 7> key_words{{
    {"bs", "unknown key of a workload: is bs= meant? There are bs, qd, count, seed, mix, startdelay, thinktime"},
    {"qd", "unknown key of a workload: is qd= meant? There are bs, qd, count, seed, mix, startdelay, thinktime"},
    {"count", "unknown key of a workload: is count= meant? There are bs, qd, count, seed, mix, startdelay, thinktime"},
    {"seed", "unknown key of a workload: is seed= meant? There are bs, qd, count, seed, mix, startdelay, thinktime"},
    {"mix", "unknown key of a workload: is mix= meant? There are bs, qd, count, seed, mix, startdelay, thinktime"},
    {"startdelay",
     "unknown key of a workload: is startdelay= meant? There are bs, qd, count, seed, mix, startdelay, thinktime"},
    {"thinktime",
     "unknown key of a workload: is thinktime= meant? There are bs, qd, count, seed, mix, startdelay, thinktime"},
}};

Result<usize> find_word(std::span<const Word> words, std::string_view text) {
    usize best = 0;
    for (usize i = 0; i < words.size(); ++i) {
        if (words[i].word == text) {
            return i;
        }
        if (edit_distance(words[i].word, text) < edit_distance(words[best].word, text)) {
            best = i;
        }
    }
    return Error{Code::bad_argument, words[best].hint};
}

// A number with an optional suffix k, m or g.
std::optional<u64> parse_size(std::string_view text) {
    u32 shift = 0;
    if (!text.empty()) {
        switch (text.back()) {
        case 'k': shift = 10; break;
        case 'm': shift = 20; break;
        case 'g': shift = 30; break;
        default: break;
        }
    }
    const auto value = parse_number(shift == 0 ? text : text.substr(0, text.size() - 1));
    if (!value || (*value << shift) >> shift != *value) {
        return std::nullopt;
    }
    return *value << shift;
}

// The text before the first `at`, and the text after it; nullopt if there is none.
struct Piece {
    std::string_view head;
    std::optional<std::string_view> rest;
};
Piece cut(std::string_view text, char at) {
    for (usize n = 0; n < text.size(); ++n) {
        if (text[n] == at) {
            return {text.substr(0, n), text.substr(n + 1)};
        }
    }
    return {text, std::nullopt};
}

Result<void> check(const Workload& w) {
    if (w.bs == 0 || w.bs % 512 != 0 || w.bs > Workload::max_bs) {
        return Error{Code::bad_argument, "bs of a workload: a multiple of 512, at most 1m", Workload::max_bs, w.bs};
    }
    if (w.qd == 0 || w.qd > Workload::max_qd) {
        return Error{Code::bad_argument, "qd of a workload: 1 to 256", Workload::max_qd, w.qd};
    }
    if (w.count == 0 || w.count > Workload::max_count) {
        return Error{Code::bad_argument, "count of a workload: 1 to 4294967295", Workload::max_count, w.count};
    }
    if (w.mix > 100) {
        return Error{Code::bad_argument, "mix of a workload: the percentage of reads, 0 to 100", 100, w.mix};
    }
    if (w.startdelay > Workload::max_startdelay) {
        return Error{Code::bad_argument, "startdelay of a workload in nanoseconds: at most a second",
                     Workload::max_startdelay, w.startdelay};
    }
    if (w.thinktime > Workload::max_thinktime) {
        return Error{Code::bad_argument, "thinktime of a workload in nanoseconds: at most a millisecond",
                     Workload::max_thinktime, w.thinktime};
    }
    return {};
}

Latencies summary(const Histogram& histogram, u32 bs) {
    Latencies out;
    out.ios = histogram.count();
    out.bytes = histogram.count() * bs;
    out.min = histogram.min();
    out.max = histogram.max();
    out.mean = histogram.mean();
    out.stddev = histogram.stddev();
    out.histogram = &histogram;
    for (usize i = 0; i < Histogram::usual.size(); ++i) {
        out.percentiles[i] = histogram.percentile(Histogram::usual[i]);
    }
    return out;
}

void mark(const BenchOptions& options, u32 phase) {
    if (options.mark != nullptr) {
        options.mark(phase);
    }
}

// Busy-waits, so that the executor neither submits nor sleeps. Returns the time at its end.
Instant spin(Executor& executor, Nanoseconds length) {
    const Instant begin = executor.elapsed();
    Instant now = begin;
    while (now - begin < length) {
        spin_pause();
        now = executor.elapsed();
    }
    return now;
}

std::optional<Nanoseconds> sum(std::optional<Nanoseconds> a, std::optional<Nanoseconds> b) {
    return a && b ? std::optional(*a + *b) : std::nullopt;
}

u64 allocations(const BenchOptions& options) {
    return frame_pool().allocations() + (options.allocations != nullptr ? options.allocations() : 0);
}

} // namespace

Result<Workload> parse_workload(std::string_view text) {
    Workload w;
    const Piece first = cut(text, ',');
    TRY(const usize pattern, find_word(pattern_words, first.head));
    w.pattern = static_cast<Pattern>(pattern);
    for (std::optional<std::string_view> rest = first.rest; rest;) {
        const Piece item = cut(*rest, ',');
        rest = item.rest;
        const Piece pair = cut(item.head, '=');
        TRY(const usize key, find_word(key_words, pair.head));
        const auto value = pair.rest ? parse_size(*pair.rest) : std::nullopt;
        if (!value) {
            return Error{Code::bad_argument, "a workload's keys need a number each, as in "
                                             "bs=4k,qd=1,count=2000,seed=1,mix=70,startdelay=0,thinktime=0"};
        }
        const u32 clamped = static_cast<u32>(std::min<u64>(*value, ~u32{0}));
        switch (key) {
        case 0: w.bs = clamped; break;
        case 1: w.qd = clamped; break;
        case 2: w.count = *value; break;
        case 3: w.seed = *value; break;
        case 4: w.mix = clamped; break;
        case 5: w.startdelay = *value; break;
        default: w.thinktime = *value; break;
        }
    }
    CHECK(check(w));
    return w;
}

Result<void> Bench::check_workload(const BlockDevice& disk, const Workload& w, const BenchOptions& options, u32 lanes) {
    CHECK(check(w));
    const Geometry& g = disk.geometry();
    if (w.writes() && !options.scratch) {
        return Error{Code::bad_argument,
                     "a workload that writes needs a disk that may be overwritten: name it in scratch="};
    }
    if (w.writes() && g.read_only) {
        return Error{Code::bad_argument, "a workload that writes, and the disk is read-only"};
    }
    if (w.bs % g.sector_size != 0) {
        return Error{Code::bad_argument, "bs of a workload must be a multiple of the disk's sector size", g.sector_size,
                     w.bs};
    }
    const u64 blocks = g.sectors / (w.bs / g.sector_size);
    if (blocks == 0) {
        return Error{Code::bad_argument, "bs of a workload in bytes: at most the whole disk", g.sectors * g.sector_size,
                     w.bs};
    }
    const bool sequential = w.pattern == Pattern::read || w.pattern == Pattern::write;
    const u64 needed = !sequential ? 1 : lanes > 1 ? (w.count / lanes + 1) * lanes : w.count; // a region per lane
    if (blocks < needed) {
        return Error{Code::bad_argument, "count of a workload: at most as many blocks of bs bytes as the disk has",
                     blocks, needed};
    }
    if (options.dma == nullptr) {
        return Error{Code::bad_argument, "a workload needs memory for its buffers"};
    }
    if (w.count < lanes) {
        return Error{Code::bad_argument, "a workload needs an I/O for each lane of the disk", lanes, w.count};
    }
    return {};
}

Result<void> Bench::prepare(BlockDevice& disk, const Workload& w, const BenchOptions& options) {
    CHECK(check_workload(disk, w, options, 1));
    workload_ = w;
    sectors_per_block_ = w.bs / disk.geometry().sector_size;
    blocks_ = disk.geometry().sectors / sectors_per_block_;
    left_ = w.count;
    block_ = 0;
    random_ = SplitMix64(mix64(w.seed));
    errors_ = 0;
    stopped_ = false;
    until_thinktime_ = w.thinktime == 0 ? ~u64{0} : Workload::thinktime_blocks;
    thinktime_random_ = SplitMix64(w.seed);
    thinktime_ = 0;
    tell_stolen_ = options.stolen;
    timed_turn_ = ~u64{0};
    stolen_.reset();
    first_error_.reset();
    read_.reset();
    write_.reset();
    SplitMix64 filling(w.seed);
    for (u32 i = 0; i < w.qd; ++i) {
        TRY(buffers_[i], options.dma->buffer(w.bs));
        for (u32 at = 0; at < w.bs; at += 8) { // not zeroes, which a host may optimize
            const u64 word = filling.next();
            std::memcpy(buffers_[i].data() + at, &word, 8);
        }
    }
    return {};
}

void Bench::release() {
    for (DmaBuffer& buffer : buffers_) {
        buffer.reset();
    }
}

// Addresses form one sequence shared by all slots: the same seed accesses the same blocks at every queue depth.
[[gnu::always_inline]] inline bool Bench::next(Op& op, u64& lba) {
    if (left_ == 0 || stopped_) {
        return false;
    }
    --left_;
    switch (workload_.pattern) {
    case Pattern::randread:
    case Pattern::randwrite:
        op = workload_.pattern == Pattern::randread ? Op::read : Op::write;
        lba = random_.below(blocks_) * sectors_per_block_;
        break;
    case Pattern::read:
    case Pattern::write:
        op = workload_.pattern == Pattern::read ? Op::read : Op::write;
        lba = block_++ * sectors_per_block_;
        break;
    case Pattern::randrw:
        op = random_.below(100) < workload_.mix ? Op::read : Op::write;
        lba = random_.below(blocks_) * sectors_per_block_;
        break;
    }
    return true;
}

inline void Bench::ended(const Request& request, Instant begun, Instant now) {
    if (request.status == Status::ok) [[likely]] {
        (request.op == Op::read ? read_ : write_).record(now - begun);
        return;
    }
    ++errors_;
    if (!first_error_) {
        first_error_ = to_error(request.status);
    }
    // Continue after a bad sector; any other error would affect all following I/Os.
    stopped_ = stopped_ || request.status != Status::io_error;
}

Instant Bench::think(Executor& executor, Instant now) {
    until_thinktime_ = Workload::thinktime_blocks;
    const Instant ended = spin(executor, thinktime_random_.below(workload_.thinktime + 1));
    thinktime_ += ended - now;
    time_ = ended;
    return ended;
}

Instant Bench::time(const Executor& executor) {
    if (const u64 turn = executor.turns(); turn != timed_turn_) {
        timed_turn_ = turn;
        time_ = executor.elapsed();
    }
    return time_;
}

namespace {
/// The result is in its status.
struct Awaited : BlockDevice::Transfer {
    using Transfer::Transfer;
    void await_resume() const {}
};
} // namespace

Task<Result<void>> Bench::slot(Bench& bench, BlockDevice& disk, u32 index) {
    const DmaSpan buffer = bench.buffers_[index].span().subspan(0, bench.workload_.bs);
    Executor& executor = disk.executor();
    Op op = Op::read;
    u64 lba = 0;
    // One timestamp ends an I/O and begins the next one. All times of a report are elapsed time.
    Instant begun = bench.time(executor);
    while (bench.next(op, lba)) {
        Awaited transfer(disk, op, lba, buffer);
        co_await transfer;
        const Instant now = bench.time(executor);
        bench.ended(transfer, begun, now);
        begun = --bench.until_thinktime_ == 0 ? bench.think(executor, now) : now;
        if (transfer.buffer_lost) [[unlikely]] {
            bench.buffers_[index].abandon();
            break;
        }
    }
    co_return Result<void>{};
}

Bench::Slept Bench::slept(const Executor& executor, Instant begun) const {
    return {begun, executor.idles(), executor.slept(), tell_stolen_ != nullptr ? tell_stolen_() : std::nullopt};
}

void Bench::count_sleep(const Executor& executor, const Slept& before) {
    ended_ = executor.elapsed();
    sleeps_ = executor.idles() - before.sleeps;
    busy_ = executor.times_sleep()
                ? std::optional(ended_ - before.begun - (executor.slept() - before.slept) - thinktime_)
                : std::nullopt;
    const auto stolen = before.stolen ? tell_stolen_() : std::nullopt;
    // What the host tells need not grow.
    stolen_ = stolen ? std::optional(*stolen > *before.stolen ? *stolen - *before.stolen : 0) : std::nullopt;
}

Task<Result<BenchReport>> Bench::run(BlockDevice& disk, Workload workload, BenchOptions options) {
    if (auto ready = prepare(disk, workload, options); !ready) {
        release();
        co_return ready.error();
    }
    TaskGroup group(disk.executor());
    Result<void> spawned;
    for (u32 i = 0; i < workload.qd && spawned; ++i) {
        spawned = group.spawn(slot(*this, disk, i));
    }
    if (!spawned) {
        left_ = 0; // tasks already started end at once
        static_cast<void>(co_await group.join());
        release();
        co_return spawned.error();
    }
    BenchReport report;
    report.workload = workload;
    spin(disk.executor(), workload.startdelay);
    mark(options, options.phase);
    const Counters counters_before = disk.counters();
    const u64 allocations_before = allocations(options);
    const Executor& executor = disk.executor();
    const Slept before = slept(executor, executor.elapsed());
    static_cast<void>(co_await group.join());
    count_sleep(executor, before);
    report.runtime_ns = ended_ - before.begun - thinktime_;
    report.sleeps = sleeps_;
    report.busy_ns = busy_;
    report.stolen_ns = stolen_;
    report.thinktime_ns = thinktime_;
    mark(options, 0);
    report.allocations = allocations(options) - allocations_before;
    report.counters = disk.counters() - counters_before;
    report.errors = errors_ + left_;
    report.first_error = first_error_;
    report.read = summary(read_, workload.bs);
    report.write = summary(write_, workload.bs);
    release();
    co_return report;
}

// Start barrier of the lanes before the first I/O: the last one to arrive reads the clock and the allocations, and
// releases all.
struct Bench::Start {
    // for a lane that never arrives: no frame was left for it, or its processor has stopped
    static constexpr Nanoseconds longest = 5'000'000'000;

    u32 lanes;
    const BenchOptions& options;
    Instant begun = 0;
    u64 allocations = 0;
    std::atomic<u32> arrived{0};
    std::atomic<bool> open{false};
    std::atomic<bool> missed{false}; // written before `open`

    // Spinning is safe because each lane has its own processor. The data written by the last one is read after all
    // lanes have ended.
    Result<void> arrive_and_wait(Executor& executor) {
        const Bound bound(executor, longest);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == lanes) {
            mark(options, options.phase);
            allocations = io::allocations(options);
            begun = executor.elapsed();
            open.store(true, std::memory_order_release);
        }
        while (!open.load(std::memory_order_acquire)) { // pairs with the releases here
            spin_pause();
            if (bound.passed()) {
                missed.store(true, std::memory_order_relaxed); // ordered by the next line
                open.store(true, std::memory_order_release);
            }
        }
        if (missed.load(std::memory_order_relaxed)) {
            return Error{Code::timed_out, "the lanes of a disk did not all reach their common start", lanes,
                         arrived.load(std::memory_order_relaxed)};
        }
        return {};
    }
};

Task<Result<void>> Bench::lane_task(Bench& bench, BlockDevice& lane, Start& start) {
    Executor& executor = lane.executor();
    TaskGroup group(executor);
    Result<void> spawned;
    for (u32 i = 0; i < bench.workload_.qd && spawned; ++i) {
        spawned = group.spawn(slot(bench, lane, i));
    }
    const auto reached = start.arrive_and_wait(executor); // the slots run when this coroutine waits
    if (spawned && !reached) {
        spawned = reached;
    }
    if (!spawned) {
        bench.left_ = 0;
    }
    const Slept before = bench.slept(executor, start.begun);
    static_cast<void>(co_await group.join());
    bench.count_sleep(executor, before);
    co_return spawned;
}

Task<Result<void>> Bench::run_remote_lane(Bench& bench, BlockDevice& lane, Start& start) {
    co_return co_await run_on(lane.executor(), lane_task(bench, lane, start));
}

Task<Result<BenchReport>> Bench::run_lanes(std::span<Bench* const> runners, BlockDevice& disk, Workload workload,
                                           BenchOptions options) {
    const u32 lanes = static_cast<u32>(runners.size());
    BenchReport report;
    report.workload = workload;
    report.lanes = lanes;
    Result<void> ready;
    if (lanes == 0 || lanes > disk.lanes() || workload.count < lanes) {
        ready = Error{Code::bad_argument,
                      "a workload needs as many lanes of the disk as are requested, and an I/O for each", disk.lanes(),
                      lanes};
    }
    for (u32 i = 0; i < lanes && ready; ++i) {
        for (u32 other = 0; other < i; ++other) {
            if (&disk.lane(i).executor() == &disk.lane(other).executor()) {
                ready = Error{Code::not_supported, "two lanes of the disk share a processor: they cannot run at once",
                              i, other};
            }
        }
        Workload share = workload;
        share.count = workload.count / lanes + (i < workload.count % lanes ? 1 : 0);
        share.seed = workload.seed + i;
        if (ready) {
            ready = runners[i]->prepare(disk.lane(i), share, options);
            runners[i]->block_ = runners[i]->blocks_ / lanes * i;
        }
    }
    const bool sequential = workload.pattern == Pattern::read || workload.pattern == Pattern::write;
    if (ready && sequential && runners[0]->blocks_ / lanes < workload.count / lanes + 1) {
        ready = Error{Code::bad_argument, "count of a workload: at most as many blocks of bs bytes as the disk has",
                      runners[0]->blocks_, (workload.count / lanes + 1) * lanes};
    }
    // The other lanes' counters are stable now: the end of each lane's last task made its writes visible here.
    const auto counters = [&] {
        Counters sum;
        for (u32 i = 0; i < lanes; ++i) {
            sum = sum + disk.lane(i).counters();
        }
        return sum;
    };
    spin(disk.executor(), ready ? workload.startdelay : 0);
    Start start{.lanes = lanes, .options = options};
    const Counters before = ready ? counters() : Counters{};
    TaskGroup group(disk.executor());
    for (u32 i = 0; i < lanes && ready; ++i) {
        ready = group.spawn(run_remote_lane(*runners[i], disk.lane(i), start));
    }
    if (!ready) {
        start.lanes = 0; // nothing has started: spawned tasks run only when this coroutine waits, and it does not
    } else {
        ready = co_await group.join();
        mark(options, 0);
    }
    if (ready) {
        report.counters = counters() - before;
        report.allocations = allocations(options) - start.allocations;
        Instant ended = start.begun;
        report.stolen_ns = 0;
        report.busy_ns = 0;
        for (Bench* bench : runners) {
            if (bench->ended_ > ended) {
                ended = bench->ended_;
                report.thinktime_ns = bench->thinktime_;
            }
            report.errors += bench->errors_ + bench->left_;
            report.sleeps += bench->sleeps_;
            report.busy_ns = sum(report.busy_ns, bench->busy_);
            report.stolen_ns = sum(report.stolen_ns, bench->stolen_);
            if (!report.first_error) {
                report.first_error = bench->first_error_;
            }
            if (bench != runners[0]) {
                runners[0]->read_.add(bench->read_);
                runners[0]->write_.add(bench->write_);
            }
        }
        report.runtime_ns = ended - start.begun - report.thinktime_ns;
        report.read = summary(runners[0]->read_, workload.bs);
        report.write = summary(runners[0]->write_, workload.bs);
    }
    for (Bench* bench : runners) {
        bench->release();
    }
    if (!ready) {
        co_return ready.error();
    }
    co_return report;
}

namespace {
void print_direction(log::Record& record, std::string_view key, const Latencies& l) {
    record.open(key, '{').number("ios", l.ios).number("bytes", l.bytes);
    record.open("lat_ns", '{')
        .number("min", l.min)
        .number("max", l.max)
        .number("mean", l.mean)
        .number("stddev", l.stddev)
        .number("N", l.ios);
    record.open("percentile", '{');
    for (usize i = 0; i < Histogram::usual.size(); ++i) {
        FixedText<16> percent;
        print(percent, "{}.{:06}", Histogram::usual[i] / 1'000'000, Histogram::usual[i] % 1'000'000);
        record.number(percent, l.percentiles[i]);
    }
    record.close('}').close('}').close('}');
}

// The histogram of a direction, as records of bounded length: the first bucket's number and its count, then for each
// next nonempty bucket its distance and its count.
void print_latencies(const BlockDevice& disk, std::string_view op, const Latencies& latencies) {
    constexpr usize longest = 48; // counts per record: less than 800 characters
    if (latencies.histogram == nullptr) {
        return;
    }
    const Histogram& histogram = *latencies.histogram;
    for (usize at = histogram.next(0); at < Histogram::buckets;) {
        log::Record record("latencies");
        record.text("disk", disk.identity().name).text("op", op).number("bucket", at).open("counts", '[');
        record.number("", histogram.at(at));
        usize next = histogram.next(at + 1);
        for (usize n = 1; n < longest && next < Histogram::buckets; ++n) {
            record.number("", next - at).number("", histogram.at(next));
            at = next;
            next = histogram.next(at + 1);
        }
        record.close(']');
        at = next;
    }
}
} // namespace

void print_record(const BlockDevice& disk, const BenchReport& report, bool clock_assumed) {
    const Workload& w = report.workload;
    print_latencies(disk, "read", report.read);
    print_latencies(disk, "write", report.write);
    log::Record record("result");
    record.text("disk", disk.identity().name)
        .text("driver", disk.identity().driver)
        .text("kind", name(disk.identity().kind));
    record.text("workload", name(w.pattern))
        .number("bs", w.bs)
        .number("qd", w.qd)
        .number("count", w.count)
        .number("seed", w.seed)
        .number("mix", w.mix);
    if (w.startdelay != 0 || w.thinktime != 0) {
        record.number("startdelay", w.startdelay).number("thinktime", w.thinktime);
        record.number("thinktime_ns", report.thinktime_ns);
    }
    record.number("runtime_ns", report.runtime_ns).number("errors", report.errors);
    record.number("device_accesses", report.counters.device_accesses).number("hypercalls", report.counters.hypercalls);
    record.number("notifications", report.counters.notifications).number("interrupts", report.counters.interrupts);
    record.number("allocations", report.allocations).number("lanes", report.lanes);
    if (const Wait wait = disk.executor().wait(); wait != Wait::interrupt) {
        record.text("wait", name(wait));
    }
    record.number("sleeps", report.sleeps);
    if (report.busy_ns) {
        record.number("busy_ns", *report.busy_ns);
    }
    if (report.stolen_ns) {
        record.number("stolen_ns", *report.stolen_ns);
    }
    if (clock_assumed) {
        record.flag("clock_assumed", true);
    }
    print_direction(record, "read", report.read);
    print_direction(record, "write", report.write);
}

} // namespace fl::io
