"""The table of VM tests, test/vm/tests.toml: read strictly, run in groups, judged strictly."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import lab, launch, paths, verify_image
from .machine import DiskSpec, Machine
from .problems import Problem
from .records import Verdict

TABLE = paths.REPOSITORY / "test" / "vm" / "tests.toml"


@dataclasses.dataclass
class Case:
    """One row. `expect` is the verdict; `output` and `never` are regular expressions over the whole output."""

    name: str
    platform: str = "qemu-pvh"
    machine: str = "pc"
    boot: str = ""
    cpus: int = 1
    memory: int = 256
    cmdline: str = "job=boot"
    map: str = ""  # a file beside the table
    disks: list[str] | None = None
    expect: str = "SUCCESS"
    output: list[str] = dataclasses.field(default_factory=list)
    never: list[str] = dataclasses.field(default_factory=list)
    check_images: bool = False  # bring the images out and check the stamps here
    timeout: float = 30.0
    groups: list[str] = dataclasses.field(default_factory=lambda: ["fast"])
    required: bool = True
    deterministic: bool = False  # in the lab: by instructions instead of by the clock, three times as slow
    about: str = ""

    def to_machine(self, work: Path) -> Machine:
        machine = Machine(
            self.name, self.platform, self.machine, self.boot, self.cpus, self.memory, self.cmdline,
            TABLE.parent / self.map if self.map else None, self.disks, timeout=self.timeout,
        )  # fmt: skip
        if self.check_images:
            for disk, name in zip(machine.specs, machine.disk_names()):
                disk.bring_out = work / f"{self.name}-{name}.img"
        return machine


def load(path: Path = TABLE) -> list[Case]:
    try:
        rows = tomllib.loads(path.read_text()).get("test", [])
    except tomllib.TOMLDecodeError as error:
        raise Problem(f"{path}: {error}") from None
    known = {field.name: field for field in dataclasses.fields(Case)}
    cases: list[Case] = []
    for row in rows:
        name = row.get("name", "(no name)")
        unknown = sorted(set(row) - set(known))
        if unknown or not re.fullmatch(r"[a-z0-9-]+", name):
            raise Problem(f"{path}: test {name!r}: unknown {unknown}, or a name that is not made of a-z, 0-9 and '-'.")
        if row.get("expect", "SUCCESS") not in Verdict.__members__:
            raise Problem(f"{path}: test {name!r}: expect is one of {', '.join(Verdict.__members__)}.")
        if row.get("map") and not (path.parent / row["map"]).is_file():
            raise Problem(f"{path}: test {name!r}: no map file {row['map']} beside the table.")
        for pattern in [*row.get("output", []), *row.get("never", [])]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise Problem(f"{path}: test {name!r}: {pattern!r}: {error}.") from None
        cases.append(Case(**row))
    names = [case.name for case in cases]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise Problem(f"{path}: these names occur twice: {' '.join(doubles)}.")
    for case in cases:
        case.to_machine(Path("/"))  # a row that describes no machine is found before anything runs
    return cases


@dataclasses.dataclass
class Result:
    """What became of a test, of whatever kind."""

    name: str
    status: str  # passed, failed, skipped
    seconds: float = 0.0
    detail: str = ""
    output: str = ""


def judge(case: Case, boot: launch.Boot) -> Result:
    complaints = []
    verdict = boot.judgement.verdict
    if verdict is Verdict.SKIP and case.expect != "SKIP":
        status = "failed" if case.required else "skipped"
        detail = f"skipped by the kernel: {boot.judgement.reason}" + (" (but it is required)" if case.required else "")
        return Result(case.name, status, boot.outcome.seconds, detail, boot.outcome.output)
    if verdict.value != case.expect:
        complaints.append(f"verdict {verdict.value} ({boot.judgement.reason}), expected {case.expect}")
    elif case.expect == "CRASH" and not boot.log.of("verdict"):
        complaints.append("a crash without a report: the kernel must say so itself")
    for pattern in case.output:
        if not re.search(pattern, boot.outcome.output, re.M):
            complaints.append(f"nothing in the output matches {pattern!r}")
    for pattern in case.never:
        match = re.search(pattern, boot.outcome.output, re.M)
        if match:
            complaints.append(f"{match[0]!r} in the output matches {pattern!r}, which must not occur")
    if case.check_images and not complaints:
        complaints += check_images(boot)
    return Result(
        case.name, "failed" if complaints else "passed", boot.outcome.seconds, "; ".join(complaints), boot.outcome.output
    )


def check_images(boot: launch.Boot) -> list[str]:
    """Every verify record against the image it speaks of."""
    found = boot.log.of("verify")
    if not found:
        return ["no verify record"]
    images = dict(zip(boot.machine.disk_names(), (disk.bring_out for disk in boot.machine.specs)))
    complaints = []
    for record in found:
        image = images.get(record["disk"])
        if not image or not image.is_file():
            complaints.append(f"no image of {record['disk']} was brought out")
            continue
        checked = verify_image.check(image, record)
        if checked.blocks == 0:
            complaints.append(f"{record['disk']}: the kernel verified no block")
        if checked.bad:
            complaints.append(f"{record['disk']}: {len(checked.bad)} of {checked.blocks} blocks are wrong, first: {checked.bad[0]}")
        image.unlink()
    return complaints


def run(ready: lab.Lab, cases: Sequence[Case], forced: str, told: Callable[[str], None]) -> Iterable[Result]:
    """All cases. Those for the lab share a start of it, the deterministic ones another; what a lab that broke down did
    not get to is tried once more."""
    work = paths.RUNS / "tests"
    work.mkdir(parents=True, exist_ok=True)
    by_name = {case.name: case for case in cases}
    machines = {case.name: case.to_machine(work) for case in cases}
    inside = {name for name, machine in machines.items() if launch.place(machine.kind, ready, forced).nested}
    for deterministic in (False, True):
        left = [machines[case.name] for case in cases if (case.deterministic and case.name in inside) == deterministic]
        for attempt in range(2):
            count = sum(machine.name in inside for machine in left)
            if count:
                told(f"{count} in the lab, {'deterministic' if deterministic else 'wall-clock'} time")
            done: set[str] = set()
            fault = "the lab did not get to it"
            try:
                for boot in launch.boot(
                    ready, left, wall=not deterministic, forced=forced, keep=work / f"lab-{'d' if deterministic else 'w'}{attempt}"
                ):
                    if boot.machine.name in inside and boot.outcome.status is None:
                        continue
                    done.add(boot.machine.name)
                    yield judge(by_name[boot.machine.name], boot)
            except Problem as problem:
                fault = str(problem)
            left = [machine for machine in left if machine.name not in done]
            if not left:
                break
        for machine in left:
            yield Result(machine.name, "failed", 0, fault.splitlines()[0], fault)
