"""Tests the output of scripts/bench with programs that read fio's output: fio's own tool and fio-plot, unchanged."""

from __future__ import annotations

import csv
import fractions
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import counts, fiojson, lab, paths, process, report, yardstick
from .problems import Exit, Problem
from .vmtests import Result, wreck

SUITE = "fio"
# The fastest disk, and Linux with fio on it: both kinds of results, several queue depths.
BENCH = ("--no-build", "--only", "hyperv/sda-randread-4k-*", "--only", "hyperv/sda-read-128k-*", "--yardstick")
BENCH_JOBS = 3 * (1 + len(yardstick.SETTINGS))
BENCH_SECONDS = 900
# Two disks of one machine with Linux beside them, by depth.
SWEEP = (
    "--no-build", "--only", "all", "--disk", "virtio,nvme", "--workload", "randread,count=64", "--sweep", "qd=1..2", "--iothread", "--yardstick",
)  # fmt: skip
CONVERTER = "fio_jsonplus_clat2csv"
FIO_PLOT = "fio-plot==1.1.21"
FIO_PLOT_SECONDS = 300
# Written by fio and not here: not measured here, or part of a latency log, which is not requested here.
# Some of it exists only in newer versions of fio.
LEFT_OUT = {
    "job_start", "eta", "sync", "ctx", "majf", "minf", "iodepth_level", "iodepth_submit", "iodepth_complete", "disk_util", "steadystate",
    "latency_depth", "latency_target", "latency_target_ns", "latency_percentile", "latency_window", "latency_window_us",
}  # fmt: skip
OPTIONS = {"rw", "iodepth", "numjobs", "bs"}  # options of a job that fio-plot reads


def checks() -> Iterable[Result]:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="firstlight-fio-") as temporary:
        work = Path(temporary)
        try:
            process.run(
                [sys.executable, paths.PACKAGE, "bench", *BENCH, "--json", work / "out.json", "--json-dir", work / "jobs"],
                timeout=BENCH_SECONDS, what="scripts/bench --json",
            )  # fmt: skip
            jobs = json.loads((work / "out.json").read_text())["jobs"]
            fault = "" if len(jobs) == BENCH_JOBS else f"{len(jobs)} jobs, {BENCH_JOBS} expected"
        except Exception as error:
            yield wreck(f"{SUITE}/bench", error, time.monotonic() - begin)
            return
        yield Result(f"{SUITE}/bench", "failed" if fault else "passed", time.monotonic() - begin, fault)
        for name, check in (("shape", shape), ("converter", converter), ("one-job-a-file", files), ("plot", plot)):
            yield attempt(f"{SUITE}/{name}", lambda: check(work, jobs))
        yield attempt(f"{SUITE}/sweep", lambda: sweep(work))


def sweep(work: Path) -> str:
    """A comparison of several disks: its tables and its JSON, with counted instructions where QEMU can count them."""
    counted = counts.possible(lab.find())
    words = [*SWEEP, *(["--cost"] if counted else [])]
    said = process.run([sys.executable, paths.PACKAGE, "bench", *words, "--json", work / "sweep.json"], timeout=BENCH_SECONDS, what="scripts/bench --sweep").stdout
    jobs = json.loads((work / "sweep.json").read_text())["jobs"]
    return sweep_fault(said, jobs) or (cost_fault(said, jobs) if counted else "")


def cost_fault(said: str, jobs: Sequence[dict]) -> str:
    """An instruction takes a nanosecond, so the counts of an I/O are its time; Linux's begin and end with those of fio."""
    for job in jobs:
        cost, time_per_io = job["firstlight"]["instructions_per_io"], 1e9 / report.iops(job)
        low, high = (0.9, 1.02) if not job["firstlight"]["driver"].startswith("linux-") else (0.9, 3)
        if not low <= sum(cost.values()) / time_per_io <= high:
            return f"{job['jobname']}: {cost} of {time_per_io:.0f} ns"
    of = {(job["firstlight"]["disk"], job["firstlight"]["driver"].startswith("linux-"), job["job options"]["iodepth"]): job["firstlight"]["instructions_per_io"] for job in jobs}
    for (disk, linux, depth), cost in of.items():
        if linux and not cost["guest"] > 2 * of[disk, False, depth]["guest"]:
            return f"{disk} qd{depth}: Linux and fio execute {cost['guest']} instructions as the guest, and this kernel {of[disk, False, depth]['guest']}: at least twice as many were expected"
    return "" if re.search(r"^disk +driver +workload +guest +KVM +kernel +VMM +host +time ", said, re.M) else "the output has no table of costs"


