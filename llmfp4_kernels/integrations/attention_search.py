"""The operands of QK^T and PV on calibration data, and their formats and scales of least product error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from ..errors import BadInput
from ..formats import searched_elements
from ..packed import FORMAT
from ..quantizer.calibrate import check_batches, observed, on_device
from ..quantizer.products import Part, merge, search_product
from ..reference import require_finite
from .attention import ATTRIBUTE, AttentionOperands, fold_heads, require_redirectable, use_attention

PRODUCTS = ("qk", "pv")


@dataclass
class AttentionReport:
    """What search_attention found."""

    operands: dict[str, AttentionOperands] = field(default_factory=dict)
    layers: list[dict] = field(default_factory=list)
    """name, and of each product searched: elements, scales and relative error (|error|² / |product|²)"""


def _evenly(count: int, wanted: int) -> torch.Tensor:
    """At most `wanted` of `count` indices, evenly spaced."""
    return torch.linspace(0, count - 1, min(count, wanted)).round().long()


class _Recorder:
    """Stands in for the operands of one attention layer: attends in full precision, and keeps a sample."""

    def __init__(self, name: str, sequences: int, queries: int, budget: _Budget):
        self.name, self.sequences, self.queries, self.budget = name, sequences, queries, budget
        self.called, self.parts, self.largest = False, {"qk": [], "pv": []}, {}

    def attend(self, query, key, value, mask, scaling, dropout=0.0):
        output, probabilities = AttentionOperands().attend(query, key, value, mask, scaling)
        self.called = True
        if self.budget.admits(self.name):
            self._keep(query, key, value, mask, probabilities)
        return output, probabilities

    def _keep(self, query, key, value, mask, probabilities) -> None:
        for name, x in (("query", query), ("key", key), ("value", value)):
            require_finite(f"the {name} of {self.name}", x)
            self.largest[name] = max(x.abs().amax().item(), self.largest.get(name, 0.0))
        some, rows = _evenly(len(query), self.sequences), _evenly(query.shape[2], self.queries)
        query, key, value, probabilities = (x[some].float() for x in (query, key, value, probabilities))
        key_heads = key.shape[1]
        query, probabilities = (fold_heads(x[:, :, rows], key_heads) for x in (query, probabilities))
        counts = None if mask is None else self._attended(mask, len(some), some, rows, key_heads, query.shape[2])
        self.parts["qk"].append(Part(query, key.transpose(2, 3), counts))
        self.parts["pv"].append(Part(probabilities, value))
        self.budget.spend(sum(x.numel() * 4 for x in (query, key, value, probabilities)))

    @staticmethod
    def _attended(mask, batch: int, some, rows, key_heads: int, folded_rows: int) -> torch.Tensor:
        """bool [batch, key heads or 1, folded rows, k]: the scores that the mask leaves."""
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        mask = (mask[some] if len(mask) > 1 else mask.expand(batch, -1, -1, -1))[:, :, rows]
        if mask.shape[1] > 1:
            return fold_heads(mask, key_heads)
        return fold_heads(mask.expand(-1, folded_rows // len(rows), -1, -1), 1)


class _Budget:
    """Which layers of a pass may keep a sample: in the order of their calls, until the bytes are spent."""

    def __init__(self, limit: int, batches: int):
        self.limit, self.batches, self.done = limit, batches, set()
        self.start_pass()

    def start_pass(self) -> None:
        self.names, self.spent, self.first_batch = set(), 0, True

    def admits(self, name: str) -> bool:
        if self.first_batch and name not in self.done and (not self.names or self.spent * self.batches < self.limit):
            self.names.add(name)
        return name in self.names

    def spend(self, count: int) -> None:
        self.spent += count

    def end_batch(self) -> None:
        self.first_batch = False


def _forward(model: nn.Module, batch):
    """The first output (logits or hidden states) of a batch: token ids, or a mapping of keyword arguments."""
    batch = batch if isinstance(batch, Mapping) else {model.main_input_name: batch}
    with torch.no_grad():
        return model(**on_device(model, batch))[0]


@contextmanager
def _redirected(model: nn.Module, operands: Callable[[str], object]) -> Iterator[None]:
    """Every module attends with operands(its name); afterwards implementation, operands and mode are as before."""
    modules = dict(model.named_modules())
    before = [(module, module.__dict__.get(ATTRIBUTE)) for module in modules.values()]
    configs = {id(c): c for c in (getattr(m, "config", None) for m in modules.values()) if hasattr(c, "sub_configs")}
    implementations = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        with observed(model):
            model.set_attn_implementation(FORMAT)
            for name, module in modules.items():
                setattr(module, ATTRIBUTE, operands(name))
            yield
    finally:
        for config, implementation in implementations:
            config._attn_implementation_internal = implementation
        for module, old in before:
            module.__dict__.pop(ATTRIBUTE, None)
            if old is not None:
                setattr(module, ATTRIBUTE, old)


_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def _require_same(model: nn.Module, batch) -> None:
    """Raise BadInput if the redirected attention, nothing rounded, computes something else than the model's eager one.

    That is how a model is found whose attention holds more than its arguments tell.
    """
    with _redirected(model, lambda name: AttentionOperands()):
        redirected = _forward(model, batch).float()
        model.set_attn_implementation("eager")
        expected = _forward(model, batch).float()
    difference = ((redirected - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    if not difference <= _TOLERANCE.get(model.dtype, 1e-4):
        raise BadInput(
            f"{type(model).__name__} computes more than softmax(QK^T + mask) V: redirected, unrounded, its output "
            f"differs by {difference:.2g} (relative)"
        )


def _samples(model: nn.Module, batches, sequences: int, queries: int, budget_bytes: int) -> Iterator[_Recorder]:
    """Recorders that hold the sample of each attention layer, pass by pass; the model is as it was in between."""
    per_batch, budget = -(-sequences // len(batches)), _Budget(budget_bytes, len(batches))
    pending = True
    while pending:
        budget.start_pass()
        recorders = {name: _Recorder(name, per_batch, queries, budget) for name, _ in model.named_modules()}
        with _redirected(model, recorders.get):
            for batch in batches:
                _forward(model, batch)
                budget.end_batch()
        called = [recorder for recorder in recorders.values() if recorder.called]
        if not called:
            raise BadInput(f"no attention layer of {type(model).__name__} was called on {len(batches)} batches")
        budget.done |= budget.names
        pending = len(budget.done) < len(called)
        yield from (recorder for recorder in called if recorder.name in budget.names)


def _search(recorder: _Recorder, products, bits: int, rounds: int) -> tuple[AttentionOperands, dict]:
    found, row = {}, {"name": recorder.name}
    for product, a, b in (("qk", "query", "key"), ("pv", "probabilities", "value")):
        if product in products:
            largest = {"largest_a": recorder.largest.get(a), "largest_b": recorder.largest[b]}
            search = search_product(merge(recorder.parts[product]), bits=bits, rounds=rounds, **largest)
            found |= {a: search.a, b: search.b}
            operands = {a: [search.a.element.name, search.a.scale], b: [search.b.element.name, search.b.scale]}
            row[product] = operands | {"relative_error": search.relative_error}
    return AttentionOperands(**found), row


def _check(model: nn.Module, batches, products, sequences: int, queries: int, bits: int, exclude) -> None:
    require_redirectable(model)
    searched_elements(bits)
    if not products or set(products) - set(PRODUCTS):
        raise BadInput(f"products are {list(products)}, expected some of {list(PRODUCTS)}")
    if sequences < 1 or queries < 1:
        raise BadInput(f"sequences and queries must be at least 1, got {sequences} and {queries}")
    names = [name for name, _ in model.named_modules()]
    for glob in exclude:
        if not any(fnmatchcase(name, glob) for name in names):
            raise BadInput(f"exclude {glob!r} matches none of {len(names)} modules")
    check_batches(batches)


def search_attention(
    model: nn.Module,
    calibration,
    *,
    bits: int = 4,
    products=PRODUCTS,
    exclude=(),
    rounds: int = 3,
    sequences: int = 16,
    queries: int = 64,
    budget_bytes: int = 1 << 30,
) -> AttentionReport:
    """Formats and scales of the operands of QK^T ("qk") and PV ("pv") of every attention layer, for use_attention.

    LLM-FP4 section 4: activation-activation products take the baseline search, one format and one static scale per
    tensor, by the squared error of the scores that the mask leaves (qk) and of the attention's output (pv), in full
    precision upstream. Products are sampled: about `sequences` sequences of all batches, `queries` rows of each, all
    keys; largest magnitudes are those of all tokens. Layers are run in passes whose samples fit `budget_bytes`.

    calibration  a batch, or several, as for quantize_model
    exclude      globs on the names of attention modules which stay in full precision; each must match a module

    Raises BadInput for a model whose attention cannot be redirected or is more than softmax(QK^T + mask) V.
    """
    batches = [calibration] if isinstance(calibration, torch.Tensor | Mapping) else list(calibration or ())
    _check(model, batches, products, sequences, queries, bits, exclude)
    _require_same(model, batches[0])
    report = AttentionReport()
    for recorder in _samples(model, batches, sequences, queries, budget_bytes):
        if any(fnmatchcase(recorder.name, glob) for glob in exclude):
            report.operands[recorder.name] = AttentionOperands()
        else:
            report.operands[recorder.name], row = _search(recorder, products, bits, rounds)
            report.layers.append(row)
    if not report.layers:
        raise BadInput(f"all {len(report.operands)} attention layers are excluded by {list(exclude)}")
    return report


def quantize_attention(model: nn.Module, calibration, **options) -> AttentionReport:
    """search_attention, then round the operands of every attention in `model`, in place. Options and errors: there.

    save_quantized keeps the operands. Search before quantize_model and use_attention(model, report.operands) after it
    for layers that all see full-precision inputs (LLM-FP4 app. F).
    """
    report = search_attention(model, calibration, **options)
    use_attention(model, report.operands)
    return report
