"""Virtual machine monitors that the user names: what is generated for them, how they end, and docs/on-your-vmm.md's examples."""

import argparse
import contextlib
import functools
import io
import json
import os
import re
import shlex
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import fake_vmms  # noqa: E402

from firstlight import bench, checks, lab, launch, machine, nested, paths, probe, records, run, vmm, workloads  # noqa: E402
from firstlight.problems import Exit, Problem  # noqa: E402
from firstlight.records import Verdict  # noqa: E402

REPOSITORY = SCRIPTS.parent


class Fakes(unittest.TestCase):
    """The scripts with the programs of fake_vmms."""

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.fakes = fake_vmms.install(self.folder)
        self.elf, self.efi, self.map = self.folder / "a.elf", self.folder / "a.efi", self.folder / "map.txt"
        self.elf.write_bytes(probe.tiny_guest())
        self.efi.write_bytes(b"MZ" + bytes(1000))
        self.map.write_text("add * ata xen_blk 1\n")
        self.enterContext(mock.patch.dict(os.environ, FIRSTLIGHT_CACHE=str(self.folder), FAKE_VMM="success", PATH=f"{self.folder}:{os.environ['PATH']}"))
        self.enterContext(mock.patch.object(paths, "RUNS", self.folder / "runs"))
        self.enterContext(mock.patch.object(run.setup, "ensure"))
        # Neither QEMU nor the lab is needed.
        self.enterContext(mock.patch.object(lab, "find", side_effect=AssertionError("the lab was asked for")))
        self.enterContext(mock.patch.dict(workloads.COMPARISONS))

    def call(self, module, *words):
        """(exit status, standard output, standard error output)"""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = module.main([str(word) for word in words])
            except Problem as problem:
                status = problem.code
                err.write(str(problem))
        return status, out.getvalue(), err.getvalue()

    def run_(self, name, *words, mode="success"):
        with mock.patch.dict(os.environ, FAKE_VMM=mode):
            return self.call(run, "--vmm", f"{name.removeprefix('old-')}={self.fakes[name]}", "--kernel", self.elf, *words)

    def bench(self, *words):
        built = functools.partial(machine.Machine, kernel=self.elf)
        with mock.patch.object(paths, "KERNEL", self.elf), mock.patch.object(paths, "EFI", self.efi), mock.patch.object(bench, "Machine", built):
            return self.call(bench, "--no-build", *words)


