"""W4A16 CUDA kernels, as PTX on the CPU, through the real Python path, within computed bounds of the exact product."""

import dataclasses
import itertools

import pytest
import torch
from cases import GROUP_SCALES, ODD_SHAPES, random_packed, random_x, same_bits
from cuda_on_cpu import OnCpu, all_kernels
from ptx import missing
from test_dynamic import dynamic_packed

from llmfp4_kernels import native, reference
from llmfp4_kernels.backends import cuda
from llmfp4_kernels.formats import E1M2, E2M1, E3M0, E4M3, E8M0, FP4_ELEMENTS, Dynamic
from llmfp4_kernels.problem import Problem

WHY_NOT = missing() or native.problem_with_cuda()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {
    torch.float32: (2.0**-24, 2.0**-150),
    torch.bfloat16: (2.0**-8, 2.0**-134),
    torch.float16: (2.0**-11, 2.0**-25),
}
"""To a dtype: half of a number's last bit, at most, relative to it, and half of the least subnormal."""
NAMES = ["cuda.gemv", "cuda.sm80"]


@pytest.fixture(scope="module")
def programs():
    return all_kernels()


def after_rounding(exact, bound, dtype):
    """How far a result of `dtype` is from `exact` if before its rounding it was within `bound`."""
    half_ulp, least = ROUNDING[dtype]
    return bound + (exact.abs() + bound) * half_ulp + least


def exact_and_bound(packed, x, bias=None):
    """The float64 product, and how far a kernel may be from it.

    fp32 sums of exact products: (k + 8) · 2^-24 · Σ|x·w|, and the output's rounding. Activations in two bf16 parts
    (a 16-bit x times a factor) lose 2^-17 each. fp16 weights with E8M0 scales are multiples of 2^-24 of their row's
    largest scale: they lose 2^-25 of it each.
    """
    factor = torch.ones(packed.k) if packed.x_factor is None else packed.x_factor
    factor = factor if packed.shift is None else torch.ldexp(factor, -packed.shift.int())
    scaled = x.double() * factor.double()
    w = reference.stored_weight(packed)
    exact = scaled @ w.T + (0 if bias is None else bias.double())
    relative = (packed.k + 8) * 2.0**-24
    if x.dtype != torch.float32 and (packed.x_factor is not None or packed.shift is not None):
        relative += 2.0**-17
    bound = relative * (scaled.abs() @ w.abs().T)
    if bias is not None:
        bound += 2.0**-23 * bias.double().abs()
    if x.dtype == torch.float16 and packed.scale == E8M0:
        largest = torch.ldexp(packed.row_scale.double().abs(), packed.group_scale.amax(1).int() - 127)
        bound += 2.0**-25 * scaled.abs().sum(1, keepdim=True) * largest
    return exact, after_rounding(exact, bound, x.dtype)


def test_the_largest_floats_are_no_infinity(programs):
    """bf16 ends at 3.39e38, fp32 at 3.4028e38."""
    packed = random_packed(24, 64, E2M1, seed=3)
    packed.codes, packed.row_scale = packed.codes & 0x11, torch.full((24,), 1.0)  # 0 and 0.5
    x, least = torch.zeros(3, 64), torch.finfo(torch.float32).max
    for token, value in enumerate((least, -least, 3.3961776e38)):
        x[token, 7 * token + 1] = value
    expected = (x.double() @ reference.stored_weight(packed).T).float()
    assert expected.isfinite().all() and (expected.abs() > 1e38).any(1).all()
    with OnCpu(programs) as gpu:
        for name in NAMES:
            assert torch.equal(gpu.run(cuda.Prepared(packed, None), name, x), expected), name


def check(gpu, packed, x, bias=None):
    prepared, (exact, bound) = cuda.Prepared(packed, bias), exact_and_bound(packed, x, bias)
    ran = []
    for kernel in cuda.KERNELS:
        if kernel.refusal(dataclasses.replace(Problem.of(packed, len(x), x.dtype), device="cuda")):
            continue
        y = gpu.run(prepared, kernel.name, x)
        assert y.dtype == x.dtype and ((y.double() - exact).abs() <= bound).all(), (kernel.name, x.shape, packed.shape)
        assert same_bits(gpu.run(prepared, kernel.name, x), y)
        ran.append(kernel.name)
    return ran


