"""The lab's parts: QEMU with its libraries, a Linux with KVM, firmware, busybox; unpacked, never installed.

One folder per set of package versions, `lab/<key>/`:

    qemu-system-x86_64   wrapper that runs the unpacked QEMU on this machine
    tree/                bin, lib, share: what the wrapper uses, and what L1 gets
    vmlinuz              L1's kernel (and the yardstick's L2 kernel)
    modules/             every module that may be loaded, unpacked, by name
    base.cpio            L1's root file system without jobs
    manifest.json        package versions, module order, and the size of each of these files

`lab/current-<layout>` is a link to the one in use: checkouts of different versions of these scripts have one each.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from . import apt, distribution, paths, process, vmrun_fault
from .problems import Problem

LAYOUT = "10"  # incremented when the contents of the folder change for the same packages

ROOM = 700 << 20  # bytes needed for assembling at most: lists, archives, their contents, the lab itself

L1_MODULES = ("kvm-amd", "virtio_pci", "virtio_blk")
L2_MODULES = (
    "xen-blkfront", "ata_piix", "sd_mod", "virtio_pci", "virtio_mmio", "virtio_blk", "virtio_scsi", "vmw_pvscsi", "nvme", "ahci", "hv_vmbus", "hv_storvsc", "hv_utils",
)  # fmt: skip

# Files that QEMU in L1 reads at run time: option ROMs and firmware. On this machine QEMU gets the whole folders.
L1_FIRMWARE = ("pvh.bin", "linuxboot_dma.bin", "kvmvapic.bin", "bios-256k.bin", "bios-microvm.bin", "qboot.rom", "OVMF.fd")


@dataclasses.dataclass(frozen=True, eq=False)
class Lab:
    root: Path
    versions: dict[str, str]
    modules: dict[str, list[str]]  # "l1", "l2": file names in loading order

    @property
    def qemu(self) -> Path:
        return self.root / "qemu-system-x86_64"

    @property
    def firmware(self) -> Path:
        return self.root / "tree" / "share"

    @property
    def kernel(self) -> Path:
        return self.root / "vmlinuz"

    @property
    def base(self) -> Path:
        return self.root / "base.cpio"


WRAPPER = """#!/bin/sh
# QEMU as unpacked from the distribution's packages, with the libraries it was built against.
here=$(dirname -- "$(readlink -f -- "$0")")/tree
export QEMU_MODULE_DIR="$here/lib/qemu"
exec "$here/lib/ld-linux-x86-64.so.2" --library-path "$here/lib" --argv0 qemu-system-x86_64 \\
    "$here/bin/qemu-system-x86_64" -L "$here/share" "$@"
