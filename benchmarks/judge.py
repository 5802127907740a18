"""Whether a model with packed layers computes what their dequantized weights say, before anyone times it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from ours import SUMS, tensor_core_sums
from torch import nn

from llmfp4_kernels import FP4Linear, epilogue, reference
from llmfp4_kernels.errors import NoKernel

ROWS = 32
"""Tokens of a call that are judged, first and last among them."""
LOGITS = 0.05
"""|logits - expected| / |expected| of the whole model. Layers are judged by themselves, strictly; here a sum in another
order can move an activation to the next code, and every layer after it."""
FP8_SUMS = 2**-8
"""Of Σ|x||w|: Hopper keeps about 14 bits of a sum of 8-bit floats (measured by others, csrc/cuda/gemm_sm90.h), so each
of the 32 products of an instruction may lose 2^-13 of the largest."""
RESULT = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}

Judge = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""x [m, k] → (expected [m, n], how far off a right result may be [m, n] or []). float64, or exact bits."""


def fp4_judge(layer: FP4Linear) -> Judge:
    """Of integer products the bits, of others the float64 product and the bound of their sums; gated or not."""
    packed, gated = layer.packed(), layer.gated

    def judge(x: torch.Tensor):
        if packed.integer:
            y = epilogue.finish(reference.gemm(x.float(), packed), None, gated, x.dtype)
            return y, x.new_zeros((), dtype=torch.float64)
        rounded, weight = reference.round_activation(x, packed, torch.float64), reference.stored_weight(packed)
        exact, sums = rounded @ weight.T, SUMS
        bound = 0.0
        if x.device.type == "cuda":
            sums += tensor_core_sums(packed.k)
        if packed.activation is not None and x.device.type == "cuda":
            x_scale = reference.activation_scales(x, packed).x_scale.double()
            lost = 2**-9 * x_scale * (rounded.abs() < 2**-5 * x_scale)  # see backends/cuda_sm90.py
            sums, bound = FP8_SUMS, lost @ weight.abs().T
        bound = bound + sums * (rounded.abs() @ weight.abs().T)
        if gated:
            exact, bound = _gated(exact, bound)
        return exact, bound + RESULT[x.dtype] * exact.abs()

    return judge


def _gated(y: torch.Tensor, bound: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) · up and how far off it may be; silu has a slope of at most 1.1, and 8 units of fp32 of its own."""
    (gate, up), (off_gate, off_up) = epilogue.gate_and_up(y), epilogue.gate_and_up(bound)
    silu = torch.nn.functional.silu(gate)
    product = silu * up
    return product, 1.1 * off_gate * (up.abs() + off_up) + silu.abs() * off_up + 2**-20 * product.abs()


def dense_judge(weight: torch.Tensor, relative: float) -> Judge:
    """The float64 product with a weight [n, k], within a share of Σ|x||w|."""

    def judge(x: torch.Tensor):
        wide = x.double()
        return wide @ weight.T, relative * (wide.abs() @ weight.abs().T)

    return judge


def _some_rows(x: torch.Tensor) -> torch.Tensor:
    x = x.flatten(0, -2)
    return x[torch.linspace(0, len(x) - 1, min(len(x), ROWS)).round().long().to(x.device)]


@contextlib.contextmanager
def judged_layers(model: nn.Module, judges: dict[str, Callable[[], Judge]]) -> Iterator[list[str]]:
    """Every call of these layers meanwhile is compared with what judges[name]() expects; yields their names, as called.

    Raises NoKernel at the first wrong one.
    """
    calls, hooks = [], []

    def compare(name: str):
        def hook(_, arguments, y):
            calls.append(name)
            expected, bound = judges[name]()(_some_rows(arguments[0]))
            error = (_some_rows(y).double() - expected.double()).abs()
            wrong = int((~(error <= bound)).sum())
            if wrong:
                shape = f"{list(arguments[0].shape)}, {wrong} of {error.numel()} results"
                raise NoKernel(f"refusing to time it: {name} is wrong for x of {shape}, by up to {error.max():.3g}")

        return hook

    try:
        for name in judges:
            hooks.append(model.get_submodule(name).register_forward_hook(compare(name)))
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def dequantized(model: nn.Module, judges: dict[str, Callable[[], Judge]]) -> Iterator[None]:
    """Meanwhile these layers compute what their judges expect."""

    def forward(name: str):
        return lambda x: judges[name]()(x.flatten(0, -2))[0].to(x.dtype).unflatten(0, x.shape[:-1])

    try:
        for name in judges:
            model.get_submodule(name).forward = forward(name)
        yield
    finally:
        for name in judges:
            model.get_submodule(name).__dict__.pop("forward", None)


def require_logits(phase: str, logits: torch.Tensor, expected: torch.Tensor) -> float:
    """|logits - expected| / |expected| (Frobenius). Raises NoKernel beyond LOGITS."""
    error = ((logits.double() - expected.double()).norm() / expected.double().norm()).item()
    if not error <= LOGITS:
        raise NoKernel(f"refusing to time it: logits of {phase} are off by {error:.3g}, {LOGITS} is rounding")
    return error
