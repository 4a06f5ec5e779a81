"""Runs guests under the real Xen: this machine's QEMU emulates a computer with Xen and a Linux dom0, which starts one guest after the other.

Several guests share one start. Each is described by a configuration for `xl create`; its console is output on the second serial
line, in the format of nested.Reader, followed by its shutdown reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import esp, lab, nested, paths, process, records, xenlab, yardstick
from .nested import MEBIBYTE, Disk, Job, Outcome, Reader
from .problems import Exit, Problem
from .records import Judgement, Verdict
from .xenlab import XenLab

if TYPE_CHECKING:
    from .machine import DiskSpec, Machine

BOOT_SECONDS = 180.0  # until dom0 is ready, on a loaded machine
# Features that QEMU emulates in a way that Xen cannot use are disabled; docs/decisions/0004-the-xen-lab.md has the reason for each flag.
PROCESSOR = ("-cpu", "EPYC,-smap,-monitor,-rdtscp,-xsave,-avx,-avx2,-f16c,-fma")
WALL = ("-accel", "tcg,thread=single", "-smp", "1")
DOM0_MEBIBYTES = 384  # without images
XEN_MEBIBYTES = 256  # the hypervisor, its boot modules, tables for its guests
GUEST_NAME = "firstlight"
BACKENDS = ("blkback", "qdisk")
# readonly: a loop device that refuses writes, which the guest is not informed of.
BACKINGS = ("loop", "ram", "readonly")
# What a disk of blkback's can be without: xl's `no-discard`, and a block device without a write cache, for which neither flush nor barrier is offered.
WITHOUT = ("discard", "flush")
# Parameters of the module xen-blkback. Linux ignores unknown ones, so they are checked here.
BLKBACK = (
    "feature_persistent", "max_queues", "max_ring_page_order", "max_buffer_pages", "max_persistent_grants", "persistent_grant_unused_seconds",
)  # fmt: skip

VIFS = {"xen": "type=vif", "e1000": "type=ioemu,model=e1000"}  # a card's bus, and how xl's configuration has it

NETWORK_QUEUES = 4  # that netback offers, on dom0's one processor too

# The reasons of SCHEDOP_shutdown [xen-sched].
REASONS = {0: "power off", 1: "reboot", 2: "suspend", 3: "crash", 4: "watchdog", 5: "soft reset"}
# How the kernel ends a domain for each verdict: docs/INTERFACES.md, "How the machine ends".
RESTART, RESTARTED = 1, "restarted as requested by "  # after `xl reboot`: the reason, and how that of the verdict begins
EXPECTED = {Verdict.SUCCESS: 0, Verdict.SKIP: 0, Verdict.ERROR: 3, Verdict.FAILURE: 3, Verdict.CRASH: 3}


@dataclasses.dataclass
class Attached:
    """A disk of a guest; `device`: the device of dom0 to which the image is attached."""

    image: str
    device: str
    sector: int
    read_only: bool
    cached: bool = True  # has a write cache
    iops: int = 0
    name: str = ""  # of a disk that uses it


@dataclasses.dataclass
class Domain(Job):
    """A guest to start. In `config`, {file:NAME} is replaced by the path of a file in dom0."""

    config: str = ""
    memory: int = 0
    backing: str = "loop"
    attached: list[Attached] = dataclasses.field(default_factory=list)
    blkback: Sequence[str] = ()
    device_model: bool = False  # some disk is served by dom0's QEMU
    network: bool = False  # has network cards, served by netback
    twins: bool = False  # and some of them have emulated twins
    beside: Sequence[str] = ()  # commands of dom0's shell that run beside the guest

    def all_files(self) -> dict[str, Path]:
        return self.files | {f"disk-{disk.name}": Path(disk.content) for disk in self.disks if os.path.isabs(disk.content)}


def quoted(text: str) -> str:
    """A string in xl's syntax: escapes as in C, no line breaks."""
    if any(ord(letter) < 0x20 or letter == "\x7f" for letter in text):
        raise Problem(f"{text!r} has characters that xl's configuration cannot hold: no control characters were expected.", Exit.USAGE)
    return '"' + text.replace("\\", "\\x5c").replace('"', "\\x22") + '"'


def check_blkback(parameters: Sequence[str]) -> None:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name not in BLKBACK or not re.fullmatch(r"\d{1,9}", value):
            raise Problem(f"{parameter!r} is no parameter of xen-blkback: NAME=NUMBER with {', '.join(BLKBACK)} was expected.", Exit.USAGE)


