"""backends/cuda.py on the PTX machine: its Python, its checks, its launch geometry, and the PTX of its kernels.

    with OnCpu() as gpu:
        y = gpu.run(prepared, "cuda.gemv", x)

Two things are put in the place of CUDA's: `cuda.machine`, which names the device and the stream, and the native
module's launcher, which is handed grid, block, shared memory and parameters of each launch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from ptx import FAULTS, In, Out, Program, build
from torch.utils._python_dispatch import TorchDispatchMode

from llmfp4_kernels import native
from llmfp4_kernels.backends import cuda
from llmfp4_kernels.problem import Kernel

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = {  # architecture: what is compiled for it here
    "sm_80": sorted(p for p in (CSRC / "cuda").glob("*.cu") if p.stem not in ("runtime", "gemm_sm90", "gemm_sm120")),
    "sm_90a": [CSRC / "cuda" / "activations.cu", CSRC / "cuda" / "gemm_sm90.cu"],
    "sm_120a": [CSRC / "cuda" / "gemm_sm120.cu"],
}


class Launch(ctypes.Structure):
    """csrc/cuda/launch.h's."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
        ("overlap", ctypes.c_uint32),
        ("device", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
    ]


LAUNCHER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Launch), ctypes.POINTER(ctypes.c_void_p))


def headers_key() -> str:
    return build.digest(*(p.read_text() for p in sorted(CSRC.glob("c*/*.h"))))


def ptx_of_file(source: Path, arch: str) -> str:
    """The PTX of a .cu file of csrc/cuda."""
    options = ("-I", str(source.parent), f"-DHEADERS={headers_key()}")
    return build.ptx(source.read_text(), arch, options)


def program_of(source: Path, arch: str) -> Program:
    return Program(ptx_of_file(source, arch))


def all_kernels(arch: str = "sm_80") -> list[Program]:
    """Of every .cu file, compiled once; nvcc of two files runs side by side."""
    return _all_kernels(arch)


@functools.cache
def _all_kernels(arch: str) -> list[Program]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda source: program_of(source, arch), SOURCES[arch]))


class CpuMachine:
    device_type, ptx = "cpu", True

    def __init__(self, multiprocessors: int = 2, capability: tuple[int, int] = (8, 0)):
        self.count, self._capability = multiprocessors, capability

    def capability(self, index):
        return self._capability

    def multiprocessors(self, device):
        return self.count

    def queue(self, device):
        return cuda.Queue(0, self.count, self._capability >= (9, 0), 0)

    def capturing(self):
        return False

    def on(self, device):
        return contextlib.nullcontext()


