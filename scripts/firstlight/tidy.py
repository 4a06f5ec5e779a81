"""The suite `tidy` of scripts/test: clang-tidy over the implementation units of src/, every finding an error (.clang-tidy).

It reads the modules of the host build, so it runs after that build. Interface units are seen only as declarations, through the units that
import them: their inline functions are checked by the compiler's warnings alone.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import paths, process
from .problems import Problem
from .vmtests import Result, side_by_side, wreck

SUITE = "tidy"
TOOL = "clang-tidy-19"
SECONDS = 120  # per unit
LIBRARY = "firstlight_host"


def commands(build: Path) -> dict[Path, dict]:
    """The implementation units of src/ that this build compiles, each with one of its compile commands: the tool checks a unit once per command.

    Some units are compiled for several programs; the command of the library of all modules is preferred.
    """
    database = build / "compile_commands.json"
    try:
        entries = json.loads(database.read_text())
    except (OSError, ValueError) as error:
        raise Problem(f"{database}: {error}. It is written by cmake --preset host.") from None
    sources = paths.REPOSITORY / "src"
    found: dict[Path, dict] = {}
    for entry in sorted(entries, key=lambda entry: (entry["file"], f"{LIBRARY}.dir" not in entry.get("output", ""))):
        if entry["file"].endswith(".cpp") and Path(entry["file"]).is_relative_to(sources):
            found.setdefault(Path(entry["file"]), entry)
    if not found:
        raise Problem(f"{database} names no implementation unit below {sources}.")
    return found


def check(database: Path, unit: Path) -> Iterable[Result]:
    begin = time.monotonic()
    name = f"{SUITE}/{unit.relative_to(paths.REPOSITORY)}"
    try:
        done = process.run([TOOL, "-p", database, "--quiet", unit], timeout=SECONDS, check=False, cwd=paths.REPOSITORY, what=f"{TOOL} {unit}")
    except Exception as error:  # the tool is missing, or did not end: the other units continue
        yield wreck(name, error, time.monotonic() - begin)
        return
    yield judged(name, done.returncode, done.stdout, time.monotonic() - begin)


def judged(name: str, status: int, said: str, seconds: float) -> Result:
    """A unit passes if the tool's exit status is 0 and it has printed no finding."""
    findings = [line for line in said.splitlines() if ": error: " in line or ": warning: " in line]
    if status == 0 and not findings:
        return Result(name, "passed", seconds)
    return Result(name, "failed", seconds, findings[0] if findings else f"{TOOL} ended with exit status {status}", said)


def checks(wanted=lambda name: True) -> Iterable[Result]:
    found = commands(paths.BUILD / "host")
    database = paths.BUILD / "host" / "tidy"
    database.mkdir(exist_ok=True)
    paths.write_whole(database / "compile_commands.json", json.dumps(list(found.values())).encode())
    chosen: Sequence[Path] = [unit for unit in found if wanted(f"{SUITE}/{unit.relative_to(paths.REPOSITORY)}")]
    yield from side_by_side([functools.partial(check, database, unit) for unit in chosen], os.cpu_count() or 1)