class Boots(Fakes):
    def test_a_boot(self):
        for name, title in (("firecracker", "Firecracker 1.16.1"), ("cloud-hypervisor", "Cloud Hypervisor 53.0"), ("old-cloud-hypervisor", "Cloud Hypervisor 45.0")):
            status, out, err = self.run_(name, "--cmdline", "log=debug", "--disk", "8m", "--disk", "virtio:1m,readonly", "--cpus", "2", "--memory", "64", "--map", self.map)
            self.assertEqual((status, "verdict SUCCESS: booted; disks: vda" in err), (Exit.SUCCESS, True), err)
            self.assertIn(f"{title} ({self.fakes[name]})", err)
            self.assertIn('command line: "log=debug', out)
            self.assertNotIn("@{", out)
            self.assertNotIn("Running Firecracker", out)
            self.assertEqual('command line: "log=debug pci=off virtio_mmio.device=4K@0xc0001000:5 virtio_mmio.device=4K@0xc0002000:6"' in out, name == "firecracker")

    def test_without_disks(self):
        for name in ("firecracker", "cloud-hypervisor"):
            self.assertIs(self.run_(name, "--disk", "none")[0], Exit.SUCCESS)

    def test_how_each_ends(self):
        for name in ("firecracker", "cloud-hypervisor"):
            for mode, expected, said in (
                ("failure", Exit.ERROR, "verdict ERROR: as asked"),
                ("wrong", Exit.NO_VERDICT, "the record says SUCCESS, and the virtual machine monitor's exit status was 1, which does not agree"),
                ("die", Exit.NO_VERDICT, "no verdict record"),
                ("refuse", Exit.NOT_STARTED, "the virtual machine did not start: Error: KVM is not there"),
                ("silent", Exit.NOT_STARTED, "the virtual machine monitor's exit status was 3"),
            ):
                # The version is asked for first, which succeeds in every mode.
                with mock.patch.object(vmm, "version", return_value="1"), mock.patch.object(vmm, "output", return_value="image_type="):
                    status, _, err = self.run_(name, mode=mode)
                self.assertIs(status, expected, f"{name} {mode}: {err}")
                self.assertIn(said, err)

    def test_a_failing_verdict_is_a_triple_fault_on_firecracker(self):
        self.assertTrue(vmm.Firecracker.agrees("ERROR", 1) and vmm.Firecracker.agrees("SKIP", 0))
        self.assertFalse(vmm.Firecracker.agrees("ERROR", 0) or vmm.Firecracker.agrees("SUCCESS", 1) or vmm.Firecracker.agrees("SUCCESS", None))

    def test_time_out(self):
        for name in ("firecracker", "cloud-hypervisor"):
            status, _, err = self.run_(name, "--timeout", "1.5", mode="hang")
            self.assertIs(status, Exit.TIMEOUT)
            self.assertIn("verdict SUCCESS was given, but the machine did not end within 1.5 s", err)

    def test_dry_run(self):
        status, out, _ = self.run_("firecracker", "--dry-run", "--disk", "1m")
        self.assertIs(status, Exit.SUCCESS)
        words = shlex.split(out)
        config = json.loads(Path(words[words.index("--config-file") + 1]).read_text())
        self.assertEqual(Path(config["drives"][0]["path_on_host"]).stat().st_size, 1 << 20)
        self.assertIs(self.call_words(words), 0)
        status, out, _ = self.run_("cloud-hypervisor", "--dry-run", "--cmdline", "a='b c'")
        self.assertIn("a='b c'", shlex.split(out))
        self.assertIs(self.call_words(shlex.split(out)), 0)

    @staticmethod
    def call_words(words):
        return nested.process.run(words, timeout=20, check=False).returncode

    def test_what_they_do_not_have(self):
        for name, words, said in (
            ("firecracker", "--cpus 33", "Firecracker has 1 to 32"), ("cloud-hypervisor", "--cpus 255", "has 1 to 254"), ("firecracker", "--memory 8", "16 to 1048576 MiB"),
            ("firecracker", "--disk ide:1m", "has disks on the bus virtio only. Leave out ide:"), ("firecracker", "--disk 1m,sector=4096", "sector="), ("cloud-hypervisor", "--disk 1m,iops=5", "iops="),
            ("firecracker", "--disk 1m,aio=threads", "aio="), ("firecracker", "--disk 1m,cache=none", "cache="), ("firecracker", "--disk 1m,iothread", "iothread"),
            ("firecracker", "--disk 1m,content=null", "content=null"), ("cloud-hypervisor", "--disk 1m,image=a --disk 1m,image=a", "image="), ("firecracker", f"--cmdline {'a' * 2030}", "Firecracker has room for 1999"),
        ):  # fmt: skip
            status, _, err = self.run_(name, *words.split())
            self.assertEqual((status, said in err), (Exit.USAGE, True), f"{words}: {err}")
        self.assertIs(self.run_("firecracker", "--cmdline", "log=debug " + "a" * 1980)[0], Exit.SUCCESS)

    def test_a_program_that_is_another_one(self):
        nothing = self.folder / "nothing"
        nothing.write_bytes(b"\0\0")
        nothing.chmod(0o755)
        for words, said in (
            (f"--vmm firecracker={self.fakes['cloud-hypervisor']}", "Firecracker was expected, whose --version prints a line that begins as 'Firecracker v…'; 'cloud-hypervisor v53.0' was seen"),
            (f"--vmm cloud-hypervisor={self.fakes['firecracker']}", "'Firecracker v1.16.1' was seen"), (f"--qemu {self.fakes['firecracker']}", "QEMU for x86-64 (qemu-system-x86_64) was expected"),
            (f"--qemu {self.fakes['a-sparc']}", "`-machine help` does not list pc"), (f"--qemu {nothing}", "Exec format error"), (f"--vmm firecracker={self.folder}/none", "no such program exists"),
            (f"--qemu {self.folder}", "a folder is there"), (f"--qemu {self.map}", "it may not be executed"),
        ):  # fmt: skip
            status, _, err = self.call(run, "--kernel", self.elf, *words.split())
            self.assertEqual((status, said in err), (Exit.USAGE, True), f"{words}: {err}")


