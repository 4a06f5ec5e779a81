// The firmware's tables and protocols, as far as the loader uses them [UEFI-2.10]. Compiled only for the firmware's
// calling convention, so the function pointers can be called directly. Unused members are arrays of pointers named
// `unused`.
module;
#include <cstddef>
export module boot.uefi.protocol;
import core.std;

export namespace fl::boot::uefi {

/// EFI_STATUS: the top bit marks an error [UEFI-2.10 Appendix D].
using Status = u64;
inline constexpr u64 error_bit = u64{1} << 63;
inline constexpr Status success = 0;
inline constexpr Status load_error = error_bit | 1;
inline constexpr Status invalid_parameter = error_bit | 2;
inline constexpr Status unsupported = error_bit | 3;
inline constexpr Status buffer_too_small = error_bit | 5;
inline constexpr Status device_error = error_bit | 7;
inline constexpr Status out_of_resources = error_bit | 9;
inline constexpr Status not_found = error_bit | 14;
constexpr bool failed(Status status) { return (status & error_bit) != 0; }

using Handle = void*;

struct Guid {
    u32 a;
    u16 b;
    u16 c;
    std::array<u8, 8> d;
    friend constexpr bool operator==(const Guid&, const Guid&) = default;
};
static_assert(sizeof(Guid) == 16 && offsetof(Guid, b) == 4 && offsetof(Guid, c) == 6 && offsetof(Guid, d) == 8);

inline constexpr Guid loaded_image_guid{0x5b1b31a1, 0x9562, 0x11d2, {0x8e, 0x3f, 0x00, 0xa0, 0xc9, 0x69, 0x72, 0x3b}};
inline constexpr Guid file_system_guid{0x964e5b22, 0x6459, 0x11d2, {0x8e, 0x39, 0x00, 0xa0, 0xc9, 0x69, 0x72, 0x3b}};
inline constexpr Guid file_info_guid{0x09576e92, 0x6d3f, 0x11d2, {0x8e, 0x39, 0x00, 0xa0, 0xc9, 0x69, 0x72, 0x3b}};
inline constexpr Guid graphics_guid{0x9042a9de, 0x23dc, 0x4a38, {0x96, 0xfb, 0x7a, 0xde, 0xd0, 0x80, 0x51, 0x6a}};
inline constexpr Guid global_variable_guid{
    0x8be4df61, 0x93ca, 0x11d2, {0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c}};
inline constexpr Guid acpi20_guid{0x8868e871, 0xe4f1, 0x11d3, {0xbc, 0x22, 0x00, 0x80, 0xc7, 0x3c, 0x88, 0x81}};
inline constexpr Guid acpi10_guid{0xeb9d2d30, 0x2d88, 0x11d3, {0x9a, 0x16, 0x00, 0x90, 0x27, 0x3f, 0xc1, 0x4d}};
inline constexpr Guid smbios3_guid{0xf2fd1544, 0x9794, 0x4a2c, {0x99, 0x2e, 0xe5, 0xbb, 0xcf, 0x20, 0xe3, 0x94}};
inline constexpr Guid smbios_guid{0xeb9d2d31, 0x2d88, 0x11d3, {0x9a, 0x16, 0x00, 0x90, 0x27, 0x3f, 0xc1, 0x4d}};

/// EFI_TABLE_HEADER [UEFI-2.10 §4.2].
struct TableHeader {
    u64 signature;
    u32 revision;
    u32 header_size;
    u32 crc32;
    u32 reserved;
};
static_assert(sizeof(TableHeader) == 24 && offsetof(TableHeader, revision) == 8 &&
              offsetof(TableHeader, header_size) == 12);
static_assert(offsetof(TableHeader, crc32) == 16 && offsetof(TableHeader, reserved) == 20);

/// EFI_SIMPLE_TEXT_OUTPUT_PROTOCOL [UEFI-2.10 §12.4].
struct TextOutput {
    void* reset;
    Status (*output_string)(TextOutput* self, const char16_t* text);
};
static_assert(sizeof(TextOutput) == 16 && offsetof(TextOutput, reset) == 0 && offsetof(TextOutput, output_string) == 8);

inline constexpr u32 allocate_max_address = 1; // EFI_ALLOCATE_TYPE [UEFI-2.10 §7.2.1]

/// EFI_BOOT_SERVICES [UEFI-2.10 §4.4].
struct BootServices {
    static constexpr u64 signature_value = 0x56524553544f4f42; // "BOOTSERV"

