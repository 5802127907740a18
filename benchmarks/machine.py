"""The machine, the versions and the commit behind a measurement, as one dict that every result file carries."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16")


def _proc(path: str, key: str) -> str:
    """The first value of `key` in a file of "key : value" lines under /proc; "" where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), "")


def _git(*arguments: str) -> str:
    """Output of a git command in the repository; "" outside of one."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit() -> str:
    """The commit the tree stands on, with "-dirty" if tracked files differ from it; "unknown" without git."""
    head = _git("rev-parse", "HEAD")
    return (head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")) or "unknown"


def load() -> float:
    """Runnable processes over the last minute: above the number of cores, timings are disturbed."""
    return round(os.getloadavg()[0], 2)


def machine() -> dict:
    """CPU, memory (GB), threads, GPUs, versions and date. Strings, numbers and lists only."""
    import torch
    import transformers

    kilobytes = _proc("/proc/meminfo", "MemTotal").removesuffix("kB").strip()
    flags = set(_proc("/proc/cpuinfo", "flags").split())
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {
        "cpu": _proc("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(int(kilobytes) / 1e6, 1) if kilobytes else None,
        "load": load(),
        "gpus": [torch.cuda.get_device_name(i) for i in gpus],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    import json

    print(json.dumps({**machine(), "commit": commit()}, indent=2))
