"""Parts of the Xen lab that need no machine: configurations, names and words for QEMU, how an end is judged."""

import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from firstlight import apt, distribution, launch, machine, nested, records, run, vmtests, xenguest, xenlab  # noqa: E402
from firstlight.problems import Exit, Problem  # noqa: E402
from firstlight.records import Verdict  # noqa: E402


def domain(**words):
    described = machine.Machine("m", "xen-pvh", **words)
    return xenguest.domain(described, Path("/work"))


class Configuration(unittest.TestCase):
    def test_a_guest_of_each_kind_of_disk(self):
        made = domain(disks=["xen:8m", "xen:8m,backend=qdisk", "xen:4m,readonly,sector=4096"], cpus=7, memory=96, cmdline="job=boot")
        self.assertIn('type = "pvh"\n', made.config)
        self.assertIn("vcpus = 7\n", made.config)
        self.assertIn("memory = 96\n", made.config)
        self.assertIn('cmdline = "job=boot"\n', made.config)
        self.assertIn('"format=raw,vdev=xvda,access=rw,backendtype=phy,target=/dev/loop0",\n', made.config)
        self.assertIn('"format=raw,vdev=xvdb,access=rw,backendtype=qdisk,target=/dev/loop1",\n', made.config)
        self.assertIn('"format=raw,vdev=xvdc,access=ro,backendtype=phy,target=/dev/loop2",\n', made.config)
        self.assertTrue(made.device_model)
        script = xenguest.job_script(made, 3, {"xvdb.img": 4 << 20})
        self.assertIn("attach 1 xvdb.img 512 loop\n", script)
        self.assertIn("attach 2 xvdc.img 4096 loop readonly\n", script)
        self.assertIn("bring_out /dev/loop1 4\n", script)
        self.assertNotIn("rd_nr", script)

    def test_every_end_is_kept_until_it_has_been_read(self):
        made = domain()
        for event in ("poweroff", "reboot", "crash", "watchdog"):
            self.assertIn(f'on_{event} = "preserve"\n', made.config)

    def test_one_image_twice_is_one_device(self):
        made = domain(disks=["xen:8m,image=one", "xen:8m,image=one,readonly"])
        self.assertEqual(made.config.count("target=/dev/loop0"), 2)
        self.assertEqual([(one.image, one.device, one.read_only) for one in made.attached], [("one.img", "/dev/loop0", False)])

    def test_a_device_that_refuses_writes_is_offered_as_writable(self):
        made = domain(disks=["xen:8m,backing=readonly"])
        self.assertIn("attach 0 xvda.img 512 loop readonly\n", xenguest.job_script(made, 0, {}))
        self.assertIn("vdev=xvda,access=rw,backendtype=phy,target=/dev/loop0", made.config)

    def test_commands_run_beside_the_guest_and_are_waited_for(self):
        made = domain(nets=["xen"], dom0=["udp_peer receive 5000 9", "echo 'a b'"])
        script = xenguest.job_script(made, 0, {})
        self.assertIn("run() {\n    beside 'udp_peer receive 5000 9'\n    beside 'echo '\"'\"'a b'\"'\"''\n    guest 30\n    settle\n}", script)
        self.assertIn("udp-peer", made.files)
        self.assertNotIn("udp-peer", made.config)
        for words in ({"platform": "qemu-pvh"}, {"platform": "xen-emu"}):
            with self.assertRaises(Problem) as refused:
                machine.Machine("m", dom0=["true"], **words)
            self.assertIn("dom0's shell", str(refused.exception))
        with self.assertRaises(Problem):
            domain(dom0=["true\nfalse"])

    def test_what_they_print_is_part_of_the_output(self):
        reader = nested.Reader("t", ["m"])
        for line in ("@@lab t ready", "@@lab t begin m", "from the guest", "", "@@lab t told 5 received", "", "@@lab t failed false: exit status 1", "", "@@lab t end m status=0 reason=0 ms=5"):
            reader.line(line)
        self.assertEqual(reader.outcomes["m"].output, "from the guest\ndom0: 5 received\n")
        self.assertEqual(reader.outcomes["m"].fault, "false: exit status 1")

    def test_what_a_disk_is_without(self):
        made = domain(disks=["xen:8m,without=discard", "xen:8m,without=discard+flush", "xen:8m,iops=10"])
        self.assertEqual(made.config.count("backendtype=phy,no-discard,target=/dev/loop"), 2)
        script = xenguest.job_script(made, 0, {})
        self.assertNotIn("write_through 0", script)
        self.assertIn("attach 1 xvdb.img 512 loop\n    write_through 1\n", script)
        self.assertIn("attach 2 xvdc.img 512 loop\n    slow 2 10\n", script)

    def test_a_card_with_two_faces(self):
        made = xenguest.domain(machine.Machine("m", "xen-hvm", nets=["xen", "e1000"]), Path("/work"))
        self.assertIn('vif = ["type=vif,mac=00:16:3e:01:02:03,script=/etc/xen/scripts/vif", "type=ioemu,model=e1000,mac=00:16:3e:01:02:04,', made.config)
        script = xenguest.job_script(made, 0, {})
        self.assertIn("load twins", script)
        self.assertIn("remove_twins", script)

    def test_ram_disks_are_as_large_as_the_largest(self):
        made = domain(disks=["xen:8m,backing=ram", "xen:8m,backing=ram"])
        self.assertIn("load ram rd_nr=2 rd_size=8192\n", xenguest.job_script(made, 0, {}))
        self.assertIn("target=/dev/ram1", made.config)
        for wrong in (["xen:8m,backing=ram", "xen:8m"], ["xen:8m,backing=ram", "xen:4m,backing=ram"], ["xen:8m,backing=ram,sector=4096"]):
            with self.assertRaises(Problem, msg=wrong) as refused:
                domain(disks=wrong)
            self.assertEqual(refused.exception.code, Exit.USAGE)

    def test_strings_are_what_xl_reads(self):
        self.assertEqual(xenguest.quoted('a "b" \\ c'), '"a \\x22b\\x22 \\x5c c"')
        with self.assertRaises(Problem):
            xenguest.quoted("two\nlines")

    def test_parameters_of_blkback_are_known_ones(self):
        made = domain(blkback=["feature_persistent=0", "max_queues=4"])
        self.assertIn("load backend feature_persistent=0 max_queues=4\n", xenguest.job_script(made, 0, {}))
        for wrong in ("feature_persistant=0", "max_queues=four", "max_queues", "max_queues=1 x=2"):
            with self.assertRaises(Problem, msg=wrong) as refused:
                domain(blkback=[wrong])
            self.assertEqual(refused.exception.code, Exit.USAGE)

    def test_pauses_are_added_to_the_limit(self):
        made = domain(timeout=20, pauses=[nested.Pause("x", 7.0)])
        self.assertIn("guest 27\n", xenguest.job_script(made, 0, {}))

    def test_what_belongs_to_xen_is_refused_elsewhere(self):
        for words in (
            {"platform": "xen-pvh", "disks": ["ide:8m"]},
            {"platform": "xen-pvh", "disks": ["xen:8m,iops=10,backend=qdisk"]},
            {"platform": "xen-pvh", "disks": ["xen:8m,without=flush,backing=ram"]},
            {"platform": "xen-pvh", "disks": ["xen:8m,without=indirect"]},
            {"platform": "xen-emu", "disks": ["xen:8m,without=flush"]},
            {"platform": "xen-pvh", "nets": ["e1000"]},
            {"platform": "xen-pvh", "boot": "uefi"},
            {"platform": "xen-emu", "disks": ["xen:8m,backend=qdisk"]},
            {"platform": "xen-emu", "blkback": ["max_queues=1"]},
            {"platform": "qemu-pvh", "xen": "guest_loglvl=all"},
        ):
            with self.assertRaises(Problem, msg=words) as refused:
                machine.Machine("m", **words)
            self.assertEqual(refused.exception.code, Exit.USAGE)

    def test_options_that_have_no_effect_are_refused(self):
        for words in (
            ["--platform", "xen-pvh", "--gdb"],
            ["--platform", "xen-pvh", "--console"],
            ["--platform", "xen-pvh", "--lab", "never"],
            ["--platform", "xen-pvh", "--trace-interrupts"],
            ["--platform", "qemu-pvh", "--blkback", "max_queues=1"],
            ["--platform", "qemu-pvh", "--xen", "guest_loglvl=all"],
        ):
            with self.assertRaises(Problem, msg=words) as refused:
                run.main(words)
            self.assertEqual(refused.exception.code, Exit.USAGE)


