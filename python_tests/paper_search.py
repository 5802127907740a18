"""The judge of search_linear: LLM-FP4's search as its text states it, in float64, every candidate on all tokens.

Written from arXiv 2310.16836 (eq. 9 and 15, algorithm 1) and from what the authors' code means to do, without any of
the package's search. Rounds follow one of two orders; both keep each format's own best bias and never move the grid:

    paper    algorithm 1: activation bias, activation format, weight bias, weight format
    release  the authors' code: with pre-shift weight bias, activation bias, weight format, activation format;
             without it weight bias, weight format, activation bias, activation format
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

FORMATS = {
    4: [(3, 0), (2, 1), (1, 2)],
    6: [(5, 0), (4, 1), (3, 2), (2, 3), (1, 4)],
    8: [(5, 2), (4, 3), (3, 4), (2, 5), (1, 6)],
}
"""(exponent bits, mantissa bits)"""
START = {4: (2, 1), 6: (3, 2), 8: (4, 3)}
"""The format of both sides before anything was searched"""
GAMMAS = [0.01 + i * (1.2 - 0.01) / 100 for i in range(100)]


def bias_of_largest(largest, e, m):
    """b~ of the format whose top is `largest`; +inf where that is 0."""
    return 2**e - torch.log2(largest) + math.log2(2 - 2.0**-m) - 1


def quantize(x, e, m, bias):
    """x rounded to the format with real-valued bias (broadcastable)."""
    top = (2 - 2.0**-m) * 2.0 ** (2**e - 1 - bias)
    c = torch.maximum(torch.minimum(x, top), -top)
    k = (torch.log2(c.abs()) + bias).floor().clamp(min=1)
    v = 2.0 ** (k - m - bias)
    return (c / v).round() * v


@dataclass
class Found:
    weight_format: tuple[int, int]
    weight_bias: torch.Tensor
    """[n]"""
    weight_q: torch.Tensor
    activation_format: tuple[int, int] | None
    rho: float | None
    shift: torch.Tensor | None
    """[k]"""
    x_q: torch.Tensor
    mse: float


class PaperSearch:
    """x [tokens, k], weight [n, k]; activation_bits 16 leaves x as it is; output_gradient weighs the squared errors."""

    def __init__(self, x, weight, weight_bits=4, activation_bits=4, preshift=True, rule="paper", output_gradient=None):
        self.x, self.w = x.double(), weight.double()
        self.y = self.x @ self.w.T
        self.importance = torch.ones_like(self.y) if output_gradient is None else output_gradient.double() ** 2
        self.preshift, self.rule = preshift, rule
        self.w_formats = FORMATS[weight_bits]
        row_max = self.w.abs().amax(1)
        self.b0 = {f: torch.where(row_max > 0, bias_of_largest(row_max, *f), 0.0) for f in self.w_formats}
        self.bias = {f: b.clone() for f, b in self.b0.items()}
        self.w_format = START[weight_bits]
        self.quantizes_x = activation_bits != 16
        if self.quantizes_x:
            self.x_formats = FORMATS[activation_bits]
            channel_max = self.x.abs().amax(0)
            self.b_channel = {f: bias_of_largest(channel_max, *f) for f in self.x_formats}
            first = {f: b.min().item() for f, b in self.b_channel.items()}
            self.rho0 = {f: b if math.isfinite(b) else 0.0 for f, b in first.items()}
            self.rho = dict(self.rho0)
            self.x_format = START[activation_bits]

    def shift(self, f, rho):
        if not self.preshift:
            return torch.zeros(self.x.shape[1], dtype=torch.float64)
        top = 2 ** f[0] - 1
        if self.rule == "paper":
            return (self.b_channel[f] - rho).round().clamp(0, top)
        r = round(rho)
        return self.b_channel[f].round().clamp(r, r + top) - r

    def x_at(self, f, rho):
        return quantize(self.x, *f, rho + self.shift(f, rho))

    def w_at(self, f, bias):
        return quantize(self.w, *f, bias[:, None])

    def x_now(self):
        return self.x_at(self.x_format, self.rho[self.x_format]) if self.quantizes_x else self.x

    def w_now(self):
        return self.w_at(self.w_format, self.bias[self.w_format])

    def row_errors(self, xq, wq):
        return ((xq @ wq.T - self.y).square() * self.importance).sum(0)

    def error(self, xq, wq):
        return self.row_errors(xq, wq).sum().item()

    def search_weight_bias(self):
        xq = self.x_now()
        for f in self.w_formats:
            errors = torch.stack([self.row_errors(xq, self.w_at(f, gamma * self.b0[f])) for gamma in GAMMAS])
            self.bias[f] = torch.tensor(GAMMAS, dtype=torch.float64)[errors.argmin(0)] * self.b0[f]

    def search_weight_format(self):
        xq = self.x_now()
        self.w_format = min(self.w_formats, key=lambda f: self.error(xq, self.w_at(f, self.bias[f])))

    def search_activation_bias(self):
        wq = self.w_now()
        for f in self.x_formats:
            self.rho[f] = min((gamma * self.rho0[f] for gamma in GAMMAS), key=lambda r: self.error(self.x_at(f, r), wq))

    def search_activation_format(self):
        wq = self.w_now()
        self.x_format = min(self.x_formats, key=lambda f: self.error(self.x_at(f, self.rho[f]), wq))

    def state(self):
        biases = [b for f in self.w_formats for b in self.bias[f].tolist()]
        return self.w_format, self.x_format, tuple(biases), tuple(self.rho.values())

    def run(self, order="paper", rounds=3) -> Found:
        w_bias, w_format = self.search_weight_bias, self.search_weight_format
        if not self.quantizes_x:
            w_bias()
            w_format()
            return self.found()
        x_bias, x_format = self.search_activation_bias, self.search_activation_format
        steps = {
            "paper": (x_bias, x_format, w_bias, w_format),
            "release": (w_bias, x_bias, w_format, x_format) if self.preshift else (w_bias, w_format, x_bias, x_format),
        }[order]
        for _ in range(rounds):
            before = self.state()
            for step in steps:
                step()
            if self.state() == before:
                break
        return self.found()

    def found(self) -> Found:
        xq, wq = self.x_now(), self.w_now()
        mse = self.error(xq, wq) / self.y.numel()
        f, rho, shift = None, None, None
        if self.quantizes_x:
            f, rho = self.x_format, self.rho[self.x_format]
            shift = self.shift(f, rho)
        return Found(self.w_format, self.bias[self.w_format], wq, f, rho, shift, xq, mse)


def paper_search(x, weight, *, order="paper", rounds=3, **kwargs) -> Found:
    return PaperSearch(x, weight, **kwargs).run(order, rounds)


def layer(kind: str, n: int = 32, k: int = 40, tokens: int = 96, seed: int = 0):
    """(x [tokens, k], weight [n, k]) of one of KINDS."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    x, w = randn(tokens, k), randn(n, k) * 0.03
    if kind == "student":
        x = x / randn(tokens, k, 3).square().mean(2).sqrt()
        w = w / randn(n, k, 4).square().mean(2).sqrt()
    elif kind == "outlier":
        x = x * torch.exp(0.7 * randn(k))
        x[:, :: max(2, k // 3)] *= 10.0 ** (1 + torch.rand(1, generator=g))
    elif kind == "massive":
        x[:: tokens // 3, 1:3] *= 200
    elif kind == "lowrank":
        x = randn(tokens, 4) @ randn(4, k) + 0.1 * x
    elif kind == "positive":
        x = torch.nn.functional.silu(3 * x)
    elif kind == "dead":
        x[:, 1::5] = 0
        w[2::7] = 0
    elif kind == "huge":
        x, w = x * 3e3, w * 400
    elif kind == "tiny":
        x, w = x * 1e-6, w * 1e-4
    elif kind == "unit":
        x, w = x * 3, w * 100
    return x, w


KINDS = ("gauss", "student", "outlier", "massive", "lowrank", "positive", "dead", "huge", "tiny", "unit")
