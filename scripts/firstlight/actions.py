"""What is done to a machine while its guest runs: commands of QEMU's monitor protocol (QMP), its sudden end, or under the real Xen a command in dom0."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from .problems import Problem

SOCKET = "qmp.sock"  # in the folder of the machine's files
ANSWER_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Action:
    """Done `delay` seconds after a line of output matched `after`: `qmp`, commands as QEMU's manual has them, in order, or `kill`, a SIGKILL, or `dom0`, a command of dom0's shell."""

    after: str
    delay: float = 0.0
    qmp: Sequence[dict] = ()
    kill: bool = False
    dom0: str = ""

    def __post_init__(self) -> None:
        try:
            re.compile(self.after)
        except (re.error, TypeError) as error:
            raise Problem(f"an action's after={self.after!r}: {error}.") from None
        if not isinstance(self.delay, (int, float)) or isinstance(self.delay, bool) or not 0 <= self.delay <= 600:
            raise Problem(f"an action's delay={self.delay!r} is not a number of seconds from 0 to 600.")
        if [bool(self.qmp), bool(self.kill), bool(self.dom0)].count(True) != 1 or not isinstance(self.dom0, str) or "\n" in self.dom0 or "\t" in self.dom0 + self.after or not all(isinstance(one, dict) and isinstance(one.get("execute"), str) for one in self.qmp):
            raise Problem("an action has one of qmp, a list of {execute = …, arguments = {…}}, kill = true, or dom0, one line for dom0's shell; no tabs.")

    def __str__(self) -> str:
        return f"{self.dom0 or ('kill' if self.kill else ' and '.join(one['execute'] for one in self.qmp))} after {self.after!r}"


def arguments(wanted: Sequence[Action]) -> list[str]:
    """QEMU's, for a machine with these actions."""
    return ["-qmp", f"unix:{{folder}}/{SOCKET},server=on,wait=off"] if any(one.qmp for one in wanted) else []


class Monitor:
    """A connection to QEMU's QMP socket [QEMU's docs/interop/qmp-spec.rst]."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(ANSWER_SECONDS)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise
        self.file = self.socket.makefile("rw", encoding="utf-8", newline="\n")
        if "QMP" not in self.line():
            raise Problem("QEMU's QMP socket sent no greeting.")
        self.execute({"execute": "qmp_capabilities"})

    def line(self) -> dict:
        text = self.file.readline()
        if not text:
            raise Problem("QEMU closed its QMP socket.")
        return json.loads(text)

    def execute(self, command: dict) -> None:
        """Sends a command and takes its answer; a Problem if that is an error. Events in between are passed over."""
        self.file.write(json.dumps(command) + "\n")
        self.file.flush()
        end = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < end:
            answer = self.line()
            if "error" in answer:
                raise Problem(f"{command['execute']}: {answer['error'].get('desc')}")
            if "return" in answer:
                return
        raise Problem(f"{command['execute']}: no answer within {ANSWER_SECONDS:g} s.")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
        self.socket.close()


class Actions:
    """The actions of one machine, in order: each waits for its line, then for its delay."""

    def __init__(self, wanted: Sequence[Action], group: int, folder: Path) -> None:
        self.wanted = list(wanted)
        self.group = group
        self.folder = folder
        self.due: float | None = None  # when the first of `wanted` is carried out; None: its line has not been printed
        self.monitor: Monitor | None = None
        self.done = 0
        self.fault = ""  # of the first one that failed

    def line(self, text: str) -> None:
        if self.wanted and self.due is None and re.search(self.wanted[0].after, text):
            self.due = time.monotonic() + self.wanted[0].delay

    def step(self, verdict: bool) -> float | None:
        """Does what is due. `verdict`: the machine has printed one, after which nothing counts. Returns the seconds until the next call; None: none needed."""
        if self.due is None:
            return None
        if (left := self.due - time.monotonic()) > 0:
            return left
        action = self.wanted.pop(0)
        self.due = None
        try:
            if action.kill:
                os.killpg(self.group, signal.SIGKILL)
            else:
                self.monitor = self.monitor or Monitor(self.folder / SOCKET)
                for command in action.qmp:
                    self.monitor.execute(command)
            self.done += not verdict
        except (Problem, OSError, ValueError) as error:
            self.fault = self.fault or f"{action}: {error}"
        return None

    def close(self) -> None:
        if self.monitor:
            self.monitor.close()
