"""scripts/run: one boot, its console on the terminal."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from . import build, debugger, lab, launch, nested, options, paths, records, setup, vmm, xenguest
from .machine import BUSES, IOS, MACHINES, PLATFORMS, Machine, Platform, parse_latency
from .options import Conflict
from .problems import EXIT_HELP, Exit, Problem


# Limits of the options over all machines; a single machine's limits are checked by Machine.
MOST_CPUS = 4096
MOST_MEMORY = 1 << 20  # MiB
MOST_SECONDS = 86400


def arguments() -> options.Parser:
    parser = options.Parser(
        prog="scripts/run",
        description="Boot Firstlight once. Its console goes to the terminal; its verdict is the exit status.",
        epilog=f"A disk is BUS:SIZE or BUS:FILE, as in ide:64m, which is also 64m; the buses are {', '.join(BUSES)}. After commas: "
        "content=zero|sparse|pattern|loader (the EFI loader is on it), image=NAME (two disks with one image), sector=4096 (not ide, sata), readonly (not ide, sata, nvme), iops=N, controller=0..3 (scsi), "
        "backend=blkback|qdisk and backing=loop|ram|readonly (xen-pvh), for QEMU's disks aio=threads|native|io_uring, cache=writeback|none|writethrough|directsync|unsafe "
        "and iothread (xen, virtio, vscsi). "
        "A FILE is copied first, never changed.\n\n" + paths.CACHE_HELP + "\n\n" + EXIT_HELP,
    )
    about = "; ".join(f"{name}: {platform.about}" for name, platform in PLATFORMS.items())
    parser.add_argument("--platform", choices=PLATFORMS, help=about + " (default: qemu-pvh, with --boot uefi qemu-uefi)")
    parser.add_argument("--boot", choices=("pvh", "uefi"), help="how the kernel is started (default: the first way that the platform has)")
    parser.add_argument("--machine", choices=MACHINES, default="pc", help="QEMU's machine")
    parser.add_argument("--cmdline", type=options.one_line, default="", help="the kernel's command line, see docs/INTERFACES.md")
    parser.add_argument("--map", type=options.file(what="a map file"), metavar="FILE", help="a map file for the driver table")
    parser.add_argument("--disk", action="append", metavar="DISK", help="a disk, several times; 'none' for none (default: the platform's)")
    parser.add_argument("--net", action="append", default=[], metavar="CARD", help="a network card, several times: BUS[,OPTION…], as in xen or e1000; the options are those of QEMU's -netdev user")
    parser.add_argument("--cpus", type=options.whole(1, MOST_CPUS), default=1, metavar="N", help="virtual processors")
    parser.add_argument("--memory", type=options.whole(4, MOST_MEMORY), default=256, metavar="MIB", help="memory of the guest in MiB")
    parser.add_argument("--io", choices=IOS, help=f"hyperv: who reads and writes the VMBus disks: inline, the processor in its exit; thread, an I/O thread, one request after the other; uring, the thread by io_uring (default: {IOS[0]})")
    parser.add_argument("--latency", type=parse_latency, metavar="TIME", help="hyperv with --io thread or uring: what a VMBus disk takes for a request at least: 100us, exp:100us (drawn, the mean) or uniform:50us..150us")
    parser.add_argument("--blkback", type=options.listed, default=(), metavar="NAME=NUMBER,…", help="xen-pvh, xen-hvm: parameters of the module that serves the disks, as feature_persistent=0")
    parser.add_argument("--xen", type=options.one_line, default="", metavar="WORDS", help="xen-pvh, xen-hvm: more words of Xen's command line, as guest_loglvl=all")
    parser.add_argument("--xen-version", type=options.one_line, default="", metavar="VERSION", help="xen-pvh, xen-hvm: 4.17 (Debian 12) or 4.20 (Debian 13) (default: the distribution's own)")
    parser.add_argument("--xl", type=options.one_line, action="append", default=[], metavar="LINE", help="xen-pvh, xen-hvm: one more line of the guest's configuration for xl, several times, as 'viridian = 1'")
    parser.add_argument("--timeout", type=options.seconds(MOST_SECONDS), default=60.0, metavar="SECONDS", help="when the boot is given up")
    parser.add_argument("--deterministic", action="store_true", help="one instruction is one nanosecond (TCG platforms; the lab always unless --wall)")
    parser.add_argument("--wall", action="store_true", help="the lab in wall-clock time: faster to start, noisy to measure (platforms on KVM and of the real Xen)")
    parser.add_argument("--lab", choices=("auto", "always", "never"), default="auto", help="whether the platforms on KVM run nested")
    parser.add_argument("--records", action="store_true", help="show the records (@{…}) and the test host's lines (@@host …) too")
    parser.add_argument("--dry-run", action="store_true", help="print the exact QEMU command and do not start it")
    parser.add_argument("--gdb", action="store_true", help="wait for a debugger, and print the command that starts it")
    parser.add_argument("--gdb-port", type=options.whole(1, 65535), default=debugger.PORT, metavar="PORT", help="with --gdb: where QEMU waits for it")
    parser.add_argument("--console", action="store_true", help="connect the keyboard; Ctrl-A X ends QEMU, Ctrl-A C is its monitor")
    parser.add_argument("--kernel", type=options.file(b"\x7fELF", "an ELF file"), metavar="FILE", help="boot this ELF instead of building one")
    parser.add_argument("--efi", type=options.file(b"MZ", "an EFI application"), metavar="FILE", help="boot this EFI application instead of building one")
    parser.add_argument("--no-build", action="store_true", help="boot what was built before")
    parser.add_argument("--trace-interrupts", action="store_true", help="QEMU's log of interrupts and resets into build/runs/run/qemu.log (TCG)")
    vmm.add_options(parser, several=False)
    return parser


def platform_of(chosen) -> str:
    return chosen.platform or ("qemu-uefi" if chosen.boot == "uefi" else "qemu-pvh")


def kind_of(chosen) -> Platform:
    return PLATFORMS[platform_of(chosen)]


def boot_of(chosen) -> str:
    return chosen.boot or kind_of(chosen).boots[0]


def in_lab(chosen) -> bool:
    """Whether the platform can run in a lab."""
    return kind_of(chosen).kvm or bool(kind_of(chosen).domain)


KEYBOARD = "reach QEMU on this machine, with --platform qemu-pvh and qemu-uefi, or where KVM has what the platform needs"
CONFLICTS = (
    *vmm.conflicts(("platform", "boot", "machine", "deterministic", "wall", "lab", "trace_interrupts", "gdb", "console")),
    *vmm.RUN_CONFLICTS,
    Conflict(("qemu",), "is for QEMU's platforms, and this one is not QEMU's: leave it out", lambda o: kind_of(o).test_host or bool(kind_of(o).domain)),
    Conflict(("qemu_arg",), "is for QEMU's platforms, and this one is not QEMU's: leave it out", lambda o: kind_of(o).test_host or bool(kind_of(o).domain)),
    Conflict(("qemu", "deterministic"), "a KVM of this machine's own cannot count instructions: leave out --qemu for the lab", lambda o: kind_of(o).kvm),
    Conflict(("kernel",), "is for boots by pvh, and this one is by uefi: name the application by --efi", lambda o: boot_of(o) == "uefi"),
    Conflict(("efi",), "is for boots by uefi, and this one is by pvh: name the kernel by --kernel, or add --boot uefi", lambda o: boot_of(o) == "pvh" and not o.vmm_command),
    Conflict(("deterministic", "wall"), "time is counted in instructions or by the clock, not both"),
    Conflict(("deterministic", "lab"), "a KVM of this machine's own cannot count instructions", lambda o: o.lab == "never" and kind_of(o).kvm),
    Conflict(("wall",), "is for the lab, and this platform runs without it, in wall-clock time: leave it out, or name a platform on KVM or one of the real Xen", lambda o: not in_lab(o)),
    Conflict(("wall", "lab"), "--wall is for the lab, which --lab never leaves out; this machine's own KVM runs in wall-clock time: leave out one of them", lambda o: o.lab == "never" and kind_of(o).kvm),
    Conflict(("lab",), "always is for the platforms on KVM; this one's processor is emulated here anyway", lambda o: o.lab == "always" and not kind_of(o).kvm),
    Conflict(("trace_interrupts",), "is QEMU's log of a processor that it emulates itself: qemu-pvh or qemu-uefi", lambda o: kind_of(o).kvm),
    Conflict(("gdb",), f"and --console {KEYBOARD}", lambda o: kind_of(o).test_host),
    Conflict(("console",), f"and --gdb {KEYBOARD}", lambda o: kind_of(o).test_host),
    Conflict(("gdb",), f"and --console {KEYBOARD}", lambda o: bool(kind_of(o).domain)),
    Conflict(("console",), f"and --gdb {KEYBOARD}", lambda o: bool(kind_of(o).domain)),
    Conflict(("trace_interrupts",), "is QEMU's log of a processor that it emulates for the kernel: qemu-pvh or qemu-uefi", lambda o: bool(kind_of(o).domain)),
    Conflict(("lab",), "never is for the platforms on KVM; the real Xen has a lab of its own, always", lambda o: o.lab == "never" and bool(kind_of(o).domain)),
    Conflict(("lab",), "never is for the platforms on KVM; this one never runs in the lab: leave it out", lambda o: o.lab == "never" and not in_lab(o)),
    Conflict(("machine",), "is QEMU's, and this platform is not a machine of QEMU's: leave it out", lambda o: kind_of(o).test_host or bool(kind_of(o).domain)),
    Conflict(("kernel", "no_build"), "nothing is built where the kernel is named: leave out --no-build", lambda o: not kind_of(o).test_host),
    Conflict(("efi", "no_build"), "nothing is built where the application is named: leave out --no-build"),
    *(Conflict((name,), "is for the platforms xen-pvh, xen-hvm and xen-hvm-uefi", lambda o: not kind_of(o).domain) for name in ("blkback", "xen", "xen_version", "xl")),
    *(Conflict((name,), "is for the test host's disks: add --platform hyperv", lambda o: not kind_of(o).test_host) for name in ("io", "latency")),
    Conflict(("gdb_port",), "says where --gdb waits: use it with --gdb", lambda o: not o.gdb),
    Conflict(("gdb", "lab"), f"--gdb and --console {KEYBOARD}", lambda o: o.lab == "always"),
    Conflict(("console", "lab"), f"--gdb and --console {KEYBOARD}", lambda o: o.lab == "always"),
    Conflict(("gdb", "timeout"), "nothing is timed while a person debugs"),
    Conflict(("console", "timeout"), "nothing is timed while a person has the keyboard"),
    Conflict(("gdb", "records"), "with --gdb the console is QEMU's own, which shows everything: leave out --records"),
    Conflict(("console", "records"), "with --console the console is QEMU's own, which shows everything: leave out --records"),
    Conflict(("dry_run", "timeout"), "nothing is started"),
    Conflict(("dry_run", "records"), "nothing is started"),
    Conflict(("disk",), "none goes with no other disk", lambda o: "none" in o.disk and len(o.disk) > 1),
)  # fmt: skip


def main(words: list[str]) -> Exit:
    chosen = arguments().parse_args(words)
    options.demand_agreement(chosen, CONFLICTS)
    found = vmm.find([chosen.vmm] if chosen.vmm else [], chosen.vmm_command)
    other = found[0] if found else None
    qemu = vmm.qemu(chosen.qemu, [chosen.machine]) if chosen.qemu else None
    platform = other.key if other else platform_of(chosen)
    disks = None if chosen.disk is None else [disk for disk in chosen.disk if disk != "none"]
    if other and disks:
        disks = other.disk_words(disks)
    log_file = paths.RUNS / "run" / "qemu.log"
    machine = Machine(
        "run", platform, chosen.machine, chosen.boot or "", chosen.cpus, chosen.memory, chosen.cmdline, chosen.map,
        disks, chosen.deterministic, chosen.timeout,
        blkback=chosen.blkback, xen=chosen.xen, xen_version=chosen.xen_version, xl=chosen.xl, nets=chosen.net,
        kernel=chosen.kernel or paths.KERNEL, efi=chosen.efi or paths.EFI,
        extra=[*(word for words in chosen.qemu_arg for word in words), *(["-d", "int,cpu_reset,guest_errors", "-D", str(log_file)] if chosen.trace_interrupts else [])],
        qemu=qemu, vmm=other, io=chosen.io or "", latency=chosen.latency or "",
    )  # fmt: skip
    image = machine.kernel if machine.boot == "pvh" else machine.efi
    needed = [image] if chosen.no_build or chosen.kernel or chosen.efi else []
    if machine.kind.test_host and chosen.no_build:
        needed.append(paths.TEST_HOST)
    launch.demand_built(needed)
    if other or qemu:
        launch.place_of(machine, None)
    elif known := launch.place_beforehand(machine.kind, chosen.lab):
        demand_place(machine, known, chosen)
    if chosen.gdb and not chosen.dry_run:
        debugger.demand_free(chosen.gdb_port)
    paths.cache()
    setup.ensure()
    ready = None if other or qemu else lab.find()
    where = launch.place_of(machine, ready, chosen.lab)
    demand_place(machine, where, chosen)
    if image not in needed:
        build.kernel()
    if machine.kind.test_host and not chosen.no_build:
        build.test_host()
    launch.warn(f"{platform}: {where.reason}")
    if chosen.dry_run or chosen.gdb or chosen.console:
        return by_hand(ready, machine, where, chosen)

    def show(name: str, line: str) -> None:
        if chosen.records or not line.startswith((records.MARK, records.HOST)):
            print(line, flush=True)

    if where.nested or chosen.trace_interrupts:
        log_file.parent.mkdir(parents=True, exist_ok=True)
    (boot,) = launch.boot(ready, [machine], wall=chosen.wall, forced=chosen.lab, live=show, keep=log_file.parent)
    judgement = boot.judgement
    launch.warn(judgement.text)
    return judgement.verdict.exit


def demand_place(machine: Machine, where: launch.Place, chosen) -> None:
    """Checks that depend on this machine: whether the platform runs in the lab."""
    if where.nested and (chosen.gdb or chosen.console):
        raise Problem(f"--gdb and --console {KEYBOARD}; {machine.platform} runs in the lab here ({where.reason}).", Exit.USAGE)
    if machine.kind.kvm and not where.nested and chosen.deterministic:
        raise Problem(f"--deterministic: a KVM of this machine's own cannot count instructions ({where.reason}). Add --lab always.", Exit.USAGE)
    if machine.kind.kvm and not where.nested and chosen.wall:
        raise Problem(f"--wall is for the lab, and {machine.platform} runs in wall-clock time here ({where.reason}). Leave it out, or add --lab always.", Exit.USAGE)
    if where.nested and not machine.kind.domain:
        nested.demand_memory([machine.name], [machine.memory << 20], [sum(disk.size for disk in machine.specs if disk.content not in ("sparse", "null"))])


def by_hand(ready: lab.Lab | None, machine: Machine, where: launch.Place, chosen) -> Exit:
    """Starts that need their files to be kept: everything goes into build/runs/run."""
    folder = paths.RUNS / "run"
    folder.mkdir(parents=True, exist_ok=True)
    job = machine.job(folder)
    if isinstance(job, xenguest.Domain):
        print("\n".join(xenguest.by_hand(job, folder, chosen.wall, chosen.xen, chosen.xen_version)))
        return Exit.SUCCESS
    if where.nested:
        assert ready
        prepared = nested.prepare(ready, [job], folder, chosen.wall)
        print("# The lab's machine (L1); the job is in its initrd:")
        print(shlex.join(prepared.command))
        print("# What it starts (L2), with the files of the initrd:")
        print("#   " + shlex.join(nested.inner_command(job, 0)))
        return Exit.SUCCESS
    for disk in job.disks:
        launch.make_disk(disk, folder)
    command = launch.command_here(ready, job, folder)
    if chosen.gdb:
        command += debugger.qemu_words(chosen.gdb_port)
    if chosen.console:
        command[command.index("stdio")] = "mon:stdio"
    if chosen.dry_run:
        print(shlex.join(command))
        return Exit.SUCCESS
    if chosen.gdb:
        debugger.demand_free(chosen.gdb_port)  # checked again: building and unpacking may have taken minutes
        launch.warn("QEMU waits. In another terminal:")
        launch.warn("  " + shlex.join(debugger.command(machine.kernel, chosen.gdb_port)))
        if machine.kind.kvm:
            launch.warn("With KVM only hardware breakpoints (hbreak) work before the kernel is in memory and has built its page tables.")
        launch.warn("Ctrl-C here ends QEMU.")
    # The terminal belongs to QEMU now: the same process group, so that it receives Ctrl-C.
    try:
        status = subprocess.run(command, stdin=None if chosen.console else subprocess.DEVNULL).returncode
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    # The console was not read by this script, so only the exit status is known.
    judgement = records.by_status(status)
    launch.warn(judgement.text)
    return judgement.verdict.exit
