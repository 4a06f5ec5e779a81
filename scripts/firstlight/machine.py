"""Describes one machine to boot and turns the description into a job: QEMU's arguments, files and images."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import actions, distribution, esp, lab, paths, xenguest, xenlab, yardstick
from .nested import Disk, Job, Pause
from .problems import Exit, Problem

if TYPE_CHECKING:
    from .vmm import Qemu, Vmm

SIZES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


@dataclasses.dataclass(frozen=True)
class Platform:
    name: str
    about: str
    accelerator: tuple[str, ...]
    boots: tuple[str, ...]
    machines: tuple[str, ...]
    disks: tuple[str, ...]  # attached if none are given
    kvm: bool = False
    xen: bool = False
    test_host: bool = False  # run by test/host instead of QEMU
    domain: str = ""  # the type of guest created by the real Xen, in the Xen lab
    marks: int = 0  # the I/O port for marks, between which the host counts exits; 0: none


TCG = ("-accel", "tcg", "-cpu", "max")
# One instruction is one nanosecond and idle time is skipped: for measuring a boot on plain TCG.
COUNTED = ("-accel", "tcg", "-icount", "shift=0,sleep=off", "-cpu", "max", "-rtc", "base=2024-01-01,clock=vm", "-seed", "1")

# QEMU's own Hyper-V interfaces. Its bus has no disks; it is the second host to test the VMBus guest code with.
HYPERV_CPU = "host,kvm=off,hv-relaxed,hv-vpindex,hv-time,hv-synic,hv-stimer,hv-vapic,hv-runtime,hv-reset,hv-crash"

MACHINES = {
    "pc": "pc", "q35": "q35",
    "microvm": "microvm,acpi=off,pit=on,pic=on,rtc=on,isa-serial=on",
    "microvm-acpi": "microvm,acpi=on,pit=off,pic=off,rtc=off,isa-serial=on",  # ACPI's hardware-reduced profile
}  # fmt: skip
MACHINE_NAMES = tuple(MACHINES)
# Maximum; q35's depends on the version of QEMU, which then refuses with its own message.
CPUS = {"pc": 255, "q35": 4096, "microvm": 288, "microvm-acpi": 288}

PLATFORMS = {
    platform.name: platform
    for platform in (
        Platform("qemu-pvh", "QEMU's emulated processor, PVH", TCG, ("pvh",), MACHINE_NAMES, ("ide:64m",)),
        Platform("qemu-uefi", "QEMU's emulated processor, OVMF", TCG, ("uefi",), ("pc", "q35"), ("ide:64m",)),
        Platform(
            "kvm", "KVM, emulated devices", ("-accel", "kvm", "-cpu", "host"), ("pvh", "uefi"),
            MACHINE_NAMES, ("ide:64m",), kvm=True,
        ),
        Platform(
            "xen-emu", "KVM with QEMU's Xen interfaces: Xen ring and IDE in one machine",
            ("-accel", "kvm,xen-version=0x40011,kernel-irqchip=split", "-cpu", "host"), ("pvh", "uefi"), ("pc",),
            ("xen:64m", "ide:64m"), kvm=True, xen=True,
        ),
        Platform(
            "hyperv", "KVM's Hyper-V interfaces under the test host: VMBus with SCSI disks, IDE where asked for", (), ("pvh",), ("pc",),
            ("scsi:64m",), kvm=True, test_host=True, marks=0x5F0,
        ),
        Platform(
            "hyperv-qemu", "KVM with QEMU's Hyper-V interfaces: VMBus bridge and dynamic memory, emulated disks",
            ("-accel", "kvm", "-cpu", HYPERV_CPU, "-device", "vmbus-bridge", "-device", "hv-balloon"), ("pvh", "uefi"), ("pc", "q35"),
            ("ide:64m",), kvm=True,
        ),
        Platform(
            "hyperv-no-bus", "KVM with QEMU's Hyper-V interfaces and no VMBus behind them", ("-accel", "kvm", "-cpu", HYPERV_CPU),
            ("pvh", "uefi"), ("pc", "q35"), ("ide:64m",), kvm=True,
        ),
        Platform(
            "xen-pvh", "the distribution's Xen with a Linux dom0, emulated: a PVH guest, disks served by blkback or qdisk", (), ("pvh",), ("pc",),
            ("xen:64m",), domain="pvh",
        ),
        Platform(
            "xen-hvm", "the same Xen: an HVM guest, each disk on the ring and, the first four, behind dom0's QEMU as IDE", (), ("pvh",), ("pc",),
            ("xen:64m",), domain="hvm",
        ),
        Platform("xen-hvm-uefi", "the same, started by OVMF", (), ("uefi",), ("pc",), ("xen:64m",), domain="hvm"),
    )
}  # fmt: skip

# A disk on the VMBus is a SCSI disk, or the accelerator of the IDE disk in the same place; both are called sd….
BUSES = {"ide": "hd", "xen": "xvd", "scsi": "sd", "accel": "sd", "virtio": "vd", "nvme": "nvme", "sata": "sd", "pvscsi": "sd", "vscsi": "sd"}
# Buses whose device QEMU can give an I/O thread of its own; the disks of one virtio SCSI host share its thread.
IOTHREAD_BUSES = ("xen", "virtio", "vscsi")
# QEMU's own defaults are named in results.
AIO = ("threads", "native", "io_uring")
CACHES = ("writeback", "none", "writethrough", "directsync", "unsafe")
DIRECT_CACHES = ("none", "directsync")  # O_DIRECT, without which aio=native is refused
TEST_HOST = "firstlight-testhost"
# Who reads and writes the test host's VMBus disks; the first answers within the guest's exit, the others later.
IOS = ("inline", "thread", "uring")
LATENCY_UNITS = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}
MOST_LATENCY = 10_000_000_000  # nanoseconds
IDE_PLACES = 4
LOADER_BYTES = 8 << 20  # at least, for a disk with the loader
SATA_PORTS = 6  # of QEMU's ich9-ahci
PVSCSI_TARGETS = 16
SCSI_UNITS = 64  # per controller, as in Hyper-V


def drive_letters(number: int) -> str:
    """a, b … z, aa, ab …: the last part of a disk's name, as in Linux and the kernel."""
    letters = ""
    number += 1
    while number:
        number, letter = divmod(number - 1, 26)
        letters = string.ascii_lowercase[letter] + letters
    return letters


