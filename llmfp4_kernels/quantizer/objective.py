"""What the search minimizes: the squared output error of a layer, seen from its weight and from its activation.

With e = wq - w of a row, f = xq - x of a token and importance p, the error of an output is p (xq·e + f·w)^2. Every form
below sums terms of the size of the error, never the outputs themselves, so that fp32 is enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .scales import row_slices

PROBE_TOKENS, PROBE_ROWS = 512, 128
"""The part of a layer on which descents are run to their end; what they find is then settled on all of it."""
WHOLE = 1 << 27
"""Multiplications of one product in layers that are searched whole: 512 of 700 tokens gave 1.5 % more error on one"""
SMALL = 1 << 22
"""Multiplications of a candidate's errors below which the whole gamma grid is cheaper than choosing a part of it"""


def block_elements(device: torch.device) -> int:
    """How many values candidates are worked on at a time: what a core's cache holds, or what fills a GPU."""
    return 1 << 17 if device.type == "cpu" else 1 << 26


def probe_tokens(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(token indices, weights): the count/2 tokens of largest norm, and every s-th of the others weighted by s.

    A few tokens with massive activations can hold most of the error; a plain stride would miss them.
    """
    tokens = x.shape[0]
    order = x.square().sum(1).argsort(descending=True)
    if tokens <= count:
        return order, torch.ones(tokens, device=x.device)
    heavy, rest = order[: count // 2], order[count // 2 :]
    stride = -(-len(rest) // (count - count // 2))
    light = rest[stride // 2 :: stride]
    weights = torch.cat([torch.ones(len(heavy)), torch.full((len(light),), len(rest) / len(light))])
    return torch.cat([heavy, light]), weights.to(x.device)


@dataclass(frozen=True)
class Layer:
    """x [tokens, k], weight [n, k] and the importance of squared errors, [tokens, n] or (rows alike) [tokens, 1].

    gram [k, k] is the mean of x'x over more tokens than these, for weights beside full-precision activations; x may
    then have no tokens.
    """

    x: torch.Tensor
    weight: torch.Tensor
    importance: torch.Tensor | None = None
    gram: torch.Tensor | None = None

    @property
    def shared(self) -> bool:
        """Every row weighs the tokens alike, so that one Gram matrix serves all."""
        return self.importance is None or self.importance.shape[1] == 1

    @property
    def small(self) -> bool:
        k = self.weight.shape[1]
        return self.weight.numel() * (min(self.x.shape) if self.gram is None else k) <= SMALL

    def weighted(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, k] times the tokens' importance, on average over rows."""
        return x if self.importance is None else x * self.importance.mean(1, keepdim=True)

    @cached_property
    def input_gram(self) -> torch.Tensor:
        return self.weighted(self.x).T @ self.x if self.gram is None else self.gram

    def some_rows(self, count: int) -> torch.Tensor:
        """Indices of at most `count` rows: the one whose output is largest, and every s-th in order of their size.

        Rows in the weight's own order repeat (interleaved heads, fused projections), and a few may hold all the error.
        """
        power = self.weight.square() @ self.input_gram.diagonal()
        return power.argsort(descending=True)[:: -(-len(power) // count)]

    def probe(self) -> Layer:
        """At most PROBE_TOKENS tokens and PROBE_ROWS rows; a small layer is its own probe."""
        tokens, n = self.x.shape[0], self.weight.shape[0]
        if tokens * self.weight.numel() <= WHOLE or (tokens <= PROBE_TOKENS and n <= PROBE_ROWS):
            return self
        rows = self.some_rows(PROBE_ROWS)
        picked, weights = probe_tokens(self.x, PROBE_TOKENS)
        importance = weights[:, None]
        if self.importance is not None:
            importance = importance * self.importance[picked].expand(-1, n)[:, rows]
        return Layer(self.x[picked], self.weight[rows], importance)

    def errors(self, weight_q: torch.Tensor, activation) -> tuple[float, float]:
        """(mean of p (xq Wq^T - x W^T)^2, the same with p = 1) over all tokens and rows."""
        x, weight = self.x, self.weight
        if self.gram is not None:
            total = sum(_quadratic(weight_q[rows] - weight[rows], self.gram) for rows in row_slices(weight))
            return total / weight.shape[0], total / weight.shape[0]
        f = activation.dequantize(x).sub_(x) if activation else None
        weighted = plain = 0.0
        for rows in row_slices(weight):
            error = x @ (weight_q[rows] - weight[rows]).T
            if activation:
                error.addmm_(f, weight_q[rows].T)
            error.square_()
            plain += error.sum(dtype=torch.float64).item()
            if self.importance is not None:
                error *= self.importance if self.shared else self.importance[:, rows]
                weighted += error.sum(dtype=torch.float64).item()
        count = x.shape[0] * weight.shape[0]
        return (plain if self.importance is None else weighted) / count, plain / count


def _quadratic(e: torch.Tensor, gram: torch.Tensor) -> float:
    """The sum of e'Ge over the rows of e."""
    return (e @ gram).mul_(e).sum(dtype=torch.float64).item()


class RowErrors:
    """Errors of the weight's rows beside one quantizer of the activations, less a constant for each row.

    As e'Ge + 2 e'(Xq'D) with G = Xq'Xq and D = f w: one k x k matrix instead of all tokens. Where each row weighs the
    tokens in its own way, or tokens are fewer than k, as |xq e + f w|^2 token by token.
    """

    def __init__(self, layer: Layer, activation):
        self.layer = layer
        self.xq = activation.dequantize(layer.x) if activation else layer.x
        self.f = self.xq - layer.x if activation else None
        tokens, k = layer.x.shape
        if layer.gram is not None:
            self.gram = layer.gram
        elif layer.shared and k <= tokens:
            self.gram = layer.weighted(self.xq).T @ self.xq
        else:
            self.gram = None

    def slope(self, rows: slice) -> torch.Tensor | None:
        """2 Xq'D [rows, k], what the error has besides e'Ge; None where that is 0."""
        if self.f is None:
            return None
        drift = (self.f @ self.layer.weight[rows].T).T
        if not self.layer.shared:
            return ((drift * self.layer.importance[:, rows].T) @ self.xq).mul_(2)
        return (drift @ self.layer.weighted(self.xq)).mul_(2)

    def of(self, rows: slice):
        """A function of e [..., rows, k], which it may overwrite, to [..., rows]."""
        layer, weight = self.layer, self.layer.weight[rows]
        if self.gram is not None:
            slope = self.slope(rows)
            return lambda e: (e @ self.gram).add_(0.0 if slope is None else slope).mul_(e).sum(-1)
        importance = 1.0
        if layer.importance is not None:
            importance = layer.importance.T if layer.shared else layer.importance[:, rows].T
        drift = 0.0 if self.f is None else (self.f @ weight.T).T
        return lambda e: (e @ self.xq.T).add_(drift).square_().mul_(importance).sum(-1)


class TokenErrors:
    """Errors of the tokens beside one quantized weight: |f Wq^T + x E^T|^2, E = Wq - W.

    With k < n as f·(f H + 2c) + |x E^T|^2, H = Wq^T Wq, c = x E^T Wq.
    """

    def __init__(self, layer: Layer, weight_q: torch.Tensor):
        self.layer, x, weight = layer, layer.x, layer.weight
        error = weight_q - weight
        self.quadratic = layer.shared and weight.shape[1] < weight.shape[0]
        if self.quadratic:
            self.matrix = weight_q.T @ weight_q
            self.offset = x @ (error.T @ weight_q).mul_(2)
            self.constant = sum((x @ error[rows].T).square_().sum(1) for rows in row_slices(weight))
        else:
            self.matrix = weight_q.T.contiguous()
            self.offset = x @ error.T

    def __call__(self, f: torch.Tensor, tokens: torch.Tensor | slice) -> torch.Tensor:
        """[..., tokens] float32, for f [..., tokens, k]."""
        product = (f @ self.matrix).add_(self.offset[tokens])
        importance = None if self.layer.importance is None else self.layer.importance[tokens]
        if self.quadratic:
            errors = product.mul_(f).sum(-1).add_(self.constant[tokens])
            return errors if importance is None else errors.mul_(importance[:, 0])
        product.square_()
        return (product if importance is None else product.mul_(importance)).sum(-1)
