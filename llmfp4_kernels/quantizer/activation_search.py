"""The activation side of LLM-FP4's search: element, x_scale and shift of a layer's input, by output error."""

from __future__ import annotations

import math
from itertools import groupby

import torch

from ..encode import snap
from ..formats import Element
from .objective import Layer, TokenErrors, block_elements, probe_tokens
from .preshift import Activation, channel_shift, exponent_bias
from .scales import scale_of_largest

# (step in delta, probe tokens, candidates kept of each element). The step in phase is twice that. Probes rank, and all
# tokens decide. Elements are kept apart while they are within MARGIN: those with more mantissa need a finer lattice.
SCHEDULE = ((0.25, 128, 6), (0.125, 256, 4), (0.0625, 512, 4), (0.03125, 512, 4))
REFINEMENT = SCHEDULE[2:]
MARGIN = 1.3
DELTAS = tuple(0.25 * i for i in range(-4, 15))
FACTORS_PROBE, FACTORS_KEPT = 128, 12
"""Points of the gamma grid are ranked once, beside the full-precision weight, on so many tokens; so many of each
element are looked at in every round."""
FACTORS_MARGIN = 2.0


class ActivationSearch:
    """Element, x_scale and shift of least output error for a layer's inputs x [tokens, k] with channel maxima [k]."""

    def __init__(self, layer: Layer, channel_max, elements, shift_rule: str | None, gammas, unit_exponent: int):
        self.layer, self.x, self.channel_max = layer, layer.x, channel_max
        self.elements, self.rule, self.gammas, self.unit_exponent = elements, shift_rule, gammas, unit_exponent
        self.largest = channel_max.amax().double()
        self.probes = {count: probe_tokens(self.x, count) for count in (FACTORS_PROBE, 256, 512)}
        self.everything = (slice(None), torch.ones(self.x.shape[0], device=self.x.device))
        if gammas is not None:
            self.points = unique(self.gamma_points())
            if not layer.small:
                ranked = self.rank(self.points, TokenErrors(layer, layer.weight), self.probes[FACTORS_PROBE])
                self.points = self.keep(ranked, FACTORS_KEPT, FACTORS_MARGIN)

    def at(self, element: Element, delta: float, phase: float) -> Activation:
        """The quantizer whose bias is `delta` above the one that just holds the largest input."""
        x_scale = scale_of_largest(self.largest, element) * 2.0**-delta
        rho = element.bias - math.log2(x_scale)
        if self.rule is None:
            shift = torch.zeros(len(self.channel_max), dtype=torch.int8, device=self.x.device)
        else:
            shift = channel_shift(exponent_bias(self.channel_max, element), rho, element, self.rule, phase)
        phase = {"paper": 0.5, "release": 0.5 + rho - round(rho), "floor": 0.0}.get(self.rule, phase)
        return Activation(element, x_scale.float(), shift, (delta, phase))

    def rank(self, candidates: list[Activation], error: TokenErrors, probe) -> list[tuple[float, Activation]]:
        """(error on some tokens, candidate), best first; the first of equals stays first."""
        tokens, weights = probe
        x, totals = self.x[tokens], []
        count = max(1, block_elements(x.device) // x.numel())
        for element, same in groupby(candidates, key=lambda candidate: candidate.element):
            same = list(same)
            for block in (same[i : i + count] for i in range(0, len(same), count)):
                totals.append(error(input_errors(block, element, x), tokens).double() @ weights.double())
        totals = torch.cat(totals).nan_to_num(nan=math.inf, posinf=math.inf).tolist()
        return sorted(zip(totals, candidates), key=lambda ranked: ranked[0])

    def keep(self, ranked: list[tuple[float, Activation]], count: int, margin: float = MARGIN) -> list[Activation]:
        """The best `count` of each element whose best is within `margin` of the best of all."""
        kept: dict[Element, list[Activation]] = {}
        for total, candidate in ranked:
            group = kept.setdefault(candidate.element, [])
            if len(group) < count and (group or total <= ranked[0][0] * margin):
                group.append(candidate)
        return [candidate for group in kept.values() for candidate in group]

    def phases(self, element: Element, delta: float) -> tuple[float, ...]:
        """Where the lattice begins: as the floor, the paper's and the release's rule would have it."""
        if self.rule != "phase":
            return (0.0,)
        rho = element.bias - math.log2(scale_of_largest(self.largest, element)) - self.unit_exponent + delta
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
            b0 = element.bias - math.log2(scale_of_largest(self.largest, element)) - self.unit_exponent
            points += [self.at(element, (gamma - 1) * b0, p) for gamma in self.gammas for p in phases]
        return points

    def each(self, weight_q: torch.Tensor) -> dict[Element, Activation]:
        """Each element's best point of the gamma grid beside `weight_q`, the best of all first."""
        best: dict[Element, Activation] = {}
        for _, candidate in self.rank(self.points, TokenErrors(self.layer, weight_q), self.everything):
            best.setdefault(candidate.element, candidate)
        return best

    def __call__(self, weight_q: torch.Tensor, incumbent: Activation | None) -> Activation:
        """The best quantizer beside the weight `weight_q`; with an incumbent, around it and never worse."""
        error = TokenErrors(self.layer, weight_q)
        beam = self.lattice() if incumbent is None else [incumbent]
        for step, count, keep in SCHEDULE if incumbent is None else REFINEMENT:
            if step != SCHEDULE[0][0]:
                beam = [c for center in beam for c in self.neighbours(center, step)]
            beam = self.keep(self.rank(unique(beam), error, self.probes[count]), keep)
        return self.rank(unique(([incumbent] if incumbent else []) + beam), error, self.everything)[0][1]


def input_errors(candidates: list[Activation], element: Element, x: torch.Tensor) -> torch.Tensor:
    """xq - x of x [tokens, k] for each candidate, all of one element: [candidates, tokens, k]; see dequantize."""
    shift = torch.stack([c.shift for c in candidates]).int()[:, None]
    x_scale = torch.stack([c.x_scale for c in candidates])[:, None, None].expand(shift.shape)
    inverse, step = torch.ldexp(torch.reciprocal(x_scale), shift), torch.ldexp(x_scale, -shift)
    return snap(x * inverse, element).mul_(step).sub_(x)


def unique(candidates: list[Activation]) -> list[Activation]:
    """Without repetitions, in order: many points round to the same shifts."""
    seen = {(c.element.name, c.x_scale.item(), c.shift.cpu().numpy().tobytes()): c for c in reversed(candidates)}
    return list(reversed(seen.values()))