def kernel_names(buses: Sequence[str]) -> list[str]:
    """The kernel's names of disks on these buses: hda, hdb …, xvda, xvdb …, sda … sdz, sdaa …, nvme0n1, nvme1n1 …"""
    count = dict.fromkeys(BUSES.values(), 0)
    names = []
    for bus in buses:
        prefix = BUSES[bus]
        # One controller for each NVMe disk, with one namespace.
        names.append(f"nvme{count[prefix]}n1" if bus == "nvme" else prefix + drive_letters(count[prefix]))
        count[prefix] += 1
    return names


def parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+)([kmg]?)", text.lower())
    if not match or int(match[1]) == 0:
        raise Problem(f"{text!r} is not a size: a number with the suffix k, m or g was expected.", Exit.USAGE)
    return int(match[1]) * SIZES[match[2]]


def latency_bounds(text: str) -> tuple[int, int] | None:
    """`100us`, `exp:100us` (the mean) or `uniform:50us..150us`: the lowest and the highest value in it, in nanoseconds. None: it is no such text."""
    time = r"([1-9]\d{0,10})(ns|us|ms|s)"
    match = re.fullmatch(f"(?:exp:)?{time}|uniform:{time}\\.\\.{time}", text)
    found = [int(number) * LATENCY_UNITS[unit] for number, unit in zip(match.groups()[::2], match.groups()[1::2]) if number] if match else []
    return (found[0], found[-1]) if found and found[0] <= found[-1] <= MOST_LATENCY else None


def parse_latency(text: str) -> str:
    """The type of --latency."""
    if not latency_bounds(text):
        raise argparse.ArgumentTypeError(f"{text!r} was given, a time as in 100us, exp:100us (drawn, the mean) or uniform:50us..150us, in ns, us, ms or s, from 1 ns to 10 s, was expected")
    return text


def demand_io(io: str, latency: str) -> None:
    if io not in ("", *IOS):
        raise Problem(f"io={io}: one of {', '.join(IOS)} was expected.", Exit.USAGE)
    if latency and not latency_bounds(latency):
        raise Problem(f"latency={latency}: a time as in 100us, exp:100us or uniform:50us..150us was expected, from 1 ns to 10 s.", Exit.USAGE)
    if latency and io not in IOS[1:]:
        raise Problem(f"--latency {latency}: --io {' or --io '.join(IOS[1:])} was expected, not {io or IOS[0]}, which would keep the guest's processor in its exit for so long.", Exit.USAGE)


# The options of a disk: which values each has, and which disks have it.
DISK_OPTIONS = {
    "content": "content=zero|sparse|pattern|loader (with the EFI loader)|qcow2, or null (of a disk of a size on a controller of QEMU's: not xen, scsi, accel)",
    "image": "image=NAME (of small letters and digits)",
    "sector": "sector=512|4096",
    "iops": "iops=N (at least 1)",
    "readonly": "readonly",
    "aio": f"aio={'|'.join(AIO)} (of QEMU's disks)",
    "cache": f"cache={'|'.join(CACHES)} (of QEMU's disks)",
    "iothread": "iothread (of QEMU's disks)",
    "controller": "controller=0..3 (of a disk on the bus scsi)",
    "backend": f"backend={'|'.join(xenguest.BACKENDS)} (of a disk on the bus xen)",
    "backing": f"backing={'|'.join(xenguest.BACKINGS)} (of a disk on the bus xen)",
    "without": f"without={'+'.join(xenguest.WITHOUT)} (what dom0 does not offer, of a disk on the bus xen)",
}


