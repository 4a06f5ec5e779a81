"""Workloads in the words of the kernel's command line, and the main job."""

from __future__ import annotations

import dataclasses
import fnmatch


@dataclasses.dataclass(frozen=True)
class Workload:
    name: str
    bs: str
    qd: int
    count: int
    seed: int = 1

    @property
    def word(self) -> str:
        return f"workload={self.name},bs={self.bs},qd={self.qd},count={self.count},seed={self.seed}"

    @property
    def label(self) -> str:
        return f"{self.name}-{self.bs}-qd{self.qd}"

    @property
    def writes(self) -> bool:
        return self.name in ("randwrite", "write", "mixed")


MAIN_JOB = (
    Workload("randread", "4k", 1, 2000),
    Workload("randread", "4k", 32, 2000),
    Workload("randwrite", "4k", 1, 2000),
    Workload("randwrite", "4k", 32, 2000),
    Workload("read", "128k", 8, 400),
)
KINDS = {"xvda": "synthetic", "sda": "synthetic", "hda": "emulated"}


@dataclasses.dataclass(frozen=True)
class Side:
    """A machine of a comparison and those of its disks that are measured. Its images are alike everywhere."""

    platform: str
    about: str
    disks: tuple[str, ...]  # as the kernel names them
    attached: tuple[str, ...]  # their buses


# What is set against what. Where one machine cannot have both disks there are two, in the same start of the lab.
COMPARISONS: dict[str, tuple[Side, ...]] = {
    "xen-emu": (Side("xen-emu", "QEMU", ("xvda", "hda"), ("xen", "ide")),),
    "hyperv": (Side("hyperv", "test host", ("sda",), ("scsi",)), Side("kvm", "QEMU", ("hda",), ("ide",))),
    "xen-pvh": (Side("xen-pvh", "Xen with Linux's blkback", ("xvda",), ("xen",)),),
}
ON_REQUEST = ("xen-pvh",)  # measured only where --only names it: it has no emulated disk to be set against


def name(comparison: str, disk: str, workload: Workload) -> str:
    return f"{comparison}/{disk}-{workload.label}"


@dataclasses.dataclass(frozen=True)
class Chosen:
    comparison: str
    disks: list[str]
    workloads: list[Workload]


def choose(patterns: list[str], everything: bool = False) -> list[Chosen]:
    """For each comparison the disks and workloads with a name that matches one of the patterns; without a pattern all but those on request, or
    `everything`. A boot runs every workload on every disk: disks with different workloads are different entries."""
    found = []
    for comparison, sides in COMPARISONS.items():
        if not patterns and comparison in ON_REQUEST and not everything:
            continue
        pairs = [(disk, workload) for side in sides for disk in side.disks for workload in MAIN_JOB]
        kept = [pair for pair in pairs if not patterns or any(matches(name(comparison, *pair), pattern) for pattern in patterns)]
        groups: dict[tuple[Workload, ...], list[str]] = {}
        for disk in [disk for side in sides for disk in side.disks]:
            workloads = tuple(workload for kept_disk, workload in kept if kept_disk == disk)
            if workloads:
                groups.setdefault(workloads, []).append(disk)
        found += [Chosen(comparison, disks, list(workloads)) for workloads, disks in groups.items()]
    return found


def matches(text: str, pattern: str) -> bool:
    return fnmatch.fnmatch(text, pattern) or pattern in text
