"""Static FP activations with LLM-FP4's pre-shifted exponent bias, and the rounding rules of the shift."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..encode import snap
from ..errors import BadInput
from ..formats import Element

SHIFT_RULES = ("phase", "paper", "release", "floor")


def exponent_bias(largest: torch.Tensor, element: Element) -> torch.Tensor:
    """LLM-FP4's real-valued bias b~ (float64) whose largest value is `largest`; +inf where that is 0."""
    return element.bias - torch.log2(largest.double() / element.max)


def channel_shift(bias: torch.Tensor, rho: float, element: Element, rule: str, phase: float = 0.0) -> torch.Tensor:
    """The pre-shifted exponent bias (int8 [k]) of channels with biases `bias` [k] beside the tensor's bias `rho`.

    paper    clip(round(b_j - rho), 0, 2^E - 1), LLM-FP4 eq. 15: halves of all channels are clipped, by up to sqrt(2)
    release  clip(round(b_j), round(rho), round(rho) + 2^E - 1) - round(rho), the authors' code
    floor    clip(floor(b_j - rho), 0, 2^E - 1): no channel is clipped more than the largest one
    phase    clip(floor(b_j - rho + phase), 0, 2^E - 1), of which the other three are cases: 1/2,
             1/2 + rho - round(rho), and 0
    """
    if rule not in SHIFT_RULES:
        raise BadInput(f"unknown shift rule {rule!r}: known are {', '.join(SHIFT_RULES)}")
    if rule == "paper":
        shift = (bias - rho).round()
    elif rule == "release":
        shift = bias.round() - round(rho)
    else:
        shift = (bias - rho + (phase if rule == "phase" else 0.0)).floor()
    return shift.clamp(0, element.max_shift).to(torch.int8)


@dataclass(frozen=True)
class Activation:
    """A static quantizer of a layer's input: element · x_scale · 2^-shift[k]."""

    element: Element
    x_scale: torch.Tensor
    """float32 []"""
    shift: torch.Tensor
    """int8 [k]"""
    point: tuple[float, float] = field(default=(0.0, 0.0), compare=False)
    """(delta, phase) in the search; whatever its rule, the shift is the one of this phase."""

    def dequantize(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] float32 rounded to the grid; the same numbers as reference.quantize_activation's codes."""
        shift, x_scale = self.shift.int(), self.x_scale.expand(self.shift.shape)
        inverse, step = torch.ldexp(torch.reciprocal(x_scale), shift), torch.ldexp(x_scale, -shift)
        return snap(x * inverse, self.element).mul_(step)

    def same_as(self, other: Activation | None) -> bool:
        return (
            other is not None
            and self.element == other.element
            and bool(self.x_scale == other.x_scale)
            and torch.equal(self.shift, other.shift)
        )
