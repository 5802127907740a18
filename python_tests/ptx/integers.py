"""Moves and integer arithmetic. The C++ words are those of numbers.h."""

from __future__ import annotations

from .function import instruction, signed, unsigned
from .program import SIZES

INT = r"(?P<t>[us](?:16|32|64))"


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
