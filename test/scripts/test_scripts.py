"""Parts of the host scripts that need no machine."""

import contextlib
import functools
import io
import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
from pathlib import Path
from unittest import mock

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from firstlight import __main__ as entry  # noqa: E402
from firstlight import (  # noqa: E402
    apt, bench, fiojson, lab, launch, machine, nested, paths, process, records, report, testing, verify_image, vmrun_fault, vmtests, workloads, yardstick,
)  # fmt: skip
from firstlight.problems import Exit, Problem  # noqa: E402
from firstlight.records import Verdict  # noqa: E402


class Alone(unittest.TestCase):
    def test_the_second_one_waits_and_says_so(self):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as said:
            order = []
            held = threading.Event()

            def first():
                with process.alone(Path(folder) / "lock", "first"):
                    held.set()
                    time.sleep(0.5)
                    order.append("first")

            other = threading.Thread(target=first)
            other.start()
            held.wait(20)
            with process.alone(Path(folder) / "lock", "second"):
                order.append("second")
            other.join()
            self.assertEqual(order, ["first", "second"])
            self.assertIn("second: waiting for another run", said.getvalue())
            with process.alone(Path(folder) / "lock", "third"), self.assertRaises(Problem) as refused:
                with process.alone(Path(folder) / "lock", "fourth", seconds=0):
                    self.fail("two at once")
            self.assertEqual(refused.exception.code, Exit.TIMEOUT)


class Records(unittest.TestCase):
    def judge(self, text, status, timed_out=False):
        return records.judge(records.parse(text), status, timed_out).verdict

    def test_verdict_and_exit_status_agree(self):
        self.assertIs(self.judge('hello\n@{"record":"verdict","verdict":"SUCCESS"}\n', 33), Verdict.SUCCESS)

    def test_power_off_without_a_debug_exit_port(self):
        self.assertIs(self.judge('@{"record":"verdict","verdict":"ERROR"}\n', 0), Verdict.ERROR)

    def test_a_monitor_that_was_told_of_a_failure(self):
        for verdict in ("ERROR", "FAILURE", "CRASH"):
            self.assertIs(self.judge('@{"record":"verdict","verdict":"%s"}\n' % verdict, 1), Verdict(verdict))
        for verdict in ("SUCCESS", "SKIP"):
            self.assertIs(self.judge('@{"record":"verdict","verdict":"%s"}\n' % verdict, 1), Verdict.NO_VERDICT)

    def test_everything_else_is_no_verdict(self):
        success = '@{"record":"verdict","verdict":"SUCCESS"}\n'
        self.assertIs(self.judge("", 33), Verdict.NO_VERDICT)
        self.assertIs(self.judge(success, 39), Verdict.NO_VERDICT)
        self.assertIs(self.judge(success, None, timed_out=True), Verdict.TIMEOUT)
        self.assertIs(self.judge(success + success, 33), Verdict.NO_VERDICT)
        self.assertIs(self.judge(success + '@{"record":"error"}\n', 33), Verdict.NO_VERDICT)
        self.assertIs(self.judge('@{"record":"ver\n' + success, 33), Verdict.NO_VERDICT)
        self.assertIs(self.judge('@{"record":"verdict","verdict":"FINE"}\n', 33), Verdict.NO_VERDICT)
        self.assertIs(self.judge('@{"record":"verdict","verdict":"TIMEOUT"}\n', 0), Verdict.NO_VERDICT)


    def test_lines_that_a_console_would_have_cut(self):
        record = {"record": "disk", "name": "xvda", "features": ["x" * 300], "model": "@+ and more"}
        text = "@" + json.dumps(record)
        folded = text[:190]
        for at in range(190, len(text), 188):
            folded += "\n@+" + text[at : at + 188]
        for lines in (
            folded.splitlines(),
            ["(d1) " + line for line in folded.splitlines()],  # as in Xen's log
            ["(d12) " + line for line in "\n(XEN) something else\n".join(folded.splitlines()).splitlines()],
        ):
            lines = [line.replace("(d12) (XEN)", "(XEN)") for line in lines]
            log = records.parse("\r\n".join(["before", *lines, "after"]))
            self.assertEqual(log.records, [record])
            self.assertEqual([line for line in log.text if not line.startswith("(XEN)")], ["before", "after"])
            self.assertFalse(log.malformed)
        self.assertEqual(records.parse("@+nothing before it").text, ["@+nothing before it"])


class Sources(unittest.TestCase):
    def test_deb822(self):
        text = (
            "Types: deb deb-src\n# a comment\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n"
            "Components: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n"
            "Types: deb\nURIs: https://third.example/x\nSuites: bookworm\nComponents: main\nSigned-By: /etc/third.gpg\n\n"
            "Enabled: no\nTypes: deb\nURIs: http://off.example\nSuites: bookworm\nComponents: main\n"
        )
        own = apt.own_sources(apt.parse_deb822(text), "bookworm")
        self.assertEqual([source.uris for source in own], [("http://mirror.example/debian",)])
        rendered = apt.render_sources(own, "bookworm", True, ["main"])
        self.assertIn("Suites: bookworm-backports\n", rendered)
        self.assertEqual(rendered.count("keyring.gpg"), 2)

    def test_one_line(self):
        text = "deb [arch=amd64 signed-by=/k.gpg] http://a.example/debian bookworm main contrib # x\n# deb http://b.example x y\n"
        (source,) = apt.parse_one_line(text)
        self.assertEqual((source.suites, source.signed_by), (("bookworm",), "/k.gpg"))
        self.assertEqual(source.components, ("main", "contrib"))

    def test_no_own_entry(self):
        with self.assertRaises(Problem):
            apt.own_sources(apt.parse_one_line("deb http://a.example/x nodistro main\n"), "bookworm")

    def test_versions_sort_by_number(self):
        self.assertGreater(apt.natural("6.12.117-1"), apt.natural("6.12.95-1"))


class LabOutput(unittest.TestCase):
    def read(self, text):
        reader = nested.Reader("tag", ["one", "two"])
        for line in text.splitlines():
            reader.line(line)
        return reader

    GOOD = (
        "noise\n@@lab tag ready ms=1\n\n@@lab tag begin one\nhello\n\n@@lab tag end one status=33 ms=1500\n"
        "\n@@lab tag begin two\nno line end\n\n@@lab tag end two status=137 ms=9\n\n@@lab tag off\n"
    )

    def test_all_there(self):
        reader = self.read(self.GOOD)
        self.assertEqual(reader.complaint(), "")
        self.assertEqual((reader.outcomes["one"].output, reader.outcomes["one"].status), ("hello\n", 33))
        self.assertEqual(reader.outcomes["one"].seconds, 1.5)
        self.assertTrue(reader.outcomes["two"].timed_out)

    def test_something_missing(self):
        for marker in ("ready", "begin one", "end one", "begin two", "end two", "off"):
            lines = [line for line in self.GOOD.splitlines() if f"tag {marker}" not in line]
            self.assertNotEqual(self.read("\n".join(lines)).complaint(), "", marker)

    def test_another_tag_is_a_jobs_own_output(self):
        reader = self.read(self.GOOD.replace("hello", "@@lab other off"))
        self.assertEqual(reader.outcomes["one"].output, "@@lab other off\n")

    def test_a_pause_counts_before_the_verdict(self):
        verdict = '@{"record":"verdict","verdict":"SUCCESS"}\n'
        paused = "\n@@lab tag paused\n"
        reader = self.read(self.GOOD.replace("hello\n", f"hello\n{paused}more\n{paused}{verdict}"))
        self.assertEqual((reader.outcomes["one"].pauses, reader.outcomes["one"].output, reader.fault), (2, f"hello\nmore\n{verdict}", ""))
        reader = self.read(self.GOOD.replace("hello\n", f"hello\n{verdict}{paused}"))
        self.assertEqual((reader.outcomes["one"].pauses, reader.outcomes["one"].output), (0, f"hello\n{verdict}"))
        self.assertIn("unexpected marker", self.read("@@lab tag ready ms=1\n@@lab tag paused\n").fault)


