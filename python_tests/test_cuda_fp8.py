"""cuda.sm90 with 8-bit floats as activations, as PTX on the CPU, within computed bounds of the exact product."""

import dataclasses
import itertools

import pytest
import torch
from cases import ODD_SHAPES, random_packed, random_x, same_bits
from cuda_on_cpu import OnCpu, all_kernels
from ptx import missing
from test_dynamic import dynamic_packed, wild_x

from llmfp4_kernels import native, reference
from llmfp4_kernels.backends import cuda, cuda_choices, cuda_options
from llmfp4_kernels.backends.cuda_sm90 import most_binades
from llmfp4_kernels.formats import E2M1, E4M3, E4M3FN, E8M0, FP4_ELEMENTS, Dynamic, element
from llmfp4_kernels.problem import Problem
from llmfp4_kernels.registry import choose

WHY_NOT = missing() or native.problem_with_cuda()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
HOPPER = {"capability": (9, 0)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = {kernel.name: kernel for kernel in (*cuda.KERNELS, *cuda_options.KERNELS)}
SM90, FAST = "cuda.sm90", "cuda.sm90-fast-sums"
E4M3_480 = element("e4m3")


@pytest.fixture(scope="module")
def programs():
    return all_kernels("sm_90a")


def error_of_sums(x, w, inputs, anew):
    """[m, n]: what the tensor core may lose of x [m, k] · w [n, k]ᵀ, where it adds `inputs` [additions, products] at a
    time, beginning anew at the additions `anew`: see cuda_sm90.multiplies_fp8."""
    step = (inputs.shape[1] + 2) * 2.0**-13
    total = torch.zeros(len(x), len(w), dtype=torch.float64)
    c, error = torch.zeros_like(total), torch.zeros_like(total)
    for i, at in enumerate(inputs):
        if i in anew:
            total += error
            c, error = torch.zeros_like(total), torch.zeros_like(total)
        products = x[:, None, at] * w[None, :, at]
        before, c = c, c + products.sum(2)
        largest = torch.maximum(products.abs().amax(2), torch.maximum(before.abs() + error, c.abs()))
        error = (error + step * largest) / (1 - step)
    return 1.01 * (total + error)


def error_of_units(x, w, fast=False):
    """Sums begin anew every four additions, from an odd or an even unit on, as k was split: both are added."""
    x, w = (torch.nn.functional.pad(t, (0, -t.shape[1] % 64)) for t in (x, w))
    inputs = torch.arange(x.shape[1]).view(-1, 4, 2, 8).transpose(1, 2).reshape(-1, 32)  # of a product: units.h
    beginnings = [range(0)] if fast else [range(offset, len(inputs), 4) for offset in (0, 2)]
    return sum(error_of_sums(x, w, inputs, anew) for anew in beginnings)


def exact_and_bound(packed, x, bias=None, fast=False, error=None):
    """The float64 product of rounded activations, and how far cuda.sm90, or what loses error(x, w), may be from it.

    Halved activations lose up to 2^-9 of those below 2^-5 (units of x_scale); sums in fp32, and y, are rounded.
    """
    x_scale = reference.activation_scales(x, packed).x_scale.double()
    rounded, w = reference.round_activation(x, packed, torch.float64), reference.stored_weight(packed)
    exact, size = rounded @ w.T + (0 if bias is None else bias.double()), rounded.abs() @ w.abs().T
    bound = error(rounded, w) if error else error_of_units(rounded, w, fast)
    bound += (packed.k + 8) * 2.0**-24 * size
    if packed.activation == E4M3_480:
        bound += 2.0**-9 * x_scale * ((rounded.abs() < x_scale * 2.0**-5).double() @ w.abs().T)
    bound += exact.abs() * {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[x.dtype]
    bound += 2.0**-25 if x.dtype == torch.float16 else 1e-30
    return exact, bound + (0 if bias is None else 2.0**-23 * bias.double().abs())


def check(gpu, packed, x, bias=None, row=SM90):
    assert ROWS[row].refusal(dataclasses.replace(Problem.of(packed, len(x), x.dtype), device="cuda")) is None
    prepared, (exact, bound) = cuda.Prepared(packed, bias), exact_and_bound(packed, x, bias, row == FAST)
    y = gpu.run(prepared, row, x)
    assert y.dtype == x.dtype and ((y.double() - exact).abs() <= bound).all(), (list(x.shape), packed.shape, x.dtype)
    assert same_bits(gpu.run(prepared, row, x), y)
    return gpu.launched[-1]


def rows_of_tile(gpu, x):
    plan = gpu.prepared.plans[gpu.kernel.removeprefix("cuda."), len(x), cuda.DTYPES[x.dtype]]
    return cuda_choices.rows_of_tile(plan)


def with_groups(packed, size, seed=0):
    """E8M0 scales of groups of `size` inputs, as far apart within a row as the element allows."""
    n, k = packed.shape
    least = 140 - most_binades(packed.element)
    scales = torch.randint(least, 141, (n, -(-k // size)), generator=torch.Generator().manual_seed(seed))
    scales[0, 0], scales[0, -1] = 140, least
    return dataclasses.replace(packed, group_scale=scales.to(torch.uint8), scale=E8M0, group_size=size)


def packed_of(n, k, weight, activation, dynamic, seed, group=0):
    if dynamic:
        packed = dynamic_packed(n, k, weight, activation, Dynamic(), smooth=seed % 2, seed=seed)
    else:
        packed = random_packed(n, k, weight, activation, seed=seed)
    return with_groups(packed, group, seed) if group else packed


@pytest.mark.parametrize("activation", [E4M3_480, E4M3FN], ids=lambda e: e.name)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_row_scales(activation, dynamic, programs):
    with OnCpu(programs, multiprocessors=8, **HOPPER) as gpu:
        for i, ((m, n, k), weight) in enumerate(itertools.product(ODD_SHAPES, FP4_ELEMENTS.values())):
            if i % 2 and m > 4:
                continue
            dtype = DTYPES[i % 3]
            x = (wild_x if dynamic else random_x)(m, k, dtype)
            x = x / 256 if dtype == torch.float16 else x * 100 if i % 5 == 0 else x  # outputs stay below 65504
            check(gpu, packed_of(n, k, weight, activation, dynamic, i), x, torch.randn(n) if i % 3 else None)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_group_scales(size, programs):
    with OnCpu(programs, multiprocessors=8, **HOPPER) as gpu:
        for i, ((m, n, k), weight) in enumerate(itertools.product(ODD_SHAPES, FP4_ELEMENTS.values())):
            if i % 4 != size // 16 % 4 % 3:
                continue
            x = wild_x(m, k, DTYPES[i % 2])
            packed = packed_of(n, k, weight, E4M3FN, dynamic=i % 3, seed=i, group=size)
            check(gpu, packed, x, torch.randn(n) if i % 3 else None)


@pytest.mark.parametrize("m", [17, 40, 70])
@pytest.mark.parametrize("group", [0, 32], ids=["rows", "groups"])
def test_every_instance_and_split_over_k(m, group, programs):
    packed = packed_of(150, 1100, E2M1, E4M3FN, dynamic=True, seed=m, group=group)
    for multiprocessors, seed in ((1, 1), (132, 2)):
        with OnCpu(programs, multiprocessors, seed, **HOPPER) as gpu:
            launched = check(gpu, packed, random_x(m, 1100, torch.bfloat16), torch.randn(150))
        tag = "fp8_grouped" if group else "fp8"
        assert launched == f"gemm_sm90_{tag}_{ {17: 32, 40: 64, 70: 128}[m] }"


WIDTHS = {32: (8, 16, 24, 32), 64: (40, 48, 56, 64), 128: (80, 96, 112, 128), 256: (160, 192, 224, 256)}
"""Rows that a tile may have, by those of the kernel."""


@pytest.mark.parametrize("most", WIDTHS)
def test_every_width(most, programs):
    for i, rows in enumerate(WIDTHS[most]):
        kind = "fp8_fast" if most == 256 or i % 2 == 0 else "fp8_grouped" if i == 1 else "fp8"
        packed = packed_of(70, 330, E2M1, E4M3FN, dynamic=True, seed=rows, group=32 * (kind == "fp8_grouped"))
        with OnCpu(programs, 1, **HOPPER) as gpu:
            x = random_x(rows - i, 330, torch.bfloat16)
            launched = check(gpu, packed, x, row=FAST if kind == "fp8_fast" else SM90)
            assert launched == f"gemm_sm90_{kind}_{most}" and rows_of_tile(gpu, x) == rows


def unit_weights(n, k, activation=E4M3FN):
    """All weights 1, x_scale 1."""
    packed = random_packed(n, k, E2M1, activation)
    packed.codes = torch.full_like(packed.codes, E2M1.values.index(1.0) * 17)
    packed.row_scale, packed.x_scale = torch.ones(n), torch.tensor(1.0)
    return packed


def cancelling(group=0):
    """(packed, x): large products, small ones, the large ones taken away. The tensor core holds no 1 beside 2^18."""
    x = torch.cat([torch.full((128,), v) for v in (448.0, 1.0, -448.0)]).repeat(20, 1)
    packed = unit_weights(16, 384)
    packed.codes[:, :64] = packed.codes[:, 128:] = E2M1.values.index(6.0) * 17
    if group:
        ones = torch.full((16, 384 // group), 127, dtype=torch.uint8)
        packed = dataclasses.replace(packed, group_scale=ones, scale=E8M0, group_size=group)
    return packed, x


def test_sums_leave_the_tensor_core_every_128_inputs(programs):
    packed, x = cancelling()
    with OnCpu(programs, 1, **HOPPER) as gpu:
        assert (gpu.run(cuda.Prepared(packed, None), SM90, x) == 128).all()
        assert (gpu.run(cuda.Prepared(packed, None), FAST, x) == 0).all()
        packed, x = cancelling(group=32)
        assert (gpu.run(cuda.Prepared(packed, None), SM90, x) == 128).all()


@pytest.mark.parametrize("row", [SM90, FAST])
def test_small_integers_are_exact(row, programs):
    """Where 14 bits hold every sum, y is exact: operand order, signs, every code and scale are right."""
    for weight, group in itertools.product(FP4_ELEMENTS.values(), (0, 16, 32) if row == SM90 else (0,)):
        packed = packed_of(48, 320, weight, E4M3FN, dynamic=False, seed=group)
        packed.row_scale, packed.x_scale = torch.ones(48), torch.tensor(1.0)
        if group:  # 1, 2 or 4
            scales = torch.randint(127, 130, (48, -(-320 // group))).to(torch.uint8)
            packed = dataclasses.replace(packed, group_scale=scales, scale=E8M0, group_size=group)
        x = torch.randint(-2, 3, (20, 320)) * (torch.rand(20, 320) < 0.3)
        expected = (x.double() @ reference.dequantize(packed, torch.float64).T).float()
        with OnCpu(programs, **HOPPER) as gpu:
            assert torch.equal(gpu.run(cuda.Prepared(packed, None), row, x.float()), expected), (weight.name, group)


@pytest.mark.parametrize("weight", FP4_ELEMENTS.values(), ids=lambda e: e.name)
def test_every_code_at_every_scale(weight, programs):
    """x picks weight after weight: all are exact down to the smallest scale that is taken."""
    span = most_binades(weight)
    packed = dataclasses.replace(unit_weights(17, 16 * (span + 1)), element=weight)
    packed.codes = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]).to(torch.uint8).repeat(17, span + 1)
    scales = (139 - torch.arange(span + 1)).to(torch.uint8).repeat(17, 1)
    packed = dataclasses.replace(packed, group_scale=scales, scale=E8M0, group_size=16)
    with OnCpu(programs, **HOPPER) as gpu:
        y = gpu.run(cuda.Prepared(packed, None), SM90, torch.eye(packed.k))
    assert torch.equal(y, reference.stored_weight(packed, torch.float32).T)


def test_every_value_of_e4m3(programs):
    """Of OCP's all are exact; of LLM-FP4's, 480 too, those above 2^-5, and below all even multiples of 2^-9."""
    for activation in (E4M3FN, E4M3_480):
        values = torch.tensor(activation.values).nan_to_num()
        with OnCpu(programs, **HOPPER) as gpu:
            y = gpu.run(cuda.Prepared(unit_weights(16, 256, activation), None), SM90, torch.diag(values))[:, 0]
        steps = values * 2**9
        halved = torch.where(steps.abs() < 16, torch.round(steps / 2) * 2, steps) / 2**9
        assert torch.equal(y, values if activation == E4M3FN else halved)
    assert (halved == values).sum() == 256 - 16


def test_operands_are_what_torch_makes_of_every_fp16_number(programs):
    """The bytes in memory, but for the sign of zero, whose place csrc/cuda/blocks.h draws."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).view(16, 4096)
    x = torch.where(x.isfinite(), x, 0)
    with OnCpu(programs, **HOPPER) as gpu:
        gpu.run(cuda.Prepared(unit_weights(16, 4096), None), SM90, x)
        plan = gpu.prepared.plans["sm90", 16, cuda.DTYPES[x.dtype]]
        made = next(t for t in reversed(gpu.allocations.made) if t.dtype == torch.uint8 and t.numel() == plan.bytes)
    blocks = made[: 16 * 4096].view(64, 2, 4, 8, 4, 4)  # unit, rows / 8, word c, row, lane t, byte
    bytes = blocks.permute(1, 3, 0, 4, 2, 5).reshape(16, 4096)
    expected = x.float().clamp(-448, 448).to(torch.float8_e4m3fn)
    zero = expected.float() == 0
    assert torch.equal(bytes[~zero], expected.view(torch.uint8)[~zero]) and (bytes[zero] & 127 == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_poisons_its_row_only(bad, programs):
    x = random_x(20, 72, torch.bfloat16)
    x[3, 69] = bad
    with OnCpu(programs, **HOPPER) as gpu:
        for packed in (unit_weights(40, 72), packed_of(40, 72, E2M1, E4M3FN, True, 0, group=32)):
            y = gpu.run(cuda.Prepared(packed, None), SM90, x)
            assert not y[3].isfinite().any() and y[:3].isfinite().all() and y[4:].isfinite().all()


def test_refusals(monkeypatch):
    monkeypatch.setattr(cuda.machine, "capability", lambda index: (9, 0), raising=False)
    problem = Problem(64, 64, 64, E2M1, E4M3FN, dynamic=Dynamic(), device="cuda")
    mxfp4 = dataclasses.replace(problem, scale=E8M0, group_size=32)
    for taken in (problem, mxfp4, dataclasses.replace(problem, activation=E4M3_480, dynamic=None)):
        assert choose(taken).name == SM90 and choose(dataclasses.replace(taken, m=1)).name == SM90
    refused = lambda row, of=problem, **other: ROWS[row].refusal(dataclasses.replace(of, **other))  # noqa: E731
    for other in ({"shift": True}, {"scale": E4M3, "group_size": 16}, {"dynamic": Dynamic(32, E8M0)}):
        assert refused(SM90, **other).endswith("is no sum of integers")
    assert refused(SM90, activation=element("e5m2")).endswith("is no sum of integers")
    assert refused(SM90, mxfp4, group_size=24).startswith("groups of 24 inputs")
    for weight, most in zip(FP4_ELEMENTS.values(), (11, 12, 8)):
        assert refused(SM90, mxfp4, element=weight, scale_span=most) is None
        why = refused(SM90, mxfp4, element=weight, scale_span=most + 1)
        assert why == f"E8M0 scales of a row span {most + 1} binades, E4M3 has {most} beside {weight.name}"
    assert refused(FAST) is None and "these weights have e8m0 groups" in refused(FAST, mxfp4)
    assert "these activations are e2m1" in refused(FAST, activation=E2M1)
    assert "these activations are torch.float32" in refused(FAST, activation=None, dynamic=None)


def test_the_span_of_scales_is_that_of_the_weight():
    packed = with_groups(random_packed(16, 256, E2M1, E4M3FN), 32)
    assert packed.scale_span == 11 == Problem.of(packed, 1, torch.float32).scale_span
    assert random_packed(16, 256, E2M1).scale_span == 0
