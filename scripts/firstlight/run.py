"""scripts/run: one boot, its console on the terminal."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from . import build, debugger, lab, launch, nested, paths, process, records, setup
from .machine import MACHINES, PLATFORMS, Machine
from .problems import EXIT_HELP, Exit, Problem


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/run",
        description="Boot Firstlight once. Its console goes to the terminal; its verdict is the exit status.",
        epilog="Disks: [ide:|xen:|scsi:|accel:]SIZE|FILE[,content=zero|sparse|pattern][,image=NAME][,sector=4096][,iops=N][,readonly]. "
        "A FILE is copied first, never changed. " + EXIT_HELP,
    )
    about = "; ".join(f"{name}: {platform.about}" for name, platform in PLATFORMS.items())
    parser.add_argument("--platform", choices=PLATFORMS, help=about)
    parser.add_argument("--boot", choices=("pvh", "uefi"), help="how the kernel is started")
    parser.add_argument("--machine", choices=MACHINES, default="pc", help="QEMU's machine (pc)")
    parser.add_argument("--cmdline", default="", help="the kernel's command line, see docs/INTERFACES.md")
    parser.add_argument("--map", type=Path, metavar="FILE", help="a map file for the driver table")
    parser.add_argument("--disk", action="append", metavar="DISK", help="a disk, several times; 'none' for none")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--memory", type=int, default=256, metavar="MIB")
    parser.add_argument("--timeout", type=float, default=60, metavar="SECONDS")
    parser.add_argument("--deterministic", action="store_true", help="one instruction is one nanosecond (TCG platforms; the lab always unless --wall)")
    parser.add_argument("--wall", action="store_true", help="the lab in wall-clock time: faster to start, noisy to measure")
    parser.add_argument("--lab", choices=("auto", "always", "never"), default="auto", help="whether kvm and xen-emu run nested")
    parser.add_argument("--records", action="store_true", help="show the records (@{…}) too")
    parser.add_argument("--dry-run", action="store_true", help="print the exact QEMU command and do not start it")
    parser.add_argument("--gdb", action="store_true", help="wait for a debugger, and print the command that starts it")
    parser.add_argument("--gdb-port", type=int, metavar="PORT", help=f"with --gdb: where QEMU waits for it ({debugger.PORT})")
    parser.add_argument("--console", action="store_true", help="connect the keyboard; Ctrl-A X ends QEMU, Ctrl-A C is its monitor")
    parser.add_argument("--kernel", type=Path, help="boot this ELF instead of building one")
    parser.add_argument("--efi", type=Path, help="boot this EFI application instead of building one")
    parser.add_argument("--no-build", action="store_true", help="boot what was built before")
    parser.add_argument("--trace-interrupts", action="store_true", help="QEMU's log of interrupts and resets into build/runs/run/qemu.log (TCG)")
    return parser


def main(words: list[str]) -> Exit:
    options = arguments().parse_args(words)
    platform = options.platform or ("qemu-uefi" if options.boot == "uefi" else "qemu-pvh")
    disks = None if options.disk is None else [disk for disk in options.disk if disk != "none"]
    if options.map and not options.map.is_file():
        raise Problem(f"--map {options.map}: no such file.", Exit.USAGE)
    if options.gdb_port is not None and not options.gdb:
        raise Problem("--gdb-port says where --gdb waits: use it with --gdb.", Exit.USAGE)
    port = debugger.PORT if options.gdb_port is None else options.gdb_port
    if options.gdb and not options.dry_run:
        debugger.demand_free(port)
    setup.ensure()
    ready = lab.find()
    chosen_image = options.kernel if (options.boot or PLATFORMS[platform].boots[0]) == "pvh" else options.efi
    if not options.no_build and not chosen_image:
        build.kernel()
    if PLATFORMS[platform].test_host and not options.no_build:
        build.test_host()
    log_file = paths.RUNS / "run" / "qemu.log"
    machine = Machine(
        "run", platform, options.machine, options.boot or "", options.cpus, options.memory, options.cmdline, options.map,
        disks, options.deterministic, options.timeout,
        kernel=options.kernel or paths.KERNEL, efi=options.efi or paths.EFI,
        extra=["-d", "int,cpu_reset,guest_errors", "-D", str(log_file)] if options.trace_interrupts else [],
    )  # fmt: skip
    image = machine.kernel if machine.boot == "pvh" else machine.efi
    if not image.is_file():
        raise Problem(f"{image}: no such file. Leave out --no-build, or name it with --kernel or --efi.", Exit.ERROR)
    where = launch.place(machine.kind, ready, options.lab)
    launch.warn(f"{platform}: {where.reason}")
    if options.dry_run or options.gdb or options.console:
        return by_hand(ready, machine, where, options, port)

    def show(name: str, line: str) -> None:
        if options.records or not line.startswith(records.MARK):
            print(line, flush=True)

    log_file.parent.mkdir(parents=True, exist_ok=True)
    (boot,) = launch.boot(ready, [machine], wall=options.wall, forced=options.lab, live=show, keep=log_file.parent)
    judgement = boot.judgement
    launch.warn(judgement.text)
    return judgement.verdict.exit


def by_hand(ready: lab.Lab, machine: Machine, where: launch.Place, options, port: int) -> Exit:
    """The ways to start that need the files to stay: everything goes into build/runs/run."""
    folder = paths.RUNS / "run"
    folder.mkdir(parents=True, exist_ok=True)
    job = machine.job(folder)
    if (options.gdb or options.console) and machine.kind.test_host and not where.nested:
        raise Problem(f"--gdb and --console are QEMU's; {machine.platform} runs on the project's own test host.", Exit.USAGE)
    if where.nested:
        if options.gdb or options.console:
            raise Problem(
                f"--gdb and --console reach machines on this host; {machine.platform} runs in the lab here "
                f"({where.reason}). They work with --platform qemu-pvh and qemu-uefi.",
                Exit.USAGE,
            )
        prepared = nested.prepare(ready, [job], folder, options.wall)
        print("# The lab's machine (L1); the job is in its initrd:")
        print(shlex.join(prepared.command))
        print("# What it starts (L2), with the files of the initrd:")
        print("#   " + shlex.join(nested.inner_command(job, 0)))
        return Exit.SUCCESS
    for disk in job.disks:
        (folder / disk.name).unlink(missing_ok=True)
        launch.make_disk(disk, folder)
    command = launch.command_here(ready, job, folder)
    if options.gdb:
        command += debugger.qemu_words(port)
    if options.console:
        command[command.index("stdio")] = "mon:stdio"
    if options.dry_run:
        print(shlex.join(command))
        return Exit.SUCCESS
    if options.gdb:
        debugger.demand_free(port)  # again: building and unpacking may have taken minutes
        launch.warn("QEMU waits. In another terminal:")
        launch.warn("  " + shlex.join(debugger.command(machine.kernel, port)))
        if machine.kind.kvm:
            launch.warn("With KVM only hardware breakpoints (hbreak) work before the kernel is in memory and has built its page tables.")
        launch.warn("Ctrl-C here ends QEMU.")
    # The terminal belongs to QEMU now: the same process group, so that Ctrl-C reaches it.
    try:
        status = subprocess.run(command, stdin=None if options.console else subprocess.DEVNULL).returncode
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    # The console went past this script: what is left is the exit status.
    judgement = records.by_status(status)
    launch.warn(judgement.text)
    return judgement.verdict.exit
