module;
#include "core/try.hpp"
module boot.uefi.firmware;
import core.std;
import core.result;
import boot.handoff;
import boot.uefi.memory_map;
import boot.uefi.protocol;

namespace fl::boot::uefi {

namespace {

constexpr u64 page = 4096;
constexpr u64 spare_descriptors = 64;
constexpr u64 max_tables = 1024; // limit on the configuration table entries examined

u64 find_table(const SystemTable& system, const Guid& guid) {
    const u64 count = system.tables != nullptr ? std::min(system.table_count, max_tables) : 0;
    for (u64 i = 0; i < count; ++i) {
        if (system.tables[i].guid == guid) {
            return system.tables[i].table;
        }
    }
    return 0;
}

// Closes the file on every return path.
class OpenFile {
  public:
    explicit OpenFile(File* file) : file_(file) {}
    OpenFile(const OpenFile&) = delete;
    OpenFile& operator=(const OpenFile&) = delete;
    ~OpenFile() {
        if (file_ != nullptr) {
            file_->close(file_);
        }
    }
    File* operator->() const { return file_; }
    File* get() const { return file_; }

  private:
    File* file_;
};

} // namespace

Result<std::span<std::byte>> allocate(const BootServices& boot, u64 bytes, u64 alignment, MemoryType type) {
    // The firmware aligns to pages only: allocate more and align inside.
    const u64 pages = (bytes + alignment - page + page - 1) / page;
    u64 address = four_gib - 1;
    const Status status = boot.allocate_pages(allocate_max_address, to_underlying(type), pages, &address);
    if (failed(status)) {
        return Error(
            Code::exhausted,
            "the firmware has no free memory of the required size below 4 GiB (status); give the machine more memory",
            success, status);
    }
    const u64 begin = (address + alignment - 1) & ~(alignment - 1);
    auto* data = reinterpret_cast<std::byte*>(begin);
    std::memset(data, 0, bytes);
    return std::span<std::byte>(data, bytes);
}

Result<MemoryMap> MemoryMap::create(const BootServices& boot) {
    u64 size = 0;
    u64 key = 0;
    u64 stride = 0;
    u32 version = 0;
    const Status status = boot.get_memory_map(&size, nullptr, &key, &stride, &version);
    if (status != buffer_too_small) {
        return Error(Code::protocol, "GetMemoryMap does not return the map's size (status)", buffer_too_small, status);
    }
    // A later version may make descriptors longer, never shorter [UEFI-2.10 §7.2.3].
    if (stride < sizeof(MemoryDescriptor) || stride > page) {
        return Error(Code::not_supported, "memory map: the firmware's descriptor size is out of range",
                     sizeof(MemoryDescriptor), stride);
    }
    MemoryMap map;
    TRY(map.storage_, allocate(boot, size + spare_descriptors * stride, page, MemoryType::loader_data));
    CHECK(map.refresh(boot));
    return map;
}

Result<void> MemoryMap::refresh(const BootServices& boot) {
    u64 size = storage_.size();
    u32 version = 0;
    const Status status = boot.get_memory_map(&size, storage_.data(), &key_, &stride_, &version);
    if (failed(status) || size > storage_.size()) {
        size_ = 0;
        too_small_ = status == buffer_too_small;
        return Error(Code::protocol, "GetMemoryMap fails (status)", success, status);
    }
    size_ = size;
    return {};
}

Result<void> leave_boot_services(const BootServices& boot, Handle handle, MemoryMap& map) {
    constexpr u32 max_tries = 8;
    Status status = success;
    for (u32 i = 0; i < max_tries; ++i) {
        auto read = map.refresh(boot);
        if (!read && map.too_small() && i == 0) { // memory can still be allocated
            TRY(map, MemoryMap::create(boot));
            read = Result<void>{};
        }
        CHECK(read);
        status = boot.exit_boot_services(handle, map.key());
        if (!failed(status)) {
            return {};
        }
    }
    return Error(Code::protocol, "ExitBootServices fails (status); update the firmware", success, status);
}

Result<std::optional<std::span<char>>> read_file(const BootServices& boot, const LoadedImage& image,
                                                 const char16_t* name, std::span<char> into) {
    void* interface = nullptr;
    if (image.device == nullptr || failed(boot.handle_protocol(image.device, &file_system_guid, &interface)) ||
        interface == nullptr) {
        return std::optional<std::span<char>>(); // the image was loaded from the network or from memory
    }
    auto* system = static_cast<FileSystem*>(interface);
    File* opened = nullptr;
    Status status = system->open_volume(system, &opened);
    if (failed(status) || opened == nullptr) {
        return Error(Code::io, "the loader's volume cannot be opened (status); check the file system", success, status);
    }
    const OpenFile root(opened);
    opened = nullptr;
    status = root->open(root.get(), &opened, name, open_for_reading, 0);
    if (status == not_found) {
        return std::optional<std::span<char>>();
    }
    if (failed(status) || opened == nullptr) {
        return Error(Code::io, "the file cannot be opened (status); check the file system", success, status);
    }
    const OpenFile file(opened);

    alignas(FileInfo) std::array<std::byte, sizeof(FileInfo) + 512> info_bytes{};
    u64 info_size = info_bytes.size();
    status = file->get_info(file.get(), &file_info_guid, &info_size, info_bytes.data());
    if (failed(status) || info_size < sizeof(FileInfo)) {
        return Error(Code::io, "the file's length cannot be read (status); check the file system", success, status);
    }
    FileInfo info{};
    std::memcpy(&info, info_bytes.data(), sizeof info);
    if ((info.attributes & attribute_directory) != 0) {
        return Error(Code::bad_argument, "expected a file, seen a directory of that name; replace it by a text file");
    }

    // Never ask for more than the file holds: not every firmware truncates a longer read.
    const usize wanted = static_cast<usize>(std::min<u64>(into.size(), info.file_size));
    usize size = 0;
    while (size < wanted) {
        u64 chunk = wanted - size;
        status = file->read(file.get(), &chunk, into.data() + size);
        if (failed(status) || chunk > wanted - size) {
            return Error(Code::io, "the file cannot be read (status); check the disk", success, status);
        }
        if (chunk == 0) {
            return Error(Code::io, "the file ends before its length (bytes); check the file system", info.file_size,
                         size);
        }
        size += chunk;
    }
    return std::optional(into.first(size));
}

u64 find_rsdp(const SystemTable& system) {
    const u64 newer = find_table(system, acpi20_guid);
    return newer != 0 ? newer : find_table(system, acpi10_guid);
}

u64 find_smbios(const SystemTable& system) {
    const u64 newer = find_table(system, smbios3_guid);
    return newer != 0 ? newer : find_table(system, smbios_guid);
}

Framebuffer find_framebuffer(const BootServices& boot) {
    void* interface = nullptr;
    if (failed(boot.locate_protocol(&graphics_guid, nullptr, &interface)) || interface == nullptr) {
        return {};
    }
    const GraphicsMode* mode = static_cast<Graphics*>(interface)->mode;
    if (mode == nullptr || mode->info == nullptr || mode->framebuffer == 0) {
        return {};
    }
    const GraphicsInfo info = *mode->info;
    if (info.format != PixelFormat::red_first && info.format != PixelFormat::blue_first) {
        return {};
    }
    const u64 pitch = u64{info.pixels_per_line} * 4;
    if (info.width == 0 || info.height == 0 || info.pixels_per_line < info.width || pitch > ~u32{0} ||
        pitch * info.height > mode->framebuffer_size) {
        return {}; // the mode exceeds its own framebuffer: rather none than drawing over other memory
    }
    return {mode->framebuffer, info.width, info.height, static_cast<u32>(pitch),
            info.format == PixelFormat::blue_first ? 1u : 0u};
}

} // namespace fl::boot::uefi
