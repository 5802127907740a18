"""The instruction forms of csrc/cuda/device_sm90.h one by one; as instruction_forms.py. A block is a warpgroup."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from instruction_forms import HERE, LANES, READ, Form, exact_integers, fragment, to_bfloat16, words

SOURCE = HERE / "ptx" / "test_kernels" / "instructions_sm90.cu"
BLOCKS, THREADS = 2, 128
WARP, LANE = np.divmod(np.arange(THREADS), LANES)
G, T = np.divmod(LANE, 4)
SIGNIFICANT = {"e4m3": 33 * 2.0**-13, "f16": 2.0**-19, "bf16": 2.0**-19}
"""What a sum may be off by, of Σ|a·b| + |c|. Of 33 terms of 8-bit floats each may lose bits below 2^-13 of the
largest."""


def e4m3_values() -> np.ndarray:
    """Of all bytes; OCP 8-bit floating point specification, E4M3."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    magnitude = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10.0), mantissa * 2.0**-9)
    magnitude[byte & 127 == 127] = np.nan
    return np.where(byte & 128, -magnitude, magnitude)


E4M3 = e4m3_values()
READ["e4m3"] = lambda w: E4M3[w.view(np.uint8)]


def columns(of_threads: np.ndarray, kind: str) -> np.ndarray:
    """Words [blocks, n / 16, 128] of B, blocks of 8 columns by 16 bytes, two along k → float64 [blocks, n, k]."""
    n = 16 * of_threads.shape[1]
    values = READ[kind](np.ascontiguousarray(of_threads).reshape(len(of_threads), -1)).astype(np.float64)
    return values.reshape(len(values), n // 8, 2, 8, -1).transpose(0, 1, 3, 2, 4).reshape(len(values), n, -1)


def products(kind: str, n: int) -> Callable:
    def expect(inputs: np.ndarray):
        warps = [fragment(inputs[:, :4, LANES * w : LANES * (w + 1)], kind, 16) for w in range(4)]
        a, b = np.concatenate(warps, 1), columns(inputs[:, 4 : 4 + n // 16], kind)
        c = np.ascontiguousarray(inputs[:, 4 + n // 16 :]).view(np.int32 if kind == "s8" else np.float32)
        at = [(16 * WARP + G + 8 * (i % 4 // 2), 8 * (i // 4) + 2 * T + i % 2) for i in range(n // 2)]
        d = a @ b.transpose(0, 2, 1)
        d = np.stack([d[:, row, column] for row, column in at], 1) + c
        if kind == "s8":
            return d.astype(np.int64).astype(np.uint32), None
        size = np.abs(a) @ np.abs(b).transpose(0, 2, 1)
        size = np.stack([size[:, row, column] for row, column in at], 1)
        return d, (size + np.abs(c)) * SIGNIFICANT[kind]

    return expect


def make_operands(kind: str, n: int) -> Callable:
    """A, B and D. The first block holds small integers, whose sums are exact on any machine."""
    ab = 4 + n // 16

    def make(generator: np.random.Generator) -> np.ndarray:
        if kind == "s8":
            return generator.integers(0, 1 << 32, (BLOCKS, ab + n // 2, THREADS), dtype=np.uint32)
        if kind == "e4m3":
            shape = (BLOCKS, ab, THREADS, 4)
            codes = generator.integers(0, 127, shape) | generator.choice([0, 128], shape)
            small = np.array([i for i, v in enumerate(E4M3) if abs(v) <= 4 and v == np.rint(v)])
            codes[0] = generator.choice(small, codes[0].shape)
            operands = words(codes.astype(np.uint8))[..., 0]
        else:
            values = generator.standard_normal((BLOCKS, ab, THREADS, 2))
            values[0] = generator.integers(-8, 9, values[0].shape)
            halves = values.astype(np.float16).view(np.uint16) if kind == "f16" else to_bfloat16(values)
            operands = words(halves)[..., 0]
        c = generator.integers(-99, 100, (BLOCKS, n // 2, THREADS)).astype(np.float32)
        return np.concatenate([operands, words(c)], 1)

    return make


def wgmma(kind: str, n: int) -> Form:
    expect = products(kind, n)
    return Form(n // 2, make_operands(kind, n), expect if kind == "s8" else exact_integers(expect))


FORMS = {
    f"wgmma_{kind}_{n}": wgmma(kind, n)
    for kind, sizes in {"s8": (32, 48, 256), "e4m3": (32, 112), "f16": (16, 128), "bf16": (80, 224)}.items()
    for n in sizes
}
FORMS["bulk_copies"] = Form(
    4, lambda g: g.integers(0, 1 << 32, (BLOCKS, 4, THREADS), dtype=np.uint32), lambda inputs: (inputs, None)
)
