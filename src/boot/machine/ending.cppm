// boot.ending on this machine: from the first instruction of either entry on.
export module boot.machine.ending;
import core.std;
import boot.handoff;

export namespace fl::boot {

/// Makes end_vm() end the machine. `info` may be filled in later (the RSDP); it must last. The end runs on the stack
/// below `stack_top`, which nobody needs any more then. First of all things.
void start_ending(const BootInfo& info, u64 stack_top);
/// From now on memory is reached through the kernel's own page tables (start_memory()) and no longer through the
/// loader's.
void ending_uses_kernel_tables();
/// Ends the machine with ERROR when the image's own memory, up to `end`, is not there: a loader does not look. Under
/// the loader's page tables; nothing of the image's data can be relied on before, so this comes before start_ending().
void stop_without_memory(std::byte* end);
/// Halts for good when this boot is the restart that the end of the boot before caused: a machine that cannot be
/// switched off shall not boot over and over. Under the loader's page tables, with consoles.
void stop_if_restarted();

} // namespace fl::boot
