"""The reported outcome of a boot: only the guest gives a verdict; everything else has its own words and exit status."""

import contextlib
import io
import json
import sys
import tempfile
import types
import unittest
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from firstlight import bench, launch, machine, nested, paths, problems, records, run, testing, vmtests  # noqa: E402
from firstlight.problems import Exit, Problem  # noqa: E402
from firstlight.records import Verdict  # noqa: E402

SUCCESS = '@{"record":"verdict","verdict":"SUCCESS"}\n'
CRASH = '@{"record":"verdict","verdict":"CRASH","reason":"page fault"}\n'
BANNER = "Firstlight, entered by pvh; image at 0x200000, 1492 KiB\n"
# As printed by QEMU 10.0.
CPUS = "qemu-system-x86_64: Invalid SMP CPUs 9999. The max CPUs supported by machine 'pc-i440fx-10.0' is 255\n"
MEMORY = "qemu-system-x86_64: cannot set up guest memory 'pc.ram': Cannot allocate memory\n"
KERNEL = "qemu-system-x86_64: Error loading uncompressed kernel without PVH ELF Note\n"
ADVICE = "qemu-system-x86_64: -accel kvn: invalid accelerator kvn\nUse -accel help to list them.\n"
WARNING = "qemu-system-x86_64: warning: TCG doesn't support requested feature: CPUID.01H:ECX.pcid [bit 17]\n"
CLI = "--memory: Value 9 not in range 16 to 3072\nRun with --help for more information.\n"

# (output, exit status, timed out) -> the outcome, and a part of its description.
ENDS = [
    ((SUCCESS, 33, False), Verdict.SUCCESS, ""),
    ((CRASH, 41, False), Verdict.CRASH, "page fault"),
    ((BANNER, 41, False), Verdict.CRASH, "no verdict record"),
    ((CPUS, 1, False), Verdict.NOT_STARTED, "Invalid SMP CPUs 9999"),
    ((MEMORY, 1, False), Verdict.NOT_STARTED, "Cannot allocate memory"),
    ((KERNEL, 1, False), Verdict.NOT_STARTED, "without PVH ELF Note"),
    ((ADVICE, 1, False), Verdict.NOT_STARTED, "invalid accelerator"),
    ((WARNING + MEMORY, 1, False), Verdict.NOT_STARTED, "Cannot allocate memory"),
    (("firstlight-testhost: KVM lacks KVM_CAP_HYPERV_TIME\n", 78, False), Verdict.NOT_STARTED, "KVM_CAP_HYPERV_TIME"),
    (("firstlight-testhost: a.elf: no PVH entry\n", 66, False), Verdict.NOT_STARTED, "no PVH entry"),
    ((CLI, 64, False), Verdict.NOT_STARTED, "Value 9 not in range"),
    (("", 1, False), Verdict.NOT_STARTED, "exit status was 1"),
    ((BANNER, None, True), Verdict.TIMEOUT, "no verdict within 7 s"),
    (("", None, True), Verdict.TIMEOUT, "nothing was printed at all: the guest's first serial port (COM1)"),
    ((CRASH, 137, True), Verdict.TIMEOUT, "verdict CRASH was given, but the machine did not end within 7 s"),
    ((BANNER, 72, False), Verdict.TIMEOUT, "no verdict"),
    ((BANNER, 0, False), Verdict.NO_VERDICT, "triple fault"),
    (("", 0, False), Verdict.NO_VERDICT, "triple fault; nothing was printed at all"),
    ((BANNER, 70, False), Verdict.CRASH, "exit status was 70"),
    (("", 70, False), Verdict.CRASH, "exit status was 70"),
    ((BANNER, 1, False), Verdict.NO_VERDICT, "exit status was 1"),
    ((WARNING + BANNER + MEMORY, 1, False), Verdict.NO_VERDICT, "Cannot allocate memory"),
    ((BANNER, -11, False), Verdict.NO_VERDICT, "SIGSEGV"),
    ((BANNER, 137, False), Verdict.NO_VERDICT, "SIGKILL"),
    ((BANNER, None, False), Verdict.NO_VERDICT, "before it had an exit status"),
    ((BANNER + SUCCESS, 39, False), Verdict.NO_VERDICT, "does not agree"),
]


def finished(said, status, timed_out, **more):
    described = machine.Machine("m", timeout=7)
    return launch.finished(described, nested.Outcome(status, said, timed_out=timed_out, **more))


