"""What this package finds on this machine: processor, memory, versions, the native module, and the kernels that run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import torch

from . import formats, native, registry
from .backends import cuda as cuda_kernels
from .backends import triton as triton_kernels
from .problem import Problem

FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512vbmi", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16",
)  # fmt: skip
PACKAGES = ("llmfp4_kernels", "torch", "transformers", "safetensors", "gguf", "triton")


def _proc(path: str, key: str) -> str:
    """The first value of `key` in a file of "key : value" lines under /proc; "" where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), "")


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # with the build ("+cpu"), which the package's metadata may lack
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict:
    """Processor, instruction sets that matter here, cores this process may use, memory (GB), GPUs, versions."""
    kilobytes = _proc("/proc/meminfo", "MemTotal").removesuffix("kB").strip()
    flags = set(_proc("/proc/cpuinfo", "flags").split())
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {
        "cpu": _proc("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(int(kilobytes) / 1e6, 1) if kilobytes else None,
        "gpus": [torch.cuda.get_device_name(i) for i in gpus],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def native_module() -> dict:
    """Whether the compiled module loads and why not, how it was built, and its thread team."""
    reason = native.problem_with_module()
    if reason:
        return {"built": False, "reason": reason}
    module = native.module()
    architectures = list(module.cuda_architectures)
    return {"built": True, "file": module.__file__, "compiler": module.compiler, "thread_team": module.team(),
            "threads": torch.get_num_threads(), "cuda_architectures": architectures}  # fmt: skip


def cuda() -> dict:
    """The CUDA that torch was built for, whether it finds a GPU, and nvcc."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    beside = shutil.which("nvcc", path=f"{home}/bin") if home else None
    return {"torch_cuda": torch.version.cuda, "gpu": torch.cuda.is_available(), "nvcc": shutil.which("nvcc") or beside}


def _probes(device: str) -> list[Problem]:
    """Problems of every recipe, with one and with many rows."""
    recipes = formats.RECIPES.values()
    return [Problem.of_recipe(recipe, m, 4096, 4096, device=device) for recipe in recipes for m in (1, 512)]


def kernels() -> list[dict]:
    """Each row of the registry: how many probes (4096 x 4096) it takes, and its first refusal if it takes none.

    Tensors are where the row runs, even if there is no GPU: its refusal says what else is missing.
    """
    rows = []
    for kernel in registry.table():
        probes = _probes("cuda" if kernel.name.startswith(("cuda.", "triton.")) else "cpu")
        refusals = [kernel.refusal(problem) for problem in probes]
        taken = refusals.count(None)
        rows.append({"name": kernel.name, "takes": taken, "of": len(probes), "refusal": None if taken else refusals[0]})
    return rows


def tiles() -> dict[str, str]:
    """Whether the GPU backends' tiles are measured, and in which file, or why they are not."""
    problem, said = Problem(1, 64, 64, formats.E2M1, device="cuda"), {}
    for name, backend in (("cuda", cuda_kernels), ("triton", triton_kernels)):
        why = backend.refusal("gemv", problem)
        said[name] = f"not used: {why}" if why else str(backend.measured_here(torch.device("cuda")))
    return said


def environment() -> dict:
    """Everything that `llmfp4 info` prints."""
    return machine() | {"native": native_module(), "cuda": cuda(), "kernels": kernels(), "tiles": tiles()}
