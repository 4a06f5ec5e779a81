"""Runs jobs inside the lab: this machine's QEMU emulates a processor with SVM, in which a Linux has a real KVM.

L0 is QEMU here, L1 the Linux of the lab, L2 the machine a job describes. Several jobs share one boot of L1.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import selectors
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from . import process
from .actions import Action
from .lab import Lab, write_cpio
from .problems import Exit, Problem

MEBIBYTE = 1 << 20
BOOT_SECONDS = 180.0  # for L1's start, on a loaded machine
QUEUE_SECONDS = 3600.0  # that a start in counted time may wait for a processor, in addition to its own processor time

# Every instruction takes one nanosecond, for guest, hypervisor and VMM alike, and idle time is skipped. L1's clock
# and the random seed are fixed too, so that two runs execute the same instructions.
DETERMINISTIC = (
    "-accel", "tcg", "-icount", "shift=0,sleep=off", "-smp", "1", "-rtc", "base=2024-01-01,clock=vm", "-seed", "1",
)  # fmt: skip
# Without fast string moves: with them the kernels and C libraries inside copy by `rep movsb`, of which QEMU counts every
# byte as one instruction. A page would take 4,096 ns, a copy rate of 1 GB/s; by words it takes about a quarter.
PROCESSOR = ("-cpu", "EPYC-Milan,+svm,+npt,-erms,-fsrm")
# One processor here too. With two, QEMU's emulation of SVM corrupts the state of a guest or of L1 in about one of twenty boots
# with four virtual processors (docs/decisions/0003-the-lab.md); and two labs of one processor use two cores better than one of two.
WALL = ("-accel", "tcg,thread=multi", "-smp", "1")


@dataclasses.dataclass
class Disk:
    """An image file that a job's machine uses."""

    name: str
    size: int
    content: str = "pattern"  # zero, sparse, pattern, or a file's path
    bring_out: Path | None = None  # destination of a copy after the job


@dataclasses.dataclass(frozen=True)
class Pause:
    """Stops the VMM's process (SIGSTOP) `delay` seconds after a line of output matched, and continues it `seconds` later (SIGCONT).

    `after` is matched against one line at a time, by Python here and by awk in the lab: only syntax common to both is allowed.
    """

    after: str
    seconds: float
    delay: float = 0.0

    # Literal characters, escaped punctuation, brackets without classes, groups, alternatives, * + ? and anchors.
    COMMON = re.compile(r"(?:[^\\\[\](){}*+?|^$\x00-\x1f]|\\[][\\(){}*+?|^$./-]|\[\^?\]?[^][\\\x00-\x1f]*\]|\((?!\?)|[)|^$]|(?<=.)[*+?](?![*+?]))+")

    def __post_init__(self) -> None:
        if not isinstance(self.after, str) or not self.COMMON.fullmatch(self.after):
            raise Problem(f"a pause's after={self.after!r} is not a regular expression that Python and awk read alike (no \\d, \\b, {{}}, (?…)).")
        try:
            re.compile(self.after)
        except re.error as error:
            raise Problem(f"a pause's after={self.after!r}: {error}.") from None
        for name, value, least in (("seconds", self.seconds, 0.1), ("delay", self.delay, 0.0)):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= 600:
                raise Problem(f"a pause's {name}={value!r} is not a number of seconds from {least:g} to 600.")

    def __str__(self) -> str:
        return f"{self.seconds:g} s, {self.delay:g} s after {self.after!r}"


@dataclasses.dataclass
class Job:
    """One machine to start. In `arguments`, {file:NAME} and {disk:NAME} are replaced by paths.

    `program`: the file that runs the machine; empty for QEMU. `timeout` does not count the pauses.
    """

    name: str
    arguments: list[str]
    files: dict[str, Path] = dataclasses.field(default_factory=dict)
    disks: list[Disk] = dataclasses.field(default_factory=list)
    timeout: float = 60.0
    program: str = ""
    pauses: Sequence[Pause] = ()
    actions: Sequence[Action] = ()  # on this machine, or in dom0
    qemu: Path | None = None  # on this machine: another QEMU than the lab's
    logs: Sequence[Path] = ()  # on this machine: the VMM's own messages; the first file gets its standard error output, which is part of the output otherwise

    def command(self, qemu: Sequence[str], files: Callable[[str], str], disks: Callable[[str], str]) -> list[str]:
        images = {disk.name for disk in self.disks}

        def place(match: re.Match[str]) -> str:
            if match[2] not in (self.files if match[1] == "file" else images):
                return match[0]  # the user's own text, as in a command line
            return (files if match[1] == "file" else disks)(match[2])

        first = [files(self.program)] if self.program else qemu
        return [*first, *(re.sub(r"\{(file|disk):([^}]+)\}", place, word) for word in self.arguments)]


