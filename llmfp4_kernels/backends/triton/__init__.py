"""The Triton kernels as rows of the registry: for GPUs without our CUDA module, and for what it does not multiply.

Triton is imported where a row takes a problem, not before.
"""

from __future__ import annotations

import functools

import torch

from ...formats import E4M3
from ...packed import PackedFP4
from ...problem import Kernel, Prepared, Problem
from ..cpu import largest_k
from ..gpu import unusable
from ..measured import Choice, Known
from . import configs, machine, tuned
from .form import Form

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_ROWS, GRID_LIMIT = 32, 65535
"""Rows of codes in a tile; tiles along the second and third side of a grid."""
GROUP_LIMIT = 1024
"""Inputs that may share a scale: what a program of the quantization holds."""


def _prepare(packed: PackedFP4, bias: torch.Tensor | None) -> Prepared:
    from .prepared import Prepared

    return Prepared(packed, bias)


def _unusable(problem: Problem) -> str | None:
    """Why no Triton kernel runs here, whatever it multiplies."""
    return unusable(problem, machine.here, machine.problem_with_triton)


def _no_power_of_two(what: str, size: int) -> str | None:
    if size and (size & (size - 1) or not 16 <= size <= GROUP_LIMIT):
        return f"{what} groups of {size} inputs are no power of two from 16 to {GROUP_LIMIT}"
    return None


def _beyond_bf16(problem: Problem) -> str | None:
    """Why an activation that is no integer cannot be a bf16 operand: bf16 has 8 significant bits."""
    activation, group = problem.activation, problem.dynamic.group_scale if problem.dynamic else None
    if activation is None or problem.integer:
        return None
    bits = activation.mantissa_bits + 1 + (4 if group == E4M3 else 0)
    if bits > 8:
        return f"{activation.name} times an E4M3 group scale has {bits} significant bits, bf16 operands have 8"
    return None


def refusal(name: str, problem: Problem) -> str | None:
    """None, or why the row triton.NAME does not take a problem."""
    if unusable_here := _unusable(problem):
        return unusable_here
    if problem.dtype not in DTYPES:
        return f"activations are {problem.dtype}, expected one of {', '.join(map(str, DTYPES))}"
    dynamic = problem.dynamic
    why = _no_power_of_two("weight", problem.group_size)
    why = why or _no_power_of_two("activation", dynamic.group_size if dynamic else 0) or _beyond_bf16(problem)
    if why:
        return why
    if problem.integer:
        limit = largest_k(problem.element, problem.activation, problem.shift, dynamic)
        if problem.k > limit:
            return f"k = {problem.k} may overflow int32 sums, the limit for these elements is {limit}"
    if problem.n > 2 * LEAST_ROWS * GRID_LIMIT:
        return f"n = {problem.n} is more than {2 * LEAST_ROWS * GRID_LIMIT}, which a grid holds"
    if name == "gemv" and problem.m > configs.GEMV_TOKENS:
        return f"m = {problem.m} is more than {configs.GEMV_TOKENS}, which a tile holds"
    if problem.m > 1 << 30:
        return f"m = {problem.m} is more than 2^30"
    return None


def measured_here(device: torch.device) -> Known:
    """What was measured on a GPU."""
    return tuned.known(torch.device(machine.here.device_type, device.index))


def tile(name: str, problem: Problem) -> Choice:
    """The tile in which the row `name` runs a problem that it takes, on the current GPU, and where it is from."""
    form, device = Form.of(name.removeprefix("triton."), problem), torch.device(machine.here.device_type)
    return tuned.choose(form, problem.m, device)


def operand(name: str, problem: Problem) -> str:
    """The type that the row `name` multiplies a problem in, on the GPU that holds it."""
    return Form.of(name.removeprefix("triton."), problem).operand


KERNELS = tuple(
    Kernel(f"triton.{name}", "pairs", functools.partial(refusal, name), _prepare) for name in ("gemv", "gemm")
)
