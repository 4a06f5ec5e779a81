// Page tables of four levels [SDM-3 4.5]. The logic alone: where tables come from and how they are reached is the
// caller's.
export module core.paging;
import core.std;
import core.result;

export namespace fl {

/// What an address may be used for. Every mapping can be read.
struct Protection {
    bool write = false;
    bool execute = false;
    bool uncached = false; // for device registers: strong order, no cache
    friend constexpr bool operator==(const Protection&, const Protection&) = default;
};

/// The memory that page tables live in.
class TableMemory {
  public:
    /// A frame of zeroes.
    virtual Result<u64> new_table() = 0;
    /// The 512 entries of the table at a physical address that came from new_table().
    virtual u64* view(u64 physical) = 0;
    /// An entry that was present has changed: forget what the processor knows about this address.
    virtual void invalidate(u64 address) { static_cast<void>(address); }

  protected:
    ~TableMemory() = default;
};

struct PagingFeatures {
    bool no_execute = false;         // EFER.NXE is set; without it everything is executable
    bool gigabyte_pages = false;     // CPUID 0x80000001 EDX 26
    u64 physical_end = u64{1} << 36; // no address at or above it: CPUID 0x80000008
};

struct Mapping {
    u64 physical; // of the address itself
    u64 page;     // bytes: 4 KiB, 2 MiB, 1 GiB
    Protection protection;
};

class AddressSpace {
  public:
    constexpr explicit AddressSpace(TableMemory& memory) : memory_(memory) {}
    /// Once, first.
    Result<void> create(PagingFeatures features);
    u64 root() const { return root_; }

    /// Maps [address, address + size) to [physical, …) with the largest pages that fit. All three are multiples of 4
    /// KiB. Error{busy}: part of it is mapped already; Error{exhausted}: no table. Then nothing of it stays mapped.
    Result<void> map(u64 address, u64 physical, u64 size, Protection protection);
    /// Large pages that lie only partly in the range are split first. Error{not_found}: something there is not mapped;
    /// Error{exhausted}: no table for a split. Then nothing has changed for the range's user. Tables stay where they
    /// are.
    Result<void> unmap(u64 address, u64 size);
    /// Changes the protection of what is mapped, under the rules of unmap().
    Result<void> protect(u64 address, u64 size, Protection protection);
    std::optional<Mapping> find(u64 address) const;
    /// Of the `size` bytes from `address` on, both multiples of 4 KiB: how many there are before the first that is
    /// mapped. Looks at as few entries as there are tables and large pages.
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
