module vmm.acpi;
import core.std;
import core.result;
import vmm.memory;
import vmm.board;

namespace fl::vmm {
namespace {

constexpr usize header_size = 36;
constexpr usize fadt_size = 244; // revision 4, which all systems can read
constexpr usize facs_size = 64;
constexpr usize xsdt_entries = 2;

/// A table under construction: little-endian values at the specification's offsets.
class Table {
  public:
    explicit Table(std::span<std::byte> bytes) : bytes_(bytes) {}

    template <class T>
    void put(usize offset, T value) {
        std::memcpy(bytes_.data() + offset, &value, sizeof(T));
    }
    void text(usize offset, std::string_view value) { std::memcpy(bytes_.data() + offset, value.data(), value.size()); }
    /// A generic address in I/O space [§5.2.3.2].
    void io_address(usize offset, u8 bits, u8 access, u16 port) {
        put<u8>(offset, 1);
        put<u8>(offset + 1, bits);
        put<u8>(offset + 2, 0);
        put<u8>(offset + 3, access);
        put<u64>(offset + 4, port);
    }
    /// The header of every table [§5.2.6], checksum last.
    void header(std::string_view signature, u8 revision) {
        text(0, signature);
        put<u32>(4, static_cast<u32>(bytes_.size()));
        put<u8>(8, revision);
        text(10, "FLIGHT");
        text(16, "TESTHOST");
        put<u32>(24, 1);
        text(28, "FLTH");
        put<u32>(32, 1);
        checksum(9, bytes_.size());
    }
    /// Makes the first `length` bytes sum to zero.
    void checksum(usize offset, usize length) {
        u8 sum = 0;
        bytes_[offset] = std::byte{0};
        for (const std::byte byte : bytes_.first(length)) {
            sum = static_cast<u8>(sum + std::to_integer<u8>(byte));
        }
        bytes_[offset] = static_cast<std::byte>(-sum);
    }

  private:
    std::span<std::byte> bytes_;
};

void write_fadt(Table table, u64 facs, u64 dsdt) {
    table.put<u32>(36, static_cast<u32>(facs));
    table.put<u32>(40, static_cast<u32>(dsdt));
    table.put<u8>(45, 0); // preferred profile: unspecified
    table.put<u16>(46, acpi_interrupt);
    table.put<u32>(56, pm1_event);
    table.put<u32>(64, pm1_control);
    table.put<u32>(76, pm_timer);
    table.put<u8>(88, 4); // lengths: event block, control block, timer
    table.put<u8>(89, 2);
    table.put<u8>(91, 4);
    table.put<u16>(96, 0x0fff); // C2 and C3 latencies: neither exists
    table.put<u16>(98, 0x0fff);
    table.put<u8>(108, 0x32);   // century, in the clock's memory
    table.put<u16>(109, 1 | 4); // legacy devices on ISA, no VGA; no 8042 to probe
    // WBINVD works; C1 on every processor; no power button, no sleep button, no fixed clock; 32-bit timer; reset
    // register.
    table.put<u32>(112, 1u << 0 | 1u << 2 | 1u << 4 | 1u << 5 | 1u << 6 | 1u << 8 | 1u << 10);
    table.io_address(116, 8, 1, reset_control);
    table.put<u8>(128, 0x06);
    table.put<u64>(132, facs);
    table.put<u64>(140, dsdt);
    table.io_address(148, 32, 2, pm1_event);
    table.io_address(172, 16, 2, pm1_control);
    table.io_address(208, 32, 3, pm_timer);
    table.header("FACP", 4);
}

void write_madt(Table table, u32 processors) {
    table.put<u32>(36, local_apic_address);
    table.put<u32>(40, 1); // an 8259 pair is present
    usize at = 44;
    for (u32 i = 0; i < processors; ++i) {
        table.put<u8>(at, 0); // processor local APIC [§5.2.12.2]
        table.put<u8>(at + 1, 8);
        table.put<u8>(at + 2, static_cast<u8>(i));
        table.put<u8>(at + 3, static_cast<u8>(i));
        table.put<u32>(at + 4, 1);
        at += 8;
    }
    table.put<u8>(at, 1); // I/O APIC [§5.2.12.3]
    table.put<u8>(at + 1, 12);
    table.put<u8>(at + 2, static_cast<u8>(io_apic_id));
    table.put<u32>(at + 4, io_apic_address);
    at += 12;
    const auto override_of = [&](u8 irq, u32 gsi, u16 flags) { // [§5.2.12.5]
        table.put<u8>(at, 2);
        table.put<u8>(at + 1, 10);
        table.put<u8>(at + 3, irq);
        table.put<u32>(at + 4, gsi);
        table.put<u16>(at + 8, flags);
        at += 10;
    };
    override_of(0, 2, 0);
    override_of(acpi_interrupt, acpi_interrupt, 0x000d); // active high, level
    table.put<u8>(at, 4);                                // NMI on LINT1 of all processors [§5.2.12.7]
    table.put<u8>(at + 1, 6);
    table.put<u8>(at + 2, 0xff);
    table.put<u8>(at + 5, 1);
    table.header("APIC", 3);
}

} // namespace

Result<u64> write_acpi(const GuestMemory& memory, std::span<const std::byte> dsdt, u32 processors) {
    if (processors == 0 || processors > 64) {
        return Error{Code::bad_argument, "1 to 64 processors were expected", 64, processors};
    }
    u32 length = 0;
    if (dsdt.size() < header_size || std::memcmp(dsdt.data(), "DSDT", 4) != 0) {
        return Error{Code::bad_argument, "a compiled DSDT was expected"};
    }
    std::memcpy(&length, dsdt.data() + 4, sizeof(length));
    const u64 rsdp = acpi_base;
    const u64 xsdt = rsdp + 64;
    const u64 fadt = xsdt + 64;
    const u64 facs = fadt + 256;
    const u64 madt = facs + facs_size;
    const u64 madt_size = 44 + 8 * processors + 12 + 2 * 10 + 6;
    const u64 code = (madt + madt_size + 15) & ~u64{15};
    if (length != dsdt.size() || dsdt.size() > acpi_end - code) {
        return Error{Code::bad_argument, "the DSDT's length field does not match, or it is too long", dsdt.size(),
                     length};
    }
    const auto place = [&](u64 address, u64 size) { return memory.at(address, size); };
    if (place(acpi_base, acpi_end - acpi_base).empty()) {
        return Error{Code::bad_argument, "the guest's memory ends before the ACPI tables"};
    }
    memory.write(code, dsdt);
    write_madt(Table{place(madt, madt_size)}, processors);
    Table firmware{place(facs, facs_size)}; // no checksum, no header [§5.2.10]
    firmware.text(0, "FACS");
    firmware.put<u32>(4, facs_size);
    firmware.put<u8>(32, 2);
    write_fadt(Table{place(fadt, fadt_size)}, facs, code);
    Table list{place(xsdt, header_size + 8 * xsdt_entries)};
    list.put<u64>(header_size, fadt);
    list.put<u64>(header_size + 8, madt);
    list.header("XSDT", 1);
    Table root{place(rsdp, 36)}; // [§5.2.5.3]
    root.text(0, "RSD PTR ");
    root.text(9, "FLIGHT");
    root.put<u8>(15, 2);
    root.put<u32>(20, 36);
    root.put<u64>(24, xsdt);
    root.checksum(8, 20);
    root.checksum(32, 36);
    return rsdp;
}

} // namespace fl::vmm
