"""Number formats and recipes as records. This file imports nothing of the package but its errors.

Y[m,n] = x_scale[m] · row_scale[n] · Σ_k X[m,k] · 2^(-shift[k]) · element(code[n,k]) · group_scale[n, k/G] + bias[n]

A static activation is X = element(x_code), x_scale one number. A dynamic one is X = element(x_code) · x_group[m, k/Gx],
with x_scale per token; both stand for x · x_factor[k], x being the layer's input.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import BadInput

INT8_MAX = 127
INTEGER_GROUP_MAX = 256
"""Activations in a group with an integer scale: kernels sum the squares of their errors in int32."""


@dataclass(frozen=True)
class Element:
    """A small float without Inf: 1 sign bit, E exponent bits, M mantissa bits.

    With exponent field p and mantissa field f (LLM-FP4 eq. 9; OCP MX spec 1.0 section 5.3.3 for E2M1):

        p = 0:  ± f · 2^(1 - bias - M)            p ≥ 1:  ± (2^M + f) · 2^(p - bias - M)

    The code is sign << (E+M) | p << M | f. LLM-FP4 writes a real-valued bias b~ instead of `bias`;
    that is the same grid times the real scale 2^(bias - b~). The largest `nan_codes` magnitudes are NaN: none in
    LLM-FP4's floats, one in OCP's E4M3.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    nan_codes: int = 0

    @property
    def fields(self) -> tuple[int, int, int, int]:
        """What csrc/core/element.h knows of it."""
        return self.exponent_bits, self.mantissa_bits, self.bias, self.nan_codes

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def sign_code(self) -> int:
        """Code of -0, the bit that negates."""
        return 1 << (self.bits - 1)

    def magnitude(self, code: int) -> float:
        """The value of a code without its sign bit."""
        if code >= self.sign_code - self.nan_codes:
            return math.nan
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
        return self.magnitude(self.sign_code - self.nan_codes - 1)

    @property
    def integer_scale(self) -> int:
        """Smallest power of two that turns every value into an integer: 2·E2M1 ≤ 12, 2·E1M2 ≤ 7, 4·E3M0 ≤ 64."""
        return 1 << (self.bias + self.mantissa_bits - 1)

    @property
    def max_integer(self) -> int:
        """The largest value times integer_scale."""
        return int(self.max * self.integer_scale)

    @property
    def max_factor(self) -> int:
        """The largest integer that this element, as an integer, can be multiplied by within int8: E2M1 10, E1M2 18."""
        return INT8_MAX // self.max_integer

    @property
    def max_shift(self) -> int:
        """Largest pre-shifted exponent bias of an activation in this format: 2^E - 1 (LLM-FP4 eq. 15)."""
        return (1 << self.exponent_bits) - 1


_ELEMENT_NAME = re.compile(r"e([1-7])m([0-6])")
E4M3FN = Element("e4m3fn", 4, 3, 7, nan_codes=1)
"""OCP FP8 E4M3, torch.float8_e4m3fn: up to 448. "e4m3", as LLM-FP4 has it, goes up to 480."""


def element(name: str) -> Element:
    """The element called `name` ("e2m1"), with the IEEE-style bias 2^(E-1) - 1 (0 for E1).

    Raises BadInput for anything that is neither a 4-, 6- or 8-bit eXmY nor "e4m3fn".
    """
    if name == E4M3FN.name:
        return E4M3FN
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
        raise BadInput(f"no formats to search at {bits!r} bits: expected 4, 6 or 8")
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
    """A kind of group scale, stored in one byte per group (OCP MX spec 1.0 section 5.4; OCP FP8 spec for E4M3).

    "integer" is the byte itself: a multiple of the token's unit, so that a group's values stay integers.
    """

    name: str

    @property
    def values(self) -> list[float]:
        """The value of all 256 bytes; NaN bytes are refused when a tensor is made."""
        decode = {"e8m0": _e8m0, "e4m3": _e4m3, "integer": float}[self.name]
        return [decode(byte) for byte in range(256)]


