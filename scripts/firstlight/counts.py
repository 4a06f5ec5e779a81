"""Counts instructions by who executes them: the guest, KVM, the Linux with KVM, and the virtual machine monitor.

The lab's outer QEMU executes everything. A plugin (counts.c) counts its instructions between marks before and after each workload: this
kernel's function MARK, and in a Linux as the guest the program yardstick.MARKER.
"""

from __future__ import annotations

import bisect
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from . import image, lab, paths, process
from .problems import Exit, Problem

SOURCE = Path(__file__).parent / "counts.c"
QEMU_NEEDED = 9  # whose plugins have counters that are updated without a call
MARK = "mark_phase("  # of boot.start: called before and after each workload
PORT = 0x5F0  # that the mark writes to: the test host's; on QEMU's machines no device has it
PARTIES = ("guest", "kvm", "kernel", "vmm")
COMPILE_SECONDS = 60
CLANG = ("clang-19", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC")
# The marker does nothing but exit, at an address that no other program of the lab uses.
MARKER_ADDRESS = 0x6D6172_6B0000
MARKER_SOURCE = """
    .globl _start
    .type _start, @function
_start:
    xorl %edi, %edi
    movl $60, %eax # exit
    syscall
    .section .note.GNU-stack, "", @progbits
"""


@dataclasses.dataclass
class Section:
    """The counts between two marks."""

    parties: dict[str, int] = dataclasses.field(default_factory=dict)
    addresses: dict[int, int] = dataclasses.field(default_factory=dict)  # of this kernel as the guest

    @property
    def whole(self) -> dict[str, int]:
        """By party. The plugin's count of the guest is without the kernel's image."""
        return {party: self.parties.get(party, 0) + (sum(self.addresses.values()) if party == "guest" else 0) for party in PARTIES}


def read_sections(text: str) -> list[Section]:
    """The plugin's file [counts.c]."""
    sections: list[Section] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line == "section":
            sections.append(Section())
            continue
        name, _, count = line.partition(" ")
        if not sections or not count.isdigit() or not (name in PARTIES or re.fullmatch("0x[0-9a-f]+", name)):
            raise Problem(f"line {number} of the counts is {line!r}: a section, or a name and a count were expected.")
        if name in PARTIES:
            sections[-1].parties[name] = int(count)
        else:
            sections[-1].addresses[int(name, 16)] = int(count)
    return sections


class Symbols:
    """The functions of a kernel."""

    def __init__(self, listing: str) -> None:
        """`listing`: of llvm-nm, in the order of addresses, demangled."""
        self.starts: list[int] = []
        self.names: list[str] = []
        for line in listing.splitlines():
            if match := re.fullmatch(r"([0-9a-f]+) [tTwW] (.*)", line):
                self.starts.append(int(match[1], 16))
                self.names.append(short_name(match[2]))

    def name(self, address: int) -> str:
        index = bisect.bisect_right(self.starts, address) - 1
        return self.names[index] if index >= 0 else "?"

    def address(self, begin: str) -> int:
        """Of the only function whose name begins so, after its namespaces."""
        found = [start for start, name in zip(self.starts, self.names) if name.split("::")[-1].startswith(begin)]
        if len(found) != 1:
            raise Problem(f"{len(found)} functions of the kernel are called {begin}), one was expected.")
        return found[0]


def short_name(name: str) -> str:
    """Without modules, template arguments, the outer namespaces, and what link-time optimisation adds."""
    name = re.sub(r" \(\.llvm\.\d+\)|@[\w.]+|\[abi:\w+\]|\(anonymous namespace\)::|__1::|\bfl::", "", name)
    name = re.sub(r"operator(<=>|<<|>>|<|>|->)", lambda match: "operator" + match[1].translate({60: 1, 62: 2}), name)
    while (shorter := re.sub(r"<[^<>]*>", "", name)) != name:
        name = shorter
    return name.translate({1: "<", 2: ">"})


def compiled(folder: Path) -> Path:
    """The plugin."""
    made = folder / "counts.so"
    process.run([*CLANG, "-std=c11", "-shared", "-fvisibility=hidden", "-o", made, SOURCE], timeout=COMPILE_SECONDS, what="clang-19")
    return made


def marker(folder: Path) -> Path:
    """Linux's program that marks a workload."""
    source, made = folder / "mark.S", folder / "mark"
    source.write_text(MARKER_SOURCE)
    process.run([*CLANG, "-nostdlib", "-static", "-fuse-ld=lld", f"-Wl,-Ttext={MARKER_ADDRESS:#x}", "-o", made, source], timeout=COMPILE_SECONDS, what="clang-19")
    return made


def image_range(headers: str) -> tuple[int, int]:
    """First address, and the one after the last, of the loaded segments that llvm-readelf lists."""
    found = [(int(match[1], 16), int(match[2], 16)) for match in re.finditer(r"^ +LOAD +\S+ +(\S+) +\S+ +\S+ +(\S+)", headers, re.MULTILINE)]
    if not found:
        raise Problem("the kernel has no segments that are loaded.")
    return min(start for start, _ in found), max(start + size for start, size in found)


def possible(ready: lab.Lab) -> bool:
    match = re.match(r"(?:\d+:)?(\d+)", ready.versions.get("qemu-system-x86", ""))
    return bool(match) and int(match[1]) >= QEMU_NEEDED


def demand_plugins(ready: lab.Lab) -> None:
    if not possible(ready):
        version = ready.versions.get("qemu-system-x86", "")
        raise Problem(f"Counting needs QEMU {QEMU_NEEDED}.0 or newer, and the distribution's is {version}.", Exit.MISSING)


class Counting:
    """The counts of one start of the lab. `folder`: for the plugin, and for its file. The kernel must have been built."""

    def __init__(self, folder: Path) -> None:
        self.symbols = kernel_symbols()
        self.file = folder / "counts"
        self.file.unlink(missing_ok=True)
        first, last = image_range(image.tool(image.READELF, "--program-headers", "--wide", str(paths.KERNEL_SYMBOLS)))
        marks = ",".join(f"mark={address:#x}" for address in (self.symbols.address(MARK), MARKER_ADDRESS))
        self.arguments = ("-plugin", f"{compiled(folder)},out={self.file},first={first:#x},last={last:#x},{marks}")

    def sections(self, workloads: int) -> list[Section]:
        """Of each workload, in order: sections begin with the start of the machine and change with each mark."""
        return workload_sections(read_sections(self.file.read_text()), workloads)


def kernel_symbols() -> Symbols:
    return Symbols(image.tool("llvm-nm-19", "-n", "--demangle", str(paths.KERNEL_SYMBOLS)))


def workload_sections(sections: Sequence[Section], workloads: int) -> list[Section]:
    if len(sections) != 2 * workloads + 1:
        raise Problem(f"{workloads} workloads were run, and there are {len(sections)} sections of counts; {2 * workloads + 1} were expected, one more than marks.")
    return list(sections[1::2])
