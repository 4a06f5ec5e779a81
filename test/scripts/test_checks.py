"""The checks of the sources: each passes on a small valid tree, and fails on an injected fault."""

import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "scripts"))

from firstlight import checks, distribution, outputs, process, testing  # noqa: E402
from firstlight.problems import Exit, Problem  # noqa: E402

README = """# It

[The map](docs/MAP.md#two-words), [here](#it), [far](https://example.org/none), `src/core/a.cppm`, `core/a.cppm`, `hv/NAME.cppm`, `docs/*.md`.

```sh
scripts/run --boot uefi --machine q35  # a comment
FIRSTLIGHT_CACHE=/x sudo scripts/setup --refresh && scripts/test --only 'vm/x*'
```

## Results

| workload | ring | IDE |
|---|---|---|
| randread | 12860 | **0.31** |

## More

`scripts/run --disk` names one; `[no link](nowhere.md)` is code, and so is

```
[no link](nowhere.md) scripts/run --none
```
"""


class Planted(unittest.TestCase):
    def setUp(self):
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))
        for name in ("scripts/run", "scripts/test", "scripts/setup", "scripts/bench", "scripts/cost", ".clang-format"):
            self.write(name, (REPOSITORY / name).read_text())
        self.write("README.md", README)
        self.write("docs/MAP.md", "# Map\n\n## Two `words`\n\n[back](../README.md), [line](../src/core/a.cppm#L1)\n")
        blocks = "".join(f"`{output.command}`\n\n<!-- output of {name} -->\n\n```\nxvda 12860 0.31\n```\n\n" for name, output in outputs.OUTPUTS.items())
        self.write("docs/OUTPUT.md", "# Output\n\n" + blocks)
        self.write("src/core/a.cppm", "export module core.a;\n\nexport int answer() { return 42; }\n")
        self.write(checks.EXAMPLE, "export module drivers.null;\n" + "// line\n" * (checks.EXAMPLE_LINES - 2))
        self.write("src/drivers/acme/disk.cppm", "// line\n" * 200)
        self.write("src/drivers/acme/disk.cpp", "// line\n" * 100)
        self.write("src/drivers/acme/queue.cppm", "// line\n" * 50)
        self.write(checks.ARCHITECTURE, "| driver | lines of the queue half | before |\n|---|---|---|\n| `null` | 99 | – |\n| `acme` | 300 + 50 | – |\n\n")
        self.write("src/hv/b.cppm", "export module hv.b; // " + "é" * 90 + "\n")

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def faults(self, check, **more):
        return check(checks.Tree(self.root), **more).faults

    def git(self, *words, folder=None):
        done = subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main", "-C", str(folder or self.root), *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout.strip()

    def commit(self, subject):
        self.git("commit", "-q", "--allow-empty", "-m", subject)
        return self.git("rev-parse", "HEAD")

    def planted(self, check, name, old, new, words):
        """The check passes; with the fault it fails with these words; without it, it passes again."""
        self.assertEqual(self.faults(check), [])
        good = (self.root / name).read_text(encoding="utf-8")
        self.assertIn(old, good)
        self.write(name, good.replace(old, new))
        faults = self.faults(check)
        self.assertTrue(faults, f"nothing was found with {new!r}")
        self.assertIn(words, faults[0])
        self.write(name, good)
        self.assertEqual(self.faults(check), [])

    def test_format(self):
        self.planted(checks.formatted, "src/core/a.cppm", "int answer() {", "int  answer(){", "src/core/a.cppm:3:11: error: code should be clang-formatted")

    def test_format_without_the_formatter_fails_and_says_what_to_install(self):
        with mock.patch.object(checks.shutil, "which", return_value=None):
            (fault,) = self.faults(checks.formatted)
        self.assertRegex(fault, "clang-format-19 is not installed. Run: sudo apt-get install .*clang-format-19")
        self.assertTrue(all("clang-format-19" in entry.tests for entry in distribution.SUPPORTED.values()))

    def test_format_of_no_files_fails(self):
        shutil.rmtree(self.root / "src")
        self.assertEqual(self.faults(checks.formatted), ["no C++ file was found"])

    def test_columns(self):
        self.planted(checks.columns, "src/core/a.cppm", "\n\n", "\n// " + "x" * 118 + "\n", "src/core/a.cppm:2: 121 columns, at most 120 expected")

    def test_subjects(self):
        for good in ("io.ring: read each index once", "core/x, docs: feed it", "README: say it once", "test.fuzz: bound how long it is", "a: pass \"b.\" on", "m: " + "x" * 69):
            self.assertEqual(checks.subject_fault(good), "", good)
        for bad, words in (
            ("m: " + "x" * 70, "73 characters, at most 72 expected"), ("Add a thing", "`module: imperative` expected"), ("Ring: add it", "`module: imperative` expected"),
            ("ring: add it.", "full stop"), ("ring: Add it", "lower case"), ("ring: added it", "'added'"), ("ring: adds it", "'adds'"), ("ring: fixes it", "'fixes'"),
            ("ring: adding it", "'adding'"), ("ring: the index is read once", "'the'"), ("ring: what is new", "'what'"), ("ring:add it", "`module: imperative` expected"),
        ):  # fmt: skip
            self.assertIn(words, checks.subject_fault(bad), bad)

    def test_commits(self):
        self.git("init", "-q")
        self.commit("Older than the rule.")
        base = self.commit("the base itself.")
        self.commit("ring: read each index once")
        self.assertEqual(self.faults(checks.commits, after=base), [])
        wrong = self.commit("ring: reads each index twice")
        (fault,) = self.faults(checks.commits, after=base)
        self.assertIn(wrong[:10], fault)
        self.assertEqual(self.faults(checks.commits, after=base, allowed=(wrong,)), [])
        self.assertIn("is not in the history", self.faults(checks.commits, after="1" * 40)[0])
        # A shallow clone has no base: the commits it has are checked, and a note says so.
        self.commit("ring: read each index once more")
        for depth, count in (("1", 0), ("2", 1)):
            folder = self.root / f"shallow{depth}"
            self.git("clone", "-q", "--depth", depth, f"file://{self.root}", str(folder))
            found = checks.commits(checks.Tree(folder), after=base)
            self.assertEqual((len(found.faults), found.note), (count, "a shallow clone: only the commits that it has"))

    def test_commits_without_git(self):
        found = checks.commits(checks.Tree(self.root))
        self.assertEqual((found.faults, found.note), ([], "this is no git checkout: no commits to look at"))

    def test_files_are_those_of_git_and_without_it_those_that_are_there(self):
        self.write(".gitignore", "ignored/\n")
        self.write("ignored/x.cpp", "")
        self.write("build/x.cpp", "")
        self.assertIn("ignored/x.cpp", checks.Tree(self.root).files)
        self.assertNotIn("build/x.cpp", checks.Tree(self.root).files)
        self.git("init", "-q")
        self.assertNotIn("ignored/x.cpp", checks.Tree(self.root).files)
        self.assertIn("src/core/a.cppm", checks.Tree(self.root).files)

    def test_links(self):
        for name, old, new, words in (
            ("README.md", "docs/MAP.md#", "docs/NONE.md#", "docs/NONE.md#two-words: there is no docs/NONE.md"),
            ("README.md", "#two-words", "#three-words", "no heading of docs/MAP.md has the anchor #three-words"),
            ("README.md", "(#it)", "(#that)", "no heading of README.md has the anchor #that"),
            ("docs/MAP.md", "../README.md", "README.md", "there is no docs/README.md"),
            ("docs/MAP.md", "../README.md", "../../README.md", "outside of the repository"),
            ("docs/MAP.md", "[back]", '<img src="none.svg"> [back]', "there is no docs/none.svg"),
            ("docs/MAP.md", "#L1", "#L9", "has no such place"),
        ):  # fmt: skip
            self.planted(checks.links, name, old, new, words)

    def test_paths(self):
        for old, new in (
            ("`src/core/a.cppm`", "`src/core/b.cppm`"), ("`core/a.cppm`", "`core/none/`"), ("`hv/NAME.cppm`", "`hv/NAME.S`"), ("`docs/*.md`", "`docs/*.txt`"),
            ("`docs/*.md`", "`none.cpp`"), ("`docs/*.md`", "`src/{core/a,hv/a}.cppm`"),
        ):  # fmt: skip
            self.planted(checks.named, "README.md", old, new, "no such file in the repository")

    def test_commands(self):
        for old, new, words in (
            ("--boot uefi", "--boat uefi", "--boat"), ("--boot uefi", "--boot floppy", "invalid choice: 'floppy'"), ("scripts/setup", "scripts/install", "there is no scripts/install"),
            ("--refresh", "--refresh --no-lab", "--refresh is for the lab"), ("'vm/x*'", "'vm/x*", "the shell cannot read it"),
            ("--machine q35 ", "--boot \\\n floppy", "floppy"), ("scripts/run --disk", "scripts/run --disc", "scripts/run has no option --disc"),
            ("`scripts/run --disk`", "`scripts/none`", "there is no scripts/none"),
        ):  # fmt: skip
            self.planted(checks.commands, "README.md", old, new, words)

    def test_figures(self):
        for name, old, new, words in (
            ("README.md", "12860", "12861", "12861 in the table of results is not a figure of docs/OUTPUT.md"), ("README.md", "**0.31**", "0.32", "0.32 in the table"),
            ("README.md", "12860", "fast", "'fast' in the table of results is not a number"), ("README.md", "## Results", "## Figures", "no table under the heading Results"),
            ("docs/OUTPUT.md", "output of hyperv ", "output of vmbus ", "0 blocks for hyperv"), ("docs/OUTPUT.md", "`scripts/test`", "the tests", "`scripts/test`, which test is the output of"),
            ("docs/OUTPUT.md", "xvda 12860 0.31\n", "", "1 blocks for run, one that is not empty expected"),
            ("docs/OUTPUT.md", "# Output\n", "# Output\n\n<!-- output of more -->\n", "scripts/outputs does not know more"),
        ):  # fmt: skip
            self.planted(checks.figures, name, old, new, words)

    def test_the_smallest_driver_stays_small(self):
        self.planted(checks.example, checks.EXAMPLE, "drivers.null;\n", "drivers.null;\n// one more\n", f"{checks.EXAMPLE} has 100 lines, fewer than 100 expected")
        (self.root / checks.EXAMPLE).unlink()
        self.assertEqual(self.faults(checks.example), [f"there is no {checks.EXAMPLE}"])

    def test_queue_halves_stay_small_and_are_counted(self):
        self.planted(checks.queue_halves, "src/drivers/acme/disk.cpp", "// line\n", "// line\n" * 2, "the queue half of acme has 400 lines, at most 300 expected")
        for old, new, words in (
            ("300 + 50", "299 + 50", "acme has 300 + 50 lines in its queue half, the table says 299 + 50"), ("300 + 50", "300 + 49", "the table says 300 + 49"),
            ("`null` | 99", "`null` | 98", "null has 99 lines"), ("`acme`", "`other`", "there is no src/drivers/other/disk.cppm"), ("| driver |", "| what |", "no table"),
        ):  # fmt: skip
            self.planted(checks.queue_halves, checks.ARCHITECTURE, old, new, words)

    def test_each_is_a_row_and_a_fault_fails_the_run(self):
        rows = list(checks.checks(tree=checks.Tree(self.root)))
        self.assertEqual([row.name for row in rows], [f"checks/{name}" for name in checks.CHECKS])
        self.write("docs/MAP.md", "[x](none.md) `docs/none.md`\n")
        for name in ("links", "paths"):
            (row,) = checks.checks(lambda each, name=name: each == f"checks/{name}", checks.Tree(self.root))
            self.assertEqual((row.name, row.status), (f"checks/{name}", "failed"))
            self.assertIn("none.md", row.detail + row.output)

    def test_part_of_the_run_and_of_the_fast_one(self):
        for words in (["--only", "checks"], ["--fast", "--only", "checks"], ["--only", "checks/links"]):
            with (
                mock.patch.object(testing.setup, "ensure"), mock.patch.object(testing.vmtests, "load", return_value=[]), mock.patch("sys.stdout"), mock.patch("sys.stderr"),
                mock.patch.object(checks, "CHECKS", {name: lambda tree, name=name: checks.Finding(["wrong"] if name == "links" else []) for name in checks.CHECKS}),
            ):  # fmt: skip
                self.assertIs(testing.main(words), Exit.FAILURE, words)


