"""Virtual machine monitors that the user names: another QEMU, Firecracker, Cloud Hypervisor, or any program that a command describes.

They run on this machine, never in the lab, and in wall-clock time. Facts about Firecracker and Cloud Hypervisor: docs/on-your-vmm.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import esp, options, process, records
from .machine import BUSES, MACHINES, DiskSpec, Machine, Platform
from .nested import Disk, Job, Outcome
from .options import Conflict
from .problems import Exit, Problem
from .workloads import DRIVERS, Side

VERSION_SECONDS = 20.0  # bound on `PROGRAM --version`
DISK = "virtio:64m"  # attached if none is given
BUS = "virtio"  # of the disks of Firecracker and Cloud Hypervisor
LEAST_MEMORY, MOST_MEMORY = 16, 1 << 20  # MiB
COMPARISON = "vmm"  # the name of the comparison that scripts/bench makes of the named VMMs


# ---- Options


def add_options(parser: options.Parser, several: bool) -> None:
    """`several`: whether --vmm may be given more than once."""
    known = ", ".join(MONITORS)
    parser.add_argument("--qemu", type=options.path, metavar="PATH", help="another QEMU than the lab's, on this machine (never in the lab)")
    parser.add_argument(
        "--qemu-arg", type=arguments, action="append", default=[], metavar="ARG",
        help="more arguments of QEMU, several times, quoted as for a shell, as in --qemu-arg='-device virtio-rng-pci'",
    )  # fmt: skip
    parser.add_argument(
        "--vmm", type=named, metavar="NAME=PATH", help=f"another virtual machine monitor: {known}" + (", several times" if several else ""),
        **({"action": "append", "default": []} if several else {}),
    )  # fmt: skip
    parser.add_argument(
        "--vmm-command", type=Template.parse, metavar="TEMPLATE",
        help="any other VMM, by its command, quoted as for a shell. One of {kernel} (the ELF), {efi} (the EFI application), {esp} (an image of an EFI system partition with it); "
        "{cmdline}; {disk:0}, {disk:1} …; if wanted {memory} (MiB), {cpus}, {map}; {{ and }} for braces. See docs/on-your-vmm.md",
    )  # fmt: skip


def arguments(text: str) -> list[str]:
    """The type of --qemu-arg."""
    return shell_words(text)


def named(text: str) -> tuple[str, str]:
    """The type of --vmm. Whether the program exists is checked by find()."""
    name, equals, path = text.partition("=")
    if name not in MONITORS or not equals or not path:
        raise argparse.ArgumentTypeError(
            f"{text!r} was given, NAME=PATH was expected with one of the names {', '.join(MONITORS)}, as in firecracker=/usr/bin/firecracker; --vmm-command is for every other VMM"
        )
    return name, path


def shell_words(text: str) -> list[str]:
    """Splits a command as a shell does, without expanding anything in it. A backslash at the end of a line continues it."""
    lexer = shlex.shlex(text.replace("\\\n", ""), posix=True, punctuation_chars=False)
    lexer.whitespace_split = True
    lexer.commenters = ""
    try:
        return list(lexer)
    except ValueError:
        state, begun = lexer.state or "\\", f" (in {lexer.token!r})" if lexer.token else ""
        seen = "nothing follows the last \\" if state == "\\" else f"the quote {state}{begun} is not closed"
        raise argparse.ArgumentTypeError(f"{text!r}: {seen}; a command quoted as for a shell was expected") from None


LEAVE = "leave it out"
# Options of scripts/run and scripts/bench that have no meaning for a VMM which is not QEMU, and why.
NOT_WITH_VMM = {
    "qemu": "one virtual machine monitor was expected: leave out one of them",
    "qemu_arg": f"is for QEMU, and this VMM is another one: {LEAVE}",
    "platform": f"is one of QEMU's, the test host's and Xen's machines, and the VMM named here is the machine: {LEAVE}",
    "boot": f"is QEMU's choice: Firecracker and Cloud Hypervisor start the kernel by PVH, and a command by what it names, {{kernel}}, {{efi}} or {{esp}}: {LEAVE}",
    "machine": f"is QEMU's: {LEAVE}",
    "deterministic": f"instructions are counted by QEMU's emulated processor, and this VMM runs in wall-clock time: {LEAVE}",
    "wall": f"this VMM always runs in wall-clock time: {LEAVE}",
    "lab": f"this VMM runs on this machine, never in the lab: {LEAVE}",
    "trace_interrupts": f"is QEMU's log: {LEAVE}",
    "gdb": "the debugger connects to QEMU. Start the command that --dry-run prints with this VMM's own options for a debugger",
    "console": "the keyboard is connected to QEMU only. Start the command that --dry-run prints by hand",
    "yardstick": f"Linux with fio runs in QEMU and the test host only: {LEAVE}",
    "cost": f"instructions are counted by the lab's QEMU, and this VMM runs on this machine: {LEAVE}",
    "only": f"picks among the comparisons of QEMU, the test host and Xen, and this is another one: {LEAVE}",
    "aio": f"is QEMU's: {LEAVE}",
    "cache": f"is QEMU's: {LEAVE}",
    "iothread": f"is QEMU's: {LEAVE}",
    "lanes": f"is for the machines of QEMU, the test host and Xen, which get as many processors: {LEAVE}",
    "xen_version": f"is the Xen lab's: {LEAVE}",
    "list": f"lists the jobs of QEMU, the test host and Xen: {LEAVE}",
}


def conflicts(names: Sequence[str]) -> list[Conflict]:
    """The conflicts of this module's options with those of a script. `names`: which of NOT_WITH_VMM the script has."""
    found = [Conflict(("vmm", "vmm_command"), "one virtual machine monitor was expected: leave out one of them")]
    found += [Conflict((vmm, name), NOT_WITH_VMM[name]) for name in ("qemu", "qemu_arg", *names) for vmm in ("vmm", "vmm_command")]
    found.append(Conflict(("qemu", "lab"), "--qemu runs on this machine, never in the lab: leave out --lab, or --qemu for the lab's QEMU"))
    found.append(Conflict(("qemu", "wall"), "it always runs in wall-clock time: leave out --wall"))
    return found


