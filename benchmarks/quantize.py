"""How long a weight takes to be quantized, by our recipes and by the rivals' functions: benchmarks/quantize.py --help.

The error is that of the dequantized weight; recipes that search look at outputs, not at weights.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable

import arguments
import ggml
import torch
from bench import Contender, compare, entrants
from operands import GROUP
from result_file import recorder
from rivals import dequantize_int4, quantize_int4
from shared_cases import random_x

from llmfp4_kernels import reference
from llmfp4_kernels.errors import BadInput, NoKernel
from llmfp4_kernels.quantizer.linear import quantize_linear

RECIPES = ("mxfp4", "nvfp4", "int4", "minmax-w4a4", "llm-fp4-a16", "gptq-fp4-a16", "gptq-fp4-a4", "llm-fp4")
WORST = 0.25
"""Relative error of a weight beyond which something is wrong: 4 bits with one scale per row have 0.12 to 0.16."""


class Near:
    """check(weight, quantized): the dequantized weight is within WORST of it; keeps the error."""

    def __init__(self, name: str, dequantize: Callable):
        self.name, self.dequantize, self.error = name, dequantize, float("nan")

    def __call__(self, weight: torch.Tensor, quantized) -> None:
        self.error = ((self.dequantize(quantized) - weight).norm() / weight.norm()).item()
        if not self.error <= WORST:
            raise NoKernel(f"refusing to time {self.name}: its weight is off by {self.error:.2f}, {WORST} is too much")


def ours(recipe: str, k: int, tokens: int) -> Contender:
    x = random_x(tokens, k, seed=2)
    check = Near(recipe, reference.dequantize)
    return Contender(recipe, [lambda weight: quantize_linear(weight, recipe, x)], check)


def llama_cpp(kind: str, k: int) -> Contender:
    ggml.quantize(torch.zeros(1, k), kind)
    check = Near(kind, lambda rows: ggml.dequantize(rows, kind, k))
    return Contender(f"llama.cpp {kind} (1 thread)", [lambda weight: ggml.quantize(weight, kind)], check)


def torch_int4(k: int) -> Contender:
    if k % GROUP:
        raise BadInput(f"groups of {GROUP} do not divide k = {k}")
    check = Near("torch int4", lambda parts: dequantize_int4(*parts, GROUP))
    return Contender(f"torch int4 g{GROUP}", [lambda weight: quantize_int4(weight, GROUP)], check)


def bitsandbytes(kind: str) -> Contender:
    from rivals_packages import quiet_import

    functional = quiet_import("bitsandbytes").functional
    check = Near(kind, lambda parts: functional.dequantize_4bit(*parts))
    return Contender(f"bitsandbytes {kind.upper()}", [lambda w: functional.quantize_4bit(w, quant_type=kind)], check)


def line(row: dict) -> str:
    shape = f"n={row['n']} k={row['k']} t={row['threads']}"
    return f"{row['name']:28} {shape} {row['mega_weights']:8.2f} M weights/s, error {row['error']:.4f}"


def measure(n: int, k: int, options, record: Callable[[dict], None]) -> None:
    """All thread counts of one shape."""
    makers = {recipe: functools.partial(ours, recipe, k, options.tokens) for recipe in options.recipes}
    makers |= {f"llama.cpp {kind}": functools.partial(llama_cpp, kind, k) for kind in ggml.TYPES}
    makers |= {f"bitsandbytes {kind}": functools.partial(bitsandbytes, kind) for kind in ("fp4", "nf4")}
    makers["torch int4"] = functools.partial(torch_int4, k)
    entered = entrants(makers)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) / k**0.5
    for threads in options.threads:
        torch.set_num_threads(threads)
        for row, contender in zip(compare(entered, weight, rounds=options.rounds, budget=0.0), entered):
            row |= {"n": n, "k": k, "threads": threads, "tokens": options.tokens, "error": contender.check.error}
            record(row | {"mega_weights": n * k / row["seconds"] / 1e6})


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=arguments.shape, nargs="+", default=[(1024, 1024)], metavar="NxK")
    parser.add_argument("--threads", type=arguments.count, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--recipes", type=arguments.recipe, nargs="*", default=RECIPES)
    parser.add_argument("--tokens", type=arguments.count, default=512, help="of calibration")
    parser.add_argument("--rounds", type=arguments.rounds, default=3)
    parser.add_argument("--out", type=arguments.result_file, help="JSON lines to append to")
    options = parser.parse_args(argv)
    record = recorder(options.out, line)
    try:
        for n, k in options.shapes:
            measure(n, k, options, record)
    except NoKernel as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
