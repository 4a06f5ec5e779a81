"""Programs in the place of Firecracker and Cloud Hypervisor: they check their arguments and configuration by the documented rules, print a recorded console and exit as the real ones do.

Rules: Firecracker's docs/getting-started.md, its API specification and the errors it gives for a configuration file; Cloud Hypervisor's --help.
`mode` in FAKE_VMM: success, failure (the guest's verdict), wrong (the exit status of the other verdict), hang, refuse (before the guest runs), silent, die (a guest without a verdict).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

COMMON = r'''
import json, os, struct, sys, time

recorded, words, mode = RECORDED, sys.argv[1:], os.environ.get("FAKE_VMM", "success")

def refuse(text, status=1):
    print("Error: " + text, file=sys.stderr)
    sys.exit(status)

def demand(condition, text):
    if not condition:
        refuse(text)

def demand_pvh(path):
    """An ELF file with the note XEN_ELFNOTE_PHYS32_ENTRY, number 18."""
    image = open(path, "rb").read()
    demand(image[:4] == b"\x7fELF", path + ": no ELF file")
    note = struct.pack("<II", 4, 4) + struct.pack("<I", 18) + b"Xen\0"
    demand(note in image or struct.pack("<II", 4, 8) + struct.pack("<I", 18) + b"Xen\0" in image, path + ": no PVH entry")

def demand_image(path, read_only):
    with open(path, "rb" if read_only else "r+b") as file:
        file.seek(0, 2)
        demand(file.tell() and file.tell() % 512 == 0, path + ": its size is no multiple of a sector")

def console(cmdline, kernel):
    """What the guest prints with this command line."""
    log = recorded + ("/vmm-bench.log" if "job=bench" in cmdline else "/vmm-boot.log")
    for line in open(log):
        line = line.rstrip("\n")
        if line.startswith("command line: "):
            line = f'command line: "{cmdline}"'
        if '"record":"verdict"' in line and mode == "die":
            return
        if '"record":"verdict"' in line and (mode == "failure" or (mode == "wrong" and FAILING)):
            line = '@{"record":"verdict","verdict":"ERROR","reason":"as asked"}'
        print(line, flush=True)
    if mode == "hang":
        time.sleep(120)

if mode == "refuse":
    refuse("KVM is not there")
if mode == "silent":
    sys.exit(3)
'''

FIRECRACKER = r'''
FAILING = False
if words == ["--version"]:
    print("Firecracker v1.16.1\n")
    sys.exit(0)
given = {}
while words:
    word = words.pop(0)
    if word == "--no-api":
        given[word] = True
    elif word in ("--config-file", "--log-path", "--level", "--id") and words:
        demand(word not in given, word + " twice")
        given[word] = words.pop(0)
    else:
        refuse(f"Found argument '{word}' which wasn't expected, or isn't valid in this context", 153)
demand("--no-api" in given and "--config-file" in given, "this test has no API socket")
config = json.load(open(given["--config-file"]))
known = {
    "": {"boot-source", "drives", "network-interfaces", "machine-config"},
    "boot-source": {"kernel_image_path", "boot_args", "initrd_path"},
    "drive": {"drive_id", "path_on_host", "is_root_device", "is_read_only", "cache_type", "io_engine"},
    "machine-config": {"vcpu_count", "mem_size_mib", "smt"},
}
def members(what, found, needed):
    for name in found:
        demand(name in known[what], f"Invalid JSON: unknown field `{name}`")
    for name in needed:
        demand(name in found, f"Invalid JSON: missing field `{name}`")
members("", config, ("boot-source", "drives", "network-interfaces"))
boot, machine = config["boot-source"], config["machine-config"]
members("boot-source", boot, ("kernel_image_path",))
members("machine-config", machine, ("vcpu_count", "mem_size_mib"))
demand(type(machine["vcpu_count"]) is int and 1 <= machine["vcpu_count"] <= 32, "vcpu_count")
demand(type(machine["mem_size_mib"]) is int and machine["mem_size_mib"] >= 1, "mem_size_mib")
demand_pvh(boot["kernel_image_path"])
if "initrd_path" in boot:
    open(boot["initrd_path"]).close()
cmdline = boot["boot_args"] + " pci=off"
for number, drive in enumerate(config["drives"]):
    members("drive", drive, ("drive_id", "is_root_device"))
    demand(drive["is_root_device"] is False, "a root device adds root=/dev/vda rw")
    demand(drive.get("cache_type", "Unsafe") in ("Unsafe", "Writeback"), "cache_type")
    demand(drive["cache_type"] == "Writeback", "no flushes without Writeback")
    demand_image(drive["path_on_host"], drive["is_read_only"])
    cmdline += f" virtio_mmio.device=4K@{0xc0001000 + 4096 * number:#x}:{5 + number}"
demand(len(cmdline) < 2048, "the command line is too long")
if "--log-path" not in given:
    print("2026-01-01T00:00:00.000000000 [anonymous-instance:main] Running Firecracker v1.16.1")
else:
    open(given["--log-path"], "r+").close()
console(cmdline, boot["kernel_image_path"])
# The keyboard controller's reset ends it with 0, a triple fault with 1.
sys.exit({"success": 0, "failure": 1, "wrong": 1, "die": 1, "hang": 0}[mode])
'''

CLOUD_HYPERVISOR = r'''
FAILING = False
old = "old" in os.path.basename(sys.argv[0])
if words == ["--version"]:
    print("cloud-hypervisor v" + ("45.0" if old else "53.0"))
    sys.exit(0)
if words == ["--help"]:
    print("--disk <disk>... path=<path>,readonly=on|off" + ("" if old else ",image_type=<raw,qcow2,vhd,vhdx>"))
    sys.exit(0)
given, values = {}, {"--kernel": 1, "--cmdline": 1, "--cpus": 1, "--memory": 1, "--initramfs": 1, "--serial": 1, "--console": 1, "--disk": 99}
while words:
    word = words.pop(0)
    if word not in values or word in given:
        refuse(f"unexpected argument '{word}' found", 2)
    given[word] = []
    while words and len(given[word]) < values[word] and not words[0].startswith("--"):
        given[word].append(words.pop(0))
    demand(given[word], f"a value is required for '{word}'")
def fields(text, known):
    found = dict(part.split("=", 1) for part in text.split(","))
    for name in found:
        demand(name in known, f"unknown option {name}")
    return found
demand_pvh(given["--kernel"][0])
demand(given["--serial"] == ["tty"] and given["--console"] == ["off"], "the serial port is not on standard output")
demand(1 <= int(fields(given["--cpus"][0], ("boot", "max"))["boot"]) <= 254, "cpus")
demand(fields(given["--memory"][0], ("size",))["size"].endswith("M"), "memory")
for disk in given.get("--disk", ()):
    found = fields(disk, ("path", "readonly") if old else ("path", "readonly", "image_type"))
    demand(old or found.get("image_type") == "raw", "sector 0 refuses writes unless image_type=raw")
    demand_image(found["path"], found.get("readonly") == "on")
if "--initramfs" in given:
    open(given["--initramfs"][0]).close()
console(given["--cmdline"][0], given["--kernel"][0])
# ACPI's power-off ends it with 0 after every verdict.
sys.exit({"success": 0, "failure": 0, "wrong": 1, "die": 0, "hang": 0}[mode])
'''

# QEMU's --version and -machine help, for tests that start none.
QEMU = r'''
machines = {"a-sparc": "leon3_generic  Leon-3\n", "a-qemu": "pc  Standard PC (i440FX + PIIX, 1996)\nq35  Standard PC\nmicrovm  microvm (i386)\n"}
if words == ["--version"]:
    print("QEMU emulator version 9.9.1 (as built here)\nCopyright (c) 2003-2026")
elif words == ["-machine", "help"]:
    print("Supported machines are:\n" + machines.get(os.path.basename(sys.argv[0]), machines["a-qemu"]), end="")
else:
    refuse("no machine is started here")
'''

SOURCES = {"firecracker": FIRECRACKER, "cloud-hypervisor": CLOUD_HYPERVISOR, "old-cloud-hypervisor": CLOUD_HYPERVISOR, "a-qemu": QEMU, "a-sparc": QEMU}


def install(folder: Path) -> dict[str, Path]:
    """Writes all of them into `folder`; returns their paths by name."""
    recorded = Path(__file__).resolve().parent / "recorded"
    for name, source in SOURCES.items():
        (folder / name).write_text(f"#!{sys.executable} -S\n" + COMMON.replace("RECORDED", repr(str(recorded))) + source)
        os.chmod(folder / name, 0o755)
    return {name: folder / name for name in SOURCES}
