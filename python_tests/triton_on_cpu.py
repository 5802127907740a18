"""The Triton backend on the PTX machine: its Python, Triton's own launch path and compiler, and the PTX they make.

    with OnCpu() as gpu:
        y = gpu.run(prepared, "triton.gemv", x)

Two things are put in the place of the GPU's: `machine.here`, and Triton's driver, which names the architecture that is
compiled for and is handed grid, kernel and arguments of each launch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from ptx import In, Out, Program, build, missing

from llmfp4_kernels.backends.triton import configs, machine
from llmfp4_kernels.problem import Kernel

os.environ.setdefault("TRITON_CACHE_DIR", str(build.CACHE.parent / "triton"))
WHY_NOT = machine.problem_with_triton() or missing()
READ_ONLY = {
    "product": ("codes", "x", "row_scale", "bias", "x_scale", "scales"),
    "add_splits": ("partial", "row_scale", "bias", "x_scale"),
    "quantize": ("x", "shift", "x_factor"),
    "split": ("x", "factor"),
}
"""What a kernel may not write. Its other tensors it may not read, and must write whole."""
SMALL = configs.Config(rows=32, tokens=16, block_k=64, warps=2, stages=3)
"""A tile whose PTX is short: translating it is most of a test's time."""
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
C_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class CpuMachine:
    device_type = "cpu"

    def __init__(self, capability=(8, 0), multiprocessors: int = 2, ptx: bool = True):
        self.arch, self.count, self.ptx = capability, multiprocessors, ptx

    def capability(self):
        return self.arch

    def multiprocessors(self, device):
        return self.count

    def on(self, device):
        return contextlib.nullcontext()


@functools.cache
def program(ptx: str) -> Program:
    return Program(ptx)


class Launcher:
    """What Triton makes for each compiled kernel, and calls for each launch."""

    def __init__(self, source, metadata):
        self.types = dict(source.signature)
        self.names = [name for name, type in self.types.items() if type != "constexpr"]
        self.metadata, self.all_names = metadata, list(self.types)

    def __call__(self, x, y, z, stream, function, packed, launch, enter, leave, *values):
        arguments = {n: v for n, v in zip(self.all_names, values, strict=True) if n in self.names}
        OnCpu.current.launch(function, (x, y, z), self.metadata, self.types, arguments)


class CpuDriver:
    """As much of a Triton driver as a launch asks for. Devices are numbered by architecture."""

    launcher_cls = Launcher

    def __init__(self, capability):
        self.arch = 10 * capability[0] + capability[1]
        self.ptx = ""
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_LIMIT[device]},
            load_binary=lambda name, kernel, shared, device: (1, self.ptx, 0, 0, 1024),
        )

    def loads(self, module, function, name, files, hash):
        """Called before load_binary, which is given machine code only."""
        self.ptx = Path(files[f"{name}.ptx"]).read_text()

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


class OnCpu:
    """While it is entered, Triton launches run on the PTX machine, in tiles of `config` (None: those of configs.py);
    seed as Program.run's."""

    current: OnCpu | None = None

    def __init__(self, capability=(8, 0), multiprocessors=2, seed=0, config=SMALL, ptx=True, limit_s=60.0):
        self.machine, self.seed, self.limit_s = CpuMachine(capability, multiprocessors, ptx), seed, limit_s
        self.driver, self.config, self.launched = CpuDriver(capability), config, []

    def __enter__(self):
        from triton import knobs
        from triton.runtime import driver

        self.before = machine.here, driver._active, configs.choose
        machine.here = self.machine
        if self.config:
            configs.choose = lambda *_: self.config
        driver.set_active(self.driver)
        knobs.runtime.kernel_load_start_hook.add(self.driver.loads)
        OnCpu.current = self
        return self

    def __exit__(self, *_):
        from triton import knobs
        from triton.runtime import driver

        machine.here, driver._active, configs.choose = self.before
        knobs.runtime.kernel_load_start_hook.remove(self.driver.loads)
        OnCpu.current = None

    def run(self, prepared, kernel: str, x: torch.Tensor) -> torch.Tensor:
        """prepared.run, of whose launches every byte of every output must have been written."""
        self.launched = []
        return prepared.run(Kernel(kernel, "pairs", lambda p: None, type(prepared)), x)

    def launch(self, ptx, grid, metadata, types, arguments) -> None:
        name = metadata.name
        self.launched.append((name, grid, ptx))
        values, outs = [], []
        for argument, value in arguments.items():
            if isinstance(value, torch.Tensor):
                # Where sums are split, y is another kernel's to write.
                read = argument in READ_ONLY[name] or (argument == "y" and name == "product" and "partial" in arguments)
                outs += [] if read else [argument]
                values.append(In(value) if read else Out(value))
            else:
                values.append(C_TYPES[types[argument]](value))
        compiled = program(ptx)
        scratch = compiled.record(name).params - len(values)  # Triton adds pointers to scratch memory, null here
        values += [ctypes.c_uint64(0)] * scratch
        threads = 32 * metadata.num_warps
        report = compiled.run(name, grid, threads, values, metadata.shared, self.seed, self.limit_s)
        left = {argument: bytes for argument, bytes in zip(outs, report.unwritten) if bytes}
        assert not left, f"{name} has left bytes unwritten: {left}"