class Pauses(unittest.TestCase):
    """A machine that runs here is stopped and continued; the case's time-out does not count the pause."""

    VERDICT = """echo '@{"record":"verdict","verdict":"SUCCESS"}'"""

    def watch(self, script, *pauses, timeout=5.0):
        return launch.watch(["sh", "-c", script], nested.Job("m", [], timeout=timeout, pauses=pauses), None)

    def test_it_stands_still(self):
        # Its own clock: the loop ends after at least 40 rounds of 10 ms that it ran, however long it was stopped.
        script = f"echo 'disk hda: ready'; for i in $(seq 40); do sleep 0.01; done; {self.VERDICT}"
        outcome = self.watch(script, nested.Pause("hda: re.dy$", 2.0, 0.05), timeout=1.9)
        self.assertEqual((outcome.pauses, outcome.timed_out, outcome.status), (1, False, 0))
        self.assertGreaterEqual(outcome.seconds, 2.0)

    def test_the_time_that_it_runs_is_limited_all_the_same(self):
        outcome = self.watch("echo a; sleep 60", nested.Pause("a", 0.5), timeout=0.7)
        self.assertEqual((outcome.pauses, outcome.timed_out), (1, True))
        self.assertGreaterEqual(outcome.seconds, 1.2)

    def test_each_waits_for_the_one_before(self):
        script = f"echo a; sleep 0.1; echo a; sleep 0.5; {self.VERDICT}"
        outcome = self.watch(script, nested.Pause("a", 0.3), nested.Pause("a", 0.3, 0.1))
        self.assertEqual(outcome.pauses, 2)
        self.assertGreaterEqual(outcome.seconds, 0.7)
        self.assertEqual(self.watch(f"echo a; sleep 0.3; {self.VERDICT}", nested.Pause("a", 0.1), nested.Pause("a", 0.1)).pauses, 1)

    def test_too_late(self):
        pause = nested.Pause("a", 0.2, 0.3)
        self.assertEqual(self.watch("echo a", pause).pauses, 0)
        self.assertEqual(self.watch("echo a; sleep 0.2", nested.Pause("a", 0.2, 1.0)).pauses, 0)  # it existed when the line was printed
        self.assertEqual(self.watch(f"echo a; {self.VERDICT}; sleep 1", pause).pauses, 0)
        self.assertEqual(self.watch(f"echo b; {self.VERDICT}", pause).pauses, 0)

    def test_one_expression_means_the_same_here_and_in_the_lab(self):
        lines = ['@{"record":"disk","name":"hda"}', "a.b|c", "aab", "x)"]
        for text in ('"record":"disk".*"name":"hda"', r"a\.b\|c", "^a+b$", "(aa|q)b", r"x\)", "[^a-z]b|q", r"@\{", "x?)".replace(")", r"\)")):
            pause = nested.Pause(text, 1)
            program = "{ if ($0 ~ pattern) print }"
            said = subprocess.run(["awk", "BEGIN { pattern = ENVIRON[\"P\"] } " + program], input="\n".join(lines) + "\n", env={"P": text}, text=True, capture_output=True, check=True)
            self.assertEqual(said.stdout.splitlines(), [line for line in lines if re.search(pause.after, line)], text)
            self.assertTrue(said.stdout, text)
        for text in (r"\d", r"a\b", "a{2}", "(?:a)", "a*?", "[[:alpha:]]", r"[\d]", "*a", "(", "", 5):
            with self.assertRaises(Problem, msg=text):
                nested.Pause(text, 1)
        for seconds, delay in ((0, 0), (-1, 0), (601, 0), (1, -1), ("1", 0), (True, 0), (float("nan"), 0)):
            with self.assertRaises(Problem, msg=(seconds, delay)):
                nested.Pause("a", seconds, delay)

    def test_what_goes_into_the_lab(self):
        job = nested.Job("m", ["-x"], timeout=10, pauses=[nested.Pause("a b", 60, 0.5), nested.Pause("c", 0.2)])
        self.assertIn("    pausing timeout -s KILL 70 qemu-system-x86_64 -L /share -x\n", nested.job_script(job, 0, {}))
        self.assertEqual(nested.pause_lines(job), "500000 60000000\ta b\n0 200000\tc\n")


class Machines(unittest.TestCase):
    def test_names_go_on_after_z(self):
        self.assertEqual([machine.drive_letters(n) for n in (0, 25, 26, 27, 51, 52, 701, 702)], ["a", "z", "aa", "ab", "az", "ba", "zz", "aaa"])
        many = machine.Machine("m", "xen-emu", disks=["xen:1m,image=s"] * 300)
        names = many.disk_names()
        self.assertEqual((len(set(names)), names[25], names[26], names[299]), (300, "xvdz", "xvdaa", "xvdkn"))
        words = many.job(Path("/nowhere")).arguments
        self.assertIn("xen-disk,drive=xvdkn,vdev=xvdkn", words)

    def test_more_disks_than_there_are_places(self):
        machine.Machine("m", disks=["ide:1m"] * 4)
        with self.assertRaisesRegex(Problem, "5 IDE disks: a machine has 4 places"):
            machine.Machine("m", disks=["ide:1m"] * 5)
        machine.Machine("m", "hyperv", disks=["scsi:1m"] * 64 + ["scsi:1m,controller=1"])
        with self.assertRaisesRegex(Problem, "65 disks on SCSI controller 0: it has 64 units"):
            machine.Machine("m", "hyperv", disks=["scsi:1m"] * 65)

    def test_disks(self):
        described = machine.Machine("m", "xen-emu", disks=["xen:8m,sector=4096", "ide:8m,image=s", "xen:8m,image=s,readonly"])
        self.assertEqual(described.disk_names(), ["xvda", "hda", "xvdb"])
        disks, words = described.drives()
        self.assertEqual([disk.name for disk in disks], ["xvda.img", "s.img"])
        text = " ".join(words)
        self.assertIn("xen-disk,drive=xvda,vdev=xvda,logical_block_size=4096", text)
        self.assertEqual(text.count("file.locking=off"), 2)
        self.assertEqual(text.count("readonly=on"), 1)

    def test_a_limited_disk(self):
        text = " ".join(machine.Machine("m", "xen-emu", disks=["xen:8m,iops=4", "ide:8m,iops=50", "ide:8m"]).drives()[1])
        self.assertIn("id=xvda,format=raw,file={disk:xvda.img},throttling.iops-total=4 ", text)
        self.assertIn("id=hda,format=raw,file={disk:hda.img},throttling.iops-total=50 ", text)
        self.assertEqual(text.count("throttling"), 2)
        self.assertIn("--disk scsi:{disk:sda.img},iops=4", " ".join(machine.Machine("m", "hyperv", disks=["scsi:8m,iops=4"]).job(Path("/")).arguments))

    def test_impossible(self):
        for words in (
            {"platform": "nonsense"}, {"boot": "uefi"}, {"disks": ["xen:1m"]}, {"disks": ["ide:1x"]},
            {"machine": "microvm", "disks": ["ide:1m"]}, {"disks": ["1m,colour=red"]}, {"platform": "hyperv", "disks": ["ide:1m,content=null"]}, {"platform": "xen-emu", "machine": "q35"},
            {"disks": ["1m,iops=0"]}, {"disks": ["1m,iops=x"]}, {"disks": ["1m,iops=4"], "counted": True}, {"platform": "hyperv", "disks": ["ide:1m,iops=4"]},
            {"pauses": [nested.Pause("a", 1)], "counted": True},
        ):  # fmt: skip
            with self.assertRaises(Problem, msg=str(words)):
                machine.Machine("m", **words)

    def test_job_placeholders(self):
        job = machine.Machine("m", cmdline="a=b,c {x}").job(Path("/nowhere"))
        command = job.command(["qemu"], lambda name: f"/f/{name}", lambda name: f"/d/{name}")
        self.assertIn("/f/firstlight.elf", command)
        self.assertIn("a=b,c {x}", command)
        self.assertTrue(any("file=/d/hda.img" in word for word in command))

    def test_images_to_bring_out_do_not_overlap(self):
        jobs = [
            nested.Job("a", [], disks=[nested.Disk("x", 5, bring_out=Path("/x")), nested.Disk("y", 3 << 20)]),
            nested.Job("b", [], disks=[nested.Disk("z", (1 << 20) + 1, bring_out=Path("/z"))]),
        ]
        self.assertEqual(nested.scratch_layout(jobs), ([{"x": 0}, {"z": 1 << 20}], 3 << 20))


