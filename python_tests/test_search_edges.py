"""What the release of LLM-FP4 gets wrong made right, layers of odd values, and what a search refuses."""

import math

import pytest
import torch
from test_search import layer

from llmfp4_kernels.errors import BadInput
from llmfp4_kernels.formats import E2M1, element
from llmfp4_kernels.quantizer import search_linear
from llmfp4_kernels.reference import decode, encode


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_distinct_magnitudes(bits):
    x, w = layer("student")
    found = search_linear(x, w, weight_bits=bits, activation_bits=bits)
    xq = found.activation_dequantized(x)
    assert max(len(row.abs().unique()) for row in found.weight_dequantized()) <= 2 ** (bits - 1)
    assert max(len(channel.abs().unique()) for channel in xq.T) <= 2 ** (bits - 1)


@pytest.mark.parametrize("name", ["e5m2", "e3m4"])
def test_8_bit_activations_keep_their_width(name):
    """The authors' code stores an exponent two bits too wide."""
    x, w = layer("student", tokens=64)
    wide = element(name)
    found = search_linear(x, w, activation_bits=8, activation_elements=(wide,))
    unit = found.x_scale * 2.0 ** -found.shift.float()
    codes = encode(found.activation_dequantized(x) / unit, wide)
    assert torch.equal(decode(codes, wide) * unit, found.activation_dequantized(x))
    assert int(found.shift.max()) <= 2**wide.exponent_bits - 1


def test_zero_rows_do_not_decide_the_formats():
    """In the authors' code they are NaN, which wins every argmax: E3M0 for weight and activation."""
    x, w = layer("gauss")
    before = search_linear(x, w)
    w[::6] = 0
    found = search_linear(x, w)
    assert found.weight_element == before.weight_element and found.activation_element == before.activation_element


def test_rows_of_zeros_in_a_gram():
    w = layer()[1]
    gram = torch.zeros(64, 64, dtype=torch.float64)
    assert search_linear(None, w, activation_bits=16, gram=gram, gram_tokens=3).mse == 0
    gram[2, 2] = 1e-30
    assert search_linear(None, w, activation_bits=16, gram=gram, gram_tokens=3).row_scale.isfinite().all()


@pytest.mark.parametrize("grid", ["additive", "gamma"])
def test_zero_row_and_dead_channel(grid):
    x, w = layer()
    w[3] = 0
    x[:, 5] = 0
    found = search_linear(x, w, grid=grid)
    assert math.isfinite(found.mse) and found.row_scale.isfinite().all()
    assert (found.weight_dequantized()[3] == 0).all()
    assert (found.activation_dequantized(x)[:, 5] == 0).all()
    assert found.shift[5] == found.activation_element.max_shift
    live = torch.arange(len(w)) != 3
    without = search_linear(x, w[live], grid=grid)
    assert found.mse * len(w) == pytest.approx(without.mse * (len(w) - 1), rel=0.02)


@pytest.mark.parametrize("grid", ["additive", "gamma"])
def test_nothing_but_zeros(grid):
    x, w = layer()
    assert search_linear(torch.zeros_like(x), w, grid=grid).mse == 0
    assert search_linear(x, torch.zeros_like(w), grid=grid).mse == 0


def test_gamma_around_zero_bias_searches_nothing():
    """b0 = 0: the largest weight is the format's top in paper units, and every gamma gives the same bias."""
    x, w = layer("gauss")
    w = w / w.abs().amax(1, keepdim=True) * 12
    found = search_linear(x, w, activation_bits=16, grid="gamma", weight_elements=(E2M1,))
    assert torch.allclose(found.row_scale, torch.full((len(w),), 2.0), rtol=1e-6)
    assert search_linear(x, w, activation_bits=16, weight_elements=(E2M1,)).mse < found.mse


def test_gamma_with_negative_bias_runs_backwards():
    """b0 < 0: gamma 0.01 clips most, gamma 1.2 least."""
    x, w = layer("gauss")
    w = w / w.abs().amax(1, keepdim=True) * 12 * 4
    found = search_linear(x, w, activation_bits=16, grid="gamma", weight_elements=(E2M1,))
    exponent = torch.log2(found.row_scale) - 1
    assert (exponent >= 0.019).all() and (exponent <= 2.3768).all()
    gamma = exponent / 2
    assert torch.allclose((gamma - 0.01) / 0.0119, ((gamma - 0.01) / 0.0119).round(), atol=1e-3)


@pytest.mark.parametrize("exponent", [-60, -20, 20, 60])
def test_additive_grid_is_scale_free(exponent):
    """But for the points of the gamma grid, which a scale shifts."""
    x, w = layer()
    plain, scaled = search_linear(x, w), search_linear(x * 2.0**exponent, w * 2.0**-exponent)
    assert plain.mse == pytest.approx(scaled.mse, rel=0.02)
    tiny = search_linear(x, w * 2.0**exponent)
    assert plain.mse == pytest.approx(math.ldexp(tiny.mse, -2 * exponent), rel=0.02)


@pytest.mark.parametrize("factor", [1e-43, 1e-30, 1e30, 1e36])
def test_extreme_weights_stay_finite(factor):
    x, w = layer(n=8)
    found = search_linear(x, w * factor)
    assert found.row_scale.isfinite().all() and found.weight_dequantized().isfinite().all()
    assert found.packed().codes.any()


def bad(x, value):
    x = x.clone()
    x[1, 2] = value
    return x


X, W = layer(tokens=8)


