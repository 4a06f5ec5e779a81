"""Where things are: the repository, what the build leaves, and the cache outside the repository."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
REPOSITORY = PACKAGE.parent.parent

BUILD = REPOSITORY / "build"
KERNEL = BUILD / "kernel" / "firstlight.elf"
KERNEL_SYMBOLS = BUILD / "kernel" / "firstlight.debug.elf"
EFI = BUILD / "kernel" / "BOOTX64.EFI"
TEST_HOST = BUILD / "host" / "test" / "host" / "firstlight-testhost"
RUNS = BUILD / "runs"  # images and command lines of the boots started from here


def cache() -> Path:
    """The folder for everything downloaded: never inside the repository, shared by all clones."""
    chosen = os.environ.get("FIRSTLIGHT_CACHE")
    if chosen:
        return Path(chosen).resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "firstlight"
