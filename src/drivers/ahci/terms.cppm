// How a disk is used, from its IDENTIFY DEVICE data: the terms, and a block device's identity and geometry from them.
export module drivers.ahci.terms;
import core.std;
import core.text;
import io.block;
import drivers.ahci.protocol;

export namespace fl::drivers::ahci {

/// How a disk is used.
struct Terms {
    ata::DriveInfo info;
    ata::DeviceIdentity identity{ata::IdentifyData{}};
    u32 depth = 0; // commands with NCQ; 0: one command at a time
    bool flush = false;
    bool discard = false;
    bool write_through = false; // its write cache was switched off, and must be after each reset
};
/// The identity but for its name. `interrupt`: "msi" or "line".
io::BlockDevice::Identity describe_disk(const Terms& terms, std::string_view interrupt, bool wide);
io::Geometry geometry_of(const Terms& terms);
/// For log lines: model, serial number and sectors.
FixedText<112> shown(const ata::DeviceIdentity& identity);

} // namespace fl::drivers::ahci