@dataclasses.dataclass
class DiskSpec:
    """`[BUS:]SIZE|FILE[,content=zero|sparse|pattern|null|loader|qcow2][,image=NAME][,sector=4096][,iops=N][,controller=N][,readonly][,aio=A][,cache=C][,iothread]`.

    Two disks with the same image= are one image, attached twice. SCSI disks are on controller 0 unless another one is given.
    iops=N: the host completes at most N I/Os a second, like a slow disk or a cloud's quota; in real time, not in instructions.
    content=qcow2: an image in QEMU's own format, in which a write is safe only once the guest has flushed.
    content=loader: a partitioned disk with the EFI loader, from which the firmware boots; there is then no other disk for it.
    content=null: a disk of zeroes generated by QEMU, without an image and without a host thread, whose scheduling could delay it.
    """

    bus: str
    size: int = 0
    file: Path | None = None
    content: str = "pattern"
    image: str = ""
    sector: int = 512
    iops: int = 0  # 0: unlimited
    backend: str = ""  # real Xen: what serves the disk; empty: blkback
    backing: str = ""  # real Xen: the block device in dom0 that holds the image in memory; empty: loop
    without: tuple[str, ...] = ()  # real Xen: features that blkback does not offer for the disk
    controller: int = 0
    read_only: bool = False
    aio: str = ""  # QEMU: how it reads and writes the image; empty: its default, threads
    cache: str = ""  # QEMU: the cache mode; empty: its default, writeback
    iothread: bool = False  # QEMU: an I/O thread of the disk's own instead of the main loop
    bring_out: Path | None = None

    @staticmethod
    def parse(text: str) -> DiskSpec:
        head, *options = text.split(",")
        if not head or (head.endswith(":") and not Path(head).exists()):
            raise Problem(f"Disk {text!r}: a size like 64m or a file was expected, and none is there.", Exit.USAGE)
        bus, separator, what = head.partition(":")
        if not separator or (bus not in BUSES and Path(head).exists()):
            bus, what = "ide", head
        if bus not in BUSES:
            raise Problem(f"Disk {text!r}: there is no bus {bus!r}; the buses are {', '.join(BUSES)}, as in ide:64m, and {head} is no file.", Exit.USAGE)
        disk = DiskSpec(bus)
        if re.fullmatch(r"\d+[kKmMgG]?", what):
            disk.size = parse_size(what)
        else:
            disk.file = Path(what).resolve()
            if not disk.file.is_file():
                seen = "it is a folder" if disk.file.is_dir() else "no such file exists"
                raise Problem(f"Disk {text!r}: a size like 64m or a file was expected, {what!r} was given, and {seen}.", Exit.USAGE)
            if not os.access(disk.file, os.R_OK):
                raise Problem(f"Disk {text!r}: the file {what} cannot be read by {paths.name_of(os.geteuid())}.", Exit.USAGE)
            disk.size = disk.file.stat().st_size
        for option in options:
            name, _, value = option.partition("=")
            if name == "content" and disk.file:
                raise Problem(f"Disk {text!r}: {option} is for a disk of a size; this one has the content of its file.", Exit.USAGE)
            if [each.partition("=")[0] for each in options].count(name) > 1:
                raise Problem(f"Disk {text!r}: {name} was given twice.", Exit.USAGE)
            if name == "content" and (value in ("zero", "sparse", "pattern", "loader", "qcow2") or (value == "null" and bus not in ("xen", "scsi", "accel") and disk.size)):
                disk.content = value
            elif name == "image" and re.fullmatch(r"[a-z0-9]+", value):
                disk.image = value
            elif name == "sector" and value in ("512", "4096"):
                disk.sector = int(value)
            elif name == "iops" and re.fullmatch(r"[1-9]\d{0,8}", value):
                disk.iops = int(value)
            elif name == "controller" and bus == "scsi" and re.fullmatch(r"[0-3]", value):
                disk.controller = int(value)
            elif name == "backend" and bus == "xen" and value in xenguest.BACKENDS:
                disk.backend = value
            elif name == "backing" and bus == "xen" and value in xenguest.BACKINGS:
                disk.backing = value
            elif name == "without" and bus == "xen" and value and set(value.split("+")) <= set(xenguest.WITHOUT):
                disk.without = tuple(value.split("+"))
            elif option == "readonly":
                disk.read_only = True
            elif name == "aio" and value in AIO:
                disk.aio = value
            elif name == "cache" and value in CACHES:
                disk.cache = value
            elif option == "iothread":
                disk.iothread = True
            else:
                expected = DISK_OPTIONS.get(name, "one of " + ", ".join(DISK_OPTIONS.values()))
                raise Problem(f"Disk {text!r}: {option!r} was given; {expected} was expected.", Exit.USAGE)
        return disk


# Buses of network cards, each with QEMU's device.
CARDS = {"xen": "xen-net-device", "e1000": "e1000", "e1000-82545em": "e1000-82545em"}
PCI_CARDS = ("e1000", "e1000-82545em")


