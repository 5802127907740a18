"""y = epilogue(Σ_k x[token, k] · weight[output, k]) in tiles, weights as the first operand, and the sum of splits.

A program takes `rows` rows of codes, that is outputs p and p + half, by `tokens` tokens. Where blocks share a sum over
k, each keeps its part, and a second kernel adds them in order: the same bits in every run, no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import decode, decode_scale

PLANE_WEIGHT = tl.constexpr(128)
"""Of the second int8 plane of an integer operand."""
FENCE_TEXT = tl.constexpr("{ fence.proxy.async.shared::cta; mov.b32 $0, $1; }")
REGISTERS = tl.constexpr("=r,r")


@triton.jit
def _scaled(sum, plane, x_scale, row_scale, bias, PLANES: tl.constexpr):
    """fp32 of (sum · x_scale) · row_scale + bias, each step rounded: reference.gemm's order."""
    if PLANES == 2:
        value = (sum.to(tl.int64) + PLANE_WEIGHT * plane.to(tl.int64)).to(tl.float32)
    else:
        value = sum.to(tl.float32)
    if x_scale is not None:
        value = value * x_scale
    value = value * row_scale
    if bias is not None:
        value = value + bias
    return value


@triton.jit
def _leave(sum, plane, outputs, valid, tokens, y, partial, row_scale, bias, x_scale, m, n, split, PLANES: tl.constexpr):
    """Sums [outputs, tokens] → y [m, n], or to the part of this split in `partial` [splits, planes, m, n]."""
    inside = valid[:, None] & (tokens < m)[None, :]
    at = tokens.to(tl.int64)[None, :] * n + outputs[:, None]
    if partial is None:
        rows = tl.load(row_scale + outputs, valid, other=0)[:, None]
        worth = x_scale
        if x_scale is not None:
            worth = tl.load(x_scale + tokens, tokens < m, other=0)[None, :]
        added = bias
        if bias is not None:
            added = tl.load(bias + outputs, valid, other=0)[:, None]
        value = _scaled(sum, plane, worth, rows, added, PLANES)
        tl.store(y + at, value.to(y.dtype.element_ty), inside)
    else:
        first = partial + split.to(tl.int64) * PLANES * m * n
        tl.store(first + at, sum, inside)
        if PLANES == 2:
            tl.store(first + m.to(tl.int64) * n + at, plane, inside)


@triton.jit
def _scales(scales, outputs, group, n, groups, dtype: tl.constexpr, SCALE: tl.constexpr):
    """[outputs, group, 1] of decode_scale's from uint8 [n, groups]; 127, E8M0's 1, is outside of E4M3 operands."""
    outside: tl.constexpr = 127 if dtype == tl.float8e4nv else 0
    at = scales + outputs.to(tl.int64)[:, None] * groups + group[None, :]
    bytes = tl.load(at, (outputs < n)[:, None] & (group < groups)[None, :], other=outside)
    return decode_scale(bytes, dtype, SCALE)[:, :, None]


@triton.jit
def _fence(x):
    """What cp.async has written, and this thread knows of, is visible to wgmma."""
    tl.inline_asm_elementwise(FENCE_TEXT, REGISTERS, [x], tl.int32, False, 1)


