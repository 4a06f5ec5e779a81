"""Exit codes of every script, and the one exception that carries them."""

from __future__ import annotations

import enum


class Exit(enum.IntEnum):
    """What a script's exit status means. The same for all of them."""

    SUCCESS = 0
    FAILURE = 1  # tried, and wrong: a test failed, a disk gave wrong data
    USAGE = 2  # the arguments of the script itself
    ERROR = 3  # it could not be tried: bad input, the build failed, the lab did not start
    SKIP = 4
    CRASH = 5  # the kernel panicked, or ended without a verdict
    TIMEOUT = 6
    MISSING = 7  # packages are missing and cannot be installed from here
    INTERRUPTED = 130


EXIT_HELP = "exit status: " + ", ".join(f"{int(code)} {code.name.lower()}" for code in Exit)


class Problem(Exception):
    """Something the person at the terminal can act on: what was expected, what was seen, what to do."""

    def __init__(self, message: str, code: Exit = Exit.ERROR) -> None:
        super().__init__(message)
        self.code = code
