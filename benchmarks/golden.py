"""What this GPU makes of each instruction form that the CUDA kernels use, kept for tests without a GPU.

Builds python_tests/ptx/test_kernels/instructions.cu for the GPU with nvcc, runs it, compares it with numpy and writes
python_tests/vectors/gpu_instructions.npz, which test_instruction_forms.py replays.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path

import machine
import numpy
import shared_cases  # noqa: F401 (puts python_tests on the path)
import torch
from instruction_forms import INCLUDES, SOURCE, VECTORS, disagreements, record
from ptx.build import nvcc

from llmfp4_kernels.packed import write_beside

LIBRARY = machine.ROOT / "build" / "gpu-check" / "instructions.so"


def library(capability: tuple[int, int]) -> ctypes.CDLL:
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    arch = "sm_{}{}".format(*capability)
    command = [nvcc(), "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static", f"-arch={arch}",
               "-I", INCLUDES, SOURCE, "-o", LIBRARY]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True)
    return ctypes.CDLL(str(LIBRARY))


def on_gpu(forms: ctypes.CDLL):
    """run(name, inputs, outputs) for `record`."""

    def run(name: str, inputs: numpy.ndarray, outputs: int) -> numpy.ndarray:
        given = torch.from_numpy(inputs.view(numpy.int32).copy()).cuda()
        out = torch.full((len(inputs), outputs, inputs.shape[-1]), -1, dtype=torch.int32, device="cuda")
        torch.cuda.synchronize()
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (given, out))
        code = forms.run_form(name.encode(), *pointers, ctypes.c_int(len(inputs)))
        if code:
            raise RuntimeError(f"form_{name} did not run: CUDA error {code}")
        return out.cpu().numpy().view(numpy.uint32)

    return run


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=VECTORS, help="file to write (.npz)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("golden.py runs instructions on a GPU: there is none that torch can use")
    if nvcc() is None:
        sys.exit("golden.py compiles for the GPU: there is no nvcc on PATH or in /usr/local/cuda*/bin")
    vectors = record(on_gpu(library(torch.cuda.get_device_capability())))
    wrong = disagreements(vectors)
    if wrong:
        sys.exit("the GPU disagrees with numpy: " + "; ".join(wrong))
    about = {"gpu": torch.cuda.get_device_name(), "commit": machine.commit(), **machine.machine()}

    def write(path: Path) -> None:
        with path.open("wb") as file:
            numpy.savez_compressed(file, about=numpy.array(json.dumps(about)), **vectors)

    write_beside(options.out, write)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
