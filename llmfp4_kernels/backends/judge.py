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
from .cuda_sm90 import most_binades

CHECKED_TOKENS, CHECKED_ROWS = 16, 4096
"""Tokens and outputs whose results are checked, evenly spread, first and last among them."""


def random_weight(problem: Problem) -> PackedFP4:
    """Random codes, scales, shifts and factors of a problem's form, n and k; on the CPU, where the reference is."""
    n, k, g = problem.n, problem.k, torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randint, generator=g, dtype=torch.uint8)
    codes, group_scale = draw(0, 256, (n, -(-k // 2))), None
    if k % 2:
        codes[:, -1] &= 15
    if problem.scale:
        # Up to 1 and 1.875: fp16 holds the results. 8-bit floats hold the E8M0 scales, unless not the problem's.
        most = most_binades(problem.element)
        low, high = (127 - min(most, 10), 128) if problem.scale == E8M0 else (1, 64)
        group_scale = draw(low, high, (n, -(-k // problem.group_size)))
        if problem.scale_span > most:
            group_scale[0, 0], group_scale[0, -1] = 127, max(127 - problem.scale_span, 0)
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


def loss_in_14_bits(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """[m, n]: what tensor cores may lose of x [m, k] · w [n, k]ᵀ of 8-bit floats, see cuda_sm90.multiplies_fp8.

    128 inputs or fewer are 4 additions of 32 products or 8 of 16, and each loses 34 or 18 times 2^-13 of its largest
    product or sum. Wherever sums begin, they are differences of sums of the first 16, 32, ... inputs.
    """
    x, w = (torch.nn.functional.pad(t, (0, -t.shape[1] % 128)) for t in (x, w))
    loss = torch.zeros(len(x), len(w), dtype=torch.float64)
    for a, b in zip(x.split(128, 1), w.split(128, 1)):
        sums = torch.einsum("msi,nsi->smn", a.view(-1, 8, 16), b.view(-1, 8, 16)).cumsum(0)
        furthest = sums.amax(0).clamp(min=0) - sums.amin(0).clamp(max=0)
        loss += torch.maximum(furthest, a.abs().amax(1)[:, None] * b.abs().amax(1))
    return 1.01 * 8 * 18 * 2.0**-13 * loss


class Judge:
    """judge(y) raises NoKernel unless y has the reference's values, or lies within the rounding of fp32 sums, or of
    tensor cores' sums of 8-bit floats."""

    def __init__(self, packed: PackedFP4, x: torch.Tensor, fp8: bool = False):
        """packed in row order, x [m, k]: both on the CPU. fp8: E4M3 activations are operands of the tensor core."""
        self.exact, self.dtype = packed.integer, x.dtype
        self.tokens, self.rows = _spread(len(x), CHECKED_TOKENS), _spread(packed.shape[0], CHECKED_ROWS)
        names = [name for name in ("codes", "row_scale", "group_scale") if getattr(packed, name) is not None]
        some = dataclasses.replace(packed, **{name: getattr(packed, name)[self.rows] for name in names})
        x = x[self.tokens]
        self.expected = reference.gemm(x, some)
        rounded = reference.round_activation(x, some, torch.float64)
        weights = reference.stored_weight(some)
        # Of Σ|x||w|: tensor cores drop what is below 2^-21 of a sum, once in 16 inputs; two bf16 parts end at 2^-17.
        self.allowed = (2.0**-17 + (packed.k / 16 + 8) * 2.0**-21) * (rounded.abs() @ weights.abs().T)
        if fp8:
            x_scale = reference.activation_scales(x, some).x_scale.double()
            lost = 2.0**-9 * x_scale * (rounded.abs() < 2.0**-5 * x_scale)  # see cuda_sm90.py
            self.allowed += loss_in_14_bits(rounded, weights) + lost @ weights.abs().T

    def __call__(self, y: torch.Tensor) -> None:
        y = y[self.tokens.to(y.device)][:, self.rows.to(y.device)].cpu()
        if self.exact:
            wrong = y != self.expected.to(self.dtype)
        else:
            error = (y.double() - self.expected.double()).abs() - torch.finfo(self.dtype).eps * self.expected.abs()
            wrong = ~(error <= self.allowed)
        if wrong.any():
            raise NoKernel(f"{int(wrong.sum())} of {y.numel()} results are not the reference's")