class TestHost(unittest.TestCase):
    def words(self, *disks, **more):
        return machine.Machine("m", "hyperv", disks=list(disks), **more).job(Path("/nonexistent"))

    def test_a_disk_of_each_kind(self):
        job = self.words("scsi:8m,content=zero", "accel:4m,image=root", "ide:4m,image=root", cpus=4, cmdline="job=boot")
        text = " ".join(job.command(["qemu"], "/files/{}".format, "/images/{}".format))
        self.assertTrue(text.startswith("/files/firstlight-testhost --kernel /files/firstlight.elf --append job=boot --cpus 4 "), text)
        self.assertIn("--disk scsi:/images/sda.img", text)
        self.assertIn("--disk scsi:{disk:sda.img},controller=2", " ".join(self.words("scsi:8m,controller=2").arguments))
        self.assertIn("--disk ide:/images/root.img --ide /images/root.img", text)
        self.assertEqual([disk.name for disk in job.disks], ["sda.img", "root.img"])

    def test_names_are_the_kernels(self):
        described = machine.Machine("m", "hyperv", disks=["accel:4m", "scsi:8m", "ide:4m"])
        self.assertEqual(described.disk_names(), ["sda", "sdb", "hda"])

    def test_only_there(self):
        with self.assertRaises(Problem):
            machine.Machine("m", "kvm", disks=["scsi:8m"])
        with self.assertRaises(Problem):
            machine.Machine("m", "hyperv", disks=["xen:8m"])
        with self.assertRaises(Problem):
            machine.Machine("m", "hyperv", disks=["ide:8m,controller=1"])

    def test_a_lab_job_names_the_program(self):
        script = nested.job_script(self.words("scsi:1m"), 3, {})
        self.assertIn("timeout -s KILL 30 /jobs/003/files/firstlight-testhost --kernel", script)


class Comparisons(unittest.TestCase):
    def test_a_platform_selects_both_sides(self):
        (chosen,) = workloads.choose(["hyperv"])
        self.assertEqual((chosen.comparison, chosen.disks, len(chosen.workloads)), ("hyperv", ["sda", "hda"], 5))

    def test_a_job_selects_one(self):
        (chosen,) = workloads.choose(["hyperv/sda-randread-4k-qd32"])
        self.assertEqual((chosen.disks, [w.label for w in chosen.workloads]), (["sda"], ["randread-4k-qd32"]))

    def test_nothing_but_what_is_asked_for(self):
        found = workloads.choose(["xen-emu/xvda-randwrite-4k-qd1", "xen-emu/hda-read-128k-qd8"])
        pairs = [(disk, workload.label) for one in found for disk in one.disks for workload in one.workloads]
        self.assertEqual(sorted(pairs), [("hda", "read-128k-qd8"), ("xvda", "randwrite-4k-qd1")])

    def test_everything(self):
        self.assertEqual([chosen.comparison for chosen in workloads.choose([])], ["xen-emu", "hyperv"])
        self.assertEqual(workloads.choose(["nosuch"]), [])

    def test_ratios(self):
        def job(kind, rate):
            side = {"iops": rate, "total_ios": 1}
            return {
                "read": side, "write": {"iops": 0, "total_ios": 0}, "firstlight": {"kind": kind},
                "job options": {"name": "randread", "bs": "4k", "iodepth": "1"},
            }  # fmt: skip

        text = report.ratios([job("synthetic", 300.0), job("emulated", 100.0)], [job("synthetic", 150.0)])
        self.assertIn("randread 4k qd1        300       100                  3.00                     2.00", text)
        self.assertEqual(report.ratios([job("synthetic", 300.0)]), "")


