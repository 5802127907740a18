"""The accuracy table on a small random LLaMA and a small random BERT, and the tables in the README."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from llmfp4_kernels.errors import BadFile
from llmfp4_kernels.evaluate import windows

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
transformers = pytest.importorskip("transformers")
accuracy, figures, quantized, result_file, simulated, subjects, tables = map(
    importlib.import_module, ("accuracy", "figures", "quantized", "result_file", "simulated", "subjects", "tables")
)
SIZES = dataclasses.asdict(subjects.QUICK)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


class Words:
    """A tokenizer of one token per letter of each word's start; 0 pads, and nothing is saved."""

    pad_token, model_max_length = "0", 32

    def __call__(self, sentences, padding=False, max_length=32, **kwargs):
        ids = [[1 + ord(word[0]) % 60 for word in s.split()][:max_length] for s in sentences]
        if not padding:
            return {"input_ids": ids}
        longest = max(map(len, ids))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        return transformers.BatchEncoding({"input_ids": padded, "attention_mask": (padded > 0).long()})

    def save_pretrained(self, folder):
        pass


def language(llama, folder: Path):
    """accuracy.Language on random tokens."""
    task = accuracy.Language.__new__(accuracy.Language)
    ids = torch.randint(0, 128, (400,), generator=torch.Generator().manual_seed(0))
    calibration = windows(ids[:200], 50, batch=2)
    task.window = 50
    task.subject = subjects.Subject("tiny", "noise", llama, Words(), calibration, ids[200:], folder, (), torch.bfloat16)
    return task


def encoder(folder: Path):
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    draw = torch.randint(97, 123, (40, 12), generator=generator).tolist()
    sentences = [" ".join(map(chr, letters[: 3 + i % 9])) for i, letters in enumerate(draw)]
    task = accuracy.Embedding.__new__(accuracy.Embedding)
    batches = subjects.batches_of_equal_length(Words(), sentences[:20], 4)
    model = transformers.BertModel(config).eval()
    task._full = None
    task.subject = subjects.Subject("tiny bert", "letters", model, Words(), batches, sentences[20:], folder)
    return task


def test_the_table_is_measured_once_and_filled_in(llama, tmp_path, capsys):
    """Two recipes on both models; a second run measures nothing, and another key measures again."""
    recipes = ["mxfp4", "minmax-w4a4"]
    for _ in range(2):
        result = result_file.ResultFile(tmp_path / "accuracy.json")
        accuracy.run(language(llama, tmp_path / "language"), recipes, SIZES, result)
        accuracy.run(encoder(tmp_path / "embedding"), recipes, SIZES, result)
    assert capsys.readouterr().out.count("has it") == 4
    report = json.loads((tmp_path / "accuracy.json").read_text())
    for section in ("language", "embedding"):
        rows = report[section]["rows"]
        assert list(rows) == ["full precision", *recipes] and rows["minmax-w4a4"]["width"] == 4
        assert rows["mxfp4"]["bits_per_weight"] > 4.25 and rows["mxfp4"]["width"] == 16
        # Integer sums are exact up to the last roundings; those of floats depend on the kernel's order.
        assert rows["minmax-w4a4"]["check"]["worst_units"] < 4 and rows["mxfp4"]["check"]["worst_units"] < 64
        assert all({"commit", "date", "key", "kernels", "quantization"} <= set(rows[name]) for name in recipes)
        assert rows["minmax-w4a4"]["check"]["off_reference"] == 0
        assert rows["mxfp4"]["check"]["off_simulated"] < 1e-5 > rows["mxfp4"]["check"]["off_reference"]
    assert report["embedding"]["rows"]["full precision"]["quality"]["cosine"] == pytest.approx(1)
    text = "\n".join(line for table in tables.accuracy_tables(report) for line in table)
    assert "| MXFP4 | 4." in text and "| – | – |" in text and "tiny bert" in text
    result.describe("language", {"model": "another"})
    assert not result.find("language", "mxfp4", report["language"]["rows"]["mxfp4"]["key"])


def test_the_simulation_finds_what_is_off_by_a_digit(llama, tmp_path):
    """A packed layer with row scales that are 2^-16 too large is seen; right ones are exact."""
    task = language(llama, tmp_path)
    model = torch.nn.Module.float(task.subject.quantized("minmax-w4a4")[0])
    ids = task.subject.evaluation[None, :40]
    simulation = simulated.replaced(model, simulated.Simulated)
    simulation(ids)
    assert simulated.worst_layer(simulation)[1] < 4
    wrong = next(module for module in simulation.modules() if isinstance(module, simulated.Simulated))
    wrong.packed = dataclasses.replace(wrong.packed, row_scale=wrong.packed.row_scale * (1 + 2**-16))
    simulation(ids)
    name, units = simulated.worst_layer(simulation)
    assert units > 8 and simulation.get_submodule(name) is wrong


