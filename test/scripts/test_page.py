"""scripts/bench --html: the page has every figure of the JSON, needs nothing else, and is well formed."""

import html.parser
import re
import statistics
import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from firstlight import ensemble, page, report


def job(disk, driver, kind, iops, name="randread", bs="4k", depth="32", runs=(), **extra):
    rate = {"iops": iops, "total_ios": 2000, "bw_bytes": round(iops * 4096), "lat_ns": {"mean": 1e9 / iops, "percentile": {"50.000000": 7e8 / iops, "99.000000": 3e9 / iops, "99.990000": 4e9 / iops}}}
    linux = {"setting": "io_uring"} if driver.startswith("linux-") else {"device_accesses_per_io": 0.031, "hypercalls_per_io": 0.0, "notifications_per_io": 0.032, "interrupts_per_io": 0.033, "allocations_per_io": 0.0}
    return {
        "jobname": f"{disk}-{name}-{bs}-qd{depth}", "job options": {"name": name, "bs": bs, "iodepth": depth, "numjobs": "1"}, "read": rate, "write": {"iops": 0.0, "total_ios": 0, "bw_bytes": 0, "lat_ns": {}},
        "firstlight": {"platform": "xen-emu", "mode": "deterministic", "disk": disk, "driver": driver, "kind": kind, "versions": {"QEMU": "10.0 <&>"}, **linux, **({"runs_iops": list(runs)} if runs else {}), **extra},
    }  # fmt: skip


RUNS = [44123.0, 46623.0, 43005.0, 41112.0, 41757.0, 45104.0, 45125.0, 36012.0]
JOBS = [
    job("xvda", "xen_blk", "synthetic", 44123.0, runs=RUNS), job("xvda", "xen_blk", "synthetic", 6636.0, "read", "128k", "8"),
    job("hda", "ata", "emulated", 8807.0, runs=[8807.0] * 8), job("hda", "ata", "emulated", 18214.0, "read", "128k", "8"),
    job("xvda", "linux-xen-blkfront", "synthetic", 27027.0, runs=[27027.0, 26041.0] * 4), job("hda", "linux-ata_piix", "emulated", 3466.0, runs=[3466.0] * 8),
]  # fmt: skip


