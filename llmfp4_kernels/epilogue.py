"""What may follow a product before its one rounding: y = silu(gate) · up of a gated layer, and a residual.

Everything is fp32 arithmetic, each operation rounded to nearest: with the same sums, kernels that do it themselves
(csrc/cuda/epilogue.h) and the composition here return the same bits.
"""

from __future__ import annotations

import torch

from .errors import BadInput

GATED_ROWS = 8
"""Rows of a gated weight are so many gates, then their ups, and so on."""
_COEFFICIENTS = (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Twice [h, ...] → [2h, ...], eight rows of each in turn. Raises BadInput unless h % 8 = 0 and shapes agree."""
    if gate.shape != up.shape or gate.shape[0] % GATED_ROWS:
        shapes = f"{list(gate.shape)} and {list(up.shape)}"
        raise BadInput(f"gate and up need one shape and rows in {GATED_ROWS}s, got {shapes}")
    halves = [t.reshape(-1, GATED_ROWS, *t.shape[1:]) for t in (gate, up)]
    return torch.stack(halves, 1).reshape(-1, *gate.shape[1:])


def gate_and_up(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., 2h] → ([..., h], [..., h]): inverse of `interleave` along the last dimension."""
    gate, up = y.unflatten(-1, (-1, 2, GATED_ROWS)).unbind(-2)
    return gate.flatten(-2), up.flatten(-2)


def exponential(x: torch.Tensor) -> torch.Tensor:
    """e^x of float32, to 2 units in the last place for |x| up to 87, beyond that of ±87; the same bits everywhere."""
    x = x.clamp(-87.0, 87.0)
    n = torch.round(x * 1.44269504)
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = torch.full_like(r, 1.9875691500e-4)
    for coefficient in _COEFFICIENTS:
        p = p * r + coefficient
    power = (n.nan_to_num().int() + 127 << 23).view(torch.float32)
    return (p * r * r + r + 1.0) * power


def silu(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + e^-x) of float32, below -87 that of -87 (0 to 1e-36); the same bits everywhere."""
    x = torch.where(x < -87.0, -87.0, x)
    return x / (exponential(-x) + 1.0)


def finish(y: torch.Tensor, residual: torch.Tensor | None, gated: bool, dtype: torch.dtype) -> torch.Tensor:
    """Y [..., n], float32 with its bias (float64: torch's silu) → [..., n or n/2] of dtype."""
    if gated:
        gate, up = gate_and_up(y)
        y = (torch.nn.functional.silu(gate) if y.dtype == torch.float64 else silu(gate)) * up
    return (y if residual is None else y + residual).to(dtype)


def gated_gradient(y: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """dL/dy [..., 2h] of silu(gate) · up, from its dL [..., h]; dtype of grad."""
    gate, up = (part.to(torch.promote_types(y.dtype, torch.float32)) for part in gate_and_up(y))
    sigmoid = torch.sigmoid(gate)
    parts = grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid
    pairs = [part.unflatten(-1, (-1, GATED_ROWS)) for part in parts]
    return torch.stack(pairs, -2).flatten(-3).to(grad.dtype)


def require_epilogue(x: torch.Tensor, n: int, residual: torch.Tensor | None, gated: bool) -> None:
    """Raise BadInput where a residual does not have y's shape, dtype and device, or n outputs are no gates and ups."""
    if gated and n % (2 * GATED_ROWS):
        raise BadInput(f"gates and ups come in {GATED_ROWS}s, a gated weight needs n in {2 * GATED_ROWS}s, not {n}")
    if residual is None:
        return
    expected = [*x.shape[:-1], n // 2 if gated else n]
    if (list(residual.shape), residual.dtype, residual.device) != (expected, x.dtype, x.device):
        found = f"{residual.dtype} {list(residual.shape)} on {residual.device}"
        raise BadInput(f"the residual is {found}, y is {x.dtype} {expected} on {x.device}")
