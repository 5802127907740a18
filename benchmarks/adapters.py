"""The table of rivals. Each gets the same weight, and is left out with a sentence where it cannot take part.

A row makes a Contender: row(weight, warm=…). It raises ImportError, NoKernel or BadInput with that sentence.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Callable

import ggml
import rivals_cuda
import rivals_packages
import rivals_torch
from bench import Contender

from llmfp4_kernels.errors import NoKernel


def adapters() -> dict[str, Callable[..., Contender]]:
    """Every rival by the name that --rivals takes: adapter(weight, warm=…)."""
    part = functools.partial
    rows: dict[str, Callable] = {
        f"torch-{dtype}": part(rivals_torch.dense, dtype=dtype) for dtype in ("fp32", "fp16", "bf16")
    }
    rows |= {
        "torch-int4": rivals_torch.torch_int4,
        "onednn-int8": rivals_torch.onednn_int8,
        "onednn-int8-product": part(rivals_torch.onednn_int8, product_only=True),
        "onednn-int-mm": part(rivals_torch.onednn_int8, packed=False),
        "bitsandbytes-fp4": part(rivals_packages.bitsandbytes, kind="fp4"),
        "bitsandbytes-nf4": part(rivals_packages.bitsandbytes, kind="nf4"),
        "torchao-int4": rivals_packages.torchao_int4,
        "onnxruntime-a8": part(rivals_packages.onnxruntime, accuracy=4),
        "onnxruntime-a32": part(rivals_packages.onnxruntime, accuracy=1),
    }
    rows |= on_gpu()
    for kind in ggml.TYPES:
        for buffer in ggml.BUFFERS:
            rows[f"llama.cpp-{kind}-{buffer}".lower()] = part(rivals_packages.llama_cpp, kind=kind, buffer=buffer)
    return rows


def on_gpu() -> dict[str, Callable[..., Contender]]:
    """Those of a GPU; its bf16 product first, which the others are compared with."""
    part = functools.partial
    return {
        "cublas-bf16": part(rivals_cuda.dense, dtype="bf16"),
        "cublas-fp16": part(rivals_cuda.dense, dtype="fp16"),
        "cuda-int4": rivals_cuda.int4,
        "cublas-int8": rivals_cuda.int8,
        "cublas-int8-product": part(rivals_cuda.int8, product_only=True),
        "cublas-fp8": rivals_cuda.fp8,
        "cublas-fp8-product": part(rivals_cuda.fp8, product_only=True),
        "gemlite-int4": rivals_cuda.gemlite,
        "cuda-bitsandbytes-nf4": part(rivals_cuda.bitsandbytes, kind="nf4"),
    }


def versions() -> dict[str, str]:
    """Of the packages that rivals come from, those that are there."""
    found = {}
    for package in ("torch", "bitsandbytes", "torchao", "onnxruntime", "gemlite"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    with contextlib.suppress(NoKernel):
        found["ggml"] = f"{ggml.library().ggml_version().decode()} in {ggml.folder().name}"
    return found
