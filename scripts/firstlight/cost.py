"""scripts/cost: where the instructions of an I/O go."""

from __future__ import annotations

import collections
import dataclasses
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from . import build, lab, launch, nested, options, paths, records, setup
from .counts import PARTIES, PORT, Counting, Section, Symbols, demand_plugins, kernel_symbols
from .machine import Machine
from .problems import EXIT_HELP, Exit, Problem
from .vmtests import Result, wreck
from .workloads import DRIVERS, WAITS, Workload, kernel_names, parse_workload

SUITE = "cost"

PLATFORMS = {"scsi": "hyperv", "xen": "xen-emu"}  # of the disks that are not QEMU's on KVM; those are measured by default
WORKLOADS = (Workload("randread", "4k", 32, 6400), Workload("randread", "4k", 1, 2000))
# words of the kernel's command line that are set here
OWN_KEYS = ("job", "disk", "workload", "scratch", "emulated", "marks", "lanes")
# The most instructions per I/O that the guest may execute: what was reached and 2 %, rounded up. Lower one when a change makes the I/O cheaper.
BOUNDS = {
    "storvsc-randread-4k-qd32": 650,
    "storvsc-randread-4k-qd1": 1180,
    "xen_blk-randread-4k-qd32": 620,
    "xen_blk-randread-4k-qd1": 1780,
}
RUN_SECONDS = 120.0  # of counted time
SMALL = 0.5  # instructions per I/O: functions with fewer are summed up


@dataclasses.dataclass
class Cost:
    """What a workload costs; instructions, over all its I/Os."""

    driver: str
    workload: Workload
    section: Section
    measured: int  # by the guest's clock, in which an instruction takes a nanosecond

    @property
    def per_io(self) -> dict[str, float]:
        return {party: count / self.workload.count for party, count in self.section.whole.items()}

    @property
    def label(self) -> str:
        return f"{self.driver}-{self.workload.label}"


def by_function(section: Section, symbols: Symbols) -> dict[str, int]:
    """The guest's instructions, most first."""
    count: collections.Counter[str] = collections.Counter()
    for address, executed in section.addresses.items():
        count[symbols.name(address)] += executed
    return dict(count.most_common())


def machine_of(disk: str, workloads: Sequence[Workload], cmdline: str = "") -> Machine:
    """`disk`: its bus."""
    (name,) = kernel_names([disk])
    words = ["job=bench", "emulated=keep", f"disk={name}", f"marks={PORT:#x}", *(workload.word for workload in workloads), *([cmdline] if cmdline else [])]
    if any(workload.writes for workload in workloads):
        words.append(f"scratch={name}")
    return Machine("cost", PLATFORMS.get(disk, "kvm"), cmdline=" ".join(words), disks=[f"{disk}:64m"], timeout=RUN_SECONDS)


def measure(ready: lab.Lab, disk: str, workloads: Sequence[Workload], cmdline: str = "") -> list[Cost]:
    """Runs the workloads in one boot. The kernel must have been built."""
    with tempfile.TemporaryDirectory(prefix="firstlight-") as temporary:
        counting = Counting(Path(temporary))
        machine = machine_of(disk, workloads, cmdline)
        outcome = nested.run(ready, [machine.job(Path(temporary))], keep=paths.RUNS / "cost", more=counting.arguments)[machine.name]
        boot = launch.finished(machine, outcome)
        if boot.judgement.verdict != records.Verdict.SUCCESS:
            raise Problem(f"{disk}: {boot.judgement.text}. The output is in {paths.RUNS / 'cost' / 'serial.log'}.", boot.judgement.verdict.exit)
        return costs(DRIVERS[disk].name, workloads, counting.sections(len(workloads)), boot.log.of("result"))


def costs(driver: str, workloads: Sequence[Workload], sections: Sequence[Section], results: Sequence[Mapping]) -> list[Cost]:
    """`sections`: the workloads' own."""
    if len(results) != len(workloads):
        raise Problem(f"{len(workloads)} workloads were run, and there are {len(results)} results.")
    for result in results:
        if result.get("driver") != driver or result.get("errors") != 0:
            raise Problem(f"A workload of {result.get('driver')} ended with {result.get('errors')} errors; {driver} and 0 were expected.")
    return [Cost(driver, workload, section, result["runtime_ns"]) for workload, section, result in zip(workloads, sections, results)]


def table(found: Iterable[Cost]) -> str:
    lines = [f"{'instructions per I/O':36}{'guest':>8}{'KVM':>8}{'kernel':>8}{'VMM':>8}{'host':>9}{'sum':>9}{'guest':>8}{'of time':>9}"]
    for cost in found:
        shares = cost.per_io
        total = sum(shares.values())
        cells = "".join(f"{shares[party]:8.0f}" for party in PARTIES)
        lines.append(f"{cost.label:36}{cells}{total - shares['guest']:9.0f}{total:9.0f}{100 * shares['guest'] / total:7.1f}%{100 * total * cost.workload.count / cost.measured:8.1f}%")
    return "\n".join(lines)


