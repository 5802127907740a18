"""FP4Linear: a drop-in for nn.Linear whose weight is packed 4-bit codes."""

from __future__ import annotations

import functools
import json
import threading

import torch
from torch import nn

from . import layout, reference, registry
from .errors import BadInput, NoKernel
from .formats import Element, Recipe
from .formats import element as element_named
from .formats import recipe as recipe_named
from .ops import CurrentMultiplier, Multiplier, as_bytes, needs_dispatcher, packed_of, require_bias, require_tensors
from .packed import PackedFP4, codes_shape, describe_dynamic
from .problem import Problem

_shuffling = threading.Lock()


def element_byte(element: Element) -> int:
    """An element as one byte: exponent bits; of 6 or 8 bits also mantissa bits << 4; the top bit for "e4m3fn"."""
    return element.exponent_bits | (element.mantissa_bits << 4 if element.bits > 4 else 0) | element.nan_codes << 7


def element_of_byte(byte: int) -> Element:
    """Inverse of `element_byte`; raises BadInput for a byte that names no element."""
    exponent_bits, mantissa_bits = byte & 15, byte >> 4 & 7
    if mantissa_bits == 0 and exponent_bits <= 3:
        mantissa_bits = 3 - exponent_bits
    return element_named(f"e{exponent_bits}m{mantissa_bits}{'fn' if byte >> 7 else ''}")


def _raw(*shape: int, device=None) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.uint8, device=device), requires_grad=False)


