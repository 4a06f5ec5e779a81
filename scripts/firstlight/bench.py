"""scripts/bench: compares synthetic with emulated disks, and this kernel with Linux, in one start of the lab."""

from __future__ import annotations

import dataclasses
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import build, comparison, counts, ensemble, fiojson, lab, launch, page, paths, process, records, report, setup, vmm, workloads, xenlab, yardstick
from .machine import AIO, CACHES, DIRECT_CACHES, IOS, IOTHREAD_BUSES, PLATFORMS, DiskSpec, Machine, Platform, demand_io, latency_bounds, parse_latency
from .options import Conflict, Parser, demand_agreement, listed, name_patterns, one_line, place, whole
from .problems import EXIT_HELP, Exit, Problem
from .records import Verdict
from .workloads import DISK_BYTES, WAITS, Chosen, Side, Workload

# Write each page once before measuring: the first write to a page of tmpfs costs more than later ones.
DISK_CONTENT = "pattern"
FIO_MORE = 5  # but not on IDE disks, which take long enough for the count itself
MOST_LANES = 64  # the kernel's
MOST_BUFFERS = 64 << 20  # bytes: what the machine's memory has room for


def arguments() -> Parser:
    parser = Parser(
        prog="scripts/bench",
        description="Measure the Xen ring against IDE in one virtual machine, and the VMBus's SCSI disk on the test host against IDE in QEMU. On request: --only qemu, all disks of QEMU's in one machine; "
        "--only all, the same with the Xen ring; --only microvm, virtio-mmio against virtio-pci; --only xen-pvh, a disk of the real Xen's; --only xen-hvm, there the disk on the ring against IDE on the same image. By default every instruction of guest, "
        "hypervisor and VMM counts as one nanosecond, so that the figures do not depend on this machine.",
        epilog=paths.CACHE_HELP + "\n\n" + EXIT_HELP,
    )
    parser.add_argument("--wall", action="store_true", help="wall-clock time instead: noisy")
    parser.add_argument("--runs", type=whole(1, 100), default=1, metavar="N", help="repeat, each time with another start and other pauses, and show the median and the range")
    parser.add_argument("--seed", type=whole(0, 1 << 32), default=1, metavar="S", help="what the starts and pauses of --runs follow from (default: 1)")
    parser.add_argument("--list", action="store_true", help="list the jobs")
    parser.add_argument("--only", type=name_patterns, action="extend", default=[], metavar="PATTERN,…", help="only jobs whose name matches one of these (a glob, or a part of it) (default: xen-emu and hyperv)")
    parser.add_argument("--workload", type=workloads.parse_workload, action="append", default=[], metavar="WORKLOAD", help="instead of the jobs' own workloads, several times: randread, randwrite, read, write or randrw, then "
        "bs=, qd=, count=, seed= and for randrw mix= (per cent of reads), as in randrw,bs=16k,qd=4,count=2000")
    parser.add_argument("--disk", type=listed, action="append", default=[], metavar="NAME,…", help=f"only these disks, by the name in the table, the kernel's, or the bus: {', '.join(workloads.DRIVERS)} (default: all)")
    parser.add_argument("--sweep", type=workloads.parse_sweep, default=(), metavar="qd=LOW..HIGH", help="each pattern and block size at each power of two of queue depths, as in qd=1..128, with a table by depth")
    parser.add_argument("--wait", type=workloads.parse_waits, default=WAITS[:1], metavar="POLICY,…", help="what the kernel's processors do while their disks work: sleep until an interrupt, poll, or adaptive, which polls "
        f"for a while and then sleeps; one machine for each of {', '.join(WAITS)}, and a table of what each costs (default: {WAITS[0]})")
    parser.add_argument("--io", type=workloads.parse_ios, default=IOS[:1], metavar="WAY,…", help="hyperv: who reads and writes the test host's disks: inline, the processor in its exit; thread, an I/O thread that answers later; "
        f"uring, the thread by io_uring; one machine for each of {', '.join(IOS)}, for this kernel and for Linux, and a table of them beside each other (default: {IOS[0]})")
    parser.add_argument("--latency", type=parse_latency, metavar="TIME", help="hyperv with --io thread or uring: what the test host's disks take for a request at least: 100us, exp:100us (drawn, the mean) or uniform:50us..150us")
    parser.add_argument("--aio", choices=AIO, help="how QEMU reads and writes the images (default: threads, as QEMU's)")
    parser.add_argument("--cache", choices=CACHES, help="QEMU's cache mode (default: writeback, as QEMU's)")
    parser.add_argument("--iothread", action="store_true", help=f"an I/O thread for each of QEMU's disks that can have one ({', '.join(IOTHREAD_BUSES)})")
    parser.add_argument("--compare", nargs=2, type=place, metavar=("FILE", "FILE"), help=f"measure nothing: compare two files of --json --runs N, N at least {ensemble.FEWEST}, that differ in one thing, as the kernel's commit or QEMU's version")
    parser.add_argument("--json", type=place, metavar="FILE", help="write the results as fio would (json+); with --runs of the run with the median IOPS of each job")
    parser.add_argument("--html", type=place, metavar="FILE", help="write a page with the results, their intervals and charts, that needs no network; with --compare of the difference")
    parser.add_argument("--json-dir", type=place, metavar="FOLDER", help="the same as one file for each job in a new folder, for fio-plot")
    parser.add_argument("--yardstick", action="store_true", help="measure Linux with fio in the same machines, in the same start of the lab")
    parser.add_argument("--cost", action="store_true", help="count the instructions of each I/O by who executes them, the guest, KVM, the host's kernel or the VMM, and tell what the host alone leaves to be gained; "
        "scripts/cost --functions shows the kernel's own by function")
    parser.add_argument("--lab", choices=("auto", "always", "never"), default="auto", help="whether the machine runs nested")
    parser.add_argument("--lanes", type=whole(1, MOST_LANES), default=1, metavar="N", help="virtual processors that share the work on a disk, each at the whole depth, and with a queue of its own where the disk has several; "
        "Linux gets as many, and as many jobs of fio (default: 1)")
    parser.add_argument("--xen-version", type=one_line, default="", metavar="VERSION", help="of xen-pvh and xen-hvm: 4.17 (Debian 12) or 4.20 (Debian 13) (default: the distribution's own)")
    parser.add_argument("--boot", choices=("pvh", "uefi"), default="pvh", help="how the kernel is started; uefi for --only xen-emu")
    parser.add_argument("--cmdline", type=one_line, default="", help="more words for the kernel's command line, beside those that the jobs themselves are")
    parser.add_argument("--no-build", action="store_true", help="measure what was built before")
    vmm.add_options(parser, several=True)
    parser.set_defaults(named_qemu=None)  # set by check(): the QEMU of --qemu
    return parser