# Of scripts/run: what a VMM's command must name for an option to have an effect.
NEEDED = {"kernel": ("kernel",), "efi": ("efi", "esp"), "map": ("map", "esp"), "memory": ("memory",), "cpus": ("cpus",)}
RUN_CONFLICTS = [
    Conflict(("vmm", "efi"), "Firecracker and Cloud Hypervisor start an ELF file by PVH: name it by --kernel"),
    *(
        Conflict(("vmm_command", option), f"the command does not use it: add {' or '.join(f'{{{name}}}' for name in names)} to the command, or leave out --{option}",
                 lambda chosen, names=names: not set(names) & set(chosen.vmm_command.names))
        for option, names in NEEDED.items()
    ),
]  # fmt: skip


# ---- Programs


def program(option: str, path: str) -> Path:
    """The named program: a path, or a name that is looked up in PATH."""
    found = shutil.which(path)
    if not found:
        seen = "a folder is there" if Path(path).is_dir() else "it may not be executed" if Path(path).is_file() else "no such program exists"
        raise Problem(f"{option} {path}: a program was expected, and {seen}. Give the path of one, or a name that is found in PATH.", Exit.USAGE)
    return Path(found).absolute()


def output(path: Path, *words: str) -> str:
    """What a program prints, with its exit status if that is not 0; a program that cannot be run has printed why."""
    try:
        done = process.run([path, *words], timeout=VERSION_SECONDS, check=False)
    except (OSError, Problem) as error:
        return str(getattr(error, "strerror", "") or error).splitlines()[0]
    return done.stdout if not done.returncode else f"{done.stdout.strip()} (exit status {done.returncode})"


def version(option: str, path: Path, what: str, pattern: str) -> str:
    """The version that `PATH --version` prints in its first line."""
    said = output(path, "--version").strip().splitlines() or ["nothing"]
    match = re.match(pattern, said[0])
    if not match:
        raise Problem(
            f"{option} {path}: {what} was expected, whose --version prints a line that begins as {pattern_example(pattern)!r}; "
            f"{said[0][:120]!r} was seen. Name the program itself, not a wrapper with another output.",
            Exit.USAGE,
        )
    return match[1]


def pattern_example(pattern: str) -> str:
    return pattern.replace(r"(\S+)", "…")


