"""The machine that runs compiled CUDA kernels: whole kernels bit by bit, and planted bugs, each caught by name."""

import pytest
import torch
from mutants import RIGHT, WRONG, assert_caught
from ptx import FAULTS, In, Out, compile_cuda, missing
from ptx_mutants import MUTANTS, combined

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")
TILES = 4 * 64 * 64


@pytest.fixture(scope="module")
def program():
    return compile_cuda(combined())


def run_gemm(program, name, m, n, k, seed=0, limit_s=30.0):
    generator = torch.Generator().manual_seed(m + n + k)
    a, b = (torch.randint(-128, 128, (r, k), generator=generator, dtype=torch.int8) for r in (m, n))
    c = torch.empty(m, n, dtype=torch.int32)
    grid = (-(-n // 64), -(-m // 64))
    report = program.run(name, grid, 128, [In(a), In(b), Out(c), m, n, k], shared=TILES, seed=seed, limit_s=limit_s)
    assert report.unwritten == [0]
    return torch.equal(c, (a.double() @ b.double().T).int())


def run_reduction(program, name, n=1600, blocks=3, seed=0, limit_s=30.0):
    x = torch.randint(-99, 99, (n,), generator=torch.Generator().manual_seed(n)).float()
    partial, total, arrived = torch.empty(blocks), torch.empty(1), torch.zeros(1, dtype=torch.int32)
    program.run(name, blocks, 128, [In(x), Out(partial), arrived, Out(total), n], seed=seed, limit_s=limit_s)
    return total.item() == x.sum().item() and arrived.item() == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("m, n, k", [(64, 64, 64), (100, 72, 208), (1, 65, 16)])
def test_gemm_equals_integer_product(program, m, n, k, seed):
    assert run_gemm(program, "gemm_0", m, n, k, seed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n, blocks", [(1600, 3), (4, 1), (128, 2)])
def test_reduction_is_exact(program, n, blocks, seed):
    assert run_reduction(program, "reduction_1", n, blocks, seed)


@pytest.mark.parametrize("i", range(len(MUTANTS)), ids=[f"{m[0]}: {m[1]}" for m in MUTANTS])
def test_planted_bug_is_caught_by_name(program, i):
    kernel, _, _, _, expected = MUTANTS[i]
    name, limit_s = f"{kernel}_{i + 2}", 1.0 if expected == "TimeLimit" else 30.0

    def outcome():
        if kernel == "gemm":
            return RIGHT if run_gemm(program, name, 100, 72, 208, limit_s=limit_s) else WRONG
        return RIGHT if run_reduction(program, name, limit_s=limit_s) else WRONG

    found, text = assert_caught(outcome, expected, name)
    if found == "Race":
        assert text.count("PTX line") == 2, text


SAME_PLACE = """
extern "C" __global__ void same_place(int* y, int lanes_differ, int warps_share) {
    __shared__ int word[2];
    int warp = threadIdx.x / 32, place = warps_share ? 0 : warp;
    word[place] = lanes_differ ? threadIdx.x : warps_share ? 7 : warp;
    __syncthreads();
    y[threadIdx.x] = word[place];
}
"""


@pytest.mark.parametrize("seed", range(3))
def test_lanes_of_a_warp_may_store_one_value_to_one_place(seed):
    """Neither two values, nor two warps."""
    program, y = compile_cuda(SAME_PLACE), torch.empty(64, dtype=torch.int32)
    program.run("same_place", 1, 64, [Out(y), 0, 0], seed=seed)
    assert torch.equal(y, torch.arange(64, dtype=torch.int32) // 32)
    for differ, share, sentence in ((1, 0, "same warp, no __syncwarp between.*of another value"), (0, 1, "thread")):
        with pytest.raises(FAULTS["Race"], match=sentence):
            program.run("same_place", 1, 64, [Out(y), differ, share], seed=seed)
