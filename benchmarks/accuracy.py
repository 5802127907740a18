"""The accuracy table: perplexity of a real language model and agreement of a real encoder, method by method.

Writes benchmarks/results/accuracy.json row by row: an interrupted run goes on where it stopped. Quantized models are
kept in build/accuracy/. Each row says how far the stored codes are from a floating-point simulation of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import arguments
import machine
import subjects
import tables
import torch
from quantized import bits_per_weight, packed_layers
from result_file import ResultFile
from simulated import Judged, Simulated, replaced, worst_layer
from tables import FULL, METHODS

from llmfp4_kernels.errors import LLMFP4Error
from llmfp4_kernels.evaluate import perplexity
from llmfp4_kernels.evaluate_embeddings import embedding_agreement, sentence_embeddings
from llmfp4_kernels.formats import RECIPES
from llmfp4_kernels.formats import recipe as recipe_named

CHECKED_TOKENS, CHECKED_SENTENCES = 512, 64
RESULTS = machine.ROOT / "benchmarks" / "results" / "accuracy.json"


def width(recipe: str) -> int:
    """Bits of the activations."""
    return max((element.bits for element in recipe_named(recipe).activation_elements), default=16)


class Language:
    """Perplexity on held-out text."""

    section = "language"

    def __init__(self, sizes: subjects.Sizes, build: Path):
        self.subject, self.window = subjects.language(sizes, build), sizes.window

    def full(self) -> dict:
        return self.measure(self.subject.dense)

    def measure(self, model) -> dict:
        return {"perplexity": perplexity(model, self.subject.evaluation, self.window)}

    def check(self, packed, simulated, judged) -> dict:
        """Perplexities on the first tokens, float32, and relative differences."""
        ids = self.subject.evaluation[:CHECKED_TOKENS]
        ppl = {name: perplexity(model, ids, self.window) for name, model in
               (("packed", packed), ("simulated", simulated), ("reference", judged))}  # fmt: skip
        off = {f"off_{name}": abs(ppl["packed"] / ppl[name] - 1) for name in ("simulated", "reference")}
        return {"perplexity": ppl} | off


class Embedding:
    """Sentence embeddings beside those of full precision."""

    section = "embedding"

    def __init__(self, sizes: subjects.Sizes, build: Path):
        self.subject, self._full = subjects.encoder(sizes, build), None

    def embed(self, model, sentences: list[str]) -> torch.Tensor:
        return sentence_embeddings(model, self.subject.tokenizer, sentences)

    def full(self) -> dict:
        return self.measure(self.subject.dense)

    def measure(self, model) -> dict:
        if self._full is None:
            self._full = self.embed(self.subject.dense, self.subject.evaluation)
        return embedding_agreement(self._full, self.embed(model, self.subject.evaluation))

    def check(self, packed, simulated, judged) -> dict:
        """Largest distances of the first sentences' embeddings, which have length 1, float32."""
        sentences = self.subject.evaluation[:CHECKED_SENTENCES]
        found, *others = (self.embed(model, sentences) for model in (packed, simulated, judged))
        off = [(found - other).norm(dim=1).max().item() for other in others]
        return {"off_simulated": off[0], "off_reference": off[1]}


SUBJECTS = {task.section: task for task in (Language, Embedding)}


def measure_recipe(task, recipe: str) -> dict:
    """One row: quality, size, kernels, and the packed model against its simulation."""
    model, record = task.subject.quantized(recipe)
    started = time.perf_counter()
    row = {"width": width(recipe), "bits_per_weight": bits_per_weight(model), "quality": task.measure(model)}
    model = torch.nn.Module.float(model)  # transformers' own float() refuses any quantized model; codes are bytes
    simulation = replaced(model, Simulated)
    row["check"] = task.check(model, simulation, replaced(model, Judged))
    row["check"]["worst_layer"], row["check"]["worst_units"] = worst_layer(simulation)
    row["kernels"] = sorted({layer.kernel(512, torch.float32) for layer in packed_layers(model).values()})
    return row | {"quantization": record, "seconds": round(time.perf_counter() - started, 1)}


def run(task, recipes: list[str], about: dict, result: ResultFile) -> None:
    """Measure full precision and each recipe, but for rows that `result` has."""
    section, subject = task.section, task.subject
    result.describe(section, {"model": subject.name, "text": subject.text} | about)
    if not result.find(section, FULL, "float32"):
        result.put(section, FULL, "float32", {"width": 32, "bits_per_weight": 32.0, "quality": task.full()})
    for recipe in recipes:
        key = subject.fingerprint(recipe)
        if result.find(section, recipe, key):
            print(f"{section} {recipe}: {result.path} has it", flush=True)
            continue
        result.put(section, recipe, key, measure_recipe(task, recipe))
        row = result.rows(section)[recipe]
        print(f"{section} {recipe}: {row['quality']}, {row['check']}", flush=True)


def default_recipes() -> list[str]:
    """The table's methods at all widths, and every other recipe that the package knows."""
    return list(dict.fromkeys([name for names in METHODS.values() for name in names] + list(RECIPES)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=default_recipes(), metavar="RECIPE")
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--build", type=Path, default=subjects.BUILD, help="downloads and quantized models")
    parser.add_argument(
        "--out", type=arguments.whole_file, help="default: benchmarks/results/accuracy.json; --quick: in build/quick"
    )
    parser.add_argument("--quick", action="store_true", help="few tokens: a check that everything runs, no measurement")
    args = parser.parse_args(argv)
    try:
        recipes = [recipe_named(name).name for name in args.recipes]
        sizes = subjects.QUICK if args.quick else subjects.Sizes()
        result = ResultFile(args.out or (args.build / "quick" / "accuracy.json" if args.quick else RESULTS))
        for name in args.models:
            task = SUBJECTS[name](sizes, args.build)
            run(task, recipes, dataclasses.asdict(sizes), result)
    except LLMFP4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n" + "\n\n".join("\n".join(part) for part in tables.accuracy_tables(result.content)))
    print(f"\nwrote {result.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
