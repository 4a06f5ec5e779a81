// The index of the current processor: in the kernel, one load from per-processor data at GS; on the host, one
// per thread.
export module core.processor;
import core.std;

export namespace fl {

/// Maximum number of processors used; others are left as the firmware set them up.
inline constexpr u32 max_processors = 64;

/// Registers with which a hypervisor starts a processor: in 64-bit mode with flat segments, interrupts off. The others
/// are 0.
struct ProcessorStart {
    u64 rip = 0;
    u64 rsp = 0;
    u64 rdi = 0;
    u64 cr0 = 0;
    u64 cr3 = 0;
    u64 cr4 = 0;
    u64 efer = 0;
};

#if __STDC_HOSTED__

/// The calling thread's processor number: 0 by default.
u32 this_processor();
/// For tests: makes the calling thread processor `number`.
void set_this_processor(u32 number);

#else

/// The index of the current processor: 0 is the boot processor, the others are numbered in the order in which they were
/// started. Callable from anywhere, including interrupt handlers, once the exception tables are installed
/// (core.machine.traps).
inline u32 this_processor() {
    u32 number;
    asm volatile("movl %%gs:0, %0" : "=r"(number));
    return number;
}

#endif

} // namespace fl
