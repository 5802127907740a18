"""Programmatic dependent launch on the PTX machine, in the machine code of sm_90: weights are under way before a kernel
waits for the one before it, and nothing else is touched."""

import pytest
import torch
from cases import random_packed, random_x, same_bits
from cuda_mutants import HEADERS, ptx_of
from cuda_mutants_sm90 import OF
from cuda_on_cpu import CSRC, OnCpu, program_of
from ptx import FAULTS, Program, missing

from llmfp4_kernels import native, reference
from llmfp4_kernels.backends import cuda
from llmfp4_kernels.formats import E2M1

WHY_NOT = missing() or native.problem_with_cuda()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
INSTANCES = {
    "gemv_int8_8": ("cuda.gemv", "Gemv<Int8>", "gemv_block<Int8, false, 1>(p)"),
    "gemm_sm80_int8_64x32": ("cuda.sm80", "Gemm<Int8>", "gemm_block<Int8, false, 1, 4>(p)"),
}
SM90 = {"gemm_sm90_int8_32": ("cuda.sm90", "GemmSm90<Int8>", "gemm_sm90_block<Int8, false, 4>(p)")}
FILES = {"gemv_int8_8": "gemv.h", "gemm_sm80_int8_64x32": "gemm_sm80.h", "gemm_sm90_int8_32": "gemm_sm90.h"}
WAIT = "wait_for_previous_kernel();"
FIRST = {  # where a kernel begins
    "gemv.h": "    const WarpShare share(kernel.warps_n, p.strips, p.units_k);\n",
    "gemm_sm80.h": "    typename Operand::Sum acc[strips][rows8][4] = {};\n    auto weights_of",
    "gemm_sm90.h": "    const int lane = threadIdx.x % warp_size;\n    const unsigned x_bytes",
}


def variants(kernel):
    """As it is, without the wait, and with the wait before the weights."""
    file = FILES[kernel]
    yield kernel, file, "as it is", WAIT, WAIT, ""
    yield kernel, file, "no wait", WAIT, "", "MissingWait"
    yield kernel, file, "waits first", FIRST[file], f"    {WAIT}\n{FIRST[file]}", ""


VARIANTS = [v for kernel in INSTANCES for v in variants(kernel)]
TAKEN = "        taken += count;\n"
AHEAD = f"{TAKEN}        if (Range(share, taken).count) stages.wait_until_full(taken);\n"
"""Sums leave when the first unit of the next range has come."""
VARIANTS_SM90 = [
    *variants("gemm_sm90_int8_32"),
    ("gemm_sm90_int8_32", "gemm_sm90.h", "copies are ahead", TAKEN, AHEAD, ""),
]


@pytest.fixture(scope="module")
def programs():
    of = {"mutants": VARIANTS, "instances": INSTANCES, "headers": HEADERS}
    warps = ptx_of(range(len(VARIANTS)), "sm_90a", **of)
    groups = ptx_of(range(len(VARIANTS_SM90)), "sm_90a", **OF | {"mutants": VARIANTS_SM90, "instances": SM90})
    first = program_of(CSRC / "cuda" / "activations.cu", "sm_90a")
    of_warps = [first, Program(warps)]
    return {"gemv_int8_8": of_warps, "gemm_sm80_int8_64x32": of_warps, "gemm_sm90_int8_32": [first, Program(groups)]}


class WeightsLate(OnCpu):
    """As though the kernel before wrote the codes."""

    def early(self):
        return super().early() - {"codes"}


def run(programs, kernel, kind, machine=OnCpu, n=48):
    of, instances = (VARIANTS_SM90, SM90) if kernel in SM90 else (VARIANTS, INSTANCES)
    number = next(i for i, v in enumerate(of) if v[0] == kernel and v[2] == kind)
    packed, x = random_packed(n, 700, E2M1, E2M1, True), random_x(3, 700)
    with machine(programs[kernel], 2 if n == 48 else 1, instead={kernel: f"mutant_{number}"}, capability=(9, 0)) as gpu:
        gpu.programs[kernel] = gpu.programs[f"mutant_{number}"]
        y = gpu.run(cuda.Prepared(packed, None), instances[kernel][0], x)
    assert kernel in gpu.launched and same_bits(y, reference.gemm(x, packed))


@pytest.mark.parametrize("kernel", FILES)
def test_activations_are_read_after_the_wait(kernel, programs):
    run(programs, kernel, "as it is")
    run(programs, kernel, "waits first", WeightsLate)
    with pytest.raises(FAULTS["MissingWait"], match="of operands, where the kernel before"):
        run(programs, kernel, "no wait")


@pytest.mark.parametrize("kernel", FILES)
def test_weights_are_fetched_before_it(kernel, programs):
    with pytest.raises(FAULTS["MissingWait"], match="of codes, where the kernel before"):
        run(programs, kernel, "as it is", WeightsLate)


def test_the_next_range_is_under_way_while_sums_leave(programs):
    """Were the copying warp to wait for them, this would be a deadlock. Five tiles, two blocks."""
    run(programs, "gemm_sm90_int8_32", "copies are ahead", n=600)


def test_kernels_overlap_those_that_make_their_operands_only():
    """What ran before these in the stream is unknown, and may have written the weights."""
    overlaps = []

    class Noted(OnCpu):
        def launch(self, launch, parameters):
            overlaps.append((launch.contents.name.decode(), bool(launch.contents.overlap)))
            return 0

    with Noted([], capability=(9, 0)) as gpu:
        for packed in (random_packed(48, 128, E2M1, E2M1, True), random_packed(48, 128, E2M1)):
            for name in ("cuda.gemv", "cuda.sm80", "cuda.sm90"):
                gpu.run(cuda.Prepared(packed, None), name, torch.randn(3, 128).bfloat16())
    first = [name for name, overlap in overlaps if not overlap]
    assert overlaps[1] == ("gemv_int8_8", True) and ("gemv_bf16_8", False) in overlaps
    assert all(name.endswith("activations") or "bf16" in name for name in first)
