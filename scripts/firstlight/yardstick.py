"""The yardstick: Linux with fio as the guest, in the same machine, on the same disks, measured in the same way."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import apt, distribution, lab, paths, process
from .nested import Job
from .problems import Problem
from .records import HOST

KERNEL_ARGUMENTS = "console=ttyS0 quiet loglevel=0 panic=-1 xen_emul_unplug=unnecessary nokaslr norandmaps"
MEMORY = 512  # MiB
MARKER = "mark"  # the program that marks a workload's begin and end for the counts of cost.py
DISK_SECONDS = 20  # bound on the wait for a disk, in the guest's time: Linux attaches disks asynchronously


@dataclasses.dataclass(frozen=True)
class Driver:
    """Linux's driver of a disk: its module's name, and its name in sysfs, where it is bound to the disk's device or to one above it."""

    name: str
    bound: str

    @property
    def label(self) -> str:
        return f"linux-{self.name}"


@dataclasses.dataclass(frozen=True)
class Target:
    """A disk to measure: its name in the results, its driver, and how many times as many I/Os as the kernel does."""

    disk: str
    driver: Driver
    more: int = 1


@dataclasses.dataclass(frozen=True)
class Setting:
    """Options of fio, and settings of the disk's request queue in Linux. Which setting is fastest depends on the disk and the workload."""

    name: str
    words: tuple[str, ...]
    queue: tuple[tuple[str, str], ...] = ()  # files of /sys/block/DISK/queue and their contents


# In this order on each disk: what a setting writes into sysfs stays.
SETTINGS = (
    Setting("libaio", ("--ioengine=libaio",)),
    Setting(
        "io_uring",
        ("--ioengine=io_uring", "--fixedbufs=1", "--registerfiles=1", "--iodepth_batch_submit=16", "--iodepth_batch_complete_max=32"),
        (("scheduler", "none"), ("nomerges", "2"), ("iostats", "0")),
    ),
)  # fmt: skip

# The shell functions find_disk and missing.
FIND = Path(__file__).parent / "yardstick-disks.sh"

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin LD_LIBRARY_PATH=/lib HOME=/tmp
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
mount -t tmpfs tmpfs /tmp
stty -F /dev/console -opost -echo 2>/dev/null
while read -r module; do insmod "/modules/$module" 2>/dev/null; done < /modules/order
end() { sync; poweroff -f; }
. /jobs.sh
end
"""


def guest(ready: lab.Lab) -> Path:
    """The root file system of the Linux guest: busybox, fio and its libraries, the disk drivers."""
    made_of = hashlib.sha256(repr((INIT, distribution.YARDSTICK_PROGRAMS, ready.modules["l2"])).encode()).hexdigest()[:12]
    archive = ready.root / f"yardstick-{made_of}.cpio"
    if whole(archive):
        return archive
    with process.alone(ready.root / "yardstick.lock", "yardstick"):
        if whole(archive):
            return archive
        lab.announce("fetching fio for the yardstick")
        distro = distribution.detect()
        source = apt.Apt(distro.codename, distro.backports, distro.components)
        source.refresh()
        names = list(distribution.YARDSTICK_PROGRAMS)
        for program in distribution.YARDSTICK_PROGRAMS:
            names += source.libraries(program)
        archives = source.download(source.candidates(sorted(set(names))), source.root / "archives")
        with tempfile.TemporaryDirectory(dir=ready.root) as folder:
            unpacked, base = Path(folder) / "unpacked", Path(folder) / "base"
            for package in archives:
                process.run(["dpkg-deb", "-x", package, unpacked], timeout=300)
            for name in ("bin", "lib", "modules", "dev", "proc", "sys", "tmp"):
                (base / name).mkdir(parents=True)
            (base / "lib64").symlink_to("lib")
            shutil.copy2(unpacked / "usr/bin/fio", base / "bin")
            shutil.copy2(ready.root / "tree/bin/busybox", base / "bin")
            lab.copy_libraries(unpacked, [base / "bin/fio"], base / "lib")
            for name in ready.modules["l2"]:
                shutil.copy2(ready.root / "modules" / name, base / "modules")
            (base / "modules/order").write_text("".join(f"{name}\n" for name in ready.modules["l2"]))
            (base / "init").write_text(INIT)
            (base / "init").chmod(0o755)
            lab.write_cpio(base, Path(folder) / "made.cpio")
            os.rename(Path(folder) / "made.cpio", archive)
    return archive


def whole(archive: Path) -> bool:
    """A newc archive ends with an entry of this name; without it, it is truncated."""
    try:
        with open(archive, "rb") as file:
            file.seek(-min(1024, archive.stat().st_size), os.SEEK_END)
            return b"TRAILER!!!" in file.read()
    except OSError:
        return False


def mark(port: int, phase: int) -> str:
    """The mark that begins a phase on the host, or with 0 ends it. /dev/port writes bytes, and the host accepts a mark of 8 bits."""
    return f"printf '\\{phase:03o}' | dd of=/dev/port bs=1 seek={port}"


def fio_words(workload: dict, setting: Setting = SETTINGS[0], port: int = 0, phase: int = 0, counted: bool = False) -> list[str]:
    """One workload of the kernel's command line as fio's options, on the disk that find_disk found.

    `port`: where its begin and end are marked for the host. `counted`: they are marked for the counts too.

    fio runs the marks itself, between its preparations and the first I/O and after the last one, outside of the measured time.
    """
    words = [
        f"--name={workload['name']}", '--filename=/dev/"$device"', f"--rw={workload['name']}", f"--bs={workload['bs']}",
        f"--iodepth={workload['qd']}", f"--number_ios={-(-workload['count'] // workload.get('lanes', 1))}", *setting.words, "--direct=1",
        "--randrepeat=1", "--thread", "--lat_percentiles=1",
    ]  # fmt: skip
    if workload.get("lanes", 1) != 1:
        words += [f"--numjobs={workload['lanes']}", "--group_reporting"]
    if workload.get("seed", 1) != 1:
        words.append(f"--randseed={workload['seed']}")
    if workload["name"] == "randrw":
        words.append(f"--rwmixread={workload['mix']}")
    begin, end = ([mark(port, phase)], [mark(port, 0)]) if port else ([], [])
    if counted:
        begin, end = [*begin, MARKER], [MARKER, *end]
    if begin:
        words += [f"--exec_prerun={'; '.join(begin)}", f"--exec_postrun={'; '.join(end)}"]
    return [word if "$device" in word else shlex.quote(word) for word in words]


def script(targets: Sequence[Target], workloads: Sequence[dict], port: int = 0, bins: bool = False, counted: bool = False) -> str:
    """Every workload in every setting on every disk. `bins`: fio prints its histograms, which takes a while. The others: fio_words()."""
    lines = [FIND.read_text()]
    phase = 0
    for target in targets:
        driver = target.driver
        lines.append(f"find_disk {driver.bound} {DISK_SECONDS * 10} || missing {driver.name} {target.disk}")
        for setting in SETTINGS:
            # A kernel or a driver may lack one of them: then its default stays.
            lines += [f"{{ echo {value} > /sys/block/$device/queue/{name}; }} 2>/dev/null" for name, value in setting.queue]
            for number, workload in enumerate(workloads):
                lines.append(f"echo 'yardstick {target.disk} {driver.label} {number} {setting.name}'")
                phase += 1
                words = " ".join(fio_words({**workload, "count": workload["count"] * target.more}, setting, port, phase, counted))
                if workload.get("startdelay"):
                    # Before fio, whose own startdelay has steps of 0.1 s; its thinktime would first let the queue run empty.
                    lines.append(f"usleep {max(1, round(workload['startdelay'] / 1000))}")
                lines.append(f"fio --output-format={'json+' if bins else 'json'} --output=/tmp/out {words} >/dev/null 2>&1 || echo failed")
                lines.append("tr -d '\\n\\t' < /tmp/out; echo")
                lines.append("echo 'yardstick end'")
    return "\n".join(lines) + "\n"


def initrd(ready: lab.Lab, text: str, work: Path, marker: Path | None = None) -> Path:
    """The guest's root file system with `text` as its script, and the program MARKER."""
    tree = work / "yardstick-tree"
    shutil.rmtree(tree, ignore_errors=True)  # left by an interrupted run
    tree.mkdir(parents=True)
    (tree / "jobs.sh").write_text(text)
    if marker:
        (tree / "bin").mkdir()
        shutil.copy2(marker, tree / "bin" / MARKER)
    lab.write_cpio(tree, work / "jobs.cpio")
    made = work / "yardstick.initrd"
    with open(made, "wb") as whole:
        for part in (guest(ready), work / "jobs.cpio"):
            whole.write(part.read_bytes())
            whole.write(bytes(-whole.tell() % 512))
    return made


