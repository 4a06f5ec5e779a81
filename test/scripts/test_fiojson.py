"""The JSON of scripts/bench: fio's bins from our buckets, and the assumptions of fio's tools."""

import contextlib
import io
import json
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from firstlight import bench, fiojson, fiotools, launch, machine, nested, records, report, workloads, yardstick  # noqa: E402
from firstlight.problems import Exit, Problem  # noqa: E402
from firstlight.workloads import Workload  # noqa: E402


def fio_index(value):
    """plat_val_to_idx() of fio's stat.c, with FIO_IO_U_PLAT_BITS 6 and 29 groups."""
    top = value.bit_length() - 1 if value else 0
    if top <= 6:
        return value
    error_bits = top - 6
    return min((error_bits + 1) * 64 + (63 & (value >> error_bits)), 29 * 64 - 1)


def fio_value(index):
    """plat_idx_to_val() of the same file: the middle of a bin."""
    if index < 128:
        return index
    error_bits = (index >> 6) - 1
    return int((1 << (error_bits + 6)) + (index % 64 + 0.5) * (1 << error_bits))


class Bins(unittest.TestCase):
    def test_the_kernels_buckets(self):
        # From the rule, not from the code: one bucket per value up to 255, then 128 per power of two.
        for index, wanted in ((0, (0, 0)), (255, (255, 255)), (256, (256, 257)), (278, (300, 301)), (383, (510, 511)), (384, (512, 515)), (1280, (65536, 66047))):
            self.assertEqual(fiojson.bucket(index), wanted)
        for index in range(4351):
            self.assertEqual(fiojson.bucket(index)[1] + 1, fiojson.bucket(index + 1)[0])

    def test_each_bucket_lies_in_one_bin_of_fios(self):
        for index in range(4352):
            low, high = fiojson.bucket(index)
            self.assertEqual(fio_index(low), fio_index(high), index)
            self.assertEqual(fiojson.fio_bin(low), fio_value(fio_index(low)), index)
            self.assertEqual(fiojson.fio_bin(high), fio_value(fio_index(low)), index)

    def test_bins_of_fio_itself(self):
        # From a run of fio 3.33: its bins for these latencies.
        for latency, called in ((3176, 3184), (1443, 1448), (8147619, 8159232), (8139595, 8159232)):
            self.assertEqual(fiojson.fio_bin(latency), called)

    def test_no_bin_beyond_fios_last(self):
        # fio_jsonplus_clat2csv would not terminate.
        index = 4352 - 1
        self.assertEqual(fiojson.bins({index: 2, 4096: 1}), {"17112760320": 3})

    def test_counts_are_kept(self):
        self.assertEqual(fiojson.bins({5: 1, 256: 2, 257: 3, 258: 4}), {"5": 1, "258": 5, "262": 4})

    def test_classes(self):
        # 1 ns, 800 ns, 1.99 us (1 in whole ones), 3.1 ms, 5 s.
        def index(ns):
            return next(index for index in range(4352) if fiojson.bucket(index)[1] >= ns)

        found = fiojson.classes({index(1): 1, index(800): 1, index(1990): 1}, {index(3_100_000): 1, index(5_000_000_000): 4})
        self.assertEqual({key: share for key, share in found["latency_ns"].items() if share}, {"2": 12.5, "1000": 12.5})
        self.assertEqual({key: share for key, share in found["latency_us"].items() if share}, {"2": 12.5})
        self.assertEqual({key: share for key, share in found["latency_ms"].items() if share}, {"4": 12.5, ">=2000": 50.0})


RECORD = {
    "record": "result", "disk": "xvda", "driver": "xen_blk", "kind": "synthetic", "workload": "randread", "bs": 4096,
    "qd": 32, "count": 3, "seed": 1, "mix": 70, "runtime_ns": 50_000_000, "errors": 0, "device_accesses": 0,
    "hypercalls": 1, "notifications": 1, "interrupts": 2, "allocations": 0, "lanes": 2, "sleeps": 6, "busy_ns": 25_000_000,
    "read": {"ios": 3, "bytes": 12288, "lat_ns": {"min": 256, "max": 300, "mean": 271, "stddev": 25, "N": 3, "percentile": {"50.000000": 257}}},
    "write": {"ios": 0, "bytes": 0, "lat_ns": {"min": 0, "max": 0, "mean": 0, "stddev": 0, "N": 0, "percentile": {"50.000000": 0}}},
}  # fmt: skip
LATENCIES = {"record": "latencies", "disk": "xvda", "op": "read", "bucket": 256, "counts": [2, 22, 1]}


def said(*found):
    return "\n".join("@" + json.dumps(record) for record in found)


