"""Disk images in QEMU's format qcow2, version 2 [QEMU's docs/interop/qcow2.rst]: an empty one is made, and one that QEMU has written is read.

QEMU keeps the tables of such an image in memory until the guest flushes. So if QEMU is killed, whatever was not flushed is lost, as on a disk with a volatile cache.
"""

from __future__ import annotations

import struct
from pathlib import Path

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
MAGIC = b"QFI\xfb"
OFFSET = 0x00FF_FFFF_FFFF_FE00  # of an entry of a table: the place in the file
ENTRIES = CLUSTER // 8


def make(image: Path, size: int) -> None:
    """Four clusters: header, table of reference counts, one block of them, and the first table, which is empty."""
    tables = -(-size // (CLUSTER * ENTRIES))
    if tables > ENTRIES:
        raise ValueError(f"{size} bytes are more than one cluster of the first table covers")
    with open(image, "wb") as file:
        file.write(HEADER.pack(MAGIC, 2, 0, 0, CLUSTER_BITS, size, 0, tables, 3 * CLUSTER, CLUSTER, 1, 0, 0))
        file.seek(CLUSTER)
        file.write(struct.pack(">Q", 2 * CLUSTER))
        file.seek(2 * CLUSTER)
        file.write(struct.pack(">4H", 1, 1, 1, 1))
        file.truncate(4 * CLUSTER)


def read(image: Path) -> bytes:
    """The disk's contents. ValueError: not an image as make() makes them."""
    data = image.read_bytes()
    magic, version, backing, _, bits, size, encrypted, tables, first, *_ = HEADER.unpack_from(data.ljust(HEADER.size, b"\0"))
    if (magic, version, backing, bits, encrypted) != (MAGIC, 2, 0, CLUSTER_BITS, 0):
        raise ValueError(f"{image}: not a qcow2 image of version 2 with clusters of {CLUSTER} bytes")
    found = bytearray(size)
    for number in range(tables):
        (second,) = struct.unpack_from(">Q", data, first + 8 * number)
        if not second & OFFSET:
            continue
        for index, entry in enumerate(struct.unpack_from(f">{ENTRIES}Q", data, second & OFFSET)):
            at = (number * ENTRIES + index) * CLUSTER
            if entry >> 62 & 1:
                raise ValueError(f"{image}: a compressed cluster")
            if entry & OFFSET and at < size:
                found[at : at + CLUSTER] = data[entry & OFFSET : (entry & OFFSET) + CLUSTER].ljust(CLUSTER, b"\0")
    return bytes(found[:size])