def test_models_are_quantized_once_and_found_elsewhere(llama, tmp_path):
    first = language(llama, tmp_path / "a").subject
    assert not first.quantized("mxfp4")[1]["reused"] and first.quantized("mxfp4")[1]["reused"]
    other = dataclasses.replace(first, folder=tmp_path / "b", elsewhere=(tmp_path / "a",))
    model, record = other.quantized("mxfp4")
    assert record["reused"] and not (tmp_path / "b").exists()
    bits = [row["bits_per_weight"] * row["n"] * row["k"] for row in report_of(tmp_path / "a" / "mxfp4")]
    weights = [row["n"] * row["k"] for row in report_of(tmp_path / "a" / "mxfp4")]
    assert quantized.bits_per_weight(model) == pytest.approx(sum(bits) / sum(weights))
    assert first.fingerprint("mxfp4") != first.fingerprint("nvfp4")
    assert first.fingerprint("mxfp4") != dataclasses.replace(first, calibration=first.calibration[1:]).fingerprint(
        "mxfp4"
    )


def report_of(folder: Path) -> list[dict]:
    return json.loads((folder / "quantization_report.json").read_text())["layers"]


def test_calibration_sentences_are_not_padded():
    batches = subjects.batches_of_equal_length(Words(), ["a b c", "d e", "f g h", "i j k", "l m"], 2)
    assert [list(batch["input_ids"].shape) for batch in batches] == [[2, 2], [2, 3], [1, 3]]
    assert sum(map(quantized.tokens_of, batches)) == 13


def test_bad_input_is_refused_before_any_work(capsys, tmp_path):
    assert accuracy.main(["--recipes", "nvfp4", "fp5", "--build", str(tmp_path)]) == 2
    assert "unknown recipe 'fp5'" in capsys.readouterr().err and not list(tmp_path.iterdir())
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(BadFile, match="1 bytes"):
        result_file.ResultFile(tmp_path / "bad.json")


def written(folder: Path, name: str, section: str, about: dict, rows: dict) -> None:
    """A result file with these rows, each of its own commit."""
    rows = {row: {"commit": letter * 40} | content for letter, (row, content) in zip("cdef", rows.items())}
    machine = {"machine": {"cpu": "a cpu", "cores": 2}, "commit": "a" * 40}
    (folder / name).write_text(json.dumps(machine | {section: {"about": about, "rows": rows}}))


def test_figures_are_filled_between_their_marks(tmp_path):
    """Each section by its own marks; what has no file, and the text around, stays."""
    marks = "\n".join(f"<!-- figures: {name}begin -->\nold\n<!-- figures: {name}end -->" for name in figures.SECTIONS)
    text = f"before\n{marks}\nafter\n"
    assert figures.fill(text, tmp_path) == text
    check = {"worst_units": 1.0, "off_simulated": 1e-6, "off_reference": 0.0}
    row = {"width": 4, "bits_per_weight": 4.06, "quality": {"perplexity": 1516513.25}, "check": check}
    full = {"quality": {"perplexity": 41.62}, "width": 32}
    written(tmp_path, "accuracy.json", "language", {"model": "m", "text": "t"},
            {"full precision": full, "minmax-w4a4": row, "new-a4": row, "new-a16": row | {"width": 16}})  # fmt: skip
    filled = figures.fill(text, tmp_path)
    assert filled.startswith("before\n<!-- figures: begin -->\nold\n<!-- figures: end -->\n")
    assert (
        "| MinMax FP4 | 4.06 | 1,516,513 | – | – |" in filled and "| new | 4.06 | 1,516,513 | – | 1,516,513 |" in filled
    )
    assert "41.6" in filled and "commit cccccccccc, dddddddddd, " in filled and filled.endswith("\nafter\n")
    assert filled.count("old") == len(figures.SECTIONS) - 1 and figures.fill(filled, tmp_path) == filled
    scores = {"scores": {"boolq": {"acc": 0.5, "stderr": 0.05}}, "average": [0.5, 0.05]}
    written(tmp_path, "zero_shot.json", "zero_shot", {"model": "m", "limit": 9, "seed": 1, "lm_eval": "0"},
            {"full precision": scores, "llm-fp4": scores | {"loss": [0.02, 0.01]}})  # fmt: skip
    about = {"model": "m", "layers": ["a"], "held_out": 5, "default": "d"}
    written(tmp_path, "ablations.json", "ablations", about, {"grid: gamma": {"ratio": 1.1, "least": 1, "largest": 2}})
    filled = figures.fill(filled, tmp_path)
    assert "| llm-fp4 | 50.0 ± 5.0 | 50.0 ± 5.0 | -2.0 ± 1.0 |" in filled and "| grid | gamma | 1.100 |" in filled
    assert filled.count("old") == 1
