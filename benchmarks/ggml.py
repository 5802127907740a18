"""llama.cpp's products through its own library, by ctypes: Y [m, n] = X [m, k] · Wᵀ as one graph of one MUL_MAT.

The library is ggml of llama-cpp-python, wherever it was built; LLMFP4_GGML names its folder. A weight lies in one of
ggml's buffers: "CPU" keeps the rows as in the file; "CPU_REPACK" and "AMX" interleave them when they are loaded, which
is what llama.cpp does by itself. Activations are rounded to 8 bits inside the product.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import subprocess
import sys
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from machine import ROOT

from llmfp4_kernels.errors import BadInput, NoKernel

FOLDER = "LLMFP4_GGML"
F32 = 0
PLAIN, REPACKED, AMX = BUFFERS = "CPU", "CPU_REPACK", "AMX"
TYPES = {"Q4_0": (2, 32), "Q4_K": (12, 256), "IQ4_NL": (20, 32), "MXFP4": (39, 32), "NVFP4": (40, 64)}
"""Number of a type in ggml.h, and the inputs of which k must be a multiple."""

_HANDLE = c_void_p
_API = {
    "ggml_init": (_HANDLE, "params"),
    "ggml_log_set": (None, _HANDLE, _HANDLE),
    "ggml_version": (c_char_p,),
    "ggml_free": (None, _HANDLE),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead_custom": (c_size_t, c_size_t, c_bool),
    "ggml_new_tensor_2d": (_HANDLE, _HANDLE, c_int, c_int64, c_int64),
    "ggml_mul_mat": (_HANDLE, _HANDLE, _HANDLE, _HANDLE),
    "ggml_new_graph_custom": (_HANDLE, _HANDLE, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, _HANDLE, _HANDLE),
    "ggml_row_size": (c_size_t, c_int, c_int64),
    "ggml_quantize_chunk": (c_size_t, c_int, _HANDLE, _HANDLE, c_int64, c_int64, c_int64, _HANDLE),
    "ggml_get_type_traits": (_HANDLE, c_int),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_HANDLE, _HANDLE, _HANDLE),
    "ggml_backend_buffer_free": (None, _HANDLE),
    "ggml_backend_buft_name": (c_char_p, _HANDLE),
    "ggml_backend_cpu_buffer_from_ptr": (_HANDLE, _HANDLE, c_size_t),
    "ggml_backend_cpu_buffer_type": (_HANDLE,),
    "ggml_backend_cpu_init": (_HANDLE,),
    "ggml_backend_cpu_reg": (_HANDLE,),
    "ggml_backend_cpu_set_n_threads": (None, _HANDLE, c_int),
    "ggml_backend_graph_compute": (c_int, _HANDLE, _HANDLE),
    "ggml_backend_reg_dev_get": (_HANDLE, _HANDLE, c_size_t),
    "ggml_backend_reg_get_proc_address": (_HANDLE, _HANDLE, c_char_p),
    "ggml_backend_supports_op": (c_bool, _HANDLE, _HANDLE),
    "ggml_backend_tensor_alloc": (c_int, _HANDLE, _HANDLE, _HANDLE),
    "ggml_backend_tensor_set": (None, _HANDLE, _HANDLE, c_size_t, c_size_t),
}
"""Result and arguments of each function used."""


_SILENT = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)
"""Takes its log, a line for each tensor that is repacked."""


class _Params(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("memory", c_void_p), ("no_alloc", c_bool))


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("name", c_char_p), ("block", c_int64), ("interleave", c_int64), ("size", c_size_t), ("quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
    )  # fmt: skip


def folder() -> Path:
    """Where the library lies: $LLMFP4_GGML, build/ggml/native (build_ggml.sh), or inside llama-cpp-python."""
    if FOLDER in os.environ:
        return Path(os.environ[FOLDER])
    built = ROOT / "build" / "ggml" / "native"
    package = importlib.util.find_spec("llama_cpp")
    return built if built.is_dir() or package is None else Path(package.origin).parent / "lib"


@functools.cache
def library():
    """An object with every function of _API; raises NoKernel where there is no library."""
    paths = [folder() / f"lib{part}.so" for part in ("ggml-base", "ggml-cpu")]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing:
        raise NoKernel(f"{missing} is not there: run benchmarks/build_ggml.sh, or pip install llama-cpp-python")
    loaded = [ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in paths]
    for name, (result, *arguments) in _API.items():
        function = next((getattr(lib, name) for lib in loaded if hasattr(lib, name)), None)
        if function is None:
            raise NoKernel(f"ggml in {folder()} has no {name}")
        function.restype = result
        function.argtypes = [_Params if argument == "params" else argument for argument in arguments]
        setattr(loaded[-1], name, function)
    loaded[-1].ggml_log_set(_SILENT, None)
    return loaded[-1]


@functools.cache
def backend():
    return library().ggml_backend_cpu_init()


@functools.cache
def buffers() -> dict[str, int]:
    """The buffer types of this build on this CPU, by name: "CPU", and those that llama.cpp prefers to it."""
    ggml = library()
    registry = ggml.ggml_backend_cpu_reg()
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(ggml.ggml_backend_reg_dev_get(registry, 0))
    found, index = {PLAIN: ggml.ggml_backend_cpu_buffer_type()}, 0
    while extra[index]:
        found[ggml.ggml_backend_buft_name(extra[index]).decode()] = extra[index]
        index += 1
    return found


@functools.cache
def usable(buffer: str) -> bool:
    """Whether a process survives a product in this buffer after one of oneDNN.

    ggml loads its AMX configuration once per thread, oneDNN takes it away: built as it is, it ends with SIGILL.
    """
    return subprocess.run([sys.executable, __file__, buffer], capture_output=True).returncode == 0


def quantize(weight: torch.Tensor, name: str) -> torch.Tensor:
    """float32 [n, k] → uint8 [n, bytes of a row] in ggml's type `name`."""
    (number, block), (n, k) = TYPES[name], weight.shape
    if k % block:
        raise BadInput(f"ggml's {name} needs k in {block}s, got k = {k}")
    weight = weight.float().contiguous()
    rows = torch.zeros(n, library().ggml_row_size(number, k), dtype=torch.uint8)
    library().ggml_quantize_chunk(number, weight.data_ptr(), rows.data_ptr(), 0, n, k, None)
    return rows