E8M0, E4M3, INTEGER = Scale("e8m0"), Scale("e4m3"), Scale("integer")
SCALES = {s.name: s for s in (E8M0, E4M3)}
"""What the groups of a weight may have."""
X_SCALES = SCALES | {INTEGER.name: INTEGER}
"""What the groups of a dynamic activation may have."""


@dataclass(frozen=True)
class Dynamic:
    """Activation scales taken at run time: one per token, and one for each group of channels within it if asked.

    Without groups and with "integer" ones (1 ≤ integer ≤ element.max_factor, groups of at most INTEGER_GROUP_MAX) a
    product with weights of one scale per row is a sum of int8 products, exact in int32. "e4m3" groups are NVFP4's,
    "e8m0" groups MXFP4's, which have no scale per token.
    """

    group_size: int = 0
    group_scale: Scale | None = None

    def __post_init__(self):
        if (self.group_scale is None) != (self.group_size == 0) or self.group_size < 0:
            raise BadInput(f"group_size = {self.group_size} and group_scale {self.group_scale} belong together")
        if self.group_scale == INTEGER and self.group_size > INTEGER_GROUP_MAX:
            raise BadInput(f"integer groups hold at most {INTEGER_GROUP_MAX} activations, got {self.group_size}")

    @property
    def integer(self) -> bool:
        return self.group_scale in (None, INTEGER)

    def largest_integer(self, element: Element) -> int:
        """What the largest activation of a token becomes, in units of the integer product."""
        return element.max_integer * (element.max_factor if self.group_scale == INTEGER else 1)


def int8_planes(activation: Element | None, dynamic: Dynamic | None, shift: bool) -> int:
    """How many int8 numbers hold one activation as an integer: 1; 2 for E3M0 with a shift; 0 where it is none."""
    if activation is None:
        return 0
    if dynamic is not None:
        return int(dynamic.integer and 0 < dynamic.largest_integer(activation) <= INT8_MAX)
    if activation.max_integer << (activation.max_shift if shift else 0) <= INT8_MAX:
        return 1
    return 2 if activation.bits == 4 else 0


def is_integer_product(activation: Element | None, scale: Scale | None, dynamic: Dynamic | None, shift: bool) -> bool:
    """Whether a product of such activations and weights (group scale `scale`) is one sum of integers."""
    return scale is None and int8_planes(activation, dynamic, shift) > 0


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
    dynamic: Dynamic | None = None
    """Activations get their scales at run time; None: one static x_scale from calibration."""
    error_feedback: bool = False
    """Round the weights one input channel after the other, each error made good by the channels to come (GPTQ)."""
    smoothing: bool = False
    """Search factors per input channel that move part of the activations' range into the weights (x_factor)."""
    source: str = ""

    @property
    def needs_gram(self) -> bool:
        """Whether X'X over all calibration tokens decides the weight: where activations are not searched beside it."""
        return self.error_feedback or (self.search and not self.activation_elements)

    @property
    def needs_calibration(self) -> bool:
        return self.search or self.error_feedback or (bool(self.activation_elements) and self.dynamic is None)


