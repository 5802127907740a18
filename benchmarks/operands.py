"""The weight that every contender gets, and how its product is judged."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from shared_cases import random_x

from llmfp4_kernels.errors import BadInput, NoKernel

PROBE = 61
"""Distinct rows. A prime: rows that repeat never lie alike in tiles, so that a kernel's wrong tile shows.

The search of llm-fp4 takes 15 s for 61 rows of 4096, 65 s for 251.
"""
TOKENS = 64
"""Rows of x that errors are taken on, and that recipes are calibrated on (other ones)."""

GROUP = 64
"""Weights per scale of the rivals that let one choose; the demo model's k = 576 is no multiple of 128."""
TOKEN = 0
"""One activation scale per token, for `per_block`."""
INT8_ROUNDING = 2**-9
"""Of Σ|x||w|: scales in 16 bits, and a few ties of activations that fall the other way."""


class Weight:
    """A random weight [n, k] of PROBE distinct rows, one after the other, repeated.

    Whatever quantizes row by row does to it what it does to the PROBE rows, and so does a search of least output
    error: weights are quantized, and expected products computed, for those rows only.
    """

    def __init__(self, n: int, k: int):
        self.n, self.k = n, k
        self.probe = torch.randn(min(n, PROBE), k, generator=torch.Generator().manual_seed(0)) / k**0.5
        self.rows = torch.arange(n) % len(self.probe)

    def repeat(self, of_probe: torch.Tensor) -> torch.Tensor:
        """What belongs to the PROBE rows [PROBE, ...], for all rows [n, ...]."""
        return of_probe[self.rows].contiguous()

    @property
    def dense(self) -> torch.Tensor:
        return self.repeat(self.probe)

    @cached_property
    def calibration(self) -> torch.Tensor:
        return random_x(TOKENS, self.k, seed=2)

    @cached_property
    def held_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(x [TOKENS, k], the exact product of the PROBE rows)."""
        x = random_x(TOKENS, self.k, seed=3)
        return x, x.double() @ self.probe.double().T

    def error(self, contender) -> float:
        """|y - exact| / |exact| (Frobenius) of a contender on the held-out tokens.

        Raises NoKernel where its forced kernel does not take them.
        """
        x, exact = self.held_out
        contender.kernel(len(x))  # a call keeps the kernel that was chosen first for this many rows
        with torch.inference_mode():
            y = contender.calls[0](x.to(contender.device, contender.x_dtype))[:, : len(self.probe)].cpu().double()
        return ((y - exact).norm() / exact.norm()).item()


def needs(name: str, weight: Weight, n: int, k: int) -> None:
    if weight.n % n or weight.k % k:
        raise BadInput(f"{name} needs n in {n}s and k in {k}s, this is n = {weight.n}, k = {weight.k}")


def per_block(block: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """x [m, k] rounded to int8 with one scale, largest magnitude / 127, for each `block` inputs; float64."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        blocks = x.double().view(len(x), -1, block or x.shape[1])
        scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return ((blocks / scale).round() * scale).view_as(x)

    return rounded


def require_shape(name: str, weight: Weight, x: torch.Tensor, y: torch.Tensor) -> None:
    """Raise NoKernel unless y is [m, n]."""
    if list(y.shape) != [len(x), weight.n]:
        raise NoKernel(f"refusing to time {name}: its result is {list(y.shape)}, expected [{len(x)}, {weight.n}]")


class Product:
    """check(x, y): y is what is left of x, times the weight that codes stand for, within a share of Σ|x||w|.

    probe: float [PROBE, k], the dequantized rows. activation: what the contender makes of x. A wrong step of a
    quantized activation, a tie that falls the other way, is 1/127 of one product of k. result: what the rounding of y
    adds, relative to |y|.
    """

    def __init__(
        self,
        name: str,
        weight: Weight,
        probe: torch.Tensor,
        relative: float,
        activation=torch.Tensor.double,
        result=0.0,
    ):
        self.name, self.weight, self.probe, self.relative = name, weight, probe.double(), relative
        self.activation, self.result, self.known = activation, result, {}

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        require_shape(self.name, self.weight, x, y)
        if len(x) not in self.known:
            rounded = self.activation(x.cpu()).double()
            self.known[len(x)] = rounded @ self.probe.T, rounded.abs() @ self.probe.abs().T
        exact, magnitude = (part[:, self.weight.rows] for part in self.known[len(x)])
        error = (y.cpu().double() - exact).abs() - self.result * exact.abs()
        worst = (error / magnitude.clamp_min(1e-30)).max().item()
        if not worst <= self.relative:
            shape = f"m = {len(x)}, n = {self.weight.n}, k = {self.weight.k}"
            raise NoKernel(
                f"refusing to time {self.name}, which is wrong at {shape}: off by {worst:.2e} of Σ|x||w|, "
                f"{self.relative:.2e} is rounding"
            )
