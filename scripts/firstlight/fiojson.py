"""The JSON that fio writes with --output-format=json+, from the kernel's records; our own figures under one key, `firstlight`.

Members that fio's tools read have the same meaning as in fio. Values that this kernel does not measure appear only where the tools need
them, as fio writes them without a sample, and are listed in `firstlight.not_measured`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import paths
from .problems import Exit, Problem

PER_IO = ("device_accesses", "hypercalls", "notifications", "interrupts", "allocations", "sleeps")
# slat: submission and completion are not measured separately, so clat equals lat. fio samples bandwidth and rate twice a second.
NOT_MEASURED = ("slat_ns", "clat_ns apart from lat_ns", "bw_* and iops_* samples", "usr_cpu", "sys_cpu")

# fio's latency classes: per cent of the I/Os shorter than the limit, and not shorter than the previous one.
CLASSES = (2, 4, 10, 20, 50, 100, 250, 500, 750, 1000)
LAST_BIN = 17112760320  # the middle of fio's last bin: everything from 17 s on


def total_ios(result: dict) -> int:
    return result["read"]["ios"] + result["write"]["ios"]


def per_io(result: dict, what: str) -> float:
    return result[what] / max(1, total_ios(result))


def bucket(index: int) -> tuple[int, int]:
    """The smallest and the largest nanoseconds of a bucket of io.histogram: 128 buckets per power of two."""
    if index < 256:
        return index, index
    shift = (index >> 7) - 1
    low = (128 + index % 128) << shift
    return low, low + (1 << shift) - 1


def fio_bin(ns: int) -> int:
    """json+'s name of this latency's bin: its middle. fio has 64 bins per power of two, so each consists of whole buckets of ours."""
    if ns < 128:
        return ns
    shift = ns.bit_length() - 7
    return min((ns >> shift << shift) + (1 << shift - 1), LAST_BIN)


def bins(buckets: Mapping[int, int]) -> dict[str, int]:
    found: dict[int, int] = {}
    for index, count in sorted(buckets.items()):
        middle = fio_bin(bucket(index)[0])
        found[middle] = found.get(middle, 0) + count
    return {str(middle): count for middle, count in found.items()}


def classes(*directions: Mapping[int, int]) -> dict[str, dict[str, float]]:
    """latency_ns, latency_us and latency_ms of all I/Os. A bucket that crosses a limit is counted by its middle."""
    total = sum(sum(buckets.values()) for buckets in directions) or 1
    found = {
        "latency_ns": dict.fromkeys(map(str, CLASSES), 0.0),
        "latency_us": dict.fromkeys(map(str, CLASSES), 0.0),
        "latency_ms": dict.fromkeys([*map(str, CLASSES), "2000", ">=2000"], 0.0),
    }
    for buckets in directions:
        for index, count in buckets.items():
            ns = sum(bucket(index)) // 2
            unit, value = ("ns", ns) if ns < 1000 else ("us", ns // 1000) if ns < 1000000 else ("ms", ns // 1000000)
            limit = next((limit for limit in (*CLASSES, 2000) if value < limit), None)
            found[f"latency_{unit}"][str(limit) if limit else ">=2000"] += 100 * count / total
    return {unit: {limit: round(share, 6) for limit, share in shares.items()} for unit, shares in found.items()}


def latencies(part: Mapping) -> dict:
    """A direction's lat_ns; like fio without percentiles and bins if there are no samples."""
    found = dict(part.get("lat_ns") or {})
    buckets = found.pop("buckets", {})
    if not part["ios"]:
        return {"min": 0, "max": 0, "mean": 0.0, "stddev": 0.0, "N": 0}
    return {
        "min": found["min"], "max": found["max"], "mean": float(found["mean"]), "stddev": float(found["stddev"]), "N": found["N"],
        "percentile": found["percentile"], "bins": bins(buckets),
    }  # fmt: skip


def direction(result: dict, name: str) -> dict:
    """One of fio's `read`, `write` and `trim` members. fio's bw is in KiB/s, its runtime in ms."""
    part = result.get(name) or {"ios": 0, "bytes": 0}
    seconds = result["runtime_ns"] / 1e9
    ios = part["ios"]
    measured = bool(seconds and ios)
    latency = latencies(part)
    none = {"min": 0, "max": 0, "mean": 0.0, "stddev": 0.0, "N": 0}
    return {
        "io_bytes": part["bytes"],
        "io_kbytes": part["bytes"] // 1024,
        "bw_bytes": round(part["bytes"] / seconds) if measured else 0,
        "bw": round(part["bytes"] / seconds / 1024) if measured else 0,
        "iops": ios / seconds if measured else 0.0,
        "runtime": round(seconds * 1000) if ios else 0,
        "total_ios": ios,
        "short_ios": 0,  # the kernel counts an I/O of the wrong length as failed
        "drop_ios": 0,
        "slat_ns": none,
        "clat_ns": latency,
        "lat_ns": latency,
        "bw_min": 0,
        "bw_max": 0,
        "bw_agg": 0.0,
        "bw_mean": 0.0,
        "bw_dev": 0.0,
        "bw_samples": 0,
        "iops_min": 0,
        "iops_max": 0,
        "iops_mean": 0.0,
        "iops_stddev": 0.0,
        "iops_samples": 0,
    }