def sweep_fault(said: str, jobs: Sequence[dict]) -> str:
    settings = [setting.name for setting in yardstick.SETTINGS]
    expected = {
        (disk, driver, setting, depth, disk == "vda")
        for disk, name in (("vda", "virtio_blk"), ("nvme0n1", "nvme")) for driver, setting in ((name, ""), *((f"linux-{name}", setting) for setting in settings)) for depth in ("1", "2")
    }  # fmt: skip
    own = [job["firstlight"] for job in jobs]
    found = {(extra["disk"], extra["driver"], extra.get("setting", ""), job["job options"]["iodepth"], extra["host_side"]["iothread"]) for job, extra in zip(jobs, own)}
    if found != expected or len(jobs) != len(expected):
        return f"{len(jobs)} jobs of {sorted(found)}, expected were {sorted(expected)}"
    if slow := [job["jobname"] for job in jobs if not job["read"]["iops"]]:
        return f"no I/O in {', '.join(slow)}"
    if any(extra["allocations_per_io"] for extra in own if not extra["driver"].startswith("linux-")):
        return "the kernel allocated memory for I/Os"
    for line in (r"QEMU's disks \(vda, nvme0n1\): aio=threads, cache=writeback, I/O threads: vda", r"qd +vda +Linux vda +nvme0n1 +Linux nvme0n1", r" 2( +\d+){4}", r"nvme0n1 +nvme +randread 4k qd2 +\d.*"):
        if not re.search(rf"^{line}$", said, re.M):
            return f"the output has no line {line}"
    return ""


def attempt(name: str, check: Callable[[], str]) -> Result:
    """A check returns the faults; a Problem with SKIP says why there was nothing to check."""
    begin = time.monotonic()
    try:
        fault = check()
    except Problem as problem:
        if problem.code is Exit.SKIP:
            return Result(name, "skipped", time.monotonic() - begin, str(problem))
        return wreck(name, problem, time.monotonic() - begin)
    except Exception as error:
        return wreck(name, error, time.monotonic() - begin)
    return Result(name, "failed" if fault else "passed", time.monotonic() - begin, fault)


def demand(program: str) -> str:
    found = shutil.which(program)
    if not found:
        raise Problem(f"{program}: not found, so nothing was tried. scripts/setup installs it.", Exit.MISSING)
    return found


def shape(work: Path, jobs: Sequence[dict]) -> str:
    """Compares each member with the output of the installed fio."""
    process.run(
        [demand("fio"), "--output-format=json+", f"--output={work / 'fio.out'}", "--ioengine=null", "--lat_percentiles=1", "--clat_percentiles=1",
         "--name=x", "--rw=randrw", "--bs=4k", "--size=4m", "--numjobs=1", "--iodepth=1"],
        timeout=60, cwd=work, what="fio",
    )  # fmt: skip
    theirs = json.loads((work / "fio.out").read_text())
    ours = json.loads((work / "out.json").read_text())
    faults = compare("", {**theirs, "jobs": []}, {**ours, "jobs": []})
    for job in jobs:
        if not job["firstlight"]["driver"].startswith("linux-"):
            faults += compare(f"{job['jobname']}: ", theirs["jobs"][0], job)
    return "; ".join(faults)


