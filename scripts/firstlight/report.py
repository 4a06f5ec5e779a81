"""The tables printed by scripts/bench."""

from __future__ import annotations

import shutil
import statistics
import sys
import textwrap
from collections.abc import Sequence

from . import counts, ensemble

HEADS = (
    "disk", "driver", "kind", "workload", "IOPS", "MiB/s", "mean us", "p50 us", "p99 us",
    "acc/IO", "hcall/IO", "notif/IO", "irq/IO", "alloc/IO", "exit/IO",
)  # fmt: skip


def part(job: dict) -> dict:
    """The direction with I/Os; for a mixed job, reads."""
    return job["read"] if job["read"]["total_ios"] else job["write"]


def iops(job: dict) -> float:
    return job["read"]["iops"] + job["write"]["iops"]


def percentile(latency: dict, wanted: float) -> float:
    for key, value in latency.get("percentile", {}).items():
        if abs(float(key) - wanted) < 1e-6:
            return value
    return float("nan")


def row(job: dict) -> list[str]:
    # Measured from the submission: a guest whose submission does the whole work has completion latencies near zero.
    extra, latency = job["firstlight"], part(job)["lat_ns"]
    figures = [extra.get(f"{name}_per_io") for name in ("device_accesses", "hypercalls", "notifications", "interrupts", "allocations", "exits")]
    return [
        extra["disk"], driver(job), extra["kind"], title(job), f"{iops(job):.0f}",
        f"{(job['read']['bw_bytes'] + job['write']['bw_bytes']) / (1 << 20):.1f}",
        *(f"{value / 1000:.1f}" for value in (latency["mean"], percentile(latency, 50), percentile(latency, 99))),
        *("-" if value is None else f"{value:.3f}" for value in figures),
    ]  # fmt: skip


def driver(job: dict) -> str:
    """The driver, of Linux with the setting of fio."""
    extra = job["firstlight"]
    return f"{extra['driver']} {extra['setting']}" if "setting" in extra else extra["driver"]


def best(jobs: Sequence[dict]) -> list[dict]:
    """Of each disk and workload the fastest setting; over several runs the one with the highest median."""
    found: dict[tuple[str, str], dict] = {}
    for job in jobs:
        other = found.get(key(job))
        if other is None or typical(job) > typical(other):
            found[key(job)] = job
    return list(found.values())


def typical(job: dict) -> float:
    return statistics.median(job["firstlight"].get("runs_iops") or [iops(job)])


def label(job: dict) -> str:
    options = job["job options"]
    return f"{options['name']} {options['bs']} qd{options['iodepth']}"


def title(job: dict) -> str:
    """label(), with the kernel's way to wait and the host's to serve, if they are not the defaults."""
    wait = job["firstlight"].get("wait", "interrupt")
    return label(job) + (f" {wait}" if wait != "interrupt" else "") + served(job)


def served(job: dict) -> str:
    """Who serves the disk, if not the processor's own exit (scripts/bench --io)."""
    io = job["firstlight"].get("io", "inline")
    return f" {io}" if io != "inline" else ""


