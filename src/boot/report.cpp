module boot.report;
import core.std;
import core.acpi;
import core.cmdline;
import core.log;
import core.result;
import core.text;
import core.time;
import hv.detect;
import drivers.table;
import boot.devices;
import boot.handoff;
import boot.options;

namespace fl::boot {

void print_boot_info(const BootInfo& info) {
    log::info("Firstlight, entered by {}; image at {:#x}, {} KiB", info.entry, info.kernel_phys,
              info.kernel_size >> 10);
    log::info("command line: \"{}\"", info.cmdline_text());
    // An address from the loader, or `none`, which says what happens without one.
    const auto place = [](u64 address, std::string_view none) {
        FixedText<48> text{none};
        if (address != 0) {
            text.clear();
            print(text, "{:#x}", address);
        }
        return text;
    };
    log::info("from the loader: RSDP {}, SMBIOS {}, framebuffer {}, map file: {}", place(info.rsdp, "not given"),
              place(info.smbios, "not given"), place(info.framebuffer.base, "none"),
              info.has_map_file != 0 ? "given" : "none");
    for (const MemoryRange& range : info.memory()) {
        log::info("  {:016x}-{:016x} {}", range.base, range.base + range.size, name(range.kind));
    }
    if (info.map_file_truncated != 0) {
        log::warning("the map file is longer than {} bytes: its end is missing", BootInfo::max_map_file);
    }
    if (info.ranges_truncated != 0) {
        log::warning("the memory map has more than {} ranges: the others are not used", BootInfo::max_given_ranges);
    }
}

void print_loader_words(const LoaderWords& words) {
    if (words.ignored.count == 0) {
        return;
    }
    {
        const log::Hold hold;
        log::begin(log::Level::info);
        log::Line out;
        out.write("command line: for Linux, ignored:");
        for (std::string_view word : words.ignored.all()) {
            print(out, " {}", shown(word));
        }
        if (words.ignored_dropped != 0) {
            print(out, " and {} more", words.ignored_dropped);
        }
        out.write("\n");
    }
    log::Record record("ignored");
    record.open("words", '[');
    for (std::string_view word : words.ignored.all()) {
        record.text("", word);
    }
    record.close(']').number("more", words.ignored_dropped);
}

void print_option_errors(const OptionErrors& errors) {
    for (const auto& message : errors.all()) {
        log::error("{}", message.view());
        log::Record("error").text("code", name(Code::bad_argument)).text("message", message.view());
    }
    if (errors.dropped != 0) {
        log::error("the command line: {} more {} not shown", errors.dropped, plural(errors.dropped, "errors"));
    }
}

void print_diagnostics(const drivers::Table& table) {
    for (const drivers::Diagnostic& wrong : table.diagnostics()) {
        FixedText<240> where;
        if (wrong.line != 0) {
            print(where, "map file, line {}", wrong.line);
        } else {
            where.write("map= on the command line");
        }
        log::error("{}: {}", where.view(), wrong.message.view());
        FixedText<320> message;
        print(message, "{}: {}", where.view(), wrong.message.view());
        log::Record("error").text("code", name(Code::bad_argument)).text("message", message.view());
    }
}

void boot_record(const BootInfo& info, const hv::Sightings& sightings, const BootFacts& facts) {
    u64 usable = 0;
    for (const MemoryRange& range : info.memory()) {
        usable += range.kind == MemoryKind::usable ? range.size : 0;
    }
    log::Record record("boot");
    record.text("entry", name(info.entry)).text("vm_guest", hv::name(hv::vm_guest())).text("backend", facts.backend);
    record.open("signatures", '[');
    for (const hv::Sighting& sighting : sightings.all()) {
        FixedText<16> base;
        print(base, "{:#x}", sighting.base);
        record.open("", '{').text("base", base.view()).text("name", sighting.signature.view()).close('}');
    }
    record.close(']').number("memory_bytes", usable).number("tsc_khz", facts.tsc_hz / 1000).text("clock", facts.clock);
    record.flag("clock_assumed", facts.clock_assumed);
    record.number("detect_ns", facts.detected).number("first_probe_ns", facts.first_probe);
}

void report_left_out(const BootInfo& info, const acpi::Tables* tables, bool config_ports, Devices& into) {
    if (info.ranges_truncated != 0) {
        into.left_out("memory ranges", info.ranges_truncated, false,
                      "the memory map has more ranges than this kernel supports");
    }
    if (tables == nullptr) {
        return;
    }
    FixedText<120> reason;
    for (const acpi::Damage& damage : tables->all_damages()) {
        reason.clear();
        print(reason, "{} at {:#x}, length {}, {}", damage.name(), damage.address, damage.length, damage.what());
        into.left_out("ACPI tables", 1, damage.name() == "MCFG" && !config_ports, reason);
    }
    if (tables->damaged > tables->all_damages().size()) {
        into.left_out("ACPI tables", tables->damaged - tables->all_damages().size(), false, "damaged, too");
    }
    if (tables->dropped != 0) {
        into.left_out("ACPI tables", tables->dropped, false, "there are more than this kernel reads");
    }
    if (tables->ssdts_dropped != 0) { // on hardware-reduced machines they may describe virtio-mmio devices
        into.left_out("SSDTs", tables->ssdts_dropped, tables->fadt && tables->fadt->hardware_reduced,
                      "there are more than this kernel reads");
    }
    if (tables->madt) {
        const acpi::Madt& madt = *tables->madt;
        const auto beyond = [&](u32 count, std::string_view what) {
            if (count != 0) {
                into.left_out(what, count, false, "the MADT has more than this kernel supports");
            }
        };
        beyond(madt.processors_dropped, "processors");
        beyond(madt.io_apics_dropped, "IOAPICs");
        beyond(madt.overrides_dropped, "interrupt overrides");
        if (madt.bytes_dropped != 0) {
            into.left_out("bytes of the MADT", madt.bytes_dropped, false, "they follow an entry of invalid length");
        }
    }
}

} // namespace fl::boot