def job(ready: lab.Lab, machine_job: Job, text: str, work: Path, marker: Path | None = None) -> Job:
    """The machine of `machine_job` with Linux in place of the kernel, which then runs `text`. `marker`: the program MARKER, for counted workloads."""
    kernel, append, memory, module = (
        ("--kernel", "--append", "--memory", "--initrd") if machine_job.program else ("-kernel", "-append", "-m", "-initrd")
    )
    words = list(machine_job.arguments)
    words[words.index(kernel) + 1] = "{file:vmlinuz}"
    words[words.index(append) + 1] = KERNEL_ARGUMENTS
    words[words.index(memory) + 1] = str(MEMORY)
    words += [module, "{file:yardstick.initrd}"]
    files = {name: path for name, path in machine_job.files.items() if name == machine_job.program}
    files |= {"vmlinuz": ready.kernel, "yardstick.initrd": initrd(ready, text, work, marker)}
    return Job(machine_job.name, words, files, machine_job.disks, machine_job.timeout, machine_job.program, machine_job.pauses)


def results(output: str) -> list[tuple[str, str, int, str, dict]]:
    """(disk, driver, workload's number, setting, fio's job) for each run with complete JSON."""
    found = []
    disk = driver = setting = ""
    number = -1
    text = ""
    for line in output.splitlines():
        words = line.split()
        if words[:1] == ["yardstick"] and len(words) == 5:
            disk, driver, number, setting, text = words[1], words[2], int(words[3]), words[4], ""
        elif words == ["yardstick", "end"] and disk:
            try:
                # Before the JSON fio prints where the output of its marks goes.
                found.append((disk, driver, number, setting, json.loads(text[max(0, text.find("{")) :])["jobs"][0]))
            except (ValueError, KeyError, IndexError) as error:
                raise Problem(f"Linux with fio on {disk}: no readable JSON ({error}): {text[:200]}") from None
            disk = ""
        elif disk and not line.startswith(HOST):
            text += line
    return found
