"""Installs the packages the build needs, or says which ones and how."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys

from . import apt, distribution, lab, paths, process
from .problems import EXIT_HELP, Exit, Problem

CMAKE_NEEDED = (3, 28)
INSTALL_SECONDS = 900


def installed(names: list[str]) -> set[str]:
    answer = process.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Package}\n", *names], timeout=60, check=False, stderr=subprocess.DEVNULL
    ).stdout
    return {line.split()[1] for line in answer.splitlines() if line.startswith("installed ")}


def cmake_version() -> tuple[int, ...]:
    try:
        answer = process.run(["cmake", "--version"], timeout=20, check=False).stdout
    except Problem:
        return ()
    match = re.search(r"version (\d+)\.(\d+)", answer)
    return (int(match[1]), int(match[2])) if match else ()


def missing(distro: distribution.Distribution, tests: bool = False) -> dict[str, str]:
    needed = distro.build | (distro.tests if tests else {})
    present = installed(list(needed))
    absent = {name: why for name, why in needed.items() if name not in present}
    version = cmake_version()
    if version and version >= CMAKE_NEEDED:
        absent.pop("cmake", None)  # from wherever it came
    elif version:
        absent["cmake"] = f"build; {'.'.join(map(str, version))} is installed, 3.28 or newer is needed for modules"
    return absent


def ensure(tests: bool = False) -> None:
    """Everything the build needs, and with `tests` what scripts/test needs, is there afterwards, or a Problem says what to do."""
    distro = distribution.detect()
    absent = missing(distro, tests)
    if not absent:
        return
    listing = "".join(f"\n  {name} ({why})" for name, why in absent.items())
    if os.geteuid() != 0:
        raise Problem(
            f"Missing packages:{listing}\nRun: sudo {shlex.quote(str(paths.REPOSITORY / 'scripts/setup'))}", Exit.MISSING
        )
    with process.alone(paths.cache() / "setup.lock", "setup"):
        if missing(distro, tests):
            install(distro, absent, listing)
    still = missing(distro, tests)
    if still:
        raise Problem(f"Still missing after the installation: {' '.join(still)}.", Exit.MISSING)


def install(distro: distribution.Distribution, absent: dict[str, str], listing: str) -> None:
    print(f"installing:{listing}", file=sys.stderr, flush=True)
    source = apt.Apt(distro.codename, distro.backports, distro.components)
    source.refresh()
    source.get(
        "install", "-y", "--no-install-recommends", "-o", "Dpkg::Use-Pty=0", *absent, timeout=INSTALL_SECONDS, what="apt-get install"
    )


def main(words: list[str]) -> Exit:
    parser = argparse.ArgumentParser(
        prog="scripts/setup",
        description="Install the packages that the build and the tests need (as root) and assemble the lab in the cache folder.",
        epilog=EXIT_HELP,
    )
    parser.add_argument("--refresh", action="store_true", help="assemble the lab from the newest packages again")
    parser.add_argument("--no-lab", action="store_true", help="the packages of the build and the tests only")
    options = parser.parse_args(words)
    ensure(tests=True)
    if not options.no_lab:
        ready = lab.find(options.refresh)
        print(f"lab: {ready.root}")
    return Exit.SUCCESS
