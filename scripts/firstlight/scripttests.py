"""The scripts' own unit tests, test/scripts. They run in a process of their own, since they replace parts of these modules while scripts/test uses them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
import unittest
from collections.abc import Iterable, Sequence

from . import paths, process, workloads
from .problems import Exit, Problem
from .vmtests import Result

SUITE = "scripts"
SECONDS = 600


def run(only: Sequence[str]) -> Iterable[Result]:
    """One result for each test whose name matches, as it comes."""
    said: list[str] = []
    # Through scripts/firstlight, which ends the children of the tests when it is ended itself.
    with process.started(
        [sys.executable, paths.PACKAGE, "script-tests", *only], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        assert child.stdout
        clock = threading.Timer(SECONDS, process.kill, (child,))
        clock.start()
        try:
            for line in child.stdout:
                try:
                    fields = json.loads(line)
                    result = Result(**fields)
                except (ValueError, TypeError):
                    said.append(line)
                else:
                    yield result
            status = child.wait(timeout=10)
        finally:
            clock.cancel()
    if status:
        raise Problem(f"the process of the scripts' tests ended with exit status {status}, 0 expected: {process.tail(''.join(said), 6)}")


def chosen(only: Sequence[str]) -> Iterable[unittest.TestCase]:
    folder = paths.REPOSITORY / "test" / "scripts"
    waiting: list = [unittest.defaultTestLoader.discover(str(folder), top_level_dir=str(folder))] if folder.is_dir() else []
    while waiting:
        test = waiting.pop(0)
        if isinstance(test, unittest.TestSuite):
            waiting[:0] = list(test)
        elif not only or any(workloads.matches(SUITE, pattern) or workloads.matches(f"{SUITE}/{test.id()}", pattern) for pattern in only):
            yield test


def tried(test: unittest.TestCase) -> Result:
    begin = time.monotonic()
    outcome = unittest.TestResult()
    test.run(outcome)
    faults = [text for _, text in outcome.errors + outcome.failures]
    status = "failed" if faults else "skipped" if outcome.skipped else "passed"
    return Result(f"{SUITE}/{test.id()}", status, time.monotonic() - begin, faults[0].strip().splitlines()[-1] if faults else "", "\n".join(faults))


def main(words: Sequence[str]) -> Exit:
    """Runs in the process of its own: prints one result per line."""
    for test in chosen(words):
        result = json.dumps(dataclasses.asdict(tried(test)))
        print(f"\n{result}", flush=True)  # on a line of its own, after any output of the test
    return Exit.SUCCESS
