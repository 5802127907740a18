"""Moves, integer and floating-point arithmetic, comparisons, conversions. The C++ words are those of numbers.h."""

from __future__ import annotations

from .function import instruction, signed, unsigned
from .parse import SIZES, Refusal

INT = r"(?P<t>[us](?:16|32|64))"
HALF = r"(?P<t>bf16x2|bf16|f16x2|f16)"


@instruction(r"mov\.(?P<t>pred|[busf](?:16|32|64))")
def mov(f, m, d, a):
    t = m["t"]
    if d.startswith("{"):
        parts = d[1:-1].replace(" ", "").split(",")
        width = SIZES[t] * 8 // len(parts)
        stores = "".join(f" {f.register(p)} = u{width}(whole >> {i * width});" for i, p in enumerate(parts) if p != "_")
        return f"{{ {unsigned(t)} whole = {f.value(a, t)};{stores} }}"
    if a.startswith("{"):
        parts = f.values(a)
        width = SIZES[t] * 8 // len(parts)
        whole = " | ".join(f"{unsigned(t)}(u{width}({p})) << {i * width}" for i, p in enumerate(parts))
        return f"{f.register(d)} = {whole};"
    return f"{f.register(d)} = {f.value(a, t)};"


@instruction(r"(?P<op>add|sub)\." + INT)
def add(f, m, d, a, b):
    t = m["t"]
    return f"{f.register(d)} = {unsigned(t)}({f.value(a, t)} {'+' if m['op'] == 'add' else '-'} {f.value(b, t)});"


def product(f, t, kind, a, b):
    wide = {2: "32", 4: "64"}.get(SIZES[t])
    if kind == "lo":
        return f"{unsigned(t)}(u64({f.value(a, t)}) * u64({f.value(b, t)}))"
    x, y = f"{signed(t)}({f.value(a, t)})", f"{signed(t)}({f.value(b, t)})"
    if kind == "wide":
        big = ("s" if t[0] == "s" else "u") + wide
        return f"u{wide}({big}({x}) * {big}({y}))"
    big = "__int128" if t[0] == "s" else "unsigned __int128"
    return f"{unsigned(t)}(({big})({x}) * ({big})({y}) >> {8 * SIZES[t]})"


@instruction(r"mul\.(?P<kind>lo|hi|wide)\." + INT)
def mul(f, m, d, a, b):
    return f"{f.register(d)} = {product(f, m['t'], m['kind'], a, b)};"


@instruction(r"mad\.(?P<kind>lo|hi|wide)\." + INT)
def mad(f, m, d, a, b, c):
    t = m["t"]
    result = f"u{16 * SIZES[t]}" if m["kind"] == "wide" else unsigned(t)
    return f"{f.register(d)} = {result}({product(f, t, m['kind'], a, b)} + {f.value(c, 'b' + result[1:])});"


@instruction(r"(?P<op>min|max|div|rem)\." + INT)
def ordered(f, m, d, a, b):
    t = m["t"]
    name = {"min": "std::min", "max": "std::max", "div": "quotient", "rem": "remainder_of"}[m["op"]]
    return f"{f.register(d)} = {name}<{signed(t)}>({f.value(a, t)}, {f.value(b, t)});"


@instruction(r"(?P<op>min|max|add)\.(?P<t>[us]16x2)")
def pairs_of_ints(f, m, d, a, b):
    s = f"{m['t'][0]}16"
    x = {"min": f"{s}(x) < {s}(y) ? x : y", "max": f"{s}(x) > {s}(y) ? x : y", "add": "u16(x + y)"}[m["op"]]
    return f"{f.register(d)} = pairs([](u16 x, u16 y) -> u16 {{ return {x}; }}, {f.value(a)}, {f.value(b)});"


@instruction(r"(?P<op>abs|neg)\.(?P<t>s(?:16|32|64))")
def negate(f, m, d, a):
    t, x = m["t"], f.value(a, m["t"])
    negative = f"{unsigned(t)}(0 - {x})"
    return f"{f.register(d)} = " + (f"{signed(t)}({x}) < 0 ? {negative} : {x};" if m["op"] == "abs" else f"{negative};")


@instruction(r"(?P<op>and|or|xor)\.(?P<t>pred|b16|b32|b64)")
def logic(f, m, d, a, b):
    sign = {"and": "&", "or": "|", "xor": "^"}[m["op"]]
    return f"{f.register(d)} = {unsigned(m['t'])}({f.value(a, m['t'])} {sign} {f.value(b, m['t'])});"


@instruction(r"not\.(?P<t>pred|b16|b32|b64)")
def invert(f, m, d, a):
    sign = "!" if m["t"] == "pred" else "~"
    return f"{f.register(d)} = {unsigned(m['t'])}({sign}{f.value(a, m['t'])});"


@instruction(r"(?P<op>shl|shr)\.(?P<t>[bus](?:16|32|64))")
def shift(f, m, d, a, n):
    t = unsigned(m["t"]) if m["op"] == "shl" else signed(m["t"])
    return f"{f.register(d)} = {m['op']}<{t}>({f.value(a, m['t'])}, {f.value(n)});"


@instruction(r"shf\.(?P<side>[lr])\.(?P<mode>wrap|clamp)\.b32")
def funnel_shift(f, m, d, lo, hi, n):
    left, wrap = str(m["side"] == "l").lower(), str(m["mode"] == "wrap").lower()
    return f"{f.register(d)} = funnel({f.value(lo)}, {f.value(hi)}, {f.value(n)}, {left}, {wrap});"


@instruction(r"(?P<op>prmt|lop3)\.b32")
def bytes_and_tables(f, m, d, *inputs):
    return f"{f.register(d)} = {m['op']}({', '.join(f.value(x) for x in inputs)});"


@instruction(r"bfe\.(?P<t>[us](?:32|64))")
def extract(f, m, d, a, p, n):
    is_signed = str(m["t"][0] == "s").lower()
    return f"{f.register(d)} = bfe<{unsigned(m['t'])}, {is_signed}>({f.value(a, m['t'])}, {f.value(p)}, {f.value(n)});"


@instruction(r"bfi\.(?P<t>b32|b64)")
def insert(f, m, d, field, into, p, n):
    values = f"{f.value(field, m['t'])}, {f.value(into, m['t'])}, {f.value(p)}, {f.value(n)}"
    return f"{f.register(d)} = bfi<{unsigned(m['t'])}>({values});"


@instruction(r"(?P<op>popc|clz|brev)\.b32")
def count(f, m, d, a):
    x = f.value(a)
    code = {
        "popc": f"u32(__builtin_popcount({x}))",
        "clz": f"{x} ? u32(__builtin_clz({x})) : 32u",
        "brev": f"brev({x})",
    }
    return f"{f.register(d)} = {code[m['op']]};"


@instruction(r"dp4a\.(?P<a>[us])32\.(?P<b>[us])32")
def dot4(f, m, d, a, b, c):
    return f"{f.register(d)} = dp4a<{m['a']}8, {m['b']}8>({f.value(a)}, {f.value(b)}, {f.value(c)});"


# ---- floating point
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


# ---- conversions
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
