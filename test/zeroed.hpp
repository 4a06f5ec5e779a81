// Guest memory for fakes: zeroed, page-aligned, and untouched pages cost nothing. A vector would be filled byte by byte
// in an unoptimised build, such as the tests.
#pragma once

// Not the headers: parsed and merged with the module, they were a third of what such a test takes to compile.
import host.std;

class Zeroed {
  public:
    explicit Zeroed(std::size_t bytes) : whole_(std::calloc(1, bytes + page - 1), std::free), bytes_(bytes) {}
    std::byte* data() const {
        return reinterpret_cast<std::byte*>((reinterpret_cast<std::uintptr_t>(whole_.get()) + page - 1) & ~(page - 1));
    }
    std::size_t size() const { return bytes_; }
    std::span<std::byte> bytes() const { return {data(), bytes_}; }
    std::byte* begin() const { return data(); }
    std::byte* end() const { return data() + bytes_; }
    std::byte& operator[](std::size_t at) const { return data()[at]; }

  private:
    // calloc() must map large blocks anew: it clears what it takes from its heap, and free() would raise the limit.
    static inline const int large_blocks_are_mapped = mallopt(mmap_threshold, 6 * 1024 * 1024);
    static constexpr std::uintptr_t page = 4096;
    std::unique_ptr<void, decltype(&std::free)> whole_;
    std::size_t bytes_;
};
