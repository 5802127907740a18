"""The command line: quantize, eval, generate, inspect, info, explain, tune. A command makes a dict of its options.

With --json the dict goes to stdout as it is; otherwise a second function prints it. An error the package raises on
purpose is one line on stderr, {"error": ...} on stdout with --json, and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from . import commands, formats, tuning
from .errors import BadInput, LLMFP4Error

DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """Reports wrong options as BadInput, so that they leave by the same door as every other error."""

    def error(self, message):
        raise BadInput(f"{message} (see '{self.prog} --help')")


def count(text: str, least: int = 1) -> int:
    """An argparse type: a whole number, at least `least`."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
    return int(text)


def info(args) -> dict:
    from .environment import environment

    return environment()


def show_info(result: dict) -> str:
    native, cuda = result["native"], result["cuda"]
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in result["versions"].items())
    lines = [
        f"machine    {result['cpu']}, {result['cores']} cores, {result['memory_gb']} GB, {result['system']}",
        f"ISA        {' '.join(result['flags']) or 'none of those the kernels use'}",
        f"GPU        {', '.join(result['gpus']) or 'none'}; torch's CUDA: {cuda['torch_cuda'] or 'none'}; "
        f"nvcc: {cuda['nvcc'] or 'not found'}",
        f"versions   python {result['python']}, {versions}",
    ]
    if native["built"]:
        built = f"compiler {native['compiler']}, CUDA {' '.join(native['cuda_architectures']) or 'not built'}"
        lines.append(f"native     {native['file']} ({built}); {native['threads']} threads ({native['thread_team']})")
    else:
        lines.append(f"native     not built: {native['reason']}")
    lines += [f"tiles      {backend}: {sentence}" for backend, sentence in result["tiles"].items()]
    for row in result["kernels"]:
        lines.append(
            f"kernel     {row['name']:16} " + (row["refusal"] or f"takes {row['takes']} of {row['of']} probes")
        )
    return "\n".join(lines)


def _element(option: str | None, choices, of: str):
    """The element of a recipe that --element or --activation names, or None."""
    names = [element.name for element in choices]
    if option and option not in names:
        raise BadInput(f"{option!r} is no {of} of this recipe: it has {', '.join(names) or 'none'}")
    return formats.element(option) if option else None


def explain(args) -> dict:
    import torch

    from .backends import cuda, triton
    from .problem import Problem
    from .registry import allowed, best, epilogue_of, forced, walk

    recipe = formats.recipe(args.recipe)
    element = _element(args.element, recipe.weight_elements, "weight element")
    activation = _element(args.activation, recipe.activation_elements, "activation element")
    problem = Problem.of_recipe(
        recipe, args.m, args.n, args.k, element, activation, getattr(torch, args.dtype), args.device
    )
    walked = walk(problem)
    steps = [{"kernel": kernel.name, "refusal": refusal} for kernel, refusal in walked]
    name = forced()
    kernel = best(problem, [kernel for kernel, refusal in walked if refusal is None and allowed(kernel.name)])
    runs = kernel and kernel.name
    backend = {"cuda": cuda, "triton": triton}.get(runs.split(".")[0]) if runs else None
    tile = backend.tile(runs, problem) if backend else None
    operand = {"operand": backend.operand(runs, problem)} if tile else {}
    return {
        "m": args.m, "n": args.n, "k": args.k, "recipe": recipe.name, "element": problem.element.name,
        "activation": problem.activation.name if problem.activation else None, "shift": problem.shift,
        "dtype": args.dtype, "device": args.device, "walk": steps,
        "forced": name, "runs": runs, "tile": tile and dataclasses.asdict(tile) | operand,
        "epilogue": epilogue_of(runs) if runs else None,
    }  # fmt: skip


def show_explain(result: dict) -> str:
    activation = result["activation"] or result["dtype"]
    lines = [
        f"m = {result['m']}, n = {result['n']}, k = {result['k']}, {result['recipe']}: {result['element']} weights, "
        f"{activation} activations{' with shift' if result['shift'] else ''}, on {result['device']}"
    ]
    for step in result["walk"]:
        verdict = step["refusal"] or ("runs" if step["kernel"] == result["runs"] else "would run too")
        lines.append(f"  {step['kernel']:16} {verdict}")
    if result["tile"]:
        sizes = ", ".join(f"{name} {value}" for name, value in result["tile"]["config"].items())
        lines.append(f"tile {result['tile']['source']} ({sizes}), {result['tile']['operand']} operands")
    if result["runs"]:
        lines.append(f"a residual and SwiGLU are {result['epilogue']} with {result['runs']}")
    if result["forced"]:
        lines.append(f"LLMFP4_KERNEL forces {result['forced']}")
    if not result["runs"]:
        lines.append(f"{result['forced'] or 'no kernel'} {'refuses' if result['forced'] else 'takes'} this problem")
    return "\n".join(lines)


