"""Every CPU kernel against the reference on the dequantized operands: bit equality where sums are integers."""

import dataclasses
import itertools
import os
import subprocess
import sys

import pytest
import torch
from cases import ELEMENT_PAIRS, GROUP_SCALES, ODD_SHAPES, random_packed, random_x, same_bits

from llmfp4_kernels import formats, native, reference
from llmfp4_kernels.backends.cpu import KERNELS, Prepared, largest_k
from llmfp4_kernels.formats import E1M2, E2M1, E3M0, E4M3, E8M0, FP4_ELEMENTS, INTEGER, Dynamic
from llmfp4_kernels.problem import Problem
from llmfp4_kernels.registry import choose

E1M6 = formats.element("e1m6")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NATIVE = native.problem_with_module() is None
SUPPORTED = {f"cpu.{name}" for name, row in (native.cpu_kernels() if NATIVE else {}).items() if row["supported"]}
AVAILABLE = [kernel for kernel in KERNELS if kernel.name in SUPPORTED]


def test_native_module_is_built():
    assert native.problem_with_module() is None
    assert "cpu.scalar" in [kernel.name for kernel in AVAILABLE]


@pytest.mark.parametrize("kernel", AVAILABLE, ids=lambda k: k.name)
@pytest.mark.parametrize("pair", ELEMENT_PAIRS, ids=lambda p: f"{p[0].name}x{p[1].name}")
def test_w4a4_bits(kernel, pair, threads):
    element, activation = pair
    for (m, n, k), shift in itertools.product(ODD_SHAPES, (False, True)):
        packed = random_packed(n, k, element, activation, shift)
        bias = torch.randn(n)
        prepared = Prepared(packed, bias)
        for dtype in DTYPES:
            x = random_x(m, k, dtype)
            expected = reference.gemm(x, packed, bias).to(dtype)
            for count in (1, 2, 3):
                threads(count)
                assert same_bits(prepared.run(kernel, x), expected), (m, n, k, shift, dtype, count)


MANY = [(300, 40, 200), (20, 40, 3000), (70, 33, 2100)]
"""More rows than a block of the AMX kernels holds, more inputs than one of their panels."""


@pytest.mark.parametrize("kernel", AVAILABLE, ids=lambda k: k.name)
@pytest.mark.parametrize("shape", MANY, ids=str)
def test_many_rows_and_inputs(kernel, shape, threads):
    """Rows enough for several threads to convert them."""
    m, n, k = shape
    static, two_planes = random_packed(n, k, E2M1, E2M1, True), random_packed(n, k, E2M1, E3M0, True)
    dynamic = dataclasses.replace(random_packed(n, k, E2M1), activation=E2M1, dynamic=Dynamic(16, INTEGER))
    for packed in (static, two_planes, dynamic):
        x, prepared = random_x(m, k, torch.bfloat16), Prepared(packed, None)
        expected = reference.gemm(x, packed).to(x.dtype)
        for count in (1, 2, 3):
            threads(count)
            assert same_bits(prepared.run(kernel, x), expected), (packed.scheme, count)
    for packed in (random_packed(n, k, E2M1), random_packed(n, k, E2M1, scale=E4M3, group_size=16)):
        prepared, results = Prepared(packed, None), []
        for dtype in (torch.float32, torch.bfloat16):
            x = random_x(m, k, dtype)
            exact = x.double() @ reference.dequantize(packed, torch.float64).T
            bound = summation_bound(x, packed) + exact.abs() * (0 if dtype == torch.float32 else 2.0**-8)
            for count in (1, 3):
                threads(count)
                results.append(prepared.run(kernel, x))
                assert ((results[-1].double() - exact).abs() <= bound).all(), (dtype, count)
            assert same_bits(*results[-2:])


