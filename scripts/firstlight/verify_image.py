"""Checks a stamped image from outside: an independent implementation of "Stamp of verify" in docs/INTERFACES.md."""

from __future__ import annotations

import struct
from pathlib import Path

MAGIC = b"FLVERIFY"
HEADER = struct.Struct("<8sQQQII")  # magic, LBA, generation, seed, CRC-32C, block size
SIZES = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
# With erase= on the command line: what becomes of a block, by its number modulo 4, and the record's field that counts it.
ERASED = {1: ("discard", "discarded"), 2: ("zeroes", "zeroed"), 3: ("secure-discard", "secure_discarded")}
DEFAULTS = {"bs": 4096, "seed": 1, "generation": 1}


def crc32c():
    import crcmod.predefined  # Debian's python3-crcmod

    return crcmod.predefined.mkPredefinedCrcFun("crc-32c")


def value(text: str) -> int:
    """A number on the command line."""
    return int(text[:-1], 0) * SIZES[text[-1]] if text[-1:] in SIZES else int(text, 0)


def compare(record: dict, words: dict[str, str], image_size: int) -> list[str]:
    """Compares a `verify` record with the command line: whether the kernel reports having done what was requested."""
    asked = {key: value(words[key]) if key in words else default for key, default in DEFAULTS.items()}
    count = value(words.get("count", "0"))
    expected = {**asked, "first_lba": 0, "bad": 0, "ok": True}
    if count:
        del expected["first_lba"]
    expected |= dict.fromkeys(("blocks", "written", "read"), count or image_size // asked["bs"])
    erased = words.get("erase", "").split(",")
    for remainder, (name, key) in ERASED.items():
        first = record.get("first_lba", 0) // (asked["bs"] // 512)
        numbers = range(first, first + expected["blocks"])
        if name in erased or name != "secure-discard":  # that field is there if it was asked for
            expected[key] = sum(number % 4 == remainder for number in numbers) if name in erased else 0
    complaints = [f"{key} {record.get(key)!r}, expected {wanted!r}" for key, wanted in expected.items() if record.get(key) != wanted]
    if not count and record.get("blocks", 0) * record.get("bs", 0) != image_size:
        complaints.append(f"{record.get('blocks')} blocks of {record.get('bs')} bytes do not cover the {image_size} bytes of the image")
    return complaints


def check(image: Path, record: dict) -> list[str]:
    """The data that the record reports as written must be in the image; one line for each block that differs."""
    block_size = record["bs"]
    lba = record["first_lba"]
    crc = crc32c()
    bad = []
    with open(image, "rb") as file:
        file.seek(lba * 512)
        for index in range(record["blocks"]):
            expected = lba + index * (block_size // 512)
            block = file.read(block_size)
            _, erased = ERASED.get(expected // (block_size // 512) % 4, ("", ""))
            if erased and record.get(erased):
                fault = "" if erased != "zeroed" or not any(block) else "not zeros, and the record says it is zeroed"
            else:
                fault = check_block(block, block_size, expected, record["generation"], record["seed"], crc)
            if fault:
                bad.append(f"LBA {expected}: {fault}")
    return bad


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
