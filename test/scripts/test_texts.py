"""Printed texts: tables that fit, unique names, messages with what was expected, what was seen and what to do."""

import contextlib
import errno
import io
import json
import os
import re
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from firstlight import apt, bench, launch, nested, paths, process, report, testing, vmtests, workloads, yardstick  # noqa: E402
from firstlight.problems import Exit, Problem  # noqa: E402


class Tables(unittest.TestCase):
    HEADS = ("disk", "driver", "workload", "IOPS", "p99 us", "exit/IO")
    ROWS = (("xvda", "linux-xen-blkfront", "randread 4k qd1", "10173", "129.5", "-"), ("hda", "ata", "read 128k qd8", "4971", "3162.1", "0.125"))

    def columns(self, text):
        """(row's key, head) -> cell, of one or several tables."""
        found = {}
        for part in text.split("\n\n"):
            heads, rule, *rows = part.splitlines()
            starts = [match.span() for match in re.finditer("-+", rule)]
            for row in rows:
                cells = {heads[a:b].strip(): row[a:b].strip() for a, b in starts}
                found |= {(cells["disk"], cells["workload"], head): cell for head, cell in cells.items()}
        return found

    def test_wide_where_it_may_be(self):
        text = report.table(self.HEADS, self.ROWS, 3, (0, 2))
        self.assertEqual(len(text.splitlines()), 4)
        self.assertEqual(report.table(self.HEADS, self.ROWS, 3, (0, 2), 200), text)

    def test_narrow_where_it_must_be_and_nothing_is_lost(self):
        wide = self.columns(report.table(self.HEADS, self.ROWS, 3, (0, 2)))
        for width in range(45, 80):
            text = report.table(self.HEADS, self.ROWS, 3, (0, 2), width)
            self.assertLessEqual(max(map(len, text.splitlines())), width)
            self.assertEqual(self.columns(text), wide, width)

    def test_a_terminal_of_80_columns(self):
        job = {
            "jobname": "x", "read": {"iops": 10173.0, "total_ios": 9, "bw_bytes": 1, "lat_ns": {"mean": 1.0}}, "write": {"iops": 0, "total_ios": 0, "bw_bytes": 0},
            "job options": {"name": "randwrite", "bs": "4096", "iodepth": "32"},
            "firstlight": {"disk": "xvda", "driver": "linux-xen-blkfront", "kind": "synthetic"},
        }  # fmt: skip
        other = {**job, "firstlight": {**job["firstlight"], "kind": "emulated"}}
        for columns, fits in ((80, True), (None, False)):
            with mock.patch.object(report, "terminal", return_value=columns):
                text = "\n".join((report.results([job]), report.ratios([job, other], [job, other]), report.spread(report.median_run([[job], [{**job, "read": {**job["read"], "iops": 9.0}}]] * 6), 1)))
            self.assertEqual(max(map(len, text.splitlines())) <= 80, fits)

    def test_only_a_terminal_is_fitted(self):
        with mock.patch.object(sys, "stdout", io.StringIO()):
            self.assertIsNone(report.terminal())
        shown = mock.Mock(isatty=lambda: True)
        with mock.patch.object(sys, "stdout", shown), mock.patch.dict(os.environ, COLUMNS="80"):
            self.assertEqual(report.terminal(), 80)


class Names(unittest.TestCase):
    def test_each_test_is_named_once(self):
        for words in ([], ["--tap"]):
            out = io.StringIO()
            with (
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(out),
                mock.patch.object(testing.scripttests, "run", return_value=[vmtests.Result("scripts/one", "passed"), vmtests.Result("scripts/two", "skipped", 0, "why")]),
                mock.patch.object(testing.setup, "ensure"),
                mock.patch.object(testing.vmtests, "load", return_value=[]),
            ):
                self.assertIs(testing.main(["--only", "scripts", *words]), Exit.SUCCESS)
            for name in ("scripts/one", "scripts/two"):
                self.assertEqual(out.getvalue().count(name), 1, out.getvalue())
            self.assertEqual("1..2" in out.getvalue().splitlines(), bool(words))


