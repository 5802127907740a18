"""Planted bugs in the CUDA kernels: each is caught, by name, on the PTX machine through the real Python path."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import random_packed, random_x, same_bits
from cuda_mutants import BF16_SHIFTED, GEMM, GEMV, GROUPED, INSTANCES, INT8_GROUPED, MUTANTS, QUANTIZE, SPLIT, ptx_of
from cuda_on_cpu import OnCpu, all_kernels
from mutants import RIGHT, WRONG, assert_caught
from ptx import Program, missing
from test_cuda_float import exact_and_bound
from test_dynamic import dynamic_packed, wild_x
from test_grouped import INT8, grouped, rounding

from llmfp4_kernels import epilogue, native, reference
from llmfp4_kernels.backends import cuda
from llmfp4_kernels.formats import E2M1, E3M0, E4M3, E8M0, INTEGER, Dynamic
from llmfp4_kernels.packed import FP32_MAX

WHY_NOT = missing() or native.problem_with_cuda()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")


@pytest.fixture(scope="module")
def programs():
    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(ptx_of, (range(0, len(MUTANTS), 2), range(1, len(MUTANTS), 2))))
    return [*all_kernels(), *map(Program, halves)]


def problems(kernel):
    """(packed, x, bias) that reach every line of a kernel: ragged in m, n and k, k split over blocks, two planes."""
    if kernel == GROUPED:
        yield random_packed(100, 1096, E2M1, scale=E4M3, group_size=16), random_x(20, 1096, torch.float16) / 64, None
        return
    if kernel == BF16_SHIFTED:
        yield random_packed(100, 1096, E2M1, shift=True), random_x(20, 1096, torch.bfloat16), None
        return
    if kernel == INT8_GROUPED:
        for group in ((E4M3, 16), (E8M0, 32)):
            yield grouped(100, 1096, E2M1, group, (INT8, Dynamic())), wild_x(20, 1096), torch.randn(100)
        return
    if kernel == QUANTIZE:
        yield dynamic_packed(20, 330, E2M1, E2M1, Dynamic(32, INTEGER)), wild_x(3, 330, torch.bfloat16), None
        yield random_packed(20, 330, E2M1, E2M1, True), random_x(3, 330), None
        yield random_packed(20, 330, E2M1, E3M0, True), random_x(3, 330), None
        yield grouped(20, 330, E2M1, (E8M0, 32), (INT8, Dynamic())), wild_x(3, 330), torch.zeros(20)
        # More inputs than the block's threads hold at once, and a group that k ends in: some of its threads hold
        # integers of the round before, which are large beside small inputs.
        yield dynamic_packed(8, 8256, E2M1, E2M1, Dynamic(128, INTEGER)), random_x(1, 8256) * 2.0**-20, None
        return
    if kernel == SPLIT:  # the largest floats, of which bf16 has none; powers of two for factors
        halves, x = random_packed(24, 64, E2M1), torch.zeros(3, 64)
        halves.codes, halves.row_scale = halves.codes & 0x11, torch.ones(24)  # 0 and 0.5: all sums are exact
        for token, value in enumerate((FP32_MAX, -FP32_MAX, 3.3961776e38)):
            x[token, 7 * token + 1] = value
        yield halves, x, None
        yield dataclasses.replace(halves, x_factor=2.0 ** (torch.arange(64) % 3)), random_x(3, 64).round(), None
        return
    m = 5 if kernel.startswith("gemv") else 20
    yield random_packed(70, 2100, E2M1, E2M1, True), random_x(m, 2100, torch.bfloat16), torch.randn(70)
    if kernel not in (GEMV, GEMM):
        return
    packed = dynamic_packed(150, 1100, E2M1, E2M1, Dynamic())
    yield packed, wild_x(m, 1100), torch.randn(150)
    yield random_packed(70, 2100, E2M1, E3M0, True), random_x(m // 2, 2100), None
    yield random_packed(70, 130, E2M1, E3M0, True), random_x(m // 2, 130), None  # k is not split


def rows(kernel, packed):
    """What launches the kernel; for quantization also the row that packs its codes, for parts both that take some."""
    if kernel == SPLIT:
        return ["cuda.gemv", "cuda.sm80"]
    packs = kernel == QUANTIZE and packed.activation == E2M1 and not packed.dynamic
    return [INSTANCES[kernel][0], *["cuda.sm80-packed"] * packs]


def right(kernel, packed, x, bias, y) -> bool:
    expected = reference.gemm(x, packed, bias).to(x.dtype)
    if kernel == SPLIT:
        return torch.equal(y, expected)
    if packed.scale and packed.activation:
        terms = -(-packed.k // packed.group_size) + 16
        return bool(((y.double() - expected.double()).abs() <= rounding(x, packed, bias, terms)).all())
    if kernel == BF16_SHIFTED:
        exact, bound = exact_and_bound(packed, x, bias)
        return bool(((y.double() - exact).abs() <= bound).all())
    if kernel == GROUPED:
        return torch.allclose(y.float(), expected.float(), rtol=1e-2, atol=1e-2 * expected.abs().max().item())
    return same_bits(y, expected)


def epilogue_is_right(instead, programs) -> bool:
    """A residual and SwiGLU behind ragged tiles, in 16 bits; k split over blocks, then not."""
    for n, k in ((144, 2100), (80, 130)):
        packed, x = random_packed(n, k, E2M1, E2M1, True), random_x(20, k, torch.bfloat16) / 4
        bias, residual = torch.randn(n), random_x(20, n // 2, torch.bfloat16, seed=7)
        bias[5], bias[6], residual[:, 5] = -1e5, 1e5, 0  # gates where the exponential ends
        with OnCpu(programs, multiprocessors=16, limit_s=20, instead=instead) as gpu:
            y = gpu.run(cuda.Prepared(packed, bias), "cuda.sm80", x, residual, True)
            assert GEMM in gpu.launched
        if not same_bits(y, epilogue.finish(reference.gemm(x, packed, bias), residual, True, x.dtype)):
            return False
    return True


def outcome(kernel, instead, programs):
    if kernel == GEMM and not epilogue_is_right(instead, programs):
        return WRONG
    for packed, x, bias in problems(kernel):
        wrong = []
        for row in rows(kernel, packed):
            with OnCpu(programs, multiprocessors=16, limit_s=20, instead=instead) as gpu:
                y = gpu.run(cuda.Prepared(packed, bias), row, x)
                assert kernel in gpu.launched
            wrong += [] if right(kernel, packed, x, bias, y) else [row]
        if wrong and (kernel != SPLIT or wrong == rows(kernel, packed)):
            return WRONG
    return RIGHT


@pytest.mark.parametrize("kernel", list(INSTANCES))
def test_without_a_bug_the_values_are_right(kernel, programs):
    assert outcome(kernel, {}, programs) == RIGHT


@pytest.mark.parametrize("i", range(len(MUTANTS)), ids=[f"{m[1]}: {m[2]}" for m in MUTANTS])
def test_planted_bug_is_caught_by_name(programs, i):
    kernel, _, _, _, _, expected = MUTANTS[i]
    assert_caught(lambda: outcome(kernel, {kernel: f"mutant_{i}"}, programs), expected, f"mutant_{i}")
