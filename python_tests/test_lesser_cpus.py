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
