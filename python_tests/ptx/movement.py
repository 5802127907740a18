"""Loads, stores, atomics, asynchronous copies and matrix loads."""

from __future__ import annotations

from .function import instruction, signed, unsigned
from .parse import split
from .program import SIZES, Refusal

SPACE = r"(?:\.(?P<space>global|shared|local|param|const)(?:::cta|::entry)?)?"
TYPE = r"(?P<t>[bus](?:8|16|32|64)|f32|f64)"
ORDER = r"(?:\.(?P<order>weak|volatile|relaxed|acquire|release))?(?:\.(?P<scope>cta|gpu|sys))?"
CACHE = r"(?P<cache>(?:\.(?:ca|cg|cs|lu|cv|wb|wt|nc|L1::\w+|L2::\w+))*)"


def pointer(f, space, address, size, access):
    if space == "shared":
        return f"shared(T, u32({address}), {size}, {access})"
    if space in ("local", "param"):
        return f"{space}(T, {address}, {size})"
    if space in ("global", "const"):
        return f"global(T, {address}, {size}, {access}, {size})"
    return f"generic(T, {address}, {size}, {access})"


def operands(m, found, expected):
    """Without the cache policy that .L2::cache_hint adds."""
    hint = "cache_hint" in (m["cache"] or "")
    if len(found) != expected + hint:
        raise Refusal(f"{len(found)} operands, {expected + hint} expected")
    return found[:expected]


@instruction(r"ld" + ORDER + SPACE + CACHE + r"(?:\.v(?P<n>[248]))?\." + TYPE)
def load(f, m, *found):
    d, a = operands(m, found, 2)
    t, space, order = m["t"], m["space"], m["order"]
    n = int(m["n"] or 1)
    size = SIZES[t] * n
    atomic = order in ("volatile", "relaxed", "acquire")
    access = "ATOMIC_READ" if atomic else "READ_ONLY_CACHE" if ".nc" in m["cache"] else "READ"
    c = signed(t)
    targets = d[1:-1].replace(" ", "").split(",") if d.startswith("{") else [d]
    if len(targets) != n:
        raise Refusal(f"{len(targets)} registers for {n} elements")
    stores = "".join(f" {f.register(x)} = p[{i}];" for i, x in enumerate(targets) if x != "_")
    after = ""
    if atomic and space in ("global", None) and m["scope"] != "cta":
        after = f" acquire(T, {f.address(a)}, {str(order == 'acquire').lower()});"
    p = pointer(f, space, f.address(a), size, access)
    # The address register may be a target.
    return f.at() + f"{{ const {c}* p = (const {c}*){p};{after}{stores} }}"


@instruction(r"st" + ORDER + SPACE + CACHE + r"(?:\.v(?P<n>[248]))?\." + TYPE)
def store(f, m, *found):
    a, v = operands(m, found, 2)
    t, space, order = m["t"], m["space"], m["order"]
    if space in ("param", "const"):
        raise Refusal(f"a store to .{space} is not modelled")
    values = f.values(v, t if SIZES[t] == 8 else "b32")
    if len(values) != int(m["n"] or 1):
        raise Refusal(f"{len(values)} registers for {m['n'] or 1} elements")
    atomic = order in ("volatile", "relaxed", "release")
    before = ""
    if atomic and space in ("global", None) and m["scope"] != "cta":
        before = f"release(T, {f.address(a)}, {str(order == 'release').lower()}); "
    p = pointer(f, space, f.address(a), SIZES[t] * len(values), "ATOMIC" if atomic else "WRITE")
    stores = "".join(f" p[{i}] = {unsigned(t)}({x});" for i, x in enumerate(values))
    return f.at() + f"{before}{{ {unsigned(t)}* p = ({unsigned(t)}*){p};{stores} }}"


def updated(op, t, x):
    """The value an atomic leaves."""
    if op == "add" and t in ("f32", "f64"):
        return f"of_{t}({t}(old) + {t}({x[0]}))"
    if op == "add" and t.startswith(("f16", "bf16")):
        name = f"add_{t.removesuffix('x2')}"
        return f"pairs({name}, old, {x[0]})" if t.endswith("x2") else f"{name}(old, {x[0]})"
    if t[0] in "f":
        raise Refusal(f"atomic {op} of {t} is not modelled")
    s = signed(t)
    table = {
        "add": f"old + {x[0]}",
        "exch": x[0],
        "and": f"old & {x[0]}",
        "or": f"old | {x[0]}",
        "xor": f"old ^ {x[0]}",
    }
    table |= {"min": f"std::min<{s}>(old, {x[0]})", "max": f"std::max<{s}>(old, {x[0]})"}
    table |= {"inc": f"old >= {x[0]} ? 0 : old + 1", "dec": f"old == 0 || old > {x[0]} ? {x[0]} : old - 1"}
    return f"old == {x[0]} ? {x[1]} : old" if op == "cas" else table[op]