@dataclasses.dataclass
class Outcome:
    """The outcome of a job: QEMU's exit status and everything it printed."""

    status: int | None = None  # None: the job never ended
    output: str = ""
    seconds: float = 0.0  # in the time of the machine that ran it
    timed_out: bool = False
    shutdown: int | None = None  # the shutdown reason of a Xen domain; None on other platforms, and if it did not shut down
    pauses: int = 0  # pauses carried out before the machine gave its verdict
    actions: int = 0  # actions carried out before the machine gave its verdict
    fault: str = ""  # of an action that failed
    refused: str = ""  # why the virtual machine monitor did not start, if the platform itself can tell
    messages: str = ""  # contents of the job's `logs`



VERDICT = '@{"record":"verdict"'  # after this line a machine does nothing that a pause could affect


def inner_command(job: Job, index: int) -> list[str]:
    return job.command(
        ["qemu-system-x86_64", "-L", "/share"], lambda name: f"/jobs/{index:03}/files/{name}", lambda name: f"/tmp/{name}"
    )


# The part of L1's 2048 MiB available for guests and their images: its own system and QEMU use the rest.
ROOM = 1600 << 20


def demand_memory(names: Sequence[str], memory: Sequence[int], images: Sequence[int]) -> None:
    """A job has L1's memory to itself; one that needs more would be killed there without a message."""
    for name, guest, disks in zip(names, memory, images):
        if guest + disks > ROOM:
            raise Problem(
                f"{name}: {guest // MEBIBYTE} MiB of memory and {disks // MEBIBYTE} MiB of disks do not fit into the lab, "
                f"which has {ROOM // MEBIBYTE} MiB for both. Ask for less.",
                Exit.USAGE,
            )


def job_script(job: Job, index: int, offsets: dict[str, int]) -> str:
    """Sourced by L1: three functions, so that L1's script is the same for all jobs."""
    lines = ["prepare() {", "    :"]
    for disk in job.disks:
        if Path(disk.content).is_absolute():
            lines.append(f"    cp /jobs/{index:03}/files/disk-{disk.name} /tmp/{disk.name} && truncate -s {disk.size} /tmp/{disk.name}")
        else:
            lines.append(f"    disk {disk.name} {disk.size} {disk.content}")
    # A pause takes as much time inside: the limit includes all of them.
    seconds = max(1, round(job.timeout + sum(pause.seconds for pause in job.pauses)))
    words = " ".join(shlex.quote(word) for word in inner_command(job, index))
    command = f"timeout -s KILL {seconds} {words}"
    lines += ["}", "command() {", "    " + (f"pausing {command}" if job.pauses else command), "}", "after() {", "    :"]
    for name, offset in offsets.items():
        lines.append(f"    bring_out {name} {offset // MEBIBYTE}")
    return "\n".join([*lines, "}", ""])


def pause_lines(job: Job) -> str:
    """One pause per line: delay and length in microseconds, a tab, and the expression."""
    return "".join(f"{round(pause.delay * 1e6)} {round(pause.seconds * 1e6)}\t{pause.after}\n" for pause in job.pauses)


