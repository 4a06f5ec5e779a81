"""scripts/bench: what the synthetic disk is worth against the emulated one, in one machine, in one boot."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from . import build, fiojson, lab, launch, nested, paths, records, report, setup, workloads, yardstick
from .machine import DiskSpec, Machine
from .problems import EXIT_HELP, Exit, Problem
from .records import Verdict
from .workloads import Workload

DISK_BYTES = 64 << 20
# Written once before anything is measured: a page that tmpfs has never seen costs more than one it has.
DISK_CONTENT = "pattern"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure the Xen ring and IDE in one virtual machine. By default every instruction of guest, "
        "hypervisor and VMM counts as one nanosecond, so that the figures do not depend on this machine.",
        epilog=EXIT_HELP,
    )
    parser.add_argument("--wall", action="store_true", help="wall-clock time instead: noisy")
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="repeat, and show how far the runs lie apart")
    parser.add_argument("--list", action="store_true", help="list the jobs")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="only jobs whose name matches (a glob, or a part of it)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as fio would, last run")
    parser.add_argument("--yardstick", action="store_true", help="measure Linux with fio in the same machine, too")
    parser.add_argument("--lab", choices=("auto", "always", "never"), default="auto", help="whether the machine runs nested")
    parser.add_argument("--boot", choices=("pvh", "uefi"), default="pvh")
    parser.add_argument("--cmdline", default="", help="more words for the kernel's command line")
    parser.add_argument("--no-build", action="store_true", help="measure what was built before")
    return parser


def main(words: list[str]) -> Exit:
    options = arguments().parse_args(words)
    disks, chosen = workloads.choose(options.only)
    if not chosen:
        raise Problem(f"No job matches {' '.join(options.only)}. scripts/bench --list shows them.", Exit.USAGE)
    if options.runs < 1:
        raise Problem(f"--runs {options.runs}: at least 1.", Exit.USAGE)
    if options.list:
        print("\n".join(workloads.name(disk, workload) for disk in disks for workload in chosen))
        return Exit.SUCCESS
    if options.json and not options.json.parent.is_dir():
        raise Problem(f"--json {options.json}: the folder does not exist.", Exit.USAGE)
    begin = time.monotonic()
    setup.ensure()
    ready = lab.find()
    if not options.no_build:
        build.kernel()
    first = first_block(ready)
    machine = main_machine(disks, chosen, options)
    where = launch.place(machine.kind, ready, options.lab)
    mode = "wall" if options.wall or not where.nested else "deterministic"
    launch.warn(f"xen-emu: {where.reason}; {mode} time")
    runs: list[list[dict]] = []
    for number in range(options.runs):
        launch.warn(f"run {number + 1} of {options.runs}")
        runs.append(measure(ready, machine, mode, options))
    jobs = runs[-1]
    print(f"\nplatform xen-emu, boot {machine.boot}, {mode} time\n")
    print(report.results(jobs))
    compared = report.ratios(jobs)
    if compared:
        print("\n" + compared)
    if options.yardstick:
        theirs = linux(ready, machine, disks, chosen, options)
        print("\nLinux with fio, same machine and mode\n\n" + report.results(theirs))
        jobs = jobs + theirs
    if options.runs > 1:
        print("\n" + report.spread(runs))
    print(f"\nentry to first completed block read (QEMU, IDE, PVH, 1 ns per instruction): {first / 1e6:.3f} ms")
    print(f"image: {paths.KERNEL.name} {paths.KERNEL.stat().st_size} bytes, {paths.EFI.name} {paths.EFI.stat().st_size} bytes")
    print(f"finished in {time.monotonic() - begin:.0f} s")
    if options.json:
        fiojson.write(options.json, jobs)
    return Exit.SUCCESS


def main_machine(disks: list[str], chosen: list[Workload], options) -> Machine:
    words = ["job=bench", "emulated=keep", f"disk={','.join(disks)}"]
    if any(workload.writes for workload in chosen):
        words.append(f"scratch={','.join(disks)}")
    words += [workload.word for workload in chosen]
    if options.cmdline:
        words.append(options.cmdline)
    return Machine(
        "bench", "xen-emu", boot=options.boot, cmdline=" ".join(words),
        disks=[DiskSpec("xen", DISK_BYTES, content=DISK_CONTENT), DiskSpec("ide", DISK_BYTES, content=DISK_CONTENT)],
        timeout=60,
    )  # fmt: skip


def progress(total: int):
    """Tells on stderr what has been measured, as the records arrive."""
    begin = time.monotonic()
    done = 0

    def live(name: str, line: str) -> None:
        nonlocal done
        try:
            record = records.parse_line(line)
        except ValueError:
            return
        if record and record["record"] == "result":
            done += 1
            rate = fiojson.total_ios(record) / (record["runtime_ns"] / 1e9) if record["runtime_ns"] else 0
            launch.warn(
                f"  [{done}/{total}] {time.monotonic() - begin:5.1f} s  {record['disk']} {record['workload']} "
                f"{record['bs'] // 1024}k qd{record['qd']}: {rate:.0f} IOPS"
            )
        elif record and record["record"] in ("boot", "disk", "error"):
            launch.warn(f"  {time.monotonic() - begin:11.1f} s  " + describe(record))
        elif line.startswith("yardstick ") and not line.endswith("end"):
            done += 1
            launch.warn(f"  [{done}/{total}] {time.monotonic() - begin:5.1f} s  {line}")

    return live


def describe(record: dict) -> str:
    if record["record"] == "boot":
        return f"booted by {record.get('entry')}, vm_guest {record.get('vm_guest')}"
    if record["record"] == "disk":
        return f"disk {record.get('name')}: {record.get('driver')}, {record.get('kind')}"
    return f"error: {record.get('message')}"


def measure(ready: lab.Lab, machine: Machine, mode: str, options) -> list[dict]:
    expected = [(disk, workload) for disk in disk_names(machine) for workload in expected_workloads(machine)]
    (boot,) = launch.boot(
        ready, [machine], wall=options.wall, forced=options.lab, live=progress(len(expected)), keep=paths.RUNS / "bench"
    )
    demand(boot)
    found = boot.log.of("result")
    if len(found) != len(expected):
        raise Problem(f"{len(found)} results, {len(expected)} expected. The log is in build/runs/bench/serial.log.", Exit.FAILURE)
    failed = [record for record in found if record["errors"]]
    if failed:
        raise Problem(f"{failed[0]['disk']} {failed[0]['workload']}: {failed[0]['errors']} failed I/Os.", Exit.FAILURE)
    start = (boot.log.of("boot") or [{}])[0]
    context = {"platform": machine.platform, "boot": machine.boot, "vm_guest": start.get("vm_guest", ""), "mode": mode}
    return [fiojson.job(record, context) for record in found]


def disk_names(machine: Machine) -> list[str]:
    return next(word for word in machine.cmdline.split() if word.startswith("disk=")).removeprefix("disk=").split(",")


def expected_workloads(machine: Machine) -> list[str]:
    return [word for word in machine.cmdline.split() if word.startswith("workload=")]


def demand(boot: launch.Boot) -> None:
    if boot.judgement.verdict is not Verdict.SUCCESS:
        errors = "; ".join(str(record.get("message")) for record in boot.log.of("error"))
        tail = "\n".join(boot.log.text[-25:])
        raise Problem(
            f"{boot.machine.name}: verdict {boot.judgement.verdict.value}: {boot.judgement.reason} {errors}\n{tail}",
            Exit.TIMEOUT if boot.outcome.timed_out else boot.judgement.verdict.exit,
        )


def first_block(ready: lab.Lab) -> float:
    """Nanoseconds from the entry to the first completed block read, on plain QEMU with one IDE disk."""
    machine = Machine("first-block", cmdline="job=boot", counted=True)
    (boot,) = launch.boot(ready, [machine])
    demand(boot)
    found = boot.log.of("first_block")
    if not found:
        raise Problem("first-block: the kernel sent no first_block record.", Exit.FAILURE)
    return float(found[0]["ns"])


def linux(ready: lab.Lab, machine: Machine, disks: list[str], chosen: list[Workload], options) -> list[dict]:
    wanted = [{"name": w.name, "bs": w.bs, "qd": w.qd, "count": w.count, "mix": 70} for w in chosen]
    with tempfile.TemporaryDirectory(prefix="firstlight-") as folder:
        work = Path(folder)
        job = yardstick.job(ready, machine.job(work), yardstick.script(disks, wanted), work)
        outcomes = nested.run(
            ready, [job], wall=options.wall, live=progress(len(disks) * len(wanted)), keep=paths.RUNS / "yardstick"
        )
    output = outcomes[job.name].output
    found = yardstick.results(output)
    if len(found) != len(disks) * len(wanted):
        raise Problem(f"Linux with fio gave {len(found)} results. The log is in build/runs/yardstick/serial.log.")
    jobs = []
    for disk, driver, number, result in found:
        workload = chosen[number]
        result["jobname"] = f"{driver}-{workload.label}"
        result["job options"] = {**result["job options"], "name": workload.name, "bs": str(size(workload.bs))}
        result["firstlight"] = {
            "platform": "xen-emu", "boot": "linux", "vm_guest": "xen", "mode": "wall" if options.wall else "deterministic",
            "disk": disk, "driver": driver, "kind": workloads.KINDS[disk],
        }  # fmt: skip
        jobs.append(result)
    return jobs


def size(text: str) -> int:
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)
