// The loader's calls against a firmware that does exactly what the UEFI specification promises and rejects everything
// else: some firmware is stricter than EDK II (rust-hypervisor-firmware fails a read that is longer than the file, and
// prints at most 128 characters).
#include "gtest_macros.hpp"
#include <cstdint>
#include <sys/mman.h>
import test.gtest;
import host.std;
import core.result;
import boot.handoff;
import boot.uefi.firmware;
import boot.uefi.memory_map;
import boot.uefi.protocol;
import boot.uefi.text;

namespace {
using namespace fl;
using namespace fl::boot;
using namespace fl::boot::uefi;

struct OpenedFile {
    File calls;
    std::string content;
    bool directory = false;
    u64 position = 0;
};

// Firmware calls have no context, so there is one global instance, recreated for each test.
struct Firmware {
    BootServices boot{};
    LoadedImage image{};
    FileSystem volume{};
    std::map<std::u16string, std::string> files;
    std::vector<OpenedFile*> open;
    std::vector<std::string> broken_rules;
    bool has_volume = true;
    u64 chunk = ~u64{0};  // maximum bytes per read
    u64 extra_length = 0; // bytes by which FileInfo overstates the length
    u64 descriptors = 20;
    u64 stride = 48; // longer than today's descriptor, as the specification allows
    u32 version = 1;
    u64 key = 1;
    u64 grows_by = 0; // descriptors added at the next map request
    int exits_to_fail = 0;
    bool exit_was_tried = false;
    bool left = false;