class Table(unittest.TestCase):
    def load(self, *texts):
        with tempfile.TemporaryDirectory() as folder:
            for number, text in enumerate(texts):
                (Path(folder) / f"{number}.toml").write_text(text)
            return vmtests.load(Path(folder))

    def test_the_table_itself(self):
        self.assertTrue(vmtests.load())

    def test_a_matrix_is_a_row_for_each_combination(self):
        row = '''[[test]]
name = "m"
cmdline = "job=verify features=-flush"
output = ["a"]
[test.matrix.feature]
none = {}
msi = {cmdline = "features=-msi wait=poll", never = ["msix"]}
[test.matrix.processors]
one = {}
four = {cpus = 4, output = ["lanes"]}
'''
        found = {case.name: case for case in self.load(row)}
        self.assertEqual(sorted(found), ["m-msi-four", "m-msi-one", "m-none-four", "m-none-one"])
        self.assertEqual([found["m-none-one"].cmdline, found["m-msi-four"].cmdline], ["job=verify features=-flush", "job=verify features=-flush,-msi wait=poll"])
        self.assertEqual([found[name].cpus for name in ("m-msi-one", "m-msi-four")], [1, 4])
        self.assertEqual([(found[name].output, found[name].never) for name in ("m-none-one", "m-msi-four")], [(["a"], []), (["a", "lanes"], ["msix"])])
        for axis in ("[test.matrix]\nfeature = 5", "[test.matrix.feature]\nnone = 5", "[test.matrix.feature]", "[test.matrix.a]\none = {nonsense = 1}", '[test.matrix.a]\none = {name = "b"}', '[test.matrix.a]\n"A b" = {}',
                     "[test.matrix.a]\none = {cpus = 1}\n[test.matrix.b]\ntwo = {cpus = 2}"):  # fmt: skip
            with self.assertRaises(Problem, msg=axis):
                self.load(f'[[test]]\nname = "m"\n{axis}\n')

    def test_a_matrix_has_every_pair(self):
        axes = [["a", "b", "c", "d", "e"], ["f", "g"], ["h", "i", "j"], ["k", "l"]]
        found = vmtests.pairwise(axes)
        self.assertEqual(found, vmtests.pairwise(axes))
        self.assertTrue(all(value in axis for one in found for value, axis in zip(one, axes)))
        self.assertEqual(len(set(found)), len(found))
        self.assertTrue(15 <= len(found) <= 20, len(found))
        for one, other in itertools.combinations(range(len(axes)), 2):
            self.assertEqual({(row[one], row[other]) for row in found}, set(itertools.product(axes[one], axes[other])))
        self.assertEqual(vmtests.pairwise([["a", "b"]]), [("a",), ("b",)])

    def test_mistakes_are_found(self):
        for row in (
            'name = "Bad Name"', 'name = "a"\nexpct = "ERROR"', 'name = "a"\noutput = ["("]', 'name = "a"\nmap = "no"',
            'name = "a"\nbounds = [{record = "result", field = "a"}]', 'name = "a"\nbounds = [{record = "result", max = 1}]',
            'name = "a"\nbounds = [{record = "result", field = "a", max = 1, mx = 2}]',
            'name = "a"\npause = {after = "a"}', 'name = "a"\npause = {after = "a", seconds = 0}', 'name = "a"\npause = [{after = "(", seconds = 1}]',
            'name = "a"\npause = {after = "a", second = 1}', 'name = "a"\npause = "a"', 'name = "a"\ndeterministic = true\npause = {after = "a", seconds = 1}',
        ):  # fmt: skip
            with self.assertRaises(Problem, msg=row):
                self.load(f"[[test]]\n{row}\n")

        with self.assertRaises(Problem):
            self.load('[default]\ncpus = 2\n[[test]]\nname = "a"\n')
        with self.assertRaises(Problem):
            self.load('[[test]]\nname = "a"\n', '[[test]]\nname = "a"\n')
        with self.assertRaises(Problem):
            self.load('[[test]]\nname = "a"\nintact = ["sda"]\n')
        with self.assertRaises(Problem):
            self.load('[[test]]\nname = "a"\nesp = {"firstlight/map.txt/" = ""}\n')  # a PVH boot has no ESP

    def test_defaults_are_their_tables_own(self):
        a, b, c = self.load(
            '[defaults]\ncpus = 2\nnever = ["x"]\n[[test]]\nname = "a"\n[[test]]\nname = "b"\ncpus = 3\nnever = []\n',
            '[[test]]\nname = "c"\n',
        )
        self.assertEqual([(each.cpus, each.never) for each in (a, b, c)], [(2, ["x"]), (3, []), (1, [])])

    def test_a_pause_that_was_not_carried_out_fails(self):
        (case,) = self.load('[[test]]\nname = "a"\npause = [{after = "x", seconds = 1}, {after = "y z", delay = 0.5, seconds = 7}]\n')
        self.assertEqual(case.pause, [nested.Pause("x", 1), nested.Pause("y z", 7, 0.5)])
        self.assertEqual(self.load('[[test]]\nname = "a"\npause = {after = "x", seconds = 1}\n')[0].pause, [nested.Pause("x", 1)])
        described = case.to_machine(Path("/"))
        self.assertEqual(list(described.job(Path("/")).pauses), case.pause)
        outcomes = {done: vmtests.judge(case, launch.finished(described, nested.Outcome(33, self.said(), pauses=done))) for done in (0, 1, 2)}
        self.assertEqual([outcomes[done].status for done in (0, 1, 2)], ["failed", "failed", "passed"])
        self.assertIn("1 of 2 pauses were carried out before the verdict; too late or never: 7 s, 0.5 s after 'y z'", outcomes[1].detail)

    def test_only_what_is_intact_is_looked_at(self):
        case = vmtests.Case(
            "a", platform="hyperv", disks=["scsi:4k", "scsi:4k"], check_images=True, intact=["sdb"], cmdline="job=verify scratch=all",
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            described = case.to_machine(Path(folder))
            self.assertEqual([disk.bring_out for disk in described.specs], [None, Path(folder) / "a-sdb.img"])
            whole = {"record": "verify", "bs": 4096, "seed": 1, "generation": 1, "first_lba": 0, "bad": 0, "ok": True}
            whole |= {"discarded": 0, "zeroed": 0}
            whole |= dict.fromkeys(("blocks", "written", "read"), 1)
            bad = {**whole, "disk": "sda", "written": 0, "ok": False}
            for record, wanted in (({**whole, "disk": "sdb"}, "blocks are wrong"), (bad, "one each of ['sdb'] expected")):
                described.specs[1].bring_out.write_bytes(bytes(4096))
                outcome = nested.Outcome(33, self.said(bad, record) if record is not bad else self.said(bad))
                (complaint,) = vmtests.check_images(launch.finished(described, outcome), case.intact)
                self.assertIn(wanted, complaint)

    def test_a_failed_disk_holds_what_it_acknowledged(self):
        case = vmtests.Case(
            "a", platform="hyperv", disks=["scsi:8k", "scsi:4k"], check_images=True, intact=["sdb"], acknowledged=["sda"], cmdline="job=verify",
        )  # fmt: skip
        record = {"record": "verify", "disk": "sda", "bs": 4096, "seed": 1, "generation": 1, "first_lba": 0, "blocks": 2, "ok": False}
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(verify_image, "check", return_value=["LBA 8: no stamp"]):
            described = case.to_machine(Path(folder))
            for written, complaints in ((1, 0), (2, 1), (0, 1)):
                described.specs[0].bring_out.write_bytes(bytes(8192))
                boot = launch.finished(described, nested.Outcome(33, self.said({**record, "written": written})))
                self.assertEqual(len(vmtests.check_acknowledged(boot, "sda")), complaints, written)
            described.specs[0].bring_out.unlink()
            self.assertIn("no image", vmtests.check_acknowledged(boot, "sda")[0])

    def result(self, said, status, /, **row):
        case = vmtests.Case("a", **row)
        outcome = nested.Outcome(status, said)
        return vmtests.judge(case, launch.finished(case.to_machine(Path("/")), outcome)).status

    def test_judgement(self):
        success = 'x\n@{"record":"verdict","verdict":"SUCCESS"}\n'
        crash = '@{"record":"verdict","verdict":"CRASH"}\n'
        skip = '@{"record":"verdict","verdict":"SKIP"}\n'
        self.assertEqual(self.result(success, 33), "passed")
        self.assertEqual(self.result(success, 33, output=["^x$"]), "passed")
        self.assertEqual(self.result(success, 33, output=["y"]), "failed")
        self.assertEqual(self.result(success, 33, never=["x"]), "failed")
        self.assertEqual(self.result(success, 33, expect="ERROR"), "failed")
        self.assertEqual(self.result(crash, 41, expect="CRASH"), "passed")
        self.assertEqual(self.result("", 0, expect="CRASH"), "failed")
        self.assertEqual(self.result(skip, 35), "failed")
        self.assertEqual(self.result(skip, 35, required=False), "skipped")
        self.assertEqual(self.result(skip, 35, expect="SKIP"), "passed")

    def said(self, *found):
        return "\n".join("@" + json.dumps(record) for record in (*found, {"record": "verdict", "verdict": "SUCCESS"}))

    def bounded(self, bound, *found):
        return self.result(self.said(*found), 33, bounds=[vmtests.Bound(**bound)])

    def test_bounds(self):
        accesses = {"record": "result", "where": {"disk": "xvda", "qd": 32}, "per_io": "hypercalls"}
        self.assertEqual(self.bounded({**accesses, "max": 0.05}, RESULT), "passed")
        self.assertEqual(self.bounded({**accesses, "max": 0.04}, RESULT), "failed")
        self.assertEqual(self.bounded({**accesses, "min": 0.06}, RESULT), "failed")
        self.assertEqual(self.bounded({**accesses, "max": 9, "where": {"disk": "hda"}}, RESULT), "failed")
        self.assertEqual(self.bounded({**accesses, "max": 9}, RESULT, {**RESULT, "hypercalls": 99999}), "failed")
        self.assertEqual(self.bounded({**accesses, "max": 9}, {**RESULT, "hypercalls": None}), "failed")
        boot = {"record": "boot", "detect_ns": 5, "first_probe_ns": 6}
        order = {"record": "boot", "field": "detect_ns", "below": "first_probe_ns"}
        self.assertEqual(self.bounded(order, boot), "passed")
        self.assertEqual(self.bounded(order, {**boot, "detect_ns": 6}), "failed")
        self.assertEqual(self.bounded(order, {"record": "boot", "detect_ns": 5}), "failed")

    def test_no_allocation_and_no_error_unasked(self):
        self.assertEqual(self.result(self.said(RESULT), 33), "passed")
        self.assertEqual(self.result(self.said({**RESULT, "allocations": 1}), 33), "failed")
        self.assertEqual(self.result(self.said({**RESULT, "errors": 1}), 33), "failed")


class Survival(unittest.TestCase):
    """Every test has a result, and the table is printed, in spite of any failure."""

    SAID = '@{"record":"verdict","verdict":"SUCCESS"}\n'

    def run_cases(self, *starts):
        """Three tests for the lab, whose starts end as in `starts`: an exception, or each test's outcome."""
        cases = [vmtests.Case(name) for name in ("one", "two", "three")]
        waiting = list(starts)
        order = []

        def boot(ready, machines, **options):
            order.append([each.name for each in machines])
            start = waiting.pop(0)
            if isinstance(start, Exception):
                raise start
            for each in machines:
                yield launch.finished(each, start.get(each.name, nested.Outcome()))

        with (
            mock.patch.object(launch, "boot", boot),
            mock.patch.object(launch, "place", return_value=launch.Place(True, "")),
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(vmtests.paths, "RUNS", Path(folder)),
        ):
            found = list(vmtests.run(None, cases, "auto", lambda text: None))
        return {result.name: result.status for result in found}, order

    def test_the_one_that_killed_the_lab_fails_alone(self):
        good = nested.Outcome(33, self.SAID)
        dead = nested.Outcome(None, "the last words\n")
        found, order = self.run_cases({"one": dead}, {"two": good, "three": good, "one": dead}, {"one": dead})
        self.assertEqual(found, {"one": "failed", "two": "passed", "three": "passed"})
        self.assertEqual(order[1], ["two", "three", "one"])

    def test_a_lab_that_never_starts(self):
        for error in (Problem("no"), OSError(28, "full"), subprocess.TimeoutExpired("qemu", 10)):
            found, order = self.run_cases(error, error)
            self.assertEqual(set(found.values()), {"failed"}, error)
            self.assertEqual((len(found), len(order)), (3, 2))

    def test_parts_run_side_by_side_and_none_is_lost(self):
        meet = threading.Barrier(2, timeout=20)  # two parts at a time, or the barrier breaks

        def part(name):
            meet.wait()
            yield vmtests.Result(name, "passed")
            yield vmtests.Result(name + "2", "passed")

        found = vmtests.side_by_side([functools.partial(part, name) for name in "abcd"], 2)
        self.assertEqual(sorted(result.name for result in found), ["a", "a2", "b", "b2", "c", "c2", "d", "d2"])

    def test_an_end_before_the_time_ends_every_child(self):
        script = (
            "import sys, time; sys.path.insert(0, sys.argv[1])\n"
            "from firstlight import process, vmtests\n"
            "def part():\n"
            "    yield vmtests.Result('first', 'passed')\n"
            "    process.run(['sleep', '600'], timeout=500)\n"
            "for result in vmtests.side_by_side([part, part], 2):\n"
            "    time.sleep(0.5)\n"
            "    raise KeyboardInterrupt\n"
        )
        begin = time.monotonic()
        done = subprocess.run([sys.executable, "-c", script, str(SCRIPTS)], capture_output=True, text=True, timeout=60)
        self.assertIn("KeyboardInterrupt", done.stderr)
        self.assertLess(time.monotonic() - begin, 30)

    def test_a_test_without_a_place_fails_alone(self):
        cases = [vmtests.Case("one")]
        with mock.patch.object(launch, "place", side_effect=Problem("no KVM")):
            self.assertEqual([result.status for result in vmtests.run(None, cases, "never", print)], ["failed"])

    def test_a_record_without_its_fields(self):
        case = vmtests.Case("a", check_images=True)
        said = '@{"record":"verify"}\n' + self.SAID
        finished = launch.finished(case.to_machine(Path("/nowhere")), nested.Outcome(33, said))
        self.assertEqual(vmtests.judged(case, finished).status, "failed")

    def test_every_suite_breaks_down_and_the_last_line_comes(self):
        def dies(*words):
            yield vmtests.Result("some", "passed")
            raise OSError("broken")

        out = io.StringIO()
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(io.StringIO()),
            mock.patch.object(testing, "host_tests", dies),
            mock.patch.object(testing.scripttests, "run", dies),
            mock.patch.object(testing.image, "checks", dies),
            mock.patch.object(testing.debugger, "checks", dies),
            mock.patch.object(testing.checks, "checks", dies),
            mock.patch.object(testing.build, "kernel"),
            mock.patch.object(testing.setup, "ensure"),
            mock.patch.object(testing.lab, "find", side_effect=Problem("no lab")),
            mock.patch.object(testing.vmtests, "load", return_value=[vmtests.Case("one"), vmtests.Case("two")]),
        ):
            file = Path(folder) / "junit.xml"
            code = testing.main(["--fast", "--junit", str(file)])
            self.assertEqual(file.read_text().count("<error"), 7)
        self.assertIs(code, Exit.FAILURE)
        self.assertEqual(out.getvalue().splitlines()[-1], "6 passed, 7 failed, 0 skipped")


