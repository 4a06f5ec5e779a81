"""Installs the packages the build needs, or names them and how to install them."""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from . import apt, distribution, lab, options, paths, process, xenlab
from .problems import EXIT_HELP, Exit, Problem

CMAKE_NEEDED = (3, 28)
INSTALL_SECONDS = 900
LAB_SECONDS = 1800
LOCK = Path("/run/firstlight-setup.lock")  # only root installs


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
        absent.pop("cmake", None)  # from any source
    elif version:
        absent["cmake"] = f"build; {'.'.join(map(str, version))} is installed, 3.28 or newer is needed for modules"
    return absent


def ensure(tests: bool = False) -> None:
    """Ensures that everything the build needs, and with `tests` what scripts/test needs, is installed, or raises a Problem with what to do."""
    distro = distribution.detect()
    absent = missing(distro, tests)
    if not absent:
        return
    listing = "".join(f"\n  {name} ({why})" for name, why in absent.items())
    if os.geteuid() != 0:
        raise Problem(
            f"Missing packages:{listing}\nRun: sudo {shlex.quote(str(paths.REPOSITORY / 'scripts/setup'))}", Exit.MISSING
        )
    with process.alone(LOCK, "setup"):
        if missing(distro, tests):
            install(distro, absent, listing)
    still = missing(distro, tests)
    if still:
        raise Problem(f"Still missing after the installation: {' '.join(still)}.", Exit.MISSING)


def install(distro: distribution.Distribution, absent: dict[str, str], listing: str) -> None:
    print(f"installing:{listing}", file=sys.stderr, flush=True)
    user = invoker()
    if user:
        # The lists belong to the user, who needs them next; root keeps none, neither of its own nor in the user's folder.
        as_invoker(user, "lists")
        with in_home_of(user):
            source = apt.Apt(distro.codename, distro.backports, distro.components)
        more = ["-o", "Dir::Cache=/var/cache/apt", "-o", "Dir::Cache::Archives=archives/", "-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache="]
    else:
        source = apt.Apt(distro.codename, distro.backports, distro.components)
        source.refresh()
        more = []
    if any(name.isdigit() for name in os.listdir("/var/lib/dpkg/updates")):
        # An interrupted installation: apt refuses everything until dpkg has completed it.
        process.run(["dpkg", "--configure", "-a"], timeout=INSTALL_SECONDS, env=dict(os.environ, DEBIAN_FRONTEND="noninteractive"))
    done = source.get(
        *more, "-o", "APT::Keep-Downloaded-Packages=false", "-o", "Dpkg::Use-Pty=0", "install", "-y", "--no-install-recommends", *absent,
        timeout=INSTALL_SECONDS, check=False, what="apt-get install",
    )  # fmt: skip
    if done.returncode:
        process.demand_room(done.stdout, "apt-get install")
        raise Problem(f"The packages could not be installed: {apt.reason(done.stdout)}. Installed so far stays; run the same command again.", Exit.MISSING)


def invoker() -> pwd.struct_passwd | None:
    """The user who called sudo: files in a home go into that user's, and belong to that user."""
    name = os.environ.get("SUDO_UID", "")
    if os.geteuid() != 0 or not name.isdigit() or int(name) == 0:
        return None
    try:
        return pwd.getpwuid(int(name))
    except KeyError:
        return None


def environment(user: pwd.struct_passwd) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SUDO_", "XDG_"))}
    return {**kept, "HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name}


@contextlib.contextmanager
def in_home_of(user: pwd.struct_passwd) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment(user))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def as_invoker(user: pwd.struct_passwd, part: str, *words: str) -> None:
    """Runs one part of the setup as that user, in a process of its own, which reports its own errors."""
    done = process.run(
        ["/usr/bin/python3", paths.PACKAGE, "setup", "--part", part, *words], timeout=LAB_SECONDS, check=False, quiet=False,
        user=user.pw_uid, group=user.pw_gid, extra_groups=os.getgrouplist(user.pw_name, user.pw_gid), env=environment(user), cwd="/",
    )  # fmt: skip
    if done.returncode:
        code = Exit(done.returncode) if done.returncode in Exit.__members__.values() else Exit.ERROR
        raise Problem(f"As {user.pw_name}, whose cache it is, the {part} could not be set up; see above.", code)


def arguments() -> options.Parser:
    parser = options.Parser(
        prog="scripts/setup",
        description="Install the packages that the build and the tests need (as root, or by sudo) and assemble the lab in the cache folder of the user who asks, also where that is by sudo.",
        epilog=paths.CACHE_HELP + "\n\n" + EXIT_HELP,
    )
    parser.add_argument("--refresh", action="store_true", help="fetch the package lists now and assemble the lab from the newest packages")
    parser.add_argument("--no-lab", action="store_true", help="the packages of the build and the tests only")
    parser.add_argument("--xen", action="store_true", help="assemble the Xen lab too (otherwise at its first use): 23 MB more to fetch, 170 MB more in the cache")
    parser.add_argument("--part", choices=("lists", "lab"), help=argparse.SUPPRESS)  # called by as_invoker
    return parser


CONFLICTS = (
    options.Conflict(("refresh", "no_lab"), "--refresh is for the lab, which --no-lab leaves out"),
    options.Conflict(("xen", "no_lab"), "--xen is for the Xen lab, which --no-lab leaves out too"),
)


def main(words: list[str]) -> Exit:
    chosen = arguments().parse_args(words)
    options.demand_agreement(chosen, CONFLICTS)
    paths.cache()
    if chosen.part == "lists":
        distro = distribution.detect()
        apt.Apt(distro.codename, distro.backports, distro.components).refresh()
        return Exit.SUCCESS
    if not chosen.part:
        ensure(tests=True)
    if chosen.no_lab:
        return Exit.SUCCESS
    user = invoker()
    if user:
        as_invoker(user, "lab", *(["--refresh"] if chosen.refresh else []), *(["--xen"] if chosen.xen else []))
        return Exit.SUCCESS
    ready = lab.find(chosen.refresh)
    print(f"lab: {ready.root}")
    if chosen.xen:
        print(f"Xen lab: {xenlab.find(refresh=chosen.refresh).root}")
    return Exit.SUCCESS
