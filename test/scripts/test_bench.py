"""scripts/bench: its options for workloads, disks, depths and the host side, its comparisons, and its tables, on recorded output of the lab."""

import argparse
import contextlib
import io
import re
import subprocess
import sys
import tempfile
import types
import unittest
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from firstlight import bench, counts, fiojson, lab, launch, machine, nested, report, workloads, yardstick  # noqa: E402
from firstlight.problems import Exit, Problem  # noqa: E402
from firstlight.workloads import Workload  # noqa: E402

# scripts/bench --only all --disk xen,nvme --yardstick --workload randread,count=16 --sweep qd=1..2
LOG = (Path(__file__).parent / "recorded/bench-all.log").read_text()
IDE = workloads.DRIVERS["ide"].linux
CALL = ("--only", "all", "--disk", "xen,nvme", "--yardstick", "--workload", "randread,count=16", "--sweep", "qd=1..2")


def part(name):
    """The output of one machine of the recorded start of the lab."""
    return re.search(rf"@@lab \S+ begin {name}\n(.*?)\n\n@@lab \S+ end {name} ", LOG, re.S)[1]


def options(*words):
    return bench.arguments().parse_args(words)


class Parsing(unittest.TestCase):
    def test_workloads(self):
        self.assertEqual(workloads.parse_workload("randread"), Workload("randread", "4k", 1, 2000))
        found = workloads.parse_workload("randrw,mix=30,bs=16k,qd=4,count=9,seed=0")
        self.assertEqual(found, Workload("randrw", "16k", 4, 9, seed=0, mix=30))
        self.assertEqual(found.word, "workload=randrw,bs=16k,qd=4,count=9,seed=0,mix=30")
        self.assertEqual(workloads.parse_workload("randrw").word, "workload=randrw,bs=4k,qd=1,count=2000,seed=1,mix=70")
        self.assertEqual([workloads.parse_workload(f"read,count=1,bs={bs}").bs for bs in ("4096", "512", "1536", "1m")], ["4k", "512", "1536", "1024k"])
        self.assertEqual([workloads.parse_workload(f"read,count=1,bs={bs}").bytes for bs in ("4096", "512", "1536", "1m")], [4096, 512, 1536, 1 << 20])
        self.assertTrue(workloads.parse_workload("write,count=1").writes)
        self.assertEqual(workloads.parse_workload("read,bs=64k,count=1024").count, 1024)

    def test_wrong_workloads(self):
        for text, said in (
            ("", "the pattern ''"), ("trim", "one of randread, randwrite, read, write, randrw"), ("randread,bs=5000", "multiple of 512"), ("randread,bs=2m", "up to 1m"),
            ("randread,bs=0", "multiple of 512"), ("randread,bs=4kb", "multiple of 512"), ("randread,qd=0", "from 1 to 256"), ("randread,qd=257", "from 1 to 256"),
            ("randread,count=0", "from 1 to 4294967295"), ("randread,count=1e3", "'count=1e3' was given, a number"), ("randread,mix=50", "(mix= is for randrw)"), ("randrw,mix=101", "from 0 to 100"),
            ("randread,qd=1,qd=2", "at most once"), ("randread,depth=3", "each of bs=, qd=, count=, seed= at most once"), ("randread,,", "'' was given"), ("randread,qd", "a number from 1"),
            ("read,bs=64k,count=1025", "at most 1024 sequential I/Os"),
        ):  # fmt: skip
            with self.assertRaises(argparse.ArgumentTypeError) as raised:
                workloads.parse_workload(text)
            self.assertIn(said, str(raised.exception), text)
            self.assertIn("as in randread,bs=4k", str(raised.exception))

    def test_the_kernels_limits(self):
        source = (bench.paths.REPOSITORY / "src/io/bench.cppm").read_text()
        self.assertIn(f"max_qd = {workloads.MOST_QD};", source)
        self.assertEqual(workloads.MOST_BS, 1024 * 1024)
        self.assertIn("max_bs = 1024 * 1024;", source)
        self.assertIn("max_count = 0xffff'ffff;", source)
        self.assertEqual(workloads.MOST_COUNT, 0xFFFFFFFF)
        self.assertIn(f"capacity = {workloads.MOST_WORKLOADS};", (bench.paths.REPOSITORY / "src/boot/options.cppm").read_text())

    def test_sweeps(self):
        self.assertEqual(workloads.parse_sweep("qd=1..128"), (1, 2, 4, 8, 16, 32, 64, 128))
        self.assertEqual(workloads.parse_sweep("qd=128..256"), (128, 256))
        for text in ("", "qd", "qd=1", "qd=1..1", "qd=0..4", "qd=8..2", "qd=1..512", "qd=1..100", "bs=1..2", "qd=1..2,", "qd=1-2"):
            with self.assertRaises(argparse.ArgumentTypeError) as raised:
                workloads.parse_sweep(text)
            self.assertIn("two powers of two from 1 to 256", str(raised.exception), text)

    def test_ways_to_wait(self):
        self.assertEqual(options().wait, ("interrupt",))
        self.assertEqual(options("--wait", "poll").wait, ("poll",))
        self.assertEqual(options("--wait", "adaptive,interrupt").wait, ("adaptive", "interrupt"))
        for text in ("", "sleep", "poll,poll", "poll,", "interrupt adaptive"):
            with self.assertRaises(argparse.ArgumentTypeError) as raised:
                workloads.parse_waits(text)
            self.assertIn("some of interrupt, poll, adaptive were expected", str(raised.exception), text)
        source = (bench.paths.REPOSITORY / "src/io/executor.cppm").read_text()
        self.assertIn(f"wait_names{{{', '.join(f'{chr(34)}{wait}{chr(34)}' for wait in workloads.WAITS)}}};", source)

    def test_what_is_swept(self):
        found = bench.asked(options("--sweep", "qd=1..4"))
        self.assertEqual([one.label for one in found], [f"{kind}-qd{qd}" for kind in ("randread-4k", "randwrite-4k", "read-128k") for qd in (1, 2, 4)])
        self.assertEqual([one.count for one in found], [2000] * 6 + [400] * 3)
        found = bench.asked(options("--sweep", "qd=2..4", "--workload", "read,bs=8k,count=5"))
        self.assertEqual([(one.label, one.count) for one in found], [("read-8k-qd2", 5), ("read-8k-qd4", 5)])
        self.assertEqual(bench.asked(options()), list(workloads.MAIN_JOB))

    def test_more_than_a_boot_takes(self):
        for words, said in (
            (("--workload", "read,count=2", "--workload", "read,count=3"), "read-4k-qd1 was given twice"),
            (("--sweep", "qd=1..2", "--workload", "read,count=2", "--workload", "read,count=3"), "read 4k was given twice"),
            (("--sweep", "qd=1..256", *(word for bs in (1, 2, 3, 4) for word in ("--workload", f"randread,bs={bs}k"))), "36 workloads were asked for, at most 32"),
            (("--workload", "randread,bs=1m,qd=65"), "are 65 MiB, at most 64 MiB"),
        ):
            with self.assertRaises(Problem) as raised:
                bench.asked(options(*words))
            self.assertIn(said, str(raised.exception))
            self.assertIs(raised.exception.code, Exit.USAGE)


