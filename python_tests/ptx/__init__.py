"""CUDA kernels on the CPU: their PTX, thread by thread, with every access checked.

    program = compile_cuda(source, "sm_80")
    program.run("gemm", grid=(2, 2), block=128, args=[In(a), In(b), Out(c), m, n, k], shared=32768)

`run` raises the first fault as one of the exceptions below, with kernel, block, thread, PTX line and both accesses.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from . import build
from .build import missing
from .kernels import KernelRecord, translate
from .program import Refusal

__all__ = [
    "FAULTS",
    "Fault",
    "In",
    "Out",
    "Program",
    "Refusal",
    "Report",
    "compile_cuda",
    "load",
    "missing",
    "tensor_map",
]


class Fault(Exception):
    """What a kernel did wrong."""


NAMES = [
    "OutOfBounds",
    "Misaligned",
    "Race",
    "Uninitialised",
    "MissingWait",
    "MissingFence",
    "DivergentBarrier",
    "DivergentWarp",
    "Deadlock",
    "TimeLimit",
    "Trap",
    "Misuse",
    "BadLaunch",
]
FAULTS = {name: type(name, (Fault,), {"__module__": __name__}) for name in NAMES}
globals().update(FAULTS)
__all__ += NAMES


@dataclass
class In:
    """Memory that the kernel may only read."""

    tensor: torch.Tensor


@dataclass
class Out:
    """Memory that is filled with 0xFF (NaN) at the launch and may not be read before it is written."""

    tensor: torch.Tensor


@dataclass
class Report:
    seconds: float
    switches: int  # between threads
    accesses: int
    unwritten: list[int]  # bytes of each Out that the kernel did not write


MODES = {In: 1, Out: 2}


class Program:
    def __init__(self, ptx: str):
        self.ptx = ptx
        self.kernels = translate(ptx)
        self.names = list(self.kernels)
        self.machine = build.runtime()
        self.machine.ptx_error.restype = self.machine.ptx_error_kind.restype = ctypes.c_char_p
        self.machine.ptx_run.restype = ctypes.c_bool
        self.machine.ptx_unwritten.restype = ctypes.c_size_t

    def run(self, kernel: str, grid, block, args, shared: int = 0, seed: int = 0, limit_s: float = 30.0) -> Report:
        """One launch. A tensor is memory to read and write; an int is a 32-bit parameter, a float an fp32 one, a
        ctypes object itself. seed 0: threads and blocks in order; other seeds: a random schedule each."""
        record = self.record(kernel)
        if record.params != len(args):
            raise FAULTS["BadLaunch"](f"kernel {kernel}: {len(args)} arguments for {record.params} parameters")
        outs = self.register(args)
        values = [parameter(a) for a in args]
        for i, v in enumerate(values):
            if ctypes.sizeof(v) != record.param[i].bytes:
                given = ctypes.sizeof(v)
                raise FAULTS["BadLaunch"](
                    f"kernel {kernel}: argument {i} has {given} bytes, the parameter {record.param[i].bytes}"
                )
        pointers = (ctypes.c_void_p * max(len(values), 1))(*(ctypes.addressof(v) for v in values))
        return self.start(record, grid, block, shared, pointers, outs, seed, limit_s)

    def launch(
        self, kernel: str, grid, block, shared: int, parameters, memory, seed=0, limit_s=30.0, late=()
    ) -> Report:
        """One launch as a CUDA launcher is asked for it. `parameters` is a C array of addresses of parameters,
        `memory` what exists: (address, bytes, name, In | Out | None for both). Kernels before may still be writing what
        is named in `late`: it may be touched after griddepcontrol.wait only."""
        record, outs = self.record(kernel), []
        self.machine.ptx_forget_memory()
        for i, (address, bytes, name, mode) in enumerate(memory):
            at = ctypes.c_void_p(address), ctypes.c_size_t(bytes)
            self.machine.ptx_memory(*at, name.encode(), MODES.get(mode, 0), ctypes.c_bool(name in late))
            outs += [i] if mode is Out else []
        return self.start(record, grid, block, shared, parameters, outs, seed, limit_s)

    def record(self, kernel: str) -> KernelRecord:
        if kernel not in self.names:
            raise FAULTS["BadLaunch"](f"no kernel {kernel}; there are {', '.join(self.names)}")
        return self.kernels[kernel].record

    def start(self, record, grid, block, shared, pointers, outs, seed, limit_s) -> Report:
        begin = time.perf_counter()
        done = self.machine.ptx_run(
            ctypes.byref(record),
            dim3(grid),
            dim3(block),
            ctypes.c_uint32(shared),
            pointers,
            ctypes.c_uint32(seed),
            ctypes.c_double(limit_s),
        )
        if not done:
            raise FAULTS[self.machine.ptx_error_kind().decode()](self.machine.ptx_error().decode())
        counters = (ctypes.c_uint64 * 2)()
        self.machine.ptx_counters(counters)
        unwritten = [self.machine.ptx_unwritten(ctypes.c_size_t(i)) for i in outs]
        return Report(time.perf_counter() - begin, counters[0], counters[1], unwritten)

    def register(self, args) -> list[int]:
        """Tells the machine which memory exists; the numbers of the outputs."""
        self.machine.ptx_forget_memory()
        outs, count = [], 0
        for i, a in enumerate(args):
            tensor = a.tensor if isinstance(a, (In, Out)) else a.of if isinstance(a, TensorMap) else a
            if not isinstance(tensor, torch.Tensor):
                continue
            if not tensor.is_contiguous() or tensor.device.type != "cpu":
                raise ValueError(f"argument {i} is not a contiguous CPU tensor")
            bytes = tensor.numel() * tensor.element_size()
            if bytes:
                name = f"argument {i}".encode()
                mode = 1 if isinstance(a, TensorMap) else MODES.get(type(a), 0)
                at = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(bytes)
                self.machine.ptx_memory(*at, name, mode, ctypes.c_bool(False))
                outs += [count] if isinstance(a, Out) else []
                count += 1
        return outs


@dataclass
class TensorMap:
    """A CUtensorMap parameter, and the tensor it describes."""

    of: torch.Tensor
    content: ctypes.Array


def tensor_map(tensor: torch.Tensor, box, swizzle: int = 0) -> TensorMap:
    """Boxes of a contiguous tensor for TMA loads; box is innermost first, swizzle in bytes (0, 32, 64, 128)."""
    content = (ctypes.c_uint8 * 128)()
    dims = [*reversed(tensor.shape)]
    strides = [s * tensor.element_size() for s in reversed(tensor.stride())][1:]
    if len(box) != len(dims):
        raise ValueError(f"a box of {len(box)} dimensions for a tensor of {len(dims)}")
    build.runtime().ptx_tensor_map(
        content,
        ctypes.c_void_p(tensor.data_ptr()),
        ctypes.c_uint32(tensor.element_size()),
        ctypes.c_uint32(len(dims)),
        (ctypes.c_uint64 * 5)(*dims),
        (ctypes.c_uint64 * 5)(*strides),
        (ctypes.c_uint32 * 5)(*box),
        ctypes.c_uint32({0: 0, 32: 1, 64: 2, 128: 3}[swizzle]),
    )
    return TensorMap(tensor, content)


def parameter(a):
    if isinstance(a, (In, Out)):
        a = a.tensor
    if isinstance(a, torch.Tensor):
        return ctypes.c_uint64(a.data_ptr())
    if isinstance(a, TensorMap):
        return a.content
    if isinstance(a, float):
        return ctypes.c_float(a)
    return ctypes.c_int32(a) if isinstance(a, int) else a


def dim3(n):
    n = (n,) if isinstance(n, int) else tuple(n)
    return (ctypes.c_uint32 * 3)(*n, *(1,) * (3 - len(n)))


def compile_cuda(source: str | Path, arch: str = "sm_80", options: tuple[str, ...] = ()) -> Program:
    """The kernels of CUDA C++ text, or of a .cu file."""
    if isinstance(source, Path):
        options = (*options, "-I", str(source.parent))
        source = source.read_text()
    return Program(build.ptx(source, arch, options))


def load(path: str | Path) -> Program:
    """The kernels of a .ptx file, or of the PTX in a cubin, object or library."""
    path = Path(path)
    return Program(path.read_text() if path.suffix == ".ptx" else build.ptx_of_cubin(path))