@dataclasses.dataclass(frozen=True)
class Qemu:
    """Another QEMU than the lab's."""

    program: Path
    version: str

    @property
    def text(self) -> str:
        return f"{self.version} ({self.program})"


def qemu(path: str, machines: Sequence[str]) -> Qemu:
    """`machines`: those of MACHINES that it must have."""
    found = program("--qemu", path)
    number = version("--qemu", found, "QEMU for x86-64 (qemu-system-x86_64)", r"QEMU emulator version (\S+)")
    listed = {line.split()[0] for line in output(found, "-machine", "help").splitlines() if line.strip()}
    for name in machines:
        kind = MACHINES[name].partition(",")[0]
        if kind not in listed:
            raise Problem(
                f"--qemu {found}: QEMU for x86-64 with the machine {kind} was expected, and its `-machine help` does not list {kind}. "
                "Name a qemu-system-x86_64 that has it, or choose another --machine.",
                Exit.USAGE,
            )
    return Qemu(found, number)


# ---- Virtual machine monitors


@dataclasses.dataclass(frozen=True)
class Vmm:
    """A virtual machine monitor that is not QEMU, and what differs from it. `key` tells several of one kind apart."""

    program: Path
    version: str = ""
    key: str = ""

    title = ""  # its product's name
    most_cpus = 0

    @property
    def text(self) -> str:
        return f"{self.version} ({self.program})".strip()

    @property
    def platform(self) -> Platform:
        return Platform(self.key, f"{self.title} {self.text}".strip(), (), ("pvh",), ("pc",), (DISK,))

    @staticmethod
    def disk_words(texts: Sequence[str]) -> list[str]:
        """--disk: the bus need not be named."""
        return [on_bus(text, BUS, f"has disks on the bus {BUS} only") for text in texts]

    def check(self, machine: Machine) -> None:
        """What this VMM cannot have."""
        if not 1 <= machine.cpus <= self.most_cpus:
            raise Problem(f"{machine.cpus} processors: {self.title} has 1 to {self.most_cpus}.", Exit.USAGE)
        if not LEAST_MEMORY <= machine.memory <= MOST_MEMORY:
            raise Problem(f"{machine.memory} MiB of memory: {self.title} has {LEAST_MEMORY} to {MOST_MEMORY} MiB.", Exit.USAGE)
        for disk in machine.specs:
            self.check_disk(disk)

    def check_disk(self, disk: DiskSpec) -> None:
        plain = DiskSpec(disk.bus)
        named = {"sector": "sector=", "iops": "iops=", "aio": "aio=", "cache": "cache=", "iothread": "iothread", "image": "image=", "controller": "controller="}
        for member, word in named.items():
            if getattr(disk, member) != getattr(plain, member):
                raise Problem(f"{word} is for QEMU's disks and the test host's, not for those of {self.title}.", Exit.USAGE)
        if disk.content == "null":
            raise Problem(f"content=null is QEMU's: the disks of {self.title} are images.", Exit.USAGE)

    def job(self, machine: Machine, work: Path) -> Job:
        raise NotImplementedError

    def finished_job(self, machine: Machine, words: Sequence[str], disks: Sequence[Disk], logs: Sequence[Path]) -> Job:
        """`logs`: where the VMM's own messages go; the first one gets its standard error output."""
        for log in logs:
            log.write_bytes(b"")
        return Job(machine.name, list(words), {"vmm": self.program}, list(disks), machine.timeout, program="vmm", logs=logs)

    def disks(self, machine: Machine) -> list[Disk]:
        made: dict[str, Disk] = {}
        for disk, name in zip(machine.specs, machine.disk_names()):
            machine.add_image(made, disk, name)
        return list(made.values())

    @staticmethod
    def agrees(verdict: str, status: int | None) -> bool:
        """Whether the VMM ends with this exit status after this verdict (docs/INTERFACES.md, how the machine ends)."""
        raise NotImplementedError

    def judge(self, log: records.Log, outcome: Outcome, limit: float) -> records.Judgement:
        return records.judge(log, outcome.status, outcome.timed_out, limit, self.refused(log, outcome), self.agrees)

    def refused(self, log: records.Log, outcome: Outcome) -> str:
        """Why no guest ran: the VMM failed, and its standard output, which is the guest's console, is empty."""
        if outcome.timed_out or not outcome.status or outcome.output.strip():
            return ""
        return records.last_words(outcome.messages) or records.ended(outcome.status)


