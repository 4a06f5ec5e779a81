"""The checks on the built images detect their faults."""

import struct
import unittest

from firstlight import image


def pe(base: int = 0, characteristics: int = 0x22, traits: int = 0x160, subsystem: int = 10, kind: int = 10, target: int = 0x1000, flags: int = 0x40000000) -> bytes:
    """A PE32+ with one section at 0x1000: a block of relocations with one entry, for the quadword after it."""
    header = bytearray(0x400)
    header[:2] = b"MZ"
    struct.pack_into("<I", header, 0x3C, 0x40)
    header[0x40:0x44] = b"PE\0\0"
    struct.pack_into("<HH12xHH", header, 0x44, 0x8664, 1, 240, characteristics)
    optional = 0x40 + 24
    struct.pack_into("<H", header, optional, 0x20B)
    struct.pack_into("<Q", header, optional + 24, base)
    struct.pack_into("<I", header, optional + 56, 0x2000)
    struct.pack_into("<HH", header, optional + 68, subsystem, traits)
    struct.pack_into("<II", header, optional + 112 + 40, 0x1000, 12)
    struct.pack_into("<8sIIII12xI", header, optional + 240, b".all", 0x200, 0x1000, 0x200, 0x400, flags)
    section = bytearray(0x200)
    struct.pack_into("<IIHH", section, 0, 0x1000, 12, kind << 12 | 16, 0)
    struct.pack_into("<Q", section, 16, target)
    return bytes(header + section)


class Efi(unittest.TestCase):
    def test_a_good_one(self):
        self.assertEqual(image.pe_faults(pe()), "")

    def test_what_some_firmware_refuses(self):
        for arguments, words in (
            ({"base": 0x140000000}, "image base 0x140000000"),
            ({"characteristics": 0x23}, "no relocations"),
            ({"traits": 0x120}, "no relocations"),
            ({"subsystem": 3}, "subsystem 3"),
            ({"kind": 3}, "relocation type 3"),
            ({"target": 0x2000}, "leads out of the image"),
            ({"flags": 0xE0000000}, "writable and executable"),
        ):
            self.assertIn(words, image.pe_faults(pe(**arguments)), arguments)

    def test_a_cut_one(self):
        for size in (0, 0x3D, 0x50, 0x100, 0x404):
            self.assertIn("not a", image.pe_faults(pe()[:size]))


if __name__ == "__main__":
    unittest.main()
