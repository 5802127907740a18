"""LLM-FP4's ablations: calibration size, pre-shift, the shift's rounding, the grid of biases; one change at a time.

Each variant searches a sample of the demo model's layers, W4A4, and is judged by their output error on held-out
tokens. --perplexity quantizes the whole model, too, for the variants that matter. Writes
benchmarks/results/ablations.json row by row: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import arguments
import machine
import subjects
import torch
from quantized import fingerprint
from result_file import ResultFile
from tables import ablations_table

from llmfp4_kernels.errors import BadInput, LLMFP4Error
from llmfp4_kernels.evaluate import perplexity, windows
from llmfp4_kernels.nn import FP4Linear
from llmfp4_kernels.quantizer.calibrate import LayerInputs, collect
from llmfp4_kernels.quantizer.search import LinearSearch, search_linear

SECTION, HELD_OUT = "ablations", 1024


@dataclass(frozen=True)
class Variant:
    group: str
    name: str
    options: dict = field(default_factory=dict)
    """of search_linear"""
    share: float = 1.0
    """of the calibration tokens"""
    perplexity: bool = False
    """worth the search of the whole model"""

    @property
    def title(self) -> str:
        return f"{self.group}: {self.name}"


DEFAULT = Variant("default", "additive grid, pre-shift, searched phase", perplexity=True)
VARIANTS = (
    DEFAULT,
    Variant("calibration", "1/8 of the tokens", share=1 / 8, perplexity=True),
    Variant("calibration", "1/4 of the tokens", share=1 / 4),
    Variant("calibration", "1/2 of the tokens", share=1 / 2),
    Variant("pre-shift", "none", {"preshift": False}, perplexity=True),
    Variant("shift rule", "paper", {"shift_rule": "paper"}, perplexity=True),
    Variant("shift rule", "release", {"shift_rule": "release"}),
    Variant("shift rule", "floor", {"shift_rule": "floor"}, perplexity=True),
    Variant("grid", "gamma", {"grid": "gamma"}),
    Variant("grid", "gamma, paper's shift rule", {"grid": "gamma", "shift_rule": "paper"}, perplexity=True),
    *(
        Variant(
            "gamma range",
            f"{low}..{high}, paper's shift rule",
            {"grid": "gamma", "shift_rule": "paper", "gamma_range": (low, high)},
        )
        for low, high in ((0.1, 1.2), (0.5, 1.5))
    ),
    Variant("rounds", "1", {"rounds": 1}),
)


def linear_layers(model: torch.nn.Module) -> list[str]:
    """The layers that quantize_model quantizes by default."""
    return [name for name, m in model.named_modules() if type(m) is torch.nn.Linear and not name.endswith("lm_head")]


def spread(names: list[str], count: int) -> list[str]:
    """`count` of the names at even distances: of 210 layers, 7 a block, 14 hold each kind twice."""
    if not 1 <= count <= len(names):
        raise BadInput(f"{count} layers cannot be taken from {len(names)}")
    return [names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)]


def part(calibration: list[torch.Tensor], share: float) -> list[torch.Tensor]:
    """The first tokens of the calibration, window by window."""
    rows = torch.cat([batch for batch in calibration if batch.shape[1] == calibration[0].shape[1]])
    return list(rows[: max(1, round(len(rows) * share))].split(len(calibration[0])))


def search(inputs: LayerInputs, layer: torch.nn.Linear, options: dict) -> LinearSearch:
    return search_linear(inputs.x, layer.weight.detach(), channel_max=inputs.channel_max, **options)


def held_out_error(found: LinearSearch, x: torch.Tensor, layer: torch.nn.Linear) -> float:
    """|Xq Wq^T - X W^T|^2 / |X W^T|^2 on tokens x [tokens, k] that the search has not seen."""
    y = x @ layer.weight.detach().T
    error = found.activation_dequantized(x) @ found.weight_dequantized().T - y
    return (error.square().sum(dtype=torch.float64) / y.square().sum(dtype=torch.float64)).item()


class Ablation:
    """A sample of a model's layers with their held-out inputs."""

    def __init__(self, subject: subjects.Subject, window: int, layers: int):
        self.subject, self.window = subject, window
        self.names = spread(linear_layers(subject.dense), layers)
        ids = windows(subject.evaluation[: 4 * HELD_OUT], window, batch=4)
        self.held_out = {n: i.x for n, i in collect(subject.dense, self.names, ids, sample_tokens=HELD_OUT)}

    def about(self) -> dict:
        tokens = len(next(iter(self.held_out.values())))
        calibration = sum(batch.numel() for batch in self.subject.calibration)
        return {
            "model": self.subject.name, "text": self.subject.text, "layers": self.names, "held_out": tokens,
            "calibration_tokens": calibration, "default": f"{DEFAULT.name}, {calibration} calibration tokens",
        }  # fmt: skip

    def errors(self, variant: Variant) -> dict[str, float]:
        """{layer: held-out error}"""
        dense, batches = self.subject.dense, part(self.subject.calibration, variant.share)
        return {
            name: held_out_error(search(inputs, layer, variant.options), self.held_out[name], layer)
            for name, inputs in collect(dense, self.names, batches)
            for layer in [dense.get_submodule(name)]
        }

    def perplexity(self, variant: Variant) -> float:
        """Of the whole model, packed, in float32."""
        dense, batches = self.subject.dense, part(self.subject.calibration, variant.share)
        model = copy.deepcopy(dense)
        for name, inputs in collect(dense, linear_layers(dense), batches):
            layer = dense.get_submodule(name)
            model.set_submodule(
                name, FP4Linear.from_packed(search(inputs, layer, variant.options).packed(), layer.bias)
            )
        return perplexity(model, self.subject.evaluation, self.window)


