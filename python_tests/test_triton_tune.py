"""`llmfp4 tune` without a GPU: its tiles run on the PTX machine and are checked there, their times are invented."""

import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from cases import same_bits
from triton_on_cpu import SMALL, WHY_NOT, OnCpu

from llmfp4_kernels import cli, formats, reference
from llmfp4_kernels.backends import graphs, measured, triton
from llmfp4_kernels.backends.judge import Judge, random_weight
from llmfp4_kernels.backends.triton import configs, machine, tuned
from llmfp4_kernels.backends.triton.form import Form
from llmfp4_kernels.errors import NoKernel
from llmfp4_kernels.formats import E2M1, E4M3, E4M3FN, E8M0, RECIPES, Dynamic
from llmfp4_kernels.problem import Problem

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
DEEP = dataclasses.replace(SMALL, block_k=128)
SLOW, FAST = 3e-5, 1e-5
PROBLEM = Problem(3, 40, 300, E2M1, E2M1, shift=True, device="cuda")


class StandIn:
    """Invents seconds of configs; waits for the PTX machine instead of a GPU."""

    def __init__(self, seconds):
        self.seconds, self.asked = seconds, []

    def wait(self):
        OnCpu.current.flush()

    def copies(self, size):
        return 2

    def turns(self, calls, y):
        config = calls[0].args[0]
        self.asked.append(config)
        assert len(calls) == 2 and len({call.func.__self__.codes.data_ptr() for call in calls}) == 2
        return SimpleNamespace(seconds=lambda budget: self.seconds(config))


@pytest.fixture
def few_tiles(monkeypatch, tmp_path):
    """Two small tiles and a guess, whose PTX is short."""
    from llmfp4_kernels.backends.triton import tune

    monkeypatch.setenv(measured.FOLDER, str(tmp_path))
    monkeypatch.setitem(configs.TABLE, ("gemv", 8), ((16, SMALL),))
    monkeypatch.setattr(tune, "tiles", lambda *_: [SMALL, DEEP])
    return tune


def shares(config):
    return config.block_k, config.splits


def test_the_fastest_right_tile_is_kept_and_used(few_tiles, monkeypatch):
    from triton.runtime.errors import OutOfResources

    from llmfp4_kernels.backends.triton.prepared import Prepared

    multiply = Prepared.multiply

    def damaged(self, config, *rest):
        """Wrong where 4 blocks share a sum of steps of 64, too large where 2 share one of 128."""
        if shares(config) == (128, 2):
            raise OutOfResources(300_000, 232_448, "shared memory")
        if shares(config) == (64, 4):
            self = copy.copy(self)
            self.row_scale = self.row_scale * 2
        return multiply(self, config, *rest)

    monkeypatch.setattr(Prepared, "multiply", damaged)
    watch = StandIn(lambda config: {(64, 4): FAST / 9, (64, 2): FAST, (128, 1): 2e-5}.get(shares(config), SLOW))
    device = torch.device("cpu")
    with OnCpu(config=None) as gpu:
        row, left_out = few_tiles.tune(PROBLEM, watch, device, 600)
        assert shares(row.config) == (64, 2) and (row.seconds, row.guess_seconds) == (FAST, SLOW)
        why = {shares(config): sentence for config, sentence in left_out}
        assert set(why) == {(64, 4), (128, 2)} and "out of resource: shared memory" in why[128, 2]
        assert why[64, 4] == f"NoKernel: {3 * 40} of {3 * 40} results are not the reference's"
        assert {shares(config) for config in watch.asked} == {(64, 1), (128, 1), (64, 2), (128, 3)}
        assert (row.timed, row.candidates) == (4, 6) and row.form == Form.of("gemv", PROBLEM)
        monkeypatch.setattr(Prepared, "multiply", multiply)
        packed, x = random_weight(PROBLEM), torch.randn(3, 300)
        before = gpu.run(Prepared(packed, None), "triton.gemv", x)
        assert gpu.launched[1].grid == (1, 1, 1)
        tuned.put(row, device)
        y = gpu.run(Prepared(packed, None), "triton.gemv", x)
        assert gpu.launched[1].grid == (1, 1, 2) and gpu.launched[2].name == "add_splits"
        assert same_bits(y, before) and same_bits(y, reference.gemm(x, packed))


