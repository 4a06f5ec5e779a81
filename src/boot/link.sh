#!/bin/sh
# link.sh OUT SCRIPT OBJECTS...: links the image twice (the second time with its own symbol table, for backtraces),
# strips it and checks the properties that the kernel relies on. The code of the C++ units is made by the first link; the
# second, and those of later builds, find what has not changed in a cache.
set -eu
out=$1
script=$2
shift 2
work=$out/link
mkdir -p "$work"

link() {
    ld.lld-19 -nostdlib -static --gc-sections --icf=all -z max-page-size=4096 -z noexecstack --lto-O2 -mllvm -code-model=kernel \
        --thinlto-cache-dir="$work/cache" --thinlto-cache-policy=prune_after=24h:cache_size_bytes=200m -T "$script" "$@"
}

fail() {
    echo "link.sh: $1" >&2
    exit 1
}

# Converts lines "ADDRESS TYPE NAME" to the symbol table, as assembly; for its format see core/symbols.cppm.
make_table() {
    awk '
    function scope_of(name) { return match(name, /^.*::/) ? substr(name, 1, RLENGTH) : "" }
    BEGIN { count = 0 }
    {
        name = $0
        sub(/^[^ ]+ [^ ]+ /, "", name)
        gsub(/@[A-Za-z0-9_.]+/, "", name)       # the module of the name
        gsub(/\[abi:[a-z0-9]+\]/, "", name)
        gsub(/ ?\(?\.llvm\.[0-9]+\)?/, "", name)  # local to a unit, and used by code that was inlined elsewhere
        gsub(/std::__1::/, "std::", name)       # the version namespace of libc++
        gsub(/\(anonymous namespace\)/, "{}", name)
        # Remove what a backtrace does not need: template arguments, parameters, and the return type that only
        # templates have.
        gsub(/operator\(\)/, "operator{}", name)
        gsub(/operator<=>/, "operator{ord}", name)
        gsub(/operator<</, "operator{shl}", name)
        gsub(/operator</, "operator{lt}", name)
        gsub(/operator>>/, "operator{shr}", name)
        gsub(/operator>/, "operator{gt}", name)
        gsub(/operator /, "operator_", name)
        while (gsub(/<[^<>]*>/, "", name)) { }
        sub(/\(.*/, "", name)
        sub(/^.* /, "", name)
        gsub(/operator_/, "operator ", name)
        gsub(/\{gt\}/, ">", name)
        gsub(/\{shr\}/, ">>", name)
        gsub(/\{lt\}/, "<", name)
        gsub(/\{shl\}/, "<<", name)
        gsub(/\{ord\}/, "<=>", name)
        gsub(/operator\{\}/, "operator()", name)
        gsub(/\{\}::/, "", name)
        gsub(/["\\]/, "", name)
        name = substr(name, 1, 60)
        address = substr($1, length($1) - 7)    # the image is in the last 2 GiB: 32 bits suffice
        if (address == last) next
        last = address
        addresses[count] = address
        names[count++] = name
    }
    END {
        scopes = 1                              # scope 0 is the empty one
        for (i = 0; i < count; i++) if (!(names[i] in uses)) { uses[names[i]] = 1; scope_uses[scope_of(names[i])]++ }
        print ".section .symbols, \"a\", @progbits"
        print ".balign 8"
        print ".ascii \"FLSYMTAB\""
        at = 0
        unique = 0
        for (i = 0; i < count; i++) {
            if (names[i] in where) continue     # template instances and overloads share a name
            scope = scope_of(names[i])
            if (!(scope in index_of)) {
                index_of[scope] = scope == "" || scope_uses[scope] < 2 || scopes > 255 ? 0 : scopes
                if (index_of[scope]) scope_names[scopes++] = scope
            }
            where[names[i]] = at
            unique_scopes[unique] = index_of[scope]
            uniques[unique] = index_of[scope] ? substr(names[i], length(scope) + 1) : names[i]
            at += 1 + length(uniques[unique++]) + 1
        }
        if (at > 65535) { print "link.sh: the names of the functions take " at " bytes, an offset has 16 bits" > "/dev/stderr"; exit 1 }
        printf ".long %d, 2, %d\n", count, scopes
        for (i = 0; i < count; i++) printf ".long 0x%s - 0x80000000\n", addresses[i]
        for (i = 0; i < count; i++) printf ".short %d\n", where[names[i]]
        print ".asciz \"\""
        for (i = 1; i < scopes; i++) printf ".asciz \"%s\"\n", scope_names[i]
        for (i = 0; i < unique; i++) printf ".byte %d\n.asciz \"%s\"\n", unique_scopes[i], uniques[i]
    }'
}

functions() {
    llvm-nm-19 -n --defined-only "$1" | awk '$2 == "t" || $2 == "T" || $2 == "w" || $2 == "W"' | grep -v ' image_' || true
}

# Debuggers derive a function's name from its mangled name, which includes its module: `break fl::boot::kernel_start`
# finds nothing, and `fl::boot::kernel_start@boot.start` cannot be typed. Without a mangled name they build the name from
# the namespaces. So this changes every DW_AT_linkage_name (0x6e) into a DW_AT_description (0x5a), which they ignore: one
# byte in the abbreviation that declares it [DWARF5 §7.5.3]. Input: bytes as numbers, one per line; output: assembly.
plain_names() {
    awk '
    BEGIN { part = "code"; scale = 1 }
    {
        byte = $1 + 0
        if (part == "children") {
            part = "attribute"
            print ".byte " byte
            next
        }
        value += byte % 128 * scale             # LEB128 [DWARF5 §7.6]
        scale *= 128
        print ".byte " (part == "attribute" && scale == 128 && byte == 110 ? 90 : byte)
        if (byte >= 128) next
        if (part == "code") part = value ? "tag" : "code"
        else if (part == "tag") part = "children"
        else if (part == "attribute") {
            attribute = value
            part = "form"
        }
        else if (part == "constant") part = "attribute"
        else if (value == 33) part = "constant" # DW_FORM_implicit_const: its value follows
        else part = attribute || value ? "attribute" : "code"
        value = 0
        scale = 1
    }
    END { if (part != "code") exit 1 }'
}

: | make_table >"$work/symbols0.s"
clang-19 --target=x86_64-unknown-none-elf -c "$work/symbols0.s" -o "$work/symbols0.o"
link "$@" "$work/symbols0.o" -o "$work/first.elf"

functions "$work/first.elf" >"$work/functions0"
llvm-cxxfilt-19 <"$work/functions0" | make_table >"$work/symbols1.s"
clang-19 --target=x86_64-unknown-none-elf -c "$work/symbols1.s" -o "$work/symbols1.o"
link "$@" "$work/symbols1.o" -o "$work/firstlight.elf"
functions "$work/firstlight.elf" >"$work/functions1"
cmp -s "$work/functions0" "$work/functions1" || fail "the table of symbols moved the image: .symbols must stand last in kernel.ld"

# The kernel does not save x87 and vector registers, so no code may use them.
if llvm-objdump-19 -d --no-show-raw-insn "$work/firstlight.elf" | grep -E '%([xyz]?mm[0-9]|st\b)' >"$work/vector"; then
    head -5 "$work/vector" >&2
    fail "the image uses x87 or vector registers; see $work/vector"
fi
if llvm-readelf-19 -lW "$work/firstlight.elf" | grep -E '^ +LOAD.* (RWE|WE|.WE) ' >&2; then
    fail "a segment is both writable and executable"
fi

llvm-objcopy-19 --dump-section .debug_abbrev="$work/abbreviations0" "$work/firstlight.elf" "$work/first.elf"
od -An -v -tu1 -w1 "$work/abbreviations0" | plain_names >"$work/abbreviations.s" || fail "the abbreviations of the debug information could not be read"
clang-19 --target=x86_64-unknown-none-elf -c "$work/abbreviations.s" -o "$work/abbreviations.o"
llvm-objcopy-19 -O binary --only-section=.text "$work/abbreviations.o" "$work/abbreviations1"
llvm-objcopy-19 --update-section .debug_abbrev="$work/abbreviations1" "$work/firstlight.elf"

llvm-strip-19 --strip-all "$work/firstlight.elf" -o "$work/stripped.elf"
mv "$work/firstlight.elf" "$out/firstlight.debug.elf"
# For loaders that take 32-bit ELF files only: QEMU as the device model of a Xen HVM guest. It is entered by PVH, at a
# physical address, and its segments are placed by their physical addresses, so the halved virtual ones do not matter.
llvm-objcopy-19 -O elf32-i386 "$work/stripped.elf" "$out/firstlight-elf32.elf"
mv "$work/stripped.elf" "$out/firstlight.elf"
size=$(wc -c <"$out/firstlight.elf")
echo "firstlight.elf: $size bytes, $(wc -l <"$work/functions0") functions"
