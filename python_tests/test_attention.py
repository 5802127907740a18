"""4-bit operands of QK^T and PV: bit for bit against an eager attention written here, masks, GQA, caches, refusals."""

import math

import pytest
import torch
import transformers
from torch import nn

from llmfp4_kernels import load_quantized, quantize_model, save_quantized
from llmfp4_kernels.errors import BadFile, BadInput
from llmfp4_kernels.formats import E1M2, E2M1, E3M0
from llmfp4_kernels.integrations.attention import AttentionOperands, attention_operands, fp4_attention, use_attention
from llmfp4_kernels.integrations.attention_search import quantize_attention, search_attention
from llmfp4_kernels.quantizer.products import Operand
from llmfp4_kernels.reference import decode, encode


def fp32(x):
    return torch.tensor(x).item()


OPERANDS = AttentionOperands(
    query=Operand(E2M1, fp32(0.3)),
    key=Operand(E1M2, fp32(0.4)),
    probabilities=Operand(E3M0, 1 / 16),
    value=Operand(E2M1, fp32(0.2)),
)
TOKENS = torch.arange(66).reshape(2, 33) * 37 % 128


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def llama():
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, hidden_size=56, intermediate_size=72, num_hidden_layers=2, max_position_embeddings=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()


def bert():
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, hidden_size=36, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40)
    return transformers.BertModel(transformers.BertConfig(**sizes)).eval()


def vit():
    torch.manual_seed(0)
    sizes = dict(hidden_size=36, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, num_labels=5)
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=24, patch_size=8, **sizes)).eval()


def padded_batch():
    mask = torch.ones_like(TOKENS)
    mask[1, 20:] = 0
    return {"input_ids": TOKENS, "attention_mask": mask}


FAMILIES = {
    "llama": (llama, {"input_ids": TOKENS}),
    "bert": (bert, padded_batch()),
    "vit": (vit, {"pixel_values": torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))}),
}


def output(model, batch):
    with torch.no_grad():
        return model(**batch)[0]


def on_grid(x, operand):
    """The judge's codes of x, and the element values they stand for, in float64."""
    return decode(encode(x.float() * (1 / operand.scale), operand.element), operand.element, torch.float64)


