"""Paths: the repository, the build's output, and the cache outside the repository."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import stat
import tempfile
from pathlib import Path

from .problems import Exit, Problem

PACKAGE = Path(__file__).resolve().parent
REPOSITORY = PACKAGE.parent.parent

BUILD = REPOSITORY / "build"
KERNEL = BUILD / "kernel" / "firstlight.elf"
KERNEL32 = BUILD / "kernel" / "firstlight-elf32.elf"  # the same as a 32-bit ELF
KERNEL_SYMBOLS = BUILD / "kernel" / "firstlight.debug.elf"
EFI = BUILD / "kernel" / "BOOTX64.EFI"
TEST_HOST = BUILD / "host" / "test" / "host" / "firstlight-testhost"
UDP_PEER = BUILD / "host" / "test" / "peer" / "firstlight-udp-peer"
RUNS = BUILD / "runs"  # images and command lines of the boots started from here

CACHE_VARIABLE = "FIRSTLIGHT_CACHE"
CACHE_HELP = (
    "Everything downloaded goes into one folder outside the checkout: $FIRSTLIGHT_CACHE (an absolute path), otherwise "
    "$XDG_CACHE_HOME/firstlight, otherwise ~/.cache/firstlight."
)
MEBIBYTE = 1 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)


def cache() -> Path:
    """The folder for all downloads: never inside the repository, shared by all clones."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        if not os.path.isabs(chosen):
            raise Problem(
                f"{CACHE_VARIABLE} is {chosen!r}, an absolute path was expected: the same folder wherever the scripts are started. "
                f"Try {CACHE_VARIABLE}={os.path.abspath(chosen)}.",
                Exit.USAGE,
            )
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # a relative path must be ignored [xdg-basedir-0.8]
        return Path(base) / "firstlight"
    try:
        return Path.home() / ".cache" / "firstlight"
    except RuntimeError:
        raise Problem(f"No home folder is known for user {os.geteuid()}. Set HOME, or {CACHE_VARIABLE} to a folder.", Exit.USAGE) from None


def nearest(path: Path) -> Path:
    """The path, or its nearest existing parent."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def free(path: Path) -> int:
    """Bytes that this user can still write at the path, which need not exist."""
    found = os.statvfs(nearest(path))
    return found.f_bavail * found.f_frsize


def demand_space(folder: Path, wanted: int, what: str) -> None:
    """Checks the free space before anything is fetched or unpacked."""
    there = free(folder)
    if there < wanted:
        raise Problem(
            f"{what}: about {wanted // MEBIBYTE} MiB are needed in {folder}, {there // MEBIBYTE} MiB are free. {remedy(folder)}", Exit.ERROR
        )


def remedy(folder: Path) -> str:
    """How to choose another place for a folder."""
    with contextlib.suppress(Problem):
        if folder.is_relative_to(cache()):
            return f"Make room there, or set {CACHE_VARIABLE} to a folder with more."
    if folder.is_relative_to(REPOSITORY):
        return "Make room there, or use a checkout on a disk with more."
    if folder.is_relative_to(temporary()):
        return "Make room there, or set TMPDIR to a folder with more."
    return "Make room there."


def temporary() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except OSError:
        return Path("/tmp")


def full(what: str = "", file: str | bytes | int | None = None) -> str:
    """The message for a full disk: which of the scripts' folders is on it, and what helps."""
    text = (what + ": " if what else "") + "no space left on the disk. Free"
    seen: dict[int, str] = {}
    folders = [nearest(Path(os.path.abspath(os.fsdecode(file))).parent)] if isinstance(file, (str, bytes)) else []
    folders += written()
    lowest = min(((free(folder), folder) for folder in folders), key=lambda pair: pair[0])
    for folder in folders:
        device = nearest(folder).stat().st_dev
        seen.setdefault(device, f" {free(folder) // MEBIBYTE} MiB in {folder}")
    return text + ",".join(seen.values()) + f". {remedy(lowest[1])}"


def written() -> list[Path]:
    folders = [BUILD, temporary()]
    with contextlib.suppress(Problem):
        folders.insert(0, cache())
    return folders


def explain(error: OSError) -> str:
    """A system error in words: what could not be done, why, and what to do."""
    if error.errno in FULL:
        return full(str(error.filename or ""), error.filename)
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else None
    if path and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        place = nearest(path.absolute())
        if error.errno == errno.EROFS:
            text = f"{path}: its file system is read-only."
        else:
            text = f"{path}: permission denied; {place} belongs to {name_of(place.stat().st_uid)}, and this is {name_of(os.geteuid())}."
        if path.absolute().is_relative_to(REPOSITORY):
            text += f" Builds and logs go into {BUILD}: use a checkout that can be written, or boot what was built before with --no-build."
        else:
            with contextlib.suppress(Problem):
                if path.is_relative_to(cache()) or cache().is_relative_to(place):
                    text += f" Downloads go into {cache()}: make it writable (after a run as root: chown -R), or set {CACHE_VARIABLE} to another folder."
        return text
    text = (f"{path}: " if path else "") + (error.strerror or str(error))
    with contextlib.suppress(Problem):
        if path and path.absolute().is_relative_to(cache()):
            text += f". Downloads go into {cache()}: set {CACHE_VARIABLE} to a folder, or to the name of one that can be made."
    return text


def name_of(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"


def write_whole(path: Path, data: str | bytes) -> None:
    """Atomic: a file of this name is complete, even if this is interrupted."""
    content = data.encode() if isinstance(data, str) else data
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        path.write_bytes(content)  # a pipe or a device cannot be the target of a rename
        return
    target = Path(os.path.realpath(path))
    handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def writable(path: Path, what: str) -> None:
    """Checks at the beginning that a file to be written at the end can be written."""
    folder = path.parent
    if path.is_dir():
        raise Problem(f"{what} {path}: a folder, the name of a file was expected.", Exit.USAGE)
    if not folder.is_dir():
        raise Problem(f"{what} {path}: the folder {folder} does not exist.", Exit.USAGE)
    if not os.access(path if path.exists() else folder, os.W_OK) or (not path.exists() and not os.access(folder, os.X_OK)):
        raise Problem(f"{what} {path}: {name_of(os.geteuid())} may not write there.", Exit.USAGE)