@instruction(
    r"(?P<name>atom|red)(?:\.(?P<order>relaxed|acquire|release|acq_rel))?(?:\.(?P<scope>cta|gpu|sys))?"
    r"(?:\.(?P<space>global|shared)(?:::cta)?)?"
    r"\.(?P<op>add|exch|cas|and|or|xor|min|max|inc|dec)(?:\.noftz)?\.(?P<t>[bus](?:32|64)|f32|f64|f16x2|bf16x2|f16|bf16)"
)
def atomic(f, m, *found):
    d, (a, *rest) = (found[0], found[1:]) if m["name"] == "atom" else ("_", found)
    t, order = m["t"], m["order"]
    p = pointer(f, m["space"], f.address(a), SIZES[t], "ATOMIC")
    new = updated(m["op"], t, [f.value(x, t) for x in rest])
    before = after = ""
    if m["space"] != "shared" and m["scope"] != "cta":
        before = f"release(T, where, {str(order in ('release', 'acq_rel')).lower()});"
        after = f"acquire(T, where, {str(order in ('acquire', 'acq_rel')).lower()});"
    u = unsigned(t)
    store = f" {f.register(d)} = old;" if d != "_" else ""
    return (
        f.at()
        + f"{{ u64 where = {f.address(a)}; (void)where; {u}* p = ({u}*){p}; "
        + f"{before} {u} old = *p; *p = {new}; {after}{store} }}"
    )


@instruction(r"(?:fence\.(?:sc|acq_rel)|membar)\.(?P<scope>cta|gpu|sys|gl)")
def memory_fence(f, m):
    # Within a block, barriers order accesses; a fence alone never does.
    return "" if m["scope"] == "cta" else "fence(T);"


@instruction(r"fence\.proxy\.async(?:\.(?:global|shared::cta))?|fence\.mbarrier_init\.release\.cluster")
def async_proxy_fence(f, m):
    return "proxy_fence(T);"


@instruction(r"prefetch(?:u)?(?:\.global)?\.(?:L1|L2)(?:::evict_\w+)?|griddepcontrol\.launch_dependents|nanosleep\.u32")
@instruction(r"setmaxnreg\.(?:inc|dec)\.sync\.aligned\.u32|wgmma\.fence\.sync\.aligned|prefetch\.tensormap")
def hint(f, m, *operands):
    return ";"


@instruction(r"griddepcontrol\.wait")
def grid_wait(f, m):
    return f.at() + "wait_for_grid(T);"


@instruction(r"createpolicy\.fractional\.L2::\w+(?:\.L2::\w+)?\.b64")
def cache_policy(f, m, d, *operands):
    return f"{f.register(d)} = 0;"


# ---- cp.async
@instruction(r"cp\.async\.(?P<kind>ca|cg)\.shared(?:::cta)?\.global(?P<cache>(?:\.L2::\w+)*)")
def copy(f, m, dst, src, size, *rest):
    bytes = int(size, 0)
    if bytes not in ((4, 8, 16) if m["kind"] == "ca" else (16,)):
        raise Refusal(f"cp.async.{m['kind']} of {bytes} bytes")
    rest = rest[: len(rest) - ("cache_hint" in m["cache"])]
    if len(rest) > 1:
        raise Refusal("cp.async with more operands than a source size is not modelled")
    source = f.value(rest[0]) if rest else str(bytes)
    return f.at() + f"cp_async(T, u32({f.address(dst)}), {f.address(src)}, {bytes}, {source});"


@instruction(r"cp\.async\.(?P<what>commit_group|wait_group|wait_all)")
def copy_groups(f, m, n="0"):
    if m["what"] == "commit_group":
        return "cp_commit(T);"
    commit = "cp_commit(T); " if m["what"] == "wait_all" else ""
    return f.at() + f"{commit}cp_wait(T, {f.value(n)});"


@instruction(
    r"cp\.async\.bulk\.tensor\.[1-5]d\.shared::(?:cta|cluster)\.global(?:\.tile)?\.mbarrier::complete_tx::bytes(?P<cache>\.L2::cache_hint)?"
)
def tensor_load(f, m, *found):
    dst, source, barrier = operands(m, found, 3)
    map, coordinates = split(source[1:-1])
    at = ", ".join(f"s32({x})" for x in f.values(coordinates))
    call = (
        f"tma_load(T, u32({f.address(dst)}), {f.value(map, 'b64')}, u32({f.address(barrier)}), {at.count('s32')}, at);"
    )
    return f.at() + f"{{ s32 at[] = {{{at}}}; {call} }}"


@instruction(
    r"cp\.async\.bulk\.shared::(?:cta|cluster)\.global\.mbarrier::complete_tx::bytes(?P<cache>\.L2::cache_hint)?"
)
def bulk(f, m, *found):
    dst, src, size, barrier = operands(m, found, 4)
    return (
        f.at() + f"bulk_load(T, u32({f.address(dst)}), {f.address(src)}, {f.value(size)}, u32({f.address(barrier)}));"
    )


# ---- ldmatrix, stmatrix
@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<n>[124])(?P<trans>\.trans)?\.shared(?:::cta)?\.b16")
def load_matrices(f, m, d, a):
    registers = d[1:-1].replace(" ", "").split(",")
    stores = "".join(f" {f.register(r)} = out[{i}];" for i, r in enumerate(registers))
    call = f"ldmatrix(T, {m['n']}, {str(bool(m['trans'])).lower()}, u32({f.address(a)}), out);"
    return f.at() + f"{{ u32 out[{m['n']}]; {call}{stores} }}"


@instruction(r"stmatrix\.sync\.aligned\.m8n8\.x(?P<n>[124])(?P<trans>\.trans)?\.shared(?:::cta)?\.b16")
def store_matrices(f, m, a, v):
    call = f"stmatrix(T, {m['n']}, {str(bool(m['trans'])).lower()}, u32({f.address(a)}), in);"
    return f.at() + f"{{ u32 in[] = {{{', '.join(f.values(v))}}}; {call} }}"
