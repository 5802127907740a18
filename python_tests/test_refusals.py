"""What a user may get wrong with whole models: a sentence, before any work."""

import copy
import json
from functools import partial

import pytest
import torch
from test_families import TOKENS, llama

from llmfp4_kernels import FP4Linear, PackedFP4, load_quantized, quantize_model, reference, save_quantized
from llmfp4_kernels.errors import BadFile, BadInput
from llmfp4_kernels.formats import E2M1, E4M3, INTEGER, Dynamic
from llmfp4_kernels.integrations.transformers import load_dense, load_tokenizer
from llmfp4_kernels.quantizer import search_linear


def test_save_pretrained_names_what_saves(tmp_path):
    """It would write a folder that says nothing of FP4: loaded, its weights would be random."""
    model = llama()
    quantize_model(model, "mxfp4", progress=False)
    again = copy.deepcopy(model)
    save_quantized(model, tmp_path / "saved")
    for fp4 in (model, again, load_quantized(tmp_path / "saved")):
        with pytest.raises(BadInput, match="use save_quantized"):
            fp4.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "model.safetensors").exists()
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_a_tied_table_cannot_differ_from_its_head():
    named = dict(include=("*", "model.embed_tokens"), exclude=(), progress=False)
    with pytest.raises(BadInput, match="embed_tokens nvfp4, but .* lm_head, which becomes mxfp4"):
        quantize_model(llama(tied=True), "mxfp4", overrides={"model.embed_tokens": "nvfp4"}, **named)
    model = llama(tied=True)
    quantize_model(model, "mxfp4", overrides={"lm_head": "nvfp4", "model.embed_tokens": "nvfp4"}, **named)
    assert model.lm_head.recipe == model.model.embed_tokens.recipe == "nvfp4"


@pytest.mark.parametrize("globs", [{"include": "*q_proj"}, {"exclude": "lm_head"}, {"exclude": None}], ids=str)
def test_globs_are_several(globs):
    with pytest.raises(BadInput, match="expected several globs"):
        quantize_model(llama(), "mxfp4", progress=False, **globs)


def refuse_layer(folder, change):
    """A saved model whose config describes its first layer as change(entry) is a bad file; returns the config's."""
    model = llama()
    quantize_model(model, "mxfp4", progress=False)
    save_quantized(model, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    layers = config["quantization_config"]["layers"]
    name = next(iter(layers))
    layers[name] = change(layers[name])
    file.write_text(json.dumps(config))
    with pytest.raises(BadFile, match=f"describes layer {name} as"):
        load_quantized(folder)
    return file


@pytest.mark.parametrize("entry", [None, 5, "nope", {}, {"n": 8, "k": 8}], ids=str)
def test_layers_that_are_none_are_bad_files(entry, tmp_path):
    refuse_layer(tmp_path / "saved", lambda _: entry)


@pytest.mark.parametrize(
    "change", [{"group_size": -1}, {"group_size": None}, {"group_size": 0}, {"scale": None}], ids=str
)
def test_groups_that_do_not_fit_their_scales_are_bad_files(change, tmp_path):
    file = refuse_layer(tmp_path / "saved", lambda entry: entry | change)
    for content in (b"\xff\xfe{", b'{"quantization_config": 1}'):
        file.write_bytes(content)
        with pytest.raises(BadFile, match="is not JSON of a model"):
            load_quantized(tmp_path / "saved")


@pytest.mark.parametrize("path", [None, 3, b"saved"], ids=str)
def test_what_is_no_path(path):
    model = llama()
    quantize_model(model, "mxfp4", progress=False)
    packed = next(m for m in model.modules() if isinstance(m, FP4Linear)).packed()
    saves = packed.save, partial(save_quantized, model)
    for use in (load_quantized, load_dense, load_tokenizer, PackedFP4.load, *saves):
        with pytest.raises(BadInput, match=f"a path is needed, got {path!r}"):
            use(path)


def nested(layout=torch.strided):
    return torch.nested.nested_tensor([torch.ones(3, 32), torch.ones(2, 32)], layout=layout)


NO_TENSORS = [[1.0] * 32, 3.0, "x", nested(), nested(torch.jagged)]


@pytest.mark.parametrize("given", NO_TENSORS, ids=lambda given: type(given).__name__)
@pytest.mark.parametrize("trained", [False, True], ids=["", "trained bias"])
def test_a_layer_wants_tensors(given, trained):
    layer, x = FP4Linear.from_linear(torch.nn.Linear(32, 16), "mxfp4"), torch.ones(3, 32)
    layer.bias.requires_grad_(trained)
    what = "nested tensor" if isinstance(given, torch.Tensor) else type(given).__name__
    for autocast in (False, True):
        with torch.autocast("cpu", enabled=autocast):
            for arguments in ((given,), (given, torch.ones(3, 16))):
                with pytest.raises(BadInput, match=f"x is a {what}"):
                    layer(*arguments)
            for wants_gradient in (False, True):
                with pytest.raises(BadInput, match=f"residual is a {what}"):
                    layer(x.clone().requires_grad_(wants_gradient), given)
    with pytest.raises(BadInput, match="x is a NoneType"):
        layer(None)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_a_search_wants_dense_tensors(layout):
    x, weight = torch.ones(5, 32), torch.ones(16, 32)
    for name, arguments in {"x": (nested(layout), weight), "weight": (x, nested(layout))}.items():
        with pytest.raises(BadInput, match=f"{name} is a nested tensor of 2"):
            search_linear(*arguments)


def test_a_file_is_no_folder(tmp_path):
    model = llama()
    quantize_model(model, "mxfp4", progress=False)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match="is a file"):
        save_quantized(model, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_search_needs_no_gradients():
    linear, x = torch.nn.Linear(24, 16), torch.randn(40, 24, requires_grad=True) * 2
    found = search_linear(x, linear.weight)
    assert not (found.row_scale.requires_grad or found.weight_dequantized().requires_grad)
    layer = FP4Linear.from_packed(copy.deepcopy(found.packed()))
    assert torch.equal(layer(x.detach()), reference.gemm(x.detach(), found.packed()))


def test_no_rows_are_no_product():
    from test_dynamic import dynamic_packed

    packed = dynamic_packed(8, 48, E2M1, E2M1, Dynamic(16, INTEGER))
    assert reference.gemm(torch.empty(0, 48), packed).shape == (0, 8)
    packed = dynamic_packed(8, 48, E2M1, E2M1, Dynamic(16, E4M3))
    assert reference.gemm(torch.empty(0, 48), packed).shape == (0, 8)
