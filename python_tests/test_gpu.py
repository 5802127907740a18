"""The CUDA kernels on the GPU that is here: `make gpu-check`. Skipped without one."""

import pytest
import torch
from cases import ELEMENT_PAIRS, GROUP_SCALES, ODD_SHAPES, random_packed, random_x, same_bits
from test_dynamic import INTEGER_ACTIVATIONS, dynamic_packed, wild_x
from test_grouped import INT8, grouped, rounding

from llmfp4_kernels import FP4Linear, native, reference
from llmfp4_kernels.backends import cuda, cuda_options, cuda_sm90, cuda_sm120
from llmfp4_kernels.errors import BadInput
from llmfp4_kernels.formats import E1M2, E2M1, E3M0, E4M3, E8M0, FP4_ELEMENTS, INTEGER, Dynamic, element
from llmfp4_kernels.problem import Problem

WHY_NOT = "there is no GPU that torch can use" if not torch.cuda.is_available() else native.problem_with_cuda()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
SHAPES = [*ODD_SHAPES, (1, 4096, 4096), (16, 2048, 4104), (128, 1000, 3000), (300, 512, 11008)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_errors_left():
    yield
    torch.cuda.synchronize()


def rows(m, gemv=True, options=()):
    """Names of the rows that must run for m tokens: the three families, and these of cuda_options."""
    families = ["cuda.gemv"] * (gemv and m <= 16) + ["cuda.sm90"] * (cuda.machine.capability(0) == cuda_sm90.CAPABILITY)
    return {*families, "cuda.sm80", *(f"cuda.{name}" for name in options if m <= 16 or "gemv" not in name)}


def runs(packed, x, bias=None, *, must):
    """(row's name, y on the CPU) of each row that takes the problem; twice, with the same bits. Those of `must` do."""
    on_gpu = packed.to("cuda")
    prepared, ran = cuda.Prepared(on_gpu, None if bias is None else bias.cuda()), set()
    for kernel in cuda.KERNELS + cuda_options.KERNELS:
        if kernel.refusal(Problem.of(on_gpu, len(x), x.dtype)) is None:
            y = prepared.run(kernel, x.cuda()).cpu()
            assert same_bits(prepared.run(kernel, x.cuda()).cpu(), y), f"{kernel.name}: other bits the second time"
            ran.add(kernel.name)
            yield kernel.name, y
    assert must <= ran, f"{must - ran} did not run m = {len(x)}, n = {packed.shape[0]}, k = {packed.k}"


@pytest.mark.parametrize("pair", ELEMENT_PAIRS, ids=lambda p: f"{p[0].name}x{p[1].name}")
def test_static_integers(pair):
    for i, (m, n, k) in enumerate(SHAPES):
        packed, bias = random_packed(n, k, *pair, shift=i % 2 == 0), torch.randn(n)
        x = random_x(m, k, DTYPES[i % 3])
        expected = reference.gemm(x, packed, bias).to(x.dtype)
        options = cuda_options.OPTIONS if pair == (E2M1, E2M1) and packed.shift is not None else ()
        one_plane = pair[1] != E3M0 or packed.shift is None
        for name, y in runs(packed, x, bias, must=rows(m, one_plane, options)):
            assert same_bits(y, expected), (name, m, n, k)


@pytest.mark.parametrize(("activation", "dynamic"), [a for a in INTEGER_ACTIVATIONS if a[1].group_size != 24], ids=str)
def test_dynamic_integers(activation, dynamic):
    for i, (m, n, k) in enumerate([(1, 24, 66), (7, 33, 40), (40, 130, 1031), (16, 512, 9000), (130, 512, 4096)]):
        packed, x = dynamic_packed(n, k, E2M1, activation, dynamic), wild_x(m, k, DTYPES[i % 3])
        expected = reference.gemm(x, packed).to(x.dtype)
        for name, y in runs(packed, x, must=rows(m)):
            assert same_bits(y, expected), (name, m, n, k)


@pytest.mark.parametrize("group", [*GROUP_SCALES, (E8M0, 16)], ids=lambda g: f"{g[0].name}-{g[1]}" if g[0] else "rows")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_floats(group, dtype):
    for i, (m, n, k) in enumerate(SHAPES):
        element = list(FP4_ELEMENTS.values())[i % 3]
        packed = random_packed(n, k, element, scale=group[0], group_size=group[1])
        check_floats(m, dtype, packed, rows(m, gemv=m <= 4 or dtype != torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shifts_of_floats_on_either_side(dtype):
    for m, n, k in SHAPES:
        must = rows(m, gemv=m <= 4, options=["sm80-weight-shift"] * (dtype != torch.float16))
        check_floats(m, dtype, random_packed(n, k, E2M1, shift=True), must)


def check_floats(m, dtype, packed, must):
    """Tensor cores add with fewer bits than fp32: 2^-21 of Σ|x·w| a step of 16, plus what test_cuda_float allows."""
    from test_cuda_float import exact_and_bound

    n, k = packed.shape
    x, bias = random_x(m, k, dtype) / (1024 if dtype == torch.float16 else 1), torch.randn(n)
    exact, bound = exact_and_bound(packed, x, bias)
    bound += (k / 16 + 8) * 2.0**-21 * (x.double().abs() @ reference.stored_weight(packed).abs().T)
    for name, y in runs(packed, x, bias, must=must):
        assert ((y.double() - exact).abs() <= bound).all(), (name, m, n, k, (y.double() - exact).abs().max())


@pytest.mark.parametrize("group", [(E8M0, 32), (E4M3, 16), (E4M3, 128)], ids=lambda g: f"{g[0].name}-{g[1]}")
def test_groups_of_integers(group):
    """Only the sum over groups rounds; groups of more than 64 are added in parts of 64, and blocks to each other."""
    for i, (m, n, k) in enumerate(SHAPES):
        check_groups(grouped(n, k, E2M1, group, (INT8, Dynamic())), wild_x(m, k).to(DTYPES[i % 2]))


def check_groups(packed, x):
    (n, k), bias = packed.shape, random_x(1, packed.shape[0], seed=5)[0]
    exact, half_ulp = reference.gemm(x, packed, bias).double(), {torch.float32: 0.0, torch.bfloat16: 2.0**-8}[x.dtype]
    bound = rounding(x, packed, bias, -(-k // min(packed.group_size, 64)) + 64) + half_ulp * exact.abs()
    must = {"cuda.gemv", "cuda.sm80"} if len(x) <= 16 else {"cuda.sm80"}
    for name, y in runs(packed, x, bias, must=must):
        assert ((y.double() - exact).abs() <= bound).all(), (name, len(x), n, k)


@pytest.mark.parametrize("activation", ["e4m3", "e4m3fn"])
def test_fp8_activations(activation):
    if cuda.machine.capability(0) != cuda_sm90.CAPABILITY:
        pytest.skip("products of 8-bit floats are wgmma's, this GPU is no sm_90")
    for i, (m, n, k) in enumerate(SHAPES[:-1]):  # the last one's bound would take a minute
        packed = random_packed(n, k, list(FP4_ELEMENTS.values())[i % 3], element(activation))
        check_fp8(packed, random_x(m, k, DTYPES[i % 3]))


def check_fp8(packed, x):
    """Bounds that hold if Hopper cuts sums as test_ptx_fp8_sums.py has them."""
    from test_cuda_fp8 import FAST, SM90, exact_and_bound

    for name, y in runs(packed, x, must={SM90}):
        exact, bound = exact_and_bound(packed, x, fast=name == FAST)
        assert ((y.double() - exact).abs() <= bound).all(), (name, list(x.shape), packed.shape)


def test_the_tensor_core_keeps_14_bits_of_8_bit_floats():
    """Sums go to fp32 every 128 inputs: 1 counts beside 2^18 that is taken away later. Within 128 it does not."""
    from test_cuda_fp8 import FAST, SM90, cancelling

    if cuda.machine.capability(0) != cuda_sm90.CAPABILITY:
        pytest.skip("products of 8-bit floats are wgmma's, this GPU is no sm_90")
    packed, x = cancelling()
    found = dict(runs(packed, x, must={SM90, FAST}))
    assert (found[SM90] == 128).all() and (found[FAST] == 0).all()


def test_small_problems_of_every_kind():
    """What a memory checker is run on: every kind of operand once, ragged in m, n and k, in each tile up to 64 rows."""
    hopper = cuda.machine.capability(0) == cuda_sm90.CAPABILITY
    for m in (5, 40):
        for shift in (False, True):
            packed, x = random_packed(70, 330, E2M1, E2M1, shift), random_x(m, 330, torch.bfloat16)
            expected = reference.gemm(x, packed).to(x.dtype)
            for name, y in runs(packed, x, must=rows(m, options=cuda_options.OPTIONS if shift else ["sm80-packed"])):
                assert same_bits(y, expected), (name, m)
            check_floats(m, torch.bfloat16, random_packed(70, 330, E2M1, shift=shift), rows(m))
        check_floats(m, torch.float16, random_packed(70, 328, E2M1, scale=E4M3, group_size=16), rows(m))
        check_groups(grouped(70, 330, E2M1, (E8M0, 32), (INT8, Dynamic())), wild_x(m, 330))
        if hopper:
            for activation in ("e4m3", "e4m3fn"):
                check_fp8(random_packed(70, 330, E2M1, element(activation)), random_x(m, 330, torch.bfloat16))


def test_block_scaled_products(monkeypatch):
    """cuda.sm120, which has never run. Its tensor cores are given 2^-11 of Σ|x·w|: what they keep is not specified."""
    from test_cuda_sm120 import exact_and_bound, scaled

    if torch.cuda.get_device_capability() != cuda_sm120.CAPABILITY:
        pytest.skip("needs sm_120")
    monkeypatch.setenv("LLMFP4_KERNEL", cuda_sm120.NAME)
    (kernel,) = cuda_sm120.KERNELS
    for m, n, k in SHAPES:
        for packed in (
            random_packed(n, k, E2M1, E2M1, shift=True),
            scaled(n, k, E8M0, 32, Dynamic(32, E8M0)),
            scaled(n, k, E4M3, 16, Dynamic(16, E4M3)),
        ):
            x, on_gpu = random_x(m, k), packed.to("cuda")
            assert kernel.refusal(Problem.of(on_gpu, m, x.dtype)) is None
            y = kernel.prepare(on_gpu, None).run(kernel, x.cuda()).cpu()
            exact, bound = exact_and_bound(packed, x)
            rounded, w = reference.round_activation(x, packed, torch.float64), reference.stored_weight(packed)
            bound += 2.0**-11 * (rounded.abs() @ w.abs().T)
            assert ((y.double() - exact).abs() <= bound).all(), (m, n, k, packed.scale)


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


def test_measured_tiles_are_right_and_used(monkeypatch, tmp_path):
    """Every row, tile and split that `llmfp4 tune` tries; then those of a layer, from the file."""
    from llmfp4_kernels.backends import cuda_choices, cuda_tune, graphs, measured

    monkeypatch.setenv(measured.FOLDER, str(tmp_path))
    (_, n, k), device, dtype = SHAPES[-1], torch.ones(1).cuda().device, torch.bfloat16
    problem, watch = Problem.of(random_packed(n, k, E2M1, E2M1), 1, dtype), graphs.Stopwatch(device)
    subject = cuda_tune.Subject(problem, watch, device)
    for m in (4, 100):
        outcome = cuda_tune.tune(subject, m, dtype, watch, 60)
        best = {row.config.kernel: row for row in outcome.rows}
        assert outcome.left_out == [] and set(best) == rows(m)
        cuda_choices.put(outcome.rows, cuda.machine, device, tmp_path)
        prepared = cuda.Prepared(subject.packed.to(device), None)
        for name, row in best.items():
            plan = prepared.plan(name.removeprefix("cuda."), m, dtype, cuda.machine.multiprocessors(device))
            assert cuda_choices.tile_of(name, plan) == row.config
        fastest = min(best.values(), key=lambda row: row.seconds)
        assert cuda.fastest(subject.problem(m, dtype), rows(m)).config == fastest.config


def test_tensors_that_no_kernel_takes_run_on_the_reference():
    packed = random_packed(40, 130, E1M2, scale=E4M3, group_size=24)
    with pytest.warns(UserWarning, match="groups of 24"):
        y = FP4Linear.from_packed(packed.to("cuda"))(random_x(3, 130).cuda())
    torch.testing.assert_close(y.cpu(), reference.gemm(random_x(3, 130), packed))
