module;
#include "core/try.hpp"
module drivers.xen_blk;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.log;
import io.executor;
import io.run_on;
import io.task;
import io.block;
import hv.xen;
import drivers.driver;

namespace fl::drivers::xen_blk {

using namespace hv::xen;

namespace {
constinit Vbd* attached = nullptr; // devices live until machine shutdown
}

Vbd::Vbd(Environment& environment, hv::Xen& xen, const hv::SyntheticDevice& device, const VirtualDisk& which, u32 slot)
    : BusDevice("vbd", device.number), environment_(environment), xen_(xen), front_(xen.store(), environment.executor),
      which_(which), address_(device.address), slot_(slot), end_(environment.executor), tasks_(environment.executor) {
    lanes_[0] = new (std::nothrow) Lane(environment.executor, group_, xen.events(), xen.grants());
    if (lanes_[0] != nullptr) {
        lanes_[0]->disk().set_timeout(environment.timeout);
        made_ = 1;
    }
}

Vbd::~Vbd() {
    for (Lane* lane : lanes_) {
        delete lane;
    }
}

void Vbd::add_entry(std::string_view key, std::string_view value) {
    StoreEntry& entry = entries_[entry_count_++];
    entry.key = FixedText<40>(key);
    entry.value = FixedText<24>(value);
}
void Vbd::add_entry(std::string_view key, u64 value) {
    FixedText<24> text;
    print(text, "{}", value);
    add_entry(key, text.view());
}

io::Task<Result<void>> Vbd::connect() {
    group_.reopen();
    CO_CHECK(co_await shake_hands());
    io::BlockDevice::Identity identity;
    identity.name = disk_name(which_);
    identity.driver = driver_name;
    identity.kind = io::Kind::synthetic;
    print(identity.model, "Xen virtual block device {}", number());
    identity.features = features();
    for (Lane* lane : known_lanes_ != 0 ? lanes().first(1) : lanes()) {
        lane->disk().identify(identity);
    }
    CO_CHECK(co_await start_lanes());
    CO_CHECK(co_await front_.set_state(BusState::connected));
    if (std::exchange(known_lanes_, queues_) == 0) {
        for (Lane* further : lanes().subspan(1)) {
            disk().add_lane(further->disk());
        }
    }
    ended_ = false;
    co_return Result<void>{};
}

// Up to the terms, which the disk has to be told.
io::Task<Result<void>> Vbd::shake_hands() {
    static constexpr BusState ready[] = {BusState::init_wait, BusState::initialised, BusState::connected};
    terms_ = {};
    left_.reset();
    offers_persistent_ = counts_sectors_ = begun_ = false;
    StorePath path("device/vbd/");
    path.write(address_);
    CO_CHECK(co_await front_.open(path));
    terms_.domain = front_.domain();
    terms_.handle = static_cast<u16>(number());

    std::array<char, 16> type;
    const StorePath type_key = join(path, "device-type");
    const auto kind = co_await xen_.store().read(type_key, type);
    if (kind && *kind != "disk") {
        left_ = Unused::not_a_disk;
        co_return Error{Code::not_supported, "no driver for CD drives in this build"};
    }
    begun_ = true;
    CO_CHECK(co_await front_.restart(environment_.timeout));
    CO_CHECK(co_await front_.await_state(ready, {environment_.executor, environment_.timeout}));
    CO_TRY(const u32 wanted_order, co_await ring_order());
    CO_TRY(const u32 wanted_queues, co_await queue_count());
    CO_CHECK(make_lanes(wanted_queues, wanted_order));
    CO_CHECK(co_await publish(old_ring_keys_));
    CO_CHECK(co_await negotiate());
    CO_CHECK(co_await read_geometry());
    co_return co_await read_features();
}

FixedText<96> Vbd::features() const {
    FixedText<96> text;
    print(text, "{}{}{}{}{}ring-pages={}",
          !terms_.flush                       ? ""
          : *terms_.flush == Operation::flush ? "flush "
                                              : "barrier ",
          terms_.discard ? "discard " : "", terms_.secure_discard ? "secure-discard " : "",
          terms_.persistent ? "persistent " : "", terms_.indirect_segments != 0 ? "indirect " : "", terms_.ring_pages);
    if (queues_ > 1) {
        print(text, " queues={}", queues_);
    }
    return text;
}

// Waits for the back end to connect. With sectors larger than 512 bytes there are two kinds of back ends,
// indistinguishable beforehand: those that count units of 512 bytes on the wire regardless of the sector size (Linux;
// as [xen-blkif] specifies now), and those that count sectors, and only connect to a front end with
// feature-large-sector-size (QEMU, Windows; as it specified from 4.4 to 4.19). The node is deprecated, so it is
// written only if a back end does not connect without it, and then the wire counts sectors.
io::Task<Result<void>> Vbd::negotiate() {
    static constexpr BusState connected[] = {BusState::connected};
    static constexpr Nanoseconds first_try = 1'000'000'000;
    CO_TRY(const u64 sector_size, co_await xen_.store().number_or(front_.backend(), "sector-size", wire_sector));
    const bool large = sector_size > wire_sector;
    const Nanoseconds bound = large ? std::min(first_try, environment_.timeout) : environment_.timeout;
    CO_CHECK(co_await front_.set_state(BusState::initialised));
    const auto reached = co_await front_.await_state(connected, {environment_.executor, bound});
    if (reached) {
        co_return Result<void>{};
    }
    if (!large || reached.error().code != Code::timed_out) {
        co_return reached.error();
    }
    log::info("xen_blk: {}: no connection with {}-byte sectors; retrying with feature-large-sector-size", front_.path(),
              sector_size);
    entry_count_ = 0;
    add_entry("feature-large-sector-size", 1u);
    CO_CHECK(co_await xen_.store().write_all(front_.path(), std::span(entries_).first(entry_count_)));
    counts_sectors_ = published_large_sectors_ = true;
    CO_CHECK(co_await front_.set_state(BusState::initialised)); // rewritten to trigger the back end's watch
    const auto again = co_await front_.await_state(connected, {environment_.executor, environment_.timeout});
    if (!again) {
        co_return again.error();
    }
    co_return Result<void>{};
}

// Returns log2 of the number of ring pages. There are two ways to offer more than one page [xen-blkif notes 1 to 3].
io::Task<Result<u32>> Vbd::ring_order() {
    CO_TRY(const u64 order, co_await xen_.store().number_or(front_.backend(), "max-ring-page-order", ~u64{0}));
    CO_TRY(const u64 pages, co_await xen_.store().number_or(front_.backend(), "max-ring-pages", 1));
    old_ring_keys_ = order == ~u64{0} && pages > 1;
    const u64 offered = old_ring_keys_ ? static_cast<u64>(std::bit_width(pages)) - 1 : order == ~u64{0} ? 0 : order;
    co_return environment_.allows(Feature::ring_pages) ? static_cast<u32>(std::min<u64>(offered, max_ring_order)) : 0;
}

// Returns the number of queues to ask for: one for each processor, and no more than the back end serves [xen-blkif,
// "Multi-queue"]. Without a number, or with none that is one, it serves one queue.
io::Task<Result<u32>> Vbd::queue_count() {
    CO_TRY(const u64 offered, co_await xen_.store().number_or(front_.backend(), "multi-queue-max-queues", 0));
    knows_queues_ = offered != 0;
    const u64 usable = environment_.allows(Feature::multi_queue)
                           ? std::min<u64>({offered, environment_.executors.size(), max_queues})
                           : 1;
    co_return static_cast<u32>(std::max<u64>(usable, 1));
}

// As many as there are memory, grants and event channels for; of a disk that is known, as many as it has.
Result<void> Vbd::make_lanes(u32 wanted, u32 order) {
    if (wanted < known_lanes_) {
        return Error{Code::not_supported, "the back end has returned with fewer queues (multi-queue-max-queues)",
                     known_lanes_, wanted};
    }
    wanted = known_lanes_ != 0 ? known_lanes_ : wanted;
    for (queues_ = 0; queues_ < wanted; ++queues_) {
        if (auto made = make_lane(queues_, order); !made) {
            if (queues_ == 0 || known_lanes_ != 0) {
                return made;
            }
            log::warning("xen_blk: {}: {} of {} queues: {}", front_.path(), queues_, wanted, made.error());
            break; // one queue is enough
        }
        order = static_cast<u32>(std::countr_zero(lanes_[0]->connection().pages()));
    }
    while (made_ > std::max(queues_, 1u) && known_lanes_ == 0) { // the back end has not seen any of it
        Lane* const unused = std::exchange(lanes_[--made_], nullptr);
        unused->reclaim();
        delete unused;
    }
    terms_.ring_pages = lanes_[0]->connection().pages();
    return {};
}

Result<void> Vbd::make_lane(u32 number, u32 order) {
    Lane*& lane = lanes_[number]; // of an earlier connection, or none
    if (lane == nullptr) {
        lane = new (std::nothrow) Lane(executor(number), group_, xen_.events(), xen_.grants(), number == 0);
        if (lane == nullptr) {
            return Error{Code::exhausted, "no memory for a queue of a virtual block device"};
        }
        lane->disk().set_timeout(environment_.timeout);
        made_ = number + 1;
    }
    const bool persistent = number == 0 ? environment_.allows(Feature::persistent) : offers_persistent_;
    CHECK(lane->prepare(order, persistent, front_.domain(), environment_.dma));
    if (number != 0 && (lane->connection().pages() != 1u << order || lane->has_pool() != persistent)) {
        return Error{Code::exhausted, "not enough memory or grants for a queue of a virtual block device"};
    }
    if (number == 0) {
        offers_persistent_ = lane->has_pool();
        if (persistent && !offers_persistent_) {
            log::info("xen_blk: {}: no persistent grants: not enough memory, or grants of the {} that are left",
                      disk_name(which_), xen_.grants().obtainable());
        }
    }
    return lane->listen();
}

// Of an earlier connection. Not an error: a device that the toolstack has made anew does not have it.
io::Task<Result<void>> Vbd::withdraw_key(std::string_view key, bool& published) {
    if (std::exchange(published, false)) {
        const StorePath path = join(front_.path(), key);
        static_cast<void>(co_await xen_.store().remove(path));
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Vbd::publish(bool old_style) {
    entry_count_ = 0;
    CO_CHECK(co_await withdraw_key("ring-page-order", published_order_));
    CO_CHECK(co_await withdraw_key("feature-large-sector-size", published_large_sectors_));
    const u32 pages = terms_.ring_pages;
    if (pages > 1) {
        published_order_ = true;
        add_entry("ring-page-order", static_cast<u64>(std::countr_zero(pages)));
        if (old_style) {
            add_entry("num-ring-pages", pages);
        }
    }
    if (knows_queues_) { // also a 1: a predecessor may have written another number
        add_entry("multi-queue-num-queues", queues_);
    }
    if (queues_ == 1) { // as every back end knows it
        publish_queue("", lanes_[0]->connection());
    }
    for (u32 i = 0; queues_ > 1 && i < queues_; ++i) {
        FixedText<16> prefix;
        print(prefix, "queue-{}/", i);
        publish_queue(prefix.view(), lanes_[i]->connection());
    }
    add_entry("protocol", "x86_64-abi");
    // Announces that grants are reused, so it must be written before it is known whether the back end uses it.
    add_entry("feature-persistent", offers_persistent_ ? 1u : 0u);
    co_return co_await xen_.store().write_all(front_.path(), std::span(entries_).first(entry_count_));
}

void Vbd::publish_queue(std::string_view prefix, const Connection& connection) {
    const auto add = [&](std::string_view name, u64 value) {
        FixedText<40> key(prefix);
        key.write(name);
        add_entry(key.view(), value);
    };
    for (u32 i = 0; i < connection.pages(); ++i) {
        FixedText<24> name("ring-ref");
        if (connection.pages() > 1) {
            print(name, "{}", i);
        }
        add(name.view(), connection.grant(i));
    }
    add("event-channel", to_underlying(connection.port()));
}

io::Task<Result<void>> Vbd::read_geometry() {
    Store& store = xen_.store();
    io::Geometry& geometry = terms_.geometry;
    CO_TRY(const u64 sectors, co_await store.number_or(front_.backend(), "sectors", 0));
    CO_TRY(const u64 sector_size, co_await store.number_or(front_.backend(), "sector-size", 0));
    CO_TRY(const u64 physical, co_await store.number_or(front_.backend(), "physical-sector-size", sector_size));
    CO_TRY(const u64 info, co_await store.number_or(front_.backend(), "info", 0));
    if ((info & info_cdrom) != 0) {
        left_ = Unused::not_a_disk;
        co_return Error{Code::not_supported, "no driver for CD drives in this build"};
    }
    if (sector_size < wire_sector || sector_size > page_size || !std::has_single_bit(sector_size)) {
        left_ = Unused::no_driver;
        co_return Error{
            Code::not_supported,
            "the back end's sector size is none that this driver knows (sector-size: 512 to 4096, a power of two)",
            page_size, sector_size};
    }
    if (sectors == 0) {
        left_ = Unused::empty;
        co_return Error{Code::not_supported, "it has 0 bytes"};
    }
    if (sectors > largest_disk) {
        co_return Error{Code::protocol, "the back end's disk has an impossible size (sectors)", largest_disk, sectors};
    }
    std::array<char, 8> text;
    const StorePath mode_key = join(front_.backend(), "mode");
    const auto mode = co_await store.read(mode_key, text);
    geometry.sector_size = static_cast<u32>(sector_size);
    // the unit of "sectors" and of requests: see negotiate()
    terms_.wire_unit = counts_sectors_ ? geometry.sector_size : wire_sector;
    geometry.sectors = sectors / (sector_size / terms_.wire_unit);
    geometry.physical_sector_size = physical >= sector_size && physical <= 65536 && std::has_single_bit(physical)
                                        ? static_cast<u32>(physical)
                                        : geometry.sector_size;
    geometry.read_only = (info & info_read_only) != 0 || (mode && *mode == "r");
    if (geometry.sectors == 0) {
        co_return Error{Code::protocol, "the back end's disk is smaller than one of its sectors",
                        sector_size / wire_sector, sectors};
    }
    co_return Result<void>{};
}

io::Task<Result<bool>> Vbd::offers(std::string_view feature) {
    CO_TRY(const u64 value, co_await xen_.store().number_or(front_.backend(), feature, 0));
    co_return value == 1;
}

io::Task<Result<void>> Vbd::read_features() {
    CO_TRY(const bool flush, co_await offers("feature-flush-cache"));
    CO_TRY(const bool barrier, co_await offers("feature-barrier"));
    CO_TRY(const bool persistent, co_await offers("feature-persistent"));
    CO_TRY(const bool discard, co_await offers("feature-discard"));
    CO_TRY(const bool secure, co_await offers("discard-secure")); // a property of the discards that it offers
    CO_TRY(const u64 indirect, co_await xen_.store().number_or(front_.backend(), "feature-max-indirect-segments", 0));
    if (flush && environment_.allows(Feature::flush)) {
        terms_.flush = Operation::flush;
    } else if (barrier && environment_.allows(Feature::barrier)) {
        terms_.flush = Operation::write_barrier;
    }
    terms_.discard = discard && environment_.allows(Feature::discard);
    terms_.secure_discard = discard && secure && environment_.allows(Feature::secure_discard);
    terms_.persistent = persistent && offers_persistent_;
    terms_.indirect_segments = environment_.allows(Feature::indirect) && indirect > segments_in_slot
                                   ? static_cast<u32>(std::min<u64>(indirect, Lane::max_segments))
                                   : 0;
    co_return Result<void>{};
}

// On the lanes' processors, which have nothing to do with the disk until then.
io::Task<Result<void>> Vbd::start_lanes() {
    terms_.queues = queues_;
    for (Lane* lane : lanes()) {
        void (*const notify)(void*) = [](void* self) { static_cast<Vbd*>(self)->front_.notify(); };
        CO_CHECK(lane->set_up(terms_, environment_.dma, lane == lanes_[0] ? notify : nullptr, this));
    }
    for (Lane* lane : lanes()) {
        running_ = true;
        CO_CHECK(co_await io::run_on(lane->executor(), lane->start()));
    }
    co_return Result<void>{};
}

Result<void> Vbd::keep() { return tasks_.spawn(follow()); }

// ---- the back end's states ----

io::Task<Result<void>> Vbd::follow() {
    for (;;) {
        static_cast<void>(co_await front_.changed());
        if (std::exchange(paused_, false)) {
            static_cast<void>(co_await unpause_lanes());
        }
        if (is_open() && std::exchange(moved_, false)) {
            static_cast<void>(co_await connect_again());
        } else if (is_open()) {
            const auto back_state = co_await front_.state();
            if (!back_state) {
                close(back_state.error());
            } else {
                static_cast<void>(co_await follow_state(*back_state));
            }
        }
        if (!is_open()) {
            const Result<void> left = co_await disconnect();
            environment_.disks.withdraw(slot_);
            ended_ = true;
            end_.open();
            xen_.ended(*this);
            report_in_use();
            co_return left;
        }
    }
}

io::Task<Result<void>> Vbd::follow_state(BusState back_state) {
    if (back_state == BusState::connected) {
        co_return co_await follow_size();
    }
    if (back_state > BusState::closed) { // reconfiguring, or a state without a meaning
        co_return Result<void>{};
    }
    const auto returns = co_await front_.may_return(back_state);
    if (!is_open()) {
        co_return Result<void>{};
    }
    if (!returns || !*returns) {
        remove({Code::device_gone, "the back end has closed the device (state)", to_underlying(BusState::connected),
                to_underlying(back_state)});
        co_return Result<void>{};
    }
    co_return co_await reconnect(back_state);
}

// The back end was restarted, or another one took its place: it gets new rings and grants, and everything that its
// predecessor had under way once more.
io::Task<Result<void>> Vbd::reconnect(BusState back_state) {
    log::warning("{}: the back end has left the connection (state {}): waiting for it to return",
                 disk().identity().name.view(), name(back_state));
    static_cast<void>(co_await hold_lanes());
    const Result<bool> released = co_await release();
    if (!released || !*released) {
        lost_ = true;
        close(released ? Error{Code::timed_out, "the back end does not release the disk's pages"} : released.error());
        co_return Result<void>{};
    }
    co_return co_await connect_again();
}

// With the disk held, and the former back end's access ended or about to be. Attempts are made during one time-out, and
// each of them is bounded: a back end that is about to close is connected only once it has done so.
io::Task<Result<void>> Vbd::connect_again() {
    const Terms old = terms_;
    const io::Bound bound(environment_.executor, environment_.timeout);
    for (;;) {
        if (auto freed = co_await forget_connection(); !freed) {
            close(freed.error());
            co_return Result<void>{};
        }
        static_cast<void>(co_await front_.close());
        Result<void> done = co_await shake_hands();
        if (done) {
            done = co_await take_over(old);
        }
        if (done) {
            done = co_await front_.set_state(BusState::connected);
        }
        if (!is_open()) { // by a broken rule of the new back end, or the end of the machine
            co_return Result<void>{};
        }
        if (done) {
            log::info("{}: connected again [{}]", disk().identity().name.view(), disk().identity().features.view());
            co_return done;
        }
        static_cast<void>(co_await hold_lanes());
        if (std::exchange(moved_, false)) { // during this attempt
            continue;
        }
        auto again = co_await front_.may_try_again(done.error(), bound);
        if (again && *again) {
            again = co_await release();
        }
        if (!again || !*again) {
            close(done.error());
            co_return Result<void>{};
        }
    }
}

// Ends the connection. True: the back end has no access to the ring any more, so it executes nothing. False: it does
// not say so, or keeps the ring mapped, for a whole time-out.
io::Task<Result<bool>> Vbd::release() {
    const Result<bool> left = co_await front_.disconnect(environment_.timeout);
    if (!left || !*left) {
        co_return left;
    }
    // A back end without a node in XenStore has been removed by force: only its mappings tell whether it has ended.
    const io::Bound bound(environment_.executor, environment_.timeout);
    while (std::ranges::any_of(lanes(), [](const Lane* lane) { return lane->connection().is_mapped(); })) {
        if (bound.passed()) {
            co_return true; // each page is quarantined
        }
        co_await environment_.executor.sleep(retry_pause);
    }
    co_return true;
}

io::Task<Result<void>> Vbd::hold_lanes() {
    for (Lane* lane : lanes()) { // a processor that has stopped does not run the lane either
        static_cast<void>(co_await io::run_on(lane->executor(), lane->hold()));
    }
    co_return Result<void>{};
}

// The back end has no access any more: frees what it had access to, and takes back what it had under way.
io::Task<Result<void>> Vbd::forget_connection() {
    for (Lane* lane : lanes()) {
        lane->connection().close_port();
        CO_CHECK(co_await io::run_on(lane->executor(), lane->take_back()));
        lane->reclaim();
    }
    co_return Result<void>{};
}

// The new back end's terms replace the old ones'.
io::Task<Result<void>> Vbd::take_over(const Terms& old) {
    if (terms_.geometry.sector_size != old.geometry.sector_size) {
        co_return Error{Code::not_supported, "the back end has returned with another sector size (bytes)",
                        old.geometry.sector_size, terms_.geometry.sector_size};
    }
    if (terms_.geometry.sectors != old.geometry.sectors || terms_.geometry.read_only != old.geometry.read_only) {
        log::warning("{}: the back end has returned with {} sectors instead of {}{}", disk().identity().name.view(),
                     terms_.geometry.sectors, old.geometry.sectors,
                     terms_.geometry.read_only ? ", write-protected" : "");
    }
    disk().set_features(features());
    co_return co_await start_lanes();
}

// A back end that has changed the size rewrites its state [xen-blkif: dynamic resizing].
io::Task<Result<void>> Vbd::follow_size() {
    const u64 units_per_sector = disk().geometry().sector_size / terms_.wire_unit;
    const u64 old = disk().geometry().sectors * units_per_sector;
    const auto sectors = co_await xen_.store().number_or(front_.backend(), "sectors", old);
    if (!sectors) {
        log::warning("{}: its size is not known: {}", disk().identity().name.view(), sectors.error());
    } else if (*sectors > largest_disk) {
        log::warning("{}: the back end reports an impossible size, {} sectors: it keeps its own",
                     disk().identity().name.view(), *sectors);
    } else if (is_open()) {
        disk().resize(*sectors / units_per_sector);
    }
    co_return Result<void>{};
}

// ---- suspension ----

// Most often nothing is under way afterwards. What is, because the back end is slow, is asked again.
io::Task<Result<void>> Vbd::pause() {
    if (!is_open() || lanes_[0]->is_held()) {
        co_return Result<void>{};
    }
    paused_ = true;
    for (Lane* lane : lanes()) {
        static_cast<void>(co_await io::run_on(lane->executor(), lane->pause()));
    }
    // Half of a time-out: before any queue finds the back end silent, and closes the disk.
    const io::Bound bound(environment_.executor, environment_.timeout / 2);
    while (is_open()) {
        CO_TRY(const u32 left, co_await in_flight());
        if (left == 0) {
            break;
        }
        if (bound.passed()) {
            co_return Error{Code::timed_out, "requests are under way (number)", 0, left};
        }
        co_await environment_.executor.sleep(pause_step);
    }
    co_return Result<void>{};
}

io::Task<Result<u32>> Vbd::in_flight() {
    u32 sum = 0;
    for (Lane* lane : lanes()) {
        CO_TRY(const u32 more, co_await io::run_on(lane->executor(), lane->in_flight()));
        sum += more;
    }
    co_return sum;
}

io::Task<Result<void>> Vbd::unpause_lanes() {
    for (Lane* lane : lanes()) {
        static_cast<void>(co_await io::run_on(lane->executor(), lane->unpause()));
    }
    co_return Result<void>{};
}

void Vbd::lost() {
    moved_ = is_open();
    for (Lane* lane : lanes()) {
        lane->connection().lose_port();
        if (moved_) {
            lane->lose();
        }
    }
}

void Vbd::resumed(bool moved) {
    if (moved) {
        paused_ = false;
    }
    front_.notify();
}

// ---- the end ----

void Vbd::remove(const Error& why) {
    group_.set_removed();
    close(why);
}

// True: no processor does anything with the disk any more.
io::Task<Result<bool>> Vbd::end_lanes() {
    if (!group_.closed()) {
        group_.close(io::Status::device_gone);
    }
    const io::Bound bound(environment_.executor, environment_.timeout); // for all of them together
    for (Lane* lane : lanes()) {
        while (!lane->has_ended()) {
            if (bound.passed()) {
                co_return false;
            }
            co_await environment_.executor.sleep(pause_step);
        }
        if (running_) { // a processor that has stopped does not run the lane either
            static_cast<void>(co_await io::run_on(lane->executor(), lane->stop()));
        }
    }
    running_ = false;
    co_return true;
}

io::Task<Result<void>> Vbd::disconnect() {
    if (!begun_) { // not accessed yet: leave it as it is
        co_return co_await front_.close();
    }
    const Result<bool> ended = co_await end_lanes();
    // The back end must not be able to reach anything of ours afterwards.
    const Result<bool> released = co_await release();
    const bool safe = released && *released && ended && *ended && !lost_;
    if (!safe) {
        log::warning("{}: {}: they are not reused", front_.path(),
                     ended && *ended ? "the back end does not release its pages"
                                     : "a processor does not release its queue's pages");
        lost_ = true;
    }
    for (Lane* lane : lanes()) {
        lane->connection().close_port();
        if (safe) {
            lane->reclaim();
        } else {
            lane->connection().abandon();
        }
    }
    const Result<void> left = co_await front_.close(); // unlinks the watch before its first wait
    co_return released ? left : Result<void>(released.error());
}

io::Task<Result<bool>> Vbd::await_end() {
    if (!ended_) { // the waits of a disconnection are bounded
        static_cast<void>(co_await end_.wait({environment_.executor, 8 * environment_.timeout}));
    }
    if (!ended_) {
        co_return Error{Code::busy, "the disk's former connection has not ended"};
    }
    end_.close();
    if (lost_) {
        group_.set_removed();
    }
    co_return !lost_;
}

void Vbd::report_in_use() const {
    const hv::Xen::InUse now = xen_.in_use();
    log::debug("xen_blk: {} has left; in use: {} grants, {} event channels, {} watches", disk_name(which_), now.grants,
               now.event_channels, now.watches);
}

// ---- probing ----

namespace {

// The Vbd of a device that was here before, or a new one.
io::Task<Result<Vbd*>> make_vbd(Environment& environment, hv::Xen& xen, const hv::SyntheticDevice& device,
                                const VirtualDisk& which, u32 slot) {
    if (auto* const known = static_cast<Vbd*>(xen.devices().find("vbd", device.number)); known != nullptr) {
        CO_TRY(const bool usable, co_await known->await_end());
        environment.disks.withdraw(slot);
        if (usable) {
            co_return known;
        }
        xen.devices().remove(*known);
    }
    auto* const made = new (std::nothrow) Vbd(environment, xen, device, which, slot);
    if (made == nullptr || !made->has_lanes()) {
        delete made;
        co_return Error{Code::exhausted, "no memory for a virtual block device"};
    }
    co_return made;
}

} // namespace

io::Task<Result<void>> probe(Environment& environment, hv::Xen& xen, const hv::SyntheticDevice& device) {
    if (!matches(device)) {
        co_return Error{Code::not_supported, "not a virtual block device"};
    }
    const auto which = virtual_disk(device.number);
    if (!which) {
        environment.disks.unused({"xen", device.address, "virtual block device", Unused::failed,
                                  "a device number that [xen-vbd] does not define"});
        co_return Result<void>{};
    }
    // The first four are also shown by the first IDE controller, or with hdtype="ahci" the first six by an AHCI HBA.
    const bool has_twin = which->kind != VirtualDisk::Kind::scsi && which->partition == 0 && which->disk < 6;
    const u32 slot = has_twin ? which->disk : DiskSink::no_twin;
    CO_TRY(Vbd* const vbd, co_await make_vbd(environment, xen, device, *which, slot));
    const bool known = xen.devices().find("vbd", device.number) == vbd;
    if (!environment.disks.offered(slot)) {
        if (!known) {
            delete vbd;
        }
        environment.disks.unused({"xen", device.address, disk_name(*which), Unused::taken, {}, slot});
        co_return Result<void>{};
    }
    auto result = co_await vbd->connect();
    if (result) {
        result = environment.disks.announce(vbd->disk(), slot);
    }
    if (result) {
        if (!known) {
            vbd->next_ = std::exchange(attached, vbd);
            xen.devices().add(*vbd);
        }
        if (auto kept = vbd->keep(); !kept) {
            log::warning("{}: a closing back end will not be detected: {}", disk_name(*which), kept.error());
        }
        co_return result;
    }
    vbd->close(result.error());
    if (auto left = co_await vbd->disconnect(); !left) {
        log::warning("xen_blk: {}: leaving the bus: {}", disk_name(*which), left.error());
    }
    const auto ignored = vbd->left();
    if (!known && vbd->disposable()) {
        delete vbd;
    }
    if (ignored) {
        FixedText<160> reason;
        print(reason, "{}", result.error());
        environment.disks.unused({"xen", device.address, disk_name(*which), *ignored, reason, slot});
        co_return Result<void>{};
    }
    co_return result;
}

} // namespace fl::drivers::xen_blk
