"""Inputs of linear layers with the gradients of a loss at their outputs, which weigh errors in LLM-FP4's app. A."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..errors import BadInput
from .calibrate import LayerInputs, check_calibration, features, finite_tokens, group_passes, observed, on_device


class _Recorder:
    """Hooks of one pass. A token of a layer is its input beside its output's gradient, so both are sampled alike."""

    def __init__(self, sample_tokens: int):
        self.sample_tokens = sample_tokens
        self.pairs: dict[str, LayerInputs] = {}

    def hook(self, name: str):
        self.pairs[name] = LayerInputs()

        def record(module, args, kwargs, output):
            if not output.requires_grad:
                raise BadInput(f"the output of layer {name} has no gradient: all parameters before it are frozen")
            x = finite_tokens(name, args[0] if args else kwargs["input"])

            def with_gradient(gradient):
                pair = torch.cat([x, finite_tokens(name, gradient, "output gradients")], dim=1)
                self.pairs[name] = self.pairs[name].with_tokens(pair, self.sample_tokens)

            if x.numel():
                output.register_hook(with_gradient)

        return record

    def inputs(self, name: str, n: int) -> LayerInputs:
        """The pairs of a layer with n outputs, taken apart."""
        pairs = self.pairs.pop(name)
        if pairs.x is None:
            return pairs
        x, gradient = pairs.x[:, :-n].contiguous(), pairs.x[:, -n:].contiguous()
        return replace(pairs, x=x, channel_max=pairs.channel_max[:-n], gradient=gradient)


def collect_with_gradients(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[torch.Tensor | dict],
    loss: Callable,
    *,
    sample_tokens: int = 2048,
    budget_bytes: int = 2 << 30,
) -> Iterator[tuple[str, LayerInputs]]:
    """Like calibrate.collect, with LayerInputs.gradient of loss(model, batch), a scalar tensor, run backward.

    The model's own gradients are left as they were. Raises BadInput for a loss that is no finite scalar with a
    gradient, for layers that no gradient can reach, and as collect does.
    """
    modules, names, batches = dict(model.named_modules()), list(names), list(batches)
    check_calibration(modules, names, batches, sample_tokens)
    wanted = {name: modules[name] for name in names}

    def run() -> Iterator[tuple[str, LayerInputs]]:
        for group in group_passes(wanted, 2 * sample_tokens, budget_bytes):
            recorder = _Recorder(sample_tokens)
            with observed(model) as handles, torch.enable_grad():
                for name in group:
                    handles.append(wanted[name].register_forward_hook(recorder.hook(name), with_kwargs=True))
                for batch in batches:
                    _backward(model, loss(model, on_device(model, batch)))
            for name in group:
                yield name, recorder.inputs(name, features(wanted[name])[0])

    return run()


def _backward(model: nn.Module, value: torch.Tensor) -> None:
    if not torch.is_tensor(value) or value.numel() != 1 or not value.requires_grad or not value.isfinite():
        raise BadInput(f"the loss must be one finite number with a gradient, got {value!r}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(value, parameters, allow_unused=True)
