"""EFI system partitions: a FAT image with the loader, the command line and the map file, made by mtools."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from . import process

MEBIBYTE = 1 << 20


def make(image: Path, efi: Path, cmdline: str, map_file: Path | None, files: Mapping[str, str]) -> Path:
    """`files`: replacements, to test invalid ones: path to contents, one character per byte. A path that ends in / is a directory."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "cmdline.txt"
        text.write_text(cmdline + "\n")
        size = max(4, -(-efi.stat().st_size // MEBIBYTE) + 2) * MEBIBYTE
        with open(image, "wb") as file:
            file.truncate(size)
        mtools("mformat", "-i", image, "-N", "f17e0001", "-T", str(size // 512), "-h", "16", "-s", "63", "::")
        mtools("mmd", "-i", image, "::/EFI", "::/EFI/BOOT", "::/firstlight")
        mtools("mcopy", "-i", image, efi, "::/EFI/BOOT/BOOTX64.EFI")
        mtools("mcopy", "-i", image, text, "::/firstlight/cmdline.txt")
        if map_file:
            mtools("mcopy", "-i", image, map_file, "::/firstlight/map.txt")
        for name, content in files.items():
            if name.endswith("/"):
                mtools("mmd", "-i", image, f"::/{name.rstrip('/')}")
                continue
            text.write_bytes(content.encode("latin-1"))
            mtools("mcopy", "-o", "-i", image, text, f"::/{name}")
    return image


def mtools(*words: str | Path) -> None:
    process.run(words, timeout=60, env=dict(os.environ, MTOOLS_SKIP_CHECK="1"))
