"""Removes one instruction from the unpacked QEMU, because of a fault in its emulation of SVM.

When VMRUN injects an external interrupt, QEMU's helper_vmrun delivers it at once, but also leaves its number in
`exception_index`. If the main loop looks there before the next #VMEXIT resets it (under -icount: whenever a virtual timer
expires within those few microseconds), the same interrupt is delivered a second time, as if it were an exception: with
interrupts disabled in the guest. A Linux guest then deadlocks on a lock of its timers; it happened in about every third
boot of the lab in deterministic mode. Seen in QEMU 10.0 (target/i386/tcg/system/svm_helper.c, case SVM_EVTINJ_TYPE_INTR).

The store is found by its context: the only 32-bit store of ESI, the second argument, shortly before the only call
of do_interrupt_x86_hardirq in helper_vmrun. A QEMU built differently is left unchanged.
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


def offset_of(program: Path, address: int) -> int | None:
    """Offset in the file of an address of the program."""
    answer = process.run(["readelf", "-lW", program], timeout=60).stdout
    for match in re.finditer(r"LOAD\s+0x([0-9a-f]+) 0x([0-9a-f]+) 0x[0-9a-f]+ 0x([0-9a-f]+)", answer):
        offset, start, size = (int(text, 16) for text in match.groups())
        if start <= address < start + size:
            return address - start + offset
    return None


def find(code: bytes, address: int, target: int) -> int | None:
    """The store's position in `code`, which starts at `address` and calls `target` once; None if that is not so."""
    calls = [
        match.start()
        for match in re.finditer(rb"\xe8", code)
        if match.start() + 5 <= len(code)
        and address + match.start() + 5 + struct.unpack_from("<i", code, match.start() + 1)[0] == target
    ]
    if len(calls) != 1:
        return None
    start = max(0, calls[0] - WINDOW)
    stores = [start + match.start() for match in STORE_OF_ESI.finditer(code[start : calls[0]])]
    return stores[0] if len(stores) == 1 else None


def correct(program: Path) -> bool:
    """Whether the store was found and removed."""
    names = symbols(program)
    entry, target = names.get("helper_vmrun"), names.get("do_interrupt_x86_hardirq")
    if entry is None or target is None:
        return False
    end = min((value for value in names.values() if value > entry), default=entry)
    offset = offset_of(program, entry)
    if offset is None:
        return False
    image = bytearray(program.read_bytes())
    position = find(bytes(image[offset : offset + end - entry]), entry, target)
    if position is None:
        return False
    image[offset + position : offset + position + len(NOP)] = NOP
    program.write_bytes(image)
    return True
