"""The table of kernels, best first, and the only dispatcher."""

from __future__ import annotations

import os
import warnings

from .backends import cpu, cuda, cuda_options, cuda_sm120, reference, rounded, triton
from .errors import NoKernel
from .problem import FORCE, Kernel, Problem


def table() -> tuple[Kernel, ...]:
    """Every kernel, in the order in which they are asked."""
    on_gpu = cuda.KERNELS + cuda_options.KERNELS + cuda_sm120.KERNELS + triton.KERNELS
    return cpu.KERNELS + rounded.KERNELS + on_gpu + reference.KERNELS


def walk(problem: Problem) -> list[tuple[Kernel, str | None]]:
    """Every kernel and its refusal, or None."""
    return [(kernel, kernel.refusal(problem)) for kernel in table()]


def explain(problem: Problem) -> list[tuple[str, str | None]]:
    """What each kernel answers: a refusal, or None. Of the latter `best` runs, unless LLMFP4_KERNEL names others."""
    return [(kernel.name, why) for kernel, why in walk(problem)]


def allowed(name: str) -> bool:
    """Whether LLMFP4_KERNEL names this row or its family, or nothing."""
    return os.environ.get(FORCE) in (None, "", name, name.split(".")[0])


def epilogue_of(kernel: str) -> str:
    """Where a residual and SwiGLU follow a kernel's sums: "fused" into it, or "composed" from its fp32 product."""
    return "fused" if {row.name: row for row in table()}[kernel].fuses_epilogue else "composed"


def layout_for(problem: Problem) -> str:
    """The layout that the kernel of a problem reads; where the forced kernel refuses, the first one's that does not.

    Raises NoKernel if all refuse.
    """
    taken = [kernel for kernel, why in walk(problem) if why is None]
    named = [kernel for kernel in taken if allowed(kernel.name)]
    first = best(problem, named or taken)
    return (first or choose(problem)).layout


def best(problem: Problem, taken: list[Kernel]) -> Kernel | None:
    """Of the rows that take a problem: the first, or where that is a CUDA row the one that was measured fastest."""
    if not taken or not taken[0].name.startswith("cuda."):
        return next(iter(taken), None)
    measured = cuda.fastest(problem, [kernel.name for kernel in taken])
    return next((kernel for kernel in taken if measured and kernel.name == measured.config.kernel), taken[0])


def choose(problem: Problem) -> Kernel:
    """The best kernel that takes the problem, of those that LLMFP4_KERNEL allows.

    Raises NoKernel if it allows none that is known, or if all of them refuse.
    """
    if name := forced():
        return _choose_of(name, problem)
    walked = walk(problem)
    refusals = "; ".join(f"{kernel.name}: {why}" for kernel, why in walked if why)
    taken = best(problem, [kernel for kernel, why in walked if why is None])
    what = f"{problem.scheme} m = {problem.m}, n = {problem.n}, k = {problem.k}"
    if taken is None:
        raise NoKernel(f"no kernel takes {what}: {refusals}")
    if taken.name == "reference":
        warnings.warn(f"{what} runs on the slow float64 reference: {refusals}", stacklevel=2)
    return taken


def forced() -> str | None:
    """What LLMFP4_KERNEL names, None where it is unset or empty. Raises NoKernel where no row is of that name."""
    name = os.environ.get(FORCE)
    if name and not any(allowed(kernel.name) for kernel in table()):
        raise NoKernel(f"{FORCE}={name} names no kernel: known are {', '.join(kernel.name for kernel in table())}")
    return name or None


def _choose_of(name: str, problem: Problem) -> Kernel:
    rows = [kernel for kernel in table() if allowed(kernel.name)]
    refusals = {kernel.name: kernel.refusal(problem) for kernel in rows}
    taken = best(problem, [kernel for kernel in rows if refusals[kernel.name] is None])
    if taken is None:
        why = "; ".join(f"{row}: {why}" for row, why in refusals.items()) if len(rows) > 1 else refusals[rows[0].name]
        raise NoKernel(f"{FORCE}={name} refuses m = {problem.m}, n = {problem.n}, k = {problem.k}: {why}")
    return taken
