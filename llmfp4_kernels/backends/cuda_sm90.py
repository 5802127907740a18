"""What cuda.sm90 (csrc/cuda/gemm_sm90.h: Hopper's wgmma) takes, beyond what every CUDA kernel asks for.

It stands behind cuda.gemv in the registry and before cuda.sm80: from GEMV_ROWS rows on it is asked first. That order,
and the tiles that csrc/cuda/gemm_sm90.cu chooses, follow from the sizes alone; neither has been measured.
"""

from __future__ import annotations

from .. import native
from ..problem import Problem
from .gpu import sm

CAPABILITY = (9, 0)
"""wgmma is in the machine code of this architecture alone."""


def multiplies_fp8(problem: Problem) -> bool:
    """Whether activations are E4M3 with one scale per token or in all, and weights have one scale per row.

    The operands are halves of the activations, for the element's largest value, 480, is a NaN in the tensor core's
    format. Below 2^-5 (in units of x_scale) the last bit, 2^-9, is lost by it. Sums go to fp32 every 128 inputs; within
    those the tensor core keeps about 14 bits, as others have measured; not measured here.
    """
    grouped = problem.dynamic is not None and problem.dynamic.group_size > 0
    e4m3 = problem.activation is not None and problem.activation.name == "e4m3"
    return e4m3 and problem.scale is None and not problem.shift and not grouped


def refusal(problem: Problem, capability: tuple[int, int]) -> str | None:
    """None, or why a GPU of this compute capability does not run it."""
    if capability != CAPABILITY:
        return f"this GPU is {sm(capability)}, wgmma exists on sm_90 (Hopper) only"
    if problem.activation and problem.scale:
        return f"quantized activations need weights of one scale per row, these have {problem.scale.name} groups"
    built = native.module().cuda_architectures
    if not any(architecture.startswith("90a") for architecture in built):
        return f"the native module was built for {', '.join(built)}, without 90a-real"
    return None
