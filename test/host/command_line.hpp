// The test host's options. A plain header: the unit that parses the command line uses exceptions, like its library, and
// imports no module.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace fl::vmm {

/// `--disk [scsi:|ide:]FILE[,lun=N][,controller=N][,readonly][,sector=4096][,iops=N]`: a VMBus disk.
struct DiskOption {
    bool ide = false; // an accelerator channel; otherwise a LUN of a SCSI controller
    std::string file;
    std::uint32_t lun = 0; // SCSI; default: the next free number
    std::uint32_t controller = 0;
    std::uint32_t position = 0; // IDE: 2 · channel + (0 master, 1 slave); default: the next free one (`lun=`)
    bool read_only = false;
    std::uint32_t sector = 512;
    std::uint32_t iops = 0; // completions per second; 0: unlimited
};

struct Options {
    std::string kernel;
    std::string module; // PVH module or initrd
    std::string append;
    std::uint32_t processors = 1;
    std::uint32_t listed_processors = 0; // in the ACPI tables, if larger
    std::uint32_t memory_mebibytes = 256;
    std::vector<DiskOption> disks;
    std::vector<std::string> ide; // images of the emulated disks hda, hdb, hdc, hdd
    std::uint32_t version = 5u << 16 | 3;
    std::vector<std::string> storage_versions; // accepted versions, such as "6.2"; empty: all
    std::uint32_t sub_channels = 3;
    std::uint32_t transfer = 256 << 10; // bytes
    bool monitor_pages = false;
    std::string fault;
    bool list_faults = false;
    double shutdown_after = 0; // seconds; 0: never
    double hot_add = 0;        // time at which the last SCSI disk is added
    double hot_remove = 0;     // time at which the last SCSI disk is removed
    std::string add_marker;    // adds the disk when the guest prints a line that contains this
    std::string remove_marker;
    std::string shutdown_marker;
    double hot_controller = 0; // time at which the last SCSI disk's controller is added, with all its disks
    double offer_again = 0;    // time at which the last SCSI disk's controller is rescinded and offered again
    std::string controller_marker;
    std::string again_marker;
    double timeout = 0;
    std::string log; // a file, or empty: standard output
    bool verbose = false;
    std::string io = "inline"; // inline, thread, uring
    std::string latency;       // of the VMBus's disks, as in 100us; empty: none
    std::uint64_t latency_seed = 1;
    bool eventfd = false; // signals go to the I/O thread by eventfd instead of being handled in the processor's exit
    std::string hyperv_base = "0x40000000";
    bool no_hyperv = false;
    bool no_rsdp = false;
    bool openvmm_leaves = false;
    bool kvm_leaves = false;
    bool console = false; // connects standard input to the serial port
};

/// Parses the command line. Prints help or an error and returns the exit status for it; nothing if the machine is to
/// run.
std::optional<int> parse_command_line(int count, char** words, Options& options);

} // namespace fl::vmm