class Outputs(unittest.TestCase):
    """scripts/outputs replaces the block of its command and nothing else, and nothing if the command fails."""

    def setUp(self):
        self.page = Path(self.enterContext(tempfile.TemporaryDirectory())) / "OUTPUT.md"
        self.page.write_text("# Output\n\n" + "".join(f"{name}:\n\n<!-- output of {name} -->\n\n```\nold {name}\n```\n\nmore\n" for name in outputs.OUTPUTS))
        self.enterContext(mock.patch.object(outputs, "PAGE", self.page))
        self.enterContext(mock.patch("sys.stderr"))

    def test_each_in_its_place(self):
        before = self.page.read_text()
        done = subprocess.CompletedProcess([], 0, f"\x1b[1mnew\x1b[0m  \\1\nlab: {Path.home()}/lab\n", "")
        with mock.patch.object(process, "run", return_value=done) as run:
            self.assertIs(outputs.main(["--only", "hyperv"]), Exit.SUCCESS)
        self.assertEqual(run.call_args.args[0], [REPOSITORY / "scripts/bench", "--only", "hyperv", "--yardstick"])
        self.assertEqual(self.page.read_text(), before.replace("old hyperv\n", "new  \\1\nlab: ~/lab\n"))

    def test_what_fails_changes_nothing(self):
        before = self.page.read_text()
        with mock.patch.object(process, "run", side_effect=Problem("no")), self.assertRaises(Problem):
            outputs.main([])
        with mock.patch.object(process, "run", return_value=subprocess.CompletedProcess([], 0, "a\n```\n", "")), self.assertRaisesRegex(Problem, "fence"):
            outputs.main(["--only", "run"])
        self.assertEqual(self.page.read_text(), before)
        self.page.write_text(before.replace("output of run", "output of nothing"))
        with mock.patch.object(process, "run") as run, self.assertRaisesRegex(Problem, "expected one fenced block"):
            outputs.main(["--only", "run"])
        run.assert_not_called()

    def test_what_is_left_out(self):
        steps = [f"  [{step}/6]  {step}.0 s  hda" for step in range(1, 7)]
        self.assertEqual(outputs.first_and_last(["a", *steps, "b"]), ["a", *steps[:4], "…", steps[5], "b"])
        rows = ["result   seconds  test", "passed      0.1  checks/format", "passed      0.1  host/A.b", "failed     10.1  vm/x: why", "build: host", "passed      0.1  build/host", "9 passed"]
        self.assertEqual(outputs.whole_suites(rows), [rows[0], rows[1], "…", rows[5], rows[6]])


if __name__ == "__main__":
    unittest.main()
