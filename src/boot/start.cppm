// From the entry's assembly to kernel_start(): the same steps for every entry.
export module boot.start;
import core.std;
import boot.handoff;

export namespace fl::boot {

/// The kernel proper (boot/main.cpp): called on the kernel's own stack, with its own page tables, descriptor tables and memory. `info` is the
/// kernel's own copy. Does not return.
[[noreturn]] void kernel_start(BootInfo& info);

} // namespace fl::boot
