"""The judge: quantize, dequantize and gemm in plain torch, short and slow.

Every fast kernel is compared with this file on the dequantized operands.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .encode import (
    E4M3_MAX,
    decode,
    decode_scale,
    e4m3_scale,
    e8m0_scale,
    encode,
    expand_groups,
    group_largest,
    quotient,
    require_finite,
)
from .errors import BadInput
from .formats import E4M3, E8M0, Element
from .packed import PackedFP4, pack, unpack

__all__ = ["decode", "decode_scale", "encode", "expand_groups", "require_finite"]  # for those who want one judge

TOKEN_MIN = 2.0**-100
"""Tokens whose largest input is below this get the scale of this: their reciprocal must be finite."""
RESIDUAL = 64
"""Steps per integer unit in which the error of an integer group is counted, so that every backend counts the same."""


def quantize(w: torch.Tensor, element: Element, scale: torch.Tensor) -> torch.Tensor:
    """Packed codes [n, ceil(k/2)] of w [n, k] divided by `scale` (broadcastable to w; codes 0 where it is 0)."""
    return pack(encode(torch.where(scale > 0, w / scale, 0.0), element))


class XScales(NamedTuple):
    """Scales of activations x [..., k]."""

    x_scale: torch.Tensor
    """float32 [] or, if dynamic, [..., 1]"""
    group: torch.Tensor | None = None
    """uint8 [..., ceil(k/G)], raw bytes of dynamic.group_scale"""


def scaled_input(x: torch.Tensor, packed: PackedFP4) -> torch.Tensor:
    """x [..., k] · x_factor, one rounding to fp32 (float64 stays float64).

    Activations that stay as they are meet the shift here, · 2^-shift[k]; codes carry it (`integer_activation`).
    """
    x = x if x.dtype == torch.float64 else x.float()
    x = x if packed.x_factor is None else x * packed.x_factor
    return x if packed.activation or packed.shift is None else torch.ldexp(x, -packed.shift.int())


def activation_scales(x: torch.Tensor, packed: PackedFP4) -> XScales:
    """The scales that meet x [..., k]: the static one, or those of its tokens and groups.

    Per token, largest / element.max, with "integer" groups largest / (element.max · max_factor); with "e4m3" groups
    largest / (element.max · 448), NVFP4's rule for the tensor; with "e8m0" groups 1 (OCP MX spec 1.0, rounded "even").
    """
    if packed.dynamic is None:
        return XScales(packed.x_scale)
    dynamic, element = packed.dynamic, packed.activation
    u = scaled_input(x, packed).float()
    reach = {"integer": element.max_factor, "e4m3": E4M3_MAX}
    top = element.max * (reach.get(dynamic.group_scale.name, 1.0) if dynamic.group_scale else 1.0)
    x_scale = quotient(u.abs().amax(-1, keepdim=True).clamp(min=TOKEN_MIN), top)
    if dynamic.group_scale is None:
        return XScales(x_scale)
    flat = u.reshape(-1, u.shape[-1])
    largest = group_largest(flat, dynamic.group_size).view(*u.shape[:-1], -1)
    if dynamic.group_scale == E8M0:
        return XScales(torch.ones_like(x_scale), e8m0_scale(largest, element))
    if dynamic.group_scale == E4M3:
        return XScales(x_scale, e4m3_scale(quotient(largest, element.max) / x_scale))
    return XScales(x_scale, _integer_groups(u * torch.reciprocal(x_scale), element, dynamic.group_size))


def _integer_groups(v: torch.Tensor, element: Element, group_size: int) -> torch.Tensor:
    """uint8 [..., groups]: the least integer that holds the group's largest value, or the one below if it errs less."""
    v = torch.nn.functional.pad(v, (0, -v.shape[-1] % group_size)).unflatten(-1, (-1, group_size))
    holds = torch.ceil(quotient(v.abs().amax(-1), element.max)).clamp(1, element.max_factor)
    below = (holds - 1).clamp(min=1)
    exact = torch.round(v * (element.integer_scale * RESIDUAL))

    def error(factor):
        codes = encode(v * torch.reciprocal(factor)[..., None], element)
        integer = decode(codes, element) * (element.integer_scale * RESIDUAL) * factor[..., None]
        return (exact - integer).double().square().sum(-1)

    return torch.where(error(below) < error(holds), below, holds).to(torch.uint8)