class Latencies(unittest.TestCase):
    """The records before a result."""

    def buckets(self, *found):
        log = records.parse(said(*found))
        self.assertEqual(log.malformed, [])
        return [[result[op]["lat_ns"].get("buckets") for op in ("read", "write")] for result in log.of("result")]

    def test_each_result_gets_its_own(self):
        other = {**RECORD, "read": RECORD["write"], "write": RECORD["read"]}
        first, second = {**LATENCIES, "counts": [2]}, {**LATENCIES, "bucket": 278, "counts": [1]}
        self.assertEqual(self.buckets(first, second, RECORD), [[{256: 2, 278: 1}, None]])
        self.assertEqual(self.buckets(LATENCIES, RECORD, {**LATENCIES, "op": "write"}, other, RECORD), [[{256: 2, 278: 1}, None], [None, {256: 2, 278: 1}], [None, None]])

    def test_anything_else_is_malformed(self):
        for changed in (
            {"counts": [2, 22]}, {"counts": []}, {"counts": [2, 0, 1]}, {"counts": [2, 22, "1"]}, {"counts": None}, {"bucket": -1}, {"bucket": "x"},
            {"op": "trim"}, {"counts": [2, 22, 2]}, {"counts": [1, 22, 1]},
        ):  # fmt: skip
            self.assertTrue(records.parse(said({**LATENCIES, **changed}, RECORD)).malformed, changed)
        self.assertTrue(records.parse(said(LATENCIES, LATENCIES, RECORD)).malformed)

    def test_a_bench_without_them_is_a_problem(self):
        chosen = bench.Chosen("xen-emu", ["xvda"], [Workload("randread", "4k", 32, 3)])
        described = machine.Machine("m", "xen-emu", cmdline="disk=xvda")
        (side,) = workloads.COMPARISONS["xen-emu"]
        success = {"record": "verdict", "verdict": "SUCCESS"}
        (job,) = bench.our_jobs(launch.finished(described, nested.Outcome(33, said(LATENCIES, RECORD, success))), chosen, side, "wall")
        self.assertEqual(job["read"]["lat_ns"]["bins"], {"258": 2, "302": 1})
        with self.assertRaises(Problem) as refused:
            bench.our_jobs(launch.finished(described, nested.Outcome(33, said(RECORD, success))), chosen, side, "wall")
        self.assertIn("no latencies record", str(refused.exception))


class Jobs(unittest.TestCase):
    def job(self, **changed):
        (result,) = records.parse(said(LATENCIES, {**RECORD, **changed})).of("result")
        return fiojson.job(result, {"platform": "xen-emu"})

    def test_members(self):
        job = self.job()
        self.assertEqual((job["job options"]["numjobs"], job["job options"]["iodepth"], job["job options"]["bs"]), ("2", "32", "4k"))
        self.assertEqual(job["read"]["clat_ns"], job["read"]["lat_ns"])
        self.assertEqual(job["read"]["slat_ns"]["N"], 0)
        self.assertEqual(job["latency_ns"]["500"], 100.0)
        self.assertEqual((job["firstlight"]["wait"], job["firstlight"]["sleeps_per_io"], job["firstlight"]["busy_share"]), ("interrupt", 2.0, 0.25))
        self.assertNotIn("stolen_ns", job["firstlight"])
        self.assertEqual(self.job(stolen_ns=1234)["firstlight"]["stolen_ns"], 1234)
        self.assertEqual(job["jobname"], "xvda-randread-4k-qd32")
        polled = self.job(wait="poll")
        self.assertEqual((polled["firstlight"]["wait"], polled["jobname"]), ("poll", "xvda-randread-4k-qd32-poll"))
        self.assertNotEqual(fiojson.place({**polled, "firstlight": {"platform": "p", **polled["firstlight"]}}), fiojson.place(job))
        for idle in (job["write"], job["trim"]):
            self.assertEqual(idle["lat_ns"], {"min": 0, "max": 0, "mean": 0.0, "stddev": 0.0, "N": 0})
            self.assertEqual((idle["iops"], idle["runtime"], idle["total_ios"]), (0.0, 0, 0))

    def test_what_nobody_measured_is_named(self):
        job = self.job()
        self.assertEqual((job["usr_cpu"], job["sys_cpu"], job["read"]["iops_samples"], job["read"]["bw_samples"]), (0.0, 0.0, 0, 0))
        self.assertEqual(set(job["firstlight"]["not_measured"]) & {"usr_cpu", "sys_cpu"}, {"usr_cpu", "sys_cpu"})
        for name in ("ctx", "majf", "iodepth_level", "disk_util"):
            self.assertNotIn(name, job)

    def test_a_block_size_that_is_no_whole_number_of_kibibytes(self):
        self.assertEqual(self.job(bs=512)["jobname"], "xvda-randread-512-qd32")
        self.assertEqual(report.label(self.job(bs=131072)), "randread 128k qd32")

    def test_places(self):
        self.assertEqual(fiojson.place(self.job()), Path("xen-emu-xvda-xen_blk/4k/randread-32-2.json"))
        self.assertEqual(fiojson.place(self.job(workload="randrw")), Path("xen-emu-xvda-xen_blk/randrw70/4k/randrw-32-2.json"))

    def test_a_folder_that_holds_something_is_refused_before_anything_is_done(self):
        with tempfile.TemporaryDirectory() as folder:
            fiojson.demand_folder(Path(folder))
            fiojson.demand_folder(Path(folder) / "new")
            (Path(folder) / "old.json").write_text("{}")
            for wrong in (Path(folder), Path(folder) / "old.json", Path(folder) / "no" / "where"):
                with mock.patch.object(bench.setup, "ensure", side_effect=AssertionError("too late")), self.assertRaises(Problem) as refused:
                    bench.main(["--json-dir", str(wrong)])
                self.assertIs(refused.exception.code, Exit.USAGE)

    def test_one_job_a_file(self):
        with tempfile.TemporaryDirectory() as folder:
            jobs = [self.job(), self.job(qd=1)]
            fiojson.write_folder(Path(folder), jobs)
            self.assertEqual(len(list(Path(folder).rglob("*.json"))), 2)
            with self.assertRaises(Problem):
                fiojson.write_folder(Path(folder), jobs[:1])

    def test_linux_prints_its_bins_only_when_they_are_written_down(self):
        wanted = [{"name": "randread", "bs": "4k", "qd": 1, "count": 5, "mix": 70}]
        self.assertIn("--output-format=json ", yardstick.script([yardstick.Target("hda", workloads.DRIVERS["ide"].linux)], wanted))
        self.assertIn("--output-format=json+ ", yardstick.script([yardstick.Target("hda", workloads.DRIVERS["ide"].linux)], wanted, bins=True))


