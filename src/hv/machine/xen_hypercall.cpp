// The hypercall page. Part of the kernel's text, so that it is executable; Xen fills it by guest-physical address,
// regardless of the guest's page protection.
module hv.xen.hypercall;
import core.std;

extern "C" const std::byte xen_hypercall_page[4096];

asm(R"(
    .pushsection .text.xen_hypercall_page, "ax", @progbits
    .balign 4096
    .globl xen_hypercall_page
xen_hypercall_page:
    .rept 4096
    .byte 0xcc
    .endr
    .popsection
)");

namespace fl::hv::xen {

namespace {
// RAX result; RDI, RSI, RDX, R10 and R8 are arguments and are clobbered [xen-public arch-x86/xen-x86_64.h]. The red
// zone is disabled, so a call is safe here.
i64 call_page(void*, u32 number, u64 a, u64 b, u64 c, u64 d, u64 e) {
    register u64 r10 asm("r10") = d;
    register u64 r8 asm("r8") = e;
    u64 answer;
    const u64 entry = reinterpret_cast<u64>(&xen_hypercall_page[0]) + u64{number} * hypercall_stride;
    asm volatile("call *%[entry]"
                 : "=a"(answer), "+D"(a), "+S"(b), "+d"(c), "+r"(r10), "+r"(r8)
                 : [entry] "r"(entry)
                 : "memory", "cc", "rcx", "r9", "r11");
    return static_cast<i64>(answer);
}
} // namespace

Gate native_gate() { return {nullptr, call_page, &xen_hypercall_page[0]}; }

} // namespace fl::hv::xen