def size_word(size: int) -> str:
    """A size as it is typed for fio."""
    return f"{size // 1024}k" if size % 1024 == 0 else str(size)


def job(result: dict, context: dict) -> dict:
    """`context`: platform, boot, vm_guest, mode, of the test host io."""
    mix = {"rwmixread": str(result["mix"])} if result["workload"] == "randrw" else {}
    wait = result.get("wait", "interrupt")
    io = context.get("io", "inline")
    return {
        "jobname": f"{result['disk']}-{result['workload']}-{size_word(result['bs'])}-qd{result['qd']}" + (f"-{wait}" if wait != "interrupt" else "") + (f"-{io}" if io != "inline" else ""),
        "groupid": 0,
        "error": result["errors"],
        "elapsed": max(1, round(result["runtime_ns"] / 1e9)),
        "job options": {
            "name": result["workload"],
            "filename": result["disk"],
            "rw": result["workload"],
            "bs": size_word(result["bs"]),
            "iodepth": str(result["qd"]),
            "numjobs": str(result.get("lanes", 1)),
            "number_ios": str(result["count"]),
            "randseed": str(result["seed"]),
            **mix,
        },
        "read": direction(result, "read"),
        "write": direction(result, "write"),
        "trim": direction(result, "trim"),
        "job_runtime": round(result["runtime_ns"] / 1e6),
        "usr_cpu": 0.0,
        "sys_cpu": 0.0,
        **classes(*((result.get(name) or {}).get("lat_ns", {}).get("buckets", {}) for name in ("read", "write"))),
        "firstlight": {
            **context,
            "disk": result["disk"],
            "driver": result["driver"],
            "kind": result["kind"],
            "runtime_ns": result["runtime_ns"],
            **{f"{what}_per_io": per_io(result, what) for what in PER_IO},
            "wait": wait,
            **({"busy_ns_per_io": per_io(result, "busy_ns"), "busy_share": result["busy_ns"] / max(1, result["runtime_ns"] * result.get("lanes", 1))} if "busy_ns" in result else {}),
            **({"stolen_ns": result["stolen_ns"]} if "stolen_ns" in result else {}),
            "exits_per_io": per_io(result, "exits") if "exits" in result else None,
            "not_measured": list(NOT_MEASURED),
        },
    }


def document(jobs: Sequence[dict]) -> dict:
    now = time.time()
    return {
        "fio version": "firstlight",
        "timestamp": int(now),
        "timestamp_ms": int(now * 1000),
        "time": time.strftime("%a %b %e %H:%M:%S %Y", time.localtime(now)),
        "global options": {},
        "jobs": list(jobs),
    }


def write(path: Path, jobs: Sequence[dict]) -> None:
    paths.write_whole(path, json.dumps(document(jobs), indent=2) + "\n")


def demand_folder(folder: Path) -> None:
    """A new or an empty folder: fio-plot reads every file in it as a result."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Problem(f"--json-dir {folder}: a new or empty folder was expected, so that no older result is among the new ones.", Exit.USAGE)
    if not folder.parent.is_dir():
        raise Problem(f"--json-dir {folder}: the folder {folder.parent} does not exist.", Exit.USAGE)
    if not os.access(folder if folder.is_dir() else folder.parent, os.W_OK | os.X_OK):
        raise Problem(f"--json-dir {folder}: {paths.name_of(os.geteuid())} may not write there.", Exit.USAGE)


def place(job: dict) -> Path:
    """Path of a job's own file, as fio-plot's bench-fio uses it: TARGET[/RWMIX]/BS/RW-IODEPTH-NUMJOBS.json."""
    extra, options = job["firstlight"], job["job options"]
    mix = [f"{options['rw']}{options['rwmixread']}"] if "rwmixread" in options else []
    name = "-".join((options["rw"], options["iodepth"], options["numjobs"]))
    setting = f"-{extra['setting']}" if "setting" in extra else ""
    waits = f"-{extra['wait']}" if extra.get("wait", "interrupt") != "interrupt" else ""
    ios = f"-{extra['io']}" if extra.get("io", "inline") != "inline" else ""
    return Path(f"{extra['platform']}-{extra['disk']}-{extra['driver']}{setting}{waits}{ios}", *mix, options["bs"], f"{name}.json")


def write_folder(folder: Path, jobs: Sequence[dict]) -> None:
    """One file per job: fio-plot looks only at the first job of a file."""
    for job in jobs:
        path = folder / place(job)
        if path.exists():
            raise Problem(f"--json-dir: two results have the name {path}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, [job])
