"""The GPU benchmark as far as it runs without a GPU: its arguments, its checks, its rows, its report."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from cases import random_x

from llmfp4_kernels import reference
from llmfp4_kernels.errors import BadFile, NoKernel

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
adapters, bench, gpu, gpu_check, gpu_report, golden, operands, ours, rivals_cuda = map(
    importlib.import_module,
    ("adapters", "bench", "gpu", "gpu_check", "gpu_report", "golden", "operands", "ours", "rivals_cuda"),
)
OPTIONS = dict(m=[1, 40], schemes=[], rivals=[], rounds=2, budget=0.0, limit=9.0)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(autouse=True)
def two_copies(monkeypatch):
    monkeypatch.setattr(bench, "MOST_COPIES", 2)


def on_cpu(weight, recipe, dtype="fp32"):
    """A contender of gpu.py with its codes and checks, on the CPU."""
    made = ours._contender(weight, recipe, ours.random_codes(weight, recipe), dtype, None, False, "cpu", ours.SUMS)
    made.check = gpu.SomeTokens(made.check)
    return made


@no_gpu
@pytest.mark.parametrize("script", [gpu, golden])
def test_without_a_gpu_it_says_so(script):
    with pytest.raises(SystemExit, match="on a GPU: there is none that torch can use"):
        script.main([])


@pytest.mark.parametrize("arguments, benchmarks", [([], 1), (["--no-benchmarks"], 0)])
def test_gpu_check_runs_everything_in_its_time(arguments, benchmarks, monkeypatch):
    ran = []
    for name in ("install_wheels", "build", "sanitize"):
        monkeypatch.setattr(gpu_check, name, lambda environment, name=name: ran.append(name))
    monkeypatch.setattr(gpu_check, "run", lambda *command, env: ran.append([str(part) for part in command[1:]]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "STARTED", gpu_check.time.perf_counter() - 100)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    gpu_check.main()
    # 8 minutes, less 100 s that have passed, less 30
    models = [["benchmarks/llama.py", "--limit", "75"]] if importlib.util.find_spec("transformers") else []
    expected = [*models, ["benchmarks/gpu.py", "--limit", "350"]] * benchmarks
    tests = ["-m", "pytest", "-q", "-x", "python_tests/test_gpu.py", "python_tests/test_gpu_triton.py"]
    assert ran == ["install_wheels", "build", tests, "sanitize", ["benchmarks/golden.py"], *expected]
    assert all((gpu_check.ROOT / command[0]).is_file() for command in [["benchmarks/golden.py"], *expected])


@pytest.mark.parametrize(
    "arguments, sentence",
    [("--rounds 1", "of at least 2"), ("--m 0 4", "of at least 1"), ("--rivals cudnn", "invalid choice"),
     ("--shapes 4096", "is no shape NxK"), ("--schemes fp4@cuda.gemv", "unknown recipe")],
)  # fmt: skip
def test_bad_arguments_are_refused(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        gpu.main(arguments.split())
    assert sentence in capsys.readouterr().err


@no_gpu
def test_rivals_without_a_gpu_are_left_out_with_a_sentence(capsys):
    made, names = gpu.contenders(operands.Weight(96, 256), [], list(adapters.on_gpu()))
    assert made == [] and names == set()
    said = capsys.readouterr().out
    assert all(f"{name} is left out: " in said for name in adapters.on_gpu())


@pytest.mark.parametrize("scheme", [s for s in gpu.SCHEMES if "@" not in s])
def test_random_codes_of_every_scheme_are_products_that_the_check_knows(scheme):
    recipe, _, dtype = scheme.partition(":")
    weight = operands.Weight(96, 256)
    probe, packed = ours.random_codes(weight, recipe)
    assert packed.shape == (96, 256) and torch.equal(packed.row_scale, probe.row_scale[weight.rows])
    contender = on_cpu(weight, recipe, dtype or "fp32")
    for m in (1, 40, 70):
        x = random_x(m, 256)
        (row,) = bench.compare([contender], x, rounds=2, budget=0)
        assert row["kernel"].startswith("cpu.")
    y = contender.calls[0](x.to(contender.x_dtype)).float()
    torch.testing.assert_close(y, reference.gemm(x.to(contender.x_dtype), packed).float(), rtol=1e-2, atol=0.5)


@pytest.mark.parametrize("token", [0, 69])
def test_a_wrong_token_is_not_timed(token):
    contender, x = on_cpu(operands.Weight(96, 256), "llm-fp4"), random_x(70, 256)
    right = contender.calls[0]

    def wrong(x):
        y = right(x)
        y[token, 95] += 1e-3
        return y

    contender.calls = [wrong]
    with pytest.raises(NoKernel, match="refusing to time llm-fp4"):
        bench.compare([contender], x, rounds=2, budget=0)


def run_measure(monkeypatch, contenders, names, out_of_time=lambda: False):
    """(what is wrong with ours, rows) of gpu.measure with these contenders."""
    rows, options = [], type("Options", (), OPTIONS)
    monkeypatch.setattr(gpu, "contenders", lambda weight, schemes, rivals: (contenders, names))
    return gpu.measure(96, 256, options, rows.append, 1e9, out_of_time), rows


def test_rows_hold_what_the_report_needs(monkeypatch):
    weight = operands.Weight(96, 256)
    failures, rows = run_measure(
        monkeypatch, [on_cpu(weight, "llm-fp4-a16", "bf16"), on_cpu(weight, "llm-fp4")], {"llm-fp4"}
    )
    assert failures == [] and [(row["name"], row["m"]) for row in rows] == [
        (name, m) for m in (1, 40) for name in ("llm-fp4-a16 bf16", "llm-fp4")]  # fmt: skip
    last = rows[-1]
    assert last["ours"] and not rows[0]["ours"]
    assert last["bytes"] == last["weight_bytes"] + 40 * (256 + 96) * 4
    assert last["floor"] == pytest.approx(last["bytes"] / 1e9 / last["seconds"])


def test_what_fails_is_left_out_and_ours_fails_the_run(monkeypatch, capsys):
    weight = operands.Weight(96, 256)
    good, rival, wrong, slow = (on_cpu(weight, "llm-fp4-a16") for _ in range(4))
    rival.name, wrong.name, slow.name = "rival", "wrong", "slow"
    rival.calls = [lambda x: 1 / 0]
    wrong.calls = [lambda x: torch.zeros(len(x), 96)]
    slow.kernel = lambda m: "reference"
    failures, rows = run_measure(monkeypatch, [good, rival, wrong, slow], {good.name, "wrong", "slow"})
    assert {row["name"] for row in rows} == {good.name}
    assert len(failures) == 4 and all(f.startswith(("wrong is left out", "slow is left out")) for f in failures)
    assert "rival is left out at m = 1: ZeroDivisionError" in capsys.readouterr().out


def test_nothing_starts_after_the_time_limit(monkeypatch, capsys):
    failures, rows = run_measure(monkeypatch, [], set(), out_of_time=lambda: True)
    assert failures == rows == [] and "m = 40 is left out: 9.0 s have passed" in capsys.readouterr().out


def synthetic_rows():
    """Not measured: round numbers that make the report's cells easy to foretell."""
    common = dict(n=96, k=256, copy_gbps=1.0, gpu="synthetic GPU of a test", commit="0" * 40, spread=0.0, kernel="",
                  machine={"cpu": "none", "cores": 0})  # fmt: skip
    for m in (1, 16):
        for name, seconds, mine in ((gpu_report.BASE, 4e-6 * m, False), ("llm-fp4 bf16", 2e-6 * m, True)):
            yield common | dict(name=name, m=m, seconds=seconds, ours=mine, floor=0.25, bytes=1000 * m)
    yield common | dict(name="cuBLAS int8", m=16, seconds=1e-3, ours=False, floor=0.5, bytes=2000)