def check_disks(specs: Sequence[DiskSpec], blkback: Sequence[str]) -> None:
    """Checks the limits of dom0's devices, each of which holds one image, regardless of how many disks use it."""
    if any(spec.backing == "ram" for spec in specs):
        if any(spec.backing != "ram" for spec in specs):
            raise Problem("The disks of one machine are all in RAM disks (backing=ram), or none is.", Exit.USAGE)
        if len({spec.size for spec in specs}) > 1 or any(spec.sector != 512 for spec in specs):
            raise Problem("RAM disks of Linux are all of one size and have sectors of 512 bytes: use backing=loop for these disks.", Exit.USAGE)
    devices: dict[str, tuple[int, str]] = {}  # sector and backing of each shared image
    for spec in specs:
        asked = (spec.sector, spec.backing or "loop")
        if spec.image and devices.setdefault(spec.image, asked) != asked:
            raise Problem(f"image={spec.image}: on xen-pvh the disks of one image are on one device: one sector= and one backing= were expected, two are given.", Exit.USAGE)
    if any((spec.without or spec.iops) and (spec.backend == "qdisk" or spec.backing == "ram") for spec in specs):
        raise Problem("On the real Xen without= and iops= are for disks that blkback serves from a loop device: leave out backend=qdisk and backing=ram.", Exit.USAGE)
    if any(spec.backend == "qdisk" and spec.sector != 512 for spec in specs):
        raise Problem("sector=4096 is for disks that blkback serves: one with backend=qdisk has 512-byte sectors, whatever its device has. Leave out one of them.", Exit.USAGE)
    if blkback and not any(spec.backend != "qdisk" for spec in specs):
        raise Problem("Parameters of blkback are for the disks that it serves, and this machine has none: leave them out, or add a disk without backend=qdisk.", Exit.USAGE)


def domain(machine: Machine, work: Path) -> Domain:
    """The guest for the description of a machine."""
    hvm = machine.kind.domain == "hvm"
    if machine.linux:
        # QEMU as the device model loads a bzImage, and Xen itself an ELF.
        files = {"kernel": lab.find().kernel if hvm else xenlab.find(machine.xen_version).kernel, "ramdisk": yardstick.initrd(lab.find(), machine.linux, work / machine.name)}
        cmdline, memory = yardstick.KERNEL_ARGUMENTS.replace("ttyS0", "hvc0"), yardstick.MEMORY
    else:
        files = {"kernel": paths.KERNEL32 if hvm and machine.kernel == paths.KERNEL else machine.kernel}
        files |= {"ramdisk": machine.map} if machine.map else {}
        cmdline, memory = machine.cmdline, machine.memory
    if machine.boot == "uefi":
        work.mkdir(parents=True, exist_ok=True)
        files = {"esp": esp.make(work / f"{machine.name}-esp.img", machine.efi, cmdline, machine.map, machine.esp)}
    disks: dict[str, Disk] = {}
    attached: list[Attached] = []
    lines: list[str] = []
    backing = "ram" if any(spec.backing == "ram" for spec in machine.specs) else "loop"
    for spec, name in zip(machine.specs, machine.disk_names()):
        image = machine.add_image(disks, spec, name)
        # One device per image, because another disk may share it.
        device = next((known.device for known in attached if known.image == image), f"/dev/{backing}{len(attached)}")
        if not any(known.image == image for known in attached):
            attached.append(Attached(image, device, spec.sector, spec.backing == "readonly" or (spec.read_only and not spec.image), "flush" not in spec.without, spec.iops, name))
        backend = "qdisk" if spec.backend == "qdisk" else "phy"
        access = "ro" if spec.read_only else "rw"
        discard = "no-discard," if "discard" in spec.without else ""
        lines.append(f"    {quoted(f'format=raw,vdev={name},access={access},backendtype={backend},{discard}target={device}')},\n")
    if machine.dom0:
        files["udp-peer"] = paths.UDP_PEER
    config = [
        f"name = {quoted(GUEST_NAME)}",
        f"type = {quoted(machine.kind.domain)}",
        *(f"{part} = {quoted(f'{{file:{part}}}')}" for part in files if part in ("kernel", "ramdisk")),
        *([f"cmdline = {quoted(cmdline)}"] if "kernel" in files else []),
        f"memory = {memory}",
        f"vcpus = {machine.cpus}",
        "disk = [\n" + "".join(lines) + "]",
        *([f"vif = [{', '.join(quoted(f'{VIFS[card.bus]},mac={card.mac(number)},script=/etc/xen/scripts/vif') for number, card in enumerate(machine.cards))}]"] if machine.cards else []),
        *(f'on_{event} = "preserve"' for event in ("poweroff", "reboot", "crash", "watchdog")),
        *(hvm_lines("esp" in files) if hvm else []),
        *machine.xl,
    ]
    return Domain(
        machine.name, [], files, list(disks.values()), machine.timeout, pauses=machine.pauses, actions=machine.actions,
        config="\n".join(config) + "\n", memory=memory, backing=backing, attached=attached,
        blkback=machine.blkback, device_model=hvm or any(spec.backend == "qdisk" for spec in machine.specs), network=bool(machine.cards), twins=any(card.bus != "xen" for card in machine.cards), beside=machine.dom0,
    )  # fmt: skip


