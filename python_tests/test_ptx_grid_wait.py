"""griddepcontrol.wait on the PTX machine: memory of the kernel before, and who may touch it when."""

import ctypes

import pytest
import torch
from ptx import FAULTS, In, Out, compile_cuda, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")
SOURCE = """
extern "C" __global__ void copy(const int* weight, const int* x, int* y, int waits, int barrier) {
    int sum = weight[threadIdx.x];
    if (threadIdx.x / 32 < waits) asm volatile("griddepcontrol.wait;" ::: "memory");
    if (barrier) __syncthreads();
    y[threadIdx.x] = sum + x[threadIdx.x];
}
"""


@pytest.fixture(scope="module")
def program():
    return compile_cuda(SOURCE, "sm_90a")


def run(program, waits, barrier, late=("x",), seed=0):
    """`waits` of two warps execute griddepcontrol.wait, then all meet at a barrier, or not."""
    weight, x, y = torch.arange(64, dtype=torch.int32), torch.ones(64, dtype=torch.int32), torch.empty(64).int()
    memory = [(t.data_ptr(), 256, n, m) for t, n, m in ((weight, "weight", In), (x, "x", In), (y, "y", Out))]
    values = [*(ctypes.c_uint64(t.data_ptr()) for t in (weight, x, y)), ctypes.c_int(waits), ctypes.c_int(barrier)]
    parameters = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    program.launch("copy", (1, 1, 1), 64, 0, parameters, memory, seed, late=late)
    assert torch.equal(y, weight + x)


@pytest.mark.parametrize("seed", range(3))
def test_who_waits_or_meets_one_that_has_may_read(program, seed):
    run(program, 2, False, seed=seed)
    run(program, 1, True, seed=seed)
    run(program, 0, False, (), seed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("waits", "barrier"), [(0, False), (0, True), (1, False)])
def test_others_may_not(program, waits, barrier, seed):
    with pytest.raises(FAULTS["MissingWait"], match=r"of x, where the kernel before .* before griddepcontrol.wait"):
        run(program, waits, barrier, seed=seed)


def test_nor_may_they_write(program):
    with pytest.raises(FAULTS["MissingWait"], match=r"global write of byte \d+ of y"):
        run(program, 0, True, ("y",))