LISTED = "nothing is measured"
COUNTED = "instructions are counted in the nested lab, in deterministic time"
CONFLICTS = (
    *vmm.conflicts(("boot", "wall", "lab", "yardstick", "cost", "only", "aio", "cache", "iothread", "list", "lanes", "xen_version")),
    *(Conflict(("list", name), LISTED) for name in ("qemu", "qemu_arg")),
    *(Conflict(("list", name), LISTED) for name in ("wall", "runs", "seed", "json", "json_dir", "html", "yardstick", "cost", "lab", "boot", "cmdline", "no_build", "wait", "aio", "cache", "iothread", "lanes", "xen_version", "io", "latency")),
    *(Conflict(("compare", name), LISTED) for name in ("wall", "runs", "only", "workload", "disk", "sweep", "wait", "aio", "cache", "iothread", "json", "json_dir", "yardstick", "cost", "lab", "lanes", "xen_version", "boot", "cmdline", "no_build", "list", "io", "latency", "qemu", "qemu_arg", "vmm", "vmm_command")),
    Conflict(("sweep", "workload"), "qd= is what --sweep sets: leave it out of --workload", lambda options: any(one.qd != 1 for one in options.workload)),
    Conflict(("aio",), f"native is for O_DIRECT: add --cache {' or --cache '.join(DIRECT_CACHES)}", lambda options: options.aio == "native" and options.cache not in DIRECT_CACHES),
    Conflict(("seed",), "is what the starts of several runs follow from: use it with --runs 2 or more", lambda options: options.runs == 1 and not options.compare),
    Conflict(("cost", "wall"), COUNTED),
    Conflict(("cost", "lab"), COUNTED, lambda options: options.lab == "never"),
    Conflict(("cost", "qemu"), COUNTED),
    Conflict(("cost", "lanes"), "what one processor's I/O costs is counted: leave out --lanes"),
    Conflict(("wall", "lab"), "--lab never measures on this machine's own KVM, always in wall-clock time: leave out --wall", lambda options: options.lab == "never"),
)
OWN_KEYS = ("job", "workload", "disk", "scratch", "emulated", "marks", "wait", "lanes")  # words of the kernel's command line that the jobs set


