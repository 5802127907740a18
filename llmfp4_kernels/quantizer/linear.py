"""One linear layer: its weight packed by a recipe, and the output error of the result."""

from __future__ import annotations

import dataclasses

import torch

from .. import reference
from ..errors import BadInput
from ..formats import Recipe
from ..formats import recipe as recipe_named
from ..packed import PackedFP4
from .calibrate import LayerInputs
from .gptq import quantize_feedback, smoothing_factor
from .scales import quantize_weight, require_values, scale_of_largest
from .search import search_linear


def quantize_linear(weight: torch.Tensor, recipe: str | Recipe, calibration=None) -> PackedFP4:
    """Pack a weight [n, k]. calibration: activations [tokens, k] or LayerInputs, if the recipe needs them.

    Raises BadInput for NaN/Inf, empty, mismatched or missing input.
    """
    recipe = recipe_named(recipe)
    if not isinstance(calibration, LayerInputs | torch.Tensor | None):
        raise BadInput(f"calibration is a {type(calibration).__name__}, expected a tensor [tokens, k]")
    inputs = LayerInputs(x=calibration) if isinstance(calibration, torch.Tensor) else calibration
    require_values("weight", weight)
    if recipe.needs_calibration:
        if inputs is None or inputs.x is None:
            raise BadInput(f"recipe {recipe.name!r} needs calibration activations [tokens, k], got none")
        if inputs.x.ndim != 2 or inputs.x.shape[0] < 1 or inputs.x.shape[1] != weight.shape[-1]:
            raise BadInput(
                f"calibration of shape {list(inputs.x.shape)} does not match [tokens ≥ 1, k = {weight.shape[-1]}]"
            )
        reference.require_finite("calibration", inputs.x)
        if inputs.channel_max is None:
            inputs = dataclasses.replace(inputs, channel_max=inputs.x.abs().amax(0))
    if recipe.search:
        return search_linear(
            inputs.x,
            weight,
            activation_bits=recipe.activation_elements[0].bits if recipe.activation_elements else 16,
            preshift=recipe.preshift,
            channel_max=inputs.channel_max,
            weight_elements=recipe.weight_elements,
            activation_elements=recipe.activation_elements or None,
            objective="mse" if inputs.gradient is None else "fisher",
            output_gradient=inputs.gradient,
            gram=inputs.gram if recipe.needs_gram else None,
            gram_tokens=inputs.tokens,
        ).packed(recipe.name)
    if recipe.error_feedback:
        x = inputs.x.float()
        gram = x.T @ x if inputs.gram is None else inputs.gram
        x_factor = smoothing_factor(inputs.channel_max) if recipe.smoothing else None
        packed = quantize_feedback(weight, gram, recipe.weight_elements, x_factor, recipe.name)
    else:
        packed = quantize_weight(weight, recipe)
    return _describe_activation(packed, recipe, inputs)


def _describe_activation(packed: PackedFP4, recipe: Recipe, inputs: LayerInputs | None) -> PackedFP4:
    """The weight with the recipe's dynamic activations, or static ones scaled by their largest magnitude."""
    if not recipe.activation_elements:
        return packed
    activation = recipe.activation_elements[0]
    if recipe.dynamic is not None:
        return dataclasses.replace(packed, activation=activation, dynamic=recipe.dynamic)
    x_scale = scale_of_largest(inputs.channel_max.amax().float(), activation)
    return dataclasses.replace(packed, activation=activation, x_scale=x_scale)


def relative_error(weight: torch.Tensor, packed: PackedFP4, x: torch.Tensor | None) -> float:
    """|Y_q - Y|² / |Y|² of the layer's output on x [tokens, k], or of the weight itself without x."""
    if x is None:
        quantized = reference.dequantize(packed)
        return ((quantized - weight).square().sum() / weight.square().sum().clamp_min(1e-30)).item()
    y = x @ weight.T
    y_q = reference.round_activation(x, packed) @ reference.stored_weight(packed, torch.float32).T
    return ((y_q - y).square().sum() / y.square().sum().clamp_min(1e-30)).item()