_PAPER, _MX = "LLM-FP4, arXiv 2310.16836", "OCP MX spec 1.0"
_FP4, _FP8 = searched_elements(4), searched_elements(8)
_FP8_E4M3, _INT8 = element("e4m3"), element("e1m6")
_MXFP4 = dict(weight_elements=(E2M1,), group_size=32, group_scale=E8M0, source=_MX)
_NVFP4 = dict(weight_elements=(E2M1,), group_size=16, group_scale=E4M3, tensor_scale=True, source="NVIDIA NVFP4")
_INT4 = dict(weight_elements=(E1M2,), group_size=128, group_scale=E4M3, source="symmetric INT4, codes -7..7")
_GPTQ = dict(weight_elements=(E2M1, E1M2), error_feedback=True, smoothing=True, source="GPTQ, arXiv 2210.17323")
_TOKEN = Dynamic()
RECIPES = {
    r.name: r
    for r in (
        Recipe("llm-fp4", _FP4, _FP4, search=True, preshift=True, source=_PAPER),
        Recipe("llm-fp4-a8", _FP4, _FP8, search=True, preshift=True, source=f"{_PAPER}, rows 4/4/8"),
        Recipe("llm-fp4-a16", _FP4, search=True, source=f"{_PAPER}, rows 4/4/16"),
        Recipe("llm-fp4-baseline", _FP4, _FP4, search=True, source=f"{_PAPER}, FPQ baseline"),
        Recipe("llm-fp4-baseline-a8", _FP4, _FP8, search=True, source=f"{_PAPER}, FPQ baseline, rows 4/4/8"),
        Recipe("gptq-fp4-a4", activation_elements=(E2M1,), dynamic=Dynamic(16, INTEGER), **_GPTQ),
        Recipe("gptq-fp4-a8", activation_elements=(_INT8,), dynamic=_TOKEN, **_GPTQ),
        Recipe("gptq-fp4-a8-fp8", activation_elements=(E4M3FN,), dynamic=_TOKEN, **_GPTQ),
        Recipe("gptq-fp4-a16", **_GPTQ),
        Recipe("minmax-w4a4", (E2M1,), (E2M1,), source=f"{_PAPER}, MinMax FP baseline"),
        Recipe("minmax-w4a8", (E2M1,), (_FP8_E4M3,), source=f"{_PAPER}, MinMax FP baseline, rows 4/4/8"),
        Recipe("minmax-w4a16", (E2M1,), source=f"{_PAPER}, MinMax FP baseline, rows 4/4/16"),
        Recipe("minmax-int-w4a4", (E1M2,), (E1M2,), source=f"{_PAPER}, MinMax INT baseline"),
        Recipe("minmax-int-w4a8", (E1M2,), (_INT8,), source=f"{_PAPER}, MinMax INT baseline, rows 4/4/8"),
        Recipe("minmax-int-w4a16", (E1M2,), source=f"{_PAPER}, MinMax INT baseline, rows 4/4/16"),
        Recipe("mxfp4", **_MXFP4),
        Recipe("mxfp4-a8", activation_elements=(_FP8_E4M3,), dynamic=Dynamic(32, E8M0), **_MXFP4),
        Recipe("mxfp4-a8-int", activation_elements=(_INT8,), dynamic=_TOKEN, **_MXFP4),
        Recipe("mxfp4-a8-fp8", activation_elements=(E4M3FN,), dynamic=_TOKEN, **_MXFP4),
        Recipe("mxfp4-a4", activation_elements=(E2M1,), dynamic=Dynamic(32, E8M0), **_MXFP4),
        Recipe("nvfp4", **_NVFP4),
        Recipe("nvfp4-a8", activation_elements=(_FP8_E4M3,), dynamic=_TOKEN, **_NVFP4),
        Recipe("nvfp4-a8-int", activation_elements=(_INT8,), dynamic=_TOKEN, **_NVFP4),
        Recipe("nvfp4-a4", activation_elements=(E2M1,), dynamic=Dynamic(16, E4M3), **_NVFP4),
        Recipe("int4", **_INT4),
        Recipe("int4-a8", activation_elements=(_INT8,), dynamic=_TOKEN, **_INT4),
        Recipe("int4-a4", activation_elements=(E1M2,), dynamic=_TOKEN, **_INT4),
    )
}


def recipe(name: str | Recipe) -> Recipe:
    """The recipe called `name`, or the Recipe given; raises BadInput with the known names otherwise."""
    if isinstance(name, Recipe):
        return name
    if not isinstance(name, str) or name not in RECIPES:
        raise BadInput(f"unknown recipe {name!r}: known are {', '.join(RECIPES)}")
    return RECIPES[name]
