"""Scales from the largest magnitude, and the fast rounding of the searches."""

import math

import pytest
import torch

from llmfp4_kernels.encode import snap
from llmfp4_kernels.errors import BadInput
from llmfp4_kernels.formats import E2M1, E4M3, recipe, searched_elements
from llmfp4_kernels.packed import unpack
from llmfp4_kernels.quantizer import quantize_weight, scales
from llmfp4_kernels.reference import decode, dequantize, encode

DATA_FREE = ("mxfp4", "nvfp4", "int4", "minmax-w4a4")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_snap_is_decode_of_encode(bits):
    for e in searched_elements(bits):
        grid = torch.tensor(e.magnitudes)
        ties = (grid[1:] + grid[:-1]) / 2
        x = torch.cat([grid, ties, ties.nextafter(grid[1:]), ties.nextafter(grid[:-1]), randn(2000) * e.max / 3])
        x = torch.cat([x, -x, x * 1e-3])
        before = x.clone()
        assert torch.equal(snap(x, e), decode(encode(x, e), e)), e.name
        assert torch.equal(x, before)


@pytest.mark.parametrize("name", DATA_FREE)
@pytest.mark.parametrize("k", [1, 15, 129, 300])
def test_shapes_and_partial_groups(name, k):
    r = recipe(name)
    packed = quantize_weight(randn(3, k), r)
    assert packed.shape == (3, k) and packed.recipe == name
    assert packed.activation is None and packed.x_scale is None and packed.shift is None
    if r.group_size:
        assert packed.group_scale.shape == (3, math.ceil(k / r.group_size))


# Relative mean squared error on Gaussian weights; mxfp4 and nvfp4 as the literature gives them.
@pytest.mark.parametrize(
    ("name", "error"), [("mxfp4", 0.01251), ("nvfp4", 0.00906), ("int4", 0.0138), ("minmax-w4a4", 0.0141)]
)
def test_error_on_gaussian_weights(name, error):
    w = randn(256, 4096)
    measured = (dequantize(quantize_weight(w, recipe(name))) - w).square().mean().item()
    assert measured == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("name", DATA_FREE)
@pytest.mark.parametrize("exponent", [-100, -20, 20, 100])
def test_scaling_a_weight_by_a_power_of_two_changes_no_code(name, exponent):
    w = randn(4, 256)
    plain, scaled = (quantize_weight(x, recipe(name)) for x in (w, w * 2.0**exponent))
    assert torch.equal(plain.codes, scaled.codes)
    assert torch.equal(dequantize(plain) * 2.0**exponent, dequantize(scaled))


@pytest.mark.parametrize("name", DATA_FREE)
def test_zeros_and_extremes(name):
    w = randn(6, 256)
    w[1] = 0
    w[2, :128] = 0
    w[3] = 1e-45
    w[4] *= 1e37
    packed = quantize_weight(w, recipe(name))
    q = dequantize(packed)
    assert q.isfinite().all() and packed.row_scale.isfinite().all()
    assert (q[1] == 0).all() and (q[2, :128] == 0).all()
    assert (q[3].abs() <= 1e-44).all()
    assert ((unpack(packed.codes, 256)[1] & 7) == 0).all()
    assert (quantize_weight(torch.zeros(2, 3), recipe(name)).row_scale > 0).all()


@pytest.mark.parametrize(
    ("mantissa", "even", "floor", "rceil"),
    [
        (1.0, 0, 0, 0),
        (1.25, 0, 0, 0),
        (1.5, 0, 0, 0),
        (1.5000001, 0, 0, 1),
        (1.7499, 0, 0, 1),
        (1.75, 1, 0, 1),
        (1.9999, 1, 0, 1),
    ],
)
@pytest.mark.parametrize("exponent", [-124, -30, 0, 2, 77, 126])
def test_e8m0_rules(mantissa, even, floor, rceil, exponent):
    largest = torch.tensor([mantissa * 2.0**exponent])
    base = exponent - 2 + 127
    for rule, bump in (("even", even), ("floor", floor), ("rceil", rceil)):
        assert scales.e8m0_scale(largest, E2M1, rule).item() == max(0, base + bump), rule


def test_e8m0_rceil_never_clips_and_is_the_least_such_scale():
    largest = randn(5000).abs() * 2.0 ** (20 * randn(5000, seed=1))
    scale = 2.0 ** (scales.e8m0_scale(largest, E2M1, "rceil").double() - 127)
    assert (largest.double() <= 6 * scale * (1 + 1e-7)).all() and (largest.double() > 3 * scale * (1 - 1e-7)).all()


def test_e8m0_zero_group_and_unknown_rule():
    assert scales.e8m0_scale(torch.zeros(1), E2M1).item() == 127
    with pytest.raises(BadInput, match="ceil"):
        scales.e8m0_scale(torch.ones(1), E2M1, "ceil")


def test_mxfp4_rule_is_passed_on():
    w = torch.full((1, 32), 1.9)
    assert [quantize_weight(w, recipe("mxfp4"), e8m0_rule=r).group_scale.item() for r in ("even", "floor")] == [
        126,
        125,
    ]


def test_nvfp4_has_one_tensor_scale():
    w = randn(8, 64)
    packed = quantize_weight(w, recipe("nvfp4"))
    assert (packed.row_scale == packed.row_scale[0]).all()
    assert packed.row_scale[0].item() == pytest.approx(w.abs().max().item() / (6 * 448), rel=1e-6)
    assert torch.tensor(E4M3.values)[packed.group_scale.long()].max() == 448


def test_int4_uses_the_e4m3_range_in_every_row():
    packed = quantize_weight(randn(8, 512) * torch.logspace(-6, 6, 8)[:, None], recipe("int4"))
    assert (torch.tensor(E4M3.values)[packed.group_scale.long()].amax(1) == 448).all()


@pytest.mark.parametrize("name", DATA_FREE)
def test_chunks_change_nothing(name, monkeypatch):
    w = randn(37, 96)
    whole = quantize_weight(w, recipe(name))
    monkeypatch.setattr(scales.row_slices, "__defaults__", (96 * 5,))
    assert len(scales.row_slices(w)) == 8
    parts = quantize_weight(w, recipe(name))
    assert all(torch.equal(whole.tensors[t], parts.tensors[t]) for t in whole.tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_dtypes(dtype):
    w = randn(4, 64).to(dtype)
    packed = quantize_weight(w, recipe("mxfp4"))
    assert torch.equal(packed.codes, quantize_weight(w.float(), recipe("mxfp4")).codes)


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (torch.tensor([[1.0, float("nan")], [float("inf"), 1.0]]), "holds 2 values"),
        (torch.full((1, 2), 1e300, dtype=torch.float64), "beyond fp32"),
        (torch.zeros(0, 4), "at least one row"),
        (torch.zeros(4), "matrix"),
        (torch.zeros(2, 2, 2), "matrix"),
        (torch.ones(2, 2, dtype=torch.int32), "float dtype"),
    ],
)
def test_refused_weights(weight, says):
    with pytest.raises(BadInput, match=says):
        quantize_weight(weight, recipe("nvfp4"))


def test_searched_recipes_are_refused():
    with pytest.raises(BadInput, match="search_linear"):
        quantize_weight(randn(2, 2), recipe("llm-fp4"))