def on_bus(text: str, bus: str, why: str) -> str:
    """A word of --disk with its bus."""
    head = text.partition(",")[0]
    prefix, colon, _ = head.partition(":")
    if not colon or prefix not in BUSES or Path(head).exists():
        return f"{bus}:{text}"
    if prefix != bus:
        raise Problem(f"Disk {text!r}: this virtual machine monitor {why}. Leave out {prefix}:.", Exit.USAGE)
    return text


FAILED = (records.Verdict.ERROR.value, records.Verdict.FAILURE.value, records.Verdict.CRASH.value)


class Firecracker(Vmm):
    """By a configuration file: PVH, serial console on standard output, virtio-mmio. A reset by the keyboard controller ends it with 0, a triple fault with 1."""

    title = "Firecracker"
    most_cpus = 32
    COMMAND_LINE = 2048  # bytes, with the words that it adds: pci=off, and a device's, of at most 40
    DEVICE_WORD = 40

    def check(self, machine: Machine) -> None:
        super().check(machine)
        room = self.COMMAND_LINE - 1 - len(" pci=off") - self.DEVICE_WORD * len(machine.specs)
        if (length := len(machine.cmdline.encode())) > room:
            raise Problem(
                f"The command line has {length} bytes, and Firecracker has room for {room} beside the words that it adds for {len(machine.specs)} disks. Shorten it.", Exit.USAGE
            )

    def job(self, machine: Machine, work: Path) -> Job:
        disks = self.disks(machine)
        work.mkdir(parents=True, exist_ok=True)
        config, log = work / "firecracker.json", work / "firecracker.log"
        config.write_text(json.dumps(self.config(machine, [str(work / disk.name) for disk in disks]), indent=2) + "\n")
        # Without a log file the log goes to standard output, in the middle of the guest's lines.
        words = ["--no-api", "--config-file", str(config), "--log-path", str(log), "--level", "Warning"]
        return self.finished_job(machine, words, disks, [work / "firecracker.stderr", log])

    def config(self, machine: Machine, images: Sequence[str]) -> dict[str, Any]:
        """The members drives and network-interfaces are required even if they are empty."""
        return {
            "boot-source": {
                "kernel_image_path": str(machine.kernel), "boot_args": machine.cmdline, **({"initrd_path": str(machine.map)} if machine.map else {}),
            },
            # cache_type Writeback: a disk that can be flushed, as QEMU's by default. No root device, or `root=/dev/vda rw` is added.
            "drives": [
                {"drive_id": name, "path_on_host": image, "is_root_device": False, "is_read_only": disk.read_only, "cache_type": "Writeback"}
                for name, image, disk in zip(machine.disk_names(), images, machine.specs)
            ],
            "network-interfaces": [],
            "machine-config": {"vcpu_count": machine.cpus, "mem_size_mib": machine.memory},
        }  # fmt: skip

    @staticmethod
    def agrees(verdict: str, status: int | None) -> bool:
        return status == (1 if verdict in FAILED else 0)


@dataclasses.dataclass(frozen=True)
class CloudHypervisor(Vmm):
    """By its command line: PVH, serial console on standard output, virtio-pci. It ends by ACPI with 0, whatever the verdict."""

    raw: bool = True  # whether it has image_type=; with it, sector 0 refuses writes unless the image is said to be raw

    title = "Cloud Hypervisor"
    most_cpus = 254

    def job(self, machine: Machine, work: Path) -> Job:
        disks = self.disks(machine)
        work.mkdir(parents=True, exist_ok=True)
        if "," in str(work):
            raise Problem(f"{work}: Cloud Hypervisor separates a disk's options by commas, and this folder's name has one. Set TMPDIR to another folder.", Exit.USAGE)
        words = ["--kernel", str(machine.kernel), "--cmdline", machine.cmdline, "--cpus", f"boot={machine.cpus}", "--memory", f"size={machine.memory}M"]
        if machine.map:
            words += ["--initramfs", str(machine.map)]
        if disks:
            # One option with all values: versions differ in whether it may be repeated.
            options_of = [(",readonly=on" if disk.read_only else "") + (",image_type=raw" if self.raw else "") for disk in machine.specs]
            words += ["--disk", *(f"path={work / disk.name}{more}" for disk, more in zip(disks, options_of))]
        words += ["--serial", "tty", "--console", "off"]
        return self.finished_job(machine, words, disks, [work / "cloud-hypervisor.stderr"])

    @staticmethod
    def agrees(verdict: str, status: int | None) -> bool:
        return status == 0


