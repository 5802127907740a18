"""The integer CUDA kernels with the shift of static activations on the weights: rows that run where they are forced.

cuda.gemv and cuda.sm80 apply the shift where activations become integers. Here weights are multiplied by
2^(max_shift - shift) as they are decoded: activations stay plain integers (-weight-shift), or 4-bit codes in memory,
which the product decodes, too (-packed). Sums are the same integers, so results have the same bits. Which is faster is
not known: it was not measured.
"""

from __future__ import annotations

import functools

from ..formats import INT8_MAX
from ..problem import Kernel, Problem
from . import cuda

OPTIONS = {"gemv-weight-shift": "gemv", "sm80-weight-shift": "sm80", "sm80-packed": "sm80"}
"""Name of the row, and of the family whose kernel it is."""
MOST_SHIFT = 3


def _refusal(name: str, problem: Problem) -> str | None:
    activation, dynamic, element = problem.activation, problem.dynamic, problem.element
    if activation is None or problem.scale or (dynamic and dynamic.group_size):
        return "multiplies integers with one scale per token and per output, these are not such"
    if name.endswith("packed") and activation.bits != 4:
        return f"packs 4-bit activations, {activation.name} has {activation.bits} bits"
    if name.endswith("weight-shift") and not problem.shift:
        return "applies the shift of activations to weights, these have none"
    top = activation.max_shift if problem.shift else 0
    if top > MOST_SHIFT:
        return f"shifts of {activation.name} go up to {top}, weights take up to {MOST_SHIFT}"
    if element.max_integer << top > INT8_MAX:
        return f"{element.name} times 2^{top} is up to {element.max_integer << top}, beyond int8"
    return cuda.refusal(OPTIONS[name], problem)


KERNELS = tuple(Kernel(f"cuda.{name}", "units", functools.partial(_refusal, name), cuda.Prepared) for name in OPTIONS)
