"""LLM-FP4's search (arXiv 2310.16836, algorithm 1): formats and scales of one linear layer by its output error."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..errors import BadInput
from ..formats import FP4_ELEMENTS, Element, searched_elements
from ..packed import PackedFP4
from ..reference import decode, encode, quantize
from .preshift import SHIFT_RULES, Activation, ActivationSearch
from .row_scales import Weight, WeightSearch
from .scales import require_matrix, row_slices

GAMMAS = tuple(0.01 + i * (1.2 - 0.01) / 100 for i in range(100))
"""LLM-FP4's grid of factors on the bias; the authors' code evaluates the first 100 of 101 points."""


@dataclass(frozen=True)
class LinearSearch:
    """What search_linear found for a weight [n, k]; in LLM-FP4's terms a scale is 2^(element.bias - b~)."""

    weight: torch.Tensor
    """float32 [n, k], the weight that was searched"""
    weight_element: Element
    row_scale: torch.Tensor
    """float32 [n]"""
    activation: Activation | None
    preshift: bool
    mse: float
    """mean squared error of the layer's output against x @ weight.T, over all tokens and features"""

    @property
    def activation_element(self) -> Element | None:
        return self.activation.element if self.activation else None

    @property
    def x_scale(self) -> float | None:
        return self.activation.x_scale.item() if self.activation else None

    @property
    def shift(self) -> torch.Tensor:
        """int8 [k]; zeros without preshift"""
        if self.activation:
            return self.activation.shift
        return torch.zeros(self.weight.shape[1], dtype=torch.int8, device=self.weight.device)

    def weight_dequantized(self) -> torch.Tensor:
        """float32 [n, k]"""
        scale = self.row_scale[:, None]
        return decode(encode(self.weight / scale, self.weight_element), self.weight_element) * scale

    def activation_dequantized(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] on the activation's grid, float32; x itself where activations are not quantized."""
        return self.activation.dequantize(x.float()) if self.activation else x.float()

    def packed(self, recipe_name: str = "llm-fp4") -> PackedFP4:
        """The layer as 4-bit codes. Raises BadInput at 6 and 8 bits, which have no packed form."""
        for element in filter(None, (self.weight_element, self.activation_element)):
            if element.name not in FP4_ELEMENTS:
                raise BadInput(f"{element.name} has {element.bits} bits: only 4-bit elements have a packed form")
        return PackedFP4(
            codes=quantize(self.weight, self.weight_element, self.row_scale[:, None]),
            row_scale=self.row_scale,
            k=self.weight.shape[1],
            element=self.weight_element,
            activation=self.activation_element,
            x_scale=self.activation.x_scale if self.activation else None,
            shift=self.shift.to(torch.uint8) if self.activation and self.preshift else None,
            recipe=recipe_name,
        )


def output_mse(x: torch.Tensor, weight: torch.Tensor, weight_q: torch.Tensor, activation: Activation | None) -> float:
    """Mean of (xq Wq^T - x W^T)^2 as (xq - x) Wq^T + x (Wq - W)^T, which keeps its digits in fp32."""
    f = activation.dequantize(x).sub_(x) if activation else None
    total = 0.0
    for rows in row_slices(weight):
        error = x @ (weight_q[rows] - weight[rows]).T
        if activation:
            error.addmm_(f, weight_q[rows].T)
        total += error.square_().sum(dtype=torch.float64).item()
    return total / (x.shape[0] * weight.shape[0])


def _unit_exponent(largest: torch.Tensor) -> int:
    """The exponent e with 2^(e-1) ≤ largest < 2^e, held where 2^-e is a normal fp32; 0 for 0."""
    return max(-120, min(120, int(torch.frexp(largest.double()).exponent)))


