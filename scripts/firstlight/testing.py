"""scripts/test: builds and tests everything, and reports the results in one table."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import itertools
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from . import browser, build, checks, cost, debugger, fiotools, image, lab, launch, machine, paths, process, scripttests, setup, tidy, unittests, vmtests, workloads
from .options import Conflict, Parser, demand_agreement, name_patterns, place
from .problems import EXIT_HELP, Exit, Problem
from .vmtests import Result

PRESETS = ("host", "asan", "tsan")
UNIT_PRESETS = ("host", "asan")  # presets with the program of the unit tests
OTHER_TESTS = "firstlight_other_tests"  # the target of a preset's other tests
UNIT_LABEL = "unit"  # its tests in ctest
NOT_BUILT = "_NOT_BUILT$"  # what gtest_discover_tests() names a program that was not built
UNIT_SECONDS = 600
CTEST_SECONDS = 600
FUZZ = "fuzz"
FUZZ_TARGETS = ("ahci", "e1000", "net", "nvme", "packets", "pvscsi", "storvsc", "virtio_blk", "virtio_scsi", "virtqueue", "vmbus", "xen_blk", "xen_net", "xen_store")
FUZZ_RUNS = 5000  # per target, after its corpus; the same inputs each time, as far as coverage does not depend on addresses
FUZZ_SECONDS = 240
GDB = "gdb"
MINIMAL = "minimal"  # a kernel without any hypervisor's module
# Symbols that such a kernel must not contain.
FOREIGN = re.compile(r"fl::hv::(xen|kvm|hyperv)::|fl::hv::(Xen|Kvm|HyperV)\b|fl::drivers::(xen_|storvsc|hv_)")
BAR = "=" * 20


def arguments() -> Parser:
    parser = Parser(
        prog="scripts/test",
        description="Build everything and run every test: the scripts' own, checks of the sources (format, commit subjects, links and commands in the documents), clang-tidy, the modules' on this machine (with "
        "sanitizers, with a checker of memory orderings; plain with --fast or --only host), a fixed number of fuzzed inputs, the image, gdb on a machine, fio's tools on what scripts/bench writes, the counted costs of an I/O, a kernel without any hypervisor's module, and the "
        "boots of test/vm/*.toml.",
        epilog="A test that is required and skipped is a failure.\n\n" + paths.CACHE_HELP + "\n\n" + EXIT_HELP,
    )
    parser.add_argument("--fast", action="store_true", help="host tests, checks of the sources, and boots on QEMU's emulated processor only")
    parser.add_argument("--only", type=name_patterns, action="extend", default=[], metavar="PATTERN,…", help="only tests whose name matches one of these (a glob, or a part of it) (default: all)")
    parser.add_argument("--list", action="store_true", help="list the tests of the table and the other suites")
    parser.add_argument("--junit", type=place, metavar="FILE", help="write JUnit XML")
    parser.add_argument("--tap", action="store_true", help="print TAP instead of the table")
    parser.add_argument("--lab", choices=("auto", "always", "never"), default="auto", help="whether the platforms on KVM run nested")
    return parser


CONFLICTS = (
    Conflict(("list", "junit"), "nothing is run"),
    Conflict(("list", "tap"), "nothing is run"),
    Conflict(("list", "lab"), "nothing is run"),
    Conflict(("fast", "lab"), "--lab is for the boots on KVM, which --fast leaves out"),
)


def check(options, cases: list[vmtests.Case], suites: Sequence[str]) -> None:
    """Invalid options are reported here, before anything is fetched, built or run."""
    demand_agreement(options, CONFLICTS)
    left_out = ", without those that --fast leaves out" if options.fast else ""
    for pattern in options.only:
        if not any(wanted(f"vm/{case.name}", [pattern]) for case in cases) and not any(wanted(suite, [pattern], whole=True) for suite in suites):
            raise Problem(f"--only {pattern}: no test has such a name. scripts/test --list shows them{left_out}.", Exit.USAGE)
    if options.junit:
        paths.writable(options.junit, "--junit")
    platforms = [machine.PLATFORMS[name] for name in sorted({case.platform for case in chosen(options, cases)})]
    if "lab" in options.given and not any(platform.kvm for platform in platforms):
        raise Problem(f"--lab {options.lab}: it is for boots on KVM, and --only {' --only '.join(options.only)} names none. Leave out --lab.", Exit.USAGE)
    for platform in platforms:
        launch.place_beforehand(platform, options.lab)
    paths.cache()


def chosen(options, cases: list[vmtests.Case]) -> list[vmtests.Case]:
    """The selected boots."""
    # The name of a suite selects that suite, not the boots whose names contain the word.
    parts = [pattern for pattern in options.only if pattern not in ("scripts", checks.SUITE, *PRESETS, tidy.SUITE, FUZZ, "image", GDB, MINIMAL, fiotools.SUITE, browser.SUITE, cost.SUITE)]
    return [case for case in cases if not options.only or (parts and wanted(f"vm/{case.name}", parts))]


def main(words: list[str]) -> Exit:
    options = arguments().parse_args(words)
    cases = [case for case in vmtests.load() if not options.fast or "fast" in case.groups]
    presets = ("host",) if options.fast else PRESETS
    check(options, cases, ("scripts", checks.SUITE, *presets, "image", GDB, *(() if options.fast else (tidy.SUITE, FUZZ, MINIMAL, fiotools.SUITE, browser.SUITE, cost.SUITE))))
    cases = chosen(options, cases)
    if options.list:
        for case in cases:
            print(f"vm/{case.name:34} {case.platform:10} {case.machine:8} {','.join(case.groups):10} {case.about}")
        slow = [] if options.fast else [tidy.SUITE, *(f"{FUZZ}/{target}" for target in FUZZ_TARGETS), MINIMAL, fiotools.SUITE, browser.SUITE, *(f"{cost.SUITE}/{name}" for name in cost.BOUNDS)]
        print("\n".join(["scripts", *(f"{checks.SUITE}/{name}" for name in checks.CHECKS), *presets, "image", GDB, *slow]))
        return Exit.SUCCESS
    setup.ensure(tests=True)
    results: list[Result] = []
    show = tap if options.tap else row
    boots = Boots(cases, options.lab)

    def add(found: Iterable[Result]) -> None:
        for result in itertools.chain.from_iterable(itertools.chain([each], boots.ready()) for each in found):
            results.append(result)
            show(result, len(results))

    show(None, 0)
    with boots:
        run_suites(options, cases, presets, boots, add)
    return finish(results, options)


def run_suites(options, cases: list[vmtests.Case], presets: Sequence[str], boots: Boots, add: Callable[[Iterable[Result]], None]) -> None:
    """Every suite that was selected. The kernel is built first: then boots in counted time use the processor time that the other steps leave."""
    built = True
    measured = not options.fast and wanted(fiotools.SUITE, options.only, whole=True)
    counted = not options.fast and wanted(cost.SUITE, options.only, whole=True)
    if cases or measured or counted or any(wanted(suite, options.only, whole=True) for suite in ("image", GDB)):
        built = attempt("build/kernel", build.kernel, add)
        if measured or counted or any(machine.PLATFORMS[case.platform].test_host for case in cases):
            built = attempt("build/test-host", build.test_host, add) and built
        if any(case.dom0 for case in cases):
            built = attempt("build/udp-peer", build.udp_peer, add) and built
    if built:
        boots.begin()
    if wanted("scripts", options.only, whole=True):
        add(surviving("scripts", scripttests.run(options.only)))
    if wanted(checks.SUITE, options.only, whole=True):
        add(surviving(checks.SUITE, checks.checks(lambda name: checks.SUITE in options.only or wanted(name, options.only))))
    if built and wanted("image", options.only, whole=True):
        add(surviving("image", image.checks()))
    if built and wanted(GDB, options.only, whole=True):
        add(surviving(GDB, debugger.checks()))
    for preset in presets:
        if wanted(preset, options.only, whole=True):
            # With sanitizers they are the same tests and see more.
            units = preset in UNIT_PRESETS and (preset != "host" or options.fast or bool(options.only))
            add(surviving(preset, host_tests(preset, options.only, units)))
    if not options.fast and wanted(tidy.SUITE, options.only, whole=True):
        if attempt("build/tidy", build.host_modules, add):
            add(surviving(tidy.SUITE, tidy.checks(lambda name: tidy.SUITE in options.only or wanted(name, options.only))))
    if not options.fast and wanted(FUZZ, options.only, whole=True):
        add(surviving(FUZZ, fuzz_tests(options.only)))
    if not options.fast and wanted(MINIMAL, options.only, whole=True):
        add(surviving(MINIMAL, minimal()))
    if not options.fast and wanted(browser.SUITE, options.only, whole=True):
        add(surviving(browser.SUITE, browser.checks()))
    # Boots of the lab, one after the other, use one processor; the boots of the table use the others.
    fio = vmtests.Part(fiotools.SUITE, lambda: surviving(fiotools.SUITE, fiotools.checks()), lab=True)
    counts = vmtests.Part(cost.SUITE, lambda: surviving(cost.SUITE, cost.checks()), counted=True, lab=True)
    add(boots.rest([*([fio] if measured and built else []), *([counts] if counted and built else [])]))


class Boots:
    """The VM tests beside everything else: one result for each case, in spite of any failure."""

    def __init__(self, cases: Sequence[vmtests.Case], forced: str) -> None:
        self.left = {case.name: case for case in cases}
        self.forced = forced
        self.reason: Exception = Problem("The kernel was not built.")
        self.under_way: vmtests.Boots | None = None
        self.end = contextlib.ExitStack()

    def __enter__(self) -> Boots:
        return self

    def __exit__(self, *error) -> None:
        self.end.__exit__(*error)

    def begin(self) -> None:
        """Starts the boots in counted time. The kernel must have been built."""
        self.reason = Problem("It was never run.")
        if not self.left:
            return
        try:
            self.under_way = vmtests.plan(lab.find(), list(self.left.values()), self.forced, lambda text: say(f"vm: {text}"))
        except Exception as error:
            self.reason = error
            return
        self.end.enter_context(self.under_way)
        self.under_way.begin()

    def ready(self) -> Iterable[Result]:
        """The results so far. Never waits."""
        return map(self.named, self.under_way.ready()) if self.under_way else ()

    def rest(self, beside: Sequence[vmtests.Part]) -> Iterable[Result]:
        """All other results, and those of further parts that run beside them, which have their own names."""
        if self.under_way:
            yield from map(self.named, self.under_way.rest(beside))
        else:
            for part in beside:
                yield from part.run()
        for name in list(self.left):
            yield self.named(vmtests.wreck(name, self.reason))

    def named(self, result: Result) -> Result:
        if self.left.pop(result.name, None):
            result.name = f"vm/{result.name}"
        return result


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def wanted(name: str, patterns: list[str], whole: bool = False) -> bool:
    """Whether a test, or with `whole` a suite that may contain matching tests, is selected."""
    if not patterns:
        return True
    if whole:
        return any(fnmatch.fnmatch(name, pattern.split("/")[0]) or ("/" not in pattern and pattern in name) for pattern in patterns)
    return any(workloads.matches(name, pattern) for pattern in patterns)


def attempt(name: str, work: Callable[[], None], add) -> bool:
    begin = time.monotonic()
    try:
        work()
    except Exception as error:
        add([vmtests.wreck(name, error, time.monotonic() - begin)])
        return False
    add([Result(name, "passed", time.monotonic() - begin)])
    return True


def surviving(suite: str, results: Iterable[Result]) -> Iterable[Result]:
    """The results; an exception in a suite is one more result, and the other suites continue."""
    begin = time.monotonic()
    try:
        yield from results
    except Exception as error:
        yield vmtests.wreck(f"{suite}/unfinished", error, time.monotonic() - begin)


def fuzz_tests(only: list[str]) -> Iterable[Result]:
    """Each target over its corpus, and then the same mutations of it every time: without the feedback from
    comparisons, which contains addresses (omit -use_cmp=0 to search for faults).
    """
    begin = time.monotonic()
    try:
        build.preset(FUZZ)
    except Problem as problem:
        yield Result(f"build/{FUZZ}", "failed", time.monotonic() - begin, str(problem))
        return
    yield Result(f"build/{FUZZ}", "passed", time.monotonic() - begin)
    chosen = [target for target in FUZZ_TARGETS if FUZZ in only or wanted(f"{FUZZ}/{target}", only)]
    yield from vmtests.side_by_side([functools.partial(fuzz, target) for target in chosen], os.cpu_count() or 1)


def fuzz(target: str) -> Iterable[Result]:
    begin = time.monotonic()
    corpus = paths.REPOSITORY / "test" / "fuzz" / "corpus" / target
    folder = paths.BUILD / FUZZ / "findings"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as fresh:  # directory for inputs that libFuzzer adds
        try:
            done = process.run(
                [paths.BUILD / FUZZ / "test" / "fuzz" / f"fuzz_{target}", f"-runs={FUZZ_RUNS}", "-seed=1", "-use_cmp=0", "-max_len=1024", "-timeout=20",
                 "-rss_limit_mb=2048", f"-artifact_prefix={folder}/{target}-", fresh, corpus],
                timeout=FUZZ_SECONDS, check=False, what=f"fuzz_{target}",
            )  # fmt: skip
        except Exception as error:  # the other targets continue
            yield vmtests.wreck(f"{FUZZ}/{target}", error, time.monotonic() - begin)
            return
    detail = fuzz_fault(done.returncode, done.stdout)
    yield Result(f"{FUZZ}/{target}", "failed" if detail else "passed", time.monotonic() - begin, detail, done.stdout if detail else "")


def fuzz_fault(status: int, said: str) -> str:
    """The fault of a run of libFuzzer; empty: all inputs were run, including the corpus, and none failed."""
    found = re.search(r"^(?:==\d+==\s*ERROR: (.*)|.*(runtime error: .*))$", said, re.MULTILINE)
    written = re.search(r"Test unit written to (\S+)", said)
    if found or written or status:
        detail = next((text for text in found.groups() if text), "") if found else f"exit status {status}"
        return detail + (f"; the input: {written[1]}" if written else "")
    corpus = re.search(r"^INFO:\s+([1-9]\d*) files found in \S+/corpus/", said, re.MULTILINE)
    if not corpus:
        return "libFuzzer has found no corpus"
    done = re.findall(r"^Done (\d+) runs in \d+ second\(s\)$", said, re.MULTILINE)
    if len(done) != 1 or int(done[0]) < FUZZ_RUNS:
        return f"libFuzzer reports {', '.join(done) or 'no'} runs, not {FUZZ_RUNS}"
    return ""


def minimal() -> Iterable[Result]:
    """The kernel without any hypervisor's module and with the checks that a release image omits: it builds, contains no hypervisor code, and boots as bare."""
    begin = time.monotonic()
    folder = paths.BUILD / MINIMAL
    process.run(
        ["cmake", "--preset", "kernel", "-B", folder, "-DFIRSTLIGHT_HV=bare", "-DFIRSTLIGHT_CHECKS=ON", "-DFIRSTLIGHT_DEBUG=-gline-tables-only"],
        timeout=build.CONFIGURE_SECONDS, cwd=paths.REPOSITORY, what="cmake -DFIRSTLIGHT_HV=bare -DFIRSTLIGHT_CHECKS=ON",
    )  # fmt: skip
    process.run(["cmake", "--build", folder], timeout=build.BUILD_SECONDS, cwd=paths.REPOSITORY, what=f"cmake --build {folder}")
    yield Result(f"build/{MINIMAL}", "passed", time.monotonic() - begin)
    begin = time.monotonic()
    symbols = image.tool("llvm-nm-19", "--demangle", str(folder / "firstlight.debug.elf"))
    foreign = [line for line in symbols.splitlines() if FOREIGN.search(line)]
    detail = f"{len(foreign)} symbols of a hypervisor's module, first: {foreign[0]}" if foreign else ""
    if "fl::boot::kernel_start" not in symbols:
        detail = "the symbols of the image could not be read"
    yield Result(f"{MINIMAL}/symbols", "failed" if detail else "passed", time.monotonic() - begin, detail)
    case = vmtests.Case(
        "boot", output=['"record":"boot".*"backend":"bare"', '"record":"disk".*"name":"hda"', '"record":"first_block","disk":"hda"']
    )
    described = machine.Machine(f"{MINIMAL}-boot", timeout=case.timeout, cmdline=case.cmdline, kernel=folder / "firstlight.elf")
    result = vmtests.judged(case, launch.finished(described, launch.run_here(lab.find(), described, None)))
    result.name = f"{MINIMAL}/boot"
    yield result


