"""What scripts/bench measures: workloads, as words of the kernel's command line, and the comparisons of disks."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING

from . import yardstick
from .fiojson import size_word
from .machine import IOS, SIZES, kernel_names

if TYPE_CHECKING:
    from .vmm import Vmm

DISK_BYTES = 64 << 20
# What the kernel's processors do while their disks work (io.executor's wait_names): its key wait=, the default first.
WAITS = ("interrupt", "poll", "adaptive")
# The kernel's limits (io.bench, boot.options).
MOST_BS, MOST_QD, MOST_COUNT, MOST_SEED = 1 << 20, 256, (1 << 32) - 1, (1 << 63) - 1
MOST_WORKLOADS = 32  # of one boot
PATTERNS = ("randread", "randwrite", "read", "write", "randrw")  # as fio's


@dataclasses.dataclass(frozen=True)
class Workload:
    name: str
    bs: str
    qd: int
    count: int
    seed: int = 1
    startdelay: int = 0  # nanoseconds before the first I/O
    thinktime: int = 0  # the longest pause after every 64 I/Os, nanoseconds
    mix: int = 70  # percentage of reads in randrw

    @property
    def word(self) -> str:
        mix = f",mix={self.mix}" if self.name == "randrw" else ""
        perturbed = f",startdelay={self.startdelay},thinktime={self.thinktime}" if self.startdelay or self.thinktime else ""
        return f"workload={self.name},bs={self.bs},qd={self.qd},count={self.count},seed={self.seed}{mix}{perturbed}"

    @property
    def label(self) -> str:
        return f"{self.name}-{self.bs}-qd{self.qd}"

    @property
    def writes(self) -> bool:
        return self.name in ("randwrite", "write", "randrw")

    @property
    def bytes(self) -> int:
        """Size of an I/O."""
        return parse_bytes(self.bs)


def parse_bytes(text: str) -> int:
    """A size with the suffix k or m; 0 if it is none."""
    match = re.fullmatch(r"(\d{1,9})([km]?)", text)
    return int(match[1]) * SIZES[match[2]] if match else 0


MAIN_JOB = (
    Workload("randread", "4k", 1, 2000),
    Workload("randread", "4k", 32, 2000),
    Workload("randwrite", "4k", 1, 2000),
    Workload("randwrite", "4k", 32, 2000),
    Workload("read", "128k", 8, 400),
)


def parse_workload(text: str) -> Workload:
    """The type of --workload: `NAME[,bs=4k][,qd=1][,count=2000][,seed=1][,mix=70]`, by fio's names of the patterns."""

    def wrong(what: str) -> argparse.ArgumentTypeError:
        return argparse.ArgumentTypeError(f"{text!r}: {what}, as in randread,bs=4k,qd=32,count=2000")

    name, *options = text.split(",")
    if name not in PATTERNS:
        raise wrong(f"the pattern {name!r} was given, one of {', '.join(PATTERNS)} was expected")
    limits = {"qd": (1, MOST_QD), "count": (1, MOST_COUNT), "seed": (0, MOST_SEED)} | ({"mix": (0, 100)} if name == "randrw" else {})
    found: dict[str, int] = {}
    bs = 4096
    for option in options:
        key, _, value = option.partition("=")
        if key in found or (key != "bs" and key not in limits):
            keys = ", ".join(f"{each}=" for each in ("bs", *limits))
            raise wrong(f"{option!r} was given, each of {keys} at most once was expected" + (" (mix= is for randrw)" if key == "mix" else ""))
        if key == "bs":
            found[key] = bs = parse_bytes(value)
            if not bs or bs % 512 or bs > MOST_BS:
                raise wrong(f"{option!r} was given, a multiple of 512 bytes up to 1m was expected, with the suffix k or m")
            continue
        low, high = limits[key]
        if not re.fullmatch(r"\d{1,19}", value) or not low <= int(value) <= high:
            raise wrong(f"{option!r} was given, a number from {low} to {high} was expected")
        found[key] = int(value)
    found.pop("bs", None)
    workload = Workload(name, size_word(bs), found.pop("qd", 1), found.pop("count", 2000), **found)
    if name in ("read", "write") and workload.count > DISK_BYTES // bs:
        raise wrong(f"count={workload.count} was given; a disk has {DISK_BYTES >> 20} MiB, so at most {DISK_BYTES // bs} sequential I/Os of {workload.bs} were expected")
    return workload


def parse_waits(text: str) -> tuple[str, ...]:
    """The type of --wait: some of WAITS, separated by commas."""
    words = tuple(text.split(","))
    if not set(words) <= set(WAITS) or len(set(words)) != len(words):
        raise argparse.ArgumentTypeError(f"{text!r} was given, some of {', '.join(WAITS)} were expected, each at most once, as in {','.join(WAITS)}")
    return words


