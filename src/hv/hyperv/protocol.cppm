// The Hyper-V interface except the VMBus: CPUID bits, MSRs, hypercalls, the synthetic interrupt controller's pages, the
// reference TSC page, synthetic timers. Structures and constants only [hv-tlfs]. Values written by the hypervisor are
// open enums: unknown values are representable, and the reader must handle them.
module;
#include <cstddef>
export module hv.hyperv.protocol;
import core.std;

export namespace fl::hv::hyperv {

// ---- CPUID, relative to the hypervisor's base [hv-tlfs §2.4] ----

inline constexpr u32 leaf_features = 3;        // EAX, EBX: privileges; EDX: features
inline constexpr u32 leaf_recommendations = 4; // EAX

/// Privileges, EAX of leaf_features.
namespace privileges {
inline constexpr u32 reference_counter = 1u << 1;
inline constexpr u32 synic = 1u << 2;
inline constexpr u32 synthetic_timers = 1u << 3;
inline constexpr u32 apic_registers = 1u << 4;
inline constexpr u32 hypercall = 1u << 5;
inline constexpr u32 vp_index = 1u << 6;
inline constexpr u32 reset = 1u << 7;
inline constexpr u32 reference_tsc = 1u << 9;
inline constexpr u32 frequencies = 1u << 11;
} // namespace privileges

/// EBX of leaf_features.
namespace privileges_high {
inline constexpr u32 post_messages = 1u << 4;
inline constexpr u32 signal_events = 1u << 5;
} // namespace privileges_high

/// EDX of leaf_features.
namespace features {
inline constexpr u32 frequency_registers = 1u << 8;
inline constexpr u32 crash_registers = 1u << 10;
inline constexpr u32 direct_timers = 1u << 19;
} // namespace features

/// EAX of leaf_recommendations.
namespace recommendations {
// auto-EOI is deprecated on this host: using it would disable hardware interrupt virtualisation
inline constexpr u32 no_auto_eoi = 1u << 9;
} // namespace recommendations

// ---- registers [hv-tlfs appendix C] ----

namespace msr {
inline constexpr u32 guest_os_id = 0x40000000;
inline constexpr u32 hypercall = 0x40000001;
inline constexpr u32 vp_index = 0x40000002;
inline constexpr u32 reset = 0x40000003;
inline constexpr u32 reference_counter = 0x40000020; // 100 ns units
inline constexpr u32 reference_tsc = 0x40000021;
inline constexpr u32 tsc_frequency = 0x40000022; // Hz
inline constexpr u32 synic_control = 0x40000080;
inline constexpr u32 event_page = 0x40000082;   // SIEFP
inline constexpr u32 message_page = 0x40000083; // SIMP
inline constexpr u32 end_of_message = 0x40000084;
inline constexpr u32 sint0 = 0x40000090; // the first of sixteen
inline constexpr u32 timer0_config = 0x400000b0;
inline constexpr u32 timer0_count = 0x400000b1;
inline constexpr u32 crash_parameter0 = 0x40000100; // the first of five
inline constexpr u32 crash_control = 0x40000105;
} // namespace msr

/// Page registers hold address | enable; bits 1–11 must be written back as read.
inline constexpr u64 page_enable = 1;
inline constexpr u64 page_register_reserved = 0xffe;

/// guest_os_id: bit 63: open source; 56–62: OS type (an unassigned one: 'F'); 16–47: version [hv-tlfs §2.6].
inline constexpr u64 our_guest_os_id = u64{1} << 63 | u64{0x46} << 56 | u64{0x000100} << 16;

namespace sint {
inline constexpr u64 masked = u64{1} << 16;
inline constexpr u64 auto_eoi = u64{1} << 17;
inline constexpr u64 kept = ~u64{0x700ff}; // all bits except vector, masked, auto-EOI and polling
} // namespace sint

namespace timer {
inline constexpr u64 enable = 1u << 0;
inline constexpr u64 auto_enable = 1u << 3; // writing a count enables
inline constexpr u64 direct = 1u << 12;
constexpr u64 vector(u8 number) { return u64{number} << 4; }
constexpr u64 sint_number(u32 number) { return u64{number} << 16; }
} // namespace timer

namespace crash {
inline constexpr u64 message = u64{1} << 62; // parameter 3: address of a text, parameter 4: its length in bytes
inline constexpr u64 notify = u64{1} << 63;
} // namespace crash

// ---- hypercalls [hv-tlfs §3] ----

enum class Call : u16 { post_message = 0x5c, signal_event = 0x5d };
inline constexpr u64 call_fast = u64{1} << 16; // parameters in registers

/// Low 16 bits of a hypercall's result.
enum class Status : u16 {
    success = 0,
    invalid_hypercall_code = 2,
    invalid_hypercall_input = 3,
    invalid_alignment = 4,
    invalid_parameter = 5,
    access_denied = 6,
    operation_denied = 8,
    insufficient_memory = 0xb,
    invalid_port_id = 0x11,
    invalid_connection_id = 0x12,
    insufficient_buffers = 0x13,
};

inline constexpr usize message_payload = 240;

struct PostMessageInput {
    u32 connection = 0;
    u32 reserved = 0;
    u32 type = 0;
    u32 payload_bytes = 0;
    std::array<std::byte, message_payload> payload{};
};
static_assert(sizeof(PostMessageInput) == 256 && offsetof(PostMessageInput, reserved) == 4 &&
              offsetof(PostMessageInput, type) == 8 && offsetof(PostMessageInput, payload_bytes) == 12 &&
              offsetof(PostMessageInput, payload) == 16);

/// Input of signal_event as a fast call: connection in bits 0–31, flag number in 32–47.
constexpr u64 signal_event_input(u32 connection, u16 flag) { return connection | u64{flag} << 32; }

// ---- synthetic interrupt controller [hv-tlfs §11] ----

inline constexpr u32 sints = 16;

enum class SynicMessageType : u32 {
    none = 0,
    timer_expired = 0x80000010,
};

/// A slot of the message page. The hypervisor writes `type` last, and does not write while `type` is not none.
struct MessageSlot {
    SynicMessageType type = SynicMessageType::none;
    u8 payload_bytes = 0;
    u8 flags = 0; // bit 0: another message is pending for this slot
    u16 reserved = 0;
    u64 origin = 0; // port id
    std::array<std::byte, message_payload> payload{};
};
static_assert(sizeof(MessageSlot) == 256 && offsetof(MessageSlot, payload_bytes) == 4 &&
              offsetof(MessageSlot, flags) == 5 && offsetof(MessageSlot, origin) == 8 &&
              offsetof(MessageSlot, payload) == 16);
inline constexpr u8 message_pending = 1;

struct MessagePage {
    std::array<MessageSlot, sints> slots{};
};
static_assert(sizeof(MessagePage) == 4096);

/// 2048 flags for each SINT.
struct EventPage {
    std::array<std::array<u64, 32>, sints> flags{};
};
static_assert(sizeof(EventPage) == 4096);
inline constexpr u32 event_flags = 2048;

// ---- time [hv-tlfs §12] ----

/// reference time = (tsc * scale >> 64) + offset, in 100 ns. sequence 0: currently invalid.
struct ReferenceTscPage {
    u32 sequence = 0;
    u32 reserved = 0;
    u64 scale = 0;
    i64 offset = 0;
};
static_assert(sizeof(ReferenceTscPage) == 24 && offsetof(ReferenceTscPage, scale) == 8 &&
              offsetof(ReferenceTscPage, offset) == 16);
inline constexpr u32 reference_tsc_invalid = 0;
inline constexpr u64 reference_hz = 10'000'000;

} // namespace fl::hv::hyperv
