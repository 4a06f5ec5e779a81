"""Exit codes of all scripts, and the exception that carries them."""

from __future__ import annotations

import enum


class Exit(enum.IntEnum):
    """Exit status of a script, the same for all of them."""

    SUCCESS = 0
    FAILURE = 1  # a test failed, or a disk returned wrong data
    USAGE = 2  # invalid arguments of the script itself
    ERROR = 3  # could not be tried: bad input, the build failed, the lab did not start
    SKIP = 4
    CRASH = 5  # the kernel reported a panic
    TIMEOUT = 6  # still running at the time-out
    MISSING = 7  # packages are missing and cannot be installed from here
    NOT_STARTED = 8  # the virtual machine monitor did not start: no guest ran
    NO_VERDICT = 9  # the machine ended, or was killed, without a valid verdict
    INTERRUPTED = 130


# Their descriptions for --help.
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
    """An error that the user can act on: what was expected, what was seen, what to do."""

    def __init__(self, message: str, code: Exit = Exit.ERROR) -> None:
        super().__init__(message)
        self.code = code
