// The only unit that uses CLI11, and the only one compiled with exceptions.
#include "command_line.hpp"

#include <CLI/CLI.hpp>
#include <sstream>

namespace fl::vmm {
namespace {

constexpr int usage_status = 64;

std::uint32_t number_in(const std::string& text, std::uint32_t most, const std::string& what) {
    std::size_t used = 0;
    unsigned long value = 0;
    try {
        value = std::stoul(text, &used, 0);
    } catch (const std::exception&) {
        used = 0;
    }
    if (used == 0 || used != text.size() || value > most) {
        throw CLI::ValidationError(what + " is a number up to " + std::to_string(most) + ", not '" + text + "'");
    }
    return static_cast<std::uint32_t>(value);
}

DiskOption parse_disk(const std::string& text, const std::vector<DiskOption>& before) {
    DiskOption disk;
    std::stringstream words(text);
    std::string word;
    std::getline(words, word, ',');
    if (word.rfind("ide:", 0) == 0) {
        disk.ide = true;
        word.erase(0, 4);
    } else if (word.rfind("scsi:", 0) == 0) {
        word.erase(0, 5);
    }
    disk.file = word;
    bool numbered = false;
    while (std::getline(words, word, ',')) {
        if (word == "readonly") {
            disk.read_only = true;
        } else if (word.rfind("lun=", 0) == 0) {
            disk.lun = disk.position = number_in(word.substr(4), disk.ide ? 3 : 63, "lun");
            numbered = true;
        } else if (word.rfind("controller=", 0) == 0) {
            disk.controller = number_in(word.substr(11), 3, "controller");
        } else if (word == "sector=512" || word == "sector=4096") {
            disk.sector = number_in(word.substr(7), 4096, "sector");
        } else if (word.rfind("iops=", 0) == 0) {
            disk.iops = number_in(word.substr(5), 1000000000, "iops");
        } else {
            throw CLI::ValidationError(
                "--disk " + text + ": '" + word +
                "' is not one of lun=N, controller=N, readonly, sector=512, sector=4096, iops=N");
        }
    }
    if (!numbered) {
        for (const DiskOption& other : before) {
            if (other.ide == disk.ide && (disk.ide || other.controller == disk.controller)) {
                disk.lun = disk.position = std::max(disk.lun, (disk.ide ? other.position : other.lun) + 1);
            }
        }
    }
    for (const DiskOption& other : before) {
        if (other.ide == disk.ide && other.controller == disk.controller && other.lun == disk.lun) {
            throw CLI::ValidationError("--disk " + text + ": lun=" + std::to_string(disk.lun) + " is taken by " +
                                       other.file);
        }
    }
    if (disk.ide && disk.position > 3) {
        throw CLI::ValidationError("--disk " + text + ": there are four places for IDE disks");
    }
    return disk;
}

std::uint32_t parse_version(const std::string& text) {
    const auto dot = text.find('.');
    if (dot == std::string::npos) {
        throw CLI::ValidationError("--vmbus-version " + text + ": MAJOR.MINOR was expected, as in 5.3");
    }
    return number_in(text.substr(0, dot), 255, "a version's first half") << 16 |
           number_in(text.substr(dot + 1), 255, "a version's second half");
}

} // namespace

std::optional<int> parse_command_line(int count, char** words, Options& options) {
    CLI::App app{"A small virtual machine monitor for tests: KVM with Hyper-V's interfaces, a VMBus with SCSI disks, "
                 "an IDE controller.",
                 "firstlight-testhost"};
    app.footer(
        "Exit status: odd numbers are the guest's verdict, (value << 1) | 1; 0 power off; 64 command line; 66 a file; "
        "70 crash of the "
        "guest; 72 time-out; 74 the system refused something; 76 reset by the guest; 78 KVM lacks a capability.");
    std::vector<std::string> disks;
    std::string version = "5.3";
    app.add_option("--kernel", options.kernel, "ELF with a PVH entry, or Linux's bzImage")->check(CLI::ExistingFile);
    app.add_option("--initrd,--module", options.module, "Linux's initrd; the PVH module")->check(CLI::ExistingFile);
    app.add_option("--append", options.append, "the guest's command line");
    app.add_option("--cpus", options.processors, "processors")->check(CLI::Range(1, 64));
    app.add_option("--listed-cpus", options.listed_processors,
                   "processors that the ACPI tables list, if more than --cpus: the others never start")
        ->check(CLI::Range(1, 64));
    app.add_option("--memory", options.memory_mebibytes, "MiB")->check(CLI::Range(16, 3072));
    app.add_option("--disk", disks,
                   "[scsi:|ide:]FILE[,lun=N][,controller=N][,readonly][,sector=4096][,iops=N]: a disk on the VMBus; "
                   "iops: requests are taken at "
                   "once, and N of them are answered per second")
        ->expected(1)
        ->take_all()
        ->delimiter('\0');
    app.add_option("--ide", options.ide, "FILE: an emulated IDE disk: hda, hdb, hdc, hdd")
        ->expected(1)
        ->take_all()
        ->check(CLI::ExistingFile);
    app.add_option("--vmbus-version", version, "the newest version that is accepted, MAJOR.MINOR");
    app.add_option("--storage-versions", options.storage_versions,
                   "versions of the storage protocol that are accepted, as 6.0,5.1")
        ->delimiter(',');
    app.add_option("--sub-channels", options.sub_channels, "offered at most for a SCSI controller")
        ->check(CLI::Range(0, 63));
    app.add_option("--transfer", options.transfer, "bytes of one request at most")->check(CLI::Range(4096, 16 << 20));
    app.add_flag("--monitor-pages", options.monitor_pages, "offer monitor pages");
    app.add_option("--fault", options.fault, "NAME[,after=N][,count=N]: break a rule of the protocol");
    app.add_flag("--list-faults", options.list_faults, "the names for --fault");
    app.add_option("--shutdown-after", options.shutdown_after, "SECONDS: ask the guest to shut down");
    app.add_option("--hot-add", options.hot_add, "SECONDS: hot-add the last SCSI disk");
    app.add_option("--hot-remove", options.hot_remove, "SECONDS: hot-remove the last SCSI disk");
    app.add_option("--hot-add-on", options.add_marker, "TEXT: … when the guest prints a line that contains it");
    app.add_option("--hot-remove-on", options.remove_marker, "TEXT: likewise");
    app.add_option("--shutdown-on", options.shutdown_marker, "TEXT: likewise");
    app.add_option("--hot-controller", options.hot_controller,
                   "SECONDS: hot-add the last SCSI disk's controller with all its disks");
    app.add_option("--hot-controller-on", options.controller_marker, "TEXT: likewise");
    app.add_option("--offer-again", options.offer_again,
                   "SECONDS: the last SCSI disk's controller is rescinded and at once offered again");
    app.add_option("--offer-again-on", options.again_marker, "TEXT: likewise");
    app.add_option("--timeout", options.timeout, "SECONDS: give up");
    app.add_option("--log", options.log, "FILE for the host's own lines (standard output)");
    app.add_flag("--verbose", options.verbose, "a line for every VMBus message");
    app.add_option("--io", options.io,
                   "who reads and writes the VMBus's disks: inline, the processor in its exit; thread, the I/O thread, "
                   "one request after the other; uring, the I/O thread by io_uring")
        ->check(CLI::IsMember({"inline", "thread", "uring"}));
    app.add_option("--latency", options.latency,
                   "what a VMBus's disk takes for a request at least: a time as 100us, exp:100us (drawn, the mean) or "
                   "uniform:50us..150us; with --io thread or uring");
    app.add_option("--latency-seed", options.latency_seed, "of what is drawn");
    app.add_flag("--eventfd", options.eventfd, "serve signals in the I/O thread instead of in the processor's exit");
    app.add_option("--hyperv-base", options.hyperv_base,
                   "where Hyper-V's CPUID leaves begin; elsewhere than 0x40000000 a foreign name is first");
    app.add_flag("--no-rsdp", options.no_rsdp,
                 "do not pass the address of ACPI's tables: the guest finds them in the BIOS area");
    app.add_flag("--no-hyperv", options.no_hyperv, "no leaves of Hyper-V");
    app.add_flag("--openvmm-leaves", options.openvmm_leaves,
                 "Hyper-V's leaves as those of OpenVMM: neither PostMessages nor SignalEvents, though both work");
    app.add_flag("--kvm-leaves", options.kvm_leaves, "KVM's leaves at 0x40000100");
    app.add_flag("--console", options.console, "standard input goes to the serial port");
    try {
        app.parse(count, words);
        for (const std::string& disk : disks) {
            options.disks.push_back(parse_disk(disk, options.disks));
        }
        options.version = parse_version(version);
        if (options.kernel.empty() && !options.list_faults) {
            throw CLI::RequiredError("--kernel");
        }
        if (options.ide.size() > 4) {
            throw CLI::ValidationError("--ide: there are four places for IDE disks");
        }
    } catch (const CLI::ParseError& error) {
        const int status = app.exit(error);
        return status == 0 ? 0 : usage_status;
    }
    return std::nullopt;
}

} // namespace fl::vmm
