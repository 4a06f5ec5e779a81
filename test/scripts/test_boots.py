"""What scripts/test runs beside what: which parts the boots are made of, which of them begin early, and that none is lost."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from unittest import mock

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from firstlight import launch, nested, process, scripttests, testing, vmtests  # noqa: E402
from firstlight.problems import Problem  # noqa: E402
from firstlight.vmtests import Boots, Case, Part, Result  # noqa: E402

DEADLINE = 20


def names(results):
    return sorted(result.name for result in results)


class Planned(unittest.TestCase):
    """vmtests.plan: which cases share a part."""

    def plan(self, cases, nested_ones=True):
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(vmtests.paths, "RUNS", Path(folder)),
            mock.patch.object(launch, "place", return_value=launch.Place(nested_ones, "")),
        ):
            return vmtests.plan(None, cases, "auto", lambda text: None)

    def parts(self, cases, nested_ones=True):
        """Names, and the names of their cases."""
        return {part.name: [case.name for case in part.run.args[1]] for part in self.plan(cases, nested_ones).waiting}

    def test_counted_time_has_parts_of_its_own(self):
        cases = [Case("a", "kvm"), Case("b", "kvm", deterministic=True), Case("c", "kvm"), Case("d", "kvm", boot="uefi", deterministic=True), Case("e", "xen-pvh")]
        self.assertEqual(
            self.parts(cases), {"lab-xen-0": ["e"], "lab-deterministic-0": ["b"], "lab-deterministic-uefi-0": ["d"], "lab-wall-0": ["a", "c"]}
        )
        self.assertEqual({part.name: part.counted for part in self.plan(cases).waiting}["lab-deterministic-0"], True)
        self.assertEqual([part.name for part in self.plan(cases).waiting if part.counted], ["lab-deterministic-0", "lab-deterministic-uefi-0"])
        self.assertTrue(all(part.lab for part in self.plan(cases).waiting))

    def test_what_is_paused_for_long_in_counted_time_has_a_start_of_its_own(self):
        cases = [
            Case("busy", "kvm", deterministic=True, pause=[nested.Pause("x", 3)]), Case("wall", "kvm", pause=[nested.Pause("x", 60)]),
            Case("paused", "kvm", deterministic=True, pause=[nested.Pause("x", 7), nested.Pause("y", 60)]),
        ]  # fmt: skip
        self.assertEqual(self.parts(cases), {"lab-deterministic-idle-0": ["paused"], "lab-deterministic-0": ["busy"], "lab-wall-0": ["wall"]})
        self.assertEqual([part.name for part in self.plan(cases).waiting if part.idle], ["lab-deterministic-idle-0"])
        self.assertTrue(all(part.counted for part in self.plan(cases).waiting if part.idle))

    def test_a_start_takes_no_more_cases_than_its_memory_holds(self):
        parts = self.parts([Case(f"c{number}", "kvm") for number in range(vmtests.START_CASES + 1)])
        self.assertEqual([len(part) for part in parts.values()], [vmtests.START_CASES, 1])

    def test_without_the_lab_what_sleeps_begins_first(self):
        cases = [
            Case("quick"), Case("time-out", expect="TIMEOUT", timeout=4), Case("other"), Case("another"), Case("fifth"),
            Case("paused", pause=[nested.Pause("x", 3), nested.Pause("y", 2)]), Case("long-but-busy", timeout=90),
        ]  # fmt: skip
        parts = self.parts(cases, nested_ones=False)
        self.assertEqual(len(parts), vmtests.HERE_PARTS)
        self.assertEqual([parts["here-0"][0], parts["here-1"][0]], ["paused", "time-out"])
        self.assertEqual(sorted(sum(parts.values(), [])), sorted(case.name for case in cases))
        self.assertFalse(any(part.lab or part.counted for part in self.plan(cases, False).waiting))

    def test_a_case_without_a_place_is_a_result(self):
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(vmtests.paths, "RUNS", Path(folder)), mock.patch.object(launch, "place", side_effect=Problem("no")):
            boots = vmtests.plan(None, [Case("one")], "auto", lambda text: None)
        self.assertEqual([(result.name, result.status) for result in boots.ready()], [("one", "failed")])

    def test_of_the_real_tables_every_case_is_in_one_part(self):
        cases = vmtests.load()
        for nested_ones in (True, False):
            self.assertEqual(sorted(sum(self.parts(cases, nested_ones).values(), [])), sorted(case.name for case in cases))

    def test_memory_bounds_the_starts(self):
        for gibibytes, expected in ((1, 1), (5, 1), (8, 2), (12, 4), (24, vmtests.AT_ONCE), (500, vmtests.AT_ONCE)):
            self.assertEqual(vmtests.labs_at_once(gibibytes << 30), expected, gibibytes)
        self.assertGreater(vmtests.available_memory(), 1 << 20)


class Run(unittest.TestCase):
    """vmtests.Boots: in which order, how many at once."""

    def setUp(self):
        self.log = []
        self.lock = threading.Lock()
        self.alive = self.most = 0

    def part(self, name, wait=None, seconds=0.0, fails=None, **more):
        def run():
            with self.lock:
                self.log.append(name)
                self.alive += 1
                self.most = max(self.most, self.alive)
            try:
                if wait:
                    self.assertTrue(wait.wait(DEADLINE))
                time.sleep(seconds)
                yield Result(name, "passed")
                if fails:
                    raise fails
                yield Result(f"{name}-2", "passed")
            finally:
                with self.lock:
                    self.alive -= 1

        return Part(name, run, **more)

    def until(self, condition):
        end = time.monotonic() + DEADLINE
        while not condition():
            self.assertLess(time.monotonic(), end)
            time.sleep(0.01)

    def test_counted_parts_begin_early_and_alone(self):
        with Boots([self.part("wall"), self.part("one", counted=True), self.part("two", counted=True)], 2) as boots:
            boots.begin()
            found = []
            self.until(lambda: found.extend(boots.ready()) or len(found) == 4)
            self.assertEqual(self.log, ["one", "two"])
            self.assertEqual(self.most, 1)
            found += boots.rest()
        self.assertEqual(names(found), ["one", "one-2", "two", "two-2", "wall", "wall-2"])

    def test_those_that_sleep_begin_early_beside_the_others(self):
        gate = threading.Event()
        parts = [self.part("one", wait=gate, counted=True), self.part("two", counted=True), self.part("asleep", wait=gate, counted=True, idle=True)]
        with Boots(parts, 1) as boots:
            boots.begin()
            self.until(lambda: self.alive == 2)
            self.assertEqual(set(self.log), {"one", "asleep"})
            self.assertEqual(self.most, 2)
            gate.set()
            found = list(boots.rest())
        self.assertEqual(names(found), ["asleep", "asleep-2", "one", "one-2", "two", "two-2"])

    def test_without_a_beginning_all_come_in_the_end_and_wall_clock_time_first(self):
        with Boots([self.part("counted", counted=True), self.part("wall")], 1) as boots:
            self.assertEqual(names(boots.rest()), ["counted", "counted-2", "wall", "wall-2"])
        self.assertEqual(self.log, ["wall", "counted"])

    def test_in_the_end_no_further_part_begins_at_low_priority(self):
        first, wall = threading.Event(), threading.Event()
        threads = []

        def second():
            threads.append(threading.current_thread().name)
            yield Result("two", "passed")

        parts = [self.part("one", wait=first, counted=True), Part("two", second, counted=True), self.part("wall", wait=wall)]
        with Boots(parts, 1) as boots:
            boots.begin()
            self.until(lambda: self.log)
            timers = [threading.Timer(seconds, event.set) for seconds, event in ((0.3, first), (1.5, wall))]
            for timer in timers:
                timer.start()
            self.assertEqual(names(boots.rest()), ["one", "one-2", "two", "wall", "wall-2"])
        self.assertEqual(threads, ["boots-1"])  # boots-0 is the one at low priority

    def test_what_is_ready_is_not_waited_for(self):
        gate = threading.Event()
        with Boots([self.part("counted", wait=gate, counted=True)], 1) as boots:
            boots.begin()
            self.until(lambda: self.log)
            self.assertEqual(list(boots.ready()), [])
            gate.set()
            self.assertEqual(names(boots.rest()), ["counted", "counted-2"])

    def test_further_parts_come_before_those_without_the_lab(self):
        with Boots([self.part("lab-wall-0"), self.part("here-0"), self.part("here-1")], 1) as boots:
            list(boots.rest([self.part("more")]))
        self.assertEqual(self.log, ["lab-wall-0", "more", "here-0", "here-1"])

    def test_no_more_starts_of_the_lab_than_there_is_room_for(self):
        parts = [self.part(f"wall-{number}", seconds=0.05, lab=True) for number in range(6)] + [self.part("counted", seconds=0.2, lab=True, counted=True)]
        with Boots(parts, 4, labs=2) as boots:
            boots.begin()
            self.assertEqual(len(list(boots.rest())), 14)
        self.assertEqual(self.most, 2)

    def test_as_many_at_once_as_there_are_workers_and_one_in_counted_time(self):
        gate = threading.Event()
        parts = [self.part(f"wall-{number}", wait=gate) for number in range(4)] + [self.part("counted", wait=gate, counted=True)]
        with Boots(parts, 2) as boots:
            boots.begin()
            self.until(lambda: self.alive == 1)
            rest = iter(boots.rest())
            opener = threading.Timer(0.5, gate.set)
            opener.start()
            self.assertEqual(len(list(rest)), 10)
            opener.join()
        self.assertEqual(self.most, 3)
        self.assertEqual(self.log[0], "counted")

    def test_a_part_that_breaks_down_is_reported_and_the_others_go_on(self):
        parts = [self.part("bad", fails=OSError("broken"), counted=True), self.part("good", counted=True), self.part("worse", fails=Problem("no")), self.part("fine")]
        with Boots(parts, 1) as boots:
            boots.begin()
            found = {}
            for result in boots.rest():
                found.setdefault(result.name, []).append(result)
        self.assertEqual({name: [result.status for result in results] for name, results in found.items()}, {
            "bad": ["passed", "failed"], "good": ["passed"], "good-2": ["passed"], "worse": ["passed", "failed"], "fine": ["passed"], "fine-2": ["passed"],
        })  # fmt: skip
        self.assertIn("broken", found["bad"][1].detail)

    def test_an_end_before_the_time_ends_every_child(self):
        script = (
            "import sys, time; sys.path.insert(0, sys.argv[1])\n"
            "from firstlight import process, vmtests\n"
            "def part():\n"
            "    yield vmtests.Result('first', 'passed')\n"
            "    process.run(['sleep', '600'], timeout=500)\n"
            "with vmtests.Boots([vmtests.Part('a', part, counted=True), vmtests.Part('b', part)], 1) as boots:\n"
            "    boots.begin()\n"
            "    for result in boots.rest():\n"
            "        time.sleep(0.5)\n"
            "        raise KeyboardInterrupt\n"
        )
        begin = time.monotonic()
        done = subprocess.run([sys.executable, "-c", script, str(SCRIPTS)], capture_output=True, text=True, timeout=60)
        self.assertIn("KeyboardInterrupt", done.stderr)
        self.assertLess(time.monotonic() - begin, 30)


class Suites(unittest.TestCase):
    """testing.Boots: each case has one result, by its name in scripts/test."""

    def test_a_case_that_its_part_left_is_a_failure(self):
        boots = testing.Boots([Case("one"), Case("two")], "auto")
        left = vmtests.Boots([Part("here-0", lambda: [Result("one", "passed")])], 1)
        with boots, mock.patch.object(testing.lab, "find"), mock.patch.object(vmtests, "plan", return_value=left):
            boots.begin()
            found = {result.name: result.status for result in boots.rest([Part("fio", lambda: [Result("fio/bench", "passed")])])}
        self.assertEqual(found, {"vm/one": "passed", "vm/two": "failed", "fio/bench": "passed"})

    def test_without_a_kernel_none_is_run(self):
        with testing.Boots([Case("one")], "auto") as boots:
            self.assertEqual(list(boots.ready()), [])
            (result,) = boots.rest([])
        self.assertEqual((result.name, result.status, result.detail), ("vm/one", "failed", "The kernel was not built."))


class Priority(unittest.TestCase):
    def test_children_of_the_thread_give_way_and_those_of_others_do_not(self):
        nice = {}

        # The group's priority is set from outside when the child already runs: it looks until it is another one, or for a second.
        look = (
            "import os, pathlib, time\n"
            "end = time.monotonic() + float({seconds})\n"
            "group = lambda: (pathlib.Path('/proc/self/autogroup').read_text().split() or ['x'])[-1] if os.path.exists('/proc/self/autogroup') else 'x'\n"
            "while group() == '0' and time.monotonic() < end: time.sleep(0.05)\n"
            "print(os.nice(0), group())\n"
        )

        def child(name, seconds):
            said = process.run([sys.executable, "-c", look.format(seconds=seconds)], timeout=DEADLINE).stdout.split()
            nice[name], nice[f"{name} group"] = int(said[0]), None if said[1] == "x" else int(said[1])

        def low_priority():
            process.lower_priority()
            child("one", 10)

        for work in (low_priority, lambda: child("other", 1)):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join(DEADLINE)
        self.assertEqual(nice["one"], 19)
        self.assertEqual(nice["other"], os.nice(0))
        if nice["other group"] is not None:  # where Linux groups sessions
            self.assertEqual((nice["one group"], nice["other group"]), (19, 0))

    @unittest.skipIf(os.geteuid(), "only root may raise a priority")
    def test_a_child_under_way_gives_way_no_longer(self):
        seen = []

        def low_priority():
            process.lower_priority()
            with process.started(["sleep", str(DEADLINE)]) as child:
                seen.append(os.getpriority(os.PRIO_PROCESS, child.pid))
                process.restore_priority()
                seen.append(os.getpriority(os.PRIO_PROCESS, child.pid))

        thread = threading.Thread(target=low_priority)
        thread.start()
        thread.join(DEADLINE)
        self.assertEqual(seen, [19, os.nice(0)])

    def test_the_rest_is_in_a_hurry(self):
        with mock.patch.object(process, "restore_priority") as restore_priority, Boots([], 1) as boots:
            boots.begin()
            restore_priority.assert_not_called()
            list(boots.rest())
            restore_priority.assert_called_once()


class Limits(unittest.TestCase):
    """In counted time a start of the lab is bounded by what it computes."""

    def follow(self, script, limit, counted):
        reader = nested.Reader("tag", ["job"])
        begin = time.monotonic()
        nested.follow([sys.executable, "-c", script], reader, limit, counted=counted)
        return reader.late, time.monotonic() - begin

    def test_a_start_that_waits_is_not_ended_and_one_that_computes_is(self):
        sleeps, computes = "import time; time.sleep(3)", "while True: pass"
        self.assertEqual(self.follow(sleeps, 1, counted=True)[0], False)
        self.assertEqual(self.follow(sleeps, 1, counted=False)[0], True)
        self.assertEqual(self.follow(computes, 1, counted=True)[0], True)

    def test_and_in_the_end_by_the_clock(self):
        with mock.patch.object(nested, "QUEUE_SECONDS", 0.5):
            late, seconds = self.follow("import time; time.sleep(60)", 0.5, counted=True)
        self.assertTrue(late)
        self.assertLess(seconds, 30)

    def test_of_a_process_that_is_gone_nothing_is_known(self):
        self.assertEqual(process.processor_seconds(1 << 30), 0.0)


class Own(unittest.TestCase):
    """scripttests: the tests here run in a process of their own."""

    def test_results_come_one_a_line_whatever_a_test_prints(self):
        said = ["print('noise', end='')", *(f"print('\\n' + {line!r})" for line in ('{"name": "scripts/a", "status": "passed"}', '{"name": "scripts/b", "status": "failed", "detail": "x"}', "[1]"))]
        found, fault = self.run_child("; ".join(said))
        self.assertEqual([(result.name, result.status) for result in found], [("scripts/a", "passed"), ("scripts/b", "failed")])
        self.assertIsNone(fault)

    def test_an_end_that_went_wrong_is_a_fault(self):
        found, fault = self.run_child("""print('{"name": "scripts/a", "status": "passed"}'); import sys; sys.exit('the last words')""")
        self.assertEqual(len(found), 1)
        self.assertIn("the last words", str(fault))

    def test_a_hung_one_is_ended(self):
        with mock.patch.object(scripttests, "SECONDS", 1):
            found, fault = self.run_child("import time; time.sleep(60)")
        self.assertIsNotNone(fault)

    def run_child(self, script):
        started = process.started
        found, fault = [], None
        with mock.patch.object(process, "started", lambda command, **options: started([sys.executable, "-c", script], **options)):
            try:
                for result in scripttests.run([]):
                    found.append(result)
            except Problem as problem:
                fault = problem
        return found, fault

    def test_what_a_test_prints_does_not_hide_its_result(self):
        class Noisy(unittest.TestCase):
            def prints(self):
                print("no line feed", end="")

        out = io.StringIO()
        with mock.patch.object(scripttests, "chosen", return_value=[Noisy("prints")]), contextlib.redirect_stdout(out):
            scripttests.main([])
        self.assertEqual(json.loads(out.getvalue().splitlines()[-1])["status"], "passed")

    def test_chosen_by_suite_or_name(self):
        own = f"scripts/{self.id()}"
        self.assertIn(self.id(), {test.id() for test in scripttests.chosen(["scripts"])})
        self.assertEqual([test.id() for test in scripttests.chosen([own])], [self.id()])
        self.assertEqual(list(scripttests.chosen(["vm/*"])), [])

    def test_a_result_says_how_a_test_ended(self):
        class Sample(unittest.TestCase):
            def passes(self):
                pass

            def fails(self):
                self.fail("why")

            def skips(self):
                self.skipTest("absent")

        found = {name: scripttests.tried(Sample(name)) for name in ("passes", "fails", "skips")}
        self.assertEqual([found[name].status for name in found], ["passed", "failed", "skipped"])
        self.assertIn("why", found["fails"].detail)
        self.assertTrue(all(dataclasses.asdict(result) for result in found.values()))


if __name__ == "__main__":
    unittest.main()
