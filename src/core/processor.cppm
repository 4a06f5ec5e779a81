// Which processor this is. One instruction in the kernel, from per-processor data at GS; on the host a thread plays a
// processor.
export module core.processor;
import core.std;

export namespace fl {

/// So many processors are used at most; further ones stay as the firmware left them.
inline constexpr u32 max_processors = 64;

#if __STDC_HOSTED__

/// The calling thread's number: 0 until it says otherwise.
u32 this_processor();
/// For tests: the calling thread is processor `number` from here on.
void set_this_processor(u32 number);

#else

/// The index of the processor that runs this: 0 is the boot processor, the others count on in the order in which they
/// were started. From anywhere, interrupt handlers included, once the exceptions' tables are installed
/// (core.machine.traps).
inline u32 this_processor() {
    u32 number;
    asm volatile("movl %%gs:0, %0" : "=r"(number));
    return number;
}

#endif

} // namespace fl