class Qemu(Fakes):
    """The command line of another QEMU; boots by a real one are in OnQemu."""

    def test_the_command(self):
        with mock.patch.object(launch, "lacks", return_value=""):
            status, out, err = self.call(run, "--qemu", self.fakes["a-qemu"], "--platform", "xen-emu", "--kernel", self.elf, "--dry-run", "--qemu-arg", "-device 'virtio-rng-pci,id=a b'", "--qemu-arg=-S")
        self.assertIs(status, Exit.SUCCESS, err)
        words = shlex.split(out)
        self.assertEqual(words[0], str(self.fakes["a-qemu"]))
        self.assertEqual(words[-3:], ["-device", "virtio-rng-pci,id=a b", "-S"])
        self.assertIn("kvm,xen-version=0x40011,kernel-irqchip=split", words)
        self.assertIn(f"xen-emu: QEMU 9.9.1 ({self.fakes['a-qemu']})", err)

    def test_a_kvm_that_it_cannot_use(self):
        with mock.patch.object(launch, "lacks", return_value="there is no /dev/kvm"):
            status, _, err = self.call(run, "--qemu", self.fakes["a-qemu"], "--platform", "kvm", "--kernel", self.elf)
        self.assertIs(status, Exit.ERROR)
        self.assertIn("kvm cannot run on this machine's KVM: there is no /dev/kvm. Leave out --qemu", err)

    def test_the_firmware_is_the_labs(self):
        ready = mock.Mock(firmware=Path("/share"))
        with mock.patch.object(lab, "find", return_value=ready), mock.patch.object(machine.esp, "make", return_value=Path("/esp")):
            job = machine.Machine("m", "qemu-uefi", qemu=vmm.Qemu(Path("/q"), "9")).qemu_job(self.folder)
            self.assertIn("/share/OVMF.fd", job.arguments)
            self.assertIn("OVMF.fd", machine.Machine("m", "qemu-uefi").qemu_job(self.folder).arguments)

    def test_bench_needs_machines_of_qemus(self):
        for words, said in (("--only hyperv", "hyperv has another one"), ("--only xen-pvh", "xen-pvh has another one"), ("--only microvm", "does not list")):
            fake = self.fakes["a-sparc" if "microvm" in words else "a-qemu"]
            status, _, err = self.bench("--qemu", fake, *words.split())
            self.assertEqual((status, said in err), (Exit.USAGE, True), err)
        status, _, err = self.bench("--qemu-arg=-S", "--only", "hyperv")
        self.assertEqual((status, "--qemu-arg is for machines of QEMU's" in err), (Exit.USAGE, True), err)


