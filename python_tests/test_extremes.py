"""Inputs at the end of fp32's range and signs of zeros: the CPU kernels do what the reference does."""

import dataclasses

import pytest
import torch
from cases import random_packed, random_x, same_bits

from llmfp4_kernels import native, reference, registry
from llmfp4_kernels.backends import cpu
from llmfp4_kernels.errors import BadInput
from llmfp4_kernels.formats import E2M1, E8M0, FP4_ELEMENTS, RECIPES
from llmfp4_kernels.formats import recipe as recipe_named
from llmfp4_kernels.packed import PackedFP4
from llmfp4_kernels.problem import Problem

ROWS = native.cpu_kernels()
KERNELS = [kernel for kernel in cpu.KERNELS if ROWS.get(kernel.name.removeprefix("cpu."), {}).get("supported")]
LARGEST = torch.finfo(torch.float32).max
QUANTIZING = [name for name, recipe in RECIPES.items() if recipe.activation_elements]


def packed_like(name: str, n: int, k: int) -> PackedFP4:
    """Random codes in the form of a recipe."""
    recipe = recipe_named(name)
    form = Problem.of_recipe(recipe, 1, n, k)
    static = form.activation if form.dynamic is None else None
    packed = random_packed(n, k, form.element, static, form.shift, form.scale, form.group_size)
    return dataclasses.replace(packed, activation=form.activation, dynamic=form.dynamic, recipe=name)


def chosen(packed: PackedFP4, x: torch.Tensor) -> torch.Tensor:
    """The result of the kernel that the registry chooses, which is not the reference."""
    kernel = registry.choose(Problem.of(packed, len(x), x.dtype))
    assert kernel.name != "reference"
    return kernel.prepare(packed, None).run(kernel, x)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("activation", FP4_ELEMENTS.values(), ids=lambda e: e.name)
def test_huge_inputs_saturate_at_a_static_scale(kernel, activation):
    packed = random_packed(17, 70, E2M1, activation, shift=True)
    x = random_x(20, 70) * 1e37
    x[3, :2] = torch.tensor([LARGEST, -LARGEST])
    expected = reference.gemm(x, packed)
    assert expected.isfinite().all() and same_bits(cpu.Prepared(packed, None).run(kernel, x), expected)


@pytest.mark.parametrize("row_scale", [1e-3, 1.0])
@pytest.mark.parametrize("name", QUANTIZING)
def test_the_end_of_fp32(name, row_scale):
    """Inf where x_scale times the sum is beyond fp32, whatever the row scale makes of it, in every backend's order."""
    packed = packed_like(name, 17, 128)
    packed.row_scale *= row_scale
    x = random_x(7, 128)
    x *= 0.99 * LARGEST / x.abs().amax(1, keepdim=True)
    x[:3] *= torch.tensor([1e-30, 1e-3, 0.8])[:, None]
    x *= 1e-4 if recipe_named(name).dynamic and recipe_named(name).dynamic.group_scale == E8M0 else 1.0  # sums overflow
    y, expected = chosen(packed, x), reference.gemm(x, packed)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=expected[0].abs().max().item(), equal_nan=True)
    assert y[0].isfinite().all()
    if packed.integer:
        assert same_bits(y, expected)


def test_some_of_these_overflow():
    packed = packed_like("nvfp4-a8-int", 17, 128)
    packed.row_scale *= 1e-3
    x = torch.full((1, 128), LARGEST)
    assert reference.gemm(x, packed).isinf().any() and not reference.gemm(x / 1e4, packed).isinf().any()


@pytest.mark.parametrize("name", ["mxfp4-a4", "mxfp4-a8"])
def test_what_e8m0_groups_round_beyond_fp32_poisons_its_row(name):
    """7/4 of 2^127 and more become 4 · 2^126 = 2^128."""
    packed, x = packed_like(name, 17, 64), torch.ones(3, 64)
    x[1, 5] = LARGEST
    y, expected = chosen(packed, x), reference.gemm(x, packed)
    assert expected[1].isnan().all() and expected[[0, 2]].isfinite().all()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("bias", [None, -0.0, 0.0])
@pytest.mark.parametrize("activation", [None, *FP4_ELEMENTS.values()], ids=lambda e: e.name if e else "16 bits")
@pytest.mark.parametrize("element", FP4_ELEMENTS.values(), ids=lambda e: e.name)
def test_one_input_and_the_signs_of_zeros(kernel, bias, element, activation):
    """With k = 1 a sum is one product, and a product of zeros may be -0: a sum that begins at +0 is not."""
    packed = random_packed(33, 1, element, activation)
    packed.codes[:3, 0] = torch.tensor([0, 8, 1])  # +0, -0 and the least element
    packed.row_scale = torch.where(torch.arange(33) % 2 > 0, -1.0, 1.0)
    x = torch.tensor([[0.0], [-0.0], [1.0], [-1.0], [-1e-3], [1e-3]])
    bias = None if bias is None else torch.full((33,), bias)
    expected = reference.gemm(x, packed, bias)
    assert (expected == 0).any() and same_bits(cpu.Prepared(packed, bias).run(kernel, x), expected)


def test_one_input_of_every_recipe():
    for name in QUANTIZING:
        packed = packed_like(name, 33, 1)
        x = torch.tensor([[0.0], [-0.0], [1.0], [-1.0]])
        y, expected = chosen(packed, x), reference.gemm(x, packed)
        assert torch.equal(y.signbit() & (y == 0), expected.signbit() & (expected == 0)), name


def test_an_x_scale_without_a_reciprocal_is_refused():
    packed = random_packed(4, 8, E2M1, E2M1, shift=True)
    top = int(packed.shift.max())
    dataclasses.replace(packed, x_scale=torch.tensor(2.0 ** (top - 127)))
    with pytest.raises(BadInput, match=rf"shifts up to {top}: 2\^shift / x_scale exceeds fp32"):
        dataclasses.replace(packed, x_scale=torch.tensor(2.0 ** (top - 129)))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_the_largest_floats_are_no_infinity(kernel):
    """bf16 ends at 3.39e38, fp32 at 3.4028e38: parts of what lies between are finite, too."""
    packed = random_packed(24, 64, E2M1)
    packed.codes, packed.row_scale = packed.codes & 0x11, torch.ones(24)  # 0 and 0.5
    x = torch.zeros(20, 64)
    x[:, 5] = torch.tensor([LARGEST, -LARGEST, 3.3961776e38, 3.39e38] * 5)
    assert torch.equal(cpu.Prepared(packed, None).run(kernel, x), reference.gemm(x, packed))
    x[4, 6] = torch.inf
    assert not cpu.Prepared(packed, None).run(kernel, x)[4].isfinite().any()