class Start(unittest.TestCase):
    def prepare(self, folder, jobs, xen=""):
        (folder / "base.cpio").write_bytes(b"base" * 128)
        (folder / "qemu.cpio").write_bytes(b"qemu" * 128)
        ready = xenlab.XenLab(folder, "4.17", {}, {"dom0": ["loop.ko"], "backend": ["xen-blkback.ko"]})
        with mock.patch.object(xenlab.XenLab, "base", folder / "base.cpio"), mock.patch.object(xenguest.lab, "write_cpio", lambda tree, file: file.write_bytes(b"jobs")):
            return xenguest.prepare(ready, jobs, folder, True, xen)

    def job(self, folder, name, **words):
        kernel = folder / "kernel.elf"
        kernel.write_bytes(b"\x7fELF")
        return xenguest.domain(machine.Machine(name, "xen-pvh", kernel=kernel, **words), folder)

    def test_commas_are_doubled_and_names_have_no_blanks(self):
        self.assertEqual(xenguest.modules(("vmlinux", "a=1,2"), ("initrd", "")), "vmlinux a=1,,2,initrd")
        with tempfile.TemporaryDirectory(suffix=", odd") as name:
            folder = Path(name)
            prepared = self.prepare(folder, [self.job(folder, "one")])
            self.assertEqual(prepared.command[prepared.command.index("-initrd") + 1].count(","), 1)
            self.assertEqual(prepared.folder, folder)

    def test_xen_says_what_it_says_by_default(self):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            words = self.prepare(folder, [self.job(folder, "one")]).command
            self.assertNotIn("loglvl", words[words.index("-append") + 1])
            words = self.prepare(folder, [self.job(folder, "one")], "guest_loglvl=all").command
            self.assertTrue(words[words.index("-append") + 1].endswith(" guest_loglvl=all"))

    def test_the_device_model_comes_only_where_a_disk_needs_it(self):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.prepare(folder, [self.job(folder, "one")])
            self.assertNotIn(b"qemu", (folder / "initrd").read_bytes())
            self.prepare(folder, [self.job(folder, "one"), self.job(folder, "two", disks=["xen:1m,backend=qdisk"])])
            self.assertIn(b"qemu", (folder / "initrd").read_bytes())

    def test_there_is_memory_for_the_images_and_for_the_largest_guest(self):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            small = xenguest.mebibytes([self.job(folder, "one", memory=64, disks=["xen:1m"])])
            large = xenguest.mebibytes([self.job(folder, "one", memory=64, disks=["xen:1m"]), self.job(folder, "two", memory=512, disks=["xen:64m"])])
            self.assertGreaterEqual(large[0], small[0] + 63)
            self.assertGreaterEqual(large[1] - large[0], 512 + xenguest.XEN_MEBIBYTES)