class Choosing(unittest.TestCase):
    def test_a_suite_is_asked_for_by_name_pattern_or_a_test_of_it(self):
        for pattern in ("fuzz", "fuzz*", "fuzz/packets", "f*/vmbus", "*", "uzz"):
            self.assertTrue(testing.wanted("fuzz", [pattern], whole=True), pattern)
        for pattern in ("host", "host/fuzz", "vm*"):
            self.assertFalse(testing.wanted("fuzz", [pattern], whole=True), pattern)

    def test_a_whole_run_has_the_unit_tests_once(self):
        for words, expected in (
            ([], [("host", False), ("asan", True), ("tsan", False)]), (["--fast"], [("host", True)]), (["--only", "host"], [("host", True)]), (["--only", "host/Ring*,asan"], [("host", True), ("asan", True)]),
        ):  # fmt: skip
            options = testing.arguments().parse_args(words)
            presets = ("host",) if options.fast else testing.PRESETS
            suites = {name: mock.DEFAULT for name in ("fuzz_tests", "minimal", "attempt", "host_tests")}
            with (
                mock.patch.multiple(testing, **suites) as fakes, mock.patch.object(testing.scripttests, "run"), mock.patch.object(testing.checks, "checks"), mock.patch.object(testing.image, "checks"),
                mock.patch.object(testing.debugger, "checks"), mock.patch.object(testing.tidy, "checks"),
            ):  # fmt: skip
                testing.run_suites(options, [], presets, mock.Mock(), lambda found: None)
            self.assertEqual([(call.args[0], call.args[2]) for call in fakes["host_tests"].call_args_list], expected, words)

    def test_a_minimal_kernel_is_searched_for_every_hypervisor(self):
        for name in (
            "fl::hv::xen::Store@hv.xen.store::read()", "fl::hv::Xen@hv.xen::start(fl::hv::Services&)", "fl::hv::Kvm@hv.kvm::install()",
            "fl::hv::hyperv::Vmbus@hv.hyperv.vmbus::connect()", "fl::hv::HyperV@hv.hyperv::join(unsigned int)",
            "fl::drivers::xen_blk::probe()", "fl::drivers::storvsc::Queue@drivers.storvsc.disk::drain()",
            "fl::drivers::hv_util::probe()", "fl::drivers::hv_balloon::probe()",
        ):  # fmt: skip
            self.assertRegex(f"ffffffff80001000 t {name}", testing.FOREIGN)
        for name in ("fl::hv::detect(fl::CpuidSnapshot const&)", "fl::hv::Bare@hv.bare::install()", "fl::drivers::ata::probe()"):
            self.assertNotRegex(f"ffffffff80001000 t {name}", testing.FOREIGN)