def run(ablation: Ablation, variants: list[Variant], result: ResultFile, whole: bool) -> None:
    """Measure each variant, but for rows that `result` has; the default first, whose errors are the unit."""
    result.describe(SECTION, ablation.about())
    for variant in variants:
        key = fingerprint(ablation.subject.dense, repr(variant), ablation.subject.calibration)
        before = result.find(SECTION, variant.title, key) or {}
        row = dict(before)
        if not row:
            started = time.perf_counter()
            row["errors"] = ablation.errors(variant)
            row["seconds"] = round(time.perf_counter() - started, 1)
        unit = row["errors"] if variant is DEFAULT else result.rows(SECTION)[DEFAULT.title]["errors"]
        ratios = [row["errors"][name] / unit[name] for name in ablation.names]
        row |= {"ratio": statistics.geometric_mean(ratios), "least": min(ratios), "largest": max(ratios)}
        if whole and variant.perplexity and "perplexity" not in row:
            row["perplexity"] = ablation.perplexity(variant)
        if row == before:
            print(f"{variant.title}: {result.path} has it", flush=True)
            continue
        result.put(SECTION, variant.title, key, row)
        print(f"{variant.title}: {row['ratio']:.3f} times the default's error", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers", type=int, default=14, help="how many layers, at even distances; 7 and 14 hold all kinds"
    )
    parser.add_argument("--perplexity", action="store_true", help="search the whole model for some variants (hours)")
    parser.add_argument("--build", type=Path, default=subjects.BUILD, help="downloads")
    parser.add_argument(
        "--out", type=arguments.whole_file, help="default: benchmarks/results/ablations.json; --quick: in build/quick"
    )
    parser.add_argument("--quick", action="store_true", help="few tokens: a check that everything runs, no measurement")
    args = parser.parse_args(argv)
    try:
        sizes = subjects.QUICK if args.quick else subjects.Sizes()
        results = args.build / "quick" if args.quick else machine.ROOT / "benchmarks" / "results"
        result = ResultFile(args.out or results / "ablations.json")
        subject = subjects.language(sizes, args.build)
        run(Ablation(subject, sizes.window, args.layers), list(VARIANTS), result, args.perplexity)
    except LLMFP4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n" + "\n".join(ablations_table(result.content)) + f"\n\nwrote {result.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
