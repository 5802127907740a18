"""The same module on CPUs with fewer instructions, emulated by qemu: it imports, chooses and returns the same bits."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
QEMU = shutil.which("qemu-x86_64")


def digests(*prefix):
    interpreter = os.path.realpath(sys.executable)
    command = [*prefix, interpreter, str(HERE / "without_torch.py"), str(HERE.parent / "llmfp4_kernels")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_works_without_torch_and_its_openmp():
    found = digests()
    assert found["team"] == "std::thread"
    assert len(set(found["digests"].values())) == 1 and "scalar" in found["digests"]


@pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 is not installed (Debian package qemu-user)")
@pytest.mark.parametrize("cpu, kernels", [("Nehalem", ["scalar"]), ("Haswell", ["avx2", "scalar"])])
def test_on_an_emulated_cpu(cpu, kernels):
    found = digests(QEMU, "-cpu", cpu)["digests"]
    assert list(found) == kernels
    assert set(found.values()) == set(digests()["digests"].values())


CPU_SOURCES = [HERE.parent / "csrc/cpu" / name for name in ("dispatch.cpp", "parallel.cpp", "workspace.cpp")]


def arm_products(folder, compiler, prefix, isas, *flags):
    """{kernel: (digest of integer products, error of W4A16 in units of its bound)} of arm_products.cpp."""
    common = [*compiler, "-O2", "-std=c++17", "-ffp-contract=off", "-DLLMFP4_X86=0", *flags, "-c"]
    objects = []
    sources = [(path.stem, path) for path in (HERE / "arm_products.cpp", *CPU_SOURCES)]
    for name, source in [*sources, *((isa, HERE.parent / "csrc/cpu/gemm_isa.cpp") for isa in isas)]:
        objects.append(folder / f"{name}.o")
        extra = ["-march=armv8.2-a+dotprod"] if name == "neon" else []
        subprocess.run([*common, *extra, str(source), "-o", str(objects[-1])], check=True)
    program = str(folder / "arm_products")
    subprocess.run([*compiler, "-static", *map(str, objects), "-o", program, "-lpthread"], check=True)
    printed = subprocess.run([*prefix, program], check=True, capture_output=True, text=True).stdout
    return {name: (digest, float(error)) for name, digest, error in map(str.split, printed.splitlines())}


ARM_COMPILER, QEMU_ARM = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")


@pytest.mark.skipif(not (ARM_COMPILER and QEMU_ARM), reason="needs g++-aarch64-linux-gnu and qemu-user (Debian)")
def test_neon_on_an_emulated_arm(tmp_path):
    (tmp_path / "arm").mkdir(), (tmp_path / "here").mkdir()
    arm = arm_products(tmp_path / "arm", [ARM_COMPILER], [QEMU_ARM], ["neon", "scalar"], "-DLLMFP4_ARM=1")
    here = arm_products(tmp_path / "here", [shutil.which("g++")], [], ["scalar"], "-DLLMFP4_ARM=0")
    assert list(arm) == ["neon", "scalar"] and list(here) == ["scalar"]
    assert len({digest for digest, _ in [*arm.values(), *here.values()]}) == 1
    assert all(0 < error <= 1 for _, error in [*arm.values(), *here.values()])
