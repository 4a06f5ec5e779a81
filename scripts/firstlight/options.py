"""The scripts' own options: each with help and a default, checked by itself and against the others before anything is done.

A script declares a table of Conflict. An option that would have no effect is one: nothing is ignored silently.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .problems import Exit, Problem

WIDTH = 100


class Formatter(argparse.HelpFormatter):
    """Keeps paragraphs apart, and shows the default of every option that takes a value."""

    def __init__(self, prog: str) -> None:
        columns = int(os.environ.get("COLUMNS") or 0) or WIDTH
        super().__init__(prog, max_help_position=26, width=max(40, min(columns, WIDTH)))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(textwrap.fill(part, width, initial_indent=indent, subsequent_indent=indent) for part in text.split("\n\n"))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.nargs == 0 or "(default" in text or action.help is argparse.SUPPRESS:
            return action.help
        return text + f" (default: {shown(action.default)})"


def shown(default: Any) -> str:
    if default in (None, "", [], ()):
        return "none"
    return f"{default:g}" if isinstance(default, float) else str(default)


class Given(argparse.Action):
    """Stores a value, once, and records that it was given."""

    def __call__(self, parser, namespace, values, option_string=None):
        demand_first(namespace, self, option_string)
        setattr(namespace, self.dest, values)


class GivenTrue(argparse.Action):
    def __init__(self, option_strings, dest, default=False, required=False, help=None):
        super().__init__(option_strings, dest, nargs=0, default=default, required=required, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.given = [*getattr(namespace, "given", []), self.dest]  # repeating an identical value is allowed
        setattr(namespace, self.dest, True)


class GivenAppend(argparse._AppendAction):
    def __call__(self, parser, namespace, values, option_string=None):
        namespace.given = [*getattr(namespace, "given", []), self.dest]
        super().__call__(parser, namespace, values, option_string)


class GivenExtend(argparse._ExtendAction):
    def __call__(self, parser, namespace, values, option_string=None):
        namespace.given = [*getattr(namespace, "given", []), self.dest]
        super().__call__(parser, namespace, values, option_string)


def demand_first(namespace, action: argparse.Action, word: str | None) -> None:
    given = getattr(namespace, "given", [])
    if action.dest in given:
        raise Problem(f"{word} was given twice: one value was expected.", Exit.USAGE)
    namespace.given = [*given, action.dest]


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and `given`: the options on the command line."""

    def __init__(self, **words) -> None:
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **words)
        self.register("action", None, Given)
        self.register("action", "store", Given)
        self.register("action", "store_true", GivenTrue)
        self.register("action", "append", GivenAppend)
        self.register("action", "extend", GivenExtend)

    def error(self, message: str):
        raise Problem(f"{message}. {self.prog} --help lists the options.", Exit.USAGE)

    def parse_args(self, args=None, namespace=None):
        namespace = namespace or argparse.Namespace()
        namespace.given = []
        return super().parse_args(args, namespace)


@dataclasses.dataclass(frozen=True)
class Conflict:
    """Options that exclude each other. `when`: only if this is true of the result; `why`: what to do."""

    options: tuple[str, ...]
    why: str
    when: Callable[[Any], bool] = lambda chosen: True

    def words(self) -> str:
        return " with ".join(flag(name) for name in self.options)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def demand_agreement(chosen: Any, conflicts: Sequence[Conflict]) -> None:
    for conflict in conflicts:
        if set(conflict.options) <= set(chosen.given) and conflict.when(chosen):
            raise Problem(conflict.words() + (": " if len(conflict.options) > 1 else " ") + conflict.why + ".", Exit.USAGE)


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of a number from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} was given, a number from {low} to {high} was expected")
        return value

    return parse


def seconds(high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} was given, seconds were expected: more than 0, at most {high:g}")
        return value

    return parse


def one_line(text: str) -> str:
    """A command line for the kernel, such as a loader can pass on."""
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise argparse.ArgumentTypeError(f"{text!r} was given, one line without control characters was expected")
    return text


def path(text: str) -> str:
    """The type of a file's name: an empty one, as of an unset variable of the shell, is none."""
    if not text:
        raise argparse.ArgumentTypeError("'' was given, the name of a file was expected: is a variable of the shell empty?")
    return text


def place(text: str) -> Path:
    """The same, of a file or folder to be written or read later."""
    return Path(path(text))


def listed(text: str) -> tuple[str, ...]:
    """Words separated by commas."""
    words = tuple(word for word in text.split(",") if word)
    if not words:
        raise argparse.ArgumentTypeError(f"{text!r} was given, at least one word was expected")
    return words


def name_patterns(text: str) -> list[str]:
    """Patterns that select by name, for action="extend". An empty one would select everything."""
    patterns = text.split(",")
    if not all(patterns):
        raise argparse.ArgumentTypeError(f"{text!r} was given, a name, a part of one or a glob was expected, or several with commas between them")
    return patterns


def file(magic: bytes = b"", what: str = "a file") -> Callable[[str], Path]:
    """The type of an existing, readable file with the expected first bytes."""

    def parse(text: str) -> Path:
        place = Path(path(text))
        try:
            with open(place, "rb") as opened:
                begin = opened.read(len(magic))
        except OSError as error:
            raise argparse.ArgumentTypeError(f"{text}: {error.strerror}; {what} was expected") from None
        if begin != magic:
            raise argparse.ArgumentTypeError(f"{text}: it does not begin as {what} does")
        return place.absolute()

    return parse
