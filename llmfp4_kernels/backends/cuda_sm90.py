"""What cuda.sm90 (csrc/cuda/gemm_sm90.h: Hopper's wgmma) takes, beyond what every CUDA kernel asks for.

It stands behind cuda.gemv in the registry and before cuda.sm80: from GEMV_ROWS rows on it is asked first. That order,
and the tiles that csrc/cuda/gemm_sm90.cu chooses, follow from the sizes alone, where cuda_choices.py knows no measured
ones.
"""

from __future__ import annotations

import math

from .. import native
from ..formats import E4M3FN, E8M0, Element
from ..problem import Problem
from .gpu import refusal_without, sm

CAPABILITY = (9, 0)
"""wgmma is in the machine code of this architecture alone."""


def multiplies_fp8(problem: Problem) -> bool:
    """Whether activations are 8-bit floats of the tensor core with one scale per token or in all, and not shifted, and
    weights have one scale per row, or E8M0 scales of groups, which move the exponents of weights.

    OCP's E4M3 is an operand as it is. Of LLM-FP4's, whose largest value, 480, is a NaN in the tensor core's format, the
    halves are operands: below 2^-5 (in units of x_scale) the last bit, 2^-9, is lost.

    Sums go to fp32 every 128 inputs. Within those, say those who probed it (MMA-Sim, arXiv 2511.10909; not measured
    here), 32 products and the sum before them are aligned to the largest of these 33 numbers and, like their sum, cut
    13 bits below its leading one. So 32 inputs err by less than 34 · 2^-13 of the largest product or sum among
    them, 128 inputs by less than 1.7 % of their Σ|x·w|. What "cuda.sm90-fast-sums" leaves out is that sum in fp32: 32
    inputs then err by as much of the largest sum before them, and products below 2^-13 of it do not count. As modelled,
    4096 random inputs err by 5e-5 of y's size, with fast sums by 6e-4; positive ones by 1e-4 and 5 %.
    """
    grouped = problem.dynamic is not None and problem.dynamic.group_size > 0
    floats = problem.activation is not None and problem.activation.name in ("e4m3", "e4m3fn")
    return floats and problem.scale in (None, E8M0) and not problem.shift and not grouped


def exponent(element: Element) -> int:
    """The largest e such that E4M3 holds element · 2^e: 6 of E2M1, 7 of E1M2, 4 of E3M0."""
    return math.frexp(E4M3FN.max / element.max)[1] - 1


def most_binades(element: Element) -> int:
    """How far below its row's largest an E8M0 scale may be, so that E4M3 holds all of `element` as normal numbers.

    That is what csrc/cuda/decode_fp8.h asks for: 11 of E2M1, 12 of E1M2, 8 of E3M0.
    """
    return math.frexp(element.magnitude(1))[1] - 1 + exponent(element) - (1 - E4M3FN.bias)


def refusal(problem: Problem, capability: tuple[int, int]) -> str | None:
    """None, or why a GPU of this compute capability does not run it."""
    if capability != CAPABILITY:
        return f"this GPU is {sm(capability)}, wgmma exists on sm_90 (Hopper) only"
    if problem.activation and problem.scale:
        if not multiplies_fp8(problem):
            return f"quantized activations need weights of one scale per row, these have {problem.scale.name} groups"
        most = most_binades(problem.element)
        if problem.scale_span > most:
            return (
                f"E8M0 scales of a row span {problem.scale_span} binades, E4M3 has {most} beside {problem.element.name}"
            )
    return refusal_without("90a", native.module().cuda_architectures)
