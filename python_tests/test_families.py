"""Model families end to end: quantize, save and load with equal bits; globs, heads, tables, shared and idle layers."""

import pytest
import torch
import transformers
from torch import nn

from llmfp4_kernels import FP4Embedding, FP4Linear, load_quantized, quantize_model, save_quantized
from llmfp4_kernels.errors import BadFile
from llmfp4_kernels.nn import FP4Module
from llmfp4_kernels.packed import open_safetensors

TOKENS = torch.arange(66).reshape(2, 33) * 37 % 128
PIXELS = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # small tensors: two threads on a busy machine wait for each other longer than they work


def llama(tied=False):
    sizes = dict(vocab_size=128, hidden_size=56, intermediate_size=75, num_hidden_layers=2, pad_token_id=3)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def bert(make=transformers.BertModel):
    sizes = dict(vocab_size=128, hidden_size=36, num_hidden_layers=2, num_attention_heads=3, intermediate_size=51)
    return make(transformers.BertConfig(**sizes))


def masked_bert():
    return bert(transformers.BertForMaskedLM)


def vit():
    sizes = dict(hidden_size=36, num_hidden_layers=2, num_attention_heads=3, intermediate_size=51, num_labels=5)
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=24, patch_size=8, **sizes))


def deit():
    sizes = dict(hidden_size=36, num_hidden_layers=2, num_attention_heads=3, intermediate_size=51, num_labels=5)
    make = transformers.DeiTForImageClassificationWithTeacher
    return make(transformers.DeiTConfig(image_size=24, patch_size=8, **sizes))


