"""torch.library custom ops: `llmfp4::linear` and its gradient with respect to the input.

torch.compile and autograd see one op. Scales travel as raw uint8, which autocast and `.half()` leave alone.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.autograd import forward_ad
from torch.utils.weak import WeakIdKeyDictionary

from . import epilogue, registry
from .errors import BadInput
from .layout import to_layout
from .packed import PackedFP4
from .problem import FewRows, Kernel, Prepared, Problem
from .reference import dequantize


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """float32 [...] → uint8 [..., 4], the same memory."""
    return tensor.contiguous().unsqueeze(-1).view(torch.uint8)


def from_bytes(raw: torch.Tensor) -> torch.Tensor:
    """Inverse of `as_bytes`; copies if the bytes lie unaligned, and in a trace, which knows no addresses."""
    if torch.compiler.is_compiling() or raw.data_ptr() % 4:
        raw = raw.clone()
    return raw.view(torch.float32).squeeze(-1)


@functools.cache
def _parse(spec: str) -> dict:
    return json.loads(spec)


def packed_of(codes, row_scale, group_scale, x_scale, shift, x_factor, spec: str) -> PackedFP4:
    """The PackedFP4 that the arguments of an op describe; checks shapes, dtypes and bytes."""
    tensors = {
        "codes": codes,
        "row_scale": from_bytes(row_scale),
        "group_scale": group_scale,
        "x_scale": None if x_scale is None else from_bytes(x_scale),
        "shift": shift,
        "x_factor": None if x_factor is None else from_bytes(x_factor),
    }
    return PackedFP4.from_spec(_parse(spec), {name: t for name, t in tensors.items() if t is not None})


def needs_dispatcher(x: torch.Tensor, codes: torch.Tensor) -> bool:
    """Whether a call must go through the custom op: for a gradient, or because tensors have no memory to point at.

    Fake and meta tensors, vmap's batches, nested tensors and subclasses have none; a trace would not see the call.
    True also of what is no tensor: refusing it is left to `require_tensors`, off the way of the calls that are timed.
    """
    if forward_ad._current_level >= 0:
        raise BadInput("packed products have no forward-mode derivative: take their gradient, in reverse mode")
    return (
        type(x) is not torch.Tensor
        or (x.requires_grad and torch.is_grad_enabled())
        or x.is_meta
        or x.is_nested
        or codes.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def require_tensors(x: torch.Tensor, residual: torch.Tensor | None) -> None:
    """Raise BadInput for an x or residual that is no tensor, or a nested one, which has no shape."""
    for name, given in (("x", x), ("residual", residual)):
        if given is None and name == "residual":
            continue
        if not isinstance(given, torch.Tensor) or given.is_nested:
            what = "nested tensor" if isinstance(given, torch.Tensor) else type(given).__name__
            raise BadInput(f"{name} is a {what}: one tensor [..., {'k' if name == 'x' else 'n'}] is needed")


def require_input(x: torch.Tensor, n: int, k: int) -> None:
    if x.ndim == 0 or x.shape[-1] != k or not x.is_floating_point():
        raise BadInput(f"x of {x.dtype} {list(x.shape)} does not match a weight with n = {n}, k = {k}")


def require_bias(bias: torch.Tensor | None, n: int) -> None:
    if bias is not None and (list(bias.shape) != [n] or not bias.is_floating_point()):
        raise BadInput(f"bias of {bias.dtype} {list(bias.shape)} does not match n = {n}")


@dataclass
class Multiplier:
    """A packed weight on its way through the kernels: the choice is made once per m and dtype.

    Shapes are checked here, for all backends; dtypes of x are the registry's to refuse. Raises BadInput.
    """

    packed: PackedFP4
    bias: torch.Tensor | None
    choices: dict[tuple[int, torch.dtype], tuple[Kernel, Prepared]] = field(default_factory=dict)
    prepared: dict[object, Prepared] = field(default_factory=dict)
    few_rows: FewRows | None = None
    """Of the first Prepared that has one: a fifth of a small product's time would go to Python."""

    def __post_init__(self):
        require_bias(self.bias, self.packed.shape[0])

    def choose(self, m: int, dtype: torch.dtype) -> tuple[Kernel, Prepared]:
        choice = self.choices.get((m, dtype))
        if choice is None:
            kernel = registry.choose(Problem.of(self.packed, m, dtype))
            prepared = self.prepared.get(kernel.prepare)
            if prepared is None:  # of two threads that meet here, both go on with the first one's
                prepared = self.prepared.setdefault(kernel.prepare, kernel.prepare(self.packed, self.bias))
            if hasattr(prepared, "few_rows"):
                call = prepared.few_rows(kernel, m, dtype)
                self.few_rows = self.few_rows or call
            choice = self.choices[m, dtype] = (kernel, prepared)
        return choice

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None, gated: bool = False) -> torch.Tensor:
        """x [..., k] → y [..., n] or, gated, [..., n/2], dtype of x; `linear` says what it holds."""
        few_rows = self.few_rows
        if few_rows is not None and residual is None and not gated:
            y = few_rows(x)
            if y is not None:
                return y
        if x.is_neg():
            x = x.resolve_neg()
        n, k = self.packed.shape
        require_input(x, n, k)
        epilogue.require_epilogue(x, n, residual, gated)
        m = x.numel() // k
        if m == 0:
            return x.new_empty(*x.shape[:-1], n // 2 if gated else n)
        kernel, prepared = self.choose(m, x.dtype)
        if residual is None and not gated:
            return prepared.run(kernel, x)
        if kernel.fuses_epilogue:
            return prepared.run(kernel, x, residual, gated)
        wide = torch.promote_types(x.dtype, torch.float32)  # what follows the product is not to round twice
        kernel, prepared = self.choose(m, wide)
        return epilogue.finish(prepared.run(kernel, x.to(wide)), residual, gated, x.dtype)


class CurrentMultiplier:
    """A Multiplier and the tensors it was made from, to notice when one is replaced, moved or written to.

    Writes that hide from torch's version counter (through `.data`, or to inference tensors) are seen in codes,
    row_scale and a float32 bias, which the CPU kernels read in place, and not in the other scales, shift, x_factor
    and a 16-bit bias.
    """

    def __init__(self, tensors: list[torch.Tensor | None], multiplier: Multiplier):
        self.tensors, self.multiplier = tensors, multiplier
        # A call asks for every tensor's state, often with cold caches: no more questions than can change.
        told = [t for t in tensors if t is not None and not t.is_inference()]
        self.states = [(t, t._version, t.data_ptr()) for t in told]
        self.floats = [(t, t.requires_grad) for t in told if t.is_floating_point()]

    def holds(self, tensors: Sequence[torch.Tensor | None]) -> bool:
        """Whether these are the same tensors, unchanged."""
        if len(tensors) != len(self.tensors):
            return False
        for tensor, known in zip(tensors, self.tensors):
            if tensor is not known:
                return False
        for tensor, version, address in self.states:
            if tensor._version != version or tensor.data_ptr() != address:
                return False
        return all(tensor.requires_grad == requires_grad for tensor, requires_grad in self.floats)


# For calls that come through the dispatcher with tensors only. An entry lives as long as the codes it was made from.
_multipliers: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _multiplier(codes, row_scale, group_scale, x_scale, shift, x_factor, bias, spec: str) -> Multiplier:
    others = [row_scale, group_scale, x_scale, shift, x_factor, bias]
    known = _multipliers.get(codes)
    if known is None or known[:3] != (spec, codes._version, codes.data_ptr()) or not known[3].holds(others):
        packed = packed_of(codes.detach(), row_scale, group_scale, x_scale, shift, x_factor, spec)
        made = CurrentMultiplier(others, Multiplier(packed, bias))
        known = _multipliers[codes] = (spec, codes._version, codes.data_ptr(), made)
    return known[3].multiplier


@torch.library.custom_op("llmfp4::linear", mutates_args=())
def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    group_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    x_factor: torch.Tensor | None,
    bias: torch.Tensor | None,
    spec: str,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """Y [..., n] = X [..., k] times a packed weight (`spec` as PackedFP4.spec) plus bias [n]; dtype of X.

    gated: the weight's rows are eight gates, then their eight ups, and so on; Y [..., n/2] = silu(gate) · up. residual,
    of Y's shape and dtype, is added. All of it in fp32, rounded once to the dtype of X.
    """
    return _multiplier(codes, row_scale, group_scale, x_scale, shift, x_factor, bias, spec)(x, residual, gated)


@linear.register_fake
def _(x, codes, row_scale, group_scale, x_scale, shift, x_factor, bias, spec, residual=None, gated=False):
    if x.device != codes.device:
        raise BadInput(f"x is on {x.device}, the weight on {codes.device}")
    require_input(x, row_scale.shape[0], _parse(spec)["k"])
    return x.new_empty(*x.shape[:-1], row_scale.shape[0] // 2 if gated else row_scale.shape[0])


@torch.library.custom_op("llmfp4::linear_dx", mutates_args=())
def linear_dx(
    grad: torch.Tensor,
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    group_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    x_factor: torch.Tensor | None,
    spec: str,
) -> torch.Tensor:
    """dX [..., k] = dY [..., n] times the dequantized weight; the rounding of activations passes straight through."""
    packed = to_layout(packed_of(codes, row_scale, group_scale, x_scale, shift, x_factor, spec), "row")
    return grad @ dequantize(packed, grad.dtype)


@linear_dx.register_fake
def _(grad, codes, row_scale, group_scale, x_scale, shift, x_factor, spec):
    return grad.new_empty(*grad.shape[:-1], _parse(spec)["k"])


def _keep(ctx, inputs, output):
    x, *tensors, spec, residual, gated = inputs
    ctx.spec, ctx.gated, ctx.has_residual = spec, gated, residual is not None
    ctx.save_for_backward(*tensors[:6], *((x, tensors[6]) if gated else ()))


def _backward(ctx, grad):
    weight, rest, dy = ctx.saved_tensors[:6], ctx.saved_tensors[6:], grad.contiguous()
    if ctx.gated:
        x, bias = rest
        dy = epilogue.gated_gradient(torch.ops.llmfp4.linear(x, *weight, bias, ctx.spec), dy)
    dx = torch.ops.llmfp4.linear_dx(dy, *weight, ctx.spec)
    return dx, None, None, None, None, None, None, None, None, grad if ctx.has_residual else None, None


def _keep_weight(ctx, inputs, output):
    _, *tensors, spec = inputs
    ctx.spec = spec
    ctx.save_for_backward(*tensors)


def _double_backward(ctx, grad):
    dy = torch.ops.llmfp4.linear(grad.contiguous(), *ctx.saved_tensors, None, ctx.spec)
    return dy, None, None, None, None, None, None, None


linear.register_autograd(_backward, setup_context=_keep)
linear_dx.register_autograd(_double_backward, setup_context=_keep_weight)
