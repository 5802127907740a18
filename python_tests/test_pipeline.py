"""quantize_model, save and load: coverage, resume, interruption, bad input, bit-equal reload."""

import copy
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llmfp4_kernels import FP4Embedding, FP4Linear, load_quantized, quantize_model, reference, save_quantized
from llmfp4_kernels.errors import BadFile, BadInput
from llmfp4_kernels.quantizer import pipeline

TOKENS = torch.arange(96).reshape(3, 32) * 37 % 128


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # small tensors: two threads on a busy machine wait for each other longer than they work


def llama(tied=True, **kwargs):
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, hidden_size=72, intermediate_size=130, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, attention_bias=True, tie_word_embeddings=tied)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **kwargs)).eval()


def gpt2():
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def bert():
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=100)
    return BertModel(BertConfig(**sizes)).eval()


def output(model, ids=TOKENS):
    with torch.no_grad():
        out = model(ids)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def fp4_layers(model):
    return [name for name, m in model.named_modules() if isinstance(m, FP4Linear)]


@pytest.mark.parametrize("make, layers", [(llama, 14), (gpt2, 8), (bert, 13)], ids=["llama", "gpt2", "bert"])
@pytest.mark.parametrize("recipe", ["llm-fp4", "llm-fp4-a16", "nvfp4"])
def test_quantize_save_load(make, layers, recipe, tmp_path):
    model = make()
    dense = output(model)
    total = sum(p.numel() for p in model.parameters())
    weights = sum(
        m.weight.numel() for name, m in model.named_modules()
        if (isinstance(m, nn.Linear) and name != "lm_head") or type(m).__name__ == "Conv1D"
    )  # fmt: skip
    report = quantize_model(model, recipe, [TOKENS], progress=False)
    assert len(report.layers) == len(fp4_layers(model)) == layers
    assert report.coverage == pytest.approx(weights / total)
    assert all(0 < row["relative_error"] < 0.2 for row in report.layers)
    quantized = output(model)
    error = ((quantized - dense).norm() / dense.norm()).item()
    assert 0 < error < 0.5

    save_quantized(model, tmp_path / "q", report=report)
    again = load_quantized(tmp_path / "q")
    assert type(again) is type(model) and not again.training
    assert torch.equal(output(again), quantized)
    assert not any(p.requires_grad for m in again.modules() if isinstance(m, FP4Linear) for p in m.parameters())
    first = load_file(tmp_path / "q" / "model.safetensors")
    save_quantized(again, tmp_path / "q")
    second = load_file(tmp_path / "q" / "model.safetensors")
    assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)
    assert os.listdir(tmp_path) == ["q"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_stays_dense_may_be_saved_in_16_bits(dtype, tmp_path):
    model = llama()
    quantize_model(model, "llm-fp4", [TOKENS], include=("*", "embed_tokens"), progress=False)
    rotary = llama().model.rotary_emb  # .to() rounds its frequencies, loading does not
    model.to(dtype).model.rotary_emb = rotary
    expected = output(model)
    save_quantized(model, tmp_path / "q")
    again = load_quantized(tmp_path / "q")
    assert expected.dtype == dtype and torch.equal(output(again), expected)


def test_every_skipped_module_has_a_reason():
    model = llama()
    report = quantize_model(model, "mxfp4", include=("*_proj",), exclude=("*.1.*", "lm_head"), progress=False)
    assert fp4_layers(model) == [row["name"] for row in report.layers] and len(report.layers) == 7
    reasons = {row["name"]: row["reason"] for row in report.skipped}
    assert "'*.1.*'" in reasons["model.layers.1.mlp.up_proj"]
    assert "embedding" in reasons["model.embed_tokens"]
    assert "360 parameters" in reasons["5 x LlamaRMSNorm"]
    json.loads(report.to_json())


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embedding(tied, tmp_path):
    model = llama(tied)
    report = quantize_model(
        model, "llm-fp4", [TOKENS], include=("*", "embed_tokens"), exclude=(), overrides={"lm_head": "llm-fp4-a16"},
        progress=False,
    )  # fmt: skip
    assert isinstance(model.model.embed_tokens, FP4Embedding) and report.coverage > 0.98
    recipes = {row["name"]: row["recipe"] for row in report.layers}
    assert recipes["lm_head"] == "llm-fp4-a16" and recipes["model.layers.0.mlp.up_proj"] == "llm-fp4"
    assert (model.model.embed_tokens.codes is model.lm_head.codes) == tied
    expected = output(model)
    save_quantized(model, tmp_path / "q")
    again = load_quantized(tmp_path / "q")
    assert torch.equal(output(again), expected)
    assert (again.model.embed_tokens.codes is again.lm_head.codes) == tied
    layers = sum(row["n"] * row["k"] / 2 + row["n"] * 4 for row in report.layers)
    assert (tmp_path / "q" / "model.safetensors").stat().st_size < 1.25 * layers + 20000


def test_layers_see_full_precision_inputs(monkeypatch):
    """Small passes must not change the result: nothing is replaced before all layers are done."""
    whole, split = llama(), llama()
    quantize_model(whole, "llm-fp4", [TOKENS], progress=False)
    collect = pipeline.collect
    monkeypatch.setattr(pipeline, "collect", lambda *a, **kw: collect(*a, **kw, budget_bytes=1))
    quantize_model(split, "llm-fp4", [TOKENS], progress=False)
    assert torch.equal(output(whole), output(split))


def test_calibration_may_be_one_batch_or_keyword_arguments():
    models = [llama() for _ in range(3)]
    for model, calibration in zip(models, ([TOKENS], TOKENS, [{"input_ids": TOKENS, "use_cache": False}])):
        quantize_model(model, "llm-fp4", calibration, include=("up_proj",), progress=False)
    assert all(torch.equal(output(models[0]), output(model)) for model in models[1:])


class Interrupted(Exception):
    pass


def test_resumes_after_an_interruption(tmp_path, monkeypatch):
    whole, model = llama(), llama()
    quantize_model(whole, "llm-fp4", [TOKENS], progress=False)
    quantize_one, done = pipeline._quantize_one, []

    def counting(name, *args):
        if len(done) == 5:
            raise Interrupted
        done.append(name)
        return quantize_one(name, *args)

    monkeypatch.setattr(pipeline, "_quantize_one", counting)
    with pytest.raises(Interrupted):
        quantize_model(model, "llm-fp4", [TOKENS], work_dir=tmp_path, progress=False)
    assert not fp4_layers(model), "an interrupted run leaves the model as it was"
    (tmp_path / f"{done[1]}.safetensors").write_bytes(b"truncated")
    first, done[:] = list(done), []
    monkeypatch.setattr(pipeline, "_quantize_one", lambda name, *a: done.append(name) or quantize_one(name, *a))
    report = quantize_model(model, "llm-fp4", [TOKENS], work_dir=tmp_path, progress=False)
    assert first[1] in done and not set(done) & {first[0], *first[2:]} and len(report.layers) == 14
    assert torch.equal(output(model), output(whole))
    done.clear()
    quantize_model(llama(), "llm-fp4", [(TOKENS + 1) % 128], work_dir=tmp_path, progress=False)
    assert len(done) == 14, "other calibration data must not reuse the old layers"


@pytest.mark.parametrize("spoil, message", [
    (dict(recipe="fp5"), "unknown recipe 'fp5'"),
    (dict(calibration=None), "needs calibration"),
    (dict(calibration=[]), "needs calibration"),
    (dict(calibration=[TOKENS[:, :0]]), "batch 0 of 1 holds no tokens"),
    (dict(calibration=[{"input_ids": TOKENS[:, :0]}]), "batch 0 of 1 holds no tokens"),
    (dict(calibration=[TOKENS.tolist()]), "calibration holds a list"),
    (dict(include=("nothing",)), r"include 'nothing' matches none of \d+ layers"),
    (dict(include=("*", "embed_tokns")), "include 'embed_tokns' matches none"),
    (dict(exclude=("lm_head", "*.mpl.*")), r"exclude '\*.mpl.\*' matches none"),
    (dict(exclude=("model.layers.0",)), "exclude 'model.layers.0' matches none"),  # a block, not the layers in it
    (dict(exclude=("*",)), "no layer"),
    (dict(overrides={"*": "int5"}), "int5"),
])  # fmt: skip
def test_bad_input_leaves_the_model_alone(spoil, message):
    model = llama()
    arguments = dict(recipe="llm-fp4", calibration=[TOKENS]) | spoil
    with pytest.raises(BadInput, match=message):
        quantize_model(model, progress=False, **arguments)
    assert not fp4_layers(model)


def test_nan_weights_and_empty_layers_are_refused():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(BadInput, match=r"layers.1.mlp.up_proj.weight .* 1 values"):
        quantize_model(model, "llm-fp4", [TOKENS], progress=False)
    with pytest.raises(BadInput, match=r"\[4, 0\]"), pytest.warns(UserWarning):
        quantize_model(nn.Sequential(nn.Linear(0, 4)), "mxfp4", progress=False)


def test_a_layer_that_never_runs_is_reported():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.a(x)

    model = Unused()
    report = quantize_model(model, "llm-fp4", [torch.randn(4, 8)], progress=False)
    assert fp4_layers(model) == ["a"]
    assert {"name": "b", "reason": "never called on the calibration data"} in report.skipped


@pytest.fixture
def saved(tmp_path):
    model = llama()
    quantize_model(model, "mxfp4", progress=False)
    save_quantized(model, tmp_path / "q")
    return tmp_path / "q"


def test_damaged_folders_are_refused(saved):
    weights, config = saved / "model.safetensors", saved / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    with pytest.raises(BadFile, match="no config.json"):
        load_quantized(saved / "missing")
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadFile, match=str(len(whole) // 2)):
        load_quantized(saved)
    weights.unlink()
    with pytest.raises(BadFile, match="no file"):
        load_quantized(saved)
    weights.write_bytes(whole)
    for old, new, message in [
        ('"version": 1', '"version": 7', "version 7"),
        ('"quant_method": "llmfp4"', '"quant_method": "gptq"', "gptq"),
        ('"k": 130', '"k": 132', r"\[72, 65\], expected"),
        ("up_proj", "upper_proj", "lacks"),
    ]:
        assert old in text
        config.write_text(text.replace(old, new))
        with pytest.raises(BadFile, match=message):
            load_quantized(saved)


def test_an_interrupted_save_leaves_the_old_folder(saved, monkeypatch):
    before = (saved / "model.safetensors").read_bytes()
    from llmfp4_kernels.integrations import transformers as integration

    def fail(path, *args):
        path.write_bytes(b"half")
        raise Interrupted

    monkeypatch.setattr(integration, "write_safetensors", fail)
    model = load_quantized(saved)
    with pytest.raises(Interrupted):
        save_quantized(model, saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert os.listdir(saved.parent) == ["q"]


def test_save_refuses_a_dense_model_and_a_foreign_folder(tmp_path):
    with pytest.raises(BadInput, match="no FP4 layer"):
        save_quantized(llama(), tmp_path / "q")
    assert not (tmp_path / "q").exists()
    (tmp_path / "precious.txt").write_text("mine")
    model = llama()
    quantize_model(model, "mxfp4", progress=False)
    with pytest.raises(BadInput, match="no model folder"):
        save_quantized(model, tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_generate_with_a_cache(saved):
    model = load_quantized(saved)
    ids = model.generate(TOKENS[:1, :5], max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        for length in range(5, 13):
            assert model(ids[:, :length]).logits[0, -1].argmax() == ids[0, length]
    assert reference.dequantize(model.model.layers[0].mlp.up_proj.packed()).isfinite().all()


def test_a_work_dir_knows_what_decides_the_inputs(tmp_path):
    model, other = llama(), llama()
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(torch.linspace(0.1, 10, other.config.hidden_size))
    fresh = copy.deepcopy(other)
    quantize_model(model, "llm-fp4", TOKENS, work_dir=tmp_path, progress=False)
    quantize_model(other, "llm-fp4", TOKENS, work_dir=tmp_path, progress=False)
    quantize_model(fresh, "llm-fp4", TOKENS, progress=False)
    assert torch.equal(output(other), output(fresh))


def test_calibration_may_be_a_generator_and_overrides_must_match():
    model = llama()
    report = quantize_model(model, "minmax-w4a4", (batch for batch in [TOKENS]), progress=False)
    assert report.layers
    with pytest.raises(BadInput, match=r"'q_porj' matches none of \d+ layers"):
        quantize_model(llama(), "mxfp4", overrides={"q_porj": "nvfp4"}, progress=False)