def check(options) -> list[Chosen]:
    """The selected jobs. Invalid options are reported here, before anything is fetched or built."""
    demand_agreement(options, CONFLICTS)
    workloads.COMPARISONS.pop(vmm.COMPARISON, None)  # of an earlier call in this process
    if named := vmm.find(options.vmm, options.vmm_command):
        workloads.COMPARISONS[vmm.COMPARISON] = vmm.sides(named, [word for words in options.disk for word in words])
        options.only = [vmm.COMPARISON]
    elif options.qemu:
        options.only = options.only or ["qemu"]
    jobs = asked(options)
    for pattern in options.only:
        if not workloads.choose([pattern], jobs=jobs):
            raise Problem(f"--only {pattern}: no job has such a name. scripts/bench --list shows them.", Exit.USAGE)
    disks = [word for words in options.disk for word in words]
    chosen = workloads.choose(options.only, options.list, jobs, disks)
    demand_disks(disks, workloads.choose(options.only, options.list, jobs))
    demand_host_side(options, chosen)
    demand_qemu(options, chosen)
    for word in options.cmdline.split():
        key = word.partition("=")[0]
        if key in OWN_KEYS:
            raise Problem(
                f"--cmdline {word}: {key}= is what the jobs set themselves; {f'--{key}' if key in ('wait', 'lanes') else '--only'} picks among them, and scripts/run --cmdline 'job=bench …' measures "
                "anything else.",
                Exit.USAGE,
            )
    for one in chosen:
        for side in sides_of(one):
            platform = kind_of(side)
            if side.vmm:
                main_machine(side, one, options)
                continue
            if options.boot not in platform.boots:
                raise Problem(f"--boot {options.boot}: {side.platform} boots by {' or '.join(platform.boots)}. Add --only xen-emu.", Exit.USAGE)
            main_machine(side, one, options)  # checks what the platform and QEMU's machine can have
            if not options.named_qemu:
                launch.place_beforehand(platform, options.lab)
            if platform.domain and options.cost:
                raise Problem(f"--cost: instructions are counted below KVM, and {side.platform} has none. Add --only for other comparisons, or leave out --cost.", Exit.USAGE)
            if platform.domain and "lab" in options.given:
                raise Problem(f"--lab {options.lab}: {side.platform} has a lab of its own, always. Leave out --lab, or add --only for other jobs.", Exit.USAGE)
    if options.json:
        paths.writable(options.json, "--json")
    if options.html:
        paths.writable(options.html, "--html")
    if options.json_dir:
        fiojson.demand_folder(options.json_dir)
    if options.no_build:
        launch.demand_built([paths.KERNEL, paths.EFI, *([paths.TEST_HOST] if any(one.comparison == "hyperv" for one in chosen) else [])])
    paths.cache()
    return chosen


def asked(options) -> list[Workload]:
    """The workloads: the jobs' own or those of --workload, swept if asked for."""
    jobs = list(options.workload or workloads.MAIN_JOB)
    labels = [f"{one.name} {one.bs}" if options.sweep else one.label for one in jobs]
    twice = next((label for label in labels if options.workload and labels.count(label) > 1), "")
    if twice:
        raise Problem(f"--workload: {twice} was given twice, and results are named by pattern, block size and queue depth. Leave one out, or measure it by a call of its own.", Exit.USAGE)
    if options.sweep:
        jobs = workloads.swept(jobs, options.sweep)
    if len(jobs) > workloads.MOST_WORKLOADS:
        raise Problem(f"{len(jobs)} workloads were asked for, at most {workloads.MOST_WORKLOADS} were expected. Leave out a --workload, or shorten --sweep.", Exit.USAGE)
    for one in jobs:
        if one.qd * one.bytes > MOST_BUFFERS:
            raise Problem(f"{one.label}: {one.qd} buffers of {one.bs} are {one.qd * one.bytes >> 20} MiB, at most {MOST_BUFFERS >> 20} MiB were expected. Lower qd or bs.", Exit.USAGE)
    return jobs


def demand_disks(disks: Sequence[str], chosen: Sequence[Chosen]) -> None:
    """Each word of --disk names a disk in one of the comparisons."""
    present = dict.fromkeys(one.comparison for one in chosen)
    known = {word: None for comparison in present for word in workloads.disk_words(comparison)}
    for disk in disks:
        if disk in known:
            continue
        others = [comparison for comparison in workloads.COMPARISONS if disk in workloads.disk_words(comparison)]
        hint = f"; {' and '.join(others)} have it: add --only {others[0]}" if others else ""
        raise Problem(f"--disk {disk}: {', '.join(present)} have the disks {', '.join(known)}{hint}.", Exit.USAGE)


def demand_host_side(options, chosen: Sequence[Chosen]) -> None:
    """--aio, --cache and --iothread must have an effect on a measured disk of each comparison, --io and --latency on one of some comparison."""
    for name in ("io", "latency"):
        if name in options.given and not any(kind_of(side).test_host for one in chosen for side in sides_of(one)):
            raise Problem(f"--{name} is for the test host's disks, and {', '.join(one.comparison for one in chosen)} measures none: leave it out, or add --only hyperv.", Exit.USAGE)
    for io in options.io:
        demand_io(io, options.latency or "")
    for one in chosen:
        found = [side.bus(disk) for side in sides_of(one) if of_qemu(side) for disk in side.disks if disk in one.disks]
        for name in ("aio", "cache"):
            if getattr(options, name) and not found:
                raise Problem(f"--{name} is for QEMU's disks, and {one.comparison} measures none: leave it out, or add --only for another comparison.", Exit.USAGE)
        if options.iothread and not set(found) & set(IOTHREAD_BUSES):
            raise Problem(
                f"--iothread is for QEMU's disks on {', '.join(IOTHREAD_BUSES)}, and {one.comparison} measures none of them: leave it out, or add --only for another comparison.",
                Exit.USAGE,
            )


def demand_qemu(options, chosen: Sequence[Chosen]) -> None:
    """--qemu and --qemu-arg are for machines of QEMU's, and the QEMU must have them."""
    sides = [side for one in chosen for side in sides_of(one)]
    for name in ("qemu", "qemu_arg"):
        others = [one.comparison for one in chosen if not all(of_qemu(side) for side in sides_of(one))]
        if getattr(options, name) and others:
            flag = "--" + name.replace("_", "-")
            raise Problem(f"{flag} is for machines of QEMU's, and {others[0]} has another one: add --only for other comparisons, as in --only qemu.", Exit.USAGE)
    if options.qemu:
        options.named_qemu = vmm.qemu(options.qemu, [side.machine for side in sides])