@pytest.mark.parametrize(
    ("x", "w", "kwargs", "says"),
    [
        (bad(X, float("nan")), W, {}, "x of shape .* holds 1 values"),
        (X, bad(W, float("inf")), {}, "weight of shape .* holds 1 values"),
        (X[:0], W, {}, "x must be a matrix"),
        (X[0], W, {}, "x must be a matrix"),
        (X, W.int(), {}, "float dtype"),
        (X[:, :-1], W, {}, "63 channels"),
        (X, W, {"channel_max": torch.ones(3)}, "64 finite"),
        (X, W, {"channel_max": torch.zeros(64)}, "64 of 64 channels"),
        (X, W, {"rounds": 0}, "rounds is 0"),
        (X, W, {"grid": "linear"}, "unknown grid"),
        (X, W, {"shift_rule": "nearest"}, "unknown shift_rule"),
        (X, W, {"objective": "hessian"}, "unknown objective"),
        (X, W, {"objective": "fisher"}, "'fisher', and none was given"),
        (X, W, {"output_gradient": X}, "'mse', and one was given"),
        (X, W, {"objective": "fisher", "output_gradient": X @ W.T[:, 1:]}, r"shape \[8, 47\], expected .* \[8, 48\]"),
        (X, W, {"objective": "fisher", "output_gradient": bad(X @ W.T, math.nan)}, "output_gradient .* holds 1 values"),
        (None, W, {}, "x is None"),
        (None, W, {"gram": torch.eye(64), "gram_tokens": 8}, "only"),
        (None, W, {"gram": torch.eye(64), "activation_bits": 16}, "gram_tokens is 0"),
        (None, W, {"gram": torch.eye(63), "gram_tokens": 8, "activation_bits": 16}, r"\[63, 63\], expected"),
        (X, W, {"gram": bad(torch.eye(64), math.inf), "gram_tokens": 8, "activation_bits": 16}, "gram of shape"),
        (None, W, {"gram": torch.eye(64), "gram_tokens": True, "activation_bits": 16}, "gram_tokens is True"),
        (None, W, {"gram": -torch.eye(64), "gram_tokens": 8, "activation_bits": 16}, "its diagonal.* down to -1"),
        (None, W, {"gram": bad(torch.eye(64), 0.5), "gram_tokens": 8, "activation_bits": 16}, "transpose by up to 0.5"),
        (None, W, {"gram": 2 * torch.eye(64) - 1, "gram_tokens": 8, "activation_bits": 16}, "mean squared error -"),
        (X, W, {"weight_bits": 5}, "weight_bits is 5: expected one of 4, 6, 8"),
        (X, W, {"weight_bits": "4"}, "weight_bits is '4'"),
        (X, W, {"weight_bits": 16}, "weight_bits is 16"),
        (X, W, {"activation_bits": 3}, "activation_bits is 3"),
        (X, W, {"activation_bits": [4]}, r"activation_bits is \[4\]"),
        (X, W, {"rounds": True}, "rounds is True"),
        (X, W, {"preshift": "no"}, "preshift is 'no'"),
        (X, W, {"weight_elements": ("e2m1",)}, r"weight_elements is \('e2m1',\)"),
        (X, W, {"activation_elements": ()}, r"activation_elements is \(\)"),
        (X.to_sparse(), W, {}, "x of shape .* torch.sparse_coo"),
        (X, W.to_sparse_csr(), {}, "weight of shape .* torch.sparse_csr"),
        (X.to("meta"), W, {}, "x of shape .* meta device"),
        (X, W.to("meta"), {}, "weight of shape .* meta device"),
        (X, W, {"channel_max": [1.0] * 64}, "channel_max must be a tensor, got a list"),
        (X * 1e-40, W, {}, "x goes up to .*e-.* within fp32"),
    ],
)
def test_refused(x, w, kwargs, says):
    with pytest.raises(BadInput, match=says):
        search_linear(x, w, **kwargs)


@pytest.mark.parametrize("factor", [1e-40, 1e-38, 1e-36, 1e-34, 1e-30])
def test_tiny_inputs_have_the_error_that_is_stated_or_none(factor):
    x, w = layer(tokens=64, n=8)
    try:
        found = search_linear(x * factor, w)
    except BadInput:
        assert factor < 1e-34
        return
    error = found.activation_dequantized(x * factor).double() @ found.weight_dequantized().double().T
    error = (error - (x * factor).double() @ w.double().T).square().mean().item()
    assert factor > 1e-40 and error == pytest.approx(found.mse, rel=1e-3)


@pytest.mark.parametrize("factor", [1e-30, 1e-15, 1e15])
def test_a_gram_of_tiny_and_huge_inputs(factor):
    x, w = layer(n=8)
    gram = x.double().T @ x.double()
    plain = search_linear(None, w, activation_bits=16, gram=gram, gram_tokens=len(x))
    scaled = search_linear(None, w, activation_bits=16, gram=gram * factor**2, gram_tokens=len(x))
    assert scaled.mse == pytest.approx(plain.mse * factor**2, rel=1e-3)


def test_a_gram_of_few_tokens_is_one():
    """Its rank is 3 of 64, and rounding makes tiny squares negative: no error below 0 is stated."""
    x, w = layer(tokens=3)
    found = search_linear(None, w, activation_bits=16, gram=(x.T @ x), gram_tokens=3)
    assert found.mse >= 0


def test_gamma_range():
    x, weight = torch.randn(64, 24), torch.randn(20, 24)
    one_point = search_linear(x, weight, activation_bits=16, grid="gamma", gamma_range=(1.0, 1.0 + 1e-9))
    element = one_point.weight_element
    torch.testing.assert_close(one_point.row_scale, weight.abs().amax(1) / element.max)  # gamma = 1 is min-max
    for bad in [(1.2, 0.1), (0.0, float("nan"))]:
        with pytest.raises(BadInput, match="gamma_range"):
            search_linear(x, weight, gamma_range=bad)
