"""scripts/bench --html: the results as one page that needs no network, in the reader's light or dark colours, and prints.

The page is drawn from the jobs of --json alone: HTML with SVG, whose horizontal positions are per cent, so that it fits any width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import counts, ensemble, paths, report

TEMPLATE = Path(__file__).parent / "page.html.j2"
RATIO_TICKS = (0.1, 0.2, 0.25, 0.5, 1, 2, 4, 8, 16, 32)
COLOURS = 8  # of lines, --line0 and so on in the template
PARTIES = {"guest": "guest", "kvm": "KVM", "kernel": "host's kernel", "vmm": "VMM"}  # counts.PARTIES as the page names them
FEWEST_DEPTHS = 3  # of a pattern and block size, for a curve by queue depth


@dataclasses.dataclass(frozen=True)
class Axis:
    """Logarithmic, from `low` to `high`; positions in per cent."""

    low: float
    high: float

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(100 * min(1.0, max(0.0, share)), 2)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """One IOPS figure over another, with its interval."""

    above: str
    below: str
    workload: str
    series: str  # "emulated": over the emulated disk; "linux": over Linux on the same disk
    value: float
    interval: ensemble.Interval
    runs: int
    why: str = ""  # from the counts of both rows

    @property
    def text(self) -> str:
        return times(self.value) + (f" ({self.interval.low:.2f} to {self.interval.high:.2f})" if self.runs > 1 else "")


def times(value: float) -> str:
    return f"{value:.1f}×" if value >= 3 else f"{value:.2f}×"


def runs_of(job: Mapping) -> list[float]:
    return list(job["firstlight"].get("runs_iops") or [report.iops(job)])


def of_linux(job: Mapping) -> bool:
    return job["firstlight"]["driver"].startswith("linux-")


def ratio(above: dict, below: dict, series: str, seed: int) -> Ratio:
    mine, other = runs_of(above), runs_of(below)
    value = statistics.median(mine) / statistics.median(other)
    interval = ensemble.ratio_interval(mine, other, seed) if min(len(mine), len(other)) > 1 else ensemble.Interval(value, value)
    below_name = f"Linux ({report.driver(below).removeprefix('linux-')})" if of_linux(below) else below["firstlight"]["disk"]
    return Ratio(above["firstlight"]["disk"], below_name, report.title(above), series, value, interval, min(len(mine), len(other)), why(above, below))


NAMED = {"device_accesses": "accesses to device registers", "hypercalls": "hypercalls", "notifications": "notifications", "interrupts": "interrupts", "exits": "exits"}


def why(above: dict, below: dict) -> str:
    """What the counts of an I/O say about the ratio: instructions by party if both rows have them, and the counts that differ by a tenth and more."""
    mine, other = above["firstlight"], below["firstlight"]
    said = []
    costs = [extra.get("instructions_per_io") for extra in (mine, other)]
    if all(costs):
        wholes = [sum(cost[party] for party in counts.PARTIES) for cost in costs]
        wins = report.typical(above) >= report.typical(below)
        party = (min if wholes[0] <= wholes[1] else max)(counts.PARTIES, key=lambda name: costs[0][name] - costs[1][name])
        said.append(f"{wholes[0]:.0f} instructions against {wholes[1]:.0f}, of them {PARTIES[party]} {costs[0][party]:.0f} against {costs[1][party]:.0f}")
        if (wholes[0] <= wholes[1]) != wins:
            said[0] += ", which does not explain it: the rest of the time is idle or overlapped"
    for name, words in NAMED.items():
        pair = [extra.get(f"{name}_per_io") for extra in (mine, other)]
        if None not in pair and abs(pair[0] - pair[1]) > 0.1 * max(pair):
            said.append(f"{pair[0]:.3f} {words} against {pair[1]:.3f}")
    return "; ".join(said)


def cost_bars(jobs: Sequence[dict]) -> list[dict]:
    """Where an I/O goes: of each workload the instructions by who executes them, a bar for each disk and kernel, all on one scale."""
    groups: dict[str, list[dict]] = {}
    for job in jobs:
        if job["firstlight"].get("instructions_per_io"):
            groups.setdefault(report.title(job), []).append(job)
    found = []
    for name, members in groups.items():
        costs = [[job["firstlight"]["instructions_per_io"][party] for party in counts.PARTIES] for job in members]
        most = max(sum(cost) for cost in costs) or 1
        bars = []
        for job, cost in zip(members, costs):
            segments = [
                {"party": party, "x": round(100 * sum(cost[:at]) / most, 2), "width": round(100 * cost[at] / most, 2), "text": f"{PARTIES[party]} {cost[at]:.0f}"}
                for at, party in enumerate(counts.PARTIES)
            ]
            bars.append({"disk": who_of(job), "kind": job["firstlight"]["kind"], "driver": report.driver(job), "whole": f"{sum(cost):.0f}", "segments": segments})
        found.append({"name": name, "bars": bars})
    return found


def heat_rows(jobs: Sequence[dict]) -> list[dict]:
    """The runs of each row that depends on the start, as cells: how far each is from the row's median."""
    found = []
    for job in jobs:
        values = runs_of(job)
        if len(values) < 2 or statistics.median(values) <= 0 or ensemble.sensitivity(values) <= ensemble.SENSITIVE:
            continue
        offs = [value / statistics.median(values) - 1 for value in values]
        most = max(map(abs, offs)) or 1
        cells = [
            {"x": round(100 * at / len(values), 2), "width": round(95 / len(values), 2), "kind": "win" if off >= 0 else "loss", "strength": round(0.1 + 0.9 * abs(off) / most, 2), "text": f"run {at + 1}: {values[at]:.0f} IOPS, {100 * off:+.1f} %"}
            for at, off in enumerate(offs)
        ]
        found.append({"disk": who_of(job), "workload": report.title(job), "cells": cells, "most": f"{100 * most:.1f} %"})
    return found