class Bench(Fakes):
    WORKLOADS = ("--workload", "randread,count=16", "--workload", "randwrite,count=16")

    def test_one(self):
        result = self.folder / "result.json"
        status, out, err = self.bench("--vmm", f"firecracker={self.fakes['firecracker']}", *self.WORKLOADS, "--json", result)
        self.assertIs(status, Exit.SUCCESS, err)
        self.assertIn(f"platform vmm, boot pvh, wall time; firecracker (Firecracker 1.16.1 ({self.fakes['firecracker']})): vda\n", out)
        self.assertRegex(out, rf"firecracker 1\.16\.1 \({re.escape(str(self.fakes['firecracker']))}\), Linux ")
        self.assertNotIn("entry to first completed", out)
        jobs = json.loads(result.read_text())["jobs"]
        self.assertEqual([job["firstlight"]["versions"]["firecracker"] for job in jobs], [f"1.16.1 ({self.fakes['firecracker']})"] * 2)
        self.assertEqual({(job["firstlight"]["machine"], job["firstlight"]["disk"], job["firstlight"]["driver"], job["firstlight"]["mode"]) for job in jobs}, {("firecracker", "vda", "virtio_blk", "wall")})

    def test_several(self):
        status, out, err = self.bench(
            "--vmm", f"firecracker={self.fakes['firecracker']}", "--vmm", f"cloud-hypervisor={self.fakes['cloud-hypervisor']}",
            "--vmm", f"cloud-hypervisor={self.fakes['old-cloud-hypervisor']}", *self.WORKLOADS,
        )  # fmt: skip
        self.assertIs(status, Exit.SUCCESS, err)
        for name in ("firecracker", "cloud-hypervisor", "cloud-hypervisor-2"):
            self.assertRegex(out, rf"(?m)^{name} +virtio_blk +randread 4k qd1 +\d+ +1.00 ")
        self.assertIn(": firecracker", out)
        status, out, err = self.bench("--vmm", f"firecracker={self.fakes['firecracker']}", "--vmm", f"cloud-hypervisor={self.fakes['cloud-hypervisor']}", "--disk", "cloud-hypervisor", *self.WORKLOADS)
        self.assertEqual((status, "firecracker" in out), (Exit.SUCCESS, False), err)

    def test_a_guest_that_fails(self):
        with mock.patch.dict(os.environ, FAKE_VMM="failure"):
            status, _, err = self.bench("--vmm", f"firecracker={self.fakes['firecracker']}", *self.WORKLOADS)
        self.assertEqual((status, "bench-firecracker: verdict ERROR: as asked" in err), (Exit.ERROR, True), err)

    def test_a_result_that_is_missing(self):
        status, _, err = self.bench("--vmm", f"firecracker={self.fakes['firecracker']}", *self.WORKLOADS, "--workload", "read,count=1")
        self.assertEqual((status, "2 results, 3 expected" in err), (Exit.FAILURE, True), err)

    COMMAND = "cloud-hypervisor --kernel {kernel} --cmdline {cmdline} --cpus boot={cpus} --memory size={memory}M --disk path={disk:0},image_type=raw --serial tty --console off"

    def test_a_command(self):
        status, out, err = self.bench("--vmm-command", self.COMMAND, "--disk", "virtio", *self.WORKLOADS)
        self.assertIs(status, Exit.SUCCESS, err)
        self.assertIn(f"command ({self.fakes['cloud-hypervisor']}): vda", out)

    def test_the_disks_of_a_command_are_named(self):
        for words, said in (("", "attaches 1 disks, and --disk names the buses of 0"), ("--disk virtio,ide", "the buses of 2"), ("--disk vda", "the bus of each disk was expected, one of xen,")):
            status, _, err = self.bench("--vmm-command", self.COMMAND, *words.split(), *self.WORKLOADS)
            self.assertEqual((status, said in err), (Exit.USAGE, True), err)

    def test_written_disks_are_the_named_ones(self):
        chosen = bench.arguments().parse_args(["--vmm-command", self.COMMAND + " {disk:1}", "--disk", "virtio,ide", *self.WORKLOADS])
        with mock.patch.object(vmm.process, "run"):
            (one,) = bench.check(chosen)
        described = bench.main_machine(bench.sides_of(one)[0], one, chosen)
        self.assertIn("disk=vda,hda scratch=vda,hda ", described.cmdline)


