"""Rivals on a GPU. Never run: there was no GPU. They keep the interface of the others, and are left out without one."""

from __future__ import annotations

import importlib

import torch
from bench import Contender, copies_for
from operands import GROUP, Product, Weight, needs

from llmfp4_kernels.errors import NoKernel


def _require_gpu(name: str) -> None:
    if not torch.cuda.is_available():
        raise NoKernel(f"{name} runs on a GPU, this torch ({torch.__version__}) sees none")


def dense(weight: Weight, dtype: str, warm: bool = False) -> Contender:
    """cuBLAS through torch's linear layer."""
    name = f"cuBLAS {dtype}"
    _require_gpu(name)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    size = weight.n * weight.k * 2
    copies = [weight.dense.to("cuda", kind) for _ in range(copies_for(size, warm))]
    calls = [lambda x, w=w: torch.nn.functional.linear(x, w) for w in copies]
    return Contender(name, calls, Product(name, weight, weight.probe.to(kind), 2**-7), kind, size, dtype, device="cuda")


def fp8(weight: Weight, warm: bool = False) -> Contender:
    """cuBLAS FP8 (E4M3), one scale per output and per token; tokens are quantized by torch's own operations."""
    name = "cuBLAS fp8"
    _require_gpu(name)
    needs(name, weight, 16, 16)
    largest = torch.finfo(torch.float8_e4m3fn).max

    def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-30) / largest
        return (x / scale).to(torch.float8_e4m3fn), scale

    def call(x: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
        q, scale = quantized(x)
        return torch._scaled_mm(q, w.t(), scale_a=scale, scale_b=w_scale.t(), out_dtype=torch.bfloat16)

    probe, probe_scale = quantized(weight.probe)
    codes, w_scale = (weight.repeat(part.view(torch.uint8)).view(part.dtype).cuda() for part in (probe, probe_scale))
    size = weight.n * (weight.k + 4)
    copies = [codes.clone() for _ in range(copies_for(size, warm))]
    calls = [lambda x, w=w: call(x, w, w_scale) for w in copies]

    def rounded(x: torch.Tensor) -> torch.Tensor:
        q, scale = quantized(x)
        return q.double() * scale

    check = Product(name, weight, probe.double() * probe_scale, 2**-7, rounded)
    return Contender(name, calls, check, torch.bfloat16, size, "fp8", "quantizes tokens", "cuda")


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
    for _ in range(copies_for(size, warm)):
        kinds = library.DType.FP16, library.DType.FP16
        layer = library.GemLiteLinear(4, GROUP, weight.k, weight.n, input_dtype=kinds[0], output_dtype=kinds[1])
        layer.pack(*(part.clone() for part in parts), None)
        calls.append(layer)
    dense = ((codes - zero.half().float()) * scale.half().float()).view_as(weight.probe)
    return Contender(name, calls, Product(name, weight, dense, 2**-7), torch.float16, size, "fp16", device="cuda")
