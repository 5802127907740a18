"""The tests of test_gpu.py on the PTX machine, in small: whether they ask for what the kernels do."""

import dataclasses
from types import SimpleNamespace

import pytest
import test_gpu
import torch
from cuda_on_cpu import OnCpu, all_kernels
from ptx import missing

from llmfp4_kernels import native
from llmfp4_kernels.backends import cuda, graphs
from llmfp4_kernels.formats import E2M1, E4M3, E8M0
from llmfp4_kernels.packed import PackedFP4
from llmfp4_kernels.problem import Problem

WHY_NOT = missing() or native.problem_with_cuda()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")


class Rehearsal(OnCpu):
    """Every Prepared.run goes through OnCpu.run. Kernels are PTX of sm_80, which do not overlap, but for wgmma's."""

    inside = False

    def __enter__(self):
        super().__enter__()
        self.real = cuda.Prepared.run
        self.machine.queue = lambda device: cuda.Queue(0, 16, False, 0)

        def run(prepared, kernel, x, *epilogue):
            if self.inside:
                return self.real(prepared, kernel, x, *epilogue)
            self.inside = True
            try:
                return self.run(prepared, kernel.name, x, *epilogue)
            finally:
                self.inside = False

        cuda.Prepared.run = run
        return self

    def __exit__(self, *error):
        cuda.Prepared.run = self.real
        super().__exit__(*error)


@pytest.fixture(params=[(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
def gpu(request, monkeypatch):
    on_gpu = lambda packed, m, dtype: dataclasses.replace(Problem.of(packed, m, dtype), device="cuda")  # noqa: E731
    monkeypatch.setattr(test_gpu, "Problem", SimpleNamespace(of=on_gpu))
    monkeypatch.setattr(test_gpu, "SHAPES", [(1, 1, 1), (9, 70, 515), (17, 33, 40)])
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(PackedFP4, "to", lambda packed, device: packed)
    programs = all_kernels()
    if request.param == (9, 0):
        programs = [*programs, *(p for p in all_kernels("sm_90a") if "gemm_sm90_int8_32" in p.names)]
    with Rehearsal(programs, 16, capability=request.param) as machine:
        yield machine


def test_each_kind_of_test(gpu):
    test_gpu.test_static_integers((E2M1, E2M1))
    test_gpu.test_floats((E4M3, 16), torch.float16)
    test_gpu.test_shifts_of_floats_on_either_side(torch.bfloat16)
    test_gpu.test_groups_of_integers((E8M0, 32))
    if gpu.machine.capability(0) == (9, 0):
        test_gpu.test_fp8_activations("e4m3fn")


def test_how_tiles_are_measured(gpu, monkeypatch, tmp_path):
    watch = SimpleNamespace(wait=lambda: None, copies=lambda size: 2)
    watch.turns = lambda calls, x: SimpleNamespace(seconds=lambda budget: float(len(calls)))
    monkeypatch.setattr(graphs, "Stopwatch", lambda device: watch)
    test_gpu.test_measured_tiles_are_right_and_used(monkeypatch, tmp_path)


def test_what_the_memory_checker_runs(gpu):
    test_gpu.test_small_problems_of_every_kind()


@pytest.mark.parametrize("name", ["cuda.gemv", "cuda.sm80", "cuda.sm80-packed"])
def test_a_row_that_does_not_run_is_missed(name, gpu, monkeypatch):
    for table in (test_gpu.cuda, test_gpu.cuda_options):
        rows = [dataclasses.replace(r, refusal=lambda p: "no") if r.name == name else r for r in table.KERNELS]
        monkeypatch.setattr(table, "KERNELS", tuple(rows))
    monkeypatch.setattr(test_gpu, "SHAPES", [(1, 16, 64)])
    with pytest.raises(AssertionError, match=f"{name}.* did not run m = 1"):
        test_gpu.test_static_integers((E2M1, E2M1))


def test_e4m3_is_skipped_without_hopper(gpu):
    if gpu.machine.capability(0) == (8, 0):
        with pytest.raises(pytest.skip.Exception, match="this GPU is no sm_90"):
            test_gpu.test_fp8_activations("e4m3fn")
