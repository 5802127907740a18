"""LLM-FP4's baseline search for a product of two activations, such as QK^T and PV: one format and scale per operand.

No pre-shift: it belongs to fully connected layers only (paper section 4; the spec's section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..encode import snap
from ..errors import BadInput
from ..formats import Element, searched_elements
from ..reference import require_finite
from .activation_search import DELTAS, MARGIN
from .scales import scale_of_largest


@dataclass(frozen=True)
class Operand:
    """A static quantizer of a whole tensor: element · scale."""

    element: Element
    scale: float
    """an fp32 number"""

    def units(self, x: torch.Tensor) -> torch.Tensor:
        """x in units of the scale, rounded to the element nearest to fp32(x) · fp32(1/scale), float32."""
        return snap(x.float() * (1 / self.scale), self.element)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """x rounded to the grid, float32."""
        return self.units(x) * self.scale


@dataclass(frozen=True)
class Part:
    """One batch of a product a @ b: a [..., r, c], b [..., c, s], and which results [..., r, s] count (None: all)."""

    a: torch.Tensor
    b: torch.Tensor
    counts: torch.Tensor | None = None

    def squares(self, error: torch.Tensor) -> torch.Tensor:
        """Sum (float64 []) of the squares of an error [..., r, s] where it counts; overwrites it."""
        error = error.square_()
        if self.counts is not None:
            error = error.mul_(self.counts)
        return error.sum(dtype=torch.float64)


def _stack(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """[n, heads, rows, columns] of different sizes, padded with zeros to the largest and put after another."""
    rows, columns = (max(x.shape[dim] for x in matrices) for dim in (-2, -1))
    pad = torch.nn.functional.pad
    return torch.cat([pad(x, (0, columns - x.shape[-1], 0, rows - x.shape[-2])) for x in matrices])


def merge(parts: Sequence[Part]) -> list[Part]:
    """Parts [n, heads, ...] of similar size as one; the zeros between them round to themselves and add no error.

    A search runs hundreds of times over its parts, and small ones cost more in calls than in arithmetic.
    """

    def size(part: Part) -> int:
        return part.a.shape[-2] * part.b.shape[-2] * part.b.shape[-1]

    def counts(part: Part) -> torch.Tensor:
        shape = (*part.a.shape[:-1], part.b.shape[-1])
        return (
            torch.ones(shape, dtype=torch.bool, device=part.a.device)
            if part.counts is None
            else part.counts.expand(shape)
        )

    groups: list[list[Part]] = []
    for part in sorted(parts, key=size):
        if not groups or size(part) > 3 * size(groups[-1][0]):
            groups.append([])
        groups[-1].append(part)
    return [
        Part(
            _stack([part.a for part in group]),
            _stack([part.b for part in group]),
            None if all(part.counts is None for part in group) else _stack([counts(part) for part in group]),
        )
        for group in groups
    ]


@dataclass(frozen=True)
class ProductSearch:
    """What search_product found."""

    a: Operand
    b: Operand
    relative_error: float
    """|error|² / |a b|² of the results that count, with both operands rounded"""


def _offsets(parts: Sequence[Part], side: str, other: Operand | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(the other operand rounded, the error that its rounding alone makes) of each part.

    The error of both is f·other_q plus that, f the error of this side: no term cancels, so fp32 is enough.
    """
    found = []
    for part in parts:
        fixed = part.b if side == "a" else part.a
        rounded = other.round(fixed) if other else fixed
        error = rounded - fixed
        found.append((rounded, part.a @ error if side == "a" else error @ part.b))
    return found


def _error(parts: Sequence[Part], side: str, offsets, operand: Operand | None) -> float:
    """Sum of squared errors of the product with `operand` on one side."""
    totals = []
    for part, (other, offset) in zip(parts, offsets):
        x = part.a if side == "a" else part.b
        f = operand.round(x).sub_(x)
        totals.append(part.squares((f @ other if side == "a" else other @ f).add_(offset)))
    return sum(totals).item()


def search_scale(
    largest: float, elements: Sequence[Element], error: Callable[[Operand], float]
) -> tuple[float, Operand]:
    """(error, operand) of least error on the additive grid, refined to steps of 1/32; the first of equals wins."""

    def at(element: Element, delta: float) -> tuple[float, float, Operand]:
        scale = scale_of_largest(torch.tensor(largest, dtype=torch.float64), element) * 2.0**-delta
        operand = Operand(element, scale.float().item())
        return error(operand), delta, operand

    def least(tried):
        return min(tried, key=lambda found: found[0])

    best = {element: least([at(element, delta) for delta in DELTAS]) for element in elements}
    limit = MARGIN * min(found[0] for found in best.values())
    for step in (0.125, 0.0625, 0.03125):
        for element, found in best.items():
            if found[0] <= limit:
                best[element] = least([found, at(element, found[1] - step), at(element, found[1] + step)])
    total, _, operand = least(best.values())
    return total, operand


def search_product(
    parts: Sequence[Part],
    *,
    bits: int = 4,
    rounds: int = 3,
    largest_a: float | None = None,
    largest_b: float | None = None,
) -> ProductSearch:
    """Formats and scales of both operands by the squared error of their product (LLM-FP4's FPQ baseline).

    parts are float32 samples. The two sides are searched in turn, each beside the other's last choice (at first beside
    full precision), and the best pair of all rounds is kept. largest_a and largest_b are the largest magnitudes of all
    data where the parts are a sample of them. Raises BadInput for no parts, NaN, Inf, and bits other than 4, 6 and 8.
    """
    elements = searched_elements(bits)
    if not parts or rounds < 1:
        raise BadInput(f"a product is searched on at least 1 part in at least 1 round, got {len(parts)} and {rounds}")
    for side in ("a", "b"):
        for part in parts:
            require_finite(f"operand {side}", getattr(part, side))
    largest = {
        "a": max(p.a.abs().amax().item() for p in parts) if largest_a is None else largest_a,
        "b": max(p.b.abs().amax().item() for p in parts) if largest_b is None else largest_b,
    }
    chosen: dict[str, Operand | None] = {"a": None, "b": None}
    best = None
    for _ in range(rounds):
        before = dict(chosen)
        for side, other in (("a", "b"), ("b", "a")):
            offsets = _offsets(parts, side, chosen[other])
            total, chosen[side] = search_scale(largest[side], elements, lambda x: _error(parts, side, offsets, x))  # noqa: B023
        if best is None or total < best[0]:
            best = total, dict(chosen)
        if chosen == before:
            break
    total, pair = best
    whole = sum(part.squares(part.a @ part.b) for part in parts).item()
    return ProductSearch(pair["a"], pair["b"], total / whole if whole else 0.0)