def inverse_scale(packed: PackedFP4, scales: XScales) -> torch.Tensor:
    """fp32, broadcastable to x: 2^shift / x_scale."""
    inverse = torch.reciprocal(scales.x_scale)
    return inverse if packed.shift is None else torch.ldexp(inverse.expand(packed.k), packed.shift.int())


def group_factors(packed: PackedFP4, scales: XScales, dtype=torch.float32) -> torch.Tensor:
    """The value of each channel's group scale [..., k]."""
    values = decode_scale(scales.group, packed.dynamic.group_scale, dtype)
    return values.repeat_interleave(packed.dynamic.group_size, -1)[..., : packed.k]


def quantize_activation(x: torch.Tensor, packed: PackedFP4, scales: XScales | None = None) -> torch.Tensor:
    """Codes (uint8, one a byte) of x [..., k]: the element nearest to u · (2^shift[k] · fp32(1/x_scale)).

    u = fp32(x · x_factor). With groups that product, rounded, is multiplied by fp32(1 / group factor). What goes beyond
    fp32 on the way saturates, as what goes beyond the element does. Raises BadInput where u is NaN or Inf.
    """
    scales = scales or activation_scales(x, packed)
    u = scaled_input(x, packed).float()
    require_finite("x · x_factor", u)
    v = u * inverse_scale(packed, scales)
    if scales.group is not None:
        v = v * torch.reciprocal(group_factors(packed, scales))
    return encode(v.clamp(-packed.activation.max, packed.activation.max), packed.activation)


def dequantize_activation(
    codes: torch.Tensor, packed: PackedFP4, dtype=torch.float32, scales: XScales | None = None
) -> torch.Tensor:
    """What codes [..., k] stand for: element · x_scale · 2^-shift[k], or element · x_scale · group factor.

    That is x · x_factor, rounded. Dynamic activations need the `scales` of their x.
    """
    if scales is None and packed.dynamic is not None:
        raise BadInput("codes of a dynamic activation mean nothing without the scales of its tokens")
    scales = scales or XScales(packed.x_scale)
    x = decode(codes, packed.activation, torch.float64) * scales.x_scale.double()
    if scales.group is not None:
        x = x * group_factors(packed, scales, torch.float64)
    return (x if packed.shift is None else torch.ldexp(x, -packed.shift.int())).to(dtype)


def round_activation(x: torch.Tensor, packed: PackedFP4, dtype=torch.float32) -> torch.Tensor:
    """x [..., k] · x_factor as the kernels see it, rounded to the activation's codes; itself for 16-bit activations."""
    if packed.activation is None:
        return scaled_input(x, packed).to(dtype)
    scales = activation_scales(x, packed)
    return dequantize_activation(quantize_activation(x, packed, scales), packed, dtype, scales)


def integer_activation(codes: torch.Tensor, packed: PackedFP4, scales: XScales | None = None) -> torch.Tensor:
    """Codes [..., k] as integers (float64): element · integer_scale, times 2^(max_shift - shift[k]) or the group's."""
    x = decode(codes, packed.activation, torch.float64) * packed.activation.integer_scale
    if scales is not None and scales.group is not None:
        return x * group_factors(packed, scales, torch.float64)
    return x if packed.shift is None else torch.ldexp(x, packed.activation.max_shift - packed.shift.int())


def integer_scale(packed: PackedFP4) -> float:
    """What one unit of the integer sum of a W4A4 product is worth, before x_scale and row_scale: a power of two."""
    shifted = 2.0**packed.activation.max_shift if packed.shift is not None else 1.0
    return 1.0 / (packed.activation.integer_scale * packed.element.integer_scale * shifted)


