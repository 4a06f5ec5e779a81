// The PVH entry: 32-bit protected mode, flat segments, paging off, EBX -> hvm_start_info [PVH]. The code runs at
// physical addresses until the far jump; the provisional tables below are used until the kernel has its own.
.set KERNEL_VIRTUAL, 0xffffffff80000000
.set KERNEL_PHYSICAL, 0x200000
.set TO_PHYSICAL, KERNEL_PHYSICAL - KERNEL_VIRTUAL
.set PRESENT_WRITABLE, 0x3
.set LARGE, 0x83
.set SIZE_2M, 0x200000
.set STACK_WITH_GUARD, 4096 + 65536 // as in entry.cpp

.section .note.Xen, "a", @note
.balign 4
    .long 4             // size of the name
    .long 8             // size of the value
    .long 18            // XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry32 + TO_PHYSICAL

.section .bss.pages, "aw", @nobits
.balign 4096
provisional_pml4:   .skip 4096
provisional_low:    .skip 4096          // page directory pointers: identity
provisional_high:   .skip 4096          // page directory pointers: the image
provisional_image:  .skip 4096
provisional_tables: .skip 4 * 4096      // 4 GiB, identity

.section .rodata.boot, "a", @progbits
.balign 8
provisional_gdt:
    .quad 0
    .quad 0x00af9b000000ffff            // 64-bit code
    .quad 0x00cf93000000ffff            // data
provisional_gdt_pointer:
    .word . - provisional_gdt - 1
    .long provisional_gdt + TO_PHYSICAL

// Unwinding ends here: these entries have no caller, so the return address is undefined [DWARF5 §6.4.4].
.cfi_sections .debug_frame
.section .text.entry, "ax", @progbits
.code32
.global pvh_entry32
.type pvh_entry32, @function
pvh_entry32:
    .cfi_startproc
    .cfi_undefined 16 // rip, which cannot be named in 32-bit code
    rdtsc // entry time, taken first; EBX keeps start_info
    movl %eax, %esi
    movl %edx, %ebp
    cli
    cld

    // Write both halves of each entry: .bss may not be zero. Firmware that runs after the image was loaded (QEMU with
    // SeaBIOS) uses the end of memory, which is here if memory is small.
    movl $(provisional_tables + TO_PHYSICAL), %edi
    movl $LARGE, %eax
1:  .irp entry, 0, 8, 16, 24 // four per iteration: a third fewer instructions
    movl %eax, \entry(%edi)
    movl $0, \entry + 4(%edi)          // nothing above 4 GiB
    addl $SIZE_2M, %eax // carry set after the last entry, at 4 GiB
    .endr
    leal 32(%edi), %edi // preserves the carry flag
    jnc 1b

    movl $(provisional_image + TO_PHYSICAL), %edi
    movl $(KERNEL_PHYSICAL + LARGE), %eax
2:  movl %eax, (%edi)
    movl $0, 4(%edi)
    leal 8(%edi), %edi
    addl $SIZE_2M, %eax
    cmpl $(image_end + TO_PHYSICAL), %eax
    jb 2b

    xorl %ecx, %ecx
    movl $(provisional_tables + TO_PHYSICAL + PRESENT_WRITABLE), %eax
    movl $(provisional_low + TO_PHYSICAL), %edi
3:  movl %eax, (%edi,%ecx,8)
    movl $0, 4(%edi,%ecx,8)
    addl $4096, %eax
    incl %ecx
    cmpl $4, %ecx
    jb 3b
    movl $(provisional_image + TO_PHYSICAL + PRESENT_WRITABLE), provisional_high + TO_PHYSICAL + 510 * 8
    movl $0, provisional_high + TO_PHYSICAL + 510 * 8 + 4
    movl $(provisional_low + TO_PHYSICAL + PRESENT_WRITABLE), provisional_pml4 + TO_PHYSICAL
    movl $0, provisional_pml4 + TO_PHYSICAL + 4
    movl $(provisional_high + TO_PHYSICAL + PRESENT_WRITABLE), provisional_pml4 + TO_PHYSICAL + 511 * 8
    movl $0, provisional_pml4 + TO_PHYSICAL + 511 * 8 + 4

    movl %cr4, %eax
    orl $0x20, %eax                     // PAE
    movl %eax, %cr4
    movl $(provisional_pml4 + TO_PHYSICAL), %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx              // EFER
    rdmsr
    orl $0x100, %eax                    // LME
    wrmsr
    movl %cr0, %eax
    orl $0x80010001, %eax               // PG, WP, PE
    movl %eax, %cr0
    lgdtl provisional_gdt_pointer + TO_PHYSICAL
    ljmpl $0x08, $(1f + TO_PHYSICAL)

.code64
1:  movq $2f, %rax // jump from the identity map to the link address
    jmp *%rax
2:  movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    movq $(boot_stack_guard + STACK_WITH_GUARD), %rsp
    movl %ebx, %edi                     // start_info, zero-extended
    movl %esi, %esi
    shlq $32, %rbp
    orq %rbp, %rsi                      // TSC
    xorl %ebp, %ebp // end of every backtrace
    call pvh_main
    ud2
    .cfi_endproc
.size pvh_entry32, . - pvh_entry32

// The 64-bit entry: long mode, the image mapped at its link address, RDI = identity-mapped BootInfo, interrupts off.
// Makes no assumption about the loader's stack or descriptor tables.
.global kernel_entry64
.type kernel_entry64, @function
kernel_entry64:
    .cfi_startproc
    .cfi_undefined rip
    cli
    cld
    movq $(boot_stack_guard + STACK_WITH_GUARD), %rsp
    xorl %ebp, %ebp
    call entry64_main
    ud2
    .cfi_endproc
.size kernel_entry64, . - kernel_entry64
