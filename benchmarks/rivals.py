"""What FP4 models are timed against: copies in fp32 and bf16, and torch's INT4 weight-only kernels, CPU's and GPU's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from llmfp4_kernels.errors import BadInput, NoKernel

GROUP = 64
"""Weights per scale. torch's kernel takes 32, 64, 128, 256; SmolLM2's k = 576 is a multiple of 64 and not of 128."""


def quantize_int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int32 [n, k] in 0..15, and bfloat16 [k/group, n, 2] of scale and zero: weight ≈ (code - 8)·scale + zero."""
    n, k = weight.shape
    groups = weight.float().view(n, k // group, group)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-8).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    codes = (groups - zero.float()[..., None]) / scale.float()[..., None] + 8
    codes = codes.round().clamp(0, 15).to(torch.int32).view(n, k)
    return codes, torch.stack([scale, zero], -1).transpose(0, 1).contiguous()


def dequantize_int4(codes: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    """float64 [n, k] that codes [n, k] and scales [k/group, n, 2] stand for."""
    scale, zero = scales.double().transpose(0, 1).repeat_interleave(group, 1).unbind(-1)
    return (codes - 8) * scale + zero


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Codes int32 [n, k] as torch's product on their device reads them."""
    if codes.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)


def int4_mm(x: torch.Tensor, packed: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
    """torch's INT4 weight-only product: x bfloat16 [m, k] → bfloat16 [m, n]."""
    on_cpu = x.device.type == "cpu"
    product = torch.ops.aten._weight_int4pack_mm_for_cpu if on_cpu else torch.ops.aten._weight_int4pack_mm
    return product(x, packed, group, scales)


def check_int4(weight: torch.Tensor, group: int = GROUP, kernel: Callable = int4_mm) -> None:
    """Raise NoKernel if the kernel's product with `weight` [n, k] is not the dequantized one, at m = 1 and m = 33.

    Weights are rounded to bfloat16 on the way (2^-9 of each) and so is y (2^-9): 2^-8 of Σ|x||w| bounds both.
    """
    codes, scales = quantize_int4(weight, group)
    packed = pack_int4(codes)
    dense = dequantize_int4(codes, scales, group)
    for m in (1, 33):
        x = torch.randn(m, weight.shape[1], generator=torch.Generator().manual_seed(m)).bfloat16()
        error = (kernel(x, packed, group, scales).double() - x.double() @ dense.T).abs()
        worst = (error / (x.double().abs() @ dense.abs().T)).max().item()
        if not worst <= 2**-8:
            shape = f"m = {m}, n = {weight.shape[0]}, k = {weight.shape[1]}"
            raise NoKernel(f"torch's INT4 kernel is off by {worst:.2e} of Σ|x||w| at {shape}, {2**-8:.2e} is rounding")


class Int4Linear(nn.Module):
    """A linear layer on torch's INT4 weight-only kernel, bfloat16 activations, one scale and zero per group."""

    def __init__(self, linear: nn.Linear, group: int = GROUP):
        super().__init__()
        self.in_features, self.out_features, self.group = linear.in_features, linear.out_features, group
        if linear.in_features % group or linear.out_features % 16:
            shape = f"n = {linear.out_features}, k = {linear.in_features}"
            raise BadInput(f"torch's INT4 kernel needs n in 16s and k in {group}s, got {shape}")
        codes, scales = quantize_int4(linear.weight.detach(), group)
        self.register_buffer("packed", pack_int4(codes))
        self.register_buffer("scales", scales)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().bfloat16(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = int4_mm(x.reshape(-1, self.in_features), self.packed, self.group, self.scales)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def torch_int4(model: nn.Module, group: int = GROUP, exclude: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    """A bfloat16 copy of the model with every nn.Linear but `exclude` on torch's INT4 kernel, checked for each shape.

    lm_head stays bfloat16 by default, as it does in the FP4 models it is timed against.
    """
    model = copy.deepcopy(model).to(torch.bfloat16)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in exclude}
    checked = set()
    for name, linear in linears.items():
        if linear.weight.shape not in checked:
            check_int4(linear.weight.detach(), group)
            checked.add(linear.weight.shape)
        model.set_submodule(name, Int4Linear(linear, group))
    return model


def rivals(model: nn.Module) -> dict[str, nn.Module]:
    """{"fp32", "bf16", "torch-int4"}: copies of a dense float32 model."""
    return {
        "fp32": model,
        "bf16": copy.deepcopy(model).to(torch.bfloat16),
        "torch-int4": torch_int4(model),
    }
