"""cuda.sm90, as PTX of sm_90a on the CPU, through the real Python path.

Integers are bit-equal to the reference, floats within computed bounds of the exact product.
"""

import dataclasses
import itertools

import pytest
import torch
from cases import GROUP_SCALES, ODD_SHAPES, random_packed, random_x, same_bits
from cuda_on_cpu import OnCpu, all_kernels
from ptx import missing
from test_cuda_float import exact_and_bound
from test_cuda_fp8 import WIDTHS, rows_of_tile
from test_dynamic import dynamic_packed, wild_x

from llmfp4_kernels import native, reference
from llmfp4_kernels.backends import cuda, cuda_sm90
from llmfp4_kernels.formats import E1M2, E2M1, E3M0, E4M3, E8M0, FP4_ELEMENTS, INTEGER, Dynamic, element
from llmfp4_kernels.problem import Problem
from llmfp4_kernels.registry import choose

WHY_NOT = missing() or native.problem_with_cuda()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
HOPPER = {"capability": (9, 0)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNEL = next(kernel for kernel in cuda.KERNELS if kernel.name == "cuda.sm90")


@pytest.fixture(scope="module")
def programs():
    return all_kernels("sm_90a")


def check(gpu, packed, x, bias=None):
    assert KERNEL.refusal(dataclasses.replace(Problem.of(packed, len(x), x.dtype), device="cuda")) is None
    y = gpu.run(cuda.Prepared(packed, bias), "cuda.sm90", x)
    assert same_bits(y, reference.gemm(x, packed, bias).to(x.dtype)), (list(x.shape), packed.shape, x.dtype)
    return gpu.launched[-1]


@pytest.mark.parametrize("pair", [(E2M1, E2M1), (E1M2, E3M0), (E3M0, E1M2)], ids=lambda p: f"{p[0].name}x{p[1].name}")
def test_static_activations(pair, programs):
    """E3M0 with a shift takes two planes of int8."""
    with OnCpu(programs, multiprocessors=8, **HOPPER) as gpu:
        for i, (m, n, k) in enumerate(ODD_SHAPES):
            packed = random_packed(n, k, *pair, shift=i % 2 == 0)
            check(gpu, packed, random_x(m, k, DTYPES[i % 3]), torch.randn(n) if i % 4 else None)


@pytest.mark.parametrize(
    ("activation", "dynamic"), [(E2M1, Dynamic(16, INTEGER)), (element("e1m6"), Dynamic())], ids=str
)
def test_dynamic_activations(activation, dynamic, programs):
    with OnCpu(programs, multiprocessors=4, **HOPPER) as gpu:
        for weight, dtype, (m, n, k) in zip((E2M1, E1M2, E3M0), DTYPES, [(1, 24, 66), (7, 33, 40), (40, 130, 1031)]):
            packed = dynamic_packed(n, k, weight, activation, dynamic, smooth=m != 7)
            check(gpu, packed, wild_x(m, k, dtype), random_x(1, n, seed=5)[0])


@pytest.mark.parametrize("m", [17, 40, 70, 250])
def test_every_instance_and_split_over_k(m, programs):
    """Few multiprocessors: the widest tile, where it is full. Many: blocks share a sum over k. Random schedules."""
    launched = set()
    for n, multiprocessors, seed in ((150, 1, 1), (150, 132, 2), (152, 1, 3)):
        packed = random_packed(n, 1100, E2M1, E2M1, True)
        with OnCpu(programs, multiprocessors, seed, **HOPPER) as gpu:
            launched.add(check(gpu, packed, random_x(m, 1100, DTYPES[seed % 3]), torch.randn(n)))
    widest = {17: {32}, 40: {64}, 70: {128}, 250: {128, 256}}[m]
    assert launched == {f"gemm_sm90_int8_{rows}" for rows in widest}


@pytest.mark.parametrize("most", WIDTHS)
def test_every_width_of_integers(most, programs):
    """The fewest rows of a tile, and the most. Integers have no 40 and no 56."""
    for i, rows in enumerate(r for r in WIDTHS[most] if r not in (40, 56)):
        packed = random_packed(150, 330, E2M1, E3M0 if i % 2 else E2M1, True, seed=rows)  # of E3M0 two planes
        for tiles in (1, 2) if most == 128 else (1,):
            m = (tiles * rows if i % 2 else tiles * (rows - 7)) // (1 + i % 2)
            with OnCpu(programs, 1 if most == 256 else 200, **HOPPER) as gpu:
                x = random_x(m, 330)
                assert check(gpu, packed, x) == f"gemm_sm90_int8_{most}" and rows_of_tile(gpu, x) == rows


def check_float(gpu, packed, x, bias=None):
    assert KERNEL.refusal(dataclasses.replace(Problem.of(packed, len(x), x.dtype), device="cuda")) is None
    prepared, (exact, bound) = cuda.Prepared(packed, bias), exact_and_bound(packed, x, bias)
    y = gpu.run(prepared, "cuda.sm90", x)
    assert y.dtype == x.dtype and ((y.double() - exact).abs() <= bound).all(), (list(x.shape), packed.shape)
    assert same_bits(gpu.run(prepared, "cuda.sm90", x), y)
    return gpu.launched[-1]


@pytest.mark.parametrize(
    "group", [*GROUP_SCALES, (E8M0, 16), (E4M3, 64)], ids=lambda g: f"{g[0].name}-{g[1]}" if g[0] else "rows"
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_16_bit_activations_with_every_scale_and_element(group, dtype, programs):
    with OnCpu(programs, multiprocessors=8, **HOPPER) as gpu:
        for i, ((m, n, k), weight) in enumerate(itertools.product(ODD_SHAPES, FP4_ELEMENTS.values())):
            if i % 2 and m > 4:
                continue
            packed = random_packed(n, k, weight, scale=group[0], group_size=group[1], seed=i)
            x = random_x(m, k, dtype) / (256 if dtype == torch.float16 else 1)  # outputs stay below 65504
            check_float(gpu, packed, x, torch.randn(n) if i % 3 else None)


@pytest.mark.parametrize("m", [17, 40, 70])
@pytest.mark.parametrize("group", [(None, 0), (E4M3, 16)], ids=lambda g: f"{g[0].name}-{g[1]}" if g[0] else "rows")
def test_every_instance_of_16_bits_and_split_over_k(m, group, programs):
    packed = random_packed(150, 1096, E2M1, scale=group[0], group_size=group[1])
    for (dtype, tag), multiprocessors, seed in (
        ((torch.bfloat16, "bf16"), 1, 1),
        ((torch.float16, "f16"), 132, 2),
        ((torch.bfloat16, "bf16"), 132, 3),
        ((torch.float16, "f16"), 1, 4),
    ):
        with OnCpu(programs, multiprocessors, seed, **HOPPER) as gpu:
            launched = check_float(gpu, packed, random_x(m, 1096, dtype) / 64)
        rows = {17: 32, 40: 64, 70: 128}[m]
        assert launched == f"gemm_sm90_{tag}{'_grouped' if group[0] else ''}_{rows}"


@pytest.mark.parametrize("most", [32, 64, 128])
@pytest.mark.parametrize("group", [(None, 0), (E8M0, 32)], ids=lambda g: f"{g[0].name}-{g[1]}" if g[0] else "rows")
def test_every_width_of_16_bits(most, group, programs):
    """float32 is four planes of bfloat16."""
    for rows, dtype in itertools.product(WIDTHS[most], (torch.float16, torch.float32)):
        packed = random_packed(150, 200, E2M1, scale=group[0], group_size=group[1], seed=rows)
        x = random_x(rows - 5 if dtype == torch.float16 else rows // 4, 200, dtype) / 64
        tag = ("f16" if dtype == torch.float16 else "bf16") + "_grouped" * bool(group[0])
        with OnCpu(programs, 200, **HOPPER) as gpu:
            assert check_float(gpu, packed, x) == f"gemm_sm90_{tag}_{most}" and rows_of_tile(gpu, x) == rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_and_shifts_of_inputs(dtype, programs):
    smooth = dataclasses.replace(dynamic_packed(40, 135, E2M1, E2M1, Dynamic()), activation=None, dynamic=None)
    shifted = random_packed(40, 135, E1M2, shift=True)
    with OnCpu(programs, **HOPPER) as gpu:
        for packed in (smooth, shifted, dataclasses.replace(shifted, x_factor=smooth.x_factor)):
            check_float(gpu, packed, random_x(20, 135, dtype) / 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_integers_are_exact(dtype, programs):
    """Where every product and sum is exact in fp32, so is y: operand order, signs, every code and scale are right."""
    for weight, scale in ((E2M1, None), (E1M2, None), (E3M0, None), (E2M1, E4M3), (E2M1, E8M0)):
        packed = random_packed(48, 192, weight, scale=scale, group_size=16 if scale else 0)
        packed.row_scale = torch.ones(48)
        if scale:  # 1, 2 or 4
            one, step = (0x38, 8) if scale == E4M3 else (127, 1)
            packed.group_scale = (one + step * torch.randint(0, 3, packed.group_scale.shape)).to(torch.uint8)
        x = torch.randint(-2, 3, (20, 192)).to(dtype)
        expected = (x.double() @ reference.dequantize(packed, torch.float64).T).to(dtype)
        with OnCpu(programs, **HOPPER) as gpu:
            assert torch.equal(gpu.run(cuda.Prepared(packed, None), "cuda.sm90", x), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_poisons_its_row_of_floats_only(bad, programs):
    x = random_x(20, 72, torch.bfloat16)
    x[3, 69] = bad
    with OnCpu(programs, **HOPPER) as gpu:
        y = gpu.run(cuda.Prepared(random_packed(40, 72, E2M1), None), "cuda.sm90", x)
    assert not y[3].isfinite().any() and y[:3].isfinite().all() and y[4:].isfinite().all()


@pytest.mark.parametrize("seed", range(1, 4))
def test_any_schedule_of_threads(seed, programs):
    packed = dynamic_packed(40, 1030, E2M1, E2M1, Dynamic(32, INTEGER))
    with OnCpu(programs, 1, seed, **HOPPER) as gpu:
        check(gpu, packed, wild_x(20, 1030))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_poisons_its_row_only(bad, programs):
    x = random_x(20, 70)
    x[3, 69] = bad
    with OnCpu(programs, **HOPPER) as gpu:
        for packed in (random_packed(40, 70, E2M1, E2M1, True), dynamic_packed(40, 70, E2M1, E2M1, Dynamic())):
            check(gpu, packed, x)


def test_more_stages_than_the_pipeline_holds_and_large_sums(programs):
    packed = random_packed(17, 4000, E2M1, E2M1, True)
    packed.codes = torch.full_like(packed.codes, 0x77)
    packed.shift = torch.zeros(4000, dtype=torch.uint8)
    with OnCpu(programs, 1, **HOPPER) as gpu:
        check(gpu, packed, torch.full((17, 4000), 1e6))


def test_refusals_and_order(monkeypatch):
    problem = Problem(64, 64, 64, E2M1, E2M1, device="cuda")
    capability = {"value": (8, 9)}
    monkeypatch.setattr(cuda.machine, "capability", lambda index: capability["value"], raising=False)
    assert "this GPU is sm_89" in KERNEL.refusal(problem) and choose(problem).name == "cuda.sm80"
    capability["value"] = (12, 0)
    assert "this GPU is sm_120" in KERNEL.refusal(problem)
    capability["value"] = (9, 0)
    assert KERNEL.refusal(problem) is None and choose(problem).name == "cuda.sm90"
    assert choose(dataclasses.replace(problem, m=16)).name == "cuda.gemv"
    assert "int32" in KERNEL.refusal(dataclasses.replace(problem, k=2 * 10**7))

    groups = {"activation": element("e1m6"), "dynamic": Dynamic(), "scale": E4M3, "group_size": 16}
    grouped = dataclasses.replace(problem, **groups)
    assert "one scale per row" in KERNEL.refusal(grouped) and choose(grouped).name == "cuda.sm80"

    class Module:
        cuda_architectures = ("80-real", "90")

    monkeypatch.setattr(native, "problem_with_cuda", lambda: None)
    monkeypatch.setattr(cuda_sm90.native, "module", Module)
    assert KERNEL.refusal(problem).endswith("was built for 80-real, 90, without 90a-real")
