"""Static FP activations with LLM-FP4's pre-shifted exponent bias: the rounding rules of the shift, and the search."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ..errors import BadInput
from ..formats import Element
from .scales import row_slices, scale_of_largest, snap

SHIFT_RULES = ("phase", "paper", "release", "floor")

# (step in delta, probe tokens, candidates kept of each element). The step in phase is twice that. Probes rank, and all
# tokens decide. Elements are kept apart while they are within MARGIN: those with more mantissa need a finer lattice.
SCHEDULE = ((0.25, 256, 6), (0.125, 256, 4), (0.0625, 512, 4), (0.03125, 512, 4))
REFINEMENT = SCHEDULE[2:]
MARGIN = 1.3
DELTAS = tuple(0.25 * i for i in range(-4, 15))


def exponent_bias(largest: torch.Tensor, element: Element) -> torch.Tensor:
    """LLM-FP4's real-valued bias b~ (float64) whose largest value is `largest`; +inf where that is 0."""
    return element.bias - torch.log2(largest.double() / element.max)


def channel_shift(bias: torch.Tensor, rho: float, element: Element, rule: str, phase: float = 0.0) -> torch.Tensor:
    """The pre-shifted exponent bias (int8 [k]) of channels with biases `bias` [k] beside the tensor's bias `rho`.

    paper    clip(round(b_j - rho), 0, 2^E - 1), LLM-FP4 eq. 15: halves of all channels are clipped, by up to sqrt(2)
    release  clip(round(b_j), round(rho), round(rho) + 2^E - 1) - round(rho), the authors' code
    floor    clip(floor(b_j - rho), 0, 2^E - 1): no channel is clipped more than the largest one
    phase    clip(floor(b_j - rho + phase), 0, 2^E - 1), of which the other three are cases: 1/2,
             1/2 + rho - round(rho), and 0
    """
    if rule not in SHIFT_RULES:
        raise BadInput(f"unknown shift rule {rule!r}: known are {', '.join(SHIFT_RULES)}")
    if rule == "paper":
        shift = (bias - rho).round()
    elif rule == "release":
        shift = bias.round() - round(rho)
    else:
        shift = (bias - rho + (phase if rule == "phase" else 0.0)).floor()
    return shift.clamp(0, element.max_shift).to(torch.int8)


@dataclass(frozen=True)
class Activation:
    """A static quantizer of a layer's input: element · x_scale · 2^-shift[k]."""

    element: Element
    x_scale: torch.Tensor
    """float32 []"""
    shift: torch.Tensor
    """int8 [k]"""
    point: tuple[float, float] = field(default=(0.0, 0.0), compare=False)
    """(delta, phase) in the search."""

    def dequantize(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] float32 rounded to the grid; the same numbers as reference.quantize_activation's codes."""
        shift, x_scale = self.shift.int(), self.x_scale.expand(self.shift.shape)
        inverse, step = torch.ldexp(torch.reciprocal(x_scale), shift), torch.ldexp(x_scale, -shift)
        return snap(x * inverse, self.element).mul_(step)

    def same_as(self, other: Activation | None) -> bool:
        return (
            other is not None
            and self.element == other.element
            and bool(self.x_scale == other.x_scale)
            and torch.equal(self.shift, other.shift)
        )


class OutputError:
    """Squared output error of the activation error f = xq - x: |f Wq^T + x E^T|^2 per token, E = Wq - W.

    With k < n as f·(f H + 2c) + |x E^T|^2, H = Wq^T Wq, c = x E^T Wq; every term is of the size of the error, so that
    fp32 is enough.
    """

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, weight_q: torch.Tensor):
        error = weight_q - weight
        self.quadratic = weight.shape[1] < weight.shape[0]
        if self.quadratic:
            self.matrix = weight_q.T @ weight_q
            self.offset = x @ (error.T @ weight_q).mul_(2)
            self.constant = sum((x @ error[rows].T).square_().sum(1) for rows in row_slices(weight))
        else:
            self.matrix = weight_q.T.contiguous()
            self.offset = x @ error.T

    def __call__(self, f: torch.Tensor, tokens: torch.Tensor | slice) -> torch.Tensor:
        """[tokens] float32, for f [tokens, k]."""
        product = torch.addmm(self.offset[tokens], f, self.matrix)
        if self.quadratic:
            return product.mul_(f).sum(1).add_(self.constant[tokens])
        return product.square_().sum(1)


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


