// The Xen guest interface: hypercall numbers and arguments, the shared info page, event channels, grant entries,
// XenStore messages. Structures and constants only, in the 64-bit layout, which applies if the hypercall page is
// installed in 64-bit mode [xen-public]. Values written by Xen or another domain are open enums: unknown values are
// representable, and the reader must handle them.
module;
#include <cstddef>
export module hv.xen.protocol;
import core.std;

export namespace fl::hv::xen {

// ---- hypercalls [xen-public xen.h] ----

enum class Hypercall : u32 {
    memory_op = 12,
    xen_version = 17,
    console_io = 18,
    grant_table_op = 20,
    vcpu_op = 24,
    sched_op = 29,
    event_channel_op = 32,
    hvm_op = 34,
};
/// Size in bytes of an entry of the hypercall page: entry n is for hypercall n [xen-public arch-x86/xen.h].
inline constexpr u32 hypercall_stride = 32;

using Domain = u16;
inline constexpr Domain domain_self = 0x7ff0;

/// Errors are small negative numbers, numbered as in Linux [xen-public errno.h].
inline constexpr i64 error_again = -11;
inline constexpr i64 error_no_such_call = -38;
inline constexpr i64 error_time_passed = -62;

enum class VersionOp : u32 { version = 0, get_features = 6 };
struct FeatureInfo {
    u32 submap_index; // in
    u32 submap;       // out: 32 feature bits
};
static_assert(sizeof(FeatureInfo) == 8 && offsetof(FeatureInfo, submap) == 4);
inline constexpr u32 feature_auto_translated = 1u << 2; // guest frames are used, not machine frames
inline constexpr u32 feature_callback_vector = 1u << 8; // HVM_PARAM_CALLBACK_IRQ takes a vector

enum class MemoryOp : u32 { add_to_physmap = 7, memory_map = 9 };
/// An E820 entry; the array is packed, 20 bytes per entry [xen-public memory.h XENMEM_memory_map].
struct [[gnu::packed]] E820Entry {
    u64 address;
    u64 size; // bytes
    u32 type;
};
static_assert(sizeof(E820Entry) == 20 && offsetof(E820Entry, size) == 8 && offsetof(E820Entry, type) == 16);
struct MemoryMap {
    u32 count; // in: capacity of buffer; out: ranges written
    u32 padding;
    E820Entry* buffer;
};
static_assert(sizeof(MemoryMap) == 16 && offsetof(MemoryMap, buffer) == 8);
enum class MapSpace : u32 { shared_info = 0, grant_table = 1 };
struct AddToPhysmap {
    Domain domain;
    u16 size; // for ranges only
    MapSpace space;
    u64 index;
    u64 frame; // guest frame at which to map the page
};
static_assert(sizeof(AddToPhysmap) == 24 && offsetof(AddToPhysmap, space) == 4 && offsetof(AddToPhysmap, index) == 8 &&
              offsetof(AddToPhysmap, frame) == 16);

enum class HvmOp : u32 { set_param = 0, get_param = 1, set_upcall_vector = 23 };
enum class HvmParam : u32 {
    callback_irq = 0,
    store_frame = 1,
    store_event_channel = 2,
    console_frame = 17,
    console_event_channel = 18
};
struct HvmParameter {
    Domain domain;
    u16 padding;
    HvmParam index;
    u64 value;
};
static_assert(sizeof(HvmParameter) == 16 && offsetof(HvmParameter, index) == 4 && offsetof(HvmParameter, value) == 8);
struct UpcallVector {
    u32 vcpu;
    u8 vector;
    u8 padding[3];
};
static_assert(sizeof(UpcallVector) == 8 && offsetof(UpcallVector, vector) == 4);
/// HVM_PARAM_CALLBACK_IRQ value that delivers the upcall as an interrupt with this vector, bypassing the local APIC
/// [xen-public hvm/params.h].
constexpr u64 callback_by_vector(u8 vector) { return u64{2} << 56 | vector; }

enum class VcpuOp : u32 {
    initialise = 0,
    up = 1,
    down = 2,
    is_up = 3,
    runstate = 4,
    set_singleshot_timer = 8,
    stop_singleshot_timer = 9,
    register_info = 10
};
/// The times of a virtual CPU, as of the call.
struct RunstateInfo {
    u32 state;
    u32 padding;
    u64 state_entry_time;    // system time in ns at which it entered the state
    std::array<u64, 4> time; // ns in each state, since the virtual CPU began
};
static_assert(sizeof(RunstateInfo) == 48 && offsetof(RunstateInfo, time) == 16);
inline constexpr u32 runstate_runnable = 1; // it waits for a processor of the host
inline constexpr u32 runstate_offline = 3;  // neither runnable nor asleep: paused
/// The time in ns for which a virtual CPU could have run and did not.
constexpr u64 stolen_time(const RunstateInfo& info) {
    return info.time[runstate_runnable] + info.time[runstate_offline];
}

/// Arms the timer of the calling virtual CPU, whose expiry raises virq_timer [xen-public vcpu.h].
struct VcpuSingleshotTimer {
    u64 expiry; // system time in ns; one that has passed expires at once
    u32 flags;  // singleshot_*
    u32 padding;
};
static_assert(sizeof(VcpuSingleshotTimer) == 16 && offsetof(VcpuSingleshotTimer, flags) == 8);
/// An expiry that has passed is refused (error_time_passed) and raises nothing. Xen ignores it since 4.18.
inline constexpr u32 singleshot_future = 1u << 0;
/// Moves a vcpu_info to the guest's memory; it must not cross a page [xen-public vcpu.h]. Once for each virtual CPU,
/// and on it.
struct VcpuRegisterInfo {
    u64 frame;  // guest frame
    u32 offset; // in the frame, bytes
    u32 reserved;
};
static_assert(sizeof(VcpuRegisterInfo) == 16 && offsetof(VcpuRegisterInfo, offset) == 8);
/// struct vcpu_hvm_context with the registers of a 64-bit processor [xen-public hvm/hvm_vcpu.h].
struct VcpuContext {
    static constexpr u32 mode_64 = 1;

