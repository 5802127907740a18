"""How the CUDA rows are measured, without a GPU: candidates run on the PTX machine and are checked there, their times
are invented."""

import copy
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import random_x, same_bits
from cuda_on_cpu import all_kernels
from ptx import missing
from test_gpu_rehearsed import Rehearsal

from llmfp4_kernels import cli, formats, native, reference
from llmfp4_kernels.backends import cuda, cuda_choices, cuda_tune, graphs, judge, measured, triton
from llmfp4_kernels.backends.cuda_choices import Form, Tile
from llmfp4_kernels.errors import NoKernel
from llmfp4_kernels.formats import E2M1, element
from llmfp4_kernels.problem import Problem

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
choices = importlib.import_module("choices")
WHY_NOT = missing() or native.problem_with_cuda()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
PROBLEM = Problem(1, 70, 330, E2M1, E2M1, shift=True, device="cuda")
HERE, MULTIPROCESSORS = torch.device("cpu"), 16
SLOW, FAST = 3e-5, 1e-5


def config_of(call):
    """The tile of one of cuda_tune's calls, from the plan that it will launch."""
    ((name, *_), plan) = next(iter(call.func.__self__.plans.items()))
    return cuda_choices.tile_of(f"cuda.{name}", plan)


class StandIn:
    """Invents seconds of tiles."""

    def __init__(self, seconds):
        self.seconds, self.asked = seconds, []

    def wait(self):
        pass

    def copies(self, size):
        return 2

    def turns(self, calls, x):
        config = config_of(calls[0])
        self.asked.append(config)
        assert len(calls) == 2 and {config_of(call) for call in calls} == {config}
        assert len({call.func.__self__.tensors["codes"].data_ptr() for call in calls}) == 2
        return SimpleNamespace(seconds=lambda budget: self.seconds(config))


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.setenv(measured.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "SHIPPED", tmp_path / "package")
    measured.forget()
    with Rehearsal(all_kernels(), MULTIPROCESSORS) as machine:
        yield machine
        monkeypatch.undo()  # what stands in Prepared.run's place now, before what stood there before
    measured.forget()


def test_candidates_are_few_and_run():
    for m in (1, 2, 8, 16, 17, 64, 1024, 4096):
        for planes, scale, size in ((1, "none", 0), (2, "none", 0), (1, "e4m3", 16)):
            form = Form("int8" if planes == 2 else "bfloat16", planes, scale, size, 4096, 4096)
            names = [name for name in cuda_choices.NAMES if name != "cuda.gemv" or m * planes <= 16]
            found = cuda_tune.candidates(form, m, names, 132)
            assert len(names) <= len(set(found)) == len(found) <= 60, len(found)
            assert {config.kernel for config in found} == set(names)
            for config in found:
                row = cuda_choices.Row(form, m, config, FAST, SLOW, 1, 1, "", "", "")
                here = SimpleNamespace(multiprocessors=132)
                assert cuda_choices._refusal(row, here) is None
                counted = cuda_choices.division(config.kernel, form, m, 132)
                assert (m == 1 and config.kernel == "cuda.gemv") or config.tile <= max(counted.tile, 1) + 1
            for name in names:
                counted = cuda_choices.division(name, form, m, 132)
                assert cuda_choices.tile_of(name, counted) in found


def test_the_fastest_right_tile_of_each_row_is_kept_and_used(gpu, monkeypatch):
    wrong, broken = Tile("cuda.gemv", 2, "64x8", 1), Tile("cuda.sm80", 0, "64x32", 2)
    best = Tile("cuda.gemv", 0, "16x8", 4), Tile("cuda.sm80", 0, "64x32", 4)
    run = cuda.Prepared.run

    def damaged(prepared, kernel, x, *epilogue):
        """One doubles its results, another does not start."""
        config = config_of(SimpleNamespace(func=SimpleNamespace(__self__=prepared)))
        if config == broken:
            raise RuntimeError("kernel did not start: too many resources\nrequested for launch")
        y = run(prepared, kernel, x, *epilogue)
        return 2 * y if config == wrong else y

    monkeypatch.setattr(cuda.Prepared, "run", damaged)
    watch = StandIn(lambda config: {wrong: FAST / 9, broken: FAST / 9, best[0]: 2e-5, best[1]: FAST}.get(config, SLOW))
    subject = cuda_tune.Subject(PROBLEM, watch, HERE)
    outcome = cuda_tune.tune(subject, 3, torch.bfloat16, watch, 600)
    assert [(row.config, row.seconds, row.counted_seconds) for row in outcome.rows] == [
        (best[0], 2e-5, SLOW), (best[1], FAST, SLOW)]  # fmt: skip
    why = dict(outcome.left_out)
    assert why == {
        wrong: f"NoKernel: {3 * 70} of {3 * 70} results are not the reference's",
        broken: "RuntimeError: kernel did not start: too many resources",
    }
    counted = cuda_choices.division("cuda.gemv", subject.form, 3, MULTIPROCESSORS)
    assert outcome.timed[0] == (cuda_choices.tile_of("cuda.gemv", counted), SLOW)
    assert len(outcome.timed) == outcome.rows[0].timed == outcome.rows[0].candidates - 2
    assert wrong not in watch.asked and broken not in watch.asked
    monkeypatch.setattr(cuda.Prepared, "run", run)
    cuda_choices.put(outcome.rows, cuda.machine, HERE, measured.cache_folder())
    x = random_x(3, 330, torch.bfloat16)
    for kernel, grid in (("cuda.gemv", (5, 4, 1)), ("cuda.sm80", (1, 2, 4))):
        y = gpu.run(cuda.Prepared(subject.packed, None), kernel, x)
        assert gpu.grids[-1] == grid and same_bits(y, reference.gemm(x, subject.packed).to(x.dtype))


