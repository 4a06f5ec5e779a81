// Converts IDENTIFY DEVICE data into a block device's identity and geometry.
export module drivers.ata.disk;
import core.std;
import core.text;
import io.block;
import drivers.ata.protocol;

export namespace fl::drivers::ata {

struct Description {
    io::BlockDevice::Identity identity;
    io::Geometry geometry;
};
/// `name`: "hda".
Description describe_disk(const DriveInfo& info, std::string_view name, const Usage& usage);

} // namespace fl::drivers::ata
