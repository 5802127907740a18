"""Rivals on a GPU. Never run: there was no GPU. They keep the interface of the others, and are left out without one."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import rivals_packages
import torch
from bench import Contender, copies_for
from operands import GROUP, INT8_ROUNDING, TOKEN, Product, Weight, needs, per_block
from rivals import dequantize_int4, int4_mm, pack_int4, quantize_int4

from llmfp4_kernels.errors import BadInput, NoKernel

copies_on_gpu = functools.partial(copies_for, device="cuda")
ROUNDING = 2**-7
"""Of Σ|x||w|: operands, results and parts of sums in bf16."""


def _require_gpu(name: str) -> None:
    if not torch.cuda.is_available():
        raise NoKernel(f"{name} runs on a GPU, this torch ({torch.__version__}) sees none")


def dense(weight: Weight, dtype: str, warm: bool = False) -> Contender:
    """cuBLAS through torch's linear layer."""
    name = f"cuBLAS {dtype}"
    _require_gpu(name)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    size = weight.n * weight.k * 2
    copies = [weight.repeat(weight.probe.to("cuda", kind)) for _ in range(copies_on_gpu(size, warm))]
    calls = [lambda x, w=w: torch.nn.functional.linear(x, w) for w in copies]
    check = Product(name, weight, weight.probe.to(kind), ROUNDING)
    return Contender(name, calls, check, kind, size, dtype, device="cuda")


def int4(weight: Weight, warm: bool = False) -> Contender:
    """torch's INT4 weight-only kernel (tinygemm): bf16 activations, one scale and zero per group."""
    name = f"torch int4 g{GROUP}"
    _require_gpu(name)
    needs(name, weight, 8, 128)
    codes, scales = quantize_int4(weight.probe, GROUP)
    packed = pack_int4(weight.repeat(codes.cuda()))
    all_scales = weight.repeat(scales.transpose(0, 1).cuda()).transpose(0, 1).contiguous()
    size = weight.n * weight.k // 2 + all_scales.numel() * 2
    copies = [(packed.clone(), all_scales.clone()) for _ in range(copies_on_gpu(size, warm))]
    calls = [lambda x, p=p, s=s: int4_mm(x, p, GROUP, s) for p, s in copies]
    check = Product(name, weight, dequantize_int4(codes, scales, GROUP), ROUNDING)
    return Contender(name, calls, check, torch.bfloat16, size, "bf16", device="cuda")


class _PerToken:
    """y = product(tokens, scales of tokens, weight) of an x; product_only: an x is quantized at its first call."""

    def __init__(self, quantize: Callable, product: Callable, product_only: bool):
        self.quantize, self.product, self.product_only, self.x = quantize, product, product_only, None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self.product_only:
            return self.product(*self.quantize(x))
        if x is not self.x:
            self.x, self.tokens = x, self.quantize(x)
        return self.product(*self.tokens)


def _rows_to(kind: torch.dtype, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x in 8 bits, scale fp32 [m, 1]): each row by its largest magnitude."""
    largest = 127 if kind == torch.int8 else torch.finfo(kind).max
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-30) / largest
    scaled = x.float() / scale
    return (scaled.round() if kind == torch.int8 else scaled).to(kind), scale


def _rounded_to(kind: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    """float64: what 8-bit tokens and their scales stand for."""
    tokens, scale = _rows_to(kind, x)
    return tokens.double() * scale


def _eight_bits(name: str, weight: Weight, kind: torch.dtype, product: Callable, options: dict) -> Contender:
    """8-bit weights and tokens, a scale per output and per token. product(q, scale, w, w_scale) → bf16 [m, n]."""
    product_only = options.get("product_only", False)
    name += ", product only" * product_only
    _require_gpu(name)
    needs(name, weight, 16, 16)
    probe, probe_scale = _rows_to(kind, weight.probe)
    codes, w_scale = weight.repeat(probe.view(torch.uint8).cuda()).view(kind), weight.repeat(probe_scale.cuda())
    size = weight.n * (weight.k + 4)
    calls = []
    for _ in range(copies_on_gpu(size, options.get("warm", False))):
        multiply = functools.partial(product, w=codes.clone(), w_scale=w_scale)
        calls.append(_PerToken(functools.partial(_rows_to, kind), multiply, product_only))
    rounded = per_block(TOKEN) if kind == torch.int8 else functools.partial(_rounded_to, kind)
    rounding = ROUNDING + (INT8_ROUNDING if kind == torch.int8 else 0)
    check = Product(name, weight, probe.double() * probe_scale, rounding, rounded)
    note = "8-bit weights; " + ("tokens quantized beforehand" if product_only else "quantizes tokens")
    return Contender(name, calls, check, torch.bfloat16, size, str(kind).removeprefix("torch."), note, "cuda")


def fp8(weight: Weight, **options) -> Contender:
    """cuBLAS FP8 (E4M3), torch._scaled_mm; tokens are quantized by torch's own operations, or (product_only) before."""

    def product(q, scale, w, w_scale):
        return torch._scaled_mm(q, w.t(), scale_a=scale, scale_b=w_scale.t(), out_dtype=torch.bfloat16)

    return _eight_bits("cuBLAS fp8", weight, torch.float8_e4m3fn, product, options)


def int8(weight: Weight, **options) -> Contender:
    """torch._int_mm, which takes more than 16 rows; the sums are scaled by torch's own operations."""

    def product(q, scale, w, w_scale):
        if len(q) <= 16:
            raise BadInput(f"torch._int_mm takes more than 16 rows, not {len(q)}")
        return (torch._int_mm(q, w.t()).float() * w_scale.t() * scale).bfloat16()

    return _eight_bits("cuBLAS int8 (_int_mm)", weight, torch.int8, product, options)


def bitsandbytes(weight: Weight, kind: str, warm: bool = False) -> Contender:
    """bitsandbytes' Linear4bit, bf16 activations."""
    _require_gpu(f"bitsandbytes {kind}")
    return rivals_packages.bitsandbytes(weight, kind, warm, "cuda")


def gemlite(weight: Weight, warm: bool = False) -> Contender:
    """gemlite's INT4 weight-only kernel, fp16 activations."""
    name = f"gemlite int4 g{GROUP}"
    _require_gpu(name)
    library = importlib.import_module("gemlite")
    needs(name, weight, 32, GROUP)
    groups = weight.probe.view(len(weight.probe), -1, GROUP)
    scale = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    zero = -groups.amin(-1, keepdim=True) / scale
    codes = (groups / scale + zero).round().clamp(0, 15)
    parts = [weight.repeat(part.flatten(1)).cuda() for part in (codes.to(torch.uint8), scale.half(), zero.half())]
    size = weight.n * weight.k // 2 + parts[1].numel() * 4
    calls = []
    for _ in range(copies_on_gpu(size, warm)):
        kinds = library.DType.FP16, library.DType.FP16
        layer = library.GemLiteLinear(4, GROUP, weight.k, weight.n, input_dtype=kinds[0], output_dtype=kinds[1])
        layer.pack(*(part.clone() for part in parts), None)
        calls.append(layer)
    dense = ((codes - zero.half().float()) * scale.half().float()).view_as(weight.probe)
    return Contender(name, calls, Product(name, weight, dense, ROUNDING), torch.float16, size, "fp16", device="cuda")
