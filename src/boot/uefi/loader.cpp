// efi_main: gathers the hand-off data, loads the kernel, exits boot services and jumps. For the reasons see
// docs/decisions/0001-uefi-loader.md.
#include "core/try.hpp"
import core.std;
import core.result;
import core.elf;
import core.text;
import core.verdict;
import core.machine.cpu;
import boot.handoff;
import boot.uefi.console;
import boot.uefi.firmware;
import boot.uefi.memory_map;
import boot.uefi.paging;
import boot.uefi.protocol;
import boot.uefi.text;

namespace {
using namespace fl;
using namespace fl::boot;
using namespace fl::boot::uefi;

extern "C" {
// enter.S
extern const std::byte kernel_elf_begin[];
extern const std::byte kernel_elf_end[];
extern const std::byte five_levels_begin[];
extern const std::byte five_levels_end[];
[[noreturn]] void enter_kernel(u64 root, u64 boot_info, u64 entry);
[[noreturn]] void enter_kernel_from_five_levels(u64 root, u64 boot_info, u64 entry, void* page);
}

constinit Console console;
constinit std::string_view file_at_work; // the file being read, named in errors

constexpr u64 cr4_five_levels = 0x1000;
constexpr u64 max_image = u64{1} << 30; // the area mapped at kernel_virtual

// One byte larger than the longest command line or map file, so that BootInfo's setters detect truncation.
constinit std::array<char, BootInfo::max_cmdline + 1> cmdline_storage{};
constinit std::array<char, BootInfo::max_map_file + 1> map_file_storage{};

// Reports a failure to the console and as verdict ERROR (docs/INTERFACES.md). Returns if there is no debug exit port.
void report_failure(std::string_view what) {
    console.line("error: {}; nothing was started", what);
    console.verdict(Verdict::error, what);
    cpu::out32(0xf4, to_underlying(Verdict::error));
}

void report_failure(const Error& error) {
    FixedText<240> what;
    print(what, "{}{}{}", file_at_work, file_at_work.empty() ? "" : ": ", error);
    report_failure(what.view());
}

constinit const RuntimeServices* runtime = nullptr;

// After boot services end there is no caller to return to, but the firmware can still power the machine off [UEFI-2.10
// §8.5.1].
[[noreturn]] void stop() {
    if (runtime != nullptr) {
        runtime->reset_system(reset_shutdown, load_error, 0, nullptr);
    }
    for (;;) {
        cpu::interrupts_off();
        cpu::halt();
    }
}

bool has_huge_pages() {
    return cpu::cpuid(0x80000000).eax >= 0x80000001 && (cpu::cpuid(0x80000001).edx & (u32{1} << 26)) != 0;
}

// Load options take precedence over the file; if they are not text, that is reported and they are ignored.
Result<void> gather_cmdline(const BootServices& boot, const LoadedImage& image, BootInfo& info) {
    if (image.load_options != nullptr && image.load_options_size > 0) {
        const auto options = text_of_load_options({image.load_options, image.load_options_size}, cmdline_storage);
        if (!options) {
            console.line("warning: {}; looking for \\firstlight\\cmdline.txt instead", options.error());
        } else if (const std::string_view text = without_image_name(*options); !text.empty()) {
            set_cmdline(info, text);
            return {};
        }
    }
    file_at_work = "\\firstlight\\cmdline.txt";
    TRY(const auto file, read_file(boot, image, u"\\firstlight\\cmdline.txt", cmdline_storage));
    if (file) {
        TRY(const std::string_view text, text_of_command_line_file(*file));
        set_cmdline(info, text);
    }
    file_at_work = {};
    return {};
}

Result<void> gather_map_file(const BootServices& boot, const LoadedImage& image, BootInfo& info) {
    file_at_work = "\\firstlight\\map.txt";
    TRY(const auto file, read_file(boot, image, u"\\firstlight\\map.txt", map_file_storage));
    if (file) {
        set_map_file(info, {file->data(), file->size()});
    }
    file_at_work = {};
    return {};
}

struct Prepared {
    BootInfo* info = nullptr;
    u64 root = 0;
    u64 entry = 0;
    std::byte* five_levels = nullptr; // the page for leaving five-level paging; nullptr: not active
    MemoryMap map;
};

Result<void> load_image(const BootServices& boot, const elf::Image& image, BootInfo& info) {
    if (image.physical_size() > max_image) {
        return Error(Code::not_supported, "the kernel image is larger than its place at its link address", max_image,
                     image.physical_size());
    }
    CHECK(image.require_linear(kernel_virtual));
    const u64 size = (image.physical_size() + small_page - 1) & ~(small_page - 1);
    TRY(const std::span<std::byte> memory, allocate(boot, size, large_page, MemoryType::loader_data));
    CHECK(image.load(memory));
    info.kernel_phys = reinterpret_cast<u64>(memory.data());
    info.kernel_size = size;
    return {};
}

Result<u64> build_tables(const BootServices& boot, const BootInfo& info, const MemoryMap& map) {
    const bool huge = has_huge_pages();
    TRY(const Windows windows, windows_of(map.bytes(), map.stride()));
    const u64 bytes = PageTables::tables_needed(windows.view(), huge) * small_page;
    TRY(const std::span<std::byte> memory, allocate(boot, bytes, small_page, MemoryType::loader_data));
    TRY(PageTables tables, PageTables::create({reinterpret_cast<u64*>(memory.data()), memory.size() / sizeof(u64)},
                                              reinterpret_cast<u64>(memory.data())));
    for (const Window& w : windows.view()) {
        CHECK(tables.map(w.begin, w.begin, w.end - w.begin, huge));
    }
    CHECK(tables.map(kernel_virtual, info.kernel_phys, (info.kernel_size + large_page - 1) & ~(large_page - 1), false));
    return tables.root();
}

Result<Prepared> prepare(Handle handle, const SystemTable& system, u64 tsc) {
    const BootServices& boot = *system.boot;
    void* interface = nullptr;
    if (const Status status = boot.handle_protocol(handle, &loaded_image_guid, &interface);
        failed(status) || interface == nullptr) {
        return Error(Code::protocol, "LoadedImage of the loader cannot be opened (status)", success, status);
    }
    const LoadedImage& loaded = *static_cast<LoadedImage*>(interface);
    TRY(const elf::Image image, elf::Image::parse({kernel_elf_begin, kernel_elf_end}));

    Prepared p;
    TRY(const std::span<std::byte> info_memory, allocate(boot, sizeof(BootInfo), small_page, MemoryType::loader_data));
    p.info = new (info_memory.data()) BootInfo{};
    begin(*p.info, Entry::uefi, tsc);
    CHECK(gather_cmdline(boot, loaded, *p.info));
    CHECK(gather_map_file(boot, loaded, *p.info));
    p.info->rsdp = find_rsdp(system);
    p.info->smbios = find_smbios(system);
    p.info->framebuffer = find_framebuffer(boot);
    CHECK(load_image(boot, image, *p.info));
    p.entry = image.entry();
    if ((cpu::read_cr4() & cr4_five_levels) != 0) {
        TRY(const std::span<std::byte> page, allocate(boot, small_page, small_page, MemoryType::loader_code));
        std::copy(five_levels_begin, five_levels_end, page.data());
        p.five_levels = page.data();
    }
    TRY(p.map, MemoryMap::create(boot));
    TRY(p.root, build_tables(boot, *p.info, p.map));
    return p;
}

Result<void> hand_over(const BootServices& boot, Handle handle, Prepared& p) {
    CHECK(leave_boot_services(boot, handle, p.map));
    cpu::interrupts_off();
    // The kernel's own normalise() marks the image as in use, so copy the map unchanged.
    const u64 size = std::exchange(p.info->kernel_size, 0);
    CHECK(add_memory_map(*p.info, p.map.bytes(), p.map.stride()));
    p.info->kernel_size = size;
    const u64 info = reinterpret_cast<u64>(p.info);
    if (p.five_levels != nullptr) {
        enter_kernel_from_five_levels(p.root, info, p.entry, p.five_levels);
    }
    enter_kernel(p.root, info, p.entry);
}

Status status_of(Code code) {
    switch (code) {
    case Code::exhausted: return out_of_resources;
    case Code::bad_argument: return invalid_parameter;
    case Code::not_supported: return unsupported;
    case Code::io: return device_error;
    default: return load_error;
    }
}

} // namespace

extern "C" [[noreturn]] void loader_bug(const char* what) {
    console.leave_firmware();
    FixedText<240> text{"bug in the loader: "};
    text.write(what);
    report_failure(text.view());
    stop();
}

extern "C" Status efi_main(Handle handle, SystemTable* system) {
    const u64 tsc = cpu::read_tsc();
    if (system == nullptr || system->header.signature != SystemTable::signature_value || system->boot == nullptr ||
        system->boot->header.signature != BootServices::signature_value) {
        return invalid_parameter; // the caller is not UEFI firmware, so there is no console for a message
    }
    console.open(*system);
    if (system->runtime != nullptr && system->runtime->header.header_size >= sizeof(RuntimeServices)) {
        runtime = system->runtime;
    }
    auto prepared = prepare(handle, *system, tsc);
    if (!prepared) {
        report_failure(prepared.error());
        return status_of(prepared.error().code);
    }
    const BootInfo& info = *prepared->info;
    console.line("image at {:#x}, {} KiB, entry {:#x}; command line: {}", info.kernel_phys, info.kernel_size / 1024,
                 prepared->entry, info.cmdline_text());
    const auto failure = hand_over(*system->boot, handle, *prepared);
    console.leave_firmware();
    report_failure(failure.error());
    stop();
}
