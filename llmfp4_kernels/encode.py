"""Numbers to codes and back, elements and group scales, in plain torch, short and slow."""

from __future__ import annotations

import torch

from .errors import BadInput
from .formats import E4M3, Element, Scale

E8M0_RULES = ("even", "floor", "rceil")
E4M3_MAX, E4M3_MIN = max(v for v in E4M3.values if v == v), min(v for v in E4M3.values if v > 0)


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


def snap(x: torch.Tensor, element: Element) -> torch.Tensor:
    """The element nearest to each x (float32, in the element's units): decode(encode(x)), as float arithmetic.

    Adding and subtracting 1.5·2^23 steps rounds to a multiple of the step, half to even, in two vector instructions;
    the step is read off the exponent field. A search calls this hundreds of times per layer, so x is not checked.
    """
    x = x.clamp(-element.max, element.max)
    step = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=2.0 ** (1 - element.bias))
    step *= 1.5 * 2.0 ** (23 - element.mantissa_bits)
    return x.add_(step).sub_(step)


def decode(codes: torch.Tensor, element: Element, dtype=torch.float32) -> torch.Tensor:
    """The value of each code, in the element's own units."""
    return torch.tensor(element.values, dtype=dtype, device=codes.device)[codes.long()]


def decode_scale(raw: torch.Tensor, scale: Scale, dtype=torch.float32) -> torch.Tensor:
    """The value of each scale byte."""
    return torch.tensor(scale.values, dtype=dtype, device=raw.device)[raw.long()]


def expand_groups(per_group: torch.Tensor, group_size: int, k: int) -> torch.Tensor:
    """[n, ceil(k/G)] → [n, k]; the last group may be partial."""
    return per_group.repeat_interleave(group_size, dim=1)[:, :k]


def group_largest(w: torch.Tensor, group_size: int) -> torch.Tensor:
    """Largest magnitude of each group: [n, k] → [n, ceil(k/G)]; the last group may be partial."""
    padded = torch.nn.functional.pad(w.abs(), (0, -w.shape[1] % group_size))
    return padded.unflatten(1, (-1, group_size)).amax(2)


def quotient(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """x / divisor, rounded once on every device: by a Python number torch's CUDA kernel multiplies with 1 / divisor."""
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)


def e8m0_scale(largest: torch.Tensor, element: Element, rule: str = "even") -> torch.Tensor:
    """The E8M0 byte (uint8) of groups with these largest magnitudes (float32).

    floor   2^(floor(log2 largest) - emax), the sample rule of OCP MX spec 1.0 section 6.3; clips mantissas above 1.5
    even    one more where the largest magnitude's mantissa is ≥ 1.75, as compressed-tensors does; least error
    rceil   the least power of two ≥ largest / element.max, as cuBLAS documents: never clips

    A group of zeros gets 127 (scale 1).
    """
    if rule not in E8M0_RULES:
        raise BadInput(f"unknown E8M0 rule {rule!r}: known are {', '.join(E8M0_RULES)}")
    if rule == "rceil":
        byte = quotient(largest, element.max).view(torch.int32) + 0x7FFFFF >> 23
    else:
        carry = 1 << 21 if rule == "even" else 0
        emax = element.max_shift - element.bias
        byte = (largest.view(torch.int32) + carry >> 23) - emax
    return torch.where(largest > 0, byte.clamp(0, 254), 127).to(torch.uint8)


def e4m3_scale(scale: torch.Tensor) -> torch.Tensor:
    """The E4M3 byte (uint8) nearest to a positive scale, held inside 2^-9..448 so that no group is lost."""
    return scale.clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