class Parser(html.parser.HTMLParser):
    """Collects the text, and demands that every element is closed in order."""

    VOID = {"meta", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.text, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            raise AssertionError(f"</{tag}> closes nothing")

    def handle_data(self, data):
        self.text.append(data)


def parsed(text):
    parser = Parser()
    parser.feed(text)
    parser.close()
    return parser


class Page(unittest.TestCase):
    def setUp(self):
        self.text = page.render(JOBS, "scripts/bench --only 'xen-emu' --html <x>", 7)
        self.parser = parsed(self.text)
        self.shown = " ".join(" ".join(self.parser.text).split())

    def test_is_well_formed_and_needs_nothing_else(self):
        self.assertEqual(self.parser.open, [])
        self.assertEqual(self.parser.links, [])
        for word in ("http:", "https:", "@import", "url(", "<script"):
            self.assertNotIn(word, self.text)
        self.assertIn("scripts/bench --only 'xen-emu' --html <x>", self.shown)
        self.assertIn("QEMU 10.0 <&>", self.shown)

    def test_every_figure_of_the_results_is_in_it(self):
        for one in JOBS:
            row = next(row for row in page.table_rows([one]))
            cells = [one["firstlight"]["disk"], report.driver(one), f"{statistics.median(page.runs_of(one)):.0f}", row["p50"], row["p99"], *row["counts"]]
            self.assertRegex(self.text, r"<tr>.*" + ".*".join(f"<td[^>]*>{re.escape(cell)}</td>" for cell in cells))

    def test_losses_are_told_as_loudly_as_wins(self):
        self.assertIn('<span class="win">4.9', self.text[self.text.index("does ") :][:200])
        self.assertIn('<span class="loss">0.36× at read 128k qd8</span>', self.text)
        self.assertRegex(self.shown, r"xvda does 4\.\d× \(4\.\d\d to 5\.\d\d\) at randread 4k qd32 , 0\.36× at read 128k qd8 the I/Os per second of the emulated hda")
        self.assertIn("2 of 2 rows are ahead", self.shown)

    def test_positions_are_on_the_axis(self):
        axis, ticks = page.axis_of([0.36, 5.2])
        self.assertEqual((axis.low, axis.high), (0.25, 8))
        self.assertEqual([axis.at(value) for value in (0.25, 1, 8, 0.01, 99)], [0.0, 40.0, 100.0, 0.0, 100.0])
        self.assertEqual([tick["text"] for tick in ticks], ["0.25×", "0.5×", "1×", "2×", "4×", "8×"])
        for value in re.findall(r'(?:cx|x1|x2|x)="(-?[\d.]+)%"', self.text):
            self.assertTrue(0 <= float(value) <= 100, value)

    def test_runs_and_how_much_they_depend_on_the_start(self):
        strips = page.strips(JOBS, 7)
        self.assertEqual([len(row["dots"]) for row in strips], [8, 8, 8, 8])
        self.assertTrue(strips[0]["sensitive"])
        self.assertEqual(strips[1]["sensitivity"], "0.0 %")
        for row in strips:
            self.assertIn(f"median {row['median']}, 95 % interval {row['interval']}, sensitivity", self.shown)

    def test_curves(self):
        deep = [job("xvda", "xen_blk", "synthetic", 10000.0 * depth, depth=str(depth)) for depth in (1, 2, 4)]
        (curve,) = page.depth_curves([*deep, job("hda", "ata", "emulated", 9000.0)])
        self.assertEqual([(line["who"], len(line["points"])) for line in curve["lines"]], [("xvda", 3)])
        self.assertEqual([point["x"] for point in curve["lines"][0]["points"]], [150.0, 300.0, 600.0])
        (latency,) = page.percentile_curves([JOBS[0]])
        self.assertEqual([point["x"] for point in latency["lines"][0]["points"]], [45.2, 300.0, 600.0])
        text = page.render([*deep, *JOBS], "x", 1)
        self.assertEqual(parsed(text).open, [])
        self.assertIn("xvda, qd 4: 40000 IOPS, 25.0 µs", text)

    def test_where_an_io_goes(self):
        mine, other = (dict(zip(("guest", "kvm", "kernel", "vmm"), cost)) for cost in ((10.0, 20.0, 30.0, 40.0), (20.0, 80.0, 40.0, 60.0)))
        jobs = [job("xvda", "xen_blk", "synthetic", 20000.0, instructions_per_io=mine), job("hda", "ata", "emulated", 9000.0, instructions_per_io=other)]
        (group,) = page.cost_bars(jobs)
        self.assertEqual([[(one["x"], one["width"]) for one in bar["segments"]] for bar in group["bars"]], [[(0, 5), (5, 10), (15, 15), (30, 20)], [(0, 10), (10, 40), (50, 20), (70, 30)]])
        shown = " ".join(" ".join(parsed(page.render(jobs, "x", 1)).text).split())
        self.assertIn("100: guest 10, KVM 20, host's kernel 30, VMM 40", shown)
        self.assertIn("takes 100 instructions against 200, of them KVM 20 against 80.", shown)
        self.assertIn("takes 200 instructions against 100, of them KVM 80 against 20, which does not explain it", "takes " + page.why(*(dict(one, firstlight=dict(one["firstlight"], instructions_per_io=cost)) for one, cost in zip(jobs, (other, mine)))))

    def test_counts_that_differ_are_the_reason(self):
        one, other = job("xvda", "xen_blk", "synthetic", 20000.0), job("hda", "ata", "emulated", 9000.0, device_accesses_per_io=7.0)
        self.assertEqual(page.why(one, other), "0.031 accesses to device registers against 7.000")

    def test_runs_that_depend_on_the_start_are_cells(self):
        (row,) = page.heat_rows(JOBS[:1])
        self.assertEqual([cell["kind"] for cell in row["cells"]], ["loss" if run < statistics.median(RUNS) else "win" for run in RUNS])
        self.assertEqual(page.heat_rows(JOBS[2:3]), [])

    def test_comparison(self):
        quick, slow = (ensemble.compare([ensemble.Row("r", [1000.0 + n for n in range(8)], [factor * (1000.0 + n) for n in range(8)])], 1) for factor in (1.5, 0.5))
        text = page.render_change("Firstlight: a and b", [("xvda", "randread 4k qd32"), ("hda", "randread 4k qd32")], [(JOBS[0], JOBS[0]), (JOBS[2], JOBS[2])], [*quick, *slow], "scripts/bench --compare", 1, {"first": "0123abcd"})
        shown = " ".join(" ".join(parsed(text).text).split())
        self.assertIn("What differs: Firstlight: a and b. Of 2 rows 1 faster, 1 slower, 0 the same, 0 that cannot be told.", shown)
        self.assertRegex(text, r'class="win">xvda randread 4k qd32: faster [\d.]+ to [\d.]+ %')
        self.assertRegex(text, r'class="loss">hda randread 4k qd32: slower [\d.]+ to [\d.]+ %')
        self.assertIn("SHA-256 of first: 0123abcd", shown)

    def test_without_anything_to_compare_with(self):
        shown = parsed(page.render([job("nvme0n1", "nvme", "emulated", 9000.0)], "x", 1)).text
        self.assertNotIn("Ratios", shown)
        self.assertIn("9000", shown)


if __name__ == "__main__":
    unittest.main()
