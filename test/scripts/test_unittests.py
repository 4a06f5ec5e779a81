"""Many unit tests in one process: each has its result, regardless of what another one does to the process."""

import sys
import tempfile
import textwrap
import time
import unittest
from pathlib import Path
from unittest import mock

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from firstlight import unittests  # noqa: E402

# A program that behaves like GoogleTest's. A test's name determines its behaviour; `journal` records the tests of each process.
PROGRAM = """\
#!{python}
import json, os, signal, sys, time
TESTS = {tests!r}
options = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:] if "=" in word)
if "--gtest_list_tests" in sys.argv:
    suites = {{}}
    for test in TESTS:
        suite, name = test.split(".")
        suites.setdefault(suite, []).append({{"name": name, "value_param": "80"}} if name.endswith("/0") else {{"name": name}})
    with open(options["gtest_output"].removeprefix("json:"), "w") as file:
        json.dump({{"testsuites": [{{"name": suite, "testsuite": found}} for suite, found in suites.items()]}}, file)
    sys.exit()
chosen = open(options["gtest_flagfile"]).read().strip().removeprefix("--gtest_filter=").split(":")
with open({journal!r}, "a") as file:
    file.write(" ".join(chosen) + "\\n")
print("Running main() from gtest_main.cc")
failed = leak = False
for test in TESTS:
    if test not in chosen or "DISABLED" in test:
        continue
    if "Unborn" in test:
        os.abort()
    print(f"[ RUN      ] {{test}}", flush=True)
    if "Crash" in test:
        print("==7==ERROR: AddressSanitizer: heap-use-after-free on address 0x1", flush=True)
        os.abort()
    if "Killed" in test:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "Exit" in test:
        sys.stdout.flush()
        os._exit(0)
    if "Hang" in test:
        print("waiting", flush=True)
        time.sleep(600)
    leak = leak or "Leak" in test
    if "Torn" in test:
        print("no end of line", end="")
    if "Fail" in test:
        failed = True
        print("a_test.cpp:7: Failure\\nExpected equality of these values:\\n  1\\n  2")
        print(f"[  FAILED  ] {{test}}, where GetParam() = 8-byte object <00-00> (5 ms)", flush=True)
    elif "Skip" in test:
        print(f"[  SKIPPED ] {{test}} (0 ms)", flush=True)
    else:
        print(f"[       OK ] {{test}} (12 ms)", flush=True)
print("[  FAILED  ] 1 test, listed below:" if failed else "[  PASSED  ] all tests.", flush=True)
if leak:
    print("==7==ERROR: LeakSanitizer: detected memory leaks")
sys.exit(1 if failed or leak else 0)
"""


class Results(unittest.TestCase):
    def run_tests(self, *tests, seconds=60.0, each=30.0, workers=1, chosen=None):
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(unittests, "TEST_SECONDS", each):
            program, journal = Path(folder) / "tests", Path(folder) / "journal"
            program.write_text(textwrap.dedent(PROGRAM.format(python=sys.executable, tests=list(tests), journal=str(journal))))
            program.chmod(0o755)
            self.names = unittests.names(program)
            self.assertEqual(list(unittests.names(program)), list(tests))
            found = list(unittests.run(program, chosen or tests, seconds, workers))
            self.processes = journal.read_text().splitlines() if journal.is_file() else []
        return found

    def in_one_part(self, *tests, **more):
        with mock.patch.object(unittests, "PARTS_EACH", 1):
            return self.run_tests(*tests, **more)

    def statuses(self, found):
        return {result.name: result.status for result in found}

    def test_each_test_has_its_own(self):
        tests = ("A.Good", "A.TornLine", "A.Fail", "A.Skip", "All/B.Good/one")
        found = self.in_one_part(*tests)
        self.assertEqual([result.name for result in found], list(tests))
        self.assertEqual([result.status for result in found], ["passed", "passed", "failed", "skipped", "passed"])
        self.assertEqual(found[0].seconds, 0.012)
        self.assertIn("Expected equality", found[2].detail)
        self.assertNotIn("Good", found[2].output)
        self.assertEqual(len(self.processes), 1)

    def test_only_what_is_chosen_is_run(self):
        self.assertEqual(self.statuses(self.run_tests("A.One", "A.Two", chosen=["A.Two"])), {"A.Two": "passed"})
        self.assertEqual(self.processes, ["A.Two"])

    def test_a_parameter_without_a_name_is_shown_by_its_value(self):
        self.assertEqual(self.statuses(self.run_tests("A.Good/0", "A.Good/one")), {"A.Good/0": "passed", "A.Good/one": "passed"})
        self.assertEqual(self.names, {"A.Good/0": "A.Good/80", "A.Good/one": "A.Good/one"})

    def test_the_tests_are_shared_between_processors(self):
        tests = [f"A.Good{number}" for number in range(40)]
        found = self.run_tests(*tests, workers=2)
        self.assertEqual(sorted(result.name for result in found), sorted(tests))
        self.assertEqual(len(self.processes), 2 * unittests.PARTS_EACH)
        self.assertEqual(sorted(" ".join(self.processes).split()), sorted(tests))

    def test_one_that_ends_the_process_fails_alone(self):
        for name, words in (("A.Crash", "heap-use-after-free"), ("A.Killed", "SIGSEGV"), ("A.Exit", "exit status 0")):
            found = self.in_one_part("A.First", name, "A.Last")
            self.assertEqual(self.statuses(found), {"A.First": "passed", name: "failed", "A.Last": "passed"})
            self.assertIn(words, found[1].detail)
            self.assertIn(f"[ RUN      ] {name}", found[1].output)
            self.assertEqual(self.processes, [f"A.First {name} A.Last", "A.Last"])

    def test_one_that_hangs_fails_alone_and_in_time(self):
        begin = time.monotonic()
        found = self.in_one_part("A.First", "A.Hang", "A.Last", each=2)
        self.assertEqual(self.statuses(found), {"A.First": "passed", "A.Hang": "failed", "A.Last": "passed"})
        self.assertRegex(found[1].detail, "^still running after [0-9]+ s, ended: waiting$")
        self.assertLess(time.monotonic() - begin, 40)

    def test_the_time_for_all_of_them_is_bounded(self):
        found = self.in_one_part("A.Hang", "A.Last", seconds=2)
        self.assertEqual(self.statuses(found), {"A.Hang": "failed", "A.Last": "failed"})
        self.assertIn("not run", found[1].detail)

    def test_a_leak_at_the_end_is_a_failure_also_beside_another(self):
        for tests in (("A.Leak", "A.Good"), ("A.Leak", "A.Fail")):
            found = self.in_one_part(*tests)
            self.assertEqual(len(found), 3, tests)
            self.assertEqual(found[2].status, "failed")
            self.assertIn("LeakSanitizer", found[2].detail)

    def test_a_fault_of_the_script_leaves_no_test_out(self):
        with mock.patch.object(unittests, "ending", side_effect=OSError("broken")):
            found = self.in_one_part("A.First", "A.Crash", "A.Last")
            self.assertEqual(self.statuses(found), {"A.First": "passed", "A.Crash": "failed", "A.Last": "failed"})
            self.assertEqual([result.status for result in self.in_one_part("A.First")], ["passed", "failed"])

    def test_what_was_never_run_has_failed(self):
        for name in ("A.DISABLED_Good", "A.Unborn"):
            found = self.in_one_part("A.First", name)
            self.assertEqual({result.name: result.status for result in found if result.name.startswith("A.")}, {"A.First": "passed", name: "failed"})


if __name__ == "__main__":
    unittest.main()
