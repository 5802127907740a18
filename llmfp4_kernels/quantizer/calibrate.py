"""The inputs of linear layers of a full-precision model on calibration data, in bounded memory."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import BadInput


@dataclass(frozen=True)
class LayerInputs:
    """What a layer was given. x and channel_max are None for a layer that was never called."""

    x: torch.Tensor | None = None
    """float32 [≤ sample_tokens, k]: a uniform sample of all its tokens, in their order"""
    channel_max: torch.Tensor | None = None
    """float32 [k]: largest magnitude of each channel over all tokens"""
    tokens: int = 0
    """tokens seen"""
    gram: torch.Tensor | None = field(default=None, repr=False)
    """float64 [k, k]: the sum of x x' over all tokens, if asked for; each batch's product is an fp32 one"""
    gradient: torch.Tensor | None = field(default=None, repr=False)
    """float32 [≤ sample_tokens, n]: of a loss with respect to the layer's outputs at the tokens of x, if asked for"""
    keys: torch.Tensor | None = field(default=None, repr=False)
    """float64: the random number of each sampled token; the sample is the tokens with the smallest ones"""

    def with_tokens(self, x: torch.Tensor, sample_tokens: int, with_gram: bool = False) -> LayerInputs:
        """Extended by the tokens x [t, k], float32. The numbers depend on the tokens' positions only."""
        generator = torch.Generator().manual_seed(self.tokens)
        keys = torch.rand(len(x), generator=generator, dtype=torch.float64)
        channel_max = x.abs().amax(0)
        if self.x is None:
            old_keys, old_x = keys[:0], x[:0]
        else:
            old_keys, old_x, channel_max = self.keys, self.x, torch.maximum(channel_max, self.channel_max)
        keys = torch.cat([old_keys, keys])
        kept = keys.topk(min(sample_tokens, len(keys)), largest=False).indices.sort().values
        old, new = kept[kept < len(old_x)], kept[kept >= len(old_x)] - len(old_x)
        sample = torch.cat([old_x[old.to(x.device)], x[new.to(x.device)]])
        gram = None
        if with_gram:
            gram = (x.T @ x).double() if self.gram is None else self.gram + x.T @ x
        return LayerInputs(sample, channel_max, self.tokens + len(x), gram, keys=keys[kept])


_NOTHING = LayerInputs()


class _PassComplete(Exception):
    """Every layer of the pass has seen this batch: the rest of the forward is not needed."""


class _Recorder:
    """Pre-forward hooks of one pass. Layers fed by the same tensor object share one sample."""

    def __init__(self, sample_tokens: int, with_gram: bool):
        self.sample_tokens, self.with_gram = sample_tokens, with_gram
        self.inputs: dict[str, LayerInputs] = {}
        self.calls_by_kind: dict[object, Counter] = {}
        self.last = (None, None, None)

    def start_batch(self, batch) -> None:
        self.calls: Counter = Counter()
        self.kind = _kind(batch)
        self.expected_calls = self.calls_by_kind.get(self.kind)

    def end_batch(self) -> None:
        """The first batch of a kind runs to its end and tells how often such a forward calls each layer."""
        if self.expected_calls is None and set(self.calls) == set(self.inputs):
            self.calls_by_kind[self.kind] = self.calls
        self.last = (None, None, None)

    def hook(self, name: str):
        self.inputs[name] = _NOTHING

        def record(module, args, kwargs):
            self.record(name, args[0] if args else kwargs["input"])

        return record

    def record(self, name: str, x: torch.Tensor) -> None:
        before = self.inputs[name]
        last_x, last_before, last_after = self.last
        if x is last_x and before is last_before:
            self.inputs[name] = last_after
        elif x.numel():
            self.inputs[name] = before.with_tokens(finite_tokens(name, x), self.sample_tokens, self.with_gram)
        self.last = (x, before, self.inputs[name])
        self.calls[name] += 1
        if self.expected_calls and all(self.calls[n] >= count for n, count in self.expected_calls.items()):
            raise _PassComplete


def _kind(batch) -> object:
    """Batches with the same names of tensors and the same other arguments call each layer equally often."""
    if not isinstance(batch, Mapping):
        return None
    return tuple((key, "tensor" if torch.is_tensor(v) else repr(v)) for key, v in sorted(batch.items()))


def finite_tokens(name: str, x: torch.Tensor, what: str = "inputs") -> torch.Tensor:
    """x [..., k] as float32 [tokens, k]; raises BadInput naming the layer if it holds NaN or Inf."""
    x = x.detach().reshape(-1, x.shape[-1]).float()
    bad = int((~x.isfinite()).sum())
    if bad:
        raise BadInput(f"the {what} of layer {name} hold {bad} values of {x.numel()} that are NaN or Inf")
    return x