class FP4Module(nn.Module):
    """A packed weight [n, k] as a module: everything that defines it is a uint8 Parameter.

    So `.half()`, autocast, safetensors, LoRA, offloading and pickle leave it intact. None of them can require a
    gradient: `requires_grad_(True)` on a layer, or on a model that holds one, is torch's RuntimeError. Ask it of the
    bias, of adapters or of the floating-point parameters alone.

        codes        [n, ceil(k/2)]   or, once a kernel has run, its tiles (layout.py); state_dict is in row order
        row_scale    [n, 4]           float32 bytes
        elements     [2]              exponent bits of the weight's and the activation's element (0: 16-bit activations)
        group_scale  [n, ceil(k/G)]   raw E8M0 or E4M3, recipes with groups
        x_scale      [4]              float32 bytes, recipes with FP4 activations
        shift        [k]              recipes with the pre-shifted exponent bias
        x_factor     [k, 4]           float32 bytes, recipes that smooth activations
    """

    TENSORS = ("codes", "row_scale", "elements", "group_scale", "x_scale", "shift", "x_factor")

    def _set_format(self, k, n, recipe, scale, group_size, dynamic):
        self.in_features, self.out_features = k, n
        self.recipe, self.scale, self.group_size, self.dynamic = recipe, scale, group_size, dynamic
        self._unread = True
        self._current: CurrentMultiplier | None = None

    def _fresh_tensors(self, recipe: Recipe, device):
        n, k = self.out_features, self.in_features
        activation = recipe.activation_elements
        self.codes = _raw(*codes_shape(n, k, "row"), device=device)
        self.row_scale = _raw(n, 4, device=device)
        self._name(recipe.weight_elements[0], activation[0] if activation else None, device)
        self.group_scale = _raw(n, -(-k // recipe.group_size), device=device) if recipe.group_size else None
        ones = functools.partial(torch.ones, dtype=torch.float32, device=device)
        static = activation and recipe.dynamic is None
        self.x_scale = nn.Parameter(as_bytes(ones(())), requires_grad=False) if static else None
        self.shift = _raw(k, device=device) if recipe.preshift and activation else None
        self.x_factor = nn.Parameter(as_bytes(ones(k)), requires_grad=False) if recipe.smoothing else None

    def _name(self, element: Element, activation: Element | None, device) -> None:
        """Set `elements` and the spec. On meta they stand for those that a checkpoint will bring."""
        codes = [element_byte(element), element_byte(activation) if activation else 0]
        self.elements = nn.Parameter(torch.tensor(codes, dtype=torch.uint8, device=device), requires_grad=False)
        self._describe_elements(element, activation)
        self._unread = self.elements.is_meta

    def _describe_elements(self, element: Element, activation: Element | None) -> None:
        if element.bits != 4:
            raise BadInput(f"elements {self.elements.tolist()} name {element.name} weights: expected a 4-bit format")
        self._spec = {
            "k": self.in_features,
            "element": element.name,
            "activation": activation.name if activation else None,
            "dynamic": describe_dynamic(self.dynamic),
            "scale": self.scale.name if self.scale else None,
            "group_size": self.group_size,
            "recipe": self.recipe,
        }
        # Encoded here, not in forward: torch.compile traces forward, and JSON is not traceable.
        self._spec_text = {
            ndim: json.dumps(self._spec | {"layout": name}) for ndim, name in layout.LAYOUT_OF_NDIM.items()
        }

    def _take(self, packed: PackedFP4):
        n, k = packed.shape
        self._set_format(k, n, packed.recipe, packed.scale, packed.group_size, packed.dynamic)
        tensors = {
            "codes": packed.codes,
            "row_scale": as_bytes(packed.row_scale),
            "group_scale": packed.group_scale,
            "x_scale": None if packed.x_scale is None else as_bytes(packed.x_scale),
            "shift": packed.shift,
            "x_factor": None if packed.x_factor is None else as_bytes(packed.x_factor),
        }
        for name, tensor in tensors.items():
            setattr(self, name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        self._name(packed.element, packed.activation, packed.codes.device)

    @property
    def weight(self) -> torch.Tensor:
        """The packed codes (uint8): whoever looks for a weight finds a device, and fails at arithmetic on it."""
        return self.codes

    def spec(self) -> dict:
        """PackedFP4.spec of the weight. `elements` is read once, when it was loaded: a trace cannot read a tensor."""
        if self._unread and not self.elements.is_meta:
            weight, activation = self.elements.tolist()
            self._describe_elements(element_of_byte(weight), element_of_byte(activation) if activation else None)
            self._unread = False
        return self._spec

    def op_arguments(self) -> tuple:
        """(codes, row_scale, group_scale, x_scale, shift, x_factor, spec) as the custom ops take them."""
        self.spec()
        codes = self.codes
        scales = self.row_scale, self.group_scale, self.x_scale, self.shift, self.x_factor
        return codes, *scales, self._spec_text[codes.ndim]

    def __getstate__(self):
        return self.__dict__ | {"_current": None}  # addresses mean nothing in a copy

    def packed(self) -> PackedFP4:
        """The weight as a PackedFP4 in row order."""
        _, *tensors, _ = self.op_arguments()
        codes = self.codes.detach()  # keeps its memory when a first forward puts tiles in place of it
        return layout.to_layout(packed_of(codes, *tensors, self._spec_text[codes.ndim]), "row")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [n, k] that the codes stand for."""
        return reference.dequantize(self.packed(), dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.codes.ndim != 2:
            destination[prefix + "codes"] = layout.unshuffle_codes(self.codes, self.out_features, self.in_features)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "codes" in state_dict and self.codes.ndim != 2:
            self.codes.data = self.codes.new_empty(codes_shape(self.out_features, self.in_features, "row"))
        for name in self.TENSORS:
            tensor = state_dict.get(prefix + name)
            if tensor is not None and tensor.dtype != torch.uint8:
                raise BadInput(f"{prefix}{name} is {tensor.dtype} in the state dict, expected raw torch.uint8")
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._unread = True
        if prefix + "elements" in state_dict:
            self.spec()


class FP4Linear(FP4Module, nn.Linear):
    """y [..., out_features] = x [..., in_features] times a packed FP4 weight, plus bias.

    A fresh layer has codes and scales of zero. Weights are frozen; the gradient with respect to x is that of the
    dequantized weight. layer(x, residual) adds a residual of y's shape and dtype before the one rounding to it, inside
    of the kernel or after its product (ops.linear; Kernel.fuses_epilogue says which). Raises BadInput for an x that
    is no tensor [..., in_features] of a float dtype, and for a residual that does not match y.
    """

    gated = False

    def __init__(
        self, in_features, out_features, bias=True, device=None, dtype=None, *, recipe: str | Recipe = "llm-fp4"
    ):
        nn.Module.__init__(self)
        sizes = f"in_features = {in_features} and out_features = {out_features}"
        if not all(isinstance(size, int) and size >= 1 for size in (in_features, out_features)):
            raise BadInput(f"{sizes} must be whole numbers, at least 1")
        if dtype is not None and not dtype.is_floating_point:
            raise BadInput(f"dtype = {dtype} is no dtype of activations: expected a floating-point one")
        recipe = recipe_named(recipe)
        self._set_format(in_features, out_features, recipe.name, recipe.group_scale, recipe.group_size, recipe.dynamic)
        self._fresh_tensors(recipe, device)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False)

    @classmethod
    def from_packed(cls, packed: PackedFP4, bias: torch.Tensor | None = None) -> FP4Linear:
        """A layer around a PackedFP4, whose tensors it shares; bias [n] is copied and keeps its dtype.

        Raises BadInput for a bias of another shape, or with NaN or Inf.
        """
        require_bias(bias, packed.shape[0])
        if bias is not None:
            reference.require_finite("bias", bias)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._take(packed)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        return self

    @classmethod
    def from_linear(
        cls, linear: nn.Module, recipe: str | Recipe | PackedFP4 = "llm-fp4", calibration=None
    ) -> FP4Linear:
        """Quantize an nn.Linear (weight [n, k]) or a transformers Conv1D (weight [k, n]).

        calibration: activations [tokens, k] of the layer, for recipes that search or quantize activations.
        A ready PackedFP4 may stand in place of the recipe. Raises BadInput for NaN/Inf, empty or mismatched input.
        """
        from .quantizer.linear import quantize_linear
        from .quantizer.plan import weight_of

        weight = weight_of(linear)
        if not isinstance(recipe, PackedFP4):
            recipe = quantize_linear(weight, recipe, calibration)
        if recipe.shape != tuple(weight.shape):
            raise BadInput(f"a packed weight of {list(recipe.shape)} does not match a layer of {list(weight.shape)}")
        return cls.from_packed(recipe.to(weight.device), linear.bias)

    def _fused_bias(self) -> torch.Tensor | None:
        bias = self._current_bias()
        return None if bias is None or bias.requires_grad else bias

    def _current_bias(self) -> torch.Tensor | None:
        """A bias that was pruned, parametrized or deleted is no parameter any more."""
        return self._parameters["bias"] if "bias" in self._parameters else getattr(self, "bias", None)

    def _require_memory(self) -> None:
        for name, tensor in (*self._parameters.items(), ("bias", self._current_bias())):
            if tensor is not None and tensor.numel() and not tensor.data_ptr():
                raise BadInput(f"{name} of {tensor.dtype} {list(tensor.shape)} on {tensor.device} has no memory")

    def multiplier(self) -> Multiplier:
        """The kernel side of this layer. The first call on a device puts the codes into the layout of its kernel for
        one row.

        Layers under accelerate's offloading keep row order, since its hooks put back what they took away.
        """
        current, tensors = self._current, list(self._parameters.values())
        if "bias" not in self._parameters:
            tensors.append(self._current_bias())
        if current is None or not current.holds(tensors):
            with _shuffling:  # two threads may meet at a layer's first call
                self._require_memory()
                packed = packed_of(*self.op_arguments())
                wanted = registry.layout_for(Problem.of(packed, 1, torch.float32))
                if packed.layout != wanted and not hasattr(self, "_hf_hook"):
                    self.codes.data = layout.convert_codes(self.codes.detach(), *packed.shape, wanted)
                    packed = packed_of(*self.op_arguments())
                current = self._current = CurrentMultiplier(tensors, Multiplier(packed, self._fused_bias()))
        return current.multiplier

    def kernel(self, m: int, dtype: torch.dtype = torch.float32) -> str:
        """Name of the kernel that runs for m rows."""
        return self.multiplier().choose(m, dtype)[0].name

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        compiling, bias = torch.compiler.is_compiling(), self._current_bias()
        trained = bias is not None and bias.requires_grad
        inside = None if trained else residual
        if (compiling or torch._C._is_any_autocast_enabled()) and not getattr(x, "is_meta", True):
            kind = x.device.type
            x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        codes = self._parameters["codes"]
        if compiling or needs_dispatcher(x, codes) or (residual is not None and needs_dispatcher(residual, codes)):
            require_tensors(x, residual)
            *tensors, spec = self.op_arguments()
            y = torch.ops.llmfp4.linear(x, *tensors, self._fused_bias(), spec, inside, self.gated)
        else:
            y = self.multiplier()(x, inside, self.gated)
        if not trained:
            return y
        y = y + bias.to(y.dtype)
        return y if residual is None else y + residual

    def reset_parameters(self):
        """Nothing to initialise: a fresh layer is all zeros until a checkpoint or a PackedFP4 fills it."""

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        text += f", recipe={self.recipe!r}"
        if self.codes.device.type == "meta":
            return text + ", on meta"
        try:
            kernel = self.kernel(1)
        except NoKernel as error:
            kernel = f"none ({error})"
        return text + f", {self.spec()['element']} x {self.spec()['activation'] or '16-bit'}, kernel={kernel}"
