// The hypercall page. Part of the kernel's text, so that it is executable; the hypervisor fills it by guest-physical
// address, or overlays its own page, regardless of the guest's page protection.
module hv.hyperv.hypercall;
import core.std;

extern "C" const std::byte hyperv_hypercall_page[4096];

asm(R"(
    .pushsection .text.hyperv_hypercall_page, "ax", @progbits
    .balign 4096
    .globl hyperv_hypercall_page
hyperv_hypercall_page:
    .rept 4096
    .byte 0xcc
    .endr
    .popsection
)");

namespace fl::hv::hyperv {

namespace {
// RCX control, RDX input, R8 output, RAX result; R9 to R11 are clobbered [hv-tlfs §3.7]. The red zone is disabled, so a
// call is safe here.
u64 call_page(void*, u64 control, u64 input, u64 output) {
    register u64 r8 asm("r8") = output;
    u64 answer;
    asm volatile("call *%[entry]"
                 : "=a"(answer), "+c"(control), "+d"(input), "+r"(r8)
                 : [entry] "r"(&hyperv_hypercall_page[0])
                 : "memory", "cc", "r9", "r10", "r11");
    return answer;
}
} // namespace

Gate native_gate() { return {nullptr, call_page, &hyperv_hypercall_page[0]}; }

} // namespace fl::hv::hyperv
