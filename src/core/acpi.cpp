module core.acpi;
import core.std;
import core.result;
import core.physical;

namespace fl::acpi {

namespace {

constexpr u32 header_size = 36;
constexpr u32 max_table_bytes = 64 * 1024;
constexpr u32 max_dsdt_bytes = 4 * 1024 * 1024;
constexpr u32 max_tables = 128;

// A table in physical memory whose header and checksum have been verified.
struct Table {
    u64 address;
    u32 length;
    std::array<char, 4> signature;
    bool is(std::string_view name) const { return std::string_view(signature.data(), 4) == name; }
};

bool sums_to_zero(PhysicalReader& memory, u64 address, u32 length) {
    std::array<u8, 256> piece;
    u8 sum = 0;
    for (u32 done = 0; done < length;) {
        const auto part = std::span(piece).first(std::min<usize>(piece.size(), length - done));
        if (!memory.read(address + done, std::as_writable_bytes(part))) {
            return false;
        }
        for (const u8 byte : part) {
            sum = static_cast<u8>(sum + byte);
        }
        done += static_cast<u32>(part.size());
    }
    return sum == 0;
}

// `damage`: filled in if the result is nothing.
std::optional<Table> open_table(PhysicalReader& memory, u64 address, u32 max_bytes = max_table_bytes,
                                Damage* damage = nullptr) {
    struct Begin {
        std::array<char, 4> signature;
        u32 length;
    };
    const auto refuse = [&](Damage::Kind kind, const Begin& seen) {
        if (damage != nullptr) {
            *damage = {seen.signature, address, seen.length, kind};
        }
        return std::nullopt;
    };
    const auto begin = address != 0 ? memory.value<Begin>(address) : std::nullopt;
    if (!begin) {
        return refuse(Damage::Kind::unreadable, {});
    }
    if (begin->length < header_size || begin->length > max_bytes) {
        return refuse(Damage::Kind::length, *begin);
    }
    if (!sums_to_zero(memory, address, begin->length)) {
        return refuse(Damage::Kind::checksum, *begin);
    }
    return Table{address, begin->length, begin->signature};
}

// A field of a table; zero if the table ends before it (older revisions are shorter).
template <class T>
T field(PhysicalReader& memory, const Table& table, u32 offset) {
    if (offset > table.length || sizeof(T) > table.length - offset) {
        return T{};
    }
    return memory.value<T>(table.address + offset).value_or(T{});
}

Register register_at(PhysicalReader& memory, const Table& table, u32 offset) {
    const u8 space = field<u8>(memory, table, offset);
    const u64 address = field<u64>(memory, table, offset + 4);
    if (space > 1 || address == 0) {
        return {};
    }
    return {static_cast<Space>(space), address};
}

// A port: from the extended register block if present, else from the old 32-bit field.
u16 port_at(PhysicalReader& memory, const Table& table, u32 old_offset, u32 extended_offset) {
    const Register extended = register_at(memory, table, extended_offset);
    if (extended.address != 0 && extended.space == Space::io && extended.address <= 0xffff) {
        return static_cast<u16>(extended.address);
    }
    const u32 old = field<u32>(memory, table, old_offset);
    return old <= 0xffff ? static_cast<u16>(old) : u16{0};
}

Fadt read_fadt(PhysicalReader& memory, const Table& t) {
    Fadt f;
    f.dsdt = field<u64>(memory, t, 140);
    if (f.dsdt == 0) {
        f.dsdt = field<u32>(memory, t, 40);
    }
    f.sci = field<u16>(memory, t, 46);
    const u32 smi = field<u32>(memory, t, 48);
    f.smi_command = smi <= 0xffff ? static_cast<u16>(smi) : u16{0};
    f.acpi_enable = field<u8>(memory, t, 52);
    const u32 flags = field<u32>(memory, t, 112);
    f.hardware_reduced = (flags >> 20 & 1) != 0;
    if (!f.hardware_reduced) {
        f.pm1a_event = port_at(memory, t, 56, 148);
        f.pm1_event_bytes = field<u8>(memory, t, 88);
        f.gpe0 = port_at(memory, t, 80, 220);
        f.gpe0_bytes = field<u8>(memory, t, 92);
        f.pm1a_control = port_at(memory, t, 64, 172);
        f.pm1b_control = port_at(memory, t, 68, 184);
    }
    // Read regardless of the table's length, and on hardware-reduced machines too, where this field does not apply:
    // Cloud Hypervisor has a timer there and announces it in neither way. Calibration finds out whether it counts.
    f.pm_timer = port_at(memory, t, 76, 208);
    f.pm_timer_32 = (flags >> 8 & 1) != 0;
    if ((flags >> 10 & 1) != 0) {
        f.reset = register_at(memory, t, 116);
        f.reset_value = field<u8>(memory, t, 128);
    }
    f.sleep_control = register_at(memory, t, 244);
    return f;
}

Madt read_madt(PhysicalReader& memory, const Table& t) {
    Madt m;
    m.local_apic = field<u32>(memory, t, 36);
    m.has_8259 = (field<u32>(memory, t, 40) & 1) != 0;
    const auto add_processor = [&](u32 id, u32 flags) {
        // Bit 0: enabled. A processor may be listed by both kinds of entry [ACPI 6.5 §5.2.12.12].
        if ((flags & 1) == 0) {
            ++m.disabled_count;
        } else if (std::ranges::find(m.all_processors(), id) != m.all_processors().end()) {
            return;
        } else if (m.processor_count == Madt::max_processors) {
            ++m.processors_dropped;
        } else {
            m.processors[m.processor_count++] = id;
        }
    };
    for (u32 at = 44; at + 2 <= t.length;) {
        const u8 type = field<u8>(memory, t, at);
        const u8 length = field<u8>(memory, t, at + 1);
        if (length < 2 || length > t.length - at) {
            m.bytes_dropped = t.length - at; // nothing after a broken entry can be parsed
            break;
        }
        switch (type) {
        case 0: // local APIC
            if (length >= 8) {
                add_processor(field<u8>(memory, t, at + 3), field<u32>(memory, t, at + 4));
            }
            break;
        case 1:
            if (length >= 12 && m.io_apic_count == Madt::max_io_apics) {
                ++m.io_apics_dropped;
            } else if (length >= 12) {
                m.io_apics[m.io_apic_count++] = {field<u8>(memory, t, at + 2), field<u32>(memory, t, at + 4),
                                                 field<u32>(memory, t, at + 8)};
            }
            break;
        case 2:
            if (length >= 10 && field<u8>(memory, t, at + 3) < 16 && m.override_count == Madt::max_overrides) {
                ++m.overrides_dropped;
            } else if (length >= 10 && field<u8>(memory, t, at + 3) < 16) {
                const u16 flags = field<u16>(memory, t, at + 8);
                m.overrides[m.override_count++] = {field<u8>(memory, t, at + 3), field<u32>(memory, t, at + 4),
                                                   (flags >> 2 & 3) == 3, (flags & 3) == 3};
            }
            break;
        case 5: // local APIC address, 64 bits
            if (length >= 12) {
                m.local_apic = field<u64>(memory, t, at + 4);
            }
            break;
        case 9: // local x2APIC
            if (length >= 16) {
                add_processor(field<u32>(memory, t, at + 4), field<u32>(memory, t, at + 8));
            }
            break;
        default: break;
        }
        at += length;
    }
    return m;
}

struct [[gnu::packed]] Rsdp {
    std::array<char, 8> signature;
    u8 checksum;
    std::array<char, 6> oem;
    u8 revision;
    u32 rsdt;
    // From revision 2:
    u32 length;
    u64 xsdt;
};
static_assert(sizeof(Rsdp) == 32);
constexpr u32 rsdp_v1_size = 20;
constexpr std::string_view rsdp_signature = "RSD PTR ";

std::optional<u64> search(PhysicalReader& memory, u64 begin, u64 end) {
    std::array<char, 4096> page;
    for (u64 at = begin; at < end; at += page.size()) {
        const auto part = std::span(page).first(std::min<usize>(page.size(), end - at));
        if (!memory.read(at, std::as_writable_bytes(part))) {
            continue;
        }
        for (usize i = 0; i + 16 <= part.size(); i += 16) {
            if (std::memcmp(part.data() + i, rsdp_signature.data(), 8) == 0 &&
                sums_to_zero(memory, at + i, rsdp_v1_size)) {
                return at + i;
            }
        }
    }
    return std::nullopt;
}

std::optional<u64> search_bios(PhysicalReader& memory) {
    constexpr u64 ebda_segment = 0x40e;
    const u64 ebda = u64{memory.value<u16>(ebda_segment).value_or(0)} << 4;
    if (ebda >= 0x80000 && ebda < 0xa0000) {
        if (const auto found = search(memory, ebda, std::min<u64>(ebda + 1024, 0xa0000))) {
            return found;
        }
    }
    return search(memory, 0xe0000, 0x100000);
}

} // namespace

Result<Tables> read_tables(PhysicalReader& memory, u64 rsdp) {
    Tables result;
    if (rsdp == 0) {
        rsdp = search_bios(memory).value_or(0);
    }
    if (rsdp == 0) {
        return Error(Code::not_found, "ACPI: no RSDP from the loader and none in the BIOS area");
    }
    std::array<std::byte, sizeof(Rsdp)> bytes{};
    Rsdp root{};
    if (!memory.read(rsdp, std::span(bytes).first(rsdp_v1_size))) {
        return Error(Code::protocol, "ACPI: the RSDP cannot be read");
    }
    std::memcpy(&root, bytes.data(), rsdp_v1_size);
    if (std::memcmp(root.signature.data(), rsdp_signature.data(), 8) != 0 ||
        !sums_to_zero(memory, rsdp, rsdp_v1_size)) {
        return Error(Code::protocol, "ACPI: no RSDP at the address from the loader");
    }
    if (root.revision >= 2 && memory.read(rsdp, bytes)) {
        std::memcpy(&root, bytes.data(), sizeof(root));
        if (root.length < 36 || root.length > 4096 || !sums_to_zero(memory, rsdp, root.length)) {
            root.xsdt = 0; // the ACPI 1.0 part is still valid
        }
    }
    result.rsdp = rsdp;
    u32 entry_size = 8;
    std::optional<Table> list = root.revision >= 2 ? open_table(memory, root.xsdt) : std::nullopt;
    if (!list || !list->is("XSDT")) {
        entry_size = 4;
        list = open_table(memory, root.rsdt);
        if (!list || !list->is("RSDT")) {
            return Error(Code::protocol, "ACPI: neither XSDT nor RSDT is valid");
        }
    }
    const u32 listed = (list->length - header_size) / entry_size;
    result.tables = std::min(listed, max_tables);
    result.dropped = listed - result.tables;
    for (u32 i = 0; i < result.tables; ++i) {
        const u32 offset = header_size + i * entry_size;
        const u64 address = entry_size == 8 ? field<u64>(memory, *list, offset) : field<u32>(memory, *list, offset);
        // Only tables that are used are read completely.
        const auto signature = address != 0 ? memory.value<std::array<char, 4>>(address) : std::nullopt;
        const std::string_view name = signature ? std::string_view(signature->data(), 4) : std::string_view();
        if (name == "SSDT") {
            if (result.ssdt_count == Tables::max_ssdts) {
                ++result.ssdts_dropped;
            } else {
                result.ssdts[result.ssdt_count++] = address;
            }
        }
        const bool wanted = name == "APIC" || name == "FACP" || name == "MCFG";
        if (signature && !wanted) {
            continue;
        }
        Damage damage;
        const auto table = open_table(memory, address, max_table_bytes, &damage);
        if (!table) {
            if (result.damaged < Tables::max_damages) {
                result.damages[result.damaged] = damage;
            }
            ++result.damaged;
        } else if (table->is("MCFG") && result.mcfg == 0) {
            result.mcfg = address;
        } else if (table->is("APIC") && !result.madt) {
            result.madt = read_madt(memory, *table);
        } else if (table->is("FACP") && !result.fadt) {
            result.fadt = read_fadt(memory, *table);
        }
    }
    return result;
}

namespace {

// [PCI-FW 3.3 §4.1.2]: the header, 8 reserved bytes, then 16 bytes for each bus range.
constexpr u32 mcfg_entries = header_size + 8;
constexpr u32 mcfg_entry_size = 16;

// Scans AML without interpreting it: calls `at` for every '_' in the definition block, with the preceding byte and the
// `name_near` bytes that start there (zeros past the end). Windows overlap by that much. False: the table is damaged.
constexpr usize name_near = 128;
using NameNear = std::span<const u8, name_near>;

bool scan_aml(PhysicalReader& memory, u64 address, void (*at)(void* context, u8 before, NameNear bytes),
              void* context) {
    const auto table = open_table(memory, address, max_dsdt_bytes);
    if (!table) {
        return false;
    }
    std::array<u8, 1024> window;
    constexpr u32 step = window.size() - name_near - 1;
    for (u32 base = header_size - 1; base < table->length; base += step) {
        const u32 part = std::min<u32>(window.size(), table->length - base);
        window.fill(0);
        if (!memory.read(table->address + base, std::as_writable_bytes(std::span(window).first(part)))) {
            return false;
        }
        for (u32 i = 1; i < std::min(part, step + 1); ++i) {
            if (window[i] == '_') {
                at(context, window[i - 1], NameNear(window.data() + i, name_near));
            }
        }
    }
    return true;
}
bool scan_aml(PhysicalReader& memory, const Tables& tables, void (*at)(void* context, u8 before, NameNear bytes),
              void* context) {
    bool whole = tables.ssdts_dropped == 0;
    if (tables.fadt) {
        whole = scan_aml(memory, tables.fadt->dsdt, at, context) && whole;
    }
    for (const u64 address : tables.all_ssdts()) {
        whole = scan_aml(memory, address, at, context) && whole;
    }
    return whole;
}

bool begins(std::span<const u8> bytes, std::string_view with) {
    return std::memcmp(bytes.data(), with.data(), with.size()) == 0;
}

// An AML integer constant [ACPI 6.5 §20.2.3].
std::optional<u64> integer(std::span<const u8> at) {
    const auto bytes = [&](usize count) {
        u64 value = 0;
        for (usize i = count; i > 0; --i) {
            value = value << 8 | at[i];
        }
        return value;
    };
    switch (at[0]) {
    case 0x00: return 0; // ZeroOp
    case 0x01: return 1; // OneOp
    case 0x0a: return bytes(1);
    case 0x0b: return bytes(2);
    case 0x0c: return bytes(4);
    case 0x0e: return bytes(8);
    default: return std::nullopt;
    }
}

} // namespace

u32 ecam_count(PhysicalReader& memory, u64 mcfg) {
    const auto table = open_table(memory, mcfg);
    return table && table->length > mcfg_entries ? (table->length - mcfg_entries) / mcfg_entry_size : 0;
}

std::optional<Ecam> ecam(PhysicalReader& memory, u64 mcfg, u32 index) {
    const auto table = open_table(memory, mcfg);
    if (!table || index >= ecam_count(memory, mcfg)) {
        return std::nullopt;
    }
    const u32 at = mcfg_entries + index * mcfg_entry_size;
    const Ecam found{field<u64>(memory, *table, at), field<u16>(memory, *table, at + 8),
                     field<u8>(memory, *table, at + 10), field<u8>(memory, *table, at + 11)};
    if (found.base == 0 || found.base % 4096 != 0 || found.first_bus > found.last_bus) {
        return std::nullopt;
    }
    return found;
}

RootBridges find_root_bridges(PhysicalReader& memory, const Tables& tables) {
    RootBridges found;
    // The constant that a name is defined as, or that a method without arguments returns in its first statement [ACPI
    // 6.5 §20.2.5].
    static constexpr auto value_of = [](u8 before, NameNear at) -> std::optional<u64> {
        constexpr u8 name_op = 0x08;
        constexpr u8 return_op = 0xa4;
        // method flags 0: no arguments. In a name definition this byte would be ZeroOp, and a return could not follow
        const bool returns = at[4] == 0 && at[5] == return_op;
        return returns ? integer(at.subspan(6)) : before == name_op ? integer(at.subspan(4)) : std::nullopt;
    };
    const auto visit = [](void* context, u8 before, NameNear at) {
        auto& into = *static_cast<RootBridges*>(context);
        // "_HID", then EisaId ("PNP0A03") or ("PNP0A08") as DWordConst, or the same id as a string [ACPI 6.5 §20.2.3,
        // §6.1.5].
        if (begins(at, "_HID")) {
            const auto value = at.subspan(4);
            const bool number = begins(value, "\x0c\x41\xd0\x0a") && (value[4] == 3 || value[4] == 8);
            const bool text = begins(value, "\x0dPNP0A0") && (value[7] == '3' || value[7] == '8');
            into.bridges += number || text ? 1 : 0;
        } else if (begins(at, "_BBN")) {
            if (const auto bus = value_of(before, at); bus && *bus < 256) {
                ++into.numbered;
                into.buses[*bus / 64] |= u64{1} << *bus % 64;
            }
        } else if (begins(at, "_CBA") && into.cba == 0) {
            into.cba = value_of(before, at).value_or(0);
        }
    };
    found.incomplete = !scan_aml(memory, tables, visit, &found);
    return found;
}

u32 find_virtio_mmio(PhysicalReader& memory, const Tables& tables,
                     void (*found)(void* context, const VirtioMmioNode& node), void* context) {
    struct Search {
        void (*found)(void* context, const VirtioMmioNode& node);
        void* context;
        u32 without;
    } search{found, context, 0};
    const auto visit = [](void* self, u8, NameNear at) {
        if (!begins(at, "_HID\x0dLNRO0005")) {
            return;
        }
        auto& to = *static_cast<Search*>(self);
        // _UID, _STA, _CCA and _CRS are close: hosts with such nodes generate about 60 bytes.
        const auto word = [&](usize from) {
            return u32{at[from]} | u32{at[from + 1]} << 8 | u32{at[from + 2]} << 16 | u32{at[from + 3]} << 24;
        };
        VirtioMmioNode node;
        for (usize i = 13; i + 9 <= at.size() && !begins(at.subspan(i), "_HID"); ++i) {
            // Memory32Fixed: tag, length 9, read-write, base, length [ACPI 6.5 §6.4.3.4].
            if (node.size == 0 && i + 12 <= at.size() && at[i] == 0x86 && at[i + 1] == 9 && at[i + 2] == 0) {
                node.base = word(i + 4);
                node.size = word(i + 8);
                i += 11;
            } else if (node.size != 0 && at[i] == 0x89 && at[i + 1] == 6 && at[i + 2] == 0 && at[i + 4] == 1) {
                // Extended Interrupt: tag, length 6, flags, one interrupt [ACPI 6.5 §6.4.3.6].
                node.gsi = word(i + 5);
                break;
            }
        }
        if (node.size != 0) {
            to.found(to.context, node);
        } else {
            ++to.without;
        }
    };
    scan_aml(memory, tables, visit, &search);
    return search.without;
}

namespace {

// Scans one definition block. `damaged` is set if it cannot be read completely.
std::optional<SleepType> find_s5(PhysicalReader& memory, u64 address, std::string_view signature, bool& damaged) {
    const auto table = open_table(memory, address, max_dsdt_bytes);
    if (!table || !table->is(signature)) {
        damaged = true;
        return std::nullopt;
    }
    // NameOp "_S5_" PackageOp PkgLength NumElements, then the elements [ACPI 6.5 §20.2]. Windows overlap by the length
    // of a match.
    constexpr usize longest = 24;
    std::array<u8, 1024> window;
    for (u32 base = header_size; base < table->length; base += static_cast<u32>(window.size() - longest)) {
        const auto part = std::span(window).first(std::min<usize>(window.size(), table->length - base));
        if (!memory.read(table->address + base, std::as_writable_bytes(part))) {
            damaged = true;
            break;
        }
        for (usize i = 1; i + 8 < part.size(); ++i) {
            if (part[i] != '_' || std::memcmp(part.data() + i, "_S5_", 4) != 0 || part[i + 4] != 0x12) {
                continue;
            }
            if (part[i - 1] != 0x08 && !(part[i - 1] == '\\' && i > 1 && part[i - 2] == 0x08)) {
                continue;
            }
            usize at = i + 5;
            at += 1 + (part[at] >> 6); // PkgLength: bits 7:6 of its first byte are the number of further bytes
            ++at;                      // NumElements
            std::array<u8, 2> values{};
            bool good = true;
            for (u8& value : values) {
                if (at >= part.size()) {
                    good = false;
                    break;
                }
                switch (part[at]) {
                case 0x00: // ZeroOp
                case 0x01: // OneOp
                    value = part[at++];
                    break;
                case 0x0a: // BytePrefix
                    good = at + 1 < part.size();
                    value = good ? part[at + 1] : u8{0};
                    at += 2;
                    break;
                default: good = false;
                }
            }
            if (good && values[0] < 8 && values[1] < 8) {
                return SleepType{values[0], values[1]};
            }
        }
        if (part.size() < window.size()) {
            break;
        }
    }
    return std::nullopt;
}

} // namespace

Result<SleepType> find_s5(PhysicalReader& memory, const Tables& tables) {
    bool damaged = tables.ssdts_dropped != 0;
    if (const auto found = find_s5(memory, tables.fadt ? tables.fadt->dsdt : 0, "DSDT", damaged)) {
        return *found;
    }
    for (const u64 ssdt : tables.all_ssdts()) {
        if (const auto found = find_s5(memory, ssdt, "SSDT", damaged)) {
            return *found;
        }
    }
    return Error(Code::not_found, damaged ? "ACPI: no \\_S5, and a DSDT or SSDT is missing or damaged"
                                          : "ACPI: neither the DSDT nor an SSDT has an \\_S5");
}

namespace {

/// Calls `decode` with the bytes of the DSDT that follow each occurrence of `id`, at most `reach`, until it returns a
/// port.
std::optional<u16> find_port(PhysicalReader& memory, u64 dsdt, std::string_view id,
                             std::optional<u16> (*decode)(std::span<const u8> after)) {
    const auto table = open_table(memory, dsdt, max_dsdt_bytes);
    if (!table || !table->is("DSDT")) {
        return std::nullopt;
    }
    constexpr u32 reach = 256;
    std::array<u8, 2048> window;
    for (u32 base = header_size; base < table->length; base += static_cast<u32>(window.size() - reach)) {
        const auto part = std::span(window).first(std::min<usize>(window.size(), table->length - base));
        if (!memory.read(table->address + base, std::as_writable_bytes(part))) {
            break;
        }
        const auto first = static_cast<u8>(id[0]);
        for (usize i = 0; i + id.size() < part.size(); ++i) {
            if (part[i] != first || std::memcmp(part.data() + i, id.data(), id.size()) != 0) {
                continue;
            }
            const std::span<const u8> after = part.subspan(i + id.size());
            if (const auto port = decode(after.first(std::min<usize>(after.size(), reach - id.size())))) {
                return port;
            }
        }
        if (part.size() < window.size()) {
            break;
        }
    }
    return std::nullopt;
}

} // namespace

std::optional<u16> find_pvpanic(PhysicalReader& memory, u64 dsdt) {
    return find_port(memory, dsdt, "QEMU0001", [](std::span<const u8> after) -> std::optional<u16> {
        // I/O port descriptor, 16-bit decoding, one port [ACPI 6.5 §6.4.2.5].
        for (usize at = 0; at + 8 <= after.size(); ++at) {
            const u32 lowest = after[at + 2] | after[at + 3] << 8;
            if (after[at] == 0x47 && after[at + 1] == 1 && lowest == u32(after[at + 4] | after[at + 5] << 8) &&
                lowest != 0 && after[at + 7] == 1) {
                return static_cast<u16>(lowest);
            }
        }
        return std::nullopt;
    });
}

std::optional<u16> find_pci_hotplug(PhysicalReader& memory, u64 dsdt) {
    // DefOpRegion: name, space (1: I/O ports), offset, length [ACPI 6.5 §20.2.5.2].
    return find_port(memory, dsdt, "\x5b\x80PCST\x01", [](std::span<const u8> after) -> std::optional<u16> {
        if (after.size() < 9) {
            return std::nullopt;
        }
        const std::optional<u64> port = integer(after);
        return port && *port != 0 && *port <= 0xffe0 ? std::optional(static_cast<u16>(*port)) : std::nullopt;
    });
}

} // namespace fl::acpi