def host_tests(preset: str, only: list[str], units: bool) -> Iterable[Result]:
    """One preset: configure, build, ctest, and with `units` the unit tests, many per process, which ctest would start one by one; each test is one result."""
    begin = time.monotonic()
    say(f"build: {preset}")
    try:
        build.preset(preset, target="" if units or preset not in UNIT_PRESETS else OTHER_TESTS)
    except Problem as problem:
        yield Result(f"build/{preset}", "failed", time.monotonic() - begin, str(problem))
        return
    yield Result(f"build/{preset}", "passed", time.monotonic() - begin)
    within = [pattern.partition("/")[2] for pattern in only if pattern.startswith(f"{preset}/")]
    expression = "|".join(re.escape(pattern).replace(r"\*", ".*") for pattern in within)
    count = 0
    for result in itertools.chain(by_ctest(preset, expression), unit_tests(preset, expression) if units else ()):
        count += 1
        yield result
    if not count:
        yield Result(f"{preset}/none", "failed", 0, f"no test of {preset} matches {' '.join(within) or 'anything'}")


def unit_tests(preset: str, expression: str) -> Iterable[Result]:
    program = paths.BUILD / preset / "test" / "firstlight_tests"
    shown = unittests.names(program)
    for result in unittests.run(program, [name for name in shown if re.search(expression, shown[name])], UNIT_SECONDS):
        result.name = f"{preset}/{shown.get(result.name, result.name)}"
        yield result


