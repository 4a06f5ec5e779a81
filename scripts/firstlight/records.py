"""The kernel's records and verdict, as docs/INTERFACES.md defines them."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import signal
from collections.abc import Callable

from .problems import Exit

MARK = "@{"
CONTINUATION = "@+"  # continues the previous line, which the console would have cut
XEN_LOG = re.compile(r"\(d\d+\) ")  # prefix of a guest's line in Xen's log
HOST = "@@host "  # a line of the test host's own
PHASE = HOST + '{"phase":'  # its counts between two marks


class Verdict(enum.Enum):
    """The result of a boot: one of the guest's five verdicts, or what happened instead."""

    SUCCESS = "SUCCESS"
    SKIP = "SKIP"
    ERROR = "ERROR"
    FAILURE = "FAILURE"
    CRASH = "CRASH"
    TIMEOUT = "TIMEOUT"
    NOT_STARTED = "NOT_STARTED"
    NO_VERDICT = "NO_VERDICT"

    @property
    def exit(self) -> Exit:
        return Exit[self.name]

    @property
    def of_guest(self) -> bool:
        return self not in INSTEAD

    @property
    def words(self) -> str:
        return INSTEAD.get(self) or f"verdict {self.value}"


INSTEAD = {
    Verdict.TIMEOUT: "time-out",
    Verdict.NOT_STARTED: "the virtual machine did not start",
    Verdict.NO_VERDICT: "no verdict",
}


# isa-debug-exit's exit status of the values that the kernel writes: (value << 1) | 1.
STATUS = {33: Verdict.SUCCESS, 35: Verdict.SKIP, 37: Verdict.ERROR, 39: Verdict.FAILURE, 41: Verdict.CRASH}
# The test host's own (ExitCode in test/host/vmm/machine.cppm).
HOST_CRASH, HOST_TIMEOUT = 70, 72
HOST_REFUSED = (64, 66, 78)  # its command line, a file, a capability that KVM lacks
# A virtual machine monitor prefixes its messages with its name.
MONITORS = ("qemu-system-x86_64: ", "qemu: ", "firstlight-testhost: ", "Unexpected error in ")
SEGMENTATION_FAULT = (-signal.SIGSEGV, 128 + signal.SIGSEGV)
ABORTED = (-signal.SIGABRT, 128 + signal.SIGABRT)  # how QEMU ends when it crashes on its own arguments


@dataclasses.dataclass
class Log:
    """A boot's output, parsed."""

    records: list[dict]
    text: list[str]  # the lines that are not records
    malformed: list[str]
    phases: list[dict] = dataclasses.field(default_factory=list)

    def of(self, kind: str) -> list[dict]:
        return [record for record in self.records if record["record"] == kind]


def parse_line(line: str) -> dict | None:
    """The record on this line; None for other lines; ValueError for an invalid record."""
    if not line.startswith(MARK):
        return None
    record = json.loads(line[1:])
    if not isinstance(record.get("record"), str):
        raise ValueError("no member named record")
    return record


def parse_phase(line: str) -> dict | None:
    """The counts of a phase on this line; None for other lines; ValueError for invalid counts."""
    if not line.startswith(PHASE):
        return None
    phase = json.loads(line[line.index("{") :])
    counts = phase.get("counters")
    numbers = [phase["phase"], *([phase["exits"]] if "exits" in phase else []), *(counts.values() if isinstance(counts, dict) else [None])]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a phase whose counts are no numbers")
    return phase


class Latencies:
    """Collects the `latencies` records that precede a `result`, and adds them to it."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, dict[int, int]]] = {}  # disk, read or write, bucket: count

    def take(self, record: dict) -> None:
        counts, bucket = record.get("counts"), record.get("bucket")
        if record.get("op") not in ("read", "write") or not isinstance(counts, list) or len(counts) % 2 == 0:
            raise ValueError("latencies without counts")
        if not all(type(number) is int and number >= 1 for number in counts) or type(bucket) is not int or bucket < 0:
            raise ValueError("latencies whose counts are no numbers")
        buckets = self.found.setdefault(record.get("disk", ""), {}).setdefault(record["op"], {})
        for distance, count in zip([0, *counts[1::2]], counts[::2]):
            bucket += distance
            if bucket in buckets:
                raise ValueError("a bucket that occurs twice")
            buckets[bucket] = count

    def give(self, result: dict) -> None:
        mine = self.found.pop(result.get("disk", ""), {})
        for op, buckets in mine.items():
            latency = result.get(op, {}).get("lat_ns", {})
            if sum(buckets.values()) != latency.get("N"):
                raise ValueError("latencies whose number is not the result's")
            latency["buckets"] = buckets


def unfold(output: str) -> list[str]:
    """The lines as written by the kernel: without Xen's prefix, and with continued lines joined."""
    lines: list[str] = []
    last = -1  # the guest's last line; Xen may print between two of its lines
    for line in output.splitlines():
        line = XEN_LOG.sub("", line, count=1) if XEN_LOG.match(line) else line
        if line.startswith(CONTINUATION) and last >= 0:
            lines[last] += line[len(CONTINUATION) :]
            continue
        if not line.startswith("(XEN) "):
            last = len(lines)
        lines.append(line)
    return lines


