"""The machine of a new user: a copy of the scripts, a home, and programs in PATH that behave like apt, dpkg, CMake and QEMU.

The distribution is the machine's own (/etc/os-release, /etc/apt); the contents of its mirror, and whether there is a network, are in files that the programs read.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

PROGRAMS = ("apt-get", "apt-cache", "dpkg", "dpkg-deb", "dpkg-query", "cmake", "nm", "readelf", "objdump")

FAKE = r'''#!/usr/bin/python3 -S
import hashlib, os, sys, time
state = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + "/state"
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]

def said(what, default=""):
    try:
        return open(f"{state}/{what}").read().strip()
    except OSError:
        return default

with open(f"{state}/log", "a") as log:
    log.write(f"{name} {' '.join(words)}\n")

def stage(what):
    """Where the test wants to interrupt: it is told that the stage has been reached, and nothing goes on."""
    if said("stop_at") == what:
        open(f"{state}/reached", "w").close()
        time.sleep(120)

options = {}
rest = []
while words:
    word = words.pop(0)
    if word == "-o":
        key, _, value = words.pop(0).partition("=")
        options[key] = value
    else:
        rest.append(word)

version = said("version", "1.0")
content = lambda package: (package + " " + version + "\n") * 50

if name == "apt-get" and "update" in rest:
    stage("lists")
    if said("offline"):
        strict = options.get("APT::Update::Error-Mode") == "any" and not said("old_apt")
        for suite in ("a", "b"):
            print(f"{'E' if strict else 'W'}: Failed to fetch http://deb.example/{suite}/InRelease  Temporary failure resolving 'deb.example'")
        print(f"{'E' if strict else 'W'}: Some index files failed to download. They have been ignored, or old ones used instead.")
        sys.exit(100 if strict else 0)
    for suite in said("suites").split():
        with open(f"{options['Dir::State::Lists']}/{suite}_Packages", "w") as file:
            file.write("list of " + version)
elif name == "apt-get" and "indextargets" in rest:
    for suite in said("suites").split():
        file = f"{options['Dir::State::Lists']}/{suite}_Packages"
        if os.path.exists(file):
            print(suite, file)
elif name == "apt-get" and "download" in rest:
    for word in rest[rest.index("download") + 1 :]:
        package = word.partition("=")[0]
        if said("offline"):
            print("E: Failed to fetch http://deb.example/pool  Temporary failure resolving 'deb.example'")
            sys.exit(100)
        with open(f"{package}_{version}_amd64.deb", "w") as file:
            file.write(content(package)[:40])
            file.flush()
            stage("packages")
            file.write(content(package)[40:])
elif name == "apt-get" and "install" in rest:
    open(f"{state}/installed", "w").close()
elif name == "apt-cache":
    lists = [f"{options['Dir::State::Lists']}/{suite}_Packages" for suite in said("suites").split()]
    if not any(os.path.exists(file) for file in lists):
        sys.exit(0)
    if rest[0] == "pkgnames":
        print(said("kernel"))
    elif rest[0] == "policy":
        for package in rest[1:]:
            print(f"{package}:\n  Installed: (none)\n  Candidate: {version}")
    elif rest[0] == "show":
        for word in rest[1:]:
            package = word.partition("=")[0]
            data = content(package).encode()
            print(f"Package: {package}\nVersion: {version}\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n")
elif name == "dpkg-deb":
    archive, into = rest[-2:]
    package = os.path.basename(archive).split("_")[0]
    if open(archive).read() != content(package):
        print(f"dpkg-deb: error: '{archive}' is not a Debian format archive")
        sys.exit(2)
    def put(path, text, mode=0o644):
        path = f"{into}/{path}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(text)
        os.chmod(path, mode)
    try:
        put(f"usr/share/doc/{package}", "x" * int(said("package_bytes", "10")))
        stage("unpacking")
        if package == "qemu-system-x86":
            put("usr/bin/qemu-system-x86_64", open(f"{state}/qemu").read(), 0o755)
            put("lib64/ld-linux-x86-64.so.2", '#!/bin/sh\nshift 4\nexec "$@"\n', 0o755)
        if package == "busybox-static":
            put("bin/busybox", "#!/bin/sh\n", 0o755)
        if package == said("kernel"):
            release = package[len("linux-image-"):]
            put(f"boot/vmlinuz-{release}", "kernel")
            for module in said("modules").split():
                put(f"lib/modules/{release}/kernel/{module}.ko", "\0depends=\0")
    except OSError as error:
        for i in range(40):
            print(f"tar: ./usr/share/{package}/{i}: Cannot open: {os.strerror(error.errno)}")
        print("dpkg-deb: error: tar subprocess returned error exit status 2")
        sys.exit(2)
elif name == "dpkg-query":
    for package in rest[rest.index("-f") + 2 :]:
        if not (said("missing") == package and not os.path.exists(f"{state}/installed")):
            print(f"installed {package}")
elif name == "cmake" and "--version" in rest:
    print("cmake version 3.31.6")
elif name == "cmake" and "--preset" in rest:
    preset = rest[rest.index("--preset") + 1]
    folder = f"build/{preset}"
    os.makedirs(folder, exist_ok=True)
    if "--build" not in rest:
        with open(f"{folder}/CMakeCache.txt", "w") as file:
            file.write(f"CMAKE_HOME_DIRECTORY:INTERNAL={os.getcwd()}\n")
        stage("configuring")
    else:
        print("[1/2] half", flush=True)
        stage("building")
        for made, magic in (("firstlight.elf", "\x7fELF"), ("BOOTX64.EFI", "MZ")):
            with open(f"{folder}/{made}", "w") as file:
                file.write(magic)
'''

# The system's own Python: the fake loader has removed what the wrapper adds to the path.
QEMU = r'''#!/usr/bin/python3 -S
import sys, time
words = sys.argv[1:]
if "--version" in words:
    print("QEMU emulator version 10.0.2")
    sys.exit(0)
state = "@STATE@"
with open(f"{state}/log", "a") as log:
    log.write("qemu " + " ".join(words) + "\n")
memory = int(words[words.index("-m") + 1])
if memory > 1 << 16:
    print("qemu-system-x86_64: cannot set up guest memory 'pc.ram': Cannot allocate memory", file=sys.stderr)
    sys.exit(1)
print("Firstlight, entered by pvh; image at 0x200000, 1492 KiB", flush=True)
print('@@host {"end":"debug exit"}', flush=True)
if "job=idle" in words:
    open(f"{state}/reached", "w").close()
    time.sleep(120)
print('@{"record":"verdict","verdict":"SUCCESS","reason":"booted"}')
sys.exit(33)
'''


def may_mount() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], stderr=subprocess.DEVNULL).returncode == 0


class Newcomer:
    def __init__(self, user: str = "nobody") -> None:
        """`user`: who runs the scripts, if the tests run as root and can choose."""
        from firstlight import distribution, lab

        self.root = Path(tempfile.mkdtemp(prefix="firstlight-newcomer-"))
        self.user = pwd.getpwnam(user) if os.geteuid() == 0 else None
        self.checkout, self.home, self.cache, self.state, self.bin = (
            self.root / name for name in ("checkout", "home", "cache", "state", "bin")
        )
        for folder in (self.checkout, self.home, self.cache, self.state, self.bin):
            folder.mkdir()
        shutil.copytree(REPOSITORY / "scripts", self.checkout / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        (self.checkout / "CMakePresets.json").write_text("{}\n")
        fake = self.bin / "fake"
        fake.write_text(FAKE)
        fake.chmod(0o755)
        for name in PROGRAMS:
            (self.bin / name).symlink_to("fake")
        distro = distribution.detect()
        self.distro = distro
        kernel = distro.lab_kernel.replace("[0-9]+", "117").replace("\\", "")
        modules = " ".join(name.replace("-", "_") for name in (*lab.L1_MODULES, *lab.L2_MODULES))
        suites = [distro.codename, *([f"{distro.codename}-backports"] if distro.backports else [])]
        self.tell(kernel=kernel, modules=modules, suites=" ".join(suites), qemu=QEMU.replace("@STATE@", str(self.state)), log="")
        self.root.chmod(0o755)
        self.own(self.home, self.cache, self.state, self.checkout)

    def own(self, *folders: Path) -> None:
        if self.user:
            subprocess.run(["chown", "-R", f"{self.user.pw_uid}:{self.user.pw_gid}", *map(str, folders)], check=True)

    def tell(self, **facts: str) -> None:
        """Sets the programs' behaviour from now on; an empty text resets it."""
        for name, text in facts.items():
            if text or name == "log":
                (self.state / name).write_text(text)
            else:
                (self.state / name).unlink(missing_ok=True)
        if self.user:
            self.own(self.state)

    @property
    def log(self) -> str:
        return (self.state / "log").read_text()

    def command(self, *words: str, root: bool = False, before: str = "", **environment: str) -> list[str]:
        """`before`: a shell command that root runs first, in a mount namespace of its own."""
        variables = {
            "PATH": f"{self.bin}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(self.home), "FIRSTLIGHT_CACHE": str(self.cache), "LANG": "C.UTF-8",
            **environment,
        }  # fmt: skip
        program = words[0] if words[0].startswith("/") else str(self.checkout / "scripts" / words[0])
        line = ["env", "-i", *(f"{name}={value}" for name, value in variables.items() if value), program, *words[1:]]
        if self.user and not root:
            line = ["setpriv", f"--reuid={self.user.pw_uid}", f"--regid={self.user.pw_gid}", "--clear-groups", *line]
        return ["unshare", "-m", "sh", "-c", before + ' && exec "$@"', "sh", *line] if before else line

    def run(self, *words: str, **options: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*words, **options), cwd=self.root, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )

    def interrupted(self, stage: str, *words: str, times: int = 1) -> tuple[int, str]:
        """Starts a script and presses Ctrl-C at that stage; returns its exit status and output."""
        (self.state / "reached").unlink(missing_ok=True)
        self.tell(stop_at=stage)
        child = subprocess.Popen(
            self.command(*words), cwd=self.root, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        try:
            end = time.monotonic() + 30
            while not (self.state / "reached").exists():
                if child.poll() is not None or time.monotonic() > end:
                    child.kill()
                    raise AssertionError(f"{words} never came to {stage}: {child.communicate()[0]}")
                time.sleep(0.02)
            for _ in range(times):
                os.killpg(child.pid, signal.SIGINT)
                time.sleep(0.05)
            said = child.communicate(timeout=30)[0]
        finally:
            child.kill()
        self.tell(stop_at="")
        return child.returncode, said

    def left(self) -> list[str]:
        """Processes of this machine that still run."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(self.root) in words:
                found.append(words)
        return found

    def close(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
