"""What ptxas made of the CUDA kernels, read from the built module: no spills, registers within budget, opcodes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_on_cpu import CSRC
from ptx import build

from llmfp4_kernels import native


def cuobjdump() -> str | None:
    beside = [Path(p) / "nvidia/cu13/bin/cuobjdump" for p in sys.path]
    return shutil.which("cuobjdump") or next((str(p) for p in beside if p.is_file()), None)


NO_TOOL = None if cuobjdump() else "no cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)"
WHY_NOT = native.problem_with_cuda() or NO_TOOL
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
BUDGETS = {  # registers a thread: so many blocks fit the 65536 of a multiprocessor
    "quantize_activations": 128,  # 1 of 512 threads
    "split_activations": 64,  # 4 of 256
    r"gemv_\w+_8|gemv_\w+_16(?<!grouped_16)": 128,  # 2 of 256
    r"gemv_\w+_grouped_16": 168,  # 1 of 256
    r"gemm_sm80_\w+_64x32": 96,  # 5 of 128
    r"gemm_sm80_\w+_128x64": 168,  # 3 of 128
    r"gemm_sm80_\w+_128x128": 255,  # 2 of 128
    r"gemm_sm90_\w+_(32|64)": 96,  # 2 of 288; 9 warps on 4 schedulers count as 12
    r"gemm_sm90_\w+_(128|256)": 168,  # 1 of 288
}
KERNELS, KERNELS_SM90 = 25, 19
OPCODES = {
    r"gem(v|m_sm80)_int8_\w+": r"IMMA\.16832\.S8\.S8",
    r"gem(v|m_sm80)_f16_\w+": r"HMMA\.16816\.F32 ",
    r"gem(v|m_sm80)_bf16_\w+": r"HMMA\.16816\.F32\.BF16 ",
    r"gemm_sm80_\w+": r"LDGSTS\.E\.BYPASS\.\S*128",
    r"gemv_\w+": r"LDG\.E\.\S*128\.\S*CONSTANT",
    r"gemm_sm90_int8_\w+": r"IGMMA\.64x\d+x32\.S8\.S8",
    r"gemm_sm90_fp8_\w+": r"QGMMA\.64x\d+x32\.F32\.E4M3\.E4M3",
    r"gemm_sm90_f16_\w+": r"HGMMA\.64x\d+x16\.F32 ",
    r"gemm_sm90_bf16_\w+": r"HGMMA\.64x\d+x16\.F32\.BF16 ",
    r"gemm_sm90_\w+": r"UBLKCP",
}


def dump(option: str) -> dict[tuple[str, str], str]:
    """cuobjdump's text about each (architecture, kernel) of the module."""
    tool = Path(cuobjdump())
    command = [str(tool), option, native.module().__file__]
    path = {"PATH": f"{tool.parent}:/usr/bin:/bin"}
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=path).stdout
    found = {}
    for section in re.split(r"Fatbin elf code:", text)[1:]:
        arch = re.search(r"arch = (sm_\d+a?)", section)[1]
        for name, body in re.findall(r"Function\s*:?\s*(\w+):?(.*?)(?=Function\b|\Z)", section, flags=re.S):
            found[arch, name] = body
    return found


def matching(table, name):
    return [value for pattern, value in table.items() if re.fullmatch(pattern, name)]


def test_no_spills_and_registers_within_budget():
    found = dump("-res-usage")
    for (arch, name), usage in found.items():
        number = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        (budget,) = matching(BUDGETS, name)
        assert number["STACK"] == number["LOCAL"] == 0, f"{name} spills on {arch}: {usage}"
        assert number["REG"] <= budget, f"{name} takes {number['REG']} registers on {arch}, its budget is {budget}"
    built = {"sm_" + re.match(r"\d+a?", a)[0] for a in native.module().cuda_architectures}
    count = {arch: sum(a == arch for a, _ in found) for arch in {arch for arch, _ in found}}
    assert count == {arch: KERNELS_SM90 if arch == "sm_90a" else KERNELS for arch in built}


def test_products_of_warpgroups_are_not_serialised(tmp_path):
    """ptxas says so where it makes wgmma wait for each product: not enough registers, or a register in use."""
    source = CSRC / "cuda" / "gemm_sm90.cu"
    code = ("-gencode", "arch=compute_90a,code=sm_90a")
    command = [build.nvcc(), "-std=c++17", "-O3", "-cubin", *code, "-Xptxas", "-v", source, "-o", tmp_path / "x.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert said.count("Compiling entry function") == KERNELS_SM90 and not re.search(r"\(C75\d\d\)", said), said


def test_tensor_cores_and_wide_loads_are_used():
    for (arch, name), sass in dump("-sass").items():
        for opcode in matching(OPCODES, name):
            assert re.search(opcode, sass), f"{name} on {arch} has no {opcode}"
        assert not re.search(r"\b(LDL|STL)\b", sass), f"{name} on {arch} uses local memory"
