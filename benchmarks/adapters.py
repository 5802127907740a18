"""Rivals, each a few lines: torch and oneDNN, bitsandbytes, torchao, onnxruntime, llama.cpp. The same weight for each.

An adapter raises ImportError, NoKernel or BadInput with a sentence where it cannot take part.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import logging
from collections.abc import Callable

import ggml
import numpy
import torch
from bench import Contender, copies_for
from operands import Product, Weight, per_block
from rivals import dequantize_int4, int4_mm, quantize_int4

from llmfp4_kernels.errors import BadInput, NoKernel

GROUP = 64
"""Weights per scale of the rivals that let one choose; the demo model's k = 576 is no multiple of 128."""
TOKEN = 0
"""One activation scale per token, for `per_block`."""
INT8_ROUNDING = 2**-9
"""Of Σ|x||w|: scales in 16 bits, and a few ties of activations that fall the other way."""


def needs(name: str, weight: Weight, n: int, k: int) -> None:
    if weight.n % n or weight.k % k:
        raise BadInput(f"{name} needs n in {n}s and k in {k}s, this is n = {weight.n}, k = {weight.k}")


def dense(weight: Weight, dtype: str, warm: bool = False) -> Contender:
    """torch's linear layer."""
    kind = getattr(torch, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype])
    size = weight.n * weight.k * kind.itemsize
    calls = [
        functools.partial(torch.nn.functional.linear, weight=weight.dense.to(kind))
        for _ in range(copies_for(size, warm))
    ]
    relative = weight.k * 2**-24 + (2**-7 if kind != torch.float32 else 0)
    check = Product(f"torch {dtype}", weight, weight.probe.to(kind), relative)
    return Contender(f"torch {dtype}", [lambda x, c=c: c(x) for c in calls], check, kind, size, dtype)


def torch_int4(weight: Weight, warm: bool = False) -> Contender:
    """torch's INT4 weight-only kernel: bf16 activations, one scale and zero per group."""
    name = f"torch int4 g{GROUP}"
    needs(name, weight, 16, GROUP)
    codes, scales = quantize_int4(weight.probe, GROUP)
    all_scales = weight.repeat(scales.transpose(0, 1)).transpose(0, 1).contiguous()
    size = weight.n * weight.k // 2 + all_scales.numel() * 2
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.repeat(codes), 1)
    copies = [(packed.clone(), all_scales.clone()) for _ in range(copies_for(size, warm))]
    calls = [lambda x, p=p, s=s: int4_mm(x, p, GROUP, s) for p, s in copies]
    check = Product(name, weight, dequantize_int4(codes, scales, GROUP), 2**-7)
    return Contender(name, calls, check, torch.bfloat16, size, "bf16")


def _int8_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [m, k], scale [m, 1]): each token by its largest magnitude."""
    scale = x.abs().amax(1, keepdim=True).clamp_(min=1e-30).div_(127)
    return x.mul(scale.reciprocal()).round_().to(torch.int8), scale


def _int8_weight(weight: Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [n, k], scale [n]): each output by its largest magnitude."""
    codes, scale = _int8_tokens(weight.probe)
    return weight.repeat(codes), weight.repeat(scale[:, 0])


class _Int8Linear:
    """y = linear(x) by _int_mm, or by oneDNN's product with weights packed beforehand.

    product_only: the tokens of an x are quantized at its first call.
    """

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, packed: bool, product_only: bool):
        self.scale, self.packed, self.product_only, self.x = scale, packed, product_only, None
        self.zero = torch.zeros(len(scale), dtype=torch.int64)
        self.codes = torch.ops.onednn.qlinear_prepack(codes, None) if packed else codes.clone().t()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self.product_only or x is not self.x:
            self.x, self.tokens = x, _int8_tokens(x)
        q, x_scale = self.tokens
        if not self.packed:
            return torch._int_mm(q, self.codes).float().mul_(self.scale).mul_(x_scale)
        result = 1.0, 0, torch.float32, "none", [], ""
        y = torch.ops.onednn.qlinear_pointwise(q, 1.0, 0, self.codes, self.scale, self.zero, None, *result)
        return y.mul_(x_scale)


