module hv.xen.hypercall;
import core.std;
import core.result;
import hv.xen.protocol;

namespace fl::hv::xen {

#if __STDC_HOSTED__
Gate native_gate() { return {}; }
#endif

namespace {
Result<void> checked(i64 answer, std::string_view what) {
    if (answer < 0) {
        return Error{Code::not_supported, what, 0, static_cast<u64>(-answer)};
    }
    return {};
}
} // namespace

Result<u32> Hypercalls::features() {
    FeatureInfo info{};
    if (auto ok = checked(call(Hypercall::xen_version, VersionOp::get_features, info),
                          "Xen does not report its features (errno)");
        !ok) {
        return ok.error();
    }
    return info.submap;
}

Result<void> Hypercalls::add_to_physmap(MapSpace space, u64 index, u64 frame) {
    AddToPhysmap map{domain_self, 0, space, index, frame};
    return checked(call(Hypercall::memory_op, MemoryOp::add_to_physmap, map),
                   "Xen does not map a shared page into the guest (errno)");
}

Result<u64> Hypercalls::hvm_parameter(HvmParam index) {
    HvmParameter parameter{domain_self, 0, index, 0};
    if (auto ok = checked(call(Hypercall::hvm_op, HvmOp::get_param, parameter),
                          "Xen does not report an HVM parameter (errno)");
        !ok) {
        return ok.error();
    }
    return parameter.value;
}

Result<void> Hypercalls::set_hvm_parameter(HvmParam index, u64 value) {
    HvmParameter parameter{domain_self, 0, index, value};
    return checked(call(Hypercall::hvm_op, HvmOp::set_param, parameter), "Xen refuses an HVM parameter (errno)");
}

Result<void> Hypercalls::set_upcall_vector(u32 vcpu, u8 vector) {
    UpcallVector upcall{vcpu, vector, {}};
    return checked(call(Hypercall::hvm_op, HvmOp::set_upcall_vector, upcall),
                   "Xen refuses a vector for events (errno)");
}

std::optional<bool> Hypercalls::vcpu_is_up(u32 vcpu) {
    const i64 answer = call(Hypercall::vcpu_op, to_underlying(VcpuOp::is_up), u64{vcpu});
    return answer < 0 ? std::nullopt : std::optional(answer != 0);
}

// Xen looks for earlier registers before it refuses the new ones for their mode.
bool Hypercalls::vcpu_is_initialised(u32 vcpu) {
    static constexpr i64 eexist = 17;
    VcpuContext nothing;
    nothing.mode = ~0u;
    return call(Hypercall::vcpu_op, to_underlying(VcpuOp::initialise), vcpu, reinterpret_cast<u64>(&nothing)) ==
           -eexist;
}

Result<void> Hypercalls::start_vcpu(u32 vcpu, const VcpuContext& context) {
    if (auto set =
            checked(call(Hypercall::vcpu_op, to_underlying(VcpuOp::initialise), vcpu, reinterpret_cast<u64>(&context)),
                    "Xen refuses the registers of a virtual CPU (errno)");
        !set) {
        return set;
    }
    return checked(call(Hypercall::vcpu_op, to_underlying(VcpuOp::up), u64{vcpu}),
                   "Xen does not start a virtual CPU (errno)");
}

Result<void> Hypercalls::stop_vcpu(u32 vcpu) {
    return checked(call(Hypercall::vcpu_op, to_underlying(VcpuOp::down), u64{vcpu}),
                   "Xen does not stop a virtual CPU (errno)");
}

i64 Hypercalls::suspend() {
    u32 reason = shutdown_suspend;
    return call(Hypercall::sched_op, SchedOp::shutdown, reason);
}

Result<void> Hypercalls::register_vcpu_info(u32 vcpu, u64 frame, u32 offset) {
    VcpuRegisterInfo place{frame, offset, 0};
    return checked(call(Hypercall::vcpu_op, to_underlying(VcpuOp::register_info), vcpu, reinterpret_cast<u64>(&place)),
                   "Xen refuses a place for a virtual CPU's information (errno)");
}

Result<RunstateInfo> Hypercalls::runstate(u32 vcpu) {
    RunstateInfo info{};
    const auto told =
        checked(call(Hypercall::vcpu_op, to_underlying(VcpuOp::runstate), vcpu, reinterpret_cast<u64>(&info)),
                "Xen does not tell the times of a virtual CPU (errno)");
    return told ? Result<RunstateInfo>(info) : told.error();
}

i64 Hypercalls::set_singleshot_timer(u32 vcpu, u64 expiry) {
    VcpuSingleshotTimer timer{expiry, 0, 0};
    return call(Hypercall::vcpu_op, to_underlying(VcpuOp::set_singleshot_timer), vcpu, reinterpret_cast<u64>(&timer));
}

Result<void> Hypercalls::stop_singleshot_timer(u32 vcpu) {
    return checked(call(Hypercall::vcpu_op, to_underlying(VcpuOp::stop_singleshot_timer), u64{vcpu}),
                   "Xen has no single-shot timer (errno)");
}

i64 Hypercalls::console_write(std::string_view text) {
    return call(Hypercall::console_io, to_underlying(ConsoleOp::write), text.size(),
                reinterpret_cast<u64>(text.data()));
}

Result<u32> Hypercalls::grant_table_limit() {
    GrantQuerySize size{};
    size.domain = domain_self;
    // The third argument is the number of structures.
    const i64 answer =
        call(Hypercall::grant_table_op, to_underlying(GrantOp::query_size), reinterpret_cast<u64>(&size), 1);
    if (answer < 0 || size.status != 0) {
        return Error{Code::not_supported, "Xen does not report the size of the grant table (errno)", 0,
                     static_cast<u64>(answer < 0 ? -answer : -size.status)};
    }
    return size.max_frames;
}

} // namespace fl::hv::xen
