module;
#include "core/thread_annotations.hpp"
module core.machine.memory;
import core.std;
import core.result;
import core.address_map;
import core.cpu_registers;
import core.dma;
import core.memory;
import core.mmio;
import core.paging;
import core.panic;
import core.physical;
import core.spinlock;
import core.text;
import core.machine.cpu;
import core.machine.runtime;

// Defined in kernel.ld: addresses, not objects.
extern "C" {
extern const std::byte image_text_begin[];
extern const std::byte image_text_end[];
extern const std::byte image_rodata_begin[];
extern const std::byte image_rodata_end[];
extern const std::byte image_data_begin[];
extern const std::byte image_data_end[];
extern const std::byte image_symbols_begin[];
extern const std::byte image_end[];

// Page tables that are needed before there are frames: the root, the image's (up to 8 MiB), the first window of the
// direct map, and one page of the hypervisor's (a console).
constexpr fl::usize early_table_count = 16;
alignas(4096) [[gnu::section(".bss.pages")]] std::byte early_tables[early_table_count * 4096];
}

namespace fl {

namespace {

constexpr u64 size_2m = 2_MiB;

constinit MemoryLayout layout{};
// Protects frames and page tables. While several processors run, mappings are only added, so that no processor has to
// invalidate TLB entries. start_memory() does not take it: there is no second processor yet.
constinit SpinLock lock;
constinit FrameAllocator frame_allocator GUARDED_BY(lock);
constinit PagingFeatures features{};
constinit FixedText<48> feature_names;
// Frames for tables are allocated from this range, which the direct map covers so far.
constinit u64 reachable_begin = 0;
constinit u64 reachable_end = 0;

u64 address_of(const void* p) { return reinterpret_cast<u64>(p); }
u64 image_begin() { return address_of(image_text_begin); }
u64 image_size() { return address_of(image_end) - image_begin(); }
bool in_image(u64 physical) {
    return physical >= layout.image_physical && physical - layout.image_physical < image_size();
}

class KernelTables final : public TableMemory {
  public:
    Result<u64> new_table() override REQUIRES(lock) {
        if (used_ < early_table_count) {
            return layout.image_physical + (address_of(early_tables) - image_begin()) + 4096 * used_++;
        }
        auto frame = frame_allocator.allocate({.frames = 1, .floor = reachable_begin, .limit = reachable_end});
        if (frame) {
            std::memset(view(*frame), 0, frame_size);
        }
        return frame;
    }
    u64* view(u64 physical) override {
        // The image's own memory is not in the direct map, so that there is no second, writable mapping of it.
        return reinterpret_cast<u64*>(in_image(physical) ? physical - layout.image_physical + image_begin()
                                                         : direct_map.begin + physical);
    }
    void invalidate(u64 address) override { cpu::invalidate_page(address); }

