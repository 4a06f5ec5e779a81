module drivers.ata.disk;
import core.std;
import core.text;
import io.block;
import drivers.ata.protocol;

namespace fl::drivers::ata {

Description describe_disk(const DriveInfo& info, std::string_view name, const Usage& usage) {
    Description d;
    d.identity.name = FixedText<16>(name);
    d.identity.driver = "ata";
    d.identity.kind = io::Kind::emulated;
    d.identity.model = FixedText<48>(info.model.view());
    auto& features = d.identity.features;
    if (info.ultra_dma >= 0) {
        print(features, "udma{}", info.ultra_dma);
    } else {
        print(features, "mwdma{}", info.multiword_dma);
    }
    features.write(info.lba48 ? " lba48" : "");
    features.write(usage.flush ? " flush" : "");
    features.write(usage.write_through ? " write-through" : "");
    features.write(usage.words ? " words" : "");
    d.geometry = {.sectors = info.sectors,
                  .sector_size = info.sector_size,
                  .physical_sector_size = info.physical_sector_size,
                  .flush = usage.flush};
    return d;
}

} // namespace fl::drivers::ata
