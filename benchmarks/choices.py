"""Which CUDA row, tile and splits are fastest on the GPU that is here: python benchmarks/choices.py --help.

Each candidate's result is checked against the reference first; then CUDA graphs of copies that exceed L2 are replayed.
Writes JSON lines of all that was timed, and the fastest into the table that the package reads (cuda_choices.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import arguments
import torch
from gpu import SHAPES, TOKENS
from machine import ROOT
from ours import DTYPES
from result_file import recorder

from llmfp4_kernels.backends import cuda, cuda_choices, cuda_tune, measured
from llmfp4_kernels.backends.graphs import Stopwatch
from llmfp4_kernels.errors import NoKernel
from llmfp4_kernels.formats import recipe as recipe_named
from llmfp4_kernels.problem import Problem

SCHEMES = (
    "llm-fp4", "llm-fp4-a16", "nvfp4", "mxfp4", "gptq-fp4-a8-fp8", "mxfp4-a8-fp8", "nvfp4-a8-int", "mxfp4-a8-int",
    "gptq-fp4-a16", "llm-fp4-a16:fp16", "nvfp4:fp16", "mxfp4:fp16",
)  # fmt: skip
"""One of each kind of operands, scales and planes; recipes that share them share the choice. E4M3 is Hopper's."""
RESULTS = ROOT / "benchmarks" / "results" / "gpu_choices.jsonl"


def subject(scheme: str, n: int, k: int, watch: Stopwatch, device: torch.device) -> cuda_tune.Subject:
    recipe, _, dtype = scheme.partition(":")
    problem = Problem.of_recipe(recipe_named(recipe), 1, n, k, dtype=DTYPES[dtype or "bf16"], device="cuda")
    return cuda_tune.Subject(problem, watch, device)


def rows_of(outcome: cuda_tune.Outcome) -> list[dict]:
    """What was timed, each beside what counting chooses, and what was left out."""
    best = {row.config: row.seconds for row in outcome.rows}
    counted = outcome.timed[0][1]
    timed = [
        dataclasses.asdict(tile)
        | {"seconds": seconds, "ratio": counted / seconds, "counted": i == 0, "in_turn": best.get(tile)}
        for i, (tile, seconds) in enumerate(outcome.timed)
    ]
    return timed + [dataclasses.asdict(tile) | {"left_out": why} for tile, why in outcome.left_out]


def line(row: dict) -> str:
    what = f"{row['scheme']:18} m={row['m']:<4} n={row['n']} k={row['k']} {row['kernel']:10} {row['size']:>7}"
    if "left_out" in row:
        return f"{what} {row['splits']:3} splits is left out: {row['left_out']}"
    chosen = "" if row["in_turn"] is None else " the row's fastest"
    return f"{what} {row['splits']:3} splits {row['seconds'] * 1e6:10.1f} us {row['ratio']:5.2f}x of counted{chosen}"


def measure(scheme: str, n: int, k: int, options, record, until: float) -> list[str]:
    """All m of one scheme and shape that begin before `until` (time.perf_counter); returns what is wrong."""
    device, failures = torch.device(cuda.machine.device_type), []
    watch, dtype = Stopwatch(device), DTYPES[scheme.partition(":")[2] or "bf16"]
    made = subject(scheme, n, k, watch, device)
    for i, m in enumerate(options.m):
        what, now = f"{scheme}, m = {m}, n = {n}, k = {k}", time.perf_counter()
        if now > until:
            print(f"{what} is left out: its time is up", flush=True)
            continue
        try:
            share = (until - now) / (len(options.m) - i)
            outcome = cuda_tune.tune(made, m, dtype, watch, share, str(options.out.name))
        except cuda_tune.Refused as error:
            print(f"{what} is left out: {error}", flush=True)
            continue
        except NoKernel as error:
            failures.append(f"{what}: {error}")
            print(failures[-1], flush=True)
            continue
        for row in rows_of(outcome):
            record({"scheme": scheme, "m": m, "n": n, "k": k} | row)
        failures += [f"{what}, {tile.kernel} {tile.size}: {why}" for tile, why in outcome.left_out]
        cuda_choices.put(outcome.rows, cuda.machine, device, options.table)  # at once, should it be interrupted
    return failures


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=arguments.shape, nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--m", type=arguments.count, nargs="+", default=TOKENS)
    parser.add_argument("--schemes", type=arguments.scheme, nargs="+", default=SCHEMES, metavar="RECIPE[:fp16]")
    parser.add_argument(
        "--limit", type=arguments.seconds, default=1200, help="after which nothing is started; all share it"
    )
    parser.add_argument(
        "--out", type=arguments.result_file, default=RESULTS, help="JSON lines of all that was timed, written anew"
    )
    parser.add_argument(
        "--table", type=Path, default=measured.SHIPPED, metavar="FOLDER", help="of the table; default: the package's"
    )
    options = parser.parse_args(argv)
    why = cuda.refusal("sm80", Problem(1, 64, 64, recipe_named("llm-fp4").weight_elements[0], device="cuda"))
    if why:
        sys.exit(f"choices.py times the CUDA rows on a GPU: {why}")
    started, failures = time.perf_counter(), []
    options.out.unlink(missing_ok=True)
    here = measured.Conditions.of(cuda.machine, torch.device(cuda.machine.device_type))
    record = recorder(options.out, line, gpu=here.gpu)
    turns = [(scheme, *shape) for scheme in options.schemes for shape in options.shapes]
    for i, turn in enumerate(turns):
        # Every scheme and shape has the same share of what is left, so that none is missing.
        now = time.perf_counter()
        failures += measure(*turn, options, record, now + (options.limit - (now - started)) / (len(turns) - i))
    print(f"wrote {options.table / cuda_choices.KIND.file(here)}")
    if failures:
        sys.exit("wrong or missing results of ours: " + "; ".join(failures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