class Chosen(unittest.TestCase):
    def names(self, *patterns, **words):
        return [(one.comparison, one.disks) for one in workloads.choose(list(patterns), **words)]

    def test_a_comparison_on_request_needs_its_name(self):
        self.assertEqual(self.names(), [("xen-emu", ["xvda", "hda"]), ("hyperv", ["sda", "hda"])])
        self.assertEqual([name for name, _ in self.names("randread")], ["xen-emu", "hyperv"])
        self.assertEqual(self.names("sda"), [("hyperv", ["sda"])])
        for name in workloads.ON_REQUEST:
            self.assertEqual([found for found, _ in self.names(name)], [name])
        self.assertEqual([name for name, _ in self.names("*")], list(workloads.COMPARISONS))
        self.assertEqual([name for name, _ in self.names(everything=True)], list(workloads.COMPARISONS))

    def test_one_machine_has_all_disks(self):
        for name in ("qemu", "all"):
            (side,) = workloads.COMPARISONS[name]
            described = machine.Machine("m", side.platform, side.machine, disks=bench.images(side, options()))
            self.assertEqual(tuple(described.disk_names()), side.disks)
            self.assertEqual(len(set(side.disks)), len(side.buses))
            self.assertTrue(set(side.buses) <= set(workloads.DRIVERS))
            for bus in side.buses:
                modules = [module.replace("-", "_") for module in lab.L2_MODULES]
                self.assertIn(workloads.DRIVERS[bus].linux.name.replace("-", "_"), modules)
        self.assertEqual(workloads.COMPARISONS["all"][0].buses, ("xen", *workloads.COMPARISONS["qemu"][0].buses))
        self.assertIn(workloads.BASELINES["all"], workloads.COMPARISONS["all"][0].disks)

    def test_disks_by_each_of_their_names(self):
        for word, disks in (("xen", ["xvda"]), ("xvda", ["xvda"]), ("nvme", ["nvme0n1"]), ("vscsi", ["sda"]), ("pvscsi", ["sdb"]), ("sata", ["sdc"])):
            self.assertEqual(self.names("all", disks=[word]), [("all", disks)])
        self.assertEqual(self.names("all", disks=["sata", "xen"])[0][1], ["xvda", "sdc"])
        self.assertEqual(self.names("microvm", disks=["pci"]), [("microvm", ["pci"])])
        self.assertEqual(self.names("microvm", disks=["vda"]), [("microvm", ["mmio", "pci"])])
        self.assertEqual(self.names(disks=["xen"]), [("xen-emu", ["xvda"])])

    def test_a_disk_that_is_not_there(self):
        def said(*words):
            chosen = options(*words)
            with self.assertRaises(Problem) as raised:
                bench.check(chosen)
            self.assertIs(raised.exception.code, Exit.USAGE)
            return str(raised.exception)

        self.assertIn("--disk tape: xen-emu, hyperv have the disks xvda, xen, hda, ide, sda, scsi.", said("--disk", "tape"))
        self.assertIn("qemu and all have it: add --only qemu", said("--disk", "hda,nvme"))
        self.assertIn("--disk xvda", said("--only", "qemu", "--disk", "hda", "--disk", "xvda"))

    def test_two_machines_with_one_name(self):
        mmio, pci = workloads.COMPARISONS["microvm"]
        self.assertNotEqual(mmio.key, pci.key)
        chosen = workloads.choose(["microvm"])[0]
        first, second = (bench.main_machine(side, chosen, options()) for side in (mmio, pci))
        self.assertIn("disk=vda scratch=vda", first.cmdline)
        self.assertNotEqual(first.name, second.name)
        words = [" ".join(described.job(Path("/nowhere")).arguments) for described in (first, second)]
        self.assertIn("-machine microvm,acpi=on", words[0])
        self.assertIn("virtio-blk-device,drive=vda", words[0])
        self.assertIn("virtio-mmio.force-legacy=false", words[0])
        self.assertIn("virtio-blk-pci,drive=vda", words[1])
        self.assertEqual((mmio.disk("vda"), pci.disk("vda")), ("mmio", "pci"))

    def test_a_machine_for_each_way_to_wait(self):
        chosen = workloads.choose(["all"])[0]
        found = bench.guests(bench.sides_of(chosen), chosen, options("--wait", "interrupt,poll", "--yardstick"))
        self.assertEqual([one.name for one in found], ["bench-xen-emu", "bench-xen-emu-poll", "linux-xen-emu"])
        self.assertEqual([word for one in found[:2] for word in one.cmdline.split() if word.startswith("wait=")], ["wait=interrupt", "wait=poll"])

    def test_a_bound_for_each_amount_of_work(self):
        little, much = ([Workload("randread", "4k", 1, count)] for count in (10, 1_000_000))
        self.assertLess(bench.seconds(60, ["hda"], little, False), 61)
        self.assertGreater(bench.seconds(60, ["hda"], much, False), 1000)
        self.assertEqual(bench.seconds(0, ["hda", "sda"], much, False), 2 * bench.seconds(0, ["hda"], much, False))
        self.assertGreater(bench.seconds(0, ["hda"], much, True), bench.seconds(0, ["hda"], much, False))


