"""scripts/firstlight/ensemble.py and comparison.py: intervals, modes, and whether two sets of runs differ."""

import json
import random
import statistics
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from firstlight import comparison, ensemble
from firstlight.ensemble import Row
from firstlight.problems import Problem


def runs(seed, count, centre=45000.0, spread=0.02, two_modes=False):
    """IOPS as they are drawn at depth 32: around a centre, or around two."""
    source = random.Random(seed)
    return [centre * (0.8 if two_modes and source.random() < 0.3 else 1.0) * source.gauss(1, spread) for _ in range(count)]


class Intervals(unittest.TestCase):
    def test_holds_the_true_median_as_often_as_it_says(self):
        held = 0
        for seed in range(60):
            found = ensemble.interval(runs(seed, 16), 1)
            held += found.low <= 45000 <= found.high
        self.assertGreaterEqual(held, 51)

    def test_runs_that_agree_have_no_width(self):
        self.assertEqual(ensemble.interval([8807.0] * 7, 1), ensemble.Interval(8807.0, 8807.0))
        self.assertEqual(ensemble.interval([8807.0], 1), ensemble.Interval(8807.0, 8807.0))

    def test_a_ratio_resamples_both_sides(self):
        found = ensemble.ratio_interval(runs(1, 32, 60000), runs(2, 32, 40000), 1)
        self.assertTrue(1.45 < found.low < 1.5 < found.high < 1.55, found)
        self.assertEqual(found, ensemble.ratio_interval(runs(1, 32, 60000), runs(2, 32, 40000), 1))

    def test_sensitivity(self):
        self.assertEqual(ensemble.sensitivity([5.0]), 0)
        self.assertAlmostEqual(ensemble.sensitivity([float(value) for value in range(90, 111)]), 0.16)

    def test_two_modes(self):
        self.assertEqual(ensemble.modes([1.0, 1.01, 0.8, 0.81, 1.02]), [[1.0, 1.01, 1.02], [0.8, 0.81]])
        self.assertEqual(len(ensemble.modes([1.0, 1.01, 1.02, 1.03, 0.8])), 1)  # a single run is no mode
        self.assertEqual(len(ensemble.modes(runs(3, 32))), 1)
        self.assertEqual(ensemble.modes([7.0]), [[7.0]])


