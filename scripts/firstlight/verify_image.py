"""Checks a stamped image from outside: an independent reading of "Stamp of verify" in docs/INTERFACES.md."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

MAGIC = b"FLVERIFY"
HEADER = struct.Struct("<8sQQQII")  # magic, LBA, generation, seed, CRC-32C, block size


@dataclasses.dataclass
class Checked:
    blocks: int
    bad: list[str]


def crc32c():
    import crcmod.predefined  # Debian's python3-crcmod

    return crcmod.predefined.mkPredefinedCrcFun("crc-32c")


def check(image: Path, record: dict) -> Checked:
    """`record` is the kernel's own `verify` record: what it says it wrote must be there."""
    block_size, blocks = record["bs"], record["blocks"]
    lba = record["first_lba"]
    crc = crc32c()
    bad = []
    with open(image, "rb") as file:
        file.seek(lba * 512)
        for number in range(blocks):
            expected = lba + number * (block_size // 512)
            fault = check_block(file.read(block_size), block_size, expected, record["generation"], record["seed"], crc)
            if fault:
                bad.append(f"LBA {expected}: {fault}")
    return Checked(blocks, bad)


def check_block(block: bytes, block_size: int, lba: int, generation: int, seed: int, crc) -> str:
    if len(block) != block_size:
        return f"the image ends after {len(block)} of {block_size} bytes"
    magic, *numbers = HEADER.unpack_from(block)
    if magic != MAGIC:
        return f"magic {magic!r}, expected {MAGIC!r}"
    seen_crc = numbers[3]
    for what, seen, expected in zip(
        ("LBA", "generation", "seed", "block size"), (*numbers[:3], numbers[4]), (lba, generation, seed, block_size)
    ):
        if seen != expected:
            return f"{what} {seen}, expected {expected}"
    computed = crc(block[:32] + bytes(4) + block[36:])
    if computed != seen_crc:
        return f"CRC-32C {seen_crc:#010x}, computed {computed:#010x}"
    return ""
