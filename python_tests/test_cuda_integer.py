"""The integer CUDA kernels, as PTX on the CPU, through the real Python path: bit-equal to the reference.

Every access is checked: bounds, alignment, races, waits, memory read before it is written, outputs not written.
"""

import dataclasses

import pytest
import torch
from cases import ELEMENT_PAIRS, ODD_SHAPES, random_packed, random_x, same_bits
from cuda_on_cpu import OnCpu, all_kernels
from ptx import missing
from test_dynamic import INTEGER_ACTIVATIONS, dynamic_packed, wild_x

from llmfp4_kernels import native, reference
from llmfp4_kernels.backends import cuda
from llmfp4_kernels.errors import BadInput, NoKernel
from llmfp4_kernels.formats import E1M2, E2M1, E3M0, INTEGER, Dynamic
from llmfp4_kernels.problem import Problem
from llmfp4_kernels.registry import choose

WHY_NOT = missing() or native.problem_with_cuda()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["cuda.gemv", "cuda.sm80"]


@pytest.fixture(scope="module")
def programs():
    return all_kernels()


def takes(name, packed, m, dtype=torch.float32):
    """Whether a row takes a problem, were it on a GPU."""
    kernel = next(kernel for kernel in cuda.KERNELS if kernel.name == name)
    return kernel.refusal(dataclasses.replace(Problem.of(packed, m, dtype), device="cuda")) is None


def check(gpu, packed, x, bias=None, names=NAMES):
    prepared, expected = cuda.Prepared(packed, bias), reference.gemm(x.reshape(-1, packed.k), packed, bias).to(x.dtype)
    run = [name for name in names if takes(name, packed, len(x), x.dtype)]
    for name in run:
        y = gpu.run(prepared, name, x)
        assert same_bits(y, expected), (name, list(x.shape), packed.shape, x.dtype)
    return run


@pytest.mark.parametrize("pair", ELEMENT_PAIRS, ids=lambda p: f"{p[0].name}x{p[1].name}")
def test_static_activations(pair, programs):
    element, activation = pair
    with OnCpu(programs, multiprocessors=8) as gpu:
        for i, (m, n, k) in enumerate(ODD_SHAPES):
            packed = random_packed(n, k, element, activation, shift=i % 2 == 0)
            assert "cuda.sm80" in check(gpu, packed, random_x(m, k, DTYPES[i % 3]), torch.randn(n) if i % 4 else None)


@pytest.mark.parametrize(("activation", "dynamic"), [a for a in INTEGER_ACTIVATIONS if a[1].group_size != 24], ids=str)
def test_dynamic_activations(activation, dynamic, programs):
    with OnCpu(programs, multiprocessors=4) as gpu:
        for weight, dtype, (m, n, k) in zip((E2M1, E1M2, E3M0), DTYPES, [(1, 24, 66), (7, 33, 40), (40, 130, 1031)]):
            packed = dynamic_packed(n, k, weight, activation, dynamic, smooth=m != 7)
            assert check(gpu, packed, wild_x(m, k, dtype), random_x(1, n, seed=5)[0])


@pytest.mark.parametrize("m", [1, 2, 8, 9, 16, 17, 33, 65, 130])
def test_every_instance_and_split_over_k(m, programs):
    """Many multiprocessors to fill: blocks share a sum over k, and the last one adds it up. A random schedule."""
    packed = random_packed(150, 2100, E2M1, E2M1, True)
    for multiprocessors, seed in ((1, 1), (132, 2)):
        with OnCpu(programs, multiprocessors, seed) as gpu:
            run = check(gpu, packed, random_x(m, 2100, torch.bfloat16), torch.randn(150))
            assert run == (NAMES if m <= 16 else ["cuda.sm80"])


@pytest.mark.parametrize("seed", range(1, 4))
def test_any_schedule_of_threads(seed, programs):
    packed = dynamic_packed(40, 530, E2M1, E2M1, Dynamic(32, INTEGER))
    with OnCpu(programs, 16, seed) as gpu:
        check(gpu, packed, wild_x(5, 530, torch.float16))
        check(gpu, packed, wild_x(20, 530, torch.float32))


def test_more_inputs_than_one_pass_of_a_block_holds(programs):
    packed = dynamic_packed(17, 9000, E2M1, E2M1, Dynamic(16, INTEGER))
    with OnCpu(programs) as gpu:
        check(gpu, packed, wild_x(3, 9000, torch.bfloat16))
        check(gpu, random_packed(17, 17000, E2M1, E2M1, True), random_x(2, 17000))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dynamic", [None, Dynamic(), Dynamic(16, INTEGER)], ids=str)
def test_a_bad_token_poisons_its_row_only(bad, dynamic, programs):
    packed = dynamic_packed(40, 70, E2M1, E2M1, dynamic) if dynamic else random_packed(40, 70, E2M1, E2M1, True)
    x = random_x(20, 70)
    x[3, 69] = bad
    with OnCpu(programs) as gpu:
        check(gpu, packed, x)
        check(gpu, packed, x[:5])


def test_large_sums_stay_exact(programs):
    packed = random_packed(17, 4000, E2M1, E2M1, True)
    packed.codes = torch.full_like(packed.codes, 0x77)
    packed.shift = torch.zeros(4000, dtype=torch.uint8)
    with OnCpu(programs) as gpu:
        check(gpu, packed, torch.full((17, 4000), 1e6))


