"""Residual and SwiGLU in the epilogue of the CUDA kernels, as PTX on the CPU: the bits of the composition behind the
reference where sums are integers, floats near it."""

import itertools

import pytest
import torch
from cases import random_packed, random_x, same_bits
from cuda_on_cpu import OnCpu, all_kernels
from ptx import FAULTS, missing

from llmfp4_kernels import epilogue, native, reference
from llmfp4_kernels.backends import cuda
from llmfp4_kernels.formats import E2M1, E3M0, E4M3, element

WHY_NOT = missing() or native.problem_with_cuda()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MACHINES = {"cuda.gemv": ("sm_80", (8, 0)), "cuda.sm80": ("sm_80", (8, 0)), "cuda.sm90": ("sm_90a", (9, 0))}
EPILOGUES = [(True, False), (False, True), (True, True)]


def run(name, packed, x, bias, with_residual, gated, multiprocessors=8, seed=0, programs=None):
    """(y, what the composition makes of the reference's product)."""
    arch, capability = MACHINES[name]
    columns = packed.shape[0] // 2 if gated else packed.shape[0]
    residual = random_x(len(x), columns, x.dtype, seed=7) if with_residual else None
    with OnCpu(programs or all_kernels(arch), multiprocessors, seed, capability=capability) as gpu:
        y = gpu.run(cuda.Prepared(packed, bias), name, x, residual, gated)
    return y, epilogue.finish(reference.gemm(x.float(), packed, bias), residual, gated, x.dtype)


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize(("residual", "gated"), EPILOGUES, ids=["residual", "gated", "both"])
def test_integers_have_the_bits_of_the_composition(name, residual, gated):
    """Ragged columns, rows of y at no multiple of 16 bytes, two planes, blocks that share a sum over k, no bias."""
    cases = itertools.product([(E2M1, 96, 130), (E2M1, 112, 1300), (E3M0, 48, 70)], DTYPES)
    for i, ((activation, n, k), dtype) in enumerate(cases):
        packed = random_packed(n + (0 if gated else i % 3), k, E2M1, activation, True)
        bias = None if i % 4 == 3 else torch.randn(packed.shape[0])
        m = (3 if activation == E2M1 else 2) if name == "cuda.gemv" else 21
        # Two multiprocessors: one block sums all of k. 64: several do.
        y, wanted = run(name, packed, random_x(m, k, dtype) / 4, bias, residual, gated, (2, 64)[i % 2], seed=i % 2)
        assert same_bits(y, wanted), (name, n, k, dtype)


@pytest.mark.parametrize("rows", [40, 70, 250])
def test_every_tile_of_sm90(rows):
    packed, x = random_packed(160, 200, E2M1, E2M1, True), random_x(rows, 200, torch.bfloat16) / 4
    y, wanted = run("cuda.sm90", packed, x, torch.randn(160), True, True, multiprocessors=1)
    assert same_bits(y, wanted)


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize(("residual", "gated"), EPILOGUES, ids=["residual", "gated", "both"])
def test_floats_are_near_the_composition(name, residual, gated):
    kinds = [random_packed(48, 136, E2M1), random_packed(48, 136, E2M1, scale=E4M3, group_size=16)]
    kinds += [random_packed(48, 136, E2M1, element("e4m3"))] if name == "cuda.sm90" else []
    for packed, dtype in itertools.product(kinds, (torch.bfloat16, torch.float16)):
        x = random_x(3 if name == "cuda.gemv" else 18, 136, dtype) / (64 if packed.activation is None else 1)
        y, wanted = run(name, packed, x, torch.randn(48), residual, gated)
        torch.testing.assert_close(y.float(), wanted.float(), rtol=0.02, atol=0.02 * wanted.float().abs().max().item())


@pytest.mark.parametrize("name", MACHINES)
def test_a_bad_token_poisons_its_row_only(name):
    packed, x = random_packed(48, 130, E2M1, E2M1, True), random_x(4, 130)
    x[2, 5] = float("nan")
    y, wanted = run(name, packed, x, None, True, True)
    assert same_bits(y, wanted) and y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("name", MACHINES)
def test_a_residual_is_read_inside_of_its_memory_only(name):
    """One row short: the machine names it. What lies behind belongs to nobody."""
    packed, x = random_packed(48, 130, E2M1, E2M1, True), random_x(4, 130)
    arch, capability = MACHINES[name]
    short = torch.randn(4, 48)[:3]
    with OnCpu(all_kernels(arch), capability=capability) as gpu, pytest.raises(FAULTS["OutOfBounds"]):
        gpu.run(cuda.Prepared(packed, None), name, x, short)


def test_a_gated_weight_has_whole_eights():
    packed = random_packed(40, 130, E2M1, E2M1, True)
    with pytest.raises(ValueError, match="gates and ups come in eights, n is 40"):
        run("cuda.gemv", packed, random_x(2, 130), None, False, True)
