module;
#include <cerrno>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
module vmm.image;
import host.std;
import core.result;

namespace fl::vmm {

Result<std::unique_ptr<Image>> Image::open(const std::string& path, bool read_only) {
    std::unique_ptr<Image> image{new Image};
    image->file_ = ::open(path.c_str(), (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
    if (image->file_ < 0) {
        return Error{Code::not_found, "the image cannot be opened; the value is errno", 0, static_cast<u64>(errno)};
    }
    struct stat found{};
    if (fstat(image->file_, &found) != 0 || found.st_size < 512 || found.st_size % 512 != 0) {
        return Error{Code::bad_argument, "an image of whole sectors of 512 bytes was expected", 512,
                     static_cast<u64>(found.st_size)};
    }
    image->read_only_ = read_only;
    const auto size = static_cast<usize>(found.st_size);
    void* const mapped =
        mmap(nullptr, size, PROT_READ | PROT_WRITE, read_only ? MAP_PRIVATE : MAP_SHARED, image->file_, 0);
    if (mapped == MAP_FAILED) {
        return Error{Code::exhausted, "mmap of the image failed; the values are its size and errno", size,
                     static_cast<u64>(errno)};
    }
    // Populate now rather than during a measurement; failure has no other effect.
    madvise(mapped, size, MADV_POPULATE_WRITE);
    image->bytes_ = {static_cast<std::byte*>(mapped), size};
    return image;
}

Image::~Image() {
    if (!bytes_.empty()) {
        munmap(bytes_.data(), bytes_.size());
    }
    if (file_ >= 0) {
        close(file_);
    }
}

bool Image::flush() { return read_only_ || fdatasync(file_) == 0; }

Result<std::span<const std::byte>> whole_file(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) {
        return Error{Code::not_found, "the file cannot be opened; the value is errno", 0, static_cast<u64>(errno)};
    }
    struct stat found{};
    void* mapped = MAP_FAILED;
    if (fstat(file, &found) == 0 && S_ISREG(found.st_mode) && found.st_size > 0) {
        mapped = mmap(nullptr, static_cast<usize>(found.st_size), PROT_READ, MAP_PRIVATE, file, 0);
    }
    close(file);
    if (mapped == MAP_FAILED) {
        return Error{Code::bad_argument, "a regular, non-empty file was expected"};
    }
    return std::span{static_cast<const std::byte*>(mapped), static_cast<usize>(found.st_size)};
}

} // namespace fl::vmm
