"""The machine, the versions and the commit behind a measurement, as one dict that every result file carries."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import time
from pathlib import Path

import torch

from llmfp4_kernels import environment

ROOT = Path(__file__).resolve().parents[1]


def _git(*arguments: str) -> str:
    """Output of a git command in the repository; "" outside of one."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit() -> str:
    """The commit the tree stands on, "-dirty" if tracked files but results differ from it; "unknown" without git."""
    head = _git("rev-parse", "HEAD")
    return (
        head
        + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results") else "")
    ) or "unknown"


def load() -> float:
    """Runnable processes over the last minute: above the number of cores, timings are disturbed."""
    return round(os.getloadavg()[0], 2)


def cpu_seconds() -> tuple[float, float, float]:
    """(wall clock, what all processes and the host took from this machine's CPUs, what this process took of it)."""
    ticks = list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]))
    idle, waiting = ticks[3:5]
    own = os.times()
    return time.perf_counter(), (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK"), own.user + own.system


def others(before: tuple[float, float, float]) -> float:
    """Mean number of CPUs that others kept busy since `before` = cpu_seconds(): above 0.1, timings are disturbed."""
    wall, busy, own = (now - then for now, then in zip(cpu_seconds(), before))
    return round(max(busy - own, 0.0) / max(wall, 1e-9), 2)


def machine() -> dict:
    """CPU, memory (GB), threads, GPUs, versions, load and date. Strings, numbers, lists and dicts of them."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return environment.machine() | {"threads": torch.get_num_threads(), "load": load(), "date": now}


if __name__ == "__main__":
    print(json.dumps({**machine(), "commit": commit()}, indent=2))