def who_of(job: Mapping) -> str:
    return ("Linux " if of_linux(job) else "") + job["firstlight"]["disk"]


def ratios(ours: Sequence[dict], theirs: Sequence[dict], seed: int) -> list[Ratio]:
    """Each synthetic disk over the emulated IDE disk, or over the only emulated one, and each disk over Linux on it."""
    linux = {report.key(job): job for job in theirs}
    emulated = [disk for disk in dict.fromkeys(job["firstlight"]["disk"] for job in ours if job["firstlight"]["kind"] == "emulated")]
    base = "hda" if "hda" in emulated else emulated[0] if len(emulated) == 1 else ""
    under = {report.title(job): job for job in ours if job["firstlight"]["disk"] == base}
    found = []
    for job in ours:
        if not report.iops(job):
            continue
        other = under.get(report.title(job))
        if other and job["firstlight"]["kind"] == "synthetic" and report.iops(other):
            found.append(ratio(job, other, "emulated", seed))
        other = linux.get(report.key(job))
        if other and report.iops(other):
            found.append(ratio(job, other, "linux", seed))
    return found


def axis_of(values: Sequence[float]) -> tuple[Axis, list[dict]]:
    """An axis around 1 that holds all values, and its ticks."""
    low = max((tick for tick in RATIO_TICKS if tick <= min([*values, 0.9])), default=min(values))
    high = min((tick for tick in RATIO_TICKS if tick >= max([*values, 1.1])), default=max(values))
    axis = Axis(low, high)
    return axis, [{"x": axis.at(tick), "text": f"{tick:g}×"} for tick in RATIO_TICKS if low <= tick <= high]


def ratio_rows(found: Sequence[Ratio]) -> dict:
    if not found:
        return {}
    axis, ticks = axis_of([bound for one in found for bound in (one.interval.low, one.interval.high, one.value)])
    rows: dict[tuple[str, str], list[dict]] = {}
    for one in found:
        rows.setdefault((one.above, one.workload), []).append(
            {"series": one.series, "x": axis.at(one.value), "low": axis.at(one.interval.low), "high": axis.at(one.interval.high), "text": one.text, "below": one.below, "loses": one.value < 1}
        )
    return {"ticks": ticks, "one": axis.at(1), "rows": [{"disk": disk, "workload": workload, "points": points} for (disk, workload), points in rows.items()]}