def terminal() -> int | None:
    """Width of the terminal in columns; None if standard output is not a terminal, so that lines may have any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int, keys: Sequence[int] = (0,), width: int | None = None) -> str:
    """Columns as wide as necessary, the first `left` of them flush left.

    A table wider than `width` is split into several below each other, each with the columns `keys`, which identify the row.
    """
    widths = [max(len(line[column]) for line in [heads, *rows]) for column in range(len(heads))]
    parts: list[list[int]] = [[]]
    room = (width or sum(widths) + 2 * len(widths)) - sum(widths[key] + 2 for key in keys) + 2
    for column in range(len(heads)):
        if column in keys:
            continue
        if parts[-1] and sum(widths[each] + 2 for each in [*parts[-1], column]) > room:
            parts.append([])
        parts[-1].append(column)
    if len(parts) == 1:
        return part_of_table(heads, rows, range(left))
    chosen = [[*keys, *others] for others in parts]
    return "\n\n".join(
        part_of_table([heads[i] for i in part], [[line[i] for i in part] for line in rows], [at for at, i in enumerate(part) if i < left])
        for part in chosen
    )


def part_of_table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    widths = [max(len(line[column]) for line in [heads, *rows]) for column in range(len(heads))]
    lines = []
    for cells in [heads, ["-" * width for width in widths], *rows]:
        text = [cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(cells, widths))]
        lines.append("  ".join(text).rstrip())
    return "\n".join(lines)


def results(jobs: Sequence[dict]) -> str:
    return table(HEADS, [row(job) for job in jobs], 4, (0, 3), terminal())


def clock_note(jobs: Sequence[dict]) -> str:
    """The note under a table whose times are not measurements; empty for one whose times are."""
    guessed = [job for job in jobs if job["firstlight"].get("clock_assumed")]
    if not guessed:
        return ""
    which = "all rows" if len(guessed) == len(jobs) else ", ".join(job["jobname"] for job in guessed)
    return (
        f"Clock assumed ({which}): no source gave the rate of the guest's time stamp counter, and there was no timer to measure it by.\n"
        "IOPS, MiB/s and latencies are wrong by one unknown factor; counts and ratios within one boot hold."
    )


def key(job: dict) -> tuple[str, str]:
    return job["firstlight"]["disk"], label(job) + served(job)


def compared(ours: Sequence[dict], theirs: Sequence[dict], baseline: str) -> str:
    """Every disk and workload: IOPS, as a multiple of the baseline disk's and of Linux's on the same disk, and what an I/O of this kernel costs."""
    linux = {key(job): iops(job) for job in theirs}
    base = {title(job): iops(job) for job in ours if job["firstlight"]["disk"] == baseline}
    costs = ("device_accesses", "hypercalls", "notifications", "interrupts", "allocations")

    def quotient(above: float, below: float | None) -> str:
        return f"{above / below:.2f}" if below else "-"

    rows = []
    for job in ours:
        theirs_too = [f"{linux[key(job)]:.0f}" if key(job) in linux else "-", quotient(iops(job), linux.get(key(job)))] if theirs else []
        rows.append(
            [job["firstlight"]["disk"], job["firstlight"]["driver"], title(job), f"{iops(job):.0f}", *([quotient(iops(job), base.get(title(job)))] if base else []), *theirs_too,
             *(f"{job['firstlight'][f'{cost}_per_io']:.3f}" for cost in costs)]
        )  # fmt: skip
    heads = ["disk", "driver", "workload", "IOPS", *([f": {baseline}"] if base else []), *(["Linux", "ours : Linux"] if theirs else []), *HEADS[9:14]]
    return table(heads, rows, 3, (0, 2), terminal())


def costs(ours: Sequence[dict], theirs: Sequence[dict]) -> str:
    """Who executes the instructions of an I/O, and by how much this kernel would be ahead of Linux if it executed none itself."""
    linux = {key(job): job for job in theirs}
    rows = []
    for job in ours:
        cost = job["firstlight"]["instructions_per_io"]
        host = sum(cost.values()) - cost["guest"]
        cells = [job["firstlight"]["disk"], job["firstlight"]["driver"], title(job), *(f"{cost[party]:.0f}" for party in counts.PARTIES), f"{host:.0f}", f"{1e9 / iops(job):.0f}"]
        if theirs:
            cells += linux_costs(job, linux.get(key(job)))
        rows.append(cells)
    heads = ["disk", "driver", "workload", "guest", "KVM", "kernel", "VMM", "host", "time", *(["Linux guest", "host", "time", "ours : Linux", "bound"] if theirs else [])]
    about = "instructions per I/O, by who executes them; host: KVM, its kernel and the VMM; time: per I/O in nanoseconds, in which an instruction takes one, with the idle time"
    if theirs:
        about += "; Linux guest: its kernel and fio; bound: what ours : Linux would be if this kernel executed nothing and the host as much as now"
    return table(heads, rows, 3, (0, 2), terminal()) + "\n\n" + "\n".join(fitted(about))


def linux_costs(job: dict, other: dict | None) -> list[str]:
    if other is None:
        return ["-"] * 5
    cost = other["firstlight"]["instructions_per_io"]
    ours, theirs = 1e9 / iops(job), 1e9 / iops(other)
    return [f"{cost['guest']:.0f}", f"{sum(cost.values()) - cost['guest']:.0f}", f"{theirs:.0f}", f"{theirs / ours:.2f}", f"{theirs / (ours - job['firstlight']['instructions_per_io']['guest']):.2f}"]


def by_depth(ours: Sequence[dict], theirs: Sequence[dict]) -> str:
    """For each pattern and block size the IOPS of every disk by queue depth, Linux's beside them."""
    rates: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for who, jobs in (("", ours), ("Linux ", theirs)):
        for job in jobs:
            options = job["job options"]
            depths = rates.setdefault((options["name"], options["bs"]), {})
            wait = job["firstlight"].get("wait", "interrupt")
            column = who + job["firstlight"]["disk"] + (f" {wait}" if wait != "interrupt" else "") + served(job)
            depths.setdefault(int(options["iodepth"]), {})[column] = iops(job)
    parts = []
    for (name, bs), depths in rates.items():
        disks = dict.fromkeys(disk for found in depths.values() for disk in found if not disk.startswith("Linux "))
        linux = {column for found in depths.values() for column in found if column.startswith("Linux ")}
        columns = [column for disk in disks for column in (disk, f"Linux {disk}") if column == disk or column in linux]
        rows = [[str(depth), *(f"{found[column]:.0f}" if column in found else "-" for column in columns)] for depth, found in sorted(depths.items())]
        parts.append(f"{name} {bs}: IOPS by queue depth\n\n" + table(["qd", *columns], rows, 0, width=terminal()))
    return "\n\n".join(parts)


