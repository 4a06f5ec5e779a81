"""The suite `checks` of scripts/test: checks of the sources that need no build.

Each check is a function of a Tree that returns a Finding: one line per fault; none passes. A note says what could not be checked.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import functools
import html
import importlib
import io
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from . import options, outputs, paths, process
from .problems import Exit, Problem
from .vmtests import Result

SUITE = "checks"
SECONDS = 240
SHOWN = 40  # faults found by one check

SOURCES = (".cpp", ".cppm", ".hpp")
FORMATTER = "clang-format-19"
COLUMNS = 120
EXAMPLE = "src/drivers/null.cppm"
EXAMPLE_LINES = 100
ARCHITECTURE = "docs/ARCHITECTURE.md"
QUEUE_HALF_LINES = 300
# A driver's transport and its disk, where they are not disk.cppm and disk.cpp.
QUEUE_HALVES = {"null": ("drivers/null.cppm",), "ata": ("drivers/ata/queue.cppm",), "ahci": ("drivers/ahci/queue.cppm", "drivers/ahci/queue.cpp")}

# Commits up to this one are older than the rule for subjects.
COMMITS_AFTER = "0399b4894583fcf1552e69b6f611a4964e1acffe"
# Later ones, published before this check existed.
COMMITS_ALLOWED = ("7fca064c2cba60207e4c77434b4e1e2d8b50c792",)
SUBJECT = 72
NAME = r"(?:[a-z0-9_]+(?:[./-][a-z0-9_]+)*|[A-Z]{4,})"  # prefix of a module, or of a document such as README
MODULE = re.compile(rf"{NAME}(, {NAME})*")
# Usual first words of a subject that is not an imperative.
NO_VERBS = frozenset(
    "a an the this that these those some any no not all each every what which who where when why how if as it its they we i you is are was were be been has have had "
    "of for from to in on at by with without and or but new more less now also then there".split()
)
ENDINGS = re.compile(r"[a-z]{3,}(ed|ing|ies)|[a-z]+[a-z][bcdfgklmnprtvwxyz]s|[a-z]+(sh|ch|ss|x|t|v|d|g|k|c|n|l|r|z)es")
VERBS = frozenset("need feed seed exceed proceed embed shed bring ring string sing wing spring focus bias alias canvas pass miss press".split())

# Placeholders in paths, as in hv/NAME.cppm.
PLACEHOLDERS = re.compile(r"[A-Z][A-Z_]+|acme|<[a-z]+>|…")
SUFFIXES = (*SOURCES, ".py", ".md", ".toml", ".cmake", ".S", ".ld", ".sh", ".asl", ".txt", ".json", ".svg")
# Written by the build or by the scripts, or on other machines: not part of the repository.
ELSEWHERE = re.compile(r"/|~|build/|.*\.elf$|(result|map|cmdline|xen)\.(json|txt|log)$")


@dataclasses.dataclass
class Finding:
    faults: list[str] = dataclasses.field(default_factory=list)
    note: str = ""


class Tree:
    """The files of the repository: those tracked by git, or, without git (a release's archive), all that are neither hidden nor built."""

    def __init__(self, root: Path = paths.REPOSITORY) -> None:
        self.root = root

    def git(self, *words: str) -> str:
        """git without its ownership check: a checkout in a container may belong to another user."""
        done = process.run(["git", "-c", "safe.directory=*", "-C", self.root, *words], timeout=60, check=False)
        if done.returncode:
            raise Problem(f"git {' '.join(words)}: {process.tail(done.stdout, 2)}.", Exit.ERROR)
        return done.stdout

    @functools.cached_property
    def without_git(self) -> str:
        """Why git cannot be used; empty: it can."""
        if not (self.root / ".git").exists():
            return "this is no git checkout"
        return "" if shutil.which("git") else "git is not installed"

    @functools.cached_property
    def files(self) -> list[str]:
        if self.without_git:
            found = (path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file())
            named = [str(path) for path in found if not any(part == "build" or part == "__pycache__" or (part.startswith(".") and part != ".ci") for part in path.parts[:-1])]
        else:
            named = self.git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
        return sorted({name for name in named if name and (self.root / name).is_file()})

    @functools.cached_property
    def folders(self) -> set[str]:
        return {str(parent) for name in self.files for parent in PurePosixPath(name).parents}

    def of(self, *suffixes: str) -> list[str]:
        return [name for name in self.files if name.endswith(suffixes)]

    def read(self, name: str) -> str:
        return (self.root / name).read_text(encoding="utf-8", errors="replace")


def formatted(tree: Tree) -> Finding:
    """clang-format would change nothing."""
    if not shutil.which(FORMATTER):
        return Finding([f"{FORMATTER} is not installed. Run: sudo apt-get install --no-install-recommends {FORMATTER}, or sudo scripts/setup."])
    names = tree.of(*SOURCES)
    if not names:
        return Finding(["no C++ file was found"])
    done = process.run([FORMATTER, "--dry-run", "--Werror", "--style=file", *names], timeout=SECONDS, check=False, cwd=tree.root, what=FORMATTER)
    faults = re.findall(r"^(\S+:\d+:\d+: error: .*)$", done.stdout, re.M)
    if faults:
        faults.append(f"Run: {FORMATTER} -i {' '.join(sorted({fault.partition(':')[0] for fault in faults}))}")
    if done.returncode and not faults:
        faults = [f"exit status {done.returncode}: {process.tail(done.stdout, 3)}"]
    return Finding(faults)


def columns(tree: Tree) -> Finding:
    """No line of a C++ file is too long: clang-format does not wrap comments."""
    return Finding([
        f"{name}:{number}: {len(line)} columns, at most {COLUMNS} expected"
        for name in tree.of(*SOURCES) for number, line in enumerate(tree.read(name).splitlines(), 1) if len(line) > COLUMNS
    ])  # fmt: skip


def subject_fault(subject: str) -> str:
    """The fault in a commit's subject; empty: none."""
    if len(subject) > SUBJECT:
        return f"{len(subject)} characters, at most {SUBJECT} expected"
    module, colon, text = subject.partition(": ")
    if not colon or not MODULE.fullmatch(module):
        return "`module: imperative` expected, with the module in lower case or the name of a document"
    if text.endswith("."):
        return "ends with a full stop"
    verb = text.split(" ")[0]
    if not re.fullmatch(r"[a-z]+(-[a-z]+)*", verb):
        return f"begins with {verb!r} after the module, a verb in lower case expected"
    if verb in NO_VERBS or (ENDINGS.fullmatch(verb) and verb not in VERBS):
        return f"begins with {verb!r} after the module, an imperative such as `add` or `say` expected"
    return ""


def commits(tree: Tree, after: str = COMMITS_AFTER, allowed: Iterable[str] = COMMITS_ALLOWED) -> Finding:
    """The subjects of the commits since the rule was introduced."""
    if tree.without_git:
        return Finding(note=f"{tree.without_git}: no commits to look at")
    shallow = tree.git("rev-parse", "--is-shallow-repository").strip() == "true"
    try:
        tree.git("merge-base", "--is-ancestor", after, "HEAD")
        span, note = [f"{after}..HEAD"], ""
    except Problem:
        if not shallow:
            return Finding([f"{after}, after which subjects are checked, is not in the history. Set COMMITS_AFTER in {Path(__file__).name}."])
        span, note = ["HEAD"], "a shallow clone: only the commits that it has"
    listed = tree.git("log", "--no-merges", "--format=%H %s", *span, "--").splitlines()
    faults = []
    for line in listed:
        commit, _, subject = line.partition(" ")
        fault = "" if commit in allowed else subject_fault(subject)
        if fault:
            faults.append(f"{commit[:10]} {subject!r}: {fault}. git commit --amend or git rebase -i changes it")
    return Finding(faults, note)


# ---- Markdown


@dataclasses.dataclass
class Page:
    """A parsed Markdown file."""

    prose: list[tuple[int, str]]  # lines outside of fences, code spans blanked out
    spans: list[tuple[int, str]]  # code spans outside of fences
    fences: list[tuple[int, str, list[str]]]  # number of the first line inside, language, lines
    anchors: set[str]


def page(text: str) -> Page:
    found = Page([], [], [], set())
    fence = ""
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        mark = re.match(r" {0,3}(`{3,}|~{3,})\s*([\w+-]*)", line)
        if fence:
            if mark and mark[1].startswith(fence) and not mark[2]:
                fence = ""
            else:
                found.fences[-1][2].append(line)
            continue
        if mark:
            fence = mark[1]
            found.fences.append((number + 1, mark[2], []))
            continue
        for _, code in re.findall(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", line):
            found.spans.append((number, code.strip()))
        heading = re.match(r"#{1,6}\s+(.*?)\s*#*\s*$", line)
        if heading:
            slug = anchor(heading[1])
            found.anchors.add(slug + (f"-{seen[slug]}" if slug in seen else ""))
            seen[slug] = seen.get(slug, 0) + 1
        found.anchors |= set(re.findall(r"<a\s+(?:id|name)=\"([^\"]+)\"", line))
        found.prose.append((number, re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", line)))
    return found


def anchor(heading: str) -> str:
    """A heading's anchor, as GitHub generates it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def links(tree: Tree) -> Finding:
    """Each relative link in *.md refers to an existing file of the repository, and its anchor to a heading."""
    faults = []
    pages = {name: page(tree.read(name)) for name in tree.of(".md")}
    for name, own in pages.items():
        for number, line in own.prose:
            targets = re.findall(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)", line) + re.findall(r"(?:href|src|srcset)=\"([^\"]+)\"", line)
            targets += re.findall(r"^\s*\[[^\]]+\]:\s+(\S+)", line)
            for target in map(html.unescape, targets):
                if re.match(r"[a-z][a-z0-9+.-]*:", target):
                    continue
                file, _, fragment = target.partition("#")
                reached = resolve(PurePosixPath(name).parent, file) if file else name
                if reached not in tree.files and reached not in tree.folders:
                    faults.append(f"{name}:{number}: {target}: there is no {reached}")
                elif fragment and reached in pages and fragment not in pages[reached].anchors:
                    faults.append(f"{name}:{number}: {target}: no heading of {reached} has the anchor #{fragment}")
                elif fragment and reached not in pages:
                    line_of = re.fullmatch(r"L(\d+)", fragment)
                    if not line_of or reached not in tree.files or int(line_of[1]) > len(tree.read(reached).splitlines()):
                        faults.append(f"{name}:{number}: {target}: {reached} has no such place")
    return Finding(faults, "" if pages else "no *.md")


def resolve(folder: PurePosixPath, file: str) -> str:
    parts: list[str] = []
    for part in (folder / file).parts if not file.startswith("/") else PurePosixPath(file[1:]).parts:
        if part == "..":
            if not parts:
                return f"{file}, outside of the repository"
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts) or "."


def named(tree: Tree) -> Finding:
    """Each path in backquotes in *.md that looks like one of this repository's exists, relative to its root, to src/ or to the page, or as a file name."""
    tops = {folder for folder in tree.folders if folder != "." and "/" not in folder} | {folder[4:] for folder in tree.folders if folder.startswith("src/") and folder.count("/") == 1}
    every = sorted({*tree.files, *tree.folders})
    last = {PurePosixPath(name).name for name in every}
    faults = []
    for name in tree.of(".md"):
        beside = str(PurePosixPath(name).parent)
        for number, code in page(tree.read(name)).spans:
            for token in braces(code):
                if not re.fullmatch(r"[\w.<>…*/-]+", token) or ELSEWHERE.match(token):
                    continue
                plain = re.sub(r"/$", "", token)
                if "/" in token and token.split("/")[0] in tops and not token.startswith("scripts/firstlight."):
                    pass
                elif not (plain.endswith(SUFFIXES) and plain not in SUFFIXES):
                    continue
                pattern = PLACEHOLDERS.sub("*", plain)
                if pattern.startswith("*-") or pattern.startswith("*/"):
                    continue  # in one of the reader's folders
                there = [pattern, f"src/{pattern}", f"{beside}/{pattern}"] + ([] if "/" in plain else [f"*/{pattern}"])
                if plain in every or f"src/{plain}" in every or ("/" not in plain and plain in last):
                    continue
                if not any(fnmatch.fnmatchcase(each, one) for one in there for each in every):
                    faults.append(f"{name}:{number}: `{token}`: no such file in the repository")
    return Finding(faults)


def braces(text: str) -> list[str]:
    """a{b,c}d as a shell expands it."""
    found = re.search(r"\{([^{}]*,[^{}]*)\}", text)
    if not found:
        return [text]
    return [whole for each in found[1].split(",") for whole in braces(text[: found.start()] + each + text[found.end() :])]


def commands(tree: Tree) -> Finding:
    """Each call of a script in a block of sh and in backquotes in *.md is accepted by the script's own option declarations."""
    faults = []
    for name in tree.of(".md"):
        own = page(tree.read(name))
        for number, language, lines in own.fences:
            if language in ("sh", "bash", "console"):
                for offset, line in joined(lines):
                    faults += [f"{name}:{number + offset}: {line.strip()}: {fault}" for fault in command_faults(tree, line)]
        for number, code in own.spans:
            # In a sentence a call may name an option without its value and the rest: only its options are checked.
            if re.match(r"(\./)?scripts/[\w-]+( |$)", code):
                script, *rest = code.removeprefix("./").split()
                if "." not in script and script not in tree.folders:
                    fault = unknown_option(tree, script, [word.partition("=")[0] for word in rest if word.startswith("--")])
                    faults += [f"{name}:{number}: `{code}`: {fault}"] if fault else []
    return Finding(faults)


def joined(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Joins lines continued by a backslash."""
    begin, text = 0, ""
    for number, line in enumerate(lines):
        text, begin = (text + line, begin) if text else (line, number)
        if text.endswith("\\"):
            text = text[:-1] + " "
            continue
        yield begin, text
        text = ""
    if text:
        yield begin, text


def command_faults(tree: Tree, line: str) -> list[str]:
    try:
        reader = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=";&|()<>")
        reader.whitespace_split = True
        words = list(reader)
    except ValueError as error:
        return [f"the shell cannot read it: {error}"]
    faults = []
    call: list[str] = []
    for word in [*words, ";"]:
        if not re.fullmatch(r"[;&|()<>]+", word):
            call.append(word)
            continue
        while call and (call[0] in ("sudo", "time", "env") or re.fullmatch(r"\w+=.*", call[0])):
            call.pop(0)
        if call and re.match(r"(\./)?scripts/", call[0]):
            fault = call_fault(tree, call[0].removeprefix("./"), call[1:])
            faults += [fault] if fault else []
        call = []
    return faults


def declared(tree: Tree, script: str):
    """The module that declares a script's options; None: no such script."""
    from .__main__ import COMMANDS

    command = script.removeprefix("scripts/")
    return importlib.import_module(f"firstlight.{COMMANDS[command]}") if script in tree.files and command in COMMANDS else None


def unknown_option(tree: Tree, script: str, words: list[str]) -> str:
    module = declared(tree, script)
    if not module:
        return f"there is no {script}"
    known = {word for action in module.arguments()._actions for word in action.option_strings}
    unknown = [word for word in words if word not in known]
    return f"{script} has no option {unknown[0]}; {script} --help lists them" if unknown else ""


def call_fault(tree: Tree, script: str, words: list[str]) -> str:
    """The error a script would report about its arguments; nothing is run."""
    module = declared(tree, script)
    if not module:
        return f"there is no {script}"
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            chosen = module.arguments().parse_args(words)
            options.demand_agreement(chosen, module.CONFLICTS)
    except SystemExit as ended:
        return "" if not ended.code else (said.getvalue().strip().splitlines() or ["refused"])[-1]
    except (Problem, argparse.ArgumentTypeError) as problem:
        return str(problem)
    return ""


def figures(tree: Tree) -> Finding:
    """The outputs in docs/OUTPUT.md are those known to scripts/outputs, and each figure in README's table of results appears there."""
    page_name = "docs/OUTPUT.md"
    if page_name not in tree.files:
        return Finding([f"there is no {page_name}"])
    shown = tree.read(page_name)
    faults = outputs.faults(shown)
    there = set(re.findall(r"\d+(?:\.\d+)?", shown))
    table = re.search(r"^## Results$(.*?)^## ", tree.read("README.md"), re.M | re.S)
    rows = [line for line in (table[1].splitlines() if table else []) if line.startswith("|") and not re.match(r"\|[-:| ]+$", line)]
    if len(rows) < 2:
        faults.append("README.md: no table under the heading Results")
    for row in rows[1:]:
        for cell in row.strip("|").split("|")[1:]:
            number = re.fullmatch(r"\s*\**([\d,]+(?:\.\d+)?)\**\s*", cell)
            if not number:
                faults.append(f"README.md: {cell.strip()!r} in the table of results is not a number")
            elif number[1].replace(",", "") not in there:
                faults.append(f"README.md: {number[1]} in the table of results is not a figure of {page_name}")
    return Finding(faults)


def example(tree: Tree) -> Finding:
    """The driver that docs/ARCHITECTURE.md gives as the smallest example stays one."""
    if EXAMPLE not in tree.files:
        return Finding([f"there is no {EXAMPLE}"])
    lines = len(tree.read(EXAMPLE).splitlines())
    return Finding([f"{EXAMPLE} has {lines} lines, fewer than {EXAMPLE_LINES} expected: move what every driver needs to io.block_queue"] if lines >= EXAMPLE_LINES else [])


def queue_halves(tree: Tree) -> Finding:
    """The table of the drivers' queue halves has their lines, and none has more than QUEUE_HALF_LINES."""
    table = re.search(r"^\| driver \| lines of the queue half .*\n((?:\|.*\n)+)", tree.read(ARCHITECTURE) if ARCHITECTURE in tree.files else "", re.M)
    if not table:
        return Finding([f"{ARCHITECTURE}: no table of the drivers' queue halves"])
    faults: list[str] = []
    for driver, said, ring in re.findall(r"^\| `(\w+)` \| (\d+)(?: \+ (\d+))? \|", table[1], re.M):
        names = [f"src/{name}" for name in QUEUE_HALVES.get(driver, (f"drivers/{driver}/disk.cppm", f"drivers/{driver}/disk.cpp"))]
        rings = [f"src/drivers/{driver}/queue.cppm"] if ring else []
        missing = [name for name in names + rings if name not in tree.files]
        if missing:
            faults.append(f"{ARCHITECTURE}: the queue half of {driver}: there is no {missing[0]}")
            continue
        lines, ring_lines = (sum(len(tree.read(name).splitlines()) for name in each) for each in (names, rings))
        if lines > QUEUE_HALF_LINES:
            faults.append(f"{names[0]}: the queue half of {driver} has {lines} lines, at most {QUEUE_HALF_LINES} expected: move what is not its protocol into a module of its own")
        if lines != int(said) or ring_lines != int(ring or 0):
            faults.append(f"{ARCHITECTURE}: {driver} has {lines}{f' + {ring_lines}' if rings else ''} lines in its queue half, the table says {said}{f' + {ring}' if ring else ''}")
    return Finding(faults)


CHECKS: dict[str, Callable[[Tree], Finding]] = {
    "format": formatted, "columns": columns, "commits": commits, "links": links, "paths": named, "commands": commands, "figures": figures, "example": example,
    "queue-halves": queue_halves,
}  # fmt: skip


def checks(wanted: Callable[[str], bool] = lambda name: True, tree: Tree | None = None) -> Iterable[Result]:
    tree = tree or Tree()
    for short, check in CHECKS.items():
        name = f"{SUITE}/{short}"
        if not wanted(name):
            continue
        begin = time.monotonic()
        found = check(tree)
        took = time.monotonic() - begin
        if found.faults:
            more = f" (and {len(found.faults) - 1} more)" if len(found.faults) > 1 else ""
            cut = [f"… and {len(found.faults) - SHOWN} more"] if len(found.faults) > SHOWN else []
            yield Result(name, "failed", took, found.faults[0] + more, "\n".join([*found.faults[:SHOWN], *cut]))
        else:
            yield Result(name, "passed", took, found.note)
