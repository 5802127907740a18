"""Weights with group scales times int8 activations: sums of a group are exact, only the sum over groups rounds."""

import dataclasses
import itertools

import pytest
import torch
from cases import GROUP_SCALES, random_packed, random_x, same_bits
from test_cpu_kernels import AVAILABLE
from test_dynamic import wild_x

from llmfp4_kernels import FP4Linear, reference
from llmfp4_kernels.backends.cpu import Prepared
from llmfp4_kernels.formats import E1M2, E2M1, E3M0, E4M3, E8M0, FP4_ELEMENTS, INTEGER, RECIPES, Dynamic, element
from llmfp4_kernels.problem import Problem
from llmfp4_kernels.quantizer.linear import quantize_linear
from llmfp4_kernels.registry import choose

INT8 = element("e1m6")
SHAPES = [(1, 1, 1), (2, 17, 40), (5, 33, 130), (8, 24, 64), (9, 70, 515), (40, 130, 1031), (200, 65, 70)]
GROUPS = [*GROUP_SCALES[1:], (E8M0, 24), (E4M3, 1024)]
ACTIVATIONS = [(INT8, Dynamic()), (E1M2, Dynamic()), (E2M1, Dynamic(16, INTEGER)), (E2M1, None)]
"""None: static, with a shift."""
named = dict(ids=lambda value: getattr(value, "name", None) or f"{value[0].name}-{value[1]}")


def grouped(n, k, weight, group, activation):
    act, dynamic = activation
    static = dict(activation=act, shift=True) if dynamic is None else {}
    packed = random_packed(n, k, weight, scale=group[0], group_size=group[1], **static)
    return packed if dynamic is None else dataclasses.replace(packed, activation=act, dynamic=dynamic)


def rounding(x, packed, bias, terms):
    """terms · 2^-24 · Σ|x·w|, and the scales and the bias: [m, n]."""
    x = reference.round_activation(x, packed, torch.float64).abs()
    return (x @ reference.stored_weight(packed).abs().T + bias.abs()) * (terms + 4) * 2.0**-24 + 1e-30


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("group", GROUPS, **named)
@pytest.mark.parametrize("kernel", AVAILABLE, **named)
def test_only_the_sum_over_groups_rounds(kernel, group, activation, threads):
    for (m, n, k), weight in itertools.product(SHAPES, FP4_ELEMENTS.values()):
        packed, bias = grouped(n, k, weight, group, activation), random_x(1, n, seed=5)[0]
        x, prepared = wild_x(m, k), Prepared(packed, bias)
        exact = reference.gemm(x, packed, bias).double()
        threads(1)
        y = prepared.run(kernel, x)
        terms = k if kernel.name == "cpu.amx" else -(-k // group[1])
        assert ((y.double() - exact).abs() <= rounding(x, packed, bias, terms)).all(), (m, n, k, weight.name)
        threads(2)
        assert same_bits(prepared.run(kernel, x), y), "the split over threads changed the bits"


@pytest.mark.parametrize("group", GROUPS, **named)
def test_same_bits_for_every_instruction_set_and_number_of_rows(group):
    packed, x = grouped(70, 515, E2M1, group, (INT8, Dynamic())), wild_x(33, 515)
    prepared, (first, *others) = Prepared(packed, None), [k for k in AVAILABLE if k.name != "cpu.amx"]
    y = prepared.run(first, x)
    for kernel in others:
        assert same_bits(prepared.run(kernel, x), y), kernel.name
    for m in (1, 3, 8, 9):
        assert same_bits(prepared.run(first, x[:m].contiguous()), y[:m])


@pytest.mark.parametrize("kernel", AVAILABLE, **named)
@pytest.mark.parametrize("scale", [E8M0, E4M3], **named)
def test_every_scale_byte(kernel, scale):
    """One output per finite byte; E8M0 within 2^±100, since sums in integer units beyond are no normal fp32 numbers."""
    inside = (lambda v: v == v) if scale is E4M3 else (lambda v: 2.0**-100 < v < 2.0**100)
    raw = torch.tensor([byte for byte, value in enumerate(scale.values) if inside(value)])
    packed = grouped(len(raw), 16, E2M1, (scale, 16), (INT8, Dynamic()))
    packed.group_scale, packed.row_scale = raw.to(torch.uint8)[:, None], torch.full((len(raw),), 2.0**-20)
    x = wild_x(20, 16)
    bound = rounding(x, packed, torch.zeros(len(raw)), 16)
    y, exact = Prepared(packed, None).run(kernel, x).double(), reference.gemm(x, packed).double()
    assert ((y - exact).abs() <= bound).all()


@pytest.mark.parametrize("kernel", [kernel for kernel in AVAILABLE if kernel.name != "cpu.amx"], **named)
def test_the_least_scale_is_a_subnormal_number(kernel):
    """Byte 0 of E8M0 is 2^-127; sums are taken to normal numbers by their activations. AMX knows no subnormals."""
    packed = random_packed(32, 64, E2M1, scale=E8M0, group_size=32)
    packed.group_scale[:, 0], packed.group_scale[:, 1] = 0, 1
    weight = reference.dequantize(packed, torch.float64)
    for m in (1, 4, 12):
        x = random_x(m, 64) * 2.0**100
        y, exact = Prepared(packed, None).run(kernel, x).double(), x.double() @ weight.T
        torch.testing.assert_close(y, exact, rtol=1e-4, atol=float(exact.abs().max()) * 1e-6)


@pytest.mark.parametrize("kernel", AVAILABLE, **named)
def test_a_bad_token_poisons_its_row_only(kernel):
    packed, x = grouped(40, 70, E2M1, (E4M3, 16), (INT8, Dynamic())), random_x(20, 70)
    x[3, 69] = float("nan")
    y = Prepared(packed, None).run(kernel, x)
    assert y[3].isnan().all() and y[:3].isfinite().all() and y[4:].isfinite().all()


@pytest.mark.parametrize("name", [r.name for r in RECIPES.values() if r.group_scale and r.dynamic == Dynamic()])
def test_int8_recipes_multiply_integers(name):
    torch.manual_seed(0)
    weight, x = torch.randn(48, 160), random_x(7, 160)
    packed = quantize_linear(weight, name)
    chosen = choose(Problem.of(packed, 7, torch.float32)).name
    assert (chosen == "cpu.rounded") == (not Problem.of(packed, 7, torch.float32).grouped)
    y = FP4Linear.from_packed(packed)(x)
    dense = x @ weight.T
    assert ((y - dense).norm() / dense.norm()).item() < (0.5 if name == "int4-a4" else 0.2)
    torch.testing.assert_close(y, reference.gemm(x, packed), rtol=1e-5, atol=1e-4)


def test_what_is_grouped():
    problem = Problem(4, 16, 64, E2M1, INT8, E4M3, 16, dynamic=Dynamic())
    assert problem.grouped and not problem.integer
    for other in (dict(scale=None, group_size=0), dict(activation=None, dynamic=None),
                  dict(activation=element("e4m3")), dict(dynamic=Dynamic(16, E4M3)),
                  dict(activation=E3M0, dynamic=None, shift=True)):  # fmt: skip
        assert not dataclasses.replace(problem, **other).grouped, other
    assert dataclasses.replace(problem, activation=E1M2, dynamic=None, shift=True).grouped
