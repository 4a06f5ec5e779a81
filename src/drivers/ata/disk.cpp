module drivers.ata.disk;
import core.std;
import core.result;
import core.text;
import io.executor;
import io.block;
import drivers.ata.protocol;

namespace fl::drivers::ata {

void Disk::configure(const DriveInfo& info, std::string_view name, bool flushes, bool words) {
    info_ = info;
    identity_.name = FixedText<16>(name);
    identity_.driver = "ata";
    identity_.kind = io::Kind::emulated;
    identity_.model = FixedText<48>(info.model.view());
    auto& features = identity_.features;
    features.clear();
    if (info.ultra_dma >= 0) {
        print(features, "udma{}", info.ultra_dma);
    } else {
        print(features, "mwdma{}", info.multiword_dma);
    }
    const bool can_flush = flushes && info.write_cache && (info.flush || info.flush_ext);
    features.write(info.lba48 ? " lba48" : "");
    features.write(can_flush ? " flush" : "");
    features.write(words ? " words" : "");
    geometry_ = {.sectors = info.sectors,
                 .sector_size = info.sector_size,
                 .physical_sector_size = info.physical_sector_size,
                 .flush = can_flush};
}

void Disk::end_waiting(io::Status status) {
    for (io::RequestQueue* queue : {&again, &pending}) {
        while (io::Request* request = queue->pop()) {
            end(*request, status);
        }
    }
}

} // namespace fl::drivers::ata
