"""Measure contenders against each other: correctness first, then A, B, A, B ... on weights that change every call."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import machine
import torch

from llmfp4_kernels.backends.graphs import GraphTurns
from llmfp4_kernels.errors import BadInput, NoKernel

MOST_COPIES = 128
WARM_UP = 1.0
"""Seconds of first calls after which no more copies join the rotation, beyond four; on a GPU all join."""


@dataclass
class Contender:
    """One way to compute y [m, n] from x [m, k]: copies of the same weight, to be used in turn."""

    name: str
    calls: list[Callable[[torch.Tensor], torch.Tensor]]
    check: Callable[[torch.Tensor, torch.Tensor], None]
    """check(x, y) raises if y is not what this contender promises for its own operands."""
    x_dtype: torch.dtype = torch.float32
    weight_bytes: int = 0
    """Of one copy, scales included."""
    unit: str = "fp32"
    """What multiplies: one of roofline.UNITS, "fp16" or "float"."""
    note: str = ""
    """What a reader must know to compare its times with others'."""
    device: str = "cpu"
    kernel: Callable[[int], str] = lambda m: ""
    """What runs for m rows; asked before these are timed."""


def entrants(makers: dict[str, Callable[[], Contender]]) -> list[Contender]:
    """What the makers make; those that cannot take part are left out with a sentence."""
    made = []
    for name, make in makers.items():
        try:
            made.append(make())
        except (ImportError, NoKernel, BadInput) as error:
            print(f"{name} is left out: {error}", flush=True)
    return made


def last_level_cache() -> int:
    """Bytes of the largest cache that the CPU reports; 64 MiB where it reports none."""
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=64 << 20)


def copies_for(weight_bytes: int, warm: bool = False, device: str = "cpu") -> int:
    """How many copies of a weight exceed the last-level cache: 1 to MOST_COPIES. One, if it is to stay warm.

    256 MB are enough: 40 contenders have 10 GB then. On a GPU, twice the L2 cache.
    """
    on_gpu = device == "cuda"
    exceed = 2 * torch.cuda.get_device_properties(0).L2_cache_size if on_gpu else min(last_level_cache(), 256 << 20)
    return 1 if warm else max(1, min(MOST_COPIES, -(-exceed // max(weight_bytes, 1))))


class CpuTurns:
    """Calls in turn, one after the other."""

    def __init__(self, calls: list[Callable], x: torch.Tensor):
        self.calls, self.x = itertools.cycle(calls), x

    def once(self) -> torch.Tensor:
        return next(self.calls)(self.x)

    def seconds(self, budget: float) -> float:
        count, started = 0, time.perf_counter()
        while True:
            self.once()
            count += 1
            elapsed = time.perf_counter() - started
            if elapsed >= budget:
                return elapsed / count


TURNS = {"cpu": CpuTurns, "cuda": GraphTurns}
"""TURNS[device](calls, x): once() is the result of one more turn, seconds(budget) per call over about `budget`."""


def _checked(contender: Contender, operand: torch.Tensor) -> list[Callable]:
    """The copies to be timed, each called once and its result checked."""
    ready, called = [], 0.0
    for call in contender.calls:
        started = time.perf_counter()
        y = call(operand)
        called += time.perf_counter() - started
        contender.check(operand, y)
        ready.append(call)
        if contender.device == "cpu" and len(ready) >= 4 and called > WARM_UP:
            break
    return ready


def compare(
    contenders: list[Contender],
    x: torch.Tensor,
    *,
    rounds: int = 9,
    budget: float = 0.03,
    beside: Iterable[Callable[[float], None]] = (),
) -> list[dict]:
    """Rows {name, kernel, copies, seconds, spread, times, ratio, ratio_quartiles, others}; `times` has one per round.

    seconds is the median, spread the interquartile range over it, ratio how many times faster than the first contender,
    the median of pairs from the same round, others the CPUs that other processes kept busy meanwhile. Nothing is timed
    before every contender was checked, and each is checked again afterwards; `check` raises for a wrong one. What is
    measured beside them takes part in every round, with the same budget.
    """
    inputs = {(c.x_dtype, c.device): x.to(c.device, c.x_dtype) for c in contenders}
    rows, turns = [], []
    with torch.inference_mode():
        for contender in contenders:
            kernel = contender.kernel(len(x))
            operand = inputs[contender.x_dtype, contender.device]
            ready = _checked(contender, operand)
            rows.append({"name": contender.name, "kernel": kernel, "copies": len(ready), "times": []})
            turns.append(TURNS[contender.device](ready, operand))
        before = machine.cpu_seconds()
        for _ in range(rounds):
            for measure in beside:
                measure(budget)
            for row, turn in zip(rows, turns):
                row["times"].append(turn.seconds(budget))
        others = machine.others(before)
        for contender, turn in zip(contenders, turns):
            contender.check(turn.x, turn.once())
    for row in rows:
        row["others"] = others
        row["seconds"] = statistics.median(row["times"])
        low, _, high = statistics.quantiles(row["times"], n=4)
        row["spread"] = (high - low) / row["seconds"]
        row["ratio_quartiles"] = ratio_quartiles(rows[0], row)
        row["ratio"] = row["ratio_quartiles"][1]
    return rows


def ratio_quartiles(other: dict, row: dict) -> list[float]:
    """Quartiles of how many times faster `row` is than `other`, pair by pair of the same round."""
    return statistics.quantiles([a / b for a, b in zip(other["times"], row["times"])], n=4)
