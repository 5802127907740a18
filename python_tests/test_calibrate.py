"""What layers are given: samples, channel maxima, passes, and a model left as it was."""

import pytest
import torch
from torch import nn

from llmfp4_kernels.errors import BadInput
from llmfp4_kernels.quantizer import calibrate, collect


class Block(nn.Module):
    """q and k share an input, out is called twice, spare never."""

    def __init__(self, k=8):
        super().__init__()
        self.embed = nn.Embedding(50, k)
        self.q, self.k, self.out, self.spare = (nn.Linear(k, k) for _ in range(4))
        self.head = nn.Linear(k, 50)
        self.forwards = self.head_calls = 0

    def forward(self, ids):
        self.forwards += 1
        h = self.embed(ids) if not ids.is_floating_point() else ids
        h = self.q(h) * self.k(h)
        h = self.out(self.out(input=h))
        self.head_calls += 1
        return self.head(h)


def model(seed=0):
    torch.manual_seed(seed)
    return Block()


def batches(count=3, t=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (2, t), generator=g) for _ in range(count)]


def test_all_tokens_when_they_fit():
    m, data = model(), batches()
    found = dict(collect(m, ["q", "k", "out", "spare", "head"], data))
    expected = torch.cat([m.embed(b).reshape(-1, 8) for b in data]).detach()
    assert torch.equal(found["q"].x, expected)
    assert found["q"].tokens == 30 and found["out"].tokens == 60
    assert torch.equal(found["q"].channel_max, expected.abs().amax(0))
    assert found["k"].x is found["q"].x
    assert found["spare"].x is None and found["spare"].channel_max is None and found["spare"].tokens == 0


def test_order_of_names_is_kept():
    assert [name for name, _ in collect(model(), ["head", "q", "spare", "k"], batches())] == ["head", "q", "spare", "k"]


def test_sample_is_uniform_and_deterministic():
    x = torch.arange(4000.0)[:, None].expand(-1, 8).contiguous()
    m = nn.Sequential(nn.Linear(8, 2))
    data = list(x.split(333))
    (_, first), (_, again) = (next(collect(m, ["0"], data, sample_tokens=400)) for _ in range(2))
    picked = first.x[:, 0]
    assert torch.equal(picked, again.x[:, 0]) and len(picked) == 400
    assert torch.equal(picked, picked.sort().values) and len(picked.unique()) == 400
    counts = torch.histc(picked, 8, 0, 4000)
    assert counts.min() > 25 and counts.max() < 80  # 50 ± 6.6 expected
    assert first.tokens == 4000 and first.channel_max[0] == 3999


def test_passes_give_the_same_and_stop_early():
    one, many = model(), model()
    whole = dict(collect(one, ["q", "k", "out"], batches()))
    parts = dict(collect(many, ["q", "k", "out"], batches(), budget_bytes=1))
    for name in whole:
        assert torch.equal(whole[name].x, parts[name].x)
    assert (one.forwards, many.forwards) == (3, 9)
    assert one.head_calls == 1 and many.head_calls == 3, "only a pass's first batch runs to its end"


def test_pass_grouping():
    modules = {str(i): nn.Linear(k, 1) for i, k in enumerate((10, 10, 100, 10))}
    need = 2 * 4 * 7 * 10
    assert calibrate.group_passes(modules, 7, 2 * need) == [["0", "1"], ["2"], ["3"]]


def test_conv1d_and_keyword_batches():
    from transformers.pytorch_utils import Conv1D

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = Conv1D(3, 6)

        def forward(self, x, scale=1.0):
            return self.c(x * scale)

    x = torch.randn(2, 4, 6)
    ((_, found),) = collect(Model(), ["c"], [{"x": x, "scale": 2.0}])
    assert torch.equal(found.x, (2 * x).reshape(-1, 6))
    assert calibrate.features(Conv1D(3, 6)) == (3, 6)


def test_half_precision_inputs_become_float32():
    ((_, found),) = collect(nn.Sequential(nn.Linear(4, 4).bfloat16()), ["0"], [torch.randn(3, 4).bfloat16()])
    assert found.x.dtype == torch.float32 and found.channel_max.dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_inputs_name_the_layer_and_leave_the_model(bad):
    m = model()
    m.train()
    m.q.eval()
    x = torch.randn(1, 5, 8)
    x[0, 2, 3] = bad
    with pytest.raises(BadInput, match=r"layer q hold 1 values of 40"):
        list(collect(m, ["q"], [x]))
    assert m.training and m.k.training and not m.q.training
    assert not any(module._forward_pre_hooks for module in m.modules())


def test_model_is_left_as_it_was():
    m = model()
    m.train()
    for _ in collect(m, ["q", "out"], batches(), budget_bytes=1):
        assert m.training and not any(module._forward_pre_hooks for module in m.modules())


@pytest.mark.parametrize(
    ("names", "data", "kwargs", "says"),
    [
        (["q", "nope"], [torch.zeros(1, 2).long()], {}, "nope"),
        (["q"], [], {}, "at least one batch"),
        (["q"], [torch.zeros(1, 2).long(), torch.zeros(1, 0).long()], {}, "batch 1 of 2"),
        (["q"], [{}], {}, "batch 0"),
        (["q"], [torch.zeros(1, 2).long()], {"sample_tokens": 0}, "sample_tokens is 0"),
    ],
)
def test_refused_at_once(names, data, kwargs, says):
    with pytest.raises(BadInput, match=says):
        collect(model(), names, data, **kwargs)


def test_a_forward_that_calls_a_layer_more_often_is_seen_to_its_end():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x, twice=False):
            y = self.layer(x)
            return self.layer(1000 * x) if twice else y

    x = torch.ones(2, 4)
    batches = [{"x": x}, {"x": x, "twice": True}, {"x": x, "twice": True}]
    ((_, inputs),) = collect(Sometimes(), ["layer"], batches)
    assert inputs.channel_max.max() == 1000 and inputs.tokens == 10
