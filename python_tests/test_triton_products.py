"""The Triton kernels through the real Python path, as the PTX that Triton makes of them, on the CPU: integer products
have the reference's bits, others lie within computed bounds. Every access is checked."""

import dataclasses

import pytest
import torch
from cases import random_packed, random_x, same_bits
from ptx import FAULTS
from test_cuda_float import exact_and_bound
from test_dynamic import FP8, INT8, dynamic_packed, wild_x
from triton_on_cpu import WHY_NOT, OnCpu

from llmfp4_kernels import FP4Linear, reference, registry
from llmfp4_kernels.backends import triton
from llmfp4_kernels.backends.triton import configs, machine
from llmfp4_kernels.errors import BadInput, NoKernel
from llmfp4_kernels.formats import E1M2, E2M1, E3M0, E4M3, E4M3FN, E8M0, INTEGER, Dynamic

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
SHAPES = [(1, 1, 1), (3, 17, 65), (5, 33, 130), (33, 65, 70), (17, 100, 515)]


def prepared(packed, bias=None):
    from llmfp4_kernels.backends.triton.prepared import Prepared

    return Prepared(packed, bias)


def check(gpu, packed, x, bias=None, name="triton.gemm"):
    """Bits of an integer product; otherwise the bound of fp32 sums of exact products. The names of the launches."""
    where = list(x.shape), packed.shape

    def judge(y):
        assert y.dtype == x.dtype, where
        expected = reference.gemm(x, packed, bias).to(x.dtype)
        if packed.integer:
            assert same_bits(y, expected), where
        elif packed.activation is None:
            exact, bound = exact_and_bound(packed, x, bias)
            assert ((y.double() - exact).abs() <= bound).all(), where
        else:
            plain = dataclasses.replace(packed, activation=None, dynamic=None, x_scale=None, x_factor=None, shift=None)
            exact, bound = exact_and_bound(plain, reference.round_activation(x.float(), packed), bias)
            bound = 2 * bound + expected.abs() * torch.finfo(x.dtype).eps
            assert ((y.double() - exact).abs() <= bound).all(), where

    return [launch.name for launch in gpu.later(prepared(packed, bias), name, x, judge)]


def test_static_integers():
    with OnCpu() as gpu:
        for i, (m, n, k) in enumerate(SHAPES):
            check(gpu, random_packed(n, k, E2M1, E2M1, i % 2 == 0), random_x(m, k), torch.randn(n))


@pytest.mark.parametrize("element", [E1M2, E3M0], ids=lambda e: e.name)
def test_every_element(element):
    with OnCpu() as gpu:
        for activation in (E2M1, E1M2):
            check(gpu, random_packed(65, 70, element, activation, True), random_x(7, 70), torch.randn(65))


def test_the_largest_floats_are_no_infinity():
    """bf16 ends at 3.39e38, fp32 at 3.4028e38: parts of what lies between are finite, too."""
    packed = random_packed(24, 64, E2M1)
    packed.codes, packed.row_scale = packed.codes & 0x11, torch.ones(24)  # 0 and 0.5
    x, largest = torch.zeros(5, 64), torch.finfo(torch.float32).max
    x[:, 5] = torch.tensor([largest, -largest, 3.3961776e38, 3.39e38, torch.inf])

    def judge(y):
        assert torch.equal(y[:4], reference.gemm(x[:4], packed)) and not y[4].isfinite().any()

    with OnCpu() as gpu:
        gpu.later(prepared(packed), "triton.gemm", x, judge)


def test_two_planes_of_an_activation():
    """E3M0 with a shift is no int8: 64 · 2^7."""
    with OnCpu() as gpu:
        check(gpu, random_packed(65, 70, E2M1, E3M0, True), random_x(7, 70), torch.randn(65))
    with OnCpu(multiprocessors=64) as gpu:
        assert "add_splits" in check(gpu, random_packed(65, 1000, E2M1, E3M0, True), random_x(7, 1000), torch.randn(65))


@pytest.mark.parametrize(
    ("activation", "dynamic"),
    [(E2M1, Dynamic(16, INTEGER)), (E1M2, Dynamic(32, INTEGER)), (INT8, Dynamic()), (E3M0, Dynamic())],
    ids=str,
)
def test_dynamic_integers(activation, dynamic):
    with OnCpu() as gpu:
        for m, n, k in ((4, 33, 1100), (20, 65, 70)):
            packed = dynamic_packed(n, k, E2M1, activation, dynamic)
            check(gpu, packed, wild_x(m, k, torch.bfloat16), torch.randn(n))