def compare(where: str, theirs: dict, ours: dict) -> list[str]:
    """Every member of fio's exists and has fio's type, and there is none that fio does not have."""
    faults = [f"{where}{name} is missing" for name in theirs if name not in ours and name not in LEFT_OUT]
    faults += [f"{where}{name} is not fio's" for name in ours if name not in theirs and name != "firstlight"]
    for name in theirs.keys() & ours.keys() - {"global options", "job options", "percentile", "bins"}:
        if type(theirs[name]) is not type(ours[name]):
            faults.append(f"{where}{name} is {ours[name]!r}, of fio's type {type(theirs[name]).__name__} expected")
        elif isinstance(theirs[name], dict):
            # A direction without I/Os has neither percentiles nor bins, in fio and here.
            idle = "N" in ours[name] and not ours[name]["N"]
            expected = {key: value for key, value in theirs[name].items() if key not in ("percentile", "bins")} if idle else theirs[name]
            faults += compare(f"{where}{name}.", expected, ours[name])
    return faults


def converter(work: Path, jobs: Sequence[dict]) -> str:
    """fio_jsonplus_clat2csv: its conversion of the bins, read back; and its own check."""
    tool = demand(CONVERTER)
    for words in ((), ("--validate",)):
        said = process.run([sys.executable, tool, work / "out.json", work / "out.csv", *words], timeout=60, what=CONVERTER).stdout
        word = "validated" if words else "generated"
        if said.count(word) != len(jobs):
            return f"{said.count(word)} of {len(jobs)} jobs {word}: {process.tail(said, 3)}"
    for number, job in enumerate(jobs):
        with open(work / f"out_job{number}.csv", newline="") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
        for name in ("read", "write"):
            found = [(int(row["nsec"]), int(row[f"{name}_lat_ns_count"])) for row in rows if row[f"{name}_lat_ns_count"].strip()]
            fault = distribution(found, job[name])
            if fault:
                return f"{job['jobname']}, {name}: {fault}"
    return ""


def at_rank(found: Sequence[tuple[int, int]], rank: int) -> int:
    """The middle of the bin with the I/O of this rank, from 1."""
    seen, middle = 0, 0
    for middle, count in found:
        seen += count
        if seen >= rank:
            break
    return middle


def distribution(found: Sequence[tuple[int, int]], part: dict) -> str:
    """Faults in the bins of a direction, compared with its other figures."""
    latency = part["lat_ns"]
    total = sum(count for _, count in found)
    if total != part["total_ios"] or total != latency["N"]:
        return f"{total} I/Os in the bins, {part['total_ios']} in all, N is {latency['N']}"
    if not total:
        return ""
    # A bin is 1/64 wide: its middle differs from a counted value by at most half of that.
    mean = sum(middle * count for middle, count in found) / total
    if abs(mean - latency["mean"]) > latency["mean"] / 64 + 1:
        return f"the mean of the bins is {mean:.0f} ns, of the I/Os {latency['mean']:.0f} ns"
    if not all(latency["min"] * 63 / 64 - 1 <= middle <= latency["max"] * 65 / 64 + 1 for middle, _ in found):
        return f"bins from {found[0][0]} to {found[-1][0]} ns, I/Os from {latency['min']} to {latency['max']} ns"
    for key, value in latency["percentile"].items():
        rank = total * fractions.Fraction(key) / 100
        # Where the rank is a whole number the next I/O is as good: fio compares with 99.95 in binary, which is more.
        ranks = {math.ceil(rank), min(math.floor(rank) + 1, total)}
        middles = [at_rank(found, each) for each in sorted(ranks)]
        if not any(abs(middle - value) <= value / 50 + 1 for middle in middles):
            return f"percentile {key} is {middles[0]} ns by the bins and {value} ns by the record"
    return ""


