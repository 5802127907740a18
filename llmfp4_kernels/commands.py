"""The commands on models, quantize, eval, generate and inspect: from options to a dict, and from that to text.

Bad input is refused before a model is loaded where that is possible, and always before anything is written.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from . import formats
from .errors import BadFile, BadInput

WINDOW = 512
"""Tokens of a calibration or evaluation window."""


def _integration():
    """integrations.transformers, without the progress bar of loading (a few seconds)."""
    try:
        from transformers.utils import logging

        from .integrations import transformers
    except ImportError as error:
        raise BadInput(f"this command needs transformers ({error}): pip install 'llmfp4_kernels[hf]'") from error
    logging.disable_progress_bar()
    return transformers


def _nonblank_text(path: Path) -> None:
    """Raise BadFile or BadInput for a text that cannot hold a token, before a model is loaded for it."""
    from .evaluate import read_text

    if not read_text(path, 1 << 16).strip():
        raise BadInput(f"{path} ({path.stat().st_size} bytes) holds 0 tokens of text")


def _output_folder(path: Path) -> None:
    """Raise BadInput if `path` holds anything but an earlier output of ours."""
    if path.exists() and not path.is_dir():
        raise BadInput(f"--out {path} is a file of {path.stat().st_size} bytes, expected a folder")
    entries = list(path.iterdir()) if path.is_dir() else []
    if entries and not is_quantized(path):
        raise BadInput(f"--out {path} holds {len(entries)} entries and is no llmfp4 model: name a new or empty folder")


def is_quantized(path: Path) -> bool:
    """Whether the folder's config.json says that it is a model that `quantize` wrote."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return config.get("quantization_config", {}).get("quant_method") == "llmfp4"
    except (OSError, ValueError, AttributeError):
        return False


def _overrides(pairs: list[str]) -> dict[str, str]:
    """{glob: recipe} of "GLOB=RECIPE" options; raises BadInput for another form or an unknown recipe."""
    split = [pair.partition("=") for pair in pairs]
    for glob, sign, name in split:
        if not (glob and sign):
            raise BadInput(f"--override {glob + sign + name!r} is not of the form GLOB=RECIPE")
        formats.recipe(name)
    return {glob: name for glob, _, name in split}


def quantize(args) -> dict:
    import torch

    from .evaluate import load_ids, windows
    from .quantizer.pipeline import quantize_model
    from .quantizer.plan import DEFAULT_EXCLUDE

    recipe, overrides = formats.recipe(args.recipe), _overrides(args.override or [])
    _output_folder(args.out)
    if recipe.needs_calibration and not args.calibration:
        raise BadInput(f"recipe {recipe.name!r} needs --calibration TEXT")
    if args.calibration:
        _nonblank_text(args.calibration)
    transformers = _integration()
    model, tokenizer = _dense(args.model)
    calibration = None
    if args.calibration:
        calibration = windows(load_ids(tokenizer, args.calibration, args.tokens), WINDOW, batch=4)
    include = list(args.include or ["*"])
    exclude = list(args.exclude or []) + ([] if args.lm_head else list(DEFAULT_EXCLUDE))
    if args.embeddings:
        include += [name for name, module in model.named_modules() if module is model.get_input_embeddings()]
    work = args.out.with_name(f"{args.out.name}.partial")  # beside, so that --out appears whole or not at all
    report = quantize_model(
        model, recipe.name, calibration, include=include, exclude=exclude, overrides=overrides, work_dir=work
    )
    transformers.save_quantized(model.to(getattr(torch, args.dtype)), args.out, tokenizer=tokenizer, report=report)
    shutil.rmtree(work, ignore_errors=True)
    tokens = sum(batch.numel() for batch in calibration or [])
    result = {"out": str(args.out), "calibration_tokens": tokens, "bytes": weight_bytes(args.out)}
    return result | json.loads(report.to_json())


def weight_bytes(path: Path) -> int:
    """Size of the safetensors files of a folder, or of one file."""
    return sum(file.stat().st_size for file in (path.glob("*.safetensors") if path.is_dir() else [path]))


def show_quantize(result: dict) -> str:
    errors = sorted(row["relative_error"] for row in result["layers"])
    return "\n".join(
        [
            f"{len(result['layers'])} layers in FP4, {result['coverage']:.1%} of all parameters; "
            f"relative output error {errors[len(errors) // 2]:.4f} (median), {errors[-1]:.4f} (worst)",
            *(f"left out: {row['name']} ({row['reason']})" for row in result["skipped"]),
            f"{result['out']}: {result['bytes'] / 1e6:.1f} MB of weights",
        ]
    )


def _dense(path: Path):
    """(model, tokenizer) in full precision."""
    if is_quantized(path):
        raise BadInput(f"{path} is quantized already: name the model in full precision that it was made from")
    return _integration().load_dense(path)


