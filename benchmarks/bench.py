"""Measure rivals against each other: correctness first, then A, B, A, B ... on operands that change every call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

CACHE_BYTES = 64 << 20
"""Operands rotate through at least this much memory, so that weights come from beyond the second-level cache."""


@dataclass
class Contender:
    """One way to compute y [m, n] from x [m, k]: several copies of the same weight, to be used in turn."""

    name: str
    calls: list[Callable[[torch.Tensor], torch.Tensor]]
    check: Callable[[torch.Tensor, torch.Tensor], None]
    """check(x, y) raises if y is not what this contender promises for its own operands."""
    x_dtype: torch.dtype = torch.float32
    weight_bytes: int = 0


def copies_for(weight_bytes: int) -> int:
    """How many copies of a weight make up CACHE_BYTES: 1 to 64."""
    return max(1, min(64, -(-CACHE_BYTES // max(weight_bytes, 1))))


def _time(contender: Contender, x: torch.Tensor, budget: float) -> float:
    """Seconds per call over a stretch of at least `budget` seconds."""
    calls, count, started = contender.calls, 0, time.perf_counter()
    while True:
        calls[count % len(calls)](x)
        count += 1
        elapsed = time.perf_counter() - started
        if elapsed >= budget:
            return elapsed / count


def compare(contenders: list[Contender], x: torch.Tensor, *, rounds: int = 9, budget: float = 0.03) -> list[dict]:
    """Rows {name, seconds (median), spread (interquartile / median), ratio to the first contender: median of pairs}.

    Every contender's result is checked before anything is timed; `check` raises for a wrong one.
    """
    inputs = {c.name: x.to(c.x_dtype) for c in contenders}
    with torch.inference_mode():
        for contender in contenders:
            for call in contender.calls:
                contender.check(inputs[contender.name], call(inputs[contender.name]))
        times = {c.name: [] for c in contenders}
        for _ in range(rounds):
            for contender in contenders:
                times[contender.name].append(_time(contender, inputs[contender.name], budget))
    first = times[contenders[0].name]
    rows = []
    for name, measured in times.items():
        quartiles = statistics.quantiles(measured, n=4)
        median = statistics.median(measured)
        ratio = statistics.median(a / b for a, b in zip(first, measured))
        rows.append({"name": name, "seconds": median, "spread": (quartiles[2] - quartiles[0]) / median, "ratio": ratio})
    return rows


def read_bandwidth(megabytes: int = 512) -> float:
    """Bytes/s of summing a large tensor, best of 5, with torch's threads: the roofline of a product with one token."""
    data = torch.ones(megabytes << 17, dtype=torch.int64)
    best = min(_seconds(data.sum) for _ in range(5))
    return data.numel() * 8 / best


def _seconds(call: Callable) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