def gpt2():
    sizes = dict(vocab_size=128, n_embd=36, n_layer=2, n_head=3, n_positions=64, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def albert():
    """One layer called three times per forward."""
    sizes = dict(vocab_size=128, hidden_size=36, embedding_size=20, num_hidden_layers=3, num_attention_heads=3)
    return transformers.AlbertModel(transformers.AlbertConfig(intermediate_size=51, **sizes))


def t5():
    """An encoder and a decoder with one table."""
    sizes = dict(vocab_size=128, d_model=36, d_kv=12, d_ff=51, num_layers=2, num_heads=3, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


BERT_TABLES = ["embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings"]
# maker, a batch, FP4 linear layers with exclude=(), the embeddings and how many tables their codes are
FAMILIES = {
    "llama": (llama, {"input_ids": TOKENS}, 15, ["model.embed_tokens"]),
    "llama, tied": (lambda: llama(tied=True), {"input_ids": TOKENS}, 15, ["model.embed_tokens"]),
    "bert": (bert, {"input_ids": TOKENS, "attention_mask": (TOKENS != 37).long()}, 13, BERT_TABLES),
    "bert, masked": (masked_bert, {"input_ids": TOKENS}, 14, [f"bert.{name}" for name in BERT_TABLES]),
    "vit": (vit, {"pixel_values": PIXELS}, 13, []),
    "deit": (deit, {"pixel_values": PIXELS}, 14, []),
    "gpt2": (gpt2, {"input_ids": TOKENS}, 9, ["transformer.wte", "transformer.wpe"]),
    "albert": (albert, {"input_ids": TOKENS}, 8, BERT_TABLES),
}


def made(family):
    torch.manual_seed(0)
    return FAMILIES[family][0]().eval()


def output(model, batch):
    with torch.no_grad():
        return model(**batch)[0] if isinstance(batch, dict) else model(batch)


def modules_of(model, kind):
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


@pytest.mark.parametrize("recipe", ["llm-fp4", "nvfp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers(family, recipe, tmp_path):
    """Everything but the head, by default: the same bits after save and load."""
    model, (_, batch, layers, _) = made(family), FAMILIES[family]
    dense = output(model, batch)
    has_head = any(name.rsplit(".", 1)[-1] == "lm_head" for name, _ in model.named_modules())
    report = quantize_model(model, recipe, [batch], progress=False)
    assert len(report.layers) == len(modules_of(model, FP4Linear)) == layers - has_head
    expected = output(model, batch)
    assert 0 < ((expected - dense).norm() / dense.norm()).item() < 0.6
    save_quantized(model, tmp_path / "q")
    again = load_quantized(tmp_path / "q")
    assert type(again) is type(model) and torch.equal(output(again, batch), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_head_and_tables(family, tmp_path):
    """All linear layers and the tables by name; codes of tied ones are one tensor, in memory and in the file."""
    model, (_, batch, layers, tables) = made(family), FAMILIES[family]
    tied = model.get_output_embeddings() is not None and (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    report = quantize_model(model, "llm-fp4-a16", [batch], include=("*", *tables), exclude=(), progress=False)
    assert len(modules_of(model, FP4Linear)) == layers and modules_of(model, FP4Embedding) == tables
    assert len(report.layers) == layers + len(tables) - tied
    expected = output(model, batch)
    save_quantized(model, tmp_path / "q")
    again = load_quantized(tmp_path / "q")
    assert torch.equal(output(again, batch), expected)
    with open_safetensors(tmp_path / "q" / "model.safetensors") as file:
        codes = [name for name in file.keys() if name.endswith(".codes")]  # noqa: SIM118 (no mapping)
    assert len(codes) == layers + len(tables) - tied
    if tied:
        assert again.get_input_embeddings().codes is again.get_output_embeddings().codes
    assert [again.get_submodule(t).padding_idx for t in tables] == [model.get_submodule(t).padding_idx for t in tables]


@pytest.mark.parametrize("by_name", [False, True], ids=["load_quantized", "from_pretrained"])
@pytest.mark.parametrize("family", ["llama, tied", "bert"])
def test_a_loaded_model_compiles_and_exports(family, by_name, tmp_path):
    """Before its first call: a trace cannot read the tensors that say what a layer's codes are."""
    model, (_, batch, _, tables) = made(family), FAMILIES[family]
    quantize_model(model, "llm-fp4", [batch], include=("*", *tables), exclude=(), progress=False)
    batch = batch | ({"use_cache": False} if family != "bert" else {})
    expected = output(model, batch)
    save_quantized(model, tmp_path / "q")

    def again():
        torch._dynamo.reset()
        return (type(model).from_pretrained if by_name else load_quantized)(tmp_path / "q").eval()

    compiled = torch.compile(again(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output(compiled, batch), expected, rtol=1e-5, atol=1e-5)
    exported = torch.export.export(again(), (), batch, strict=False).module()
    torch.testing.assert_close(exported(**batch)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama, tied", "gpt2", "bert, masked"])
def test_a_table_without_its_tied_head(family, tmp_path):
    """Only one of two tied layers is quantized: the other keeps the dense weight, in the file too."""
    model, (_, batch, _, tables) = made(family), FAMILIES[family]
    quantize_model(
        model, "mxfp4", include=tables[:1], exclude=("decoder" if "bert" in family else "lm_head",), progress=False
    )
    head = model.get_output_embeddings()
    assert modules_of(model, FP4Module) == tables[:1] and type(head) is nn.Linear
    expected = output(model, batch)
    save_quantized(model, tmp_path / "q")
    again = load_quantized(tmp_path / "q")
    assert torch.equal(again.get_output_embeddings().weight, head.weight)
    assert torch.equal(output(again, batch), expected)


@pytest.mark.parametrize("family", ["llama, tied", "gpt2", "bert, masked"])
def test_a_head_without_its_tied_table(family, tmp_path):
    model, (_, batch, layers, _) = made(family), FAMILIES[family]
    quantize_model(model, "mxfp4", exclude=(), progress=False)
    assert len(modules_of(model, FP4Linear)) == layers and not modules_of(model, FP4Embedding)
    expected = output(model, batch)
    save_quantized(model, tmp_path / "q")
    assert torch.equal(output(load_quantized(tmp_path / "q"), batch), expected)


@pytest.mark.parametrize(
    "family, include, exclude, expected",
    [
        (
            "llama",
            ("*.self_attn.*",),
            ("*.1.*", "k_proj"),
            ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj"],
        ),
        ("bert", ("*.attention.*",), ("*.layer.1.*", "*.self.*"), ["encoder.layer.0.attention.output.dense"]),
        ("vit", ("classifier", "*.layers.0.attention.q*"), (), ["vit.layers.0.attention.q_proj", "classifier"]),
        ("gpt2", ("c_attn",), (), ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]),
        ("bert", ("token_type_embeddings",), (), ["embeddings.token_type_embeddings"]),
    ],
)
def test_globs(family, include, exclude, expected):
    model = made(family)
    report = quantize_model(model, "mxfp4", include=include, exclude=exclude, progress=False)
    names = modules_of(model, FP4Module)
    assert [name.removeprefix("model.layers.0.") for name in names] == expected
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    assert linear - set(names) <= {row["name"] for row in report.skipped}


def test_an_encoder_with_a_decoder(tmp_path):
    """T5 casts the inputs of `wo` to the dtype of its weight, which are codes: it is left out."""
    torch.manual_seed(0)
    model, batch = t5().eval(), {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :9]}
    report = quantize_model(model, "nvfp4", exclude=("wo", "lm_head"), progress=False)
    assert len(report.layers) == 28
    expected = output(model, batch)
    save_quantized(model, tmp_path / "q")
    assert torch.equal(output(load_quantized(tmp_path / "q"), batch), expected)


class Tree(nn.Module):
    """Any module tree: a layer under two names and called thrice, an idle one, a table, and dense rest."""

    def __init__(self):
        super().__init__()
        self.table, self.other_table = nn.Embedding(31, 20, padding_idx=2), nn.Embedding(31, 20)
        self.other_table.weight = self.table.weight
        self.again = nn.Linear(20, 20)
        self.stack = nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 20, bias=False), self.again)
        self.idle, self.norm = nn.Linear(20, 7), nn.BatchNorm1d(20)
        self.encoder = nn.TransformerEncoderLayer(20, 2, 24, batch_first=True)

    def forward(self, ids):
        x = self.table(ids) + self.other_table(ids.flip(1))
        x = self.again(self.again(self.stack(x)))
        return self.norm(self.encoder(x).transpose(1, 2))


def tree():
    torch.manual_seed(0)
    return Tree().eval()


IDS = torch.arange(24).reshape(3, 8) * 7 % 31


def test_any_module_tree(tmp_path):
    model = tree()
    dense = output(model, IDS)
    report = quantize_model(model, "llm-fp4", [IDS], include=("*", "*table"), progress=False)
    assert model.again is model.stack[3] and isinstance(model.again, FP4Linear)
    assert model.table.codes is model.other_table.codes
    reasons = {row["name"]: row["reason"] for row in report.skipped}
    assert reasons["idle"] == "never called on the calibration data" and "encoder.self_attn.out_proj" in reasons
    assert {row["name"] for row in report.layers} == {
        "table", "again", "stack.0", "stack.2", "encoder.linear1", "encoder.linear2",
    }  # fmt: skip
    expected = output(model, IDS)
    assert 0 < ((expected - dense).norm() / dense.norm()).item() < 0.5
    save_quantized(model, tmp_path / "q", report=report)
    again = load_quantized(tmp_path / "q", Tree())
    assert torch.equal(output(again, IDS), expected) and again.again is again.stack[3]
    assert again.table.codes is again.other_table.codes and again.table.padding_idx == 2
    with pytest.raises(BadFile, match="'Tree'.*give its dense tree"):
        load_quantized(tmp_path / "q")
    other = Tree()
    other.stack[0] = nn.Linear(20, 34)
    with pytest.raises(BadFile, match=r"stack.0 of \[33, 20\], the tree's weight is \[34, 20\]"):
        load_quantized(tmp_path / "q", other)
    other = Tree()
    other.norm = nn.BatchNorm1d(20, affine=False)
    with pytest.raises(BadFile, match=r"norm.bias as torch.float32 \[20\], the tree as none"):
        load_quantized(tmp_path / "q", other)
    with pytest.raises(BadFile, match="bfloat16"):
        load_quantized(tmp_path / "q", Tree().to(torch.bfloat16))


def test_a_layer_called_several_times_sees_all_its_inputs():
    """Its static activation scale covers the largest input of any call, here the third one's."""
    model = tree()
    seen = []
    model.again.register_forward_pre_hook(lambda module, args: seen.append(args[0].abs().max()))
    output(model, IDS)
    model.again._forward_pre_hooks.clear()
    assert len(seen) == 3 and max(seen) > 0
    quantize_model(model, "minmax-w4a4", [IDS], include=("again",), progress=False)
    packed = model.again.packed()
    assert packed.x_scale.item() * packed.activation.max == pytest.approx(max(seen).item(), rel=1e-6)


@pytest.mark.parametrize("recipe", ["llm-fp4", "minmax-w4a4"])
def test_a_table_has_no_activations(recipe, tmp_path):
    """A W4A4 recipe stores nothing about the inputs of a table, which are ids; no calibration is needed."""
    model = made("llama")
    overrides = {"embed_tokens": recipe}
    report = quantize_model(model, "mxfp4", include=("embed_tokens",), overrides=overrides, progress=False)
    table = model.model.embed_tokens
    assert report.layers[0]["activation"] is None and table.x_scale is None and table.shift is None
    save_quantized(model, tmp_path / "q")
    assert torch.equal(
        output(load_quantized(tmp_path / "q"), {"input_ids": TOKENS}), output(model, {"input_ids": TOKENS})
    )


def test_tables_that_compute_something_else_are_left_alone():
    class Doubled(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    model = nn.ModuleDict(
        {"doubled": Doubled(9, 4), "renormed": nn.Embedding(9, 4, max_norm=1.0), "x": nn.Linear(4, 4)}
    )
    report = quantize_model(model, "mxfp4", include=("*", "doubled", "renormed"), progress=False)
    assert modules_of(model, FP4Module) == ["x"]
    reasons = {row["name"]: row["reason"] for row in report.skipped}
    assert "a Doubled" in reasons["doubled"] and "renormalises its rows to 1.0" in reasons["renormed"]