class Allocations(TorchDispatchMode):
    """Every tensor that is made meanwhile."""

    def __init__(self):
        super().__init__()
        self.made: list[torch.Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.made.append(result)
        return result


class OnCpu:
    """While it is entered, CUDA launches run on the PTX machine; seed as Program.run's.

    `instead` names the kernels of `programs` that run in place of others.
    """

    def __init__(
        self, programs: list[Program], multiprocessors=2, seed=0, limit_s=60.0, instead=None, capability=(8, 0)
    ):
        self.programs = {name: program for program in programs for name in program.names}
        self.instead = instead or {}
        self.machine, self.seed, self.limit_s = CpuMachine(multiprocessors, capability), seed, limit_s
        self.launched: list[str] = []
        self.grids: list[tuple[int, int, int]] = []

    def __enter__(self):
        self.before, cuda.machine = cuda.machine, self.machine
        cuda._counters.clear()
        self.callback = LAUNCHER(self.launch)
        native.module().set_cuda_launcher(ctypes.cast(self.callback, ctypes.c_void_p).value)
        return self

    def __exit__(self, *_):
        cuda.machine = self.before
        cuda._counters.clear()
        native.module().set_cuda_launcher(0)

    def run(
        self, prepared: cuda.Prepared, kernel: str, x: torch.Tensor, residual: torch.Tensor | None = None, gated=False
    ) -> torch.Tensor:
        """prepared.run with a fresh, poisoned y, of which every byte must have been written."""
        self.prepared, self.kernel, self.x, self.fault, self.launched, self.grids = prepared, kernel, x, None, [], []
        self.residual, self.columns = residual, prepared.n // 2 if gated else prepared.n
        with Allocations() as self.allocations:
            try:
                y = prepared.run(Kernel(kernel, "units", lambda p: None, cuda.Prepared), x, residual, gated)
            except RuntimeError:
                raise self.fault or AssertionError("a launch failed without a fault") from None
        counters = [c for known in cuda._counters.values() for c in known]
        assert all(not c.any() for c in counters), "a counter of arrived blocks is not 0 again"
        return y

    def memory(self, name: str):
        """What a launch may touch, and how."""
        made = self.allocations.made
        m = self.x.numel() // self.prepared.k
        plan = self.prepared.plans[self.kernel.removeprefix("cuda."), m, cuda.DTYPES[self.x.dtype]]
        shape = (*self.x.shape[:-1], self.columns)
        y = next(t for t in reversed(made) if t.dtype == self.x.dtype and t.shape == shape)
        workspace = next(t for t in reversed(made) if t.dtype == torch.uint8 and t.numel() == plan.bytes)
        whole = self.x.is_contiguous() and self.x.data_ptr() % 16 == 0
        like_x = (t for t in made if t.shape == self.x.shape and t.dtype == self.x.dtype)
        # A copy is made before y, which may look the same.
        x = self.x if whole else next(t for t in like_x if t.is_contiguous() and t.data_ptr() % 16 == 0)
        first = name.endswith("activations")
        known = [(t, n, In) for n, t in self.prepared.tensors.items()] + [(x, "x", In)]
        counters = [c for known in cuda._counters.values() for c in known]
        counters += [t for t in made if t.dtype == torch.int32 and t.ndim == 1 and all(t is not c for c in counters)]
        known += [(c, "counters", None) for c in counters]
        if not first:
            known.append((y, "y", Out))
            known += [(self.residual, "residual", In)] if self.residual is not None else []
        rows = [(t.data_ptr(), t.numel() * t.element_size(), n, mode) for t, n, mode in known]
        at, modes = workspace.data_ptr(), (Out, Out, None) if first else (In, In, Out)
        for bytes, what, mode in zip(plan.parts, ("operands", "x_scale", "partial"), modes):
            rows.append((at, bytes, what, mode))
            at += bytes
        return [row for row in rows if row[1]]

    def early(self) -> set[str]:
        """What may be read while the kernel before still runs: weights and biases."""
        return set(self.prepared.tensors)

    def launch(self, launch, parameters) -> int:
        one = launch.contents
        name = one.name.decode()
        self.launched.append(name)
        self.grids.append(tuple(one.grid))
        try:
            if name not in self.programs:
                raise FAULTS["BadLaunch"](f"no PTX of kernel {name}")
            memory = self.memory(name)
            program = self.programs[self.instead.get(name, name)]
            static = program.record(self.instead.get(name, name)).static_shared
            assert static <= 1 << 10, f"kernel {name} declares {static} bytes, of 48 KB runtime.cu leaves it 1 KB"
            report = program.launch(
                self.instead.get(name, name),
                tuple(one.grid),
                one.block,
                one.shared,
                parameters,
                memory,
                self.seed,
                self.limit_s,
                {row[2] for row in memory} - self.early() if one.overlap else (),
            )
            outs = [row for row in memory if row[3] is Out]
            unwritten = [count for row, count in zip(outs, report.unwritten) if row[2] == "y"]
            assert not any(unwritten), f"kernel {name} left {unwritten} bytes of y unwritten"
        except BaseException as fault:
            self.fault = fault
            return 1
        return 0
