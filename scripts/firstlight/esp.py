"""EFI system partitions: a FAT image with the loader, the command line and the map file, made by mtools."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import process

MEBIBYTE = 1 << 20


FIRST_SECTOR = 2048  # of the partition of a disk
EFI_SYSTEM = 0xEF  # MBR's type of such a partition [uefi-2.10 §5.2.2]


def make(image: Path, efi: Path, cmdline: str, map_file: Path | None, files: Mapping[str, str]) -> Path:
    """The file system alone, as of a removable medium. `files`: replacements, to test invalid ones: path to contents, one character per byte. A path that ends in / is a directory."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "cmdline.txt"
        text.write_text(cmdline + "\n")
        size = max(4, -(-efi.stat().st_size // MEBIBYTE) + 2) * MEBIBYTE
        with open(image, "wb") as file:
            file.truncate(size)
        fill(str(image), size, [(efi, "EFI/BOOT/BOOTX64.EFI"), (text, "firstlight/cmdline.txt"), *([(map_file, "firstlight/map.txt")] if map_file else [])])
        for name, content in files.items():
            if name.endswith("/"):
                mtools("mmd", "-i", image, f"::/{name.rstrip('/')}")
                continue
            text.write_bytes(content.encode("latin-1"))
            mtools("mcopy", "-o", "-i", image, text, f"::/{name}")
    return image


def make_disk(image: Path, size: int, efi: Path, cmdline: str) -> Path:
    """A fixed disk of `size` bytes with one partition, which is an EFI system partition."""
    sectors = size // 512 - FIRST_SECTOR
    record = bytearray(512)
    record[446:462] = struct.pack("<B3sB3sII", 0, b"\x20\x21\x00", EFI_SYSTEM, b"\xfe\xff\xff", FIRST_SECTOR, sectors)
    record[510:] = b"\x55\xaa"
    with open(image, "wb") as file:
        file.write(record)
        file.truncate(size)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "cmdline.txt"
        text.write_text(cmdline + "\n")
        fill(f"{image}@@{FIRST_SECTOR * 512}", sectors * 512, [(efi, "EFI/BOOT/BOOTX64.EFI"), (text, "firstlight/cmdline.txt")])
    return image


def fill(image: str, size: int, files: Sequence[tuple[Path, str]]) -> None:
    """Makes the file system, and copies these files to these paths. `image` is mtools' name of the place."""
    mtools("mformat", "-i", image, "-N", "f17e0001", "-T", str(size // 512), "-h", "16", "-s", "63", "::")
    mtools("mmd", "-i", image, "::/EFI", "::/EFI/BOOT", "::/firstlight")
    for file, name in files:
        mtools("mcopy", "-i", image, file, f"::/{name}")


def mtools(*words: str | Path) -> None:
    process.run(words, timeout=60, env=dict(os.environ, MTOOLS_SKIP_CHECK="1"))
