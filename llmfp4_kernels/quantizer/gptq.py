"""Error feedback: weights are rounded one input channel after the other, and later channels make up for each error.

GPTQ (arXiv 2210.17323) on the FP4 grid, with row scales searched by the error that is left, and with inputs smoothed
(SmoothQuant, arXiv 2211.10438; AWQ, arXiv 2306.00978), which helps the activations and the weights alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..encode import snap
from ..errors import BadInput
from ..formats import Element
from ..packed import PackedFP4
from ..reference import quantize
from .scales import require_matrix, row_slices, scale_of_largest

SMOOTHING = 0.25
"""Exponent of the channels' largest inputs: what they are divided by before they are quantized."""
DAMPING = 0.1
"""Share of the mean power of the inputs added to every channel's."""
SCALE_FACTORS = tuple(0.5 + 0.05 * i for i in range(10))
"""Row scales tried, as shares of the one that holds the row's largest weight."""
BLOCK = 32
"""Channels between two updates of all channels to come: 16 to 128 take the same time within a quarter."""
CHUNK_ELEMENTS = 1 << 19
"""Weights at a time, each with all its scales."""


def smoothing_factor(channel_max: torch.Tensor, exponent: float = SMOOTHING) -> torch.Tensor:
    """x_factor [k] float32: (largest of all / largest of channel) ** exponent, at most 2^16; 1 for dead channels."""
    largest = channel_max.float()
    ratio = (largest.amax() / largest).pow(exponent)
    return torch.where(largest > 0, ratio, 1.0).clamp(max=2.0**16)


@dataclass(frozen=True)
class Feedback:
    """How the error of a channel is made good by the later ones: from the inverse of the inputs' Gram matrix."""

    order: torch.Tensor
    """int64 [k]: channels of most power first"""
    upper: torch.Tensor
    """float32 [k, k]: Cholesky factor of the inverse Gram matrix in that order"""

    @staticmethod
    def of(gram: torch.Tensor, damping: float = DAMPING) -> Feedback:
        """From Σ x xᵀ [k, k] over all tokens; dead channels and few tokens are made regular by the damping."""
        power = gram.diagonal().double()
        order = power.argsort(descending=True)
        regular = gram.double()[order][:, order]
        regular.diagonal().add_(damping * power.mean()).clamp_(min=torch.finfo(torch.float32).tiny)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(regular))
        return Feedback(order, torch.linalg.cholesky(inverse, upper=True).float())

    def round(self, weight: torch.Tensor, element: Element, scale: torch.Tensor) -> torch.Tensor:
        """weight [n, k] rounded to element · scale [n], float32 [n, k]."""
        left = weight.T[self.order].contiguous()  # [k, n]: a channel is a row
        rounded, k = torch.empty_like(left), len(left)
        for start in range(0, k, BLOCK):
            stop = min(start + BLOCK, k)
            upper, error = self.upper[start:stop, start:stop], torch.empty_like(left[start:stop])
            for i in range(stop - start):
                w = left[start + i]
                rounded[start + i] = snap(w / scale, element).mul_(scale)
                error[i] = (w - rounded[start + i]).div_(upper[i, i])
                left[start + i + 1 : stop].addcmul_(upper[i, i + 1 :, None], error[i], value=-1)
            left[stop:].addmm_(self.upper[start:stop, stop:].T, error, alpha=-1)
        result = torch.empty_like(rounded)
        result[self.order] = rounded
        return result.T.contiguous()


def round_rows(weight, gram, feedback: Feedback, element: Element) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(weight rounded [n, k], row_scale [n], total error e·G·e) with the best of SCALE_FACTORS for each row."""
    n, rows = len(weight), torch.arange(len(weight), device=weight.device)
    factors = torch.tensor(SCALE_FACTORS, device=weight.device)
    scales = (factors[:, None] * scale_of_largest(weight.abs().amax(1), element)).flatten()
    candidates = weight.repeat(len(factors), 1)  # all factors in one pass: the steps over channels are many and small
    rounded = feedback.round(candidates, element, scales)
    e = candidates.neg_().add_(rounded)
    errors = (e @ gram).mul_(e).sum(1).view(-1, n)
    best = errors.argmin(0)
    chosen = best * n + rows
    return rounded[chosen], scales[chosen], errors[best, rows].double().sum().item()


def quantize_feedback(
    weight: torch.Tensor, gram: torch.Tensor, elements: tuple[Element, ...], x_factor: torch.Tensor | None, recipe: str
) -> PackedFP4:
    """Pack weight [n, k] for inputs whose Σ x xᵀ over the calibration tokens is gram [k, k]; activations undescribed.

    With x_factor [k] the weight that is packed meets x · x_factor. Of several elements the one with the least output
    error is taken. Raises BadInput for NaN, Inf and shapes that do not match.
    """
    require_matrix("weight", weight)
    require_matrix("gram", gram)
    if list(gram.shape) != [weight.shape[1]] * 2:
        raise BadInput(f"gram of shape {list(gram.shape)} does not match k = {weight.shape[1]}")
    weight, gram = weight.float(), gram.double()
    if x_factor is not None:
        factor = x_factor.double()
        weight, gram = (weight.double() / factor).float(), gram * factor * factor[:, None]
    gram = gram / gram.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    feedback, gram = Feedback.of(gram), gram.float()
    found = []
    for element in elements:
        parts = [round_rows(weight[rows], gram, feedback, element) for rows in row_slices(weight, CHUNK_ELEMENTS)]
        found.append((sum(error for _, _, error in parts), element, parts))
    _, element, parts = min(found, key=lambda candidate: candidate[0])
    row_scale = torch.cat([scale for _, scale, _ in parts])
    codes = torch.cat([quantize(rounded, element, scale[:, None]) for rounded, scale, _ in parts])
    return PackedFP4(
        codes=codes, row_scale=row_scale, k=weight.shape[1], element=element, x_factor=x_factor, recipe=recipe
    )
