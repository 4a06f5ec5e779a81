"""Checks on the built images: entries, segments, registers the kernel must not touch, size."""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Iterable

from . import paths, process
from .vmtests import Result

ELF_LIMIT = 1024 << 10
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
    return pe_faults(paths.EFI.read_bytes())


def pe_faults(data: bytes) -> str:
    """Why UEFI firmware could not load this PE [UEFI-2.10 §2.1.1]. It may be loaded at any address, so it must have base 0 and relocations."""
    try:
        at = struct.unpack_from("<I", data, 0x3C)[0]
        machine, sections, characteristics = *struct.unpack_from("<4xHH", data, at), struct.unpack_from("<H", data, at + 22)[0]
        optional = at + 24
        magic = struct.unpack_from("<H", data, optional)[0]
        base, image_size = struct.unpack_from("<Q", data, optional + 24)[0], struct.unpack_from("<I", data, optional + 56)[0]
        subsystem, traits = struct.unpack_from("<HH", data, optional + 68)
        reloc_at, reloc_size = struct.unpack_from("<II", data, optional + 112 + 5 * 8)
        table = optional + struct.unpack_from("<H", data, at + 20)[0]
        regions = [(*struct.unpack_from("<8xIIII", data, table + 40 * i), struct.unpack_from("<I", data, table + 40 * i + 36)[0]) for i in range(sections)]
        if data[at : at + 4] != b"PE\0\0" or magic != 0x20B or machine != 0x8664:
            return "not a PE32+ image for x86-64"
        if subsystem != 10:
            return f"subsystem {subsystem}, 10 (EFI application) expected"
        if base != 0:
            return f"image base {base:#x}: firmware that loads at the base or not at all refuses it; 0 expected"
        if characteristics & 1 or not traits & 0x40 or not reloc_size:
            return "no relocations: it could be loaded at one place only"
        if any(flags & 0xA0000000 == 0xA0000000 for *_, flags in regions):
            return "a section is writable and executable"

        def offset(address: int) -> int:
            for size, begin, raw_size, raw, _ in regions:
                if begin <= address < begin + min(size, raw_size):
                    return raw + address - begin
            raise ValueError(f"{address:#x} lies in no section's data")

        done = 0
        while done < reloc_size:
            page, block = struct.unpack_from("<II", data, offset(reloc_at + done))
            for entry in struct.unpack_from(f"<{(block - 8) // 2}H", data, offset(reloc_at + done) + 8):
                kind, place = entry >> 12, page + (entry & 0xFFF)
                if kind not in (0, 10):
                    return f"relocation type {kind} at {place:#x}, DIR64 expected: it would not reach every address"
                if kind == 10 and not 0 < struct.unpack_from("<Q", data, offset(place))[0] < image_size:
                    return f"the address at {place:#x} leads out of the image"
            done += block
    except (struct.error, ValueError) as error:
        return f"not a well-formed PE: {error}"
    return ""
