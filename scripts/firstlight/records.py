"""The kernel's records and verdict, as docs/INTERFACES.md defines them."""

from __future__ import annotations

import dataclasses
import enum
import json

from .problems import Exit

MARK = "@{"
HOST = "@@host "  # a line of the test host's own
PHASE = HOST + '{"phase":'  # its counts between two marks


class Verdict(enum.Enum):
    SUCCESS = "SUCCESS"
    SKIP = "SKIP"
    ERROR = "ERROR"
    FAILURE = "FAILURE"
    CRASH = "CRASH"

    @property
    def exit(self) -> Exit:
        return Exit[self.name]


# What QEMU's isa-debug-exit makes of the values the kernel writes: (value << 1) | 1.
STATUS = {33: Verdict.SUCCESS, 35: Verdict.SKIP, 37: Verdict.ERROR, 39: Verdict.FAILURE, 41: Verdict.CRASH}


@dataclasses.dataclass
class Log:
    """A boot's output, taken apart."""

    records: list[dict]
    text: list[str]  # the lines for people
    malformed: list[str]
    phases: list[dict] = dataclasses.field(default_factory=list)

    def of(self, kind: str) -> list[dict]:
        return [record for record in self.records if record["record"] == kind]


def parse_line(line: str) -> dict | None:
    """The record on this line; None for a line for people; ValueError for a line that only looks like a record."""
    if not line.startswith(MARK):
        return None
    record = json.loads(line[1:])
    if not isinstance(record.get("record"), str):
        raise ValueError("no member named record")
    return record


def parse_phase(line: str) -> dict | None:
    """The counts of a phase on this line; None for any other line; ValueError for one that only looks like it."""
    if not line.startswith(PHASE):
        return None
    phase = json.loads(line[line.index("{") :])
    counts = phase.get("counters")
    numbers = [phase["phase"], *([phase["exits"]] if "exits" in phase else []), *(counts.values() if isinstance(counts, dict) else [None])]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a phase whose counts are no numbers")
    return phase


def parse(output: str) -> Log:
    """A `result` gets what the host counted in its phase as `exits`, where the host can tell.

    Phases and results are in step: phase N ends before result N and after result N - 1. Anything else is malformed.
    """
    log = Log([], [], [])
    for line in output.splitlines():
        try:
            record, phase = parse_line(line), parse_phase(line)
            if phase:
                if phase["phase"] != len(log.phases) + 1:
                    raise ValueError("a phase out of turn")
                log.phases.append(phase)
            elif record and record["record"] == "result" and log.phases:
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


def judge(log: Log, status: int | None, timed_out: bool) -> Judgement:
    """The verdict, strictly: it must be said once, be the last record, and QEMU's exit status must agree."""
    if timed_out:
        return Judgement(Verdict.CRASH, "no verdict before the time-out")
    said = log.of("verdict")
    by_status = STATUS.get(status) if status is not None else None
    if log.malformed:
        return Judgement(Verdict.CRASH, f"malformed record: {log.malformed[0][:160]}")
    if not said:
        return Judgement(Verdict.CRASH, f"no verdict record; QEMU's exit status was {status}")
    if len(said) > 1:
        return Judgement(Verdict.CRASH, f"{len(said)} verdict records, expected one")
    if log.records[-1] is not said[0]:
        return Judgement(Verdict.CRASH, f"record {log.records[-1]['record']} after the verdict")
    try:
        verdict = Verdict(said[0].get("verdict"))
    except ValueError:
        return Judgement(Verdict.CRASH, f"unknown verdict {said[0].get('verdict')!r}")
    # 0 is a machine that was powered off because it had no debug exit port.
    if by_status is not verdict and status != 0:
        return Judgement(Verdict.CRASH, f"the record says {verdict.value}, QEMU's exit status {status} does not agree")
    return Judgement(verdict, str(said[0].get("reason", "")))
