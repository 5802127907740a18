"""The stored codes against a simulation: values on the grids as floats, products as the papers' simulators do them."""

from __future__ import annotations

import copy

import torch
from torch import nn

from llmfp4_kernels import reference
from llmfp4_kernels.nn import FP4Linear

UNIT = 2.0**-24
"""Half a unit in the last place of fp32, relative."""


class Simulated(nn.Module):
    """A dense layer of the dequantized weight whose input is rounded in floating point; sums are float64.

    Beside its own output it asks the packed layer for the same input and keeps the largest difference found, in
    units of 2^-24 of sum |x| |w| + |bias|. An exact integer sum with its roundings to fp32 stays below 4 units.
    """

    def __init__(self, layer: FP4Linear):
        super().__init__()
        self.layer, self.packed, self.worst = layer, layer.packed(), 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = reference.round_activation(x.flatten(0, -2), self.packed, torch.float64)
        weight = reference.stored_weight(self.packed)
        bias = torch.zeros(len(weight)) if self.layer.bias is None else self.layer.bias.detach()
        y = torch.addmm(bias.double(), rounded, weight.T)
        size = torch.addmm(bias.abs().float(), rounded.abs().float(), weight.abs().float().T)
        difference = (self.layer(x).flatten(0, -2).double() - y).abs_()
        self.worst = max(self.worst, difference.div_(size.clamp_min_(1e-30)).max().item() / UNIT)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


class Judged(nn.Module):
    """A layer as the package's reference computes it: like Simulated, but rounded in the order all kernels keep.

    A last place matters to a whole model: an input next to the middle between two codes falls to the other one, and
    from there on every layer rounds another way. Beside Simulated, MiniLM in W4A4 moved embeddings by up to 0.2 though
    no layer was off by more than 2.3 units; beside this, by nothing.
    """

    def __init__(self, layer: FP4Linear):
        super().__init__()
        self.packed, self.bias = layer.packed(), layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return reference.gemm(x.flatten(0, -2), self.packed, self.bias).to(x.dtype).unflatten(0, x.shape[:-1])


def replaced(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A copy of a quantized float32 model with kind(layer) in place of each FP4Linear."""
    model = copy.deepcopy(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FP4Linear)}
    for name, layer in layers.items():
        model.set_submodule(name, kind(layer))
    return model


def worst_layer(model: nn.Module) -> tuple[str, float]:
    """(name, units) of the simulated layer that was farthest from its packed one."""
    found = {name: module.worst for name, module in model.named_modules() if isinstance(module, Simulated)}
    name = max(found, key=found.get)
    return name, found[name]