def hvm_lines(uefi: bool) -> list[str]:
    """What is special about HVM guests. No display, and no serial port: their output is read from the PV console, as that of PVH guests."""
    # The archive has no option ROMs of network cards.
    arguments = ["-machine", "xenfv-4.2,suppress-vmdesc=on", "-global", "e1000.romfile="]  # later versions of this machine do not enter a kernel by PVH
    if uefi:
        # On a controller that OVMF drives and the kernel does not: it would count it among its disks.
        arguments += ["-drive", "if=none,id=esp,format=raw,readonly=on,file={file:esp}", "-device", "qemu-xhci", "-device", "usb-storage,drive=esp"]
    return [
        'vga = "none"', "nographic = 1", "vnc = 0", "sdl = 0", "usb = 0",
        *(['firmware = "ovmf"'] if uefi else []),
        f"device_model_args_hvm = [{', '.join(quoted(argument) for argument in arguments)}]",
    ]  # fmt: skip


def job_script(job: Domain, index: int, offsets: dict[str, int]) -> str:
    """Sourced by dom0: three functions, so that dom0's script is the same for all guests."""
    lines = ["prepare() {", "    load backend " + shlex.join(job.blkback)]
    if job.network:
        lines.append(f"    load network max_queues={NETWORK_QUEUES}")
    if job.twins:
        lines += ["    load twins", "    touch /tmp/twins"]
    for disk in job.disks:
        if os.path.isabs(disk.content):
            lines.append(f"    cp /jobs/{index:03}/files/disk-{disk.name} /tmp/{disk.name} && truncate -s {disk.size} /tmp/{disk.name}")
        else:
            lines.append(f"    disk {disk.name} {disk.size} {disk.content}")
    if job.backing == "ram" and job.attached:
        sizes = {disk.size for disk in job.disks}
        lines.append(f"    load ram rd_nr={len(job.attached)} rd_size={max(sizes) // 1024}")
    for number, one in enumerate(job.attached):
        lines.append(f"    attach {number} {one.image} {one.sector} {job.backing}{' readonly' if one.read_only else ''}")
        if not one.cached:
            lines.append(f"    write_through {number}")
        if one.iops:
            lines.append(f"    slow {number} {one.iops}")
    seconds = max(1, round(job.timeout + sum(pause.seconds for pause in job.pauses)))
    lines += ["}", "run() {", *(f"    beside {shlex.quote(command)}" for command in job.beside), f"    guest {seconds}", "    settle", "}", "after() {", "    :"]
    for name, offset in offsets.items():
        source = next((one.device for one in job.attached if one.image == name), "")
        lines.append(f"    bring_out {source} {offset // MEBIBYTE}")
    lines += ["    /sbin/losetup --detach-all", "    rmmod xen_blkback", *(["    rmmod xen_netback"] if job.network else []), *(["    remove_twins"] if job.twins else []), *(["    rmmod brd"] if job.backing == "ram" and job.attached else [])]
    return "\n".join([*lines, "}", ""])


def with_paths(text: str, index: int) -> str:
    return re.sub(r"\{file:([^}]+)\}", lambda match: f"/jobs/{index:03}/files/{match[1]}", text)


def modules(*parts: tuple[str, str]) -> str:
    """QEMU's -initrd for a multiboot kernel: `file words,file words`; commas inside are doubled, and a blank ends the file's name."""
    assert all(" " not in name for name, _ in parts)
    return ",".join(f"{name} {words}".strip().replace(",", ",,") for name, words in parts)