class Differences(unittest.TestCase):
    def verdict(self, before, after):
        return ensemble.compare([Row("row", before, after)], 1)[0]

    def test_nothing_changed(self):
        """At most one false alarm in twenty, also where the runs fall into two modes."""
        for two_modes in (False, True):
            alarms = sum(
                self.verdict(runs(f"{seed} a", 32, two_modes=two_modes), runs(f"{seed} b", 32, two_modes=two_modes)).verdict in ("faster", "slower") for seed in range(20)
            )
            self.assertLessEqual(alarms, 1)

    def test_three_per_cent_are_found(self):
        found = [self.verdict(runs(f"{seed} a", 32), runs(f"{seed} b", 32, 45000 * 0.97)).verdict for seed in range(20)]
        self.assertGreaterEqual(found.count("slower"), 16)
        self.assertNotIn("faster", found)

    def test_many_rows_are_corrected_for(self):
        rows = [Row(str(row), runs(f"{row} a", 16), runs(f"{row} b", 16)) for row in range(40)]
        self.assertLessEqual(sum(change.verdict in ("faster", "slower") for change in ensemble.compare(rows, 1)), 1)
        # A row that is a change alone is not one as the best of many.
        first = Row("first", runs("3 x", 16), runs("3 y", 16, 45000 * 0.975))
        alone, among = ensemble.compare([first], 1)[0], ensemble.compare([first, *rows], 1)[0]
        self.assertTrue(0.05 / 41 < alone.p < 0.05 and alone.verdict == "slower", alone)
        self.assertTrue(among.p > 0.05 and among.verdict != "slower", among)
        self.assertEqual(ensemble.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
        self.assertEqual(ensemble.holm([0.5, 0.9]), [1.0, 1.0])

    def test_words(self):
        self.assertRegex(self.verdict(runs(1, 32), runs(2, 32, 49500)).text, r"^faster \d\.\d to 1\d\.\d %$")
        self.assertRegex(self.verdict(runs(1, 32), runs(2, 32)).text, r"^same within [0-4]\.\d %$")
        self.assertRegex(self.verdict(runs(1, 8, two_modes=True, spread=0.1), runs(2, 8, spread=0.1)).text, r"^cannot tell, \d+ runs of each needed$")

    def test_few_runs_tell_nothing(self):
        for count in (1, ensemble.FEWEST - 1):
            self.assertEqual(self.verdict(runs(1, count), runs(2, count, 90000)).verdict, "unknown")
        self.assertEqual(self.verdict([90000.0], [45000.0]).needed, ensemble.FEWEST)

    def test_exact_figures(self):
        self.assertEqual(self.verdict([100.0] * 8, [100.0] * 8).text, "same within 0.0 %")
        self.assertEqual(self.verdict([100.0] * 8, [103.0] * 8).text, "faster 3.0 to 3.0 %")
        self.assertEqual(self.verdict([100.0] * 8, [101.0] * 8).verdict, "same")

    def test_another_shape_with_the_same_mean_is_seen_and_is_no_change(self):
        source = random.Random(5)
        before, after = runs(1, 65, spread=0.002), [45000.0 + change for change in (*(source.choice((-1, 1)) * 800 for _ in range(64)), 0)]
        self.assertLess(ensemble.p_value(before, after, 1), 0.01)
        self.assertNotIn(self.verdict(before, after).verdict, ("faster", "slower"))

    def test_needed_runs_follow_the_spread(self):
        few, many = (ensemble.runs_needed([runs(1, 64, spread=spread)]) for spread in (0.02, 0.08))
        self.assertTrue(12 <= few <= 20 and many > 10 * few, (few, many))


class Files(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def file(self, name, disks, **context):
        jobs = [
            {
                "job options": {"name": "randread", "bs": "4k", "iodepth": "32", "numjobs": "1", "number_ios": "2000"},
                "read": {"iops": statistics.median(values)}, "write": {"iops": 0.0},
                "firstlight": {"disk": disk, "driver": driver, "platform": "xen-emu", "mode": "deterministic", "runs_iops": values, "versions": {"QEMU": "10"}, **context},
            }
            for disk, driver, values in disks
        ]  # fmt: skip
        path = self.folder / name
        path.write_text(json.dumps({"jobs": jobs}))
        return path

    def test_a_table_with_what_differs(self):
        first = self.file("a", [("xvda", "xen_blk", runs(1, 16)), ("xvda", "linux-xen-blkfront", runs(2, 16)), ("hda", "ata", [9000.0] * 16)], versions={"QEMU": "7.2"})
        second = self.file("b", [("xvda", "xen_blk", runs(3, 16, 60000)), ("xvda", "linux-xen-blkfront", runs(4, 16)), ("sda", "ahci", [1.0])], versions={"QEMU": "10"})
        text = comparison.compare(first, second, 1)
        self.assertIn("what differs: QEMU: 7.2 and 10", text)
        self.assertRegex(text, r"(?m)^xvda +randread 4k qd32 +16 .* faster \d+\.\d to \d+\.\d %$")
        self.assertRegex(text, r"(?m)^Linux xvda .* same within \d\.\d %$")
        self.assertIn(f"only in {first}: hda randread 4k qd32", text)
        self.assertIn(f"only in {second}: sda randread 4k qd32", text)

    def test_one_file_with_itself(self):
        one = self.file("a", [("xvda", "xen_blk", runs(1, 16))])
        self.assertIn("nothing: both are of one kernel", comparison.compare(one, one, 1))

    def test_more_than_one_difference_is_refused(self):
        first = self.file("a", [("xvda", "xen_blk", runs(1, 16))], versions={"QEMU": "7.2", "Firstlight": "abc"})
        second = self.file("b", [("xvda", "xen_blk", runs(1, 16))], versions={"QEMU": "10", "Firstlight": "def"})
        with self.assertRaisesRegex(Problem, r"Firstlight \(abc and def\); QEMU \(7.2 and 10\)"):
            comparison.compare(first, second, 1)

    def test_files_of_another_kind(self):
        good = self.file("a", [("xvda", "xen_blk", runs(1, 16))])
        for text in ("", "{}", '{"jobs": [{}]}', '{"jobs": 3}'):
            bad = self.folder / "bad"
            bad.write_text(text)
            with self.assertRaisesRegex(Problem, "bad: a file that scripts/bench --json wrote was expected"):
                comparison.compare(good, bad, 1)
        other = self.file("c", [("sda", "ahci", [1.0])])
        with self.assertRaisesRegex(Problem, "no disk and workload in common"):
            comparison.compare(good, other, 1)


if __name__ == "__main__":
    unittest.main()
