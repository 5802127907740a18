"""FP4 products against every rival on the GPU that is here: python benchmarks/gpu.py --help.

Every contender's result is checked against its own operands first. Then CUDA graphs of copies that exceed L2 are
replayed in rounds, one contender after the other. Writes JSON lines, and from them a table and pictures.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import adapters
import arguments
import gpu_report
import torch
from bench import TURNS, Contender, compare
from gemm import takes
from graphs import GraphTurns
from machine import ROOT
from operands import Weight
from ours import fp4_on_gpu
from result_file import lines_of, recorder

from llmfp4_kernels.errors import BadInput, NoKernel

SHAPES = [(4096, 4096), (11008, 4096), (13824, 5120), (28672, 8192)]
"""(n, k) of LLaMA's linear layers: 7B twice, 13B, 70B."""
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]
SCHEMES = (
    "llm-fp4", "llm-fp4@cuda.gemv-weight-shift", "llm-fp4@cuda.sm80-weight-shift", "llm-fp4@cuda.sm80-packed",
    "gptq-fp4-a8-fp8@cuda.sm90", "gptq-fp4-a8-fp8@cuda.sm90-fast-sums", "mxfp4-a8-fp8@cuda.sm90",
    "gptq-fp4-a4", "gptq-fp4-a8", "mxfp4-a8-int", "nvfp4-a8-int", "llm-fp4-a16", "llm-fp4-a16:fp16", "mxfp4", "nvfp4",
)  # fmt: skip
CHECKED_TOKENS = 32
RESULTS = ROOT / "benchmarks" / "results" / "gpu.jsonl"


class SomeTokens:
    """A check of up to CHECKED_TOKENS tokens, first and last among them: a product treats its tokens alike."""

    def __init__(self, check):
        self.check, self.m = check, None

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        if self.m != len(x):
            self.m = len(x)
            self.check.known.clear()  # its expected products are those of other tokens
        rows = torch.linspace(0, len(x) - 1, min(len(x), CHECKED_TOKENS)).round().long().to(x.device)
        self.check(x[rows].cpu(), y[rows].cpu())


def copy_bandwidth(budget: float = 0.05) -> float:
    """Bytes/s that a copy of 1 GiB moves, read and written: the floor of every product is its bytes over this."""
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / GraphTurns([target.copy_], source).seconds(budget)


def contenders(weight: Weight, schemes: list[str], rivals: list[str]) -> tuple[list[Contender], set[str]]:
    """(rivals, cuBLAS bf16 first, then ours; the names of ours). Who cannot take part is left out with a sentence."""
    known, made, ours = adapters.on_gpu(), [], set()
    for name in rivals:
        try:
            made.append(known[name](weight))
        except (ImportError, NoKernel, BadInput, RuntimeError, AttributeError) as error:
            print(f"{name} is left out: {error}", flush=True)
    for scheme in schemes:
        recipe, _, forced = scheme.partition("@")
        recipe, _, dtype = recipe.partition(":")
        made.append(fp4_on_gpu(weight, recipe, dtype or "bf16", forced or None))
        ours.add(made[-1].name)
    for contender in made:
        contender.check = SomeTokens(contender.check)
    return made, ours


def can_run(contender: Contender, x: torch.Tensor, ours: bool, failures: list[str]) -> bool:
    """Whether it takes x, is right and can be captured in a graph. Ours must, unless a forced kernel refuses."""
    if not takes(contender, len(x)):
        return False
    kernel, operand = contender.kernel(len(x)), x.to(contender.device, contender.x_dtype)
    try:
        if ours and not kernel.startswith(f"{contender.device}."):
            raise NoKernel(f"the registry chose {kernel}")
        with torch.inference_mode():
            contender.check(operand, contender.calls[0](operand))
            TURNS[contender.device](contender.calls[:1], operand).once()
    except Exception as error:  # a rival's own errors are of every kind
        sentence = f"{contender.name} is left out at m = {len(x)}: {type(error).__name__}: {error}"
        print(sentence, flush=True)
        if ours:
            failures.append(sentence)
        return False
    return True


def measure(n: int, k: int, options, record, bandwidth: float, out_of_time) -> list[str]:
    """All m of one shape; returns what is wrong with ours."""
    weight, failures = Weight(n, k), []
    entered, ours = contenders(weight, options.schemes, options.rivals)
    for m in options.m:
        if out_of_time():
            print(f"n = {n}, k = {k}, m = {m} is left out: {options.limit} s have passed", flush=True)
            continue
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        ready = [c for c in entered if can_run(c, x, c.name in ours, failures)]
        for row, contender in zip(compare(ready, x, rounds=options.rounds, budget=options.budget), ready):
            moved = contender.weight_bytes + (m * k + m * n) * contender.x_dtype.itemsize
            row |= {"m": m, "n": n, "k": k, "ours": contender.name in ours, "note": contender.note, "bytes": moved}
            row |= {"weight_bytes": contender.weight_bytes, "copy_gbps": bandwidth / 1e9}
            row |= {"floor": moved / bandwidth / row["seconds"], "tflops": 2e-12 * m * n * k / row["seconds"]}
            record(row)
    return failures


def line(row: dict) -> str:
    return (
        f"{row['name']:44} m={row['m']:<4} n={row['n']} k={row['k']} {row['seconds'] * 1e6:10.1f} us "
        f"±{row['spread'] * 100:<3.0f}% {row['ratio']:6.2f}x {row['tflops']:7.1f} TFLOP/s "
        f"{row['floor'] * 100:4.0f}% of the floor {row['kernel']}"
    )


def scheme(text: str) -> str:
    """RECIPE[:DTYPE][@KERNEL]."""
    recipe, separator, kernel = text.partition("@")
    return arguments.scheme(recipe) + separator + kernel


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rivals = list(adapters.on_gpu())
    parser.add_argument("--shapes", type=arguments.shape, nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--m", type=arguments.count, nargs="+", default=TOKENS)
    parser.add_argument("--schemes", type=scheme, nargs="*", default=SCHEMES, metavar="RECIPE[:fp16][@KERNEL]")
    parser.add_argument("--rivals", nargs="*", default=rivals, choices=rivals, metavar="RIVAL", help=", ".join(rivals))
    parser.add_argument("--rounds", type=arguments.rounds, default=3)
    parser.add_argument("--budget", type=arguments.seconds, default=0.01, help="seconds of one contender in one round")
    parser.add_argument("--limit", type=arguments.seconds, default=300, help="after which nothing new is started")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON lines, written anew; table and pictures beside")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("gpu.py times products on a GPU: there is none that torch can use")
    started, failures, bandwidth = time.perf_counter(), [], copy_bandwidth()
    out_of_time = lambda: time.perf_counter() - started > options.limit  # noqa: E731
    options.out.unlink(missing_ok=True)
    record = recorder(options.out, line, versions=adapters.versions(), gpu=torch.cuda.get_device_name())
    for n, k in options.shapes:
        if not out_of_time():
            failures += measure(n, k, options, record, bandwidth, out_of_time)
    for path in gpu_report.write(lines_of(options.out), options.out):
        print(f"wrote {path}")
    if failures:
        sys.exit("wrong or missing results of ours: " + "; ".join(failures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
