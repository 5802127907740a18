"""The FP4 layers of a module tree as JSON, empty layers made from that, and the tensors a file of the tree holds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..embedding import FP4Embedding
from ..errors import BadFile, BadInput
from ..formats import E2M1, SCALES, Recipe
from ..gated import FP4GatedLinear
from ..nn import FP4Linear, FP4Module
from ..packed import describe_dynamic, dynamic_of, open_safetensors
from ..quantizer.replace import replace_module


def layer_entries(model: nn.Module) -> dict[str, dict]:
    """{module name: {"kind": "linear" | "embedding", "recipe", "n", "k", "bias", "activation", "shift", "dynamic",
    "x_factor", "scale", "group_size", "shares": other name, "padding_idx"}}: which tensors a layer has, not only which
    recipe made them.
    """
    entries, owner = {}, {}
    gated = [name for name, m in model.named_modules() if isinstance(m, FP4GatedLinear)]
    if gated:
        raise BadInput(f"{gated[0]} holds gate and up as one weight, which no file does: save before fuse_gated_mlps")
    modules = {name: m for name, m in model.named_modules() if isinstance(m, FP4Module)}
    # Heads first: an embedding shares the head's codes, not the other way round.
    for name, module in sorted(modules.items(), key=lambda item: isinstance(item[1], FP4Embedding)):
        kind = "embedding" if isinstance(module, FP4Embedding) else "linear"
        entry = {"kind": kind, "recipe": module.recipe, "n": module.out_features, "k": module.in_features}
        entry |= {"activation": module.spec()["activation"] is not None, "shift": module.shift is not None}
        entry |= {"dynamic": describe_dynamic(module.dynamic), "x_factor": module.x_factor is not None}
        entry |= {"scale": module.scale.name if module.scale else None, "group_size": module.group_size}
        entry |= {"bias": module.bias is not None} if kind == "linear" else {"padding_idx": module.padding_idx}
        if id(module.codes) in owner:
            entry["shares"] = owner[id(module.codes)]
        owner.setdefault(id(module.codes), name)
        entries[name] = entry
    return entries


def empty_layer(entry: dict, dtype: torch.dtype, device="meta") -> FP4Module:
    """A layer of an entry's shape, its tensors without values (on meta) or zero."""
    n, k, activation = entry["n"], entry["k"], (E2M1,) if entry["activation"] else ()
    scale = SCALES[entry["scale"]] if entry["scale"] else None
    recipe = Recipe(entry["recipe"], (E2M1,), activation, preshift=entry["shift"], group_size=entry["group_size"],
                    group_scale=scale, dynamic=dynamic_of(entry.get("dynamic")),
                    smoothing=entry.get("x_factor", False))  # fmt: skip
    if entry["kind"] == "embedding":
        table = FP4Embedding(n, k, device=device, dtype=dtype, recipe=recipe)
        table.padding_idx = entry.get("padding_idx")
        return table
    return FP4Linear(k, n, entry["bias"], device=device, dtype=dtype, recipe=recipe)


def share_codes(model: nn.Module, entries: dict[str, dict], dtype: torch.dtype) -> None:
    """Give each embedding that shares another layer's codes the very Parameters of that layer."""
    for name, entry in entries.items():
        if "shares" in entry:
            owner = model.get_submodule(entry["shares"])
            replace_module(model, name, FP4Embedding.sharing(owner, dtype, entry.get("padding_idx")))


def tensors_to_save(model: nn.Module, entries: dict[str, dict], once: bool = True) -> dict[str, torch.Tensor]:
    """The state dict without second names of packed layers, and, with `once`, of any tensor; else those are copies."""
    layers = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, FP4Module)]
    second = tuple(f"{name}." for name in layers if "shares" in entries.get(name, {"shares": None}))
    saved, seen = {}, set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.dtype)
        known = tensor.numel() and key in seen
        if not name.startswith(second) and not (known and once):
            saved[name] = tensor.clone() if known else tensor
            seen.add(key)
    return saved


def fill_tree(model: nn.Module, path: Path, entries: dict[str, dict]) -> nn.Module:
    """Put the FP4 layers of a file into a dense module tree, and the file's values into the rest.

    Raises BadFile, before anything is changed, if the tree has no such layer, and if another tensor differs.
    """
    dense = dict(model.named_modules())
    for name, entry in entries.items():
        weight = getattr(dense.get(name), "weight", None)
        if weight is None or sorted(weight.shape) != sorted((entry["n"], entry["k"])):
            found = "none" if weight is None else list(weight.shape)
            raise BadFile(f"{path} holds a layer {name} of {[entry['n'], entry['k']]}, the tree's weight is {found}")
    for name, entry in entries.items():
        replace_module(model, name, empty_layer(entry, dense[name].weight.dtype, "cpu"))
    share_codes(model, entries, dense[next(iter(entries))].weight.dtype)
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    expected = tensors_to_save(model, entries)
    for name in sorted(set(expected) | set(tensors)):
        pair = [
            f"{t.dtype} {list(t.shape)}" if t is not None else "none" for t in (tensors.get(name), expected.get(name))
        ]
        if pair[0] != pair[1]:
            raise BadFile(f"{path} holds {name} as {pair[0]}, the tree as {pair[1]}")
    model.load_state_dict(tensors, strict=False)
    for name in entries:
        model.get_submodule(name).spec()  # of tables that share another layer's tensors too: the file has none for them
    return model
