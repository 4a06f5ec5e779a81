// Runs boot.ending on this machine; usable from the first instruction of either entry.
export module boot.machine.ending;
import core.std;
import boot.handoff;

export namespace fl::boot {

/// Makes end_vm() end the machine. Call this first. `info` may be completed later (the RSDP) but must stay alive.
/// The shutdown runs on the stack below `stack_top`, overwriting what is there.
void start_ending(const BootInfo& info, u64 stack_top);
/// Call once the kernel's own page tables are active (start_memory()) instead of the loader's.
void ending_uses_kernel_tables();
/// The next end_vm() with a good verdict restarts the machine, as its host has asked.
void end_by_restart();
/// Ends the machine with ERROR if the memory of the image itself, up to `end`, does not exist; loaders do not check.
/// Runs under the loader's page tables and before start_ending(), because none of the image's data is reliable yet.
void stop_without_memory(std::byte* end);
/// Halts permanently if this boot is a restart caused by the end of the previous boot: a machine that cannot be powered
/// off must not boot in a loop. Runs under the loader's page tables; the consoles must work.
void stop_if_restarted();

} // namespace fl::boot