def function_table(cost: Cost, symbols: Symbols) -> str:
    lines = [f"\n{cost.label}: the guest's instructions per I/O by function"]
    rest = 0.0
    for name, count in by_function(cost.section, symbols).items():
        share = count / cost.workload.count
        if share < SMALL:
            rest += share
            continue
        lines.append(f"{share:9.1f}  {name}")
    return "\n".join([*lines, f"{rest:9.1f}  (all others)"])


def arguments() -> options.Parser:
    parser = options.Parser(
        prog="scripts/cost",
        description="Count the instructions of an I/O on one disk, in the nested lab, by who executes them: the guest, KVM, the host's kernel, and the virtual machine monitor. The counts are exact and repeatable: they depend on the programs alone, not on this machine.",
        epilog="KVM: the modules of the host's kernel. \"host\": all that is not the guest's. \"of time\": the sum as a part of the workload's measured time, in which an instruction takes a nanosecond; the rest is idle time.\n\n" + paths.CACHE_HELP + "\n\n" + EXIT_HELP,
    )
    parser.add_argument(
        "--disk", action="append", choices=tuple(DRIVERS), help="this disk, several times: scsi is the test host's on the VMBus, xen QEMU's emulation of Xen's ring, the others are QEMU's on KVM (default: scsi, xen)"
    )
    parser.add_argument("--workload", action="append", type=parse_workload, metavar="WORKLOAD", help="as in scripts/bench, several times (default: randread,qd=32,count=6400 and randread,qd=1,count=2000)")
    parser.add_argument("--functions", action="store_true", help="also the guest's instructions by function, as compiled: what is inlined counts for its caller")
    parser.add_argument("--cmdline", type=options.one_line, default="", help=f"more words of the kernel's command line, as in wait={WAITS[1]}")
    parser.add_argument("--no-build", action="store_true", help="measure what was built before")
    return parser


CONFLICTS: tuple[options.Conflict, ...] = ()


def demand_words(cmdline: str) -> None:
    for word in cmdline.split():
        if word.partition("=")[0] in OWN_KEYS:
            raise Problem(f"--cmdline {word}: {word.partition('=')[0]}= is what scripts/cost sets itself: --disk and --workload pick among them.", Exit.USAGE)


def checks() -> Iterable[Result]:
    """The suite of scripts/test: the guest's instructions per I/O are within their bounds. The kernel and the test host must have been built."""
    begin = time.monotonic()
    try:
        ready = lab.find()
        demand_plugins(ready)
    except Problem as problem:
        status = "skipped" if problem.code == Exit.MISSING else "failed"
        yield Result(f"{SUITE}/all", status, time.monotonic() - begin, str(problem))
        return
    for disk in PLATFORMS:
        begin = time.monotonic()
        try:
            found = measure(ready, disk, WORKLOADS)
        except Exception as error:
            yield wreck(f"{SUITE}/{disk}", error, time.monotonic() - begin)
            continue
        for cost in found:
            fault = beyond_bound(cost)
            yield Result(f"{SUITE}/{cost.label}", "failed" if fault else "passed", (time.monotonic() - begin) / len(found), fault)


def beyond_bound(cost: Cost) -> str:
    """Empty: the guest's part is within its bound."""
    bound, seen = BOUNDS[cost.label], cost.per_io["guest"]
    return f"the guest executes {seen:.0f} instructions per I/O, at most {bound} expected; scripts/cost --functions shows where" if seen > bound else ""


def main(words: list[str]) -> Exit:
    chosen = arguments().parse_args(words)
    options.demand_agreement(chosen, CONFLICTS)
    demand_words(chosen.cmdline)
    disks = list(dict.fromkeys(chosen.disk or PLATFORMS))
    if chosen.no_build:
        launch.demand_built([paths.KERNEL, paths.KERNEL_SYMBOLS, *([paths.TEST_HOST] if "scsi" in disks else [])])
    paths.cache()
    setup.ensure()
    ready = lab.find()
    demand_plugins(ready)
    if not chosen.no_build:
        build.kernel()
        if "scsi" in disks:
            build.test_host()
    found = [cost for disk in disks for cost in measure(ready, disk, chosen.workload or WORKLOADS, chosen.cmdline)]
    print(table(found))
    if chosen.functions:
        symbols = kernel_symbols()
        for cost in found:
            print(function_table(cost, symbols))
    return Exit.SUCCESS