class HostSide(unittest.TestCase):
    def drives(self, platform, *disks):
        return " ".join(machine.Machine("m", platform, disks=disks).drives()[1])

    def test_qemus_words(self):
        text = self.drives("xen-emu", "xen:1m,iothread", "virtio:1m,aio=io_uring,cache=none,iothread", "ide:1m,cache=unsafe")
        self.assertIn("-object iothread,id=io-xvda", text)
        self.assertIn("xen-disk,drive=xvda,vdev=xvda,iothread=io-xvda", text)
        self.assertIn("id=vda,format=raw,file={disk:vda.img},aio=io_uring,cache=none", text)
        self.assertIn("virtio-blk-pci,drive=vda,serial=vda,iothread=io-vda", text)
        self.assertIn("if=ide,index=0,id=hda,format=raw,file={disk:hda.img},cache=unsafe", text)
        self.assertNotIn("aio", self.drives("kvm", "ide:1m", "virtio:1m"))

    def test_each_bus_has_a_device_of_its_own(self):
        for machine_name in ("pc", "q35"):
            devices = [machine.Machine("m", "kvm", machine=machine_name).device(bus, "d0", 0, "ide") for bus in machine.BUSES if bus not in ("scsi", "accel")]
            self.assertEqual(len(set(devices)), len(devices))
        with self.assertRaisesRegex(Problem, "on the bus floppy: .* names no device"):
            machine.Machine("m", "kvm").device("floppy", "d0", 0, "ide")

    def test_disks_of_one_scsi_host_share_its_thread(self):
        text = self.drives("kvm", "vscsi:1m", "vscsi:1m,iothread", "vscsi:1m,iothread,content=null")
        self.assertEqual(text.count("-object"), 1)
        self.assertIn("-object iothread,id=io-vscsi -device virtio-scsi-pci,id=vscsi,iothread=io-vscsi", text)
        self.assertIn("scsi-hd,drive=sdb,serial=sdb,bus=vscsi.0,scsi-id=0,lun=1", text)
        self.assertIn("id=sdc,driver=null-co", text)
        self.assertNotIn("scsi-hd,drive=sdb,serial=sdb,bus=vscsi.0,scsi-id=0,lun=1,iothread", text)
        self.assertNotIn("iothread", self.drives("kvm", "vscsi:1m"))

    def test_what_qemu_refuses(self):
        for platform, disk, said in (
            ("kvm", "ide:1m,iothread", "iothread is for disks on xen, virtio, vscsi"), ("kvm", "nvme:1m,iothread", "nvme device has no I/O thread"), ("kvm", "1m,aio=native", "needs cache=none or cache=directsync"),
            ("kvm", "1m,aio=native,cache=unsafe", "not unsafe"), ("hyperv", "scsi:1m,cache=none", "cache= is for QEMU's disks"), ("xen-pvh", "xen:1m,iothread", "iothread is for QEMU's"),
            ("qemu-pvh", "1m,content=null,aio=threads", "content=null has none"), ("kvm", "1m,aio=posix", "aio=threads|native|io_uring"), ("kvm", "1m,cache=back", "cache=writeback|none"),
            ("kvm", "virtio:1m,iothread=yes", "iothread (of QEMU's disks) was expected"),
        ):  # fmt: skip
            with self.assertRaises(Problem) as raised:
                machine.Machine("m", platform, disks=[disk])
            self.assertIn(said, str(raised.exception), disk)
            self.assertIs(raised.exception.code, Exit.USAGE)
        machine.Machine("m", "kvm", disks=["1m,aio=native,cache=directsync"])

    def test_benchs_options_reach_the_disks_that_can(self):
        (side,) = workloads.COMPARISONS["all"]
        specs = bench.images(side, options("--aio", "native", "--cache", "none", "--iothread"))
        self.assertEqual({(spec.aio, spec.cache) for spec in specs}, {("native", "none")})
        self.assertEqual([spec.bus for spec in specs if spec.iothread], [bus for bus in side.buses if bus in machine.IOTHREAD_BUSES])
        machine.Machine("m", side.platform, disks=specs)
        host, qemu = workloads.COMPARISONS["hyperv"]
        self.assertEqual([spec.cache for side in (host, qemu) for spec in bench.images(side, options("--cache", "none"))], ["", "none"])
        self.assertEqual(bench.host_side(options(), "virtio"), {"aio": "threads", "cache": "writeback", "iothread": False})
        self.assertEqual(bench.host_side(options("--iothread", "--cache", "unsafe"), "ide"), {"aio": "threads", "cache": "unsafe", "iothread": False})
        self.assertTrue(bench.host_side(options("--iothread"), "xen")["iothread"])

    def test_options_without_effect(self):
        for words, said in (
            (("--aio", "native"), "add --cache none or --cache directsync"), (("--only", "xen-pvh", "--cache", "none"), "xen-pvh measures none"), (("--only", "hyperv", "--iothread"), "hyperv measures none of them"),
            (("--only", "hyperv", "--disk", "sda", "--aio", "io_uring"), "hyperv measures none"), (("--list", "--iothread"), "nothing is measured"),
            (("--sweep", "qd=1..2", "--workload", "read,qd=4"), "qd= is what --sweep sets"),
        ):  # fmt: skip
            with self.assertRaises(Problem) as raised:
                bench.check(options(*words))
            self.assertIn(said, str(raised.exception))
            self.assertIs(raised.exception.code, Exit.USAGE)