def kind_of(side: Side) -> Platform:
    return side.vmm.platform if side.vmm else PLATFORMS[side.platform]


def placed(side: Side, options) -> Side:
    """The side where --qemu runs it: on this machine's KVM, or without one on the emulated processor."""
    if options.named_qemu and side.platform == "kvm" and (lacking := launch.lacks(options.named_qemu, PLATFORMS["kvm"])):
        launch.warn(f"{side.key}: QEMU emulates the processor, because {lacking}: the figures say little about this machine with KVM")
        return dataclasses.replace(side, platform="qemu-pvh")
    return side


def of_qemu(side: Side) -> bool:
    kind = kind_of(side)
    return not side.vmm and not kind.test_host and not kind.domain


def sides_of(chosen: Chosen) -> list[Side]:
    return [side for side in workloads.COMPARISONS[chosen.comparison] if any(disk in chosen.disks for disk in side.disks)]


def main(words: list[str]) -> Exit:
    options = arguments().parse_args(words)
    chosen = check(options)
    if options.compare:
        setup.ensure()
        print(comparison.compare(*options.compare, options.seed, options.html, shlex.join(["scripts/bench", *words])))
        return Exit.SUCCESS
    if options.list:
        print("\n".join(workloads.name(one.comparison, disk, workload) for one in chosen for disk in one.disks for workload in one.workloads))
        return Exit.SUCCESS
    begin = time.monotonic()
    setup.ensure()
    foreign = any(side.vmm for one in chosen for side in sides_of(one))
    ready = None if foreign or (options.qemu and not options.yardstick) else lab.find()
    if not options.no_build:
        build.kernel()
        if any(one.comparison == "hyperv" for one in chosen):
            build.test_host()
    if options.cost:
        assert ready
        counts.demand_plugins(ready)
    first = None if foreign else first_block(ready, options)
    jobs: list[dict] = []
    for one in chosen:
        jobs += compare(ready, one, options)
    if first is not None:
        print(f"\nentry to first completed block read (QEMU, IDE, PVH, 1 ns per instruction): {first / 1e6:.3f} ms")
    print(f"image: {paths.KERNEL.name} {paths.KERNEL.stat().st_size} bytes, {paths.EFI.name} {paths.EFI.stat().st_size} bytes")
    print(f"finished in {time.monotonic() - begin:.0f} s")
    if options.json:
        fiojson.write(options.json, jobs)
    if options.json_dir:
        fiojson.write_folder(options.json_dir, jobs)
    if options.html:
        page.write(options.html, jobs, shlex.join(["scripts/bench", *words]), options.seed, (paths.KERNEL, paths.EFI))
    return Exit.SUCCESS


def compare(ready: lab.Lab | None, chosen: Chosen, options) -> list[dict]:
    """All runs of one comparison, printed; for each job the run with the median IOPS."""
    sides = [placed(side, options) for side in sides_of(chosen)]
    machines = guests(sides, chosen, options)
    # Only the lab counts instructions: this machine's own KVM is used for wall-clock time, or if requested.
    forced = "always" if options.lab == "auto" and not options.wall else options.lab
    where = launch.place_of(machines[0], ready, forced)
    mode = "wall" if options.wall or not where.nested else "deterministic"
    reason = where.reason if not where.nested or forced == options.lab or machines[0].kind.domain else "nested lab, where instructions can be counted"
    launch.warn(f"{chosen.comparison}: {reason}; {mode} time")
    stated = named_versions(sides, options) or versions(ready, machines[0].kind, where.nested, machines[0].xen_version)  # now, while the checkout is still what was built
    runs: list[list[dict]] = []
    service: dict[str, list[float]] = {}
    for number in range(options.runs):
        launch.warn(f"run {number + 1} of {options.runs}")
        # A single run is not perturbed: it is for exact counts, which do not depend on the start.
        this = workloads.perturbed(chosen, options.seed, number, options.runs, service) if options.runs > 1 else chosen
        machines = guests(sides, this, options)
        # One place for all machines: a KVM sufficient for one side may lack what the other needs.
        runs.append(measure(ready, this, sides, machines, mode, "always" if where.nested else options.lab, options))
        service = service_times(runs[-1])
    jobs = report.median_run(runs) if options.runs > 1 else runs[0]
    for job in jobs:
        job["firstlight"]["versions"] = stated
        side = next(side for side in sides if job["firstlight"]["disk"] in side.disks)
        if kind_of(side).test_host:
            job["firstlight"]["latency"] = options.latency or "none"
        if of_qemu(side):
            job["firstlight"]["host_side"] = host_side(options, side.bus(job["firstlight"]["disk"]))
        if options.runs > 1:
            job["firstlight"]["runs_seed"] = options.seed
    ours = [job for job in jobs if not job["firstlight"]["driver"].startswith("linux-")]
    theirs = report.best([job for job in jobs if job["firstlight"]["driver"].startswith("linux-")])
    boots = " and ".join(f"{side.platform} ({side.about}): {', '.join(side.disks)}" for side in sides)
    print(f"\nplatform {chosen.comparison}, boot {machines[0].boot}, {mode} time; {boots}")
    print(", ".join(f"{what} {version}" for what, version in stated.items()))
    if served := report.host_side(jobs):
        print(served)
    if options.io != IOS[:1] and (disks := ", ".join(dict.fromkeys(job["firstlight"]["disk"] for job in jobs if "io" in job["firstlight"]))):
        print(f"the test host's disks ({disks}): io={','.join(options.io)}, latency={options.latency or 'none'}")
    if options.runs > 1:
        print(f"{options.runs} runs, each with another start and other pauses, from seed {options.seed}; of each job the run with the median IOPS")
    print("\n" + report.results(ours))
    if note := report.clock_note(ours):
        print("\n" + note)
    baseline = workloads.BASELINES.get(chosen.comparison, "") or (sides[0].disks[0] if sides[0].vmm and len(chosen.disks) > 1 else "")
    compared = report.compared(ours, theirs, baseline) if baseline else report.ratios(ours, theirs)
    if theirs:
        print("\nLinux with fio, same machines, same images, same start of the lab; of each row the best of its settings (" + ", ".join(setting.name for setting in yardstick.SETTINGS) + ")\n\n" + report.results(theirs))
    if options.sweep:
        print("\n" + report.by_depth(ours, theirs))
    if options.io != IOS[:1]:
        print("\nwho serves the disks, and what that is worth\n\n" + report.by_io(ours, theirs))
    if options.wait != WAITS[:1]:
        print("\nwhat the processors did while the disks worked, and what it cost\n\n" + report.by_wait(ours))
    if compared:
        print("\n" + compared)
    if options.cost:
        print("\n" + report.costs(ours, theirs))
    if options.runs > 1:
        print("\n" + report.spread([*ours, *theirs], options.seed))
    return jobs