# ---- Any other one, by its command


PLACES = ("kernel", "efi", "esp", "map", "cmdline", "memory", "cpus")
IMAGES = ("kernel", "efi", "esp")  # exactly one of them starts the machine
PLACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclasses.dataclass(frozen=True)
class Template:
    """The type of --vmm-command: a command with placeholders, split into words first, so that a value with blanks stays one word."""

    words: tuple[str, ...]
    names: tuple[str, ...]  # of the placeholders, in their order
    disks: int  # number of {disk:N}

    @staticmethod
    def parse(text: str) -> Template:
        def wrong(what: str) -> argparse.ArgumentTypeError:
            return argparse.ArgumentTypeError(f"{text!r}: {what}")

        words = shell_words(text)
        if not words:
            raise wrong("a command was expected, and it is empty")
        known = ", ".join(f"{{{name}}}" for name in PLACES) + ", {disk:0}, {disk:1} …"
        names: list[str] = []
        for match in (match for word in words for match in PLACE.finditer(word)):
            if match[0] in ("{", "}"):
                raise wrong(f"a single {match[0]} was given; the placeholders are {known}, and {match[0] * 2} is a brace")
            if match[1] is None:
                continue
            if match[1] not in PLACES and not re.fullmatch(r"disk:(0|[1-9]\d?)", match[1]):
                raise wrong(f"there is no placeholder {match[0]}; there are {known}, and {{{{ and }}}} are braces")
            names.append(match[1])
        if PLACE.search(words[0]):
            raise wrong(f"the first word is the program, and a placeholder or a brace is in it: {words[0]}")
        starts = [name for name in IMAGES if name in names]
        if len(starts) != 1:
            seen = " and ".join(f"{{{name}}}" for name in starts) + " are there" if starts else "none of them is there"
            raise wrong(f"exactly one of {{kernel}}, {{efi}} and {{esp}} was expected, and {seen}")
        if "cmdline" not in names and "esp" not in names:
            raise wrong("{cmdline} is missing: the kernel's command line would not reach the kernel")
        for name in ("cmdline", "map"):
            if name in names and "esp" in names:
                raise wrong(f"{{{name}}} has no effect beside {{esp}}: it is a file of that image")
        numbers = {int(name.partition(":")[2]) for name in names if name.startswith("disk:")}
        for number in range(max(numbers, default=-1) + 1):
            if number not in numbers:
                raise wrong(f"{{disk:{number}}} is missing: disks are numbered from 0 on without a gap, and {{disk:{max(numbers)}}} is there")
        return Template(tuple(words), tuple(names), len(numbers))

    def fill(self, values: Mapping[str, str]) -> list[str]:
        def value(match: re.Match[str]) -> str:
            return match[0][0] if match[1] is None else values[match[1]]

        return [PLACE.sub(value, word) for word in self.words]


