"""The weight side of LLM-FP4's search: an element for the layer and a scale for each row, by output error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..formats import Element
from .preshift import Activation
from .scales import row_slices, scale_of_largest, snap

DELTAS = tuple(i / 64 for i in range(-64, 65)) + tuple(1 + i / 8 for i in range(1, 9))
"""The additive grid. Fine, because a row's error is decided by a few weights: 1/64 against 1/4 refined to 1/16 gave
0.79 to 0.96 of the error on real layers, the same on tokens that the search had not seen."""
SHORTLIST, SHORTLIST_ALONE = 24, 6
"""Candidates of a row that get an exact error: beside quantized activations, and without them. The proxy ranks by the
weight's error alone: among 4 it finds the best but for 0.05 %; what suits the activation's error lies further down."""
PROXY_ELEMENTS = 1 << 18
"""Rows at a time, to stay in a core's cache"""
PROBE_ROWS, PROBE_MARGIN = 128, 1.2
"""A format with 1.2 times the error of the best one on this many rows is not searched further."""


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

    def __init__(self, gram: torch.Tensor, rank: int = 32):
        start = torch.randn(len(gram), min(rank, len(gram)), generator=torch.Generator().manual_seed(0))
        basis = start.to(gram.device)
        for _ in range(3):
            basis = torch.linalg.qr(gram @ basis).Q
        values, vectors = torch.linalg.eigh(basis.T @ gram @ basis)
        self.directions = basis @ (vectors * values.clamp(min=0).sqrt())
        self.power = (gram.diagonal() - self.directions.square().sum(1)).clamp(min=0)

    def __call__(self, e: torch.Tensor) -> torch.Tensor:
        """About e'Ge of each row of e [rows, k]; overwrites e."""
        leading = (e @ self.directions).square_().sum(1)
        return leading.add_(e.square_() @ self.power)


class WeightSearch:
    """Element and row scales of least output error: each row picks its own scale, the layer its element.

    With e = wq - w, f = xq - x and D = f w the output error of a row is e'Ge + 2 e'(Xq'D) + |D|^2, G = Xq'Xq: one
    k x k matrix instead of all tokens, and every term is of the size of the error, so that fp32 is enough.
    """

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, elements, gammas, unit_exponent: int):
        self.x, self.weight, self.elements = x, weight, elements
        self.largest = weight.abs().amax(1).double()
        self.gram, self.ranked = x.T @ x, gammas is None
        if gammas is not None:
            self.candidates = {e: self.gamma_deltas(e, gammas, unit_exponent) for e in elements}
        else:
            proxy = GramProxy(self.gram)
            self.candidates = {e: self.shortlist(e, proxy) for e in self.contenders(proxy)}

    def row_scale(self, element: Element, delta: torch.Tensor | float, rows=slice(None)) -> torch.Tensor:
        """float32 [rows] of biases `delta` above the one that just holds the row's largest weight."""
        return (scale_of_largest(self.largest[rows], element) * 2.0**-delta).float()

    def gamma_deltas(self, element: Element, gammas, unit_exponent: int) -> torch.Tensor:
        """LLM-FP4's grid of biases gamma · b0, [gammas, n] float64."""
        b0 = element.bias - torch.log2(scale_of_largest(self.largest, element)) - unit_exponent
        return (torch.tensor(gammas, dtype=torch.float64, device=b0.device)[:, None] - 1) * b0

    def proxy_errors(self, element: Element, proxy: GramProxy, deltas, rows) -> torch.Tensor:
        """[deltas, rows]"""
        w, errors = self.weight[rows], []
        for delta in deltas:
            scale = self.row_scale(element, delta, rows)
            u = w / scale[:, None]
            errors.append(proxy(snap(u, element).sub_(u)) * scale.square())
        return torch.stack(errors).nan_to_num(nan=math.inf, posinf=math.inf)

    def contenders(self, proxy: GramProxy) -> tuple[Element, ...]:
        """The elements worth a full search, judged by some of the rows."""
        n = self.weight.shape[0]
        rows = torch.arange(0, n, max(1, n // PROBE_ROWS), device=self.weight.device)
        totals = [self.proxy_errors(e, proxy, DELTAS[::4], rows).amin(0).sum() for e in self.elements]
        return tuple(e for e, total in zip(self.elements, totals) if total <= min(totals) * PROBE_MARGIN)

    def shortlist(self, element: Element, proxy: GramProxy) -> torch.Tensor:
        """Each row's SHORTLIST best deltas by the proxy, [SHORTLIST, n] float64."""
        grid = torch.tensor(DELTAS, dtype=torch.float64, device=self.weight.device)
        best = []
        for rows in row_slices(self.weight, PROXY_ELEMENTS):
            errors = self.proxy_errors(element, proxy, DELTAS, rows)
            best.append(grid[errors.topk(SHORTLIST, dim=0, largest=False).indices])
        return torch.cat(best, 1)

    def search_rows(self, element: Element, rows: slice, gram, cross) -> tuple[torch.Tensor, torch.Tensor]:
        """(error less a constant, delta) [rows] of the best candidate of each row; the first of equals wins."""
        w, deltas = self.weight[rows], self.candidates[element][:, rows]
        if cross is None and self.ranked:
            deltas = deltas[:SHORTLIST_ALONE]
        best = torch.full_like(w[:, 0], math.inf), deltas[0]
        for delta in deltas:
            scale = self.row_scale(element, delta, rows)[:, None]
            e = snap(w / scale, element).mul_(scale).sub_(w)
            product = e @ gram if cross is None else torch.addmm(cross, e, gram)
            error = product.mul_(e).sum(1)
            better = error < best[0]
            best = torch.where(better, error, best[0]), torch.where(better, delta, best[1])
        return best

    def __call__(self, activation: Activation | None) -> Weight:
        """The best weight beside the inputs as `activation` quantizes them."""
        xq = activation.dequantize(self.x) if activation else self.x
        f = xq - self.x if activation else None
        gram = xq.T @ xq if activation else self.gram
        found = {element: [] for element in self.candidates}
        for rows in row_slices(self.weight):
            cross = ((f @ self.weight[rows].T).T @ xq).mul_(2) if activation else None
            for element, parts in found.items():
                parts.append(self.search_rows(element, rows, gram, cross))
        errors = {e: torch.cat([error for error, _ in parts]).double().sum().item() for e, parts in found.items()}
        element = min(errors, key=errors.get)
        return Weight(element, self.row_scale(element, torch.cat([delta for _, delta in found[element]])))
