// Helpers for the tests of the test host's devices. Include after the standard headers and gtest, and before any
// import.
#pragma once
#include <cstdint>
#include <stdlib.h>
#include <unistd.h>
import host.std;

namespace vmm_test {

/// A temporary file, removed by the destructor.
class File {
  public:
    explicit File(const std::vector<std::uint8_t>& bytes) {
        char name[] = "/tmp/firstlight-vmm-XXXXXX";
        close(mkstemp(name));
        path = name;
        std::ofstream(path, std::ios::binary)
            .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    }
    ~File() { unlink(path.c_str()); }
    File(const File&) = delete;
    std::vector<std::uint8_t> content() const {
        std::ifstream file(path, std::ios::binary);
        return {std::istreambuf_iterator<char>(file), {}};
    }
    std::string path;
};

/// Stores a little-endian value at an offset.
inline void put(std::vector<std::uint8_t>& to, std::size_t at, std::uint64_t value, std::size_t size) {
    for (std::size_t i = 0; i < size; ++i) {
        to.at(at + i) = static_cast<std::uint8_t>(value >> (8 * i));
    }
}

} // namespace vmm_test
