"""Measures tiles for one product on the GPU that is here: a few, each checked against the reference before it is timed.

First every tile with its own splits, then other splits of the two fastest, then the fastest in turn with the guess.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import NoKernel
from ...problem import Problem
from ..graphs import Stopwatch
from . import configs, fp8, machine, refusal
from .configs import Config
from .form import Form
from .judge import Judge, random_weight
from .prepared import Prepared
from .tuned import Row

FINALISTS, ROUNDS, BUDGET = 4, 5, 0.01
"""Tiles that are timed in turn, how often, and seconds of each timing."""
REGISTERS = 128
"""Sums that a thread may hold: half of its registers."""


def tiles(form: Form, m: int, capability: tuple[int, int], version: tuple[int, int]) -> list[Config]:
    """Tiles worth trying, of one split, small ones first."""
    unfenced = configs.unfenced(capability, version)
    if form.kernel == "gemv":
        least = fp8.LEAST_TOKENS if form.fp8 and capability in fp8.WARPGROUP else 8
        tokens, depths = [least if m <= least else configs.GEMV_TOKENS], ((64, 6), (128, 4), (256, 3))
        shares = ((32, 2), (64, 2), (128, 2)) if unfenced else ((32, 2), (64, 2), (64, 4), (128, 8))
    else:
        tokens, depths = [t for t in (32, 64, 128) if t == 32 or t < 2 * m], ((64, 4), (128, 3))
        shares = ((32, 2), (64, 2)) if unfenced else ((64, 4), (128, 8), (128, 4))
    sums = 2 * (2 if form.fp8 else form.planes)  # of 8-bit floats, a step's beside all steps'
    made = [
        Config(rows, count, block_k, warps, stages, splits=1)
        for count in tokens
        for rows, warps in shares
        if rows * count * sums <= REGISTERS * 32 * warps
        for block_k, stages in depths
    ]
    return [config for config in made if configs.refusal(config, form, capability, version) is None]


@dataclass
class Timed:
    config: Config
    calls: list
    """call(y), one for each copy of the weight."""
    seconds: float


class Tuning:
    """One problem in any tile. Raises NoKernel where no row of ours takes it."""

    def __init__(self, problem: Problem, watch: Stopwatch, device: torch.device, limit_s: float):
        names = [name for name in ("gemv", "gemm") if refusal(name, problem) is None]
        if not names:
            raise NoKernel(f"no Triton kernel to tune: {refusal('gemm', problem)}")
        self.form, self.m, self.watch = Form.of(names[0], problem), problem.m, watch
        self.deadline = time.perf_counter() + limit_s
        self.limits = machine.here.capability(device.index), machine.version()
        self.multiprocessors = machine.here.multiprocessors(device)
        packed, g = random_weight(problem), torch.Generator().manual_seed(1)
        x = torch.randn(problem.m, problem.k, generator=g).to(problem.dtype)
        self.judge, prepared = Judge(packed, x), Prepared(packed.to(device), None)
        self.operands, self.x_scale = prepared.activations(x.to(device))
        self.y = torch.empty(problem.m, problem.n, dtype=x.dtype, device=device)
        self.weights = [prepared, *(_elsewhere(prepared) for _ in range(watch.copies(prepared.codes.numel()) - 1))]
        self.asked: set[Config] = set()
        self.timed: list[Timed] = []
        self.left_out: list[tuple[Config, str]] = []

    def time(self, config: Config) -> None:
        """Checks, then times. Raises NoKernel for wrong results, TritonError or RuntimeError for what cannot run."""
        self.asked.add(config)
        calls = [functools.partial(w.multiply, config, self.operands, self.x_scale) for w in self.weights]
        self.y.fill_(float("nan"))
        calls[0](self.y)
        self.watch.wait()
        self.judge(self.y)
        self.timed.append(Timed(config, calls, self.watch.turns(calls, self.y).seconds(BUDGET)))

    def try_each(self, candidates: list[Config]) -> None:
        """Times those that are new and run, until time is up; of the others `left_out` says why."""
        from triton.runtime.errors import TritonError

        for config in candidates:
            if config in self.asked or configs.refusal(config, self.form, *self.limits):
                continue
            self.asked.add(config)
            if time.perf_counter() > self.deadline:
                continue
            try:
                self.time(config)
            except (TritonError, RuntimeError) as error:
                self.watch.wait()  # what broke the GPU itself is raised here
                self.left_out.append((config, f"{type(error).__name__}: {str(error).splitlines()[0]}"))

    def shared(self, config: Config, times: float = 1) -> Config:
        """With `times` as many splits as configs.py gives it."""
        own = times * configs.splits(config, self.form, self.m, self.multiprocessors)
        return dataclasses.replace(config, splits=max(1, min(round(own), configs.steps(config, self.form.k))))

    def fastest(self, count: int) -> list[Timed]:
        return sorted(self.timed, key=lambda timed: timed.seconds)[:count]

    def in_turn(self, finalists: list[Timed]) -> list[float]:
        """Median seconds of each."""
        turns = [self.watch.turns(timed.calls, self.y) for timed in finalists]
        times = [[turn.seconds(BUDGET) for turn in turns] for _ in range(ROUNDS)]
        return [statistics.median(column) for column in zip(*times)]


def _elsewhere(prepared: Prepared) -> Prepared:
    """The same weight in other memory, for a cold cache."""
    made = copy.copy(prepared)
    made.codes = prepared.codes.clone()
    made.scales = None if prepared.scales is None else prepared.scales.clone()
    return made


def tune(
    problem: Problem, watch: Stopwatch, device: torch.device, limit_s: float
) -> tuple[Row, list[tuple[Config, str]]]:
    """(the fastest tile for a problem, tiles that were left out and why); none is begun after limit_s seconds.

    Raises NoKernel where no row of ours takes the problem, or the guess of configs.py is wrong.
    """
    tuning = Tuning(problem, watch, device, limit_s)
    form, m = tuning.form, problem.m
    tuning.time(configs.choose(form, m, *tuning.limits, tuning.multiprocessors))
    guess = tuning.timed[0]
    tuning.try_each([tuning.shared(config) for config in tiles(form, m, *tuning.limits)])
    tuning.try_each([tuning.shared(t.config, times) for t in tuning.fastest(2) for times in (0, 0.5, 2, 4)])
    finalists = [guess, *(t for t in tuning.fastest(FINALISTS) if t is not guess)]
    seconds = tuning.in_turn(finalists)
    best = min(range(len(finalists)), key=seconds.__getitem__)
    row = Row(
        form, m, finalists[best].config, seconds[best], seconds[0], len(tuning.timed), len(tuning.asked), _commit(),
        datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )  # fmt: skip
    return row, tuning.left_out


@functools.cache
def _commit() -> str:
    """Of the checkout that this package runs from; "unknown" where it runs from none."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return "unknown"
    try:
        command = ["git", "-C", str(root), "rev-parse", "--short=10", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
