"""Boots machines: here under TCG, here under KVM, or in the lab, with one interface for all."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import nested, probe, process, qcow2, records, xenguest, xenlab
from .lab import Lab
from .actions import Actions
from .machine import Machine, Platform
from .nested import Job, Outcome
from .problems import Exit, Problem

if TYPE_CHECKING:
    from .vmm import Qemu

Live = Callable[[str, str], None]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a platform's machines run, and why there."""

    nested: bool
    reason: str


@functools.cache
def place(platform: Platform, lab: Lab | None, forced: str = "auto") -> Place:
    if known := place_beforehand(platform, forced):
        return known
    assert lab
    lacking = probe.boots(lab.qemu, platform.accelerator or ("-accel", "kvm", "-cpu", "host"))
    return place_by(platform, forced, lacking) or Place(False, "the machine's own KVM has what it needs")


def place_beforehand(platform: Platform, forced: str) -> Place | None:
    """The part of place() that can be decided before anything is fetched or built: without a QEMU."""
    if platform.domain:
        return Place(True, "the Xen lab, on an emulated processor")
    if not platform.kvm:
        return Place(False, "QEMU emulates the processor here")
    if forced == "always":
        return Place(True, "nested lab, as asked")
    return place_by(platform, forced, probe.lacks_interfaces(platform.xen, platform.test_host))


def place_by(platform: Platform, forced: str, lacking: str) -> Place | None:
    """The place that follows from what this machine's KVM lacks; None if it lacks nothing."""
    if lacking and forced == "never":
        raise Problem(f"--lab never: {platform.name} cannot run on this machine's KVM: {lacking}. Leave out --lab never.")
    return Place(True, f"nested lab, because {lacking}") if lacking else None


@functools.cache
def lacks(qemu: Qemu, platform: Platform) -> str:
    """Why a QEMU cannot run a platform on this machine's KVM; empty if it can."""
    return probe.lacks_interfaces(platform.xen, platform.test_host) or probe.boots(qemu.program, platform.accelerator)


def place_of(machine: Machine, lab: Lab | None, forced: str = "auto") -> Place:
    """Where a machine runs. What the user names, a QEMU or another VMM, runs here. `lab` may be None only for these."""
    if machine.vmm:
        return Place(False, machine.vmm.platform.about)
    if machine.qemu:
        lacking = lacks(machine.qemu, machine.kind) if machine.kind.kvm else ""
        if lacking:
            raise Problem(f"--qemu: {machine.platform} cannot run on this machine's KVM: {lacking}. Leave out --qemu for the lab, or choose a platform without KVM.")
        return Place(False, f"QEMU {machine.qemu.text}")
    return place(machine.kind, lab, forced)


def demand_built(files: Iterable[Path]) -> None:
    for file in files:
        if not file.is_file():
            raise Problem(f"{file}: no such file. Leave out --no-build, and it is built.")


@dataclasses.dataclass
class Boot:
    """A finished boot."""

    machine: Machine
    outcome: Outcome
    log: records.Log
    judgement: records.Judgement


def finished(machine: Machine, outcome: Outcome) -> Boot:
    log = records.parse(outcome.output)
    if machine.vmm:
        return Boot(machine, outcome, log, machine.vmm.judge(log, outcome, machine.timeout))
    if machine.kind.domain:
        return Boot(machine, outcome, log, xenguest.judge(log, outcome, machine.timeout))
    return Boot(machine, outcome, log, records.judge(log, outcome.status, outcome.timed_out, machine.timeout, outcome.refused, dies=machine.dies_at_exit))


