// The four-level page tables under which the loader enters the kernel. Used until the kernel has built its own;
// everything is present and writable, with no protection.
export module boot.uefi.paging;
import core.std;
import core.result;
import boot.uefi.memory_map;

export namespace fl::boot::uefi {

inline constexpr u64 small_page = 4096;
inline constexpr u64 large_page = u64{2} << 20;
inline constexpr u64 huge_page = u64{1} << 30;

/// Builds page tables [SDM-3A §4.5] in memory supplied by the caller, which keeps ownership.
class PageTables {
  public:
    /// `memory` holds whole tables of 512 entries, which are cleared. `physical`: its physical address, a multiple of
    /// 4096.
    static Result<PageTables> create(std::span<u64> memory, u64 physical);

    /// Upper bound on the tables needed for the windows plus an image of up to 1 GiB.
    static u64 tables_needed(std::span<const Window> windows, bool huge_pages);

    /// Maps with 2 MiB pages, or with 1 GiB pages where all three values are multiples of 1 GiB and `huge_pages` is set
    /// (processor support: CPUID 0x80000001 EDX bit 26). All values must be multiples of 2 MiB. Mapping an address
    /// twice is an error.
    Result<void> map(u64 virtual_address, u64 physical, u64 size, bool huge_pages);

    /// The value for CR3.
    u64 root() const { return physical_; }
    u64 tables_used() const { return used_; }

  private:
    PageTables(std::span<u64> memory, u64 physical) : memory_(memory), physical_(physical) {}
    // The table that the entry points to, allocated on demand; returns an index into memory_.
    Result<usize> below(usize entry);

    std::span<u64> memory_;
    u64 physical_;
    u64 used_ = 1; // the root
};

} // namespace fl::boot::uefi
