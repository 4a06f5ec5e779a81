"""Tests the capabilities of this machine's own KVM, by ioctl and by booting a guest of a few instructions."""

from __future__ import annotations

import fcntl
import os
import struct
import tempfile
from pathlib import Path

from . import process
from .problems import Problem

DEVICE = "/dev/kvm"
KVM_CREATE_VM = 0xAE01
KVM_CHECK_EXTENSION = 0xAE03
KVM_CREATE_VCPU = 0xAE41
KVM_CAP_XEN_HVM = 38
# The capabilities that the test host needs; its own list is in test/host/vmm/kvm.cpp.
HYPERV_NEEDED = {
    "KVM_CAP_HYPERV": 44, "KVM_CAP_HYPERV_TIME": 96, "KVM_CAP_HYPERV_SYNIC2": 148, "KVM_CAP_HYPERV_VP_INDEX": 149,
    "KVM_CAP_HYPERV_EVENTFD": 154, "KVM_CAP_HYPERV_SEND_IPI": 161, "KVM_CAP_HYPERV_CPUID": 167,
}  # fmt: skip
# KVM features used by QEMU's Xen emulation: hypercall MSR, intercepted hypercalls, shared info.
XEN_NEEDED = 1 | 2 | 4


def capability(number: int) -> int:
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(device, KVM_CHECK_EXTENSION, number)
    finally:
        os.close(device)


def creates_machines() -> None:
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        machine = fcntl.ioctl(device, KVM_CREATE_VM, 0)
        try:
            os.close(fcntl.ioctl(machine, KVM_CREATE_VCPU, 0))
        finally:
            os.close(machine)
    finally:
        os.close(device)


def tiny_guest() -> bytes:
    """A PVH ELF that writes 0x10 to the debug exit port and halts.

    Before that it executes crc32, which the kernel uses. KVM without hardware virtualisation (PVM) emulates what the kernel
    executes without paging and after an exit, and its emulator lacks this instruction: a guest ends there sooner or later.
    """
    load = 0x100000
    code = bytes.fromhex("b810000000" "f20f38f1c8" "e7f4" "f4" "ebfd")  # mov eax,0x10; crc32 ecx,eax; out 0xf4,eax; hlt; jmp to hlt
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", load + 0x1000)  # XEN_ELFNOTE_PHYS32_ENTRY
    header = struct.pack(
        "<4sBBBB8xHHIIIIIHHHHHH", b"\x7fELF", 1, 1, 1, 0, 2, 3, 1, load + 0x1000, 52, 0, 0, 52, 32, 2, 0, 0, 0
    )
    segments = struct.pack("<8I", 1, 0x1000, load + 0x1000, load + 0x1000, len(code), len(code), 5, 0x1000)
    segments += struct.pack("<8I", 4, 0x800, load + 0x800, load + 0x800, len(note), len(note), 4, 4)
    image = bytearray(0x1000)
    image[: len(header) + len(segments)] = header + segments
    image[0x800 : 0x800 + len(note)] = note
    return bytes(image) + code


def boots(qemu: Path, accelerator: tuple[str, ...]) -> str:
    """Boots a guest of five instructions. Empty on success; otherwise what was seen."""
    with tempfile.TemporaryDirectory() as folder:
        guest = Path(folder) / "guest.elf"
        guest.write_bytes(tiny_guest())
        try:
            done = process.run(
                [qemu, *accelerator, "-m", "64", "-nodefaults", "-no-reboot", "-display", "none",
                 "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04", "-kernel", guest],
                timeout=10, check=False,
            )  # fmt: skip
        except Problem:
            return "a guest of five instructions did not end within 10 s"
    if done.returncode == 33:
        return ""
    return f"a guest of five instructions ended QEMU with {done.returncode}, expected 33 ({process.tail(done.stdout, 1)})"


def lacks_interfaces(xen: bool, hyperv: bool) -> str:
    """Why the machine's own KVM is not sufficient, as far as that can be determined without a QEMU; empty if it is."""
    if not os.path.exists(DEVICE):
        return f"there is no {DEVICE}"
    try:
        if xen:
            seen = capability(KVM_CAP_XEN_HVM)
            if seen & XEN_NEEDED != XEN_NEEDED:
                return f"{DEVICE} answers {seen:#x} for KVM_CAP_XEN_HVM, {XEN_NEEDED:#x} is needed"
        for name, number in HYPERV_NEEDED.items() if hyperv else ():
            if capability(number) <= 0:
                return f"{DEVICE} lacks {name}"
        creates_machines()
    except OSError as error:
        return f"{DEVICE}: {error.strerror}"
    return ""