class Progress(unittest.TestCase):
    def test_linux_says_what_it_reached(self):
        found = {"jobs": [{"read": {"iops": 10173.4}, "write": {"iops": 0}}]}
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            live = bench.progress(2, [workloads.Workload("randread", "4k", 1, 5), workloads.Workload("read", "128k", 8, 5)])
            for line in ("noise", "yardstick xvda linux-xen-blkfront 1 io_uring", 'x : Saving output{"jobs": [', json.dumps(found)[10:], "yardstick end", "yardstick hda linux-ata_piix 0 libaio", "failed", "yardstick end"):
                live("linux-xen-emu", line)
        first, second = said.getvalue().splitlines()
        self.assertRegex(first, r"\[1/2\] +[\d.]+ s  Linux xvda read 128k qd8 io_uring: 10173 IOPS$")
        self.assertRegex(second, r"\[2/2\] +[\d.]+ s  Linux hda linux-ata_piix: no readable result$")
        self.assertEqual(yardstick.results("yardstick xvda a 1 libaio\n" + json.dumps(found) + "\nyardstick end")[0][2], 1)


class Failures(unittest.TestCase):
    def test_a_full_disk_is_one_line(self):
        tar = "".join(f"tar: ./usr/{i}: Cannot open: No space left on device\n" for i in range(40))
        said = io.StringIO()
        with contextlib.redirect_stderr(said), self.assertRaises(Problem) as raised:
            process.run(["sh", "-c", f"printf '{tar}'; exit 2"], timeout=20, what="unpacking")
        self.assertEqual(said.getvalue(), "")
        self.assertRegex(str(raised.exception), r"^unpacking: no space left on the disk\. Free \d+ MiB in .*\. Make room there")
        self.assertNotIn("\n", str(raised.exception))

    def test_which_folder_to_move(self):
        for folder, word in ((paths.cache() / "lab", "FIRSTLIGHT_CACHE"), (paths.BUILD / "x", "checkout"), (paths.temporary() / "x", "TMPDIR")):
            with mock.patch.object(paths, "free", return_value=5 << 20), self.assertRaises(Problem) as raised:
                paths.demand_space(folder, 700 << 20, "it")
            self.assertIn(f"about 700 MiB are needed in {folder}, 5 MiB are free", str(raised.exception))
            self.assertIn(word, str(raised.exception))

    def test_errors_of_the_system(self):
        for number, file, words in (
            (errno.ENOSPC, "/x", "no space left"), (errno.EDQUOT, "/x", "no space left"), (errno.EROFS, str(paths.BUILD / "kernel.lock"), "--no-build"),
            (errno.EACCES, str(paths.cache() / "lab/lock"), "FIRSTLIGHT_CACHE"),
            (errno.ENOTDIR, str(paths.cache() / "lab"), "FIRSTLIGHT_CACHE"), (errno.EIO, "/x", "/x: Input/output error"), (errno.ENOSPC, None, "no space left"),
        ):  # fmt: skip
            text = paths.explain(OSError(number, os.strerror(number), file))
            self.assertIn(words, text)
            self.assertNotIn("Errno", text)

    def test_apt_in_one_line(self):
        said = (
            "E: Failed to fetch http://a/InRelease  Temporary failure resolving 'a'\nE: Failed to fetch http://b/InRelease  x\n"
            "E: Some index files failed to download. They have been ignored, or old ones used instead.\n"
        )
        self.assertEqual(apt.reason(said), "Failed to fetch http://a/InRelease  Temporary failure resolving 'a'")
        self.assertEqual(apt.reason("nothing\n"), "apt gave no reason")

    def test_a_guest_that_the_lab_has_no_room_for(self):
        nested.demand_memory(["a"], [256 << 20], [64 << 20])
        with self.assertRaises(Problem) as raised:
            nested.demand_memory(["a"], [1500 << 20], [200 << 20])
        self.assertIn("1500 MiB of memory and 200 MiB of disks do not fit into the lab, which has 1600 MiB", str(raised.exception))

    def test_every_problem_is_a_sentence(self):
        """Messages for the user begin with a capital, a name or a value, and end with a full stop or a quotation of what was seen."""
        for path in sorted((SCRIPTS / "firstlight").glob("*.py")):
            for text in re.findall(r'raise Problem\(\s*f?"([^"]*)"\s*(?:,\s*Exit\.\w+\s*,?\s*)?\)', path.read_text()):
                self.assertRegex(text, r"[.}]$|interrupted$", f"{path.name}: {text}")