def parse_ios(text: str) -> tuple[str, ...]:
    """The type of --io: some of IOS, separated by commas."""
    words = tuple(text.split(","))
    if not set(words) <= set(IOS) or len(set(words)) != len(words):
        raise argparse.ArgumentTypeError(f"{text!r} was given, some of {', '.join(IOS)} were expected, each at most once, as in {','.join(IOS)}")
    return words


def parse_sweep(text: str) -> tuple[int, ...]:
    """The type of --sweep: `qd=1..128`, the powers of two in it."""
    match = re.fullmatch(r"qd=(\d{1,4})\.\.(\d{1,4})", text)
    low, high = (int(match[1]), int(match[2])) if match else (0, 0)
    powers = [1 << shift for shift in range(MOST_QD.bit_length())]
    if low not in powers or high not in powers or low >= high:
        raise argparse.ArgumentTypeError(f"{text!r} was given, two powers of two from 1 to {MOST_QD} were expected, the lower one first, as in qd=1..128")
    return tuple(power for power in powers if low <= power <= high)


def swept(workloads: Sequence[Workload], depths: Sequence[int]) -> list[Workload]:
    """Each pattern and block size at each depth, instead of its own depths."""
    kinds = {(workload.name, workload.bs): workload for workload in reversed(workloads)}
    ordered = dict.fromkeys((workload.name, workload.bs) for workload in workloads)
    return [dataclasses.replace(kinds[kind], qd=depth) for kind in ordered for depth in depths]


@dataclasses.dataclass(frozen=True)
class Driver:
    """What drives a disk on a bus, here and in Linux. A result of another driver is an error: it would be another disk's."""

    name: str
    kind: str
    linux: yardstick.Driver  # its module is in lab.L2_MODULES
    qemu: bool = False  # one of the disks of the comparisons `qemu` and `all`


# By bus, in the order in which the kernel attaches the disks of one machine: the synthetic ones before the emulated ones.
DRIVERS = {
    "xen": Driver("xen_blk", "synthetic", yardstick.Driver("xen-blkfront", "vbd")),
    "scsi": Driver("storvsc", "synthetic", yardstick.Driver("storvsc", "hv_storvsc")),
    "virtio": Driver("virtio_blk", "synthetic", yardstick.Driver("virtio_blk", "virtio_blk"), qemu=True),
    "vscsi": Driver("virtio_scsi", "synthetic", yardstick.Driver("virtio_scsi", "virtio_scsi"), qemu=True),
    "pvscsi": Driver("pvscsi", "synthetic", yardstick.Driver("vmw_pvscsi", "vmw_pvscsi"), qemu=True),
    "ide": Driver("ata", "emulated", yardstick.Driver("ata_piix", "ata_piix"), qemu=True),
    "nvme": Driver("nvme", "emulated", yardstick.Driver("nvme", "nvme"), qemu=True),
    "sata": Driver("ahci", "emulated", yardstick.Driver("ahci", "ahci"), qemu=True),
}


@dataclasses.dataclass(frozen=True)
class Side:
    """A machine of a comparison. Its images are the same on each machine.

    `buses` are its disks, in the order in which the kernel attaches them: disks of one kind are numbered in that order.
    `names`: the disks' names in the comparison, if another machine of it has disks of the same names.
    """

    platform: str
    about: str
    buses: tuple[str, ...]
    machine: str = "pc"
    arguments: tuple[str, ...] = ()  # further arguments of QEMU
    names: tuple[str, ...] = ()
    twins: bool = False  # its IDE disks are those on the ring once more, on the same images
    vmm: Vmm | None = None  # named by the user; `platform` is then its key

    @property
    def key(self) -> str:
        return self.platform if self.machine == "pc" else f"{self.platform}-{self.machine}"

    @property
    def disks(self) -> tuple[str, ...]:
        return self.names or tuple(kernel_names(self.buses))

    def bus(self, disk: str) -> str:
        return self.buses[self.disks.index(disk)]

    def kernel_name(self, disk: str) -> str:
        return kernel_names(self.buses)[self.disks.index(disk)]

    def disk(self, kernel_name: str) -> str:
        return self.disks[kernel_names(self.buses).index(kernel_name)]


