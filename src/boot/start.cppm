// From the entry's assembly to kernel_start(): the same steps for every entry.
export module boot.start;
import core.std;
import core.result;
import boot.handoff;

export namespace fl::boot {

/// The kernel proper (boot/main.cpp): called on the kernel's own stack, with its own page tables, descriptor tables and
/// memory. `info` is the kernel's own copy. Consoles, exceptions and panic work; memory does too, unless
/// info.range_count is 0 (PVH version 0): then the hypervisor must be asked for the map first, its ranges added to
/// `info`, and use_memory() called. Nothing else has run: no clock, no interrupts.
[[noreturn]] void kernel_start(BootInfo& info);

/// Leaves out what the processor has no addresses for, normalise(), then maps the memory and gives it to frames() and
/// the heap.
Result<void> use_memory(BootInfo& info);

} // namespace fl::boot