def boot(
    lab: Lab | None,
    machines: Sequence[Machine],
    *,
    wall: bool = False,
    forced: str = "auto",
    live: Live | None = None,
    keep: Path | None = None,
    more: Sequence[str] = (),
) -> Iterable[Boot]:
    """Boot each machine; those for the lab share one start of it. Yields each when its outcome is known.

    `more`: further arguments of the QEMU that runs the lab's Linux.
    """
    for machine in machines:
        for disk in machine.specs:
            if disk.bring_out:
                disk.bring_out.unlink(missing_ok=True)  # an earlier boot's files must not be taken for this one's image
    inside = [machine for machine in machines if place_of(machine, lab, forced).nested]
    for machine in machines:
        if machine not in inside:
            yield finished(machine, run_here(lab, machine, live))
    guests = [machine for machine in inside if machine.kind.domain]
    inside = [machine for machine in inside if not machine.kind.domain]
    # Xen and its command line are those of a whole start.
    for version, words in dict.fromkeys((machine.xen_version, machine.xen) for machine in guests):
        together = [machine for machine in guests if (machine.xen_version, machine.xen) == (version, words)]
        with tempfile.TemporaryDirectory(prefix="firstlight-") as folder:
            domains = [xenguest.domain(machine, Path(folder)) for machine in together]
            outcomes = xenguest.run(xenlab.find(version), domains, wall=wall, xen=words, live=live, keep=keep)
        for machine in together:
            yield finished(machine, outcomes[machine.name])
    if inside:
        with tempfile.TemporaryDirectory(prefix="firstlight-") as folder:
            jobs = [machine.job(Path(folder)) for machine in inside]
            assert lab
            outcomes = nested.run(lab, jobs, wall=wall, live=live, keep=keep, more=more)
        for machine in inside:
            yield finished(machine, outcomes[machine.name])


