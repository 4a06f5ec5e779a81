module;
#include "core/try.hpp"
module hv.hyperv;
import core.std;
import core.result;
import core.cpuid;
import core.dma;
import core.interrupt;
import core.log;
import core.processor;
import core.text;
import core.time;
import io.executor;
import io.task;
import hv.backend;

namespace fl::hv {

using namespace hyperv;

namespace {
// Limits how long the end of the machine waits for the host, in ns.
constexpr Nanoseconds unload_timeout = 1'000'000'000;
} // namespace

// ---- install ----

Result<void> HyperV::install(Environment& environment) {
    const Sighting* sighting = environment.sightings.find(VmGuest::hyperv);
    if (sighting == nullptr || sighting->base == 0 || sighting->max_leaf < sighting->base + leaf_recommendations) {
        return Error{Code::not_found, "Hyper-V's CPUID leaves are missing: hypercalls cannot be installed"};
    }
    cpu_ = &environment.cpu;
    memory_ = &environment.memory;
    base_ = sighting->base;
    const CpuidRegisters leaf = environment.cpuid.get(base_ + leaf_features);
    privileges_ = leaf.eax;
    features_ = leaf.edx;
    recommendations_ = environment.cpuid.get(base_ + leaf_recommendations).eax;
    bus_offered_ = offers_vmbus(*sighting);
    if (auto installed = install_hypercalls(environment); !installed) {
        withdraw_pages();
        return installed;
    }
    if (auto installed = clock_.install(*cpu_, *memory_, leaf); !installed) {
        log::warning("hyperv: no reference time page: {}", installed.error());
    }
    find_clock(environment);
    synic_.install(*cpu_, *memory_, (privileges_ & privileges::vp_index) != 0);
    installed_ = true;
    log::info("hyperv {}.{}: hypercalls, clock {}, {}{}", sighting->version >> 16, sighting->version & 0xffff,
              clock_name_, bus_offered_ ? "SynIC" : "no SynIC, hence no VMBus",
              (privileges_ & privileges::synthetic_timers) != 0 ? ", synthetic timers" : "");
    return {};
}

Result<void> HyperV::install_hypercalls(Environment& environment) {
    if ((privileges_ & privileges::hypercall) == 0) {
        return Error{Code::not_supported, "this Hyper-V gives its guest no hypercalls (privileges)",
                     privileges::hypercall, privileges_};
    }
    if (gate_.call == nullptr) {
        gate_ = native_gate();
    }
    if (gate_.call == nullptr) {
        return Error{Code::not_supported, "this program cannot call a hypervisor"};
    }
    // The guest identity first: without it the hypercall page cannot be enabled [hv-tlfs §3.13].
    cpu_->write_msr(msr::guest_os_id, our_guest_os_id);
    if (gate_.page != nullptr) {
        const u64 kept = cpu_->read_msr(msr::hypercall) & page_register_reserved;
        cpu_->write_msr(msr::hypercall, environment.physical.physical_of(gate_.page) | kept | page_enable);
        if ((cpu_->read_msr(msr::hypercall) & page_enable) == 0) {
            return Error{Code::not_supported, "Hyper-V does not enable the hypercall page"};
        }
    }
    return hypercalls_.install(gate_, environment.memory);
}

// Withdraws the pages that the hypervisor must not access after this object is destroyed, and the guest identity,
// without which there are no hypercalls.
void HyperV::withdraw_pages() {
    clock_.uninstall();
    if ((privileges_ & privileges::hypercall) == 0) {
        return; // the MSRs do not exist
    }
    if (gate_.page != nullptr) {
        cpu_->write_msr(msr::hypercall, cpu_->read_msr(msr::hypercall) & page_register_reserved);
    }
    cpu_->write_msr(msr::guest_os_id, 0);
}

void HyperV::find_clock(Environment& environment) {
    tsc_hz_ = clock_.tsc_hz();
    clock_name_ = clock_.name();
    if (!tsc_hz_) {
        tsc_hz_ = tsc_hz_by_cpuid(environment.cpuid);
        clock_name_ = tsc_hz_ ? "cpuid" : "none";
    }
}

// ---- start and end ----

Result<void> HyperV::start(Services& services) {
    if (!installed_) {
        return Error{Code::bad_argument, "Hyper-V: start() without install()"};
    }
    if (bus_offered_) {
        if (auto started = start_bus(services); !started) {
            bus_.reset();
            log::warning("hyperv: no VMBus: {}: native devices only", started.error());
        }
    }
    const bool direct = (features_ & features::direct_timers) != 0;
    constexpr u32 needed = privileges::synthetic_timers | privileges::reference_counter;
    if ((privileges_ & needed) == needed && (direct || bus_started_)) {
        timer_.emplace(*cpu_, services.interrupts, synic_, clock_, direct);
    }
    return {};
}

Result<void> HyperV::start_bus(Services& services) {
    bus_.emplace(services.executor, clock_);
    CHECK(bus_->vmbus_.install({hypercalls_, synic_, *memory_, services.executor, services.timeout}));
    // Auto-EOI saves the end-of-interrupt write; where the host advises against it, that write is cheap and auto-EOI is
    // expensive.
    auto_eoi_ = (recommendations_ & recommendations::no_auto_eoi) == 0;
    TRY(vector_, services.interrupts.attach_vector(Synic::on_interrupt, &synic_, !auto_eoi_));
    if (auto enabled = synic_.enable(services.executor, vector_.vector, auto_eoi_); !enabled) {
        services.interrupts.detach_vector(vector_);
        return enabled;
    }
    bus_->vmbus_.add(bus_->listener_);
    bus_started_ = true;
    return {};
}

Result<void> HyperV::join(u32, io::Executor& executor) {
    if (!bus_started_) {
        return {};
    }
    return synic_.enable(executor, vector_.vector, auto_eoi_);
}

void HyperV::leave(u32) {
    if (timer_) {
        timer_->stop();
    }
    synic_.disable();
}

void HyperV::uninstall() {
    if (!std::exchange(installed_, false)) {
        return;
    }
    if (std::exchange(bus_started_, false)) {
        bus_->vmbus_.unload(unload_timeout);
    }
    leave(this_processor());
    withdraw_pages();
}

// ---- the bus ----

io::Task<Result<void>> HyperV::Bus::enumerate(DeviceList& into) {
    if (auto connected = co_await vmbus_.connect(); !connected) {
        log::warning("hyperv: {}: native devices only (hv=kvm avoids the attempt on KVM)", connected.error());
        co_return Result<void>{};
    }
    if (auto requested = co_await vmbus_.request_offers(); !requested) {
        log::warning("hyperv: {}: the offers so far are used", requested.error());
    }
    while (const auto device = next_device()) {
        into.add(*device);
    }
    into.dropped += new_dropped();
    co_return Result<void>{};
}

std::optional<SyntheticDevice> HyperV::Bus::next_device() {
    const auto offer = vmbus_.take_new();
    if (!offer) {
        return std::nullopt;
    }
    std::optional<SyntheticDevice> device(std::in_place);
    device->type.write(offer->type.text());
    device->address.write(offer->instance.text());
    device->number = offer->relid;
    return device;
}

// ---- timer ----

Result<void> HyperV::Timer::start(InterruptHandler handler, void* context) {
    u64 config = timer::auto_enable;
    if (direct_) {
        if (!vector_) {
            TRY(const InterruptVector vector, interrupts_.attach_vector(handler, context, true));
            vector_ = vector;
        }
        config |= timer::direct | timer::vector(vector_->vector);
    } else {
        if (!synic_.enabled(this_processor())) {
            return Error{Code::not_supported,
                         "a synthetic timer needs SynIC for its messages, and this processor's is off"};
        }
        synic_.set_timer_handler(handler, context);
        config |= timer::sint_number(vmbus_sint);
    }
    started_.store(true, std::memory_order_relaxed); // orders nothing: stop() is called after all use
    cpu_.write_msr(msr::timer0_config, 0);
    cpu_.write_msr(msr::timer0_config, config);
    return {};
}

bool HyperV::Timer::arm(Nanoseconds length) {
    // The count is absolute reference time, read from the MSR: the page would require a reading of the time stamp
    // counter, and arming takes an MSR access anyway.
    const u64 now = clock_.counter().value_or(0);
    cpu_.write_msr(msr::timer0_count, now + std::max<u64>(length / 100, 1));
    return true;
}

void HyperV::Timer::stop() {
    if (started_.load(std::memory_order_relaxed)) {
        cpu_.write_msr(msr::timer0_config, 0);
    }
}

} // namespace fl::hv
