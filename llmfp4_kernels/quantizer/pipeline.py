"""Quantize a module tree layer by layer: choose the layers, calibrate, search, write, replace."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from .. import reference
from ..embedding import FP4Embedding
from ..errors import BadInput
from ..formats import Recipe
from ..formats import recipe as recipe_named
from ..nn import FP4Linear, FP4Module
from ..packed import PackedFP4
from .calibrate import LayerInputs, check_batches, collect
from .gradients import collect_with_gradients
from .linear import quantize_linear, relative_error
from .plan import DEFAULT_EXCLUDE, Plan, make_plan, weight_of
from .replace import replace_module
from .threads import in_threads
from .work_dir import WorkDir

SMALL_LAYER = 1 << 22
"""Weights. Searches of smaller layers are many short operations: on 2 cores two of 576 x 576 to 576 x 1536 at once
took 0.65 to 0.8 of the time of one after the other with two threads each."""


@dataclass
class Report:
    """What was quantized, what was left out and why."""

    layers: list[dict] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)
    coverage: float = 0.0
    """Share of the model's parameters that are now 4-bit codes."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


def _is_calibrated(model: nn.Module, name: str, recipe: Recipe) -> bool:
    """Whether a layer needs activations: a table's output error is that of its rows."""
    return recipe.needs_calibration and not isinstance(model.get_submodule(name), nn.Embedding)


def _check(model: nn.Module, plan: Plan, calibration) -> None:
    if not plan.recipes:
        raise BadInput(f"no layer of {type(model).__name__} is to be quantized: {len(plan.skipped)} were left out")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            reference.require_finite(name, parameter)
    searching = [r.name for name, r in plan.recipes.items() if _is_calibrated(model, name, r)]
    if searching and not calibration:
        raise BadInput(f"recipe {searching[0]!r} needs calibration for {len(searching)} layers, got none")
    if calibration:
        check_batches(calibration)


def _settings(model: nn.Module, calibration, sample_tokens: int) -> str:
    """All that decides a layer's inputs: the calibration, and every parameter and buffer of the model."""
    digest = hashlib.blake2b(digest_size=16)
    if calibration:
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    for batch in calibration or ():
        for tensor in batch.values() if isinstance(batch, Mapping) else [batch]:
            digest.update(repr(tensor.shape if torch.is_tensor(tensor) else tensor).encode())
            if torch.is_tensor(tensor):
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return f"format 1, sample_tokens {sample_tokens}, calibration {digest.hexdigest()}"


