"""The Triton backend on the PTX machine: its Python, Triton's own launch path and compiler, and the PTX they make.

    with OnCpu() as gpu:
        y = gpu.run(prepared, "triton.gemv", x)
        gpu.later(prepared, "triton.gemm", x, judge)  # judge(y) when the block is left

Launches wait until somebody wants their results, while threads make Programs of their kernels.

Two things are put in the place of the GPU's: `machine.here`, and Triton's driver, which names the architecture that is
compiled for and is handed grid, kernel and arguments of each launch.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from ptx import In, Out, Program, build

from llmfp4_kernels.backends import measured
from llmfp4_kernels.backends.triton import configs, machine, tuned
from llmfp4_kernels.problem import Kernel

os.environ.setdefault("TRITON_CACHE_DIR", str(build.CACHE.parent / "triton"))
os.environ[measured.FOLDER] = str(build.CACHE.parent / "no-measured-tiles")
WHY_NOT = machine.problem_with_triton() or build.cannot_run()
READ_ONLY = {
    "product": ("codes", "x", "row_scale", "bias", "x_scale", "scales"),
    "add_splits": ("partial", "row_scale", "bias", "x_scale"),
    "quantize": ("x", "shift", "x_factor"),
    "split": ("x", "factor"),
}
"""What a kernel may not write. Its other tensors it may not read, and must write whole."""
SMALL = configs.Config(rows=32, tokens=8, block_k=64, warps=2, stages=3)
"""A tile whose PTX is short: making it is most of a test's time."""
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
C_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class CpuMachine:
    device_type = "cpu"

    def __init__(self, capability=(8, 0), multiprocessors: int = 2, ptx: bool = True):
        self.arch, self.count, self.ptx = capability, multiprocessors, ptx

    def capability(self, index=None):
        return self.arch

    def multiprocessors(self, device):
        return self.count

    def on(self, device):
        return contextlib.nullcontext()


compiler = ThreadPoolExecutor(2)
"""Programs are made in its threads, while Triton compiles the next kernel in ours."""
_programs: dict[str, Future] = {}


def program(ptx: str) -> Future:
    """The Program of a kernel, compiled once."""
    if ptx not in _programs:
        _programs[ptx] = compiler.submit(Program, ptx)
    return _programs[ptx]


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
            load_binary=lambda name, kernel, shared, device: (1, (self.ptx, kernel), 0, 0, 1024),
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


@dataclass
class Launch:
    name: str
    grid: tuple[int, int, int]
    metadata: object
    ptx: str
    cubin: bytes
    arguments: list
    outs: list[str]


class OnCpu:
    """While it is entered, Triton launches run on the PTX machine, in tiles of `config` (None: those of tuned.choose);
    seed as Program.run's. `static`: launches are kept, and none runs."""

    current: OnCpu | None = None

    def __init__(
        self, capability=(8, 0), multiprocessors=2, seed=0, config=SMALL, ptx=True, static=False, limit_s=60.0
    ):
        self.machine, self.seed, self.limit_s = CpuMachine(capability, multiprocessors, ptx), seed, limit_s
        self.driver, self.config, self.static = CpuDriver(capability), config, static
        self.launched: list[Launch] = []
        self.waiting: list[Launch] = []
        self.judges = []

    def __enter__(self):
        from triton import knobs
        from triton.runtime import driver

        self.before = machine.here, driver._active, tuned.choose
        machine.here = self.machine
        if self.config:
            tuned.choose = self._fixed
        driver.set_active(self.driver)
        knobs.runtime.kernel_load_start_hook.add(self.driver.loads)
        OnCpu.current = self
        return self

    def __exit__(self, kind, error, trace):
        from triton import knobs
        from triton.runtime import driver

        machine.here, driver._active, tuned.choose = self.before
        knobs.runtime.kernel_load_start_hook.remove(self.driver.loads)
        OnCpu.current = None
        if kind is None:
            self.flush()

    def _fixed(self, form, m, device):
        splits = configs.splits(self.config, form, m, self.machine.count)
        return tuned.Choice(dataclasses.replace(self.config, splits=splits), "given")

    def launch(self, function, grid, metadata, types, arguments) -> None:
        ptx, cubin = function
        values, outs = [], []
        for argument, value in arguments.items():
            if isinstance(value, torch.Tensor):
                # Where sums are split, y is another kernel's to write.
                foreign = argument == "y" and metadata.name == "product" and "partial" in arguments
                read = argument in READ_ONLY[metadata.name] or foreign
                outs += [] if read else [argument]
                values.append(In(value) if read else Out(value))
            else:
                values.append(C_TYPES[types[argument]](value))
        self.launched.append(Launch(metadata.name, grid, metadata, ptx, cubin, values, outs))
        if not self.static:
            program(ptx)
            self.waiting.append(self.launched[-1])

    def flush(self) -> None:
        """Runs what waits, in order; every byte of every output must be written."""
        waiting, self.waiting, judges, self.judges = self.waiting, [], self.judges, []
        for one in waiting:
            compiled = program(one.ptx).result()
            # Triton adds pointers to scratch memory, null here.
            scratch = [ctypes.c_uint64(0)] * (compiled.record(one.name).params - len(one.arguments))
            report = compiled.run(
                one.name, one.grid, 32 * one.metadata.num_warps, one.arguments + scratch, one.metadata.shared,
                self.seed, self.limit_s,
            )  # fmt: skip
            left = {argument: bytes for argument, bytes in zip(one.outs, report.unwritten) if bytes}
            assert not left, f"{one.name} has left bytes unwritten: {left}"
        for judge in judges:
            judge()

    def later(self, prepared, kernel: str, x: torch.Tensor, judge) -> list[Launch]:
        """prepared.run; judge(y) at the next flush, at the latest when this is left. The launches it takes."""
        self.launched = []
        y = prepared.run(Kernel(kernel, "pairs", lambda p: None, type(prepared)), x)
        self.judges += [] if self.static else [lambda: judge(y)]
        return self.launched

    def run(self, prepared, kernel: str, x: torch.Tensor) -> torch.Tensor:
        """prepared.run at once."""
        results = []
        self.later(prepared, kernel, x, results.append)
        self.flush()
        return results[0]
