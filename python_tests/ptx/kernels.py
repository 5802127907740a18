"""PTX text → the machine's Kernels: their operations as one piece of memory, ready to run.

    Operation:  form's function (8 bytes) | site | operand 0 | operand 1 | ...      4 bytes each, padded to 8

An operand is a place in the thread's frame, or how many bytes ahead the operation is that is jumped to.
"""

from __future__ import annotations

import ctypes
import re
from array import array
from dataclasses import dataclass

from . import build, conversions, floats, integers, movement, threads
from .function import Function
from .parse import read_module
from .program import SIZES, Array, Module, Refusal

TABLES = conversions, floats, integers, movement, threads  # importing them fills function.TABLE


class Extent(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint32), ("bytes", ctypes.c_uint32)]  # Param of state.h


class Variable(ctypes.Structure):
    """That of state.h."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("constant", ctypes.c_bool),
    ]


class KernelRecord(ctypes.Structure):
    """Kernel of state.h."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        *((n, ctypes.c_void_p) for n in ("code", "frame")),
        *(
            (n, ctypes.c_uint32)
            for n in ("frame_bytes", "local_bytes", "static_shared", "dynamic_align", "param_bytes", "params")
        ),
        *((n, ctypes.c_uint32) for n in ("sites", "max_threads", "variables")),
        ("param", ctypes.POINTER(Extent)),
        ("site", ctypes.c_void_p),
        ("variable", ctypes.POINTER(Variable)),
    ]


@dataclass
class Kernel:
    record: KernelRecord
    memory: tuple  # what the record points at


def content(name: str, of: Array) -> bytes:
    values = re.split(r"[\s,{}]+", (of.values or "").strip("{} "))
    if not all(re.fullmatch(r"(-?(0[xX][0-9a-fA-F]+|\d+)U?)?", value) for value in values):
        raise Refusal(f"variable {name}: initial values `{of.values[:60]}` are not modelled")
    size = SIZES[of.type]
    words = [int(value.rstrip("U"), 0) % 2 ** (8 * size) for value in values if value]
    return b"".join(word.to_bytes(size, "little") for word in words).ljust(of.bytes, b"\0")


def variables_of(module: Module) -> tuple[ctypes.Array, dict[str, int], list]:
    """(table of the module's variables, their addresses, their memory)."""
    table, addresses, memory = (Variable * max(len(module.variables), 1))(), {}, []
    for i, (name, (space, of)) in enumerate(module.variables.items()):
        align = max(of.align, 16)
        memory.append(ctypes.create_string_buffer(of.bytes + align))
        addresses[name] = -(-ctypes.addressof(memory[-1]) // align) * align
        ctypes.memmove(addresses[name], content(name, of), of.bytes)
        table[i] = Variable(name.encode(), addresses[name], of.bytes, space == "const")
    return table, addresses, memory


def code_of(function: Function, address_of: dict[str, int]) -> array:
    """The operations in memory."""
    words, starts, jumps = array("I"), [], []
    for operation in function.operations:
        start, run = len(words), address_of[operation.form]
        starts.append(start)
        words.extend((run & 0xFFFFFFFF, run >> 32, operation.site))
        for operand in operation.operands:
            if isinstance(operand, str):
                jumps.append((len(words), start, function.labels[operand]))
                operand = 0
            words.append(operand)
        if len(words) % 2:
            words.append(0)
    for at, start, target in jumps:
        words[at] = 4 * (starts[target] - start) & 0xFFFFFFFF
    return words


def sites_of(function: Function) -> tuple[array, ctypes.Array]:
    """(Sites of state.h, the texts they point at)."""
    texts = [text.encode() + b"\0" for _, _, text in function.sites]
    blob, words, at = ctypes.create_string_buffer(b"".join(texts)), array("Q"), 0
    base = ctypes.addressof(blob)
    for (line, source_line, _), text in zip(function.sites, texts):
        words.extend((line | source_line << 32, base + at))
        at += len(text)
    return words, blob


def kernel_of(function: Function, address_of: dict[str, int], table: ctypes.Array, variables: list) -> Kernel:
    """The Kernel of a function whose module has this table of variables."""
    entry = function.entry
    code, (sites, texts) = code_of(function, address_of), sites_of(function)
    frame = ctypes.create_string_buffer(bytes(function.frame), max(len(function.frame), 1))
    params = (Extent * max(len(entry.params), 1))(*((p.offset, p.bytes) for p in entry.params))
    record = KernelRecord(
        name=entry.name.encode(),
        code=code.buffer_info()[0],
        frame=ctypes.addressof(frame),
        frame_bytes=len(function.frame),
        local_bytes=function.local_bytes,
        static_shared=function.shared_bytes,
        dynamic_align=function.dynamic_align,
        param_bytes=max((p.offset + p.bytes for p in entry.params), default=0),
        params=len(entry.params),
        sites=len(function.sites),
        max_threads=entry.max_threads,
        variables=len(variables),
        param=params,
        site=sites.buffer_info()[0],
        variable=table,
    )
    return Kernel(record, (code, sites, texts, frame, params, table, variables))


def translate(text: str) -> dict[str, Kernel]:
    """The kernels of PTX text, by name."""
    module = read_module(text)
    if not module.entries:
        raise Refusal("the PTX has no .entry")
    table, addresses, variables = variables_of(module)
    functions = [Function(module, entry, addresses) for entry in module.entries]
    address_of = build.forms({operation.form for f in functions for operation in f.operations})
    return {f.entry.name: kernel_of(f, address_of, table, variables) for f in functions}
