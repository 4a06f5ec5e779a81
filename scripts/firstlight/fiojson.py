"""The JSON that fio writes, from the kernel's `result` records; our own figures under one key, `firstlight`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

PER_IO = ("device_accesses", "hypercalls", "notifications", "interrupts", "allocations")


def total_ios(result: dict) -> int:
    return result["read"]["ios"] + result["write"]["ios"]


def per_io(result: dict, what: str) -> float:
    return result[what] / max(1, total_ios(result))


def direction(result: dict, name: str) -> dict:
    """One of fio's `read` and `write` members. fio's bw is in KiB/s, its runtime in ms."""
    part = result[name]
    seconds = result["runtime_ns"] / 1e9
    ios = part["ios"]
    rate = ios / seconds if seconds and ios else 0.0
    latency = part.get("lat_ns") or {}
    empty = {"min": 0, "max": 0, "mean": 0.0, "stddev": 0.0, "N": 0, "percentile": {}}
    return {
        "io_bytes": part["bytes"],
        "io_kbytes": part["bytes"] // 1024,
        "bw_bytes": round(part["bytes"] / seconds) if seconds and ios else 0,
        "bw": round(part["bytes"] / seconds / 1024) if seconds and ios else 0,
        "iops": rate,
        "runtime": round(seconds * 1000) if ios else 0,
        "total_ios": ios,
        "lat_ns": {**empty, **latency},
        "clat_ns": {**empty, **latency},
    }


def job(result: dict, context: dict) -> dict:
    """`context`: platform, boot, vm_guest, mode."""
    return {
        "jobname": f"{result['disk']}-{result['workload']}-{result['bs'] // 1024}k-qd{result['qd']}",
        "groupid": 0,
        "error": result["errors"],
        "job options": {
            "name": result["workload"],
            "filename": result["disk"],
            "rw": {"mixed": "randrw"}.get(result["workload"], result["workload"]),
            "bs": str(result["bs"]),
            "iodepth": str(result["qd"]),
            "number_ios": str(result["count"]),
            "randseed": str(result["seed"]),
        },
        "read": direction(result, "read"),
        "write": direction(result, "write"),
        "firstlight": {
            **context,
            "disk": result["disk"],
            "driver": result["driver"],
            "kind": result["kind"],
            "runtime_ns": result["runtime_ns"],
            **{f"{what}_per_io": per_io(result, what) for what in PER_IO},
            "exits_per_io": per_io(result, "exits") if "exits" in result else None,
        },
    }


def document(jobs: Sequence[dict]) -> dict:
    now = time.time()
    return {
        "fio version": "firstlight",
        "timestamp": int(now),
        "timestamp_ms": int(now * 1000),
        "time": time.strftime("%a %b %e %H:%M:%S %Y", time.localtime(now)),
        "jobs": list(jobs),
    }


def write(path: Path, jobs: Sequence[dict]) -> None:
    path.write_text(json.dumps(document(jobs), indent=2) + "\n")
