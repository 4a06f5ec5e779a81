// From the assembly entry points to kernel_start(); the steps are the same for every entry.
export module boot.start;
import core.std;
import core.result;
import boot.handoff;

export namespace fl::boot {

/// The kernel proper (boot/main.cpp), entered on the kernel's own stack, page tables, descriptor tables and memory.
/// `info` is the kernel's own copy. Consoles, exceptions and panic work. Memory works, too, unless info.range_count is
/// 0 (PVH version 0): then the caller must query the hypervisor for the map, add its ranges to `info` and call
/// use_memory() first. Nothing else is initialised: no clock, no interrupts.
[[noreturn]] void kernel_start(BootInfo& info);

/// Drops memory that the processor cannot address, calls normalise(), maps the memory and hands it to frames() and the
/// heap.
Result<void> use_memory(BootInfo& info);

} // namespace fl::boot
