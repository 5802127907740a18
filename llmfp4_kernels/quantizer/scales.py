"""Scales taken from the largest magnitude, and quantization of a weight with them: no data, no search."""

from __future__ import annotations

import torch

from ..encode import E4M3_MAX, decode_scale, e4m3_scale, e8m0_scale, expand_groups, group_largest
from ..errors import BadInput
from ..formats import E8M0, Element, Recipe
from ..packed import PackedFP4
from ..reference import quantize

CHUNK_ELEMENTS = 1 << 22
"""Rows are quantized this many elements at a time, so that the fp32 temporaries stay below 0.2 GB."""


def scale_of_largest(largest: torch.Tensor, element: Element) -> torch.Tensor:
    """The scale that maps `largest` (≥ 0) onto the element's maximum; 1 where there is nothing but zeros."""
    scale = largest / element.max
    return torch.where(scale > 0, scale, 1.0)


def require_values(name: str, x: torch.Tensor) -> None:
    """Raise BadInput unless x is one dense tensor with values."""
    if not isinstance(x, torch.Tensor):
        raise BadInput(f"{name} must be a tensor, got a {type(x).__name__}")
    if x.is_nested:
        raise BadInput(f"{name} is a nested tensor of {x.size(0)}: a dense one is needed")
    if x.layout != torch.strided:
        raise BadInput(f"{name} of shape {list(x.shape)} has the layout {x.layout}: a dense tensor is needed")
    if x.is_meta:
        raise BadInput(f"{name} of shape {list(x.shape)} is on the meta device and has no values")


def require_matrix(name: str, x: torch.Tensor) -> None:
    """Raise BadInput unless x is a dense, non-empty, finite matrix of a float dtype whose values fit in fp32."""
    require_values(name, x)
    if x.ndim != 2 or x.numel() == 0:
        raise BadInput(f"{name} must be a matrix with at least one row and column, got shape {list(x.shape)}")
    if not x.dtype.is_floating_point:
        raise BadInput(f"{name} must have a float dtype, got {x.dtype}")
    bad = sum(int((~x[rows].float().isfinite()).sum()) for rows in row_slices(x))
    if bad:
        raise BadInput(f"{name} of shape {list(x.shape)} holds {bad} values that are NaN, Inf or beyond fp32")


def row_slices(x: torch.Tensor, elements: int = CHUNK_ELEMENTS) -> list[slice]:
    """The rows of x [n, k] in runs of at most `elements` values, one row at least."""
    n, step = x.shape[0], max(1, elements // x.shape[1])
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _row_scale(largest: torch.Tensor, tensor_largest: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """[n] float32. With E4M3 groups the largest group gets 448, the top of their range (NVFP4: of the whole tensor)."""
    element = recipe.weight_elements[0]
    if recipe.group_scale is None:
        return scale_of_largest(largest, element)
    if recipe.group_scale == E8M0:
        return torch.ones_like(largest)
    reach = tensor_largest.expand_as(largest) if recipe.tensor_scale else largest
    return scale_of_largest(reach / E4M3_MAX, element)


def _quantize_rows(w: torch.Tensor, tensor_largest: torch.Tensor, recipe: Recipe, rule: str):
    """(codes, row_scale, group_scale or None) of some rows, float32."""
    element, group_size = recipe.weight_elements[0], recipe.group_size
    row_scale = _row_scale(w.abs().amax(1), tensor_largest, recipe)
    if recipe.group_scale is None:
        return quantize(w, element, row_scale[:, None]), row_scale, None
    largest = group_largest(w, group_size)
    if recipe.group_scale == E8M0:
        groups = e8m0_scale(largest, element, rule)
    else:
        groups = e4m3_scale(largest / element.max / row_scale[:, None])
    scale = decode_scale(groups, recipe.group_scale) * row_scale[:, None]
    return quantize(w, element, expand_groups(scale, group_size, w.shape[1])), row_scale, groups


def quantize_weight(weight: torch.Tensor, recipe: Recipe, *, e8m0_rule: str = "even") -> PackedFP4:
    """Quantize weight [n, k] (any float dtype) to nearest, with the scales of its largest magnitudes.

    row scale only   largest of the row / element.max
    E8M0 groups      OCP MX spec 1.0, rounded by `e8m0_rule`; row_scale is 1
    E4M3 groups      NVFP4: one fp32 scale largest / (448 · element.max) for the tensor, multiplied (ModelOpt's
                     convention), in every row_scale. Without `tensor_scale` the same for each row by itself.

    Rows of zeros get scale 1 and codes 0. Activations are not described: activation, x_scale and shift are None.
    Raises BadInput for NaN, Inf, an empty or non-2-d or integer weight, and for a recipe that needs a search.
    """
    require_matrix("weight", weight)
    if recipe.search or len(recipe.weight_elements) != 1:
        names = ", ".join(e.name for e in recipe.weight_elements)
        raise BadInput(f"recipe {recipe.name!r} searches its scales (elements {names}): use search_linear")
    chunks = row_slices(weight)
    tensor_largest = torch.stack([weight[rows].float().abs().amax() for rows in chunks]).amax()
    parts = [_quantize_rows(weight[rows].float(), tensor_largest, recipe, e8m0_rule) for rows in chunks]
    codes, row_scale, groups = zip(*parts)
    return PackedFP4(
        codes=torch.cat(codes),
        row_scale=torch.cat(row_scale),
        k=weight.shape[1],
        element=recipe.weight_elements[0],
        group_scale=torch.cat(groups) if recipe.group_scale else None,
        scale=recipe.group_scale,
        group_size=recipe.group_size,
        recipe=recipe.name,
    )
