"""The tables of VM tests, test/vm/*.toml: read strictly, run in groups, judged strictly."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import queue
import re
import struct
import threading
import time
import tomllib
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import lab, launch, paths, process, qcow2, verify_image
from .actions import Action
from .machine import DiskSpec, Machine
from .nested import Pause
from .problems import Problem
from .records import Log, Verdict

TABLES = paths.REPOSITORY / "test" / "vm"
START_CASES = 24  # per start of the lab: their files are in its memory
AT_ONCE = 4  # starts of the lab side by side, maximum
IDLE_SECONDS = 20  # a machine that is paused for as long does not need a processor most of the time
START_MEBIBYTES = 2304  # per start: 2 GiB for the machine, and QEMU itself
SPARE_MEBIBYTES = 3072  # for compilers and everything else
HERE_PARTS = 4  # of the boots without the lab; several, so that all workers end at about the same time
LAB_STARTS = 3  # maximum, for the tests that a failed lab did not reach


@dataclasses.dataclass(frozen=True)
class Bound:
    """A condition on a number in every record that `where` selects; at least one such record must exist.

    The number is a `field`, or with `per_io` a total of a result record divided by its `count`. `below` names another
    field of the same record. Counts only: times on this machine are not tested.
    """

    record: str
    where: dict = dataclasses.field(default_factory=dict)
    field: str = ""
    per_io: str = ""
    min: float | None = None
    max: float | None = None
    below: str = ""

    def __post_init__(self) -> None:
        if bool(self.field) == bool(self.per_io):
            raise Problem("a bound has either field or per_io.")
        if self.min is None and self.max is None and not self.below:
            raise Problem("a bound has min, max or below.")

    def complaints(self, log: Log) -> list[str]:
        chosen = [record for record in log.of(self.record) if all(record.get(key) == value for key, value in self.where.items())]
        if not chosen:
            return [f"no {self.record} record with {self.where}"]
        name = self.field or f"{self.per_io} per I/O"
        found = []
        for record in chosen:
            value = record.get(self.field or self.per_io)
            if not number(value) or (self.per_io and not record.get("count")):
                found.append(f"{self.record} {self.where}: {name} is {value!r}, a number was expected")
                continue
            value = value / record["count"] if self.per_io else value
            if self.min is not None and value < self.min:
                found.append(f"{self.record} {self.where}: {name} is {value:g}, at least {self.min:g} expected")
            if self.max is not None and value > self.max:
                found.append(f"{self.record} {self.where}: {name} is {value:g}, at most {self.max:g} expected")
            if self.below and not (number(record.get(self.below)) and value < record[self.below]):
                found.append(f"{self.record} {self.where}: {name} is {value:g}, less than {self.below} ({record.get(self.below)!r}) expected")
        return found


def number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
    cmdline_more: int = 0  # adds one word of so many letters
    map: str = ""  # a file beside the table
    disks: list[str] | None = None
    nets: list[str] = dataclasses.field(default_factory=list)  # network cards: machine.NetSpec
    expect: str = "SUCCESS"
    output: list[str] = dataclasses.field(default_factory=list)
    never: list[str] = dataclasses.field(default_factory=list)
    bounds: list[Bound] = dataclasses.field(default_factory=list)
    recovers: bool = False  # a device is reset during a workload: coroutines are started then, which allocates
    check_images: bool = False  # bring the images out and check the stamps here
    intact: list[str] = dataclasses.field(default_factory=list)  # with check_images: only these disks; the others may contain anything
    acknowledged: list[str] = dataclasses.field(default_factory=list)  # with intact: disks that failed, and contain every write that they acknowledged
    durable: list[str] = dataclasses.field(default_factory=list)  # disks whose image holds, when QEMU was killed, all blocks that `verify` had written and flushed
    timeout: float = 30.0
    groups: list[str] = dataclasses.field(default_factory=lambda: ["fast"])
    required: bool = True
    deterministic: bool = False  # time by instructions instead of real time; three times as slow in the lab
    linux: str = ""  # a script beside the table: the lab's Linux runs it in place of our kernel, and prints the verdict
    # Files on the ESP in addition to or instead of its own: path to contents, one character per byte; a path that ends in / is a directory.
    esp: dict[str, str] = dataclasses.field(default_factory=dict)
    exit_port: bool = True  # false: QEMU has no debug exit device: the machine must end in another way
    restarts: bool = False  # a reset restarts the machine
    plain: bool = False  # QEMU's own defaults, as a newcomer calls it: no machine, processor, memory or debug exit device is given
    status: int | None = None  # required exit status of QEMU, if it ends
    host: list[str] = dataclasses.field(default_factory=list)  # further arguments of the test host, or of QEMU
    io: str = ""  # hyperv: machine.IOS, who reads and writes the VMBus disks
    latency: str = ""  # hyperv, with io: what such a disk takes for a request
    blkback: list[str] = dataclasses.field(default_factory=list)  # xen-pvh, xen-hvm: parameters of the module xen-blkback
    xen_version: str = ""  # xen-pvh, xen-hvm: of the Xen lab; empty: the distribution's own
    xl: list[str] = dataclasses.field(default_factory=list)  # xen-pvh, xen-hvm: further lines of the guest's configuration
    pause: list[Pause] = dataclasses.field(default_factory=list)  # in the table: one {after=, delay=, seconds=} or a list; each waits for the previous one
    actions: list[Action] = dataclasses.field(default_factory=list)  # in the table: [{after=, delay=, qmp=[{execute=, arguments=}]}], {after=, kill=true}, or for a guest of the real Xen {after=, dom0="xl …"}; in order
    dom0: list[str] = dataclasses.field(default_factory=list)  # xen-pvh, xen-hvm: commands of dom0's shell beside the guest (Machine.dom0); `output` and `never` see what they print, as lines "dom0: …"
    about: str = ""

    def to_machine(self, work: Path) -> Machine:
        machine = Machine(
            self.name, self.platform, self.machine, self.boot, self.cpus, self.memory, self.cmdline + (" " + "x" * self.cmdline_more if self.cmdline_more else ""),
            TABLES / self.map if self.map else None, self.disks, counted=self.deterministic, timeout=self.timeout,
            linux=(TABLES / self.linux).read_text() if self.linux else "", extra=self.host, io=self.io, latency=self.latency,
            esp=self.esp, pauses=self.pause, blkback=self.blkback, xen_version=self.xen_version, xl=self.xl,
            exit_port=self.exit_port, restarts=self.restarts, plain=self.plain, actions=self.actions, nets=self.nets, dom0=self.dom0,
        )  # fmt: skip
        if self.check_images or self.durable:
            for disk, name in zip(machine.specs, machine.disk_names()):
                wanted = name in self.durable or (self.check_images and (not self.intact or name in self.intact or name in self.acknowledged))
                disk.bring_out = work / f"{self.name}-{name}.img" if wanted else None
        return machine


def load(folder: Path = TABLES) -> list[Case]:
    cases = [case for path in sorted(folder.glob("*.toml")) for case in load_table(path)]
    names = [case.name for case in cases]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise Problem(f"{folder}: these names occur twice: {' '.join(doubles)}.")
    for case in cases:
        machine = case.to_machine(Path("/"))  # a row with an invalid machine is reported before anything runs
        if case.durable and (not set(case.durable) <= set(machine.disk_names()) or not any(action.kill for action in case.actions) or case.expect != "NO_VERDICT"):
            raise Problem(f"{folder}: test {case.name!r}: durable names disks of a machine that is killed, and whose verdict is NO_VERDICT.")
        named = case.intact + case.acknowledged
        if not set(named) <= set(machine.disk_names()) or set(case.intact) & set(case.acknowledged) or (case.acknowledged and not case.intact):
            raise Problem(f"{folder}: test {case.name!r}: intact and acknowledged name {named}, the disks are {machine.disk_names()}.")
    return cases


def load_table(path: Path) -> list[Case]:
    """Each row is one case; the table's [defaults] apply to all rows that do not override them."""
    try:
        table = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise Problem(f"{path}: {error}") from None
    known = {field.name: field for field in dataclasses.fields(Case)}
    others = sorted(set(table) - {"defaults", "test"})
    if others:
        raise Problem(f"{path}: {others} is neither [defaults] nor [[test]].")
    cases: list[Case] = []
    for row in itertools.chain.from_iterable(variants(path, {**table.get("defaults", {}), **row}) for row in table.get("test", [])):
        name = row.get("name", "(no name)")
        unknown = sorted(set(row) - set(known))
        if unknown or not re.fullmatch(r"[a-z0-9-]+", name):
            raise Problem(f"{path}: test {name!r}: unknown {unknown}, or a name that is not made of a-z, 0-9 and '-'.")
        if row.get("expect", "SUCCESS") not in Verdict.__members__:
            raise Problem(f"{path}: test {name!r}: expect is one of {', '.join(Verdict.__members__)}.")
        if row.get("map") and not (path.parent / row["map"]).is_file():
            raise Problem(f"{path}: test {name!r}: no map file {row['map']} beside the table.")
        if row.get("linux") and not (path.parent / row["linux"]).is_file():
            raise Problem(f"{path}: test {name!r}: no script {row['linux']} beside the table.")
        for pattern in [*row.get("output", []), *row.get("never", [])]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise Problem(f"{path}: test {name!r}: {pattern!r}: {error}.") from None
        try:
            row["bounds"] = [Bound(**bound) for bound in row.get("bounds", [])]
        except (TypeError, Problem) as error:
            raise Problem(f"{path}: test {name!r}: bounds: {error}") from None
        pauses = row.get("pause", [])
        try:
            row["pause"] = [Pause(**pause) for pause in (pauses if isinstance(pauses, list) else [pauses])]
        except (TypeError, Problem) as error:
            raise Problem(f"{path}: test {name!r}: pause: {error}") from None
        try:
            row["actions"] = [Action(**action) for action in row.get("actions", [])]
        except (TypeError, Problem) as error:
            raise Problem(f"{path}: test {name!r}: actions: {error}") from None
        cases.append(Case(**row))
    return cases


