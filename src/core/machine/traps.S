// 256 stubs of 16 bytes, one per vector. Exceptions (0–31) save everything for the report; interrupts save what C++ may change.
.section .text.traps, "ax", @progbits

.global trap_stubs
.balign 16
trap_stubs:
.set vector, 0
.rept 256
    .balign 16
    .if vector < 32
        // Vectors whose exception brings no error code get a zero in its place [SDM-3 6.13].
        .if (vector != 8) && (vector != 10) && (vector != 11) && (vector != 12) && (vector != 13) && (vector != 14) && (vector != 17) && (vector != 21) && (vector != 29) && (vector != 30)
            pushq $0
        .endif
        pushq $vector
        jmp exception_common
    .else
        pushq $vector
        jmp interrupt_common
    .endif
    .set vector, vector + 1
.endr
.balign 16

.type exception_common, @function
exception_common:
    pushq %rax
    pushq %rbx
    pushq %rcx
    pushq %rdx
    pushq %rsi
    pushq %rdi
    pushq %rbp
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    cld
    movq %rsp, %rdi
    call exception_raised               // does not return
    ud2
.size exception_common, . - exception_common

.type interrupt_common, @function
interrupt_common:
    pushq %rax
    pushq %rcx
    pushq %rdx
    pushq %rsi
    pushq %rdi
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    cld
    movl 72(%rsp), %edi                 // the vector
    subq $8, %rsp
    call interrupt_raised
    addq $8, %rsp
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rdi
    popq %rsi
    popq %rdx
    popq %rcx
    popq %rax
    addq $8, %rsp
    iretq
.size interrupt_common, . - interrupt_common
