// Entry of a further processor: a copy of this page's code below 1 MiB, in real mode, CS = page / 16, IP = 0 [SDM-3
// 9.4.4]. smp.cpp fills in the parameters (struct Parameters); all absolute addresses in them refer to the copy.
.section .rodata.start, "a", @progbits
.balign 16
.global start_code_begin, start_code_end, start_parameters, start_gdt, start_protected, start_long
.set GDT_POINTER, start_parameters - start_code_begin
.set PROTECTED_POINTER, GDT_POINTER + 6
.set LONG_POINTER, GDT_POINTER + 12
.set CR3_VALUE, GDT_POINTER + 18
.set CR4_VALUE, GDT_POINTER + 22
.set EFER_VALUE, GDT_POINTER + 26
.set CR0_VALUE, GDT_POINTER + 30
.set ENTRY, GDT_POINTER + 34

.code16
start_code_begin:
    cli
    cld
    movw %cs, %ax
    movw %ax, %ds
    xorl %ebx, %ebx
    movw %ax, %bx
    shll $4, %ebx                       // the page
    lgdtl GDT_POINTER
    movl $0x11, %eax                    // PE, ET: caches on, paging off
    movl %eax, %cr0
    ljmpl *PROTECTED_POINTER

.code32
start_protected:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl CR4_VALUE(%ebx), %eax
    movl %eax, %cr4
    movl CR3_VALUE(%ebx), %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx              // EFER
    movl EFER_VALUE(%ebx), %eax
    xorl %edx, %edx
    wrmsr
    movl CR0_VALUE(%ebx), %eax          // sets PG and WP
    movl %eax, %cr0
    ljmpl *LONG_POINTER(%ebx)

.code64
start_long:
    movq ENTRY(%rbx), %rax
    jmp *%rax

.balign 8
start_gdt:
    .quad 0
    .quad 0x00af9b000000ffff            // 64-bit code
    .quad 0x00cf93000000ffff            // data
    .quad 0x00cf9b000000ffff            // 32-bit code
start_parameters:
    .skip 42
start_code_end:

// A processor that the hypervisor has started, on its own stack, with its number in RDI: takes the offer unless the boot
// processor has withdrawn it.
.cfi_sections .debug_frame
.section .text.started_processor_entry, "ax", @progbits
.global started_processor_entry
.type started_processor_entry, @function
started_processor_entry:
    .cfi_startproc
    .cfi_undefined rip                  // unwinding ends here
    movl $1, %eax                       // Offer::offered
    movl $2, %ecx                       // Offer::taken
    lock cmpxchgl %ecx, start_offer(%rip)
    jne 1f
    xorl %ebp, %ebp                     // the last frame of every backtrace
    call processor_main
    ud2
1:  cli
    hlt
    jmp 1b
    .cfi_endproc
.size started_processor_entry, . - started_processor_entry

// In the image. A processor that arrives here compares its APIC id with the offer's and takes the offer unless the boot
// processor has withdrawn it; any other processor halts.
.section .text.processor_entry, "ax", @progbits
.global processor_entry
.type processor_entry, @function
processor_entry:
    .cfi_startproc
    .cfi_undefined rip                  // unwinding ends here
    xorl %eax, %eax
    cpuid
    cmpl $0xb, %eax
    jb 1f
    movl $0xb, %eax                     // extended topology: EDX is the x2APIC id, valid if EBX is not 0
    xorl %ecx, %ecx
    cpuid
    testl $0xffff, %ebx
    jz 1f
    movl %edx, %esi
    jmp 2f
1:  movl $1, %eax
    cpuid
    shrl $24, %ebx
    movl %ebx, %esi
2:  cmpl %esi, start_offer + 4(%rip)
    jne 3f
    movl $1, %eax                       // Offer::offered
    movl $2, %ecx                       // Offer::taken
    lock cmpxchgl %ecx, start_offer(%rip)
    jne 3f
    movq start_offer + 8(%rip), %rsp
    movq start_offer + 16(%rip), %rdi
    xorl %ebp, %ebp                     // the last frame of every backtrace
    call processor_main
    ud2
3:  cli
    hlt
    jmp 3b
    .cfi_endproc
.size processor_entry, . - processor_entry
