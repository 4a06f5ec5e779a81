// Converts IDENTIFY DEVICE data into a block device's identity and geometry.
export module drivers.ahci.disk;
import core.std;
import core.text;
import io.block;
import drivers.ahci.protocol;

export namespace fl::drivers::ahci {

/// How a disk is used.
struct Terms {
    ata::DriveInfo info;
    u32 depth = 0; // commands with NCQ; 0: one command at a time
    bool flush = false;
    bool discard = false;
};
/// The identity but for its name. `interrupt`: "msi" or "line".
io::BlockDevice::Identity describe_disk(const Terms& terms, std::string_view interrupt, bool wide);
io::Geometry geometry_of(const Terms& terms);

} // namespace fl::drivers::ahci
