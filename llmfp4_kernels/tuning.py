"""The command `llmfp4 tune`: measure the CUDA rows' and the Triton kernels' tiles for a model's layers, or for shapes,
and keep the fastest."""

from __future__ import annotations

import dataclasses
import sys

from .commands import linear_layers
from .errors import BadInput, NoKernel

BACKENDS = ("cuda", "triton")
TOKENS = (1, 16, 64, 256, 1024, 4096)
"""Each serves down to a quarter of it; 16 serves all below, 4096 all above."""


def shape(text: str) -> tuple[int, int]:
    """(n, k) of "NxK"; raises BadInput."""
    n, _, k = text.partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise BadInput(f"--shape {text!r} is not of the form NxK, outputs by inputs, as 4096x11008 is")
    return int(n), int(k)


def _problems(args) -> list:
    """Of one token, of the model's layers and of the shapes."""
    import torch

    from . import formats
    from .problem import Problem

    dtype, recipe = getattr(torch, args.dtype), formats.recipe(args.recipe)
    found = [Problem.of_recipe(recipe, 1, *shape(text), dtype=dtype, device="cuda") for text in args.shape or []]
    weights = [layer.packed() for layer in linear_layers(args.model)] if args.model else []
    return found + [dataclasses.replace(Problem.of(packed, 1, dtype), device="cuda") for packed in weights]


class _Cuda:
    """What the command asks of the CUDA rows."""

    def __init__(self, problem, device):
        from .backends import cuda, cuda_choices, cuda_tune
        from .backends.graphs import Stopwatch

        self.choices, self.machine, self.device = cuda_choices, cuda.machine, device
        self.tune, self.dtype, self.watch = cuda_tune.tune, problem.dtype, Stopwatch(device)
        self.subject = cuda_tune.Subject(problem, self.watch, device)

    @staticmethod
    def form(problem):
        from .backends.cuda_choices import Form

        return Form.of(problem)

    def fastest(self, m: int, seconds: float):
        """(rows, left out, the file that holds them)."""
        from .backends.measured import cache_folder

        outcome = self.tune(self.subject, m, self.dtype, self.watch, seconds)
        path = self.choices.put(outcome.rows, self.machine, self.device, cache_folder())
        return outcome.rows, outcome.left_out, path


class _Triton:
    """What the command asks of the Triton kernels."""

    def __init__(self, problem, device):
        self.problem, self.device = problem, device

    @staticmethod
    def form(problem):
        from .backends.triton.form import Form

        return Form.of("gemm", problem)

    def fastest(self, m: int, seconds: float):
        """(rows, left out, the file that holds them)."""
        from .backends.graphs import Stopwatch
        from .backends.triton import tuned
        from .backends.triton.tune import tune

        problem = dataclasses.replace(self.problem, m=m)
        row, left_out = tune(problem, Stopwatch(self.device), self.device, seconds)
        return [row], left_out, tuned.put(row, self.device)


def _willing(names: list[str]) -> dict:
    """{backend: (its class, its device)} of those that run here. Raises NoKernel if none of `names` does."""
    import torch

    from .backends import cuda, triton
    from .formats import E2M1
    from .problem import Problem

    problem = Problem(1, 64, 64, E2M1, device="cuda")
    found = {
        "cuda": (_Cuda, cuda.refusal("sm80", problem), cuda.machine),
        "triton": (_Triton, triton.refusal("gemm", problem), triton.machine.here),
    }
    why = "; ".join(f"{name}: {found[name][1]}" for name in names)
    if all(found[name][1] for name in names):
        raise NoKernel(f"tiles are measured on the GPU that runs them: {why}")
    return {n: (found[n][0], torch.device(found[n][2].device_type)) for n in names if found[n][1] is None}


def tune(args) -> dict:
    """Raises NoKernel without a backend or a GPU, before anything is loaded."""
    from .backends import cuda, triton

    if not (args.model or args.shape):
        raise BadInput("tune needs the folder of a quantized model, or --shape NxK")
    backends, rows, left_out, files = _willing(args.backend or list(BACKENDS)), [], [], {}
    problems = _problems(args)
    takes = {"cuda": lambda p: cuda.refusal("sm80", p) is None or cuda.refusal("sm90", p) is None,
             "triton": lambda p: triton.refusal("gemm", p) is None}  # fmt: skip
    for name, (backend, device) in backends.items():
        forms = {backend.form(problem): problem for problem in problems if takes[name](problem)}
        for i, problem in enumerate(forms.values(), 1):
            subject = backend(problem, device)
            for m in args.m or TOKENS:
                what = f"{i} of {len(forms)}, m = {m}, n = {problem.n}, k = {problem.k}"
                print(f"{name}: {what}", file=sys.stderr, flush=True)
                new, others, files[name] = subject.fastest(m, args.seconds)  # kept at once, should it be interrupted
                rows += [{"backend": name, **dataclasses.asdict(row)} for row in new]
                left_out += [{"m": m, "config": dataclasses.asdict(c), "why": why} for c, why in others]
    if not rows:
        raise NoKernel(f"no kernel of {' or '.join(backends)} takes one of these {len(problems)} products")
    return {"files": {name: str(path) for name, path in files.items()}, "rows": rows, "left_out": left_out}


def _tile(config: dict) -> str:
    if "kernel" in config:
        return "{kernel} {size}, {splits} splits".format(**config)
    return "{rows}x{tokens}x{block_k}, {warps} warps, {stages} stages, {splits} splits".format(**config)


def show_tune(result: dict) -> str:
    lines = []
    for row in result["rows"]:
        form, before = row["form"], row.get("counted_seconds") or row["guess_seconds"]
        groups = f", {form['scale']} scales of {form['group_size']}" if form["group_size"] else ""
        otherwise = "what is counted" if "counted_seconds" in row else "the guess"
        name = row["config"].get("kernel") or f"triton.{form['kernel']}"
        lines.append(
            f"{name} {form['operand']}{groups} m = {row['m']}, n = {form['n']}, k = {form['k']}: "
            f"{row['seconds'] * 1e6:.1f} us, {before / row['seconds']:.2f} times as fast as {otherwise} "
            f"({_tile(row['config'])}; {row['timed']} of {row['candidates']} timed)"
        )
    for row in result["left_out"]:
        lines.append(f"left out at m = {row['m']}: {_tile(row['config'])}: {row['why']}")
    return "\n".join([*lines, *(f"wrote {path}" for path in result["files"].values())])
