// The page tables under which the loader enters the kernel, four levels deep. They live until the kernel has built its
// own: everything is present and writable, nothing is protected.
export module boot.uefi.paging;
import core.std;
import core.result;
import boot.uefi.memory_map;

export namespace fl::boot::uefi {

inline constexpr u64 small_page = 4096;
inline constexpr u64 large_page = u64{2} << 20;
inline constexpr u64 huge_page = u64{1} << 30;

/// Builds tables [SDM-3A §4.5] in memory that it is given; does not own it.
class PageTables {
  public:
    /// `memory` holds whole tables of 512 entries, which are cleared; it stands at the physical address `physical`, a
    /// multiple of 4096.
    static Result<PageTables> create(std::span<u64> memory, u64 physical);

    /// How many tables the windows and an image of that size (mapped inside one GiB of its own) take at most.
    static u64 tables_needed(std::span<const Window> windows, bool huge_pages);

    /// Maps with 2 MiB pages, or with 1 GiB pages wherever all three values are multiples of it and `huge_pages` (the
    /// processor has them: CPUID 0x80000001 EDX bit 26). All values are multiples of 2 MiB. Mapping the same address
    /// twice is an error.
    Result<void> map(u64 virtual_address, u64 physical, u64 size, bool huge_pages);

    /// What goes into CR3.
    u64 root() const { return physical_; }
    u64 tables_used() const { return used_; }

  private:
    PageTables(std::span<u64> memory, u64 physical) : memory_(memory), physical_(physical) {}
    // The table that the entry points to, made when there is none yet; an index into memory_.
    Result<usize> below(usize entry);

    std::span<u64> memory_;
    u64 physical_;
    u64 used_ = 1; // the root
};

} // namespace fl::boot::uefi
