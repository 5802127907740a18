"""x [m, k] → the operands of a product, rounded as llmfp4_kernels/reference.py rounds, bit by bit.

    integers   int8 [planes, m, padded k] = element(x · 2^shift · x_factor / x_scale / group) · integer_scale · group
                                            · 2^(max_shift - shift),       x_scale [m]: the worth of one unit of a sum
    floats     bf16 [m, padded k]         = element(..) · group · 2^-shift of any activation: exact in 8 bits
    E4M3       float8e4nv [m, padded k]   = element(..),              x_scale [m]: with the exponent of weights (fp8.py)
    parts      bf16 [parts, m, padded k]    that sum up to x · factor: exactly with three parts, to 2^-17 with two

bf16 has every element: its products with weights are exact, its sums fp32's.

A program per token, or per block of a token's inputs. A token with NaN or Inf becomes zeros of worth NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

PLANE_LIMIT, PLANE_UNIT = tl.constexpr(64), tl.constexpr(128)


@triton.jit
def _bits(v):
    return v.to(tl.int32, bitcast=True)


@triton.jit
def _special(v):
    """Whether v is NaN or Inf."""
    return (_bits(v) & 0x7F800000) == 0x7F800000


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(v, top, mantissa, least):
    """The element nearest to v, ties to the even step, at most `top`: mantissa bits, least normal exponent least.

    1.5 · 2^23 steps of v's binade are added and subtracted, which rounds to a whole step.
    """
    magnitude = tl.minimum(tl.abs(v), top)
    binade = tl.maximum(_bits(magnitude) & 0x7F800000, (127 + least) << 23)
    anchor = ((binade + ((23 - mantissa) << 23)) | 0x00400000).to(tl.float32, bitcast=True)
    whole = (magnitude + anchor) - anchor
    return (_bits(whole) | (_bits(v) & (-2147483647 - 1))).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(v):
    """float8e4nv of its value v: times 2^-120, fp32's exponent and first mantissa bits are E4M3's, of subnormals too.

    A cast would round again, and Triton 3.6.0 casts to fp16 on the way (cvt.rz.f16.f32)."""
    bits = _bits(v * 7.52316384526264e-37)
    return (((bits >> 20) & 0x7F) | ((bits >> 24) & 0x80)).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _nearest_integer(v):
    """|v| < 2^22, ties to even."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def _inputs(x, x_factor, token, at, k):
    """fp32 of x[token, at] · x_factor, 0 beyond k."""
    u = tl.load(x + token.to(tl.int64) * k + at, at < k, other=0).to(tl.float32)
    if x_factor is not None:
        u = u * tl.load(x_factor + at, at < k, other=0)
    return u


@triton.jit
def _error(v, factor, top, integer_scale, mantissa, least):
    """Σ over a group of squared errors in 1/64 of a unit, which are integers themselves."""
    exact = _nearest_integer(v * (integer_scale * 64)).to(tl.int32)
    inverse = tl.div_rn(1.0, factor)
    integer = (_rounded(v * inverse, top, mantissa, least) * (integer_scale * factor)).to(tl.int32)
    error = exact - integer * 64
    return tl.sum(error * error, 1)


@triton.jit
def _group_factor(v, x_scale, top, most, integer_scale, emax, mantissa, least, KIND: tl.constexpr):
    """fp32 [groups, 1]: the scale of each row of v [groups, group], which is u / x_scale ("e4m3": u itself)."""
    largest = tl.max(_bits(v) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)[:, None]
    if KIND == "e8m0":
        byte = ((_bits(largest) + (1 << 21)) >> 23) - emax
        byte = tl.where(largest > 0, tl.minimum(tl.maximum(byte, 0), 254), 127)
        factor = tl.where(byte == 0, 0x00400000, byte << 23).to(tl.float32, bitcast=True)
    elif KIND == "e4m3":
        wanted = tl.div_rn(tl.div_rn(largest, top), x_scale)
        factor = _rounded(tl.maximum(wanted, 0.001953125), 448.0, 3, -6)
    else:
        factor = tl.minimum(tl.maximum(tl.ceil(tl.div_rn(largest, top)), 1.0), most)
        below = tl.maximum(factor - 1.0, 1.0)
        gain = _error(v, factor, top, integer_scale, mantissa, least)
        gain -= _error(v, below, top, integer_scale, mantissa, least)
        factor = tl.where(gain[:, None] > 0, below, factor)
    return factor


