module host.scsi;
import host.std;

namespace fl::host {
namespace {

constexpr u8 key_medium_error = 3;
constexpr u8 key_illegal_request = 5;
constexpr u8 key_unit_attention = 6;
constexpr u8 key_data_protect = 7;

ScsiResult check(u8 key, u8 asc, u8 ascq, std::optional<u32> information = {}) {
    return {ScsiStatus::check_condition, 0, Sense{key, asc, ascq, information}, false};
}
ScsiResult invalid_opcode() { return check(key_illegal_request, 0x20, 0x00); }
ScsiResult invalid_field() { return check(key_illegal_request, 0x24, 0x00); }
ScsiResult out_of_range() { return check(key_illegal_request, 0x21, 0x00); }

u64 big_endian(std::span<const u8> bytes) {
    u64 value = 0;
    for (const u8 byte : bytes) {
        value = value << 8 | byte;
    }
    return value;
}
void put_big_endian(std::span<u8> bytes, u64 value) {
    for (usize i = bytes.size(); i-- > 0; value >>= 8) {
        bytes[i] = static_cast<u8>(value);
    }
}
void put_text(std::span<u8> bytes, std::string_view text) {
    for (usize i = 0; i < bytes.size(); ++i) {
        bytes[i] = static_cast<u8>(i < text.size() ? text[i] : ' ');
    }
}
/// Data returned by a command: limited to the requested length and the available room.
ScsiResult answer(std::span<const u8> bytes, usize allocation, DataBuffer& data) {
    ScsiResult result;
    result.transferred = data.put(std::as_bytes(bytes.first(std::min(bytes.size(), allocation))));
    return result;
}
constexpr std::string_view vendor = "FIRSTLGT";
constexpr std::string_view product = "TEST DISK";

std::array<u8, 36> standard_inquiry(u8 peripheral) {
    std::array<u8, 36> bytes{peripheral, 0, 6 /* SPC-4 */, 0x12 /* HISUP, format 2 */, 31, 0, 0, 0x02 /* CMDQUE */};
    put_text(std::span(bytes).subspan(8, 8), vendor);
    put_text(std::span(bytes).subspan(16, 16), product);
    put_text(std::span(bytes).subspan(32, 4), "1.0");
    return bytes;
}

} // namespace

void DataBuffer::truncate(usize bytes) {
    while (bytes_ > bytes) {
        auto& last = pieces_.back();
        const usize less = std::min(bytes_ - bytes, last.size());
        last = last.first(last.size() - less);
        bytes_ -= less;
        if (last.empty()) {
            pieces_.pop_back();
        }
    }
}

usize DataBuffer::put(std::span<const std::byte> bytes) {
    usize done = 0;
    for (const auto& piece : pieces_) {
        const usize now = std::min(piece.size(), bytes.size() - done);
        std::memcpy(piece.data(), bytes.data() + done, now);
        done += now;
    }
    return done;
}

usize DataBuffer::get(std::span<std::byte> into) const {
    usize done = 0;
    for (const auto& piece : pieces_) {
        const usize now = std::min(piece.size(), into.size() - done);
        std::memcpy(into.data() + done, piece.data(), now);
        done += now;
    }
    return done;
}

std::array<u8, 18> Sense::bytes() const {
    std::array<u8, 18> result{};
    result[0] = static_cast<u8>(information ? 0xf0 : 0x70); // current error, fixed format; bit 7: information is valid
    result[2] = key;
    put_big_endian(std::span(result).subspan(3, 4), information.value_or(0));
    result[7] = 10;
    result[12] = asc;
    result[13] = ascq;
    return result;
}

ScsiResult absent_inquiry(std::span<const u8, 16> cdb, DataBuffer& data) {
    if ((cdb[1] & 1) != 0 || cdb[2] != 0) {
        return invalid_field();
    }
    return answer(standard_inquiry(0x7f), big_endian(cdb.subspan(3, 2)), data); // qualifier 3, type 0x1f
}

ScsiResult report_luns(std::span<const u8> luns, DataBuffer& data) {
    std::vector<u8> bytes(8 + luns.size() * 8);
    put_big_endian(std::span(bytes).first(4), luns.size() * 8);
    for (usize i = 0; i < luns.size(); ++i) {
        bytes[8 + i * 8 + 1] = luns[i];
    }
    return answer(bytes, data.size(), data);
}

ScsiResult ScsiDisk::execute(std::span<const u8, 16> cdb, DataBuffer& data, Transfer* later) {
    const u8 opcode = cdb[0];
    ++counters_.opcodes[opcode];
    if (opcode == opcode_inquiry) {
        ++counters_.others;
        return inquiry(cdb, data);
    }
    if (opcode != 0x03) {
        if (attention_) {
            const Sense sense = *std::exchange(attention_, std::nullopt);
            return {ScsiStatus::check_condition, 0, sense, false};
        }
        if (faults_.injects(Fault::unit_attention)) {
            return check(key_unit_attention, 0x29, 0x00);
        }
    }
    switch (opcode) {
    case 0x08:
    case 0x0a: // READ(6), WRITE(6): 0 blocks mean 256
        return read_write(opcode == 0x0a, big_endian(cdb.subspan(1, 3)) & 0x1fffff, cdb[4] == 0 ? 256 : cdb[4], false,
                          data, later);
    case 0x28:
    case 0x2a: // READ(10), WRITE(10)
        return read_write(opcode == 0x2a, big_endian(cdb.subspan(2, 4)), big_endian(cdb.subspan(7, 2)),
                          (cdb[1] & 0x08) != 0, data, later);
    case 0x88:
    case 0x8a: // READ(16), WRITE(16)
        return read_write(opcode == 0x8a, big_endian(cdb.subspan(2, 8)), big_endian(cdb.subspan(10, 4)),
                          (cdb[1] & 0x08) != 0, data, later);
    case 0x35: // SYNCHRONIZE CACHE(10), (16): any range is all of it
        return inside(big_endian(cdb.subspan(2, 4)), big_endian(cdb.subspan(7, 2))) ? flush(later) : out_of_range();
    case 0x91:
        return inside(big_endian(cdb.subspan(2, 8)), big_endian(cdb.subspan(10, 4))) ? flush(later) : out_of_range();
    case 0x42: return unmap(data);
    default: ++counters_.others;
    }
    switch (opcode) {
    case 0x00:            // TEST UNIT READY
    case 0x1b: return {}; // START STOP UNIT: no effect
    case 0x03: {          // REQUEST SENSE
        const auto sense = std::exchange(attention_, std::nullopt).value_or(Sense{}).bytes();
        return answer(sense, cdb[4], data);
    }
    case 0x1a: return mode_sense(cdb, data, false);
    case 0x5a: return mode_sense(cdb, data, true);
    case 0x25: return read_capacity(false, data, 8);
    case 0x2f: // VERIFY(10), (16) without data: every block is readable
        return (cdb[1] & 0x06) != 0                                                   ? invalid_field()
               : inside(big_endian(cdb.subspan(2, 4)), big_endian(cdb.subspan(7, 2))) ? ScsiResult{}
                                                                                      : out_of_range();
    case 0x8f:
        return (cdb[1] & 0x06) != 0                                                    ? invalid_field()
               : inside(big_endian(cdb.subspan(2, 8)), big_endian(cdb.subspan(10, 4))) ? ScsiResult{}
                                                                                       : out_of_range();
    case 0x9e: // SERVICE ACTION IN(16): READ CAPACITY(16)
        return (cdb[1] & 0x1f) == 0x10 ? read_capacity(true, data, big_endian(cdb.subspan(10, 4))) : invalid_field();
    default: return invalid_opcode();
    }
}

ScsiResult ScsiDisk::inquiry(std::span<const u8, 16> cdb, DataBuffer& data) const {
    const usize allocation = big_endian(cdb.subspan(3, 2));
    const u8 page = cdb[2];
    if ((cdb[1] & 1) == 0) {
        return page != 0 ? invalid_field() : answer(standard_inquiry(0), allocation, data);
    }
    std::array<u8, 64> bytes{0, page};
    usize length = 64;
    switch (page) {
    case 0x00: { // supported pages
        constexpr std::array<u8, 6> pages{0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2};
        length = config_.thin ? 6 : 5;
        std::copy_n(pages.begin(), length, bytes.begin() + 4);
        length += 4;
        break;
    }
    case 0x80: { // unit serial number
        length = 4 + std::min<usize>(config_.serial.size(), 32);
        put_text(std::span(bytes).subspan(4, length - 4), config_.serial);
        break;
    }
    case 0x83: { // one designator: ASCII, T10 vendor id [SPC-4 §7.8.6.4]
        const usize serial = std::min<usize>(config_.serial.size(), 32);
        bytes[4] = 2;
        bytes[5] = 1;
        bytes[7] = static_cast<u8>(8 + serial);
        put_text(std::span(bytes).subspan(8, 8), vendor);
        put_text(std::span(bytes).subspan(16, serial), config_.serial);
        length = 16 + serial;
        break;
    }
    case 0xb0: // block limits [SBC-3 §6.5.3]
        put_big_endian(std::span(bytes).subspan(8, 4), maximum_transfer_ / config_.block_size);
        if (config_.thin) {
            put_big_endian(std::span(bytes).subspan(20, 4), 0xffffffff);
            put_big_endian(std::span(bytes).subspan(24, 4), 256);
            put_big_endian(std::span(bytes).subspan(28, 4), 1);
        }
        break;
    case 0xb1: put_big_endian(std::span(bytes).subspan(4, 2), 1); break; // block device characteristics: non-rotating
    case 0xb2:                                                           // logical block provisioning: UNMAP, thin
        if (!config_.thin) {
            return invalid_field();
        }
        bytes[5] = 0x80 | 0x04; // LBPU, LBPRZ
        bytes[6] = 2;
        length = 8;
        break;
    default: return invalid_field();
    }
    put_big_endian(std::span(bytes).subspan(2, 2), length - 4);
    return answer(std::span(bytes).first(length), allocation, data);
}

ScsiResult ScsiDisk::read_capacity(bool sixteen, DataBuffer& data, usize allocation) const {
    std::array<u8, 32> bytes{};
    const u64 last = blocks() - 1;
    if (!sixteen) {
        put_big_endian(std::span(bytes).first(4), std::min<u64>(last, 0xffffffff));
        put_big_endian(std::span(bytes).subspan(4, 4), config_.block_size);
        return answer(std::span(bytes).first(8), allocation, data);
    }
    put_big_endian(std::span(bytes).first(8), last);
    put_big_endian(std::span(bytes).subspan(8, 4), config_.block_size);
    bytes[14] = config_.thin ? 0xc0 : 0; // LBPME, LBPRZ
    return answer(bytes, allocation, data);
}

ScsiResult ScsiDisk::mode_sense(std::span<const u8, 16> cdb, DataBuffer& data, bool ten) const {
    const u8 control = cdb[2] >> 6; // current, changeable, default, saved
    const u8 page = cdb[2] & 0x3f;
    if (control == 3) {
        return check(key_illegal_request, 0x39, 0x00);
    }
    if ((page != 0x08 && page != 0x0a && page != 0x3f) || (cdb[3] != 0 && cdb[3] != 0xff)) {
        return invalid_field();
    }
    std::array<u8, 64> bytes{};
    usize at = ten ? 8 : 4;
    if (page != 0x0a) { // caching [SBC-3 §6.4.5]
        bytes[at] = 0x08;
        bytes[at + 1] = 18;
        bytes[at + 2] = config_.write_cache && control != 1 ? 0x04 : 0;
        at += 20;
    }
    if (page != 0x08) { // control [SPC-4 §7.5.8]
        bytes[at] = 0x0a;
        bytes[at + 1] = 10;
        at += 12;
    }
    const u8 specific = static_cast<u8>((config_.store->read_only() ? 0x80 : 0) | 0x10); // WP, DPOFUA
    if (ten) {
        put_big_endian(std::span(bytes).first(2), at - 2);
        bytes[3] = specific;
    } else {
        bytes[0] = static_cast<u8>(at - 1);
        bytes[2] = specific;
    }
    return answer(std::span(bytes).first(at), ten ? big_endian(cdb.subspan(7, 2)) : cdb[4], data);
}

ScsiResult ScsiDisk::read_write(bool write, u64 lba, u64 count, bool force, DataBuffer& data, Transfer* later) {
    ++(write ? counters_.writes : counters_.reads);
    BlockStore& store = *config_.store;
    if (!inside(lba, count)) {
        return out_of_range();
    }
    const auto information = lba <= 0xffffffff ? std::optional(static_cast<u32>(lba)) : std::nullopt;
    if (write && (store.read_only() || faults_.injects(Fault::write_protected))) {
        return check(key_data_protect, 0x27, 0x00);
    }
    if (faults_.injects(Fault::medium_error)) {
        return write ? check(key_medium_error, 0x0c, 0x00, information)
                     : check(key_medium_error, 0x11, 0x00, information);
    }
    ScsiResult result;
    u64 bytes = count * config_.block_size;
    if (bytes > data.size()) {
        result.overrun = true;
        bytes = data.size();
    }
    if (faults_.injects(Fault::short_transfer)) {
        bytes /= 2;
    }
    u64 at = lba * config_.block_size;
    if (later != nullptr) {
        result.transferred = static_cast<usize>(bytes);
        later->kind = bytes == 0 ? Transfer::Kind::none : write ? Transfer::Kind::write : Transfer::Kind::read;
        later->durable = write && (force || !config_.write_cache);
        later->store = &store;
        later->offset = at;
        data.truncate(result.transferred);
        later->pieces.assign(data.pieces().begin(), data.pieces().end());
        (write ? counters_.bytes_written : counters_.bytes_read) += result.transferred;
        return result;
    }
    const auto mapped = store.mapped();
    for (const auto& whole : data.pieces()) {
        const auto piece = whole.first(static_cast<usize>(std::min<u64>(whole.size(), bytes - result.transferred)));
        bool good = true;
        if (!mapped.empty()) {
            std::byte* const image = mapped.data() + at;
            std::memcpy(write ? image : piece.data(), write ? piece.data() : image, piece.size());
        } else {
            good = write ? store.write(at, piece) : store.read(at, piece);
        }
        if (!good) {
            return write ? check(key_medium_error, 0x0c, 0x00, information)
                         : check(key_medium_error, 0x11, 0x00, information);
        }
        at += piece.size();
        result.transferred += piece.size();
    }
    (write ? counters_.bytes_written : counters_.bytes_read) += result.transferred;
    if (write && (force || !config_.write_cache) && !store.flush()) {
        return check(key_medium_error, 0x0c, 0x00, information);
    }
    return result;
}

ScsiResult medium_failure(const Transfer& transfer, u32 block_size) {
    const bool read = transfer.kind == Transfer::Kind::read;
    const u64 lba = transfer.offset / block_size;
    const bool known = transfer.kind != Transfer::Kind::flush && lba <= 0xffffffff;
    return check(key_medium_error, read ? 0x11 : 0x0c, 0x00,
                 known ? std::optional(static_cast<u32>(lba)) : std::nullopt);
}

ScsiResult ScsiDisk::flush(Transfer* later) {
    ++counters_.flushes;
    if (later != nullptr) {
        later->kind = Transfer::Kind::flush;
        later->store = config_.store;
        return {};
    }
    return config_.store->flush() ? ScsiResult{} : check(key_medium_error, 0x0c, 0x00);
}

ScsiResult ScsiDisk::unmap(DataBuffer& data) {
    ++counters_.unmaps;
    if (!config_.thin) {
        return invalid_opcode();
    }
    if (config_.store->read_only()) {
        return check(key_data_protect, 0x27, 0x00);
    }
    std::array<u8, 8 + 256 * 16> list{}; // the descriptors that VPD page 0xb0 allows
    const usize there = data.get(std::as_writable_bytes(std::span(list)));
    if (there < 8) {
        return there == 0 ? ScsiResult{} : check(key_illegal_request, 0x1a, 0x00); // parameter list length error
    }
    const usize descriptors = big_endian(std::span(list).subspan(2, 2));
    if (descriptors % 16 != 0 || descriptors + 8 > there) {
        return check(key_illegal_request, 0x26, 0x00); // invalid field in parameter list
    }
    for (usize at = 8; at < 8 + descriptors; at += 16) {
        const u64 lba = big_endian(std::span(list).subspan(at, 8));
        const u64 count = big_endian(std::span(list).subspan(at + 8, 4));
        if (!inside(lba, count)) {
            return out_of_range();
        }
        if (count != 0 && !config_.store->unmap(lba * config_.block_size, count * config_.block_size)) {
            return check(key_medium_error, 0x0c, 0x00);
        }
    }
    ScsiResult result;
    result.transferred = data.size();
    return result;
}

} // namespace fl::host
