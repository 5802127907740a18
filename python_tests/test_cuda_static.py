"""What ptxas made of the CUDA kernels, read from the built module: no spills, registers and shared memory, opcodes."""

import dataclasses
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import random_packed, random_x
from cuda_on_cpu import CSRC, OnCpu, ptx_of_file
from ptx import build
from test_cuda_fp8 import WIDTHS

from llmfp4_kernels import native
from llmfp4_kernels.backends import cuda, cuda_options
from llmfp4_kernels.formats import E2M1, E4M3, Dynamic, element


def cuobjdump() -> str | None:
    beside = [Path(p) / "nvidia/cu13/bin/cuobjdump" for p in sys.path]
    return shutil.which("cuobjdump") or next((str(p) for p in beside if p.is_file()), None)


NO_TOOL = None if cuobjdump() else "no cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)"
WHY_NOT = native.problem_with_cuda() or NO_TOOL
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
BUDGETS = {
    # registers a thread, so many blocks fit the 65536 of a multiprocessor; bytes of shared memory a block, static and
    # dynamic, of the 167936 of a multiprocessor of sm_80 (sm_86, sm_89: 102400), which take 1024 more for each block
    "quantize_activations": (128, 128, 0),  # 1 of 512 threads
    "split_activations": (64, 0, 0),  # 4 of 256
    r"gemv_\w+_8": (128, 16, 4096),  # 2 of 256
    r"gemv_(int8|b?f16|int8_shifted)_16": (128, 16, 8192),
    r"gemv_\w+_grouped_16": (168, 16, 8192),  # 1 of 256
    "gemv_bf16_shifted_16": (192, 16, 8192),
    "gemm_sm80_int8_64x32": (96, 128, 16384),  # 5 of 128
    "gemm_sm80_int8_128x64": (168, 128, 32768),  # 3 of 128
    "gemm_sm80_int8_128x128": (255, 128, 49152),  # 2 of 128
    "gemm_sm80_int8_shifted_64x32": (96, 128, 16640),
    "gemm_sm80_int8_shifted_128x64": (168, 128, 33024),
    "gemm_sm80_int8_shifted_128x128": (255, 128, 49408),
    "gemm_sm80_int8_packed_64x32": (96, 128, 12544),
    "gemm_sm80_int8_packed_128x64": (168, 128, 24832),
    "gemm_sm80_int8_packed_128x128": (255, 128, 33024),
    "gemm_sm80_int8_grouped_64x32": (96, 128, 17408),
    "gemm_sm80_int8_grouped_128x64": (168, 128, 34816),
    r"gemm_sm80_b?f16_64x32": (96, 128, 24576),
    "gemm_sm80_bf16_shifted_64x32": (96, 128, 24832),
    "gemm_sm80_bf16_shifted_128x64": (168, 128, 49408),
    r"gemm_sm80_b?f16_grouped_64x32": (96, 128, 25600),
    r"gemm_sm80_b?f16_128x64": (168, 128, 49152),
    r"gemm_sm80_b?f16_grouped_128x64": (168, 128, 51200),
    r"gemm_sm80_b?f16_128x128": (255, 128, 81920),
}
BUDGETS_SM90 = {  # registers a thread; shared memory is held to its limits where it is declared
    r"gemm_sm90_\w+_(32|64)": 96,  # 2 of 288 threads; 9 warps on 4 schedulers count as 12
    r"gemm_sm90_\w+_(128|256)": 168,  # 1 of 288
}
BUDGETS_SM120 = {
    "quantize_sm120_activations": 128,  # 1 of 512 threads
    r"gemm_sm120_\w+4": 168,  # 2 of 128, as many as shared memory holds
}
KERNELS = {"sm_90a": 26, "sm_120a": 3}
"""Of the architectures that have kernels of their own; the others have 41."""
OPCODES = {
    r"gem(v|m_sm80)_int8_\w+": r"IMMA\.16832\.S8\.S8",
    r"gem(v|m_sm80)_int8_grouped_\w+": r"IMMA\.16816\.S8\.S8",
    r"gem(v|m_sm80)_f16_\w+": r"HMMA\.16816\.F32 ",
    r"gem(v|m_sm80)_bf16_\w+": r"HMMA\.16816\.F32\.BF16 ",
    r"gemm_sm80_\w+": r"LDGSTS\.E\.BYPASS\.\S*128",
    r"gemv_\w+": r"LDG\.E\.\S*128\.\S*CONSTANT",
    r"gemm_sm90_int8_\w+": r"IGMMA\.64x\d+x32\.S8\.S8",
    r"gemm_sm90_fp8_\w+": r"QGMMA\.64x\d+x32\.F32\.E4M3\.E4M3",
    r"gemm_sm90_f16_\w+": r"HGMMA\.64x\d+x16\.F32 ",
    r"gemm_sm90_bf16_\w+": r"HGMMA\.64x\d+x16\.F32\.BF16 ",
    r"gemm_sm90_\w+": r"UBLKCP",
    "gemm_sm120_mxf4": r"OMMA\.SF\.16864\.F32\.E2M1\.E2M1\.E8 ",
    "gemm_sm120_nvf4": r"OMMA\.SF\.16864\.F32\.E2M1\.E2M1\.UE4M3\.4X ",
    r"gemm_sm120_\w+4": r"LDGSTS\.E\.BYPASS\.128",
}