@triton.jit(do_not_specialize=["m", "mantissa", "least", "emax", "shift_top"])
def quantize(
    x, operands, x_scale, shift, x_factor, static_scale, unit, top, reach, most, integer_scale, scale_out,
    mantissa, least, emax, shift_top, m, k, padded_k,
    STATIC: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [m, k] of any dtype → operands [PLANES, m, padded_k] of int8, E4M3 or bf16, x_scale fp32 [m]. Grid: tokens.

    STATIC: the scale is static_scale, else the token's largest / reach; KIND of groups: "none", "integer", "e4m3",
    "e8m0" (scale 1). Of the element: top, the largest; most, the largest integer factor of a group; integer_scale;
    mantissa bits, least normal and largest exponent. Operands are elements times scale_out and their group's factor;
    with a shift, integers carry 2^(shift_top - shift), floats (shift_top 0) 2^-shift.
    """
    token = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    integer: tl.constexpr = operands.dtype.element_ty == tl.int8
    largest_bits = tl.zeros([BLOCK], tl.int32)
    for first in range(0, k, BLOCK):
        u = _inputs(x, x_factor, token, first + offsets, k)
        largest_bits = tl.maximum(largest_bits, _bits(u) & 0x7FFFFFFF)
    largest = tl.max(largest_bits, 0)
    special = largest >= 0x7F800000
    if STATIC:
        scale = static_scale
    elif KIND == "e8m0":
        scale = tl.full([], 1.0, tl.float32)
    else:
        scale = tl.div_rn(tl.maximum(largest.to(tl.float32, bitcast=True), 7.888609052210118e-31), reach)  # 2^-100
    inverse = tl.div_rn(1.0, scale)
    tl.store(x_scale + token, tl.where(special, float("nan"), scale * unit))
    row = operands + token.to(tl.int64) * padded_k
    for first in range(0, padded_k, BLOCK):
        at = first + offsets
        u = _inputs(x, x_factor, token, at, k)
        u = tl.where(special, 0.0, u)
        if KIND == "none":
            if shift is not None:
                exponent = tl.load(shift + at, at < k, other=0).to(tl.int32)
                v = _rounded(u * (inverse * _power_of_two(exponent)), top, mantissa, least)
                v = v * (scale_out * _power_of_two(shift_top - exponent))
            else:
                v = _rounded(u * inverse, top, mantissa, least) * scale_out
        else:
            measured = (u if KIND == "e4m3" else u * inverse).reshape(BLOCK // GROUP, GROUP)
            factor = _group_factor(measured, scale, top, most, integer_scale, emax, mantissa, least, KIND)
            v = (u * inverse).reshape(BLOCK // GROUP, GROUP)
            v = _rounded(v * tl.div_rn(1.0, factor), top, mantissa, least) * (scale_out * factor)
            v = v.reshape(BLOCK)
        if integer:
            whole = v.to(tl.int32)
            if PLANES == 2:
                # Only E3M0 with a shift: single powers of two up to 64 · 2^7, so one plane of each is zero.
                far = (whole > PLANE_LIMIT) | (whole < -PLANE_LIMIT)
                high = tl.where(far, whole // PLANE_UNIT, 0).to(tl.int8)
                tl.store(row + tl.cast(m, tl.int64) * padded_k + at, high, at < padded_k)
                whole = tl.where(far, 0, whole)
            tl.store(row + at, whole.to(tl.int8), at < padded_k)
        else:
            if operands.dtype.element_ty == tl.float8e4nv:
                v = _e4m3(v)
            tl.store(row + at, v.to(operands.dtype.element_ty), at < padded_k)


@triton.jit(do_not_specialize=["m"])
def split(x, parts, factor, m, k, padded_k, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """x [m, k] · factor [k] → parts bf16 [PARTS, m, padded_k]; one part without a factor is x itself, padded, in its
    own dtype. Grid: tokens, blocks of inputs."""
    token = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = parts + token.to(tl.int64) * padded_k
    if PARTS == 1:
        tl.store(row + at, tl.load(x + token.to(tl.int64) * k + at, at < k, other=0), at < padded_k)
    else:
        rest = _inputs(x, factor, token, at, k)
        for part in tl.static_range(PARTS):
            nearest = rest.to(tl.bfloat16)
            # Beyond bf16's largest number that is Inf: the one before it, and a rest, are exact.
            beyond = _special(nearest.to(tl.float32)) & (_special(rest) == 0)
            nearest = (nearest.to(tl.int16, bitcast=True) - beyond.to(tl.int16)).to(tl.bfloat16, bitcast=True)
            tl.store(row + part * tl.cast(m, tl.int64) * padded_k + at, nearest, at < padded_k)
            whole = nearest.to(tl.float32)
            rest = tl.where(_special(whole), 0.0, rest - whole)
