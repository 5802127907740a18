"""Which GPU is asked, and whether the native module holds code for it; no kernel runs here."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pybind11
import pytest
import torch
from cases import random_packed

from llmfp4_kernels import native
from llmfp4_kernels.backends import cuda, cuda_options, gpu, triton
from llmfp4_kernels.backends.triton import machine as triton_machine
from llmfp4_kernels.formats import E2M1, element
from llmfp4_kernels.problem import Problem
from llmfp4_kernels.registry import choose

ROOT = Path(__file__).parents[1]
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
RUNS = {
    "80-real": "80 86 89",
    "86-real": "86 89",
    "90-real": "90",
    "90": "90 100 103 120",
    "80-virtual": "80 86 89 90 100 103 120",
    "90a-real": "90",
    "90a": "90",
    "100f-real": "100 103",
    "100a": "100",
    "103-real": "103",
    "120": "120",
}
PROBLEM = Problem(1, 64, 64, E2M1, E2M1, device="cuda")


def built_for(monkeypatch, *architectures):
    monkeypatch.setattr(native, "problem_with_cuda", lambda: None)
    monkeypatch.setattr(native, "module", lambda: SimpleNamespace(cuda_architectures=architectures))


@pytest.mark.parametrize("architecture", RUNS)
def test_what_runs_where(architecture):
    runs = " ".join(gpu.sm(c).removeprefix("sm_") for c in CAPABILITIES if gpu.runs_on(architecture, c))
    assert runs == RUNS[architecture]


def test_a_module_without_code_for_this_gpu_is_refused(monkeypatch):
    built_for(monkeypatch, "90", "90a-real")
    capability = {"value": (8, 0)}
    monkeypatch.setattr(cuda.machine, "capability", lambda index: capability["value"])
    monkeypatch.setattr(triton_machine, "problem_with_triton", lambda: "no Triton")
    sentence = "this GPU is sm_80, the native module was built for 90, 90a-real: build it with "
    sentence += "LLMFP4_CUDA_ARCHITECTURES=80"
    assert {row.refusal(PROBLEM) for row in cuda.KERNELS} == {sentence}
    assert cuda_options.KERNELS[2].refusal(PROBLEM) == sentence
    with pytest.warns(UserWarning, match="this GPU is sm_80"):
        assert choose(PROBLEM).name == "reference"
    for capability["value"], built in (((9, 0), ("90a-real",)), ((12, 0), ("80-real", "90-real", "90a"))):
        built_for(monkeypatch, *built)
        assert f"was built for {', '.join(built)}" in cuda.refusal("gemv", PROBLEM)
    built_for(monkeypatch, "90-real", "90a-real")
    capability["value"] = (9, 0)
    assert cuda.refusal("gemv", PROBLEM) is None and cuda.refusal("sm90", PROBLEM) is None


def test_the_gpu_that_is_asked_holds_the_tensors(monkeypatch):
    """GPU 0, the current one, is an sm_75; the tensors are on GPU 1, an sm_90."""
    capabilities = {None: (7, 5), 0: (7, 5), 1: (9, 0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(triton_machine, "problem_with_triton", lambda: None)
    built_for(monkeypatch, "90", "90a-real")
    e4m3 = element("e4m3")
    for index in (0, 1):
        packed = random_packed(64, 64, E2M1, e4m3)
        packed.codes = SimpleNamespace(device=torch.device("cuda", index))
        problem = Problem.of(packed, 40, torch.bfloat16)
        assert problem.device_index == index
        for refusal in (cuda.refusal("sm90", problem), triton.refusal("gemm", problem)):
            assert (refusal is None) == (index == 1), refusal
    assert "sm_75" in cuda.refusal("gemv", PROBLEM)


@pytest.mark.skipif(CMAKE is None, reason="there is no cmake")
@pytest.mark.parametrize("word", ["native", "all-major", "sm_90"])
def test_architectures_are_numbers(word, tmp_path):
    done = subprocess.run(
        [CMAKE, ROOT, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}",
         f"-DLLMFP4_CUDA_ARCHITECTURES=80-real;{word}", "-DLLMFP4_NVCC=/usr/bin/true"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode and re.search(f"'{word}'\\s+is\\s+no\\s+number", done.stderr), done.stderr


def test_products_beyond_a_grid_are_refused(monkeypatch):
    built_for(monkeypatch, "80", "90a-real")
    monkeypatch.setattr(cuda.machine, "capability", lambda index: (9, 0))
    rows = [row for row in cuda.KERNELS if row.name in ("cuda.gemv", "cuda.sm80", "cuda.sm90")]
    for side, most in (("n", 64 * 65535), ("k", 256 * 65535)):
        problem = replace(PROBLEM, activation=None, dtype=torch.bfloat16, **{side: most})
        assert [row.refusal(problem) for row in rows] == [None] * 3
        sentence = f"{side} = {most + 1} is more than {most}, which a grid holds"
        assert {row.refusal(replace(problem, **{side: most + 1})) for row in rows} == {sentence}
