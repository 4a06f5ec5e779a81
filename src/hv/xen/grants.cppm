// The grant table, version 1: which pages which domain may read or write. A page stays reachable until its entry has
// been ended; an entry that the other domain still has mapped cannot be ended, and is set aside (quarantine) instead of
// being used again.
export module hv.xen.grants;
import core.std;
import core.result;
export import hv.xen.protocol;

export namespace fl::hv::xen {

/// How a grant table grows: makes its frame `frame` appear where it belongs in the memory that Grants::install() was
/// given.
struct GrantGrowth {
    void* context = nullptr;
    Result<void> (*map)(void* context, u32 frame) = nullptr;
};

class Grants {
  public:
    /// 32768 entries: what Xen gives a guest where nothing else is configured (gnttab_max_frames). More are not used.
    static constexpr u32 max_frames = 64;
    static constexpr u32 capacity = max_frames * grants_per_frame;

    /// `table`: room for whole frames, of which the first `frames` are mapped; `growth` maps the others, in order, when
    /// they are needed. The reserved entries are left as they are. Entries that are in use already (a loader's) are
    /// left out.
    void install(std::span<GrantEntry> table, u32 frames, const GrantGrowth& growth = {});
    bool installed() const { return frames_ != 0; }

    /// Entries that can be taken now.
    u32 available() const { return free_count_; }
    /// Entries that can be taken now or once the table has grown.
    u32 obtainable() const { return free_count_ + (frame_limit_ - frames_) * grants_per_frame; }
    /// Grows the table until `count` entries are available. False: they are not, and Xen gives no more. Not for the
    /// path of an I/O.
    bool ensure(u32 count);
    /// A free entry, nothing granted yet; the last one given back comes first. Grows the table. Error{exhausted}.
    Result<GrantRef> take();
    /// `count` free entries for one caller who has looked at available() first. Does not fail then.
    inline GrantRef take_unchecked() { return free_[--free_count_]; }
    /// Lets `domain` reach the guest frame. One store. The entry is one that was taken and is not granted.
    inline void grant(GrantRef ref, Domain domain, u64 frame, bool read_only) {
        const GrantEntry entry{static_cast<u16>(grant_permit_access | (read_only ? grant_read_only : 0)), domain,
                               static_cast<u32>(frame)};
        // Release: the page's content before the permission. Partner: Xen's read of the entry when the other domain
        // asks for it, which it does only after it has seen the reference in a ring that was published later still.
        std::atomic_ref<u64>(word(ref)).store(std::bit_cast<u64>(entry), std::memory_order_release);
    }
    /// Ends the access. True: nobody can reach the page any more. False: it is still mapped; the permission stays, and
    /// the caller decides.
    [[nodiscard]] bool end(GrantRef ref) {
        std::atomic_ref<u16> flags(table_[ref].flags);
        u16 seen = flags.load(std::memory_order_relaxed);
        if ((seen & (grant_reading | grant_writing)) != 0) [[unlikely]] {
            return false;
        }
        // Sequentially consistent: what the other domain wrote into the page before it let go is seen by what follows.
        // Partner: Xen's clearing of the two bits when the last mapping goes. Nobody changes anything else in the
        // entry: where the exchange fails, it has been mapped just now.
        return flags.compare_exchange_strong(seen, 0, std::memory_order_seq_cst, std::memory_order_relaxed);
    }
    /// Gives an entry back that nobody can reach (ended, or never granted).
    inline void give(GrantRef ref) { free_[free_count_++] = static_cast<u16>(ref); }
    /// end() and give(); where end() fails the entry goes into quarantine. True: the page is safe.
    inline bool release(GrantRef ref) {
        if (end(ref)) [[likely]] {
            give(ref);
            return true;
        }
        quarantine(ref);
        return false;
    }
    /// Sets an entry aside that could not be ended.
    void quarantine(GrantRef ref);
    /// Tries to end what is in quarantine; a bounded number of entries each time. For a tick.
    void sweep();
    u32 in_quarantine() const { return quarantined_; }

  private:
    u64& word(GrantRef ref) { return *reinterpret_cast<u64*>(&table_[ref]); }
    void add_frame(u32 frame);

    std::span<GrantEntry> table_;
    GrantGrowth growth_;
    u32 frames_ = 0; // mapped
    u32 frame_limit_ = 0;
    u32 free_count_ = 0;
    u32 quarantined_ = 0;
    u32 next_sweep_ = 0;
    std::array<u16, capacity> free_;              // the first free_count_ count
    std::array<u64, capacity / 64> quarantine_{}; // one bit each
};
static_assert(Grants::capacity <= 1u << 16);

} // namespace fl::hv::xen