def dequantize(rows: torch.Tensor, name: str, k: int) -> torch.Tensor:
    """float32 [n, k] that quantized rows stand for."""
    traits = ctypes.cast(library().ggml_get_type_traits(TYPES[name][0]), POINTER(_TypeTraits))[0]
    weight = torch.empty(len(rows), k)
    for row, out in zip(rows, weight):
        traits.to_float(row.data_ptr(), out.data_ptr(), k)
    return weight


@functools.lru_cache(maxsize=1)
def result(m: int, n: int) -> torch.Tensor:
    """Memory for y, one for all copies of a weight."""
    return torch.zeros(m, n)


class Linear:
    """y [m, n] = linear(x [m, k] float32) on quantized rows in one buffer, by torch's number of threads.

    The graph of the last x is kept: a call with the same x is one graph computation that copies nothing. y is
    overwritten by the next call of any.
    """

    def __init__(self, rows: torch.Tensor, name: str, k: int, buffer: str = PLAIN):
        self.n, self.k, self.ggml = len(rows), k, library()
        self.context = self._context(1)
        self.weight = self.ggml.ggml_new_tensor_2d(self.context, TYPES[name][0], k, self.n)
        self.memory = self.ggml.ggml_backend_alloc_ctx_tensors_from_buft(self.context, buffers()[buffer])
        self.graph_context, self.x, self.buffers = None, None, []
        self._graph(torch.zeros(1, k))
        if not self.ggml.ggml_backend_supports_op(backend(), self.product):
            raise BadInput(f"ggml's {buffer} buffer does not take {name} with n = {self.n}, k = {k}")
        rows = rows.contiguous()
        self.ggml.ggml_backend_tensor_set(self.weight, rows.data_ptr(), 0, rows.numel())

    def _context(self, tensors: int, graph: int = 0):
        size = tensors * self.ggml.ggml_tensor_overhead() + graph
        return self.ggml.ggml_init(_Params(size, None, True))

    def _graph(self, x: torch.Tensor):
        """The graph of one product, whose operand and result lie in torch's memory."""
        self._free_graph()
        ggml, nodes = self.ggml, 4
        self.x, self.y = x, result(len(x), self.n)
        self.graph_context = context = self._context(2, ggml.ggml_graph_overhead_custom(nodes, False))
        operand = ggml.ggml_new_tensor_2d(context, F32, self.k, len(x))
        self.product = ggml.ggml_mul_mat(context, self.weight, operand)
        for tensor, memory in ((operand, self.x), (self.product, self.y)):
            self.buffers.append(ggml.ggml_backend_cpu_buffer_from_ptr(memory.data_ptr(), memory.numel() * 4))
            ggml.ggml_backend_tensor_alloc(self.buffers[-1], tensor, memory.data_ptr())
        self.graph = ggml.ggml_new_graph_custom(context, nodes, False)
        ggml.ggml_build_forward_expand(self.graph, self.product)

    def _free_graph(self):
        if self.graph_context:
            for buffer in self.buffers:
                self.ggml.ggml_backend_buffer_free(buffer)
            self.ggml.ggml_free(self.graph_context)
            self.buffers.clear()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x is not self.x:
            self._graph(x)
        self.ggml.ggml_backend_cpu_set_n_threads(backend(), torch.get_num_threads())
        status = self.ggml.ggml_backend_graph_compute(backend(), self.graph)
        if status:
            raise NoKernel(f"ggml's graph of m = {len(x)}, n = {self.n}, k = {self.k} ended with status {status}")
        return self.y

    def __del__(self):
        self._free_graph()
        self.ggml.ggml_backend_buffer_free(self.memory)
        self.ggml.ggml_free(self.context)


if __name__ == "__main__":
    tokens, weight = torch.ones(33, 256), torch.ones(64, 256)
    for _ in range(2):
        torch.nn.functional.linear(tokens.bfloat16(), weight.bfloat16())
        Linear(quantize(weight, "Q4_0"), "Q4_0", 256, sys.argv[1])(tokens)
