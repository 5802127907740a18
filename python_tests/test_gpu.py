"""The CUDA kernels on the GPU that is here: `make gpu-check`. Skipped without one."""

import pytest
import torch
from cases import ELEMENT_PAIRS, GROUP_SCALES, ODD_SHAPES, random_packed, random_x, same_bits
from test_dynamic import INTEGER_ACTIVATIONS, dynamic_packed, wild_x

from llmfp4_kernels import FP4Linear, native, reference
from llmfp4_kernels.backends import cuda, cuda_options
from llmfp4_kernels.errors import BadInput
from llmfp4_kernels.formats import E1M2, E2M1, E4M3, E8M0, FP4_ELEMENTS, INTEGER, Dynamic, element
from llmfp4_kernels.problem import Problem

WHY_NOT = "there is no GPU that torch can use" if not torch.cuda.is_available() else native.problem_with_cuda()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
SHAPES = [*ODD_SHAPES, (1, 4096, 4096), (16, 2048, 4104), (128, 1000, 3000), (300, 512, 11008)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_errors_left():
    yield
    torch.cuda.synchronize()


def runs(packed, x, bias=None):
    """(row's name, y on the CPU) of each row that takes the problem; twice, with the same bits."""
    on_gpu = packed.to("cuda")
    prepared = cuda.Prepared(on_gpu, None if bias is None else bias.cuda())
    for kernel in cuda.KERNELS + cuda_options.KERNELS:
        if kernel.refusal(Problem.of(on_gpu, len(x), x.dtype)) is None:
            y = prepared.run(kernel, x.cuda()).cpu()
            assert same_bits(prepared.run(kernel, x.cuda()).cpu(), y), f"{kernel.name}: other bits the second time"
            yield kernel.name, y


@pytest.mark.parametrize("pair", ELEMENT_PAIRS, ids=lambda p: f"{p[0].name}x{p[1].name}")
def test_static_integers(pair):
    for i, (m, n, k) in enumerate(SHAPES):
        packed, bias = random_packed(n, k, *pair, shift=i % 2 == 0), torch.randn(n)
        x = random_x(m, k, DTYPES[i % 3])
        expected = reference.gemm(x, packed, bias).to(x.dtype)
        for name, y in runs(packed, x, bias):
            assert same_bits(y, expected), (name, m, n, k)


@pytest.mark.parametrize(("activation", "dynamic"), [a for a in INTEGER_ACTIVATIONS if a[1].group_size != 24], ids=str)
def test_dynamic_integers(activation, dynamic):
    for i, (m, n, k) in enumerate([(1, 24, 66), (7, 33, 40), (40, 130, 1031), (16, 512, 9000), (130, 512, 4096)]):
        packed, x = dynamic_packed(n, k, E2M1, activation, dynamic), wild_x(m, k, DTYPES[i % 3])
        expected = reference.gemm(x, packed).to(x.dtype)
        for name, y in runs(packed, x):
            assert same_bits(y, expected), (name, m, n, k)


@pytest.mark.parametrize("group", [*GROUP_SCALES, (E8M0, 16)], ids=lambda g: f"{g[0].name}-{g[1]}" if g[0] else "rows")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_floats(group, dtype):
    for i, (m, n, k) in enumerate(SHAPES):
        element = list(FP4_ELEMENTS.values())[i % 3]
        check_floats(m, dtype, random_packed(n, k, element, scale=group[0], group_size=group[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shifts_of_floats_on_either_side(dtype):
    for m, n, k in SHAPES:
        names = check_floats(m, dtype, random_packed(n, k, E2M1, shift=True))
        assert ("cuda.sm80-weight-shift" in names) == (dtype != torch.float16)


def check_floats(m, dtype, packed) -> list[str]:
    """Tensor cores add with fewer bits than fp32: 2^-21 of Σ|x·w| a step of 16, plus what test_cuda_float allows."""
    from test_cuda_float import exact_and_bound

    (n, k), ran = packed.shape, []
    x, bias = random_x(m, k, dtype) / (1024 if dtype == torch.float16 else 1), torch.randn(n)
    exact, bound = exact_and_bound(packed, x, bias)
    bound += (k / 16 + 8) * 2.0**-21 * (x.double().abs() @ reference.stored_weight(packed).abs().T)
    for name, y in runs(packed, x, bias):
        assert ((y.double() - exact).abs() <= bound).all(), (name, m, n, k, (y.double() - exact).abs().max())
        ran.append(name)
    return ran


@pytest.mark.parametrize("group", [(E8M0, 32), (E4M3, 16), (E4M3, 128)], ids=lambda g: f"{g[0].name}-{g[1]}")
def test_groups_of_integers(group):
    """Only the sum over groups rounds; groups of more than 64 are added in parts of 64, and blocks to each other."""
    from test_grouped import INT8, grouped, rounding

    for i, (m, n, k) in enumerate(SHAPES):
        packed, bias, x = grouped(n, k, E2M1, group, (INT8, Dynamic())), random_x(1, n, seed=5)[0], wild_x(m, k)
        x, half_ulp = x.to(DTYPES[i % 2]), [0.0, 2.0**-8][i % 2]
        exact = reference.gemm(x, packed, bias).double()
        bound = rounding(x, packed, bias, -(-k // min(group[1], 64)) + 64) + half_ulp * exact.abs()
        names = [name for name, y in runs(packed, x, bias) if ((y.double() - exact).abs() <= bound).all()]
        assert names == (["cuda.gemv", "cuda.sm80"] if m <= 16 else ["cuda.sm80"]), (m, n, k)


@pytest.mark.parametrize("activation", ["e4m3", "e4m3fn"])
def test_fp8_activations(activation):
    """Bounds that hold if Hopper cuts sums as test_ptx_fp8_sums.py has them."""
    from test_cuda_fp8 import FAST, exact_and_bound

    for i, (m, n, k) in enumerate([*ODD_SHAPES, (16, 2048, 4104)]):
        packed = random_packed(n, k, list(FP4_ELEMENTS.values())[i % 3], element(activation))
        x = random_x(m, k, DTYPES[i % 3])
        for name, y in runs(packed, x):
            exact, bound = exact_and_bound(packed, x, fast=name == FAST)
            assert ((y.double() - exact).abs() <= bound).all(), (name, m, n, k)


def test_the_tensor_core_keeps_14_bits_of_8_bit_floats():
    """Sums go to fp32 every 128 inputs: 1 counts beside 2^18 that is taken away later. Within 128 it does not."""
    from test_cuda_fp8 import FAST, SM90, cancelling

    packed, x = cancelling()
    found = dict(runs(packed, x))
    if SM90 in found:
        assert (found[SM90] == 128).all() and (found[FAST] == 0).all()


def test_graphs_replay_and_streams_do_not_meet():
    packed = dynamic_packed(512, 4096, E2M1, E2M1, Dynamic(16, INTEGER))
    layer = FP4Linear.from_packed(packed.to("cuda"))
    x = random_x(4, 4096, torch.bfloat16).cuda()
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for seed in (1, 2):
        x.copy_(random_x(4, 4096, torch.bfloat16, seed))
        graph.replay()
        assert same_bits(y.cpu(), reference.gemm(x.cpu(), packed).to(y.dtype))
    streams, results = [torch.cuda.Stream() for _ in range(4)], []
    torch.cuda.synchronize()
    for stream in streams * 8:
        with torch.cuda.stream(stream):
            results.append(layer(x))
    torch.cuda.synchronize()
    assert all(same_bits(r.cpu(), y.cpu()) for r in results)


def test_layers_move_between_devices():
    packed, x = random_packed(40, 130, E2M1, E2M1, True), random_x(9, 130)
    layer, expected = FP4Linear.from_packed(packed), reference.gemm(random_x(9, 130), packed)
    for device in ("cpu", "cuda", "cpu", "cuda"):
        layer = layer.to(device)
        assert same_bits(layer(x.to(device)).cpu(), expected)
        assert layer.kernel(9).startswith(f"{device}.")
        assert torch.equal(layer.state_dict()["codes"].cpu(), packed.codes)
    with pytest.raises(BadInput, match="x is on cpu"):
        layer(x)


def test_tensors_that_no_kernel_takes_run_on_the_reference():
    packed = random_packed(40, 130, E1M2, scale=E4M3, group_size=24)
    with pytest.warns(UserWarning, match="groups of 24"):
        y = FP4Linear.from_packed(packed.to("cuda"))(random_x(3, 130).cuda())
    torch.testing.assert_close(y.cpu(), reference.gemm(random_x(3, 130), packed))
