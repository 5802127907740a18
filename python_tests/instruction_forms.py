"""The instruction forms of csrc/cuda/device.h one by one: inputs by seed, results by numpy, and vectors from a GPU.

`record(run)` keeps what a machine makes of the inputs, `disagreements(vectors)` says where that is not numpy's result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "ptx" / "test_kernels" / "instructions.cu"
INCLUDES = HERE.parent / "csrc" / "cuda"
VECTORS = HERE / "vectors" / "gpu_instructions.npz"
"""What a GPU made of the inputs; benchmarks/golden.py writes it."""
BLOCKS, LANES = 16, 32
G, T = np.divmod(np.arange(LANES), 4)
"""Lane 4·g + t."""


@dataclass(frozen=True)
class Form:
    """A kernel form_NAME: uint32 [blocks, inputs, threads] → uint32 [blocks, outputs, threads]."""

    outputs: int
    make: Callable[[np.random.Generator], np.ndarray]
    expect: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]
    """(results, None): these bits; (float64 results, how far fp32 ones may be off)."""


def words(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)


def bits(generator: np.random.Generator, inputs: int) -> np.ndarray:
    return generator.integers(0, 1 << 32, (BLOCKS, inputs, LANES), dtype=np.uint32)


# ---- products of tensor cores: PTX ISA, "Matrix fragments for mma.m16n8k16" and "m16n8k32"


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 of the same bits in the upper half, as uint16 → float32."""
    return (values.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """uint16 of float32, nearest even; no NaN."""
    raw = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((raw + 0x7FFF + (raw >> 16 & 1)) >> 16).astype(np.uint16)


READ = {
    "s8": lambda w: w.view(np.int8),
    "f16": lambda w: w.view(np.float16),
    "bf16": lambda w: bfloat16(w.view(np.uint16)),
}


def fragment(of_lanes: np.ndarray, kind: str, rows: int) -> np.ndarray:
    """Words [blocks, w, 32] of operand A (rows = 16) or B (rows = 8) → float64 [blocks, rows, k]."""
    blocks, count, _ = of_lanes.shape
    elements = READ[kind](np.ascontiguousarray(of_lanes.transpose(0, 2, 1))).astype(np.float64)
    per_word = elements.shape[-1] // count
    elements = elements.reshape(blocks, LANES, count, per_word)
    halves = rows // 8
    matrix = np.empty((blocks, rows, 4 * per_word * count // halves))
    for word in range(count):
        for i in range(per_word):
            matrix[:, G + 8 * (word % halves), per_word * (T + 4 * (word // halves)) + i] = elements[:, :, word, i]
    return matrix


def products(kind: str, a_words: int, b_words: int) -> Callable:
    def expect(inputs: np.ndarray):
        a = fragment(inputs[:, :a_words], kind, 16)
        b = fragment(inputs[:, a_words : a_words + b_words], kind, 8)
        c = np.ascontiguousarray(inputs[:, a_words + b_words :]).view(np.int32 if kind == "s8" else np.float32)
        at = [(G + 8 * (e // 2), 2 * T + e % 2) for e in range(4)]
        d = a @ b.transpose(0, 2, 1)
        d = np.stack([d[:, row, column] for row, column in at], 1) + c
        if kind == "s8":
            return d.astype(np.int64).astype(np.uint32), None
        size = np.abs(a) @ np.abs(b).transpose(0, 2, 1)
        # 17 terms. Tensor cores align them to the largest and drop bits below 2^-21 of it or less.
        return d, np.stack([size[:, row, column] for row, column in at], 1) * 2.0**-19 + np.abs(c) * 2.0**-19

    return expect


def make_halves(kind: str) -> Callable:
    """Half of the blocks hold small integers, whose sums are exact on any machine."""

    def make(generator: np.random.Generator) -> np.ndarray:
        values = generator.standard_normal((BLOCKS, 6, LANES, 2))
        values[::2] = generator.integers(-8, 9, values[::2].shape)
        halves = values.astype(np.float16).view(np.uint16) if kind == "f16" else to_bfloat16(values)
        c = generator.integers(-99, 100, (BLOCKS, 4, LANES)).astype(np.float32)
        return np.concatenate([words(halves)[..., 0], words(c)], 1)

    return make


def exact_integers(expect: Callable) -> Callable:
    def exact(inputs: np.ndarray):
        values, bound = expect(inputs)
        bound[::2] = 0
        return values, bound

    return exact


# ---- the others


def expect_permute(inputs: np.ndarray):
    table = np.concatenate([words(inputs[:, i])[..., None].view(np.uint8) for i in (0, 1)], -1)
    result = np.zeros(inputs[:, 2].shape, np.uint32)
    for i in range(4):
        nibble = inputs[:, 2] >> (4 * i) & 15
        byte = np.take_along_axis(table, (nibble & 7)[..., None].astype(np.int64), -1)[..., 0].astype(np.uint32)
        result |= np.where(nibble > 7, (byte >> 7) * 255, byte) << np.uint32(8 * i)
    return result[:, None], None


def make_half_products(generator: np.random.Generator) -> np.ndarray:
    values = generator.standard_normal((BLOCKS, 4, LANES, 2)) * 2.0 ** generator.integers(-6, 7, (BLOCKS, 4, LANES, 2))
    return np.concatenate(
        [words(values[:, :2].astype(np.float16))[..., 0], words(to_bfloat16(values[:, 2:]))[..., 0]], 1
    )


def expect_half_products(inputs: np.ndarray):
    halves = np.ascontiguousarray(inputs).view(np.uint16).reshape(*inputs.shape, 2)
    half = halves.view(np.float16)[:, 0] * halves.view(np.float16)[:, 1]
    brain = to_bfloat16(bfloat16(halves[:, 2]).astype(np.float64) * bfloat16(halves[:, 3]))
    return np.stack([words(half)[..., 0], words(brain)[..., 0]], 1), None


def make_arithmetic(generator: np.random.Generator) -> np.ndarray:
    """a and b in [1, 2), c in ±[1, 4): a · b + c is exact in float64, so numpy can round it once."""
    a, b, c = (1 + generator.random((BLOCKS, LANES)) for _ in range(3))
    c *= generator.choice([-2, -1, 1, 2], c.shape)
    return words(np.stack([a, b, c], 1).astype(np.float32))


def expect_arithmetic(inputs: np.ndarray):
    a, b, c = np.moveaxis(inputs.view(np.float32), 1, 0)
    fused = (a.astype(np.float64) * b + c).astype(np.float32)
    return words(np.stack([a + b, a - c, b * c, a / b, np.float32(1) / c, fused], 1)), None


def make_conversions(generator: np.random.Generator) -> np.ndarray:
    """v in ±2^14; in half of the blocks multiples of 1/2, so that ties occur. The other word is an fp16 and an int."""
    v = generator.standard_normal((BLOCKS, LANES)) * 2.0 ** generator.integers(-12, 13, (BLOCKS, LANES))
    v[::2] = np.round(v[::2] * 2) / 2
    integers = generator.integers(0, 1 << 32, (BLOCKS, LANES), dtype=np.uint32) & ~np.uint32(0x7C00) | np.uint32(0x3C00)
    return np.stack([words(v.astype(np.float32)), integers], 1)


def expect_conversions(inputs: np.ndarray):
    v, raw = np.ascontiguousarray(inputs[:, 0]).view(np.float32), np.ascontiguousarray(inputs[:, 1])
    integers, half = raw.view(np.int32), raw.astype(np.uint16).view(np.float16)
    floats = [np.rint(v), np.ceil(v), half.astype(np.float32), integers.astype(np.float32)]
    rint, ceil, widened, whole = (words(f) for f in floats)
    wide = words((integers.astype(np.int64) * 128).astype(np.float32))
    truncated, brain = words(np.trunc(v).astype(np.int32)), to_bfloat16(v).astype(np.uint32)
    halved = v.astype(np.float16).view(np.uint16).astype(np.uint32)
    return np.stack([rint, ceil, truncated, brain, halved, widened, whole, wide], 1), None


def expect_lanes(inputs: np.ndarray):
    v, lane = inputs[:, 0], np.arange(LANES)
    most = np.broadcast_to(v.max(-1, keepdims=True), v.shape)
    return np.stack([most, v[:, lane ^ 1], v[:, lane ^ 2], v[:, lane | 3]], 1), None


FORMS = {
    "mma_s8_k32": Form(4, lambda g: bits(g, 10), products("s8", 4, 2)),
    "mma_s8_k16": Form(4, lambda g: bits(g, 7), products("s8", 2, 1)),
    "mma_f16": Form(4, make_halves("f16"), exact_integers(products("f16", 4, 2))),
    "mma_bf16": Form(4, make_halves("bf16"), exact_integers(products("bf16", 4, 2))),
    "permute": Form(1, lambda g: bits(g, 3), expect_permute),
    "half_products": Form(2, make_half_products, expect_half_products),
    "arithmetic": Form(6, make_arithmetic, expect_arithmetic),
    "conversions": Form(8, make_conversions, expect_conversions),
    "lanes": Form(4, lambda g: bits(g, 1) >> np.uint32(1), expect_lanes),
}


def record(run: Callable[[str, np.ndarray, int], np.ndarray], forms: dict[str, Form] = FORMS) -> dict[str, np.ndarray]:
    """{"NAME in", "NAME out"} of every form; run(name, inputs, outputs a thread) → uint32 [blocks, outputs, threads].

    Inputs are the same at every call.
    """
    vectors = {}
    for name, form in forms.items():
        inputs = form.make(np.random.default_rng(list(name.encode())))
        vectors |= {f"{name} in": inputs, f"{name} out": run(name, inputs, form.outputs)}
    return vectors


def disagreements(vectors: dict[str, np.ndarray], forms: dict[str, Form] = FORMS) -> list[str]:
    """A sentence for each form whose recorded results are not numpy's."""
    found = []
    for name, form in forms.items():
        expected, bound = form.expect(vectors[f"{name} in"])
        got = vectors[f"{name} out"]
        wrong = got != expected if bound is None else ~(np.abs(got.view(np.float32) - expected) <= bound)
        if wrong.any():
            block, output, lane = np.argwhere(wrong)[0]
            found.append(
                f"{name}: {wrong.sum()} of {wrong.size} words, first output {output} of lane {lane}, block {block}"
            )
    return found