def features(module: nn.Module) -> tuple[int, int]:
    """(n, k) of nn.Linear, and of transformers' Conv1D, whose weight is [k, n]."""
    if hasattr(module, "in_features"):
        return module.out_features, module.in_features
    return module.weight.shape[1], module.weight.shape[0]


def group_passes(
    modules: dict[str, nn.Module], sample_tokens: int, budget_bytes: int, with_gram: bool = False
) -> list[list[str]]:
    """Consecutive layers whose samples (float32, old and new while a batch is added) fit the budget; one at least."""
    passes, used = [], 0
    for name, module in modules.items():
        k = features(module)[1]
        need = 2 * 4 * sample_tokens * k + (8 * k * k if with_gram else 0)
        if not passes or used + need > budget_bytes:
            passes.append([])
            used = 0
        passes[-1].append(name)
        used += need
    return passes


def on_device(model: nn.Module, batch):
    """The batch with its tensors where the model's parameters are."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        return {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
    return batch.to(device)


def _forward(model: nn.Module, batch) -> None:
    batch = on_device(model, batch)
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(batch)


@contextlib.contextmanager
def observed(model: nn.Module):
    """The model in eval mode; a list of hooks' handles to fill. Afterwards hooks and modes are as before."""
    training, handles = {module: module.training for module in model.modules()}, []
    try:
        model.eval()
        yield handles
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training.items():
            module.training = flag


def _run_pass(
    model: nn.Module, modules: dict[str, nn.Module], batches, sample_tokens: int, with_gram: bool
) -> dict[str, LayerInputs]:
    """The inputs of some layers over all batches. Leaves the model as it was, also after an exception."""
    recorder = _Recorder(sample_tokens, with_gram)
    with observed(model) as handles:
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(recorder.hook(name), with_kwargs=True))
        for batch in batches:
            recorder.start_batch(batch)
            try:
                with torch.no_grad():
                    _forward(model, batch)
            except _PassComplete:
                pass
            recorder.end_batch()
    return recorder.inputs


def check_calibration(modules: dict[str, nn.Module], names, batches, sample_tokens: int) -> None:
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise BadInput(f"the model has no layer {', '.join(unknown)} ({len(unknown)} of {len(names)} names)")
    if sample_tokens < 1:
        raise BadInput(f"sample_tokens is {sample_tokens}: at least 1 is needed")
    check_batches(batches)


def check_batches(batches: Sequence) -> None:
    """Raise BadInput unless there are batches, each a tensor or a mapping of keyword arguments, with tokens in it."""
    if not batches:
        raise BadInput("calibration needs at least one batch, got none")
    for i, batch in enumerate(batches):
        if not isinstance(batch, torch.Tensor | Mapping):
            raise BadInput(f"calibration holds a {type(batch).__name__}, expected tensors or keyword arguments")
        tensors = [v for v in (batch.values() if isinstance(batch, Mapping) else [batch]) if torch.is_tensor(v)]
        if not tensors or any(t.numel() == 0 for t in tensors):
            raise BadInput(f"calibration batch {i} of {len(batches)} holds no tokens")


def collect(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[torch.Tensor | dict],
    *,
    sample_tokens: int = 2048,
    with_gram: bool = False,
    budget_bytes: int = 2 << 30,
) -> Iterator[tuple[str, LayerInputs]]:
    """Yield (name, LayerInputs) for each named layer, in the order of `names`, from the model as it is.

    batches are token ids [b, t], any other tensor the model takes, or dicts of its forward's keyword arguments.
    Layers are run in passes whose samples fit `budget_bytes`, so give `names` in the model's order; a pass ends each
    forward once its layers were called as often as in the first batch of its kind. The same calls give the same
    samples. The Gram matrix (with_gram) is that of all tokens.

    Raises BadInput at once for unknown names and empty batches, and while iterating for NaN or Inf inputs.
    """
    modules, names, batches = dict(model.named_modules()), list(names), list(batches)
    check_calibration(modules, names, batches, sample_tokens)
    wanted = {name: modules[name] for name in names}

    def run() -> Iterator[tuple[str, LayerInputs]]:
        for group in group_passes(wanted, sample_tokens, budget_bytes, with_gram):
            inputs = _run_pass(model, {name: wanted[name] for name in group}, batches, sample_tokens, with_gram)
            for name in group:
                yield name, inputs.pop(name)

    return run()
