"""The kernel's records and verdict, as docs/INTERFACES.md defines them."""

from __future__ import annotations

import dataclasses
import enum
import json

from .problems import Exit

MARK = "@{"


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


def parse(output: str) -> Log:
    log = Log([], [], [])
    for line in output.splitlines():
        try:
            record = parse_line(line)
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
