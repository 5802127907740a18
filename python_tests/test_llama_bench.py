"""benchmarks/llama.py on a model of two tiny layers, on the CPU and without graphs."""

import copy
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmfp4_kernels.errors import NoKernel

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
judge, llama, llama_models, llama_table, static_cache = map(
    importlib.import_module, ("judge", "llama", "llama_models", "llama_table", "static_cache")
)
TINY = dict(hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, vocab_size=200, tie_word_embeddings=False)  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(llama.SHAPES, "tiny", TINY)
    with torch.inference_mode():
        yield


def run(out: Path, *arguments: str) -> list[dict]:
    llama.main(["--cpu", "--model", "tiny", "--prefill", "17", "--decode", "3", "--rounds", "2", "--out", str(out),
                *arguments])  # fmt: skip
    return [json.loads(text) for text in out.read_text().splitlines()]


def test_every_row_says_what_was_measured(tmp_path):
    rows = run(tmp_path / "llama.jsonl")
    assert [row["name"] for row in rows] == [llama.BASE, llama.INT4, *llama.SCHEMES]
    for row in rows:
        assert not row["graphs"] and row["device"] == "cpu" and row["most_bytes"] is None and "commit" in row
        assert row["prefill_tokens"] == 17 and row["decode_tokens"] == 3 and "cpu" in row["machine"]
        assert all(min(row[f"{phase}_times"]) > 0 and row[f"{phase}_error"] <= judge.LOGITS for phase in row["kernels"])
    dense, packed = rows[0]["weight_bytes"], rows[-1]["weight_bytes"]
    linears = 2 * (4 * 128 * 128 + 3 * 128 * 320)
    assert dense - packed == pytest.approx(linears * 1.5, rel=0.05)  # 16 bits become 4, and a scale per row
    text = (tmp_path / "llama.md").read_text()
    assert "tiny, random weights" in text and "no CUDA graphs" in text and "| llm-fp4 | cpu." in text


def test_nothing_is_built_after_the_limit(tmp_path, capsys):
    with pytest.raises(SystemExit, match="nothing was measured"):
        run(tmp_path / "llama.jsonl", "--limit", "0")
    assert "llm-fp4 is left out: 0.0 s have passed" in capsys.readouterr().out


def test_fewer_layers_are_named(tmp_path):
    rows = run(tmp_path / "llama.jsonl", "--layers", "1", "--schemes", "llm-fp4")
    assert {llama_table.named(row) for row in rows} == {"tiny, 1 of 2 layers"}
    assert "1 of 2 layers" in (tmp_path / "llama.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="on a GPU: there is none that torch can use"):
        llama.main(["--model", "tiny"])


def entrant_and_ids(recipe: str):
    ids = torch.arange(17)[None] * 37 % 200
    dense = llama_models.bf16_entrant(TINY, "cpu")
    return llama_models.fp4_entrant(recipe, TINY, "cpu", llama_models.largest_inputs(dense.model, ids)), ids


def test_a_static_cache_continues_as_the_whole_prompt_does():
    entrant, ids = entrant_and_ids("llm-fp4")
    session = static_cache.StaticSession(entrant.model, ids, 3)
    found, tokens = [session.prefill()], []
    for _ in range(3):
        tokens.append(session.token.clone())
        found.append(session.decode())
    whole = entrant.model(torch.cat([ids, *tokens], 1)).logits[0, -4:]
    torch.testing.assert_close(torch.cat(found), whole, rtol=0.05, atol=0.05)
    session.seek(17)
    session.token.copy_(tokens[0])
    assert torch.equal(session.decode(), found[1])


ASKING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal")


class NoQuestions(TorchDispatchMode):
    """Operations whose result the host waits for, or whose shape depends on values: a graph cannot hold them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in ASKING, function
        return function(*args, **(kwargs or {}))


def test_steps_ask_the_host_nothing():
    session = static_cache.StaticSession(llama_models.bf16_entrant(TINY, "cpu").model, torch.arange(17)[None], 1)
    with NoQuestions():
        session.prefill()
        session.decode()
        with pytest.raises(AssertionError, match="item"):
            session.token.item()


@pytest.mark.parametrize(
    "scheme", ["llm-fp4", "gptq-fp4-a4", "minmax-w4a8", "llm-fp4-a16", "llm-fp4+fused", "llm-fp4-a16+fused"]
)
def test_a_wrong_layer_is_not_timed(scheme, tmp_path, monkeypatch, capsys):
    wrong = "gate_up_proj" if "+" in scheme else "up_proj"

    def spoiled(*arguments):
        entrant = llama_models.fp4_entrant(*arguments)
        name = f"model.layers.1.mlp.{wrong}"
        layer = entrant.model.get_submodule(name)
        right = judge.fp4_judge(copy.deepcopy(layer))
        entrant.judges[name] = lambda: right
        layer.codes.view(-1)[5] ^= 0x11
        return entrant

    monkeypatch.setattr(llama, "fp4_entrant", spoiled)
    with pytest.raises(
        SystemExit, match=re.escape(f"{scheme} is left out: refusing to time it: model.layers.1.mlp.{wrong}")
    ):
        run(tmp_path / "llama.jsonl", "--schemes", scheme)
    assert [json.loads(line)["name"] for line in (tmp_path / "llama.jsonl").read_text().splitlines()] == [
        llama.BASE, llama.INT4]  # fmt: skip


def test_layers_that_are_not_called_and_other_logits_are_noticed():
    entrant, ids = entrant_and_ids("llm-fp4")
    attention = entrant.model.model.layers[0].self_attn
    attention.o_proj_called, attention.o_proj = attention.o_proj, entrant.model.model.layers[1].self_attn.o_proj
    entrant.judges["model.layers.0.self_attn.o_proj_called"] = entrant.judges.pop("model.layers.0.self_attn.o_proj")
    with pytest.raises(NoKernel, match="28 calls of 14 packed layers, expected two of each"):
        llama.judge(entrant, static_cache.StaticSession(entrant.model, ids, 1))
    with pytest.raises(NoKernel, match="logits of decode are off by 1, 0.05 is rounding"):
        judge.require_logits("decode", torch.zeros(1, 4), torch.ones(1, 4))
