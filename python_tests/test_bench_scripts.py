"""Benchmarks of quantization and models run to the end; pictures and tables come from their lines."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from llmfp4_kernels.errors import BadInput, NoKernel

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
arguments, bench, figures, ggml, gemm, markdown, plot, quantize, roofline, tables_speed = map(
    importlib.import_module,
    ("arguments", "bench", "figures", "ggml", "gemm", "markdown", "plot", "quantize", "roofline", "tables_speed"),
)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def measured(tmp_path, threads, monkeypatch) -> Path:
    """A folder with gemm.jsonl of one small shape."""
    monkeypatch.setattr(roofline, "_best", lambda call: 1.0)
    monkeypatch.setattr(bench, "MOST_COPIES", 2)
    rivals = ["torch-bf16", "onednn-int8", "onednn-int8-product", "llama.cpp-mxfp4-cpu"]
    gemm.main(["--shapes", "64x64", "--m", "1", "20", "--threads", "1", "--rounds", "3", "--budget", "0", "--schemes",
               "minmax-w4a4", "mxfp4", "--rivals", *rivals, "--out", str(tmp_path / "gemm.jsonl")])  # fmt: skip
    return tmp_path


def test_tables_and_pictures_come_from_the_lines(measured):
    pytest.importorskip("matplotlib")
    rows = lines(measured / "gemm.jsonl")
    ours, everyone = tables_speed.gemm_tables(rows)
    assert len(ours) == 4 + 4 and len(everyone) == 4 + len({row["name"] for row in rows})
    assert all(any(line.startswith(f"| {row['name']} |") for line in everyone) for row in rows)
    filled = figures.fill("<!-- figures: begin -->\n<!-- figures: end -->", measured)
    assert "| oneDNN int8 (packed) | 0.0" in filled and "commit" in filled
    picture = plot.draw((64, 64, 1), rows, measured)
    assert picture.name == "gemm-64x64-1t.png" and picture.read_bytes().startswith(b"\x89PNG")


ROW = {"name": "a", "m": 1, "n": 64, "k": 64, "threads": 1, "roofline_seconds": 1.0}


@pytest.mark.parametrize(("content", "shapes", "sentence"), [
    (None, [], "there is no file"),
    (b"", [], "has no rows of gemm.py --out"),
    (b"{}\n{", [], "line 2 of .* is no JSON object"),
    (b"3", [], "line 1 of .* is no JSON object"),
    (b"\xff", [], "cannot be read"),
    (json.dumps(ROW).encode(), [], "has no rows of gemm.py --out"),  # of an older version, say
    (json.dumps(ROW | dict.fromkeys(plot.NEEDED - ROW.keys(), 1)).encode(), ["64x65"], "has no rows of 64x65"),
])  # fmt: skip
def test_a_file_that_cannot_be_drawn_is_a_sentence(content, shapes, sentence, tmp_path, capsys):
    if content is not None:
        (tmp_path / "gemm.jsonl").write_bytes(content)
    assert plot.main([str(tmp_path / "gemm.jsonl"), *shapes]) == 2
    said = capsys.readouterr().err
    assert re.match(f"error: .*{sentence}", said) and said.count("\n") == 1


def test_plot_explains_its_options(capsys):
    for options, code, sentence in ((["--help"], 0, "JSON lines of gemm.py"), (["a", "64"], 2, "is no shape NxK")):
        with pytest.raises(SystemExit) as ended:
            plot.main(options)
        said = capsys.readouterr()
        assert ended.value.code == code and sentence in said.out + said.err


def test_markdown_tables():
    assert markdown.table("It is:", ["", "a b", 3], [["x", "–", 1.5], ["y", "", 2]]) == [
        "It is:", "", "| | a b | 3 |", "|---|---|---|", "| x | – | 1.5 |", "| y | | 2 |",
    ]  # fmt: skip


def row(name: str, times: list[float], m: int = 1) -> dict:
    return {"name": name, "m": m, "times": times, "seconds": sorted(times)[len(times) // 2]}


def test_ours_are_compared_with_the_fastest_of_a_kind():
    """The product without its quantization is no rival, and a row without times has no pairs."""
    times = {"packed": [4.0, 8.0, 4.0], "_int_mm": [5.0, 10.0, 5.0], "packed, product only": [1.0, 1.0, 1.0]}
    rows = [row(f"oneDNN int8 ({kind})", each) for kind, each in times.items()]
    rows.append(row("llama.cpp Q4_0 [CPU]", [3.0, 3.0, 3.0], m=2))
    ours, among = row("llm-fp4", [2.0, 4.0, 2.0]), tables_speed.REFERENCES
    assert tables_speed.faster(ours, rows, among["oneDNN int8"]) == 2.0
    assert tables_speed.faster(ours, rows, among["llama.cpp"]) is None
    assert tables_speed.faster({"m": 1}, rows, among["oneDNN int8"]) is None
    shape = {"n": 1, "k": 2, "threads": 1}
    newest = tables_speed.problems([rows[0] | shape, rows[0] | shape | {"seconds": 9.0}])
    assert [a["seconds"] for a in newest[1, 2, 1]] == [9.0]


def test_quantizers_are_checked_and_recorded(tmp_path, threads):
    out = tmp_path / "new" / "q.jsonl"
    quantize.main(["--shapes", "32x256", "--threads", "1", "--recipes", "mxfp4", "minmax-w4a4", "--tokens", "8",
                   "--rounds", "2", "--out", str(out)])  # fmt: skip
    rows = lines(out)
    assert {"mxfp4", "minmax-w4a4", "torch int4 g64"} <= {row["name"] for row in rows}
    assert all(0.05 < row["error"] < 0.2 and row["mega_weights"] > 0 and "commit" in row for row in rows)
    assert len(tables_speed.quantize_table(rows)) == 4 + len(rows)
    with pytest.raises(NoKernel, match=r"off by 1.00, 0.25 is too much"):
        quantize.Near("none", torch.zeros_like)(torch.ones(2, 2), torch.ones(2, 2))


TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=96)  # fmt: skip


def test_models_are_timed_with_their_layers_packed(tmp_path, threads, monkeypatch):
    pytest.importorskip("transformers")
    model, out = importlib.import_module("model"), tmp_path / "m.jsonl"
    monkeypatch.setitem(model.SHAPES, "tiny", TINY)
    packed = model.packed_model(model.dense_model("tiny"), "mxfp4", (1, 6))
    assert sum(isinstance(part, model.FP4Linear) for part in packed.modules()) == 7
    assert type(packed.lm_head) is torch.nn.Linear
    model.main(["--models", "tiny", "--recipes", "minmax-w4a4", "--threads", "1", "--prefill", "6", "--prompt", "3",
                "--decode", "2", "--repeats", "1", "--out", str(out)])  # fmt: skip
    rows = lines(out)
    assert [row["name"] for row in rows] == ["fp32", "bf16", "torch-int4", "minmax-w4a4"]
    assert len(tables_speed.model_table(rows)) == 4 + 4


def test_models_with_a_wrong_layer_are_not_timed(threads, monkeypatch, capsys):
    pytest.importorskip("transformers")
    model = importlib.import_module("model")
    monkeypatch.setitem(model.SHAPES, "tiny", TINY)
    right = model.FP4Linear.forward
    monkeypatch.setattr(model.FP4Linear, "forward", lambda layer, x: right(layer, x) * (1 if len(x) == 1 else 1.01))
    options = ["--models", "tiny", "--prefill", "6", "--prompt", "3", "--decode", "2", "--threads", "1"]
    for recipe in ("minmax-w4a4", "mxfp4"):
        assert model.main([*options, "--recipes", recipe]) == 2
        said = capsys.readouterr()
        assert f"error: refusing to time {recipe}" in said.err and "tokens/s" not in said.out


def test_a_prompt_is_a_part_of_the_prefill(capsys):
    with pytest.raises(SystemExit):
        importlib.import_module("model").main(["--prefill", "8", "--prompt", "9"])
    assert "--prompt: 9 tokens are no part of --prefill's 8" in capsys.readouterr().err


def test_a_forced_kernel_runs_at_every_m(tmp_path, threads, monkeypatch):
    """At the number of tokens, too, that errors are taken on; what refuses is left out, what is wrong a sentence."""
    monkeypatch.setattr(roofline, "_best", lambda call: 1.0)
    monkeypatch.setattr(bench, "MOST_COPIES", 2)
    options = ["--shapes", "64x128", "--threads", "1", "--rounds", "2", "--budget", "0", "--rivals", "--schemes",
               "minmax-w4a4", "--kernels", "cpu.scalar", "cuda.gemv", "--m"]  # fmt: skip
    assert gemm.main([*options, "63", "64", "--out", str(tmp_path / "a.jsonl")]) == 0
    rows = [row for row in lines(tmp_path / "a.jsonl") if row["name"] != "torch fp32"]
    assert [(row["m"], row["kernel"]) for row in rows] == [(63, "cpu.scalar"), (64, "cpu.scalar")]


def test_a_wrong_kernel_ends_in_a_sentence(threads, monkeypatch, capsys):
    monkeypatch.setattr(bench, "MOST_COPIES", 2)
    right = importlib.import_module("llmfp4_kernels.reference").gemm
    monkeypatch.setattr(gemm.fp4.__globals__["reference"], "gemm", lambda *args: right(*args) * 2)
    options = ["--shapes", "64x128", "--threads", "1", "--m", "1", "--rounds", "2", "--rivals", "--schemes"]
    assert gemm.main([*options, "minmax-w4a4"]) == 2
    assert capsys.readouterr().err.startswith("error: refusing to time minmax-w4a4, which is wrong at m = 1")


def test_times_of_two_runs_are_no_pairs():
    """Of each m the last run counts, and commits are all named."""
    of = lambda day: {"machine": {"cpu": "x", "cores": 2, "date": day}, "commit": f"{day}000000000"}  # noqa: E731
    old = [ROW | of("a") | {"name": name, "m": m, "ratio": 1.0} for name in ("torch fp32", "b") for m in (1, 8)]
    new = ROW | of("b") | {"name": "torch fp32", "m": 1, "ratio": 1.0}
    found = tables_speed.problems([*old, new])[64, 64, 1]
    assert [(row["name"], row["m"], row["commit"][0]) for row in found] == [
        ("torch fp32", 8, "a"), ("b", 8, "a"), ("torch fp32", 1, "b")]  # fmt: skip
    assert "commit a000000000, b000000000" in tables_speed.rivals_table((64, 64, 1), found)[0]


def test_figures_take_no_options_and_say_what_is_damaged(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        figures.main(["--nonsense"])
    (tmp_path / "gemm.jsonl").write_text("{")
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    before = (figures.ROOT / "README.md").read_bytes()
    assert figures.main([]) == 2 and "is no JSON object" in capsys.readouterr().err
    assert (figures.ROOT / "README.md").read_bytes() == before


def test_every_file_of_products_has_its_page(tmp_path, monkeypatch):
    row = ROW | {"machine": {"cpu": "x", "cores": 2}, "commit": "c", "name": "torch fp32", "ratio": 1.0}
    (tmp_path / "README.md").write_text("a\n<!-- figures: begin -->\n<!-- figures: end -->\nb")
    for name, n in (("gemm.jsonl", 64), ("gemm-other.jsonl", 96)):
        (tmp_path / name).write_text(json.dumps(row | {"n": n}))
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert figures.main([]) == 0
    for name, shape in (("gemm", "n = 64"), ("gemm-other", "n = 96")):
        page = (tmp_path / f"{name.replace('gemm', 'products')}.md").read_text()
        assert f"(`{name}.jsonl`" in page and page.count(shape) == page.count("n = ") == 1
    readme = (tmp_path / "README.md").read_text()
    assert "n = 64" in readme and "n = 96" not in readme and readme.startswith("a\n") and readme.endswith("\nb")


def test_a_missing_ggml_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv(ggml.FOLDER, str(tmp_path))
    with pytest.raises(NoKernel, match=r"libggml-base.so is not there: run benchmarks/build_ggml.sh"):
        ggml.library.__wrapped__()
    monkeypatch.delenv(ggml.FOLDER)
    monkeypatch.setattr(ggml, "ROOT", tmp_path)
    package = tmp_path / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('is not imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert ggml.folder() == package / "lib"


@pytest.mark.parametrize("option, wrong, sentence", [
    ("--rounds", "1", "'1' is no whole number of at least 2"),
    ("--m", "0", "'0' is no whole number of at least 1"),
    ("--threads", "-1", "'-1' is no whole number"),
    ("--budget", "nan", "'nan' is no number of seconds"),
    ("--shapes", "12", "'12' is no shape NxK"),
    ("--shapes", "12x0", "'0' is no whole number"),
    ("--schemes", "llm-fp4:bf17", "ends in none of :fp32, :bf16, :fp16"),
    ("--schemes", "fp4", "unknown recipe 'fp4'"),
    ("--shapes", "1000000x1000000", "'1000000x1000000' in fp32 is 3725 GiB, twice; this machine has"),
    ("--out", "/proc/none/gemm.jsonl", "cannot be written"),
    ("--out", "/dev/full", "cannot be written: it is no file"),
    ("--kernels", "nosuch", "'nosuch' names no kernel: known are cpu.amx"),
])  # fmt: skip
def test_a_wrong_option_is_a_sentence(option, wrong, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        gemm.main([option, wrong])
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize("script", ["ablations", "accuracy", "zero_shot"])
@pytest.mark.parametrize("path", ["/proc/none.json", "/dev/full", "/proc"])
def test_a_file_that_cannot_be_put_in_its_place_is_known_before_any_work(script, path, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main(["--out", path])
    assert ended.value.code == 2 and f"{path!r} cannot be written" in capsys.readouterr().err


def test_a_file_that_is_replaced_is_not_touched_before(tmp_path):
    assert arguments.whole_file(str(tmp_path / "new" / "a.json")).parent.is_dir()
    assert list((tmp_path / "new").iterdir()) == []


def test_int4_is_left_out_where_its_groups_do_not_divide_k():
    with pytest.raises(BadInput, match="groups of 64 do not divide k = 32"):
        quantize.torch_int4(32)
