"""The shift on the weights, and packed activations: rows of backends/cuda_options.py, bit-equal to the reference."""

import dataclasses

import pytest
import torch
from cases import ODD_SHAPES, random_packed, random_x, same_bits
from cuda_on_cpu import OnCpu, all_kernels
from ptx import missing
from test_cuda_float import exact_and_bound
from test_dynamic import dynamic_packed, wild_x

from llmfp4_kernels import native, reference, registry
from llmfp4_kernels.backends import cuda, cuda_options
from llmfp4_kernels.errors import NoKernel
from llmfp4_kernels.formats import E1M2, E2M1, E3M0, E4M3, INTEGER, Dynamic, element
from llmfp4_kernels.problem import Problem

WHY_NOT = missing() or native.problem_with_cuda()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GEMV, SM80, PACKED = (k for k in cuda_options.KERNELS if k.name != "cuda.sm90-fast-sums")  # test_cuda_fp8.py's
DEFAULT_OF = {GEMV: "cuda.gemv", SM80: "cuda.sm80", PACKED: "cuda.sm80"}


@pytest.fixture(scope="module")
def programs():
    return all_kernels()


def refusal(kernel, packed, m, dtype=torch.float32):
    """Of a problem, were it on a GPU."""
    return kernel.refusal(dataclasses.replace(Problem.of(packed, m, dtype), device="cuda"))


def check(gpu, packed, x, bias=None):
    """Runs every row that takes the problem, and the one with the shift on the other side; returns their names."""
    prepared, expected = cuda.Prepared(packed, bias), reference.gemm(x, packed, bias).to(x.dtype)
    ran = []
    for kernel in DEFAULT_OF:
        if refusal(kernel, packed, len(x), x.dtype) is None:
            for name in (kernel.name, DEFAULT_OF[kernel]):
                assert same_bits(gpu.run(prepared, name, x), expected), (name, list(x.shape), packed.shape, x.dtype)
            ran.append(kernel.name)
    return ran


@pytest.mark.parametrize("weight", [E2M1, E1M2], ids=lambda e: e.name)
@pytest.mark.parametrize("activation", [E2M1, E1M2], ids=lambda e: e.name)
def test_shift_on_weights_is_the_shift_on_activations(weight, activation, programs):
    with OnCpu(programs, multiprocessors=8) as gpu:
        for i, (m, n, k) in enumerate(ODD_SHAPES):
            packed = random_packed(n, k, weight, activation, True, seed=i)
            ran = check(gpu, packed, random_x(m, k, DTYPES[i % 3]), torch.randn(n) if i % 2 else None)
            assert ran == [kernel.name for kernel in DEFAULT_OF if m <= 16 or kernel != GEMV]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shift_on_bf16_weights_is_the_shift_on_floats(dtype, programs):
    """Within the bound of fp32 sums, and where k is not split the bits of the row that multiplies x by 2^-shift."""
    for i, (m, n, k) in enumerate([*ODD_SHAPES, (3, 40, 2104), (16, 40, 2104), (130, 24, 72)]):
        packed = random_packed(n, k, [E2M1, E1M2, E3M0][i % 3], shift=True, seed=i)
        packed.shift = (packed.shift * 5 + torch.arange(k) % 2).clamp(max=15).to(torch.uint8)
        bias, x = torch.randn(n) if i % 2 else None, random_x(m, k, dtype)
        exact, bound = exact_and_bound(packed, x, bias)
        with OnCpu(programs, multiprocessors=64, seed=1) as gpu:
            for kernel in (GEMV, SM80):
                if refusal(kernel, packed, m, dtype) is None:
                    y = gpu.run(cuda.Prepared(packed, bias), kernel.name, x)
                    assert ((y.double() - exact).abs() <= bound).all(), (kernel.name, m, n, k)
        with OnCpu(programs, multiprocessors=1) as gpu:
            y, other = (gpu.run(cuda.Prepared(packed, bias), name, x) for name in (SM80.name, "cuda.sm80"))
            assert same_bits(y, other), (m, n, k)


