"""Tiles of cuda.sm90 among blocks (csrc/cuda/stream_k.h): what is shared, and that it changes no bit of a result."""

import itertools

import pytest
import torch
from cases import random_packed, random_x, same_bits
from cuda_on_cpu import OnCpu, all_kernels
from ptx import missing
from test_cuda_float import exact_and_bound
from test_cuda_fp8 import FAST, SM90, packed_of
from test_cuda_fp8 import check as check_fp8
from test_cuda_sm90 import HOPPER, check, check_float

from llmfp4_kernels import native, reference
from llmfp4_kernels.backends import cuda
from llmfp4_kernels.formats import E2M1, E3M0, E4M3, E4M3FN

WHY_NOT = missing() or native.problem_with_cuda()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
SHAPES = {  # m, n, k and multiprocessors: tiles taken whole, sharers, shared tiles
    "parts at both ends": ((21, 151, 1331, 3), (0, 3, 2)),  # tiles of 21 units, pieces of 14: the second has 7 of each
    "three parts of a tile": ((21, 71, 1331, 3), (0, 3, 1)),
    "whole tiles before": ((19, 300, 1050, 1), (2, 2, 1)),  # pieces of 9 and 8 units
    "not all blocks share": ((29, 640, 1050, 2), (4, 2, 1)),
    "128 rows": ((70, 71, 1650, 2), (0, 2, 1)),
}


@pytest.fixture(scope="module")
def programs():
    return all_kernels("sm_90a")


def planned(gpu, m, dtype):
    plan = gpu.prepared.plans[gpu.kernel.removeprefix("cuda."), m, cuda.DTYPES[dtype]]
    return plan.whole, plan.sharers, plan.counters


@pytest.mark.parametrize(
    ("m", "n", "k", "rows", "whole", "left", "sharers"),
    [
        (32, 4096, 4096, 32, 0, 32, 128),  # fewer tiles than multiprocessors
        (32, 4096, 512, 32, 32, 0, 0),  # ... of 8 units, which are not shared
        (64, 28672, 8192, 64, 0, 224, 264),  # more tiles than multiprocessors, of which each runs two
        (64, 28672, 1024, 64, 224, 0, 0),  # ... of 16 units: 14 instead are no gain
        (128, 4096, 4096, 128, 0, 32, 96),
        (1024, 4096, 4096, 256, 128, 0, 0),  # a wave but for 4 multiprocessors: 63 units instead of 64 are no gain
        (4096, 4096, 11008, 256, 396, 116, 132),  # three waves, and 116 tiles
    ],
)
def test_what_is_shared_on_132_multiprocessors(m, n, k, rows, whole, left, sharers):
    linear = native.module().CudaLinear(n=n, k=k, element=E2M1.fields, codes=0, row_scale=0)  # is not run
    linear.quantize_activations(E2M1.fields, 1.0)
    plan = linear.plan("sm90", m, 0, 132)
    assert (plan.whole, plan.sharers, plan.counters) == (whole, sharers, left)
    assert plan.parts[2] == (left and (sharers + left - 1) * rows * 128 * 4)


