# Writes an assembly file that embeds the compiled table.
file(WRITE ${OUTPUT} "    .section .rodata\n    .globl firstlight_dsdt, firstlight_dsdt_end\nfirstlight_dsdt:\n    .incbin \"${AML}\"\nfirstlight_dsdt_end:\n    .section .note.GNU-stack,\"\",@progbits\n")
