module drivers.ata.protocol;
import core.std;
import core.result;
import core.text;

namespace fl::drivers::ata {

namespace {

constexpr bool bit(u16 word, unsigned n) { return (word >> n & 1) != 0; }
/// Words 83, 84, 86, 87 and 106 are valid only if bits 15:14 are 01 [ACS §7.12.7].
constexpr bool valid(u16 word) { return word >> 14 == 1; }

/// The index of the highest bit set in the low `width` bits, -1 for none.
constexpr i8 highest(u16 bits, unsigned width) {
    return static_cast<i8>(static_cast<int>(std::bit_width(static_cast<u16>(bits & ((1u << width) - 1)))) - 1);
}

} // namespace

Result<DriveInfo> decode(const IdentifyData& data) {
    const auto& w = data.words;
    if ((w[255] & 0xff) == 0xa5) { // integrity word: the sum of all 512 bytes is 0
        u32 sum = 0;
        for (const u16 word : w) {
            sum += (word & 0xffu) + (word >> 8);
        }
        if ((sum & 0xff) != 0) {
            return Error{Code::corrupt, "the checksum of the IDENTIFY DEVICE data is wrong; the disk is not used", 0,
                         sum & 0xff};
        }
    }
    if (bit(w[0], 15)) {
        return Error{Code::not_supported, "IDENTIFY DEVICE data of a device that is no ATA disk (word 0)", 0, w[0]};
    }
    if (!bit(w[49], 9) || !bit(w[49], 8)) {
        return Error{Code::not_supported, "the disk offers no LBA or no DMA (IDENTIFY word 49 bits 9 and 8)", 0x300,
                     w[49]};
    }

    DriveInfo info;
    std::array<char, 40> model{}; // words 27 to 46, the first character in the high byte, padded with blanks
    for (usize i = 0; i < model.size(); ++i) {
        const u16 word = w[27 + i / 2];
        const char c = static_cast<char>(i % 2 == 0 ? word >> 8 : word & 0xff);
        model[i] = c >= ' ' && c <= '~' ? c : ' ';
    }
    usize end = model.size();
    while (end > 0 && model[end - 1] == ' ') {
        --end;
    }
    usize begin = 0;
    while (begin < end && model[begin] == ' ') {
        ++begin;
    }
    info.model.write({model.data() + begin, end - begin});

    const bool command_sets = valid(w[83]);
    info.lba48 = command_sets && bit(w[83], 10);
    info.sectors = std::min<u64>(u64{w[61]} << 16 | w[60], lba28_sectors);
    if (info.lba48) {
        const u64 sectors48 = u64{w[103]} << 48 | u64{w[102]} << 32 | u64{w[101]} << 16 | w[100];
        if (sectors48 >> 48 != 0) {
            return Error{Code::protocol,
                         "the disk claims more sectors than 48 bits can count (IDENTIFY words 100 to 103)",
                         u64{1} << 48, sectors48};
        }
        info.sectors = std::max(info.sectors, sectors48);
    }
    if (info.sectors == 0) {
        return Error{Code::not_supported, "the disk has no sectors (IDENTIFY words 60, 61, 100 to 103)"};
    }

    if (valid(w[106])) {
        if (bit(w[106], 12)) {
            const u64 bytes = (u64{w[118]} << 16 | w[117]) * 2;
            if (bytes != 512 && bytes != 4096) {
                return Error{Code::not_supported, "sectors of neither 512 nor 4096 bytes (IDENTIFY words 117, 118)",
                             512, bytes};
            }
            info.sector_size = static_cast<u32>(bytes);
        }
        // Bits 3:0: log2 of the logical sectors per physical sector. Only a hint, so an implausible value is clamped,
        // not rejected.
        info.physical_sector_size =
            bit(w[106], 13) ? info.sector_size << std::min<unsigned>(w[106] & 0xf, 8) : info.sector_size;
    } else {
        info.physical_sector_size = info.sector_size;
    }

    // A disabled volatile cache needs no flush; word 85 says whether it is enabled, if word 87 is valid.
    info.flush = command_sets && bit(w[83], 12);
    info.flush_ext = command_sets && bit(w[83], 13) && info.lba48;
    const bool has_cache = command_sets && bit(w[82], 5);
    info.write_cache = has_cache && (!valid(w[87]) || bit(w[85], 5));

    // Words 63 and 88: supported modes in the low byte, the selected one in the high byte. Word 53 says whether word
    // 88 is valid.
    info.multiword_best = highest(w[63], 3);
    info.multiword_dma = highest(w[63] >> 8, 3);
    info.ultra_dma = bit(w[53], 2) ? highest(w[88] >> 8, 7) : i8{-1};
    if (info.multiword_best < 0 && info.ultra_dma < 0) {
        return Error{Code::not_supported,
                     "the disk offers neither multiword nor Ultra DMA modes (IDENTIFY words 63, 88)"};
    }
    return info;
}

} // namespace fl::drivers::ata
