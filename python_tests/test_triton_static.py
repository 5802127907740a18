"""What Triton and ptxas make of the kernels for every architecture: tensor cores, no spills, no other rounding."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from cases import random_packed, random_x
from test_cuda_fp8 import packed_of
from test_cuda_static import NO_TOOL, cuobjdump
from test_dynamic import dynamic_packed
from triton_on_cpu import WHY_NOT, OnCpu

from llmfp4_kernels.backends.triton import configs, fp8, machine
from llmfp4_kernels.formats import E2M1, E4M3, E4M3FN, INTEGER, Dynamic

pytestmark = pytest.mark.skipif((WHY_NOT or NO_TOOL) is not None, reason=WHY_NOT or NO_TOOL or "")
UNFENCED = r"cp\.async\.wait_group(?:(?!fence\.proxy\.async).)*?wgmma\.mma_async"
ARCHITECTURES = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]


def compiled(arch, packed, x, name):
    """{kernel: launch} of a product in the table's tiles."""
    from llmfp4_kernels.backends.triton.prepared import Prepared

    with OnCpu(arch, multiprocessors=132, config=None, static=True) as gpu:
        return {one.name: one for one in gpu.later(Prepared(packed, None), f"triton.{name}", x, None)}


def dump(one, option, folder):
    """cuobjdump's text about a kernel."""
    path = folder / f"{one.name}.cubin"
    path.write_bytes(one.cubin)
    tool = Path(cuobjdump())
    environment = {"PATH": f"{tool.parent}:/usr/bin:/bin"}
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True, env=environment).stdout


def problems(arch):
    """(packed, x, kernel, opcode of the product): what a table's rows multiply."""
    wgmma = arch == (9, 0)
    imma, hmma = (r"IGMMA\.", r"HGMMA\.") if wgmma else (r"IMMA\.16832\.S8\.S8", r"HMMA\.16816\.F32")
    if arch == (10, 0) and machine.version() >= configs.FENCED:
        imma = hmma = r"UTC\w+MMA"
    yield dynamic_packed(4096, 4096, E2M1, E2M1, Dynamic(16, INTEGER)), random_x(1, 4096, torch.bfloat16), "gemv", imma
    yield random_packed(4096, 4096, E2M1), random_x(40, 4096, torch.float16), "gemm", hmma
    if arch in ((8, 0), (9, 0)):
        yield random_packed(4096, 4096, E2M1, E2M1, True), random_x(300, 4096), "gemm", imma
        grouped = random_packed(4096, 4096, E2M1, scale=E4M3, group_size=16)
        yield grouped, random_x(1, 4096, torch.bfloat16), "gemv", hmma.replace("F32", r"F32\.BF16")
    if machine.version() >= fp8.SINCE.get(arch, (99, 0)):
        qmma = {(9, 0): r"QGMMA\.", (10, 0): r"UTC\w+MMA"}.get(arch, r"QMMA\.16832\.F32\.E4M3\.E4M3")
        for m, name, group in ((1, "gemv", 32), (300, "gemm", 0), (300, "gemm", 32))[: 3 if arch < (10, 0) else 1]:
            yield packed_of(4096, 4096, E2M1, E4M3FN, True, 0, group), random_x(m, 4096, torch.bfloat16), name, qmma


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda a: f"sm_{a[0]}{a[1]}")
def test_every_architecture(arch, tmp_path):
    for packed, x, name, opcode in problems(arch):
        launches = compiled(arch, packed, x, name)
        assert re.search(rf"\b{opcode}", dump(launches["product"], "-sass", tmp_path)), (name, opcode)
        assert re.search(r"cp\.async\.c[ag]\.shared\.global", launches["product"].ptx), f"{name} copies nothing ahead"
        assert not re.search(UNFENCED, launches["product"].ptx, re.S), (
            f"{name}: wgmma of what cp.async has just written"
        )
        for one in launches.values():
            usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump(one, "--dump-resource-usage", tmp_path)))
            assert usage["STACK"] == usage["LOCAL"] == "0", f"{one.name} of {name} spills on {arch}: {usage}"


def test_no_other_rounding():
    """Neither a sum contracted with a product, nor an approximate quotient: the PTX machine would not tell those."""
    packed, x = dynamic_packed(4096, 4096, E2M1, E2M1, Dynamic(16, INTEGER)), random_x(1, 4096)
    launches = compiled((8, 0), packed, x, "gemv")
    assert set(launches) == {"quantize", "product", "add_splits"}
    for one in launches.values():
        assert not re.search(r"\bfma\.rn\.f32|\.approx|div\.full|(?<!rpi)\.ftz", one.ptx), one.name
        assert one.metadata.enable_fp_fusion is False  # ptxas gets --fmad=false
    assert "div.rn.f32" in launches["quantize"].ptx


def test_weights_stay_in_registers():
    """Decoded operands go to the tensor cores without a detour through shared memory: the loop stores none there."""
    for packed, dtype in (
        (random_packed(4096, 4096, E2M1, E2M1), torch.float32),
        (random_packed(4096, 4096, E2M1), torch.float16),
    ):
        ptx = compiled((8, 0), packed, random_x(1, 4096, dtype), "gemv")["product"].ptx
        loop = ptx[ptx.index("mma.sync") : ptx.rindex("mma.sync")]
        assert "prmt.b32" in ptx and "st.shared" not in loop


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
def test_a_gpu_without_ptx(dtype):
    """The other form of the lookups, for an AMD GPU: it compiles, and multiplies on matrix cores. It has not run."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llmfp4_kernels.backends.triton.decode import lookup
    from llmfp4_kernels.backends.triton.product import product

    x = {torch.int8: "*i8", torch.bfloat16: "*bf16"}[dtype]
    types = dict(codes="*u8", x=x, y="*fp32", row_scale="*fp32", x_scale="*fp32")
    types |= dict.fromkeys(("m", "n", "half", "k", "padded_k", "groups"), "i32")
    constants = dict(partial=None, bias=None, scales=None, PLANES=1, PARTS=1, SCALE="none", GROUP=0, FENCE=False)
    constants |= dict(ROWS=64, TOKENS=16, BLOCK_K=128, TABLE=lookup(E2M1, dtype, False).table, LOW=None, HIGH=None)
    names = product.arg_names
    source = ASTSource(
        product,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
    )
    kernel = compile(source, target=GPUTarget("hip", "gfx942", 64), options={"num_warps": 4, "num_stages": 2})
    assert re.search(r"v_mfma_(i32_16x16x32_i8|f32_16x16x16_bf16)", kernel.asm["amdgcn"])
