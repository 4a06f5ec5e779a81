// A raw disk image: a mapped file, so that a transfer is a copy. IDE and VMBus may share one: the emulated and the
// synthetic disk are then the same.
export module vmm.image;
import host.std;
import core.result;

export namespace fl::vmm {

class Image {
  public:
    /// The file's size must be a non-zero multiple of 512 bytes. Error{not_found}, Error{bad_argument}.
    static Result<std::unique_ptr<Image>> open(const std::string& path, bool read_only);
    ~Image();
    Image(const Image&) = delete;

    u64 size() const { return bytes_.size(); } // bytes, a multiple of 512
    bool read_only() const { return read_only_; }
    int file() const { return file_; }
    /// The whole image. Stores to a read-only image do not reach the file.
    std::span<std::byte> bytes() const { return bytes_; }
    /// Writes all stores to the file. False: the system reported an error.
    bool flush();

  private:
    Image() = default;
    int file_ = -1;
    bool read_only_ = false;
    std::span<std::byte> bytes_{};
};

/// A whole file, mapped privately: kernel, initrd. Mapped until the process ends.
Result<std::span<const std::byte>> whole_file(const std::string& path);

} // namespace fl::vmm
