// The registers of PCI configuration space and of capability structures: [PCI-3.0 §6], [PCIe-5.0 §7]. An `offset` is
// relative to the start of the configuration space, or of the register's capability or table entry.
export module drivers.pci.registers;
import core.std;
import core.registers;

export namespace fl::drivers::pci {

// ---- the header [PCI-3.0 §6.1, §6.2] ----

struct Identity : Register<Identity, u32> {
    static constexpr u64 offset = 0x00;
    static constexpr Field<31, 16, Attribute::read_only> device{};
    static constexpr Field<15, 0, Attribute::read_only> vendor{};
    static constexpr auto layout = fields(device, vendor);
};

struct Command : Register<Command, u16> {
    static constexpr u64 offset = 0x04;
    static constexpr Bit<10> interrupt_disable{}; // INTx only, not messages
    static constexpr Bit<8> serr_enable{};
    static constexpr Bit<6> parity_error_response{};
    static constexpr Bit<2> bus_master{};
    static constexpr Bit<1> memory_space{};
    static constexpr Bit<0> io_space{};
    static constexpr auto layout =
        fields(interrupt_disable, serr_enable, parity_error_response, bus_master, memory_space, io_space);
};

struct Status : Register<Status, u16> {
    static constexpr u64 offset = 0x06;
    static constexpr Bit<15, Attribute::write_1_to_clear> detected_parity_error{};
    static constexpr Bit<14, Attribute::write_1_to_clear> signaled_system_error{};
    static constexpr Bit<13, Attribute::write_1_to_clear> received_master_abort{};
    static constexpr Bit<12, Attribute::write_1_to_clear> received_target_abort{};
    static constexpr Bit<11, Attribute::write_1_to_clear> signaled_target_abort{};
    static constexpr Bit<8, Attribute::write_1_to_clear> master_data_parity_error{};
    static constexpr Bit<4, Attribute::read_only> capabilities_list{};
    static constexpr Bit<3, Attribute::read_only> interrupt_status{};
    static constexpr auto layout =
        fields(detected_parity_error, signaled_system_error, received_master_abort, received_target_abort,
               signaled_target_abort, master_data_parity_error, capabilities_list, interrupt_status);
};

struct ClassCode : Register<ClassCode, u32> {
    static constexpr u64 offset = 0x08;
    static constexpr Field<31, 24, Attribute::read_only> base_class{};
    static constexpr Field<23, 16, Attribute::read_only> subclass{};
    static constexpr Field<15, 8, Attribute::read_only> interface{};
    static constexpr Field<7, 0, Attribute::read_only> revision{};
    static constexpr auto layout = fields(base_class, subclass, interface, revision);
};

struct HeaderType : Register<HeaderType, u32> {
    static constexpr u64 offset = 0x0c; // the byte 0x0e, read as part of a dword
    static constexpr Bit<23, Attribute::read_only> multi_function{};
    static constexpr Field<22, 16, Attribute::read_only, u8> type{}; // 0: a device, 1: a PCI-to-PCI bridge
    static constexpr auto layout = fields(multi_function, type);
};

/// A memory base address register; `block` is 4 * index. Six in a header of type 0, two in one of type 1.
struct MemoryBaseAddress : Register<MemoryBaseAddress, u32> {
    static constexpr u64 offset = 0x10;
    enum class Type : u8 { bits_32 = 0, below_1_mib = 1, bits_64 = 2 }; // below_1_mib: legacy devices only
    static constexpr Field<31, 4> address{};
    static constexpr Bit<3, Attribute::read_only> prefetchable{};
    static constexpr Field<2, 1, Attribute::read_only, Type> type{};
    static constexpr Bit<0, Attribute::read_only> io_space{}; // 1: an IoBaseAddress
    static constexpr auto layout = fields(address, prefetchable, type, io_space);
};

struct IoBaseAddress : Register<IoBaseAddress, u32> {
    static constexpr u64 offset = 0x10;
    static constexpr Field<31, 2> address{};
    static constexpr Bit<0, Attribute::read_only> io_space{};
    static constexpr auto layout = fields(address, io_space);
};

/// Only in a header of type 1.
struct BusNumbers : Register<BusNumbers, u32> {
    static constexpr u64 offset = 0x18;
    static constexpr Field<23, 16, Attribute::read_write, u8> subordinate{};
    static constexpr Field<15, 8, Attribute::read_write, u8> secondary{};
    static constexpr Field<7, 0, Attribute::read_write, u8> primary{};
    static constexpr auto layout = fields(subordinate, secondary, primary);
};

struct CapabilitiesPointer : Register<CapabilitiesPointer, u8> {
    static constexpr u64 offset = 0x34;
    static constexpr Field<7, 2, Attribute::read_only> dword{};
    static constexpr auto layout = fields(dword); // bits 1 and 0 must be ignored [PCI-3.0 §6.7]
};

struct InterruptPin : Register<InterruptPin, u16> {
    static constexpr u64 offset = 0x3c;
    static constexpr Field<15, 8, Attribute::read_only, u8> pin{}; // 0: none, 1 to 4: INTA to INTD
    static constexpr Field<7, 0, Attribute::read_write, u8> line{};
    static constexpr auto layout = fields(pin, line);
};

// ---- capabilities [PCI-3.0 §6.7] ----

/// Header of each capability.
struct CapabilityHeader : Register<CapabilityHeader, u16> {
    static constexpr u64 offset = 0;
    static constexpr Field<15, 10, Attribute::read_only> next_dword{};
    static constexpr Field<7, 0, Attribute::read_only, u8> id{};
    static constexpr auto layout = fields(next_dword, id);
};

/// Header of each extended capability [PCIe-5.0 §7.6.3].
struct ExtendedCapabilityHeader : Register<ExtendedCapabilityHeader, u32> {
    static constexpr u64 offset = 0;
    static constexpr Field<31, 22, Attribute::read_only> next_dword{};
    static constexpr Field<19, 16, Attribute::read_only, u8> version{};
    static constexpr Field<15, 0, Attribute::read_only, u16> id{};
    static constexpr auto layout = fields(next_dword, version, id);
};

/// Vendor-specific capability [PCI-3.0 appendix H]: its total length in bytes; the remaining contents are
/// vendor-defined.
struct VendorLength : Register<VendorLength, u8> {
    static constexpr u64 offset = 2;
    static constexpr Field<7, 0, Attribute::read_only> length{};
    static constexpr auto layout = fields(length);
};

/// Power management control and status [PCI-PM-1.2 §3.2.4].
struct PowerControl : Register<PowerControl, u16> {
    static constexpr u64 offset = 4;
    enum class State : u8 { d0 = 0, d1 = 1, d2 = 2, d3_hot = 3 };
    static constexpr Bit<15, Attribute::write_1_to_clear> pme_status{};
    static constexpr Bit<8> pme_enable{};
    static constexpr Field<1, 0, Attribute::read_write, State> state{};
    static constexpr auto layout = fields(pme_status, pme_enable, state);
};

/// PCI Express capability [PCIe-5.0 §7.5.3].
struct ExpressDeviceCapabilities : Register<ExpressDeviceCapabilities, u32> {
    static constexpr u64 offset = 4;
    static constexpr Bit<28, Attribute::read_only> function_level_reset{};
    static constexpr auto layout = fields(function_level_reset);
};
struct ExpressDeviceControl : Register<ExpressDeviceControl, u16> {
    static constexpr u64 offset = 8;
    // After writing one: no access to the function for 100 ms [PCIe-5.0 §6.6.2]. Reads as zero.
    static constexpr Bit<15, Attribute::write_only> initiate_function_level_reset{};
    static constexpr auto layout = fields(initiate_function_level_reset);
};
struct ExpressCapabilities : Register<ExpressCapabilities, u16> {
    static constexpr u64 offset = 2;
    static constexpr Bit<8, Attribute::read_only> slot_implemented{};
    static constexpr auto layout = fields(slot_implemented);
};
/// A port's slot [PCIe-5.0 §7.5.3.9 to §7.5.3.11].
struct SlotCapabilities : Register<SlotCapabilities, u32> {
    static constexpr u64 offset = 0x14;
    static constexpr Field<31, 19, Attribute::read_only> slot_number{};
    static constexpr Bit<6, Attribute::read_only> hot_plug_capable{};
    static constexpr auto layout = fields(slot_number, hot_plug_capable);
};
struct SlotControl : Register<SlotControl, u16> {
    static constexpr u64 offset = 0x18;
    static constexpr Bit<5> hot_plug_interrupt_enable{};
    static constexpr Bit<3> presence_detect_changed_enable{};
    static constexpr Bit<0> attention_button_pressed_enable{};
    static constexpr auto layout =
        fields(hot_plug_interrupt_enable, presence_detect_changed_enable, attention_button_pressed_enable);
};
struct SlotStatus : Register<SlotStatus, u16> {
    static constexpr u64 offset = 0x1a;
    static constexpr Bit<6, Attribute::read_only> presence_detect{}; // 1: the slot is occupied
    static constexpr Bit<3, Attribute::write_1_to_clear> presence_detect_changed{};
    static constexpr Bit<0, Attribute::write_1_to_clear> attention_button_pressed{};
    static constexpr auto layout = fields(presence_detect, presence_detect_changed, attention_button_pressed);
};
struct ExpressDeviceStatus : Register<ExpressDeviceStatus, u16> {
    static constexpr u64 offset = 10;
    static constexpr Bit<5, Attribute::read_only> transactions_pending{};
    static constexpr auto layout = fields(transactions_pending);
};

// ---- MSI [PCI-3.0 §6.8.1] ----

struct MsiControl : Register<MsiControl, u16> {
    static constexpr u64 offset = 2;
    static constexpr Bit<8, Attribute::read_only> per_vector_masking{};
    static constexpr Bit<7, Attribute::read_only> address_64{};
    static constexpr Field<6, 4> multiple_message_enable{};                        // log2
    static constexpr Field<3, 1, Attribute::read_only> multiple_message_capable{}; // log2, at most 5
    static constexpr Bit<0> enable{};
    static constexpr auto layout =
        fields(per_vector_masking, address_64, multiple_message_enable, multiple_message_capable, enable);
};
// Offsets of the registers that follow; some depend on the control register.
inline constexpr u64 msi_address = 4;
inline constexpr u64 msi_address_high = 8; // with address_64
constexpr u64 msi_data(MsiControl control) { return control.get(MsiControl::address_64) ? 12 : 8; }
constexpr u64 msi_mask(MsiControl control) { return msi_data(control) + 4; } // with per_vector_masking

// ---- MSI-X [PCI-3.0 §6.8.2] ----

struct MsixControl : Register<MsixControl, u16> {
    static constexpr u64 offset = 2;
    static constexpr Bit<15> enable{};
    static constexpr Bit<14> function_mask{};
    static constexpr Field<10, 0, Attribute::read_only> last_entry{};
    static constexpr auto layout = fields(enable, function_mask, last_entry);
};
/// Location of the table: offset in a BAR, in units of 8 bytes.
struct MsixTable : Register<MsixTable, u32> {
    static constexpr u64 offset = 4;
    static constexpr Field<31, 3, Attribute::read_only> qword{};
    static constexpr Field<2, 0, Attribute::read_only, u8> bar{};
    static constexpr auto layout = fields(qword, bar);
};
/// Location of the pending bits, one per entry, in whole qwords.
struct MsixPending : Register<MsixPending, u32> {
    static constexpr u64 offset = 8;
    static constexpr Field<31, 3, Attribute::read_only> qword{};
    static constexpr Field<2, 0, Attribute::read_only, u8> bar{};
    static constexpr auto layout = fields(qword, bar);
};

// A table entry, 16 bytes.
inline constexpr u64 msix_entry_size = 16;
struct MsixAddress : Register<MsixAddress, u32> {
    static constexpr u64 offset = 0;
    static constexpr Field<31, 0> low{};
    static constexpr auto layout = fields(low);
};
struct MsixAddressHigh : Register<MsixAddressHigh, u32> {
    static constexpr u64 offset = 4;
    static constexpr Field<31, 0> high{};
    static constexpr auto layout = fields(high);
};
struct MsixData : Register<MsixData, u32> {
    static constexpr u64 offset = 8;
    static constexpr Field<31, 0> data{};
    static constexpr auto layout = fields(data);
};
struct MsixVectorControl : Register<MsixVectorControl, u32> {
    static constexpr u64 offset = 12;
    static constexpr Field<31, 1, Attribute::reserved_preserve> reserved{};
    static constexpr Bit<0> mask{};
    static constexpr auto layout = fields(reserved, mask);
};

} // namespace fl::drivers::pci
