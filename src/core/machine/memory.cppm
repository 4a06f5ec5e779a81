// The kernel's own page tables, its frames, and what both offer to drivers. Order: start_memory, then add_memory once
// the memory map is known.
export module core.machine.memory;
import core.std;
import core.result;
import core.dma;
import core.memory;
import core.mmio;
import core.physical;

export namespace fl {

/// Where the image is. Virtual addresses are constants of the link, the physical one the loader's choice.
struct MemoryLayout {
    u64 image_physical; // of the image's first byte, 2 MiB aligned
    u64 stack_guard;    // virtual address of the page that stays unmapped
};

/// A range of the firmware's map: usable memory, or memory that may be read (tables of the firmware).
struct MemoryArea {
    u64 base;
    u64 size;
    bool usable;
};

/// Leaves the loader's page tables for the kernel's own: the image alone, W^X, NX where the processor has it. Sets
/// CR0.WP, EFER.NXE and, where offered, SMEP, SMAP, UMIP. Uses only memory of the image. Once, with the exceptions'
/// table installed. Panics when the image does not fit its tables.
void start_memory(const MemoryLayout& layout);
/// Maps the areas at direct_map (not executable) and gives the usable ones to frames() and to the heap. The image must
/// not be among the areas, nor anything at or above physical_end(). May be called again with further areas.
/// Error{exhausted}: no usable range is large enough to begin with.
Result<void> add_memory(std::span<const MemoryArea> areas);

/// No memory at or above it is used: the processor's physical addresses end there (CPUID 0x80000008), or the direct
/// map. Device registers may be higher. After start_memory.
u64 physical_end();

FrameAllocator& frames();
/// Frames for devices, through the direct map. What allocate() gives is zeroed.
DmaAllocator& dma_memory();
/// Reads physical memory of any kind that is not device registers, mapping it on demand.
PhysicalReader& physical_memory();

/// Device registers, uncached, for good, wherever the processor has physical addresses: the same address for the same
/// range, however often it is asked for. For what the platform says about itself (APICs, ACPI).
Result<std::byte*> map_mmio(u64 physical, u64 size);
/// The same for what devices say about themselves: an address where memory is, is refused.
MmioMapper& device_registers();
/// Memory (RAM, firmware's, or a page that a hypervisor puts somewhere), cached, writable, not executable, for good.
Result<std::byte*> map_physical(u64 physical, u64 size);
/// `size` bytes of memory, multiple of 4 KiB, above a page that stays unmapped: a stack. Gives the address of that
/// page. For good.
Result<u64> map_stack(u64 size);
/// Where processors start: a page below 1 MiB that fill(page, its physical address) fills; then it is executable at its
/// physical address and writable nowhere. Gives that address. One at a time.
Result<u64> open_start_page(void (*fill)(std::byte* page, u64 physical));
/// Takes the page out of the page tables again; the calling processor forgets it, others must with forget_start_page().
/// `give_back` false: nobody else gets the frame, because a processor may still be on its way through it.
void close_start_page(u64 page, bool give_back);
void forget_start_page(u64 page);
/// Where the kernel's page tables begin; below 4 GiB wherever the image is.
u64 page_table_root();

/// The physical address behind something in the image, the direct map (so: the heap and DMA memory too) or map_mmio's
/// area.
u64 physical_of(const void* address);
/// Bits of the kernel's page tables, for the log: "NX SMEP SMAP 1G".
std::string_view memory_features();

} // namespace fl
