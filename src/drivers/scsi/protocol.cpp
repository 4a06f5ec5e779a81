module drivers.scsi.protocol;
import core.std;
import core.result;
import core.text;

namespace fl::drivers::scsi {

std::string_view name(Opcode opcode) {
    switch (opcode) {
    case Opcode::test_unit_ready: return "TEST UNIT READY";
    case Opcode::inquiry: return "INQUIRY";
    case Opcode::mode_sense_6: return "MODE SENSE(6)";
    case Opcode::read_capacity_10: return "READ CAPACITY(10)";
    case Opcode::read_10: return "READ(10)";
    case Opcode::write_10: return "WRITE(10)";
    case Opcode::synchronize_cache_10: return "SYNCHRONIZE CACHE(10)";
    case Opcode::unmap: return "UNMAP";
    case Opcode::mode_sense_10: return "MODE SENSE(10)";
    case Opcode::read_16: return "READ(16)";
    case Opcode::write_16: return "WRITE(16)";
    case Opcode::synchronize_cache_16: return "SYNCHRONIZE CACHE(16)";
    case Opcode::write_same_16: return "WRITE SAME(16)";
    case Opcode::service_action_in_16: return "READ CAPACITY(16)";
    case Opcode::report_luns: return "REPORT LUNS";
    }
    return "unknown command";
}

namespace {

template <usize N>
FixedText<N> text(std::span<const u8> data) {
    FixedText<N> result;
    usize end = 0;
    while (end < data.size() && data[end] >= 0x20 && data[end] < 0x7f) {
        ++end;
    }
    while (end > 0 && data[end - 1] == ' ') {
        --end;
    }
    for (usize i = 0; i < end; ++i) {
        const char c = static_cast<char>(data[i]);
        result.write({&c, 1});
    }
    return result;
}

Result<Capacity> checked(Capacity capacity, u64 last) {
    if (capacity.block_bytes < 512 || capacity.block_bytes > 4096 || !std::has_single_bit(capacity.block_bytes)) {
        return Error{Code::not_supported,
                     "READ CAPACITY: the block size is none that this driver knows (512 to 4096, a power of two)", 512,
                     capacity.block_bytes};
    }
    // the size in bytes must fit into 64 bits
    if (const u64 most = (u64{1} << 63) / capacity.block_bytes; last >= most) {
        return Error{Code::protocol, "READ CAPACITY: an impossible number of blocks", most, last};
    }
    capacity.blocks = last + 1;
    return capacity;
}

} // namespace

Result<Inquiry> parse_inquiry(std::span<const u8> data) {
    if (data.size() < 5) {
        return Error{Code::protocol, "INQUIRY: expected at least 5 bytes", 5, data.size()};
    }
    Inquiry inquiry;
    inquiry.qualifier = static_cast<u8>(data[0] >> 5);
    inquiry.device_type = data[0] & 0x1f;
    inquiry.removable = (data[1] & 0x80) != 0;
    const usize length = std::min<usize>(data.size(), usize{data[4]} + 5);
    if (length >= inquiry_bytes) {
        inquiry.vendor = text<8>(data.subspan(8, 8));
        inquiry.product = text<16>(data.subspan(16, 16));
        inquiry.revision = text<4>(data.subspan(32, 4));
    }
    return inquiry;
}

Result<Capacity> parse_capacity_10(std::span<const u8> data) {
    if (data.size() < capacity_10_bytes) {
        return Error{Code::protocol, "READ CAPACITY(10): expected 8 bytes", capacity_10_bytes, data.size()};
    }
    Capacity capacity;
    const u64 last = get_be(data.subspan(0, 4));
    capacity.block_bytes = static_cast<u32>(get_be(data.subspan(4, 4)));
    capacity.beyond_32_bits = last == 0xffffffff;
    return checked(capacity, last);
}

Result<Capacity> parse_capacity_16(std::span<const u8> data) {
    if (data.size() < 12) {
        return Error{Code::protocol, "READ CAPACITY(16): expected at least 12 bytes", 12, data.size()};
    }
    Capacity capacity;
    const u64 last = get_be(data.subspan(0, 8));
    capacity.block_bytes = static_cast<u32>(get_be(data.subspan(8, 4)));
    if (data.size() >= 16) {
        capacity.physical_shift = data[13] & 0x0f;
        capacity.thin = (data[14] & 0x80) != 0;
    }
    return checked(capacity, last);
}

Result<ModeAnswer> parse_mode_6(std::span<const u8> data) {
    if (data.size() < 4) {
        return Error{Code::protocol, "MODE SENSE(6): expected a header of 4 bytes", 4, data.size()};
    }
    ModeAnswer answer;
    answer.write_protected = (data[2] & 0x80) != 0;
    answer.force_unit_access = (data[2] & 0x10) != 0;
    const usize end = std::min<usize>(data.size(), usize{data[0]} + 1);
    for (usize at = usize{4} + data[3]; at + 2 <= end;) {
        const usize length = usize{data[at + 1]} + 2;
        if ((data[at] & 0x3f) == caching_page && (data[at] & 0x40) == 0 && at + 3 <= end) {
            answer.write_cache = (data[at + 2] & 0x04) != 0;
            break;
        }
        at += length;
    }
    return answer;
}

std::span<const u8> page_body(std::span<const u8> data, u8 page) {
    if (data.size() < 4 || data[1] != page) {
        return {};
    }
    return data.subspan(4, std::min<usize>(data.size() - 4, get_be(data.subspan(2, 2))));
}

bool lists_page(std::span<const u8> data, u8 page) {
    const auto body = page_body(data, 0x00);
    return std::find(body.begin(), body.end(), page) != body.end();
}

Result<BlockLimits> parse_block_limits(std::span<const u8> data) {
    const auto body = page_body(data, 0xb0);
    if (body.size() < 8) {
        return Error{Code::protocol, "VPD page 0xb0: expected at least 12 bytes", 12, data.size()};
    }
    BlockLimits limits;
    limits.max_transfer_blocks = static_cast<u32>(get_be(body.subspan(4, 4)));
    if (body.size() >= 24) {
        limits.max_unmap_blocks = static_cast<u32>(get_be(body.subspan(16, 4)));
        limits.max_unmap_descriptors = static_cast<u32>(get_be(body.subspan(20, 4)));
    }
    if (body.size() >= 40) {
        limits.max_write_same_blocks = get_be(body.subspan(32, 8));
    }
    return limits;
}

Result<Provisioning> parse_provisioning(std::span<const u8> data) {
    const auto body = page_body(data, 0xb2);
    if (body.size() < 2) {
        return Error{Code::protocol, "VPD page 0xb2: expected at least 6 bytes", 6, data.size()};
    }
    return Provisioning{.unmap = (body[1] & 0x80) != 0, .write_same = (body[1] & 0x40) != 0};
}

std::optional<Sense> parse_sense(std::span<const u8> data) {
    if (data.size() < 3) {
        return std::nullopt;
    }
    Sense sense;
    switch (data[0] & 0x7f) {
    case 0x70:
    case 0x71: {
        sense.key = data[2] & 0x0f;
        const usize end = data.size() < 8 ? data.size() : std::min<usize>(data.size(), usize{data[7]} + 8);
        if ((data[0] & 0x80) != 0 && data.size() >= 7) {
            sense.information = get_be(data.subspan(3, 4));
        }
        if (end >= 13) {
            sense.asc = data[12];
        }
        if (end >= 14) {
            sense.ascq = data[13];
        }
        return sense;
    }
    case 0x72:
    case 0x73: {
        sense.key = data[1] & 0x0f;
        sense.asc = data[2];
        sense.ascq = data.size() > 3 ? data[3] : u8{0};
        const usize end = data.size() < 8 ? 0 : std::min<usize>(data.size(), usize{data[7]} + 8);
        for (usize at = 8; at + 2 <= end; at += usize{data[at + 1]} + 2) {
            if (data[at] == 0x00 && at + 12 <= end && (data[at + 2] & 0x80) != 0) { // information descriptor
                sense.information = get_be(data.subspan(at + 4, 8));
                break;
            }
        }
        return sense;
    }
    default: return std::nullopt;
    }
}

std::string_view sense_key_name(u8 key) {
    static constexpr std::array<std::string_view, 16> names{
        "NO SENSE",       "RECOVERED ERROR", "NOT READY",   "MEDIUM ERROR",    "HARDWARE ERROR", "ILLEGAL REQUEST",
        "UNIT ATTENTION", "DATA PROTECT",    "BLANK CHECK", "VENDOR SPECIFIC", "COPY ABORTED",   "ABORTED COMMAND",
        "RESERVED",       "VOLUME OVERFLOW", "MISCOMPARE",  "COMPLETED"};
    return names[key & 0x0f];
}

std::string_view sense_code_name(u8 asc, u8 ascq) {
    struct Entry {
        u16 code;
        std::string_view text;
    };
    static constexpr Entry entries[] = {
        {0x0000, "no additional information"},
        {0x0401, "becoming ready"},
        {0x0402, "initialising command required"},
        {0x0403, "manual intervention required"},
        {0x0404, "format in progress"},
        {0x0800, "communication failure"},
        {0x0c00, "write error"},
        {0x0c02, "write error, reallocation failed"},
        {0x0c03, "write error, reassignment recommended"},
        {0x1000, "block guard check failed"},
        {0x1100, "unrecovered read error"},
        {0x1104, "unrecovered read error, reallocation failed"},
        {0x1400, "recorded entity not found"},
        {0x1a00, "parameter list length error"},
        {0x2000, "invalid command operation code"},
        {0x2100, "LBA out of range"},
        {0x2400, "invalid field in CDB"},
        {0x2500, "logical unit not supported"},
        {0x2600, "invalid field in parameter list"},
        {0x2700, "write protected"},
        {0x2707, "space allocation failed write protect"},
        {0x2800, "medium may have changed"},
        {0x2900, "power on, reset or bus device reset"},
        {0x2901, "power on"},
        {0x2902, "bus reset"},
        {0x2903, "device reset"},
        {0x2a01, "mode parameters changed"},
        {0x2a09, "capacity data has changed"},
        {0x3a00, "medium not present"},
        {0x3f0e, "reported LUNs data has changed"},
        {0x4400, "internal target failure"},
        {0x4700, "parity error"},
        {0x4b00, "data phase error"},
        {0x5d00, "failure prediction threshold exceeded"},
    };
    const u16 code = static_cast<u16>(asc << 8 | ascq);
    for (const Entry& entry : entries) {
        if (entry.code == code) {
            return entry.text;
        }
    }
    return {};
}

FixedText<120> describe(const Sense& sense, std::optional<u64> lba) {
    FixedText<120> text;
    text.write(sense_key_name(sense.key));
    if (const std::string_view what = sense_code_name(sense.asc, sense.ascq); !what.empty()) {
        print(text, ", {}", what);
    }
    print(text, " ({:x}/{:02x}/{:02x})", sense.key, sense.asc, sense.ascq);
    if (sense.information) {
        print(text, " at LBA {}", *sense.information);
    } else if (lba) {
        print(text, " at LBA {}", *lba);
    }
    return text;
}

} // namespace fl::drivers::scsi