def test_every_weight_meets_every_shift(programs):
    """Column k holds code k / 4 and shift k % 4; tokens pick one column each."""
    packed = random_packed(16, 64, E2M1, E2M1, True)
    packed.codes = torch.stack([torch.arange(32) // 2 * 17] * 16).to(torch.uint8)
    packed.shift = (torch.arange(64) % 4).to(torch.uint8)
    packed.row_scale, packed.x_scale = torch.ones(16), torch.tensor(1.0)
    x = torch.diag(torch.ldexp(torch.full((64,), 6.0), -packed.shift.int()))
    with OnCpu(programs) as gpu:
        assert check(gpu, packed, x)[-2:] == [SM80.name, PACKED.name]
        y = gpu.run(cuda.Prepared(packed, None), PACKED.name, x)
    expected = torch.ldexp(torch.tensor(E2M1.values)[torch.arange(64) // 4] * 6, -packed.shift.int())
    assert torch.equal(y, expected[:, None].expand(64, 16))


@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 65, 130])
def test_every_instance_and_split_over_k(m, programs):
    packed = random_packed(150, 2100, E2M1, E2M1, True)
    for multiprocessors, seed in ((1, 1), (132, 2)):
        with OnCpu(programs, multiprocessors, seed) as gpu:
            assert check(gpu, packed, random_x(m, 2100, torch.bfloat16), torch.randn(150))


@pytest.mark.parametrize("activation", [E2M1, E1M2, E3M0], ids=lambda e: e.name)
def test_packed_activations_without_a_shift(activation, programs):
    """Every code of the element occurs, -0 too; static and per token; any element of the weight."""
    with OnCpu(programs, multiprocessors=4) as gpu:
        for weight, (m, n, k) in zip((E2M1, E1M2, E3M0), [(1, 24, 66), (33, 40, 135), (40, 130, 1031)]):
            x = torch.cat([wild_x(m, k)[:, :-16], torch.tensor([activation.values]).expand(m, -1) * -0.37], 1)
            static, token = random_packed(n, k, weight, activation), dynamic_packed(n, k, weight, activation, Dynamic())
            for packed in (static, token):
                assert check(gpu, packed, x) == [PACKED.name]
            codes = set(reference.quantize_activation(x, static).flatten().tolist())
            assert codes | {activation.sign_code} == set(range(16))  # the kernel writes -0 where the reference has 0


def test_packed_activations_take_half_the_memory(programs):
    packed, x = random_packed(40, 256, E2M1, E2M1, True), random_x(20, 256)
    with OnCpu(programs) as gpu:
        prepared = cuda.Prepared(packed, None)
        for kernel, bytes in ((SM80, 20 * 256), (PACKED, 20 * 128)):
            gpu.run(prepared, kernel.name, x)
            plan = prepared.plans[kernel.name.removeprefix("cuda."), 20, cuda.DTYPES[x.dtype]]
            assert plan.parts[0] == bytes


def test_a_bad_token_poisons_its_row_only(programs):
    packed, x = random_packed(40, 70, E2M1, E2M1, True), random_x(20, 70)
    x[3, 69] = float("nan")
    with OnCpu(programs) as gpu:
        check(gpu, packed, x)


def test_refusals_are_sentences(monkeypatch):
    monkeypatch.setattr(cuda.machine, "capability", lambda index: (9, 0), raising=False)
    problem = Problem(20, 64, 64, E2M1, E2M1, shift=True, device="cuda")
    refuse = lambda kernel, **kw: kernel.refusal(dataclasses.replace(problem, **kw))  # noqa: E731
    assert refuse(SM80) is None and refuse(PACKED) is None and "20 rows" in refuse(GEMV)
    assert "these have none" in refuse(SM80, shift=False) and refuse(PACKED, shift=False) is None
    assert "up to 7, weights take up to 3" in refuse(PACKED, activation=E3M0)
    assert "up to 512, beyond int8" in refuse(SM80, element=E3M0)
    assert "these are e1m6" in refuse(PACKED, activation=element("e1m6"), shift=False, dynamic=Dynamic())
    assert "these are torch.bfloat16" in refuse(PACKED, activation=None, dtype=torch.bfloat16)
    assert "scales of 16 inputs" in refuse(PACKED, shift=False, dynamic=Dynamic(16, INTEGER))
    assert "weights have e4m3 scales of 16" in refuse(SM80, scale=E4M3, group_size=16)
    floats = dict(activation=None, dtype=torch.bfloat16)
    assert refuse(SM80, **floats) is None
    assert "torch.float16" in refuse(SM80, **floats | dict(dtype=torch.float16))
    assert "another factor" in refuse(SM80, **floats, x_factor=True)
    assert "tensors are on cpu" in refuse(SM80, device="cpu")


def test_rows_run_where_they_are_forced_only(monkeypatch):
    monkeypatch.setattr(cuda.machine, "capability", lambda index: (8, 0), raising=False)
    problem = Problem(20, 64, 64, E2M1, E2M1, shift=True, device="cuda")
    assert registry.choose(problem).name == "cuda.sm80"
    for kernel in (SM80, PACKED):
        monkeypatch.setenv(registry.FORCE, kernel.name)
        assert registry.choose(problem) == kernel
    monkeypatch.setenv(registry.FORCE, GEMV.name)
    with pytest.raises(NoKernel, match="20 rows"):
        registry.choose(problem)


def test_the_module_refuses_what_the_registry_refuses(programs):
    wide = dynamic_packed(32, 64, E2M1, element("e1m6"), Dynamic())
    for packed in (random_packed(32, 64, E3M0, E2M1, True), random_packed(32, 64, E2M1), wide):
        with OnCpu(programs) as gpu:
            with pytest.raises(ValueError, match="'sm80-packed' does not take these activations"):
                gpu.run(cuda.Prepared(packed, None), PACKED.name, random_x(17, 64))
            assert gpu.launched == []