class AnswersLater(unittest.TestCase):
    """--io and --latency: who serves the test host's disks."""

    def test_values(self):
        self.assertEqual(options().io, ("inline",))
        self.assertEqual(options("--io", "uring,inline").io, ("uring", "inline"))
        for text in ("", "threads", "thread,thread", "inline,"):
            with self.assertRaises(argparse.ArgumentTypeError) as raised:
                workloads.parse_ios(text)
            self.assertIn(f"{text!r} was given, some of inline, thread, uring were expected", str(raised.exception))
        for text, bounds in (("1ns", (1, 1)), ("100us", (100_000,) * 2), ("exp:2ms", (2_000_000,) * 2), ("uniform:50us..1ms", (50_000, 1_000_000)), ("10s", (10**10,) * 2)):
            self.assertEqual(machine.latency_bounds(text), bounds)
            self.assertEqual(machine.parse_latency(text), text)
        for text in ("", "0us", "100", "us", "11s", "-1us", "1.5us", "exp:", "uniform:2us..1us", "uniform:1us", "exp:uniform:1us..2us", "1us..2us"):
            with self.assertRaises(argparse.ArgumentTypeError) as raised:
                machine.parse_latency(text)
            self.assertIn(f"{text!r} was given, a time as in 100us, exp:100us", str(raised.exception))

    def test_where_they_have_no_effect(self):
        for words, said in (
            (("--io", "thread", "--only", "xen-emu"), "xen-emu measures none: leave it out, or add --only hyperv"), (("--io", "thread", "--only", "hyperv", "--disk", "ide"), "hyperv measures none"),
            (("--latency", "1ms"), "--io thread or --io uring was expected, not inline"), (("--io", "inline,thread", "--latency", "1ms"), "not inline, which would keep the guest's processor"),
            (("--list", "--io", "thread"), "nothing is measured"),
        ):  # fmt: skip
            with self.assertRaises(Problem) as raised:
                bench.check(options(*words))
            self.assertIn(said, str(raised.exception), words)
            self.assertIs(raised.exception.code, Exit.USAGE)
        for words, said in (
            ({"platform": "kvm", "io": "thread"}, "--io thread is for the test host's disks"), ({"platform": "hyperv", "io": "later"}, "one of inline, thread, uring was expected"),
            ({"platform": "hyperv", "latency": "1ms"}, "not inline"), ({"platform": "hyperv", "io": "uring", "latency": "1"}, "latency=1: a time"),
        ):  # fmt: skip
            with self.assertRaises(Problem) as raised:
                machine.Machine("m", **words)
            self.assertIn(said, str(raised.exception), words)

    def test_they_reach_the_test_host_alone(self):
        self.assertNotIn("--io", machine.Machine("m", "hyperv").test_host_job().arguments)
        words = machine.Machine("m", "hyperv", io="uring", latency="exp:1ms").test_host_job().arguments
        self.assertEqual((words[words.index("--io") + 1], words[words.index("--latency") + 1]), ("uring", "exp:1ms"))
        asked = options("--io", "thread,uring", "--latency", "1ms", "--wait", "interrupt,poll", "--yardstick")
        chosen = workloads.choose(["hyperv"])[0]
        found = bench.guests(bench.sides_of(chosen), chosen, asked)
        self.assertEqual(
            [(one.name, one.io, one.latency) for one in found],
            [("bench-hyperv-thread", "thread", "1ms"), ("bench-hyperv-poll-thread", "thread", "1ms"), ("bench-hyperv-uring", "uring", "1ms"), ("bench-hyperv-poll-uring", "uring", "1ms"),
             ("bench-kvm", "", ""), ("bench-kvm-poll", "", ""), ("linux-hyperv-thread", "thread", "1ms"), ("linux-hyperv-uring", "uring", "1ms"), ("linux-kvm", "", "")],
        )  # fmt: skip
        self.assertGreater(found[0].timeout, bench.guests(bench.sides_of(chosen), chosen, options("--io", "thread"))[0].timeout + 1)

    def job(self, io, rate, driver="storvsc"):
        direction = {"iops": rate, "total_ios": 9, "bw_bytes": 1, "lat_ns": {"mean": 1e9 / rate, "percentile": {"50.000000": 1000, "99.000000": 2000}}}
        counts = {f"{what}_per_io": 0.5 for what in ("device_accesses", "hypercalls", "notifications", "interrupts", "allocations", "exits", "sleeps")}
        extra = {"disk": "sda", "driver": driver, "kind": "synthetic", "io": io, "platform": "hyperv"}
        extra |= {"setting": "libaio"} if driver.startswith("linux") else {"wait": "interrupt", **counts}
        return {"jobname": "x", "read": direction, "write": {"iops": 0.0, "bw_bytes": 0, "total_ios": 0}, "job options": {"name": "randread", "rw": "randread", "bs": "4k", "iodepth": "1", "numjobs": "1"}, "firstlight": extra}

    def test_tables(self):
        ours = [self.job("inline", 30000.0), self.job("thread", 20000.0), self.job("uring", 16000.0)]
        theirs = [self.job("inline", 15000.0, "linux-hv_storvsc"), self.job("thread", 16000.0, "linux-hv_storvsc"), self.job("thread", 12000.0, "linux-hv_storvsc")]
        self.assertEqual(len(report.best(theirs)), 2)  # of one way to serve the fastest setting
        with mock.patch.object(report, "terminal", return_value=None):
            rows = [line.split() for line in report.by_io(ours, report.best(theirs)).splitlines()]
            ratios = [line.split() for line in report.ratios(ours, report.best(theirs)).splitlines()]
        common = "1.0 2.0 0.500 0.500 0.500 0.500"
        self.assertEqual(rows[2:], [
            f"sda storvsc randread 4k qd1 inline 30000 33.3 {common} 15000 66.7 2.00".split(), f"sda storvsc randread 4k qd1 thread 20000 50.0 {common} 16000 62.5 1.25".split(),
            f"sda storvsc randread 4k qd1 uring 16000 62.5 {common} - - -".split(),
        ])  # fmt: skip
        self.assertIn("randread 4k qd1 thread 20000 - - 1.25 -".split(), ratios)
        self.assertIn("randread 4k qd1 30000 - - 2.00 -".split(), ratios)
        self.assertEqual(report.title(ours[1]), "randread 4k qd1 thread")
        places = [str(fiojson.place(job)) for job in (*ours, *theirs[:2])]
        self.assertEqual(len(set(places)), 5)
        self.assertTrue(places[1].startswith("hyperv-sda-storvsc-thread/"), places)

    def test_results_name_it(self):
        host, qemu = workloads.COMPARISONS["hyperv"]
        text = part("bench-xen-emu").replace('"disk":"xvda","driver":"xen_blk"', '"disk":"sda","driver":"storvsc"').replace('"disk":"xvda"', '"disk":"sda"')
        text = "\n".join(line for line in text.splitlines() if '"disk":"nvme0n1"' not in line)
        chosen = workloads.Chosen("hyperv", ["sda"], bench.asked(options(*CALL)))
        described = bench.main_machine(host, chosen, options("--io", "uring", "--latency", "1ms"), io="uring")
        with mock.patch.object(bench, "demand_phases"):
            found = bench.our_jobs(launch.finished(described, nested.Outcome(33, text)), chosen, host, "wall")
        self.assertEqual([(job["jobname"], job["firstlight"]["io"]) for job in found], [(f"sda-randread-4k-qd{qd}-uring", "uring") for qd in (1, 2)])
        ready = types.SimpleNamespace(versions={"linux-image-6.1-amd64": "6.1-1", "qemu-system-x86": "10.0"})
        said = io.StringIO()
        with (
            contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()), mock.patch.object(bench, "measure", return_value=found),
            mock.patch.object(bench.launch, "place", return_value=launch.Place(True, "as asked")), mock.patch.object(bench, "revision", return_value="abc"),
        ):  # fmt: skip
            jobs = bench.compare(ready, chosen, options("--io", "uring", "--latency", "1ms"))
        self.assertEqual({job["firstlight"]["latency"] for job in jobs}, {"1ms"})
        self.assertIn("the test host's disks (sda): io=uring, latency=1ms\n", said.getvalue())
        self.assertIn("who serves the disks, and what that is worth", said.getvalue())


