"""Rivals that are packages: bitsandbytes, torchao, onnxruntime, llama.cpp. Each is imported when it is asked for."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import logging

import ggml
import numpy
import torch
from bench import Contender, copies_for
from operands import GROUP, INT8_ROUNDING, Product, Weight, needs, per_block

from llmfp4_kernels.errors import NoKernel


@functools.cache
def quiet_import(name: str):
    """An optional package; what it prints and logs while it is imported says nothing about this CPU."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return importlib.import_module(name)
    finally:
        logging.disable(logging.NOTSET)


def bitsandbytes(weight: Weight, kind: str, warm: bool = False, device: str = "cpu") -> Contender:
    """bitsandbytes' Linear4bit ("fp4" or "nf4"), bf16 activations, blocks of 64."""
    bnb = quiet_import("bitsandbytes")
    name = f"bitsandbytes {kind.upper()}"
    needs(name, weight, 32, 64)
    rows = weight.probe.to(device, torch.bfloat16)
    probe, state = bnb.functional.quantize_4bit(rows, blocksize=64, quant_type=kind)
    dense = bnb.functional.dequantize_4bit(probe, state).cpu()
    layer = bnb.nn.Linear4bit(weight.k, weight.n, bias=False, compute_dtype=torch.bfloat16, quant_type=kind,
                              compress_statistics=False)  # fmt: skip
    layer.weight = bnb.nn.Params4bit(weight.dense.bfloat16(), quant_type=kind, blocksize=64, compress_statistics=False)
    layer = layer.to(device).eval().requires_grad_(False)
    size = weight.n * weight.k // 2 + weight.n * weight.k // 64 * 4
    calls = [copy.deepcopy(layer) for _ in range(copies_for(size, warm, device))]
    check = Product(name, weight, dense, 2**-6)
    return Contender(name, calls, check, torch.bfloat16, size, "bf16", device=device)


def torchao_int4(weight: Weight, warm: bool = False) -> Contender:
    """torchao's INT4 weight-only tensors for CPUs, bf16 activations."""
    ao = quiet_import("torchao.prototype.quantization.int4")
    quantize = quiet_import("torchao.quantization").quantize_
    name = f"torchao int4 g{GROUP}"
    needs(name, weight, 16, GROUP)

    def layer(rows: torch.Tensor) -> torch.nn.Linear:
        linear = torch.nn.Linear(weight.k, len(rows), bias=False, dtype=torch.bfloat16)
        linear.weight = torch.nn.Parameter(rows.bfloat16(), requires_grad=False)
        quantize(linear, ao.PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False))
        return linear

    made, identity = layer(weight.dense), torch.eye(weight.k, dtype=torch.bfloat16)
    dense = torch.cat([made(part)[:, : len(weight.probe)] for part in identity.split(512)]).T
    size = weight.n * weight.k // 2 + weight.n * weight.k // GROUP * 4
    calls = [copy.deepcopy(made) for _ in range(copies_for(size, warm))]
    return Contender(name, calls, Product(name, weight, dense, 2**-6), torch.bfloat16, size, "bf16")


class _OnnxLinear:
    """A session with one MatMulNBits, made again for another number of threads; x and y stay where torch has them."""

    def __init__(self, runtime, model: bytes, n: int):
        self.runtime, self.model, self.n = runtime, model, n
        self.x, self.threads = None, 0

    def _start(self):
        self.threads = torch.get_num_threads()
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self.threads, 3
        # As OMP_WAIT_POLICY=passive does for the others: spinning threads would slow the next contender.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = self.runtime.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.threads != torch.get_num_threads():
            self._start()
            self.x = None
        if x is not self.x:
            self.x, self.y = x, ggml.result(len(x), self.n)
            self.binding = self.session.io_binding()
            for bind, name, tensor in (("input", "x", x), ("output", "y", self.y)):
                place = getattr(self.binding, f"bind_{bind}")
                place(name, "cpu", 0, numpy.float32, list(tensor.shape), tensor.data_ptr())
        self.session.run_with_iobinding(self.binding)
        return self.y


def _onnx_model(weight: Weight, codes: torch.Tensor, scale: torch.Tensor, block: int, accuracy: int) -> bytes:
    """codes uint8 [n, k] of 0..15 (8 is zero), scale [n, k/block]."""
    onnx = importlib.import_module("onnx")
    helper, kinds, (n, k) = onnx.helper, onnx.TensorProto, codes.shape
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).view(n, k // block, block // 2)
    constants = [onnx.numpy_helper.from_array(packed.numpy(), "b"), onnx.numpy_helper.from_array(scale.numpy(), "s")]
    node = helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=4,
                            block_size=block, accuracy_level=accuracy)  # fmt: skip
    ends = [helper.make_tensor_value_info(name, kinds.FLOAT, ["m", size]) for name, size in (("x", k), ("y", n))]
    graph = helper.make_graph([node], "linear", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def onnxruntime(weight: Weight, accuracy: int, block: int = 32, warm: bool = False) -> Contender:
    """onnxruntime's MatMulNBits, symmetric INT4; activations: int8 per block (accuracy_level 4) or fp32 (1)."""
    runtime = importlib.import_module("onnxruntime")
    name = f"onnxruntime int4 g{block} {'a8' if accuracy == 4 else 'a32'}"
    needs(name, weight, 1, block)
    blocks = weight.probe.view(len(weight.probe), -1, block)
    scale = blocks.abs().amax(-1) / 7
    codes = ((blocks / scale[..., None]).round() + 8).clamp(0, 15).to(torch.uint8).view_as(weight.probe)
    dense = ((codes.view_as(blocks) - 8.0) * scale[..., None]).view_as(weight.probe)
    model = _onnx_model(weight, weight.repeat(codes), weight.repeat(scale), block, accuracy)
    size = weight.n * weight.k // 2 + weight.n * weight.k // block * 4
    calls = [_OnnxLinear(runtime, model, weight.n) for _ in range(copies_for(size, warm))]
    promised = (INT8_ROUNDING, per_block(block)) if accuracy == 4 else (weight.k * 2**-24,)
    check = Product(name, weight, dense, *promised)
    return Contender(name, calls, check, torch.float32, size, "int8" if accuracy == 4 else "fp32")


def llama_cpp(weight: Weight, kind: str, buffer: str, warm: bool = False) -> Contender:
    """llama.cpp's product of one of its types in one of its buffers."""
    name = f"llama.cpp {kind} [{buffer}]"
    if buffer not in ggml.buffers():
        raise NoKernel(f"ggml in {ggml.folder()} has no {buffer} buffer on this CPU")
    if buffer == ggml.AMX and not ggml.usable(buffer):
        raise NoKernel(f"ggml in {ggml.folder()} crashes in its AMX products after oneDNN's: see build_ggml.sh")
    probe = ggml.quantize(weight.probe, kind)
    rows, k = weight.repeat(probe), weight.k
    calls = [ggml.Linear(rows, kind, k, buffer) for _ in range(copies_for(rows.numel(), warm))]
    activation = per_block(256 if kind == "Q4_K" else 32)
    check = Product(name, weight, ggml.dequantize(probe, kind, k), INT8_ROUNDING, activation)
    return Contender(name, calls, check, torch.float32, rows.numel(), "int8", kernel=lambda m: buffer)
