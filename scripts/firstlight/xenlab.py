"""The Xen lab's parts: the distribution's Xen with a Linux dom0, and an emulator that runs them; unpacked, never installed.

One folder per set of package versions, `xen/<key>/`:

    qemu-system-x86_64   wrapper that runs the unpacked QEMU on this machine
    tree/                bin, lib, share: what the wrapper uses
    xen                  the hypervisor, as QEMU loads it
    vmlinux              dom0's kernel, and the yardstick's guest kernel
    dom0.cpio            dom0's root file system without jobs: xl, xenstored, xenconsoled, modules
    qemu.cpio            the QEMU of dom0, for disks with backend=qdisk and as the device model of HVM guests, with their firmware
    manifest.json        package versions, module order, and the size of each of these files
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import lzma
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import apt, distribution, lab, paths, process, vmrun_fault
from .problems import Exit, Problem

ROOM = 500 << 20  # bytes that assembling takes at most, in addition to what the other lab has fetched
LAYOUT = "7"  # incremented when the contents of the folder change for the same packages

DOM0_MODULES = (
    "xen-privcmd", "xen-evtchn", "xen-gntdev", "xen-gntalloc", "xenfs", "loop", "virtio_pci", "virtio_blk",
)  # fmt: skip
BACKEND = "xen-blkback"  # loaded for each guest, with the parameters given by the guest's machine
NETWORK_BACKEND = "xen-netback"  # loaded for guests with network cards
TWINS = ("tun", "bridge")  # for network cards with an emulated twin, which lead to the same network
XEN_PROGRAMS = ("xl", "xenstored", "xenconsoled", "xen-init-dom0", "libxl-save-helper")
XENSTORE_NAMES = ("read", "write", "ls", "exists")
DEVICE_MODEL = "usr/libexec/xen-qemu-system-i386"
# Read by dom0's QEMU and by xl: the firmware of HVM guests, and the option ROMs that load a kernel there.
GUEST_FIRMWARE = ("usr/share/seabios/bios-256k.bin", "usr/share/ovmf/OVMF.fd")
GUEST_ROMS = ("linuxboot.bin", "linuxboot_dma.bin", "multiboot_dma.bin", "pvh.bin", "kvmvapic.bin")
# Files read by QEMU on this machine: SeaBIOS and the option ROMs that load a multiboot kernel.
FIRMWARE = ("bios-256k.bin", "multiboot.bin", "multiboot_dma.bin", "kvmvapic.bin")


@dataclasses.dataclass(frozen=True, eq=False)
class XenLab:
    root: Path
    version: str  # Xen's, as in the package names
    versions: dict[str, str]
    modules: dict[str, list[str]]  # "dom0", "backend", "network", "twins", "ram": file names in loading order

    @property
    def qemu(self) -> Path:
        return self.root / "qemu-system-x86_64"

    @property
    def xen(self) -> Path:
        return self.root / "xen"

    @property
    def kernel(self) -> Path:
        return self.root / "vmlinux"

    @property
    def base(self) -> Path:
        return self.root / "dom0.cpio"

    @property
    def device_model(self) -> Path:
        return self.root / "qemu.cpio"


def find(version: str = "", refresh: bool = False) -> XenLab:
    """The assembled lab with this version of Xen, or the distribution's own; assembles it if necessary. Safe for concurrent processes."""
    chosen = supported(distribution.detect(), version)
    top = paths.cache() / "xen"
    top.mkdir(parents=True, exist_ok=True)
    current = top / f"current-{LAYOUT}-{chosen.version}"
    ready = None if refresh else load(current)
    if ready:
        return ready
    with process.alone(top / "lock", "Xen lab"):
        ready = None if refresh else load(current)
        return ready or assemble(top, current, chosen, refresh)


def announce(text: str) -> None:
    print(f"Xen lab: {text}", file=sys.stderr, flush=True)


