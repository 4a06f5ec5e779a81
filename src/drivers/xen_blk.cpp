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
      lane_(environment.executor, xen.events(), xen.grants()), which_(which), address_(device.address), slot_(slot),
      end_(environment.executor), tasks_(environment.executor) {
    lane_.disk().set_timeout(environment.timeout);
}

Vbd::~Vbd() {
    if (port_ != Port::none) {
        xen_.events().unbind(port_);
    }
    free_ring();
}

// Frees the ring's pages only if the back end has unmapped all of them.
void Vbd::free_ring() {
    bool safe = true;
    for (u32 i = 0; i < ring_pages_; ++i) {
        safe = xen_.grants().release(ring_grants_[i]) && safe;
    }
    ring_pages_ = 0;
    if (safe) {
        ring_.reset();
    } else {
        ring_.abandon();
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
    CO_CHECK(co_await shake_hands());
    io::BlockDevice::Identity identity;
    identity.name = disk_name(which_);
    identity.driver = driver_name;
    identity.kind = io::Kind::synthetic;
    print(identity.model, "Xen virtual block device {}", number());
    identity.features = features();
    CO_CHECK(lane_.open(
        terms_, identity, environment_.dma, [](void* self) { static_cast<Vbd*>(self)->front_.notify(); }, this));
    CO_CHECK(xen_.events().bind(port_, Lane::on_event, &lane_)); // masked until the disk first sleeps
    CO_CHECK(co_await front_.set_state(BusState::connected));
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
    CO_TRY(const u32 order, make_ring(wanted_order));
    if (environment_.allows(Feature::persistent)) {
        offers_persistent_ = lane_.start_pool(front_.domain(), environment_.dma);
        if (!offers_persistent_) {
            log::info("xen_blk: {}: no persistent grants: not enough memory, or grants of the {} that are left",
                      disk_name(which_), xen_.grants().obtainable());
        }
    }
    CO_TRY(port_, xen_.events().allocate_unbound(front_.domain()));
    terms_.port = port_;
    CO_CHECK(co_await publish(order, old_ring_keys_));
    CO_CHECK(co_await negotiate());
    CO_CHECK(co_await read_geometry());
    co_return co_await read_features();
}

FixedText<96> Vbd::features() const {
    FixedText<96> text;
    print(text, "{}{}{}{}ring-pages={}",
          !terms_.flush                       ? ""
          : *terms_.flush == Operation::flush ? "flush "
                                              : "barrier ",
          terms_.discard ? "discard " : "", terms_.persistent ? "persistent " : "",
          terms_.indirect_segments != 0 ? "indirect " : "", terms_.ring_pages);
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

// Allocates 2^order pages, or fewer if grants or memory are short.
Result<u32> Vbd::make_ring(u32 order) {
    while (order != 0 && !xen_.grants().ensure((1u << order) + Lane::spare_grants)) {
        --order;
    }
    auto memory = environment_.dma.buffer(static_cast<u32>(page_size) << order);
    while (!memory && order != 0) {
        memory = environment_.dma.buffer(static_cast<u32>(page_size) << --order);
    }
    if (!memory) {
        return memory.error();
    }
    ring_ = std::move(*memory);
    const u32 pages = 1u << order;
    CHECK(lane_.prepare(ring_));
    for (; ring_pages_ < pages; ++ring_pages_) {
        TRY(ring_grants_[ring_pages_], xen_.grants().take());
        xen_.grants().grant(ring_grants_[ring_pages_], front_.domain(), ring_.bus() / page_size + ring_pages_, false);
    }
    terms_.ring_pages = pages;
    return order;
}

// Of an earlier connection. Not an error: a device that the toolstack has made anew does not have it.
io::Task<Result<void>> Vbd::withdraw_key(std::string_view key, bool& published) {
    if (std::exchange(published, false)) {
        const StorePath path = join(front_.path(), key);
        static_cast<void>(co_await xen_.store().remove(path));
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Vbd::publish(u32 order, bool old_style) {
    entry_count_ = 0;
    CO_CHECK(co_await withdraw_key("ring-page-order", published_order_));
    CO_CHECK(co_await withdraw_key("feature-large-sector-size", published_large_sectors_));
    if (order == 0) {
        add_entry("ring-ref", ring_grants_[0]);
    } else {
        published_order_ = true;
        add_entry("ring-page-order", order);
        if (old_style) {
            add_entry("num-ring-pages", u64{1} << order);
        }
        for (u32 i = 0; i < ring_pages_; ++i) {
            FixedText<24> key;
            print(key, "ring-ref{}", i);
            add_entry(key.view(), ring_grants_[i]);
        }
    }
    add_entry("event-channel", to_underlying(port_));
    add_entry("protocol", "x86_64-abi");
    // Announces that grants are reused, so it must be written before it is known whether the back end uses it.
    add_entry("feature-persistent", offers_persistent_ ? 1u : 0u);
    co_return co_await xen_.store().write_all(front_.path(), std::span(entries_).first(entry_count_));
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
    CO_TRY(terms_.discard, co_await offers("feature-discard"));
    CO_TRY(const u64 indirect, co_await xen_.store().number_or(front_.backend(), "feature-max-indirect-segments", 0));
    if (flush && environment_.allows(Feature::flush)) {
        terms_.flush = Operation::flush;
    } else if (barrier && environment_.allows(Feature::barrier)) {
        terms_.flush = Operation::write_barrier;
    }
    terms_.persistent = persistent && offers_persistent_;
    terms_.indirect_segments = environment_.allows(Feature::indirect) && indirect > segments_in_slot
                                   ? static_cast<u32>(std::min<u64>(indirect, Lane::max_segments))
                                   : 0;
    co_return Result<void>{};
}

Result<void> Vbd::keep() { return tasks_.spawn(follow()); }

// ---- the back end's states ----

io::Task<Result<void>> Vbd::follow() {
    for (;;) {
        static_cast<void>(co_await front_.changed());
        if (lane_.is_open() && std::exchange(moved_, false)) {
            static_cast<void>(co_await connect_again());
        } else if (lane_.is_open()) {
            const auto back_state = co_await front_.state();
            if (!back_state) {
                lane_.close(io::Status::device_gone, back_state.error());
            } else {
                static_cast<void>(co_await follow_state(*back_state));
            }
        }
        if (!lane_.is_open()) {
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
    if (!lane_.is_open()) {
        co_return Result<void>{};
    }
    if (!returns || !*returns) {
        lane_.remove({Code::device_gone, "the back end has closed the device (state)",
                      to_underlying(BusState::connected), to_underlying(back_state)});
        co_return Result<void>{};
    }
    co_return co_await reconnect(back_state);
}

// The back end was restarted, or another one took its place: it gets new rings and grants, and everything that its
// predecessor had under way once more.
io::Task<Result<void>> Vbd::reconnect(BusState back_state) {
    log::warning("{}: the back end has left the connection (state {}): waiting for it to return",
                 lane_.disk().identity().name.view(), name(back_state));
    lane_.hold();
    const Result<bool> released = co_await release();
    if (!released || !*released) {
        lost_ = true;
        lane_.close(io::Status::device_gone,
                    released ? Error{Code::timed_out, "the back end does not release the disk's pages"}
                             : released.error());
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
        forget_connection();
        static_cast<void>(co_await front_.close());
        Result<void> done = co_await shake_hands();
        if (done) {
            done = take_over(old);
        }
        if (done) {
            done = co_await front_.set_state(BusState::connected);
        }
        if (!lane_.is_open()) { // by a broken rule of the new back end, or the end of the machine
            co_return Result<void>{};
        }
        if (done) {
            log::info("{}: connected again [{}]", lane_.disk().identity().name.view(),
                      lane_.disk().identity().features.view());
            co_return done;
        }
        lane_.hold();
        if (std::exchange(moved_, false)) { // during this attempt
            continue;
        }
        auto again = co_await front_.may_try_again(done.error(), bound);
        if (again && *again) {
            again = co_await release();
        }
        if (!again || !*again) {
            lane_.close(io::Status::device_gone, done.error());
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
    while (std::any_of(ring_grants_.begin(), ring_grants_.begin() + ring_pages_,
                       [&](GrantRef grant) { return xen_.grants().is_mapped(grant); })) {
        if (bound.passed()) {
            co_return true; // each page is quarantined
        }
        co_await environment_.executor.sleep(retry_pause);
    }
    co_return true;
}

// The back end has no access any more: frees what it had access to, and takes back what it had under way.
void Vbd::forget_connection() {
    if (port_ != Port::none) {
        xen_.events().unbind(std::exchange(port_, Port::none));
    }
    lane_.take_back();
    free_ring();
}

// The new back end's terms replace the old ones'.
Result<void> Vbd::take_over(const Terms& old) {
    if (terms_.geometry.sector_size != old.geometry.sector_size) {
        return Error{Code::not_supported, "the back end has returned with another sector size (bytes)",
                     old.geometry.sector_size, terms_.geometry.sector_size};
    }
    if (terms_.geometry.sectors != old.geometry.sectors || terms_.geometry.read_only != old.geometry.read_only) {
        log::warning("{}: the back end has returned with {} sectors instead of {}{}",
                     lane_.disk().identity().name.view(), terms_.geometry.sectors, old.geometry.sectors,
                     terms_.geometry.read_only ? ", write-protected" : "");
    }
    CHECK(xen_.events().bind(port_, Lane::on_event, &lane_)); // masked until the disk next sleeps
    return lane_.resume(
        terms_, features(), environment_.dma, [](void* self) { static_cast<Vbd*>(self)->front_.notify(); }, this);
}

// A back end that has changed the size rewrites its state [xen-blkif: dynamic resizing].
io::Task<Result<void>> Vbd::follow_size() {
    const u64 units_per_sector = lane_.disk().geometry().sector_size / terms_.wire_unit;
    const u64 old = lane_.disk().geometry().sectors * units_per_sector;
    const auto sectors = co_await xen_.store().number_or(front_.backend(), "sectors", old);
    if (!sectors) {
        log::warning("{}: its size is not known: {}", lane_.disk().identity().name.view(), sectors.error());
    } else if (*sectors > largest_disk) {
        log::warning("{}: the back end reports an impossible size, {} sectors: it keeps its own",
                     lane_.disk().identity().name.view(), *sectors);
    } else if (lane_.is_open()) {
        lane_.disk().resize(*sectors / units_per_sector);
    }
    co_return Result<void>{};
}

// ---- suspension ----

// Most often nothing is under way afterwards. What is, because the back end is slow, is asked again.
io::Task<Result<void>> Vbd::pause() {
    if (!lane_.is_open() || lane_.is_held()) {
        co_return Result<void>{};
    }
    lane_.pause();
    const io::Bound bound(environment_.executor, environment_.timeout);
    while (lane_.is_open() && lane_.in_flight() != 0) {
        if (bound.passed()) {
            co_return Error{Code::timed_out, "requests are under way (number)", 0, lane_.in_flight()};
        }
        co_await environment_.executor.sleep(pause_step);
    }
    co_return Result<void>{};
}

void Vbd::lost() {
    port_ = Port::none;
    moved_ = lane_.is_open();
    if (moved_) {
        lane_.hold();
    }
}

void Vbd::resumed(bool moved) {
    if (moved) {
        front_.notify();
    } else if (lane_.is_open() && !lane_.is_held()) {
        lane_.unpause();
    }
}

// ---- the end ----

io::Task<Result<void>> Vbd::disconnect() {
    if (!begun_) { // not accessed yet: leave it as it is
        co_return co_await front_.close();
    }
    // The back end must not be able to reach anything of ours afterwards.
    const Result<bool> released = co_await release();
    if (port_ != Port::none) {
        xen_.events().unbind(std::exchange(port_, Port::none));
    }
    if (released && *released && !lost_) {
        lane_.reclaim();
        free_ring();
    } else {
        log::warning("{}: the back end does not release its pages: they are not reused", front_.path());
        lost_ = true;
        ring_pages_ = 0;
        ring_.abandon();
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
        lane_.remove({Code::device_gone, "another device has its place"});
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
    if (made == nullptr) {
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
        result = environment.disks.announce(vbd->lane().disk(), slot);
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
    vbd->lane().close(io::Status::device_gone, result.error());
    if (auto left = co_await vbd->disconnect(); !left) {
        log::warning("xen_blk: {}: leaving the bus: {}", disk_name(*which), left.error());
    }
    const auto ignored = vbd->left();
    if (!known) {
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
