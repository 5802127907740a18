"""Branches, barriers, warp collectives and tensor cores."""

from __future__ import annotations

from .function import instruction
from .program import Refusal


@instruction(r"bra(?:\.uni)?")
def branch(f, m, label):
    return f.jump(label)


@instruction(r"brx\.idx(?:\.uni)?")
def branch_by_index(f, m, index, table):
    targets = next((s.tables[table] for s in f.now.scope.walk() if table in s.tables), None)
    if targets is None:
        raise Refusal(f"branch table `{table}` is not declared before its use")
    cases = " ".join(f"case {i}: {f.jump(label)}" for i, label in enumerate(targets))
    past = f.at() + 'fail(T, "OutOfBounds", "branch index beyond its table");'
    return f"switch ({f.value(index)}) {{ {cases} default: {past} }}"


@instruction(r"ret(?:\.uni)?|exit")
def leave(f, m):
    return "return nullptr;"


@instruction(r"trap")
def trap(f, m):
    return f.at() + 'fail(T, "Trap", "trap executed");'


@instruction(r"(?P<kind>bar|barrier)(?:\.cta)?\.(?P<what>sync|arrive)(?P<aligned>\.aligned)?")
def block_barrier(f, m, id, count="0"):
    aligned = str(m["kind"] == "bar" or bool(m["aligned"])).lower()
    if m["what"] == "arrive":
        return f.at() + f"bar_arrive(T, {f.value(id)}, {f.value(count)});"
    return f.at() + f"bar_sync(T, {f.value(id)}, {f.value(count)}, {aligned});"


@instruction(r"(?:bar|barrier)(?:\.cta)?\.red\.(?P<op>popc|and|or)(?:\.aligned)?\.(?:u32|pred)")
def barrier_reduction(f, m, d, id, *rest):
    count = f.value(rest[0]) if len(rest) == 2 else "0"
    return (
        f.at()
        + f"{f.register(d)} = bar_red(T, {f.value(id)}, {count}, {f.value(rest[-1], 'pred')}, {m['op'].upper()});"
    )


@instruction(r"bar\.warp\.sync")
def warp_barrier(f, m, mask):
    return f.at() + f"syncwarp(T, {f.value(mask)});"


@instruction(r"shfl\.sync\.(?P<mode>up|down|bfly|idx)\.b32")
def shuffle(f, m, d, a, b, c, mask):
    value, *flag = d.split("|")
    inside = f"&{f.register(flag[0])}" if flag else "nullptr"
    call = f"shfl(T, {m['mode'].upper()}, {f.value(a)}, {f.value(b)}, {f.value(c)}, {f.value(mask)}, {inside})"
    return f.at() + (f"{f.register(value)} = {call};" if value.strip() != "_" else f"{call};")


@instruction(r"vote\.sync\.(?P<mode>ballot|all|any|uni)\.(?:b32|pred)")
def vote(f, m, d, p, mask):
    return f.at() + f"{f.register(d)} = vote(T, {m['mode'].upper()}, {f.value(p, 'pred')}, {f.value(mask)});"


@instruction(r"redux\.sync\.(?P<op>add|min|max|and|or|xor)\.(?P<t>[usb])32")
def warp_reduction(f, m, d, a, mask):
    kind = m["op"].upper() + (m["t"].upper() if m["op"] in ("min", "max") else "")
    return f.at() + f"{f.register(d)} = redux(T, RX_{kind}, {f.value(a)}, {f.value(mask)});"


@instruction(r"elect\.sync")
def elect(f, m, d, mask):
    value, flag = d.split("|")
    store = f"{f.register(value)} = " if value.strip() != "_" else ""
    return f.at() + f"{store}elect(T, {f.value(mask)}, &{f.register(flag)});"


# ---- mbarrier
@instruction(r"mbarrier\.(?P<what>init|inval)(?:\.shared(?:::cta)?)?\.b64")
def barrier_object(f, m, a, count="0"):
    return f.at() + (
        f"mbarrier_init(T, {shared(f, m, a)}, {f.value(count)});"
        if m["what"] == "init"
        else f"mbarrier_inval(T, {shared(f, m, a)});"
    )


def shared(f, m, a):
    if ".shared" not in m[0]:
        raise Refusal("mbarriers by generic address are not modelled")
    return f"u32({f.address(a)})"


@instruction(r"mbarrier\.arrive(?P<tx>\.expect_tx)?(?:\.release)?(?:\.cta)?\.shared(?:::cta)?\.b64")
def arrive(f, m, d, a, n=None):
    store = f"{f.register(d)} = " if d != "_" else ""
    count, bytes = ("1", f.value(n)) if m["tx"] else (f.value(n) if n else "1", "0")
    return f.at() + f"{store}mbarrier_arrive(T, {shared(f, m, a)}, {count}, {bytes}, true);"


@instruction(r"mbarrier\.expect_tx(?:\.relaxed)?(?:\.cta)?\.shared(?:::cta)?\.b64")
def expect(f, m, a, bytes):
    return f.at() + f"mbarrier_arrive(T, {shared(f, m, a)}, 0, {f.value(bytes)}, false);"


@instruction(r"mbarrier\.(?P<kind>try_wait|test_wait)\.parity(?:\.acquire)?(?:\.cta)?\.shared(?:::cta)?\.b64")
def wait_parity(f, m, d, a, parity, *hint):
    blocking = str(m["kind"] == "try_wait").lower()
    return f.at() + f"{f.register(d)} = mbarrier_wait(T, {shared(f, m, a)}, {f.value(parity)}, {blocking});"


