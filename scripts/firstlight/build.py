"""Configures and builds with the presets of CMakePresets.json. A failure is a Problem: no outdated build is tested."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from . import paths, process
from .problems import Exit, Problem

CONFIGURE_SECONDS = 180
BUILD_SECONDS = 900
REPORT_SECONDS = 10


def preset(name: str, target: str = "") -> None:
    source = paths.REPOSITORY
    if not (source / "CMakePresets.json").is_file():
        raise Problem(f"{source}/CMakePresets.json: no such file.")
    with process.alone(paths.BUILD / f"{name}.lock", f"build {name}"):
        configure(name, source)
        watched(["cmake", "--build", "--preset", name, *(["--target", target] if target else [])], f"build {name}", source)


def configure(name: str, source: Path) -> None:
    """Configures. The remains of a failed configuration, or of one of a moved checkout, are removed first."""
    command = ["cmake", "--preset", name]
    kept = paths.BUILD / name / "CMakeCache.txt"
    unfinished = kept.with_name("unfinished")  # exists from the beginning of a configuration to its successful end
    home = re.search(r"^CMAKE_HOME_DIRECTORY:INTERNAL=(.*)$", kept.read_text(errors="replace"), re.M) if kept.is_file() else None
    if kept.is_file() and (unfinished.exists() or not home or home[1] != str(source)):
        command.append("--fresh")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    process.run(command, timeout=CONFIGURE_SECONDS, cwd=source, what=" ".join(command))
    unfinished.unlink()


def watched(command: list[str], what: str, folder: Path) -> None:
    """Runs a build and prints its progress every few seconds; the output is shown if it fails."""
    lines: list[str] = []
    reported = time.monotonic()
    late = False
    with process.started(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        assert child.stdout

        def stop() -> None:
            nonlocal late
            late = True
            process.kill(child)

        clock = threading.Timer(BUILD_SECONDS, stop)
        clock.start()
        try:
            for raw in child.stdout:
                lines.append(raw.decode(errors="replace").rstrip())
                step = re.match(r"\[(\d+)/(\d+)\]", lines[-1])
                if step and time.monotonic() - reported >= REPORT_SECONDS:
                    reported = time.monotonic()
                    print(f"{what}: {step[1]} of {step[2]} steps", file=sys.stderr, flush=True)
            status = child.wait()
        finally:
            clock.cancel()
    if late:
        sys.stderr.write(process.tail("\n".join(lines), 5) + "\n")
        raise Problem(f"{what}: still running after {BUILD_SECONDS} s, ended. The same command goes on where it was.", Exit.TIMEOUT)
    if status:
        process.demand_room("\n".join(lines), what)
        sys.stderr.write(process.tail("\n".join(lines)) + "\n")
        raise Problem(f"{what}: exit status {status}, expected 0.")


def test_host() -> None:
    """The virtual machine monitor of the platform hyperv."""
    print("build: test host", file=sys.stderr, flush=True)
    preset("host", target="firstlight_testhost")
    if not paths.TEST_HOST.is_file():
        raise Problem(f"The build succeeded but left no {paths.TEST_HOST.relative_to(paths.REPOSITORY)}.")


def udp_peer() -> None:
    """The other end of a guest's datagrams, in dom0 of the Xen lab."""
    print("build: UDP peer", file=sys.stderr, flush=True)
    preset("host", target="firstlight_udp_peer")


def host_modules() -> None:
    """The kernel's modules as built for this machine, which clang-tidy reads."""
    preset("host", target="firstlight_host")


def kernel() -> None:
    print("build: kernel", file=sys.stderr, flush=True)
    preset("kernel")
    for path in (paths.KERNEL, paths.EFI):
        if not path.is_file():
            raise Problem(f"The build succeeded but left no {path.relative_to(paths.REPOSITORY)}.")