@dataclasses.dataclass(frozen=True)
class Command(Vmm):
    """A VMM by its command. Its standard and error output are the console; the verdict is the console's record."""

    template: Template = Template((), (), 0)

    title = "the command"
    most_cpus = 4096

    @property
    def platform(self) -> Platform:
        boot = "pvh" if "kernel" in self.template.names else "uefi"
        return Platform(self.key, str(self.program), (), (boot,), ("pc",), (DISK,) * self.template.disks)

    @staticmethod
    def disk_words(texts: Sequence[str]) -> list[str]:
        return [on_bus(text, "", "has a disk on the bus to which its command attaches {disk:N}").removeprefix(":") for text in texts]

    def check(self, machine: Machine) -> None:
        super().check(machine)
        if len(machine.specs) != self.template.disks:
            first = f"{{disk:{min(len(machine.specs), self.template.disks)}}}"
            what = f"{first} has no disk: add a --disk" if len(machine.specs) < self.template.disks else f"{first} is missing: add it to the command"
            raise Problem(f"--vmm-command: {len(machine.specs)} disks were given, and the command attaches {self.template.disks}; {what}.", Exit.USAGE)

    def check_disk(self, disk: DiskSpec) -> None:
        super().check_disk(disk)
        if disk.read_only:
            raise Problem("readonly is what the command says where it attaches {disk:N}: leave it out.", Exit.USAGE)

    def job(self, machine: Machine, work: Path) -> Job:
        work.mkdir(parents=True, exist_ok=True)
        made = [self.image(disk, number) for number, disk in enumerate(machine.specs)]
        values = {
            "kernel": str(machine.kernel), "efi": str(machine.efi), "cmdline": machine.cmdline, "memory": str(machine.memory), "cpus": str(machine.cpus),
            "map": str(machine.map or os.devnull), **{f"disk:{number}": str(work / disk.name) for number, disk in enumerate(made)},
        }  # fmt: skip
        if "esp" in self.template.names:
            values["esp"] = str(esp.make(work / "esp.img", machine.efi, machine.cmdline, machine.map, {}))
        return self.finished_job(machine, self.template.fill(values)[1:], made, [])

    @staticmethod
    def image(disk: DiskSpec, number: int) -> Disk:
        return Disk(f"disk{number}.img", disk.size, str(disk.file) if disk.file else disk.content)

    @staticmethod
    def agrees(verdict: str, status: int | None) -> bool:
        """A VMM can tell a failure from a power-off by any exit status; after a success only 0 is one. isa-debug-exit's are known to records.judge()."""
        return status == 0 or (verdict in FAILED and status is not None and 0 < status < 128)

    def refused(self, log: records.Log, outcome: Outcome) -> str:
        """Without any record of the kernel's, a failure is the VMM's."""
        if outcome.timed_out or not outcome.status or not 0 < outcome.status < 128 or log.records or log.malformed or outcome.status in records.STATUS:
            return ""
        return records.monitors_words(log) or records.ended(outcome.status)


MONITORS = {
    "firecracker": (Firecracker, r"Firecracker v(\S+)"),
    "cloud-hypervisor": (CloudHypervisor, r"cloud-hypervisor v(\S+)"),
}  # fmt: skip


def find(given: Sequence[tuple[str, str]], command: Template | None) -> list[Vmm]:
    """The named VMMs, their programs found and asked for their versions."""
    found: list[Vmm] = []
    for name, path in given:
        kind, pattern = MONITORS[name]
        option = f"--vmm {name}:"
        where = program(option, path)
        same = sum(isinstance(other, kind) for other in found)
        made = kind(where, version(option, where, kind.title, pattern), f"{name}-{same + 1}" if same else name)
        if isinstance(made, CloudHypervisor):
            made = dataclasses.replace(made, raw="image_type=" in output(where, "--help"))
        found.append(made)
    if command:
        found.append(Command(program("--vmm-command:", command.words[0]), key="command", template=command))
    return found


def sides(vmms: Sequence[Vmm], buses: Sequence[str]) -> tuple[Side, ...]:
    """The machines of scripts/bench, with one disk each, or those of a command. `buses`: the words of --disk, for a command the bus of each {disk:N}."""
    if not isinstance(vmms[0], Command):
        names = [(one.key,) if len(vmms) > 1 else () for one in vmms]
        return tuple(Side(one.key, one.platform.about, (BUS,), names=own, vmm=one) for one, own in zip(vmms, names))
    (command,) = vmms
    known = ", ".join(DRIVERS)
    if wrong := [bus for bus in buses if bus not in DRIVERS]:
        raise Problem(f"--disk {wrong[0]}: with --vmm-command the bus of each disk was expected, one of {known}, as in --disk virtio.", Exit.USAGE)
    if not buses or len(buses) != command.template.disks:
        raise Problem(
            f"--vmm-command attaches {command.template.disks} disks, and --disk names the buses of {len(buses)}: name the bus of {{disk:0}} and of each further one, of {known}, "
            "as in --disk virtio. The first disks on these buses are written.",
            Exit.USAGE,
        )
    return (Side(command.key, command.platform.about, tuple(buses), vmm=command),)
