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
import core.vector;
import io.executor;
import io.task;
import io.latch;
import io.block;
import drivers.driver;
import drivers.pci;
import drivers.pci.msi;

namespace fl::drivers::nvme {

namespace {
constinit Controller* attached = nullptr; // controllers live until machine shutdown

constexpr Nanoseconds ready_unit = 500'000'000; // of CAP.TO
constexpr u32 admin_entries = 32;
} // namespace

Controller::Controller(Environment& environment, const pci::Device& device, u32 index)
    : environment_(environment), device_(device), index_(index),
      interrupts_(device, environment.interrupts, environment.mmio), failed_(environment.executor),
      tasks_(environment.executor) {}

// Only after disconnect() or before connect(): no queue may be registered.
Controller::~Controller() {
    for (Unit* unit : units_) {
        for (Disk* disk : unit->disks) {
            delete disk;
        }
        delete unit;
    }
    interrupts_.detach();
    for (u32 i = 0; i < made_; ++i) {
        delete lanes_[i];
    }
}

// ---- set-up ----

Result<void> Controller::make_lane(u32 index, io::Executor& executor) {
    lanes_[index] = new (std::nothrow) Lane(executor, group_);
    if (lanes_[index] == nullptr) {
        return Error{Code::exhausted, "no memory for a queue pair"};
    }
    ++made_;
    return {};
}

Result<void> Controller::lay_out(u32 index) {
    Lane& lane = *lanes_[index];
    const u32 entries = index == 0 ? std::min(entries_, admin_entries) : entries_;
    TRY(lane.submissions, environment_.dma.buffer(entries * static_cast<u32>(sizeof(Submission))));
    TRY(lane.completions, environment_.dma.buffer(entries * static_cast<u32>(sizeof(CompletionEntry))));
    if (index != 0) {
        TRY(lane.lists, environment_.dma.buffer(Transport::max_entries * Transport::list_bytes));
    }
    const bool msix = interrupts_.kind() == pci::InterruptKind::msix;
    return lane.queue.transport().lay_out({.registers = registers_,
                                           .submissions = lane.submissions,
                                           .completions = lane.completions,
                                           .lists = lane.lists,
                                           .shadow = shadow_,
                                           .events = events_,
                                           .entries = entries,
                                           .id = static_cast<u16>(index),
                                           .stride = stride_,
                                           .line = interrupts_.kind() == pci::InterruptKind::line,
                                           .lazy = msix && index != 0,
                                           .timeout = environment_.timeout});
}

io::Task<Result<void>> Controller::wait_ready(bool ready) {
    const io::Bound bound(environment_.executor, ready_bound_);
    for (;;) {
        const auto status = ControllerStatus::read(registers_);
        if (status.absent()) {
            gone_ = true;
            co_return Error{Code::device_gone, "the controller was removed: its registers read as all ones"};
        }
        if (ready && status.get(ControllerStatus::cfs)) {
            co_return Error{Code::io, "the controller reports a fatal error (CSTS.CFS) when it is enabled", 0,
                            status.raw};
        }
        if (status.get(ControllerStatus::rdy) == ready) {
            co_return Result<void>{};
        }
        if (bound.passed()) {
            co_return Error{Code::timed_out,
                            ready ? "the controller does not become ready within its own bound (CAP.TO)"
                                  : "the controller does not stop within its own bound (CAP.TO): reset the machine",
                            ready ? 1u : 0u, status.raw};
        }
        co_await environment_.executor.sleep(1'000'000);
    }
}

io::Task<Result<void>> Controller::disable() {
    auto configuration = Configuration::read(registers_);
    if (configuration.get(Configuration::en)) {
        configuration.set(Configuration::en, false).write(registers_);
    }
    CO_CHECK(co_await wait_ready(false));
    set_up_ = false;
    co_return Result<void>{};
}

io::Task<Result<void>> Controller::connect() {
    if (const u64 delay = device_.power_on(); delay != 0) {
        co_await environment_.executor.sleep(delay);
    }
    CO_TRY(registers_, device_.map_bar(environment_.mmio, 0));
    if (registers_.size() < doorbells + 16) {
        co_return Error{Code::protocol, "the NVMe controller's BAR 0 has no room for its registers and doorbells",
                        doorbells + 16, registers_.size()};
    }
    const auto capabilities = Capabilities::read(registers_);
    if (capabilities.raw == ~u64{0}) {
        gone_ = true;
        co_return Error{Code::device_gone, "the controller does not answer: its registers read as all ones"};
    }
    if (capabilities.get(Capabilities::mpsmin) != 0) {
        co_return Error{Code::not_supported, "the controller needs pages larger than 4096 bytes (CAP.MPSMIN)", 0,
                        capabilities.get(Capabilities::mpsmin)};
    }
    if ((capabilities.get(Capabilities::css) & 1) == 0) {
        co_return Error{Code::not_supported, "the controller has no NVM command set (CAP.CSS)", 1,
                        capabilities.get(Capabilities::css)};
    }
    const u32 largest = static_cast<u32>(capabilities.get(Capabilities::mqes)) + 1;
    if (largest < 2) {
        co_return Error{Code::protocol, "the controller's queues have fewer than two entries (CAP.MQES)", 1, 0};
    }
    entries_ = std::bit_floor(std::min(largest, Transport::max_entries));
    stride_ = static_cast<u8>(capabilities.get(Capabilities::dstrd));
    ready_bound_ =
        std::min<Nanoseconds>(std::max<u64>(capabilities.get(Capabilities::to), 1) * ready_unit, environment_.timeout);

    const bool several = environment_.allows(Feature::multi_queue) && !environment_.executors.empty();
    const u32 wanted = several ? static_cast<u32>(std::min<usize>(environment_.executors.size(), max_lanes)) : u32{1};
    for (u32 i = 0; i <= wanted; ++i) {
        CO_CHECK(make_lane(i, i < 2 ? environment_.executor : *environment_.executors[i - 1]));
    }
    CO_CHECK(co_await disable());
    {
        std::array<pci::VectorUse, io::QueueGroup::max_queues> uses{};
        for (u32 i = 0; i <= wanted; ++i) {
            uses[i] = {lanes_[i]->queue.executor().processor(), Transport::on_interrupt, &lanes_[i]->queue.transport()};
        }
        CO_TRY(vectors_, interrupts_.attach(std::span(uses).first(wanted + 1), 1,
                                            environment_.allows(Feature::messages) ? pci::InterruptKind::msix
                                                                                   : pci::InterruptKind::line));
    }
    // Other mechanisms than MSI-X interrupt one processor: one queue pair there. Else each has its own vector.
    const bool one = interrupts_.kind() != pci::InterruptKind::msix || vectors_ < 2;
    lane_count_ = one ? 1 : std::min(wanted, vectors_ - 1);
    while (lane_count_ > 1 &&
           doorbells + doorbell_offset(static_cast<u16>(lane_count_), true, stride_) + 4 > registers_.size()) {
        --lane_count_;
    }
    if (doorbells + doorbell_offset(static_cast<u16>(lane_count_), true, stride_) + 4 > registers_.size()) {
        co_return Error{Code::protocol, "the NVMe controller's BAR 0 has no room for an I/O queue's doorbells",
                        doorbells + doorbell_offset(1, true, stride_) + 4, registers_.size()};
    }
    if (vectors_ < 2) {
        lanes_[0]->queue.transport().share_vector(&lanes_[1]->queue.transport());
    }

    CO_TRY(scratch_, environment_.dma.buffer(identify_bytes));
    CO_CHECK(lay_out(0));
    const u32 admin = std::min(entries_, admin_entries);
    registers_.write<u32>(admin_queue_attributes, (admin - 1) << 16 | (admin - 1));
    registers_.write<u64>(admin_submission_base, lanes_[0]->submissions.bus());
    registers_.write<u64>(admin_completion_base, lanes_[0]->completions.bus());
    device_.change_command(pci::Command::of(pci::Command::bus_master));
    set_up_ = true;
    lanes_[0]->queue.start(
        environment_.timeout, [](void* self) { static_cast<Controller*>(self)->failed_.open(); }, this);
    Configuration{}
        .set(Configuration::iosqes, 6)
        .set(Configuration::iocqes, 4)
        .set(Configuration::en, true)
        .write(registers_);
    CO_CHECK(co_await wait_ready(true));

    CO_CHECK(co_await identify(cns_controller, 0));
    info_ = parse_controller(data());
    if (!info_.queue_entries) {
        co_return Error{Code::not_supported, "the controller has neither commands of 64 nor completions of 16 bytes "
                                             "(SQES, CQES)"};
    }
    // MDTS counts pages of CAP.MPSMIN's size, 4096 bytes here.
    max_bytes_ = info_.mdts == 0 || info_.mdts >= 7 ? Transport::max_transfer : Transport::page << info_.mdts;
    if (info_.doorbell_buffers && environment_.allows(Feature::shadow_doorbells)) {
        CO_CHECK(co_await use_doorbell_buffers());
    }
    co_return co_await create_queues();
}

/// Sends an admin command and returns its result's DW0. Error{io}: it has failed.
io::Task<Result<u32>> Controller::command(Submission command, std::string_view what) {
    Queue& queue = lanes_[0]->queue;
    Exchange exchange(environment_.executor);
    exchange.command = command;
    const io::Bound bound(environment_.executor, environment_.timeout);
    for (;;) {
        const auto sent = queue.send(exchange);
        if (sent) {
            break;
        }
        if (sent.error().code != Code::exhausted || bound.passed()) {
            co_return sent.error();
        }
        co_await environment_.executor.sleep(1'000'000);
    }
    if (!co_await exchange.done.wait({environment_.executor, environment_.timeout})) {
        queue.abandon(exchange);
        const Error why{Code::timed_out, "the controller did not answer an admin command"};
        log::error("nvme{}: no answer to {}", index_, what);
        queue.shut(io::Status::timed_out, why);
        co_return why;
    }
    if (!exchange.answered) {
        co_return Error{Code::device_gone, "the controller was closed during an admin command"};
    }
    if (const u16 status = status_code(exchange.completion.status); status != 0) {
        log::warning("nvme{}: {} failed: status code type {:#x}, status code {:#x}", index_, what, status >> 8,
                     status & 0xff);
        co_return Error{Code::io, "the controller refuses an admin command (status code type and code)", 0, status};
    }
    co_return exchange.completion.dw0;
}

io::Task<Result<void>> Controller::identify(u32 cns, u32 nsid) {
    std::memset(scratch_.data(), 0, identify_bytes);
    CO_CHECK(co_await command(
        {.opcode = to_underlying(AdminOpcode::identify), .nsid = nsid, .prp1 = scratch_.bus(), .cdw10 = cns},
        "IDENTIFY"));
    co_return Result<void>{};
}

io::Task<Result<void>> Controller::use_doorbell_buffers() {
    CO_TRY(shadow_, environment_.dma.buffer(Transport::page));
    CO_TRY(events_, environment_.dma.buffer(Transport::page));
    if (doorbell_offset(static_cast<u16>(lane_count_), true, stride_) + 4 > Transport::page) {
        shadow_.reset(); // the doorbells of some queues do not lie in the buffers
        events_.reset();
        co_return Result<void>{};
    }
    auto done = co_await command(
        {.opcode = to_underlying(AdminOpcode::doorbell_buffer_config), .prp1 = shadow_.bus(), .prp2 = events_.bus()},
        "DOORBELL BUFFER CONFIG");
    if (!done) {
        if (!lanes_[0]->queue.is_open()) {
            co_return done.error();
        }
        shadow_.reset();
        events_.reset();
        co_return Result<void>{}; // usable without
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Controller::create_queues() {
    const u32 asked = lane_count_ - 1; // 0's based
    CO_TRY(const u32 granted, co_await command({.opcode = to_underlying(AdminOpcode::set_features),
                                                .cdw10 = feature_number_of_queues,
                                                .cdw11 = asked << 16 | asked},
                                               "SET FEATURES (number of queues)"));
    lane_count_ = std::min({lane_count_, (granted & 0xffff) + 1, (granted >> 16) + 1});
    const u32 wanted = lane_count_;
    lane_count_ = 0;
    for (u32 i = 1; i <= wanted; ++i) {
        if (auto opened = co_await open_lane(i); !opened) {
            if (i == 1 || !lanes_[0]->queue.is_open()) {
                co_return opened.error();
            }
            log::warning("nvme{}: queues for {} of {} processors: {}", index_, lane_count_, wanted, opened.error());
            break;
        }
        lane_count_ = i;
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Controller::open_lane(u32 index) {
    CO_CHECK(lay_out(index));
    Lane& lane = *lanes_[index];
    const u32 size = (entries_ - 1) << 16 | index;
    const u32 vector = vectors_ < 2 ? 0 : index;
    CO_CHECK(co_await command({.opcode = to_underlying(AdminOpcode::create_completion_queue),
                               .prp1 = lane.completions.bus(),
                               .cdw10 = size,
                               .cdw11 = vector << 16 | 2 | 1}, // interrupts on, contiguous
                              "CREATE I/O COMPLETION QUEUE"));
    CO_CHECK(co_await command({.opcode = to_underlying(AdminOpcode::create_submission_queue),
                               .prp1 = lane.submissions.bus(),
                               .cdw10 = size,
                               .cdw11 = index << 16 | 1},
                              "CREATE I/O SUBMISSION QUEUE"));
    co_return co_await lane.queue.start_there(environment_.executor, environment_.timeout,
                                              [](io::GroupedQueue<Transport>& queue, Nanoseconds timeout) {
                                                  static_cast<Queue&>(queue).start(timeout, nullptr, nullptr);
                                              });
}

// ---- namespaces ----

void Controller::unused(u32 nsid, Unused why, std::string_view reason) {
    FixedText<64> address;
    print(address, "nvme{}n{}", index_, nsid);
    environment_.disks.unused({"nvme", address, "NVMe namespace", why, reason});
}

io::Task<Result<void>> Controller::scan() {
    CO_CHECK(co_await identify(cns_active_namespaces, 0));
    std::array<u32, max_namespaces> found{};
    u32 count = 0;
    u32 last = 0;
    for (u32 i = 0; i < identify_bytes / 4; ++i) {
        CO_TRY(const u32 nsid, next_namespace(data(), i, last));
        if (nsid == 0) {
            break;
        }
        if (count == max_namespaces) {
            unused(nsid, Unused::no_room,
                   "this driver uses 64 namespaces of a controller: this one and later ones are "
                   "not used");
            break;
        }
        last = found[count++] = nsid;
    }
    for (u32 i = 0; i < count; ++i) {
        if (auto scanned = co_await scan_namespace(found[i]); !scanned) {
            if (!lanes_[0]->queue.is_open()) {
                co_return scanned.error();
            }
            FixedText<160> reason;
            print(reason, "{}", scanned.error());
            unused(found[i], unused_because(scanned.error().code), reason);
        }
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Controller::scan_namespace(u32 nsid) {
    CO_CHECK(co_await identify(cns_namespace, nsid));
    CO_TRY(const NamespaceInfo info, parse_namespace(data()));
    if (info.blocks == 0) {
        unused(nsid, Unused::empty, "the namespace has no blocks");
        co_return Result<void>{};
    }
    co_return attach(nsid, info);
}

Result<void> Controller::attach(u32 nsid, const NamespaceInfo& info) {
    const io::Geometry geometry{.sectors = info.blocks,
                                .sector_size = info.block_size,
                                .physical_sector_size = info.block_size,
                                .read_only = info.write_protected,
                                .flush = info_.write_cache && environment_.allows(Feature::flush),
                                .discard = info_.dataset_management && !info.write_protected &&
                                           environment_.allows(Feature::discard)};
    io::BlockDevice::Identity identity;
    print(identity.name, "nvme{}n{}", index_, nsid);
    identity.driver = driver_name;
    identity.kind = io::Kind::emulated;
    identity.model = info_.model;
    print(identity.features, "{}{}{}{} queues={} mdts={}", geometry.flush ? "flush " : "",
          geometry.discard ? "discard " : "", shadow_ ? "shadow-doorbells " : "", pci::name(interrupts_.kind()),
          lane_count_, max_bytes_);
    Unit entry;
    const auto undo = [&] {
        for (Disk*& disk : entry.disks) {
            delete std::exchange(disk, nullptr);
        }
    };
    for (u32 i = 0; i < lane_count_; ++i) {
        entry.disks[i] = new (std::nothrow) Disk(lanes_[i + 1]->queue, nsid, max_bytes_, geometry, identity);
        if (entry.disks[i] == nullptr) {
            undo();
            return Error{Code::exhausted, "no memory for a disk"};
        }
        if (i != 0) {
            entry.disks[0]->add_lane(*entry.disks[i]);
        }
    }
    auto* unit = new (std::nothrow) Unit;
    if (unit == nullptr || !units_.push(unit)) {
        delete unit;
        undo();
        return Error{Code::exhausted, "no memory for a disk"};
    }
    if (auto announced = environment_.disks.announce(*entry.disks[0], DiskSink::no_twin); !announced) {
        units_.remove(units_.size() - 1);
        delete unit;
        undo();
        return announced;
    }
    for (u32 i = 0; i < lane_count_; ++i) {
        // no other coroutine has run since, so this precedes any request to the lane
        entry.disks[i]->link(environment_.executor);
    }
    *unit = entry;
    return {};
}

// ---- events and the end ----

Result<void> Controller::keep() {
    CHECK(tasks_.spawn(watch_failure()));
    return tasks_.spawn(watch_events());
}

// One event request is always with the controller [nvme-1.4 §5.2].
io::Task<Result<void>> Controller::watch_events() {
    Queue& queue = lanes_[0]->queue;
    // Critical warnings, and changes of namespaces. A controller without one of them may refuse.
    if (!co_await command({.opcode = to_underlying(AdminOpcode::set_features),
                           .cdw10 = feature_asynchronous_events,
                           .cdw11 = 1 << 8 | 0x1f},
                          "SET FEATURES (asynchronous events)")) {
        log::debug("nvme{}: changes of namespaces are not reported", index_);
    }
    while (queue.is_open()) {
        Exchange exchange(environment_.executor);
        exchange.command.opcode = to_underlying(AdminOpcode::asynchronous_event_request);
        CO_CHECK(queue.send(exchange));
        queue.set_waiting_events(1);
        static_cast<void>(co_await exchange.done.wait());
        queue.set_waiting_events(0);
        if (!exchange.answered) {
            break;
        }
        if (status_code(exchange.completion.status) != 0) {
            log::warning("nvme{}: the controller refuses an asynchronous event request: status {:#x}", index_,
                         status_code(exchange.completion.status));
            break;
        }
        if (auto handled = co_await handle_event(exchange.completion.dw0); !handled) {
            log::warning("nvme{}: an event was not handled: {}", index_, handled.error());
        }
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Controller::handle_event(u32 event) {
    const u32 type = event & 7;
    const u32 log_page = event >> 16 & 0xff;
    log::warning("nvme{}: event of type {}, information {:#x}, log page {:#x}{}", index_, type, event >> 8 & 0xff,
                 log_page,
                 type == 0   ? ": an error"
                 : type == 1 ? ": health"
                             : "");
    if (log_page == 1 || log_page == 2 || log_page == 4) { // reading it lets the controller report the next one
        const u32 dwords = log_page == 1 ? 16 : log_page == 2 ? 128 : 1024;
        CO_CHECK(co_await command({.opcode = to_underlying(AdminOpcode::get_log_page),
                                   .nsid = ~u32{0},
                                   .prp1 = scratch_.bus(),
                                   .cdw10 = (dwords - 1) << 16 | log_page},
                                  "GET LOG PAGE"));
    }
    if (log_page != 4) {
        co_return Result<void>{};
    }
    for (Unit* unit : units_) {
        Disk& disk = *unit->disks[0];
        CO_CHECK(co_await identify(cns_namespace, disk.nsid()));
        const auto info = parse_namespace(data());
        const io::Geometry& geometry = disk.geometry();
        if (!info || info->blocks < geometry.sectors || info->block_size != geometry.sector_size) {
            log::error("{}: the namespace is gone, smaller or formatted anew: it is closed", disk.identity().name);
            for (u32 i = 0; i < lane_count_; ++i) {
                unit->disks[i]->remove();
            }
        } else if (info->blocks != geometry.sectors) {
            log::warning("{}: the namespace has grown from {} to {} blocks: the new ones are not used",
                         disk.identity().name, geometry.sectors, info->blocks);
        }
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Controller::watch_failure() {
    while (lanes_[0]->queue.is_open()) {
        static_cast<void>(co_await failed_.wait());
    }
    if (auto left = co_await disconnect(); !left) {
        log::error("nvme{}: {}", index_, left.error());
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Controller::disconnect() {
    if (made_ == 0) {
        co_return Result<void>{};
    }
    lanes_[0]->queue.stop();
    group_.close(io::Status::device_gone);
    const io::Bound bound(environment_.executor, environment_.timeout); // for all of them together
    for (u32 i = 1; i < made_; ++i) {
        Queue& queue = lanes_[i]->queue;
        if (i == 1) {
            queue.stop();
        }
        CO_CHECK(co_await queue.ended(environment_.executor, bound));
    }
    // The registers of a removed controller do not answer, and it accesses no memory.
    if (set_up_ && !gone_ && !group_.removed()) {
        if (auto stopped = co_await disable(); !stopped && !gone_) {
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
        log::info("nvme{}: {} {} firmware {}, {} I/O {} by {}", index, controller->info_.model,
                  controller->info_.serial, controller->info_.firmware, controller->lane_count_,
                  plural(controller->lane_count_, "queues"), pci::name(controller->interrupts_.kind()));
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
