module;
#include "core/try.hpp"
module boot.uefi.paging;
import core.std;
import core.result;
import boot.uefi.memory_map;

namespace fl::boot::uefi {

namespace {
constexpr u64 entries = 512;
constexpr u64 present_writable = 3;
constexpr u64 page_size_bit = 0x80;
constexpr u64 address_mask = 0x000ffffffffff000;
} // namespace

Result<PageTables> PageTables::create(std::span<u64> memory, u64 physical) {
    if (memory.empty() || memory.size() % entries != 0) {
        return Error(Code::bad_argument, "page tables: expected whole tables of 512 entries", entries, memory.size());
    }
    if (physical % small_page != 0) {
        return Error(Code::bad_argument, "page tables: the address must be a multiple of 4096", 0,
                     physical % small_page);
    }
    std::fill(memory.begin(), memory.end(), u64{0});
    return PageTables(memory, physical);
}

u64 PageTables::tables_needed(std::span<const Window> windows, bool huge_pages) {
    constexpr u64 per_directory_pointers = entries * huge_page;
    u64 tables = 1 + 2; // the root, and two for the image
    for (const Window& w : windows) {
        tables += (w.end - 1) / per_directory_pointers - w.begin / per_directory_pointers + 1;
        if (!huge_pages) {
            tables += (w.end - w.begin) / huge_page;
        }
    }
    return tables;
}

Result<usize> PageTables::below(usize entry) {
    if (memory_[entry] == 0) {
        if (used_ * entries == memory_.size()) {
            return Error(Code::exhausted, "page tables: more tables are needed than were reserved",
                         memory_.size() / entries, used_ + 1);
        }
        memory_[entry] = (physical_ + used_ * small_page) | present_writable;
        ++used_;
    } else if ((memory_[entry] & page_size_bit) != 0) {
        return Error(Code::bad_argument, "page tables: an address was mapped twice");
    }
    return static_cast<usize>(((memory_[entry] & address_mask) - physical_) / sizeof(u64));
}

Result<void> PageTables::map(u64 virtual_address, u64 physical, u64 size, bool huge_pages) {
    if ((virtual_address | physical | size) % large_page != 0) {
        return Error(Code::bad_argument, "page tables: expected multiples of 2 MiB", 0,
                     (virtual_address | physical | size) % large_page);
    }
    for (u64 done = 0; done < size;) {
        const u64 v = virtual_address + done;
        const u64 p = physical + done;
        TRY(const usize pointers, below((v >> 39) % entries));
        const usize pointer = pointers + (v >> 30) % entries;
        if (huge_pages && (v | p) % huge_page == 0 && size - done >= huge_page) {
            if (memory_[pointer] != 0) {
                return Error(Code::bad_argument, "page tables: an address was mapped twice");
            }
            memory_[pointer] = p | page_size_bit | present_writable;
            done += huge_page;
            continue;
        }
        TRY(const usize directory, below(pointer));
        u64& entry = memory_[directory + (v >> 21) % entries];
        if (entry != 0) {
            return Error(Code::bad_argument, "page tables: an address was mapped twice");
        }
        entry = p | page_size_bit | present_writable;
        done += large_page;
    }
    return {};
}

} // namespace fl::boot::uefi
