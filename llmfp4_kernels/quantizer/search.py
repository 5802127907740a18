"""LLM-FP4's search (arXiv 2310.16836, algorithm 1): formats and scales of one linear layer by its output error."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..errors import BadInput
from ..formats import FP4_ELEMENTS, Element, searched_elements
from ..packed import PackedFP4
from ..reference import decode, encode, quantize
from .checks import check_formats, check_gram, check_inputs, check_options, check_squares, check_x_scale
from .descent import GAMMA_RANGE, Descents, gamma_grid
from .objective import Layer
from .preshift import Activation
from .scales import require_matrix


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
    """mean squared error of the layer's output against x @ weight.T, over all features and tokens of x or the gram"""
    objective_value: float
    """what was minimized: mse, or the mean of squared errors times squared gradients"""

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
        """The layer as 4-bit codes. Raises BadInput for weights of 6 and 8 bits, which have no packed form."""
        element = self.weight_element
        if element.name not in FP4_ELEMENTS:
            raise BadInput(f"{element.name} has {element.bits} bits: only 4-bit weights have a packed form")
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


def _unit_exponent(largest: torch.Tensor) -> int:
    """The exponent e with 2^(e-1) ≤ largest < 2^e, held where 2^-e is a normal fp32; 0 for 0."""
    return max(-120, min(120, int(torch.frexp(largest.double()).exponent)))


@torch.no_grad()
def search_linear(
    x: torch.Tensor | None,
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
    output_gradient: torch.Tensor | None = None,
    gram: torch.Tensor | None = None,
    gram_tokens: int = 0,
    gamma_range: tuple[float, float] = GAMMA_RANGE,
) -> LinearSearch:
    """Formats, row scales, x_scale and shift of a linear layer by the squared error of its output.

    x [tokens, k] are the inputs of the full-precision layer and weight [n, k] its weight, on one device, any float
    dtype. Bits are 4, 6 or 8; activation_bits=16 leaves activations as they are, and one weight search suffices.
    Weights and activations are searched in turn, each beside the other's last choice, and the best pair of all rounds
    is kept. channel_max [k] gives the largest magnitudes over all calibration tokens when x is a sample of them.

    grid        "additive": bias b0 + delta, delta in -1..2 per row and -1..4 per tensor, besides the points of "gamma":
                never a larger objective than "gamma" with the same rule; with "phase", than "gamma" with "paper", above
                4 bits also with "release"
                "gamma": the paper's 100 factors on the bias b0 of the largest magnitude, from gamma_range[0] on and
                below gamma_range[1]
    shift_rule  how channel biases become integer shifts (see preshift.channel_shift); "phase" searches it
    objective   "mse": mean squared error of the output
                "fisher": squared errors weighted by the squares of output_gradient [tokens, n], the gradient of the
                task's loss with respect to the layer's output at these inputs (the paper's appendix A)
    gram        with activation_bits=16: sum of x'x [k, k] (float64) over gram_tokens calibration tokens, which decides
                in place of x; x may be None

    Raises BadInput for NaN, Inf, empty, sparse, meta or mismatched tensors and unknown options; for a gram that cannot
    be a sum of x'x: asymmetric, or with a negative square, on its diagonal or in the error that is found (its
    eigenvalues are not looked at); and for inputs so small that fp32 has no 2^shift / x_scale (all below about 1e-35
    at 4 bits, 1e-24 at 8).
    """
    require_matrix("weight", weight)
    check_formats(weight_bits, activation_bits, weight_elements, activation_elements, preshift)
    check_options(rounds, grid, shift_rule, objective, output_gradient, gamma_range)
    if x is None and gram is None:
        raise BadInput("x is None: without inputs a search needs a gram")
    if x is not None:
        check_inputs(x, weight, channel_max, output_gradient)
    if gram is not None:
        check_gram(gram, gram_tokens, weight.shape[1], activation_bits, output_gradient)
    elements = weight_elements or searched_elements(weight_bits), None
    if activation_bits != 16:
        elements = elements[0], activation_elements or searched_elements(activation_bits)
    weight = weight.detach().float()
    layer, channel_max, units = _in_units(x, weight, channel_max, output_gradient, gram, gram_tokens)
    descents = Descents(layer, channel_max, *elements, units[:2], rounds, gamma_grid(*gamma_range))
    found = descents.best(grid, shift_rule if preshift else None)
    x_unit, w_unit, g_unit = units
    activation = found.activation
    if activation:
        activation = replace(activation, x_scale=torch.ldexp(activation.x_scale, torch.tensor(x_unit)))
        check_x_scale(activation, math.ldexp(channel_max.amax().item(), x_unit))
    if gram is not None:
        check_squares(found, layer)
    return LinearSearch(
        weight=weight,
        weight_element=found.weight.element,
        row_scale=torch.ldexp(found.weight.row_scale, torch.tensor(w_unit)),
        activation=activation,
        preshift=preshift,
        mse=math.ldexp(max(found.mse, 0.0), 2 * (x_unit + w_unit)),
        objective_value=math.ldexp(max(found.value, 0.0), 2 * (x_unit + w_unit + g_unit)),
    )


def _in_units(x, weight, channel_max, output_gradient, gram, gram_tokens) -> tuple[Layer, torch.Tensor, tuple]:
    """(layer, channel maxima, exponents of inputs, weight and gradient), divided by powers of two.

    Every product and code stays what it was, and squares of tiny or huge inputs stay in range.
    """
    x = weight[:0] if x is None else x.detach().float()
    if channel_max is None:
        channel_max = x.abs().amax(0) if len(x) else (gram.diagonal().double() / gram_tokens).clamp(min=0).sqrt()
    channel_max = channel_max.to(weight)
    x_unit, w_unit = _unit_exponent(channel_max.amax()), _unit_exponent(weight.abs().amax())
    importance, g_unit = None, 0
    if output_gradient is not None:
        g_unit = _unit_exponent(output_gradient.abs().amax())
        importance = torch.ldexp(output_gradient.float(), torch.tensor(-g_unit)).square()
    if gram is not None:
        gram = (gram.double() / gram_tokens * 2.0 ** (-2 * x_unit)).float()  # ldexp's own 2^n would be fp32
    x, weight = torch.ldexp(x, torch.tensor(-x_unit)), torch.ldexp(weight, torch.tensor(-w_unit))
    layer = Layer(x, weight, importance, gram)
    return layer, torch.ldexp(channel_max, torch.tensor(-x_unit)), (x_unit, w_unit, g_unit)
