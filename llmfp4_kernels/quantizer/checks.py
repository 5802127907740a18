"""What search_linear refuses: options, tensors, and results that no fp32 number or sum of squares can be."""

from __future__ import annotations

import math

import torch

from ..errors import BadInput
from ..formats import Element
from ..packed import FP32_MAX
from .descent import Pair
from .objective import Layer
from .preshift import SHIFT_RULES, Activation
from .scales import require_matrix, require_values, row_slices

GRAM_ROUNDING = 1e-4
"""What fp32 products and sums may add to a Gram matrix, as a share of its largest diagonal element or of its trace."""


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_formats(weight_bits, activation_bits, weight_elements, activation_elements, preshift):
    allowed = {"weight_bits": (weight_bits, (4, 6, 8)), "activation_bits": (activation_bits, (4, 6, 8, 16))}
    for name, (bits, known) in allowed.items():
        if not _is_whole(bits) or bits not in known:
            raise BadInput(f"{name} is {bits!r}: expected one of {', '.join(map(str, known))}")
    for name, elements in (("weight_elements", weight_elements), ("activation_elements", activation_elements)):
        listed = isinstance(elements, tuple | list) and elements and all(isinstance(e, Element) for e in elements)
        if elements is not None and not listed:
            raise BadInput(f"{name} is {elements!r}: expected a tuple of formats.Element, at least one")
    if not isinstance(preshift, bool):
        raise BadInput(f"preshift is {preshift!r}: expected True or False")


def check_options(rounds, grid, shift_rule, objective, output_gradient, gamma_range):
    if not _is_whole(rounds) or rounds < 1:
        raise BadInput(f"rounds is {rounds!r}: a whole number is needed, at least 1")
    numbers = isinstance(gamma_range, tuple | list) and [g for g in gamma_range if isinstance(g, int | float)]
    if not numbers or len(numbers) != 2 or not -math.inf < numbers[0] < numbers[1] < math.inf:
        raise BadInput(f"gamma_range is {gamma_range}: expected two finite numbers, the smaller first")
    for name, value, known in (
        ("grid", grid, ("additive", "gamma")),
        ("shift_rule", shift_rule, SHIFT_RULES),
        ("objective", objective, ("mse", "fisher")),
    ):
        if value not in known:
            raise BadInput(f"unknown {name} {value!r}: known are {', '.join(known)}")
    if (objective == "fisher") != (output_gradient is not None):
        given = "none was given" if output_gradient is None else "one was given"
        raise BadInput(f"objective 'fisher' takes an output_gradient and 'mse' takes none: {objective!r}, and {given}")


def check_inputs(x, weight, channel_max, output_gradient):
    require_matrix("x", x)
    if x.shape[1] != weight.shape[1]:
        raise BadInput(f"x has {x.shape[1]} channels and weight {list(weight.shape)} takes {weight.shape[1]}")
    if channel_max is not None:
        require_values("channel_max", channel_max)
        if list(channel_max.shape) != [x.shape[1]] or not channel_max.isfinite().all():
            raise BadInput(f"channel_max must hold {x.shape[1]} finite numbers, got shape {list(channel_max.shape)}")
        low = int((channel_max < x.abs().amax(0)).sum())
        if low:
            raise BadInput(f"channel_max is below the largest input of x in {low} of {x.shape[1]} channels")
    if output_gradient is not None:
        require_matrix("output_gradient", output_gradient)
        if list(output_gradient.shape) != [x.shape[0], weight.shape[0]]:
            expected = [x.shape[0], weight.shape[0]]
            raise BadInput(
                f"output_gradient has shape {list(output_gradient.shape)}, expected [tokens, n] = {expected}"
            )


def check_gram(gram, gram_tokens, k, activation_bits, output_gradient):
    require_matrix("gram", gram)
    if list(gram.shape) != [k, k]:
        raise BadInput(f"gram has shape {list(gram.shape)}, expected [k, k] = {[k, k]}")
    if not _is_whole(gram_tokens) or gram_tokens < 1:
        raise BadInput(f"gram_tokens is {gram_tokens!r}: a gram comes with the number of its tokens, at least 1")
    if activation_bits != 16 or output_gradient is not None:
        raise BadInput("a gram serves objective 'mse' with activation_bits=16 only: the rest looks at tokens")
    power = gram.diagonal()
    if power.min() < 0:
        raise BadInput(f"gram is no sum of x'x: its diagonal, sums of squares, goes down to {power.min().item():.3g}")
    skew = max((gram[rows] - gram[:, rows].T).abs().max().item() for rows in row_slices(gram))
    if skew > GRAM_ROUNDING * power.max().item():
        raise BadInput(f"gram is no sum of x'x: it differs from its transpose by up to {skew:.3g}")


def check_squares(found: Pair, layer: Layer) -> None:
    """Raise BadInput for a squared error that is negative by more than rounding."""
    e = found.weight.dequantize(layer.weight) - layer.weight
    most = layer.gram.diagonal().sum().item() * e.square().sum(dtype=torch.float64).item() / len(e)
    if found.mse < -GRAM_ROUNDING * most:
        raise BadInput(f"gram is no sum of x'x: it makes a mean squared error {found.mse / most:.3g} times its trace's")


def check_x_scale(activation: Activation, largest: float) -> None:
    """Raise BadInput where fp32 cannot hold what activations are divided by."""
    scale, top = activation.x_scale.item(), int(activation.shift.max())
    if scale < torch.finfo(torch.float32).tiny or 2.0**top / scale > FP32_MAX:
        raise BadInput(
            f"x goes up to {largest:.3g} only: {activation.element.name} at x_scale {scale:.3g} and shifts up to {top} "
            "has no 2^shift / x_scale within fp32"
        )
