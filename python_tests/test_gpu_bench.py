"""The GPU benchmark as far as it runs without a GPU: its arguments, its checks, its rows, its report."""

import dataclasses
import importlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from cases import random_x

from llmfp4_kernels import native, reference, registry
from llmfp4_kernels.backends import cuda, cuda_options, triton
from llmfp4_kernels.errors import BadFile, NoKernel
from llmfp4_kernels.formats import RECIPES
from llmfp4_kernels.problem import Problem

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
adapters, bench, gpu, gpu_report, golden, operands, ours, rivals_cuda = map(
    importlib.import_module,
    ("adapters", "bench", "gpu", "gpu_report", "golden", "operands", "ours", "rivals_cuda"),
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


def test_vectors_are_written_even_where_the_gpu_disagrees(monkeypatch, tmp_path):
    """A GPU that makes ones of everything: every form is wrong, and what it made is kept to be looked at."""
    gpu = dict(is_available=True, get_device_capability=(9, 0), get_device_name="none", device_count=0)
    for question, answer in gpu.items():
        monkeypatch.setattr(torch.cuda, question, lambda answer=answer: answer)
    monkeypatch.setattr(golden, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(golden, "library", lambda number, source: source.name)
    monkeypatch.setattr(golden.ctypes, "CDLL", lambda name: name)
    ones = lambda name, inputs, outputs: numpy.ones((len(inputs), outputs, inputs.shape[-1]), numpy.uint32)  # noqa: E731
    monkeypatch.setattr(golden, "on_gpu", lambda library: ones)
    with pytest.raises(SystemExit, match="the GPU disagrees with numpy: mma_s8_k32: .*; wgmma_s8_32: "):
        golden.main(["--out", str(tmp_path / "vectors.npz")])
    stored = numpy.load(tmp_path / "vectors.npz")
    assert {f"{name} out" for name in (*golden.FORMS, *golden.FORMS_SM90)} < set(stored)


def test_vectors_of_other_gpus_lack_wgmma(capsys):
    assert list(golden.kinds((8, 9))) == ["89"] and list(golden.kinds((9, 0))) == ["90", "90a"]
    said = capsys.readouterr().out
    assert said.startswith("left out, this GPU is sm_89: wgmma_s8_32") and "bulk_copies" in said


@pytest.mark.parametrize(
    "arguments, sentence",
    [("--rounds 1", "of at least 2"), ("--m 0 4", "of at least 1"), ("--rivals cudnn", "invalid choice"),
     ("--shapes 4096", "is no shape NxK"), ("--schemes fp4@cuda.gemv", "unknown recipe"),
     ("--schemes mxfp4@cuda.gemw", "'cuda.gemw' names no kernel")],
)  # fmt: skip
def test_bad_arguments_are_refused(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        gpu.main(arguments.split())
    assert sentence in capsys.readouterr().err


@no_gpu
def test_rivals_without_a_gpu_are_left_out_with_a_sentence(capsys):
    failures = []
    made, names = gpu.contenders(operands.Weight(96, 256), [], list(adapters.on_gpu()), failures)
    assert made == failures == [] and names == set()
    said = capsys.readouterr().out
    assert all(f"{name} is left out: " in said for name in adapters.on_gpu())


def test_ours_that_cannot_be_made_fails_the_run_and_not_the_others(monkeypatch):
    weight, failures = operands.Weight(96, 256), []
    made = on_cpu(weight, "llm-fp4")
    monkeypatch.setattr(gpu, "fp4_on_gpu", lambda weight, recipe, dtype, forced: 1 / 0 if forced else made)
    assert gpu.contenders(weight, ["llm-fp4@cuda.sm80", "llm-fp4"], [], failures) == ([made], {made.name})
    assert failures == ["llm-fp4@cuda.sm80 is left out: ZeroDivisionError: division by zero"]


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


def run_measure(monkeypatch, contenders, names, until=float("inf")):
    """(what is wrong with ours, rows) of gpu.measure with these contenders."""
    rows, options = [], type("Options", (), OPTIONS)
    monkeypatch.setattr(gpu, "contenders", lambda *_: (contenders, names))
    return gpu.measure(96, 256, options, rows.append, 1e9, until), rows


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


def test_a_result_that_turns_wrong_costs_its_m_only(monkeypatch):
    contender = on_cpu(operands.Weight(96, 256), "llm-fp4")
    right, calls = contender.calls[0], []

    def wrong_the_third_time(x):
        calls.append(len(x))
        return right(x) + (len(calls) == 3)

    contender.calls = [wrong_the_third_time]
    failures, rows = run_measure(monkeypatch, [contender], {contender.name})
    assert [row["m"] for row in rows] == [40]
    assert len(failures) == 1 and failures[0].startswith(
        "n = 96, k = 256, m = 1 is left out: NoKernel: refusing to time"
    )


def test_nothing_starts_after_the_time_limit(monkeypatch, capsys):
    failures, rows = run_measure(monkeypatch, [], set(), until=0.0)
    assert failures == rows == [] and "m = 40 is left out: the time of this shape is up" in capsys.readouterr().out


def test_shapes_share_the_time(monkeypatch, tmp_path):
    """Each takes all that it may; a clock stands still elsewhere."""
    now, shares = [0.0], []
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(gpu.gpu_report, "write", lambda rows, out: [])

    def measure(n, k, options, record, bandwidth, until):
        shares.append(until - now[0])
        now[0] = until
        return []

    monkeypatch.setattr(gpu, "measure", measure)
    gpu.main(["--limit", "400", "--out", str(tmp_path / "gpu.jsonl")])
    assert len(shares) == len(gpu.SHAPES) and all(share == pytest.approx(100) for share in shares)


def test_on_hopper_every_scheme_has_a_kernel(monkeypatch):
    """The forced ones beside the default, wgmma's E4M3 among them."""
    for backend in (cuda, triton):
        monkeypatch.setattr(backend, "_unusable", lambda problem: None)
    monkeypatch.setattr(cuda.machine, "capability", lambda index: (9, 0))
    monkeypatch.setattr(native, "module", lambda: SimpleNamespace(cuda_architectures=["90-real", "90a-real"]))
    chosen = set()
    for scheme in gpu.SCHEMES:
        recipe, _, forced = scheme.partition("@")
        recipe, _, dtype = recipe.partition(":")
        problem = Problem.of_recipe(RECIPES[recipe], 64, 4096, 4096, dtype=ours.DTYPES[dtype or "bf16"], device="cuda")
        if forced.endswith("gemv-weight-shift"):
            problem = dataclasses.replace(problem, m=1)
        monkeypatch.setenv(registry.FORCE, forced)
        chosen.add((recipe, registry.choose(problem).name))
    assert {("llm-fp4", "cuda.sm90"), ("llm-fp4", "cuda.sm80"), ("minmax-w4a8", "cuda.sm90")} <= chosen
    assert {name for _, name in chosen} <= {k.name for k in cuda.KERNELS + cuda_options.KERNELS + triton.KERNELS}


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


def test_tritons_rows_are_set_against_ours_and_its_rivals():
    common = dict(n=96, k=256, floor=0.5, spread=0.0)
    seconds = {"llm-fp4 bf16": 1.0, "llm-fp4 bf16 [triton]": 2.0, gpu_report.BASE: 4.0, "gemlite int4 g64": 3.0}
    rows = [common | dict(name=name, m=1, seconds=value) for name, value in seconds.items()]
    rows.append(common | dict(name="llm-fp4 bf16 [triton]", m=16, seconds=1.0))
    assert gpu_report.triton_table(rows)[2:] == [
        "| Triton's | than | m = 1 | m = 16 |",
        "|---|---|---|---|",
        "| llm-fp4 bf16 [triton] | our CUDA kernel | 0.50× | – |",
        "| llm-fp4 bf16 [triton] | cuBLAS bf16 | 2.00× | – |",
        "| llm-fp4 bf16 [triton] | gemlite int4 g64 | 1.50× | – |",
    ]
    assert gpu_report.triton_table(rows[:1]) == []


@pytest.mark.parametrize("kernel, runs", [("triton.gemv", True), ("cuda.sm80", True), ("reference", False)])
def test_a_forced_family_may_run(kernel, runs, monkeypatch):
    contender = on_cpu(operands.Weight(96, 256), "llm-fp4")
    contender.kernel, contender.device, failures = lambda m: kernel.replace("cuda.", "cpu."), "cpu", []
    contender.name += " [triton]"
    assert gpu.can_run(contender, random_x(1, 256), True, failures) == runs and bool(failures) != runs


@pytest.mark.parametrize("kind, worst", [(torch.int8, 1 / 127), (torch.float8_e4m3fn, 32 / 448)], ids=str)
def test_tokens_in_eight_bits(kind, worst):
    x, made = random_x(5, 64), []
    codes, scale = rivals_cuda._rows_to(kind, x)
    error = (codes.float() * scale - x).abs() / x.abs().amax(1, keepdim=True)
    assert codes.dtype == kind and error.max() <= worst / 2
    assert torch.equal(rivals_cuda._rounded_to(kind, x), codes.double() * scale)
    for product_only, times in ((True, 1), (False, 3)):
        made.clear()
        call = rivals_cuda._PerToken(lambda x: (made.append(x) or x, 2), lambda q, scale: q * scale, product_only)
        assert all(torch.equal(call(x), 2 * x) for _ in range(3)) and len(made) == times
