// Where the data of a disk's commands lies, and the back end's access to it. Without persistent grants each page of a
// request's buffer is granted for the duration of the command; with them the data is copied through bounce pages that
// stay granted. The segments of a command that needs more than fit into a ring slot are in an indirect page.
//
// Memory is allocated only until the disk is open; a command takes grants or bounce pages and gives them back. Each
// queue of a disk has pages of its own: what the disk may have is divided among them.
export module drivers.xen_blk.pages;
import core.std;
import core.result;
import core.dma;
import core.dma_mapper;
import hv.xen.grants;
import drivers.xen_blk.protocol;

export namespace fl::drivers::xen_blk {

/// The negotiated terms of access to the pages.
struct PageTerms {
    hv::xen::Domain domain = 0; // of the back end
    bool persistent = false;
    u32 indirect_segments = 0;   // per request; 0: none
    u32 wire_unit = wire_sector; // bytes per sector number in the ring: 512, or the disk's sector size
    u32 queues = 1;              // of the disk
};

/// The pages of one command; empty (no segments) initially and after release().
struct CommandPages {
    /// 128 KiB in one slot. A larger request takes another slot for each 128 KiB, so more segments would save little
    /// and cost grants for every slot.
    static constexpr u32 max_segments = 32;

    u8 segments = 0;
    bool indirect = false;                            // the segments are in an indirect page
    u16 indirect_page = 0;                            // its index, if so
    std::array<hv::xen::GrantRef, max_segments> refs; // for each segment; with persistent grants, its bounce page
};

/// The pages of one queue of a disk [xen-blkif]. The functions between a connection and the next (start_pool(), open(),
/// reclaim()) are for processor 0, which has the grant table, while no command is under way and none is taken; the
/// others for the processor of the queue. A queue on another processor takes the grants of its commands from a share.
class Pages {
  public:
    using Grant = hv::xen::GrantRef;
    static constexpr u32 max_segments = CommandPages::max_segments;
    static constexpr u32 max_indirect_pages = 64;
    static constexpr u32 max_pool_pages = 512;
    static constexpr u32 pool_chunk = max_segments; // initial size and growth of the pool in pages: fits any command
    /// Grants left to other disks, for their rings and for buffers without persistent grants.
    static constexpr u32 spare_grants = 64;
    static_assert(spare_grants >= max_segments);
    static constexpr u32 spare_bytes = 256 * 1024; // likewise for memory: rings, a job's buffers
    /// The least that a share has: any command fits.
    static constexpr u32 least_share = max_segments;
    static_assert(max_segments * 16 <= hv::xen::GrantShare::capacity);

    /// `first`: its queue is on processor 0, and takes from the table itself.
    Pages(hv::xen::Grants& grants, bool first = true)
        : grants_(grants), share_(grants), list_(first ? static_cast<hv::xen::GrantList&>(grants) : share_),
          first_(first) {}
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    /// Does not free the memory that the back end may still write: pages that were not reclaimed.
    ~Pages();

    /// Allocates the first bounce pages, for a disk that will offer persistent grants, and grants them to `domain`.
    /// False: not enough memory or grants. Call before open().
    bool start_pool(hv::xen::Domain domain, DmaAllocator& pool);
    /// Takes the least share of the grants, for a queue on another processor. False: there are not enough. Call before
    /// open().
    bool start_share();
    /// `sector_size`: of the disk, in bytes; a power of two. `requests`: the slots of the ring. Without enough grants
    /// or memory for them there are fewer bounce pages, and no indirect pages. Error{bad_argument}: persistent grants
    /// without a successful start_pool(). Before the functions below, and again after reclaim().
    Result<void> open(const PageTerms& terms, u32 sector_size, u32 requests, DmaAllocator& pool);