def load(root: Path) -> XenLab | None:
    try:
        manifest = json.loads((root / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("layout") != LAYOUT:
        return None
    wrong = lab.damaged(root, manifest.get("files"))
    if wrong:
        announce(f"{root.resolve()} is not whole ({wrong}) and is not used")
        return None
    return XenLab(root.resolve(), manifest["xen"], manifest["versions"], manifest["modules"])


@dataclasses.dataclass(frozen=True)
class Packages:
    """The packages to fetch: those of dom0 and those of the emulator, each from its own release of the distribution."""

    kernel: str
    dom0: dict[str, str]
    emulator: dict[str, str]
    dom0_source: apt.Apt
    emulator_source: apt.Apt
    kernel_source: apt.Apt
    kernel_versions: dict[str, str]

    @property
    def versions(self) -> dict[str, dict[str, str]]:
        return {"kernel": self.kernel_versions, "dom0": self.dom0, "emulator": self.emulator}

    @property
    def parts(self) -> list[tuple[apt.Apt, dict[str, str]]]:
        return [(self.kernel_source, self.kernel_versions), (self.dom0_source, self.dom0), (self.emulator_source, self.emulator)]

    def download(self) -> tuple[list[Path], list[Path]]:
        kernel = self.kernel_source.download(self.kernel_versions, self.kernel_source.archives)
        dom0 = self.dom0_source.download(self.dom0, self.dom0_source.archives)
        return kernel + dom0, self.emulator_source.download(self.emulator, self.emulator_source.archives)


def supported(distro: distribution.Distribution, version: str = "") -> distribution.Xen:
    """`version`: as in the packages' names; empty: the distribution's own."""
    if not distro.xens:
        known = ", ".join(entry.name for entry in distribution.SUPPORTED.values() if entry.xens)
        raise Problem(
            f"The Xen lab is assembled from the packages of {known}; which of {distro.name}'s would do is not known. "
            "Use another platform, or add its Xen to scripts/firstlight/distribution.py.",
            Exit.MISSING,
        )
    for xen in distro.xens:
        if version in ("", xen.version):
            return xen
    known = " or ".join(xen.version for xen in distro.xens)
    raise Problem(f"Xen {version}: on {distro.name} the Xen lab has Xen {known}. Choose one of these.", Exit.USAGE)


def choose(distro: distribution.Distribution, xen: distribution.Xen, refresh: bool = False) -> Packages:
    # dom0's kernel is the other lab's, from the same archive. The rest comes without backports: the emulator must be the older one.
    kernel_source = apt.Apt(distro.codename, distro.backports, distro.components)
    dom0_source, emulator_source = (
        apt.Apt(distro.codename, (), distro.components, variant="plain")
        if codename == distro.codename
        else apt.Apt(distro.codename, (), distro.components, variant=codename, suite=codename)
        for codename in (xen.codename, xen.emulator_codename)
    )
    for source in {id(one): one for one in (kernel_source, dom0_source, emulator_source)}.values():
        source.refresh(force=refresh)
    kernel = kernel_source.newest(distro.lab_kernel)
    return Packages(
        kernel,
        with_libraries(
            dom0_source,
            [name.format(version=xen.version) for name in distribution.XEN_PROGRAMS],
            [name.format(version=xen.version) for name in distribution.XEN_FILES],
        ),
        with_libraries(emulator_source, distribution.XEN_EMULATOR_PROGRAMS, distribution.XEN_EMULATOR_FILES),
        dom0_source, emulator_source, kernel_source,
        kernel_source.candidates([kernel]),
    )  # fmt: skip


def with_libraries(source: apt.Apt, programs: Sequence[str], files: Sequence[str]) -> dict[str, str]:
    names = {*programs, *files}
    for name in programs:
        names.update(source.libraries(name))
    versions = source.candidates(sorted(names))
    absent = sorted(names - set(versions))
    if absent:
        raise Problem(f"Packages without a candidate on the distribution's mirror: {' '.join(absent)}.", Exit.MISSING)
    return versions


def assemble(top: Path, current: Path, xen: distribution.Xen, refresh: bool = False) -> XenLab:
    for left in top.glob("assembling-*"):  # left by a run that was killed; we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    distro = distribution.detect()
    version = xen.version
    paths.demand_space(top, ROOM, "Xen lab")
    announce("reading the package lists of the distribution's mirror")
    packages = choose(distro, xen, refresh)
    key = hashlib.sha256(json.dumps([LAYOUT, packages.versions], sort_keys=True).encode()).hexdigest()[:16]
    root = top / key
    if load(root) is None:
        total, missing = sizes(packages)
        announce(
            f"fetching {missing / 1e6:.0f} MB (of {total / 1e6:.0f} MB, the rest is in the cache): "
            f"Xen {version}, {packages.kernel}, QEMU {packages.emulator['qemu-system-x86']}"
        )
        dom0, emulator = packages.download()
        announce("unpacking")
        with tempfile.TemporaryDirectory(prefix="assembling-", dir=top) as folder:
            made = Path(folder) / "lab"
            made.mkdir()
            for archives, name in ((dom0, "dom0"), (emulator, "emulator")):
                for archive in archives:
                    process.run(["dpkg-deb", "-x", archive, Path(folder) / name], timeout=300)
            build(Path(folder), made, version, packages)
            shutil.rmtree(root, ignore_errors=True)
            made.rename(root)
    link = top / f"current-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(key)
    link.rename(current)
    ready = load(current)
    assert ready
    announce(f"ready in {ready.root}")
    return ready


def build(unpacked: Path, made: Path, version: str, packages: Packages) -> None:
    release = packages.kernel.removeprefix("linux-image-")
    build_emulator(unpacked / "emulator", made)
    system = unpacked / "dom0"
    with gzip.open(one_of(system, f"boot/xen-{version}-amd64.gz")) as file:
        (made / "xen").write_bytes(file.read())
    (made / "vmlinux").write_bytes(vmlinux(one_of(system, f"boot/vmlinuz-{release}").read_bytes()))
    with tempfile.TemporaryDirectory(dir=made) as folder:
        modules = build_dom0(system, Path(folder) / "dom0", version, release)
        build_device_model(system, Path(folder) / "qemu", Path(folder) / "dom0" / "lib", version)
        lab.write_cpio(Path(folder) / "dom0", made / "dom0.cpio")
        lab.write_cpio(Path(folder) / "qemu", made / "qemu.cpio")
    manifest = {"layout": LAYOUT, "xen": version, "versions": flat(packages.versions), "modules": modules, "files": lab.sizes(made)}
    (made / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def flat(versions: dict[str, dict[str, str]]) -> dict[str, str]:
    return {f"{part}/{name}": version for part, names in versions.items() for name, version in names.items()}


def one_of(tree: Path, *names: str) -> Path:
    for name in names:
        if (tree / name).exists():
            return tree / name
    raise Problem(f"No unpacked package holds {' or '.join(names)}, which the Xen lab needs.")


def build_emulator(unpacked: Path, made: Path) -> None:
    tree = made / "tree"
    for name in ("bin", "lib", "share"):
        (tree / name).mkdir(parents=True)
    shutil.copy2(unpacked / "usr/bin/qemu-system-x86_64", tree / "bin")
    lab.copy_libraries(unpacked, [tree / "bin/qemu-system-x86_64"], tree / "lib")
    lab.copy_accelerators(unpacked, tree / "lib")
    if not vmrun_fault.correct(tree / "bin/qemu-system-x86_64"):
        announce("this QEMU is built in another way than the ones whose fault with VMRUN is known; guests may hang (vmrun_fault.py)")
    for name in FIRMWARE:
        shutil.copyfile(one_of(unpacked, f"usr/share/qemu/{name}", f"usr/share/seabios/{name}"), tree / "share" / name)
    wrapper = made / "qemu-system-x86_64"
    wrapper.write_text(lab.WRAPPER)
    wrapper.chmod(0o755)
    process.run([wrapper, "--version"], timeout=20, what="the unpacked QEMU")


def build_dom0(unpacked: Path, base: Path, version: str, release: str) -> dict[str, list[str]]:
    """dom0's root: programs where libxl expects them (`/usr/lib/xen-VERSION/bin`), libraries in one folder."""
    programs = base / f"usr/lib/xen-{version}/bin"
    for folder in (programs, base / "bin", base / "lib", base / "sbin", base / "etc/xen/scripts"):
        folder.mkdir(parents=True)
    for name in ("dev", "proc", "sys", "tmp", "run", "var/lib/xen", "var/log/xen", "var/lock", "console"):
        (base / name).mkdir(parents=True)
    (base / "lib64").symlink_to("lib")
    (base / "xen").symlink_to(f"usr/lib/xen-{version}")
    (base / "var/run").symlink_to("/run")
    shutil.copy2(one_of(unpacked, "bin/busybox", "usr/bin/busybox"), base / "bin")
    copied = []
    for name in XEN_PROGRAMS:
        copied.append(Path(shutil.copy2(one_of(unpacked, f"usr/lib/xen-{version}/bin/{name}"), programs)))
    copied.append(Path(shutil.copy2(one_of(unpacked, "usr/bin/xenstore"), programs)))
    for name in XENSTORE_NAMES:
        (programs / f"xenstore-{name}").symlink_to("xenstore")
    copied.append(Path(shutil.copy2(one_of(unpacked, "sbin/losetup", "usr/sbin/losetup"), base / "sbin")))
    lab.copy_libraries(unpacked, copied, base / "lib")
    copy_library(unpacked, "libgcc_s.so.1", base / "lib")  # loaded when a thread of libxl is cancelled, without which xl aborts
    (base / "etc/xen/xl.conf").write_text('autoballoon="off"\n')
    return {
        "dom0": lab.copy_modules(unpacked, release, DOM0_MODULES, base / "modules"),
        "backend": lab.copy_modules(unpacked, release, (BACKEND,), base / "modules"),
        "network": lab.copy_modules(unpacked, release, (NETWORK_BACKEND,), base / "modules"),
        "twins": lab.copy_modules(unpacked, release, TWINS, base / "modules"),
        "ram": lab.copy_modules(unpacked, release, ("brd",), base / "modules"),
    }


def build_device_model(unpacked: Path, base: Path, present: Path, version: str) -> None:
    """dom0's own QEMU and the firmware of HVM guests; only the libraries that dom0 lacks."""
    program = base / DEVICE_MODEL
    program.parent.mkdir(parents=True)
    (base / "lib").mkdir()
    shutil.copy2(one_of(unpacked, DEVICE_MODEL), program)
    lab.copy_libraries(unpacked, [program], base / "lib")
    # It reads a keyboard map even without a keyboard, and exits if there is none.
    keymap = base / "usr/share/qemu/keymaps/en-us"
    keymap.parent.mkdir(parents=True)
    shutil.copyfile(one_of(unpacked, "usr/share/qemu/keymaps/en-us"), keymap)
    for name in (*GUEST_FIRMWARE, f"usr/lib/xen-{version}/boot/hvmloader", *(f"usr/share/qemu/{rom}" for rom in GUEST_ROMS)):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(one_of(unpacked, name), base / name)
    for path in present.iterdir():
        (base / "lib" / path.name).unlink(missing_ok=True)


def copy_library(unpacked: Path, name: str, into: Path) -> None:
    found = one_of(unpacked, *(f"{prefix}lib/x86_64-linux-gnu/{name}" for prefix in ("", "usr/")))
    shutil.copyfile(found, into / name)


def vmlinux(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage [boot protocol 2.08: payload_offset, payload_length]. Xen cannot load a dom0 compressed by zstd or xz without help."""
    if image[0x202:0x206] != b"HdrS":
        raise Problem("The kernel's package holds no bzImage: there is no setup header.")
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = ((image[0x1F1] or 4) + 1) * 512 + offset
    payload = image[start : start + length]
    if payload[:4] == b"\x7fELF":
        unpacked = payload
    elif payload[:6] == b"\xfd7zXZ\0":
        unpacked = lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)
    elif payload[:2] == b"\x1f\x8b":
        unpacked = gzip.decompress(payload[:-4])
    elif payload[:4] == b"\x28\xb5\x2f\xfd":
        unpacked = zstd(payload[:-4])
    else:
        raise Problem(f"The kernel is packed in a way that is not known here: its first bytes are {payload[:6].hex()}.")
    if unpacked[:4] != b"\x7fELF":
        raise Problem("The kernel's package holds no ELF kernel.")
    return unpacked


def zstd(data: bytes) -> bytes:
    with process.started(["zstd", "-dcq"], stdin=-1, stdout=-1) as child:
        unpacked = child.communicate(data, timeout=120)[0]
        if child.returncode:
            raise Problem(f"zstd: exit status {child.returncode}, expected 0: the kernel's package is damaged or packed in another way.")
        return unpacked


def sizes(packages: Packages) -> tuple[int, int]:
    """Bytes of all archives, and of those not present yet."""
    total = missing = 0
    for source, versions in packages.parts:
        for name, (size, _) in source.facts(versions).items():
            total += size
            missing += 0 if apt.archive(source.archives, name, versions[name]) else size
    return total, missing
