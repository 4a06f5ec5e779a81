"""apt with a private state: newer packages from the distribution's own mirror, without changes to the machine.

A private folder holds the sources, the lists and the archives. The sources are derived from the machine's own
configuration: the entries of the distribution itself (never a third party's), and the backports besides them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import paths, process
from .problems import Exit, Problem

FRESH_SECONDS = 24 * 3600


@dataclasses.dataclass(frozen=True)
class Source:
    """One entry of sources.list(5): the fields used here."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""


def parse_one_line(text: str) -> list[Source]:
    """The format `deb [option=value …] URI SUITE COMPONENT…`."""
    found = []
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s*([^#]*)", line)
        if not match:
            continue
        options = dict(word.split("=", 1) for word in (match[1] or "").split() if "=" in word)
        found.append(Source((match[2],), (match[3],), tuple(match[4].split()), options.get("signed-by", "")))
    return found


def parse_deb822(text: str) -> list[Source]:
    """The format of *.sources files: paragraphs of `Field: value`, continued by indented lines."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in paragraph.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t") and name:
                fields[name] += "\n" + line
            elif ":" in line:
                name, value = line.split(":", 1)
                name = name.strip().lower()
                fields[name] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false"):
            continue
        found.append(
            Source(
                tuple(fields.get("uris", "").split()),
                tuple(fields.get("suites", "").split()),
                tuple(fields.get("components", "").split()),
                fields.get("signed-by", ""),
            )
        )
    return found


def machine_sources(etc: Path = Path("/etc/apt")) -> list[Source]:
    found: list[Source] = []
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if not path.is_file():
            continue
        text = path.read_text(errors="replace")
        if path.suffix == ".sources":
            found += parse_deb822(text)
        elif path.suffix == ".list":
            found += parse_one_line(text)
    return found


def own_sources(sources: Iterable[Source], codename: str) -> list[Source]:
    """The distribution's own entries. A third party may use the distribution's suite names, but signs with another key."""
    family = re.compile(rf"{re.escape(codename)}(-updates|-security|-backports)?(/updates)?$")
    own = []
    for source in sources:
        suites = tuple(suite for suite in source.suites if family.match(suite))
        foreign = source.signed_by and not re.search(r"(debian|ubuntu)[^/]*archive", source.signed_by)
        if suites and "main" in source.components and not foreign:
            own.append(dataclasses.replace(source, suites=suites))
    if not any(codename in source.suites for source in own):
        raise Problem(
            f"No entry of the distribution itself (suite {codename}, component main) in /etc/apt/sources.list or "
            "sources.list.d. Packages are fetched from the mirror named there: add one.",
            Exit.MISSING,
        )
    return own


def of_suite(own: Iterable[Source], codename: str, suite: str) -> list[Source]:
    """The same entries for another release of the distribution, without the suites that not every release has."""
    found = []
    for source in own:
        suites = tuple(name.replace(codename, suite, 1) for name in source.suites if not name.endswith("-backports"))
        if suites:
            found.append(dataclasses.replace(source, suites=suites))
    return found


def render_sources(own: Iterable[Source], codename: str, backports: bool, components: Sequence[str]) -> str:
    own = list(own)
    if backports and not any(f"{codename}-backports" in source.suites for source in own):
        base = next(source for source in own if codename in source.suites)
        own.append(dataclasses.replace(base, suites=(f"{codename}-backports",)))
    text = ""
    for source in own:
        chosen = [name for name in components if name in source.components]
        text += "Types: deb\nURIs: {}\nSuites: {}\nComponents: {}\n".format(
            " ".join(source.uris), " ".join(source.suites), " ".join(chosen)
        )
        if source.signed_by:
            text += f"Signed-By: {source.signed_by}\n"
        text += "\n"
    return text


class Apt:
    """apt-get and apt-cache with the private state."""

    def __init__(
        self, codename: str, backports: Sequence[str] = (), components: Sequence[str] = ("main",), variant: str = "", suite: str = ""
    ) -> None:
        """`variant`: a separate state besides the usual one; `suite`: another release of the distribution, from the same mirrors."""
        self.root = paths.cache() / "apt" / (f"{codename}-{variant}" if variant else codename)
        self.archives = paths.cache() / "apt" / (suite or codename) / "archives"  # shared by all states: each archive is fetched once
        self.codename = codename
        self.suite = suite
        self.backports = tuple(backports)
        self.components = components

    def options(self) -> list[str]:
        root = self.root
        settings = {
            "Dir::Etc::SourceList": "/dev/null",
            "Dir::Etc::SourceParts": root / "sources",
            "Dir::Etc::Preferences": root / "preferences",
            "Dir::Etc::PreferencesParts": "/dev/null",
            "Dir::State::Lists": root / "lists",
            "Dir::Cache": root,
            "Dir::Cache::Archives": root / "archives",
            # Container images disable these; then each query reads all lists again.
            "Dir::Cache::pkgcache": root / "pkgcache.bin",
            "Dir::Cache::srcpkgcache": "",
            "APT::Sandbox::User": "root",  # the folder may be under a home that apt's own user cannot enter
            "APT::Color": "0",
            "Acquire::Retries": "3",
            "Acquire::http::Timeout": "30",
            "Acquire::Languages": "none",
            "DPkg::Lock::Timeout": "120",
            "APT::Update::Error-Mode": "any",  # otherwise an update that fetched nothing exits with 0
        }
        return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]

    def refresh(self, force: bool = False) -> None:
        """Write the sources and fetch the lists, unless that was done within a day; with `force` in any case.

        The time is stored only after the lists have been checked to exist.
        """
        with process.alone(self.root / "refresh.lock", "package lists"):
            self.refresh_alone(force)

    def refresh_alone(self, force: bool) -> None:
        stamp = self.root / "refreshed"
        for folder in ("sources", "lists/partial", "archives/partial"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        own = own_sources(machine_sources(), self.codename)
        if self.suite:
            own = of_suite(own, self.codename, self.suite)
        sources = render_sources(own, self.suite or self.codename, bool(self.backports), self.components)
        preferences = "".join(
            f"Package: {name}\nPin: release n={self.codename}-backports\nPin-Priority: 900\n\n" for name in self.backports
        )
        stamped = stamp.read_text() if stamp.exists() else ""
        fresh = stamp.exists() and 0 <= time.time() - stamp.stat().st_mtime < FRESH_SECONDS
        if not force and fresh and stamped == sources + preferences and not self.lists_missing():
            return
        paths.write_whole(self.root / "sources" / "distribution.sources", sources)
        paths.write_whole(self.root / "preferences", preferences)
        stamp.unlink(missing_ok=True)
        done = self.get("-qq", "update", timeout=300, check=False, what="apt-get update (private lists)")
        process.demand_room(done.stdout, "the distribution's package lists")
        missing = self.lists_missing()
        if missing or (done.returncode and force):
            raise Problem(
                f"The distribution's package lists could not be fetched: {reason(done.stdout) or f'none for {missing[0]} came'}. "
                "Nothing was stored: with a network, run the same command again.",
                Exit.MISSING,
            )
        if done.returncode:
            print(f"apt: the package lists could not be renewed ({reason(done.stdout)}); the previous ones are used", file=sys.stderr)
            return
        paths.write_whole(stamp, sources + preferences)

    def lists_missing(self) -> list[str]:
        """The required suites of which no list of packages exists."""
        done = self.get("indextargets", "--format", "$(RELEASE) $(FILENAME)", "Created-By: Packages", timeout=60, check=False)
        there = {suite for suite, _, file in (line.partition(" ") for line in done.stdout.splitlines()) if file and os.path.isfile(file)}
        wanted = [self.suite or self.codename, *([f"{self.codename}-backports"] if self.backports else [])]
        return [suite for suite in wanted if suite not in there]

    def get(self, *arguments: str, timeout: float, quiet: bool = True, **options):
        environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive", LC_ALL="C.UTF-8")
        return process.run(
            ["apt-get", *self.options(), *arguments], timeout=timeout, quiet=quiet, env=environment, **options
        )

    def ask(self, *arguments: str) -> str:
        environment = dict(os.environ, LC_ALL="C.UTF-8")
        return process.run(
            ["apt-cache", *self.options(), *arguments], timeout=120, env=environment, what="apt-cache"
        ).stdout

    def candidates(self, names: Iterable[str]) -> dict[str, str]:
        """The version of each package that apt would install. Packages without a candidate are left out."""
        found: dict[str, str] = {}
        name = ""
        for line in self.ask("policy", *names).splitlines():
            if line and not line.startswith(" "):
                name = line.rstrip(":").split(":")[0]
            elif line.startswith("  Candidate: ") and not line.endswith("(none)"):
                found[name] = line.split(": ", 1)[1]
        return found

    def newest(self, pattern: str) -> str:
        """The package with the highest version among those whose whole name matches."""
        names = [name for name in self.ask("pkgnames", pattern.split("[")[0].split("\\")[0]).split() if re.fullmatch(pattern, name)]
        versions = self.candidates(names) if names else {}
        if not versions:
            raise Problem(
                f"No package matches {pattern} on the distribution's mirror. scripts/setup --refresh fetches its lists again; if it no longer has one, "
                "scripts/firstlight/distribution.py must name another.",
                Exit.MISSING,
            )
        return max(versions, key=lambda name: natural(versions[name]))

    def libraries(self, package: str) -> list[str]:
        """Shared library packages that `package` needs, directly or through another library."""
        known: set[str] = set()
        frontier = [package]
        while frontier:
            answer = self.ask("depends", *NARROW, *frontier)
            named = re.findall(r"^ [ |](?:Pre)?Depends: ([a-z0-9.+-]+)$", answer, re.M)
            frontier = sorted({name for name in named if is_library(name)} - known)
            known.update(frontier)
        return sorted(known)

    def download(self, versions: dict[str, str], into: Path) -> list[Path]:
        """Fetch exactly these versions; archives already present are kept."""
        into.mkdir(parents=True, exist_ok=True)
        with process.alone(into / "download.lock", "download"):
            self.download_alone(versions, into)
        found = {name: archive(into, name, version) for name, version in versions.items()}
        absent = [name for name, path in found.items() if not path]
        if absent:
            raise Problem(f"apt-get download left no archive for: {' '.join(absent)}. Look into {into}.")
        return [path for path in found.values() if path]

    def download_alone(self, versions: dict[str, str], into: Path) -> None:
        """An archive gets its final name only when complete. A present one that does not match the lists (truncated, damaged) is fetched again."""
        for left in into.glob("fetching-*"):
            shutil.rmtree(left, ignore_errors=True)
        facts = self.facts(versions)
        missing = {}
        for name, version in versions.items():
            path = archive(into, name, version)
            if path and name in facts and not intact(path, *facts[name]):
                path.unlink()
                path = None
            if not path:
                missing[name] = version
        if not missing:
            return
        paths.demand_space(into, sum(facts[name][0] for name in missing if name in facts) + (8 << 20), "packages")
        with tempfile.TemporaryDirectory(prefix="fetching-", dir=into) as folder:
            words = [f"{name}={version}" for name, version in missing.items()]
            try:
                done = self.get("-qq", "download", *words, timeout=900, cwd=folder, check=False, what="apt-get download")
            finally:
                for path in Path(folder).glob("*.deb"):
                    name = path.name.partition("_")[0]
                    if name in facts and intact(path, *facts[name]):
                        path.rename(into / path.name)
        if done.returncode:
            process.demand_room(done.stdout, "packages")
            raise Problem(f"Packages could not be fetched: {reason(done.stdout)}. Complete files are kept; run the same command again.", Exit.MISSING)

    def facts(self, versions: dict[str, str]) -> dict[str, tuple[int, str]]:
        """Size and SHA-256 of the archives, from the signed lists."""
        found: dict[str, tuple[int, str]] = {}
        for paragraph in self.ask("show", *(f"{name}={version}" for name, version in versions.items())).split("\n\n"):
            fields = dict(re.findall(r"^(Package|Version|Size|SHA256): (\S+)$", paragraph, re.M))
            if versions.get(fields.get("Package", "")) == fields.get("Version") and "Size" in fields and "SHA256" in fields:
                found[fields["Package"]] = (int(fields["Size"]), fields["SHA256"])
        return found


def intact(path: Path, size: int, digest: str) -> bool:
    if path.stat().st_size != size:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def reason(output: str) -> str:
    """apt's error in one line: the first of its errors that names a cause."""
    said = [line[3:].strip() for line in output.splitlines() if line.startswith(("E: ", "W: "))]
    causes = [line for line in said if not line.startswith("Some index files failed") and not line.startswith("Unable to fetch some")]
    return (causes or said or ["apt gave no reason"])[0].rstrip(".")


NARROW = ["--no-recommends", "--no-suggests", "--no-conflicts", "--no-breaks", "--no-replaces", "--no-enhances"]


def is_library(name: str) -> bool:
    return bool(re.fullmatch(r"(lib[a-z0-9.+-]+|zlib1g)", name))


def archive(folder: Path, name: str, version: str) -> Path | None:
    wanted = f"{name}_{version.replace(':', '%3a')}_"
    return next((path for path in folder.glob("*.deb") if path.name.startswith(wanted)), None)


def natural(version: str) -> list[tuple[int, str]]:
    """A sorting key: numbers by value. Sufficient for versions of one package from one archive."""
    return [(int(number), text) for number, text in re.findall(r"(\d+)|(\D+)", version) for number in [number or "-1"]]
