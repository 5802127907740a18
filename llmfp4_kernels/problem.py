"""What a kernel is asked (Problem) and what a row of the registry says about itself (Kernel)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from .formats import Element, Scale
from .packed import PackedFP4


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

    @staticmethod
    def of(packed: PackedFP4, m: int, dtype: torch.dtype) -> Problem:
        """The problem of m rows of `dtype` meeting `packed`."""
        n, k = packed.shape
        return Problem(
            m, n, k, packed.element, packed.activation, packed.scale, packed.group_size,
            packed.shift is not None, dtype, packed.codes.device.type,
        )  # fmt: skip

    @property
    def scheme(self) -> str:
        return "W4A4" if self.activation else "W4A16"


class Prepared(Protocol):
    """A weight in the layout of a backend, ready to multiply."""

    def run(self, kernel: Kernel, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] → y [..., n] of x's dtype."""


@dataclass(frozen=True)
class Kernel:
    """One row of the registry."""

    name: str
    layout: str
    """Layout of the codes it reads: "row" or "tiled"."""
    refusal: Callable[[Problem], str | None]
    """None, or a sentence with the numbers that make this kernel decline."""
    prepare: Callable[[PackedFP4, torch.Tensor | None], Prepared]
    """From a weight in `layout` and a bias [n]; rows that share a layout share the result."""
