"""The command `llmfp4 tune`: measure tiles of the Triton kernels for a model's layers, or for shapes, and keep them."""

from __future__ import annotations

import dataclasses
import sys

from .commands import linear_layers
from .errors import BadInput, NoKernel

TOKENS = (1, 16, 64, 256, 1024, 4096)
"""Each serves down to a quarter of it; 16 serves all below."""


def shape(text: str) -> tuple[int, int]:
    """(n, k) of "NxK"; raises BadInput."""
    n, _, k = text.partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise BadInput(f"--shape {text!r} is not of the form NxK, outputs by inputs, as 4096x11008 is")
    return int(n), int(k)


def _problems(args) -> list:
    """Of every form of the model's layers and of the shapes, m after m."""
    import torch

    from . import formats
    from .backends.triton.form import Form
    from .problem import Problem

    dtype, recipe = getattr(torch, args.dtype), formats.recipe(args.recipe)
    found = [Problem.of_recipe(recipe, 1, *shape(text), dtype=dtype, device="cuda") for text in args.shape or []]
    weights = [layer.packed() for layer in linear_layers(args.model)] if args.model else []
    found += [dataclasses.replace(Problem.of(packed, 1, dtype), device="cuda") for packed in weights]
    forms = {Form.of("gemm", problem): problem for problem in found}
    return [dataclasses.replace(problem, m=m) for problem in forms.values() for m in args.m or TOKENS]


def tune(args) -> dict:
    """Raises NoKernel without Triton or a GPU, before anything is loaded."""
    import torch

    from .backends import triton
    from .formats import E2M1
    from .problem import Problem

    if not (args.model or args.shape):
        raise BadInput("tune needs the folder of a quantized model, or --shape NxK")
    why = triton.refusal("gemm", Problem(1, 64, 64, E2M1, device="cuda"))
    if why:
        raise NoKernel(f"tiles are measured on the GPU that runs them: {why}")
    problems = _problems(args)

    from .backends.graphs import Stopwatch
    from .backends.triton import machine, tuned
    from .backends.triton.tune import tune as fastest

    device = torch.device(machine.here.device_type)
    here = tuned.Conditions.here(device)
    rows, left_out = [], []
    for i, problem in enumerate(problems, 1):
        what = f"m = {problem.m}, n = {problem.n}, k = {problem.k}"
        print(f"{i} of {len(problems)}, {what} on {here.gpu}", file=sys.stderr, flush=True)
        row, others = fastest(problem, Stopwatch(device), device, args.seconds)
        tuned.put(row, device)  # at once: what an interrupted run has measured is kept
        rows.append(dataclasses.asdict(row))
        left_out += [
            {"form": rows[-1]["form"], "m": row.m, "config": dataclasses.asdict(c), "why": w} for c, w in others
        ]
    return {"file": str(here.path), "conditions": dataclasses.asdict(here), "rows": rows, "left_out": left_out}


def _tile(config: dict) -> str:
    return "{rows}x{tokens}x{block_k}, {warps} warps, {stages} stages, {splits} splits".format(**config)


def show_tune(result: dict) -> str:
    lines = []
    for row in result["rows"]:
        form, gain = row["form"], row["guess_seconds"] / row["seconds"]
        groups = f", {form['scale']} scales of {form['group_size']}" if form["group_size"] else ""
        lines.append(
            f"triton.{form['kernel']} {form['operand']}{groups} m = {row['m']}, n = {form['n']}, k = {form['k']}: "
            f"{row['seconds'] * 1e6:.1f} us, {gain:.2f} times as fast as the guess ({_tile(row['config'])}; "
            f"{row['timed']} of {row['candidates']} timed)"
        )
    for row in result["left_out"]:
        lines.append(f"left out at m = {row['m']}: {_tile(row['config'])}: {row['why']}")
    return "\n".join([*lines, f"wrote {result['file']}"])
