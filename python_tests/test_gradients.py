"""The diagonal Fisher objective from a loss: gradients beside their inputs, and a model quantized by them."""

import copy

import pytest
import torch
from torch import nn

from llmfp4_kernels.errors import BadInput
from llmfp4_kernels.quantizer.calibrate import collect
from llmfp4_kernels.quantizer.gradients import collect_with_gradients
from llmfp4_kernels.quantizer.pipeline import quantize_model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = nn.Linear(12, 20), nn.Linear(20, 5), nn.Linear(3, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def loss(model, batch):
    return model(batch).square()[..., :2].sum()


def batches():
    g = torch.Generator().manual_seed(1)
    return [torch.randn(4, 7, 12, generator=g) for _ in range(3)]


def test_gradients_belong_to_their_tokens():
    model, data = Net(), batches()
    found = dict(collect_with_gradients(model, ["first", "second"], data, loss))
    x = torch.cat([b.flatten(0, 1) for b in data])
    assert torch.equal(found["first"].x, x)
    y = model(x)
    expected = torch.cat([2 * y[:, :2], torch.zeros(len(y), 3)], dim=1)
    torch.testing.assert_close(found["second"].gradient, expected)
    hidden = torch.relu(model.first(x))
    torch.testing.assert_close(found["first"].gradient, (expected @ model.second.weight) * (hidden > 0))
    assert torch.equal(found["first"].channel_max, x.abs().amax(0)) and found["first"].tokens == 84
    assert all(p.grad is None for p in model.parameters()) and model.training


def test_a_sample_is_that_of_collect_and_keeps_pairs_together():
    model, data = Net(), batches()
    ((_, found),) = collect_with_gradients(model, ["second"], data, loss, sample_tokens=10)
    ((_, plain),) = collect(model, ["second"], data, sample_tokens=10)
    assert torch.equal(found.x, plain.x)
    torch.testing.assert_close(found.gradient[:, :2], 2 * model.second(found.x)[:, :2])


def test_quantize_model_by_a_loss_keeps_what_the_loss_sees():
    dense, data = Net(), batches()
    error = {}
    for name, given in (("mse", None), ("fisher", loss)):
        model = copy.deepcopy(dense)
        report = quantize_model(model, "llm-fp4-a16", data, loss=given, progress=False)
        assert len(report.layers) == 2 and "never called" in report.skipped[-1]["reason"]
        difference = (model.first(data[0]) - dense.first(data[0])).square()
        error[name] = difference.flatten(0, 1)
    ((_, found),) = collect_with_gradients(dense, ["first"], data[:1], loss)
    weight = found.gradient.square()
    assert (error["fisher"] * weight).sum() < (error["mse"] * weight).sum()


def test_refusals(tmp_path):
    model, data = Net(), batches()
    with pytest.raises(BadInput, match="one finite number"):
        list(collect_with_gradients(model, ["first"], data, lambda m, b: m(b)))
    with pytest.raises(BadInput, match="work_dir cannot tell"):
        quantize_model(model, "llm-fp4", data, loss=loss, work_dir=tmp_path / "w", progress=False)
    frozen = Net().requires_grad_(False)
    with pytest.raises(BadInput, match="layer first has no gradient"):
        list(collect_with_gradients(frozen, ["first"], data, loss))
