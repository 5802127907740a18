"""The table of kernels, best first, and the only dispatcher."""

from __future__ import annotations

import os
import warnings

from .backends import cpu, cuda, cuda_options, reference, rounded, triton
from .errors import NoKernel
from .problem import Kernel, Problem

FORCE = "LLMFP4_KERNEL"


def table() -> tuple[Kernel, ...]:
    """Every kernel, in the order in which they are asked."""
    return cpu.KERNELS + rounded.KERNELS + cuda.KERNELS + cuda_options.KERNELS + triton.KERNELS + reference.KERNELS


def explain(problem: Problem) -> list[tuple[str, str | None]]:
    """What each kernel answers: a refusal, or None. The first None runs, unless LLMFP4_KERNEL names another."""
    return [(kernel.name, kernel.refusal(problem)) for kernel in table()]


def epilogue_of(kernel: str) -> str:
    """Where a residual and SwiGLU follow a kernel's sums: "fused" into it, or "composed" from its fp32 product."""
    return "fused" if {row.name: row for row in table()}[kernel].fuses_epilogue else "composed"


def layout_for(problem: Problem) -> str:
    """The layout that the kernel of a problem reads; where the forced kernel refuses, the first one's that does not.

    Raises NoKernel if all refuse.
    """
    taken = [kernel for kernel in table() if kernel.refusal(problem) is None]
    forced = [kernel for kernel in taken if kernel.name == os.environ.get(FORCE)]
    return (forced or taken or [choose(problem)])[0].layout


def choose(problem: Problem) -> Kernel:
    """The first kernel that takes the problem, or the one that LLMFP4_KERNEL forces.

    Raises NoKernel if the forced kernel is unknown or refuses, or if all refuse.
    """
    forced = os.environ.get(FORCE)
    if forced:
        return _forced(forced, problem)
    walk = explain(problem)
    refusals = "; ".join(f"{name}: {why}" for name, why in walk if why)
    taken = next((name for name, why in walk if why is None), None)
    what = f"{problem.scheme} m = {problem.m}, n = {problem.n}, k = {problem.k}"
    if taken is None:
        raise NoKernel(f"no kernel takes {what}: {refusals}")
    if taken == "reference":
        warnings.warn(f"{what} runs on the slow float64 reference: {refusals}", stacklevel=2)
    return next(kernel for kernel in table() if kernel.name == taken)


def _forced(name: str, problem: Problem) -> Kernel:
    known = {kernel.name: kernel for kernel in table()}
    if name not in known:
        raise NoKernel(f"{FORCE}={name} names no kernel: known are {', '.join(known)}")
    refusal = known[name].refusal(problem)
    if refusal:
        raise NoKernel(f"{FORCE}={name} refuses m = {problem.m}, n = {problem.n}, k = {problem.k}: {refusal}")
    return known[name]