def _grouped_weight(packed: PackedFP4) -> torch.Tensor:
    """element · group_scale [n, k] float64."""
    w = decode(unpack(packed.codes, packed.k), packed.element, torch.float64)
    if packed.group_scale is None:
        return w
    groups = decode_scale(packed.group_scale, packed.scale, torch.float64)
    return w * expand_groups(groups, packed.group_size, packed.k)


def stored_weight(packed: PackedFP4, dtype=torch.float64) -> torch.Tensor:
    """element · group_scale · row_scale [n, k]: what meets activations that x_factor has multiplied."""
    return (_grouped_weight(packed) * packed.row_scale[:, None].double()).to(dtype)


def dequantize(packed: PackedFP4, dtype=torch.float32) -> torch.Tensor:
    """The weight [n, k] that the codes stand for: element · group_scale · row_scale · x_factor.

    Without the shift where activations are quantized: there it is theirs. Otherwise · 2^-shift[k].
    """
    w = stored_weight(packed)
    w = w if packed.x_factor is None else w * packed.x_factor.double()
    return (w if packed.activation or packed.shift is None else torch.ldexp(w, -packed.shift.int())).to(dtype)


def gemm(x: torch.Tensor, packed: PackedFP4, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Y [m, n] float32 (float64 for float64 x, where the product is no integer one) = x [m, k] · weight + bias [n].

        (fp32(Σ_k) · (x_scale · unit)) · row_scale + bias, each step rounded to fp32;  Σ · row_scale + bias for W4A16

    is the order of every kernel, so near the end of fp32 all of them give the same Inf. If packed.integer, Σ is a sum
    of integers and every kernel repeats the whole bit by bit. Otherwise Σ is a float64 sum, where the kernels' fp32
    sums may also overflow on the way. Sums begin at +0: one of zeros is +0 whatever the signs of its terms.

    Quantized activations: a row of x with NaN or Inf, or that goes beyond fp32 when it is multiplied by x_factor or
    rounded (E8M0 groups only), gives a row of NaN; what goes beyond an element's range saturates.
    """
    if x.ndim != 2 or x.shape[1] != packed.k:
        raise BadInput(f"x of shape {list(x.shape)} does not match k = {packed.k}")
    dtype = torch.float64 if x.dtype == torch.float64 and not packed.integer else torch.float32
    if len(x) == 0:
        return torch.empty(0, packed.shape[0], dtype=dtype, device=x.device)
    if packed.activation is None:
        sums = _sums(scaled_input(x, packed).double(), _grouped_weight(packed))
        return _finished(sums.to(dtype), packed, bias)
    poisoned = ~scaled_input(x, packed).float().isfinite().all(dim=1, keepdim=True)
    x = x.masked_fill(poisoned, 0.0)
    scales = activation_scales(x, packed)
    codes = quantize_activation(x, packed, scales)
    if packed.integer:
        wi = decode(unpack(packed.codes, packed.k), packed.element, torch.float64) * packed.element.integer_scale
        sums, worth = _sums(integer_activation(codes, packed, scales), wi), scales.x_scale * integer_scale(packed)
    else:
        units = XScales(torch.ones_like(scales.x_scale), scales.group)
        rounded = dequantize_activation(codes, packed, torch.float64, units)
        poisoned |= ~rounded.float().isfinite().all(dim=1, keepdim=True)
        sums, worth = _sums(rounded.masked_fill(poisoned, 0.0), _grouped_weight(packed)), scales.x_scale
    return _finished(sums.to(dtype) * worth, packed, bias).masked_fill(poisoned, float("nan"))


def _sums(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [m, k] times weight [n, k] in float64. torch's matmul with k = 1 is a product, which may be -0: no sum is."""
    return x @ weight.T + 0.0


def _finished(sums: torch.Tensor, packed: PackedFP4, bias: torch.Tensor | None) -> torch.Tensor:
    y = sums * packed.row_scale.to(sums.dtype)
    return y if bias is None else y + bias.to(sums.dtype)
