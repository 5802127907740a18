"""The CUDA kernels as rows of the registry. They share one layout, so a layer may use several, chosen by m.

A row cuda.NAME is the file csrc/cuda/NAME.h or gemm_NAME.h. Its kernels go through `machine` below and through the
native module's launcher: whoever replaces both runs the same Python, checks and launch geometry elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container

import torch

from .. import native
from ..errors import BadInput, NoKernel
from ..formats import E8M0
from ..layout import to_layout
from ..packed import PackedFP4
from ..problem import Kernel, Problem
from . import cuda_choices, cuda_sm90
from .cpu import largest_k
from .cuda_choices import Form, planes
from .gpu import Machine, Queue, runs_on, sm, unusable
from .measured import Choice

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
GEMV_ROWS = 16
GROUPS = (16, 32, 64, 128, 256, 512)
"""Inputs that may share a group scale: whole multiples of what a lane holds."""
GRID_LIMIT = 65535
"""Tiles of 64 outputs, or blocks of 256 inputs that become operands, along one side of a grid."""
machine = Machine()
_counters: dict[tuple[int, int], list[torch.Tensor]] = {}


def _arrived(queue: Queue, count: int, device: torch.device) -> torch.Tensor | None:
    """`count` counters of this stream, zeros between kernels. Never freed: a captured graph may hold them.

    What is made while a graph is captured belongs to that graph, whose replays alone make it zeros: it is not kept.
    """
    if count == 0:
        return None
    known = _counters.setdefault((queue.device, queue.stream), [])
    if known and known[-1].numel() >= count:
        return known[-1]
    made = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    if not machine.capturing():
        known.append(made)
    return made


def relative_scales(packed: PackedFP4) -> tuple[torch.Tensor, torch.Tensor]:
    """(group_scale, row_scale): E8M0 bytes relative to the row's largest, which is 127 (1.0) then and goes into
    row_scale, so that fp16 holds them. Others as they are."""
    scales, row_scale = packed.group_scale, packed.row_scale
    if packed.scale != E8M0:
        return scales, row_scale
    largest = scales.amax(1, keepdim=True)
    scales = (scales.int() + 127 - largest).clamp(min=0).to(torch.uint8)
    return scales, torch.ldexp(row_scale, largest[:, 0].int() - 127)


def shuffle_group_scales(packed: PackedFP4) -> tuple[torch.Tensor, torch.Tensor]:
    """(relative scales uint8 [ceil(n/16), groups of padded k, 8, 2], row_scale): outputs g and g + 8 of a strip side by
    side."""
    scales, row_scale = relative_scales(packed)
    n, k = packed.shape
    groups = -(-(-(-k // 64) * 64) // packed.group_size)
    scales = torch.nn.functional.pad(scales, (0, groups - scales.shape[1], 0, -n % 16))
    return scales.view(-1, 2, 8, groups).permute(0, 3, 2, 1).contiguous(), row_scale


class Prepared:
    """Units, scales and bias of one weight, and the C++ object that holds their addresses; what was measured of such
    products is read here, not at a call."""

    measured: cuda_choices.Known | None = None
    """None: nothing is, of products like this weight's."""

    def __init__(self, packed: PackedFP4, bias: torch.Tensor | None):
        packed = to_layout(packed, "units")
        self.problem = Problem.of(packed, 1, torch.float32)
        self.n, self.k = packed.shape
        self.device, self.plans = packed.codes.device, {}
        self.tensors = {"codes": packed.codes.contiguous(), "row_scale": packed.row_scale.contiguous()}
        if packed.scale:
            self.tensors["group_scale"], self.tensors["row_scale"] = shuffle_group_scales(packed)
        if bias is not None:
            self.tensors["bias"] = bias.detach().float().contiguous()
        self._linear = native.module().CudaLinear(
            n=self.n,
            k=self.k,
            element=packed.element.fields,
            scale=packed.scale.name if packed.scale else "none",
            group_size=packed.group_size,
            **{name: tensor.data_ptr() for name, tensor in self.tensors.items()},
        )
        if packed.activation:
            self._quantize_activations(packed)
        elif packed.x_factor is not None or packed.shift is not None:
            ones = torch.ones(self.k, device=self.device) if packed.x_factor is None else packed.x_factor
            factor = ones if packed.shift is None else torch.ldexp(ones, -packed.shift.int())
            shift_alone = {} if packed.x_factor is not None else {"shift": self._padded("shift", packed.shift, 0)}
            self._linear.scale_activations(self._padded("x_factor", factor, 0), **shift_alone)
        self._check_devices()
        self.measured = measured_here(self.device)

    def _padded(self, name: str, per_input: torch.Tensor, filler: int) -> int:
        """Address of a tensor [k] padded to whole units."""
        self.tensors[name] = torch.nn.functional.pad(per_input, (0, -self.k % 64), value=filler)
        return self.tensors[name].data_ptr()

    def _quantize_activations(self, packed: PackedFP4):
        given = {"shift": packed.shift, "x_factor": packed.x_factor}
        self._linear.quantize_activations(
            packed.activation.fields,
            0.0 if packed.dynamic else packed.x_scale.item(),
            packed.dynamic.group_size if packed.dynamic else 0,
            **{name: self._padded(name, tensor, 0) for name, tensor in given.items() if tensor is not None},
        )

    def _check_devices(self):
        others = {name: t.device for name, t in self.tensors.items() if t.device != self.device}
        if self.device.type != machine.device_type or others:
            raise NoKernel(f"the CUDA kernels take tensors on one GPU: codes are on {self.device}, others on {others}")

    def run(
        self, kernel: Kernel, x: torch.Tensor, residual: torch.Tensor | None = None, gated: bool = False
    ) -> torch.Tensor:
        """As ops.linear, on torch's current stream; nothing waits for the GPU."""
        if x.device != self.device:
            raise BadInput(f"x is on {x.device}, the weight on {self.device}")
        x = x.contiguous()
        x = x.clone() if x.data_ptr() % 16 else x
        m, name, queue = x.numel() // self.k, kernel.name.removeprefix("cuda."), machine.queue(self.device)
        y = torch.empty((*x.shape[:-1], self.n // 2 if gated else self.n), dtype=x.dtype, device=x.device)
        residual = None if residual is None else residual.contiguous()
        if m == 0:
            return y
        dtype = DTYPES[x.dtype]
        plan = self.plans.get((name, m, dtype))
        if plan is None:
            plan = self.plans[name, m, dtype] = self.plan(name, m, x.dtype, queue.multiprocessors)
        workspace = torch.empty(plan.bytes, dtype=torch.uint8, device=x.device)
        arrived = _arrived(queue, plan.counters, x.device)
        with machine.on(self.device):
            self._linear.run(
                name, plan, x.data_ptr(), y.data_ptr(), m, dtype, workspace.data_ptr(),
                0 if arrived is None else arrived.data_ptr(), queue.device, queue.overlap, queue.stream,
                0 if residual is None else residual.data_ptr(), gated,
            )  # fmt: skip
        return y

    def plan(self, name: str, m: int, dtype: torch.dtype, multiprocessors: int, forced: tuple[int, int] | None = None):
        """CudaPlan of the row cuda.NAME: in the forced (tile, splits), else the measured, else the counted ones.

        Raises ValueError where the product does not have those.
        """
        if forced is None and self.measured:
            form = Form.of(dataclasses.replace(self.problem, dtype=dtype))
            found = cuda_choices.choose(self.measured, form, m, (f"cuda.{name}",), multiprocessors)
            forced = found and (found[0].tile, found[0].splits)
        return self._linear.plan(name, m, DTYPES[dtype], multiprocessors, *(forced or ()))


def measured_here(device: torch.device) -> cuda_choices.Known:
    """What was measured on a GPU."""
    return cuda_choices.known(machine, torch.device(machine.device_type, device.index))


def fastest(problem: Problem, kernels: Container[str]) -> Choice | None:
    """The measured row of the registry and its tile, for a problem that these rows take."""
    device = torch.device(machine.device_type, problem.device_index)
    known = measured_here(device)
    if not known.files:
        return None
    found = cuda_choices.choose(known, Form.of(problem), problem.m, kernels, machine.multiprocessors(device))
    return found and Choice(*found)


def tile(name: str, problem: Problem) -> Choice | None:
    """The tile in which the row `name` runs a problem that it takes, and where it is from; None of options."""
    if name not in cuda_choices.NAMES:
        return None
    if measured := fastest(problem, (name,)):
        return measured
    device = torch.device(machine.device_type, problem.device_index)
    plan = cuda_choices.division(name, Form.of(problem), problem.m, machine.multiprocessors(device))
    return Choice(cuda_choices.tile_of(name, plan), measured_here(device).lacking)


def operand(name: str, problem: Problem) -> str:
    """The type that the row `name` multiplies a problem in."""
    return Form.of(problem).operand


def _unusable(problem: Problem) -> str | None:
    """Why no CUDA kernel runs here, whatever it multiplies."""
    why = unusable(problem, machine, native.problem_with_cuda)
    return why or _refusal_of_machine_code(machine.capability(problem.device_index))


def _refusal_of_machine_code(capability: tuple[int, int]) -> str | None:
    built = native.module().cuda_architectures
    # What is built for 90a and 120a is cuda.sm90 and cuda.sm120 alone.
    if any(runs_on(architecture, capability) for architecture in built if not architecture.startswith(("90a", "120a"))):
        return None
    number = "".join(map(str, capability))
    return (
        f"this GPU is {sm(capability)}, the native module was built for {', '.join(built)}: build it with "
        f"LLMFP4_CUDA_ARCHITECTURES={number}"
    )


def refusal(name: str, problem: Problem) -> str | None:
    """Why the family `name`, "gemv" or "sm80", does not take a problem."""
    if unusable_here := _unusable(problem):
        return unusable_here
    if problem.dtype not in DTYPES:
        return f"activations are {problem.dtype}, expected one of {', '.join(map(str, DTYPES))}"
    if problem.n > 64 * GRID_LIMIT:
        return f"n = {problem.n} is more than {64 * GRID_LIMIT}, which a grid holds"
    fp8 = name == "sm90" and cuda_sm90.multiplies_fp8(problem)
    integers = problem.activation and not fp8
    why = _refusal_of_integers(problem) if integers else _refusal_of_groups(problem)
    if why:
        return why
    if problem.k > 256 * GRID_LIMIT:
        return f"k = {problem.k} is more than {256 * GRID_LIMIT}, which a grid holds"
    rows = problem.m * planes(problem)
    if why := cuda_choices.refusal_of_size(rows, problem.n):
        return why
    if name == "gemv" and rows > GEMV_ROWS:
        return f"{rows} rows of activations are more than {GEMV_ROWS}, which its registers hold"
    return cuda_sm90.refusal(problem, machine.capability(problem.device_index)) if name == "sm90" else None


def _refusal_of_integers(problem: Problem) -> str | None:
    dynamic = problem.dynamic
    if not (problem.integer or problem.grouped):
        return f"{problem.scheme} with {problem.activation.name} activations and these scales is no sum of integers"
    if dynamic and dynamic.group_size not in (0, *GROUPS):
        return f"activation groups of {dynamic.group_size} inputs are none of {GROUPS}"
    if problem.grouped:  # sums of at most 64 inputs
        return _refusal_of_groups(problem)
    limit = largest_k(problem.element, problem.activation, problem.shift, dynamic)
    if problem.k > limit:
        return f"k = {problem.k} may overflow int32 sums, the limit for these elements is {limit}"
    return None


def _refusal_of_groups(problem: Problem) -> str | None:
    if problem.scale and problem.group_size not in GROUPS:
        return f"groups of {problem.group_size} inputs are none of {GROUPS}"
    return None


KERNELS = tuple(
    Kernel(f"cuda.{name}", "units", functools.partial(refusal, name), Prepared, fuses_epilogue=True)
    for name in (row.removeprefix("cuda.") for row in cuda_choices.NAMES)
)
