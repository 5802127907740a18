"""Candidates for one product on the GPU that is here: each is checked against the reference before it is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .graphs import Stopwatch
from .judge import Judge

ROUNDS, BUDGET = 5, 0.01
"""How often those in turn are timed, and seconds of each timing."""


@dataclass
class Timed:
    config: object
    calls: list
    """call(argument), one for each copy of the weight."""
    seconds: float


class Trials:
    """Of a product in any configuration, a hashable; a backend says what its calls are, and which it refuses."""

    errors: tuple[type[Exception], ...] = (RuntimeError,)
    """Of what cannot run, wrong results (NoKernel) among them."""

    def __init__(self, watch: Stopwatch, judge: Judge, argument: torch.Tensor, limit_s: float):
        self.watch, self.judge, self.argument = watch, judge, argument
        self.deadline = time.perf_counter() + limit_s
        self.asked: set = set()
        self.timed: list[Timed] = []
        self.left_out: list[tuple[object, str]] = []

    def calls(self, config) -> list[Callable]:
        raise NotImplementedError

    def result(self, call: Callable) -> torch.Tensor:
        """What a call makes, in memory that was NaN before."""
        raise NotImplementedError

    def refusal(self, config) -> str | None:
        return None

    def time(self, config) -> None:
        """Checks, then times. Raises NoKernel for wrong results, one of `errors` for what cannot run."""
        self.asked.add(config)
        calls = self.calls(config)
        y = self.result(calls[0])
        self.watch.wait()
        self.judge(y)
        self.timed.append(Timed(config, calls, self.watch.turns(calls, self.argument).seconds(BUDGET)))

    def try_each(self, candidates: list) -> None:
        """Times those that are new and run, until time is up; of the others `left_out` says why."""
        for config in candidates:
            if config in self.asked or self.refusal(config):
                continue
            self.asked.add(config)
            if time.perf_counter() > self.deadline:
                continue
            try:
                self.time(config)
            except self.errors as error:
                self.watch.wait()  # what broke the GPU itself is raised here
                self.left_out.append((config, f"{type(error).__name__}: {str(error).splitlines()[0]}"))

    def fastest(self, count: int, of: Callable[[object], bool] = lambda config: True) -> list[Timed]:
        return sorted((t for t in self.timed if of(t.config)), key=lambda timed: timed.seconds)[:count]

    def in_turn(self, finalists: list[Timed]) -> list[float]:
        """Median seconds of each."""
        turns = [self.watch.turns(timed.calls, self.argument) for timed in finalists]
        times = [[turn.seconds(BUDGET) for turn in turns] for _ in range(ROUNDS)]
        return [statistics.median(column) for column in zip(*times)]
