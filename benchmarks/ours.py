"""This package's contenders: any recipe by FP4Linear, on the kernel that the registry chooses or on a forced one."""

from __future__ import annotations

import dataclasses
import os
from functools import cache

import torch
from bench import Contender, copies_for
from operands import Product, Weight, require_shape
from shared_cases import random_packed

from llmfp4_kernels import FP4Linear, reference, registry
from llmfp4_kernels.errors import NoKernel
from llmfp4_kernels.formats import E4M3FN, E8M0
from llmfp4_kernels.formats import recipe as recipe_named
from llmfp4_kernels.packed import PackedFP4
from llmfp4_kernels.problem import Problem
from llmfp4_kernels.quantizer.gptq import smoothing_factor
from llmfp4_kernels.quantizer.linear import quantize_linear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


SUMS = 32 * 2**-24
"""Of Σ|x||w|: what fp32 sums of ours are off by. The rigorous bound, k · 2^-24, would let a factor of 1.002 pass;
2 units are the most seen."""


@cache
def _quantized(rows: int, k: int, name: str) -> PackedFP4:
    """The PROBE rows by a recipe, GPTQ's without feedback: these channels are independent, there is nothing to correct.

    A Cholesky factor for k = 28672 would take longer than all measurements.
    """
    recipe, weight = recipe_named(name), Weight(rows, k)
    x = weight.calibration
    if not recipe.error_feedback:
        return quantize_linear(weight.probe, recipe, x)
    factor = smoothing_factor(x.abs().amax(0))
    packed = quantize_linear(weight.probe / factor, "llm-fp4-a16", x * factor)
    activation = recipe.activation_elements[0] if recipe.activation_elements else None
    return dataclasses.replace(packed, x_factor=factor, activation=activation, dynamic=recipe.dynamic, recipe=name)


def packed_weight(weight: Weight, recipe: str) -> tuple[PackedFP4, PackedFP4]:
    """(the PROBE rows, all rows) quantized by a recipe."""
    probe = _quantized(len(weight.probe), weight.k, recipe)
    return probe, _all_rows(weight, probe)


def _all_rows(weight: Weight, probe: PackedFP4) -> PackedFP4:
    parts = {name: getattr(probe, name) for name in ("codes", "row_scale", "group_scale")}
    return dataclasses.replace(probe, **{n: weight.repeat(t) for n, t in parts.items() if t is not None})


class Bits:
    """check(x, y): y has the bits of the reference."""

    def __init__(self, name: str, weight: Weight, probe: PackedFP4):
        self.name, self.weight, self.probe, self.known = name, weight, probe, {}

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        require_shape(self.name, self.weight, x, y)
        if y.dtype != x.dtype:
            raise NoKernel(f"refusing to time {self.name}: its result is {y.dtype}, x is {x.dtype}")
        if len(x) not in self.known:
            self.known[len(x)] = reference.gemm(x, self.probe).to(y.dtype)
        wrong = (y != self.known[len(x)][:, self.weight.rows]).sum().item()
        if wrong:
            shape = f"m = {len(x)}, n = {self.weight.n}, k = {self.weight.k}"
            raise NoKernel(
                f"refusing to time {self.name}, which is wrong at {shape}: "
                f"{wrong} of {y.numel()} results differ from the reference's bits"
            )


def random_codes(weight: Weight, recipe: str) -> tuple[PackedFP4, PackedFP4]:
    """As `packed_weight`, without a search: random codes, scales, shifts and factors, which take a kernel as long."""
    rows, form = len(weight.probe), Problem.of_recipe(recipe_named(recipe), 1, weight.n, weight.k)
    static = form.activation if form.dynamic is None else None
    probe = random_packed(rows, weight.k, form.element, static, form.shift, form.scale, form.group_size)
    factor = 0.5 + torch.rand(weight.k, generator=torch.Generator().manual_seed(1)) if form.x_factor else None
    if form.scale == E8M0:  # those of a trained row are as close
        probe.group_scale.clamp_(123, 131)
    probe = dataclasses.replace(probe, activation=form.activation, dynamic=form.dynamic, x_factor=factor, recipe=recipe)
    return probe, _all_rows(weight, probe)


def check_of(name: str, weight: Weight, probe: PackedFP4, dtype: torch.dtype, sums: float = SUMS):
    """Exact integer products by their bits, others within the bound of fp32 sums and of the result's rounding."""
    if probe.integer:
        return Bits(name, weight, probe)
    result = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    if probe.activation is None:
        return Product(name, weight, reference.dequantize(probe, torch.float64), sums, result=result)
    rounded = lambda x: reference.round_activation(x, probe)  # noqa: E731
    return Product(name, weight, reference.stored_weight(probe), sums, rounded, result)


def fp4(weight: Weight, recipe: str, dtype: str = "fp32", forced: str | None = None, warm: bool = False) -> Contender:
    """y = FP4Linear(x): its time holds all that a call does, the quantization of activations included.

    Raises NoKernel where the forced kernel refuses.
    """
    return _contender(weight, recipe, packed_weight(weight, recipe), dtype, forced, warm, "cpu", SUMS)


def tensor_core_sums(k: int) -> float:
    """Of Σ|x||w|: tensor cores drop bits of a sum of k products below 2^-21 of it, once in 16 inputs."""
    return (k / 16 + 8) * 2**-21


def fp4_on_gpu(weight: Weight, recipe: str, dtype: str = "bf16", forced: str | None = None) -> Contender:
    """The same on a GPU with random codes.

    Of sums of 8-bit floats tensor cores drop bits below 2^-13: of 4096 random numbers up to 1e-4 of Σ|x||w| adds up, if
    the model of python_tests/ptx is right about Hopper.
    """
    fp8 = E4M3FN in recipe_named(recipe).activation_elements
    sums = SUMS + tensor_core_sums(weight.k) + (2**-12 if fp8 else 0)
    return _contender(weight, recipe, random_codes(weight, recipe), dtype, forced, False, "cuda", sums)


def _contender(weight, recipe, probe_and_packed, dtype, forced, warm, device, sums) -> Contender:
    probe, packed = probe_and_packed
    name = recipe + (f" {dtype}" if dtype != "fp32" else "") + (f" [{forced}]" if forced else "")
    copies = copies_for(packed.nbytes, warm, device)
    calls = [FP4Linear.from_packed(packed.to(device)).multiplier() for _ in range(copies)]

    def kernel(m: int) -> str:
        before = os.environ.pop(registry.FORCE, None)
        try:
            if forced or before:
                os.environ[registry.FORCE] = forced or before
            names = {call.choose(m, DTYPES[dtype])[0].name for call in calls}
        finally:
            os.environ.pop(registry.FORCE, None)
            if before:
                os.environ[registry.FORCE] = before
        if len(names) > 1:
            raise NoKernel(f"refusing to time {name}: its copies run on {' and '.join(sorted(names))}")
        return names.pop()

    unit = "int8" if Problem.of(probe, 1, torch.float32).grouped or probe.integer else "float"
    check = check_of(name, weight, probe, DTYPES[dtype], sums)
    return Contender(name, calls, check, DTYPES[dtype], packed.nbytes, unit, device=device, kernel=kernel)
