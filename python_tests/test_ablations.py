"""The ablations on a small random LLaMA."""

import copy
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from llmfp4_kernels.errors import BadInput
from llmfp4_kernels.evaluate import windows

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
transformers = pytest.importorskip("transformers")
ablations, result_file, subjects, tables = map(
    importlib.import_module, ("ablations", "result_file", "subjects", "tables")
)


@pytest.fixture(scope="module")
def ablation():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    ids = torch.randint(0, 64, (600,), generator=torch.Generator().manual_seed(0))
    subject = subjects.Subject(
        "tiny", "noise", transformers.LlamaForCausalLM(config).eval(), None, windows(ids[:325], 20, batch=4), ids[325:],
        Path("unused"),
    )  # fmt: skip
    return ablations.Ablation(subject, 20, layers=2)


def test_layers_are_spread_over_kinds():
    names = [f"{block}.{kind}" for block in range(30) for kind in "qkvogud"]
    chosen = ablations.spread(names, 14)
    assert sorted(name.split(".")[1] for name in chosen) == sorted("qkvogud" * 2)
    assert ablations.spread(names, 210) == names
    with pytest.raises(BadInput, match="211 layers cannot be taken from 210"):
        ablations.spread(names, 211)


def test_a_part_is_the_first_windows(ablation):
    calibration = ablation.subject.calibration
    assert torch.cat(ablations.part(calibration, 0.25)).equal(torch.cat(calibration[:4])[:4])
    assert torch.cat(ablations.part(calibration, 1.0)).numel() == 320  # the short last window is left out
    assert torch.cat(ablations.part(calibration, 1e-9)).shape == (1, 20)


def test_variants_are_measured_once_against_the_default(ablation, tmp_path, capsys, monkeypatch):
    chosen = [v for v in ablations.VARIANTS if v.group in ("default", "pre-shift")]
    monkeypatch.setattr(ablation, "perplexity", lambda variant: 7.0)
    monkeypatch.setattr(ablations, "fingerprint", lambda dense, name, calibration: name)

    def run(whole):
        result = result_file.ResultFile(tmp_path / "ablations.json")
        ablations.run(ablation, chosen, result, whole)
        return capsys.readouterr().out.count("has it")

    assert [run(False), run(False), run(True), run(True)] == [0, 2, 0, 2]
    report = json.loads((tmp_path / "ablations.json").read_text())
    rows = report["ablations"]["rows"]
    default = rows[ablations.DEFAULT.title]
    assert default["ratio"] == 1 and len(default["errors"]) == 2 and all(0 < e < 1 for e in default["errors"].values())
    assert all(row["least"] <= row["ratio"] <= row["largest"] and row["perplexity"] == 7 for row in rows.values())
    text = "\n".join(tables.ablations_table(report))
    assert "| pre-shift | none |" in text and "2 layers of tiny" in text


def test_perplexity_is_that_of_the_packed_model(ablation):
    """Near the dense model's, on noise near the vocabulary's size; the dense model stays as it is."""
    variant = ablations.Variant("rounds", "1", {"rounds": 1}, share=0.2)
    before = copy.deepcopy(ablation.subject.dense.state_dict())
    assert ablation.perplexity(variant) == pytest.approx(64, rel=0.1)
    assert all(tensor.equal(before[name]) for name, tensor in ablation.subject.dense.state_dict().items())


@pytest.mark.parametrize("variant", ablations.VARIANTS, ids=lambda variant: variant.title)
def test_every_variant_runs(ablation, variant, monkeypatch):
    """All options are ones that the search takes."""
    monkeypatch.setattr(ablation, "names", ablation.names[:1])
    assert all(0 < error < 4 for error in ablation.errors(variant).values())
