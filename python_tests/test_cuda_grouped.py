"""int8 activations and weights with group scales on CUDA, as PTX on the CPU, through the real Python path."""

import dataclasses
import itertools

import pytest
import torch
from cases import random_x, same_bits
from cuda_on_cpu import OnCpu, all_kernels
from ptx import missing
from test_cuda_integer import takes
from test_dynamic import wild_x
from test_grouped import ACTIVATIONS, INT8, grouped, named, rounding

from llmfp4_kernels import native, reference
from llmfp4_kernels.backends import cpu, cuda
from llmfp4_kernels.formats import E1M2, E2M1, E4M3, E8M0, FP4_ELEMENTS, RECIPES, Dynamic
from llmfp4_kernels.problem import Problem
from llmfp4_kernels.registry import choose

WHY_NOT = missing() or native.problem_with_cuda()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
NAMES = ["cuda.gemv", "cuda.sm80"]
GROUPS = [(E8M0, 16), (E8M0, 32), (E4M3, 16), (E4M3, 64), (E4M3, 128)]
SHAPES = [(1, 1, 1), (2, 17, 40), (5, 33, 130), (9, 70, 515), (40, 130, 1031)]
PART = 64
"""Inputs whose sum is exact, where a group has more."""
HALF_ULP = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(scope="module")
def programs():
    return all_kernels()


def check(gpu, packed, x, bias):
    """Every row that takes the problem, within the rounding of a sum over groups; the same bits twice."""
    prepared, exact = cuda.Prepared(packed, bias), reference.gemm(x, packed, bias).double()
    slices = 16  # sums of warps and blocks, added to each other
    bound = rounding(x, packed, bias, -(-packed.k // min(packed.group_size, PART)) + slices)
    run = [name for name in NAMES if takes(name, packed, len(x), x.dtype)]
    for name in run:
        y = gpu.run(prepared, name, x)
        error = (y.double() - exact).abs() - HALF_ULP[x.dtype] * exact.abs()
        assert (error <= bound).all(), (name, list(x.shape), packed.shape, (error / bound).max())
        assert same_bits(gpu.run(prepared, name, x), y)
    return run


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("group", GROUPS, **named)
def test_only_the_sum_over_groups_rounds(group, activation, programs):
    with OnCpu(programs, multiprocessors=8) as gpu:
        for i, ((m, n, k), weight) in enumerate(zip(SHAPES, itertools.cycle(FP4_ELEMENTS.values()))):
            packed, bias = grouped(n, k, weight, group, activation), random_x(1, n, seed=5)[0]
            x = wild_x(m, k, [torch.float32, torch.bfloat16][i % 2])
            assert check(gpu, packed, x, bias) == (NAMES if m <= 16 else ["cuda.sm80"])


@pytest.mark.parametrize("group", [g for g in GROUPS if g[1] <= PART], **named)
def test_same_bits_as_the_cpu(group, programs):
    """Where no block shares a sum and a group is one sum, groups are added in one order."""
    scalar = next(kernel for kernel in cpu.KERNELS if kernel.name == "cpu.scalar")
    for m, n, k in ((3, 40, 130), (33, 70, 515), (65, 24, 200)):
        packed, x = grouped(n, k, E2M1, group, (INT8, Dynamic())), wild_x(m, k)
        bias = random_x(1, n, seed=5)[0]
        with OnCpu(programs, multiprocessors=1) as gpu:
            y = gpu.run(cuda.Prepared(packed, bias), "cuda.sm80", x)
        assert same_bits(y, cpu.Prepared(packed, bias).run(scalar, x)), (m, n, k)


@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 33, 65])
def test_every_instance_and_split_over_k(m, programs):
    for group, multiprocessors, seed in (((E4M3, 16), 132, 1), ((E8M0, 32), 132, 2), ((E4M3, 128), 1, 3)):
        packed, x = grouped(150, 2100, E2M1, group, (INT8, Dynamic())), wild_x(m, 2100)
        with OnCpu(programs, multiprocessors, seed) as gpu:
            check(gpu, packed, x, torch.randn(150))


@pytest.mark.parametrize("scale", [E8M0, E4M3], **named)
def test_every_scale_byte(scale, programs):
    """One output per finite byte; E8M0 within 2^±100, as on the CPU."""
    inside = (lambda v: v == v) if scale is E4M3 else (lambda v: 2.0**-100 < v < 2.0**100)
    raw = torch.tensor([byte for byte, value in enumerate(scale.values) if inside(value)])
    packed = grouped(len(raw), 16, E2M1, (scale, 16), (INT8, Dynamic()))
    packed.group_scale, packed.row_scale = raw.to(torch.uint8)[:, None], torch.full((len(raw),), 2.0**-20)
    with OnCpu(programs) as gpu:
        check(gpu, packed, wild_x(5, 16), torch.zeros(len(raw)))


def test_the_largest_sums_are_exact(programs):
    """127 · 12 in all of 64 inputs: far from 2^22, where the fp32 reading of a sum would round."""
    packed = grouped(20, 192, E2M1, (E4M3, 128), (INT8, Dynamic()))
    packed.codes, packed.group_scale = torch.full_like(packed.codes, 0x77), torch.full_like(packed.group_scale, 0x38)
    packed.row_scale, x = torch.ones(20), torch.full((17, 192), -1.0)
    with OnCpu(programs) as gpu:
        for name in NAMES:
            y = gpu.run(cuda.Prepared(packed, None), name, x if name == "cuda.sm80" else x[:9])
            assert same_bits(y, reference.gemm(x[: len(y)], packed)) and (y == -6 * 192).all()


def test_a_bad_token_poisons_its_row_only(programs):
    packed, x = grouped(40, 70, E2M1, (E4M3, 16), (INT8, Dynamic())), random_x(20, 70)
    x[3, 69] = float("inf")
    with OnCpu(programs) as gpu:
        y = gpu.run(cuda.Prepared(packed, None), "cuda.sm80", x)
    assert y[3].isnan().all() and y[:3].isfinite().all() and y[4:].isfinite().all()


def test_recipes_run_without_the_reference(monkeypatch):
    monkeypatch.setattr(cuda.machine, "capability", lambda index: (8, 0), raising=False)
    recipes = [r for r in RECIPES.values() if r.group_scale and r.dynamic == Dynamic()]
    for recipe in recipes:
        for m, name in ((1, "cuda.gemv"), (512, "cuda.sm80")):
            problem = Problem.of_recipe(recipe, m, 4096, 4096, device="cuda")
            if problem.grouped:
                assert choose(problem).name == name, recipe.name
    assert {r.name for r in recipes if Problem.of_recipe(r, 1, 64, 64).grouped} >= {
        "mxfp4-a8-int", "nvfp4-a8-int", "int4-a8", "int4-a4"}  # fmt: skip
    problem = Problem(1, 64, 64, E1M2, INT8, E4M3, 24, dynamic=Dynamic(), device="cuda")
    assert "groups of 24" in cuda.refusal("sm80", problem)
    long = dataclasses.replace(problem, group_size=32, k=16 * 10**6)
    assert cuda.refusal("sm80", long) is None