def test_the_table_and_the_pictures(tmp_path):
    written = gpu_report.write(list(synthetic_rows()), tmp_path / "gpu.jsonl")
    assert [path.name for path in written] == ["gpu.md", "gpu-96x256.png"]
    text = written[0].read_text()
    assert "| m | 1 | 16 |" in text and "n = 96, k = 256 (synthetic GPU of a test" in text
    assert "| llm-fp4 bf16 | 2.0 (2.00×, 25%) | 32.0 (2.00×, 25%) |" in text
    assert "| cuBLAS int8 | – | 1,000.0 (0.06×, 50%) |" in text
    assert written[1].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BadFile, match="has no rows"):
        gpu_report.write([], tmp_path / "gpu.jsonl")


@pytest.mark.parametrize("kind, worst", [(torch.int8, 1 / 127), (torch.float8_e4m3fn, 32 / 448)], ids=str)
def test_tokens_in_eight_bits(kind, worst):
    x, made = random_x(5, 64), []
    codes, scale = rivals_cuda._rows_to(kind, x)
    error = (codes.float() * scale - x).abs() / x.abs().amax(1, keepdim=True)
    assert codes.dtype == kind and error.max() <= worst / 2
    for product_only, times in ((True, 1), (False, 3)):
        made.clear()
        call = rivals_cuda._PerToken(lambda x: (made.append(x) or x, 2), lambda q, scale: q * scale, product_only)
        assert all(torch.equal(call(x), 2 * x) for _ in range(3)) and len(made) == times