class Ends(unittest.TestCase):
    def outcome(self, status, reason, output="", seconds=1.0):
        reader = nested.Reader("t", ["g"], limits={"g": 30.0})
        for line in f"@@lab t ready ms=1\n@@lab t begin g\n{output}\n\n@@lab t end g status={status} reason={reason} ms={seconds * 1000:.0f}\n@@lab t off".splitlines():
            reader.line(line)
        self.assertEqual(reader.complaint(), "")
        return reader.outcomes["g"]

    def judge(self, verdict, reason, status=0, **words):
        output = f'@{{"record":"verdict","verdict":"{verdict}","reason":"r"}}' if verdict else "hello"
        outcome = self.outcome(status, reason, output, **words)
        return xenguest.judge(records.parse(outcome.output), outcome, 30.0)

    def test_the_reason_is_read(self):
        self.assertEqual(self.outcome(0, 3).shutdown, 3)
        self.assertIsNone(self.outcome(0, "none").shutdown)

    def test_each_verdict_has_its_reason(self):
        for verdict in ("SUCCESS", "SKIP", "ERROR", "FAILURE", "CRASH"):
            for reason in (0, 1, 2, 3, 4, 5, "none"):
                found = self.judge(verdict, reason)
                if reason == (0 if verdict in ("SUCCESS", "SKIP") else 3):
                    self.assertIs(found.verdict, Verdict(verdict))
                    self.assertEqual(found.reason, "r")
                else:
                    self.assertIs(found.verdict, Verdict.NO_VERDICT, (verdict, reason))
                    self.assertIn(f"the record says {verdict}, and the domain ended with shutdown reason {reason}", found.reason)

    def test_no_verdict_names_the_reason(self):
        self.assertIn("shutdown reason 1 (reboot)", self.judge("", 1).reason)
        self.assertIs(self.judge("", 0).verdict, Verdict.NO_VERDICT)

    def test_a_hung_guest_is_a_time_out(self):
        self.assertIs(self.judge("", "none", 137, seconds=30.0).verdict, Verdict.TIMEOUT)
        self.assertIs(self.judge("SUCCESS", "none", 137, seconds=30.0).verdict, Verdict.TIMEOUT)

    def test_a_guest_that_xl_refused_never_ran(self):
        outcome = nested.Outcome(status=1, refused="xl create: out of memory")
        found = launch.finished(machine.Machine("m", "xen-pvh"), outcome).judgement
        self.assertEqual((found.verdict, found.reason), (Verdict.NOT_STARTED, "xl create: out of memory"))

    def test_every_reason_of_the_table_is_expected_by_some_verdict_or_none(self):
        self.assertEqual(set(xenguest.EXPECTED), {verdict for verdict in Verdict if verdict.of_guest})