def guests(sides: Sequence[Side], chosen: Chosen, options) -> list[Machine]:
    machines = [main_machine(side, chosen, options, wait, io) for side in sides for io in ios_of(side, options) for wait in options.wait]
    if options.yardstick:
        machines += [linux_machine(side, chosen, options, io) for side in sides for io in ios_of(side, options)]
    return machines


def ios_of(side: Side, options) -> Sequence[str]:
    """Who serves the disks: the values of --io for the test host's, one without a name for others."""
    return options.io if kind_of(side).test_host else ("",)


def service_times(jobs: Sequence[dict]) -> dict[str, list[float]]:
    """Time of one of this kernel's I/Os on each disk, in nanoseconds, by the label of the workload."""
    found: dict[str, list[float]] = {}
    for job in jobs:
        if report.iops(job) and not job["firstlight"]["driver"].startswith("linux-"):
            words = job["job options"]
            found.setdefault(f"{words['name']}-{words['bs']}-qd{words['iodepth']}", []).append(1e9 / report.iops(job))
    return found


def named_versions(sides: Sequence[Side], options) -> dict[str, str]:
    """versions() for the QEMU or the VMMs that the user names; empty without them."""
    named = {side.platform: side.vmm.text for side in sides if side.vmm} or ({"QEMU": options.named_qemu.text} if options.named_qemu else {})
    return {"Firstlight": revision(), **named, "Linux": platform.release()} if named else {}


def versions(ready: lab.Lab, kind: Platform, nested: bool, xen_version: str = "") -> dict[str, str]:
    """Versions that the figures depend on besides this kernel's code; printed above each table and stored in the JSON."""
    xen = xenlab.find(xen_version) if kind.domain else None
    packages = {name.rpartition("/")[2]: version for name, version in (xen or ready).versions.items()}
    lab_kernel = next(name.removeprefix("linux-image-") for name in packages if name.startswith("linux-image-"))
    return {
        "Firstlight": revision(),
        **({"Xen": packages[f"xen-hypervisor-{xen.version}-amd64"]} if xen else {}),
        "QEMU": packages["qemu-system-x86"],
        "Linux": lab_kernel if nested or xen else platform.release(),
    }


def revision() -> str:
    """The checkout's commit; empty for a source tree without git, or a machine without it."""
    try:
        found = process.run(["git", "-C", paths.REPOSITORY, "describe", "--always", "--dirty"], timeout=20, check=False, what="git describe")
    except Problem:
        return "of an unknown commit"
    return found.stdout.strip() if found.returncode == 0 else "of an unknown commit"


def host_side(options, bus: str) -> dict:
    """How QEMU serves a disk on this bus, its defaults included."""
    return {"aio": options.aio or AIO[0], "cache": options.cache or CACHES[0], "iothread": options.iothread and bus in IOTHREAD_BUSES}


