"""Where Triton kernels run. They go through `here` and through Triton's driver: whoever replaces both runs the same
Python, checks and launch geometry elsewhere."""

from __future__ import annotations

import functools
import importlib

import torch

LEAST_VERSION = (3, 6)


class Machine:
    """The GPUs that torch sees."""

    device_type = "cuda"
    ptx = torch.version.hip is None
    """Whether kernels may hold PTX."""

    def capability(self) -> tuple[int, int] | None:
        """Of the current GPU; None without one."""
        return torch.cuda.get_device_capability() if torch.cuda.is_available() else None

    def multiprocessors(self, device: torch.device) -> int:
        return _properties(device.index).multi_processor_count

    def on(self, device: torch.device):
        """Makes `device` the current one for torch and for Triton; a context manager."""
        return torch.cuda.device(device)


here = Machine()
_properties = functools.cache(torch.cuda.get_device_properties)


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