def _quantized(path: Path):
    """(model, tokenizer) of a folder that `quantize` wrote."""
    transformers = _integration()
    if is_quantized(path):
        transformers.require_tokenizer(path)  # before the model is read
    return transformers.load_quantized(path), transformers.load_tokenizer(path)


def linear_layers(path: Path) -> list:
    """The FP4Linears of a folder that `quantize` wrote."""
    from .nn import FP4Linear

    return [m for m in _integration().load_quantized(path).modules() if isinstance(m, FP4Linear)]


def evaluate(args) -> dict:
    from .evaluate import load_ids, perplexity

    _nonblank_text(args.text)
    model, tokenizer = _quantized(args.model)
    ids = load_ids(tokenizer, args.text, args.tokens)
    result = {"model": str(args.model), "text": str(args.text), "tokens": len(ids), "window": WINDOW}
    result["ppl"] = perplexity(model, ids, WINDOW)
    if args.against:
        dense, _ = _dense(args.against)
        result["against"] = {"model": str(args.against), "ppl": perplexity(dense, ids, WINDOW)}
    return result


def show_evaluate(result: dict) -> str:
    rows = [(result["model"], result["ppl"])]
    if "against" in result:
        rows.append((result["against"]["model"], result["against"]["ppl"]))
    lines = [f"perplexity on {result['tokens']} tokens of {result['text']}, windows of {result['window']}"]
    return "\n".join(lines + [f"{ppl:10.3f}  {name}" for name, ppl in rows])


def generate(args) -> dict:
    import torch

    if not args.prompt.strip():
        raise BadInput(f"--prompt of {len(args.prompt)} characters holds no text")
    model, tokenizer = _quantized(args.model)
    if args.chat and not tokenizer.chat_template:
        raise BadInput(f"--chat: the tokenizer in {args.model} has no chat template")
    if args.chat:
        turn = [{"role": "user", "content": args.prompt}]
        inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(args.prompt, return_tensors="pt")
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False)[0]
    new = out[inputs["input_ids"].shape[1] :]
    seconds = time.perf_counter() - started
    text = tokenizer.decode(new, skip_special_tokens=True)
    return {"prompt": args.prompt, "text": text, "tokens": len(new), "tokens_per_s": len(new) / seconds}


def show_generate(result: dict) -> str:
    rate = f"[{result['tokens']} tokens, {result['tokens_per_s']:.1f} tokens/s with the prompt]"
    return f"{result['prompt']}{result['text']}\n{rate}"


def _describe(name: str, packed) -> dict:
    spec, (n, k) = packed.spec(), packed.shape
    return {"name": name, "n": n, "k": k, **{key: spec[key] for key in ("recipe", "element", "activation", "scale")},
            "group_size": packed.group_size, "shift": packed.shift is not None, "bytes": packed.nbytes,
            "bits_per_weight": packed.bits_per_weight}  # fmt: skip


def inspect(args) -> dict:
    from .packed import PackedFP4

    if not args.model.exists():
        raise BadFile(f"there is no file or folder {args.model}")
    if args.model.is_file():
        layers, dense = [_describe(args.model.stem, PackedFP4.load(args.model))], 0
    else:
        from .nn import FP4Module

        model = _integration().load_quantized(args.model)
        modules = {name: m for name, m in model.named_modules() if isinstance(m, FP4Module)}
        codes = {id(m.codes): name for name, m in reversed(modules.items())}  # an embedding may share a head's codes
        layers = [_describe(name, modules[name].packed()) for name in reversed(codes.values())]
        dense = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    packed = sum(row["n"] * row["k"] for row in layers)
    return {
        "path": str(args.model),
        "layers": layers,
        "parameters": {"fp4": packed, "dense": dense},
        "coverage": packed / (packed + dense),
        "bits_per_weight": 8 * sum(row["bytes"] for row in layers) / packed,
        "bytes": {"fp4": sum(row["bytes"] for row in layers), "file": weight_bytes(args.model)},
    }


def show_inspect(result: dict) -> str:
    width = max(len(row["name"]) for row in result["layers"])
    lines = [
        f"{'layer':{width}}  {'n':>6} {'k':>6}  recipe       weight activation  group scale  bits/weight      bytes"
    ]
    for row in result["layers"]:
        group = f"{row['scale']}/{row['group_size']}" if row["scale"] else "none"
        activation = (row["activation"] or "16-bit") + ("+shift" if row["shift"] else "")
        lines.append(
            f"{row['name']:{width}}  {row['n']:6} {row['k']:6}  {row['recipe']:12} {row['element']:6} {activation:11} "
            f"{group:11} {row['bits_per_weight']:12.3f} {row['bytes']:10}"
        )
    parameters, size = result["parameters"], result["bytes"]
    lines.append(
        f"{parameters['fp4']:,} weights in FP4 at {result['bits_per_weight']:.3f} bits, {parameters['dense']:,} dense: "
        f"coverage {result['coverage']:.1%}; {size['fp4'] / 1e6:.2f} MB of {size['file'] / 1e6:.2f} MB on disk"
    )
    return "\n".join(lines)