def sentences(found: Sequence[Ratio]) -> list[list[dict]]:
    """What the page says first: for each disk its ratios to the emulated one, and for all disks those to Linux. A loss is marked like a win."""
    said = []
    for disk in dict.fromkeys(one.above for one in found if one.series == "emulated"):
        mine = [one for one in found if one.above == disk and one.series == "emulated"]
        said.append([{"text": f"The synthetic disk {disk} does ", "kind": ""}, *parts(mine), {"text": f" the I/Os per second of the emulated {mine[0].below}.", "kind": ""}, *reasons(mine)])
    linux = [one for one in found if one.series == "linux"]
    if linux:
        worst, best = min(linux, key=lambda one: one.value), max(linux, key=lambda one: one.value)
        said.append([
            {"text": "Against Linux with fio on the same disk of the same machine: from ", "kind": ""}, part(worst), {"text": f" ({worst.above}) to ", "kind": ""}, part(best),
            {"text": f" ({best.above}); {sum(one.value > 1 for one in linux)} of {len(linux)} rows are ahead.", "kind": ""}, *reasons(linux),
        ])  # fmt: skip
    return said


def reasons(found: Sequence[Ratio]) -> list[dict]:
    """Why, for the largest and for the smallest ratio."""
    ends = dict.fromkeys((max(found, key=lambda one: one.value), min(found, key=lambda one: one.value)))
    return [
        piece for one in ends if one.why
        for piece in ({"text": " An I/O of ", "kind": ""}, {"text": f"{one.workload} ({times(one.value)})", "kind": part(one)["kind"]}, {"text": f" takes {one.why}.", "kind": ""})
    ]  # fmt: skip


def part(one: Ratio) -> dict:
    return {"text": f"{one.text} at {one.workload}", "kind": "win" if one.value >= 1 else "loss"}


def parts(found: Sequence[Ratio]) -> list[dict]:
    return [piece for number, one in enumerate(found) for piece in (*([{"text": ", ", "kind": ""}] if number else []), part(one))]


def strips(jobs: Sequence[dict], seed: int) -> list[dict]:
    """All runs of each row, on an axis of its own around the median."""
    rows = []
    for job in jobs:
        values = runs_of(job)
        if len(values) < 2 or statistics.median(values) <= 0:
            continue
        median, interval = statistics.median(values), ensemble.interval(values, seed)
        reach = max(0.1, 1.1 * max(abs(value / median - 1) for value in values))
        at = lambda value, median=median, reach=reach: round(50 + 50 * (value / median - 1) / reach, 2)  # noqa: E731
        sensitivity = ensemble.sensitivity(values)
        rows.append({
            "disk": job["firstlight"]["disk"], "who": report.driver(job), "workload": report.title(job), "median": f"{median:.0f}", "reach": f"±{100 * reach:.0f} %",
            "dots": [at(value) for value in values], "low": at(interval.low), "high": at(interval.high), "interval": interval.text(),
            "sensitivity": f"{100 * sensitivity:.1f} %", "sensitive": sensitivity > ensemble.SENSITIVE,
            "modes": [f"{statistics.median(mode):.0f} in {len(mode)} of {len(values)}" for mode in ensemble.modes(values)] if sensitivity > ensemble.SENSITIVE else [],
        })  # fmt: skip
    return rows


