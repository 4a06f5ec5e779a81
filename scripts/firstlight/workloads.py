"""Workloads as words of the kernel's command line, and the main job."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from random import Random


@dataclasses.dataclass(frozen=True)
class Workload:
    name: str
    bs: str
    qd: int
    count: int
    seed: int = 1
    startdelay: int = 0  # nanoseconds before the first I/O
    thinktime: int = 0  # the longest pause after every 64 I/Os, nanoseconds

    @property
    def word(self) -> str:
        perturbed = f",startdelay={self.startdelay},thinktime={self.thinktime}" if self.startdelay or self.thinktime else ""
        return f"workload={self.name},bs={self.bs},qd={self.qd},count={self.count},seed={self.seed}{perturbed}"

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
    """A machine of a comparison and those of its disks that are measured. Its images are the same on each machine."""

    platform: str
    about: str
    disks: tuple[str, ...]  # as named by the kernel
    attached: tuple[str, ...]  # their buses


# The comparisons. If one machine cannot have both disks there are two, in the same start of the lab.
COMPARISONS: dict[str, tuple[Side, ...]] = {
    "xen-emu": (Side("xen-emu", "QEMU", ("xvda", "hda"), ("xen", "ide")),),
    "hyperv": (Side("hyperv", "test host", ("sda",), ("scsi",)), Side("kvm", "QEMU", ("hda",), ("ide",))),
    "xen-pvh": (Side("xen-pvh", "Xen with Linux's blkback", ("xvda",), ("xen",)),),
}
ON_REQUEST = ("xen-pvh",)  # measured only if selected by --only: it has no emulated disk to be compared with


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


def choose(patterns: list[str], everything: bool = False) -> list[Chosen]:
    """For each comparison the disks and workloads whose names match one of the patterns; without a pattern all except those on request, or
    `everything`. A boot runs every workload on every disk: disks with different workloads are different entries.
    """
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
