"""Triton's products of 8-bit floats, as the PTX that it makes for sm_89 (mma.sync) and sm_90 (wgmma), on the CPU:
within computed bounds of the exact product, as both add in 14 bits. Every access is checked."""

import dataclasses

import pytest
import torch
from cases import random_x, same_bits
from test_cuda_fp8 import E4M3_480, cancelling, error_of_sums, exact_and_bound, packed_of, unit_weights
from test_dynamic import wild_x
from triton_on_cpu import SMALL, WHY_NOT, OnCpu

from llmfp4_kernels import reference
from llmfp4_kernels.backends import cuda_sm90
from llmfp4_kernels.backends.triton import configs, fp8, machine
from llmfp4_kernels.backends.triton.form import Form, Operands
from llmfp4_kernels.formats import E1M2, E2M1, E3M0, E4M3, E4M3FN, E8M0, FP4_ELEMENTS, RECIPES, Dynamic, element
from llmfp4_kernels.problem import Problem

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
ADA, HOPPER = (8, 9), (9, 0)
TILES = {ADA: SMALL, HOPPER: configs.Config(rows=64, tokens=16, block_k=64, warps=4, stages=3)}
"""Small ones of the tensor cores' products."""
ADDED = {ADA: 16, HOPPER: 32}
"""Products that a tensor core adds at a time."""
OPCODE = {ADA: "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", HOPPER: "wgmma.mma_async.sync.aligned.m64n16k32"}


@pytest.fixture(params=[ADA, HOPPER], ids=["sm_89", "sm_90"])
def arch(request):
    return request.param


def on(arch, block_k=64, **options):
    return OnCpu(arch, config=dataclasses.replace(TILES[arch], block_k=block_k), **options)


def prepared(packed, bias=None):
    from llmfp4_kernels.backends.triton.prepared import Prepared

    return Prepared(packed, bias)


def inputs(k, count):
    """Of each addition."""
    return torch.arange(k).view(-1, count)