@triton.jit(do_not_specialize=["m", "groups"])
def product(
    codes, x, y, partial, row_scale, bias, x_scale, scales, m, n, half, k, padded_k, groups,
    PLANES: tl.constexpr, PARTS: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_K: tl.constexpr,
    TABLE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, FENCE: tl.constexpr,
):  # fmt: skip
    """codes uint8 [half, padded_k] of layout "pairs"; x [PLANES or PARTS, m, k] int8, E4M3, fp16 or bf16;
    scales uint8 [n, groups]. Grid: tiles of tokens, tiles of rows, splits of k.

    PLANES of int8 operands have sums of their own; PARTS of 16-bit operands are added up in one. Each step of E4M3
    operands is a sum of its own, in the tensor core, added to fp32's: fp8.py.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    fp8: tl.constexpr = dtype == tl.float8e4nv
    zero: tl.constexpr = 0.0 if fp8 else 0
    total: tl.constexpr = tl.int32 if dtype == tl.int8 else tl.float32
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    steps = tl.cdiv(padded_k, BLOCK_K)
    begin, end = steps * split // tl.num_programs(2), steps * (split + 1) // tl.num_programs(2)
    low = tl.zeros([ROWS, TOKENS], total)
    high, low_plane, high_plane = low, low, low
    # Rows and tokens past the end read existing ones: their sums are not stored.
    code_rows = codes + (rows % half).to(tl.int64)[:, None] * padded_k
    x_rows = x + (tokens % m).to(tl.int64)[None, :] * k
    for step in range(begin, end):
        inputs = step * BLOCK_K + tl.arange(0, BLOCK_K)
        bytes = tl.load(code_rows + inputs[None, :], inputs[None, :] < padded_k, other=0)
        if SCALE != "none":
            SHARED: tl.constexpr = min(GROUP, BLOCK_K)
            COUNT: tl.constexpr = BLOCK_K // SHARED
            group = step * BLOCK_K // GROUP + tl.arange(0, COUNT)
            s_low = _scales(scales, rows, group, n, groups, dtype, SCALE)
            s_high = _scales(scales, rows + half, group, n, groups, dtype, SCALE)
        if fp8 and SCALE != "none":
            s_low = tl.broadcast_to(s_low, ROWS, COUNT, SHARED).reshape(ROWS, BLOCK_K)
            s_high = tl.broadcast_to(s_high, ROWS, COUNT, SHARED).reshape(ROWS, BLOCK_K)
            w_low, w_high = decode(bytes, s_low, s_high, dtype, TABLE, LOW, HIGH)
        else:
            w_low, w_high = decode(bytes, None, None, dtype, TABLE, LOW, HIGH)
            if SCALE != "none":
                w_low = (w_low.reshape(ROWS, COUNT, SHARED) * s_low).reshape(ROWS, BLOCK_K)
                w_high = (w_high.reshape(ROWS, COUNT, SHARED) * s_high).reshape(ROWS, BLOCK_K)
        for part in tl.static_range(PARTS):
            x_part = x_rows + part * m.to(tl.int64) * k
            operand = tl.load(x_part + inputs[:, None], inputs[:, None] < k, other=zero)
            if FENCE:
                _fence(step)
            if fp8:
                low += tl.dot(w_low, operand, max_num_imprecise_acc=BLOCK_K)
                high += tl.dot(w_high, operand, max_num_imprecise_acc=BLOCK_K)
            else:
                low = tl.dot(w_low, operand, low, out_dtype=total)
                high = tl.dot(w_high, operand, high, out_dtype=total)
        if PLANES == 2:
            operand = tl.load(x_rows + m.to(tl.int64) * k + inputs[:, None], inputs[:, None] < k, other=0)
            if FENCE:
                _fence(step)
            low_plane = tl.dot(w_low, operand, low_plane, out_dtype=total)
            high_plane = tl.dot(w_high, operand, high_plane, out_dtype=total)
    valid = rows < half
    _leave(low, low_plane, rows, valid, tokens, y, partial, row_scale, bias, x_scale, m, n, split, PLANES)
    rows += half
    valid &= rows < n
    _leave(high, high_plane, rows, valid, tokens, y, partial, row_scale, bias, x_scale, m, n, split, PLANES)


@triton.jit(do_not_specialize=["m", "splits"])
def add_splits(partial, y, row_scale, bias, x_scale, m, n, splits, PLANES: tl.constexpr, OUTPUTS: tl.constexpr):
    """partial [splits, PLANES, m, n], split 0 first → y [m, n]. Grid: blocks of outputs, tokens."""
    token = tl.program_id(1)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = outputs < n
    at = partial + token.to(tl.int64) * n + outputs
    plane_size = m.to(tl.int64) * n
    sum = tl.zeros([OUTPUTS], partial.dtype.element_ty)
    plane = sum
    for _ in range(splits):
        sum += tl.load(at, inside, other=0)
        if PLANES == 2:
            plane += tl.load(at + plane_size, inside, other=0)
        at += plane_size * PLANES
    worth = x_scale
    if x_scale is not None:
        worth = tl.load(x_scale + token)
    added = bias
    if bias is not None:
        added = tl.load(bias + outputs, inside, other=0)
    value = _scaled(sum, plane, worth, tl.load(row_scale + outputs, inside, other=0), added, PLANES)
    tl.store(y + token.to(tl.int64) * n + outputs, value.to(y.dtype.element_ty), inside)
