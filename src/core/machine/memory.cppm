// The kernel's page tables and frames, and the interfaces to them for drivers. Call start_memory() first, then
// add_memory() once the memory map is known.
export module core.machine.memory;
import core.std;
import core.result;
import core.dma;
import core.memory;
import core.mmio;
import core.physical;

export namespace fl {

/// Location of the image. Virtual addresses are fixed when it is linked; the loader chooses the physical one.
struct MemoryLayout {
    u64 image_physical; // of the image's first byte, 2 MiB aligned
    u64 stack_guard;    // virtual address of the unmapped page
};

/// A range of the firmware's map: usable RAM, or memory that is only read (firmware tables).
struct MemoryArea {
    u64 base;
    u64 size;
    bool usable;
};

/// Switches from the loader's page tables to the kernel's: maps the image only, W^X, NX if supported. Sets CR0.WP,
/// EFER.NXE and, if supported, SMEP, SMAP and UMIP. Uses only memory of the image. Call once, with the exception tables
/// installed. Panics if the image does not fit its tables.
void start_memory(const MemoryLayout& layout);
/// Maps the areas at direct_map (not executable) and adds the usable ones to frames() and the heap. Areas must not
/// include the image, nor anything at or above physical_end(). May be called again with further areas.
/// Error{exhausted}: no usable range is large enough to start with.
Result<void> add_memory(std::span<const MemoryArea> areas);

/// Limit of usable RAM: the end of the processor's physical addresses (CPUID 0x80000008) or of the direct map. Device
/// registers may be above it. Valid after start_memory().
u64 physical_end();

FrameAllocator& frames();
/// Frames for DMA, accessed through the direct map. allocate() returns zeroed memory.
DmaAllocator& dma_memory();
/// Reads physical memory, except device registers; maps it on demand.
PhysicalReader& physical_memory();

/// Maps device registers at any physical address, uncached, permanently; the same range always yields the same address.
/// For addresses reported by the platform (APICs, ACPI).
Result<std::byte*> map_mmio(u64 physical, u64 size);
/// The same for addresses reported by devices: an address in RAM is refused.
MmioMapper& device_registers();
/// Maps memory (RAM, firmware tables, or a page placed by a hypervisor) cached, writable, not executable, permanently.
Result<std::byte*> map_physical(u64 physical, u64 size);
/// Maps a stack: `size` bytes (a multiple of 4 KiB) above a guard page that stays unmapped. Returns the address of the
/// guard page. Permanent.
Result<u64> map_stack(u64 size);
/// Allocates a page below 1 MiB in which processors start, calls fill(page, its physical address), then maps it
/// executable at its physical address and nowhere writable. Returns that address. One at a time.
Result<u64> open_start_page(void (*fill)(std::byte* page, u64 physical));
/// Unmaps the page and invalidates it on the calling processor; the others must call forget_start_page(). If not
/// `release`, the frame is not reused, since a processor may still be executing in it.
void close_start_page(u64 page, bool release);
/// Invalidates the TLB entry of a closed start page on the calling processor.
void forget_start_page(u64 page);
/// Physical address of the top-level page table; below 4 GiB wherever the image is.
u64 page_table_root();

/// The physical address of an object in the image, the direct map (which includes heap and DMA memory) or map_mmio()'s
/// area.
u64 physical_of(const void* address);
/// Page table features in use, for the log: "NX SMEP SMAP 1G".
std::string_view memory_features();

} // namespace fl