@dataclasses.dataclass
class Prepared:
    """Everything that one start of the lab needs, in one folder, in which the command runs."""

    folder: Path
    command: list[str]
    tag: str
    layout: list[dict[str, int]]


def mebibytes(jobs: Sequence[Domain]) -> tuple[int, int]:
    """Memory of dom0 and of the whole machine: images are in dom0's, and one guest runs at a time."""
    # An image is created in a file, and then copied if it belongs in a RAM disk.
    images = max(sum(-(-disk.size // MEBIBYTE) for disk in job.disks) * (8 if job.backing == "ram" else 5) // 4 for job in jobs)
    brought = sum(path.stat().st_size // MEBIBYTE + 1 for path in {path for job in jobs for path in job.all_files().values()})
    model = 256 if any(job.device_model for job in jobs) else 0
    dom0 = DOM0_MEBIBYTES + model + images + brought
    return dom0, dom0 + XEN_MEBIBYTES + max(job.memory for job in jobs) * 17 // 16 + 32


def prepare(ready: XenLab, jobs: Sequence[Domain], folder: Path, wall: bool, xen: str = "") -> Prepared:
    names = [job.name for job in jobs]
    if len(set(names)) != len(names):
        raise Problem(f"Two jobs of one lab run have the same name: {' '.join(names)}")
    layout, size = nested.scratch_layout(jobs)
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)  # left by an interrupted manual run
    (tree / "jobs").mkdir(parents=True)
    package = Path(__file__).parent
    shutil.copyfile(package / "dom0-init.sh", tree / "init")
    (tree / "init").chmod(0o755)
    shutil.copyfile(package / "lab-common.sh", tree / "jobs/common.sh")
    (tree / "etc/xen/scripts").mkdir(parents=True)
    for kind in ("block", "vif"):
        script = tree / "etc/xen/scripts" / kind
        shutil.copyfile(package / f"dom0-{kind}.sh", script)
        script.chmod(0o755)
    for part, files in ready.modules.items():
        (tree / f"jobs/modules-{part}").write_text("".join(f"{name}\n" for name in files))
    digest = hashlib.sha256()
    copied: dict[Path, Path] = {}
    for index, (job, offsets) in enumerate(zip(jobs, layout)):
        place = tree / f"jobs/{index:03}"
        (place / "files").mkdir(parents=True)
        texts = {"name": job.name + "\n", "job.sh": job_script(job, index, offsets), "domain.cfg": with_paths(job.config, index)}
        if events := nested.pause_lines(job) + "".join(f"{round(one.delay * 1e6)} {one.dom0}\t{one.after}\n" for one in job.actions):
            texts["events"] = events
        for name, text in texts.items():
            (place / name).write_text(text)
            digest.update(text.encode())
        for name, path in job.all_files().items():
            target = place / "files" / name
            if path in copied:
                os.link(copied[path], target)
            else:
                copied[path] = target
                shutil.copy(path, target)
    tag = digest.hexdigest()[:12]
    (tree / "jobs/tag").write_text(tag + "\n")
    lab.write_cpio(tree, folder / "jobs.cpio")
    shutil.rmtree(tree)
    parts = [ready.base, *([ready.device_model] if any(job.device_model for job in jobs) else []), folder / "jobs.cpio"]
    # The kernel unpacks concatenated archives as one; a later file replaces an earlier one.
    with open(folder / "initrd", "wb") as whole:
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, whole)
            whole.write(bytes(-whole.tell() % 512))
    # QEMU ends a module's name at a blank: it is started in this folder, and the names contain none.
    (folder / "vmlinux").unlink(missing_ok=True)
    (folder / "vmlinux").symlink_to(ready.kernel)
    dom0, whole_machine = mebibytes(jobs)
    command = [
        str(ready.qemu), *(WALL if wall else nested.DETERMINISTIC), *PROCESSOR, "-machine", "pc", "-m", str(whole_machine),
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none",
        "-kernel", str(ready.xen), "-append", f"com1=115200,8n1 console=com1 dom0_mem={dom0}M,max:{dom0}M{' ' + xen if xen else ''}",
        "-initrd", modules(("vmlinux", "console=hvc0 quiet loglevel=4"), ("initrd", "")),
        "-serial", "file:xen.log", "-serial", "stdio",
    ]  # fmt: skip
    if size:
        with open(folder / "scratch.raw", "wb") as file:
            file.truncate(size)
        # werror=report: on a full file system QEMU would stop the machine, and everybody would wait.
        command += ["-drive", "if=none,id=scratch,format=raw,cache=unsafe,werror=report,file=scratch.raw", "-device", "virtio-blk-pci,drive=scratch"]
    return Prepared(folder, command, tag, layout)


def by_hand(job: Domain, folder: Path, wall: bool, xen: str, version: str) -> list[str]:
    """The command that starts this guest manually; the files stay in the folder."""
    prepared = prepare(xenlab.find(version), [job], folder, wall, xen)
    return [
        "# The lab's machine: Xen, dom0 and, in dom0's initrd, the guest. Its console is the second serial line; Xen's log goes to xen.log.",
        f"cd {shlex.quote(str(prepared.folder))} && {shlex.join(prepared.command)}",
        "# What `xl create` reads in dom0:",
        *(f"#   {line}" for line in with_paths(job.config, 0).splitlines()),
    ]


def run(
    ready: XenLab,
    jobs: Sequence[Domain],
    *,
    wall: bool = False,
    xen: str = "",
    live: Callable[[str, str], None] | None = None,
    keep: Path | None = None,
) -> dict[str, Outcome]:
    """Run all guests in one start of Xen. A failure of the lab itself is a Problem; a guest's failure is in its outcome."""
    with tempfile.TemporaryDirectory(prefix="firstlight-xen-") as temporary:
        prepared = prepare(ready, jobs, Path(temporary), wall, xen)
        reader = Reader(prepared.tag, [job.name for job in jobs], live, {job.name: job.timeout for job in jobs})
        # In deterministic mode a guest's own limit counts its instructions; this one counts seconds that QEMU computed.
        limit = BOOT_SECONDS + sum(5 * job.timeout + 30 + sum(pause.seconds for pause in job.pauses) for job in jobs)
        log = nested.follow(prepared.command, reader, limit, prepared.folder, counted=not wall)
        xen_log = read(prepared.folder / "xen.log")
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / "serial.log").write_text(log)
            (keep / "xen.log").write_text(xen_log)
        complaint = reader.complaint()
        if complaint:
            text = f"The Xen lab failed: {complaint}. The last output of Xen and dom0:\n{process.tail(xen_log, 15)}\nThe guests' last output:\n{process.tail(log, 15)}"
            if not reader.ready or all(outcome.status is None for outcome in reader.outcomes.values()):
                raise Problem(text, Exit.TIMEOUT if reader.late else Exit.ERROR)
            print(text, file=sys.stderr)
        for job, offsets in zip(jobs, prepared.layout):
            outcome = reader.outcomes[job.name]
            refused = [note.removeprefix(f"{job.name}: ") for note in reader.notes if note.startswith(f"{job.name}: ")]
            if outcome.status not in (None, 0, 137):
                outcome.refused = f"xl create: {'; '.join(refused) or f'exit status {outcome.status}'}"[:600]
            for disk in job.disks:
                if disk.bring_out and outcome.status is not None:
                    nested.extract(prepared.folder / "scratch.raw", offsets[disk.name], disk.size, disk.bring_out)
        return reader.outcomes


def read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace").replace("\r", "")
    except OSError:
        return ""


def judge(log: records.Log, outcome: Outcome, limit: float | None = None) -> Judgement:
    """The verdict, strictly: as on other machines, and the domain's shutdown reason must match it."""
    judgement = records.judge(log, 0, outcome.timed_out, limit, outcome.refused)
    if judgement.verdict in (Verdict.NOT_STARTED, Verdict.TIMEOUT):
        return judgement
    if not judgement.verdict.of_guest:
        if log.of("verdict") or log.malformed:
            return judgement
        return Judgement(Verdict.NO_VERDICT, f"no verdict record; the domain ended with shutdown reason {named(outcome.shutdown)}")
    expected = RESTART if judgement.reason.startswith(RESTARTED) else EXPECTED[judgement.verdict]
    if outcome.shutdown != expected:
        return Judgement(
            Verdict.NO_VERDICT,
            f"the record says {judgement.verdict.value}, and the domain ended with shutdown reason {named(outcome.shutdown)}, "
            f"where {named(expected)} was expected",
        )
    return judgement


def named(reason: int | None) -> str:
    return "none" if reason is None else f"{reason} ({REASONS.get(reason, 'unknown')})"