@dataclasses.dataclass(frozen=True)
class NetSpec:
    """`BUS[,OPTION…]`: a network card on QEMU's user-mode network, 10.0.2.0/24 with a DHCP server. The options are those of
    QEMU's `-netdev user`, for example hostfwd=udp::5000-:7. Under the real Xen card N leads to dom0, which has the address 10.0.N.1 and gives 10.0.N.2 by DHCP; e1000 is an interface of Xen's bus with an emulated twin.
    """

    bus: str
    options: tuple[str, ...] = ()

    @staticmethod
    def parse(text: str) -> NetSpec:
        bus, *options = text.split(",")
        if bus not in CARDS or not all(re.fullmatch(r"[a-z0-9-]+=[^,{}]+", option) for option in options):
            raise Problem(f"Network card {text!r}: BUS[,OPTION=VALUE…] was expected; the buses are {', '.join(CARDS)}, the options those of QEMU's -netdev user.", Exit.USAGE)
        return NetSpec(bus, tuple(options))

    @staticmethod
    def mac(number: int) -> str:
        return f"00:16:3e:01:02:{number + 3:02x}"

    def words(self, number: int) -> list[str]:
        return ["-netdev", ",".join(["user", f"id=net{number}", *self.options]), "-device", f"{CARDS[self.bus]},id=card{number},netdev=net{number},mac={self.mac(number)}{',romfile=' if self.bus in PCI_CARDS else ''}"]