class Recorded(unittest.TestCase):
    """From the lab's output to the tables and the JSON."""

    def setUp(self):
        self.options = options(*CALL)
        self.chosen = workloads.choose(["all"], jobs=bench.asked(self.options), disks=["xen", "nvme"])[0]
        self.sides = bench.sides_of(self.chosen)
        self.machines = bench.guests(self.sides, self.chosen, self.options)

    def boots(self, change=lambda text: text):
        statuses = (33, 0)
        return [launch.finished(one, nested.Outcome(status, change(part(one.name.removesuffix("-poll"))))) for one, status in zip(self.machines, statuses)]

    def compare(self, *words, change=lambda text: text):
        chosen = options(*CALL, *words)
        self.machines = bench.guests(self.sides, self.chosen, chosen)
        ready = types.SimpleNamespace(versions={"linux-image-6.1-amd64": "6.1-1", "qemu-system-x86": "10.0"})
        said = io.StringIO()
        with (
            contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()),
            mock.patch.object(bench.launch, "place", return_value=launch.Place(True, "as asked")),
            mock.patch.object(bench.launch, "boot", return_value=self.boots(change)), mock.patch.object(bench, "revision", return_value="abc"),
        ):  # fmt: skip
            return bench.compare(ready, self.chosen, chosen), said.getvalue()

    def test_the_command_lines_are_those_that_were_recorded(self):
        main, linux = self.machines
        self.assertIn(f'command line: "{main.cmdline}"', part("bench-xen-emu"))
        for line in re.findall(r"^yardstick \w+ .*$", part("linux-xen-emu"), re.M):
            self.assertIn(f"echo '{line}'", linux.linux + "echo 'yardstick end'")

    def test_tables(self):
        jobs, said = self.compare("--iothread")
        self.assertIn("QEMU's disks (xvda, nvme0n1): aio=threads, cache=writeback, I/O threads: xvda\n", said)
        self.assertIn("platform all, boot pvh, deterministic time; xen-emu (QEMU): xvda, vda, sda, sdb, hda, nvme0n1, sdc", said)
        rows = [line.split() for line in said.splitlines()]
        self.assertIn("xvda xen_blk randread 4k qd2 19279 13333 1.45 0.000 0.500 0.500 0.375 0.000".split(), rows)
        self.assertIn("nvme0n1 nvme randread 4k qd1 9457 7273 1.30 1.000 0.000 1.000 1.000 0.000".split(), rows)
        self.assertIn("qd xvda Linux xvda nvme0n1 Linux nvme0n1".split(), rows)
        self.assertIn("2 19279 13333 15317 10000".split(), rows)
        self.assertEqual(len(jobs), 12)
        # Of Linux the better setting of each row is in the tables, and both are in the JSON.
        self.assertIn("xvda linux-xen-blkfront libaio synthetic randread 4k qd1 8889".split(), [row[:8] for row in rows])
        self.assertIn("xvda linux-xen-blkfront io_uring synthetic randread 4k qd2 13333".split(), [row[:8] for row in rows])
        self.assertNotIn("linux-xen-blkfront io_uring synthetic randread 4k qd1".split(), [row[1:7] for row in rows])
        self.assertEqual([job["firstlight"].get("setting") for job in jobs[4:8]], ["libaio"] * 2 + ["io_uring"] * 2)
        found = {(job["jobname"], job["firstlight"]["machine"]): job["firstlight"] for job in jobs}
        self.assertEqual(found["xvda-randread-4k-qd2", "xen-emu"]["host_side"], {"aio": "threads", "cache": "writeback", "iothread": True})
        self.assertEqual(found["linux-nvme-randread-4k-qd2-io_uring", "xen-emu"]["kind"], "emulated")
        self.assertEqual([job["job options"]["iodepth"] for job in jobs], ["1", "2"] * 6)
        with tempfile.TemporaryDirectory() as folder:
            fiojson.write_folder(Path(folder), jobs)

    def test_costs(self):
        sections = [counts.Section({"guest": 16 * (100 + at), "kvm": 16, "kernel": 32, "vmm": 48}, {0xFFFFFFFF80000000: 64}) for at in range(12)]
        counting = mock.Mock(arguments=("-plugin", "p"), **{"sections.return_value": sections})
        with mock.patch.object(bench.counts, "Counting", return_value=counting), mock.patch.object(bench.counts, "marker", return_value=Path("/m/mark")):
            jobs, said = self.compare("--cost")
        main, linux = self.machines
        self.assertIn(f"marks={counts.PORT:#x}", main.cmdline.split())
        self.assertEqual(linux.linux.count("--exec_prerun=mark "), 8)
        self.assertEqual(linux.linux.count("--exec_postrun=mark "), 8)
        counting.sections.assert_called_once_with(12)
        self.assertEqual(jobs[3]["firstlight"]["instructions_per_io"], {"guest": 107.0, "kvm": 1.0, "kernel": 2.0, "vmm": 3.0})
        ios = jobs[4]["read"]["total_ios"]  # of Linux, several times as many
        self.assertEqual(jobs[4]["firstlight"]["instructions_per_io"]["kvm"], round(16 / ios, 1))
        (row,) = [line.split() for line in said.splitlines() if line.startswith("nvme0n1  nvme     randread 4k qd2")][-1:]
        ours, theirs = 1e9 / report.iops(jobs[3]), 1e5
        self.assertEqual(row[5:11], ["107", "1", "2", "3", "6", f"{ours:.0f}"])
        self.assertEqual(row[-2:], [f"{theirs / ours:.2f}", f"{theirs / (ours - 107):.2f}"])
        self.assertIn("bound: what ours : Linux would be", said)

    def test_counts_of_another_number_of_workloads(self):
        with self.assertRaises(ValueError):
            bench.add_costs([{}], [])

    def test_relative_to_the_baseline(self):
        jobs, _ = self.compare()
        text = report.compared([job for job in jobs if job["firstlight"]["boot"] == "pvh"], [], "xvda")
        self.assertIn("nvme0n1 nvme randread 4k qd1 9457 0.74 1.000".split(), [line.split()[:8] for line in text.splitlines()])
        self.assertNotIn("Linux", text)

    def test_another_drivers_result_is_an_error(self):
        with self.assertRaises(Problem) as raised:
            self.compare(change=lambda text: text.replace('"result","disk":"nvme0n1","driver":"nvme"', '"result","disk":"nvme0n1","driver":"ahci"'))
        self.assertIn("nvme0n1 was driven by ahci, nvme was expected", str(raised.exception))
        self.assertIs(raised.exception.code, Exit.FAILURE)

    def test_ways_to_wait_are_compared(self):
        def polled(text):
            return text.replace('"sleeps":', '"wait":"poll","sleeps":')

        chosen = options(*CALL, "--wait", "poll")
        with self.assertRaises(Problem) as raised:
            self.compare("--wait", "poll")
        self.assertIn("xvda randread: the kernel measured wait=interrupt, wait=poll was asked for", str(raised.exception))
        self.assertIn(" wait=poll", bench.guests(self.sides, self.chosen, chosen)[0].cmdline)
        with self.assertRaises(Problem):
            self.compare(change=polled)
        jobs, said = self.compare("--wait", "poll", change=polled)
        self.assertEqual({job["firstlight"].get("wait") for job in jobs}, {"poll", None})
        self.assertIn("xvda-randread-4k-qd2-poll", [job["jobname"] for job in jobs])
        table = said[said.index("what the processors did while the disks worked") :].split("\n\n")[1]
        self.assertEqual(len(re.findall(r"^(?:xvda|nvme0n1) .* poll ", table, re.M)), 4)
        self.assertNotIn("what the processors did", self.compare()[1])

    def test_a_disk_that_linux_does_not_find_is_named(self):
        missing = '@{"record":"error","message":"Linux: one disk of its driver nvme was expected for nvme0n1, its disks are: xvda by vbd"}'
        with self.assertRaises(Problem) as raised:
            self.compare(change=lambda text: re.sub(r"yardstick nvme0n1 .*", missing, text, count=1, flags=re.S) if "yardstick" in text else text)
        self.assertIn("xen-emu: Linux: one disk of its driver nvme was expected for nvme0n1, its disks are: xvda by vbd.", str(raised.exception))
        self.assertIs(raised.exception.code, Exit.FAILURE)

    def test_a_result_that_is_missing(self):
        with self.assertRaises(Problem) as raised:
            self.compare(change=lambda text: text.replace("yardstick xvda linux-xen-blkfront 1 libaio\n", ""))
        self.assertIn("7 results, 8 expected", str(raised.exception))

    def test_results_have_the_comparisons_names(self):
        # The recorded disk of the Xen ring, as two machines of microvm would have reported it.
        text = part("bench-xen-emu").replace('"disk":"xvda","driver":"xen_blk"', '"disk":"vda","driver":"virtio_blk"').replace('"disk":"xvda"', '"disk":"vda"')
        text = "\n".join(line for line in text.splitlines() if '"disk":"nvme0n1"' not in line)
        found = []
        for side in workloads.COMPARISONS["microvm"]:
            chosen = workloads.Chosen("microvm", list(side.disks), self.chosen.workloads)
            described = bench.main_machine(side, chosen, self.options)
            found += bench.our_jobs(launch.finished(described, nested.Outcome(33, text)), chosen, side, "wall")
        self.assertEqual([job["jobname"] for job in found], [f"{disk}-randread-4k-qd{qd}" for disk in ("mmio", "pci") for qd in (1, 2)])
        self.assertEqual([job["firstlight"]["machine"] for job in found], ["kvm-microvm-acpi"] * 2 + ["kvm"] * 2)

    def test_only_qemus_disks_have_a_host_side(self):
        host, qemu = workloads.COMPARISONS["hyperv"]
        job = {"jobname": "x", "job options": {"name": "read", "bs": "4k", "iodepth": "1"}, "read": {"iops": 1.0, "total_ios": 0, "bw_bytes": 0}, "write": {"iops": 0.0, "bw_bytes": 0, "lat_ns": {"mean": 1}}}
        jobs = [{**job, "firstlight": {"disk": disk, "driver": "d", "kind": "k"}} for disk in (*host.disks, *qemu.disks)]
        ready = types.SimpleNamespace(versions={"linux-image-6.1-amd64": "6.1-1", "qemu-system-x86": "10.0"})
        with (
            contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), mock.patch.object(bench, "measure", return_value=jobs),
            mock.patch.object(bench.launch, "place", return_value=launch.Place(True, "as asked")), mock.patch.object(bench, "revision", return_value="abc"),
        ):  # fmt: skip
            found = bench.compare(ready, workloads.choose(["hyperv"])[0], options())
        self.assertEqual([job["firstlight"].get("host_side", {}).get("aio") for job in found], [None, "threads"])

    def test_progress_has_the_comparisons_names(self):
        said = io.StringIO()
        mmio, pci = workloads.COMPARISONS["microvm"]
        with contextlib.redirect_stderr(said):
            live = bench.progress(2, [], {"bench-kvm-microvm-acpi": mmio, "bench-kvm": pci})
            for name in ("bench-kvm", "bench-kvm-microvm-acpi"):
                live(name, '@{"record":"result","disk":"vda","workload":"read","bs":4096,"qd":1,"runtime_ns":1000000,"read":{"ios":4},"write":{"ios":0}}')
        self.assertRegex(said.getvalue(), r"pci read 4k qd1: 4000 IOPS\n.* mmio read 4k qd1: 4000 IOPS")


