"""Where Triton kernels run. They go through `here` and through Triton's driver: whoever replaces both runs the same
Python, checks and launch geometry elsewhere."""

from __future__ import annotations

import functools
import importlib

from ..gpu import Machine

LEAST_VERSION = (3, 6)
FENCED = (3, 9)
"""Triton from this version on puts fence.proxy.async between cp.async and the tensor cores that read shared memory by
themselves (wgmma, tcgen05). 3.6.0 does not, and they may read before the copy is visible."""
here = Machine()


@functools.cache
def version() -> tuple[int, int]:
    """Major and minor version of Triton; raises ImportError without it."""
    major, minor, *_ = importlib.import_module("triton").__version__.split(".")
    return int(major), int(minor)


@functools.cache
def problem_with_triton() -> str | None:
    """Why Triton cannot be used, or None."""
    try:
        found = version()
    except ImportError as error:
        return f"Triton is not there ({error}): pip install triton"
    least = ".".join(map(str, LEAST_VERSION))
    return None if found >= LEAST_VERSION else f"Triton {found[0]}.{found[1]} is older than {least}"