def by_ctest(preset: str, expression: str) -> Iterable[Result]:
    """Tests that are not unit tests: models, and code that must not compile."""
    report_file = paths.BUILD / preset / "junit.xml"
    report_file.unlink(missing_ok=True)
    command = ["ctest", "--preset", preset, "--output-junit", str(report_file), "-LE", f"^{UNIT_LABEL}$", "-E", NOT_BUILT, "--no-tests=ignore"]
    if expression:
        command += ["-R", expression]
    done = process.run(command, timeout=CTEST_SECONDS, cwd=paths.REPOSITORY, check=False, what=f"ctest --preset {preset}")
    if not report_file.is_file():
        if done.returncode or "No tests were found" not in done.stdout:
            yield Result(f"{preset}/ctest", "failed", 0, f"ctest left no report, exit status {done.returncode}", done.stdout)
        return
    found = list(read_junit(report_file, preset))
    yield from found
    if done.returncode and not any(result.status == "failed" for result in found):
        yield Result(f"{preset}/ctest", "failed", 0, f"exit status {done.returncode}, but no test failed", done.stdout)


def read_junit(path: Path, preset: str) -> Iterable[Result]:
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        output = case.findtext("system-out") or ""
        status = {"run": "passed", "fail": "failed"}.get(case.get("status", ""), "skipped")
        failure = case.find("failure")
        detail = failure.get("message", "") if failure is not None else ""
        if status == "failed":
            detail = f"{detail} {process.tail(output, 6)}".strip()
        # No host test may be skipped silently: what ctest did not run counts as failed unless it reports itself as skipped.
        if status == "skipped" and case.find("skipped") is not None and "SKIP" not in (case.find("skipped").get("message") or "").upper():
            status, detail = "failed", "not run"
        name = (case.get("name") or "").partition("  # GetParam()")[0]  # the parameter's bytes are not readable
        yield Result(f"{preset}/{name}", status, float(case.get("time") or 0), detail, output)