@pytest.mark.parametrize("kernel", AVAILABLE, ids=lambda k: k.name)
def test_a_team_meets_for_every_share_of_a_product(kernel, threads):
    """Rows quantized by several threads, sums of groups, products: each share needs the one before whole."""
    packed = random_packed(40, 256, E2M1, scale=E8M0, group_size=32)
    packed = dataclasses.replace(packed, activation=E1M6, dynamic=Dynamic())
    prepared = Prepared(packed, None)
    rows = [random_x(m, 256) for m in (300, 520)]
    threads(1)
    expected = [prepared.run(kernel, x) for x in rows]
    for count in (2, 5):
        threads(count)
        for repeat in range(30):
            for x, y in zip(rows, expected):
                assert same_bits(prepared.run(kernel, x), y), (len(x), count, repeat)


def test_a_team_follows_the_wait_policy():
    """Threads that sleep are worth waking for more than threads that spin."""
    code = "import torch; from llmfp4_kernels import native; print(native.module().wake_microseconds())"
    wakes = []
    for policy in ("PASSIVE", "active"):
        run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_WAIT_POLICY": policy},
                             capture_output=True, text=True, check=True)  # fmt: skip
        wakes.append(float(run.stdout))
    assert wakes[0] > 5 * wakes[1] > 0


def summation_bound(x, packed, bias=None):
    """|fp32 result - exact| ≤ (k + 8) · 2^-24 · Σ|x·w|: any order of fp32 sums, plus scale and bias."""
    w = reference.dequantize(packed, torch.float64).abs()
    magnitude = x.double().abs() @ w.T + (0 if bias is None else bias.double().abs())
    return (packed.k + 8) * 2.0**-24 * magnitude + 1e-30


@pytest.mark.parametrize("kernel", AVAILABLE, ids=lambda k: k.name)
@pytest.mark.parametrize("group", GROUP_SCALES, ids=lambda g: f"{g[0].name}-{g[1]}" if g[0] else "rows")
def test_w4a16_within_summation_bound(kernel, group, threads):
    for (m, n, k), element in itertools.product(ODD_SHAPES, FP4_ELEMENTS.values()):
        packed = random_packed(n, k, element, scale=group[0], group_size=group[1])
        bias = torch.randn(n)
        prepared = Prepared(packed, bias)
        for dtype in DTYPES:
            x = random_x(m, k, dtype) / (256 if dtype == torch.float16 else 1)  # outputs stay below 65504
            exact = x.double() @ reference.dequantize(packed, torch.float64).T + bias.double()
            half_ulp = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
            subnormal = 2.0**-25 if dtype == torch.float16 else 0.0  # half a step of outputs below 2^-14
            bound = summation_bound(x, packed, bias) + exact.abs() * half_ulp + subnormal
            threads(1)
            y = prepared.run(kernel, x)
            assert ((y.double() - exact).abs() <= bound).all(), (m, n, k, element.name, dtype)
            threads(2)
            assert same_bits(prepared.run(kernel, x), y), "the split over threads changed the bits"