class FoundByDriver(unittest.TestCase):
    """yardstick-disks.sh on a tree as Linux's sysfs has it."""

    def setUp(self):
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))
        for folder in ("dev", "sys/class/block", "sys/devices/pci0/1/ata1", "sys/devices/virtual/block/loop0"):
            (self.root / folder).mkdir(parents=True)

    def device(self, path, driver):
        folder = self.root / "sys/devices" / path
        folder.mkdir(parents=True, exist_ok=True)
        (self.root / "sys/drivers" / driver).mkdir(parents=True, exist_ok=True)
        (folder / "driver").symlink_to(self.root / "sys/drivers" / driver)
        return folder

    def block(self, name, device, file=True):
        folder = self.root / "sys/class/block" / name
        folder.mkdir()
        if device:
            (folder / "device").symlink_to(device)
        if file:
            (self.root / "dev" / name).touch()

    def run_shell(self, words):
        text = yardstick.FIND.read_text().replace("/sys/", f"{self.root}/sys/").replace('[ -b "/dev/', f'[ -e "{self.root}/dev/')
        done = subprocess.run(["sh", "-c", f"usleep() {{ echo slept; }}\nend() {{ exit 3; }}\n{text}\n{words}"], capture_output=True, text=True, timeout=20)
        self.assertEqual(done.stderr, "")
        return done.stdout.split("\n")[:-1], done.returncode

    def tree(self):
        self.device("pci0/1", "ata_piix")
        self.block("sda", self.device("pci0/1/ata1/host0/0:0:0:0", "sd"))
        self.block("sda1", None)
        self.device("pci0/2", "virtio-pci")
        self.block("vda", self.device("pci0/2/virtio0", "virtio_blk"))
        self.block("loop0", None)

    def test_each_is_found(self):
        self.tree()
        self.device("pci0/3", "ahci")
        self.block("sdb", self.device("pci0/3/ata2/host1/0:0:0:0", "sd"))
        self.device("pci0/6", "virtio-pci")
        self.device("pci0/6/virtio1", "virtio_scsi")
        self.block("sdc", self.device("pci0/6/virtio1/host2/target2:0:0/2:0:0:0", "sd"))
        for driver, device in (("ata_piix", "sda"), ("ahci", "sdb"), ("virtio_blk", "vda"), ("virtio_scsi", "sdc")):
            self.assertEqual(self.run_shell(f"find_disk {driver} 3 && echo $device"), ([device], 0))

    def test_an_nvme_disk_of_a_subsystem(self):
        self.device("pci0/4", "nvme")
        controller = self.root / "sys/devices/pci0/4/nvme/nvme0"
        controller.mkdir(parents=True)
        subsystem = self.root / "sys/devices/virtual/nvme-subsystem/nvme-subsys0"
        subsystem.mkdir(parents=True)
        (subsystem / "nvme0").symlink_to(controller)
        self.block("nvme0n1", subsystem)
        self.block("nvme0c0n1", controller, file=False)
        self.assertEqual(self.run_shell("find_disk nvme 3 && echo $device"), (["nvme0n1"], 0))

    def test_none_and_several(self):
        self.tree()
        self.assertEqual(self.run_shell("find_disk nvme 3 || echo none"), (["slept", "slept", "none"], 0))
        said, status = self.run_shell("find_disk nvme 1 || missing nvme nvme0n1")
        self.assertEqual(said, ['@{"record":"error","message":"Linux: one disk of its driver nvme was expected for nvme0n1, its disks are: sda by sd ata_piix, vda by virtio_blk virtio-pci"}'])
        self.assertEqual(status, 3)
        self.block("vdb", self.device("pci0/5/virtio1", "virtio_blk"))
        self.assertEqual(self.run_shell("find_disk virtio_blk 3 || echo several"), (["several"], 0))

    def test_the_script_measures_what_it_found(self):
        wanted = [{"name": "randread", "bs": "4k", "qd": 2, "count": 5, "mix": 70}]
        text = yardstick.script([yardstick.Target("hda", IDE), yardstick.Target("nvme0n1", workloads.DRIVERS["nvme"].linux, 3)], wanted)
        lines = [line for line in text.splitlines() if line.startswith(("find_disk ", "fio "))]
        self.assertEqual(len(lines), 6)
        self.assertTrue(lines[0].startswith("find_disk ata_piix ") and lines[0].endswith(" || missing ata_piix hda"), lines[0])
        self.assertIn('--filename=/dev/"$device"', lines[1])
        self.assertIn("--number_ios=5 ", lines[1])
        self.assertIn("--number_ios=15 ", lines[4])
        self.assertEqual(["--ioengine=io_uring" in line for line in lines], [False, False, True, False, False, True])
        for name, value in yardstick.SETTINGS[1].queue:
            before, after = text.split(f"echo {value} > /sys/block/$device/queue/{name};")[:2]
            self.assertTrue(before.count("fio --output") == 1 and after.count("fio --output") >= 1, name)
        # Counted: the mark is the last thing before the first I/O, and the first after the last one.
        words = yardstick.fio_words({**wanted[0], "name": "read"}, port=0x5F0, phase=3, counted=True)
        (begin,) = [word for word in words if "exec_prerun" in word]
        (end,) = [word for word in words if "exec_postrun" in word]
        self.assertTrue(begin.endswith("; mark'") and "seek=1520" in begin, begin)
        self.assertTrue("=mark; printf" in end and "seek=1520" in end, end)
        # fio knows this pattern by another name.
        self.assertIn("--rw=randrw", yardstick.script([yardstick.Target("hda", IDE)], [{**wanted[0], "name": "randrw", "mix": 20}]))


if __name__ == "__main__":
    unittest.main()