def eager(query, key, value, mask, scaling, operands):
    """Head by head and in float64, where nothing is lost; the exact sums are rounded to float32 once."""
    outputs = torch.empty(*query.shape[:3], value.shape[3])
    groups = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            q, k = on_grid(query[b, h], operands.query), on_grid(key[b, h // groups], operands.key)
            scores = (q @ k.T).float() * (operands.query.scale * operands.key.scale * scaling)
            if mask is not None:
                scores = scores + mask[b % len(mask), h % mask.shape[1]]
            p = on_grid(scores.softmax(-1), operands.probabilities)
            product = (p @ on_grid(value[b, h // groups], operands.value)).float()
            outputs[b, h] = product * (operands.probabilities.scale * operands.value.scale)
    return outputs.transpose(1, 2)


def random_mask(*shape):
    attended = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.3
    attended[..., 0] = True
    return torch.where(attended, 0.0, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("heads, key_heads", [(1, 1), (6, 6), (6, 2), (5, 1)])
@pytest.mark.parametrize(
    "q, k, d, mask", [(7, 7, 20, None), (1, 33, 17, (1, 1)), (13, 29, 64, (2, 1)), (3, 5, 1, (2, 0))]
)
def test_bits_of_the_eager_reference(heads, key_heads, q, k, d, mask):
    generator = torch.Generator().manual_seed(q * k + heads)
    query, key, value = (
        torch.randn(2, h, t, d, generator=generator) for h, t in ((heads, q), (key_heads, k), (key_heads, k))
    )
    mask = random_mask(mask[0], mask[1] or heads, q, k) if mask else None
    module = nn.Module()
    module.fp4_attention = OPERANDS
    got, probabilities = fp4_attention(module, query, key, value, mask, scaling=0.37)
    assert got.shape == (2, q, heads, d) and probabilities.shape == (2, heads, q, k)
    assert torch.equal(got, eager(query, key, value, mask, 0.37, OPERANDS))
    if mask is not None:
        assert torch.equal(fp4_attention(module, query, key, value, mask == 0, scaling=0.37)[0], got)
    default, _ = fp4_attention(module, query, key, value, mask)
    assert torch.equal(default, eager(query, key, value, mask, d**-0.5, OPERANDS))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_operands_it_is_the_models_own(family):
    make, batch = FAMILIES[family]
    model = make()
    expected = output(model, batch)
    layers = [n for n, m in model.named_modules() if n.endswith(("self_attn", "attention.self", ".attention"))]
    report = search_attention(model, batch, rounds=1)
    assert set(report.operands) <= set(layers) and len(report.operands) == 2
    assert torch.equal(output(model, batch), expected) and not attention_operands(model), "the search left its mark"
    use_attention(model, {name: AttentionOperands() for name in report.operands})
    torch.testing.assert_close(output(model, batch), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantize_save_load(family, tmp_path):
    make, batch = FAMILIES[family]
    model = make()
    dense = output(model, batch)
    report = quantize_attention(model, [batch, batch])
    assert [row["name"] for row in report.layers] == list(report.operands) == list(attention_operands(model))
    assert all(0 < row[product]["relative_error"] < 0.06 for row in report.layers for product in ("qk", "pv"))
    rounded = output(model, batch)
    assert 0 < ((rounded - dense).norm() / dense.norm()).item() < 0.2
    save_quantized(model, tmp_path / "attention")
    assert torch.equal(output(load_quantized(tmp_path / "attention"), batch), rounded)
    quantize_model(model, "nvfp4", progress=False)
    expected = output(model, batch)
    assert not torch.equal(expected, rounded)
    save_quantized(model, tmp_path / "all")
    again = load_quantized(tmp_path / "all")
    assert torch.equal(output(again, batch), expected) and attention_operands(again) == report.operands
    use_attention(again, {})
    assert again.config._attn_implementation == "sdpa" and not torch.equal(output(again, batch), expected)


def test_damaged_operands_are_refused(tmp_path):
    model = llama()
    quantize_attention(model, TOKENS)
    save_quantized(model, tmp_path)
    config = (tmp_path / "config.json").read_text()
    for old, new in (('"e3m0"', '"e3m3"'), ('"probabilities"', '"weights"'), ('"query": [', '"query": [[], ')):
        assert old in config
        (tmp_path / "config.json").write_text(config.replace(old, new))
        with pytest.raises(BadFile, match="attention"):
            load_quantized(tmp_path)


def test_a_forward_is_the_eager_reference(monkeypatch):
    """Through LLaMA itself, with GQA and its causal mask: every call has the bits of the reference."""
    model, calls = llama(), []
    quantize_attention(model, TOKENS)
    original = AttentionOperands.attend

    def compare(self, query, key, value, mask, scaling, dropout=0.0):
        got, probabilities = original(self, query, key, value, mask, scaling, dropout)
        calls.append(torch.equal(got.transpose(1, 2), eager(query, key, value, mask, scaling, self)))
        assert (probabilities.triu(1) == 0).all()
        return got, probabilities

    monkeypatch.setattr(AttentionOperands, "attend", compare)
    output(model, {"input_ids": TOKENS})
    assert calls == [True, True]


def test_decoding_with_a_cache_goes_on_from_the_prompt():
    """The cache holds full-precision keys and values, so that a step is what a whole forward computes."""
    model = llama()
    quantize_attention(model, TOKENS)
    ids = model.generate(TOKENS[:1, :9], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert ids.shape == (1, 17)
    with torch.no_grad():
        cached = model(TOKENS[:1, :9], use_cache=True)
        step = model(TOKENS[:1, 9:10], past_key_values=cached.past_key_values, use_cache=True).logits[0, -1]
        whole = model(TOKENS[:1, :10]).logits[0, -1]
    keys = cached.past_key_values.layers[0].keys
    assert len(keys.unique()) > 16 * keys.shape[1], "keys in the cache were rounded"
    torch.testing.assert_close(step, whole, atol=1e-5, rtol=1e-4)


def test_padding_does_not_change_the_others():
    model, batch = bert(), padded_batch()
    quantize_attention(model, batch)
    short = output(model, {"input_ids": TOKENS[1:, :20]})
    torch.testing.assert_close(output(model, batch)[1:, :20], short, atol=1e-5, rtol=1e-4)


def test_half_precision_and_gradients():
    model = llama()
    quantize_attention(model, TOKENS)
    assert output(model.to(torch.bfloat16), {"input_ids": TOKENS}).dtype == torch.bfloat16
    model.float().train()
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(layer.self_attn.q_proj.weight.grad.abs().sum() > 0 for layer in model.model.layers)


def test_options_of_the_search():
    model = llama()
    report = search_attention(model, TOKENS, products=("pv",), exclude=("model.layers.0.*",))
    first, second = report.operands.values()
    assert first == AttentionOperands() and second.query is None and second.value is not None
    assert AttentionOperands.from_dict(second.to_dict()) == second
    whole = search_attention(model, [TOKENS[:1], TOKENS[1:]])
    assert search_attention(model, [TOKENS[:1], TOKENS[1:]], budget_bytes=1) == whole, "one layer a pass"


def test_refusals():
    with pytest.raises(BadInput, match="no transformers model"):
        quantize_attention(nn.Linear(3, 3), torch.randn(2, 3))
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(BadInput, match="without transformers' AttentionInterface"):
        quantize_attention(bloom, TOKENS % 32)
    model = llama()
    for arguments, message in [
        (dict(calibration=[]), "got none"),
        (dict(calibration=[TOKENS[:, :0]]), "batch 0 of 1 holds no tokens"),
        (dict(calibration=["text"]), "holds a str"),
        (dict(bits=5), "5 bits"),
        (dict(products=("qq",)), "'qq'"),
        (dict(exclude=("*",)), "all 2 attention layers"),
        (dict(exclude=("*.self_atn",)), r"exclude '\*.self_atn' matches none"),
        (dict(queries=0), "got 16 and 0"),
    ]:
        with pytest.raises(BadInput, match=message):
            quantize_attention(model, **(dict(calibration=[TOKENS]) | arguments))
    with pytest.raises(BadInput, match="has no attention nowhere"):
        use_attention(model, {"nowhere": OPERANDS})
    use_attention(model, {"model.layers.0.self_attn": OPERANDS})
    with pytest.raises(BadInput, match="not called in the calibration"):
        output(model, {"input_ids": TOKENS})
    x, module = torch.randn(1, 2, 3, 4), nn.Module()
    module.fp4_attention = OPERANDS
    with pytest.raises(BadInput, match="softcap"):
        fp4_attention(module, x, x, x, None, softcap=30.0)
    with pytest.raises(BadInput, match="causal over 3 queries"):
        fp4_attention(module, x, x, x, None, is_causal=True)
    with pytest.raises(BadInput, match="describes no attention"):
        AttentionOperands.from_dict({"query": "e2m1"})


def test_attention_that_is_more_than_its_arguments_is_refused(monkeypatch):
    """A model whose eager attention does something of its own is found by comparing outputs, not by its name."""
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.eager_attention_forward

    def damped(module, query, key, value, *args, **kwargs):
        return plain(module, query, key, value * 0.9, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", damped)
    with pytest.raises(BadInput, match="more than softmax"):
        quantize_attention(llama(), TOKENS)


def test_nan_in_the_calibration_is_refused():
    model = llama()
    model.model.layers[1].self_attn.q_proj.weight.data[3, 3] = math.nan
    with pytest.raises(BadInput, match="NaN|nan"):
        search_attention(model, TOKENS)
    assert not attention_operands(model) and model.config._attn_implementation == "sdpa"