def test_no_tile_is_begun_when_time_is_up(few_tiles):
    watch = StandIn(lambda config: SLOW)
    with OnCpu(config=None):
        row, left_out = few_tiles.tune(PROBLEM, watch, torch.device("cpu"), 0)
    assert left_out == [] and {shares(config) for config in watch.asked} == {(64, 1)}
    assert row.config == configs.choose(row.form, 3, (8, 0), machine.version(), 2) and row.timed == 1 < row.candidates


def test_a_wrong_guess_ends_it(few_tiles, monkeypatch):
    from llmfp4_kernels.backends.triton.prepared import Prepared

    monkeypatch.setattr(Prepared, "multiply", lambda self, config, operands, x_scale, y: y.zero_())
    with OnCpu(config=None), pytest.raises(NoKernel, match="results are not the reference's"):
        few_tiles.tune(PROBLEM, StandIn(lambda config: SLOW), torch.device("cpu"), 600)


@pytest.mark.parametrize("arch", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("version", [(3, 6), (3, 9)], ids=str)
def test_a_few_tiles_run_by_the_rules(arch, version, monkeypatch):
    from llmfp4_kernels.backends.triton.tune import tiles

    monkeypatch.setattr(machine.here, "capability", lambda index: arch, raising=False)
    monkeypatch.setattr(machine, "version", lambda: version)
    for m in (1, 8, 16, 17, 64, 65, 4096):
        for activation in (None, E2M1, E4M3FN):
            form = Form.of("gemv" if m <= 16 else "gemm", Problem(m, 4096, 4096, E2M1, activation))
            made = tiles(form, m, arch, version)
            assert 4 <= len(set(made)) == len(made) <= 16, len(made)
            whole = [dataclasses.replace(config, splits=1) for config in made]
            assert all(configs.refusal(config, form, arch, version) is None for config in whole)
            assert all(config.tokens < 2 * max(m, 17) for config in made)


JUDGED = ("llm-fp4", "gptq-fp4-a4", "nvfp4", "mxfp4-a8", "gptq-fp4-a8-fp8", "mxfp4-a8-fp8")


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name in JUDGED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_judge_knows_right_from_wrong(recipe, dtype, monkeypatch):
    """Sums of 8-bit floats have 14 bits: an eighth of the largest is wrong."""
    monkeypatch.setattr(machine.here, "capability", lambda index: (8, 9), raising=False)
    problem = Problem.of_recipe(formats.recipe(recipe), 20, 70, 515, dtype=dtype)
    packed, x = random_weight(problem), torch.randn(20, 515).to(dtype)
    of_weight = Problem.of(packed, 20, dtype)
    assert dataclasses.replace(of_weight, device="cpu", scale_span=problem.scale_span) == problem
    judge, right = Judge(packed, x, recipe.endswith("-fp8")), reference.gemm(x, packed).to(dtype)
    assert right.isfinite().all()
    judge(right)
    for token, output in ((0, 0), (19, 69)):
        error = right.abs().max() / 8 if recipe.endswith("-fp8") else right[token, output] * 0.05
        for wrong in (right[token, output] + error, float("nan")):
            y = right.clone()
            y[token, output] = wrong
            with pytest.raises(NoKernel, match=f"1 of {16 * 70} results"):
                judge(y)


def test_the_judge_takes_some_of_many_results():
    problem = Problem(33, 9001, 64, E2M1, E2M1)
    packed, x = random_weight(problem), torch.randn(33, 64)
    judge, right = Judge(packed, x), reference.gemm(x, packed)
    judge(right)
    for token, output in ((0, 0), (32, 9000), (0, 9000)):
        y = right.clone()
        y[token, output] += 1
        with pytest.raises(NoKernel, match=f"1 of {16 * 4096} results"):
            judge(y)


def test_the_weight_of_a_shift_without_activations_is_one_of_a_factor():
    problem = Problem(1, 5, 7, E2M1, None, shift=True, scale=E4M3, group_size=16)
    packed = random_weight(problem)
    assert packed.shift is None and packed.x_factor is not None and packed.codes[:, -1].max() < 16
    assert Form.of("gemm", Problem.of(packed, 1, torch.float16)) == Form.of(
        "gemm", dataclasses.replace(problem, dtype=torch.float16)
    )


@pytest.mark.parametrize("span", [8, 9])
def test_the_weights_scales_are_as_far_apart_as_operands_ask(span, monkeypatch):
    """E3M0 is exact as 8-bit floats up to 8 binades."""
    monkeypatch.setattr(machine.here, "capability", lambda index: (8, 9), raising=False)
    problem = Problem(1, 40, 320, formats.E3M0, E4M3FN, E8M0, 32, dynamic=Dynamic(), scale_span=span)
    form = Form.of("gemm", problem)
    assert form.fp8 == (span == 8) and Form.of("gemm", Problem.of(random_weight(problem), 1, torch.float32)) == form


def test_a_form_is_that_of_the_operands_that_are_made():
    from llmfp4_kernels.backends.triton.prepared import Prepared

    for problem in (
        PROBLEM,
        dataclasses.replace(PROBLEM, activation=formats.E3M0),
        dataclasses.replace(PROBLEM, activation=None, shift=False, x_factor=True, dtype=torch.bfloat16),
        dataclasses.replace(PROBLEM, activation=None, shift=False),
        dataclasses.replace(PROBLEM, activation=formats.element("e4m3"), shift=False, dynamic=Dynamic()),
        dataclasses.replace(PROBLEM, activation=E4M3FN, shift=False, dynamic=Dynamic()),
    ):
        with OnCpu((8, 9), static=True):
            form = Form.of("gemv", problem)
            packed = random_weight(problem)
            operands, _ = Prepared(packed, None).activations(torch.randn(3, 300).to(problem.dtype))
        assert str(operands.dtype) == f"torch.{form.operand}" and len(operands) == form.planes * form.parts


def run(capsys, *argv):
    code = cli.main(["tune", *argv, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out)


def test_the_command(few_tiles, monkeypatch, capsys):
    watch = StandIn(lambda config: FAST if config.block_k == 128 else SLOW)
    monkeypatch.setattr(graphs, "Stopwatch", lambda device: watch)
    argv = ["--shape", "40x300", "--shape", "40x300", "--m", "3", "--dtype", "float32"]
    with OnCpu(config=None):
        code, result = run(capsys, *argv)
        assert code == 0 and len(result["rows"]) == 1 and result["rows"][0]["config"]["block_k"] == 128
        assert tuned.choose(Form.of("gemv", PROBLEM), 3, torch.device("cpu")).config.block_k == 128
        assert cli.main(["tune", *argv]) == 0
    shown, progress = capsys.readouterr()
    assert progress == "triton: 1 of 1, m = 3, n = 40, k = 300\n"
    assert "triton.gemv int8 m = 3, n = 40, k = 300: 10.0 us, 3.00 times as fast as the guess (32x8x128, " in shown
    assert shown.endswith(f"wrote {result['files']['triton']}\n")


def test_a_models_layers_are_its_forms(monkeypatch):
    from llmfp4_kernels import FP4Linear, tuning

    def layer(n, k, recipe="mxfp4"):
        return FP4Linear.from_linear(torch.nn.Linear(k, n), recipe)

    layers = [layer(64, 96), layer(64, 96), layer(96, 64), layer(64, 96, "nvfp4")]
    monkeypatch.setattr(tuning, "linear_layers", lambda path: layers)
    asked = SimpleNamespace(shape=["64x96"], model="folder", recipe="mxfp4", dtype="bfloat16", m=None)
    problems = tuning._problems(asked)
    assert {p.device for p in problems} == {"cuda"} and {p.dtype for p in problems} == {torch.bfloat16}
    for backend in (tuning._Triton, tuning._Cuda):
        forms = {backend.form(problem): problem for problem in problems}
        assert [(p.n, p.k, p.scale.name) for p in forms.values()] == [
            (64, 96, "e8m0"), (96, 64, "e8m0"), (64, 96, "e4m3")]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_without_a_gpu_is_refused(capsys):
    code, result = run(capsys, "--shape", "64x64")
    assert code == 2 and result["error"] == (
        "tiles are measured on the GPU that runs them: "
        "cuda: there is no GPU that torch can use; triton: there is no GPU that torch can use"
    )


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "needs the folder of a quantized model, or --shape NxK"),
        (["--shape", "4096"], "--shape '4096' is not of the form NxK"),
        (["--shape", "0x64"], "--shape '0x64' is not"),
        (["--shape", "64x64", "--recipe", "fp3"], "unknown recipe 'fp3'"),
        (["--shape", "64x64", "--m", "0"], "'0' is no whole number of at least 1"),
        (["--shape", "64x64", "--seconds", "-1"], "'-1' is no whole number of at least 1"),
    ],
)
def test_bad_options_are_refused(argv, sentence, capsys, monkeypatch):
    monkeypatch.setattr(triton, "_unusable", lambda problem: None)
    code, result = run(capsys, *argv)
    assert code == 2 and sentence in result["error"]