def images(side: Side, options) -> list[DiskSpec]:
    # Under the real Xen, a RAM disk of dom0: I/O on a file would include the time of its kernel threads.
    backing = "ram" if kind_of(side).domain else ""
    given = {"aio": options.aio or "", "cache": options.cache or ""} if of_qemu(side) else {}
    return [
        DiskSpec(bus, DISK_BYTES, content=DISK_CONTENT, backing=backing, iothread=bool(given and host_side(options, bus)["iothread"]), **given)
        for bus in side.buses
        if bus == "xen" or not side.twins
    ]


def seconds(begin: float, disks: Sequence[str], asked: Sequence[Workload], wall: bool, latency: str = "") -> float:
    """A bound on a machine's time: the slowest I/O seen took 0.3 ms, at most thirty times as long in the lab's wall-clock time, and its data 5 ns a byte; and its latency, of which that drawn has a mean."""
    _, most = (latency_bounds(latency) or (0, 0)) if latency else (0, 0)
    return begin + len(disks) * sum(one.count * (1e-3 + 2e-8 * one.bytes + 2e-9 * most) for one in asked) * (10 if wall else 1)


def in_wall_time(side: Side, options) -> bool:
    return options.wall or bool(options.named_qemu or side.vmm)


def more(side: Side, options) -> list[str]:
    """Further arguments of QEMU."""
    return [*side.arguments, *(word for words in options.qemu_arg for word in words)]


def version_of(side: Side, options) -> str:
    return options.xen_version if kind_of(side).domain else ""


def machine_name(side: Side, wait: str, io: str) -> str:
    return f"bench-{side.key}" + (f"-{wait}" if wait != WAITS[0] else "") + (f"-{io}" if io not in ("", IOS[0]) else "")


def linux_name(side: Side, io: str) -> str:
    return f"linux-{side.key}" + (f"-{io}" if io not in ("", IOS[0]) else "")


def main_machine(side: Side, chosen: Chosen, options, wait: str = WAITS[0], io: str = "") -> Machine:
    disks = [disk for disk in side.disks if disk in chosen.disks]
    names = ",".join(side.kernel_name(disk) for disk in disks)
    words = ["job=bench", "emulated=keep", f"disk={names}"]
    if any(workload.writes for workload in chosen.workloads):
        words.append(f"scratch={names}")
    words += [workload.word for workload in chosen.workloads]
    if marks := kind_of(side).marks or (counts.PORT if options.cost else 0):
        words.append(f"marks={marks:#x}")
    if options.wait != WAITS[:1]:  # also for the default way: with the key, the time that is not slept is counted
        words.append(f"wait={wait}")
    if options.lanes != 1:
        words.append(f"lanes={options.lanes}")
    if options.cmdline:
        words.append(options.cmdline)
    return Machine(
        machine_name(side, wait, io), side.platform, side.machine, boot="" if side.vmm else options.boot, cmdline=" ".join(words), disks=images(side, options),
        timeout=seconds(60, disks, chosen.workloads, in_wall_time(side, options), latency_of(side, options)), extra=more(side, options), qemu=options.named_qemu, vmm=side.vmm,
        cpus=options.lanes, xen_version=version_of(side, options), io=io, latency=latency_of(side, options) if io else "",
    )  # fmt: skip


def latency_of(side: Side, options) -> str:
    return (options.latency or "") if kind_of(side).test_host else ""


def linux_machine(side: Side, chosen: Chosen, options, io: str = "") -> Machine:
    disks = [disk for disk in side.disks if disk in chosen.disks]
    # fio's time limit is in milliseconds: on a disk that completes our count within tens of them it does more I/Os.
    targets = [yardstick.Target(disk, workloads.DRIVERS[side.bus(disk)].linux, 1 if side.bus(disk) == "ide" else FIO_MORE) for disk in disks]
    wanted = [{"name": w.name, "bs": w.bs, "qd": w.qd, "count": w.count, "mix": w.mix, "seed": w.seed, "startdelay": w.startdelay, "lanes": options.lanes} for w in chosen.workloads]
    # Each of several jobs would mark its own begin and end.
    script = yardstick.script(targets, wanted, PLATFORMS[side.platform].marks if options.lanes == 1 else 0, bool(options.json or options.json_dir), options.cost)
    limit = FIO_MORE * len(yardstick.SETTINGS) * seconds(24, disks, chosen.workloads, in_wall_time(side, options), latency_of(side, options))
    return Machine(
        linux_name(side, io), side.platform, side.machine, disks=images(side, options), timeout=limit, linux=script, extra=more(side, options), qemu=options.named_qemu,
        cpus=options.lanes, xen_version=version_of(side, options), io=io, latency=latency_of(side, options),
    )  # fmt: skip


