"""The CUDA kernels with the shift of inputs on the weights, as they are decoded: rows that run where they are forced.

cuda.gemv and cuda.sm80 apply the shift where activations become operands: integers, or bf16 parts. Here weights are
multiplied by 2^(max_shift - shift), in int8, or by 2^-shift, in bf16; activations stay plain integers or floats
(-weight-shift), or 4-bit codes in memory, which the product decodes, too (-packed). The same products are added, so
results have the same bits. Which is faster is not known: it was not measured.

cuda.sm90-fast-sums leaves sums of 8-bit floats in the tensor core, whose rounding cuda_sm90.py describes: other results
than cuda.sm90's, in fewer instructions and with the widest tile.
"""

from __future__ import annotations

import functools

import torch

from ..formats import INT8_MAX
from ..problem import Kernel, Problem
from . import cuda, cuda_sm90

OPTIONS = {"gemv-weight-shift": "gemv", "sm80-weight-shift": "sm80", "sm80-packed": "sm80"}
"""Name of the row, and of the family whose kernel it is."""
MOST_SHIFT = 3


def _refusal(name: str, problem: Problem) -> str | None:
    activation, packed = problem.activation, name.endswith("packed")
    if problem.scale:
        return f"takes one scale per output, these weights have {problem.scale.name} scales of {problem.group_size}"
    if not (packed or problem.shift):
        return "applies the shift of inputs to weights, these have none"
    if packed and (activation is None or activation.bits != 4):
        return f"packs 4-bit activations, these are {activation.name if activation else problem.dtype}"
    why = _refusal_of_integers(problem) if activation else _refusal_of_floats(problem)
    return why or cuda.refusal(OPTIONS[name], problem)


def _refusal_of_integers(problem: Problem) -> str | None:
    activation, dynamic, element = problem.activation, problem.dynamic, problem.element
    if dynamic and dynamic.group_size:
        return f"takes one scale per token, these have scales of {dynamic.group_size} inputs"
    top = activation.max_shift if problem.shift else 0
    if top > MOST_SHIFT:
        return f"shifts of {activation.name} go up to {top}, weights take up to {MOST_SHIFT}"
    if element.max_integer << top > INT8_MAX:
        return f"{element.name} times 2^{top} is up to {element.max_integer << top}, beyond int8"
    return None


def _refusal_of_floats(problem: Problem) -> str | None:
    if problem.dtype == torch.float16:
        return "decodes weights to bf16, activations are torch.float16"
    return "moves the shift of inputs, these have another factor, too" if problem.x_factor else None


def _refusal_of_fast_sums(problem: Problem) -> str | None:
    if unusable_here := cuda._unusable(problem):
        return unusable_here
    if problem.scale or not cuda_sm90.multiplies_fp8(problem):
        what = problem.activation.name if problem.activation else problem.dtype
        groups = f", and these weights have {problem.scale.name} groups" if problem.scale else ""
        return f"keeps sums of E4M3 and one scale per row in the tensor core, these activations are {what}{groups}"
    return cuda.refusal("sm90", problem)


KERNELS = (
    *(Kernel(f"cuda.{name}", "units", functools.partial(_refusal, name), cuda.Prepared, True) for name in OPTIONS),
    Kernel("cuda.sm90-fast-sums", "units", _refusal_of_fast_sums, cuda.Prepared, True),
)