def check(gpu, packed, x, bias=None):
    arch, block_k = gpu.machine.arch, gpu.config.block_k

    def error(x, w):
        x, w = (torch.nn.functional.pad(t, (0, -t.shape[1] % block_k)) for t in (x, w))
        additions = inputs(x.shape[1], ADDED[arch])
        return error_of_sums(x, w, additions, range(0, len(additions), block_k // ADDED[arch]))

    exact, bound = exact_and_bound(packed, x, bias, error=error)

    def judge(y):
        assert y.dtype == x.dtype
        assert ((y.double() - exact).abs() <= bound).all(), (list(x.shape), packed.shape, x.dtype)

    launched = gpu.later(prepared(packed, bias), "triton.gemm", x, judge)
    assert [one.name for one in launched][:2] == ["quantize", "product"] and OPCODE[arch] in launched[1].ptx
    return launched


def test_within_the_bound_of_14_bits(arch):
    """Row scales and scales of groups, as far apart as they may be; parts of steps, of groups, of tiles."""
    with on(arch) as gpu:
        for i, (m, n, k, group) in enumerate([(1, 1, 1, 0), (5, 33, 200, 0), (5, 33, 200, 32), (20, 65, 130, 32)]):
            packed = packed_of(n, k, E2M1, E4M3FN, dynamic=i % 2, seed=i, group=group)
            check(gpu, packed, wild_x(m, k), torch.randn(n))


def test_every_weight_and_dtype():
    with on(ADA) as gpu:
        for weight, group, dtype in ((E3M0, 128, torch.float32), (E1M2, 16, torch.bfloat16), (E3M0, 0, torch.float16)):
            packed = packed_of(33, 200, weight, E4M3FN, dynamic=True, seed=2, group=group)
            check(gpu, packed, wild_x(5, 200, dtype) / 256, torch.randn(33))


def test_the_tuners_bound_is_no_smaller():
    from llmfp4_kernels.backends.judge import loss_in_14_bits

    x, w = (torch.randn(5, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    w[:, 130:200] = -w[:, 60:130]  # sums that cancel
    for count, step in ((32, 128), (32, 64), (16, 128), (16, 64)):
        lost = error_of_sums(
            *(torch.nn.functional.pad(t, (0, 12)) for t in (x, w)), inputs(512, count), range(0, 99, step // count)
        )
        assert (loss_in_14_bits(x, w) > lost).all() and (loss_in_14_bits(x, w) < 9 * lost).all()


def test_splits_of_k_are_added_in_order():
    packed, x, bias = (
        packed_of(100, 1100, E2M1, E4M3FN, dynamic=True, seed=0, group=32),
        wild_x(5, 1100),
        torch.randn(100),
    )
    with on(HOPPER, 128, multiprocessors=64) as gpu:
        assert [one.name for one in check(gpu, packed, x, bias)] == ["quantize", "product", "add_splits"]
        first = gpu.run(prepared(packed, bias), "triton.gemm", x)
    with on(HOPPER, 128, multiprocessors=64, seed=3) as gpu:
        assert same_bits(gpu.run(prepared(packed, bias), "triton.gemm", x), first)


def small_integers(group, k=128):
    """(packed, x) of sums that 14 bits hold."""
    packed = packed_of(48, k, E2M1, E4M3FN, dynamic=False, seed=group)
    packed.row_scale, packed.x_scale = torch.ones(48), torch.tensor(1.0)
    if group:  # 1, 2 or 4
        scales = torch.randint(127, 130, (48, k // group)).to(torch.uint8)
        packed = dataclasses.replace(packed, group_scale=scales, scale=E8M0, group_size=group)
    return packed, torch.randint(-2, 3, (20, k)) * (torch.rand(20, k) < 0.3).float()


def test_small_integers_are_exact(arch):
    """Order of operands, signs, every code and scale are right."""
    packed, x = small_integers(16)
    with on(arch) as gpu:
        y = gpu.run(prepared(packed), "triton.gemm", x)
    assert torch.equal(y, (x.double() @ reference.dequantize(packed, torch.float64).T).float())


@pytest.mark.parametrize("weight", FP4_ELEMENTS.values(), ids=lambda e: e.name)
def test_the_tables_of_weights(weight):
    from llmfp4_kernels.backends.triton.decode import lookup

    for exponent in (0, cuda_sm90.exponent(weight)):
        table = torch.tensor(lookup(weight, torch.float8_e4m3fn, True, exponent).table, dtype=torch.int32)
        values = table.view(torch.float8_e4m3fn).float()
        assert torch.equal(values, torch.tensor(weight.magnitudes) * 2**exponent)
    assert values.max() <= 448 < 2 * values.max()
    assert values[1] * 2.0 ** -cuda_sm90.most_binades(weight) == 2.0**-6  # the smallest that is normal


@pytest.mark.parametrize(("arch", "ptx"), [(ADA, True), (ADA, False), (HOPPER, True)], ids=["sm_89", "tl", "sm_90"])
def test_every_code_at_every_scale(ptx, arch):
    """x picks weight after weight: all are exact down to the smallest scale that is taken, by either form of lookup."""
    groups = cuda_sm90.most_binades(E2M1) + 1
    packed = unit_weights(32, 16 * groups)
    codes = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]).to(torch.uint8).repeat(32, groups)
    codes[16:] = codes[16:].flip(1)  # every code in either nibble
    scales = (139 - torch.arange(groups)).to(torch.uint8).repeat(32, 1)
    packed = dataclasses.replace(packed, codes=codes, group_scale=scales, scale=E8M0, group_size=16)
    with on(arch) as gpu:
        weights = prepared(packed)
        operands = weights.activations(torch.eye(packed.k))
        gpu.machine.ptx = ptx  # of the weights' lookup alone
        y = torch.empty(packed.k, 32)
        weights.multiply(dataclasses.replace(gpu.config, splits=1), *operands, y)
        assert (".reg .b32 codes, upper" in gpu.launched[-1].ptx) == ptx
        gpu.flush()
    assert torch.equal(y, reference.stored_weight(packed, torch.float32).T)


def test_every_value_of_e4m3():
    values = torch.tensor(E4M3FN.values).nan_to_num()
    with on(HOPPER) as gpu:
        y = gpu.run(prepared(unit_weights(16, 256)), "triton.gemm", torch.diag(values))[:, 0]
    assert torch.equal(y, values)


def test_operands_are_what_torch_makes_of_every_fp16_number():
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).view(16, 4096)
    x = torch.where(x.isfinite(), x, 0)
    with on(ADA) as gpu:
        operands, x_scale = prepared(unit_weights(16, 4096)).activations(x)
        gpu.flush()
    expected = x.float().clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(operands[0].view(torch.uint8), expected.view(torch.uint8)) and (x_scale == 1).all()


@pytest.mark.parametrize(("arch", "group"), [(ADA, 32), (HOPPER, 0), (HOPPER, 32)], ids=str)
def test_sums_leave_the_tensor_core_every_128_inputs(group, arch):
    """It holds no 1 beside 2^18: a sum over all of k would be 0."""
    packed, x = cancelling(group)
    with on(arch, 128) as gpu:
        assert (gpu.run(prepared(packed), "triton.gemm", x) == 128).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_poisons_its_row_only(bad):
    x = random_x(5, 72, torch.bfloat16)
    x[3, 69] = bad
    with on(HOPPER) as gpu:
        y = gpu.run(prepared(packed_of(40, 72, E2M1, E4M3FN, True, 0, group=32)), "triton.gemm", x)
    assert not y[3].isfinite().any() and y[[0, 1, 2, 4]].isfinite().all()


PROBLEM = Problem(64, 64, 64, E2M1, E4M3FN, dynamic=Dynamic(), device="cuda")


@pytest.fixture
def gpu_of(monkeypatch):
    """Puts a GPU and a Triton of these versions in the place of those that are there."""

    def put(capability, version=(3, 9), ptx=True):
        monkeypatch.setattr(machine.here, "capability", lambda index: capability, raising=False)
        monkeypatch.setattr(machine.here, "ptx", ptx, raising=False)
        monkeypatch.setattr(machine, "version", lambda: version)

    return put


@pytest.mark.parametrize("version", [(3, 6), (3, 9)], ids=str)
def test_which_gpus_multiply_8_bit_floats(version, gpu_of):
    fenced = version >= (3, 9)
    for capability, taken in {ADA: 1, HOPPER: 1, (10, 0): fenced, (12, 0): 1, (8, 0): 0, (8, 6): 0}.items():
        gpu_of(capability, version)
        assert Operands.of(PROBLEM).dtype == (torch.float8_e4m3fn if taken else torch.bfloat16), capability
    gpu_of(HOPPER, ptx=False)  # gfx90a
    assert Operands.of(PROBLEM).dtype == torch.bfloat16


def test_which_products_are_of_8_bit_floats(gpu_of):
    gpu_of(HOPPER)
    taken = {recipe.name for recipe in RECIPES.values() if Form.of("gemm", Problem.of_recipe(recipe, 64, 64, 64)).fp8}
    assert taken == {"gptq-fp4-a8-fp8", "mxfp4-a8-fp8"}
    mxfp4 = dict(scale=E8M0, group_size=32)
    for changes, fp8_ in (
        (dict(dynamic=None), True),
        (mxfp4, True),
        (mxfp4 | dict(scale_span=11), True),
        (mxfp4 | dict(scale_span=12), False),
        (mxfp4 | dict(scale_span=9, element=E3M0), False),
        (dict(activation=E4M3_480), False),
        (dict(activation=element("e5m2")), False),
        (dict(scale=E4M3, group_size=16), False),
        (dict(dynamic=None, shift=True), False),
        (dict(dynamic=Dynamic(32, E8M0)), False),
    ):
        problem = dataclasses.replace(PROBLEM, **changes)
        assert Form.of("gemm", problem).operand == ("float8_e4m3fn" if fp8_ else "bfloat16"), changes


def test_scales_too_far_apart_meet_bf16():
    packed = packed_of(33, 96, E2M1, E4M3FN, dynamic=True, seed=0, group=32)
    for least, dtype in ((129, torch.float8_e4m3fn), (128, torch.bfloat16)):
        scales = packed.group_scale.clone()
        scales[7, :2] = torch.tensor([140, least])
        with on(ADA, static=True):
            assert (
                prepared(dataclasses.replace(packed, group_scale=scales)).activations(wild_x(5, 96))[0].dtype == dtype
            )


def test_tiles_of_8_bit_floats(gpu_of):
    gpu_of(HOPPER)
    form, tile = Form.of("gemm", PROBLEM), configs.Config(rows=64, tokens=16, block_k=64, warps=4, stages=3, splits=1)
    assert form.fp8 and form.bits == 8
    refuse = lambda arch, **changes: configs.refusal(dataclasses.replace(tile, **changes), form, arch, (3, 9))  # noqa: E731
    for capability in fp8.SINCE:
        assert refuse(capability) is None
        assert refuse(capability, block_k=256) == (
            "block_k = 256: sums of 8-bit floats go to fp32 every 128 inputs at the latest"
        )
        for changes in (dict(warps=2), dict(tokens=8)):
            why = refuse(capability, **changes)
            assert (why is None) == (capability in (ADA, (12, 0))), why
            assert why is None or "Triton would convert 8-bit floats to fp16" in why
        for m in (1, 16, 17, 64, 65, 10**6):
            for kernel in ("gemv", "gemm") if m <= 16 else ("gemm",):
                of = Form.of(kernel, dataclasses.replace(PROBLEM, m=m))
                chosen = configs.choose(of, m, capability, fp8.SINCE[capability], 132)
                assert configs.refusal(chosen, of, capability, fp8.SINCE[capability]) is None, (m, chosen)
