"""What a kernel is asked (Problem) and what a row of the registry says about itself (Kernel)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from .formats import E2M1, Dynamic, Element, Recipe, Scale, int8_planes, is_integer_product
from .packed import PackedFP4

FORCE = "LLMFP4_KERNEL"
"""Environment variable that names the kernel to run, or a family: all rows up to the dot."""


def _usual(elements: tuple[Element, ...]) -> Element | None:
    return E2M1 if E2M1 in elements else next(iter(elements), None)


@dataclass(frozen=True)
class Problem:
    """Y [m, n] = X [m, k] times a packed weight. `activation` None means X stays in `dtype` (W4A16)."""

    m: int
    n: int
    k: int
    element: Element
    activation: Element | None = None
    scale: Scale | None = None
    group_size: int = 0
    shift: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    dynamic: Dynamic | None = None
    x_factor: bool = False
    device_index: int | None = None
    """Of the tensors' GPU; None: the current one."""
    scale_span: int = 0
    """PackedFP4.scale_span of a weight that meets quantized activations."""

    @staticmethod
    def of(packed: PackedFP4, m: int, dtype: torch.dtype) -> Problem:
        """The problem of m rows of `dtype` meeting `packed`."""
        n, k = packed.shape
        return Problem(
            m, n, k, packed.element, packed.activation, packed.scale, packed.group_size,
            packed.shift is not None, dtype, packed.codes.device.type, packed.dynamic, packed.x_factor is not None,
            packed.codes.device.index, packed.scale_span if packed.activation else 0,
        )  # fmt: skip

    @staticmethod
    def of_recipe(
        recipe: Recipe, m: int, n: int, k: int, element=None, activation=None, dtype=torch.float32, device="cpu"
    ) -> Problem:
        """The problem of m rows meeting a weight of a recipe; elements are E2M1 or else its first ones if not given."""
        return Problem(
            m, n, k, element or _usual(recipe.weight_elements), activation or _usual(recipe.activation_elements),
            recipe.group_scale, recipe.group_size, recipe.preshift and bool(recipe.activation_elements), dtype, device,
            recipe.dynamic, recipe.smoothing,
        )  # fmt: skip

    @property
    def integer(self) -> bool:
        """Whether the product is one sum of integers."""
        return is_integer_product(self.activation, self.scale, self.dynamic, self.shift)

    @property
    def grouped(self) -> bool:
        """Whether it is one sum of int8 products for each group of weights, times the group's scale."""
        return self.scale is not None and int8_planes(self.activation, self.dynamic, self.shift) == 1

    @property
    def scheme(self) -> str:
        return f"W4A{self.activation.bits}" if self.activation else "W4A16"


FewRows = Callable[[torch.Tensor], "torch.Tensor | None"]


class Prepared(Protocol):
    """A weight in the layout of a backend, ready to multiply."""

    def run(self, kernel: Kernel, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] → y [..., n] of x's dtype.

        `few_rows(kernel, m, dtype)`, if there is one, returns None or f: f(x) is the same for m rows of this dtype, and
        for what it was asked for before; for any other x it is None.
        """


@dataclass(frozen=True)
class Kernel:
    """One row of the registry."""

    name: str
    layout: str
    """Layout of the codes it reads: "row", "tiled" or "units"."""
    refusal: Callable[[Problem], str | None]
    """None, or a sentence with the numbers that make this kernel decline."""
    prepare: Callable[[PackedFP4, torch.Tensor | None], Prepared]
    """From a weight in `layout` and a bias [n]; rows that share a layout share the result."""
    fuses_epilogue: bool = False
    """Its `run` takes (kernel, x, residual, gated), see ops.linear. Behind others epilogue.py follows, in fp32."""
