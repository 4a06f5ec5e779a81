"""Tests the pages of scripts/bench --html in a browser: its messages, every figure, and that nothing is cut off at a phone's, a screen's and a sheet's width."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import comparison, counts, page, paths, process, report
from .problems import Exit, Problem
from .vmtests import Result, wreck

SUITE = "browser"
BROWSERS = ("chromium-headless-shell", "chromium")
SECONDS = 120  # for a start of the browser: a second on an idle machine
JOBS = paths.REPOSITORY / "test" / "scripts" / "page-jobs.json"  # figures made up for the test, in the form of --json
SHEET = 703  # pixels of CSS, 96 to the inch: A4 less the page's margins of 12 mm
VIEWS = (("phone", 400), ("screen", 1280), ("sheet", SHEET), ("dark", 1280))
CONTRAST = 4.5  # least, of text [WCAG 2.2, 1.4.3]
FACTORS = (1.0, 1.01, 0.99, 1.1, 0.9, 1.005, 0.995, 1.0)  # one run to several, some of them far off
QUICKER = 1.3  # the second file's first row

# Runs in the page at the end. Writes what it finds into an element, which --dump-dom shows.
PROBE = """<script>
(() => {
  const wide = document.documentElement.clientWidth, cut = [], pale = [], over = [];
  const luminance = text => { const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const paper = luminance(getComputedStyle(document.body).backgroundColor);
  for (const one of document.body.querySelectorAll("*")) {
    const box = one.getBoundingClientRect(), name = one.tagName + " " + one.textContent.trim().slice(0, 40);
    if (!["TITLE", "title", "SCRIPT"].includes(one.tagName) && (box.right > wide + 1 || box.left < -1) && (SHEET || !one.closest(".scroll"))) cut.push(name);
    if ([...one.childNodes].some(node => node.nodeType === 3 && node.data.trim()) && !["title", "SCRIPT"].includes(one.tagName)) {
      const style = getComputedStyle(one), ink = luminance(one.tagName === "text" ? style.fill : style.color);
      const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
      if (ratio < CONTRAST) pale.push(name + " " + ratio.toFixed(2));
    }
  }
  for (const plot of document.querySelectorAll("svg")) {
    const boxes = [...plot.querySelectorAll("text")].map(one => [one.textContent, one.getBoundingClientRect()]);
    boxes.forEach(([text, a], at) => boxes.slice(at + 1).forEach(([other, b]) => { if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) over.push(text + " and " + other); }));
  }
  const found = { width: innerWidth, scroll: document.documentElement.scrollWidth, cut, pale, over, text: document.body.innerText, titles: [...document.querySelectorAll("title")].map(one => one.textContent).join("\\n") };
  const shown = document.createElement("pre"); shown.id = "probe"; shown.textContent = JSON.stringify(found); document.body.append(shown);
})();
</script></body>"""


def browser() -> str:
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    raise Problem("Ubuntu's chromium is a snap, which containers cannot have; on Debian scripts/setup installs chromium-headless-shell.", Exit.SKIP)


def run(words: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    root = ("--no-sandbox",) if os.geteuid() == 0 else ()  # Chromium refuses root otherwise
    command = [browser(), *root, "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage", "--no-first-run", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", *words]
    return process.run(command, timeout=SECONDS, stderr=subprocess.PIPE, what="the browser")


def messages(said: str) -> list[str]:
    """Those of the page, not of the browser about its machine."""
    return re.findall(r"^\[[^\]]*CONSOLE[^\]]*\] (.*)$", said, re.M)


def as_view(text: str, view: str) -> str:
    """The page with the rules of a medium that cannot be chosen by an option."""
    if view == "sheet":
        text = text.replace("@media print", "@media all")
    if view == "dark":
        text = text.replace("@media (prefers-color-scheme: dark)", "@media all")
    return text.replace("</body>", PROBE.replace("SHEET", "true" if view == "sheet" else "false").replace("CONTRAST", str(CONTRAST)))


def examined(text: str, view: str, width: int, folder: Path) -> tuple[dict, list[str]]:
    file = folder / f"{view}.html"
    file.write_text(as_view(text, view))
    done = run(["--dump-dom", f"--window-size={width},1000", file.as_uri()], folder)
    match = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    if not match:
        raise Problem(f"{view}: the page's end was not reached; messages: {messages(done.stderr)}")
    return json.loads(html.unescape(match[1])), messages(done.stderr)


def figures(jobs: Sequence[dict]) -> list[str]:
    """What a page claims to show of these jobs."""
    found = []
    for job in jobs:
        row = page.table_rows([job])[0]
        found += [report.title(job), report.driver(job), row["iops"], row["p50"], row["p99"], *row["counts"]]
        cost = job["firstlight"].get("instructions_per_io") or {}
        found += [f"{page.PARTIES[party]} {cost[party]:.0f}" for party in counts.PARTIES if cost]
        found += [f"{name} {version}" for name, version in job["firstlight"].get("versions", {}).items()]
    return list(dict.fromkeys(found))


def faults(text: str, wanted: Sequence[str], folder: Path) -> str:
    for view, width in VIEWS:
        found, said = examined(text, view, width, folder)
        if said:
            return f"{view}: the page's messages: {'; '.join(said)}"
        if found["width"] != width:
            return f"{view}: the window is {found['width']} wide, {width} expected"
        if found["scroll"] > width or found["cut"]:
            return f"{view}: {found['scroll']} pixels wide of {width}; cut off: {'; '.join(found['cut'][:5])}"
        if found["pale"]:
            return f"{view}: contrast below {CONTRAST}: {'; '.join(found['pale'][:5])}"
        if found["over"]:
            return f"{view}: labels overlap: {'; '.join(found['over'][:5])}"
        shown = " ".join(found["text"].split())
        if missing := [each for each in wanted if " ".join(each.split()) not in shown]:
            return f"{view}: not in the page: {'; '.join(missing[:5])}"
    printed = folder / "page.pdf"
    run([f"--print-to-pdf={printed}", (folder / "screen.html").as_uri()], folder)
    return "" if printed.is_file() and printed.read_bytes().startswith(b"%PDF-") else "no PDF was printed"


def several(job: dict, factor: float = 1.0) -> dict:
    rate = report.iops(job)
    return {**job, "firstlight": {**job["firstlight"], "runs_iops": [rate * factor * each for each in FACTORS]}}


def depths(job: dict) -> list[dict]:
    """The same row at other queue depths, for the curve of --sweep."""
    rate = lambda part, depth: {**part, "iops": part["iops"] * depth / 8}  # noqa: E731
    return [{**job, "read": rate(job["read"], depth), "write": rate(job["write"], depth), "job options": {**job["job options"], "iodepth": str(depth)}} for depth in (2, 4, 16)]


def results(folder: Path) -> str:
    jobs = [several(job) for job in json.loads(JOBS.read_text())["jobs"]]
    jobs += depths(jobs[0])
    shown = [*(job for job in jobs if not page.of_linux(job)), *report.best([job for job in jobs if page.of_linux(job)])]
    return faults(page.render(jobs, "scripts/bench --html out.html", 1), [*figures(shown), "seed 1"], folder)


def difference(folder: Path) -> str:
    jobs = json.loads(JOBS.read_text())["jobs"]
    for name, factor in (("before.json", 1.0), ("after.json", QUICKER)):
        (folder / name).write_text(json.dumps({"jobs": [several(job, factor if at == 0 else 1.0) for at, job in enumerate(jobs)]}))
    comparison.compare(folder / "before.json", folder / "after.json", 1, folder / "out.html", "scripts/bench --compare")
    first = report.iops(jobs[0])
    return faults((folder / "out.html").read_text(), [f"{first:.0f}", f"{first * QUICKER:.0f}", "faster ", *(hash for hash in page.sha256([folder / "before.json", folder / "after.json"]).values())], folder)


def checks() -> Iterable[Result]:
    for name, check in (("results", results), ("comparison", difference)):
        begin = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix="firstlight-browser-") as folder:
                fault = check(Path(folder))
        except Problem as problem:
            skipped = problem.code is Exit.SKIP
            yield Result(f"{SUITE}/{name}", "skipped", time.monotonic() - begin, str(problem)) if skipped else wreck(f"{SUITE}/{name}", problem, time.monotonic() - begin)
            continue
        except Exception as error:
            yield wreck(f"{SUITE}/{name}", error, time.monotonic() - begin)
            continue
        yield Result(f"{SUITE}/{name}", "failed" if fault else "passed", time.monotonic() - begin, fault)