def test_strided_misaligned_and_shaped_inputs(programs):
    packed = random_packed(24, 66, E1M2, E2M1, True)
    wide = random_x(40, 132)
    with OnCpu(programs) as gpu:
        for x in (wide[:, ::2], wide[::2, :66], random_x(66, 20).T):
            check(gpu, packed, x)
        at_odd = torch.empty(20 * 66 + 1, dtype=torch.bfloat16)[1:].view(20, 66)  # at 2 bytes past 16
        check(gpu, packed, at_odd.copy_(random_x(20, 66)))
        y = gpu.run(cuda.Prepared(packed, None), "cuda.sm80", random_x(6, 66).view(2, 3, 66))
        assert same_bits(y.view(6, 24), reference.gemm(random_x(6, 66), packed)) and y.shape == (2, 3, 24)
        empty = gpu.run(cuda.Prepared(packed, None), "cuda.gemv", torch.empty(0, 66))
        assert empty.shape == (0, 24) and gpu.launched == []


def test_twice_the_same_bits(programs):
    packed, x = dynamic_packed(70, 600, E2M1, E2M1, Dynamic(16, INTEGER)), wild_x(9, 600)
    results = []
    for multiprocessors in (1, 8, 64):
        with OnCpu(programs, multiprocessors) as gpu:
            results += [gpu.run(cuda.Prepared(packed, None), name, x) for name in NAMES for _ in range(2)]
    assert all(same_bits(results[0], y) for y in results)


def test_counters_made_while_a_graph_is_captured_are_that_graphs(programs):
    packed, x = random_packed(40, 2100, E2M1, E2M1, True), random_x(5, 2100)
    with OnCpu(programs, multiprocessors=64) as gpu:
        for capturing, kept in ((True, 0), (False, 1), (True, 1)):
            gpu.machine.capturing = lambda capturing=capturing: capturing
            assert same_bits(gpu.run(cuda.Prepared(packed, None), "cuda.sm80", x), reference.gemm(x, packed))
            assert gpu.prepared.plans["sm80", 5, 0].splits > 1
            assert sum(len(known) for known in cuda._counters.values()) == kept


@pytest.mark.parametrize("x", [random_x(64, 5).T, random_x(1, 5 * 64 + 1)[0, 1:].view(5, 64)], ids=["strided", "odd"])
def test_a_copied_x_of_the_shape_of_y(x, programs):
    packed = random_packed(64, 64, E2M1, E2M1, True)
    with OnCpu(programs) as gpu:
        for name in ("cuda.gemv", "cuda.sm80"):
            assert same_bits(gpu.run(cuda.Prepared(packed, None), name, x), reference.gemm(x, packed))


def test_refusals_are_sentences(monkeypatch):
    problem = Problem(1, 64, 64, E2M1, E2M1, device="cuda")
    gemv, _, sm80 = cuda.KERNELS
    assert "tensors are on cpu" in gemv.refusal(Problem(1, 64, 64, E2M1, E2M1))
    capability = {"value": None}
    monkeypatch.setattr(cuda.machine, "capability", lambda index: capability["value"], raising=False)
    assert "no GPU" in gemv.refusal(problem)
    capability["value"] = (7, 5)
    assert "sm_75" in gemv.refusal(problem)
    capability["value"] = (9, 0)
    assert gemv.refusal(problem) is None and sm80.refusal(problem) is None
    assert choose(problem).name == "cuda.gemv"
    refuse = lambda kernel, **kw: kernel.refusal(Problem(**{**vars(problem), **kw}))  # noqa: E731
    assert "17 rows" in refuse(gemv, m=17) and refuse(sm80, m=17) is None
    assert "18 rows" in refuse(gemv, m=9, activation=E3M0, shift=True)
    assert "float64" in refuse(sm80, dtype=torch.float64)
    assert "int32" in refuse(sm80, k=2 * 10**7)
    assert "24" in refuse(sm80, dynamic=Dynamic(24, INTEGER))
    monkeypatch.setattr(native, "problem_with_cuda", lambda: "built without nvcc")
    assert gemv.refusal(problem) == "built without nvcc"


def test_wrong_tensors_are_refused_before_a_launch(programs):
    packed = random_packed(32, 64, E2M1, E2M1, True)
    with pytest.raises(NoKernel, match="codes are on cpu"):
        cuda.Prepared(packed, None)
    with OnCpu(programs) as gpu:
        prepared = cuda.Prepared(packed, None)
        with pytest.raises(BadInput, match="x is on meta"):
            gpu.run(prepared, "cuda.gemv", torch.empty(1, 64, device="meta"))
        with pytest.raises(ValueError, match="up to 16 rows, not 17"):
            gpu.run(prepared, "cuda.gemv", random_x(17, 64))
        odd = torch.empty(512 * 2 + 1, dtype=torch.uint8)[1:].view(2, 1, 32, 16)
        with pytest.raises(ValueError, match="no multiple of 16 bytes"):
            native.module().CudaLinear(n=32, k=64, element=(2, 1, 1, 0), codes=odd.data_ptr(), row_scale=0)
        assert gpu.launched == []
