module core.address_map;
import core.std;
import core.paging;
import core.result;

namespace fl {

namespace {

constexpr u64 page = 4096;
constexpr Protection registers{.write = true, .uncached = true};

bool exists(const AddressSpace& space, u64 physical, u64 size) {
    return size != 0 && physical < space.physical_end() && size <= space.physical_end() - physical;
}
Error no_such_address(const AddressSpace& space, u64 physical) {
    return Error(Code::bad_argument, "no such physical address on this processor", space.physical_end(), physical);
}

} // namespace

Result<void> map_missing(AddressSpace& space, u64 window, u64 physical, u64 size, Protection protection) {
    if (!exists(space, physical, size)) {
        return no_such_address(space, physical);
    }
    u64 at = align_down(physical, page);
    const u64 end = align_up(physical + size, page);
    while (at < end) {
        if (const auto there = space.find(window + at)) { // check first: usually it is mapped already
            at = align_down(at, there->page) + there->page;
            continue;
        }
        const u64 missing = space.unmapped(window + at, end - at);
        if (auto mapped = space.map(window + at, at, missing, protection); !mapped) {
            return mapped;
        }
        at += missing;
    }
    return {};
}

Result<u64> MmioSpace::map(u64 physical, u64 size) {
    if (!exists(space_, physical, size)) {
        return no_such_address(space_, physical);
    }
    if (physical >= mmio_map.size || size > mmio_map.size - physical) {
        return window(physical, size);
    }
    if (auto mapped = map_missing(space_, mmio_map.begin, physical, size, registers); !mapped) {
        return mapped.error();
    }
    return mmio_map.begin + physical;
}

// Finds a window that contains the whole range, or allocates one. Virtual and physical addresses agree in their low 30
// bits, so that a large range can use large pages.
Result<u64> MmioSpace::window(u64 physical, u64 size) {
    const u64 begin = align_down(physical, page);
    const u64 length = align_up(physical + size, page) - begin;
    for (u64 at = mmio_windows.begin; at < windows_end_;) {
        const auto there = space_.find(at);
        if (!there) {
            at += space_.unmapped(at, windows_end_ - at);
            continue;
        }
        if (begin >= there->physical && begin - there->physical < there->page) {
            // Adjacent pages are adjacent physically, up to the gap after the window.
            const u64 found = at + (begin - there->physical);
            u64 done = 0;
            while (done < length) {
                const auto next = space_.find(found + done);
                if (!next || next->physical != begin + done) {
                    break;
                }
                done += next->page - (found + done) % next->page;
            }
            if (done >= length) {
                return found + physical % page;
            }
        }
        at += there->page - at % there->page;
    }
    // At least one page before each window stays unmapped.
    const u64 from = windows_end_ + page;
    const u64 fixed = begin % 1_GiB;
    const u64 address = align_down(from, 1_GiB) + fixed + (align_down(from, 1_GiB) + fixed < from ? 1_GiB : 0);
    if (address >= mmio_windows.end() || length > mmio_windows.end() - address) {
        return Error(Code::exhausted, "no address space left for device registers above a physical address of 32 TiB",
                     mmio_windows.end() - std::min(address, mmio_windows.end()), length);
    }
    if (auto mapped = space_.map(address, begin, length, registers); !mapped) {
        return mapped.error();
    }
    windows_end_ = address + length;
    return address + physical % page;
}

Result<void> MmioSpace::check_no_memory(u64 physical, u64 size) const {
    if (physical >= direct_map.size || size == 0) {
        return {};
    }
    const u64 begin = align_down(physical, page);
    const u64 end = align_up(std::min(direct_map.size, size > ~physical ? ~u64{0} : physical + size), page);
    const u64 free = space_.unmapped(direct_map.begin + begin, end - begin);
    if (free != end - begin) {
        return Error(Code::protocol,
                     "the device's registers overlap memory: the firmware has placed them wrongly, or "
                     "the memory map is wrong",
                     0, begin + free);
    }
    return {};
}

std::optional<u64> MmioSpace::physical_of(u64 address) const {
    if (mmio_map.has(address)) {
        return address - mmio_map.begin;
    }
    if (mmio_windows.has(address)) {
        if (const auto there = space_.find(address)) {
            return there->physical;
        }
    }
    return std::nullopt;
}

} // namespace fl
