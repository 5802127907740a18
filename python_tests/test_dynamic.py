"""Dynamic activations: every integer kernel returns the reference's bits, and floats are rounded as it rounds them."""

import dataclasses

import pytest
import torch
from cases import random_packed, random_x, same_bits

from llmfp4_kernels import reference
from llmfp4_kernels.backends import cpu, rounded
from llmfp4_kernels.errors import BadInput
from llmfp4_kernels.formats import E1M2, E2M1, E3M0, E4M3, E4M3FN, E8M0, INTEGER, Dynamic, element
from llmfp4_kernels.layout import to_layout
from llmfp4_kernels.packed import PackedFP4
from llmfp4_kernels.problem import Problem
from llmfp4_kernels.registry import choose

INT8, FP8 = element("e1m6"), element("e4m3")
AVAILABLE = [k for k in cpu.KERNELS if k.refusal(Problem(1 << 20, 16, 64, E2M1, E2M1, dynamic=Dynamic())) is None]
INTEGER_ACTIVATIONS = [
    (E2M1, Dynamic(16, INTEGER)), (E2M1, Dynamic(32, INTEGER)), (E1M2, Dynamic(16, INTEGER)),
    (E1M2, Dynamic(24, INTEGER)), (E2M1, Dynamic()), (E1M2, Dynamic()), (E3M0, Dynamic()), (INT8, Dynamic()),
]  # fmt: skip
FLOAT_ACTIVATIONS = [
    (FP8, Dynamic()), (E4M3FN, Dynamic()), (element("e5m2"), Dynamic()), (E2M1, Dynamic(16, E4M3)),
    (E2M1, Dynamic(32, E8M0)), (FP8, Dynamic(32, E8M0)), (element("e3m2"), Dynamic()),
]  # fmt: skip