  private:
    usize used_ = 0;
};

constinit KernelTables tables;
constinit AddressSpace space{tables};
constinit MmioSpace mmio_space{space};
constinit u64 next_stack GUARDED_BY(lock) = stack_map.begin;

void read_features() {
    const u32 highest = cpu::cpuid(0x80000000).eax;
    const auto extended = Cpuid80000001Edx::from(highest >= 0x80000001 ? cpu::cpuid(0x80000001).edx : 0);
    features.no_execute = extended.get(Cpuid80000001Edx::no_execute);
    features.gigabyte_pages = extended.get(Cpuid80000001Edx::gigabyte_pages);
    const auto sizes = Cpuid80000008Eax::from(highest >= 0x80000008 ? cpu::cpuid(0x80000008).eax : 36);
    // 52 bits is the limit of a page table entry.
    features.physical_end = u64{1} << std::clamp<u32>(sizes.get(Cpuid80000008Eax::physical_bits), 32, 52);

    const auto offered = cpu::cpuid(0).eax >= 7 ? cpu::cpuid(7) : cpu::CpuidRegisters{};
    const auto offered_ebx = Cpuid7Ebx::from(offered.ebx);
    Cr4 cr4 = Cr4::from(cpu::read_cr4());
    const auto use = [&](bool there, Cr4 bit, std::string_view text) {
        if (there) {
            cr4.raw |= bit.raw;
            print(feature_names, "{}{}", feature_names.empty() ? "" : " ", text);
        }
    };
    use(features.no_execute, {}, "NX");
    use(features.gigabyte_pages, {}, "1G");
    use(offered_ebx.get(Cpuid7Ebx::smep), Cr4::of(Cr4::smep), "SMEP");
    use(offered_ebx.get(Cpuid7Ebx::smap), Cr4::of(Cr4::smap), "SMAP");
    use(Cpuid7Ecx::from(offered.ecx).get(Cpuid7Ecx::umip), Cr4::of(Cr4::umip), "UMIP");
    if (features.no_execute) {
        cpu::write_msr(Efer::msr, Efer::from(cpu::read_msr(Efer::msr)).set(Efer::no_execute_enable, true).raw);
    }
    cpu::write_cr0(Cr0::from(cpu::read_cr0()).set(Cr0::write_protect, true).raw);
    cpu::write_cr4(cr4.raw);
}

void map_image(const std::byte* begin, const std::byte* end, Protection protection) {
    const u64 size = address_of(end) - address_of(begin);
    if (size == 0) {
        return;
    }
    const auto done =
        space.map(address_of(begin), address_of(begin) - image_begin() + layout.image_physical, size, protection);
    if (!done) {
        panic("mapping the image: {}", done.error());
    }
}

Result<u64> allocate_frames(const FrameRequest& request) {
    const Locked locked(lock);
    return frame_allocator.allocate(request);
}

class FrameDma final : public DmaAllocator {
  public:
    Result<DmaSpan> allocate(u32 size, u64 limit) override {
        const u64 bytes = align_up<u64>(size, frame_size);
        auto frame = allocate_frames({.frames = bytes / frame_size, .limit = limit});
        if (!frame) {
            return frame.error();
        }
        auto* data = reinterpret_cast<std::byte*>(direct_map.begin + *frame);
        std::memset(data, 0, bytes);
        return DmaSpan{data, *frame, static_cast<u32>(bytes)};
    }
    void free(DmaSpan span) override {
        const Locked locked(lock);
        frame_allocator.free(span.bus, align_up<u64>(span.size, frame_size) / frame_size);
    }
};

class DirectReader final : public PhysicalReader {
  public:
    bool read(u64 address, std::span<std::byte> into) override {
        const auto from = into.empty() ? Result<std::byte*>(nullptr) : map_physical(address, into.size());
        if (!from) {
            return false;
        }
        std::memcpy(into.data(), *from, into.size());
        return true;
    }
};

constinit FrameDma dma;
constinit DirectReader reader;

std::span<std::byte> grow_heap(usize at_least) {
    constexpr u64 step = 128_KiB;
    const u64 bytes = align_up<u64>(std::max<u64>(at_least, step), frame_size);
    const auto frame = allocate_frames({.frames = bytes / frame_size});
    if (!frame) {
        return {};
    }
    return {reinterpret_cast<std::byte*>(direct_map.begin + *frame), bytes};
}

} // namespace

void start_memory(const MemoryLayout& given) {
    layout = given;
    read_features();
    if (const auto created = space.create(features); !created) {
        panic("page tables: {}", created.error());
    }
    map_image(image_text_begin, image_text_end, {.execute = true});
    map_image(image_rodata_begin, image_rodata_end, {});
    const auto* guard = reinterpret_cast<const std::byte*>(layout.stack_guard);
    map_image(image_data_begin, guard, {.write = true});
    map_image(guard + frame_size, image_data_end, {.write = true});
    map_image(image_symbols_begin, image_end, {});
    cpu::write_cr3(space.root());
}

Result<void> add_memory(std::span<const MemoryArea> areas) {
    const Locked locked(lock);
    // Map a first window, which then provides the tables for the rest. Large pages only, so that the early tables
    // suffice.
    for (const MemoryArea& area : areas) {
        frame_allocator.add(area.usable ? area.base : 0, area.usable ? area.size : 0);
    }
    if (reachable_end == 0) {
        u64 best = 0;
        u64 best_size = 0;
        for (const MemoryArea& area : areas) {
            const u64 begin = align_up(std::max(area.base, low_memory_end), size_2m);
            const u64 end = align_down(std::min(area.base + area.size, u64{4} << 30), size_2m);
            if (area.usable && begin < end && end - begin > best_size) {
                best = begin;
                best_size = end - begin;
            }
        }
        if (best_size == 0) {
            return Error(Code::exhausted,
                         "no usable range of memory holds 2 MiB below 4 GiB: give the machine more memory");
        }
        if (auto mapped = space.map(direct_map.begin + best, best, best_size, {.write = true}); !mapped) {
            return mapped;
        }
        reachable_begin = best;
        reachable_end = best + best_size;
        set_heap_growth(grow_heap);
    }
    for (const MemoryArea& area : areas) {
        // Whole pages inside usable memory; all pages that firmware memory touches.
        const u64 begin = area.usable ? align_up(area.base, frame_size) : align_down(area.base, frame_size);
        const u64 end =
            area.usable ? align_down(area.base + area.size, frame_size) : align_up(area.base + area.size, frame_size);
        if (begin >= end) {
            continue;
        }
        // Map the parts around the window, each at once with the largest pages that fit.
        const u64 middle_begin = std::clamp(reachable_begin, begin, end);
        const u64 middle_end = std::clamp(reachable_end, begin, end);
        const bool apart = reachable_end <= begin || reachable_begin >= end;
        struct Piece {
            u64 from, to;
        };
        const std::array<Piece, 2> pieces{Piece{begin, apart ? end : middle_begin},
                                          Piece{apart ? end : middle_end, end}};
        for (const auto& [from, to] : pieces) {
            if (from >= to) {
                continue;
            }
            auto mapped = space.map(direct_map.begin + from, from, to - from, {.write = true});
            if (!mapped && mapped.error().code == Code::busy) { // shares a page with an existing mapping
                mapped = map_missing(space, direct_map.begin, from, to - from, {.write = true});
            }
            if (!mapped) {
                return mapped;
            }
        }
    }
    return {};
}

u64 physical_end() { return std::min(features.physical_end, direct_map.size); }
// For its counters, which other processors may change concurrently.
FrameAllocator& frames() NO_THREAD_SAFETY_ANALYSIS { return frame_allocator; }
DmaAllocator& dma_memory() { return dma; }
PhysicalReader& physical_memory() { return reader; }

Result<std::byte*> map_mmio(u64 physical, u64 size) {
    const Locked locked(lock);
    const auto mapped = mmio_space.map(physical, size);
    if (!mapped) {
        return mapped.error();
    }
    return reinterpret_cast<std::byte*>(*mapped);
}

namespace {
class KernelMmio final : public MmioMapper {
  public:
    Result<Mmio> map(u64 physical, u64 size) override {
        const Locked locked(lock);
        if (auto checked = mmio_space.check_no_memory(physical, size); !checked) {
            return checked.error();
        }
        const auto mapped = mmio_space.map(physical, size);
        if (!mapped) {
            return mapped.error();
        }
        return Mmio(reinterpret_cast<std::byte*>(*mapped), size);
    }
};
constinit KernelMmio mapper;
} // namespace
MmioMapper& device_registers() { return mapper; }

Result<std::byte*> map_physical(u64 physical, u64 size) {
    if (in_image(physical) && size <= image_size() - (physical - layout.image_physical)) {
        return reinterpret_cast<std::byte*>(physical - layout.image_physical + image_begin());
    }
    if (physical >= direct_map.size || size > direct_map.size - physical) {
        return Error(Code::bad_argument, "memory at this physical address cannot be mapped", direct_map.size, physical);
    }
    const Locked locked(lock);
    // Usually it is mapped already: a boot reads a few bytes of ACPI tables a hundred times.
    if (const auto there = space.find(direct_map.begin + physical);
        there && size - 1 < there->page - physical % there->page) {
        return reinterpret_cast<std::byte*>(direct_map.begin + physical);
    }
    if (auto mapped = map_missing(space, direct_map.begin, physical, size, {.write = true}); !mapped) {
        return mapped.error();
    }
    return reinterpret_cast<std::byte*>(direct_map.begin + physical);
}

Result<u64> map_stack(u64 size) {
    const Locked locked(lock);
    if (size > stack_map.end() - next_stack - frame_size) {
        return Error(Code::exhausted, "no address space left for another processor's stack");
    }
    auto frame = frame_allocator.allocate({.frames = size / frame_size});
    if (!frame) {
        return frame.error();
    }
    const u64 guard = next_stack;
    if (auto mapped = space.map(guard + frame_size, *frame, size, {.write = true}); !mapped) {
        frame_allocator.free(*frame, size / frame_size);
        return mapped.error();
    }
    next_stack = guard + frame_size + size;
    return guard;
}

Result<u64> open_start_page(void (*fill)(std::byte* page, u64 physical)) {
    const Locked locked(lock);
    auto frame = allocate_start_frame(frame_allocator);
    if (!frame) {
        return frame;
    }
    const u64 window = direct_map.begin + *frame;
    std::memset(reinterpret_cast<void*>(window), 0, frame_size);
    fill(reinterpret_cast<std::byte*>(window), *frame);
    // Never writable and executable at the same time, not even through two mappings.
    auto done = space.protect(window, frame_size, {});
    if (done) {
        done = space.map(*frame, *frame, frame_size, {.execute = true});
    }
    if (!done) {
        static_cast<void>(space.protect(window, frame_size, {.write = true}));
        frame_allocator.free(*frame, 1);
        return done.error();
    }
    return *frame;
}

void close_start_page(u64 page, bool release) {
    const Locked locked(lock);
    if (!space.unmap(page, frame_size) || !release) {
        return;
    }
    if (space.protect(direct_map.begin + page, frame_size, {.write = true})) {
        frame_allocator.free(page, 1);
    }
}

void forget_start_page(u64 page) { cpu::invalidate_page(page); }
u64 page_table_root() { return space.root(); }

u64 physical_of(const void* pointer) {
    const u64 address = address_of(pointer);
    if (address >= image_begin() && address - image_begin() < image_size()) {
        return address - image_begin() + layout.image_physical;
    }
    if (direct_map.has(address)) {
        return address - direct_map.begin;
    }
    const Locked locked(lock);
    if (const auto physical = mmio_space.physical_of(address)) {
        return *physical;
    }
    if (stack_map.has(address)) {
        if (const auto there = space.find(address)) {
            return there->physical;
        }
    }
    panic("{:#x} has no physical address: it is neither in the image nor in the direct map", address);
}

std::string_view memory_features() { return feature_names; }

} // namespace fl
