"""What this GPU makes of each instruction form that the CUDA kernels use, kept for tests without a GPU.

Builds python_tests/ptx/test_kernels/instructions*.cu for the GPU with nvcc, runs them, compares them with numpy and
writes python_tests/vectors/gpu_instructions.npz, which test_instruction_forms.py replays. wgmma, bulk copies and their
barriers are left out, with a sentence, where the GPU is no sm_90.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path

import arguments
import machine
import numpy
import shared_cases  # noqa: F401 (puts python_tests on the path)
import torch
from instruction_forms import FORMS, INCLUDES, SOURCE, VECTORS, Form, disagreements, record
from instruction_forms_sm90 import FORMS as FORMS_SM90
from instruction_forms_sm90 import SOURCE as SOURCE_SM90
from ptx.build import nvcc

from llmfp4_kernels.packed import write_beside

FOLDER = machine.ROOT / "build" / "gpu-check"


def kinds(capability: tuple[int, int]) -> dict[str, tuple[Path, dict[str, Form]]]:
    """{nvcc's number of an architecture: (source, its forms)} of what a GPU has."""
    found = {"{}{}".format(*capability): (SOURCE, FORMS)}
    if capability == (9, 0):
        return found | {"90a": (SOURCE_SM90, FORMS_SM90)}
    print(f"left out, this GPU is sm_{capability[0]}{capability[1]}: {', '.join(FORMS_SM90)}")
    return found


def library(number: str, source: Path) -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    made = FOLDER / f"{source.stem}.so"
    command = [nvcc(), "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static",
               "-gencode", f"arch=compute_{number},code=sm_{number}", "-I", INCLUDES, source, "-o", made]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True)
    return made


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


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=arguments.whole_file, default=VECTORS, help="file to write (.npz)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("golden.py runs instructions on a GPU: there is none that torch can use")
    if nvcc() is None:
        sys.exit("golden.py compiles for the GPU: there is no nvcc on PATH or in /usr/local/cuda*/bin")
    vectors, wrong = {}, []
    for number, (source, forms) in kinds(torch.cuda.get_device_capability()).items():
        made = record(on_gpu(ctypes.CDLL(str(library(number, source)))), forms)
        vectors |= made
        wrong += disagreements(made, forms)
    about = {"gpu": torch.cuda.get_device_name(), "commit": machine.commit(), **machine.machine()}

    def write(path: Path) -> None:
        with path.open("wb") as file:
            numpy.savez_compressed(file, about=numpy.array(json.dumps(about)), **vectors)

    write_beside(options.out, write)
    print(f"wrote {options.out}")
    if wrong:
        sys.exit("the GPU disagrees with numpy: " + "; ".join(wrong))
    return 0


if __name__ == "__main__":
    sys.exit(main())