class Whole(unittest.TestCase):
    """A file that exists under its final name is complete."""

    def test_written_whole_or_not_at_all(self):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "result.json"
            link = Path(folder) / "link"
            link.symlink_to(file)
            paths.write_whole(file, "old\n")
            with mock.patch.object(os, "fsync", side_effect=OSError(errno.ENOSPC, "full")), self.assertRaises(OSError):
                paths.write_whole(file, "new\n")
            self.assertEqual((file.read_text(), sorted(each.name for each in Path(folder).iterdir())), ("old\n", ["link", "result.json"]))
            paths.write_whole(link, b"new\n")
            self.assertEqual((file.read_text(), link.is_symlink()), ("new\n", True))
            paths.write_whole(Path("/dev/null"), "x")
            self.assertFalse(Path("/dev/null").is_file())
            pipe = Path(folder) / "pipe"
            os.mkfifo(pipe)
            end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
            self.addCleanup(os.close, end)
            paths.write_whole(pipe, "through\n")
            self.assertEqual((os.read(end, 100), pipe.is_fifo()), (b"through\n", True))

    def test_an_archive_cut_short_is_none(self):
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder) / "y.cpio"
            self.assertFalse(yardstick.whole(archive))
            archive.write_bytes(b"0707" * 1000 + b"TRAILER!!!" + bytes(300))
            self.assertTrue(yardstick.whole(archive))
            archive.write_bytes(archive.read_bytes()[:2000])
            self.assertFalse(yardstick.whole(archive))
            archive.write_bytes(b"")
            self.assertFalse(yardstick.whole(archive))

    def test_an_image_of_an_earlier_boot_is_not_looked_at(self):
        with tempfile.TemporaryDirectory() as folder:
            case = vmtests.Case("a", check_images=True, cmdline="job=verify disk=hda")
            described = case.to_machine(Path(folder))
            described.specs[0].bring_out.write_bytes(bytes(4096))
            with mock.patch.object(launch, "run_here", return_value=nested.Outcome(33, "")):
                (boot,) = launch.boot(None, [described])
            boot.log.records.append({"record": "verify", "disk": "hda"})
            self.assertEqual(vmtests.check_images(boot), ["no image of hda was brought out"])

    def test_an_image_is_made_from_the_file_in_its_own_place(self):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "hda.img"
            file.write_bytes(b"mine" * 128)
            launch.make_disk(nested.Disk("hda.img", 512, str(file)), Path(folder))
            self.assertEqual(file.read_bytes(), b"mine" * 128)

    def test_an_image_without_room_is_not_begun_and_one_that_fails_leaves_nothing(self):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            usage = mock.Mock(free=launch.SPARE_BYTES + (3 << 20))
            with mock.patch.object(launch.shutil, "disk_usage", return_value=usage):
                for content in ("pattern", "/a/file"):
                    with self.assertRaisesRegex(Problem, r"its 4 MiB are written into .*, and only 259 MiB are free .*content=sparse"):
                        launch.make_disk(nested.Disk("hda.img", 4 << 20, content), folder)
                launch.make_disk(nested.Disk("hdb.img", 4 << 40, "sparse"), folder)
                launch.make_disk(nested.Disk("hdc.img", 3 << 20, "pattern"), folder)
            with self.assertRaises(FileNotFoundError):
                launch.make_disk(nested.Disk("hdd.img", 512, "/a/file/that/is/not/there"), folder)
            self.assertEqual(sorted(each.name for each in folder.iterdir()), ["hdb.img", "hdc.img"])


if __name__ == "__main__":
    unittest.main()
