"""Package names in each supported distribution. No other file has package names."""

from __future__ import annotations

import dataclasses

from .problems import Exit, Problem

BUILD_PACKAGES = {
    "clang-19": "compiler",
    "clang-tools-19": "clang-scan-deps, for modules",
    "lld-19": "linker for ELF and PE",
    "llvm-19": "llvm-objcopy, llvm-objdump, llvm-symbolizer",
    "libc++-19-dev": "the C++ library",
    "libc++abi-19-dev": "the C++ library",
    "libunwind-19-dev": "the C++ library",
    "libclang-rt-19-dev": "sanitizers",
    "cmake": "build",
    "ninja-build": "build",
    "googletest": "host tests (source, built with libc++)",
    "relacy-dev": "exhaustive checks of memory orderings",
    "acpica-tools": "iasl, for the test host's ACPI tables",
    "libcli11-dev": "the test host's command line",
    "mtools": "EFI system partitions",
    "cpio": "the lab's initramfs",
    "zstd": "kernel modules, where the distribution packs them so",
    "python3-crcmod": "checking disk images from outside",
    "python3-jinja2": "the page of scripts/bench --html",
    "python3-scipy": "intervals and tests of scripts/bench --runs and --compare",
}

# Needed by scripts/test besides them.
TEST_PACKAGES = {
    "clang-tidy-19": "the check of the sources for faults that a compiler does not report",
    "clang-format-19": "the check of the format of the sources",
    "gdb": "debugging the kernel",
    "fio": "its tool reads what scripts/bench --json writes",
    "python3-six": "fio's tool needs it",
}
BROWSER_PACKAGES = {"chromium-headless-shell": "the pages of scripts/bench --html in a browser", "fonts-dejavu-core": "letters in the browser"}  # not Ubuntu: its chromium is a snap


@dataclasses.dataclass(frozen=True)
class Xen:
    """The packages of the Xen lab."""

    version: str  # as in the names of the packages
    codename: str  # the release that has these packages
    emulator_codename: str  # the release whose QEMU runs Xen: 7.2, because later ones lose PVH guests (docs/decisions/0004-the-xen-lab.md)


XEN_4_17 = Xen("4.17", "bookworm", "bookworm")
XEN_4_20 = Xen("4.20", "trixie", "bookworm")


@dataclasses.dataclass(frozen=True)
class Distribution:
    name: str
    codename: str
    backports: tuple[str, ...]  # packages preferred from backports, as in apt's pin names
    lab_kernel: str  # pattern of the kernel's package
    lab_kernel_extra: tuple[str, ...] = ()  # further packages with modules; {release} is the kernel's
    components: tuple[str, ...] = ("main",)
    xens: tuple[Xen, ...] = ()  # the first is its own; empty: the Xen lab has not been tested with its packages
    build: dict[str, str] = dataclasses.field(default_factory=lambda: dict(BUILD_PACKAGES))
    tests: dict[str, str] = dataclasses.field(default_factory=lambda: dict(TEST_PACKAGES))


SUPPORTED = {
    ("debian", "12"): Distribution(
        "Debian 12",
        "bookworm",
        # Debian 12's cmake lacks modules, its QEMU lacks Xen emulation, and it has no kernel 6.12.
        backports=("cmake cmake-data", "qemu-* seabios ipxe-qemu", "linux-image-*"),
        lab_kernel=r"linux-image-6\.12\.[0-9]+\+deb12-amd64",
        xens=(XEN_4_17, XEN_4_20),
        tests=TEST_PACKAGES | BROWSER_PACKAGES,
    ),
    ("debian", "13"): Distribution(
        "Debian 13", "trixie", backports=(), lab_kernel=r"linux-image-6\.12\.[0-9]+\+deb13-amd64", xens=(XEN_4_20, XEN_4_17),
        tests=TEST_PACKAGES | BROWSER_PACKAGES,
    ),
    ("ubuntu", "24.04"): Distribution(
        "Ubuntu 24.04",
        "noble",
        backports=(),
        lab_kernel=r"linux-image-6\.8\.0-[0-9]+-generic",
        lab_kernel_extra=("linux-modules-{release}",),
        components=("main", "universe"),
    ),
}

LAB_PROGRAMS = ("qemu-system-x86",)
LAB_FILES = ("qemu-system-common", "busybox-static", "qemu-system-data", "seabios", "ovmf")
YARDSTICK_PROGRAMS = ("fio",)
# dom0's programs; `mount` has losetup, and the device model (qemu-system-xen) must be of the same Xen version.
XEN_PROGRAMS = ("xen-utils-{version}", "libxenmisc{version}", "xenstore-utils", "mount", "qemu-system-xen")
XEN_FILES = ("xen-hypervisor-{version}-amd64", "busybox-static", "qemu-system-data", "seabios", "ovmf")
XEN_EMULATOR_PROGRAMS = ("qemu-system-x86",)
XEN_EMULATOR_FILES = ("qemu-system-common", "qemu-system-data", "seabios")  # the first contains TCG


def read_os_release(text: str) -> dict[str, str]:
    return {
        name: value.strip().strip('"')
        for name, value in (line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    }


def detect(path: str = "/etc/os-release") -> Distribution:
    with open(path) as file:
        release = read_os_release(file.read())
    key = (release.get("ID", ""), release.get("VERSION_ID", ""))
    if key not in SUPPORTED:
        known = ", ".join(entry.name for entry in SUPPORTED.values())
        raise Problem(
            f"{release.get('PRETTY_NAME', key)} is not a distribution whose package names are known here ({known}). "
            "Add it to scripts/firstlight/distribution.py.",
            Exit.MISSING,
        )
    return SUPPORTED[key]
