// The pages of one queue that its back end may access: two rings, frames to be sent, frames received. They stay granted
// as long as the device is connected (docs/decisions/0011): no grant operation per frame, and the back end never sees
// other memory.
export module drivers.xen_net.pages;
import core.std;
import core.result;
import core.dma;
import hv.xen.grants;

export namespace fl::drivers::xen_net {

class Pages {
  public:
    static constexpr u32 chunk_pages = 32; // physically contiguous
    static constexpr u32 max_pages = 128;

    explicit Pages(hv::xen::Grants& grants) : grants_(grants) {}
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    /// Does not free pages that were not reclaimed.
    ~Pages();

    /// Allocates zeroed pages and grants them: `wanted` (a power of two, at most max_pages), or half as many, and so
    /// on, if memory or grants are short. Error{exhausted}: not even `least`. Again after reclaim().
    Result<void> open(u32 wanted, u32 least, hv::xen::Domain domain, bool read_only, DmaAllocator& dma);
    inline u32 size() const { return size_; }
    inline std::byte* data(u32 page) const {
        return chunks_[page / chunk_pages].data() + page % chunk_pages * page_size;
    }
    inline DmaSpan span(u32 page) const {
        return chunks_[page / chunk_pages].span().subspan(page % chunk_pages * static_cast<u32>(page_size),
                                                          static_cast<u32>(page_size));
    }
    inline hv::xen::GrantRef grant(u32 page) const { return refs_[page]; }

    /// Ends the access and frees the pages. Those that the back end has mapped nevertheless are never reused.
    void reclaim();
    /// Gives the pages up: the back end may access them for ever.
    void abandon();

  private:
    hv::xen::Grants& grants_;
    u32 size_ = 0;
    std::array<DmaBuffer, max_pages / chunk_pages> chunks_;
    std::array<hv::xen::GrantRef, max_pages> refs_{};
};

} // namespace fl::drivers::xen_net