def dynamic_packed(n, k, weight, activation, dynamic, smooth=True, seed=0) -> PackedFP4:
    packed = random_packed(n, k, weight, None, False, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x_factor = 0.5 + 3 * torch.rand(k, generator=generator) if smooth else None
    return dataclasses.replace(packed, activation=activation, dynamic=dynamic, x_factor=x_factor)


def wild_x(m, k, dtype=torch.float32):
    """Tokens of very different size: zeros, one outlier, tiny, huge, and groups of very different size."""
    x = random_x(m, k) * torch.logspace(-2, 2, k)[torch.randperm(k, generator=torch.Generator().manual_seed(3))]
    x[0] = 0
    x[m // 2, k // 2] = 1000
    x[-1] *= 1e-6
    return x.to(dtype)


@pytest.mark.parametrize(("activation", "dynamic"), INTEGER_ACTIVATIONS, ids=str)
@pytest.mark.parametrize("kernel", AVAILABLE, ids=lambda k: k.name)
def test_integer_kernels_return_the_references_bits(kernel, activation, dynamic):
    for weight, (m, n, k) in zip((E2M1, E1M2, E3M0), [(1, 24, 66), (7, 33, 40), (40, 130, 1031)]):
        packed = dynamic_packed(n, k, weight, activation, dynamic, smooth=m != 7)
        bias = random_x(1, n, seed=5)[0]
        prepared = cpu.Prepared(packed, bias)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = wild_x(m, k, dtype)
            assert same_bits(prepared.run(kernel, x), reference.gemm(x, packed, bias).to(dtype)), (m, dtype)


@pytest.mark.parametrize("group_size", [1, 7, 31, 48, 64, 80, 144, 255, 256])
@pytest.mark.parametrize("kernel", AVAILABLE, ids=lambda k: k.name)
def test_groups_of_any_size(kernel, group_size):
    for k in (group_size, 1100, 16 * group_size + 1):
        packed, x = dynamic_packed(17, k, E2M1, E2M1, Dynamic(group_size, INTEGER)), wild_x(9, k)
        assert same_bits(cpu.Prepared(packed, None).run(kernel, x), reference.gemm(x, packed)), k


@pytest.mark.parametrize(("activation", "dynamic"), INTEGER_ACTIVATIONS, ids=str)
@pytest.mark.parametrize("kernel", AVAILABLE, ids=lambda k: k.name)
def test_the_least_scale_of_a_token(kernel, activation, dynamic):
    """A token's scale is that of 2^-100 at least: what is far below becomes zeros."""
    packed, exponents = dynamic_packed(40, 200, E2M1, activation, dynamic, smooth=False), torch.arange(90, 138)
    x = random_x(48, 200) * torch.ldexp(torch.ones(48, 1), -exponents[:, None])
    prepared, expected = cpu.Prepared(packed, None), reference.gemm(x, packed)
    assert same_bits(prepared.run(kernel, x), expected)
    assert same_bits(prepared.run(kernel, x[::4].contiguous()), expected[::4])


@pytest.mark.parametrize(("activation", "dynamic"), INTEGER_ACTIVATIONS, ids=str)
def test_integer_operands_fit_int8_and_are_exact(activation, dynamic):
    packed, x = dynamic_packed(4, 100, E2M1, activation, dynamic), wild_x(33, 100)
    scales = reference.activation_scales(x, packed)
    codes = reference.quantize_activation(x, packed, scales)
    integers = reference.integer_activation(codes, packed, scales)
    assert integers.abs().max() <= 127 and torch.equal(integers, integers.round())
    assert integers[1:].abs().amax(1).min() >= 0.9 * dynamic.largest_integer(
        activation
    )  # the largest value of a token uses the range
    values = reference.dequantize_activation(codes, packed, torch.float64, scales)
    assert torch.equal(values, integers / activation.integer_scale * scales.x_scale.double())


def test_integer_groups_err_less_than_one_scale_and_than_the_factor_below():
    packed, x = dynamic_packed(4, 64, E2M1, E2M1, Dynamic(16, INTEGER), smooth=False), wild_x(50, 64)
    plain = dataclasses.replace(packed, dynamic=Dynamic())
    error = lambda p: (reference.round_activation(x, p) - x)[1:].square().sum(1)  # noqa: E731
    assert (error(packed) / error(plain)).mean() < 0.7
    scales = reference.activation_scales(x, packed)
    below = scales._replace(group=(scales.group - 1).clamp(min=1))
    codes = reference.quantize_activation(x, packed, below)
    other = (reference.dequantize_activation(codes, packed, torch.float32, below) - x)[1:].square().sum(1)
    assert (error(packed) <= other * 1.001).all()


@pytest.mark.parametrize(("activation", "dynamic"), FLOAT_ACTIVATIONS, ids=str)
def test_rounded_floats_are_multiplied_with_exact_operands(activation, dynamic):
    packed, x = dynamic_packed(48, 136, E2M1, activation, dynamic), wild_x(9, 136)
    assert not packed.integer
    bias = random_x(1, 48, seed=5)[0]
    prepared = rounded.Prepared(packed, bias)
    units, x_scale = prepared.round(x)
    expected = reference.round_activation(x, packed)
    torch.testing.assert_close(units * x_scale, expected, rtol=2e-7, atol=0)
    got, y = prepared.run(rounded.KERNELS[0], x), reference.gemm(x, packed, bias)
    torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-5 * y.abs().max().item())
    assert choose(Problem.of(packed, 9, torch.float32)).name == "cpu.rounded"


def test_static_8_bit_activations_with_shift():
    packed = random_packed(16, 40, E2M1, E2M1, True)
    packed = dataclasses.replace(packed, activation=FP8, x_scale=torch.tensor(0.01))
    x = random_x(5, 40)
    kernel = choose(Problem.of(packed, 5, torch.float32))
    y = kernel.prepare(to_layout(packed, "tiled"), None).run(kernel, x)
    torch.testing.assert_close(y, reference.gemm(x, packed), rtol=1e-5, atol=1e-4)
    assert kernel.name == "cpu.rounded"


@pytest.mark.parametrize("activation", [INT8, FP8], ids=lambda e: e.name)
def test_a_token_with_nan_gives_nan_and_leaves_the_others(activation):
    packed, x = dynamic_packed(20, 48, E2M1, activation, Dynamic()), wild_x(6, 48)
    x[2, 7], x[4, 0] = float("nan"), float("-inf")
    kernel = choose(Problem.of(packed, 6, torch.float32))
    y = kernel.prepare(packed, None).run(kernel, x)
    assert y[[2, 4]].isnan().all() and y[[0, 1, 3, 5]].isfinite().all()


def test_x_factor_on_16_bit_activations():
    packed = dataclasses.replace(dynamic_packed(32, 96, E2M1, E2M1, Dynamic()), activation=None, dynamic=None)
    for dtype in (torch.float32, torch.bfloat16):
        x = random_x(70, 96).to(dtype)
        kernel = choose(Problem.of(packed, 70, dtype))
        y = kernel.prepare(packed, None).run(kernel, x)
        expected = (x.double() @ reference.dequantize(packed, torch.float64).T).to(dtype)
        torch.testing.assert_close(y, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-3)


def test_contradictions():
    packed = random_packed(4, 8, E2M1, E2M1, True)
    with pytest.raises(BadInput, match="exclude a static"):
        dataclasses.replace(packed, dynamic=Dynamic())
    with pytest.raises(BadInput, match="belong together"):
        Dynamic(16)
    assert Dynamic(256, INTEGER).integer and Dynamic(512, E4M3)
    with pytest.raises(BadInput, match="at most 256 activations, got 257"):
        Dynamic(257, INTEGER)
    with pytest.raises(BadInput, match="at most 127 units, e4m3 has 245760"):
        dataclasses.replace(packed, activation=FP8, x_scale=None, shift=None, dynamic=Dynamic(16, INTEGER))
    with pytest.raises(BadInput, match="static x_scale"):
        dataclasses.replace(packed, x_factor=torch.ones(8))
    plain = dataclasses.replace(packed, activation=None, x_scale=None, shift=None)
    with pytest.raises(BadInput, match="1 values that are not positive"):
        dataclasses.replace(plain, x_factor=torch.tensor([1.0] * 7 + [0.0]))
    with pytest.raises(BadInput, match="nothing without the scales"):
        dynamic = dataclasses.replace(plain, activation=E2M1, dynamic=Dynamic())
        reference.dequantize_activation(torch.zeros(1, 8, dtype=torch.uint8), dynamic)


def test_a_file_keeps_dynamic_scales_and_x_factor(tmp_path):
    packed = dynamic_packed(24, 40, E1M2, E2M1, Dynamic(16, INTEGER))
    packed.save(tmp_path / "w.safetensors")
    again = PackedFP4.load(tmp_path / "w.safetensors")
    assert again.dynamic == packed.dynamic and torch.equal(again.x_factor, packed.x_factor)
    x = wild_x(5, 40)
    assert torch.equal(reference.gemm(x, again), reference.gemm(x, packed))


@pytest.mark.parametrize("activation", [(E2M1, Dynamic(16, INTEGER)), (INT8, Dynamic()), (FP8, Dynamic())], ids=str)
def test_a_token_that_x_factor_takes_beyond_fp32_gives_nan(activation):
    packed, x = dynamic_packed(20, 48, E2M1, *activation), wild_x(6, 48)
    x[3] = 3e38
    kernel = choose(Problem.of(packed, 6, torch.float32))
    y, expected = kernel.prepare(packed, None).run(kernel, x), reference.gemm(x, packed)
    assert y[3].isnan().all() and expected[3].isnan().all()
    others = [0, 1, 2, 4, 5]
    torch.testing.assert_close(y[others], expected[others], rtol=1e-5, atol=1e-3)
