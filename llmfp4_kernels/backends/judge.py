"""A weight to measure tiles with, and what is right: the reference's results."""

from __future__ import annotations

import dataclasses
import functools

import torch

from .. import reference
from ..errors import NoKernel
from ..formats import E8M0
from ..packed import PackedFP4
from ..problem import Problem

CHECKED_TOKENS, CHECKED_ROWS = 16, 4096
"""Tokens and outputs whose results are checked, evenly spread, first and last among them."""
FP8_SUMS = 2.0**-8
"""Of Σ|x||w|: of 32 products that the tensor core adds, each may lose 2^-13 of the largest (cuda_sm90.py)."""


def random_weight(problem: Problem) -> PackedFP4:
    """Random codes, scales, shifts and factors of a problem's form, n and k; on the CPU, where the reference is."""
    n, k, g = problem.n, problem.k, torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randint, generator=g, dtype=torch.uint8)
    codes, group_scale = draw(0, 256, (n, -(-k // 2))), None
    if k % 2:
        codes[:, -1] &= 15
    if problem.scale:
        low, high = (117, 128) if problem.scale == E8M0 else (1, 64)  # up to 1 and 1.875: fp16 holds the results
        group_scale = draw(low, high, (n, -(-k // problem.group_size)))
    activation, factor = problem.activation, torch.rand(k, generator=g) + 0.5
    return PackedFP4(
        codes,
        torch.rand(n, generator=g) + 0.5,
        k,
        problem.element,
        group_scale,
        problem.scale,
        problem.group_size,
        activation,
        x_scale=torch.tensor(0.37) if activation and problem.dynamic is None else None,
        shift=draw(0, activation.max_shift + 1, (k,)) if activation and problem.shift else None,
        x_factor=factor if problem.x_factor or (problem.shift and not activation) else None,
        dynamic=problem.dynamic,
    )


def _spread(length: int, count: int) -> torch.Tensor:
    return torch.linspace(0, length - 1, min(length, count), dtype=torch.float64).round().long()


class Judge:
    """judge(y) raises NoKernel unless y has the reference's values, or lies within the rounding of fp32 sums."""

    def __init__(self, packed: PackedFP4, x: torch.Tensor, fp8: bool = False):
        """packed in row order, x [m, k]: both on the CPU. fp8: E4M3 activations are operands of the tensor core."""
        self.exact, self.dtype = packed.integer, x.dtype
        self.tokens, self.rows = _spread(len(x), CHECKED_TOKENS), _spread(packed.shape[0], CHECKED_ROWS)
        names = [name for name in ("codes", "row_scale", "group_scale") if getattr(packed, name) is not None]
        some = dataclasses.replace(packed, **{name: getattr(packed, name)[self.rows] for name in names})
        x = x[self.tokens]
        self.expected = reference.gemm(x, some)
        rounded = reference.round_activation(x, some, torch.float64)
        magnitude = rounded.abs() @ reference.stored_weight(some).abs().T
        # Of Σ|x||w|: tensor cores drop what is below 2^-21 of a sum, once in 16 inputs; two bf16 parts end at 2^-17.
        self.bound = (2.0**-17 + (packed.k / 16 + 8) * 2.0**-21) * magnitude
        if fp8:
            x_scale = reference.activation_scales(x, some).x_scale.double()
            lost = 2.0**-9 * x_scale * (rounded.abs() < 2.0**-5 * x_scale)  # see cuda_sm90.py
            self.bound = FP8_SUMS * magnitude + lost @ reference.stored_weight(some).abs().T

    def __call__(self, y: torch.Tensor) -> None:
        y = y[self.tokens.to(y.device)][:, self.rows.to(y.device)].cpu()
        if self.exact:
            wrong = y != self.expected.to(self.dtype)
        else:
            error = (y.double() - self.expected.double()).abs() - torch.finfo(self.dtype).eps * self.expected.abs()
            wrong = ~(error <= self.bound)
        if wrong.any():
            raise NoKernel(f"{int(wrong.sum())} of {y.numel()} results are not the reference's")