    void rule(bool kept, const char* what) {
        if (!kept) {
            broken_rules.push_back(what);
        }
    }
};
Firmware* fw = nullptr;

Status allocate_pages(u32 allocate, u32, u64 pages, u64* address) {
    fw->rule(!fw->exit_was_tried || fw->left, "memory after ExitBootServices was tried");
    fw->rule(allocate == 1 && *address < (u64{1} << 32), "AllocateMaxAddress below 4 GiB");
    void* memory =
        mmap(nullptr, (pages + 1) * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    if (memory == MAP_FAILED) {
        return out_of_resources;
    }
    *address = reinterpret_cast<u64>(memory) + 4096;
    std::memset(static_cast<char*>(memory) + 4096, 0xcc, pages * 4096);
    ++fw->key;
    ++fw->descriptors;
    return success;
}

Status get_memory_map(u64* size, void* map, u64* key, u64* stride, u32* version) {
    fw->descriptors += std::exchange(fw->grows_by, 0);
    const u64 needed = fw->descriptors * fw->stride;
    *stride = fw->stride;
    *version = fw->version;
    if (*size < needed) {
        *size = needed;
        return buffer_too_small;
    }
    fw->rule(map != nullptr, "a map without memory for it");
    *size = needed;
    *key = fw->key;
    std::memset(map, 0, needed);
    for (u64 i = 0; i < fw->descriptors; ++i) {
        const MemoryDescriptor d{7, 0, i * 0x100000, 0, 16, 0};
        std::memcpy(static_cast<std::byte*>(map) + i * fw->stride, &d, sizeof d);
    }
    return success;
}

Status exit_boot_services(Handle, u64 key) {
    fw->exit_was_tried = true;
    if (fw->exits_to_fail > 0) {
        --fw->exits_to_fail;
        ++fw->key; // a timer handler has allocated memory
        return invalid_parameter;
    }
    fw->left = key == fw->key;
    return fw->left ? success : invalid_parameter;
}

Status close_file(File* self) {
    auto* file = reinterpret_cast<OpenedFile*>(self);
    fw->rule(std::erase(fw->open, file) == 1, "a file is closed once");
    delete file;
    return success;
}

Status read_from(File* self, u64* size, void* into) {
    auto* file = reinterpret_cast<OpenedFile*>(self);
    fw->rule(!file->directory, "a directory is not read");
    const u64 left = file->content.size() - file->position;
    if (*size > left + fw->extra_length) {
        return device_error;
    }
    *size = std::min({*size, left, fw->chunk});
    std::memcpy(into, file->content.data() + file->position, *size);
    file->position += *size;
    return success;
}

Status get_info(File* self, const Guid* kind, u64* size, void* into) {
    auto* file = reinterpret_cast<OpenedFile*>(self);
    fw->rule(*kind == file_info_guid, "EFI_FILE_INFO");
    constexpr u64 needed = sizeof(FileInfo) + 2 * 12;
    if (*size < needed) {
        *size = needed;
        return buffer_too_small;
    }
    FileInfo info{};
    info.size = needed;
    info.file_size = file->content.size() + fw->extra_length;
    info.attributes = file->directory ? attribute_directory : 0;
    std::memcpy(into, &info, sizeof info);
    *size = needed;
    return success;
}

OpenedFile* opened(std::string content) {
    auto* file = new OpenedFile{};
    file->calls.close = close_file;
    file->calls.read = read_from;
    file->calls.get_info = get_info;
    file->directory = content == "/";
    file->content = std::move(content);
    fw->open.push_back(file);
    return file;
}

Status open_file(File*, File** into, const char16_t* name, u64 mode, u64) {
    fw->rule(mode == 1 && name[0] == u'\\', "an absolute name, opened for reading");
    const auto found = fw->files.find(name);
    if (found == fw->files.end()) {
        return not_found;
    }
    *into = &opened(found->second)->calls;
    return success;
}

Status open_volume(FileSystem*, File** root) {
    OpenedFile* file = opened("/");
    file->calls.open = open_file;
    *root = &file->calls;
    return success;
}

Status handle_protocol(Handle, const Guid* protocol, void** interface) {
    if (*protocol == file_system_guid && fw->has_volume) {
        *interface = &fw->volume;
        return success;
    }
    return unsupported;
}

struct UefiFirmware : testing::Test {
    Firmware firmware;
    void SetUp() override {
        fw = &firmware;
        firmware.boot.allocate_pages = allocate_pages;
        firmware.boot.get_memory_map = get_memory_map;
        firmware.boot.exit_boot_services = exit_boot_services;
        firmware.boot.handle_protocol = handle_protocol;
        firmware.volume.open_volume = open_volume;
        firmware.image.device = &firmware;
    }
    void TearDown() override {
        EXPECT_EQ(firmware.broken_rules, std::vector<std::string>{});
        EXPECT_TRUE(firmware.open.empty()) << "files left open";
        fw = nullptr;
    }
    Result<std::optional<std::span<char>>> read(std::span<char> into) {
        return read_file(firmware.boot, firmware.image, u"\\firstlight\\cmdline.txt", into);
    }
};

TEST_F(UefiFirmware, ReadsNoMoreThanTheFileHolds) {
    for (const usize size : {0u, 1u, 511u, 512u, 513u, 4095u, 4096u, 4097u, 5000u}) {
        for (const u64 chunk : {u64{1}, u64{512}, ~u64{0}}) {
            std::string text(size, 'x');
            for (usize i = 0; i < size; ++i) {
                text[i] = static_cast<char>('a' + i % 26);
            }
            firmware.chunk = chunk;
            firmware.files[u"\\firstlight\\cmdline.txt"] = text;
            std::array<char, 4097> storage{};
            const auto file = read(storage);
            ASSERT_TRUE(file) << size << ", " << chunk << ": " << file.error().message;
            ASSERT_TRUE(*file);
            EXPECT_EQ(std::string((*file)->data(), (*file)->size()), text.substr(0, 4097));
        }
    }
}

TEST_F(UefiFirmware, FilesThatAreNot) {
    std::array<char, 64> storage{};
    auto file = read(storage);
    ASSERT_TRUE(file);
    EXPECT_FALSE(*file) << "no such file";
    firmware.has_volume = false;
    file = read(storage);
    ASSERT_TRUE(file);
    EXPECT_FALSE(*file) << "a device without a file system";
    firmware.has_volume = true;
    firmware.image.device = nullptr;
    file = read(storage);
    ASSERT_TRUE(file);
    EXPECT_FALSE(*file) << "loaded from the network";
    firmware.image.device = &firmware;
    firmware.files[u"\\firstlight\\cmdline.txt"] = "/";
    file = read(storage);
    ASSERT_FALSE(file);
    EXPECT_EQ(file.error().code, Code::bad_argument) << "a directory";
    firmware.files[u"\\firstlight\\cmdline.txt"] = "job=boot";
    firmware.extra_length = 3;
    file = read(storage);
    ASSERT_FALSE(file) << "a file that ends early is not taken for a whole one";
    EXPECT_EQ(file.error().code, Code::io);
}

TEST_F(UefiFirmware, MemoryIsAlignedAndZero) {
    for (const u64 alignment : {u64{4096}, u64{2} << 20}) {
        const auto memory = allocate(firmware.boot, 3 * 4096 + 1, alignment, MemoryType::loader_data);
        ASSERT_TRUE(memory);
        EXPECT_EQ(reinterpret_cast<u64>(memory->data()) % alignment, 0u);
        EXPECT_TRUE(std::ranges::all_of(*memory, [](std::byte b) { return b == std::byte{0}; }));
    }
}

TEST_F(UefiFirmware, DescriptorsOfALaterVersion) {
    firmware.version = 2;
    firmware.stride = 64;
    auto map = MemoryMap::create(firmware.boot);
    ASSERT_TRUE(map);
    EXPECT_EQ(map->stride(), 64u);
    EXPECT_EQ(map->bytes().size(), firmware.descriptors * 64);
    BootInfo* info = new BootInfo{};
    EXPECT_TRUE(add_memory_map(*info, map->bytes(), map->stride()));
    EXPECT_EQ(info->memory().size(), firmware.descriptors);
    delete info;
    firmware.stride = 39;
    EXPECT_FALSE(MemoryMap::create(firmware.boot));
}

TEST_F(UefiFirmware, LeavesWithTheKeyOfTheLastMap) {
    for (const int failures : {0, 1, 7}) {
        firmware.exit_was_tried = firmware.left = false;
        firmware.exits_to_fail = failures;
        auto map = MemoryMap::create(firmware.boot);
        ASSERT_TRUE(map);
        EXPECT_TRUE(leave_boot_services(firmware.boot, nullptr, *map)) << failures;
        EXPECT_TRUE(firmware.left);
        firmware.exit_was_tried = false;
    }
    firmware.exits_to_fail = 1000;
    auto map = MemoryMap::create(firmware.boot);
    ASSERT_TRUE(map);
    EXPECT_FALSE(leave_boot_services(firmware.boot, nullptr, *map)) << "not for ever";
    EXPECT_GT(firmware.exits_to_fail, 900);
}

TEST_F(UefiFirmware, AMapThatGrowsFindsRoomOnlyBeforeTheFirstTry) {
    auto map = MemoryMap::create(firmware.boot);
    ASSERT_TRUE(map);
    firmware.grows_by = 500;
    ASSERT_TRUE(leave_boot_services(firmware.boot, nullptr, *map));
    EXPECT_TRUE(firmware.left);
    EXPECT_EQ(map->bytes().size(), firmware.descriptors * firmware.stride);

    firmware.exit_was_tried = firmware.left = false;
    auto second = MemoryMap::create(firmware.boot);
    ASSERT_TRUE(second);
    firmware.boot.exit_boot_services = [](Handle, u64) -> Status {
        fw->exit_was_tried = true;
        fw->grows_by = 500;
        return invalid_parameter;
    };
    EXPECT_FALSE(leave_boot_services(firmware.boot, nullptr, *second)) << "and allocates nothing (a broken rule else)";
}

TEST_F(UefiFirmware, TablesThatAreThere) {
    SystemTable system{};
    EXPECT_EQ(find_rsdp(system), 0u);
    const ConfigurationTable tables[] = {{acpi10_guid, 0x1000}, {smbios_guid, 0x2000}, {acpi20_guid, 0x3000}};
    system.tables = tables;
    system.table_count = 3;
    EXPECT_EQ(find_rsdp(system), 0x3000u);
    EXPECT_EQ(find_smbios(system), 0x2000u);
    firmware.boot.locate_protocol = [](const Guid*, void*, void**) -> Status { return not_found; };
    EXPECT_EQ(find_framebuffer(firmware.boot).base, 0u);
}

// At most 127 characters per call, including the line end, followed by a terminator.
TEST_F(UefiFirmware, LinesGoOutInPieces) {
    for (const usize size : {0u, 1u, 124u, 125u, 126u, 127u, 128u, 250u, 252u, 253u, 400u, 1000u}) {
        std::string text(size, 'x');
        for (usize i = 0; i < size; ++i) {
            text[i] = static_cast<char>('a' + i % 26);
        }
        std::string_view rest = text;
        std::string printed;
        bool last = false;
        int pieces = 0;
        while (!last) {
            OutputPiece piece;
            piece.fill(u'!');
            last = next_output_piece(rest, piece);
            const auto end = std::find(piece.begin(), piece.end(), u'\0');
            ASSERT_NE(end, piece.end()) << "a terminator";
            ASSERT_LE(end - piece.begin(), 127);
            printed.append(piece.begin(), end);
            ASSERT_LT(++pieces, 12);
        }
        EXPECT_EQ(printed, text + "\r\n") << size;
    }
    std::string_view odd = "\xc3\xa4\0b";
    odd = {odd.data(), 4};
    OutputPiece piece;
    EXPECT_TRUE(next_output_piece(odd, piece));
    EXPECT_EQ(std::u16string(piece.data()), u"???b\r\n");
}

} // namespace