def onednn_int8(weight: Weight, packed: bool = True, product_only: bool = False, warm: bool = False) -> Contender:
    """8-bit weights, one scale per output; each token is quantized by torch's own operations."""
    name = f"oneDNN int8 ({'packed' if packed else '_int_mm'}{', product only' if product_only else ''})"
    (codes, scale), size = _int8_weight(weight), weight.n * (weight.k + 4)
    calls = [_Int8Linear(codes, scale, packed, product_only) for _ in range(copies_for(size, warm))]
    probe, probe_scale = _int8_tokens(weight.probe)
    check = Product(name, weight, probe * probe_scale, INT8_ROUNDING, per_block(TOKEN))
    note = "8-bit weights; " + ("tokens quantized beforehand" if product_only else "quantizes tokens")
    return Contender(name, calls, check, torch.float32, size, "int8", note)


@functools.cache
def _quiet_import(name: str):
    """An optional package; what it prints and logs while it is imported says nothing about this CPU."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return importlib.import_module(name)
    finally:
        logging.disable(logging.NOTSET)


def bitsandbytes(weight: Weight, kind: str, warm: bool = False) -> Contender:
    """bitsandbytes' Linear4bit ("fp4" or "nf4"), bf16 activations, blocks of 64."""
    bnb = _quiet_import("bitsandbytes")
    name = f"bitsandbytes {kind.upper()}"
    needs(name, weight, 32, 64)
    probe, state = bnb.functional.quantize_4bit(weight.probe.bfloat16(), blocksize=64, quant_type=kind)
    dense = bnb.functional.dequantize_4bit(probe, state)
    layer = bnb.nn.Linear4bit(weight.k, weight.n, bias=False, compute_dtype=torch.bfloat16, quant_type=kind,
                              compress_statistics=False)  # fmt: skip
    layer.weight = bnb.nn.Params4bit(weight.dense.bfloat16(), quant_type=kind, blocksize=64, compress_statistics=False)
    layer = layer.to("cpu").eval().requires_grad_(False)
    size = weight.n * weight.k // 2 + weight.n * weight.k // 64 * 4
    calls = [copy.deepcopy(layer) for _ in range(copies_for(size, warm))]
    return Contender(name, calls, Product(name, weight, dense, 2**-6), torch.bfloat16, size, "bf16")


def torchao_int4(weight: Weight, warm: bool = False) -> Contender:
    """torchao's INT4 weight-only tensors for CPUs, bf16 activations."""
    ao = _quiet_import("torchao.prototype.quantization.int4")
    quantize = _quiet_import("torchao.quantization").quantize_
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
    """One session with one MatMulNBits; x and y stay where torch has them."""

    def __init__(self, runtime, model: bytes, n: int):
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        # As OMP_WAIT_POLICY=passive does for the others: spinning threads would slow the next contender.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.n, self.x = n, None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x is not self.x:
            self.x, self.y = x, torch.empty(len(x), self.n)
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
    probe = ggml.quantize(weight.probe, kind)
    rows, k = weight.repeat(probe), weight.k
    calls = [ggml.Linear(rows, kind, k, buffer) for _ in range(copies_for(rows.numel(), warm))]
    activation = per_block(256 if kind == "Q4_K" else 32)
    check = Product(name, weight, ggml.dequantize(probe, kind, k), INT8_ROUNDING, activation)
    return Contender(name, calls, check, torch.float32, rows.numel(), "int8", kernel=lambda m: buffer)


def adapters() -> dict[str, Callable[..., Contender]]:
    """Every rival by the name that --rivals takes: adapter(weight, warm=…)."""
    part = functools.partial
    rows: dict[str, Callable] = {f"torch-{dtype}": part(dense, dtype=dtype) for dtype in ("fp32", "fp16", "bf16")}
    rows |= {
        "torch-int4": torch_int4,
        "onednn-int8": onednn_int8,
        "onednn-int8-product": part(onednn_int8, product_only=True),
        "onednn-int-mm": part(onednn_int8, packed=False),
        "bitsandbytes-fp4": part(bitsandbytes, kind="fp4"),
        "bitsandbytes-nf4": part(bitsandbytes, kind="nf4"),
        "torchao-int4": torchao_int4,
        "onnxruntime-a8": part(onnxruntime, accuracy=4),
        "onnxruntime-a32": part(onnxruntime, accuracy=1),
    }
    for kind in ggml.TYPES:
        for buffer in ggml.BUFFERS:
            rows[f"llama.cpp-{kind}-{buffer}".lower()] = part(llama_cpp, kind=kind, buffer=buffer)
    return rows