def test_no_tile_is_begun_when_time_is_up(gpu):
    watch = StandIn(lambda config: SLOW)
    outcome = cuda_tune.tune(cuda_tune.Subject(PROBLEM, watch, HERE), 3, torch.float32, watch, 0)
    assert len(outcome.timed) == len(outcome.rows) == 1 < outcome.rows[0].candidates and outcome.left_out == []


def test_a_result_that_is_not_written_is_none(gpu, monkeypatch):
    """Memory of the right result before is NaN by then; what counting chooses being wrong ends it."""
    monkeypatch.setattr(
        cuda.Prepared, "run", lambda prepared, kernel, x: torch.empty(len(x), prepared.n, dtype=x.dtype)
    )
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    watch = StandIn(lambda config: SLOW)
    subject = cuda_tune.Subject(PROBLEM, watch, HERE)
    with pytest.raises(NoKernel, match=f"{3 * 70} of {3 * 70} results are not the reference's"):
        cuda_tune.tune(subject, 3, torch.bfloat16, watch, 600)


def test_what_no_row_takes_is_refused(gpu):
    problem = dataclasses.replace(PROBLEM, activation=element("e4m3"), shift=False)
    watch = StandIn(lambda config: SLOW)
    with pytest.raises(cuda_tune.Refused, match="cuda.sm90: this GPU is sm_80, wgmma exists on sm_90"):
        cuda_tune.tune(cuda_tune.Subject(problem, watch, HERE), 3, torch.bfloat16, watch, 600)


@pytest.mark.parametrize("activation", ["e4m3", "e4m3fn"])
def test_the_judge_knows_what_fp8_operands_lose(activation):
    problem = dataclasses.replace(PROBLEM, activation=element(activation), shift=False)
    packed, x = judge.random_weight(problem), random_x(5, 330)
    right, fp8 = reference.gemm(x, packed).double(), judge.Judge(packed, x, fp8=True)
    magnitude = reference.round_activation(x, packed, torch.float64).abs() @ reference.stored_weight(packed).abs().T
    fp8((right + 2.0**-12 * magnitude).float())
    for check, share in ((fp8, 2.0**-4), (judge.Judge(packed, x), 2.0**-9)):
        with pytest.raises(NoKernel, match="results are not the reference's"):
            check((right + share * magnitude).float())


@pytest.fixture
def stand_in(monkeypatch):
    watch = StandIn(lambda config: FAST if config.splits == 2 else SLOW)
    monkeypatch.setattr(graphs, "Stopwatch", lambda device: watch)
    monkeypatch.setattr(choices, "Stopwatch", lambda device: watch)
    return watch


def test_the_command(gpu, stand_in, capsys, monkeypatch):
    monkeypatch.setattr(triton, "refusal", lambda name, problem: "no Triton here")
    argv = ["tune", "--shape", "70x330", "--shape", "70x330", "--recipe", "minmax-w4a4", "--m", "3", "40"]
    assert cli.main([*argv, "--json"]) == 0
    result, progress = capsys.readouterr()
    result = json.loads(result)
    assert progress == "cuda: 1 of 1, m = 3, n = 70, k = 330\ncuda: 1 of 1, m = 40, n = 70, k = 330\n"
    assert [(row["backend"], row["m"], row["config"]["kernel"]) for row in result["rows"]] == [
        ("cuda", 3, "cuda.gemv"), ("cuda", 3, "cuda.sm80"), ("cuda", 40, "cuda.sm80")]  # fmt: skip
    assert list(result["files"]) == ["cuda"] and Path(result["files"]["cuda"]).parent == measured.cache_folder()
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert (
        "cuda.gemv int8 m = 3, n = 70, k = 330: " in shown and " times as fast as what is counted (cuda.gemv " in shown
    )
    assert shown.endswith(f"wrote {result['files']['cuda']}\n")


