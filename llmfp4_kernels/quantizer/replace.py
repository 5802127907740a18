"""Put a quantized layer in the place of a dense one."""

from __future__ import annotations

from torch import nn


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module `name`, and wherever else the tree holds that module."""
    old = model.get_submodule(name)
    for alias in [alias for alias, module in model.named_modules(remove_duplicate=False) if module is old]:
        model.set_submodule(alias, new)
        parent = model.get_submodule(alias.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer):
            # Its fast path multiplies by linear1.weight itself. This flag is a condition of that path and nothing else.
            parent.activation_relu_or_gelu = 0