class Ends(unittest.TestCase):
    def test_each_end_has_its_own_word(self):
        for end, verdict, words in ENDS:
            judgement = finished(*end).judgement
            self.assertIs(judgement.verdict, verdict, end)
            self.assertIn(words, judgement.reason, end)
            self.assertEqual("verdict " in judgement.text.partition(":")[0].replace("no verdict", ""), verdict.of_guest, judgement.text)

    def test_a_platform_that_knows_better_says_so(self):
        judgement = finished(BANNER, 0, False, refused="xl: no memory").judgement
        self.assertEqual((judgement.verdict, judgement.reason), (Verdict.NOT_STARTED, "xl: no memory"))

    def test_exit_statuses(self):
        codes = {verdict: int(verdict.exit) for verdict in Verdict}
        self.assertEqual(
            codes,
            {Verdict.SUCCESS: 0, Verdict.FAILURE: 1, Verdict.ERROR: 3, Verdict.SKIP: 4, Verdict.CRASH: 5, Verdict.TIMEOUT: 6,
             Verdict.NOT_STARTED: 8, Verdict.NO_VERDICT: 9},
        )  # fmt: skip
        self.assertEqual(set(problems.EXIT_TEXTS), set(Exit))
        page = (paths.REPOSITORY / "docs/INTERFACES.md").read_text()
        table = page[page.index("## Exit status of the scripts") :]
        for code in Exit:
            self.assertRegex(table, rf"(?m)^\| (\d+, )*{int(code)}[, ]", code)

    def test_where_the_console_was_not_read(self):
        for status, verdict in ((33, Verdict.SUCCESS), (41, Verdict.CRASH), (1, Verdict.NOT_STARTED), (0, Verdict.NO_VERDICT), (-6, Verdict.NO_VERDICT)):
            self.assertIs(records.by_status(status).verdict, verdict, status)

    def test_the_lab_tells_a_time_out_from_a_kill(self):
        for ms, timed_out in ((9000, True), (300, False)):
            reader = nested.Reader("t", ["a"], None, {"a": 9.0})
            for line in ("@@lab t ready", "@@lab t begin a", f"@@lab t end a status=137 ms={ms}"):
                reader.line(line)
            self.assertIs(reader.outcomes["a"].timed_out, timed_out)


class Told(unittest.TestCase):
    """The same, by each script and in each of their outputs."""

    def test_run(self):
        for end, verdict, _ in ENDS:
            said = io.StringIO()
            with (
                contextlib.redirect_stderr(said),
                contextlib.redirect_stdout(io.StringIO()),
                tempfile.NamedTemporaryFile() as kernel,
                mock.patch.object(run.setup, "ensure"),
                mock.patch.object(run.lab, "find"),
                mock.patch.object(run.launch, "boot", return_value=[finished(*end)]),
            ):
                kernel.write(b"\x7fELF")
                kernel.flush()
                self.assertEqual(run.main(["--kernel", kernel.name]), verdict.exit, end)
            self.assertEqual(said.getvalue().splitlines()[-1].startswith("verdict "), verdict.of_guest, said.getvalue())

    def test_bench(self):
        for end, verdict, words in ENDS[1:]:
            with self.assertRaises(Problem) as raised:
                bench.demand(finished(*end))
            self.assertEqual(raised.exception.code, verdict.exit)
            self.assertIn(words, str(raised.exception))

    def results(self):
        return [vmtests.judge(vmtests.Case(f"n{i}"), finished(*end)) for i, (end, _, _) in enumerate(ENDS)]

    def test_a_case_may_expect_any_of_them(self):
        for end, verdict, _ in ENDS:
            result = vmtests.judge(vmtests.Case("a", expect=verdict.value), finished(*end))
            self.assertEqual(result.status, "failed" if end == (BANNER, 41, False) or end[1] == 70 else "passed", end)
            if verdict is not Verdict.SUCCESS:
                self.assertEqual(vmtests.judge(vmtests.Case("a"), finished(*end)).status, "failed", end)

    def test_junit(self):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "junit.xml"
            testing.junit(self.results(), file)
            suite = ElementTree.parse(file).getroot()
        refused = sum(verdict is Verdict.NOT_STARTED for _, verdict, _ in ENDS)
        self.assertEqual((int(suite.get("errors")), int(suite.get("failures"))), (refused, len(ENDS) - refused - 1))
        for case, (_, verdict, words) in zip(suite, ENDS):
            if verdict is not Verdict.SUCCESS:
                (child,) = [child for child in case if child.tag in ("failure", "error")]
                self.assertEqual((child.tag == "error", child.get("type")), (verdict is Verdict.NOT_STARTED, verdict.value))
                self.assertIn(words, child.get("message"))

    def test_tap(self):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            for number, result in enumerate(self.results(), 1):
                testing.tap(result, number)
        blocks = out.getvalue().split("\n  ---\n")[1:]
        self.assertEqual(len(blocks), len(ENDS) - 1)
        for block, (_, verdict, words) in zip(blocks, ENDS[1:]):
            fields = dict(line.strip().split(": ", 1) for line in block.partition("\n  ...")[0].splitlines())
            self.assertIn(words, json.loads(fields["message"]))
            self.assertEqual(json.loads(fields["ended_as"]), verdict.value)
            self.assertEqual(json.loads(fields["severity"]), "error" if verdict is Verdict.NOT_STARTED else "fail")


if __name__ == "__main__":
    unittest.main()