@dataclasses.dataclass
class Machine:
    """The description of one boot."""

    name: str
    platform: str = "qemu-pvh"
    machine: str = "pc"
    boot: str = ""
    cpus: int = 1
    memory: int = 256  # MiB
    cmdline: str = ""
    map: Path | None = None
    disks: Sequence[DiskSpec | str] | None = None  # None: the platform's default disks
    counted: bool = False  # deterministic time, on the TCG platforms
    timeout: float = 30.0
    kernel: Path = paths.KERNEL
    efi: Path = paths.EFI
    extra: Sequence[str] = ()  # further arguments of QEMU or the test host
    esp: Mapping[str, str] = dataclasses.field(default_factory=dict)  # files on the ESP in addition to, or in place of, its own
    exit_port: bool = True  # QEMU's debug exit device
    plain: bool = False  # QEMU as a newcomer calls it: its default machine, processor, memory and devices, with the kernel and the disks
    restarts: bool = False  # a reset restarts the machine (QEMU without -no-reboot)
    marker: Path | None = None  # Linux's program that marks begin and end of counted workloads
    linux: str = ""  # script run by the lab's Linux as the guest, instead of our kernel
    io: str = ""  # test host: one of IOS; empty: its default, the first
    latency: str = ""  # test host: what a VMBus disk takes for a request, with an I/O thread
    blkback: Sequence[str] = ()  # real Xen: parameters of the module that serves the disks
    xen: str = ""  # real Xen: further words of Xen's command line
    xen_version: str = ""  # real Xen: as in the packages' names; empty: the distribution's own
    xl: Sequence[str] = ()  # real Xen: further lines of the guest's configuration, which xl reads
    pauses: Sequence[Pause] = ()  # when to stop the VMM's process temporarily; `timeout` does not count it
    actions: Sequence[actions.Action] = ()  # what is done to QEMU while the guest runs
    nets: Sequence[str] = ()  # network cards, of QEMU's platforms
    # Real Xen: commands of dom0's shell, started with the guest; each must have ended with exit status 0 within ten seconds after it. `udp-peer` is the program of test/peer.
    dom0: Sequence[str] = ()
    qemu: Qemu | None = None  # another QEMU than the lab's; the machine then runs here
    vmm: Vmm | None = None  # another virtual machine monitor than QEMU; `platform` has no effect then

    def __post_init__(self) -> None:
        kind = self.kind
        self.boot = self.boot or kind.boots[0]
        if self.boot not in kind.boots:
            raise Problem(f"Platform {self.platform} boots by {' or '.join(kind.boots)}, not by {self.boot}.", Exit.USAGE)
        if self.machine not in kind.machines:
            raise Problem(
                f"Platform {self.platform} has the machines {', '.join(kind.machines)}, not {self.machine}.", Exit.USAGE
            )
        if self.boot == "uefi" and self.machine.startswith("microvm"):
            raise Problem("The machine microvm has no UEFI firmware: boot it by pvh, or take pc or q35.", Exit.USAGE)
        if not self.vmm:
            self.check_size()
        if self.esp and self.boot != "uefi":
            raise Problem(f"Files on the ESP need a boot by uefi, not by {self.boot}.", Exit.USAGE)
        chosen = self.disks if self.disks is not None else (kind.disks if not self.machine.startswith("microvm") else ())
        self.specs = [DiskSpec.parse(disk) if isinstance(disk, str) else disk for disk in chosen]
        self.cards = [NetSpec.parse(net) for net in self.nets]
        if self.cards and (self.vmm or self.plain or kind.test_host):
            raise Problem(f"Network cards are of QEMU's and Xen's platforms, not of {'a VMM of your own' if self.vmm else 'a plain QEMU' if self.plain else self.platform}.", Exit.USAGE)
        if not kind.xen and not kind.domain and any(card.bus == "xen" for card in self.cards):
            raise Problem(f"A network card on Xen's bus needs the platform xen-emu, xen-pvh or xen-hvm, not {self.platform}.", Exit.USAGE)
        if self.dom0 and (not kind.domain or self.vmm or any("\n" in command for command in self.dom0)):
            raise Problem(f"Commands of dom0's shell, each one line, are for the platforms xen-pvh and xen-hvm, not for {self.platform}.", Exit.USAGE)
        if self.machine.startswith("microvm") and any(card.bus in PCI_CARDS for card in self.cards):
            raise Problem("A PCI network card needs the machine pc or q35: microvm's firmware assigns no addresses to PCI devices.", Exit.USAGE)
        if kind.domain and any(card.bus in PCI_CARDS and (kind.domain != "hvm" or card.bus != "e1000") for card in self.cards):
            raise Problem(f"Of a guest of Xen's only an HVM guest has an emulated network card, an e1000: not {self.platform}.", Exit.USAGE)
        if kind.domain and any(card.options for card in self.cards):
            raise Problem(f"Options of a network card are those of QEMU's user-mode network, which {self.platform} has not.", Exit.USAGE)
        self.check_loader()
        if self.plain and (self.boot != "pvh" or self.platform != "qemu-pvh" or self.machine == "q35" or self.counted or any(disk.bus != "virtio" for disk in self.specs)):
            raise Problem("QEMU's defaults are for the platform qemu-pvh with the machine pc or microvm and virtio disks, in wall-clock time.", Exit.USAGE)
        if self.vmm:
            self.vmm.check(self)
            return
        images: dict[str, tuple] = {}  # content of each shared image
        for places in (sum(disk.bus == bus for disk in self.specs) for bus in ("ide", "accel")):
            if places <= IDE_PLACES:
                continue
            raise Problem(f"{places} IDE disks: a machine has {IDE_PLACES} places for them. Further disks can be on the Xen ring or the VMBus.", Exit.USAGE)
        if (ports := sum(disk.bus == "sata" for disk in self.specs)) > SATA_PORTS:
            raise Problem(f"{ports} SATA disks: the AHCI controller has {SATA_PORTS} ports.", Exit.USAGE)
        if (targets := sum(disk.bus == "pvscsi" for disk in self.specs)) > PVSCSI_TARGETS:
            raise Problem(f"{targets} PVSCSI disks: the adapter has {PVSCSI_TARGETS} targets.", Exit.USAGE)
        for number in range(4):
            units = sum(disk.bus == "scsi" and disk.controller == number for disk in self.specs)
            if units > SCSI_UNITS:
                raise Problem(
                    f"{units} disks on SCSI controller {number}: it has {SCSI_UNITS} units. The others can be on controller=0..3.", Exit.USAGE
                )
        for disk in self.specs:
            if disk.bus == "xen" and not kind.xen and not kind.domain:
                raise Problem(f"A disk on the Xen ring needs the platform xen-emu, xen-pvh, xen-hvm or xen-hvm-uefi, not {self.platform}.", Exit.USAGE)
            if disk.bus != "xen" and kind.domain:
                raise Problem(f"The platform {self.platform} has disks on the Xen ring only, not {disk.bus}:… .", Exit.USAGE)
            if not kind.domain and (disk.backend or disk.backing or disk.without):
                raise Problem(f"backend=, backing= and without= belong to the platforms of the real Xen, not to {self.platform}.", Exit.USAGE)
            if disk.bus in ("scsi", "accel") and not kind.test_host:
                raise Problem(f"A disk on the VMBus needs the platform hyperv, not {self.platform}.", Exit.USAGE)
            if disk.bus in ("virtio", "vscsi") and (kind.test_host or kind.domain):
                raise Problem(f"A virtio disk needs a platform of QEMU's, not {self.platform}.", Exit.USAGE)
            if disk.bus == "nvme" and (kind.test_host or self.machine.startswith("microvm")):
                raise Problem(f"An NVMe disk needs QEMU's machine pc or q35, not {self.platform} with {self.machine}.", Exit.USAGE)
            if disk.bus == "sata" and (kind.test_host or kind.domain or self.machine.startswith("microvm")):
                raise Problem(f"A SATA disk needs QEMU's machine pc or q35, not {self.platform} with {self.machine}.", Exit.USAGE)
            self.check_host_side(disk)
            if disk.content == "qcow2" and (kind.kvm or kind.test_host or kind.domain or disk.bus == "xen"):
                raise Problem("content=qcow2 is for the platforms on QEMU's emulated processor: the others' images are made raw.", Exit.USAGE)
            if disk.bus == "pvscsi" and (kind.test_host or kind.domain or self.machine.startswith("microvm")):
                raise Problem(f"A PVSCSI disk needs QEMU's machine pc or q35, not {self.platform} with {self.machine}.", Exit.USAGE)
            if disk.content == "null" and kind.test_host:
                raise Problem("content=null is QEMU's: the test host's disks are images.", Exit.USAGE)
            if disk.iops and disk.bus == "ide" and kind.test_host:
                raise Problem("iops=N limits the test host's VMBus disks and QEMU's disks, not the test host's IDE disks.", Exit.USAGE)
            if disk.iops and self.counted and not kind.kvm:
                raise Problem("iops=N counts the clock's time and deterministic time runs by instructions: choose one of them.", Exit.USAGE)
            if disk.bus == "ide" and self.machine.startswith("microvm"):
                raise Problem("The machine microvm has no IDE disks.", Exit.USAGE)
            if disk.bus in ("ide", "sata") and disk.sector != 512:
                raise Problem(f"sector=4096 is for disks on other buses than ide and sata: QEMU and the test host have no {disk.bus} disk with 4096-byte sectors.", Exit.USAGE)
            if disk.bus in ("ide", "sata") and disk.read_only:
                raise Problem(f"readonly is for disks on other buses than ide, sata and nvme: QEMU and the test host have no {disk.bus} disk that is read-only.", Exit.USAGE)
            if disk.bus == "nvme" and disk.read_only:
                raise Problem("readonly is for disks on other buses than ide, sata and nvme: QEMU's NVMe controller does not tell the guest that a disk is read-only.", Exit.USAGE)
            known = images.setdefault(disk.image, (disk.size, disk.file or disk.content)) if disk.image else None
            if known and known != (disk.size, disk.file or disk.content):
                raise Problem(f"image={disk.image}: one image has one size and one content; two different ones were asked for.", Exit.USAGE)
            if disk.image and disk.content == "null":
                raise Problem("content=null has no image that image=NAME could share.", Exit.USAGE)
            if disk.image and sum(other.image == disk.image for other in self.specs) == 1:
                raise Problem(f"image={disk.image}: several disks that name it are one image, and only one disk names it. Leave it out, or give it to another disk.", Exit.USAGE)

        demand_io(self.io, self.latency)
        if self.io and not kind.test_host:
            raise Problem(f"--io {self.io} is for the test host's disks, of the platform hyperv, not for {self.platform}.", Exit.USAGE)
        if (self.blkback or self.xen or self.xen_version or self.xl) and not kind.domain:
            raise Problem(f"Parameters of blkback, words for Xen, its version and lines for xl belong to the platforms of the real Xen, not to {self.platform}.", Exit.USAGE)
        if self.xen_version:
            xenlab.supported(distribution.detect(), self.xen_version)
        xenguest.check_blkback(self.blkback)
        if kind.domain:
            xenguest.check_disks(self.specs, self.blkback)
        if any(not one.dom0 for one in self.actions) and (kind.kvm or kind.test_host or kind.domain):
            raise Problem("QMP commands and a sudden end are for the platforms on QEMU's emulated processor, which run on this machine.", Exit.USAGE)
        if any(one.dom0 for one in self.actions) and (not kind.domain or self.pauses):
            raise Problem("Commands in dom0 are for the platforms of the real Xen, and not beside pauses.", Exit.USAGE)
        if self.pauses and self.counted and not kind.kvm and not kind.domain:
            raise Problem("QEMU's instruction counter stands still while QEMU is stopped: a pause needs wall-clock time, or the lab.", Exit.USAGE)

    def check_loader(self) -> None:
        loaders = [disk for disk in self.specs if disk.content == "loader"]
        if loaders and (self.boot != "uefi" or self.vmm or self.map or self.esp or len(loaders) > 1 or loaders[0].image or loaders[0].sector != 512 or loaders[0].size < LOADER_BYTES):
            raise Problem(
                f"content=loader is for one disk of {LOADER_BYTES >> 20} MiB or more and 512-byte sectors, of a machine of QEMU's that boots by uefi, without a map file.", Exit.USAGE
            )

    def check_host_side(self, disk: DiskSpec) -> None:
        """aio=, cache= and iothread: what QEMU would refuse, or what has no effect."""
        given = [name for name, value in (("aio=", disk.aio), ("cache=", disk.cache), ("iothread", disk.iothread)) if value]
        if given and (self.kind.test_host or self.kind.domain):
            raise Problem(f"{given[0]} is for QEMU's disks, not for those of {self.platform}.", Exit.USAGE)
        if disk.content == "null" and (disk.aio or disk.cache):
            raise Problem(f"{given[0]} is how QEMU treats an image, and content=null has none.", Exit.USAGE)
        if disk.aio == "native" and disk.cache not in DIRECT_CACHES:
            raise Problem(f"aio=native needs cache={' or cache='.join(DIRECT_CACHES)}, not {disk.cache or 'the default, writeback'}: Linux's AIO is for O_DIRECT.", Exit.USAGE)
        if disk.iothread and disk.bus not in IOTHREAD_BUSES:
            raise Problem(f"iothread is for disks on {', '.join(IOTHREAD_BUSES)}: QEMU's {disk.bus} device has no I/O thread of its own.", Exit.USAGE)

    def check_size(self) -> None:
        """Processors and memory: the VMM's maximum, and the minimum to load the kernel."""
        most = 64 if self.kind.test_host else CPUS[self.machine]
        if not 1 <= self.cpus <= most:
            where = "the test host" if self.kind.test_host else f"QEMU's machine {self.machine}"
            raise Problem(f"{self.cpus} processors: {where} has 1 to {most}.", Exit.USAGE)
        low, high = (16, 3072) if self.kind.test_host else (64 if self.boot == "uefi" else 4, 1 << 20)
        if not low <= self.memory <= high:
            raise Problem(f"{self.memory} MiB of memory: {self.platform} by {self.boot} has {low} to {high} MiB.", Exit.USAGE)

    @property
    def kind(self) -> Platform:
        if self.vmm:
            return self.vmm.platform
        if self.platform not in PLATFORMS:
            raise Problem(f"No platform {self.platform!r}: there are {', '.join(PLATFORMS)}.", Exit.USAGE)
        return PLATFORMS[self.platform]

    @property
    def dies_at_exit(self) -> bool:
        """QEMU 8.2 to at least 10.0 frees the network of an xen-net-device twice when it exits, used or not, and ends by SIGSEGV."""
        return any(card.bus == "xen" for card in self.cards)

    def disk_names(self) -> list[str]:
        """The kernel's names of the disks."""
        return kernel_names([disk.bus for disk in self.specs])

    def job(self, work: Path) -> Job:
        """Files that must be created (the ESP) are put into `work`."""
        if self.vmm:
            return self.vmm.job(self, work)
        if self.kind.domain:
            return xenguest.domain(self, work)
        made = self.test_host_job() if self.kind.test_host else self.qemu_job(work)
        made.pauses = self.pauses
        if self.actions:
            made.actions = self.actions
            made.arguments += actions.arguments(self.actions)
        made = yardstick.job(lab.find(), made, self.linux, work / self.name, self.marker) if self.linux else made
        made.qemu = self.qemu.program if self.qemu else None
        return made

    def plain_job(self) -> Job:
        disks: dict[str, Disk] = {}
        words = ["-kernel", "{file:firstlight.elf}", *(["-append", self.cmdline] if self.cmdline else []), "-nographic"]
        # The lab's QEMU has no option ROM for the network card that a pc has by default; an installed one has.
        words = [*(["-M", "microvm"] if self.machine != "pc" else ["-global", "e1000.romfile="]), *words]
        for disk, name in zip(self.specs, self.disk_names()):
            file = f"file={{disk:{self.add_image(disks, disk, name)}}},format=raw"
            words += ["-drive", f"{file},if=virtio"] if self.machine == "pc" else ["-drive", f"{file},if=none,id={name}", "-device", f"virtio-blk-device,drive={name}"]
        return Job(self.name, [*words, *self.extra], {"firstlight.elf": self.kernel}, list(disks.values()), self.timeout)

    def qemu_job(self, work: Path) -> Job:
        if self.plain:
            return self.plain_job()
        accelerator = COUNTED if self.counted and not self.kind.kvm else self.kind.accelerator
        arguments = [
            *accelerator, "-machine", MACHINES[self.machine], "-smp", str(self.cpus), "-m", str(self.memory),
            "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-monitor", "none",
        ]  # fmt: skip
        if not self.restarts:
            arguments.append("-no-reboot")
        if self.exit_port:
            arguments += ["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"]
        files: dict[str, Path] = {}
        if self.boot == "pvh":
            files["firstlight.elf"] = self.kernel
            arguments += ["-kernel", "{file:firstlight.elf}", "-append", self.cmdline]
            if self.map:
                files["map.txt"] = self.map
                arguments += ["-initrd", "{file:map.txt}"]
        else:
            work.mkdir(parents=True, exist_ok=True)
            arguments += ["-bios", str(lab.find().firmware / "OVMF.fd") if self.qemu else "OVMF.fd"]
            loader = next((disk for disk in self.specs if disk.content == "loader"), None)
            if loader:
                loader.file = esp.make_disk(work / f"{self.name}-loader.img", loader.size, self.efi, self.cmdline)
            else:
                files["esp.img"] = esp.make(work / f"{self.name}-esp.img", self.efi, self.cmdline, self.map, self.esp)
                # On a controller that OVMF drives and the kernel does not: it would count it among the disks to measure.
                arguments += ["-drive", "if=none,id=esp,format=raw,readonly=on,file={file:esp.img}", "-device", "qemu-xhci", "-device", "usb-storage,drive=esp"]
        disks, words = self.drives()
        words += [word for number, card in enumerate(self.cards) for word in card.words(number)]
        return Job(self.name, [*arguments, *words, *self.extra], files, disks, self.timeout)

    def test_host_job(self) -> Job:
        files = {TEST_HOST: paths.TEST_HOST, "firstlight.elf": self.kernel}
        words = [
            "--kernel", "{file:firstlight.elf}", "--append", self.cmdline, "--cpus", str(self.cpus), "--memory", str(self.memory),
        ]  # fmt: skip
        if self.map:
            files["map.txt"] = self.map
            words += ["--module", "{file:map.txt}"]
        words += [*(["--io", self.io] if self.io else []), *(["--latency", self.latency] if self.latency else [])]
        disks: dict[str, Disk] = {}
        for disk, name in zip(self.specs, self.disk_names()):
            image = self.add_image(disks, disk, name)
            options = (",readonly" if disk.read_only else "") + (",sector=4096" if disk.sector == 4096 else "")
            options += f",controller={disk.controller}" if disk.controller else ""
            options += f",iops={disk.iops}" if disk.iops else ""
            if disk.bus == "ide":
                words += ["--ide", f"{{disk:{image}}}"]
            else:
                words += ["--disk", f"{'scsi' if disk.bus == 'scsi' else 'ide'}:{{disk:{image}}}{options}"]
        return Job(self.name, [*words, *self.extra], files, list(disks.values()), self.timeout, program=TEST_HOST)

    @staticmethod
    def add_image(disks: dict[str, Disk], disk: DiskSpec, name: str) -> str:
        """Adds the disk's image to the machine's; returns the file's name."""
        image = f"{disk.image or name}.img"
        content = str(disk.file) if disk.file else disk.content
        known = disks.setdefault(image, Disk(image, disk.size, content, disk.bring_out))
        known.bring_out = known.bring_out or disk.bring_out
        return image

    def device(self, bus: str, name: str, unit: int, ports: str) -> str:
        """QEMU's device for the drive of this name: the disk with this number on its bus. `ports`: the name of the AHCI controller's buses."""
        match bus:
            case "xen":
                return f"xen-disk,drive={name},vdev={name}"
            case "virtio":
                return f"virtio-blk-{'device' if self.machine.startswith('microvm') else 'pci'},drive={name},serial={name}"
            case "vscsi":  # two LUNs on each target
                return f"scsi-hd,drive={name},serial={name},bus=vscsi.0,scsi-id={unit // 2},lun={unit % 2}"
            case "nvme":
                return f"nvme,drive={name},serial={name}"
            case "pvscsi":
                return f"scsi-hd,drive={name},bus=pvscsi.0,scsi-id={unit}"
            case "sata":
                return f"ide-hd,drive={name},bus={ports}.{unit}"
            case "ide":
                return f"ide-hd,drive={name},bus=ide.{unit // 2},unit={unit % 2}"
        raise Problem(f"A disk on the bus {bus}: Machine.device() names no device of QEMU's for it.")

    def drives(self) -> tuple[list[Disk], list[str]]:
        disks: dict[str, Disk] = {}
        words: list[str] = []
        index = dict.fromkeys(BUSES, 0)
        shared = [disk.image for disk in self.specs if disk.image]
        if self.machine == "q35" and any(disk.bus == "ide" for disk in self.specs):
            words += ["-device", "piix3-ide,id=ide"]  # q35's own controller is AHCI
        # On q35 its own one, unless that has lost its buses' names to an IDE controller.
        own = self.machine == "q35" and not any(disk.bus == "ide" for disk in self.specs)
        if any(disk.bus == "sata" for disk in self.specs) and not own:
            words += ["-device", "ich9-ahci,id=sata"]
        if any(disk.bus == "pvscsi" for disk in self.specs):
            words += ["-device", "pvscsi,id=pvscsi"]
        if any(disk.bus == "vscsi" for disk in self.specs):
            thread = any(disk.iothread for disk in self.specs if disk.bus == "vscsi")
            words += ["-object", "iothread,id=io-vscsi"] if thread else []
            words += ["-device", f"virtio-scsi-{'device' if self.machine.startswith('microvm') else 'pci'},id=vscsi{',iothread=io-vscsi' if thread else ''}"]
        for disk, name in zip(self.specs, self.disk_names()):
            unit = index[disk.bus]
            index[disk.bus] += 1
            if disk.content == "null":
                options = [f"id={name}", f"driver=null-co,read-zeroes=on,size={disk.size}"]
            else:
                options = [f"id={name}", f"format={'qcow2' if disk.content == 'qcow2' else 'raw'}", f"file={{disk:{self.add_image(disks, disk, name)}}}"]
            if disk.read_only:
                options.append("readonly=on")
            options += [f"aio={disk.aio}"] if disk.aio else []
            options += [f"cache={disk.cache}"] if disk.cache else []
            own_thread = disk.iothread and disk.bus != "vscsi"
            thread = f",iothread=io-{name}" if own_thread else ""
            words += ["-object", f"iothread,id=io-{name}"] if own_thread else []
            if disk.iops:
                # Without iops-total-max QEMU lets a tenth of a second's worth through at once, less than with any value of it.
                options.append(f"throttling.iops-total={disk.iops}")
            if shared.count(disk.image) > 1:
                options.append("file.locking=off")
            geometry = f",logical_block_size={disk.sector},physical_block_size={disk.sector}" if disk.sector != 512 else ""
            if disk.bus == "ide" and self.machine != "q35":
                words += ["-drive", ",".join([f"if=ide,index={unit}", *options])]
            else:
                device = self.device(disk.bus, name, unit, "ide" if own else "sata")
                words += ["-drive", ",".join(["if=none", *options]), "-device", f"{device}{geometry}{thread}"]
        return list(disks.values()), words