def by_wait(jobs: Sequence[dict]) -> str:
    """For each disk and workload the kernel's ways to wait, below each other: what each is worth, and what it costs."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for job in jobs:
        groups.setdefault(key(job), []).append(job)
    rows = []
    for job in (job for group in groups.values() for job in group):
        extra, latency = job["firstlight"], part(job)["lat_ns"]
        counts = [extra.get(f"{name}_per_io") for name in ("device_accesses", "notifications", "interrupts", "exits", "sleeps")]
        rows.append(
            [extra["disk"], extra["driver"], label(job), extra["wait"], f"{iops(job):.0f}", *(f"{value / 1000:.1f}" for value in (latency["mean"], percentile(latency, 99))),
             *("-" if value is None else f"{value:.3f}" for value in counts), f"{extra['busy_ns_per_io'] / 1000:.1f}", f"{extra['busy_share'] * 100:.0f} %"]
        )  # fmt: skip
    heads = ("disk", "driver", "workload", "wait", "IOPS", "mean us", "p99 us", "acc/IO", "notif/IO", "irq/IO", "exit/IO", "halt/IO", "busy us/IO", "busy")
    return table(heads, rows, 4, (0, 2, 3), terminal())


def by_io(ours: Sequence[dict], theirs: Sequence[dict]) -> str:
    """For each of the test host's disks and each workload who serves it, below each other: what that is worth to this kernel and to Linux."""
    linux = {key(job): job for job in theirs}
    groups: dict[tuple[str, str], list[dict]] = {}
    for job in ours:
        if "io" in job["firstlight"]:
            wait = job["firstlight"]["wait"]
            groups.setdefault((job["firstlight"]["disk"], label(job) + (f" {wait}" if wait != "interrupt" else "")), []).append(job)
    rows = []
    for (disk, name), jobs in groups.items():
        for job in jobs:
            extra, latency = job["firstlight"], part(job)["lat_ns"]
            counts = [extra.get(f"{what}_per_io") for what in ("notifications", "interrupts", "exits", "sleeps")]
            other = linux.get(key(job))
            cells = [f"{iops(other):.0f}", f"{part(other)['lat_ns']['mean'] / 1000:.1f}", f"{iops(job) / iops(other):.2f}" if iops(other) else "-"] if other else ["-"] * 3
            rows.append(
                [disk, extra["driver"], name, extra["io"], f"{iops(job):.0f}", *(f"{value / 1000:.1f}" for value in (latency["mean"], percentile(latency, 50), percentile(latency, 99))),
                 *("-" if value is None else f"{value:.3f}" for value in counts), *(cells if theirs else [])]
            )  # fmt: skip
    heads = ("disk", "driver", "workload", "io", "IOPS", "mean us", "p50 us", "p99 us", "notif/IO", "irq/IO", "exit/IO", "halt/IO", *(("Linux", "mean us", "ours : Linux") if theirs else ()))
    return table(heads, rows, 4, (0, 2, 3), terminal())