def parse(output: str) -> Log:
    """A `result` gets the host's counts in its phase as `exits`, if the host has them, and its latencies as `buckets`.

    Phases and results alternate: phase N ends before result N and after result N - 1. Anything else is malformed.
    """
    log = Log([], [], [])
    latencies = Latencies()
    for line in unfold(output):
        try:
            record, phase = parse_line(line), parse_phase(line)
            if phase:
                if phase["phase"] != len(log.phases) + 1:
                    raise ValueError("a phase out of turn")
                log.phases.append(phase)
            elif record and record["record"] == "latencies":
                latencies.take(record)
            elif record and record["record"] == "result":
                latencies.give(record)
            if record and record["record"] == "result" and log.phases:
                if len(log.phases) != len(log.of("result")) + 1:
                    raise ValueError("a result without a phase, or a phase without a result")
                if "exits" in log.phases[-1]:
                    record["exits"] = log.phases[-1]["exits"]
        except ValueError:
            log.malformed.append(line)
            continue
        if record is None:
            log.text.append(line)
        else:
            log.records.append(record)
    return log


@dataclasses.dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    reason: str

    @property
    def text(self) -> str:
        """Text for the user: a guest's verdict is called one, everything else has its own words."""
        return self.verdict.words + (f": {self.reason}" if self.reason else "")


def guest_ran(log: Log) -> bool:
    """Whether the output contains anything from the guest or its firmware. A monitor's error may be followed by unmarked lines of advice."""
    if log.records or log.malformed:
        return True
    advice = False
    for line in log.text:
        if line.startswith(MONITORS):
            advice = " warning: " not in line
        elif line.strip() and not advice:
            return True
    return False


def monitors_words(log: Log) -> str:
    """The virtual machine monitor's own message, in one line."""
    own = [line for line in log.text if line.startswith(MONITORS) and " warning: " not in line]
    return "; ".join(own)[:400] or last_words("\n".join(log.text))


def last_words(text: str) -> str:
    """The last lines of a program's messages, in one line."""
    return "; ".join([line.strip() for line in text.splitlines() if line.strip()][-3:])[:400]


def ended(status: int | None) -> str:
    """An exit status in words."""
    if status is None:
        return "it was ended before it had an exit status"
    number = -status if status < 0 else status - 128 if 128 < status < 160 else 0
    if number:
        name = signal.Signals(number).name if number in signal.Signals.__members__.values() else str(number)
        return f"the virtual machine monitor was ended by signal {name}"
    return f"the virtual machine monitor's exit status was {status}"


def silence(log: Log) -> str:
    return "" if log.text or log.records else "; nothing was printed at all: the guest's first serial port (COM1) must be the monitor's standard output"


def agrees(verdict: str, status: int | None) -> bool:
    """Without a debug exit port: 0 if the machine was powered off, 1 if the monitor was notified of a failure (docs/INTERFACES.md)."""
    return status == 0 or (status == 1 and verdict in (Verdict.ERROR.value, Verdict.FAILURE.value, Verdict.CRASH.value))


def judge(
    log: Log, status: int | None, timed_out: bool, limit: float | None = None, refused: str = "", foreign: Callable[[str, int | None], bool] | None = None,
    dies: bool = False,
) -> Judgement:
    """The verdict, strictly: it must be printed once, be the last record, and the exit status must agree.

    `refused`: why the virtual machine monitor did not start, if the platform knows; otherwise this is judged by its exit status
    and by whether the guest or its firmware has printed anything.
    `dies`: this machine's monitor is known to crash when it exits (Machine.dies_at_exit): a segmentation fault then agrees with every verdict.
    `foreign`: for a VMM that is neither QEMU nor the test host, whether an exit status agrees with a verdict. Debug exit ports are known on every VMM.
    """
    said = log.of("verdict")
    if refused:
        return Judgement(Verdict.NOT_STARTED, refused)
    if timed_out or (status == HOST_TIMEOUT and not foreign):
        within = f" within {limit:g} s" if limit else ""
        return Judgement(Verdict.TIMEOUT, f"verdict {said[0].get('verdict')} was given, but the machine did not end{within}" if said else
                         f"the guest gave no verdict{within}" + silence(log))  # fmt: skip
    by_status = STATUS.get(status) if status is not None else None
    complaint = ""
    if log.malformed:
        complaint = f"malformed record: {log.malformed[0][:160]}"
    elif not said:
        failed = by_status is None and status is not None and (0 < status < 128 or status in ABORTED) and status != HOST_CRASH
        if failed and not foreign and (status in HOST_REFUSED or not guest_ran(log)):
            return Judgement(Verdict.NOT_STARTED, monitors_words(log) or ended(status))
        words = monitors_words(log) if any(line.startswith(MONITORS) for line in log.text) else ""
        complaint = f"no verdict record; {ended(status)}" + (f" ({words})" if words else "")
        if status == 0:
            complaint += ", as after a power-off, a reset or a triple fault"
        complaint += silence(log)
    elif len(said) > 1:
        complaint = f"{len(said)} verdict records, expected one"
    elif log.records[-1] is not said[0]:
        complaint = f"record {log.records[-1]['record']} after the verdict"
    elif said[0].get("verdict") not in (verdict.value for verdict in STATUS.values()):
        complaint = f"unknown verdict {said[0].get('verdict')!r}"
    elif by_status is not Verdict(said[0]["verdict"]) and not (foreign or agrees)(said[0]["verdict"], status) and not (dies and status in SEGMENTATION_FAULT):
        complaint = f"the record says {said[0]['verdict']}, and {ended(status)}, which does not agree"
    else:
        return Judgement(Verdict(said[0]["verdict"]), str(said[0].get("reason", "")))
    # A guest that wrote CRASH to the debug exit port, and a test host that saw a triple fault, have reported a crash all the same.
    return Judgement(Verdict.CRASH if by_status is Verdict.CRASH or (status == HOST_CRASH and not foreign) else Verdict.NO_VERDICT, complaint)


def by_status(status: int) -> Judgement:
    """If the console was not read: the exit status alone."""
    verdict = STATUS.get(status)
    if verdict:
        return Judgement(verdict, "")
    return Judgement(Verdict.NOT_STARTED if status == 1 else Verdict.NO_VERDICT, ended(status))
