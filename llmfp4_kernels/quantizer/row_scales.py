"""The weight side of LLM-FP4's search: an element for the layer and a scale for each row, by output error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..encode import snap
from ..formats import Element
from .objective import Layer, RowErrors, block_elements
from .preshift import Activation
from .scales import row_slices, scale_of_largest

DELTAS = tuple(i / 64 for i in range(-64, 65)) + tuple(1 + i / 8 for i in range(1, 9))
"""The additive grid. Fine, because a row's error is decided by a few weights: 1/64 against 1/4 refined to 1/16 gave
0.79 to 0.96 of the error on real layers, the same on tokens that the search had not seen."""
SHORTLIST, SHORTLIST_ALONE, EXACT = 24, 6, 8
"""Points of a grid that are looked at in each row: beside quantized activations, and without them. The proxy ranks by
the weight's error alone: among 4 it finds the best but for 0.05 %; what suits the activation's error lies further
down. There the proxy, with the exact slope that the activation's error adds, chooses the points with an exact error."""
SCOUT_ROWS, SCOUT_STRIDE = 128, 4
"""Every fourth point of a grid is looked at on this many rows, to drop formats and ends of the grid."""
SCOUT_MARGIN, SCOUT_REACH, SCOUT_SHARE = 1.2, 2.0, 0.02
"""A format with 1.2 times the error of the best one is dropped; so are the ends of its grid where the error is twice
the best in all but 2 % of the rows, and in rows with all but 2 % of the error."""


@dataclass(frozen=True)
class Weight:
    """A quantized weight inside the search: element · row_scale[n]."""

    element: Element
    row_scale: torch.Tensor

    def dequantize(self, weight: torch.Tensor) -> torch.Tensor:
        scale = self.row_scale[:, None]
        return snap(weight / scale, self.element).mul_(scale)


class GramProxy:
    """A cheap stand-in for e'Ge, G = U U' + diagonal: the leading directions of the inputs and the rest's power.

    On real layers a few channels carry the error, and which scale lets their weights fall on the grid decides a row:
    the diagonal alone ranks candidates badly (best of 8 by diagonal 0.90 of the coarse search's error, exact 0.79).
    """

    def __init__(self, layer: Layer, rank: int = 32):
        gram = layer.input_gram
        start = torch.randn(len(gram), min(rank, len(gram)), generator=torch.Generator().manual_seed(0))
        basis = start.to(gram.device)
        for _ in range(3):
            basis = torch.linalg.qr(gram @ basis).Q
        values, vectors = torch.linalg.eigh(basis.T @ gram @ basis)
        self.directions = basis @ (vectors * values.clamp(min=0).sqrt())
        led = self.directions.square().sum(1)
        self.power = (gram.diagonal() - led).clamp(min=0)
        self.share = None
        if not layer.shared:  # each row has its own diagonal and its own share of the common directions
            own = layer.importance.T @ layer.x.square()
            self.share = own.sum(1) / gram.diagonal().sum()
            self.power = (own - self.share[:, None] * led).clamp_(min=0)

    def __call__(self, e: torch.Tensor, rows) -> torch.Tensor:
        """About e'Ge of each row of e [..., rows, k]; overwrites e."""
        leading = (e @ self.directions).square_().sum(-1)
        if self.share is None:
            return leading.add_(e.square_() @ self.power)
        return leading.mul_(self.share[rows]).add_(e.square_().mul_(self.power[rows]).sum(-1))


