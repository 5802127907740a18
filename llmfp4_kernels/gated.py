"""FP4GatedLinear: gate and up projection of a LLaMA MLP as one packed weight, y = silu(gate) · up."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from .epilogue import GATED_ROWS, interleave
from .errors import BadInput
from .formats import Recipe
from .nn import FP4Linear
from .packed import PackedFP4


def _alike(a, b) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a is b or a == b


def pair_packed(gate: PackedFP4, up: PackedFP4) -> PackedFP4:
    """Two packed weights [h, k] in row order as one [2h, k], eight rows of each in turn.

    Raises BadInput unless they agree in all that is not per row: formats, scales of activations, shifts and factors.
    """
    per_row = ("codes", "row_scale", "group_scale")
    others = [f.name for f in dataclasses.fields(PackedFP4) if f.name not in per_row and f.name != "recipe"]
    different = [name for name in others if not _alike(getattr(gate, name), getattr(up, name))]
    if different or gate.layout != "row":
        raise BadInput(
            f"gate and up are one product only if both have the same {', '.join(different or ['layout row'])}"
        )
    rows = {name: getattr(gate, name) for name in per_row if getattr(gate, name) is not None}
    return dataclasses.replace(gate, **{name: interleave(t, getattr(up, name)) for name, t in rows.items()})


class FP4GatedLinear(FP4Linear):
    """y [..., h] = silu(x [..., k] · gateᵀ + bias) · (x · upᵀ + bias) of one packed weight: LLaMA's SwiGLU.

    The weight has n = out_features = 2h rows, eight of gate and eight of up in turn (epilogue.interleave). Everything
    up to y is fp32 and rounded once. Where sums are integers, kernels that do so in their epilogue and the composition
    behind others return the same bits.
    """

    gated = True

    @classmethod
    def from_pair(cls, gate: FP4Linear, up: FP4Linear) -> FP4GatedLinear:
        """Two packed layers [h, k] that share their inputs. Raises BadInput for those that `pair_packed` refuses."""
        if (gate.bias is None) != (up.bias is None):
            raise BadInput("gate and up are one product only if both have a bias, or neither")
        bias = None if gate.bias is None else interleave(gate.bias.detach(), up.bias.detach())
        return cls.from_packed(pair_packed(gate.packed(), up.packed()), bias)

    @classmethod
    def from_linears(
        cls, gate: nn.Linear, up: nn.Linear, recipe: str | Recipe = "llm-fp4", calibration=None
    ) -> FP4GatedLinear:
        """Quantize two nn.Linear [h, k] as one, so that they share formats and scales of activations.

        calibration and errors as FP4Linear.from_linear; also BadInput unless h is a multiple of 8.
        """
        if (gate.bias is None) != (up.bias is None):
            raise BadInput("gate and up are one product only if both have a bias, or neither")
        both = nn.Linear(gate.in_features, 2 * gate.out_features, gate.bias is not None, device="meta")
        both.weight = nn.Parameter(interleave(gate.weight.detach(), up.weight.detach()), requires_grad=False)
        if gate.bias is not None:
            both.bias = nn.Parameter(interleave(gate.bias.detach(), up.bias.detach()), requires_grad=False)
        return cls.from_linear(both, recipe, calibration)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if self.bias is not None and self.bias.requires_grad:
            raise BadInput("the bias of a gated layer lies inside of silu: it cannot be trained")
        return super().forward(x, residual)


class FP4GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)) with gate and up as one FP4GatedLinear; forward(x, residual) adds a residual."""

    def __init__(self, gate_up: FP4GatedLinear, down: FP4Linear):
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up, down

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.gate_up_proj(x)
        return self.down_proj(hidden) if residual is None else self.down_proj(hidden, residual)


def _is_silu(function) -> bool:
    """By what it does: every version of transformers has another class for it."""
    probe = torch.linspace(-8, 8, 33)
    return callable(function) and torch.allclose(function(probe), nn.functional.silu(probe))


def fuse_gated_mlps(model: nn.Module) -> list[str]:
    """Replace, in place, each MLP with packed gate_proj, up_proj and down_proj and SiLU by an FP4GatedMLP; their names.

    Gate and up must agree in formats and scales of activations, as those of one recipe without a search do. Raises
    BadInput, before anything is replaced, for a pair that does not. The result cannot be saved: save before.
    """
    fused = {}
    for name, mlp in model.named_modules():
        parts = [getattr(mlp, part, None) for part in ("gate_proj", "up_proj", "down_proj")]
        if not all(isinstance(part, FP4Linear) for part in parts) or not _is_silu(getattr(mlp, "act_fn", None)):
            continue
        gate, up, down = parts
        if gate.out_features % GATED_ROWS:
            raise BadInput(f"{name}: {gate.out_features} gates are no multiple of {GATED_ROWS}")
        try:
            fused[name] = FP4GatedMLP(FP4GatedLinear.from_pair(gate, up), down)
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from error
    for name, mlp in fused.items():
        model.set_submodule(name, mlp)
    return list(fused)
