"""FP4 products against every rival on the GPU that is here: python benchmarks/gpu.py --help.

Every contender's result is checked against its own operands first. Then CUDA graphs of copies that exceed L2 are
replayed in rounds, one contender after the other. Writes JSON lines, and from them a table and pictures.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time

import adapters
import arguments
import gpu_report
import torch
from bench import TURNS, Contender, compare
from gemm import takes
from machine import ROOT
from operands import Weight
from ours import fp4_on_gpu
from result_file import lines_of, recorder

from llmfp4_kernels.backends.graphs import GraphTurns
from llmfp4_kernels.errors import NoKernel

SHAPES = [(4096, 4096), (11008, 4096), (13824, 5120), (28672, 8192)]
"""(n, k) of LLaMA's linear layers: 7B twice, 13B, 70B."""
TOKENS = [1, 16, 1024, 4096, 4, 64, 256, 2, 8, 32, 128]
"""In the order in which they are measured: where time is up, what lies between is left out."""
SCHEMES = (
    "llm-fp4", "llm-fp4@cuda.gemv-weight-shift", "llm-fp4@cuda.sm80-weight-shift", "llm-fp4@cuda.sm80-packed",
    "gptq-fp4-a8-fp8@cuda.sm90", "gptq-fp4-a8-fp8@cuda.sm90-fast-sums", "mxfp4-a8-fp8@cuda.sm90",
    "gptq-fp4-a4", "gptq-fp4-a8", "mxfp4-a8-int", "nvfp4-a8-int", "llm-fp4-a16", "llm-fp4-a16:fp16", "mxfp4", "nvfp4",
    "minmax-w4a8@cuda.sm90", "llm-fp4@cuda.sm80", "llm-fp4-a16@cuda.sm80", "nvfp4@cuda.sm80",
    "llm-fp4@triton", "llm-fp4-a16@triton", "llm-fp4-a16:fp16@triton", "nvfp4@triton",
)  # fmt: skip
"""Where Hopper's wgmma is the default, mma.sync stands beside it; products of E4M3 are wgmma's alone."""
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


def of_scheme(weight: Weight, scheme: str) -> Contender:
    """RECIPE[:DTYPE][@KERNEL]."""
    recipe, _, forced = scheme.partition("@")
    recipe, _, dtype = recipe.partition(":")
    return fp4_on_gpu(weight, recipe, dtype or "bf16", forced or None)


def contenders(
    weight: Weight, schemes: list[str], rivals: list[str], failures: list[str]
) -> tuple[list[Contender], set[str]]:
    """(rivals, cuBLAS bf16 first, then ours; the names of ours). Who cannot take part is left out with a sentence,
    which for ours is one of `failures`, too."""
    makers = {name: functools.partial(adapters.on_gpu()[name], weight) for name in rivals}
    makers |= {scheme: functools.partial(of_scheme, weight, scheme) for scheme in schemes}
    made, ours = [], set()
    for name, make in makers.items():
        try:
            contender = make()
        except Exception as error:  # a rival's own errors are of every kind
            sentence = f"{name} is left out: {type(error).__name__}: {error}"
            print(sentence, flush=True)
            failures += [sentence] * (name in schemes)
            continue
        contender.check = SomeTokens(contender.check)
        made.append(contender)
        if name in schemes:
            ours.add(contender.name)
    return made, ours


def can_run(contender: Contender, x: torch.Tensor, ours: bool, failures: list[str]) -> bool:
    """Whether it takes x, is right and can be captured in a graph. Ours must, unless a forced kernel refuses."""
    if not takes(contender, len(x)):
        return False
    kernel, operand = contender.kernel(len(x)), x.to(contender.device, contender.x_dtype)
    try:
        families = (contender.device, "triton") if "[triton" in contender.name else (contender.device,)
        if ours and kernel.split(".")[0] not in families:
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


def measure(n: int, k: int, options, record, bandwidth: float, until: float) -> list[str]:
    """All m of one shape that begin before `until` (time.perf_counter); returns what is wrong with ours."""
    weight, failures = Weight(n, k), []
    entered, ours = contenders(weight, options.schemes, options.rivals, failures)
    for m in options.m:
        if time.perf_counter() > until:
            print(f"n = {n}, k = {k}, m = {m} is left out: the time of this shape is up", flush=True)
            continue
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        ready = [c for c in entered if can_run(c, x, c.name in ours, failures)]
        try:
            timed = compare(ready, x, rounds=options.rounds, budget=options.budget)
        except Exception as error:  # of any of them; the other m go on
            failures.append(f"n = {n}, k = {k}, m = {m} is left out: {type(error).__name__}: {error}")
            print(failures[-1], flush=True)
            continue
        for row, contender in zip(timed, ready):
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
    """As of_scheme's, if its recipe and dtype are known."""
    recipe, separator, kernel = text.partition("@")
    return arguments.scheme(recipe) + separator + (arguments.kernel(kernel) if separator else "")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rivals = list(adapters.on_gpu())
    parser.add_argument("--shapes", type=arguments.shape, nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--m", type=arguments.count, nargs="+", default=TOKENS)
    parser.add_argument(
        "--schemes", type=scheme, nargs="*", default=SCHEMES, metavar="RECIPE[:fp16][@KERNEL or @FAMILY]"
    )
    parser.add_argument("--rivals", nargs="*", default=rivals, choices=rivals, metavar="RIVAL", help=", ".join(rivals))
    parser.add_argument("--rounds", type=arguments.rounds, default=3)
    parser.add_argument("--budget", type=arguments.seconds, default=0.01, help="seconds of one contender in one round")
    parser.add_argument(
        "--limit", type=arguments.seconds, default=300, help="after which nothing new is started; shapes share it"
    )
    parser.add_argument(
        "--out", type=arguments.result_file, default=RESULTS, help="JSON lines, written anew; table and pictures beside"
    )
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("gpu.py times products on a GPU: there is none that torch can use")
    started, failures, bandwidth = time.perf_counter(), [], copy_bandwidth()
    options.out.unlink(missing_ok=True)
    record = recorder(options.out, line, versions=adapters.versions(), gpu=torch.cuda.get_device_name())
    for i, (n, k) in enumerate(options.shapes):
        # Every shape has the same share of what is left, so that none is missing.
        now = time.perf_counter()
        until = now + (options.limit - (now - started)) / (len(options.shapes) - i)
        failures += measure(n, k, options, record, bandwidth, until)
    for path in gpu_report.write(lines_of(options.out), options.out):
        print(f"wrote {path}")
    if failures:
        sys.exit("wrong or missing results of ours: " + "; ".join(failures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