    u32 mode = mode_64;
    u32 padding = 0;
    u64 rax = 0, rcx = 0, rdx = 0, rbx = 0, rsp = 0, rbp = 0, rsi = 0, rdi = 0;
    u64 rip = 0, rflags = 0;
    u64 cr0 = 0, cr3 = 0, cr4 = 0, efer = 0;
    u64 rest[2] = {}; // the registers of a 32-bit processor take more room, and Xen reads as much
};
static_assert(sizeof(VcpuContext) == 136 && offsetof(VcpuContext, rsp) == 40 && offsetof(VcpuContext, rdi) == 64 &&
              offsetof(VcpuContext, rip) == 72 && offsetof(VcpuContext, cr0) == 88 &&
              offsetof(VcpuContext, efer) == 112);

enum class SchedOp : u32 { yield = 0, block = 1, shutdown = 2, poll = 3 };
/// The reason of SchedOp::shutdown after which the domain may go on. It returns 1 if it has been cancelled.
inline constexpr u32 shutdown_suspend = 2;
inline constexpr i64 suspend_cancelled = 1;
struct SchedPoll {
    const u32* ports; // virtual address of port_count ports
    u32 port_count;
    u32 padding;
    u64 timeout; // absolute system time in ns (KVM's emulation treats it as a duration); 0: none
};
static_assert(sizeof(SchedPoll) == 24 && offsetof(SchedPoll, port_count) == 8 && offsetof(SchedPoll, timeout) == 16);

enum class ConsoleOp : u32 { write = 0 };

// ---- the shared info page [xen-public xen.h, arch-x86/xen.h] ----

/// `version` is odd while Xen updates the fields: read version, the fields, then version again.
struct VcpuTimeInfo {
    u32 version;
    u32 padding0;
    u64 tsc_timestamp;
    u64 system_time; // nanoseconds since boot at tsc_timestamp
    u32 tsc_to_system_mul;
    i8 tsc_shift;
    u8 flags;
    u8 padding1[2];
};
static_assert(sizeof(VcpuTimeInfo) == 32 && offsetof(VcpuTimeInfo, tsc_timestamp) == 8 &&
              offsetof(VcpuTimeInfo, system_time) == 16 && offsetof(VcpuTimeInfo, tsc_to_system_mul) == 24 &&
              offsetof(VcpuTimeInfo, tsc_shift) == 28 && offsetof(VcpuTimeInfo, flags) == 29);

struct VcpuInfo {
    u8 upcall_pending; // set by Xen; the guest clears it before it scans
    u8 upcall_mask;    // for guests without interrupts of their own
    u8 padding[6];
    u64 pending_selector; // one bit for each word of SharedInfo::pending
    u64 cr2;
    u64 reserved;
    VcpuTimeInfo time;
};
static_assert(sizeof(VcpuInfo) == 64 && offsetof(VcpuInfo, upcall_mask) == 1 &&
              offsetof(VcpuInfo, pending_selector) == 8 && offsetof(VcpuInfo, cr2) == 16 &&
              offsetof(VcpuInfo, time) == 32);

inline constexpr u32 vcpus_in_shared_info = 32;
inline constexpr u32 event_words = 64;
inline constexpr u32 event_channels = event_words * 64; // 2-level event channels

struct SharedInfo {
    std::array<VcpuInfo, vcpus_in_shared_info> vcpu;
    std::array<u64, event_words> pending; // set by Xen, cleared by the guest
    std::array<u64, event_words> mask;    // written by the guest
    u32 wallclock_version;
    u32 wallclock_seconds;
    u32 wallclock_nanoseconds;
    u32 wallclock_seconds_high;
    std::array<u64, 6> arch;
};
static_assert(offsetof(SharedInfo, pending) == 0x800 && offsetof(SharedInfo, mask) == 0xa00 &&
              offsetof(SharedInfo, wallclock_version) == 0xc00 &&
              offsetof(SharedInfo, wallclock_seconds_high) == 0xc0c && offsetof(SharedInfo, arch) == 0xc10 &&
              sizeof(SharedInfo) == 0xc40);

// ---- event channels [xen-public event_channel.h] ----

/// A local port number of an event channel. 0: none.
enum class Port : u32 { none = 0 };

enum class EventOp : u32 {
    bind_interdomain = 0,
    bind_virq = 1,
    close = 3,
    send = 4,
    status = 5,
    alloc_unbound = 6,
    bind_ipi = 7,
    bind_vcpu = 8,
    unmask = 9,
    init_control = 11,
    expand_array = 12,
    set_priority = 13
};
/// A port for an interrupt that Xen itself raises. Of those that each virtual CPU has, EVTCHNOP_bind_vcpu moves none.
struct EventBindVirq {
    u32 virq;  // in: virq_*
    u32 vcpu;  // in
    Port port; // out
};
static_assert(sizeof(EventBindVirq) == 12 && offsetof(EventBindVirq, vcpu) == 4 && offsetof(EventBindVirq, port) == 8);
inline constexpr u32 virq_timer = 0; // the single-shot timer; each virtual CPU has one
/// The virtual CPU that gets the upcalls of a port; virtual CPU 0 by default.
struct EventBindVcpu {
    Port port;
    u32 vcpu;
};
static_assert(sizeof(EventBindVcpu) == 8 && offsetof(EventBindVcpu, vcpu) == 4);
/// A port whose events each virtual CPU of this guest may raise on `vcpu`.
struct EventBindIpi {
    u32 vcpu;
    Port port; // out
};
static_assert(sizeof(EventBindIpi) == 8 && offsetof(EventBindIpi, port) == 4);
struct EventAllocUnbound {
    Domain domain; // owner of the port; domain_self
    Domain remote; // the domain that may bind to it
    Port port;     // out
};
static_assert(sizeof(EventAllocUnbound) == 8 && offsetof(EventAllocUnbound, remote) == 2 &&
              offsetof(EventAllocUnbound, port) == 4);
struct EventBindInterdomain {
    Domain remote;
    u16 padding;
    Port remote_port;
    Port local_port; // out
};
static_assert(sizeof(EventBindInterdomain) == 12 && offsetof(EventBindInterdomain, remote_port) == 4 &&
              offsetof(EventBindInterdomain, local_port) == 8);
struct EventPort { // close, send, unmask
    Port port;
};
static_assert(sizeof(EventPort) == 4);

// FIFO event channels: an event word for each port in pages of the guest, and for each virtual CPU a control block with
// the heads of its queues, one for each priority [xen-public event_channel.h].
inline constexpr u32 fifo_pending = 1u << 31; // set by Xen, cleared by the guest
inline constexpr u32 fifo_masked = 1u << 30;  // written by the guest
inline constexpr u32 fifo_linked = 1u << 29;  // it is in a queue: set by Xen, cleared by the guest
inline constexpr u32 fifo_busy = 1u << 28;    // Xen changes the link: it must not be unmasked meanwhile
inline constexpr u32 fifo_link_bits = 17;
inline constexpr u32 fifo_link = (1u << fifo_link_bits) - 1; // the next port in the queue; 0: none
inline constexpr u32 fifo_priorities = 16;                   // 0: the highest

struct FifoControl {
    u32 ready; // one bit for each queue that has become non-empty
    u32 reserved;
    std::array<u32, fifo_priorities> head; // port; written by Xen
};
static_assert(sizeof(FifoControl) == 72 && offsetof(FifoControl, head) == 8);
/// The first call switches the guest to FIFO event channels; each names the control block of one virtual CPU, which
/// must not cross a page.
struct EventInitControl {
    u64 frame;    // in: guest frame
    u32 offset;   // in: in the frame, bytes, a multiple of 8
    u32 vcpu;     // in
    u8 link_bits; // out
    u8 padding[7];
};
static_assert(sizeof(EventInitControl) == 24 && offsetof(EventInitControl, offset) == 8 &&
              offsetof(EventInitControl, vcpu) == 12 && offsetof(EventInitControl, link_bits) == 16);
struct EventSetPriority {
    Port port;
    u32 priority; // of fifo_priorities
};
static_assert(sizeof(EventSetPriority) == 8 && offsetof(EventSetPriority, priority) == 4);
/// Adds a page of event words, which begin as masked.
struct EventExpandArray {
    u64 frame;
};
static_assert(sizeof(EventExpandArray) == 8);

struct EventStatus {
    Domain domain; // in: owner of the port
    u16 padding;
    Port port;  // in
    u32 status; // out: event_*
    u32 vcpu;   // out
    u32 more[2];
};
static_assert(sizeof(EventStatus) == 24 && offsetof(EventStatus, port) == 4 && offsetof(EventStatus, status) == 8);
inline constexpr u32 event_unbound = 1; // the other domain has not bound it yet
inline constexpr u32 event_interdomain = 2;

// ---- the guest's console [xen-public io/console.h] ----

inline constexpr u32 console_in_bytes = 1024;
inline constexpr u32 console_out_bytes = 2048;

/// One page; `out` is written by the guest. The positions are free-running.
struct ConsolePage {
    std::array<char, console_in_bytes> in;
    std::array<char, console_out_bytes> out;
    u32 in_consumer;
    u32 in_producer;
    u32 out_consumer;
    u32 out_producer;
};
static_assert(offsetof(ConsolePage, out) == 1024 && offsetof(ConsolePage, in_consumer) == 3072 &&
              offsetof(ConsolePage, out_consumer) == 3080 && offsetof(ConsolePage, out_producer) == 3084);

// ---- grants [xen-public grant_table.h] ----

enum class GrantOp : u32 { query_size = 6 };
struct GrantQuerySize {
    Domain domain;
    u16 padding0;
    u32 frames;     // out
    u32 max_frames; // out
    i16 status;     // out; 0: the rest is valid
    u16 padding1;
};
static_assert(sizeof(GrantQuerySize) == 16 && offsetof(GrantQuerySize, frames) == 4 &&
              offsetof(GrantQuerySize, max_frames) == 8 && offsetof(GrantQuerySize, status) == 12);

inline constexpr u16 grant_permit_access = 1;
inline constexpr u16 grant_read_only = 1u << 2;
inline constexpr u16 grant_reading = 1u << 3; // set by Xen: mapped for reading
inline constexpr u16 grant_writing = 1u << 4; // set by Xen: mapped for writing
inline constexpr u32 grants_reserved = 8;     // the first ones are reserved for the toolstack
using GrantRef = u32;

/// Version 1. Eight bytes, aligned: an unused entry can be written with one store.
struct GrantEntry {
    u16 flags;
    Domain domain;
    u32 frame;
};
static_assert(sizeof(GrantEntry) == 8 && offsetof(GrantEntry, domain) == 2 && offsetof(GrantEntry, frame) == 4);
inline constexpr u32 grants_per_frame = 4096 / sizeof(GrantEntry);

// ---- XenStore [xenstore, xenstore-ring, xen-public io/xs_wire.h] ----

enum class StoreType : u32 {
    directory = 1,
    read = 2,
    watch = 4,
    unwatch = 5,
    transaction_start = 6,
    transaction_end = 7,
    write = 11,
    mkdir = 12,
    remove = 13,
    watch_event = 15,
    error = 16,
};
struct StoreHeader {
    StoreType type;
    u32 request_id;
    u32 transaction;
    u32 length; // payload bytes that follow
};
static_assert(sizeof(StoreHeader) == 16 && offsetof(StoreHeader, request_id) == 4 &&
              offsetof(StoreHeader, transaction) == 8 && offsetof(StoreHeader, length) == 12);
inline constexpr u32 store_payload_max = 4096;
inline constexpr u32 store_ring_bytes = 1024;

/// One page; the positions are free-running.
struct StorePage {
    std::array<char, store_ring_bytes> requests;
    std::array<char, store_ring_bytes> responses;
    u32 request_consumer;
    u32 request_producer;
    u32 response_consumer;
    u32 response_producer;
    u32 server_features;
    u32 connection;
    u32 error;
};
static_assert(offsetof(StorePage, responses) == 1024 && offsetof(StorePage, request_consumer) == 2048 &&
              offsetof(StorePage, request_producer) == 2052 && offsetof(StorePage, response_consumer) == 2056 &&
              offsetof(StorePage, response_producer) == 2060 && offsetof(StorePage, server_features) == 2064 &&
              offsetof(StorePage, connection) == 2068 && offsetof(StorePage, error) == 2072);

// ---- XenBus [xen-public io/xenbus.h] ----

/// The state of one end of a device. Any number may be read.
enum class BusState : u32 {
    unknown = 0,
    initialising = 1,
    init_wait = 2,
    initialised = 3,
    connected = 4,
    closing = 5,
    closed = 6,
    reconfiguring = 7,
    reconfigured = 8,
};
constexpr std::string_view name(BusState state) {
    constexpr std::array<std::string_view, 9> names{"unknown",     "initialising",  "init-wait",
                                                    "initialised", "connected",     "closing",
                                                    "closed",      "reconfiguring", "reconfigured"};
    return to_underlying(state) < names.size() ? names[to_underlying(state)] : "a state that Xen does not define";
}

// ---- unplugging emulated devices [xen-unplug] ----

inline constexpr u16 unplug_port = 0x10;         // 16 bits: read the magic, write the mask; 32 bits: write the build
inline constexpr u16 unplug_version_port = 0x12; // 8 bits: read the version; 16 bits: write the product
inline constexpr u16 unplug_magic = 0x49d2;
// read from unplug_port after writing product and build: the host has blacklisted this driver
inline constexpr u16 unplug_refused = 0xd249;
inline constexpr u16 unplug_disks = 1u << 0;
inline constexpr u16 unplug_nics = 1u << 1;
inline constexpr u16 unplug_nvme = 1u << 3;
// experimental: no number is registered for this kernel [xen-public hvm/pvdrivers.h]
inline constexpr u16 unplug_product = 0xffff;

} // namespace fl::hv::xen
