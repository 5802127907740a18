"""The machine, the versions and the commit behind a measurement, as one dict that every result file carries."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
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
    """The commit the tree stands on, with "-dirty" if tracked files differ from it; "unknown" without git."""
    head = _git("rev-parse", "HEAD")
    return (head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")) or "unknown"


def load() -> float:
    """Runnable processes over the last minute: above the number of cores, timings are disturbed."""
    return round(os.getloadavg()[0], 2)


def machine() -> dict:
    """CPU, memory (GB), threads, GPUs, versions, load and date. Strings, numbers, lists and dicts of them."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return environment.machine() | {"threads": torch.get_num_threads(), "load": load(), "date": now}


if __name__ == "__main__":
    print(json.dumps({**machine(), "commit": commit()}, indent=2))