def dump(option: str) -> dict[tuple[str, str], str]:
    """cuobjdump's text about each (architecture, kernel) of the module."""
    tool = Path(cuobjdump())
    command = [str(tool), option, native.module().__file__]
    path = {"PATH": f"{tool.parent}:/usr/bin:/bin"}
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=path).stdout
    found = {}
    for section in text.split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (sm_\d+a?)", section)[1]
        for body in section.split("Function ")[1:]:
            found[arch, re.match(r":?\s*(\w+)", body)[1]] = body
    return found


def matching(table, name):
    return [value for pattern, value in table.items() if re.fullmatch(pattern, name)]


class Launches(OnCpu):
    """Runs nothing; notes the dynamic shared memory that each kernel is launched with."""

    def launch(self, launch, parameters) -> int:
        one = launch.contents
        self.dynamic.setdefault(one.name.decode(), set()).add(one.shared)
        return 0

    def run(self, packed, name, m, dtype=torch.bfloat16):
        prepared = cuda.Prepared(packed, None)
        super().run(prepared, name, random_x(m, packed.k, dtype))


def dynamic_shared_memory() -> dict[str, set[int]]:
    """Of every kernel, as the real call path launches it."""
    integer, floats = random_packed(64, 128, E2M1, E2M1, True), random_packed(64, 128, E2M1)
    grouped = random_packed(64, 128, E2M1, scale=E4M3, group_size=16)
    with Launches([]) as gpu:
        gpu.dynamic = {}
        for packed in (integer, floats, grouped):
            for m, dtype in itertools.product((1, 16, 17, 64, 128), (torch.bfloat16, torch.float16)):
                for name in ("cuda.gemv", "cuda.sm80") if m <= 16 else ("cuda.sm80",):
                    gpu.run(packed, name, m, dtype)
        gpu.run(floats, "cuda.gemv", 1, torch.float32)
        int8 = dataclasses.replace(grouped, activation=element("e1m6"), dynamic=Dynamic())
        for m, row in itertools.product((1, 16, 17, 64, 128), cuda_options.OPTIONS):
            if m <= 16 or "gemv" not in row:
                gpu.run(integer, f"cuda.{row}", m)
            gpu.run(int8, "cuda.gemv" if m <= 16 else "cuda.sm80", m)
        gpu.run(int8, "cuda.sm80", 1)
        for m, row in ((1, "gemv"), (16, "gemv"), (17, "sm80"), (64, "sm80"), (128, "sm80")):
            gpu.run(random_packed(64, 128, E2M1, shift=True), f"cuda.{row}-weight-shift", m)
    return gpu.dynamic


def test_no_spills_and_registers_within_budget():
    found = dump("-res-usage")
    for (arch, name), usage in found.items():
        number = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        (budget,) = matching(BUDGETS_SM90 | BUDGETS_SM120, name) or [most for most, _, _ in matching(BUDGETS, name)]
        assert number["STACK"] == number["LOCAL"] == 0, f"{name} spills on {arch}: {usage}"
        assert number["REG"] <= budget, f"{name} takes {number['REG']} registers on {arch}, its budget is {budget}"
    built = {"sm_" + re.match(r"\d+a?", a)[0] for a in native.module().cuda_architectures}
    count = {arch: sum(a == arch for a, _ in found) for arch in {arch for arch, _ in found}}
    assert count == {arch: KERNELS.get(arch, 41) for arch in built}


def test_products_of_warpgroups_are_not_serialised(tmp_path):
    """ptxas says so where it makes wgmma wait for each product: not enough registers, or a register in use."""
    (tmp_path / "x.ptx").write_text(ptx_of_file(CSRC / "cuda" / "gemm_sm90.cu", "sm_90a"))
    ptxas = Path(build.nvcc()).resolve().parent / "ptxas"
    command = [ptxas, "-arch", "sm_90a", "-v", tmp_path / "x.ptx", "-o", tmp_path / "x.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert said.count("Compiling entry function") == KERNELS["sm_90a"] and not re.search(r"\(C75\d\d\)", said), said


def test_shared_memory_is_what_the_table_says():
    """sm_90's compiler counts the 1024 bytes that the system takes of each block with static shared memory."""
    dynamic = dynamic_shared_memory()
    for (arch, name), usage in dump("-res-usage").items():
        if arch in KERNELS:
            continue
        ((_, static, budget),) = matching(BUDGETS, name)
        system = 1024 if static and int(arch.removeprefix("sm_")) >= 90 else 0
        measured = int(re.search(r"SHARED:(\d+)", usage)[1]) - system
        assert measured == static, f"{name} has {measured} bytes of static shared memory on {arch}, expected {static}"
        assert dynamic[name] == {budget}, f"{name} is launched with {dynamic[name]} bytes, expected {budget}"
        assert static + budget + 1024 <= 102400, f"{name}: no block of {static} + {budget} bytes fits sm_86"


def test_tensor_cores_and_wide_loads_are_used():
    for (arch, name), sass in dump("-sass").items():
        for opcode in matching(OPCODES, name):
            assert re.search(opcode, sass), f"{name} on {arch} has no {opcode}"
        assert not re.search(r"\b(LDL|STL)\b", sass), f"{name} on {arch} uses local memory"
        if kernel := re.fullmatch(r"gemm_sm90_(\w+)_(\d+)", name):
            widths = set(map(int, re.findall(r"GMMA\.64x(\d+)x", sass)))
            assert widths == set(WIDTHS[int(kernel[2])]) - ({40, 56} if kernel[1] == "int8" else set()), name
