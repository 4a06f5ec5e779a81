module drivers.ahci.terms;
import core.std;
import core.text;
import io.block;
import drivers.ahci.protocol;

namespace fl::drivers::ahci {

namespace {
/// Characters of IDENTIFY words, the first one in the high byte, without the blanks around them.
void write_words(FixedText<112>& text, std::span<const u16> words) {
    FixedText<40> all;
    for (const u16 word : words) {
        for (const u32 c : {u32{word} >> 8, word & 0xffu}) {
            const char shown = c > ' ' && c <= '~' ? static_cast<char>(c) : ' ';
            all.write({&shown, 1});
        }
    }
    std::string_view view = all.view();
    view.remove_prefix(std::min(view.find_first_not_of(' '), view.size()));
    view = view.substr(0, view.find_last_not_of(' ') + 1);
    text.write(view.empty() ? "no name" : view);
}
} // namespace

io::BlockDevice::Identity describe_disk(const Terms& terms, std::string_view interrupt, bool wide) {
    io::BlockDevice::Identity identity;
    identity.driver = "ahci";
    identity.kind = io::Kind::emulated;
    identity.model = FixedText<48>(terms.info.model.view());
    auto& features = identity.features;
    if (terms.depth != 0) {
        print(features, "ncq{} ", terms.depth);
    }
    features.write(interrupt);
    features.write(terms.info.lba48 ? " lba48" : "");
    features.write(terms.flush ? " flush" : "");
    features.write(terms.discard ? " discard" : "");
    features.write(terms.write_through ? " write-through" : "");
    features.write(wide ? "" : " dma32");
    return identity;
}

io::Geometry geometry_of(const Terms& terms) {
    return {.sectors = terms.info.sectors,
            .sector_size = terms.info.sector_size,
            .physical_sector_size = terms.info.physical_sector_size,
            .flush = terms.flush,
            .discard = terms.discard};
}

FixedText<112> shown(const ata::DeviceIdentity& identity) {
    const std::span words(identity.words); // [ata::DeviceIdentity]
    FixedText<112> text;
    write_words(text, words.subspan(14, 20));
    text.write(" with serial number ");
    write_words(text, words.first(10));
    const u64 wide = words[36] | u64{words[37]} << 16 | u64{words[38]} << 32 | u64{words[39]} << 48;
    print(text, " and {} sectors", wide != 0 ? wide : words[34] | u64{words[35]} << 16);
    return text;
}

} // namespace fl::drivers::ahci