def _quantize_one(name: str, layer: nn.Module, recipe: Recipe, inputs: LayerInputs | None) -> tuple[PackedFP4, dict]:
    started = time.perf_counter()
    weight = weight_of(layer).float()
    if isinstance(layer, nn.Embedding):
        # The output of a table is its rows: with one-hot inputs, 16-bit ones, the output error is the table's own.
        recipe = dataclasses.replace(recipe, activation_elements=(), preshift=False)
        inputs = LayerInputs(x=torch.eye(weight.shape[1], device=weight.device)) if recipe.search else None
    packed = quantize_linear(weight, recipe, inputs)
    x = inputs.x if inputs is not None else None
    row = {
        "name": name, "recipe": recipe.name, "n": packed.shape[0], "k": packed.shape[1], "element": packed.element.name,
        "activation": packed.activation.name if packed.activation else None,
        "relative_error": relative_error(weight, packed, x), "error_of": "weight" if x is None else "output",
        "bits_per_weight": packed.bits_per_weight, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    return packed, row


def _replace(model: nn.Module, name: str, packed: PackedFP4) -> None:
    layer = model.get_submodule(name)
    if isinstance(layer, nn.Embedding):
        quantized = FP4Embedding.from_packed(packed, layer.weight.dtype, layer.padding_idx)
    else:
        quantized = FP4Linear.from_packed(packed, layer.bias)
    replace_module(model, name, quantized)


def coverage(model: nn.Module) -> float:
    """Share of the model's parameters that are 4-bit codes; shared ones count once."""
    packed = {id(m.codes): m.in_features * m.out_features for m in model.modules() if isinstance(m, FP4Module)}
    dense = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    return sum(packed.values()) / max(sum(packed.values()) + dense, 1)


def quantize_model(
    model: nn.Module,
    recipe: str | Recipe = "llm-fp4",
    calibration=None,
    *,
    include=("*",),
    exclude=DEFAULT_EXCLUDE,
    overrides: dict[str, str] | None = None,
    sample_tokens: int = 2048,
    loss: Callable | None = None,
    work_dir: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """Replace the linear layers of `model` by FP4Linear, in place. Each sees full-precision inputs (LLM-FP4 app. F).

    calibration  a batch, or several, for the model's forward: token ids [b, t], or dicts of keyword arguments
    include, exclude, overrides  globs on module names or their last part; overrides maps a glob to a recipe's name.
                 Each must match a layer or an embedding, but the defaults "*" and "lm_head", which not every model has.
                 Embeddings are quantized where include names them (not by "*"); one that shares its weight with a
                 quantized head shares its codes
    loss         loss(model, batch) → a scalar tensor: searches then weigh squared errors of the output by the
                 squares of this loss's gradient (LLM-FP4 app. A)
    work_dir     each finished layer is written there, and a run that finds it with the same settings goes on from it

    Nothing is replaced before every layer is done. Raises BadInput before any work for NaN/Inf weights, an unknown
    recipe, missing or empty calibration, a glob that matches nothing, or if no layer is left to quantize.
    """
    recipe = recipe_named(recipe)
    if calibration is not None:
        calibration = [calibration] if isinstance(calibration, torch.Tensor | Mapping) else list(calibration)
    plan = make_plan(model, recipe, include, exclude, overrides or {})
    _check(model, plan, calibration)
    if loss is not None and work_dir is not None:
        raise BadInput("work_dir cannot tell one loss from another: give one of both")
    work = WorkDir(work_dir, _settings(model, calibration, sample_tokens) if work_dir else "")
    source = Source(model, plan, calibration, sample_tokens, loss)
    done, report = _run(model, plan, source, work, progress)
    for name, packed in done.items():
        _replace(model, name, packed)
    for name, owner in plan.shared.items():
        if owner in done:
            _share(model, name, owner)
    if hasattr(model, "save_pretrained"):
        from ..integrations.transformers import refuse_save_pretrained

        refuse_save_pretrained(model)
    report.coverage = coverage(model)
    return report


def _share(model: nn.Module, name: str, owner: str) -> None:
    table = model.get_submodule(name)
    shared = FP4Embedding.sharing(model.get_submodule(owner), table.weight.dtype, table.padding_idx)
    replace_module(model, name, shared)


@dataclass(frozen=True)
class Source:
    """Where the layers' inputs come from."""

    model: nn.Module
    plan: Plan
    calibration: list
    sample_tokens: int
    loss: Callable | None

    def inputs(self, names: list[str]):
        """(name, LayerInputs or None): None for layers that need no calibration."""
        recipes = self.plan.recipes
        calibrated = [name for name in names if _is_calibrated(self.model, name, recipes[name])]
        yield from ((name, None) for name in names if name not in calibrated)
        weighed = [name for name in calibrated if self.loss is not None and recipes[name].search]
        plain = [name for name in calibrated if name not in weighed]
        if weighed:
            yield from collect_with_gradients(
                self.model, weighed, self.calibration, self.loss, sample_tokens=self.sample_tokens
            )
        if plain:
            with_gram = any(recipes[name].needs_gram for name in plain)
            yield from collect(
                self.model, plain, self.calibration, sample_tokens=self.sample_tokens, with_gram=with_gram
            )


def _run(model, plan: Plan, source: Source, work: WorkDir, progress) -> tuple[dict, Report]:
    done, rows, prints, report = {}, {}, {}, Report(skipped=plan.skipped)
    layers = {name: model.get_submodule(name) for name in plan.recipes}
    for name, layer in layers.items():
        prints[name] = work.fingerprint(plan.recipes[name], weight_of(layer)) if work.path else ""
        found = work.load(name, prints[name])
        if found:
            done[name], rows[name] = found
    pending = [name for name in layers if name not in done]
    bar = tqdm(total=len(layers), initial=len(done), desc="quantize", disable=not progress)

    def jobs():
        for name, inputs in source.inputs(pending):
            if inputs is not None and inputs.x is None:
                report.skipped.append({"name": name, "reason": "never called on the calibration data"})
            else:
                yield name, layers[name], plan.recipes[name], inputs

    for packed, row in in_threads(_quantize_one, jobs(), _layers_at_once([layers[name] for name in pending])):
        name = row["name"]
        done[name], rows[name] = packed, row
        work.save(name, prints[name], packed, row)
        bar.update()
    bar.close()
    report.layers = [rows[name] for name in layers if name in rows]
    return done, report


def _layers_at_once(layers: list[nn.Module]) -> int:
    """One for each of torch's threads where layers are small and on a CPU; one on a GPU or where a layer is large."""
    small = all(layer.weight.device.type == "cpu" and layer.weight.numel() <= SMALL_LAYER for layer in layers)
    return torch.get_num_threads() if small else 1