class Templates(Fakes):
    def wrong(self, text):
        with self.assertRaises(argparse.ArgumentTypeError) as raised:
            vmm.Template.parse(text)
        return str(raised.exception)

    def test_errors_name_what_is_wrong(self):
        for text, said in (
            ("", "it is empty"), ("v {kernel}", "{cmdline} is missing"), ("v {cmdline}", "exactly one of {kernel}, {efi} and {esp} was expected, and none of them is there"),
            ("v {kernel} {efi} {cmdline}", "{kernel} and {efi} are there"), ("v {kernal} {cmdline}", "there is no placeholder {kernal}; there are {kernel}, {efi}"),
            ("v {kernel} {cmdline} {disk}", "no placeholder {disk}"), ("v {kernel} {cmdline} {disk:a}", "no placeholder {disk:a}"), ("v {kernel} {cmdline} {disk:01}", "no placeholder {disk:01}"),
            ("v {kernel} {cmdline} {disk:0} {disk:2}", "{disk:1} is missing"), ("v {kernel} {cmdline} {disk:1}", "{disk:0} is missing"), ("v {kernel} {cmdline", "a single {"),
            ("v kernel} {cmdline}", "a single }"), ("v '{kernel} {cmdline}", "the quote ' (in '{kernel} {cmdline}') is not closed"), ('v {kernel} "{cmdline}', 'the quote " (in \'{cmdline}\') is not closed'),
            ("v {kernel} {cmdline} \\", "nothing follows the last \\"), ("{kernel} {cmdline}", "the first word is the program"), ("v {esp} {cmdline}", "{cmdline} has no effect beside {esp}"),
            ("v {esp} {map}", "{map} has no effect beside {esp}"), ("v {} {kernel} {cmdline}", "no placeholder {}"),
        ):  # fmt: skip
            self.assertIn(said, self.wrong(text), text)

    def test_values_are_one_word_each(self):
        template = vmm.Template.parse("v \\\n -k {kernel} '-a={cmdline} x' {{\"m\":{memory}}} path={disk:0},n={cpus} #1")
        values = {"kernel": "/a b", "cmdline": "c 'd' {cpus} {disk:0}", "memory": "5", "disk:0": "/d", "cpus": "2"}
        self.assertEqual(template.fill(values), ["v", "-k", "/a b", "-a=c 'd' {cpus} {disk:0} x", "{m:5}", "path=/d,n=2", "#1"])

    def call_(self, text, *words):
        return self.call(run, "--vmm-command", text, *words)

    def test_what_the_program_gets(self):
        show = self.folder / "show"
        show.write_text('#!/bin/sh\nfor word; do echo "<$word>"; done\nls -l "$5" | cut -d" " -f5\n')
        show.chmod(0o755)
        kernel = self.folder / "a kernel.elf"
        kernel.write_bytes(self.elf.read_bytes())
        status, out, _ = self.call_("show {kernel} {cmdline} {memory} {cpus} {disk:0} {map} '{{disk:0}}'", "--kernel", kernel, "--cmdline", "a='b c' {file:x}", "--memory", "99", "--cpus", "3", "--disk", "3m", "--map", self.map)
        lines = out.splitlines()
        self.assertEqual([*lines[:4], *lines[5:]], [f"<{kernel}>", "<a='b c' {file:x}>", "<99>", "<3>", f"<{self.map}>", "<{disk:0}>", str(3 << 20)])
        self.assertIs(status, Exit.NO_VERDICT)

    def test_the_esp(self):
        with mock.patch.object(vmm.esp, "make", side_effect=lambda image, *rest: (self.made.append(rest), image)[1]):
            self.made = []
            self.call_("true {esp}", "--efi", self.efi, "--cmdline", "log=debug", "--map", self.map)
        self.assertEqual(self.made, [(self.efi, "log=debug", self.map, {})])

    def test_verdict_and_exit_status(self):
        log = REPOSITORY / "test/scripts/recorded/vmm-boot.log"
        text = log.read_text()
        other = {verdict: self.folder / verdict for verdict in ("ERROR", "CRASH", "none")}
        for verdict, file in other.items():
            file.write_text("an ordinary line\n" if verdict == "none" else text.replace('"verdict":"SUCCESS"', f'"verdict":"{verdict}"'))
        cut = self.folder / "cut"
        cut.write_text(text[: text.index('@{"record":"verdict"')])
        for file, number, expected in (
            (log, 0, Verdict.SUCCESS), (log, 33, Verdict.SUCCESS), (log, 1, Verdict.NO_VERDICT), (log, 37, Verdict.NO_VERDICT), (other["ERROR"], 0, Verdict.ERROR), (other["ERROR"], 7, Verdict.ERROR),
            (other["ERROR"], 72, Verdict.ERROR), (other["CRASH"], 41, Verdict.CRASH), (other["CRASH"], 33, Verdict.CRASH), (other["none"], 72, Verdict.NOT_STARTED), (other["none"], 0, Verdict.NO_VERDICT),
            (other["none"], 1, Verdict.NOT_STARTED), (cut, 1, Verdict.NO_VERDICT), (cut, 70, Verdict.NO_VERDICT), (cut, 72, Verdict.NO_VERDICT), (cut, 64, Verdict.NO_VERDICT),
        ):  # fmt: skip
            status, _, err = self.call_(f"sh -c 'cat {file}; exit {number}' {{kernel}} {{cmdline}}", "--kernel", self.elf)
            self.assertIs(status, expected.exit, f"{file.name} {number}: {err}")

    def test_bound_on_time(self):
        status, _, err = self.call_("sh -c 'sleep 100' {kernel} {cmdline}", "--kernel", self.elf, "--timeout", "0.5")
        self.assertEqual((status, "within 0.5 s" in err), (Exit.TIMEOUT, True), err)

    def test_disks(self):
        for words, said in (
            (("--disk", "1m"), "{disk:1} has no disk: add a --disk"), (("--disk", "1m") * 3, "{disk:2} is missing: add it to the command"), (("--disk", "none"), "{disk:0} has no disk"),
            (("--disk", "virtio:1m", "--disk", "1m"), "Leave out virtio:"), (("--disk", "1m,readonly", "--disk", "1m"), "readonly is what the command says"),
        ):
            status, _, err = self.call_("true {kernel} {cmdline} {disk:0} {disk:1}", "--kernel", self.elf, *words)
            self.assertEqual((status, said in err), (Exit.USAGE, True), err)

    def test_options_that_the_command_does_not_use(self):
        for text, words, said in (
            ("true {kernel} {cmdline}", ("--memory", "99"), "add {memory} to the command, or leave out --memory"), ("true {kernel} {cmdline}", ("--cpus", "2"), "add {cpus}"),
            ("true {kernel} {cmdline}", ("--map", self.map), "add {map} or {esp}"), ("true {kernel} {cmdline}", ("--efi", self.efi), "add {efi} or {esp}"), ("true {efi} {cmdline}", ("--kernel", self.elf), "add {kernel}"),
        ):  # fmt: skip
            status, _, err = self.call_(text, *words)
            self.assertEqual((status, said in err), (Exit.USAGE, True), err)


