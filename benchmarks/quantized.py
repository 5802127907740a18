"""Quantized models in a folder each, made once for the same code, recipe, weights and calibration."""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import machine
import torch

import llmfp4_kernels
from llmfp4_kernels.formats import RECIPES
from llmfp4_kernels.nn import FP4Module

NO_PART = ("backends/*.py", "registry.py", "problem.py", "native.py", "ops.py", "evaluate*.py", "environment.py",
           "commands.py", "cli.py", "__main__.py")  # fmt: skip
"""Files that no code or scale depends on: kernels, measurements and the command line."""


@cache
def _code() -> bytes:
    """What the package's quantizer does: its source without comments and layout, whose edits cost no search again.

    Read once: a process goes on with the code that it started with, whatever is edited meanwhile.
    """
    package = Path(llmfp4_kernels.__path__[0])
    files = sorted(set(package.rglob("*.py")) - {file for glob in NO_PART for file in package.glob(glob)})
    return "".join(ast.dump(ast.parse(file.read_text())) for file in files).encode()


def tensors_of(batch) -> list[torch.Tensor]:
    return [v for v in batch.values() if torch.is_tensor(v)] if isinstance(batch, Mapping) else [batch]


def tokens_of(batch) -> int:
    """Tokens of token ids, or of a mapping with them; padding does not count."""
    if isinstance(batch, Mapping):
        return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
    return batch.numel()


def fingerprint(dense, recipe: str, calibration: list) -> str:
    """Of all that a quantized model depends on: the package's code, the recipe, the weights and the tokens."""
    digest = hashlib.blake2b(_code() + f"{recipe} {RECIPES.get(recipe)}".encode(), digest_size=16)
    for tensor in [*dense.parameters(), *(t for batch in calibration for t in tensors_of(batch))]:
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _record(build: Path, recipe: str) -> dict:
    file = build / f"{recipe}.json"
    return json.loads(file.read_text()) if file.is_file() and (build / recipe).is_dir() else {}


def quantized(dense, tokenizer, recipe: str, calibration: list, build: Path, *, dtype=torch.bfloat16, elsewhere=()):
    """(model, record): the model as loaded from build/<recipe>, made there unless one with this fingerprint exists.

    What stays dense (embedding and norms) is saved in `dtype`. A folder in `elsewhere` may hold the model, too.
    """
    from llmfp4_kernels.integrations.transformers import load_quantized, save_quantized
    from llmfp4_kernels.quantizer.pipeline import quantize_model

    key = fingerprint(dense, recipe, calibration)
    for where in (build, *elsewhere):
        record = _record(where, recipe)
        if record.get("fingerprint") == key:
            print(f"{recipe}: reusing {where / recipe}, quantized {record['date']}", flush=True)
            return load_quantized(where / recipe), record | {"reused": True}
    print(f"{recipe}: quantizing on {sum(map(tokens_of, calibration))} tokens", flush=True)
    folder, record_file = build / recipe, build / f"{recipe}.json"
    record_file.unlink(missing_ok=True)
    started, model = time.perf_counter(), copy.deepcopy(dense)
    work = build / f"{recipe}-{key[:12]}.partial"  # resumes an interrupted run of the same code only
    report = quantize_model(model, recipe, calibration, work_dir=work)
    save_quantized(model.to(dtype), folder, tokenizer=tokenizer, report=report)
    for finished in build.glob(f"{recipe}-????????????.partial"):
        shutil.rmtree(finished)
    errors = sorted(row["relative_error"] for row in report.layers)
    record = {
        "fingerprint": key,
        "date": machine.machine()["date"],
        "seconds": time.perf_counter() - started,
        "search_seconds": sum(row["seconds"] for row in report.layers),  # of all layers, also those an earlier run did
        "layers": len(report.layers),
        "coverage": report.coverage,
        "median_relative_error": errors[len(errors) // 2],
    }
    record_file.write_text(json.dumps(record))
    return load_quantized(folder), record | {"reused": False}


def packed_layers(model) -> dict[str, FP4Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FP4Module)}


def bits_per_weight(model) -> float:
    """Bits of all packed layers, scales and shifts included, for each of their weights."""
    packed = [layer.packed() for layer in packed_layers(model).values()]
    return 8 * sum(p.nbytes for p in packed) / sum(p.shape[0] * p.shape[1] for p in packed)
