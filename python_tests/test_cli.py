"""Every command on a small random LLaMA: JSON, exit codes, and bad input refused before anything is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmfp4_kernels import cli, commands, formats
from llmfp4_kernels.quantizer import pipeline

transformers = pytest.importorskip("transformers")
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 12
LINEARS = 14  # 2 layers of q, k, v, o, gate, up, down


def byte_tokenizer():
    """One token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense model in dense/, text.txt, and the llm-fp4 model that the command line made of them in q/."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "dense")
    byte_tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    assert cli.main(quantize_arguments(folder, folder / "q")) == 0
    return folder


def quantize_arguments(folder, out, *more):
    return ["quantize", str(folder / "dense"), "--out", str(out), "--calibration", str(folder / "text.txt"), *more]


def run(capsys, *argv) -> tuple[int, dict, str]:
    """(exit code, JSON of stdout, stderr) of a command with --json."""
    capsys.readouterr()
    code = cli.main([*map(str, argv), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


def refused(capsys, *argv) -> str:
    """The sentence with which a command refuses, which is the same on stderr and in the JSON."""
    code, result, stderr = run(capsys, *argv)
    assert code == 2 and set(result) == {"error"}
    assert stderr.splitlines()[-1] == f"error: {result['error']}" and "Traceback" not in stderr
    return result["error"]


def test_quantize_reports_every_layer(folder, tmp_path, capsys):
    code, result, _ = run(capsys, *quantize_arguments(folder, tmp_path / "q", "--tokens", "300"))
    assert code == 0 and result["calibration_tokens"] == 300
    assert len(result["layers"]) == LINEARS and {row["recipe"] for row in result["layers"]} == {"llm-fp4"}
    assert {row["name"] for row in result["skipped"]} >= {"lm_head", "model.embed_tokens"}
    assert result["bytes"] == (tmp_path / "q" / "model.safetensors").stat().st_size
    assert [entry.name for entry in tmp_path.iterdir()] == ["q"]


def test_lm_head_embeddings_and_globs(folder, tmp_path, capsys):
    arguments = quantize_arguments(folder, tmp_path / "q", "--recipe", "llm-fp4-a16", "--lm-head", "--embeddings")
    code, result, _ = run(capsys, *arguments, "--exclude", "*.mlp.*")
    names = {row["name"] for row in result["layers"]}
    assert code == 0 and "lm_head" in names and not any("mlp" in name for name in names)
    code, result, _ = run(capsys, "inspect", tmp_path / "q")
    assert code == 0 and result["parameters"]["dense"] == 5 * 32 + 2 * 3 * 32 * 48  # norms and the MLPs
    arguments = quantize_arguments(folder, tmp_path / "some", "--include", "*.q_proj", "--include", "*.o_proj")
    code, result, _ = run(capsys, *arguments)
    assert code == 0 and len(result["layers"]) == 4


def test_override_gives_some_layers_another_recipe(folder, tmp_path, capsys):
    arguments = quantize_arguments(folder, tmp_path / "q", "--override", "*.q_proj=nvfp4", "--tokens", "200")
    code, result, _ = run(capsys, *arguments)
    recipes = {row["name"].rsplit(".", 1)[-1]: row["recipe"] for row in result["layers"]}
    assert code == 0 and recipes["q_proj"] == "nvfp4" and recipes["k_proj"] == "llm-fp4"
    for wrong, message in (("q_proj", "GLOB=RECIPE"), ("q_proj=fp5", "fp5"), ("=nvfp4", "GLOB=RECIPE")):
        out = tmp_path / "refused"
        assert message in refused(capsys, *quantize_arguments(folder, out, "--override", wrong))
        assert not out.exists()


def test_a_quantized_model_is_not_quantized_again(folder, tmp_path, capsys):
    arguments = ("quantize", folder / "q", "--out", tmp_path / "again", "--recipe", "mxfp4")
    assert "is quantized already" in refused(capsys, *arguments)
    arguments = ("eval", folder / "q", "--text", folder / "text.txt", "--against", folder / "q")
    assert "is quantized already" in refused(capsys, *arguments)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("kind", ["dense", "q"])
def test_a_model_without_a_tokenizer(kind, folder, tmp_path, capsys):
    copied = tmp_path / kind
    shutil.copytree(folder / kind, copied, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    if kind == "dense":
        commands = [("quantize", copied, "--out", tmp_path / "out", "--recipe", "mxfp4")]
    else:
        commands = [("generate", copied, "--prompt", "a"), ("eval", copied, "--text", folder / "text.txt")]
    for arguments in commands:
        said = refused(capsys, *arguments)
        assert said.startswith(f"{copied} has no tokenizer beside its model") and "\n" not in said
    (copied / "tokenizer.json").write_text("{")
    for arguments in commands:
        assert "\n" not in refused(capsys, *arguments)


def test_an_unknown_forced_kernel_explains_nothing(capsys, monkeypatch):
    monkeypatch.setenv("LLMFP4_KERNEL", "foo")
    said = refused(capsys, "explain", "--m", 1, "--n", 8, "--k", 8)
    assert said.startswith("LLMFP4_KERNEL=foo names no kernel: known are cpu.amx")


def test_globs_that_match_nothing(folder, tmp_path, capsys):
    for option in ("--include", "--exclude"):
        arguments = quantize_arguments(folder, tmp_path / "q", option, "*.mpl.*")
        assert f"{option[2:]} '*.mpl.*' matches none" in refused(capsys, *arguments)
    assert not (tmp_path / "q").exists()


def test_a_recipe_without_calibration_needs_no_text(folder, tmp_path, capsys):
    code, result, _ = run(capsys, "quantize", folder / "dense", "--out", tmp_path / "q", "--recipe", "mxfp4")
    assert code == 0 and result["calibration_tokens"] == 0


def test_an_earlier_output_is_replaced(folder, tmp_path, capsys):
    shutil.copytree(folder / "q", tmp_path / "q")
    code, _, _ = run(capsys, *quantize_arguments(folder, tmp_path / "q", "--recipe", "nvfp4"))
    assert code == 0
    _, result, _ = run(capsys, "inspect", tmp_path / "q")
    assert {row["recipe"] for row in result["layers"]} == {"nvfp4"}


def test_an_interrupted_run_resumes(folder, tmp_path, capsys, monkeypatch):
    done, quantize_one = [], pipeline._quantize_one

    def stop_after_five(name, *rest):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(name)
        return quantize_one(name, *rest)

    monkeypatch.setattr(pipeline, "_quantize_one", stop_after_five)
    assert cli.main(quantize_arguments(folder, tmp_path / "q")) == 130
    assert not (tmp_path / "q").exists()
    done.append("go on")
    assert cli.main(quantize_arguments(folder, tmp_path / "q")) == 0
    assert len(done) == LINEARS + 1 and len(set(done)) == LINEARS + 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["q"]
    resumed, whole = (load_file(path / "model.safetensors") for path in (tmp_path / "q", folder / "q"))
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_eval_puts_the_dense_model_beside(folder, capsys):
    text = folder / "text.txt"
    code, result, _ = run(capsys, "eval", folder / "q", "--text", text, "--tokens", 600, "--against", folder / "dense")
    assert code == 0 and result["tokens"] == 600
    assert 1 < result["ppl"] < 2000 and 1 < result["against"]["ppl"] < 2000
    assert result["ppl"] != result["against"]["ppl"]


def test_generate_continues_the_prompt(folder, capsys):
    code, result, _ = run(capsys, "generate", folder / "q", "--prompt", "It was", "--tokens", 5)
    assert code == 0 and 1 <= result["tokens"] <= 5 and result["tokens_per_s"] > 0 and isinstance(result["text"], str)


def test_inspect_a_model_and_a_tensor(folder, tmp_path, capsys):
    code, result, _ = run(capsys, "inspect", folder / "q")
    assert code == 0 and len(result["layers"]) == LINEARS
    packed = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
    assert result["parameters"] == {"fp4": packed, "dense": 256 * 32 + 5 * 32}
    assert result["coverage"] == pytest.approx(packed / (packed + 256 * 32 + 5 * 32))
    for row in result["layers"]:
        assert row["bytes"] == row["n"] * row["k"] // 2 + 4 * row["n"] + row["k"] + 4  # codes, scales, shift, x_scale
    packed = pipeline.quantize_linear(torch.randn(8, 64), "nvfp4")
    packed.save(tmp_path / "one.safetensors")
    code, result, _ = run(capsys, "inspect", tmp_path / "one.safetensors")
    (row,) = result["layers"]
    assert code == 0 and (row["n"], row["k"], row["scale"], row["group_size"]) == (8, 64, "e4m3", 16)
    assert row["bits_per_weight"] == packed.bits_per_weight


def test_a_folders_linear_layers_are_what_tune_measures(folder):
    shapes = [(layer.out_features, layer.in_features) for layer in commands.linear_layers(folder / "q")]
    assert len(shapes) == LINEARS and set(shapes) == {(32, 32), (16, 32), (48, 32), (32, 48)}


def test_info_names_every_kernel(capsys):
    from llmfp4_kernels import registry

    code, result, _ = run(capsys, "info")
    assert code == 0 and [row["name"] for row in result["kernels"]] == [kernel.name for kernel in registry.table()]
    assert all((row["takes"] == 0) == bool(row["refusal"]) for row in result["kernels"])
    assert result["versions"]["torch"] == torch.__version__


def test_info_says_why_the_native_module_is_missing(capsys, monkeypatch):
    from llmfp4_kernels import native

    monkeypatch.setattr(native, "problem_with_module", lambda: "it was never compiled")
    code, result, _ = run(capsys, "info")
    assert code == 0 and result["native"] == {"built": False, "reason": "it was never compiled"}
    assert all("never compiled" in row["refusal"] for row in result["kernels"] if row["name"].startswith("cpu."))
    cli.main(["info"])
    assert "not built: it was never compiled" in capsys.readouterr().out


@pytest.mark.parametrize("lacking", ["built without nvcc", None])
def test_info_says_what_a_gpu_row_lacks(lacking, capsys, monkeypatch):
    from llmfp4_kernels import native
    from llmfp4_kernels.backends import cuda

    monkeypatch.setattr(native, "problem_with_cuda", lambda: lacking)
    monkeypatch.setattr(cuda.machine, "capability", lambda index: None)
    _, result, _ = run(capsys, "info")
    rows = {row["name"]: row["refusal"] for row in result["kernels"]}
    expected = lacking or "there is no GPU that torch can use"
    assert rows["cuda.gemv"] == rows["cuda.sm90"] == rows["cuda.sm80"] == expected
    assert all("tensors are on" not in (why or "") for why in rows.values())


def test_explain_walks_the_registry(capsys):
    from llmfp4_kernels import registry
    from llmfp4_kernels.problem import Problem

    for m, recipe in ((1, "llm-fp4"), (512, "llm-fp4"), (3, "nvfp4")):
        code, result, _ = run(capsys, "explain", "--m", m, "--n", 96, "--k", 64, "--recipe", recipe)
        record = formats.recipe(recipe)
        activation = formats.E2M1 if record.activation_elements else None
        shift = record.preshift and activation is not None
        problem = Problem(m, 96, 64, formats.E2M1, activation, record.group_scale, record.group_size, shift)
        assert code == 0 and result["runs"] == registry.choose(problem).name
        assert [(step["kernel"], step["refusal"]) for step in result["walk"]] == registry.explain(problem)
    code, result, _ = run(capsys, "explain", "--m", 1, "--n", 8, "--k", 8, "--activation", "e3m0")
    assert code == 0 and result["activation"] == "e3m0"


@pytest.mark.parametrize("argv", [
    ["inspect", "{q}"], ["info"], ["explain", "--m", "1", "--n", "8", "--k", "8"],
    ["eval", "{q}", "--text", "{text}"], ["generate", "{q}", "--prompt", "a", "--tokens", "2"],
])  # fmt: skip
def test_every_command_prints_text_without_json(folder, capsys, argv):
    names = {"q": folder / "q", "text": folder / "text.txt"}
    assert cli.main([word.format(**names) for word in argv]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() and "error" not in captured.err


def test_bad_quantize_input_is_refused_and_nothing_written(folder, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n" * 9)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    (tmp_path / "broken.gguf").write_bytes(b"GGU")
    before = sorted(tmp_path.rglob("*"))
    dense, text, out = folder / "dense", folder / "text.txt", tmp_path / "out"
    for model, calibration, where, more, expected in [
        (dense, tmp_path / "empty.txt", out, [], "(0 bytes) holds 0 tokens"),
        (dense, tmp_path / "blank.txt", out, [], "(18 bytes) holds 0 tokens"),
        (dense, tmp_path / "none.txt", out, [], "there is no text file"),
        (tmp_path / "none", text, out, [], "none"),
        (tmp_path / "broken.gguf", text, out, [], "(3 bytes)"),
        (dense, text, out, ["--recipe", "llm-fp5"], "unknown recipe 'llm-fp5'"),
        (dense, text, out, ["--tokens", "0"], "'0' is no whole number of at least 1"),
        (dense, text, out, ["--include", "nothing*"], "'nothing*' matches none of"),
        (dense, text, tmp_path / "full", [], "holds 1 entries"),
        (dense, text, tmp_path / "file", [], "file of 4 bytes"),
    ]:
        message = refused(capsys, "quantize", model, "--out", where, "--calibration", calibration, *more)
        assert expected in message, message
        assert sorted(tmp_path.rglob("*")) == before
    assert "needs --calibration" in refused(capsys, "quantize", dense, "--out", out)


def test_weights_with_nan_are_refused(folder, tmp_path, capsys):
    shutil.copytree(folder / "dense", tmp_path / "dense")
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    (tmp_path / "text.txt").write_text(TEXT)
    message = refused(capsys, *quantize_arguments(tmp_path, tmp_path / "q"))
    assert "up_proj" in message and "1 value" in message
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense", "text.txt"]


@pytest.mark.parametrize("command", ["inspect", "eval", "generate"])
def test_bad_models_are_refused(folder, tmp_path, capsys, command):
    options = {"inspect": [], "eval": ["--text", folder / "text.txt"], "generate": ["--prompt", "a"]}[command]
    assert "missing" in refused(capsys, command, tmp_path / "missing", *options)
    assert "llmfp4" in refused(capsys, command, folder / "dense", *options)
    weights = shutil.copytree(folder / "q", tmp_path / "q") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert f"{len(whole) // 2} bytes" in refused(capsys, command, tmp_path / "q", *options)
    save_file({"a": torch.zeros(2)}, weights)
    assert str(weights) in refused(capsys, command, tmp_path / "q", *options)
    weights.unlink()
    assert str(weights) in refused(capsys, command, tmp_path / "q", *options)


def test_bad_tensor_files_are_refused(tmp_path, capsys):
    path = tmp_path / "one.safetensors"
    pipeline.quantize_linear(torch.randn(8, 64), "nvfp4").save(path)
    whole = path.read_bytes()
    for size in (0, 7, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert f"({size} bytes)" in refused(capsys, "inspect", path)
    save_file({"weight": torch.zeros(2)}, path)
    assert "is not of format" in refused(capsys, "inspect", path)
    assert "there is no file" in refused(capsys, "inspect", tmp_path / "none.safetensors")


def test_bad_options_are_refused(folder, capsys):
    sizes = ["--m", "1", "--n", "8", "--k", "8"]
    assert "unknown recipe" in refused(capsys, "explain", *sizes, "--recipe", "fp3")
    assert "'0' is no whole number of at least 1" in refused(capsys, "explain", "--m", "1", "--n", "0", "--k", "8")
    assert "float64" in refused(capsys, "explain", *sizes, "--dtype", "float64")
    assert "e5m2" in refused(capsys, "explain", *sizes, "--element", "e5m2")
    assert "no activation element" in refused(
        capsys, "explain", *sizes, "--recipe", "llm-fp4-a16", "--activation", "e2m1"
    )
    assert "holds no text" in refused(capsys, "generate", folder / "q", "--prompt", " ")
    assert "--text" in refused(capsys, "eval", folder / "q")
    assert "invalid choice" in refused(capsys, "quantise")
    assert "COMMAND" in refused(capsys)


def test_the_file_holds_packed_codes(folder):
    """Two weights a byte, and no full-precision copy."""
    weights = load_file(folder / "q" / "model.safetensors")
    codes = weights["model.layers.0.self_attn.q_proj.codes"]
    assert codes.dtype == torch.uint8 and list(codes.shape) == [32, 16] and codes.unique().numel() > 16
    assert "model.layers.0.self_attn.q_proj.weight" not in weights
