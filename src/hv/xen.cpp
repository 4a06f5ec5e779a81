module;
#include "core/try.hpp"
module hv.xen;
import core.std;
import core.result;
import core.text;
import core.cpuid;
import core.dma;
import core.interrupt;
import core.log;
import core.processor;
import core.time;
import core.wall_clock;
import io.executor;
import io.task;
import hv.backend;

namespace fl::hv {

using namespace xen;

Result<void> Xen::install(Environment& environment) {
    const Sighting* sighting = environment.sightings.find(VmGuest::xen);
    if (sighting == nullptr || sighting->base == 0 || sighting->max_leaf < sighting->base + 2) {
        return Error{Code::not_found, "Xen's CPUID leaves are missing: hypercalls cannot be installed"};
    }
    cpu_ = &environment.cpu;
    base_ = sighting->base;
    CHECK(install_hypercalls(environment, *sighting));
    CHECK(install_shared_info(environment));
    CHECK(install_events(environment));
    CHECK(install_grants(environment));
    install_store(environment);
    install_console(environment);
    find_clock(environment, *sighting);
    log::info("xen {}.{}: hypercalls, shared info, {} event channels, up to {} grant entries, XenStore {}",
              version_ >> 16, version_ & 0xffff, events_.fifo() ? "FIFO" : "2-level", grants_.obtainable(),
              has_store_ ? "there" : "absent");
    return {};
}

Result<void> Xen::install_hypercalls(Environment& environment, const Sighting& sighting) {
    if (gate_.call == nullptr) {
        gate_ = native_gate();
    }
    if (gate_.call == nullptr) {
        return Error{Code::not_supported, "this program cannot call a hypervisor"};
    }
    // Leaf base + 2: EAX the number of hypercall pages, EBX the MSR that fills them [xen-public arch-x86/cpuid.h].
    const CpuidRegisters leaf = environment.cpuid.get(sighting.base + 2);
    if (leaf.eax == 0 || leaf.ebx == 0) {
        return Error{Code::protocol, "Xen announces no hypercall page", 1, leaf.eax};
    }
    if (gate_.page != nullptr) {
        hypercall_msr_ = leaf.ebx;
        hypercall_page_ = environment.physical.physical_of(gate_.page);
        environment.cpu.write_msr(hypercall_msr_, hypercall_page_);
    }
    hypercalls_ = xen::Hypercalls(gate_);
    const i64 version = hypercalls_.version();
    if (version < (3 << 16)) {
        return Error{Code::not_supported, "the first hypercall fails (version, or errno)", 3 << 16,
                     static_cast<u64>(version < 0 ? -version : version)};
    }
    version_ = static_cast<u32>(version);
    TRY(features_, hypercalls_.features());
    if ((features_ & feature_auto_translated) == 0) {
        return Error{Code::not_supported, "this Xen does not translate the guest's frame numbers",
                     feature_auto_translated, features_};
    }
    return {};
}

Result<void> Xen::install_shared_info(Environment& environment) {
    TRY(DmaBuffer page, environment.memory.buffer(page_size));
    shared_frame_ = page.bus() / page_size;
    CHECK(hypercalls_.add_to_physmap(MapSpace::shared_info, 0, shared_frame_));
    // Xen's page has replaced ours: never free it.
    shared_ = reinterpret_cast<SharedInfo*>(page.data());
    page.abandon();
    return {};
}

Result<void> Xen::install_events(Environment& environment) {
    TRY(DmaBuffer memory, environment.memory.buffer(max_processors * sizeof(SharedWithVcpu)));
    with_vcpus_ = reinterpret_cast<SharedWithVcpu*>(memory.data());
    with_vcpus_frame_ = memory.bus() / page_size;
    memory.abandon(); // Xen writes to it until the machine ends
    events_.install(hypercalls_, *shared_);
    CHECK(join_events(0));
    if (!environment.fifo_events) {
        return {};
    }
    TRY(DmaBuffer words, environment.memory.buffer(page_size));
    TRY(const bool fifo,
        events_.use_fifo({reinterpret_cast<u32*>(words.data()), page_size / sizeof(u32)}, words.bus() / page_size));
    if (fifo) {
        words.abandon(); // likewise
    }
    return {};
}

// Xen numbers its virtual CPUs in its own order.
u32 Xen::vcpu_of(u32 cpu) {
    const std::optional<u32> started = std::exchange(starting_, std::nullopt);
    // Leaf base + 4 of an HVM or PVH guest: EAX bit 3, EBX holds the number [xen-public arch-x86/cpuid.h].
    static constexpr u32 has_vcpu_id = 1u << 3;
    if (const CpuidRegisters leaf = cpu_->cpuid_leaf(base_ + 4); (leaf.eax & has_vcpu_id) != 0) {
        return leaf.ebx;
    }
    return started.value_or(cpu);
}

// Each processor's place has its number, but a virtual CPU whose place Xen knew before it started has one by its own
// number. No two have the same: processors have at most the number of the virtual CPU that they were started as.
Result<void> Xen::join_events(u32 cpu) {
    const u32 vcpu = vcpu_of(cpu);
    const bool prepared = vcpu < max_processors && (prepared_vcpus_ >> vcpu & 1) != 0;
    const u32 place = prepared ? vcpu : cpu;
    const u64 offset = place * sizeof(SharedWithVcpu);
    return events_.join(cpu, vcpu, with_vcpus_[place], with_vcpus_frame_ + offset / page_size,
                        static_cast<u32>(offset % page_size), prepared);
}

// Not an error for the processor, whose queues get their events on processor 0.
Result<void> Xen::join(u32 cpu, io::Executor&) {
    if (upcall_ == Upcall::none) {
        return {};
    }
    auto joined = join_events(cpu);
    if (joined && upcall_ == Upcall::apic_vector) { // the other one is valid for the whole domain
        joined = hypercalls_.set_upcall_vector(events_.vcpu(cpu), upcall_vector_);
        if (!joined) {
            events_.withdraw(cpu);
        }
    }
    if (!joined) {
        log::warning("xen: processor {}: {}: processor 0 takes its events", cpu, joined.error());
    } else {
        open_kicks(0);
        open_kicks(cpu);
    }
    return {};
}

// While processor 0 waits for this one. KVM delivers messages between local APICs without an exit if the host's
// processor can, and event channels never: there they remain in use.
void Xen::open_kicks(u32 cpu) {
    if (kick_handler_ == nullptr || emulated_ || !events_.joined(cpu) ||
        kick_ports_[cpu].load(std::memory_order_relaxed) != Port::none) {
        return;
    }
    const auto port = events_.open_ipi(cpu, kick_handler_, kick_context_);
    if (!port) {
        log::info("xen: processor {}: {}: it is kicked through its local APIC", cpu, port.error());
        return;
    }
    kick_ports_[cpu].store(*port, std::memory_order_relaxed);
}

Result<void> Xen::install_grants(Environment& environment) {
    static constexpr u32 first_frames = 8; // enough for a full ring, its pages and a few more disks; grows on demand
    TRY(const u32 limit, hypercalls_.grant_table_limit());
    u32 frames = std::min(limit, Grants::max_frames);
    if (frames == 0) {
        return Error{Code::exhausted, "Xen gives this guest no grant table", 1, 0};
    }
    // Contiguous address space for all frames, which Xen's frames then replace. If memory is too small for that, use
    // fewer.
    auto table = environment.memory.buffer(frames * static_cast<u32>(page_size));
    while (!table && frames > 1) {
        frames /= 2;
        table = environment.memory.buffer(frames * static_cast<u32>(page_size));
    }
    if (!table) {
        return table.error();
    }
    grant_frame_ = table->bus() / page_size;
    auto* entries = reinterpret_cast<GrantEntry*>(table->data());
    table->abandon();
    // Map the last of the first frames first, so that Xen grows its table only once. If it cannot, use as many as it
    // can.
    u32 mapped = std::min(frames, first_frames);
    for (auto done = map_grant_frame(mapped - 1); !done; done = map_grant_frame(mapped - 1)) {
        if (--mapped == 0) {
            return done.error();
        }
    }
    for (u32 frame = mapped - 1; frame-- > 0;) {
        CHECK(map_grant_frame(frame));
    }
    grants_.install({entries, frames * grants_per_frame}, mapped,
                    {this, [](void* self, u32 frame) { return static_cast<Xen*>(self)->map_grant_frame(frame); }});
    return {};
}

Result<void> Xen::map_grant_frame(u32 frame) {
    return hypercalls_.add_to_physmap(MapSpace::grant_table, frame, grant_frame_ + frame);
}

void Xen::install_store(Environment& environment) {
    const auto frame = hypercalls_.hvm_parameter(HvmParam::store_frame);
    const auto port = hypercalls_.hvm_parameter(HvmParam::store_event_channel);
    if (!frame || !port || *frame == 0 || *port == 0 || *port >= event_channels) {
        log::warning("xen: no XenStore was given to this guest: no synthetic devices");
        return;
    }
    auto page = environment.physical.map(*frame * page_size, page_size);
    if (!page) {
        log::warning("xen: XenStore's page cannot be mapped: {}", page.error());
        return;
    }
    store_.install(*page, static_cast<Port>(static_cast<u32>(*port)));
    has_store_ = true;
}

void Xen::install_console(Environment& environment) {
    emulated_ = hypercalls_.console_write({}) == error_no_such_call;
    const auto console = find_console(hypercalls_, emulated_);
    auto page = console ? environment.physical.map(console->frame * page_size, page_size) : nullptr;
    if (!page) {
        log::warning("xen: the console's page cannot be mapped: {}", page.error());
    } else if (*page != nullptr) {
        console_page_ = *page;
        console_port_ = console->port;
    }
}

void Xen::find_clock(const Environment& environment, const Sighting& sighting) {
    tsc_hz_ = pvclock_hz();
    clock_name_ = tsc_hz_ ? "xen pvclock" : clock_name_;
    if (!tsc_hz_) { // not written yet: CPUID has the same values
        const CpuidRegisters scale = environment.cpuid.get(sighting.base + 3, 1);
        tsc_hz_ = frequency(scale.ecx, static_cast<i8>(scale.edx));
        if (const u64 khz = environment.cpuid.get(sighting.base + 3, 0).ecx; !tsc_hz_ && khz >= 1000) {
            tsc_hz_ = khz * 1000;
        }
        clock_name_ = tsc_hz_ ? "xen cpuid" : "none";
    }
}

std::optional<u64> Xen::system_time() const {
    const u32 cpu = this_processor();
    return events_.joined(cpu) ? xen::system_time(events_.info(cpu).time) : std::nullopt;
}

// UTC at system time 0 is in the shared info page.
std::optional<UnixNanoseconds> Xen::time_of_day() const {
    static constexpr u64 latest = 9'000'000'000; // seconds since 1970: what 64 bits of nanoseconds hold
    u64 seconds = 0;
    u64 nanoseconds = 0;
    const auto since = system_time();
    const bool consistent = read_consistently(shared_->wallclock_version, [&] {
        seconds = u64{read_once(shared_->wallclock_seconds_high)} << 32 | read_once(shared_->wallclock_seconds);
        nanoseconds = read_once(shared_->wallclock_nanoseconds);
    });
    if (!since || !consistent || seconds == 0 || seconds > latest || nanoseconds >= 1'000'000'000) {
        return std::nullopt;
    }
    return seconds * 1'000'000'000 + nanoseconds + *since;
}

void Xen::set_time_of_day(Instant now) {
    const auto time = time_of_day();
    if (!time) {
        return;
    }
    set_wall_clock(now, *time);
    const CivilTime t = civil_time(*time);
    log::info("xen: the host's time is {}-{:02}-{:02} {:02}:{:02}:{:02} UTC", t.year, t.month, t.day, t.hour, t.minute,
              t.second);
}

Result<void> Xen::start(Services& services) {
    store_.set_timeout(services.timeout);
    set_time_of_day(services.executor.elapsed());
    // The vector that Xen injects needs no end-of-interrupt, which would cost another exit per event. The vector
    // through the local APIC is the fallback for a Xen without it.
    if ((features_ & feature_callback_vector) != 0) {
        TRY(const InterruptVector vector, services.interrupts.attach_vector(Events::upcall, &events_, false));
        if (auto set = hypercalls_.set_hvm_parameter(HvmParam::callback_irq, callback_by_vector(vector.vector)); set) {
            upcall_ = Upcall::vector;
            upcall_vector_ = vector.vector;
        } else {
            services.interrupts.detach_vector(vector);
        }
    }
    if (upcall_ == Upcall::none) {
        TRY(const InterruptVector vector, services.interrupts.attach_vector(Events::upcall, &events_, true));
        if (auto set = hypercalls_.set_upcall_vector(events_.vcpu(0), vector.vector); !set) {
            services.interrupts.detach_vector(vector);
            return set.error();
        }
        upcall_ = Upcall::apic_vector;
        upcall_vector_ = vector.vector;
    }
    if (has_store_) {
        if (auto started = store_.start(services.executor, events_); !started) {
            log::warning("xen: XenStore cannot be used: {}: no synthetic devices", started.error());
        } else {
            device_watch_.emplace(store_, services.executor, listing_);
        }
    }
    return {};
}

io::Task<Result<void>> Xen::enumerate(DeviceList& into) {
    if (!store_.started()) {
        co_return Result<void>{};
    }
    const usize before = into.list.size();
    CO_CHECK(co_await xen::enumerate(store_, into, listing_));
    if (console_page_ != nullptr) {
        into.add({.type = FixedText<40>("console"), .address = FixedText<64>("console")});
    }
    device_watch_->know(into.all().subspan(before));
    device_watch_->start();
    static_cast<void>(co_await device_watch_->await_first(store_.bound()));
    co_return Result<void>{};
}

// ---- stolen time ----

// By hypercall: Xen can also count in the guest's memory, but then writes to it at every switch of virtual CPUs, which
// made a 4 KiB read at queue depth 1 a fifth slower.
std::optional<Nanoseconds> Xen::stolen() {
    const u32 cpu = this_processor();
    if (!events_.joined(cpu)) {
        return std::nullopt;
    }
    const auto times = hypercalls_.runstate(events_.vcpu(cpu));
    return times ? std::optional(stolen_earlier_[cpu] + stolen_time(*times)) : std::nullopt;
}

std::array<Nanoseconds, max_processors> Xen::stolen_so_far() {
    auto sum = stolen_earlier_;
    for (u32 cpu = 0; cpu < max_processors; ++cpu) {
        if (!events_.joined(cpu)) {
            continue;
        }
        if (const auto times = hypercalls_.runstate(events_.vcpu(cpu))) {
            sum[cpu] += stolen_time(*times);
        }
    }
    return sum;
}

// ---- timer ----

Result<void> Xen::Timer::start(InterruptHandler handler, void* context) {
    const u32 cpu = this_processor();
    if (!xen_.events_.joined(cpu) || !xen_.system_time()) {
        return Error{Code::not_supported, "Xen's timer needs events and a system time of this processor"};
    }
    CHECK(xen_.hypercalls_.stop_singleshot_timer(xen_.events_.vcpu(cpu)));
    handler_ = handler; // the same one for all processors
    context_ = context;
    TRY(ports_[cpu], xen_.events_.bind_virq(virq_timer, handler, context, cpu));
    return {};
}

// By hypercall, since Xen raises no event for a virtual CPU's time otherwise. The expiry is absolute, so that the time
// between the reading and the hypercall, in which Xen may run others, does not count.
bool Xen::Timer::arm(Nanoseconds length) {
    static constexpr u32 tries = 8;
    const u32 cpu = this_processor();
    if (ports_[cpu] == Port::none) {
        return false;
    }
    for (u32 i = 0; i < tries; ++i) {
        const auto now = xen_.system_time();
        if (!now) {
            return false;
        }
        // Xen reads it as signed. Before Xen 4.18 and in KVM's emulation one that has passed may be refused.
        static constexpr u64 latest = ~u64{0} >> 1;
        const u64 expiry = *now < latest ? *now + std::min(length, latest - *now) : latest;
        const i64 answer = xen_.hypercalls_.set_singleshot_timer(xen_.events_.vcpu(cpu), expiry);
        if (answer != error_time_passed) {
            return answer >= 0;
        }
        length = std::max<Nanoseconds>(length, 1'000) * 2;
    }
    return false;
}

void Xen::Timer::restart() {
    if (handler_ == nullptr) {
        return;
    }
    for (u32 cpu = 0; cpu < max_processors; ++cpu) {
        if (std::exchange(ports_[cpu], Port::none) == Port::none) {
            continue;
        }
        if (auto port = xen_.events_.bind_virq(virq_timer, handler_, context_, cpu); port) {
            ports_[cpu] = *port;
        } else {
            log::warning("xen: processor {} has no timer any more, and does not sleep: {}", cpu, port.error());
        }
    }
}

void Xen::Timer::stop(u32 cpu) {
    if (ports_[cpu] != Port::none) {
        static_cast<void>(xen_.hypercalls_.stop_singleshot_timer(xen_.events_.vcpu(cpu)));
    }
}

// ---- suspension ----

io::Task<Result<bool>> Xen::suspend(Parking& others) {
    if (!store_.started()) {
        co_return Error{Code::not_supported, "without XenStore nothing can be connected again"};
    }
    for (BusDevice* device = devices_.first(); device != nullptr; device = BusDevices::after(*device)) {
        if (auto paused = co_await device->pause(); !paused) {
            log::warning("xen: {} {} is not quiet: {}", device->type(), device->number(), paused.error());
        }
    }
    const Result<void> held = co_await store_.hold();
    const Result<void> parked = held ? co_await others.park() : held;
    i64 answer = suspend_cancelled;
    Result<void> anew;
    if (parked) {
        log::info("xen: suspended");
        if (ConsoleRing* const console = guest_console(); console != nullptr) {
            console->flush(); // another domain's ring is empty
        }
        const auto stolen = stolen_so_far();
        answer = hypercalls_.suspend();
        if (answer == 0) {
            stolen_earlier_ = stolen; // another domain's times begin at 0
            anew = set_up_anew();
            for (BusDevice* device = devices_.first(); device != nullptr; device = BusDevices::after(*device)) {
                device->lost();
            }
            if (anew) { // after them: they close ports by their old numbers
                timer_.restart();
            }
        }
    }
    others.release();
    if (held) {
        store_.release();
    }
    const bool moved = answer == 0;
    if (moved) {
        log::info("xen: resumed in another domain");
        check_clock();
        if (auto watched = co_await store_.watch_again(); !watched) {
            log::warning("xen: a watch of XenStore is lost: {}", watched.error());
        }
    }
    for (BusDevice* device = devices_.first(); device != nullptr; device = BusDevices::after(*device)) {
        device->resumed(moved);
    }
    if (!parked) {
        co_return parked.error();
    }
    if (answer < 0) {
        co_return Error{Code::not_supported, "Xen does not suspend this guest (errno)", 0, static_cast<u64>(-answer)};
    }
    if (!anew) {
        co_return anew.error();
    }
    co_return moved;
}

// In another domain memory and registers are as they were, and nothing that Xen or the toolstack keeps for a guest is:
// the hypercall page is filled, the shared pages are mapped, and parameters and event channels are set once more.
Result<void> Xen::set_up_anew() {
    if (hypercall_msr_ != 0) {
        cpu_->write_msr(hypercall_msr_, hypercall_page_);
    }
    CHECK(hypercalls_.add_to_physmap(MapSpace::shared_info, 0, shared_frame_));
    CHECK(events_.restart());
    for (u32 frame = grants_.frames(); frame-- > 0;) { // the last one first: Xen grows its table only once
        CHECK(map_grant_frame(frame));
    }
    if (upcall_ == Upcall::vector) {
        CHECK(hypercalls_.set_hvm_parameter(HvmParam::callback_irq, callback_by_vector(upcall_vector_)));
    }
    for (u32 cpu = 0; upcall_ == Upcall::apic_vector && cpu < max_processors; ++cpu) {
        if (events_.joined(cpu)) {
            CHECK(hypercalls_.set_upcall_vector(events_.vcpu(cpu), upcall_vector_));
        }
    }
    for (u32 cpu = 0; cpu < max_processors; ++cpu) {
        if (kick_ports_[cpu].exchange(Port::none, std::memory_order_relaxed) != Port::none) {
            open_kicks(cpu);
        }
    }
    if (const auto console = hypercalls_.hvm_parameter(HvmParam::console_event_channel)) {
        console_port_ = static_cast<Port>(static_cast<u32>(*console));
        if (ConsoleRing* const ring = guest_console(); ring != nullptr) {
            ring->restart(console_port_);
        }
    }
    TRY(const u64 port, hypercalls_.hvm_parameter(HvmParam::store_event_channel));
    if (port == 0 || port >= event_channels) {
        return Error{Code::not_found, "no XenStore was given to this domain (event channel)", event_channels - 1, port};
    }
    return store_.restart(static_cast<Port>(static_cast<u32>(port)));
}

// The counter goes on from its old value. Its frequency changes if the other host has another one and does not hide it.
void Xen::check_clock() {
    const auto fresh = pvclock_hz();
    if (!fresh || !tsc_hz_) {
        return;
    }
    const u64 difference = *fresh > *tsc_hz_ ? *fresh - *tsc_hz_ : *tsc_hz_ - *fresh;
    if (difference > *tsc_hz_ / 10'000) {
        log::warning(
            "xen: the time stamp counter runs at {} kHz now, not at {} kHz: all times are wrong by that factor",
            *fresh / 1000, *tsc_hz_ / 1000);
    }
}

// ---- the end ----

void Xen::uninstall() {
    if (version_ == 0) {
        return;
    }
    const InUse now = in_use();
    log::debug("xen: in use at the end: {} grants, {} event channels, {} watches", now.grants, now.event_channels,
               now.watches);
    for (BusDevice* device = devices_.first(); device != nullptr; device = BusDevices::after(*device)) {
        if (device->holds_grants()) {
            return;
        }
    }
    if (const u32 left = now.grants - grants_.in_quarantine(); left != 0) {
        log::error("xen: {} grant entries are left behind, although all devices have gone", left);
    }
}

// ---- processors ----

u32 Xen::processor_count() {
    u32 count = 0;
    while (version_ != 0 && count < max_processors && hypercalls_.vcpu_is_up(count)) {
        ++count;
    }
    // In an HVM guest the firmware has started all of them. Xen 4.17's puts them back into the state after INIT, 4.20's
    // leaves them halted: there only INIT and startup IPIs start them again.
    return count > 1 && hypercalls_.vcpu_is_initialised(1) ? 0 : count;
}

Result<void> Xen::start_processor(u32 index, const ProcessorStart& state) {
    VcpuContext context;
    context.rip = state.rip;
    context.rsp = state.rsp;
    context.rdi = state.rdi;
    context.cr0 = state.cr0;
    context.cr3 = state.cr3;
    context.cr4 = state.cr4;
    context.efer = state.efer;
    // Xen starts none that has no vcpu_info [xen-public vcpu.h VCPUOP_initialise; common/domain.c].
    if (index >= vcpus_in_shared_info && index < max_processors && with_vcpus_ != nullptr) {
        const u64 offset = index * sizeof(SharedWithVcpu);
        CHECK(events_.prepare(index, with_vcpus_[index], with_vcpus_frame_ + offset / page_size,
                              static_cast<u32>(offset % page_size)));
        prepared_vcpus_ |= u64{1} << index;
    }
    starting_ = index;
    return hypercalls_.start_vcpu(index, context);
}

// ---- emulated devices ----

Result<void> Xen::unplug(EmulatedClasses classes) {
    if (version_ == 0) {
        return Error{Code::not_supported, "Xen has not been installed"};
    }
    const u16 magic = cpu_->in16(unplug_port);
    if (magic != unplug_magic) {
        return Error{Code::not_supported, "this host cannot unplug emulated devices (magic at port 0x10)", unplug_magic,
                     magic};
    }
    if (cpu_->in8(unplug_version_port) != 0) {
        cpu_->out16(unplug_version_port, unplug_product);
        cpu_->out32(unplug_port, 1);
        if (cpu_->in16(unplug_port) != unplug_magic) {
            return Error{Code::not_supported, "this host refuses our drivers (driver-blacklist in XenStore)",
                         unplug_magic, unplug_refused};
        }
    }
    u16 mask = 0;
    mask |= classes.disks ? unplug_disks : 0;
    mask |= classes.nics ? unplug_nics : 0;
    mask |= classes.nvme ? unplug_nvme : 0;
    if (mask != 0) {
        cpu_->out16(unplug_port, mask);
    }
    return {};
}

} // namespace fl::hv
