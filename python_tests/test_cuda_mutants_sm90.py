"""Planted bugs in cuda.sm90's kernels: each is caught, by name, on the PTX machine through the real Python path."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import random_packed, random_x, same_bits
from cuda_mutants import ptx_of
from cuda_mutants_sm90 import FP8, GEMM, GROUPED, GROUPED_FP8, INSTANCES, MUTANTS, OF, QUANTIZE, SPLIT, WIDE
from cuda_on_cpu import OnCpu, all_kernels
from mutants import RIGHT, WRONG, assert_caught
from ptx import Program, missing
from test_cuda_fp8 import cancelling, packed_of, unit_weights
from test_cuda_stream_k import ordered

from llmfp4_kernels import epilogue, native, reference
from llmfp4_kernels.backends import cuda
from llmfp4_kernels.formats import E2M1, E3M0, E4M3, E4M3FN

WHY_NOT = missing() or native.problem_with_cuda()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")


@pytest.fixture(scope="module")
def programs():
    with ThreadPoolExecutor(2) as pool:
        numbers = (range(0, len(MUTANTS), 2), range(1, len(MUTANTS), 2))
        halves = list(pool.map(lambda half: ptx_of(half, "sm_90a", **OF), numbers))
    return [*all_kernels("sm_90a"), *map(Program, halves)]


def problems(kernel):
    """(packed, x, bias, multiprocessors) that reach every line: ragged in m, n and k, more units than stages, k split
    over blocks, two planes, several tiles of rows."""
    if kernel in (SPLIT, GROUPED):
        packed, x = random_packed(100, 1300, E2M1, scale=E4M3, group_size=16), random_x(20, 1300, torch.float16) / 64
        yield packed, x, None, 1
        if kernel == GROUPED:
            packed, x, multiprocessors = ordered()
            yield packed, x, None, multiprocessors
        return
    if kernel in (FP8, GROUPED_FP8):
        group = 32 if kernel == GROUPED_FP8 else 0
        yield packed_of(100, 1300, E2M1, E4M3FN, False, 1, group), random_x(20, 1300), None, 1
        yield *cancelling(group), None, 1
        return
    if kernel == QUANTIZE:  # every value of E4M3, and some beyond
        yield unit_weights(16, 256), torch.diag(torch.tensor(E4M3FN.values).nan_to_num(nan=1000.0)), None, 1
    if kernel == WIDE:
        yield random_packed(70, 130, E2M1, E2M1, True), random_x(140, 130), None, 8
        yield random_packed(200, 70, E2M1, E2M1, True), random_x(270, 70), None, 1  # all six tiles by one block
        return
    # A block takes a tile, and a part of the last one; then two that its stages hold at once; then tiles have parts.
    yield random_packed(300, 1050, E2M1, E2M1, True), random_x(20, 1050, torch.bfloat16), torch.randn(300), 1
    yield random_packed(264, 130, E2M1, E2M1, True), random_x(20, 130, torch.float16), torch.randn(264), 1
    yield random_packed(150, 1300, E2M1, E2M1, True), random_x(20, 1300), None, 8
    for n in (70, 48):
        yield random_packed(n, 130, E2M1, E3M0, True), random_x(15, 130), None, 1


def epilogue_is_right(instead, programs) -> bool:
    """A residual and SwiGLU, eight columns at a time; fp32 and bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        packed, x = random_packed(176, 130, E2M1, E2M1, True), random_x(20, 130, dtype) / 4
        bias, residual = torch.randn(176), random_x(20, 88, dtype, seed=7)
        with OnCpu(programs, 1, limit_s=20, instead=instead, capability=(9, 0)) as gpu:
            y = gpu.run(cuda.Prepared(packed, bias), "cuda.sm90", x, residual, True)
            assert GEMM in gpu.launched
        if not same_bits(y, epilogue.finish(reference.gemm(x, packed, bias), residual, True, dtype)):
            return False
    return True


def outcome(kernel, instead, programs):
    if kernel == GEMM and not epilogue_is_right(instead, programs):
        return WRONG
    for packed, x, bias, multiprocessors in problems(kernel):
        expected = reference.gemm(x, packed, bias).to(x.dtype)
        for seed in (0, 1):
            with OnCpu(programs, multiprocessors, seed, limit_s=20, instead=instead, capability=(9, 0)) as gpu:
                y = gpu.run(cuda.Prepared(packed, bias), "cuda.sm90", x)
                assert kernel in gpu.launched
            near = 1e-2 * expected.abs().max().item()
            alike = torch.allclose(y.float(), expected.float(), rtol=1e-2, atol=near)
            if not (same_bits(y, expected) if packed.integer or kernel == QUANTIZE else alike):
                return WRONG
    return RIGHT


@pytest.mark.parametrize("kernel", INSTANCES)
def test_without_a_bug_the_values_are_right(kernel, programs):
    assert outcome(kernel, {}, programs) == RIGHT


@pytest.mark.parametrize("i", range(len(MUTANTS)), ids=[f"{m[1]}: {m[2]}" for m in MUTANTS])
def test_planted_bug_is_caught_by_name(programs, i):
    kernel, _, _, _, _, expected = MUTANTS[i]
    assert_caught(lambda: outcome(kernel, {kernel: f"mutant_{i}"}, programs), expected, f"mutant_{i}")