APPENDED = ("host", "output", "never", "bounds", "blkback", "xl")  # lists of a row that an axis of its matrix extends


def variants(path: Path, row: dict) -> Iterable[dict]:
    """A row with a `matrix` is a row for each chosen combination, with the values' names behind its own; another row is itself.

    `matrix` has axes, an axis has values, and a value has keys of a row: words of `cmdline` and the lists APPENDED are added to the row's own, any other key
    is set. Every pair of values of two axes is in one of the combinations (every value, if there is one axis).
    """
    axes = row.pop("matrix", {})
    name = row.get("name", "(no name)")
    if not isinstance(axes, dict) or not all(isinstance(axis, dict) and axis and all(isinstance(value, dict) for value in axis.values()) for axis in axes.values()):
        raise Problem(f"{path}: test {name!r}: matrix is a table of axes, each a table of values, each a table of a row's keys.")
    if not axes:
        yield row
        return
    for chosen in pairwise([list(axis) for axis in axes.values()]):
        made = {**row, "name": "-".join((name, *chosen))}
        given: dict[str, str] = {}  # the axis that set a key
        for axis, value in zip(axes, chosen):
            for key, content in axes[axis][value].items():
                if key == "cmdline":
                    made[key] = joined(made.get(key, ""), content)
                elif key in APPENDED:
                    made[key] = [*made.get(key, []), *content]
                elif key in given or key in ("name", "matrix"):
                    raise Problem(f"{path}: test {name!r}: the axis {axis} sets {key}" + (f", as {given[key]} does." if key in given else ", which no axis can."))
                else:
                    made[key], given[key] = content, axis
        yield made