def depth_curves(jobs: Sequence[dict]) -> list[dict]:
    """Throughput against latency, a point for each queue depth. In units of the chart's box, 600 by 240."""
    groups: dict[str, dict[str, list[dict]]] = {}
    for job in jobs:
        words = job["job options"]
        who = who_of(job)
        groups.setdefault(f"{words['name']} {words['bs']}", {}).setdefault(who, []).append(job)
    found = []
    for name, lines in groups.items():
        lines = {who: sorted(members, key=lambda job: int(job["job options"]["iodepth"])) for who, members in lines.items() if len(members) >= FEWEST_DEPTHS}
        if not lines:
            continue
        points = {
            who: [(report.iops(job), report.part(job)["lat_ns"]["mean"] / 1000, job["job options"]["iodepth"]) for job in members] for who, members in lines.items()
        }
        most = max(iops for line in points.values() for iops, _, _ in line)
        latencies = [latency for line in points.values() for _, latency, _ in line]
        axis = Axis(min(latencies) * 0.9, max(latencies) * 1.1)
        drawn = [
            {"who": who, "linux": who.startswith("Linux"), "points": [{"x": round(600 * iops / most, 1), "y": round(240 - 2.4 * axis.at(latency), 1), "text": f"{who}, qd {depth}: {iops:.0f} IOPS, {latency:.1f} µs"} for iops, latency, depth in line]}
            for who, line in points.items()
        ]
        found.append({"name": name, "lines": drawn, "most": f"{most:.0f}", "low": f"{axis.low:.0f}", "high": f"{axis.high:.0f}"})
    return found


def percentile_curves(jobs: Sequence[dict]) -> list[dict]:
    """Latency against the percentile, on an axis of nines as HdrHistogram's plotter has it. Box of 600 by 240."""
    groups: dict[str, list[dict]] = {}
    for job in jobs:
        if report.part(job)["lat_ns"].get("percentile"):
            groups.setdefault(report.title(job), []).append(job)
    found = []
    for name, members in groups.items():
        lines = {}
        for job in members:
            who = who_of(job)
            lines[who] = [(float(share), ns / 1000) for share, ns in report.part(job)["lat_ns"]["percentile"].items() if 0 < float(share) < 99.995 and ns > 0]
        values = [us for line in lines.values() for _, us in line]
        if not values:
            continue
        axis = Axis(min(values) * 0.95, max(values) * 1.05)
        drawn = [
            {"who": who, "linux": who.startswith("Linux"), "points": [{"x": round(150 * -math.log10(1 - share / 100), 1), "y": round(240 - 2.4 * axis.at(us), 1), "text": f"{who}, {share:g} %: {us:.1f} µs"} for share, us in line]}
            for who, line in lines.items()
        ]
        found.append({"name": name, "lines": drawn, "low": f"{axis.low:.0f}", "high": f"{axis.high:.0f}"})
    return found


FIGURES = {"device_accesses": "accesses", "hypercalls": "hypercalls", "notifications": "notif.", "interrupts": "interrupts", "allocations": "alloc.", "exits": "exits"}


def table_rows(jobs: Sequence[dict]) -> list[dict]:
    return [
        {
            "disk": job["firstlight"]["disk"], "driver": report.driver(job), "kind": job["firstlight"]["kind"], "workload": report.title(job), "linux": of_linux(job),
            "iops": f"{statistics.median(runs_of(job)):.0f}", "p50": microseconds(job, 50), "p99": microseconds(job, 99),
            "counts": ["–" if job["firstlight"].get(f"{name}_per_io") is None else f"{job['firstlight'][f'{name}_per_io']:.3f}" for name in FIGURES],
        }
        for job in jobs
    ]  # fmt: skip


def microseconds(job: dict, share: float) -> str:
    value = report.percentile(report.part(job)["lat_ns"], share)
    return "–" if math.isnan(value) else f"{value / 1000:.1f}"


def section(name: str, jobs: Sequence[dict], seed: int) -> dict:
    """One comparison."""
    ours, theirs = [job for job in jobs if not of_linux(job)], report.best([job for job in jobs if of_linux(job)])
    found = ratios(ours, theirs, seed)
    first = jobs[0]["firstlight"]
    return {"name": name, "sentences": sentences(found), "ratios": ratio_rows(found), "versions": first.get("versions", {}), "note": report.clock_note(ours), "changes": [], **plots([*ours, *theirs], seed)}