def _add_model_commands(command) -> None:
    """Options of the commands that take a model."""
    c = command("quantize", commands.quantize, commands.show_quantize, "quantize a transformers folder or a .gguf file")
    c.add_argument("model", type=Path, help="transformers folder or .gguf file")
    c.add_argument("--out", type=Path, required=True, help="folder to write; an interrupted run resumes (OUT.partial)")
    c.add_argument("--recipe", default="llm-fp4", help=f"one of {', '.join(formats.RECIPES)}")
    c.add_argument("--calibration", type=Path, metavar="TEXT", help="UTF-8 text file")
    c.add_argument("--tokens", type=count, default=16384, help="calibration tokens (default 16384)")
    c.add_argument(
        "--include", action="append", metavar="GLOB", help="layers to quantize (default: all); a glob must match"
    )
    c.add_argument("--exclude", action="append", metavar="GLOB", help="layers to leave out; a glob must match")
    c.add_argument("--override", action="append", metavar="GLOB=RECIPE", help="another recipe for some layers")
    c.add_argument("--lm-head", action="store_true", help="quantize lm_head too")
    c.add_argument("--embeddings", action="store_true", help="quantize the input embedding too")
    c.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of what stays dense (default bfloat16)")
    c = command("eval", commands.evaluate, commands.show_evaluate, "perplexity of a quantized model")
    c.add_argument("model", type=Path, help="folder that quantize wrote")
    c.add_argument("--text", type=Path, required=True, help="UTF-8 text file")
    c.add_argument("--against", type=Path, metavar="MODEL", help="full-precision model to evaluate beside it")
    c.add_argument("--tokens", type=count, help="first tokens of the text only")
    c = command("generate", commands.generate, commands.show_generate, "continue a prompt, greedily")
    c.add_argument("model", type=Path, help="folder that quantize wrote")
    c.add_argument("--prompt", required=True)
    c.add_argument("--tokens", type=count, default=64, help="new tokens at most (default 64)")
    c.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    c = command("inspect", commands.inspect, commands.show_inspect, "formats and sizes of a quantized model or tensor")
    c.add_argument("model", type=Path, help="folder that quantize wrote, or the file of one PackedFP4")


def parser() -> Parser:
    top = Parser(prog="llmfp4", description="Real FP4 matmul for LLMs.")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, show, summary):
        sub = subparsers.add_parser(name, help=summary, description=summary)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.set_defaults(run=run, show=show)
        return sub

    _add_model_commands(command)
    command("info", info, show_info, "machine, versions, native module, kernels available and why not")
    c = command("explain", explain, show_explain, "what each kernel answers to one problem")
    for name, what in (("m", "rows of activations"), ("n", "outputs"), ("k", "inputs")):
        c.add_argument(f"--{name}", type=count, required=True, help=what)
    c.add_argument("--recipe", default="llm-fp4", help=f"one of {', '.join(formats.RECIPES)}")
    c.add_argument("--element", help="weight element, where the recipe searches it (default e2m1)")
    c.add_argument("--activation", help="activation element, where the recipe searches it (default e2m1)")
    c.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of x and y")
    c.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    c = command("tune", tuning.tune, tuning.show_tune, "measure tiles of the GPU kernels on the GPU that is here")
    c.add_argument("model", type=Path, nargs="?", help="folder that quantize wrote: for all its linear layers")
    c.add_argument("--shape", action="append", metavar="NxK", help="outputs by inputs, instead of a model or beside it")
    c.add_argument("--recipe", default="llm-fp4", help="of --shape")
    c.add_argument("--m", type=count, nargs="+", help=f"tokens (default {' '.join(map(str, tuning.TOKENS))})")
    c.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of x and y (default bfloat16)")
    c.add_argument("--backend", choices=tuning.BACKENDS, nargs="+", help="default: those that run here")
    c.add_argument("--seconds", type=count, default=20, help="for each layer and m, at most (default 20)")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parser().parse_args(argv)
        result = args.run(args)
    except (LLMFP4Error, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if "--json" in argv:
            print(json.dumps({"error": str(error)}))
        return 2
    except KeyboardInterrupt:
        print("interrupted; quantize resumes where it stopped when it is called again", file=sys.stderr)
        return 130
    text = json.dumps(result, indent=1) if args.json else args.show(result)
    print(text.encode(errors="backslashreplace").decode())  # what a foreign file says may be no text
    return 0