def make_disk(disk: nested.Disk, folder: Path) -> Path:
    """Always created: an existing file of this name may be the very one whose content is copied."""
    image = folder / disk.name
    made = image.with_name(f".{disk.name}")
    made.unlink(missing_ok=True)
    if disk.content == "pattern" or os.path.isabs(disk.content):
        demand_room(disk, folder)
    try:
        if os.path.isabs(disk.content):
            shutil.copyfile(disk.content, made)
        if disk.content == "qcow2":
            qcow2.make(made, disk.size)
            return made.rename(image)
        with open(made, "ab") as file:
            if disk.content == "pattern":
                line = b"firstlight pattern block: what a disk nobody wrote holds here\n"
                piece = (line * (nested.MEBIBYTE // len(line) + 1))[: nested.MEBIBYTE]
                for _ in range(disk.size // nested.MEBIBYTE + 1):
                    file.write(piece)
            file.truncate(disk.size)
        return made.rename(image)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


SPARE_BYTES = 256 << 20  # left free on the file system of an image
LARGE_BYTES = 1 << 30  # takes seconds to write


def demand_room(disk: nested.Disk, folder: Path) -> None:
    """For an image that is written out: a sparse one takes room only when the guest writes."""
    free = shutil.disk_usage(folder).free
    if disk.size + SPARE_BYTES > free:
        raise Problem(
            f"Disk image {disk.name}: its {disk.size >> 20} MiB are written into {folder}, and only {free >> 20} MiB are free there, of which {SPARE_BYTES >> 20} are left alone. "
            "Give it content=sparse, a smaller size, or make room.",
            Exit.USAGE,
        )
    if disk.size > LARGE_BYTES:
        warn(f"writing the {disk.size >> 20} MiB of the disk image {disk.name} (content=sparse writes nothing)")


def command_here(lab: Lab | None, job: Job, folder: Path) -> list[str]:
    qemu = [str(job.qemu or lab.qemu)] if job.qemu or lab else []  # none: the job has a program
    words = job.command(qemu, lambda name: str(job.files[name]), lambda name: str(folder / name))
    return [word.replace("{folder}", str(folder)) for word in words] if job.actions else words


def run_here(lab: Lab | None, machine: Machine, live: Live | None) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="firstlight-") as temporary:
        folder = Path(temporary)
        job = machine.job(folder)
        for disk in job.disks:
            make_disk(disk, folder)
        outcome = watch(command_here(lab, job, folder), job, live, folder)
        for disk in job.disks:
            if disk.bring_out:
                disk.bring_out.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / disk.name, disk.bring_out)
        return outcome


class Stops:
    """The pauses of a machine that runs here: each waits for its line, then for its delay, then stops the machine's process group."""

    DRAIN = 0.05  # after the stop, for output that the machine printed before it

    def __init__(self, pauses: Sequence[nested.Pause], group: int) -> None:
        self.wanted = list(pauses)  # those whose line has not been printed yet
        self.waiting: list[nested.Pause] = []  # those whose line has been printed; the first is in progress
        self.group = group
        self.state = ""  # "", delay, stopped, counted
        self.until = 0.0
        self.stopped_at = 0.0
        self.lost = 0.0  # total seconds that the machine was stopped
        self.done = 0

    def line(self, text: str) -> None:
        if self.wanted and re.search(self.wanted[0].after, text):
            self.waiting.append(self.wanted.pop(0))

    def step(self, verdict: bool) -> float | None:
        """Does what is due. `verdict`: the machine has printed one. Returns the seconds until the next call; None: none needed."""
        while self.waiting:
            now = time.monotonic()
            pause = self.waiting[0]
            if not self.state:
                self.state, self.until = "delay", now + pause.delay
            if now < self.until:
                break
            if self.state == "delay":
                self.signal(signal.SIGSTOP)
                self.state, self.stopped_at, self.until = "stopped", now, now + min(self.DRAIN, pause.seconds)
            elif self.state == "stopped":
                self.done += not verdict
                self.state, self.until = "counted", self.stopped_at + pause.seconds
            else:
                self.signal(signal.SIGCONT)
                self.lost += now - self.stopped_at
                self.waiting.pop(0)
                self.state = ""
        return max(0.0, self.until - time.monotonic()) if self.waiting else None

    def signal(self, number: int) -> None:
        # Whether the machine still ran when stopped is seen from its verdict, or from the end of its output.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.group, number)

    @property
    def held(self) -> float:
        """Total seconds that the machine was stopped, including the current pause."""
        return self.lost + (time.monotonic() - self.stopped_at if self.state in ("stopped", "counted") else 0.0)


def watch(command: Sequence[str], job: Job, live: Live | None, folder: Path = Path("/")) -> Outcome:
    """Run QEMU here, pass on each line, kill it at the time-out, which does not count pauses. `folder`: of the machine's files."""
    outcome = Outcome()
    begin = time.monotonic()
    lines: list[str] = []
    pending = b""
    verdict = False

    def take(line: bytes) -> None:
        text = line.rstrip(b"\r").decode(errors="replace")
        nonlocal verdict
        lines.append(text)
        verdict = verdict or text.startswith(nested.VERDICT)
        stops.line(text)
        actions.line(text)
        if live:
            live(job.name, text)

    with (
        open(job.logs[0], "ab") if job.logs else contextlib.nullcontext(subprocess.STDOUT) as errors,
        process.started(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors) as child,
    ):
        assert child.stdout
        stops = Stops(job.pauses, child.pid)
        actions = Actions(job.actions, child.pid, folder)
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while True:
                due = min((seconds for seconds in (stops.step(verdict), actions.step(verdict)) if seconds is not None), default=None)
                left = begin + job.timeout + stops.held - time.monotonic()
                if left <= 0:
                    outcome.timed_out = True
                    break
                if not selector.select(min(left, 1.0 if due is None else due)):
                    continue
                data = child.stdout.read1(65536)  # type: ignore[attr-defined]
                if not data:
                    break
                *whole, pending = (pending + data).split(b"\n")
                for line in whole:
                    take(line)
        if not outcome.timed_out:
            try:
                outcome.status = child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                outcome.timed_out = True  # it has closed its output but not exited
        actions.close()
        outcome.pauses, outcome.actions, outcome.fault = stops.done, actions.done, actions.fault
    if pending:
        take(pending)
    outcome.output = "\n".join(lines)
    outcome.messages = "\n".join(log.read_text(errors="replace") for log in job.logs)
    outcome.seconds = time.monotonic() - begin
    return outcome


def die_on_signals() -> None:
    """SIGTERM and SIGHUP end this program like Ctrl-C: the `with` blocks kill its children.

    Only once: a second Ctrl-C would interrupt that cleanup, which is bounded, and leave children running.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def leave(number, frame):
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:  # ignored, as set by nohup
            signal.signal(number, leave)


def warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
