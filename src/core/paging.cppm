// Four-level page tables [SDM-3 4.5]: the logic only. The caller supplies table memory and access to it.
export module core.paging;
import core.std;
import core.result;

export namespace fl {

/// Access rights of a mapping. Every mapping is readable.
struct Protection {
    bool write = false;
    bool execute = false;
    bool uncached = false; // for device registers: strongly ordered, not cached
    friend constexpr bool operator==(const Protection&, const Protection&) = default;
};

/// Memory for page tables.
class TableMemory {
  public:
    /// The physical address of a zeroed frame.
    virtual Result<u64> new_table() = 0;
    /// The 512 entries of a table from new_table(), given its physical address.
    virtual u64* view(u64 physical) = 0;
    /// A present entry for `address` has changed: invalidate the TLB.
    virtual void invalidate(u64 address) { static_cast<void>(address); }

  protected:
    ~TableMemory() = default;
};

/// Features of the processor that affect page tables.
struct PagingFeatures {
    bool no_execute = false;         // EFER.NXE is set; otherwise all pages are executable
    bool gigabyte_pages = false;     // CPUID 0x80000001 EDX 26
    u64 physical_end = u64{1} << 36; // end of physical addresses: CPUID 0x80000008
};

/// Result of AddressSpace::find().
struct Mapping {
    u64 physical; // of the address itself, not of its page
    u64 page;     // bytes: 4 KiB, 2 MiB, 1 GiB
    Protection protection;
};

class AddressSpace {
  public:
    constexpr explicit AddressSpace(TableMemory& memory) : memory_(memory) {}
    /// Call once, before any other function.
    Result<void> create(PagingFeatures features);
    u64 root() const { return root_; }

    /// Maps [address, address + size) to [physical, …) with the largest pages that fit. All three are multiples of 4
    /// KiB. Error{busy}: part of it is mapped already; Error{exhausted}: no memory for a table. On an error, none of it
    /// stays mapped.
    Result<void> map(u64 address, u64 physical, u64 size, Protection protection);
    /// Splits large pages that are only partly in the range. Error{not_found}: part of it is not mapped;
    /// Error{exhausted}: no memory for a table. On an error, no mapping changes. Page tables are not freed.
    Result<void> unmap(u64 address, u64 size);
    /// Changes the protection of mapped pages; rules and errors as for unmap().
    Result<void> protect(u64 address, u64 size, Protection protection);
    /// The mapping of an address; nothing if it is not mapped.
    std::optional<Mapping> find(u64 address) const;
    /// The number of bytes from `address` to the first mapped page, at most `size`; both are multiples of 4 KiB. Skips
    /// whole absent tables and steps over large pages.
    u64 unmapped(u64 address, u64 size) const;
    u64 physical_end() const { return features_.physical_end; }

  private:
    u64 leaf_bits(Protection protection) const;
    u64* entry_of(u64 address, u32& level) const;
    Result<void> check_mapped(u64 address, u64 size) const;
    Result<void> split_at(u64 address);
    Result<void> isolate(u64 address, u64 size);
    u64 map_some(u64 address, u64 physical, u64 size, u64 bits, std::optional<Error>& error);

    TableMemory& memory_;
    PagingFeatures features_{};
    u64 root_ = 0;
};

} // namespace fl