class Tools(unittest.TestCase):
    """The checks of the suite fio: correct results pass, each single fault fails."""

    def prepared(self, folder, **changed):
        jobs = [Jobs().job(**changed)]
        fiojson.write(Path(folder) / "out.json", jobs)
        fiojson.write_folder(Path(folder) / "jobs", jobs)
        return Path(folder), jobs

    def test_files(self):
        for name, value in (
            (("job options", "numjobs"), None), (("job options", "iodepth"), "0"), (("read", "iops_stddev"), None), (("usr_cpu",), None),
            (("latency_us", "2"), 50.0), (("read", "iops"), 0), (("latency_ns",), {}),
        ):  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                work, jobs = self.prepared(folder)
                self.assertEqual(fiotools.files(work, jobs), "")
                (path,) = (work / "jobs").rglob("*.json")
                document = json.loads(path.read_text())
                place = document["jobs"][0]
                for key in name[:-1]:
                    place = place[key]
                if value is None and len(name) > 1 and name[0] == "job options":
                    del place[name[-1]]
                else:
                    place[name[-1]] = value
                path.write_text(json.dumps(document))
                self.assertNotEqual(fiotools.files(work, jobs), "", name)
        with tempfile.TemporaryDirectory() as folder:
            work, jobs = self.prepared(folder)
            (path,) = (work / "jobs").rglob("*.json")
            fiojson.write(path, jobs * 2)
            self.assertIn("2 jobs", fiotools.files(work, jobs))
            (work / "jobs" / "more.json").write_text("{}")
            self.assertIn("the files are", fiotools.files(work, jobs))

    def test_compare(self):
        theirs = {"a": 1, "b": 0.5, "eta": 3, "c": {"d": "x", "N": 2, "bins": {"1": 2}}}
        ours = {"a": 7, "b": 1.5, "c": {"d": "y", "N": 1, "bins": {}}, "firstlight": {}}
        self.assertEqual(fiotools.compare("", theirs, ours), [])
        for changed in ({"a": 1.0}, {"b": 1}, {"c": {}}, {"c": {"d": 1, "N": 1, "bins": {}}}, {"more": 1}, {"c": {"d": "y", "N": 1}}):
            self.assertEqual(len(fiotools.compare("", theirs, {**ours, **changed})), 3 if changed == {"c": {}} else 1, changed)
        self.assertEqual(fiotools.compare("", theirs, {**ours, "c": {"d": "y", "N": 0}}), [])
        del ours["a"]
        self.assertEqual(fiotools.compare("", theirs, ours), ["a is missing"])

    def test_a_rank_between_two_ios(self) -> None:
        """99.95 % of 10000 I/Os: fio names the 9996th, because 99.95 is a little more in binary."""

        def part(value: int) -> dict:
            return {"total_ios": 10000, "lat_ns": {"N": 10000, "mean": 72193, "min": 72000, "max": 74300, "percentile": {"99.950000": value}}}

        border = [(72192, 9995), (74240, 5)]
        self.assertEqual(fiotools.distribution(border, part(72192)), "")
        self.assertEqual(fiotools.distribution(border, part(74240)), "")
        self.assertIn("percentile 99.95", fiotools.distribution(border, part(76288)))
        self.assertIn("percentile 99.95", fiotools.distribution([(72192, 9994), (74240, 6)], part(72192)))

    def test_distribution(self):
        part = Jobs().job()["read"]
        found = [(258, 2), (302, 1)]
        self.assertEqual(fiotools.distribution(found, part), "")
        for wrong, word in (
            ([(258, 2)], "I/Os in the bins"), ([(258, 3), (302, 1)], "I/Os in the bins"), ([(258, 1), (302, 2)], "mean"), ([(516, 2), (604, 1)], "mean"),
            ([(200, 1), (290, 1), (324, 1)], "bins from"),
        ):  # fmt: skip
            self.assertIn(word, fiotools.distribution(wrong, part), wrong)
        part["lat_ns"]["percentile"]["50.000000"] = 300
        self.assertIn("percentile", fiotools.distribution(found, part))

    def test_sweep(self):
        jobs = []
        for disk, driver, setting in (
            ("vda", "virtio_blk", ""), ("vda", "linux-virtio_blk", "libaio"), ("vda", "linux-virtio_blk", "io_uring"),
            ("nvme0n1", "nvme", ""), ("nvme0n1", "linux-nvme", "libaio"), ("nvme0n1", "linux-nvme", "io_uring"),
        ):  # fmt: skip
            for depth in ("1", "2"):
                extra = {"disk": disk, "driver": driver, "host_side": {"iothread": disk == "vda"}} | ({"setting": setting} if setting else {"allocations_per_io": 0.0})
                jobs.append({"jobname": driver, "job options": {"iodepth": depth}, "read": {"iops": 9.0}, "firstlight": extra})
        said = (
            "QEMU's disks (vda, nvme0n1): aio=threads, cache=writeback, I/O threads: vda\n\nqd   vda  Linux vda  nvme0n1  Linux nvme0n1\n--\n 2     9          9        9              9\n"
            "nvme0n1  nvme  randread 4k qd2     9  1.0\n"
        )
        self.assertEqual(fiotools.sweep_fault(said, jobs), "")
        self.assertIn("11 jobs", fiotools.sweep_fault(said, jobs[1:]))
        for at, name, value, word in ((0, ("firstlight", "driver"), "ata", "12 jobs"), (0, ("firstlight", "host_side"), {"iothread": False}, "12 jobs"), (2, ("firstlight", "setting"), "io_uring", "12 jobs"), (1, ("read", "iops"), 0, "no I/O in"),
                                      (0, ("firstlight", "allocations_per_io"), 0.5, "allocated")):  # fmt: skip
            changed = json.loads(json.dumps(jobs))
            changed[at][name[0]][name[1]] = value
            self.assertIn(word, fiotools.sweep_fault(said, changed))
        for line in said.splitlines():
            if line and line != "--":
                self.assertIn("the output has no line", fiotools.sweep_fault(said.replace(line, ""), jobs))

    def test_nothing_that_is_missing_counts_as_passed(self):
        with mock.patch.object(fiotools.shutil, "which", return_value=None):
            for check in (fiotools.shape, fiotools.converter):
                result = fiotools.attempt("x", lambda: check(Path("/"), []))
                self.assertEqual(result.status, "failed")
                self.assertIn("not found, so nothing was tried", result.output)
        skipped = fiotools.attempt("x", mock.Mock(side_effect=Problem("no network", Exit.SKIP)))
        self.assertEqual((skipped.status, skipped.detail), ("skipped", "no network"))
        self.assertEqual(fiotools.attempt("x", mock.Mock(side_effect=KeyError("y"))).status, "failed")

    def test_a_bench_that_fails_ends_the_suite_with_a_failure(self):
        with mock.patch.object(fiotools.process, "run", side_effect=Problem("no lab")), contextlib.redirect_stderr(io.StringIO()):
            (result,) = fiotools.checks()
        self.assertEqual((result.name, result.status), ("fio/bench", "failed"))


if __name__ == "__main__":
    unittest.main()