def scratch_layout(jobs: Sequence[Job]) -> tuple[list[dict[str, int]], int]:
    """Offset of each image on the scratch disk, on which they are brought out: whole mebibytes, in order."""
    layout, end = [], 0
    for job in jobs:
        offsets = {}
        for disk in job.disks:
            if disk.bring_out:
                offsets[disk.name] = end
                end += -(-disk.size // MEBIBYTE) * MEBIBYTE
        layout.append(offsets)
    return layout, end


@dataclasses.dataclass
class Nested:
    """A prepared L1: the command line that starts it, and where its files are."""

    folder: Path
    command: list[str]
    tag: str
    layout: list[dict[str, int]]


def prepare(lab: Lab, jobs: Sequence[Job], folder: Path, wall: bool, more: Sequence[str] = ()) -> Nested:
    """`more`: further arguments of the QEMU that runs L1."""
    names = [job.name for job in jobs]
    if len(set(names)) != len(names):
        raise Problem(f"Two jobs of one lab run have the same name: {' '.join(names)}")
    layout, size = scratch_layout(jobs)
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)  # if the folder is kept (--dry-run): left by an interrupted run
    (tree / "jobs").mkdir(parents=True)
    script = (Path(__file__).parent / "l1-init.sh").read_text()
    (tree / "init").write_text(script)
    (tree / "init").chmod(0o755)
    shutil.copyfile(Path(__file__).parent / "lab-common.sh", tree / "jobs/common.sh")
    (tree / "jobs/modules").write_text("".join(f"{name}\n" for name in lab.modules["l1"]))
    digest = hashlib.sha256()
    copied: dict[Path, Path] = {}
    for index, (job, offsets) in enumerate(zip(jobs, layout)):
        place = tree / f"jobs/{index:03}"
        (place / "files").mkdir(parents=True)
        (place / "name").write_text(job.name + "\n")
        text = job_script(job, index, offsets)
        (place / "job.sh").write_text(text)
        digest.update(text.encode())
        if job.pauses:
            (place / "events").write_text(pause_lines(job))
            digest.update(pause_lines(job).encode())
        files = dict(job.files)
        files |= {f"disk-{disk.name}": Path(disk.content) for disk in job.disks if Path(disk.content).is_absolute()}
        for name, path in files.items():
            # One file for all jobs that use it: in L1 every copy takes memory.
            target = place / "files" / name
            if path in copied:
                os.link(copied[path], target)
            else:
                copied[path] = target
                shutil.copy(path, target)
    tag = digest.hexdigest()[:12]
    (tree / "jobs/tag").write_text(tag + "\n")
    write_cpio(tree, folder / "jobs.cpio")
    shutil.rmtree(tree)
    # The kernel unpacks concatenated archives as one; a later file replaces an earlier one.
    with open(folder / "initrd", "wb") as whole:
        for part in (lab.base, folder / "jobs.cpio"):
            with open(part, "rb") as file:
                shutil.copyfileobj(file, whole)
            whole.write(bytes(-whole.tell() % 512))
    command = [
        str(lab.qemu), *(WALL if wall else DETERMINISTIC),
        *PROCESSOR, "-m", "2048",
        "-kernel", str(lab.kernel), "-initrd", str(folder / "initrd"),
        "-append", "console=ttyS0 quiet loglevel=0 panic=-1 nokaslr norandmaps",
        "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-monitor", "none", "-no-reboot", *more,
    ]  # fmt: skip
    if size:
        # Only if an image is brought out: this disk's I/O completes in real time, so a run with it is not exactly repeatable.
        scratch = folder / "scratch.raw"
        with open(scratch, "wb") as file:
            file.truncate(size)
        command += [
            "-drive", f"if=none,id=scratch,format=raw,werror=report,file={scratch}", "-device", "virtio-blk-pci,drive=scratch",
        ]  # fmt: skip
    return Nested(folder, command, tag, layout)


class Reader:
    """Reads L1's serial output line by line and assigns it to the jobs' outcomes, strictly."""

    def __init__(
        self, tag: str, names: Sequence[str], live: Callable[[str, str], None] | None = None, limits: Mapping[str, float] = {}
    ) -> None:
        self.tag = tag
        self.limits = limits
        self.waiting = list(names)
        self.outcomes = {name: Outcome() for name in names}
        self.current: str | None = None
        self.ready = self.off = self.late = False
        self.fault = ""
        self.notes: list[str] = []
        self.live = live

    def line(self, text: str) -> None:
        words = text.split()
        if words[:2] != ["@@lab", self.tag]:
            if self.current:
                self.outcomes[self.current].output += text + "\n"
                if self.live:
                    self.live(self.current, text)
            return
        verb, rest = words[2], words[3:]
        fields = dict(word.split("=", 1) for word in rest if "=" in word)
        if verb == "ready":
            self.ready = True
        elif verb == "begin" and self.current is None and self.waiting and rest == self.waiting[:1]:
            self.current = self.waiting.pop(0)
        elif verb == "end" and self.current and rest[:1] == [self.current]:
            outcome = self.outcomes[self.current]
            # The marker begins with its own line feed, which is not part of the job's output.
            outcome.output = outcome.output.removesuffix("\n")
            outcome.status = int(fields["status"])
            outcome.seconds = int(fields["ms"]) / 1000
            # SIGKILL is sent by `timeout`, or before its time by a kernel that has run out of memory.
            outcome.timed_out = outcome.status == 137 and outcome.seconds >= self.limits.get(self.current, 0) - 0.5
            outcome.shutdown = int(fields["reason"]) if fields.get("reason", "").isdigit() else None
            self.current = None
        elif verb == "paused" and self.current:
            outcome = self.outcomes[self.current]
            outcome.output = outcome.output.removesuffix("\n")
            outcome.pauses += VERDICT not in outcome.output
        elif verb == "acting" and self.current:
            outcome = self.outcomes[self.current]
            outcome.output = outcome.output.removesuffix("\n")
            outcome.actions += VERDICT not in outcome.output
        elif verb == "failed" and self.current:
            outcome = self.outcomes[self.current]
            outcome.output = outcome.output.removesuffix("\n")
            outcome.fault = outcome.fault or " ".join(rest)
        elif verb == "told" and self.current:
            # What a command beside the guest has printed.
            outcome = self.outcomes[self.current]
            outcome.output = outcome.output.removesuffix("\n") + f"dom0: {' '.join(rest)}\n"
        elif verb == "off" and self.current is None and not self.waiting:
            self.off = True
        elif verb in ("note:", "note"):
            self.notes.append(" ".join(rest))
        else:
            self.fault = self.fault or f"unexpected marker: {text}"

    def complaint(self) -> str:
        """Empty if all expected lines were printed, in order."""
        if self.fault:
            return self.fault
        if not self.ready:
            return "L1 never reported that it was ready"
        if self.current:
            return f"job {self.current} began and never ended"
        if self.waiting:
            return f"job {self.waiting[0]} never began"
        if not self.off:
            return "L1 did not report that it was done"
        return ""


