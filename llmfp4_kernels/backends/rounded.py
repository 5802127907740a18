"""Activations that no integer kernel takes: rounded as floats, then multiplied by the CPU's 16-bit-activation kernels.

8-bit floats and activations with MXFP4's or NVFP4's group scales are simulated in this way, with exact operands: what
is rounded is multiplied in units of the activation's scale, which follows in fp32.
"""

from __future__ import annotations

import dataclasses

import torch

from .. import native
from ..encode import snap
from ..packed import PackedFP4
from ..problem import Kernel, Problem
from ..reference import activation_scales, group_factors, inverse_scale, scaled_input
from . import cpu


def _without_scales(packed: PackedFP4) -> PackedFP4:
    """The weight without row scales and activations: what the rounded activations are multiplied by."""
    nothing = dict.fromkeys(("activation", "x_scale", "shift", "dynamic", "x_factor"))
    return dataclasses.replace(packed, row_scale=torch.ones_like(packed.row_scale), **nothing)


class Prepared:
    def __init__(self, packed: PackedFP4, bias: torch.Tensor | None):
        self.packed, self.bias = packed, None if bias is None else bias.detach().float()
        self.weight_only = _without_scales(packed)
        self.weight = cpu.Prepared(self.weight_only, None)

    def run(self, kernel: Kernel, x: torch.Tensor) -> torch.Tensor:
        """fp32 of (sum · x_scale) · row_scale + bias; rows of NaN for tokens with NaN or Inf, see reference.gemm."""
        flat = x.reshape(-1, self.packed.k)
        poisoned = ~scaled_input(flat, self.packed).isfinite().all(dim=1, keepdim=True)
        rounded, x_scale = self.round(flat.masked_fill(poisoned, 0.0))
        inner = _inner(Problem.of(self.weight_only, len(flat), torch.float32))
        poisoned |= ~rounded.isfinite().all(dim=1, keepdim=True)
        y = self.weight.run(inner, rounded).mul_(x_scale).mul_(self.packed.row_scale)
        y = y if self.bias is None else y + self.bias
        return y.masked_fill_(poisoned, float("nan")).to(x.dtype).view(*x.shape[:-1], -1)

    def round(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(float32 [m, k] in units of x_scale, x_scale [] or [m, 1]), whose product is reference.round_activation."""
        packed, scales = self.packed, activation_scales(x, self.packed)
        v = scaled_input(x, packed) * inverse_scale(packed, scales)
        if scales.group is not None:
            factor = group_factors(packed, scales)
            return snap(v * torch.reciprocal(factor), packed.activation) * factor, scales.x_scale
        v = snap(v, packed.activation)
        return v if packed.shift is None else torch.ldexp(v, -packed.shift.int()), scales.x_scale


def _inner(problem: Problem) -> Kernel | None:
    return next((kernel for kernel in cpu.KERNELS if kernel.refusal(problem) is None), None)


def refusal(problem: Problem) -> str | None:
    if native.problem_with_module():
        return native.problem_with_module()
    if problem.activation is None or problem.integer or problem.grouped:
        return "rounds activations that no integer kernel multiplies, these are not such"
    if problem.dtype not in cpu.DTYPES:
        return f"activations are {problem.dtype}, expected one of {', '.join(map(str, cpu.DTYPES))}"
    plain = dataclasses.replace(
        problem, activation=None, shift=False, dynamic=None, x_factor=False, dtype=torch.float32
    )
    return None if _inner(plain) else f"no CPU kernel multiplies what it rounds: {cpu.KERNELS[-1].refusal(plain)}"


KERNELS = (Kernel("cpu.rounded", "tiled", refusal, Prepared),)
