"""Measures tiles for one product on the GPU that is here: a few, each checked against the reference before it is timed.

First every tile with its own splits, then other splits of the two fastest, then the fastest in turn with the guess.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
from collections.abc import Callable

import torch

from ...errors import NoKernel
from ...problem import Problem
from ..graphs import Stopwatch
from ..judge import Judge, random_weight
from ..measured import commit
from ..trials import Trials
from . import configs, fp8, machine, refusal
from .configs import Config
from .form import Form
from .prepared import Prepared
from .tuned import Row

FINALISTS = 4
"""Tiles that are timed in turn."""
SUMS = (configs.REGISTERS + 1) // 2
"""That a thread may hold."""


def tiles(form: Form, m: int, capability: tuple[int, int], version: tuple[int, int]) -> list[Config]:
    """Tiles worth trying that run, without splits, small ones first."""
    unfenced = configs.unfenced(capability, version)
    if form.kernel == "gemv":
        least = fp8.LEAST_TOKENS if form.fp8 and capability in fp8.WARPGROUP else 8
        tokens, depths = [least if m <= least else configs.GEMV_TOKENS], ((64, 6), (128, 4), (256, 3))
        shares = ((32, 2), (64, 2), (128, 2)) if unfenced else ((32, 2), (64, 2), (64, 4), (128, 8))
    else:
        tokens, depths = [t for t in (32, 64, 128) if t == 32 or t < 2 * m], ((64, 4), (128, 3))
        shares = ((32, 2), (64, 2)) if unfenced else ((64, 4), (128, 8), (128, 4))
    made = [
        Config(rows, count, block_k, warps, stages)
        for count in tokens
        for rows, warps in shares
        for block_k, stages in depths
    ]
    made = (config for config in made if configs.sums(config, form) <= SUMS * 32 * config.warps)
    once = ((config, dataclasses.replace(config, splits=1)) for config in made)
    return [config for config, whole in once if configs.refusal(whole, form, capability, version) is None]


class Tuning(Trials):
    """One problem in any tile. Raises NoKernel where no row of ours takes it."""

    def __init__(self, problem: Problem, watch: Stopwatch, device: torch.device, limit_s: float):
        from triton.runtime.errors import TritonError

        names = [name for name in ("gemv", "gemm") if refusal(name, problem) is None]
        if not names:
            raise NoKernel(f"no Triton kernel to tune: {refusal('gemm', problem)}")
        self.form, self.m, self.errors = Form.of(names[0], problem), problem.m, (TritonError, RuntimeError)
        self.limits = machine.here.capability(device.index), machine.version()
        self.multiprocessors = machine.here.multiprocessors(device)
        packed, g = random_weight(problem), torch.Generator().manual_seed(1)
        x = torch.randn(problem.m, problem.k, generator=g).to(problem.dtype)
        y = torch.empty(problem.m, problem.n, dtype=x.dtype, device=device)
        super().__init__(watch, Judge(packed, x, self.form.fp8), y, limit_s)
        prepared = Prepared(packed.to(device), None)
        self.operands, self.x_scale = prepared.activations(x.to(device))
        self.weights = [prepared, *(_elsewhere(prepared) for _ in range(watch.copies(prepared.codes.numel()) - 1))]

    def calls(self, config: Config) -> list[Callable]:
        return [functools.partial(w.multiply, config, self.operands, self.x_scale) for w in self.weights]

    def result(self, call: Callable) -> torch.Tensor:
        call(self.argument.fill_(float("nan")))
        return self.argument

    def refusal(self, config: Config) -> str | None:
        return configs.refusal(config, self.form, *self.limits)

    def shared(self, config: Config, times: float = 1) -> Config:
        """With `times` as many splits as configs.py gives it."""
        own = times * configs.splits(config, self.form, self.m, self.multiprocessors)
        return dataclasses.replace(config, splits=max(1, min(round(own), configs.steps(config, self.form.k))))


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
        form, m, finalists[best].config, seconds[best], seconds[0], len(tuning.timed), len(tuning.asked), commit(),
        datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )  # fmt: skip
    return row, tuning.left_out