def joined(words: str, more: str) -> str:
    """A command line with further words. One of a key that is there is joined to it by a comma: features=-flush and features=-msi."""
    found = words.split()
    for word in more.split():
        key, equals, value = word.partition("=")
        at = next((at for at, own in enumerate(found) if equals and own.startswith(f"{key}=")), None)
        if at is None:
            found.append(word)
        else:
            found[at] += f",{value}"
    return " ".join(found)


def pairwise(axes: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Few combinations of one value of each axis, in which every pair of values of two axes occurs; always the same ones."""
    if len(axes) < 2:
        return list(itertools.product(*axes))
    places = list(itertools.combinations(range(len(axes)), 2))
    left = {(one, a, other, b): None for one, other in places for a in axes[one] for b in axes[other]}
    found = []
    while left:
        first = next(iter(left))
        row: list[str | None] = [None] * len(axes)
        row[first[0]], row[first[2]] = first[1], first[3]
        for at, axis in enumerate(axes):
            if row[at] is None:  # the value with the most pairs that are left, among those with the values chosen so far
                row[at] = max(axis, key=lambda value: sum(
                    1 for one, other in places if at in (one, other)
                    and (one, value if one == at else row[one], other, value if other == at else row[other]) in left
                ))  # fmt: skip
        for one, other in places:
            left.pop((one, row[one], other, row[other]), None)
        found.append(tuple(value for value in row if value is not None))
    return found


@dataclasses.dataclass
class Result:
    """The result of a test of any kind."""

    name: str
    status: str  # passed, failed, skipped
    seconds: float = 0.0
    detail: str = ""
    output: str = ""
    kind: str = ""  # of a failed one: what it ended as (a Verdict's name), or the exception that prevented it
    tried: bool = True


def judge(case: Case, boot: launch.Boot) -> Result:
    complaints = []
    verdict = boot.judgement.verdict
    if verdict is Verdict.SKIP and case.expect != "SKIP":
        status = "failed" if case.required else "skipped"
        detail = f"skipped by the kernel: {boot.judgement.reason}" + (" (but it is required)" if case.required else "")
        return Result(case.name, status, boot.outcome.seconds, detail, boot.outcome.output)
    if verdict.value != case.expect:
        complaints.append(f"{boot.judgement.text}; {case.expect} was expected")
    elif case.expect == "CRASH" and not boot.log.of("verdict"):
        complaints.append("a crash without a report: the kernel must report it itself")
    if case.status is not None and case.expect != "TIMEOUT" and boot.outcome.status != case.status:
        complaints.append(f"exit status {boot.outcome.status}, expected {case.status}")
    for pattern in case.output:
        if not re.search(pattern, boot.outcome.output, re.M):
            complaints.append(f"nothing in the output matches {pattern!r}")
    for pattern in case.never:
        match = re.search(pattern, boot.outcome.output, re.M)
        if match:
            complaints.append(f"{match[0]!r} in the output matches {pattern!r}, which must not occur")
    if boot.outcome.pauses != len(case.pause):
        missed = case.pause[boot.outcome.pauses :]
        complaints.append(f"{boot.outcome.pauses} of {len(case.pause)} pauses were carried out before the verdict; too late or never: {'; '.join(map(str, missed))}")
    if boot.outcome.fault:
        complaints.append(boot.outcome.fault)
    elif boot.outcome.actions != len(case.actions):
        complaints.append(f"{boot.outcome.actions} of {len(case.actions)} actions were carried out before the verdict; too late or never: {'; '.join(map(str, case.actions[boot.outcome.actions :]))}")
    for bound in case.bounds:
        complaints += bound.complaints(boot.log)
    if case.expect == "SUCCESS":
        for record in boot.log.of("result"):
            for field in ("errors",) if case.recovers else ("allocations", "errors"):
                if record.get(field) != 0:
                    complaints.append(f"{record.get('disk')} {record.get('workload')}: {field} {record.get(field)!r}, none is allowed")
    if case.check_images and not complaints:
        complaints += check_images(boot, case.intact)
        for name in case.acknowledged:
            complaints += check_acknowledged(boot, name)
    for name in case.durable:
        complaints += check_durable(boot, name) if not complaints else []
    return Result(
        case.name, "failed" if complaints else "passed", boot.outcome.seconds, "; ".join(complaints), boot.outcome.output,
        kind=verdict.value if complaints else "", tried=verdict is not Verdict.NOT_STARTED or not complaints,
    )  # fmt: skip


def check_images(boot: launch.Boot, intact: Sequence[str] = ()) -> list[str]:
    """Checks the images against the command line, independently of the kernel's own report.

    `intact`: the disks to check; empty: all of them.
    """
    words = dict(word.partition("=")[::2] for word in boot.machine.cmdline.split())
    names = boot.machine.disk_names()
    images = dict(zip(names, (disk.bring_out for disk in boot.machine.specs)))
    chosen = names if words.get("disk", "all") == "all" else words["disk"].split(",")
    chosen = [name for name in chosen if name in (intact or chosen)]
    found = [record for record in boot.log.of("verify") if record["disk"] in chosen or not intact]
    complaints = []
    if sorted(record["disk"] for record in found) != sorted(chosen):
        complaints.append(f"verify records of {[record['disk'] for record in found]}, one each of {chosen} expected")
    for record in found:
        image = images.get(record["disk"])
        if not image or not image.is_file():
            complaints.append(f"no image of {record['disk']} was brought out")
            continue
        complaints += [f"{record['disk']}: {text}" for text in verify_image.compare(record, words, image.stat().st_size)]
        bad = verify_image.check(image, record)
        if bad:
            complaints.append(f"{record['disk']}: {len(bad)} of {record['blocks']} blocks are wrong, first: {bad[0]}")
    if not complaints:
        for name, image in images.items():
            if image and name in chosen:
                image.unlink(missing_ok=True)
    return complaints


def check_acknowledged(boot: launch.Boot, name: str) -> list[str]:
    """A disk that failed during the run: as many blocks as the kernel reports written must be in the image, whole."""
    image = dict(zip(boot.machine.disk_names(), boot.machine.specs))[name].bring_out
    found = [record for record in boot.log.of("verify") if record["disk"] == name]
    if len(found) != 1 or not image or not image.is_file():
        return [f"{name}: {len(found)} verify records and {'an' if image and image.is_file() else 'no'} image, one of each expected"]
    good = found[0]["blocks"] - len(verify_image.check(image, found[0]))
    if not 0 < found[0]["written"] <= good:
        return [f"{name}: {found[0]['written']} blocks were acknowledged, {good} are in the image"]
    image.unlink(missing_ok=True)
    return []


def check_durable(boot: launch.Boot, name: str) -> list[str]:
    """A disk whose QEMU was killed: all blocks that the kernel reports as written and flushed must be in the image, whole."""
    spec = dict(zip(boot.machine.disk_names(), boot.machine.specs))[name]
    found = re.findall(rf"\b{name}: (\d+) blocks written and flushed", boot.outcome.output)
    if len(found) != 1 or not spec.bring_out or not spec.bring_out.is_file():
        return [f"{name}: {len(found)} reports of a flush and {'an' if spec.bring_out and spec.bring_out.is_file() else 'no'} image, one of each expected"]
    words = dict(word.partition("=")[::2] for word in boot.machine.cmdline.split())
    record = {"first_lba": 0, "blocks": int(found[0]), **{key: verify_image.value(words[key]) if key in words else default for key, default in verify_image.DEFAULTS.items()}}
    if record["blocks"] * record["bs"] != spec.size:
        return [f"{name}: {found[0]} blocks of {record['bs']} bytes do not cover the {spec.size} bytes of the image"]
    raw = spec.bring_out
    if spec.content == "qcow2":
        raw = raw.with_suffix(".raw")
        try:
            raw.write_bytes(qcow2.read(spec.bring_out))
        except (ValueError, struct.error) as error:
            return [f"{name}: the image is damaged: {error}"]
    if bad := verify_image.check(raw, record):
        return [f"{name}: {len(bad)} of {record['blocks']} flushed blocks were lost, first: {bad[0]}"]
    for image in {raw, spec.bring_out}:
        image.unlink(missing_ok=True)
    return []


def wreck(name: str, error: Exception, seconds: float = 0.0) -> Result:
    """The result of a test that could not be completed: it failed, and the others continue."""
    text = str(error) if isinstance(error, Problem) else "".join(traceback.format_exception(error))
    # A Problem's message needs no prefix.
    first = str(error) if isinstance(error, Problem) else f"{type(error).__name__}: {error}"
    return Result(name, "failed", seconds, first.splitlines()[0] if first else "", text, kind=type(error).__name__, tried=False)


def judged(case: Case, boot: launch.Boot) -> Result:
    try:
        return judge(case, boot)
    except Exception as error:  # a record without a required field, an image that cannot be read
        broken = wreck(case.name, error, boot.outcome.seconds)
        broken.output = f"{boot.outcome.output}\n{broken.output}"
        return broken


@dataclasses.dataclass(frozen=True)
class Part:
    """Work for one processor, with results of its own. It may run beside other parts."""

    name: str
    run: Callable[[], Iterable[Result]]
    counted: bool = False  # in the lab's counted time: its results do not depend on the processor time it gets
    idle: bool = False  # counted, and mostly asleep: it runs beside the other counted ones
    lab: bool = False  # a start of the lab: AT_ONCE and the memory bound their number


class Boots:
    """The parts of the VM tests, run in two steps: those in counted time may begin early, beside builds and other tests.

    These run one at a time, at the lowest priority (process.lower_priority()), and beside them, also one at a time, those whose
    machines are paused most of the time. The parts in wall-clock time have bounds in real seconds: they run later, as many at once
    as there are processors, and after them the remaining counted ones. Leaving the `with` block before all results have been
    taken ends every child.
    """

    def __init__(self, parts: Iterable[Part], workers: int, labs: int = AT_ONCE, results: Iterable[Result] = ()) -> None:
        self.waiting = list(parts)
        self.workers = workers
        self.labs = threading.BoundedSemaphore(labs)
        self.lock = threading.Lock()
        self.found: queue.SimpleQueue[Result | None] = queue.SimpleQueue()  # None: a worker has ended
        self.threads: list[threading.Thread] = []
        self.ended = 0
        self.last_step = False
        for result in results:
            self.found.put(result)

    def __enter__(self) -> Boots:
        return self

    def __exit__(self, kind, error, trace) -> None:
        with self.lock:
            self.waiting.clear()
        if any(thread.is_alive() for thread in self.threads):
            process.stop_all()
        for thread in self.threads:
            thread.join()

    def begin(self) -> None:
        """Starts the parts in counted time."""
        for idle in (False, True):
            if any(part.counted and part.idle == idle for part in self.waiting):
                self.start(functools.partial(self.lower_priority, idle))

    def ready(self) -> Iterable[Result]:
        """The results so far. Never waits."""
        while True:
            try:
                result = self.found.get_nowait()
            except queue.Empty:
                return
            if result:
                yield result
            else:
                self.ended += 1

    def rest(self, more: Iterable[Part] = ()) -> Iterable[Result]:
        """All other results. `more`: further parts, which run before those without the lab."""
        with self.lock:
            last = [part for part in self.waiting if part.name.startswith("here-")]
            self.waiting = [part for part in self.waiting if part not in last] + list(more) + last
        self.last_step = True
        process.restore_priority()  # the part under way is needed now
        for _ in range(self.workers):
            self.start(self.work)
        while self.ended < len(self.threads):
            result = self.found.get()
            if result:
                yield result
            else:
                self.ended += 1
        yield from self.ready()

    def start(self, work: Callable[[], None]) -> None:
        self.threads.append(threading.Thread(target=self.to_the_end, args=(work,), name=f"boots-{len(self.threads)}"))
        self.threads[-1].start()

    def to_the_end(self, work: Callable[[], None]) -> None:
        try:
            work()
        finally:
            self.found.put(None)

    def take(self, choice: Callable[[Part], bool]) -> Part | None:
        with self.lock:
            for part in self.waiting:
                if choice(part):
                    self.waiting.remove(part)
                    return part
        return None

    def lower_priority(self, idle: bool) -> None:
        process.lower_priority()
        while not self.last_step and (part := self.take(lambda part: part.counted and part.idle == idle)):
            self.carry_out(part)

    def work(self) -> None:
        """The second step: parts in wall-clock time come first."""
        while part := self.take(lambda part: not part.counted) or self.take(lambda part: True):
            self.carry_out(part)

    def carry_out(self, part: Part) -> None:
        with self.labs if part.lab else contextlib.nullcontext():
            try:
                for result in part.run():
                    self.found.put(result)
            except Exception as error:  # the other parts go on; testing.Boots reports the cases that this part did not reach
                self.found.put(wreck(part.name, error))


def labs_at_once(available: int) -> int:
    """Number of starts of the lab that fit side by side into this many bytes of memory."""
    return max(1, min(AT_ONCE, ((available >> 20) - SPARE_MEBIBYTES) // START_MEBIBYTES))


def available_memory() -> int:
    """Bytes that programs can still allocate; enough for AT_ONCE if the system does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        found = None
    return int(found[1]) << 10 if found else (SPARE_MEBIBYTES + AT_ONCE * START_MEBIBYTES) << 20


def sleeps(case: Case) -> float:
    """Wall-clock seconds for which the machine of a case is idle: paused, or silent until its time-out."""
    return sum(pause.seconds for pause in case.pause) + (case.timeout if case.expect == "TIMEOUT" else 0)


def plan(ready: lab.Lab, cases: Sequence[Case], forced: str, report: Callable[[str], None]) -> Boots:
    """The parts of all cases. Cases for the lab share starts of it, one processor each.

    QEMU's emulated SVM may fail on OVMF at particular instructions, and at worst it ends L1: deterministic UEFI boots have
    a start of their own, whose instructions nothing else shifts.
    """
    work = paths.RUNS / "tests"
    work.mkdir(parents=True, exist_ok=True)
    here: list[Case] = []
    # the longest first
    starts: dict[str, list[Case]] = {"deterministic-idle": [], "xen-deterministic": [], "xen": [], "linux": [], "deterministic": [], "deterministic-uefi": [], "wall": []}
    reasons: set[str] = set()
    refused: list[Result] = []
    for case in cases:
        try:
            kind = case.to_machine(work).kind
            where = launch.place(kind, ready, forced)
            nested = where.nested
            if f"{case.platform}: {where.reason}" not in reasons:
                reasons.add(f"{case.platform}: {where.reason}")
                report(f"{case.platform}: {where.reason}")
        except Exception as error:
            refused.append(wreck(case.name, error))
            continue
        if not nested:
            here.append(case)
        elif kind.domain:
            starts["xen-deterministic" if case.deterministic else "xen"].append(case)
        elif case.deterministic:
            starts["deterministic-uefi" if case.boot == "uefi" else "deterministic-idle" if sleeps(case) >= IDLE_SECONDS else "deterministic"].append(case)
        else:
            starts["linux" if case.linux else "wall"].append(case)
    parts = [
        Part(
            f"lab-{start}-{first}",
            functools.partial(run_inside, ready, chosen[first : first + START_CASES], forced, report, work / f"lab-{start}-{first}"),
            counted="deterministic" in start, idle=start == "deterministic-idle", lab=True,
        )
        for start, chosen in starts.items()
        for first in range(0, len(chosen), START_CASES)
    ]  # fmt: skip
    here.sort(key=sleeps, reverse=True)  # the longest idle ones first, spread over the parts
    count = min(len(here), HERE_PARTS)
    parts += [Part(f"here-{first}", functools.partial(run_here, ready, here[first::count], forced, work)) for first in range(count)]
    return Boots(parts, min(os.cpu_count() or 1, AT_ONCE), labs_at_once(available_memory()), refused)


def run(ready: lab.Lab, cases: Sequence[Case], forced: str, report: Callable[[str], None]) -> Iterable[Result]:
    """The results of all cases, with nothing else beside them."""
    with plan(ready, cases, forced, report) as boots:
        yield from boots.rest()


def side_by_side(parts: Sequence[Callable[[], Iterable[Result]]], workers: int) -> Iterable[Result]:
    """The results of all parts as they arrive, so many parts at a time. Ending this early also ends their children."""
    found: queue.SimpleQueue[Result | Exception | None] = queue.SimpleQueue()

    def work(part: Callable[[], Iterable[Result]]) -> None:
        try:
            for result in part():
                found.put(result)
        except Exception as error:
            found.put(error)
        finally:
            found.put(None)

    with ThreadPoolExecutor(workers) as pool:
        try:
            for part in parts:
                pool.submit(work, part)
            left = len(parts)
            while left:
                item = found.get()
                if item is None:
                    left -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        except BaseException:
            process.stop_all()
            pool.shutdown(cancel_futures=True)
            raise


def run_here(ready: lab.Lab, cases: Sequence[Case], forced: str, work: Path) -> Iterable[Result]:
    for case in cases:
        begin = time.monotonic()
        try:
            (boot,) = launch.boot(ready, [case.to_machine(work)], forced=forced)
        except Exception as error:
            yield wreck(case.name, error, time.monotonic() - begin)
        else:
            yield judged(case, boot)


def run_inside(ready: lab.Lab, cases: Sequence[Case], forced: str, report: Callable[[str], None], work: Path) -> Iterable[Result]:
    """The cases of one start of the lab. Those that a failed lab did not reach are tried again; the one during which it failed, last."""
    left = list(cases)
    fault: Exception = Problem("The lab did not reach it.")
    idle = 0
    for attempt in range(LAB_STARTS):
        if not left or idle == 2:
            break
        mode = "deterministic" if left[0].deterministic else "wall-clock"
        report(f"{len(left)} in the lab, {mode} time")
        before = len(left)
        suspects = []
        try:
            machines = [case.to_machine(work) for case in left]
            for boot in launch.boot(ready, machines, wall=not left[0].deterministic, forced=forced, keep=work / str(attempt)):
                (case,) = (case for case in left if case.name == boot.machine.name)
                if boot.outcome.status is not None:
                    left.remove(case)
                    yield judged(case, boot)
                elif boot.outcome.output:
                    suspects.append(case)
                    fault = Problem(f"The lab broke down while {case.name} ran; it had printed:\n{boot.outcome.output[-4000:]}")
        except Exception as error:
            fault = error
        left.sort(key=lambda case: case in suspects)
        idle = idle + 1 if len(left) == before else 0
    for case in left:
        yield wreck(case.name, fault)
