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
    CHECK(install_hypercalls(environment, *sighting));
    CHECK(install_shared_info(environment));
    CHECK(install_grants(environment));
    install_store(environment);
    install_console(environment);
    find_clock(environment, *sighting);
    log::info("xen {}.{}: hypercalls, shared info, up to {} grant entries, XenStore {}", version_ >> 16,
              version_ & 0xffff, grants_.obtainable(), has_store_ ? "there" : "absent");
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
        environment.cpu.write_msr(leaf.ebx, environment.physical.physical_of(gate_.page));
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
    CHECK(hypercalls_.add_to_physmap(MapSpace::shared_info, 0, page.bus() / page_size));
    // Xen's page has replaced ours: never free it.
    shared_ = reinterpret_cast<SharedInfo*>(page.data());
    page.abandon();
    events_.install(hypercalls_, *shared_, 0);
    return {};
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
    const auto console = find_console(hypercalls_, hypercalls_.console_write({}) == error_no_such_call);
    auto page = console ? environment.physical.map(console->frame * page_size, page_size) : nullptr;
    if (!page) {
        log::warning("xen: the console's page cannot be mapped: {}", page.error());
    } else if (*page != nullptr) {
        console_page_ = *page;
        console_port_ = console->port;
    }
}

void Xen::find_clock(const Environment& environment, const Sighting& sighting) {
    // frequency = (10^9 << 32) / mul >> shift [xen-public xen.h vcpu_time_info]
    auto frequency = [](u32 mul, i8 shift) -> std::optional<u64> {
        if (mul == 0 || shift < -31 || shift > 31) {
            return std::nullopt;
        }
        const u64 unshifted = (u64{1'000'000'000} << 32) / mul;
        const u64 hz = shift >= 0 ? unshifted >> shift : unshifted << -shift;
        return hz >= 1'000'000 && hz <= 100'000'000'000 ? std::optional(hz) : std::nullopt;
    };
    const VcpuTimeInfo& time = shared_->vcpu[0].time;
    for (u32 tries = 0; tries < 16; ++tries) {
        // Acquire, twice: reads the values between two equal, even versions. Pairs with Xen's order: version, values,
        // version.
        const u32 before = std::atomic_ref(const_cast<u32&>(time.version)).load(std::memory_order_acquire);
        const u32 mul = *static_cast<const volatile u32*>(&time.tsc_to_system_mul);
        const i8 shift = *static_cast<const volatile i8*>(&time.tsc_shift);
        std::atomic_thread_fence(std::memory_order_acquire);
        const u32 now = std::atomic_ref(const_cast<u32&>(time.version)).load(std::memory_order_relaxed);
        if (before == now && before % 2 == 0) {
            tsc_hz_ = frequency(mul, shift);
            clock_name_ = tsc_hz_ ? "xen pvclock" : clock_name_;
            break;
        }
    }
    if (!tsc_hz_) { // not written yet: CPUID has the same values
        const CpuidRegisters scale = environment.cpuid.get(sighting.base + 3, 1);
        tsc_hz_ = frequency(scale.ecx, static_cast<i8>(scale.edx));
        if (const u64 khz = environment.cpuid.get(sighting.base + 3, 0).ecx; !tsc_hz_ && khz >= 1000) {
            tsc_hz_ = khz * 1000;
        }
        clock_name_ = tsc_hz_ ? "xen cpuid" : "none";
    }
}

Result<void> Xen::start(Services& services) {
    store_.set_timeout(services.timeout);
    // The vector that Xen injects needs no end-of-interrupt, which would cost another exit per event. The vector
    // through the local APIC is the fallback for a Xen without it.
    if ((features_ & feature_callback_vector) != 0) {
        TRY(const InterruptVector vector, services.interrupts.attach_vector(Events::upcall, &events_, false));
        if (auto set = hypercalls_.set_hvm_parameter(HvmParam::callback_irq, callback_by_vector(vector.vector)); set) {
            upcall_ = Upcall::vector;
        } else {
            services.interrupts.detach_vector(vector);
        }
    }
    if (upcall_ == Upcall::none) {
        TRY(const InterruptVector vector, services.interrupts.attach_vector(Events::upcall, &events_, true));
        if (auto set = hypercalls_.set_upcall_vector(0, vector.vector); !set) {
            services.interrupts.detach_vector(vector);
            return set.error();
        }
        upcall_ = Upcall::apic_vector;
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
    co_return Result<void>{};
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
