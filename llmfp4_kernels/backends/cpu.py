"""The C++ CPU kernels as rows of the registry. They share one layout, so a layer may use several, chosen by m."""

from __future__ import annotations

import functools
import platform

import torch

from .. import native
from ..errors import BadInput, NoKernel
from ..formats import INT8_MAX, Dynamic, Element
from ..layout import shuffle_scales, to_layout
from ..packed import PackedFP4
from ..problem import FewRows, Kernel, Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Prepared:
    """Tiles, scales and bias of one weight, and the C++ object that holds their addresses."""

    def __init__(self, packed: PackedFP4, bias: torch.Tensor | None):
        packed = to_layout(packed, "tiled")
        self.n, self.k = packed.shape
        # The C++ object holds addresses: what it reads is kept here, in place where it can be.
        tensors = {"codes": packed.codes.contiguous(), "row_scale": packed.row_scale.contiguous()}
        if bias is not None:
            tensors["bias"] = bias.detach().float().contiguous()
        for name in ("shift", "x_factor"):
            if getattr(packed, name) is not None:
                tensors[name] = getattr(packed, name).contiguous()
        if packed.group_scale is not None:
            tensors["group_scale"] = shuffle_scales(packed.group_scale, self.n, self.k)
        self.tensors = tensors
        self._linear = native.module().Linear(
            n=self.n,
            k=self.k,
            element=packed.element.fields,
            scale=packed.scale.name if packed.scale else "none",
            group_size=packed.group_size,
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )
        if packed.activation and packed.dynamic:
            self._linear.quantize_dynamically(packed.activation.fields, packed.dynamic.group_size)
        elif packed.activation:
            self._linear.quantize_activations(packed.activation.fields, packed.x_scale.item())

    def run(self, kernel: Kernel, x: torch.Tensor) -> torch.Tensor:
        if not x.is_cpu:
            raise BadInput(f"x is on {x.device}, the weight on the CPU")
        x, m = x.contiguous(), x.numel() // self.k
        y = x.new_empty(*x.shape[:-1], self.n)
        if not x.data_ptr():
            raise BadInput(f"x of {x.dtype} {list(x.shape)} has no memory of its own")
        threads = torch.get_num_threads()
        self._linear.run(_handle(kernel.name), x.data_ptr(), self.k, y.data_ptr(), m, _dtype(x.dtype), threads)
        return y

    @functools.cached_property
    def _few_rows(self):
        return native.module().few_rows(self._linear, self.tensors, torch.Tensor, torch.get_num_threads)

    def few_rows(self, kernel: Kernel, m: int, dtype: torch.dtype) -> FewRows | None:
        """See problem.Prepared. None where torch lacks the C API of DLPack that tells where x lies."""
        if self._few_rows is None or m > self._few_rows.most:
            return None
        self._few_rows.add(_handle(kernel.name), m, _dtype(dtype))
        return self._few_rows.call


@functools.cache
def _handle(name: str):
    return native.module().kernel(name.removeprefix("cpu."))


@functools.cache
def _dtype(dtype: torch.dtype):
    return getattr(native.module().Dtype, str(dtype).removeprefix("torch."))


def largest_k(element: Element, activation: Element, shift: bool, dynamic: Dynamic | None = None) -> int:
    """Most inputs whose integer sum surely fits int32: floor((2^31 - 1) / (largest products)).

    Operands beyond int8 (E3M0 with a shift) are split into two int8 planes of at most 64.
    """
    if dynamic:
        largest = dynamic.largest_integer(activation)
    else:
        largest = activation.max_integer << (activation.max_shift if shift else 0)
    return (2**31 - 1) // (element.max_integer * (largest if largest <= INT8_MAX else 64))


def _refusal(isa: str, problem: Problem) -> str | None:
    if problem.device != "cpu":
        return f"runs on the CPU, the tensors are on {problem.device}"
    if native.problem_with_module():
        return native.problem_with_module()
    row = native.cpu_kernels().get(isa)
    if row is None:
        return f"not built for {platform.machine()}"
    if not row["supported"]:
        return f"this CPU lacks one of: {row['needs']}"
    if problem.dtype not in DTYPES:
        return f"activations are {problem.dtype}, expected one of {', '.join(map(str, DTYPES))}"
    if problem.group_size % 8:
        return f"group size {problem.group_size} is no multiple of 8"
    if problem.activation and not (problem.integer or problem.grouped):
        return f"{problem.scheme} with {problem.activation.name} activations is no sum of int8 products"
    if problem.activation:
        limit = largest_k(problem.element, problem.activation, problem.shift, problem.dynamic)
        terms = min(problem.k, problem.group_size or problem.k)
        if terms > limit:
            return f"sums over {terms} inputs may overflow int32, the limit for these elements is {limit}"
    from_m = row["w4a4_from_m" if problem.activation else "w4a16_from_m"]
    return f"m = {problem.m} is below {from_m}, where its tiles fill" if problem.m < from_m else None


def _kernel(isa: str) -> Kernel:
    return Kernel(f"cpu.{isa}", "tiled", functools.partial(_refusal, isa), _prepare)


def _prepare(packed: PackedFP4, bias: torch.Tensor | None) -> Prepared:
    if packed.codes.device.type != "cpu":
        raise NoKernel(f"the CPU kernels take CPU tensors, these are on {packed.codes.device}")
    return Prepared(packed, bias)


KERNELS = tuple(_kernel(isa) for isa in ("amx", "avx512vbmi", "avx512vnni", "avx2", "neon", "scalar"))