def run(
    lab: Lab,
    jobs: Sequence[Job],
    *,
    wall: bool = False,
    live: Callable[[str, str], None] | None = None,
    keep: Path | None = None,
    more: Sequence[str] = (),
) -> dict[str, Outcome]:
    """Run all jobs in one boot of L1. A failure of the lab itself is a Problem; a job's failure is in its outcome."""
    with tempfile.TemporaryDirectory(prefix="firstlight-lab-") as temporary:
        nested = prepare(lab, jobs, Path(temporary), wall, more)
        reader = Reader(nested.tag, [job.name for job in jobs], live, {job.name: job.timeout for job in jobs})
        # In deterministic mode a job's own limit counts its instructions; this one counts seconds that QEMU computed.
        limit = BOOT_SECONDS + sum(5 * job.timeout + 30 + sum(pause.seconds for pause in job.pauses) for job in jobs)
        log = follow(nested.command, reader, limit, counted=not wall)
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / "serial.log").write_text(log)
        complaint = reader.complaint()
        if complaint and not (reader.ready and any(outcome.status is not None for outcome in reader.outcomes.values())):
            raise Problem(
                f"The lab failed: {complaint}. Its last output:\n{process.tail(log)}", Exit.TIMEOUT if reader.late else Exit.ERROR
            )
        if complaint:
            print(f"lab: {complaint}. Its last output:\n{process.tail(log, 15)}", file=sys.stderr)
        for job, offsets in zip(jobs, nested.layout):
            for disk in job.disks:
                if disk.bring_out and reader.outcomes[job.name].status is not None:
                    extract(nested.folder / "scratch.raw", offsets[disk.name], disk.size, disk.bring_out)
        return reader.outcomes


def follow(command: Sequence[str], reader: Reader, limit: float, folder: Path | None = None, counted: bool = False) -> str:
    """Feed the reader until QEMU exits or the limit passes; returns the whole log. `folder`: QEMU's working directory.

    `counted`: the limit counts QEMU's processor time: in counted time, waiting for a processor changes nothing.
    """
    import subprocess

    log: list[str] = []
    pending = b""
    with process.started(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        assert child.stdout
        end = time.monotonic() + limit + (QUEUE_SECONDS if counted else 0)
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while True:
                left = end - time.monotonic()
                if counted:
                    left = min(left, limit - process.processor_seconds(child.pid))
                if left <= 0:
                    reader.fault = reader.fault or f"nothing more within {limit:.0f} s of {'processor' if counted else 'real'} time"
                    reader.late = True
                    break
                if not selector.select(min(left, 1.0)):
                    continue
                data = child.stdout.read1(65536)  # type: ignore[attr-defined]
                if not data:
                    break
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    text = line.rstrip(b"\r").decode(errors="replace")
                    log.append(text)
                    reader.line(text)
    if pending:
        log.append(pending.decode(errors="replace"))
    return "\n".join(log)


def extract(scratch: Path, offset: int, size: int, into: Path) -> None:
    into.parent.mkdir(parents=True, exist_ok=True)
    with open(scratch, "rb") as source, open(into, "wb") as target:
        source.seek(offset)
        left = size
        while left:
            piece = source.read(min(left, MEBIBYTE))
            if not piece:
                raise Problem(f"{scratch}: ends before byte {offset + size}, where an image brought out should end.", Exit.ERROR)
            target.write(piece)
            left -= len(piece)