def plots(jobs: Sequence[dict], seed: int) -> dict:
    """What both pages have of their rows."""
    return {
        "mode": jobs[0]["firstlight"].get("mode", ""), "rows": table_rows(jobs), "costs": cost_bars(jobs), "heat": heat_rows(jobs), "strips": strips(jobs, seed), "depths": depth_curves(jobs),
        "percentiles": percentile_curves(jobs), "runs": max(len(runs_of(job)) for job in jobs), "host_side": report.host_side(jobs),
    }  # fmt: skip


def change_rows(rows: Sequence[Sequence[str]], changes: Sequence[ensemble.Change]) -> dict:
    """The second file over the first, row by row."""
    axis, ticks = axis_of([bound for one in changes for bound in (one.ratio.low, one.ratio.high, one.after / one.before)])
    drawn = []
    for row, one in zip(rows, changes):
        value = one.after / one.before
        text = f"{times(value)} ({one.ratio.low:.3f} to {one.ratio.high:.3f}), p {one.p:.3f}"
        drawn.append({"disk": row[0], "workload": row[1], "points": [{"series": "emulated", "x": axis.at(value), "low": axis.at(one.ratio.low), "high": axis.at(one.ratio.high), "text": text, "below": "the first file", "loses": one.verdict == "slower"}]})
    return {"ticks": ticks, "one": axis.at(1), "rows": drawn}


def named(job: dict, which: str) -> dict:
    return {**job, "firstlight": {**job["firstlight"], "disk": f"{job['firstlight']['disk']} ({which})"}}


def render_change(what: str, rows: Sequence[Sequence[str]], pairs: Sequence[tuple[dict, dict]], changes: Sequence[ensemble.Change], command: str, seed: int, hashes: Mapping[str, str]) -> str:
    """The page of --compare: `pairs` are the same row of both files."""
    told = {"faster": [], "slower": [], "same": [], "unknown": []}
    for row, one in zip(rows, changes):
        told[one.verdict].append(f"{row[0]} {row[1]}: {one.text}")
    kinds = {"faster": "win", "slower": "loss"}
    sentence = [{"text": f"What differs: {what}. Of {len(changes)} rows {', '.join(f'{len(found)} {word}' for word, found in zip(('faster', 'slower', 'the same', 'that cannot be told'), told.values()))}. ", "kind": ""}]
    sentence += [{"text": f"{text}. ", "kind": kinds.get(verdict, "")} for verdict, found in told.items() for text in found]
    jobs = [named(job, which) for pair in pairs for job, which in zip(pair, ("first", "second"))]
    versions = {f"{name} ({which})": version for job, which in zip(pairs[0], ("first", "second")) for name, version in job["firstlight"].get("versions", {}).items()}
    verdicts = [{"disk": row[0], "workload": row[1], "before": f"{one.before:.0f}", "after": f"{one.after:.0f}", "text": one.text, "kind": kinds.get(one.verdict, "")} for row, one in zip(rows, changes)]
    only = {"name": "The second file against the first", "sentences": [sentence], "ratios": change_rows(rows, changes), "versions": versions, "note": "", "changes": verdicts, **plots(jobs, seed)}
    return filled("What has changed", [only], command, seed, hashes)


def render(jobs: Sequence[dict], command: str, seed: int, hashes: Mapping[str, str] | None = None) -> str:
    platforms = dict.fromkeys(job["firstlight"]["platform"] for job in jobs)
    sections = [section(name, [job for job in jobs if job["firstlight"]["platform"] == name], seed) for name in platforms]
    return filled("What a synthetic disk is worth", sections, command, seed, hashes or {})


def filled(title: str, sections: Sequence[dict], command: str, seed: int, hashes: Mapping[str, str]) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text()).render(
        title=title, sections=sections, command=command, seed=seed, date=time.strftime("%Y-%m-%d"), figures=list(FIGURES.values()), hashes=hashes, parties=PARTIES, colours=COLOURS
    )


def sha256(files: Sequence[Path]) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def write(path: Path, jobs: Sequence[dict], command: str, seed: int, images: Sequence[Path] = ()) -> None:
    paths.write_whole(path, render(jobs, command, seed, sha256(images)))
