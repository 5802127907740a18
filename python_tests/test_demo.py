"""The demo on a small random LLaMA, its INT4 rival, and its downloads."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from llmfp4_kernels.errors import BadFile, BadInput, NoKernel

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
corpus, demo, quantized, rivals = map(importlib.import_module, ("corpus", "demo", "quantized", "rivals"))


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


class Ascii:
    """One token per character, with what `generate` and `save_quantized` ask of a tokenizer."""

    chat_template = None

    def __call__(self, text, return_tensors=None, **kwargs):
        ids = [min(ord(c), 127) for c in text]
        return {"input_ids": torch.tensor([ids])} if return_tensors else {"input_ids": ids}

    def decode(self, ids, **kwargs):
        return "".join(map(chr, ids))

    def save_pretrained(self, folder):
        pass


def test_the_demo_measures_and_reuses(dense, tmp_path, capsys):
    """All keys of the report, sizes equal to those of the files, and a second run that quantizes nothing."""
    texts = "the calibration text. " * 40, "held out, and different. " * 40
    sizes = demo.Sizes(300, 200, window=64, prompt=4, prefill=32, decode=2, repeats=1, generate=3)
    report = demo.run(dense, Ascii(), texts, tmp_path, sizes, {"model": "tiny", "text": "two sentences"})
    assert not any(record["reused"] for record in report["quantization"].values())
    keys = "model text tokens ppl bytes tokens_per_s kernels machine commit seconds"
    assert set(report) >= set(keys.split())
    assert set(report["ppl"]) >= {"fp32", "minmax-w4a4", "llm-fp4", "llm-fp4-a16"} and report["tokens"] == 200
    assert all(set(rates) == set(demo.TIMED) for rates in report["tokens_per_s"].values())
    assert report["bytes"]["fp32"] == 2 * report["bytes"]["bf16"] == 4 * report["parameters"]
    for recipe, size in report["bytes_by_recipe"].items():
        assert size == (tmp_path / recipe / "model.safetensors").stat().st_size
        header = int.from_bytes((tmp_path / recipe / "model.safetensors").read_bytes()[:8], "little") + 8
        # elements [2] per layer are no scales, and names are most of a tiny file
        assert size - header == report["bytes_stated"][recipe] + 2 * report["quantization"][recipe]["layers"]
    demo.write(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["ppl"] == report["ppl"]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert all(name in demo.table(report) for name in (*demo.TIMED, *demo.RECIPES))
    again = demo.run(dense, Ascii(), texts, tmp_path, sizes, {"model": "tiny", "text": "two sentences"})
    assert all(record["reused"] for record in again["quantization"].values()) and again["ppl"] == report["ppl"]
    assert "reusing" in capsys.readouterr().out
    batches = [torch.zeros(1, 8, dtype=torch.int64)]
    assert quantized.fingerprint(dense, "llm-fp4", batches) != quantized.fingerprint(dense, "llm-fp4", [batches[0] + 1])


def test_int4_is_checked_against_its_dequantized_weights():
    """Half a weight step, a skipped group or swapped outputs do not pass for rounding."""
    weight = torch.randn(32, 192, generator=torch.Generator().manual_seed(0))
    rivals.check_int4(weight)

    def skips_a_group(x, packed, group, scales):
        x = x.clone()
        x[:, -group:] = 0
        return rivals.int4_mm(x, packed, group, scales)

    def off_by_a_scale(x, packed, group, scales):
        return rivals.int4_mm(x, packed, group, (scales.float() * torch.tensor([1.05, 1.0])).bfloat16())

    def swaps_outputs(x, packed, group, scales):
        return rivals.int4_mm(x, packed, group, scales).flip(1)

    for wrong in (skips_a_group, off_by_a_scale, swaps_outputs):
        with pytest.raises(NoKernel, match="off by"):
            rivals.check_int4(weight, kernel=wrong)


def test_int4_is_as_near_as_4_bits_are():
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(1))
    codes, scales = rivals.quantize_int4(weight, 64)
    step = (weight.view(48, 2, 64).amax(-1) - weight.view(48, 2, 64).amin(-1)) / 15
    error = (rivals.dequantize_int4(codes, scales, 64) - weight).abs().view(48, 2, 64).amax(-1)
    assert (error <= 0.55 * step + 0.01).all()  # half a step, and the rounding of scale and zero to bfloat16


def test_int4_refuses_shapes_its_kernel_does_not_take(dense):
    with pytest.raises(BadInput, match="n = 16, k = 100"):
        rivals.Int4Linear(torch.nn.Linear(100, 16))
    model = rivals.torch_int4(dense)
    assert sum(isinstance(m, rivals.Int4Linear) for m in model.modules()) == 14
    assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight.dtype == torch.bfloat16


def test_a_download_is_kept_only_with_its_hash(tmp_path, monkeypatch):
    content = b"a wheel"
    (tmp_path / "a.whl").write_bytes(content)
    good = ("a==1", "a.whl", corpus.sha256(tmp_path / "a.whl"))
    calls = []

    def no_pip(command, **kwargs):
        calls.append(command)
        return corpus.subprocess.CompletedProcess(command, 1, "", "a warning\nERROR: hashes do not match")

    monkeypatch.setattr(corpus.subprocess, "run", no_pip)
    assert corpus.download(good, tmp_path).read_bytes() == content and not calls
    with pytest.raises(BadFile, match="hashes do not match"):
        corpus.download(("a==1", "a.whl", "0" * 64), tmp_path)
    assert "--require-hashes" in calls[0] and list(tmp_path.iterdir()) == []