    inline bool persistent() const { return persistent_; }
    /// False: a segment cannot begin where `data` does. Its offset must be a multiple of the sector size.
    inline bool admits(DmaSpan data) const { return (data.bus & misalignment_) == 0; }
    /// Takes an indirect page if `data` needs one, and chooses the number of segments; fill() must follow before the
    /// next take(). Returns the number of bytes, from the start of `data`, that fit into the command; 0: no room now.
    /// `others`: other commands of the disk hold pages; `data` is then not shortened because pages are short, since
    /// the end of those commands frees some.
    inline u32 take(CommandPages& pages, DmaSpan data, bool others);
    /// Takes a grant or a bounce page for each segment, and describes it in `segments` (pages.segments elements).
    /// `data`: as many bytes as take() returned. `write`: the back end reads the data, which is copied to bounce
    /// pages here; otherwise it writes.
    inline void fill(CommandPages& pages, DmaSpan data, bool write, std::span<Segment> segments);
    /// The same for a command of one page without an indirect page: its segment. Not with persistent grants.
    inline Segment fill_one(CommandPages& pages, DmaSpan data, bool write);
    /// The segments of an indirect command, and the grant of their page.
    inline std::span<Segment> indirect_segments(const CommandPages& pages) {
        return {reinterpret_cast<Segment*>(indirect_data_ + pages.indirect_page * page_size), pages.segments};
    }
    inline Grant indirect_grant(const CommandPages& pages) const { return indirect_grants_[pages.indirect_page]; }

    /// Copies what the back end wrote to bounce pages. Only with persistent grants, before release().
    inline void copy_back(const CommandPages& pages, DmaSpan data) const;
    /// Gives back a command's grants, bounce pages and indirect page. False: the back end still has a page of the
    /// buffer mapped; that grant is quarantined.
    inline bool release(CommandPages& pages);
    inline bool release_all(CommandPages& pages);
    /// Ends the back end's access to the buffer of a command that it has not answered. The grant references are not
    /// reused before release(), because the back end may still process the request. False: it has a page mapped. Not
    /// with persistent grants: bounce pages stay accessible.
    bool end_access(const CommandPages& pages);
    /// Retries the quarantined grants. `waiting`: requests wait for room, so the grant table may have to grow.
    void tick(bool waiting);
    inline bool in_quarantine() const { return list_.in_quarantine() != 0; }
    /// The back end can no longer access anything: frees all grants and pages. Memory that it has mapped nevertheless
    /// is never reused.
    void reclaim();

  private:
    bool keep_spare(DmaAllocator& pool);
    bool add_pool_pages(DmaAllocator& pool);
    void close_pool();
    void open_indirect(u32 requests, u32 queues, DmaAllocator& pool);
    void abandon();

    hv::xen::Grants& grants_;
    hv::xen::GrantShare share_;
    hv::xen::GrantList& list_; // of the two: what commands take from
    bool first_;
    hv::xen::Domain domain_ = 0;
    bool persistent_ = false;
    u32 indirect_segments_ = 0; // per request
    u32 unit_shift_ = 9;        // from bytes to the wire's units
    u32 misalignment_ = 0;      // bits that are 0 in a segment's bus address
    u32 indirect_size_ = 0;
    u32 indirect_free_count_ = 0;
    std::byte* indirect_data_ = nullptr; // of indirect_memory_

    BouncePool<max_pool_pages, pool_chunk> pool_;
    std::array<Grant, max_pool_pages> pool_grants_{}; // indexed by the pool's page numbers