@pytest.mark.parametrize("kernel", AVAILABLE, ids=lambda k: k.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_w4a16_multiplies_x_factor_in_fp32(kernel, dtype):
    packed, x = random_packed(33, 70, E2M1), random_x(20, 70, dtype)
    packed.x_factor = torch.rand(70) + 0.3
    smoothed = x.float() * packed.x_factor
    y = Prepared(packed, None).run(kernel, x)
    expected = Prepared(random_packed(33, 70, E2M1), None).run(kernel, smoothed)
    assert same_bits(y, expected.to(dtype))


@pytest.mark.parametrize("kernel", AVAILABLE, ids=lambda k: k.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_x_factor_of_powers_of_two_takes_no_more_parts(kernel, dtype):
    """It leaves the significant bits of activations what they are: nothing is to be split finer than without it."""
    packed, x = random_packed(33, 70, E2M1, shift=True), random_x(20, 70, dtype)
    assert not Prepared(packed, None)._linear.smoothed
    packed.x_factor = torch.ldexp(torch.ones(70), torch.randint(-8, 9, (70,)))
    prepared, plain = Prepared(packed, None), dataclasses.replace(packed, x_factor=None)
    assert not prepared._linear.smoothed
    expected = Prepared(plain, None).run(kernel, x.float() * packed.x_factor).to(dtype)
    assert same_bits(prepared.run(kernel, x), expected)
    packed.x_factor = torch.full((70,), 1.5)
    assert Prepared(packed, None)._linear.smoothed


@pytest.mark.parametrize("kernel", AVAILABLE, ids=lambda k: k.name)
def test_w4a16_shift_scales_channels(kernel):
    packed, plain = random_packed(33, 70, E2M1, shift=True), random_packed(33, 70, E2M1)
    x = random_x(20, 70)
    shifted = torch.ldexp(x, -packed.shift.int())
    y = Prepared(packed, None).run(kernel, x)
    assert same_bits(y, Prepared(plain, None).run(kernel, shifted))
    assert same_bits(reference.gemm(x, packed), reference.gemm(shifted, plain))
    near = torch.nn.functional.linear(x.double(), reference.dequantize(packed, torch.float64)).float()
    torch.testing.assert_close(y, near, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kernel", AVAILABLE, ids=lambda k: k.name)
@pytest.mark.parametrize("group", GROUP_SCALES, ids=lambda g: f"{g[0].name}-{g[1]}" if g[0] else "rows")
def test_w4a16_reads_rows_where_they_lie(kernel, group, threads):
    """fp32 rows of whole tiles are not copied, and their factors go into the weights; 2^-16 and 2 do not fit there."""
    for (m, n, k), element in itertools.product([(9, 17, 64), (40, 70, 192), (200, 130, 640)], FP4_ELEMENTS.values()):
        packed = random_packed(n, k, element, shift=True, scale=group[0], group_size=group[1])
        memory = torch.full((m * k + 100,), float("nan"))
        x = memory[1 : m * k + 1].view(m, k)
        x.copy_(random_x(m, k))
        exact = x.double() @ reference.dequantize(packed, torch.float64).T
        for count in (1, 2):
            threads(count)
            y = Prepared(packed, None).run(kernel, x)
            assert ((y.double() - exact).abs() <= summation_bound(x, packed)).all(), (m, n, k, element.name)
            for factor in (2.0**-16, 2.0**-12, 2.0):
                scaled = dataclasses.replace(packed, x_factor=torch.full((k,), factor))
                assert same_bits(Prepared(scaled, None).run(kernel, x), y * factor), (m, n, k, element.name, factor)


@pytest.mark.parametrize("kernel", AVAILABLE, ids=lambda k: k.name)
@pytest.mark.parametrize("activation", FP4_ELEMENTS.values(), ids=lambda e: e.name)
def test_activation_codes_at_every_tie(kernel, activation):
    """A weight that is the identity shows the quantized activations themselves."""
    k = 64
    packed = random_packed(k, k, E2M1, activation)
    one = E2M1.values.index(1.0)
    packed.codes = reference.pack(torch.eye(k, dtype=torch.uint8) * one)
    packed.row_scale, packed.x_scale = torch.ones(k), torch.tensor(1.0)
    grid = torch.tensor(activation.magnitudes)
    ties = (grid[1:] + grid[:-1]) / 2
    points = torch.cat(
        [grid, ties, torch.nextafter(ties, torch.tensor(99.0)), torch.nextafter(ties, torch.tensor(0.0))]
    )
    points = torch.cat([points, -points, torch.tensor([-0.0, 1e-42, -1e-42, 1e30, -1e30, activation.max * 1.01])])
    x = torch.nn.functional.pad(points, (0, -len(points) % k)).view(-1, k)
    expected = reference.decode(reference.encode(x, activation), activation)
    assert torch.equal(Prepared(packed, None).run(kernel, x), expected)


@pytest.mark.parametrize("kernel", AVAILABLE, ids=lambda k: k.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_token_poisons_its_row_only(kernel, bad):
    packed = random_packed(40, 70, E2M1, E2M1, True)
    x = random_x(20, 70)
    x[3, 69] = bad
    y = Prepared(packed, None).run(kernel, x)
    assert y[3].isnan().all() and y[:3].isfinite().all() and y[4:].isfinite().all()


@pytest.mark.parametrize("kernel", AVAILABLE, ids=lambda k: k.name)
def test_large_sums_stay_exact(kernel):
    """All operands at their largest: the int32 sum is k · 96 · 12, far beyond the 2^24 that fp32 counts."""
    k = 20000
    packed = random_packed(17, k, E2M1, E2M1, True)
    packed.codes = torch.full_like(packed.codes, 0x77)
    packed.shift = torch.zeros(k, dtype=torch.uint8)
    x = torch.full((17, k), 1e6)
    y = Prepared(packed, None).run(kernel, x)
    assert same_bits(y, reference.gemm(x, packed))


@pytest.mark.parametrize("kernel", AVAILABLE, ids=lambda k: k.name)
def test_non_contiguous_and_strided_input(kernel):
    packed = random_packed(24, 66, E1M2, E2M1, True)
    wide = random_x(40, 132)
    for x in (wide[:, ::2], wide[::2, :66], random_x(66, 20).T):
        assert same_bits(Prepared(packed, None).run(kernel, x), reference.gemm(x, packed))


def test_kernels_refuse_what_they_cannot_do():
    kernel = KERNELS[-1]
    refuse = lambda **kw: kernel.refusal(Problem(m=1, n=16, k=64, element=E2M1, **kw))  # noqa: E731
    assert refuse() is None
    assert "cuda" in refuse(device="cuda")
    assert "float64" in refuse(dtype=torch.float64)
    assert "12" in refuse(scale=GROUP_SCALES[1][0], group_size=12)
    assert "no sum of int8 products" in refuse(scale=E4M3, group_size=32, activation=E3M0, shift=True)
    over = dict(scale=E4M3, group_size=1 << 24, activation=E2M1, k=1 << 24)
    assert "16777216 inputs" in kernel.refusal(Problem(m=1, n=16, element=E2M1, **over))
    limit = largest_k(E2M1, E2M1, True)
    assert limit == (2**31 - 1) // (12 * 96)
    over = Problem(m=1, n=16, k=limit + 1, element=E2M1, activation=E2M1, shift=True)
    assert str(limit) in kernel.refusal(over)


def test_choice_follows_m():
    names = [choose(Problem(m, 64, 64, E2M1, E3M0)).name for m in (1, 64)]
    assert all(name.startswith("cpu.") for name in names)
    if "cpu.amx" in [k.name for k in AVAILABLE]:
        assert names[0] != "cpu.amx" and names[1] == "cpu.amx"


X86 = ("avx2", "avx512vnni", "avx512vbmi")


@pytest.mark.parametrize("features", [X86[:count] for count in range(4)], ids=lambda f: f[-1] if f else "none")
def test_choice_on_lesser_cpus(features, monkeypatch):
    rows = {name: row | {"supported": name in ("scalar", *features)} for name, row in native.cpu_kernels().items()}
    monkeypatch.setattr(native, "cpu_kernels", lambda: rows)
    kernel = choose(Problem(64, 64, 64, E2M1, E3M0))
    assert kernel.name == f"cpu.{features[-1] if features else 'scalar'}"


def test_without_the_native_module_the_reference_runs_and_says_why(monkeypatch):
    monkeypatch.setattr(native, "problem_with_module", lambda: "the native module is not built")
    with pytest.warns(UserWarning, match="not built"):
        assert choose(Problem(64, 64, 64, E2M1, E3M0)).name == "reference"
