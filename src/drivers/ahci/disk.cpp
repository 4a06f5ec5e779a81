module drivers.ahci.disk;
import core.std;
import core.text;
import io.block;
import drivers.ahci.protocol;

namespace fl::drivers::ahci {

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

} // namespace fl::drivers::ahci