def progress(total: int, asked: Sequence[Workload], sides: Mapping[str, Side] = {}):
    """Prints on stderr what has been measured, as the records and fio's results arrive. `sides`: by the name of the machine."""
    begin = time.monotonic()
    done = 0
    linux: list[str] = []  # output lines of the current run of fio

    def live(name: str, line: str) -> None:
        nonlocal done
        try:
            record = records.parse_line(line)
        except ValueError:
            return
        if record and record["record"] == "result":
            done += 1
            rate = fiojson.total_ios(record) / (record["runtime_ns"] / 1e9) if record["runtime_ns"] else 0
            disk = sides[name].disk(record["disk"]) if name in sides else record["disk"]
            launch.warn(
                f"  [{done}/{total}] {time.monotonic() - begin:5.1f} s  {disk} {record['workload']} "
                f"{record['bs'] // 1024}k qd{record['qd']}{' ' + record['wait'] if 'wait' in record else ''}: {rate:.0f} IOPS"
            )
        elif record and record["record"] in ("boot", "disk", "error"):
            launch.warn(f"  {time.monotonic() - begin:11.1f} s  " + describe(record))
        elif line.startswith("yardstick ") or linux:
            linux.append(line)
            if line == "yardstick end":
                done += 1
                launch.warn(f"  [{done}/{total}] {time.monotonic() - begin:5.1f} s  Linux {linux_line(linux, asked)}")
                linux.clear()

    return live


def linux_line(lines: Sequence[str], asked: Sequence[Workload]) -> str:
    """The result of one run of fio. Whether it is valid is judged when all have ended."""
    try:
        ((disk, _, number, setting, found),) = yardstick.results("\n".join(lines))
        workload = asked[number]
        return f"{disk} {workload.name} {workload.bs} qd{workload.qd} {setting}: {found['read']['iops'] + found['write']['iops']:.0f} IOPS"
    except (Problem, ValueError, KeyError, IndexError, TypeError):
        return f"{' '.join(lines[0].split()[1:3])}: no readable result"


def describe(record: dict) -> str:
    if record["record"] == "boot":
        guess = ", its clock's rate is a guess" if record.get("clock_assumed") else ""
        return f"booted by {record.get('entry')}, vm_guest {record.get('vm_guest')}{guess}"
    if record["record"] == "disk":
        return f"disk {record.get('name')}: {record.get('driver')}, {record.get('kind')}"
    return f"error: {record.get('message')}"


def measure(ready: lab.Lab | None, chosen: Chosen, sides: Sequence[Side], machines: list[Machine], mode: str, forced: str, options) -> list[dict]:
    served = sum(len(ios_of(side, options)) * sum(disk in chosen.disks for disk in side.disks) for side in sides)
    total = served * len(chosen.workloads) * (len(options.wait) + (len(yardstick.SETTINGS) if options.yardstick else 0))
    by_machine = {name: side for side in sides for io in ios_of(side, options) for name in (linux_name(side, io), *(machine_name(side, wait, io) for wait in options.wait))}
    with tempfile.TemporaryDirectory(prefix="firstlight-") as folder:
        counting = counts.Counting(Path(folder)) if options.cost else None
        if counting:
            marker = counts.marker(Path(folder))
            machines = [dataclasses.replace(machine, marker=marker) if machine.linux else machine for machine in machines]
        boots = launch.boot(
            ready, machines, wall=options.wall, forced=forced, live=progress(total, chosen.workloads, by_machine), keep=paths.RUNS / "bench" / chosen.comparison,
            more=counting.arguments if counting else (),
        )  # fmt: skip
        jobs: list[dict] = []
        for boot in boots:
            side = by_machine[boot.machine.name]
            jobs += linux_jobs(boot, chosen, side, mode) if boot.machine.linux else our_jobs(boot, chosen, side, mode)
        if counting:
            add_costs(jobs, counting.sections(len(jobs)))
    return jobs


def add_costs(jobs: Sequence[dict], sections: Sequence[counts.Section]) -> None:
    """`sections`: of each job, in the same order."""
    for job, section in zip(jobs, sections, strict=True):
        ios = job["read"]["total_ios"] + job["write"]["total_ios"]
        job["firstlight"]["instructions_per_io"] = {party: round(count / ios, 1) for party, count in section.whole.items()} if ios else None


def our_jobs(boot: launch.Boot, chosen: Chosen, side: Side, mode: str) -> list[dict]:
    demand(boot)
    found = boot.log.of("result")
    expected = len(disk_names(boot.machine)) * len(chosen.workloads)
    if len(found) != expected:
        raise Problem(f"{len(found)} results, {expected} expected. The log is in build/runs/bench/{chosen.comparison}/serial.log.", Exit.FAILURE)
    demand_phases(boot, expected)
    for record in found:
        for latency in (record[op].get("lat_ns", {}) for op in ("read", "write")):
            if latency.get("N") and "buckets" not in latency:
                raise Problem(f"{record['disk']} {record['workload']}: the kernel sent no latencies record before this result.", Exit.FAILURE)
    found = [{**record, "disk": side.disk(record["disk"])} for record in found]
    for record in found:
        driver = workloads.DRIVERS[side.bus(record["disk"])].name
        if record["driver"] != driver:
            raise Problem(
                f"{record['disk']} was driven by {record['driver']}, {driver} was expected: the kernel attached the disks of {side.key} in another order than "
                f"{', '.join(side.buses)}, so the name is that of another disk. The log is in build/runs/bench/{chosen.comparison}/serial.log.",
                Exit.FAILURE,
            )
    wait = next((word.partition("=")[2] for word in boot.machine.cmdline.split() if word.startswith("wait=")), WAITS[0])
    for record in found:
        if record.get("wait", WAITS[0]) != wait:
            raise Problem(f"{record['disk']} {record['workload']}: the kernel measured wait={record.get('wait', WAITS[0])}, wait={wait} was asked for.", Exit.FAILURE)
    failed = [record for record in found if record["errors"]]
    if failed:
        raise Problem(f"{failed[0]['disk']} {failed[0]['workload']}: {failed[0]['errors']} failed I/Os, none is allowed. The log is in build/runs/bench/{chosen.comparison}/serial.log.", Exit.FAILURE)
    start = (boot.log.of("boot") or [{}])[0]
    context = {
        "platform": chosen.comparison, "machine": side.key, "boot": boot.machine.boot,
        "vm_guest": start.get("vm_guest", ""), "mode": mode, **({"io": boot.machine.io} if boot.machine.io else {}),
    }  # fmt: skip
    assumed = bool(start.get("clock_assumed"))
    return [fiojson.job(record, {**context, "clock_assumed": assumed or bool(record.get("clock_assumed"))}) for record in found]


