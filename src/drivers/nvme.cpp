module;
#include "core/try.hpp"
module drivers.nvme;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.log;
import core.mmio;
import io.executor;
import io.task;
import io.block;
import drivers.driver;
import drivers.pci;
import drivers.pci.msi;

namespace fl::drivers::nvme {

namespace {
constinit Controller* attached = nullptr; // controllers live until machine shutdown

constexpr u32 admin_entries = 32;
constexpr u32 version_1_3 = 0x10300;
constexpr u32 version_1_4 = 0x10400;
} // namespace

Controller::Controller(Environment& environment, const pci::Device& device, u32 index)
    : environment_(environment), device_(device), index_(index), registers_(environment.executor),
      recovery_(environment.executor), admin_(environment, index),
      interrupts_(device, environment.interrupts, environment.mmio), namespaces_(environment, admin_, index),
      tasks_(environment.executor) {}

// Only after disconnect() or before connect(): no queue may be registered.
Controller::~Controller() {
    namespaces_.clear();
    interrupts_.detach();
    for (u32 i = 0; i < made_; ++i) {
        delete lanes_[i];
    }
}

// ---- set-up ----

Result<void> Controller::make_lane(u32 index, io::Executor& executor) {
    lanes_[index] = new (std::nothrow) Lane(executor, group_, recovery_);
    if (lanes_[index] == nullptr) {
        return Error{Code::exhausted, "no memory for a queue pair"};
    }
    if (index != 0) {
        queues_[index - 1] = &lanes_[index]->queue;
    }
    ++made_;
    return {};
}

/// Of the admin queue and `wanted` lanes. Returns how many lanes can have a queue pair.
Result<u32> Controller::attach_interrupts(u32 wanted) {
    std::array<pci::VectorUse, io::QueueGroup::max_queues> uses{};
    for (u32 i = 0; i <= wanted; ++i) {
        Queue& queue = lanes_[i]->queue;
        uses[i] = {queue.executor().processor(), QueueInterrupts::on_interrupt, &queue.transport().interrupts()};
    }
    const auto most = environment_.allows(Feature::messages) ? pci::InterruptKind::msix : pci::InterruptKind::line;
    TRY(vectors_, interrupts_.attach(std::span(uses).first(wanted + 1), 1, most));
    if (vectors_ < 2) {
        lanes_[0]->queue.transport().interrupts().share(lanes_[1]->queue.transport().interrupts());
    }
    // Other mechanisms than MSI-X interrupt one processor: one queue pair there. Else each has its own vector.
    const bool one = interrupts_.kind() != pci::InterruptKind::msix || vectors_ < 2;
    u32 count = one ? 1 : std::min(wanted, vectors_ - 1);
    while (count > 1 && !registers_.has_doorbells(count)) {
        --count;
    }
    if (!registers_.has_doorbells(count)) {
        return Error{Code::protocol, "the NVMe controller's BAR 0 has no room for an I/O queue's doorbells",
                     doorbells + doorbell_offset(1, true, registers_.stride()) + 4, registers_.bar().size()};
    }
    return count;
}

/// The empty rings of a queue pair; their memory is allocated the first time, and else forgotten by the controller.
Result<void> Controller::lay_out(u32 index) {
    Lane& lane = *lanes_[index];
    const u32 entries = index == 0 ? std::min(entries_, admin_entries) : entries_;
    const u32 completions = index == 0 ? entries : completion_entries_;
    if (!lane.submissions) {
        QueueInterrupts& events = lane.queue.transport().interrupts();
        events.use(registers_.bar(), interrupts_.kind() == pci::InterruptKind::line);
        events.use_vector(interrupts_, vectors_ < 2 ? 0 : index);
        TRY(lane.submissions, environment_.dma.buffer(entries * static_cast<u32>(sizeof(Submission))));
        TRY(lane.completions, environment_.dma.buffer(completions * static_cast<u32>(sizeof(CompletionEntry))));
        if (index != 0) {
            TRY(lane.lists, environment_.dma.buffer(Transport::max_entries * list_bytes));
        }
    } else {
        std::memset(lane.submissions.data(), 0, lane.submissions.size());
        std::memset(lane.completions.data(), 0, lane.completions.size());
    }
    const bool msix = interrupts_.kind() == pci::InterruptKind::msix;
    return lane.queue.transport().lay_out({.registers = registers_.bar(),
                                           .submissions = lane.submissions,
                                           .completions = lane.completions,
                                           .lists = lane.lists,
                                           .shadow = index != 0 && shadows_ ? shadow_.span() : DmaSpan{},
                                           .events = index != 0 && shadows_ ? events_.span() : DmaSpan{},
                                           .entries = entries,
                                           .completion_entries = completions,
                                           .id = static_cast<u16>(index),
                                           .stride = registers_.stride(),
                                           .lazy = msix && index != 0});
}

io::Task<Result<void>> Controller::connect() {
    if (const u64 delay = device_.power_on(); delay != 0) {
        co_await environment_.executor.sleep(delay);
    }
    CO_TRY(const Mmio bar, device_.map_bar(environment_.mmio, 0));
    CO_CHECK(registers_.open(bar));
    entries_ = std::bit_floor(std::min(registers_.largest_queue(), Transport::max_entries));
    completion_entries_ = std::bit_floor(std::min(registers_.largest_queue(), Transport::max_completions));

    const bool several = environment_.allows(Feature::multi_queue) && !environment_.executors.empty();
    const u32 wanted = several ? static_cast<u32>(std::min<usize>(environment_.executors.size(), max_lanes)) : u32{1};
    for (u32 i = 0; i <= wanted; ++i) {
        CO_CHECK(make_lane(i, i < 2 ? environment_.executor : *environment_.executors[i - 1]));
    }
    CO_CHECK(co_await registers_.disable());
    CO_TRY(const u32 lanes, attach_interrupts(wanted));
    CO_CHECK(admin_.open(admin_queue()));
    CO_CHECK(co_await bring_up());

    CO_CHECK(co_await admin_.identify(cns_controller, 0));
    info_ = parse_controller(admin_.data());
    if (!info_.queue_entries) {
        co_return Error{Code::not_supported, "the controller has neither commands of 64 nor completions of 16 bytes "
                                             "(SQES, CQES)"};
    }
    CO_CHECK(co_await read_limits());
    CO_CHECK(co_await settle_write_cache());
    CO_CHECK(co_await accept_retry_delays());
    const bool fits = doorbell_offset(static_cast<u16>(lanes), true, registers_.stride()) + 4 <= page;
    if (info_.doorbell_buffers && fits && environment_.allows(Feature::shadow_doorbells)) {
        CO_TRY(shadow_, environment_.dma.buffer(page));
        CO_TRY(events_, environment_.dma.buffer(page));
        CO_CHECK(co_await use_doorbell_buffers());
    }
    CO_TRY(const u32 granted, co_await ask_for_queues(lanes));
    for (u32 i = 1; i <= std::min(lanes, granted); ++i) {
        auto opened = co_await create_queues(i);
        if (delays_) {
            lanes_[i]->queue.transport().allow_delays(info_.retry_delays, environment_.timeout);
        }
        if (opened) {
            opened = co_await lanes_[i]->queue.start_there(environment_.executor, environment_.timeout,
                                                           [](io::GroupedQueue<Transport>& queue, Nanoseconds timeout) {
                                                               static_cast<Queue&>(queue).start(timeout);
                                                           });
        }
        if (!opened) {
            if (i == 1 || !admin_.is_open()) {
                co_return opened.error();
            }
            log::warning("nvme{}: queues for {} of {} processors: {}", index_, lane_count_, lanes, opened.error());
            break;
        }
        lane_count_ = i;
    }
    describe();
    co_return Result<void>{};
}

/// From a disabled controller to one that answers admin commands.
io::Task<Result<void>> Controller::bring_up() {
    CO_CHECK(lay_out(0));
    device_.change_command(pci::Command::of(pci::Command::bus_master));
    admin_queue().start(environment_.timeout);
    co_return co_await registers_.enable(lanes_[0]->submissions.bus(), lanes_[0]->completions.bus(),
                                         std::min(entries_, admin_entries));
}

/// A controller that refuses them is used without.
io::Task<Result<void>> Controller::use_doorbell_buffers() {
    std::memset(shadow_.data(), 0, shadow_.size());
    std::memset(events_.data(), 0, events_.size());
    auto done =
        co_await admin_.command(doorbell_buffer_command(shadow_.bus(), events_.bus()), "DOORBELL BUFFER CONFIG");
    if (!done && done.error().code != Code::io) {
        co_return done.error();
    }
    shadows_ = done.has_value(); // the buffers stay: a controller that reports an error may use them all the same
    co_return Result<void>{};
}

/// Returns how many queue pairs the controller has, at least 1.
io::Task<Result<u32>> Controller::ask_for_queues(u32 wanted) {
    const u32 asked = wanted - 1; // 0's based
    CO_TRY(const u32 granted, co_await admin_.set_feature(feature_number_of_queues, asked << 16 | asked,
                                                          "SET FEATURES (number of queues)"));
    co_return std::min((granted & 0xffff) + 1, (granted >> 16) + 1);
}

io::Task<Result<void>> Controller::create_queues(u32 index) {
    CO_CHECK(lay_out(index));
    const Lane& lane = *lanes_[index];
    const u16 id = static_cast<u16>(index);
    CO_CHECK(co_await admin_.command(
        create_completion_queue_command(id, completion_entries_, lane.completions.bus(), vectors_ < 2 ? 0 : index),
        "CREATE I/O COMPLETION QUEUE"));
    CO_CHECK(co_await admin_.command(create_submission_queue_command(id, entries_, lane.submissions.bus()),
                                     "CREATE I/O SUBMISSION QUEUE"));
    co_return Result<void>{};
}

/// Limits of the command set, which older controllers do not describe.
io::Task<Result<void>> Controller::read_limits() {
    if (registers_.version() >= version_1_4 && (info_.dataset_management || info_.write_zeroes)) {
        if (auto read = co_await admin_.identify(cns_command_set, 0, true); read) {
            limits_ = parse_command_set(admin_.data());
        } else if (read.error().code != Code::io) {
            co_return read;
        }
    }
    co_return Result<void>{};
}

/// Without flush nothing may stay in a volatile cache: it is switched off [nvme-1.4 §5.21.1.6].
io::Task<Result<void>> Controller::settle_write_cache() {
    if (info_.write_cache && !environment_.allows(Feature::flush)) {
        const auto off = co_await admin_.set_feature(feature_write_cache, 0, "SET FEATURES (volatile write cache)");
        if (!off && off.error().code != Code::io) {
            co_return off.error();
        }
        write_through_ = off.has_value();
        if (!off) {
            log::warning("nvme{}: it has a volatile write cache, which is neither flushed (features=-flush) nor can be "
                         "switched off: acknowledged data can be lost",
                         index_);
        }
    }
    co_return Result<void>{};
}

/// A controller that has delays may ask for them only once it knows that they are understood. One that refuses is used
/// without: its commands are sent again in the next tick.
io::Task<Result<void>> Controller::accept_retry_delays() {
    if (info_.retry_delays == RetryDelays{}) {
        co_return Result<void>{};
    }
    const auto on = co_await admin_.accept_delays();
    if (!on && on.error().code != Code::io) {
        co_return on.error();
    }
    delays_ = on.has_value();
    co_return Result<void>{};
}

void Controller::describe() {
    FixedText<96> features;
    print(features, "{}{}{} queues={}", write_through_ ? "write-through " : "", shadows_ ? "shadow-doorbells " : "",
          pci::name(interrupts_.kind()), lane_count_);
    namespaces_.use(info_, limits_, std::span(queues_).first(lane_count_), features,
                    registers_.version() >= version_1_3, registers_.command_sets());
    log::info("nvme{}: {} {} firmware {}, {} I/O {} by {}", index_, info_.model, info_.serial, info_.firmware,
              lane_count_, plural(lane_count_, "queues"), pci::name(interrupts_.kind()));
}

// ---- while in use ----

Result<void> Controller::keep() {
    admin_.reset_when_silent(recovery_);
    CHECK(tasks_.spawn(watch()));
    watching_events_ = true;
    return tasks_.spawn(watch_events());
}

// One event request is always with the controller [nvme-1.4 §5.2]. Ends when the controller is closed or reset.
io::Task<Result<void>> Controller::watch_events() {
    // Critical warnings, and changes of namespaces. A controller without one of them may refuse.
    static_cast<void>(co_await admin_.set_feature(feature_asynchronous_events, 1 << 8 | 0x1f,
                                                  "SET FEATURES (asynchronous events)", true));
    Result<void> handled;
    while (handled || handled.error().code != Code::timed_out) {
        const auto event = co_await admin_.next_event();
        if (!event) {
            if (event.error().code == Code::io) {
                log::warning("nvme{}: {}", index_, event.error());
            }
            break;
        }
        handled = co_await handle_event(*event);
        if (!handled) {
            log::warning("nvme{}: an event was not handled: {}", index_, handled.error());
        }
    }
    watching_events_ = false;
    co_return Result<void>{};
}

io::Task<Result<void>> Controller::handle_event(Event event) {
    if (event.type == event_notice && event.log_page == log_changed_namespaces) {
        co_return co_await namespaces_.changed();
    }
    if ((reported_events_ & 1u << event.type) == 0) { // one line for each type
        reported_events_ = static_cast<u8>(reported_events_ | 1u << event.type);
        log::warning("nvme{}: event of type {}{}, information {:#x}, log page {:#x} (further ones are not shown)",
                     index_, event.type,
                     event.type == event_error    ? " (error)"
                     : event.type == event_health ? " (health)"
                                                  : "",
                     event.information, event.log_page);
    }
    if (event.log_page == log_errors || event.log_page == log_health) { // lets the controller report the next one
        co_return co_await admin_.log_page(event.log_page, event.log_page == log_errors ? 64 : 512);
    }
    co_return Result<void>{};
}

// Does what the queues ask for [drivers.nvme.recovery], until the controller is closed.
io::Task<Result<void>> Controller::watch() {
    while (admin_.is_open()) {
        static_cast<void>(co_await recovery_.signal().wait());
        const Recovery::Request asked = recovery_.request();
        if (group_.closed() || asked.kind == Recovery::Kind::none) {
            continue;
        }
        auto done = asked.kind == Recovery::Kind::abort ? co_await abort(asked) : co_await reset(asked.cause);
        recovery_.done(asked);
        if (!done) {
            const io::Status status =
                done.error().code == Code::timed_out ? io::Status::timed_out : io::Status::device_gone;
            if (group_.close_first(status)) {
                log::error("nvme{}: closed: {}", index_, done.error());
            }
            break;
        }
    }
    if (auto left = co_await disconnect(); !left) {
        log::error("nvme{}: {}", index_, left.error());
    }
    recovery_.done(recovery_.request()); // nobody waits for it any more
    co_return Result<void>{};
}

/// One at a time: within every ACL. What follows from no success is a reset.
io::Task<Result<void>> Controller::abort(Recovery::Request request) {
    log::warning("nvme{}: no answer to command {:#x} of queue {} within {} ms: ABORT", index_, request.cid,
                 request.queue, environment_.timeout / 1'000'000);
    const auto aborted = co_await admin_.command(abort_command(request.queue, request.cid), "ABORT", true);
    if (!aborted || (*aborted & not_aborted) != 0) {
        recovery_.request_reset(aborted || aborted.error().code == Code::io ? Recovery::Cause::silent
                                                                            : Recovery::Cause::admin);
    }
    co_return Result<void>{};
}

/// The I/O queues end whatever else they do, and touch no ring.
io::Task<Result<void>> Controller::wait_until_quiet() {
    const io::Bound bound(environment_.executor, environment_.timeout);
    for (u32 i = 1; i <= lane_count_; ++i) {
        const Transport& transport = lanes_[i]->queue.transport();
        while (!transport.recovery().quiet() && !transport.quiescent()) {
            if (bound.passed()) {
                co_return Error{Code::timed_out, "a processor does not release its queue"};
            }
            group_.raise_queues();
            co_await environment_.executor.sleep(100'000);
        }
    }
    while (watching_events_) { // ended by the admin queue's stop
        if (bound.passed()) {
            co_return Error{Code::timed_out, "an event's task does not end"};
        }
        co_await environment_.executor.sleep(100'000);
    }
    co_return Result<void>{};
}

/// [nvme-1.4 §7.3.2]. An Error: the controller cannot be used any more.
io::Task<Result<void>> Controller::reset(Recovery::Cause cause) {
    constexpr std::array<std::string_view, 3> why{"a command was not aborted", "it reports a fatal error (CSTS.CFS)",
                                                  "an admin command was not answered"};
    if (!recovery_.count_reset()) {
        co_return Error{Code::timed_out, "the controller completes nothing in spite of resets"};
    }
    log::warning("nvme{}: the controller is reset: {}", index_, why[to_underlying(cause)]);
    recovery_.hold();
    admin_queue().stop(); // ends its commands unanswered
    CO_CHECK(co_await wait_until_quiet());
    if (auto disabled = co_await registers_.disable(); !disabled) {
        if (registers_.gone()) {
            group_.set_removed();
        }
        co_return disabled;
    }
    admin_queue().reclaim();
    CO_CHECK(co_await bring_up());
    if (shadows_) {
        CO_CHECK(co_await use_doorbell_buffers());
    }
    CO_TRY(const u32 granted, co_await ask_for_queues(lane_count_));
    if (granted < lane_count_) {
        co_return Error{Code::io, "the controller has fewer queues after a reset", lane_count_, granted};
    }
    for (u32 i = 1; i <= lane_count_; ++i) {
        CO_CHECK(co_await create_queues(i));
    }
    CO_CHECK(co_await settle_write_cache());
    CO_CHECK(co_await accept_retry_delays());
    CO_CHECK(co_await namespaces_.check_all());
    recovery_.release();
    group_.raise_queues();
    log::info("nvme{}: the controller works again", index_);
    watching_events_ = true;
    if (auto spawned = tasks_.spawn(watch_events()); !spawned) {
        watching_events_ = false;
        log::warning("nvme{}: events of the controller will not be detected: {}", index_, spawned.error());
    }
    co_return Result<void>{};
}

// ---- the end ----

io::Task<Result<void>> Controller::disconnect() {
    if (made_ == 0) {
        co_return Result<void>{};
    }
    admin_queue().stop();
    if (!group_.closed()) {
        group_.close(io::Status::device_gone);
    }
    const io::Bound bound(environment_.executor, environment_.timeout); // for all of them together
    for (u32 i = 1; i < made_; ++i) {
        Queue& queue = lanes_[i]->queue;
        CO_CHECK(co_await queue.ended(environment_.executor, bound));
        if (i == 1) { // this processor's: it stops being visited
            queue.stop();
        }
    }
    // The registers of a removed controller do not answer, and it accesses no memory.
    if (registers_.enabled() && !registers_.gone() && !group_.removed()) {
        if (auto stopped = co_await registers_.disable(); !stopped && !registers_.gone()) {
            // takes its access to memory away, even from a controller that does not answer
            device_.change_command({}, pci::Command::of(pci::Command::bus_master));
            log::warning("nvme{}: {}", index_, stopped.error());
        }
    }
    interrupts_.detach();
    for (u32 i = 0; i < made_; ++i) {
        lanes_[i]->queue.reclaim(); // quiet: its processor no longer accesses it
    }
    co_return Result<void>{};
}

io::Task<Result<void>> probe(Environment& environment, pci::Device device, u32 index) {
    if (!pci::matches(ids, device)) {
        co_return Error{Code::not_supported, "not an NVMe controller"};
    }
    auto* controller = new (std::nothrow) Controller(environment, device, index);
    if (controller == nullptr) {
        co_return Error{Code::exhausted, "no memory for an NVMe controller"};
    }
    auto result = co_await controller->connect();
    if (result) {
        result = co_await controller->scan();
    }
    if (result) {
        controller->next_ = std::exchange(attached, controller);
        if (auto kept = controller->keep(); !kept) {
            log::warning("nvme{}: events of the controller will not be detected: {}", index, kept.error());
        }
        co_return result;
    }
    if (auto left = co_await controller->disconnect(); !left) {
        log::warning("nvme{}: {}", index, left.error());
        co_return result; // its memory is leaked: a queue may still access it
    }
    if (controller->disks() != 0 || controller->lane_count_ > 1) { // known to the machine, or to other processors
        controller->next_ = std::exchange(attached, controller);   // kept, closed
    } else {
        delete controller;
    }
    co_return result;
}

} // namespace fl::drivers::nvme
