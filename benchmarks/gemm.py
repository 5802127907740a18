"""FP4 products against every rival, shape by shape: python benchmarks/gemm.py --help.

Each line of the result file is one measurement with the machine and commit that made it. Ratios are to the first
contender, torch fp32, pair by pair; `times` holds one time per round, from which any other ratio can be taken.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys

import arguments
import torch
from adapters import adapters, versions
from bench import Contender, compare, entrants
from operands import TOKENS, Weight
from ours import fp4
from result_file import recorder
from roofline import Reading, ceilings, footprint
from shared_cases import LINEAR_SHAPES

from llmfp4_kernels.errors import LLMFP4Error, NoKernel

SCHEMES = ("llm-fp4", "gptq-fp4-a4", "gptq-fp4-a8", "mxfp4-a8-int", "nvfp4-a8-int", "llm-fp4-a16",
           "llm-fp4-a16:bf16", "mxfp4", "nvfp4")  # fmt: skip
FIRST = "torch-fp32"


def contenders(
    weight: Weight, schemes: list[str], rivals: list[str], kernels: list[str], warm: bool
) -> list[Contender]:
    """FIRST, then the rivals, then ours, as far as they can take part."""
    known = adapters()
    makers = {name: functools.partial(known[name], weight, warm=warm) for name in (FIRST, *rivals)}
    for scheme in schemes:
        recipe, _, dtype = scheme.partition(":")
        for kernel in kernels or [None]:
            makers[f"{scheme} {kernel or ''}"] = lambda r=recipe, d=dtype, k=kernel: fp4(
                weight, r, d or "fp32", k, warm
            )
    return entrants(makers)


def takes(contender: Contender, m: int) -> bool:
    """Whether it runs m rows; a forced kernel may refuse, with a sentence."""
    try:
        contender.kernel(m)
    except NoKernel as error:
        print(f"{contender.name} is left out: {error}", flush=True)
        return False
    return True


def measure(n: int, k: int, options, record) -> None:
    """All m and thread counts of one shape."""
    weight = Weight(n, k)
    entered = contenders(weight, options.schemes, options.rivals, options.kernels, options.warm)
    entered = [contender for contender in entered if takes(contender, TOKENS)]
    errors = {contender.name: weight.error(contender) for contender in entered}
    for threads, m in itertools.product(options.threads, options.m):
        torch.set_num_threads(threads)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        ready = [contender for contender in entered if takes(contender, m)]
        readings = {size: Reading(size) for size in sorted({footprint(contender) for contender in ready})}
        beside = [reading.once_more for reading in readings.values()]
        rows = compare(ready, x, rounds=options.rounds, budget=options.budget, beside=beside)
        for row, contender in zip(rows, ready):
            row |= {"m": m, "n": n, "k": k, "threads": threads, "error": errors[contender.name]}
            row |= {"weight_bytes": contender.weight_bytes, "unit": contender.unit, "note": contender.note}
            row |= ceilings(m, n, k, contender, readings[footprint(contender)].rate)
            row["gflops"] = 2e-9 * m * n * k / row["seconds"]
            row["gbps"] = row["bytes"] / row["seconds"] / 1e9
            row["roofline"] = row["roofline_seconds"] / row["seconds"]
            record(row)


def line(row: dict) -> str:
    shape = f"m={row['m']:<4} n={row['n']} k={row['k']} t={row['threads']}"
    return (
        f"{row['name']:34} {shape} {row['seconds'] * 1e6:10.1f} us ±{row['spread'] * 100:<3.0f}% {row['ratio']:6.2f}x "
        f"{row['gflops']:8.1f} GFLOP/s {row['gbps']:6.1f} GB/s {row['roofline'] * 100:4.0f}% of roofline, "
        f"error {row['error']:.4f} {row['kernel']}"
        + (f" ({row['others']} CPUs busy elsewhere)" * (row["others"] > 0.1))
    )


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=LINEAR_SHAPES, help="the linear shapes of a model")
    parser.add_argument("--shapes", type=arguments.shape, nargs="+", default=[(4096, 4096)], metavar="NxK")
    parser.add_argument("--m", type=arguments.count, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 512])
    parser.add_argument("--threads", type=arguments.count, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--schemes", type=arguments.scheme, nargs="*", default=SCHEMES, metavar="RECIPE[:bf16]")
    parser.add_argument("--rivals", nargs="*", default=list(adapters()), choices=list(adapters()), metavar="RIVAL",
                        help=f"of {', '.join(adapters())}")  # fmt: skip
    parser.add_argument("--kernels", type=arguments.kernel, nargs="*", default=[], metavar="KERNEL",
                        help="rows of the registry to force, each a contender")  # fmt: skip
    parser.add_argument("--warm", action="store_true", help="one copy of each weight, which may stay in the cache")
    parser.add_argument("--rounds", type=arguments.rounds, default=9)
    parser.add_argument(
        "--budget", type=arguments.seconds, default=0.03, help="seconds that one contender runs in one round"
    )
    parser.add_argument("--out", type=arguments.result_file, help="JSON lines to append to")
    options = parser.parse_args(argv)
    options.rivals = [name for name in options.rivals if name != FIRST]
    record = recorder(options.out, line, versions=versions(), wait_policy=os.environ.get("OMP_WAIT_POLICY", ""))
    try:
        for n, k in LINEAR_SHAPES[options.model] if options.model else options.shapes:
            measure(n, k, options, record)
    except LLMFP4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
