"""Weight and activation searched in turn: LLM-FP4's rounds (arXiv 2310.16836, algorithm 1) and what goes beyond them.

probe of the layer    LLM-FP4's grid with the paper's rule, above 4 bits the release's too: both orders of rounds
                      additive grid: rounds from full-precision activations
whole layer           the best weight beside each activation quantizer found so, over the points of both grids;
                      from the best pair on, activation and weight in turn while that lowers the error
"""

from __future__ import annotations

from dataclasses import dataclass

from ..formats import Element
from .activation_search import ActivationSearch, unique
from .objective import Layer
from .preshift import Activation
from .row_scales import Weight, WeightSearch

GAMMA_RANGE = (0.01, 1.2)
"""LLM-FP4's range of factors on the bias (the paper's gamma_1, gamma_2)."""
START = ("e2m1", "e3m2", "e4m3")
"""The element that LLM-FP4's rounds begin with on both sides, at 4, 6 and 8 bits"""


def gamma_grid(low: float, high: float) -> tuple[float, ...]:
    """LLM-FP4's factors on the bias: the authors' code evaluates the first 100 of 101 points."""
    return tuple(low + i * (high - low) / 100 for i in range(100))


def _start(elements: tuple[Element, ...]) -> Element:
    return next((e for e in elements if e.name in START), elements[0])


@dataclass(frozen=True)
class Pair:
    """A quantized layer: (value of the objective, mean squared error) and both sides."""

    value: float
    mse: float
    weight: Weight
    activation: Activation | None


class Descents:
    """Searches of one layer. channel_max and elements of the activation are None where it is not quantized.

    x_unit and w_unit are the exponents of the powers of two that the layer was divided by.
    """

    def __init__(
        self, layer: Layer, channel_max, weight_elements, activation_elements, units: tuple[int, int], rounds, gammas
    ):
        self.layer, self.channel_max, self.rounds, self.gammas = layer, channel_max, rounds, gammas
        self.weight_elements, self.activation_elements = weight_elements, activation_elements
        self.x_unit, self.w_unit = units

    def weights(self, layer: Layer, *grids) -> WeightSearch:
        return WeightSearch(layer, self.weight_elements, grids, self.w_unit)

    def activations(self, layer: Layer, rule: str | None, gammas) -> ActivationSearch:
        return ActivationSearch(layer, self.channel_max, self.activation_elements, rule, gammas, self.x_unit)

    def pair(self, layer: Layer, w: Weight, a: Activation | None) -> Pair:
        return Pair(*layer.errors(w.dequantize(layer.weight), a), w, a)

    def paper(self, probe: Layer, weights: WeightSearch, rule: str | None) -> Activation:
        """Where LLM-FP4's rounds end, by the better of its two orders: of small layers one in eight ends more than 3 %
        apart. Both begin with the largest magnitudes as the largest values of START."""
        search = self.activations(probe, rule, self.gammas)
        last = self.release_round if rule else self.baseline_round
        ends = [self.rounds_of(probe, weights, search, one_round) for one_round in (self.paper_round, last)]
        return min(ends, key=lambda end: end.value).activation

    def rounds_of(self, probe: Layer, weights: WeightSearch, search: ActivationSearch, one_round) -> Pair:
        element = _start(self.weight_elements)
        w, a = Weight(element, weights.row_scale(element, 0.0)), search.at(_start(self.activation_elements), 0.0, 0.5)
        for _ in range(self.rounds):
            element, a_before = w.element, a
            w, a = one_round(probe, weights, search, w, a)
            if a.same_as(a_before) and w.element == element:
                break  # the next weight would be this one: it follows from them
        return self.pair(probe, w, a)

    def paper_round(self, probe, weights, search, w, a):
        """Algorithm 1: activation bias and format, weight bias and format."""
        a = next(iter(search.each(w.dequantize(probe.weight)).values()))
        return weights(a), a

    def baseline_round(self, probe, weights, search, w, a):
        """The authors' code without pre-shift: weight bias and format, activation bias and format."""
        w = weights(a)
        return w, next(iter(search.each(w.dequantize(probe.weight)).values()))

    def release_round(self, probe, weights, search, w, a):
        """The authors' code with pre-shift: weight bias, activation bias, weight format, activation format."""
        each_w = {e: found for e, (_, found) in weights.each(a).items()}
        w = each_w.get(w.element, w)
        each_a = search.each(w.dequantize(probe.weight))
        a = each_a.get(a.element, next(iter(each_a.values())))
        w = min((self.pair(probe, found, a) for found in each_w.values()), key=lambda pair: pair.value).weight
        return w, min((self.pair(probe, w, found) for found in each_a.values()), key=lambda pair: pair.value).activation

    def additive(self, probe: Layer, rule: str | None) -> Activation:
        """Where rounds on the additive grid end that begin beside full-precision activations."""
        weights, search, a = self.weights(probe, None), self.activations(probe, rule, None), None
        for _ in range(self.rounds):
            before, a = a, search(weights(a).dequantize(probe.weight), a)
            if a.same_as(before):
                break
        return a

    def papers(self, probe: Layer, whole: WeightSearch, rules) -> list[Pair]:
        """LLM-FP4's result for each rule of the shift."""
        weights = whole if probe is self.layer else self.weights(probe, self.gammas)
        found = unique([self.paper(probe, weights, rule) for rule in rules])
        return [self.pair(self.layer, whole(a), a) for a in found]

    def best(self, grid: str, rule: str | None) -> Pair:
        """The best pair found. On the additive grid never worse than on the gamma grid, whose result is one start."""
        layer = self.layer
        if self.activation_elements is None:
            weights = self.weights(layer, *([self.gammas] if grid == "gamma" else [self.gammas, None]))
            return self.pair(layer, weights(None), None)
        probe, weights = layer.probe(), self.weights(layer, self.gammas)
        if grid == "gamma":
            return self.papers(probe, weights, [rule])[0]
        more_bits = max(e.bits for e in self.weight_elements + self.activation_elements) > 4
        rules = [rule] if rule != "phase" else ["paper", "release"] if more_bits else ["paper"]
        pairs = self.papers(probe, weights, rules)
        weights.add_grid(None)
        best = min(pairs, key=lambda pair: pair.value)
        starts = unique([best.activation, self.additive(probe, rule)])
        best = min([best, *(self.pair(layer, weights(a), a) for a in starts)], key=lambda pair: pair.value)
        return self.refined(best, weights, self.activations(layer, rule, None))

    def refined(self, best: Pair, weights: WeightSearch, search: ActivationSearch) -> Pair:
        """From the best pair on, the activation around what it was and the weight beside it, while that gains."""
        for _ in range(self.rounds):
            a = search(best.weight.dequantize(self.layer.weight), best.activation)
            if a.same_as(best.activation):
                break
            pair = self.pair(self.layer, weights(a), a)
            if pair.value >= best.value:
                break
            best = pair
        return best