"""


def find(refresh: bool = False, progress=None) -> Lab:
    """The assembled lab, assembling it if necessary. Safe for concurrent processes."""
    top = paths.cache() / "lab"
    top.mkdir(parents=True, exist_ok=True)
    current = top / f"current-{LAYOUT}"
    if not refresh:
        ready = load(current)
        if ready:
            return ready
    with process.alone(top / "lock", "lab"):
        ready = None if refresh else load(current)
        return ready or assemble(top, current, progress or announce, refresh)


def announce(text: str) -> None:
    print(f"lab: {text}", file=sys.stderr, flush=True)


def load(root: Path) -> Lab | None:
    try:
        manifest = json.loads((root / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("layout") != LAYOUT:
        return None
    wrong = damaged(root, manifest.get("files"))
    if wrong:
        announce(f"{root.resolve()} is not whole ({wrong}) and is not used")
        return None
    return Lab(root.resolve(), manifest["versions"], manifest["modules"])


def damaged(root: Path, files: object) -> str:
    """The first file whose size is not that in the manifest; empty if all are."""
    if not isinstance(files, dict) or not files:
        return "its manifest names no files"
    for name, size in files.items():
        try:
            seen = (root / name).stat().st_size
        except OSError as error:
            return f"{name}: {error.strerror}"
        if seen != size:
            return f"{name} has {seen} bytes, {size} expected"
    return ""


def assemble(top: Path, current: Path, progress, refresh: bool = False) -> Lab:
    for left in top.glob("assembling-*"):  # left by a run that was killed; we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    distro = distribution.detect()
    paths.demand_space(top, ROOM, "lab")
    source = apt.Apt(distro.codename, distro.backports, distro.components)
    progress("reading the package lists of the distribution's mirror")
    source.refresh(force=refresh)
    kernel = source.newest(distro.lab_kernel)
    release = kernel.removeprefix("linux-image-")
    names = [kernel, *(name.format(release=release) for name in distro.lab_kernel_extra)]
    names += [*distribution.LAB_PROGRAMS, *distribution.LAB_FILES]
    for program in distribution.LAB_PROGRAMS:
        names += source.libraries(program)
    versions = source.candidates(sorted(set(names)))
    absent = sorted(set(names) - set(versions))
    if absent:
        raise Problem(
            f"Packages without a candidate on the distribution's mirror: {' '.join(absent)}. scripts/setup --refresh fetches its lists again.", Exit.MISSING
        )
    key = hashlib.sha256(json.dumps([LAYOUT, versions], sort_keys=True).encode()).hexdigest()[:16]
    root = top / key
    if load(root) is None:
        progress(f"fetching {len(versions)} packages (QEMU {versions['qemu-system-x86']}, {kernel})")
        archives = source.download(versions, source.root / "archives")
        progress("unpacking")
        with tempfile.TemporaryDirectory(prefix="assembling-", dir=top) as folder:
            made = Path(folder) / "lab"
            made.mkdir()
            unpacked = Path(folder) / "unpacked"
            for archive in archives:
                process.run(["dpkg-deb", "-x", archive, unpacked], timeout=300)
            build(unpacked, made, release, versions)
            shutil.rmtree(root, ignore_errors=True)
            made.rename(root)
    link = top / f"current-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(key)
    link.rename(current)
    ready = load(current)
    assert ready
    progress(f"ready in {ready.root}")
    return ready


def build(unpacked: Path, made: Path, release: str, versions: dict[str, str]) -> None:
    tree = made / "tree"
    for name in ("bin", "lib", "share"):
        (tree / name).mkdir(parents=True)
    shutil.copy2(unpacked / "usr/bin/qemu-system-x86_64", tree / "bin")
    if not vmrun_fault.correct(tree / "bin/qemu-system-x86_64"):
        announce("note: this QEMU's VMRUN was not recognised; a boot in deterministic time may hang and be tried again")
    shutil.copy2(next(path for path in (unpacked / "bin/busybox", unpacked / "usr/bin/busybox") if path.exists()), tree / "bin")
    copy_libraries(unpacked, [tree / "bin/qemu-system-x86_64"], tree / "lib")
    copy_accelerators(unpacked, tree / "lib")
    copy_firmware(unpacked, tree / "share")
    wrapper = made / "qemu-system-x86_64"
    wrapper.write_text(WRAPPER)
    wrapper.chmod(0o755)
    process.run([wrapper, "--version"], timeout=20, what="the unpacked QEMU")
    shutil.copy2(unpacked / f"boot/vmlinuz-{release}", made / "vmlinuz")
    modules = {
        "l1": copy_modules(unpacked, release, L1_MODULES, made / "modules"),
        "l2": copy_modules(unpacked, release, L2_MODULES, made / "modules"),
    }
    with tempfile.TemporaryDirectory(dir=made) as folder:
        base = Path(folder)
        shutil.copytree(tree / "lib", base / "lib")
        (base / "lib64").symlink_to("lib")
        shutil.copytree(tree / "bin", base / "bin")
        (base / "share").mkdir()
        for name in L1_FIRMWARE:
            if (tree / "share" / name).exists():
                shutil.copy2(tree / "share" / name, base / "share")
        (base / "modules").mkdir()
        for name in modules["l1"]:
            shutil.copy2(made / "modules" / name, base / "modules")
        for name in ("dev", "proc", "sys", "tmp"):
            (base / name).mkdir()
        write_cpio(base, made / "base.cpio")
    (made / "manifest.json").write_text(
        json.dumps({"layout": LAYOUT, "versions": versions, "modules": modules, "files": sizes(made)}, indent=1) + "\n"
    )


def sizes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def needed(path: Path) -> list[str]:
    """The DT_NEEDED entries, as objdump lists them; statically linked files have none."""
    answer = process.run(["objdump", "-p", path], timeout=60, check=False).stdout
    return re.findall(r"^\s+NEEDED\s+(\S+)", answer, re.M)


def copy_libraries(unpacked: Path, programs: Iterable[Path], into: Path) -> None:
    """Every library the programs need, directly or indirectly, found among the unpacked packages."""
    folders = [
        unpacked / prefix / name
        for prefix in ("", "usr")
        for name in ("lib/x86_64-linux-gnu", "lib64", "lib", "lib/x86_64-linux-gnu/ceph")
    ]
    waiting = [library for program in programs for library in needed(program)]
    waiting.append("ld-linux-x86-64.so.2")
    done: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        found = next((folder / name for folder in folders if (folder / name).exists()), None)
        if not found:
            raise Problem(
                f"No unpacked package holds {name}, which QEMU needs: apt's dependencies and the programs disagree."
            )
        target = into / name
        shutil.copyfile(found, target)  # through the symbolic link: one file under the requested name
        target.chmod(0o755)
        waiting += needed(target)


def copy_accelerators(unpacked: Path, lib: Path) -> None:
    """Ubuntu builds TCG as a module of QEMU, which QEMU loads from QEMU_MODULE_DIR."""
    (lib / "qemu").mkdir()
    modules = sorted((unpacked / "usr/lib/x86_64-linux-gnu/qemu").glob("accel-*x86_64.so"))
    for module in modules:
        shutil.copy2(module, lib / "qemu")
    copy_libraries(unpacked, modules, lib)


def copy_firmware(unpacked: Path, into: Path) -> None:
    """One flat folder for QEMU's -L: option ROMs, SeaBIOS, OVMF."""
    for folder in ("usr/share/qemu", "usr/lib/ipxe/qemu", "usr/share/seabios"):
        for path in sorted((unpacked / folder).glob("*")):
            if path.is_file() and not (into / path.name).exists():
                shutil.copyfile(path, into / path.name)
    for folder in ("usr/share/ovmf", "usr/share/OVMF"):
        for path in sorted((unpacked / folder).glob("OVMF*.fd")):
            if path.is_file() and not any(word in path.name for word in ("ms", "secboot", "snakeoil")):
                shutil.copyfile(path, into / path.name)


