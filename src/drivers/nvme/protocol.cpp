module drivers.nvme.protocol;
import core.std;
import core.result;
import core.text;

namespace fl::drivers::nvme {

namespace {

template <class T>
T load(std::span<const u8, identify_bytes> data, usize at) {
    T value;
    std::memcpy(&value, data.data() + at, sizeof value);
    return value;
}

// Space-padded ASCII; what is not printable becomes '?'.
template <usize N>
void text_of(FixedText<N>& into, std::span<const u8> bytes) {
    usize end = bytes.size();
    while (end != 0 && (bytes[end - 1] == ' ' || bytes[end - 1] == 0)) {
        --end;
    }
    for (usize i = 0; i < end; ++i) {
        const char c = bytes[i] >= ' ' && bytes[i] < 0x7f ? static_cast<char>(bytes[i]) : '?';
        into.write(std::string_view(&c, 1));
    }
}

constexpr bool holds(u8 sizes, u8 wanted) { return (sizes & 0xf) <= wanted && wanted <= (sizes >> 4); }

} // namespace

ControllerInfo parse_controller(std::span<const u8, identify_bytes> data) {
    ControllerInfo info;
    text_of(info.serial, data.subspan(4, 20));
    text_of(info.model, data.subspan(24, 40));
    text_of(info.firmware, data.subspan(64, 8));
    info.mdts = data[77];
    info.retry_delays = {load<u16>(data, 128), load<u16>(data, 130), load<u16>(data, 132)};
    info.doorbell_buffers = (load<u16>(data, 256) & 1 << 8) != 0;
    info.queue_entries = holds(data[512], 6) && holds(data[513], 4);
    info.namespaces = load<u32>(data, 516);
    info.dataset_management = (load<u16>(data, 520) & 1 << 2) != 0;
    info.write_zeroes = (load<u16>(data, 520) & 1 << 3) != 0;
    info.write_cache = (data[525] & 1) != 0;
    return info;
}

CommandSetLimits parse_command_set(std::span<const u8, identify_bytes> data) {
    return {data[1], load<u32>(data, 4), load<u64>(data, 8)};
}

Result<NamespaceInfo> parse_namespace(std::span<const u8, identify_bytes> data) {
    NamespaceInfo info;
    info.blocks = load<u64>(data, 0);
    const u64 capacity = load<u64>(data, 8); // NCAP; 0: inactive
    if (info.blocks == 0 || capacity == 0) {
        return NamespaceInfo{};
    }
    if (capacity > info.blocks) {
        return Error{Code::protocol, "the namespace's capacity (NCAP) exceeds its size (NSZE)", info.blocks, capacity};
    }
    // FLBAS: bits 6:5 count only with more than 16 formats.
    const u8 format = static_cast<u8>((data[26] & 0xf) | (data[25] > 15 ? data[26] >> 1 & 0x30 : 0));
    if (data[25] > 63) {
        return Error{Code::protocol, "the namespace lists more than 64 LBA formats (NLBAF)", 63, data[25]};
    }
    if (format > data[25]) {
        return Error{Code::protocol, "the namespace has an LBA format (FLBAS) that it does not list (NLBAF)", data[25],
                     format};
    }
    const u32 lbaf = load<u32>(data, 128 + 4u * format);
    if ((lbaf & 0xffff) != 0) {
        return Error{Code::not_supported, "the namespace has metadata (bytes per block): format it without", 0,
                     lbaf & 0xffff};
    }
    if ((data[29] & 7) != 0) {
        return Error{Code::not_supported, "the namespace has protection information (type): format it without", 0,
                     data[29] & 7u};
    }
    const u32 shift = lbaf >> 16 & 0xff;
    if (shift != 9 && shift != 12) {
        return Error{Code::not_supported, "the namespace has blocks of neither 512 nor 4096 bytes (log2 of the size)",
                     9, shift};
    }
    info.block_size = 1u << shift;
    if (info.blocks > (~u64{0} >> shift)) {
        return Error{Code::protocol, "the namespace has more blocks than 2^64 bytes hold", ~u64{0} >> shift,
                     info.blocks};
    }
    info.write_protected = (data[99] & 1) != 0;
    std::ranges::copy(data.subspan<104, 16>(), info.identity.nguid.begin());
    std::ranges::copy(data.subspan<120, 8>(), info.identity.eui64.begin());
    return info;
}

u8 parse_descriptors(std::span<const u8, identify_bytes> data, NamespaceIdentity& identity) {
    constexpr usize header = 4; // NIDT, NIDL, reserved
    u8 command_set = 0;
    for (usize at = 0; at + header < data.size();) {
        const u8 type = data[at];
        const usize bytes = data[at + 1];
        at += header;
        if (bytes == 0 || bytes > data.size() - at || (type == 4 && bytes != 1)) {
            return command_set;
        }
        if (type == 4) {
            command_set = data[at];
        }
        const std::span<u8> into = type == 1   ? std::span<u8>(identity.eui64)
                                   : type == 2 ? std::span<u8>(identity.nguid)
                                   : type == 3 ? std::span<u8>(identity.uuid)
                                               : std::span<u8>();
        if (!into.empty()) {
            if (into.size() != bytes) {
                return command_set;
            }
            std::ranges::copy(data.subspan(at, bytes), into.begin());
        }
        at += bytes;
    }
    return command_set;
}

FixedText<128> text_of(const NamespaceIdentity& identity) {
    FixedText<128> text;
    const auto add = [&](std::string_view name, std::span<const u8> bytes) {
        if (std::ranges::all_of(bytes, [](u8 byte) { return byte == 0; })) {
            return;
        }
        print(text, "{}{} ", text.empty() ? "" : ", ", name);
        for (const u8 byte : bytes) {
            print(text, "{:02x}", byte);
        }
    };
    add("EUI64", identity.eui64);
    add("NGUID", identity.nguid);
    add("UUID", identity.uuid);
    return text.empty() ? FixedText<128>("no identifier") : text;
}

Result<u32> next_namespace(std::span<const u8, identify_bytes> list, u32 index, u32 after) {
    const u32 id = load<u32>(list, 4u * index);
    if (id != 0 && id <= after) {
        return Error{Code::protocol, "the list of active namespaces does not ascend", u64{after} + 1, id};
    }
    return id;
}

} // namespace fl::drivers::nvme