def files(work: Path, jobs: Sequence[dict]) -> str:
    """fio-plot's assumptions: one job per file, found by its options, with all the members that it reads."""
    found = sorted((work / "jobs").rglob("*.json"))
    if [path for path in found] != sorted(work / "jobs" / fiojson.place(job) for job in jobs):
        return f"the files are {[str(path.relative_to(work)) for path in found]}"
    for path in found:
        document = json.loads(path.read_text())
        if len(document["jobs"]) != 1 or len({"fio version", "global options", "jobs"} & document.keys()) < 2:
            return f"{path.name}: {len(document['jobs'])} jobs, of the members {', '.join(document)}"
        (job,) = document["jobs"]
        options = job["job options"]
        if not options.keys() >= OPTIONS or not all(int(options[name]) > 0 for name in ("iodepth", "numjobs")):
            return f"{path.name}: job options {options}"
        part = job["write" if options["rw"].endswith("write") else "read"]
        figures = [part["bw"], part["iops"], part["iops_stddev"], part["lat_ns"]["mean"], part["lat_ns"]["stddev"], job["usr_cpu"], job["sys_cpu"]]
        if not all(isinstance(figure, (int, float)) for figure in figures) or not part["iops"] or not part["lat_ns"]["mean"]:
            return f"{path.name}: {figures}"
        shares = [list(job[f"latency_{unit}"].values()) for unit in ("ns", "us", "ms")]
        if [len(each) for each in shares] != [10, 10, 12] or abs(sum(map(sum, shares)) - 100) > 0.5:
            return f"{path.name}: the classes of latencies hold {sum(map(sum, shares)):.2f} % of the I/Os"
    return ""


def plot(work: Path, jobs: Sequence[dict]) -> str:
    """fio-plot from PyPI draws each kind of chart that it makes from JSON."""
    tool = fio_plot()
    folders = sorted({str((work / "jobs" / fiojson.place(job)).parent) for job in jobs if job["job options"]["bs"] == "4k"})
    if len(folders) != 1 + len(yardstick.SETTINGS):
        return f"{len(folders)} folders with 4k, {1 + len(yardstick.SETTINGS)} expected"
    common = ["-T", "test", "-r", "randread"]
    for name, words in (
        ("bars", ["-i", folders[0], "-l", "-d", "1", "32", "-n", "1", "--show-cpu"]),
        ("jobs", ["-i", folders[0], "-N", "-d", "32", "-n", "1"]),
        ("3d", ["-i", folders[0], "-L", "-t", "iops", "-n", "1", "-d", "1", "32"]),
        ("histogram", ["-i", folders[0], "-H", "-d", "32", "-n", "1"]),
        ("other", ["-i", folders[-1], "-l", "-d", "1", "32", "-n", "1"]),
        ("compared", ["-i", *folders, "-C", "-d", "32", "-n", "1"]),
    ):
        picture = work / f"{name}.png"
        done = process.run([tool, *words, *common, "-o", picture], timeout=120, check=False, cwd=work, what="fio-plot")
        if done.returncode or not picture.is_file() or picture.read_bytes()[:8] != b"\x89PNG\r\n\x1a\n":
            return f"fio-plot {' '.join(words)}: exit status {done.returncode}: {process.tail(done.stdout, 3)}"
    return ""


def fio_plot() -> Path:
    """fio-plot in a virtual environment in the cache; if it cannot be installed, a Problem with the reason, and the test is skipped."""
    folder = paths.cache() / FIO_PLOT.replace("==", "-")
    tool = folder / "bin" / "fio-plot"
    ready = folder / "ready"  # written last: an interrupted installation is repeated
    with process.alone(paths.cache() / "fio-plot.lock", "fio-plot"):
        if not ready.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            for python in dict.fromkeys((shutil.which("python3") or sys.executable, sys.executable)):
                made = process.run([python, "-m", "venv", folder], timeout=60, check=False, what="python3 -m venv")
                if made.returncode == 0:
                    break
            else:
                raise Problem(f"fio-plot: no environment for it can be made here: {process.tail(made.stdout, 1)}", Exit.SKIP)
            try:
                process.run(
                    [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1", FIO_PLOT],
                    timeout=FIO_PLOT_SECONDS, what="pip install fio-plot", stderr=subprocess.STDOUT,
                )  # fmt: skip
            except Problem as problem:
                raise Problem(f"fio-plot: it could not be installed from PyPI: {problem}", Exit.SKIP) from None
            if not tool.is_file():
                raise Problem(f"fio-plot: {FIO_PLOT} was installed and has left no {tool}.")
            ready.write_text("")
    return tool
