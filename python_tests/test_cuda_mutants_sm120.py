"""Planted bugs in cuda.sm120's kernels: each is caught, by name, on the PTX machine through the real Python path."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import random_packed, random_x, same_bits
from cuda_mutants import ptx_of
from cuda_mutants_sm120 import INSTANCES, MUTANTS, MXF4, NVF4, OF, QUANTIZE
from cuda_on_cpu import OnCpu, all_kernels
from mutants import RIGHT, WRONG, assert_caught
from ptx import Program
from test_cuda_sm120 import BLACKWELL, WHY_NOT, exact_and_bound, scaled
from test_dynamic import dynamic_packed, wild_x

from llmfp4_kernels import reference
from llmfp4_kernels.backends import cuda_sm120
from llmfp4_kernels.backends.cuda_sm120 import NAME
from llmfp4_kernels.formats import E2M1, E4M3, E8M0, INTEGER, Dynamic

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")


@pytest.fixture(scope="module")
def programs():
    with ThreadPoolExecutor(2) as pool:
        numbers = (range(0, len(MUTANTS), 2), range(1, len(MUTANTS), 2))
        halves = list(pool.map(lambda half: ptx_of(half, "sm_120a", **OF), numbers))
    return [*all_kernels("sm_120a"), *map(Program, halves)]


def problems(kernel):
    """(packed, x, bias, multiprocessors) that reach every line: ragged in m, n and k, more steps than stages, k split
    over blocks, several tiles of rows, the last places empty, a bad token."""
    if kernel == MXF4:
        yield random_packed(150, 700, E2M1, E2M1, True), random_x(70, 700, torch.bfloat16), torch.randn(150), 1
        yield scaled(40, 1100, E8M0, 32, Dynamic(32, E8M0)), wild_x(20, 1100), None, 8
    elif kernel == NVF4:
        yield scaled(150, 300, E4M3, 16, Dynamic(16, E4M3)), random_x(20, 300), torch.randn(150), 1
    elif kernel == QUANTIZE:
        yield random_packed(20, 300, E2M1, E2M1, True), random_x(3, 300, torch.float16), None, 1
        yield dynamic_packed(20, 300, E2M1, E2M1, Dynamic(16, INTEGER)), wild_x(3, 300), None, 1
        for scale, group_size in ((E8M0, 32), (E4M3, 16)):
            bad = wild_x(4, 300)
            bad[1, 299] = float("inf")
            yield scaled(20, 300, scale, group_size, Dynamic(group_size, scale)), bad, None, 1
        small = scaled(20, 64, E4M3, 16, Dynamic(16, E4M3))  # a block whose scale is less than E4M3's least
        small.codes[:, :8] = small.codes[:, 16:] = 0
        x = random_x(4, 64)
        x[:, 16:32] *= 1e-6
        yield small, x, None, 1
        x[:, 32:] = 1.5 * 2.0**-126  # E8M0 begins at 2^-127, and E2M1's largest value takes two binades more
        yield scaled(20, 64, E8M0, 32, Dynamic(32, E8M0)), x, None, 1


def right(packed, x, bias, y) -> bool:
    if packed.integer:
        return same_bits(y, reference.gemm(x, packed, bias).to(x.dtype))
    bad = ~x.isfinite().all(1)
    exact, bound = exact_and_bound(packed, x.masked_fill(bad[:, None], 0), bias)
    near = ((y.double() - exact).abs() <= bound).all(1)
    return bool(torch.where(bad, y.isnan().all(1), near).all())


def outcome(kernel, instead, programs):
    for packed, x, bias, multiprocessors in problems(kernel):
        with OnCpu(programs, multiprocessors, 1, limit_s=20, instead=instead, **BLACKWELL) as gpu:
            y = gpu.run(cuda_sm120.Prepared(packed, bias), NAME, x)
            assert kernel in gpu.launched
        if not right(packed, x, bias, y):
            return WRONG
    return RIGHT


@pytest.mark.parametrize("kernel", INSTANCES)
def test_without_a_bug_the_values_are_right(kernel, programs):
    assert outcome(kernel, {}, programs) == RIGHT


@pytest.mark.parametrize("i", range(len(MUTANTS)), ids=[f"{m[1]}: {m[2]}" for m in MUTANTS])
def test_planted_bug_is_caught_by_name(programs, i):
    kernel, _, _, _, _, expected = MUTANTS[i]
    assert_caught(lambda: outcome(kernel, {kernel: f"mutant_{i}"}, programs), expected, f"mutant_{i}")