def test_splits_of_k_are_added_in_order():
    """A product whose k is shared by blocks has the bits of one that is not."""
    packed, x, bias = random_packed(100, 2100, E2M1, E2M1, True), random_x(5, 2100), torch.randn(100)
    for multiprocessors, seed in ((1, 1), (64, 2)):
        with OnCpu((8, 0), multiprocessors, seed) as gpu:
            names = check(gpu, packed, x, bias, "triton.gemv")
            assert ("add_splits" in names) == (gpu.launched[1].grid[2] > 1) == (multiprocessors > 1)
    floats = random_packed(100, 2100, E2M1)
    with OnCpu((8, 0), 64) as gpu:
        check(gpu, floats, random_x(5, 2100))
        first = gpu.run(prepared(floats), "triton.gemm", random_x(5, 2100))
        assert same_bits(gpu.run(prepared(floats), "triton.gemm", random_x(5, 2100)), first)


def test_floats():
    """x is the operand where its rows are aligned, else a padded copy; an fp32 x becomes three bf16 parts."""
    with OnCpu() as gpu:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for m, n, k in ((3, 17, 65), (20, 65, 80)):
                names = check(gpu, random_packed(n, k, E2M1), random_x(m, k, dtype) / 64, torch.randn(n))
                assert names == (["product"] if k % 16 == 0 and dtype != torch.float32 else ["split", "product"])


def test_group_scales():
    half, bf16 = torch.float16, torch.bfloat16
    with OnCpu() as gpu:
        for element, scale, size, dtype in (
            (E2M1, E4M3, 16, half),
            (E1M2, E4M3, 16, bf16),
            (E3M0, E8M0, 32, half),
            (E1M2, E4M3, 128, bf16),
        ):
            for m, n, k in ((3, 17, 80), (20, 65, 208)):
                packed = random_packed(n, k, element, scale=scale, group_size=size)
                check(gpu, packed, random_x(m, k, dtype) / 256, torch.randn(n))


def test_factors_and_shifts_of_inputs():
    smooth = dataclasses.replace(dynamic_packed(40, 135, E2M1, E2M1, Dynamic()), activation=None, dynamic=None)
    shifted = random_packed(40, 135, E2M1, shift=True)
    with OnCpu() as gpu:
        for packed in (smooth, shifted, dataclasses.replace(shifted, x_factor=smooth.x_factor)):
            check(gpu, packed, random_x(3, 135, torch.bfloat16))


@pytest.mark.parametrize(
    ("activation", "dynamic", "scale"),
    [
        (FP8, Dynamic(), (None, 0)),
        (E4M3FN, Dynamic(), (E8M0, 32)),
        (FP8, Dynamic(32, E8M0), (E8M0, 32)),
        (E2M1, Dynamic(16, E4M3), (E4M3, 16)),
        (INT8, Dynamic(), (E4M3, 16)),
        (E2M1, Dynamic(16, INTEGER), (E4M3, 16)),
    ],
    ids=["e4m3", "mxfp4-a8-fp8", "mxfp4-a8", "nvfp4-a4", "nvfp4-a8-int", "integer groups"],
)
def test_activations_that_are_no_integers(activation, dynamic, scale):
    """They are rounded as the reference rounds, and multiplied as bf16, which holds them."""
    packed = random_packed(33, 96, E2M1, scale=scale[0], group_size=scale[1])
    packed = dataclasses.replace(packed, activation=activation, dynamic=dynamic)
    with OnCpu() as gpu:
        check(gpu, packed, wild_x(5, 96), torch.randn(33))


def test_static_8_bit_floats_with_shift():
    packed = random_packed(33, 96, E2M1, E2M1, True)
    with OnCpu() as gpu:
        check(gpu, dataclasses.replace(packed, activation=FP8, x_scale=torch.tensor(0.01)), random_x(5, 96))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_poisons_its_row_only(bad):
    x = random_x(5, 70)
    x[3, 69] = bad
    with OnCpu() as gpu:
        check(gpu, random_packed(65, 70, E2M1, E2M1, True), x, torch.randn(65))
        y = gpu.run(prepared(random_packed(17, 65, E2M1), torch.randn(17)), "triton.gemm", x[:, 5:])
        assert not y[3].isfinite().any() and y[[0, 1, 2, 4]].isfinite().all()