# ---- tensor cores
MMA = {  # operand type: its k's
    "f16": (8, 16),
    "bf16": (8, 16),
    "tf32": (4, 8),
    "s8": (16, 32),
    "u8": (16, 32),
    "s4": (32, 64),
    "u4": (32, 64),
    "e4m3": (32,),
    "e5m2": (32,),
}


@instruction(
    r"mma\.sync\.aligned\.m16n8k(?P<k>\d+)\.row\.col(?P<sat>\.satfinite)?"
    r"\.(?P<d>f16|f32|s32)\.(?P<a>\w+)\.(?P<b>\w+)\.(?P<c>f16|f32|s32)"
)
def mma(f, m, d, a, b, c):
    k, integer = int(m["k"]), m["d"] == "s32"
    kinds = ({"s8", "u8"}, {"s4", "u4"}) if integer else ({"f16"}, {"bf16"}, {"tf32"}, {"e4m3", "e5m2"})
    fits = any(m["a"] in kind and m["b"] in kind for kind in kinds) and k in MMA[m["a"]]
    if not fits or m["c"] != m["d"] or (m["d"] == "f16" and m["a"] != "f16"):
        raise Refusal(f"mma m16n8k{k} of {m['a']} x {m['b']} + {m['c']} is not modelled")
    n = 2 if m["d"] == "f16" else 4
    in_14_bits = m["a"] in ("e4m3", "e5m2") and f.module.target == "sm_89"
    flags = ", ".join(str(x).lower() for x in (integer, bool(m["sat"]), in_14_bits))
    flags = f"{'F16' if n == 2 else 'TF32'}, {flags}"
    call = f"mma(T, {k}, {m['a'].upper()}, {m['b'].upper()}, {flags}"
    arrays = "".join(f"u32 {x}[] = {{{', '.join(f.values(v))}}}; " for x, v in (("ma", a), ("mb", b), ("mc", c)))
    stores = "".join(f" {x} = md[{i}];" for i, x in enumerate(f.values(d)))
    return f.at() + f"{{ {arrays}u32 md[{n}]; {call}, md, ma, mb, mc);{stores} }}"


SCALED = {("mxf4", "2X", "ue8m0"): 2, ("mxf4nvf4", "4X", "ue4m3"): 4}
"""Kind, scale vector and scale type: scales of a row's 64 inputs."""


@instruction(
    r"mma\.sync\.aligned\.m16n8k64\.row\.col\.kind::(?P<kind>\w+)\.block_scale\.scale_vec::(?P<vector>\dX)"
    r"\.f32\.e2m1\.e2m1\.f32\.(?P<scale>\w+)"
)
def mma_scaled(f, m, d, a, b, c, scale_a, select_a, scale_b, select_b):
    blocks = SCALED.get((m["kind"], m["vector"], m["scale"]))
    if blocks is None:
        raise Refusal(f"kind::{m['kind']} with scale_vec::{m['vector']} of {m['scale']} is not modelled")
    scales = []
    for word, selector, threads in ((scale_a, select_a, 2), (scale_b, select_b, 4)):
        byte, thread = (int(x, 0) for x in selector.strip("{}").split(","))
        if byte not in range(0, 4, blocks) or thread not in range(threads):
            raise Refusal(f"scale selector {selector}: bytes are {blocks} from 0 on, threads 0..{threads - 1}")
        scales.append(f"{{{f.values(word)[0]}, {byte}, {thread}}}")
    arrays = "".join(f"u32 {x}[] = {{{', '.join(f.values(v))}}}; " for x, v in (("ma", a), ("mb", b), ("mc", c)))
    stores = "".join(f" {x} = md[{i}];" for i, x in enumerate(f.values(d)))
    call = f"mma_scaled(T, {blocks}, {m['scale'].upper()}, md, ma, mb, mc, {', '.join(scales)});"
    return f.at() + f"{{ {arrays}u32 md[4]; {call}{stores} }}"


@instruction(r"wgmma\.(?P<what>commit_group|wait_group)\.sync\.aligned")
def wgmma_groups(f, m, n="0"):
    return f.at() + ("wgmma_commit(T);" if m["what"] == "commit_group" else f"wgmma_wait(T, {f.value(n)});")


@instruction(r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<n>\d+)k(?P<k>\d+)\.(?P<d>f32|s32)\.(?P<a>\w+)\.(?P<b>\w+)")
def wgmma(f, m, d, a, b, scale_d, *immediates):
    if int(m["k"]) != {"f16": 16, "bf16": 16, "s8": 32, "u8": 32, "e4m3": 32, "e5m2": 32}.get(m["a"]):
        raise Refusal(f"wgmma of {m['a']} with k = {m['k']} is not modelled")
    registers = "{" + ", ".join(f"&{x}" for x in f.values(d)) + "}"
    from_registers = a.startswith("{")
    values = ", ".join(f.values(a)) if from_registers else "0"
    desc_a, words = ("0", "ma") if from_registers else (f.value(a, "b64"), "nullptr")
    flags = [f"s32({f.value(x)})" for x in immediates]
    signs, majors = flags[:2] or ["1", "1"], flags[2:]
    majors = ["0", *majors] if from_registers else majors
    majors = [*majors, "0", "0"][:2]
    types = f"{m['a'].upper()}, {m['b'].upper()}, {str(m['d'] == 's32').lower()}"
    call = f"wgmma(T, {m['n']}, {m['k']}, {types}, md, {words}, {desc_a}"
    tail = ", ".join([f.value(b, "b64"), f.value(scale_d, "pred"), *signs, *majors])
    return f.at() + f"{{ u32* md[] = {registers}; u32 ma[] = {{{values}}}; (void)ma; {call}, {tail}); }}"
