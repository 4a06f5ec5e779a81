# The kernel image: firstlight.debug.elf (with symbols, for gdb), firstlight.elf (the bootable image), firstlight-elf32.elf
# (the same as a 32-bit ELF) and BOOTX64.EFI (the UEFI loader with the image embedded).
set(freestanding
  -ffreestanding -fno-exceptions -fno-rtti -nostdinc++ -nostdlibinc
  "SHELL:-isystem \"${CMAKE_CURRENT_SOURCE_DIR}/core/freestanding/site\""
  "SHELL:-isystem /usr/lib/llvm-19/include/c++/v1"
  "SHELL:-isystem \"${CMAKE_CURRENT_SOURCE_DIR}/core/freestanding/libc\""
  -mno-red-zone -fno-stack-protector -fno-threadsafe-statics -fno-asynchronous-unwind-tables
  -ffunction-sections -fdata-sections -fno-pic -mno-sse -mno-mmx -fno-omit-frame-pointer)
# Optimised for size, except for the I/O path (`hot` below): the image should stay below the limit of scripts/firstlight/image.py.
# Source paths and the compilation directory are relative to the root of the checkout, so that a debugger started there
# finds the sources.
# Optimised at link time as well, which inlines across modules (functions of a class are not implicitly inline there). A
# function keeps the options of its unit.
set(kernel_flags -Oz -flto=thin --target=x86_64-unknown-none-elf ${freestanding} -mcmodel=kernel -fno-strict-aliasing -fdebug-compilation-dir=.)

list(APPEND units ${boot_units})
set(interfaces ${units})
list(FILTER interfaces INCLUDE REGEX "\\.cppm$")
list(FILTER units EXCLUDE REGEX "\\.cppm$")

# Units and interfaces of the I/O path.
set(hot_paths
  "^io/(block|block_queue|executor|slots|ring|task|bench|histogram)"
  "^drivers/[a-z_]+/disk"
  "^drivers/xen_net/(queue|device)"
  "^drivers/ata"
  "^drivers/ahci/(queue|commands\\.cppm|slots\\.cppm|memory|port|interrupts)"
  "^drivers/pvscsi/(adapter\\.cppm|requests\\.cppm|rings\\.cppm)"
  "^drivers/nvme/(queue|interrupts)"
  "^drivers/xen_blk/(queue|requests|answer|event_channel)"
  "^drivers/storvsc/(queue|unit|answer\\.cppm)"
  "^hv/hyperv/(channel|packets|hypercall)"
  "^hv/xen/(events|grants|hypercall)"
  "^core/machine/clock"
  "^boot/drivers"
  # Not on the I/O path, but a large part of the way to the first block.
  "^core/(log|text|paging|cpuid)\\.cpp"
  "memory_functions")
list(JOIN hot_paths "|" hot)
# First, because the linker keeps the first copy of a template instantiation that it sees.
set(hot_units ${units})
list(FILTER hot_units INCLUDE REGEX "${hot}")
# Not on the I/O path: close, time-outs and retries of a queue; the pool of coroutine frames.
list(FILTER hot_units EXCLUDE REGEX "^io/(block_queue|task)\\.cpp$")
list(REMOVE_ITEM units ${hot_units})
list(PREPEND units ${hot_units})
set(hot_interfaces ${interfaces})
list(FILTER hot_interfaces INCLUDE REGEX "${hot}")

add_library(firstlight_objects OBJECT)
target_compile_options(firstlight_objects PRIVATE ${kernel_flags})
target_include_directories(firstlight_objects PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
target_sources(firstlight_objects PRIVATE ${units} PUBLIC FILE_SET CXX_MODULES FILES ${interfaces})
set_source_files_properties(${hot_units} ${hot_interfaces} PROPERTIES COMPILE_OPTIONS -O2)
# Code generation calls memcpy and its like, which link-time optimisation does not foresee.
set_source_files_properties(core/machine/memory_functions.cpp PROPERTIES COMPILE_OPTIONS "-O2;-fno-lto")
foreach(hv IN LISTS FIRSTLIGHT_HV)
  string(TOUPPER ${hv} upper)
  target_compile_definitions(firstlight_objects PRIVATE FIRSTLIGHT_HV_${upper}=1)
endforeach()

# Linked twice: the symbol table for backtraces is built from the first link. It is last in the image, so that nothing
# moves.
set(link_script ${CMAKE_CURRENT_SOURCE_DIR}/boot/kernel.ld)
set(out ${CMAKE_BINARY_DIR})
add_custom_command(OUTPUT ${out}/firstlight.debug.elf ${out}/firstlight.elf ${out}/firstlight-elf32.elf
  COMMAND sh ${CMAKE_CURRENT_SOURCE_DIR}/boot/link.sh ${out} ${link_script} "$<TARGET_OBJECTS:firstlight_objects>"
  DEPENDS firstlight_objects $<TARGET_OBJECTS:firstlight_objects> ${link_script} ${CMAKE_CURRENT_SOURCE_DIR}/boot/link.sh
  COMMAND_EXPAND_LISTS VERBATIM COMMENT "Linking firstlight.elf")
add_custom_target(firstlight_elf ALL DEPENDS ${out}/firstlight.elf)

if(EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/boot/uefi/CMakeLists.txt)
  add_subdirectory(boot/uefi)
endif()
