"""Rivals within torch: its linear layers, its INT4 weight-only product, and oneDNN's int8 products."""

from __future__ import annotations

import functools

import torch
from bench import Contender, copies_for
from machine import machine
from operands import GROUP, INT8_ROUNDING, TOKEN, Product, Weight, needs, per_block
from rivals import dequantize_int4, int4_mm, pack_int4, quantize_int4


def dense(weight: Weight, dtype: str, warm: bool = False) -> Contender:
    """torch's linear layer."""
    kind = getattr(torch, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype])
    size = weight.n * weight.k * kind.itemsize
    calls = [
        functools.partial(torch.nn.functional.linear, weight=weight.dense.to(kind))
        for _ in range(copies_for(size, warm))
    ]
    relative = weight.k * 2**-24 + (2**-7 if kind != torch.float32 else 0)
    check = Product(f"torch {dtype}", weight, weight.probe.to(kind), relative)
    return Contender(f"torch {dtype}", [lambda x, c=c: c(x) for c in calls], check, kind, size, dtype)


def torch_int4(weight: Weight, warm: bool = False) -> Contender:
    """torch's INT4 weight-only kernel: bf16 activations, one scale and zero per group."""
    name = f"torch int4 g{GROUP}"
    needs(name, weight, 16, GROUP)
    codes, scales = quantize_int4(weight.probe, GROUP)
    all_scales = weight.repeat(scales.transpose(0, 1)).transpose(0, 1).contiguous()
    size = weight.n * weight.k // 2 + all_scales.numel() * 2
    packed = pack_int4(weight.repeat(codes))
    copies = [(packed.clone(), all_scales.clone()) for _ in range(copies_for(size, warm))]
    calls = [lambda x, p=p, s=s: int4_mm(x, p, GROUP, s) for p, s in copies]
    check = Product(name, weight, dequantize_int4(codes, scales, GROUP), 2**-7)
    return Contender(name, calls, check, torch.bfloat16, size, "bf16")


def _int8_tokens(x: torch.Tensor, zero_point: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [m, k], scale [m, 1]): each token by its largest magnitude. uint8 where the zero point is not 0."""
    scale = x.abs().amax(1, keepdim=True).clamp_(min=1e-30).div_(127)
    codes = x.mul(scale.reciprocal()).round_()
    return codes.add_(zero_point).to(torch.uint8) if zero_point else codes.to(torch.int8), scale


@functools.cache
def _zero_point() -> int:
    """Of activations for oneDNN's packed product: without AMX its kernels take unsigned bytes only, and signed ones go
    to its reference, which took 5 s for 8 x 4096 x 4096 instead of 1 ms."""
    return 0 if "amx_int8" in machine()["flags"] else 128


def _int8_weight(weight: Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [n, k], scale [n]): each output by its largest magnitude."""
    codes, scale = _int8_tokens(weight.probe)
    return weight.repeat(codes), weight.repeat(scale[:, 0])


class _Int8Linear:
    """y = linear(x) by _int_mm, or by oneDNN's product with weights packed beforehand.

    product_only: the tokens of an x are quantized at its first call.
    """

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, packed: bool, product_only: bool):
        self.scale, self.packed, self.product_only, self.x = scale, packed, product_only, None
        self.zero = torch.zeros(len(scale), dtype=torch.int64)
        self.codes = torch.ops.onednn.qlinear_prepack(codes, None) if packed else codes.clone().t()
        self.zero_point = _zero_point() if packed else 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self.product_only or x is not self.x:
            self.x, self.tokens = x, _int8_tokens(x, self.zero_point)
        q, x_scale = self.tokens
        if not self.packed:
            return torch._int_mm(q, self.codes).float().mul_(self.scale).mul_(x_scale)
        result = 1.0, 0, torch.float32, "none", [], ""
        weight = self.codes, self.scale, self.zero, None
        y = torch.ops.onednn.qlinear_pointwise(q, 1.0, self.zero_point, *weight, *result)
        return y.mul_(x_scale)


def onednn_int8(weight: Weight, packed: bool = True, product_only: bool = False, warm: bool = False) -> Contender:
    """8-bit weights, one scale per output; each token is quantized by torch's own operations."""
    name = f"oneDNN int8 ({'packed' if packed else '_int_mm'}{', product only' if product_only else ''})"
    (codes, scale), size = _int8_weight(weight), weight.n * (weight.k + 4)
    calls = [_Int8Linear(codes, scale, packed, product_only) for _ in range(copies_for(size, warm))]
    probe, probe_scale = _int8_tokens(weight.probe)
    check = Product(name, weight, probe * probe_scale, INT8_ROUNDING, per_block(TOKEN))
    note = "8-bit weights; " + ("tokens quantized beforehand" if product_only else "quantizes tokens")
    return Contender(name, calls, check, torch.float32, size, "int8", note)