class Documented(Fakes):
    """docs/on-your-vmm.md: each command in it is run, with the programs of fake_vmms, or QEMU where it is there."""

    def setUp(self):
        super().setUp()
        self.page = checks.page((REPOSITORY / "docs/on-your-vmm.md").read_text())

    def commands(self):
        return [shlex.split(line) for _, language, lines in self.page.fences if language == "sh" for _, line in checks.joined(lines) if line.startswith("scripts/")]

    def test_the_page_has_an_example_of_each(self):
        text = " ".join(word for words in self.commands() for word in words)
        for part in ("--vmm firecracker=", "--vmm cloud-hypervisor=", "--vmm-command openvmm", "--vmm-command qemu-system-x86_64", "--qemu "):
            self.assertIn(part, text)

    def test_firecracker_and_cloud_hypervisor(self):
        tried = 0
        for script, *words in self.commands():
            if "--vmm" not in words:
                continue
            tried += 1
            words = [re.sub(r"^(firecracker|cloud-hypervisor)=.*", lambda match: f"{match[1]}={self.fakes[match[1]]}", word) for word in words]
            if script == "scripts/run":
                status, _, err = self.call(run, *words, "--kernel", self.elf)
            else:
                status, _, err = self.bench(*words, *Bench.WORKLOADS)
            self.assertIs(status, Exit.SUCCESS, f"{words}: {err}")
        self.assertGreaterEqual(tried, 3)

    def test_firecrackers_configuration_is_what_is_generated(self):
        (shown,) = [json.loads("\n".join(lines)) for _, language, lines in self.page.fences if language == "json"]
        described = machine.Machine("m", cmdline="job=boot", vmm=vmm.Firecracker(self.fakes["firecracker"], "1", "firecracker"), kernel=Path("firstlight.elf"))
        self.assertEqual(shown, described.vmm.config(described, ["disk.img"]))

    def test_cloud_hypervisors_arguments_are_what_is_generated(self):
        (shown,) = [line for _, language, lines in self.page.fences if language == "text" for _, line in checks.joined(lines) if line.startswith("cloud-hypervisor ")]
        described = machine.Machine("m", cmdline="job=boot", vmm=vmm.CloudHypervisor(self.fakes["cloud-hypervisor"], "1", "cloud-hypervisor"), kernel=Path("firstlight.elf"))
        job = described.job(self.folder)
        self.assertEqual(shlex.split(shown)[1:], [word.replace(f"{self.folder}/vda.img", "disk.img") for word in job.arguments])