def test_large_sums_stay_exact():
    packed = random_packed(17, 4001, E2M1, E2M1, True)
    packed.codes, packed.shift = torch.full_like(packed.codes, 0x77), torch.zeros(4001, dtype=torch.uint8)
    with OnCpu() as gpu:
        check(gpu, packed, torch.full((1, 4001), 1e6), torch.randn(17))


@pytest.mark.parametrize("arch", [(8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("name", ["triton.gemv", "triton.gemm"])
def test_the_tiles_of_the_table(name, arch):
    with OnCpu(arch, multiprocessors=2, config=None) as gpu:
        check(gpu, random_packed(200, 700, E2M1, E2M1, True), random_x(7, 700), None, name)


WGMMA = configs.Config(rows=64, tokens=16, block_k=64, warps=4, stages=3)


def test_wgmma_of_every_operand_is_fenced():
    """By us, where Triton forgets it: the machine asks for the fence after each copy."""
    x, half = random_x(5, 200), torch.float16
    with OnCpu((9, 0), config=WGMMA) as gpu:
        for packed, given in (
            (random_packed(70, 200, E2M1, E2M1, True), x),
            (random_packed(70, 200, E2M1, E3M0, True), x),  # two planes
            (random_packed(70, 200, E2M1), x.to(half) / 64),
            (random_packed(70, 200, E2M1), x),  # three parts
            (random_packed(70, 200, E2M1, scale=E4M3, group_size=16), x.bfloat16()),
        ):
            check(gpu, packed, given, torch.randn(70))
            assert "wgmma.mma_async" in gpu.launched[-1].ptx


def test_wgmma_without_a_fence_is_a_fault(monkeypatch):
    """The reason for configs.adds_fence: Triton before 3.9 lets wgmma read what cp.async may not have written yet."""
    monkeypatch.setattr(configs, "adds_fence", lambda *_: False)
    with OnCpu((9, 0), config=WGMMA) as gpu:
        check(gpu, random_packed(70, 200, E2M1), random_x(5, 208, torch.float16)[:, :200] / 64)
        if machine.version() < configs.FENCED:
            with pytest.raises(FAULTS["MissingFence"]):
                gpu.flush()


def test_shaped_and_strided_inputs():
    packed = random_packed(65, 70, E2M1, E2M1, True)
    with OnCpu() as gpu:
        check(gpu, packed, random_x(5, 140)[:, ::2], torch.randn(65))
        y = gpu.run(prepared(packed, torch.ones(65)), "triton.gemm", random_x(6, 70).view(2, 3, 70))
        expected = reference.gemm(random_x(6, 70), packed, torch.ones(65))
        assert same_bits(y.view(6, 65), expected) and y.shape == (2, 3, 65)
        assert gpu.run(prepared(packed), "triton.gemv", torch.empty(0, 70)).shape == (0, 65)
        assert gpu.launched == []
        with pytest.raises(BadInput, match="x is on meta"):
            gpu.run(prepared(packed), "triton.gemv", torch.empty(1, 70, device="meta"))
    with pytest.raises(NoKernel, match="codes are on cpu"):
        prepared(packed)


def test_a_layer_under_triton_keeps_pairs_and_saves_rows(monkeypatch):
    packed = random_packed(65, 70, E2M1, E2M1, True)
    layer = FP4Linear.from_packed(packed, torch.ones(65))
    monkeypatch.setattr(triton, "_unusable", lambda problem: None)
    monkeypatch.setenv(registry.FORCE, "triton.gemm")
    with OnCpu() as gpu:
        y = layer(random_x(5, 70))
        gpu.flush()
        assert same_bits(y, reference.gemm(random_x(5, 70), packed, torch.ones(65)))
        assert layer.codes.ndim == 1 and layer.kernel(5) == "triton.gemm"
        assert torch.equal(layer.state_dict()["codes"], packed.codes)
    monkeypatch.delenv(registry.FORCE)
    monkeypatch.undo()
    again = FP4Linear.from_packed(packed, torch.ones(65))
    again.load_state_dict(layer.state_dict())
    assert same_bits(again(random_x(5, 70)), reference.gemm(random_x(5, 70), packed, torch.ones(65)))
