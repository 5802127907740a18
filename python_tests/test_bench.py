"""The benchmark refuses to time wrong kernels, judges every rival alike, and writes complete result lines."""

import functools
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from llmfp4_kernels import native, reference
from llmfp4_kernels.errors import BadInput, NoKernel

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
adapters, bench, gemm, machine, operands, ours, roofline = map(
    importlib.import_module, ("adapters", "bench", "gemm", "machine", "operands", "ours", "roofline")
)
RECIPES = ("minmax-w4a4", "gptq-fp4-a4", "gptq-fp4-a8", "mxfp4-a8", "nvfp4-a8", "minmax-w4a16", "nvfp4")
TORCH = ("torch-fp32", "torch-fp16", "torch-bf16", "torch-int4", "onednn-int8", "onednn-int8-product", "onednn-int-mm")
compare = functools.partial(bench.compare, rounds=2, budget=0)


@pytest.fixture(scope="module")
def weight():
    return operands.Weight(96, 256)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing here is about speed: no time goes into ceilings, and two copies of a weight are copies enough."""
    monkeypatch.setattr(roofline, "_best", lambda call: 1.0)
    monkeypatch.setattr(bench, "MOST_COPIES", 2)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("m", [1, 5, 33])
def test_recipes_are_what_the_reference_says(weight, recipe, m):
    x = torch.randn(m, weight.k)
    row = compare([ours.fp4(weight, recipe, warm=True)], x)[0]
    assert row["kernel"].startswith("cpu.") and len(row["times"]) == 2 and row["ratio"] == 1
    packed = ours.packed_weight(weight, recipe)[1]
    y = ours.fp4(weight, recipe, warm=True).calls[0](x)
    torch.testing.assert_close(y, reference.gemm(x, packed), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", ["minmax-w4a4", "minmax-w4a16"])
def test_a_wrong_copy_is_refused(weight, recipe):
    contender = ours.fp4(weight, recipe)
    right = contender.calls[-1]
    assert len(contender.calls) == 2
    contender.calls[-1] = lambda x: right(x) * (1 + 2**-10)
    contender.kernel = lambda m: "wrong"
    for m in (3, 17):
        with pytest.raises(NoKernel, match=f"refusing to time {recipe}, which is wrong at m = {m}, n = 96"):
            compare([contender], torch.randn(m, weight.k))


def wrong_after(call, times):
    """A copy whose results are right `times` times."""
    left = iter([True] * times)
    return lambda x: call(x) if next(left, False) else torch.zeros_like(call(x))


@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize("times", [0, 1])
def test_every_copy_is_checked_before_and_one_after_the_timing(weight, copy, times):
    contender = ours.fp4(weight, "minmax-w4a4")
    contender.kernel = lambda m: "wrong"
    wrong = range(2) if times else [copy]
    contender.calls = [wrong_after(c, times) if i in wrong else c for i, c in enumerate(contender.calls)]
    with pytest.raises(NoKernel, match="refusing to time minmax-w4a4"):
        compare([contender], torch.randn(17, weight.k), rounds=2, budget=1e-4)


@pytest.mark.parametrize("recipe, dtype", [("minmax-w4a4", "fp32"), ("mxfp4", "bf16"), ("mxfp4-a8-int", "fp32")])
@pytest.mark.parametrize("wrong", ["first row", "other dtype", "too large"])
def test_wrong_shapes_dtypes_and_sizes_are_refused(weight, recipe, dtype, wrong):
    contender = ours.fp4(weight, recipe, dtype)
    x = torch.randn(8, weight.k).to(contender.x_dtype)
    y = contender.calls[0](x)
    contender.check(x, y)
    bad = {"first row": y[:1], "other dtype": y.double(), "too large": y * (1 + 2.0**-6)}[wrong]
    if wrong == "other dtype" and recipe != "minmax-w4a4":
        pytest.skip("results of fp32 sums are compared as numbers")
    with pytest.raises(NoKernel, match="refusing to time"):
        contender.check(x, bad)


def test_a_forced_row_is_named_and_may_refuse(weight, monkeypatch):
    monkeypatch.setenv("LLMFP4_KERNEL", "reference")
    contender = ours.fp4(weight, "minmax-w4a4", forced="cpu.scalar")
    assert contender.kernel(3) == "cpu.scalar" and contender.name == "minmax-w4a4 [cpu.scalar]"
    assert ours.fp4(weight, "minmax-w4a4").kernel(3) == "reference"
    assert not gemm.takes(ours.fp4(weight, "minmax-w4a16", forced="cpu.rounded"), 1)


@pytest.mark.parametrize("name", adapters.adapters())
def test_rivals_compute_what_their_codes_stand_for(name, threads):
    """Checked by `compare`; that the error is that of 4 bits (or less) shows that the codes stand for the weight."""
    weight = operands.Weight(96, 256)
    try:
        rival = adapters.adapters()[name](weight)
    except (ImportError, NoKernel, BadInput) as reason:
        assert name not in TORCH and str(reason)
        pytest.skip(str(reason))
    for m in (1, 4, 33):
        compare([rival], torch.randn(m, weight.k))
    error = weight.error(rival)
    assert error < (0.2 if "fp4" in name else 0.12) and (error > 0.03 or name in TORCH)
    right = rival.calls[-1]
    rival.calls[-1] = lambda x: right(x.index_fill(1, torch.arange(8), 0.0))
    with pytest.raises(NoKernel, match="refusing to time"):
        compare([rival], torch.randn(5, weight.k))


def test_result_lines_are_complete(tmp_path, threads, capsys):
    out = tmp_path / "r.jsonl"
    arguments = ["--shapes", "48x64", "50x70", "--m", "1", "--threads", "1", "--rounds", "3", "--budget", "0"]
    rivals = ["torch-fp32", "torch-int4", "onednn-int8"]
    gemm.main([*arguments, "--schemes", "minmax-w4a4", "mxfp4:bf16", "--rivals", *rivals, "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["name"] for row in rows[:5]] == [
        "torch fp32",
        "torch int4 g64",
        "oneDNN int8 (packed)",
        "minmax-w4a4",
        "mxfp4 bf16",
    ]
    assert len(rows) == 9 and "torch-int4 is left out: torch int4 g64 needs n in 16s" in capsys.readouterr().out
    stated = (
        "machine commit seconds spread times ratio kernel error read_gbps peak_gflops roofline gbps gflops copies note"
    )
    assert all(set(stated.split()) <= set(row) for row in rows)
    assert rows[0]["ratio"] == 1 and "quantizes tokens" in rows[2]["note"]


def test_ratios_are_taken_pair_by_pair():
    """A machine that is half as fast in one round does not change a ratio."""
    a, b = {"times": [2.0, 4.0, 2.0, 2.0]}, {"times": [1.0, 2.0, 1.0, 1.0]}
    assert bench.ratio_quartiles(a, b) == [2.0, 2.0, 2.0]
    assert bench.copies_for(1, warm=True) == 1 and bench.copies_for(1 << 40) == 1


def test_reading_takes_its_turn_in_every_round(weight):
    reading, budgets = roofline.Reading(20), []
    contender = ours.fp4(weight, "minmax-w4a4", warm=True)
    bench.compare(
        [contender], torch.randn(1, weight.k), rounds=3, budget=1e-3, beside=[reading.once_more, budgets.append]
    )
    assert budgets == [1e-3] * 3 and len(reading.rates) == 3
    assert sorted(reading.rates)[1] == reading.rate and 1e7 < reading.rate < 1e13
    contender.weight_bytes = 1 << 22
    assert roofline.footprint(contender) == 23
    contender.calls *= 1 << 10
    assert roofline.footprint(contender) == 30


def test_the_roofline_is_the_slower_of_reading_and_computing(weight, monkeypatch):
    monkeypatch.setattr(roofline, "peak", lambda unit: 1e12)
    contender = bench.Contender("c", [None], None, weight_bytes=10**6)
    one = roofline.ceilings(1, 1000, 1000, contender, 1e9)
    many = roofline.ceilings(10**4, 1000, 1000, contender, 1e9)
    assert one["roofline_seconds"] == (10**6 + 8000) / 1e9 and one["bytes"] == 1008000
    assert many["roofline_seconds"] == (10**6 + 8e7) / 1e9


def test_peaks_are_those_of_an_instruction_set():
    module = native.module()
    rates = {isa: module.peak(isa, "int8", 1, 0.02) for isa, row in native.cpu_kernels().items() if row["supported"]}
    assert all(1e9 < rate < 1e14 for rate in rates.values()), rates
    assert module.peak("scalar", "bf16", 1, 0.02) == 0.0
    if "avx512vnni" in rates and "avx512_bf16" in machine.machine()["flags"]:
        assert module.peak("avx512vnni", "bf16", 1, 0.02) > 1e9
    with pytest.raises(ValueError, match="unknown unit 'int4'"):
        module.peak("scalar", "int4", 1, 0.02)


def test_every_unit_has_a_peak(monkeypatch):
    """A CPU without an instruction for bf16 numbers multiplies them as fp32."""
    monkeypatch.setattr(roofline, "_peak", lambda unit, threads: {"int8": 3.0, "fp32": 1.0, "bf16": 0.0}[unit])
    assert [roofline.peak(unit) for unit in ("int8", "bf16", "float", "fp32", "fp16")] == [3.0, 1.0, 1.0, 1.0, 1.0]
    monkeypatch.setattr(roofline, "_peak", lambda unit, threads: {"int8": 4.0, "fp32": 1.0, "bf16": 2.0}[unit])
    assert [roofline.peak(unit) for unit in ("int8", "bf16", "float", "fp32", "fp16")] == [4.0, 2.0, 2.0, 1.0, 1.0]
