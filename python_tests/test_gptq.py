"""Error feedback: weights on the grid, less output error than rounding to nearest, and the odd inputs."""

import pytest
import torch
from cases import random_x

from llmfp4_kernels.errors import BadInput
from llmfp4_kernels.formats import E1M2, E2M1, RECIPES
from llmfp4_kernels.quantizer.calibrate import LayerInputs
from llmfp4_kernels.quantizer.gptq import Feedback, quantize_feedback, smoothing_factor
from llmfp4_kernels.quantizer.linear import quantize_linear, relative_error
from llmfp4_kernels.reference import dequantize


def correlated(tokens=512, k=96, rank=24, seed=0):
    """Tokens of one distribution, whatever the seed."""
    mix = torch.randn(rank, k, generator=torch.Generator().manual_seed(7))
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, rank, generator=g) @ mix + 0.3 * torch.randn(tokens, k, generator=g)


def weight_of(n=40, k=96):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(9))


def output_error(weight, packed, x):
    return ((x @ (dequantize(packed) - weight).T).square().sum() / (x @ weight.T).square().sum()).item()


def test_feedback_on_unseen_tokens_beats_the_search_without_it():
    x, unseen, weight = correlated(1024), correlated(300, seed=1), weight_of()
    fed = quantize_linear(weight, "gptq-fp4-a16", x)
    searched = quantize_linear(weight, "llm-fp4-a16", x)
    assert output_error(weight, fed, unseen) < 0.8 * output_error(weight, searched, unseen)


def test_one_channel_after_the_other_by_hand():
    """k = 2: the first channel of the order is rounded to nearest, the second to nearest of what makes up for it."""
    gram = torch.tensor([[4.0, 1.5], [1.5, 1.0]], dtype=torch.float64)
    weight, scale = torch.tensor([[2.4, 1.7]]), torch.ones(1)
    got = Feedback.of(gram, damping=0.0).round(weight, E2M1, scale)
    assert got[0, 0] == 2.0  # E2M1 has 2 and 3
    target = 1.7 + (2.4 - 2.0) * 1.5 / 1.0
    assert got[0, 1] == 2.0 and abs(target - 2.3) < 1e-6


def test_the_codes_are_what_was_rounded():
    x, weight = correlated(), weight_of()
    packed = quantize_feedback(weight, x.T @ x, (E2M1, E1M2), None, "test")
    units = dequantize(packed) / packed.row_scale[:, None]
    grid = torch.tensor(packed.element.values)
    assert (units[..., None] - grid).abs().amin(-1).max() < 1e-5


def test_zero_rows_dead_channels_and_few_tokens():
    x, weight = correlated(3), weight_of()
    weight[5], x[:, 7] = 0, 0
    packed = quantize_linear(weight, "gptq-fp4-a4", x)
    got = dequantize(packed)
    assert got.isfinite().all() and (got[5] == 0).all() and packed.row_scale.isfinite().all()
    assert packed.x_factor[7] == 1
    quantize_linear(weight, "gptq-fp4-a4", torch.zeros(4, 96))
    quantize_linear(weight * 1e-30, "gptq-fp4-a16", x * 1e15)


def test_smoothing_evens_channels_out():
    x = random_x(64, 33)
    factor = smoothing_factor(x.abs().amax(0))
    before, after = x.abs().amax(0), (x * factor).abs().amax(0)
    assert (after.log2().std() < 0.8 * before.log2().std()) and factor.min() == 1


def test_the_gram_of_all_tokens_is_used():
    x, weight = correlated(256), weight_of()
    whole = LayerInputs(x[:32], x.abs().amax(0), 256, (x.T @ x).double())
    packed = quantize_linear(weight, "gptq-fp4-a16", whole)
    assert torch.equal(packed.codes, quantize_linear(weight, "gptq-fp4-a16", x).codes)


def test_dynamic_w4a4_beats_static_minmax_by_far():
    x, weight = random_x(512, 96), weight_of()
    errors = {r: relative_error(weight, quantize_linear(weight, r, x), x) for r in ("gptq-fp4-a4", "minmax-w4a4")}
    assert errors["gptq-fp4-a4"] < 0.3 * errors["minmax-w4a4"]


def test_bits_per_weight():
    packed = quantize_linear(torch.randn(4096, 512), "gptq-fp4-a4", random_x(64, 512))
    assert packed.bits_per_weight < 4.08 and packed.integer
    assert RECIPES["gptq-fp4-a8"].activation_elements[0].max_integer == 127


def test_refusals():
    with pytest.raises(BadInput, match=r"\[3, 3\] does not match k = 4"):
        quantize_feedback(torch.ones(2, 4), torch.eye(3), (E2M1,), None, "test")
    with pytest.raises(BadInput, match="NaN"):
        quantize_feedback(torch.ones(2, 3), torch.full((3, 3), float("nan")), (E2M1,), None, "test")
    with pytest.raises(BadInput, match="needs calibration"):
        quantize_linear(torch.ones(2, 3), "gptq-fp4-a4")
