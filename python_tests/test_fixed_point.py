"""W4A16 with few rows, which AVX-512 multiplies as integers: exact where results cancel."""

import itertools

import pytest
import torch
from cases import random_packed, same_bits
from test_cpu_kernels import AVAILABLE

from llmfp4_kernels import reference
from llmfp4_kernels.backends.cpu import Prepared
from llmfp4_kernels.formats import E2M1, E3M0, E4M3, E8M0

FOR_FEW_ROWS = [kernel for kernel in AVAILABLE if kernel.name != "cpu.amx"]
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
SCALES = [(None, 0), (E8M0, 8), (E4M3, 16), (E8M0, 32), (E4M3, 96), (E8M0, 544)]
KINDS = ["even", "outliers", "two apart", "wide", "tiny", "zeros"]


def activations(kind: str, m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """x [m, k] whose exponents lie close together, far apart, or beyond what fixed-point numbers are made for."""
    g = torch.Generator().manual_seed(k)
    x = torch.randn(m, k, generator=g)
    if kind == "outliers":  # the others of their 64 keep few digits, and some none
        x[:, ::97] *= 2.0**9
    if kind == "two apart":
        x[:, 0] *= 2.0**14
    if kind == "wide":
        x *= 2.0 ** torch.randint(-14, 14, (m, k), generator=g)
    x *= 2.0**-4 / x.abs().max()  # sums stay below fp16's largest
    if kind == "tiny":
        x *= 2.0**-110 if dtype != torch.float16 else 2.0**-18
    if kind == "zeros":
        x[:, : k // 2] = 0.0
    return x.to(dtype)


def cancelling(packed, x: torch.Tensor):
    """(packed, x) of twice the inputs, the second half undoing the first but for every 29th input: what is left of the
    sum is small, and so is the rounding of a 16-bit result that would hide errors of the sum."""
    undo = -x
    undo[:, ::29] *= 1.5
    return torch.cat([x, undo], 1)


@pytest.mark.parametrize("kernel", FOR_FEW_ROWS, ids=lambda k: k.name)
@pytest.mark.parametrize("scale", SCALES, ids=lambda s: f"{s[0].name}-{s[1]}" if s[0] else "rows")
def test_small_sums_of_large_terms(kernel, scale, threads):
    for (m, n, half), element, dtype in itertools.product(
        [(1, 33, 96), (1, 40, 1088), (2, 100, 544), (3, 17, 1088)], (E2M1, E3M0), HALF_ULP
    ):
        packed = random_packed(n, 2 * half, element, scale=scale[0], group_size=scale[1])
        if scale[0] == E8M0:
            packed.group_scale.clamp_(120, 127)
        packed.codes[:, half // 2 :] = packed.codes[:, : half // 2]
        groups = 0 if packed.group_scale is None else packed.group_scale.shape[1]
        if half % max(scale[1], 1) == 0 and groups:
            packed.group_scale[:, groups // 2 :] = packed.group_scale[:, : groups // 2]
        prepared = Prepared(packed, None)
        w = reference.dequantize(packed, torch.float64)
        for kind in KINDS:
            x = cancelling(packed, activations(kind, m, half, dtype))
            exact, magnitude = x.double() @ w.T, x.double().abs() @ w.T.abs()
            smallest = torch.finfo(dtype).smallest_normal * HALF_ULP[dtype]
            bound = exact.abs() * HALF_ULP[dtype] + (2 * half + 8) * 2.0**-24 * magnitude + smallest
            threads(1)
            y = prepared.run(kernel, x)
            assert ((y.double() - exact).abs() <= bound).all(), (m, n, half, element.name, dtype, kind)
            threads(2)
            assert same_bits(prepared.run(kernel, x), y), "the split over threads changed the bits"
            if kernel.name.startswith("cpu.avx512") and dtype != torch.float32:
                alone = torch.cat([prepared.run(kernel, row) for row in x.split(1)])
                assert same_bits(alone, y), "the other rows changed a row's bits"


@pytest.mark.parametrize("kernel", FOR_FEW_ROWS, ids=lambda k: k.name)
@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_a_row_without_value_leaves_the_others_alone(kernel, dtype, special):
    packed = random_packed(40, 130, E2M1)
    x = activations("even", 3, 130, dtype)
    whole = Prepared(packed, None).run(kernel, x)
    x[1, 70] = special
    y = Prepared(packed, None).run(kernel, x)
    assert same_bits(y[[0, 2]], whole[[0, 2]])
    assert not y[1].isfinite().any()
    assert not Prepared(packed, None).run(kernel, x[1:2]).isfinite().any()


@pytest.mark.parametrize("kernel", FOR_FEW_ROWS, ids=lambda k: k.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_far_below_the_largest_or_one(kernel, dtype):
    """Small inputs beside a huge one that meets zero weights, and a sparse row below the exponents of digits."""
    packed = random_packed(40, 256, E2M1)
    packed.codes[:, 2] &= 0x0F  # input 5
    huge, sparse = torch.zeros(2, 1, 256)
    huge[0, 5], huge[0, 7], huge[0, 200] = 2.0**100, 1.5 * 2.0**-105, 2.0**-90
    sparse[0, 3], sparse[0, 70] = 1.25 * 2.0**-115, 2.0**-118
    w, prepared = reference.dequantize(packed, torch.float64), Prepared(packed, None)
    assert not w[:, 5].any()
    for x in (huge.to(dtype), sparse.to(dtype)):
        y, exact = prepared.run(kernel, x).double(), x.double() @ w.T
        assert ((y - exact).abs() <= exact.abs() * (HALF_ULP[dtype] + 2.0**-20)).all() and exact.any()