class ActivationSearch:
    """Element, x_scale and shift of least output error for inputs x [tokens, k] with channel maxima [k]."""

    def __init__(self, x, channel_max, elements, shift_rule: str | None, gammas, unit_exponent: int):
        self.x, self.channel_max, self.elements, self.rule = x, channel_max, elements, shift_rule
        self.gammas, self.unit_exponent = gammas, unit_exponent
        self.largest = channel_max.amax()
        self.probes = {count: probe_tokens(x, count) for _, count, _ in SCHEDULE}
        self.everything = (slice(None), torch.ones(x.shape[0], device=x.device))

    def at(self, element: Element, delta: float, phase: float) -> Activation:
        """The quantizer whose bias is `delta` above the one that just holds the largest input."""
        x_scale = scale_of_largest(self.largest.double(), element) * 2.0**-delta
        if self.rule is None:
            shift = torch.zeros(len(self.channel_max), dtype=torch.int8, device=self.x.device)
        else:
            rho = element.bias - math.log2(x_scale)
            shift = channel_shift(exponent_bias(self.channel_max, element), rho, element, self.rule, phase)
        return Activation(element, x_scale.float(), shift, (delta, phase))

    def rank(self, candidates: list[Activation], error: OutputError, probe) -> list[tuple[float, Activation]]:
        """(error on some tokens, candidate), best first; the first of equals stays first."""
        tokens, weights = probe
        x, totals = self.x[tokens], []
        for candidate in candidates:
            per_token = error(candidate.dequantize(x).sub_(x), tokens)
            totals.append(per_token.double() @ weights.double())
        totals = torch.stack(totals).nan_to_num(nan=math.inf, posinf=math.inf).tolist()
        return sorted(zip(totals, candidates), key=lambda ranked: ranked[0])

    def keep(self, ranked: list[tuple[float, Activation]], count: int) -> list[Activation]:
        """The best `count` of each element whose best is within MARGIN of the best of all."""
        kept: dict[Element, list[Activation]] = {}
        for total, candidate in ranked:
            group = kept.setdefault(candidate.element, [])
            if len(group) < count and (group or total <= ranked[0][0] * MARGIN):
                group.append(candidate)
        return [candidate for group in kept.values() for candidate in group]

    def phases(self, element: Element, delta: float) -> tuple[float, ...]:
        """Where the lattice begins: as the floor, the paper's and the release's rule would have it."""
        if self.rule != "phase":
            return (0.0,)
        rho = element.bias - math.log2(scale_of_largest(self.largest.double(), element)) - self.unit_exponent + delta
        return (0.0, 0.5, 0.5 + rho - round(rho))

    def lattice(self) -> list[Activation]:
        return [self.at(e, delta, phase) for e in self.elements for delta in DELTAS for phase in self.phases(e, delta)]

    def neighbours(self, center: Activation, step: float) -> list[Activation]:
        delta, phase = center.point
        phases = {phase, max(0.0, phase - 2 * step), min(1.0, phase + 2 * step)} if self.rule == "phase" else {0.0}
        return [self.at(center.element, d, p) for d in (delta, delta - step, delta + step) for p in sorted(phases)]

    def gamma_points(self) -> list[Activation]:
        """LLM-FP4's grid: biases gamma · b0, each at every phase where the rule has one."""
        phases = (0.0, 0.25, 0.5, 0.75) if self.rule == "phase" else (0.0,)
        points = []
        for element in self.elements:
            b0 = element.bias - math.log2(scale_of_largest(self.largest.double(), element)) - self.unit_exponent
            points += [self.at(element, (gamma - 1) * b0, p) for gamma in self.gammas for p in phases]
        return points

    def __call__(self, weight: torch.Tensor, weight_q: torch.Tensor, incumbent: Activation | None) -> Activation:
        """The best quantizer beside the weight `weight_q`; from round 2 on, around the incumbent."""
        error = OutputError(self.x, weight, weight_q)
        if self.gammas is not None:
            return self.rank(self.gamma_points(), error, self.everything)[0][1]
        beam = self.lattice() if incumbent is None else [incumbent]
        for step, count, keep in SCHEDULE if incumbent is None else REFINEMENT:
            if step != SCHEDULE[0][0]:
                beam = [c for center in beam for c in self.neighbours(center, step)]
            beam = self.keep(self.rank(unique(beam), error, self.probes[count]), keep)
        return self.rank(unique(([incumbent] if incumbent else []) + beam), error, self.everything)[0][1]


def unique(candidates: list[Activation]) -> list[Activation]:
    """Without repetitions, in order: many points round to the same shifts."""
    seen = {(c.element.name, c.x_scale.item(), c.shift.cpu().numpy().tobytes()): c for c in reversed(candidates)}
    return list(reversed(seen.values()))
