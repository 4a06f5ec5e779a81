"""Every option of every script: help, default, bounds; and every invalid combination is refused before anything is done."""

import argparse
import contextlib
import io
import itertools
import os
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import fake_vmms  # noqa: E402

from firstlight import bench, cost, launch, machine, outputs, paths, probe, run, setup, testing, workloads  # noqa: E402
from firstlight.problems import Exit, Problem  # noqa: E402

SCRIPT = {"run": run, "bench": bench, "cost": cost, "test": testing, "setup": setup, "outputs": outputs}


class TooEarly(AssertionError):
    """Something was fetched, built or started: all options had been accepted."""


class Options(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.elf, self.efi, self.map = self.folder / "a.elf", self.folder / "a.efi", self.folder / "map.txt"
        self.elf.write_bytes(b"\x7fELF")
        self.efi.write_bytes(b"MZ")
        self.map.write_text("add * ata xen_blk 1\n")
        self.fakes = fake_vmms.install(self.folder)
        self.enterContext(mock.patch.dict(workloads.COMPARISONS))
        self.enterContext(mock.patch.dict(os.environ, FIRSTLIGHT_CACHE=str(self.folder)))
        for module in SCRIPT.values():
            for name in ("setup", "lab"):
                if hasattr(module, name):
                    self.enterContext(mock.patch.object(getattr(module, name), "ensure" if name == "setup" else "find", side_effect=TooEarly))
        self.enterContext(mock.patch.object(setup, "ensure", side_effect=TooEarly))
        # A machine without KVM: the options must not depend on it.
        self.enterContext(mock.patch.object(probe, "DEVICE", str(self.folder / "kvm")))

    def verdict(self, script, *words):
        """None if the options were accepted, otherwise the message."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                SCRIPT[script].main(list(map(str, words)))
        except TooEarly:
            return None
        except Problem as problem:
            self.assertEqual(problem.code, Exit.USAGE, problem)
            self.assertNotIn("\n", str(problem))
            return str(problem)
        return None

    def test_each_has_help_and_default(self):
        for name, module in SCRIPT.items():
            parser = module.arguments()
            shown = parser.format_help()
            for action in parser._actions:
                if action.help is argparse.SUPPRESS:
                    continue
                self.assertTrue(action.help, f"{name} {action.option_strings}")
                text = " ".join(parser._get_formatter()._expand_help(action).split())
                if action.nargs != 0:
                    self.assertRegex(text, r"\(default: .+\)", f"{name} {action.option_strings}")
                self.assertIn(action.option_strings[-1], shown)
            self.assertIn("FIRSTLIGHT_CACHE", shown)
            self.assertIn("Exit status: 0 success;", shown)

    # (script, words, expected message): one invalid value each.
    def bad_values(self):
        nothing = self.folder / "nothing"
        return [
            ("run", "--cpus 0", "1 to 4096"), ("run", "--cpus 9999", "1 to 4096"), ("run", "--cpus x", "'x'"), ("run", "--cpus 256", "machine pc has 1 to 255"),
            ("run", "--cpus 289 --machine microvm --disk none", "1 to 288"), ("run", "--cpus 65 --platform hyperv", "the test host has 1 to 64"),
            ("run", "--memory 3", "4 to 1048576"), ("run", "--memory 0", "4 to"), ("run", "--memory 2g", "'2g'"),
            ("run", "--memory 15 --platform hyperv", "16 to 3072"), ("run", "--memory 63 --boot uefi", "64 to"),
            ("run", "--timeout 0", "more than 0"), ("run", "--timeout nan", "more than 0"), ("run", "--timeout inf", "at most 86400"), ("run", "--timeout -1", "more than 0"),
            ("run", f"--map {nothing}", "No such file"), ("run", f"--map {self.folder}", "directory"), ("run", f"--kernel {self.efi}", "an ELF file"),
            ("run", f"--efi {self.elf} --boot uefi", "an EFI application"), ("run", f"--kernel {nothing}", "No such file"),
            ("run", "--platform nonsense", "invalid choice"), ("run", "--lab maybe", "invalid choice"), ("run", "--gdb --gdb-port 0", "1 to 65535"),
            ("run", "--cpus 1 --cpus 2", "given twice"), ("run", "--frob", "--help lists the options"), ("run", "--cpu 2", "unrecognized"), ("run", "word", "unrecognized"),
            ("run", "--disk floppy:64M", "the buses are ide, xen, scsi, accel, virtio, nvme, sata, pvscsi, vscsi"), ("run", f"--disk ide:{nothing}", "no such file exists"), ("run", f"--disk {self.folder}", "it is a folder"),
            ("run", "--disk 64x", "a size like 64m or a file was expected"), ("run", "--disk ide:", "none is there"), ("run", "--disk ,content=zero", "none is there"),
            ("run", "--platform xen-pvh --disk xen:1m,backing=tape", "backing=loop|ram|readonly"), ("run", "--disk 0", "is not a size"), ("run", "--disk 1m,colour=red", "'colour=red' was given; one of content="), ("run", "--disk virtio:1m,aio=uring", "'aio=uring' was given; aio=threads|native|io_uring (of QEMU's disks) was expected"),
            ("run", f"--disk {self.elf},content=zero", "content of its file"), ("run", "--disk 1m,content=zero,content=sparse", "given twice"),
            ("run", "--platform xen-pvh --xen-version 4.21", "has Xen 4."), ("bench", "--only xen-hvm --xen-version 3", "has Xen 4."), ("run", "--xen-version 4.17", "is for the platforms xen-pvh"),
            ("bench", f"--html {nothing}/x", "does not exist"), ("bench", "--lanes 65", "1 to 64"), ("bench", "--cmdline lanes=2", "--lanes picks"), ("bench", "--runs 0", "1 to 100"), ("bench", "--runs x", "1 to 100"), ("bench", "--only nonsense", "scripts/bench --list"),
            ("bench", "--only xen-emu --only nonsense", "--only nonsense"), ("bench", f"--json {nothing}/x", "does not exist"), ("bench", f"--json {self.folder}", "a folder"),
            ("bench", "--cmdline workload=randread", "workload= is what the jobs set"), ("bench", "--cmdline disk=hda", "disk="), ("bench", "--cmdline job=boot", "job="),
            ("bench", "--cmdline marks=5", "marks="), ("bench", "--cmdline wait=poll", "--wait picks among them"), ("bench", "--wait sleep", "some of interrupt, poll, adaptive"), ("bench", "--list --wait poll", "nothing is measured"), ("bench", "--boot bios", "invalid choice"), ("bench", "--boot uefi", "Add --only xen-emu"),
            ("bench", "--workload nonsense", "the pattern 'nonsense'"), ("bench", "--workload read,qd=999", "from 1 to 256"), ("bench", "--sweep qd=1..5", "powers of two"),
            ("bench", "--only microvm --boot uefi", "no UEFI firmware"), ("run", "--platform kvm --machine microvm --boot uefi --disk none", "no UEFI firmware"),
            ("bench", "--disk nonsense", "have the disks"), ("bench", "--disk ,", "at least one word"), ("bench", "--aio posix", "invalid choice"), ("bench", "--cache maybe", "invalid choice"),
            ("bench", "--aio native", "add --cache none"), ("bench", "--only hyperv --iothread", "measures none of them"), ("bench", "--only xen-pvh --aio threads", "xen-pvh measures none"),
            ("bench", "--sweep qd=1..2 --workload read,qd=2", "what --sweep sets"), ("run", "--disk 1m,aio=native", "aio=native needs cache=none"), ("run", "--disk 1m,iothread", "iothread is for disks on"),
            ("run", "--vmm bochs=/x", "one of the names firecracker, cloud-hypervisor"), ("run", "--vmm firecracker", "NAME=PATH was expected"), ("run", "--vmm firecracker=", "NAME=PATH was expected"),
            ("run", f"--vmm firecracker={nothing}", "no such program exists"), ("bench", f"--vmm firecracker={nothing}", "no such program exists"), ("run", f"--qemu {nothing}", "no such program exists"),
            ("bench", f"--qemu {self.folder}", "a folder is there"), ("run", "--vmm-command true", "exactly one of {kernel}, {efi} and {esp}"), ("run", "--qemu-arg='", "is not closed"),
            ("bench", "--vmm-command ''", "exactly one"), ("test", "--only nonsense", "scripts/test --list"), ("test", "--only host --only nonsense", "--only nonsense"), ("test", "--fast --only tsan", "--fast leaves out"),
            ("test", f"--junit {nothing}/x", "does not exist"), ("test", f"--junit {self.folder}", "a folder"), ("test", "--lab perhaps", "invalid choice"),
            ("cost", "--disk floppy", "invalid choice"), ("cost", "--workload nonsense", "the pattern 'nonsense'"), ("cost", "--cmdline disk=hda", "disk= is what"), ("setup", "--frob", "unrecognized"), ("outputs", "--only nonsense", "invalid choice"), ("outputs", "--list --only run", "nothing is run"),
        ]  # fmt: skip

    def test_values(self):
        for script, words, said in self.bad_values():
            self.assertIn(said, self.verdict(script, *words.split()) or "(accepted)", words)
        self.assertIn("one line", self.verdict("run", "--cmdline", "a\nb"))
        self.assertIn("none is there", self.verdict("run", "--disk", ""))
        for script, option in (("run", "--qemu"), ("bench", "--qemu"), ("run", "--map"), ("run", "--kernel"), ("bench", "--json"), ("bench", "--html"), ("test", "--junit")):
            self.assertIn("'' was given, the name of a file was expected", self.verdict(script, option, "") or "(accepted)")
        self.assertIn("at least one word", self.verdict("run", "--platform", "xen-pvh", "--blkback", ",") or "(accepted)")
        for script in ("bench", "test"):
            for words in ("", "host,", "host,,vm"):
                self.assertIn("a glob was expected", self.verdict(script, "--only", words) or "(accepted)")
            self.assertIn("nonsense", self.verdict(script, "--only", "xen,nonsense") or "(accepted)")  # each of them is looked for

    def test_disks_that_no_machine_has(self):
        for words, said in (
            ("--disk 64m,sector=4096", "sector=4096 is for"), ("--disk 64m,readonly", "no ide disk that is read-only"), ("--disk sata:8m,sector=4096", "no sata disk with"),
            ("--disk sata:8m,readonly", "no sata disk that is read-only"), ("--disk nvme:8m,readonly", "does not tell the guest"), ("--disk xen:1m", "needs the platform xen-emu"),
            ("--disk scsi:1m", "needs the platform hyperv"), ("--platform hyperv --disk 1m,readonly", "readonly is for"), ("--platform hyperv --disk 1m,iops=5", "iops=N"),
            ("--disk 1m,iops=5 --deterministic", "iops=N"), ("--machine microvm --disk 1m", "no IDE disks"), ("--platform hyperv --disk 1m,content=null", "content=null"),
            ("--disk 1m,image=a --disk 2m,image=a", "one size"), ("--disk 1m,image=a --disk 1m,image=a,content=zero", "one content"), ("--disk 1m,image=a,content=null", "no image that"),
            ("--disk 1m,image=a", "only one disk names it"), ("--platform xen-emu --disk xen:1m,backend=blkback", "backend=, backing= and without="),
            ("--platform xen-emu --disk xen:1m,backing=loop", "backend=, backing= and without="), ("--platform xen-pvh --disk xen:1m,backing=ram --disk xen:1m", "or none is"),
            ("--platform xen-pvh --disk xen:1m,backing=ram --disk xen:2m,backing=ram", "all of one size"), ("--platform xen-pvh --disk xen:1m,backing=ram,sector=4096", "512 bytes"),
            ("--platform xen-pvh --disk xen:1m,image=a --disk xen:1m,image=a,sector=4096", "one sector="), ("--platform xen-pvh --disk none --blkback max_queues=1", "it serves"),
            ("--platform xen-pvh --disk xen:1m,image=a --disk xen:1m,image=a,backing=readonly", "one backing="),
            ("--platform xen-pvh --disk xen:1m,backend=qdisk,sector=4096", "512-byte sectors"),
            ("--platform xen-pvh --disk xen:1m,backend=qdisk --blkback max_queues=1", "it serves"),
        ):  # fmt: skip
            self.assertIn(said, self.verdict("run", *words.split()) or "(accepted)", words)
        self.assertIsNone(self.verdict("run", "--platform", "xen-emu", "--disk", "xen:64m,sector=4096,readonly"))
        for bus in ("virtio", "vscsi", "pvscsi"):
            self.assertIsNone(self.verdict("run", "--disk", f"{bus}:64m,sector=4096,readonly"))
        self.assertIsNone(self.verdict("run", "--disk", "nvme:64m,sector=4096"))

    def pairs(self, script, samples, conflicts, base=()):
        """Exactly these pairs are refused."""
        for (a, one), (b, other) in itertools.combinations(samples.items(), 2):
            said = self.verdict(script, *base, *one, *other)
            wrong = frozenset((a, b)) in conflicts
            self.assertEqual(said is not None, wrong, f"{script} {one} {other}: {said}")
            if wrong:
                self.assertTrue(any(name.split("=")[0].strip("-") in said.lower() for name in (a, b)), said)
        known = set(samples)
        self.assertTrue(all(set(pair) <= known for pair in conflicts))

    def test_pairs_of_run(self):
        samples = {
            "--platform=kvm": ("--platform", "kvm"), "--platform=hyperv": ("--platform", "hyperv"), "--platform=uefi": ("--platform", "qemu-uefi"), "--boot=uefi": ("--boot", "uefi"),
            "--machine": ("--machine", "q35"), "--cmdline": ("--cmdline", "job=boot"), "--map": ("--map", self.map), "--disk": ("--disk", "8m"),
            "--disk=none": ("--disk", "none"), "--cpus": ("--cpus", "2"), "--memory": ("--memory", "128"), "--timeout": ("--timeout", "5"), "--deterministic": ("--deterministic",),
            "--wall": ("--wall",), "--records": ("--records",), "--dry-run": ("--dry-run",), "--console": ("--console",), "--kernel": ("--kernel", self.elf),
            "--efi": ("--efi", self.efi), "--trace-interrupts": ("--trace-interrupts",), "--lab=always": ("--lab", "always"),
            "--gdb": ("--gdb", "--gdb-port", "47331"), "--platform=xen-pvh": ("--platform", "xen-pvh"), "--xen": ("--xen", "guest_loglvl=all"),
            "--blkback": ("--blkback", "feature_persistent=0"), "--xl": ("--xl", "viridian = 1"), "--no-build": ("--no-build",), "--lab=never": ("--lab", "never"), "--machine=pc": ("--machine", "pc"),
            "--qemu": ("--qemu", self.fakes["a-qemu"]), "--qemu-arg": ("--qemu-arg=-S",), "--vmm": ("--vmm", f"firecracker={self.fakes['firecracker']}"),
            "--vmm-command": ("--vmm-command", "true {kernel} {cmdline} {memory} {cpus} {map} {disk:0}"),
        }  # fmt: skip
        pairs = {
            ("--deterministic", "--wall"), ("--boot=uefi", "--kernel"), ("--platform=uefi", "--kernel"), ("--platform=hyperv", "--boot=uefi"),
            ("--platform=hyperv", "--machine"), ("--platform=hyperv", "--machine=pc"), ("--platform=kvm", "--trace-interrupts"), ("--platform=hyperv", "--trace-interrupts"),
            ("--platform=hyperv", "--gdb"), ("--platform=hyperv", "--console"), ("--gdb", "--timeout"), ("--console", "--timeout"), ("--dry-run", "--timeout"),
            ("--dry-run", "--records"), ("--gdb", "--records"), ("--console", "--records"), ("--kernel", "--no-build"), ("--machine", "--machine=pc"), ("--disk", "--disk=none"), ("--platform=kvm", "--platform=hyperv"), ("--platform=kvm", "--platform=uefi"), ("--platform=hyperv", "--platform=uefi"),
        }  # fmt: skip
        pairs |= {("--platform=xen-pvh", other) for other in ("--platform=kvm", "--platform=hyperv", "--platform=uefi", "--boot=uefi", "--machine", "--machine=pc", "--disk", "--console", "--gdb", "--trace-interrupts")}
        pairs |= {(word, other) for word in ("--xen", "--blkback", "--xl") for other in samples if other not in (word, "--platform=xen-pvh")}
        pairs |= {("--efi", other) for other in samples if other not in ("--efi", "--boot=uefi", "--platform=uefi")}
        # A VMM that is not QEMU.
        qemus = [name for name in samples if name.startswith(("--platform", "--boot", "--machine", "--lab", "--qemu"))] + ["--deterministic", "--wall", "--trace-interrupts", "--gdb", "--console", "--xen", "--blkback", "--xl", "--efi"]
        pairs |= {(one, other) for one in ("--vmm", "--vmm-command") for other in qemus} | {("--vmm", "--vmm-command"), ("--vmm-command", "--disk=none")}
        pairs |= {(one, other) for one in ("--qemu", "--qemu-arg") for other in ("--platform=hyperv", "--platform=xen-pvh")} | {("--qemu", "--lab=always"), ("--qemu", "--lab=never"), ("--qemu", "--wall")}
        # Options that need one of these.
        for word, beside in (("--lab=always", ("kvm", "hyperv")), ("--lab=never", ("kvm", "hyperv")), ("--wall", ("kvm", "hyperv", "xen-pvh"))):
            pairs |= {(word, other) for other in samples if other != word and other not in [f"--platform={name}" for name in beside]}
        built = [mock.patch.object(paths, name, self.elf) for name in ("KERNEL", "EFI", "TEST_HOST")]
        with mock.patch.object(probe, "lacks_interfaces", return_value=""), built[0], built[1], built[2], mock.patch.object(launch, "lacks", return_value=""):  # the options must not depend on this machine
            self.pairs("run", samples, {frozenset(pair) for pair in pairs})
            on_kvm = {name: words for name, words in samples.items() if not name.startswith(("--platform", "--lab", "--xen", "--xl", "--blkback", "--efi", "--boot", "--qemu", "--vmm"))}
            never = {("--deterministic", other) for other in on_kvm} | {("--wall", other) for other in on_kvm} | {("--trace-interrupts", other) for other in on_kvm}
            never |= {tuple(pair) for pair in pairs if set(pair) <= set(on_kvm) and "--wall" not in pair}
            self.pairs("run", on_kvm, {frozenset(pair) for pair in never if len(set(pair)) == 2}, base=("--platform", "kvm", "--lab", "never"))
            self.assertIsNone(self.verdict("run", "--platform", "hyperv", "--kernel", self.elf, "--no-build"))
            self.assertIn("nothing is built", self.verdict("run", "--boot", "uefi", "--efi", self.efi, "--no-build"))
        self.assertIn("use it with --gdb", self.verdict("run", "--gdb-port", "47331"))
        self.assertIn("--lab", self.verdict("run", "--platform", "kvm", "--lab", "always", "--gdb"))
        self.assertIn("--lab", self.verdict("run", "--platform", "kvm", "--lab", "always", "--console"))
        self.assertIn("--lab", self.verdict("run", "--platform", "kvm", "--lab", "never", "--deterministic"))
        self.assertIn("a lab of its own", self.verdict("run", "--platform", "xen-pvh", "--lab", "never") or "(accepted)")

    def test_pairs_of_bench(self):
        samples = {
            "--wall": ("--wall",), "--runs": ("--runs", "2"), "--list": ("--list",), "--only": ("--only", "xen-emu"), "--json": ("--json", self.folder / "r.json"),
            "--json-dir": ("--json-dir", self.folder / "results"),
            "--yardstick": ("--yardstick",), "--lab": ("--lab", "always"), "--boot": ("--boot", "pvh"), "--cmdline": ("--cmdline", "log=debug"),
            "--workload": ("--workload", "randread,count=5"), "--disk": ("--disk", "xen"), "--sweep": ("--sweep", "qd=1..4"), "--aio": ("--aio", "io_uring"), "--cache": ("--cache", "none"),
            "--iothread": ("--only", "xen-emu", "--iothread"), "--wait": ("--wait", "interrupt,adaptive"), "--lanes": ("--lanes", "4"), "--html": ("--html", self.folder / "r.html"), "--compare": ("--compare", self.folder / "a.json", self.folder / "b.json"), "--xen-version": ("--xen-version", "4.17"), "--vmm": ("--vmm", f"firecracker={self.fakes['firecracker']}"),
        }  # fmt: skip
        pairs = {frozenset(("--list", other)) for other in samples if other not in ("--list", "--only", "--workload", "--disk", "--sweep")}
        pairs |= {frozenset(("--compare", other)) for other in samples if other not in ("--compare", "--html")}
        pairs |= {frozenset(("--vmm", other)) for other in ("--wall", "--list", "--only", "--yardstick", "--lab", "--boot", "--aio", "--cache", "--iothread", "--lanes", "--xen-version")}
        pairs.add(frozenset(("--vmm", "--disk")))  # it has no disk on Xen's ring
        self.pairs("bench", samples, pairs)
        with mock.patch.object(launch, "lacks", return_value=""):
            for words, said in ((("--list",), "nothing is measured"), (("--lab", "always"), "never in the lab"), (("--wall",), "wall-clock time")):
                self.assertIn(said, self.verdict("bench", "--qemu", self.fakes["a-qemu"], *words) or "(accepted)")
            self.assertIsNone(self.verdict("bench", "--qemu", self.fakes["a-qemu"], "--cache", "none", "--yardstick", "--boot", "pvh"))
        self.assertIn("one virtual machine monitor was expected", self.verdict("bench", "--qemu", self.fakes["a-qemu"], "--vmm", f"firecracker={self.fakes['firecracker']}") or "(accepted)")
        self.assertIn("is for QEMU", self.verdict("bench", "--qemu-arg=-S", "--vmm", f"firecracker={self.fakes['firecracker']}") or "(accepted)")
        self.assertIn("one virtual machine monitor", self.verdict("bench", "--vmm-command", "true {kernel} {cmdline}", "--vmm", f"firecracker={self.fakes['firecracker']}") or "(accepted)")
        with mock.patch.object(probe, "lacks_interfaces", return_value=""):
            self.assertIn("leave out --wall", self.verdict("bench", "--lab", "never", "--wall") or "(accepted)")
            self.assertIsNone(self.verdict("bench", "--lab", "never"))
        self.assertIsNone(self.verdict("bench", "--only", "xen-emu", "--boot", "uefi"))
        self.assertIn("use it with --runs 2 or more", self.verdict("bench", "--seed", "3") or "(accepted)")

    def test_pairs_of_test_and_setup(self):
        samples = {
            "--fast": ("--fast",), "--only": ("--only", "scripts"), "--list": ("--list",), "--junit": ("--junit", self.folder / "j.xml"), "--tap": ("--tap",), "--lab": ("--lab", "always"),
        }  # fmt: skip
        self.pairs("test", samples, {frozenset(pair) for pair in (("--list", "--junit"), ("--list", "--tap"), ("--list", "--lab"), ("--fast", "--lab"), ("--only", "--lab"))})
        self.assertIn("--fast leaves out", self.verdict("test", "--fast", "--lab", "never") or "(accepted)")
        self.assertIsNone(self.verdict("test", "--only", "vm/hyperv*", "--lab", "always"))
        samples = {"--refresh": ("--refresh",), "--no-lab": ("--no-lab",), "--xen": ("--xen",)}
        self.pairs("setup", samples, {frozenset(pair) for pair in (("--refresh", "--no-lab"), ("--xen", "--no-lab"))})

    def test_what_only_the_lab_or_only_this_machine_can_do(self):
        # The opposite case, without KVM, which is known before anything is fetched.
        for word in ("--gdb", "--console"):
            self.assertIn("runs in the lab here", self.verdict("run", "--platform", "kvm", word) or "(accepted)")
        for words in (("--platform", "kvm"), ("--platform", "hyperv"), ("--platform", "kvm", "--lab", "always")):
            self.assertIn("which has 1600 MiB for both", self.verdict("run", *words, "--memory", "2000") or "(accepted)")
        for word in ("--wall", "--deterministic"):
            chosen = run.arguments().parse_args(["--platform", "kvm", word])
            run.demand_place(machine.Machine("m", "kvm"), launch.Place(True, "as asked"), chosen)
            with self.assertRaises(Problem) as raised:
                run.demand_place(machine.Machine("m", "kvm"), launch.Place(False, "it has what it needs"), chosen)
            self.assertIn(word, str(raised.exception))
            self.assertIn("Add --lab always" if word == "--deterministic" else "add --lab always", str(raised.exception))

    def test_a_kvm_that_is_not_there_is_missed_before_anything_is_fetched(self):
        for script, words in (("run", ["--platform", "kvm"]), ("bench", ["--only", "hyperv"]), ("test", []), ("test", ["--only", "vm/hyperv*"])):
            with self.assertRaises(Problem) as raised:
                SCRIPT[script].main([*words, "--lab", "never"])
            self.assertIn("there is no", str(raised.exception))
            self.assertIn("Leave out --lab never", str(raised.exception))

    def test_what_was_not_built_is_missed_before_anything_is_fetched(self):
        nothing = self.folder / "nothing.elf"
        with mock.patch.object(run.paths, "KERNEL", nothing), mock.patch.object(machine.paths, "KERNEL", nothing):
            for script in ("run", "bench"):
                with self.assertRaises(Problem) as raised, mock.patch.object(machine.Machine, "kernel", nothing):
                    SCRIPT[script].main(["--no-build"])
                self.assertIn("Leave out --no-build", str(raised.exception))


if __name__ == "__main__":
    unittest.main()
