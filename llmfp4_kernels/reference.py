"""The judge: encode, decode, quantize, dequantize and gemm in plain torch, short and slow.

Every fast kernel is compared with this file on the dequantized operands.
"""

from __future__ import annotations

import torch

from .errors import BadInput
from .formats import Element, Scale
from .packed import PackedFP4, pack, unpack


def require_finite(name: str, x: torch.Tensor) -> None:
    """Raise BadInput with the counts if `x` holds NaN or Inf."""
    if x.is_meta:
        raise BadInput(f"{name} of shape {list(x.shape)} is on the meta device and has no values")
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise BadInput(f"{name} of shape {list(x.shape)} holds {bad} values that are NaN or Inf")


def encode(x: torch.Tensor, element: Element) -> torch.Tensor:
    """The code (uint8) of the element nearest to each x; x is in the element's own units.

    Saturates beyond the largest element. Ties go to the even multiple of the local step (LLM-FP4 eq. 9): to the even
    mantissa for M ≥ 1; for M = 0 upwards, and half the smallest element to 0. A negative x that rounds to zero
    becomes -0; -0.0 itself becomes +0. Raises BadInput for NaN and Inf.
    """
    require_finite("x", x)
    bias, m = element.bias, element.mantissa_bits
    magnitude = x.abs().clamp(max=element.max)
    exponent = torch.frexp(magnitude).exponent - 1  # floor(log2|x|); p below is the exponent field
    p = torch.where(magnitude > 0, exponent + bias, 1).clamp(min=1)
    steps = torch.round(torch.ldexp(magnitude, bias + m - p)).int()
    # 2^M + f steps of exponent field p; a carry into the next binade is the next code.
    code = ((p - 1) << m) + steps
    return (code + (x < 0) * element.sign_code).to(torch.uint8)


def decode(codes: torch.Tensor, element: Element, dtype=torch.float32) -> torch.Tensor:
    """The value of each code, in the element's own units."""
    return torch.tensor(element.values, dtype=dtype, device=codes.device)[codes.long()]


def decode_scale(raw: torch.Tensor, scale: Scale, dtype=torch.float32) -> torch.Tensor:
    """The value of each scale byte."""
    return torch.tensor(scale.values, dtype=dtype, device=raw.device)[raw.long()]


def expand_groups(per_group: torch.Tensor, group_size: int, k: int) -> torch.Tensor:
    """[n, ceil(k/G)] → [n, k]; the last group may be partial."""
    return per_group.repeat_interleave(group_size, dim=1)[:, :k]


def quantize(w: torch.Tensor, element: Element, scale: torch.Tensor) -> torch.Tensor:
    """Packed codes [n, ceil(k/2)] of w [n, k] divided by `scale` (broadcastable to w; codes 0 where it is 0)."""
    return pack(encode(torch.where(scale > 0, w / scale, 0.0), element))


def dequantize(packed: PackedFP4, dtype=torch.float32) -> torch.Tensor:
    """The weight [n, k] that the codes stand for: element · group_scale · row_scale, without the activation's shift."""
    w = decode(unpack(packed.codes, packed.k), packed.element, torch.float64)
    if packed.group_scale is not None:
        groups = decode_scale(packed.group_scale, packed.scale, torch.float64)
        w = w * expand_groups(groups, packed.group_size, packed.k)
    return (w * packed.row_scale[:, None].double()).to(dtype)


def quantize_activation(x: torch.Tensor, packed: PackedFP4) -> torch.Tensor:
    """Codes (uint8, one a byte) of x [..., k]: the element nearest to fp32(x) · (2^shift[k] · fp32(1/x_scale))."""
    inverse = torch.reciprocal(packed.x_scale).expand(packed.k)
    if packed.shift is not None:
        inverse = torch.ldexp(inverse, packed.shift.int())
    return encode(x.float() * inverse, packed.activation)


def dequantize_activation(codes: torch.Tensor, packed: PackedFP4, dtype=torch.float32) -> torch.Tensor:
    """The activation that codes [..., k] stand for: element · x_scale · 2^-shift[k]."""
    x = decode(codes, packed.activation, torch.float64) * packed.x_scale.double()
    return (x if packed.shift is None else torch.ldexp(x, -packed.shift.int())).to(dtype)


def integer_activation(codes: torch.Tensor, packed: PackedFP4) -> torch.Tensor:
    """Codes [..., k] as integers (float64): element · integer_scale · 2^(max_shift - shift[k])."""
    x = decode(codes, packed.activation, torch.float64) * packed.activation.integer_scale
    return x if packed.shift is None else torch.ldexp(x, packed.activation.max_shift - packed.shift.int())


def integer_scale(packed: PackedFP4) -> float:
    """What one unit of the integer sum of a W4A4 product is worth, before x_scale and row_scale: a power of two."""
    shifted = 2.0**packed.activation.max_shift if packed.shift is not None else 1.0
    return 1.0 / (packed.activation.integer_scale * packed.element.integer_scale * shifted)


def gemm(x: torch.Tensor, packed: PackedFP4, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Y [m, n] float32 (W4A16 with float64 x: float64) = x [m, k] times the packed weight, plus bias [n].

    W4A4 without group scales is exact up to one stated rounding order, which every integer kernel repeats bit by bit:
    (fp32(integer sum) · x_scale·integer_scale) · row_scale + bias, each step rounded to fp32. A row of x with NaN
    or Inf gives a row of NaN. Otherwise sums are float64, rounded once.
    """
    if x.ndim != 2 or x.shape[1] != packed.k:
        raise BadInput(f"x of shape {list(x.shape)} does not match k = {packed.k}")
    if packed.activation is None or packed.group_scale is not None:
        y = x.double() @ dequantize(packed, torch.float64).T
        y = y if bias is None else y + bias.double()
        return y if x.dtype == torch.float64 else y.float()
    poisoned = ~x.isfinite().all(dim=1, keepdim=True)
    xi = integer_activation(quantize_activation(x.masked_fill(poisoned, 0.0), packed), packed)
    wi = decode(unpack(packed.codes, packed.k), packed.element, torch.float64) * packed.element.integer_scale
    y = (xi @ wi.T).float() * (packed.x_scale * integer_scale(packed)) * packed.row_scale
    return (y if bias is None else y + bias.float()).masked_fill(poisoned, float("nan"))
