// 256 stubs of 16 bytes, one per vector. Exceptions (0–31) save everything for the report; interrupts save what C++ may change.
// The unwinding rules lead a debugger on into what was interrupted: the canonical frame address is what RSP was before the processor
// pushed SS, RSP, RFLAGS, CS and RIP below it [SDM-3 6.14.2].
.cfi_sections .debug_frame
.section .text.traps, "ax", @progbits

// `pushed`: how many bytes lie between RSP and the frame that the processor pushed.
.macro begin_frame pushed
    .cfi_startproc simple
    .cfi_signal_frame
    .cfi_def_cfa rsp, \pushed + 40
    .cfi_offset rip, -40
    .cfi_offset rsp, -16
.endm

.macro push_register name
    pushq %\name
    .cfi_adjust_cfa_offset 8
    .cfi_rel_offset \name, 0
.endm

.macro pop_register name
    popq %\name
    .cfi_adjust_cfa_offset -8
    .cfi_restore \name
.endm

.global trap_stubs
.balign 16
trap_stubs:
.set vector, 0
.rept 256
    .balign 16
    .if vector < 32
        // Vectors whose exception brings no error code get a zero in its place [SDM-3 6.13].
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
    begin_frame 16
    push_register rax
    push_register rbx
    push_register rcx
    push_register rdx
    push_register rsi
    push_register rdi
    push_register rbp
    push_register r8
    push_register r9
    push_register r10
    push_register r11
    push_register r12
    push_register r13
    push_register r14
    push_register r15
    cld
    movq %rsp, %rdi
    call exception_raised               // does not return
    ud2
    .cfi_endproc
.size exception_common, . - exception_common

.type interrupt_common, @function
interrupt_common:
    begin_frame 8
    push_register rax
    push_register rcx
    push_register rdx
    push_register rsi
    push_register rdi
    push_register r8
    push_register r9
    push_register r10
    push_register r11
    cld
    movl 72(%rsp), %edi                 // the vector
    subq $8, %rsp
    .cfi_adjust_cfa_offset 8
    call interrupt_raised
    addq $8, %rsp
    .cfi_adjust_cfa_offset -8
    pop_register r11
    pop_register r10
    pop_register r9
    pop_register r8
    pop_register rdi
    pop_register rsi
    pop_register rdx
    pop_register rcx
    pop_register rax
    addq $8, %rsp
    .cfi_adjust_cfa_offset -8
    iretq
    .cfi_endproc
.size interrupt_common, . - interrupt_common