def _check(x, weight, channel_max, rounds, grid, shift_rule, objective):
    require_matrix("x", x)
    require_matrix("weight", weight)
    if x.shape[1] != weight.shape[1]:
        raise BadInput(f"x has {x.shape[1]} channels and weight {list(weight.shape)} takes {weight.shape[1]}")
    if channel_max is not None:
        if list(channel_max.shape) != [x.shape[1]] or not channel_max.isfinite().all():
            raise BadInput(f"channel_max must hold {x.shape[1]} finite numbers, got shape {list(channel_max.shape)}")
        low = int((channel_max < x.abs().amax(0)).sum())
        if low:
            raise BadInput(f"channel_max is below the largest input of x in {low} of {x.shape[1]} channels")
    if rounds < 1:
        raise BadInput(f"rounds is {rounds}: at least 1 is needed")
    for name, value, known in (
        ("grid", grid, ("additive", "gamma")),
        ("shift_rule", shift_rule, SHIFT_RULES),
        ("objective", objective, ("mse",)),
    ):
        if value not in known:
            raise BadInput(f"unknown {name} {value!r}: known are {', '.join(known)}")


def search_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    weight_bits: int = 4,
    activation_bits: int = 4,
    rounds: int = 3,
    grid: str = "additive",
    preshift: bool = True,
    shift_rule: str = "phase",
    objective: str = "mse",
    channel_max: torch.Tensor | None = None,
    weight_elements: tuple[Element, ...] | None = None,
    activation_elements: tuple[Element, ...] | None = None,
) -> LinearSearch:
    """Formats, row scales, x_scale and shift of a linear layer by the mean squared error of its output.

    x [tokens, k] are the inputs of the full-precision layer and weight [n, k] its weight, on one device, any float
    dtype. Bits are 4, 6 or 8; activation_bits=16 leaves activations as they are, and one weight search suffices.
    Weights and activations are searched in turn, each beside the other's last choice, and the best pair of all rounds
    is kept. channel_max [k] gives the largest magnitudes over all calibration tokens when x is a sample of them.

    grid        "additive": bias b0 + delta, delta in -1..2 per row and -1..4 per tensor
                "gamma": the paper's 100 factors 0.01..1.2 on the bias b0 of the largest magnitude
    shift_rule  how channel biases become integer shifts (see preshift.channel_shift); "phase" searches it

    Raises BadInput for NaN, Inf, empty or mismatched tensors and unknown options.
    """
    _check(x, weight, channel_max, rounds, grid, shift_rule, objective)
    x, weight = x.float(), weight.float()
    channel_max = x.abs().amax(0) if channel_max is None else channel_max.float()
    x_unit, w_unit = _unit_exponent(channel_max.amax()), _unit_exponent(weight.abs().amax())
    # Powers of two: every product and code stays what it was, and squares of tiny or huge inputs stay in range.
    x1, w1 = torch.ldexp(x, torch.tensor(-x_unit)), torch.ldexp(weight, torch.tensor(-w_unit))
    gammas = GAMMAS if grid == "gamma" else None
    weight_search = WeightSearch(x1, w1, weight_elements or searched_elements(weight_bits), gammas, w_unit)
    activation_search = None
    if activation_bits != 16:
        elements = activation_elements or searched_elements(activation_bits)
        maxima = torch.ldexp(channel_max, torch.tensor(-x_unit))
        activation_search = ActivationSearch(x1, maxima, elements, shift_rule if preshift else None, gammas, x_unit)
    mse, w_best, a_best = _alternate(x1, w1, weight_search, activation_search, rounds)
    if a_best:
        a_best = replace(a_best, x_scale=torch.ldexp(a_best.x_scale, torch.tensor(x_unit)))
    row_scale = torch.ldexp(w_best.row_scale, torch.tensor(w_unit))
    return LinearSearch(weight, w_best.element, row_scale, a_best, preshift, math.ldexp(mse, 2 * (x_unit + w_unit)))


def _alternate(x, weight, weight_search, activation_search, rounds) -> tuple[float, Weight, Activation | None]:
    """(mse, weight, activation) of the best pair seen; ends early when the activation stays as it was."""
    best, w, a = None, None, None
    for _ in range(rounds):
        a_before = a
        w = weight_search(a)
        weight_q = w.dequantize(weight)
        if activation_search:
            a = activation_search(weight, weight_q, a)
        mse = output_mse(x, weight, weight_q, a)
        if best is None or mse < best[0]:
            best = mse, w, a
        if a is None or a.same_as(a_before):
            break
    return best