class WeightSearch:
    """Element and row scales of least output error: each row picks its own scale, the layer its element.

    grids are tuples of factors on the bias of the largest weight (gammas), or None for the additive grid. The points
    of several grids are one set of candidates, so that more grids never give a larger error beside the same inputs.
    """

    def __init__(self, layer: Layer, elements, grids, unit_exponent: int):
        self.layer, self.unit_exponent = layer, unit_exponent
        self.largest = layer.weight.abs().amax(1).double()
        self.proxy = GramProxy(layer)
        self.elements, self.candidates = elements, {}
        for gammas in grids:
            self.add_grid(gammas)

    def add_grid(self, gammas) -> None:
        points = {e: self.grid(e, gammas) for e in self.elements}
        if not self.layer.small or (gammas is None and self.layer.shared):
            points = {e: self.shortlist(e, deltas) for e, deltas in self.scout(points).items()}
        for element, deltas in points.items():
            self.candidates.setdefault(element, []).append(deltas)

    def row_scale(self, element: Element, delta: torch.Tensor | float, rows=slice(None)) -> torch.Tensor:
        """float32 [rows] of biases `delta` above the one that just holds the row's largest weight."""
        return (scale_of_largest(self.largest[rows], element) * 2.0**-delta).float()

    def grid(self, element: Element, gammas) -> torch.Tensor:
        """Deltas of the additive grid, or of LLM-FP4's biases gamma · b0; [points, n] float64."""
        device = self.layer.weight.device
        if gammas is None:
            return torch.tensor(DELTAS, dtype=torch.float64, device=device)[:, None].expand(-1, len(self.largest))
        b0 = element.bias - torch.log2(scale_of_largest(self.largest, element)) - self.unit_exponent
        return (torch.tensor(gammas, dtype=torch.float64, device=device)[:, None] - 1) * b0

    def blocks(self, deltas: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """deltas [points, rows] in runs for which points · rows · k is what is worked on at a time."""
        return deltas.split(max(1, block_elements(w.device) // w.numel()))

    def proxy_errors(self, element: Element, deltas: torch.Tensor, rows) -> torch.Tensor:
        """[points, rows] for deltas [points, n]."""
        w, errors = self.layer.weight[rows], []
        for block in self.blocks(deltas[:, rows], w):
            scale = self.row_scale(element, block, rows)
            u = w / scale[:, :, None]
            errors.append(self.proxy(snap(u, element).sub_(u), rows) * scale.square())
        return torch.cat(errors).nan_to_num(nan=math.inf, posinf=math.inf)

    def scout(self, grids: dict[Element, torch.Tensor]) -> dict[Element, torch.Tensor]:
        """The elements worth a full search, and the part of their grids that holds the best points of some rows."""
        rows = self.layer.some_rows(SCOUT_ROWS)
        errors = {e: self.proxy_errors(e, deltas[::SCOUT_STRIDE], rows) for e, deltas in grids.items()}
        totals = {e: found.amin(0).sum() for e, found in errors.items()}
        limit, kept = min(totals.values()) * SCOUT_MARGIN, {}
        for e, found in errors.items():
            if totals[e] <= limit:
                best = found.amin(0)
                close = (found <= best * SCOUT_REACH).double()
                of_error = close @ best.double() / best.double().sum().clamp(min=torch.finfo(torch.float64).tiny)
                near = (torch.maximum(close.mean(1), of_error) > SCOUT_SHARE).nonzero()
                first, last = int(near.min()) - 1, int(near.max()) + 1
                kept[e] = grids[e][max(0, first * SCOUT_STRIDE) : last * SCOUT_STRIDE + 1]
        return kept

    def shortlist(self, element: Element, deltas: torch.Tensor) -> torch.Tensor:
        """Each row's SHORTLIST best deltas by the proxy, best first, [≤ SHORTLIST, n] float64."""
        count, best = min(SHORTLIST, len(deltas)), []
        for rows in row_slices(self.layer.weight, block_elements(deltas.device)):
            errors = self.proxy_errors(element, deltas, rows)
            best.append(deltas[:, rows].gather(0, errors.topk(count, dim=0, largest=False).indices))
        return torch.cat(best, 1)

    def deltas(self, element: Element, rows: slice, activation: Activation | None) -> torch.Tensor:
        """The points [points, rows] that get an exact error."""
        parts = [deltas[:, rows] for deltas in self.candidates[element]]
        if activation is None and not self.layer.small and self.layer.shared:
            parts = [deltas[:SHORTLIST_ALONE] for deltas in parts]
        return torch.cat(parts)

    def errors(self, element: Element, deltas: torch.Tensor, rows: slice, error_of) -> torch.Tensor:
        """error_of(wq - w) for deltas [points, rows]: [points, rows]."""
        w, errors = self.layer.weight[rows], []
        for block in self.blocks(deltas, w):
            scale = self.row_scale(element, block, rows)[:, :, None]
            errors.append(error_of(snap(w / scale, element).mul_(scale).sub_(w)))
        return torch.cat(errors).nan_to_num_(nan=math.inf, posinf=math.inf)

    def search_rows(self, element: Element, deltas: torch.Tensor, rows: slice, exact, slope):
        """(error less a constant, delta) [rows] of the best of deltas [points, rows] for each row."""
        if slope is not None and not self.layer.small and len(deltas) > EXACT:
            guesses = self.errors(element, deltas, rows, lambda e: (e * slope).sum(-1).add_(self.proxy(e, rows)))
            deltas = deltas.gather(0, guesses.topk(EXACT, dim=0, largest=False).indices)
        error, index = self.errors(element, deltas, rows, exact).min(0)
        return error, deltas.gather(0, index[None])[0]

    def each(self, activation: Activation | None) -> dict[Element, tuple[float, Weight]]:
        """(error less a constant, weight) of each element's best row scales beside the inputs as quantized."""
        errors_of, found = RowErrors(self.layer, activation), {element: [] for element in self.candidates}
        for rows in row_slices(self.layer.weight):
            exact, slope = errors_of.of(rows), errors_of.slope(rows)
            for element, parts in found.items():
                deltas = self.deltas(element, rows, activation)
                parts.append(self.search_rows(element, deltas, rows, exact, slope))
        best = {}
        for element, parts in found.items():
            errors, deltas = (torch.cat(part) for part in zip(*parts))
            best[element] = errors.double().sum().item(), Weight(element, self.row_scale(element, deltas))
        return best

    def __call__(self, activation: Activation | None) -> Weight:
        """The best weight beside the inputs as `activation` quantizes them."""
        return min(self.each(activation).values(), key=lambda found: found[0])[1]
