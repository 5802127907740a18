"""LLM-FP4's search (arXiv 2310.16836, algorithm 1): formats and scales of one linear layer by its output error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import BadInput
from ..formats import FP4_ELEMENTS, Element, searched_elements
from ..packed import PackedFP4
from ..reference import decode, encode, quantize
from .preshift import SHIFT_RULES, Activation, ActivationSearch, exponent_bias
from .scales import require_matrix, row_chunks, scale_of_largest, snap

GAMMAS = tuple(0.01 + i * (1.2 - 0.01) / 100 for i in range(100))
"""LLM-FP4's grid of factors on the bias; the authors' code evaluates the first 100 of 101 points."""
COARSE = tuple(sorted((0.25 * i for i in range(-6, 9)), key=abs))
FINE = (-0.1875, -0.125, -0.0625, 0.0625, 0.125, 0.1875)
PROBE_ROWS, PROBE_MARGIN = 128, 1.2
"""A format whose coarse error on this many rows is 1.2 times the best one's is not searched further."""


@dataclass(frozen=True)
class Weight:
    """A quantized weight inside the search: element · row_scale[n]."""

    element: Element
    row_scale: torch.Tensor
    delta: torch.Tensor

    def dequantize(self, weight: torch.Tensor) -> torch.Tensor:
        scale = self.row_scale[:, None]
        return snap(weight / scale, self.element).mul_(scale)


@dataclass(frozen=True)
class LinearSearch:
    """What search_linear found for a weight [n, k]; in LLM-FP4's terms a scale is 2^(element.bias - b~)."""

    weight: torch.Tensor
    """float32 [n, k], the weight that was searched"""
    weight_element: Element
    row_scale: torch.Tensor
    """float32 [n]"""
    activation: Activation | None
    preshift: bool
    mse: float
    """mean squared error of the layer's output against x @ weight.T, over all tokens and features"""

    @property
    def activation_element(self) -> Element | None:
        return self.activation.element if self.activation else None

    @property
    def x_scale(self) -> float | None:
        return self.activation.x_scale.item() if self.activation else None

    @property
    def shift(self) -> torch.Tensor:
        """int8 [k]; zeros without preshift"""
        if self.activation:
            return self.activation.shift
        return torch.zeros(self.weight.shape[1], dtype=torch.int8, device=self.weight.device)

    def weight_dequantized(self) -> torch.Tensor:
        """float32 [n, k]"""
        scale = self.row_scale[:, None]
        return decode(encode(self.weight / scale, self.weight_element), self.weight_element) * scale

    def activation_dequantized(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] on the activation's grid, float32; x itself where activations are not quantized."""
        return self.activation.dequantize(x.float()) if self.activation else x.float()

    def packed(self, recipe_name: str = "llm-fp4") -> PackedFP4:
        """The layer as 4-bit codes. Raises BadInput at 6 and 8 bits, which have no packed form."""
        for element in filter(None, (self.weight_element, self.activation_element)):
            if element.name not in FP4_ELEMENTS:
                raise BadInput(f"{element.name} has {element.bits} bits: only 4-bit elements have a packed form")
        return PackedFP4(
            codes=quantize(self.weight, self.weight_element, self.row_scale[:, None]),
            row_scale=self.row_scale,
            k=self.weight.shape[1],
            element=self.weight_element,
            activation=self.activation_element,
            x_scale=self.activation.x_scale if self.activation else None,
            shift=self.shift.to(torch.uint8) if self.activation and self.preshift else None,
            recipe=recipe_name,
        )


class WeightSearch:
    """Element and row scales of least output error: each row picks its own scale, the layer its element.

    With e = wq - w, f = xq - x and D = f w the output error of a row is e'Ge + 2 e'(Xq'D) + |D|^2, G = Xq'Xq: one
    k x k matrix instead of all tokens, and every term is of the size of the error, so that fp32 is enough.
    """

    def __init__(self, weight: torch.Tensor, elements: tuple[Element, ...], gammas, unit_exponent: int):
        self.weight, self.elements, self.gammas, self.unit_exponent = weight, elements, gammas, unit_exponent
        self.largest = weight.abs().amax(1).double()

    def row_scale(self, element: Element, delta: torch.Tensor, rows=slice(None)) -> torch.Tensor:
        return (scale_of_largest(self.largest[rows], element) * torch.exp2(-delta)).float()

    def deltas(self, element: Element, rows) -> list[torch.Tensor]:
        """The grid as offsets [rows] (float64) to the bias that just holds the row's largest weight."""
        if self.gammas is None:
            return [torch.full_like(self.largest[rows], delta) for delta in COARSE]
        scale = scale_of_largest(self.largest[rows], element)
        b0 = element.bias - torch.log2(scale) - self.unit_exponent
        return [(gamma - 1) * b0 for gamma in self.gammas]

    def best(self, element, deltas, rows, gram, cross, best=None):
        """(error [rows], delta [rows]) of the best candidate per row; the first of equals wins."""
        w = self.weight[rows]
        for delta in deltas:
            scale = self.row_scale(element, delta, rows)[:, None]
            e = snap(w / scale, element).mul_(scale).sub_(w)
            product = e @ gram if cross is None else torch.addmm(cross, e, gram)
            error = product.mul_(e).sum(1).nan_to_num(nan=math.inf, posinf=math.inf)
            if best is None:
                best = error, delta
            else:
                better = error < best[0]
                best = torch.where(better, error, best[0]), torch.where(better, delta, best[1])
        return best

    def contenders(self, gram, cross) -> tuple[Element, ...]:
        """The elements worth a full search, judged by some of the rows on the coarse grid."""
        n = self.weight.shape[0]
        rows = torch.arange(0, n, max(1, n // PROBE_ROWS), device=self.weight.device)
        totals = [self.best(e, self.deltas(e, rows), rows, gram, cross(rows))[0].sum() for e in self.elements]
        limit = max(0.0, min(totals)) * PROBE_MARGIN
        return tuple(e for e, total in zip(self.elements, totals) if total <= limit)

    def __call__(self, x: torch.Tensor, xq: torch.Tensor) -> Weight:
        """The best weight beside the quantized inputs xq [tokens, k] of x."""
        gram, f = xq.T @ xq, None if xq is x else xq - x

        def cross(rows):
            """2 Xq'D of some rows, [rows, k]"""
            return None if f is None else ((f @ self.weight[rows].T).T @ xq).mul_(2)

        elements = self.elements
        found = []
        for element in elements:
            found.append(self._search_rows(element, gram, cross))
        index = min(range(len(found)), key=lambda i: found[i][0])
        element, delta = elements[index], found[index][1]
        return Weight(element, self.row_scale(element, delta), delta)

    def _search_rows(self, element, gram, cross):
        """(total error, delta [n])"""
        errors, deltas, start = [], [], 0
        for chunk in row_chunks(self.weight):
            rows = slice(start, start := start + len(chunk))
            c = cross(rows)
            best = self.best(element, self.deltas(element, rows), rows, gram, c)
            if self.gammas is None:
                best = self.best(element, [best[1] + offset for offset in FINE], rows, gram, c, best)
            errors.append(best[0])
            deltas.append(best[1])
        return torch.cat(errors).double().sum().item(), torch.cat(deltas)
