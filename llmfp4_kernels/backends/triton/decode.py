"""Bytes of layout "pairs" → the operands of two products, by table lookup: the low nibbles' outputs and the high ones'.

    byte = code of output p | code of output p + half << 4        → low, high, each of the bytes' shape

Nothing is joined: each nibble has a product of its own, and both meet the same activations. Every lookup is written
twice: as PTX, where one byte permute looks up four codes, and in Triton's own operations, which the interpreter and
GPUs without PTX take.

The table stands in the PTX as immediates. As arguments it would be one kernel for all elements, but Triton moves only
what depends on loads alone to where the tensor cores' registers want it, and sends the rest through shared memory.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from ...formats import Element

# Names in braces are filled in by `lookup`; $0 (and $1, of 16 bits) are results, then come four bytes of codes.
_INT8 = """
{{
.reg .b32 codes, upper, a, b, c, d, positive, negative, signs;
and.b32 codes, $1, 0x77777777;
shr.u32 upper, codes, 16;
prmt.b32 a, {table[0]}, {table[1]}, codes;
prmt.b32 b, {table[0]}, {table[1]}, upper;
prmt.b32 c, {table[2]}, {table[3]}, codes;
prmt.b32 d, {table[2]}, {table[3]}, upper;
shl.b32 signs, $1, {shift};
prmt.b32 signs, signs, 0, 0xba98;
prmt.b32 positive, a, b, {nibbles};
prmt.b32 negative, c, d, {nibbles};
lop3.b32 $0, signs, negative, positive, 0xca;
}}
"""
_16_BITS = """
{{
.reg .b32 codes, upper, a, b, high, low, signs;
and.b32 codes, $2, 0x77777777;
shr.u32 upper, codes, 16;
prmt.b32 a, {table[0]}, {table[1]}, codes;
prmt.b32 b, {table[0]}, {table[1]}, upper;
prmt.b32 high, a, b, {nibbles};
shl.b32 signs, $2, {shift};
lop3.b32 high, high, signs, 0x80808080, 0xf8;
prmt.b32 a, {table[2]}, {table[3]}, codes;
prmt.b32 b, {table[2]}, {table[3]}, upper;
prmt.b32 low, a, b, {nibbles};
prmt.b32 $0, low, high, 0x5140;
prmt.b32 $1, low, high, 0x7362;
}}
"""
_FP8 = """
{{
.reg .b32 codes, upper, a, b, signs;
and.b32 codes, $1, 0x77777777;
shr.u32 upper, codes, 16;
prmt.b32 a, {table[0]}, {table[1]}, codes;
prmt.b32 b, {table[0]}, {table[1]}, upper;
prmt.b32 a, a, b, {nibbles};{lower}
shl.b32 signs, $1, {shift};
lop3.b32 $0, a, signs, 0x80808080, 0xf8;
}}
"""
_LOWER = """
add.u32 b, a, 0x7f7f7f7f;
prmt.b32 b, b, 0, 0xba98;
and.b32 b, b, $2;
sub.u32 a, a, b;"""
# Bytes of a that are not 0 lose those of $2, which are no larger: none borrows from its neighbour.
REGISTERS_8, REGISTERS_16 = tl.constexpr("=r,r"), tl.constexpr("=r,=r,r")
REGISTERS_LOWERED = tl.constexpr("=r,r,r")


@dataclasses.dataclass(frozen=True)
class Lookup:
    """What `decode` is given as constants: a table of words, and the PTX for each nibble, or None."""

    table: tuple[int, ...]
    low: str | None
    high: str | None


def lookup(element: Element, dtype: torch.dtype, ptx: bool, exponent: int = 0) -> Lookup:
    """Of int8 operands, the words hold the eight magnitudes times integer_scale, then their negatives; of fp16 and bf16
    operands the eight high bytes, then the low ones (which are 0 in fp16, and ptxas drops them); of E4M3 operands the
    magnitudes times 2^exponent, which scales of groups lower if it is not 0, in two words."""
    magnitudes = torch.tensor(element.magnitudes)
    if dtype == torch.int8:
        first = (magnitudes * element.integer_scale).to(torch.int8)
        halves, text = (first, -first), _INT8
    elif dtype == torch.float8_e4m3fn:
        halves, text = ((magnitudes * 2**exponent).to(dtype),), _FP8
    else:
        bits = magnitudes.to(dtype).view(torch.int16).int()
        halves, text = ((bits >> 8).to(torch.uint8), (bits & 255).to(torch.uint8)), _16_BITS
    table = tuple(word for half in halves for word in half.view(torch.int32).tolist())
    if not ptx:
        return Lookup(table, None, None)
    words = [hex(word & 0xFFFFFFFF) for word in table]
    lower = _LOWER if exponent else ""
    low = text.format(table=words, nibbles="0x6420", shift=4, lower=lower)
    return Lookup(table, low, text.format(table=words, nibbles="0x7531", shift=0, lower=lower))


@triton.jit
def _entry(codes, first: tl.constexpr, second: tl.constexpr):
    """Byte `codes` & 7 of a table of two words."""
    index = codes & 7
    return (tl.where(index < 4, first, second) >> ((index & 3) * 8)) & 255


@triton.jit
def _values(codes, lowered, dtype: tl.constexpr, TABLE: tl.constexpr):
    """What the low four bits of `codes` (int32) stand for."""
    first = _entry(codes, TABLE[0], TABLE[1])
    if dtype == tl.float8e4nv:
        if lowered is not None:
            first = tl.where(first != 0, first - lowered, 0)
        return ((codes & 8) << 4 | first).to(tl.uint8).to(dtype, bitcast=True)
    elif dtype == tl.int8:
        second = _entry(codes, TABLE[2], TABLE[3])
        return tl.where((codes & 8) != 0, second, first).to(tl.int8)
    else:
        second = _entry(codes, TABLE[2], TABLE[3])
        return ((codes & 8) << 12 | first << 8 | second).to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def decode(
    bytes, low_lowered, high_lowered, dtype: tl.constexpr, TABLE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr
):
    """(low, high) of `dtype` (int8 times integer_scale, E4M3, fp16 or bf16): the values that the nibbles stand for.

    lowered: None, or of E4M3 uint8 of the bytes' shape, multiples of 8: 8 times what is taken off the exponents.
    """
    if LOW is None:
        codes = bytes.to(tl.int32)
        low, high = _values(codes, low_lowered, dtype, TABLE), _values(codes >> 4, high_lowered, dtype, TABLE)
    elif dtype == tl.int8:
        low = tl.inline_asm_elementwise(LOW, REGISTERS_8, [bytes], tl.int8, True, 4)
        high = tl.inline_asm_elementwise(HIGH, REGISTERS_8, [bytes], tl.int8, True, 4)
    elif low_lowered is not None:
        low = tl.inline_asm_elementwise(LOW, REGISTERS_LOWERED, [bytes, low_lowered], tl.float8e4nv, True, 4)
        high = tl.inline_asm_elementwise(HIGH, REGISTERS_LOWERED, [bytes, high_lowered], tl.float8e4nv, True, 4)
    elif dtype == tl.float8e4nv:
        low = tl.inline_asm_elementwise(LOW, REGISTERS_8, [bytes], tl.float8e4nv, True, 4)
        high = tl.inline_asm_elementwise(HIGH, REGISTERS_8, [bytes], tl.float8e4nv, True, 4)
    elif dtype == tl.float16:
        low = tl.inline_asm_elementwise(LOW, REGISTERS_16, [bytes], tl.float16, True, 4)
        high = tl.inline_asm_elementwise(HIGH, REGISTERS_16, [bytes], tl.float16, True, 4)
    else:
        low = tl.inline_asm_elementwise(LOW, REGISTERS_16, [bytes], tl.bfloat16, True, 4)
        high = tl.inline_asm_elementwise(HIGH, REGISTERS_16, [bytes], tl.bfloat16, True, 4)
    return low, high


@triton.jit
def decode_scale(bytes, dtype: tl.constexpr, SCALE: tl.constexpr):
    """Group scales of `dtype` (16 bits) from uint8: E4M3, or E8M0 relative to its row's largest (bytes up to 127).
    For E4M3 operands, what E8M0 takes off their exponents, as `decode` wants it.

    E4M3's exponent and mantissa, put where the wider format's lowest exponent and highest mantissa bits are, are the
    value times a power of two, subnormals included. fp16 holds E8M0 down to 2^-24, and 0 below.
    """
    byte = bytes.to(tl.int32)
    if dtype == tl.float8e4nv:
        return ((127 - byte) * 8).to(tl.uint8)
    elif SCALE == "e4m3":
        bits = (byte & 0x7F) << 20 | (byte & 0x80) << 24
        return (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(dtype)  # 2^120
    elif dtype == tl.float16:
        exponent = byte - 127
        subnormal = tl.where(exponent >= -24, 1 << tl.maximum(tl.minimum(exponent + 24, 9), 0), 0)
        bits = tl.where(exponent >= -14, (exponent + 15) << 10, subnormal)
        return bits.to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        return tl.where(byte == 0, 0x40, byte << 7).to(tl.uint16).to(tl.bfloat16, bitcast=True)
