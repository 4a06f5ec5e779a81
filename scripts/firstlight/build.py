"""Configures and builds by the presets of CMakePresets.json. A failure is a Problem: nothing old gets tested."""

from __future__ import annotations

import sys

from . import paths, process
from .problems import Problem

CONFIGURE_SECONDS = 180
BUILD_SECONDS = 900


def preset(name: str, quiet: bool = True, target: str = "") -> None:
    source = paths.REPOSITORY
    if not (source / "CMakePresets.json").is_file():
        raise Problem(f"{source}/CMakePresets.json: no such file.")
    with process.alone(paths.BUILD / f"{name}.lock", f"build {name}"):
        process.run(["cmake", "--preset", name], timeout=CONFIGURE_SECONDS, cwd=source, what=f"cmake --preset {name}")
        process.run(
            ["cmake", "--build", "--preset", name, *(["--target", target] if target else [])],
            timeout=BUILD_SECONDS,
            cwd=source,
            quiet=quiet,
            what=f"cmake --build --preset {name}",
        )


def test_host() -> None:
    """The machine monitor of the platform hyperv."""
    print("build: test host", file=sys.stderr, flush=True)
    preset("host", target="firstlight_testhost")
    if not paths.TEST_HOST.is_file():
        raise Problem(f"The build succeeded but left no {paths.TEST_HOST.relative_to(paths.REPOSITORY)}.")


def kernel() -> None:
    print("build: kernel", file=sys.stderr, flush=True)
    preset("kernel")
    for path in (paths.KERNEL, paths.EFI):
        if not path.is_file():
            raise Problem(f"The build succeeded but left no {path.relative_to(paths.REPOSITORY)}.")
