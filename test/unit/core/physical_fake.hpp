// Physical memory made of pieces; addresses outside them cannot be read. Include after the standard headers and before
// any import of the test, which then derives its reader from it.
#pragma once
#include <cstddef>
#include <cstdint>
import host.std;

class Pieces {
  public:
    std::vector<std::uint8_t>& at(std::uint64_t base, std::size_t size) {
        auto& piece = pieces_[base];
        piece.assign(size, 0);
        return piece;
    }
    void put(std::uint64_t base, std::vector<std::uint8_t> bytes) { pieces_[base] = std::move(bytes); }
    void put_text(std::uint64_t base, std::string_view text) { pieces_[base].assign(text.begin(), text.end()); }
    std::vector<std::uint8_t>& operator[](std::uint64_t base) { return pieces_.at(base); }
    bool copy(std::uint64_t address, void* into, std::size_t size) const {
        auto piece = pieces_.upper_bound(address);
        if (piece == pieces_.begin()) {
            return false;
        }
        --piece;
        const std::uint64_t offset = address - piece->first;
        if (offset > piece->second.size() || size > piece->second.size() - offset) {
            return false;
        }
        std::memcpy(into, piece->second.data() + offset, size);
        return true;
    }

  private:
    std::map<std::uint64_t, std::vector<std::uint8_t>> pieces_;
};