class Fuzzing(unittest.TestCase):
    CORPUS = "INFO:       14 files found in /x/test/fuzz/corpus/vmbus\n"
    DONE = f"Done {testing.FUZZ_RUNS} runs in 7 second(s)\n"
    CRASH = "==7== ERROR: libFuzzer: deadly signal\nTest unit written to /x/findings/vmbus-crash-1\n"

    def test_all_done(self):
        self.assertEqual(testing.fuzz_fault(0, self.CORPUS + self.DONE), "")

    def test_everything_else_is_a_fault(self):
        for status, said in (
            (77, self.CORPUS + self.CRASH),
            (0, self.CORPUS + self.CRASH + self.DONE),
            (1, self.CORPUS + self.DONE),
            (0, self.DONE),
            (0, "INFO:        0 files found in /x/test/fuzz/corpus/vmbus\n" + self.DONE),
            (0, self.CORPUS),
            (0, self.CORPUS + "Done 20 runs in 0 second(s)\n"),
            (0, self.CORPUS + self.DONE + self.DONE),
        ):
            self.assertNotEqual(testing.fuzz_fault(status, said), "", said)
        self.assertEqual(testing.fuzz_fault(77, self.CRASH), "libFuzzer: deadly signal; the input: /x/findings/vmbus-crash-1")

    def test_the_targets_are_those_of_the_tree(self):
        folder = paths.REPOSITORY / "test" / "fuzz"
        self.assertEqual(sorted(file.stem for file in folder.glob("*.cpp")), sorted(testing.FUZZ_TARGETS))
        self.assertEqual(sorted(file.name for file in (folder / "corpus").iterdir()), sorted(testing.FUZZ_TARGETS))


class ExitStatus(unittest.TestCase):
    def status(self, error):
        module = types.SimpleNamespace(main=mock.Mock(side_effect=error))
        said = io.StringIO()
        with (
            mock.patch.object(entry.importlib, "import_module", return_value=module),
            mock.patch.object(entry.launch, "die_on_signals"),
            mock.patch.object(sys, "argv", ["x", "test"]),
            contextlib.redirect_stderr(said),
        ):
            return entry.main(), said.getvalue()

    def test_a_fault_of_the_script_is_no_failed_test(self):
        code, said = self.status(OSError(28, "No space left on device", "/x"))
        self.assertEqual((code, said.count("\n")), (Exit.ERROR, 1))
        self.assertIn("scripts/test: /x: no space left on the disk", said)
        code, said = self.status(KeyError("x"))
        self.assertEqual(code, Exit.ERROR)
        self.assertIn("Traceback", said)
        self.assertEqual(self.status(Problem("p", Exit.MISSING))[0], Exit.MISSING)


RESULT = {
    "record": "result", "disk": "xvda", "driver": "xen_blk", "kind": "synthetic", "workload": "randread", "bs": 4096,
    "qd": 32, "count": 2000, "seed": 1, "mix": 70, "runtime_ns": 50_000_000, "errors": 0, "device_accesses": 0,
    "hypercalls": 100, "notifications": 100, "interrupts": 200, "allocations": 0, "lanes": 1, "sleeps": 150, "busy_ns": 10_000_000,
    "read": {"ios": 2000, "bytes": 8192000, "lat_ns": {"min": 1, "max": 9, "mean": 5.0, "stddev": 1.0, "N": 2000,
                                                        "percentile": {"50.000000": 5, "99.000000": 8}}},
    "write": {"ios": 0, "bytes": 0},
}  # fmt: skip


