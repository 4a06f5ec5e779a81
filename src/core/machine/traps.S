// 256 stubs of 16 bytes, one per vector. Exceptions (0–31) save all registers for the report; interrupts save the
// caller-saved ones. The unwinding rules lead a debugger to the interrupted code: the canonical frame address is the
// value of RSP before the processor pushed SS, RSP, RFLAGS, CS and RIP [SDM-3 6.14.2].
.cfi_sections .debug_frame
.section .text.traps, "ax", @progbits

// `pushed`: bytes between RSP and the frame that the processor pushed.
.macro begin_frame pushed
    .cfi_startproc simple
    .cfi_def_cfa rsp, \pushed + 40
    .cfi_offset rip, -40
    .cfi_offset rsp, -16
.endm

// Assemblers omit the signal frame mark from .debug_frame. Without it a debugger looks up the function of the byte
// before the interrupted instruction, which is the wrong one if that instruction is the first of its function. So the
// unwinding rules of the two common parts, from which the interrupted code is found, are written by hand [DWARF5
// §6.4.1]; "S" is the mark [LSB-5.0 §10.6].
.pushsection .debug_frame, "", @progbits
frame_rules:
    .long frame_rules_end - frame_rules_begin
frame_rules_begin:
    .long 0xffffffff                    // a common information entry
    .byte 4                             // its version
    .asciz "S"
    .byte 8, 0                          // bytes of an address, of a segment selector
    .uleb128 1                          // code alignment
    .sleb128 -8                         // data alignment
    .uleb128 16                         // the return address: RIP
    .byte 0x80 | 16, 5                  // DW_CFA_offset: RIP is at CFA - 40
    .byte 0x80 | 7, 2                   // RSP is at CFA - 16
    .balign 8
frame_rules_end:
.popsection

.macro begin_rules name pushed
    .set frame_bytes, \pushed + 40      // from RSP to the canonical frame address
77:
    .pushsection .debug_frame
    .long \name\()_rules_end - \name\()_rules
\name\()_rules:
    .long frame_rules
    .quad \name, \name\()_end - \name
    .byte 0x0c, 7                       // DW_CFA_def_cfa: RSP + offset
    .uleb128 frame_bytes
    .popsection
.endm

.macro end_rules name
\name\()_end:
    .pushsection .debug_frame
    .balign 8
\name\()_rules_end:
    .popsection
.endm

// RSP has just decreased by this many bytes.
.macro frame_grows bytes
    .set frame_bytes, frame_bytes + \bytes
78:
    .pushsection .debug_frame
    .byte 0x02, 78b - 77b               // DW_CFA_advance_loc1
    .byte 0x0e                          // DW_CFA_def_cfa_offset
    .uleb128 frame_bytes
    .popsection
77:
.endm

// `number`: the register's DWARF number [psABI §3.6.2].
.macro push_register name number
    pushq %\name
    frame_grows 8
    .pushsection .debug_frame
    .byte 0x80 | \number, frame_bytes / 8
    .popsection
.endm

.macro pop_register name number
    popq %\name
    frame_grows -8
    .pushsection .debug_frame
    .byte 0xc0 | \number                // DW_CFA_restore
    .popsection
.endm

.global trap_stubs
.balign 16
trap_stubs:
.set vector, 0
.rept 256
    .balign 16
    .if vector < 32
        // Vectors without an error code push a zero in its place [SDM-3 6.13].
        .if (vector != 8) && (vector != 10) && (vector != 11) && (vector != 12) && (vector != 13) && (vector != 14) && (vector != 17) && (vector != 21) && (vector != 29) && (vector != 30)
            begin_frame 0
            pushq $0
            .cfi_adjust_cfa_offset 8
        .else
            begin_frame 8
        .endif
        pushq $vector
        .cfi_adjust_cfa_offset 8
        jmp exception_common
    .else
        begin_frame 0
        pushq $vector
        .cfi_adjust_cfa_offset 8
        jmp interrupt_common
    .endif
    .cfi_endproc
    .set vector, vector + 1
.endr
.balign 16

.type exception_common, @function
exception_common:
    begin_rules exception_common, 16
    push_register rax, 0
    push_register rbx, 3
    push_register rcx, 2
    push_register rdx, 1
    push_register rsi, 4
    push_register rdi, 5
    push_register rbp, 6
    push_register r8, 8
    push_register r9, 9
    push_register r10, 10
    push_register r11, 11
    push_register r12, 12
    push_register r13, 13
    push_register r14, 14
    push_register r15, 15
    cld
    movq %rsp, %rdi
    call exception_raised               // does not return
    ud2
    end_rules exception_common
.size exception_common, . - exception_common

// void wait_for_interrupt(): interrupts are off, and on afterwards. sti takes effect after the instruction that follows it,
// so that what is raised before hlt ends it [SDM-2B STI]. Where a hypervisor loses that delay (seen with Xen on QEMU's
// emulation of SVM, when the processor was stopped between the two) the interrupt is taken before hlt, which would then
// wait for another one, perhaps for ever: interrupt_common skips it.
.globl wait_for_interrupt
.type wait_for_interrupt, @function
wait_for_interrupt:
    .cfi_startproc
    sti
wait_for_interrupt.hlt:
    hlt
    ret
    .cfi_endproc
.size wait_for_interrupt, . - wait_for_interrupt

.type interrupt_common, @function
interrupt_common:
    begin_rules interrupt_common, 8
    push_register rax, 0
    push_register rcx, 2
    push_register rdx, 1
    push_register rsi, 4
    push_register rdi, 5
    push_register r8, 8
    push_register r9, 9
    push_register r10, 10
    push_register r11, 11
    cld
    movl 72(%rsp), %edi                 // the vector
    subq $8, %rsp
    frame_grows 8
    call interrupt_raised
    addq $8, %rsp
    frame_grows -8
    cmpq $wait_for_interrupt.hlt, 80(%rsp) // rip
    jne 1f
    incq 80(%rsp)
1:
    pop_register r11, 11
    pop_register r10, 10
    pop_register r9, 9
    pop_register r8, 8
    pop_register rdi, 5
    pop_register rsi, 4
    pop_register rdx, 1
    pop_register rcx, 2
    pop_register rax, 0
    addq $8, %rsp
    frame_grows -8
    iretq
    end_rules interrupt_common
.size interrupt_common, . - interrupt_common
