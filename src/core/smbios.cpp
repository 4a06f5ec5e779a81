module core.smbios;
import core.std;
import core.result;
import core.text;
import core.physical;

namespace fl {

namespace {

constexpr usize max_table = 32 * 1024; // the two structures of interest are among the first, in practice
constexpr usize max_structures = 1024;

constexpr u8 byte_at(std::span<const std::byte> bytes, usize at) { return std::to_integer<u8>(bytes[at]); }
constexpr u64 number_at(std::span<const std::byte> bytes, usize at, usize size) {
    u64 value = 0;
    for (usize i = size; i-- > 0;) {
        value = value << 8 | byte_at(bytes, at + i);
    }
    return value;
}

bool sums_to_zero(std::span<const std::byte> bytes) {
    u8 sum = 0;
    for (std::byte b : bytes) {
        sum = static_cast<u8>(sum + std::to_integer<u8>(b));
    }
    return sum == 0;
}

bool starts_with(std::span<const std::byte> bytes, std::string_view text) {
    return bytes.size() >= text.size() && std::equal(text.begin(), text.end(), bytes.begin(), [](char c, std::byte b) {
               return static_cast<u8>(c) == std::to_integer<u8>(b);
           });
}

// String `number` (from 1; 0: none) of the string set that starts at `strings` [smbios §6.1.3].
FixedText<64> string_of(std::span<const std::byte> strings, u8 number) {
    FixedText<64> text;
    if (number == 0) {
        return text;
    }
    u8 at_string = 1;
    for (std::byte b : strings) {
        const u8 c = std::to_integer<u8>(b);
        if (c == 0) {
            if (at_string == number) {
                break;
            }
            ++at_string;
        } else if (at_string == number) {
            const char shown = c >= 0x20 && c <= 0x7e ? static_cast<char>(c) : '?';
            text.write({&shown, 1});
        }
    }
    while (!text.empty() && text.view().back() == ' ') {
        text = FixedText<64>(text.view().substr(0, text.size() - 1));
    }
    return text;
}

struct EntryPoint {
    u64 table = 0;
    usize size = 0;
    u8 major = 0;
    u8 minor = 0;
};

// Nothing: not an entry point. An error: the anchor of an entry point, but invalid contents.
std::optional<Result<EntryPoint>> parse_entry(std::span<const std::byte> bytes) {
    const bool v3 = starts_with(bytes, "_SM3_");
    if (!v3 && !starts_with(bytes, "_SM_")) {
        return std::nullopt;
    }
    const usize minimum = v3 ? 0x18 : 0x1f;
    const u8 length = byte_at(bytes, v3 ? 6 : 5);
    // Version 2.1 was implemented with length 0x1e by mistake; [smbios §5.2.1] requires readers to treat it as 0x1f.
    const usize checked = !v3 && length == 0x1e ? usize{0x1f} : usize{length};
    if (checked < minimum || checked > bytes.size()) {
        return Result<EntryPoint>(Error{
            Code::protocol, "SMBIOS entry point of an invalid length; its strings are not used", minimum, length});
    }
    if (!sums_to_zero(bytes.first(checked))) {
        return Result<EntryPoint>(
            Error{Code::protocol, "SMBIOS entry point with a wrong checksum; its strings are not used"});
    }
    EntryPoint entry;
    if (v3) {
        entry.major = byte_at(bytes, 7);
        entry.minor = byte_at(bytes, 8);
        entry.size = number_at(bytes, 0x0c, 4);
        entry.table = number_at(bytes, 0x10, 8);
    } else {
        if (!starts_with(bytes.subspan(0x10), "_DMI_") || !sums_to_zero(bytes.subspan(0x10, 0x0f))) {
            return Result<EntryPoint>(
                Error{Code::protocol,
                      "SMBIOS intermediate anchor missing or with a wrong checksum; its strings are not used"});
        }
        entry.major = byte_at(bytes, 6);
        entry.minor = byte_at(bytes, 7);
        entry.size = number_at(bytes, 0x16, 2);
        entry.table = number_at(bytes, 0x18, 4);
    }
    return Result<EntryPoint>(entry);
}

constexpr usize entry_bytes = 0x20;

} // namespace

void parse_smbios_table(std::span<const std::byte> table, Smbios& into) {
    usize at = 0;
    for (usize n = 0; n < max_structures && table.size() - at >= 4; ++n) {
        const u8 type = byte_at(table, at);
        const usize length = byte_at(table, at + 1);
        if (length < 4 || length > table.size() - at) {
            return;
        }
        const auto formatted = table.subspan(at, length);
        // The string set ends with two NULs, even if it is empty [smbios §6.1.3].
        usize end = at + length;
        while (end + 1 < table.size() && !(byte_at(table, end) == 0 && byte_at(table, end + 1) == 0)) {
            ++end;
        }
        if (end + 1 >= table.size()) {
            return; // no end found: this structure is truncated
        }
        const auto strings = table.subspan(at + length, end - (at + length));
        auto text = [&](usize field) {
            return field < length ? string_of(strings, byte_at(formatted, field)) : FixedText<64>{};
        };
        if (type == 0) {
            into.bios_vendor = text(4);
            into.bios_version = text(5);
        } else if (type == 1) {
            into.manufacturer = text(4);
            into.product = text(5);
            into.version = text(6);
        } else if (type == 127) {
            return; // end of table [smbios §7.45]
        }
        at = end + 2;
    }
}

Result<Smbios> read_smbios(PhysicalReader& memory, u64 entry) {
    std::array<std::byte, entry_bytes> bytes;
    std::optional<Result<EntryPoint>> found;
    if (entry != 0) {
        if (!memory.read(entry, bytes)) {
            return Error{Code::not_found, "the SMBIOS entry point from the loader cannot be read"};
        }
        found = parse_entry(bytes);
        if (!found) {
            return Error{Code::protocol,
                         "the SMBIOS entry point from the loader begins neither with _SM_ nor with _SM3_"};
        }
    } else {
        // [smbios §5.2.1]: anywhere in the BIOS area, on a 16-byte boundary. A later valid one takes precedence over an
        // invalid one.
        for (u64 address = 0xf0000; address < 0xfffe0; address += 16) {
            if (!memory.read(address, bytes)) {
                continue;
            }
            if (auto here = parse_entry(bytes)) {
                found = here;
                if (*here) {
                    break;
                }
            }
        }
        if (!found) {
            return Error{Code::not_found, "no SMBIOS entry point in the BIOS area"};
        }
    }
    if (!*found) {
        return found->error();
    }
    const EntryPoint point = **found;
    Smbios result;
    result.major = point.major;
    result.minor = point.minor;
    // Read as a whole: a structure may be longer than any smaller window. Only early boot uses this buffer.
    static constinit std::array<std::byte, max_table> table{};
    const usize size = std::min(point.size, max_table);
    // Firmware may announce more than can be read (3.0 gives only a maximum): read what is readable, in pieces that get
    // smaller at the end.
    usize have = 0;
    for (usize piece = 256; have < size && piece > 0;) {
        const usize now = std::min(size - have, piece);
        if (memory.read(point.table + have, std::span(table).subspan(have, now))) {
            have += now;
        } else {
            piece = now / 2;
        }
    }
    if (have == 0) {
        return Error{Code::protocol, "the SMBIOS table cannot be read; its strings are not used"};
    }
    parse_smbios_table(std::span<const std::byte>(table).first(have), result);
    return result;
}

} // namespace fl