class Parts(unittest.TestCase):
    def test_another_release_comes_from_the_same_mirrors(self):
        own = apt.parse_deb822(
            "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie trixie-updates trixie-backports\nComponents: main\n\n"
            "Types: deb\nURIs: http://mirror.example/security\nSuites: trixie-security\nComponents: main\n"
        )
        older = apt.of_suite(own, "trixie", "bookworm")
        self.assertEqual([source.suites for source in older], [("bookworm", "bookworm-updates"), ("bookworm-security",)])
        self.assertNotIn("trixie", apt.render_sources(older, "bookworm", False, ["main"]))

    def test_states_do_not_disturb_each_other_and_share_their_archives(self):
        usual, plain = apt.Apt("bookworm", ("qemu-*",)), apt.Apt("bookworm", variant="plain")
        older = apt.Apt("trixie", variant="bookworm", suite="bookworm")
        self.assertEqual(len({source.root for source in (usual, plain, older)}), 3)
        self.assertEqual({source.archives for source in (usual, plain, older)}, {usual.root / "archives"})

    def test_a_distribution_without_a_tried_xen_says_so(self):
        with self.assertRaises(Problem) as refused:
            xenlab.supported(distribution.SUPPORTED["ubuntu", "24.04"])
        self.assertEqual(refused.exception.code, Exit.MISSING)
        self.assertIn("Debian 12", str(refused.exception))

    def test_the_distributions_own_xen_or_the_named_one(self):
        debian = distribution.SUPPORTED["debian", "12"]
        self.assertEqual([xenlab.supported(debian, version).version for version in ("", "4.17", "4.20")], ["4.17", "4.17", "4.20"])
        self.assertEqual(xenlab.supported(distribution.SUPPORTED["debian", "13"]).version, "4.20")
        with self.assertRaisesRegex(Problem, "Xen 4.17 or 4.20"):
            xenlab.supported(debian, "4.2")

    def test_a_kernel_is_taken_out_of_its_image(self):
        import gzip
        import struct

        def image(payload):
            head = bytearray(0x400)
            head[0x1F1] = 1
            head[0x202:0x206] = b"HdrS"
            struct.pack_into("<II", head, 0x248, 0, len(payload))
            return bytes(head) + payload

        kernel = b"\x7fELF" + bytes(100)
        self.assertEqual(xenlab.vmlinux(image(gzip.compress(kernel) + struct.pack("<I", len(kernel)))), kernel)
        self.assertEqual(xenlab.vmlinux(image(kernel)), kernel)
        for wrong in (bytes(0x600), image(b"what is this"), image(gzip.compress(b"no kernel") + bytes(4))):
            with self.assertRaises(Problem):
                xenlab.vmlinux(wrong)


class XenTable(unittest.TestCase):
    def test_parameters_reach_the_machine(self):
        cases = {case.name: case for case in vmtests.load()}
        case = cases["xen-pvh-no-persistent-grants"]
        self.assertEqual(list(case.to_machine(Path("/")).blkback), ["feature_persistent=0"])
        self.assertTrue(launch.place(case.to_machine(Path("/")).kind, None, "auto").nested)


if __name__ == "__main__":
    unittest.main()
