"""What once went wrong: threads at a first call, fake tensors, aliases, odd module trees, incomplete files."""

import dataclasses
import json
import threading

import pytest
import torch
from cases import random_packed
from safetensors.torch import load_file, save_file
from test_pipeline import TOKENS, llama, output
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llmfp4_kernels import FP4Linear, load_dense, load_quantized, quantize_model, reference, save_quantized
from llmfp4_kernels.errors import BadFile, BadInput
from llmfp4_kernels.formats import E2M1, E3M0, recipe
from llmfp4_kernels.packed import PackedFP4


@pytest.fixture
def layer():
    return FP4Linear.from_packed(random_packed(40, 72, E2M1, E2M1, True), torch.randn(40))


def test_threads_may_meet_at_the_first_call():
    x, packed = torch.randn(3, 192), random_packed(96, 192, E2M1)
    expected = FP4Linear.from_packed(packed)(x)
    for _ in range(20):
        layer, results = FP4Linear.from_packed(packed.to("cpu")), [None] * 4
        start = threading.Barrier(4)

        def call(i, layer=layer, results=results, start=start):
            start.wait()
            results[i] = layer(x)

        team = [threading.Thread(target=call, args=(i,)) for i in range(4)]
        [t.start() for t in team]
        [t.join() for t in team]
        assert all(torch.equal(y, expected) for y in (*results, layer(x)))
        assert torch.equal(layer.packed().codes, packed.codes)


def test_a_packed_view_outlives_the_first_forward(layer, tmp_path):
    packed = layer.packed()
    before = reference.dequantize(packed)
    layer(torch.randn(2, 72))
    assert torch.equal(reference.dequantize(packed), before)
    packed.save(tmp_path / "p.safetensors")
    assert torch.equal(PackedFP4.load(tmp_path / "p.safetensors").codes, packed.codes)


def test_tensors_without_memory(layer):
    x = torch.randn(4, 72)
    y = layer(x)
    assert torch.equal(torch.jit.trace(layer, x, check_trace=False)(x), y)
    assert torch.equal(torch.func.vmap(layer)(x), y)
    assert FP4Linear(72, 40, device="meta")(x.to("meta")).shape == (4, 40)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.randn(4, 72)).shape == (4, 40)


def test_hidden_writes_to_what_is_read_in_place(layer):
    x = torch.randn(3, 72)
    y = layer(x)
    layer.bias.data.zero_()
    assert not torch.equal(layer(x), y)
    layer.row_scale.data.view(torch.float32).zero_()
    assert not layer(x).any()


def test_modules_that_are_more_than_a_linear_layer():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.ModuleDict({"mha": nn.MultiheadAttention(16, 2), "twice": Doubled(16, 16), "plain": nn.Linear(16, 16)})
    report = quantize_model(model, "mxfp4", progress=False)
    assert [row["name"] for row in report.layers] == ["plain"]
    reasons = {row["name"]: row["reason"] for row in report.skipped}
    assert "Doubled" in reasons["twice"] and "mha.out_proj" in reasons
    x = torch.randn(3, 1, 16)
    assert model["mha"](x, x, x)[0].isfinite().all()


def test_one_layer_under_two_names_and_coverage():
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU())
    model.add_module("again", model[0])
    report = quantize_model(model, "mxfp4", progress=False)
    assert model.again is model[0] and isinstance(model.again, FP4Linear) and report.coverage == 1
    tied = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    tied[1].weight = tied[0].weight
    assert quantize_model(tied, "mxfp4", include=("0", "1"), progress=False).coverage == pytest.approx(2 / 3)
    assert quantize_model(tied, "mxfp4", progress=False).coverage == 1
    with pytest.raises(BadInput, match="from_linear"):
        quantize_model(nn.Linear(4, 4), "mxfp4", progress=False)


def test_a_recipe_of_ones_own(tmp_path):
    mine = dataclasses.replace(recipe("llm-fp4"), name="mine", weight_elements=(E3M0,), preshift=False)
    model = llama()
    report = quantize_model(model, mine, [TOKENS], progress=False)
    assert {(row["recipe"], row["element"]) for row in report.layers} == {("mine", "e3m0")}
    expected = output(model)
    save_quantized(model, tmp_path / "q")
    assert torch.equal(output(load_quantized(tmp_path / "q")), expected)


def test_incomplete_checkpoints_are_refused(tmp_path):
    dense, quantized = tmp_path / "dense", tmp_path / "q"
    model = llama()
    model.save_pretrained(dense)
    quantize_model(model, "mxfp4", progress=False)
    save_quantized(model, quantized)
    for folder, name in ((dense, "model.layers.0.mlp.up_proj.weight"), (quantized, "model.norm.weight")):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        del tensors[name]
        metadata = {"format": "pt", "llmfp4": json.dumps({"version": 1})}
        save_file(tensors, file, metadata)
        with pytest.raises(BadFile, match=name):
            (load_quantized if folder is quantized else load_without_tokenizer)(folder)
    (dense / "model.safetensors").write_bytes(b"")
    with pytest.raises(BadFile):
        load_without_tokenizer(dense)
    config = json.loads((quantized / "config.json").read_text())
    del config["quantization_config"]["layers"]
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadFile, match="layers"):
        load_quantized(quantized)


def load_without_tokenizer(folder):
    from unittest import mock

    here = "llmfp4_kernels.integrations.transformers"
    with mock.patch(f"{here}.AutoTokenizer"), mock.patch(f"{here}.require_tokenizer"):
        return load_dense(folder)


def test_truncated_gguf_is_refused(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(BadFile, match=r"m\.gguf"):
        load_dense(file)


@pytest.mark.parametrize("call", [
    lambda: FP4Linear(2.5, 4),
    lambda: FP4Linear(4, 4, dtype=torch.int8),
    lambda: FP4Linear(4, 4, recipe=None),
    lambda: FP4Linear.from_linear(nn.Linear(4, 4), "llm-fp4", calibration=[[1.0] * 4]),
    lambda: FP4Linear.from_linear(nn.Linear(4, 4, device="meta"), "mxfp4"),
    lambda: FP4Linear.from_linear(nn.Linear(4, 4), "mxfp4")(torch.tensor(1.0)),
    lambda: quantize_model(llama(), "llm-fp4", ["text"], progress=False),
    lambda: quantize_model(nn.Sequential(nn.Linear(4, 4, device="meta")), "mxfp4", progress=False),
])  # fmt: skip
def test_refusals_are_typed(call):
    with pytest.raises(BadInput):
        call()


def test_nan_anywhere_is_refused():
    linear = nn.Linear(4, 4)
    linear.bias.data[0] = float("nan")
    with pytest.raises(BadInput, match="bias"):
        FP4Linear.from_linear(linear, "mxfp4")
    model = llama()
    model.model.norm.weight.data[0] = float("inf")
    with pytest.raises(BadInput, match=r"model\.norm\.weight"):
        quantize_model(model, "mxfp4", progress=False)
