"""Checks on the built images: entries, segments, registers the kernel must not touch, size."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable

from . import paths, process
from .vmtests import Result

ELF_LIMIT = 512 << 10
OBJDUMP = "llvm-objdump-19"
READELF = "llvm-readelf-19"
# Vector and x87 registers: the kernel does not save them. The driver prints them as %xmm0, %st(0).
FORBIDDEN = re.compile(r"%(xmm|ymm|zmm|mm|st)\d?\b")
ALLOWED_FUNCTIONS: tuple[str, ...] = ()


def checks() -> Iterable[Result]:
    for name, check in (
        ("image/pvh-note", pvh_note),
        ("image/segments-w-xor-x", segments),
        ("image/size", size),
        ("image/no-vector-registers", registers),
        ("image/efi", efi),
    ):
        begin = time.monotonic()
        complaint = check()
        yield Result(name, "failed" if complaint else "passed", time.monotonic() - begin, complaint)


def tool(*words: str) -> str:
    return process.run(words, timeout=60, stderr=None).stdout


def pvh_note() -> str:
    text = tool(READELF, "--notes", str(paths.KERNEL))
    # XEN_ELFNOTE_PHYS32_ENTRY is 18.
    return "" if re.search(r"Xen\s+0x0*[48]\s.*\(0x0*12\)", text) else f"no ELF note of owner Xen, type 18, 4 or 8 bytes: {text.strip()[:200]}"


def segments() -> str:
    found = 0
    for line in tool(READELF, "--program-headers", "--wide", str(paths.KERNEL)).splitlines():
        match = re.match(r"\s+LOAD\s+(?:0x[0-9a-f]+\s+){5}([RWE ]{3})", line)
        if match:
            found += 1
            if "W" in match[1] and "E" in match[1]:
                return f"a segment is writable and executable: {line.strip()}"
    return "" if found else "no LOAD segment found"


def size() -> str:
    seen = paths.KERNEL.stat().st_size
    return "" if seen < ELF_LIMIT else f"{seen} bytes, less than {ELF_LIMIT} expected"


def registers() -> str:
    function = ""
    for line in tool(OBJDUMP, "-d", "--no-show-raw-insn", str(paths.KERNEL_SYMBOLS)).splitlines():
        if line.endswith(">:"):
            function = line
        elif FORBIDDEN.search(line) and not any(name in function for name in ALLOWED_FUNCTIONS):
            return f"{function} {line.strip()}"
    return ""


def efi() -> str:
    text = tool(OBJDUMP, "-p", str(paths.EFI))
    match = re.search(r"^Subsystem\s+0*([0-9a-f]+)", text, re.M)
    return "" if match and int(match[1], 16) == 10 else "not a PE of subsystem 10 (EFI application)"