@pytest.mark.parametrize(
    "group", [*GROUP_SCALES, (E8M0, 16), (E4M3, 64)], ids=lambda g: f"{g[0].name}-{g[1]}" if g[0] else "rows"
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_scale_and_element(group, dtype, programs):
    with OnCpu(programs, multiprocessors=8) as gpu:
        for i, ((m, n, k), element) in enumerate(itertools.product(ODD_SHAPES, FP4_ELEMENTS.values())):
            if i % 2 and m > 4:
                continue
            packed = random_packed(n, k, element, scale=group[0], group_size=group[1], seed=i)
            x = random_x(m, k, dtype) / (256 if dtype == torch.float16 else 1)  # outputs stay below 65504
            assert "cuda.sm80" in check(gpu, packed, x, torch.randn(n) if i % 3 else None)


@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 33, 65, 130])
@pytest.mark.parametrize("group", [(None, 0), (E4M3, 16)], ids=lambda g: f"{g[0].name}-{g[1]}" if g[0] else "rows")
def test_every_instance_and_split_over_k(m, group, programs):
    packed = random_packed(150, 2104, E2M1, scale=group[0], group_size=group[1])
    for dtype, multiprocessors, seed in ((torch.bfloat16, 1, 1), (torch.float16, 132, 2)):
        with OnCpu(programs, multiprocessors, seed) as gpu:
            assert check(gpu, packed, random_x(m, 2104, dtype) / 64) == (NAMES if m <= 16 else ["cuda.sm80"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_and_shifts_of_inputs(dtype, programs):
    smooth = dataclasses.replace(dynamic_packed(40, 135, E2M1, E2M1, Dynamic()), activation=None, dynamic=None)
    shifted = random_packed(40, 135, E1M2, shift=True)
    with OnCpu(programs) as gpu:
        for packed in (smooth, shifted, dataclasses.replace(shifted, x_factor=smooth.x_factor)):
            for m in (1, 3, 8, 20):
                check(gpu, packed, random_x(m, 135, dtype) / 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_integers_are_exact(dtype, programs):
    """Where every product and sum is exact in fp32, so is y: operand order, signs and every code are right."""
    for element, scale in ((E2M1, None), (E1M2, None), (E3M0, None), (E2M1, E4M3)):
        packed = random_packed(48, 128, element, scale=scale, group_size=16 if scale else 0)
        packed.row_scale = torch.ones(48)
        if scale:
            packed.group_scale = torch.full_like(packed.group_scale, 0x40)  # 2.0
        x = torch.randint(-2, 3, (20, 128)).to(dtype)
        expected = (x.double() @ reference.dequantize(packed, torch.float64).T).to(dtype)
        with OnCpu(programs) as gpu:
            for name, rows in (("cuda.sm80", 20), ("cuda.gemv", 4)):
                assert torch.equal(gpu.run(cuda.Prepared(packed, None), name, x[:rows]), expected[:rows])


@pytest.mark.parametrize("scale", [E8M0, E4M3], ids=lambda s: s.name)
def test_every_scale_byte(scale, programs):
    """One group a row, every byte that is no NaN; x picks the first weight, 1.0."""
    values = torch.tensor(scale.values)
    bytes = torch.arange(256)[values.isfinite()].to(torch.uint8)
    n = len(bytes)
    packed = random_packed(n, 32, E2M1, scale=scale, group_size=32)
    packed = dataclasses.replace(packed, group_scale=bytes[:, None].clone(), row_scale=torch.ones(n))
    packed.codes = torch.full_like(packed.codes, E2M1.values.index(1.0) * 17)
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, 0] = 1
    with OnCpu(programs) as gpu:
        for kind in (torch.bfloat16, torch.float32):
            y = gpu.run(cuda.Prepared(packed, None), "cuda.gemv", x.to(kind))
            assert torch.equal(y[0].float(), values[bytes.long()]), kind


def test_fp16_holds_scales_far_below_their_rows_largest(programs):
    """E8M0 in fp16: exact down to 2^-24 of the row's largest scale, 0 below."""
    packed = random_packed(16, 1024, E2M1, scale=E8M0, group_size=32)
    packed.group_scale = (140 - torch.arange(32).repeat(16, 1)).to(torch.uint8)
    packed.codes = torch.full_like(packed.codes, E2M1.values.index(1.0) * 17)
    packed.row_scale = torch.ones(16)
    x = torch.zeros(32, 1024, dtype=torch.float16)
    x[torch.arange(32), torch.arange(32) * 32] = 1
    with OnCpu(programs) as gpu:
        y = gpu.run(cuda.Prepared(packed, None), "cuda.sm80", x)[:, 0]
    expected = torch.ldexp(torch.tensor(1.0), 13 - torch.arange(32)).half()
    assert torch.equal(y[:25], expected[:25]) and not y[25:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_touches_its_row_only(bad, programs):
    packed = random_packed(40, 72, E2M1)
    smooth = dataclasses.replace(packed, x_factor=torch.full((72,), 2.0))
    for dtype in DTYPES:
        x = random_x(20, 72, dtype) / 64
        x[3, 69] = bad
        with OnCpu(programs) as gpu:
            for weight in (packed, smooth):
                y = gpu.run(cuda.Prepared(weight, None), "cuda.sm80", x)
                assert not y[3].isfinite().any()
                assert y[:3].isfinite().all() and y[4:].isfinite().all()


def test_overflow_of_fp16_outputs_is_infinite(programs):
    packed = random_packed(16, 64, E2M1)
    packed.codes = torch.full_like(packed.codes, 0x77)
    packed.row_scale = torch.ones(16)
    with OnCpu(programs) as gpu:
        y = gpu.run(cuda.Prepared(packed, None), "cuda.gemv", torch.full((1, 64), 1000.0, dtype=torch.float16))
        assert y.isinf().all()
        y = gpu.run(cuda.Prepared(packed, None), "cuda.gemv", torch.full((1, 64), 100.0, dtype=torch.float16))
        assert (y == 38400).all()


def test_refusals():
    problem = Problem(1, 64, 64, E2M1, None, E4M3, 24, device="cuda")
    assert cuda._refusal_of_groups(problem).startswith("groups of 24 inputs")
