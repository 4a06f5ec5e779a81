"""Child processes with bounded run time and no remains.

Every child leads its own process group; on a timeout, an exception or Ctrl-C the whole group is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import paths
from .problems import Exit, Problem


_living: set[subprocess.Popen] = set()
_lock = threading.Lock()
_stopped = False
_thread = threading.local()
LOW_PRIORITY = 19  # the lowest of nice and of Linux's autogroups


def stop_all() -> None:
    """Ends all children of all threads, and prevents new ones: a thread that waits for a child continues and fails."""
    global _stopped
    with _lock:
        _stopped = True
        children = list(_living)
    for child in children:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)


def lower_priority() -> None:
    """Children that this thread starts from now on run at the lowest priority, and do not slow those of other threads."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_PRIORITY)  # on Linux, of this thread only; its children inherit it
    _thread.low_priority = True


def restore_priority() -> None:
    """Ends what lower_priority() did, for all children, as far as the system permits: only a privileged process may raise a priority."""
    with _lock:
        children = [child.pid for child in _living]
    normal = os.getpriority(os.PRIO_PROCESS, os.getpid())
    for pid in children:
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                os.setpriority(os.PRIO_PROCESS, int(thread), normal)
            Path(f"/proc/{pid}/autogroup").write_text("0")


def processor_seconds(pid: int) -> float:
    """Processor time of a process and all of its threads so far; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime [proc_pid_stat(5)]
    except (OSError, ValueError, IndexError):
        return 0.0


def kill(child: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        # The leader may have exited before its children: signal the group all the same.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)
        try:
            child.wait(timeout=2)
        except subprocess.TimeoutExpired:
            continue


@contextlib.contextmanager
def started(command: Sequence[str | Path], **options) -> Iterator[subprocess.Popen]:
    """A child for the duration of a `with` block; the child and its group are ended in any case."""
    words = [str(word) for word in command]
    with _lock:
        if _stopped:
            raise Problem("interrupted", Exit.INTERRUPTED)
        try:
            child = subprocess.Popen(words, start_new_session=True, **options)
        except FileNotFoundError:
            raise Problem(f"{words[0]}: not found. scripts/setup installs what is missing.", Exit.MISSING) from None
        except PermissionError:
            raise Problem(
                f"{words[0]}: may not be executed, by its mode or because its file system is mounted noexec. "
                f"The lab's programs are in the cache: {paths.CACHE_VARIABLE} names another folder.",
                Exit.ERROR,
            ) from None
        _living.add(child)
    if getattr(_thread, "low_priority", False):
        # Each child leads a session. If Linux groups sessions, priorities are relative within a group only [sched(7)].
        with contextlib.suppress(OSError):
            Path(f"/proc/{child.pid}/autogroup").write_text(str(LOW_PRIORITY))
    try:
        yield child
    finally:
        kill(child)
        with _lock:
            _living.discard(child)
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()


@contextlib.contextmanager
def alone(lock: Path, what: str, seconds: float = 1800) -> Iterator[None]:
    """Only one of these scripts at a time runs the block; another one is waited for, with a message. The lock is released when its holder ends."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    with open(lock, "w") as file:
        announced = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not announced:
                    print(f"{what}: waiting for another run that does the same", file=sys.stderr, flush=True)
                    announced = True
                if time.monotonic() > end:
                    raise Problem(f"{what}: another run has held {lock} for {seconds:.0f} s. Wait for it, or end it, and run the same command again.", Exit.TIMEOUT) from None
                time.sleep(0.2)
        yield


def run(
    command: Sequence[str | Path],
    *,
    timeout: float,
    check: bool = True,
    quiet: bool = True,
    what: str = "",
    **options,
) -> subprocess.CompletedProcess[str]:
    """Run to the end. With `quiet` the output is kept, and shown only if the command fails and `check` is set."""
    words = [str(word) for word in command]
    if quiet:
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("stderr", subprocess.STDOUT)
    options.setdefault("stdin", subprocess.DEVNULL)
    with started(words, text=True, errors="replace", **options) as child:
        try:
            output, errors = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill(child)
            output, errors = child.communicate()
            raise Problem(
                f"{what or words[0]}: still running after {timeout:.0f} s, killed.\n{tail(output)}", Exit.TIMEOUT
            ) from None
        done = subprocess.CompletedProcess(words, child.returncode, output or "", errors or "")
    if check and done.returncode:
        demand_room(done.stdout + done.stderr, what or words[0])
        if quiet:
            sys.stderr.write(tail(done.stdout + done.stderr) + "\n")
        raise Problem(f"{what or words[0]}: exit status {done.returncode}, expected 0.")
    return done


def demand_room(output: str, what: str) -> None:
    """Replaces the output of a program that failed because the disk is full by one line."""
    if any(os.strerror(number) in output for number in paths.FULL):
        raise Problem(paths.full(what))


def tail(text: str | None, lines: int = 40) -> str:
    """The last lines, each limited to a few times a screen's width."""
    return "\n".join(line if len(line) <= 400 else line[:400] + " …" for line in (text or "").splitlines()[-lines:])