    TableHeader header;
    std::array<void*, 2> unused0; // task priorities
    Status (*allocate_pages)(u32 allocate, u32 memory_type, u64 pages, u64* address);
    void* free_pages;
    Status (*get_memory_map)(u64* size, void* map, u64* key, u64* stride, u32* version);
    std::array<void*, 11> unused1; // pools, events, protocol installation
    Status (*handle_protocol)(Handle handle, const Guid* protocol, void** interface);
    std::array<void*, 9> unused2; // handles, images
    Status (*exit_boot_services)(Handle image, u64 key);
    std::array<void*, 10> unused3; // time, drivers, open protocols
    Status (*locate_protocol)(const Guid* protocol, void* registration, void** interface);
    std::array<void*, 6> unused4;
};
static_assert(sizeof(BootServices) == 376);
static_assert(offsetof(BootServices, header) == 0 && offsetof(BootServices, unused0) == 24 &&
              offsetof(BootServices, allocate_pages) == 40);
static_assert(offsetof(BootServices, free_pages) == 48 && offsetof(BootServices, get_memory_map) == 56 &&
              offsetof(BootServices, unused1) == 64);
static_assert(offsetof(BootServices, handle_protocol) == 152 && offsetof(BootServices, unused2) == 160);
static_assert(offsetof(BootServices, exit_boot_services) == 232 && offsetof(BootServices, unused3) == 240);
static_assert(offsetof(BootServices, locate_protocol) == 320 && offsetof(BootServices, unused4) == 328);

/// EFI_RUNTIME_SERVICES [UEFI-2.10 §4.5], up to the last member in use.
struct RuntimeServices {
    TableHeader header;
    std::array<void*, 6> unused0; // time, address maps
    Status (*get_variable)(const char16_t* name, const Guid* vendor, u32* attributes, u64* size, void* data);
    std::array<void*, 3> unused1; // variables, monotonic count
    void (*reset_system)(u32 type, Status status, u64 data_size, void* data);
};
static_assert(sizeof(RuntimeServices) == 112 && offsetof(RuntimeServices, header) == 0 &&
              offsetof(RuntimeServices, unused0) == 24);
static_assert(offsetof(RuntimeServices, get_variable) == 72 && offsetof(RuntimeServices, unused1) == 80);
static_assert(offsetof(RuntimeServices, reset_system) == 104);
inline constexpr u32 reset_shutdown = 2; // EfiResetShutdown

/// EFI_CONFIGURATION_TABLE [UEFI-2.10 §4.6].
struct ConfigurationTable {
    Guid guid;
    u64 table; // physical address
};
static_assert(sizeof(ConfigurationTable) == 24 && offsetof(ConfigurationTable, guid) == 0 &&
              offsetof(ConfigurationTable, table) == 16);

/// EFI_SYSTEM_TABLE [UEFI-2.10 §4.3].
struct SystemTable {
    static constexpr u64 signature_value = 0x5453595320494249; // "IBI SYST"

