"""Static FP activations with LLM-FP4's pre-shifted exponent bias: the rounding rules of the shift, and the search."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ..errors import BadInput
from ..formats import Element
from .scales import scale_of_largest, snap

SHIFT_RULES = ("phase", "paper", "release", "floor")

# (step of the lattice in delta and phase, probe tokens, candidates kept). Probes rank, all tokens decide.
SCHEDULE = ((0.5, 192, 6), (0.25, 192, 4), (0.125, 512, 3), (0.0625, 512, 3))
REFINEMENT = SCHEDULE[2:]
DELTAS = tuple(0.5 * i for i in range(-2, 9))
PHASES = (0.25, 0.75)


def exponent_bias(largest: torch.Tensor, element: Element) -> torch.Tensor:
    """LLM-FP4's real-valued bias b~ (float64) whose largest value is `largest`; +inf where that is 0 (a dead channel)."""
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
        inverse = torch.ldexp(torch.reciprocal(self.x_scale), self.shift.int())
        step = torch.ldexp(self.x_scale, -self.shift.int())
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

    With k < n as f·(f H + 2c), H = Wq^T Wq, c = x E^T Wq, less the constant |x E^T|^2; every term is of the size
    of the error, so that fp32 is enough.
    """

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, weight_q: torch.Tensor):
        error = weight_q - weight
        self.quadratic = weight.shape[1] < weight.shape[0]
        if self.quadratic:
            self.matrix = weight_q.T @ weight_q
            self.offset = x @ (error.T @ weight_q).mul_(2)
        else:
            self.matrix = weight_q.T.contiguous()
            self.offset = x @ error.T

    def __call__(self, f: torch.Tensor, tokens: torch.Tensor | slice) -> torch.Tensor:
        """[tokens] float32, for f [tokens, k]."""
        product = torch.addmm(self.offset[tokens], f, self.matrix)
        return (product.mul_(f) if self.quadratic else product.square_()).sum(1)


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

    def rank(self, candidates: list[Activation], error: OutputError, probe) -> list[Activation]:
        """Candidates by their error on some tokens, best first; the first of equals stays first."""
        tokens, weights = probe
        x, totals = self.x[tokens], []
        for candidate in candidates:
            per_token = error(candidate.dequantize(x).sub_(x), tokens)
            totals.append(per_token.double() @ weights.double())
        totals = torch.stack(totals).nan_to_num(nan=math.inf, posinf=math.inf).tolist()
        return [candidates[i] for i in sorted(range(len(candidates)), key=totals.__getitem__)]

    def neighbours(self, center: Activation, step: float) -> list[Activation]:
        delta, phase = center.point
        phases = {phase, max(0.0, phase - step), min(1.0, phase + step)} if self.rule == "phase" else {0.0}
        return [self.at(center.element, d, p) for d in (delta, delta - step, delta + step) for p in sorted(phases)]

    def lattice(self) -> list[Activation]:
        phases = PHASES if self.rule == "phase" else (0.0,)
        return [self.at(e, d, p) for e in self.elements for d in DELTAS for p in phases]

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
            return self.rank(self.gamma_points(), error, self.everything)[0]
        beam = self.lattice() if incumbent is None else [incumbent]
        for step, count, keep in SCHEDULE if incumbent is None else REFINEMENT:
            if step != SCHEDULE[0][0]:
                beam = unique([c for center in beam for c in self.neighbours(center, step)])
            beam = self.rank(beam, error, self.probes[count])[:keep]
        return self.rank(unique(([incumbent] if incumbent else []) + beam), error, self.everything)[0]


def unique(candidates: list[Activation]) -> list[Activation]:
    """Without repetitions, in order: many points round to the same shifts."""
    seen = {(c.element.name, c.x_scale.item(), c.shift.cpu().numpy().tobytes()): c for c in reversed(candidates)}
    return list(reversed(seen.values()))
