"""The compiled module, loaded on first use so that importing the package is silent and quick."""

from __future__ import annotations

import functools

from .errors import NoKernel


@functools.cache
def problem_with_module() -> str | None:
    """Why the native module cannot be used, or None."""
    try:
        from . import _C  # noqa: F401
    except ImportError as error:
        return f"the native module is not built for this Python ({error}): run 'pip install .' with a C++17 compiler"
    return None


def module():
    """The pybind11 module `_C`; raises NoKernel with the reason when it is missing."""
    reason = problem_with_module()
    if reason:
        raise NoKernel(reason)
    from . import _C

    return _C


@functools.cache
def cpu_kernels() -> dict[str, dict]:
    """Rows of the C++ kernel table by name: what each needs and whether this CPU has it."""
    return {row["name"]: row for row in module().kernels()}


@functools.cache
def problem_with_cuda() -> str | None:
    """Why the native module has no CUDA kernels to offer, or None. Whether there is a GPU is another question."""
    if problem_with_module():
        return problem_with_module()
    if not module().cuda_architectures:
        return (
            "the native module was built without nvcc: run 'pip install .' where nvcc is on PATH or in /usr/local/cuda"
        )
    return None
