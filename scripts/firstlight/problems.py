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
    CRASH = 5  # the kernel panicked, and said so
    TIMEOUT = 6  # it was still running when its time was over
    MISSING = 7  # packages are missing and cannot be installed from here
    NOT_STARTED = 8  # the virtual machine monitor refused to start: no guest ran
    NO_VERDICT = 9  # the machine ended, or was ended, without a verdict that can be believed
    INTERRUPTED = 130


# What --help says of them.
EXIT_TEXTS = {
    Exit.SUCCESS: "success",
    Exit.FAILURE: "failure: tried, and wrong",
    Exit.USAGE: "usage: the options of the script",
    Exit.ERROR: "error: it could not be tried (bad input, a build that failed, a lab that did not start)",
    Exit.SKIP: "skip",
    Exit.CRASH: "crash: the kernel panicked",
    Exit.TIMEOUT: "time-out",
    Exit.MISSING: "packages are missing",
    Exit.NOT_STARTED: "not started: the virtual machine monitor refused, no guest ran",
    Exit.NO_VERDICT: "no verdict: the machine ended without one",
    Exit.INTERRUPTED: "interrupted",
}
EXIT_HELP = "Exit status: " + "; ".join(f"{int(code)} {text}" for code, text in EXIT_TEXTS.items()) + "."


class Problem(Exception):
    """Something the person at the terminal can act on: what was expected, what was seen, what to do."""

    def __init__(self, message: str, code: Exit = Exit.ERROR) -> None:
        super().__init__(message)
        self.code = code
