"""The Triton rows of the registry where nothing is launched: layout, refusals, Triton imported only when needed."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from cases import random_packed

from llmfp4_kernels import environment, layout, reference
from llmfp4_kernels.backends import cuda, triton
from llmfp4_kernels.backends.triton import configs, machine
from llmfp4_kernels.backends.triton.form import Form
from llmfp4_kernels.errors import BadInput, NoKernel
from llmfp4_kernels.formats import E2M1, E3M0, E4M3, INTEGER, RECIPES, Dynamic, element
from llmfp4_kernels.packed import codes_shape, unpack
from llmfp4_kernels.problem import Problem
from llmfp4_kernels.registry import FORCE, choose, explain, layout_for

GEMV, GEMM = triton.KERNELS
PROBLEM = Problem(1, 64, 64, E2M1, E2M1, device="cuda")


def refuse(kernel, **changes):
    return kernel.refusal(Problem(**{**vars(PROBLEM), **changes}))


@pytest.fixture
def gpu(monkeypatch):
    """A machine that has Triton and an sm_90."""
    monkeypatch.setattr(machine, "problem_with_triton", lambda: None)
    monkeypatch.setattr(machine.here, "capability", lambda index: (9, 0), raising=False)
    monkeypatch.setattr(cuda, "_unusable", lambda problem: "there is no nvcc")


@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 65), (40, 130), (5, 7), (1100, 70)])
def test_pairs_there_and_back(shape):
    n, k = shape
    packed = random_packed(n, k, E2M1)
    pairs = layout.to_layout(packed, "pairs")
    assert list(pairs.codes.shape) == codes_shape(n, k, "pairs") and torch.equal(
        layout.to_layout(pairs, "row").codes, packed.codes
    )
    for name in ("tiled", "units"):
        other = layout.to_layout(pairs, name)
        assert torch.equal(other.codes, layout.to_layout(packed, name).codes)
        assert torch.equal(layout.to_layout(other, "pairs").codes, pairs.codes)
    half, values = -(-n // 2), unpack(packed.codes, k)
    bytes = pairs.codes.view(half, -1)
    assert torch.equal(bytes[:, :k] & 15, values[:half]) and torch.equal((bytes >> 4)[: n - half, :k], values[half:])
    assert not bytes[:, k:].any() and not (bytes >> 4)[n - half :].any()
    ids = torch.randint(0, n, (3, 5))
    assert torch.equal(layout.code_rows(pairs.codes, ids, k), values[ids])


def test_codes_of_another_weight_are_refused():
    with pytest.raises(BadInput, match="do not hold 17 x 65"):
        layout.unshuffle_codes(layout.to_layout(random_packed(16, 64, E2M1), "pairs").codes, 17, 65)


def test_refusals_are_sentences(gpu, monkeypatch):
    assert "tensors are on cpu" in refuse(GEMV, device="cpu")
    assert refuse(GEMV) is refuse(GEMM) is None
    assert "m = 17" in refuse(GEMV, m=17) and refuse(GEMM, m=17) is None
    assert "float64" in refuse(GEMM, dtype=torch.float64)
    assert "int32" in refuse(GEMM, k=2 * 10**7)
    assert "weight groups of 24" in refuse(GEMM, activation=None, scale=E4M3, group_size=24)
    assert "activation groups of 24" in refuse(GEMM, dynamic=Dynamic(24, INTEGER))
    e3m4 = element("e3m4")
    assert "9 significant bits" in refuse(GEMM, activation=e3m4, dynamic=Dynamic(16, E4M3))
    assert refuse(GEMM, activation=e3m4, dynamic=Dynamic()) is None
    assert "n = 5000000" in refuse(GEMM, n=5_000_000)
    assert "m = 2000000000" in refuse(GEMM, m=2_000_000_000)
    monkeypatch.setattr(machine.here, "capability", lambda index: (7, 5))
    assert "sm_75" in refuse(GEMM)
    monkeypatch.setattr(machine.here, "capability", lambda index: None)
    assert "no GPU" in refuse(GEMM)
    monkeypatch.setattr(machine, "problem_with_triton", lambda: "Triton is not there")
    assert refuse(GEMM) == "Triton is not there"


@pytest.mark.parametrize(
    "problem",
    [
        dict(activation=None),
        dict(activation=E3M0, shift=True),
        dict(activation=element("e4m3"), dynamic=Dynamic()),
        dict(activation=element("e1m6"), dynamic=Dynamic(), scale=E4M3, group_size=16),
    ],
    ids=str,
)
def test_without_the_cuda_module_a_gpu_runs_triton_on_pairs(problem, gpu):
    problem = Problem(**{**vars(PROBLEM), **problem})
    assert choose(problem).name == "triton.gemv" and layout_for(problem) == "pairs"


@pytest.mark.parametrize("m", [1, 16, 17, 10_000])
def test_every_recipe_runs_on_triton_alone(m, gpu):
    for recipe in RECIPES.values():
        for dtype in triton.DTYPES:
            problem = Problem.of_recipe(recipe, m, 4099, 2050, dtype=dtype, device="cuda")
            assert choose(problem).name == ("triton.gemv" if m <= 16 else "triton.gemm"), recipe.name


def test_forcing_a_row_raises_its_refusal(monkeypatch):
    monkeypatch.setenv(FORCE, "triton.gemm")
    with pytest.raises(NoKernel, match="triton.gemm refuses m = 1, n = 64, k = 64: runs on a GPU"):
        choose(Problem(1, 64, 64, E2M1, E2M1))
    assert layout_for(Problem(1, 64, 64, E2M1, E2M1)) in ("tiled", "row")


def test_a_forced_row_decides_the_layout(gpu, monkeypatch):
    monkeypatch.setattr(cuda, "_unusable", lambda problem: None)
    monkeypatch.setattr(cuda.machine, "capability", lambda index: (8, 0))
    assert layout_for(PROBLEM) == "units"
    monkeypatch.setenv(FORCE, "triton.gemm")
    assert layout_for(PROBLEM) == "pairs"


def test_without_triton_its_rows_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    machine.version.cache_clear()
    machine.problem_with_triton.cache_clear()
    try:
        answers = dict(explain(PROBLEM))
    finally:
        machine.version.cache_clear()
        machine.problem_with_triton.cache_clear()
    assert "pip install triton" in answers["triton.gemv"] and "pip install triton" in answers["triton.gemm"]


def test_an_old_triton_is_refused(monkeypatch):
    machine.problem_with_triton.cache_clear()
    monkeypatch.setattr(machine, "version", lambda: (3, 1))
    assert machine.problem_with_triton() == "Triton 3.1 is older than 3.6"
    machine.problem_with_triton.cache_clear()


def test_triton_is_not_imported_before_a_gpu_asks():
    code = "import sys, llmfp4_kernels.registry, llmfp4_kernels.nn; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_info_names_tritons_version():
    versions = environment.machine()["versions"]
    assert "triton" in versions and (versions["triton"] is None) == (machine.problem_with_triton() is not None)


@pytest.mark.parametrize("activation", [None, E2M1], ids=str)
def test_every_number_of_tokens_has_a_tile(activation):
    for m in (1, 16, 17, 64, 65, 10**6):
        form = Form.of("gemm", Problem(m, 4096, 4096, E2M1, activation))
        for arch, version in (((8, 0), (3, 6)), ((9, 0), (3, 6)), ((9, 0), (3, 9)), ((12, 0), (3, 6))):
            config = configs.choose(form, m, arch, version, 132)
            assert configs.refusal(config, form, arch, version) is None, (m, arch, version)
    with pytest.raises(StopIteration):
        configs.choose(Form.of("gemv", Problem(17, 64, 64, E2M1)), 17, (8, 0), (3, 6), 132)


def test_splits_fill_a_gpu_and_keep_their_steps():
    for n, k, shared in ((4096, 4096, True), (2 << 20, 4096, False), (128, 64, False)):
        config = configs.choose(Form.of("gemv", Problem(1, n, k, E2M1, E2M1)), 1, (8, 0), (3, 6), 132)
        assert (config.splits > 1) == shared
        assert config.splits == 1 or configs.steps(config, k) >= 4 * config.splits


@pytest.mark.parametrize(
    ("changes", "version", "sentence"),
    [
        (dict(rows=48), (3, 9), "rows = 48 is none of 32, 64"),
        (dict(tokens=4), (3, 9), "tokens = 4 is none of"),
        (dict(block_k=32), (3, 9), "block_k = 32 is none of"),
        (dict(warps=3), (3, 9), "warps = 3 is none of"),
        (dict(stages=0), (3, 9), "stages = 0 are not 1 to 8"),
        (dict(rows=32), (3, 9), "4 warps would multiply some of 32 rows twice"),
        (dict(splits=0), (3, 9), "splits = 0 of k = 200 are not 1 to 2, its steps"),
        (dict(splits=3), (3, 9), "splits = 3 of k = 200"),
        (dict(), (3, 6), "4 warps use tcgen05, before which Triton 3.6 forgets a fence"),
    ],
    ids=str,
)
def test_tiles_that_do_not_run_are_refused(changes, version, sentence):
    form = Form.of("gemm", Problem(40, 64, 200, E2M1))
    tile = configs.Config(rows=64, tokens=32, block_k=128, warps=4, stages=3, splits=2)
    for capability, right in (((10, 0), (3, 9)), ((9, 0), (3, 6)), ((8, 0), (3, 6))):
        assert configs.refusal(tile, form, capability, right) is None
    assert sentence in configs.refusal(dataclasses.replace(tile, **changes), form, (10, 0), version)


def test_a_family_may_be_forced(gpu, monkeypatch):
    monkeypatch.setattr(cuda, "_unusable", lambda problem: None)
    monkeypatch.setattr(cuda.machine, "capability", lambda index: (8, 0))
    monkeypatch.setenv(FORCE, "triton")
    many = dataclasses.replace(PROBLEM, m=17)
    assert choose(PROBLEM).name == "triton.gemv" and choose(many).name == "triton.gemm"
    assert layout_for(PROBLEM) == "pairs"
    with pytest.raises(NoKernel, match="LLMFP4_KERNEL=triton refuses .*triton.gemv: runs on a GPU.*triton.gemm: runs"):
        choose(dataclasses.replace(PROBLEM, device="cpu"))
    monkeypatch.setenv(FORCE, "trit")
    with pytest.raises(NoKernel, match="LLMFP4_KERNEL=trit names no kernel: known are "):
        choose(PROBLEM)


@pytest.mark.skipif(machine.problem_with_triton() is not None, reason=machine.problem_with_triton() or "")
def test_the_gpu_stage_compiles_few_kernels(monkeypatch):
    """What test_gpu_triton.py asks Triton for, counted without compiling."""
    import test_gpu_triton
    from triton.runtime.jit import JITFunction
    from triton_on_cpu import OnCpu

    compiled = set()

    class Kernel:
        packed_metadata = function = None
        run = launch_metadata = staticmethod(lambda *_: None)

    def compile(self, key, *_, **__):
        compiled.add((self.__name__, str(key)))
        return Kernel()

    def runs(packed, x, bias=None):
        prepared = triton.KERNELS[0].prepare(packed, bias)
        for kernel in triton.KERNELS:
            if kernel.refusal(Problem.of(packed, len(x), x.dtype)) is None:
                prepared.run(kernel, x)
        return iter(())

    monkeypatch.setattr(JITFunction, "_do_compile", compile)
    monkeypatch.setattr(triton, "_unusable", lambda problem: None)
    monkeypatch.setattr(test_gpu_triton, "runs", runs)
    for bound in ("exact_and_bound", "fp8_bound"):
        monkeypatch.setattr(test_gpu_triton, bound, lambda *_, **__: (0.0, 0.0))
    monkeypatch.setattr(reference, "gemm", lambda x, *_: x)
    monkeypatch.setattr(reference, "stored_weight", lambda packed: torch.zeros(1, packed.k, dtype=torch.float64))
    with OnCpu((9, 0), multiprocessors=132, config=None, static=True):
        for kind in (
            "static_integers",
            "dynamic_integers",
            "floats",
            "activations_that_are_no_integers",
            "8_bit_floats",
        ):
            test = getattr(test_gpu_triton, f"test_{kind}")
            (mark,) = test.pytestmark
            for values in mark.args[1]:
                test(*values) if isinstance(mark.args[0], tuple) else test(values)
    assert 0.9 * test_gpu_triton.COMPILED < len(compiled) <= test_gpu_triton.COMPILED, len(compiled)
