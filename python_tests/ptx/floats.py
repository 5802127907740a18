"""Floating-point arithmetic, comparisons, selection. The C++ words are those of numbers.h."""

from __future__ import annotations

from .function import instruction, signed

HALF = r"(?P<t>bf16x2|bf16|f16x2|f16)"


def wrap(m, code):
    """.ftz and .sat of a result."""
    code = f"saturated({code})" if "sat" in m.groupdict() and m["sat"] else code
    return f"flushed({code})" if m["ftz"] else code


def f32_inputs(f, m, inputs):
    return [f"flushed(f32({f.value(x, 'f32')}))" if m["ftz"] else f"f32({f.value(x, 'f32')})" for x in inputs]


@instruction(r"(?P<op>add|sub|mul|fma|min|max|div)(?:\.rn|\.approx|\.full)?(?P<ftz>\.ftz)?(?P<sat>\.sat)?\.f32")
def f32_arithmetic(f, m, d, *inputs):
    x = f32_inputs(f, m, inputs)
    sign = {"add": "+", "sub": "-", "mul": "*", "div": "/"}.get(m["op"])
    call = {"fma": "std::fma", "min": "least", "max": "largest"}.get(m["op"])
    result = f"{x[0]} {sign} {x[1]}" if sign else f"{call}({', '.join(x)})"
    return f"{f.register(d)} = of_f32({wrap(m, result)});"


@instruction(r"(?P<op>add|sub|mul|fma|min|max|div)(?:\.rn)?\.f64")
def f64_arithmetic(f, m, d, *inputs):
    x = [f"f64({f.value(i, 'f64')})" for i in inputs]
    sign = {"add": "+", "sub": "-", "mul": "*", "div": "/"}.get(m["op"])
    call = {"fma": "std::fma", "min": "least", "max": "largest"}.get(m["op"])
    result = f"{x[0]} {sign} {x[1]}" if sign else f"{call}({', '.join(x)})"
    return f"{f.register(d)} = of_f64({result});"


@instruction(r"(?P<op>abs|neg)\.(?P<t>f32|f64|bf16x2|bf16|f16x2|f16)")
def sign_bit(f, m, d, a):
    mask = {"f32": "0x80000000u", "f64": "0x8000000000000000ull"}.get(
        m["t"], "0x80008000u" if "x2" in m["t"] else "0x8000u"
    )
    return f"{f.register(d)} = {f.value(a, m['t'])} " + (f"^ {mask};" if m["op"] == "neg" else f"& ~{mask};")


@instruction(r"(?P<op>add|sub|mul|fma|min|max)(?:\.rn)?\." + HALF)
def half_arithmetic(f, m, d, *inputs):
    name = f"{m['op']}_{m['t'].removesuffix('x2')}"
    x = ", ".join(f.value(i, m["t"]) for i in inputs)
    return f"{f.register(d)} = " + (f"pairs({name}, {x});" if m["t"].endswith("x2") else f"{name}({x});")


APPROXIMATE = {"ex2": "std::exp2", "lg2": "std::log2", "sqrt": "std::sqrt", "tanh": "std::tanh", "sin": "std::sin"}
APPROXIMATE |= {"cos": "std::cos", "rcp": "1.f / ", "rsqrt": "1.f / std::sqrt"}


@instruction(r"(?P<op>ex2|lg2|rcp|sqrt|rsqrt|tanh|sin|cos)(?:\.approx|\.rn)(?P<ftz>\.ftz)?\.f32")
def function_of_f32(f, m, d, a):
    x = f32_inputs(f, m, [a])[0]
    return f"{f.register(d)} = of_f32({wrap(m, APPROXIMATE[m['op']] + f'({x})')});"


COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}


def comparison(f, t, kind, a, b):
    if t[0] not in "fb" or t in ("b16", "b32", "b64"):
        return f"({signed(t)}({f.value(a, t)}) {COMPARE[kind]} {signed(t)}({f.value(b, t)}))"
    x, y = f"{t}({f.value(a, t)})", f"{t}({f.value(b, t)})"
    both = f"({x} == {x} && {y} == {y})"
    if kind in ("num", "nan"):
        return both if kind == "num" else f"!{both}"
    return (
        f"(!{both} || {x} {COMPARE[kind[:-1]]} {y})" if kind.endswith("u") else f"({both} && {x} {COMPARE[kind]} {y})"
    )


@instruction(
    r"setp\.(?P<kind>eq|ne|lt|le|gt|ge|lo|ls|hi|hs|num|nan|(?:eq|ne|lt|le|gt|ge)u)(?:\.(?P<op>and|or|xor))?"
    r"\.(?P<t>[bus](?:16|32|64)|bf16|f16|f32|f64)"
)
def set_predicate(f, m, d, a, b, c=None):
    code = comparison(f, m["t"], m["kind"], a, b)
    sign = {"and": "&&", "or": "||", "xor": "!="}.get(m["op"])
    first, *second = d.split("|")
    other = f" {sign} bool({f.value(c, 'pred')})" if sign else ""
    stores = f"{f.register(first)} = yes{other};" if first.strip() != "_" else ""
    if second and second[0].strip() != "_":
        stores += f" {f.register(second[0])} = !yes{other};"
    return f"{{ bool yes = {code}; {stores} }}"


@instruction(r"selp\.(?P<t>[busf](?:16|32|64))")
def select(f, m, d, a, b, p):
    return f"{f.register(d)} = {f.value(p, 'pred')} ? {f.value(a, m['t'])} : {f.value(b, m['t'])};"
