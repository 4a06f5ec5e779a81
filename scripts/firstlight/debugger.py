"""gdb on a machine that runs here: QEMU's options, the command that starts gdb, and a test of it."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import paths, process
from .problems import Exit, Problem
from .vmtests import Result, wreck

PORT = 1234
SECONDS = 90.0  # for a session: OVMF uses some of them before it starts the kernel


def demand_free(port: int) -> None:
    """A port that QEMU can listen on, or a Problem: QEMU would report the conflict only after the user was asked to start gdb."""
    if not 1 <= port <= 65535:
        raise Problem(f"--gdb-port {port}: a port from 1 to 65535 was expected.", Exit.USAGE)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as QEMU does: a connection that has just ended is no conflict
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise Problem(
                f"--gdb: port {port} of this machine cannot be used ({error.strerror}); another machine may wait there for its debugger. "
                "End it, or choose another port with --gdb-port.",
                Exit.ERROR,
            ) from None


def qemu_words(port: int) -> list[str]:
    return ["-gdb", f"tcp:127.0.0.1:{port}", "-S"]


def symbols(kernel: Path) -> Path:
    """The file with the symbols of the booted kernel."""
    beside = kernel.with_name(kernel.stem + ".debug.elf")
    return beside if beside.is_file() else kernel


def command(kernel: Path, port: int) -> list[str]:
    # The debug information names sources relative to the checkout's root: --directory finds them from any folder.
    return ["gdb", f"--directory={paths.REPOSITORY}", str(symbols(kernel)), "-ex", f"target remote localhost:{port}"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# The commands typed, each preceded by a mark in the output.
TYPED = (
    "break fl::boot::kernel_start",
    "continue",
    "list fl::boot::kernel_start",
    "next",
    "step",
    "backtrace",
    "delete",
    "break interrupt_raised",
    "continue",
    "backtrace",
    "thread apply all backtrace",
)
MARK = "== "


def checks() -> Iterable[Result]:
    for name, words, cpus, entry in (("pvh", ["--cpus", "2"], 2, "pvh_entry32"), ("uefi", ["--boot", "uefi"], 1, "kernel_entry64")):
        begin = time.monotonic()
        try:
            status, said = session(words)
            faults = complaints(said, entry, cpus, paths.REPOSITORY)
            if status != Exit.SUCCESS:
                faults.append(f"the machine ended with {status} after gdb had gone, {int(Exit.SUCCESS)} expected")
        except Exception as error:
            yield wreck(f"gdb/{name}", error, time.monotonic() - begin)
        else:
            yield Result(f"gdb/{name}", "failed" if faults else "passed", time.monotonic() - begin, "; ".join(faults), said)
    begin = time.monotonic()
    try:
        faults, said = every_name()
        yield Result("gdb/names", "failed" if faults else "passed", time.monotonic() - begin, "; ".join(faults), said)
    except Exception as error:
        yield wreck("gdb/names", error, time.monotonic() - begin)


def demand_gdb() -> None:
    if not shutil.which("gdb"):
        raise Problem("gdb: not found, so nothing was tried. scripts/setup installs it.", Exit.MISSING)


def session(words: Sequence[str]) -> tuple[int, str]:
    """Starts a machine by scripts/run --gdb, runs the printed command, and types; returns the machine's exit status and gdb's output."""
    demand_gdb()
    run = [sys.executable, str(paths.PACKAGE), "run", "--gdb", "--gdb-port", str(free_port()), "--no-build", *words]
    end = time.monotonic() + SECONDS
    with process.started(run, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as machine:
        printed = ""
        lines = []
        while not printed:  # it waits for a lock at most, and the holder's time is bounded too
            line = machine.stderr.readline()
            if not line:
                raise Problem("scripts/run --gdb ended without a command for gdb:\n" + "".join(lines))
            lines.append(line)
            printed = line.strip() if line.startswith("  gdb ") else ""
        typed = []
        for text in TYPED:
            typed += ["-ex", f"echo {MARK}{text}\\n", "-ex", text]
        # Not in the checkout: the printed command works from any folder.
        said = process.run(
            [*shlex.split(printed), "-nx", "-batch", "-ex", "set width 0", "-ex", "set height 0", *typed],
            timeout=max(1.0, end - time.monotonic()), check=False, cwd="/", what="gdb",
        ).stdout  # fmt: skip
        try:
            return machine.wait(timeout=max(1.0, end - time.monotonic())), said
        except subprocess.TimeoutExpired:
            raise Problem(f"The machine was still running {SECONDS:.0f} s after it was started; gdb had said:\n{process.tail(said)}", Exit.TIMEOUT) from None


def parts(said: str) -> list[str]:
    """gdb's output of each command typed."""
    found = re.split(rf"^{re.escape(MARK)}(.*)\n", said, flags=re.M)
    if found[1::2] != list(TYPED):
        raise Problem(f"gdb carried out {found[1::2]}, {list(TYPED)} expected:\n{process.tail(said)}")
    return found[2::2]