def test_the_command_asks_the_backends_that_are_named(gpu, capsys, monkeypatch):
    monkeypatch.setattr(triton, "refusal", lambda name, problem: "no Triton here")
    assert cli.main(["tune", "--shape", "64x64", "--backend", "triton", "--json"]) == 2
    sentence = "tiles are measured on the GPU that runs them: triton: no Triton here"
    assert json.loads(capsys.readouterr().out)["error"] == sentence
    assert cli.main(["tune", "--shape", "64x64", "--recipe", "mxfp4-a4", "--backend", "cuda", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "no kernel of cuda takes one of these 1 products"


def test_the_script(gpu, stand_in, tmp_path, capsys):
    """Its lines and its table: what counting chooses and all others, with machine and commit; the package reads it."""
    out, argv = tmp_path / "gpu_choices.jsonl", ["--shapes", "70x330", "--m", "3", "--limit", "600"]
    argv += ["--schemes", "minmax-w4a4", "gptq-fp4-a8-fp8", "--out", str(out), "--table", str(measured.SHIPPED)]
    assert choices.main(argv) == 0
    rows = [json.loads(text) for text in out.read_text().splitlines()]
    assert {row["scheme"] for row in rows} == {"minmax-w4a4"} and {"machine", "commit", "gpu"} <= set(rows[0])
    assert [row["counted"] for row in rows] == [True] + [False] * (len(rows) - 1) and len(rows) > 5
    assert {row["kernel"] for row in rows if row["in_turn"] is not None} == {"cuda.gemv", "cuda.sm80"}
    said = capsys.readouterr().out
    assert "gptq-fp4-a8-fp8, m = 3, n = 70, k = 330 is left out: no CUDA kernel to tune" in said
    table = measured.SHIPPED / "cuda-cpu-16.json"
    assert said.endswith(f"wrote {table}\n")
    kept = json.loads(table.read_text())["rows"]
    assert {row["results"] for row in kept} == {"gpu_choices.jsonl"} and len(kept) == 2
    config = cuda.tile("cuda.sm80", dataclasses.replace(PROBLEM, m=3)).config
    assert config.splits == 2 and dataclasses.asdict(config) in [row["config"] for row in kept]


def test_the_script_goes_on_after_a_wrong_tile_and_says_so(gpu, stand_in, tmp_path, monkeypatch):
    run = cuda.Prepared.run

    def damaged(prepared, kernel, x, *epilogue):
        y = run(prepared, kernel, x, *epilogue)
        return 2 * y if len(x) == 3 else y

    monkeypatch.setattr(cuda.Prepared, "run", damaged)
    argv = ["--shapes", "70x330", "--m", "3", "5", "--schemes", "minmax-w4a4", "--out", str(tmp_path / "a.jsonl")]
    with pytest.raises(
        SystemExit, match="results of ours: minmax-w4a4, m = 3, n = 70, k = 330: .* not the reference's"
    ):
        choices.main([*argv, "--table", str(tmp_path / "table")])
    rows = [json.loads(text) for text in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert {row["m"] for row in rows} == {5}
    assert len(list((tmp_path / "table").iterdir())) == 1


def test_the_script_shares_its_time(monkeypatch, tmp_path):
    now, shares = [0.0], []
    monkeypatch.setattr(choices.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(choices.cuda, "refusal", lambda name, problem: None)
    monkeypatch.setattr(choices.measured.Conditions, "of", lambda *_: measured.Conditions("none", "sm_80", 1, ""))

    def measure(scheme, n, k, options, record, until):
        shares.append(until - now[0])
        now[0] = until
        return []

    monkeypatch.setattr(choices, "measure", measure)
    turns = len(choices.SCHEMES) * len(choices.SHAPES)
    choices.main(["--limit", "480", "--out", str(tmp_path / "a.jsonl"), "--table", str(tmp_path)])
    assert len(shares) == turns and all(share == pytest.approx(480 / turns) for share in shares)


def test_the_scripts_schemes_are_different_forms_that_a_row_takes(monkeypatch):
    monkeypatch.setattr(cuda, "_unusable", lambda problem: None)
    monkeypatch.setattr(cuda.machine, "capability", lambda index: (9, 0))
    monkeypatch.setattr(native, "module", lambda: SimpleNamespace(cuda_architectures=["90-real", "90a-real"]))
    forms = set()
    for scheme in choices.SCHEMES:
        recipe, _, dtype = scheme.partition(":")
        dtype = choices.DTYPES[dtype or "bf16"]
        problem = Problem.of_recipe(formats.recipe(recipe), 1, 4096, 4096, dtype=dtype, device="cuda")
        assert any(kernel.refusal(problem) is None for kernel in cuda.KERNELS), scheme
        forms.add(Form.of(problem))
    assert len(forms) == len(choices.SCHEMES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_script_without_a_gpu_says_so():
    with pytest.raises(SystemExit, match="times the CUDA rows on a GPU: there is no GPU that torch can use"):
        choices.main([])


def test_copies_share_nothing_with_the_layer(gpu):
    """A plan that is tried is no plan of the weight's."""
    watch = StandIn(lambda config: SLOW)
    subject = cuda_tune.Subject(PROBLEM, watch, HERE)
    before = [copy.copy(prepared.plans) for prepared in subject.copies]
    cuda_tune.tune(subject, 3, torch.bfloat16, watch, 0)
    assert [prepared.plans for prepared in subject.copies] == before == [{}, {}]
