// Memory that a driver shares with a fake host, for fuzz targets. Include after the imports, of which core.dma must be
// one.
#pragma once

namespace fuzz {
using namespace fl;

/// Each allocation by itself, so that AddressSanitizer finds an access outside of it; zeroed, aligned as rings require.
/// Bus addresses are not used twice.
class Blocks final : public DmaAllocator {
  public:
    Result<DmaSpan> allocate(u32 size, u64) override {
        size = (size + 4095) / 4096 * 4096;
        auto memory = std::make_unique<std::byte[]>(size + 8);
        const DmaSpan span{memory.get(), next_, size};
        next_ += size;
        blocks_.push_back({span, std::move(memory)});
        return span;
    }
    void free(DmaSpan span) override {
        std::erase_if(blocks_, [&](const Block& block) { return block.span.bus == span.bus; });
    }
    /// nullptr: it is not allocated.
    std::byte* at(u64 bus) {
        for (const Block& block : blocks_) {
            if (bus >= block.span.bus && bus - block.span.bus < block.span.size) {
                return block.span.data + (bus - block.span.bus);
            }
        }
        return nullptr;
    }
    usize size() const { return blocks_.size(); }

  private:
    struct Block {
        DmaSpan span;
        std::unique_ptr<std::byte[]> memory;
    };
    std::vector<Block> blocks_;
    u64 next_ = 0x10000000;
};

template <class T>
T& word(std::byte* at, usize offset = 0) {
    return *reinterpret_cast<T*>(at + offset);
}

} // namespace fuzz
