"""What activations become for a product, and all that the choice of its tile depends on but m."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...formats import int8_planes
from ...problem import Problem
from . import fp8


@dataclass(frozen=True)
class Operands:
    """What activations become."""

    dtype: torch.dtype
    planes: int = 1
    """int8 numbers an activation; their sums are kept apart."""
    parts: int = 1
    """bf16 numbers an activation, that sum up to it."""

    @staticmethod
    def of(problem: Problem) -> Operands:
        """On the GPU that holds the problem."""
        if problem.integer:
            return Operands(torch.int8, planes=int8_planes(problem.activation, problem.dynamic, problem.shift))
        if fp8.multiplies(problem):
            return Operands(torch.float8_e4m3fn)
        if problem.activation:
            return Operands(torch.bfloat16)
        if problem.dtype == torch.float32:
            return Operands(torch.bfloat16, parts=3)
        return Operands(torch.bfloat16, parts=2) if problem.x_factor or problem.shift else Operands(problem.dtype)


@dataclass(frozen=True)
class Form:
    """A product to a row of the registry, as strings and numbers that JSON holds. Elements are none of it: their codes
    are looked up alike."""

    kernel: str
    """ "gemv" or "gemm"."""
    operand: str
    """ "int8", "float8_e4m3fn", "float16" or "bfloat16"."""
    planes: int
    parts: int
    scale: str
    """Of the weight's groups; "none" without."""
    group_size: int
    n: int
    k: int

    @staticmethod
    def of(kernel: str, problem: Problem) -> Form:
        """Of a problem on the row triton.KERNEL."""
        operands, scale = Operands.of(problem), problem.scale.name if problem.scale else "none"
        operand = str(operands.dtype).removeprefix("torch.")
        return Form(kernel, operand, operands.planes, operands.parts, scale, problem.group_size, problem.n, problem.k)

    @property
    def bits(self) -> int:
        """Of an operand."""
        return 8 if self.operand == "int8" or self.fp8 else 16

    @property
    def fp8(self) -> bool:
        return self.operand == "float8_e4m3fn"