def copy_modules(unpacked: Path, release: str, names: Iterable[str], into: Path) -> list[str]:
    """Copy the modules and their dependencies, uncompressed; returns their file names in loading order."""
    tops = [unpacked / "lib/modules" / release, unpacked / "usr/lib/modules" / release]
    files = {}
    for top in tops:
        for path in top.rglob("*.ko*"):
            files[path.name.split(".ko")[0].replace("-", "_")] = path
    into.mkdir(exist_ok=True)
    order: list[str] = []
    built_in = "".join(path.read_text() for top in tops for path in top.glob("modules.builtin")).replace("-", "_")

    def add(name: str) -> None:
        name = name.replace("-", "_")
        file_name = f"{name}.ko"
        if file_name in order:
            return
        if name not in files:
            if f"/{name}.ko" in built_in:
                return
            raise Problem(f"The kernel package {release} has no module {name}.")
        image = uncompressed(files[name])
        for dependency in module_dependencies(image):
            add(dependency)
        (into / file_name).write_bytes(image)
        order.append(file_name)

    for name in names:
        add(name)
    return order


def module_dependencies(image: bytes) -> list[str]:
    match = re.search(rb"\0depends=([^\0]*)\0", image)
    return [name for name in (match[1].decode() if match else "").split(",") if name]


def uncompressed(path: Path) -> bytes:
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        with process.started(["zstd", "-dcq", path], stdout=-1) as child:
            image = child.communicate(timeout=60)[0]
            if child.returncode:
                raise Problem(f"zstd {path.name}: exit status {child.returncode}, expected 0.")
            return image
    return path.read_bytes()


def write_cpio(tree: Path, archive: Path) -> None:
    """A newc archive the kernel unpacks: owned by root, reproducible."""
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    for name in names:
        os.utime(tree / name, (0, 0), follow_symlinks=False)
    with open(archive, "wb") as file:
        with process.started(
            ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0", "--reproducible"], cwd=tree, stdin=-1, stdout=file, stderr=-1
        ) as child:
            said = child.communicate("\n".join(names).encode() + b"\n", timeout=120)[1].decode(errors="replace")
            if child.returncode:
                process.demand_room(said, str(archive))
                raise Problem(f"cpio: exit status {child.returncode}, expected 0: {process.tail(said, 3)}")