class Fio(unittest.TestCase):
    def test_units_are_fios(self):
        job = fiojson.job(RESULT, {"platform": "xen-emu"})
        read = job["read"]
        self.assertEqual(job["jobname"], "xvda-randread-4k-qd32")
        self.assertEqual((read["iops"], read["bw"], read["runtime"], read["io_bytes"]), (40000.0, 160000, 50, 8192000))
        self.assertEqual(read["clat_ns"]["percentile"]["99.000000"], 8)
        self.assertEqual(job["write"]["clat_ns"]["N"], 0)
        self.assertEqual(job["firstlight"]["hypercalls_per_io"], 0.05)

    def test_tables(self):
        job = fiojson.job({**RESULT, "exits": 128}, {})
        other = fiojson.job({**RESULT, "disk": "hda", "kind": "emulated", "runtime_ns": 100_000_000}, {})
        self.assertEqual((job["firstlight"]["exits_per_io"], other["firstlight"]["exits_per_io"]), (0.064, None))
        heads, _, *rows = [line.split() for line in report.results([job, other]).splitlines()]
        self.assertEqual((heads[-1], rows[0][-1], rows[1][-1]), ("exit/IO", "0.064", "-"))
        self.assertIn("40000", report.results([job]))
        self.assertIn("2.00", report.ratios([job, other]))

    def test_ways_to_wait_have_rows_and_names_of_their_own(self):
        asleep, polled = (fiojson.job({**RESULT, **more}, {}) for more in ({}, {"wait": "poll", "runtime_ns": 40_000_000, "interrupts": 0, "sleeps": 0, "busy_ns": 40_000_000}))
        linux = {"firstlight": {"disk": "xvda", "kind": "synthetic"}, "job options": asleep["job options"], "read": {"iops": 10000.0}, "write": {"iops": 0}}
        rows = [line.split() for line in report.by_wait([polled, asleep]).splitlines()[2:]]
        self.assertEqual(rows[0][4:6] + rows[0][-4:], ["qd32", "poll", "0.000", "20.0", "100", "%"])
        self.assertEqual(rows[1][4:7] + rows[1][-4:], ["qd32", "interrupt", "40000", "0.075", "5.0", "20", "%"])
        heads, _, *rows = [line.split() for line in report.compared([asleep, polled], [linux], "xvda").splitlines()]
        self.assertEqual([row[2:10] for row in rows], [["randread", "4k", "qd32", "40000", "1.00", "10000", "4.00", "0.000"], ["randread", "4k", "qd32", "poll", "50000", "1.00", "10000", "5.00"]])
        self.assertIn("randread 4k qd32 poll 50000 - - 5.00 -", [" ".join(line.split()) for line in report.ratios([asleep, polled], [linux]).splitlines()])
        self.assertEqual(report.by_depth([asleep, polled], [linux]).splitlines()[-1].split(), ["32", "40000", "10000", "50000"])
        self.assertEqual(len(report.median_run([[asleep, polled], [asleep, polled]])), 2)

    def test_of_several_runs_the_median_and_the_range(self):
        runs = [[fiojson.job({**RESULT, "runtime_ns": ns}, {})] for ns in (50_000_000, 40_000_000, 100_000_000, 80_000_000)]
        (chosen,) = report.median_run(runs)
        self.assertEqual(chosen["read"]["iops"], 25000.0)  # the lower one of the two in the middle
        self.assertEqual(chosen["firstlight"]["runs_iops"], [40000.0, 50000.0, 20000.0, 25000.0])
        row, _, about = report.spread([chosen], 1).splitlines()[2:]
        self.assertEqual([*row.split()[:3], *row.split()[-5:]], ["xvda-randread-4k-qd32", "4", "32500", "20000", "50000", "78.5", "%", "*"])
        self.assertIn("* more than 5 %", about)

    def test_modes_of_a_figure_that_depends_on_its_start(self):
        runs = [[fiojson.job({**RESULT, "runtime_ns": round(2000 / rate * 1e9)}, {})] for rate in (50000, 50100, 40000, 50200, 40100)]
        self.assertIn("\nxvda-randread-4k-qd32: 50100 in 3 of 5 runs, 40050 in 2 of 5 runs", report.spread(report.median_run(runs), 1))
        exact = report.spread(report.median_run([runs[0]] * 5), 1)
        self.assertRegex(exact, r"xvda-randread-4k-qd32 +5 +50000 +50000 to 50000 +50000 +50000 +0.0 %")
        self.assertNotIn("*", exact)

    def test_versions_are_those_of_the_lab_that_runs(self):
        ready = types.SimpleNamespace(versions={"linux-image-6.1-amd64": "6.1-1", "qemu-system-x86": "10.0"})
        xen = types.SimpleNamespace(version="4.17", versions={
            "kernel/linux-image-6.2-amd64": "6.2-1", "dom0/xen-hypervisor-4.17-amd64": "4.17.7", "emulator/qemu-system-x86": "7.2",
        })  # fmt: skip
        with mock.patch.object(bench, "revision", return_value="abc"), mock.patch.object(bench.xenlab, "find", return_value=xen):
            self.assertEqual(bench.versions(ready, machine.PLATFORMS["xen-emu"], True), {"Firstlight": "abc", "QEMU": "10.0", "Linux": "6.1-amd64"})
            self.assertEqual(
                bench.versions(ready, machine.PLATFORMS["xen-pvh"], False), {"Firstlight": "abc", "Xen": "4.17.7", "QEMU": "7.2", "Linux": "6.2-amd64"}
            )

    def test_a_machine_without_git_is_measured(self):
        with mock.patch.object(process, "run", side_effect=Problem("git: not found.", Exit.MISSING)):
            self.assertEqual(bench.revision(), "of an unknown commit")

    def test_each_run_begins_elsewhere(self):
        (chosen,) = workloads.choose(["xen-emu/*-randread-4k-qd32"])
        service = {"randread-4k-qd32": [22_000.0, 110_000.0]}
        runs = [workloads.perturbed(chosen, 7, number, 8, service).workloads[0] for number in range(8)]
        part = 32 * 110_000 / 8
        for number, workload in enumerate(runs):
            self.assertTrue(number * part <= workload.startdelay < (number + 1) * part)
            self.assertEqual(workload.thinktime, 22_000)
            self.assertIn(f"seed={workload.seed},startdelay={workload.startdelay},thinktime=22000", workload.word)
        self.assertEqual(len({workload.seed for workload in runs}), 8)
        self.assertEqual(runs, [workloads.perturbed(chosen, 7, number, 8, service).workloads[0] for number in range(8)])
        self.assertNotEqual(runs, [workloads.perturbed(chosen, 8, number, 8, service).workloads[0] for number in range(8)])
        self.assertGreater(workloads.perturbed(chosen, 7, 0, 8, {}).workloads[0].thinktime, 0)
        self.assertNotIn("startdelay", chosen.workloads[0].word)

    def test_times_by_an_assumed_clock_have_a_note(self):
        good = fiojson.job(RESULT, {"clock_assumed": False})
        guessed = fiojson.job({**RESULT, "disk": "hda"}, {"clock_assumed": True})
        self.assertEqual(report.clock_note([good, good]), "")
        self.assertEqual(report.clock_note([fiojson.job(RESULT, {})]), "")
        self.assertIn("Clock assumed (hda-randread-4k-qd32)", report.clock_note([good, guessed]))
        self.assertIn("Clock assumed (all rows)", report.clock_note([guessed]))
        self.assertTrue(guessed["firstlight"]["clock_assumed"])

    def test_yardstick_output(self):
        text = 'yardstick hda linux-ata_piix 0 io_uring\n{"jobs" : [{"jobname":\n"x"}]}\nyardstick end\n'
        self.assertEqual(yardstick.results(text), [("hda", "linux-ata_piix", 0, "io_uring", {"jobname": "x"})])
        # fio's message about the output of its marks, and the host's counts, precede the JSON.
        marked = text.replace("\n{", '\n@@host {"phase":1,"counters":{}}\nx : Saving output of prerun in x.prerun.txt{', 1)
        self.assertEqual(yardstick.results(marked), yardstick.results(text))

    def test_only_a_host_that_takes_marks_gets_them(self):
        wanted = [{"name": "randread", "bs": "4k", "qd": 1, "count": 5, "mix": 70}] * 2
        targets = [yardstick.Target(disk, workloads.DRIVERS[bus].linux) for disk, bus in (("sda", "scsi"), ("hda", "ide"))]
        self.assertNotIn("/dev/port", yardstick.script(targets, wanted))
        text = yardstick.script(targets, wanted, 0x5F0)
        marks = re.findall(r"exec_(pre|post)run=printf '\"'\"'\\(\d{3})'\"'\"' \| dd of=/dev/port bs=1 seek=1520'", text)
        self.assertEqual(marks, [(when, number) for i in range(1, 1 + 4 * len(yardstick.SETTINGS)) for when, number in (("pre", f"{i:03o}"), ("post", "000"))])
        header = (paths.REPOSITORY / "test/host/vmm/board.cppm").read_text()
        (taken,) = [one for one in machine.PLATFORMS.values() if one.marks]
        self.assertTrue(taken.test_host)
        self.assertIn(f"phase_port = {taken.marks:#x};", header)
        for side in workloads.COMPARISONS["hyperv"]:
            (chosen,) = workloads.choose(["hyperv"])
            words = bench.main_machine(side, chosen, bench.arguments().parse_args([])).cmdline.split()
            self.assertEqual("marks=0x5f0" in words, side.platform == "hyperv", words)


