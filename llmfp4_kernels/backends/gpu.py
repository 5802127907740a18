"""The GPUs that torch sees, as the CUDA and the Triton backends ask for them.

Each backend has a Machine of its own and goes through it: whoever replaces it, and what launches its kernels, runs the
same Python, checks and launch geometry elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..problem import Problem

LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Queue:
    """Where a call runs: the stream, and what the launch geometry depends on."""

    device: int
    multiprocessors: int
    overlap: bool
    """Kernels may start before the one before them has ended (sm_90 and later)."""
    stream: int


class Machine:
    """The GPUs that torch sees, by their index; None is the current one."""

    device_type = "cuda"
    ptx = torch.version.hip is None
    """Whether kernels may hold PTX."""

    def capability(self, index: int | None = None) -> tuple[int, int] | None:
        """Compute capability; None where there is no GPU."""
        return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None

    def multiprocessors(self, device: torch.device) -> int:
        return _properties(device.index).multi_processor_count

    def queue(self, device: torch.device) -> Queue:
        overlap, stream = _properties(device.index).major >= 9, torch.cuda.current_stream(device).cuda_stream
        return Queue(device.index, self.multiprocessors(device), overlap, stream)

    def capturing(self) -> bool:
        """Whether the current stream's work goes into a graph."""
        return torch.cuda.is_current_stream_capturing()

    def on(self, device: torch.device):
        """Makes `device` the current one for torch and for the launcher; a context manager."""
        return torch.cuda.device(device)


_properties = functools.cache(torch.cuda.get_device_properties)


def sm(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs what was compiled for an entry of CMAKE_CUDA_ARCHITECTURES: "80-real", "90", "120-virtual".

    Machine code ("real") runs on later GPUs of its generation, too, PTX ("virtual") on all later ones; both are in an
    entry that says neither. Code for "90a" runs on that architecture alone, for "100f" on later ones of its generation.
    CUDA C++ Programming Guide, "Application Compatibility".
    """
    number, _, kind = architecture.partition("-")
    digits = number.rstrip("af")
    major, minor = int(digits[:-1]), int(digits[-1])
    if number.endswith("a"):
        return (major, minor) == capability
    same_generation = major == capability[0] and minor <= capability[1]
    if number.endswith("f") or kind == "real":
        return same_generation
    return (major, minor) <= capability


def refusal_without(architecture: str, built: list[str]) -> str | None:
    """Why a kernel that is compiled for "90a" or another architecture alone is not in a module built for these."""
    if any(entry.startswith(architecture) for entry in built):
        return None
    return f"the native module was built for {', '.join(built)}, without {architecture}-real"


def unusable(problem: Problem, machine: Machine, missing: Callable[[], str | None]) -> str | None:
    """Why no kernel of a backend runs on the GPU that holds a problem; `missing` says what its software lacks."""
    if problem.device != "cuda":
        return f"runs on a GPU, the tensors are on {problem.device}"
    if lacking := missing():
        return lacking
    capability = machine.capability(problem.device_index)
    if capability is None:
        return "there is no GPU that torch can use"
    if machine.ptx and capability < LEAST_CAPABILITY:
        return f"this GPU is {sm(capability)}, the kernels need sm_80 (Ampere) or later"
    return None
