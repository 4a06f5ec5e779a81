// A raw disk image: a file, mapped, so that a transfer is a copy. IDE and VMBus may hold the same one: a machine with
// both has one disk.
export module vmm.image;
import host.std;
import core.result;

export namespace fl::vmm {

class Image {
  public:
    /// A file of at least one sector of 512 bytes, in whole sectors. Error{not_found}, Error{bad_argument}.
    static Result<std::unique_ptr<Image>> open(const std::string& path, bool read_only);
    ~Image();
    Image(const Image&) = delete;

    u64 size() const { return bytes_.size(); } // bytes, a multiple of 512
    bool read_only() const { return read_only_; }
    /// All of it. Stores to a read-only image's bytes are lost.
    std::span<std::byte> bytes() const { return bytes_; }
    /// What was stored is in the file. False: the system reports an error.
    bool flush();

  private:
    Image() = default;
    int file_ = -1;
    bool read_only_ = false;
    std::span<std::byte> bytes_{};
};

/// A whole file, mapped privately: kernel, initrd. Kept to the end of the process.
Result<std::span<const std::byte>> whole_file(const std::string& path);

} // namespace fl::vmm
