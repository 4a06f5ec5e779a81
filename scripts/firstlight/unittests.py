"""Runs a GoogleTest program: many tests per process, and a result for each of them even if one ends its process."""

from __future__ import annotations

import functools
import json
import os
import re
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import process
from .problems import Problem
from .vmtests import Result, side_by_side, wreck

TEST_SECONDS = 60  # per test
LIST_SECONDS = 60
END_SECONDS = 60  # from the last test to the end of the process: static destructors, the leak check
PARTS_EACH = 10  # per processor: with more parts, the one with the longest tests delays the end less, and a process keeps fewer machines that live until its end

BEGIN = re.compile(r"\[ RUN      \] (\S+)$")
END = re.compile(r"\[(       OK |  FAILED  |  SKIPPED )\] (\S+?)(?:, where .*)? \((\d+) ms\)$")
STATUS = {"OK": "passed", "FAILED": "failed", "SKIPPED": "skipped"}


def names(program: Path) -> dict[str, str]:
    """All tests of the program, in its order, with their names in ctest, which contain the parameter's value instead of its number."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "list.json"
        process.run([program, "--gtest_list_tests", f"--gtest_output=json:{file}"], timeout=LIST_SECONDS, what=f"{program} --gtest_list_tests")
        listed = json.loads(file.read_text())
    found = {}
    for suite in listed["testsuites"]:
        for test in suite["testsuite"]:
            name = f"{suite['name']}.{test['name']}"
            numbered = re.fullmatch(r"(.*/)[0-9]+", name)
            found[name] = numbered[1] + test["value_param"] if numbered and test.get("value_param") else name
    return found


def run(program: Path, chosen: Sequence[str], seconds: float, workers: int = 0) -> Iterable[Result]:
    """One result for each selected test; one more for a process that failed after its last test, for example because memory leaked.

    `seconds` bounds the whole; a test that has not run by then fails.
    """
    workers = workers or os.cpu_count() or 1
    deadline = time.monotonic() + seconds
    count = min(len(chosen), workers * PARTS_EACH)
    # Adjacent tests take similar times: distribute them over the parts.
    parts = [functools.partial(surviving, program, list(chosen[first::count]), deadline) for first in range(count)]
    yield from side_by_side(parts, workers)


def surviving(program: Path, left: list[str], deadline: float) -> Iterable[Result]:
    """Runs the tests one after the other, in a new process after each one that ended its process."""
    while left:
        if time.monotonic() >= deadline:
            for name in left:
                yield Result(name, "failed", 0, "not run: the time for all tests was over", tried=False)
            return
        asked = list(left)
        try:
            for result in once(program, asked, deadline):
                if result.name in left:
                    left.remove(result.name)
                yield result
            fault: Exception | None = Problem(f"{program} ended before it ran this test.") if len(left) == len(asked) else None
        except Exception as error:  # the other parts continue
            fault = error
        if fault:
            for name in left or [f"end of the process of {asked[0]}"]:
                yield wreck(name, fault)
            return


def once(program: Path, asked: Sequence[str], deadline: float) -> Iterable[Result]:
    """The results of one process: of the tests that ended, and of the one in which it ended or was killed."""
    with tempfile.TemporaryDirectory() as folder:
        flags = Path(folder) / "flags"  # a command line is too short for all names
        flags.write_text("--gtest_filter=" + ":".join(asked) + "\n")
        command = [program, f"--gtest_flagfile={flags}", "--gtest_color=no", "--gtest_print_time=1", "--gtest_brief=0"]
        waiting = set(asked)
        running, begin, said = "", 0.0, []
        limit = TEST_SECONDS
        late = False
        since = time.monotonic()
        # As if each test ran alone in its process: filters and shards in the environment are ignored.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("GTEST_", "TEST_"))}
        with process.started(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as child:
            rest = b""
            with selectors.DefaultSelector() as selector:
                selector.register(child.stdout, selectors.EVENT_READ)
                while True:
                    left = min(since + limit, deadline) - time.monotonic()
                    if left <= 0 or not selector.select(left):
                        late = True
                        break
                    block = os.read(child.stdout.fileno(), 1 << 16)
                    if not block:
                        break
                    *lines, rest = (rest + block).split(b"\n")
                    for raw in lines:
                        line = raw.decode(errors="replace")
                        said.append(line)
                        began, ended = BEGIN.search(line), END.search(line)
                        if began and began[1] in waiting and began[1] != running:
                            if running:
                                waiting.discard(running)
                                yield Result(running, "failed", time.monotonic() - begin, "the line that says how it ended was not found", "\n".join(said))
                            running, begin, said = began[1], time.monotonic(), [line]
                            since = begin
                        elif ended and ended[2] == running:
                            waiting.discard(running)
                            status = STATUS[ended[1].strip()]
                            yield Result(running, status, int(ended[3]) / 1000, fault(said) if status == "failed" else "", "\n".join(said))
                            running, said, since = "", [], time.monotonic()
                            limit = TEST_SECONDS if waiting else END_SECONDS
            if late:
                process.kill(child)
            else:
                try:
                    child.wait(timeout=max(1.0, min(END_SECONDS, deadline - time.monotonic())))
                except subprocess.TimeoutExpired:
                    late = True
                    process.kill(child)
            status = child.returncode
    said.append(rest.decode(errors="replace"))
    output = "\n".join(said).rstrip("\n")
    how = f"still running after {time.monotonic() - since:.0f} s, ended" if late else ending(status)
    if running:
        yield Result(running, "failed", time.monotonic() - begin, f"{how}: {fault(said)}", output)
    elif late or status not in (0, 1) or waiting or not re.search(r"^\[  (PASSED|FAILED)  \]", output, re.MULTILINE) or leaked(output):
        yield Result(f"end of the process of {asked[0]}", "failed", 0, f"{how}, after its last test: {fault(said)}", output)
    elif status and "[  FAILED  ]" not in output:
        yield Result(f"end of the process of {asked[0]}", "failed", 0, f"{how}, but no test failed", output)


def leaked(output: str) -> bool:
    """Whether a sanitizer reports something after the last test: the exit status alone may be due to a failed test."""
    return bool(re.search(r"^==\d+==\s*ERROR: |runtime error: ", output, re.MULTILINE))


def fault(said: Sequence[str]) -> str:
    """From a test's output, the sanitizer's line or the first lines about the failure."""
    for line in said:
        if re.search(r"^==\d+==\s*ERROR: |runtime error: ", line):
            return line.strip()
    return process.tail("\n".join(line for line in said if line.strip() and not BEGIN.search(line) and not END.search(line)), 6).strip()


def ending(status: int) -> str:
    if status < 0:
        try:
            return f"the process ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"the process ended by signal {-status}"
    return f"the process ended with exit status {status}"