    TableHeader header;
    const char16_t* vendor;
    u32 firmware_revision;
    u32 padding;
    Handle input_handle;
    void* input;
    Handle output_handle;
    TextOutput* output; // may be nullptr on a machine without a console
    Handle error_handle;
    TextOutput* error;
    RuntimeServices* runtime;
    BootServices* boot;
    u64 table_count;
    const ConfigurationTable* tables;
};
static_assert(sizeof(SystemTable) == 120);
static_assert(offsetof(SystemTable, header) == 0 && offsetof(SystemTable, vendor) == 24 &&
              offsetof(SystemTable, firmware_revision) == 32);
static_assert(offsetof(SystemTable, padding) == 36 && offsetof(SystemTable, input_handle) == 40 &&
              offsetof(SystemTable, input) == 48);
static_assert(offsetof(SystemTable, output_handle) == 56 && offsetof(SystemTable, output) == 64);
static_assert(offsetof(SystemTable, error_handle) == 72 && offsetof(SystemTable, error) == 80 &&
              offsetof(SystemTable, runtime) == 88);
static_assert(offsetof(SystemTable, boot) == 96 && offsetof(SystemTable, table_count) == 104 &&
              offsetof(SystemTable, tables) == 112);

/// EFI_LOADED_IMAGE_PROTOCOL [UEFI-2.10 §9.1].
struct LoadedImage {
    u32 revision;
    u32 padding0;
    Handle parent;
    SystemTable* system;
    Handle device; // the volume the image was loaded from; nullptr: none
    void* file_path;
    void* reserved;
    u32 load_options_size; // bytes
    u32 padding1;
    const std::byte* load_options;
    void* image_base;
    u64 image_size;
    u32 code_type;
    u32 data_type;
    void* unload;
};
static_assert(sizeof(LoadedImage) == 96);
static_assert(offsetof(LoadedImage, revision) == 0 && offsetof(LoadedImage, padding0) == 4 &&
              offsetof(LoadedImage, parent) == 8);
static_assert(offsetof(LoadedImage, system) == 16 && offsetof(LoadedImage, device) == 24 &&
              offsetof(LoadedImage, file_path) == 32);
static_assert(offsetof(LoadedImage, reserved) == 40 && offsetof(LoadedImage, load_options_size) == 48 &&
              offsetof(LoadedImage, padding1) == 52);
static_assert(offsetof(LoadedImage, load_options) == 56 && offsetof(LoadedImage, image_base) == 64 &&
              offsetof(LoadedImage, image_size) == 72);
static_assert(offsetof(LoadedImage, code_type) == 80 && offsetof(LoadedImage, data_type) == 84 &&
              offsetof(LoadedImage, unload) == 88);

inline constexpr u64 open_for_reading = 1;     // EFI_FILE_MODE_READ
inline constexpr u64 attribute_directory = 16; // EFI_FILE_DIRECTORY

/// EFI_FILE_PROTOCOL [UEFI-2.10 §13.5], revision 1.
struct File {
    u64 revision;
    Status (*open)(File* self, File** opened, const char16_t* name, u64 mode, u64 attributes);
    Status (*close)(File* self);
    void* remove;
    Status (*read)(File* self, u64* size, void* into); // size: in: capacity, out: bytes read; 0 at the end of the file
    void* write;
    std::array<void*, 2> position; // get, set
    Status (*get_info)(File* self, const Guid* kind, u64* size, void* into);
    std::array<void*, 2> unused; // set info, flush
};
static_assert(sizeof(File) == 88);
static_assert(offsetof(File, revision) == 0 && offsetof(File, open) == 8 && offsetof(File, close) == 16 &&
              offsetof(File, remove) == 24);
static_assert(offsetof(File, read) == 32 && offsetof(File, write) == 40 && offsetof(File, position) == 48);
static_assert(offsetof(File, get_info) == 64 && offsetof(File, unused) == 72);

/// EFI_FILE_INFO [UEFI-2.10 §13.5.16], without the name that follows.
struct FileInfo {
    u64 size; // of this structure and the name, bytes
    u64 file_size;
    u64 physical_size;
    std::array<u64, 6> times;
    u64 attributes;
};
static_assert(sizeof(FileInfo) == 80 && offsetof(FileInfo, size) == 0 && offsetof(FileInfo, file_size) == 8);
static_assert(offsetof(FileInfo, physical_size) == 16 && offsetof(FileInfo, times) == 24 &&
              offsetof(FileInfo, attributes) == 72);

/// EFI_SIMPLE_FILE_SYSTEM_PROTOCOL [UEFI-2.10 §13.4].
struct FileSystem {
    u64 revision;
    Status (*open_volume)(FileSystem* self, File** root);
};
static_assert(sizeof(FileSystem) == 16 && offsetof(FileSystem, revision) == 0 &&
              offsetof(FileSystem, open_volume) == 8);

enum class PixelFormat : u32 { red_first, blue_first, bit_mask, no_framebuffer }; // later versions may add more

/// EFI_GRAPHICS_OUTPUT_MODE_INFORMATION [UEFI-2.10 §12.9.2.1].
struct GraphicsInfo {
    u32 version;
    u32 width;
    u32 height;
    PixelFormat format;
    std::array<u32, 4> masks;
    u32 pixels_per_line;
};
static_assert(sizeof(GraphicsInfo) == 36 && offsetof(GraphicsInfo, version) == 0 && offsetof(GraphicsInfo, width) == 4);
static_assert(offsetof(GraphicsInfo, height) == 8 && offsetof(GraphicsInfo, format) == 12 &&
              offsetof(GraphicsInfo, masks) == 16);
static_assert(offsetof(GraphicsInfo, pixels_per_line) == 32);

/// EFI_GRAPHICS_OUTPUT_PROTOCOL_MODE [UEFI-2.10 §12.9.2].
struct GraphicsMode {
    u32 mode_count;
    u32 mode;
    const GraphicsInfo* info;
    u64 info_size;
    u64 framebuffer; // physical
    u64 framebuffer_size;
};
static_assert(sizeof(GraphicsMode) == 40 && offsetof(GraphicsMode, mode_count) == 0 &&
              offsetof(GraphicsMode, mode) == 4);
static_assert(offsetof(GraphicsMode, info) == 8 && offsetof(GraphicsMode, info_size) == 16 &&
              offsetof(GraphicsMode, framebuffer) == 24);
static_assert(offsetof(GraphicsMode, framebuffer_size) == 32);

/// EFI_GRAPHICS_OUTPUT_PROTOCOL [UEFI-2.10 §12.9.2].
struct Graphics {
    std::array<void*, 3> unused; // query, set, transfer
    const GraphicsMode* mode;
};
static_assert(sizeof(Graphics) == 32 && offsetof(Graphics, unused) == 0 && offsetof(Graphics, mode) == 24);

} // namespace fl::boot::uefi
