module core.paging;
import core.std;
import core.result;

namespace fl {

namespace {

constexpr u64 present = 1;
constexpr u64 writable = 1 << 1;
constexpr u64 write_through = 1 << 3;
constexpr u64 cache_disable = 1 << 4;
constexpr u64 large = 1 << 7; // in a page directory or page-directory-pointer table
constexpr u64 no_execute = u64{1} << 63;
constexpr u64 address_mask = 0x000ffffffffff000;
constexpr u64 small_page = 4096;

// Level 1 is the page table, level 4 the root. Bytes that an entry of a level covers:
constexpr u64 coverage(u32 level) { return small_page << (9 * (level - 1)); }
constexpr usize index(u64 address, u32 level) { return static_cast<usize>(address >> (12 + 9 * (level - 1)) & 511); }
constexpr bool canonical(u64 address) { return static_cast<u64>(static_cast<i64>(address << 16) >> 16) == address; }

Result<void> check_range(u64 address, u64 size) {
    if (size == 0 || address % small_page != 0 || size % small_page != 0) {
        return Error(Code::bad_argument, "paging: address and size must be multiples of 4096, and the size not 0");
    }
    if (size - 1 > ~u64{0} - address || !canonical(address) || !canonical(address + size - 1) ||
        (address ^ (address + size - 1)) >> 63 != 0) {
        return Error(Code::bad_argument, "paging: the range is not canonical");
    }
    return {};
}

} // namespace

Result<void> AddressSpace::create(PagingFeatures features) {
    features_ = features;
    auto root = memory_.new_table();
    if (!root) {
        return root.error();
    }
    root_ = *root;
    return {};
}

u64 AddressSpace::leaf_bits(Protection p) const {
    u64 bits = present;
    bits |= p.write ? writable : 0;
    bits |= p.uncached ? cache_disable | write_through : 0;
    bits |= !p.execute && features_.no_execute ? no_execute : 0;
    return bits;
}

// The entry that maps the address, and its level: a leaf, or the first one that is not present.
u64* AddressSpace::entry_of(u64 address, u32& level) const {
    u64* table = memory_.view(root_);
    for (level = 4;; --level) {
        u64* entry = &table[index(address, level)];
        if (level == 1 || (*entry & present) == 0 || (*entry & large) != 0) {
            return entry;
        }
        table = memory_.view(*entry & address_mask);
    }
}

// Fills consecutive entries of one table, as many as fit. Returns the bytes mapped (0 with an error).
u64 AddressSpace::map_some(u64 address, u64 physical, u64 size, u64 bits, std::optional<Error>& error) {
    u64* table = memory_.view(root_);
    u32 level = 4;
    const auto fits = [&](u32 at) {
        return at == 1 || ((at == 2 || (at == 3 && features_.gigabyte_pages)) &&
                           (address | physical) % coverage(at) == 0 && size >= coverage(at));
    };
    for (;;) {
        u64& entry = table[index(address, level)];
        // A table that an unmap has left empty is kept: use smaller pages in it.
        const bool is_table = level > 1 && (entry & present) != 0 && (entry & large) == 0;
        if (fits(level) && !is_table) {
            break;
        }
        if ((entry & present) == 0) {
            auto fresh = memory_.new_table();
            if (!fresh) {
                error = fresh.error();
                return 0;
            }
            entry = *fresh | present | writable;
        } else if ((entry & large) != 0) {
            error = Error(Code::busy, "paging: the address is mapped already", 0, address);
            return 0;
        }
        table = memory_.view(entry & address_mask);
        --level;
    }
    const u64 page = coverage(level);
    const u64 kind = level > 1 ? large : 0;
    u64 done = 0;
    for (usize i = index(address, level); i < 512 && size - done >= page; ++i, done += page) {
        if ((table[i] & present) != 0) {
            if (done == 0) {
                error = Error(Code::busy, "paging: the address is mapped already", 0, address);
            }
            return done;
        }
        table[i] = (physical + done) | bits | kind;
    }
    return done;
}

Result<void> AddressSpace::map(u64 address, u64 physical, u64 size, Protection protection) {
    if (auto checked = check_range(address, size); !checked) {
        return checked;
    }
    if (physical % small_page != 0 || physical >= features_.physical_end || size > features_.physical_end - physical) {
        return Error(Code::bad_argument, "paging: no such physical address on this processor", features_.physical_end,
                     physical);
    }
    const u64 bits = leaf_bits(protection);
    std::optional<Error> error;
    u64 done = 0;
    while (done < size) {
        const u64 step = map_some(address + done, physical + done, size - done, bits, error);
        if (error) {
            if (done != 0) {
                static_cast<void>(unmap(address, done)); // it was just mapped, so this cannot fail
            }
            return *error;
        }
        done += step;
    }
    return {};
}

Result<void> AddressSpace::check_mapped(u64 address, u64 size) const {
    if (auto checked = check_range(address, size); !checked) {
        return checked;
    }
    for (u64 done = 0; done < size;) {
        u32 level = 0;
        if ((*entry_of(address + done, level) & present) == 0) {
            return Error(Code::not_found, "paging: nothing is mapped there", 0, address + done);
        }
        done += coverage(level) - (address + done) % coverage(level);
    }
    return {};
}

// Splits large pages until a page begins at `address`, or nothing is mapped there.
Result<void> AddressSpace::split_at(u64 address) {
    if (!canonical(address)) { // the range ends at the end of a half of the address space
        return {};
    }
    for (;;) {
        u32 level = 0;
        u64& entry = *entry_of(address, level);
        if ((entry & present) == 0 || address % coverage(level) == 0) {
            return {};
        }
        auto fresh = memory_.new_table();
        if (!fresh) {
            return fresh.error();
        }
        const u64 part = coverage(level - 1);
        const u64 bits = (entry & ~address_mask & ~large) | (level - 1 > 1 ? large : 0);
        const u64 base = entry & address_mask & ~(coverage(level) - 1);
        u64* table = memory_.view(*fresh);
        for (u64 i = 0; i < 512; ++i) {
            table[i] = (base + i * part) | bits;
        }
        // One store: the translation is the same before and after. Invalidating any address in the large page removes
        // its TLB entry [SDM-3 4.10.4.1].
        entry = *fresh | present | writable;
        memory_.invalidate(address);
    }
}

// Checks that the range is mapped, and splits the pages that extend beyond it.
Result<void> AddressSpace::isolate(u64 address, u64 size) {
    if (auto checked = check_mapped(address, size); !checked) {
        return checked;
    }
    if (auto begin = split_at(address); !begin) {
        return begin;
    }
    return split_at(address + size);
}

Result<void> AddressSpace::unmap(u64 address, u64 size) {
    if (auto isolated = isolate(address, size); !isolated) {
        return isolated;
    }
    for (u64 done = 0; done < size;) {
        u32 level = 0;
        *entry_of(address + done, level) = 0;
        memory_.invalidate(address + done);
        done += coverage(level);
    }
    return {};
}

Result<void> AddressSpace::protect(u64 address, u64 size, Protection protection) {
    if (auto isolated = isolate(address, size); !isolated) {
        return isolated;
    }
    for (u64 done = 0; done < size;) {
        u32 level = 0;
        u64& entry = *entry_of(address + done, level);
        entry = (entry & address_mask) | leaf_bits(protection) | (level > 1 ? large : 0);
        memory_.invalidate(address + done);
        done += coverage(level);
    }
    return {};
}

std::optional<Mapping> AddressSpace::find(u64 address) const {
    if (!canonical(address)) {
        return std::nullopt;
    }
    u32 level = 0;
    const u64 entry = *entry_of(address, level);
    if ((entry & present) == 0) {
        return std::nullopt;
    }
    const u64 page = coverage(level);
    const u64 base = entry & address_mask & ~(page - 1);
    return Mapping{base + address % page,
                   page,
                   {(entry & writable) != 0, (entry & no_execute) == 0, (entry & cache_disable) != 0}};
}

u64 AddressSpace::unmapped(u64 address, u64 size) const {
    u64 done = 0;
    while (done < size) {
        u32 level = 0;
        if ((*entry_of(address + done, level) & present) != 0) {
            return done;
        }
        done += coverage(level) - (address + done) % coverage(level);
    }
    return size;
}

} // namespace fl
