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
DISKS = ("xvda", "hda")
KINDS = {"xvda": "synthetic", "hda": "emulated"}


def name(disk: str, workload: Workload) -> str:
    return f"{disk}-{workload.label}"


def choose(patterns: list[str]) -> tuple[list[str], list[Workload]]:
    """The disks and workloads with a name that matches one of the patterns; all without a pattern."""
    names = {name(disk, workload): (disk, workload) for disk in DISKS for workload in MAIN_JOB}
    kept = [pair for text, pair in names.items() if not patterns or any(matches(text, pattern) for pattern in patterns)]
    disks = [disk for disk in DISKS if any(pair[0] == disk for pair in kept)]
    return disks, [workload for workload in MAIN_JOB if any(pair[1] == workload for pair in kept)]


def matches(text: str, pattern: str) -> bool:
    return fnmatch.fnmatch(text, pattern) or pattern in text
