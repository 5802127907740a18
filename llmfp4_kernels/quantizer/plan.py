"""Which layers of a module tree are quantized, with which recipe, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from ..errors import BadInput
from ..formats import Recipe
from ..formats import recipe as recipe_named
from ..nn import FP4Linear

EMBEDDING_RECIPE = "llm-fp4-a16"
DEFAULT_EXCLUDE = ("lm_head",)
DEFAULTS = ("*", *DEFAULT_EXCLUDE)
"""Globs that need not match: what a caller gets who names none."""


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, by name: the package does not import transformers for it."""
    return (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D")


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight [n, k] of an nn.Linear, nn.Embedding or transformers Conv1D (which keeps it as [k, n])."""
    if _is_conv1d(layer):
        return layer.weight.detach().T
    if not isinstance(layer, nn.Linear | nn.Embedding) or isinstance(layer, FP4Linear):
        raise BadInput(f"{type(layer).__name__} is no dense linear layer: expected nn.Linear or Conv1D")
    return layer.weight.detach()


@dataclass
class Plan:
    recipes: dict[str, Recipe]
    """Layers to quantize, in module order."""
    shared: dict[str, str]
    """Embeddings that share the weight of a layer in `recipes` and will share its codes."""
    skipped: list[dict]


def _matches(name: str, globs) -> str | None:
    return next((glob for glob in globs if fnmatchcase(name, glob) or fnmatchcase(name.rsplit(".", 1)[-1], glob)), None)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _reason_to_skip(name: str, module: nn.Module, include, exclude) -> str | None:
    is_table = isinstance(module, nn.Embedding)
    excluded = _matches(name, exclude)
    if isinstance(module, FP4Linear):
        return "is FP4 already"
    for kind in (nn.Linear, nn.Embedding):
        if isinstance(module, kind) and type(module) is not kind:
            return f"a {type(module).__name__}, which may compute something else than nn.{kind.__name__}"
    if is_table and module.max_norm is not None:
        return f"an embedding that renormalises its rows to {module.max_norm}"
    if excluded:
        return f"excluded by {excluded!r}"
    if not _matches(name, [glob for glob in include if glob != "*"] if is_table else include):
        return "an embedding, not named by include" if is_table else f"not included by {list(include)}"
    if min(weight_of(module).shape) < 1:
        raise BadInput(f"{name} has a weight of shape {list(weight_of(module).shape)}: n and k must be at least 1")
    return None


def _other_modules(modules: dict[str, nn.Module]) -> list[dict]:
    """One entry for each kind of module that holds parameters but is neither a linear layer nor an embedding."""
    kinds: dict[str, list[int]] = {}
    for module in modules.values():
        if not _is_linear(module) and not isinstance(module, nn.Embedding):
            count = sum(p.numel() for p in module.parameters(recurse=False))
            if count:
                kinds.setdefault(type(module).__name__, []).append(count)
    return [
        {"name": f"{len(counts)} x {kind}", "reason": f"no linear layer ({sum(counts)} parameters in all)"}
        for kind, counts in kinds.items()
    ]


def make_plan(model: nn.Module, recipe: Recipe, include, exclude, overrides: dict[str, str]) -> Plan:
    """Which layers get which recipe, and a reason for every other module with parameters.

    Embeddings are quantized only where an include glob other than "*" names them. Raises BadInput for a weight without
    elements, an unknown recipe, a glob that matches nothing and is none of DEFAULTS, and an override that gives a table
    another recipe than the head whose weight it shares.
    """
    if _is_linear(model):
        raise BadInput(f"the model itself is a {type(model).__name__}: use FP4Linear.from_linear")
    plan, owner = Plan({}, {}, []), {}
    modules = dict(model.named_modules())
    linears = {name: m for name, m in modules.items() if _is_linear(m)}
    tables = {name: m for name, m in modules.items() if isinstance(m, nn.Embedding)}
    for what, globs in {"include": include, "exclude": exclude, "override": overrides}.items():
        if globs is None or isinstance(globs, str):
            raise BadInput(f"{what} is {globs!r}: expected several globs, ({globs!r},) for one")
        for glob in globs:
            if glob not in DEFAULTS and not any(_matches(name, [glob]) for name in linears | tables):
                raise BadInput(f"{what} {glob!r} matches none of {len(linears) + len(tables)} layers and embeddings")
    for name, module in (linears | tables).items():
        reason = _reason_to_skip(name, module, include, exclude)
        pointer = module.weight.data_ptr()
        if reason:
            plan.skipped.append({"name": name, "reason": reason})
            continue
        glob = _matches(name, overrides)
        chosen = recipe_named(overrides[glob]) if glob else None
        if name in tables and pointer in owner:
            plan.shared[name] = owner[pointer]
            if chosen and chosen != plan.recipes[owner[pointer]]:
                raise BadInput(
                    f"override {glob!r} makes {name} {chosen.name}, but it shares its weight with {owner[pointer]}, "
                    f"which becomes {plan.recipes[owner[pointer]].name}"
                )
        else:
            owner[pointer] = name
            plan.recipes[name] = chosen or recipe_named(EMBEDDING_RECIPE if name in tables else recipe)
    plan.skipped += _other_modules(modules)
    return plan
