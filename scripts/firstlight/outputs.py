"""scripts/outputs: runs the commands shown in docs/OUTPUT.md, and puts their output there."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from . import paths, process
from .options import Conflict, Parser, demand_agreement
from .problems import EXIT_HELP, Exit, Problem
from .workloads import DRIVERS

PAGE = paths.REPOSITORY / "docs" / "OUTPUT.md"
LEFT_OUT = "…"


@dataclasses.dataclass(frozen=True)
class Output:
    command: str
    shorten: Callable[[list[str]], list[str]]
    seconds: float  # maximum


def without(lines: list[str], dropped: Callable[[str], bool]) -> list[str]:
    """The lines, with one mark in place of each run of removed ones."""
    kept: list[str] = []
    for line in lines:
        if not dropped(line):
            kept.append(line)
        elif kept[-1:] != [LEFT_OUT]:
            kept.append(LEFT_OUT)
    return kept


def first_and_last(lines: list[str]) -> list[str]:
    """The first four and the last of the progress lines `[N/M]`."""
    steps = [line for line in lines if re.match(r"\s*\[\d+/\d+\]", line)]
    return without(lines, lambda line: line in steps[4:-1])


def tables(lines: list[str]) -> list[str]:
    """What scripts/bench prints after its last run."""
    return lines[next((at for at, line in enumerate(lines) if line.startswith("platform ")), 0) :]


def whole_suites(lines: list[str]) -> list[str]:
    """The table of scripts/test without the numerous rows: boots, single host tests and single tests of the scripts."""
    return without(lines, lambda line: re.match(r"\w+ +[\d.]+  (vm|host|asan|scripts)/|(vm|build)[: ]", line) is not None)


def without_builds(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith("build")]


OUTPUTS = {
    "run": Output("scripts/run --deterministic", list, 900),
    "xen-emu": Output("scripts/bench --only xen-emu --yardstick", first_and_last, 3600),
    "hyperv": Output("scripts/bench --only hyperv --yardstick", first_and_last, 3600),
    "all": Output("scripts/bench --only all --yardstick --cost", first_and_last, 3600),
    "starts": Output(
        "scripts/bench --only all --disk xen,virtio,vscsi,nvme --yardstick --runs 5 --workload randread,qd=32,count=2000 --workload randwrite,qd=32,count=2000", tables, 7200
    ),
    "microvm": Output("scripts/bench --only microvm --yardstick", first_and_last, 3600),
    "wait": Output(
        "scripts/bench --only all --disk xen,virtio,nvme --workload randread,count=1000 --workload randread,qd=32,count=1000 --wait interrupt,poll,adaptive", first_and_last, 3600
    ),
    "later": Output(
        "scripts/bench --only hyperv --disk scsi --io inline,thread,uring --yardstick --workload randread,count=2000 --workload randwrite,count=2000 "
        "--workload randread,qd=32,count=4000 --workload randwrite,qd=32,count=4000 --workload read,bs=128k,qd=8,count=500", tables, 3600
    ),
    "latency": Output("scripts/bench --only hyperv --disk scsi --io thread,uring --latency exp:100us --yardstick --workload randread,count=1000 --workload randread,qd=32,count=4000", tables, 3600),
    "cost": Output(f"scripts/cost {' '.join(f'--disk {bus}' for bus in DRIVERS)}", without_builds, 1800),
    "test": Output("scripts/test", whole_suites, 7200),
}


def block(name: str) -> re.Pattern[str]:
    """Where a command's output is: the mark, the fence, and the lines between."""
    return re.compile(rf"(^<!-- output of {re.escape(name)} -->\n+```\n)(.*?)(^```$)", re.M | re.S)


def replaced(text: str, name: str, said: str) -> str:
    if len(block(name).findall(text)) != 1:
        raise Problem(f"{PAGE.name}: expected one fenced block behind the line `<!-- output of {name} -->`.", Exit.ERROR)
    if "```" in said:
        raise Problem(f"{OUTPUTS[name].command}: its output has a fence in it and cannot be shown in one.", Exit.ERROR)
    return block(name).sub(lambda found: found[1] + said.rstrip("\n") + "\n" + found[3], text)


def faults(text: str) -> list[str]:
    """Faults of the page: each output must be there once, with its command, and not empty; and no other."""
    found = []
    for name, output in OUTPUTS.items():
        blocks = block(name).findall(text)
        if len(blocks) != 1 or not blocks[0][1].strip():
            found.append(f"docs/OUTPUT.md: {len(blocks)} blocks for {name}, one that is not empty expected; scripts/outputs --only {name} writes it")
        if f"`{output.command}`" not in text:
            found.append(f"docs/OUTPUT.md: `{output.command}`, which {name} is the output of, is not named")
    marked = re.findall(r"^<!-- output of (\S+) -->$", text, re.M)
    return found + [f"docs/OUTPUT.md: scripts/outputs does not know {name}" for name in marked if name not in OUTPUTS]


def shown(text: str) -> str:
    """Without what differs between machines and is of no interest: the home, colours, blanks at the ends."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).replace(str(paths.REPOSITORY) + "/", "")
    return "\n".join(line.rstrip() for line in text.replace(str(Path.home()), "~").splitlines())


def arguments() -> Parser:
    parser = Parser(
        prog="scripts/outputs",
        description="Run the commands that docs/OUTPUT.md shows and put there what they print. A command that fails changes nothing.",
        epilog="It takes as long as the commands do: scripts/bench eight times, scripts/cost and scripts/test once.\n\n" + paths.CACHE_HELP + "\n\n" + EXIT_HELP,
    )
    parser.add_argument("--only", choices=tuple(OUTPUTS), action="append", default=[], help="only this output, several times (default: all)")
    parser.add_argument("--list", action="store_true", help="list the outputs and their commands")
    return parser


CONFLICTS = (Conflict(("only", "list"), "nothing is run"),)


def main(words: list[str]) -> Exit:
    options = arguments().parse_args(words)
    demand_agreement(options, CONFLICTS)
    if options.list:
        for name, output in OUTPUTS.items():
            print(f"{name:10} {output.command}")
        return Exit.SUCCESS
    paths.writable(PAGE, "scripts/outputs")
    for name in options.only or OUTPUTS:
        output = OUTPUTS[name]
        replaced(PAGE.read_text(), name, "")  # checks that the place exists, before the command takes its time
        print(f"{name}: {output.command}", file=sys.stderr, flush=True)
        script, *rest = shlex.split(output.command)
        done = process.run([paths.REPOSITORY / script, *rest], timeout=output.seconds, cwd=paths.REPOSITORY, what=output.command)
        paths.write_whole(PAGE, replaced(PAGE.read_text(), name, "\n".join(output.shorten(shown(done.stdout).splitlines()))))
    return Exit.SUCCESS
