"""scripts/bench --compare: whether the results of two files differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import ensemble, page, paths, report
from .problems import Exit, Problem

# Of a job's member `firstlight`: what two results of one row must share, or else name as the difference.
CONTEXT = ("platform", "machine", "boot", "mode", "vm_guest", "wait", "io", "latency", "driver")


def load(path: Path) -> list[dict]:
    try:
        jobs = json.loads(path.read_text())["jobs"]
        for job in jobs:
            runs_of(job), row_of(job)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Problem(f"--compare {path}: a file that scripts/bench --json wrote was expected ({type(error).__name__}: {error}).", Exit.USAGE) from error
    return jobs


def runs_of(job: Mapping) -> list[float]:
    """IOPS of each run."""
    return list(job["firstlight"].get("runs_iops") or [report.iops(job)])


def row_of(job: Mapping) -> tuple[str, str, str]:
    """What names a row in both files: the disk, whose driver it is, and the workload."""
    extra = job["firstlight"]
    linux = f"Linux {extra.get('setting', '')} ".replace("  ", " ") if extra["driver"].startswith("linux-") else ""
    return linux + extra["disk"], report.title(job), job["job options"].get("numjobs", "1")


def differences(before: Mapping, after: Mapping) -> dict[str, tuple[str, str]]:
    """In what two results of one row differ besides their figures, by name."""
    pairs: dict[str, tuple] = {name: (before["firstlight"].get(name), after["firstlight"].get(name)) for name in CONTEXT}
    for group in ("versions", "host_side"):
        both = (before["firstlight"].get(group) or {}, after["firstlight"].get(group) or {})
        pairs |= {f"{name}": (both[0].get(name), both[1].get(name)) for name in {**both[0], **both[1]}}
    pairs["number_ios"] = (before["job options"].get("number_ios"), after["job options"].get("number_ios"))
    return {name: (str(one), str(other)) for name, (one, other) in pairs.items() if one != other}


def compare(first: Path, second: Path, seed: int, html: Path | None = None, command: str = "") -> str:
    """The table, with what differs between the files above it. `html`: where the same is drawn."""
    before, after = ({row_of(job): job for job in load(path)} for path in (first, second))
    shared = [row for row in before if row in after]
    if not shared:
        raise Problem(f"--compare: {first} and {second} have no disk and workload in common.", Exit.USAGE)
    unequal: dict[str, set[tuple[str, str]]] = {}
    for row in shared:
        for name, pair in differences(before[row], after[row]).items():
            unequal.setdefault(name, set()).add(pair)
    if len(unequal) > 1:
        listing = "; ".join(f"{name} ({', '.join(f'{one} and {other}' for one, other in sorted(pairs))})" for name, pairs in sorted(unequal.items()))
        raise Problem(f"--compare: one difference between the files was expected, these were found: {listing}. A change of the figures could not be assigned to one of them.", Exit.USAGE)
    changes = ensemble.compare([ensemble.Row(" ".join(row[:2]), runs_of(before[row]), runs_of(after[row])) for row in shared], seed)
    what = next((f"{name}: {', '.join(f'{one} and {other}' for one, other in sorted(pairs))}" for name, pairs in unequal.items()), "nothing: both are of one kernel, host and machine")
    if html:
        pairs = [(before[row], after[row]) for row in shared]
        hashes = {f"{which}, {path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for which, path in (("first", first), ("second", second))}
        paths.write_whole(html, page.render_change(what, shared, pairs, changes, command, seed, hashes))
    lines = [f"what differs: {what}", *left_out(before, after, first, second), "", table(changes, before, after, shared)]
    return "\n".join(lines)


def left_out(before: Mapping, after: Mapping, first: Path, second: Path) -> list[str]:
    return [
        f"only in {path}: {', '.join(' '.join(row[:2]) for row in mine if row not in other)}"
        for path, mine, other in ((first, before, after), (second, after, before))
        if any(row not in other for row in mine)
    ]


def table(changes: Sequence[ensemble.Change], before: Mapping, after: Mapping, rows: Sequence[tuple]) -> str:
    cells = [
        [row[0], row[1], str(len(runs_of(before[row]))), f"{change.before:.0f}", str(len(runs_of(after[row]))), f"{change.after:.0f}", f"{change.after / change.before:.3f}", f"{change.p:.3f}", change.text]
        for row, change in zip(rows, changes)
    ]
    heads = ("disk", "workload", "runs", "first", "runs", "second", "ratio", "p", "verdict")
    return report.table(heads, cells, 2, (0, 1), report.terminal())