    DmaBuffer spare_memory_; // until the disk is open: reserves memory for other users
    DmaBuffer indirect_memory_;
    std::array<Grant, max_indirect_pages> indirect_grants_{};
    std::array<u16, max_indirect_pages> indirect_free_{};
};

// ---- once or twice per command: instantiated in disk.cpp, which is optimized for speed ----

[[gnu::always_inline]] inline u32 Pages::take(CommandPages& pages, DmaSpan data, bool others) {
    const u32 in_page = persistent_ ? 0 : static_cast<u32>(data.bus % page_size);
    if (!persistent_ && data.size <= page_size - in_page && list_.available() != 0) [[likely]] { // as found below
        pages.indirect = false;
        pages.segments = 1;
        return data.size;
    }
    const bool indirect = data.size + in_page > segments_in_slot * page_size && indirect_free_count_ != 0;
    const u32 most = indirect ? indirect_segments_ : segments_in_slot;
    u32 bytes = std::min(data.size, most * static_cast<u32>(page_size) - in_page);
    u32 count = (in_page + bytes + static_cast<u32>(page_size) - 1) / static_cast<u32>(page_size);
    if (const u32 free = persistent_ ? pool_.available() : list_.available(); count > free) [[unlikely]] {
        if (free == 0 || others) {
            return 0;
        }
        count = free; // other disks hold the rest, for an unbounded time
        bytes = count * static_cast<u32>(page_size) - in_page;
    }
    pages.indirect = indirect;
    if (indirect) {
        pages.indirect_page = indirect_free_[--indirect_free_count_];
    }
    pages.segments = static_cast<u8>(count);
    return bytes;
}

[[gnu::always_inline]] inline void Pages::fill(CommandPages& pages, DmaSpan data, bool write,
                                               std::span<Segment> segments) {
    u64 frame = data.bus / page_size;
    u32 in_page = persistent_ ? 0 : static_cast<u32>(data.bus % page_size);
    for (u32 i = 0; i < segments.size(); ++i) {
        const u32 bytes = std::min(data.size, static_cast<u32>(page_size) - in_page);
        Grant grant;
        if (!persistent_) [[likely]] {
            grant = list_.take_unchecked();
            list_.grant(grant, domain_, frame++, write);
            pages.refs[i] = grant;
        } else {
            const u16 page = pool_.take();
            pages.refs[i] = page;
            grant = pool_grants_[page];
            if (write) {
                std::memcpy(pool_.data(page), data.data, bytes);
                data.data += bytes;
            }
        }
        segments[i] = {grant, static_cast<u8>(in_page >> unit_shift_),
                       static_cast<u8>(((in_page + bytes) >> unit_shift_) - 1), 0};
        data.size -= bytes;
        in_page = 0;
    }
}

[[gnu::always_inline]] inline Segment Pages::fill_one(CommandPages& pages, DmaSpan data, bool write) {
    const u32 in_page = static_cast<u32>(data.bus % page_size);
    const Grant grant = list_.take_unchecked();
    list_.grant(grant, domain_, data.bus / page_size, write);
    pages.refs[0] = grant;
    return {grant, static_cast<u8>(in_page >> unit_shift_), static_cast<u8>(((in_page + data.size) >> unit_shift_) - 1),
            0};
}

[[gnu::always_inline]] inline void Pages::copy_back(const CommandPages& pages, DmaSpan data) const {
    for (u32 i = 0; i < pages.segments; ++i) {
        const u32 bytes = std::min(data.size, static_cast<u32>(page_size));
        std::memcpy(data.data, pool_.data(pages.refs[i]), bytes);
        data.data += bytes;
        data.size -= bytes;
    }
}

[[gnu::always_inline]] inline bool Pages::release(CommandPages& pages) {
    if (pages.segments == 1 && !pages.indirect && !persistent_) [[likely]] {
        pages.segments = 0;
        return list_.release(pages.refs[0]);
    }
    return release_all(pages);
}

[[gnu::noinline]] inline bool Pages::release_all(CommandPages& pages) {
    bool safe = true;
    if (pages.indirect) {
        indirect_free_[indirect_free_count_++] = pages.indirect_page;
    }
    for (u32 i = pages.segments; i-- > 0;) { // LIFO order keeps reusing the same few
        if (persistent_) {
            pool_.recycle(static_cast<u16>(pages.refs[i]));
        } else {
            safe = list_.release(pages.refs[i]) && safe;
        }
    }
    pages.segments = 0;
    pages.indirect = false;
    return safe;
}

} // namespace fl::drivers::xen_blk
