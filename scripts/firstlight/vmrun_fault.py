"""Removes one instruction from the unpacked QEMU, because of a fault in its emulation of SVM.

When VMRUN injects an external interrupt, QEMU's helper_vmrun delivers it at once, but also leaves its number in
`exception_index`. If the main loop looks there before the next #VMEXIT resets it (under -icount: whenever a virtual timer
expires within those few microseconds), the same interrupt is delivered a second time, as if it were an exception: with
interrupts disabled in the guest. A Linux guest then deadlocks on a lock of its timers; it happened in about every third
boot of the lab in deterministic mode. Seen in QEMU 10.0 (target/i386/tcg/system/svm_helper.c, case SVM_EVTINJ_TYPE_INTR).

The store is found by its context: the only 32-bit store of ESI, the second argument, shortly before the only call
of do_interrupt_x86_hardirq in helper_vmrun, or where that has no symbol (7.2), in the whole program. A QEMU built
differently is left unchanged.

Under Xen the kernel then slept for ever: a timer interrupt between its last look for work and its halt, although it
had disabled interrupts. It happened in about one of 150 guests, most often while a disk was verified.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

from . import process

NOP = bytes.fromhex("660f1f440000")  # six bytes, as long as the store
STORE_OF_ESI = re.compile(rb"(?s)\x89[\xb0-\xb3\xb5-\xb7].{4}")  # mov %esi,disp32(%reg)
WINDOW = 96


def symbols(program: Path) -> dict[str, int]:
    answer = process.run(["nm", "-D", "--defined-only", program], timeout=60).stdout
    return {words[2].split("@")[0]: int(words[0], 16) for words in map(str.split, answer.splitlines()) if len(words) == 3}


def segments(program: Path) -> list[tuple[int, int, int]]:
    """Offset in the file, address and size of each segment."""
    answer = process.run(["readelf", "-lW", program], timeout=60).stdout
    matches = re.finditer(r"LOAD\s+0x([0-9a-f]+) 0x([0-9a-f]+) 0x[0-9a-f]+ 0x([0-9a-f]+)", answer)
    return [(int(match[1], 16), int(match[2], 16), int(match[3], 16)) for match in matches]


def offset_of(program: Path, address: int) -> int | None:
    """Offset in the file of an address of the program."""
    return next((address - start + offset for offset, start, size in segments(program) if start <= address < start + size), None)


def segment_of(program: Path, address: int) -> tuple[int, int] | None:
    """First address and end of the segment with this address."""
    return next(((start, start + size) for _, start, size in segments(program) if start <= address < start + size), None)


def find(code: bytes, address: int, target: int) -> int | None:
    """The store's position in `code`, which starts at `address`: the only one before a call of `target`; None if that is not so."""
    calls = [
        match.start()
        for match in re.finditer(rb"\xe8", code)
        if match.start() + 5 <= len(code)
        and address + match.start() + 5 + struct.unpack_from("<i", code, match.start() + 1)[0] == target
    ]
    found = {
        start + match.start()
        for call in calls
        for start in [max(0, call - WINDOW)]
        for match in STORE_OF_ESI.finditer(code[start:call])
    }
    return found.pop() if len(found) == 1 else None


def correct(program: Path) -> bool:
    """Whether the store was found and removed."""
    names = symbols(program)
    target = names.get("do_interrupt_x86_hardirq")
    if target is None:
        return False
    image = bytearray(program.read_bytes())
    if "helper_vmrun" in names:
        entry = names["helper_vmrun"]
        end = min((value for value in names.values() if value > entry), default=entry)
    else:
        segment = segment_of(program, target)
        if segment is None:
            return False
        entry, end = segment
    offset = offset_of(program, entry)
    if offset is None:
        return False
    position = find(bytes(image[offset : offset + end - entry]), entry, target)
    if position is None:
        return False
    image[offset + position : offset + position + len(NOP)] = NOP
    program.write_bytes(image)
    return True