class OnQemu(unittest.TestCase):
    """What QEMU can run: the lab's, by the name that it has in a distribution, with the kernel that was built."""

    def setUp(self):
        ready = lab.load(paths.cache() / "lab" / f"current-{lab.LAYOUT}")
        if not ready or not paths.KERNEL.is_file() or not paths.EFI.is_file():
            self.skipTest("the kernel is not built, or the lab's QEMU is not there: scripts/run makes both")
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        (self.folder / "qemu-system-x86_64").symlink_to(ready.qemu)
        self.enterContext(mock.patch.dict(os.environ, PATH=f"{self.folder}:{os.environ['PATH']}"))
        self.enterContext(mock.patch.object(run.setup, "ensure"))
        self.enterContext(mock.patch.dict(workloads.COMPARISONS))

    call = Fakes.call

    def test_the_documents_commands(self):
        page = checks.page((REPOSITORY / "docs/on-your-vmm.md").read_text())
        lines = [line for _, language, lines in page.fences if language == "sh" for _, line in checks.joined(lines)]
        tried = 0
        for script, *words in map(shlex.split, lines):
            command = words[words.index("--vmm-command") + 1] if "--vmm-command" in words else ""
            if "--qemu" not in words and not command.startswith("qemu-system-x86_64"):
                continue
            tried += 1
            more = ["--workload", "randread,count=16"] if script == "scripts/bench" else []
            words = ["qemu-system-x86_64" if word.endswith("/qemu-system-x86_64") else word for word in words]
            status, out, err = self.call({"scripts/run": run, "scripts/bench": bench}[script], "--no-build", *words, *more)
            self.assertIs(status, Exit.SUCCESS, f"{script} {words}: {out[-2000:]} {err}")
            if script == "scripts/bench":
                self.assertRegex(out, r"(?m)^vda +virtio_blk +synthetic +randread 4k qd1 +\d+ ")
                self.assertIn("wall time", out)
            if "--qemu" in words:
                self.assertRegex(out + err, r"QEMU \d+\.\d+\S* \(.*qemu-system-x86_64\)")
        self.assertGreaterEqual(tried, 4)


if __name__ == "__main__":
    unittest.main()
