"""Number formats and recipes as records. This file imports nothing of the package but its errors.

Y[m,n] = x_scale[m] · row_scale[n] · Σ_k X[m,k] · 2^(-shift[k]) · element(code[n,k]) · group_scale[n, k/G] + bias[n]
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import BadInput


@dataclass(frozen=True)
class Element:
    """A small float without Inf and NaN: 1 sign bit, E exponent bits, M mantissa bits.

    With exponent field p and mantissa field f (LLM-FP4 eq. 9; OCP MX spec 1.0 section 5.3.3 for E2M1):

        p = 0:  ± f · 2^(1 - bias - M)            p ≥ 1:  ± (2^M + f) · 2^(p - bias - M)

    The code is sign << (E+M) | p << M | f. LLM-FP4 writes a real-valued bias b~ instead of `bias`;
    that is the same grid times the real scale 2^(bias - b~).
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def sign_code(self) -> int:
        """Code of -0, the bit that negates."""
        return 1 << (self.bits - 1)

    def magnitude(self, code: int) -> float:
        """The value of a code without its sign bit."""
        p, f = divmod(code, 1 << self.mantissa_bits)
        if p == 0:
            return math.ldexp(f, 1 - self.bias - self.mantissa_bits)
        return math.ldexp((1 << self.mantissa_bits) + f, p - self.bias - self.mantissa_bits)

    @property
    def magnitudes(self) -> list[float]:
        return [self.magnitude(code) for code in range(self.sign_code)]

    @property
    def values(self) -> list[float]:
        """The value of every code, in code order; code `sign_code` is -0.0."""
        return self.magnitudes + [-v for v in self.magnitudes]

    @property
    def max(self) -> float:
        return self.magnitude(self.sign_code - 1)

    @property
    def integer_scale(self) -> int:
        """Smallest power of two that turns every value into an integer: 2·E2M1 ≤ 12, 2·E1M2 ≤ 7, 4·E3M0 ≤ 64."""
        return 1 << (self.bias + self.mantissa_bits - 1)

    @property
    def max_shift(self) -> int:
        """Largest pre-shifted exponent bias of an activation in this format: 2^E - 1 (LLM-FP4 eq. 15)."""
        return (1 << self.exponent_bits) - 1


_ELEMENT_NAME = re.compile(r"e([1-7])m([0-6])")


def element(name: str) -> Element:
    """The element called `name` ("e2m1"), with the IEEE-style bias 2^(E-1) - 1 (0 for E1).

    Raises BadInput for anything that is not a 4-, 6- or 8-bit eXmY.
    """
    match = _ELEMENT_NAME.fullmatch(name)
    if match:
        exponent_bits, mantissa_bits = int(match[1]), int(match[2])
        if 1 + exponent_bits + mantissa_bits in (4, 6, 8):
            return Element(name, exponent_bits, mantissa_bits, (1 << (exponent_bits - 1)) - 1)
    raise BadInput(f"unknown element {name!r}: expected eXmY with 4, 6 or 8 bits in all, such as 'e2m1'")


E2M1, E1M2, E3M0 = element("e2m1"), element("e1m2"), element("e3m0")
FP4_ELEMENTS = {e.name: e for e in (E2M1, E1M2, E3M0)}


def searched_elements(bits: int) -> tuple[Element, ...]:
    """The formats LLM-FP4 searches among at a bit width (paper section 4.1 and the release's 8-bit list)."""
    names = {4: "e3m0 e2m1 e1m2", 6: "e5m0 e4m1 e3m2 e2m3 e1m4", 8: "e5m2 e4m3 e3m4 e2m5 e1m6"}
    if bits not in names:
        raise BadInput(f"no formats to search at {bits} bits: expected 4, 6 or 8")
    return tuple(element(name) for name in names[bits].split())


def _e8m0(byte: int) -> float:
    return math.nan if byte == 255 else math.ldexp(1.0, byte - 127)


def _e4m3(byte: int) -> float:
    sign, p, f = byte >> 7, byte >> 3 & 15, byte & 7
    if p == 15 and f == 7:
        return math.nan
    magnitude = math.ldexp(f, -9) if p == 0 else math.ldexp(8 + f, p - 10)
    return -magnitude if sign else magnitude


@dataclass(frozen=True)
class Scale:
    """A kind of group scale, stored in one byte per group (OCP MX spec 1.0 section 5.4; OCP FP8 spec for E4M3)."""

    name: str

    @property
    def values(self) -> list[float]:
        """The value of all 256 bytes; NaN bytes are refused when a tensor is made."""
        decode = {"e8m0": _e8m0, "e4m3": _e4m3}[self.name]
        return [decode(byte) for byte in range(256)]


E8M0, E4M3 = Scale("e8m0"), Scale("e4m3")
SCALES = {s.name: s for s in (E8M0, E4M3)}


@dataclass(frozen=True)
class Recipe:
    """How a linear layer is quantized: which elements, which scales, what the activations are."""

    name: str
    weight_elements: tuple[Element, ...]
    """More than one: the one with the least output error is chosen per layer."""
    activation_elements: tuple[Element, ...] = ()
    """Empty: activations stay in 16 or 32 bits (W4A16)."""
    search: bool = False
    """Search row scales (and x_scale, shift) by output error; otherwise they come from the largest magnitude."""
    preshift: bool = False
    """LLM-FP4's pre-shifted exponent bias: one small integer shift per input channel."""
    group_size: int = 0
    group_scale: Scale | None = None
    tensor_scale: bool = False
    """One fp32 scale for the whole tensor, broadcast into row_scale (NVFP4)."""
    source: str = ""

    @property
    def needs_calibration(self) -> bool:
        return self.search or bool(self.activation_elements)


_SEARCHED = searched_elements(4)
RECIPES = {
    r.name: r
    for r in (
        Recipe("llm-fp4", _SEARCHED, _SEARCHED, search=True, preshift=True, source="LLM-FP4, arXiv 2310.16836"),
        Recipe("llm-fp4-a16", _SEARCHED, search=True, source="LLM-FP4, arXiv 2310.16836, rows 4/4/16"),
        Recipe("minmax-w4a4", (E2M1,), (E2M1,), source="LLM-FP4, arXiv 2310.16836, MinMax FP baseline"),
        Recipe("mxfp4", (E2M1,), group_size=32, group_scale=E8M0, source="OCP MX spec 1.0"),
        Recipe("nvfp4", (E2M1,), group_size=16, group_scale=E4M3, tensor_scale=True, source="NVIDIA NVFP4"),
        Recipe("int4", (E1M2,), group_size=128, group_scale=E4M3, source="symmetric INT4, codes -7..7"),
    )
}


def recipe(name: str | Recipe) -> Recipe:
    """The recipe called `name`, or the Recipe given; raises BadInput with the known names otherwise."""
    if isinstance(name, Recipe):
        return name
    if not isinstance(name, str) or name not in RECIPES:
        raise BadInput(f"unknown recipe {name!r}: known are {', '.join(RECIPES)}")
    return RECIPES[name]
