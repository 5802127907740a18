"""PTX text → one C++ file with a table of kernels."""

from __future__ import annotations

import json

from . import conversions, floats, integers, movement, threads
from .function import Function, unsigned
from .parse import read_module
from .program import Array, Refusal

TABLES = conversions, floats, integers, movement, threads  # importing them fills function.TABLE


def definition(name: str, array: Array) -> str:
    values = array.values or "{}"
    if any(c.isalpha() and c not in "xXabcdefABCDEF" for c in values):
        raise Refusal(f"variable {name}: initial values `{values[:60]}` are not modelled")
    values = values if values.startswith("{") else f"{{{values}}}"
    declared = f"{unsigned(array.type)} variable_{name.replace('$', '_')}[{array.count}]"
    return f"alignas({max(array.align, 16)}) static {declared} = {values};"


def record(function: Function) -> str:
    e = function.entry
    name = e.name
    params = ", ".join(f"{{{p.offset}, {p.bytes}}}" for p in e.params) or "{0, 0}"
    sites = ",\n    ".join(f"{{{line}, {source}, {json.dumps(text)}}}" for line, source, text in function.sites)
    bytes = max((p.offset + p.bytes for p in e.params), default=0)
    return (
        f"static const Param param_{name}[] = {{{params}}};\n"
        f"static const Site site_{name}[] = {{\n    {sites}}};\n"
        f'extern "C" const Kernel kernel_{name} = {{"{name}", body_{name},\n'
        f"    {function.shared_bytes}, {function.dynamic_align}, {bytes},\n"
        f"    {len(e.params)}, {len(function.sites)}, {e.max_threads},\n"
        f"    param_{name}, site_{name}, variables, {{count}}}};\n"
    )


def translate(text: str) -> str:
    module = read_module(text)
    if not module.entries:
        raise Refusal("the PTX has no .entry")
    out = ['#include <algorithm>\n#include "numbers.h"\nusing namespace ptx;']
    out += [definition(name, array) for name, (_, array) in module.variables.items()]
    rows = [
        f'{{"{name}", variable_{name.replace("$", "_")}, {array.bytes}, {str(space == "const").lower()}}}'
        for name, (space, array) in module.variables.items()
    ]
    out.append(f"static const Variable variables[] = {{{', '.join(rows) or '{nullptr, nullptr, 0, true}'}}};")
    for entry in module.entries:
        function = Function(module, entry)
        out += [function.code(), record(function).replace("{count}", str(len(rows)))]
    return "\n".join(out)
