"""The Triton kernels on the GPU that is here: `make gpu-check`. Skipped without one.

Most of its time is compilation: COMPILED kernels at most, beside those of the tuner. Each type of operands meets every
tile of the table, with and without splits and multiples of 16; elements and groups share those out.
"""

import dataclasses

import pytest
import torch
from cases import GROUP_SCALES, random_packed, random_x, same_bits
from test_cuda_float import exact_and_bound
from test_cuda_fp8 import exact_and_bound as fp8_bound
from test_cuda_fp8 import packed_of
from test_dynamic import FLOAT_ACTIVATIONS, INTEGER_ACTIVATIONS, dynamic_packed, wild_x

from llmfp4_kernels import FP4Linear, reference, registry
from llmfp4_kernels.backends import triton
from llmfp4_kernels.backends.triton import machine
from llmfp4_kernels.formats import E1M2, E2M1, E3M0, E4M3FN, INTEGER, Dynamic
from llmfp4_kernels.problem import Problem

NO_GPU = None if torch.cuda.is_available() else "there is no GPU that torch can use"
WHY_NOT = NO_GPU or machine.problem_with_triton()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
COMPILED = 108
"""test_triton_rows.py counts them."""
SHAPES = [(9, 70, 515), (33, 65, 70), (1, 4096, 4096), (300, 512, 4104)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS, *GROUPS = GROUP_SCALES
FEW = SHAPES[::3]


@pytest.fixture(autouse=True)
def no_errors_left():
    yield
    torch.cuda.synchronize()


def runs(packed, x, bias=None):
    """(row's name, y on the CPU) of each row; twice, with the same bits. Both rows run, triton.gemv up to 16 tokens."""
    on_gpu, x = packed.to("cuda"), x.cuda()
    prepared, ran = None, []
    for kernel in triton.KERNELS:
        if kernel.refusal(Problem.of(on_gpu, len(x), x.dtype)) is None:
            prepared = prepared or kernel.prepare(on_gpu, None if bias is None else bias.cuda())
            y = prepared.run(kernel, x).cpu()
            assert same_bits(prepared.run(kernel, x).cpu(), y), f"{kernel.name}: other bits the second time"
            ran.append(kernel.name)
            yield kernel.name, y
    assert ran == ["triton.gemv"] * (len(x) <= 16) + ["triton.gemm"], f"m = {len(x)}, {packed.shape}: {ran}"


@pytest.mark.parametrize(("element", "activation"), [(E2M1, E2M1), (E1M2, E1M2), (E3M0, E3M0)], ids=lambda e: e.name)
def test_static_integers(element, activation):
    for i, (m, n, k) in enumerate(FEW if element == E1M2 else SHAPES):
        packed, bias = random_packed(n, k, element, activation, shift=i % 2 == 0), torch.randn(n)
        x = random_x(m, k, DTYPES[i % 3])
        expected = reference.gemm(x, packed, bias).to(x.dtype)
        for name, y in runs(packed, x, bias):
            assert same_bits(y, expected), (name, m, n, k)


@pytest.mark.parametrize(("activation", "dynamic"), [a for a in INTEGER_ACTIVATIONS if a[1].group_size != 24], ids=str)
def test_dynamic_integers(activation, dynamic):
    for i, (m, n, k) in enumerate([(1, 24, 66), (40, 130, 1031), (16, 512, 9000), (130, 512, 4096)]):
        packed, x = dynamic_packed(n, k, E2M1, activation, dynamic), wild_x(m, k, DTYPES[i % 3])
        expected = reference.gemm(x, packed).to(x.dtype)
        for name, y in runs(packed, x):
            assert same_bits(y, expected), (name, m, n, k)


@pytest.mark.parametrize(("group", "dtype"), [*((ROWS, d) for d in DTYPES), *zip(GROUPS, reversed(DTYPES))], ids=str)
def test_floats(group, dtype):
    """Tensor cores add with fewer bits than fp32: 2^-21 of Σ|x·w| a step of 16, plus what test_cuda_float allows."""
    for m, n, k in SHAPES if group == ROWS else FEW:
        packed, bias = random_packed(n, k, E2M1, scale=group[0], group_size=group[1]), torch.randn(n)
        x = random_x(m, k, dtype) / (1024 if dtype == torch.float16 else 1)
        exact, bound = exact_and_bound(packed, x, bias)
        bound += (k / 16 + 8) * 2.0**-21 * (x.double().abs() @ reference.stored_weight(packed).abs().T)
        for name, y in runs(packed, x, bias):
            assert ((y.double() - exact).abs() <= bound).all(), (name, m, n, k, (y.double() - exact).abs().max())


@pytest.mark.parametrize(("activation", "dynamic"), FLOAT_ACTIVATIONS, ids=str)
def test_activations_that_are_no_integers(activation, dynamic):
    packed, x = dynamic_packed(512, 4096, E2M1, activation, dynamic), wild_x(20, 4096)
    expected = reference.gemm(x, packed)
    for name, y in runs(packed, x):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item(), msg=name)


