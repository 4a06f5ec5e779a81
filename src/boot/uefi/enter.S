// The last instructions of the loader. Called with the firmware's convention (rcx, rdx, r8, r9); enters the kernel with
// System V's: rdi holds the physical address of BootInfo. The code is identity-mapped by both the old and the new
// tables.
.set COMPATIBILITY_CODE, 0x18
.set LONG_CODE, 0x08
.set DATA, 0x10
.set CR0_PG, 0x80000000
.set CR4_LA57, 0x1000

.text
// [[noreturn]] void enter_kernel(u64 root, u64 boot_info, u64 entry)
.globl enter_kernel
enter_kernel:
    cli
    cld
    mov %rcx, %cr3
    mov %rdx, %rdi
    jmp *%r8

// Five-level paging can be left only with paging off, that is, through 32-bit code below 4 GiB [SDM-3A §4.1.1]. The
// code between the two labels is copied to a page there and entered with: rbx its address, ecx root (below 4 GiB), rdx
// boot_info, r8 entry.
// [[noreturn]] void enter_kernel_from_five_levels(u64 root, u64 boot_info, u64 entry, void* page)
.globl enter_kernel_from_five_levels
enter_kernel_from_five_levels:
    cli
    cld
    mov %r9, %rbx
    mov %rdx, boot_info_slot - five_levels_begin(%rbx)
    mov %r8, entry_slot - five_levels_begin(%rbx)
    jmp *%rbx

.globl five_levels_begin
five_levels_begin:
    lea gdt - five_levels_begin(%rbx), %rax
    mov %rax, gdt_base - five_levels_begin(%rbx)
    lgdt gdt_limit - five_levels_begin(%rbx)
    lea 4096(%rbx), %rsp
    pushq $COMPATIBILITY_CODE
    lea compatibility - five_levels_begin(%rbx), %rax
    push %rax
    lretq
.code32
compatibility:
    mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov %cr0, %eax
    and $~CR0_PG, %eax
    mov %eax, %cr0
    mov %cr4, %eax
    and $~CR4_LA57, %eax
    mov %eax, %cr4
    mov %ecx, %cr3
    mov %cr0, %eax
    or $CR0_PG, %eax // EFER.LME is still set: back to long mode, now with four levels
    mov %eax, %cr0
    pushl $LONG_CODE
    lea four_levels - five_levels_begin(%ebx), %eax
    pushl %eax
    lretl
.code64
four_levels:
    mov %ebx, %ebx // the upper halves are undefined after 32-bit code
    lea 4096(%rbx), %rsp
    mov boot_info_slot - five_levels_begin(%rbx), %rdi
    jmp *entry_slot - five_levels_begin(%rbx)
.balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    // 64-bit code
    .quad 0x00cf93000000ffff    // data
    .quad 0x00cf9b000000ffff    // 32-bit code
gdt_limit:
    .word gdt_limit - gdt - 1
gdt_base:
    .quad 0
boot_info_slot:
    .quad 0
entry_slot:
    .quad 0
.globl five_levels_end
five_levels_end:

// The kernel image, linked and stripped.
.section .rdata, "dr"
.balign 16
.globl kernel_elf_begin
kernel_elf_begin:
    .incbin FIRSTLIGHT_ELF
.globl kernel_elf_end
kernel_elf_end:
