// Grant table, version 1: the pages that each other domain may read or write. A page stays accessible until its entry
// has been ended; an entry that the other domain still has mapped cannot be ended, and is quarantined instead of being
// reused.
export module hv.xen.grants;
import core.std;
import core.result;
export import hv.xen.protocol;

export namespace fl::hv::xen {

/// Grows a grant table: maps its frame number `frame` at its place in the memory that Grants::install() was given.
struct GrantGrowth {
    void* context = nullptr;
    Result<void> (*map)(void* context, u32 frame) = nullptr;
};

/// Entries of the grant table that one processor allocates and frees, last freed first. Which ones they are is the
/// matter of the classes below.
class GrantList {
  public:
    GrantList(const GrantList&) = delete;
    GrantList& operator=(const GrantList&) = delete;

    /// Entries that can be allocated now.
    inline u32 available() const { return free_count_; }
    /// Allocates an entry that grants nothing yet, without a check: the caller has checked available(). Cannot fail.
    inline GrantRef take_unchecked() { return refs_[--free_count_]; }
    /// Grants `domain` access to the guest frame, with one store. The entry must be allocated and not granted.
    inline void grant(GrantRef ref, Domain domain, u64 frame, bool read_only) {
        const GrantEntry entry{static_cast<u16>(grant_permit_access | (read_only ? grant_read_only : 0)), domain,
                               static_cast<u32>(frame)};
        // Release: the page's content before the permission. Pairs with Xen's read of the entry on behalf of the other
        // domain, which happens only after that domain has seen the reference in a ring that is published later still.
        std::atomic_ref<u64>(word(ref)).store(std::bit_cast<u64>(entry), std::memory_order_release);
    }
    /// Ends the access. True: no domain can access the page any more. False: it is still mapped, and stays granted; the
    /// caller must handle this.
    [[nodiscard]] inline bool end(GrantRef ref) {
        std::atomic_ref<u16> flags(table_[ref].flags);
        u16 seen = flags.load(std::memory_order_relaxed);
        if ((seen & (grant_reading | grant_writing)) != 0) [[unlikely]] {
            return false;
        }
        // Sequentially consistent: the other domain's writes to the page before it unmapped it are visible afterwards.
        // Pairs with Xen's clearing of the two bits when the last mapping goes. Nothing else in the entry changes: if
        // the exchange fails, the page has just been mapped.
        return flags.compare_exchange_strong(seen, 0, std::memory_order_seq_cst, std::memory_order_relaxed);
    }
    /// Whether another domain has the page mapped now.
    bool is_mapped(GrantRef ref) const {
        return (std::atomic_ref<u16>(table_[ref].flags).load(std::memory_order_relaxed) &
                (grant_reading | grant_writing)) != 0;
    }
    /// Frees an entry whose page no other domain can access (ended, or never granted).
    inline void recycle(GrantRef ref) { refs_[free_count_++] = static_cast<u16>(ref); }
    /// end() and recycle(); if end() fails, quarantines the entry. True: the page is safe to reuse.
    inline bool release(GrantRef ref) {
        if (end(ref)) [[likely]] {
            recycle(ref);
            return true;
        }
        quarantine(ref);
        return false;
    }
    /// Quarantines an entry that could not be ended.
    void quarantine(GrantRef ref) { refs_[room_ - ++quarantined_] = static_cast<u16>(ref); }
    /// Tries to end quarantined entries, a bounded number per call. For a tick.
    void sweep();
    u32 in_quarantine() const { return quarantined_; }

  protected:
    /// `refs`: room for all entries. From the first on the free ones, from the last on those in quarantine.
    explicit GrantList(std::span<u16> refs) : refs_(refs.data()), room_(static_cast<u32>(refs.size())) {}
    ~GrantList() = default;
    inline u64& word(GrantRef ref) { return *reinterpret_cast<u64*>(&table_[ref]); }
    GrantRef take_quarantined() { return refs_[room_ - quarantined_--]; }

    std::span<GrantEntry> table_;
    u16* refs_;
    u32 room_;
    u32 free_count_ = 0;
    u32 quarantined_ = 0;
    u32 next_sweep_ = 0;
};

/// The table, and its entries that no share has. For processor 0.
class Grants : public GrantList {
  public:
    /// 32768 entries: Xen's default limit (gnttab_max_frames). More are not used.
    static constexpr u32 max_frames = 64;
    static constexpr u32 capacity = max_frames * grants_per_frame;

    Grants() : GrantList(all_) {}
    /// `table`: room for whole frames, of which the first `frames` are mapped; `growth` maps the others, in order, when
    /// needed. Skips the reserved entries and those already in use (by a loader).
    void install(std::span<GrantEntry> table, u32 frames, const GrantGrowth& growth = {});
    bool installed() const { return frames_ != 0; }

    /// Entries that can be allocated now or after growing the table.
    u32 obtainable() const { return free_count_ + (frame_limit_ - frames_) * grants_per_frame; }
    /// Grows the table until `count` entries are available. False: the limit is reached, or Xen refuses. Not for the
    /// I/O path.
    bool ensure(u32 count);
    /// Allocates an entry that grants nothing yet. Grows the table. Error{exhausted}.
    Result<GrantRef> take();
    /// Frames of the table that are mapped.
    u32 frames() const { return frames_; }
    /// Entries that are allocated: granted, in a share, in quarantine, or given up with the memory of a back end that
    /// kept it.
    u32 in_use() const { return usable_ - free_count_; }

  private:
    friend class GrantShare;
    void add_frame(u32 frame);

    GrantGrowth growth_;
    u32 frames_ = 0; // mapped
    u32 frame_limit_ = 0;
    u32 usable_ = 0; // entries of the mapped frames that were free when their frame was mapped
    std::array<u16, capacity> all_;
};
static_assert(Grants::capacity <= 1u << 16);

/// Some of the table's entries, for one processor. grow() and give_back() are for processor 0, while that one does not
/// use the share; nothing else of it touches the table's list.
class GrantShare : public GrantList {
  public:
    static constexpr u32 capacity = 512;

    explicit GrantShare(Grants& from) : GrantList(all_), from_(from) {}
    /// Takes entries until the share has `count`, at most `capacity`. False: the table has too few, and some more or
    /// none have been taken.
    bool grow(u32 count);
    /// Gives all of them back, of which none is granted except those in quarantine.
    void give_back();
    /// Entries of the share.
    u32 size() const { return size_; }

  private:
    Grants& from_;
    u32 size_ = 0;
    std::array<u16, capacity> all_;
};

} // namespace fl::hv::xen
