"""The float64 reference as the last row of the registry: any problem, any device, slow."""

from __future__ import annotations

import torch

from .. import reference
from ..layout import to_layout
from ..packed import PackedFP4
from ..problem import Kernel, Problem


class Prepared:
    def __init__(self, packed: PackedFP4, bias: torch.Tensor | None):
        self.packed, self.bias = to_layout(packed, "row"), bias

    def run(self, kernel: Kernel, x: torch.Tensor) -> torch.Tensor:
        y = reference.gemm(x.reshape(-1, self.packed.k), self.packed, self.bias)
        return y.to(x.dtype).view(*x.shape[:-1], self.packed.shape[0])


def refusal(problem: Problem) -> str | None:
    known = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return None if problem.dtype in known else f"activations are {problem.dtype}, expected one of {known}"


KERNELS = (Kernel("reference", "row", refusal, Prepared),)