def host_side(jobs: Sequence[dict]) -> str:
    """The line about how QEMU serves its disks; the same for all of a comparison's except for the I/O threads. Empty if none is QEMU's."""
    found = {job["firstlight"]["disk"]: job["firstlight"]["host_side"] for job in jobs if "host_side" in job["firstlight"]}
    if not found:
        return ""
    first = next(iter(found.values()))
    threads = [disk for disk, how in found.items() if how["iothread"]]
    return f"QEMU's disks ({', '.join(found)}): aio={first['aio']}, cache={first['cache']}, I/O threads: {', '.join(threads) or 'none'}"


def ratios(ours: Sequence[dict], theirs: Sequence[dict] = ()) -> str:
    """Synthetic against emulated, and ours against Linux on the same disk, workload by workload."""
    rates: dict[str, dict[str, float]] = {}
    for job in ours:
        rates.setdefault(title(job), {})[job["firstlight"]["kind"]] = iops(job)
    for job in theirs:
        same = dict.fromkeys(title(own) for own in ours if label(own) + served(own) == label(job) + served(job))
        for name in same or (label(job) + served(job),):
            rates.setdefault(name, {})["linux " + job["firstlight"]["kind"]] = iops(job)

    def quotient(found: dict[str, float], above: str, below: str) -> str:
        return f"{found[above] / found[below]:.2f}" if found.get(above) and found.get(below) else "-"

    pairs = [("synthetic", "emulated", "synthetic : emulated")]
    if theirs:
        pairs += [("synthetic", "linux synthetic", "ours : Linux, synthetic"), ("emulated", "linux emulated", "ours : Linux, emulated")]
    rows = [
        [name, *(f"{found[kind]:.0f}" if found.get(kind) else "-" for kind in ("synthetic", "emulated")),
         *(quotient(found, above, below) for above, below, _ in pairs)]
        for name, found in rates.items()
    ]  # fmt: skip
    useful = [row for row in rows if any(cell != "-" for cell in row[3:])]
    return table(("workload", "synthetic", "emulated", *(head for _, _, head in pairs)), useful, 1, width=terminal()) if useful else ""


def median_run(runs: Sequence[Sequence[dict]]) -> list[dict]:
    """For each job the run with the median IOPS (the lower one of two), with the IOPS of all its runs."""
    seen: dict[str, list[dict]] = {}
    for jobs in runs:
        for job in jobs:
            seen.setdefault(f"{job['firstlight']['disk']} {job['jobname']}", []).append(job)
    chosen = []
    for jobs in seen.values():
        job = sorted(jobs, key=iops)[(len(jobs) - 1) // 2]
        chosen.append({**job, "firstlight": {**job["firstlight"], "runs_iops": [round(iops(each), 1) for each in jobs]}})
    return chosen


def spread(jobs: Sequence[dict], seed: int) -> str:
    """For jobs from median_run(): the median of their runs, a 95 % interval for it, their range, and how much the figure depends on the start."""
    rows, notes = [], []
    for job in jobs:
        values = sorted(job["firstlight"]["runs_iops"])
        median = statistics.median(values)
        if median <= 0:
            continue
        sensitivity = ensemble.sensitivity(values)
        sensitive = sensitivity > ensemble.SENSITIVE
        rows.append([
            job["jobname"], str(len(values)), f"{median:.0f}", ensemble.interval(values, seed).text(), f"{values[0]:.0f}", f"{values[-1]:.0f}", f"{100 * sensitivity:.1f} %{' *' if sensitive else ''}",
        ])  # fmt: skip
        parts = ensemble.modes(values)
        if sensitive and len(parts) > 1:
            notes.append(f"{job['jobname']}: " + ", ".join(f"{statistics.median(part):.0f} in {len(part)} of {len(values)} runs" for part in parts))
    if not rows:
        return ""
    text = table(("job", "runs", "median IOPS", "95 % interval", "lowest", "highest", "sensitivity"), rows, 1, width=terminal())
    about = "sensitivity: from the 10th to the 90th percentile of the runs, in per cent of the median"
    if any(row[-1].endswith("*") for row in rows):
        about += f"; * more than {100 * ensemble.SENSITIVE:.0f} %: a single run is a draw, compare intervals"
    return "\n".join([text, "", *(line for note in (about, *notes) for line in fitted(note))])


def fitted(note: str) -> list[str]:
    return textwrap.wrap(note, terminal() or 10_000)