QEMU_BUSES = tuple(bus for bus, driver in DRIVERS.items() if driver.qemu)
# The comparisons. If one machine cannot have all disks there are several, in the same start of the lab.
COMPARISONS: dict[str, tuple[Side, ...]] = {
    "xen-emu": (Side("xen-emu", "QEMU", ("xen", "ide")),),
    "hyperv": (Side("hyperv", "test host", ("scsi",)), Side("kvm", "QEMU", ("ide",))),
    "xen-pvh": (Side("xen-pvh", "Xen with Linux's blkback", ("xen",)),),
    "xen-hvm": (Side("xen-hvm", "Xen with Linux's blkback, and QEMU in dom0, one image", ("xen", "ide"), twins=True),),
    "qemu": (Side("kvm", "QEMU", QEMU_BUSES),),
    "all": (Side("xen-emu", "QEMU", ("xen", *QEMU_BUSES)),),
    # QEMU's microvm can have PCI too, but its firmware assigns no addresses there.
    "microvm": (
        Side("kvm", "QEMU's microvm, virtio-mmio", ("virtio",), "microvm-acpi", ("-global", "virtio-mmio.force-legacy=false"), ("mmio",)),
        Side("kvm", "QEMU's pc, virtio-pci", ("virtio",), names=("pci",)),
    ),
}
# Measured only if --only names them: xen-pvh has no disk to be compared with, xen-hvm takes a quarter of an hour, the others repeat and take longer than the default ones together.
ON_REQUEST = ("xen-pvh", "xen-hvm", "qemu", "all", "microvm")
# What the other disks' rates are divided by in the table of a comparison of more than one synthetic or one emulated disk.
BASELINES = {"qemu": "hda", "all": "hda", "microvm": "pci"}


# The time of an I/O, in a run whose predecessors have measured nothing yet.
FIRST_GUESS = 25_000  # ns
LONGEST_DELAY, LONGEST_PAUSE = 1_000_000_000, 1_000_000  # accepted by the kernel, ns


def perturbed(chosen: Chosen, seed: int, number: int, runs: int, service: Mapping[str, Sequence[float]]) -> Chosen:
    """The jobs of run `number` of `runs`: if guest, VMM and host run in lockstep, a figure depends on their initial phase, so each run starts at another one.

    The first I/O waits for a part of a round, which is queue depth times `service`, the nanoseconds of an I/O on each disk in the previous run,
    by the label of the workload. The parts are stratified: run k of n takes its own from the k-th n-th. And after every 64 I/Os there is a pause of
    up to the shortest of `service`. Everything is determined by `seed`.
    """
    changed = []
    for workload in chosen.workloads:
        random = Random(f"{seed} {chosen.comparison} {workload.label} {number}")
        took = service.get(workload.label) or [FIRST_GUESS]
        delay = (number + random.random()) / runs * workload.qd * max(took)
        changed.append(
            dataclasses.replace(
                workload, seed=random.randrange(1, 1 << 31), startdelay=max(1, min(round(delay), LONGEST_DELAY)), thinktime=min(round(min(took)), LONGEST_PAUSE)
            )
        )
    return dataclasses.replace(chosen, workloads=changed)


def name(comparison: str, disk: str, workload: Workload) -> str:
    return f"{comparison}/{disk}-{workload.label}"


@dataclasses.dataclass(frozen=True)
class Chosen:
    comparison: str
    disks: list[str]
    workloads: list[Workload]


def disk_words(comparison: str) -> dict[str, list[str]]:
    """The words by which --disk names the disks of a comparison: their names, the kernel's and their buses'; with the disks' names."""
    found: dict[str, list[str]] = {}
    for side in COMPARISONS[comparison]:
        for disk in side.disks:
            for word in dict.fromkeys((disk, side.kernel_name(disk), side.bus(disk))):
                found.setdefault(word, []).append(disk)
    return found


def choose(patterns: list[str], everything: bool = False, jobs: Sequence[Workload] = MAIN_JOB, disks: Sequence[str] = ()) -> list[Chosen]:
    """For each comparison the disks and workloads whose names match one of the patterns; without a pattern all except those on request, or
    `everything`. `disks`: only these (disk_words()). A boot runs every workload on every disk: disks with different workloads are different entries.
    """
    found = []
    for comparison, sides in COMPARISONS.items():
        wanted = [pattern for pattern in patterns if comparison not in ON_REQUEST or matches(comparison, pattern.partition("/")[0])]
        if not wanted and (patterns or (comparison in ON_REQUEST and not everything)):
            continue
        words = disk_words(comparison)
        named = {disk for word in disks for disk in words.get(word, ())}
        present = [disk for side in sides for disk in side.disks if not disks or disk in named]
        pairs = [(disk, workload) for disk in present for workload in jobs]
        kept = [pair for pair in pairs if not patterns or any(matches(name(comparison, *pair), pattern) for pattern in wanted)]
        groups: dict[tuple[Workload, ...], list[str]] = {}
        for disk in present:
            workloads = tuple(workload for kept_disk, workload in kept if kept_disk == disk)
            if workloads:
                groups.setdefault(workloads, []).append(disk)
        found += [Chosen(comparison, disks_of, list(workloads)) for workloads, disks_of in groups.items()]
    return found


def matches(text: str, pattern: str) -> bool:
    return fnmatch.fnmatch(text, pattern) or pattern in text
