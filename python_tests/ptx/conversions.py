"""Conversions between numbers, and of addresses. The C++ words are those of numbers.h."""

from __future__ import annotations

from .function import instruction, signed
from .program import Refusal


@instruction(r"cvt(?P<sat>\.sat)?\.(?P<to>[us](?:8|16|32|64))\.(?P<of>[us](?:8|16|32|64))")
def int_to_int(f, m, d, a):
    x = f"{signed(m['of'])}({f.value(a, 'b64' if m['of'][1:] == '64' else 'b32')})"
    if m["sat"] and "u64" in (m["to"], m["of"]):
        raise Refusal("saturation of 64-bit integers is not modelled")
    return f"{f.register(d)} = " + (f"narrowed<{signed(m['to'])}>({x});" if m["sat"] else f"{signed(m['to'])}({x});")


@instruction(
    r"cvt\.(?P<round>rn|rz|rni|rzi|rmi|rpi)(?P<ftz>\.ftz)?(?:\.sat)?\.(?P<to>[us](?:8|16|32|64))\.(?P<of>f16|bf16|f32|f64)"
)
def float_to_int(f, m, d, a):
    if m["round"] in ("rn", "rz"):
        raise Refusal("a conversion to an integer rounds by rni, rzi, rmi or rpi")
    name = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}[m["round"]]
    return f"{f.register(d)} = clamped<{signed(m['to'])}>({name}(double({m['of']}({f.value(a, m['of'])}))));"


@instruction(r"cvt\.rn\.(?P<to>f16|bf16|f32|f64)\.(?P<of>[us](?:8|16|32|64))")
def int_to_float(f, m, d, a):
    x = f"{signed(m['of'])}({f.value(a, 'b64' if m['of'][1:] == '64' else 'b32')})"
    if m["to"] in ("f16", "bf16"):
        if m["of"][1:] == "64":
            raise Refusal("64-bit integers to 16-bit floats are not modelled")
        x = f"odd_float(double({x}))"
    c = {"f64": "double", "f32": "float"}.get(m["to"], "")
    return f"{f.register(d)} = of_{m['to']}({c}({x}));"


@instruction(
    r"cvt(?:\.(?P<round>rn|rni|rzi|rmi|rpi))?(?P<ftz>\.ftz)?(?P<relu>\.relu)?(?P<sat>\.sat)?"
    r"\.(?P<to>f16|bf16|f32|f64)\.(?P<of>f16|bf16|f32|f64)"
)
def float_to_float(f, m, d, a):
    x = f"{m['of']}({f.value(a, m['of'])})"
    if m["to"] in ("f16", "bf16") and m["of"] != "f32":
        x = f"odd_float(double({x}))"
    if m["round"] not in (None, "rn"):
        x = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}[
            m["round"]
        ] + f"({x})"
    for on, name in ((m["relu"], "relu"), (m["sat"], "saturated"), (m["ftz"], "flushed")):
        x = f"{name}({x})" if on else x
    return f"{f.register(d)} = of_{m['to']}({x});"


@instruction(r"cvt\.rn(?P<relu>\.relu)?\.(?P<to>f16|bf16)x2\.f32")
def floats_to_pair(f, m, d, high, low):
    x, y = (f"relu(f32({f.value(v, 'f32')}))" if m["relu"] else f"f32({f.value(v, 'f32')})" for v in (high, low))
    return f"{f.register(d)} = u32(of_{m['to']}({x})) << 16 | of_{m['to']}({y});"


@instruction(r"cvt\.rn\.satfinite(?P<relu>\.relu)?\.(?P<to>e4m3|e5m2)x2\.(?P<of>f32|f16x2|bf16x2)")
def to_8_bit_floats(f, m, d, *inputs):
    of = m["of"].removesuffix("x2")
    v = [f.value(x, m["of"]) for x in inputs]
    high, low = v if of == "f32" else (f"u16({v[0]} >> 16)", f"u16({v[0]})")
    x, y = (f"relu({of}({i}))" if m["relu"] else f"{of}({i})" for i in (high, low))
    return f"{f.register(d)} = u16(u32(of_{m['to']}({x})) << 8 | of_{m['to']}({y}));"


@instruction(r"cvt\.rn(?P<relu>\.relu)?\.(?P<to>f16|bf16)x2\.(?P<of>e4m3|e5m2)x2")
def of_8_bit_floats(f, m, d, a):
    x, y = f"{m['of']}(u8({f.value(a, 'b16')} >> 8))", f"{m['of']}(u8({f.value(a, 'b16')}))"
    x, y = (f"relu({i})" if m["relu"] else i for i in (x, y))
    return f"{f.register(d)} = u32(of_{m['to']}({x})) << 16 | of_{m['to']}({y});"


@instruction(r"cvt\.rna\.tf32\.f32")
def to_tf32(f, m, d, a):
    return f"{f.register(d)} = of_tf32(f32({f.value(a, 'f32')}));"


@instruction(r"cvta(?P<to>\.to)?\.(?P<space>global|local|const|param|shared)(?:::cta|::entry)?\.u64")
def generic_address(f, m, d, a):
    x = f.value(a, "b64")
    if m["space"] == "shared":
        x = (
            f.at() + f"{f.register(d)} = shared_of_generic(T, {x});"
            if m["to"]
            else f"{f.register(d)} = generic_of_shared({x});"
        )
        return x
    return f"{f.register(d)} = {x};"