@pytest.mark.parametrize("group", [0, 32])
def test_8_bit_floats(group):
    """On GPUs that fp8.py does not name they are multiplied as bf16, within the same bound."""
    from llmfp4_kernels.backends.judge import loss_in_14_bits

    for i, (m, n, k) in enumerate(SHAPES):
        packed, bias = packed_of(n, k, E2M1, E4M3FN, dynamic=i % 2, seed=i, group=group), torch.randn(n)
        x = wild_x(m, k, DTYPES[i % 2])
        exact, bound = fp8_bound(packed, x, bias, error=loss_in_14_bits)
        for name, y in runs(packed, x, bias):
            assert ((y.double() - exact).abs() <= bound).all(), (name, m, n, k, (y.double() - exact).abs().max())


@pytest.mark.parametrize("problem", [Problem(1, 1024, 4096, E2M1, E2M1), Problem(40, 1000, 2056, E2M1)], ids=str)
def test_tiles_are_tuned_and_used(problem, monkeypatch, tmp_path):
    """Tiles may not fit this GPU; none is wrong."""
    from llmfp4_kernels.backends import measured
    from llmfp4_kernels.backends.graphs import Stopwatch
    from llmfp4_kernels.backends.triton import tune, tuned

    monkeypatch.setenv(measured.FOLDER, str(tmp_path))
    problem, device = dataclasses.replace(problem, device="cuda", dtype=torch.bfloat16), torch.device("cuda")
    row, left_out = tune.tune(problem, Stopwatch(device), device, 8)
    assert not [why for _, why in left_out if "reference" in why]
    assert 1 < row.timed <= row.candidates and 0 < row.seconds <= row.guess_seconds
    tuned.put(row, device)
    assert tuned.choose(row.form, problem.m, device).config == row.config
    packed, x = (
        random_packed(problem.n, problem.k, E2M1, problem.activation),
        random_x(problem.m, problem.k, torch.bfloat16),
    )
    for _, y in runs(packed, x):
        torch.testing.assert_close(y.float(), reference.gemm(x, packed), rtol=2**-7, atol=0.5)


def test_a_layer_on_triton_alone(monkeypatch):
    monkeypatch.setenv(registry.FORCE, "triton")
    packed, x = dynamic_packed(512, 4096, E2M1, E2M1, Dynamic(16, INTEGER)), random_x(4, 4096, torch.bfloat16)
    layer = FP4Linear.from_packed(packed.to("cuda"))
    assert same_bits(layer(x.cuda()).cpu(), reference.gemm(x, packed).to(x.dtype))
    assert layer.codes.ndim == 1 and torch.equal(layer.state_dict()["codes"].cpu(), packed.codes)
    graph, x = torch.cuda.CUDAGraph(), x.cuda()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(random_x(4, 4096, torch.bfloat16, 3))
    graph.replay()
    assert same_bits(y.cpu(), reference.gemm(x.cpu(), packed).to(y.dtype))