def demand_phases(boot: launch.Boot, expected: int) -> None:
    """A host that takes marks must have counted every workload."""
    if not boot.machine.kind.marks or (boot.machine.linux and boot.machine.cpus > 1):  # see linux_machine()
        return
    wrong = [line for line in boot.log.malformed if line.startswith(records.PHASE)]
    if wrong or len(boot.log.phases) != expected:
        found = ", ".join(str(phase["phase"]) for phase in boot.log.phases) or "none"
        raise Problem(
            f"{boot.machine.name}: the host was to count the exits of phases 1 to {expected} and told of: {found}."
            + (f" This line is malformed or out of turn: {wrong[0][:160]}" if wrong else ""),
            Exit.FAILURE,
        )


def disk_names(machine: Machine) -> list[str]:
    return next(word for word in machine.cmdline.split() if word.startswith("disk=")).removeprefix("disk=").split(",")


def demand(boot: launch.Boot) -> None:
    if boot.judgement.verdict is not Verdict.SUCCESS:
        errors = "; ".join(str(record.get("message")) for record in boot.log.of("error"))
        tail = "\n".join(boot.log.text[-25:])
        raise Problem(
            f"{boot.machine.name}: {boot.judgement.text} {errors}\n{tail}", boot.judgement.verdict.exit,
        )


def first_block(ready: lab.Lab | None, options) -> float:
    """Nanoseconds from the entry to the first completed block read, on plain QEMU with one IDE disk."""
    machine = Machine("first-block", cmdline="job=boot", counted=True, disks=["ide:64m,content=null"], qemu=options.named_qemu)
    (boot,) = launch.boot(ready, [machine])
    demand(boot)
    found = boot.log.of("first_block")
    if not found:
        raise Problem("first-block: the kernel sent no first_block record.", Exit.FAILURE)
    if found[0].get("clock_assumed"):
        raise Problem("first-block: the kernel assumed its clock's rate, so the figure means nothing; QEMU's ACPI timer was expected.", Exit.FAILURE)
    return float(found[0]["ns"])


def linux_jobs(boot: launch.Boot, chosen: Chosen, side: Side, mode: str) -> list[dict]:
    found = yardstick.results(boot.outcome.output)
    for error in boot.log.of("error"):
        raise Problem(f"Linux with fio on {side.key}: {error.get('message')}.", Exit.FAILURE)
    expected = sum(disk in chosen.disks for disk in side.disks) * len(chosen.workloads) * len(yardstick.SETTINGS)
    if len(found) != expected and boot.judgement.verdict in (Verdict.TIMEOUT, Verdict.NOT_STARTED):
        raise Problem(f"Linux with fio on {side.key}: {boot.judgement.text}; {len(found)} of {expected} results.", boot.judgement.verdict.exit)
    if len(found) != expected:
        tail = "\n".join(boot.log.text[-15:])
        raise Problem(f"Linux with fio on {side.key} gave {len(found)} results, {expected} expected.\n{tail}", Exit.FAILURE)
    demand_phases(boot, expected)
    jobs = []
    for at, (disk, driver, number, setting, result) in enumerate(found):
        ios = result["read"]["total_ios"] + result["write"]["total_ios"]
        exits = boot.log.phases[at].get("exits") if boot.log.phases else None
        workload = chosen.workloads[number]
        result["jobname"] = f"{driver}-{workload.label}-{setting}" + (f"-{boot.machine.io}" if boot.machine.io not in ("", IOS[0]) else "")
        result["job options"] = {**result["job options"], "name": workload.name, "bs": fiojson.size_word(workload.bytes), "numjobs": str(boot.machine.cpus)}
        result["firstlight"] = {
            "platform": chosen.comparison, "machine": side.key, "boot": "linux", "vm_guest": side.platform.partition("-")[0],
            "mode": mode, "disk": disk, "driver": driver, "setting": setting, "kind": workloads.DRIVERS[side.bus(disk)].kind,
            "exits_per_io": exits / ios if exits is not None and ios else None, **({"io": boot.machine.io} if boot.machine.io else {}),
        }  # fmt: skip
        jobs.append(result)
    return jobs

