"""Measures the CUDA rows for one product on the GPU that is here: each in its tiles, each tile in a few splits of k.

A call is timed as FP4Linear makes it, quantization of activations included. First what counting chooses, then every
tile in its own splits, then in others, then the fastest of each row of the registry in turn with the counted one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import NoKernel
from ..problem import Problem
from . import cuda, cuda_choices
from .cuda_choices import Form, Row, Tile
from .graphs import Stopwatch
from .judge import Judge, random_weight
from .measured import commit
from .trials import Trials

FINALISTS = 2
"""Of each row of the registry, that are timed in turn."""
TIMES = (1, 0, 0.5, 2, 4)
"""As many splits as counting gives a tile; none but one comes from 0."""


class Subject:
    """A random weight of a problem's form, in copies that exceed L2, for products with any number of tokens."""

    def __init__(self, problem: Problem, watch: Stopwatch, device: torch.device):
        self.form, self.device, self.packed = Form.of(problem), device, random_weight(problem)
        first = cuda.Prepared(self.packed.to(device), None)
        more = watch.copies(first.tensors["codes"].numel()) - 1
        self.copies = [first, *(cuda.Prepared(self.packed.to(device), None) for _ in range(more))]

    def problem(self, m: int, dtype: torch.dtype) -> Problem:
        return dataclasses.replace(Problem.of(self.packed, m, dtype), device="cuda", device_index=self.device.index)


def candidates(form: Form, m: int, kernels: list[str], multiprocessors: int) -> list[Tile]:
    """What is worth trying: each tile in its own splits first; but for a row's smallest, none that is half padding."""
    found: dict[Tile, None] = {}
    for times in TIMES:
        for kernel in kernels:
            divided = functools.partial(cuda_choices.division, kernel, form, m, multiprocessors)
            first, last = divided().tiles
            plans = [divided(tile) for tile in range(first, last + 1)]
            rows = [cuda_choices.rows_of_tile(plan) for plan in plans]
            for plan, tile_rows in zip(plans, rows):
                if tile_rows > min(rows) and tile_rows >= 2 * m * form.planes:
                    continue
                splits = max(1, min(round(times * plan.splits), plan.most_splits))
                found[cuda_choices.tile_of(kernel, divided(plan.tile, splits))] = None
    return list(found)


@contextlib.contextmanager
def _poisoned():
    """New memory is NaN: what a kernel leaves out is no right result of the one before."""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before[0]
        torch.use_deterministic_algorithms(before[1])


class Refused(NoKernel):
    """No row takes a product."""


class Tuning(Trials):
    """One number of tokens. Raises Refused."""

    def __init__(self, subject: Subject, m: int, dtype: torch.dtype, watch: Stopwatch, limit_s: float):
        problem, device = subject.problem(m, dtype), subject.device
        refusals = {kernel.name: kernel.refusal(problem) for kernel in cuda.KERNELS}
        self.kernels = {kernel.name: kernel for kernel in cuda.KERNELS if refusals[kernel.name] is None}
        if not self.kernels:
            raise Refused("no CUDA kernel to tune: " + "; ".join(f"{name}: {why}" for name, why in refusals.items()))
        self.subject, self.form, self.m, self.dtype = subject, Form.of(problem), m, dtype
        self.multiprocessors = cuda.machine.multiprocessors(device)
        x = torch.randn(m, problem.k, generator=torch.Generator().manual_seed(1)).to(dtype)
        judge = Judge(subject.packed, x, fp8=self.form.operand == "e4m3")
        super().__init__(watch, judge, x.to(device), limit_s)

    def calls(self, config: Tile) -> list[Callable]:
        name, forced, made = config.kernel.removeprefix("cuda."), (config.tile, config.splits), []
        for prepared in map(copy.copy, self.subject.copies):
            plan = prepared.plan(name, self.m, self.dtype, self.multiprocessors, forced)
            prepared.plans = {(name, self.m, cuda.DTYPES[self.dtype]): plan}
            made.append(functools.partial(prepared.run, self.kernels[config.kernel]))
        return made

    def result(self, call: Callable) -> torch.Tensor:
        with _poisoned():
            return call(self.argument)


@dataclass(frozen=True)
class Outcome:
    rows: list[Row]
    """The fastest of each row of the registry."""
    timed: list[tuple[Tile, float]]
    """All of them with their seconds, each timed once, what counting chooses first."""
    left_out: list[tuple[Tile, str]]
    """And why."""


def tune(
    subject: Subject, m: int, dtype: torch.dtype, watch: Stopwatch, limit_s: float, results: str = "llmfp4 tune"
) -> Outcome:
    """Nothing is begun after limit_s seconds but what counting chooses. `results` names the file that keeps it all.

    Raises Refused, or NoKernel where what counting chooses is wrong.
    """
    tuning = Tuning(subject, m, dtype, watch, limit_s)
    names = list(tuning.kernels)
    first = cuda_choices.division(names[0], tuning.form, m, tuning.multiprocessors)
    tuning.time(cuda_choices.tile_of(names[0], first))
    counted = tuning.timed[0]
    tuning.try_each(candidates(tuning.form, m, names, tuning.multiprocessors))
    finalists = [counted]
    for name in names:
        fastest = tuning.fastest(FINALISTS, lambda config, name=name: config.kernel == name)
        finalists += [timed for timed in fastest if timed is not counted]
    seconds = tuning.in_turn(finalists)
    best: dict[str, tuple[float, Tile]] = {}
    for timed, took in zip(finalists, seconds):
        kernel = timed.config.kernel
        best[kernel] = min(best.get(kernel, (float("inf"), timed.config)), (took, timed.config), key=lambda b: b[0])
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    count = len(tuning.timed), len(tuning.asked)
    rows = [
        Row(tuning.form, m, tile, took, seconds[0], *count, results, commit(), date) for took, tile in best.values()
    ]
    return Outcome(rows, [(timed.config, timed.seconds) for timed in tuning.timed], tuning.left_out)