def frames(backtrace: str) -> list[str]:
    """The functions of a backtrace, innermost first; ?? for one without a name."""
    return re.findall(r"^#\d+ +(?:0x[0-9a-f]+ in )?(.+?) \(", backtrace, re.M)


def complaints(said: str, entry: str, cpus: int, root: Path) -> list[str]:
    """Faults of a session; empty if there are none."""
    set_, stopped, listed, next_, stepped, trace, _, _, interrupted, inner, every = parts(said)
    faults = []
    where = re.match(r"Breakpoint 1 at 0x[0-9a-f]+: file (?:\./)?(src/\S+), line (\d+)\.$", set_.strip())
    if not where:
        return [f"no breakpoint by plain name: {set_.strip()}"]
    if not re.search(rf"^(?:Thread \S+ hit )?Breakpoint 1, fl::boot::kernel_start \(.*\) at \S*{re.escape(where[1])}:{where[2]}$", stopped, re.M):
        faults.append(f"the machine did not stop there: {stopped.strip()}")
    source = (root / where[1]).read_text().splitlines()
    lines = re.findall(r"^(\d+)\t?(.*)$", listed, re.M)
    if len(lines) < 5 or any(source[int(number) - 1] != text for number, text in lines) or not any("kernel_start(" in text for _, text in lines):
        faults.append(f"the lines listed are not those of {where[1]}: {listed.strip()[:200]}")
    for what, text in (("next", next_), ("step", stepped)):
        if not re.search(r"^\d+\t", text, re.M):
            faults.append(f"{what} showed no line of source: {text.strip()[:200]}")
    faults += ending("the backtrace of kernel_start", trace, entry, "fl::boot::kernel_start")
    if "interrupt_raised (" not in interrupted:
        faults.append(f"the machine did not stop at an interrupt: {interrupted.strip()[:200]}")
    # Through the interrupted code, to the processor's entry point.
    faults += ending("the backtrace of an interrupt", inner, entry, "fl::boot::kernel_start")
    if not re.search(r"^#1 +<signal handler called>$", inner, re.M):
        # Without the mark the interrupted function is looked up one byte too low: ?? if it was at its first instruction.
        faults.append("the frame between an interrupt and what it interrupted is not marked as one")
    threads = re.split(r"^Thread (\d+) .*\n", every, flags=re.M)[1:]
    if len(threads) != 2 * cpus:
        faults.append(f"{len(threads) // 2} processors have a backtrace, {cpus} expected")
    for number, text in zip(threads[::2], threads[1::2]):
        faults += ending(f"the backtrace of processor {number}", text, entry if number == "1" else "processor_entry")
    return faults


def ending(what: str, trace: str, entry: str, through: str = "") -> list[str]:
    names = frames(trace)
    if not names or names[-1] != entry or "??" in names or (through and through not in names):
        seen = names if len(names) < 10 else [*names[:4], "…", *names[-4:]]
        return [f"{what} is {' < '.join(seen) or 'empty'}; to {entry}{', through ' + through if through else ''} and without ?? expected"]
    return []


def every_name() -> tuple[list[str], str]:
    """gdb finds the kernel's functions by their source names: one of five of the non-template ones is tried."""
    demand_gdb()
    gdb = ["gdb", "-nx", "-batch", str(paths.KERNEL_SYMBOLS.relative_to(paths.REPOSITORY)), "-ex", "set width 0"]
    said = process.run([*gdb, "-ex", "info functions -n ^fl::"], timeout=60, cwd=paths.REPOSITORY, what="gdb").stdout
    names = sorted(set(re.findall(r"^\d+:\s.*?[ *&](fl(?:::\w+)*::(?:operator\(\)|\w+))\(", said, re.M)))
    if len(names) < 300 or "fl::boot::kernel_start" not in names:
        return [f"gdb knows {len(names)} functions of the kernel by plain name, kernel_start {'' if 'fl::boot::kernel_start' in names else 'not '}among them"], said
    names = ["fl::boot::kernel_start", *names[::5]]
    typed = [word for name in names for word in ("-ex", f"break {name}")]
    said = process.run([*gdb, *typed, "-ex", "list fl::boot::kernel_start"], timeout=120, cwd=paths.REPOSITORY, what="gdb").stdout
    unknown = re.findall(r'^Function "(.*)" not defined', said, re.M)
    set_ = len(re.findall(r"^Breakpoint \d+ at ", said, re.M))
    faults = [f"{len(unknown)} of {len(names)} functions cannot be named, first {unknown[0]}"] if unknown else []
    if set_ != len(names):
        faults.append(f"{set_} breakpoints were set by {len(names)} names")
    if "kernel_start(BootInfo& info)" not in said:
        faults.append(f"started in the checkout's root, gdb finds no source: {process.tail(said, 1)}")
    return faults, said