class Phases(unittest.TestCase):
    """The host's counts between the marks, and the results that they belong to."""

    RECORD = '@{"record":"result","disk":"sda"}'

    @staticmethod
    def phase(number, exits=5):
        return f'@@host {{"phase":{number},"ns":9,"exits":{exits},"counters":{{"kvm_exits":{exits}}}}}'

    def test_each_result_gets_its_own(self):
        log = records.parse("\n".join([self.phase(1, 7), self.RECORD, "@@host hot-add: done", self.phase(2, 8), self.RECORD]))
        self.assertEqual(([result["exits"] for result in log.of("result")], log.malformed), ([7, 8], []))
        self.assertEqual([phase["counters"]["kvm_exits"] for phase in log.phases], [7, 8])

    def test_where_nobody_counts(self):
        log = records.parse(f'{self.RECORD}\n@@host {{"end":"debug exit","status":33,"ns":1,"counters":{{}}}}')
        self.assertEqual((log.phases, "exits" in log.of("result")[0]), ([], False))
        # A KVM without counts of exits.
        log = records.parse(f'@@host {{"phase":1,"ns":9,"counters":{{"exit_io_in":1}}}}\n{self.RECORD}')
        self.assertEqual((len(log.phases), "exits" in log.of("result")[0], log.malformed), (1, False, []))

    def test_out_of_step(self):
        for lines in (
            [self.phase(2), self.RECORD], [self.phase(1), self.phase(1)], [self.phase(1), self.phase(2), self.RECORD],
            [self.RECORD, self.phase(1), self.RECORD, self.RECORD], [self.phase(1)[:-2]], [self.phase(1, -1)], [self.phase(1, '"5"')],
            [self.phase('"1"')], ['@@host {"phase":1,"exits":1}'],
        ):  # fmt: skip
            self.assertTrue(records.parse("\n".join(lines)).malformed, lines)

    def demand(self, platform, *lines, expected=2):
        described = machine.Machine("m", platform)
        log = records.parse("\n".join(lines))
        bench.demand_phases(types.SimpleNamespace(machine=described, log=log), expected)

    def test_a_phase_that_is_missing_is_a_problem(self):
        self.demand("hyperv", self.phase(1), self.phase(2))
        self.demand("kvm")
        with self.assertRaises(Problem) as missing:
            self.demand("hyperv", self.phase(1))
        self.assertIn("phases 1 to 2 and told of: 1.", str(missing.exception))
        with self.assertRaises(Problem) as missing:
            self.demand("hyperv", self.phase(1), self.phase(3))
        self.assertIn("out of turn: @@host", str(missing.exception))
        with self.assertRaises(Problem) as missing:
            self.demand("hyperv")
        self.assertIn("told of: none", str(missing.exception))


class Stamps(unittest.TestCase):
    def block(self, lba=8, generation=1, seed=1, size=4096):
        block = bytearray(struct.pack("<8sQQQII", b"FLVERIFY", lba, generation, seed, 0, size).ljust(size, b"\xa5"))
        struct.pack_into("<I", block, 32, verify_image.crc32c()(bytes(block)))
        return bytes(block)

    def check(self, block):
        return verify_image.check_block(block, 4096, 8, 1, 1, verify_image.crc32c())

    def test_crc_is_castagnoli(self):
        self.assertEqual(verify_image.crc32c()(b"123456789"), 0xE3069283)

    def test_good_and_bad(self):
        self.assertEqual(self.check(self.block()), "")
        self.assertIn("LBA 9", self.check(self.block(lba=9)))
        self.assertIn("generation", self.check(self.block(generation=2)))
        self.assertIn("CRC", self.check(self.block()[:-1] + b"x"))
        self.assertIn("magic", self.check(bytes(4096)))
        self.assertIn("ends", self.check(b"short"))


class Images(unittest.TestCase):
    """Compares the kernel's report of what it verified with the command line and the image."""

    RECORD = {
        "record": "verify", "disk": "hda", "bs": 4096, "blocks": 2, "first_lba": 0, "generation": 1, "seed": 1,
        "written": 2, "discarded": 0, "zeroed": 0, "read": 2, "bad": 0, "ok": True,
    }  # fmt: skip

    def complaints(self, *found, cmdline="job=verify disk=hda", image=None):
        stamps = Stamps()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "hda.img"
            path.write_bytes(image or stamps.block(lba=0) + stamps.block(lba=8))
            case = vmtests.Case("a", cmdline=cmdline)
            boot = launch.finished(case.to_machine(Path(folder)), nested.Outcome(33))
            boot.log.records += found
            boot.machine.specs[0].bring_out = path
            return "; ".join(vmtests.check_images(boot))

    def test_true(self):
        self.assertEqual(self.complaints(self.RECORD), "")
        self.assertEqual(self.complaints({**self.RECORD, "blocks": 1, "written": 1, "read": 1}, cmdline="disk=hda count=1"), "")

    def test_erased_blocks(self):
        stamps = [Stamps().block(lba=8 * number) for number in range(6)]
        record = {**self.RECORD, "blocks": 6, "written": 6, "read": 6, "discarded": 2, "zeroed": 1}
        words = "job=verify disk=hda erase=discard,zeroes"
        zero, other = bytes(4096), b"\xdd" * 4096
        for changed, said in (({1: other, 2: zero, 5: zero}, ""), ({1: zero}, "not zeros"), ({2: zero, 3: zero}, "magic"), ({2: other}, "not zeros")):
            image = b"".join(changed.get(number, stamp) for number, stamp in enumerate(stamps))
            complaint = self.complaints(record, cmdline=words, image=image)
            (self.assertIn if said else self.assertEqual)(said, complaint)
        image = b"".join([*stamps[:2], zero, *stamps[3:]])
        for change in ({"discarded": 1}, {"zeroed": 0}, {"zeroed": 2}):
            self.assertNotEqual(self.complaints({**record, **change}, cmdline=words, image=image), "", change)
        self.assertIn("magic", self.complaints({**record, "discarded": 0, "zeroed": 0}, cmdline="disk=hda", image=image))
        secure = {**record, "discarded": 0, "zeroed": 0, "secure_discarded": 1}
        words = "job=verify disk=hda erase=secure-discard"
        for changed, said in ((3, ""), (1, "magic"), (2, "magic")):
            image = b"".join(other if number == changed else stamp for number, stamp in enumerate(stamps))
            complaint = self.complaints(secure, cmdline=words, image=image)
            (self.assertIn if said else self.assertEqual)(said, complaint)
        self.assertIn("secure_discarded", self.complaints({**secure, "secure_discarded": 0}, cmdline=words, image=image))

    def test_not_true(self):
        for change in (
            {"blocks": 1}, {"blocks": 0, "written": 0, "read": 0}, {"first_lba": 8, "blocks": 1}, {"bs": 512}, {"seed": 2}, {"generation": 2},
            {"written": 1}, {"bad": 1}, {"ok": False},
        ):  # fmt: skip
            self.assertNotEqual(self.complaints({**self.RECORD, **change}), "", change)
        for words in ("disk=hda count=1", "disk=hda bs=8k", "disk=hda seed=3", "disk=hda generation=3", "disk=hda,xvda", "disk=xvda"):
            self.assertNotEqual(self.complaints(self.RECORD, cmdline=words), "", words)
        self.assertNotEqual(self.complaints(), "")
        self.assertNotEqual(self.complaints(self.RECORD, self.RECORD), "")
        self.assertIn("magic", self.complaints(self.RECORD, image=Stamps().block(lba=0) + bytes(4096)))
        self.assertIn("cover", self.complaints(self.RECORD, image=Stamps().block(lba=0) + Stamps().block(lba=8) + bytes(4096)))


class Modules(unittest.TestCase):
    def test_dependencies(self):
        self.assertEqual(lab.module_dependencies(b"x\0depends=irqbypass,ccp\0y"), ["irqbypass", "ccp"])
        self.assertEqual(lab.module_dependencies(b"x\0depends=\0"), [])


class Vmrun(unittest.TestCase):
    CODE = bytes.fromhex("410fb6f4 4489abe0330000 89b310d7ffff c783e433000000000000 4889df e8") + struct.pack("<i", 0x1000 - 35)

    def test_the_store_is_found(self):
        self.assertEqual(vmrun_fault.find(self.CODE, 0, 0x1000), 11)

    def test_anything_else_is_left_alone(self):
        self.assertIsNone(vmrun_fault.find(self.CODE, 0, 0x2000))
        self.assertIsNone(vmrun_fault.find(self.CODE.replace(b"\x89\xb3", b"\x89\xbb"), 0, 0x1000))
        self.assertIsNone(vmrun_fault.find(self.CODE[11:17] + self.CODE, -6, 0x1000))


if __name__ == "__main__":
    unittest.main()
