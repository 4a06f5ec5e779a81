// Registers and descriptors of Intel's 8254x Gigabit Ethernet controllers [8254x]: those of the 82540EM and the
// 82545EM, which hypervisors emulate. Field names are the manual's.
module;
#include <cstddef>
export module drivers.e1000.protocol;
import core.std;
import core.registers;

export namespace fl::drivers::e1000 {

/// Bytes of BAR 0 that are used. The whole is 128 KiB.
inline constexpr u32 register_bytes = 0x6000;

// ---- general [8254x §13.4] ----

struct Control : Register<Control, u32> {
    static constexpr u64 offset = 0x0000;
    static constexpr Bit<31> phy_rst{};
    static constexpr Bit<30> vme{}; // VLAN tags are taken out of frames
    static constexpr Bit<26> rst{}; // clears itself
    static constexpr Bit<12> frcdplx{};
    static constexpr Bit<11> frcspd{};
    static constexpr Bit<7> ilos{};
    static constexpr Bit<6> slu{}; // set link up
    static constexpr Bit<5> asde{};
    static constexpr Bit<3> lrst{};
    static constexpr Bit<0> fd{};
    static constexpr auto layout = fields(phy_rst, vme, rst, frcdplx, frcspd, ilos, slu, asde, lrst, fd);
    bool absent() const { return raw == ~u32{0}; }
};
struct Status : Register<Status, u32> {
    static constexpr u64 offset = 0x0008;
    static constexpr Field<7, 6, Attribute::read_only> speed{};
    static constexpr Bit<1, Attribute::read_only> lu{}; // link up
    static constexpr Bit<0, Attribute::read_only> fd{};
    static constexpr auto layout = fields(speed, lu, fd);
    bool absent() const { return raw == ~u32{0}; }
};
/// One word of the EEPROM.
struct EepromRead : Register<EepromRead, u32> {
    static constexpr u64 offset = 0x0014;
    static constexpr Field<31, 16, Attribute::read_only> data{};
    static constexpr Field<15, 8> addr{};
    static constexpr Bit<4, Attribute::read_only> done{};
    static constexpr Bit<0> start{};
    static constexpr auto layout = fields(data, addr, done, start);
};
// Flow control, unused: all zero.
inline constexpr std::array<u64, 4> flow_control_registers{0x0028, 0x002c, 0x0030, 0x0170}; // FCAL FCAH FCT FCTTV

// ---- interrupts [8254x §13.4.17 to §13.4.21] ----

inline constexpr u64 cause_read = 0x00c0; // ICR: reading clears it
inline constexpr u64 mask_set = 0x00d0;   // IMS
inline constexpr u64 mask_clear = 0x00d8; // IMC
enum Cause : u32 {
    txdw = 1u << 0,   // transmit descriptors were written back
    lsc = 1u << 2,    // link status change
    rxdmt0 = 1u << 4, // few receive descriptors are left
    rxo = 1u << 6,    // a frame was lost for lack of descriptors
    rxt0 = 1u << 7,   // frames were received
};

// ---- receiving and transmitting [8254x §13.4.22 to §13.4.39] ----

struct ReceiveControl : Register<ReceiveControl, u32> {
    static constexpr u64 offset = 0x0100;
    static constexpr Bit<26> secrc{};       // strip the CRC
    static constexpr Field<17, 16> bsize{}; // 0: 2048 bytes
    static constexpr Bit<15> bam{};         // broadcasts
    static constexpr Bit<5> lpe{};          // frames of more than 1522 bytes
    static constexpr Bit<4> mpe{};          // all multicasts
    static constexpr Bit<3> upe{};          // everything
    static constexpr Bit<2> sbp{};          // damaged frames
    static constexpr Bit<1> en{};
    static constexpr auto layout = fields(secrc, bsize, bam, lpe, mpe, upe, sbp, en);
};
struct TransmitControl : Register<TransmitControl, u32> {
    static constexpr u64 offset = 0x0400;
    static constexpr Field<21, 12> cold{};
    static constexpr Field<11, 4> ct{};
    static constexpr Bit<3> psp{}; // pad short frames
    static constexpr Bit<1> en{};
    static constexpr auto layout = fields(cold, ct, psp, en);
};
inline constexpr u32 collision_threshold = 15;              // [8254x §14.5]
inline constexpr u32 collision_distance = 0x40;             // full duplex
inline constexpr u64 transmit_gap = 0x0410;                 // TIPG
inline constexpr u32 copper_gap = 10 | 8u << 10 | 6u << 20; // IPGT, IPGR1, IPGR2

/// Registers of one ring, from its block on.
inline constexpr u64 receive_ring = 0x2800;
inline constexpr u64 transmit_ring = 0x3800;
inline constexpr u64 ring_base_low = 0x00;
inline constexpr u64 ring_base_high = 0x04;
inline constexpr u64 ring_length = 0x08; // bytes, a multiple of 128
inline constexpr u64 ring_head = 0x10;
inline constexpr u64 ring_tail = 0x18;
inline constexpr u64 receive_delay = 0x2820; // RDTR: 0, an interrupt for each frame

// ---- addresses [8254x §13.5] ----

inline constexpr u64 multicast_table = 0x5200; // MTA
inline constexpr u32 multicast_words = 128;
inline constexpr u64 receive_address_low = 0x5400; // RAL0
struct ReceiveAddressHigh : Register<ReceiveAddressHigh, u32> {
    static constexpr u64 offset = 0x5404;
    static constexpr Bit<31> av{}; // valid
    static constexpr Field<17, 16> as{};
    static constexpr Field<15, 0> rah{};
    static constexpr auto layout = fields(av, as, rah);
};

// ---- descriptors [8254x §3.2.3, §3.3.3] ----

/// A legacy descriptor of either ring: the address of its buffer, and a word that is read and written as a whole.
struct Descriptor {
    u64 address;
    u64 word;
};
static_assert(sizeof(Descriptor) == 16 && offsetof(Descriptor, word) == 8);

// Receive: length in bits 15:0, checksum, status in 39:32, errors in 47:40, special.
inline constexpr u64 rx_done = u64{1} << 32;          // DD
inline constexpr u64 rx_end_of_packet = u64{1} << 33; // EOP
/// CE, SE, SEQ, CXE, RXE; not TCPE and IPE, which concern checksums that the card is not asked to verify.
inline constexpr u64 rx_errors = u64{0x97} << 40;
constexpr u32 rx_length(u64 word) { return word & 0xffff; }

// Transmit: length in bits 15:0, CSO, command in 31:24, status in 35:32.
inline constexpr u64 tx_end_of_packet = u64{1} << 24; // EOP
inline constexpr u64 tx_insert_crc = u64{1} << 25;    // IFCS
inline constexpr u64 tx_report_status = u64{1} << 27; // RS
inline constexpr u64 tx_done = u64{1} << 32;          // DD
inline constexpr u64 tx_errors = u64{6} << 32;        // EC, LC: collisions

} // namespace fl::drivers::e1000