@pytest.mark.parametrize("shape", SHAPES)
def test_integers_have_one_result(shape, programs):
    """Blocks in order and in any; then again, on counters that the first time left."""
    (m, n, k, multiprocessors), shares = SHAPES[shape]
    two_planes, dtype = shape == "whole tiles before", torch.bfloat16 if n % 2 else torch.float32
    packed, bias = random_packed(n, k, E2M1, E3M0 if two_planes else E2M1, True), torch.randn(n)
    x = random_x(m // 2 if two_planes else m, k, dtype)
    for seed in (0, 1):
        with OnCpu(programs, multiprocessors, seed, **HOPPER) as gpu:
            check(gpu, packed, x, bias)
            assert planned(gpu, len(x), dtype) == shares
    if shape == "parts at both ends":
        with OnCpu(programs, multiprocessors, 2, **HOPPER) as gpu:
            check(gpu, packed, x, bias)
            check(gpu, packed, x, bias)
            assert all(t.dtype != torch.int32 for t in gpu.allocations.made)


@pytest.mark.parametrize("kind", ["bf16", "f16", "f16_grouped", "fp8", "fp8_grouped", "fp8_fast"])
def test_floats_have_one_result(kind, programs):
    """Within their bounds, and of the same bits in whatever order blocks come."""
    (m, n, k, multiprocessors), shares = SHAPES["three parts of a tile"]
    x, results = random_x(m, k, torch.bfloat16 if kind == "bf16" else torch.float16) / 64, []
    row = FAST if kind == "fp8_fast" else SM90
    if kind.startswith("fp8"):
        packed = packed_of(n, k, E2M1, E4M3FN, dynamic=True, seed=1, group=32 * (kind == "fp8_grouped"))
    else:
        packed = random_packed(n, k, E2M1, **{"scale": E4M3, "group_size": 16} if kind == "f16_grouped" else {})
    for seed in range(3):
        with OnCpu(programs, multiprocessors, seed, **HOPPER) as gpu:
            if seed == 0:
                launched = check_fp8(gpu, packed, x, row=row) if packed.activation else check_float(gpu, packed, x)
                assert launched == f"gemm_sm90_{kind}_32" and planned(gpu, m, x.dtype) == shares
            results.append(gpu.run(cuda.Prepared(packed, None), row, x))
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


@pytest.mark.parametrize("rows", [40, 112, 160, 224])
def test_parts_of_narrowed_tiles(rows, programs):
    """Less is kept of a tile than its kernel has registers for. Each tile is shared by two blocks."""
    packed, m = random_packed(71, 330, E2M1, *([] if rows == 40 else [E2M1, True])), rows - 3
    x, tile = random_x(m, 330, torch.float16) / 64, {40: 1, 112: 2, 160: 3, 224: 3}[rows]
    with OnCpu(programs, 2, 1, **HOPPER) as gpu:
        prepared = cuda.Prepared(packed, None)
        prepared.plans["sm90", m, cuda.DTYPES[x.dtype]] = plan = prepared.plan("sm90", m, x.dtype, 2, (tile, 2))
        assert plan.tile_size == f"128x{rows}" and plan.parts[2] == 2 * rows * 128 * 4
        y = gpu.run(prepared, SM90, x)
    if rows == 40:
        exact, bound = exact_and_bound(packed, x)
        assert ((y.double() - exact).abs() <= bound).all()
    else:
        assert same_bits(y, reference.gemm(x, packed).to(x.dtype))


def ordered():
    """(packed, x, multiprocessors): parts 2^25, -2^25 and 1, of which y is 1 in this order, 0 if the last is not."""
    packed = random_packed(16, 3 * 512, E2M1, scale=E4M3, group_size=16)
    packed.codes = torch.full_like(packed.codes, E2M1.values.index(4.0) * 17)
    packed.group_scale, packed.row_scale = torch.full_like(packed.group_scale, 0x38), torch.ones(16)
    x = torch.zeros(17, packed.k, dtype=torch.float16)
    x[:, :512], x[:, 512:1024] = 2.0**14, -(2.0**14)
    x[:, -1] = 0.25
    return packed, x, 3


def test_parts_are_added_in_the_order_of_k(programs):
    packed, x, multiprocessors = ordered()
    for seed in range(4):
        with OnCpu(programs, multiprocessors, seed, **HOPPER) as gpu:
            assert (gpu.run(cuda.Prepared(packed, None), SM90, x) == 1).all()


def test_a_block_takes_tiles_of_several_rows(programs):
    """Three tiles of 96 rows and 70 outputs, then six of 96 rows and 128 outputs."""
    for n, tiles in ((70, 3), (200, 6)):
        with OnCpu(programs, 1, **HOPPER) as gpu:
            assert check(gpu, random_packed(n, 330, E2M1, E2M1, True), random_x(270, 330)) == "gemm_sm90_int8_128"
            assert planned(gpu, 270, torch.float32) == (tiles, 0, 0)


def test_stages_hold_several_tiles(programs):
    """Tiles of 3 units, 8 stages: weights of a block's second tile are under way before the kernel before has ended."""
    for seed, (n, multiprocessors) in itertools.product((0, 1), ((300, 1), (520, 1))):
        packed = random_packed(n, 150, E2M1, E2M1, True)
        with OnCpu(programs, multiprocessors, seed, **HOPPER) as gpu:
            check(gpu, packed, random_x(20, 150))
            assert planned(gpu, 20, torch.float32) == (-(-n // 128), 0, 0)