def finish(results: list[Result], options) -> Exit:
    if not results:
        raise Problem(f"No test matches {' '.join(options.only)}. scripts/test --list shows them.", Exit.USAGE)
    count = {status: sum(result.status == status for result in results) for status in ("passed", "failed", "skipped")}
    if options.tap:
        print(f"1..{len(results)}")
    for result in results:
        if result.status == "failed":
            print(f"\n# {BAR} {result.name}")
            print("\n".join("# " + line for line in process.tail(result.output, 30).splitlines()))
    code = Exit.FAILURE if count["failed"] else Exit.SUCCESS
    if options.junit:
        try:
            junit(results, options.junit)
        except OSError as error:
            say(f"scripts/test: --junit {options.junit}: {error}")
            code = code or Exit.ERROR
    print(f"{'# ' if options.tap else ''}{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped")
    return code


def row(result: Result | None, number: int) -> None:
    """The table, a row when its test is done; None begins it. The names come last: the length of the longest is not known yet."""
    if result is None:
        print("result   seconds  test\n-------  -------  ----", flush=True)
    else:
        detail = f": {result.detail}" if result.detail else ""
        print(f"{result.status:7}  {result.seconds:7.2f}  {result.name}{detail}", flush=True)


def tap(result: Result | None, number: int) -> None:
    """The same as TAP, whose plan may be at the end."""
    if result is None:
        print("TAP version 13", flush=True)
        return
    word = "not ok" if result.status == "failed" else "ok"
    print(f"{word} {number} - {result.name}" + (" # SKIP " + result.detail if result.status == "skipped" else ""), flush=True)
    if result.status == "failed":
        # TAP 13's block of diagnostics; a JSON string is a YAML string.
        lines = ["  ---"]
        for name, value in (("message", result.detail), ("severity", "fail" if result.tried else "error"), ("ended_as", result.kind)):
            lines += [f"  {name}: {json.dumps(value)}"] if value else []
        print("\n".join([*lines, "  ..."]), flush=True)


def junit(results: list[Result], path: Path) -> None:
    suite = ElementTree.Element(
        "testsuite",
        name="firstlight",
        tests=str(len(results)),
        failures=str(sum(result.status == "failed" and result.tried for result in results)),
        errors=str(sum(result.status == "failed" and not result.tried for result in results)),
        skipped=str(sum(result.status == "skipped" for result in results)),
    )
    for result in results:
        group, _, name = result.name.partition("/")
        case = ElementTree.SubElement(suite, "testcase", classname=group, name=name or group, time=f"{result.seconds:.3f}")
        if result.status == "failed":
            # JUnit's `error` is a test that could not be run: its machine did not start, its build or its lab failed.
            kind = {"type": result.kind} if result.kind else {}
            ElementTree.SubElement(case, "failure" if result.tried else "error", message=printable(result.detail), **kind)
        elif result.status == "skipped":
            ElementTree.SubElement(case, "skipped", message=printable(result.detail))
        if result.output:
            ElementTree.SubElement(case, "system-out").text = printable(result.output)
    paths.write_whole(path, ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))


def printable(text: str) -> str:
    """Without the control characters that XML cannot contain."""
    return re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd]", "?", text)
